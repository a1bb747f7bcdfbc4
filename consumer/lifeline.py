"""A child process that does not outlive its parent.

Linux: the child asks the kernel to kill it when the thread that started it ends, and then looks whether that has
happened already. Elsewhere the system promises nothing of the kind; whoever needs it there has to notice the parent's
end by itself, for example by a pipe that is closed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def dies_with(parent: int) -> Callable[[], None] | None:
    """Return what a child of the process *parent* runs first; None where the system cannot promise anything.

    Args:
        parent: Process id of the parent; the child ends at once (exit 1) where that is gone before the kernel knows.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return bind
