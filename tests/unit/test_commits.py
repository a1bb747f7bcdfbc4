"""A commit is due after a time or after a number of records, whichever comes first."""

from __future__ import annotations

import pytest

from consumer.commits import CommitPolicy, CommitSchedule

POLICY = CommitPolicy(interval_seconds=2.0, max_records=10)


def test_a_commit_is_due_when_the_interval_has_passed() -> None:
    """Contract 6, `commit.interval`: counted from the start, then from commit to commit."""
    schedule = CommitSchedule(POLICY, now=100.0)

    assert schedule.due_in(100.0) == 2.0
    assert schedule.due_in(101.5) == 0.5
    assert schedule.due_in(102.0) == 0.0
    schedule.committed(102.5)
    assert schedule.due_in(102.5) == 2.0


def test_waiting_is_never_negative() -> None:
    """A loop that was held up asks late."""
    assert CommitSchedule(POLICY, now=0.0).due_in(1_000_000.0) == 0.0


def test_a_commit_is_due_at_the_number_of_records_however_they_come() -> None:
    """Contract 6, `commit.max_records`: at the number, not one later."""
    schedule = CommitSchedule(POLICY, now=0.0)

    assert [schedule.resolved(records) for records in (4, 5)] == [False, False]
    assert schedule.due_in(0.0) == 2.0
    assert schedule.resolved(1) is True
    assert schedule.due_in(0.0) == 0.0


def test_a_number_reached_stays_due_until_the_commit() -> None:
    """Who missed the first sign is told again."""
    schedule = CommitSchedule(POLICY, now=0.0)
    schedule.resolved(25)

    assert schedule.resolved(0) is True
    assert schedule.due_in(0.0) == 0.0
    schedule.committed(0.5)
    assert schedule.due_in(0.5) == 2.0
    assert schedule.resolved(9) is False


def test_what_is_resolved_during_a_commit_counts_towards_the_next() -> None:
    """Contract 3: it is not in the commit on its way, so a hard kill would make duplicates of it."""
    schedule = CommitSchedule(POLICY, now=0.0)
    schedule.resolved(10)

    schedule.committed(1.0)  # the watermarks are read, the request goes out …
    schedule.resolved(9)  # … and is answered after this
    assert schedule.due_in(1.0) == 2.0
    assert schedule.resolved(1) is True


def test_defaults_are_those_of_the_contract() -> None:
    """Contract 6: 1 s, 5,000 records."""
    assert CommitPolicy() == CommitPolicy(interval_seconds=1.0, max_records=5000)


@pytest.mark.parametrize(("interval", "records"), [(0.0, 10), (-1.0, 10), (float("nan"), 10), (1.0, 0), (1.0, -5)])
def test_a_policy_that_is_always_due_is_refused(interval: float, records: int) -> None:
    """Its owner would spin."""
    with pytest.raises(ValueError, match="a commit policy"):
        CommitPolicy(interval, records)
