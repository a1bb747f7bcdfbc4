"""Leases and entries in the storage file: alive without the event loop, dead with the host, and never a crash."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from consumer.errors import BackendUnavailable
from consumer.ids import ObjectContext, ObjectId
from consumer.storage import sqlite_change_log
from consumer.storage.backend import Change
from consumer.storage.revision import new_revision, uuid7
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog

Open = Callable[..., SqliteChangeLog]


def a_change(key: str = "k") -> Change:
    """Return a change nobody has recorded before."""
    object_id = ObjectId(ObjectContext("u"), key)
    return Change(uuid7(), object_id, new_revision(object_id), None)


@pytest.fixture
async def open_log(tmp_path: Path) -> AsyncIterator[Open]:
    """Open logs over one file; they are closed in the end."""
    opened: list[SqliteChangeLog] = []

    def open_one(*arguments: Any, **named: Any) -> SqliteChangeLog:
        opened.append(SqliteChangeLog(tmp_path / "objects.sqlite", *arguments, **named))
        return opened[-1]

    yield open_one
    for log in opened:
        await log.close()


async def execute(log: SqliteChangeLog, sql: str) -> list[Any]:
    """Run one statement on the log's file."""

    def step(connection: sqlite3.Connection) -> list[Any]:
        return connection.execute(sql).fetchall()

    return await log._database.write(step)


@pytest.mark.parametrize(
    "damage",
    [
        "object_path = 'no path'",
        "object_path = x'ff00'",
        "object_path = 7",
        "change_id = 'no uuid'",
        "change_id = 12",
    ],
)
async def test_an_entry_that_cannot_be_read_is_set_aside(
    open_log: Open, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """It is said once, kept for inspection, and holds up neither the others nor the next recovery."""
    dead = open_log(owner="me")
    good = a_change("good")
    for change in (good, a_change("bad")):
        await dead.record(change)
    await execute(dead, f"UPDATE change_log_entries SET {damage} WHERE object_path LIKE '%bad'")
    log = open_log(owner="me")

    with caplog.at_level(logging.ERROR):
        assert list(await log.recoverable()) == [good]
        assert list(await log.recoverable()) == [good]

    assert len(caplog.records) == 1
    assert await log.count() == 1
    assert await execute(log, "SELECT count(*) FROM change_log_entries") == [(2,)]


async def test_a_lease_is_renewed_while_the_event_loop_is_busy(open_log: Open) -> None:
    """A loop that is blocked for long is slow, not dead: its uploads may still be running."""
    beats = threading.Event()
    now = [1000.0]

    def monotonic() -> float:
        now[0] += 0.001
        if now[0] > 1000.02:
            beats.set()
        return now[0]

    living = open_log(owner="living", lease_seconds=0.003, monotonic=monotonic)
    await living.record(a_change())

    assert beats.wait(30)  # the loop stands still meanwhile

    other = open_log(owner="other", monotonic=lambda: now[0])
    assert list(await other.recoverable()) == []


async def test_setting_the_wall_clock_kills_nobody(open_log: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A jump of ten years would otherwise hand over what a living owner is just writing."""
    await open_log(owner="living").record(a_change())
    later = time.time() + 315_360_000
    monkeypatch.setattr(time, "time", lambda: later)

    assert list(await open_log(owner="other").recoverable()) == []


async def test_a_lease_ends_with_the_host(open_log: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart of the host its clock begins anew: the old lease would seem to last for ever."""
    change = a_change()
    await open_log(owner="before", monotonic=lambda: 9_000_000.0).record(change)
    monkeypatch.setattr(sqlite_change_log, "boot_id", lambda: "after the restart")

    assert list(await open_log(owner="after", monotonic=lambda: 10.0).recoverable()) == [change]


async def test_the_dead_leave_no_lease_behind(open_log: Open) -> None:
    """Each start is one row; they must not pile up over the years."""
    now = [0.0]
    for number in range(5):
        await open_log(owner=f"o{number}", monotonic=lambda: now[0]).record(a_change())
        now[0] += 31
    last = open_log(owner="last", monotonic=lambda: now[0])
    assert len(await last.recoverable()) == 5

    assert await execute(last, "SELECT owner FROM change_log_instances") == [("last",)]


async def test_an_entry_is_in_the_file_when_record_returns(open_log: Open, tmp_path: Path) -> None:
    """LOG-1: seen through a connection of its own, as another process would."""
    await open_log().record(a_change())

    def count() -> Any:
        with sqlite3.connect(tmp_path / "objects.sqlite") as connection:
            found = connection.execute("SELECT count(*) FROM change_log_entries").fetchone()
        connection.close()
        return found

    assert await asyncio.to_thread(count) == (1,)


async def test_objects_and_changes_share_a_transaction(tmp_path: Path, open_log: Open) -> None:
    """The default configuration has both in one file: one writer thread, one fsync."""
    backend = SqliteBackend(tmp_path / "objects.sqlite")

    assert backend._database is open_log()._database
    await backend.close()


async def test_a_lease_that_cannot_be_ended_runs_out(
    open_log: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk must not turn a clean end into an error."""
    log = open_log()
    await log.record(a_change())

    async def fails(*_arguments: Any, **_named: Any) -> None:
        raise BackendUnavailable("sqlite: SQLITE_FULL")

    monkeypatch.setattr(log._database, "write", fails)

    await log.join()

    assert "lease" in caplog.text


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_lease_has_a_length(tmp_path: Path, seconds: float) -> None:
    """One without would make every owner dead."""
    with pytest.raises(ValueError, match="lease"):
        SqliteChangeLog(tmp_path / "objects.sqlite", lease_seconds=seconds)
