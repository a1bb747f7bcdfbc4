"""The high-volume tier in a Bigtable table, for any number of processes on any number of hosts.

**A row** per object; its key is the storage path (checklist BT-1). Three families:

========  ===============  =============================================================================
family    cells collected  columns
========  ===============  =============================================================================
``fg``    by timestamp     ``p`` payload, ``m`` metadata (JSON), ``w`` a name of the write: of an object that expires
``fm``    never            the same, of an object that does not
``fr``    by timestamp     ``r`` target, ``t`` metadata, ``w``: of a tombstone. ``f/REVISION``: of a forbidden revision.
                           ``a/SOURCE``: the position of the last write that came from there, 20 digits.
                         ``o/NAME``: the mark of a swap that found nothing
========  ===============  =============================================================================

The timestamp of a cell *is* its deadline, rounded down to milliseconds (BT-3), for a forbidden revision the end of the
ban; what does not expire has :data:`NEVER`. So one filter by timestamp sees what is live, wherever it lies, and the
table forgets the rest by itself (BT-2). Every write begins by deleting the object and the tombstone in the same
mutation (BT-4); forbidden revisions, positions and marks stay. The deadline of a position is that of what was written
there, and a deletion's time, plus :data:`~consumer.storage.metadata.POSITION_KEPT`: the marker a deletion leaves is no
more than that cell. An idle expiry that is extended does not extend it.

**Live** for a condition is what has a deadline of a later millisecond; for a read, what has not expired to the
microsecond (BT-5, BT-7). In between, less than a millisecond, a condition finds gone what a read still returns; who
has to tell the two apart waits for it to pass.

**Conditions**: each write is one ``CheckAndMutateRow``, atomic on the row. Its predicate tells whether cells are there,
and there is a write for either answer, but no "and not": so conditions that stand in the way are joined, and the write
is the one for *nothing found*.

1. Put, delete: unless there is a live target. Found: it is read and returned. Gone by then: again from 1, at most
   :data:`RACES_MAX` times (BT-9).
2. Compare and write (BT-8)

   * nothing → object, nothing: unless there is a live target.
   * nothing → target N: unless there is a live target, or N is forbidden, or this very swap has been applied before,
     which leaves a mark. Repeated, or kept by the network, it would find nothing again once the object has been
     deleted, and bring a revision back that is being removed.
   * target R → object, nothing: if R is the live target.
   * target R → target N: if R is the live target, and N is not forbidden. That "and not" is why targets and bans share
     a family: its columns are sorted, so the ban is found first where there is one.

   Likewise, and in put and delete: unless a later position of the same source is there.

   Not written: the row is read. As wanted, or marked: True, by an attempt whose answer was lost (HV-6). Another target:
   False, or ``BackendUnavailable`` where an attempt has gone without an answer: it may have won and been replaced
   since, also by a later position. N forbidden: ``BackendUnavailable``. None of them: the row has changed in between;
   again.
3. Forbid: unless the revision is the live target.
4. Extend: read the row whole; rewritten with the new deadline if the write it was read from, ``w``, is still there. A
   payload is part of the timestamped row, so it travels both ways; a row read and rewritten blindly would undo whatever
   came in between (BT-12). Metadata could serve as the condition, but for a filter they may be too long.

Whatever is repeated is harmless to repeat (:mod:`consumer.storage.bigtable_table`): an attempt applied twice leaves
what it left the first time, or finds itself.

Not here: rows of older systems (BT-10), there are none. Metadata without a size are returned without (BT-6): tiered
storage writes it always.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Self

from consumer.errors import BackendError, BackendUnavailable, TooLarge
from consumer.ids import ObjectId
from consumer.operations import Metadata, Position, StoredObject
from consumer.storage.backend import (
    InlineObject,
    Removal,
    Revision,
    TieredHead,
    TieredRead,
    TieredWrite,
    Tombstone,
)
from consumer.storage.bigtable_table import (
    BigtableTable,
    Cell,
    Cells,
    Change,
    Filter,
    RowReader,
    TableName,
    any_of,
    cell,
    columns,
    delete_column,
    delete_family,
    first_is,
    set_cell,
    without_value,
)
from consumer.storage.metadata import FORBIDDEN_FOR, POSITION_KEPT, decode_metadata, encode_metadata, micros, now_utc

COLLECTED, KEPT, REDIRECTS = "fg", "fm", "fr"
FAMILIES = {COLLECTED: True, KEPT: False, REDIRECTS: True}
"""The families, and whether their cells are collected when their timestamp has passed."""

PAYLOAD, METADATA, WRITE = b"p", b"m", b"w"
TARGET, TOMBSTONE_METADATA = b"r", b"t"
FORBIDDEN, POSITION, APPLIED = b"f/", b"a/", b"o/"
"""What the columns of forbidden revisions, positions and marks begin with; sorted before :data:`TARGET`."""

NEVER = 253_402_300_799_000_000
"""Deadline, in microseconds, of what does not expire: the last second of the year 9999, where ``datetime`` ends too."""

CELL_BYTES_MAX = 100_000_000
"""Largest value of a cell that Bigtable takes (documented as 100 MB). Emulators take more, so it is held here."""

ROW_BYTES_MAX = 256_000_000
"""Largest row that can be read (documented as 256 MB): payload, metadata and names together."""

RACES_MAX = 3
"""Times a condition may find a row that its reading then does not (BT-9): each time another writer must have come in
between twice."""

LAST_MILLISECOND = 0.001
"""Seconds between two of these times: the one other cause is a tombstone that has expired for conditions and not yet
for reads, which then passes."""

SCAN_ROWS = 1_000
"""Rows of one step of a scan, tombstones or not: some hundred kilobytes, as payloads are not read."""

SCAN_END = b"~"
"""Behind the last storage path, which begins with a usecase: the rows of a change log in the same table follow."""



class BigtableBackend:
    """The high-volume tier in a Bigtable table; what each method guarantees stands at its protocol.

    Args:
        project: Google Cloud project.
        instance: Bigtable instance.
        table: The table; :meth:`create` makes it.
        emulator_host: HOST:PORT of an emulator; implies anonymous credentials.
        app_profile: Application profile, routing to a single cluster.
        clock: Tells the time by which rows expire.
        inline_bytes_max: Largest payload taken, at most :data:`CELL_BYTES_MAX`.

    Raises (all methods): ``BackendUnavailable``, ``BackendError``; ``ConfigError`` without client or credentials.
    """

    repeats_requests = True

    def __init__(
        self,
        project: str,
        instance: str,
        table: str,
        *,
        emulator_host: str | None = None,
        app_profile: str | None = None,
        clock: Callable[[], datetime] = now_utc,
        inline_bytes_max: int = CELL_BYTES_MAX,
    ) -> None:
        self.inline_bytes_max = min(inline_bytes_max, CELL_BYTES_MAX)
        self._clock = clock
        self._table = BigtableTable(TableName(project, instance, table, emulator_host, app_profile), FAMILIES)
        self._removal = [
            delete_family(COLLECTED),
            delete_family(KEPT),
            *(delete_column(REDIRECTS, column) for column in (TARGET, TOMBSTONE_METADATA, WRITE)),
        ]
        self._whole = columns(b"[pmwrt]")
        self._head = columns(b"[mrt]")
        self._tombstone = columns(b"[rt]")
        self._objects = RowReader(self._table, columns(b"[pmrt]"))
        self._heads = RowReader(self._table, self._head)

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """Make it from its section (contract 5)."""
        name = TableName.from_settings(settings)
        return cls(
            name.project, name.instance, name.table, emulator_host=name.emulator_host, app_profile=name.app_profile
        )

    async def create(self) -> None:
        """Make the table and its families, where they are missing (BT-14)."""
        await self._table.create()

    async def open(self) -> None:
        """Make sure that table, families and permissions are there. Optional.

        Raises:
            ConfigError: the table or a family is missing.
        """
        await self._table.check()

    # ------------------------------------------------------------------------------------------------- requests

    async def put_non_tombstone(
        self, object_id: ObjectId, metadata: Metadata, payload: bytes, position: Position | None = None
    ) -> Tombstone | None:
        """Store the object inline, with its size filled in (HV-10), or return the live tombstone found (HV-1)."""
        if metadata.size != len(payload):
            metadata = replace(metadata, size=len(payload))
        return await self._write_non_tombstone(object_id, InlineObject(metadata, payload), position)

    async def get_tiered(self, object_id: ObjectId) -> TieredRead:
        """Read the row (HV-2)."""
        return self._read(await self._objects.read(_key(object_id)))

    async def head_tiered(self, object_id: ObjectId) -> TieredHead:
        """Read the row without its payload (HV-2)."""
        cells = await self._heads.read(_key(object_id))
        now = self._clock()
        return _tombstone(cells, now) or _object(cells, now)

    async def delete_non_tombstone(self, object_id: ObjectId, position: Position | None = None) -> Tombstone | None:
        """Delete the object, if any, or return the live tombstone found (HV-4)."""
        return await self._write_non_tombstone(object_id, Removal(), position)

    async def compare_and_write(
        self,
        object_id: ObjectId,
        current: Revision | None,
        write: TieredWrite,
        position: Position | None = None,
    ) -> bool | None:
        """Write if the live tombstone is *current* (None: there is none), HV-5 … HV-9."""
        key, changes = _key(object_id), self._changes(object_id, write, position)
        wanted = write.target if isinstance(write, Tombstone) else None
        mark = APPLIED + _random_name() if current is None and wanted is not None else None
        if mark is not None:
            changes = [*changes, set_cell(REDIRECTS, mark, b"", self._late_until())]
        repeated = False
        for _ in range(RACES_MAX):
            since = self._since()
            in_the_way = [] if position is None else [_later(position, since)]
            if wanted is not None:
                in_the_way.append(_ban(wanted, since))
            if mark is not None:
                in_the_way.append(cell(REDIRECTS, mark, since=since))
            target = _target(since, current)
            if current is None:
                check = await self._table.check_and_mutate(
                    key, any_of(target, *in_the_way) if in_the_way else target, unmatched=changes
                )
                if not check.matched:
                    return True
            else:
                there = first_is(TARGET, target, *in_the_way) if in_the_way else target
                check = await self._table.check_and_mutate(key, there, matched=changes)
                if check.matched:
                    return True
            repeated = repeated or check.repeated
            others = in_the_way if position is None else [*in_the_way, _position(position, since)]
            seen = await self._table.read(key, any_of(self._tombstone, *others) if others else self._tombstone)
            tombstone = _tombstone(seen, self._clock())
            points_to = None if tombstone is None else tombstone.target
            ahead = _ahead(seen, position)
            if (points_to is not None and points_to == wanted) or (mark is not None and (REDIRECTS, mark) in seen):
                return True
            if points_to != current:
                if repeated and points_to != wanted:
                    # Lost, or won by an attempt without an answer and replaced since: then what it replaced is ours to
                    # clean up, and "lost" would leave it.
                    raise BackendUnavailable("bigtable: the swap's outcome is unknown")
                return None if ahead < 0 else points_to == wanted and (repeated or ahead == 0)
            if ahead > 0:
                return False
            if wanted is not None and (REDIRECTS, _ban_column(wanted)) in seen:
                raise BackendUnavailable("the revision was given up by a clean-up; write it again as a new one")
            await asyncio.sleep(LAST_MILLISECOND)
        raise BackendUnavailable("the row is changed faster than it can be written")

    async def forbid(self, object_id: ObjectId, revision: Revision) -> bool:
        """Refuse *revision* as a tombstone's target from now on; False where the row already points at it."""
        column = _ban_column(revision)
        ban = [delete_column(REDIRECTS, column), set_cell(REDIRECTS, column, b"", self._late_until())]
        points_to_it = _target(self._since(), revision)
        return not (await self._table.check_and_mutate(_key(object_id), points_to_it, unmatched=ban)).matched

    async def extend(self, object_id: ObjectId, seen: Metadata, extended: Metadata) -> bool:
        """Replace the row's expiry, only if its metadata is still *seen*."""
        cells = await self._table.read(_key(object_id), self._whole)
        found = self._read(cells)
        if found is None or found.metadata != seen:
            return False
        write: TieredWrite
        if isinstance(found, Tombstone):
            family, write = REDIRECTS, Tombstone(found.target, extended)
        else:
            family = KEPT if (KEPT, METADATA) in cells else COLLECTED
            write = InlineObject(extended, found.payload)  # type: ignore[arg-type]  # of a row it is always bytes
        as_read = cell(family, WRITE, value=cells[family, WRITE].value)
        changes = self._changes(object_id, write)
        if (await self._table.check_and_mutate(_key(object_id), as_read, matched=changes)).matched:
            return True
        now = await self.head_tiered(object_id)  # by an attempt of ours whose answer was lost, perhaps
        return (now.metadata if isinstance(now, Tombstone) else now) == extended

    async def scan_tombstones(self) -> AsyncGenerator[tuple[ObjectId, Revision], None]:
        """Yield every live tombstone's object and target, a step of :data:`SCAN_ROWS` rows at a time."""
        every_row = any_of(columns(b"[rt]"), without_value(columns(WRITE)))
        after = b""
        while rows := await self._table.read_page(after, SCAN_END, every_row, SCAN_ROWS):
            after = rows[-1][0]
            now = self._clock()
            for key, cells in rows:
                tombstone = _tombstone(cells, now)
                if tombstone is not None:
                    yield ObjectId.parse(key.decode()), tombstone.target

    async def join(self) -> None:
        """Return at once: nothing runs in the background (HV-11)."""

    async def close(self) -> None:
        """End reads and let go of the connection; a second call does nothing."""
        await self._objects.close()
        await self._heads.close()
        await self._table.close()

    # ------------------------------------------------------------------------------------------------- inside

    async def _write_non_tombstone(
        self, object_id: ObjectId, write: InlineObject | Removal, position: Position | None
    ) -> Tombstone | None:
        key, changes = _key(object_id), self._changes(object_id, write, position)
        for _ in range(RACES_MAX):
            since = self._since()
            later = [] if position is None else [_later(position, since)]
            in_the_way = any_of(_target(since), *later) if later else _target(since)
            if not (await self._table.check_and_mutate(key, in_the_way, unmatched=changes)).matched:
                return None
            cells = await self._table.read(key, any_of(self._head, *later) if later else self._head)
            if position is not None and (REDIRECTS, _position_column(position)) in cells:
                return None
            tombstone = _tombstone(cells, self._clock())
            if tombstone is not None:
                return tombstone
        raise BackendUnavailable("the row is changed faster than it can be written")

    def _since(self) -> int:
        """Return the first deadline, in microseconds, that counts as live in a condition."""
        now = micros(self._clock())
        return now - now % 1000 + 1000

    def _read(self, cells: Cells) -> TieredRead:
        """Return what a row holds."""
        now = self._clock()
        tombstone = _tombstone(cells, now)
        if tombstone is not None:
            return tombstone
        metadata = _object(cells, now)
        if metadata is None:
            return None
        payload = cells.get((KEPT, PAYLOAD)) or cells.get((COLLECTED, PAYLOAD))
        if payload is None:
            _check_collected(cells.get((KEPT, METADATA)) or cells[COLLECTED, METADATA])
            return None
        return StoredObject(metadata, payload.value)

    def _changes(self, object_id: ObjectId, write: TieredWrite, position: Position | None = None) -> list[Change]:
        """Return what brings a row into the state wanted, from whatever it holds, and remembers the position."""
        changes = self._state(object_id, write)
        if position is None:
            return changes
        column = _position_column(position)
        if isinstance(write, Removal):
            until = micros(self._clock() + POSITION_KEPT)
        elif write.metadata.time_expires is None:
            until = NEVER
        else:
            until = micros(write.metadata.time_expires) + POSITION_KEPT // timedelta(microseconds=1)
        remembered = set_cell(REDIRECTS, column, b"%020d" % position.offset, _milliseconds(until))
        return [*changes, delete_column(REDIRECTS, column), remembered]

    def _late_until(self) -> int:
        """Return the deadline of what is kept for a swap that arrives late."""
        return _milliseconds(micros(self._clock() + FORBIDDEN_FOR))

    def _state(self, object_id: ObjectId, write: TieredWrite) -> list[Change]:
        match write:
            case Tombstone(target, metadata):
                cells = [(TARGET, target.name.encode()), (TOMBSTONE_METADATA, encode_metadata(metadata))]
                family = REDIRECTS
            case InlineObject(metadata, payload):
                if len(payload) > self.inline_bytes_max:
                    raise TooLarge(f"an inline payload has at most {self.inline_bytes_max} bytes")
                cells = [(METADATA, encode_metadata(metadata)), (PAYLOAD, bytes(payload))]
                family = KEPT if metadata.time_expires is None else COLLECTED
            case _:
                return self._removal
        _check_row(object_id, cells)
        deadline = NEVER if metadata.time_expires is None else _milliseconds(micros(metadata.time_expires))
        cells.append((WRITE, _random_name()))
        return self._removal + [set_cell(family, column, value, deadline) for column, value in cells]


