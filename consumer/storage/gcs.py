"""The long-term tier in a Google Cloud Storage bucket: one immutable object per revision.

An object's name is the configured prefix and the revision's name. Its pairs (``x-sn-…``, ``x-snme-…``) hold the
metadata, content type and content encoding have their own fields, and its custom time is when it expires, so that the
bucket's lifecycle rule deletes it (GCS-1; ``tierstream storage init`` prints the rule).

**Put**

1. Gather the payload, up to :data:`GATHER_BYTES` and the chunk that crosses it. Error of the iterator: raised, nothing
   has been sent.
2. *It ended before that*: one request with metadata, payload and CRC-32C, on the condition that there is no such
   object. *It goes on*: begin a resumable upload on the same condition, send piece by piece, each as soon as it is
   whole, the last one with the CRC-32C of all. Nothing can be seen before the last.
   * Passing fault: again. A piece whose answer was lost is asked about first, and goes on from what has arrived.
   * The iterator raises, or the put is cancelled: the upload is called off, the error passes on unchanged.
3. There is such an object already (412): a former attempt of our own, if size and CRC-32C are those of the payload, and
   a success. Else ``BackendError``: a revision's name is never used for two payloads.
4. Size and CRC-32C in the answer are those sent. No: the object is removed again; unavailable.

*The payload lies in the same store already* (:class:`CopySource`): instead of 1 and 2 the service copies it, on the
conditions that there is no such object and that the source is still the same generation. No byte passes through here.

**Get** asks for the object's properties, then reads that generation in pieces, each repeated on its own, and compares
size and CRC-32C. Expired is absent, whether or not the lifecycle rule has been there (GCS-2).

**Delete** calls off unfinished puts of the revision in this process and waits for the request each has running. A
request that got no answer may still be on its way, and would find the name free again: then the object is not deleted
but *replaced*, by an empty one that has expired, and left to the lifecycle rule. So nothing appears after a delete.

**Scan** lists below the prefix, a page a request.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from io import BytesIO
from typing import Any, Protocol, Self

import google_crc32c

from consumer.errors import BackendError, BackendUnavailable, ConfigError, InvalidMetadata, ReferenceFailure
from consumer.log import get_logger
from consumer.operations import Metadata, PayloadReference, StoredObject
from consumer.storage.backend import CopySource, Payload, Revision, copy_source
from consumer.storage.gcs_client import (
    CONNECT_SECONDS,
    PIECE_BYTES,
    REQUEST_TIMEOUT,
    STEP_SECONDS,
    THREADS,
    Connection,
    Effect,
    GcsClient,
    GcsObject,
    Gone,
    NotFound,
    PreconditionFailed,
    StartAnew,
    crc32c_number,
    crc32c_text,
    error_of,
    seen,
)
from consumer.storage.metadata import decode_pairs, encode_pairs, expired, now_utc

log = get_logger(__name__)

GATHER_BYTES = 2 * 1024 * 1024
"""How much of a stream is gathered for one request: a window of 50 streams holds 100 MiB, twice that while they all
send. A multiple of the 256 KiB that the service wants all pieces but the last one to be."""

WHOLE_BYTES = 8 * 1024 * 1024
"""Largest payload, given whole, that is sent in one request: what fits a record by default; the vendor's own limit."""

NAME_BYTES_MAX = 1024
"""Longest object name in UTF-8 bytes."""

PAIRS_BYTES_MAX = 8192
"""Most bytes of all pairs of an object. The 7 KiB that custom metadata may have fit, with 400 bytes to spare."""

UNANSWERED_SECONDS = 3600.0
"""How long a request without answer may still be on its way, as far as a delete is concerned: far beyond what any
network or queue keeps."""

UNANSWERED_MAX = 100_000
"""Most revisions remembered for that; the oldest is forgotten first. 30 MiB, after hours of outage."""

_DELETED = "gcs: the revision was deleted while it was written"

_COPY_TIMEOUT = (CONNECT_SECONDS, 45.0)
"""A copy between locations answers with its progress after about 30 s."""

SCAN_OBJECTS = 1000
"""Objects of one page: the most the service gives."""


