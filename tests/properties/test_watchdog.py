"""The watchdog against a naive judge that looks at the whole history of one partition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from consumer.watchdog import LOOK_SECONDS, Observation, PartitionSeen, Watchdog, WatchdogLimits

LIMITS = WatchdogLimits(poll_seconds=40.0, operation_seconds=20.0, stall_seconds=30.0, metadata_seconds=50.0)

REASONS = ("storage_unavailable", "registry", "output", "bytes", "offset_distance", "at_capacity", "recovering")

LOOKS = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1.0, 5.0, 9.0, 60.0]),  # seconds since the last look
        st.sampled_from([0, 0, 0, 0, 1]),  # how far it moved
        st.sampled_from([5, 5, 5, None, 0]),  # lag
        st.one_of(st.just(()), st.just(()), st.tuples(st.sampled_from(REASONS))),
        st.sampled_from([None, None, None, 10.0, 21.0]),  # age of the oldest operation
        st.booleans(),  # somebody else holds bytes and permits
    ),
    max_size=60,
)


def explained(reasons: tuple[str, ...], oldest: float | None, held: bool) -> bool:
    """Say what may explain that a partition stands still, one case after the other."""
    if oldest is not None and oldest <= LIMITS.operation_seconds:
        return True
    if set(reasons) & {"storage_unavailable", "registry", "output"}:
        return True
    return held and bool(set(reasons) & {"bytes", "at_capacity"})


@given(LOOKS)
def test_a_partition_is_suspicious_exactly_after_standing_unexplained_for_its_time(
    looks: list[tuple[float, int, int | None, tuple[str, ...], float | None, bool]],
) -> None:
    """At every look: the unbroken run of unexplained looks at one place that ends here lasted its time, or did not."""
    watchdog = Watchdog(LIMITS)
    now = place = 0.0
    places: list[float | None] = []
    gaps: list[float] = []
    for number, (seconds, moved, lag, reasons, oldest, held) in enumerate(looks):
        now += seconds
        place += moved
        one = PartitionSeen("t", 0, place, lag, reasons, oldest)
        other = PartitionSeen("t", 1, number, 0, holds_bytes=held, holds_permits=held)
        seen = Observation(polls=number, epoch=1, rebalancing=False, metadata=number, partitions=[one, other])

        found = watchdog.look(seen, now)

        places.append(None if lag == 0 or explained(reasons, oldest, held) else place)
        gaps.append(min(seconds, 2 * LOOK_SECONDS))
        run = 0
        while run < len(places) and places[-1] is not None and places[-1 - run] == places[-1]:
            run += 1
        stood = sum(gaps[-1 - back] for back in range(run - 1)) if run else 0.0
        assert [(suspicion.kind, suspicion.partition) for suspicion in found] == (
            [("stall", ("t", 0))] if run and stood >= LIMITS.stall_seconds else []
        )
