"""JSON lines: what people write becomes the operation they mean, or a reason why it is none."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.cli.lines import BadLine, header_pairs, read_line, shown, synthetic
from consumer.codec import OperationDecoder
from consumer.ids import ObjectContext, Scope
from consumer.kafka.tools import Outgoing
from consumer.operations import Delete, Get, Head, Insert, Metadata, PayloadReference, TimeToIdle, TimeToLive

CONTEXT = ObjectContext("u")


def read(**said: Any) -> Outgoing:
    """Read a line with these fields, in usecase ``u`` unless they say otherwise."""
    return read_line(json.dumps({"usecase": "u", **said}), payload_bytes_max=100)


def operation(record: Outgoing) -> Any:
    """What the service makes of a record."""
    return OperationDecoder().decode(record.value).operation


def request_id(record: Outgoing) -> str | None:
    """The request id the service reads."""
    return OperationDecoder().decode(record.value).request_id


class TestOperations:
    """Lines that are operations."""

    @pytest.mark.parametrize(("kind", "variant"), [("get", Get), ("delete", Delete), ("head", Head)])
    def test_reads_and_deletes_name_an_object(self, kind: str, variant: type[Get | Delete | Head]) -> None:
        """Contract 7."""
        assert operation(read(kind=kind, key="a/b")) == variant(CONTEXT, "a/b")

    def test_an_insert_carries_everything_it_may(self) -> None:
        """Contract 2.1, 7."""
        record = read(
            kind="insert",
            scopes=[["org", "1"], {"name": "project", "value": "2"}],
            key="k",
            payload="tëxt",
            content_type="text/plain",
            ttl="1h",
            compression="zstd",
            filename="f",
            origin="o",
            custom={"a": "b"},
            request_id="r",
            partition=3,
        )
        context = ObjectContext("u", [Scope("org", "1"), Scope("project", "2")])
        metadata = Metadata("text/plain", TimeToLive(3600), "zstd", "f", "o", {"a": "b"})

        assert operation(record) == Insert(context, "k", metadata, "tëxt".encode())
        assert (request_id(record), record.partition) == ("r", 3)

    def test_time_to_idle_is_a_duration_too(self) -> None:
        """Contract 7: `"ttl":"1h"` or `"tti"`."""
        assert operation(read(kind="insert", payload="", tti="90s")).metadata.expiration == TimeToIdle(90)

    def test_a_payload_may_be_base64(self) -> None:
        """Bytes that are no text."""
        record = read(kind="insert", payload_base64=base64.b64encode(b"\x00\xff").decode())

        assert operation(record).payload == b"\x00\xff"

    def test_a_payload_may_be_a_file(self, tmp_path: Path) -> None:
        """Relative to the working directory, or absolute."""
        (tmp_path / "p").write_bytes(b"\x01" * 100)

        assert operation(read(kind="insert", payload_file=str(tmp_path / "p"))).payload == b"\x01" * 100

    @pytest.mark.parametrize(
        ("said", "reference"),
        [
            ("gs://b/n", PayloadReference("gs://b/n")),
            ({"uri": "file:///p", "size": 5, "crc32c": 2**32 - 1}, PayloadReference("file:///p", 5, 2**32 - 1)),
        ],
    )
    def test_a_payload_may_be_a_reference(self, said: object, reference: PayloadReference) -> None:
        """Claim check."""
        assert operation(read(kind="insert", payload_reference=said)).payload == reference

    def test_null_is_as_good_as_nothing(self) -> None:
        """Programs write every field."""
        record = read(kind="insert", key=None, payload="x", ttl=None, custom=None, request_id=None, partition=None)

        assert operation(record) == Insert(CONTEXT, None, Metadata(), b"x")

    def test_synthetic_lines_are_operations_on_objects_of_their_own(self) -> None:
        """`produce --count N`."""
        keys = {read_line(line, payload_bytes_max=0).key for line in synthetic(12)}

        assert len(keys) == 12


class TestRecordKeys:
    """The key of the Kafka record."""

    def test_by_default_it_is_the_storage_path(self) -> None:
        """Contract 7: so operations on one object keep their order."""
        assert read(kind="get", key="k", scopes=[["org", "1"]]).key == b"u/org.1/objects/k"

    def test_it_is_null_for_a_keyless_insert(self) -> None:
        """Contract 7."""
        assert read(kind="insert", payload="").key is None

    @pytest.mark.parametrize(("record_key", "expected"), [("mine", b"mine"), (None, None), ("", b"")])
    def test_it_can_be_chosen(self, record_key: str | None, expected: bytes | None) -> None:
        """Contract 7: `record_key`, also null."""
        assert read(kind="get", key="k", record_key=record_key).key == expected


class TestBadLines:
    """Lines that are none."""

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"nonsense", "it is no JSON"),
            (b"\xff{}", "it is not UTF-8"),
            (b"[]", "it is no JSON object"),
            (b"null", "it is no JSON object"),
            (b"[" * 100_000, "it is nested too deep"),
            (b"{}", "kind is required"),
        ],
    )
    def test_what_is_no_object_is_refused(self, line: bytes, reason: str) -> None:
        """In words."""
        with pytest.raises(BadLine, match=reason):
            read_line(line, payload_bytes_max=0)

    @pytest.mark.parametrize(
        ("said", "reason"),
        [
            ({"kind": "put"}, "kind is insert, get, delete or head, not put"),
            ({"kind": 5}, "kind is a text"),
            ({"kind": "get"}, "key is required"),
            ({"kind": "get", "key": ""}, "a key is not empty|an object key is not empty"),
            ({"kind": "get", "key": "k", "kee": 1}, "kee means nothing in get; did you mean key"),
            ({"kind": "get", "key": "k", "payload": ""}, "payload means nothing in get"),
            ({"kind": "get", "key": "k", "usecase": "a b"}, "a usecase is"),
            ({"kind": "get", "key": "k", "usecase": None}, "usecase is required"),
            ({"kind": "get", "key": "k", "scopes": [["a"]]}, "scopes is a list of pairs"),
            ({"kind": "get", "key": "k", "scopes": {"a": "b"}}, "scopes is a list of pairs"),
            ({"kind": "get", "key": "k", "scopes": ["ab"]}, "scopes is a list of pairs"),
            ({"kind": "get", "key": "k", "scopes": [["a.b", "c"]]}, "scope names and values"),
            ({"kind": "get", "key": "\ud800"}, "surrogate"),
            ({"kind": "get", "key": "k", "request_id": "\ud800"}, "surrogate"),
            ({"kind": "get", "key": "k", "request_id": "ä" * 513}, "request_id has at most 1024 bytes"),
            ({"kind": "get", "key": "k", "partition": -1}, "partition is a whole number"),
            ({"kind": "get", "key": "k", "partition": True}, "partition is a whole number"),
            ({"kind": "insert"}, "an insert has one of payload, payload_base64, payload_file, payload_reference"),
            ({"kind": "insert", "payload": "", "payload_base64": ""}, "not payload and payload_base64"),
            ({"kind": "insert", "payload": 5}, "payload is a text"),
            ({"kind": "insert", "payload_base64": "a?=="}, "payload_base64 is no base64"),
            ({"kind": "insert", "payload_base64": "ä"}, "payload_base64 is no base64"),
            ({"kind": "insert", "payload_file": "/none"}, "payload_file /none cannot be read: No such file"),
            ({"kind": "insert", "payload_file": "a\x00b"}, "cannot be read"),
            ({"kind": "insert", "payload_reference": {"url": "x"}}, "payload_reference is an address, or"),
            ({"kind": "insert", "payload_reference": {"uri": "x", "crc32c": 2**32}}, "crc32c is a whole number"),
            ({"kind": "insert", "payload": "", "ttl": "1h", "tti": "1h"}, "ttl and tti exclude each other"),
            ({"kind": "insert", "payload": "", "ttl": 60}, "ttl is a duration"),
            ({"kind": "insert", "payload": "", "ttl": "1500ms"}, "ttl is a whole number of seconds"),
            ({"kind": "insert", "payload": "", "ttl": "0"}, "expiration seconds are 1 to"),
            ({"kind": "insert", "payload": "", "content_type": "x"}, "content_type is a media type"),
            ({"kind": "insert", "payload": "", "custom": {"a": 1}}, "custom is an object of texts"),
            ({"kind": "insert", "payload": "", "custom": {"a": "b" * 8000}}, "custom metadata has at most"),
        ],
    )
    def test_what_breaks_a_rule_is_refused_here(self, said: dict[str, Any], reason: str) -> None:
        """A slip must not end up as a dead letter."""
        with pytest.raises(BadLine, match=reason):
            read(**said)

    def test_a_file_over_the_limit_is_refused_unread(self, tmp_path: Path) -> None:
        """Nobody means to read a disk image into memory."""
        (tmp_path / "p").write_bytes(bytes(101))

        with pytest.raises(BadLine, match="more than 100 bytes; give it by payload_reference"):
            read(kind="insert", payload_file=str(tmp_path / "p"))

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda t: st.dictionaries(
        st.sampled_from(["kind", "usecase", "scopes", "key", "payload", "payload_reference", "ttl", "custom", "uri"]), t
    ) | st.lists(t), max_leaves=8))  # fmt: skip
    def test_no_line_is_anything_but_an_operation_or_bad(self, said: object) -> None:
        """A surprise would end the whole run."""
        try:
            record = read_line(json.dumps(said), payload_bytes_max=10)
        except BadLine:
            return
        assert operation(record) is not None


class TestShown:
    """What `tail` prints."""

    def test_bytes_are_base64_under_a_name_that_says_so(self) -> None:
        """Contract 7: bytes as `payload_base64`."""
        fields = {"result": {"object": {"payload": b"\x00", "metadata": {"size": 1}}}, "list": [{"payload": b""}]}

        assert shown(fields) == {
            "result": {"object": {"payload_base64": "AA==", "metadata": {"size": 1}}},
            "list": [{"payload_base64": ""}],
        }

    def test_headers_keep_order_and_repeats(self) -> None:
        """Kafka headers are a list, and values may be anything."""
        assert header_pairs([("a", b"1"), ("a", None), ("b", b"\xff")]) == [["a", "1"], ["a", None], ["b", "\ufffd"]]
