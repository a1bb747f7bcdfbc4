"""Framed operations and responses, with a schema registry that comes and goes."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import avro.io
import avro.schema
import pytest

import wire
from brokers import Broker
from registry_stub import StandingRegistry, by_guid, by_id, guid_header, guid_of, json_of
from stages import SetStage

OPERATION = (wire.SCHEMAS / "operation.avsc").read_text(encoding="utf-8")
RESPONSE = (wire.SCHEMAS / "response.avsc").read_text(encoding="utf-8")

CONFLUENT = Path(__file__).parents[1] / "fixtures" / "confluent_frames.json"
"""Frames by confluent-kafka's serializer, recorded by `record_confluent_frames.py`."""

RECURSIVE = {"type": "record", "name": "R", "fields": [{"name": "f", "type": ["null", "R"]}]}


@pytest.fixture
def registry() -> Iterator[StandingRegistry]:
    """A registry that knows the operation's schema as 1."""
    registry = StandingRegistry()
    registry.stub.add(OPERATION)
    yield registry
    registry.close()


def evolved() -> dict[str, Any]:
    """A later producer's schema: fields added, moved and left out, a number of a narrower type."""
    schema: dict[str, Any] = wire._plain(json.loads(OPERATION))
    context, _, body = schema["fields"]
    body["type"] = body["type"][:1]  # it only inserts
    key, metadata, payload = body["type"][0]["fields"]
    expiration = next(part for part in metadata["type"]["fields"] if part["name"] == "expiration")
    expiration["type"][1]["fields"].reverse()
    expiration["type"][1]["fields"][0]["type"] = "int"
    body["type"][0]["fields"] = [payload, {"name": "priority", "type": "int", "default": 0}, metadata, key]
    added = {"name": "sent_by", "type": {"type": "array", "items": "string"}, "default": []}
    schema["fields"] = [body, added, context]
    return schema


def written_with(schema: dict[str, Any], datum: dict[str, Any]) -> bytes:
    """*datum* as Apache's library writes it."""
    parsed, out = avro.schema.parse(json.dumps(schema)), io.BytesIO()
    avro.io.DatumWriter(parsed).write(datum, avro.io.BinaryEncoder(out))
    return out.getvalue()


def bare(key: str, **more: Any) -> bytes:
    """A small insert."""
    return wire.operation("insert", key, b"payload", **more)


