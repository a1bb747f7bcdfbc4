"""The storage file's threads: group commit, faults that stay where they belong, cancellation, files of one owner."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from consumer.errors import BackendError, BackendUnavailable, ConfigError, TooLarge
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import Metadata, StoredObject
from consumer.storage import sqlite
from consumer.storage.backend import Change, InlineObject, Revision
from consumer.storage.host import boot_id
from consumer.storage.metadata import encode_metadata
from consumer.storage.revision import uuid7
from consumer.storage.sqlite import APPLICATION_ID, SCHEMA_VERSION, SCHEMAS, SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog


def an_id(key: object = "k") -> ObjectId:
    """Return the id of *key*."""
    return ObjectId(ObjectContext("u"), str(key))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return where the storage file will be; its folder is not there yet."""
    return tmp_path / "CANARY-folder" / "objects.sqlite"


def write(file: Path, content: bytes) -> None:
    """Make a file and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


@pytest.fixture
async def backend(file: Path) -> AsyncIterator[SqliteBackend]:
    """Lend a backend over an empty file."""
    made = SqliteBackend(file)
    yield made
    await made.close()


class Gate:
    """A step that holds a thread of the file until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, _connection: sqlite3.Connection) -> str:
        self.reached.set()
        assert self.opened.wait(30)
        return "through"


async def until(event: threading.Event) -> None:
    """Wait for an event of another thread."""
    assert await asyncio.to_thread(event.wait, 30)


