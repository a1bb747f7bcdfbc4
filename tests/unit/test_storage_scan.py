"""The scan of the tiers' files finds what recovery may not leave, and nothing where all is well."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.operations import Metadata
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog
from consumer.storage.tiered import TieredStorage
from storage_scan import Scan, scan

HOUR = 3_600_000_000
"""In microseconds, as times are in the tables."""


class Tiers:
    """Both, made by hand as their modules describe them."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "objects.sqlite"
        self.folder = folder / "objects"
        (self.folder / "incoming").mkdir(parents=True)
        (self.folder / "tier.lock").touch()
        self.sql("CREATE TABLE objects (path TEXT, expires INTEGER, target TEXT)")
        self.sql("CREATE TABLE change_log_entries (old_revision TEXT, new_revision TEXT, not_before INTEGER)")

    def sql(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.database)) as tables, tables:
            tables.execute(statement, values)

    def row(self, path: str, target: str | None, expires: int | None = None) -> None:
        """Add a row to the high-volume tier."""
        self.sql("INSERT INTO objects VALUES (?, ?, ?)", path, expires, target)

    def revision(self, name: str, payload: bytes = b"payload") -> Path:
        """Put a revision into the long-term tier; return its payload's path."""
        here = self.folder / f"{len(name):03x}" / "more"
        here.mkdir(parents=True, exist_ok=True)
        stem = name.replace("/", "%2F")
        own = json.dumps({"name": name, "size": 7, "crc32c": 1}).encode()
        (here / f"{stem}.json").write_bytes(own + b'\n{"metadata": true}')
        (here / f"{stem}.payload").write_bytes(payload)
        return here / f"{stem}.payload"

    def scan(self) -> Scan:
        """Look."""
        return scan(self.database, self.folder)


@pytest.fixture
def tiers(tmp_path: Path) -> Tiers:
    """Two large objects, a small one, and one that was deleted at a position: its row has expired."""
    made = Tiers(tmp_path)
    for number in range(2):
        made.row(f"large/{number}", f"large/{number}/r")
        made.revision(f"large/{number}/r")
    made.row("small", None)
    made.row("deleted", "deleted/r", expires=time.time_ns() // 1000 - 1)
    return made


def test_each_redirect_with_its_file_and_no_file_more_is_right(tiers: Tiers) -> None:
    """I8; marks at the root of the folder are the tier's own."""
    assert tiers.scan() == Scan(2, [])


def test_what_is_kept_for_readers_is_no_orphan_until_its_time_has_come(tiers: Tiers) -> None:
    """`references.retention`: the change log says until when."""
    tiers.revision("replaced/r")
    tiers.sql("INSERT INTO change_log_entries VALUES (?, NULL, ?)", "replaced/r", time.time_ns() // 1000 + HOUR)
    assert tiers.scan().wrong == []

    tiers.sql("UPDATE change_log_entries SET not_before = 1")
    assert tiers.scan().wrong == ["no row points to replaced/r"]


SPOILED: dict[str, tuple[Callable[[Tiers], object], str]] = {
    "a file without a row": (lambda tiers: tiers.revision("orphan/r"), "no row points to orphan/r"),
    "a file of an expired row": (lambda tiers: tiers.revision("deleted/r"), "no row points to deleted/r"),
    "a row without a file": (lambda tiers: tiers.row("x", "x/r"), "a row points to x/r, which is not there"),
    "two rows, one file": (lambda tiers: tiers.row("x", "large/0/r"), "2 rows point to large/0/r"),
    "a payload cut short": (lambda tiers: tiers.revision("large/1/r", b"pay"), "large/1/r has 3 bytes, not 7"),
    "a temporary file": (
        lambda tiers: (tiers.folder / "incoming" / "0a1b").touch(),
        "a temporary file is left: 0a1b",
    ),
    "a description alone": (lambda tiers: tiers.revision("orphan/r").unlink(), "without a payload"),
    "a payload alone": (
        lambda tiers: tiers.revision("orphan/r").with_suffix(".json").unlink(),
        "without a description",
    ),
    "a file of nobody": (
        lambda tiers: tiers.revision("large/1/r").with_suffix(".tmp").touch(),
        "neither payload nor description",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_recovery_may_not_leave_is_found(tiers: Tiers, name: str) -> None:
    """I8, in words that say which."""
    spoil, text = SPOILED[name]
    spoil(tiers)

    (wrong,) = tiers.scan().wrong
    assert wrong.startswith(text)


@pytest.mark.parametrize("retention", [None, 3600.0])
async def test_what_the_tiers_have_really_written_is_read(tmp_path: Path, retention: float | None) -> None:
    """Large objects that were inserted, replaced and deleted; with a retention, the change log keeps what is gone."""
    database, folder = tmp_path / "objects.sqlite", tmp_path / "objects"
    tiers = SqliteBackend(database), FilesystemBackend(folder), SqliteChangeLog(database)
    storage = TieredStorage(*tiers, threshold=10, handout_seconds=retention)
    objects = [ObjectId(ObjectContext("u", [Scope("org", "1")]), f"k{number}") for number in range(4)]
    for one in [*objects, *objects[:2]]:
        await storage.put(one, Metadata(), b"longer than ten bytes")
    await storage.put(objects[2], Metadata(), b"short")
    await storage.delete(objects[3])
    await storage.join()
    await storage.close()

    assert scan(database, folder) == Scan(2, [])
    kept = sum(path.suffix == ".payload" for path in folder.rglob("*")) - 2
    assert kept == (0 if retention is None else 4)
    with closing(sqlite3.connect(database)) as tables, tables:
        tables.execute("DELETE FROM change_log_entries")
    assert len(scan(database, folder).wrong) == kept, "what nobody keeps is an orphan"
