"""Producing records, reading topics and measuring lag for the command line; outside any group, nothing is committed.

Every wait for brokers is bounded: one that does not answer becomes :class:`ClusterUnavailable`, never a command that
hangs. Only :func:`tail` with ``follow`` waits without limit, for records that do not exist yet.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, Protocol, TypeAlias, TypedDict

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from consumer.config import Config
from consumer.errors import TierstreamError, TooLarge
from consumer.kafka.clients import make_reader
from consumer.kafka.connection import RECORD_OVERHEAD_BYTES, producer_settings
from consumer.kafka.topics import LATEST, Cluster, ClusterRefusal, ClusterUnavailable, Topic
from consumer.offset_map import count, decode

START_SECONDS: Final = 20.0
"""Longest start of a client."""
STOP_SECONDS: Final = 5.0
"""Longest end of one; :func:`AIOKafkaProducer.stop` may hang for ever (hazard H18b)."""
SILENCE_SECONDS: Final = 20.0
"""Longest wait for records or acknowledgements that have to come."""
FETCH_MS: Final = 500
"""Longest wait of one fetch; how quickly the end of a topic is noticed."""
RECORDS_AT_ONCE: Final = 500
"""Records taken from a fetch at a time. Compressed ones are unpacked only then: a fetch of a few MiB may hold hundreds
of thousands, and 1 KB of memory each."""
UNACKNOWLEDGED_MAX: Final = 2_000
"""Records on their way at a time."""
BATCH_OVERHEAD_BYTES: Final = 200
"""Around a record alone in its batch, above key, value and headers."""
TAIL_DEFAULT: Final = 10
"""How many records ``tail`` shows unless told otherwise."""


Record: TypeAlias = ConsumerRecord[bytes, bytes]
"""A record as it was read."""


class Lag(TypedDict):
    """How far a group is behind in one partition; unknown numbers are None."""

    topic: str
    partition: int
    committed: int | None
    end: int
    lag: int | None
    map_bytes: int
    finished_above_gap: int | None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be produced."""

    value: bytes | None
    key: bytes | None = None
    partition: int | None = None
    """None = by the key's hash, as other Kafka clients do."""
    headers: Sequence[tuple[str, bytes | None]] = ()

    @property
    def size(self) -> int:
        """Bytes of key, value and headers, with room for the lengths of the latter."""
        headers = sum(10 + len(name.encode()) + len(value or b"") for name, value in self.headers)
        return len(self.value or b"") + len(self.key or b"") + headers


async def existing(cluster: Cluster, topic: str) -> Topic:
    """Return what the cluster knows of *topic*.

    Raises:
        ClusterRefusal: there is no such topic; the text names it.
        ClusterUnavailable: no answer in time.
    """
    found = (await cluster.topics([topic]))[topic]
    if found is None:
        raise ClusterRefusal(f"there is no topic {topic}")
    return found


# ------------------------------------------------------------------------------------------------- produce


