"""The high-volume tier in one SQLite file: no server, and durable before it answers.

**One file, few threads** (:class:`SqliteDatabase`, shared by all who use a path within the process)

1. A caller puts a request into a bounded queue and waits; its event loop never touches the file. What is asked for in
   one turn of the event loop is queued at once, at its end.
   * Full: ``BackendUnavailable``, nothing is written.
2. One writer thread takes all requests queued at that moment (bounded in number and bytes) and runs them in one
   transaction: many writers share one fsync.
   * OK: the results are delivered after the commit, with one call into each event loop.
   * A passing fault of the file (full, I/O, busy): rolled back, and every request of the group fails as
     ``BackendUnavailable``. Nothing is tried again here: the caller knows better, and a full disk stays full.
   * Any other fault: rolled back, and each request is run again alone, so that only the one at fault fails.
3. A few reader threads serve reads from the last committed state, a group of them from the same one; an answered write
   is seen by every later read.

**Cancelled while waiting**: a request still queued is withdrawn; one that is being run is waited for
(:data:`SETTLE_SECONDS` at most). So a read that follows a cancelled write sees what became of it.

**Several processes** of one host may share the file; SQLite's own lock orders them, one group at a time. Another host
is refused where it can be noticed (:mod:`consumer.storage.host`). A file written by a newer version is refused.

Rows: ``path`` (storage path), ``metadata`` (JSON), ``expires`` (microseconds, null = never), ``target`` (a tombstone's
revision, else null), ``source`` and ``position`` of the last write, where it had one, ``kept_until``, and ``payload``
(last, so that reading the others does not load it). A row past ``expires`` is absent for every statement, but for its
position: what is deleted at a position is only made to expire. When it has nothing better to do, the writer thread
empties such rows, sets ``kept_until``, and removes them after that; those without a position it removes at once.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar, TypeVarTuple

from consumer.errors import BackendError, BackendUnavailable, ConfigError, TierstreamError, TooLarge
from consumer.ids import ObjectId
from consumer.log import get_logger
from consumer.operations import Metadata, Position, StoredObject
from consumer.storage.backend import (
    InlineObject,
    Revision,
    TieredHead,
    TieredRead,
    TieredWrite,
    Tombstone,
)
from consumer.storage.host import HostLock, make_folder, sync_folder
from consumer.storage.metadata import FORBIDDEN_FOR, POSITION_KEPT, decode_metadata, encode_metadata, micros, now_utc

log = get_logger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

APPLICATION_ID = 0x54535452
"""Marks the file as ours ("TSTR"), so that another program's database is refused instead of written into."""

SCHEMA_VERSION = 3
"""Version of the tables, kept in the file; a newer one is refused."""

SCHEMAS = {
    1: """
CREATE TABLE objects (
    path TEXT NOT NULL UNIQUE, metadata BLOB NOT NULL, expires INTEGER, target TEXT, payload BLOB
);
CREATE INDEX objects_by_expiry ON objects (expires) WHERE expires IS NOT NULL;
CREATE TABLE forbidden_revisions (name TEXT NOT NULL PRIMARY KEY, until INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE change_log_instances (
    incarnation TEXT NOT NULL PRIMARY KEY, owner TEXT NOT NULL, boot TEXT NOT NULL, lease_until REAL NOT NULL,
    since INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE change_log_entries (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, change_id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    incarnation TEXT NOT NULL, claimed INTEGER NOT NULL DEFAULT 0, unreadable INTEGER NOT NULL DEFAULT 0,
    object_path TEXT NOT NULL, new_revision TEXT, old_revision TEXT
);
""",
    2: """
ALTER TABLE change_log_entries ADD COLUMN not_before INTEGER;
CREATE INDEX change_log_entries_at_work ON change_log_entries (incarnation) WHERE not_before IS NULL;
CREATE INDEX change_log_entries_due ON change_log_entries (not_before) WHERE not_before IS NOT NULL;
CREATE INDEX change_log_entries_claimed ON change_log_entries (incarnation) WHERE claimed;
""",
    3: """
CREATE TABLE objects_with_positions (
    path TEXT NOT NULL UNIQUE, metadata BLOB NOT NULL, expires INTEGER, target TEXT,
    source TEXT, position INTEGER, kept_until INTEGER, payload BLOB
);
INSERT INTO objects_with_positions (path, metadata, expires, target, payload)
    SELECT path, metadata, expires, target, payload FROM objects;
DROP TABLE objects;
ALTER TABLE objects_with_positions RENAME TO objects;
CREATE INDEX objects_to_expire ON objects (expires) WHERE expires IS NOT NULL AND kept_until IS NULL;
CREATE INDEX objects_to_forget ON objects (kept_until) WHERE kept_until IS NOT NULL;
""",
}
"""What brings a file from the version before to each version."""

