"""The contracts between tiered storage and its backends, and the values they exchange.

Two tiers, two contracts, declared by their user (:mod:`consumer.storage.tiered`); backends are duck-typed.

* :class:`HighVolumeBackend` keeps small objects inline and, for large ones, a redirect *tombstone* that names the
  long-term revision holding the payload. Its one atomic step is :meth:`HighVolumeBackend.compare_and_write`.
* :class:`LongTermBackend` keeps immutable revisions under names that are never used twice.
* :class:`ChangeLog` is the durable write-ahead list of changes that touch both tiers.
* :class:`ReferencedTier` is what a long-term tier has besides, if others can read its payloads without us.

A row that has expired is absent: for reads, for preconditions, for everything (checklist BT-5, BT-7).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

from consumer.operations import Metadata, PayloadReference, Position, StoredObject

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from consumer.ids import ObjectId

Payload: TypeAlias = bytes | AsyncIterable[bytes]
"""A payload to store: whole, or as chunks that are read once, in order.

Chunks that lie in an object store as a whole may say so in an attribute ``copy_source``, a :class:`CopySource` or None:
their size is known then, and a backend of the same store may copy them where they are instead of reading them.
"""


on_repeated: ContextVar[Callable[[], None] | None] = ContextVar("on_repeated", default=None)
"""What a backend calls for each attempt at a request after the first (:func:`repeated`). Set for the time of a request
by whoever counts, where the backend says that it repeats any (``repeats_requests``)."""


def repeated() -> None:
    """Count an attempt after the first one at the request that this task makes."""
    count = on_repeated.get()
    if count is not None:
        count()


@dataclass(frozen=True, slots=True)
class CopySource:
    """Where a payload lies, immutable: one generation of one object of one store."""

    store: str
    """Address of the store; a backend copies only from its own."""
    bucket: str
    name: str
    generation: int
    size: int
    crc32c: int


def copy_source(payload: Payload) -> CopySource | None:
    """Return where *payload* lies, None where it has to be read."""
    found = getattr(payload, "copy_source", None)
    return found if isinstance(found, CopySource) else None


@dataclass(frozen=True, slots=True)
class Revision:
    """The name of one immutable long-term write: storage path, ``/``, UUIDv7 (at most 937 bytes of UTF-8)."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A high-volume row that redirects to the long-term tier; never a deletion marker."""

    target: Revision
    metadata: Metadata
    """The object's metadata as stamped at the write, ``size`` included, so that a head or a size check does not need
    the long-term tier."""


@dataclass(frozen=True, slots=True)
class InlineObject:
    """A write of a small object into the high-volume tier."""

    metadata: Metadata
    payload: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Removal:
    """A write that leaves no row."""


TieredRead: TypeAlias = StoredObject | Tombstone | None
TieredHead: TypeAlias = Metadata | Tombstone | None
TieredWrite: TypeAlias = Tombstone | InlineObject | Removal


