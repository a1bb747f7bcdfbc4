"""`schema`: what is printed, which schemas understand each other, and registering one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import avro.compatibility
import avro.schema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_runner import Tierstream
from consumer.avro_schemas import read_schema
from consumer.cli import schemas
from consumer.cli.schemas import misunderstandings
from registry_stub import Canned, StandingRegistry, json_of
from service_process import ROOT

SCHEMAS = ROOT / "schemas"


@pytest.fixture
def tierstream(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Tierstream:
    """The command."""
    return Tierstream(monkeypatch, capfd, tmp_path)


def record(*fields: dict[str, Any], name: str = "R", **more: Any) -> dict[str, Any]:
    """Return a record type."""
    return {"type": "record", "name": name, "fields": list(fields), **more}


def field(name: str, kind: Any, **more: Any) -> dict[str, Any]:
    """Return a field."""
    return {"name": name, "type": kind, **more}


def enum(*symbols: str, **more: Any) -> dict[str, Any]:
    """Return an enum type."""
    return {"type": "enum", "name": "E", "symbols": list(symbols), **more}


def problems(reader: Any, writer: Any) -> list[str]:
    """Return what the reader cannot read."""
    return list(misunderstandings(read_schema(json.dumps(reader)).parsed, read_schema(json.dumps(writer)).parsed))


def oracle(reader: Any, writer: Any) -> bool:
    """Ask Apache's library."""
    found = avro.compatibility.ReaderWriterCompatibilityChecker().get_compatibility(
        avro.schema.parse(json.dumps(reader)), avro.schema.parse(json.dumps(writer))
    )
    return bool(found.compatibility == avro.compatibility.SchemaCompatibilityType.compatible)


class TestShow:
    """`schema show`."""

    @pytest.mark.parametrize("name", ["operation", "response"])
    def test_it_is_the_file(self, tierstream: Tierstream, name: str) -> None:
        """To be redirected into one; `--json` says the same."""
        said, as_json = tierstream("schema", "show", name), tierstream("schema", "show", name, "--json")

        assert said.code == 0
        assert said.out.strip() == (SCHEMAS / f"{name}.avsc").read_text(encoding="utf-8").strip()
        assert as_json.json == json.loads((SCHEMAS / f"{name}.avsc").read_text(encoding="utf-8"))

    def test_the_fingerprint_is_the_headers(self, tierstream: Tierstream) -> None:
        """Contract 2.3."""
        assert tierstream("schema", "show", "response", "--fingerprint").out == "5667bf23acafda0b\n"
        assert tierstream("schema", "show", "--fingerprint", "--json").json["name"] == "operation"

    def test_another_name_is_usage(self, tierstream: Tierstream) -> None:
        """Contract 11."""
        assert tierstream("schema", "show", "request").code == 2


UNDERSTOOD = [
    pytest.param("long", "int", id="promotion"),
    pytest.param("double", "float", id="promotion of floats"),
    pytest.param("bytes", "string", id="text as bytes"),
    pytest.param({"type": "long"}, "int", id="a wrapped type"),
    pytest.param(["null", "string"], "string", id="into a union"),
    pytest.param(["null", "string"], ["string"], id="a smaller union"),
    pytest.param("string", ["string"], id="out of a union of one"),
    pytest.param({"type": "array", "items": "long"}, {"type": "array", "items": "int"}, id="items"),
    pytest.param({"type": "map", "values": "long"}, {"type": "map", "values": "int"}, id="values"),
    pytest.param(record(field("a", "int")), record(field("a", "int"), field("b", "int")), id="a field dropped"),
    pytest.param(record(field("b", "int", default=1), field("a", "int")), record(field("a", "int")), id="a default"),
    pytest.param(
        record(field("b", "int", aliases=["a"])), record(field("a", "int")), id="an alias of a field"
    ),
    pytest.param(enum("A", "B"), enum("A"), id="symbols added"),
    pytest.param(enum("A", default="A"), enum("A", "B"), id="symbols dropped, with a default"),
    pytest.param(
        record(field("a", record(name="n.X")), field("b", "n.X")),
        record(field("a", record(name="n.X")), field("b", "n.X")),
        id="a type used twice",
    ),
]

