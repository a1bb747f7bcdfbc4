"""Responses and dead letters to Kafka, packed, in order, each acknowledged to the one that handed it in.

One *lane* per output partition, each with one flush loop:

1. ``append`` puts an encoded record at the end of the lane; it never waits. Bounded by the byte budget and the offset
   distance of those who append, who stop reading while their responses are not acknowledged.
2. The loop packs what has gathered into one batch (``create_batch``), sends it, and awaits the one future of that
   batch. Meanwhile the next batch gathers by itself, so no linger is needed. One batch in flight per lane keeps the
   order: concurrent sends to one partition overtake each other when a batch fills up.
3. Acknowledged: the owners of the batch's records are told, in lane order.
4. The broker refuses the batch for its size: it is split; a single record that is refused is handed back to its owner
   (``refused``), who answers with something smaller.
5. Any other failure: the producer is thrown away and the batch is sent again with a new one. After a failed batch an
   idempotent producer's sequence numbers have a hole that is never repaired (hazard H18). Whether the failed batch was
   written is unknown, so its records may appear twice, with the same response id.
6. No answer within the deadline: the lane goes on waiting, since an idempotent producer retries by itself, but the
   publisher is *stuck* and says so.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from consumer.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiokafka import AIOKafkaProducer
    from aiokafka.producer.message_accumulator import BatchBuilder

Headers = list[tuple[str, bytes]]

BATCH_BYTES = 512 * 1024
"""Largest batch before compression: half of a broker's default ``message.max.bytes``, so that a batch is never refused
for its size while single records fit. Batches below 64 KiB cost throughput (measured: components.md)."""

BATCH_BYTES_MIN = 16 * 1024
"""Batches are not halved below this; a topic that takes no 16 KiB refuses single responses instead."""

DISCARD_TIMEOUT_SECONDS = 2.0
"""A broken producer is given this long to close its connections; stopping it can hang for ever (hazard H18b)."""

REPLACE_BACKOFF_SECONDS = (0.25, 0.5, 1.0, 2.0, 5.0)
"""Waits between attempts to start a producer; the last one repeats."""

log = get_logger(__name__)


class Owner(Protocol):
    """Who handed a record in and hears what became of it."""

    def acknowledged(self, tokens: Sequence[int]) -> None:
        """The records with these tokens are written, in this order."""

    def refused(self, token: int) -> None:
        """The record with this token is too large for the broker; it was not written."""


class _Pending:
    """One encoded record on its way."""

    __slots__ = ("headers", "key", "owner", "token", "value")

    def __init__(self, key: bytes | None, value: bytes | None, headers: Headers, owner: Owner, token: int) -> None:
        self.key = key
        self.value = value
        self.headers = headers
        self.owner = owner
        self.token = token


class Lane:
    """All records for one output partition, in the order they were appended."""

    def __init__(self, publisher: Publisher, topic: str, partition: int) -> None:
        self.topic = topic
        self.partition = partition
        self._publisher = publisher
        self._pending: deque[_Pending] = deque()
        self._arrived = asyncio.Event()
        self._sending = 0
        self._flush = asyncio.create_task(self._run(), name=f"publish {topic}/{partition}")
        self._flush.add_done_callback(publisher.lane_ended)

    @property
    def waiting(self) -> int:
        """Records appended and not acknowledged."""
        return len(self._pending) + self._sending

    def append(self, key: bytes | None, value: bytes | None, headers: Headers, owner: Owner, token: int) -> None:
        """Hand one record in; *owner* hears of it by *token*."""
        self._pending.append(_Pending(key, value, headers, owner, token))
        self._arrived.set()

    async def close(self) -> None:
        """Stop at once; what is not acknowledged is forgotten."""
        self._flush.cancel()
        await asyncio.wait([self._flush])

    async def _run(self) -> None:
        pending = self._pending
        while True:
            if not pending:
                self._arrived.clear()
                await self._arrived.wait()
            generation, producer = await self._publisher.producer()
            batch, records = self._pack(producer)
            self._sending = len(records)
            await self._deliver(generation, producer, batch, records)
            self._sending = 0

    def _pack(self, producer: AIOKafkaProducer) -> tuple[BatchBuilder, list[_Pending]]:
        """Take as many pending records as fit one batch; the first always fits."""
        batch = producer.create_batch()
        append = batch.append
        now = int(time.time() * 1000)
        pending = self._pending
        records: list[_Pending] = []
        while pending:
            record = pending[0]
            if append(timestamp=now, key=record.key, value=record.value, headers=record.headers) is None:
                break
            records.append(pending.popleft())
        batch.close()
        return batch, records

    async def _deliver(
        self, generation: int, producer: AIOKafkaProducer, batch: BatchBuilder, records: list[_Pending]
    ) -> None:
        try:
            future = await producer.send_batch(batch, self.topic, partition=self.partition)
            await self._publisher.wait_for(future, generation)
        except MessageSizeTooLargeError:
            if len(records) > 1:
                self._pending.extendleft(reversed(records))
                await self._publisher.replace(generation, "a batch was refused for its size", halve_batches=True)
            else:
                await self._publisher.replace(generation, "a record was refused for its size")
                self._sending = 0
                records[0].owner.refused(records[0].token)
        except (KafkaError, OSError, TimeoutError) as error:
            self._pending.extendleft(reversed(records))
            await self._publisher.replace(generation, repr(error))
        else:
            self._acknowledge(records)

    @staticmethod
    def _acknowledge(records: list[_Pending]) -> None:
        owner = records[0].owner
        tokens: list[int] = []
        for record in records:
            if record.owner is not owner:
                owner.acknowledged(tokens)
                owner, tokens = record.owner, []
            tokens.append(record.token)
        owner.acknowledged(tokens)


class Publisher:
    """Owns the producer and all lanes.

    Args:
        make_producer: Makes an unstarted producer for a largest batch of so many bytes.
        attempt_timeout_seconds: Longest wait for one acknowledgement, or for a producer to start or stop, before the
            publisher counts as stuck or the attempt as failed.
        on_failure: Called once with the exception that ended a lane; programmer's errors only.
    """

    def __init__(
        self,
        make_producer: Callable[[int], AIOKafkaProducer],
        *,
        attempt_timeout_seconds: float,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._make_producer = make_producer
        self._attempt_timeout = attempt_timeout_seconds
        self._on_failure = on_failure
        self._lanes: dict[tuple[str, int], Lane] = {}
        self._producer: AIOKafkaProducer | None = None
        self._generation = 0
        self._batch_bytes = BATCH_BYTES
        self._replacing = asyncio.Lock()
        self._replaced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stuck = False
        self._closing = False

    @property
    def stuck(self) -> bool:
        """True while the broker does not acknowledge, or no producer can be started."""
        return self._stuck

    @property
    def waiting(self) -> int:
        """Records appended and not acknowledged."""
        return sum(lane.waiting for lane in self._lanes.values())

    def lane(self, topic: str, partition: int) -> Lane:
        """The lane of one output partition, made on first use."""
        lane = self._lanes.get((topic, partition))
        if lane is None:
            lane = self._lanes[topic, partition] = Lane(self, topic, partition)
        return lane

    async def start(self) -> None:
        """Start the first producer, trying until it works.

        Cancellation: no producer is left behind.
        """
        async with self._replacing:
            await self._start_producer()

    async def stop(self, timeout_seconds: float) -> None:
        """Stop lanes and producer; call only when nothing is waiting, for the rest is forgotten."""
        self._closing = True
        for lane in self._lanes.values():
            await lane.close()
        self._lanes.clear()
        await self._discard(timeout_seconds)

    async def producer(self) -> tuple[int, AIOKafkaProducer]:
        """The current producer and its generation; waits while it is being replaced."""
        if self._producer is None:
            async with self._replacing:
                if self._producer is None:
                    await self._start_producer()
        assert self._producer is not None
        return self._generation, self._producer

    async def wait_for(self, future: asyncio.Future[object], generation: int) -> None:
        """Wait for an acknowledgement; being stuck is told, not raised.

        Raises:
            KafkaError: the batch failed, or another lane had the producer of *generation* replaced.
        """
        while not future.done():
            if generation != self._generation:
                future.add_done_callback(_ignore)
                raise KafkaError("the producer was replaced")
            done, _ = await asyncio.wait(
                (future, self._replaced), timeout=self._attempt_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not done and not self._stuck:
                self._stuck = True
                log.warning("publisher stuck", waited_seconds=self._attempt_timeout)
        if future.cancelled():
            raise KafkaError("the producer dropped the batch")
        future.result()
        if self._stuck:
            self._stuck = False
            log.info("publisher goes on")

    async def replace(self, generation: int, reason: str, *, halve_batches: bool = False) -> None:
        """Throw away the producer of *generation* and start another; does nothing where that has happened already.

        Args:
            generation: As :meth:`producer` gave it.
            reason: For the log.
            halve_batches: The topic's limit lies below the batches sent: pack half as much from now on.
        """
        async with self._replacing:
            if generation != self._generation or self._closing:
                return
            if halve_batches:
                self._batch_bytes = max(self._batch_bytes // 2, BATCH_BYTES_MIN)
            log.warning("producer replaced", reason=reason, batch_bytes=self._batch_bytes)
            self._generation += 1
            self._replaced.set_result(None)
            self._replaced = asyncio.get_running_loop().create_future()
            await self._discard(DISCARD_TIMEOUT_SECONDS)
            await self._start_producer()

    async def _start_producer(self) -> None:
        attempt = 0
        while True:
            producer = self._make_producer(self._batch_bytes)
            try:
                async with asyncio.timeout(self._attempt_timeout):
                    await producer.start()
            except (KafkaError, OSError, TimeoutError) as error:
                await _stop_quietly(producer, self._attempt_timeout)
                self._stuck = True
                log.warning("producer cannot start", error=repr(error), attempt=attempt + 1)
            except BaseException:
                await _stop_quietly(producer, self._attempt_timeout)
                raise
            else:
                self._producer = producer
                self._stuck = False
                return
            await asyncio.sleep(REPLACE_BACKOFF_SECONDS[min(attempt, len(REPLACE_BACKOFF_SECONDS) - 1)])
            attempt += 1

    async def _discard(self, timeout_seconds: float) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await _stop_quietly(producer, timeout_seconds)

    def lane_ended(self, flush: asyncio.Task[None]) -> None:
        """A flush loop ends only by cancellation; anything else is a defect and must not go unseen."""
        if not flush.cancelled() and (error := flush.exception()) is not None:
            self._on_failure(error)


async def _stop_quietly(producer: AIOKafkaProducer, timeout_seconds: float) -> None:
    """Stop a producer that may be broken: ``stop`` can hang (H18b) and raise what nobody caused (H17b)."""
    stopping = asyncio.ensure_future(producer.stop())
    done, _ = await asyncio.wait([stopping], timeout=timeout_seconds)
    if not done:
        stopping.cancel()
        await asyncio.wait([stopping], timeout=1)
    stopping.add_done_callback(_ignore)


def _ignore(future: asyncio.Future[object]) -> None:
    """Mark an abandoned future's exception as seen."""
    if not future.cancelled():
        future.exception()
