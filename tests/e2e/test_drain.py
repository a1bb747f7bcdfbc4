"""A drain that runs out of time: storage is away in a rebalance, and what was started stays started.

Two members have work in flight that cannot end, since storage takes no writes; a third one joins. The drains end at
their deadline, the partitions are given away, and everything that was running goes on running in its old process, with
its own permits and no others, until storage is back.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from brokers import Broker, wait_until
from load import ends
from outages import locked
from sabotage import sabotage
from service_process import ServiceProcess
from stages import SetStage

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.apache]

PARTITIONS = 6
LIMIT = 60
"""Permits of a process."""

IN_FLIGHT = 2
"""Records of each partition that cannot end."""

IMPATIENT = """
from consumer.storage import sqlite

sqlite.BUSY_SECONDS = 0.3
"""
"""An attempt at a locked database fails by itself, here after a moment instead of seconds."""


def releases(service: ServiceProcess) -> list[dict[str, int]]:
    """How each release of partitions ended, by the service's log."""
    return [line["outcomes"] for line in service.log_lines() if line.get("event") == "partitions released"]


def in_flight(service: ServiceProcess) -> list[int]:
    """Operations in flight of each partition."""
    return [one["in_flight"] for one in service.partitions().values()]


def permits(service: ServiceProcess) -> tuple[int, int]:
    """Permits in use, and those that the windows of the assigned partitions make up."""
    state = service.state()
    return state["limiter"]["in_use"], sum(one["window"] for one in state["partitions"])


@pytest.mark.timeout(200)
def test_a_drain_out_of_time_gives_partitions_away_and_keeps_what_runs(apache: Broker, set_stage: SetStage) -> None:
    """Contract 4, I1-I5, H11, H15: timeouts are told, what comes back waits for its older run, permits are exact.

    In the end each record has one response: what ran on in a dead epoch neither answers nor commits.
    """
    stage = set_stage(
        apache,
        partitions=PARTITIONS,
        rebalance={"timeout": "14s", "drain_timeout": "1s"},
        concurrency={"limit": LIMIT},
        retry={"attempts": 2, "initial": "20ms", "max": "200ms", "attempt_timeout": "60s"},
    )
    ledger, environment = stage.ledger, sabotage(stage.folder, IMPATIENT)
    members = [stage.start(name=name, environment=environment) for name in ("first", "second")]
    for member in members:
        member.wait_ready(PARTITIONS // 2)
    for partition in range(PARTITIONS):
        ledger.operate("insert", f"before/{partition}", b"x", partition=partition, statuses={201}, wait=False)
    ledger.flush()
    ledger.wait_answered()
    wait_until(lambda: ledger.committed(stage.group) == ends(ledger), 20, "it to be committed")
    released = [len(releases(member)) for member in members]

    with locked(Path(stage.config["storage"]["high_volume"]["path"])):
        for partition in range(PARTITIONS):
            for number in range(IN_FLIGHT):
                ledger.operate("insert", f"during/{number}", b"x", partition=partition, statuses={201}, wait=False)
        ledger.flush()
        for member in members:
            member.wait(lambda member=member: in_flight(member) == [IN_FLIGHT] * 3, "all of it to be in flight")  # type: ignore[misc]  # bound now, called now
        third = stage.start(ready=False, name="third", environment=environment)
        for member, before in zip(members, released, strict=True):
            member.wait(lambda member=member, before=before: len(releases(member)) > before, "a release", 60)  # type: ignore[misc]  # as above
            assert releases(member)[before:] == [{"timeout": PARTITIONS // 2}]
        for member in members:
            member.wait(lambda member=member: len(member.partitions()) == 2, "two partitions each", 60)  # type: ignore[misc]  # as above
        third.wait(lambda: len(third.partitions()) == 2, "two partitions for the third", 60)

        kept = 0
        for member in members:
            states = list(member.partitions().values())
            recovering = [one for one in states if "recovering" in one["paused_for"]]
            kept += len(recovering)
            assert [one["in_flight"] for one in recovering] == [0] * len(recovering), "it runs twice"
            used, windows = permits(member)
            assert used == windows + IN_FLIGHT * PARTITIONS // 2, "stragglers hold their own permits and no others"
        assert kept >= 2, "void: nothing came back to the process it ran in"
        ledger.read_all()
        assert ledger.answered() == PARTITIONS

    ledger.wait_answered(seconds=60)
    for member in [*members, third]:
        member.wait(lambda member=member: member.ready, "it to be ready again")  # type: ignore[misc]  # as above
        member.wait(lambda member=member: permits(member)[0] == permits(member)[1], "the permits to be back")  # type: ignore[misc]  # as above
        assert all("recovering" not in one["paused_for"] for one in member.partitions().values())
    for member in [third, *members]:
        member.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert ledger.committed(stage.group) == ends(ledger)
