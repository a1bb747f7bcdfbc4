"""Permits: how much work one process may have in flight, and who holds which part of it.

A *permit* is the right to run one operation now. The limiter counts them; a *reservation* holds some, from the moment
it is granted until it is released.

* **Bulk** (``acquire_many_nowait``), for an assignment's window: all permits asked for, at once, or ``AtCapacity`` and
  nothing taken (RES-1, LIM-7). It never waits and never queues.
* **Single** (``acquire``), for one operation:

  1. A permit is free: granted at once, with any timeout (LIM-5).
  2. None is free, the queue has no room: ``AtCapacity`` at once, whatever the timeout (LIM-4, LIM-13).
  3. Queued: granted in order of arrival, by being handed the permit of a release; or the timeout passes:
     ``AtCapacity``; or the waiter is cancelled: its place in the queue is free again (LIM-6), and a permit it had been
     handed but not seen goes to the next.

  A permit is free only while nobody waits, so a bulk acquisition can never pass a waiter, and one that fails leaves
  the queue as it was (LIM-8).
* **Release** gives all permits of a reservation back together; a second call does nothing. A reservation that is
  garbage-collected unreleased gives them back too, with a ``ResourceWarning``: it is a defect of its owner, but not
  one that may cost the process its capacity.

The *window* of an assignment is a share of the permits available when it reserves (:func:`window_size`); which
partition gets how much at an assignment of several is :func:`plan_windows`.

All counts are plain integers, read by metrics when they are scraped. One event loop, one thread; only the garbage
collector may call from elsewhere.
"""

from __future__ import annotations

import asyncio
import math
import operator
import warnings
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from consumer.errors import AtCapacity

Partition: TypeAlias = tuple[str, int]
"""Topic and partition number."""
WindowPolicy: TypeAlias = Literal["share-of-available", "equal-share"]
WindowExhausted: TypeAlias = Literal["equal-share", "pause"]

LIMIT_DEFAULT = 500
"""Permits of a process (WIN-9)."""
FRACTION_DEFAULT = Fraction(1, 10)
"""Share of the available permits that one assignment reserves (WIN-1)."""


def read_fraction(value: Fraction | Decimal | float | str) -> Fraction:
    """Read a window fraction; floats and strings count as the decimal they are written as, so 0.1 is exactly 1/10.

    Raises:
        ValueError: *value* is no number, or not within (0, 1].
    """
    try:
        fraction = value if isinstance(value, Fraction) else Fraction(Decimal(str(value)))
    except (InvalidOperation, ValueError, OverflowError):
        raise ValueError(f"a window fraction is a number, not {value!r}") from None
    if not 0 < fraction <= 1:
        raise ValueError(f"a window fraction is above 0 and at most 1, not {value}")
    return fraction


