"""One operation, applied to storage: checked, executed, answered.

1. **Check.** Metadata of an insert, the object id (context, key, path length), the size of an inline payload. A rule
   that is broken is ``InvalidMetadata``, ``InvalidOperation`` or ``TooLarge``, and storage is never reached.
2. **Execute** with the one storage call that belongs to the kind: insert → put, get → get, head → head,
   delete → delete (EXE-18). An insert without a key has been given a random one (:func:`with_key`, OP-12); a payload
   given by reference is opened first.
3. **Answer.** A missing object is a success with nothing in it (OP-8). A failure is raised.
4. **Too late.** An attempt that runs into its time limit is cancelled and *waited for*: only when it has really ended
   it counts as failed, with ``OperationTimeout``; if it ends with a response after all, that is the answer. A
   stream arms the limit when an operation first suspends, so one that does not suspend has no timer.
5. **Again**, with a retry policy only, and only where the error says it is retriable: after a jittered wait, with the
   same key and a payload that is opened anew. Attempts used up: ``answer`` raises the last error; ``block`` goes on for
   ever at the longest wait, and says so to ``on_blocked`` until no operation is blocked any more.

Whoever applies an operation keeps its permit, and its turn among the operations on that object, until it has ended
here: nothing that was started goes on afterwards, as far as storage keeps that promise (:class:`Storage`).

:func:`failure_of` is the one place that turns whatever an operation raised into the error of its outcome, and logs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from dataclasses import replace
from typing import Any, Protocol, cast
from uuid import uuid4

from consumer.errors import (
    InvalidOperation,
    OperationDropped,
    OperationPanic,
    OperationTimeout,
    ReferenceFailure,
    TierstreamError,
    TooLarge,
)
from consumer.ids import ObjectId
from consumer.log import get_logger
from consumer.operations import (
    Delete,
    Deleted,
    Get,
    Got,
    Head,
    Headed,
    Insert,
    Inserted,
    Kind,
    Metadata,
    Operation,
    OpResponse,
    PayloadReference,
    Position,
    StoredObject,
)
from consumer.retry import RetryPolicy
from consumer.storage.backend import Payload

log = get_logger(__name__)


class Storage(Protocol):
    """What an operation needs of storage; ``join`` is optional and not asked for here.

    Cancellation (all methods): the call ends when its work has ended, so that nothing of it can take effect after a
    later call on the same object.
    """

    async def put(self, object_id: ObjectId, metadata: Metadata, payload: Payload, /) -> Metadata:
        """Store an object and return its metadata as stamped."""
        ...

    async def get(self, object_id: ObjectId, /) -> StoredObject | None:
        """Read an object, None where there is none."""
        ...

    async def head(self, object_id: ObjectId, /) -> Metadata | None:
        """Read an object's metadata, None where there is none."""
        ...

    async def delete(self, object_id: ObjectId, /) -> None:
        """Remove an object; a missing one is a success."""
        ...


class FencedStorage(Protocol):
    """What operations that have a position need besides: storage that refuses to go back in time (contract 5)."""

    async def put(
        self, object_id: ObjectId, metadata: Metadata, payload: Payload, position: Position, /
    ) -> Metadata:
        """Store an object, unless a later write of the same source has come; the answer is the same."""
        ...

    async def delete(self, object_id: ObjectId, position: Position, /) -> None:
        """Remove an object, unless a later write of the same source has come."""
        ...


class References(Protocol):
    """Opens claim checks: payloads that lie elsewhere."""

    async def open(self, reference: PayloadReference) -> Payload:
        """Return the payload *reference* points to; chunks are read once, in order, and checked while read.

        An iterator with an ``aclose`` method is closed by the caller.

        Raises:
            ReferenceFailure: outside the allowed prefixes, missing, or not of the size or checksum given.
            TooLarge: larger than an object may be.
        """
        ...


class Progress:
    """How one operation fares; written here, read by whoever wants to know why it takes so long."""

    __slots__ = ("attempts", "blocked", "cancelling", "deadline", "expired", "last_error", "task")

    task: asyncio.Task[Any]
    """What the present attempt runs in; this and what follows only where attempts have a time limit."""
    cancelling: int
    """Cancellations of the task that others had asked for before the attempt began."""
    deadline: float
    """When its limit runs out, monotonic seconds."""
    expired: bool
    """True once it has."""

    index: int | None = None
    """Its index, where it has one: the record's offset."""

    def __init__(self) -> None:
        self.attempts = 1
        """Attempts begun, the present one included."""
        self.last_error: TierstreamError | None = None
        """How the latest attempt that failed did so."""
        self.blocked = False
        """True while the attempts are used up and storage counts as unavailable."""


