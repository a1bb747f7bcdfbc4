"""What was acknowledged is there after SIGKILL: real processes, killed in the middle of group commits.

The child writes as fast as it can and prints each key as soon as its put has returned; the test kills it at a random
moment and reads everything that was printed. A kill does not lose what the operating system has taken, so this proves
the order of commit and answer, and that a half-written group is undone; that a commit is flushed to the disk is proved
by the settings (`tests/unit/test_sqlite.py`).
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from consumer.ids import ObjectContext, ObjectId
from consumer.operations import StoredObject
from consumer.storage.backend import Revision, Tombstone
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.process, pytest.mark.slow]

IMPORTS = """
import asyncio, itertools, os, sys
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import Metadata
from consumer.storage.backend import Change, Revision, Tombstone
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.revision import new_revision, uuid7
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog

folder, name = sys.argv[1:]
context = ObjectContext(name)

def acknowledged(text):
    os.write(1, text.encode() + b"\\n")
"""

OBJECTS = f"""{IMPORTS}
async def main():
    backend = SqliteBackend(folder + "/objects.sqlite")
    numbers = itertools.count()
    async def write():
        for number in numbers:
            object_id = ObjectId(context, str(number))
            if number % 3:
                assert await backend.put_non_tombstone(object_id, Metadata(), b"%d" % number * 500) is None
            else:
                tombstone = Tombstone(Revision(f"r{{number}}"), Metadata(size=number))
                assert await backend.compare_and_write(object_id, None, tombstone)
            acknowledged(str(number))
    await asyncio.gather(*(write() for _ in range(32)))
asyncio.run(main())
"""

CHANGES = f"""{IMPORTS}
async def main():
    log = SqliteChangeLog(folder + "/objects.sqlite", name)
    numbers = itertools.count()
    async def write():
        for number in numbers:
            object_id = ObjectId(context, str(number))
            await log.record(Change(uuid7(), object_id, new_revision(object_id), None))
            acknowledged(str(number))
    await asyncio.gather(*(write() for _ in range(8)))
asyncio.run(main())
"""

REVISIONS = f"""{IMPORTS}
async def main():
    backend = FilesystemBackend(folder + "/objects")
    numbers = itertools.count()
    async def chunks(number):
        for _ in range(3):
            yield b"%07d" % number * 50_000
    async def write():
        for number in numbers:
            await backend.put(Revision(f"{{name}}/{{number}}"), Metadata(), chunks(number))
            acknowledged(str(number))
    await asyncio.gather(*(write() for _ in range(8)))
asyncio.run(main())
"""


SWAPS = f"""{IMPORTS}
async def main():
    backend = SqliteBackend(folder + "/objects.sqlite")
    shared = ObjectId(ObjectContext("shared"), "row")
    while True:
        row = await backend.head_tiered(shared)
        number = 0 if row is None else int(row.target.name.partition("-")[2])
        write = Tombstone(Revision(f"{{name}}-{{number + 1}}"), Metadata())
        if await backend.compare_and_write(shared, None if row is None else row.target, write):
            acknowledged(str(number + 1))
asyncio.run(main())
"""


class Child:
    """A process that writes, and what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.acknowledged: list[int] = []

    async def read(self, count: int) -> None:
        """Wait until *count* writes have been acknowledged."""
        assert self.process.stdout is not None
        while len(self.acknowledged) < count:
            line = await self.process.stdout.readline()
            assert line, "the child ended by itself"
            self.acknowledged.append(int(line))

    async def kill(self) -> None:
        """End it without a chance to tidy up, and read the rest of what it said before."""
        self.process.send_signal(signal.SIGKILL)
        assert self.process.stdout is not None
        rest = await self.process.stdout.read()
        *whole, _torn = rest.split(b"\n")
        self.acknowledged += map(int, whole)
        await self.process.wait()


