"""Clients that do not ask again and again where a partition is led that nobody leads.

While a partition has no leader, aiokafka's consumer (for one that is assigned, even where it is paused) and its
producer (for one with batches) ask for the metadata as soon as the last answer is there: hundreds of times a second,
as long as that lasts.

Each client has :data:`AT_ONCE_MAX` requests in hand. One comes back every :data:`INTERVAL_SECONDS`; where there is
none, the next request waits for it. So the first questions about a leader that moves are asked at once, and its answer
is found :data:`INTERVAL_SECONDS` late at most, however many there were.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiokafka.client import AIOKafkaClient

AT_ONCE_MAX = 5
"""Requests in hand: a start makes two or three, a lost connection one or two."""

INTERVAL_SECONDS = 0.1
"""Ten requests a second cost nobody anything, and an election takes longer than this. Java's client waits as long
(``retry.backoff.ms``)."""


class MetadataPace:
    """Tells how long a request is to wait (pure)."""

    def __init__(self) -> None:
        self._used_up_to = float("-inf")
        """The moment by which all that is in hand has come back."""

    def wait(self, now: float) -> float:
        """Count a request that is due at *now*, in monotonic seconds; return the seconds until it may be sent."""
        self._used_up_to = max(self._used_up_to, now) + INTERVAL_SECONDS
        return max(0.0, self._used_up_to - AT_ONCE_MAX * INTERVAL_SECONDS - now)


class _PacedUpdate:
    """What asks for the metadata of one client, in its time."""

    def __init__(self, update: Callable[..., Awaitable[bool]], pace: MetadataPace) -> None:
        self._update = update
        self._pace = pace

    async def __call__(self, *asked: Any) -> bool:
        """Ask as the client's own; who has called for it waits so much longer.

        Cancellation: as of the client's own.
        """
        seconds = self._pace.wait(time.monotonic())
        if seconds:
            await asyncio.sleep(seconds)
        return await self._update(*asked)


def pace_metadata(client: AIOKafkaClient, pace: MetadataPace | None = None) -> None:
    """Pace the metadata requests of *client*; private names, held by a test."""
    client._metadata_update = _PacedUpdate(client._metadata_update, pace or MetadataPace())  # type: ignore[method-assign]  # noqa: SLF001 - as above