class RecordProducer:
    """Sends records to one topic, many at a time, in order within a partition.

    Args:
        config: How brokers are reached; ``limits.record_bytes`` bounds a record.
        topic: An existing topic.
    """

    def __init__(self, config: Config, topic: str) -> None:
        self._config = config
        self._topic = topic
        self._partitions = 0
        self._size_max = config.limits.record_bytes + RECORD_OVERHEAD_BYTES
        self._producer: AIOKafkaProducer | None = None
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._acknowledged = 0

    @property
    def acknowledged(self) -> int:
        """Records known to be written."""
        return self._acknowledged

    async def start(self) -> None:
        """Look the topic up, learn its limit, and connect.

        Raises:
            ClusterUnavailable: no broker answers.
            ClusterRefusal: there is no such topic.
        """
        async with Cluster(self._config) as cluster:
            self._partitions = (await existing(cluster, self._topic)).partitions
            with suppress(ClusterRefusal):  # reading settings is a permission of its own; then the broker has to say no
                settings = (await cluster.settings([self._topic], ["max.message.bytes"])).get(self._topic, {})
                self._size_max = min(self._size_max, int(settings.get("max.message.bytes", self._size_max)))
        settings = producer_settings(self._config) | {"max_request_size": self._size_max}
        self._producer = AIOKafkaProducer(**settings)
        await start_client(self._producer)

    async def send(self, record: Outgoing) -> None:
        """Send *record*; waits for acknowledgements while too many are under way.

        Raises:
            TooLarge: it does not fit; nothing was sent, others may follow.
            ValueError: the topic has no such partition; as above.
            ClusterUnavailable: no acknowledgement in time.
            ClusterRefusal: an earlier record was refused.
        """
        assert self._producer is not None, "start first"
        if record.size + BATCH_OVERHEAD_BYTES > self._size_max:
            raise TooLarge(f"{record.size} bytes are more than topic {self._topic} takes ({self._size_max})")
        if record.partition is not None and not 0 <= record.partition < self._partitions:
            raise ValueError(f"topic {self._topic} has partitions 0 to {self._partitions - 1}, not {record.partition}")
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                sent = self._producer.send(
                    self._topic, record.value, record.key, record.partition, headers=record.headers or None
                )
                self._waiting.append(await sent)
        except MessageSizeTooLargeError:
            raise TooLarge(f"{record.size} bytes are more than topic {self._topic} takes") from None
        except (KafkaError, TimeoutError) as error:
            raise self._failed(error) from error
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > UNACKNOWLEDGED_MAX):
            await self._settle_first()

    async def flush(self) -> None:
        """Wait until everything is acknowledged.

        Raises:
            ClusterUnavailable, ClusterRefusal: as :meth:`send`.
        """
        while self._waiting:
            await self._settle_first()

    async def _settle_first(self) -> None:
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                await asyncio.shield(self._waiting[0])
        except (KafkaError, TimeoutError) as error:
            raise self._failed(error) from error
        del self._waiting[0]
        self._acknowledged += 1

    def _failed(self, error: Exception) -> TierstreamError:
        done = f"{self._acknowledged} records of topic {self._topic} were acknowledged"
        if isinstance(error, TimeoutError):
            return ClusterUnavailable(f"no acknowledgement within {SILENCE_SECONDS:g} s; {done}")
        return ClusterRefusal(f"the broker refused a record ({type(error).__name__}); {done}")

    async def stop(self) -> None:
        """Disconnect; what is not acknowledged is forgotten. May be called at any time."""
        producer, self._producer = self._producer, None
        for sent in self._waiting:
            sent.add_done_callback(_seen)
        self._waiting.clear()
        if producer is not None:
            await stop_client(producer)


async def produce(
    config: Config, topic: str, records: AsyncIterable[Outgoing], *, rate: float | None = None
) -> AsyncGenerator[Exception | None, None]:
    """Send *records* to *topic*; yield for each None, or why it was left out. Ends when all are acknowledged.

    Args:
        config: How brokers are reached.
        topic: An existing topic.
        records: Pulled one by one.
        rate: Most records a second; None = as fast as they go.

    Raises:
        ClusterUnavailable: no broker answers, or not in time.
        ClusterRefusal: there is no such topic, or the broker refused a record.
    """
    producer = RecordProducer(config, topic)
    try:
        await producer.start()
        began, sent = time.monotonic(), 0
        async for record in records:
            if rate is not None:
                await asyncio.sleep(max(0.0, began + sent / rate - time.monotonic()))
            sent += 1
            try:
                await producer.send(record)
            except (TooLarge, ValueError) as error:
                yield error
            else:
                yield None
        await producer.flush()
    finally:
        await producer.stop()


# ------------------------------------------------------------------------------------------------- tail


async def tail(
    config: Config, topic: str, *, follow: bool = False, from_beginning: bool = False, limit: int | None = None
) -> AsyncGenerator[Record, None]:
    """Yield records of *topic*.

    ``follow`` yields what comes from now on, after what is there if ``from_beginning``, until *limit* or cancellation.
    Without it: what is there at this moment, if ``from_beginning`` in the order of each partition up to *limit*, else
    the last *limit* records (:data:`TAIL_DEFAULT`) of all partitions, by time.

    Raises:
        ClusterUnavailable: no broker answers, or records that exist do not come.
        ClusterRefusal: there is no such topic, or it may not be read.
    """
    last = None if follow or from_beginning else limit or TAIL_DEFAULT
    async with open_reader(config, topic) as (reader, partitions, first, ends):
        for partition in partitions:
            start = first[partition] if from_beginning else ends[partition]
            if last is not None:
                start = max(first[partition], ends[partition] - last)
            reader.seek(partition, start)
        records = read_on(reader) if follow else read_until(reader, ends)
        if last is not None:
            kept = [record async for record in records]
            for record in sorted(kept, key=lambda record: (record.timestamp, record.partition, record.offset))[-last:]:
                yield record
            return
        yielded = 0
        async for record in records:
            yield record
            yielded += 1
            if yielded == limit:
                return