class GcsSettings(Protocol):
    """The tier's section of the settings."""

    bucket: str
    endpoint: str | None
    prefix: str


@dataclass(frozen=True, slots=True)
class _Target:
    """The object a put makes: its name, and everything about it but the payload."""

    bucket: str
    name: str
    metadata: Metadata
    pairs: dict[str, str]

    def handle(self, connection: Connection) -> Any:
        """Return the vendor's handle of it, with what an upload sends beside the payload."""
        handle = connection.handle(self.bucket, self.name)
        handle.content_type = self.metadata.content_type
        if self.pairs:
            handle.metadata = self.pairs
        if self.metadata.compression:
            handle.content_encoding = self.metadata.compression
        if self.metadata.time_expires is not None:
            handle.custom_time = self.metadata.time_expires
        return handle


class GcsBackend:
    """The long-term tier in a bucket; what each method guarantees stands at its protocol.

    Args:
        bucket: The bucket, which exists.
        endpoint: Address of an emulator, asked without credentials; None = the service, with the default credentials
            of the environment.
        prefix: What all object names begin with; nothing but this backend may write below it.
        threads: Requests at a time; as many as operations run at a time, up to a limit.
        clock: Tells the time by which revisions expire.

    Raises (all methods): ``BackendUnavailable``, ``BackendError``; ``ConfigError`` where there are no credentials or
    no bucket. Cancellation: as :mod:`consumer.storage.gcs_client` says.
    """

    repeats_requests = True

    def __init__(
        self,
        bucket: str,
        *,
        endpoint: str | None = None,
        prefix: str = "",
        threads: int = THREADS,
        clock: Callable[[], datetime] = now_utc,
    ) -> None:
        self.gcs = GcsClient(endpoint, threads=threads)
        """Also opens payload references, with the same threads."""
        self._bucket = bucket
        self._prefix = prefix
        self._clock = clock
        self._uploads: set[_Upload] = set()
        self._unanswered: dict[str, float] = {}
        self._background: set[asyncio.Task[None]] = set()

    @classmethod
    def from_settings(cls, settings: GcsSettings, *, threads: int | None = None) -> Self:
        """Make the tier from its section of the settings."""
        sized = THREADS if threads is None else threads
        return cls(settings.bucket, endpoint=settings.endpoint, prefix=settings.prefix, threads=sized)

    async def open(self) -> None:
        """Ask for the bucket now, so that a wrong one is noticed at start. Optional; needs the right to list."""
        try:
            await self.gcs.call(_list, self._bucket, self._prefix, 1, None)
        except Gone:
            raise ConfigError(f"gcs: there is no bucket {self._bucket}") from None

    async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
        """Store the payload under a name of its own; a failing iterator leaves nothing."""
        upload = _Upload(self.gcs, self._target(revision, metadata))  # what may not be stored is refused here
        self._uploads.add(upload)
        try:
            source = copy_source(payload)
            if source is not None and source.store == self.gcs.endpoint:
                return await upload.copy(source)
            return await upload.receive(payload)
        finally:
            if upload.abandoned:
                self._in_background(upload.call_off())
            if upload.effect.running is None:
                self._settled(upload)
            else:  # also where it has ended: called at once then, else when its thread is done
                upload.effect.running.add_done_callback(lambda _step: self._settled(upload))

    async def get(self, revision: Revision) -> StoredObject | None:
        """Read metadata and payload; both are of one generation, the payload is as it was sent (GCS-8)."""
        found = await self._find(revision)
        if found is None:
            return None
        for _ in range(2):  # a payload damaged on its way is not damaged again
            try:
                payload = await self._read(found)
            except Gone:
                return None
            if found.crc32c in {None, google_crc32c.value(payload)}:
                return StoredObject(_metadata(found), payload)
        raise BackendError("gcs: a payload does not match its checksum")

    async def head(self, revision: Revision) -> Metadata | None:
        """Read the metadata only."""
        found = await self._find(revision)
        return None if found is None else _metadata(found)

    async def reference(self, revision: Revision) -> PayloadReference | None:
        """Return where the object lies: ``gs://BUCKET/NAME``, the name as it is; None where there is none."""
        found = await self._find(revision)
        if found is None:
            return None
        return PayloadReference(f"gs://{found.bucket}/{found.name}", found.size, found.crc32c)

    async def delete(self, revision: Revision) -> None:
        """Remove the revision; removing an absent one is a success (GCS-6)."""
        name = self._name(revision)
        uploads = [upload for upload in self._uploads.copy() if upload.name == name]
        running = set()
        for upload in uploads:
            upload.called_off = True
            if upload.effect.running is not None and not upload.effect.running.cancel():
                running.add(asyncio.wrap_future(upload.effect.running))
        if running:
            for waiter in running:
                waiter.add_done_callback(seen)
            _, hanging = await asyncio.wait(running, timeout=STEP_SECONDS)
            if hanging:
                raise BackendUnavailable("gcs: the revision is still being written")
        if name in self._unanswered or any(upload.effect.unanswered for upload in uploads):
            await self.gcs.call(_replace, self._bucket, name, self._clock())
        else:
            await self.gcs.call(_remove, self._bucket, name, None)

    async def extend(self, revision: Revision, extended: Metadata) -> None:
        """Record a later expiry (GCS-3); absent and expired revisions, and an earlier expiry, are ignored."""
        found = await self._find(revision)
        if found is None or extended.time_expires is None:
            return
        now = _metadata(found).time_expires
        if now is not None and now < extended.time_expires:
            await self.gcs.call(_extend, found, extended)

    async def scan_revisions(self) -> AsyncGenerator[Revision, None]:
        """Yield every revision that has not expired, in pages of :data:`SCAN_OBJECTS`."""
        token: str | None = None
        while True:
            try:
                page, token = await self.gcs.call(_list, self._bucket, self._prefix, SCAN_OBJECTS, token)
            except Gone:
                raise BackendError("gcs: there is no such bucket") from None
            for found in page:
                if not self._has_expired(found):
                    yield Revision(found.name.removeprefix(self._prefix))
            if token is None:
                return

    async def join(self) -> None:
        """Wait until what was called off has been."""
        if self._background:
            await asyncio.wait(self._background)

    async def close(self) -> None:
        """Finish what has begun and let go of threads and connections; a second call does nothing."""
        await self.join()
        await self.gcs.close()

    # ------------------------------------------------------------------------------------------------- the inside

    def _name(self, revision: Revision) -> str:
        name = self._prefix + revision.name
        if not 0 < len(name.encode()) <= NAME_BYTES_MAX or name in {".", ".."}:
            raise BackendError("gcs: a revision's name is no name of an object")
        return name

    def _target(self, revision: Revision, metadata: Metadata) -> _Target:
        pairs = encode_pairs(metadata)
        if sum(len(name.encode()) + len(text.encode()) for name, text in pairs.items()) > PAIRS_BYTES_MAX:
            raise InvalidMetadata(f"a large object has at most {PAIRS_BYTES_MAX} bytes of metadata, file name included")
        return _Target(self._bucket, self._name(revision), metadata, pairs)

    def _has_expired(self, found: GcsObject) -> bool:
        """Tell whether an object has expired; one that cannot be read has not, as far as anybody can tell."""
        try:
            return expired(_metadata(found), self._clock)
        except BackendError:
            return False

    async def _find(self, revision: Revision) -> GcsObject | None:
        found = await self.gcs.find(self._bucket, self._name(revision))
        return None if found is None or expired(_metadata(found), self._clock) else found

    async def _read(self, found: GcsObject) -> bytes:
        whole = BytesIO()  # gives its bytes away without another copy of them
        for start in range(0, found.size, PIECE_BYTES):
            whole.write(await self.gcs.read(found, start, min(start + PIECE_BYTES, found.size)))
        return whole.getvalue()

    def _settled(self, upload: _Upload) -> None:
        """No request of *upload* is running any more. Called from any thread."""
        if upload.effect.unanswered:
            now = time.monotonic()
            for name, forgotten in list(self._unanswered.items()):
                if forgotten > now and len(self._unanswered) < UNANSWERED_MAX:
                    break
                self._unanswered.pop(name, None)
            self._unanswered[upload.name] = now + UNANSWERED_SECONDS
        self._uploads.discard(upload)

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work, name="gcs: call off an upload")
        self._background.add(task)
        task.add_done_callback(self._background.discard)


