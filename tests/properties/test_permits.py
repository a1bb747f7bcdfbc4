"""Permits are conserved whatever is acquired, cancelled, released or forgotten, in whatever order."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from fractions import Fraction
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from consumer.errors import AtCapacity
from consumer.permits import ConcurrencyLimiter, Partition, Reservation, WindowPolicy, plan_windows, window_size

FRACTIONS = st.fractions(min_value=Fraction(1, 10_000), max_value=1).filter(lambda fraction: fraction > 0)

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("bulk"), st.integers(1, 12)),
        st.tuples(st.just("single"), st.sampled_from([0, 30])),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("release"), st.integers(0, 9)),
        st.tuples(st.just("shrink"), st.integers(0, 9)),
        st.tuples(st.just("forget"), st.integers(0, 9)),
        st.tuples(st.just("turn"), st.just(0)),
    ),
    max_size=60,
)


@given(available=st.integers(0, 100_000), fraction=FRACTIONS)
def test_a_window_is_the_share_rounded_up(available: int, fraction: Fraction) -> None:
    """WIN-1, WIN-5: against exact rational arithmetic; never more than there is."""
    window = window_size(available, fraction)

    assert window == ceil(available * fraction)
    assert (window == 0) == (available == 0)
    assert window <= available


@given(st.integers(0, 99_999))
def test_a_tenth_is_what_floats_say_where_floats_are_right(available: int) -> None:
    """WIN-1: the checklist's note, below 100,000."""
    assert window_size(available, 0.1) == ceil(available * 0.10)


@given(
    partitions=st.sets(st.tuples(st.sampled_from("ab"), st.integers(0, 60)), max_size=60),
    limit=st.integers(1, 600),
    held=st.integers(0, 600),
    fraction=FRACTIONS,
    policy=st.sampled_from(["share-of-available", "equal-share"]),
    window_max=st.sampled_from([None, 1, 7]),
)
def test_a_plan_can_always_be_reserved(
    partitions: set[Partition], limit: int, held: int, fraction: Fraction, policy: WindowPolicy, window_max: int | None
) -> None:
    """K-2, K-3: never more than is available, a window for each where there are permits for all, in any order asked."""
    limiter = ConcurrencyLimiter(limit)
    older = limiter.acquire_many_nowait(min(held, limit)) if held else None
    available = limiter.available

    def plan(order: list[Partition]) -> dict[Partition, int]:
        return plan_windows(
            order, limit=limit, available=available, fraction=fraction, policy=policy, window_max=window_max
        ).windows

    windows = plan(sorted(partitions))
    assert plan(sorted(partitions, reverse=True)) == windows
    assert list(windows) == sorted(partitions)
    if available >= len(partitions):
        assert 0 not in windows.values()
    else:
        assert sorted(set(windows.values())) in ([0], [0, 1])
    reservations = [limiter.acquire_many_nowait(window) for window in windows.values() if window]
    for reservation in [*reservations, *([] if older is None else [older])]:
        reservation.release()
    assert limiter.available == limit


class Model:
    """Drives one limiter and knows what is held."""

    def __init__(self, limit: int, queue: int) -> None:
        self.limiter = ConcurrencyLimiter(limit, queue)
        self.held: list[Reservation] = []
        self.waiting: list[asyncio.Task[Reservation]] = []

    def check(self) -> None:
        """Compare what the limiter says with what is held."""
        limiter = self.limiter
        assert 0 <= limiter.in_use <= limiter.limit
        assert limiter.in_use + limiter.available == limiter.limit
        assert limiter.acquired_total - limiter.released_total == limiter.in_use
        assert 0 <= limiter.queued <= limiter.queue
        assert limiter.queued == 0 or limiter.available == 0
        # Permits handed to tasks that have not run yet are held too.
        assert limiter.in_use >= sum(reservation.permits for reservation in self.held)

    async def settle(self) -> None:
        """Let all tasks run that can, and take what they got."""
        for _ in range(5):
            await asyncio.sleep(0)
        for task in [task for task in self.waiting if task.done()]:
            self.waiting.remove(task)
            if not task.cancelled() and task.exception() is None:
                self.held.append(task.result())
        assert self.limiter.in_use == sum(reservation.permits for reservation in self.held)

    async def step(self, name: str, number: int) -> None:
        """Make one step."""
        limiter = self.limiter
        match name:
            case "bulk":
                available = limiter.available
                try:
                    self.held.append(limiter.acquire_many_nowait(number))
                except AtCapacity:
                    assert number > available
                else:
                    assert number <= available
            case "single":

                async def wait() -> Reservation:
                    return await limiter.acquire(number)

                self.waiting.append(asyncio.create_task(wait()))
            case "cancel" if self.waiting:
                self.waiting[number % len(self.waiting)].cancel()
            case "release" if self.held:
                self.held.pop(number % len(self.held)).release()
            case "shrink" if self.held:
                self.held[number % len(self.held)].shrink(number // 2)
            case "forget" if self.held:
                with warnings.catch_warnings(record=True):
                    warnings.simplefilter("always")
                    self.held.pop(number % len(self.held))
            case "turn":
                await self.settle()
            case _:
                pass


@given(limit=st.integers(0, 20), queue=st.integers(0, 4), steps=STEPS)
def test_permits_are_conserved(limit: int, queue: int, steps: list[tuple[str, int]]) -> None:
    """RES-1, RES-8, LIM-1 … LIM-11, LIM-13: random acquisitions, cancellations, releases, checked after each step."""

    async def drive() -> None:
        model = Model(limit, queue)
        for name, number in steps:
            await model.step(name, number)
            model.check()
        while model.waiting or model.held:
            await model.settle()
            for task in model.waiting:
                task.cancel()
            for reservation in model.held:
                reservation.release()
            model.held.clear()
        assert (model.limiter.available, model.limiter.queued) == (limit, 0)
        await model.limiter.wait_all_released()

    run(drive)


@given(st.lists(st.integers(0, 12), max_size=40))
def test_waiters_are_served_in_order(moments: list[int]) -> None:
    """LIM-9: whoever came first goes first, with cancellations in between."""

    async def drive() -> None:
        limiter = ConcurrencyLimiter(1, queue=100)
        served: list[int] = []

        async def serve(number: int) -> None:
            async with limiter.acquire(30):
                served.append(number)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(serve(number)) for number in range(len(moments))]
        for number, moment in sorted(enumerate(moments), key=lambda pair: pair[1]):
            if moment > 6:
                tasks[number].cancel()
            await asyncio.sleep(0)
        await asyncio.wait(tasks) if tasks else None

        assert served == sorted(served)
        assert limiter.in_use == limiter.queued == 0

    run(drive)


def run(drive: Callable[[], object]) -> None:
    """Run one example in an event loop of its own."""
    asyncio.run(drive())  # type: ignore[arg-type]  # a coroutine function
