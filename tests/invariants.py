"""The invariants of delivery, as functions over what brokers have written down (pure; nothing of the service in it).

Times are milliseconds since the epoch by the broker's clock: when an input record arrived, when a response was
appended, when a commit was accepted. Brokers on one machine stamp them all, so that they can be compared.

=====  ==============================================================================================================
I4     :func:`commits_past_unanswered`: an accepted commit has a response, appended before it, for all that is below;
       and a dead letter, for all of that to which one is due
I5     :func:`commits_gone_back`, :func:`repeats_below_commit`: no commit goes back, no work below one is done again
I6     :func:`repeats_of`, :func:`unexplained`: a surplus response is to what had just been answered, and was not
       committed, when a fault happened; or was in flight then, of which there is one window of its partition
I9     :func:`permits_out_of_bounds`, :func:`permits_astray`: none too many, none below zero; at rest each is a window's
I10    :func:`longest_silence`: how long nothing came out while there was something to answer
=====  ==============================================================================================================
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

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

IN_FLIGHT_MS = 30_000
"""What is in flight at a fault is appended by then or never: the request time-out of the producers."""

NOTED_MS = 1_000
"""A fault may be written down so much later than it happened: it is noticed in turn with everything else."""


@dataclass(frozen=True)
class Fault:
    """Something after which work may be repeated (contract 3)."""

    at: int
    fresh: int
    """How long before it an answer may have come and yet not be committed, in milliseconds."""
    windows: int = 1
    """Operations in flight that may be answered twice: one window of each partition. Two where whoever had the
    partition is alive: it may then still answer what others have long answered and committed."""
    noted: int = NOTED_MS
    """What it causes may be written down so long before it itself is."""


@dataclass(frozen=True)
class Repeat:
    """A record was answered *again*, after the answer *before*."""

    partition: int
    offset: int
    before: int
    again: int


@dataclass(frozen=True)
class Unexplained:
    """Of repeats, what no fault explains by what was committed."""

    in_flight: int
    """So many were in flight at a fault, each of them within a window."""
    wrong: list[Repeat]


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
    arrivals: Iterable[Arrival], replies: Iterable[Reply], commits: Iterable[Commit], done: str = "answered"
) -> list[str]:
    """I4: commits that were accepted before everything below them was answered; or *done*, by other replies."""
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
                wrong.append(f"partition {commit.partition}: {commit.offset} committed, {offsets[at]} {done} {when}")
            at += 1
        checked[commit.partition] = at
    return wrong


def repeats_below_commit(replies: Iterable[Reply], commits: Iterable[Commit]) -> list[Repeat]:
    """I5: responses to a record that were appended after a commit above it, and after another response to it."""
    reached = _Reached(commits)
    return [
        repeat
        for repeat in repeats_of(replies)
        # In the same millisecond nobody knows which was first.
        if repeat.offset < reached.offset(repeat.partition, repeat.again - 1)
    ]


def repeats_of(replies: Iterable[Reply]) -> list[Repeat]:
    """Every surplus reply, with the one before it."""
    times: dict[tuple[int, int], list[int]] = defaultdict(list)
    for reply in sorted(replies, key=attrgetter("at")):
        times[reply.partition, reply.offset].append(reply.at)
    return [Repeat(*name, before, again) for name, copies in times.items() for before, again in pairwise(copies)]


def unexplained(
    repeats: Iterable[Repeat],
    commits: Iterable[Commit],
    faults: Iterable[Fault],
    *,
    window: int,
    no_commits: Iterable[Interval] = (),
) -> Unexplained:
    """I6: the repeats but those of what a fault found answered and not committed.

    An answer waits for its commit one interval and the commit's own time, no longer (`Fault.fresh`); time within
    *no_commits*, when nobody could commit, does not count. What waited longer is no fault's doing: after a hard one it
    is wrong, and where somebody is left who may still answer, it has to fit into a *window* like everything that was
    in flight. A window is that of one partition at one fault.
    """
    reached, outages = _Reached(commits), _merged(no_commits)
    faults = sorted(faults, key=attrgetter("at"))
    left = [
        repeat
        for repeat in repeats
        if not any(
            repeat.before <= fault.at <= repeat.again + fault.noted
            and reached.offset(repeat.partition, fault.at) <= repeat.offset
            and fault.at - repeat.before - _overlap(outages, repeat.before, fault.at) <= fault.fresh
            for fault in faults
        )
    ]
    wrong = beyond_windows(left, faults, window)
    return Unexplained(len(left) - len(wrong), wrong)


def beyond_windows(repeats: Iterable[Repeat], faults: Iterable[Fault], window: int) -> list[Repeat]:
    """The repeats that were not in flight at any fault, or were too many for it: *window* for each partition."""
    faults = sorted(faults, key=attrgetter("at"))
    room: dict[tuple[int, int], int] = {}
    wrong = []
    # Who has to be served first is; from the first fault on that has room for it: so as many as possible find room.
    for repeat in sorted(repeats, key=attrgetter("again")):
        for number, fault in enumerate(faults):
            last = repeat.again if fault.windows > 1 else repeat.before
            if repeat.before - IN_FLIGHT_MS <= fault.at <= last + fault.noted:
                left = room.get((repeat.partition, number), window * fault.windows)
                if left:
                    room[repeat.partition, number] = left - 1
                    break
        else:
            wrong.append(repeat)
    return wrong


def permits_out_of_bounds(state: Mapping[str, Any]) -> str | None:
    """I9: what is wrong with the permits of a member that says *state* of itself (``/debug/state``), at any moment."""
    limit, in_use, available = (state["limiter"][name] for name in ("limit", "in_use", "available"))
    windows = _windows(state)
    if not 0 <= in_use <= limit or available != limit - in_use:
        return f"{in_use} of {limit} permits in use, {available} available"
    # A drained window is listed until all of them are, and its permits are back already.
    held = sum(windows) if state["state"] == "running" else 0
    if min(windows, default=0) < 0 or held > in_use:
        return f"windows of {windows} with {in_use} permits in use"
    crowded = [one for one in state["partitions"] if not 0 <= one["in_flight"] <= (one["window"] or 0)]
    return f"more in flight than their windows: {crowded}" if crowded else None


def permits_astray(state: Mapping[str, Any]) -> int:
    """I9: how many permits of a member are in use and no window's: none where nothing ends or begins."""
    in_use: int = state["limiter"]["in_use"]
    return in_use - sum(_windows(state))


def _windows(state: Mapping[str, Any]) -> list[int]:
    return [one["window"] or 0 for one in state["partitions"]]


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
