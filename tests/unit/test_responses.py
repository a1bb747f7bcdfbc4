"""Where responses and dead letters go, and what stands in their keys and headers (contract 2.3)."""

from __future__ import annotations

import pytest

from consumer.avro_schemas import RESPONSE_FINGERPRINT
from consumer.codec import Headers
from consumer.errors import STATUS_BY_CODE
from consumer.operations import Kind
from consumer.responses import DeadLetters, Header, ResponseHeaders, response_id, response_partition

OWN = [
    ("tierstream-response-id", b"operations/3/42"),
    ("tierstream-status", b"201"),
    ("tierstream-kind", b"insert"),
    ("tierstream-schema", b"5667bf23acafda0b"),
]


def make(key: bytes | None, headers: Headers, *, compacted: bool = False) -> tuple[bytes | None, list[Header]]:
    """Key and headers of the response to an insert at offset 42."""
    return ResponseHeaders("operations", 3, compacted=compacted).make(42, 201, "insert", key, headers)


class TestIdentity:
    """Contract 2.3: what duplicates are known by, and where a response goes."""

    def test_a_response_id_is_the_place_of_the_input_record(self) -> None:
        assert response_id("operations", 3, 42) == "operations/3/42"
        assert make(None, ())[1][0] == ("tierstream-response-id", response_id("operations", 3, 42).encode())

    @pytest.mark.parametrize(
        ("partition", "count", "expected"),
        [(0, 1, 0), (0, 5, 0), (4, 5, 4), (5, 5, 0), (7, 5, 2), (11, 12, 11), (100, 3, 1)],
    )
    def test_the_partition_is_the_input_s_or_folded(self, partition: int, count: int, expected: int) -> None:
        """H18g: named by us; the client's hash of the key would change with the number of partitions."""
        assert response_partition(partition, count) == expected


class TestHeadersOfAResponse:
    """Ours first, then what is to be copied."""

    @pytest.mark.parametrize("key", [None, b"", b"key", bytes(range(256))])
    def test_the_key_is_the_input_s(self, key: bytes | None) -> None:
        """Contract 2: unchanged."""
        assert make(key, ()) == (key, OWN)

    @pytest.mark.parametrize("kind", ["insert", "get", "delete", "head", None])
    def test_every_kind_and_status_has_its_text(self, kind: Kind | None) -> None:
        """Contract 2.3: numbers decimal; `unknown` if not decoded."""
        for status in {200, 201, 204, 404, *STATUS_BY_CODE.values()}:
            headers = dict(ResponseHeaders("t", 0).make(2**63 - 1, status, kind, None, ())[1])

            assert headers["tierstream-status"] == str(status).encode()
            assert headers["tierstream-kind"] == (kind or "unknown").encode()
            assert headers["tierstream-response-id"] == b"t/0/9223372036854775807"
            assert headers["tierstream-schema"] == RESPONSE_FINGERPRINT.encode()

    def test_headers_are_copied_with_bytes_order_and_repeats(self) -> None:
        """Contract 2.3: those in `output.copy_headers`; null values included, others left behind."""
        id_header, null = ("correlation-id", b"\x00\xff"), ("tracestate", None)
        copied: list[Header] = [id_header, ("traceparent", b"t"), id_header, null]
        left: list[Header] = [("other", b"x"), ("tierstream-status", b"999"), ("TRACEPARENT", b"")]
        headers: Headers = [*copied[:2], left[0], *copied[2:], *left[1:]]

        assert make(b"k", headers) == (b"k", [*OWN, *copied])
        assert make(b"k", tuple(headers)) == (b"k", [*OWN, *copied])

    def test_the_list_to_copy_is_the_configured_one(self) -> None:
        headers: Headers = [("traceparent", b"t"), ("x", b"1")]

        made = ResponseHeaders("operations", 3, ["x"]).make(42, 201, "insert", None, headers)[1]

        assert made == [*OWN, ("x", b"1")]

    def test_one_response_does_not_show_in_the_next(self) -> None:
        maker = ResponseHeaders("operations", 3)
        first = maker.make(42, 201, "insert", None, [("traceparent", b"t")])[1]

        assert maker.make(42, 201, "insert", None, ())[1] == OWN
        assert first == [*OWN, ("traceparent", b"t")]

    @pytest.mark.parametrize(
        ("key", "headers"),
        [
            (bytes(65_536), ()),
            (bytes(65_536 - 14 - 5), [("correlation-id", b"12345")]),
            (None, [("correlation-id", bytes(65_536 - 14))]),
            (bytes(65_536), [("not copied", bytes(100_000))]),
        ],
    )
    def test_key_and_copied_headers_may_have_64_kib(self, key: bytes | None, headers: Headers) -> None:
        """Contract 2.3: exactly 64 KiB is not above 64 KiB; what is not copied does not count."""
        made_key, made = make(key, headers)

        assert made_key == key
        assert made == [*OWN, *(header for header in headers if header[0] == "correlation-id")]

    @pytest.mark.parametrize(
        ("key", "headers"),
        [
            (bytes(65_537), ()),
            (bytes(65_536 - 14 - 5), [("correlation-id", b"123456")]),
            (None, [("correlation-id", bytes(65_537 - 14))]),
            (bytes(40_000), [("traceparent", bytes(20_000)), ("tracestate", bytes(20_000))]),
        ],
    )
    def test_above_that_nothing_is_sent_along_and_said_so(self, key: bytes | None, headers: Headers) -> None:
        """Contract 2.3: null key, nothing copied, `tierstream-key-dropped: true`."""
        assert make(key, headers) == (None, [*OWN, ("tierstream-key-dropped", b"true")])

    def test_a_compacted_topic_gets_no_null_key(self) -> None:
        """Contract 2.3: a null key is replaced by the response id."""
        assert make(None, (), compacted=True) == (b"operations/3/42", OWN)
        assert make(b"", (), compacted=True) == (b"", OWN)
        assert make(b"key", (), compacted=True) == (b"key", OWN)
        assert make(bytes(70_000), (), compacted=True) == (
            b"operations/3/42",
            [*OWN, ("tierstream-key-dropped", b"true")],
        )


