"""``storage``: objects without the service: create what they lie in, look, remove, check both tiers, clean up.

**Verify** looks for what neither an answer nor a clean-up can leave behind, only a crash in the wrong place or a lost
disk: *orphans*, revisions that no row points to, and *dangling* tombstones, rows that point to no revision. The service
may be running, so a suspect is judged twice:

1. Every revision is held against its object's row. Suspect: the row does not point to it, and it is older than
   ``--min-age`` (the UUIDv7 in its name tells), so that no upload under way is one.
2. Every tombstone's target is looked up. Suspect: it is not there.
3. The change log is read; what an unfinished change names is left to its owner.
4. Every suspect is looked at again: what has been changed in the meantime is none any more.

**Repair** of an orphan is what recovery does: forbid the revision in the row, atomically, and only then remove it. Of a
dangling tombstone: swap it for nothing. Reading the object has given "not found" before, and gives it still. Nothing is
repaired where one tier is empty and the other is not: that looks more like a wrong path than like a crash.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, TypeVar

import typer

from consumer.cli.options import AsJson, ConfigFile, DryRun, Yes, configuration
from consumer.cli.output import EXIT_USAGE, Failure, confirm, note, say, say_json

if TYPE_CHECKING:
    from consumer.config import Config
    from consumer.ids import ObjectId
    from consumer.operations import Metadata, StoredObject
    from consumer.storage.backend import ChangeLog, HighVolumeBackend, LongTermBackend, Revision

REQUEST_SECONDS: Final = 60.0
"""Longest wait for one answer of storage; a large payload takes a while."""

LOOKS_AT_ONCE: Final = 32
"""Rows or revisions looked up at a time: enough for a network's latency, few enough for a service beside it."""

NAMED_MAX: Final = 20
"""Findings of a kind that are named in text; ``--json`` names all."""

Target: TypeAlias = Annotated[
    list[str], typer.Argument(metavar="USECASE KEY | PATH", help="usecase/name.value/…/objects/key is a path.")
]
Scopes: TypeAlias = Annotated[
    list[str] | None, typer.Option("--scope", metavar="NAME=VALUE", help="Of USECASE KEY; repeated in order.")
]
_Found = TypeVar("_Found")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    storage = typer.Typer(help="Objects without the service: look, remove, check, clean up.", no_args_is_help=True)
    storage.command("init", short_help="Make what storage needs, and say what it cannot make.")(init)
    storage.command("verify", short_help="Look for orphans and dangling tombstones.")(verify)
    storage.command("get", short_help="Write an object's payload to stdout.")(get)
    storage.command("head")(head)
    storage.command("rm", short_help="Remove an object, as the service would.")(rm)
    storage.command("recover", short_help="Clean up what dead processes have left.")(recover)
    app.add_typer(storage, name="storage")


# ------------------------------------------------------------------------------------------------- access


def object_id(target: Sequence[str], scopes: Sequence[str] | None) -> ObjectId:
    """Read what the command line says of an object.

    Raises:
        Failure: it names none; exit 2.
    """
    from consumer.errors import InvalidOperation
    from consumer.ids import ObjectContext, ObjectId, Scope

    try:
        if len(target) == 1 and not scopes:
            return ObjectId.parse(target[0])
        if len(target) == 2:
            pairs = [text.partition("=") for text in scopes or ()]
            if not all(equals for _, equals, _ in pairs):
                raise Failure("a scope is NAME=VALUE", exit_code=EXIT_USAGE)
            return ObjectId(ObjectContext(target[0], [Scope(name, value) for name, _, value in pairs]), target[1])
    except InvalidOperation as error:
        raise Failure(str(error), "give USECASE KEY --scope NAME=VALUE, or one path", exit_code=EXIT_USAGE) from None
    raise Failure("an object is USECASE KEY, with --scope, or one path without", exit_code=EXIT_USAGE)


async def _answer(asked: Awaitable[_Found]) -> _Found:
    """Wait for storage, bounded.

    Raises:
        Failure: it did not answer.
    """
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            return await asked
    except TimeoutError:
        raise Failure(f"storage did not answer within {REQUEST_SECONDS:g} s") from None


