"""Changes that touch both tiers: what each phase leaves behind, what cleans it up, and what survives a failure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, cast
from uuid import UUID

import pytest

from consumer.ids import ObjectContext, ObjectId
from consumer.metrics import Counts
from consumer.operations import DEFAULT_METADATA
from consumer.storage import change_log
from consumer.storage.backend import RECOVERABLE_MAX, Change, InlineObject, Revision, Tombstone
from consumer.storage.change_log import (
    ATTEMPTS_AT_ONCE,
    JOIN_ATTEMPTS,
    ChangeGuard,
    ChangePhase,
    Changes,
    cleanup_delay,
)
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.metadata import FORBIDDEN_FOR
from consumer.storage.revision import new_revision, uuid7
from failures import (
    Away,
    FailingDeletion,
    FailingRead,
    FailingRecord,
    FailingRemoval,
    HangingDeletion,
    InheritedChanges,
    LostDeletionAnswer,
    LostRecordAnswer,
    PauseAfterRecord,
    PausedDeletion,
    assert_nothing_left_over,
    revisions,
)

OBJECT = ObjectId(ObjectContext("usecase"), "key")
OLD, NEW, OTHER = (new_revision(OBJECT) for _ in range(3))


class Clock:
    """A wall clock that moves when told to."""

    def __init__(self) -> None:
        self.time = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


def at_once(_failed: int) -> float:
    """Wait no time at all between two attempts."""
    return 0.0


def make(
    high_volume: MemoryBackend | None = None,
    long_term: MemoryBackend | None = None,
    log: MemoryChangeLog | None = None,
    *,
    join_seconds: float = 10.0,
) -> tuple[Changes, MemoryBackend, MemoryBackend, MemoryChangeLog]:
    """Return changes that wait no time between attempts, and what they work on."""
    high_volume, long_term, log = high_volume or MemoryBackend(), long_term or MemoryBackend(), log or MemoryChangeLog()
    return Changes(log, high_volume, long_term, delay=at_once, join_seconds=join_seconds), high_volume, long_term, log


def change(new: Revision | None = NEW, old: Revision | None = OLD) -> Change:
    """Return a change of the one object."""
    return Change(uuid7(), OBJECT, new, old)


async def upload(long_term: MemoryBackend, *names: Revision) -> None:
    """Put revisions there."""
    for name in names:
        await long_term.put(name, DEFAULT_METADATA, b"payload")


async def point(high_volume: MemoryBackend, target: Revision | None) -> None:
    """Let the row point to *target*; None makes it an inline object."""
    row = await high_volume.head_tiered(OBJECT)
    seen = row.target if isinstance(row, Tombstone) else None
    write = InlineObject(DEFAULT_METADATA, b"") if target is None else Tombstone(target, DEFAULT_METADATA)
    assert await high_volume.compare_and_write(OBJECT, seen, write)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until *condition* holds; no time passes that a double does not ask for."""
    while not condition():  # noqa: ASYNC110 - it depends on tasks of the code under test, which set no event
        await asyncio.sleep(0)


async def until_idle() -> None:
    """Let the loop turn often enough for anything that waits for no time to happen."""
    for _ in range(100):
        await asyncio.sleep(0)


