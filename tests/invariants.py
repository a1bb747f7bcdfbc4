"""The invariants of delivery, as functions over what brokers have written down (pure; nothing of the service in it).

Times are milliseconds since the epoch by the broker's clock: when an input record arrived, when a response was
appended, when a commit was accepted. Brokers on one machine stamp them all, so that they can be compared.

=====  ==============================================================================================================
I4     :func:`commits_past_unanswered`: an accepted commit has a response, appended before it, for all that is below
I5     :func:`commits_gone_back`, :func:`repeats_below_commit`: no commit goes back, no work below one is done again
I6     :func:`repeats_unexplained`: surplus responses to what was not answered and uncommitted when a fault happened
I10    :func:`longest_silence`: how long nothing came out while there was something to answer
=====  ==============================================================================================================
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from group_history import Commit


@dataclass(frozen=True)
class Arrival:
    """An input record is in its partition."""

    partition: int
    offset: int
    at: int


@dataclass(frozen=True)
class Reply:
    """A response to the input record at *offset* of *partition* is in the output topic."""

    partition: int
    offset: int
    at: int


Interval = tuple[int, int]


def commits_gone_back(commits: Iterable[Commit]) -> list[str]:
    """I5: commits below an earlier one of their partition."""
    highest: dict[int, Commit] = {}
    wrong = []
    for commit in commits:
        before = highest.get(commit.partition)
        if before is not None and commit.offset < before.offset:
            wrong.append(f"partition {commit.partition}: committed {commit.offset} after {before.offset}")
        else:
            highest[commit.partition] = commit
    return wrong


def commits_past_unanswered(
    arrivals: Iterable[Arrival], replies: Iterable[Reply], commits: Iterable[Commit]
) -> list[str]:
    """I4: commits that were accepted before everything below them was answered."""
    first = _first_replies(replies)
    records: dict[int, list[int]] = defaultdict(list)
    for arrival in sorted(arrivals, key=attrgetter("offset")):
        records[arrival.partition].append(arrival.offset)
    checked: dict[int, int] = defaultdict(int)
    wrong = []
    for commit in commits:
        offsets, at = records[commit.partition], checked[commit.partition]
        while at < len(offsets) and offsets[at] < commit.offset:
            answered = first.get((commit.partition, offsets[at]))
            if answered is None or answered > commit.at:
                when = "never" if answered is None else f"{answered - commit.at} ms later"
                wrong.append(f"partition {commit.partition}: {commit.offset} committed, {offsets[at]} answered {when}")
            at += 1
        checked[commit.partition] = at
    return wrong


def repeats_below_commit(replies: Iterable[Reply], commits: Iterable[Commit]) -> list[Reply]:
    """I5: responses to a record that were appended after a commit above it, and after another response to it."""
    reached = _Reached(commits)
    seen: set[tuple[int, int]] = set()
    wrong = []
    for reply in sorted(replies, key=attrgetter("at")):
        name = (reply.partition, reply.offset)
        # In the same millisecond nobody knows which was first.
        if name in seen and reply.offset < reached.offset(reply.partition, reply.at - 1):
            wrong.append(reply)
        seen.add(name)
    return wrong


def repeats_unexplained(replies: Iterable[Reply], commits: Iterable[Commit], faults: Sequence[int]) -> int:
    """I6: surplus responses but those to records that were answered and not committed when a fault happened.

    *faults* are their moments. What remains can only have been in flight then: in a window.
    """
    reached = _Reached(commits)
    times: dict[tuple[int, int], list[int]] = defaultdict(list)
    for reply in replies:
        times[reply.partition, reply.offset].append(reply.at)
    unexplained = 0
    for (partition, offset), copies in times.items():
        if len(copies) > 1:
            first = min(copies)
            causes = sum(first <= at and reached.offset(partition, at) <= offset for at in faults)
            unexplained += max(0, len(copies) - 1 - causes)
    return unexplained


class _Reached:
    """What was committed when."""

    def __init__(self, commits: Iterable[Commit]) -> None:
        self._times: dict[int, list[int]] = defaultdict(list)
        self._offsets: dict[int, list[int]] = defaultdict(list)
        for commit in commits:
            offsets = self._offsets[commit.partition]
            self._times[commit.partition].append(commit.at)
            offsets.append(max(commit.offset, offsets[-1] if offsets else 0))

    def offset(self, partition: int, at: int) -> int:
        """The highest offset committed until then, in that millisecond included; 0 where none was."""
        count = bisect_right(self._times[partition], at)
        return self._offsets[partition][count - 1] if count else 0


def longest_silence(
    arrivals: Iterable[Arrival], replies: Iterable[Reply], *, until: int, excused: Iterable[Interval] = ()
) -> float:
    """I10: the longest time, in seconds, without a first response though a record was waiting for one.

    Time within *excused* does not count, and no time after *until*.
    """
    first = _first_replies(replies)
    # At the same moment an arrival comes first: an answer needs one.
    events = sorted(
        [(arrival.at, 0) for arrival in arrivals] + [(at, 1) for at in first.values()],
    )
    outages = _merged(excused)
    waiting = longest = 0
    since: int | None = None
    for at, answered in events:
        if not answered:
            waiting += 1
            since = at if since is None else since
            continue
        waiting -= 1
        if since is not None:
            longest = max(longest, at - since - _overlap(outages, since, at))
        since = at if waiting else None
    if since is not None:
        longest = max(longest, until - since - _overlap(outages, since, until))
    return longest / 1000


def busy_moments(arrivals: Iterable[Arrival], replies: Iterable[Reply], moments: Iterable[int]) -> int:
    """At how many of *moments* there were records that were not answered."""
    here = sorted(arrival.at for arrival in arrivals)
    answered = sorted(_first_replies(replies).values())
    return sum(bisect_right(here, moment) > bisect_right(answered, moment) for moment in moments)


def _first_replies(replies: Iterable[Reply]) -> dict[tuple[int, int], int]:
    """When each record was answered for the first time."""
    first: dict[tuple[int, int], int] = {}
    for reply in replies:
        name = (reply.partition, reply.offset)
        first[name] = min(first.get(name, reply.at), reply.at)
    return first


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time, in intervals that do not overlap."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _overlap(intervals: Iterable[Interval], start: int, end: int) -> int:
    """How much of the time from *start* to *end* lies within *intervals*, which do not overlap."""
    return sum(max(0, min(end, last) - max(start, begun)) for begun, last in intervals)
