"""Exactly-once, as a reader of committed records sees it: each input record has one response, whatever happens.

On Apache Kafka alone: the subject is its transactions, and the faults need members that expire. Kills are the subject
of `test_chaos.py`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import InvalidTxnState, KafkaError

from brokers import Broker
from consumer.config import Config
from consumer.kafka.clients import make_transactional_producer
from consumer.kafka.topics import LATEST, Cluster
from consumer.kafka.transaction_states import TransactionState
from consumer.kafka.transactions import Transactions, TransactionWriter
from consumer.offset_map import SizeLimit
from ledger import Reader
from load import PARTITIONS, Load, ends
from second_try import void_unless
from stages import SetStage


def check_each_record_has_one_response(load: Load, group: str) -> None:
    """I2: nothing missing, repeated or wrong, and everything is committed."""
    load.ledger.read_all()
    verdict = load.ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert load.ledger.committed(group) == ends(load.ledger)


@pytest.mark.slow
def test_every_kind_of_answer_is_there_once_with_its_dead_letter(apache: Broker, set_stage: SetStage) -> None:
    """Contract 3: responses, dead letters and offsets of good and undecodable records, in transactions."""
    stage = set_stage(apache, partitions=PARTITIONS, delivery="exactly-once")
    service = stage.start(partitions=PARTITIONS)
    load = Load(stage.ledger)
    load.put(320)
    poison = stage.ledger.send(b"\x0anot avro at all", kind="unknown", statuses={400})[0]
    stage.ledger.flush()

    stage.ledger.wait_answered()
    letter = stage.ledger.wait_dead_letter(poison)
    service.stop()

    assert letter.value == b"\x0anot avro at all"
    check_each_record_has_one_response(load, stage.group)
    assert len(stage.ledger.dead_letters[poison.id]) == 1


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_member_that_was_frozen_beyond_its_session_writes_nothing_when_it_wakes(
    apache: Broker, set_stage: SetStage
) -> None:
    """I2, H21: SIGSTOP under load, the other member takes over, SIGCONT: fenced, and no response twice.

    Each member has a storage of its own, and the records look for objects that are nowhere: a process that is frozen
    while it holds the lock of a shared file would hold up the other one, which is another subject.
    """
    memory = {"type": "memory"}
    stage = set_stage(
        apache,
        partitions=PARTITIONS,
        delivery="exactly-once",
        storage={"high_volume": memory, "long_term": memory, "change_log": memory},
    )
    ledger = stage.ledger

    def ask(records: int) -> None:
        for number in range(records):
            ledger.operate("head", f"nowhere/{number}", statuses={404}, partition=number % PARTITIONS, wait=False)

    frozen = stage.start(name="frozen")
    other = stage.start(partitions=PARTITIONS // 2, name="other")
    ask(2_000)
    ledger.wait_answered(seconds=60)
    ask(8_000)
    os.kill(frozen.process.pid, signal.SIGSTOP)
    try:
        ledger.flush()
        left = len(ledger.entries) - ledger.answered()
        other.wait(lambda: len(other.partitions()) == PARTITIONS, "the other member to own everything")
        ledger.wait_answered(seconds=60)
    finally:
        os.kill(frozen.process.pid, signal.SIGCONT)
    frozen.wait(lambda: frozen.ready and len(frozen.partitions()) == PARTITIONS // 2, "the frozen member to be back")
    ask(2_000)
    ledger.flush()
    ledger.wait_answered(seconds=60)
    frozen.stop()
    other.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert ledger.committed(stage.group) == ends(ledger)
    void_unless(left > 0, "the member was frozen with nothing to do")


@pytest.mark.slow
def test_what_the_broker_has_forgotten_of_a_former_owner_is_never_seen(apache: Broker, set_stage: SetStage) -> None:
    """I2: records of a transaction that its coordinator does not know, as a restart may leave them behind.

    Whatever the same producer commits next would make them visible.
    """
    stage = set_stage(apache, partitions=PARTITIONS, delivery="exactly-once")
    ledger = stage.ledger
    with unverified(apache):
        asyncio.run(write_outside_of_any_transaction(apache, f"{stage.group}/{ledger.input}/0", ledger.output, 0))
    service = stage.start(partitions=PARTITIONS)
    load = Load(ledger)
    load.put(320)
    ledger.flush()
    ledger.wait_answered()
    service.stop()

    check_each_record_has_one_response(load, stage.group)
    every = Reader(apache, ledger.output)
    left_behind = {answer.value for answer in every.read_to_end()}
    every.close()
    void_unless(FORGOTTEN in left_behind, "nothing was left behind")


FORGOTTEN = b"of a transaction that nobody knows"


@contextmanager
def unverified(broker: Broker) -> Iterator[None]:
    """Have the broker take records of transactions that their coordinator does not know."""
    broker.alter_brokers(transaction_partition_verification_enable="false")
    try:
        yield
    finally:
        broker.alter_brokers(transaction_partition_verification_enable="true")


async def write_outside_of_any_transaction(
    broker: Broker, transactional_id: str, topic: str, partition: int, *, after: str | None = None
) -> None:
    """Write a record of a transaction without telling the coordinator; *after* a commit or an abort of another one."""
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id=transactional_id) as producer:
        await producer.begin_transaction()
        if after is not None:
            await producer.send_and_wait(topic, b"of a transaction that is known", partition=partition)
            await (producer.commit_transaction() if after == "commit" else producer.abort_transaction())
            async with Cluster(reached(broker)) as cluster:
                await completed(cluster, transactional_id)
            await producer.begin_transaction()
        place = TopicPartition(topic, partition)
        producer._txn_manager._txn_partitions.add(place)
        async with asyncio.timeout(30):
            while True:
                try:
                    await producer.send_and_wait(topic, FORGOTTEN, partition=partition)
                except InvalidTxnState:  # a broker takes over its settings in a moment
                    producer._txn_manager.increment_sequence_number(place, -1)
                    await asyncio.sleep(0.1)
                else:
                    return


@pytest.mark.slow
def test_what_the_broker_has_forgotten_is_ended_as_it_was_decided(apache: Broker) -> None:
    """I1: what its coordinator counts as committed becomes visible, be it late; what it does not is never seen."""
    output = apache.create_topic("responses", partitions=2)
    group = f"{output}-group"
    with unverified(apache):
        for partition, end in enumerate(("commit", "abort")):
            writing = write_outside_of_any_transaction(
                apache, f"{group}/operations/{partition}", output, partition, after=end
            )
            asyncio.run(writing)
    reader = Reader(apache, output, isolation="read_committed")
    void_unless([answer.value for answer in reader.poll(1.0)] == [b"of a transaction that is known"], "not forgotten")

    asyncio.run(own_both_partitions(apache, group, output))

    assert [answer.value for answer in reader.read_to_end()] == [FORGOTTEN]
    reader.close()


async def own_both_partitions(broker: Broker, group: str, output: str) -> None:
    """Start the producers of the next owner."""
    for number in range(2):
        place = TopicPartition("operations", number)
        writer = make_writer(broker, group, place, output, lambda error: pytest.fail(repr(error)))
        async with asyncio.timeout(30):
            await writer.start()
        await writer.stop()


def make_writer(
    broker: Broker, group: str, place: TopicPartition, output: str, failed: Callable[[BaseException], None]
) -> TransactionWriter:
    """Make the writer of an input partition whose owner is a member for ever."""
    config = reached(broker, group_id=group)
    transactions = Transactions(
        group_id=group,
        ask_cluster=partial(Cluster, config),
        make_producer=partial(make_transactional_producer, config),
        interval_seconds=0.0,
        output=partial(TopicPartition, output),
        dead_letters=None,
    )

    async def is_member() -> bool:
        return True

    async def committed() -> tuple[int, str] | None:
        async with Cluster(config) as cluster:
            found = (await cluster.committed(group, [place])).get(place)
        return None if found is None else (found.offset, found.metadata)

    return transactions.writer(
        place, is_member=is_member, committed=committed, map_size=SizeLimit(), failed=failed
    )


@pytest.mark.slow
def test_what_the_broker_has_forgotten_of_the_last_commit_is_written_again(
    apache: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1: the next transaction, which fails, takes it along; its offsets are committed, so nobody else writes it."""
    source, output = apache.create_topic("operations"), apache.create_topic("responses")
    with unverified(apache):
        asyncio.run(forget_the_first_of_three(apache, TopicPartition(source, 0), output, monkeypatch))

    reader = Reader(apache, output, isolation="read_committed")
    assert [answer.value for answer in reader.read_to_end()] == [b"0", b"1", b"2"]
    reader.close()