class TestWhichRevisionStays:
    """LOG-8: what is not current is removed, then the entry."""

    async def test_recorded_keeps_the_old_one(self) -> None:
        changes, high_volume, long_term, log = make()
        await upload(long_term, OLD, NEW)
        await point(high_volume, OLD)

        async with changes.record(change()):
            pass
        await changes.join()

        assert revisions(long_term) == {OLD.name}
        await assert_nothing_left_over(high_volume, long_term, log)

    async def test_lost_keeps_the_old_one_for_the_winner_to_remove(self) -> None:
        changes, high_volume, long_term, log = make()
        await upload(long_term, OLD, NEW, OTHER)
        await point(high_volume, OTHER)

        async with changes.record(change()) as guard:
            guard.written()
            guard.settled(False)
        await changes.join()

        assert revisions(long_term) == {OLD.name, OTHER.name}
        assert await log.count() == 0

    async def test_withdrawn_keeps_both_for_the_change_that_goes_on(self) -> None:
        changes, high_volume, long_term, log = make()
        await upload(long_term, OLD, NEW, OTHER)
        await point(high_volume, OTHER)

        async with changes.record(change()) as guard:
            guard.written()
            guard.withdrawn()
        await changes.join()

        assert revisions(long_term) == {OLD.name, NEW.name, OTHER.name}
        assert await log.count() == 0

    async def test_updated_keeps_the_new_one(self) -> None:
        changes, high_volume, long_term, log = make()
        await upload(long_term, OLD, NEW)
        await point(high_volume, NEW)

        async with changes.record(change()) as guard:
            guard.written()
            guard.settled(True)
        await changes.join()

        await assert_nothing_left_over(high_volume, long_term, log)

    @pytest.mark.parametrize("current", [OLD, NEW, OTHER, None])
    async def test_written_asks_the_row(self, current: Revision | None) -> None:
        """LOG-10: an inline object means that no revision is current."""
        changes, high_volume, long_term, log = make()
        await upload(long_term, OLD, NEW, OTHER)
        await point(high_volume, current)

        async with changes.record(change()) as guard:
            guard.written()
        await changes.join()

        assert revisions(long_term) == {OTHER.name} | ({current.name} if current else set())
        assert await log.count() == 0

    async def test_written_with_no_row_at_all_keeps_nothing(self) -> None:
        """LOG-10."""
        changes, high_volume, long_term, log = make()
        await upload(long_term, OLD, NEW)

        async with changes.record(change()) as guard:
            guard.written()
        await changes.join()

        await assert_nothing_left_over(high_volume, long_term, log)

    async def test_moving_through_phases_does_no_io(self) -> None:
        """LOG-13: the methods that move a guard are plain functions, and nothing has been read or written."""
        changes, *_, log = make(FailingRead(), FailingDeletion())

        async with changes.record(change()) as guard:
            guard.written()
            guard.settled(True)
            assert await log.count() == 1
            assert changes.pending == 0
        changes._high_volume.repair()  # type: ignore[attr-defined]
        changes._long_term.repair()  # type: ignore[attr-defined]
        await changes.join()


