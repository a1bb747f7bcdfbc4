"""Payloads that do not fit a response: handed out by reference, and readable for a while after.

**A revision of the long-term tier** is referred to as it is. Once it is replaced or deleted it stays for the retention
(:mod:`consumer.storage.change_log`), so that whoever has just been referred to it can still read it.

**An inline object** is copied to the long-term tier first, below ``responses/``:

1. The copy's name follows from what it holds (object, time of the write, size, CRC-32C) and from the current *period*,
   as long as the retention. So an object that is read often is copied once a period, by whichever process comes first,
   and a replayed read refers to the same copy.
2. It is there already: no upload.
3. Else upload it, to expire one retention after the end of its period: it is readable for one to two retentions, and
   its name is used no more when it expires. Expiry removes it, as it does any expired revision; no row points to it and
   no change log entry names it, so a process may die at any step.

A reference says size and CRC-32C. It does not outlive the object's own expiry, which the metadata beside it tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, cast
from uuid import RFC_4122, UUID

import google_crc32c

from consumer.errors import BackendError, BackendUnavailable, ConfigError
from consumer.ids import ObjectId
from consumer.operations import PayloadReference, StoredObject
from consumer.storage.backend import LongTermBackend, ReferencedTier, Revision
from consumer.storage.metadata import from_micros, micros, now_utc

if TYPE_CHECKING:
    from consumer.operations import Metadata

PREFIX = "responses/"
"""What the names of copies begin with. They cannot be taken for an object's revision: those end in a UUIDv7."""

_VERSION_AND_VARIANT = 0x8000_8000_0000_0000_0000
"""Version 8 (made from what it names) in bits 76-79, the RFC's variant ``10`` in bits 62-63."""
_FREE = ~0xF000_C000_0000_0000_0000 & (1 << 128) - 1
"""The bits that are left."""


def is_copy(name: str) -> bool:
    """Tell whether a name in the long-term tier is that of a copy made for a response (pure)."""
    if not name.startswith(PREFIX):
        return False
    try:
        unique = UUID(name.rpartition("/")[2])
    except ValueError:
        return False
    return unique.version == 8 and unique.variant == RFC_4122


class Handouts:
    """Gives references to payloads in one long-term tier.

    Args:
        long_term: The tier; it has to be one that others can read.
        retention: How long what was referred to stays readable; above zero.
        clock: The wall clock, UTC.

    Raises:
        ConfigError: nobody else can read this tier.
    """

    def __init__(
        self, long_term: LongTermBackend, retention: timedelta, *, clock: Callable[[], datetime] = now_utc
    ) -> None:
        if getattr(long_term, "reference", None) is None:
            raise ConfigError("references.in_responses: nobody else can read this long-term tier")
        self.retention = retention
        self._long_term = long_term
        self._refer = cast("ReferencedTier", long_term).reference
        self._clock = clock

    async def to_revision(self, revision: Revision) -> PayloadReference | None:
        """Refer to a revision; None where it is gone.

        Raises:
            BackendUnavailable, BackendError: as the tier says.
        """
        return await self._refer(revision)

    async def to_inline(self, object_id: ObjectId, found: StoredObject) -> PayloadReference:
        """Refer to a copy of an inline object, made where there is none.

        Raises:
            BackendUnavailable, BackendError: as the tier says.

        Cancellation: a copy may be there or not; it expires by itself.
        """
        payload = found.payload
        assert isinstance(payload, bytes), "an inline object has its payload in its row"
        crc32c = google_crc32c.value(payload)
        period = micros(self._clock()) // (self.retention // timedelta(microseconds=1))
        copy = _copy_name(object_id, found.metadata, crc32c, period)
        reference = await self._refer(copy)
        if reference is None:
            expires = from_micros((period + 2) * (self.retention // timedelta(microseconds=1)))
            await self._long_term.put(copy, replace(found.metadata, expiration=None, time_expires=expires), payload)
            reference = await self._refer(copy)
        if reference is None:
            raise BackendUnavailable("a copy made for a response is gone at once")
        if (reference.size, reference.crc32c) != (len(payload), crc32c):
            raise BackendError("a copy made for a response is not what it was made from")
        return reference


def _copy_name(object_id: ObjectId, metadata: Metadata, crc32c: int, period: int) -> Revision:
    created = 0 if metadata.time_created is None else micros(metadata.time_created)
    digest = hashlib.blake2b(f"{period}/{created}/{metadata.size}/{crc32c}".encode(), digest_size=16).digest()
    unique = UUID(int=int.from_bytes(digest) & _FREE | _VERSION_AND_VARIANT)
    return Revision(f"{PREFIX}{object_id.storage_path}/{unique}")
