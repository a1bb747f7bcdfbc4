"""``schema``: the schemas of this release, whether two schemas understand each other, and registering one.

**Check** answers two questions, by the resolution rules of the Avro specification. *Backward*: can a reader with the
new schema read everything written with the old one? *Forward*: can a reader with the old schema read everything
written with the new one? A union that is written is understood only if each of its branches is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import typer

from consumer.cli.options import AsJson, ConfigFile, DryRun, Yes, configuration
from consumer.cli.output import EXIT_USAGE, Failure, confirm, note, say, say_json

if TYPE_CHECKING:
    from consumer.avro_schemas import Schema
    from consumer.config import Config
    from consumer.registry import SchemaRegistry

REGISTRY_SECONDS: Final = 20.0
"""Longest wait for the registry; the service would wait for ever, a command does not."""

Problem: TypeAlias = str
Types: TypeAlias = Mapping[str, Any]
"""Named types by their full name."""


class Name(StrEnum):
    """A schema of this release."""

    OPERATION = "operation"
    RESPONSE = "response"

    @property
    def file(self) -> Literal["operation", "response"]:
        """Its file, without the ending."""
        return "operation" if self is Name.OPERATION else "response"


class Mode(StrEnum):
    """What two schemas have to be."""

    BACKWARD = "backward"
    FORWARD = "forward"
    FULL = "full"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    schema = typer.Typer(help="Schemas, compatibility between two of them, registration.", no_args_is_help=True)
    schema.command("show")(show)
    schema.command("check", short_help="Say whether two schemas understand each other.")(check)
    schema.command("register", short_help="Register a schema of this release.")(register_schema)
    app.add_typer(schema, name="schema")


@asynccontextmanager
async def opened_registry(config: Config) -> AsyncIterator[SchemaRegistry | None]:
    """Lend the configured registry; None where there is none."""
    settings = config.schema_registry
    if settings.url is None:
        yield None
        return
    from consumer.registry import SchemaRegistry

    registry = SchemaRegistry(
        settings.url,
        username=settings.username,
        password=settings.password.get() if settings.password is not None else None,
        bearer_token=settings.bearer_token.get() if settings.bearer_token is not None else None,
        ssl_ca_file=settings.ssl_ca_file,
        depth_max=config.limits.avro_depth,
    )
    try:
        yield registry
    finally:
        await registry.close()


# ------------------------------------------------------------------------------------------------- show


def show(
    name: Annotated[Name, typer.Argument(metavar="[operation|response]")] = Name.OPERATION,
    fingerprint: Annotated[
        bool, typer.Option("--fingerprint", help="Only its CRC-64-AVRO, as header tierstream-schema has it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a schema of this release, as its file has it."""
    from consumer.avro_schemas import read_schema, schema_text

    text = schema_text(name.file)
    if fingerprint:
        found = read_schema(text).fingerprint
        if as_json:
            say_json({"name": name.value, "fingerprint": found}, line=True)
        else:
            say(found)
    else:
        say(text.rstrip("\n"))  # JSON in any case


# ------------------------------------------------------------------------------------------------- check


