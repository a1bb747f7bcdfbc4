"""Which offsets of one partition are finished, and how far that allows a commit (pure, bounded by its caller).

Only offsets that were *delivered* are tracked: offsets have gaps (compaction, transaction markers, aborted batches), so
``offset + 1`` may never come and counting records gives wrong positions (hazard H9b).

1. ``track`` the offsets of a fetch, in delivery order, all above everything tracked before.
2. ``resolve`` them in any order, once their responses are acknowledged.
3. ``watermark`` is the lowest unfinished offset, or where there is none the position: the offset after the last one
   delivered. It is exclusive, as Kafka commits are: everything below it is finished.
4. ``finished_runs`` are the finished offsets above it. Committed beside the watermark (:mod:`consumer.offset_map`) and
   given to the next tracker of the partition, they are not run again: ``track`` leaves them out of what it returns.

``advance`` moves the position over offsets that will never be delivered. Resolving an offset that is not unfinished is
a programmer's error and raises: it would mean that a record was answered twice or never tracked.

Kept are the unfinished offsets, in order, and the delivered ones as runs; what is finished is the difference. So a
record costs one entry while it is unfinished and nothing afterwards, however far above the gap it lies, and the
finished runs cost a step for each unfinished offset and each hole in the log, not one for each record.
"""

from __future__ import annotations

from collections import deque
from itertools import islice, pairwise
from operator import lt
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DISTANCE_MAX: Final = 20_000
"""Offsets from the lowest unfinished one on that are read at all (reason ``offset_distance``). Without a bound one
stuck record would let finished work above it grow without end. With this one the offset map always fits: one bit for
each of them is 2,500 bytes; with base, cluster and checksum at most 2,769, in base 64 3,696 characters, of the 4,096
that a Kafka commit may carry as metadata."""

Run: TypeAlias = tuple[int, int]
"""First and last of successive offsets, both included."""