async def _each(scan: AsyncGenerator[_Found, None]) -> AsyncIterator[_Found]:
    """Yield what *scan* yields, each step bounded."""
    async with aclosing(scan):
        while True:
            try:
                found = await _answer(anext(scan))
            except StopAsyncIteration:
                return
            yield found


def _check_reachable(config: Config, *parts: str) -> None:
    """Refuse storage that only the service's own process sees, and files that are not there.

    Opening would create them, and what is looked for would seem to be lost.

    Raises:
        Failure: as said.
    """
    for part in parts:
        settings = getattr(config.storage, part)
        if settings.type == "memory":
            raise Failure(f"storage.{part} is memory: only the service's own process sees it", exit_code=EXIT_USAGE)
        path = getattr(settings, "path", None)
        if path is not None and not path.exists():
            hint = "`tierstream storage init` creates it; relative paths count from the working directory"
            raise Failure(f"storage.{part}: there is no {path}", hint)


@asynccontextmanager
async def _tiers(config: Config) -> AsyncIterator[tuple[HighVolumeBackend, LongTermBackend]]:
    from consumer.storage.factory import make_high_volume, make_long_term

    high_volume, long_term = make_high_volume(config.storage.high_volume), make_long_term(config.storage.long_term)
    try:
        yield high_volume, long_term
    finally:
        await long_term.close()
        await high_volume.close()


# ------------------------------------------------------------------------------------------------- init


def init(config: ConfigFile = None, dry_run: DryRun = False, yes: Yes = False, as_json: AsJson = False) -> None:
    """Create files, folders, tables and column families, where they are missing; print the bucket's lifecycle rule.

    What is there already is checked and left alone.
    """
    del yes  # there is nothing to lose
    settings = configuration(config)
    if not dry_run:
        asyncio.run(_create(settings))
    parts = [
        {"part": part, "type": section.type, "where": _place(section)}
        for part, section in (
            ("high_volume", settings.storage.high_volume),
            ("long_term", settings.storage.long_term),
            ("change_log", settings.storage.change_log),
        )
    ]
    rule = _lifecycle(settings)
    if as_json:
        say_json({"parts": parts, "lifecycle": rule})
        return
    for part in parts:
        said = "would be created or checked" if dry_run else "ready"
        say(f"storage.{part['part']}: {part['type']}" + (f" {part['where']}" if part["where"] else "") + f", {said}")
    if rule is not None:
        note("the bucket's lifecycle rule, for `gcloud storage buckets update --lifecycle-file`:")
        say(json.dumps(rule, indent=2))


async def _create(config: Config) -> None:
    from consumer.storage.factory import make_change_log, open_parts

    log = make_change_log(config.storage.change_log.model_copy(update={"owner": None}))
    try:
        async with _tiers(config) as tiers:
            for part in (*tiers, log):
                creating = getattr(part, "create", None)
                if creating is not None:
                    await _answer(creating())
                await _answer(open_parts(part))
    finally:
        await log.close()


def _place(section: Any) -> str | None:
    """Return where a part of storage keeps its data."""
    names = ("path",), ("project", "instance", "table"), ("bucket", "prefix")
    for parts in names:
        values = [getattr(section, name, None) for name in parts]
        if values[0] is not None:
            return "/".join(str(value) for value in values if value)
    return None


def _lifecycle(config: Config) -> dict[str, Any] | None:
    """Return the rule that removes expired objects from a bucket: their custom time is when they expire."""
    section: Any = config.storage.long_term
    if section.type != "gcs":
        return None
    condition: dict[str, Any] = {"daysSinceCustomTime": 1}
    if section.prefix:
        condition["matchesPrefix"] = [section.prefix]
    return {"rule": [{"action": {"type": "Delete"}, "condition": condition}]}


# ------------------------------------------------------------------------------------------------- get, head


@dataclass(frozen=True, slots=True)
class Seen:
    """An object as it lies in storage."""

    metadata: Metadata
    revision: Revision | None
    """Where its payload is, if in the long-term tier."""
    payload: Any = None


