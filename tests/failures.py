"""Storage doubles named after their failure: one override each, over the in-memory backend.

Two kinds of every failure that matters: the effect does not happen, and the effect happens but its answer is lost. The
second is the one that corrupts. A double fails for ever, unless ``times`` says how often, until it is repaired.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from uuid import UUID

import google_crc32c

from consumer.errors import BackendUnavailable
from consumer.ids import ObjectId
from consumer.operations import Metadata, PayloadReference, Position, StoredObject
from consumer.storage.backend import Change, Payload, Revision, TieredHead, TieredRead, TieredWrite, Tombstone
from consumer.storage.handouts import is_copy
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.metadata import now_utc


class Away(BackendUnavailable):
    """A passing fault, told from all others by its class."""


class Failing:
    """Fails the next *times* calls of whatever a double overrides; None fails them all."""

    def __init__(self, times: int | None = None) -> None:
        super().__init__()
        self.times = times
        self.failures = 0

    @property
    def broken(self) -> bool:
        """Whether the next call fails."""
        return self.times is None or self.failures < self.times

    def repair(self) -> None:
        """Let all further calls succeed."""
        self.times = self.failures

    def fail(self) -> None:
        """Fail, unless it has been often enough."""
        if self.broken:
            self.failures += 1
            raise Away("away")


class Paused:
    """Stops one step until it is let go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    async def pause(self) -> None:
        """Say that the step is reached, then wait."""
        self.reached.set()
        await self.go_on.wait()


# ------------------------------------------------------------------------------------------------- high-volume tier


class FailingRead(Failing, MemoryBackend):
    """The row cannot be read."""

    async def get_tiered(self, object_id: ObjectId) -> TieredRead:
        self.fail()
        return await super().get_tiered(object_id)

    async def head_tiered(self, object_id: ObjectId) -> TieredHead:
        self.fail()
        return await super().head_tiered(object_id)


class FailingSwap(Failing, MemoryBackend):
    """The swap does not happen."""

    async def compare_and_write(
        self, object_id: ObjectId, current: Revision | None, write: TieredWrite, position: Position | None = None
    ) -> bool | None:
        self.fail()
        return await super().compare_and_write(object_id, current, write, position)


class LostSwapAnswer(Failing, MemoryBackend):
    """The swap happens and its answer is lost."""

    async def compare_and_write(
        self, object_id: ObjectId, current: Revision | None, write: TieredWrite, position: Position | None = None
    ) -> bool | None:
        won = await super().compare_and_write(object_id, current, write, position)
        self.fail()
        return won


