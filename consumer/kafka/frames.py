"""Connections that take no answer for longer than any is.

An answer begins with its length, which aiokafka believes: it reads on until so many bytes are there, or the request
times out (hazard H36). What answers behind a wrong address, an HTTP server say, begins with text: "HTTP" is 1.2 GB, a
TLS alert 350 MB. Whoever goes on sending makes every attempt to connect take that much memory.

A length above :func:`longest` ends the connection with :class:`NotAKafkaAnswer`, before anything of it is read.
Importing this module has every connection of the process do so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from aiokafka.conn import AIOKafkaConnection

from consumer.config import MIB
from consumer.kafka import expansion

FRAME_BYTES_MAX: Final = 256 * MIB
"""No answer is longer, where records are not made larger than that (:func:`longest`): a fetch asks for 8 MiB, and
brings one batch whole that is larger."""


TLS_ALERT: Final = 0x1503
"""How a TLS alert begins (RFC 8446, 5.1: type 21, version 3.x); it is what a listener with TLS says to plain text."""


class NotAKafkaAnswer(ConnectionError):
    """What came is no answer of a broker: it gives itself a length that none has."""


def longest() -> int:
    """Return how many bytes an answer may have in this process."""
    return max(FRAME_BYTES_MAX, expansion.limit())


_create_reader_task: Callable[[Any], asyncio.Task[None]] = AIOKafkaConnection._create_reader_task  # noqa: SLF001 - held by a test


def create_bounded_reader_task(connection: Any) -> asyncio.Task[None]:
    """Begin to read from *connection*, as the client's own, which this one replaces."""
    reader: asyncio.StreamReader = connection._reader  # noqa: SLF001 - as above
    read = reader.readexactly

    async def readexactly(size: int) -> bytes:
        if size > longest():
            raise NotAKafkaAnswer("a TLS alert" if size >> 16 == TLS_ALERT else f"an answer of {size} bytes")
        return await read(size)

    reader.readexactly = readexactly  # type: ignore[method-assign, assignment]  # of this one
    return _create_reader_task(connection)


AIOKafkaConnection._create_reader_task = create_bounded_reader_task  # type: ignore[method-assign]  # noqa: SLF001 - as above
