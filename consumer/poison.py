"""When there are too many poison records in one partition (pure, bounded).

Whether a record is poison is known when it is decoded, and a partition's records are decoded one after another in
offset order: so the rules are judged in that order, whatever order the answers leave in, and the record that reaches a
limit is the last one that is worked on. Records that an earlier assignment has finished are not decoded, nor counted.

Two rules, each of which may be absent:

* *run*: ``max_consecutive`` poison records in a row;
* *ratio*: more than ``max_ratio`` of the last ``ratio_window`` records are poison, judged once so many were seen.

A gauge belongs to one assignment and begins at nothing with it. It keeps no more than one number for each poison record
of the window.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from math import floor


class PoisonLimitReached(Exception):
    """A partition has too many poison records, and the whole service is to stop for it."""


@dataclass(frozen=True, slots=True)
class PoisonPolicy:
    """The limits of one partition (``dead_letter`` of the configuration).

    Raises:
        ValueError: a count below 1, or a ratio outside 0 to 1.
    """

    max_consecutive: int | None = None
    """Poison records in a row that reach the limit; None = no such limit."""
    max_ratio: float | None = None
    """Share of poison records above which the limit is reached, read as a decimal; None = no such limit."""
    ratio_window: int = 1000
    """Records over which the share is judged."""

    def __post_init__(self) -> None:
        if self.max_consecutive is not None and self.max_consecutive < 1:
            raise ValueError(f"a run is of at least 1 record, not {self.max_consecutive}")
        if self.max_ratio is not None and not 0 <= self.max_ratio <= 1:
            raise ValueError(f"a ratio is from 0 to 1, not {self.max_ratio}")
        if self.ratio_window < 1:
            raise ValueError(f"a window is of at least 1 record, not {self.ratio_window}")

    def gauge(self) -> PoisonGauge | None:
        """Return a gauge for one assignment; None where there is no limit to reach."""
        return None if self.max_consecutive is None and self.max_ratio is None else PoisonGauge(self)


UNLIMITED = PoisonPolicy()
"""However much poison there is, reading goes on."""


class PoisonGauge:
    """Counts the records of one assignment, in offset order, until a limit is reached."""

    __slots__ = ("_allowed", "_poisoned", "_policy", "_run", "_seen")

    def __init__(self, policy: PoisonPolicy) -> None:
        self._policy = policy
        self._run = 0
        """Poison records since the last good one."""
        self._seen = 0
        self._poisoned: deque[int] = deque()
        """Which of the records seen were poison, ascending; only those within the window."""
        ratio = policy.max_ratio
        self._allowed = None if ratio is None else floor(Fraction(str(ratio)) * policy.ratio_window)
        """Poison records that a full window may hold. In whole numbers: as a float, 0.29 of 100 would be 28."""

    def add(self, *, poison: bool) -> str | None:
        """Count the next record.

        Returns:
            Which limit is reached, in words; None while none is.
        """
        self._run = self._run + 1 if poison else 0
        if self._allowed is not None:
            self._slide(poison)
            over = len(self._poisoned) > self._allowed and self._seen >= self._policy.ratio_window
            if over:
                return f"{len(self._poisoned)} of the last {self._policy.ratio_window} records are poison"
        if self._run == self._policy.max_consecutive:
            return f"{self._run} poison records in a row"
        return None

    def _slide(self, poison: bool) -> None:  # noqa: FBT001 - private, one caller
        poisoned = self._poisoned
        if poisoned and poisoned[0] <= self._seen - self._policy.ratio_window:
            poisoned.popleft()
        if poison:
            poisoned.append(self._seen)
        self._seen += 1
