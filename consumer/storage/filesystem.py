"""The long-term tier in a folder: one payload file and one metadata file per revision, durable before it answers.

**Names** (:func:`revision_path`). A revision name is never used as a path. All but ``[A-Za-z0-9_-]`` is
percent-encoded and the result cut into parts of at most :data:`PART_MAX` characters, all but the last one folders,
below one of 4,096 folders named after a hash. No part has a dot or slash of its own, so no name leads out of the root,
and a folder is never taken for a file. Every part is opened relative to the one above, never through a symbolic link.

**Put**

1. Write the payload to a temporary file in ``incoming/``, piece by piece, computing its CRC-32C. Flush it to the disk.
   * The iterator raises, or the put is cancelled: the temporary file is removed, the error passes on unchanged.
2. Write the metadata, with name, size and CRC-32C, to a second temporary file. Flush it.
3. Rename both into place, the payload first: a revision exists from the moment its metadata file does.
   * The folder has been pruned meanwhile: make it again.
4. Flush the folder and those above it, up to the root. Only now is the put acknowledged.

Putting a revision again replaces it by the same; two puts at once do not meet, as each has temporary files of its own.
The payload file holds the payload and nothing else, so that a reference to it can be handed to others: ``file:`` and
its absolute path, percent-encoded, or another base in place of the root's, where others reach the folder by one.

**Get** reads the metadata, then the payload, and compares size and CRC-32C.

**Delete** calls off unfinished puts of the revision in this process, removes metadata, payload, and again metadata (an
:meth:`~FilesystemBackend.extend` may have come in between; it looks after the payload for its part), flushes the
folder, and prunes folders left empty.

**Expiry**: an expired revision is absent at once. Its files go in a sweep, a step of which looks through one of the
4,096 folders: one step every :data:`SWEEP_SECONDS`, from the first use on, and one with each put of an expiring
revision. So they go within :data:`FOLDERS` seconds, and never more of them wait than 4,096 puts leave.

**Start**: what dead processes have left in ``incoming/`` is removed. A living one holds a lock on each of its temporary
files, so several processes of one host may share the folder; another host is refused where it can be noticed, as is a
folder written by a newer version.

Nothing here blocks the event loop: all file access happens in :data:`THREADS` threads owned by the backend.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import secrets
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple
from urllib.parse import quote

import google_crc32c
import orjson

from consumer.errors import BackendError, BackendUnavailable, ConfigError, TierstreamError
from consumer.log import get_logger
from consumer.operations import Metadata, PayloadReference, StoredObject
from consumer.storage.backend import Payload, Revision
from consumer.storage.host import HostLock, make_folder
from consumer.storage.metadata import decode_metadata, encode_metadata, expired, now_utc

log = get_logger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FORMAT = 1
"""Version of the layout, kept in the root's file ``FORMAT``; a newer one is refused."""

PART_MAX = 200
"""Longest part of a path: with its suffix below the 255 bytes of a file name, on every filesystem."""

FOLDERS = 4096
"""Folders below the root, three digits of a hash: a million revisions are 250 to a folder."""

THREADS = 4
"""Two more than a disk keeps busy, so that a slow flush does not hold up a read. They hold no memory between steps."""

STEPS_MAX = 1024
"""Steps waiting for a thread or running: twice the permits of a default process. Beyond it something is stuck."""

PIECE_BYTES = 1024 * 1024
"""How much of a stream is gathered before a thread writes it: one hop between threads per MiB costs nothing, and a put
holds no more than this and the chunk that crosses it."""

RENAME_ATTEMPTS = 100
"""How often a folder is made again because a delete prunes it in the very moment between making and using it."""

SETTLE_SECONDS = 5.0
"""How long a cancelled caller waits for its running step: a flush takes milliseconds; on a disk that hangs, going on is
better than hanging with it."""

CLOSE_SECONDS = 10.0
"""How long closing waits for steps that are running."""

