"""`storage`: objects without the service, on files of its own."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest

from cli_runner import Result, Tierstream
from consumer.cli import objects
from consumer.cli.objects import StorageCheck, object_id
from consumer.cli.output import Failure
from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.operations import Metadata, TimeToIdle
from consumer.storage.backend import Change, Revision, Tombstone
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.gcs import GcsBackend
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.revision import new_revision, uuid7
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog
from consumer.storage.tiered import TieredStorage
from strict_gcs import StrictGcs

T = TypeVar("T")

SMALL = ObjectId(ObjectContext("u", [Scope("org", "1")]), "small")
LARGE = ObjectId(ObjectContext("u", [Scope("org", "1")]), "large/one")
THRESHOLD = 10


def old_revision(whose: ObjectId = LARGE, *, hours: float = 2) -> Revision:
    """Return a name as it was made some hours ago."""
    now = uuid7().int
    return Revision(f"{whose.storage_path}/{UUID(int=now - (int(hours * 3_600_000) << 80))}")


class Parts:
    """The parts of storage, opened for one step of a test."""

    def __init__(self, folder: Path) -> None:
        self.high_volume = SqliteBackend(folder / "data" / "objects.sqlite")
        self.long_term = FilesystemBackend(folder / "data" / "objects")
        self.log = SqliteChangeLog(folder / "data" / "objects.sqlite", "service")

    async def close(self) -> None:
        """Let go of the files; the lease is left as a killed process leaves it if *log* has been taken away."""
        await self.log.close()
        await self.long_term.close()
        await self.high_volume.close()


class Storage:
    """Files below a folder as the default configuration has them; every step opens them anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def do(self, step: Callable[[Parts], Awaitable[T]]) -> T:
        """Run *step* on the parts."""

        async def run() -> T:
            parts = Parts(self.folder)
            try:
                return await step(parts)
            finally:
                await parts.close()

        return asyncio.run(run())

    def put(self, whose: ObjectId, payload: bytes, metadata: Metadata | None = None) -> None:
        """Store an object as the service does, large above 10 bytes."""

        async def put(parts: Parts) -> None:
            storage = TieredStorage(parts.high_volume, parts.long_term, parts.log, THRESHOLD)
            await storage.put(whose, metadata or Metadata(), payload)
            await storage.join()

        self.do(put)

    def revisions(self) -> list[str]:
        """Return the names in the long-term tier."""

        async def scan(parts: Parts) -> list[str]:
            return sorted([revision.name async for revision in parts.long_term.scan_revisions()])

        return self.do(scan)

    def row(self, whose: ObjectId) -> Any:
        """Return the row of an object, without its payload."""
        return self.do(lambda parts: parts.high_volume.head_tiered(whose))

    def add_revision(self, revision: Revision) -> Revision:
        """Put a revision that nothing points to."""
        self.do(lambda parts: parts.long_term.put(revision, Metadata(), b"payload"))
        return revision

    def add_tombstone(self, whose: ObjectId, revision: Revision) -> None:
        """Let a row point to *revision*."""
        self.do(lambda parts: parts.high_volume.compare_and_write(whose, None, Tombstone(revision, Metadata(size=7))))