BUSY_SECONDS = 5.0
"""How long a statement waits for another process: many group commits, and well under an attempt's 20 s."""

QUEUE_MAX = 8192
"""Requests waiting for the file, per direction: 16 times the permits of a default process. Beyond it something is
stuck, and failing is better than growing."""

GROUP_REQUESTS_MAX = 512
"""Requests in one transaction: a whole default limit of permits; more would only delay the first of them."""

GROUP_BYTES_MAX = 32 * 1024 * 1024
"""Payload in one transaction: bounds the write-ahead log and how long the first request of a group waits."""

READ_BATCH_MAX = 32
"""Reads one thread takes at a time: one transaction and one call into the event loop for all of them, which is half of
what reading a row costs; little waiting for the first, 0.1 ms."""

READER_THREADS = 2
"""They overlap only while one waits for the disk: two keep one slow read from stopping the others."""

CLOSE_SECONDS = 10.0
"""How long closing waits for the threads: the last one copies the write-ahead log into the file first."""

SETTLE_SECONDS = 5.0
"""How long a cancelled caller waits for its running request: a commit takes milliseconds; on a disk that hangs, going
on is better than hanging with it."""

WRITER_CACHE_KIB = 65_536
READER_CACHE_KIB = 16_384
"""Page cache of one connection, at most. The writer's keeps the upper pages of the path index in memory."""

SWEEP_SECONDS = 5.0
SWEEP_ROWS = 500
"""Expired rows removed at a time, a few milliseconds; while there are more, the next time follows at once."""

SCAN_ROWS = 2_000
"""Rows of one step of a scan, tombstones or not: a few milliseconds of one reader thread."""

INLINE_BYTES_MAX = 1_000_000_000 - 65_536
"""Largest payload in a row: a row of SQLite has at most 1,000,000,000 bytes, path and metadata included."""

_PASSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_INTERRUPT,
}
"""Primary result codes that may be gone at the next attempt."""


def translate(error: Exception) -> TierstreamError:
    """Return *error* of the file as one of ours; the text names SQLite's result, never a path or a value."""
    if isinstance(error, TierstreamError):
        return error
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        passing = code is not None and code & 0xFF in _PASSING
        return (BackendUnavailable if passing else BackendError)(f"sqlite: {name}")
    if isinstance(error, OSError):
        passing = not isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError)
        return (BackendUnavailable if passing else BackendError)(f"sqlite: {type(error).__name__}")
    return BackendError(f"sqlite: {type(error).__name__}")


class _Request:
    """One step to run in a thread, and who waits for it."""

    __slots__ = ("arguments", "cost", "delivered", "future", "outcome", "step")

    def __init__(
        self, future: asyncio.Future[Any], step: Callable[..., Any], arguments: tuple[Any, ...], cost: int
    ) -> None:
        self.future = future
        self.step = step
        self.arguments = arguments
        self.cost = cost
        self.outcome: _Outcome | None = None
        """Once it has been run."""
        self.delivered = False


class Timer:
    """A step that the writer thread runs by itself every *seconds*; True asks for the next run at once."""

    __slots__ = ("arguments", "due", "seconds", "step")

    def __init__(self, seconds: float, step: Callable[[sqlite3.Connection], object], due: float) -> None:
        self.seconds = seconds
        self.step = step
        self.arguments = ()
        self.due = due


_Outcome: TypeAlias = tuple[Any, TierstreamError | None]
_Run: TypeAlias = Callable[[sqlite3.Connection, Sequence[_Request | Timer]], Iterable[_Outcome]]


