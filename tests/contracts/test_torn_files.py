"""A torn storage file: every commit before the tear is there, whole, and none behind it in part.

SQLite's write-ahead log is what a power cut, or a disk that lies, can tear: it is cut off, or a bit of it flipped, at
each boundary between two of its frames and inside of each. A commit is whole where all its frames and those before them
are. What is relied on besides (`journal_mode = WAL`, `synchronous = FULL`: the log is flushed before a commit is
answered) is held in `unit/test_sqlite.py`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from consumer.ids import ObjectContext, ObjectId
from consumer.operations import Metadata, StoredObject
from consumer.storage.backend import Change, Revision, Tombstone
from consumer.storage.revision import new_revision, uuid7
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog

CONTEXT = ObjectContext("torn")
COMMITS = 6
LOG_HEADER, FRAME = 32, 16_384 + 24
"""Bytes: of the log's header; of a frame, which is a page and its header."""

State: TypeAlias = tuple[dict[int, str], set[int]]
"""What each object holds, and which changes are recorded."""


def an_id(number: int) -> ObjectId:
    """Return one of three objects, so that commits touch pages of others too."""
    return ObjectId(CONTEXT, str(number % 3))


async def write(folder: Path) -> list[tuple[int, State]]:
    """Commit step by step; return how long the log was after each commit, and what had been acknowledged then."""
    file = folder / "objects.sqlite"
    log_file = folder / "objects.sqlite-wal"
    rows, changes = SqliteBackend(file), SqliteChangeLog(file, "me", lease_seconds=1e6)
    await rows.open()
    objects: dict[int, str] = {}
    recorded: set[int] = set()
    acknowledged: list[tuple[int, State]] = []
    for number in range(COMMITS):
        if number % 3 == 0:
            await changes.record(Change(uuid7(), an_id(number), new_revision(an_id(number)), Revision(str(number))))
            recorded.add(number)
        elif number % 3 == 1:
            await rows.put_non_tombstone(an_id(number), Metadata(), b"%d" % number * 20_000)
            objects[number % 3] = str(number)
        else:
            current = None if number % 3 not in objects else Revision(objects[number % 3])
            assert await rows.compare_and_write(an_id(number), current, Tombstone(Revision(str(number)), Metadata()))
            objects[number % 3] = str(number)
        acknowledged.append((log_file.stat().st_size, (dict(objects), set(recorded))))
    for name in ("objects.sqlite", "objects.sqlite-wal"):
        shutil.copy(folder / name, folder / f"copy-of-{name}")
    await changes.close()
    await rows.close()
    return acknowledged


async def read(file: Path) -> State:
    """Open the file as a new process does, and return what is there."""
    rows, changes = SqliteBackend(file), SqliteChangeLog(file, "reader")
    objects: dict[int, str] = {}
    for number in range(3):
        found = await rows.get_tiered(an_id(number))
        if isinstance(found, Tombstone):
            objects[number] = found.target.name
        elif isinstance(found, StoredObject):
            assert isinstance(found.payload, bytes)
            objects[number] = found.payload[: len(found.payload) // 20_000].decode()
            assert found.payload == objects[number].encode() * 20_000
    recorded = {int(change.old.name) async for _, change in changes.scan_changes() if change.old is not None}
    await rows.put_non_tombstone(ObjectId(CONTEXT, "after"), Metadata(), b"it can be written to")
    await changes.close()
    await rows.close()
    return objects, recorded


def cut(log: bytearray, at: int) -> None:
    """Lose everything from here on."""
    del log[at:]


def flip(log: bytearray, at: int) -> None:
    """Have one bit wrong."""
    log[min(at, len(log) - 1)] ^= 0x10


def zeros(log: bytearray, at: int) -> None:
    """Have the length, and nothing in it: the size was flushed, the data was not."""
    log[at:] = bytes(len(log) - at)


@pytest.mark.slow
@pytest.mark.parametrize("tear", [cut, flip, zeros])
async def test_every_commit_before_a_tear_is_there_and_none_behind_it(
    tmp_path: Path, tear: Callable[[bytearray, int], None]
) -> None:
    """I7: objects and changes alike; the file can be written to afterwards."""
    acknowledged = await write(tmp_path)
    whole = (tmp_path / "copy-of-objects.sqlite-wal").read_bytes()
    frames = (len(whole) - LOG_HEADER) // FRAME
    assert len(whole) == acknowledged[-1][0] == LOG_HEADER + frames * FRAME, "void: the log was put away meanwhile"
    boundaries = [LOG_HEADER + frame * FRAME for frame in range(frames)]
    seen = set()
    for at in sorted({place for start in boundaries for place in (start, start + 12, start + FRAME // 2)}):
        folder = tmp_path / f"torn-at-{at}"
        folder.mkdir()
        shutil.copy(tmp_path / "copy-of-objects.sqlite", folder / "objects.sqlite")
        log = bytearray(whole)
        tear(log, at)
        (folder / "objects.sqlite-wal").write_bytes(log)

        # A frame that begins before the tear and ends behind it is torn, and all that follow go with it.
        intact = [state for size, state in acknowledged if size <= LOG_HEADER + (at - LOG_HEADER) // FRAME * FRAME]
        expected = intact[-1] if intact else ({}, set())
        assert await read(folder / "objects.sqlite") == expected, at
        seen.add(len(intact))

    assert seen == set(range(COMMITS)), "a tear before every commit"
