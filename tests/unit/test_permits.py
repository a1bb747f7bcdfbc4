"""Permits are counted, handed out whole or not at all, and never lost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from decimal import Decimal
from fractions import Fraction

import pytest

from consumer.errors import AtCapacity
from consumer.permits import (
    ConcurrencyLimiter,
    Partition,
    Reservation,
    WindowPlan,
    plan_windows,
    read_fraction,
    window_size,
)
from gates import settled


def started(awaitable: Awaitable[Reservation]) -> asyncio.Task[Reservation]:
    """Wait for a permit in a task of its own."""

    async def wait() -> Reservation:
        return await awaitable

    return asyncio.create_task(wait())


class TestWindowSize:
    """The share of the available permits that one assignment reserves."""

    @pytest.mark.parametrize(
        ("available", "window"),
        [
            *[(1, 1), (10, 1), (100, 10), (500, 50), (1000, 100)],
            *[(9, 1), (11, 2), (20, 2), (21, 3), (99, 10), (101, 11), (499, 50), (501, 51)],
        ],
    )
    def test_is_a_tenth_rounded_up(self, available: int, window: int) -> None:
        """WIN-1, WIN-2: the seed's values and their boundaries."""
        assert window_size(available) == window

    def test_is_nothing_only_of_nothing(self) -> None:
        """WIN-4, WIN-5: one permit gives a window of one, none gives none."""
        assert window_size(0) == 0
        assert [window_size(available, "0.001") for available in range(1, 1001)] == [1] * 1000

    @pytest.mark.parametrize(
        ("limit", "first", "reservations"),
        [
            (1, [1], 1),
            (10, [1] * 10, 10),
            (50, [5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2, 2], 22),
            (100, [10, 9, 9, 8, 7, 6, 6, 5, 4, 4, 4, 3], 28),
            (200, [20, 18, 17, 15, 13, 12, 11, 10, 9, 8, 7, 6], 35),
            (500, [50, 45, 41, 37, 33, 30, 27, 24, 22, 20, 18, 16], 43),
            (1000, [100, 90, 81, 73, 66, 59, 54, 48, 43, 39, 35, 32], 50),
        ],
    )
    def test_shrinks_from_one_reservation_to_the_next_until_all_is_taken(
        self, limit: int, first: list[int], reservations: int
    ) -> None:
        """WIN-3: the checklist's table of reservations held at once; the last one always takes the last permit."""
        limiter = ConcurrencyLimiter(limit)
        held = []
        while limiter.available:
            held.append(limiter.acquire_many_nowait(window_size(limiter.available)))

        windows = [reservation.permits for reservation in held]
        assert windows[: len(first)] == first
        assert windows[-1] == 1
        assert len(windows) == reservations
        assert sum(windows) == limit
        for reservation in held:
            reservation.release()

    @pytest.mark.parametrize("fraction", [0.1, "0.1", "1e-1", Decimal("0.10"), Fraction(1, 10)])
    def test_reads_floats_and_strings_as_decimals(self, fraction: Fraction | Decimal | float | str) -> None:
        """Contract 10: 0.1 is exactly a tenth; the float 0.1 is a little more, and 10 % of 10 would be 2."""
        assert read_fraction(fraction) == Fraction(1, 10)
        assert window_size(10, fraction) == 1

    @pytest.mark.parametrize("fraction", [0, -0.1, 1.0001, "2", math.nan, math.inf, "a tenth", ""])
    def test_refuses_what_is_no_share(self, fraction: float | str) -> None:
        """Contract 10: a fraction outside (0, 1] is a ValueError."""
        with pytest.raises(ValueError, match="window fraction"):
            window_size(100, fraction)

    def test_refuses_a_negative_number_of_permits(self) -> None:
        """Contract 10."""
        with pytest.raises(ValueError, match="not negative"):
            window_size(-1)

    def test_of_everything_is_everything(self) -> None:
        """Contract 4: the fraction 1 is allowed."""
        assert window_size(500, 1) == 500


