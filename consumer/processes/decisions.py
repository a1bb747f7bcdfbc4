"""When a process is started, asked to stop or killed, and when all of it ends (pure: no process, no clock).

Each method says what has happened, and returns what is to be done about it.

1. **Begin**: start every process.
2. **A process has ended** that nobody had asked to:
   * with 4 (poison limit): all are asked to stop, and the end is 4.
   * with 2 (configuration) before it was ever running: likewise, with 2; the others have the same configuration.
   * in any other way (3, a signal, a crash, and also 0, when somebody has sent a signal to it alone): it is started
     again after a wait that doubles with every end in a row, from :data:`RESTART_SECONDS` to
     :data:`RESTART_SECONDS_MAX`, jittered. Having run for :data:`STABLE_SECONDS` clears its record.
   * and that for the :data:`ENDS_MAX`-th time in a row: all are asked to stop, and the end is 3. Starting it here does
     not help; whoever started us may do it elsewhere, and will show it to somebody.
3. **A process does not answer**, :data:`SILENCES_MAX` times in a row: it is killed, and 2 follows.
4. **A first signal**: all are asked to stop, nothing is started any more. The end is 0 if each process leaves with 0,
   else the gravest of their exit codes.
5. **A signal during a stop**, whatever its cause: all are killed, and the end is 128 + signal, at once.
6. **A stop takes too long**: what still runs is killed, and the end is that of the stop, but 1 for 0, at once.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from consumer.exits import CLEAN, FAILURE, FATAL, POISONED, SIGNALLED, USAGE

RESTART_SECONDS: Final = 1.0
"""Longest wait before the first restart in a row: one that fails while starting is not to take a core."""
RESTART_SECONDS_MAX: Final = 30.0
"""Longest wait of all: below a usual session timeout (45 s), so that partitions move once, not twice."""
STABLE_SECONDS: Final = 60.0
"""Running this long makes a crash the first one again: longer than the longest wait and a start together."""
ENDS_MAX: Final = 8
"""Ends in a row before giving up: with the waits between them 45 to 91 s, longer than a broker or a disk takes to come
back from a restart."""
SILENCES_MAX: Final = 12
"""Unanswered questions in a row before a process counts as hung, 5 s each: as patient as a liveness probe with usual
settings is (six times 10 s), and no stall of a healthy event loop is as long. Counted in questions, not in seconds, so
that nobody is killed because the supervisor itself had been stopped."""

GRAVEST: Final = (POISONED, FATAL, USAGE)
"""Exit codes that say something, the gravest first; any other failure is just :data:`~consumer.exits.FAILURE`."""


@dataclass(frozen=True, slots=True)
class Start:
    """Start a process."""

    number: int


@dataclass(frozen=True, slots=True)
class AskToStop:
    """Ask a process to drain and leave."""

    number: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill a process."""

    number: int


@dataclass(frozen=True, slots=True)
class End:
    """End all of it with an exit code."""

    code: int
    at_once: bool = False
    """Whether nothing is waited for any more."""


Action: TypeAlias = Start | AskToStop | Kill | End


@dataclass(slots=True)
class _Process:
    number: int
    alive: bool = False
    running_since: float | None = None
    """When this run of it was first seen in the group; None before."""
    silences: int = 0
    ends: int = 0
    """Unasked ends in a row."""
    due: float | None = None
    """When it is to be started again."""
    last_end: str = "has not been started"


