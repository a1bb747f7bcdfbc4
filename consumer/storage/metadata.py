"""The stored forms of metadata, and when an object counts as expired (pure).

Rows and files keep compact JSON (:func:`encode_metadata`); object stores keep pairs beside the payload, ``x-sn-…`` for
our fields and ``x-snme-…`` for custom ones (:func:`encode_pairs`; checklist MD-9), where people and other tools can
read them. Content type, compression and size have places of their own in an object store and are no pairs.

* Written: absent, manual and empty values are left out (checklist MD-8); times are RFC 3339 in UTC with all six digits
  of the microseconds (MD-7), so that equal metadata are equal bytes and the bytes can serve as a precondition.
* Read: fields this version does not know are ignored, so that a newer writer may add some. A change that an older
  reader must *not* ignore raises :data:`VERSION`; the version is left out while it is 1.
* Expired is absent: an object is gone from the very microsecond its ``time_expires`` names (BT-5, BT-7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from consumer.errors import BackendError, InvalidMetadata
from consumer.operations import Expiration, Metadata, TimeToIdle, TimeToLive

VERSION = 1
"""Newest stored form this module reads."""

FORBIDDEN_FOR = timedelta(days=1)
"""How long a forbidden revision stays forbidden: far beyond every deadline, lease and pause a late swap could come
from, short enough that the list stays small."""

PAIR_PREFIX = "x-sn-"
CUSTOM_PREFIX = "x-snme-"
"""What the names of pairs begin with: our own, and custom ones (MD-9). Neither is a prefix of the other."""
POSITION_KEPT = timedelta(hours=1)
"""How long the position of the last write outlives its object, by deletion or expiry: beyond every session, drain,
lease and time limit, so that a member taken for dead cannot bring the object back; short, as each costs a row."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_POLICIES: dict[str, type[TimeToLive | TimeToIdle]] = {TimeToLive.policy: TimeToLive, TimeToIdle.policy: TimeToIdle}


def now_utc() -> datetime:
    """Return the time of the wall clock, timezone-aware: the default clock of every backend."""
    return datetime.now(UTC)


def expired(metadata: Metadata, clock: Callable[[], datetime]) -> bool:
    """Tell whether the object is absent because its time has come; *clock* is asked only where there is a time."""
    return metadata.time_expires is not None and metadata.time_expires <= clock()


def micros(time: datetime) -> int:
    """Return *time* (aware) in whole microseconds since 1970, exactly; floats lose some."""
    return (time - _EPOCH) // _MICROSECOND


def from_micros(count: int) -> datetime:
    """Return the time so many microseconds after 1970.

    Raises:
        OverflowError: there is no such time.
    """
    return _EPOCH + count * _MICROSECOND


def encode_metadata(metadata: Metadata) -> bytes:
    """Return the stored form of *metadata*; deterministic.

    Raises:
        InvalidMetadata: a text is not valid Unicode, a number is beyond 64 bits, or a time has no timezone.
    """
    fields: dict[str, Any] = {"content_type": metadata.content_type}
    if (expiration := metadata.expiration) is not None:
        fields["expiration"] = {"policy": expiration.policy, "seconds": expiration.seconds}
    if metadata.compression:
        fields["compression"] = metadata.compression
    if metadata.filename:
        fields["filename"] = metadata.filename
    if metadata.origin:
        fields["origin"] = metadata.origin
    if metadata.custom:
        fields["custom"] = dict(metadata.custom)
    if metadata.time_created is not None:
        fields["time_created"] = _time_text(metadata.time_created)
    if metadata.time_expires is not None:
        fields["time_expires"] = _time_text(metadata.time_expires)
    if metadata.size is not None:
        fields["size"] = metadata.size
    try:
        return orjson.dumps(fields)
    except orjson.JSONEncodeError:
        raise InvalidMetadata("metadata is valid Unicode and its numbers fit 64 bits") from None


