"""The structural scan: exactly one datum of the schema passes, and nothing is built on the way."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
from typing import Any

import fastavro
import pytest

from consumer.avro_schemas import operation_schema, read_schema
from consumer.errors import DecodeError
from consumer.prescan import Scanner, scanner

LONG_MAX, LONG_MIN = 2**63 - 1, -(2**63)


def number(value: int) -> bytes:
    """A zigzag number, of any size."""
    rest = value << 1 if value >= 0 else (-value << 1) - 1
    written = bytearray()
    while rest > 127:
        written.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*written, rest])


def text(value: str) -> bytes:
    """A string."""
    return number(len(value.encode())) + value.encode()


def scan_of(schema: Any, **limits: int) -> Scanner:
    """The scanner of a schema as JSON."""
    return scanner(read_schema(json.dumps(schema)).tree, **limits)


def record(*types: Any) -> dict[str, Any]:
    """A record type with a field of each of *types*."""
    fields = [{"name": f"f{place}", "type": kind} for place, kind in enumerate(types)]
    return {"type": "record", "name": "R", "fields": fields}


ENUM = {"type": "enum", "name": "E", "symbols": ["A", "B", "C"]}
FIXED = {"type": "fixed", "name": "F", "size": 4}
LONGS = {"type": "array", "items": "long"}
MAP = {"type": "map", "values": "string"}

WHOLE: list[tuple[Any, bytes]] = [
    ("null", b""),
    ("boolean", b"\x00"),
    ("boolean", b"\x01"),
    ("int", number(2**31 - 1)),
    ("int", number(-(2**31))),
    ("long", number(0)),
    ("long", number(LONG_MAX)),
    ("long", number(LONG_MIN)),
    ("long", b"\x80\x00"),  # more bytes than it needs is a number all the same
    ("float", struct.pack("<f", 1.5)),
    ("double", struct.pack("<d", 1.5)),
    ("bytes", number(3) + b"\xff\xfe\xfd"),
    ("bytes", number(300) + bytes(300)),
    ("string", text("")),
    ("string", text("ключ 🗝")),
    (ENUM, number(2)),
    (FIXED, b"abcd"),
    (LONGS, number(0)),
    (LONGS, number(2) + number(1) + number(2) + number(1) + number(300) + number(0)),
    (LONGS, number(-2) + number(3) + number(1) + number(300) + number(0)),
    (MAP, number(1) + text("a") + text("1") + number(0)),
    (MAP, number(-1) + number(4) + text("a") + text("1") + number(0)),
    (["null", "string"], number(0)),
    (["null", "string"], number(1) + text("x")),
    (record("long", "string"), number(1) + text("x")),
]

BROKEN: list[tuple[Any, bytes, str]] = [
    ("boolean", b"\x02", "boolean"),
    ("boolean", b"\xff", "boolean"),
    ("int", number(2**31), "32 bits"),
    ("int", number(-(2**31) - 1), "32 bits"),
    ("long", number(LONG_MAX + 1), "64 bits"),
    ("long", number(LONG_MIN - 1), "64 bits"),
    ("long", b"\x80" * 10 + b"\x00", "10 bytes"),
    ("long", b"\xff" * 20, "10 bytes"),
    ("long", b"\x80", "too early"),
    ("long", b"", "too early"),
    ("float", b"abc", "too early"),
    ("double", b"abcdefg", "too early"),
    ("bytes", number(-1), "negative"),
    ("bytes", number(LONG_MIN), "negative"),
    ("bytes", number(4) + b"abc", "too early"),
    ("bytes", number(2**40), "too early"),
    ("bytes", number(LONG_MAX), "too early"),
    ("string", number(2) + b"\xc0\xaf", "UTF-8"),  # overlong
    ("string", number(3) + b"\xed\xa0\x80", "UTF-8"),  # a surrogate
    ("string", number(4) + b"\xf4\x90\x80\x80", "UTF-8"),  # above U+10FFFF
    ("string", number(1) + b"\xff", "UTF-8"),
    ("string", number(-1), "negative"),
    (ENUM, number(3), "index"),
    (ENUM, number(-1), "index"),
    (FIXED, b"abc", "too early"),
    (["null", "string"], number(2), "index"),
    (["null", "string"], number(-1), "index"),
    (["null", "string"], number(LONG_MAX), "index"),
    (LONGS, number(5) + number(1), "too early"),
    (LONGS, number(1) + number(1), "too early"),
    (LONGS, number(LONG_MAX), "too early"),
    (LONGS, number(LONG_MIN) + number(0), "too early"),
    (LONGS, number(-1) + number(2) + number(1) + number(0), "as long as it says"),
    (LONGS, number(-1) + number(0) + number(1) + number(0), "as long as it says"),
    (LONGS, number(-1) + number(-9) + number(1) + number(0), "as long as it says"),
    (LONGS, number(-2) + number(LONG_MAX) + number(1) + number(1) + number(0), "as long as it says"),
    (MAP, number(1) + text("a") + number(1) + b"\xff" + number(0), "UTF-8"),
    (MAP, number(1) + number(1) + b"\xff" + text("a") + number(0), "UTF-8"),
    (MAP, number(2**30) + text("a") * 8, "too early"),
]


@pytest.mark.parametrize(("schema", "data"), WHOLE)
def test_one_whole_datum_passes_wherever_it_stands(schema: Any, data: bytes) -> None:
    """Contract 2.2: complete data are not refused; what stands before the beginning is not looked at."""
    scan = scan_of(schema)

    scan(data, 0)
    scan(b"\xff\xff" + data, 2)


@pytest.mark.parametrize(("schema", "data"), WHOLE)
def test_what_passes_is_read_by_fastavro_to_the_same_end(schema: Any, data: bytes) -> None:
    """The scan protects that reader, so the two have to agree where a datum ends."""
    buffer = io.BytesIO(data + b"rest")

    fastavro.schemaless_reader(buffer, read_schema(json.dumps(schema)).parsed, None)

    assert buffer.read() == b"rest"


@pytest.mark.parametrize(("schema", "data"), WHOLE)
def test_a_byte_too_many_or_too_few_is_not_a_datum(schema: Any, data: bytes) -> None:
    """Contract 2.2, `decode_error`: truncated anywhere, or followed by anything."""
    scan = scan_of(schema)

    with pytest.raises(DecodeError, match="left over"):
        scan(data + b"\x00", 0)
    for end in range(len(data)):
        with pytest.raises(DecodeError, match=r"too early|left over|as long as it says"):
            scan(data[:end], 0)


@pytest.mark.parametrize(("schema", "data", "message"), BROKEN)
def test_every_other_thing_is_refused_for_what_it_is(schema: Any, data: bytes, message: str) -> None:
    """Faults 4.3: what the compiled reader takes or chokes on never reaches it."""
    with pytest.raises(DecodeError, match=message) as caught:
        scan_of(schema)(data, 0)

    assert caught.value.code == "decode_error"


def test_items_are_counted_over_the_whole_datum() -> None:
    """Contract 6, `limits.avro_elements`: three arrays of two are six items, blocks and nesting make no difference."""
    arrays = number(3) + (number(1) + number(7) + number(1) + number(7) + number(0)) * 3 + number(0)
    schema = {"type": "array", "items": LONGS}

    scan_of(schema, elements_max=9)(arrays, 0)
    with pytest.raises(DecodeError, match="more items than allowed"):
        scan_of(schema, elements_max=8)(arrays, 0)


def test_a_scanner_forgets_one_datum_before_the_next() -> None:
    """The element limit is one of each datum, not of all together."""
    scan = scan_of(LONGS, elements_max=2)

    for _ in range(3):
        scan(number(2) + number(1) + number(1) + number(0), 0)


def test_values_that_take_no_bytes_count_as_items() -> None:
    """Faults 4.3, amplification: one byte of data may not stand for a thousand values without being counted."""
    schema = {"type": "array", "items": record("long", *["null"] * 999)}
    data = number(5) + number(1) * 5 + number(0)

    scan_of(schema, elements_max=5000)(data, 0)
    with pytest.raises(DecodeError, match="more items than allowed"):
        scan_of(schema, elements_max=4999)(data, 0)


@pytest.mark.parametrize("count", [10**7, 2**40, LONG_MAX, -(10**7), LONG_MIN])
def test_a_huge_count_costs_nothing(count: int) -> None:
    """Faults 4.3: a few bytes that claim many items are refused by the bytes left, before anything is done."""
    scan = scan_of({"type": "array", "items": record("string", LONGS)})
    data = number(count) + number(10) + bytes(1000)
    tracemalloc.start()

    with pytest.raises(DecodeError):
        scan(data, 0)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000


def test_a_deep_datum_is_scanned_as_deep_as_schemas_may_nest() -> None:
    """Contract 6, `limits.avro_depth`: 64 levels neither exhaust the interpreter nor are they refused."""
    schema: Any = "long"
    for _ in range(64):
        schema = {"type": "array", "items": schema}
    data = number(1) * 64 + number(7) + number(0) * 64

    scan_of(schema)(data, 0)
    with pytest.raises(DecodeError, match="too early"):
        scan_of(schema)(data[:-1], 0)


def test_a_schema_that_uses_a_type_often_makes_one_scanner_of_it() -> None:
    """The gate bounds how large a datum can be by its schema; so is the scanner."""
    schema: Any = {"type": "record", "name": "R0", "fields": [{"name": "f", "type": "long"}]}
    for level in range(1, 12):
        fields = [{"name": "a", "type": schema}, {"name": "b", "type": f"R{level - 1}"}]
        schema = {"type": "record", "name": f"R{level}", "fields": fields}

    scan_of(schema)(number(300) * 2**11, 0)
    with pytest.raises(DecodeError, match="too early"):
        scan_of(schema)(number(300) * (2**11 - 1), 0)


def test_the_operation_schema_has_a_scanner() -> None:
    """What a registry's version of it will be checked with."""
    scan = scanner(operation_schema().tree)
    data = text("u") + number(0) + number(0) + number(1) + text("key")

    scan(data, 0)
    with pytest.raises(DecodeError, match="left over"):
        scan(data + data, 0)
