"""Consumers that do not ask again and again a broker which says at once that it has nothing.

A broker holds a fetch that finds nothing for ``fetch_max_wait_ms``, so aiokafka asks again as soon as it is answered.
Some answer at once all the same: the embedded development broker always, any broker with an error for every partition
asked for (a topic that is gone, a leader that moves). Then both would ask and answer as fast as they can: hundreds of
times a second, with half a core each.

1. An answer is *too soon* where it holds no records and took less than half of ``fetch_max_wait_ms``.
2. After :data:`AT_ONCE_MAX` of them from one broker, one after the other, the next ones are handed to the client
   :data:`PAUSE_SECONDS` late, and with them the client asks again so much later.
3. Records, or an answer that has taken its time, end that.

So nothing is late from a broker that holds its fetches, nor from any that has records; what comes to one that does not,
while it has none, is seen :data:`PAUSE_SECONDS` later at most.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.protocol.fetch import FetchRequest

AT_ONCE_MAX = 3
"""Answers without records that may come at once: a leader that moves costs about so many, and is found at once."""

PAUSE_SECONDS = 0.02
"""50 fetches a second cost 3 % of a core, and nobody sees that a response came so much later."""


class FetchPace:
    """Tells how long the answer of a broker is to be kept back (pure)."""

    def __init__(self) -> None:
        self._too_soon: Counter[int] = Counter()
        """By broker: answers too soon, one after the other."""

    def pause(self, broker: int, seconds: float, max_wait_seconds: float, *, records: bool) -> float:
        """Count an answer of *broker* that took *seconds*; return the seconds until it may be handed on, mostly 0.

        The broker may have held that fetch for *max_wait_seconds* if it found nothing.
        """
        if records or seconds >= max_wait_seconds / 2:
            self._too_soon.pop(broker, None)
            return 0.0
        self._too_soon[broker] += 1
        return PAUSE_SECONDS if self._too_soon[broker] > AT_ONCE_MAX else 0.0


class _PacedSend:
    """What sends the requests of one consumer, and keeps answers back where that is due."""

    def __init__(self, send: Callable[..., Awaitable[Any]], pace: FetchPace) -> None:
        self._send = send
        self._pace = pace

    async def __call__(self, node_id: int, request: Any, **named: Any) -> Any:
        """Send any request; keep the answer to a fetch back where that is due.

        Cancellation: as of the client's own; an answer that is kept back is lost like one on its way.
        """
        began = time.monotonic()
        answer = await self._send(node_id, request, **named)
        if isinstance(request, FetchRequest):
            took, max_wait = time.monotonic() - began, request._max_wait_ms / 1000  # noqa: SLF001 - held by a test
            seconds = self._pace.pause(node_id, took, max_wait, records=_has_records(answer))
            if seconds:
                await asyncio.sleep(seconds)
        return answer


def paced(consumer: AIOKafkaConsumer, pace: FetchPace | None = None) -> AIOKafkaConsumer:
    """Return *consumer*, which has not been started, with its fetches paced; private names, held by a test."""
    consumer._client.send = _PacedSend(consumer._client.send, pace or FetchPace())  # type: ignore[method-assign]  # noqa: SLF001 - as above
    return consumer


def _has_records(answer: Any) -> bool:
    """Tell whether a fetch brought any batch; in each version of the answer it is a partition's last field."""
    return any(partition[-1] for _, partitions in answer.topics or () for partition in partitions)