def _deliver(answered: list[_Request]) -> None:
    """Answer the callers of one event loop, on that loop."""
    for request in answered:
        request.delivered = True
        future = request.future
        if future.done():
            continue
        assert request.outcome is not None
        result, error = request.outcome
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _seen(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


class _Lane:
    """Threads that drain one bounded queue of requests, each over a connection of its own.

    Args:
        name: Of the threads.
        connect: Opens a connection; run in the thread, again after it has failed.
        run: Runs a group over a connection and gives each member's result or error. Raises nothing.
        threads: How many, started when there is something to do.
        group_max: Most requests taken at a time.
    """

    def __init__(
        self, name: str, connect: Callable[[], sqlite3.Connection], run: _Run, *, threads: int, group_max: int
    ) -> None:
        self._name = name
        self._connect = connect
        self._run = run
        self._threads_max = threads
        self._group_max = group_max
        self._condition = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._gathered: dict[asyncio.AbstractEventLoop, list[_Request]] = {}
        """What has been asked for in this turn of each event loop; touched by that loop's thread alone."""
        self._timers: list[Timer] = []
        self._idle = 0
        self._stopping = False
        self._ends: list[Future[None]] = []

    async def call(self, step: Callable[..., Any], arguments: tuple[Any, ...], cost: int = 0) -> Any:
        """Run *step* in a thread and return its result; *cost* is its payload in bytes.

        Raises:
            BackendUnavailable: the queue is full, the lane is closed, or the file has a passing fault.
            BackendError: any other fault.

        Cancellation: a request still queued is withdrawn, a running one is waited for.
        """
        loop = asyncio.get_running_loop()
        request = _Request(loop.create_future(), step, arguments, cost)
        gathered = self._gathered.get(loop)
        if self._stopping or len(self._waiting) + (0 if gathered is None else len(gathered)) >= QUEUE_MAX:
            raise BackendUnavailable("sqlite: closed" if self._stopping else "sqlite: too many requests wait")
        if gathered is None:
            self._gathered[loop] = [request]
            loop.call_soon(self._queue, loop)
        else:
            gathered.append(request)
        try:
            return await request.future
        except asyncio.CancelledError:
            if request.future.cancelled() and not request.delivered and not self._withdraw(request):
                await self._settle(request)
            raise

    def add_timer(self, timer: Timer) -> None:
        """Run *timer* from now on, before any request that is queued later. Only one that is due starts a thread."""
        with self._condition:
            self._timers.append(timer)
            if self._ends or timer.due <= time.monotonic():
                self._start_or_wake()

    def remove_timer(self, timer: Timer) -> None:
        """Do not begin *timer* again; one that is not there is a success."""
        with self._condition, suppress(ValueError):
            self._timers.remove(timer)

    def stop(self) -> list[Future[None]]:
        """Finish what is queued and end; each future is done when its thread has closed its connection."""
        with self._condition:
            self._stopping = True
            self._timers.clear()
            self._condition.notify_all()
            return self._ends

    def _queue(self, loop: asyncio.AbstractEventLoop) -> None:
        """Queue what has been asked for in the turn of *loop* that ends."""
        gathered = self._gathered.pop(loop)
        with self._condition:
            if not self._stopping:
                self._waiting.extend(gathered)
                for _ in range(0, len(gathered), self._group_max):
                    self._start_or_wake()
                return
        for request in gathered:
            request.outcome = (None, BackendUnavailable("sqlite: closed"))
        _deliver(gathered)

    def _start_or_wake(self) -> None:
        if self._idle:
            self._condition.notify()
        elif len(self._ends) < self._threads_max:
            end: Future[None] = Future()
            self._ends.append(end)
            # A daemon: a process must be able to end although its disk hangs; what was answered is durable anyway.
            threading.Thread(target=self._drain, args=(end,), name=self._name, daemon=True).start()

    def _withdraw(self, request: _Request) -> bool:
        with self._condition:
            try:
                self._waiting.remove(request)
            except ValueError:
                return False
            return True

    async def _settle(self, request: _Request) -> None:
        request.future = settled = asyncio.get_running_loop().create_future()
        settled.add_done_callback(_seen)  # the caller has been cancelled and asks no more, also not after the wait
        await asyncio.wait({settled}, timeout=SETTLE_SECONDS)

    # ---------------------------------------------------------------------------------------------- in the thread

    def _drain(self, end: Future[None]) -> None:
        connection: sqlite3.Connection | None = None
        while True:
            group, timers = self._take()
            if not group and not timers:
                break
            try:
                if connection is None:
                    connection = self._connect()
            except Exception as error:  # noqa: BLE001 - whatever it is, the callers have to hear of it
                self._answer(group, [(None, translate(error)) for _ in group])
                continue
            for timer in timers:
                ((more, timer_error),) = self._run(connection, (timer,))
                if timer_error is not None:
                    log.warning("background work on the storage file failed", error=str(timer_error))
                elif more is True:
                    timer.due = 0.0
            if group:
                self._answer(group, self._run(connection, group))
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()
        end.set_result(None)

    def _take(self) -> tuple[list[_Request], list[Timer]]:
        """Wait for something to do; two empty lists are the end."""
        with self._condition:
            while True:
                now = time.monotonic()
                timers = [timer for timer in self._timers if timer.due <= now]
                if self._waiting or timers or self._stopping:
                    break
                self._idle += 1
                self._condition.wait(min((timer.due - now for timer in self._timers), default=None))
                self._idle -= 1
            for timer in timers:
                timer.due = now + timer.seconds
            group: list[_Request] = []
            cost = 0
            while self._waiting and len(group) < self._group_max and cost < GROUP_BYTES_MAX:
                request = self._waiting.popleft()
                cost += request.cost
                group.append(request)
            return group, timers

    def _answer(self, group: list[_Request], outcomes: Iterable[_Outcome]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[_Request]] = {}
        for request, outcome in zip(group, outcomes, strict=True):
            request.outcome = outcome
            by_loop.setdefault(request.future.get_loop(), []).append(request)
        for loop, answered in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_deliver, answered)