@asynccontextmanager
async def open_reader(
    config: Config, topic: str, partition: int | None = None, *, committed_only: bool = True
) -> AsyncIterator[
    tuple[AIOKafkaConsumer, list[TopicPartition], Mapping[TopicPartition, int], Mapping[TopicPartition, int]]
]:
    """Open a consumer outside any group; give its partitions, their first offsets and their ends. Seek before reading.

    Args:
        config: How brokers are reached.
        topic: An existing topic.
        partition: The only one to read; None = all.
        committed_only: Leave out open and aborted transactions; the end is then where the first open one begins.

    Raises:
        ClusterUnavailable: no broker answers, or not in time.
        ClusterRefusal: there is no such topic or partition.
    """
    async with Cluster(config) as cluster:
        count = (await existing(cluster, topic)).partitions
    if partition is not None and not 0 <= partition < count:
        raise ClusterRefusal(f"topic {topic} has partitions 0 to {count - 1}, not {partition}")
    partitions = [TopicPartition(topic, number) for number in ([partition] if partition is not None else range(count))]
    reader = make_reader(config, committed_only=committed_only)
    try:
        await start_client(reader)
        reader.assign(partitions)
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                first = await reader.beginning_offsets(partitions)
        except (KafkaError, TimeoutError) as error:
            raise ClusterUnavailable(f"offsets of topic {topic}: {type(error).__name__}") from error
        yield reader, partitions, first, await ends_of(reader, partitions)
    finally:
        await stop_client(reader)


