"""The implementations that every suite of this ring runs over: one entry here puts a backend under all its tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from bigtable_emulator import Emulator
from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.storage.backend import ChangeLog, HighVolumeBackend, LongTermBackend
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.gcs import GcsBackend
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog
from gcs_servers import NewBucket
from strict_gcs import StrictGcs


class ManualClock:
    """A wall clock that moves only when told to; :attr:`seconds` is the same as a monotonic clock."""

    def __init__(self) -> None:
        # Far ahead of every real clock: a Bigtable table itself forgets, by its own clock, what has expired.
        self.now = datetime(2096, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
        self._start = self.now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)

    @staticmethod
    async def sleep(_seconds: float) -> None:
        """Wait until cancelled: real time does not pass here."""
        await asyncio.Event().wait()

    def seconds(self) -> float:
        """Return the seconds passed since a start a day ago."""
        return 86_400.0 + (self.now - self._start).total_seconds()


class Place:
    """Where the storage of one test lies: a folder, and a table, each made when it is needed."""

    def __init__(self, folder: Path, request: pytest.FixtureRequest) -> None:
        self.folder = folder
        self._request = request
        self._table: str | None = None

    @property
    def file(self) -> Path:
        """The file of rows and changes."""
        return self.folder / "data" / "objects.sqlite"

    @property
    def emulator(self) -> Emulator:
        """The running emulator."""
        found: Emulator = self._request.getfixturevalue("bigtable_emulator")
        return found

    @property
    def strict_gcs(self) -> StrictGcs:
        """A server of this test's own, with an empty bucket."""
        found: StrictGcs = self._request.getfixturevalue("strict_gcs")
        return found

    @property
    def fake_gcs(self) -> NewBucket:
        """The running emulator of buckets."""
        found: NewBucket = self._request.getfixturevalue("fake_gcs")
        return found

    @property
    def table(self) -> str:
        """The table of rows and changes."""
        if self._table is None:
            self._table = self.emulator.unused_table()
        return self._table


HIGH_VOLUME: dict[str, Callable[[Place, ManualClock], HighVolumeBackend]] = {
    "memory": lambda _place, clock: MemoryBackend(clock=clock),
    "sqlite": lambda place, clock: SqliteBackend(place.file, clock=clock),
    "bigtable": lambda place, clock: place.emulator.backend(place.table, clock=clock),
}

LONG_TERM: dict[str, Callable[[Place, ManualClock], LongTermBackend]] = {
    "memory": lambda _place, clock: MemoryBackend(clock=clock),
    "filesystem": lambda place, clock: FilesystemBackend(place.folder / "data" / "objects", clock=clock),
    "gcs, strict server": lambda place, clock: GcsBackend(
        "bucket", endpoint=place.strict_gcs.endpoint, prefix="tier/", clock=clock
    ),
    "gcs, fake-gcs-server": lambda place, clock: _in_new_bucket(place.fake_gcs, clock),
}

REFERENCED = [name for name in LONG_TERM if name != "memory"]
"""Those whose payloads others can read."""


def _in_new_bucket(new_bucket: NewBucket, clock: ManualClock) -> GcsBackend:
    endpoint, bucket = new_bucket()
    return GcsBackend(bucket, endpoint=endpoint, prefix="tier/", clock=clock)


OpenLog = Callable[..., ChangeLog]
"""Called with ``owner`` and ``lease_seconds``; logs opened by one test share what a disk would keep."""

CHANGE_LOGS: dict[str, Callable[[Place, ManualClock], OpenLog]] = {
    "memory": lambda _place, clock: lambda owner=None, lease_seconds=30.0: MemoryChangeLog(owner, clock=clock),
    "sqlite": lambda place, clock: (
        lambda owner=None, lease_seconds=30.0: SqliteChangeLog(
            place.file, owner, lease_seconds, monotonic=clock.seconds, clock=clock
        )
    ),
    "bigtable": lambda place, clock: (
        lambda owner=None, lease_seconds=30.0: place.emulator.change_log(place.table, owner, lease_seconds, clock=clock)
    ),
}

EMULATED = {"bigtable", "gcs, fake-gcs-server"}
"""Those that need an emulator."""