# ------------------------------------------------------------------------------------------------- cells and filters


def _key(object_id: ObjectId) -> bytes:
    return object_id.storage_path.encode()


def _random_name() -> bytes:
    return os.urandom(16).hex().encode()


def _position_column(position: Position) -> bytes:
    return POSITION + position.source.encode()


def _ahead(cells: Cells, position: Position | None) -> int:
    """Return how far the last write of the same source that *cells* remember is ahead; below 0: behind; else 0."""
    known = None if position is None else cells.get((REDIRECTS, _position_column(position)))
    return 0 if known is None or position is None else int(known.value) - position.offset


def _position(position: Position, since: int) -> Filter:
    """Let the position of the last write of the same source pass, if it is remembered."""
    return cell(REDIRECTS, _position_column(position), since=since)


def _later(position: Position, since: int) -> Filter:
    """Let the position of a later write of the same source pass, if there is one."""
    return cell(REDIRECTS, _position_column(position), since=since, above=b"%020d" % position.offset)


def _ban_column(revision: Revision) -> bytes:
    return FORBIDDEN + revision.name.encode()


def _target(since: int, revision: Revision | None = None) -> Filter:
    """Let the live target pass, only *revision* if that is given."""
    return cell(REDIRECTS, TARGET, since=since, value=None if revision is None else revision.name.encode())


