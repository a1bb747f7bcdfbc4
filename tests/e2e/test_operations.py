"""What a client of the topics sees: one indexed response per operation, whatever it asked for."""

from __future__ import annotations

import re
import time
import uuid
import zlib
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

import wire
from brokers import Broker
from stages import SetStage, Stage

MIB = 1_048_576


def fresh(name: str = "key") -> str:
    """An object key that no other test uses."""
    return f"{name}/{uuid.uuid4()}"


def noise(size: int) -> bytes:
    """Bytes that do not compress and differ everywhere."""
    return b"".join(zlib.crc32(b"%d" % number).to_bytes(4, "big") for number in range(-(-size // 4)))[:size]


def test_an_insert_is_answered_with_what_was_stored(stage: Stage) -> None:
    """OP-1, OP-2, OP-5, EXE-2, MD-5: kind, key, context, index; read-only fields are filled, absurd ones ignored."""
    key, payload = fresh(), noise(1000)
    before = time.time_ns() // 1000

    answer = stage.ledger.answer(
        stage.ledger.operate(
            "insert",
            key,
            payload,
            statuses={201},
            scopes=[("org", "1"), ("project", "x")],
            content_type="text/plain; charset=utf-8",
            filename="a.txt",
            origin="203.0.113.7",
            custom={"colour": "blue"},
            expiration={"policy": "ttl", "seconds": 3600},
            time_created=-(2**62),
            time_expires=2**62,
            size=-5,
        )
    )

    response, after = answer.response, time.time_ns() // 1000
    metadata = answer.result["metadata"]
    assert (response["kind"], response["key"], answer.result_type) == ("insert", key, "Inserted")
    assert response["context"] == {
        "usecase": "e2e",
        "scopes": [{"name": "org", "value": "1"}, {"name": "project", "value": "x"}],
    }
    assert before <= metadata["time_created"] <= response["completed_at"] <= after
    assert metadata["time_expires"] == metadata["time_created"] + 3600 * 1_000_000
    assert {
        name: metadata[name] for name in ("content_type", "filename", "origin", "custom", "size", "expiration")
    } == {
        "content_type": "text/plain; charset=utf-8",
        "filename": "a.txt",
        "origin": "203.0.113.7",
        "custom": {"colour": "blue"},
        "size": 1000,
        "expiration": {"policy": "ttl", "seconds": 3600},
    }


def test_operations_on_one_object_take_effect_in_their_order(stage: Stage) -> None:
    """OP-1, OP-6, OP-7, K-8: a burst on one key reads its own writes, and the answers say so."""
    ledger, key = stage.ledger, fresh()
    story: list[tuple[str, bytes, int]] = [
        ("insert", b"first", 201),
        ("get", b"", 200),
        ("insert", b"second", 201),
        ("get", b"", 200),
        ("head", b"", 204),
        ("delete", b"", 204),
        ("head", b"", 404),
        ("get", b"", 404),
    ]
    before = set(ledger.entries)
    for kind, payload, status in story:
        ledger.operate(kind, key, payload, statuses={status}, wait=False)
    ledger.flush()
    sent = [entry for name, entry in ledger.entries.items() if name not in before]

    answers = [ledger.answer([entry]) for entry in sent]

    assert [answer.status for answer in answers] == [status for _, _, status in story]
    assert [answers[index].result["object"]["payload"] for index in (1, 3)] == [b"first", b"second"]
    assert answers[4].result["metadata"]["size"] == len(b"second")


@pytest.mark.parametrize(
    ("kind", "status", "result"),
    [
        ("get", 404, ("Got", {"object": None})),
        ("head", 404, ("Headed", {"metadata": None})),
        ("delete", 204, ("Deleted", {})),
    ],
)
def test_a_missing_object_is_a_success_with_nothing_in_it(stage: Stage, kind: str, status: int, result: Any) -> None:
    """OP-8: never a failure, never a dead letter."""
    answer = stage.ledger.answer(stage.ledger.operate(kind, fresh("missing")))

    assert (answer.status, answer.response["result"]) == (status, result)


def test_a_keyless_insert_learns_its_key_and_the_object_is_there(stage: Stage) -> None:
    """OP-5, K-7: the generated key is in the response; what was stored can be read under it."""
    inserted = stage.ledger.answer(stage.ledger.operate("insert", None, b"keyless", statuses={201}))
    key = inserted.response["key"]

    got = stage.ledger.answer(stage.ledger.operate("get", key, statuses={200}))

    assert uuid.UUID(key).version == 5
    assert got.result["object"]["payload"] == b"keyless"


def test_objects_of_other_contexts_are_other_objects(stage: Stage) -> None:
    """ID-1: usecase and the order of scopes are part of an object's identity."""
    ledger, key = stage.ledger, fresh()
    ledger.answer(ledger.operate("insert", key, b"x", scopes=[("a", "1"), ("b", "2")], statuses={201}))

    contexts: list[dict[str, Any]] = [
        {"scopes": [("b", "2"), ("a", "1")]},
        {"scopes": []},
        {"usecase": "other", "scopes": [("a", "1"), ("b", "2")]},
    ]
    for context in contexts:
        ledger.answer(ledger.operate("head", key, statuses={404}, **context))
    ledger.answer(ledger.operate("head", key, scopes=[("a", "1"), ("b", "2")], statuses={204}))


@pytest.mark.parametrize("key", ["ключ/with spaces", "../../etc/passwd", "a//b", "x" * 800, "objects", "%2e%2e"])
def test_any_printable_key_is_an_object_of_its_own(stage: Stage, key: str) -> None:
    """ID-2, ID-4: a key may look like a path; it stays inside its context."""
    ledger = stage.ledger
    ledger.answer(ledger.operate("insert", key, key.encode(), statuses={201}))

    got = ledger.answer(ledger.operate("get", key, statuses={200}))
    ledger.answer(ledger.operate("delete", key, statuses={204}))

    assert got.result["object"]["payload"] == key.encode()


@pytest.mark.parametrize("key", [None, b"", b"plain", bytes(range(256))], ids=["null", "empty", "text", "binary"])
def test_the_record_key_comes_back_unchanged(stage: Stage, key: bytes | None) -> None:
    """Contract 2: key = the input record's key, of a good record and of a bad one."""
    good = stage.ledger.operate("head", fresh(), key=key, partition=1)
    bad = stage.ledger.send(b"\xff\xff not avro", key=key, kind="unknown", statuses={400})

    assert stage.ledger.answer(good).key == key
    assert stage.ledger.answer(bad).key == key
    assert stage.ledger.wait_dead_letter(bad[0]).key == key


def test_headers_to_copy_keep_bytes_order_and_repeats_and_others_stay_behind(stage: Stage) -> None:
    """Contract 2.3: traceparent, tracestate and correlation-id are copied as they are, null values included."""
    copied = [
        ("correlation-id", b"\x00\xff"),
        ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("correlation-id", b"again"),
        ("tracestate", None),
    ]
    headers: list[tuple[str, bytes | None]] = [
        *copied[:2],
        ("secret", b"stays"),
        *copied[2:],
        ("tierstream-status", b"999"),
    ]

    answer = stage.ledger.answer(stage.ledger.operate("head", fresh(), headers=headers))

    assert [header for header in answer.headers if not header[0].startswith("tierstream-")] == copied


def test_every_response_says_what_it_answers_in_its_headers(stage: Stage) -> None:
    """Contract 2.3: response id, status, kind and the schema's fingerprint, as text; the CRC is the contract's."""
    entries = stage.ledger.operate("insert", fresh(), b"x")

    answer = stage.ledger.answer(entries)

    assert dict(answer.headers) == {
        "tierstream-response-id": entries[0].id.encode(),
        "tierstream-status": b"201",
        "tierstream-kind": b"insert",
        "tierstream-schema": b"5667bf23acafda0b",
    }
    assert wire.fingerprint("response")[::-1].hex() == "5667bf23acafda0b"


def test_a_key_too_long_for_the_response_is_dropped_and_said_to_be(stage: Stage) -> None:
    """Contract 2.3: key plus copied headers over 64 KiB: null key, nothing copied, `tierstream-key-dropped`."""
    entries = stage.ledger.operate("head", fresh(), key=bytes(70_000), headers=[("correlation-id", b"1")])

    answer = stage.ledger.answer(entries)

    assert answer.key is None
    assert answer.header("tierstream-key-dropped") == "true"
    assert answer.header("correlation-id") is None


def test_a_single_object_frame_is_read_like_a_bare_record(stage: Stage) -> None:
    """Contract 2.4: C3 01, the schema's fingerprint, the datum."""
    framed = b"\xc3\x01" + wire.fingerprint("operation") + wire.operation("head", fresh(), request_id="framed")

    stage.ledger.answer(stage.ledger.send(framed, request_id="framed", kind="head", statuses={404}))


# ---------------------------------------------------------------------------------------------------- both tiers


def upload(stage: Stage, size: int) -> tuple[Path, dict[str, Any]]:
    """Write a file where references may point; return it with a reference that gives size and checksum."""
    path = stage.folder / "uploads" / f"{uuid.uuid4()}.bin"
    path.write_bytes(noise(size))
    return path, {"uri": path.as_uri(), "size": size, "crc32c": google_crc32c.value(path.read_bytes())}


@pytest.mark.parametrize("size", [1, MIB, MIB + 1, 3_000_000])
def test_a_payload_by_reference_is_stored_whole_and_given_back_where_it_fits(stage: Stage, size: int) -> None:
    """SIZ-1, SIZ-6, TIER-14, K-9, K-11: both sides of the threshold; what fits no response is said to be too large."""
    ledger, key = stage.ledger, fresh()
    path, reference = upload(stage, size)

    inserted = ledger.answer(ledger.operate("insert", key, reference, statuses={201}))
    path.unlink()
    headed = ledger.answer(ledger.operate("head", key, statuses={204}))
    got = ledger.answer(ledger.operate("get", key, statuses={200} if size == 1 else {413}))
    ledger.answer(ledger.operate("delete", key, statuses={204}))
    ledger.answer(ledger.operate("get", key, statuses={404}))

    assert inserted.result["metadata"]["size"] == headed.result["metadata"]["size"] == size
    if size == 1:
        assert got.result["object"]["payload"] == noise(1)
    else:
        assert (got.code, got.result["retriable"], got.response["key"]) == ("response_too_large", False, key)


@pytest.mark.parametrize(
    ("status", "code", "change"),
    [
        (403, "reference_denied", {"uri": "file:///etc/hostname"}),
        (403, "reference_denied", {"uri": "gs://somewhere/else"}),
        (403, "reference_denied", {"uri": "UPLOADS/../outside"}),
        (404, "reference_unreadable", {"uri": "UPLOADS/not-there"}),
        (409, "reference_mismatch", {"size": 4}),
        (409, "reference_mismatch", {"crc32c": 1}),
        (413, "payload_too_large", {"uri": "UPLOADS/huge", "size": None, "crc32c": None}),
    ],
)
def test_a_reference_that_may_not_be_followed_is_refused(
    stage: Stage, status: int, code: str, change: dict[str, Any]
) -> None:
    """Contract 2.2: outside the allowed prefixes, missing, other than said, or over `limits.object_bytes`."""
    _, reference = upload(stage, 5)
    with (stage.folder / "uploads" / "huge").open("wb") as huge:
        huge.truncate(9_000_000)
    reference |= change
    reference["uri"] = reference["uri"].replace("UPLOADS", (stage.folder / "uploads").as_uri())
    key = fresh()

    refused = stage.ledger.answer(stage.ledger.operate("insert", key, reference, statuses={status}))
    stage.ledger.answer(stage.ledger.operate("head", key, statuses={404}))

    assert (refused.code, refused.result["retriable"], refused.response["key"]) == (code, False, key)
    assert str(stage.folder) not in refused.result["message"], "messages show no paths"


@pytest.mark.slow
def test_objects_of_both_tiers_travel_inline_where_the_limits_allow(apache: Broker, set_stage: SetStage) -> None:
    """SIZ-1, SIZ-3, TIER-14, K-11: with raised record limits the long-term tier is reached by inline payloads alone."""
    stage = set_stage(
        apache,
        limits={"response_bytes": "4MiB", "record_bytes": "4MiB"},
        output={"max_request_bytes": "5MiB"},
    )
    stage.start(partitions=2)
    ledger, key = stage.ledger, fresh()
    for size in (MIB, MIB + 1, 3_000_000, 10):
        ledger.answer(ledger.operate("insert", key, noise(size), statuses={201}))
        got = ledger.answer(ledger.operate("get", key, statuses={200}))
        assert got.result["object"]["payload"] == noise(size)
        if size >= MIB:
            assert (size in stage.payloads.sizes()) == (size > MIB)
    assert all(found > MIB for found in stage.payloads.sizes()), "at the threshold an object is small"


# ---------------------------------------------------------------------------------------------------- partitions


@pytest.mark.slow
def test_a_smaller_output_topic_takes_responses_by_partition_modulo(broker: Broker, set_stage: SetStage) -> None:
    """Contract 2.3: partition = input partition % partition count, unless the counts agree."""
    stage = set_stage(broker, partitions=5, output_partitions=3)
    stage.start(partitions=5)
    for partition in range(5):
        stage.ledger.operate("head", fresh(), partition=partition, statuses={404}, wait=False)
    stage.ledger.flush()

    stage.ledger.wait_answered()

    verdict = stage.ledger.verdict()  # holds each response against the rule
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, [])
    assert {copies[0].partition for copies in stage.ledger.answers.values()} == {0, 1, 2}


@pytest.mark.slow
def test_a_mixed_load_gets_exactly_one_matching_response_a_record_and_the_metrics_agree(
    broker: Broker, set_stage: SetStage
) -> None:
    """EXE-3, I1-I3, I9: every kind, poison between; counted beside the service, then held against /metrics."""
    stage = set_stage(broker, partitions=4)
    service = stage.start(partitions=4)
    ledger = stage.ledger
    for number in range(2000):
        partition = number % 4
        if number % 50 == 49:
            ledger.send(b"\x02", partition=partition, kind="unknown", statuses={400}, wait=False)
        else:
            kind = ("insert", "get", "head", "delete")[number // 4 % 4]
            key = f"mixed/{partition}/{number // 16}"  # the four kinds in turn on each object
            statuses = {"insert": {201}, "get": {200, 404}, "head": {204, 404}, "delete": {204}}[kind]
            ledger.operate(kind, key, noise(100), partition=partition, key=key.encode(), statuses=statuses, wait=False)
    ledger.flush()

    ledger.wait_answered(seconds=60)
    service.wait(lambda: all(part["lag"] == 0 for part in service.partitions().values()), "everything to be committed")
    metrics, state = service.metrics(), service.state()
    service.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert sum(map(len, ledger.dead_letters.values())) == 40
    assert ledger.committed(stage.group) == dict.fromkeys(range(4), 500)

    def total(name: str, label: str = "") -> float:
        return sum(
            value for sample, value in metrics.items() if re.match(rf"{name}(\{{|$)", sample) and label in sample
        )

    assert total("tierstream_responses_total") == verdict.responses == 2000
    assert total("tierstream_records_total", 'result="poison"') == 40
    assert total("tierstream_dead_letters_total", 'code="decode_error"') == 40
    assert total("tierstream_window_in_flight") == 0
    assert state["limiter"]["limit"] == 500
    assert state["limiter"]["in_use"] == sum(part["window"] for part in state["partitions"])
    assert {part["window"] for part in state["partitions"]} == {50, 45, 41, 37}