class Owner:
    """An assignment whose records are all answered, and whoever handed them in."""

    def __init__(self) -> None:
        self.committed: int | None = None
        self.committed_map = ""
        self.acknowledged_tokens: list[int] = []

    def settle(self, offsets: Sequence[int]) -> tuple[int, str]:
        return max(offsets) + 1, ""

    def transaction_committed(self, offset: int, metadata: str, *, map_left_out: bool) -> None:
        self.committed, self.committed_map = offset, metadata

    def lose(self) -> None:
        raise AssertionError

    def acknowledged(self, tokens: Sequence[int]) -> None:
        self.acknowledged_tokens.extend(tokens)

    def refused(self, token: int) -> None:
        raise AssertionError


async def forget_the_first_of_three(
    broker: Broker, source: TopicPartition, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commit a transaction of which the coordinator knows the offsets alone; let the next one fail, and write on."""
    failures: list[BaseException] = []
    group = f"{output}-group"
    writer, owner = make_writer(broker, group, source, output, failures.append), Owner()
    place = TopicPartition(output, 0)
    async with asyncio.timeout(60):
        await writer.start()
        producer = writer._producer
        assert producer is not None
        manager = producer._txn_manager
        monkeypatch.setattr(manager, "maybe_add_partition_to_txn", manager._txn_partitions.add)
        writer.begin(owner)
        for number in range(3):
            writer.lane(place).append(b"key", b"%d" % number, [], owner, number)
            while len(owner.acknowledged_tokens) == number:
                assert failures == []
                await asyncio.sleep(0.01)
            if number == 0:
                monkeypatch.undo()
                async with Cluster(reached(broker)) as cluster:
                    await completed(cluster, f"{group}/{source.topic}/0")
                    stable = await cluster.offsets([place], LATEST, committed_only=True)
                    void_unless(stable != await cluster.offsets([place], LATEST), "not forgotten")
                monkeypatch.setattr(producer, "commit_transaction", fail)
        await writer.stop()
    assert owner.acknowledged_tokens == [0, 1, 2]
    assert writer._producer is not producer


async def fail() -> None:
    """A step that fails."""
    raise KafkaError


@pytest.mark.slow
def test_what_is_asked_of_a_coordinator_is_answered_with_the_truth(apache: Broker) -> None:
    """I1, I2: how a transaction was decided, and who leads what its markers go to, in the broker's own bytes."""
    topic = apache.create_topic("responses", partitions=2)
    asyncio.run(compare_with_the_truth(apache, f"{topic}/group", topic))


def reached(broker: Broker, **kafka: str) -> Config:
    """A configuration."""
    return Config.model_validate({"kafka": {"bootstrap_servers": [broker.bootstrap], **kafka}})


async def completed(cluster: Cluster, transactional_id: str) -> TransactionState:
    """Wait for the markers of the last transaction."""
    async with asyncio.timeout(30):
        while (state := await cluster.transaction(transactional_id)) is None or not state.complete:  # noqa: ASYNC110 - a broker's event
            await asyncio.sleep(0.01)
        return state


async def compare_with_the_truth(broker: Broker, transactional_id: str, topic: str) -> None:
    """Play one transaction after another and ask for each."""
    async with asyncio.timeout(60), Cluster(reached(broker)) as cluster:
        assert await cluster.transaction(transactional_id) == TransactionState("Empty"), "nobody has used it"
        async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id=transactional_id) as producer:
            assert await cluster.transaction(transactional_id) == TransactionState("Empty")
            for end, committed in ((producer.commit_transaction, True), (producer.abort_transaction, False)):
                await producer.begin_transaction()
                await producer.send_and_wait(topic, b"", partition=0)
                ongoing = await cluster.transaction(transactional_id)
                assert ongoing == TransactionState("Ongoing")
                assert (ongoing.committed, ongoing.complete) == (None, False)
                await end()
                assert (await completed(cluster, transactional_id)).committed is committed
        places = [(topic, 0), (topic, 1), (topic, 2), (f"{topic}-missing", 0)]
        assert await cluster.marker_leaders(transactional_id, f"{topic}-group", places) == {
            (topic, 0): (1, 0),
            (topic, 1): (1, 0),
        }


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_members_that_come_and_go_under_load_repeat_nothing(apache: Broker, set_stage: SetStage) -> None:
    """I1, I2: a rebalance in the middle of transactions ends them or gives them up; no response is there twice."""
    stage = set_stage(apache, partitions=PARTITIONS, delivery="exactly-once")
    ledger, load = stage.ledger, Load(stage.ledger)
    first = stage.start(partitions=PARTITIONS, name="first")
    load.pump(lambda: ledger.answered() >= 500)
    second = stage.start(ready=False, name="second")
    load.pump(lambda: second.ready and len(second.partitions()) == PARTITIONS // 2)
    load.put(4 * load.batch)
    first.stop()
    load.pump(lambda: second.ready and len(second.partitions()) == PARTITIONS)
    ledger.flush()
    ledger.wait_answered(seconds=60)
    second.stop()

    check_each_record_has_one_response(load, stage.group)


@pytest.mark.slow
def test_a_response_the_topic_refuses_becomes_a_failure_in_its_place(apache: Broker, set_stage: SetStage) -> None:
    """H18c, H20: a refused batch aborts its transaction; the record it was for is answered, and its neighbours too."""
    stage = set_stage(apache, partitions=1, delivery="exactly-once", limits={"response_bytes": "600KB"})
    service = stage.start(partitions=1)
    ledger = stage.ledger
    ledger.answer(ledger.operate("insert", "large", random.Random(1).randbytes(400_000), statuses={201}))
    apache.alter_topic(ledger.output, max_message_bytes=100_000)

    for kind, key, statuses in (("insert", "before", {201}), ("get", "large", {413}), ("head", "large", {204})):
        ledger.operate(kind, key, b"x", statuses=statuses, wait=False)
    ledger.flush()
    ledger.wait_answered(seconds=60)
    service.stop()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
