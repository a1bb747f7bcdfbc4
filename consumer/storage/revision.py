"""Revision names: make and parse (pure but for the clock and the random bits of a UUIDv7).

A revision is one immutable long-term write of an object. Its name is the object's storage path, ``/``, and a UUIDv7
(checklist TIER-1): names sort by time, are never used twice, and say which object they belong to.
"""

from __future__ import annotations

import os
import time
from uuid import RFC_4122, UUID

from consumer.errors import InvalidOperation
from consumer.ids import ObjectId
from consumer.storage.backend import Revision

_VERSION_AND_VARIANT = 0x7000_8000_0000_0000_0000
"""Version 7 in bits 76-79, the RFC's variant ``10`` in bits 62-63."""
_RANDOM = 0x0FFF_3FFF_FFFF_FFFF_FFFF
"""The 74 bits that are left for chance."""


def uuid7() -> UUID:
    """Return a UUIDv7 (RFC 9562, 5.7): 48 bits of milliseconds since the epoch, 74 random bits.

    Within a millisecond, and when the wall clock is set back, order is lost; uniqueness is not.
    """
    milliseconds = (time.time_ns() // 1_000_000) & 0xFFFF_FFFF_FFFF
    chance = int.from_bytes(os.urandom(10), "big") & _RANDOM
    return UUID(int=milliseconds << 80 | _VERSION_AND_VARIANT | chance)


def new_revision(object_id: ObjectId) -> Revision:
    """Return a name for the next long-term write of *object_id*; two calls never return the same (TIER-1)."""
    return Revision(f"{object_id.storage_path}/{uuid7()}")


def parse_revision(name: str) -> tuple[ObjectId, UUID]:
    """Read a revision name back: whose write it is, and its UUIDv7.

    Raises:
        InvalidOperation: *name* is not a storage path followed by ``/`` and a UUIDv7 in its canonical form.
    """
    path, _, last = name.rpartition("/")
    try:
        unique = UUID(last)
    except ValueError:
        raise InvalidOperation("a revision name ends in a UUIDv7") from None
    if str(unique) != last or unique.version != 7 or unique.variant != RFC_4122:
        raise InvalidOperation("a revision name ends in a UUIDv7")
    return ObjectId.parse(path), unique
