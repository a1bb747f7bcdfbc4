"""Every change log keeps what was recorded and hands it to one recoverer: LOG-1 to LOG-4, LOG-14."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import UUID

from consumer.ids import ObjectId
from consumer.storage.backend import RECOVERABLE_MAX, Change, ChangeLog
from consumer.storage.revision import new_revision, uuid7

AnId: TypeAlias = Callable[..., ObjectId]
OpenLog: TypeAlias = Callable[..., ChangeLog]


def a_change(object_id: ObjectId, *, new: bool = True, old: bool = True) -> Change:
    """Return a change nobody has recorded before."""
    new_one, old_one = (new_revision(object_id) if wanted else None for wanted in (new, old))
    return Change(uuid7(), object_id, new_one, old_one)


def ids(changes: Any) -> list[UUID]:
    """Return the changes' ids in order, to compare lists that have none."""
    return sorted(change.change_id for change in changes)


class TestEntries:
    """What holds for every log, durable or not."""

    async def test_what_is_recorded_counts_until_it_is_removed(self, open_log: OpenLog, an_id: AnId) -> None:
        """LOG-2, LOG-3."""
        log = open_log()
        changes = [a_change(an_id(str(number))) for number in range(5)]
        assert await log.count() == 0
        for change in changes:
            await log.record(change)
        assert await log.count() == 5

        await log.remove(changes[0].change_id)
        await log.remove(changes[0].change_id)

        assert await log.count() == 4

    async def test_removing_what_was_never_there_is_a_success(self, open_log: OpenLog) -> None:
        """LOG-3."""
        await open_log().remove(uuid7())

    async def test_recording_again_is_recording_once(self, open_log: OpenLog, an_id: AnId) -> None:
        """A retry after a lost answer."""
        log = open_log()
        change = a_change(an_id())
        await log.record(change)
        await log.record(change)

        assert await log.count() == 1

    async def test_an_entry_of_its_own_is_never_recoverable(self, open_log: OpenLog, an_id: AnId) -> None:
        """A change begun after construction is never collected while it is worked on, however often recovery runs."""
        log = open_log(owner="me")
        assert list(await log.recoverable()) == []
        await log.record(a_change(an_id()))

        assert list(await log.recoverable()) == []
        assert list(await log.recoverable()) == []

    async def test_postponing_replaces_what_was_said(self, open_log: OpenLog, an_id: AnId, clock: Any) -> None:
        """The entry names only what is kept and from when it may go; a late repetition of the first changes nothing."""
        log = open_log()
        change = a_change(an_id())
        await log.record(change)
        kept = replace(change, new=None, not_before=clock() + timedelta(seconds=60))
        await log.record(kept)
        await log.record(change)
        clock.advance(60)

        assert list(await log.recoverable()) == [kept]
        assert await log.count() == 1

    async def test_a_postponed_entry_is_nobodys_before_its_time_and_anybodys_then(
        self, open_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """LOG-4: to the microsecond; then its own instance may have it too, again and again until it is removed."""
        log = open_log()
        postponed = replace(a_change(an_id()), not_before=clock() + timedelta(seconds=3600, microseconds=1))
        await log.record(postponed)
        await log.record(a_change(an_id("being worked on")))

        clock.advance(3600)
        assert list(await log.recoverable()) == []
        assert await log.count() == 1, "what waits for its time is no work"
        clock.advance(0.000001)
        assert list(await log.recoverable()) == [postponed]
        assert list(await log.recoverable()) == [postponed]
        assert await log.count() == 2
        await log.remove(postponed.change_id)
        assert list(await log.recoverable()) == []

    async def test_owners_by_default_differ(self, open_log: OpenLog) -> None:
        assert open_log().owner != open_log().owner

    async def test_the_owner_given_is_the_owner(self, open_log: OpenLog) -> None:
        assert open_log(owner="pod-7").owner == "pod-7"

    async def test_it_can_be_used_after_a_join(self, open_log: OpenLog, an_id: AnId) -> None:
        log = open_log()
        await log.join()
        await log.record(a_change(an_id()))
        await log.join()

        assert await log.count() == 1

    async def test_closing_twice_is_closing_once(self, open_log: OpenLog, an_id: AnId) -> None:
        log = open_log()
        await log.record(a_change(an_id()))
        await log.close()
        await log.close()


class TestRecovery:
    """What holds for those that outlive their process."""

    async def test_a_restart_under_the_same_owner_does_not_wait_for_the_lease(
        self, open_durable_log: OpenLog, an_id: AnId
    ) -> None:
        """Contract 10; every combination of revisions comes back as it was recorded."""
        dead = open_durable_log(owner="me")
        changes = [a_change(an_id("both")), a_change(an_id("new"), old=False), a_change(an_id("old"), new=False)]
        for change in changes:
            await dead.record(change)

        restarted = open_durable_log(owner="me")

        recovered = {change.change_id: change for change in await restarted.recoverable()}
        assert recovered == {change.change_id: change for change in changes}
        assert await restarted.count() == 3

    async def test_what_is_recorded_after_a_log_was_made_is_not_its_to_recover(
        self, open_durable_log: OpenLog, an_id: AnId
    ) -> None:
        """Contract 10: recovery touches only entries that existed before it began."""
        earlier = open_durable_log(owner="me")
        before, after = a_change(an_id("before")), a_change(an_id("after"))
        await earlier.record(before)
        later = open_durable_log(owner="me")
        await earlier.record(after)

        assert ids(await later.recoverable()) == [before.change_id]

    async def test_a_living_owners_entries_are_its_own(
        self, open_durable_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """LOG-14."""
        living = open_durable_log(owner="living", lease_seconds=30.0)
        await living.record(a_change(an_id()))
        clock.advance(29.9)

        assert list(await open_durable_log(owner="other").recoverable()) == []

    async def test_a_dead_owners_entries_go_to_who_asks_first(
        self, open_durable_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """LOG-14: the claim comes first, then nobody else gets them."""
        dead = open_durable_log(owner="dead", lease_seconds=30.0)
        change = a_change(an_id())
        await dead.record(change)
        clock.advance(30.1)
        first, second = open_durable_log(owner="first"), open_durable_log(owner="second")

        assert list(await first.recoverable()) == [change]
        assert list(await second.recoverable()) == []
        assert (await first.count(), await dead.count()) == (1, 0)

    async def test_of_many_recoverers_at_once_each_entry_goes_to_one(
        self, open_durable_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        dead = open_durable_log(owner="dead", lease_seconds=30.0)
        changes = [a_change(an_id(str(number))) for number in range(50)]
        for change in changes:
            await dead.record(change)
        clock.advance(30.1)
        recoverers = [open_durable_log(owner=f"r{number}") for number in range(8)]

        claimed = await asyncio.gather(*(recoverer.recoverable() for recoverer in recoverers))

        assert ids(change for part in claimed for change in part) == ids(changes)

    async def test_an_interrupted_recovery_can_be_begun_again(
        self, open_durable_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """What was claimed and is not removed is returned again; what is removed is not."""
        dead = open_durable_log(owner="dead", lease_seconds=30.0)
        done, left = a_change(an_id("done")), a_change(an_id("left"))
        await dead.record(done)
        await dead.record(left)
        clock.advance(30.1)
        recoverer = open_durable_log(owner="recoverer")
        assert len(await recoverer.recoverable()) == 2
        await recoverer.record(a_change(an_id("own")))
        await recoverer.remove(done.change_id)

        assert list(await recoverer.recoverable()) == [left]

    async def test_a_recoverer_that_dies_leaves_its_claims_to_the_next(
        self, open_durable_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        change = a_change(an_id())
        await open_durable_log(owner="first", lease_seconds=30.0).record(change)
        clock.advance(30.1)
        assert list(await open_durable_log(owner="second", lease_seconds=30.0).recoverable()) == [change]
        clock.advance(30.1)

        assert list(await open_durable_log(owner="third").recoverable()) == [change]

    async def test_recording_renews_the_lease(self, open_durable_log: OpenLog, an_id: AnId, clock: Any) -> None:
        living = open_durable_log(owner="living", lease_seconds=30.0)
        await living.record(a_change(an_id("one")))
        clock.advance(29)
        await living.record(a_change(an_id("two")))
        clock.advance(29)

        assert list(await open_durable_log(owner="other").recoverable()) == []

    async def test_what_a_clean_end_leaves_may_be_recovered_at_once(
        self, open_durable_log: OpenLog, an_id: AnId
    ) -> None:
        """TIER-13: a clean-up that kept failing stays in the log; its owner is gone for good."""
        ended = open_durable_log(owner="ended")
        change = a_change(an_id())
        await ended.record(change)
        await ended.join()

        assert list(await open_durable_log(owner="other").recoverable()) == [change]

    async def test_any_number_of_entries_comes_in_bounded_parts(
        self, open_durable_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """Each entry once, in the order of their ids; one that stays does not hold up those behind it."""
        dead = open_durable_log(owner="dead", lease_seconds=30.0)
        changes = [a_change(an_id(str(number))) for number in range(RECOVERABLE_MAX + 20)]
        await asyncio.gather(*(dead.record(change) for change in changes))
        clock.advance(30.1)
        recoverer = open_durable_log(owner="recoverer", lease_seconds=1e6)

        first = list(await recoverer.recoverable())
        assert await recoverer.count() == len(first) == RECOVERABLE_MAX, "no more is claimed than is returned"
        rest = list(await recoverer.recoverable(first[-1].change_id))
        assert list(await recoverer.recoverable(rest[-1].change_id)) == []

        assert [change.change_id for change in first + rest] == ids(changes)
        assert list(await recoverer.recoverable()) == first, "a recovery that begins anew begins at the first"

    async def test_a_postponed_entry_outlives_its_owner_and_waits_all_the_same(
        self, open_durable_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """LOG-2, LOG-4: neither a restart nor the end of a lease makes it come earlier, or later."""
        postponed = replace(a_change(an_id()), not_before=clock() + timedelta(seconds=100))
        dead = open_durable_log(owner="me", lease_seconds=30.0)
        await dead.record(postponed)
        await dead.close()
        clock.advance(99)

        assert list(await open_durable_log(owner="me").recoverable()) == []
        assert list(await open_durable_log(owner="other").recoverable()) == []
        clock.advance(1)
        assert list(await open_durable_log(owner="third").recoverable()) == [postponed]

    async def test_a_due_entry_goes_to_one_and_from_the_dead_to_the_next(
        self, open_durable_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """LOG-14."""
        recorder = open_durable_log(owner="recorder", lease_seconds=1e6)
        postponed = replace(a_change(an_id()), not_before=clock())
        await recorder.record(postponed)
        claimer = open_durable_log(owner="claimer", lease_seconds=30.0)

        assert list(await claimer.recoverable()) == [postponed]
        assert list(await recorder.recoverable()) == []
        assert list(await open_durable_log(owner="third").recoverable()) == []
        clock.advance(30.1)
        assert list(await open_durable_log(owner="fourth").recoverable()) == [postponed]

    async def test_a_recovered_entry_can_be_postponed(
        self, open_durable_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """It is not claimed any more: whoever recovers when it is due gets it."""
        change = a_change(an_id())
        await open_durable_log(owner="me").record(change)
        restarted = open_durable_log(owner="me", lease_seconds=1e6)
        assert list(await restarted.recoverable()) == [change]
        postponed = replace(change, new=None, not_before=clock() + timedelta(seconds=60))
        await restarted.record(postponed)

        assert list(await restarted.recoverable()) == []
        clock.advance(60)
        assert list(await open_durable_log(owner="other").recoverable()) == [postponed]

    async def test_an_entry_survives_the_closing_of_everything(
        self, open_durable_log: OpenLog, an_id: AnId
    ) -> None:
        """LOG-1."""
        log = open_durable_log(owner="me")
        change = a_change(an_id("\N{SNOWMAN} é/../x"))
        await log.record(change)
        await log.close()

        assert list(await open_durable_log(owner="me").recoverable()) == [change]
