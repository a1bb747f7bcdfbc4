"""When a process that looks alive does nothing any more, and a restart is right (pure: observations and time come in).

The Kafka client can go on sending heartbeats while it delivers nothing for ever (hazards H3, H4, H31, H34), and so can
a defect of our own. :class:`Watchdog` is shown an :class:`Observation` every few seconds and names what is suspicious:

1. *client*: one of the client's own tasks has ended. Certain, and therefore at once.
2. *poll*: the poll loop has not come round, or the group has not told us our partitions, for ``poll_seconds``.
3. *metadata*: the client has not learned where the brokers are for ``metadata_seconds``: they may have moved, all of
   them, and the client asks only those it knows.
4. *stall*: a partition has lag, its position and its watermark have not moved for ``stall_seconds``, and nothing
   explains that. This one needs to know nothing of the client.

What explains a partition that stands still, for as long as it holds:

* a reason that names a cause: storage, output or registry not there, the poison limit, a position out of range, a batch
  that cannot be read, a topic that may not be read;
* an operation in flight, no longer than its attempts can take (``operation_seconds``). What takes longer is either
  counted as storage being unavailable, or it hangs;
* ``bytes`` and ``at_capacity`` only while somebody holds what this partition waits for, and ``recovering`` only while
  the older run can still end: else they tell of something lost. ``offset_distance`` tells nothing by itself: what it
  waits for is an operation, or an answer.

A suspicion other than *client* is held against the brokers before anything is done, by a fresh connection: where they
do not answer either, or there is nothing to be read, a restart would not help, and :meth:`Watchdog.excuse` gives the
suspect its time again. So an outage of the brokers, however long, ends no process.

Only time that was watched counts: a process that was frozen, or whose event loop was blocked, wakes up without debts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

LOOK_SECONDS = 5.0
"""How often somebody looks; a look costs microseconds for each partition."""

STALL_SECONDS = 300.0
"""A partition that stands still for no reason. The longest wait that is none of our business ends by itself: a request
to a broker that has vanished (``kafka.request_timeout``, 70 s), then metadata (60 s) and another request to the new
leader (70 s): 200 s. Readiness tells of a partition without answers after 60 s, long before."""

METADATA_SECONDS = 300.0
"""Metadata are asked for every 60 s (``METADATA_MAX_AGE_MS``), from one broker after another until one answers. Five
times that leaves room for four brokers that have vanished (70 s each) before one that has not."""

Kind: TypeAlias = Literal["client", "poll", "metadata", "stall"]

_CAUSES = frozenset(
    {"storage_unavailable", "registry", "output", "poison_limit", "out_of_range", "unreadable", "refused"}
)
"""Reasons that stand for a cause outside, or for a decision. All but the last two are pause reasons of contract 8; a
batch that cannot be read, and a topic that may not be, are told by readiness."""


class WatchdogTripped(Exception):
    """The process does nothing any more, and nothing but a restart is known to help."""


@dataclass(frozen=True, slots=True)
class WatchdogLimits:
    """How long what may stand still."""

    poll_seconds: float
    operation_seconds: float
    stall_seconds: float = STALL_SECONDS
    metadata_seconds: float = METADATA_SECONDS


def watchdog_limits(
    *,
    rebalance_timeout: float,
    request_timeout: float,
    attempts: int,
    attempt_timeout: float,
    backoff_max: float,
) -> WatchdogLimits:
    """Derive limits from settings, all in seconds.

    A poll waits while the group rebalances: for every member's drain (one rebalance time-out), then for the leader's
    plan (another one), and a join that got no answer is asked for again (one request time-out each): by default 260 s,
    below the client's own limit between two polls, which is not to be trusted (H4).

    An operation has used up its attempts after each has taken its time limit and waited for the next.
    """
    return WatchdogLimits(
        poll_seconds=2 * (rebalance_timeout + request_timeout),
        operation_seconds=attempts * (attempt_timeout + backoff_max),
        stall_seconds=max(STALL_SECONDS, 3 * request_timeout),
        metadata_seconds=max(METADATA_SECONDS, 3 * request_timeout),
    )


@dataclass(frozen=True, slots=True)
class PartitionSeen:
    """One assigned partition at the moment of a look."""

    topic: str
    partition: int
    progress: Hashable
    """Changes with everything that moves: epoch, position, watermark."""
    lag: int | None
    """None = not known, because reading has not begun."""
    reasons: Sequence[str] = ()
    """Why it is paused, if it is."""
    oldest_seconds: float | None = None
    """Age of its oldest operation in flight, of an older run too; None where none is."""
    holds_bytes: bool = False
    """Records of it are in the process, fetched and not finished."""
    holds_permits: bool = False


@dataclass(frozen=True, slots=True)
class Observation:
    """The process at the moment of a look."""

    polls: int
    """How often the poll loop has come round."""
    epoch: int
    rebalancing: bool
    """Waiting for the group to tell what is ours."""
    metadata: Hashable
    """Changes each time the client has learned where the brokers are."""
    partitions: Sequence[PartitionSeen] = ()
    dead: str | None = None
    """Which of the client's own tasks has ended, in words."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Something that stands still for no reason that can be seen from inside."""

    kind: Kind
    text: str = field(compare=False)
    partition: tuple[str, int] | None = None
    """Of a *stall*: topic and number."""