SWEEP_SECONDS = 1.0
"""Between two steps of the sweep for expired revisions: all folders in 68 minutes, for a few milliseconds of one thread
every second even where a million revisions lie."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_PERMANENT = {
    errno.EACCES,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""Faults that stay until somebody changes something; all others may be gone at the next attempt."""


def revision_path(name: str) -> tuple[str, ...]:
    """Return the parts of the path for *name*: hash folder, further folders, stem of the file names (pure)."""
    encoded = quote(name, safe="").replace(".", "%2E").replace("~", "%7E")
    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=2).digest(), "big") % FOLDERS
    return (_hash_folder(digest), *(encoded[at : at + PART_MAX] for at in range(0, max(len(encoded), 1), PART_MAX)))


def _hash_folder(number: int) -> str:
    return f"{number:03x}"


def translate(error: OSError) -> TierstreamError:
    """Return *error* of the disk as one of ours; the text names the error number, never a path."""
    text = f"filesystem: {errno.errorcode.get(error.errno or 0, type(error).__name__)}"
    return BackendError(text) if error.errno in _PERMANENT else BackendUnavailable(text)


@dataclass(frozen=True, slots=True)
class _Description:
    """What the metadata file of a revision says: a line of its own, and the stored form of the metadata."""

    name: str
    size: int
    crc32c: int
    metadata: Metadata

    def encode(self) -> bytes:
        own = orjson.dumps({"name": self.name, "size": self.size, "crc32c": self.crc32c})
        return own + b"\n" + encode_metadata(self.metadata)

    @classmethod
    def decode(cls, stored: bytes) -> _Description:
        own, _, metadata = stored.partition(b"\n")
        try:
            fields = orjson.loads(own)
            name, size, crc32c = fields["name"], fields["size"], fields["crc32c"]
        except (KeyError, TypeError, ValueError):
            raise BackendError("filesystem: a revision's description is unreadable") from None
        return cls(name, size, crc32c, replace(decode_metadata(metadata), size=size))