MISUNDERSTOOD = [
    pytest.param("int", "long", "the schema: long is not int", id="narrowing"),
    pytest.param("string", "int", "the schema: int is not string", id="another type"),
    pytest.param("string", ["null", "string"], "the schema: null is not string", id="a branch too many"),
    pytest.param(["null", "string"], ["null", "int"], "the schema: int is none of", id="another branch"),
    pytest.param(record(field("b", "int")), record(), "b: is not written, and has no default", id="no default"),
    pytest.param(
        record(field("a", record(field("x", "int"), name="X"))),
        record(field("a", record(field("x", "string"), name="X"))),
        "a.x: string is not int",
        id="deep inside",
    ),
    pytest.param(record(name="R"), record(name="S"), "the schema: record S is not record R", id="another name"),
    pytest.param(enum("A"), enum("A", "B", "C"), "the schema: symbols B, C are not known", id="symbols"),
    pytest.param(
        {"type": "fixed", "name": "F", "size": 2},
        {"type": "fixed", "name": "F", "size": 3},
        "the schema: 3 bytes are not 2",
        id="sizes",
    ),
    pytest.param(
        record(field("a", {"type": "array", "items": ["null", record(field("x", "int"), name="X")]})),
        record(field("a", {"type": "array", "items": ["null", record(name="X")]})),
        "a[].x: is not written, and has no default",
        id="in a branch of its name",
    ),
    pytest.param(
        {"type": "map", "values": "int"}, {"type": "map", "values": "string"}, "{}: string is not int", id="values"
    ),
]


class TestResolution:
    """Which writers a reader understands."""

    @pytest.mark.parametrize(("reader", "writer"), UNDERSTOOD)
    def test_what_the_rules_allow_is_understood(self, reader: Any, writer: Any) -> None:
        """Avro specification, schema resolution; Apache's library agrees."""
        assert problems(reader, writer) == []
        assert oracle(reader, writer)

    @pytest.mark.parametrize(("reader", "writer", "problem"), MISUNDERSTOOD)
    def test_what_they_do_not_is_named(self, reader: Any, writer: Any, problem: str) -> None:
        """As above; the place is named."""
        (found,) = problems(reader, writer)

        assert found.startswith(problem)
        assert not oracle(reader, writer)

    @given(st.data())
    def test_apaches_library_agrees_on_any_two(self, data: st.DataObject) -> None:
        """Random pairs of small schemas."""
        primitive = st.sampled_from(["null", "boolean", "int", "long", "float", "double", "string", "bytes"])
        default = st.sampled_from([{}, {"default": None}])
        leaf = primitive | st.lists(primitive, min_size=1, max_size=3, unique=True)
        item = st.sampled_from(["boolean", "int", "long", "string", "bytes"])
        collection = item.map(lambda kind: {"type": "array", "items": kind}) | item.map(
            lambda kind: {"type": "map", "values": kind}
        )
        symbols = st.lists(st.sampled_from("ABC"), min_size=1, unique=True)
        kinds = leaf | collection | symbols.map(lambda some: enum(*some))

        def draw() -> dict[str, Any]:
            fields = []
            for name in data.draw(st.lists(st.sampled_from("abc"), unique=True)):
                kind: Any = data.draw(kinds)
                kind = {**kind, "name": f"E{name}"} if isinstance(kind, dict) and "name" in kind else kind
                nullable = kind == "null" or (isinstance(kind, list) and kind[0] == "null")
                with_default = data.draw(default) if nullable else {}
                fields.append(field(name, kind, **with_default))
            return record(*fields)

        reader, writer = draw(), draw()

        assert (problems(reader, writer) == []) is oracle(reader, writer)


