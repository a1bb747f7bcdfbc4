"""The stored form of metadata: compact, exact to the microsecond, readable by older and newer versions."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import orjson
import pytest

from consumer.errors import BackendError, InvalidMetadata
from consumer.operations import Metadata, TimeToIdle, TimeToLive
from consumer.storage.metadata import (
    VERSION,
    decode_metadata,
    decode_pairs,
    encode_metadata,
    encode_pairs,
    expired,
    micros,
)

NOON = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def test_absent_manual_and_empty_values_are_left_out() -> None:
    """MD-8."""
    empty = Metadata(filename="", origin="", compression="", custom={})

    assert encode_metadata(empty) == encode_metadata(Metadata()) == b'{"content_type":"application/octet-stream"}'


def test_every_field_has_its_name() -> None:
    """MD-1: the form is kept for years; this is what it looks like."""
    metadata = Metadata(
        content_type="text/plain",
        expiration=TimeToLive(60),
        compression="zstd",
        filename="a.txt",
        origin="203.0.113.7",
        custom={"k": "v"},
        time_created=NOON,
        time_expires=NOON + timedelta(seconds=60, microseconds=5),
        size=7,
    )

    assert orjson.loads(encode_metadata(metadata)) == {
        "content_type": "text/plain",
        "expiration": {"policy": "ttl", "seconds": 60},
        "compression": "zstd",
        "filename": "a.txt",
        "origin": "203.0.113.7",
        "custom": {"k": "v"},
        "time_created": "2026-01-01T12:00:00.000000Z",
        "time_expires": "2026-01-01T12:01:00.000005Z",
        "size": 7,
    }
    assert decode_metadata(encode_metadata(metadata)) == metadata


def test_an_empty_object_has_a_size() -> None:
    """MD-8 leaves out what is absent; zero is not."""
    assert decode_metadata(encode_metadata(Metadata(size=0))).size == 0


def test_both_policies_come_back_as_what_they_were() -> None:
    """MD-2."""
    for expiration in (TimeToLive(1), TimeToIdle(315_360_000), None):
        assert decode_metadata(encode_metadata(Metadata(expiration=expiration))).expiration == expiration


def test_a_time_of_another_zone_is_kept_as_the_same_moment_in_utc() -> None:
    """MD-7."""
    there = NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))

    stored = encode_metadata(Metadata(time_created=there))

    assert b'"2026-01-01T12:00:00.000000Z"' in stored
    assert decode_metadata(stored).time_created == NOON


def test_what_a_newer_version_added_is_ignored() -> None:
    """Upgrades go through a time with both versions at work."""
    stored = b'{"content_type":"text/plain","colour":"blue","size":3,"nested":{"a":[1]}}'

    assert decode_metadata(stored) == Metadata("text/plain", size=3)


def test_what_a_newer_version_forbids_to_ignore_is_refused() -> None:
    """Upgrades: an older version refuses what it would misread."""
    stored = b'{"version":%d,"content_type":"text/plain"}' % (VERSION + 1)

    with pytest.raises(BackendError, match="newer version"):
        decode_metadata(stored)


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b'{"content_type":"a/b","expiration":{"policy":"never","seconds":1}}',
        b'{"content_type":"a/b","expiration":{"policy":"ttl"}}',
        b'{"content_type":"a/b","expiration":7}',
        b'{"content_type":"a/b","time_created":"yesterday"}',
        b'{"content_type":"a/b","time_expires":7}',
        b'{"content_type":"a/b","version":"x"}',
    ],
)
def test_damage_is_one_error_of_ours(stored: bytes) -> None:
    """Whatever a disk gives back, nothing but a BackendError comes out."""
    with pytest.raises(BackendError, match="unreadable"):
        decode_metadata(stored)


@pytest.mark.parametrize(
    "metadata",
    [
        Metadata(filename="\ud800"),
        Metadata(custom={"\udfff": ""}),
        Metadata(size=2**70),
        Metadata(time_created=datetime(2026, 1, 1)),  # noqa: DTZ001 - without a zone, on purpose
    ],
    ids=["surrogate", "surrogate key", "huge", "naive"],
)
def test_what_cannot_be_kept_is_refused_before_it_is_written(metadata: Metadata) -> None:
    """A client's fault must not become a broken row."""
    with pytest.raises(InvalidMetadata):
        encode_metadata(metadata)


def test_microseconds_are_exact_far_from_now() -> None:
    """A float of seconds loses them from the year 2106 on."""
    far = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)

    assert micros(far) == 253_402_300_799_999_999
    assert micros(datetime(1970, 1, 1, tzinfo=UTC)) == 0


def test_an_object_has_expired_from_the_moment_named() -> None:
    """BT-5."""
    metadata = Metadata(time_expires=NOON)

    assert not expired(metadata, lambda: NOON - timedelta(microseconds=1))
    assert expired(metadata, lambda: NOON)


def test_what_never_expires_asks_no_clock() -> None:
    """The common case costs nothing."""

    def clock() -> datetime:
        raise AssertionError

    assert not expired(Metadata(), clock)


class TestPairs:
    """The form beside a payload in an object store (MD-8, MD-9)."""

    @staticmethod
    def read(pairs: dict[str, str]) -> Metadata:
        """Read *pairs* of an object that says nothing else about itself."""
        return decode_pairs(pairs, content_type="text/plain", compression=None, size=7)

    def test_absent_and_empty_values_are_left_out(self) -> None:
        assert encode_pairs(Metadata(filename="", origin="", size=7)) == {}

    def test_what_has_a_place_of_its_own_comes_from_there(self) -> None:
        """Content type, compression, size."""
        found = decode_pairs({}, content_type="image/png", compression="zstd", size=0)
        assert found == Metadata("image/png", compression="zstd", size=0)
        assert decode_pairs({}, content_type="x/y", compression="", size=0).compression is None

    def test_pairs_read_back(self) -> None:
        metadata = Metadata(
            "text/plain",
            TimeToLive(60),
            filename="naïve.txt",
            origin="203.0.113.7",
            custom={"expiration": "a custom name like ours", "sn-x": "", "": "x"},
            time_created=NOON,
            time_expires=NOON + timedelta(seconds=60, microseconds=5),
            size=7,
        )
        assert self.read(encode_pairs(metadata)) == metadata

    def test_pairs_of_others_are_ignored(self) -> None:
        assert self.read({"theirs": "x", "x-snm": "y", "x-sn-unknown": "z"}) == Metadata("text/plain", size=7)

    @pytest.mark.parametrize(
        "pairs",
        [
            {"x-sn-expiration": "for ever"},
            {"x-sn-expiration": "ttl:soon"},
            {"x-sn-time-created": "yesterday"},
            {"x-sn-version": "2"},
        ],
        ids=str,
    )
    def test_what_cannot_be_read_or_must_not_be_is_refused(self, pairs: dict[str, str]) -> None:
        with pytest.raises(BackendError):
            self.read(pairs)

    def test_what_is_no_text_or_no_time_is_refused(self) -> None:
        for metadata in (Metadata(custom={"a": "\ud800"}), Metadata(time_created=NOON.replace(tzinfo=None))):
            with pytest.raises(InvalidMetadata):
                encode_pairs(metadata)
