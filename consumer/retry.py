"""When to try again, and how long to wait: bounded, growing, fully jittered (pure).

*What* is tried again is not decided here: an error says so itself (``retriable``). The wait before attempt n + 1 is
drawn evenly from 0 to ``initial * 2 ** (n - 1)`` seconds, at most ``max``. Full jitter, because the operations of a
window fail together when storage fails: with a common floor they would all come back together too.

When ``attempts`` are used up, ``exhausted`` decides: ``answer`` = the last error is the outcome; ``block`` = storage
counts as unavailable and the operation is tried again for ever, its permit held: back-pressure instead of a flood of
failures (contract 6).

An attempt that takes longer than ``attempt_timeout_seconds`` has failed, retriably.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Exhausted: TypeAlias = Literal["block", "answer"]

_DOUBLINGS_MAX = 60
"""Where doubling ends: 2 ** 60 times any wait is above every limit, and attempts go on for ever."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often an operation is tried, and what happens then.

    Raises:
        ValueError: fewer than 1 attempt, not ``0 <= initial_seconds <= max_seconds``, or an attempt that may take no
            time at all.
    """

    attempts: int = 3
    """Attempts in all, the first included."""
    initial_seconds: float = 0.1
    """Longest wait before the second attempt; doubles with each one."""
    max_seconds: float = 5.0
    """Longest wait of all."""
    exhausted: Exhausted = "block"
    """What follows the last attempt."""
    attempt_timeout_seconds: float | None = 20.0
    """Longest time of one attempt, waits between attempts not included; None = no limit."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"at least 1 attempt is made, not {self.attempts}")
        if not 0 <= self.initial_seconds <= self.max_seconds:
            raise ValueError(f"waits are 0 <= initial <= max: {self.initial_seconds}, {self.max_seconds}")
        if self.attempt_timeout_seconds is not None and not self.attempt_timeout_seconds > 0:
            raise ValueError(f"an attempt may take more than 0 seconds, not {self.attempt_timeout_seconds}")

    def backoff(self, failed: int, jitter: float) -> float:
        """Return the seconds to wait after the attempt number *failed*.

        Args:
            failed: Attempts made so far, at least 1.
            jitter: Where in the interval: evenly drawn from 0 to 1.
        """
        longest = self.initial_seconds * 2 ** min(failed - 1, _DOUBLINGS_MAX)
        return float(jitter * min(longest, self.max_seconds))
