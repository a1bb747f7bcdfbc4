"""At-least-once, held against an independent ledger: nothing lost, and nothing repeated without a reason.

The load of these tests is checked to the status: each object is inserted once, read twice and, every fourth one,
deleted, always in one partition, so that key ordering leaves one right answer to each operation, also after a replay
(of a deleted object two: a replayed read may find it gone).

Kills and rebalances are played on Apache Kafka alone. The embedded broker never expires a dead member, so that its
group admits nobody any more; and it begins a new generation with the first request to join, so that whoever then
commits what it has drained is refused.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from confluent_kafka import Message, Producer

from brokers import Broker
from ledger import Ledger
from service_process import ServiceProcess
from stages import SetStage, Stage
from wire import operation

ROUNDS = int(os.environ.get("TIERSTREAM_TEST_SOAK_ROUNDS", "3"))
"""Kills a test makes; `make soak` sets many."""

ROUND_SECONDS = 40
"""A restart after SIGKILL waits for the dead member's session to end, 6 s, and longer where machines are busy."""

PARTITIONS = 4


class Load:
    """Records without end, in the same order in every run; `pump` puts some in and reads what comes out."""

    def __init__(self, ledger: Ledger, batch: int = 160) -> None:
        """Prepare a load for all partitions; *batch* is how many records a pump puts in."""
        self.ledger = ledger
        self.batch = batch
        self.kept: list[tuple[int, str]] = []
        """Objects inserted and never deleted: (partition, key)."""
        self._number = 0

    def put(self, records: int) -> None:
        """Produce *records* more, a multiple of 16, without waiting for the broker."""
        assert records % (4 * PARTITIONS) == 0
        for _ in range(records // 4):
            number, partition = self._number, self._number % PARTITIONS
            key, deleted = f"load/{number}", self._number % 16 < PARTITIONS
            story: list[tuple[str, set[int]]] = [
                ("insert", {201}),
                ("get", {200, 404} if deleted else {200}),
                ("delete" if deleted else "head", {204}),
                ("head", {404} if deleted else {204}),
            ]
            for kind, statuses in story:
                payload = key.encode() * 5 if kind == "insert" else b""
                self.ledger.operate(
                    kind, key, payload, statuses=statuses, key=key.encode(), partition=partition, wait=False
                )
            if not deleted:
                self.kept.append((partition, key))
            self._number += 1

    def pump(self, until: Callable[[], bool], seconds: float = ROUND_SECONDS) -> None:
        """Put in and read out until *until* holds."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"no progress under load: {self.ledger.verdict()}"
            self.put(self.batch)
            self.ledger.poll(0.02)
        self.ledger.flush()


def check_nothing_is_committed_without_its_response(stage: Stage, least: dict[int, int]) -> dict[int, int]:
    """I1, I4, I5: read everything; each record below the committed offset has its response; no commit went back."""
    committed = stage.ledger.committed(stage.group)
    stage.ledger.read_all()
    unanswered = [
        entry.id
        for entry in stage.ledger.entries.values()
        if entry.offset < committed.get(entry.partition, 0) and entry.id not in stage.ledger.answers
    ]
    assert unanswered == []
    assert all(committed.get(partition, 0) >= offset for partition, offset in least.items()), (least, committed)
    return committed


def read_back(load: Load, count: int) -> None:
    """I7: *count* of the objects whose insert was acknowledged, read through the service, are whole."""
    ledger = load.ledger
    chosen = random.Random(7).sample(load.kept, min(count, len(load.kept)))
    before = len(ledger.entries)
    for partition, key in chosen:
        ledger.operate("get", key, statuses={200}, partition=partition, wait=False)
    ledger.flush()
    entries = list(ledger.entries.values())[before:]
    ledger.wait_answered(entries)
    payloads = Counter(ledger.answers[entry.id][0].result["object"]["payload"] for entry in entries)
    assert payloads == Counter(key.encode() * 5 for _, key in chosen)


@pytest.mark.slow
@pytest.mark.timeout(60 + ROUND_SECONDS * (ROUNDS + 1))
def test_hard_kills_under_load_lose_nothing_and_repeat_only_what_was_not_committed(
    apache: Broker, set_stage: SetStage
) -> None:
    """I1, I3-I7, contract 3: SIGKILL at random; at most what was not committed, plus a window a kill, repeats."""
    stage = set_stage(apache, partitions=PARTITIONS)
    ledger, load, chance = stage.ledger, Load(stage.ledger), random.Random(ROUNDS)
    repeats: Counter[str] = Counter()
    committed: dict[int, int] = {}
    windows = killed_with_work = 0
    for _ in range(ROUNDS):
        service = stage.start(partitions=PARTITIONS)
        windows += sum(part["window"] for part in service.partitions().values())
        goal = len(ledger.answers) + chance.randint(200, 2000)
        load.pump(lambda goal=goal: len(ledger.answers) >= goal)  # type: ignore[misc]  # bound now, as it is called now
        load.put(4 * load.batch)
        service.kill()

        ledger.flush()
        time.sleep(0.2)  # a produce request may still be on its way through the loopback
        committed = check_nothing_is_committed_without_its_response(stage, committed)
        repeats.update(
            name for name in ledger.answers if ledger.entries[name].offset >= committed[ledger.entries[name].partition]
        )
        killed_with_work += ledger.answered() < len(ledger.entries)
    service = stage.start(partitions=PARTITIONS)
    ledger.wait_answered(seconds=60)
    read_back(load, 200)
    service.stop()
    committed = check_nothing_is_committed_without_its_response(stage, committed)

    verdict = ledger.verdict()
    unexplained = sum(max(0, count - repeats[name]) for name, count in verdict.duplicated.items())
    print(
        f"{ROUNDS} kills, {killed_with_work} with work left; {verdict}; {unexplained} repeats from a window in flight"
    )
    assert (verdict.missing, verdict.mismatched) == ([], [])
    assert unexplained <= windows
    assert killed_with_work == ROUNDS, "void: the kills hit an idle service"
    assert committed == {partition: ends(ledger)[partition] for partition in range(PARTITIONS)}


def ends(ledger: Ledger) -> dict[int, int]:
    """The offset after the last record put into each partition."""
    last: dict[int, int] = {}
    for entry in ledger.entries.values():
        last[entry.partition] = max(last.get(entry.partition, 0), entry.offset + 1)
    return last


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
def test_a_clean_stop_under_load_leaves_exactly_what_it_did_not_answer(broker: Broker, set_stage: SetStage) -> None:
    """I1, I2, I6, I12, contract 3, 11: SIGTERM under load exits 0, makes no duplicate; a restart goes on from there."""
    stage = set_stage(broker, partitions=PARTITIONS)
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
    assert stopped_with_work > 0, "void: no stop found work left to do"
    assert ledger.committed(stage.group) == ends(ledger)


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
    assert committed_offsets != list(range(len(committed_offsets))), "void: there were no gaps"
    assert ledger.committed(stage.group)[0] > last.offset
