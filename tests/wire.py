"""Operations and responses as bytes, by Apache's own Avro: an implementation that shares nothing with the service.

`operation` writes one `tierstream.v1.Operation`, `read_response` reads one `tierstream.v1.Response`. The schemas are
the files in `schemas/`; logical types are taken off before parsing, so that times are the plain longs of the wire and
an absurd one can be written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import avro.io
import avro.schema

SCHEMAS = Path(__file__).parents[1] / "schemas"

BODIES = ("Insert", "Get", "Delete", "Head")
"""The branches of `Operation.body`, in the order of the contract."""

METADATA: Mapping[str, Any] = {
    "content_type": "application/octet-stream",
    "expiration": None,
    "compression": None,
    "filename": None,
    "origin": None,
    "custom": {},
    "time_created": None,
    "time_expires": None,
    "size": None,
}


def _plain(schema: Any) -> Any:
    """Return the schema without logical types."""
    if isinstance(schema, dict):
        bare = {key: _plain(value) for key, value in schema.items() if key != "logicalType"}
        return bare["type"] if bare.keys() == {"type"} else bare
    return [_plain(part) for part in schema] if isinstance(schema, list) else schema


@cache
def schema(name: str) -> avro.schema.Schema:
    """Parse ``schemas/NAME.avsc``."""
    return avro.schema.parse(json.dumps(_plain(json.loads((SCHEMAS / f"{name}.avsc").read_text(encoding="utf-8")))))


@cache
def fingerprint(name: str) -> bytes:
    """CRC-64-AVRO of ``schemas/NAME.avsc``, little-endian as in a single-object header.

    By the definition in Avro's specification over the Parsing Canonical Form, which Apache's library makes.
    """
    empty = 0xC15D213AA4D7A795
    value = empty
    for byte in schema(name).canonical_form.encode():
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (empty if value & 1 else 0)
    return value.to_bytes(8, "little")


class _TaggedWriter(avro.io.DatumWriter):
    """Takes a union's branch by name, as ``(name, datum)``: Apache's writer cannot tell records of one shape apart."""

    def write_union(self, writers_schema: Any, datum: Any, encoder: Any) -> None:
        if isinstance(datum, tuple):
            name, value = datum
            index = next(i for i, branch in enumerate(writers_schema.schemas) if getattr(branch, "name", None) == name)
            encoder.write_long(index)
            self.write_data(writers_schema.schemas[index], value, encoder)
        else:
            super().write_union(writers_schema, datum, encoder)


class _TaggedReader(avro.io.DatumReader):
    """Gives ``(name, datum)`` for a union of several records, where the datum alone would not say which it was."""

    def read_union(self, writers_schema: Any, readers_schema: Any, decoder: Any) -> Any:
        index = decoder.read_long()
        branches = writers_schema.schemas
        assert 0 <= index < len(branches), f"union index {index}"
        value = self.read_data(branches[index], branches[index], decoder)
        records = [branch for branch in branches if branch.type == "record"]
        return (branches[index].name, value) if len(records) > 1 else value


def datum(name: str, value: Any) -> bytes:
    """Encode *value* by ``schemas/NAME.avsc``."""
    out = io.BytesIO()
    _TaggedWriter(schema(name)).write_data(schema(name), value, avro.io.BinaryEncoder(out))
    return out.getvalue()


def operation(
    kind: str,
    key: str | None = None,
    payload: bytes | Mapping[str, Any] = b"",
    *,
    usecase: str = "e2e",
    scopes: Sequence[tuple[str, str]] = (("org", "1"),),
    request_id: str | None = None,
    **metadata: Any,
) -> bytes:
    """Encode one operation: *kind* is insert, get, delete or head; *metadata* replaces fields of an insert's metadata.

    A *payload* that is a mapping is a `PayloadReference`.
    """
    body: dict[str, Any] = {"key": key}
    if kind == "insert":
        reference = payload if isinstance(payload, bytes) else {"size": None, "crc32c": None} | dict(payload)
        body |= {"metadata": {**METADATA, **metadata}, "payload": reference}
    return datum(
        "operation",
        {
            "context": {"usecase": usecase, "scopes": [{"name": name, "value": value} for name, value in scopes]},
            "request_id": request_id,
            "body": (kind.capitalize(), body),
        },
    )


def read_response(value: bytes) -> dict[str, Any]:
    """Decode one response, to its last byte; ``result`` becomes ``(branch name, datum)``."""
    data = io.BytesIO(value)
    response = _TaggedReader(schema("response"), schema("response")).read(avro.io.BinaryDecoder(data))
    assert isinstance(response, dict)
    assert data.read() == b"", "bytes after the response"
    return response
