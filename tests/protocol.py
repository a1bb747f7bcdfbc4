"""Kafka's own words, for what no client library asks: one request, on a connection of its own, to one named broker."""

from __future__ import annotations

import socket
import struct

SOCKET_SECONDS = 10


class Fields:
    """Reads Kafka's primitive types one after another."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, layout: str) -> int:
        """The next integer, of this layout of the module `struct`."""
        (value,) = struct.unpack_from(">" + layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return int(value)

    def numbers(self) -> list[int]:
        """The next array of 32-bit integers."""
        return [self.number("i") for _ in range(self.number("i"))]

    def string(self) -> str:
        """The next text; of one that is null an empty one."""
        return self._take(max(0, self.number("h")))

    def compact_string(self) -> str:
        """The next text of a flexible version."""
        length = shift = 0
        while True:
            byte = self.number("B")
            length |= (byte & 0x7F) << shift
            if byte < 0x80:
                return self._take(length - 1)
            shift += 7

    def skip(self, length: int) -> None:
        """Pass over so many bytes."""
        self._at += length

    def _take(self, length: int) -> str:
        text = self._data[self._at : self._at + length]
        self._at += length
        return text.decode()


def ask(address: str, api: int, version: int, request: bytes, *, seconds: float = SOCKET_SECONDS) -> Fields:
    """Send one request of a version without tagged fields to *address*; return what follows the correlation id.

    Raises:
        OSError: nobody answers there, or not in so many *seconds*.
    """
    host, _, port = address.rpartition(":")
    framed = struct.pack(">hhi", api, version, 0) + string("ledger") + request
    with socket.create_connection((host, int(port)), seconds) as connection:
        connection.sendall(struct.pack(">i", len(framed)) + framed)
        with connection.makefile("rb") as stream:
            answer = Fields(_exactly(stream.read(4), 4))
            length = answer.number("i")
            answer = Fields(_exactly(stream.read(length), length))
    answer.number("i")
    return answer


def _exactly(data: bytes, length: int) -> bytes:
    if len(data) < length:
        raise ConnectionError("the broker went away within its answer")
    return data


def string(text: str) -> bytes:
    """A text as requests have it."""
    encoded = text.encode()
    return struct.pack(">h", len(encoded)) + encoded
