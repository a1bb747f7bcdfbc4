"""Ends the process where its event loop does not come round any more: no task of ours runs then to notice it.

A thread looks at a beat of the loop once a second. A beat that has stayed the same for :data:`BLOCKED_LOOKS` looks ends
the process with exit 3: first every thread's stack goes to standard error, so that it can be seen what blocks.

Looks are counted rather than time: a process that was frozen looked at nothing meanwhile, and wakes up without debts.

Not seen: code that keeps the interpreter's lock for ever, because this thread does not run either. The liveness probe
tells of that, as it does of everything here, from outside.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
from collections.abc import Callable

from consumer.exits import FATAL
from consumer.log import get_logger

log = get_logger(__name__)

LOOK_SECONDS = 1.0

BLOCKED_LOOKS = 120
"""A loop that was blocked for a minute goes on by itself, having lost its partitions (``kafka.session_timeout``, 45 s);
what blocks for two does not end."""

TELL_SECONDS = 5.0
"""For the last words: where standard error is what blocks, they are not heard."""


class LoopWatch:
    """The thread that watches one event loop; its owner starts and stops it.

    Args:
        end: What is done about a loop that is blocked, on the watching thread.
    """

    def __init__(self, end: Callable[[], object] | None = None) -> None:
        self._end = end or _end
        self._beats = 0
        self._beating: asyncio.TimerHandle | None = None
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to watch the running event loop."""
        self._beat(asyncio.get_running_loop())
        threading.Thread(target=self._watch, name="loop watch", daemon=True).start()

    def stop(self) -> None:
        """End the watch; the thread ends by itself, at once."""
        self._stopped.set()
        if self._beating is not None:
            self._beating.cancel()

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beats += 1
        self._beating = loop.call_later(LOOK_SECONDS / 2, self._beat, loop)

    def _watch(self) -> None:
        seen, same = self._beats, 0
        while not self._stopped.wait(LOOK_SECONDS):
            same = same + 1 if self._beats == seen else 0
            seen = self._beats
            if same >= BLOCKED_LOOKS:
                self._end()
                return


def _end() -> None:
    telling = threading.Thread(target=_tell, name="last words", daemon=True)
    telling.start()
    telling.join(TELL_SECONDS)
    os._exit(FATAL)


def _tell() -> None:
    log.critical("fatal: a restart is right", error="the event loop is blocked", seconds=BLOCKED_LOOKS * LOOK_SECONDS)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    sys.stderr.flush()
