"""Responses and dead letters to Kafka, packed, in order, each acknowledged to the one that handed it in.

One *lane* per output partition, each with one flush loop:

1. ``append`` puts an encoded record at the end of the lane; it never waits. Bounded by the byte budget and the offset
   distance of those who append, who stop reading while their responses are not acknowledged.
2. The loop packs what has gathered into one batch (``create_batch``), sends it, and awaits the one future of that
   batch. Meanwhile the next batch gathers by itself. One batch in flight per lane keeps the order: concurrent sends to
   one partition overtake each other when a batch fills up. A lane whose last batch left a moment ago, and was not full,
   waits for the next *departure*, which is the same for all lanes: under load their batches go out together, in one
   request, some :data:`PACE_SECONDS` apart, the time of the answer included; what comes after a pause goes at once.
3. Acknowledged: the owners of the batch's records are told, in lane order, each record exactly once.
4. The broker refuses the batch for its size: from now on the lane packs half as much. A record refused alone is handed
   back to its owner (``refused``); what the owner appends in its place goes out in its place.
5. Any other failure: the batch is sent again, first of its lane.
6. No answer within the deadline: the lane goes on waiting, since an idempotent producer retries by itself, but the
   publisher is *stuck* and says so.

One *keeper* owns the producer. After 4 and 5 it throws the producer away and starts another, because after a failed
batch an idempotent producer's sequence numbers have a hole that is never repaired (hazard H18). Batches of other lanes
may finish first; those that do not are sent again too. Whether they were written is unknown then, so records may appear
twice, with the same response id, but first occurrences stay in lane order. Failures in a row are spaced out.

A topic that lost the partition of a lane, and records that are no bytes, are not survived: ``on_failure`` hears of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from itertools import chain, groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol, TypeAlias

from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError

from consumer.kafka.clients import connect_client
from consumer.log import get_logger
from consumer.responses import Header

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiokafka import AIOKafkaProducer
    from aiokafka.producer.message_accumulator import BatchBuilder

Headers: TypeAlias = "Sequence[Header]"

BATCH_BYTES = 512 * 1024
"""Largest batch before compression: half of a broker's default ``message.max.bytes``, so that a batch is never refused
for its size while single records fit. Batches below 64 KiB cost throughput (half of it at 16 KiB). A larger record is
a batch of its own."""

PACE_SECONDS = 0.004
"""Least time between two batches of a lane that do not fill up. A batch costs the client about 50 us, whatever is in
it, and the broker as much again: operations that wait a few milliseconds finish a handful at a time, and without this
their responses would cost more than they do themselves. No response waits longer for it than this."""

SENDING_BYTES_MAX = 64 * 1024 * 1024
"""Bytes of batches sent and not acknowledged, over all lanes. The client puts the batches of all lanes to one broker
into one request; above the broker's ``socket.request.max.bytes`` (100 MiB) the connection is closed and the same
request sent again, for ever. One batch above it goes alone."""

DISCARD_TIMEOUT_SECONDS = 2.0
"""A producer with a failed batch is given this long to finish the batches of other lanes; ``stop`` by itself can wait
for ever (hazard H18b)."""

TEAR_DOWN_SECONDS = 1.0
"""Bound of each step of ending a producer by force; none of them waits for the broker."""

BACKOFF_SECONDS = (0.25, 0.5, 1.0, 2.0, 5.0)
"""Waits before the next producer after so many failures in a row; the last one repeats. A batch that is refused for
ever (no permission, a topic policy) costs a connection and two requests every 5 s, not a busy loop."""

_RECORD_OVERHEAD_BYTES = 64
"""More than a record has beside key, value and headers: a dozen lengths and deltas of at most 5 bytes."""

_Pending: TypeAlias = "tuple[bytes | None, bytes | None, Headers, Owner, int]"
"""Key, value, headers, owner, token: one encoded record on its way. A plain tuple, since there is one per response."""
_owner_of = itemgetter(3)

log = get_logger(__name__)


class Owner(Protocol):
    """Who handed a record in and hears what became of it. Neither call may raise; that ends the lane."""

    def acknowledged(self, tokens: Sequence[int]) -> None:
        """The records with these tokens are written, in this order."""

    def refused(self, token: int) -> None:
        """The record with this token is too large for the broker; it was not written.

        What is appended to the lane during the call takes the record's place.
        """


class Lane:
    """All records for one output partition, in the order they were appended; made by :meth:`Publisher.lane`."""

    def __init__(self, publisher: Publisher, topic: str, partition: int) -> None:
        self.topic = topic
        self.partition = partition
        self._publisher = publisher
        self._pending: deque[_Pending] = deque()
        self._arrived = asyncio.Event()
        self._sending = 0
        self._batch_bytes = BATCH_BYTES
        self.flush = asyncio.create_task(self._run(), name=f"publish {topic}/{partition}")

    @property
    def waiting(self) -> int:
        """Records appended and not acknowledged."""
        return len(self._pending) + self._sending

    def append(self, key: bytes | None, value: bytes | None, headers: Headers, owner: Owner, token: int) -> None:
        """Hand one record in; *owner* hears of it by *token*."""
        self._pending.append((key, value, headers, owner, token))
        self._arrived.set()

    async def _run(self) -> None:
        pending = self._pending
        hurried = True
        left_at = 0.0
        while True:
            if not pending:
                self._arrived.clear()
                await self._arrived.wait()
            if not hurried and (seconds := left_at + PACE_SECONDS - time.monotonic()) > 0:
                await self._publisher.departure(seconds)
            producer = await self._publisher.producer()
            batch, records = self._pack(producer)
            hurried = bool(pending)  # it was full: the rest has waited long enough
            left_at = time.monotonic()
            await self._deliver(producer, batch, records)

    def _pack(self, producer: AIOKafkaProducer) -> tuple[BatchBuilder, list[_Pending]]:
        """Take as many pending records as fit one batch; the first always fits."""
        batch = producer.create_batch()
        append = batch.append
        now = time.time_ns() // 1_000_000
        pending = self._pending
        budget = self._batch_bytes if self._batch_bytes < BATCH_BYTES else 0
        records: list[_Pending] = []
        while pending:
            key, value, headers, _, _ = record = pending[0]
            if budget and records and batch.size() + _size_at_most(key, value, headers) > budget:
                break
            if append(timestamp=now, key=key, value=value, headers=headers) is None:
                break
            records.append(record)
            pending.popleft()
        batch.close()
        return batch, records

    async def _deliver(self, producer: AIOKafkaProducer, batch: BatchBuilder, records: list[_Pending]) -> None:
        size = batch.size()
        self._sending = len(records)
        try:
            await self._publisher.send(self, producer, batch, size)
        except (MessageSizeTooLargeError, RecordListTooLargeError) as error:
            self._sending = 0
            self._publisher.replace(producer, error, refused_for_size=True)
            if len(records) > 1:
                self._batch_bytes = size // 2
                self._pending.extendleft(reversed(records))
            else:
                self._hand_back(records[0])
        except (KafkaError, OSError, TimeoutError) as error:
            self._sending = 0
            self._pending.extendleft(reversed(records))
            self._publisher.replace(producer, error)
        else:
            self._sending = 0
            self._publisher.acknowledged()
            for owner, group in groupby(records, _owner_of):
                owner.acknowledged([token for _, _, _, _, token in group])

    def _hand_back(self, record: _Pending) -> None:
        """Give a refused record to its owner, and what it appends in exchange the record's place."""
        pending = self._pending
        before = len(pending)
        _, _, _, owner, token = record
        owner.refused(token)
        pending.rotate(len(pending) - before)