class TestPlan:
    """Who gets how much when several partitions are assigned."""

    def test_partitions_reserve_in_sorted_order(self) -> None:
        """Contract 4, K-3: the same assignment gets the same windows, in whatever order it is told."""
        plan = plan_windows([("b", 0), ("a", 10), ("a", 2)], limit=100, available=100)

        assert list(plan.windows.items()) == [(("a", 2), 10), (("a", 10), 9), (("b", 0), 9)]
        assert not plan.divided_equally

    def test_nobody_is_left_with_nothing_where_all_can_have_something(self) -> None:
        """Contract 4, K-2: 44 partitions at limit 500, the case in which the share rule leaves the last one nothing."""
        partitions = [("t", number) for number in range(44)]

        plan = plan_windows(partitions, limit=500, available=500)

        assert plan.divided_equally
        assert sorted(set(plan.windows.values())) == [11, 12]
        assert sum(plan.windows.values()) == 500

    def test_the_last_one_waits_where_that_is_wanted(self) -> None:
        """Contract 4: ``window.exhausted: pause`` is the reference's behaviour."""
        partitions = [("t", number) for number in range(44)]

        plan = plan_windows(partitions, limit=500, available=500, exhausted="pause")

        assert not plan.divided_equally
        assert plan.windows["t", 0] == 50
        assert [partition for partition, window in plan.windows.items() if window == 0] == [("t", 43)]

    def test_more_partitions_than_permits_leaves_the_last_ones_waiting(self) -> None:
        """Contract 4: there is no permit to divide."""
        plan = plan_windows([("t", number) for number in range(5)], limit=3, available=3)

        assert list(plan.windows.values()) == [1, 1, 1, 0, 0]

    def test_an_equal_share_divides_the_limit(self) -> None:
        """Contract 4: ``window.policy: equal-share``; what is left over goes to the first ones."""
        plan = plan_windows([("t", 0), ("t", 1), ("t", 2)], limit=500, available=500, policy="equal-share")

        assert plan == WindowPlan({("t", 0): 167, ("t", 1): 167, ("t", 2): 166}, divided_equally=False)

    def test_an_equal_share_takes_no_more_than_there_is(self) -> None:
        """Contract 3: older work may still hold permits when new partitions reserve."""
        plan = plan_windows([("t", 0), ("t", 1)], limit=500, available=10, policy="equal-share")

        assert list(plan.windows.values()) == [5, 5]

    @pytest.mark.parametrize("policy", ["share-of-available", "equal-share"])
    def test_a_window_has_its_largest_size(self, policy: str) -> None:
        """Contract 4: the ordering ``partition`` has window 1, and takes no more than that from the others."""
        plan = plan_windows(
            [("t", 0), ("t", 1)],
            limit=500,
            available=500,
            window_max=1,
            policy=policy,  # type: ignore[arg-type]  # the parametrisation knows only str
        )

        assert list(plan.windows.values()) == [1, 1]

    def test_of_no_partitions_is_empty(self) -> None:
        """A member may own nothing."""
        nobody: list[Partition] = []

        assert plan_windows(nobody, limit=5, available=5).windows == {}
        assert plan_windows(nobody, limit=5, available=5, policy="equal-share").windows == {}


