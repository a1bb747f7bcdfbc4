"""Putting records back on the input topic: dead letters after a repair, or any range again.

1. Each record of the range is taken as it is: key, value, and headers. Those of a dead letter (``tierstream-dlq-*``)
   are taken off, and ``tierstream-replay-of: TOPIC/PARTITION/OFFSET`` is put on, in place of an older one.
2. It goes to the topic and partition it came from: those a dead letter names, else its own. Where there is no such
   partition, its key decides, as with any other producer.
3. A dead letter without its value (``tierstream-dlq-truncated``) cannot be put back, nor a record that was not read
   (:class:`~consumer.operations.Unread`); it is said of each.

The records of one partition keep their order. What is put back is a new record: it has its own offset and its own
response, and the response of the old one stands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from consumer.config import Config
from consumer.errors import TooLarge
from consumer.kafka.ledger import Span, spans_of
from consumer.kafka.ranges import Position
from consumer.kafka.tools import Outgoing, Record, RecordProducer, existing, open_reader, read_until
from consumer.kafka.topics import Cluster
from consumer.operations import Unread
from consumer.responses import response_id

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer

REPLAY_OF: Final = "tierstream-replay-of"
"""Header of a record that was put back: which one it was."""

_DEAD_LETTER: Final = "tierstream-dlq-"


@dataclass(frozen=True, slots=True)
class Step:
    """One record of the range, and what becomes of it."""

    source: str
    """TOPIC/PARTITION/OFFSET of the record."""
    code: str | None
    """Why it is a dead letter, if it is one."""
    topic: str
    """Where it goes."""
    outgoing: Outgoing
    problem: str | None
    """Why it cannot be put back."""


class Replay:
    """One range of one partition, to be put back; made by :func:`open_replay`.

    Args:
        config: How brokers are reached, and the input topics.
        reader: Assigned to the partition.
        span: Offsets to read.
        code: Only dead letters of this failure; None = every record.
        partitions: How many each input topic has.
    """

    def __init__(
        self, config: Config, reader: AIOKafkaConsumer, span: Span, code: str | None, partitions: Mapping[str, int]
    ) -> None:
        self.span = span
        self._config = config
        self._reader = reader
        self._code = code
        self._partitions = partitions

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Yield what would be done, record by record; nothing is written.

        Raises:
            ClusterUnavailable, ClusterRefusal: as :func:`~consumer.kafka.tools.read_until`.
        """
        (partition,) = self._reader.assignment()
        self._reader.seek(partition, self.span.start)
        async for record in read_until(self._reader, {partition: self.span.end}):
            code = _text(record, f"{_DEAD_LETTER}code")
            if self._code is None or code == self._code:
                yield self._step(record, code)

    async def run(self, rate: float | None = None) -> AsyncGenerator[Step, None]:
        """Put the records back; yield each step when its record has been handed over, or why it was not.

        When it ends, everything yielded without a problem is acknowledged.

        Args:
            rate: Most records a second; None = as fast as they go.

        Raises:
            ClusterUnavailable, ClusterRefusal: as :class:`~consumer.kafka.tools.RecordProducer`.
        """
        producers: dict[str, RecordProducer] = {}
        try:
            began, sent = time.monotonic(), 0
            async with aclosing(self.steps()) as steps:
                async for step in steps:
                    if step.problem is None:
                        if rate is not None:
                            await asyncio.sleep(max(0.0, began + sent / rate - time.monotonic()))
                        sent += 1
                        yield await self._send(producers, step)
                    else:
                        yield step
            for producer in producers.values():
                await producer.flush()
        finally:
            for producer in producers.values():
                await producer.stop()

    async def _send(self, producers: dict[str, RecordProducer], step: Step) -> Step:
        producer = producers.get(step.topic)
        if producer is None:
            producer = producers[step.topic] = RecordProducer(self._config, step.topic)
            await producer.start()
        try:
            await producer.send(step.outgoing)
        except TooLarge as error:
            return Step(step.source, step.code, step.topic, step.outgoing, str(error))
        return step

    def _step(self, record: Record, code: str | None) -> Step:
        source = response_id(record.topic, record.partition, record.offset)
        topic, partition = self._target(record)
        headers = [
            (name, value)
            for name, value in record.headers
            if not name.startswith(_DEAD_LETTER) and name != REPLAY_OF
        ]
        headers.append((REPLAY_OF, source.encode()))
        problem = None
        if isinstance(record.value, Unread):
            problem = record.value.reason
        elif _text(record, f"{_DEAD_LETTER}truncated") == "true":
            problem = "its value did not fit the dead letter topic; the original record may still be there"
        return Step(source, code, topic, Outgoing(record.value, record.key, partition, headers), problem)

    def _target(self, record: Record) -> tuple[str, int | None]:
        """Return topic and partition *record* goes to; None = as its key says."""
        topic, partition = record.topic, record.partition
        if (named := _text(record, f"{_DEAD_LETTER}topic")) is not None:
            topic = named
            number = _text(record, f"{_DEAD_LETTER}partition") or ""
            partition = int(number) if number.isascii() and number.isdigit() else -1
        if topic not in self._partitions:
            return next(iter(self._partitions)), None
        return topic, partition if 0 <= partition < self._partitions[topic] else None


def _text(record: Record, name: str) -> str | None:
    """Return the text of the last header *name*."""
    for found, value in reversed(record.headers):
        if found == name and value is not None:
            return value.decode(errors="replace")
    return None


@asynccontextmanager
async def open_replay(
    config: Config, topic: str, partition: int, start: Position, end: Position, *, code: str | None = None
) -> AsyncIterator[Replay]:
    """Find the range in *topic*; nothing is written yet.

    Args:
        config: How brokers are reached, and the input topics.
        topic: Where the records are.
        partition: Of that topic.
        start: The first record.
        end: Where to stop; that record is not taken. The range is fixed now, also where it is the input topic itself.
        code: Only dead letters of this failure.

    Raises:
        ClusterUnavailable: no broker answers, or not in time.
        ClusterRefusal: a topic or the partition does not exist.
    """
    async with Cluster(config) as cluster:
        partitions = {name: (await existing(cluster, name)).partitions for name in config.input.topics}
    async with open_reader(config, topic, partition) as (reader, assigned, first, ends):
        (span,) = (await spans_of(config, assigned, first, ends, start, end)).values()
        yield Replay(config, reader, span, code, partitions)
