"""Both tiers and the change log in the memory of one process: for tests, measurements, and data nobody will miss.

A *verified* fake: it passes the contract suites of the real backends, so what is built over it holds over them. Rows
and revisions lie in two dictionaries of their own, so one instance may serve as both tiers. A method waits before it
begins, where it was told to (``latency``), and then does not suspend; each one is therefore atomic on the event loop.
Everything kept is immutable, so nothing is copied on the way in or out.

What has expired is absent at once; its memory comes back when the name is met again, and at the latest in a sweep
after as many expiring writes as there are entries, which makes the sweep a constant cost per write.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, overload

from consumer.errors import BackendUnavailable
from consumer.ids import ObjectId
from consumer.operations import Metadata, Position, StoredObject
from consumer.storage.backend import (
    RECOVERABLE_MAX,
    Change,
    InlineObject,
    Payload,
    Revision,
    TieredHead,
    TieredRead,
    TieredWrite,
    Tombstone,
)
from consumer.storage.host import default_owner
from consumer.storage.metadata import FORBIDDEN_FOR, POSITION_KEPT, expired, now_utc

if TYPE_CHECKING:
    from uuid import UUID

SWEEP_WRITES_MIN = 1024
"""Fewest expiring writes between two sweeps; below it even a full sweep takes well under a millisecond."""


class MemoryBackend:
    """High-volume and long-term tier in memory.

    What each method guarantees stands at :class:`~consumer.storage.backend.HighVolumeBackend` and
    :class:`~consumer.storage.backend.LongTermBackend`.

    Args:
        clock: Tells the time by which rows expire.
        latency: Seconds that each read and write of an object takes, to measure with; 0 = it does not even suspend.
    """

    def __init__(self, *, clock: Callable[[], datetime] = now_utc, latency: float = 0.0) -> None:
        self._clock = clock
        self._latency = latency
        self._rows: dict[str, StoredObject | Tombstone] = {}
        self._revisions: dict[str, StoredObject] = {}
        self._forbidden: dict[str, datetime] = {}
        self._positions: dict[str, Position] = {}
        """Of the last write of each path, also of some whose rows are gone."""
        self._gone: dict[str, datetime] = {}
        """Until when the positions of rows that are gone are remembered, in that order."""
        self._expiring_writes = 0
        self._paused: deque[tuple[float, asyncio.Future[None]]] = deque()
        """When requests that wait may go on, by the event loop's clock, in that order."""

    # ------------------------------------------------------------------------------------------- high-volume tier

    async def put_non_tombstone(
        self, object_id: ObjectId, metadata: Metadata, payload: bytes, position: Position | None = None
    ) -> Tombstone | None:
        """Store the object inline, with its size filled in (HV-10), or return the live tombstone found (HV-1)."""
        if self._latency:
            await self._pause()
        path = object_id.storage_path
        if position is not None and self._is_stale(path, position):
            return None
        row = self._rows.get(path)
        if isinstance(row, Tombstone) and not expired(row.metadata, self._clock):
            return row
        if metadata.size != len(payload):
            metadata = replace(metadata, size=len(payload))
        self._keep(path, StoredObject(metadata, bytes(payload)))
        self._remember(path, position)
        return None

    async def get_tiered(self, object_id: ObjectId) -> TieredRead:
        """Read the row (HV-2)."""
        if self._latency:
            await self._pause()
        return self._live_row(object_id.storage_path)

    async def head_tiered(self, object_id: ObjectId) -> TieredHead:
        """Read the row without its payload (HV-2)."""
        if self._latency:
            await self._pause()
        row = self._live_row(object_id.storage_path)
        return row.metadata if isinstance(row, StoredObject) else row

    async def delete_non_tombstone(self, object_id: ObjectId, position: Position | None = None) -> Tombstone | None:
        """Delete the object, if any, or return the live tombstone found (HV-4)."""
        if self._latency:
            await self._pause()
        path = object_id.storage_path
        if position is not None and self._is_stale(path, position):
            return None
        row = self._live_row(path)
        if isinstance(row, Tombstone):
            return row
        self._remember(path, position)
        self._drop(path)
        return None

    async def compare_and_write(
        self,
        object_id: ObjectId,
        current: Revision | None,
        write: TieredWrite,
        position: Position | None = None,
    ) -> bool | None:
        """Write if the live tombstone is *current* (None: there is none), HV-5 … HV-9."""
        if self._latency:
            await self._pause()
        path = object_id.storage_path
        row = self._live_row(path)
        found = row.target if isinstance(row, Tombstone) else None
        wanted = write.target if isinstance(write, Tombstone) else None
        if found is not None and found == wanted != current:
            return True
        known = None if position is None else self._known(path, position)
        if position is not None and known is not None and known != position.offset and (
            known > position.offset or found != current
        ):
            return False if known > position.offset else None
        if found != current:
            return found == wanted
        match write:
            case Tombstone():
                if write.target.name in self._forbidden:
                    raise BackendUnavailable("the revision was given up by a clean-up; write it again as a new one")
                self._keep(path, write)
                self._remember(path, position)
            case InlineObject(metadata, payload):
                self._keep(path, StoredObject(metadata, bytes(payload)))
                self._remember(path, position)
            case _:
                self._remember(path, position)
                self._drop(path)
        return True

    async def forbid(self, object_id: ObjectId, revision: Revision) -> bool:
        """Refuse *revision* as a tombstone's target from now on; False where the row already points at it."""
        row = self._live_row(object_id.storage_path)
        if isinstance(row, Tombstone) and row.target == revision:
            return False
        now = self._clock()
        while self._forbidden and next(iter(self._forbidden.values())) <= now:
            del self._forbidden[next(iter(self._forbidden))]
        self._forbidden.pop(revision.name, None)  # so that the dictionary stays in the order of its deadlines
        self._forbidden[revision.name] = now + FORBIDDEN_FOR
        return True

    async def scan_tombstones(self) -> AsyncGenerator[tuple[ObjectId, Revision], None]:
        """Yield every live tombstone's object and target."""
        for path, row in list(self._rows.items()):
            if isinstance(row, Tombstone) and not expired(row.metadata, self._clock):
                yield ObjectId.parse(path), row.target

    # -------------------------------------------------------------------------------------------- long-term tier

    async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
        """Store the payload under a name of its own; a failing iterator leaves nothing."""
        if self._latency:
            await self._pause()
        if isinstance(payload, AsyncIterable):
            payload = b"".join([chunk async for chunk in payload])
        if metadata.size != len(payload):
            metadata = replace(metadata, size=len(payload))
        self._revisions[revision.name] = StoredObject(metadata, bytes(payload))
        if metadata.time_expires is not None:
            self._count_expiring()
        return len(payload)

    async def get(self, revision: Revision) -> StoredObject | None:
        """Read metadata and payload."""
        if self._latency:
            await self._pause()
        return self._live_revision(revision.name)

    async def head(self, revision: Revision) -> Metadata | None:
        """Read the metadata only."""
        if self._latency:
            await self._pause()
        found = self._live_revision(revision.name)
        return None if found is None else found.metadata

    async def delete(self, revision: Revision) -> None:
        """Remove the revision; removing an absent one is a success (GCS-6)."""
        if self._latency:
            await self._pause()
        self._revisions.pop(revision.name, None)

    async def scan_revisions(self) -> AsyncGenerator[Revision, None]:
        """Yield every revision that has not expired."""
        for name, found in list(self._revisions.items()):
            if not expired(found.metadata, self._clock):
                yield Revision(name)

    # ------------------------------------------------------------------------------------------------ either tier

    @overload
    async def extend(self, object_id: ObjectId, seen: Metadata, extended: Metadata) -> bool: ...

    @overload
    async def extend(self, revision: Revision, extended: Metadata) -> None: ...

    async def extend(self, *given: Any, **named: Any) -> bool | None:
        """Record a later expiry: of a row, only if its metadata is still *seen*; of a revision, if it is there."""
        if len(given) + len(named) == 3:
            return self._extend_row(*given, **named)
        self._extend_revision(*given, **named)
        return None

    async def join(self) -> None:
        """Return at once: nothing runs in the background (HV-11)."""

    async def close(self) -> None:
        """Return at once: nothing is held that needs releasing."""

    # ------------------------------------------------------------------------------------------------- the inside

    def _pause(self) -> asyncio.Future[None]:
        """Return what is done when the latency has passed.

        One timer for all that wait: as the answers of a real backend come many at a time, over one connection, a timer
        for each would be the measurement's own cost.
        """
        loop = asyncio.get_running_loop()
        paused = loop.create_future()
        self._paused.append((loop.time() + self._latency, paused))
        if len(self._paused) == 1:
            loop.call_later(self._latency, self._go_on, loop)
        return paused

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        while self._paused and self._paused[0][0] <= now:
            _, paused = self._paused.popleft()
            if not paused.done():
                paused.set_result(None)
        if self._paused:
            loop.call_at(self._paused[0][0], self._go_on, loop)

    def _live_row(self, path: str) -> TieredRead:
        row = self._rows.get(path)
        if row is not None and expired(row.metadata, self._clock):
            self._drop(path)
            return None
        return row

    def _known(self, path: str, position: Position) -> int | None:
        """Return the offset of the last write, if it is remembered and of the same source."""
        known = self._positions.get(path)
        if known is None or known.source != position.source:
            return None
        self._live_row(path)  # one that has expired is gone from now on
        return known.offset if path not in self._gone or self._gone[path] > self._clock() else None

    def _is_stale(self, path: str, position: Position) -> bool:
        """Tell whether a later write of the same source is remembered."""
        known = self._known(path, position)
        return known is not None and known > position.offset

    def _remember(self, path: str, position: Position | None) -> None:
        self._gone.pop(path, None)
        if position is None:
            self._positions.pop(path, None)
        else:
            self._positions[path] = position

    def _drop(self, path: str) -> None:
        """Remove a row; its position is remembered for a while, and what has been for long enough is forgotten."""
        self._rows.pop(path, None)
        now = self._clock()
        while self._gone and next(iter(self._gone.values())) <= now:
            forgotten = next(iter(self._gone))
            del self._gone[forgotten], self._positions[forgotten]
        if path in self._positions and path not in self._gone:
            self._gone[path] = now + POSITION_KEPT

    def _live_revision(self, name: str) -> StoredObject | None:
        found = self._revisions.get(name)
        if found is not None and expired(found.metadata, self._clock):
            del self._revisions[name]
            return None
        return found

    def _keep(self, path: str, row: StoredObject | Tombstone) -> None:
        self._rows[path] = row
        if row.metadata.time_expires is not None:
            self._count_expiring()

    def _extend_row(self, object_id: ObjectId, seen: Metadata, extended: Metadata) -> bool:
        row = self._live_row(object_id.storage_path)
        if row is None or row.metadata != seen:
            return False
        self._keep(object_id.storage_path, replace(row, metadata=extended))
        return True

    def _extend_revision(self, revision: Revision, extended: Metadata) -> None:
        found = self._live_revision(revision.name)
        if found is not None:
            self._revisions[revision.name] = replace(found, metadata=extended)

    def _count_expiring(self) -> None:
        self._expiring_writes += 1
        if self._expiring_writes < max(SWEEP_WRITES_MIN, len(self._rows) + len(self._revisions)):
            return
        self._expiring_writes = 0
        for path in [path for path, row in self._rows.items() if expired(row.metadata, self._clock)]:
            self._drop(path)
        for name in [name for name, found in self._revisions.items() if expired(found.metadata, self._clock)]:
            del self._revisions[name]