@pytest.mark.slow
def test_every_framing_is_read(broker: Broker, set_stage: SetStage, registry: StandingRegistry) -> None:
    """Contract 2.4: told apart by first byte and header; the header wins; what is unknown or unsafe is answered so."""
    stub = registry.stub
    later = stub.add(evolved())
    unsafe = stub.add(RECURSIVE)
    unknown = uuid.uuid4()
    stage = set_stage(broker, schema_registry={"url": stub.url})
    ledger = stage.ledger
    insert = {
        "body": {
            "key": "evolved",
            "priority": 7,
            "payload": b"payload",
            "metadata": {**wire.METADATA, "expiration": {"seconds": 60, "policy": "ttl"}},
        },
        "sent_by": ["a", "b"],
        "context": {"usecase": "e2e", "scopes": []},
    }
    good: dict[str, tuple[bytes, list[tuple[str, bytes | None]]]] = {
        "bare": (bare("k0"), []),
        "id": (by_id(1, bare("k1")), []),
        "guid": (by_guid(guid_of(1), bare("k2")), []),
        "header": (bare("k3"), [guid_header(guid_of(1))]),
        "single-object": (b"\xc3\x01" + wire.fingerprint("operation") + bare("k4"), []),
        "evolved": (by_id(later, written_with(evolved(), insert)), []),
    }
    bad: dict[str, tuple[bytes, list[tuple[str, bytes | None]], str, str | None]] = {
        "unknown id": (by_id(99, bare("k")), [], "unknown_schema", "99"),
        "unknown GUID": (by_guid(unknown, bare("k")), [], "unknown_schema", str(unknown)),
        "the header wins": (by_id(1, bare("k")), [guid_header(unknown)], "unknown_schema", str(unknown)),
        "the header wins, and its datum is not framed": (
            by_id(1, bare("k")),
            [guid_header(guid_of(1))],
            "decode_error",
            str(guid_of(1)),
        ),
        "unknown fingerprint": (b"\xc3\x01fingrpnt" + bare("k"), [], "unknown_schema", b"fingrpnt"[::-1].hex()),
        "unsafe schema": (by_id(unsafe, b"\x02" * 5000 + b"\x00"), [], "unsafe_schema", str(unsafe)),
        "another schema": (by_id(later, bare("k")), [], "decode_error", str(later)),
    }
    service = stage.start(partitions=2)

    entries = {name: ledger.send(value, headers=headers, statuses={201}) for name, (value, headers) in good.items()}
    poison = {name: ledger.send(value, headers=headers, statuses={400}) for name, (value, headers, *_) in bad.items()}

    for name, sent in entries.items():
        assert ledger.answer(sent).result_type == "Inserted", name
    assert ledger.answer(entries["evolved"]).result["metadata"]["expiration"] == {"policy": "ttl", "seconds": 60}
    for name, sent in poison.items():
        _, _, code, schema_id = bad[name]
        assert ledger.answer(sent).code == code, name
        assert ledger.wait_dead_letter(sent[0]).header("tierstream-dlq-schema-id") == schema_id, name
    assert stub.asked.count("GET /schemas/ids/1") == 1
    service.stop()
    ledger.read_all()
    assert str(ledger.verdict()).endswith("0 missing [], 0 surplus [], 0 mismatched []")


@pytest.mark.slow
def test_what_confluent_s_own_serializer_has_written_is_read(broker: Broker, set_stage: SetStage) -> None:
    """Contract 2.4: id and GUID, in the value and in a header, of this schema and of a later producer's."""
    recorded = json.loads(CONFLUENT.read_text(encoding="utf-8"))
    registry = StandingRegistry()
    for schema in recorded["schemas"]:
        registry.stub.add(schema)
    stage = set_stage(broker, schema_registry={"url": registry.stub.url})
    service = stage.start(partitions=2)

    entries = {
        frame["key"]: stage.ledger.send(
            bytes.fromhex(frame["value"]),
            headers=[(name, bytes.fromhex(value)) for name, value in frame["headers"]],
            request_id=f"r-{frame['key']}",
            kind="head",
            statuses={404},
        )
        for frame in recorded["frames"]
    }
    for key, sent in entries.items():
        assert stage.ledger.answer(sent).response["key"] == key
    service.stop()
    registry.close()
    stage.ledger.read_all()
    verdict = stage.ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert len(entries) == 4


@pytest.mark.slow
def test_a_partition_waits_for_a_registry_that_is_away_and_goes_on(
    broker: Broker, set_stage: SetStage, registry: StandingRegistry
) -> None:
    """Contract 2.4, 8: reason `registry`, not ready, other partitions go on; a restart meanwhile loses nothing."""
    stage = set_stage(broker, schema_registry={"url": registry.stub.url})
    ledger = stage.ledger
    (topic,) = stage.config["input"]["topics"]
    service = stage.start(partitions=2)
    registry.down()

    first = [ledger.operate("head", f"k{number}", statuses={404})[0] for number in range(5)]
    framed = [ledger.send(by_id(1, bare(f"f{number}")), statuses={201})[0] for number in range(20)]
    behind = [ledger.operate("head", f"b{number}", statuses={404})[0] for number in range(5)]
    beside = [ledger.operate("head", f"p{number}", partition=1, statuses={404})[0] for number in range(50)]
    ledger.wait_answered(first + beside)
    service.wait(lambda: service.partitions()[topic, 0]["paused_for"] == ["registry"], "the reason")

    assert service.partitions()[topic, 1]["paused_for"] == []
    assert not service.ready
    assert "schema registry unavailable" in service.get("/readyz")[1]
    assert service.metrics()[f'tierstream_partition_paused{{partition="0",reason="registry",topic="{topic}"}}'] == 1
    assert ledger.answered(framed + behind) == 0
    service.stop()
    assert ledger.committed(stage.group)[0] == first[-1].offset + 1

    service = stage.start(ready=False)
    service.wait(lambda: service.partitions().get((topic, 0), {}).get("paused_for") == ["registry"], "the reason again")
    registry.up()
    ledger.wait_answered()
    service.wait_ready(partitions=2)
    assert service.partitions()[topic, 0]["paused_for"] == []
    service.stop()

    ledger.read_all()
    assert str(ledger.verdict()).endswith("0 missing [], 0 surplus [], 0 mismatched []")
    assert ledger.dead_letters == {}


