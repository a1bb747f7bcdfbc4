"""A stuck record does not make a crash expensive: what was finished above it is not answered a second time.

What is stuck is the dead letter of one poison record without a key, on a compacted topic, which takes none without a
key: no other record has to do with it, and the topic can be changed later. Until then the offset of that record is
unfinished, though its response is out, so every restart may repeat that one response.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType  # type: ignore[attr-defined]  # not all in __all__

from brokers import Broker, apache_source, maven_broker, wait_until
from ledger import Entry
from service_process import ServiceProcess, command_line
from stages import SetStage, Stage

pytestmark = pytest.mark.slow

BELOW = 20
ABOVE = 600


def stage_with_a_stuck_record(apache: Broker, set_stage: SetStage) -> tuple[Stage, Entry]:
    """One partition: some records, a poison one whose dead letter cannot be written, many records.

    A service that has met the poison one is not ready, perhaps before anybody has asked.
    """
    stage = set_stage(apache, partitions=1)
    topic = apache.create_topic("stuck", 1, cleanup_policy="compact")
    stage.config["dead_letter"]["topic"] = topic
    inserts(stage, BELOW)
    (stuck,) = stage.ledger.send(b"\xff nothing that could be decoded", kind="unknown", statuses={400})
    inserts(stage, ABOVE)
    return stage, stuck


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Broker]:
    """Apache Kafka, of its own, that takes no metadata as long as an offset map."""
    if apache_source() != "maven":
        pytest.skip("needs an Apache Kafka with settings of its own: java and mvn")
    with maven_broker(tmp_path, {"offset.metadata.max.bytes": "40"}) as own:
        yield own


def inserts(stage: Stage, count: int) -> None:
    """Put in so many records, each for an object of its own."""
    for number in range(count):
        name = f"{len(stage.ledger.entries)}-{number}"
        stage.ledger.operate("insert", name, b"x" * 20, statuses={201}, wait=False)
    stage.ledger.flush()


def relieve(stage: Stage) -> None:
    """Let the dead letter topic take records."""
    entry = ConfigEntry("cleanup.policy", "delete", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, stage.config["dead_letter"]["topic"], incremental_configs=[entry])
    for answer in stage.broker.admin.incremental_alter_configs([resource]).values():
        answer.result(timeout=30)


def stored_map(service: ServiceProcess) -> dict[str, Any]:
    """What the group has committed for partition 0, as the command line tells it."""
    path = service.log.with_suffix(".yaml")
    done = command_line("offset-map", "show", "--json", "--config", str(path), cwd=path.parent)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    found: dict[str, Any] = row
    return found


def wait_mapped(service: ServiceProcess, count: int) -> dict[str, Any]:
    """Wait until so many records are finished above the gap, and committed; return the stored map."""

    def finished() -> bool:
        (state,) = service.partitions().values()
        return bool(state["finished_above_gap"] == count and state["offset_map_bytes"])

    service.wait(finished, f"{count} records to be finished above the gap")
    found: dict[str, Any] = {}

    def committed() -> bool:
        found.update(stored_map(service))
        finished: int = sum(last - first + 1 for first, last in found["finished"])
        return finished == count

    service.wait(committed, "the map to be committed")
    return found


def opened(service: ServiceProcess) -> list[int]:
    """How many finished records each assignment began with, from the log."""
    return [line["finished_above"] for line in service.log_lines() if "finished_above" in line]


@pytest.mark.timeout(240)
def test_a_kill_with_a_stuck_record_repeats_nothing_that_was_finished_above_it(
    apache: Broker, set_stage: SetStage
) -> None:
    """Contract 3, I6: two kills, work finished above the gap before and between them; only the stuck one repeats."""
    stage, stuck = stage_with_a_stuck_record(apache, set_stage)
    ledger = stage.ledger

    first = stage.start(ready=False)
    ledger.wait_answered()
    stored = wait_mapped(first, ABOVE)
    first.kill()
    assert (stored["base"], stored["valid"], stored["reason"]) == (stuck.offset, True, None)
    assert stored["finished"] == [[stuck.offset + 1, stuck.offset + ABOVE]]
    assert ledger.committed(stage.group) == {0: stuck.offset}

    inserts(stage, ABOVE)
    second = stage.start(ready=False)
    ledger.wait_answered()
    wait_mapped(second, 2 * ABOVE)
    second.kill()
    relieve(stage)

    third = stage.start(partitions=1)
    end = stuck.offset + 1 + 2 * ABOVE
    third.wait(lambda: ledger.committed(stage.group) == {0: end}, "everything to be committed")
    (state,) = third.partitions().values()
    last = stored_map(third)
    third.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.mismatched) == ([], [])
    assert verdict.duplicated == {stuck.id: 2}
    assert (opened(second), opened(third)) == ([ABOVE], [2 * ABOVE])
    assert (state["finished_above_gap"], state["offset_map_bytes"], last["bytes"]) == (0, 0, 0)


@pytest.mark.timeout(240)
def test_a_clean_stop_with_a_stuck_record_keeps_the_map_too(apache: Broker, set_stage: SetStage) -> None:
    """Contract 3 and 11: the drain ends at its deadline; what was finished is not answered again all the same."""
    stage, stuck = stage_with_a_stuck_record(apache, set_stage)
    stage.config["rebalance"] |= {"drain_timeout": "2s"}
    ledger = stage.ledger
    service = stage.start(ready=False)
    ledger.wait_answered()
    service.terminate()
    assert service.wait_exit() == 1, service.obituary()

    relieve(stage)
    service = stage.start(partitions=1)
    end = stuck.offset + 1 + ABOVE
    service.wait(lambda: ledger.committed(stage.group) == {0: end}, "everything to be committed")
    service.stop()
    ledger.read_all()

    assert ledger.verdict().duplicated == {stuck.id: 1}
    assert opened(service) == [ABOVE]


@pytest.mark.broker
@pytest.mark.apache
@pytest.mark.timeout(240)
def test_a_broker_that_takes_no_map_gets_offsets_without(narrow: Broker, set_stage: SetStage) -> None:
    """Contract 3: committed all the same, and said; what is above the gap then runs again after a kill."""
    stage, stuck = stage_with_a_stuck_record(narrow, set_stage)
    ledger = stage.ledger
    service = stage.start(partitions=1)
    ledger.wait_answered()
    service.wait(lambda: ledger.committed(stage.group) == {0: stuck.offset}, "the commit")
    dropped = 'tierstream_offset_maps_dropped_total{reason="too_large"}'
    service.wait(lambda: service.metrics().get(dropped, 0) > 0, "the map to be left out")
    (state,) = service.partitions().values()
    stored = stored_map(service)
    service.kill()
    relieve(stage)

    again = stage.start(partitions=1)
    end = stuck.offset + 1 + ABOVE
    again.wait(lambda: ledger.committed(stage.group) == {0: end}, "everything to be committed")
    again.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (state["committed"], state["offset_map_bytes"], stored["bytes"]) == (stuck.offset, 0, 0)
    assert len([line for line in service.log_lines() if "broker refuses offset maps" in line.get("event", "")]) == 1
    assert (verdict.missing, verdict.mismatched) == ([], [])
    assert len(verdict.duplicated) == ABOVE + 1


@pytest.mark.timeout(240)
def test_a_cleared_map_lets_everything_run_again(apache: Broker, set_stage: SetStage) -> None:
    """Contract 7: the control of the tests above: without the map, what is above the gap is answered twice."""
    stage, stuck = stage_with_a_stuck_record(apache, set_stage)
    ledger = stage.ledger
    service = stage.start(ready=False)
    ledger.wait_answered()
    wait_mapped(service, ABOVE)
    service.kill()
    relieve(stage)
    path = str(service.log.with_suffix(".yaml"))

    def cleared() -> bool:  # refused until the session of the killed member has ended
        return command_line("offset-map", "clear", "--yes", "--config", path, cwd=stage.folder).returncode == 0

    wait_until(cleared, 40, "the map to be cleared", every=1)
    service = stage.start(partitions=1)
    end = stuck.offset + 1 + ABOVE
    service.wait(lambda: ledger.committed(stage.group) == {0: end}, "everything to be committed")
    service.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.mismatched) == ([], [])
    assert len(verdict.duplicated) == ABOVE + 1
    assert opened(service) == [0]


@pytest.mark.broker
@pytest.mark.apache
@pytest.mark.timeout(240)
def test_a_broker_that_takes_no_map_gets_transactions_without(narrow: Broker, set_stage: SetStage) -> None:
    """Contract 3: exactly-once too goes on where the metadata is refused, and answers each record once."""
    stage = set_stage(narrow, partitions=1, delivery="exactly-once", storage={"threshold": "1KiB"})
    ledger = stage.ledger
    for number in range(400):
        # Large objects take their time in files, beside reads that overtake them: so there are gaps.
        if number % 4:
            ledger.operate("head", f"none/{number}", statuses={404}, wait=False)
        else:
            ledger.operate("insert", f"large/{number}", bytes(300_000), statuses={201}, wait=False)
    ledger.flush()

    service = stage.start(partitions=1)
    ledger.wait_answered()
    dropped = service.metrics().get('tierstream_offset_maps_dropped_total{reason="too_large"}', 0)
    service.wait(lambda: ledger.committed(stage.group).get(0, 0) >= 400, "everything to be committed")
    service.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert len([line for line in service.log_lines() if "broker refuses offset maps" in line.get("event", "")]) == 1
    assert dropped > 0, "void: there was no map to be refused"