def check(
    old: Annotated[str, typer.Argument(metavar="OLD", help="A file, or operation or response for this release's.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="As OLD.")],
    mode: Annotated[
        Mode, typer.Option("--mode", metavar="backward|forward|full", help="What they have to be for exit 0.")
    ] = Mode.FULL,
    as_json: AsJson = False,
) -> None:
    """Say whether readers of one schema understand writers of the other.

    backward: NEW reads what OLD wrote; forward: OLD reads what NEW wrote; full: both. Exit 1 if they do not.
    """
    first, second = _schema(old), _schema(new)
    backward = list(misunderstandings(second.parsed, first.parsed))
    forward = list(misunderstandings(first.parsed, second.parsed))
    wrong = (backward if mode is not Mode.FORWARD else []) + (forward if mode is not Mode.BACKWARD else [])
    if as_json:
        say_json(
            {
                "compatible": not wrong,
                "old": first.fingerprint,
                "new": second.fingerprint,
                "backward": {"compatible": not backward, "problems": backward},
                "forward": {"compatible": not forward, "problems": forward},
            }
        )
    else:
        say(f"old       {first.fingerprint}  {old}")
        say(f"new       {second.fingerprint}  {new}")
        for name, problems in (("backward", backward), ("forward", forward)):
            say(f"{name:8}  {'no' if problems else 'yes'}")
            for problem in problems:
                say(f"          {problem}")
    if wrong:
        hint = "fields are only ever added, with defaults; what is new in a union, old readers cannot read"
        raise Failure("the schemas do not understand each other", hint)


def _schema(name: str) -> Schema:
    """Read a schema by file or name, through the gate that writers' schemas have to pass.

    Raises:
        Failure: it cannot be read (exit 2), or is none, or an unsafe one.
    """
    from consumer.avro_schemas import SCHEMA_BYTES_MAX, operation_schema, read_schema, response_schema
    from consumer.errors import DecodeError

    if name in {"operation", "response"}:
        return operation_schema() if name == "operation" else response_schema()
    try:
        with Path(name).open("rb") as file:
            text = file.read(4 * SCHEMA_BYTES_MAX + 1).decode()
        return read_schema(text)
    except OSError as error:
        raise Failure(f"{name}: {error.strerror}", exit_code=EXIT_USAGE) from None
    except UnicodeDecodeError:
        raise Failure(f"{name}: it is not UTF-8") from None
    except DecodeError as error:
        raise Failure(f"{name}: {error}", "the service refuses such a schema, whoever wrote with it") from None


_PROMOTED: Final[Mapping[str, frozenset[str]]] = {
    "int": frozenset({"long", "float", "double"}),
    "long": frozenset({"float", "double"}),
    "float": frozenset({"double"}),
    "string": frozenset({"bytes"}),
    "bytes": frozenset({"string"}),
}
"""Written type to the types it may be read as, besides itself."""


def misunderstandings(reader: Any, writer: Any) -> Iterator[Problem]:
    """Yield what a reader of one schema cannot read of a writer's of the other; nothing: it reads everything.

    Args:
        reader: As :class:`~consumer.avro_schemas.Schema` has it, parsed; so without recursive types.
        writer: As above.
    """
    return _Resolution(reader, writer).problems(reader, writer, "")


class _Resolution:
    """Follows two schemas at the same time, each with its own named types."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self._reader_types: dict[str, Any] = {}
        self._writer_types: dict[str, Any] = {}
        _collect(reader, self._reader_types)
        _collect(writer, self._writer_types)

    def problems(self, reader: Any, writer: Any, path: str) -> Iterator[Problem]:
        """Yield what is wrong at *path*, a dotted name."""
        reader, writer = _resolved(reader, self._reader_types), _resolved(writer, self._writer_types)
        if isinstance(writer, list):
            for branch in writer:
                yield from self.problems(reader, branch, path)
            return
        if isinstance(reader, list):
            yield from self._in_union(reader, writer, path)
            return
        written, read = _kind(writer), _kind(reader)
        here = path or "the schema"
        if written != read:
            if read not in _PROMOTED.get(written, ()):
                yield f"{here}: {_named(writer)} is not {_named(reader)}"
        elif written in {"record", "error", "enum", "fixed"} and not _same_name(reader, writer):
            yield f"{here}: {_named(writer)} is not {_named(reader)}"
        elif written in {"record", "error"}:
            yield from self._fields(reader, writer, path)
        elif written == "array":
            yield from self.problems(reader["items"], writer["items"], f"{path}[]")
        elif written == "map":
            yield from self.problems(reader["values"], writer["values"], f"{path}{{}}")
        elif written == "enum":
            unknown = sorted(set(writer["symbols"]) - set(reader["symbols"]))
            if unknown and "default" not in reader:
                yield f"{here}: symbols {', '.join(unknown)} are not known"
        elif written == "fixed" and reader["size"] != writer["size"]:
            yield f"{here}: {writer['size']} bytes are not {reader['size']}"

    def _in_union(self, reader: list[Any], writer: Any, path: str) -> Iterator[Problem]:
        """Hold a written type against the branches it may be read as: the one of its name, else any."""
        branches = [_resolved(branch, self._reader_types) for branch in reader]
        named = [branch for branch in branches if _kind(branch) == _kind(writer) and _same_name(branch, writer)]
        found: list[Problem] | None = None
        for branch in named or branches:
            problems = list(self.problems(branch, writer, path))
            if not problems:
                return
            found = problems if found is None and named else found
        yield from found or [f"{path or 'the schema'}: {_named(writer)} is none of what is read there"]

    def _fields(self, reader: Any, writer: Any, path: str) -> Iterator[Problem]:
        written = {field["name"]: field for field in writer["fields"]}
        for field in reader["fields"]:
            name = next((one for one in (field["name"], *field.get("aliases", ())) if one in written), None)
            below = f"{path}.{field['name']}" if path else field["name"]
            if name is not None:
                yield from self.problems(field["type"], written[name]["type"], below)
            elif "default" not in field:
                yield f"{below}: is not written, and has no default"


def _collect(schema: Any, types: dict[str, Any]) -> None:
    """Enter all types that *schema* defines."""
    if isinstance(schema, list):
        for branch in schema:
            _collect(branch, types)
    elif isinstance(schema, dict):
        kind = schema["type"]
        if kind in {"record", "error", "enum", "fixed"}:
            types[schema["name"]] = schema
        for field in schema.get("fields", ()):
            _collect(field["type"], types)
        for part in ("items", "values"):
            if part in schema:
                _collect(schema[part], types)


def _resolved(schema: Any, types: Types) -> Any:
    """Return a type in the place of its name, and without the wrapping of a primitive one."""
    while True:
        if isinstance(schema, str) and schema in types:
            schema = types[schema]
        elif isinstance(schema, dict) and isinstance(schema["type"], dict | list):
            schema = schema["type"]
        else:
            return schema


def _kind(schema: Any) -> str:
    return schema if isinstance(schema, str) else str(schema["type"])


def _same_name(reader: Any, writer: Any) -> bool:
    """Tell whether two types of one kind are the same by name; those without a name are."""
    if isinstance(reader, str) or isinstance(writer, str) or "name" not in reader or "name" not in writer:
        return True
    # The specification matches unqualified names; aliases of the reader are other names it goes by.
    names = {reader["name"], *reader.get("aliases", ())}
    return writer["name"] in names or writer["name"].rpartition(".")[2] in {one.rpartition(".")[2] for one in names}


def _named(schema: Any) -> str:
    """Say what a type is."""
    name = None if isinstance(schema, str) else schema.get("name")
    return f"{_kind(schema)} {name}" if name else _kind(schema)


# ------------------------------------------------------------------------------------------------- register


def register_schema(
    name: Annotated[Name, typer.Argument(metavar="operation|response")],
    subject: Annotated[
        str | None, typer.Option("--subject", metavar="SUBJECT", help="Default: the topic's name and -value.")
    ] = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Register a schema of this release with the schema registry; what is there already keeps its id."""
    import re

    settings = configuration(config)
    if settings.schema_registry.url is None:
        raise Failure("there is no schema registry", "set schema_registry.url", exit_code=EXIT_USAGE)
    topic = settings.input.topics[0] if name is Name.OPERATION else settings.output.topic
    target = subject if subject is not None else f"{topic}-value"
    if re.fullmatch(r"[A-Za-z0-9._-]{1,255}", target) is None:
        raise Failure("a subject is 1 to 255 letters, digits, dots, underscores and hyphens", exit_code=EXIT_USAGE)
    schema_id = None
    if dry_run:
        note(f"{name.value} would be registered as {target}")
    else:
        confirm(f"register {name.value} as {target}?", yes=yes)
        schema_id = asyncio.run(_register(settings, name, target))
    if as_json:
        say_json({"subject": target, "id": schema_id}, line=True)
    elif schema_id is not None:
        say(f"{target}: id {schema_id}")


async def _register(config: Config, name: Name, subject: str) -> int:
    from consumer.avro_schemas import schema_text
    from consumer.errors import ConfigError

    async with opened_registry(config) as registry:
        assert registry is not None, "checked before"
        try:
            async with asyncio.timeout(REGISTRY_SECONDS):
                return await registry.register(subject, schema_text(name.file))
        except TimeoutError:
            raise Failure(f"the schema registry did not answer within {REGISTRY_SECONDS:g} s") from None
        except ConfigError as error:
            hint = "its compatibility rule, or a missing right; `tierstream schema check` compares two schemas"
            answer = str(error).partition("it answers with ")[2]  # the rest is about the service's configuration
            raise Failure(f"the schema registry does not take it: it answers with {answer}", hint) from None
