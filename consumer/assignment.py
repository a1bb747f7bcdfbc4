"""One assigned partition, from its reservation to its drain: decode, execute, answer, resolve.

An :class:`Assignment` owns the window, the buffered records, the running operations and the offset tracker of one
partition in one epoch. The life of a record:

1. ``receive``: the poller hands over fetched records. They are charged to the byte budget and wait in a buffer, apart
   from the window, so that the client's own buffers are always empty (hazard H8).
2. *Track and decode*: the executor takes. Offsets are tracked in delivery order; a record that cannot be decoded goes
   on as an error item, in its place.
3. *Execute*: at most ``window`` operations at a time, under the reservation made before the first record was read.
4. *Answer*: the outcome becomes one encoded response in the lane of its output partition; poison, panics and permanent
   storage faults are written to the dead letter topic as well.
5. *Resolve*: when the broker has acknowledged the response, and the dead letter where there is one, the offset is
   finished. The poller commits the watermark, and beside it the offset map of what is finished above.

Outcomes that are not the ordinary one:

* No permits: the partition waits (``at_capacity``), tries again with backoff and jitter, and reads nothing meanwhile.
* A window that is idle while others wait is given up (:meth:`Assignment.give_up_window`); the partition then waits too.
* A schema id not heard of, and no answer from the registry: the partition waits at that record (``registry``).
* A record that the offset map of the last commit says is finished: it is tracked and dropped, neither run nor answered.
* A record that has ended the process twice while it was decoded is poison without being decoded again.
* A stuck record: reading stops ``DISTANCE_MAX`` offsets above it (``offset_distance``).
* A flood of poison: the partition makes way for the others, so that they keep their speed.
* Too many poison records: the one that reaches the limit is the last one worked on. The partition reads nothing more
  (``poison_limit``), and its window and buffer are given back, so that the partitions beside it are not held up.
* Drain: nothing more is taken from the buffer; what was started is finished, answered and acknowledged.
* The drain deadline: the partition is abandoned. What still runs keeps its own permits and no others; its outcome goes
  nowhere, since whoever owns the partition next runs the record again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Literal, Protocol, TypeAlias
from uuid import UUID, uuid5
from weakref import ref

from consumer.budget import ByteBudget
from consumer.codec import Decoded, OperationDecoder, ResponseEncoder
from consumer.errors import DEAD_LETTER_CODES, AtCapacity, DecodeError, OperationPanic, TierstreamError, TooLarge
from consumer.executor import Item, OldestOperation, StreamExecutor
from consumer.log import bind_task, get_logger, key_digest
from consumer.metrics import (
    UNKNOWN_KIND,
    Counts,
    Exemplar,
    OldestState,
    PartitionState,
    record_at_work,
    record_labels,
)
from consumer.offset_map import encode
from consumer.offsets import DISTANCE_MAX, OffsetTracker, Run
from consumer.operations import Insert, OpResponse, Position
from consumer.poison import UNLIMITED, PoisonPolicy
from consumer.registry import SchemaRegistry
from consumer.responses import DeadLetters, Header, ResponseHeaders
from consumer.service import StorageService
from consumer.suspects import NOBODY, OFFSET, TIMESTAMP, Note, Suspects
from consumer.watchdog import PartitionSeen

Outcome: TypeAlias = OpResponse | Exception

CHUNK_RECORDS = 256
"""Records taken from the buffer at a time: tracking them together costs a tenth of tracking them one by one, and a
drain leaves at most this many tracked but not started."""

BUFFER_RECORDS_MAX = 3_000
"""Fetching stops above this many buffered records, however many the last fetch has brought. With eight partitions and
records of 1 KiB this keeps 50 MiB less in memory than 8,000, at the same CPU a record."""

BUFFER_RECORDS_RESUME = 1_000
"""Fetching goes on below this: tens of milliseconds of work for a partition that has all of a core. The distance to
:data:`BUFFER_RECORDS_MAX` keeps pausing rare, since a pause drops what the client has prefetched (hazard H7)."""

RECORD_OVERHEAD_BYTES = 400
"""Charged for each record beside its bytes: the Python objects around it."""

RESERVE_BACKOFF_SECONDS = 0.1
RESERVE_BACKOFF_SECONDS_MAX = 2.0
"""Waits between attempts to get a window double from the first to the second value, with full jitter. Short, because
an idle partition hands its window on within seconds."""

POISON_RUN = 256
"""Poison records in a row after which a partition makes way for the others. Less is no flood, and costs them little."""

POISON_STEP = 64
OPERATIONS_PER_POISON = 12
"""Of a flood, so many records are worked off, then the others come: twelve operations each. A poison record costs up to
two operations of the cheapest kind, for it is written twice, and in batches of this size; so a partition of nothing but
poison takes a seventh of the CPU at most, and leaves its neighbours more than 80 % of their speed (docs/growth.md).
Several of them take no more together. Counted in operations, and not in time, it is the same on every machine."""

POISON_BYTES = 2048
"""A poison record counts once more for each of them: they are fetched, packed and written again, which takes some 15 us
for a KiB."""

POISON_PAUSE_SECONDS = 0.002
"""How long to see whether the others have something to do at all; if not, a flood is worked off at 32,000 a second."""

POISON_PAUSES_IDLE = 5
"""So often in a row nothing has begun, and nothing is in flight, until the others count as idle: 10 ms. Who has much to
read waits for less between two fetches."""

POISON_PAUSES_MAX = 25
"""So often they are waited for though none has begun an operation, where some are in flight: 50 ms. A group of durable
writes takes ten; but storage that is away must not stop what needs none."""

POISON_WAIT_SECONDS_MAX = 1.0
"""So long they are waited for at most, whatever they do, by each of several floods for each of them. Others that begin
a hundred operations a second leave most of the CPU free, and a flood beside them would get eight records a second; with
this it gets 64, which cost nobody anything, and what is good behind it is read some day."""

IDLE_SECONDS = 5.0
"""A window with nothing in flight or buffered for so long is passed to a partition that waits for one (contract 4)."""

KEY_NAMESPACE = UUID("5f1c7b1e-9b0a-5c8e-8f43-6d1f7c2d9a10")
"""Namespace of the keys of keyless inserts: UUIDv5(namespace, ``CLUSTER/TOPIC/PARTITION/OFFSET/TIMESTAMP_MS``), so that
a replay writes the same object. Published in README.md; never changes."""

log = get_logger(__name__)


class Record(Protocol):
    """A Kafka record as fetched, untouched."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