@asynccontextmanager
async def child(program: str, folder: Path, name: str) -> AsyncIterator[Child]:
    """Run *program* over *folder*; it is dead in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(folder), name, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    running = Child(process)
    try:
        yield running
    finally:
        if process.returncode is None:
            await running.kill()


@pytest.mark.parametrize("kill", range(4))
async def test_every_acknowledged_object_is_there_after_a_kill(tmp_path: Path, kill: int) -> None:
    """I7, with 32 writers in groups; rows that were not acknowledged are whole or absent."""
    async with child(OBJECTS, tmp_path, "u") as writing:
        await writing.read(random.randint(1, 3000))
        await writing.kill()
    backend = SqliteBackend(tmp_path / "objects.sqlite")

    for number in range(max(writing.acknowledged) + 40):
        found = await backend.get_tiered(ObjectId(ObjectContext("u"), str(number)))
        if isinstance(found, StoredObject):
            assert found.payload == b"%d" % number * 500
        elif isinstance(found, Tombstone):
            assert (found.target, found.metadata.size) == (Revision(f"r{number}"), number)
        assert found is not None or number not in writing.acknowledged, f"kill {kill}: {number} is lost"
    await backend.close()


async def test_two_processes_share_a_file_and_one_survives_the_others_death(tmp_path: Path) -> None:
    """Contract 5: a killed process leaves no lock behind, and takes nothing of the other's with it."""
    async with child(OBJECTS, tmp_path, "one") as one, child(OBJECTS, tmp_path, "other") as other:
        await asyncio.gather(one.read(300), other.read(300))
        await one.kill()
        await other.read(len(other.acknowledged) + 300)
        await other.kill()
    backend = SqliteBackend(tmp_path / "objects.sqlite")

    for name, writing in (("one", one), ("other", other)):
        for number in writing.acknowledged:
            assert await backend.get_tiered(ObjectId(ObjectContext(name), str(number))) is not None
    await backend.close()


async def test_of_two_processes_that_swap_a_row_only_one_wins_each_time(tmp_path: Path) -> None:
    """HV-5, HV-7: the file's lock makes a compare-and-swap one step across processes."""
    async with child(SWAPS, tmp_path, "one") as one, child(SWAPS, tmp_path, "other") as other:
        await asyncio.gather(one.read(25), other.read(25))
        await one.kill()
        await other.kill()

    won = sorted(one.acknowledged + other.acknowledged)
    assert len(set(won)) == len(won), "a swap was won twice"
    missing = set(range(1, won[-1] + 1)) - set(won)
    assert len(missing) <= 2, "a kill may come between a swap and saying so, and nothing else may be lost"


async def test_every_recorded_change_can_be_recovered_after_a_kill(tmp_path: Path) -> None:
    """LOG-1: at once under the same owner, and by nobody else while the lease lasts."""
    async with child(CHANGES, tmp_path, "me") as writing:
        await writing.read(500)
        await writing.kill()
    other, restarted = (SqliteChangeLog(tmp_path / "objects.sqlite", owner) for owner in ("other", "me"))

    assert list(await other.recoverable()) == []
    recovered: set[int] = set()
    found = await restarted.recoverable()
    while found:
        recovered |= {int(change.object_id.key) for change in found}
        found = await restarted.recoverable(found[-1].change_id)
    assert recovered >= set(writing.acknowledged)
    assert len(recovered) <= len(writing.acknowledged) + 8
    await other.close()
    await restarted.close()


@pytest.mark.parametrize("kill", range(3))
async def test_every_acknowledged_revision_is_whole_after_a_kill(tmp_path: Path, kill: int) -> None:
    """I7; unfinished ones are absent, and their temporary files are gone after the next start."""
    async with child(REVISIONS, tmp_path, "u") as writing:
        await writing.read(random.randint(5, 60))
        await writing.kill()
    backend = FilesystemBackend(tmp_path / "objects")

    for number in range(max(writing.acknowledged) + 10):
        found = await backend.get(Revision(f"u/{number}"))
        assert found is None or found.payload == b"%07d" % number * 150_000
        assert found is not None or number not in writing.acknowledged, f"kill {kill}: {number} is lost"
    assert list((tmp_path / "objects" / "incoming").glob("*")) == []
    await backend.close()