async def _look(config: Config, wanted: ObjectId, *, payload: bool) -> Seen | None:
    """Read an object past the service: no idle expiry is extended, nothing is recorded.

    Raises:
        Failure: there is a row, and no revision to it.
    """
    from consumer.operations import StoredObject
    from consumer.storage.backend import Tombstone
    from consumer.storage.tiered import CHASES_MAX

    async with _tiers(config) as (high_volume, long_term):
        last: Revision | None = None
        for _ in range(CHASES_MAX):
            row = await _answer(high_volume.get_tiered(wanted) if payload else high_volume.head_tiered(wanted))
            if row is None:
                return None
            if isinstance(row, StoredObject):
                return Seen(row.metadata, None, row.payload)
            if not isinstance(row, Tombstone):
                return Seen(row, None)
            if row.target == last:
                hint = "`tierstream storage verify` finds all such objects"
                raise Failure(f"{wanted}: its payload is missing in the long-term tier", hint)
            last = row.target
            found: StoredObject | Metadata | None = await _answer(
                long_term.get(last) if payload else long_term.head(last)
            )
            if found is not None:  # else it has been replaced in between, or it is lost
                return Seen(row.metadata, last, found.payload if isinstance(found, StoredObject) else None)
    raise Failure(f"{wanted} is replaced faster than it can be read", "try again")


def _read(
    target: Sequence[str], scopes: Sequence[str] | None, config: Path | None, *, payload: bool
) -> tuple[str, Seen]:
    """Find an object.

    Raises:
        Failure: there is none.
    """
    wanted = object_id(target, scopes)
    settings = configuration(config)
    _check_reachable(settings, "high_volume")
    seen = asyncio.run(_look(settings, wanted, payload=payload))
    if seen is None:
        raise Failure(f"there is no object {wanted}")
    return wanted.storage_path, seen


def _seen_fields(path: str, seen: Seen) -> dict[str, Any]:
    from consumer.codec import metadata_fields

    return {
        "path": path,
        "tier": "high_volume" if seen.revision is None else "long_term",
        "revision": None if seen.revision is None else seen.revision.name,
        "metadata": metadata_fields(seen.metadata),
    }