@dataclass(eq=False, slots=True)
class _Upload:
    """One put. Its methods run on the event loop; what they send, one request at a time, in threads."""

    gcs: GcsClient
    target: _Target
    effect: Effect = field(default_factory=Effect)
    called_off: bool = False
    """Set by a delete: no further request is begun."""
    _session: str | None = field(default=None, init=False)
    """Address of the resumable upload, while there is one unfinished."""
    _sent: int = field(default=0, init=False)
    _crc32c: int = field(default=0, init=False)
    _there: bool = field(default=False, init=False)
    """There is an object of that name already; the payload is read only to be compared with it."""

    @property
    def name(self) -> str:
        """The object's name."""
        return self.target.name

    @property
    def abandoned(self) -> bool:
        """Whether the service keeps pieces of an upload that nobody will finish."""
        return self._session is not None

    async def receive(self, payload: Payload) -> int:
        """Store what the payload gives; return its size."""
        if not isinstance(payload, AsyncIterable):
            return await self._send_whole(bytes(payload))
        gathered = bytearray()
        async for chunk in payload:
            gathered += chunk
            while len(gathered) > GATHER_BYTES:  # so that something is left for the last request
                piece = bytes(memoryview(gathered)[:GATHER_BYTES])
                del gathered[:GATHER_BYTES]
                await self._send_piece(piece, last=False)
        return await self._finish(bytes(gathered))

    async def copy(self, source: CopySource) -> int:
        """Have the service copy what lies there already; return its size."""
        token: str | None = None
        while True:
            done, token = await self._call(_copy, self.target, source, token)
            if done:
                return source.size

    async def call_off(self) -> None:
        """Give up what has been sent of an unfinished upload. Best effort: the service forgets it after a week."""
        try:
            await self.gcs.call(_cancel, self._session or "", attempts=1)
        except Exception as error:  # noqa: BLE001 - nothing depends on it, and nobody is there to be told
            log.debug("an upload is left to expire", error=f"{type(error).__name__}: {error}")

    async def _send_whole(self, payload: bytes) -> int:
        if len(payload) <= WHOLE_BYTES:
            return await self._finish(payload)
        view = memoryview(payload)
        last = (len(payload) - 1) // WHOLE_BYTES * WHOLE_BYTES
        for start in range(0, last, WHOLE_BYTES):
            await self._send_piece(bytes(view[start : start + WHOLE_BYTES]), last=False)
        return await self._finish(bytes(view[last:]))

    async def _finish(self, rest: bytes) -> int:
        if self._sent:
            await self._send_piece(rest, last=True)
        else:
            self._crc32c = google_crc32c.value(rest)
            await self._call(_insert, self.target, rest, self._crc32c)
            self._sent = len(rest)
        return self._sent

    async def _send_piece(self, data: bytes, *, last: bool) -> None:
        """Send one piece of a resumable upload, the first of which begins it."""
        if not self._sent:
            self._session = await self._call(_begin, self.target)
            self._there = self._session is None
        start = self._sent
        self._sent += len(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)
        if self._there:
            if last:
                await self._call(_compare, self.target, self._sent, self._crc32c)
            return
        assert self._session is not None
        piece = _Piece(self._session, self.target, data, start, self._sent if last else None, self._crc32c)
        await self._call(piece.send)
        if last:
            self._session = None

    async def _call(self, step: Callable[..., Any], *arguments: Any) -> Any:
        if self.called_off:
            raise StartAnew(_DELETED)
        return await self.gcs.call(step, *arguments, effect=self.effect)


