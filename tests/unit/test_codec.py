"""Records become operations or one failure each, outcomes become responses; nothing raises."""

from __future__ import annotations

import gc
import io
import json
import sys
import uuid
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import fastavro
import pytest

import wire
from consumer import codec
from consumer.avro_schemas import OPERATION_FINGERPRINT, Schema, operation_schema, read_schema, schema_text
from consumer.codec import (
    OPERATION_PREFIX,
    RESPONSE_PREFIX,
    Decoded,
    Framing,
    Headers,
    OperationDecoder,
    ResponseEncoder,
    decode_response,
    encode_operation,
    failure_message,
    got_bytes_max,
    operation_fields,
)
from consumer.errors import (
    STATUS_BY_CODE,
    BackendUnavailable,
    DecodeError,
    InvalidOperation,
    OperationDropped,
    TierstreamError,
    TooLarge,
)
from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.operations import (
    DEFAULT_METADATA,
    Delete,
    Deleted,
    Get,
    Got,
    Head,
    Headed,
    Insert,
    Inserted,
    Metadata,
    Operation,
    OpResponse,
    PayloadReference,
    StoredObject,
    TimeToIdle,
    TimeToLive,
)

CONTEXT = ObjectContext("attachments", [Scope("org", "17"), Scope("project", "mobile")])
SCOPES = (("org", "17"), ("project", "mobile"))
NOW = datetime(2025, 11, 24, 16, 0, 0, 123456, tzinfo=UTC)
NOW_US = 1_764_000_000_123_456
GUID = uuid.UUID("12345678-9abc-def0-1234-56789abcdef0")


def operation(kind: str = "get", key: str | None = "a/b", payload: Any = b"", **more: Any) -> bytes:
    """Bytes of an operation in CONTEXT, by Apache's Avro."""
    return wire.operation(kind, key, payload, **{"usecase": "attachments", "scopes": SCOPES, **more})


def decode(value: bytes | None, headers: Headers = (), **options: Any) -> Decoded:
    """Decode with a decoder that has seen nothing before."""
    return OperationDecoder(**options).decode(value, headers)


def refused(decoded: Decoded) -> TierstreamError:
    """The error of a record that gave no operation."""
    assert decoded.operation is None
    assert decoded.error is not None
    return decoded.error


def code(decoded: Decoded) -> str:
    """The code of a record that gave no operation."""
    return refused(decoded).code


class TestOperations:
    """What a good record becomes."""

    @pytest.mark.parametrize(("kind", "made"), [("get", Get), ("delete", Delete), ("head", Head)])
    def test_each_kind_by_key_becomes_its_operation(self, kind: str, made: type[Get | Delete | Head]) -> None:
        """OP-1, OP-2: kinds are told apart by their branch, though they have one shape."""
        decoded = decode(operation(kind, "a/b", request_id="r"))

        assert decoded.operation == made(CONTEXT, "a/b")
        assert type(decoded.operation) is made
        assert (decoded.kind, decoded.key, decoded.context, decoded.request_id) == (kind, "a/b", CONTEXT, "r")
        assert (decoded.error, decoded.poison, decoded.schema_id) == (None, False, None)

    def test_an_insert_of_nothing_but_defaults_shares_the_default_metadata(self) -> None:
        """OP-1, MD-5: what most inserts have is not built again for each."""
        decoded = decode(operation("insert", "a/b", b"payload"))

        assert decoded.operation == Insert(CONTEXT, "a/b", DEFAULT_METADATA, b"payload")
        assert isinstance(decoded.operation, Insert)
        assert decoded.operation.metadata is DEFAULT_METADATA

    def test_every_field_of_an_insert_arrives(self) -> None:
        """OP-1: and read-only fields are ignored, however absurd (MD-5, contract 2.1)."""
        decoded = decode(
            operation(
                "insert",
                "ключ",
                bytes(range(256)) * 5,
                content_type="text/plain; charset=utf-8",
                expiration={"policy": "tti", "seconds": 315_360_000},
                compression="zstd",
                filename="ä b.txt",
                origin="203.0.113.7",
                custom={"colour": "blue", "größe": ""},
                time_created=2**63 - 1,
                time_expires=-(2**63),
                size=-7,
            )
        )

        metadata = Metadata(
            "text/plain; charset=utf-8",
            TimeToIdle(315_360_000),
            "zstd",
            "ä b.txt",
            "203.0.113.7",
            {"colour": "blue", "größe": ""},
        )
        assert decoded.operation == Insert(CONTEXT, "ключ", metadata, bytes(range(256)) * 5)

    def test_an_insert_may_have_no_key(self) -> None:
        """OP-3, OP-12: the key is generated when the operation runs, not here."""
        decoded = decode(operation("insert", None, b"x"))

        assert isinstance(decoded.operation, Insert)
        assert (decoded.operation.key, decoded.key, decoded.kind) == (None, None, "insert")

    @pytest.mark.parametrize(("size", "crc32c"), [(None, None), (0, 0), (2**62, 0xFFFF_FFFF), (5, None)])
    def test_a_payload_may_lie_elsewhere(self, size: int | None, crc32c: int | None) -> None:
        """Contract 2.1: a claim check."""
        reference = PayloadReference("gs://uploads/x", size, crc32c)

        decoded = decode(operation("insert", "k", {"uri": "gs://uploads/x", "size": size, "crc32c": crc32c}))

        assert isinstance(decoded.operation, Insert)
        assert decoded.operation.payload == reference

    def test_an_empty_request_id_is_not_a_missing_one(self) -> None:
        assert decode(operation(request_id="")).request_id == ""
        assert decode(operation()).request_id is None

    def test_blocks_that_say_their_size_are_read(self) -> None:
        """Avro allows them, and other languages write them."""
        pair = b"\x02a\x021"
        value = b"\x02u" + b"\x01" + bytes([2 * len(pair)]) + pair + b"\x02" + pair + b"\x00" + b"\x00\x02\x02k"

        assert decode(value).operation == Get(ObjectContext("u", [Scope("a", "1")] * 2), "k")

    def test_of_a_custom_name_given_twice_the_last_counts(self) -> None:
        """As every Avro reader has it."""
        plain = operation("insert", "k", b"", custom={"a": "1"})
        twice = plain.replace(b"\x02\x02a\x021", b"\x04\x02a\x021\x02a\x022")

        decoded = decode(twice)

        assert isinstance(decoded.operation, Insert)
        assert decoded.operation.metadata.custom == {"a": "2"}


