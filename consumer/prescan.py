"""The structural pre-scan: bytes held against a schema before any reader builds something from them.

The compiled reader accepts what it should not and can be made to allocate without bound (faults 4.3). So a datum of a
schema that has passed the gate (:mod:`consumer.avro_schemas`, which also says what a *tree* looks like) is walked here
first, and nothing is built but what a string needs to be checked. The walk ends with ``decode_error`` at the first of:

* bytes missing, or left over after the datum;
* a number of more than 10 bytes or 64 bits, an ``int`` of more than 32, a boolean other than 0 and 1;
* the index of a union or enum outside its range, below zero included;
* a negative length; a string that is not UTF-8;
* more items in a block than the bytes left could hold, more in the datum than the limit, or a block that is not as
  long as it says.

How deep a datum can be is decided by its schema, which is bounded and not recursive, so that needs no check here.

A scanner is a tree of closures, made once per schema: each takes the bytes, where to begin and how many items are still
allowed, and returns where its value ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from consumer.errors import DecodeError

ELEMENTS_MAX = 100_000
"""Items a datum may have in all its arrays and maps; ``limits.avro_elements``."""

Tree: TypeAlias = tuple[Any, ...]
Scanner: TypeAlias = Callable[[bytes, int], None]
_Budget: TypeAlias = list[int]
"""One number: the items still allowed."""
_Step: TypeAlias = Callable[[bytes, int, _Budget], int]

_INT_MAX = 2**31 - 1
_VARINT_BYTES_MAX = 10

_ENDS_EARLY = "the record ends too early"


def scanner(tree: Tree, *, elements_max: int = ELEMENTS_MAX) -> Scanner:
    """Make the scanner of a type.

    Args:
        tree: As :mod:`consumer.avro_schemas` makes it.
        elements_max: Array items and map pairs a datum may have in all.

    Returns:
        A function of bytes and the position where the datum begins, which raises ``DecodeError`` unless the rest of the
        bytes is exactly one datum of that type.
    """
    step = _step(tree, {})

    def scan(data: bytes, at: int) -> None:
        try:
            end = step(data, at, [elements_max])
        except IndexError:
            raise DecodeError(_ENDS_EARLY) from None
        except UnicodeDecodeError:
            raise DecodeError("a string is not UTF-8") from None
        if end > len(data):
            raise DecodeError(_ENDS_EARLY)
        if end < len(data):
            raise DecodeError("bytes are left over after the record")

    return scan


def _step(tree: Tree, made: dict[int, _Step]) -> _Step:
    """Make the closure of one type; the same type, the same closure, so that a schema's size bounds the work."""
    step = made.get(id(tree))
    if step is None:
        step = made[id(tree)] = _make_step(tree, made)
    return step


def _make_step(tree: Tree, made: dict[int, _Step]) -> _Step:
    match tree:
        case (str(primitive),):
            return _PRIMITIVES[primitive]
        case ("fixed", int(size)):
            return _fixed(size)
        case ("enum", int(count)):
            return _enum(count)
        case ("record", tuple(fields)):
            return _record([_step(part, made) for part in fields])
        case ("union", tuple(branches)):
            return _union([_step(branch, made) for branch in branches])
        case ("array", item, int(size), int(weight)):
            return _blocks(_step(item, made), size, weight)
        case ("map", value, int(size), int(weight)):
            return _blocks(_record([_string, _step(value, made)]), size, weight)
    raise AssertionError(f"not a type: {tree!r}")


def read_number(data: bytes, at: int) -> tuple[int, int]:
    """Read a zigzag number; return it and where it ends.

    Raises:
        DecodeError: it has more than 10 bytes or 64 bits.
        IndexError: the bytes end within it.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
        if shift == 7 * _VARINT_BYTES_MAX:
            raise DecodeError("a number has more than 10 bytes")
    if value >> 64:
        raise DecodeError("a number has more than 64 bits")
    return (value >> 1) ^ -(value & 1), at


def read_length(data: bytes, at: int) -> tuple[int, int]:
    """Read the length of what follows; return where that begins and ends, both inside *data*.

    Raises:
        DecodeError, IndexError: as :func:`read_number`; negative, or beyond the end.
    """
    size = data[at]
    if size & 0x81:  # several bytes, or negative
        size, at = read_number(data, at)
        if size < 0:
            raise DecodeError("a length is negative")
    else:
        size >>= 1
        at += 1
    end = at + size
    if end > len(data):
        raise DecodeError(_ENDS_EARLY)
    return at, end


def read_index(data: bytes, at: int, count: int) -> tuple[int, int]:
    """Read the index of a union or enum with *count* members; return it and where it ends.

    Raises:
        DecodeError, IndexError: as :func:`read_number`; out of range.
    """
    index, at = read_number(data, at)
    if not 0 <= index < count:
        raise DecodeError("an index is out of range")
    return index, at


def _null(_data: bytes, at: int, _budget: _Budget) -> int:
    return at


def _boolean(data: bytes, at: int, _budget: _Budget) -> int:
    if data[at] > 1:
        raise DecodeError("a boolean is 0 or 1")
    return at + 1


def _int(data: bytes, at: int, _budget: _Budget) -> int:
    value, at = read_number(data, at)
    if not -_INT_MAX - 1 <= value <= _INT_MAX:
        raise DecodeError("an int has more than 32 bits")
    return at


def _long(data: bytes, at: int, _budget: _Budget) -> int:
    return at + 1 if data[at] < 128 else read_number(data, at)[1]


def _bytes(data: bytes, at: int, _budget: _Budget) -> int:
    return read_length(data, at)[1]


def _string(data: bytes, at: int, _budget: _Budget) -> int:
    at, end = read_length(data, at)
    data[at:end].decode()
    return end


def _fixed(size: int) -> _Step:
    def step(data: bytes, at: int, _budget: _Budget) -> int:
        if at + size > len(data):
            raise DecodeError(_ENDS_EARLY)
        return at + size

    return step


def _enum(count: int) -> _Step:
    def step(data: bytes, at: int, _budget: _Budget) -> int:
        return read_index(data, at, count)[1]

    return step


def _record(fields: list[_Step]) -> _Step:
    def step(data: bytes, at: int, budget: _Budget) -> int:
        for field in fields:
            at = field(data, at, budget)
        return at

    return step


def _union(branches: list[_Step]) -> _Step:
    count = len(branches)

    def step(data: bytes, at: int, budget: _Budget) -> int:
        index, at = read_index(data, at, count)
        return branches[index](data, at, budget)

    return step


def _blocks(item: _Step, size_min: int, weight: int) -> _Step:
    def step(data: bytes, at: int, budget: _Budget) -> int:
        while True:
            count, at = read_number(data, at)
            if count == 0:
                return at
            end = None
            if count < 0:  # a block that says its size, so that a reader might skip it
                count = -count
                size, at = read_number(data, at)
                end = at + size
            if count * size_min > len(data) - at:
                raise DecodeError(_ENDS_EARLY)
            budget[0] -= count * weight
            if budget[0] < 0:
                raise DecodeError("the record has more items than allowed")
            for _ in range(count):
                at = item(data, at, budget)
            if end is not None and at != end:
                raise DecodeError("a block is not as long as it says")

    return step


_PRIMITIVES: dict[str, _Step] = {
    "null": _null,
    "boolean": _boolean,
    "int": _int,
    "long": _long,
    "float": _fixed(4),
    "double": _fixed(8),
    "bytes": _bytes,
    "string": _string,
}
