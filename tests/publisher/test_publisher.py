"""The publisher on real brokers: order, exactly one answer for each record, and what it survives."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, OutOfOrderSequenceNumber, ProducerFenced, TopicAuthorizationFailedError
from aiokafka.producer.message_accumulator import BatchBuilder, MessageAccumulator
from aiokafka.producer.sender import Sender
from aiokafka.structs import OffsetAndMetadata
from aiokafka.structs import TopicPartition as Place
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka import Message as Written

from brokers import Broker, Node, noida_broker, unused_port
from consumer.kafka import publisher as publisher_module
from consumer.kafka.publisher import Lane, Publisher

WAIT_SECONDS = 30
"""Bound of every wait; none of them is a measure of anything."""

ATTEMPT_SECONDS = 20.0
"""Attempt timeout where being stuck is not the subject."""


class Owner:
    """Hands records in and writes down what it hears."""

    def __init__(self) -> None:
        self.acknowledged_tokens: list[int] = []
        self.refused_tokens: list[int] = []
        self._heard = asyncio.Event()

    def acknowledged(self, tokens: Sequence[int]) -> None:
        assert tokens
        self.acknowledged_tokens.extend(tokens)
        self._heard.set()

    def refused(self, token: int) -> None:
        self.refused_tokens.append(token)
        self._heard.set()

    def hand_in(self, lane: Lane, tokens: Sequence[int], value: bytes = b"") -> None:
        """Append a record for each token; its key is the token."""
        for token in tokens:
            lane.append(str(token).encode(), value, [], self, token)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for an answer after which *condition* holds."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                self._heard.clear()
                await self._heard.wait()

    async def until_answered(self, number: int) -> None:
        """Wait until so many records are answered, one way or the other."""
        await self.until(lambda: len(self.acknowledged_tokens) + len(self.refused_tokens) >= number)


class Producers:
    """Makes producers for one broker, of one class after another; the last one repeats."""

    def __init__(self, bootstrap: str, *classes: type[AIOKafkaProducer]) -> None:
        self.bootstrap = bootstrap
        self.classes = list(classes) or [AIOKafkaProducer]
        self.made: list[AIOKafkaProducer] = []

    def __call__(self, max_batch_size: int) -> AIOKafkaProducer:
        made = self.classes[min(len(self.made), len(self.classes) - 1)](
            bootstrap_servers=self.bootstrap,
            acks="all",
            enable_idempotence=True,
            compression_type="lz4",
            linger_ms=0,
            max_batch_size=max_batch_size,
            request_timeout_ms=20_000,
        )
        self.made.append(made)
        return made


class Sending(AIOKafkaProducer):
    """A producer as it is; the doubles send through this, as the client's own methods have no types."""

    async def sent(self, batch: BatchBuilder, topic: str, partition: int) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = await super().send_batch(batch, topic, partition=partition)  # type: ignore[no-untyped-call]  # the vendor's
        return future


class BatchNotSent(AIOKafkaProducer):
    """The batch never leaves the client."""

    async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
        raise KafkaError("not sent")


class BatchRefused(AIOKafkaProducer):
    """The broker refuses the batch: a sequence number is missing (H18)."""

    async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
        refused: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        refused.set_exception(OutOfOrderSequenceNumber())
        return refused


class AnswerLost(Sending):
    """The batch is written, and nobody hears of it."""

    async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
        await (await self.sent(batch, topic, partition))
        raise KafkaError("answer lost")


class ConnectionLost(AIOKafkaProducer):
    """The system says so, not Kafka."""

    async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
        raise ConnectionResetError


class Forbidden(AIOKafkaProducer):
    """The topic may not be written to."""

    async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
        raise TopicAuthorizationFailedError(topic)


class StopRaises(BatchNotSent):
    """Ending it fails, as it does where a task of the client has died (H17b)."""

    async def stop(self) -> None:
        await super().stop()  # type: ignore[no-untyped-call]  # the vendor's
        raise asyncio.CancelledError


