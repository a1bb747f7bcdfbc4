"""Hostile bytes: each gives one answer with one code, never an exception, and soon.

More than 30,000 generated records (faults 4.3): random bytes, bit flips, truncations at every byte, huge counts and
lengths in every place, union indexes out of range, nesting; bare, framed, and with a foreign writer's schema.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wire
from consumer.avro_schemas import Schema, operation_schema, read_schema, schema_text
from consumer.codec import OPERATION_PREFIX, Decoded, OperationDecoder, ResponseEncoder
from consumer.errors import POISON_CODES, STATUS_BY_CODE, DecodeError
from consumer.prescan import scanner

INSERT = wire.operation(
    "insert",
    "a/b",
    b"payload",
    request_id="request",
    content_type="text/plain",
    expiration={"policy": "ttl", "seconds": 60},
    filename="f",
    custom={"colour": "blue", "size": "10"},
    time_created=1_764_000_000_000_000,
)
REFERENCE = wire.operation("insert", None, {"uri": "gs://a/b", "size": 5, "crc32c": 7})
GET = wire.operation("get", "a/b", scopes=[("org", "1"), ("project", "2")])
PLAIN = wire.operation("insert", "k", bytes(64))
SEEDS = (INSERT, REFERENCE, GET, PLAIN)

SECONDS_MAX = 0.5
"""Processor time for one record; what is seen is microseconds, and milliseconds for the longest."""

ENCODER = ResponseEncoder("operations", 0)


def number(value: int) -> bytes:
    """A zigzag number, of any size."""
    rest = value << 1 if value >= 0 else (-value << 1) - 1
    written = bytearray()
    while rest > 127:
        written.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*written, rest])


HUGE = [
    number(value)
    for value in (2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -1, -2, -(2**20), -(2**31), -(2**63), 2**64, 2**69)
] + [b"\xff" * 10, b"\xff" * 20, b"\x80" * 9 + b"\x01", b"\x80" * 11]


def judge(decoded: Decoded) -> str:
    """Hold one answer against everything that is true of all of them; return its code, or its kind."""
    status, response = ENCODER.encode(1, decoded, decoded.error or DecodeError("-"), 2)
    assert response
    if decoded.error is None:
        assert decoded.operation is not None
        assert not decoded.poison
        assert decoded.kind == decoded.operation.kind
        return decoded.operation.kind
    assert decoded.operation is None
    assert decoded.poison == (decoded.error.code in POISON_CODES)
    assert status == STATUS_BY_CODE[decoded.error.code]
    assert not decoded.error.retriable
    assert 0 < len(str(decoded.error)) <= 100
    if decoded.error.code in {"decode_error", "unknown_schema", "unsafe_schema"}:
        assert (decoded.request_id, decoded.context, decoded.kind, decoded.key) == (None, None, None, None)
    return decoded.error.code


def judge_all(decoder: OperationDecoder, values: Iterable[bytes]) -> Counter[str]:
    """Decode and judge each of *values*; count the answers."""
    answers: Counter[str] = Counter()
    for value in values:
        began = time.thread_time()
        decoded = decoder.decode(value)
        assert time.thread_time() - began < SECONDS_MAX, value
        answers[judge(decoded)] += 1
    return answers


def bit_flips(value: bytes) -> Iterator[bytes]:
    """*value* with each of its bits flipped, one at a time."""
    for at, bit in itertools.product(range(len(value)), range(8)):
        yield value[:at] + bytes([value[at] ^ 1 << bit]) + value[at + 1 :]


def truncations(value: bytes) -> Iterator[bytes]:
    """Every beginning and every end of *value* that is not all of it."""
    for at in range(1, len(value)):
        yield value[:at]
        yield value[at:]


def implants(value: bytes, parts: list[bytes]) -> Iterator[bytes]:
    """*value* with each of *parts* put in at every place, and in place of the byte there."""
    for at, part in itertools.product(range(len(value)), parts):
        yield value[:at] + part + value[at:]
        yield value[:at] + part + value[at + 1 :]


def every_byte(value: bytes) -> Iterator[bytes]:
    """*value* with each of its bytes replaced by each other one."""
    for at, byte in itertools.product(range(len(value)), range(256)):
        yield value[:at] + bytes([byte]) + value[at + 1 :]


@pytest.mark.slow
def test_flipped_bits_and_truncated_records_have_one_answer_each() -> None:
    """Faults 4.3; contract 2.2: everything cut short is a decode error; what is left of an end may be an operation."""
    flips = judge_all(OperationDecoder(), itertools.chain.from_iterable(map(bit_flips, SEEDS)))
    cuts = judge_all(OperationDecoder(), (value[:end] for value in SEEDS for end in range(len(value))))
    pieces = judge_all(OperationDecoder(), itertools.chain.from_iterable(map(truncations, SEEDS)))

    assert flips.total() > 2000
    assert {"decode_error", "insert", "get", "invalid_operation"} <= flips.keys()
    assert cuts == {"decode_error": sum(map(len, SEEDS))}
    assert pieces.keys() <= {"decode_error", "unknown_schema", "insert", "get"}
    assert pieces["insert"] + pieces["get"] == len(SEEDS), "what begins with the last scope's value reads as a context"


@pytest.mark.slow
def test_huge_numbers_in_every_place_cost_nothing() -> None:
    """Faults 4.3: counts, lengths and indexes, negative ones and ones of too many bytes included; no allocation."""
    values = list(itertools.chain.from_iterable(implants(value, HUGE) for value in SEEDS))
    decoder = OperationDecoder()
    judge_all(decoder, SEEDS)
    tracemalloc.start()

    answers = judge_all(decoder, values)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answers.total() > 10_000
    assert answers["decode_error"] > 8_000
    assert peak < 4_000_000, "what is remembered of good ones, and nothing else"


@pytest.mark.slow
def test_any_byte_in_any_place_has_an_answer() -> None:
    """Every union index among them, in range and out."""
    answers = judge_all(OperationDecoder(), every_byte(GET))

    assert answers.total() == 256 * len(GET)
    assert {"get", "delete", "head", "decode_error", "unknown_schema", "invalid_operation"} <= answers.keys()


@pytest.mark.slow
@pytest.mark.parametrize("framing", ["auto", "bare", "single-object", "confluent"])
def test_random_bytes_have_an_answer(framing: Any) -> None:
    """Faults 4.3: 3,000 records of nothing, short ones mostly; most are no datum."""
    chance = random.Random(framing)
    values = [chance.randbytes(int(chance.expovariate(1 / 40))) for _ in range(3000)]

    answers = judge_all(OperationDecoder(framing=framing), values)

    assert answers["decode_error"] > 2700
    assert answers.keys() <= {"decode_error", "unknown_schema"}


@pytest.mark.slow
def test_what_stands_in_a_frame_is_as_hostile_as_what_stands_bare() -> None:
    """Contract 2.4: the frame itself, and the datum in it."""
    framed = OPERATION_PREFIX + GET

    answers = judge_all(OperationDecoder(), itertools.chain(bit_flips(framed), truncations(framed)))

    assert answers["unknown_schema"] >= 60, "a flipped fingerprint is another schema's"
    assert {"decode_error", "get"} <= answers.keys()


def union_indexes(value: bytes) -> list[int]:
    """Where the union indexes of PLAIN stand, found by what follows them."""
    body = value.index(b"\x02k") - 2
    return [body - 1, body, body + 1]


@pytest.mark.parametrize("index", [-1, -2, -4, 2, 3, 5, 7, 64, 2**31, 2**63 - 1, -(2**63)])
def test_a_union_index_out_of_range_is_never_taken_for_one_within(index: int) -> None:
    """Faults 4.3: the compiled reader takes -1 for the last branch, a silent mis-decode."""
    places = union_indexes(PLAIN)

    for place in places:
        if place == places[1] and index in {2, 3}:
            continue  # a body has four branches
        value = PLAIN[:place] + number(index) + PLAIN[place + 1 :]
        assert judge(OperationDecoder().decode(value)) == "decode_error"


class Registry:
    """Knows the schemas it was made with by their place, counted from 0."""

    def __init__(self, *schemas: Schema) -> None:
        self._schemas = {str(place): schema for place, schema in enumerate(schemas)}

    def lookup(self, schema_id: str) -> Schema | None:
        return self._schemas.get(schema_id)


def later_version() -> Schema:
    """A writer's schema with arrays, maps and records inside one another that v1 has not."""
    schema = json.loads(schema_text("operation"))
    inner: Any = {"type": "array", "items": {"type": "map", "values": ["null", "string"]}}
    fields = [
        {"name": "nested", "type": inner, "default": []},
        {"name": "choice", "type": {"type": "enum", "name": "Choice", "symbols": ["A", "B"]}, "default": "A"},
        {"name": "flag", "type": "boolean", "default": False},
        {"name": "digest", "type": {"type": "fixed", "name": "Digest", "size": 4}, "default": "0000"},
        {"name": "when", "type": {"type": "int", "logicalType": "date"}, "default": 0},
        {"name": "number", "type": {"type": "bytes", "logicalType": "decimal", "precision": 4}, "default": "0"},
    ]
    schema["fields"] += fields
    return read_schema(json.dumps(schema))


