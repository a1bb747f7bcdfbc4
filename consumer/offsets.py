"""Which offsets of one partition are finished, and how far that allows a commit (pure, bounded by its caller).

Only offsets that were *delivered* are tracked: offsets have gaps (compaction, transaction markers, aborted batches), so
``offset + 1`` may never come and counting records gives wrong positions (hazard H9b).

1. ``track`` the offsets of a fetch, in delivery order, all above everything tracked before.
2. ``resolve`` them in any order, once their responses are acknowledged.
3. ``watermark`` is the lowest unfinished offset, or where there is none the position: the offset after the last one
   delivered. It is exclusive, as Kafka commits are: everything below it is finished.

``advance`` moves the position over offsets that will never be delivered. Resolving an offset that is not unfinished is
a programmer's error and raises: it would mean that a record was answered twice or never tracked.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from operator import lt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DISTANCE_MAX = 20_000
"""Offsets between the lowest unfinished one and the last one read, beyond which a partition is not read further
(reason ``offset_distance``). Without a bound one stuck record would let finished work above it grow without end, all
of it to be run again after a crash. One bit an offset is 2,500 bytes, 3,336 characters in base 64: it fits the 4,096
characters that a Kafka commit may carry as metadata."""


class OffsetTracker:
    """Delivered offsets of one assignment, and their watermark.

    Args:
        start: The offset reading starts at: the committed one, or the chosen start; at least 0.

    Raises:
        ValueError: *start* is negative. Kafka's -1 means that nothing is committed; it is no offset to commit.
    """

    __slots__ = ("_order", "_position", "_unfinished")

    def __init__(self, start: int) -> None:
        if start < 0:
            raise ValueError(f"{start} is not an offset")
        self._position = start
        self._order: deque[int] = deque()
        self._unfinished: set[int] = set()

    def track(self, offsets: Sequence[int]) -> None:
        """Add delivered *offsets*, ascending and not below the position.

        Raises:
            ValueError: the first offset lies below the position, or they do not ascend; none of them is tracked.
        """
        if not offsets:
            return
        if offsets[0] < self._position or not all(map(lt, offsets, islice(offsets, 1, None))):
            raise ValueError(f"offsets {offsets[0]}..{offsets[-1]} do not follow position {self._position}")
        self._order.extend(offsets)
        self._unfinished.update(offsets)
        self._position = offsets[-1] + 1

    def resolve(self, offsets: Iterable[int]) -> None:
        """Mark *offsets* finished.

        Raises:
            ValueError: one of them is not unfinished; those before it are resolved.
        """
        for offset in offsets:
            try:
                self._unfinished.remove(offset)
            except KeyError:
                raise ValueError(f"offset {offset} is not unfinished") from None

    def advance(self, position: int) -> None:
        """Move the position forward over offsets that hold no record; a lower one changes nothing."""
        self._position = max(self._position, position)

    @property
    def position(self) -> int:
        """The next offset to be delivered."""
        return self._position

    @property
    def watermark(self) -> int:
        """The lowest unfinished offset, or the position where everything is finished; never goes back."""
        order, unfinished = self._order, self._unfinished
        while order and order[0] not in unfinished:
            order.popleft()
        return order[0] if order else self._position

    @property
    def unfinished(self) -> int:
        """How many delivered offsets are not finished."""
        return len(self._unfinished)

    @property
    def finished_above_gap(self) -> int:
        """How many finished offsets lie above the lowest unfinished one; these run again after a hard kill."""
        _ = self.watermark
        return len(self._order) - len(self._unfinished)

    @property
    def distance(self) -> int:
        """Offsets from the watermark to the position; compare with :data:`DISTANCE_MAX`."""
        return self._position - self.watermark
