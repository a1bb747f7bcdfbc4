"""How large windows have to be, by Little's law: from what is known of a load to the settings that carry it (pure).

1. **In flight.** *Operations at a time = operations a second x seconds each* (Little). The mean is what counts; from
   the 50th and 99th percentile it is estimated as that of a log-normal distribution, which latencies of storage
   resemble: ``p50 x e^(s^2 / 2)`` with ``s = ln(p99 / p50) / 2.326``.
2. **Window.** What a partition has in flight on average, times *headroom*: for partitions that get more than others,
   and to catch up after an outage. At least what an even stream needs in 99 of 100 moments, ``L + 2.326 x sqrt(L)``.
3. **Permits.** One process has to carry ``ceil(partitions / processes)`` partitions. ``equal-share``: as many windows.
   ``share-of-available``: the smallest limit with which the last partition's share is a window; the first get more.
   At least one for each partition that a process has when another has gone: without, one of them would stand still.
4. **Memory.** Records and responses of a process are bounded by ``limits.in_flight_bytes``; half of it is for records
   read ahead, the other half has to hold what is in flight. What a process needs without any was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from consumer.permits import WindowPolicy, plan_windows

Z_99: Final = 2.326
"""99 of 100 values of a normal distribution lie below its mean + 2.326 standard deviations."""

RECORD_OVERHEAD_BYTES: Final = 400
"""Charged for a record beside its bytes (``consumer.assignment``)."""

BASE_BYTES: Final = 80 * 1024 * 1024
"""A process without records. Measured: 73 MiB with 100 partitions (README, *Operate it*)."""

ALLOCATION_SHARE: Final = Fraction(12, 10)
"""What the allocator holds for each byte in use: it gives memory back late. Measured: 265 - 73 MiB with a budget of 256
MiB never more than that; a fifth is added for what another mix of sizes may do."""

IN_FLIGHT_BYTES_DEFAULT: Final = 256 * 1024 * 1024

CPU_SECONDS: Final = 20e-6
"""CPU of one operation with storage in memory (``make bench``); a real tier costs more. A process has one core."""

PERMITS_MAX: Final = 1_000_000
"""More than this is no configuration but a mistake in a unit."""

IN_FLIGHT_BYTES_MAX: Final = 1024**4
"""As :data:`PERMITS_MAX`, of memory."""

PERCENTILES_RATIO_MAX: Final = 1_000_000
"""As :data:`PERMITS_MAX`, of the 99th percentile in medians."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is known."""

    rate: float
    """Operations a second, all partitions together."""
    p50: float
    """Median latency of one storage operation, seconds."""
    p99: float | None
    """99th percentile; None: all take as long as the median."""
    partitions: int
    processes: int
    """Members of the group, on however many hosts."""
    payload_bytes: int
    headroom: float = 2.0
    policy: WindowPolicy = "equal-share"
    fraction: Fraction = Fraction(1, 10)
    """For ``share-of-available``."""

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            ValueError: a number cannot be; the text says which.
        """
        positive = {"rate": self.rate, "p50": self.p50, "partitions": self.partitions, "processes": self.processes}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is above 0, not {value:g}")
        if self.p99 is not None and self.p99 < self.p50:
            raise ValueError("p99 is not below p50")
        if self.p99 is not None and self.p99 > self.p50 * PERCENTILES_RATIO_MAX:
            raise ValueError(f"p99 is at most {PERCENTILES_RATIO_MAX:,} times p50")
        if not 1 <= self.headroom < math.inf:
            raise ValueError(f"headroom is at least 1, not {self.headroom:g}")
        if self.payload_bytes < 0:
            raise ValueError("payload is not negative")


@dataclass(frozen=True, slots=True)
class Plan:
    """What carries a load."""

    mean_seconds: float
    """Mean latency."""
    in_flight: float
    """Operations at a time, all together, on average."""
    in_flight_each: float
    """Of one partition."""
    window: int
    """Permits that a partition needs."""
    members: int
    """Processes that have a partition at all."""
    partitions_each: int
    """Most partitions of one process."""
    limit: int
    """``concurrency.limit``."""
    windows: tuple[int, ...]
    """What the partitions of the fullest process really get, the largest first."""
    rate_max: float
    """Operations a second that all windows together can carry, where each partition has the smallest."""
    partitions_after_loss: int
    """Most partitions of one process with one process fewer; 0 where there is no other."""
    windows_after_loss: tuple[int, ...]
    """What they get then, the largest first."""
    rate_max_after_loss: float
    in_flight_bytes: int
    """``limits.in_flight_bytes``."""
    process_bytes: int
    """Memory of one process at most, an estimate."""
    cores: float
    """CPU at least, all processes together."""


def mean_latency(p50: float, p99: float | None) -> float:
    """Return the mean of latencies with these percentiles, seconds."""
    if p99 is None:
        return p50
    spread = math.log(p99 / p50) / Z_99
    return p50 * math.exp(spread * spread / 2)


def window_for(in_flight: float, headroom: float) -> int:
    """Return the permits for a partition with *in_flight* operations at a time on average."""
    return max(1, math.ceil(max(in_flight * headroom, in_flight + Z_99 * math.sqrt(in_flight)) - 1e-9))


def windows_of(limit: int, partitions: int, policy: WindowPolicy, fraction: Fraction) -> tuple[int, ...]:
    """Return the windows of the partitions of one process, the largest first."""
    names = [("", number) for number in range(partitions)]
    planned = plan_windows(names, limit=limit, available=limit, fraction=fraction, policy=policy)
    return tuple(sorted(planned.windows.values(), reverse=True))


def smallest_limit(window: int, partitions: int, policy: WindowPolicy, fraction: Fraction) -> int:
    """Return the fewest permits with which each of *partitions* gets a window of *window* at least, by its policy.

    Raises:
        ValueError: that would be more than :data:`PERMITS_MAX`.
    """
    low, high = window * partitions, PERMITS_MAX
    if policy == "equal-share":
        high = low

    def suffices(limit: int) -> bool:
        names = [("", number) for number in range(partitions)]
        planned = plan_windows(
            names, limit=limit, available=limit, fraction=fraction, policy=policy, exhausted="pause"
        )
        return min(planned.windows.values()) >= window

    if low > PERMITS_MAX or not suffices(high):
        raise ValueError(_too_many_permits("more processes, or equal-share"))
    while low < high:
        middle = (low + high) // 2
        if suffices(middle):
            high = middle
        else:
            low = middle + 1
    return low


def plan(load: Load) -> Plan:
    """Return what carries *load*.

    Raises:
        ValueError: no configuration does.
    """
    mean = mean_latency(load.p50, load.p99)
    in_flight = load.rate * mean
    each = in_flight / load.partitions
    if each * load.headroom > PERMITS_MAX:  # also where it is infinite
        raise ValueError(_too_many_permits("more partitions"))
    window = window_for(each, load.headroom)
    members = min(load.processes, load.partitions)
    partitions_each = -(-load.partitions // members)
    partitions_after_loss = -(-load.partitions // (members - 1)) if members > 1 else 0
    limit = max(smallest_limit(window, partitions_each, load.policy, load.fraction), partitions_after_loss)
    if limit > PERMITS_MAX:
        raise ValueError(_too_many_permits("more processes"))
    windows = windows_of(limit, partitions_each, load.policy, load.fraction)
    after = windows_of(limit, partitions_after_loss, load.policy, load.fraction)
    working = 2 * limit * (load.payload_bytes + RECORD_OVERHEAD_BYTES)
    if working > IN_FLIGHT_BYTES_MAX:
        raise ValueError("that needs more than 1 TiB of memory in a process; smaller payloads, or more processes")
    budget = max(IN_FLIGHT_BYTES_DEFAULT, _rounded_up(working, 64 * 1024 * 1024))
    return Plan(
        mean_seconds=mean,
        in_flight=in_flight,
        in_flight_each=each,
        window=window,
        members=members,
        partitions_each=partitions_each,
        limit=limit,
        windows=windows,
        rate_max=windows[-1] * load.partitions / mean,
        partitions_after_loss=partitions_after_loss,
        windows_after_loss=after,
        rate_max_after_loss=after[-1] * load.partitions / mean if after else 0.0,
        in_flight_bytes=budget,
        process_bytes=BASE_BYTES + math.ceil(budget * ALLOCATION_SHARE),
        cores=load.rate * CPU_SECONDS,
    )


def _too_many_permits(instead: str) -> str:
    return f"that needs more than {PERMITS_MAX:,} permits in a process; {instead}"


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
