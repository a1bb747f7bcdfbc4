"""Viewers of something that changes: it is looked at while somebody watches, once for all of them.

1. The first viewer begins the looking, the last one who leaves ends it: what nobody watches costs nothing.
2. Each look makes one *frame*, of which every viewer is given the same bytes. The next look begins an interval after
   the one before has ended, so that looks never pile up.
3. A viewer is given the newest frame whenever it comes back for one. One that is slow misses frames; nothing is kept
   for it, and nobody waits for it.

A look that fails, or takes too long, is logged, and makes a frame that says nothing: who has left is only noticed when
something is sent. All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

from consumer.log import get_logger

INTERVAL_SECONDS: Final = 1.0
"""Between looks: as often as people can follow numbers."""
LOOK_SECONDS: Final = 4.0
"""For one look; longer than any process is waited for (``supervisor.ANSWER_SECONDS``), below the silence that the page
takes for a lost connection (8 s)."""
LAST_LOOK_SECONDS: Final = 0.3
"""For the look at the end, which a stop waits for."""

NOTHING: Final = b":\n\n"
"""A comment among server-sent events."""

_log = get_logger(__name__)


class Viewers:
    """Everybody who watches one thing, from the first :meth:`frames` to :meth:`close`.

    Args:
        look: Makes a frame of what is true now.
    """

    def __init__(self, look: Callable[[], Awaitable[bytes]]) -> None:
        self._look = look
        self._watching = 0
        self._looking: asyncio.Task[None] | None = None
        self._frame = b""
        self._number = 0
        """Of the newest frame; 0 while there is none."""
        self._next = asyncio.Event()
        """Set when a newer frame than now is there, and then replaced."""
        self._closed = False

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Yield the newest frame, again and again, until :meth:`close`, and the one of the end.

        Cancellation, or closing the generator: the viewer has left.
        """
        if self._closed:
            return
        self._watching += 1
        if self._looking is None:
            self._number = 0
            self._looking = asyncio.create_task(self._keep_looking(), name="status page")
        seen = 0
        try:
            while self._number != seen or not self._closed:
                if self._number == seen:
                    await self._next.wait()
                else:
                    seen = self._number
                    yield self._frame
        finally:
            self._watching -= 1
            if not self._watching and self._looking is not None:
                self._looking.cancel()
                self._looking = None

    async def close(self) -> None:
        """Look once more, for those who watch, and let them go; whoever comes later sees nothing.

        Cancellation: they are let go without that look.
        """
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
            self._looking = None
        try:
            if self._watching:
                await self._look_once(LAST_LOOK_SECONDS)
        finally:
            self._next.set()

    async def _keep_looking(self) -> None:
        while True:
            await self._look_once(LOOK_SECONDS)
            await asyncio.sleep(INTERVAL_SECONDS)

    async def _look_once(self, at_most: float) -> None:
        try:
            async with asyncio.timeout(at_most):
                frame = await self._look()
        except Exception:  # noqa: BLE001 - whatever it is, it is logged, and the next look may succeed
            _log.exception("the status page cannot be made")
            frame = NOTHING
        self._frame = frame
        self._number += 1
        come, self._next = self._next, asyncio.Event()
        come.set()
