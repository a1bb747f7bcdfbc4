"""A power cut at any moment: what was acknowledged is there and whole, and recovery finds all that is left (I7, I8).

The folder of the long-term tier lies on a disk that loses or reorders whatever was not flushed (`power_cuts.py`). Rows
and changes are durable the moment their call returns, as sqlite's are (`synchronous = FULL`; what becomes of its own
file is in `contracts/test_torn_files.py`). Objects are written, replaced, deleted, several at a time; then the power
fails behind any step, as often as one wants to look, and a new process starts on what is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import pytest

from consumer.errors import TierstreamError
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import DEFAULT_METADATA, StoredObject
from consumer.storage import filesystem
from consumer.storage.backend import Change, Tombstone
from consumer.storage.filesystem import FilesystemBackend, revision_path
from consumer.storage.memory import MemoryBackend
from consumer.storage.tiered import TieredStorage
from failures import DurableLog
from power_cuts import Recorder, Said, restore

CONTEXT = ObjectContext("power")
THRESHOLD = 8
KEYS = ("a", "b", "c")
OPERATIONS = 4
"""Of each key."""

SCENES, CUTS = 25, 40
"""1,000 power cuts."""


class Durable:
    """Rows or changes; whatever a call did to them is told to the recorder before anything else can happen."""

    def __init__(self, backend: object, recorder: Recorder, state: str) -> None:
        self._backend = backend
        self._recorder = recorder
        self._state = state

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        if name in {"join", "close", "owner"}:
            return method

        async def call(*given: Any) -> Any:
            answer = await method(*given)
            self._recorder.say((self._state, dict(getattr(self._backend, self._state))))
            return answer

        return call


class Scene:
    """Objects being written, and everything that was done to the disk for it."""

    def __init__(self, folder: Path, seed: int, flushes: Sequence[str] = ("file", "folder")) -> None:
        self.random = Random(seed)
        folder.mkdir()
        self.folder = folder
        self.recorder = Recorder(folder, flushes)
        self._payloads = 0

    async def play(self) -> None:
        """Write, replace and delete, one object after the other and all at once."""
        log = DurableLog({})
        storage = TieredStorage(
            Durable(MemoryBackend(), self.recorder, "_rows"),
            FilesystemBackend(self.folder),
            Durable(log, self.recorder, "_changes"),
            THRESHOLD,
        )
        await asyncio.gather(*(self._write(storage, key) for key in KEYS))
        await storage.join()
        await storage.close()

    async def _write(self, storage: TieredStorage, key: str) -> None:
        object_id = ObjectId(CONTEXT, key)
        for _ in range(OPERATIONS):
            self._payloads += 1
            size = self.random.choice((None, 3, 20, 40))
            value = None if size is None else bytes([self._payloads]) * size
            self.recorder.say(("begun", key, value))
            if value is None:
                await storage.delete(object_id)
            else:
                await storage.put(object_id, DEFAULT_METADATA, _streamed(value))
            self.recorder.say(("acknowledged", key, value))

    async def cut(self, folder: Path) -> None:
        """Let the power fail behind some step; a process that starts then loses nothing and leaves nothing."""
        steps = self.recorder.steps[: self.random.randrange(len(self.recorder.steps) + 1)]
        restore(self.recorder.root, steps, folder, self.random)
        rows: dict[str, StoredObject | Tombstone] = {}
        entries: dict[UUID, Change] = {}
        allowed: dict[str, list[bytes | None]] = {key: [None] for key in KEYS}
        for step in steps:
            match step:
                case Said(("_rows", state)):
                    rows = dict(state)
                case Said(("_changes", state)):
                    entries = dict(state)
                case Said(("begun", key, value)):
                    allowed[key].append(value)
                case Said(("acknowledged", key, value)):
                    allowed[key] = [value]
        high_volume = MemoryBackend()
        high_volume._rows = rows
        long_term = FilesystemBackend(folder)
        storage = TieredStorage(high_volume, long_term, DurableLog(entries), THRESHOLD)
        try:
            await long_term.open()
            await storage.recover()
            for key in KEYS:
                found = await storage.get(ObjectId(CONTEXT, key))
                assert (None if found is None else found.payload) in allowed[key], key
            await storage.join()
        finally:
            await storage.close()
        assert all(change.not_before is not None for change in entries.values()), "an unfinished change"
        targets = [row.target.name for row in rows.values() if isinstance(row, Tombstone)]
        expected = {f"{'/'.join(revision_path(name))}.{suffix}" for name in targets for suffix in ("payload", "json")}
        assert files(folder) == expected


def files(folder: Path) -> set[str]:
    """Return all that lies in a tier's folder, but for what it keeps about itself."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found - {".lock", "FORMAT"}


async def _streamed(payload: bytes) -> Any:
    for at in range(0, len(payload), 5):
        yield payload[at : at + 5]


def found_out(folder: Path, scenes: int, flushes: Sequence[str] = ("file", "folder")) -> int:
    """Play scenes and cut their power; return the number of cuts that did harm."""
    harm = 0
    for seed in range(scenes):
        scene = Scene(folder / f"scene{seed}", seed, flushes)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(filesystem, "os", scene.recorder)
            patched.setattr(filesystem, "PIECE_BYTES", 10)
            asyncio.run(scene.play())

        async def cut_often(scene: Scene = scene, seed: int = seed) -> int:
            harmed = 0
            for number in range(CUTS):
                try:
                    await scene.cut(folder / f"scene{seed}-cut{number}")
                except (AssertionError, TierstreamError):
                    if len(flushes) > 1:
                        raise
                    harmed += 1
            return harmed

        harm += asyncio.run(cut_often())
    return harm


@pytest.mark.slow
def test_a_power_cut_loses_nothing_and_leaves_nothing_that_recovery_does_not_find(tmp_path: Path) -> None:
    """Nor does it need more than what its entries name: no scan of the folder."""
    assert found_out(tmp_path, SCENES) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["file", "folder"])
def test_a_tier_that_forgets_to_flush_is_found_out(tmp_path: Path, kept: str) -> None:
    """What the cuts are there to find, they find: files that were not flushed, and folders that were not."""
    assert found_out(tmp_path, 3, (kept,)) > 10
