"""The change log in a SQLite file, by default the one the objects lie in: same writer thread, same group commit.

Who an entry belongs to: an *owner* (a name that survives a restart) and an *incarnation* (one instance of
:class:`SqliteChangeLog`, from construction to join). An incarnation lives as long as its lease, which the file's writer
thread renews three times per lease, whether or not the event loop is free. Leases are counted in seconds since the host
started, so that setting the wall clock kills nobody; a lease from before a restart of the host is over.

**Record**: the entry and a renewed lease, durable when the call returns.

**Recoverable**, a bounded number at a time: the writer thread is held up for milliseconds, however many there are:

1. Renew the lease. Forget the leases that are over.
2. Look, in a reader thread, for the next entries that may be had. Those are the ones without a ``not_before``
   * of another incarnation without a live lease (its process died, or stopped without cleaning up), or
   * of an earlier incarnation of this owner, live or not, recorded before this one was made: a restart does not wait;

   every one whose ``not_before`` has come, unless another living incarnation has taken it over already; and what has
   been taken over and not removed or recorded anew since, so that a recovery that failed can be begun again. Of the
   entries recorded through this incarnation only those that were postponed and are due are among them.
3. Take them over in the name of this incarnation, those of which all that still holds, in one transaction: of two
   recoverers only one gets an entry.
   * An entry that cannot be read is logged, set aside, and stays in the file for inspection.

**Join** ends the lease: whatever is left then may be recovered by anyone, at once.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import datetime
from typing import Any, TypeAlias
from uuid import UUID, uuid4

from consumer.errors import TierstreamError
from consumer.ids import ObjectId
from consumer.log import get_logger
from consumer.storage.backend import RECOVERABLE_MAX, Change, Revision
from consumer.storage.host import boot_id, default_owner
from consumer.storage.metadata import from_micros, micros, now_utc
from consumer.storage.sqlite import SqliteDatabase, Timer

log = get_logger(__name__)

SCAN_ENTRIES = 500
"""Entries of one step of a scan."""

LEASE_SECONDS = 30.0
"""How long a silent incarnation counts as alive: longer than any stall of a healthy process, short enough that its
orphans go within a minute (contract 6)."""

RENEWALS_PER_LEASE = 3
"""Two renewals may fail or come late before anybody else may take over."""


class SqliteChangeLog:
    """A durable change log; what each method guarantees stands at :class:`~consumer.storage.backend.ChangeLog`.

    Construction registers this incarnation in the background: what others record later is not recovered by it. A log
    that is not closed keeps its lease until the process ends.

    Args:
        path: The file; the one of a :class:`~consumer.storage.sqlite.SqliteBackend` shares its threads.
        owner: A name that survives restarts, used by one running process at a time; by default one of its own.
        lease_seconds: How long after its last sign of life this incarnation counts as alive.
        monotonic: Seconds on a clock that all processes of this host share.
        clock: The wall clock, by which postponed entries become due.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        owner: str | None = None,
        lease_seconds: float = LEASE_SECONDS,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], datetime] = now_utc,
    ) -> None:
        if lease_seconds <= 0:
            raise ValueError(f"a lease is longer than {lease_seconds} seconds")
        self.owner = owner or default_owner()
        self._incarnation = uuid4().hex
        self._lease_seconds = lease_seconds
        self._monotonic = monotonic
        self._clock = clock
        self._database = SqliteDatabase.shared(path)
        self._closed = False
        self._heartbeat: Timer | None = None
        self._keep_alive()

    async def open(self) -> None:
        """Create or check the file now, so that a wrong one is noticed at start. Optional."""
        await self._database.open()

    async def record(self, change: Change) -> None:
        """Make the entry durable; recording it again only postpones it, if that."""
        self._keep_alive()
        entry = (
            change.object_id.storage_path,
            None if change.new is None else change.new.name,
            None if change.old is None else change.old.name,
            None if change.not_before is None else micros(change.not_before),
        )
        await self._database.write(self._insert, str(change.change_id), entry)

    async def remove(self, change_id: UUID) -> None:
        """Drop an entry; dropping an absent one is a success (LOG-3)."""
        await self._database.write(_delete, str(change_id))

    async def recoverable(self, after: UUID | None = None) -> Sequence[Change]:
        """Claim and return what dead owners, and this owner before this instance, have left."""
        self._keep_alive()
        last = "" if after is None else str(after)
        today = micros(self._clock())
        whose = await self._database.write(self._begin_recovery)
        while found := await self._database.read(_candidates, {**whose, "today": today, "after": last}):
            last = found[-1]
            changes: list[Change] = []
            unreadable: list[str] = []
            for change_id, *entry in await self._database.write(self._claim, found, today):
                try:
                    changes.append(_change(change_id, *entry))
                except (TierstreamError, TypeError, ValueError, AttributeError, OverflowError):
                    unreadable.append(change_id)
            if unreadable:
                log.error("change log entries are unreadable and were set aside", entries=len(unreadable))
                await self._database.write(_set_aside, unreadable)
            if changes:
                return changes
        return []

    async def count(self) -> int:
        """Entries of this owner now in the log, without unreadable ones and those that wait for their time."""
        return await self._database.read(_count, self.owner, micros(self._clock()))

    async def scan_changes(self) -> AsyncGenerator[tuple[str, Change], None]:
        """Yield every entry with its owner, in the order they were recorded."""
        last = 0
        while rows := await self._database.read(_entries_after, last):
            last = rows[-1][0]
            for _, owner, *entry in rows:
                try:
                    change = _change(*entry)
                except (TierstreamError, TypeError, ValueError, AttributeError, OverflowError):
                    continue
                yield owner, change

    async def join(self) -> None:
        """End the lease. Recording again starts a new one; where the file fails, the lease ends by itself."""
        if self._heartbeat is None:
            return
        self._database.never(self._heartbeat)
        self._heartbeat = None
        try:
            await self._database.write(_leave, self._incarnation)
        except TierstreamError as error:
            log.warning("the change log's lease could not be ended and runs out by itself", error=str(error))

    async def close(self) -> None:
        """End the lease and give up the file; a second call does nothing."""
        if not self._closed:
            self._closed = True
            await self.join()
            await self._database.release()

    def _keep_alive(self) -> None:
        if self._heartbeat is None:
            self._heartbeat = self._database.every(
                self._lease_seconds / RENEWALS_PER_LEASE, self._renew, at_once=True
            )

    # ---------------------------------------------------------------------------------------------- in the thread

    def _renew(self, connection: sqlite3.Connection) -> None:
        """Extend the lease; the first time, register. Part of every step, so that none relies on an earlier one."""
        now = self._monotonic()
        connection.execute(_RENEW, (self._incarnation, self.owner, boot_id(), now + self._lease_seconds))

    def _insert(self, connection: sqlite3.Connection, change_id: str, entry: _Entry) -> None:
        self._renew(connection)
        connection.execute(_INSERT, (change_id, self.owner, self._incarnation, *entry))

    def _begin_recovery(self, connection: sqlite3.Connection) -> dict[str, Any]:
        self._renew(connection)
        whose = self._whose()
        connection.execute(_FORGET, whose)  # the dead own nothing any more
        return whose

    def _claim(self, connection: sqlite3.Connection, found: Sequence[str], today: int) -> list[tuple[Any, ...]]:
        self._renew(connection)
        whose = {**self._whose(), "today": today}
        connection.executemany(_CLAIM, ({**whose, "change_id": change_id} for change_id in found))
        claimed = (connection.execute(_CLAIMED, {**whose, "change_id": change_id}).fetchone() for change_id in found)
        return [entry for entry in claimed if entry is not None]

    def _whose(self) -> dict[str, Any]:
        """Return what statements know this incarnation and the living by."""
        return {"owner": self.owner, "mine": self._incarnation, "boot": boot_id(), "now": self._monotonic()}