class _Tree:
    """The folder on the disk, and every access to it. All methods block; any thread may call any of them."""

    def __init__(self, path: str) -> None:
        self._root = self._incoming = -1
        make_folder(Path(path))
        self.uri = Path(path).absolute().as_uri()
        self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # the root itself may be a link
        self._lock: HostLock | None = None
        try:
            self._lock = HostLock(".lock", dir_fd=self._root)
            self._check_format()
            with suppress(FileExistsError):
                os.mkdir("incoming", 0o700, dir_fd=self._root)
            self._incoming = os.open("incoming", _FOLDER, dir_fd=self._root)
            self._remove_abandoned()
            os.fsync(self._root)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()
        for fd in (self._incoming, self._root):
            if fd >= 0:
                os.close(fd)

    def read(self, name: str) -> tuple[_Description, bytes] | None:
        """Return description and payload, None where there is no such revision."""
        *folders, stem = revision_path(name)
        with self._opened(folders) as chain:
            found = _find(chain, name)
            if found is None:
                return None
            try:
                fd = os.open(f"{stem}.payload", _READ, dir_fd=chain[-1])
            except FileNotFoundError:  # deleted between the two
                return None
        payload = _read_all(fd)
        if len(payload) != found.size or google_crc32c.value(payload) != found.crc32c:
            raise BackendError("filesystem: a payload does not match its size and checksum")
        return found, payload

    def describe(self, name: str) -> _Description | None:
        """Return the description, None where there is no such revision."""
        with self._opened(revision_path(name)[:-1]) as chain:
            return _find(chain, name)

    def remove(self, name: str) -> None:
        """Remove a revision and the folders it leaves empty; an absent one is a success."""
        *folders, stem = revision_path(name)
        with self._opened(folders) as chain:
            if not chain:
                return
            for suffix in ("json", "payload", "json"):
                with suppress(FileNotFoundError):
                    os.unlink(f"{stem}.{suffix}", dir_fd=chain[-1])
            os.fsync(chain[-1])
            for folder, above in zip(reversed(folders), reversed(chain[:-1]), strict=True):
                try:
                    os.rmdir(folder, dir_fd=above)
                except OSError:  # not empty, or another delete was quicker
                    return

    def describe_again(self, name: str, metadata: Metadata) -> None:
        """Replace the metadata of a revision that is there."""
        *folders, stem = revision_path(name)
        with self._opened(folders) as chain:
            found = _find(chain, name)
            if found is None:
                return
            temporary, fd = self.create_temporary()
            try:
                _write_all(fd, replace(found, metadata=metadata).encode())
                os.fsync(fd)
                os.rename(temporary, f"{stem}.json", src_dir_fd=self._incoming, dst_dir_fd=chain[-1])
            except FileNotFoundError:  # the folder was pruned: the revision is gone
                self.remove_temporary(temporary)
            except BaseException:
                self.remove_temporary(temporary)
                raise
            finally:
                os.close(fd)
            try:
                os.stat(f"{stem}.payload", dir_fd=chain[-1], follow_symlinks=False)
            except FileNotFoundError:  # a delete came in between
                with suppress(FileNotFoundError):
                    os.unlink(f"{stem}.json", dir_fd=chain[-1])
            os.fsync(chain[-1])

    def publish(self, name: str, payload: str, description: str) -> None:
        """Move two finished temporary files to where they make a revision, durably."""
        *folders, stem = revision_path(name)
        temporaries = {f"{stem}.payload": payload, f"{stem}.json": description}
        for attempt in range(RENAME_ATTEMPTS):
            try:
                with self._opened(folders, create=True) as chain:
                    for final, temporary in list(temporaries.items()):
                        os.rename(temporary, final, src_dir_fd=self._incoming, dst_dir_fd=chain[-1])
                        del temporaries[final]
                    for fd in reversed(chain):
                        os.fsync(fd)
                    return
            except FileNotFoundError:
                if attempt == RENAME_ATTEMPTS - 1:
                    raise

    def create_temporary(self) -> tuple[str, int]:
        """Return name and descriptor of a new, locked file in ``incoming/``; the lock lives as long as the latter."""
        while True:
            name = secrets.token_hex(16)
            fd = os.open(name, _CREATE, 0o600, dir_fd=self._incoming)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return name, fd
            os.close(fd)  # a starting process took it for abandoned before it was locked

    def remove_temporary(self, name: str) -> None:
        """Remove a temporary file; one that is gone is a success."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._incoming)

    def remove_expired(self, number: int, clock: Callable[[], datetime]) -> None:
        """Remove what has expired in one of the folders below the root."""
        for found in self._descriptions([_hash_folder(number)]):
            if expired(found.metadata, clock):
                self.remove(found.name)

    def names(self, number: int, clock: Callable[[], datetime]) -> list[str]:
        """Return the names of what has not expired in one of the folders below the root."""
        descriptions = self._descriptions([_hash_folder(number)])
        return [found.name for found in descriptions if not expired(found.metadata, clock)]

    def _descriptions(self, folders: list[str]) -> Iterator[_Description]:
        """Yield what lies in and below a folder; what cannot be read has not expired as far as anybody can tell."""
        below: list[str] = []
        with self._opened(folders) as chain:
            for entry in _entries(chain[-1]) if chain else ():
                if entry.endswith(".json"):
                    with suppress(BackendError):
                        if (found := _description(chain[-1], entry)) is not None:
                            yield found
                elif "." not in entry:
                    below.append(entry)
        for entry in below:
            yield from self._descriptions([*folders, entry])

    @contextmanager
    def _opened(self, folders: Sequence[str], *, create: bool = False) -> Iterator[list[int]]:
        """Open *folders*, each in the one before, and the root in front; yield nothing where one is missing."""
        chain = [os.dup(self._root)]
        try:
            for folder in folders:
                if create:
                    with suppress(FileExistsError):
                        os.mkdir(folder, 0o700, dir_fd=chain[-1])
                chain.append(os.open(folder, _FOLDER, dir_fd=chain[-1]))
        except FileNotFoundError:
            _close_all(chain)
            if create:
                raise
            chain = []
        except BaseException:
            _close_all(chain)
            raise
        try:
            yield chain
        finally:
            _close_all(chain)

    def _check_format(self) -> None:
        fd = os.open("FORMAT", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._root)
        try:
            # A power cut during the very first start can leave a file of zeros: nothing has been stored by then.
            found = os.pread(fd, 32, 0).strip(b"\0\n ")
            if not found:
                os.pwrite(fd, b"%d\n" % FORMAT, 0)
                os.fsync(fd)
            elif not found.isdigit() or int(found) > FORMAT:
                raise ConfigError("the storage folder was written by a newer version")
        finally:
            os.close(fd)

    def _remove_abandoned(self) -> None:
        """Remove temporary files whose process is dead, which is to say: that nobody has locked."""
        for name in _entries(self._incoming):
            with suppress(FileNotFoundError):
                fd = os.open(name, _READ, dir_fd=self._incoming)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=self._incoming)
                except BlockingIOError:
                    pass  # its process lives and writes it
                finally:
                    os.close(fd)


def _find(chain: list[int], name: str) -> _Description | None:
    """Read the description of *name* in the last folder of an open chain, if there is one."""
    found = _description(chain[-1], f"{revision_path(name)[-1]}.json") if chain else None
    if found is not None and found.name != name:
        raise BackendError("filesystem: a revision lies under another one's name")
    return found


def _description(folder: int, entry: str) -> _Description | None:
    try:
        fd = os.open(entry, _READ, dir_fd=folder)
    except FileNotFoundError:
        return None
    return _Description.decode(_read_all(fd))


def _entries(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _read_all(fd: int) -> bytes:
    with os.fdopen(fd, "rb", buffering=0) as file:
        return file.readall()


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


class _Incoming:
    """One unfinished put. Its methods run in threads, one at a time; once called off it publishes nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        self._payload: str | None = None
        self._called_off = False
        self._size = 0
        self._crc32c = 0

    def write(self, tree: _Tree, chunks: Sequence[bytes]) -> None:
        """Append *chunks* to the payload."""
        with self._lock:
            self._append(tree, chunks)

    def finish(self, tree: _Tree, chunks: Sequence[bytes], metadata: Metadata) -> int:
        """Append *chunks* and make the revision exist; return its size when that is durable."""
        with self._lock:
            payload = self._append(tree, chunks)
            os.fsync(self._files[payload])
            description, fd = self._create(tree)
            _write_all(fd, _Description(self.name, self._size, self._crc32c, metadata).encode())
            os.fsync(fd)
            tree.publish(self.name, payload, description)
            self._close()
            return self._size

    def call_off(self, tree: _Tree) -> None:
        """Remove what is there; a finished put stays."""
        with self._lock:
            self._called_off = True
            for name in self._files:
                tree.remove_temporary(name)
            self._close()

    def _append(self, tree: _Tree, chunks: Sequence[bytes]) -> str:
        if self._called_off:
            raise BackendUnavailable("filesystem: the revision was deleted while it was written")
        if self._payload is None:
            self._payload, _ = self._create(tree)
        for chunk in chunks:
            self._crc32c = google_crc32c.extend(self._crc32c, bytes(chunk))
            self._size += len(chunk)
            _write_all(self._files[self._payload], chunk)
        return self._payload

    def _create(self, tree: _Tree) -> tuple[str, int]:
        name, fd = tree.create_temporary()
        self._files[name] = fd
        return name, fd

    def _close(self) -> None:
        _close_all(list(self._files.values()))
        self._files.clear()


