"""Records what Confluent's own serializer writes, as `fixtures/confluent_frames.json`: the oracle of the framings.

Run by hand where the serializer has changed what it writes; a test tells::

    PYTHONPATH=tests .venv/bin/python tests/record_confluent_frames.py

The serializer registers its schemas with `registry_stub.py`, as it would with a registry, which holds the stub to the
interface too. Ids and GUIDs in the recorded frames are the stub's: the n-th schema added has the id n.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from confluent_kafka.schema_registry import (
    SchemaRegistryClient,
    header_schema_id_serializer,
    prefix_schema_id_serializer,
)
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

import wire
from registry_stub import StandingRegistry

FRAMES = Path(__file__).with_name("fixtures") / "confluent_frames.json"

OPERATION = (wire.SCHEMAS / "operation.avsc").read_text(encoding="utf-8")


def evolved() -> str:
    """The schema of a later producer, with a field more."""
    schema = json.loads(OPERATION)
    schema["fields"].append({"name": "sent_by", "type": "string", "default": ""})
    return json.dumps(schema)


def head(key: str, **more: Any) -> dict[str, Any]:
    """An operation, as fastavro takes it."""
    body = ("tierstream.v1.Head", {"key": key})
    return {"context": {"usecase": "e2e", "scopes": []}, "request_id": f"r-{key}", "body": body, **more}


def record() -> dict[str, Any]:
    """Return schemas and frames, as the installed serializer writes them."""
    registry = StandingRegistry()
    frames = []
    try:
        with SchemaRegistryClient({"url": registry.stub.url}) as client:
            later: dict[str, Any] = {"sent_by": "a later one"}
            producers: list[tuple[str, str, dict[str, Any]]]
            producers = [("operation", OPERATION, {}), ("evolved", evolved(), later)]
            for name, schema, more in producers:
                for place, schema_id_serializer in (
                    ("prefix", prefix_schema_id_serializer),
                    ("header", header_schema_id_serializer),
                ):
                    key = f"{name}-{place}"
                    serialize = AvroSerializer(client, schema, conf={"schema.id.serializer": schema_id_serializer})
                    headers: Any = []
                    context = SerializationContext("operations", MessageField.VALUE, headers)
                    value: Any = serialize(head(key, **more), context)
                    frames.append(
                        {
                            "key": key,
                            "value": value.hex(),
                            "headers": [[header, content.hex()] for header, content in headers],
                        }
                    )
        schemas = [stored["schema"] for stored in registry.stub.schemas]
    finally:
        registry.close()
    return {"by": f"confluent-kafka {version('confluent-kafka')}", "schemas": schemas, "frames": frames}


def main() -> None:
    """Write the fixture anew."""
    FRAMES.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
