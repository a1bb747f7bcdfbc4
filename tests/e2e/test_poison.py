"""Records that never become an operation: one failure each, kept byte for byte, neighbours untouched."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

import pytest

import wire
from brokers import Broker
from ledger import Entry
from raw_batches import UNREADABLE_NAME, batch, send_batch
from stages import SetStage, Stage

GOOD = ("insert", "poisoned/key", b"payload")


def good() -> bytes:
    """A valid operation to spoil."""
    return wire.operation(*GOOD, request_id="r")


def with_union_index(index: int) -> bytes:
    """The good operation, up to its body's union index, and then *index* (zigzag, one byte)."""
    value = good()
    body = value.index(b"poisoned/key") - 3  # before it: union index, branch of `key`, its length
    assert value[body] == 0
    return value[:body] + bytes([index * 2 if index >= 0 else -index * 2 - 1]) + value[body + 1 :]


POISON: dict[str, tuple[Callable[[], bytes | None], str]] = {
    "null value": (lambda: None, "null_value"),
    "empty value": (lambda: b"", "decode_error"),
    "one byte": (lambda: b"\x02", "decode_error"),
    "truncated in the payload": (lambda: good()[:-1], "decode_error"),
    "truncated in the context": (lambda: good()[:5], "decode_error"),
    "trailing byte": (lambda: good() + b"\x00", "decode_error"),
    "two operations in one value": (lambda: good() + good(), "decode_error"),
    "union index beyond the last branch": (lambda: with_union_index(4), "decode_error"),
    "negative union index": (lambda: with_union_index(-1), "decode_error"),
    "bad UTF-8": (lambda: good().replace(b"poisoned", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8"), "decode_error"),
    "huge string length": (lambda: b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01", "decode_error"),
    "huge array count": (lambda: b"\x06e2e" + b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01", "decode_error"),
    "random": (lambda: bytes(range(4, 255)), "decode_error"),
    "Confluent frame without a registry": (lambda: b"\x00\x00\x00\x00\x07" + good(), "unknown_schema"),
    "Confluent GUID frame without a registry": (lambda: b"\x01" + uuid.uuid4().bytes + good(), "unknown_schema"),
    "incomplete Confluent frame": (lambda: b"\x00\x00\x00", "decode_error"),
    "unknown fingerprint": (lambda: b"\xc3\x01" + b"fingrpnt" + good(), "unknown_schema"),
    "incomplete single-object frame": (lambda: b"\xc3\x01\x00", "decode_error"),
    "text": (lambda: b'{"kind": "insert"}', "decode_error"),
    "empty usecase": (lambda: wire.operation("get", "k", usecase=""), "unknown_schema"),
    "usecase with a slash": (lambda: wire.operation("get", "k", usecase="a/b"), "invalid_operation"),
    "usecase too long": (lambda: wire.operation("get", "k", usecase="u" * 129), "invalid_operation"),
    "scope with a dot": (lambda: wire.operation("get", "k", scopes=[("a.b", "1")]), "invalid_operation"),
    "33 scopes": (lambda: wire.operation("get", "k", scopes=[("a", "1")] * 33), "invalid_operation"),
    "empty key": (lambda: wire.operation("get", ""), "invalid_operation"),
    "control character in the key": (lambda: wire.operation("get", "a\x00b"), "invalid_operation"),
    "path too long": (lambda: wire.operation("get", "k" * 900), "invalid_operation"),
    "request id too long": (lambda: wire.operation("get", "k", request_id="r" * 1025), "invalid_operation"),
    "not a media type": (lambda: wire.operation("insert", "k", b"", content_type="nonsense"), "invalid_metadata"),
    "unknown compression": (lambda: wire.operation("insert", "k", b"", compression="gzip"), "invalid_metadata"),
    "unknown expiration policy": (
        lambda: wire.operation("insert", "k", b"", expiration={"policy": "never", "seconds": 1}),
        "invalid_metadata",
    ),
    "expiration of no seconds": (
        lambda: wire.operation("insert", "k", b"", expiration={"policy": "ttl", "seconds": 0}),
        "invalid_metadata",
    ),
    "65 custom pairs": (
        lambda: wire.operation("insert", "k", b"", custom={f"k{number}": "v" for number in range(65)}),
        "invalid_metadata",
    ),
}


@pytest.mark.parametrize("name", POISON)
def test_poison_is_answered_with_its_code_and_kept_byte_for_byte(stage: Stage, name: str) -> None:
    """EXE-8, K-10, K-12, contract 2.2 and 2.3: one failure response; the record on the dead letter topic, whole."""
    make, code = POISON[name]
    value, ledger = make(), stage.ledger
    headers = [
        ("correlation-id", b"c"),
        ("other", b"\x00\xff"),
        ("tierstream-dlq-code", b"forged"),
        ("correlation-id", None),
    ]

    (entry,) = ledger.send(value, key=b"the key", partition=1, headers=headers, kind=None, statuses={400})
    answer = ledger.answer([entry])
    letter = ledger.wait_dead_letter(entry)

    assert (answer.result_type, answer.code, answer.result["retriable"]) == ("Failure", code, False)
    assert answer.result["message"]
    if code in {"decode_error", "unknown_schema", "null_value"}:
        unknown = ("request_id", "context", "kind", "key")
        assert [answer.response[name] for name in unknown] == [None] * 4
    assert (letter.key, letter.value, letter.partition) == (b"the key", value, 1)
    own = [header for header in letter.headers if not header[0].startswith("tierstream-dlq-")]
    assert own == [headers[0], headers[1], headers[3]]
    assert (letter.header("tierstream-dlq-topic"), letter.header("tierstream-dlq-partition")) == (entry.topic, "1")
    assert letter.header("tierstream-dlq-offset") == str(entry.offset)
    assert letter.header("tierstream-dlq-group") == stage.group
    assert letter.header("tierstream-dlq-code") == code
    assert letter.header("tierstream-dlq-message") == answer.result["message"]
    # The record's own time, in milliseconds: the topic keeps the producer's, which is before the dead letter's.
    assert 1_600_000_000_000 < int(letter.header("tierstream-dlq-timestamp") or 0) <= letter.timestamp


def test_a_guid_in_a_header_needs_a_registry(stage: Stage) -> None:
    """Contract 2.4: header `__value_schema_id` wins over the bytes; without a registry its schema is unknown."""
    entries = stage.ledger.send(good(), headers=[("__value_schema_id", b"\x01" + uuid.uuid4().bytes)], statuses={400})

    assert stage.ledger.answer(entries).code == "unknown_schema"


def test_a_record_over_the_limit_is_not_decoded(stage: Stage) -> None:
    """Contract 2.2: over `limits.record_bytes` (800,000 here): nothing is echoed, the record is kept whole."""
    value = wire.operation("insert", "too/large", bytes(800_001), request_id="not echoed")

    (entry,) = stage.ledger.send(value, kind="unknown", statuses={413})
    answer = stage.ledger.answer([entry])
    letter = stage.ledger.wait_dead_letter(entry)

    assert answer.code == "payload_too_large"
    assert [answer.response[name] for name in ("request_id", "context", "key")] == [None] * 3
    assert letter.value == value
    assert letter.header("tierstream-dlq-code") == "payload_too_large"


def test_neighbours_of_poison_are_untouched(stage: Stage) -> None:
    """EXE-8, EXE-11: good records before, between and after poison are answered as if it were not there."""
    ledger, key = stage.ledger, f"neighbour/{uuid.uuid4()}"
    entries = []
    for name, (make, _) in POISON.items():
        entries += ledger.operate("insert", key, name.encode(), statuses={201})
        ledger.send(make(), wait=False)
        entries += ledger.operate("get", key, statuses={200})

    ledger.wait_answered()

    answers = [ledger.answer([entry]) for entry in entries]
    assert [answer.result["object"]["payload"].decode() for answer in answers[1::2]] == list(POISON)


@pytest.mark.slow
def test_poison_without_a_dead_letter_topic_is_answered_all_the_same(broker: Broker, set_stage: SetStage) -> None:
    """Contract 6: `dead_letter.topic: null` keeps nothing and loses no response."""
    stage = set_stage(broker, dead_letter={"topic": None})
    stage.start(partitions=2)
    (entry,) = stage.ledger.send(None, key=b"k", kind="unknown", statuses={400})

    answer = stage.ledger.answer([entry])
    stage.ledger.read_all()

    assert answer.code == "null_value"
    assert stage.ledger.dead_letters == {}


def test_a_header_whose_name_is_no_text_stops_nobody(stage: Stage) -> None:
    """Contract 2.3: its record is answered like any other, in a batch with others; poison too, and kept."""
    if stage.broker.kind != "apache":
        pytest.skip("noida-db does not keep a batch as it is sent")
    ledger = stage.ledger
    values = [wire.operation("head", f"unnamed/{uuid.uuid4()}", request_id="r") for _ in range(3)]
    values.insert(2, b"\x02 nothing that could be decoded")

    first = asyncio.run(send_batch(stage.broker, ledger.input, 1, batch(values, unreadable=(1, 2))))
    entries = []
    for place, value in enumerate(values):
        kind, statuses = ("unknown", {400}) if place == 2 else ("head", {404})
        entries.append(Entry(ledger.input, 1, first + place, b"k", value, [], None, kind, frozenset(statuses)))
        ledger.entries[entries[-1].id] = entries[-1]
    answers = [ledger.answer([entry]) for entry in entries]
    letter = ledger.wait_dead_letter(entries[2])

    assert [answer.header("correlation-id") for answer in answers] == [None, "1", "2", None]
    assert letter.value == values[2]
    assert letter.headers[0] == (UNREADABLE_NAME.decode(errors="backslashreplace"), b"of a header")
