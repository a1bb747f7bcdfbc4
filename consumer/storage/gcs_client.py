"""Google Cloud Storage as tierstream uses it: a blocking client in threads of its own, with our retries and deadlines.

The vendor's client blocks, so each request is a *step* that runs in a thread. No thread ever waits for the event loop,
so steps of one operation can never keep those of another from running: a payload crosses over piece by piece, each
piece whole before its step begins.

**Call** (:meth:`GcsClient.call`)

1. Hand the step to the threads. All busy: it waits in line. The line is full: unavailable.
2. The step sends one request, without the vendor's retries, and waits for each byte at most :data:`READ_SECONDS`.
   * Answered: done.
   * A passing fault (408, 429, 5xx, the network): again from 1 after a jittered wait, :data:`ATTEMPTS` times in all.
   * A permanent fault: raised.
   * No answer within :data:`STEP_SECONDS`: unavailable. A thread cannot be stopped: it goes on, and is not free again
     before it ends.

Cancellation: a step still in line is withdrawn; a running one is waited for, :data:`SETTLE_SECONDS` at most. What it
does after that is known to the :class:`Effect` it was called with, so that whoever undoes it can wait for its end.

Errors are translated here and nowhere else (:func:`translate`). The sources of payload references
(:meth:`GcsClient.open_object`) are read with the same threads, retries and deadlines.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import http.client
import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar, TypeVarTuple

from consumer.errors import BackendError, BackendUnavailable, ConfigError, ReferenceFailure, TierstreamError
from consumer.log import get_logger
from consumer.retry import RetryPolicy
from consumer.storage.backend import CopySource, repeated

try:
    import google.auth
    import requests
    import urllib3
    from google.api_core import exceptions as answers
    from google.auth import exceptions as auth_errors
    from google.auth.credentials import AnonymousCredentials
    from google.auth.transport.requests import AuthorizedSession
    from google.cloud import storage
    from google.cloud.storage.exceptions import InvalidResponse
    from requests.adapters import HTTPAdapter
except ModuleNotFoundError:
    raise ConfigError("storage type gcs needs the extra: pip install tierstream[gcs]") from None

log = get_logger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

ENDPOINT = "https://storage.googleapis.com"
"""The service itself. Given to the client always, so that no variable of the environment leads elsewhere."""

SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
"""What credentials are asked for: objects, but not who may do what with them."""

THREADS = 50
"""Requests at a time: the window of a default process (500 permits x 10 %), so that a full window is not held up. One
costs a connection and, while it runs, a piece of payload."""

THREADS_MAX = 100
"""Most threads: beyond this, Python's one running thread at a time is what requests wait for."""

STEPS_MAX = 2048
"""Steps in line or running: a few for each permit of a default process. Beyond it something is stuck."""

CONNECT_SECONDS = 5.0
"""Longest wait for a connection, and for the network to take the next part of what is sent."""

READ_SECONDS = 15.0
"""Longest silence while an answer is awaited or read; below the 20 s of an operation's attempt (contract 6)."""

STEP_SECONDS = 60.0
"""Longest wait for one step, its place in line included: a piece of 8 MiB at 1.2 Mbit/s."""

SETTLE_SECONDS = 5.0
"""How long a cancelled caller waits for its running step, as with files: most have ended by then, and whoever deletes
what the step writes waits for it anyway."""

CLOSE_SECONDS = 10.0
"""How long closing waits for steps that are running."""

RETRIES = RetryPolicy(attempts=3, initial_seconds=0.2, max_seconds=2.0)
"""As often as the reference (GCS-4: two retries), with jittered waits. Longer outages are the handler's business."""

PIECE_BYTES = 8 * 1024 * 1024
"""Most bytes of one read: a multiple of what the service recommends, and little enough to be repeated whole."""

REFERENCE_PIECE_BYTES = 2 * 1024 * 1024
"""Bytes of one read of a reference: a window of references holds 100 MiB, and a request costs 20 to 50 ms."""

_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
"""Answers below 500 that may be another one next time (GCS-4)."""