def window_size(available: int, fraction: Fraction | Decimal | float | str = FRACTION_DEFAULT) -> int:
    """Return the window for *available* permits: their share, rounded up, in integer arithmetic (WIN-1 … WIN-5).

    Args:
        available: Permits to be had now, not negative.
        fraction: Share within (0, 1]; floats and strings are read as decimals.

    Returns:
        At least 1 and at most *available*; 0 only for 0.

    Raises:
        ValueError: *available* is negative or *fraction* is not within (0, 1].
    """
    permits = operator.index(available)
    if permits < 0:
        raise ValueError(f"available permits are not negative: {permits}")
    share = read_fraction(fraction)
    return -(-permits * share.numerator // share.denominator)


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Who gets how much at one assignment."""

    windows: dict[Partition, int]
    """Permits per partition, in the order to reserve them; 0 = at capacity, the partition has to wait."""
    divided_equally: bool
    """True where the share rule would have left a partition with nothing, so that all got the same instead; worth a
    log line."""


def plan_windows(
    partitions: Iterable[Partition],
    *,
    limit: int,
    available: int,
    fraction: Fraction | Decimal | float | str = FRACTION_DEFAULT,
    policy: WindowPolicy = "share-of-available",
    exhausted: WindowExhausted = "equal-share",
    window_max: int | None = None,
) -> WindowPlan:
    """Decide the windows of the partitions that reserve now, after all old reservations are back (pure; contract 4).

    Partitions reserve in sorted order, so that the same assignment gets the same windows every time.

    * ``share-of-available``: each takes its share of what the ones before it left. Where that leaves somebody with
      nothing, ``exhausted`` decides: ``equal-share`` divides the available permits equally, ``pause`` lets the last
      ones wait.
    * ``equal-share``: the limit divided by the number of partitions, within what is available.

    With more partitions than permits the last ones wait, whatever the policy.

    Args:
        partitions: The partitions to give a window to, in any order.
        limit: All permits of the process.
        available: Permits to be had now; less than *limit* where older work still holds some.
        fraction: As for :func:`window_size`.
        policy: ``window.policy``.
        exhausted: ``window.exhausted``.
        window_max: Largest window of a partition; 1 for the ordering ``partition``.

    Raises:
        ValueError: as :func:`window_size`.
    """
    order = sorted(partitions)
    share = read_fraction(fraction)
    largest = limit if window_max is None else window_max
    if policy == "equal-share":
        return WindowPlan(_divided(order, min(limit, available), largest), divided_equally=False)
    windows: dict[Partition, int] = {}
    left = available
    for partition in order:
        windows[partition] = min(window_size(left, share), largest)
        left -= windows[partition]
    if exhausted == "equal-share" and 0 in windows.values():
        return WindowPlan(_divided(order, available, largest), divided_equally=True)
    return WindowPlan(windows, divided_equally=False)


def _divided(partitions: list[Partition], permits: int, largest: int) -> dict[Partition, int]:
    """Divide *permits* equally; the first ones get what is left over."""
    if not partitions:
        return {}
    each, over = divmod(permits, len(partitions))
    return {partition: min(each + (place < over), largest) for place, partition in enumerate(partitions)}


class ConcurrencyLimiter:
    """Issues the permits of one process, up to *limit*.

    Args:
        limit: Permits in all, not negative; with 0 every acquisition is rejected (LIM-3).
        queue: Single acquisitions that may wait at a time, not negative.

    Raises:
        ValueError: *limit* or *queue* is negative.
    """

    def __init__(self, limit: int = LIMIT_DEFAULT, queue: int = 0) -> None:
        self.limit = operator.index(limit)
        """Permits in all."""
        self.queue = operator.index(queue)
        """Most single acquisitions that may wait at a time."""
        if self.limit < 0 or self.queue < 0:
            raise ValueError(f"limit and queue are not negative: {limit}, {queue}")
        self.rejected = 0
        """Acquisitions that ended in ``AtCapacity``."""
        self.acquired_total = 0
        """Permits ever handed out."""
        self.released_total = 0
        """Permits ever given back; the difference to :attr:`acquired_total` is :attr:`in_use`."""
        self._waiters: deque[asyncio.Future[Reservation]] = deque()
        self._idle_waiters: list[asyncio.Future[None]] = []

    @property
    def in_use(self) -> int:
        """Permits held now."""
        return self.acquired_total - self.released_total

    @property
    def available(self) -> int:
        """Permits to be had now."""
        return self.limit - self.acquired_total + self.released_total

    @property
    def queued(self) -> int:
        """Single acquisitions waiting now (LIM-10)."""
        return len(self._waiters)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.in_use} of {self.limit} permits in use, {self.queued} queued>"

    def acquire_many_nowait(self, count: int) -> Reservation:
        """Take *count* permits in one reservation, or none.

        Raises:
            AtCapacity: fewer than *count* permits are available; nothing was taken.
            ValueError: *count* is 0 or negative.
        """
        if count < 1:
            raise ValueError(f"a reservation has at least 1 permit, not {count}")
        if count > self.available:
            raise self._rejection()
        return self._grant(count)

    def acquire(self, timeout: float = 0) -> Acquisition:
        """Take one permit: ``reservation = await limiter.acquire()`` or ``async with limiter.acquire():``.

        Nothing happens before the ``await`` or ``async with``. Where no permit is free and the queue has room, it waits
        at most *timeout* seconds.

        Raises (when awaited):
            AtCapacity: no permit, and no room in the queue or none freed within *timeout*.

        Cancellation: nothing is taken, and the place in the queue is free again.
        """
        return Acquisition(self, timeout)

    async def wait_all_released(self) -> None:
        """Wait until no permit is held: at once, or when the last one comes back (LIM-11).

        Cancellation: leaves nothing behind.
        """
        if self.in_use == 0:
            return
        idle = asyncio.get_running_loop().create_future()
        self._idle_waiters.append(idle)
        try:
            await idle
        finally:
            if idle in self._idle_waiters:
                self._idle_waiters.remove(idle)

    async def _acquire_one(self, patience: float) -> Reservation:
        if self.available > 0:
            return self._grant(1)
        if self.limit == 0 or self.queued >= self.queue or not patience > 0:
            raise self._rejection()
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Reservation] = loop.create_future()
        self._waiters.append(waiter)
        timer = None if math.isinf(patience) else loop.call_later(patience, self._time_out, waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.cancelled() and waiter.exception() is None:
                # Handed a permit in the same turn of the loop in which it was cancelled.
                waiter.result().release()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _time_out(self, waiter: asyncio.Future[Reservation]) -> None:
        if not waiter.done():
            self._waiters.remove(waiter)
            waiter.set_exception(self._rejection())

    def _rejection(self) -> AtCapacity:
        self.rejected += 1
        return AtCapacity(f"no permit available: {self.in_use} of {self.limit} in use, {self.queued} queued")

    def _grant(self, count: int) -> Reservation:
        self.acquired_total += count
        return Reservation(self, count)

    def _give_back(self, count: int) -> None:
        """Take *count* permits back; hand them to those who wait, in order."""
        self.released_total += count
        while self._waiters and self.available > 0:
            waiter = self._waiters.popleft()
            if not waiter.done():  # a cancelled one has not run yet; it finds itself gone from the queue
                waiter.set_result(self._grant(1))
        if self._idle_waiters and self.in_use == 0:
            for idle in self._idle_waiters:
                if not idle.done():
                    idle.set_result(None)
            self._idle_waiters.clear()

    def _give_back_from_anywhere(self, count: int) -> None:
        """As :meth:`_give_back`, for the garbage collector, which runs on any thread at any time."""
        waiting: list[asyncio.Future[Any]] = [*self._waiters, *self._idle_waiters]
        if not waiting:
            self.released_total += count
            return
        loop = waiting[0].get_loop()
        if asyncio._get_running_loop() is loop:  # noqa: SLF001 - documented; unlike get_running_loop it does not raise
            self._give_back(count)
        elif loop.is_closed():
            self.released_total += count
        else:
            loop.call_soon_threadsafe(self._give_back, count)


class Acquisition:
    """A single acquisition that has not begun: await it, or enter it with ``async with``."""

    __slots__ = ("_limiter", "_reservation", "_timeout")

    def __init__(self, limiter: ConcurrencyLimiter, timeout: float) -> None:
        self._limiter = limiter
        self._timeout = timeout
        self._reservation: Reservation | None = None

    def __await__(self) -> Generator[object, None, Reservation]:
        return self._limiter._acquire_one(self._timeout).__await__()  # noqa: SLF001 - the limiter's own other half

    async def __aenter__(self) -> Reservation:
        self._reservation = await self
        return self._reservation

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._reservation is not None:
            self._reservation.release()


class Reservation:
    """Permits with exactly one holder; made by the limiter, released once and whole."""

    __slots__ = ("_limiter", "permits")

    def __init__(self, limiter: ConcurrencyLimiter, permits: int) -> None:
        self._limiter = limiter
        self.permits = permits
        """Permits held now; 0 once released."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.permits} permits>"

    def release(self) -> None:
        """Give all permits back together; a second call does nothing."""
        self.shrink(0)

    def shrink(self, to: int) -> None:
        """Give back what is over *to* permits; nothing where no more than that are held.

        Used only past a drain deadline, when the operations that still run may keep their own permits and no others
        (contract 3).

        Raises:
            ValueError: *to* is negative.
        """
        if to < 0:
            raise ValueError(f"a reservation shrinks to 0 or more permits, not {to}")
        surplus = self.permits - to
        if surplus > 0:
            self.permits = to
            self._limiter._give_back(surplus)  # noqa: SLF001 - the limiter's own other half

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        # Back first: where warnings are errors, the warning is an exception that ends this method.
        permits, self.permits = self.permits, 0
        if permits:
            self._limiter._give_back_from_anywhere(permits)  # noqa: SLF001 - the limiter's own other half
            warnings.warn(f"unreleased reservation of {permits} permits", ResourceWarning, stacklevel=1, source=self)
