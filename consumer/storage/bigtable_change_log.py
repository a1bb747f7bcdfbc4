"""The change log in a Bigtable table, by default the one the objects lie in, for any number of hosts.

Who an entry belongs to: an *owner* (a name that survives a restart) and an *incarnation* (one instance of
:class:`BigtableChangeLog`, from construction to join). An incarnation lives as long as its lease, a row of its own,
which a task renews :data:`RENEWALS_PER_LEASE` times per lease. Leases are times of the wall clock, as hosts share no
other: clocks that differ by more than a lease, or an event loop that stands still for one, make a living owner look
dead. That costs it its unfinished writes, which fail as ``BackendUnavailable``, and nothing else: whoever recovers an
entry forbids its revision first, in the row (:meth:`HighVolumeBackend.forbid`).

**Rows**, in family ``fl``, behind all storage paths:

* ``~change/CHANGE_ID``: ``e`` the entry (JSON: ``path``, ``new``, ``old``, ``not_before``), ``o`` owner, ``i``
  incarnation, ``s`` when it was recorded, ``b`` from when a postponed one may be claimed (a microsecond less with each
  claim), ``c`` if it has been claimed, ``u`` if it could not be read.
* ``~owner/INCARNATION``: ``o`` owner, ``l`` end of the lease.

**Record**: the lease is renewed if a part of it is over, then the entry is written where there is none. Where there
is one and this one is postponed, what it says is replaced, and nobody has claimed it then. Durable when the call
returns. An entry is never there before the lease it belongs to.

**Recoverable**, page by page until there is something to return

1. Read a page of entries, then all leases: an entry seen has its lease seen too, unless that is over.
2. Claim, by compare-and-swap of ``i``, so that of two recoverers only one gets an entry, every one without ``b``

   * of an incarnation without a live lease (its process died, or stopped without cleaning up), or
   * of an earlier incarnation of this owner, live or not, recorded before this one was made: a restart does not wait;

   and by compare-and-swap of ``b`` every one whose time has come, unless a living incarnation has claimed it already.
3. Return what has been claimed, now or before, and not removed or recorded anew since, so that a recovery that failed,
   or was killed, can be begun again. Of the entries recorded through this incarnation only those that were postponed
   and are due are among them.

   * An entry that cannot be read is logged, set aside, and stays in the table for inspection.
4. Forget the leases that are over.

**Join** ends the lease: whatever is left then may be recovered by anyone, at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, Self
from uuid import UUID, uuid4

import orjson

from consumer.errors import TierstreamError
from consumer.ids import ObjectId
from consumer.log import get_logger
from consumer.storage.backend import RECOVERABLE_MAX, Change, Revision
from consumer.storage.bigtable_table import (
    BigtableTable,
    Cells,
    TableName,
    cell,
    columns,
    delete_column,
    delete_row,
    set_cell,
)
from consumer.storage.host import default_owner
from consumer.storage.metadata import from_micros, micros, now_utc

log = get_logger(__name__)

LOG = "fl"
FAMILIES = {LOG: False}
"""The family, and that its cells are kept."""

ENTRIES, LEASES = b"~change/", b"~owner/"
"""What row keys begin with; no storage path does."""

ENTRY, OWNER, INCARNATION, RECORDED, DUE, CLAIMED, UNREADABLE, LEASE = b"e", b"o", b"i", b"s", b"b", b"c", b"u", b"l"

SCAN_ENTRIES = 500
"""Entries of one step of a scan."""

CLAIMS_AT_ONCE = 32
"""Claims on their way at a time: enough to hide the network's latency, few enough for the service beside them."""

LEASE_SECONDS = 30.0
"""How long a silent incarnation counts as alive: longer than any stall of a healthy process, short enough that its
orphans go within a minute (contract 6)."""

RENEWALS_PER_LEASE = 3
"""Two renewals may fail or come late before anybody else may take over."""