class LateSwap(MemoryBackend):
    """The caller is told that the swap failed while its request is still on its way; :meth:`arrive` lets it arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.on_their_way: list[tuple[ObjectId, Revision | None, TieredWrite, Position | None]] = []

    async def compare_and_write(
        self, object_id: ObjectId, current: Revision | None, write: TieredWrite, position: Position | None = None
    ) -> bool | None:
        self.on_their_way.append((object_id, current, write, position))
        raise Away("timed out")

    async def arrive(self) -> bool | None:
        """Carry out the oldest swap that is on its way."""
        return await super().compare_and_write(*self.on_their_way.pop(0))


class SwapConflict(MemoryBackend):
    """Another writer comes first: *rival* runs between the reading of the row and the first swap."""

    def __init__(self) -> None:
        super().__init__()
        self.rival: Callable[[], Awaitable[object]] | None = None

    async def compare_and_write(
        self, object_id: ObjectId, current: Revision | None, write: TieredWrite, position: Position | None = None
    ) -> bool | None:
        rival, self.rival = self.rival, None
        if rival is not None:
            await rival()
        return await super().compare_and_write(object_id, current, write, position)


class PauseBeforeSwap(Paused, MemoryBackend):
    """The process stalls with its swap about to be sent."""

    async def compare_and_write(
        self, object_id: ObjectId, current: Revision | None, write: TieredWrite, position: Position | None = None
    ) -> bool | None:
        await self.pause()
        return await super().compare_and_write(object_id, current, write, position)


class PauseAfterSwap(Paused, MemoryBackend):
    """The swap has happened and its answer takes its time."""

    async def compare_and_write(
        self, object_id: ObjectId, current: Revision | None, write: TieredWrite, position: Position | None = None
    ) -> bool | None:
        won = await super().compare_and_write(object_id, current, write, position)
        await self.pause()
        return won


class FailingExtension(Failing, MemoryBackend):
    """An expiry cannot be extended, in either tier."""

    async def extend(self, *given: object, **named: object) -> bool:  # type: ignore[override]  # both forms fail
        self.fail()
        raise AssertionError("not meant to succeed")


class ReplacedWhileRead(MemoryBackend):
    """Between the read of a row and that of its revision, *rival* replaces the object."""

    rival: Callable[[], Awaitable[object]] | None = None

    async def get_tiered(self, object_id: ObjectId) -> TieredRead:
        seen = await super().get_tiered(object_id)
        if self.rival is not None:
            await self.rival()
        return seen

    async def head_tiered(self, object_id: ObjectId) -> TieredHead:
        seen = await super().head_tiered(object_id)
        if self.rival is not None:
            await self.rival()
        return seen


# --------------------------------------------------------------------------------------------------- long-term tier


class FailingUpload(Failing, MemoryBackend):
    """Nothing is uploaded."""

    async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
        self.fail()
        return await super().put(revision, metadata, payload)


class LostUploadAnswer(Failing, MemoryBackend):
    """All is uploaded and the answer is lost."""

    async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
        written = await super().put(revision, metadata, payload)
        self.fail()
        return written


class TornUpload(MemoryBackend):
    """Half of a payload is stored, and a success reported."""

    async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
        assert isinstance(payload, bytes)
        return await super().put(revision, metadata, payload[: len(payload) // 2])


class PauseAfterUpload(Paused, MemoryBackend):
    """The process stalls with its revision uploaded."""

    async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
        written = await super().put(revision, metadata, payload)
        await self.pause()
        return written


class FailingDeletion(Failing, MemoryBackend):
    """Revisions cannot be removed."""

    async def delete(self, revision: Revision) -> None:
        self.fail()
        await super().delete(revision)


class LostDeletionAnswer(Failing, MemoryBackend):
    """The revision is removed and the answer is lost."""

    async def delete(self, revision: Revision) -> None:
        await super().delete(revision)
        self.fail()


class HangingDeletion(MemoryBackend):
    """Removing a revision never ends."""

    async def delete(self, revision: Revision) -> None:
        await asyncio.Event().wait()


class PausedDeletion(Paused, MemoryBackend):
    """Removing revisions stalls."""

    async def delete(self, revision: Revision) -> None:
        await self.pause()
        await super().delete(revision)


class RevisionMissing(MemoryBackend):
    """Every revision has gone when it is read."""

    async def get(self, revision: Revision) -> StoredObject | None:
        return None

    async def head(self, revision: Revision) -> Metadata | None:
        return None


# ------------------------------------------------------------------------------------------------------- change log


class FailingRecord(Failing, MemoryChangeLog):
    """No entry is made."""

    async def record(self, change: Change) -> None:
        self.fail()
        await super().record(change)


class LostRecordAnswer(Failing, MemoryChangeLog):
    """The entry is made and the answer is lost."""

    async def record(self, change: Change) -> None:
        await super().record(change)
        self.fail()


class PauseAfterRecord(Paused, MemoryChangeLog):
    """The process stalls with its entry made."""

    async def record(self, change: Change) -> None:
        await super().record(change)
        await self.pause()


class FailingRemoval(Failing, MemoryChangeLog):
    """Entries cannot be removed."""

    async def remove(self, change_id: UUID) -> None:
        self.fail()
        await super().remove(change_id)


class InheritedChanges(Failing, MemoryChangeLog):
    """A log that holds what a dead process has left; claiming fails *times* times."""

    def __init__(self, changes: Iterable[Change], times: int = 0) -> None:
        super().__init__(times)
        self.inherited = {change.change_id: change for change in changes}
        self._changes.update(self.inherited)

    async def recoverable(self, after: UUID | None = None) -> Sequence[Change]:
        self.fail()
        return await super().recoverable(after)

    def _is_recoverable(self, change: Change) -> bool:
        return super()._is_recoverable(change) or (change.not_before is None and change.change_id in self.inherited)


class DurableLog(MemoryChangeLog):
    """A change log whose entries outlive the process; a new instance recovers what was there before it."""

    def __init__(self, entries: dict[UUID, Change], clock: Callable[[], datetime] = now_utc) -> None:
        super().__init__("owner", clock=clock)
        self._changes = entries
        self._earlier = set(entries)

    def _is_recoverable(self, change: Change) -> bool:
        return super()._is_recoverable(change) or (change.not_before is None and change.change_id in self._earlier)


# ------------------------------------------------------------------------------------------------ one that can more


class Referenced(MemoryBackend):
    """A long-term tier that others can read; a reference's URI is ``memory:`` and the revision's name."""

    async def reference(self, revision: Revision) -> PayloadReference | None:
        found = await self.get(revision)
        if found is None:
            return None
        assert isinstance(found.payload, bytes)
        return PayloadReference(f"memory:{revision.name}", len(found.payload), google_crc32c.value(found.payload))

    def read(self, reference: PayloadReference | bytes) -> bytes:
        """Return what lies where a reference points; fail where nothing does, or not what it says."""
        assert isinstance(reference, PayloadReference)
        payload = self._revisions[reference.uri.removeprefix("memory:")].payload
        assert isinstance(payload, bytes)
        assert (len(payload), google_crc32c.value(payload)) == (reference.size, reference.crc32c)
        return payload


# ------------------------------------------------------------------------------------------------- what must hold


def tombstones(high_volume: MemoryBackend) -> set[str]:
    """Return the names of the revisions that rows point to."""
    return {row.target.name for row in high_volume._rows.values() if isinstance(row, Tombstone)}


def revisions(long_term: MemoryBackend) -> set[str]:
    """Return the names of the revisions there are; copies made for responses are none."""
    return {name for name in long_term._revisions if not is_copy(name)}


async def assert_nothing_left_over(
    high_volume: MemoryBackend, long_term: MemoryBackend, change_log: MemoryChangeLog
) -> None:
    """Assert what holds once clean-up is done: no orphan, no tombstone to nothing, no entry (I8)."""
    assert revisions(long_term) == tombstones(high_volume)
    assert await change_log.count() == 0
