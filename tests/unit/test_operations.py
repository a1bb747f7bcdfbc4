"""Four operations, one response each; values that cannot change, and metadata that keeps its rules."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import get_args

import pytest

from consumer.errors import InvalidMetadata
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import (
    CUSTOM_BYTES_MAX,
    CUSTOM_PAIRS_MAX,
    DEFAULT_METADATA,
    EXPIRATION_SECONDS_MAX,
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

CONTEXT = ObjectContext("u")
OPERATIONS = [
    (Insert(CONTEXT, "k", Metadata(), b"payload"), "insert", "write"),
    (Get(CONTEXT, "k"), "get", "read"),
    (Delete(CONTEXT, "k"), "delete", "delete"),
    (Head(CONTEXT, "k"), "head", "read"),
]


def test_there_are_four_operations() -> None:
    """OP-1: and four responses."""
    assert get_args(Operation) == (Insert, Get, Delete, Head)
    assert get_args(OpResponse) == (Inserted, Got, Deleted, Headed)


@pytest.mark.parametrize(("operation", "kind", "permission"), OPERATIONS)
def test_an_operation_says_its_kind_key_and_permission(operation: Operation, kind: str, permission: str) -> None:
    """OP-2, OP-3, OP-4."""
    assert (operation.kind, operation.key, operation.permission) == (kind, "k", permission)


def test_only_an_insert_may_have_no_key() -> None:
    """OP-3."""
    assert Insert(CONTEXT, None, Metadata(), b"").key is None
    optional = [
        kind.__name__
        for kind in get_args(Operation)
        if {field.name: field.type for field in dataclasses.fields(kind)}["key"] != "str"
    ]
    assert optional == ["Insert"]


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (Inserted(ObjectId(CONTEXT, "k"), Metadata()), "insert"),
        (Got("k", None), "get"),
        (Deleted("k"), "delete"),
        (Headed("k", None), "head"),
    ],
)
def test_a_response_says_its_kind_and_key(response: OpResponse, kind: str) -> None:
    """OP-5 … OP-7, OP-9: from the response alone; for an insert out of the full id."""
    assert (response.kind, response.key) == (kind, "k")


@pytest.mark.parametrize(
    "value",
    [*[operation for operation, *_ in OPERATIONS], Got("k", None), StoredObject(Metadata(), b""), Metadata()],
)
def test_a_value_cannot_be_changed(value: Operation | Got | StoredObject | Metadata) -> None:
    """Whoever reads one may keep it."""
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
    assert not hasattr(value, "__dict__")


def test_the_debug_form_never_shows_the_payload() -> None:
    """OP-10: of what goes in and of what comes out."""
    secret = b"top secret"

    for value in (
        Insert(CONTEXT, "k", Metadata(), secret),
        StoredObject(Metadata(), secret),
        Got("k", StoredObject(Metadata(), secret)),
    ):
        assert "secret" not in repr(value)


def test_metadata_has_these_defaults() -> None:
    """Contract 10; nobody can add to the shared empty mapping."""
    metadata = Metadata()

    assert metadata.content_type == "application/octet-stream"
    assert metadata.custom == {}
    assert isinstance(metadata.custom, MappingProxyType)
    assert [
        getattr(metadata, field.name)
        for field in dataclasses.fields(Metadata)
        if field.name not in {"content_type", "custom"}
    ] == [None] * 7


VALID = [
    DEFAULT_METADATA,
    Metadata(content_type="text/plain"),
    Metadata(content_type="text/plain; charset=utf-8"),
    Metadata(content_type='multipart/mixed; boundary="a b\\"c"; x=y'),
    Metadata(content_type="application/vnd.example+json ; v=1"),
    Metadata(compression="zstd"),
    Metadata(expiration=TimeToLive(1)),
    Metadata(expiration=TimeToIdle(EXPIRATION_SECONDS_MAX)),
    Metadata(filename="файл.txt", origin="203.0.113.7"),
    Metadata(custom={str(number): "v" for number in range(CUSTOM_PAIRS_MAX)}),
    Metadata(custom={"key": "é" * ((CUSTOM_BYTES_MAX - 3) // 2)}),
    Metadata(size=-1),
]

INVALID = [
    *[
        (Metadata(content_type=text), "media type")
        for text in (
            *["", "text", "text/", "/plain", "text/plain;", "text/plain; charset", "text/plain; a=é"],
            *["text plain/x", "text/plain\n", 'a/b; c="', 'a/b; c="\n"', "téxt/plain", "text/plain\r\nX-Y: z"],
        )
    ],
    (Metadata(compression="gzip"), "null or zstd"),
    (Metadata(compression=""), "null or zstd"),
    (Metadata(expiration=TimeToLive(0)), "expiration"),
    (Metadata(expiration=TimeToIdle(-1)), "expiration"),
    (Metadata(expiration=TimeToLive(EXPIRATION_SECONDS_MAX + 1)), "expiration"),
    (Metadata(custom={str(number): "" for number in range(CUSTOM_PAIRS_MAX + 1)}), "64 custom pairs"),
    (Metadata(custom={"key": "x" * CUSTOM_BYTES_MAX}), "bytes of UTF-8"),
    (Metadata(custom={"key": "é" * (CUSTOM_BYTES_MAX // 2)}), "bytes of UTF-8"),
    (Metadata(custom={"\ud800": ""}), "lone surrogates"),
    (Metadata(filename="\udfff"), "lone surrogates"),
    (Metadata(origin="\udfff"), "lone surrogates"),
    *[
        (metadata, "not of its type")
        for metadata in (
            Metadata(content_type=None),  # type: ignore[arg-type]  # the mistakes this is about
            Metadata(expiration="1h"),  # type: ignore[arg-type]
            Metadata(expiration=TimeToLive("5")),  # type: ignore[arg-type]
            Metadata(expiration=TimeToIdle(1.5)),  # type: ignore[arg-type]
            Metadata(custom={"a": 1}),  # type: ignore[dict-item]
            Metadata(custom=[("a", "b")]),  # type: ignore[arg-type]
            Metadata(filename=7),  # type: ignore[arg-type]
        )
    ],
]


@pytest.mark.parametrize("metadata", VALID)
def test_metadata_that_keeps_the_rules_is_valid(metadata: Metadata) -> None:
    """Contract 2.1: read-only fields may hold whatever they want (MD-5)."""
    metadata.validate()


@pytest.mark.parametrize(("metadata", "text"), INVALID)
def test_metadata_that_breaks_a_rule_is_refused(metadata: Metadata, text: str) -> None:
    """Contract 2.1: the message names the rule (MD-3: media types; MD-4: zstd alone)."""
    with pytest.raises(InvalidMetadata, match=text):
        metadata.validate()


def test_a_reference_may_know_more_than_the_address() -> None:
    """Contract 10."""
    assert PayloadReference("gs://b/n") == PayloadReference("gs://b/n", None, None)
    assert PayloadReference("gs://b/n", 5, 7).crc32c == 7


def test_expirations_name_their_policy() -> None:
    """Contract 2.1: ``ttl`` or ``tti``."""
    assert (TimeToLive(5).policy, TimeToIdle(5).policy) == ("ttl", "tti")
    assert len({TimeToLive(5), TimeToIdle(5), TimeToLive(5)}) == 2
