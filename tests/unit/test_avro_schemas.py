"""The schemas' fingerprints, and the gate that writer schemas have to pass before anything is decoded with them."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

import wire
from consumer.avro_schemas import (
    OPERATION_FINGERPRINT,
    RESPONSE_FINGERPRINT,
    SCHEMA_BYTES_MAX,
    VALUES_MAX,
    Schema,
    operation_schema,
    read_schema,
    response_schema,
    schema_text,
)
from consumer.errors import DecodeError


def record(name: str, *types: Any) -> dict[str, Any]:
    """A record type with a field of each of *types*."""
    return {
        "type": "record",
        "name": name,
        "fields": [{"name": f"f{number}", "type": kind} for number, kind in enumerate(types)],
    }


def array(items: Any) -> dict[str, Any]:
    """An array type."""
    return {"type": "array", "items": items}


def nested(levels: int) -> Any:
    """A number inside *levels* arrays."""
    schema: Any = "long"
    for _ in range(levels):
        schema = array(schema)
    return schema


def doubling(levels: int, leaf: str) -> Any:
    """A record of two records of two records…: *levels* deep, ``2 ** levels`` leaves, a few hundred bytes of JSON."""
    schema: Any = record("R0", leaf, leaf)
    for level in range(1, levels):
        schema = record(f"R{level}", schema, f"R{level - 1}")
    return schema


def read(schema: Any, **limits: int) -> Schema:
    """Put a schema through the gate."""
    return read_schema(json.dumps(schema), **limits)


class TestTheSchemasOfThisPackage:
    """The two schemas that ship with the package."""

    def test_the_response_has_the_fingerprint_of_the_contract(self) -> None:
        """Contract 2.3: CRC-64-AVRO of the Parsing Canonical Form, unsigned, 16 hex digits."""
        assert response_schema().fingerprint == RESPONSE_FINGERPRINT == "5667bf23acafda0b"

    def test_fingerprints_are_those_of_an_independent_implementation(self) -> None:
        assert operation_schema().fingerprint == OPERATION_FINGERPRINT == wire.fingerprint("operation")[::-1].hex()
        assert response_schema().fingerprint == wire.fingerprint("response")[::-1].hex()

    def test_a_schema_is_read_once(self) -> None:
        assert operation_schema() is operation_schema()
        assert response_schema() is response_schema()

    def test_documentation_does_not_change_a_fingerprint(self) -> None:
        """Aliases, comments and layout are no part of the Parsing Canonical Form."""
        schema = json.loads(schema_text("operation"))
        schema["doc"] = "something else"
        schema["aliases"] = ["Request"]

        assert read(schema).fingerprint == OPERATION_FINGERPRINT

    def test_an_added_field_changes_it(self) -> None:
        schema = json.loads(schema_text("operation"))
        schema["fields"].append({"name": "later", "type": ["null", "string"], "default": None})

        assert read(schema).fingerprint != OPERATION_FINGERPRINT

    def test_logical_types_are_taken_off(self) -> None:
        """Contract 2: all times are taken as plain longs."""
        assert "logicalType" in schema_text("operation")
        assert "logicalType" not in json.dumps(operation_schema().parsed, default=str)

    def test_a_default_that_looks_like_a_logical_type_stays(self) -> None:
        custom = {"type": "map", "values": "string"}
        schema = {
            "type": "record",
            "name": "R",
            "fields": [{"name": "f", "type": custom, "default": {"logicalType": "date"}}],
        }

        assert read(schema).parsed["fields"][0]["default"] == {"logicalType": "date"}


UNSAFE: dict[str, Any] = {
    "a record that holds itself": record("R", "long", ["null", "R"]),
    "a record that is itself": record("R", "R"),
    "a record in a list of itself": record("R", array("R")),
    "a record in a map of itself": record("R", {"type": "map", "values": "R"}),
    "a record that holds itself two levels down": record("A", record("B", ["null", "A"])),
    "an array of null": array("null"),
    "an array of empty records": array(record("Empty")),
    "an array of records of nulls": array(record("R", "null", record("S", "null"))),
    "an array of nothing, fixed": array({"type": "fixed", "name": "F", "size": 0}),
    "a map of null": {"type": "map", "values": "null"},
    "an array of null inside a union inside a record": record("R", "long", ["null", array("null")]),
    "a thousand arrays in one another": nested(900),
    "a union without branches": record("R", []),
    "a record of twice as many at each level": doubling(30, "null"),
    "the same, of numbers": doubling(30, "long"),
    "a fixed type of negative size": {"type": "fixed", "name": "F", "size": -1},
    "a fixed type of a size that is no number": {"type": "fixed", "name": "F", "size": "4"},
    "an unknown type": {"type": "record", "name": "R", "fields": [{"name": "f", "type": "Elsewhere"}]},
    "a type used before it is defined": record("R", "S", record("S", "long")),
    "no type": {"name": "R"},
    "a list of nothing": [],
    "a number": 7,
    "null": None,
    "a type in a type": {"type": {"type": "string"}},
    "fields that are no list": {"type": "record", "name": "R", "fields": 7},
    "an enum without symbols listed": {"type": "enum", "name": "E"},
    "an array of what": {"type": "array"},
}


class TestTheGate:
    """What is refused, and what is not."""

    @pytest.mark.parametrize("name", UNSAFE)
    def test_a_schema_that_could_harm_the_reader_is_refused(self, name: str) -> None:
        """Faults 4.3; contract 2.2 `unsafe_schema`: refused before a byte is read with it."""
        with pytest.raises(DecodeError) as caught:
            read(UNSAFE[name])

        assert caught.value.code == "unsafe_schema"
        assert 0 < len(str(caught.value)) < 100

    @pytest.mark.parametrize(
        "text", ["", "{", "[" * 100_000, '{"type": ' * 50_000, "nul", "\x00", '"' + "x" * SCHEMA_BYTES_MAX]
    )
    def test_what_is_not_json_or_too_long_is_refused(self, text: str) -> None:
        with pytest.raises(DecodeError) as caught:
            read_schema(text)

        assert caught.value.code == "unsafe_schema"

    @pytest.mark.parametrize("limit", [1, 8, 64])
    def test_types_may_nest_as_deep_as_the_limit_and_no_deeper(self, limit: int) -> None:
        """Contract 6, `limits.avro_depth`."""
        assert read(nested(limit), depth_max=limit).tree[0] == "array"
        with pytest.raises(DecodeError, match=f"deeper than {limit}"):
            read(nested(limit + 1), depth_max=limit)

    def test_our_own_schemas_pass_with_room_to_spare(self) -> None:
        """Contract 6: the default depth is 64; v1 needs eight levels."""
        assert read_schema(schema_text("operation"), depth_max=8).fingerprint == OPERATION_FINGERPRINT
        assert read_schema(schema_text("response"), depth_max=8).fingerprint == RESPONSE_FINGERPRINT

    def test_a_datum_may_have_as_many_values_as_the_limit(self) -> None:
        fields = ["long"] * (VALUES_MAX - 1)

        assert len(read(record("R", *fields)).tree[1]) == VALUES_MAX - 1
        with pytest.raises(DecodeError, match="values"):
            read(record("R", *fields, "long"))

    def test_a_type_used_twice_is_not_recursive(self) -> None:
        tree = read(record("R", record("S", "string"), "S", array("S"), ["null", "S"])).tree

        assert tree[1][0] is tree[1][1] is tree[1][2][1] is tree[1][3][1][1]

    def test_names_are_resolved_within_their_namespace(self) -> None:
        """The same short name in two namespaces is two types; neither holds itself."""
        inner = {**record("R", "long"), "namespace": "inner"}
        outer = {**record("R", inner, ["null", "inner.R"]), "namespace": "outer"}

        leaf = ("record", (("long",),))
        assert read(outer).tree == ("record", (leaf, ("union", (("null",), leaf))))

    def test_the_tree_says_how_small_and_how_costly_an_item_is(self) -> None:
        """An item's values that take no bytes count against the element limit, others only once."""
        items = record("R", "string", "null", record("S", "null"), ["null", "double"], "double")

        kind, _, size, weight = read(array(items)).tree

        assert (kind, size) == ("array", 1 + 1 + 8)
        assert weight == 1 + 1 + 2 + 1
        assert read({"type": "map", "values": "long"}).tree[2:] == (2, 1)

    @pytest.mark.parametrize(
        ("schema", "tree"),
        [
            ("string", ("string",)),
            ({"type": "string"}, ("string",)),
            ({"type": "enum", "name": "E", "symbols": ["A", "B"]}, ("enum", 2)),
            ({"type": "fixed", "name": "F", "size": 16}, ("fixed", 16)),
            ({"type": "error", "name": "E", "fields": []}, ("record", ())),
            (["null", "int"], ("union", (("null",), ("int",)))),
        ],
    )
    def test_every_way_to_write_a_type_is_understood(self, schema: Any, tree: Any) -> None:
        assert read(schema).tree == tree

    def test_no_mutilated_schema_raises_anything_else(self) -> None:
        """Both of our schemas with parts replaced at random: a schema, or `unsafe_schema`."""
        chance = random.Random(17)
        empty = {"type": "array", "items": "null"}
        parts: list[Any] = [None, 7, -1, "", "null", "R", [], {}, ["null"], empty, True, 1.5, {"type": []}]

        def spoil(part: Any) -> Any:
            if chance.random() < 0.02:
                return chance.choice(parts)
            if isinstance(part, dict):
                return {name: spoil(value) for name, value in part.items()}
            return [spoil(value) for value in part] if isinstance(part, list) else part

        schemas = [json.loads(schema_text(name)) for name in ("operation", "response")]
        outcomes = set()
        for number in range(2000):
            try:
                outcomes.add(type(read(spoil(schemas[number % 2]))).__name__)
            except DecodeError as error:
                outcomes.add(error.code)

        assert outcomes == {"Schema", "unsafe_schema"}