async def ends_of(reader: AIOKafkaConsumer, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
    """Return where each partition ends now, as *reader* sees it.

    Asked through the reader: to one of committed records, the end is where an open transaction begins.

    Raises:
        ClusterUnavailable: no answer in time.
    """
    try:
        async with asyncio.timeout(SILENCE_SECONDS):
            ends: dict[TopicPartition, int] = await reader.end_offsets(partitions)
    except (KafkaError, TimeoutError) as error:
        raise ClusterUnavailable(f"offsets of topic {partitions[0].topic}: {type(error).__name__}") from error
    return ends


async def _fetched(reader: AIOKafkaConsumer) -> list[Record]:
    await asyncio.sleep(0)  # in the same step as the last poll, one that brought all it may would wait for its time-out
    try:
        batches = await reader.getmany(timeout_ms=FETCH_MS, max_records=RECORDS_AT_ONCE)
    except KafkaError as error:
        raise ClusterRefusal(f"cannot read: {type(error).__name__}") from error
    return list(chain.from_iterable(batches.values()))


async def read_on(reader: AIOKafkaConsumer) -> AsyncIterator[Record]:
    """Yield what comes, for ever.

    Raises:
        ClusterRefusal: the topic may not be read.
    """
    while True:
        for record in await _fetched(reader):
            yield record


async def read_until(reader: AIOKafkaConsumer, ends: Mapping[TopicPartition, int]) -> AsyncIterator[Record]:
    """Yield the records below *ends*, each partition from where it was sought to; one that has ended is paused.

    Offsets have gaps, so what ends a partition is the position.

    Raises:
        ClusterUnavailable: records that exist do not come.
        ClusterRefusal: the topic may not be read.
    """
    reader.resume(*ends)
    heard = time.monotonic()
    behind = await _behind(reader, ends, ends)
    while behind:
        fetched = await _fetched(reader)
        for record in fetched:
            if record.offset < ends[TopicPartition(record.topic, record.partition)]:
                yield record
        before, behind = behind, await _behind(reader, behind, ends)
        if fetched or len(behind) < len(before):
            heard = time.monotonic()
        elif time.monotonic() - heard > SILENCE_SECONDS:
            names = ", ".join(f"{partition.topic}/{partition.partition}" for partition in behind)
            raise ClusterUnavailable(f"no records for {SILENCE_SECONDS:g} s from {names}, which have not ended")


async def record_at(config: Config, topic: str, partition: int, offset: int) -> Record:
    """Return one record, also of an open or aborted transaction.

    Raises:
        ClusterUnavailable: no broker answers, or not in time.
        ClusterRefusal: there is no such record; the text says what there is.
    """
    where = f"{topic}/{partition}"
    async with open_reader(config, topic, partition, committed_only=False) as (reader, (place,), first, ends):
        if first[place] >= ends[place]:
            raise ClusterRefusal(f"there are no records in {where}")
        if not first[place] <= offset < ends[place]:
            raise ClusterRefusal(f"{where} has offsets {first[place]} to {ends[place] - 1}, not {offset}")
        reader.seek(place, offset)
        async for record in read_until(reader, {place: offset + 1}):
            if record.offset == offset:
                return record
    raise ClusterRefusal(f"there is no record at {where}/{offset}: a transaction's end, or removed by compaction")


async def _behind(
    reader: AIOKafkaConsumer, partitions: Iterable[TopicPartition], ends: Mapping[TopicPartition, int]
) -> list[TopicPartition]:
    """Return those of *partitions* not read to their end; pause the others there, so that reading can go on later.

    Each has been sought, so its position is known. It may have moved beyond the end, by records written since.
    """
    behind = []
    for partition in partitions:
        position = await reader.position(partition)
        if position < ends[partition]:
            behind.append(partition)
            continue
        reader.pause(partition)
        if position > ends[partition]:
            reader.seek(partition, ends[partition])
    return behind


# ------------------------------------------------------------------------------------------------- lag


async def lag(config: Config) -> list[Lag]:
    """Return the lag of ``kafka.group_id`` in every partition of the input topics, ordered.

    The end is the high watermark. A partition without a commit has neither ``committed`` nor ``lag``. What is finished
    above the commit is what its offset map says, where the service would believe it, and not known where it would not.

    Raises:
        ClusterUnavailable: no answer in time.
        ClusterRefusal: an input topic does not exist, or may not be described.
    """
    async with Cluster(config) as cluster:
        topics = [await existing(cluster, name) for name in sorted(config.input.topics)]
        places = [(topic.name, number) for topic in topics for number in sorted(topic.leaders)]
        committed = await cluster.committed(config.kafka.group_id, places)
        ends = await cluster.offsets(places, LATEST)
        identity = await cluster.cluster_id() or ""
    found: list[Lag] = []
    for topic, partition in places:
        commit = committed.get((topic, partition))
        end, above = ends[topic, partition], None
        map_bytes = 0
        if commit is not None:
            stored = decode(commit.metadata, committed_offset=commit.offset, cluster_id=identity, end=end)
            if stored.reason not in {"absent", "foreign"}:
                map_bytes = len(commit.metadata.encode())
            if not map_bytes or stored.valid:
                above = count(stored.finished)
        found.append(
            Lag(
                topic=topic,
                partition=partition,
                committed=None if commit is None else commit.offset,
                end=end,
                lag=None if commit is None else max(end - commit.offset, 0),
                map_bytes=map_bytes,
                finished_above_gap=above,
            )
        )
    return found


# ------------------------------------------------------------------------------------------------- clients


class _Client(Protocol):
    async def start(self) -> None: ...

    async def stop(self) -> None: ...


async def start_client(client: _Client) -> None:
    """Connect a client, bounded.

    Raises:
        ClusterUnavailable: no broker answers; nothing is left connected.
    """
    try:
        async with asyncio.timeout(START_SECONDS):
            await client.start()
    except (KafkaError, OSError, TimeoutError) as error:
        await stop_client(client)
        raise ClusterUnavailable(f"no connection to the brokers: {type(error).__name__}") from error


async def stop_client(client: _Client) -> None:
    """Stop a client that may hang (H18b) or raise what nobody caused (H17b)."""
    stopping = asyncio.ensure_future(client.stop())
    done, _ = await asyncio.wait([stopping], timeout=STOP_SECONDS)
    if not done:
        stopping.cancel()
        await asyncio.wait([stopping], timeout=1.0)
    stopping.add_done_callback(_seen)


def _seen(future: asyncio.Future[Any]) -> None:
    """Mark an abandoned future's exception as seen."""
    if not future.cancelled():
        future.exception()