LETTER = [
    ("tierstream-dlq-topic", b"operations"),
    ("tierstream-dlq-partition", b"3"),
    ("tierstream-dlq-offset", b"42"),
    ("tierstream-dlq-timestamp", b"1764000000123"),
    ("tierstream-dlq-group", b"tierstream"),
    ("tierstream-dlq-code", b"decode_error"),
    ("tierstream-dlq-message", "zu kurz für eine Zahl".encode()),
]


def letter(
    value: bytes | None,
    headers: Headers = (),
    *,
    key: bytes | None = b"key",
    schema_id: str | None = None,
    record_bytes_max: int = 1_000_000,
) -> tuple[bytes | None, list[Header]]:
    """Value and headers of a dead letter."""
    maker = DeadLetters("operations", 3, "tierstream", record_bytes_max=record_bytes_max)
    return maker.make(
        42,
        1_764_000_000_123,
        key,
        value,
        headers,
        code="decode_error",
        message="zu kurz für eine Zahl",
        schema_id=schema_id,
    )


class TestDeadLetters:
    """The record as it was, and why it is here."""

    @pytest.mark.parametrize("value", [None, b"", b"\xff\x00"])
    def test_the_value_stays_byte_for_byte(self, value: bytes | None) -> None:
        """Contract 2, 2.3: also a value that was null, or empty."""
        assert letter(value) == (value, LETTER)

    def test_the_record_s_headers_stay_but_for_those_of_an_earlier_dead_letter(self) -> None:
        """Contract 2.3: ours replace any they had, however often, and truncation and schema id of old too."""
        kept: list[Header] = [("a", b"1"), ("a", None), ("tierstream-replay-of", b"x"), ("tierstream-dlq-other", b"y")]
        old: list[Header] = [(name, b"old") for name, _ in LETTER]
        old += [("tierstream-dlq-schema-id", b"old"), ("tierstream-dlq-truncated", b"true"), LETTER[0]]

        assert letter(b"v", [*kept[:1], *old, *kept[1:]]) == (b"v", [*kept, *LETTER])

    def test_a_schema_id_is_told_where_there_was_one(self) -> None:
        assert letter(b"v", schema_id="7") == (b"v", [*LETTER, ("tierstream-dlq-schema-id", b"7")])

    def test_a_value_that_does_not_fit_is_left_out_and_said_so(self) -> None:
        """Contract 2.3: `tierstream-dlq-truncated: true`; the limit counts key and headers too."""
        limit = 10_000
        fits = max(size for size in range(limit) if letter(bytes(size), record_bytes_max=limit)[0] is not None)

        assert limit - 600 < fits < limit
        assert letter(bytes(fits), record_bytes_max=limit) == (bytes(fits), LETTER)
        truncated = [*LETTER, ("tierstream-dlq-truncated", b"true")]
        assert letter(bytes(fits + 1), record_bytes_max=limit) == (None, truncated)
        assert letter(bytes(fits), key=b"longer", record_bytes_max=limit)[0] is None
        assert letter(bytes(fits), [("h", b"")], record_bytes_max=limit)[0] is None

    def test_a_record_as_large_as_counted_fits_a_batch_of_that_size(self) -> None:
        """The bound holds for what the Kafka client really makes of it."""
        from aiokafka.record.default_records import DefaultRecordBatchBuilder

        limit = 10_000
        headers: Headers = [("h" * number, bytes(number)) for number in range(1, 40)]
        value, made = b"", []
        for size in range(limit):
            fitting, fitting_headers = letter(bytes(size), headers, record_bytes_max=limit)
            if fitting is None:
                break
            value, made = fitting, fitting_headers
        builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, 0, limit)

        assert builder.append(0, 1_764_000_000_123, b"key", value, made) is not None
        assert len(builder.build()) <= limit
        assert len(value) > limit // 2

    def test_a_null_value_is_not_called_truncated(self) -> None:
        assert letter(None, record_bytes_max=1) == (None, LETTER)