_NETWORK = (
    OSError,  # ConnectionError, TimeoutError, and those of requests
    http.client.HTTPException,
    urllib3.exceptions.HTTPError,
)
REQUEST_TIMEOUT = (CONNECT_SECONDS, READ_SECONDS)
"""As the vendor's client takes it."""


NotFound = answers.NotFound
PreconditionFailed = answers.PreconditionFailed
"""Answers of the service that are values to whoever asked."""


class NoAnswer(BackendUnavailable):
    """No answer came: the request has had its effect, may have it later, or never will."""


class StartAnew(BackendUnavailable):
    """This request will not succeed any more; one that begins from the start may."""


class Gone(TierstreamError):
    """The object is not there, or not in this generation; never leaves this package."""


def translate(error: Exception) -> Exception:
    """Return *error* of the vendor's client as one of ours; the text names the fault, never an object.

    What is none of the vendor's errors is a mistake in our own code, and returned as it is.
    """
    if isinstance(error, InvalidResponse):
        status = error.response.status_code
    elif isinstance(error, answers.GoogleAPICallError) and error.code is not None:
        status = int(error.code)
    else:
        return _without_answer(error)
    text = f"gcs: {status} {http.client.responses.get(status, '')}".rstrip()
    damaged = status == HTTPStatus.BAD_REQUEST and "crc32c" in str(error).lower()  # on its way: not so the next time
    return BackendUnavailable(text) if damaged or status in _PASSING or status >= 500 else BackendError(text)


def _without_answer(error: Exception) -> Exception:
    if isinstance(error, auth_errors.InvalidOperation):  # an emulator that is asked without credentials wants some
        return BackendError("gcs: 401 Unauthorized")
    if isinstance(error, auth_errors.DefaultCredentialsError):
        return ConfigError("gcs: no credentials; set GOOGLE_APPLICATION_CREDENTIALS, or storage.long_term.endpoint")
    if isinstance(error, auth_errors.GoogleAuthError):
        text = f"gcs: credentials: {type(error).__name__}"
        passing = error.retryable or isinstance(error, auth_errors.TransportError)
        return BackendUnavailable(text) if passing else BackendError(text)
    if isinstance(error, _NETWORK):
        text = f"gcs: {type(error).__name__}"
        return BackendUnavailable(text) if isinstance(error, requests.ConnectTimeout) else NoAnswer(text)
    return error


def error_of(response: Any) -> Exception:
    """Return the vendor's error for an answer that is none of those expected."""
    error: Exception = answers.from_http_response(response)
    return error


def crc32c_text(crc32c: int) -> str:
    """Return a CRC-32C as the service writes it: base64 of four bytes, highest first."""
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


def crc32c_number(text: str | None) -> int | None:
    """Read a CRC-32C as the service writes it; None where there is none, or it is none."""
    try:
        digest = base64.b64decode(text or "", validate=True)
    except (binascii.Error, ValueError):
        return None
    return int.from_bytes(digest, "big") if len(digest) == 4 else None


@dataclass(frozen=True, slots=True)
class GcsObject:
    """What the service says of one object, in one generation."""

    bucket: str
    name: str
    generation: int
    metageneration: int | None
    size: int
    crc32c: int | None
    """None where the service names none."""
    content_type: str
    content_encoding: str | None
    pairs: Mapping[str, str]

    @classmethod
    def of(cls, handle: storage.Blob) -> GcsObject:
        """Read the vendor's object, as loaded or as an upload left it."""
        return cls(
            bucket=handle.bucket.name,
            name=handle.name,
            generation=int(handle.generation or 0),
            metageneration=handle.metageneration,
            size=int(handle.size or 0),
            crc32c=crc32c_number(handle.crc32c),
            content_type=handle.content_type or "application/octet-stream",
            content_encoding=handle.content_encoding,
            pairs=handle.metadata or {},
        )


@dataclass(frozen=True, slots=True)
class Connection:
    """What a step works with; safe for all threads at once."""

    client: storage.Client
    session: AuthorizedSession

    def handle(self, bucket: str, name: str, generation: int | None = None) -> Any:
        """Return the vendor's handle of an object; asks nothing."""
        return self.client.bucket(bucket).blob(name, generation=generation)


