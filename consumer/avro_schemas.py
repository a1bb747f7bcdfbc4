"""Avro schemas: the two of this package, and the gate that foreign writer schemas have to pass.

:func:`read_schema` turns a schema's JSON into a :class:`Schema` that is safe to decode with:

1. **Bound** the text and the nesting of its JSON, before anything recursive looks at it.
2. **Take logical types off.** Times, decimals and UUIDs are read as the plain values of the wire: an absurd value in a
   field nobody reads must not fail a record (contract 2).
3. **Parse** with fastavro, which gives every named type its full name.
4. **Gate.** Each of the following lets a few bytes take down the reader (faults 4.3), so it is ``unsafe_schema``:
   a recursive type (the compiled reader overruns its stack: the process dies); an array or map whose items may take no
   bytes (five bytes stand for fifty million items); nesting deeper than the limit; more than 10,000 values in one datum
   without any array (a record of two records of two records… doubles with every level).

The gate's result is a *tree* of plain tuples, from which :mod:`consumer.prescan` makes its scanner. Named types are
resolved in it: the same type is the same tuple wherever it stands.

=====================================  =====================================================================
``("null",)`` … ``("string",)``        a primitive type, by its Avro name
``("enum", n)``                        *n* symbols
``("fixed", n)``                       *n* bytes
``("record", (child, …))``             its fields in order
``("union", (branch, …))``             its branches in order
``("array", item, size, weight)``      *size*: least bytes of an item, 1 or more; *weight*: what an item costs of the
``("map", value, size, weight)``       element limit: 1, and 1 for every value in it that takes no bytes
=====================================  =====================================================================
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import fastavro
from fastavro.schema import SchemaParseException, UnknownType, fingerprint, to_parsing_canonical_form

from consumer.errors import DecodeError

Tree: TypeAlias = tuple[Any, ...]

OPERATION_FINGERPRINT = "be92605264797cd6"
"""CRC-64-AVRO of ``operation.avsc`` v1, an unsigned number in 16 hex digits; a test holds it against the file."""
RESPONSE_FINGERPRINT = "5667bf23acafda0b"
"""As above, of ``response.avsc``; contract 2.3 names it."""

DEPTH_MAX = 64
"""Types inside one another, a record, array, map or union each counting as one. v1 has eight; ``limits.avro_depth``."""
SCHEMA_BYTES_MAX = 1024 * 1024
"""Longest text of a schema; the longest real ones are below 300 KB."""
VALUES_MAX = 10_000
"""Most values in a datum, arrays and maps counted as if empty, so that a small schema cannot ask for endless work."""

_PRIMITIVE_SIZES = {
    "null": 0,
    "boolean": 1,
    "int": 1,
    "long": 1,
    "float": 4,
    "double": 8,
    "bytes": 1,
    "string": 1,
}
"""Least bytes a value takes."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Schema:
    """A schema that has passed the gate. Each is equal to itself alone."""

    parsed: Any = field(repr=False)
    """As fastavro takes it, without logical types."""
    fingerprint: str
    """CRC-64-AVRO of the Parsing Canonical Form, an unsigned number in 16 hex digits."""
    tree: Tree = field(repr=False)
    """The resolved type; see the module's docstring."""


def schema_text(name: Literal["operation", "response"]) -> str:
    """Return ``schemas/NAME.avsc``: beside this module in a wheel, beside the package in a checkout."""
    package = Path(__file__).parent
    shipped = package / "schemas"
    folder = shipped if shipped.is_dir() else package.parent / "schemas"
    return (folder / f"{name}.avsc").read_text(encoding="utf-8")


@cache
def operation_schema() -> Schema:
    """Return the v1 operation's schema, read once."""
    return read_schema(schema_text("operation"))


@cache
def response_schema() -> Schema:
    """Return the v1 response's schema, read once."""
    return read_schema(schema_text("response"))