HEARTBEAT_END_SECONDS = 1.0
"""How long a join waits for the heartbeat it has cancelled."""

_last_stamp = 0


def _stamp() -> int:
    """Return nanoseconds since the epoch, never the same twice in a process, and never going back in it."""
    global _last_stamp  # noqa: PLW0603 - one clock per process
    _last_stamp = max(_last_stamp + 1, time.time_ns())
    return _last_stamp


class BigtableChangeLog:
    """A durable change log; what each method guarantees stands at :class:`~consumer.storage.backend.ChangeLog`.

    A log that is not closed keeps its lease until that is over.

    Args:
        project: Google Cloud project.
        instance: Bigtable instance.
        table: The table; :meth:`create` makes it.
        owner: A name that survives restarts, used by one running process at a time; by default one of its own.
        lease_seconds: How long after its last sign of life this incarnation counts as alive.
        emulator_host: HOST:PORT of an emulator; implies anonymous credentials.
        app_profile: Application profile, routing to a single cluster.
        clock: The wall clock, UTC.
        sleep: Waits between two heartbeats.

    Raises (all methods): ``BackendUnavailable``, ``BackendError``; ``ConfigError`` without client or credentials.
    """

    repeats_requests = True

    def __init__(
        self,
        project: str,
        instance: str,
        table: str,
        owner: str | None = None,
        lease_seconds: float = LEASE_SECONDS,
        *,
        emulator_host: str | None = None,
        app_profile: str | None = None,
        clock: Callable[[], datetime] = now_utc,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if lease_seconds <= 0:
            raise ValueError(f"a lease is longer than {lease_seconds} seconds")
        self.owner = owner or default_owner()
        self._incarnation = uuid4().hex.encode()
        self._made = _stamp()
        self._lease_micros = int(lease_seconds * 1_000_000)
        self._clock = clock
        self._sleep = sleep
        self._table = BigtableTable(TableName(project, instance, table, emulator_host, app_profile), FAMILIES)
        self._all = columns(b"[eoisbcul]")
        self._renewed_at = 0
        self._renewing = asyncio.Lock()
        self._heartbeat: asyncio.Task[None] | None = None

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """Make it from its section (contract 5)."""
        name = TableName.from_settings(settings)
        return cls(
            name.project,
            name.instance,
            name.table,
            settings.owner,
            settings.lease,
            emulator_host=name.emulator_host,
            app_profile=name.app_profile,
        )

    async def create(self) -> None:
        """Make the table and its family, where they are missing."""
        await self._table.create()

    async def open(self) -> None:
        """Make sure that table, family and permissions are there. Optional.

        Raises:
            ConfigError: the table or the family is missing.
        """
        await self._table.check()

    async def record(self, change: Change) -> None:
        """Make the entry durable; recording it again only postpones it, if that."""
        await self._keep_alive()
        due = None if change.not_before is None else micros(change.not_before)
        entry = {
            "path": change.object_id.storage_path,
            "new": None if change.new is None else change.new.name,
            "old": None if change.old is None else change.old.name,
            "not_before": due,
        }
        said = {ENTRY: orjson.dumps(entry)} | ({} if due is None else {DUE: b"%d" % due})
        whose = {OWNER: self.owner.encode(), INCARNATION: self._incarnation, RECORDED: b"%d" % _stamp()}
        first = [set_cell(LOG, column, value, 0) for column, value in (said | whose).items()]
        postponed = [*first[: len(said)], delete_column(LOG, CLAIMED)] if due is not None else []
        await self._table.check_and_mutate(_entry_key(change.change_id), None, matched=postponed, unmatched=first)

    async def remove(self, change_id: UUID) -> None:
        """Drop an entry; dropping an absent one is a success (LOG-3)."""
        await self._table.mutate(_entry_key(change_id), [delete_row()])

    async def recoverable(self, after: UUID | None = None) -> Sequence[Change]:
        """Claim and return what dead owners, and this owner before this instance, have left."""
        await self._keep_alive()
        start, end = ENTRIES if after is None else _entry_key(after), _behind(ENTRIES)
        while page := await self._table.read_page(start, end, self._all, RECOVERABLE_MAX):
            start = page[-1][0]
            if changes := await self._readable(await self._claimed([row for row in page if _is_readable(row[1])])):
                return changes
        return []

    async def count(self) -> int:
        """Entries of this owner now in the log, without unreadable ones and those that wait for their time."""
        mine, now = self.owner.encode(), micros(self._clock())
        return len(
            [
                key
                async for key, cells in self._rows(ENTRIES)
                if _text(cells, OWNER) == mine and (LOG, UNREADABLE) not in cells and _number(cells, DUE) <= now
            ]
        )

    async def scan_changes(self) -> AsyncGenerator[tuple[str, Change], None]:
        """Yield every entry with its owner, in the order of their ids."""
        async for key, cells in self._rows(ENTRIES):
            change = _change(key, cells)
            if change is not None:
                yield _text(cells, OWNER).decode(errors="replace"), change

    async def join(self) -> None:
        """End the lease. Recording again starts a new one; where the table fails, the lease ends by itself."""
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is None:
            return
        heartbeat.cancel()
        await asyncio.wait({heartbeat}, timeout=HEARTBEAT_END_SECONDS)
        self._renewed_at = 0
        try:
            await self._table.mutate(LEASES + self._incarnation, [delete_row()])
        except TierstreamError as error:
            log.warning("the change log's lease could not be ended and runs out by itself", error=str(error))

    async def close(self) -> None:
        """End the lease and let go of the connection; a second call does nothing."""
        await self.join()
        await self._table.close()

    # ------------------------------------------------------------------------------------------------- the lease

    async def _keep_alive(self) -> None:
        """Return once a lease is durable of which no more than one renewal is due."""
        if self._heartbeat is None:
            self._heartbeat = asyncio.create_task(self._beat(), name="lease of the change log")
        async with self._renewing:
            if micros(self._clock()) - self._renewed_at >= self._lease_micros // RENEWALS_PER_LEASE:
                await self._renew()

    async def _beat(self) -> None:
        while True:
            await self._sleep(self._lease_micros / 1_000_000 / RENEWALS_PER_LEASE)
            try:
                async with self._renewing:
                    await self._renew()
            except TierstreamError as error:
                log.warning("the lease of the change log could not be renewed", error=str(error))

    async def _renew(self) -> None:
        now = micros(self._clock())
        lease = {OWNER: self.owner.encode(), LEASE: b"%d" % (now + self._lease_micros)}
        await self._table.mutate(
            LEASES + self._incarnation, [set_cell(LOG, column, value, 0) for column, value in lease.items()]
        )
        self._renewed_at = now

    # ------------------------------------------------------------------------------------------------- entries

    async def _claimed(self, entries: Sequence[tuple[bytes, Cells]]) -> Sequence[tuple[bytes, Cells]]:
        """Claim what may be claimed of *entries*; return what is ours then. Forget the leases that are over."""
        leases = {key.removeprefix(LEASES): cells async for key, cells in self._rows(LEASES)}
        now = micros(self._clock())
        dead = {name for name, cells in leases.items() if _number(cells, LEASE) <= now}
        alive = leases.keys() - dead
        ours = {key for key, cells in entries if self._is_ours_by_now(cells)}
        wanted = [(key, cells) for key, cells in entries if self._may_be_claimed(cells, alive, now)]
        for start in range(0, len(wanted), CLAIMS_AT_ONCE):
            group = wanted[start : start + CLAIMS_AT_ONCE]
            won = await asyncio.gather(*(self._claim(key, cells) for key, cells in group))
            ours |= {key for (key, _), mine in zip(group, won, strict=True) if mine}
        for name in dead:  # they own nothing any more
            over = leases[name][LOG, LEASE].value
            await self._table.check_and_mutate(LEASES + name, cell(LOG, LEASE, value=over), matched=[delete_row()])
        return [row for row in entries if row[0] in ours]

    async def _rows(self, prefix: bytes) -> AsyncGenerator[tuple[bytes, Cells], None]:
        after, end = prefix, _behind(prefix)
        while rows := await self._table.read_page(after, end, self._all, SCAN_ENTRIES):
            after = rows[-1][0]
            for row in rows:
                yield row

    def _is_ours_by_now(self, cells: Cells) -> bool:
        return _text(cells, INCARNATION) == self._incarnation and (LOG, CLAIMED) in cells

    def _may_be_claimed(self, cells: Cells, alive: set[bytes], now: int) -> bool:
        incarnation = _text(cells, INCARNATION)
        if (LOG, DUE) in cells:
            held = (LOG, CLAIMED) in cells and (incarnation in alive or incarnation == self._incarnation)
            return _number(cells, DUE) <= now and not held
        if incarnation == self._incarnation:
            return False
        return incarnation not in alive or (
            _text(cells, OWNER) == self.owner.encode() and _number(cells, RECORDED) < self._made
        )

    async def _claim(self, key: bytes, cells: Cells) -> bool:
        """Make an entry ours, if it is still its owner's; True also where an earlier attempt did."""
        written = {OWNER: self.owner.encode(), INCARNATION: self._incarnation, CLAIMED: b"1"}
        column = INCARNATION
        if (LOG, DUE) in cells:  # that of a postponed entry may be our own already
            column = DUE
            written[DUE] = b"%d" % (_number(cells, DUE) - 1)
        as_read = cell(LOG, column, value=_text(cells, column))
        changes = [set_cell(LOG, column, value, 0) for column, value in written.items()]
        if (await self._table.check_and_mutate(key, as_read, matched=changes)).matched:
            return True
        return _text(await self._table.read(key, self._all), INCARNATION) == self._incarnation

    async def _readable(self, rows: Sequence[tuple[bytes, Cells]]) -> Sequence[Change]:
        """Return the entries of *rows*; set aside those that are none."""
        changes: list[Change] = []
        unreadable: list[bytes] = []
        for key, cells in rows:
            change = _change(key, cells)
            if change is None:
                unreadable.append(key)
            else:
                changes.append(change)
        if unreadable:
            log.error("change log entries are unreadable and were set aside", entries=len(unreadable))
        for key in unreadable:
            await self._table.mutate(key, [set_cell(LOG, UNREADABLE, b"1", 0)])
        return changes


def _behind(prefix: bytes) -> bytes:
    """Return the end of all keys that begin with *prefix*, which ends in a slash."""
    return prefix[:-1] + b"0"  # the character after it


def _is_readable(cells: Cells) -> bool:
    return (LOG, UNREADABLE) not in cells


def _entry_key(change_id: UUID) -> bytes:
    return ENTRIES + str(change_id).encode()


def _text(cells: Cells, column: bytes) -> bytes:
    found = cells.get((LOG, column))
    return b"" if found is None else found.value


def _number(cells: Cells, column: bytes) -> int:
    """Return what a column holds; what is no number counts as long past."""
    try:
        return int(_text(cells, column))
    except ValueError:
        return 0


def _change(key: bytes, cells: Cells) -> Change | None:
    """Return the entry of a row, None where it cannot be read."""
    try:
        entry = orjson.loads(_text(cells, ENTRY))
        due = entry.get("not_before")
        return Change(
            UUID(key.removeprefix(ENTRIES).decode()),
            ObjectId.parse(entry["path"]),
            None if entry["new"] is None else Revision(entry["new"]),
            None if entry["old"] is None else Revision(entry["old"]),
            None if due is None else from_micros(due),
        )
    except (TierstreamError, AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None