@pytest.fixture
def tierstream(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Tierstream:
    """The command, in the folder of the storage."""
    return Tierstream(monkeypatch, capfd, tmp_path)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A small object and a large one."""
    made = Storage(tmp_path)
    made.put(SMALL, b"a payload")
    made.put(LARGE, b"a larger payload")
    return made


def files(folder: Path) -> list[str]:
    """Return what lies in *folder*."""
    return sorted(path.name for path in folder.rglob("*"))


class TestNames:
    """How an object is named on the command line."""

    @pytest.mark.parametrize(
        ("target", "scopes", "path"),
        [
            (["u/org.1/objects/a/b"], None, "u/org.1/objects/a/b"),
            (["u", "a/b"], ["org=1", "p=2"], "u/org.1/p.2/objects/a/b"),
            (["u", "k"], [], "u/objects/k"),
        ],
    )
    def test_by_path_or_by_parts(self, target: list[str], scopes: list[str] | None, path: str) -> None:
        """Contract 7: scopes are repeated in order."""
        assert object_id(target, scopes).storage_path == path

    @pytest.mark.parametrize(
        ("target", "scopes"),
        [
            ([], None),
            (["u"], None),
            (["u/objects/k"], ["org=1"]),
            (["u", "k", "x"], None),
            (["u", "k"], ["org"]),
            (["u", "k"], ["org="]),
            (["u!", "k"], None),
            (["u", "\n"], None),
        ],
    )
    def test_anything_else_is_usage(self, target: list[str], scopes: list[str] | None) -> None:
        """Contract 11: exit 2."""
        with pytest.raises(Failure) as raised:
            object_id(target, scopes)

        assert raised.value.exit_code == 2


class TestInit:
    """`storage init`."""

    def test_it_makes_files_and_folders(self, tierstream: Tierstream, tmp_path: Path) -> None:
        """And again: what is there is left alone."""
        first, second = tierstream("storage", "init"), tierstream("storage", "init", "--yes", "--json")

        assert (first.code, second.code) == (0, 0)
        assert {"objects.sqlite", "objects", "FORMAT"} <= set(files(tmp_path))
        assert first.out.splitlines()[0] == "storage.high_volume: sqlite data/objects.sqlite, ready"
        assert second.json["parts"][1] == {"part": "long_term", "type": "filesystem", "where": "data/objects"}
        assert second.json["lifecycle"] is None

    def test_a_dry_run_makes_nothing(self, tierstream: Tierstream, tmp_path: Path) -> None:
        """Contract 7."""
        said = tierstream("storage", "init", "--dry-run")

        assert said.code == 0
        assert "would be created" in said.out
        assert files(tmp_path) == []

    def test_the_buckets_lifecycle_rule_is_printed(self, tierstream: Tierstream) -> None:
        """GCS-1: custom time is the expiry."""
        bucket = {"type": "gcs", "bucket": "b", "prefix": "objects/", "endpoint": "http://127.0.0.1:1"}
        said = tierstream("storage", "init", "--dry-run", "--json", config={"storage": {"long_term": bucket}})

        assert said.json["lifecycle"] == {
            "rule": [
                {
                    "action": {"type": "Delete"},
                    "condition": {"daysSinceCustomTime": 1, "matchesPrefix": ["objects/"]},
                }
            ]
        }
        assert said.json["parts"][1]["where"] == "b/objects/"

    def test_every_command_works_on_a_bucket(self, tierstream: Tierstream, strict_gcs: StrictGcs) -> None:
        """Created or checked, looked at, checked, removed."""
        bucket = {"type": "gcs", "bucket": "bucket", "prefix": "objects/", "endpoint": strict_gcs.endpoint}
        config = {"storage": {"long_term": bucket}, "references": {"in_responses": "never"}}
        init = tierstream("storage", "init", config=config)
        assert init.code == 0, init.err
        assert "storage.long_term: gcs bucket/objects/, ready" in init.out

        async def put() -> None:
            long_term = GcsBackend("bucket", endpoint=strict_gcs.endpoint, prefix="objects/")
            storage = TieredStorage(SqliteBackend("data/objects.sqlite"), long_term, threshold=THRESHOLD)
            await storage.put(LARGE, Metadata("text/plain"), b"a larger payload")
            await long_term.put(old_revision(), Metadata(), b"an orphan")
            await storage.join()
            await storage.close()

        asyncio.run(put())
        read = tierstream("storage", "get", LARGE.storage_path, config=config)
        seen = tierstream("storage", "head", LARGE.storage_path, "--json", config=config).json
        found = tierstream("storage", "verify", "--json", config=config)
        mended = tierstream("storage", "verify", "--repair", "--yes", config=config)
        removed = tierstream("storage", "rm", LARGE.storage_path, "--yes", config=config)

        assert (read.out, seen["tier"]) == ("a larger payload", "long_term")
        assert (found.code, len(found.json["orphans"]), found.json["dangling"]) == (1, 1, [])
        assert (mended.code, removed.code) == (0, 0), mended.err + removed.err
        assert not strict_gcs.bucket("bucket")

    def test_a_bucket_that_is_not_there_is_refused(self, tierstream: Tierstream, strict_gcs: StrictGcs) -> None:
        """Contract 11: configuration, exit 2."""
        bucket = {"type": "gcs", "bucket": "absent", "endpoint": strict_gcs.endpoint}
        said = tierstream("storage", "init", config={"storage": {"long_term": bucket}})

        assert said.code == 2
        assert "there is no bucket absent" in said.err

    def test_files_of_something_else_are_refused(self, tierstream: Tierstream, tmp_path: Path) -> None:
        """Contract 11: configuration, exit 2."""
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "objects").mkdir()
        (tmp_path / "data" / "objects" / "FORMAT").write_text("99\n", encoding="utf-8")

        said = tierstream("storage", "init")

        assert said.code == 2
        assert "newer version" in said.err


@pytest.mark.usefixtures("storage")
class TestReading:
    """`storage get`, `storage head`."""

    @pytest.mark.parametrize(("whose", "payload"), [(SMALL, "a payload"), (LARGE, "a larger payload")])
    def test_the_payload_goes_to_stdout(self, tierstream: Tierstream, whose: ObjectId, payload: str) -> None:
        """From either tier, and nothing else with it."""
        by_path = tierstream("storage", "get", whose.storage_path)
        by_parts = tierstream("storage", "get", "u", whose.key, "--scope", "org=1")

        assert (by_path.code, by_path.out, by_path.err) == (0, payload, "")
        assert by_parts.out == payload

    def test_json_says_where_it_lies(self, tierstream: Tierstream, storage: Storage) -> None:
        """Tier, revision and metadata."""
        small = tierstream("storage", "head", SMALL.storage_path, "--json").json
        large = tierstream("storage", "get", LARGE.storage_path, "--json").json

        assert (small["tier"], small["revision"], small["metadata"]["size"]) == ("high_volume", None, 9)
        assert (large["tier"], [large["revision"]]) == ("long_term", storage.revisions())
        assert base64.b64decode(large["payload_base64"]) == b"a larger payload"

    def test_text_has_a_line_for_each_field(self, tierstream: Tierstream) -> None:
        """For people; absent ones are dashes."""
        lines = tierstream("storage", "head", LARGE.storage_path).out.splitlines()
        fields = dict(line.split(maxsplit=1) for line in lines)

        assert fields["tier"] == "long_term"
        assert fields["content_type"] == "application/octet-stream"
        assert (fields["filename"], fields["size"]) == ("-", "16")
        assert datetime.fromisoformat(fields["time_created"]) > datetime.now(UTC) - timedelta(minutes=5)

    def test_a_file_takes_the_payload(self, tierstream: Tierstream, tmp_path: Path) -> None:
        """Byte for byte."""
        said = tierstream("storage", "get", LARGE.storage_path, "--output", "out")
        refused = tierstream("storage", "get", LARGE.storage_path, "--output", "no/such/folder")

        assert (said.code, said.out) == (0, "")
        assert (tmp_path / "out").read_bytes() == b"a larger payload"
        assert refused.code == 1

    @pytest.mark.parametrize("command", ["get", "head"])
    def test_no_object_is_exit_1(self, tierstream: Tierstream, command: str) -> None:
        """In words."""
        said = tierstream("storage", command, "u", "nothing")

        assert (said.code, said.out) == (1, "")
        assert said.err == "error: there is no object u/objects/nothing\n"

    def test_a_lost_payload_is_said_to_be_lost(self, tierstream: Tierstream, storage: Storage) -> None:
        """The service would answer that there is no object."""
        (name,) = storage.revisions()
        storage.do(lambda parts: parts.long_term.delete(Revision(name)))

        said = tierstream("storage", "get", LARGE.storage_path)

        assert said.code == 1
        assert "payload is missing" in said.err
        assert "hint: `tierstream storage verify`" in said.err

    def test_looking_extends_no_idle_expiry(self, tierstream: Tierstream, storage: Storage) -> None:
        """Who looks from outside leaves everything as it is."""
        past = datetime.now(UTC) - timedelta(seconds=50)
        expires = past + timedelta(seconds=100)
        idle = Metadata(expiration=TimeToIdle(100), time_created=past, time_expires=expires, size=1)
        storage.do(lambda parts: parts.high_volume.put_non_tombstone(SMALL, idle, b"x"))

        assert tierstream("storage", "get", SMALL.storage_path).out == "x"
        assert storage.row(SMALL) == idle


class TestRefusals:
    """Storage that a command cannot see."""

    COMMANDS = ("get u/objects/k", "head u/objects/k", "rm u/objects/k", "verify", "recover")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_memory_is_the_services_own(self, tierstream: Tierstream, command: str) -> None:
        """Else everything would seem to be gone."""
        memory = {"high_volume": {"type": "memory"}, "long_term": {"type": "memory"}}

        said = tierstream("storage", *command.split(), config={"storage": memory})

        assert (said.code, said.out) == (2, "")
        assert "storage.high_volume is memory" in said.err

    @pytest.mark.parametrize("command", COMMANDS)
    def test_files_that_are_not_there_are_not_made(self, tierstream: Tierstream, tmp_path: Path, command: str) -> None:
        """The wrong folder looks like lost data."""
        said = tierstream("storage", *command.split())

        assert (said.code, said.out) == (1, "")
        assert "there is no data/objects.sqlite" in said.err
        assert "hint: `tierstream storage init`" in said.err
        assert files(tmp_path) == []


class TestRemove:
    """`storage rm`."""

    @pytest.mark.parametrize("whose", [SMALL, LARGE])
    def test_it_is_gone_with_its_revision(self, tierstream: Tierstream, storage: Storage, whose: ObjectId) -> None:
        """And nothing is left in the change log."""
        said = tierstream("storage", "rm", whose.storage_path, "--yes", "--json")

        assert said.json == {"path": whose.storage_path, "existed": True, "removed": True}
        assert storage.row(whose) is None
        assert len(storage.revisions()) == (0 if whose is LARGE else 1)
        assert tierstream("storage", "verify", "--json").json["changes"] == 0

    def test_a_dry_run_and_a_missing_yes_leave_it(self, tierstream: Tierstream, storage: Storage) -> None:
        """Contract 7."""
        dry = tierstream("storage", "rm", LARGE.storage_path, "--dry-run")
        unsure = tierstream("storage", "rm", LARGE.storage_path)

        assert (dry.code, dry.out) == (0, f"{LARGE.storage_path} would be removed\n")
        assert unsure.code == 2
        assert storage.row(LARGE) is not None

    def test_nothing_to_remove_is_fine(self, tierstream: Tierstream, storage: Storage) -> None:
        """As a delete of the service; nobody is asked."""
        del storage
        said = tierstream("storage", "rm", "u", "nothing")

        assert (said.code, said.out) == (0, "there is no object u/objects/nothing\n")


class TestVerify:
    """`storage verify`."""

    EMPTY: dict[str, Any] = {"changes": 0, "orphans": [], "dangling": [], "foreign": [], "repaired": 0}  # noqa: RUF012

    def test_storage_in_order_is_exit_0(self, tierstream: Tierstream, storage: Storage) -> None:
        """Both tiers are counted."""
        del storage

        assert tierstream("storage", "verify", "--json").json == {"tombstones": 1, "revisions": 1, **self.EMPTY}
        assert tierstream("storage", "verify").out.startswith("1 tombstones, 1 revisions, 0 unfinished changes: 0 orph")

    def test_orphans_and_dangling_tombstones_are_named(self, tierstream: Tierstream, storage: Storage) -> None:
        """Exit 1, and nothing is changed."""
        orphan = storage.add_revision(old_revision())
        storage.add_revision(Revision("responses/t/0/1"))
        lost = ObjectId(ObjectContext("u"), "lost")
        storage.add_tombstone(lost, old_revision(lost))

        said = tierstream("storage", "verify", "--json")
        text = tierstream("storage", "verify")

        assert said.code == text.code == 1
        assert said.json == {
            "tombstones": 2,
            "revisions": 2,
            "changes": 0,
            "orphans": [orphan.name],
            "dangling": ["u/objects/lost"],
            "foreign": ["responses/t/0/1"],
            "repaired": 0,
        }
        assert f"orphan    {orphan.name}\ndangling  u/objects/lost\nforeign   responses/t/0/1\n" in text.out
        assert text.err == "error: 2 findings are not repaired\nhint: --repair removes them\n"

    def test_repair_removes_them_and_nothing_else(self, tierstream: Tierstream, storage: Storage) -> None:
        """Exit 0; the next look finds nothing."""
        storage.add_revision(old_revision())
        storage.add_revision(Revision("responses/t/0/1"))
        lost = ObjectId(ObjectContext("u"), "lost")
        storage.add_tombstone(lost, old_revision(lost))

        dry = tierstream("storage", "verify", "--repair", "--dry-run", "--json")
        unsure = tierstream("storage", "verify", "--repair")
        done = tierstream("storage", "verify", "--repair", "--yes", "--json")
        again = tierstream("storage", "verify", "--json")

        assert (dry.code, dry.json["repaired"], unsure.code) == (1, 0, 2)
        assert (done.code, done.json["repaired"]) == (0, 2)
        assert (again.code, again.json["revisions"]) == (0, 1)
        assert storage.row(lost) is None
        assert tierstream("storage", "get", LARGE.storage_path).out == "a larger payload"

    def test_a_young_revision_is_no_orphan_yet(self, tierstream: Tierstream, storage: Storage) -> None:
        """It may be an upload under way."""
        orphan = storage.add_revision(new_revision(LARGE))

        assert tierstream("storage", "verify", "--json").json["orphans"] == []
        assert tierstream("storage", "verify", "--min-age", "0s", "--json").json["orphans"] == [orphan.name]

    def test_what_an_unfinished_change_names_is_its_owners(self, tierstream: Tierstream, storage: Storage) -> None:
        """LOG-2: recovery removes it."""
        new, old = storage.add_revision(old_revision()), storage.add_revision(old_revision(hours=3))
        storage.do(lambda parts: parts.log.record(Change(uuid7(), LARGE, new, old)))

        said = tierstream("storage", "verify", "--json")

        assert said.code == 0
        assert (said.json["changes"], said.json["revisions"], said.json["orphans"]) == (1, 3, [])

    @pytest.mark.parametrize("tier", ["high_volume", "long_term"])
    def test_an_empty_tier_beside_a_full_one_is_not_repaired(
        self, tierstream: Tierstream, storage: Storage, tmp_path: Path, tier: str
    ) -> None:
        """A wrong path would lose everything."""
        storage.add_revision(old_revision())
        asyncio.run(_make_empty(tmp_path))
        paths = {"high_volume": {"path": "empty.sqlite"}, "long_term": {"path": "empty"}}

        said = tierstream(
            "storage", "verify", "--repair", "--yes", config={"storage": {tier: paths[tier]}}
        )

        assert said.code == 1
        assert "one tier is empty and the other is not" in said.err
        assert len(storage.revisions()) == 2
        assert storage.row(LARGE) is not None

    def test_a_missing_folder_is_refused(self, tierstream: Tierstream, storage: Storage) -> None:
        """Else all its tombstones would dangle."""
        del storage
        said = tierstream("storage", "verify", config={"storage": {"long_term": {"path": "elsewhere"}}})

        assert said.code == 1
        assert "there is no elsewhere" in said.err

    def test_a_wrong_duration_is_usage(self, tierstream: Tierstream) -> None:
        """Contract 11."""
        assert tierstream("storage", "verify", "--min-age", "soon").code == 2


async def _make_empty(folder: Path) -> None:
    high_volume, long_term = SqliteBackend(folder / "empty.sqlite"), FilesystemBackend(folder / "empty")
    await high_volume.open()
    await long_term.open()
    await long_term.close()
    await high_volume.close()


class TestVerifyBesideAService:
    """The service goes on while both tiers are looked through."""

    @staticmethod
    def check(backend: MemoryBackend, log: Any = None) -> StorageCheck:
        """Return a check of *backend*, both tiers in one."""
        return StorageCheck(backend, backend, log or MemoryChangeLog(), min_age_seconds=0)

    async def test_a_revision_that_gets_its_row_in_time_is_no_orphan(self) -> None:
        """Seen without, and looked at again."""
        revision = new_revision(LARGE)

        class Late(MemoryChangeLog):
            """The row is written after the revisions have been looked at, before suspects are judged."""

            async def scan_changes(self) -> Any:
                await backend.compare_and_write(LARGE, None, Tombstone(revision, Metadata()))
                async for change in super().scan_changes():
                    yield change

        backend = MemoryBackend()
        await backend.put(revision, Metadata(), b"x")

        report = await self.check(backend, Late()).run()

        assert (report.orphans, report.dangling, report.revisions) == ([], [], 1)

    async def test_a_tombstone_replaced_in_time_does_not_dangle(self) -> None:
        """Its revision is gone because the object has another."""
        old, new = new_revision(LARGE), new_revision(LARGE)

        class Late(MemoryChangeLog):
            """The object is replaced in between."""

            async def scan_changes(self) -> Any:
                await backend.put(new, Metadata(), b"x")
                await backend.compare_and_write(LARGE, old, Tombstone(new, Metadata()))
                async for change in super().scan_changes():
                    yield change

        backend = MemoryBackend()
        await backend.compare_and_write(LARGE, None, Tombstone(old, Metadata()))

        report = await self.check(backend, Late()).run()

        assert (report.orphans, report.dangling, report.tombstones) == ([], [], 1)

    async def test_an_orphan_that_becomes_current_before_the_repair_stays(self) -> None:
        """The fence of recovery: what the row points to cannot be forbidden."""
        revision = new_revision(LARGE)
        backend = MemoryBackend()
        await backend.put(revision, Metadata(), b"x")
        check = self.check(backend)
        report = await check.run()
        await backend.compare_and_write(LARGE, None, Tombstone(revision, Metadata()))

        await check.repair()

        assert report.orphans == [revision.name]
        assert await backend.get(revision) is not None

    async def test_a_dangling_row_that_is_replaced_before_the_repair_stays(self) -> None:
        """The swap names what it has seen."""
        old, new = new_revision(LARGE), new_revision(LARGE)
        backend = MemoryBackend()
        await backend.compare_and_write(LARGE, None, Tombstone(old, Metadata()))
        check = self.check(backend)
        report = await check.run()
        await backend.compare_and_write(LARGE, old, Tombstone(new, Metadata()))

        await check.repair()

        assert report.dangling == [LARGE.storage_path]
        assert await backend.head_tiered(LARGE) == Tombstone(new, Metadata())

    async def test_many_of_each_are_all_judged(self) -> None:
        """Groups of any size, full and partial."""
        backend = MemoryBackend()
        orphans, dangling = [], []
        for number in range(objects.LOOKS_AT_ONCE * 2 + 5):
            whose = ObjectId(ObjectContext("u"), str(number))
            revision = new_revision(whose)
            if number % 3 != 1:
                await backend.put(revision, Metadata(), b"x")
            if number % 3:
                await backend.compare_and_write(whose, None, Tombstone(revision, Metadata()))
            if number % 3 == 0:
                orphans.append(revision.name)
            elif number % 3 == 1:
                dangling.append(whose.storage_path)
        check = self.check(backend)

        report = await check.run()
        await check.repair()
        after = await self.check(backend).run()

        assert (report.orphans, report.dangling) == (sorted(orphans), sorted(dangling))
        assert (after.found, report.repaired) == (0, len(orphans) + len(dangling))

    async def test_a_tier_that_does_not_answer_is_a_failure_in_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing waits for ever."""

        class Silent(MemoryBackend):
            """Its scan never goes on."""

            async def scan_revisions(self) -> Any:
                await asyncio.Event().wait()
                yield None

        monkeypatch.setattr(objects, "REQUEST_SECONDS", 0.01)

        with pytest.raises(Failure, match="did not answer"):
            await self.check(Silent()).run()


class TestRecover:
    """`storage recover`."""

    @staticmethod
    def crash(storage: Storage, owner: str, *, lease: float) -> Revision:
        """Leave a change whose process is gone; its lease runs for *lease* seconds more."""
        revision = old_revision()

        async def crash() -> None:
            parts = Parts(storage.folder)
            log = SqliteChangeLog(storage.folder / "data" / "objects.sqlite", owner, lease)
            try:
                await log.record(Change(uuid7(), LARGE, revision, None))
                await parts.long_term.put(revision, Metadata(), b"x")
            finally:
                if lease < 1:
                    await log.close()
                else:
                    log._database.never(log._heartbeat)  # type: ignore[arg-type] # it has one: it has recorded
                    await log._database.release()
                await parts.close()

        asyncio.run(crash())
        return revision

    def test_what_the_dead_have_left_is_removed(self, tierstream: Tierstream, storage: Storage) -> None:
        """LOG-5, without a service."""
        self.crash(storage, "dead", lease=0.1)

        said = tierstream("storage", "recover", "--json")

        assert (said.code, said.json) == (0, {"owner": None, "entries": 1, "recovered": 1})
        assert len(storage.revisions()) == 1

    def test_the_living_are_left_alone_unless_named(self, tierstream: Tierstream, storage: Storage) -> None:
        """Contract 7: a named dead owner, before its lease is over; that has to be confirmed."""
        revision = self.crash(storage, "replica-7", lease=600)

        alive = tierstream("storage", "recover", "--json")
        dry = tierstream("storage", "recover", "replica-7", "--dry-run")
        unsure = tierstream("storage", "recover", "replica-7")
        named = tierstream("storage", "recover", "replica-7", "--yes", "--json")

        assert alive.json == {"owner": None, "entries": 0, "recovered": 0}
        assert (dry.code, unsure.code) == (0, 2)
        assert dry.err == f"replica-7: {LARGE.storage_path} (new {revision}, old -)\n"
        assert named.json == {"owner": "replica-7", "entries": 1, "recovered": 1}
        assert revision.name not in storage.revisions()

    def test_what_cannot_be_cleaned_up_is_exit_1(
        self, tierstream: Tierstream, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It stays in the log."""
        from consumer.errors import BackendUnavailable

        self.crash(storage, "dead", lease=0.1)

        async def refuse(self: object, revision: Revision) -> None:
            raise BackendUnavailable("the disk is on fire")

        with monkeypatch.context() as patch:
            patch.setattr(FilesystemBackend, "delete", refuse)
            failed: Result = tierstream("storage", "recover", "--json")
        again = tierstream("storage", "recover", "--json")

        assert (failed.code, json.loads(failed.out)["recovered"]) == (1, 0)
        assert "hint: they stay in the change log" in failed.err
        assert again.json["recovered"] == 1