class LogLines(logging.Handler):
    """Lets a test wait for a line of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._written = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self._written.set()

    async def until(self, beginning: str, times: int = 1) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while sum(text.startswith(beginning) for text in self.texts) < times:
                self._written.clear()
                await self._written.wait()


@pytest.fixture
async def lines() -> AsyncIterator[LogLines]:
    """What the publisher logs."""
    handler = LogLines()
    logger = logging.getLogger("consumer.kafka.publisher")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def failures() -> list[BaseException]:
    """What `on_failure` was told; a test that expects something takes it out."""
    return []


@pytest.fixture
async def make(failures: list[BaseException]) -> AsyncIterator[Callable[..., Publisher]]:
    """A maker of publishers, stopped at the end, none of which may have failed unseen."""
    made: list[Publisher] = []

    def make(producers: Callable[[int], AIOKafkaProducer], attempt_timeout: float = ATTEMPT_SECONDS) -> Publisher:
        made.append(Publisher(producers, attempt_timeout_seconds=attempt_timeout, on_failure=failures.append))
        return made[-1]

    yield make
    while made:
        await made.pop().stop(5)
    gc.collect()  # an exception nobody looked at is reported now, while the guard listens
    assert failures == []


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """An embedded broker of this test alone, to be frozen and killed."""
    with noida_broker(tmp_path) as broker:
        yield broker


def is_stuck(publisher: Publisher) -> bool:
    """Ask anew; a type checker takes an attribute for unchanged."""
    return publisher.stuck


def written(broker: Broker, topic: str, partition: int = 0) -> list[Written]:
    """Every record of a partition, read by a client of another make."""
    reader = Consumer(
        {"bootstrap.servers": broker.bootstrap, "group.id": "reader", "enable.auto.commit": False, "log_level": 0}
    )
    at = TopicPartition(topic, partition, 0)
    _, end = reader.get_watermark_offsets(at, timeout=WAIT_SECONDS)
    reader.assign([at])
    records: list[Written] = []
    while not records or (records[-1].offset() or 0) < end - 1:
        if end == 0:
            break
        record = reader.poll(WAIT_SECONDS)
        assert record is not None, f"{len(records)} of {end} records read"
        assert record.error() is None, record.error()
        records.append(record)
    reader.close()
    return records


def keys(broker: Broker, topic: str, partition: int = 0) -> list[int]:
    """The tokens written to a partition."""
    return [int(record.key() or b"") for record in written(broker, topic, partition)]


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that no compression makes smaller."""
    return random.Random(seed).randbytes(size)


# --------------------------------------------------------------------------------------------- order and answers


