"""What is asked and what is answered: operations, responses, metadata (pure values).

Four operations, one response each (checklist OP-1 … OP-9). A missing object is a success with nothing in it. Values
are frozen; whoever reads one may keep it. Validation of metadata is :meth:`Metadata.validate`, run before a permit is
taken (SVC-3); ids and keys validate themselves when an :class:`~consumer.ids.ObjectId` is made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from operator import index
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeAlias

from consumer.errors import InvalidMetadata
from consumer.ids import ObjectContext, ObjectId

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind: TypeAlias = Literal["insert", "get", "delete", "head"]
Permission: TypeAlias = Literal["read", "write", "delete"]

CONTENT_TYPE_DEFAULT = "application/octet-stream"
EXPIRATION_SECONDS_MAX = 315_360_000
"""Ten years of 365 days: the longest time to live or to idle (contract 2.1)."""
CUSTOM_PAIRS_MAX = 64
CUSTOM_BYTES_MAX = 7 * 1024
"""GCS allows 8 KiB of custom metadata per object; the built-in fields need the rest."""

_WORD = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # a "token" of RFC 9110, 5.6.2
_MEDIA_TYPE = re.compile(
    rf"{_WORD}/{_WORD}(?:[ \t]*;[ \t]*{_WORD}=(?:{_WORD}|\"(?:[^\"\\\x00-\x1f\x7f]|\\[ -~])*\"))*[ \t]*"
)


@dataclass(frozen=True, slots=True)
class TimeToLive:
    """Expire a fixed number of *seconds* (1 to 315,360,000) after the write."""

    policy: ClassVar[str] = "ttl"
    seconds: int


@dataclass(frozen=True, slots=True)
class TimeToIdle:
    """Expire *seconds* (1 to 315,360,000) after the last write or read; reads extend the expiry."""

    policy: ClassVar[str] = "tti"
    seconds: int


Expiration: TypeAlias = TimeToLive | TimeToIdle


@dataclass(frozen=True, slots=True)
class PayloadReference:
    """A claim check: the payload lies at *uri* (``gs://BUCKET/NAME`` or ``file:///PATH``)."""

    uri: str
    size: int | None = None
    """Bytes, when known; checked while reading."""
    crc32c: int | None = None
    """CRC-32C (Castagnoli) of the payload, 0 to 4294967295, when known; checked while reading."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where in an ordered input an operation came from; positions of one *source* can be compared, others cannot."""

    source: str
    """The partition, with its topic and cluster."""
    offset: int
    """0 or more; later operations have higher ones."""


_NO_CUSTOM: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Metadata:
    """What is known about an object beside its bytes.

    ``time_created``, ``time_expires`` and ``size`` are read-only: storage stamps them, values given with an insert are
    ignored (checklist MD-5). Times are timezone-aware (UTC).
    """

    content_type: str = CONTENT_TYPE_DEFAULT
    expiration: Expiration | None = None
    compression: str | None = None
    filename: str | None = None
    origin: str | None = None
    custom: Mapping[str, str] = field(default_factory=lambda: _NO_CUSTOM)
    time_created: datetime | None = None
    time_expires: datetime | None = None
    size: int | None = None
    """Bytes as stored."""

    def validate(self) -> None:
        """Check every rule of contract 2.1.

        Raises:
            InvalidMetadata: the first rule broken.
        """
        if self is DEFAULT_METADATA:
            return
        try:
            self._check()
        except UnicodeEncodeError:
            raise InvalidMetadata("metadata is valid Unicode, without lone surrogates") from None
        except (TypeError, AttributeError):
            raise InvalidMetadata("a field of the metadata is not of its type") from None

    def _check(self) -> None:
        if self.content_type != CONTENT_TYPE_DEFAULT and not _MEDIA_TYPE.fullmatch(self.content_type):
            raise InvalidMetadata("content_type is a media type such as text/plain")
        if self.compression is not None and self.compression != "zstd":
            raise InvalidMetadata("compression is null or zstd")
        if self.expiration is not None and not 1 <= index(self.expiration.seconds) <= EXPIRATION_SECONDS_MAX:
            raise InvalidMetadata(f"expiration seconds are 1 to {EXPIRATION_SECONDS_MAX}")
        if self.custom:
            if len(self.custom) > CUSTOM_PAIRS_MAX:
                raise InvalidMetadata(f"at most {CUSTOM_PAIRS_MAX} custom pairs are allowed")
            if sum(_utf8_bytes(name) + _utf8_bytes(value) for name, value in self.custom.items()) > CUSTOM_BYTES_MAX:
                raise InvalidMetadata(f"custom metadata has at most {CUSTOM_BYTES_MAX} bytes of UTF-8")
        for text in (self.filename, self.origin):
            if text is not None:
                _utf8_bytes(text)


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


DEFAULT_METADATA = Metadata()
"""The metadata of an insert that gives none; shared, because it is frozen."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as read: metadata and payload. The debug form never shows the payload (checklist OP-10)."""

    metadata: Metadata
    payload: bytes | PayloadReference = field(repr=False)


@dataclass(frozen=True, slots=True)
class Insert:
    """Store *payload* under *key*; without a key storage generates one (checklist OP-12)."""

    kind: ClassVar[Kind] = "insert"
    permission: ClassVar[Permission] = "write"
    context: ObjectContext
    key: str | None
    metadata: Metadata
    payload: bytes | PayloadReference = field(repr=False)
    position: Position | None = field(default=None, repr=False, compare=False)
    """Where it came from; None = nowhere that has an order. No part of what is asked."""


@dataclass(frozen=True, slots=True)
class Get:
    """Read an object, payload and metadata."""

    kind: ClassVar[Kind] = "get"
    permission: ClassVar[Permission] = "read"
    context: ObjectContext
    key: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove an object; removing a missing one is a success."""

    kind: ClassVar[Kind] = "delete"
    permission: ClassVar[Permission] = "delete"
    context: ObjectContext
    key: str
    position: Position | None = field(default=None, repr=False, compare=False)
    """As that of an insert."""


@dataclass(frozen=True, slots=True)
class Head:
    """Read an object's metadata only."""

    kind: ClassVar[Kind] = "head"
    permission: ClassVar[Permission] = "read"
    context: ObjectContext
    key: str


Operation: TypeAlias = Insert | Get | Delete | Head


@dataclass(frozen=True, slots=True)
class Inserted:
    """The object is stored; *id* carries the generated key if none was given (checklist OP-5)."""

    kind: ClassVar[Kind] = "insert"
    id: ObjectId
    metadata: Metadata

    @property
    def key(self) -> str:
        """The object's key, given or generated."""
        return self.id.key


@dataclass(frozen=True, slots=True)
class Got:
    """The object, or nothing where there is none."""

    kind: ClassVar[Kind] = "get"
    key: str
    object: StoredObject | None


@dataclass(frozen=True, slots=True)
class Deleted:
    """The object is gone, or was never there."""

    kind: ClassVar[Kind] = "delete"
    key: str


@dataclass(frozen=True, slots=True)
class Headed:
    """The object's metadata, or nothing where there is no object."""

    kind: ClassVar[Kind] = "head"
    key: str
    metadata: Metadata | None


OpResponse: TypeAlias = Inserted | Got | Deleted | Headed


class Unread(bytes):
    """Empty, in place of the value of a record that was too large to be read; the reason says of what."""

    reason: str

    def __new__(cls, reason: str) -> Self:
        """Make one, to be answered ``payload_too_large`` with this *reason*."""
        made = super().__new__(cls)
        made.reason = reason
        return made