@dataclass(slots=True)
class _Piece:
    """One piece of a resumable upload: a step that may be repeated until the piece has arrived."""

    session: str
    target: _Target
    data: bytes
    start: int
    """Bytes of the upload before this piece, all of which have arrived."""
    total: int | None
    """Bytes of the whole upload, for its last piece."""
    crc32c: int
    """Of everything up to the end of this piece."""
    arrived: int = 0
    """Bytes of this piece that have arrived."""
    doubtful: bool = False
    """Whether a request was sent whose answer has not been seen."""

    def send(self, connection: Connection) -> None:
        """Send what has not arrived; return when all of it has, and with the last piece, when the object is there.

        Raises:
            StartAnew: the service has given up the upload, or lost what it had confirmed.
        """
        if self.doubtful and self._answered(connection, self._put(connection, b"")):
            return
        while True:
            before = self.arrived
            self.doubtful = True
            ended = self._answered(connection, self._put(connection, self.data[self.arrived :]))
            self.doubtful = False
            if ended:
                return
            if self.arrived == before:
                raise BackendUnavailable("gcs: an upload does not get on")

    def _put(self, connection: Connection, rest: bytes) -> Any:
        """Send *rest*; nothing at all asks what has arrived, and ends the upload where that is the known total."""
        first = self.start + self.arrived
        extent = f"{first}-{first + len(rest) - 1}" if rest else "*"
        headers = {"Content-Range": f"bytes {extent}/{'*' if self.total is None else self.total}"}
        if self.total is not None:
            headers["X-Goog-Hash"] = f"crc32c={crc32c_text(self.crc32c)}"
        return connection.session.request("PUT", self.session, data=rest, headers=headers, timeout=REQUEST_TIMEOUT)

    def _answered(self, connection: Connection, response: Any) -> bool:
        """Take note of an answer; tell whether nothing is left to send."""
        match response.status_code:
            case HTTPStatus.OK | HTTPStatus.CREATED if self.total is not None:
                said = response.json()
                generation, size, crc32c = int(said["generation"]), int(said["size"]), crc32c_number(said.get("crc32c"))
                if (size, crc32c) != (self.total, self.crc32c):
                    _remove(connection, self.target.bucket, self.target.name, generation)
                    raise StartAnew("gcs: what arrived is not what was sent")
                return True
            case HTTPStatus.PERMANENT_REDIRECT:  # here: "resume incomplete"
                last = re.fullmatch(r"bytes=0-(\d+)", response.headers.get("Range", ""))
                arrived = (int(last[1]) + 1 if last is not None else 0) - self.start
                if not self.arrived <= arrived <= len(self.data):
                    raise StartAnew("gcs: the service lost a part of an upload")
                self.arrived = arrived
                return self.total is None and arrived == len(self.data)
            case HTTPStatus.PRECONDITION_FAILED | HTTPStatus.NOT_FOUND | HTTPStatus.GONE:
                if self.total is None:
                    raise StartAnew("gcs: the service has given up an upload")
                _compare(connection, self.target, self.total, self.crc32c)
                return True
        raise error_of(response)