class TestCheck:
    """`schema check`."""

    @pytest.fixture
    def evolved(self, tmp_path: Path) -> str:
        """The operation's schema with a field more, that has a default."""
        schema = json.loads((SCHEMAS / "operation.avsc").read_text(encoding="utf-8"))
        schema["fields"].append(field("priority", "int", default=0))
        (tmp_path / "evolved.avsc").write_text(json.dumps(schema), encoding="utf-8")
        return "evolved.avsc"

    def test_fields_with_defaults_may_be_added(self, tierstream: Tierstream, evolved: str) -> None:
        """Contract 2.4: fields are only ever added, with defaults."""
        said = tierstream("schema", "check", "operation", evolved, "--json")

        assert said.code == 0
        assert (said.json["compatible"], said.json["old"]) == (True, "be92605264797cd6")
        assert said.json["backward"] == said.json["forward"] == {"compatible": True, "problems": []}

    def test_a_new_operation_is_not_understood_by_old_readers(self, tierstream: Tierstream, tmp_path: Path) -> None:
        """Forward it fails, backward it does not; `--mode` says which counts."""
        schema = json.loads((SCHEMAS / "operation.avsc").read_text(encoding="utf-8"))
        (body,) = [part for part in schema["fields"] if part["name"] == "body"]
        body["type"].append(record(field("key", "string"), name="Touch"))
        (tmp_path / "new.avsc").write_text(json.dumps(schema), encoding="utf-8")

        full = tierstream("schema", "check", "operation", "new.avsc")
        backward = tierstream("schema", "check", "operation", "new.avsc", "--mode", "backward")
        forward = tierstream("schema", "check", "operation", "new.avsc", "--mode", "forward", "--json")

        assert (full.code, backward.code, forward.code) == (1, 0, 1)
        assert "backward  yes\nforward   no\n          body: record tierstream.v1.Touch is none of" in full.out
        assert full.err.startswith("error: the schemas do not understand each other\nhint: ")
        assert len(forward.json["forward"]["problems"]) == 1

    @pytest.mark.parametrize(
        ("content", "code", "text"),
        [
            (None, 2, "error: x.avsc: No such file"),
            (b"\xff", 1, "error: x.avsc: it is not UTF-8"),
            (b"{", 1, "error: x.avsc: a schema is JSON"),
            (b'{"type": "array", "items": "null"}', 1, "error: x.avsc: items of an array or map may take no byte"),
        ],
    )
    def test_what_is_no_schema_is_refused_in_words(
        self, tierstream: Tierstream, tmp_path: Path, content: bytes | None, code: int, text: str
    ) -> None:
        """Contract 11."""
        if content is not None:
            (tmp_path / "x.avsc").write_bytes(content)

        said = tierstream("schema", "check", "operation", "x.avsc")

        assert (said.code, said.out) == (code, "")
        assert said.err.startswith(text)


class TestRegister:
    """`schema register`."""

    @pytest.fixture
    def registry(self) -> Iterator[StandingRegistry]:
        """A schema registry."""
        standing = StandingRegistry()
        yield standing
        standing.close()

    def test_it_gets_an_id_and_keeps_it(self, tierstream: Tierstream, registry: StandingRegistry) -> None:
        """Subject: the topic's name and -value."""
        config = {"schema_registry": {"url": registry.stub.url}, "input": {"topics": ["ops"]}}

        first = tierstream("schema", "register", "operation", "--yes", "--json", config=config)
        again = tierstream("schema", "register", "operation", "--yes", config=config)
        other = tierstream("schema", "register", "response", "--subject", "mine", "--yes", "--json", config=config)

        assert first.json == {"subject": "ops-value", "id": 1}
        assert again.out == "ops-value: id 1\n"
        assert other.json == {"subject": "mine", "id": 2}
        assert json.loads(registry.stub.schemas[0]["schema"])["name"] == "Operation"

    def test_a_dry_run_asks_nobody(self, tierstream: Tierstream, registry: StandingRegistry) -> None:
        """Contract 7."""
        config = {"schema_registry": {"url": registry.stub.url}}

        dry = tierstream("schema", "register", "response", "--dry-run", config=config)
        unsure = tierstream("schema", "register", "response", config=config)

        assert (dry.code, dry.err) == (0, "response would be registered as responses-value\n")
        assert unsure.code == 2
        assert registry.stub.asked == []

    def test_a_refusal_is_told_in_the_registrys_words(self, tierstream: Tierstream, registry: StandingRegistry) -> None:
        """Exit 1, with a hint."""
        path = "/subjects/responses-value/versions"
        registry.stub.canned[path] = json_of(409, error_code=409, message="incompatible with version 3")
        config = {"schema_registry": {"url": registry.stub.url}}

        said = tierstream("schema", "register", "response", "--yes", config=config)

        assert (said.code, said.out) == (1, "")
        assert "it answers with 409, incompatible with version 3\nhint: " in said.err

    def test_a_registry_that_is_ill_is_not_waited_for_without_end(
        self, tierstream: Tierstream, registry: StandingRegistry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Exit 1."""
        monkeypatch.setattr(schemas, "REGISTRY_SECONDS", 0.3)
        registry.stub.canned["*"] = Canned(503)
        config = {"schema_registry": {"url": registry.stub.url}}

        said = tierstream("schema", "register", "response", "--yes", config=config)

        assert said.code == 1
        assert "error: the schema registry did not answer within 0.3 s\n" in said.err

    @pytest.mark.parametrize("arguments", [[], ["--subject", "a/b"], ["--subject", ""]])
    def test_without_a_registry_or_with_a_wrong_subject_it_is_usage(
        self, tierstream: Tierstream, arguments: list[str]
    ) -> None:
        """Contract 11."""
        config = {"schema_registry": {"url": "http://127.0.0.1:1"}} if arguments else {}

        assert tierstream("schema", "register", "response", "--yes", *arguments, config=config).code == 2