class Lane(Protocol):
    """All records for one output partition, in order; never waits."""

    def append(
        self, key: bytes | None, value: bytes | None, headers: Sequence[Header], owner: Owner, token: int
    ) -> None:
        """Hand one record in; *owner* hears of it by *token*."""


class Owner(Protocol):
    """Who hears what became of an appended record."""

    def acknowledged(self, tokens: Sequence[int]) -> None:
        """The records with these tokens are written, in this order."""

    def refused(self, token: int) -> None:
        """The record with this token is too large for the broker; it was not written."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What all assignments of the process share."""

    service: StorageService
    decoder: OperationDecoder
    budget: ByteBudget
    counts: Counts
    response_lane: Callable[[int], Lane]
    """The lane for the responses of an input partition."""
    dead_letter_lane: Callable[[int], Lane] | None
    """The lane for the dead letters of an input partition; None where there is no dead letter topic."""
    cluster_id: str
    group_id: str
    ordering: Literal["key", "unordered", "partition"]
    fraction: Fraction
    copy_headers: frozenset[str]
    response_prefix: bytes
    """What every response begins with: its frame."""
    response_bytes_max: int
    dead_letter_bytes_max: int
    """Bytes of key, value and headers that fit one record of the dead letter topic."""
    read_bytes: int
    """What a read reserves of the byte budget before its size is known: ``storage.threshold``."""
    derive_keys: bool
    show_keys: bool
    compacted: bool = False
    """True where the output topic is compacted: a null key is replaced by the response id."""
    registry: SchemaRegistry | None = None
    """The decoder's resolver, to be asked before a record with a schema it has not heard of is decoded."""
    poison: PoisonPolicy = UNLIMITED
    """How many poison records a partition may have."""
    suspects: Suspects | None = None
    """Knows the records that have ended a process while they were decoded; None = nobody does."""
    floods: set[Assignment] = field(default_factory=set)
    """Those that make way for the others just now."""

    def lanes(self, partition: int) -> tuple[Lane, Lane | None]:
        """Return the shared lanes for responses and dead letters of an input partition."""
        return self.response_lane(partition), self.dead_letter_lane(partition) if self.dead_letter_lane else None


class _Entry:
    """One record on its way through the assignment."""

    __slots__ = ("code", "decoded", "pending", "record", "reserved", "size", "status")

    def __init__(self, record: Record) -> None:
        value, key = record.value, record.key
        self.record = record
        self.size = RECORD_OVERHEAD_BYTES + (len(value) if value else 0) + (len(key) if key else 0)
        for name, content in record.headers:
            self.size += len(name) + len(content or b"")
        self.decoded: Decoded | None = None
        self.reserved = 0
        """Bytes reserved for a read, and then held by its answer."""
        self.pending = 0
        """Acknowledgements to come: 1 for the response, 1 more for a dead letter."""
        self.status = 0
        self.code: str | None = None
        """The failure's code where the record is dead-lettered."""