class Watchdog:
    """Remembers what stood still, and for how long of the time it was watched.

    Args:
        limits: How long what may stand still.
    """

    def __init__(self, limits: WatchdogLimits) -> None:
        self._limits = limits
        self._looked_at: float | None = None
        self._standing: dict[tuple[Kind, tuple[str, int] | None], tuple[Hashable, float]] = {}
        """What is watched: the mark it has stood at, and for how many seconds."""

    def look(self, seen: Observation, now: float) -> list[Suspicion]:
        """Judge an observation of the time *now*, in monotonic seconds; the worst suspicion first."""
        last, self._looked_at = self._looked_at, now
        # What is longer was not watched: the process did not run.
        watched = 0.0 if last is None else min(max(0.0, now - last), 2 * LOOK_SECONDS)
        before, self._standing = self._standing, {}
        return list(self._suspicions(seen, before, watched))

    def excuse(self, suspicion: Suspicion) -> None:
        """A restart would not help against *suspicion*: its time begins anew."""
        name = suspicion.kind, suspicion.partition
        if name in self._standing:
            self._standing[name] = (self._standing[name][0], 0.0)

    def _suspicions(
        self,
        seen: Observation,
        before: dict[tuple[Kind, tuple[str, int] | None], tuple[Hashable, float]],
        watched: float,
    ) -> Iterator[Suspicion]:
        limits = self._limits

        def stands(kind: Kind, mark: Hashable, partition: tuple[str, int] | None = None) -> float:
            old, seconds = before.get((kind, partition), (None, 0.0))
            seconds = seconds + watched if old == mark else 0.0
            self._standing[kind, partition] = (mark, seconds)
            return seconds

        if seen.dead is not None:
            yield Suspicion("client", seen.dead)
        mark = ("rebalancing", seen.epoch) if seen.rebalancing else ("polling", seen.polls)
        seconds = stands("poll", mark)
        if seconds >= limits.poll_seconds:
            what = "the group has not told our partitions" if seen.rebalancing else "the poll loop has not come round"
            yield Suspicion("poll", f"{what} for {seconds:.0f} s")
        seconds = stands("metadata", ("metadata", seen.metadata))
        if seconds >= limits.metadata_seconds:
            yield Suspicion("metadata", f"the client has not learned where the brokers are for {seconds:.0f} s")
        for one in seen.partitions:
            if one.lag == 0 or self._explained(one, seen.partitions):
                continue
            name = one.topic, one.partition
            seconds = stands("stall", ("at", one.progress), name)
            if seconds >= limits.stall_seconds:
                what = f"{one.topic}/{one.partition} has not moved for {seconds:.0f} s"
                yield Suspicion("stall", f"{what}, and nothing says why", name)

    def _explained(self, one: PartitionSeen, partitions: Sequence[PartitionSeen]) -> bool:
        """Tell whether something that can be seen says why *one* stands still."""
        if one.oldest_seconds is not None and one.oldest_seconds <= self._limits.operation_seconds:
            return True
        return any(
            reason in _CAUSES
            or (reason == "bytes" and any(other.holds_bytes for other in partitions))
            or (reason == "at_capacity" and any(other.holds_permits for other in partitions))
            for reason in one.reasons
        )