def get(
    target: Target,
    scope: Scopes = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the payload there, not to stdout.")
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Write an object's payload to stdout, or with --json everything about it. No idle expiry is extended."""
    path, seen = _read(target, scope, config, payload=True)
    payload = seen.payload
    if not isinstance(payload, bytes):
        raise Failure(f"{path}: the payload lies at {getattr(payload, 'uri', 'an unknown place')}")
    if output is not None:
        try:
            output.write_bytes(payload)
        except OSError as error:
            raise Failure(f"{output}: {error.strerror}") from None
    if as_json:
        content = {} if output is not None else {"payload_base64": base64.b64encode(payload).decode()}
        say_json(_seen_fields(path, seen) | content)
    elif output is None:
        if sys.stdout.isatty() and not _is_text(payload):
            raise Failure(f"{len(payload)} bytes that are no text", "--output FILE, or a pipe")
        sys.stdout.buffer.write(payload)
        sys.stdout.buffer.flush()


def _is_text(payload: bytes) -> bool:
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        return False
    return all(one.isprintable() or one in "\n\t" for one in text)


def head(target: Target, scope: Scopes = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Show an object's metadata, and in which tier it lies. No idle expiry is extended."""
    from consumer.cli.inspection import printable

    path, seen = _read(target, scope, config, payload=False)
    fields = _seen_fields(path, seen)
    if as_json:
        say_json(fields)
        return
    for name in ("path", "tier", "revision"):
        say(f"{name:13}  {printable(fields[name] or '-')}")
    for name, value in fields["metadata"].items():
        shown = value
        if name.startswith("time_") and value is not None:
            shown = datetime.fromtimestamp(value / 1_000_000, UTC).isoformat()
        elif not isinstance(value, str):
            shown = "-" if value in (None, {}) else json.dumps(value, ensure_ascii=False)
        say(f"{name:13}  {printable(shown)}")


# ------------------------------------------------------------------------------------------------- rm


def rm(
    target: Target,
    scope: Scopes = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove an object, as the service would: recorded in the change log first, its revision too."""
    wanted = object_id(target, scope)
    settings = configuration(config)
    _check_reachable(settings, "high_volume")
    there = asyncio.run(_exists(settings, wanted))
    if there and not dry_run:
        confirm(f"remove {wanted}?", yes=yes)
        asyncio.run(_remove(settings, wanted))
    removed = there and not dry_run
    if as_json:
        say_json({"path": wanted.storage_path, "existed": there, "removed": removed}, line=True)
    elif there:
        say(f"{wanted} " + ("would be removed" if dry_run else "removed"))
    else:
        say(f"there is no object {wanted}")


async def _exists(config: Config, wanted: ObjectId) -> bool:
    async with _tiers(config) as (high_volume, _):
        return await _answer(high_volume.head_tiered(wanted)) is not None


async def _remove(config: Config, wanted: ObjectId) -> None:
    from consumer.storage.factory import make_change_log
    from consumer.storage.tiered import TieredStorage

    # An owner of its own: under the service's name its unfinished changes would count as ours from before a restart.
    log = make_change_log(config.storage.change_log.model_copy(update={"owner": None}))
    try:
        async with _tiers(config) as (high_volume, long_term):
            storage = TieredStorage(high_volume, long_term, log, handout_seconds=config.handout_seconds)
            try:
                await _answer(storage.delete(wanted))
            finally:
                await _answer(storage.join())
    finally:
        await log.close()


# ------------------------------------------------------------------------------------------------- verify


@dataclass(slots=True)
class Report:
    """What was looked at, and what was found."""

    tombstones: int = 0
    revisions: int = 0
    changes: int = 0
    """Unfinished changes in the log."""
    orphans: list[str] = field(default_factory=list)
    """Revisions that no row points to."""
    dangling: list[str] = field(default_factory=list)
    """Storage paths of rows that point to no revision."""
    foreign: list[str] = field(default_factory=list)
    """Names in the long-term tier that are no revisions, nor copies made for responses: left alone."""
    repaired: int = 0

    @property
    def found(self) -> int:
        """Orphans and dangling tombstones."""
        return len(self.orphans) + len(self.dangling)


def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Remove orphans and dangling tombstones.")] = False,
    min_age: Annotated[
        str, typer.Option("--min-age", metavar="DURATION", help="Younger revisions are no orphans.")
    ] = "1h",
    config: ConfigFile = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Look through both tiers for revisions that no row points to, and rows that point to no revision.

    The service may be running. Exit 1 if something is found and not repaired.
    """
    from consumer.config import parse_duration

    settings = configuration(config)
    try:
        seconds = parse_duration(min_age)
    except ValueError as error:
        raise Failure(f"--min-age {error}", exit_code=EXIT_USAGE) from None
    _check_reachable(settings, "high_volume", "long_term")
    if settings.storage.change_log.type == "memory":
        note("storage.change_log is memory: changes under way cannot be seen, only --min-age protects them")
    ask = None if not repair or dry_run else yes
    report = asyncio.run(_verify(settings, seconds, repair=ask))
    if as_json:
        say_json(
            {
                "tombstones": report.tombstones,
                "revisions": report.revisions,
                "changes": report.changes,
                "orphans": report.orphans,
                "dangling": report.dangling,
                "foreign": report.foreign,
                "repaired": report.repaired,
            }
        )
    else:
        _say_report(report)
    left = report.found - report.repaired
    if left:
        raise Failure(f"{left} findings are not repaired", None if repair else "--repair removes them")


def _say_report(report: Report) -> None:
    say(
        f"{report.tombstones} tombstones, {report.revisions} revisions, {report.changes} unfinished changes: "
        f"{len(report.orphans)} orphans, {len(report.dangling)} dangling tombstones"
        + (f", {report.repaired} repaired" if report.repaired else "")
    )
    from consumer.cli.inspection import printable

    for name, found in (("orphan", report.orphans), ("dangling", report.dangling), ("foreign", report.foreign)):
        for one in found[:NAMED_MAX]:
            say(f"{name:8}  {printable(one)}")
        if len(found) > NAMED_MAX:
            say(f"{name:8}  … and {len(found) - NAMED_MAX} more; --json names all")


async def _verify(config: Config, min_age: float, *, repair: bool | None) -> Report:
    """Look, and repair unless *repair* is None; ask before unless it is True."""
    from consumer.storage.factory import make_change_log

    log = make_change_log(config.storage.change_log.model_copy(update={"owner": None}))
    try:
        async with _tiers(config) as (high_volume, long_term):
            check = StorageCheck(high_volume, long_term, log, min_age_seconds=min_age)
            report = await check.run()
            if repair is not None and report.found:
                if not report.tombstones or not report.revisions:
                    hint = "check storage.high_volume and storage.long_term; nothing was changed"
                    raise Failure("one tier is empty and the other is not: are these tiers of the same storage?", hint)
                question = f"remove {len(report.orphans)} orphans and {len(report.dangling)} dangling tombstones?"
                confirm(question, yes=repair)
                await check.repair()
            return report
    finally:
        await log.close()


class StorageCheck:
    """One look through both tiers; see the module's text.

    Args:
        high_volume: Rows.
        long_term: Revisions.
        change_log: Unfinished changes, of every owner.
        min_age_seconds: Younger revisions are no orphans.

    Raises (all methods):
        Failure: a tier cannot be scanned, or does not answer.
        BackendUnavailable, BackendError: as the backends say.
    """

    def __init__(
        self,
        high_volume: HighVolumeBackend,
        long_term: LongTermBackend,
        change_log: ChangeLog,
        *,
        min_age_seconds: float,
    ) -> None:
        self._high_volume = high_volume
        self._long_term = long_term
        self._change_log = change_log
        self._min_age_seconds = min_age_seconds
        self._orphans: list[tuple[ObjectId, Revision]] = []
        self._dangling: list[tuple[ObjectId, Revision]] = []
        self._report = Report()

    async def run(self) -> Report:
        """Look at everything; change nothing."""
        suspects = [found async for found in self._suspect_revisions()]
        dangling = [found async for found in self._suspect_tombstones()]
        unfinished = await self._unfinished()
        for object_id_, revision in suspects:
            if revision not in unfinished and await self._is_orphan(object_id_, revision):
                self._orphans.append((object_id_, revision))
        for object_id_, revision in dangling:
            if revision not in unfinished and await self._is_dangling(object_id_, revision):
                self._dangling.append((object_id_, revision))
        self._report.orphans = sorted(revision.name for _, revision in self._orphans)
        self._report.dangling = sorted(object_id_.storage_path for object_id_, _ in self._dangling)
        return self._report

    async def repair(self) -> None:
        """Remove what was found, each atomically against whoever else is at work; may be begun again."""
        from consumer.storage.backend import Removal

        for object_id_, revision in self._orphans:
            if await _answer(self._high_volume.forbid(object_id_, revision)):
                await _answer(self._long_term.delete(revision))
            self._report.repaired += 1
        for object_id_, revision in self._dangling:
            await _answer(self._high_volume.compare_and_write(object_id_, revision, Removal()))
            self._report.repaired += 1

    async def _suspect_revisions(self) -> AsyncIterator[tuple[ObjectId, Revision]]:
        from consumer.errors import InvalidOperation
        from consumer.storage.handouts import is_copy
        from consumer.storage.revision import parse_revision

        youngest = (datetime.now(UTC).timestamp() - self._min_age_seconds) * 1000
        group: list[tuple[ObjectId, Revision]] = []
        async for revision in _each(_scan(self._long_term, "scan_revisions")):
            try:
                whose, unique = parse_revision(revision.name)
            except InvalidOperation:
                if not is_copy(revision.name):
                    self._report.foreign.append(revision.name)
                continue
            self._report.revisions += 1
            if unique.int >> 80 <= youngest:
                group.append((whose, revision))
            if len(group) == LOOKS_AT_ONCE:
                for suspect in await self._unreferenced(group):
                    yield suspect
                group = []
        for suspect in await self._unreferenced(group):
            yield suspect

    async def _suspect_tombstones(self) -> AsyncIterator[tuple[ObjectId, Revision]]:
        group: list[tuple[ObjectId, Revision]] = []
        async for row in _each(_scan(self._high_volume, "scan_tombstones")):
            self._report.tombstones += 1
            group.append(row)
            if len(group) == LOOKS_AT_ONCE:
                for suspect in await self._without_revision(group):
                    yield suspect
                group = []
        for suspect in await self._without_revision(group):
            yield suspect

    async def _unreferenced(self, group: list[tuple[ObjectId, Revision]]) -> list[tuple[ObjectId, Revision]]:
        targets = await asyncio.gather(*(self._target(whose) for whose, _ in group))
        return [found for found, target in zip(group, targets, strict=True) if target != found[1]]

    async def _without_revision(self, group: list[tuple[ObjectId, Revision]]) -> list[tuple[ObjectId, Revision]]:
        there = await asyncio.gather(*(_answer(self._long_term.head(revision)) for _, revision in group))
        return [found for found, metadata in zip(group, there, strict=True) if metadata is None]

    async def _unfinished(self) -> set[Revision]:
        """Return what changes name: unfinished ones, and those that only wait for their time, which are not counted."""
        named: set[Revision] = set()
        async for _, change in _each(_scan(self._change_log, "scan_changes")):
            self._report.changes += change.not_before is None
            named |= {revision for revision in (change.new, change.old) if revision is not None}
        return named

    async def _target(self, whose: ObjectId) -> Revision | None:
        from consumer.storage.backend import Tombstone

        row = await _answer(self._high_volume.head_tiered(whose))
        return row.target if isinstance(row, Tombstone) else None

    async def _is_orphan(self, whose: ObjectId, revision: Revision) -> bool:
        return await self._target(whose) != revision and await _answer(self._long_term.head(revision)) is not None

    async def _is_dangling(self, whose: ObjectId, revision: Revision) -> bool:
        return await _answer(self._long_term.head(revision)) is None and await self._target(whose) == revision


def _scan(backend: object, name: str) -> AsyncGenerator[Any, None]:
    """Begin a scan of a backend.

    Raises:
        Failure: it has none.
    """
    begin = getattr(backend, name, None)
    if begin is None:
        raise Failure(f"{type(backend).__name__} cannot be looked through")
    scan: AsyncGenerator[Any, None] = begin()
    return scan


# ------------------------------------------------------------------------------------------------- recover


def recover(
    owner: Annotated[
        str | None,
        typer.Argument(metavar="OWNER", help="Also this owner, whose process is dead, before its lease is over."),
    ] = None,
    config: ConfigFile = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Clean up what unfinished changes of dead processes have left behind.

    Every running service does so by itself once a lease is over. OWNER is for one that will not come back, and must not
    be running: its unfinished writes would fail.
    """
    settings = configuration(config)
    _check_reachable(settings, "high_volume", "change_log")
    if dry_run:
        entries = asyncio.run(_entries(settings, owner))
        if as_json:
            say_json({"owner": owner, "entries": len(entries), "recovered": 0}, line=True)
        else:
            for line in entries:
                note(line)
            say(f"{len(entries)} unfinished changes; those of the living are left alone")
        return
    if owner is not None:
        confirm(f"clean up after {owner}, whose process is dead?", yes=yes)
    met, left = asyncio.run(_recover(settings, owner))
    if as_json:
        say_json({"owner": owner, "entries": met, "recovered": met - left}, line=True)
    else:
        say(f"{met - left} unfinished changes cleaned up")
    if left:
        raise Failure(f"{left} changes could not be cleaned up", "they stay in the change log; try again later")


async def _entries(config: Config, owner: str | None) -> list[str]:
    """Describe the entries of *owner*, or of everybody."""
    from consumer.storage.factory import make_change_log

    log = make_change_log(config.storage.change_log.model_copy(update={"owner": None}))
    try:
        return [
            f"{found}: {change.object_id} (new {change.new or '-'}, old {change.old or '-'})"
            async for found, change in _each(_scan(log, "scan_changes"))
            if owner in {None, found}
        ]
    finally:
        await log.close()


async def _recover(config: Config, owner: str | None) -> tuple[int, int]:
    """Clean up; return how many entries were met, and how many are left."""
    from consumer.storage.change_log import Changes
    from consumer.storage.factory import make_change_log

    log = make_change_log(config.storage.change_log.model_copy(update={"owner": owner}))
    try:
        async with _tiers(config) as (high_volume, long_term):
            kept = config.handout_seconds
            retention = None if kept is None else timedelta(seconds=kept)
            changes = Changes(log, high_volume, long_term, retention=retention)
            try:
                met = await changes.recover()
            finally:
                await changes.join()
            return met, await _answer(log.count())
    finally:
        await log.close()