class Assignment:
    """One partition in one epoch. Made with its window, started closed; opened once its start offset is known.

    Args:
        pipeline: What all assignments share.
        topic: Input topic.
        partition: Input partition.
        epoch: Number of the assignment generation, for logs and state.
        executor: The window reserved for it, or None where there were no permits.
        refill: Called with this assignment when its buffer runs low, or its window came, and fetching may go on.
        resolved: Called with the number of records that became finished.
        failed: Called with the exception that ended this assignment: a defect; the process has to end.
        wanted: Called with this assignment while it has to wait for permits, so that an idle window can be passed on.
        freed: Called when this assignment has given its window up, so that somebody who waits can have it.
        lanes: Where responses and dead letters go; None = the lanes all assignments share.
        poisoned: Called with this assignment when it has reached a limit of poison records.
        poison_limit: The limit this partition has reached before in this process, in words: nothing of it is read.
        note: Where the record being decoded is noted; closed with the assignment.
    """

    starving_since: float | None = None
    """Monotonic time since when there is no window and something to read, or nobody has told that there is not."""
    _quiet = _begun_by_all = 0
    """Pauses in a row in which nobody began an operation, and how many had been begun then."""
    _awaited: Callable[[], Awaitable[object]] | None = None
    """What the next record, or what comes of it, waits for; None where there will be none."""
    _source: str | None = None
    """This very log, for the positions of writes; None where it cannot be told from others."""

    def __init__(
        self,
        pipeline: Pipeline,
        topic: str,
        partition: int,
        *,
        epoch: int,
        executor: StreamExecutor | None,
        refill: Callable[[Assignment], None],
        resolved: Callable[[int], None],
        failed: Callable[[BaseException], None],
        wanted: Callable[[Assignment], None],
        freed: Callable[[], None],
        lanes: tuple[Lane, Lane | None] | None = None,
        poisoned: Callable[[Assignment], None] = lambda _: None,
        poison_limit: str | None = None,
        note: Note | None = None,
    ) -> None:
        self.topic = topic
        self.partition = partition
        self.epoch = epoch
        self.open = False
        """True from :meth:`begin` until the drain: records are wanted."""
        self.begun = False
        """True from :meth:`begin` on: the watermark means something."""
        self.fetching = False
        """True while the poller fetches for this partition; written by the poller."""
        self.committed: int | None = None
        """Last offset committed, or found committed; written by the poller."""
        self.committed_map = ""
        """Metadata of that commit: its offset map; written by the poller."""
        self.committed_at: float | None = None
        """When the last commit of this assignment succeeded, seconds since the epoch; written by the poller."""
        self.high_watermark: int | None = None
        """The broker's end of the log as last told: :meth:`log_ends_at`."""
        self.out_of_range = False
        """True where the start offset is gone; written by the poller."""
        self.poison_limit = poison_limit
        """The limit of poison records that was reached, in words; None while none is."""
        self.cursor = 0
        """The next offset expected from the poller."""
        self.waiting_since: float | None = None
        """Monotonic time since when there is no window, None while there is one."""
        self._pipeline = pipeline
        self._refill = refill
        self._on_resolved = resolved
        self._wanted = wanted
        self._freed = freed
        self._poisoned = poisoned
        self._gauge, self._note = pipeline.poison.gauge(), note
        self._encoder = ResponseEncoder(topic, partition, prefix=pipeline.response_prefix)
        self._headers = ResponseHeaders(topic, partition, pipeline.copy_headers, compacted=pipeline.compacted)
        self._lane, dead_letters = lanes or pipeline.lanes(partition)
        self._dead_letters = None if dead_letters is None else _DeadLetterLane(self, pipeline, dead_letters)
        self._counts = pipeline.counts.partition(topic, partition)
        self._tracker = OffsetTracker(0)
        self._buffer: deque[_Entry] = deque()
        self._chunk: deque[_Entry] = deque()
        """Taken from the buffer and tracked, not yet decoded."""
        self._asking: asyncio.Timeout | None = None
        """There while the registry is being asked for a schema; ends that where the assignment ends."""
        self._entries: dict[int, _Entry] = {}
        self._lettered: set[int] = set()
        """Offsets of operations whose dead letter is not acknowledged."""
        self._buffered_bytes = self._skipped = self._unacknowledged = 0
        self._ahead: set[int] = set()
        """Resolved for a transaction that is not committed yet."""
        self._executor = executor
        self._ending = self._giving_up = self._lost = self._too_distant = False
        self._assigned_at = self._idle_since = time.monotonic()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        if executor is not None:
            pipeline.counts.reserved(0.0)
        elif poison_limit is None:
            self._starve()
        self._task = asyncio.create_task(self._run(), name=f"assignment {topic}/{partition} epoch {epoch}")
        self._task.add_done_callback(lambda task: _report(task, failed, note))

    # ------------------------------------------------------------------------------------------ records come in

    def begin(self, start: int, finished: Iterable[Run] = (), source: str | None = None) -> None:
        """Open the gate: reading starts at *start*. Fetching begins as soon as there is a window.

        Records of *finished*, runs from *start* on, are not run again. *source* names this very log, for ever: writes
        say which of its offsets they come from, so that none undoes a later one (contract 5). None: they say nothing.
        """
        self._source = source
        self._tracker = OffsetTracker(start, finished)
        self.cursor = start
        self._idle_since = time.monotonic()
        self.begun = True
        self.open = self.poison_limit is None
        self._refill(self)

    def jump(self, position: int) -> bool:
        """Go on at *position*, because what lay between is gone; unfinished work below it is finished as usual.

        Returns:
            False, and nothing is changed, where that is backwards and something is unfinished: the log is another one
            then, where the same offset means another record, so that the old ones have to be over first.
        """
        backwards = position < self.cursor
        busy = bool(self._buffer or self._tracker.unfinished)
        if backwards and busy:
            return False
        if backwards:  # what was finished in the old log says nothing of the new one, nor do its offsets
            self._tracker = OffsetTracker(position)
            self._source = None
        elif not busy:
            self._tracker.advance(position)
        self.cursor = position
        self._see_whether_it_starves()
        return True

    def log_ends_at(self, offset: int) -> None:
        """The broker has told its end of the log."""
        self.high_watermark = offset
        self._see_whether_it_starves()

    def receive(self, records: Sequence[Record]) -> None:
        """Take fetched records, in offset order; those below :attr:`cursor` were taken before and are ignored."""
        if not self.open:
            return
        cursor = self.cursor
        if records[0].offset < cursor:
            records = [record for record in records if record.offset >= cursor]
            if not records:
                return
        entries = [_Entry(record) for record in records]
        size = sum([entry.size for entry in entries])
        self._pipeline.budget.charge(size)
        self._buffered_bytes += size
        self._buffer.extend(entries)
        self.cursor = records[-1].offset + 1
        self._wake.set()

    def advance(self, position: int) -> None:
        """The client's position has moved to *position* over offsets that hold no record."""
        if self.open and not self._buffer and not self._tracker.unfinished:
            self.cursor = max(self.cursor, position)
            self._tracker.advance(position)

    @property
    def wants_records(self) -> bool:
        """True where fetching, once stopped, should go on."""
        return (
            self.open
            and self._executor is not None
            and not self._giving_up
            and (len(self._buffer) <= BUFFER_RECORDS_RESUME)
        )

    @property
    def full(self) -> bool:
        """True where fetching should stop."""
        return len(self._buffer) >= BUFFER_RECORDS_MAX

    @property
    def buffered_bytes(self) -> int:
        """Bytes charged for the records that wait in the buffer."""
        return self._buffered_bytes

    @property
    def watermark(self) -> int:
        """The offset that may be committed: everything below it is finished."""
        return self._tracker.watermark

    @property
    def offset_map(self) -> str:
        """What is finished above the watermark, as metadata of a commit; empty where nothing is.

        With the ordering ``key``, nothing above an operation that waits for its dead letter alone: later ones on its
        object may be finished, and a replay of the first alone would undo them.
        """
        runs = self._tracker.finished_runs()
        if self._lettered and self._pipeline.ordering == "key":
            lowest = min(self._lettered)
            runs = [(first, min(last, lowest - 1)) for first, last in runs if first < lowest]
        return self._encoded(runs)

    def _encoded(self, runs: Iterable[Run]) -> str:
        return encode(self._tracker.watermark, runs, self._pipeline.cluster_id)

    @property
    def idle(self) -> bool:
        """True where nothing was in flight or buffered for :data:`IDLE_SECONDS`."""
        if self._buffer or self._chunk or self._entries or self._executor is None:
            return False
        return time.monotonic() - self._idle_since >= IDLE_SECONDS

    def give_up_window(self) -> None:
        """Return the window as soon as nothing runs in it; the partition then waits for permits like others."""
        self._giving_up = True
        self._wake.set()

    # ------------------------------------------------------------------------------------------ the flow

    async def _run(self) -> None:
        """One execution after another, each under its own reservation; usually a single one."""
        bind_task(topic=self.topic, partition=self.partition, epoch=self.epoch)
        # Weak, as what comes from this task may outlive the assignment: clean-up, the connections of a client.
        record_at_work.set(partial(_labels_at_work, ref(self)))
        patience = RESERVE_BACKOFF_SECONDS
        while not self._ending and self.poison_limit is None:
            executor = self._executor or await self._reserve(patience)
            if executor is None:
                break
            await executor.serve(partial(next, self._items(), None), self._wait, self._answer)
            self._executor = None
            if self.poison_limit is not None:
                self._freed()  # type: ignore[unreachable]  # it changes while this task is suspended
            elif self._giving_up and not self._ending:
                self._giving_up = False
                self.waiting_since = time.monotonic()
                self._see_whether_it_starves()
                log.info("idle window passed on", topic=self.topic, partition=self.partition, epoch=self.epoch)
                patience = RESERVE_BACKOFF_SECONDS_MAX  # not the first to take it again
                self._freed()
        if self._executor is not None:
            await self._executor.aclose()
            self._executor = None

    def _starve(self) -> None:
        """No window: count it, say it, and ask whether somebody has one to spare."""
        self.waiting_since = time.monotonic()
        self._see_whether_it_starves()
        self._pipeline.counts.reservations["at_capacity"] += 1
        log.warning("no permits for this partition", topic=self.topic, partition=self.partition, epoch=self.epoch)
        self._wanted(self)

    def _see_whether_it_starves(self) -> None:
        """Begin to count, or cease, where a window, the log's end or the watermark has changed."""
        if self.waiting_since is None or self.lag == 0:
            self.starving_since = None
        elif self.starving_since is None:
            self.starving_since = time.monotonic()

    def try_now(self) -> None:
        """Permits have come back: where this assignment waits for some, it tries at once."""
        if self.waiting_since is not None:
            self._wake.set()

    async def _reserve(self, longest: float) -> StreamExecutor | None:
        """Wait for permits with jitter and backoff, *longest* at first; None where the assignment ends before."""
        while not self._ending:
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0, longest)):  # noqa: S311 - jitter, not a secret
                    await self._wake.wait()
            if self._ending:
                break  # type: ignore[unreachable]  # it changes while this task is suspended
            longest = min(longest * 2, RESERVE_BACKOFF_SECONDS_MAX)
            try:
                self._executor = self._pipeline.service.stream(
                    fraction=self._pipeline.fraction, ordering=self._pipeline.ordering
                )
            except AtCapacity:
                self._pipeline.counts.reservations["at_capacity"] += 1
                self._wanted(self)
                continue
            waited = time.monotonic() - (self.waiting_since or self._assigned_at)
            self._pipeline.counts.reserved(waited)
            self.waiting_since = self.starving_since = None
            self._idle_since = time.monotonic()
            log.info("window reserved", topic=self.topic, partition=self.partition, window=self._executor.window)
            self._refill(self)
            return self._executor
        return None

    async def _wait(self) -> bool:
        """Wait for what :meth:`_items` could not go on without; False where it has ended."""
        if self._awaited is None:
            return False
        await self._awaited()
        return True

    def _items(self) -> Iterator[Item | None]:  # noqa: C901, PLR0912, PLR0915 - the hot path: calls cost most
        """Give the executor one record after another, as an operation or as the error it became.

        None where it cannot go on: :meth:`_wait` is called then, and waits for what stands in ``_awaited``.
        """
        pipeline = self._pipeline
        decode, schema_id_of, registry = pipeline.decoder.decode, pipeline.decoder.schema_id, pipeline.registry
        budget, counts, buffer, entries = pipeline.budget, self._counts, self._buffer, self._entries
        gauge, note, read_bytes = self._gauge, self._note, pipeline.read_bytes
        derive_keys = pipeline.derive_keys
        slots, condemned = (None, frozenset()) if note is None else (note.slots, note.condemned)
        flood, makes_way_at = 0, POISON_RUN
        while not self._ending and self.poison_limit is None and not (self._giving_up and not buffer):
            chunk = self._next_chunk()
            if not self.fetching and len(buffer) <= BUFFER_RECORDS_RESUME:
                self._refill(self)
            if not chunk:
                self._wake.clear()
                self._awaited = self._wake.wait
                yield None
                continue
            source = self._source
            while chunk and not self._ending:
                entry = chunk.popleft()
                record = entry.record
                offset = record.offset
                entries[offset] = entry
                if registry is not None:
                    schema_id = schema_id_of(record.value, record.headers)
                    if schema_id is not None and not registry.knows(schema_id):
                        self._awaited = partial(self._ask, registry, schema_id)
                        yield None
                        if self._ending:
                            break  # type: ignore[unreachable]  # it changes while this generator is suspended
                position = None if source is None else Position(source, offset)
                if slots is None:
                    decoded = decode(record.value, record.headers, position)
                elif condemned and (offset, record.timestamp) in condemned:
                    decoded = self._undecoded(offset)
                else:
                    slots[TIMESTAMP] = record.timestamp
                    slots[OFFSET] = offset
                    decoded = decode(record.value, record.headers, position)
                    slots[OFFSET] = NOBODY
                entry.decoded = decoded
                if gauge is not None and (limit := gauge.add(poison=decoded.poison)) is not None:
                    self._stop_reading(offset, limit)
                operation = decoded.operation
                if operation is None:
                    assert decoded.error is not None
                    counts.poison += 1
                    pipeline.counts.poison[decoded.error.code] += 1
                    flood += 1 + entry.size // POISON_BYTES
                    if flood >= makes_way_at:
                        makes_way_at = flood + POISON_STEP
                        self._awaited = self._make_way
                        yield None
                    yield offset, decoded.error
                    continue
                flood, makes_way_at = 0, POISON_RUN
                counts.operations += 1
                if operation.kind == "get":
                    if not budget.reserve_read_nowait(read_bytes):
                        self._awaited = partial(budget.reserve_read, read_bytes)
                        yield None
                    entry.reserved = read_bytes
                elif derive_keys and operation.key is None and isinstance(operation, Insert):
                    operation = replace(operation, key=self._derived_key(record))
                yield offset, operation
        self._awaited = None

    def _undecoded(self, offset: int) -> Decoded:
        """Make a poison record of one that must not be decoded again."""
        log.error("record is poison, undecoded", topic=self.topic, partition=self.partition, offset=offset)
        return Decoded(None, DecodeError("decoding the record has ended the process twice"), poison=True)

    def _stop_reading(self, offset: int, limit: str) -> None:
        """A limit of poison records is reached: the record at *offset* is the last one worked on."""
        self.poison_limit = limit
        self.open = False
        self._drop_unstarted()
        log.error(
            "poison limit reached: nothing more of this partition is read until a restart",
            topic=self.topic,
            partition=self.partition,
            offset=offset,
            limit=limit,
        )
        self._poisoned(self)

    async def _make_way(self) -> None:
        """Let the other partitions run their share of operations, as long as they have some to run, or in flight.

        Each of several floods lets them run as much for each of the others, too. None waits for long: where the others
        are slow, they need little.
        """
        kinds, floods = self._pipeline.counts.operations.values(), self._pipeline.floods
        began = now = sum([kind.started for kind in kinds])
        since = time.monotonic()
        floods.add(self)
        try:
            while now - began < POISON_STEP * OPERATIONS_PER_POISON * len(floods) and not self._ending:
                if time.monotonic() - since >= POISON_WAIT_SECONDS_MAX * len(floods):
                    return
                await asyncio.sleep(POISON_PAUSE_SECONDS)
                now = sum([kind.started for kind in kinds])
                self._quiet = self._quiet + 1 if now == self._begun_by_all else 0
                self._begun_by_all = now
                in_flight = now - sum([kind.ended for kind in kinds])
                if self._quiet >= (POISON_PAUSES_MAX if in_flight else POISON_PAUSES_IDLE):
                    return
        finally:
            floods.discard(self)

    async def _ask(self, registry: SchemaRegistry, schema_id: str) -> None:
        """Wait until the registry has told what the schema is, or the assignment ends."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(None) as self._asking:
                    await registry.ensure(schema_id)
        finally:
            self._asking = None

    def _next_chunk(self) -> deque[_Entry]:
        """Take records from the buffer and track them; none where there are none, or the distance does not allow it."""
        buffer, chunk, tracker = self._buffer, self._chunk, self._tracker
        while buffer and not chunk:
            if not tracker.unfinished:
                tracker.advance(buffer[0].record.offset)
            ceiling = tracker.watermark + DISTANCE_MAX
            while buffer and len(chunk) < CHUNK_RECORDS and buffer[0].record.offset < ceiling:
                chunk.append(buffer.popleft())
            self._too_distant = not chunk
            if not chunk:
                break
            self._buffered_bytes -= sum([entry.size for entry in chunk])
            unfinished = tracker.track([entry.record.offset for entry in chunk])
            if len(unfinished) < len(chunk):
                self._skip_all_but(frozenset(unfinished))
        return chunk

    def _skip_all_but(self, unfinished: frozenset[int]) -> None:
        """Drop from the chunk what an earlier assignment has answered."""
        chunk = self._chunk
        skipped = [entry for entry in chunk if entry.record.offset not in unfinished]
        kept = [entry for entry in chunk if entry.record.offset in unfinished]
        chunk.clear()
        chunk.extend(kept)
        self._pipeline.budget.release(sum([entry.size for entry in skipped]))
        self._skipped += len(skipped)
        if not self._tracker.restored:
            log.info(
                "records finished before were skipped",
                topic=self.topic,
                partition=self.partition,
                epoch=self.epoch,
                skipped=self._skipped,
            )
        self._on_resolved(len(skipped))

    def _derived_key(self, record: Record) -> str:
        """Return the key that an insert without one is given by every replay of its record."""
        name = f"{self._pipeline.cluster_id}/{self.topic}/{self.partition}/{record.offset}/{record.timestamp}"
        return str(uuid5(KEY_NAMESPACE, name))

    # ------------------------------------------------------------------------------------------ the answer goes out

    def _answer(self, offset: int, outcome: Outcome) -> None:
        """Turn an outcome into its response, and into a dead letter where it is one."""
        pipeline = self._pipeline
        entry = self._entries[offset]
        decoded = entry.decoded
        assert decoded is not None
        status, value = self._encoder.encode(offset, decoded, outcome, time.time_ns() // 1000)
        if len(value) > pipeline.response_bytes_max:
            outcome = TooLarge("the response does not fit the output record", code="response_too_large")
            status, value = self._encoder.encode(offset, decoded, outcome, time.time_ns() // 1000)
        if entry.reserved:
            pipeline.budget.answer_read(entry.reserved, len(value))
            entry.reserved = len(value)
        entry.pending = 1
        self._unacknowledged += 1
        if isinstance(outcome, Exception):
            self._letter(offset, entry, outcome)
        self._respond(offset, entry, status, value)

    def _respond(self, offset: int, entry: _Entry, status: int, value: bytes) -> None:
        record, decoded = entry.record, entry.decoded
        assert decoded is not None
        entry.status = status
        key, headers = self._headers.make(offset, status, decoded.kind, record.key, record.headers)
        self._lane.append(key, value, headers, self, offset)

    def _letter(self, offset: int, entry: _Entry, error: Exception) -> None:
        """Hand in the dead letter first: both have to be acknowledged before the offset is finished."""
        decoded = entry.decoded
        assert decoded is not None
        failure = error if isinstance(error, TierstreamError) else OperationPanic.from_exception(error)
        if self._dead_letters is not None and (decoded.poison or failure.code in DEAD_LETTER_CODES):
            entry.pending = 2
            entry.code = failure.code
            if not decoded.poison:
                self._lettered.add(offset)
            self._dead_letters.append(offset, entry.record, failure, decoded.schema_id)

    def acknowledged(self, tokens: Sequence[int]) -> None:
        """Responses are written: resolve their offsets, unless a dead letter is still on its way."""
        entries, counts, budget = self._entries, self._pipeline.counts, self._pipeline.budget
        responses, latency = counts.responses, counts.response_latency
        observe = latency.observe
        now = time.time()
        example = entries[tokens[0]].record  # the first of a batch is the one that has waited longest
        finished: list[int] = []
        released = 0
        for offset in tokens:
            entry = entries[offset]
            decoded = entry.decoded
            responses[(decoded and decoded.kind) or UNKNOWN_KIND, entry.status] += 1
            timestamp = entry.record.timestamp
            if timestamp >= 0:  # -1: the record has none
                observe(now - timestamp / 1000)
            entry.pending -= 1
            if not entry.pending:
                del entries[offset]
                finished.append(offset)
                released += entry.size
                if entry.reserved:
                    budget.release_read(entry.reserved)
        if example.timestamp >= 0:
            latency.exemplify(Exemplar(self.labels_of(example), max(0.0, now - example.timestamp / 1000), now))
        self._finish(finished, released)

    def dead_letter_acknowledged(self, tokens: Sequence[int]) -> None:
        """Dead letters are written: resolve the offsets whose response is too."""
        entries, dead_letters, budget = self._entries, self._pipeline.counts.dead_letters, self._pipeline.budget
        finished: list[int] = []
        released = 0
        for offset in tokens:
            entry = entries[offset]
            dead_letters[entry.code or UNKNOWN_KIND] += 1
            self._lettered.discard(offset)
            entry.pending -= 1
            if not entry.pending:
                del entries[offset]
                finished.append(offset)
                released += entry.size
                if entry.reserved:
                    budget.release_read(entry.reserved)
        self._finish(finished, released)

    def refused(self, token: int) -> None:
        """The broker takes no record of this size: answer with a failure that says so, which is small.

        Raises:
            RuntimeError: the small answer was refused too; the output topic takes no responses at all.
        """
        entry = self._entries[token]
        decoded = entry.decoded
        assert decoded is not None
        if entry.status == _RESPONSE_TOO_LARGE.status:
            raise RuntimeError(f"the output topic refuses a failure response of {self.topic}/{self.partition}")
        status, value = self._encoder.encode(token, decoded, _RESPONSE_TOO_LARGE, time.time_ns() // 1000)
        self._respond(token, entry, status, value)

    def _finish(self, offsets: Sequence[int], released: int) -> None:
        if not offsets:
            return
        if self._ahead:
            self._tracker.resolve([offset for offset in offsets if offset not in self._ahead])
            self._ahead.difference_update(offsets)
        else:
            self._tracker.resolve(offsets)
        self._unacknowledged -= len(offsets)
        self._pipeline.budget.release(released)
        self._idle_since = time.monotonic()
        if self._too_distant:
            self._wake.set()
        if self.waiting_since is not None:  # the last answers of a window that was passed on
            self._see_whether_it_starves()
        if not self._unacknowledged:
            self._settled.set()
        self._on_resolved(len(offsets))

    # ------------------------------------------------------------------------------------------ in transactions

    def settle(self, offsets: Sequence[int]) -> tuple[int, str]:
        """Count *offsets* as finished; return the offset and map that may be committed with their responses.

        Only for exactly-once, where nothing but the transaction that carries the responses commits offsets. The map
        leaves nothing out: a dead letter is in the transaction of its response, and what comes later on the same object
        is in none before.
        """
        fresh = [offset for offset in dict.fromkeys(offsets) if offset not in self._ahead]
        self._tracker.resolve(fresh)
        self._ahead.update(fresh)
        return self.watermark, self._encoded(self._tracker.finished_runs())

    def transaction_committed(self, offset: int, metadata: str, *, map_left_out: bool) -> None:
        """The group's offset and map are these now; *map_left_out* where there was a map that is too large for it."""
        self.committed, self.committed_map, self.committed_at = offset, metadata, time.time()
        self._pipeline.counts.commits["success"] += 1
        if map_left_out:
            self._pipeline.counts.offset_maps_dropped["too_large"] += 1

    def lose(self) -> None:
        """The partition belongs to somebody else: nothing more will be acknowledged."""
        self._lost = True
        self.close_gate()
        self._settled.set()

    # ------------------------------------------------------------------------------------------ the end

    def close_gate(self) -> None:
        """Take nothing more from the buffer; what was started goes on."""
        if self._asking is not None and not self._ending:
            self._asking.reschedule(0.0)
        self.open = False
        self._ending = True
        self._wake.set()

    async def drain(self, timeout_seconds: float) -> bool:
        """Close the gate and wait until everything started is finished and acknowledged.

        Returns:
            True where it is; False where the deadline came first: then call :meth:`abandon`.

        Cancellation: the drain goes on, unwatched.
        """
        self.close_gate()
        try:
            async with asyncio.timeout(timeout_seconds):
                await asyncio.wait([self._task])
                while self._unacknowledged and not self._lost:
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            return False
        self._forget_buffer()
        return not self._lost

    async def abandon(self) -> StreamExecutor | None:
        """Let go of what still runs: it keeps its own permits only, and its outcomes go nowhere.

        Returns:
            The executor whose operations still run; None where none does.
        """
        self.close_gate()
        executor = self._executor
        self._task.cancel()
        await asyncio.wait([self._task])
        self._forget_buffer()
        if executor is None:
            return None
        await executor.aclose()
        executor.shrink_to_running()
        with suppress(TimeoutError):
            async with asyncio.timeout(0):  # also what is about to start counts, which `in_flight` does not
                await executor.wait_finished()
                return None
        return executor

    def forget_answers(self) -> None:
        """Give back what answers charge of which nothing will be heard: their lanes have ended before this did."""
        budget = self._pipeline.budget
        for entry in self._entries.values():
            budget.release(entry.size)
            if entry.reserved:
                budget.release_read(entry.reserved)
        self._entries.clear()

    def _forget_buffer(self) -> None:
        """Give back what unanswered records charge; the ones answered give it back when they are acknowledged."""
        budget = self._pipeline.budget
        self._drop_unstarted()
        released = 0
        for offset in [offset for offset, entry in self._entries.items() if not entry.pending]:
            entry = self._entries.pop(offset)
            released += entry.size
            if entry.reserved:
                budget.release_read(entry.reserved)
        budget.release(released)

    def _drop_unstarted(self) -> None:
        """Forget the records that were fetched and not begun."""
        released = sum([entry.size for part in (self._chunk, self._buffer) for entry in part])
        self._chunk.clear()
        self._buffer.clear()
        self._buffered_bytes = 0
        self._pipeline.budget.release(released)

    # ------------------------------------------------------------------------------------------ what can be seen

    def paused_for(self) -> list[str]:
        """Reasons of this partition itself for reading nothing now."""
        reasons = []
        if self.waiting_since is not None:
            reasons.append("at_capacity")
        if self._too_distant and self._buffer:
            reasons.append("offset_distance")
        if self.poison_limit is not None:
            reasons.append("poison_limit")
        if self.out_of_range:
            reasons.append("out_of_range")
        if self._asking is not None and self._pipeline.registry is not None and self._pipeline.registry.waiting:
            reasons.append("registry")
        return reasons

    @property
    def lag(self) -> int | None:
        """High watermark minus watermark; None where one of them is unknown."""
        if self.high_watermark is None or not self.begun:
            return None
        return max(0, self.high_watermark - self._tracker.watermark)

    def snapshot(self, shared_reasons: Iterable[str]) -> PartitionState:
        """Describe this partition for ``/debug/state``."""
        executor, tracker = self._executor, self._tracker
        known = self.begun
        return {
            "topic": self.topic,
            "partition": self.partition,
            "epoch": self.epoch,
            "window": executor.window if executor is not None else 0 if self.waiting_since is not None else None,
            "in_flight": executor.in_flight if executor is not None else 0,
            "buffered": len(self._buffer),
            "position": tracker.position if known else None,
            "committed": self.committed,
            "lowest_unfinished": tracker.watermark if known else None,
            "finished_above_gap": tracker.finished_above_gap if known else None,
            "high_watermark": self.high_watermark,
            "lag": self.lag,
            "paused_for": [*self.paused_for(), *shared_reasons],
            "oldest": self._oldest(),
            "last_commit_timestamp": self.committed_at,
            "offset_map_bytes": len(self.committed_map) if self.committed is not None else None,
        }

    @property
    def holds_records(self) -> bool:
        """True where fetched records wait, or are worked on, or their answers are not acknowledged."""
        return bool(self._buffer or self._chunk or self._entries)

    def labels_of(self, record: Record) -> Mapping[str, str]:
        """Name a record of this partition in an exemplar."""
        return record_labels(self.topic, self.partition, record.offset, record.headers)

    def labels_at_work(self, offset: int | None) -> Mapping[str, str] | None:
        """Name the record at *offset*, or the one whose operation the current task runs; None where there is none."""
        if offset is None and self._executor is not None:
            offset = self._executor.index_in(asyncio.current_task())
        entry = None if offset is None else self._entries.get(offset)
        return None if entry is None else self.labels_of(entry.record)

    def seen(self, shared_reasons: Iterable[str], of_older_run: OldestOperation | None) -> PartitionSeen:
        """Describe this partition for the watchdog; *of_older_run* is the oldest operation of an earlier epoch."""
        executor = self._executor
        oldest = [one for one in (of_older_run, executor.oldest() if executor is not None else None) if one is not None]
        return PartitionSeen(
            topic=self.topic,
            partition=self.partition,
            progress=(self.epoch, self.begun, self.cursor, self.watermark),
            lag=self.lag,
            reasons=[*self.paused_for(), *shared_reasons],
            oldest_seconds=max((one.age_seconds for one in oldest), default=None),
            holds_bytes=self.holds_records,
            holds_permits=executor is not None or of_older_run is not None,
        )

    def _oldest(self) -> OldestState | None:
        executor = self._executor
        oldest = executor.oldest() if executor is not None else None
        if oldest is None:
            return None
        key = oldest.key
        return {
            "offset": oldest.index,
            "kind": oldest.kind,
            "key_digest": key if key is None or self._pipeline.show_keys else key_digest(key),
            "attempts": oldest.attempts,
            "age_seconds": round(oldest.age_seconds, 3),
            "last_error": None if oldest.last_error is None else oldest.last_error.code,
            "last_error_message": None if oldest.last_error is None else str(oldest.last_error),
        }


