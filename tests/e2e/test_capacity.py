"""More partitions than permits: a normal state that can be seen, and in which every record is answered."""

from __future__ import annotations

import json

import pytest

from brokers import Broker
from stages import SetStage

PARTITIONS, LIMIT = 60, 50


@pytest.mark.slow
@pytest.mark.parametrize(("exhausted", "with_window"), [("equal-share", 50), ("pause", 22)])
def test_sixty_partitions_on_fifty_permits(
    broker: Broker, set_stage: SetStage, exhausted: str, with_window: int
) -> None:
    """Contract 4, 8, 9: the starved ones are in state, metrics and log; idle windows come to them; all is answered."""
    stage = set_stage(broker, PARTITIONS, concurrency={"limit": LIMIT}, window={"exhausted": exhausted})
    service = stage.start(partitions=PARTITIONS)
    service.wait(lambda: all(one["window"] is not None for one in service.partitions().values()), "windows")

    windows = [one["window"] for one in service.partitions().values()]
    starved = {name for name, one in service.partitions().items() if one["window"] == 0}
    metrics = service.metrics()

    assert (sum(windows), len(starved)) == (LIMIT, PARTITIONS - with_window)
    assert all(one["paused_for"] == ["at_capacity"] for name, one in service.partitions().items() if name in starved)
    paused = {name for name, value in metrics.items() if 'reason="at_capacity"' in name and value == 1}
    assert {int(name.split('partition="')[1].split('"')[0]) for name in paused} == {number for _, number in starved}
    assert metrics["tierstream_concurrency_available"] == 0
    assert metrics['tierstream_window_reservations_total{outcome="at_capacity"}'] >= len(starved)
    said = [line for line in service.log_lines() if line.get("event") == "no permits for this partition"]
    assert {line["partition"] for line in said} == {number for _, number in starved}
    assert json.loads(service.get("/readyz")[1]) == {"ready": True, "reasons": []}, "nobody misses anything yet"

    for number in range(2 * PARTITIONS):
        stage.ledger.operate("head", f"k/{number}", partition=number % PARTITIONS, statuses={404}, wait=False)
    stage.ledger.flush()
    stage.ledger.wait_answered(seconds=120)
    assert len(stage.ledger.answers) == 2 * PARTITIONS
    service.stop()
    stage.ledger.read_all()
    verdict = stage.ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, [])