_Entry: TypeAlias = tuple[str, str | None, str | None, int | None]
"""What a change says: path, new and old revision, and its ``not_before`` in microseconds."""


_RENEW = """
INSERT INTO change_log_instances (incarnation, owner, boot, lease_until, since)
VALUES (?, ?, ?, ?, (SELECT coalesce(max(sequence), 0) FROM change_log_entries))
ON CONFLICT (incarnation) DO UPDATE SET lease_until = excluded.lease_until
"""
_INSERT = """
INSERT INTO change_log_entries (change_id, owner, incarnation, object_path, new_revision, old_revision, not_before)
VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (change_id) DO UPDATE SET
    new_revision = excluded.new_revision, old_revision = excluded.old_revision, not_before = excluded.not_before,
    claimed = 0
WHERE excluded.not_before IS NOT NULL
"""
_ALIVE = "SELECT incarnation FROM change_log_instances WHERE boot = :boot AND lease_until > :now"
_MAY_BE_HAD = f"""
NOT unreadable AND (
    claimed AND incarnation = :mine
    OR not_before IS NULL AND incarnation <> :mine AND (
        owner = :owner AND sequence <= (SELECT since FROM change_log_instances WHERE incarnation = :mine)
        OR incarnation NOT IN ({_ALIVE})
    )
    OR not_before <= :today AND NOT (claimed AND incarnation IN ({_ALIVE}))
)
"""  # noqa: S608 - put together from constants, as are those below
# Unary plus: in the order of the ids, whatever else has an index, so that no step sorts all there are.
_CANDIDATES = f"""
SELECT change_id FROM change_log_entries WHERE change_id > :after AND +({_MAY_BE_HAD})
ORDER BY change_id LIMIT {RECOVERABLE_MAX}
"""  # noqa: S608
_CLAIM = f"""
UPDATE change_log_entries SET owner = :owner, incarnation = :mine, claimed = 1
WHERE change_id = :change_id AND {_MAY_BE_HAD}
"""  # noqa: S608
_CLAIMED = """
SELECT change_id, object_path, new_revision, old_revision, not_before FROM change_log_entries
WHERE change_id = :change_id AND incarnation = :mine AND claimed AND NOT unreadable
"""
_COUNT = """
SELECT (SELECT count(*) FROM change_log_entries WHERE owner = ? AND NOT unreadable AND not_before IS NULL)
     + (SELECT count(*) FROM change_log_entries WHERE owner = ? AND NOT unreadable AND not_before <= ?)
"""
_ENTRIES_AFTER = """
SELECT sequence, owner, change_id, object_path, new_revision, old_revision, not_before FROM change_log_entries
WHERE sequence > ? ORDER BY sequence LIMIT ?
"""
_FORGET = "DELETE FROM change_log_instances WHERE boot <> :boot OR lease_until <= :now"