@pytest.mark.slow
@pytest.mark.parametrize("framing", ["single-object", "confluent"])
def test_responses_are_framed_as_configured(
    embedded: Broker, set_stage: SetStage, registry: StandingRegistry, framing: str
) -> None:
    """Contract 2.4: `output.framing`; the id is the one the registry gives for the response schema."""
    for _ in range(300):
        registry.stub.add('"long"')  # so that the id takes more than one byte
    stage = set_stage(embedded, output={"framing": framing}, schema_registry={"url": registry.stub.url})
    service = stage.start(partitions=2)

    entries = stage.ledger.operate("head", "missing") + stage.ledger.send(b"\x02", statuses={400})
    stage.ledger.wait_answered(entries)
    service.stop()

    schema_id = len(registry.stub.schemas)
    frame = b"\xc3\x01" + wire.fingerprint("response") if framing == "single-object" else by_id(schema_id, b"")
    subject = f"{stage.config['output']['topic']}-value"
    for entry, status in zip(entries, (404, 400), strict=True):
        (answer,) = stage.ledger.answers[entry.id]
        assert answer.value is not None
        assert answer.value.startswith(frame)
        assert wire.read_response(answer.value[len(frame) :])["status"] == status
    if framing == "confluent":
        assert registry.stub.subjects == {subject: [schema_id]}
        assert json.loads(registry.stub.schemas[-1]["schema"]) == json.loads(RESPONSE)
    else:
        assert registry.stub.asked == []


@pytest.mark.slow
def test_a_registry_that_refuses_the_response_schema_is_an_exit(
    embedded: Broker, set_stage: SetStage, registry: StandingRegistry
) -> None:
    """Contract 11: exit 2, with the registry's own words, and nothing is read."""
    stage = set_stage(embedded, output={"framing": "confluent"}, schema_registry={"url": registry.stub.url})
    subject = f"{stage.config['output']['topic']}-value"
    refusal = json_of(409, error_code=409, message="incompatible with an earlier schema")
    registry.stub.canned[f"/subjects/{subject}/versions"] = refusal

    service = stage.start(ready=False)

    assert service.wait_exit() == 2, service.obituary()
    said = service.log.read_text(encoding="utf-8")
    assert subject in said
    assert "incompatible with an earlier schema" in said


@pytest.mark.slow
def test_a_registry_that_is_away_at_start_is_waited_for(
    embedded: Broker, set_stage: SetStage, registry: StandingRegistry
) -> None:
    """Contract 6: like a broker that cannot be reached: up, not ready, and it goes on trying."""
    stage = set_stage(embedded, output={"framing": "confluent"}, schema_registry={"url": registry.stub.url})
    registry.down()
    service = stage.start(ready=False)
    service.wait(lambda: "registering the response schema" in service.get("/readyz")[1], "the reason")
    assert service.get("/healthz")[0] == 200

    registry.up()

    service.wait_ready(partitions=2)
    service.stop()
