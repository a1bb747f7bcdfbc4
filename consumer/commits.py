"""When to commit: the policy as data and the schedule that applies it, given the time (pure).

A commit is due when ``interval`` has passed since the last one, or ``max_records`` records were resolved since. More
often costs round trips; more seldom costs duplicates after a hard kill, at most the records answered since the last
commit (contract 3). What was resolved while a commit was on its way is not in that commit: so the schedule is told of a
commit when its watermarks are read, not when its answer comes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CommitPolicy:
    """How long finished work may stay uncommitted.

    Raises:
        ValueError: a commit would be due at every moment, and its owner would do nothing else.
    """

    interval_seconds: float = 1.0
    """Longest time between a resolution and its commit."""
    max_records: int = 5000
    """Most resolved records between two commits."""

    def __post_init__(self) -> None:
        if not self.interval_seconds > 0 or self.max_records < 1:
            raise ValueError("a commit policy has an interval above 0 and at least 1 record")


class CommitSchedule:
    """Tells when the next commit is due; its owner reports what happened, with the time in monotonic seconds."""

    __slots__ = ("_last_commit", "_policy", "_resolved")

    def __init__(self, policy: CommitPolicy, now: float) -> None:
        self._policy = policy
        self._last_commit = now
        self._resolved = 0

    def resolved(self, records: int) -> bool:
        """Count *records* as resolved; True where a commit is due for their number alone."""
        self._resolved += records
        return self._resolved >= self._policy.max_records

    def due_in(self, now: float) -> float:
        """Seconds until the next commit may be due, at least 0."""
        if self._resolved >= self._policy.max_records:
            return 0.0
        return max(0.0, self._last_commit + self._policy.interval_seconds - now)

    def committed(self, now: float) -> None:
        """The watermarks of a commit are read now; or there was nothing to commit.

        Whether that commit succeeds makes no difference: the next one takes all that is resolved by then.
        """
        self._last_commit = now
        self._resolved = 0