def _change(change_id: str, path: str, new: str | None, old: str | None, not_before: int | None) -> Change:
    return Change(
        UUID(change_id),
        ObjectId.parse(path),
        None if new is None else Revision(new),
        None if old is None else Revision(old),
        None if not_before is None else from_micros(not_before),
    )


def _candidates(connection: sqlite3.Connection, whose: dict[str, Any]) -> list[str]:
    return [change_id for (change_id,) in connection.execute(_CANDIDATES, whose)]


def _entries_after(connection: sqlite3.Connection, last: int) -> list[tuple[Any, ...]]:
    return connection.execute(_ENTRIES_AFTER, (last, SCAN_ENTRIES)).fetchall()


def _delete(connection: sqlite3.Connection, change_id: str) -> None:
    connection.execute("DELETE FROM change_log_entries WHERE change_id = ?", (change_id,))


def _set_aside(connection: sqlite3.Connection, change_ids: list[str]) -> None:
    connection.executemany(
        "UPDATE change_log_entries SET unreadable = 1 WHERE change_id = ?", [(change_id,) for change_id in change_ids]
    )


def _count(connection: sqlite3.Connection, owner: str, today: int) -> int:
    found: tuple[int] = connection.execute(_COUNT, (owner, owner, today)).fetchone()
    return found[0]


def _leave(connection: sqlite3.Connection, incarnation: str) -> None:
    connection.execute("DELETE FROM change_log_instances WHERE incarnation = ?", (incarnation,))
