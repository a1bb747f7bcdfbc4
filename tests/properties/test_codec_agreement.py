"""What the codec reads and writes, fastavro and Apache's Avro read and write the same: valid data and mutated ones."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import avro.io
import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wire
from consumer.avro_schemas import operation_schema, response_schema
from consumer.codec import (
    Decoded,
    OperationDecoder,
    ResponseEncoder,
    decode_response,
    encode_operation,
    metadata_fields,
    operation_fields,
)
from consumer.errors import STATUS_BY_CODE, DecodeError, TierstreamError
from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.operations import (
    Delete,
    Deleted,
    Get,
    Got,
    Head,
    Headed,
    Insert,
    Inserted,
    Kind,
    Metadata,
    Operation,
    OpResponse,
    PayloadReference,
    StoredObject,
    TimeToIdle,
    TimeToLive,
)
from consumer.prescan import scanner

SCAN = scanner(operation_schema().tree)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
KEYS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=150)
LONGS = st.integers(-(2**63), 2**63 - 1)
PARTS = st.text("abcXYZ019_-()$!+'", min_size=1, max_size=12)
CONTEXTS = st.builds(
    ObjectContext,
    st.text("abcXYZ019_-", min_size=1, max_size=128),
    st.lists(st.builds(Scope, PARTS, PARTS), max_size=6).map(tuple),
)
SECONDS = st.integers(1, 315_360_000)
EXPIRATIONS = st.none() | st.builds(TimeToLive, SECONDS) | st.builds(TimeToIdle, SECONDS)
CONTENT_TYPES = st.sampled_from(["application/octet-stream", "text/plain", 'a/b; c="d e"; f=g'])
GIVEN_METADATA = st.builds(
    Metadata,
    content_type=CONTENT_TYPES,
    expiration=EXPIRATIONS,
    compression=st.none() | st.just("zstd"),
    filename=st.none() | TEXT,
    origin=st.none() | TEXT,
    custom=st.dictionaries(TEXT, TEXT, max_size=4),
)
TIMES = st.none() | st.datetimes(timezones=st.just(UTC))
STORED_METADATA = st.builds(
    Metadata,
    content_type=TEXT,
    expiration=EXPIRATIONS,
    compression=st.none() | TEXT,
    filename=st.none() | TEXT,
    origin=st.none() | TEXT,
    custom=st.dictionaries(TEXT, TEXT, max_size=4),
    time_created=TIMES,
    time_expires=TIMES,
    size=st.none() | LONGS,
)
REFERENCES = st.builds(
    PayloadReference,
    TEXT,
    st.none() | st.integers(0, 2**63 - 1),
    st.none() | st.integers(0, 2**32 - 1),
)
PAYLOADS = st.binary(max_size=300) | REFERENCES
OPERATIONS: st.SearchStrategy[Operation] = st.one_of(
    st.builds(Insert, CONTEXTS, st.none() | KEYS, GIVEN_METADATA, PAYLOADS),
    *(st.builds(kind, CONTEXTS, KEYS) for kind in (Get, Delete, Head)),
)
OUTCOMES: st.SearchStrategy[OpResponse | TierstreamError] = st.one_of(
    st.builds(Inserted, st.builds(ObjectId, CONTEXTS, KEYS), STORED_METADATA),
    st.builds(Got, KEYS, st.none() | st.builds(StoredObject, STORED_METADATA, PAYLOADS)),
    st.builds(Headed, KEYS, st.none() | STORED_METADATA),
    st.builds(Deleted, KEYS),
    st.builds(TierstreamError, TEXT.filter(bool), code=st.sampled_from(sorted(STATUS_BY_CODE))),
)
KINDS: st.SearchStrategy[Kind | None] = st.sampled_from(["insert", "get", "delete", "head", None])
DECODED = st.builds(
    Decoded,
    st.none(),
    st.none(),
    st.none() | TEXT,
    st.none() | CONTEXTS,
    KINDS,
    st.none() | TEXT,
)


def by_fastavro(data: bytes) -> dict[str, Any]:
    """An operation, its branches by name."""
    buffer = io.BytesIO(data)
    read = fastavro.schemaless_reader(
        buffer, operation_schema().parsed, None, return_record_name=True, return_record_name_override=True
    )
    assert isinstance(read, dict)
    assert buffer.read() == b""
    name, body = read["body"]
    return {**read, "body": {"type": name.rpartition(".")[2], **body}}


def by_apache(data: bytes) -> dict[str, Any]:
    """The same, by the other implementation."""
    buffer, schema = io.BytesIO(data), wire.schema("operation")
    read = wire._TaggedReader(schema, schema).read(avro.io.BinaryDecoder(buffer))
    assert isinstance(read, dict)
    assert buffer.read() == b""
    name, body = read["body"]
    return {**read, "body": {"type": name, **body}}


def without_read_only(fields: dict[str, Any]) -> dict[str, Any]:
    """What of an operation counts."""
    body = fields["body"]
    if body["type"] != "Insert":
        return fields
    metadata = body["metadata"] | dict.fromkeys(("time_created", "time_expires", "size"))
    return {**fields, "body": {**body, "metadata": metadata}}


@given(OPERATIONS, st.none() | TEXT)
@settings(max_examples=200)
def test_an_operation_written_is_the_one_read_by_everybody(operation: Operation, request_id: str | None) -> None:
    """Contract 2.1: the codec's own writer, its own reader, fastavro and Apache's Avro agree on every value."""
    data = encode_operation(operation, request_id)

    decoded = OperationDecoder().decode(data)

    assert decoded.operation == operation
    assert decoded.request_id == request_id
    fields = operation_fields(operation, request_id)
    assert fields == by_fastavro(data) == by_apache(data)


@given(OPERATIONS, st.none() | TEXT)
@settings(max_examples=100)
def test_an_operation_is_written_byte_for_byte_as_by_fastavro(operation: Operation, request_id: str | None) -> None:
    """Two writers, one encoding."""
    fields = operation_fields(operation, request_id)
    name = "tierstream.v1." + fields["body"].pop("type")
    out = io.BytesIO()

    fastavro.schemaless_writer(out, operation_schema().parsed, {**fields, "body": (name, fields["body"])})

    assert encode_operation(operation, request_id) == out.getvalue()


def response_datum(offset: int, decoded: Decoded, outcome: OpResponse | TierstreamError, completed_at: int) -> Any:
    """A response for fastavro, written down from the contract."""
    context = decoded.context
    key: str | None = decoded.key if isinstance(outcome, TierstreamError) else outcome.key
    result: dict[str, Any]
    match outcome:
        case Inserted():
            status, result = 201, {"metadata": metadata_fields(outcome.metadata)}
        case Got(object=None):
            status, result = 404, {"object": None}
        case Got(object=StoredObject(metadata=metadata, payload=payload)):
            if isinstance(payload, PayloadReference):
                given: Any = {"uri": payload.uri, "size": payload.size, "crc32c": payload.crc32c}
            else:
                given = payload
            status, result = 200, {"object": {"metadata": metadata_fields(metadata), "payload": given}}
        case Headed(metadata=None):
            status, result = 404, {"metadata": None}
        case Headed(metadata=Metadata() as found):
            status, result = 204, {"metadata": metadata_fields(found)}
        case Deleted():
            status, result = 204, {}
        case TierstreamError():
            status = STATUS_BY_CODE[outcome.code]
            result = {"code": outcome.code, "message": str(outcome)[:1000], "retriable": outcome.retriable}
        case _:
            raise AssertionError(outcome)
    name = "Failure" if isinstance(outcome, TierstreamError) else type(outcome).__name__
    return {
        "index": offset,
        "source": {"topic": "operations", "partition": 3, "offset": offset},
        "request_id": decoded.request_id,
        "context": context
        and {
            "usecase": context.usecase,
            "scopes": [{"name": scope.name, "value": scope.value} for scope in context.scopes],
        },
        "kind": decoded.kind,
        "key": key,
        "status": status,
        "result": (f"tierstream.v1.{name}", result),
        "completed_at": completed_at,
    }


@given(st.integers(0, 2**63 - 1), DECODED, OUTCOMES, LONGS)
@settings(max_examples=400)
def test_a_response_is_written_byte_for_byte_as_by_fastavro(
    offset: int, decoded: Decoded, outcome: OpResponse | TierstreamError, completed_at: int
) -> None:
    """Contract 2.2: the hand-written encoder against the library, from a datum written down from the contract."""
    datum = response_datum(offset, decoded, outcome, completed_at)
    out = io.BytesIO()
    fastavro.schemaless_writer(out, response_schema().parsed, datum)

    status, value = ResponseEncoder("operations", 3).encode(offset, decoded, outcome, completed_at)

    assert (status, value) == (datum["status"], out.getvalue())
    name, result = datum["result"]
    assert decode_response(value) == {**datum, "result": {"type": name.removeprefix("tierstream.v1."), **result}}
    assert wire.read_response(value) == {**datum, "result": (name.removeprefix("tierstream.v1."), result)}


@given(st.datetimes(timezones=st.just(UTC)))
def test_times_are_written_to_the_microsecond(moment: datetime) -> None:
    """Contract 2: timestamp-micros, before the epoch and after, without a float on the way."""
    micros = metadata_fields(Metadata(time_created=moment))["time_created"]

    assert EPOCH + timedelta(microseconds=micros) == moment


SEEDS = [
    wire.operation("insert", "a/b", b"payload", request_id="r"),
    wire.operation("insert", None, b"", usecase="u", scopes=()),
    wire.operation("insert", "ключ", {"uri": "gs://a/b", "size": 5, "crc32c": 7}, custom={"a": "1", "b": "2"}),
    wire.operation(
        "insert",
        "k",
        bytes(200),
        content_type="text/plain",
        expiration={"policy": "tti", "seconds": 60},
        compression="zstd",
        filename="f",
        origin="o",
        custom={"a": "1"},
        time_created=1,
        time_expires=2,
        size=3,
    ),
    wire.operation("get", "a/b", request_id="r"),
    wire.operation("delete", "k" * 100, scopes=[("a", "1"), ("b", "2"), ("c", "3")]),
    wire.operation("head", "k"),
]


def mutations(chance: random.Random, count: int) -> list[bytes]:
    """Operations with a few bytes or bits changed, taken out or put in; most stay near to what is valid."""
    changes: list[Callable[[bytearray, int], None]] = [
        lambda data, at: data.__setitem__(at, data[at] ^ 1 << chance.randrange(8)),
        lambda data, at: data.__setitem__(at, chance.randrange(256)),
        lambda data, at: data.__setitem__(at, chance.choice((0, 1, 2, 3, 4, 127, 128, 255))),
        lambda data, at: data.__delitem__(at),
        lambda data, at: data.insert(at, chance.randrange(256)),
        lambda data, at: data.__setitem__(slice(at, at), data[at : at + chance.randrange(9)]),
    ]
    mutated = []
    for _ in range(count):
        data = bytearray(chance.choice(SEEDS))
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            chance.choice(changes)(data, chance.randrange(len(data)))
        mutated.append(bytes(data))
    return mutated


def scanned(data: bytes) -> bool:
    """Tell whether the scanner takes *data* for one operation."""
    try:
        SCAN(data, 0)
    except DecodeError:
        return False
    return True


@pytest.mark.slow
def test_what_is_accepted_everybody_reads_the_same_and_the_scanner_accepts_nothing_else() -> None:
    """Faults 4.3: 12,000 mutated records.

    The reader for v1 and the scanner for any schema share only how a number, a length and an index are read. They
    accept the same data, and what they accept fastavro and Apache's Avro read to the same values and the same end.
    """
    decoder = OperationDecoder(framing="bare")
    accepted = invalid = refused = 0
    for data in mutations(random.Random(4303), 12_000):
        decoded = decoder.decode(data)
        whole = decoded.error is None or decoded.error.code != "decode_error"
        assert scanned(data) == whole, (data, decoded.error)
        if not whole:
            refused += 1
            continue
        fields = by_fastavro(data)
        assert fields == by_apache(data)
        assert decoded.kind == fields["body"]["type"].lower()
        if decoded.operation is None:
            invalid += 1
        else:
            accepted += 1
            assert operation_fields(decoded.operation, decoded.request_id) == without_read_only(fields)

    assert accepted > 1000, "the mutations have to leave something to compare"
    assert min(invalid, refused) > 500
