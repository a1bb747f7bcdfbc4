"""Who an object belongs to and where it is stored: context, object id, storage path (pure).

The storage path is ``usecase/name.value/…/objects/key``: one ``name.value`` segment per scope, in the order given,
because that order is part of the identity (checklist ID-1, ID-2). It is the row key of the high-volume tier and the
stem of every revision name of the long-term tier.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from consumer.errors import InvalidOperation

if TYPE_CHECKING:
    from collections.abc import Sequence

OBJECTS_SEGMENT = "objects"
"""The path segment between scopes and key. It has no dot, so no scope segment can look like it."""

SCOPES_MAX = 32
"""Most scopes a context may have (contract 2.1)."""

STORAGE_PATH_BYTES_MAX = 900
"""Longest storage path in UTF-8 bytes: with ``/`` and a 36-character revision it stays under the 1,024 bytes of a GCS
object name, with room for a configured prefix."""

_USECASE = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SCOPE_PART = re.compile(r"[A-Za-z0-9_\-()$!+']{1,256}")


def _matches(pattern: re.Pattern[str], text: object) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Scope:
    """One level of ownership, for example ``Scope("org", "17")``.

    Raises:
        InvalidOperation: *name* or *value* is not 1-256 of letters, digits and ``_-()$!+'``.
    """

    name: str
    value: str

    def __post_init__(self) -> None:
        if not _matches(_SCOPE_PART, self.name) or not _matches(_SCOPE_PART, self.value):
            raise InvalidOperation("scope names and values are 1 to 256 of letters, digits and _-()$!+'")


@dataclass(frozen=True, slots=True)
class ObjectContext:
    """Who an object belongs to: a usecase and an ordered sequence of scopes.

    Raises:
        InvalidOperation: the usecase is not 1-128 of letters, digits, ``_`` and ``-``, or there are over 32 scopes.
    """

    usecase: str
    scopes: tuple[Scope, ...] = ()
    storage_prefix: str = field(default="", repr=False, compare=False)
    """The storage path up to and including ``objects/``; computed, whatever is passed in."""

    def __init__(self, usecase: str, scopes: Sequence[Scope] = ()) -> None:
        if not _matches(_USECASE, usecase):
            raise InvalidOperation("a usecase is 1 to 128 of letters, digits, _ and -")
        if not all(isinstance(scope, Scope) for scope in scopes):
            raise InvalidOperation("scopes are a sequence of Scope(name, value)")
        if len(scopes) > SCOPES_MAX:
            raise InvalidOperation(f"at most {SCOPES_MAX} scopes are allowed")
        object.__setattr__(self, "usecase", usecase)
        object.__setattr__(self, "scopes", tuple(scopes))
        segments = (usecase, *[f"{scope.name}.{scope.value}" for scope in scopes], OBJECTS_SEGMENT, "")
        object.__setattr__(self, "storage_prefix", "/".join(segments))

    def __str__(self) -> str:
        """Public form: the scopes as ``name=value`` joined by ``;``, ``_`` when there are none (ID-7)."""
        scopes = ";".join(f"{scope.name}={scope.value}" for scope in self.scopes) or "_"
        return f"{self.usecase}/{scopes}"


def check_key(key: object) -> None:
    """Check an object key by itself.

    Raises:
        InvalidOperation: *key* is no text, is empty, has a control character (Unicode category Cc) or a lone surrogate.
    """
    if not isinstance(key, str):
        raise InvalidOperation("an object key is text")
    if not key:
        raise InvalidOperation("an object key is not empty")
    if key.isascii() and key.isprintable():
        return
    if any(unicodedata.category(character) == "Cc" for character in key):
        raise InvalidOperation("an object key has no control characters")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise InvalidOperation("an object key is valid Unicode, without lone surrogates") from None


@dataclass(frozen=True, slots=True)
class ObjectId:
    """The backend-independent address of an object: context and key. Keys may contain slashes.

    Raises:
        InvalidOperation: the key breaks a rule of :func:`check_key`, or the storage path is over 900 bytes.
    """

    context: ObjectContext
    key: str
    storage_path: str = ""
    """``usecase/name.value/…/objects/key``; computed, whatever is passed in."""

    def __init__(self, context: ObjectContext, key: str) -> None:
        check_key(key)
        path = context.storage_prefix + key
        if len(path) > STORAGE_PATH_BYTES_MAX or (
            not path.isascii() and len(path.encode()) > STORAGE_PATH_BYTES_MAX
        ):
            raise InvalidOperation(f"a storage path has at most {STORAGE_PATH_BYTES_MAX} bytes of UTF-8")
        object.__setattr__(self, "context", context)
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "storage_path", path)

    @classmethod
    def parse(cls, path: str) -> ObjectId:
        """Read a storage path back.

        Raises:
            InvalidOperation: no ``objects`` segment, empty usecase or key, a scope segment without a dot, or a part
                that breaks its own rule (checklist ID-5).
        """
        usecase, _, rest = path.partition("/")
        scopes: list[Scope] = []
        while True:
            segment, slash, rest = rest.partition("/")
            if not slash:
                raise InvalidOperation("a storage path is usecase/name.value/…/objects/key")
            if segment == OBJECTS_SEGMENT:
                return cls(ObjectContext(usecase, scopes), rest)
            name, dot, value = segment.partition(".")
            if not dot:
                raise InvalidOperation("a scope segment of a storage path is name.value")
            scopes.append(Scope(name, value))

    def __str__(self) -> str:
        return self.storage_path