@dataclass(slots=True)
class Decisions:
    """Decides for *processes* processes, numbered from 1; every ``now`` is in seconds on one monotonic clock.

    Args:
        processes: How many there are.
        stop_seconds: How long a stop may take.
        chance: Returns a random number from 0 to 1.
    """

    processes: int
    stop_seconds: float
    chance: Callable[[], float] = random.random
    cause: str | None = None
    """Why everything stops, where that is no signal."""
    _all: dict[int, _Process] = field(init=False)
    _stop_code: int | None = None
    _stop_due: float = 0.0
    _codes: set[int] = field(default_factory=set)
    """Exit codes of processes that ended during the stop."""

    def __post_init__(self) -> None:
        self._all = {number: _Process(number) for number in range(1, self.processes + 1)}

    def stopping(self) -> bool:
        """Whether a stop has begun."""
        return self._stop_code is not None

    def gave_up(self) -> bool:
        """Whether that is because a process ends again and again."""
        return self._stop_code == FATAL

    def begin(self) -> list[Action]:
        """Start them all."""
        return [self._start(process) for process in self._all.values()]

    def heard(self, number: int, now: float, *, running: bool) -> None:
        """A process has answered, and is *running*, that is in the group, or not yet."""
        process = self._all[number]
        process.silences = 0
        if running and process.running_since is None:
            process.running_since = now

    def silent(self, number: int) -> list[Action]:
        """A process has not answered in time."""
        process = self._all[number]
        process.silences += 1
        if process.silences == SILENCES_MAX and process.alive and not self.stopping():
            return [Kill(number)]
        return []

    def ended(self, number: int, code: int, now: float) -> list[Action]:
        """A process has ended with *code*, negative for a signal."""
        process = self._all[number]
        process.alive = False
        process.last_end = f"ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        if self.stopping():
            self._codes.add(code)
            return self._end_if_all_have()
        was_running, process.running_since = process.running_since, None
        if code == POISONED:
            return self._stop(POISONED, now, f"process {number} stopped: too many poison records")
        if code == USAGE and was_running is None:
            return self._stop(USAGE, now, f"process {number} cannot be started with this configuration")
        if was_running is not None and now - was_running >= STABLE_SECONDS:
            process.ends = 0
        process.ends += 1
        if process.ends >= ENDS_MAX:
            return self._stop(FATAL, now, f"process {number} {process.last_end}, {process.ends} times in a row")
        longest = min(RESTART_SECONDS_MAX, RESTART_SECONDS * 2.0 ** (process.ends - 1))
        process.due = now + longest * (0.5 + 0.5 * self.chance())
        return []

    def signalled(self, number: int, now: float) -> list[Action]:
        """Signal *number* has come."""
        if self.stopping():
            return [*self._kill_all(), End(SIGNALLED + number, at_once=True)]
        return self._stop(CLEAN, now, None)

    def tick(self, now: float) -> list[Action]:
        """Time has passed: restarts that are due, and the end of a stop's patience."""
        if self.stopping():
            if now < self._stop_due:
                return []
            return [*self._kill_all(), End(self._verdict() or FAILURE, at_once=True)]
        return [
            self._start(process) for process in self._all.values() if process.due is not None and process.due <= now
        ]

    def next_due(self) -> float | None:
        """When :meth:`tick` is to be called next; None = no need to."""
        if self.stopping():
            return self._stop_due
        return min((process.due for process in self._all.values() if process.due is not None), default=None)

    def words(self, number: int, now: float) -> str:
        """Say what became of a process that is not alive."""
        process = self._all[number]
        if process.due is None:
            return process.last_end
        return f"{process.last_end}, starts again in {max(0.0, process.due - now):.0f} s"

    def _start(self, process: _Process) -> Action:
        process.alive, process.due, process.silences = True, None, 0
        return Start(process.number)

    def _stop(self, code: int, now: float, cause: str | None) -> list[Action]:
        self._stop_code, self._stop_due, self.cause = code, now + self.stop_seconds, cause
        for process in self._all.values():
            process.due = None
        asked: list[Action] = [AskToStop(process.number) for process in self._all.values() if process.alive]
        return asked or self._end_if_all_have()

    def _kill_all(self) -> list[Action]:
        return [Kill(process.number) for process in self._all.values() if process.alive]

    def _end_if_all_have(self) -> list[Action]:
        return [] if any(process.alive for process in self._all.values()) else [End(self._verdict())]

    def _verdict(self) -> int:
        """The exit code: that of the stop's cause, else the gravest of those that left during it."""
        if self._stop_code:
            return self._stop_code
        for code in GRAVEST:
            if code in self._codes:
                return code
        return FAILURE if self._codes - {CLEAN} else CLEAN


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