DEAD_LETTER_HEADER = "tierstream-dlq-"
"""What the names of a dead letter's own headers begin with."""

_TRUNCATED: Header = (f"{DEAD_LETTER_HEADER}truncated", b"true")
_RESPONSE_TOO_LARGE = TooLarge("the output topic takes no record of this size", code="response_too_large")


class _DeadLetterLane:
    """The dead letters of one assignment, on their own lane."""

    def __init__(self, assignment: Assignment, pipeline: Pipeline, lane: Lane) -> None:
        self._assignment = assignment
        self._lane = lane
        self._letters = DeadLetters(
            assignment.topic,
            assignment.partition,
            pipeline.group_id,
            record_bytes_max=pipeline.dead_letter_bytes_max,
        )
        self._sent: dict[int, tuple[bytes | None, bytes | None, list[Header]]] = {}
        """Key, value and headers of what is not acknowledged."""

    def append(self, offset: int, record: Record, failure: TierstreamError, schema_id: str | None) -> None:
        """Hand in the dead letter of one record; a value that does not fit is left out."""
        value, headers = self._letters.make(
            offset,
            record.timestamp,
            record.key,
            record.value,
            record.headers,
            code=failure.code,
            message=str(failure),
            schema_id=schema_id,
        )
        self._sent[offset] = (record.key, value, headers)
        self._lane.append(record.key, value, headers, self, offset)

    def acknowledged(self, tokens: Sequence[int]) -> None:
        """Dead letters are written."""
        for token in tokens:
            del self._sent[token]
        self._assignment.dead_letter_acknowledged(tokens)

    def refused(self, token: int) -> None:
        """The broker takes no record of this size: send it again without its value, then with our headers alone.

        Raises:
            RuntimeError: that was refused too; the topic takes no dead letters at all.
        """
        key, value, headers = self._sent[token]
        if value is None:
            ours = [header for header in headers if header[0].startswith(DEAD_LETTER_HEADER)]
            if key is None and len(ours) == len(headers):
                raise RuntimeError("the dead letter topic refuses a dead letter of nothing but its own headers")
            key, headers = None, ours
        if _TRUNCATED not in headers:
            headers = [*headers, _TRUNCATED]
        self._sent[token] = (key, None, headers)
        self._lane.append(key, None, headers, self, token)


def _labels_at_work(assignment: ref[Assignment], offset: int | None) -> Mapping[str, str] | None:
    """As :meth:`Assignment.labels_at_work`, while there is the assignment."""
    found = assignment()
    return None if found is None else found.labels_at_work(offset)


def _report(task: asyncio.Task[None], failed: Callable[[BaseException], None], note: Note | None) -> None:
    if note is not None:
        note.close()
    if not task.cancelled() and (error := task.exception()) is not None:
        failed(error)
