"""``python -m consumer``; on SIGUSR1 it writes where every thread and every asyncio task of it stands into its log.

How the tests start the service, so that one that hangs can be asked why before it is killed.
"""

from __future__ import annotations

import asyncio
import faulthandler
import runpy
import signal
import sys
from contextlib import suppress


def _print_tasks(*_: object) -> None:
    """Runs in the main thread, when the event loop lets it: no tasks below the threads means that the loop is stuck."""
    with suppress(RuntimeError):  # no loop is running
        for task in sorted(asyncio.all_tasks(), key=asyncio.Task.get_name):
            task.print_stack(file=sys.stderr)
    sys.stderr.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _print_tasks)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)
    runpy.run_module("consumer", run_name="__main__", alter_sys=True)