class SqliteDatabase:
    """One storage file and its threads, shared by all who name the same path in this process.

    Made by :meth:`shared`; everyone who got it calls :meth:`release` once. The file is created, and checked, when it
    is first used; so is the folder it lies in. Files are readable by their owner only.

    Raises (every use):
        ConfigError: the file was written by a newer version or another program, or another host uses it.
    """

    _open: ClassVar[dict[str, SqliteDatabase]] = {}
    _open_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: str) -> None:
        self._path = path
        self._users = 0
        self._prepare_lock = threading.Lock()
        self._host_lock: HostLock | None = None
        self._writer = _Lane(
            "sqlite-writer",
            partial(self._connect, WRITER_CACHE_KIB),
            _run_transaction,
            threads=1,
            group_max=GROUP_REQUESTS_MAX,
        )
        self._readers = _Lane(
            "sqlite-reader",
            partial(self._connect, READER_CACHE_KIB),
            _run_reads,
            threads=READER_THREADS,
            group_max=READ_BATCH_MAX,
        )

    @classmethod
    def shared(cls, path: str | os.PathLike[str]) -> SqliteDatabase:
        """Return the database of *path*, the same one for all who hold it. Touches no file."""
        name = os.path.normpath(os.fspath(path))
        with cls._open_lock:
            database = cls._open.get(name)
            if database is None:
                database = cls._open[name] = cls(name)
            database._users += 1
            return database

    async def open(self) -> None:
        """Create or check the file now instead of at the first use."""
        await self.read(_nothing)

    def write(
        self, step: Callable[[sqlite3.Connection, *Ts], T], *arguments: *Ts, cost: int = 0
    ) -> Coroutine[Any, Any, T]:
        """Run *step* in a transaction, which it shares with others; return its result once it is durable.

        A step may be run twice, the first run undone. Raises and Cancellation: as :meth:`_Lane.call`.
        """
        return self._writer.call(step, arguments, cost)

    def read(
        self, step: Callable[[sqlite3.Connection, *Ts], T], *arguments: *Ts
    ) -> Coroutine[Any, Any, T]:
        """Run *step*, one query, on the last committed state. Raises and Cancellation: as :meth:`_Lane.call`."""
        return self._readers.call(step, arguments)

    def every(self, seconds: float, step: Callable[[sqlite3.Connection], object], *, at_once: bool = False) -> Timer:
        """Let the writer thread run *step* regularly, *at_once* for the first time, else once the file is in use.

        A step that returns True is run again at once. Errors are logged.
        """
        timer = Timer(seconds, step, time.monotonic() + (0.0 if at_once else seconds))
        self._writer.add_timer(timer)
        return timer

    def never(self, timer: Timer) -> None:
        """Begin *timer* no more."""
        self._writer.remove_timer(timer)

    async def release(self) -> None:
        """Give up one use; the last one ends the threads and lets go of the file."""
        with self._open_lock:
            self._users -= 1
            if self._users:
                return
            del self._open[self._path]
        for lane in (self._readers, self._writer):  # the writer last and alone: it puts the write-ahead log away
            if ends := [asyncio.wrap_future(end) for end in lane.stop()]:
                _, hanging = await asyncio.wait(ends, timeout=CLOSE_SECONDS)
                if hanging:
                    log.warning("the storage file did not close in time", seconds=CLOSE_SECONDS)
                    return
        if self._host_lock is not None:
            self._host_lock.release()

    # ---------------------------------------------------------------------------------------------- in the thread

    def _connect(self, cache_kib: int) -> sqlite3.Connection:
        with self._prepare_lock:
            if self._host_lock is None:
                self._host_lock = self._prepare()
        connection = self._connection()
        try:
            connection.execute("PRAGMA synchronous = FULL")  # an answered write survives a power cut, not only a crash
            connection.execute("PRAGMA fullfsync = ON")  # macOS: flush the drive's cache too; elsewhere nothing
            connection.execute(f"PRAGMA cache_size = -{cache_kib}")
            connection.execute(f"PRAGMA journal_size_limit = {GROUP_BYTES_MAX * 2}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _connection(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)

    def _prepare(self) -> HostLock:
        folder = Path(self._path).parent
        make_folder(folder)
        lock = HostLock(f"{self._path}.lock")
        try:
            with suppress(FileExistsError):
                # Never opened by hand once it exists: closing it would drop the locks SQLite holds in this process.
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                sync_folder(folder)
            with closing(self._connection()) as connection:
                _create_or_check(connection)
        except BaseException:
            lock.release()
            raise
        return lock


def _create_or_check(connection: sqlite3.Connection) -> None:
    """Bring the tables into being or up to date, or make sure that they are ours and of a version we know."""
    connection.execute("PRAGMA page_size = 16384")  # a typical small object lies in one page; without effect later on
    deadline = time.monotonic() + BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:  # another process does the same; SQLite does not wait for this lock
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("BEGIN IMMEDIATE")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION_ID:
        raise ConfigError("the storage file belongs to another program")
    if version > SCHEMA_VERSION:
        raise ConfigError(f"the storage file was written by a newer version (schema {version})")
    for missing in range(version + 1 if tables else 1, SCHEMA_VERSION + 1):
        for statement in SCHEMAS[missing].split(";"):
            connection.execute(statement)
    if version < SCHEMA_VERSION or not tables:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _nothing(_connection: sqlite3.Connection) -> None:
    """Do nothing, over a connection that works."""


def _run_transaction(connection: sqlite3.Connection, group: Sequence[_Request | Timer]) -> list[_Outcome]:
    """Run a group as one transaction, or, where one member is at fault, each as its own."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        outcomes: list[_Outcome] = [(request.step(connection, *request.arguments), None) for request in group]
        connection.execute("COMMIT")
    except Exception as error:  # noqa: BLE001 - an error of any kind concerns the callers, not the thread
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        if len(group) == 1 or translate(error).retriable:
            return [(None, translate(error)) for _ in group]
    else:
        return outcomes
    return [outcome for request in group for outcome in _run_transaction(connection, (request,))]


def _run_reads(connection: sqlite3.Connection, group: Sequence[_Request | Timer]) -> list[_Outcome]:
    """Run the reads of a group on one state of the file, which is locked and looked at once for all of them."""
    outcomes: list[_Outcome] = []
    try:
        connection.execute("BEGIN")
        for request in group:
            try:
                outcomes.append((request.step(connection, *request.arguments), None))
            except Exception as error:  # noqa: BLE001 - as above
                outcomes.append((None, translate(error)))
        connection.execute("COMMIT")
    except Exception as error:  # noqa: BLE001 - as above
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        outcomes += [(None, translate(error)) for _ in group[len(outcomes) :]]
    return outcomes


class SqliteBackend:
    """The high-volume tier in a SQLite file; what each method guarantees stands at its protocol.

    Args:
        path: The file. It is created with the folder it lies in; ``-wal``, ``-shm`` and ``.lock`` appear beside it.
        clock: Tells the time by which rows expire.
        inline_bytes_max: Largest payload taken.

    Raises (all methods): ``BackendUnavailable``, ``BackendError``; ``ConfigError`` where the file may not be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Callable[[], datetime] = now_utc,
        inline_bytes_max: int = INLINE_BYTES_MAX,
    ) -> None:
        self.inline_bytes_max = inline_bytes_max
        self._clock = clock
        self._database = SqliteDatabase.shared(path)
        self._sweep = self._database.every(SWEEP_SECONDS, self._remove_expired)
        self._closed = False

    async def open(self) -> None:
        """Create or check the file now, so that a wrong one is noticed at start. Optional."""
        await self._database.open()

    async def put_non_tombstone(
        self, object_id: ObjectId, metadata: Metadata, payload: bytes, position: Position | None = None
    ) -> Tombstone | None:
        """Store the object inline, with its size filled in (HV-10), or return the live tombstone found (HV-1)."""
        size = len(payload)
        self._check_size(size)
        if metadata.size != size:
            metadata = replace(metadata, size=size)
        row = (object_id.storage_path, encode_metadata(metadata), _expires(metadata), None, payload)
        return _tombstone(await self._database.write(_put, row, position, self._now(), cost=size))

    async def get_tiered(self, object_id: ObjectId) -> TieredRead:
        """Read the row (HV-2)."""
        row = await self._database.read(_select_row, object_id.storage_path, self._now())
        if row is None or row[1] is not None:
            return _tombstone(row)
        return StoredObject(decode_metadata(row[0]), row[2])

    async def head_tiered(self, object_id: ObjectId) -> TieredHead:
        """Read the row without its payload (HV-2)."""
        row = await self._database.read(_select_head, object_id.storage_path, self._now())
        return _tombstone(row) if row is None or row[1] is not None else decode_metadata(row[0])

    async def delete_non_tombstone(self, object_id: ObjectId, position: Position | None = None) -> Tombstone | None:
        """Delete the object, if any, or return the live tombstone found (HV-4)."""
        return _tombstone(await self._database.write(_delete, object_id.storage_path, position, self._now()))

    async def compare_and_write(
        self,
        object_id: ObjectId,
        current: Revision | None,
        write: TieredWrite,
        position: Position | None = None,
    ) -> bool | None:
        """Write if the live tombstone is *current* (None: there is none), HV-5 … HV-9."""
        path = object_id.storage_path
        row: _Row | None = None
        match write:
            case Tombstone(target, metadata):
                row = (path, encode_metadata(metadata), _expires(metadata), target.name, None)
            case InlineObject(metadata, payload):
                self._check_size(len(payload))
                row = (path, encode_metadata(metadata), _expires(metadata), None, payload)
        cost = len(row[4] or b"") if row is not None else 0
        expected = None if current is None else current.name
        done = await self._database.write(_compare_and_write, path, expected, row, position, self._now(), cost=cost)
        if isinstance(done, str):
            raise BackendUnavailable("the revision was given up by a clean-up; write it again as a new one")
        return done

    async def forbid(self, object_id: ObjectId, revision: Revision) -> bool:
        """Refuse *revision* as a tombstone's target from now on; False where the row already points at it."""
        until = micros(self._clock() + FORBIDDEN_FOR)
        return await self._database.write(_forbid, object_id.storage_path, revision.name, until, self._now())

    async def extend(self, object_id: ObjectId, seen: Metadata, extended: Metadata) -> bool:
        """Replace the row's expiry, only if its metadata is still *seen*."""
        return await self._database.write(
            _extend,
            object_id.storage_path,
            encode_metadata(seen),
            encode_metadata(extended),
            _expires(extended),
            self._now(),
        )

    async def scan_tombstones(self) -> AsyncGenerator[tuple[ObjectId, Revision], None]:
        """Yield every live tombstone's object and target, a step of :data:`SCAN_ROWS` rows at a time."""
        last = 0
        while rows := await self._database.read(_select_rows_after, last):
            last = rows[-1][0]
            now = self._now()
            for _, path, target, expires in rows:
                if target is not None and (expires is None or expires > now):
                    yield ObjectId.parse(path), Revision(target)

    async def join(self) -> None:
        """Return at once: the sweep leaves nothing that needs finishing (HV-11)."""

    async def close(self) -> None:
        """Stop sweeping and give up the file; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._database.never(self._sweep)
            await self._database.release()

    def _now(self) -> int:
        return micros(self._clock())

    def _check_size(self, size: int) -> None:
        if size > self.inline_bytes_max:
            raise TooLarge(f"an inline payload has at most {self.inline_bytes_max} bytes")

    def _remove_expired(self, connection: sqlite3.Connection) -> bool:
        now = self._now()
        connection.execute("DELETE FROM forbidden_revisions WHERE until <= ?", (now,))
        swept = (
            connection.execute(_FORGET, (now, SWEEP_ROWS)).rowcount,
            connection.execute(_EMPTY, (_POSITION_KEPT, now, SWEEP_ROWS)).rowcount,
            connection.execute(_SWEEP, (now, SWEEP_ROWS)).rowcount,
        )
        return SWEEP_ROWS in swept


# ------------------------------------------------------------------------------------------------- steps, in a thread

_POSITION_KEPT = POSITION_KEPT // timedelta(microseconds=1)
_FORBIDDEN = "forbidden"
"""What a swap to a forbidden target comes to: no error in the thread, where it would befall the whole group."""

_Row: TypeAlias = tuple[str, bytes, int | None, str | None, bytes | None]
"""The columns of ``objects``, in order, without those of the position."""

_UPSERT = """
INSERT INTO objects (path, metadata, expires, target, payload, source, position) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (path) DO UPDATE SET
    metadata = excluded.metadata, expires = excluded.expires, target = excluded.target, payload = excluded.payload,
    source = excluded.source, position = excluded.position, kept_until = NULL