# ----------------------------------------------------------------------------------------------------------- steps


def _insert(connection: Connection, target: _Target, data: bytes, crc32c: int) -> None:
    """Make the object in one request, if there is none."""
    handle = target.handle(connection)
    handle.crc32c = crc32c_text(crc32c)  # the service compares, and refuses what was damaged on its way
    try:
        handle.upload_from_file(
            BytesIO(data),
            size=len(data),
            content_type=target.metadata.content_type,
            if_generation_match=0,
            checksum=None,
            timeout=REQUEST_TIMEOUT,
            retry=None,
        )
    except PreconditionFailed:
        _compare(connection, target, len(data), crc32c)
        return
    made = GcsObject.of(handle)
    if (made.size, made.crc32c) != (len(data), crc32c):
        _remove(connection, target.bucket, target.name, made.generation)
        raise BackendUnavailable("gcs: what arrived is not what was sent")


def _begin(connection: Connection, target: _Target) -> str | None:
    """Begin a resumable upload and return its address; None where there is such an object."""
    try:
        address: str = target.handle(connection).create_resumable_upload_session(
            content_type=target.metadata.content_type,
            if_generation_match=0,
            checksum=None,
            timeout=REQUEST_TIMEOUT,
            retry=None,
        )
    except PreconditionFailed:
        return None
    return address