class TestLimiter:
    """Acquisitions, bulk and single."""

    def test_has_500_permits_and_no_queue_unless_told_otherwise(self) -> None:
        """WIN-9, LIM-2."""
        limiter = ConcurrencyLimiter()

        assert (limiter.limit, limiter.queue, limiter.available, limiter.in_use, limiter.queued) == (500, 0, 500, 0, 0)

    @pytest.mark.parametrize(("limit", "queue"), [(-1, 0), (1, -1)])
    def test_refuses_negative_sizes(self, limit: int, queue: int) -> None:
        """A limiter that could never grant would hang everything."""
        with pytest.raises(ValueError, match="not negative"):
            ConcurrencyLimiter(limit, queue)

    def test_tells_its_numbers(self) -> None:
        """A debug form that answers the first question."""
        limiter = ConcurrencyLimiter(5)
        reservation = limiter.acquire_many_nowait(2)

        assert repr(limiter) == "<ConcurrencyLimiter 2 of 5 permits in use, 0 queued>"
        assert repr(reservation) == "<Reservation of 2 permits>"
        reservation.release()

    def test_a_bulk_acquisition_takes_all_or_nothing(self) -> None:
        """RES-1, LIM-7, LIM-8, LIM-10."""
        limiter = ConcurrencyLimiter(10, queue=5)
        reservation = limiter.acquire_many_nowait(7)
        assert (limiter.in_use, limiter.available, limiter.queued) == (7, 3, 0)

        with pytest.raises(AtCapacity):
            limiter.acquire_many_nowait(4)
        assert (limiter.in_use, limiter.available, limiter.queued) == (7, 3, 0)

        with limiter.acquire_many_nowait(3):
            assert limiter.available == 0
        reservation.release()
        assert limiter.available == 10

    @pytest.mark.parametrize("count", [0, -1])
    def test_a_bulk_acquisition_is_of_at_least_one(self, count: int) -> None:
        """Contract 10: ``acquire_many_nowait(0)`` and negative counts are ValueErrors, and no rejection."""
        limiter = ConcurrencyLimiter(1)

        with pytest.raises(ValueError, match="at least 1"):
            limiter.acquire_many_nowait(count)
        assert limiter.rejected == 0

    def test_rejections_and_permits_are_counted(self) -> None:
        """WIN-8: one count for each rejection; acquired minus released is what is in use."""
        limiter = ConcurrencyLimiter(3)
        with limiter.acquire_many_nowait(2):
            for _ in range(2):
                with pytest.raises(AtCapacity):
                    limiter.acquire_many_nowait(2)

        assert (limiter.rejected, limiter.acquired_total, limiter.released_total) == (2, 2, 2)

    async def test_of_nothing_rejects_at_once_even_with_a_queue(self) -> None:
        """LIM-3."""
        limiter = ConcurrencyLimiter(0, queue=5)

        with pytest.raises(AtCapacity):
            await limiter.acquire(timeout=30)
        assert limiter.rejected == 1

    async def test_a_free_permit_is_granted_at_once_without_patience(self) -> None:
        """LIM-5; both spellings of contract 10 work, and the second gives the permit back."""
        limiter = ConcurrencyLimiter(1)

        reservation = await limiter.acquire()
        assert (reservation.permits, limiter.in_use) == (1, 1)
        reservation.release()

        async with limiter.acquire(timeout=0) as reservation:
            assert (reservation.permits, limiter.in_use) == (1, 1)
        assert limiter.in_use == 0

    async def test_async_with_gives_back_what_an_error_leaves_behind(self) -> None:
        """LIM-9."""
        limiter = ConcurrencyLimiter(1)

        with pytest.raises(KeyError):
            async with limiter.acquire():
                raise KeyError

        assert limiter.in_use == 0

    async def test_a_full_one_without_a_queue_rejects_at_once_whatever_the_patience(self) -> None:
        """LIM-4, contract 10: with ``queue=0``, ``acquire(timeout=30)`` on a full limiter fails at once."""
        limiter = ConcurrencyLimiter(1)
        async with limiter.acquire():
            with pytest.raises(AtCapacity):
                await asyncio.wait_for(limiter.acquire(timeout=30), 5)

    @pytest.mark.parametrize("patience", [0, -1, math.nan])
    async def test_without_patience_nobody_queues(self, patience: float) -> None:
        """LIM-2: try or reject."""
        limiter = ConcurrencyLimiter(1, queue=1)
        async with limiter.acquire():
            with pytest.raises(AtCapacity):
                await limiter.acquire(timeout=patience)
        assert limiter.queued == 0

    async def test_the_queue_takes_its_size_and_rejects_the_next(self) -> None:
        """LIM-1, LIM-10, LIM-13: at most limit + queue acquirers are accepted."""
        limiter = ConcurrencyLimiter(1, queue=2)
        reservation = await limiter.acquire()
        first, second = started(limiter.acquire(30)), started(limiter.acquire(30))
        await settled()
        assert (limiter.in_use, limiter.queued) == (1, 2)

        with pytest.raises(AtCapacity):
            await limiter.acquire(timeout=30)

        reservation.release()
        (await first).release()
        (await second).release()
        assert (limiter.in_use, limiter.queued) == (0, 0)

    async def test_waiters_are_served_in_order_of_arrival(self) -> None:
        """LIM-9: a release hands its permit to the one who waits longest, before anybody else can take it."""
        limiter = ConcurrencyLimiter(1, queue=2)
        reservation = await limiter.acquire()
        first, second = started(limiter.acquire(math.inf)), started(limiter.acquire(30))
        await settled()

        reservation.release()
        assert limiter.available == 0
        with pytest.raises(AtCapacity):
            limiter.acquire_many_nowait(1)
        reservation = await first
        assert not second.done()
        reservation.release()
        (await second).release()

    async def test_a_waiter_whose_patience_ends_is_rejected(self) -> None:
        """LIM-4: the timeout gives at-capacity, and the place in the queue is free."""
        limiter = ConcurrencyLimiter(1, queue=1)
        async with limiter.acquire():
            with pytest.raises(AtCapacity):
                await limiter.acquire(timeout=0.001)

            assert (limiter.queued, limiter.rejected) == (0, 1)
        assert limiter.in_use == 0

    async def test_a_cancelled_waiter_frees_its_place(self) -> None:
        """LIM-6."""
        limiter = ConcurrencyLimiter(1, queue=1)
        async with limiter.acquire():
            waiter = started(limiter.acquire(30))
            await settled()
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
            assert limiter.queued == 0
        assert limiter.in_use == 0

    async def test_a_permit_handed_to_a_waiter_cancelled_in_the_same_turn_goes_on(self) -> None:
        """LIM-6: it is never lost between the two; the next in line gets it."""
        limiter = ConcurrencyLimiter(1, queue=2)
        reservation = await limiter.acquire()
        first, second = started(limiter.acquire(30)), started(limiter.acquire(30))
        await settled()

        reservation.release()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        (await second).release()
        assert limiter.in_use == 0

    async def test_a_waiter_cancelled_before_the_release_is_passed_over(self) -> None:
        """LIM-6: as above, in the other order."""
        limiter = ConcurrencyLimiter(1, queue=2)
        reservation = await limiter.acquire()
        first, second = started(limiter.acquire(30)), started(limiter.acquire(30))
        await settled()

        first.cancel()
        reservation.release()
        (await second).release()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (limiter.in_use, limiter.queued) == (0, 0)

    async def test_waiting_for_all_permits_ends_with_the_last_one(self) -> None:
        """LIM-11."""
        limiter = ConcurrencyLimiter(2)
        await asyncio.wait_for(limiter.wait_all_released(), 5)
        first, second = limiter.acquire_many_nowait(1), limiter.acquire_many_nowait(1)
        waiting = [asyncio.create_task(limiter.wait_all_released()) for _ in range(2)]
        await settled()

        first.release()
        await settled()
        assert not any(task.done() for task in waiting)
        second.release()
        await asyncio.gather(*waiting)

    async def test_waiting_for_all_permits_can_be_cancelled(self) -> None:
        """It leaves nothing behind for a later release to stumble over."""
        limiter = ConcurrencyLimiter(1)
        reservation = limiter.acquire_many_nowait(1)
        waiting = asyncio.create_task(limiter.wait_all_released())
        await settled()
        waiting.cancel()
        await asyncio.wait([waiting])

        reservation.release()

        assert waiting.cancelled()
        assert limiter._idle_waiters == []

    def test_an_acquisition_that_is_not_awaited_takes_nothing(self) -> None:
        """Contract 10: it begins with the ``await`` or ``async with``."""
        limiter = ConcurrencyLimiter(1)
        _ = limiter.acquire()

        assert limiter.available == 1