"""
_PUT = f"{_UPSERT} WHERE objects.target IS NULL OR objects.expires <= ?"
_PUT_AT = f"""
{_UPSERT} WHERE (objects.target IS NULL OR objects.expires <= ?) AND NOT (
    objects.source IS excluded.source AND objects.position > excluded.position
    AND (objects.expires IS NULL OR coalesce(objects.kept_until, objects.expires + ?) > ?)
)
"""
"""The fence is a condition of the statement, as most writes pass it: a statement before each costs a third more."""
_DELETE_AT = """
INSERT OR REPLACE INTO objects (path, metadata, expires, source, position, kept_until) VALUES (?, x'', 0, ?, ?, ?)
"""
_DELETE_NON_TOMBSTONE = "DELETE FROM objects WHERE path = ? AND target IS NULL"
_SELECT_POSITION = """
SELECT position FROM objects WHERE path = ? AND source = ?
    AND (expires IS NULL OR coalesce(kept_until, expires + ?) > ?)
"""
_SELECT_ROW = "SELECT metadata, target, payload FROM objects WHERE path = ? AND (expires IS NULL OR expires > ?)"
_SELECT_HEAD = "SELECT metadata, target FROM objects WHERE path = ? AND (expires IS NULL OR expires > ?)"
_SELECT_AFTER = "SELECT rowid, path, target, expires FROM objects WHERE rowid > ? ORDER BY rowid LIMIT ?"
_SELECT_FORBIDDEN = "SELECT 1 FROM forbidden_revisions WHERE name = ? AND until > ?"
_FORBID = "INSERT OR REPLACE INTO forbidden_revisions (name, until) VALUES (?, ?)"
_EXTEND = """
UPDATE objects SET metadata = ?, expires = ?
WHERE path = ? AND metadata = ? AND (expires IS NULL OR expires > ?)
"""
_EMPTY = """
UPDATE objects SET metadata = x'', expires = 0, target = NULL, payload = NULL, kept_until = expires + ?
WHERE rowid IN (SELECT rowid FROM objects WHERE kept_until IS NULL AND expires <= ? AND source IS NOT NULL LIMIT ?)
"""
_SWEEP = """
DELETE FROM objects
WHERE rowid IN (SELECT rowid FROM objects WHERE kept_until IS NULL AND expires <= ? AND source IS NULL LIMIT ?)
"""
_FORGET = "DELETE FROM objects WHERE rowid IN (SELECT rowid FROM objects WHERE kept_until <= ? LIMIT ?)"


def _at(position: Position | None) -> tuple[str | None, int | None]:
    """Return the columns of a position."""
    return (None, None) if position is None else (position.source, position.offset)


def _ahead(connection: sqlite3.Connection, path: str, position: Position | None, now: int) -> int:
    """Return how far the last write is ahead, if it is remembered and of the same source; below 0: behind; else 0."""
    if position is None:
        return 0
    found = connection.execute(_SELECT_POSITION, (path, position.source, _POSITION_KEPT, now)).fetchone()
    return 0 if found is None else int(found[0]) - position.offset


def _remove(connection: sqlite3.Connection, path: str, position: Position | None, now: int) -> None:
    """Remove a row; with a position, leave one that has expired from the beginning."""
    if position is None:
        connection.execute("DELETE FROM objects WHERE path = ?", (path,))
    else:
        connection.execute(_DELETE_AT, (path, position.source, position.offset, now + _POSITION_KEPT))


def _put(
    connection: sqlite3.Connection, row: _Row, position: Position | None, now: int
) -> tuple[Any, ...] | None:
    if position is None:
        done = connection.execute(_PUT, (*row, None, None, now)).rowcount
    else:
        values = (*row, position.source, position.offset, now, _POSITION_KEPT, now)
        done = connection.execute(_PUT_AT, values).rowcount
    if done or _ahead(connection, row[0], position, now) > 0:
        return None
    return _select_head(connection, row[0], now)


def _delete(
    connection: sqlite3.Connection, path: str, position: Position | None, now: int
) -> tuple[Any, ...] | None:
    if position is None:
        if connection.execute(_DELETE_NON_TOMBSTONE, (path,)).rowcount:
            return None
        return _select_head(connection, path, now)
    if _ahead(connection, path, position, now) > 0:
        return None
    found = _select_head(connection, path, now)
    if found is not None and found[1] is not None:
        return found
    _remove(connection, path, position, now)
    return None


def _select_row(connection: sqlite3.Connection, path: str, now: int) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = connection.execute(_SELECT_ROW, (path, now)).fetchone()
    return row


def _select_head(connection: sqlite3.Connection, path: str, now: int) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = connection.execute(_SELECT_HEAD, (path, now)).fetchone()
    return row


def _select_rows_after(connection: sqlite3.Connection, last: int) -> list[tuple[int, str, str | None, int | None]]:
    return connection.execute(_SELECT_AFTER, (last, SCAN_ROWS)).fetchall()


def _target(connection: sqlite3.Connection, path: str, now: int) -> str | None:
    """Return the live tombstone's target."""
    row = _select_head(connection, path, now)
    return None if row is None else row[1]