@pytest.mark.slow
def test_a_foreign_writer_s_record_is_as_hostile() -> None:
    """Faults 4.3: what the scanner lets through, the compiled reader reads; logical types cannot fail a record."""
    later = later_version()
    out = io.BytesIO()
    datum = {
        "context": {"usecase": "u", "scopes": []},
        "request_id": "r",
        "body": ("tierstream.v1.Insert", {"key": "k", "metadata": {"custom": {"a": "1"}}, "payload": b"xyz"}),
        "nested": [{"a": "x", "b": None}, {}],
        "choice": "B",
        "flag": True,
        "digest": b"1234",
        "when": 2**31 - 1,
        "number": bytes(10),
    }
    fastavro.schemaless_writer(out, later.parsed, datum)
    value = b"\x00\x00\x00\x00\x00" + out.getvalue()
    decoder = OperationDecoder(resolver=Registry(later))
    assert judge(decoder.decode(value)) == "insert"

    answers = judge_all(decoder, itertools.chain(bit_flips(value), implants(value, HUGE[:8])))
    cuts = judge_all(decoder, (value[:end] for end in range(5, len(value))))

    assert answers.total() > 2000
    assert {"insert", "decode_error", "unknown_schema"} <= answers.keys()
    assert cuts == {"decode_error": len(value) - 5}