DURABLE_CHANGE_LOGS = [name for name in CHANGE_LOGS if name != "memory"]
"""Those that outlive their process."""


@pytest.fixture
def clock() -> ManualClock:
    """Return the time of this test."""
    return ManualClock()


def choices(names: Iterable[str]) -> list[Any]:
    """Return the parameters of a fixture; what needs an emulator is marked so."""
    return [pytest.param(name, marks=pytest.mark.emulator) if name in EMULATED else name for name in names]


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    """Return where the storage of this test lies."""
    return Place(tmp_path, request)


@pytest.fixture(params=choices(HIGH_VOLUME))
async def high_volume(request: Any, place: Place, clock: ManualClock) -> AsyncIterator[HighVolumeBackend]:
    """Lend each high-volume tier in turn, empty."""
    backend = HIGH_VOLUME[request.param](place, clock)
    await _create(backend)
    yield backend
    await backend.join()
    await backend.close()


@pytest.fixture(params=choices(LONG_TERM))
async def long_term(request: Any, place: Place, clock: ManualClock) -> AsyncIterator[LongTermBackend]:
    """Lend each long-term tier in turn, empty."""
    backend = LONG_TERM[request.param](place, clock)
    await _create(backend)
    yield backend
    await backend.join()
    await backend.close()


async def _create(part: object) -> None:
    """Make what the part keeps its data in, where that is a step of its own."""
    creating = getattr(part, "create", None)
    if creating is not None:
        await creating()


@pytest.fixture(params=choices(REFERENCED))
async def referenced(request: Any, place: Place, clock: ManualClock) -> AsyncIterator[LongTermBackend]:
    """Lend each long-term tier in turn whose payloads others can read; it is a `ReferencedTier` too."""
    backend = LONG_TERM[request.param](place, clock)
    await _create(backend)
    yield backend
    await backend.join()
    await backend.close()


async def _opened_logs(name: str, place: Place, clock: ManualClock) -> AsyncIterator[OpenLog]:
    make = CHANGE_LOGS[name](place, clock)
    opened: list[ChangeLog] = []
    creator = make()
    await _create(creator)
    await creator.close()

    def open_log(**arguments: Any) -> ChangeLog:
        opened.append(make(**arguments))
        return opened[-1]

    yield open_log
    for log in opened:
        await log.close()


@pytest.fixture(params=choices(CHANGE_LOGS))
async def open_log(request: Any, place: Place, clock: ManualClock) -> AsyncIterator[OpenLog]:
    """Open logs of each kind in turn; they are closed in the end."""
    async for opening in _opened_logs(request.param, place, clock):
        yield opening


@pytest.fixture(params=choices(DURABLE_CHANGE_LOGS))
async def open_durable_log(request: Any, place: Place, clock: ManualClock) -> AsyncIterator[OpenLog]:
    """Open logs of each kind that outlives its process."""
    async for opening in _opened_logs(request.param, place, clock):
        yield opening


@pytest.fixture
def an_id() -> Callable[..., ObjectId]:
    """Make object ids; the same key gives the same id."""
    context = ObjectContext("attachments", [Scope("org", "17"), Scope("project", "42")])
    return lambda key="a-key": ObjectId(context, key)


OpenParts: TypeAlias = Callable[[str], Awaitable[tuple[HighVolumeBackend, ChangeLog]]]
"""Opens rows and changes as a process of the owner named has them; called again, those of the next process."""


@pytest.fixture(params=choices(DURABLE_CHANGE_LOGS))
async def open_parts(request: Any, place: Place, clock: ManualClock) -> AsyncIterator[OpenParts]:
    """Open rows and changes of each kind that outlives its process, over one place; they are closed in the end."""
    opened: list[HighVolumeBackend | ChangeLog] = []

    async def open_both(owner: str) -> tuple[HighVolumeBackend, ChangeLog]:
        high_volume = HIGH_VOLUME[request.param](place, clock)
        change_log = CHANGE_LOGS[request.param](place, clock)(owner=owner)
        for part in (high_volume, change_log):
            opened.append(part)
            await _create(part)
        return high_volume, change_log

    yield open_both
    for part in reversed(opened):
        await part.close()