def read_schema(text: str, *, depth_max: int = DEPTH_MAX) -> Schema:
    """Read a schema's JSON.

    Args:
        text: Self-contained: every named type is defined where it first stands.
        depth_max: Deepest nesting of types allowed, at least 1.

    Raises:
        DecodeError: ``unsafe_schema``: not a schema, or refused by the gate.
    """
    if len(text) > SCHEMA_BYTES_MAX:
        raise _unsafe(f"a schema has at most {SCHEMA_BYTES_MAX} characters")
    try:
        definition = json.loads(text)
    except (ValueError, RecursionError):
        raise _unsafe("a schema is JSON") from None
    # One type takes up to four levels of JSON: record, fields, field, union.
    if _nests_deeper(definition, 4 * depth_max + 4):
        raise _unsafe(f"types are nested deeper than {depth_max}")
    definition = _without_logical_types(definition)
    try:
        parsed = fastavro.parse_schema(definition, named_schemas={})
        crc = fingerprint(to_parsing_canonical_form(definition), "CRC-64-AVRO")
    except (SchemaParseException, UnknownType, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
        raise _unsafe("not an Avro schema") from None
    # fastavro gives the fingerprint's bytes in the order of the wire, lowest first.
    return Schema(parsed, bytes.fromhex(crc)[::-1].hex(), _Gate(depth_max).check(parsed))


def _unsafe(message: str) -> DecodeError:
    return DecodeError(message, code="unsafe_schema")


def _nests_deeper(definition: object, levels: int) -> bool:
    """Tell whether containers of *definition* stand more than *levels* inside one another; without recursion."""
    inside: list[object] = [definition]
    for _ in range(levels):
        inside = [
            part
            for container in inside
            if isinstance(container, dict | list)
            for part in (container.values() if isinstance(container, dict) else container)
        ]
    return any(isinstance(part, dict | list) for part in inside)


def _without_logical_types(definition: Any) -> Any:
    """Return *definition* without ``logicalType``, except inside default values."""
    if isinstance(definition, list):
        return [_without_logical_types(part) for part in definition]
    if isinstance(definition, dict):
        return {
            name: part if name == "default" else _without_logical_types(part)
            for name, part in definition.items()
            if name != "logicalType"
        }
    return definition


@dataclass(frozen=True, slots=True)
class _Type:
    """What the gate knows of one type: *size* in least bytes, *values* and *empty* ones at most, and nested *depth*."""

    tree: Tree
    size: int
    values: int
    empty: int
    depth: int


class _Gate:
    """Walks a parsed schema once; every named type is looked at once, however often it is used."""

    def __init__(self, depth_max: int) -> None:
        self._depth_max = depth_max
        self._named: dict[str, _Type | None] = {}
        """None: being looked at now."""

    def check(self, parsed: Any) -> Tree:
        """Return the tree of *parsed*, or raise ``unsafe_schema``."""
        return self._walk(parsed).tree

    def _walk(self, parsed: Any) -> _Type:
        found = self._type(parsed)
        if found.depth > self._depth_max:
            raise _unsafe(f"types are nested deeper than {self._depth_max}")
        if found.values > VALUES_MAX:
            raise _unsafe(f"a datum has more than {VALUES_MAX} values")
        return found

    def _type(self, parsed: Any) -> _Type:
        if isinstance(parsed, list):
            branches = [self._walk(branch) for branch in parsed]
            if not branches:
                raise _unsafe("a union has no branch")
            return _Type(
                ("union", tuple(branch.tree for branch in branches)),
                1 + min(branch.size for branch in branches),
                1 + max(branch.values for branch in branches),
                max(branch.empty for branch in branches),
                1 + max(branch.depth for branch in branches),
            )
        if isinstance(parsed, str):
            return self._name(parsed)
        kind: str = parsed["type"]
        if kind in {"array", "map"}:
            return self._collection(kind, parsed)
        if kind in {"record", "error", "enum", "fixed"}:
            return self._definition(kind, parsed)
        return self._name(kind)

    def _name(self, name: str) -> _Type:
        if name in _PRIMITIVE_SIZES:
            size = _PRIMITIVE_SIZES[name]
            return _Type((name,), size, 1, int(size == 0), 0)
        found = self._named.get(name)
        if found is None:
            raise _unsafe("a type contains itself" if name in self._named else "a type is not defined")
        return found

    def _collection(self, kind: str, parsed: Any) -> _Type:
        item = self._walk(parsed["items" if kind == "array" else "values"])
        if item.size == 0:
            raise _unsafe("items of an array or map may take no bytes")
        size = item.size + (kind == "map")  # a map's items begin with a key
        return _Type((kind, item.tree, size, 1 + item.empty), 1, 1, 0, 1 + item.depth)

    def _definition(self, kind: str, parsed: Any) -> _Type:
        name: str = parsed["name"]
        self._named[name] = None
        if kind == "enum":
            found = _Type(("enum", len(parsed["symbols"])), 1, 1, 0, 0)
        elif kind == "fixed":
            size = parsed["size"]
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise _unsafe("a fixed type has a size")
            found = _Type(("fixed", size), size, 1, int(size == 0), 0)
        else:
            fields = [self._walk(part["type"]) for part in parsed["fields"]]
            size = sum(part.size for part in fields)
            found = _Type(
                ("record", tuple(part.tree for part in fields)),
                size,
                1 + sum(part.values for part in fields),
                sum(part.empty for part in fields) + (size == 0),
                1 + max((part.depth for part in fields), default=0),
            )
        self._named[name] = found
        return found