class Publisher:
    """Owns the producer and all lanes.

    Args:
        make_producer: Makes an unstarted producer for a largest batch of so many bytes.
        attempt_timeout_seconds: Longest wait for one acknowledgement, or for a producer to start, before the publisher
            counts as stuck.
        on_failure: Called with the exception that ended a lane or the keeper: a programmer's error, or an output topic
            that is no longer the one it was. Nothing of that lane is published any more.
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
        self._keeper: asyncio.Task[None] | None = None
        self._owned: AIOKafkaProducer | None = None
        """The producer that has to be discarded: starting, usable, or on its way out."""
        self._usable: AIOKafkaProducer | None = None
        self._started = asyncio.Event()
        self._broken = asyncio.Event()
        self._failures = 0
        """Failures since the last acknowledgement."""
        self._sending_bytes = 0
        self._room = asyncio.Event()
        self._departure: asyncio.Event | None = None
        """There while a lane waits for it."""
        self._handing_over: set[asyncio.Timeout] = set()
        """Of every batch the producer has not taken yet: it may be waiting for metadata that never come to a producer
        that was ended meanwhile (the client forgets who waits for them), so whoever ends it ends these waits."""
        self._late: set[Lane] = set()
        """Lanes whose batch has waited for the attempt timeout."""
        self._was_stuck = False
        self._closing = False

    @property
    def stuck(self) -> bool:
        """True while the broker does not acknowledge, refuses, or no producer can be started."""
        return bool(self._failures or self._late)

    @property
    def waiting(self) -> int:
        """Records appended and not acknowledged."""
        return sum(lane.waiting for lane in self._lanes.values())

    def dead_task(self) -> str | None:
        """Tell in words whether the producer's metadata task has ended: it would never learn of a moved leader (H34).

        The one that sends needs no watching: when it ends, the client fails every batch.
        """
        task = None if self._usable is None else self._usable.client._sync_task  # noqa: SLF001 - told nowhere else
        if task is None or not task.done():
            return None
        return f"the producer's _sync_task has ended: {'cancelled' if task.cancelled() else repr(task.exception())}"

    def lane(self, topic: str, partition: int) -> Lane:
        """The lane of one output partition, made on first use.

        Raises:
            RuntimeError: the publisher was stopped.
        """
        if self._closing:
            raise RuntimeError("the publisher was stopped")
        lane = self._lanes.get((topic, partition))
        if lane is None:
            lane = self._lanes[topic, partition] = Lane(self, topic, partition)
            lane.flush.add_done_callback(self._ended)
        return lane

    async def start(self) -> None:
        """Start the first producer, trying until it works.

        Raises:
            RuntimeError: it was started before.
            Exception: what *make_producer* raised.

        Cancellation: no producer is left behind; the publisher is stopped.
        """
        if self._keeper is not None:
            raise RuntimeError("the publisher was started before")
        self._keeper = asyncio.create_task(self._keep(), name="keep the producer")
        started = asyncio.create_task(self._started.wait())
        try:
            await asyncio.wait([self._keeper, started], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self.stop(0)
            raise
        finally:
            started.cancel()
        if self._keeper.done():
            await self._keeper
        self._keeper.add_done_callback(self._ended)

    async def stop(self, timeout_seconds: float) -> None:
        """Stop lanes and producer; call only when nothing is waiting, for the rest is forgotten.

        Takes at most *timeout_seconds* and a few :data:`TEAR_DOWN_SECONDS`, whatever the broker does. May be called
        twice, and without :meth:`start`. Cancellation: call it again.
        """
        self._closing = True
        tasks = [lane.flush for lane in self._lanes.values()]
        if self._keeper is not None:
            tasks.append(self._keeper)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=TEAR_DOWN_SECONDS)
        self._usable = None
        if self._owned is not None:
            await discard(self._owned, timeout_seconds)
            self._owned = None

    # ------------------------------------------------------------------------------------------ for lanes

    async def departure(self, seconds: float) -> None:
        """Wait for the next departure, at most *seconds*."""
        departure = self._departure
        if departure is None:
            departure = self._departure = asyncio.Event()
            asyncio.get_running_loop().call_later(seconds, self._depart, departure)
        await departure.wait()

    def _depart(self, departure: asyncio.Event) -> None:
        self._departure = None
        departure.set()

    async def producer(self) -> AIOKafkaProducer:
        """The producer to use now; waits while there is none."""
        while self._usable is None:
            await self._started.wait()
        return self._usable

    async def send(self, lane: Lane, producer: AIOKafkaProducer, batch: BatchBuilder, size: int) -> None:
        """Send a batch of *size* bytes and wait for its acknowledgement; being stuck is told, not raised.

        Raises:
            KafkaError, TimeoutError: the batch failed, or the producer was thrown away.
        """
        while self._sending_bytes and self._sending_bytes + size > SENDING_BYTES_MAX:
            self._room.clear()
            await self._room.wait()
        if producer is not self._usable:
            raise KafkaError("the producer was thrown away")
        self._sending_bytes += size
        timer = asyncio.get_running_loop().call_later(self._attempt_timeout, self._is_late, lane)
        try:
            async with asyncio.timeout(None) as handing_over:
                self._handing_over.add(handing_over)
                try:
                    written = await producer.send_batch(batch, lane.topic, partition=lane.partition)
                finally:
                    self._handing_over.discard(handing_over)
            await written
        finally:
            timer.cancel()
            self._late.discard(lane)
            self._sending_bytes -= size
            self._room.set()

    def replace(self, producer: AIOKafkaProducer, error: Exception, *, refused_for_size: bool = False) -> None:
        """Have *producer* replaced; does nothing where that was asked before.

        Args:
            producer: As :meth:`producer` gave it.
            error: What the broker, or the client, said.
            refused_for_size: The broker is well, so this is no failure and nobody has to wait.
        """
        if producer is not self._usable:
            return
        self._usable = None
        self._started.clear()
        self._broken.set()
        if not refused_for_size:
            self._failures += 1
            self._was_stuck = True
        log.warning("producer is replaced", error=repr(error), failures=self._failures)

    def acknowledged(self) -> None:
        """A batch was written: what failed before is over."""
        self._failures = 0
        if self._was_stuck and not self._late:
            self._was_stuck = False
            log.info("publisher goes on")

    def _is_late(self, lane: Lane) -> None:
        self._late.add(lane)
        self._was_stuck = True
        log.warning(
            "no acknowledgement", topic=lane.topic, partition=lane.partition, waited_seconds=self._attempt_timeout
        )

    # ------------------------------------------------------------------------------------------ the keeper

    async def _keep(self) -> None:
        while True:
            self._broken.clear()
            self._owned = producer = self._make_producer(BATCH_BYTES)
            try:
                async with asyncio.timeout(self._attempt_timeout):
                    await connect_client(producer)
            except (KafkaError, OSError, TimeoutError) as error:
                self._failures += 1
                self._was_stuck = True
                log.warning("producer cannot start", error=repr(error), failures=self._failures)
            else:
                if not self.waiting:  # then nothing is to be acknowledged that could tell
                    self.acknowledged()
                self._usable = producer
                self._started.set()
                await self._broken.wait()
            await discard(producer, DISCARD_TIMEOUT_SECONDS)
            self._owned = None
            for handing_over in self._handing_over:
                handing_over.reschedule(asyncio.get_running_loop().time())
            if self._failures:
                await asyncio.sleep(BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS)) - 1])

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Lanes and keeper end by :meth:`stop`; anything else is a defect and must not go unseen."""
        if not self._closing:
            error = None if task.cancelled() else task.exception()
            self._on_failure(error or RuntimeError(f"{task.get_name()} ended"))
        elif not task.cancelled():
            task.exception()