async def test_every_lane_is_written_and_acknowledged_in_order_each_record_once(
    broker: Broker, make: Callable[..., Publisher]
) -> None:
    """Contract 3; style 5.1: what is appended while a batch is on its way goes into the next one."""
    topic = broker.create_topic("lanes", 3)
    publisher = make(producers := Producers(broker.bootstrap))
    await publisher.start()
    owners = [Owner() for _ in range(3)]
    lanes = [publisher.lane(topic, partition) for partition in range(3)]
    for burst in range(0, 6000, 300):
        for owner, lane in zip(owners, lanes, strict=True):
            owner.hand_in(lane, range(burst, burst + 300), b"x" * 150)
        await owners[burst % 3].until_answered(burst // 2)
    for owner in owners:
        await owner.until_answered(6000)

    assert [owner.acknowledged_tokens for owner in owners] == [list(range(6000))] * 3
    assert publisher.waiting == 0
    assert not is_stuck(publisher)
    assert [keys(broker, topic, partition) for partition in range(3)] == [list(range(6000))] * 3
    assert len(producers.made) == 1


async def test_owners_of_one_lane_hear_only_of_their_own(embedded: Broker, make: Callable[..., Publisher]) -> None:
    """Two input partitions may share an output partition (contract 2.3); each hears of its tokens, in lane order."""
    topic = embedded.create_topic("shared")
    publisher = make(Producers(embedded.bootstrap))
    lane = publisher.lane(topic, 0)
    first, second = Owner(), Owner()
    for token in range(30):
        (first if token % 3 else second).hand_in(lane, [token])
    assert publisher.waiting == 30
    await publisher.start()
    await first.until_answered(20)
    await second.until_answered(10)

    assert first.acknowledged_tokens == [token for token in range(30) if token % 3]
    assert second.acknowledged_tokens == [token for token in range(30) if not token % 3]
    assert keys(embedded, topic) == list(range(30))


async def test_what_gathered_before_is_one_batch(
    embedded: Broker, make: Callable[..., Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing is what makes responses cheap: one send and one future for all that waits."""
    sent: list[int] = []

    class Counted(Sending):
        async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
            sent.append(batch.record_count())
            return await self.sent(batch, topic, partition)

    publisher = make(Producers(embedded.bootstrap, Counted))
    owner = Owner()
    owner.hand_in(publisher.lane(embedded.create_topic("packed"), 0), range(1000), b"x" * 150)
    await publisher.start()
    await owner.until_answered(1000)

    assert sent == [1000]


async def test_lanes_that_are_busy_leave_together_and_no_more_often_than_the_pace(
    embedded: Broker, make: Callable[..., Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch costs as much as fifty responses; what trickles in is gathered, and the first of it goes at once."""
    monkeypatch.setattr(publisher_module, "PACE_SECONDS", 3600.0)
    left: list[tuple[int, int]] = []

    class Counted(Sending):
        async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
            left.append((partition, batch.record_count()))
            return await self.sent(batch, topic, partition)

    publisher = make(Producers(embedded.bootstrap, Counted))
    topic = embedded.create_topic("paced", 2)
    lanes, owners = [publisher.lane(topic, partition) for partition in range(2)], [Owner(), Owner()]
    await publisher.start()
    for lane, owner in zip(lanes, owners, strict=True):
        owner.hand_in(lane, [0])
        await owner.until_answered(1)  # nothing was sent before it: there is nothing to gather with
    assert left == [(0, 1), (1, 1)]

    for number in range(1, 51):
        for lane, owner in zip(lanes, owners, strict=True):
            owner.hand_in(lane, [number])
        await asyncio.sleep(0)
    assert len(left) == 2
    assert publisher._departure is not None
    publisher._depart(publisher._departure)
    for owner in owners:
        await owner.until_answered(51)

    assert sorted(left[2:]) == [(0, 50), (1, 50)]


async def test_the_time_that_an_answer_takes_is_part_of_the_pace(
    embedded: Broker, make: Callable[..., Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two batches of a lane lies the pace, not an answer and the pace: no response waits longer than that."""
    pace, now, waits = 3600.0, [0.0], list[float]()
    monkeypatch.setattr(publisher_module, "PACE_SECONDS", pace)
    monkeypatch.setattr(publisher_module, "time", SimpleNamespace(monotonic=lambda: now[0], time_ns=time.time_ns))
    answers = iter([pace / 4, pace * 2, 0.0])

    class Slow(Sending):
        async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
            now[0] += next(answers)
            return await self.sent(batch, topic, partition)

    publisher = make(Producers(embedded.bootstrap, Slow))
    lane, owner = publisher.lane(embedded.create_topic("slow-answers"), 0), Owner()
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def depart_at_once(seconds: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        if callback == publisher._depart:
            waits.append(seconds)
            seconds = 0.0
        return call_later(seconds, callback, *args)

    monkeypatch.setattr(loop, "call_later", depart_at_once)
    await publisher.start()
    for number in range(3):
        owner.hand_in(lane, [number])
        await owner.until_answered(number + 1)

    assert waits == [pace * 3 / 4]  # before the second; the third went at once, after an answer that took two paces


async def test_a_batch_that_is_full_waits_for_no_departure(
    embedded: Broker, make: Callable[..., Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pace is for what is small: large responses go as fast as the broker takes them."""
    monkeypatch.setattr(publisher_module, "PACE_SECONDS", 3600.0)
    publisher = make(Producers(embedded.bootstrap))
    owner = Owner()
    lane = publisher.lane(embedded.create_topic("large-ones"), 0)
    owner.hand_in(lane, range(8), noise(publisher_module.BATCH_BYTES // 2))  # one to a batch
    await publisher.start()

    await owner.until_answered(8)


async def test_records_are_written_as_they_are_given(broker: Broker, make: Callable[..., Publisher]) -> None:
    """Contract 2.3: key, value and headers with bytes, order and repeats; null stays null."""
    topic = broker.create_topic("bytes")
    publisher = make(Producers(broker.bootstrap))
    await publisher.start()
    owner, lane = Owner(), publisher.lane(topic, 0)
    headers = [("traceparent", b"\x00\xff"), ("größe", b""), ("traceparent", b"again")]
    lane.append(None, b"value", headers, owner, 0)
    lane.append(b"\x00key", None, [], owner, 1)
    lane.append(b"", b"", [], owner, 2)
    await owner.until_answered(3)

    records = written(broker, topic)
    assert [(record.key(), record.value()) for record in records] == [(None, b"value"), (b"\x00key", None), (b"", b"")]
    assert records[0].headers() == headers


# --------------------------------------------------------------------------------------------- sizes


async def test_a_batch_that_is_too_large_is_split(broker: Broker, make: Callable[..., Publisher]) -> None:
    """H18: the broker bounds the batch; a topic that takes less than we pack gets less, and nothing is lost."""
    topic = broker.create_topic("small", max_message_bytes=20_000)
    publisher = make(producers := Producers(broker.bootstrap))
    await publisher.start()
    owner, lane = Owner(), publisher.lane(topic, 0)
    for token in range(200):
        owner.hand_in(lane, [token], noise(1000, token))
    await owner.until_answered(200)

    assert owner.acknowledged_tokens == list(range(200))
    assert owner.refused_tokens == []
    assert keys(broker, topic) == list(range(200))
    replaced = len(producers.made)
    assert 1 < replaced < 10

    for token in range(200, 600):
        owner.hand_in(lane, [token], noise(1000, token))
    await owner.until_answered(600)
    assert len(producers.made) == replaced  # what was learned is kept
    assert keys(broker, topic) == list(range(600))


async def test_a_record_that_is_too_large_goes_back_to_its_owner(
    broker: Broker, make: Callable[..., Publisher]
) -> None:
    """K-9, H18c: never a stuck partition; the smaller answer takes the refused one's place, so the order is kept."""

    class Answering(Owner):
        def refused(self, token: int) -> None:
            lane.append(str(token).encode(), b"too large", [], self, token)
            super().refused(token)

    topic = broker.create_topic("large", max_message_bytes=20_000)
    publisher = make(Producers(broker.bootstrap))
    owner, lane = Answering(), publisher.lane(topic, 0)
    for token in range(40):
        owner.hand_in(lane, [token], noise(30_000 if token in {7, 8, 31} else 900, token))
    await publisher.start()
    await owner.until(lambda: len(owner.acknowledged_tokens) >= 40)

    assert owner.refused_tokens == [7, 8, 31]
    assert owner.acknowledged_tokens == list(range(40))
    assert keys(broker, topic) == list(range(40))
    answered = [record.key() for record in written(broker, topic) if record.value() == b"too large"]
    assert answered == [b"7", b"8", b"31"]
    assert not is_stuck(publisher)


async def test_a_refused_record_that_nobody_replaces_holds_up_nothing(
    broker: Broker, make: Callable[..., Publisher]
) -> None:
    """A dead letter may be given up; the lane goes on."""
    topic = broker.create_topic("given-up", max_message_bytes=20_000)
    publisher = make(Producers(broker.bootstrap))
    await publisher.start()
    owner, lane = Owner(), publisher.lane(topic, 0)
    owner.hand_in(lane, [0], noise(30_000))
    owner.hand_in(lane, [1])
    await owner.until_answered(2)

    assert (owner.refused_tokens, owner.acknowledged_tokens) == ([0], [1])
    assert publisher.waiting == 0


async def test_a_record_larger_than_a_batch_goes_alone(apache: Broker, make: Callable[..., Publisher]) -> None:
    """Contract 2: responses up to 2 MiB are written where the topic takes them."""
    topic = apache.create_topic("huge", max_message_bytes=8_000_000)
    publisher = make(producers := Producers(apache.bootstrap))
    owner, lane = Owner(), publisher.lane(topic, 0)
    owner.hand_in(lane, [0], b"small")
    owner.hand_in(lane, [1], noise(2_000_000))
    owner.hand_in(lane, [2], b"small")
    await publisher.start()
    await owner.until_answered(3)

    assert owner.acknowledged_tokens == keys(apache, topic) == [0, 1, 2]
    assert len(producers.made) == 1


async def test_bytes_on_their_way_are_bounded_over_all_lanes(
    embedded: Broker, make: Callable[..., Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """H18e: one request carries the batches of all lanes; one above the broker's limit would be sent again for ever."""
    monkeypatch.setattr(publisher_module, "SENDING_BYTES_MAX", 5_000)
    under_way: list[int] = []
    most: list[int] = []

    class Measured(Sending):
        async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
            size = batch.size()
            under_way.append(size)
            most.append(sum(under_way))
            future = await self.sent(batch, topic, partition)
            future.add_done_callback(lambda _future: under_way.remove(size))
            return future

    topic = embedded.create_topic("bounded", 8)
    publisher = make(Producers(embedded.bootstrap, Measured))
    owner = Owner()
    for partition in range(8):
        value = noise(9_000 if partition == 5 else 2_000, partition)
        owner.hand_in(publisher.lane(topic, partition), [partition], value)
    await publisher.start()
    await owner.until_answered(8)

    assert sorted(owner.acknowledged_tokens) == list(range(8))
    assert max(size for size in most if size < 9_000) > 4_000  # more than one at a time
    assert all(size <= 5_000 or 9_000 <= size < 10_000 for size in most)  # the one above it went alone


# --------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("failing", [BatchNotSent, BatchRefused, ConnectionLost, StopRaises])
async def test_after_a_failure_a_new_producer_sends_the_batch_again(
    embedded: Broker, make: Callable[..., Publisher], lines: LogLines, failing: type[AIOKafkaProducer]
) -> None:
    """H18: the old producer is useless from then on; nothing is lost, nothing is acknowledged twice."""
    topic = embedded.create_topic("again", 2)
    publisher = make(producers := Producers(embedded.bootstrap, failing, AIOKafkaProducer))
    await publisher.start()
    owners = [Owner(), Owner()]
    for partition, owner in enumerate(owners):
        owner.hand_in(publisher.lane(topic, partition), range(100))
    await lines.until("producer is replaced")
    assert is_stuck(publisher)
    for partition, owner in enumerate(owners):
        owner.hand_in(publisher.lane(topic, partition), range(100, 200))
        await owner.until_answered(200)

    assert [owner.acknowledged_tokens for owner in owners] == [list(range(200))] * 2
    assert keys(embedded, topic, 0) == keys(embedded, topic, 1) == list(range(200))
    assert not is_stuck(publisher)
    assert len(producers.made) == 2
    assert producers.made[0]._closed


async def test_a_failed_batch_goes_out_before_what_was_appended_behind_it(
    embedded: Broker, make: Callable[..., Publisher]
) -> None:
    """Contract 4, `key`: the responses of one object are sent in the order they were handed in, whatever fails."""
    sending, fail = asyncio.Event(), asyncio.Event()

    class FailsLate(AIOKafkaProducer):
        async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
            sending.set()
            await fail.wait()
            raise KafkaError("not sent")

    topic = embedded.create_topic("before")
    publisher = make(Producers(embedded.bootstrap, FailsLate, AIOKafkaProducer))
    await publisher.start()
    owner, lane = Owner(), publisher.lane(topic, 0)
    owner.hand_in(lane, range(10))
    async with asyncio.timeout(WAIT_SECONDS):
        await sending.wait()
    owner.hand_in(lane, range(10, 20))
    assert publisher.waiting == 20
    fail.set()
    await owner.until_answered(20)

    assert owner.acknowledged_tokens == keys(embedded, topic) == list(range(20))


async def test_a_batch_whose_answer_was_lost_is_written_twice_and_acknowledged_once(
    broker: Broker, make: Callable[..., Publisher]
) -> None:
    """Contract 3: duplicates carry the same response id; what a reader sees first is in order."""
    topic = broker.create_topic("twice")
    publisher = make(Producers(broker.bootstrap, AnswerLost, AIOKafkaProducer))
    await publisher.start()
    owner, lane = Owner(), publisher.lane(topic, 0)
    owner.hand_in(lane, range(50))
    await owner.until_answered(50)

    assert owner.acknowledged_tokens == list(range(50))
    assert keys(broker, topic) == [*range(50), *range(50)]


async def test_a_batch_of_another_lane_may_finish_with_the_old_producer(
    embedded: Broker, make: Callable[..., Publisher]
) -> None:
    """A hole in one lane's sequence is no reason to write the records of another twice."""
    topic = embedded.create_topic("neighbours", 2)

    class RefusesOneLane(Sending):
        async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
            future = await self.sent(batch, topic, partition)
            if partition == 1:
                return future
            raise KafkaError("refused")

    publisher = make(Producers(embedded.bootstrap, RefusesOneLane, AIOKafkaProducer))
    owners = [Owner(), Owner()]
    for partition, owner in enumerate(owners):
        owner.hand_in(publisher.lane(topic, partition), range(10))
    await publisher.start()
    for owner in owners:
        await owner.until_answered(10)

    assert [owner.acknowledged_tokens for owner in owners] == [list(range(10))] * 2
    assert keys(embedded, topic, 1) == list(range(10))


async def test_a_batch_that_waits_for_metadata_of_a_producer_thrown_away_is_sent_by_the_next(
    embedded: Broker, make: Callable[..., Publisher]
) -> None:
    """H18, rule 5: who waits for metadata when the client is closed waits for ever; a lane must not."""
    waiting = asyncio.Event()

    class FailsWhileAnotherWaits(Sending):
        async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
            if topic == patient:
                waiting.set()
                await asyncio.get_running_loop().create_future()  # as for metadata; nobody else knows of it
            await waiting.wait()
            raise KafkaError("not sent")

    failing, patient = embedded.create_topic("failing"), embedded.create_topic("patient")
    publisher = make(Producers(embedded.bootstrap, FailsWhileAnotherWaits, AIOKafkaProducer))
    await publisher.start()
    owners = [Owner(), Owner()]
    for topic, owner in zip((failing, patient), owners, strict=True):
        owner.hand_in(publisher.lane(topic, 0), range(10))
    for owner in owners:
        await owner.until_answered(10)

    assert [owner.acknowledged_tokens for owner in owners] == [list(range(10))] * 2
    assert keys(embedded, patient) == list(range(10))


async def test_failures_in_a_row_are_spaced_out_until_one_batch_is_acknowledged(
    embedded: Broker, make: Callable[..., Publisher], lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic that may not be written to must not cost a busy loop; once it may be, everything goes out."""
    monkeypatch.setattr(publisher_module, "BACKOFF_SECONDS", (0.0, 0.01, 0.02))
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", noted)
    topic = embedded.create_topic("forbidden")
    publisher = make(Producers(embedded.bootstrap, *[Forbidden] * 5, AIOKafkaProducer))
    await publisher.start()
    owner = Owner()
    owner.hand_in(publisher.lane(topic, 0), range(3))
    await lines.until("producer is replaced", 5)
    assert is_stuck(publisher)
    await owner.until_answered(3)

    assert [wait for wait in waits if wait in publisher_module.BACKOFF_SECONDS[1:]] == [0.01, 0.02, 0.02, 0.02]
    assert keys(embedded, topic) == [0, 1, 2]
    assert not is_stuck(publisher)
    assert lines.texts[-1] == "publisher goes on"


async def test_an_owner_that_raises_is_heard_of(
    embedded: Broker, make: Callable[..., Publisher], failures: list[BaseException]
) -> None:
    """A defect must not leave a lane that silently publishes nothing."""

    class Raises(Owner):
        def acknowledged(self, tokens: Sequence[int]) -> None:
            super().acknowledged(tokens)
            raise RuntimeError("a defect")

    publisher = make(Producers(embedded.bootstrap))
    await publisher.start()
    owner, lane = Raises(), publisher.lane(embedded.create_topic("defect"), 0)
    owner.hand_in(lane, [0])
    await owner.until_answered(1)
    await asyncio.wait([lane.flush], timeout=WAIT_SECONDS)
    await asyncio.sleep(0)

    assert [str(failures.pop())] == ["a defect"]


async def test_a_record_that_is_no_record_is_heard_of(
    embedded: Broker, make: Callable[..., Publisher], failures: list[BaseException]
) -> None:
    """H18d: text instead of bytes: the client refuses it, and would refuse it for ever."""
    publisher = make(Producers(embedded.bootstrap))
    await publisher.start()
    lane = publisher.lane(embedded.create_topic("text"), 0)
    lane.append(None, "text", [], Owner(), 0)  # type: ignore[arg-type]  # the mistake under test
    await asyncio.wait([lane.flush], timeout=WAIT_SECONDS)
    await asyncio.sleep(0)

    assert isinstance(failures.pop(), TypeError)


async def test_a_partition_that_does_not_exist_is_heard_of(
    embedded: Broker, make: Callable[..., Publisher], failures: list[BaseException]
) -> None:
    """The output topic was made anew with fewer partitions: a restart reads their number again."""
    publisher = make(Producers(embedded.bootstrap))
    await publisher.start()
    lane = publisher.lane(embedded.create_topic("fewer"), 7)
    Owner().hand_in(lane, [0])
    await asyncio.wait([lane.flush], timeout=WAIT_SECONDS)
    await asyncio.sleep(0)

    assert isinstance(failures.pop(), AssertionError)


# --------------------------------------------------------------------------------------------- brokers that go away


async def test_a_frozen_broker_makes_the_publisher_stuck_until_it_answers(
    own_broker: Broker, make: Callable[..., Publisher], lines: LogLines
) -> None:
    """H18b: an idempotent producer retries for ever; so the lane waits, and the service can say why."""
    topic = own_broker.create_topic("frozen", 2)
    publisher = make(producers := Producers(own_broker.bootstrap), 0.2)
    await publisher.start()
    owners = [Owner(), Owner()]
    for partition, owner in enumerate(owners):
        owner.hand_in(publisher.lane(topic, partition), [0])
        await owner.until_answered(1)
    assert not is_stuck(publisher)
    own_broker.node.freeze()
    for partition, owner in enumerate(owners):
        owner.hand_in(publisher.lane(topic, partition), [1])
    await lines.until("no acknowledgement", 2)
    for owner in owners:
        owner.hand_in(publisher.lane(topic, 0), [2])
    assert is_stuck(publisher)
    assert publisher.waiting == 4

    own_broker.node.thaw()
    await owners[0].until_answered(3)
    await owners[1].until_answered(3)

    assert not is_stuck(publisher)
    assert lines.texts[-1] == "publisher goes on"
    assert [owner.acknowledged_tokens for owner in owners] == [[0, 1, 2], [0, 1, 2]]
    assert keys(own_broker, topic, 0) == [0, 1, 2, 2]
    assert len(producers.made) == 1


@pytest.mark.parametrize("how", [Node.freeze, Node.kill])
async def test_stopping_is_bounded_whatever_the_broker_does(
    own_broker: Broker, make: Callable[..., Publisher], lines: LogLines, how: Callable[[Node], None]
) -> None:
    """H17, H18b: the client's own stop waits for ever; ours leaves no task behind, which every test here checks.

    Nor does it leave bytes to a connection that would write them whenever the broker wakes up.
    """
    topic = own_broker.create_topic("away", 24)
    publisher = make(producers := Producers(own_broker.bootstrap), 0.2)
    await publisher.start()
    owner = Owner()
    owner.hand_in(publisher.lane(topic, 0), [0])
    await owner.until_answered(1)
    (producer,) = producers.made
    transports = [connection._writer.transport for connection in producer.client._conns.values()]
    how(own_broker.node)
    for partition in range(24):  # more than the system's buffers take
        owner.hand_in(publisher.lane(topic, partition), [1], noise(500_000, partition))
        owner.hand_in(publisher.lane(topic, partition), range(2, 1_000))
    await lines.until("no acknowledgement", 24)
    assert (sum(transport.get_write_buffer_size() for transport in transports) > 0) == (how is Node.freeze)

    loop = asyncio.get_running_loop()
    began = loop.time()
    await publisher.stop(0.1)
    took = loop.time() - began
    own_broker.node.thaw()

    assert took < 0.1 + 4 * publisher_module.TEAR_DOWN_SECONDS
    assert sum(transport.get_write_buffer_size() for transport in transports) == 0
    assert owner.acknowledged_tokens == [0]


async def test_a_producer_that_does_not_finish_is_ended_by_force(
    own_broker: Broker, make: Callable[..., Publisher], lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lane fails while another waits for a frozen broker: both are sent again with the next producer."""
    monkeypatch.setattr(publisher_module, "DISCARD_TIMEOUT_SECONDS", 0.05)
    topic = own_broker.create_topic("force", 2)
    frozen = asyncio.Event()

    class FailsWhenFrozen(Sending):
        async def send_batch(self, batch: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[Any]:
            if partition == 1:
                await frozen.wait()
                raise KafkaError("refused")
            return await self.sent(batch, topic, partition)

    publisher = make(producers := Producers(own_broker.bootstrap, FailsWhenFrozen, AIOKafkaProducer), 0.2)
    await publisher.start()
    owners = [Owner(), Owner()]
    owners[0].hand_in(publisher.lane(topic, 0), [0])
    await owners[0].until_answered(1)
    own_broker.node.freeze()
    for partition, owner in enumerate(owners):
        owner.hand_in(publisher.lane(topic, partition), [1])
    await lines.until("no acknowledgement", 2)
    frozen.set()
    await lines.until("producer cannot start")
    own_broker.node.thaw()
    await owners[0].until_answered(2)
    await owners[1].until_answered(1)

    assert owners[0].acknowledged_tokens == [0, 1]
    assert owners[1].acknowledged_tokens == [1]
    assert set(keys(own_broker, topic, 0)) == {0, 1}
    assert keys(own_broker, topic, 1) == [1]
    assert producers.made[0].client._conns == {} or all(
        not connection.connected() for connection in producers.made[0].client._conns.values()
    )


async def test_a_broker_that_comes_late_is_waited_for(
    make: Callable[..., Publisher], lines: LogLines, tmp_path: Path
) -> None:
    """Contract 6: an unreachable broker is not an exit; what was appended meanwhile goes out."""
    port = unused_port()
    publisher = make(producers := Producers(f"127.0.0.1:{port}"))
    owner = Owner()
    starting = asyncio.create_task(publisher.start())
    await lines.until("producer cannot start")
    assert is_stuck(publisher)
    assert not starting.done()

    with noida_broker(tmp_path, port) as broker:
        topic = broker.create_topic("late")
        owner.hand_in(publisher.lane(topic, 0), [0])
        async with asyncio.timeout(WAIT_SECONDS):
            await starting
        await owner.until_answered(1)
        assert not is_stuck(publisher)
        assert keys(broker, topic) == [0]
        await publisher.stop(5)
    assert len(producers.made) > 1


# --------------------------------------------------------------------------------------------- starting and stopping


async def test_a_start_that_is_cancelled_leaves_nothing_behind(make: Callable[..., Publisher], lines: LogLines) -> None:
    """As documented; a task or an open producer would fail this test."""
    publisher = make(producers := Producers(f"127.0.0.1:{unused_port()}"))
    starting = asyncio.create_task(publisher.start())
    await lines.until("producer cannot start")
    starting.cancel()
    await asyncio.wait([starting])

    assert starting.cancelled()
    assert all(producer._closed for producer in producers.made)


async def test_a_start_without_broker_shows_no_failure_once_it_worked(
    embedded: Broker, make: Callable[..., Publisher], lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing to publish there is no acknowledgement to wait for: ready is ready."""

    class CannotStart(AIOKafkaProducer):
        async def start(self) -> None:
            raise KafkaError("not yet")

    monkeypatch.setattr(publisher_module, "BACKOFF_SECONDS", (0.0,))
    publisher = make(Producers(embedded.bootstrap, CannotStart, CannotStart, AIOKafkaProducer))
    await publisher.start()

    assert not is_stuck(publisher)
    events = [text.partition(" error=")[0] for text in lines.texts]
    assert events == ["producer cannot start", "producer cannot start", "publisher goes on"]


async def test_what_the_maker_raises_comes_out_of_start(make: Callable[..., Publisher]) -> None:
    """A setting the client does not know: trying again would not help."""

    def unknown_setting(_max_batch_size: int) -> AIOKafkaProducer:
        raise TypeError("no such setting")

    with pytest.raises(TypeError, match="no such setting"):
        await make(unknown_setting).start()


async def test_a_publisher_starts_once_and_stops_for_good(embedded: Broker, make: Callable[..., Publisher]) -> None:
    """Stopping twice, or without a start, is stopping; a lane of a stopped publisher would never flush."""
    publisher = make(Producers(embedded.bootstrap))
    await make(Producers(embedded.bootstrap)).stop(1)
    await publisher.start()
    with pytest.raises(RuntimeError, match="started before"):
        await publisher.start()
    await publisher.stop(1)
    await publisher.stop(1)

    with pytest.raises(RuntimeError, match="was stopped"):
        publisher.lane("topic", 0)


async def test_a_stop_that_was_cancelled_can_be_called_again(
    own_broker: Broker, make: Callable[..., Publisher], lines: LogLines
) -> None:
    """A second signal, a shorter deadline: what the first call left is ended by the second."""
    topic = own_broker.create_topic("again")
    publisher = make(Producers(own_broker.bootstrap), 0.2)
    await publisher.start()
    owner = Owner()
    owner.hand_in(publisher.lane(topic, 0), [0])
    await owner.until_answered(1)
    own_broker.node.freeze()
    owner.hand_in(publisher.lane(topic, 0), [1])
    await lines.until("no acknowledgement")

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await publisher.stop(60)
    async with asyncio.timeout(WAIT_SECONDS):
        await publisher.stop(0)
    own_broker.node.thaw()

    assert owner.acknowledged_tokens == [0]


async def test_the_installed_client_has_what_ending_it_by_force_needs(embedded: Broker) -> None:
    """H18b: private names of aiokafka 0.14; a release without them must fail here, not during an outage."""
    producer = Producers(embedded.bootstrap)(1000)
    await producer.start()
    routine = producer._sender.sender_task

    assert isinstance(producer._sender, Sender)
    assert isinstance(producer._message_accumulator, MessageAccumulator)
    assert "tasks" in Sender._sender_routine.__code__.co_varnames
    await asyncio.sleep(0)
    assert routine.get_coro().cr_frame.f_locals["tasks"] == set()
    assert producer.client._conns
    assert all(connection._writer.transport.is_closing() is False for connection in producer.client._conns.values())
    await producer.stop()


async def test_no_request_outlives_a_producer_that_was_ended_by_force(embedded: Broker) -> None:
    """With several brokers there are several requests under way; aiokafka itself waits for, or cancels, only one."""
    producer = Producers(embedded.bootstrap)(1000)
    await producer.start()
    await asyncio.sleep(0)
    routine = producer._sender.sender_task
    requests = [asyncio.create_task(asyncio.Event().wait()) for _ in range(3)]
    routine.get_coro().cr_frame.f_locals["tasks"].update(requests)

    await publisher_module.discard(producer, 0)

    assert [request.cancelled() for request in requests] == [True] * 3
    assert routine.done()


async def test_a_batch_that_was_to_be_tried_again_fails_without_noise(own_broker: Broker) -> None:
    """The client looks for it among the batches under way when it fails, but it waits in the queue again."""
    topic = own_broker.create_topic("retried")
    producer = Producers(own_broker.bootstrap)(1000)
    await producer.start()
    await producer.partitions_for(topic)
    own_broker.node.freeze()
    batch = producer.create_batch()
    batch.append(timestamp=0, key=b"0", value=b"", headers=[])
    future = await producer.send_batch(batch, topic, partition=0)
    accumulator = producer._message_accumulator
    async with asyncio.timeout(WAIT_SECONDS):
        while not accumulator._pending_batches:  # noqa: ASYNC110 - aiokafka has no event for it
            await asyncio.sleep(0)
    accumulator.reenqueue(*accumulator._pending_batches)

    await publisher_module.discard(producer, 0)
    own_broker.node.thaw()

    with pytest.raises(KafkaError, match="thrown away"):
        await future


async def test_a_fenced_transactional_producer_is_thrown_away_without_an_exception_that_nobody_sees() -> None:
    """I12: fenced while a broker was away, its transaction ends with an exception whose only reader has given up."""
    producer = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", transactional_id="fenced")
    transactions = producer._txn_manager
    transactions.set_pid_and_epoch(1, 0)
    transactions.begin_transaction()
    publisher_module.nobody_waits_for(producer)
    transactions.fatal_error(ProducerFenced())
    transactions.fatal_error(ProducerFenced())  # first by the step that heard of it, then by the client's own task

    await publisher_module.discard(producer, 0)

    del producer, transactions
    gc.collect()  # what nobody has looked at is reported now, to the guard


async def test_what_a_cancelled_transaction_had_under_way_fails_without_an_exception_that_nobody_sees() -> None:
    """I12: who waited for its batches and offsets is gone before the client hears that it was fenced."""
    producer = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", transactional_id="fenced")
    transactions, accumulator = producer._txn_manager, producer._message_accumulator
    transactions.set_pid_and_epoch(1, 0)
    transactions.begin_transaction()
    batch = producer.create_batch()
    batch.append(timestamp=0, key=b"0", value=b"", headers=[])
    delivery = await accumulator.add_batch(batch, Place("responses", 0), 1)
    offsets = {Place("operations", 0): OffsetAndMetadata(1, "")}
    waiting = asyncio.gather(delivery, asyncio.shield(transactions.add_offsets_to_txn(offsets, "group")))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    publisher_module.nobody_waits_for(producer)
    transactions.fatal_error(ProducerFenced())  # as the client's own task does
    accumulator.fail_all(ProducerFenced())
    await publisher_module.discard(producer, 0)

    del producer, transactions, accumulator, batch, delivery, waiting
    gc.collect()  # what nobody has looked at is reported now, to the guard