class Handler:
    """Applies operations to one storage.

    Args:
        storage: Where objects are; for operations that have a position a :class:`FencedStorage` too.
        references: Opens payload references; None refuses them all.
        retry: None makes a single attempt, without a time limit.
        on_blocked: Called with True when the first operation has used up its attempts and goes on trying, with False
            when none does any more. Must not raise.
        object_bytes_max: Largest payload of an insert, in bytes; None = no limit. What is opened by *references* is
            theirs to limit.
        sleep: Waits a number of seconds.
        jitter: Draws evenly from 0 to 1.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        references: References | None = None,
        retry: RetryPolicy | None = None,
        on_blocked: Callable[[bool], None] | None = None,
        object_bytes_max: int | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.blocked = 0
        """Operations now that have used up their attempts and go on trying."""
        self._storage = storage
        self._references = references
        self._retry = retry
        seconds = None if retry is None else retry.attempt_timeout_seconds
        self._limits = None if seconds is None else _TimeLimits(seconds)
        self._on_blocked = on_blocked
        self._object_bytes_max = object_bytes_max
        self._sleep = sleep
        self._jitter = jitter

    async def apply(self, operation: Operation, progress: Progress | None = None) -> OpResponse:
        """Check and execute *operation* with all its attempts; *progress* hears how they fare.

        Raises:
            InvalidMetadata, InvalidOperation, TooLarge: a rule is broken; storage was not reached.
            ReferenceFailure: the payload reference cannot be used.
            OperationTimeout: the last attempt took too long; the effect is unknown.
            Exception: whatever storage raised; the effect of that is storage's to describe.

        Cancellation: reaches storage, whose contract says what that leaves behind; no further attempt is made.
        """
        operation = with_key(operation)
        return await self.finish(operation, self.attempt(operation), Progress() if progress is None else progress)

    async def attempt(self, operation: Operation) -> OpResponse:
        """Check and execute *operation*, which has a key, once and without a time limit.

        Raises:
            Exception: as :meth:`apply`.

        Cancellation: as :meth:`apply`.
        """
        if isinstance(operation, Insert):
            operation.metadata.validate()
            object_id = ObjectId(operation.context, operation.key or "")
            payload = operation.payload
            if isinstance(payload, bytes):
                if self._object_bytes_max is not None and len(payload) > self._object_bytes_max:
                    raise TooLarge(f"an object has at most {self._object_bytes_max} bytes")
                return Inserted(object_id, await self._put(object_id, operation.metadata, payload, operation.position))
            return Inserted(
                object_id,
                await self._put_by_reference(object_id, operation.metadata, payload, operation.position),
            )
        if isinstance(operation, Get):
            object_id = ObjectId(operation.context, operation.key)
            return Got(object_id.key, await self._storage.get(object_id))
        if isinstance(operation, Delete):
            object_id = ObjectId(operation.context, operation.key)
            if operation.position is None:
                await self._storage.delete(object_id)
            else:
                await cast("FencedStorage", self._storage).delete(object_id, operation.position)
            return Deleted(object_id.key)
        if isinstance(operation, Head):
            object_id = ObjectId(operation.context, operation.key)
            return Headed(object_id.key, await self._storage.head(object_id))
        raise not_an_operation(operation)

    async def finish(self, operation: Operation, attempt: Awaitable[OpResponse], progress: Progress) -> OpResponse:
        """Wait for *attempt*, the first one at *operation*, for as long as it may take; try again where that helps.

        Raises:
            Exception: as :meth:`apply`.

        Cancellation: as :meth:`apply`.
        """
        try:
            return await self._in_time(attempt, progress)
        except TierstreamError as error:
            if not self.tries_again(error):
                raise
            failed = error
        return await self.again(operation, failed, progress)

    @types.coroutine
    def resume(
        self,
        operation: Operation,
        attempt: Coroutine[Any, Any, OpResponse],
        awaited: Any,
        progress: Progress,
        task: asyncio.Task[Any],
    ) -> Generator[Any, Any, OpResponse]:
        """Finish the first *attempt* at *operation*, whose first step was made by hand and ended waiting for *awaited*.

        As :meth:`finish` of the rest of it, in one piece: nearly every operation that waits for anything comes through
        here, and each coroutine between the task and storage is paid for twice, when it is made and when it goes on.

        Args:
            operation: What is attempted.
            attempt: As :meth:`attempt` gave it, and as it stands now.
            awaited: What it waits for.
            progress: Hears of further attempts.
            task: The current task.

        Raises:
            Exception: as :meth:`apply`.

        Cancellation: as :meth:`apply`.
        """
        limits = self._limits
        if limits is not None:
            limits.begin(progress, task)
        failed: BaseException
        try:
            response = yield from _resumed(attempt, awaited)
        except BaseException as error:
            failed = error if limits is None else limits.end_with(progress, error)
            if not self.tries_again(failed):
                if failed is error:
                    raise
                raise failed from error
        else:
            if limits is not None:
                limits.end(progress)
            return response
        return (yield from self.again(operation, cast("TierstreamError", failed), progress).__await__())

    def tries_again(self, error: BaseException) -> bool:
        """Tell whether an attempt that raised *error* is followed by another one."""
        return self._retry is not None and isinstance(error, TierstreamError) and error.retriable

    async def again(self, operation: Operation, failed: TierstreamError, progress: Progress) -> OpResponse:
        """Make the attempts after the first one, which *failed* with an error that is retriable.

        Raises:
            Exception: as :meth:`apply`.

        Cancellation: as :meth:`apply`.
        """
        retry = self._retry
        if retry is None:
            raise failed
        with contextlib.ExitStack() as unblock:
            while True:
                progress.last_error = failed
                if progress.attempts == retry.attempts:
                    if retry.exhausted == "answer":
                        raise failed
                    unblock.enter_context(self._blocking(operation, failed, progress))
                await self._sleep(retry.backoff(progress.attempts, self._jitter()))
                progress.attempts += 1
                try:
                    return await self._in_time(self.attempt(operation), progress)
                except TierstreamError as error:
                    if not error.retriable:
                        raise
                    failed = error

    async def _in_time(self, attempt: Awaitable[OpResponse], progress: Progress) -> OpResponse:
        """Wait for *attempt*; past the time limit cancel it and wait until it has ended."""
        limits = self._limits
        if limits is None:
            return await attempt
        task = asyncio.current_task()
        assert task is not None
        limits.begin(progress, task)
        try:
            response = await attempt
        except BaseException as error:
            failed = limits.end_with(progress, error)
            if failed is error:
                raise
            raise failed from error
        limits.end(progress)
        return response

    def _put(
        self, object_id: ObjectId, metadata: Metadata, payload: Payload, position: Position | None
    ) -> Awaitable[Metadata]:
        """Put; storage hears of a position only where there is one, as it need not know of any."""
        if position is None:
            return self._storage.put(object_id, metadata, payload)
        return cast("FencedStorage", self._storage).put(object_id, metadata, payload, position)

    async def _put_by_reference(
        self, object_id: ObjectId, metadata: Metadata, reference: object, position: Position | None
    ) -> Metadata:
        if not isinstance(reference, PayloadReference):
            raise InvalidOperation("a payload is bytes or a reference")
        if self._references is None:
            raise ReferenceFailure("payload references are not allowed", code="reference_denied")
        payload = await self._references.open(reference)
        try:
            return await self._put(object_id, metadata, payload, position)
        finally:
            aclose = getattr(payload, "aclose", None)
            if aclose is not None:
                await aclose()

    @contextlib.contextmanager
    def _blocking(self, operation: Operation, failed: TierstreamError, progress: Progress) -> Iterator[None]:
        """Count an operation that goes on trying for ever, as long as it does."""
        self.blocked += 1
        progress.blocked = True
        if self.blocked == 1:
            where = {} if progress.index is None else {"offset": progress.index}
            log.warning(
                "storage unavailable, trying on", **where, kind=operation.kind, code=failed.code, error=str(failed)
            )
            if self._on_blocked is not None:
                self._on_blocked(True)
        try:
            yield
        finally:
            self.blocked -= 1
            progress.blocked = False
            if self.blocked == 0:
                log.warning("no operation waits for storage any more")
                if self._on_blocked is not None:
                    self._on_blocked(False)


@types.coroutine
def _resumed(
    attempt: Coroutine[Any, Any, OpResponse], awaited: Any
) -> Generator[Any, Any, OpResponse]:
    """Go on with an attempt whose latest step was made by hand and ended waiting for *awaited*."""
    while True:
        try:
            yield awaited
        except GeneratorExit:
            attempt.close()
            raise
        except BaseException as thrown:  # noqa: BLE001 - as `yield from` does: it is the coroutine's to handle
            try:
                awaited = attempt.throw(thrown)  # handled, and then waiting for something else
            except StopIteration as done:
                response: OpResponse = done.value
                return response
        else:
            return (yield from cast("Generator[Any, Any, OpResponse]", attempt))


class _TimeLimits:
    """Time limits of one length for any number of attempts, kept with a single timer.

    As they are all of the same length they run out in the order in which they began; so there is only the oldest to be
    waited for. A timer for each (``asyncio.timeout``) costs more than all the rest of an operation's way through here.
    What running out means is the same: the task is cancelled, and that cancellation is taken back at the end. An
    operation has one attempt at a time, so what is kept of its limit lies in its :class:`Progress`.

    Args:
        seconds: Their length.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._running: dict[Progress, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, progress: Progress, task: asyncio.Task[Any]) -> None:
        """Begin the limit of one attempt, made in *task*, which is the current one."""
        progress.task = task
        progress.cancelling = task.cancelling()
        progress.deadline = time.monotonic() + self.seconds
        progress.expired = False
        self._running[progress] = None
        if self._timer is None:
            self._timer = task.get_loop().call_later(self.seconds, self._expire, task.get_loop())

    def end(self, progress: Progress) -> bool:
        """End it; True where it ran out, and nobody else has cancelled the task."""
        self._running.pop(progress, None)
        if not self._running and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return progress.expired and progress.task.uncancel() <= progress.cancelling

    def end_with(self, progress: Progress, error: BaseException) -> BaseException:
        """End it after an attempt that raised *error*; return what that was: the limit's own error, or *error*."""
        if self.end(progress) and isinstance(error, asyncio.CancelledError):
            timeout = OperationTimeout(f"no answer from storage within {self.seconds:g} seconds")
            timeout.__cause__ = error
            return timeout
        return error

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = time.monotonic()
        while self._running:
            oldest = next(iter(self._running))
            if oldest.deadline > now:
                self._timer = loop.call_later(oldest.deadline - now, self._expire, loop)
                return
            del self._running[oldest]
            oldest.expired = True
            oldest.task.cancel()


