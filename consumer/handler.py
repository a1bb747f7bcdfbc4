"""One operation, applied to storage: checked, executed, answered.

1. **Check.** Metadata of an insert, the object id (context, key, path length). A rule that is broken is
   ``InvalidMetadata`` or ``InvalidOperation``, and storage is never reached.
2. **Execute** with the one storage call that belongs to the kind: insert → put, get → get, head → head,
   delete → delete (EXE-18). An insert without a key gets a random one (OP-12); a payload given by reference is opened
   first.
3. **Answer.** A missing object is a success with nothing in it (OP-8). A failure is raised.
4. **Again**, with a retry policy only, and only where the error says it is retriable: after a jittered wait, with the
   same key and a payload that is opened anew. Attempts used up: ``answer`` raises the last error; ``block`` goes on for
   ever at the longest wait, and says so to ``on_blocked`` until no operation is blocked any more.

Whoever applies an operation keeps its permit, and its turn among the operations on that object, until ``apply`` has
returned: nothing that was started here goes on afterwards.

:func:`failure_of` is the one place that turns whatever an operation raised into the error of its outcome, and logs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Protocol
from uuid import uuid4

from consumer.errors import InvalidOperation, OperationDropped, OperationPanic, ReferenceFailure, TierstreamError
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
    StoredObject,
)
from consumer.retry import RetryPolicy
from consumer.storage.backend import Payload

log = get_logger(__name__)


class Storage(Protocol):
    """What an operation needs of storage; ``join`` is optional and not asked for here."""

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


class References(Protocol):
    """Opens claim checks: payloads that lie elsewhere."""

    async def open(self, reference: PayloadReference) -> Payload:
        """Return the payload *reference* points to; chunks are read once, in order, and checked while read.

        An iterator with an ``aclose`` method is closed by the caller.

        Raises:
            ReferenceFailure: outside the allowed prefixes, missing, or not of the size or checksum given.
        """
        ...


class Progress(Protocol):
    """Where a retried operation tells how it fares; read by whoever wants to know why it takes so long."""

    attempts: int
    """Attempts made so far that failed."""
    last_error: TierstreamError | None
    """How the latest of them failed."""
    blocked: bool
    """True while attempts are used up and storage counts as unavailable."""


class Handler:
    """Applies operations to one storage.

    Args:
        storage: Where objects are.
        references: Opens payload references; None refuses them all.
        retry: None makes a single attempt.
        on_blocked: Called with True when the first operation has used up its attempts and goes on trying, with False
            when none does any more. Must not raise.
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
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.started: dict[Kind, int] = {"insert": 0, "get": 0, "delete": 0, "head": 0}
        """Operations ever started, by kind; attempts of one operation count once (MET-1)."""
        self.blocked = 0
        """Operations now that have used up their attempts and go on trying."""
        self._storage = storage
        self._references = references
        self._retry = retry
        self._on_blocked = on_blocked
        self._sleep = sleep
        self._jitter = jitter
        self._once = self if retry is None else Handler(storage, references=references)

    async def apply(self, operation: Operation, progress: Progress | None = None) -> OpResponse:
        """Check and execute *operation*; *progress* hears of failed attempts.

        Raises:
            InvalidMetadata, InvalidOperation: a rule is broken; storage was not reached.
            ReferenceFailure: the payload reference cannot be used.
            Exception: whatever storage raised; the effect of that is storage's to describe.

        Cancellation: reaches storage, whose contract says what that leaves behind; no further attempt is made.
        """
        object_id: ObjectId | None = None
        try:
            match operation:
                case Insert():
                    self.started["insert"] += 1
                    operation.metadata.validate()
                    key = operation.key
                    object_id = ObjectId(operation.context, str(uuid4()) if key is None else key)
                    payload = operation.payload
                    if isinstance(payload, bytes):
                        return Inserted(object_id, await self._storage.put(object_id, operation.metadata, payload))
                    return Inserted(object_id, await self._put_by_reference(object_id, operation.metadata, payload))
                case Get():
                    self.started["get"] += 1
                    object_id = ObjectId(operation.context, operation.key)
                    return Got(object_id.key, await self._storage.get(object_id))
                case Delete():
                    self.started["delete"] += 1
                    object_id = ObjectId(operation.context, operation.key)
                    await self._storage.delete(object_id)
                    return Deleted(object_id.key)
                case Head():
                    self.started["head"] += 1
                    object_id = ObjectId(operation.context, operation.key)
                    return Headed(object_id.key, await self._storage.head(object_id))
            raise not_an_operation(operation)
        except TierstreamError as error:
            if self._retry is None or object_id is None or not error.retriable:
                raise
            failed = error
        if isinstance(operation, Insert):
            operation = replace(operation, key=object_id.key)
        return await self._again(operation, failed, self._retry, progress)

    async def _put_by_reference(self, object_id: ObjectId, metadata: Metadata, reference: object) -> Metadata:
        if not isinstance(reference, PayloadReference):
            raise InvalidOperation("a payload is bytes or a reference")
        if self._references is None:
            raise ReferenceFailure("payload references are not allowed", code="reference_denied")
        payload = await self._references.open(reference)
        try:
            return await self._storage.put(object_id, metadata, payload)
        finally:
            aclose = getattr(payload, "aclose", None)
            if aclose is not None:
                await aclose()

    async def _again(
        self, operation: Operation, failed: TierstreamError, retry: RetryPolicy, progress: Progress | None
    ) -> OpResponse:
        """Make the attempts after the first one, which *failed*."""
        attempts = 0
        with contextlib.ExitStack() as unblock:
            while True:
                attempts += 1
                if progress is not None:
                    progress.attempts = attempts
                    progress.last_error = failed
                if attempts == retry.attempts:
                    if retry.exhausted == "answer":
                        raise failed
                    unblock.enter_context(self._blocking(operation, failed, progress))
                await self._sleep(retry.backoff(attempts, self._jitter()))
                try:
                    return await self._once.apply(operation)
                except TierstreamError as error:
                    if not error.retriable:
                        raise
                    failed = error

    @contextlib.contextmanager
    def _blocking(self, operation: Operation, failed: TierstreamError, progress: Progress | None) -> Iterator[None]:
        """Count an operation that goes on trying for ever, as long as it does."""
        self.blocked += 1
        if progress is not None:
            progress.blocked = True
        if self.blocked == 1:
            log.warning("storage unavailable, trying on", kind=operation.kind, code=failed.code, error=str(failed))
            if self._on_blocked is not None:
                self._on_blocked(True)
        try:
            yield
        finally:
            self.blocked -= 1
            if progress is not None:
                progress.blocked = False
            if self.blocked == 0:
                log.warning("no operation waits for storage any more")
                if self._on_blocked is not None:
                    self._on_blocked(False)


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
    log.log(failure.log_level, "operation failed", kind=kind, code=failure.code, error=str(failure))
    return failure