@dataclass(slots=True)
class Effect:
    """What is known of the requests that one write has sent."""

    running: Future[Any] | None = None
    """The step begun last; it may go on though its caller does not."""
    unanswered: bool = False
    """Whether a request got no answer, and may still have its effect when everybody has forgotten it."""


class GcsClient:
    """Sends requests to Google Cloud Storage from threads; what a call guarantees stands at the module.

    Args:
        endpoint: Address of an emulator, which is asked without credentials; None = the service, with the default
            credentials of the environment.
        threads: Requests at a time.

    Raises (all methods): ``BackendUnavailable``, ``BackendError``; ``ConfigError`` where there are no credentials.
    """

    def __init__(self, endpoint: str | None = None, *, threads: int = THREADS) -> None:
        self.endpoint = ENDPOINT if endpoint is None else endpoint.rstrip("/")
        self._anonymous = endpoint is not None
        self._size = min(threads, THREADS_MAX)
        self._threads = ThreadPoolExecutor(self._size, thread_name_prefix="gcs")
        self._steps: set[Future[Any]] = set()
        self._connection: Connection | None = None
        self._connecting = threading.Lock()
        self._closed = False

    # ------------------------------------------------------------------------------------------------- requests

    async def find(self, bucket: str, name: str) -> GcsObject | None:
        """Return what is known of an object; None where there is none."""
        return await self.call(_find, bucket, name)

    async def read(self, found: GcsObject, start: int, end: int) -> bytes:
        """Return the bytes of *found* from *start* up to and excluding *end*, as they are stored (GCS-8).

        Raises:
            Gone: the object is not there any more, not in this generation.
        """
        return await self.call(_read, found, start, end)

    async def open_object(self, bucket: str, name: str) -> GcsSource:
        """Open what a payload reference points to; only its properties are asked for.

        Raises:
            ReferenceFailure: there is no such object, or it is not ours to read (``reference_unreadable``).
        """
        try:
            found = await self.find(bucket, name)
        except BackendError:
            raise _unreadable() from None
        if found is None:
            raise _unreadable()
        return GcsSource(self, found)

    # ------------------------------------------------------------------------------------------------- calls

    async def call(
        self,
        step: Callable[[Connection, *Ts], T],
        *arguments: *Ts,
        effect: Effect | None = None,
        attempts: int = RETRIES.attempts,
    ) -> T:
        """Run *step*, which sends one request, until it is answered for good; *effect* hears of every attempt."""
        failed = 0
        while True:
            try:
                return await self._once(step, arguments, effect)
            except BackendUnavailable as error:
                failed += 1
                if failed >= attempts or isinstance(error, StartAnew) or self._closed:
                    raise
            await asyncio.sleep(RETRIES.backoff(failed, random.random()))  # noqa: S311 - spreads load, hides nothing
            repeated()

    async def _once(self, step: Callable[[Connection, *Ts], T], arguments: tuple[*Ts], effect: Effect | None) -> T:
        if self._closed or len(self._steps) >= STEPS_MAX:
            raise BackendUnavailable("gcs: closed" if self._closed else "gcs: too many requests wait")
        future = self._threads.submit(self._in_thread, step, arguments, effect)
        self._steps.add(future)
        future.add_done_callback(self._steps.discard)
        if effect is not None:
            effect.running = future
        waiter = asyncio.wrap_future(future)
        waiter.add_done_callback(seen)
        try:
            done, _ = await asyncio.wait({waiter}, timeout=STEP_SECONDS)
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.wait({waiter}, timeout=SETTLE_SECONDS)
            raise
        if done:
            return waiter.result()
        if future.cancel():
            raise BackendUnavailable("gcs: too many requests wait")
        if effect is not None:
            effect.unanswered = True
        raise NoAnswer(f"gcs: no answer within {STEP_SECONDS:g} s")

    def _in_thread(self, step: Callable[[Connection, *Ts], T], arguments: tuple[*Ts], effect: Effect | None) -> T:
        try:
            with self._connecting:
                if self._connection is None:
                    self._connection = self._connect()
            return step(self._connection, *arguments)
        except TierstreamError:
            raise
        except Exception as error:
            ours = translate(error)
            if effect is not None and isinstance(ours, NoAnswer):
                effect.unanswered = True
            if ours is error:
                raise
            raise ours from error

    def _connect(self) -> Connection:
        if self._anonymous:
            credentials: Any = AnonymousCredentials()
        else:
            credentials, _ = google.auth.default(scopes=(SCOPE,))
        session = AuthorizedSession(credentials)
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=self._size)
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        options = {"api_endpoint": self.endpoint}
        client = storage.Client(project=None, credentials=credentials, _http=session, client_options=options)
        return Connection(client, session)

    async def close(self) -> None:
        """Wait for what runs and let go of threads and connections; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if running := {asyncio.wrap_future(step) for step in self._steps.copy()}:
            for waiter in running:
                waiter.add_done_callback(seen)
            _, hanging = await asyncio.wait(running, timeout=CLOSE_SECONDS)
            if hanging:
                log.warning("requests to gcs did not end in time", steps=len(hanging))
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._connection is not None:
            self._connection.client.close()


@dataclass(slots=True)
class GcsSource:
    """An object that a payload reference points to, read piece by piece; generation and length are those found."""

    client: GcsClient
    found: GcsObject
    _position: int = field(default=0, init=False)

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.found.size

    @property
    def crc32c(self) -> int | None:
        """CRC-32C of all bytes."""
        return self.found.crc32c

    @property
    def copy_source(self) -> CopySource | None:
        """Where a store of the same service finds the object; None where nobody could tell a copy from another one."""
        found = self.found
        if found.crc32c is None:
            return None
        return CopySource(self.client.endpoint, found.bucket, found.name, found.generation, found.size, found.crc32c)

    async def read(self) -> bytes:
        """Return the next piece, empty at the end."""
        end = min(self._position + REFERENCE_PIECE_BYTES, self.size)
        if end == self._position:
            return b""
        try:
            piece = await self.client.read(self.found, self._position, end)
        except (Gone, BackendError):
            raise _unreadable() from None
        self._position = end
        return piece

    def close(self) -> None:
        """Do nothing: between two pieces nothing is held."""


def _unreadable() -> ReferenceFailure:
    return ReferenceFailure("the reference cannot be read", code="reference_unreadable")


def _find(connection: Connection, bucket: str, name: str) -> GcsObject | None:
    handle = connection.handle(bucket, name)
    try:
        handle.reload(timeout=REQUEST_TIMEOUT, retry=None)
    except NotFound:
        return None
    return GcsObject.of(handle)


def _read(connection: Connection, found: GcsObject, start: int, end: int) -> bytes:
    handle = connection.handle(found.bucket, found.name, found.generation)
    sink = _Sink(end - start)
    try:
        handle.download_to_file(
            sink,
            start=start,
            end=end - 1,
            raw_download=True,
            timeout=REQUEST_TIMEOUT,
            checksum=None,  # of the whole object, not of a piece; compared by whoever has all pieces
            retry=None,
        )
    except NotFound:
        raise Gone("gcs: the object is gone") from None
    return sink.whole()


class _Sink:
    """Takes the bytes of one answer, and no more of them than were asked for."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = bytearray()

    def write(self, chunk: bytes) -> int:
        """Take *chunk*."""
        self._taken += chunk
        if len(self._taken) > self._size:
            raise BackendUnavailable("gcs: an answer was longer than asked for")
        return len(chunk)

    def whole(self) -> bytes:
        """Return all that was asked for."""
        if len(self._taken) < self._size:
            raise BackendUnavailable("gcs: an answer was cut short")
        return bytes(self._taken)


def seen(waiter: asyncio.Future[Any]) -> None:
    """Take note of an error nobody asks for any more."""
    if not waiter.cancelled():
        waiter.exception()