class TestReservation:
    """Permits with one holder."""

    def test_is_released_once(self) -> None:
        """RES-8, contract 10: a second call does nothing."""
        limiter = ConcurrencyLimiter(5)
        reservation = limiter.acquire_many_nowait(3)

        reservation.release()
        reservation.release()

        assert (limiter.available, limiter.released_total, reservation.permits) == (5, 3, 0)

    async def test_is_a_context_of_both_kinds(self) -> None:
        """Contract 10."""
        limiter = ConcurrencyLimiter(5)

        with limiter.acquire_many_nowait(2) as reservation:
            assert limiter.in_use == reservation.permits == 2
        async with limiter.acquire_many_nowait(3) as reservation:
            assert limiter.in_use == reservation.permits == 3

        assert limiter.in_use == 0

    def test_shrinks_to_what_still_runs(self) -> None:
        """Contract 3: at the drain deadline; it never grows."""
        limiter = ConcurrencyLimiter(10)
        reservation = limiter.acquire_many_nowait(8)

        reservation.shrink(3)
        assert (reservation.permits, limiter.in_use) == (3, 3)
        reservation.shrink(5)
        assert (reservation.permits, limiter.in_use) == (3, 3)
        with pytest.raises(ValueError, match="0 or more"):
            reservation.shrink(-1)
        reservation.release()
        assert limiter.in_use == 0

    def test_forgotten_ones_give_their_permits_back_and_warn(self) -> None:
        """A defect of the owner must not cost the process its capacity."""
        limiter = ConcurrencyLimiter(10)
        reservation = limiter.acquire_many_nowait(8)

        with pytest.warns(ResourceWarning, match="unreleased reservation of 8 permits"):
            del reservation

        assert limiter.available == 10

    async def test_forgotten_ones_wake_who_waits(self) -> None:
        """As a release does."""
        limiter = ConcurrencyLimiter(1, queue=1)
        reservation = limiter.acquire_many_nowait(1)
        waiter = started(limiter.acquire(30))
        await settled()

        with pytest.warns(ResourceWarning):
            del reservation

        (await waiter).release()

    async def test_forgotten_ones_may_be_collected_on_another_thread(self) -> None:
        """The garbage collector runs anywhere; waiters are woken on their own loop."""
        limiter = ConcurrencyLimiter(1, queue=1)
        held = [limiter.acquire_many_nowait(1)]
        waiter = started(limiter.acquire(30))
        await settled()

        with pytest.warns(ResourceWarning):
            await asyncio.to_thread(held.clear)

        (await asyncio.wait_for(waiter, 10)).release()
        assert limiter.in_use == 0

    def test_forgotten_ones_give_back_after_the_loop_of_the_waiters_is_closed(self) -> None:
        """There is nobody left to wake."""
        limiter = ConcurrencyLimiter(1, queue=1)
        reservation = limiter.acquire_many_nowait(1)
        loop = asyncio.new_event_loop()
        waiter = loop.create_future()
        limiter._waiters.append(waiter)
        loop.close()

        with pytest.warns(ResourceWarning):
            del reservation

        assert limiter.available == 1