class TestRetention:
    """What a row has pointed to may be read by somebody who was referred to it: it goes when its time is over."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def retaining(self, clock: Clock) -> Changes:
        return Changes(
            MemoryChangeLog(clock=clock),
            MemoryBackend(),
            MemoryBackend(),
            counts=Counts(),
            delay=at_once,
            retention=timedelta(seconds=60),
            clock=clock,
        )

    @pytest.mark.parametrize(
        ("phase", "current", "at_once", "kept"),
        [
            (ChangePhase.UPDATED, NEW, set(), {OLD}),
            (ChangePhase.LOST, OTHER, {NEW}, set()),
            (ChangePhase.RECORDED, OLD, {NEW}, set()),
            (ChangePhase.WRITTEN, NEW, set(), {OLD}),
            (ChangePhase.WRITTEN, OLD, set(), {NEW}),
            (ChangePhase.WRITTEN, OTHER, set(), {OLD, NEW}),
            (ChangePhase.RECOVERED, None, set(), {OLD, NEW}),
        ],
    )
    async def test_only_what_nobody_can_have_seen_goes_at_once(
        self,
        retaining: Changes,
        clock: Clock,
        phase: ChangePhase,
        current: Revision | None,
        at_once: set[Revision],
        kept: set[Revision],
    ) -> None:
        long_term, log = cast("MemoryBackend", retaining._long_term), retaining.log
        await upload(long_term, OLD, NEW, OTHER)
        await point(cast("MemoryBackend", retaining._high_volume), current)

        retaining.clean_up(change(), phase)
        await retaining.join()

        there = {OLD, NEW, OTHER} - at_once
        assert revisions(long_term) == {revision.name for revision in there}
        assert len(cast("MemoryChangeLog", log)._changes) == bool(kept)
        assert await log.count() == 0, "what is only kept is no work"
        # What has been recovered waits for uploads that may still come, too.
        clock.advance((86_400 if phase is ChangePhase.RECOVERED else 60) - 1)
        assert await retaining.recover() == 0
        clock.advance(1)
        assert await retaining.recover() == bool(kept)
        assert revisions(long_term) == {revision.name for revision in there - kept}
        assert await log.count() == 0
        assert retaining._counts is not None
        assert retaining._counts.orphans_removed == len(at_once), "what was kept for readers is no orphan"

    async def test_what_replaces_a_kept_one_and_is_replaced_is_kept_for_its_own_time(
        self, retaining: Changes, clock: Clock
    ) -> None:
        """The entry of the first change names nothing but what that one has replaced."""
        long_term, high_volume = cast("MemoryBackend", retaining._long_term), retaining._high_volume
        await upload(long_term, OLD, NEW, OTHER)
        await point(cast("MemoryBackend", high_volume), OTHER)
        retaining.clean_up(change(NEW, OLD), ChangePhase.UPDATED)
        await retaining.join()
        clock.advance(59)
        retaining.clean_up(change(OTHER, NEW), ChangePhase.UPDATED)
        await retaining.join()

        clock.advance(1)
        await retaining.recover()
        assert revisions(long_term) == {NEW.name, OTHER.name}
        clock.advance(59)
        await retaining.recover()
        assert revisions(long_term) == {OTHER.name}

    async def test_keeping_costs_no_task(self, retaining: Changes) -> None:
        """However many there are, they wait in the log."""
        await upload(cast("MemoryBackend", retaining._long_term), OLD)
        for _ in range(100):
            retaining.clean_up(change(None, OLD), ChangePhase.UPDATED)
        await retaining.join()

        assert retaining.pending == 0
        assert len(cast("MemoryChangeLog", retaining.log)._changes) == 100

    async def test_an_entry_that_cannot_be_recorded_again_is_tried_again(self, clock: Clock) -> None:
        """LOG-9: until then it stands as it was, so that a crash loses nothing."""
        log = LostRecordAnswer(3)
        changes = Changes(
            log, MemoryBackend(), MemoryBackend(), delay=at_once, retention=timedelta(seconds=60), clock=clock
        )
        await upload(cast("MemoryBackend", changes._long_term), OLD)

        changes.clean_up(change(None, OLD), ChangePhase.UPDATED)
        await changes.join()

        assert log.failures == 3
        (entry,) = log._changes.values()
        assert (entry.new, entry.old, entry.not_before) == (None, OLD, clock() + timedelta(seconds=60))


class TestALateSwap:
    """Clean-up and what is still on its way: no tombstone to a revision that was removed, no revision without one."""

    async def test_nor_does_an_upload_leave_anything_though_its_process_dies_then(self) -> None:
        """It was taken for dead in the middle of it: what it uploads after its recovery is looked for a day later."""
        clock = Clock()
        high_volume, long_term = MemoryBackend(clock=clock), MemoryBackend(clock=clock)
        log = InheritedChanges([change()])
        log._clock = clock
        changes = Changes(log, high_volume, long_term, delay=at_once, clock=clock)
        assert await changes.recover() == 1
        await upload(long_term, NEW)
        with pytest.raises(Exception, match="given up"):
            await high_volume.compare_and_write(OBJECT, None, Tombstone(NEW, DEFAULT_METADATA))

        clock.advance(FORBIDDEN_FOR.total_seconds())
        assert await changes.recover() == 1
        await changes.join()

        assert revisions(long_term) == set()
        assert not log._changes

    async def test_is_refused_once_clean_up_has_decided(self) -> None:
        changes, high_volume, long_term, log = make()
        await upload(long_term, OLD, NEW)
        await point(high_volume, OLD)
        async with changes.record(change()) as guard:
            guard.written()
        await changes.join()

        with pytest.raises(Exception, match="given up"):
            await high_volume.compare_and_write(OBJECT, OLD, Tombstone(NEW, DEFAULT_METADATA))

        await assert_nothing_left_over(high_volume, long_term, log)

    @pytest.mark.parametrize("phase", [ChangePhase.WRITTEN, ChangePhase.RECOVERED])
    @pytest.mark.parametrize("arrives", [True, False])
    async def test_to_no_revision_is_waited_for_by_the_entry(self, phase: ChangePhase, *, arrives: bool) -> None:
        """It has no name to be forbidden by. The entry is looked at again when no swap is that late any more."""
        clock = Clock()
        high_volume, long_term = MemoryBackend(clock=clock), MemoryBackend(clock=clock)
        log = MemoryChangeLog(clock=clock)
        changes = Changes(log, high_volume, long_term, delay=at_once, clock=clock)
        await upload(long_term, OLD)
        await point(high_volume, OLD)
        mine = change(None, OLD)
        await log.record(mine)
        changes.clean_up(mine, phase)
        await changes.join()
        (entry,) = log._changes.values()
        assert (entry.change_id, entry.new, entry.old) == (mine.change_id, None, OLD)
        assert await log.count() == 0, "nobody's work until then"

        if arrives:
            assert await high_volume.compare_and_write(OBJECT, OLD, InlineObject(DEFAULT_METADATA, b""))
            assert revisions(long_term) == {OLD.name}
        clock.advance(FORBIDDEN_FOR.total_seconds())
        assert await changes.recover() == 1
        await changes.join()

        assert not log._changes
        assert revisions(long_term) == (set() if arrives else {OLD.name})

    async def test_that_is_known_to_have_failed_is_not_waited_for(self) -> None:
        changes, high_volume, long_term, log = make()
        await upload(long_term, OLD)
        await point(high_volume, OLD)
        for phase in (ChangePhase.RECORDED, ChangePhase.LOST, ChangePhase.WITHDRAWN):
            mine = change(None, OLD)
            await log.record(mine)
            changes.clean_up(mine, phase)
        await changes.join()

        assert not log._changes

    async def test_that_arrives_first_keeps_its_revision(self) -> None:
        changes, high_volume, long_term, log = make()
        await upload(long_term, OLD, NEW)
        await point(high_volume, OLD)
        async with changes.record(change()) as guard:
            guard.written()
        await high_volume.compare_and_write(OBJECT, OLD, Tombstone(NEW, DEFAULT_METADATA))
        await changes.join()

        assert revisions(long_term) == {NEW.name}
        await assert_nothing_left_over(high_volume, long_term, log)


class TestRecording:
    """LOG-1: the entry is there before anything else happens."""

    async def test_the_entry_is_durable_inside_and_gone_afterwards(self) -> None:
        changes, *_, log = make()
        async with changes.record(change()):
            assert await log.count() == 1

        await changes.join()
        assert await log.count() == 0

    async def test_a_failure_keeps_the_body_from_running(self) -> None:
        changes, *_ = make(log=FailingRecord())

        with pytest.raises(Away):
            async with changes.record(change()):
                pytest.fail("must not begin")
        await changes.join()

    async def test_a_lost_answer_leaves_no_entry(self) -> None:
        changes, _, long_term, log = make(log=LostRecordAnswer())
        await upload(long_term, OLD)

        with pytest.raises(Away):
            async with changes.record(change()):
                pytest.fail("must not begin")
        await changes.join()

        assert await log.count() == 0
        assert revisions(long_term) == {OLD.name}

    async def test_a_cancellation_leaves_no_entry(self) -> None:
        log = PauseAfterRecord()
        changes, *_ = make(log=log)

        async def body() -> None:
            async with changes.record(change()):
                pytest.fail("must not begin")

        task = asyncio.create_task(body())
        await log.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await changes.join()

        assert await log.count() == 0

    async def test_an_error_of_the_body_passes_unchanged(self) -> None:
        changes, *_, log = make()
        raised = ValueError("mine")

        with pytest.raises(ValueError, match="mine") as caught:
            async with changes.record(change()):
                raise raised
        await changes.join()

        assert caught.value is raised
        assert await log.count() == 0

    async def test_leaving_waits_for_nothing(self) -> None:
        """TIER-18: during a cancellation nothing may be awaited; clean-up belongs to the log."""
        changes, *_ = make(long_term=HangingDeletion(), join_seconds=0.0)
        guard = changes.record(change())
        await guard.__aenter__()

        with pytest.raises(StopIteration):
            guard.__aexit__(None, None, None).send(None)

        assert changes.pending == 1
        await changes.join()


class TestTryingAgain:
    """LOG-9: for ever, with growing waits."""

    def test_waits_grow_from_a_tenth_to_thirty_seconds(self) -> None:
        waits = [cleanup_delay(failed) for failed in range(1, 1000)]

        assert waits[:4] == pytest.approx([0.1, 0.15, 0.225, 0.3375])
        assert waits == sorted(waits)
        assert waits[-1] == 30.0

    @pytest.mark.parametrize("times", [1, 20])
    @pytest.mark.parametrize("double", [FailingDeletion, LostDeletionAnswer])
    async def test_a_deletion_that_fails_is_tried_again(
        self, double: type[FailingDeletion | LostDeletionAnswer], times: int
    ) -> None:
        long_term = double(times)
        changes, high_volume, _, log = make(long_term=long_term)
        await upload(long_term, OLD, NEW)
        await point(high_volume, NEW)
        async with changes.record(change()) as guard:
            guard.settled(True)

        await until(lambda: changes.pending == 0)

        assert long_term.failures == times
        await assert_nothing_left_over(high_volume, long_term, log)

    @pytest.mark.parametrize("times", [1, 20])
    async def test_so_is_a_row_that_cannot_be_read_and_an_entry_that_cannot_be_removed(self, times: int) -> None:
        high_volume, log = FailingRead(times), FailingRemoval(times)
        changes, _, long_term, _ = make(high_volume, log=log)
        await upload(long_term, OLD, NEW)
        async with changes.record(change()) as guard:
            guard.written()

        await until(lambda: changes.pending == 0)

        assert high_volume.failures == log.failures == times
        await assert_nothing_left_over(high_volume, long_term, log)

    async def test_a_stubborn_one_is_worth_one_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING, "consumer")
        changes, _, long_term, _ = make(long_term=FailingDeletion(50))
        async with changes.record(change()) as guard:
            guard.settled(True)

        await until(lambda: changes.pending == 0)

        assert len(caplog.records) == 1
        assert "trying on" in caplog.text
        assert isinstance(long_term, FailingDeletion)

    async def test_waiting_ones_hold_nobody_up(self) -> None:
        """More clean-ups than may work at a time fail for ever; one that can be done is done."""
        long_term = FailingDeletion()
        changes, *_, log = make(long_term=long_term)
        for _ in range(2 * ATTEMPTS_AT_ONCE):
            async with changes.record(change()) as guard:
                guard.settled(True)
        last = change(None, None)
        async with changes.record(last) as guard:
            guard.settled(True)

        await until(lambda: last.change_id not in log._changes)

        assert await log.count() == 2 * ATTEMPTS_AT_ONCE
        long_term.repair()
        await changes.join()
        assert await log.count() == 0

    async def test_no_more_than_a_bounded_number_work_at_a_time(self) -> None:
        working = most = 0

        class Counting(MemoryBackend):
            async def delete(self, revision: Revision) -> None:
                nonlocal working, most
                working += 1
                most = max(most, working)
                await asyncio.sleep(0)
                working -= 1

        changes, *_ = make(long_term=Counting())
        for _ in range(5 * ATTEMPTS_AT_ONCE):
            async with changes.record(change()) as guard:
                guard.settled(True)
        await changes.join()

        assert most == ATTEMPTS_AT_ONCE

    async def test_beyond_the_bound_entries_are_left_to_the_next_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Memory stays bounded when the long-term tier refuses deletions for good."""
        monkeypatch.setattr(change_log, "PENDING_MAX", 3)
        changes, *_, log = make(long_term=FailingDeletion())
        for _ in range(5):
            async with changes.record(change()) as guard:
                guard.settled(True)

        assert changes.pending == 3
        await changes.join()
        assert await log.count() == 5


