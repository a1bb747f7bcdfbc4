"""A writer taken for dead comes back: the reference's window between recovery and a late swap, and the fence in it.

The writer has uploaded its revision and is paused. Its lease ends; somebody else recovers its entry, finds a row that
does not point to the revision, and removes it. Then the writer goes on and swaps. In the reference, whose recovery only
reads, the swap succeeds: a tombstone to nothing, and an object acknowledged and lost. Here recovery forbids the
revision in the row first. Over every pair of durable backends (checklist TIER-7, LOG-5, LOG-14).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import pytest

from consumer.errors import BackendUnavailable
from consumer.ids import ObjectId
from consumer.operations import Metadata, Position, StoredObject
from consumer.storage.backend import ChangeLog, HighVolumeBackend, Removal, Revision, Tombstone
from consumer.storage.memory import MemoryBackend
from consumer.storage.tiered import TieredStorage
from failures import PauseAfterUpload, revisions

AnId: TypeAlias = Callable[..., ObjectId]

OpenParts: TypeAlias = Callable[[str], Awaitable[tuple[HighVolumeBackend, ChangeLog]]]

THRESHOLD = 100

OLD, NEW, OTHERS = b"old" * 100, b"new" * 100, b"others" * 100


class Unfenced:
    """A high-volume tier as the reference's: recovery looks at the row, and forbids nothing."""

    def __init__(self, backend: HighVolumeBackend) -> None:
        self._backend = backend

    async def forbid(self, object_id: ObjectId, revision: Revision) -> bool:
        row = await self._backend.head_tiered(object_id)
        return not (isinstance(row, Tombstone) and row.target == revision)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class Halt:
    """Where a process stands still: before its call number *at* to any backend, those of its clean-ups included."""

    def __init__(self, at: int) -> None:
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        self._left = at

    async def step(self) -> None:
        """Be at the next call."""
        self._left -= 1
        if self._left == 0:
            self.reached.set()
        if self.reached.is_set():  # a process that stands still does so as a whole
            await self.go_on.wait()


class Halting:
    """A backend of a process that halts."""

    def __init__(self, backend: object, halt: Halt) -> None:
        self._backend = backend
        self._halt = halt

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        if name in {"join", "close", "owner"}:
            return method

        async def call(*given: Any) -> Any:
            await self._halt.step()
            return await method(*given)

        return call


@dataclass
class Process:
    """The storage of one process: rows and changes are shared with the other, revisions too."""

    high_volume: HighVolumeBackend
    change_log: ChangeLog
    storage: TieredStorage


class Scene:
    """Two processes over one place."""

    def __init__(self, open_parts: OpenParts, clock: Any, fenced: Callable[[HighVolumeBackend], Any]) -> None:
        self.clock = clock
        self.revisions = MemoryBackend(clock=clock)
        self.processes: list[Process] = []
        self.open_parts = open_parts
        self._fenced = fenced

    async def start(
        self, owner: str, long_term: MemoryBackend | None = None, halt: Halt | None = None
    ) -> Process:
        """Start a process."""
        high_volume, change_log = await self.open_parts(owner)
        parts: list[Any] = [self._fenced(high_volume), long_term or self.revisions, change_log]
        if halt is not None:
            parts = [Halting(part, halt) for part in parts]
        storage = TieredStorage(parts[0], parts[1], parts[2], THRESHOLD, clock=self.clock)
        self.processes.append(Process(high_volume, change_log, storage))
        return self.processes[-1]

    async def recovered(self) -> Process:
        """Start a process, and let it recover all there is to recover."""
        recoverer = await self.start("recoverer")
        await recoverer.storage.join()
        return recoverer

    async def paused_writer(self, whose: ObjectId) -> tuple[PauseAfterUpload, asyncio.Task[Metadata]]:
        """Start a process that has uploaded a revision and stands still; all others take it for dead."""
        uploads = PauseAfterUpload()
        uploads._revisions = self.revisions._revisions  # one long-term tier, seen by both
        writer = await self.start("writer", uploads)
        await writer.storage.recover()
        putting = asyncio.create_task(writer.storage.put(whose, Metadata(), NEW))
        await uploads.reached.wait()
        self.clock.advance(31)
        return uploads, putting


@pytest.fixture
async def scenes(open_parts: OpenParts, clock: Any) -> AsyncIterator[Callable[..., Scene]]:
    """Set scenes over each durable kind of storage."""
    made: list[Scene] = []

    def set_scene(fenced: Callable[[HighVolumeBackend], Any] = lambda backend: backend) -> Scene:
        made.append(Scene(open_parts, clock, fenced))
        return made[-1]

    yield set_scene
    for scene in made:
        for process in scene.processes:
            await process.storage.join()


@pytest.mark.parametrize("before", [None, b"small", OLD], ids=["nothing", "small", "large"])
async def test_a_late_swap_to_a_removed_revision_is_refused(
    scenes: Callable[..., Scene], an_id: AnId, before: bytes | None
) -> None:
    """The object is as it was, the writer is told so, and its second try succeeds; nothing is left over."""
    scene = scenes()
    if before is not None:
        await (await scene.start("first")).storage.put(an_id(), Metadata(), before)
    uploads, putting = await scene.paused_writer(an_id())
    recoverer = await scene.recovered()
    assert await recoverer.change_log.count() == 0

    uploads.go_on.set()
    with pytest.raises(BackendUnavailable):
        await putting

    found = await recoverer.storage.get(an_id())
    assert (None if found is None else found.payload) == before
    await scene.processes[-2].storage.put(an_id(), Metadata(), NEW)
    await scene.processes[-2].storage.join()
    await recoverer.storage.recover()
    assert await payload(recoverer, an_id()) == NEW
    row = await recoverer.high_volume.head_tiered(an_id())
    assert isinstance(row, Tombstone)
    assert revisions(scene.revisions) == {row.target.name}
    assert [await process.change_log.count() for process in scene.processes] == [0] * len(scene.processes)