class TestWhatIsRemembered:
    """Contexts and metadata last read are remembered with their bytes; nobody can tell."""

    def test_records_in_any_order_are_read_as_by_a_fresh_decoder(self) -> None:
        contexts: list[dict[str, Any]] = [
            {"usecase": "a", "scopes": ()},
            {"usecase": "aa", "scopes": ()},
            {"usecase": "a", "scopes": (("x", "1"),)},
            {"usecase": "a", "scopes": (("x", "1"), ("y", "2"))},
            {"usecase": "bad usecase", "scopes": ()},
        ]
        metadata: list[dict[str, Any]] = [
            {},
            {"custom": {"a": "1"}},
            {"custom": {"a": "1", "b": "2"}},
            {"content_type": "text/plain"},
            {"size": 1},
            {"compression": "gzip"},
        ]
        values = [wire.operation("insert", "k", b"p", **where, **what) for where in contexts for what in metadata]
        values += [wire.operation("head", "k", **where) for where in contexts]
        decoder = OperationDecoder()

        for first in values:
            for second in values:
                decoder.decode(first)
                read, fresh = decoder.decode(second), decode(second)
                assert (read.operation, read.context, read.key) == (fresh.operation, fresh.context, fresh.key)
                assert read.context_bytes == fresh.context_bytes
                assert (read.error and read.error.code) == (fresh.error and fresh.error.code)

    def test_a_context_is_built_once_though_others_come_between(self) -> None:
        decoder = OperationDecoder()
        first = decoder.decode(operation()).context

        decoder.decode(operation(usecase="other"))

        assert decoder.decode(operation()).context is first

    def test_a_flood_of_contexts_is_forgotten_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Memory is bounded however many contexts a producer makes up."""
        monkeypatch.setattr(codec, "CONTEXTS_MAX", 8)
        decoder = OperationDecoder()

        for number in range(100):
            assert decoder.decode(operation(usecase=f"u{number}")).operation
            assert len(decoder._reader._contexts) <= 8

    def test_contexts_too_long_to_be_worth_it_or_wrong_are_not_remembered(self) -> None:
        decoder = OperationDecoder()

        decoder.decode(operation("insert", scopes=[("n" * 256, "v" * 256)] * 2))
        decoder.decode(operation(usecase="wrong usecase"))

        assert decoder._reader._contexts == {}

    def test_what_is_remembered_does_not_reach_round_the_element_limit(self) -> None:
        """Contract 6, `limits.avro_elements`: the same record has the same answer the first and the second time."""
        values = [
            operation("insert", scopes=[("a", "1")] * scopes, custom={f"k{number}": "v" for number in range(pairs)})
            for scopes in range(6)
            for pairs in range(6)
        ]
        decoder = OperationDecoder(elements_max=5)

        for first in values:
            for second in values:
                decoder.decode(first)
                assert repr(decoder.decode(second)) == repr(decode(second, elements_max=5))


NOT_A_DATUM: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\x02",
    "text": b'{"kind": "insert"}',
    "a trailing byte": operation() + b"\x00",
    "two operations": operation() + operation(),
    "a body beyond the last kind": operation().replace(b"\x00\x02\x06a/b", b"\x00\x08\x06a/b"),
    "a body before the first": operation().replace(b"\x00\x02\x06a/b", b"\x00\x01\x06a/b"),
    "a request id neither null nor string": operation().replace(b"\x00\x02\x06a/b", b"\x04\x02\x06a/b"),
    "a request id before null": operation().replace(b"\x00\x02\x06a/b", b"\x01\x02\x06a/b"),
    "a payload neither bytes nor reference": operation("insert", "k", b"x")[:-3] + b"\x04\x02x",
    "a key that is not UTF-8": operation().replace(b"a/b", b"\xff\xfe\xfd"),
    "an overlong slash": operation(key="xx").replace(b"xx", b"\xc0\xaf"),
    "a surrogate": operation(key="xxx").replace(b"xxx", b"\xed\xa0\x80"),
    "a usecase that is not UTF-8": operation(usecase="xx").replace(b"xx", b"\xff\xff"),
    "a custom name that is not UTF-8": operation("insert", custom={"xx": "1"}).replace(b"xx", b"\xff\xff"),
    "a payload of negative length": operation("insert", "k", b"x")[:-2] + b"\x01x",
    "a huge string": b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    "a huge array": b"\x06e2e" + b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    "a length of eleven bytes": b"\x86" + b"\x80" * 10 + b"\x00abc",
    "a length of 65 bits": b"\x86" + b"\x80" * 8 + b"\x02abc",
    "half a registry frame": b"\x00\x00\x00",
    "half a frame with a GUID": b"\x01" + bytes(15),
    "half a single-object frame": b"\xc3\x01\x00",
    "less than that": b"\xc3",
    "a byte of neither": b"\xc3\x02" + bytes(20),
}


class TestRecordsThatAreNoOperation:
    """Poison: one code each, nothing echoed that was not read."""

    @pytest.mark.parametrize("name", NOT_A_DATUM)
    def test_bytes_that_are_not_one_datum_are_a_decode_error(self, name: str) -> None:
        """Contract 2.2, `decode_error`; BAT-3, K-12."""
        decoded = decode(NOT_A_DATUM[name])

        assert code(decoded) == "decode_error"
        assert decoded.poison
        assert (decoded.request_id, decoded.context, decoded.kind, decoded.key) == (None, None, None, None)
        assert 0 < len(str(decoded.error)) < 80

    @pytest.mark.parametrize(
        "value", [operation("insert", "k", b"payload", request_id="r"), operation("get", "k" * 300)]
    )
    def test_a_record_cut_anywhere_is_a_decode_error(self, value: bytes) -> None:
        """Contract 2.2: truncated. By a fresh decoder, and by one that remembers the whole record's parts."""
        knowing = OperationDecoder()
        knowing.decode(value)

        for end in range(len(value)):
            for decoder in (knowing, OperationDecoder()):
                assert code(decoder.decode(value[:end])) == "decode_error"

    def test_no_value_is_said_to_be_none(self) -> None:
        """Contract 2.2, `null_value`; K-12."""
        decoded = decode(None)

        assert (code(decoded), decoded.poison, decoded.kind) == ("null_value", True, None)

    def test_a_record_over_the_limit_is_not_read(self) -> None:
        """Contract 2.2, `payload_too_large`: then kind, key, context and request id are null; poison."""
        value = operation("insert", "k", b"x", request_id="r")

        decoded = decode(value, record_bytes_max=len(value) - 1)

        assert (code(decoded), decoded.poison) == ("payload_too_large", True)
        assert (decoded.request_id, decoded.context, decoded.kind, decoded.key) == (None, None, None, None)
        assert decode(value, record_bytes_max=len(value)).operation

    def test_more_items_than_allowed_are_refused_before_they_are_read(self) -> None:
        """Contract 6, `limits.avro_elements`: scopes and custom pairs are counted together."""
        value = operation("insert", custom={f"k{number}": "v" for number in range(10)})

        assert decode(value, elements_max=12).operation
        assert code(decode(value, elements_max=11)) == "decode_error"
        assert code(decode(operation(scopes=[("a", "1")] * 5), elements_max=4)) == "decode_error"

    @pytest.mark.parametrize("error", [MemoryError(), RecursionError(), ZeroDivisionError("secret")])
    def test_whatever_happens_inside_is_an_answer(self, error: Exception) -> None:
        """Contract 2.2: never an exception that escapes; the text says what, not what it said."""

        class FailingResolver:
            def lookup(self, _schema_id: str) -> Schema | None:
                raise error

        decoded = OperationDecoder(resolver=FailingResolver()).decode(b"\x00\x00\x00\x00\x07" + operation())

        assert (code(decoded), decoded.poison) == ("decode_error", True)
        assert type(error).__name__ in str(decoded.error)
        assert "secret" not in str(decoded.error)


