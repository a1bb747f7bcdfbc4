"""Exactly-once, as a reader of committed records sees it: each input record has one response, whatever happens.

On Apache Kafka alone: the subject is its transactions, and the faults need members that expire. Kills are the subject
of `test_chaos.py`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition

from brokers import Broker
from ledger import Reader
from load import PARTITIONS, Load, ends
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
    assert left > 0, "void: the member was frozen with nothing to do"


@pytest.mark.slow
def test_what_the_broker_has_forgotten_of_a_former_owner_is_never_seen(apache: Broker, set_stage: SetStage) -> None:
    """I2: records of a transaction that its coordinator does not know, as a restart may leave them behind.

    Whatever the same producer commits next would make them visible.
    """
    stage = set_stage(apache, partitions=PARTITIONS, delivery="exactly-once")
    ledger = stage.ledger
    apache.alter_brokers(transaction_partition_verification_enable="false")  # else nobody could write such a record
    try:
        asyncio.run(write_outside_of_any_transaction(apache, f"{stage.group}/{ledger.input}/0", ledger.output))
    finally:
        apache.alter_brokers(transaction_partition_verification_enable="true")
    service = stage.start(partitions=PARTITIONS)
    load = Load(ledger)
    load.put(320)
    ledger.flush()
    ledger.wait_answered()
    service.stop()

    check_each_record_has_one_response(load, stage.group)
    every = Reader(apache, ledger.output)
    assert FORGOTTEN in {answer.value for answer in every.read_to_end()}, "void: nothing was left behind"
    every.close()


FORGOTTEN = b"of a transaction that nobody knows"


async def write_outside_of_any_transaction(broker: Broker, transactional_id: str, topic: str) -> None:
    """Write a record of a transaction to partition 0 without telling the coordinator."""
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id=transactional_id)
    await producer.start()
    await producer.begin_transaction()
    producer._txn_manager._txn_partitions.add(TopicPartition(topic, 0))
    await producer.send_and_wait(topic, FORGOTTEN, partition=0)
    await producer.stop()


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