async def test_without_the_fence_the_late_swap_points_to_nothing(scenes: Callable[..., Scene], an_id: AnId) -> None:
    """The window itself: an acknowledged object that nobody can read. Only the fence stands between."""
    scene = scenes(fenced=Unfenced)
    uploads, putting = await scene.paused_writer(an_id())
    recoverer = await scene.recovered()
    assert await recoverer.change_log.count() == 0

    uploads.go_on.set()
    acknowledged = await putting

    assert acknowledged.size == len(NEW)
    row = await recoverer.high_volume.head_tiered(an_id())
    assert isinstance(row, Tombstone)
    assert await recoverer.storage.get(an_id()) is None
    assert revisions(scene.revisions) == set()


async def test_a_swap_that_was_in_time_is_left_alone_by_recovery(scenes: Callable[..., Scene], an_id: AnId) -> None:
    """The other order: the revision is the row's, and recovery removes the entry only."""
    scene = scenes()
    uploads, putting = await scene.paused_writer(an_id())
    uploads.go_on.set()
    await putting
    recoverer = await scene.recovered()

    assert await payload(recoverer, an_id()) == NEW


async def test_a_row_written_by_others_meanwhile_stays_theirs(scenes: Callable[..., Scene], an_id: AnId) -> None:
    """Recovered, overwritten by the recoverer, deleted and written again: the writer comes to nothing each time."""
    scene = scenes()
    uploads, putting = await scene.paused_writer(an_id())
    recoverer = await scene.recovered()
    await recoverer.storage.put(an_id(), Metadata(), OTHERS)
    await recoverer.storage.delete(an_id())

    uploads.go_on.set()
    with pytest.raises(BackendUnavailable):
        await putting
    assert await recoverer.storage.get(an_id()) is None
    await recoverer.storage.put(an_id(), Metadata(), OTHERS)
    assert await payload(recoverer, an_id()) == OTHERS


async def test_a_recovery_killed_halfway_is_done_again_by_the_next(scenes: Callable[..., Scene], an_id: AnId) -> None:
    """Claimed and forbidden, nothing removed yet: the next owner, after another lease, finishes it."""
    scene = scenes()
    uploads, putting = await scene.paused_writer(an_id())
    killed_high_volume, killed_log = await scene.open_parts("killed")
    (change,) = await killed_log.recoverable()
    assert change.new is not None
    assert await killed_high_volume.forbid(an_id(), change.new)
    assert revisions(scene.revisions) == {change.new.name}
    scene.clock.advance(31)
    recoverer = await scene.recovered()

    uploads.go_on.set()
    with pytest.raises(BackendUnavailable):
        await putting
    assert revisions(scene.revisions) == set()
    assert await recoverer.high_volume.compare_and_write(an_id(), None, Removal())


RECORDS = {"insert large": NEW, "insert small": NEW[:5], "delete": None}
HALTS_MAX = 40


@pytest.mark.slow
@pytest.mark.parametrize("taken_for_dead", [True, False], ids=["taken for dead", "alive"])
@pytest.mark.parametrize("record", RECORDS)
async def test_a_record_run_by_two_members_leaves_one_object_and_nothing_else(
    scenes: Callable[..., Scene], an_id: AnId, record: str, *, taken_for_dead: bool
) -> None:
    """The zombie that runs what another has been given: halted before each of its calls in turn, then let go on.

    Names of revisions are not derived from the record: each run uploads under its own, and the change log sees to it
    that what comes to nothing goes, whichever of the two is later (docs/storage.md).
    """
    wanted, position = RECORDS[record], Position("topic/0", 2)

    async def run_record(process: Process, whose: ObjectId) -> None:
        if wanted is None:
            await process.storage.delete(whose, position)
        else:
            await process.storage.put(whose, Metadata(), wanted, position)

    async def run_and_clean_up(process: Process, whose: ObjectId) -> None:
        try:
            await run_record(process, whose)
        except BackendUnavailable:  # refused, as it was taken for dead; the service tries again
            await run_record(process, whose)
        await process.storage.join()

    scene = scenes()
    for at in range(1, HALTS_MAX):
        whose = an_id(f"object {at}")
        other = await scene.start("other")
        await other.storage.put(whose, Metadata(), OLD, Position("topic/0", 1))
        halt = Halt(at)
        zombie = await scene.start("zombie", halt=halt)
        running = asyncio.create_task(run_and_clean_up(zombie, whose))
        reached = asyncio.create_task(halt.reached.wait())
        await asyncio.wait({running, reached}, return_when=asyncio.FIRST_COMPLETED)
        over = not halt.reached.is_set()
        reached.cancel()
        if taken_for_dead:
            scene.clock.advance(31)
        await run_record(other, whose)
        await other.storage.recover()

        halt.go_on.set()
        await running
        await other.storage.join()
        scene.clock.advance(86_401)  # when no swap can be on its way any more
        for process in (other, zombie):
            await process.storage.recover()

        found = await other.storage.get(whose)
        assert (None if found is None else found.payload) == wanted, at
        row = await other.high_volume.head_tiered(whose)
        assert revisions(scene.revisions) == ({row.target.name} if isinstance(row, Tombstone) else set()), at
        assert [change async for _, change in cast("Any", other.change_log).scan_changes()] == [], at
        scene.revisions._revisions.clear()
        if over:
            break
    else:
        pytest.fail("void: there was no end to it")
    assert at > 5


async def payload(process: Process, whose: ObjectId) -> object:
    """Return what the object holds."""
    found = await process.storage.get(whose)
    assert isinstance(found, StoredObject)
    return found.payload