def test_deep_nesting_neither_crashes_nor_is_it_needed() -> None:
    """Faults 4.3: a recursive schema never gets this far; the deepest allowed one is read, whatever the bytes say."""
    schema: Any = "long"
    for _ in range(64):
        schema = {"type": "array", "items": schema}
    deep = read_schema(json.dumps(schema))
    decoder = OperationDecoder(resolver=Registry(deep))

    values = [b"\x00\x00\x00\x00\x00" + part for part in (b"\x02" * 5000, b"\x02" * 64 + b"\x00" * 65, b"\x04" * 64)]

    assert judge_all(decoder, values) == {"decode_error": 3}
    with pytest.raises(DecodeError) as caught:
        read_schema('{"type":"record","name":"R","fields":[{"name":"f","type":["null","R"]}]}')
    assert caught.value.code == "unsafe_schema"


def test_many_items_are_bounded_in_time() -> None:
    """Contract 6, `limits.avro_elements`: 8 MiB of empty scopes stop at the limit, not at the last one."""
    count = 4 * 2**20
    value = b"\x02u" + number(count) + bytes(2 * count)
    blocks = b"\x02u" + (number(1) + bytes(2)) * 2**20

    for bad in (value, blocks):
        began = time.thread_time()
        assert judge(OperationDecoder(framing="bare", record_bytes_max=2**24).decode(bad)) == "decode_error"
        assert time.thread_time() - began < SECONDS_MAX


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_bytes_that_look_for_a_way_have_an_answer(value: bytes) -> None:
    """The same, with examples that grow towards what is accepted."""
    judge(OperationDecoder().decode(value))
    judge(OperationDecoder(framing="bare").decode(value))


@given(st.binary(max_size=100))
@settings(max_examples=300)
def test_what_the_scanner_accepts_fastavro_reads_to_the_same_end(tail: bytes) -> None:
    """For a schema of every type: the scan is all that stands between bytes and the compiled reader."""
    schema = everything()
    data = b"\x02" + tail
    try:
        scanner(schema.tree)(data, 0)
    except DecodeError:
        return
    buffer = io.BytesIO(data)
    fastavro.schemaless_reader(buffer, schema.parsed, None)
    assert buffer.read() == b""


def everything() -> Schema:
    """An array of unions of every type, so that most short inputs mean something."""
    empty = {"type": "record", "name": "Empty", "fields": []}
    types: list[Any] = ["null", "boolean", "int", "long", "bytes", "string", empty, {"type": "map", "values": "int"}]
    return read_schema(json.dumps({"type": "array", "items": types}))


def test_our_own_schema_s_seeds_are_good() -> None:
    """Guards the tests above against mutating what was never valid."""
    for value in SEEDS:
        assert judge(OperationDecoder().decode(value)) in {"insert", "get"}
        scanner(operation_schema().tree)(value, 0)
