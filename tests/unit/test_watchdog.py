"""The watchdog's judgement: what stands still for no reason is suspicious, and nothing else ever is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from consumer.watchdog import (
    LOOK_SECONDS,
    METADATA_SECONDS,
    STALL_SECONDS,
    Observation,
    PartitionSeen,
    Suspicion,
    Watchdog,
    WatchdogLimits,
    watchdog_limits,
)

LIMITS = WatchdogLimits(poll_seconds=260.0, operation_seconds=75.0)
LONG = 2 * max(STALL_SECONDS, METADATA_SECONDS, LIMITS.poll_seconds)


def partition(number: int = 0, **changes: object) -> PartitionSeen:
    """Make a partition with lag, that stands at offset 5 for no reason."""
    return replace(PartitionSeen("in", number, (1, True, 5, 5), 10), **changes)  # type: ignore[arg-type]


class Looks:
    """Looks at a process again and again, as often as the service does."""

    def __init__(self, limits: WatchdogLimits = LIMITS) -> None:
        self.watchdog = Watchdog(limits)
        self.now = 1000.0
        self.polls = 0

    def at(
        self, *partitions: PartitionSeen, seconds: float = LOOK_SECONDS, polls: int = 1, **changes: object
    ) -> list[Suspicion]:
        """Look once, *seconds* after the last time; the loop has come round *polls* times, metadata always come."""
        self.now += seconds
        self.polls += polls
        seen = Observation(polls=self.polls, epoch=1, rebalancing=False, metadata=self.now, partitions=partitions)
        return self.watchdog.look(replace(seen, **changes), self.now)  # type: ignore[arg-type]

    def seconds_until_suspicious(self, *partitions: PartitionSeen, **changes: object) -> float | None:
        """Look until something is suspicious; None where nothing is for long. One thing at a time, else it fails."""
        began = self.now
        while self.now < began + LONG:
            found = self.at(*partitions, **changes)  # type: ignore[arg-type]
            if found:
                assert len(found) == 1, found
                return self.now - began
        return None


class TestStall:
    """A partition with lag that does not move."""

    def test_it_is_suspicious_after_its_time_and_named(self) -> None:
        """Hazard H3, rule 4b: whatever the client says of itself."""
        looks = Looks()

        seconds = looks.seconds_until_suspicious(partition(7))
        (suspicion,) = looks.at(partition(7))

        assert seconds == STALL_SECONDS + LOOK_SECONDS, "the first look sees where it stands"
        assert (suspicion.kind, suspicion.partition) == ("stall", ("in", 7))
        assert "in/7 has not moved for 305 s" in suspicion.text

    @pytest.mark.parametrize("moved", [(1, True, 6, 5), (1, True, 5, 6), (2, True, 5, 5)])
    def test_any_movement_gives_it_its_time_again(self, moved: tuple[int, bool, int, int]) -> None:
        """Position, watermark, or a new epoch."""
        looks = Looks()
        looks.at(partition())
        while not looks.at(partition()):
            pass

        assert looks.at(partition(progress=moved)) == []
        assert looks.seconds_until_suspicious(partition(progress=moved)) == STALL_SECONDS

    def test_without_lag_it_may_stand_for_ever(self) -> None:
        """Nothing to do is no stall, and lag that comes later starts at nothing."""
        looks = Looks()

        assert looks.seconds_until_suspicious(partition(lag=0)) is None
        assert looks.seconds_until_suspicious(partition(lag=1)) == STALL_SECONDS + LOOK_SECONDS

    def test_where_reading_has_not_begun_there_may_be_lag(self) -> None:
        """A partition that is never opened stands still too."""
        assert Looks().seconds_until_suspicious(partition(lag=None)) == STALL_SECONDS + LOOK_SECONDS

    @pytest.mark.parametrize(
        "reason",
        ["storage_unavailable", "registry", "output", "poison_limit", "out_of_range", "unreadable", "refused"],
    )
    def test_a_cause_that_is_named_explains_it_for_as_long_as_it_lasts(self, reason: str) -> None:
        """An outage of storage or registry, an output that is stuck: restarts would not help."""
        looks = Looks()

        assert looks.seconds_until_suspicious(partition(reasons=["bytes", reason])) is None
        assert looks.seconds_until_suspicious(partition()) == STALL_SECONDS + LOOK_SECONDS

    @pytest.mark.parametrize("reason", ["offset_distance", "recovering", "bytes", "at_capacity"])
    def test_a_reason_that_only_follows_from_another_explains_nothing_alone(self, reason: str) -> None:
        """Nobody holds the bytes or the permits, no operation runs: something was lost."""
        assert Looks().seconds_until_suspicious(partition(reasons=[reason])) == STALL_SECONDS + LOOK_SECONDS

    def test_waiting_for_bytes_is_explained_while_somebody_has_them(self) -> None:
        """The one that has them is judged by itself."""
        holder = partition(1, lag=0, holds_bytes=True)

        assert Looks().seconds_until_suspicious(partition(reasons=["bytes"]), holder) is None

    def test_waiting_for_permits_is_explained_while_somebody_has_them(self) -> None:
        """`window.exhausted: pause` with more partitions than permits is a normal state."""
        holder = partition(1, lag=0, holds_permits=True)

        assert Looks().seconds_until_suspicious(partition(reasons=["at_capacity"]), holder) is None

    def test_an_operation_within_its_attempts_explains_it(self) -> None:
        """Slow storage is no stall; an operation that has outlived its attempts and is not blocked hangs."""
        looks = Looks()
        within, beyond = LIMITS.operation_seconds, LIMITS.operation_seconds + 1

        assert looks.seconds_until_suspicious(partition(oldest_seconds=within)) is None
        assert looks.seconds_until_suspicious(partition(oldest_seconds=beyond)) == STALL_SECONDS + LOOK_SECONDS

    def test_an_excuse_gives_it_its_time_again_and_is_its_own(self) -> None:
        """The brokers do not answer either: that goes for this one suspicion."""
        looks = Looks()
        looks.at(partition(0), partition(1))
        while not (found := looks.at(partition(0), partition(1))):
            pass

        looks.watchdog.excuse(found[0])

        assert looks.at(partition(0), partition(1)) == [found[1]]
        assert looks.seconds_until_suspicious(partition(0)) == STALL_SECONDS - LOOK_SECONDS

    def test_an_excuse_for_what_is_gone_is_nothing(self) -> None:
        """The partition was revoked while the brokers were asked."""
        looks = Looks()
        looks.watchdog.excuse(Suspicion("stall", "gone", ("in", 3)))

        assert looks.seconds_until_suspicious(partition(3)) == STALL_SECONDS + LOOK_SECONDS

    def test_a_partition_that_was_away_begins_anew(self) -> None:
        """Revoked and assigned again, even at the same place."""
        looks = Looks()
        for _ in range(30):
            looks.at(partition())
        looks.at()

        assert looks.seconds_until_suspicious(partition()) == STALL_SECONDS + LOOK_SECONDS


class TestProcess:
    """The client, the poll loop, the metadata."""

    def test_a_dead_task_is_suspicious_at_once(self) -> None:
        """Hazards H3, H17c and H34, rule 4a."""
        (suspicion,) = Looks().at(dead="the client's _fetch_task has ended: cancelled")

        assert suspicion == Suspicion("client", "")
        assert "_fetch_task" in suspicion.text

    def test_a_poll_loop_that_does_not_come_round(self) -> None:
        """Hazard H4: the client does not enforce its own limit any more."""
        seconds = Looks().seconds_until_suspicious(polls=0)

        assert seconds == LIMITS.poll_seconds + LOOK_SECONDS

    def test_a_rebalance_that_does_not_end(self) -> None:
        """Hazard H5: polls wait in it, so rounds say nothing; a new generation does."""
        looks = Looks()

        assert looks.seconds_until_suspicious(rebalancing=True) == LIMITS.poll_seconds + LOOK_SECONDS
        (suspicion,) = looks.at(rebalancing=True)
        assert "the group" in suspicion.text
        assert looks.at(rebalancing=True, epoch=2) == []

    def test_metadata_that_do_not_come(self) -> None:
        """Hazard H31: every broker has moved, and the client asks only those it knew."""
        assert Looks().seconds_until_suspicious(metadata=1) == METADATA_SECONDS + LOOK_SECONDS

    def test_an_idle_process_is_never_suspicious(self) -> None:
        """It polls, it hears of the brokers, there is nothing to do."""
        assert Looks().seconds_until_suspicious(partition(lag=0)) is None

    def test_time_that_was_not_watched_does_not_count(self) -> None:
        """SIGSTOP, a blocked event loop, a machine asleep: nobody could have moved."""
        looks = Looks()
        looks.at(partition(), polls=0, metadata=1)

        assert looks.at(partition(), polls=0, metadata=1, seconds=10 * LONG) == []
        assert looks.at(partition(), polls=0, metadata=1, seconds=-5) == []


class TestLimits:
    """Limits from settings."""

    def test_the_defaults(self) -> None:
        """Contract 6: rebalance 60 s, requests 70 s, three attempts of 20 s with 5 s between."""
        limits = watchdog_limits(
            rebalance_timeout=60, request_timeout=70, attempts=3, attempt_timeout=20, backoff_max=5
        )

        assert limits == LIMITS
        assert limits.poll_seconds < 300, "the client's own limit between two polls"

    def test_they_grow_with_the_time_limit_of_requests(self) -> None:
        """A request that is allowed ten minutes is waited for."""
        limits = watchdog_limits(
            rebalance_timeout=60, request_timeout=600, attempts=1, attempt_timeout=20, backoff_max=5
        )

        assert (limits.stall_seconds, limits.metadata_seconds) == (1800, 1800)


def test_several_suspicions_come_together_the_surest_first() -> None:
    """Who holds them against the brokers begins with the one that needs no asking."""
    looks = Looks()
    found: Sequence[Suspicion] = ()
    for _ in range(int(LONG / LOOK_SECONDS)):
        found = looks.at(partition(), polls=0, metadata=1, dead="ended")

    assert [suspicion.kind for suspicion in found] == ["client", "poll", "metadata", "stall"]
