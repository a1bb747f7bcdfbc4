"""Too many poison records in a partition: it is read no more, or the service stops; its neighbour goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from brokers import Broker, wait_until
from ledger import Entry
from service_process import ServiceProcess
from stages import SetStage, Stage

POISON = b"\x02"
"""A datum that ends early: `decode_error`."""


def send_poison(stage: Stage, records: int, partition: int = 0) -> list[Entry]:
    """Produce *records* poison records to *partition*."""
    ledger = stage.ledger
    return [
        entry
        for _ in range(records)
        for entry in ledger.send(POISON, key=b"k", partition=partition, kind="unknown", statuses={400})
    ]


def send_good(stage: Stage, records: int, partition: int = 0) -> list[Entry]:
    """Produce *records* good ones to *partition*."""
    return [
        entry
        for number in range(records)
        for entry in stage.ledger.operate("head", f"good/{number}", partition=partition, statuses={404})
    ]


def wait_answered(stage: Stage, entries: Sequence[Entry]) -> None:
    """Wait until *entries* are answered, and the poison among them dead-lettered."""
    stage.ledger.wait_answered(entries)
    for entry in entries:
        if entry.kind == "unknown":
            stage.ledger.wait_dead_letter(entry)


def answered_at_all(stage: Stage, entries: Sequence[Entry]) -> int:
    """How many of *entries* have a response once everything on the output topic is read."""
    stage.ledger.read_all()
    return stage.ledger.answered(entries)


def is_paused(service: ServiceProcess, stage: Stage, partition: int = 0) -> bool:
    """Whether the service says that *partition* is paused for the poison limit, and for nothing else."""
    state = service.partitions().get((stage.ledger.input, partition), {})
    return bool(state.get("paused_for") == ["poison_limit"] and state["in_flight"] == 0)


@pytest.mark.slow
def test_a_run_of_poison_pauses_its_partition_alone(broker: Broker, set_stage: SetStage) -> None:
    """Contract 6 and 8: the N-th in a row is answered, dead-lettered and committed; nothing after it is touched."""
    stage = set_stage(broker, dead_letter={"max_consecutive": 3})
    before = [*send_poison(stage, 2), *send_good(stage, 1), *send_poison(stage, 3)]
    after = [*send_good(stage, 20), *send_poison(stage, 5)]
    service = stage.start(ready=False)
    service.wait(lambda: is_paused(service, stage), "partition 0 to be paused")

    wait_answered(stage, before)
    healthy = send_good(stage, 200, partition=1)
    wait_answered(stage, healthy)
    status, body = service.get("/readyz")
    last = before[-1].offset
    wait_until(lambda: stage.ledger.committed(stage.group).get(0) == last + 1, 20, "the last one to be committed")
    metrics = service.metrics()

    assert answered_at_all(stage, after) == 0
    assert (status, [stage.ledger.input + "/0" in reason for reason in json.loads(body)["reasons"]]) == (503, [True])
    paused = [name for name, value in metrics.items() if "poison_limit" in name and value == 1]
    assert [f'partition="{number}"' in name for name in paused for number in (0, 1)] == [True, False]
    service.stop()
    stage.ledger.read_all()
    assert not stage.ledger.verdict().duplicated


@pytest.mark.slow
def test_a_restart_reads_on_behind_the_poison(broker: Broker, set_stage: SetStage) -> None:
    """Contract 6: paused until restart; then the record after the N-th is the first one read, counted from anew."""
    stage = set_stage(broker, dead_letter={"max_consecutive": 3})
    before = send_poison(stage, 3)
    after = [*send_poison(stage, 2), *send_good(stage, 5)]
    first = stage.start(ready=False)
    first.wait(lambda: is_paused(first, stage), "partition 0 to be paused")
    wait_answered(stage, before)
    first.stop()
    assert answered_at_all(stage, after) == 0

    second = stage.start(partitions=2)
    wait_answered(stage, after)

    second.stop()
    stage.ledger.read_all()
    verdict = stage.ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict


@pytest.mark.slow
def test_a_ratio_stops_the_service_with_4(broker: Broker, set_stage: SetStage) -> None:
    """Contract 6 and 11: above the ratio of a full window the service drains and exits with 4, and says why."""
    stage = set_stage(broker, dead_letter={"max_ratio": 0.4, "ratio_window": 10, "on_limit": "stop"})
    healthy = send_good(stage, 30, partition=1)
    before = [*send_poison(stage, 4), *send_good(stage, 6)]  # 4 of 10 is not above 0.4
    before += send_good(stage, 4)  # the first poison records leave the window
    before += send_poison(stage, 5)
    after = send_good(stage, 10)
    service = stage.start(ready=False)

    code = service.wait_exit()

    assert code == 4, service.obituary()
    wait_answered(stage, before)
    assert answered_at_all(stage, after) == 0
    last = before[-1].offset
    assert stage.ledger.committed(stage.group)[0] == last + 1
    said = [line for line in service.log_lines() if line.get("level") == "error"]
    name = f"{stage.ledger.input}/0"
    assert [line for line in said if name in str(line.get("error")) and "5 of the last 10" in str(line)], said
    verdict = stage.ledger.verdict()
    assert not verdict.duplicated
    assert set(verdict.missing) <= {entry.id for entry in [*after, *healthy]}


@pytest.mark.slow
def test_without_limits_poison_never_ends(broker: Broker, set_stage: SetStage) -> None:
    """Contract 6: the default has no limit."""
    stage = set_stage(broker)
    entries = [*send_poison(stage, 50), *send_good(stage, 1)]
    service = stage.start(partitions=2)

    wait_answered(stage, entries)

    assert service.ready
    service.stop()