async def turns(count: int = 5) -> None:
    """Let the tasks that are ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


class TestGroups:
    """Who waits together commits together."""

    async def test_all_that_wait_share_one_commit(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Group commit: the reason why many callers are faster than one."""
        groups: list[int] = []
        run = sqlite._run_transaction

        def counted(connection: sqlite3.Connection, group: Any) -> Any:
            groups.append(len(group))
            return run(connection, group)

        monkeypatch.setattr(sqlite, "_run_transaction", counted)
        backend = SqliteBackend(file)
        gate = Gate()
        held = asyncio.create_task(backend._database.write(gate))
        await until(gate.reached)
        puts = [asyncio.create_task(backend.put_non_tombstone(an_id(n), Metadata(), b"x")) for n in range(100)]
        await turns()
        gate.opened.set()
        await asyncio.gather(held, *puts)
        await backend.close()

        assert groups == [1, 100]

    async def test_what_is_asked_for_in_one_turn_is_queued_at_once(self, backend: SqliteBackend) -> None:
        """A window of writes is one group, though the writer has nothing else to do: not a first one and the rest."""
        await backend.open()
        groups: list[int] = []
        writer = backend._database._writer
        run = writer._run

        def counted(connection: sqlite3.Connection, group: Any) -> Any:
            groups.append(len(group))
            return run(connection, group)

        writer._run = counted
        await asyncio.gather(*(backend.put_non_tombstone(an_id(key), Metadata(), b"x") for key in range(50)))

        assert groups == [50]

    async def test_reads_of_a_group_see_one_state(self, backend: SqliteBackend) -> None:
        """One look at the file for all of them; a write that comes meanwhile is seen by the next group."""
        await backend.put_non_tombstone(an_id(), Metadata(), b"before")

        def look(connection: sqlite3.Connection) -> Any:
            return connection.execute("SELECT payload FROM objects").fetchone()[0]

        gate = Gate()
        reads = [asyncio.create_task(backend._database.read(step)) for step in (look, gate, look)]
        await until(gate.reached)
        await backend.put_non_tombstone(an_id(), Metadata(), b"after")
        assert await backend._database.read(look) == b"after"
        gate.opened.set()

        assert await asyncio.gather(*reads) == [b"before", "through", b"before"]

    async def test_a_read_at_fault_does_not_fail_its_neighbours(self, backend: SqliteBackend) -> None:
        """Whatever went wrong, the transaction they share included."""
        await backend.put_non_tombstone(an_id(), Metadata(), b"x")

        def faulty(connection: sqlite3.Connection) -> None:
            connection.execute("ROLLBACK")
            raise ValueError

        reads = (backend.get_tiered(an_id()), backend._database.read(faulty), backend.get_tiered(an_id()))
        first, fault, last = await asyncio.gather(*reads, return_exceptions=True)

        assert first == last == await backend.get_tiered(an_id()) == StoredObject(Metadata(size=1), b"x")
        assert isinstance(fault, BackendError)

    async def test_a_group_is_bounded_in_bytes(self, backend: SqliteBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """The write-ahead log must not grow with the number of callers."""
        monkeypatch.setattr(sqlite, "GROUP_BYTES_MAX", 1000)
        gate = Gate()
        held = asyncio.create_task(backend._database.write(gate))
        await until(gate.reached)
        puts = [asyncio.create_task(backend.put_non_tombstone(an_id(n), Metadata(), b"x" * 400)) for n in range(10)]
        await turns()
        waiting = backend._database._writer._waiting
        sizes: list[int] = []
        take = backend._database._writer._take

        def counted() -> Any:
            group, timers = take()
            sizes.append(len(group))
            return group, timers

        monkeypatch.setattr(backend._database._writer, "_take", counted)
        assert len(waiting) == 10
        gate.opened.set()
        await asyncio.gather(held, *puts)

        assert max(sizes) == 3

    async def test_one_at_fault_does_not_fail_its_neighbours(self, backend: SqliteBackend) -> None:
        """The group is undone and each member run again alone."""

        def at_fault(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO objects (path) VALUES ('half')")

        gate = Gate()
        held = asyncio.create_task(backend._database.write(gate))
        await until(gate.reached)
        before = asyncio.create_task(backend.put_non_tombstone(an_id("before"), Metadata(), b"x"))
        await turns()
        failing = asyncio.create_task(backend._database.write(at_fault))
        await turns()
        after = asyncio.create_task(backend.put_non_tombstone(an_id("after"), Metadata(), b"x"))
        await turns()
        gate.opened.set()
        outcomes = await asyncio.gather(held, before, failing, after, return_exceptions=True)

        assert outcomes[0] == "through"
        assert outcomes[1] is outcomes[3] is None
        assert isinstance(outcomes[2], BackendError)
        assert await backend.get_tiered(an_id("before")) is not None
        assert await backend.get_tiered(an_id("after")) is not None

    async def test_an_unknown_error_of_a_step_reaches_its_caller_only(self, backend: SqliteBackend) -> None:
        """A defect must neither end the thread nor leave anybody waiting."""

        def defect(_connection: sqlite3.Connection) -> None:
            raise ZeroDivisionError

        with pytest.raises(BackendError, match="ZeroDivisionError"):
            await backend._database.write(defect)
        with pytest.raises(BackendError, match="ZeroDivisionError"):
            await backend._database.read(defect)

        assert await backend.put_non_tombstone(an_id(), Metadata(), b"x") is None
        assert await backend.get_tiered(an_id()) is not None

    async def test_two_event_loops_get_their_own_answers(self, backend: SqliteBackend) -> None:
        """A delivery goes to the loop that asked."""

        def elsewhere() -> Any:
            async def put_and_get() -> Any:
                await backend.put_non_tombstone(an_id("there"), Metadata(), b"there")
                return await backend.get_tiered(an_id("here"))

            return asyncio.run(put_and_get())

        await backend.put_non_tombstone(an_id("here"), Metadata(), b"here")

        assert await asyncio.to_thread(elsewhere) == StoredObject(Metadata(size=4), b"here")
        assert await backend.get_tiered(an_id("there")) == StoredObject(Metadata(size=5), b"there")


class TestFaults:
    """What may pass, what stays, and what is said about it."""

    async def test_a_full_disk_acknowledges_nothing_and_ends_with_the_cause(self, backend: SqliteBackend) -> None:
        """SQLITE_FULL is retriable, and not tried again blindly."""
        await backend.put_non_tombstone(an_id("before"), Metadata(), b"x")

        def limit(connection: sqlite3.Connection, pages: int) -> int:
            found: int = connection.execute(f"PRAGMA max_page_count = {pages}").fetchone()[0]
            return found

        await backend._database.write(limit, 1)  # no less than there are
        with pytest.raises(BackendUnavailable, match="SQLITE_FULL"):
            await backend.put_non_tombstone(an_id("full"), Metadata(), b"x" * 500_000)
        assert await backend.get_tiered(an_id("full")) is None
        assert await backend.get_tiered(an_id("before")) is not None

        await backend._database.write(limit, 1_000_000)
        assert await backend.put_non_tombstone(an_id("full"), Metadata(), b"x" * 500_000) is None

    async def test_a_passing_fault_fails_the_whole_group(self, backend: SqliteBackend) -> None:
        """It is the file's: running each alone would only make it last."""
        runs: list[str] = []

        def fails(_connection: sqlite3.Connection) -> None:
            runs.append("fails")
            error = sqlite3.OperationalError("disk I/O error at CANARY")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
            raise error

        def neighbour(_connection: sqlite3.Connection) -> None:
            runs.append("neighbour")

        gate = Gate()
        held = asyncio.create_task(backend._database.write(gate))
        await until(gate.reached)
        tasks = [asyncio.create_task(backend._database.write(step)) for step in (neighbour, fails, neighbour)]
        await turns()
        gate.opened.set()
        outcomes = await asyncio.gather(held, *tasks, return_exceptions=True)

        assert runs == ["neighbour", "fails"]
        assert [type(outcome) for outcome in outcomes[1:]] == [BackendUnavailable] * 3
        assert {str(outcome) for outcome in outcomes[1:]} == {"sqlite: SQLITE_IOERR_FSYNC"}
        assert len({id(outcome) for outcome in outcomes[1:]}) == 3

    async def test_a_file_locked_by_another_is_unavailable_and_then_available(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SQLITE_BUSY after the time-out; reads go on meanwhile."""
        monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.05)
        backend = SqliteBackend(file)
        await backend.put_non_tombstone(an_id(), Metadata(), b"x")
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(BackendUnavailable, match="SQLITE_BUSY"):
                await backend.put_non_tombstone(an_id(), Metadata(), b"y")
            assert await backend.get_tiered(an_id()) == StoredObject(Metadata(size=1), b"x")
            other.execute("ROLLBACK")

        assert await backend.put_non_tombstone(an_id(), Metadata(), b"y") is None
        await backend.close()

    async def test_a_damaged_file_is_a_permanent_error_without_its_path(self, file: Path) -> None:
        """No path of this machine in a message that may go into a response."""
        write(file, b"this is no database" * 1000)
        backend = SqliteBackend(file)

        with pytest.raises(BackendError) as raised:
            await backend.put_non_tombstone(an_id(), Metadata(), b"x")

        assert "CANARY" not in str(raised.value)
        await backend.close()

    async def test_a_folder_in_its_place_is_an_error_and_mended_later(self, file: Path) -> None:
        """Opening is tried again with every use: no restart is needed."""
        wrong = file / "folder"
        write(wrong, b"")
        backend = SqliteBackend(file)
        with pytest.raises((BackendError, BackendUnavailable)) as raised:
            await backend.get_tiered(an_id())
        assert "CANARY" not in str(raised.value)

        shutil.rmtree(file.parent)

        assert await backend.get_tiered(an_id()) is None
        await backend.close()

    async def test_damaged_metadata_are_one_objects_problem(self, backend: SqliteBackend) -> None:
        await backend.put_non_tombstone(an_id("bad"), Metadata(), b"x")
        await backend.put_non_tombstone(an_id("good"), Metadata(), b"x")

        def damage(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE objects SET metadata = ? WHERE path = ?", (b"{", an_id("bad").storage_path))

        await backend._database.write(damage)

        with pytest.raises(BackendError, match="unreadable"):
            await backend.get_tiered(an_id("bad"))
        assert await backend.get_tiered(an_id("good")) is not None

    async def test_a_payload_over_the_limit_is_refused_at_once(self, file: Path) -> None:
        """The cell limit: neither a put nor a swap gets as far as the file."""
        backend = SqliteBackend(file, inline_bytes_max=10)

        with pytest.raises(TooLarge):
            await backend.put_non_tombstone(an_id(), Metadata(), b"x" * 11)
        with pytest.raises(TooLarge):
            await backend.compare_and_write(an_id(), None, InlineObject(Metadata(), b"x" * 11))
        assert await backend.put_non_tombstone(an_id(), Metadata(), b"x" * 10) is None
        await backend.close()

    async def test_a_queue_that_only_grows_is_refused(
        self, backend: SqliteBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every queue is bounded."""
        monkeypatch.setattr(sqlite, "QUEUE_MAX", 3)
        gate = Gate()
        held = asyncio.create_task(backend._database.write(gate))
        await until(gate.reached)
        puts = [asyncio.create_task(backend.put_non_tombstone(an_id(n), Metadata(), b"x")) for n in range(5)]
        await turns()
        gate.opened.set()
        outcomes = await asyncio.gather(held, *puts, return_exceptions=True)

        assert [type(outcome) for outcome in outcomes[1:]] == [type(None)] * 3 + [BackendUnavailable] * 2

    async def test_a_closed_backend_says_so(self, file: Path) -> None:
        backend = SqliteBackend(file)
        await backend.put_non_tombstone(an_id(), Metadata(), b"x")
        await backend.close()

        with pytest.raises(BackendUnavailable, match="closed"):
            await backend.get_tiered(an_id())


    async def test_one_that_is_closed_before_a_request_is_queued_says_so(self, file: Path) -> None:
        """In the turn in which it was asked for."""
        backend = SqliteBackend(file)
        asked = asyncio.create_task(backend.put_non_tombstone(an_id(), Metadata(), b"x"))
        asyncio.get_running_loop().call_soon(backend._database._writer.stop)
        with pytest.raises(BackendUnavailable, match="closed"):
            await asked
        await backend.close()


class TestCancellation:
    """A read that follows a cancelled write sees what became of it."""

    async def test_a_write_cancelled_in_the_queue_never_happens(self, backend: SqliteBackend) -> None:
        gate = Gate()
        held = asyncio.create_task(backend._database.write(gate))
        await until(gate.reached)
        putting = asyncio.create_task(backend.put_non_tombstone(an_id(), Metadata(), b"x"))
        await turns()

        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        gate.opened.set()
        await held

        assert await backend.get_tiered(an_id()) is None
        await backend._database.write(lambda _connection: None)
        assert await backend.get_tiered(an_id()) is None

    async def test_a_write_cancelled_while_it_runs_is_waited_for(self, backend: SqliteBackend) -> None:
        """Else a clean-up could read the row before the swap it looks for."""
        gate = Gate()

        def put_late(connection: sqlite3.Connection) -> None:
            gate(connection)
            row = (an_id().storage_path, b'{"content_type":"a/b"}', None, None, b"x")
            sqlite._put(connection, row, None, 0)

        putting = asyncio.create_task(backend._database.write(put_late))
        await until(gate.reached)
        putting.cancel()
        await turns()
        assert not putting.done()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await putting

        assert await backend.get_tiered(an_id()) is not None

    async def test_a_disk_that_hangs_does_not_hold_the_cancelled(
        self, backend: SqliteBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite, "SETTLE_SECONDS", 0.01)
        gate = Gate()
        held = asyncio.create_task(backend._database.write(gate))
        await until(gate.reached)
        held.cancel()

        with pytest.raises(asyncio.CancelledError):
            await held
        gate.opened.set()

    async def test_a_cancellation_that_meets_the_answer_is_a_cancellation(
        self, backend: SqliteBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The answer is already on its way to the loop: it finds nobody, and says so to nobody."""
        answered = threading.Event()
        writer = backend._database._writer
        answer = writer._answer

        def told(*arguments: Any) -> None:
            answer(*arguments)
            answered.set()

        monkeypatch.setattr(writer, "_answer", told)
        gate = Gate()
        putting = asyncio.create_task(backend._database.write(gate))
        await until(gate.reached)
        gate.opened.set()
        assert answered.wait(30)  # the loop stands still, so the answer waits beside the cancellation
        putting.cancel()

        with pytest.raises(asyncio.CancelledError):
            await putting

    async def test_an_error_of_a_cancelled_write_is_nobodys(self, backend: SqliteBackend) -> None:
        """The guards of every test would report an exception that was never retrieved."""
        gate = Gate()

        def fail_late(connection: sqlite3.Connection) -> None:
            gate(connection)
            raise ZeroDivisionError

        failing = asyncio.create_task(backend._database.write(fail_late))
        await until(gate.reached)
        failing.cancel()
        await turns()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await failing


class TestFile:
    """One file, for one host, of one version, read by its owner only."""

    async def test_nobody_else_may_read_it(self, file: Path) -> None:
        """Payloads are in it, and in what lies beside it; whatever the umask says."""
        before = os.umask(0)
        try:
            backend = SqliteBackend(file)
            await backend.put_non_tombstone(an_id(), Metadata(), b"x")
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()}
        finally:
            os.umask(before)
        await backend.close()

        assert set(modes) == {"objects.sqlite", "objects.sqlite-wal", "objects.sqlite-shm", "objects.sqlite.lock"}
        assert set(modes.values()) == {0o600}
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700

    async def test_it_is_set_up_for_durability(self, backend: SqliteBackend) -> None:
        """WAL and FULL: an acknowledged write survives a power cut."""

        def pragmas(connection: sqlite3.Connection) -> list[Any]:
            names = ("journal_mode", "synchronous", "page_size", "cache_size")
            return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

        assert await backend._database.write(pragmas) == ["wal", 2, 16_384, -65_536]

    async def test_a_newer_file_is_refused(self, file: Path) -> None:
        """Contract 11: an older version refuses newer files."""
        backend = SqliteBackend(file)
        await backend.put_non_tombstone(an_id(), Metadata(), b"x")
        await backend.close()
        with closing(sqlite3.connect(file)) as connection:
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")

        older = SqliteBackend(file)
        with pytest.raises(ConfigError, match="newer version"):
            await older.open()
        with pytest.raises(ConfigError, match="newer version"):
            await older.put_non_tombstone(an_id(), Metadata(), b"y")
        await older.close()

    async def test_a_file_of_the_first_version_is_brought_up_to_date(self, file: Path) -> None:
        """Contract 11: newer versions read older files; objects and unfinished changes are still there."""
        await asyncio.to_thread(file.parent.mkdir, parents=True, exist_ok=True)

        def write_first_version() -> None:
            with closing(sqlite3.connect(file)) as connection:
                connection.executescript(SCHEMAS[1])
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute("PRAGMA user_version = 1")
                connection.execute(
                    "INSERT INTO objects (path, metadata, payload) VALUES (?, ?, ?)",
                    (an_id().storage_path, encode_metadata(Metadata(size=1)), b"x"),
                )
                connection.execute(
                    "INSERT INTO change_log_entries (change_id, owner, incarnation, object_path, old_revision)"
                    " VALUES (?, 'me', 'dead', ?, 'name')",
                    (str(change_id), an_id().storage_path),
                )
                connection.commit()

        change_id = uuid7()
        await asyncio.to_thread(write_first_version)
        backend, log = SqliteBackend(file), SqliteChangeLog(file, "me")

        assert await backend.get_tiered(an_id()) == StoredObject(Metadata(size=1), b"x")
        assert list(await log.recoverable()) == [Change(change_id, an_id(), None, Revision("name"))]
        postponed = Change(uuid7(), an_id(), None, None, datetime(2030, 1, 1, tzinfo=UTC))
        await log.record(postponed)
        assert [found async for _, found in log.scan_changes()][-1] == postponed
        await log.close()
        await backend.close()

    async def test_another_programs_database_is_refused_untouched(self, file: Path) -> None:
        """A path mistyped must not become a table in somebody's data."""
        write(file, b"")
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("CREATE TABLE theirs (x)")
        backend = SqliteBackend(file)

        with pytest.raises(ConfigError, match="another program"):
            await backend.open()

        await backend.close()
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]

    async def test_another_host_is_refused_where_it_is_noticed(self, file: Path) -> None:
        """Contract 5: the lock is held, and not by this host."""
        lock = file.parent / "objects.sqlite.lock"
        write(lock, b"another host")
        held = os.open(lock, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_SH)
        backend = SqliteBackend(file)
        with pytest.raises(ConfigError, match="another host"):
            await backend.open()
        os.close(held)

        await backend.open()
        assert await asyncio.to_thread(lock.read_text) == boot_id()
        await backend.close()

    async def test_one_path_is_one_writer_for_all_who_use_it(self, file: Path) -> None:
        """Objects and change log in one file share its thread, and the last one closes it."""
        backend, log = SqliteBackend(file), SqliteChangeLog(str(file))
        database = backend._database
        assert log._database is database
        await backend.put_non_tombstone(an_id(), Metadata(), b"x")

        await backend.close()
        assert await log.count() == 0
        await log.close()

        again = SqliteBackend(file)
        assert again._database is not database
        await again.close()

    async def test_after_the_last_close_only_the_file_is_left(self, file: Path) -> None:
        """The write-ahead log has been put away, no thread is left, and the content is there."""
        backend = SqliteBackend(file)
        await asyncio.gather(*(backend.put_non_tombstone(an_id(n), Metadata(), b"x" * 9000) for n in range(50)))
        await asyncio.gather(*(backend.get_tiered(an_id(n)) for n in range(50)))
        await backend.close()

        assert {path.name for path in file.parent.iterdir()} == {"objects.sqlite", "objects.sqlite.lock"}
        again = SqliteBackend(file)
        assert None not in await asyncio.gather(*(again.get_tiered(an_id(n)) for n in range(50)))
        await again.close()

    async def test_making_one_touches_nothing(self, file: Path) -> None:
        """Configurations can be checked without leaving traces."""
        await SqliteBackend(file).close()

        assert not file.parent.exists()


class TestSweep:
    """What has expired goes, a bounded piece at a time."""

    async def test_a_piece_that_was_full_asks_for_the_next(
        self, backend: SqliteBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite, "SWEEP_ROWS", 7)
        past = Metadata(time_expires=datetime(2020, 1, 1, tzinfo=UTC))
        for number in range(20):
            await backend.put_non_tombstone(an_id(number), past, b"x")

        more = [await backend._database.write(backend._remove_expired) for _ in range(4)]

        assert more == [True, True, False, False]

    async def test_what_asks_to_be_run_again_is_run_at_once(self, backend: SqliteBackend) -> None:
        """Else a backlog would grow faster than a piece every few seconds removes it."""
        runs: list[int] = []
        done = threading.Event()

        def step(_connection: sqlite3.Connection) -> bool:
            runs.append(1)
            if len(runs) == 4:
                done.set()
            return len(runs) < 4

        timer = backend._database.every(3600.0, step, at_once=True)
        await until(done)
        await backend._database.write(lambda _connection: None)
        backend._database.never(timer)

        assert len(runs) == 4

    async def test_one_that_fails_is_told_and_tried_again(
        self, backend: SqliteBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Background work must not end a thread that others wait for."""
        done = threading.Event()
        runs: list[int] = []

        def step(_connection: sqlite3.Connection) -> None:
            runs.append(1)
            if len(runs) == 3:
                done.set()
            raise ZeroDivisionError

        timer = backend._database.every(0.001, step, at_once=True)
        await until(done)
        backend._database.never(timer)
        assert await backend.put_non_tombstone(an_id(), Metadata(), b"x") is None

        assert "ZeroDivisionError" in caplog.text

    async def test_expired_rows_are_removed_until_none_is_left(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite, "SWEEP_SECONDS", 0.0)
        monkeypatch.setattr(sqlite, "SWEEP_ROWS", 7)
        now = datetime(2026, 1, 1, tzinfo=UTC)
        clock: Callable[[], datetime] = lambda: now  # noqa: E731 - it has to see the variable change
        backend = SqliteBackend(file, clock=clock)
        short = Metadata(time_expires=now + timedelta(seconds=1))
        await asyncio.gather(
            backend.put_non_tombstone(an_id("stays"), Metadata(), b"x"),
            *(backend.put_non_tombstone(an_id(n), short, b"x") for n in range(50)),
        )
        now += timedelta(seconds=1)

        def rows(connection: sqlite3.Connection) -> int:
            found: int = connection.execute("SELECT count(*) FROM objects").fetchone()[0]
            return found

        while await backend._database.write(rows) > 1:
            pass

        assert await backend.get_tiered(an_id("stays")) is not None
        await backend.close()
