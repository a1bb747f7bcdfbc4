"""Clients that ask the next address where one says nothing.

An address behind which nobody answers (a machine that is gone, a broker that stands still) costs aiokafka's bootstrap a
whole request time-out before it asks the next one, and each attempt to start a client has a deadline that is no longer
than that (hazard H30). In the order that the client draws anew each time, attempts that begin with that address bring
nothing, however many others there are.

Where there are several addresses, each has :data:`ADDRESS_SECONDS` to take the connection and for each answer on it.
One alone has the whole time-out: there is nobody else to ask.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiokafka.client import AIOKafkaClient

ADDRESS_SECONDS: Final = 3.0
"""A broker that is alive answers within milliseconds. Two that say nothing leave time, within the 10 s of an attempt,
for a third."""


class _Bootstrap:
    """What asks the addresses of one client, one after the other."""

    def __init__(self, client: Any, bootstrap: Callable[[], Awaitable[None]]) -> None:
        self._client = client
        self._bootstrap = bootstrap

    async def __call__(self) -> None:
        """Ask as the client's own, each address for a shorter time. Cancellation: as of the client's own."""
        client, usual = self._client, self._client._request_timeout_ms  # noqa: SLF001 - held by a test
        if len(client.hosts) > 1:
            client._request_timeout_ms = min(usual, round(ADDRESS_SECONDS * 1000))  # noqa: SLF001 - as above
        try:
            await self._bootstrap()
        finally:
            client._request_timeout_ms = usual  # noqa: SLF001 - as above


def ask_the_next_address(client: AIOKafkaClient) -> None:
    """Have *client*, which has not been started, not wait long for an address that says nothing."""
    client.bootstrap = _Bootstrap(client, client.bootstrap)  # type: ignore[method-assign]