class OffsetTracker:
    """Delivered offsets of one assignment, and their watermark.

    Args:
        start: The offset reading starts at: the committed one, or the chosen start; at least 0.
        finished: Offsets from *start* on that an earlier assignment has finished: ascending runs with gaps between.

    Raises:
        ValueError: *start* is negative (Kafka's -1 means that nothing is committed; it is no offset to commit), or
            *finished* is not as described.
    """

    __slots__ = ("_delivered", "_position", "_restored", "_unfinished")

    def __init__(self, start: int, finished: Iterable[Run] = ()) -> None:
        if start < 0:
            raise ValueError(f"{start} is not an offset")
        self._position = start
        self._unfinished: dict[int, None] = {}
        """Ascending, as dictionaries keep the order of insertion: the lowest one is the first."""
        self._delivered: deque[Run] = deque()
        """Runs of delivered offsets, the first few possibly below the watermark."""
        self._restored: deque[Run] = deque()
        """Finished by an earlier assignment and not delivered to this one; all from the position on."""
        lowest = start
        for first, last in finished:
            if not lowest <= first <= last:
                raise ValueError(f"run {first}..{last} begins below {lowest} or has no end")
            self._restored.append((first, last))
            lowest = last + 2

    def track(self, offsets: Sequence[int]) -> Sequence[int]:
        """Add delivered *offsets*, ascending and not below the position.

        Returns:
            Those that are unfinished: *offsets* itself, less what an earlier assignment has finished.

        Raises:
            ValueError: the first offset lies below the position, or they do not ascend; none of them is tracked.
        """
        if not offsets:
            return offsets
        first, last = offsets[0], offsets[-1]
        if first < self._position or not all(map(lt, offsets, islice(offsets, 1, None))):
            raise ValueError(f"offsets {first}..{last} do not follow position {self._position}")
        self._deliver([(first, last)] if last - first + 1 == len(offsets) else _runs(offsets))
        if self._restored:
            offsets = self._without_restored(offsets)
        self._unfinished.update(dict.fromkeys(offsets))
        self._move(last + 1)
        return offsets

    def resolve(self, offsets: Iterable[int]) -> None:
        """Mark *offsets* finished.

        Raises:
            ValueError: one of them is not unfinished; those before it are resolved.
        """
        unfinished = self._unfinished
        offset = -1
        try:
            for offset in offsets:
                del unfinished[offset]
        except KeyError:
            raise ValueError(f"offset {offset} is not unfinished") from None

    def advance(self, position: int) -> None:
        """Move the position forward over offsets that hold no record; a lower one changes nothing."""
        if position > self._position:
            self._move(position)

    @property
    def position(self) -> int:
        """The next offset to be delivered."""
        return self._position

    @property
    def watermark(self) -> int:
        """The lowest unfinished offset, or the position where everything is finished; never goes back."""
        return next(iter(self._unfinished), self._position)

    @property
    def unfinished(self) -> int:
        """How many delivered offsets are not finished."""
        return len(self._unfinished)

    @property
    def restored(self) -> int:
        """How many offsets an earlier assignment has finished that were not delivered to this one, and still may be."""
        return sum([last - first + 1 for first, last in self._restored])

    @property
    def finished_above_gap(self) -> int:
        """How many finished offsets lie above the watermark: what the offset map keeps from running again."""
        delivered = sum([last - first + 1 for first, last in self._delivered_above_watermark()])
        return self.restored + delivered - len(self._unfinished)

    @property
    def distance(self) -> int:
        """Offsets from the watermark to the position; compare with :data:`DISTANCE_MAX`."""
        return self._position - self.watermark

    def finished_runs(self) -> list[Run]:
        """Return the finished offsets above the watermark: ascending runs with gaps between them.

        All of them were delivered, to this assignment or to an earlier one; none lies ``DISTANCE_MAX`` or more above
        the watermark, where what is tracked keeps to that.
        """
        runs: list[Run] = []
        unfinished = iter(self._unfinished)
        hole = next(unfinished, None)
        for first, last in self._delivered_above_watermark():
            begin = first
            while hole is not None and hole <= last:
                if begin < hole:
                    runs.append((begin, hole - 1))
                begin = hole + 1
                hole = next(unfinished, None)
            if begin <= last:
                runs.append((begin, last))
        if runs and self._restored and runs[-1][1] + 1 == self._restored[0][0]:
            runs[-1] = runs[-1][0], self._restored[0][1]
            runs.extend(islice(self._restored, 1, None))
        else:
            runs.extend(self._restored)
        return runs

    def _deliver(self, runs: list[Run]) -> None:
        """Add *runs* to the delivered ones; those below the watermark need not be known any more."""
        delivered = self._delivered_above_watermark()
        if delivered and delivered[-1][1] + 1 == runs[0][0]:
            runs[0] = delivered.pop()[0], runs[0][1]
        delivered.extend(runs)

    def _delivered_above_watermark(self) -> deque[Run]:
        """Return the runs of delivered offsets from the watermark on, having dropped the others."""
        delivered, watermark = self._delivered, self.watermark
        while delivered and delivered[0][1] < watermark:
            delivered.popleft()
        if delivered and delivered[0][0] < watermark:
            delivered[0] = watermark, delivered[0][1]
        return delivered

    def _without_restored(self, offsets: Sequence[int]) -> list[int]:
        """Return *offsets* less those an earlier assignment has finished."""
        restored = iter(self._restored)
        first, last = next(restored)
        kept: list[int] = []
        for index, offset in enumerate(offsets):
            while offset > last:
                found = next(restored, None)
                if found is None:
                    kept.extend(offsets[index:])
                    return kept
                first, last = found
            if offset < first:
                kept.append(offset)
        return kept

    def _move(self, position: int) -> None:
        """Set the position; finished offsets below it were delivered by now, or are gone from the log."""
        self._position = position
        restored = self._restored
        while restored and restored[0][1] < position:
            restored.popleft()
        if restored and restored[0][0] < position:
            restored[0] = position, restored[0][1]


def _runs(offsets: Sequence[int]) -> list[Run]:
    """Split ascending *offsets* where one is missing."""
    lasts = [before for before, offset in pairwise(offsets) if offset != before + 1]
    firsts = [offset for before, offset in pairwise(offsets) if offset != before + 1]
    return list(zip([offsets[0], *firsts], [*lasts, offsets[-1]], strict=True))
