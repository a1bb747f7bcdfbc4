"""The line between the supervisor and one process: a pair of connected sockets, which nobody else can reach.

A frame is 4 bytes of length (big-endian), then that many bytes. The first frame, to the process, is its configuration
(pickled: it holds secrets, so it is neither in the environment nor in the arguments). All others are JSON:

* question ``{"id": 7, "ask": "state"}``, answered by ``{"id": 7, "told": …}``, in any order; ``told`` is null where the
  process could not tell. A question has a deadline; an answer that comes later is dropped.
* ``{"ask": "stop"}`` has no id and no answer.

Whoever reads the end of the line knows that the other process is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import socket
from typing import Any, Final

import orjson

from consumer.config import Config

LENGTH_BYTES: Final = 4
FRAME_BYTES_MAX: Final = 64 * 1024 * 1024
"""Far above the metrics of ten thousand partitions; a longer frame is a broken one."""

STATE: Final = "state"
READINESS: Final = "readiness"
METRICS: Final = "metrics"
PULSE: Final = "pulse"
"""Whether it turns: its state in a word, and its totals."""
STOP: Final = "stop"


_GONE: Final = object()


class NoAnswer(Exception):
    """The process is gone, or did not answer in time."""


def framed(body: bytes) -> bytes:
    """Return *body* as a frame."""
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """Return the body of the next frame; None at the end of the line."""
    try:
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
        return await reader.readexactly(length) if length <= FRAME_BYTES_MAX else None
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def receive_config(line: socket.socket) -> Config | None:
    """Return the configuration, the first frame of a blocking *line*; None at the end of it."""
    with line.makefile("rb", buffering=0) as file:

        def exactly(count: int) -> bytes:
            parts = bytearray()
            while len(parts) < count and (part := file.read(count - len(parts))):
                parts += part
            return bytes(parts)

        head = exactly(LENGTH_BYTES)
        body = exactly(int.from_bytes(head, "big"))
    if len(head) < LENGTH_BYTES or len(body) < int.from_bytes(head, "big"):
        return None
    config = pickle.loads(body)  # noqa: S301 - from our own parent, over a line that nobody else has
    assert isinstance(config, Config)
    return config


class Asking:
    """The supervisor's end of a line, from :meth:`open` to :meth:`close`.

    Args:
        line: Our end of the pair; closed by :meth:`close`.
    """

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._ids = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._gone = False

    async def open(self, config: Config) -> None:
        """Send the configuration, and read answers from now on; the other end need not be anybody's yet."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._line)
        self._writer.write(framed(pickle.dumps(config)))
        self._reading = asyncio.create_task(self._read(reader), name="answers of a process")

    async def ask(self, what: str, seconds: float) -> Any:
        """Ask for *what* and return the answer; None where the process could not tell.

        Raises:
            NoAnswer: not within *seconds*, or never.

        Cancellation: the answer will be dropped.
        """
        if self._gone:
            raise NoAnswer("it is gone")
        number = next(self._ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            self._send({"id": number, "ask": what})
            async with asyncio.timeout(seconds):
                told = await answer
        except TimeoutError:
            raise NoAnswer(f"no answer within {seconds:g} s") from None
        finally:
            del self._asked[number]
        if told is _GONE:
            raise NoAnswer("it is gone")
        return told

    def stop(self) -> None:
        """Ask the process to stop; nothing happens where it is gone."""
        self._send({"ask": STOP})

    async def close(self) -> None:
        """Close the line; whoever still waits for an answer gets none."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        if self._writer is not None:
            self._writer.close()
        self._line.close()

    def _send(self, said: dict[str, Any]) -> None:
        # Not drained: a process that does not read is asked once at a time by each asker, and killed before long.
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(framed(orjson.dumps(said)))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while (body := await read_frame(reader)) is not None:
                said = orjson.loads(body)
                answer = self._asked.get(said["id"])
                if answer is not None and not answer.done():
                    answer.set_result(said["told"])
        finally:
            self._gone = True
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_result(_GONE)
