"""A process whose storage runs out of disk, and gets it back; a program, started by `test_full_disk.py`.

``python filling.py FOLDER HOW``: *HOW* is ``limit``, where no file may grow any more (RLIMIT_FSIZE), or ``space``,
where a file beside the storage takes all there is of a small filesystem. It asserts all along that every object holds
what was acknowledged last, and in the end prints what happened, as JSON.

1. *Room for rows*: a large payload does not fit; small objects, reads and deletions go on.
2. *No room at all*: what is refused has not happened; reads go on.
3. *Space again*: everything works by itself, and what is left over is what rows point to.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import cast

from consumer.errors import BackendUnavailable, TierstreamError
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import DEFAULT_METADATA
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog
from consumer.storage.tiered import TieredStorage

THRESHOLD = 100_000
SMALL, LARGE = 20_000, 1_500_000
ROOM_FOR_ROWS = 700_000
CONTEXT = ObjectContext("full")
KEYS = [f"k{number}" for number in range(6)]
NO_LIMIT = resource.RLIM_INFINITY
FILLING = 65_536


class Limit:
    """No file may be longer than what the longest one is now, and some."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def leave(self, room: int) -> None:
        """Leave so much, or nothing."""
        log = self._folder / "objects.sqlite-wal"
        resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + room if room else 1, NO_LIMIT))

    def free(self) -> None:
        """Let files grow again."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (NO_LIMIT, NO_LIMIT))


class Space:
    """A file beside the storage takes what is free."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._filler = folder / "filler"

    def leave(self, room: int) -> None:
        """Leave so much."""
        with self._filler.open("ab", buffering=0) as file:
            while (left := os.statvfs(self._folder).f_bavail * os.statvfs(self._folder).f_frsize - room) > 0:
                try:
                    file.write(bytes(min(FILLING, left)))
                except OSError as error:
                    assert error.errno == errno.ENOSPC  # noqa: PT017 - others pass on
                    break

    def free(self) -> None:
        """Give it back."""
        self._filler.unlink()


class Filling:
    """The storage, and what each object may hold."""

    def __init__(self, folder: Path) -> None:
        self.storage = TieredStorage(
            SqliteBackend(folder / "objects.sqlite"),
            FilesystemBackend(folder / "objects"),
            SqliteChangeLog(folder / "objects.sqlite", "me"),
            THRESHOLD,
        )
        self.holds: dict[str, bytes | None] = dict.fromkeys(KEYS)
        self.happened: Counter[str] = Counter()
        self._payloads = 0

    async def put(self, key: str, size: int, when: str) -> None:
        """Put an object; refused, it is as it was."""
        self._payloads += 1
        payload = bytes([self._payloads % 256]) * size
        kind = "small" if size <= THRESHOLD else "large"
        await self._change(key, payload, f"{when}: {kind}", lambda one: self._put(one, payload))

    async def _put(self, object_id: ObjectId, payload: bytes) -> None:
        await self.storage.put(object_id, DEFAULT_METADATA, payload)

    async def delete(self, key: str, when: str) -> None:
        """Delete an object; refused, it is as it was."""
        await self._change(key, None, f"{when}: delete", self.storage.delete)

    async def _change(self, key: str, value: bytes | None, what: str, operate: Callable[..., object]) -> None:
        try:
            await cast("asyncio.Future[object]", operate(ObjectId(CONTEXT, key)))
        except TierstreamError as error:
            assert isinstance(error, BackendUnavailable), repr(error)  # noqa: PT017 - the caller tries again
            self.happened[f"{what} refused"] += 1
        else:
            self.happened[f"{what} done"] += 1
            self.holds[key] = value
        await self.check()

    async def check(self) -> None:
        """Read every object: whole, and what was acknowledged last. An outcome is never unknown here."""
        for key, expected in self.holds.items():
            found = await self.storage.get(ObjectId(CONTEXT, key))
            assert (None if found is None else found.payload) == expected, key


async def main(folder: Path, disk: Limit | Space) -> None:
    """Play the three acts."""
    filling = Filling(folder)
    for key in KEYS[:4]:
        await filling.put(key, LARGE if key in KEYS[:2] else SMALL, "before")

    disk.leave(ROOM_FOR_ROWS)
    await filling.put("k0", LARGE, "rows")
    await filling.put("k4", LARGE, "rows")
    await filling.put("k2", SMALL, "rows")
    await filling.put("k5", SMALL, "rows")
    await filling.delete("k3", "rows")

    disk.leave(0)
    for round_ in range(8):
        for key in KEYS:
            await filling.put(key, LARGE if round_ % 2 else THRESHOLD, "nothing")
    for key in KEYS:
        await filling.delete(key, "nothing")

    disk.free()
    for size in (LARGE, SMALL, LARGE):
        for key in KEYS:
            await filling.put(key, size, "after")
    await filling.delete("k0", "after")
    await filling.storage.join()
    assert await filling.storage.change_log.count() == 0
    assert not os.listdir(folder / "objects" / "incoming"), "temporary files are left"  # noqa: PTH208 - names do
    await filling.storage.close()

    again = Filling(folder)
    again.holds = filling.holds
    await again.check()
    await again.storage.join()
    await again.storage.close()
    sys.stdout.write(json.dumps(filling.happened))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    asyncio.run(main(where, Limit(where) if sys.argv[2] == "limit" else Space(where)))
