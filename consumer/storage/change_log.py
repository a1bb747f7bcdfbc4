"""Changes that touch both tiers: recorded before, cleaned up after, recovered when their process died.

A *change* replaces what a row of the high-volume tier points to. Until it is settled, the long-term tier may hold a
revision too many: the new one if the swap failed, the old one if it succeeded. The change log remembers which.

**Record** (:meth:`Changes.record`, a context manager around the change)

1. Make the entry durable.
   * OK: the change may begin.
   * Error: the error is raised, nothing may begin (LOG-1). The entry may exist all the same: step 3 removes it.
2. The body moves the guard through its phases, without I/O (LOG-13): *recorded*, *written* just before the swap is
   sent, *updated* or *lost* when its answer is known.
3. On leaving, by success, error or cancellation, the clean-up is handed to a task owned by the log. Nothing is awaited.

**Clean up** (a tracked task per change, :data:`ATTEMPTS_AT_ONCE` of them working at a time)

1. Which revision is current? (LOG-8)
   * *recorded*, *lost*: the old one; the swap was never sent, or was refused.
   * *updated*: the new one.
   * *withdrawn*: both, as far as this change goes; there is nothing to remove.
   * *written*, *recovered*: nobody here knows. The new revision is forbidden in the row, atomically. Refused: it is
     what the row points to, so it is current. Done: no swap can bring it back, whoever is still about to send one; the
     row is read, and what it points to, if anything, is current (LOG-10).
2. Remove the old revision if it is not current, the new one if it is not current, then the entry.
   * Something may still be on its way that leaves one of them to nobody: a swap that has no new revision to be
     forbidden by, from a request that timed out or a process that was paused; or the upload of one that was taken for
     dead. The entry is recorded again, naming that one, to be cleaned up when nothing is that late any more
     (:data:`~consumer.storage.metadata.FORBIDDEN_FOR`).
   * Readers may have been referred to one of them (a retention is set, and a row may have pointed to it): the entry is
     recorded again, naming only what is kept, to be cleaned up when the retention is over. From then on it is nobody's:
     the recovery of whichever process lives at that time removes it, so that waiting costs neither tasks nor memory,
     and no restart makes it wait longer.
   * Error at any step: wait (100 ms, times 1.5, at most 30 s), begin again at 1 (LOG-9). Every step is idempotent.

**Recover** (in the background from construction inside a running loop, else from the first use, and again every
:data:`RECOVERY_SECONDS` until a join; LOG-5, LOG-6)

1. Claim what dead owners, and this owner before its restart, have left, and what was kept long enough: a bounded
   number of entries. Error: as above.
2. Clean up one entry after the other, as *recovered*. One that fails goes on by itself, as a task like those above.
3. Again from 1, behind the last of them, until there are no more. So any number of entries costs the service beside
   it neither memory nor a long transaction, and nobody waits for it.

Recovery only removes; it never finishes an operation. It sees no entry that is being worked on.

**Join**: no clean-up is waited for longer than :data:`JOIN_SECONDS`, nor tried more than :data:`JOIN_ATTEMPTS` times
more. What is left then stays in the log for the next start, and a warning says so (TIER-13, TIER-17). Recovery finishes
what it has claimed, and claims no more.

Multipart uploads do not exist here, and so neither does their phase *assembling*.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

from consumer.errors import TierstreamError
from consumer.log import get_logger
from consumer.storage.backend import Change, ChangeLog, HighVolumeBackend, LongTermBackend, Revision, Tombstone
from consumer.storage.metadata import FORBIDDEN_FOR

if TYPE_CHECKING:
    from uuid import UUID

    from consumer.metrics import Counts

log = get_logger(__name__)

ATTEMPTS_AT_ONCE = 16
"""Clean-ups working at a time: as many deletions as a local disk or an HTTP client's connections take without crowding
out the operations they follow."""

PENDING_MAX = 4096
"""Clean-ups kept by this process, waiting ones included. Above it an entry is left in the log for the next start:
about 10 MiB of tasks, eight times the permits of a default process, so only a long-term tier that refuses deletions for
long gets there, and memory stays bounded when it does."""

JOIN_SECONDS = 10.0
"""How long a join waits for clean-ups: below the 15 s that follow a drain before a supervisor kills (contract 11)."""

JOIN_ATTEMPTS = 3
"""Attempts of one clean-up during a join: two more than a passing fault needs."""

RECOVERY_SECONDS = 30.0
"""Between two recoveries. Once is not enough: a process that is killed and restarted at once, under a new owner name,
comes before the old lease (30 s) is over. With this its orphans go within a minute."""

CANCEL_SECONDS = 1.0
"""How long a join waits for the clean-ups it has cancelled: a backend in a thread answers late, a loop turn is enough
for all others."""

NO_TIME = timedelta(0)

STUBBORN = 5
"""Failures after which a clean-up is worth a warning: about a second of trying."""


def cleanup_delay(failed: int) -> float:
    """Return the seconds to wait after failure number *failed* of a clean-up: 100 ms, times 1.5, at most 30 s (LOG-9).

    Without jitter: clean-ups do not hold anybody up, and only :data:`ATTEMPTS_AT_ONCE` run at a time.
    """
    return float(min(0.1 * 1.5 ** min(failed - 1, 20), 30.0))


def _utc() -> datetime:
    return datetime.now(UTC)


class ChangePhase(enum.Enum):
    """The last step a change is known to have passed; decides which revision is current (LOG-7, LOG-8)."""

    RECOVERED = "recovered"
    """Found in the log after a crash: how far it came is unknown."""
    RECORDED = "recorded"
    """The entry is durable, the swap has not been sent."""
    WRITTEN = "written"
    """The swap is sent or about to be; its outcome is unknown."""
    LOST = "lost"
    """The swap found another writer's tombstone: the change has not happened."""
    UPDATED = "updated"
    """The swap has happened."""
    WITHDRAWN = "withdrawn"
    """The swap has not happened, and another change goes on with its new revision."""


