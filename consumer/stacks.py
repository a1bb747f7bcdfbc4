"""Where every asyncio task of the process stands, in words, for the log of a process that ends because it hangs.

``Task.get_stack`` shows one frame of a task that waits; here the whole chain of awaits is followed, outermost first, to
the thing that is really waited for. Names and line numbers only: no local variables, so no keys and no payloads.
"""

from __future__ import annotations

import asyncio
import gc
from pathlib import PurePath
from types import AsyncGeneratorType, CoroutineType, FrameType
from typing import Any

FRAMES_MAX = 40
"""Frames of one task that are shown: more than any chain of ours; bounds what a recursion would bring along."""


def task_stacks() -> list[dict[str, Any]]:
    """Return name and chain of awaits of each task of the running event loop that has not ended, sorted by name."""
    tasks = sorted(asyncio.all_tasks(), key=asyncio.Task.get_name)
    return [{"task": task.get_name(), "waits_in": _chain(task.get_coro())} for task in tasks]


def _chain(waiting: Any) -> list[str]:
    """Follow the awaits of a coroutine, or of a generator that is used as one, to the end."""
    chain: list[str] = []
    while waiting is not None and len(chain) < FRAMES_MAX:
        frame, awaited = _frame_of(waiting)
        if frame is None:
            # The next item of an asynchronous generator, or `__await__` of a coroutine: neither tells whose it is.
            wrapped = [
                one for one in gc.get_referents(waiting) if isinstance(one, AsyncGeneratorType | CoroutineType)
            ]
            if not wrapped:
                chain.append(type(waiting).__name__)  # a future
                break
            frame, awaited = _frame_of(wrapped[0])
        if frame is None:
            break  # it is about to end
        code = frame.f_code
        chain.append(f"{PurePath(code.co_filename).name}:{frame.f_lineno} {code.co_qualname}")
        waiting = awaited
    return chain


def _frame_of(waiting: Any) -> tuple[FrameType | None, Any]:
    """Return where a coroutine or generator stands, and what it awaits."""
    for kind, awaits in (("cr", "cr_await"), ("gi", "gi_yieldfrom"), ("ag", "ag_await")):
        frame = getattr(waiting, f"{kind}_frame", None)
        if frame is not None:
            return frame, getattr(waiting, awaits)
    return None, None