class MemoryChangeLog:
    """A change log that dies with its process; what it held cannot be recovered, by design.

    Args:
        owner: Name of the owner; by default one that no other process has.
        clock: Tells the time from which postponed entries are due.
    """

    def __init__(self, owner: str | None = None, *, clock: Callable[[], datetime] = now_utc) -> None:
        self.owner = owner or default_owner()
        self._clock = clock
        self._changes: dict[UUID, Change] = {}

    async def record(self, change: Change) -> None:
        """Keep the entry; of one that is there already, what it says when it is postponed."""
        if change.not_before is not None or change.change_id not in self._changes:
            self._changes[change.change_id] = change

    async def remove(self, change_id: UUID) -> None:
        """Drop an entry; dropping an absent one is a success (LOG-3)."""
        self._changes.pop(change_id, None)

    async def recoverable(self, after: UUID | None = None) -> Sequence[Change]:
        """Return what was postponed and is due; every other entry is being worked on, by this very process."""
        found = [
            change_id
            for change_id, change in self._changes.items()
            if self._is_recoverable(change) and (after is None or change_id > after)
        ]
        return [self._changes[change_id] for change_id in sorted(found)[:RECOVERABLE_MAX]]

    async def count(self) -> int:
        """Entries now in the log, without those that wait for their time."""
        return sum(self._is_due(change) for change in self._changes.values())

    async def scan_changes(self) -> AsyncGenerator[tuple[str, Change], None]:
        """Yield every entry with its owner."""
        for change in list(self._changes.values()):
            yield self.owner, change

    async def join(self) -> None:
        """Return at once: nothing runs in the background."""

    async def close(self) -> None:
        """Return at once: nothing is held that needs releasing."""

    def _is_recoverable(self, change: Change) -> bool:
        return change.not_before is not None and self._is_due(change)

    def _is_due(self, change: Change) -> bool:
        return change.not_before is None or change.not_before <= self._clock()