INVALID: dict[str, tuple[bytes, str, set[str]]] = {
    # name: (record, code, what is not echoed)
    "a usecase with a slash": (operation(usecase="a/b"), "invalid_operation", {"context"}),
    "a usecase too long": (operation(usecase="u" * 129), "invalid_operation", {"context"}),
    "a usecase beyond ASCII": (operation(usecase="ü"), "invalid_operation", {"context"}),
    "33 scopes": (operation(scopes=[("a", "1")] * 33), "invalid_operation", {"context"}),
    "a thousand scopes": (operation(scopes=[("a", "1")] * 1000), "invalid_operation", {"context"}),
    "a scope with a dot": (operation(scopes=[("a.b", "1")]), "invalid_operation", {"context"}),
    "an empty scope": (operation(scopes=[("a", "")]), "invalid_operation", {"context"}),
    "an empty key": (operation(key=""), "invalid_operation", {"key"}),
    "an empty key of an insert": (operation("insert", ""), "invalid_operation", {"key"}),
    "a control character": (operation(key="a\x00b"), "invalid_operation", {"key"}),
    "a control character of Latin-1": (operation(key="a\x85b"), "invalid_operation", {"key"}),
    "a path too long": (operation(key="k" * 900), "invalid_operation", {"key"}),
    "a path too long in bytes": (operation(key="я" * 440), "invalid_operation", {"key"}),
    "a request id too long": (operation(request_id="r" * 1025), "invalid_operation", {"request_id"}),
    "a request id too long in bytes": (operation(request_id="я" * 513), "invalid_operation", {"request_id"}),
    "everything too long": (
        operation(key="", usecase="", request_id="r" * 1025, scopes=[("a", "1")]),
        "invalid_operation",
        {"context", "key", "request_id"},
    ),
    "no room for a generated key": (
        operation("insert", None, b"", scopes=[("a" * 220, "b" * 220)] * 2),
        "invalid_operation",
        {"key"},
    ),
    "a checksum below 0": (operation("insert", payload={"uri": "gs://a/b", "crc32c": -1}), "invalid_operation", set()),
    "a checksum above 32 bits": (
        operation("insert", payload={"uri": "gs://a/b", "crc32c": 2**32}),
        "invalid_operation",
        set(),
    ),
    "a reference of negative size": (
        operation("insert", payload={"uri": "gs://a/b", "size": -1}),
        "invalid_operation",
        set(),
    ),
    "no media type": (operation("insert", content_type="nonsense"), "invalid_metadata", set()),
    "an unknown compression": (operation("insert", compression="gzip"), "invalid_metadata", set()),
    "an unknown policy": (
        operation("insert", expiration={"policy": "never", "seconds": 1}),
        "invalid_metadata",
        set(),
    ),
    "an expiration of no seconds": (
        operation("insert", expiration={"policy": "ttl", "seconds": 0}),
        "invalid_metadata",
        set(),
    ),
    "an expiration above ten years": (
        operation("insert", expiration={"policy": "tti", "seconds": 315_360_001}),
        "invalid_metadata",
        set(),
    ),
    "65 custom pairs": (
        operation("insert", custom={f"k{number}": "v" for number in range(65)}),
        "invalid_metadata",
        set(),
    ),
    "custom pairs above 7 KiB": (operation("insert", custom={"k": "v" * 7168}), "invalid_metadata", set()),
    "a bad key and bad metadata": (operation("insert", "", compression="gzip"), "invalid_operation", {"key"}),
}


@pytest.mark.parametrize(
    "value",
    [
        b"\x00\x00\x00\x00\x00" + bytes(1000),
        b"\x01" + bytes(15),
        b"\xc3\x01" + bytes(1000),
        operation()[:-3],
        operation() + b"x",
        operation().replace(b"a/b", b"\xff\xff\xff"),
        operation("get", "a" * 5000),
        b"",
    ],
    ids=["unknown id", "half a frame", "unknown fingerprint", "short", "long", "no UTF-8", "key too long", "empty"],
)
def test_what_is_refused_is_freed_with_its_answer(value: bytes) -> None:
    """The failure is kept until the answer is acknowledged; were it to hold itself, the record would stay with it.

    Records of some megabytes, of which a process may hold a few by its byte budget, would stay by the hundred.
    """
    decoder = OperationDecoder()
    decoder.decode(value)
    gc.collect()
    held_before, failures_before = sys.getrefcount(value), failures_alive()
    gc.disable()
    try:
        decoded = decoder.decode(value)
        assert decoded.error is not None
        failure = weakref.ref(decoded.error)
        del decoded
        assert failure() is None
        assert failures_alive() == failures_before
        assert sys.getrefcount(value) == held_before
    finally:
        gc.enable()


def failures_alive() -> int:
    """How many exceptions of the package there are; not what other tests' threads leave to the collector meanwhile."""
    return sum(isinstance(thing, TierstreamError) for thing in gc.get_objects())


