"""At-least-once, held against an independent ledger: nothing lost, and nothing repeated without a reason.

The load of these tests is checked to the status (`load.py`).

Kills and rebalances are played on Apache Kafka alone. The embedded broker never expires a dead member, so that its
group admits nobody any more; and it begins a new generation with the first request to join, so that whoever then
commits what it has drained is refused. Faults by the dozen are the subject of `test_chaos.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from confluent_kafka import Message, Producer

from brokers import Broker
from load import PARTITIONS, Load, check_nothing_is_committed_without_its_response, ends
from second_try import void_unless
from service_process import ServiceProcess
from stages import SetStage
from wire import operation

ROUNDS = 3
"""Stops of the embedded broker's member; `test_chaos.py` makes many, and many kills, on Apache Kafka."""


@pytest.mark.slow
def test_a_kill_after_the_answers_and_before_the_commit_answers_everything_once_more_and_the_same(
    apache: Broker, set_stage: SetStage
) -> None:
    """I1, I6, K-7, contract 5: storage done, responses acknowledged, no commit: the replay writes the same objects."""
    stage = set_stage(apache, partitions=PARTITIONS, commit={"interval": "10m", "max_records": 1_000_000})
    ledger = stage.ledger
    service = stage.start(partitions=PARTITIONS)
    for number in range(400):
        ledger.operate("insert", None, b"%d" % number, statuses={201}, partition=number % PARTITIONS, wait=False)
    ledger.flush()
    ledger.wait_answered()
    service.kill()
    assert set(ledger.committed(stage.group).values()) <= {0}, "nothing was to be committed yet"
    stage.config["commit"] = {"interval": "200ms"}

    service = stage.start(partitions=PARTITIONS)
    service.wait(
        lambda: ledger.committed(stage.group) == dict.fromkeys(range(PARTITIONS), 100), "the replay to be committed"
    )
    service.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.mismatched) == ([], [])
    assert verdict.duplicated == dict.fromkeys(ledger.entries, 1)
    keys = [{answer.response["key"] for answer in copies} for copies in ledger.answers.values()]
    assert all(len(copies) == 1 for copies in keys), "a replayed keyless insert has the same key"
    assert len(set.union(*keys)) == 400


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_clean_stop_under_load_leaves_exactly_what_it_did_not_answer(embedded: Broker, set_stage: SetStage) -> None:
    """I1, I2, I6, I12, contract 3, 11: SIGTERM under load exits 0, makes no duplicate; a restart goes on from there."""
    stage = set_stage(embedded, partitions=PARTITIONS)
    ledger, load = stage.ledger, Load(stage.ledger)
    committed: dict[int, int] = {}
    stopped_with_work = 0
    for _ in range(ROUNDS):
        service = stage.start(partitions=PARTITIONS)
        goal = len(ledger.answers) + 500
        load.pump(lambda goal=goal: len(ledger.answers) >= goal)  # type: ignore[misc]  # bound now, as it is called now
        load.put(8 * load.batch)
        service.stop()

        ledger.flush()
        committed = check_nothing_is_committed_without_its_response(stage, committed)
        beyond = [
            entry.id
            for entry in ledger.entries.values()
            if entry.offset >= committed[entry.partition] and entry.id in ledger.answers
        ]
        assert beyond == [], "answered, drained, and yet not committed"
        stopped_with_work += ledger.answered() < len(ledger.entries)
    service = stage.start(partitions=PARTITIONS)
    ledger.wait_answered(seconds=60)
    service.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert ledger.committed(stage.group) == ends(ledger)
    void_unless(stopped_with_work > 0, "no stop found work left to do")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_members_that_come_and_go_under_load_repeat_nothing(apache: Broker, set_stage: SetStage) -> None:
    """I1, I2, I10, contract 3: two members, three rebalances with work in flight, all drained: each record once."""
    stage = set_stage(apache, partitions=PARTITIONS)
    ledger, load = stage.ledger, Load(stage.ledger)

    def owns(service: ServiceProcess, count: int) -> Callable[[], bool]:
        def owned() -> bool:
            assert service.process.poll() is None, service.obituary()
            return service.ready and len(service.partitions()) == count

        return owned

    first = stage.start(partitions=PARTITIONS, name="first")
    load.pump(lambda: ledger.answered() >= 500)
    second = stage.start(ready=False, name="second")
    load.pump(owns(second, PARTITIONS // 2))
    load.pump(owns(first, PARTITIONS // 2))
    assert not first.partitions().keys() & second.partitions().keys()
    load.put(8 * load.batch)
    first.stop()
    load.pump(owns(second, PARTITIONS))
    third = stage.start(ready=False, name="third")
    load.pump(owns(third, PARTITIONS // 2))
    ledger.wait_answered(seconds=60)
    second.stop()
    third.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert ledger.committed(stage.group) == ends(ledger)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_member_that_is_killed_leaves_its_partitions_to_the_other(apache: Broker, set_stage: SetStage) -> None:
    """I1, I3, I6, I10: two members, one killed under load; the other takes over and answers all of it."""
    stage = set_stage(apache, partitions=PARTITIONS)
    ledger, load = stage.ledger, Load(stage.ledger)
    killed = stage.start(name="killed")
    left = stage.start(partitions=PARTITIONS // 2, name="left")
    load.pump(lambda: ledger.answered() >= 500)
    load.put(4 * load.batch)
    killed.kill()
    ledger.flush()
    time.sleep(0.2)  # a produce request may still be on its way through the loopback
    ledger.read_all()
    committed, before = ledger.committed(stage.group), set(ledger.answers)

    left.wait(lambda: len(left.partitions()) == PARTITIONS, "the other member to own everything")
    ledger.wait_answered(seconds=60)
    left.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    surprising = [
        name for name in verdict.duplicated if name in before and offset_of(name) < committed[partition_of(name)]
    ]
    assert (verdict.missing, verdict.mismatched, surprising) == ([], [], []), verdict


def partition_of(response_id: str) -> int:
    """The partition in TOPIC/PARTITION/OFFSET."""
    return int(response_id.rsplit("/", 2)[1])


def offset_of(response_id: str) -> int:
    """The offset in TOPIC/PARTITION/OFFSET."""
    return int(response_id.rsplit("/", 2)[2])


@pytest.mark.slow
def test_gaps_from_transactions_are_crossed_and_aborted_records_are_not_answered(
    broker: Broker, set_stage: SetStage
) -> None:
    """H9b, contract 2.2: committed and aborted transactions, markers between; index = offset, gaps and all."""
    stage = set_stage(broker, partitions=1)
    ledger = stage.ledger
    settings = {"bootstrap.servers": broker.bootstrap, "transactional.id": stage.group, "log_level": 0}
    producer = Producer(settings)
    producer.init_transactions(30)
    committed_offsets: list[int] = []
    aborted_offsets: list[int] = []
    for number in range(12):
        aborted = number % 3 == 1
        offsets = aborted_offsets if aborted else committed_offsets

        def acknowledged(error: object, record: Message, offsets: list[int] = offsets) -> None:
            assert error is None
            offsets.append(record.offset() or 0)

        producer.begin_transaction()
        for part in range(number % 4 + 1):
            value = operation("insert", f"txn/{number}/{part}", b"x", request_id=f"t-{number}-{part}")
            producer.produce(ledger.input, value, partition=0, on_delivery=acknowledged)
        producer.flush(20)
        (producer.abort_transaction if aborted else producer.commit_transaction)(30)

    service = stage.start(partitions=1)
    expected = [f"{ledger.input}/0/{offset}" for offset in committed_offsets]
    (entry,) = ledger.operate("head", "txn/0/0", statuses={204})
    ledger.answer([entry])
    ledger.read_all()
    service.stop()
    service = stage.start(partitions=1)
    (last,) = ledger.operate("head", "txn/1/0", statuses={404})
    ledger.answer([last])
    service.stop()
    ledger.read_all()

    assert sorted(ledger.answers) == sorted([*expected, entry.id, last.id])
    assert all(len(copies) == 1 for copies in ledger.answers.values())
    assert [ledger.answers[name][0].response["index"] for name in expected] == committed_offsets
    assert aborted_offsets
    assert ledger.committed(stage.group)[0] > last.offset
    void_unless(committed_offsets != list(range(len(committed_offsets))), "there were no gaps")