class TestJoin:
    """TIER-17: waits for all, but not for ever."""

    async def test_waits_for_what_begins_meanwhile(self) -> None:
        changes, high_volume, long_term, log = make(long_term=LostDeletionAnswer(2))
        await upload(long_term, OLD)
        async with changes.record(change()) as guard:
            guard.settled(True)
            joining = asyncio.create_task(changes.join())
            await asyncio.sleep(0)
        await joining

        await changes.join()
        await assert_nothing_left_over(high_volume, long_term, log)

    async def test_ends_although_clean_up_keeps_failing(self, caplog: pytest.LogCaptureFixture) -> None:
        """TIER-13: the entry stays in the log, and a warning says so."""
        long_term = FailingDeletion()
        changes, _, _, log = make(long_term=long_term)
        async with changes.record(change()) as guard:
            guard.settled(True)
        await changes.join()

        assert long_term.failures == JOIN_ATTEMPTS
        assert await log.count() == 1
        assert changes.pending == 0
        assert "left to the next start" in caplog.text

    async def test_wakes_those_that_wait_for_their_next_attempt(self) -> None:
        """No join takes the 30 s a stubborn clean-up may be waiting."""
        long_term = FailingDeletion(1)
        changes, high_volume, _, log = make(long_term=long_term)
        changes._delay = lambda _failed: 3600.0
        await upload(long_term, OLD)
        async with changes.record(change()) as guard:
            guard.settled(True)
        await until(lambda: long_term.failures > 0)

        await changes.join()

        await assert_nothing_left_over(high_volume, long_term, log)

    async def test_ends_although_clean_up_hangs(self, caplog: pytest.LogCaptureFixture) -> None:
        changes, *_, log = make(long_term=HangingDeletion(), join_seconds=0.01)
        async with changes.record(change()) as guard:
            guard.settled(True)
        await changes.join()

        assert await log.count() == 1
        assert changes.pending == 0
        assert "left to the next start" in caplog.text

    async def test_may_be_repeated_and_leaves_the_log_usable(self) -> None:
        changes, high_volume, long_term, log = make()
        for _ in range(2):
            await upload(long_term, OLD)
            async with changes.record(change()) as guard:
                guard.settled(True)
            await changes.join()
            await assert_nothing_left_over(high_volume, long_term, log)

    def test_a_guard_left_with_no_loop_running_leaves_its_entry(self, caplog: pytest.LogCaptureFixture) -> None:
        """LOG-12: it does not crash; an error is logged."""
        changes, *_, log = make()

        async def begin() -> AsyncGenerator[ChangeGuard, None]:
            async with changes.record(change()) as guard:
                yield guard

        generator = begin()
        drive(generator.__anext__())
        with pytest.raises(StopIteration):
            generator.aclose().send(None)

        assert changes.pending == 0
        assert len(log._changes) == 1
        assert "no event loop" in caplog.text