def with_key(operation: Operation) -> Operation:
    """Return *operation*, with a random UUIDv4 as its key where it is an insert that has none (OP-12).

    Done once, before the first attempt: later ones must write the same object.
    """
    if isinstance(operation, Insert) and operation.key is None:
        return replace(operation, key=str(uuid4()))
    return operation


def not_an_operation(thing: object) -> InvalidOperation:
    """Return the error for *thing* found where an operation belongs."""
    return InvalidOperation(f"not an operation: {type(thing).__name__}")


def failure_of(kind: Kind, error: BaseException) -> TierstreamError:
    """Return the error of the outcome of an operation that raised *error*, and log it once (ERR-4).

    * One of ours passes as itself.
    * A cancellation, wherever it came from: ``OperationDropped``; the effect is unknown (EXE-13).
    * Anything else, ``BaseException`` included: ``OperationPanic`` (EXE-11).

    ``KeyboardInterrupt`` and ``SystemExit`` are no outcome; callers let them pass.
    """
    failure: TierstreamError
    if isinstance(error, TierstreamError):
        failure = error
    elif isinstance(error, asyncio.CancelledError):
        failure = OperationDropped("cancelled before it ended")
        failure.__cause__ = error
    else:
        failure = OperationPanic.from_exception(error)
    trace = {"exc_info": error} if isinstance(failure, OperationPanic) else {}  # a defect: where it is has to be told
    log.log(failure.log_level, "operation failed", kind=kind, code=failure.code, error=str(failure), **trace)
    return failure