class HighVolumeBackend(Protocol):
    """Small objects and all tombstones, one row per object id, every method atomic on its row.

    **Position fence** (contract 5). Every write may say at which *position* of which source it was asked for. The row
    remembers that of its last write, also for :data:`~consumer.storage.metadata.POSITION_KEPT` after it was deleted or
    has expired, and through :meth:`extend` and :meth:`forbid`. A write of an older position of the same source changes
    nothing, and is answered as if a later writer had come right after it: puts and deletions with None, swaps with
    False. The same position again is written again: a record that is replayed finishes what it began. A write without
    position is always applied; what is remembered then is not said.

    Raises (all methods): ``BackendUnavailable`` for a passing fault, the effect unknown; ``BackendError`` for a
    permanent one. Cancellation: the step happens whole or not at all; which of the two is unknown to the caller.
    """

    async def put_non_tombstone(
        self, object_id: ObjectId, metadata: Metadata, payload: bytes, position: Position | None = None
    ) -> Tombstone | None:
        """Store the object inline and return None, or leave the row alone and return the tombstone found (HV-1)."""
        ...

    async def get_tiered(self, object_id: ObjectId) -> TieredRead:
        """Read the row: object, tombstone, or None (HV-2)."""
        ...

    async def head_tiered(self, object_id: ObjectId) -> TieredHead:
        """Read the row without loading the payload (HV-2)."""
        ...

    async def delete_non_tombstone(self, object_id: ObjectId, position: Position | None = None) -> Tombstone | None:
        """Delete the object, if any, and return None, or leave the row and return the tombstone found (HV-4)."""
        ...

    async def compare_and_write(
        self,
        object_id: ObjectId,
        current: Revision | None,
        write: TieredWrite,
        position: Position | None = None,
    ) -> bool | None:
        """Write if the row is in the state the caller saw; the atomic step that makes a change real.

        ``current = None`` holds where there is no *live tombstone*: no row, an inline object, or an expired row.
        ``current = R`` holds where the live tombstone points at ``R``. Idempotent: a row that is already as wanted
        answers True. For a tombstone "already as wanted" is a live tombstone with the same target; for an inline
        object or a removal it is *no live tombstone*, and then the row is left as it is (HV-5 … HV-9: the in-memory
        reading, so that a late retry never destroys a younger inline object).

        Returns:
            False where another writer won, or has written at a later position; that is an outcome, no error (HV-7).
            None where the row is not as *current* says because a write of an *older* position of the same source has
            come in between: this one is the later, so it has to be tried again from what is there now.

        Raises:
            BackendUnavailable: also where the tombstone's target has been forbidden: the write has not happened, and
                trying again under a new revision is right.
        """
        ...

    async def forbid(self, object_id: ObjectId, revision: Revision) -> bool:
        """Make sure that the row never comes to point at *revision*, now or by a swap still on its way.

        The fence between clean-up and a swap whose outcome nobody knows: that of a process paused past its lease, or
        of a request that timed out and may still arrive. Clean-up forbids a revision before it removes it, so there is
        no tombstone that leads nowhere. Atomic with :meth:`compare_and_write` on the row; idempotent; kept as long as
        a late swap is conceivable (a day), and through every other write of the row.

        Returns:
            False where the live tombstone points at *revision* already: nothing is forbidden, the swap has happened.
        """
        ...

    async def extend(self, object_id: ObjectId, seen: Metadata, extended: Metadata) -> bool:
        """Replace the expiry of the row (object or tombstone), only if its metadata is still *seen*.

        Used to bump time-to-idle; conditional, so that it can never bring a deleted object back.
        """
        ...

    async def join(self) -> None:
        """Wait for the backend's own background work. Reads still work afterwards."""
        ...

    async def close(self) -> None:
        """Release threads, files and connections; no call may follow."""
        ...


class LongTermBackend(Protocol):
    """Immutable payloads under revision names.

    Raises (all methods): as :class:`HighVolumeBackend`.
    """

    async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
        """Store the payload durably under a name never used before; idempotent for the same bytes.

        Returns:
            Bytes written. An error raised by the payload's own iterator passes through unchanged and leaves nothing.

        Cancellation: the revision may be there or not, but it does not appear after a later :meth:`delete` of it has
        returned.
        """
        ...

    async def get(self, revision: Revision) -> StoredObject | None:
        """Read metadata and payload, None where there is no such revision."""
        ...

    async def head(self, revision: Revision) -> Metadata | None:
        """Read the metadata only."""
        ...

    async def delete(self, revision: Revision) -> None:
        """Remove the revision; removing an absent one is a success (GCS-6)."""
        ...

    async def extend(self, revision: Revision, extended: Metadata) -> None:
        """Record a later expiry; best effort, absent revisions are ignored."""
        ...

    async def join(self) -> None:
        """Wait for the backend's own background work."""
        ...

    async def close(self) -> None:
        """Release threads, files and connections; no call may follow."""
        ...