class TestOperationsThatBreakARule:
    """Read, but against contract 2.1: poison that is echoed as far as it may be."""

    @pytest.mark.parametrize("name", INVALID)
    def test_a_broken_rule_has_its_code_and_only_what_breaks_its_limit_is_left_out(self, name: str) -> None:
        """Contract 2.1: in an error response any of request_id, context, key that breaks its own limit is null."""
        value, expected, left_out = INVALID[name]
        framed = OPERATION_PREFIX + value  # so that an empty usecase is not taken for a registry frame

        decoded = decode(framed)

        assert (code(decoded), decoded.poison) == (expected, True)
        assert decoded.kind in {"get", "insert"}
        assert (decoded.context is None) == (decoded.context_bytes is None) == ("context" in left_out)
        if "key" in left_out:
            assert decoded.key is None
        else:
            assert decoded.key == "a/b"
        if "request_id" in left_out:
            assert decoded.request_id is None

    def test_what_keeps_its_limit_is_echoed_beside_what_does_not(self) -> None:
        decoded = decode(operation("insert", "good", b"", usecase="not good", request_id="r" * 1024))

        assert (decoded.request_id, decoded.key, decoded.context) == ("r" * 1024, "good", None)

    @pytest.mark.parametrize("key", ["k", "ключ 🗝", "a//b", "../..", "\u200d\u200e", "%2e", " ", "objects"])
    def test_any_key_without_control_characters_is_good(self, key: str) -> None:
        """Contract 2.1, 10: joiners and direction marks are allowed."""
        assert decode(operation(key=key)).operation == Get(CONTEXT, key)

    def test_limits_are_reached_before_they_are_broken(self) -> None:
        """Contract 2.1: 900 bytes of path, 1,024 of request id, 32 scopes, 64 pairs."""
        room = 900 - len(CONTEXT.storage_prefix)

        assert decode(operation(key="k" * room)).operation
        assert decode(operation(key="я" * (room // 2))).operation
        assert decode(operation(request_id="я" * 512)).operation
        assert decode(operation(scopes=[("a", "1")] * 32)).operation
        assert decode(operation("insert", custom={f"k{number}": "v" for number in range(64)})).operation
        assert code(decode(operation(key="k" * (room + 1)))) == "invalid_operation"


class TestFraming:
    """Contract 2.4."""

    def test_a_bare_datum_of_every_usecase_begins_with_none_of_the_frames(self) -> None:
        """Contract 2.4: a valid bare datum never begins with 00, 01 or C3."""
        for length in range(1, 129):
            assert operation(usecase="u" * length)[0] not in {0x00, 0x01, 0xC3}

    @pytest.mark.parametrize("framing", ["auto", "single-object"])
    def test_a_single_object_frame_of_v1_is_taken_off(self, framing: Framing) -> None:
        decoded = decode(b"\xc3\x01" + wire.fingerprint("operation") + operation(), framing=framing)

        assert decoded.operation == Get(CONTEXT, "a/b")
        assert decoded.schema_id == OPERATION_FINGERPRINT

    @pytest.mark.parametrize(
        ("value", "headers", "schema_id"),
        [
            (b"\x00\x00\x00\x00\x07" + operation(), (), "7"),
            (b"\x00\xff\xff\xff\xff" + operation(), (), "4294967295"),
            (b"\x01" + GUID.bytes + operation(), (), str(GUID)),
            (operation(), [("__value_schema_id", b"\x01" + GUID.bytes)], str(GUID)),
            (b"\xc3\x01" + bytes(range(8)) + operation(), (), "0706050403020100"),
            (operation(usecase="", scopes=[("a", "1")]), (), None),
        ],
    )
    def test_a_schema_nobody_knows_is_named(self, value: bytes, headers: Headers, schema_id: str | None) -> None:
        """Contract 2.2, `unknown_schema`; 2.3: GUIDs hyphenated and lower case. An empty usecase reads as a frame."""
        decoded = decode(value, headers)

        assert (code(decoded), decoded.poison) == ("unknown_schema", True)
        assert schema_id is None or decoded.schema_id == schema_id == OperationDecoder().schema_id(value, headers)
        assert (decoded.kind, decoded.context) == (None, None)

    def test_bare_means_that_nothing_is_taken_for_a_frame(self) -> None:
        value = operation(usecase="")

        decoded = decode(value, [("__value_schema_id", b"\x01" + GUID.bytes)], framing="bare")

        assert (code(decoded), decoded.kind, decoded.key) == ("invalid_operation", "get", "a/b")
        assert OperationDecoder(framing="bare").schema_id(value) is None

    @pytest.mark.parametrize(
        ("framing", "value"),
        [
            ("single-object", operation()),
            ("single-object", b"\x00\x00\x00\x00\x07" + operation()),
            ("single-object", b""),
            ("single-object", b"\xc3\x02" + operation()),
            ("confluent", operation()),
            ("confluent", OPERATION_PREFIX + operation()),
            ("confluent", b""),
        ],
    )
    def test_another_framing_than_the_one_configured_is_a_decode_error(self, framing: Framing, value: bytes) -> None:
        assert code(decode(value, framing=framing)) == "decode_error"
        assert OperationDecoder(framing=framing).schema_id(value) is None

    @pytest.mark.parametrize("header", [None, b"", b"\x00" + GUID.bytes, b"\x01", b"\x01" + GUID.bytes + b"\x00"])
    def test_a_header_that_names_no_schema_is_half_a_frame(self, header: bytes | None) -> None:
        assert code(decode(operation(), [("__value_schema_id", header)])) == "decode_error"

    def test_other_headers_are_not_looked_at(self) -> None:
        headers: Headers = [("traceparent", b"\x01" + GUID.bytes), ("__key_schema_id", b"\x01" + GUID.bytes)]

        assert decode(operation(), headers).operation

    def test_a_record_that_is_not_read_has_no_schema(self) -> None:
        """Whoever would ask a registry for it need not."""
        decoder = OperationDecoder(record_bytes_max=100)
        framed = b"\x00\x00\x00\x00\x07"

        assert decoder.schema_id(framed + bytes(95)) == "7"
        assert decoder.schema_id(framed + bytes(96)) is None

    def test_no_value_has_no_schema(self) -> None:
        assert OperationDecoder().schema_id(None) is None
        assert OperationDecoder().schema_id(operation()) is None


@dataclass
class Registry:
    """Knows some schemas."""

    schemas: dict[str, Schema]
    asked: list[str] = field(default_factory=list)

    def lookup(self, schema_id: str) -> Schema | None:
        self.asked.append(schema_id)
        return self.schemas.get(schema_id)


class RefusingRegistry(Registry):
    """Knows a schema that the gate has refused."""

    def lookup(self, schema_id: str) -> Schema | None:
        raise DecodeError("a type contains itself", code="unsafe_schema")


def later_version() -> dict[str, Any]:
    """A schema with more fields, and a kind of operation that v1 has not."""
    schema: dict[str, Any] = json.loads(schema_text("operation"))
    bodies = schema["fields"][2]["type"]
    bodies.append({"type": "record", "name": "Copy", "fields": [{"name": "key", "type": "string"}]})
    for record in (schema, bodies[0], bodies[1], bodies[0]["fields"][1]["type"]):
        later = ["null", {"type": "array", "items": "long"}]
        record["fields"].append({"name": "later", "type": later, "default": None})
    return schema


def of(name: str, kind: Any) -> dict[str, Any]:
    """A field."""
    return {"name": name, "type": kind}


def written_with(schema: Schema, datum: dict[str, Any], schema_id: bytes = b"\x00\x00\x00\x00\x07") -> bytes:
    """Bytes of *datum* in a registry frame."""
    out = io.BytesIO()
    fastavro.schemaless_writer(out, schema.parsed, datum)
    return schema_id + out.getvalue()


class TestForeignSchemas:
    """Records of other versions, whose writer's schema a registry knows."""

    LATER = read_schema(json.dumps(later_version()))

    def datum(self, kind: str, **body: Any) -> dict[str, Any]:
        """An operation for fastavro."""
        scopes = [{"name": name, "value": value} for name, value in SCOPES]
        context = {"usecase": "attachments", "scopes": scopes}
        return {"context": context, "request_id": "r", "body": (f"tierstream.v1.{kind}", body), "later": [1, 2]}

    def decoder(self, **options: Any) -> OperationDecoder:
        """A decoder that knows the later version as 7, and v1 as 8."""
        return OperationDecoder(resolver=Registry({"7": self.LATER, "8": operation_schema()}), **options)

    @pytest.mark.parametrize(("kind", "made"), [("Get", Get), ("Delete", Delete), ("Head", Head)])
    def test_kinds_of_one_shape_are_told_apart(self, kind: str, made: type[Get | Delete | Head]) -> None:
        """OP-1: added fields are skipped."""
        decoded = self.decoder().decode(written_with(self.LATER, self.datum(kind, key="a/b")))

        assert decoded.operation == made(CONTEXT, "a/b")
        assert type(decoded.operation) is made
        assert (decoded.request_id, decoded.schema_id, decoded.kind) == ("r", "7", kind.lower())

    def test_an_insert_arrives_whole(self) -> None:
        metadata = {"expiration": {"policy": "ttl", "seconds": 60}, "custom": {"a": "b"}, "size": -1, "later": [3]}

        decoded = self.decoder().decode(
            written_with(self.LATER, self.datum("Insert", key="k", metadata=metadata, payload=b"x" * 1000))
        )

        assert decoded.operation == Insert(
            CONTEXT, "k", Metadata(expiration=TimeToLive(60), custom={"a": "b"}), b"x" * 1000
        )

    def test_an_insert_by_reference_arrives(self) -> None:
        reference = {"uri": "gs://uploads/x", "size": 5, "crc32c": 7}

        decoded = self.decoder().decode(
            written_with(self.LATER, self.datum("Insert", key=None, metadata={}, payload=reference))
        )

        assert decoded.operation == Insert(CONTEXT, None, DEFAULT_METADATA, PayloadReference("gs://uploads/x", 5, 7))

    def test_fields_the_writer_does_not_have_take_their_defaults(self) -> None:
        schema = json.loads(schema_text("operation"))
        del schema["fields"][1]  # request_id
        insert = schema["fields"][1]["type"][0]
        insert["fields"] = insert["fields"][2:]  # key and metadata
        earlier = read_schema(json.dumps(schema))
        datum = self.datum("Insert", payload={"uri": "gs://a/b", "size": None, "crc32c": None})
        value = written_with(earlier, datum)

        decoded = OperationDecoder(resolver=Registry({"7": earlier})).decode(value)

        assert decoded.operation == Insert(CONTEXT, None, DEFAULT_METADATA, PayloadReference("gs://a/b"))
        assert decoded.request_id is None

    def test_a_kind_that_v1_does_not_know_is_a_decode_error(self) -> None:
        """It is not taken for one of the same shape."""
        decoded = self.decoder().decode(written_with(self.LATER, self.datum("Copy", key="k")))

        assert (code(decoded), decoded.poison, decoded.schema_id) == ("decode_error", True, "7")

    def test_rules_hold_for_them_too(self) -> None:
        decoded = self.decoder().decode(written_with(self.LATER, self.datum("Get", key="")))

        assert (code(decoded), decoded.kind, decoded.request_id, decoded.schema_id) == (
            "invalid_operation",
            "get",
            "r",
            "7",
        )

    def test_bytes_are_scanned_before_they_are_read(self) -> None:
        """Faults 4.3: what the compiled reader would take, or choke on."""
        whole = written_with(self.LATER, self.datum("Get", key="a/b"))
        decoder = self.decoder()

        assert code(decoder.decode(whole + b"\x00")) == "decode_error"
        for end in range(5, len(whole)):
            assert code(decoder.decode(whole[:end])) == "decode_error"
        assert code(self.decoder(elements_max=3).decode(whole)) == "decode_error"
        assert self.decoder(elements_max=4).decode(whole).operation

    @pytest.mark.parametrize(
        "value",
        [b"\x00\x00\x00\x00\x08" + operation(), operation()],
    )
    def test_v1_by_another_name_is_v1(self, value: bytes) -> None:
        assert self.decoder().decode(value).operation == Get(CONTEXT, "a/b")

    def test_a_header_wins_over_the_bytes(self) -> None:
        """Contract 2.4: an unframed value; of several headers the last, as Kafka's clients have it."""
        guid = uuid.uuid4()
        registry = Registry({str(guid): operation_schema()})
        headers: Headers = [("__value_schema_id", b"\x01" + GUID.bytes), ("__value_schema_id", b"\x01" + guid.bytes)]

        decoded = OperationDecoder(resolver=registry).decode(operation(), headers)

        assert decoded.operation == Get(CONTEXT, "a/b")
        assert (decoded.schema_id, registry.asked) == (str(guid), [str(guid)])

    def test_an_unknown_id_is_an_unknown_schema(self) -> None:
        decoded = self.decoder().decode(b"\x00\x00\x00\x00\x09" + operation())

        assert (code(decoded), decoded.schema_id) == ("unknown_schema", "9")

    def test_a_schema_the_gate_refused_is_unsafe(self) -> None:
        """Contract 2.2, `unsafe_schema`."""
        decoded = OperationDecoder(resolver=RefusingRegistry({})).decode(b"\x00\x00\x00\x00\x09" + operation())

        assert (code(decoded), decoded.poison, decoded.schema_id) == ("unsafe_schema", True, "9")

    def test_a_schema_of_something_else_gives_no_operation(self) -> None:
        other = read_schema('{"type": "array", "items": "long"}')

        decoded = OperationDecoder(resolver=Registry({"7": other})).decode(written_with(other, [1, 2]))  # type: ignore[arg-type]

        assert code(decoded) == "decode_error"

    def test_a_scanner_is_made_once_and_lives_as_long_as_its_schema(self) -> None:
        """Whatever ids a hostile producer thinks of: what the resolver forgets is forgotten here."""
        registry = Registry({})
        decoder = OperationDecoder(resolver=registry)
        value = written_with(self.LATER, self.datum("Get", key="k"))

        for _ in range(3):
            registry.schemas["7"] = read_schema(json.dumps(later_version()))
            for _ in range(2):
                assert decoder.decode(value).operation
            gc.collect()
            assert len(decoder._scanners) == 1

    def test_another_schema_under_a_known_id_is_scanned_as_what_it_is(self) -> None:
        """Faults 4.3: the scanner and the reader behind it always go by the same schema."""
        registry = Registry({"7": self.LATER})
        decoder = OperationDecoder(resolver=registry)
        value = written_with(self.LATER, self.datum("Get", key="k"))
        assert decoder.decode(value).operation

        registry.schemas["7"] = read_schema('{"type": "array", "items": "long"}')

        assert code(decoder.decode(value)) == "decode_error"
        assert decoder.decode(b"\x00\x00\x00\x00\x07\x02\x02\x00").error is not None

    @pytest.mark.parametrize("kind", ["Get", "Delete", "Head"])
    def test_a_writer_of_one_kind_alone_needs_no_union(self, kind: str) -> None:
        """Contract 2.4, Avro's resolution: a record is read into the union that has it, by its name."""
        schema = json.loads(schema_text("operation"))
        schema["namespace"] = "of.somebody.else"
        bodies = schema["fields"][2]
        (bodies["type"],) = [body for body in bodies["type"] if body["name"] == kind]
        alone = read_schema(json.dumps(schema))
        value = written_with(alone, {**self.datum(kind), "body": {"key": "k"}})

        decoded = OperationDecoder(resolver=Registry({"7": alone})).decode(value)

        assert (decoded.kind, decoded.key) == (kind.lower(), "k")
        assert decoded.operation is not None

    def test_fields_may_change_places_and_be_of_narrower_types(self) -> None:
        """Contract 2.4, Avro's resolution: matched by name; int is read as long, bytes as string and back."""
        record = {"type": "record", "namespace": "tierstream.v1"}
        expiration = {**record, "name": "Expiration", "fields": [of("seconds", "int"), of("policy", "bytes")]}
        metadata = [
            of("time_created", {"type": "int", "logicalType": "date"}),
            of("custom", {"type": "map", "values": "bytes"}),
            of("expiration", expiration),
            of("size", ["int", "null"]),
        ]
        insert = [
            of("payload", "string"),
            of("metadata", {**record, "name": "Metadata", "fields": metadata}),
            of("key", "bytes"),
        ]
        scope = {**record, "name": "Scope", "fields": [of("value", "bytes"), of("name", "string")]}
        context = [of("scopes", {"type": "array", "items": scope}), of("usecase", "bytes")]
        fields = [
            of("body", {**record, "name": "Insert", "fields": insert}),
            of("request_id", "bytes"),
            of("context", {**record, "name": "Context", "fields": context}),
        ]
        narrow = read_schema(json.dumps({**record, "name": "Operation", "fields": fields}))
        datum = {
            "context": {"usecase": b"attachments", "scopes": [{"name": "org", "value": b"17"}]},
            "request_id": b"r",
            "body": {
                "key": "ключ".encode(),
                "payload": "größe",
                "metadata": {
                    "expiration": {"policy": b"tti", "seconds": 60},
                    "custom": {"a": b"b"},
                    "time_created": 1,
                    "size": 1,
                },
            },
        }

        decoded = OperationDecoder(resolver=Registry({"7": narrow})).decode(written_with(narrow, datum))

        assert decoded.operation == Insert(
            ObjectContext("attachments", [Scope("org", "17")]),
            "ключ",
            Metadata(expiration=TimeToIdle(60), custom={"a": "b"}),
            "größe".encode(),
        )
        assert decoded.request_id == "r"

    @pytest.mark.parametrize(
        ("payload", "value"),
        [
            ("long", 1),
            ({"type": "fixed", "name": "F", "size": 1}, b"x"),
            ({"type": "array", "items": "int"}, [1]),
            (["bytes", "boolean"], True),
        ],
    )
    def test_a_type_that_cannot_be_read_as_ours_is_a_decode_error(self, payload: Any, value: Any) -> None:
        schema = json.loads(schema_text("operation"))
        schema["fields"][2]["type"][0]["fields"][2]["type"] = payload
        other = read_schema(json.dumps(schema))
        datum = self.datum("Insert", key="k", metadata={}, payload=value)

        decoded = OperationDecoder(resolver=Registry({"7": other})).decode(written_with(other, datum))

        assert (code(decoded), decoded.schema_id) == ("decode_error", "7")


@dataclass(frozen=True)
class Policy:
    """What a usecase may do."""

    enabled: bool = True
    expirations: Collection[str] = ("none", "ttl", "tti")
    max_seconds: int | None = None
    max_object_bytes: int | None = None


class TestPolicies:
    """Contract 2.2, `usecase_denied`; MD-10, BAT-5: after decoding, before anything runs; not poison."""

    def decoder(self, policy: Policy) -> OperationDecoder:
        """A decoder with a policy for the usecase of CONTEXT."""
        return OperationDecoder(usecases={"attachments": policy}, object_bytes_max=100)

    @pytest.mark.parametrize("kind", ["insert", "get", "delete", "head"])
    def test_a_disabled_usecase_may_do_nothing(self, kind: str) -> None:
        decoded = self.decoder(Policy(enabled=False)).decode(operation(kind, "a/b", request_id="r"))

        assert (code(decoded), refused(decoded).status, decoded.poison) == ("usecase_denied", 403, False)
        assert (decoded.kind, decoded.key, decoded.context, decoded.request_id) == (kind, "a/b", CONTEXT, "r")

    def test_other_usecases_are_not_concerned(self) -> None:
        assert self.decoder(Policy(enabled=False)).decode(operation(usecase="other")).operation

    @pytest.mark.parametrize(
        ("policy", "insert", "allowed"),
        [
            (Policy(expirations=["ttl"]), {}, False),
            (Policy(expirations=["none"]), {}, True),
            (Policy(expirations=["ttl"]), {"expiration": {"policy": "ttl", "seconds": 5}}, True),
            (Policy(expirations=["none", "tti"]), {"expiration": {"policy": "ttl", "seconds": 5}}, False),
            (Policy(max_seconds=5), {"expiration": {"policy": "tti", "seconds": 5}}, True),
            (Policy(max_seconds=5), {"expiration": {"policy": "tti", "seconds": 6}}, False),
            (Policy(max_seconds=5), {}, True),
            (Policy(max_object_bytes=3), {"payload": b"abc"}, True),
            (Policy(max_object_bytes=3), {"payload": b"abcd"}, False),
            (Policy(max_object_bytes=3), {"payload": {"uri": "gs://a/b", "size": 4}}, False),
            (Policy(max_object_bytes=3), {"payload": {"uri": "gs://a/b", "size": 3}}, True),
            (Policy(max_object_bytes=3), {"payload": {"uri": "gs://a/b"}}, True),
        ],
    )
    def test_an_insert_is_held_against_its_policy(self, policy: Policy, insert: dict[str, Any], allowed: bool) -> None:
        decoded = self.decoder(policy).decode(operation("insert", **insert))

        assert (decoded.operation is not None) == allowed
        assert allowed or (code(decoded), decoded.poison) == ("usecase_denied", False)

    def test_a_policy_on_inserts_does_not_concern_reads(self) -> None:
        assert self.decoder(Policy(expirations=[], max_object_bytes=0)).decode(operation("get")).operation

    def test_a_broken_rule_comes_before_the_policy(self) -> None:
        assert code(self.decoder(Policy(enabled=False)).decode(operation(key=""))) == "invalid_operation"

    def test_an_object_over_the_limit_is_too_large_but_no_poison(self) -> None:
        """Contract 2.2, `payload_too_large` of an object: everything is echoed."""
        decoder = self.decoder(Policy())

        decoded = decoder.decode(operation("insert", "a/b", bytes(101)))

        assert (code(decoded), decoded.poison) == ("payload_too_large", False)
        assert (decoded.kind, decoded.key, decoded.context) == ("insert", "a/b", CONTEXT)
        assert decoder.decode(operation("insert", "a/b", bytes(100))).operation

    def test_the_policy_speaks_first_of_an_object_too_large_for_both(self) -> None:
        assert code(self.decoder(Policy(max_object_bytes=3)).decode(operation("insert", "a/b", bytes(101)))) == (
            "usecase_denied"
        )


STORED = Metadata("text/plain", TimeToLive(60), "zstd", "f", "o", {"a": "1"}, NOW, NOW + timedelta(60), 5)

OUTCOMES: list[tuple[OpResponse, int, tuple[str, Any]]] = [
    (Inserted(ObjectId(CONTEXT, "a/b"), Metadata()), 201, ("Inserted", {"metadata": wire.METADATA})),
    (Got("a/b", None), 404, ("Got", {"object": None})),
    (Got("a/b", StoredObject(Metadata(), b"")), 200, ("Got", {"object": {"metadata": wire.METADATA, "payload": b""}})),
    (
        Got("a/b", StoredObject(Metadata(), bytes(300))),
        200,
        ("Got", {"object": {"metadata": wire.METADATA, "payload": bytes(300)}}),
    ),
    (
        Got("a/b", StoredObject(Metadata(), PayloadReference("gs://x/y", 2**40, 0xFFFF_FFFF))),
        200,
        (
            "Got",
            {
                "object": {
                    "metadata": wire.METADATA,
                    "payload": {"uri": "gs://x/y", "size": 2**40, "crc32c": 0xFFFF_FFFF},
                }
            },
        ),
    ),
    (Headed("a/b", None), 404, ("Headed", {"metadata": None})),
    (Headed("a/b", Metadata()), 204, ("Headed", {"metadata": wire.METADATA})),
    (Deleted("a/b"), 204, ("Deleted", {})),
    (
        Headed("a/b", STORED),
        204,
        (
            "Headed",
            {
                "metadata": {
                    "content_type": "text/plain",
                    "expiration": {"policy": "ttl", "seconds": 60},
                    "compression": "zstd",
                    "filename": "f",
                    "origin": "o",
                    "custom": {"a": "1"},
                    "time_created": NOW_US,
                    "time_expires": NOW_US + 60 * 86_400_000_000,
                    "size": 5,
                }
            },
        ),
    ),
]


class EvilError(Exception):
    """Cannot even say what it is."""

    def __str__(self) -> str:
        raise ZeroDivisionError


class TestResponses:
    """Read back by Apache's Avro."""

    ENCODER = ResponseEncoder("operations", 3)

    def encode(self, decoded: Decoded, outcome: OpResponse | Exception) -> tuple[int, dict[str, Any]]:
        """Encode and read back."""
        status, value = self.ENCODER.encode(12_345, decoded, outcome, NOW_US)
        response = wire.read_response(value)
        assert response["status"] == status
        assert (response["index"], response["completed_at"]) == (12_345, NOW_US)
        assert response["source"] == {"topic": "operations", "partition": 3, "offset": 12_345}
        return status, response

    @pytest.mark.parametrize(("outcome", "status", "result"), OUTCOMES)
    def test_an_outcome_is_answered_with_its_status_and_result(
        self, outcome: OpResponse, status: int, result: tuple[str, Any]
    ) -> None:
        """OP-5 … OP-8, BAT-6, contract 2.2: a missing object is a success with nothing in it."""
        decoded = decode(operation(outcome.kind, "a/b", request_id="r"))

        answered, response = self.encode(decoded, outcome)

        assert (answered, response["result"]) == (status, result)
        assert (response["request_id"], response["kind"], response["key"]) == ("r", outcome.kind, "a/b")
        assert response["context"] == {
            "usecase": "attachments",
            "scopes": [{"name": name, "value": value} for name, value in SCOPES],
        }

    def test_a_generated_key_is_told(self) -> None:
        """OP-5: a caller that gave no key learns it."""
        decoded = decode(operation("insert", None, b"x"))

        assert self.encode(decoded, Inserted(ObjectId(CONTEXT, "made-up"), Metadata()))[1]["key"] == "made-up"
        assert self.encode(decoded, BackendUnavailable("down"))[1]["key"] is None

    @pytest.mark.parametrize("name", [name for name in STATUS_BY_CODE if name not in {"at_capacity", "config_error"}])
    def test_every_failure_has_its_status(self, name: str) -> None:
        """Contract 2.2."""
        error = TierstreamError("because", code=name)

        status, response = self.encode(decode(operation(request_id="r")), error)

        assert status == STATUS_BY_CODE[name]
        assert response["result"] == ("Failure", {"code": name, "message": "because", "retriable": False})
        assert (response["request_id"], response["kind"], response["key"]) == ("r", "get", "a/b")

    def test_a_failure_that_may_pass_says_so(self) -> None:
        decoded = decode(operation())

        for error in (BackendUnavailable("down"), OperationDropped("cancelled")):
            assert self.encode(decoded, error)[1]["result"][1]["retriable"] is True

    def test_nothing_is_echoed_of_a_record_that_was_not_read(self) -> None:
        """BAT-7, contract 2.2."""
        decoded = decode(b"\xff")

        status, response = self.encode(decoded, refused(decoded))

        assert status == 400
        assert [response[name] for name in ("request_id", "context", "kind", "key")] == [None] * 4

    def test_an_exception_that_is_not_ours_is_a_panic(self) -> None:
        """EXE-11, EXE-12, contract 2.2: its type and text."""
        status, response = self.encode(decode(operation()), KeyError("what"))

        assert status == 500
        assert response["result"] == ("Failure", {"code": "panic", "message": "KeyError: 'what'", "retriable": False})

    @pytest.mark.parametrize(
        ("message", "expected"),
        [
            ("x" * 5000, "x" * 1000),
            ("🗝" * 5000, "🗝" * 1000),
            ("a\ud800b", "a?b"),
            ("", "invalid_operation"),
        ],
    )
    def test_a_message_is_short_whole_and_never_empty(self, message: str, expected: str) -> None:
        """Contract 2.2: messages are short; an exception's text may be anything."""
        assert failure_message(InvalidOperation(message)) == expected
        assert self.encode(decode(operation()), InvalidOperation(message))[1]["result"][1]["message"] == expected

    @pytest.mark.parametrize(
        "outcome",
        [
            EvilError(),
            TierstreamError("no status", code="no such code"),
            Headed("a/b", replace(STORED, filename="\ud800")),
            Headed("a/b", replace(STORED, size=2.5)),  # type: ignore[arg-type]
            Headed("a/b", replace(STORED, time_created=datetime(2025, 1, 1))),  # noqa: DTZ001 - what a bad storage gives
            Got("a/b", StoredObject(Metadata(), "text")),  # type: ignore[arg-type]
            None,
        ],
    )
    def test_an_outcome_that_cannot_be_written_is_a_panic(self, outcome: Any) -> None:
        """Contract 2.3: exactly one response, whatever happened."""
        status, response = self.encode(decode(operation()), outcome)

        assert (status, response["result"][1]["code"]) == (500, "panic")

    def test_a_context_is_echoed_without_being_prepared(self) -> None:
        """`Decoded` made by hand, as a test or tool may."""
        decoded = Decoded(None, None, "r", CONTEXT, "get", "k")

        assert (
            self.encode(decoded, Deleted("k"))[1]
            == self.encode(replace_context_bytes(decode(operation("get", "k", request_id="r"))), Deleted("k"))[1]
        )

    def test_a_frame_stands_before_a_response_where_it_should(self) -> None:
        """Contract 2.4: `output.framing: single-object`."""
        decoded = decode(operation())
        framed = ResponseEncoder("operations", 3, prefix=RESPONSE_PREFIX).encode(1, decoded, Deleted("k"), 2)[1]
        bare = self.ENCODER.encode(1, decoded, Deleted("k"), 2)[1]

        assert framed == b"\xc3\x01" + wire.fingerprint("response") + bare
        assert decode_response(framed) == decode_response(bare)

    @pytest.mark.parametrize("offset", [0, 1, 63, 64, 2**31, 2**63 - 1])
    @pytest.mark.parametrize("completed_at", [0, -1, NOW_US, 2**48, 2**48 - 1, 2**55, 2**55 - 1, 2**63 - 1, -(2**63)])
    def test_numbers_of_every_length_are_written(self, offset: int, completed_at: int) -> None:
        response = wire.read_response(self.ENCODER.encode(offset, decode(operation()), Deleted("k"), completed_at)[1])

        assert (response["index"], response["source"]["offset"], response["completed_at"]) == (
            offset,
            offset,
            completed_at,
        )

    @pytest.mark.parametrize(
        ("context", "key"),
        [
            (ObjectContext("u"), "k" * 890),
            (ObjectContext("u" * 128, [Scope("n" * 5, "v" * 10)] * 32), "k" * 200),
            (ObjectContext("u", [Scope("n" * 256, "v" * 256)]), "k"),
        ],
    )
    @pytest.mark.parametrize("metadata", [Metadata(size=300), replace(STORED, size=300, filename="n" * 10_000)])
    def test_no_response_to_a_get_is_larger_than_was_foreseen(
        self, context: ObjectContext, key: str, metadata: Metadata
    ) -> None:
        """With everything else at its limit: what is judged to fit fits, and only what is close to that is not."""
        ObjectId(context, key)
        decoded = Decoded(Get(context, key), None, request_id="r" * 1024, context=context, kind="get", key=key)
        encoder = ResponseEncoder("t" * 249, 2**31 - 1, prefix=bytes(17))
        got = Got(key, StoredObject(metadata, bytes(300)))

        _, value = encoder.encode(2**63 - 1, decoded, got, 2**63 - 1)

        assert got_bytes_max(metadata) - 3072 < len(value) <= got_bytes_max(metadata)


def replace_context_bytes(decoded: Decoded) -> Decoded:
    """The same, the prepared context left out."""
    decoded.context_bytes = None
    return decoded


OPERATIONS: list[Operation] = [
    Get(CONTEXT, "a/b"),
    Delete(CONTEXT, "ключ"),
    Head(ObjectContext("u"), "k" * 500),
    Insert(CONTEXT, "a/b", DEFAULT_METADATA, b"payload"),
    Insert(CONTEXT, None, DEFAULT_METADATA, b""),
    Insert(CONTEXT, "k", replace(STORED, time_created=None, time_expires=None, size=None), bytes(300)),
    Insert(CONTEXT, "k", Metadata(expiration=TimeToIdle(1)), PayloadReference("gs://a/b", 1, 2)),
]


class TestTools:
    """What the command line writes and shows."""

    @pytest.mark.parametrize("made", OPERATIONS)
    @pytest.mark.parametrize("request_id", [None, "", "r"])
    def test_an_operation_written_is_the_operation_read(self, made: Operation, request_id: str | None) -> None:
        value = encode_operation(made, request_id)
        decoded = decode(value)

        assert (decoded.operation, decoded.request_id) == (made, request_id)
        assert type(decoded.operation) is type(made)

    @pytest.mark.parametrize("made", OPERATIONS)
    def test_an_operation_is_shown_as_the_contract_names_its_fields(self, made: Operation) -> None:
        fields = operation_fields(made, "r")
        schema = operation_schema().parsed
        read = fastavro.schemaless_reader(
            io.BytesIO(encode_operation(made, "r")),
            schema,
            None,
            return_record_name=True,
            return_record_name_override=True,
        )

        assert isinstance(read, dict)
        name, body = read["body"]
        assert fields == {**read, "body": {"type": name.removeprefix("tierstream.v1."), **body}}

    def test_times_are_shown_as_microseconds(self) -> None:
        fields = operation_fields(Insert(CONTEXT, "k", STORED, b""))

        assert (fields["body"]["metadata"]["time_created"], fields["request_id"]) == (NOW_US, None)

    def test_what_is_no_response_is_said_to_be_none(self) -> None:
        value = ResponseEncoder("t", 0).encode(1, decode(operation()), Deleted("k"), 2)[1]

        for bad in (b"", b"\xff" * 30, value + b"\x00", value[:-1], b"\xc3\x01" + bytes(8) + value):
            with pytest.raises(DecodeError):
                decode_response(bad)

    def test_a_response_names_the_branch_of_its_result(self) -> None:
        """Contract 7, `tail`: `{"type": "Inserted", …}`."""
        decoded = decode(operation("insert", "a/b", request_id="r"))
        value = ResponseEncoder("t", 0).encode(1, decoded, Inserted(ObjectId(CONTEXT, "a/b"), STORED), 2)[1]

        response = decode_response(value)

        assert list(response) == [
            "index",
            "source",
            "request_id",
            "context",
            "kind",
            "key",
            "status",
            "result",
            "completed_at",
        ]
        assert response["result"]["type"] == "Inserted"
        assert response["result"]["metadata"]["time_created"] == NOW_US


def test_a_decoded_record_shows_no_payload() -> None:
    """OP-10: what ends up in a log line."""
    assert "secret" not in repr(decode(operation("insert", "k", b"secret")))
    assert "TooLarge" in repr(Decoded(None, TooLarge("x"), poison=True))
