"""Claim checks: payloads that lie elsewhere and are only pointed to by the record.

**Open**

1. The URI is below an allowed prefix, compared segment by segment after decoding. No: ``reference_denied``. What could
   be read in two ways (``..``, an empty segment, an encoded slash, a host, a query) is below nothing.
2. The size given is within ``object_bytes_max``. No: ``payload_too_large``.
3. Open. For ``file:``, the configured prefix is opened first, then each further segment relative to the one before,
   following no symbolic link, so that nothing a producer may write below the prefix leads out of it.
   * A link, or anything but a regular file: ``reference_denied``.
   * Missing, or not ours to read: ``reference_unreadable``.
   * Out of descriptors, a disk that fails now: ``backend_unavailable``; trying again may help.
4. Size and CRC-32C found are those given (else ``reference_mismatch``), and the size is within the limit (else
   ``payload_too_large``). A file's CRC-32C is not known before it has been read, that of an object in a bucket is.

**Read**: chunks of :data:`CHUNK_BYTES`, in order, once. What was promised is checked as it passes: a byte over the
size or the limit ends the reading at once, a byte short or another CRC-32C ends it after the last chunk. Whoever stores
a payload stores nothing when its iterator raises.

**Not read at all**: a payload that lies in an object store says where (``copy_source``). A store of the same service
copies it, and no byte passes through here; everything that was promised has been checked at 4.

Files are read in threads of our own, so that a disk that hangs holds up references and nothing else.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import stat
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NoReturn, Protocol, Self, TypeAlias, TypeVar
from urllib.parse import unquote_to_bytes

import google_crc32c

from consumer.errors import BackendUnavailable, ConfigError, ReferenceFailure, TierstreamError, TooLarge
from consumer.operations import PayloadReference
from consumer.storage.backend import CopySource

CHUNK_BYTES = 256 * 1024
"""Bytes of one read: large enough that the hop to a thread (about 0.1 ms) is a small part of it, small enough that a
window of references holds little memory."""

THREADS = 4
"""Reads at a time: local disks gain nothing from more, and a hanging mount takes no more than these."""

_PASSING = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}
)
"""Errors of a file that say nothing about the reference: our limits, a mount that is away."""

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)/(.*)", re.DOTALL)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")

T = TypeVar("T")


class Source(Protocol):
    """A payload that has been opened and is read from start to end."""

    @property
    def size(self) -> int | None:
        """Bytes in all, when known before reading."""
        ...

    @property
    def crc32c(self) -> int | None:
        """CRC-32C of all bytes, when known before reading; ``copy_source`` may say where they lie."""
        ...

    async def read(self) -> bytes:
        """Return the next chunk, empty at the end."""
        ...

    def close(self) -> None:
        """Release what is held, at once or in the background; a second call does nothing. Never waits, never raises."""
        ...


Opener: TypeAlias = Callable[[str, str], Awaitable[Source]]
"""Opens what a URI points to, given its authority (a bucket) and the rest of it. Raises as :meth:`References.open`."""


class References:
    """Opens payload references below the allowed prefixes.

    Args:
        allowed_prefixes: ``file:///DIRECTORY/`` and ``SCHEME://AUTHORITY/NAME/``; a missing last slash is added.
            Symbolic links in the prefix itself are followed. None at all denies every reference.
        object_bytes_max: Largest payload in bytes.
        openers: How to open schemes other than ``file``; a scheme without opener is denied.
        threads: Reads of files at a time.

    Raises:
        ConfigError: a prefix cannot be used.
    """

    def __init__(
        self,
        allowed_prefixes: Sequence[str],
        object_bytes_max: int,
        *,
        openers: Mapping[str, Opener] | None = None,
        threads: int = THREADS,
    ) -> None:
        self._object_bytes_max = object_bytes_max
        self._openers = dict(openers or {})
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="references")
        self._directories: list[list[bytes]] = []
        self._prefixes: list[str] = []
        for prefix in allowed_prefixes:
            try:
                scheme, authority, name = _split(prefix if prefix.endswith("/") else prefix + "/")
                if scheme == "file":
                    self._directories.append(_file_segments(authority, name.removesuffix("/")) if name else [])
                else:
                    self._prefixes.append(f"{scheme}://{authority}/{name}")
            except ReferenceFailure as error:
                raise ConfigError(f"an allowed prefix cannot be used: {error}") from None
        self._directories.sort(key=len, reverse=True)  # of nested prefixes, the one that trusts least counts

    async def open(self, reference: PayloadReference) -> CheckedPayload:
        """Return the payload *reference* points to, to be read once and closed with ``aclose``.

        Raises:
            ReferenceFailure: ``reference_denied``, ``reference_unreadable`` or ``reference_mismatch``.
            TooLarge: larger than ``object_bytes_max``.
            BackendUnavailable: it could not be opened now; that says nothing about the reference.

        Cancellation: what has been opened, or is just being opened, is closed.
        """
        scheme, authority, name = _split(reference.uri)
        opening: Callable[[], Awaitable[Source]]
        if scheme == "file":
            opening = partial(self._open_file, _file_segments(authority, name))
        else:
            opener = self._openers.get(scheme)
            if opener is None or not name or not f"{scheme}://{authority}/{name}".startswith(tuple(self._prefixes)):
                raise _denied("the reference is outside the allowed prefixes")
            opening = partial(opener, authority, name)
        if reference.size is not None and reference.size > self._object_bytes_max:
            raise self._too_large()
        source = await opening()
        if source.size is not None:
            failure: TierstreamError | None = None
            if reference.size not in {None, source.size}:
                failure = _mismatch("size")
            elif source.crc32c is not None and reference.crc32c not in {None, source.crc32c}:
                failure = _mismatch("crc32c")
            elif source.size > self._object_bytes_max:
                failure = self._too_large()
            if failure is not None:
                source.close()
                raise failure
        return CheckedPayload(source, reference, self._object_bytes_max)

    async def close(self) -> None:
        """Wait for the reads that run and end the threads; no call may follow."""
        await asyncio.to_thread(self._threads.shutdown)

    async def _open_file(self, segments: list[bytes]) -> Source:
        for directory in self._directories:
            if len(segments) > len(directory) and segments[: len(directory)] == directory:
                file = _File(self._threads, b"/" + b"/".join(directory), segments[len(directory) :])
                try:
                    await file.open()
                except BaseException:
                    file.close()
                    raise
                return file
        raise _denied("the reference is outside the allowed prefixes")

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the payload has more than {self._object_bytes_max} bytes")


class CheckedPayload:
    """The chunks of a referenced payload, checked against what the reference says of it; read once.

    Raises (while read):
        ReferenceFailure: ``reference_mismatch``, or ``reference_unreadable`` where reading fails.
        TooLarge: more bytes than ``object_bytes_max``; only a payload that grows while it is read gets there.
        BackendUnavailable: reading failed for now, or what came is not what lies there.
    """

    def __init__(self, source: Source, reference: PayloadReference, bytes_max: int) -> None:
        self._source = source
        self._reference = reference
        self._bytes_max = bytes_max
        self._bytes_left = bytes_max if reference.size is None else reference.size
        self._crc32c = 0
        self._begun = self._ended = False

    @property
    def copy_source(self) -> CopySource | None:
        """Where the payload lies in an object store, as long as nothing of it has been read."""
        found = getattr(self._source, "copy_source", None)
        return found if isinstance(found, CopySource) and not self._begun else None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Return the next chunk; never an empty one."""
        if self._ended:
            raise StopAsyncIteration
        self._begun = True
        try:
            chunk = await self._source.read()
            self._check(chunk)
        except BaseException:
            self._end()
            raise
        if chunk:
            return chunk
        self._end()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the reading. Does not wait: a read that runs in a thread ends by itself, then its file is closed."""
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._source.close()

    def _check(self, chunk: bytes) -> None:
        size, crc32c = self._reference.size, self._reference.crc32c
        self._bytes_left -= len(chunk)
        if self._bytes_left < 0:
            if size is None:
                raise TooLarge(f"the payload has more than {self._bytes_max} bytes")
            raise _mismatch("size")
        if crc32c is not None or self._source.crc32c is not None:
            self._crc32c = google_crc32c.extend(self._crc32c, chunk)
        if not chunk:
            if size is not None and self._bytes_left:
                raise _mismatch("size")
            if self._source.crc32c not in {None, self._crc32c}:
                raise BackendUnavailable("the payload was damaged on its way")
            if crc32c not in {None, self._crc32c}:
                raise _mismatch("crc32c")


class _File:
    """A regular file below a directory, opened and read in threads; closed in one too, after the read that runs."""

    def __init__(self, threads: ThreadPoolExecutor, directory: bytes, below: list[bytes]) -> None:
        self.size: int | None = None
        self.crc32c: int | None = None
        self._threads = threads
        self._directory = directory
        self._below = below
        self._descriptor: int | None = None
        self._closed = False
        self._busy = threading.Lock()
        """Held while the descriptor is made, read or closed: a number closed too early may be somebody else's file."""

    async def open(self) -> None:
        """Open the file and learn its size."""
        await self._in_thread(self._open)

    async def read(self) -> bytes:
        """Return the next chunk, empty at the end."""
        return await self._in_thread(self._read)

    def close(self) -> None:
        """Close the file in the background."""
        if not self._closed:
            self._closed = True
            try:
                self._threads.submit(self._close)
            except RuntimeError:  # the threads have ended, and so has every read
                self._close()

    async def _in_thread(self, step: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, step)
        except OSError as error:
            if error.errno in _PASSING:
                raise BackendUnavailable("the reference cannot be read now") from error
            if error.errno == errno.ELOOP:
                raise _denied("the reference leads through a symbolic link") from error
            raise ReferenceFailure("the reference cannot be read", code="reference_unreadable") from error

    def _open(self) -> None:
        with self._busy:
            if self._closed:
                return
            descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for segment in self._below[:-1]:
                    descriptor = _step(descriptor, segment, os.O_DIRECTORY)
                # Without O_NONBLOCK, opening a pipe would wait for its writer.
                descriptor = _step(descriptor, self._below[-1], os.O_NONBLOCK)
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    _deny("the reference is not a regular file")
            except BaseException:
                os.close(descriptor)
                raise
            self.size = found.st_size
            self._descriptor = descriptor

    def _read(self) -> bytes:
        with self._busy:
            return b"" if self._descriptor is None else os.read(self._descriptor, CHUNK_BYTES)

    def _close(self) -> None:
        with self._busy:
            descriptor, self._descriptor = self._descriptor, None
            if descriptor is not None:
                os.close(descriptor)