class ChangeGuard:
    """Holds one recorded change through its phases; made by :meth:`Changes.record`.

    Cancellation: of the recording or of the body, hands the clean-up over as any other way out does.
    """

    __slots__ = ("_change", "_changes", "phase")

    def __init__(self, changes: Changes, change: Change) -> None:
        self.phase = ChangePhase.RECORDED
        self._changes = changes
        self._change = change

    async def __aenter__(self) -> Self:
        try:
            await self._changes.log.record(self._change)
        except BaseException:
            self._changes.clean_up(self._change, self.phase)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._changes.clean_up(self._change, self.phase)

    def written(self) -> None:
        """The swap is about to be sent."""
        self.phase = ChangePhase.WRITTEN

    def withdrawn(self) -> None:
        """The swap was refused, and will be tried again as another change: this one has nothing to remove."""
        self.phase = ChangePhase.WITHDRAWN

    def settled(self, won: bool) -> None:  # noqa: FBT001 - the answer of the swap, passed on as it is
        """The swap has answered *won*."""
        self.phase = ChangePhase.UPDATED if won else ChangePhase.LOST


class Changes:
    """Owner of all changes of one process: records, cleans up, recovers, joins.

    Args:
        change_log: Where entries are durable.
        high_volume: Rows that say what is current.
        long_term: Where revisions are removed.
        counts: Counts orphans removed; None counts nothing.
        delay: Seconds to wait after the failure number n of a clean-up.
        join_seconds: How long a join waits.
        retention: How long a revision is kept that a row has pointed to; None = readers are referred to none, and it
            is removed at once.
        clock: The wall clock, UTC.
    """

    def __init__(
        self,
        change_log: ChangeLog,
        high_volume: HighVolumeBackend,
        long_term: LongTermBackend,
        *,
        counts: Counts | None = None,
        delay: Callable[[int], float] = cleanup_delay,
        join_seconds: float = JOIN_SECONDS,
        retention: timedelta | None = None,
        clock: Callable[[], datetime] = _utc,
    ) -> None:
        self.log = change_log
        self.started = False
        """Whether recovery has been started."""
        self._high_volume = high_volume
        self._long_term = long_term
        self._counts = counts
        self._delay = delay
        self._join_seconds = join_seconds
        self._retention = retention
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._recovering: set[UUID] = set()
        """Entries of others that are cleaned up by a task already: another recovery leaves them to it."""
        self._next_recovery: asyncio.TimerHandle | None = None
        self._working = asyncio.Semaphore(ATTEMPTS_AT_ONCE)
        self._joining = asyncio.Event()

    @property
    def pending(self) -> int:
        """Clean-ups not yet done, a running recovery counted as one."""
        return len(self._tasks)

    def start(self) -> None:
        """Start recovery in the background, now and every :data:`RECOVERY_SECONDS`; needs a running loop."""
        if not self.started:
            self.started = True
            self._recover_now()

    def record(self, change: Change) -> ChangeGuard:
        """Return the guard of *change*: ``async with changes.record(change) as guard``.

        Raises (on entering): whatever the log raises; nothing may be started then.
        """
        return ChangeGuard(self, change)

    def clean_up(self, change: Change, phase: ChangePhase, failed: int = 0) -> None:
        """Hand over what *change* may have left behind, after *failed* attempts. Never waits, never raises.

        The entry stays for the next start where this process keeps too many already, or its loop is gone (LOG-12).
        """
        if len(self._tasks) >= PENDING_MAX:
            log.warning("too many clean-ups pending, entry left to the next start", change_id=str(change.change_id))
            return
        task = self._own(lambda: self._settle(change, phase), "clean-up of a change", failed)
        if phase is ChangePhase.RECOVERED and task is not None:
            self._recovering.add(change.change_id)
            task.add_done_callback(lambda _task: self._recovering.discard(change.change_id))

    async def recover(self) -> int:
        """Clean up now what dead owners have left, one entry at a time; return the number of entries met.

        An entry that cannot be cleaned up goes on in the background, and does not hold up the next. During a join what
        has been claimed is finished, and the rest left to the next start.

        Raises: whatever the log raises on claiming.

        Cancellation: entries not yet reached stay in the log.
        """
        met = left = 0
        after: UUID | None = None
        while entries := await self.log.recoverable(after):
            after = entries[-1].change_id
            for change in entries:
                if change.change_id in self._recovering:
                    continue
                met += 1
                left += change.not_before is None
                try:
                    await self._settle(change, ChangePhase.RECOVERED)
                except Exception as error:  # noqa: BLE001 - whatever it was, the entry is still there
                    self._report("clean-up of a change", 1, error)
                    self.clean_up(change, ChangePhase.RECOVERED, failed=1)
            if self._joining.is_set():
                break
        if left:
            log.info("change log recovered", entries=left)
        return met

    async def join(self) -> None:
        """Wait for recovery and all clean-ups, those that begin meanwhile included; may be called again.

        Begins recovery where nothing has yet, and ends its repetition. Returns after at most ``join_seconds`` and
        :data:`CANCEL_SECONDS`; what is left stays in the log.
        """
        self.start()
        if self._next_recovery is not None:
            self._next_recovery.cancel()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._join_seconds
        self._joining.set()
        try:
            while self._tasks and (left := deadline - loop.time()) > 0:
                await asyncio.wait(self._tasks, timeout=left)
        finally:
            self._joining.clear()
        if self._tasks:
            log.warning("clean-up not finished, entries left to the next start", entries=len(self._tasks))
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=CANCEL_SECONDS)

    def _recover_now(self) -> None:
        task = self._own(self.recover, "recovery of the change log")
        if task is not None:
            task.add_done_callback(self._recover_later)

    def _recover_later(self, recovery: asyncio.Task[None]) -> None:
        if not self._joining.is_set() and not recovery.cancelled():
            self._next_recovery = recovery.get_loop().call_later(RECOVERY_SECONDS, self._recover_now)

    def _own(
        self, work: Callable[[], Coroutine[None, None, object]], name: str, failed: int = 0
    ) -> asyncio.Task[None] | None:
        """Try *work* in a task of our own until it succeeds; None where there is no loop to run it."""
        trying = self._until_it_succeeds(work, name, failed)
        try:
            task = asyncio.get_running_loop().create_task(trying, name=name)
        except RuntimeError:
            trying.close()
            log.error("no event loop to run in, left to the next start", what=name)  # noqa: TRY400 - the error says no more
            return None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _until_it_succeeds(
        self, work: Callable[[], Coroutine[None, None, object]], name: str, failed: int
    ) -> None:
        failed_in_join = 0
        while True:
            if failed:
                if not self._joining.is_set():
                    failed_in_join = 0
                    await self._pause(self._delay(failed))
                elif failed_in_join < JOIN_ATTEMPTS:
                    await asyncio.sleep(self._delay(failed_in_join))
                else:
                    log.warning("given up, left to the next start", what=name, attempts=failed)
                    return
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - whatever it was, the entry is still there: try again (LOG-9)
                failed += 1
                failed_in_join += 1
                self._report(name, failed, error)
            else:
                return

    async def _pause(self, seconds: float) -> None:
        """Wait *seconds*, or until a join begins."""
        try:
            async with asyncio.timeout(seconds):
                await self._joining.wait()
        except TimeoutError:
            pass

    def _report(self, name: str, failed: int, error: Exception) -> None:
        level = logging.WARNING if failed == STUBBORN or not isinstance(error, TierstreamError) else logging.DEBUG
        log.log(level, "failed, trying on", what=name, attempts=failed, error=f"{type(error).__name__}: {error}")

    async def _settle(self, change: Change, phase: ChangePhase) -> None:
        """Remove what *change* has left behind and is not current, then its entry; every step is idempotent."""
        async with self._working:
            current = await self._current(change, phase)
            kept: list[Revision] = []
            for revision in (change.old, change.new) if phase is not ChangePhase.WITHDRAWN else ():
                if revision is None or revision == current:
                    continue
                if self._may_be_read(change, phase, revision):
                    kept.append(revision)
                    continue
                await self._long_term.delete(revision)
                left_over = revision is change.new or phase is ChangePhase.RECOVERED
                if self._counts is not None and left_over and change.not_before is None:
                    self._counts.orphans_removed += 1
            late = self._may_be_late(change, phase, current)
            if not kept and not late:
                await self.log.remove(change.change_id)
                return
            named = {*kept, *late}
            new = change.new if change.new in named else None
            old = change.old if change.old in named else None
            wait = FORBIDDEN_FOR if late else NO_TIME
            if kept and self._retention is not None:
                wait = max(wait, self._retention)
            await self.log.record(Change(change.change_id, change.object_id, new, old, self._clock() + wait))

    def _may_be_read(self, change: Change, phase: ChangePhase, revision: Revision) -> bool:
        """Tell whether somebody may still read *revision*, no longer current, because a response has referred to it."""
        if self._retention is None or change.not_before is not None:
            return False
        # The swap to the new one was never sent, or refused: no reader has seen it.
        return revision is not change.new or phase not in {ChangePhase.RECORDED, ChangePhase.LOST}

    @staticmethod
    def _may_be_late(change: Change, phase: ChangePhase, current: Revision | None) -> list[Revision]:
        """Return what something of *change* that is still on its way may yet leave to nobody.

        * Its old revision, current by now: a swap to something inline, or to nothing, has no name to forbid it by.
        * Its new one, by an upload: that of a process which was taken for dead, and dies before it can clean up.
        """
        if change.not_before is not None:
            return []
        if change.new is None:
            unknown = phase in {ChangePhase.WRITTEN, ChangePhase.RECOVERED}
            return [change.old] if unknown and change.old is not None and change.old == current else []
        return [change.new] if phase is ChangePhase.RECOVERED and change.new != current else []

    async def _current(self, change: Change, phase: ChangePhase) -> Revision | None:
        """Tell which revision the row points to, if any, now and for any swap of *change* still on its way (LOG-8)."""
        if phase in {ChangePhase.RECORDED, ChangePhase.LOST, ChangePhase.WITHDRAWN}:
            return change.old
        if phase is ChangePhase.UPDATED:
            return change.new
        if change.new is not None and not await self._high_volume.forbid(change.object_id, change.new):
            return change.new
        row = await self._high_volume.head_tiered(change.object_id)
        return row.target if isinstance(row, Tombstone) else None