class ReferencedTier(Protocol):
    """A long-term tier whose payloads others can read by a URI. One that has no such method gives no references.

    What :meth:`LongTermBackend.put` has stored lies there as it is: the bare payload, of the size and CRC-32C said.
    """

    async def reference(self, revision: Revision) -> PayloadReference | None:
        """Return where the revision's payload lies, size and CRC-32C filled in; None where there is no such revision.

        Raises: as :class:`HighVolumeBackend`.
        """
        ...


RECOVERABLE_MAX = 500
"""Entries claimed at a time: a transaction of milliseconds, and a few hundred KiB, however many there are."""


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the change log: what a mutation that touches both tiers may leave behind (LOG-2)."""

    change_id: UUID
    """UUIDv7, so that ids sort by time."""
    object_id: ObjectId
    new: Revision | None
    """The revision this change uploads, if any."""
    old: Revision | None
    """The revision this change replaces, if any."""
    not_before: datetime | None = None
    """The earliest time of its clean-up, by the wall clock. Set once the change is settled: nobody works on it any
    more, and the revisions it still names are kept for readers that were referred to them, or looked at again when no
    swap can arrive any more."""


class ChangeLog(Protocol):
    """Durable list of unfinished changes of one *owner* (LOG-1 … LOG-4, LOG-14).

    Raises (all methods): as :class:`HighVolumeBackend`.
    """

    owner: str

    async def record(self, change: Change) -> None:
        """Make the entry durable; returns only then.

        Recording it again changes nothing, unless it is postponed: that replaces what the entry says, and nobody has
        claimed it then.
        """
        ...

    async def remove(self, change_id: UUID) -> None:
        """Drop an entry; dropping an absent one is a success (LOG-3)."""
        ...

    async def recoverable(self, after: UUID | None = None) -> Sequence[Change]:
        """Claim and return entries that need recovery, in the order of their ids; at most :data:`RECOVERABLE_MAX`.

        * Those of dead owners, and those of this owner that were recorded *before this instance was made*; none that
          has a ``not_before``.
        * Every entry whose ``not_before`` has come, whoever's it is, this instance's too; none before that (LOG-4).

        A claimed entry is returned again, to its claimer alone while that lives, until it is removed or recorded again.

        Args:
            after: Only entries with a greater id, the last one returned before: so a recovery comes to the end of any
                number of them, whatever becomes of each. None begins anew.

        Returns:
            None at all where there are no more.
        """
        ...

    async def count(self) -> int:
        """Entries of this owner now in the log, without those whose ``not_before`` is yet to come: they are no work."""
        ...

    async def join(self) -> None:
        """Wait for background work (lease heartbeat included) and stop it."""
        ...

    async def close(self) -> None:
        """Release threads, files and connections; no call may follow."""
        ...


# ---------------------------------------------------------------------------------------------------------- scans


class TombstoneScan(Protocol):
    """A high-volume tier that can be looked through, whole, while it is in use."""

    def scan_tombstones(self) -> AsyncGenerator[tuple[ObjectId, Revision], None]:
        """Yield every live tombstone's object and target, unordered. What changes meanwhile may be seen or not."""
        ...


class RevisionScan(Protocol):
    """A long-term tier that can be looked through, whole, while it is in use."""

    def scan_revisions(self) -> AsyncGenerator[Revision, None]:
        """Yield every revision that has not expired, unordered; what is written or removed meanwhile, perhaps."""
        ...


class ChangeScan(Protocol):
    """A change log that can be looked through, whole, while it is in use."""

    def scan_changes(self) -> AsyncGenerator[tuple[str, Change], None]:
        """Yield every entry with its owner, whoever that is, claiming none. Unreadable entries are left out.

        An entry there from before the scan until after it is among them.
        """
        ...