def drive(step: Coroutine[Any, Any, object] | Any) -> object:
    """Run a step that waits for nothing, without a loop."""
    with pytest.raises(StopIteration) as ended:
        step.send(None)
    return ended.value.value


class TestRecovery:
    """LOG-5, LOG-6: it only removes."""

    @pytest.mark.parametrize("current", [OLD, NEW, OTHER, None])
    async def test_removes_what_the_row_does_not_point_to(self, current: Revision | None) -> None:
        changes, high_volume, long_term, log = make(log=InheritedChanges([change()]))
        await upload(long_term, OLD, NEW, OTHER)
        await point(high_volume, current)

        changes.start()
        await changes.join()

        assert revisions(long_term) == {OTHER.name} | ({current.name} if current else set())
        row = await high_volume.head_tiered(OBJECT)
        assert row == (DEFAULT_METADATA if current is None else Tombstone(current, DEFAULT_METADATA))
        assert await log.count() == 0

    async def test_twice_is_as_once(self) -> None:
        changes, high_volume, long_term, log = make(log=InheritedChanges([change()]))
        await upload(long_term, OLD, NEW)
        await point(high_volume, NEW)

        assert await changes.recover() == 1
        assert await changes.recover() == 0

        await assert_nothing_left_over(high_volume, long_term, log)

    async def test_two_at_once_do_no_harm(self) -> None:
        entries = [change() for _ in range(3)]
        first, high_volume, long_term, log = make(log=InheritedChanges(entries))
        second, *_ = make(high_volume, long_term, log)
        await upload(long_term, OLD, NEW)
        await point(high_volume, OLD)

        await asyncio.gather(first.recover(), second.recover())

        assert revisions(long_term) == {OLD.name}
        await assert_nothing_left_over(high_volume, long_term, log)

    async def test_goes_through_the_entries_one_at_a_time(self) -> None:
        """LOG-6."""
        working = most = 0

        class Counting(MemoryBackend):
            async def delete(self, revision: Revision) -> None:
                nonlocal working, most
                working += 1
                most = max(most, working)
                await asyncio.sleep(0)
                working -= 1

        changes, *_, log = make(long_term=Counting(), log=InheritedChanges(change() for _ in range(20)))
        changes.start()
        await changes.join()

        assert most == 1
        assert await log.count() == 0

    async def test_an_entry_that_fails_does_not_hold_up_the_next(self) -> None:
        long_term = FailingDeletion(1)
        changes, *_, log = make(long_term=long_term, log=InheritedChanges(change() for _ in range(3)))

        await changes.recover()
        assert await log.count() == 1

        await changes.join()
        assert await log.count() == 0

    async def test_any_number_of_entries_is_gone_through_in_bounded_parts(self) -> None:
        """Those that fail are in every part's way, and in nobody's."""

        class Asked(InheritedChanges):
            def __init__(self) -> None:
                super().__init__(change() for _ in range(10 * RECOVERABLE_MAX))
                self.parts: list[int] = []

            async def recoverable(self, after: UUID | None = None) -> Sequence[Change]:
                found = await super().recoverable(after)
                self.parts.append(len(found))
                return found

        log = Asked()
        long_term = FailingDeletion(times=RECOVERABLE_MAX + 7)
        changes, *_ = make(long_term=long_term, log=log)
        assert await changes.recover() == 10 * RECOVERABLE_MAX
        assert log.parts == [RECOVERABLE_MAX] * 10 + [0]
        await changes.join()

        assert await log.count() == 0

    async def test_a_join_does_not_wait_for_any_number_of_entries(self) -> None:
        """What has been claimed is finished; the rest is for the next start, and stays in the log."""
        long_term, log = PausedDeletion(), InheritedChanges(change() for _ in range(3 * RECOVERABLE_MAX))
        changes, *_ = make(long_term=long_term, log=log)
        changes.start()
        await long_term.reached.wait()
        joining = asyncio.create_task(changes.join())
        await until_idle()
        assert not joining.done()

        long_term.go_on.set()
        await joining

        assert await log.count() == 2 * RECOVERABLE_MAX

    async def test_a_log_that_cannot_be_read_is_tried_again(self) -> None:
        log = InheritedChanges([change()], times=7)
        changes, *_ = make(log=log)
        changes.start()
        await until(lambda: changes.pending == 0)

        assert log.failures == 7
        assert await log.count() == 0

    async def test_starts_once(self) -> None:
        changes, *_ = make()
        changes.start()
        changes.start()

        assert changes.pending == 1
        await changes.join()

    async def test_is_repeated_until_a_join(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An owner that dies later, or whose lease was not over at the start, is recovered too."""
        monkeypatch.setattr(change_log, "RECOVERY_SECONDS", 0.0)
        log = InheritedChanges([])
        changes, *_ = make(log=log)
        changes.start()
        await until(lambda: changes.pending == 0)
        left = change()
        log.inherited[left.change_id] = log._changes[left.change_id] = left

        await until(lambda: log._changes[left.change_id] != left)

        await changes.join()
        log._changes[left.change_id] = left
        await until_idle()
        assert log._changes[left.change_id] == left

    async def test_join_begins_it_where_nothing_has_yet(self) -> None:
        """LOG-6: made outside of a loop and never used."""
        changes, *_, log = make(log=InheritedChanges([change()]))

        await changes.join()

        assert await log.count() == 0

    async def test_an_entry_that_keeps_failing_has_one_task_however_often_recovery_meets_it(self) -> None:
        long_term = FailingDeletion()
        changes, *_, log = make(long_term=long_term, log=InheritedChanges([change()]))
        assert await changes.recover() == 1
        assert await changes.recover() == 0
        assert changes.pending == 1

        long_term.repair()
        await changes.join()
        assert await log.count() == 0

    async def test_removed_orphans_are_counted_and_routine_is_not(self) -> None:
        counts = Counts()
        high_volume, long_term = MemoryBackend(), MemoryBackend()
        changes = Changes(InheritedChanges([change()]), high_volume, long_term, counts=counts)
        await point(high_volume, OTHER)
        await changes.recover()
        assert counts.orphans_removed == 2

        async with changes.record(change()) as guard:
            guard.settled(True)
        await changes.join()
        assert counts.orphans_removed == 2


async def test_a_guard_is_an_async_context_manager() -> None:
    """What `async with` asks for, in its exact form."""
    changes, *_ = make()
    guard = changes.record(change())
    kind: type[BaseException] | None = None
    trace: TracebackType | None = None

    assert await guard.__aenter__() is guard
    assert await guard.__aexit__(kind, None, trace) is None  # type: ignore[func-returns-value]
    await changes.join()