def _compare_and_write(
    connection: sqlite3.Connection,
    path: str,
    expected: str | None,
    row: _Row | None,
    position: Position | None,
    now: int,
) -> bool | str | None:
    """Return whether the row is as wanted; None where an older write has come in between; or :data:`_FORBIDDEN`."""
    found = _target(connection, path, now)
    wanted = None if row is None else row[3]
    if found is not None and found == wanted != expected:
        return True
    ahead = _ahead(connection, path, position, now)
    if ahead > 0:
        return False
    if found != expected:
        return None if ahead < 0 else found == wanted
    if row is None:
        _remove(connection, path, position, now)
        return True
    if wanted is not None and connection.execute(_SELECT_FORBIDDEN, (wanted, now)).fetchone():
        return _FORBIDDEN
    connection.execute(_UPSERT, (*row, *_at(position)))
    return True


def _forbid(connection: sqlite3.Connection, path: str, name: str, until: int, now: int) -> bool:
    if _target(connection, path, now) == name:
        return False
    connection.execute(_FORBID, (name, until))
    return True


def _extend(
    connection: sqlite3.Connection, path: str, seen: bytes, extended: bytes, expires: int | None, now: int
) -> bool:
    return connection.execute(_EXTEND, (extended, expires, path, seen, now)).rowcount > 0


# -------------------------------------------------------------------------------------------------- values and columns


def _expires(metadata: Metadata) -> int | None:
    return None if metadata.time_expires is None else micros(metadata.time_expires)


def _tombstone(row: tuple[Any, ...] | None) -> Tombstone | None:
    """Return the tombstone of a row that has a target."""
    return None if row is None else Tombstone(Revision(row[1]), decode_metadata(row[0]))