def _ban(revision: Revision, since: int) -> Filter:
    """Let the ban on *revision* pass, if there is one."""
    return cell(REDIRECTS, _ban_column(revision), since=since)


def _milliseconds(deadline: int) -> int:
    """Round *deadline*, in microseconds, to what a timestamp can be."""
    return min(max(deadline - deadline % 1000, 0), NEVER)


def _tombstone(cells: Cells, now: datetime) -> Tombstone | None:
    """Return the row's tombstone, if it has one that has not expired."""
    target, stored = cells.get((REDIRECTS, TARGET)), cells.get((REDIRECTS, TOMBSTONE_METADATA))
    if target is None:
        return None
    if stored is None:
        _check_collected(target)
        return None
    metadata = decode_metadata(stored.value)
    if _expired(metadata, now):
        return None
    return Tombstone(Revision(target.value.decode()), metadata)


def _object(cells: Cells, now: datetime) -> Metadata | None:
    """Return the metadata of the row's object, if it has one that has not expired."""
    stored = cells.get((KEPT, METADATA)) or cells.get((COLLECTED, METADATA))
    if stored is None:
        return None
    metadata = decode_metadata(stored.value)
    return None if _expired(metadata, now) else metadata


def _expired(metadata: Metadata, now: datetime) -> bool:
    return metadata.time_expires is not None and metadata.time_expires <= now


def _check_collected(left: Cell) -> None:
    """Make sure that a row of which only *left* is there has expired: collection takes its cells one by one.

    Raises:
        BackendError: they do not expire, so the rest is lost.
    """
    if left.micros == NEVER:
        raise BackendError("the row is damaged: one of its cells is missing")


def _check_row(object_id: ObjectId, cells: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse what Bigtable would refuse, or would not give back.

    Raises:
        TooLarge: a cell or the whole row.
    """
    sizes = [len(value) for _, value in cells]
    if max(sizes) > CELL_BYTES_MAX:
        raise TooLarge(f"a value of a Bigtable cell has at most {CELL_BYTES_MAX} bytes, not {max(sizes)}")
    row = len(object_id.storage_path.encode()) + sum(sizes)
    if row > ROW_BYTES_MAX:
        raise TooLarge(f"a Bigtable row has at most {ROW_BYTES_MAX} bytes, not {row}")
