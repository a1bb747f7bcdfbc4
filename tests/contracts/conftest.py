"""The implementations that every suite of this ring runs over: one entry here puts a backend under all its tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.storage.backend import ChangeLog, HighVolumeBackend, LongTermBackend
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog


class ManualClock:
    """A wall clock that moves only when told to; :attr:`seconds` is the same as a monotonic clock."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
        self._start = self.now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)

    def seconds(self) -> float:
        """Return the seconds passed since a start a day ago."""
        return 86_400.0 + (self.now - self._start).total_seconds()


HIGH_VOLUME: dict[str, Callable[[Path, ManualClock], HighVolumeBackend]] = {
    "memory": lambda _folder, clock: MemoryBackend(clock=clock),
    "sqlite": lambda folder, clock: SqliteBackend(folder / "data" / "objects.sqlite", clock=clock),
}

LONG_TERM: dict[str, Callable[[Path, ManualClock], LongTermBackend]] = {
    "memory": lambda _folder, clock: MemoryBackend(clock=clock),
    "filesystem": lambda folder, clock: FilesystemBackend(folder / "data" / "objects", clock=clock),
}

OpenLog = Callable[..., ChangeLog]
"""Called with ``owner`` and ``lease_seconds``; logs opened by one test share what a disk would keep."""

CHANGE_LOGS: dict[str, Callable[[Path, ManualClock], OpenLog]] = {
    "memory": lambda _folder, _clock: lambda owner=None, lease_seconds=30.0: MemoryChangeLog(owner),
    "sqlite": lambda folder, clock: lambda owner=None, lease_seconds=30.0: SqliteChangeLog(
        folder / "data" / "objects.sqlite", owner, lease_seconds, monotonic=clock.seconds
    ),
}

DURABLE_CHANGE_LOGS = [name for name in CHANGE_LOGS if name != "memory"]
"""Those that outlive their process."""


@pytest.fixture
def clock() -> ManualClock:
    """Return the time of this test."""
    return ManualClock()


@pytest.fixture(params=HIGH_VOLUME)
async def high_volume(request: Any, tmp_path: Path, clock: ManualClock) -> AsyncIterator[HighVolumeBackend]:
    """Lend each high-volume tier in turn, empty."""
    backend = HIGH_VOLUME[request.param](tmp_path, clock)
    yield backend
    await backend.join()
    await backend.close()


@pytest.fixture(params=LONG_TERM)
async def long_term(request: Any, tmp_path: Path, clock: ManualClock) -> AsyncIterator[LongTermBackend]:
    """Lend each long-term tier in turn, empty."""
    backend = LONG_TERM[request.param](tmp_path, clock)
    yield backend
    await backend.join()
    await backend.close()


async def _opened_logs(name: str, folder: Path, clock: ManualClock) -> AsyncIterator[OpenLog]:
    make = CHANGE_LOGS[name](folder, clock)
    opened: list[ChangeLog] = []

    def open_log(**arguments: Any) -> ChangeLog:
        opened.append(make(**arguments))
        return opened[-1]

    yield open_log
    for log in opened:
        await log.close()


@pytest.fixture(params=CHANGE_LOGS)
async def open_log(request: Any, tmp_path: Path, clock: ManualClock) -> AsyncIterator[OpenLog]:
    """Open logs of each kind in turn; they are closed in the end."""
    async for opening in _opened_logs(request.param, tmp_path, clock):
        yield opening


@pytest.fixture(params=DURABLE_CHANGE_LOGS)
async def open_durable_log(request: Any, tmp_path: Path, clock: ManualClock) -> AsyncIterator[OpenLog]:
    """Open logs of each kind that outlives its process."""
    async for opening in _opened_logs(request.param, tmp_path, clock):
        yield opening


@pytest.fixture
def an_id() -> Callable[..., ObjectId]:
    """Make object ids; the same key gives the same id."""
    context = ObjectContext("attachments", [Scope("org", "17"), Scope("project", "42")])
    return lambda key="a-key": ObjectId(context, key)