def _cancel(connection: Connection, session: str) -> None:
    connection.session.request("DELETE", session, timeout=REQUEST_TIMEOUT)


def _compare(connection: Connection, target: _Target, size: int, crc32c: int) -> None:
    """Accept the object that is there already, if it is the one that was to be made.

    Raises:
        StartAnew: it has been deleted in between; what :func:`_replace` leaves in its place says so too.
        BackendError: it is another one.
    """
    handle = connection.handle(target.bucket, target.name)
    try:
        handle.reload(timeout=REQUEST_TIMEOUT, retry=None)
    except NotFound:
        raise StartAnew(_DELETED) from None
    found = GcsObject.of(handle)
    if (found.size, found.crc32c) != (size, crc32c):
        if found.size == 0:
            raise StartAnew(_DELETED)
        raise BackendError("gcs: the revision is there already, with another payload")


def _copy(connection: Connection, target: _Target, source: CopySource, token: str | None) -> tuple[bool, str | None]:
    """Have the service copy *source*, or the next part of it; return whether all is done, else the token to go on."""
    handle = target.handle(connection)
    try:
        token, _, _ = handle.rewrite(
            connection.handle(source.bucket, source.name, source.generation),
            token=token,
            if_generation_match=0,
            if_source_generation_match=source.generation,
            timeout=_COPY_TIMEOUT,
            retry=None,
        )
    except NotFound:
        raise ReferenceFailure("the reference cannot be read", code="reference_unreadable") from None
    except PreconditionFailed:  # the object is there, or the source has changed
        _compare(connection, target, source.size, source.crc32c)
        return True, None
    if token is not None:
        return False, token
    made = GcsObject.of(handle)
    if (made.size, made.crc32c) != (source.size, source.crc32c):
        _remove(connection, target.bucket, target.name, made.generation)
        raise StartAnew("gcs: a copy is not what was copied")
    return True, None


def _remove(connection: Connection, bucket: str, name: str, generation: int | None) -> None:
    with suppress(NotFound):
        connection.handle(bucket, name, generation).delete(timeout=REQUEST_TIMEOUT, retry=None)


def _replace(connection: Connection, bucket: str, name: str, now: datetime) -> None:
    """Put an empty object that has expired where one is to be gone, so that the name is not free."""
    handle = _Target(bucket, name, *_expired_since(now)).handle(connection)
    handle.upload_from_file(BytesIO(b""), size=0, checksum=None, timeout=REQUEST_TIMEOUT, retry=None)


def _expired_since(now: datetime) -> tuple[Metadata, dict[str, str]]:
    metadata = Metadata(time_expires=now)
    return metadata, encode_pairs(metadata)


def _extend(connection: Connection, found: GcsObject, extended: Metadata) -> None:
    """Set a later expiry, on the condition that nothing has been changed since *found*."""
    handle = connection.handle(found.bucket, found.name)
    handle.custom_time = extended.time_expires
    handle.metadata = encode_pairs(extended)
    # Deleted, or extended by somebody else: the next read tries again if it has to.
    with suppress(NotFound, PreconditionFailed):
        handle.patch(
            if_generation_match=found.generation,
            if_metageneration_match=found.metageneration,
            timeout=REQUEST_TIMEOUT,
            retry=None,
        )


def _list(
    connection: Connection, bucket: str, prefix: str, objects_max: int, token: str | None
) -> tuple[list[GcsObject], str | None]:
    """Return one page of what is there, and the token of the next one.

    Raises:
        Gone: there is no such bucket.
    """
    found = connection.client.list_blobs(
        bucket,
        prefix=prefix or None,
        page_size=objects_max,
        page_token=token,
        fields="items(name,generation,size,crc32c,contentType,contentEncoding,metadata),nextPageToken",
        timeout=REQUEST_TIMEOUT,
        retry=None,
    )
    try:
        page = next(found.pages, ())
    except NotFound:
        raise Gone("gcs: there is no such bucket") from None
    return [GcsObject.of(handle) for handle in page], found.next_page_token


def _metadata(found: GcsObject) -> Metadata:
    return decode_pairs(
        found.pairs, content_type=found.content_type, compression=found.content_encoding, size=found.size
    )
