"""The schema files and the bytes kept of every released version: three implementations read the same from them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import avro.io
import fastavro
import pytest

import wire
from consumer.avro_schemas import operation_schema, response_schema, schema_text
from consumer.codec import OPERATION_PREFIX, OperationDecoder, decode_response, operation_fields

FIXTURES = Path(__file__).parents[2] / "schemas" / "fixtures"

ENTRIES: list[dict[str, Any]] = [
    {**entry, "path": index.parent / entry["file"]}
    for index in sorted(FIXTURES.glob("v*/index.json"))
    for entry in json.loads(index.read_text(encoding="utf-8"))
]
OPERATIONS = [entry for entry in ENTRIES if entry["schema"] == "operation"]
RESPONSES = [entry for entry in ENTRIES if entry["schema"] == "response"]

READ_ONLY = ("time_created", "time_expires", "size")


def name_of(entry: Mapping[str, Any]) -> str:
    """Name a test's parameter."""
    return str(Path(entry["file"]).stem)


def value_of(entry: Mapping[str, Any]) -> bytes:
    """The fixture's bytes."""
    path: Path = entry["path"]
    return path.read_bytes()


def datum_of(entry: Mapping[str, Any]) -> bytes:
    """The fixture's bytes without their frame."""
    value = value_of(entry)
    return value.removeprefix(OPERATION_PREFIX) if entry["framing"] == "single-object" else value


def as_index(value: Any) -> Any:
    """Write a value as the index does: the branch of a union of records as `type`, bytes as base64."""
    if isinstance(value, tuple):
        name, fields = value
        return {"type": name.rpartition(".")[2], **as_index(fields)}
    if isinstance(value, list):
        return [as_index(part) for part in value]
    if isinstance(value, dict):
        return {
            **{name: as_index(part) for name, part in value.items() if not isinstance(part, bytes)},
            **{
                f"{name}_base64": base64.b64encode(part).decode()
                for name, part in value.items()
                if isinstance(part, bytes)
            },
        }
    return value


def without_read_only(datum: dict[str, Any]) -> dict[str, Any]:
    """An operation with the read-only fields of its metadata taken off."""
    body = datum["body"]
    if "metadata" not in body:
        return datum
    metadata = body["metadata"] | dict.fromkeys(READ_ONLY)
    return {**datum, "body": {**body, "metadata": metadata}}


def test_every_fixture_is_listed_and_every_listed_one_is_there() -> None:
    """Guards the tests below against passing over an empty list."""
    assert {entry["path"] for entry in ENTRIES} == set(FIXTURES.glob("v*/*.bin"))
    assert len(OPERATIONS) >= 10
    assert len(RESPONSES) >= 10


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_fastavro_reads_what_the_index_says(entry: dict[str, Any]) -> None:
    """Contract 2.4: fixture bytes of every released version are read by everybody, always."""
    schema = operation_schema() if entry["schema"] == "operation" else response_schema()
    data = io.BytesIO(datum_of(entry))

    read = fastavro.schemaless_reader(
        data, schema.parsed, None, return_record_name=True, return_record_name_override=True
    )

    assert as_index(read) == entry["datum"]
    assert data.read() == b""


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_apache_avro_reads_what_the_index_says(entry: dict[str, Any]) -> None:
    """Contract 2.4, by an implementation that shares nothing with the service."""
    schema, data = wire.schema(entry["schema"]), io.BytesIO(datum_of(entry))

    read = wire._TaggedReader(schema, schema).read(avro.io.BinaryDecoder(data))

    assert as_index(read) == entry["datum"]
    assert data.read() == b""


@pytest.mark.parametrize("entry", OPERATIONS, ids=name_of)
def test_the_service_reads_the_operations_of_every_version(entry: dict[str, Any]) -> None:
    """Contract 2.1, 2.4, MD-5: the same values, except for the read-only fields, which are ignored."""
    decoded = OperationDecoder().decode(value_of(entry))

    assert decoded.operation is not None, decoded.error
    fields = as_index(operation_fields(decoded.operation, decoded.request_id))
    assert fields == without_read_only(entry["datum"])
    assert (decoded.schema_id is None) == (entry["framing"] == "bare")


@pytest.mark.parametrize("entry", RESPONSES, ids=name_of)
def test_the_tools_read_the_responses_of_every_version(entry: dict[str, Any]) -> None:
    """Contract 2.2, 7: what `tail` shows."""
    assert as_index(decode_response(value_of(entry))) == entry["datum"]


@pytest.mark.parametrize("name", ["operation", "response"])
def test_a_schema_is_complete_in_itself(name: str) -> None:
    """Contract 2: every .avsc is self-contained, in the namespace tierstream.v1, with its times marked as such."""
    text = (Path(__file__).parents[2] / "schemas" / f"{name}.avsc").read_text(encoding="utf-8")

    parsed = fastavro.parse_schema(json.loads(text), named_schemas={})

    assert isinstance(parsed, dict)
    assert parsed["name"] == f"tierstream.v1.{name.capitalize()}"
    assert text.count('"timestamp-micros"') == {"operation": 2, "response": 3}[name]
    assert schema_text("operation" if name == "operation" else "response") == text


def test_fields_left_out_by_a_writer_take_the_defaults_of_the_contract() -> None:
    """Contract 2.1: scopes, request id, key and all metadata have defaults, so that writers may leave them out."""
    schema = fastavro.parse_schema(json.loads(schema_text("operation")), named_schemas={})
    written = io.BytesIO()
    body = ("tierstream.v1.Insert", {"payload": b"x", "metadata": {}})

    fastavro.schemaless_writer(written, schema, {"context": {"usecase": "u"}, "body": body})

    assert written.getvalue() == wire.operation("insert", None, b"x", usecase="u", scopes=())
