"""Two tiers as one storage: size routing, redirect tombstones, compare-and-swap.

Objects up to the threshold live inline in the high-volume tier. Larger ones live in the long-term tier, each write
under a revision name of its own that is never used again; the high-volume row then holds a tombstone that names the
revision. The row is the truth: a revision exists for readers only while a live tombstone points to it, and one atomic
step on the row makes every change real.

**Put**

1. Read ahead, at most the threshold and the chunk that crosses it (SIZ-2). Error of the payload: raised, nothing is
   stored (SIZ-5). A large payload that lies in an object store (:class:`CopySource`) is not read ahead: its size is
   known, and the long-term tier may copy it where it is.
2. Stamp ``time_created``, ``time_expires`` and ``size``, whatever the caller's metadata says there (MD-5).

*Small* (SIZ-1: exactly the threshold is small)

3. Put unless there is a tombstone.
   * OK: done; one request, no change-log entry (TIER-3).
   * Tombstone found: a change that replaces its revision; go on.
   * Error: raised; the object is as before, or as put.
4. Record the change. Error: raised, nothing has happened.
5. Swap the tombstone for the inline object.
   * OK: done; the old revision is removed in the background (TIER-5).
   * Conflict: another writer came later; a success, as if this write had come first (TIER-6).
   * Error: raised; the object is as before, or as put. Clean-up finds out which (TIER-7, TIER-8).
   * The tombstone expired between 3 and 5: again from 3.

*Large*

3. Read which revision the row points to. Error: raised, nothing has happened.
4. Record the change: the new revision, the old one. Error: raised, nothing has happened (LOG-1).
5. Upload the new revision. Error: raised; the old object stays, clean-up removes the new revision (TIER-9).
6. Swap in a tombstone for the new revision, if the row still points where it did in 3.
   * OK: done; the old revision is removed in the background.
   * Conflict: a success, as above; the new revision is removed in the background (TIER-6).
   * Error: raised; the object is as before, or as put. Clean-up finds out which.
   * The tombstone expired between 3 and 6: once more, from no tombstone.

**Get, head**

1. Read the row.
   * Nothing: None; the long-term tier is never asked (TIER-10).
   * Inline object: that.
   * Tombstone: read the revision it points to (TIER-12).
2. Revision missing: another writer may have replaced it in between. Read the row again. Still the same revision: None
   (TIER-11).
3. Idle expiry due for an extension: extend the revision, then the row, if it is still as read. Error: ignored, the
   object has been read.

A get whose caller cannot take the payload (``fits``) does not load the revision: it refers to it, or to a copy of the
inline object (:mod:`consumer.storage.handouts`). Without handouts it is ``response_too_large``.

**Delete**

1. Delete unless there is a tombstone.
   * OK, or nothing there: done.
   * Tombstone found: record, swap for nothing, as steps 4 and 5 of a small put (TIER-4).

**Positions** (contract 5): a put or delete that comes from an ordered input says where it stood there, and every write
of a row passes that on. A row that has seen a later one of the same source stays as it is, whatever the step, and the
caller is told of a success: the later write has come, and this one would have been overwritten. A swap that finds the
row changed by an *older* one is tried again from there: losing to that would leave the older value. So neither a replay
nor a member taken for dead brings an object back in time; what a stale put has uploaded is removed like any loser's.

Cancellation, anywhere: as an error in the step it interrupts. Clean-up is handed over, never awaited (TIER-18).

Last writer wins; a read that overlaps a write may see either (TIER-15).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from consumer.errors import BackendError, BackendUnavailable, TooLarge
from consumer.ids import ObjectId
from consumer.log import get_logger
from consumer.operations import Metadata, PayloadReference, Position, StoredObject, TimeToIdle
from consumer.storage.backend import (
    Change,
    ChangeLog,
    CopySource,
    HighVolumeBackend,
    InlineObject,
    LongTermBackend,
    Payload,
    Removal,
    Revision,
    TieredWrite,
    Tombstone,
    copy_source,
    on_repeated,
)
from consumer.storage.change_log import Changes
from consumer.storage.handouts import Handouts
from consumer.storage.memory import MemoryChangeLog
from consumer.storage.metadata import expired, now_utc
from consumer.storage.revision import new_revision, uuid7

if TYPE_CHECKING:
    from consumer.metrics import Counts, Tier

log = get_logger(__name__)

THRESHOLD = 1_048_576
"""Largest inline object in bytes (SIZ-1): far below the 100 MiB a Bigtable cell may hold, and about what a row read in
one piece should weigh."""

CHASES_MAX = 8
"""Times a read follows a tombstone, or a small put meets one that expired, before storage counts as unavailable. Each
time another writer must have finished a whole change in the meantime: eight in a row is a row nobody can read."""

IDLE_SLACK_MAX = timedelta(days=1)
"""Idle expiry is extended at most once a day (BT-11), and with short lives once every tenth of it: a write per read
would cost more than the read."""

NOT_REQUESTS = frozenset({"close", "join", "owner"})
"""What is no request to a backend, and is not timed."""

Backend = TypeVar("Backend", HighVolumeBackend, LongTermBackend, ChangeLog)


class TieredStorage:
    """Stores objects by size in two tiers; safe for any number of concurrent operations and processes.

    Args:
        high_volume: Small objects and tombstones.
        long_term: Payloads of large objects.
        change_log: Durable list of unfinished changes; None keeps it in memory, and a crash leaves orphans.
        threshold: Largest inline object in bytes.
        handout_seconds: Payloads that do not fit are given by reference, and what was referred to stays readable for so
            long although it is replaced or deleted; None gives no references, and keeps nothing.
        clock: The wall clock, UTC.
        observer: Counts requests, bytes and conflicts; None costs nothing.

    Raises:
        ConfigError: references are wanted to a long-term tier that nobody else can read.

    Raises (all operations): ``BackendUnavailable`` for a passing fault, ``BackendError`` for a permanent one; the
    effect is as the module's algorithm says. Cancellation: likewise.
    """

    def __init__(
        self,
        high_volume: HighVolumeBackend,
        long_term: LongTermBackend,
        change_log: ChangeLog | None = None,
        threshold: int = THRESHOLD,
        *,
        handout_seconds: float | None = None,
        clock: Callable[[], datetime] = now_utc,
        observer: Counts | None = None,
    ) -> None:
        if change_log is None:
            change_log = MemoryChangeLog()
        if observer is not None:
            high_volume = _observed(high_volume, "high_volume", observer)
            long_term = _observed(long_term, "long_term", observer)
            change_log = _observed(change_log, "change_log", observer)
        self.threshold = threshold
        self.change_log = change_log
        self._high_volume = high_volume
        self._long_term = long_term
        self._clock = clock
        self._observer = observer
        retention = None if handout_seconds is None else timedelta(seconds=handout_seconds)
        self._handouts = None if retention is None else Handouts(long_term, retention, clock=clock)
        self.changes = Changes(
            change_log, high_volume, long_term, counts=observer, retention=retention, clock=clock
        )
        """Clean-ups and recovery."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return  # recovery starts with the first operation
        self.changes.start()

    async def put(
        self, object_id: ObjectId, metadata: Metadata, payload: Payload, position: Position | None = None
    ) -> Metadata:
        """Store an object and return its metadata as stamped; what was there before is replaced as a whole.

        Args:
            object_id: Where.
            metadata: What the caller says about it; read-only fields are ignored.
            payload: Whole, or in chunks. Chunks are read once and in order; closing their iterator is the caller's.
            position: Where it was asked for. After a later write of the same source nothing is stored; the answer is
                that of a put that was overwritten at once.

        Raises: also whatever the payload's iterator raises, unchanged; nothing has been stored then.
        """
        if not self.changes.started:
            self.changes.start()
        source: CopySource | None = None
        if not isinstance(payload, bytes):
            source = copy_source(payload)
            if source is None or source.size <= self.threshold:
                payload = await _read_ahead(payload, self.threshold)
        now = self._clock()
        expiration = metadata.expiration
        stamped = Metadata(
            metadata.content_type,
            expiration,
            metadata.compression,
            metadata.filename,
            metadata.origin,
            metadata.custom,
            now,
            None if expiration is None else now + timedelta(seconds=expiration.seconds),
            len(payload) if isinstance(payload, bytes) else None if source is None else source.size,
        )
        if isinstance(payload, bytes) and len(payload) <= self.threshold:
            found = await self._high_volume.put_non_tombstone(object_id, stamped, payload, position)
            if found is not None:
                await self._put_over_tombstone(object_id, InlineObject(stamped, payload), found, position)
            if self._observer is not None:
                self._observer.storage_bytes["high_volume", "write"] += len(payload)
            return stamped
        return await self._put_large(object_id, stamped, payload, position)

    async def get(
        self, object_id: ObjectId, *, fits: Callable[[Metadata], bool] | None = None
    ) -> StoredObject | None:
        """Read an object, whole; None where there is none.

        Args:
            object_id: Where.
            fits: Tells from the metadata whether the caller can take the payload; None takes any. One that does not fit
                is given by reference; in the long-term tier it is not even read.

        Raises:
            TooLarge: the payload does not fit, and no references are given (``response_too_large``).
        """
        if not self.changes.started:
            self.changes.start()
        chased: Revision | None = None
        for _ in range(CHASES_MAX):
            row = await self._high_volume.get_tiered(object_id)
            if row is None:
                return None
            handouts = None if fits is None or fits(row.metadata) else self._handouts_for(row)
            if not isinstance(row, Tombstone):
                if self._observer is not None:
                    self._observer.storage_bytes["high_volume", "read"] += row.metadata.size or 0
                if row.metadata.expiration is None and handouts is None:
                    return row
                payload = row.payload if handouts is None else await handouts.to_inline(object_id, row)
                return StoredObject(await self._touch(object_id, row.metadata), payload)
            if row.target == chased:
                return None
            chased = row.target
            found: bytes | PayloadReference | None
            if handouts is not None:
                found = await handouts.to_revision(chased)
            else:
                revision = await self._long_term.get(chased)
                found = None if revision is None else self._whole(row, revision)
            if found is not None:
                return StoredObject(await self._touch(object_id, row.metadata, chased), found)
        raise BackendUnavailable("the object is replaced faster than it can be read")

    async def head(self, object_id: ObjectId) -> Metadata | None:
        """Read an object's metadata; None where there is no object, or no payload to go with it."""
        if not self.changes.started:
            self.changes.start()
        chased: Revision | None = None
        for _ in range(CHASES_MAX):
            row = await self._high_volume.head_tiered(object_id)
            if row is None:
                return None
            if not isinstance(row, Tombstone):
                return await self._touch(object_id, row)
            if row.target == chased:
                return None
            chased = row.target
            if await self._long_term.head(chased) is not None:
                return await self._touch(object_id, row.metadata, chased)
        raise BackendUnavailable("the object is replaced faster than it can be read")

    async def delete(self, object_id: ObjectId, position: Position | None = None) -> None:
        """Remove an object; removing a missing one is a success, and so is one at a *position* that is past."""
        if not self.changes.started:
            self.changes.start()
        for _ in range(CHASES_MAX):
            found = await self._high_volume.delete_non_tombstone(object_id, position)
            if found is None or await self._swap(object_id, found.target, Removal(), position) is not None:
                return
        raise BackendUnavailable("the object is replaced faster than it can be deleted")

    async def recover(self) -> int:
        """Remove now what dead processes have left; return the number of change-log entries met."""
        return await self.changes.recover()

    async def join(self) -> None:
        """Wait for clean-ups and recovery, bounded (:meth:`Changes.join`), then for the backends' own work.

        Operations still work afterwards; what they leave to the background is for the next join.
        """
        await self.changes.join()
        await self._high_volume.join()
        await self._long_term.join()
        await self.change_log.join()

    async def close(self) -> None:
        """Release what the backends hold; call :meth:`join` first. No call may follow."""
        parts = (self.change_log, self._long_term, self._high_volume)
        for part in {id(part): part for part in parts}.values():
            await part.close()

    async def _put_over_tombstone(
        self, object_id: ObjectId, write: InlineObject, found: Tombstone, position: Position | None
    ) -> None:
        for _ in range(CHASES_MAX):
            won = await self._swap(object_id, found.target, write, position)
            if won is False or (won and not expired(found.metadata, self._clock)):
                return
            # The tombstone may have expired before the swap, which then found nothing to swap and left it at that; or
            # an older write has come in between.
            again = await self._high_volume.put_non_tombstone(object_id, write.metadata, write.payload, position)
            if again is None:
                return
            found = again
        raise BackendUnavailable("the object's tombstones change faster than they can be replaced")

    async def _put_large(
        self, object_id: ObjectId, stamped: Metadata, payload: Payload, position: Position | None
    ) -> Metadata:
        row = await self._high_volume.head_tiered(object_id)
        old = row.target if isinstance(row, Tombstone) else None
        new = new_revision(object_id)
        async with self.changes.record(Change(uuid7(), object_id, new, old)) as guard:
            written = await self._long_term.put(new, stamped, payload)
            if stamped.size is None:
                stamped = replace(stamped, size=written)
            elif stamped.size != written:
                raise BackendError("the long-term tier stored another number of bytes than it was given")
            guard.written()
            won = await self._compare_and_write(object_id, old, Tombstone(new, stamped), position)
            if won is False and isinstance(row, Tombstone) and expired(row.metadata, self._clock):
                won = await self._compare_and_write(object_id, None, Tombstone(new, stamped), position)
            if won is None:
                won = await self._swap_over_older(object_id, Tombstone(new, stamped), position)
            guard.settled(won)
        if self._observer is not None:
            self._observer.storage_bytes["long_term", "write"] += written
        return stamped

    async def _swap(
        self, object_id: ObjectId, old: Revision, write: TieredWrite, position: Position | None
    ) -> bool | None:
        """Replace revision *old* in the row, recorded as a change of its own; the answer is that of the swap."""
        new = write.target if isinstance(write, Tombstone) else None
        async with self.changes.record(Change(uuid7(), object_id, new, old)) as guard:
            guard.written()
            won = await self._compare_and_write(object_id, old, write, position)
            if won is None:
                guard.withdrawn()
            else:
                guard.settled(won)
        return won

    async def _swap_over_older(self, object_id: ObjectId, write: Tombstone, position: Position | None) -> bool:
        """Swap in what has been uploaded over what older writes have left there since; False where a later one won."""
        for _ in range(CHASES_MAX):
            row = await self._high_volume.head_tiered(object_id)
            if isinstance(row, Tombstone):
                won = await self._swap(object_id, row.target, write, position)
            else:
                won = await self._compare_and_write(object_id, None, write, position)
            if won is not None:
                return won
        raise BackendUnavailable("the object is replaced faster than it can be written")

    async def _compare_and_write(
        self, object_id: ObjectId, current: Revision | None, write: TieredWrite, position: Position | None
    ) -> bool | None:
        won = await self._high_volume.compare_and_write(object_id, current, write, position)
        if not won and self._observer is not None:
            self._observer.requests("high_volume", "compare_and_write").conflicts += 1
        return won

    async def _touch(self, object_id: ObjectId, seen: Metadata, revision: Revision | None = None) -> Metadata:
        """Extend an idle expiry that is due for it; return the metadata that now holds. Best effort."""
        expiration = seen.expiration
        if type(expiration) is not TimeToIdle or seen.time_expires is None:
            return seen
        now = self._clock()
        idle = timedelta(seconds=expiration.seconds)
        if seen.time_expires - now >= idle - min(idle / 10, IDLE_SLACK_MAX):
            return seen
        extended = replace(seen, time_expires=now + idle)
        try:
            if revision is not None:  # first, so that the revision outlives the row and not the other way round
                await self._long_term.extend(revision, extended)
            if await self._high_volume.extend(object_id, seen, extended):
                return extended
        except Exception as error:  # noqa: BLE001 - the object has been read, and that was asked for
            log.debug("idle expiry not extended", error=f"{type(error).__name__}: {error}")
        return seen

    def _handouts_for(self, row: StoredObject | Tombstone) -> Handouts:
        if self._handouts is None:
            raise TooLarge(f"the object has {row.metadata.size} bytes, which do not fit", code="response_too_large")
        return self._handouts

    def _whole(self, row: Tombstone, revision: StoredObject) -> bytes | PayloadReference:
        payload = revision.payload
        if isinstance(payload, bytes):
            if row.metadata.size not in {None, len(payload)}:
                raise BackendError("the long-term tier returned another number of bytes than it was given")
            if self._observer is not None:
                self._observer.storage_bytes["long_term", "read"] += len(payload)
        return payload