def decode_metadata(stored: bytes) -> Metadata:
    """Read metadata back from its stored form.

    Raises:
        BackendError: the bytes are damaged, or were written by a newer version in a form this one must not read.
    """
    try:
        fields = orjson.loads(stored)
        version = fields.get("version", 1)
        if version <= VERSION:
            return _from_fields(fields)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BackendError("stored metadata is unreadable") from None
    raise BackendError("stored metadata was written by a newer version")


def _from_fields(fields: dict[str, Any]) -> Metadata:
    created = fields.get("time_created")
    expires = fields.get("time_expires")
    expiration: Expiration | None = None
    if (policy := fields.get("expiration")) is not None:
        expiration = _POLICIES[policy["policy"]](policy["seconds"])
    return Metadata(
        content_type=fields["content_type"],
        expiration=expiration,
        compression=fields.get("compression"),
        filename=fields.get("filename"),
        origin=fields.get("origin"),
        custom=fields.get("custom") or {},
        time_created=None if created is None else datetime.fromisoformat(created),
        time_expires=None if expires is None else datetime.fromisoformat(expires),
        size=fields.get("size"),
    )


def encode_pairs(metadata: Metadata) -> dict[str, str]:
    """Return the pairs that an object store keeps beside the payload; deterministic.

    Raises:
        InvalidMetadata: a text is not valid Unicode, or a time has no timezone.
    """
    pairs = {f"{CUSTOM_PREFIX}{name}": value for name, value in metadata.custom.items()}
    own = {
        "expiration": None if metadata.expiration is None else _expiration_text(metadata.expiration),
        "filename": metadata.filename,
        "origin": metadata.origin,
        "time-created": None if metadata.time_created is None else _time_text(metadata.time_created),
        "time-expires": None if metadata.time_expires is None else _time_text(metadata.time_expires),
    }
    pairs |= {f"{PAIR_PREFIX}{name}": text for name, text in own.items() if text}
    try:
        for name, text in pairs.items():
            name.encode()
            text.encode()
    except UnicodeEncodeError:
        raise InvalidMetadata("metadata is valid Unicode, without lone surrogates") from None
    return pairs


def decode_pairs(pairs: Mapping[str, str], *, content_type: str, compression: str | None, size: int) -> Metadata:
    """Read metadata back from pairs and from what has a place of its own; pairs of others are ignored.

    Raises:
        BackendError: the pairs are damaged, or were written by a newer version in a form this one must not read.
    """
    own = {name.removeprefix(PAIR_PREFIX): text for name, text in pairs.items() if name.startswith(PAIR_PREFIX)}
    created, expires, expiration = own.get("time-created"), own.get("time-expires"), own.get("expiration")
    try:
        if int(own.get("version", "1")) <= VERSION:
            return Metadata(
                content_type=content_type,
                expiration=None if expiration is None else _expiration(expiration),
                compression=compression or None,
                filename=own.get("filename"),
                origin=own.get("origin"),
                custom={
                    name.removeprefix(CUSTOM_PREFIX): text
                    for name, text in pairs.items()
                    if name.startswith(CUSTOM_PREFIX)
                },
                time_created=None if created is None else datetime.fromisoformat(created),
                time_expires=None if expires is None else datetime.fromisoformat(expires),
                size=size,
            )
    except (KeyError, ValueError):
        raise BackendError("stored metadata is unreadable") from None
    raise BackendError("stored metadata was written by a newer version")


def _expiration_text(expiration: Expiration) -> str:
    """Return the policy as ``ttl:60s`` (MD-2)."""
    return f"{expiration.policy}:{expiration.seconds}s"


def _expiration(text: str) -> Expiration:
    policy, _, duration = text.partition(":")
    return _POLICIES[policy](int(duration.removesuffix("s")))


def _time_text(time: datetime) -> str:
    if time.tzinfo is not UTC:
        if time.tzinfo is None:
            raise InvalidMetadata("times are timezone-aware")
        time = time.astimezone(UTC)
    return f"{time.isoformat(timespec='microseconds')[:-6]}Z"  # the six are "+00:00"