def _size_at_most(key: bytes | None, value: bytes | None, headers: Headers) -> int:
    """Bytes that a record takes in a batch, or a few more."""
    size = _RECORD_OVERHEAD_BYTES + len(key or b"") + len(value or b"")
    return size + sum(4 * len(name) + len(content or b"") + 10 for name, content in headers)


async def discard(producer: AIOKafkaProducer, timeout_seconds: float) -> None:
    """End a producer: by itself within *timeout_seconds*, else by force. Batches not written by then have failed.

    May be called again where it was cancelled, and for a producer that never started. ``stop`` can wait for ever
    (hazard H18b) and leaves its tasks behind when it is cancelled, so the force reaches for what is private in
    aiokafka; a test holds the installed release to that.
    """
    nobody_waits_for(producer)
    stopping = asyncio.create_task(producer.stop())
    stopping.add_done_callback(_ignore)
    try:
        await asyncio.wait([stopping], timeout=timeout_seconds)
    except asyncio.CancelledError:
        stopping.cancel()
        raise
    routine = producer._sender.sender_task  # noqa: SLF001 - see above, also for the others
    if routine is not None and not routine.done():
        # Closing a connection would first send all it has, when a frozen broker wakes up; and a cancelled routine waits
        # for its requests, which wait for the broker: so both go at once, before `stop` gets its turn.
        for connection in producer.client._conns.values():  # noqa: SLF001 - above
            if connection._writer is not None:  # noqa: SLF001 - above
                connection._writer.transport.abort()  # noqa: SLF001 - above
        tasks = [*routine.get_coro().cr_frame.f_locals.get("tasks", ()), routine]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=TEAR_DOWN_SECONDS)
    # Only now that nobody would queue them again: `stop`, and every lane, waits for these.
    accumulator = producer._message_accumulator  # noqa: SLF001 - above
    error = KafkaError("the producer was thrown away")
    pending = accumulator._pending_batches  # noqa: SLF001 - above
    pending.update(chain.from_iterable(accumulator._batches.values()))  # noqa: SLF001 - a batch that fails is sought there
    nobody_waits_for(producer)  # of what has come since
    for left in list(pending):
        left.failure(error)
    await asyncio.wait([stopping], timeout=TEAR_DOWN_SECONDS)
    # What a `stop` that was cancelled, or raised, did not come to.
    closing = asyncio.create_task(producer.client.close())
    closing.add_done_callback(_ignore)
    await asyncio.wait([stopping, closing], timeout=TEAR_DOWN_SECONDS)
    stopping.cancel()
    closing.cancel()
    nobody_waits_for(producer)


def nobody_waits_for(producer: AIOKafkaProducer) -> None:
    """Mark as seen how ends what *producer* has under way: who was waiting may have been cancelled, and hears nothing.

    A transaction's end is told by its steps too, and it may be failed more than once.
    """
    accumulator, transactions = producer._message_accumulator, producer._txn_manager  # noqa: SLF001 - see `discard`
    batches = [*accumulator._pending_batches, *chain.from_iterable(accumulator._batches.values())]  # noqa: SLF001 - see `discard`
    futures = [future for batch in batches for future in (batch.future, batch._drain_waiter)]  # noqa: SLF001 - see `discard`
    if transactions is not None:
        futures += [transactions._pid_waiter, transactions._transaction_waiter]  # noqa: SLF001 - see `discard`
        futures += [future for *_, future in transactions._pending_txn_offsets]  # noqa: SLF001 - see `discard`
    for future in futures:
        if future is not None:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())


def _ignore(task: asyncio.Task[None]) -> None:
    """Mark the exception of a task as seen: a producer on its way out may raise what nobody caused (H17b)."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("producer ended badly", error=repr(error))
