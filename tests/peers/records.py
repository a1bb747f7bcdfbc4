"""Input and output of the peers' workload as tierstream's records, written by hand: the runner has no Avro library.

``make(i)`` is an insert of 1,024 bytes in all, on one of 1,000 objects; ``id_of`` reads the number back from the
response's ``request_id``. Loaded by the runner of the peers by name.
"""

from __future__ import annotations

import os
from typing import Protocol

KEYS = 1000
VALUE_BYTES = 1024


class Message(Protocol):
    """A record as the runner's client gives it."""

    def value(self) -> bytes | None:
        """The record's value."""


def _long(number: int) -> bytes:
    """Encode an Avro long: zigzag, then seven bits a byte."""
    rest = (number << 1) ^ (number >> 63)
    out = bytearray()
    while rest > 0x7F:
        out.append((rest & 0x7F) | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _text(text: str) -> bytes:
    content = text.encode()
    return _long(len(content)) + content


_NULL, _FIRST, _SECOND = _long(0), _long(0), _long(1)
_METADATA = _text("application/octet-stream") + _NULL * 4 + _long(0) + _NULL * 3
_PAYLOAD = os.urandom(VALUE_BYTES)


def make(number: int) -> tuple[bytes, bytes]:
    """Return key and value of record *number*."""
    key = f"{number % KEYS:04}"
    context = _text("bench") + _long(0)
    head = context + _SECOND + _text(str(number)) + _FIRST + _SECOND + _text(key) + _METADATA + _FIRST
    size = VALUE_BYTES - len(head) - 2
    return key.encode(), head + _long(size) + _PAYLOAD[:size]


def _read_long(data: bytes, at: int) -> tuple[int, int]:
    shift = number = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), at
        shift += 7


def id_of(message: Message) -> int | None:
    """Return the number of the record that a response belongs to; None where it has none."""
    data = message.value()
    assert data is not None
    _, at = _read_long(data, 0)  # index
    length, at = _read_long(data, at)  # source: topic, partition, offset
    _, at = _read_long(data, at + length)
    _, at = _read_long(data, at)
    branch, at = _read_long(data, at)
    if branch != 1:
        return None
    length, at = _read_long(data, at)
    return int(data[at : at + length])
