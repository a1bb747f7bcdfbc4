"""A topic to write to and a topic to read from its end on: the two halves of asking and being answered.

Outside any group, nothing is committed: who starts sees only what is written from then on. Records of open transactions
are not seen before these are committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from consumer.config import Config
from consumer.errors import TooLarge
from consumer.kafka.connection import RECORD_OVERHEAD_BYTES, producer_settings
from consumer.kafka.tools import Outgoing, Record, existing, open_reader, read_on, start_client, stop_client
from consumer.kafka.topics import Cluster, ClusterRefusal, ClusterUnavailable


class Exchange:
    """Owns a producer and a reader; made unstarted.

    Args:
        config: How brokers are reached; ``limits.record_bytes`` bounds a record.
        outgoing: An existing topic to write to.
        incoming: An existing topic to read, all its partitions as they are at the start.
    """

    def __init__(self, config: Config, outgoing: str, incoming: str) -> None:
        self._config = config
        self._outgoing = outgoing
        self._incoming = incoming
        self._size_max = config.limits.record_bytes + RECORD_OVERHEAD_BYTES
        self._open = AsyncExitStack()
        self._producer: AIOKafkaProducer | None = None
        self._reader: AIOKafkaConsumer | None = None

    async def start(self) -> None:
        """Find the end of the incoming topic, then connect the producer: no answer comes before it can be seen.

        Raises:
            ClusterUnavailable: no broker answers.
            ClusterRefusal: there is no such topic; the text names it.

        Cancellation: call :meth:`stop`.
        """
        async with Cluster(self._config) as cluster:
            await existing(cluster, self._outgoing)
        reading = open_reader(self._config, self._incoming)
        reader, partitions, _, ends = await self._open.enter_async_context(reading)
        for partition in partitions:
            reader.seek(partition, ends[partition])
        self._reader = reader
        producer = AIOKafkaProducer(**producer_settings(self._config) | {"max_request_size": self._size_max})
        await start_client(producer)
        self._producer = producer

    async def send(self, record: Outgoing) -> None:
        """Write *record*; return when it is acknowledged. The caller sets the deadline.

        Raises:
            TooLarge: it does not fit; nothing was written.
            ClusterRefusal: the broker refused it.
            ClusterUnavailable: no connection.

        Cancellation: whether it is written is unknown.
        """
        assert self._producer is not None, "start first"
        try:
            await self._producer.send_and_wait(
                self._outgoing, record.value, record.key, record.partition, headers=record.headers or None
            )
        except MessageSizeTooLargeError:
            raise TooLarge(f"{record.size} bytes are more than topic {self._outgoing} takes") from None
        except KafkaError as error:
            failure = ClusterUnavailable if error.retriable else ClusterRefusal
            raise failure(f"topic {self._outgoing}: {type(error).__name__}") from error

    def received(self) -> AsyncIterator[Record]:
        """Yield what is written to the incoming topic from the start on; one reader at a time.

        Raises:
            ClusterRefusal: it may not be read.
        """
        assert self._reader is not None, "start first"
        return read_on(self._reader)

    async def stop(self) -> None:
        """Disconnect, bounded; may be called at any time, and again."""
        producer, self._producer = self._producer, None
        self._reader = None
        if producer is not None:
            await stop_client(producer)
        await asyncio.shield(self._open.aclose())