class FilesystemBackend:
    """The long-term tier in a folder; what each method guarantees stands at its protocol.

    Args:
        path: The folder, created where it is missing. Nothing but this backend may write into it.
        base_uri: What references begin with in place of the folder's own ``file:`` URI; the rest is the path below it.
        clock: Tells the time by which revisions expire.

    Raises (all methods): ``BackendUnavailable``, ``BackendError``; ``ConfigError`` where the folder may not be used.
    Cancellation: a step still queued is withdrawn, a running one is waited for (:data:`SETTLE_SECONDS` at most).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        base_uri: str | None = None,
        clock: Callable[[], datetime] = now_utc,
    ) -> None:
        self._path = os.fspath(path)
        self._base_uri = base_uri
        self._clock = clock
        self._tree: _Tree | None = None
        self._tree_lock = threading.Lock()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="filesystem")
        self._steps: set[Future[Any]] = set()
        self._unfinished: set[_Incoming] = set()
        self._sweep: Future[None] | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._sweep_folder = secrets.randbelow(FOLDERS)
        self._closed = False

    async def open(self) -> None:
        """Create or check the folder now, so that a wrong one is noticed at start. Optional."""
        await self._run(_nothing)

    async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
        """Store the payload under a name of its own; a failing iterator leaves nothing."""
        encode_metadata(metadata)  # refused before anything is written
        incoming = _Incoming(revision.name)
        self._unfinished.add(incoming)
        try:
            size = await self._receive(incoming, metadata, payload)
        except BaseException as error:
            # The entry goes when the files are gone, so that a delete meanwhile finds what it has to call off.
            with suppress(BackendUnavailable):  # closed: the next start removes them
                called_off = self._submit(self._call_off, incoming, urgent=True)
                if isinstance(error, Exception):
                    await asyncio.wait({asyncio.wrap_future(called_off)})
            raise
        self._unfinished.discard(incoming)
        if metadata.time_expires is not None:
            self._sweep_on()
        return size

    async def get(self, revision: Revision) -> StoredObject | None:
        """Read metadata and payload; the size in the metadata is that of the payload."""
        found = await self._run(_Tree.read, revision.name)
        if found is None or expired(found[0].metadata, self._clock):
            return None
        return StoredObject(found[0].metadata, found[1])

    async def head(self, revision: Revision) -> Metadata | None:
        """Read the metadata only."""
        found = await self._run(_Tree.describe, revision.name)
        return None if found is None or expired(found.metadata, self._clock) else found.metadata

    async def reference(self, revision: Revision) -> PayloadReference | None:
        """Refer to the payload's own file; whoever reads it needs the permission to."""
        found = await self._run(_Tree.describe, revision.name)
        if found is None or expired(found.metadata, self._clock):
            return None
        assert self._tree is not None, "it has just been read from"
        base = self._tree.uri if self._base_uri is None else self._base_uri.rstrip("/")
        path = "/".join(revision_path(revision.name)) + ".payload"
        return PayloadReference(f"{base}/{quote(path)}", found.size, found.crc32c)

    async def delete(self, revision: Revision) -> None:
        """Remove the revision; removing an absent one is a success (GCS-6)."""
        unfinished = [incoming for incoming in self._unfinished.copy() if incoming.name == revision.name]
        await self._run(_delete, revision.name, unfinished)

    async def extend(self, revision: Revision, extended: Metadata) -> None:
        """Record a later expiry; absent and expired revisions are ignored."""
        if await self.head(revision) is not None:
            await self._run(_Tree.describe_again, revision.name, extended)

    async def scan_revisions(self) -> AsyncGenerator[Revision, None]:
        """Yield every revision that has not expired, one folder of :data:`FOLDERS` at a time."""
        for number in range(FOLDERS):
            for name in await self._run(_Tree.names, number, self._clock):
                yield Revision(name)

    async def join(self) -> None:
        """Wait for a running sweep."""
        if self._sweep is not None:
            await asyncio.wait({asyncio.wrap_future(self._sweep)})

    async def close(self) -> None:
        """Finish what has begun and let go of the folder; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        if running := {asyncio.wrap_future(step) for step in self._steps.copy()}:
            _, hanging = await asyncio.wait(running, timeout=CLOSE_SECONDS)
            if hanging:
                log.warning("the storage folder did not close in time", steps=len(hanging))
        self._threads.shutdown(wait=False)
        if self._tree is not None and not self._steps:
            self._tree.close()

    # ------------------------------------------------------------------------------------------------- the inside

    async def _receive(self, incoming: _Incoming, metadata: Metadata, payload: Payload) -> int:
        """Write the payload piece by piece, and finish."""
        if not isinstance(payload, AsyncIterable):
            return await self._run(_finish, incoming, [payload], metadata)
        gathered: list[bytes] = []
        size = 0
        async for chunk in payload:
            gathered.append(chunk)
            size += len(chunk)
            if size >= PIECE_BYTES:
                await self._run(_write, incoming, gathered)
                gathered, size = [], 0
        return await self._run(_finish, incoming, gathered, metadata)

    def _submit(self, step: Callable[[_Tree, *Ts], T], *arguments: *Ts, urgent: bool = False) -> Future[T]:
        """Hand a step to the threads; an *urgent* one is taken even when the queue is full."""
        if self._closed or (len(self._steps) >= STEPS_MAX and not urgent):
            raise BackendUnavailable("filesystem: closed" if self._closed else "filesystem: too many requests wait")
        future = self._threads.submit(lambda: self._in_thread(step, *arguments))
        self._steps.add(future)
        future.add_done_callback(self._steps.discard)
        return future

    async def _run(self, step: Callable[[_Tree, *Ts], T], *arguments: *Ts) -> T:
        if self._sweep_timer is None:
            self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep_regularly)
        future = self._submit(step, *arguments)
        waiter = asyncio.wrap_future(future)
        try:
            await asyncio.wait({waiter})
        except asyncio.CancelledError:
            waiter.add_done_callback(_seen)
            if not future.cancel():
                await asyncio.wait({waiter}, timeout=SETTLE_SECONDS)
            raise
        return waiter.result()

    def _in_thread(self, step: Callable[[_Tree, *Ts], T], *arguments: *Ts) -> T:
        try:
            with self._tree_lock:
                if self._tree is None:
                    self._tree = _Tree(self._path)
            return step(self._tree, *arguments)
        except OSError as error:
            raise translate(error) from error

    def _call_off(self, tree: _Tree, incoming: _Incoming) -> None:
        try:
            incoming.call_off(tree)
        except OSError as error:
            log.warning("temporary files stay until the next start", error=str(translate(error)))
        finally:
            self._unfinished.discard(incoming)

    def _sweep_regularly(self) -> None:
        if not self._closed:
            self._sweep_on()
            self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep_regularly)

    def _sweep_on(self) -> None:
        """Look through the next folder for expired revisions, unless a sweep is running."""
        if self._sweep is None or self._sweep.done():
            self._sweep_folder = (self._sweep_folder + 1) % FOLDERS
            with suppress(BackendUnavailable):  # no time for it now
                self._sweep = self._submit(_sweep, self._sweep_folder, self._clock)


def _nothing(_tree: _Tree) -> None:
    """Do nothing, in a folder that works."""


def _write(tree: _Tree, incoming: _Incoming, chunks: Sequence[bytes]) -> None:
    incoming.write(tree, chunks)


def _finish(tree: _Tree, incoming: _Incoming, chunks: Sequence[bytes], metadata: Metadata) -> int:
    return incoming.finish(tree, chunks, metadata)


def _delete(tree: _Tree, name: str, unfinished: Sequence[_Incoming]) -> None:
    for incoming in unfinished:
        incoming.call_off(tree)
    tree.remove(name)


def _sweep(tree: _Tree, folder: int, clock: Callable[[], datetime]) -> None:
    try:
        tree.remove_expired(folder, clock)
    except (OSError, TierstreamError) as error:
        log.warning("expired revisions could not be removed", error=type(error).__name__)


def _seen(waiter: asyncio.Future[Any]) -> None:
    """Take note of an error nobody asks for any more."""
    if not waiter.cancelled():
        waiter.exception()