def _step(directory: int, segment: bytes, flag: int) -> int:
    """Open *segment* of *directory*, no link, and close *directory*; on error it stays open.

    Raises:
        OSError: ``ELOOP`` for a link, also where the kernel calls it no directory.
    """
    try:
        opened = os.open(segment, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flag, dir_fd=directory)
    except NotADirectoryError:
        if stat.S_ISLNK(os.stat(segment, dir_fd=directory, follow_symlinks=False).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
        raise
    os.close(directory)
    return opened


def _split(uri: str) -> tuple[str, str, str]:
    """Return scheme, authority and the rest after the first slash."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise _denied("a reference is file:///PATH or gs://BUCKET/NAME")
    return match[1].lower(), match[2], match[3]


def _file_segments(authority: str, path: str) -> list[bytes]:
    """Return the decoded segments of a file URI's path; each names one directory entry and nothing else."""
    if authority.lower() not in {"", "localhost"}:
        raise _denied("a file reference names no host")
    if "?" in path or "#" in path or _BAD_ESCAPE.search(path):
        raise _denied("the path of a file reference is percent-encoded and nothing follows it")
    try:
        segments = [unquote_to_bytes(segment) for segment in path.split("/")]
    except UnicodeEncodeError:
        raise _denied("a reference is valid Unicode") from None
    if any(segment in {b"", b".", b".."} or b"/" in segment or b"\0" in segment for segment in segments):
        raise _denied("the path of a file reference has no empty, dot or slash segments")
    return segments


def _denied(text: str) -> ReferenceFailure:
    return ReferenceFailure(text, code="reference_denied")


def _deny(text: str) -> NoReturn:
    raise _denied(text)


def _mismatch(what: str) -> ReferenceFailure:
    return ReferenceFailure(f"the payload's {what} is not the one given", code="reference_mismatch")