async def _read_ahead(payload: Payload, threshold: int) -> Payload:
    """Return the payload whole if it is small, else as chunks that begin with those already read (SIZ-2, SIZ-3)."""
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return bytes(payload)
    chunks = aiter(payload)
    head: deque[bytes] = deque()
    size = 0
    async for chunk in chunks:
        if chunk:
            head.append(chunk)
            size += len(chunk)
            if size > threshold:
                return _Rejoined(head, chunks)
    return b"".join(head)


class _Rejoined:
    """The chunks already read, then the rest. Not a generator: left unfinished, it needs no closing of its own."""

    __slots__ = ("_head", "_rest")

    def __init__(self, head: deque[bytes], rest: AsyncIterator[bytes]) -> None:
        self._head = head
        self._rest = rest

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._head:
            return self._head.popleft()
        return await anext(self._rest)


def _observed(backend: Backend, tier: Tier, counts: Counts) -> Backend:
    """Return *backend* with every request to it timed; looked up once for each method."""
    return cast("Backend", _Observed(backend, tier, counts))


class _Observed:
    def __init__(self, backend: object, tier: Tier, counts: Counts) -> None:
        self._backend = backend
        self._tier = tier
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        if name in NOT_REQUESTS:
            return method
        counts = self._counts.requests(self._tier, name)
        succeeded, failed = counts.success.observe_of_record, counts.error.observe_of_record

        @wraps(method)
        async def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                answer = await method(*given, **named)
            except BaseException:
                ended = time.perf_counter()
                failed(ended - started, ended)
                raise
            ended = time.perf_counter()
            succeeded(ended - started, ended)
            return answer

        def repeated() -> None:
            counts.retries += 1

        @wraps(method)
        async def timed_with_repeats(*given: Any, **named: Any) -> Any:
            before = on_repeated.set(repeated)
            try:
                return await timed(*given, **named)
            finally:
                on_repeated.reset(before)

        observed = timed_with_repeats if getattr(self._backend, "repeats_requests", False) else timed
        setattr(self, name, observed)
        return observed
