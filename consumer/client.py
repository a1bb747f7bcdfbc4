"""A client for Python services: put an operation in, await its response.

1. :meth:`TierstreamClient.start` finds the end of the response topic and reads on from there, in a task of its own.
2. A call encodes its operation with a ``request_id`` that no other call has, and produces it with the object's path as
   record key, so that operations on one object stay in order. It counts as *pending* from before it is produced. Within
   a span of OpenTelemetry the record carries its context, so that the service's spans continue the caller's trace.
3. The reader decodes each response; the pending call with its ``request_id`` gets it. Responses of other clients belong
   to nobody here, and so do repeats (a service that was killed answers again what it had not committed): both are
   dropped.
4. A failure response is raised as the error of its code, as the Python API of the service itself would.
5. No response within the deadline is :class:`~consumer.errors.OperationTimeout`: the operation may have taken effect,
   or may still. Operations are idempotent: calling again is right.

The reader ends only where responses cannot be read at all; then every pending call, and every later one, raises why.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from copy import copy
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, Self, TypeVar
from uuid import uuid4

from consumer.avro_schemas import response_schema
from consumer.codec import decode_response, encode_operation
from consumer.config import Config
from consumer.errors import (
    BackendError,
    BackendUnavailable,
    DecodeError,
    InvalidMetadata,
    InvalidOperation,
    OperationDropped,
    OperationPanic,
    OperationTimeout,
    ReferenceFailure,
    TierstreamError,
    TooLarge,
    UnexpectedTombstone,
    UsecaseDenied,
)
from consumer.ids import ObjectContext, ObjectId
from consumer.kafka.exchange import Exchange
from consumer.kafka.tools import Outgoing, Record
from consumer.log import get_logger
from consumer.operations import (
    DEFAULT_METADATA,
    Delete,
    Deleted,
    Get,
    Got,
    Head,
    Headed,
    Insert,
    Inserted,
    Metadata,
    Operation,
    OpResponse,
    PayloadReference,
    StoredObject,
    TimeToIdle,
    TimeToLive,
)

TIMEOUT_SECONDS = 30.0
"""Longest wait for one response unless told otherwise: above ``retry.attempt_timeout`` (20 s), so that a service which
gives up an attempt still has time to say so."""

PENDING_MAX = 1_000
"""Calls under way at a time; more wait for their turn, within their deadline."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_FAILURES: Mapping[str, type[TierstreamError]] = {
    "decode_error": DecodeError,
    "unknown_schema": DecodeError,
    "unsafe_schema": DecodeError,
    "null_value": DecodeError,
    "invalid_operation": InvalidOperation,
    "invalid_metadata": InvalidMetadata,
    "usecase_denied": UsecaseDenied,
    "reference_denied": ReferenceFailure,
    "reference_unreadable": ReferenceFailure,
    "reference_mismatch": ReferenceFailure,
    "payload_too_large": TooLarge,
    "response_too_large": TooLarge,
    "panic": OperationPanic,
    "dropped": OperationDropped,
    "unexpected_tombstone": UnexpectedTombstone,
    "backend_error": BackendError,
    "backend_unavailable": BackendUnavailable,
    "timeout": OperationTimeout,
}
"""What is raised for each code of a failure response."""

_Response = TypeVar("_Response", Inserted, Got, Deleted, Headed)

log = get_logger(__name__)


class Channel(Protocol):
    """Where operations go and responses come from; an :class:`~consumer.kafka.exchange.Exchange` is one."""

    async def start(self) -> None:
        """Connect; what is received begins here."""

    async def send(self, record: Outgoing) -> None:
        """Write one record; return when it is acknowledged."""

    def received(self) -> AsyncIterator[Record]:
        """Yield what is received, for ever."""
        ...

    async def stop(self) -> None:
        """Disconnect."""


class TierstreamClient:
    """Operations as calls. An async context manager; safe for any number of tasks of one event loop.

    Args:
        bootstrap: Brokers, ``HOST:PORT`` with commas; or a whole configuration, for TLS, SASL and other topics.
        operations: Input topic of the service; None = the configuration's first.
        responses: Its output topic; None = the configuration's. New partitions of it are seen by clients started later.
        timeout: Seconds that a call waits for its response, its turn and its delivery included.
        channel: Replaces Kafka, in tests.

    Responses have to be written ``bare`` (the default) or in a single-object frame.
    """

    def __init__(
        self,
        bootstrap: str | Config,
        *,
        operations: str | None = None,
        responses: str | None = None,
        timeout: float = TIMEOUT_SECONDS,
        channel: Channel | None = None,
    ) -> None:
        config = bootstrap
        if isinstance(config, str):
            config = Config.model_validate({"kafka": {"bootstrap_servers": config}})
        self._channel = channel or Exchange(
            config, operations or config.input.topics[0], responses or config.output.topic
        )
        self._timeout = timeout
        self._turn = asyncio.Semaphore(PENDING_MAX)
        self._pending: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._failure: TierstreamError | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Connect.

        Raises:
            TierstreamError: no broker answers, or a topic does not exist; nothing is left connected.
        """
        await asyncio.to_thread(response_schema)  # from its file; cached from now on
        try:
            await self._channel.start()
        except BaseException:
            await self._channel.stop()
            raise
        self._reader = asyncio.create_task(self._read(), name="read responses")

    async def stop(self) -> None:
        """Disconnect; calls under way raise ``OperationDropped``. May be called again."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.wait([reader])
        self._fail(OperationDropped("the client was stopped; the operation may still take effect"))
        await self._channel.stop()

    # ------------------------------------------------------------------------------------------ operations

    async def insert(
        self,
        context: ObjectContext,
        key: str | None,
        payload: bytes | PayloadReference,
        metadata: Metadata = DEFAULT_METADATA,
    ) -> Inserted:
        """Store an object; without a key the service makes one, which the answer tells.

        Raises:
            TierstreamError: what the failure response says; ``OperationTimeout`` where none came in time.
        """
        return await self._call(Insert(context, key, metadata, payload), Inserted)

    async def get(self, context: ObjectContext, key: str) -> StoredObject | None:
        """Read an object, None where there is none.

        Raises:
            TierstreamError: as :meth:`insert`.
        """
        return (await self._call(Get(context, key), Got)).object

    async def head(self, context: ObjectContext, key: str) -> Metadata | None:
        """Read an object's metadata, None where there is no object.

        Raises:
            TierstreamError: as :meth:`insert`.
        """
        return (await self._call(Head(context, key), Headed)).metadata

    async def delete(self, context: ObjectContext, key: str) -> None:
        """Remove an object; one that is not there is a success.

        Raises:
            TierstreamError: as :meth:`insert`.
        """
        await self._call(Delete(context, key), Deleted)

    async def _call(self, operation: Operation, kind: type[_Response]) -> _Response:
        request_id = uuid4().hex
        path = None if operation.key is None else ObjectId(operation.context, operation.key).storage_path
        value = encode_operation(operation, request_id)
        record = Outgoing(value, None if path is None else path.encode(), headers=trace_headers())
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._timeout), self._turn:
                if self._failure is not None:
                    raise copy(self._failure) from self._failure
                if self._reader is None:
                    raise RuntimeError("start the client first")
                self._pending[request_id] = answer
                await self._channel.send(record)
                fields = await answer
        except TimeoutError:
            raise OperationTimeout(
                f"no response within {self._timeout:g} s; the operation may have taken effect, or may still"
            ) from None
        finally:
            self._pending.pop(request_id, None)
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # seen, also where the delivery failed first
        response = response_of(operation.context, fields)
        assert isinstance(response, kind), "the service answers each kind with its own"
        return response

    # ------------------------------------------------------------------------------------------ responses

    async def _read(self) -> None:
        try:
            async for record in self._channel.received():
                self._hand_over(record)
        except Exception as error:
            failure = error if isinstance(error, TierstreamError) else OperationPanic.from_exception(error)
            self._failure = failure
            self._fail(failure)
            log.exception("responses cannot be read")

    def _hand_over(self, record: Record) -> None:
        try:
            fields = decode_response(record.value or b"")
        except DecodeError as error:
            log.warning("not a response", partition=record.partition, offset=record.offset, error=str(error))
            return
        answer = self._pending.get(fields["request_id"])
        if answer is not None and not answer.done():
            answer.set_result(fields)

    def _fail(self, error: TierstreamError) -> None:
        for answer in self._pending.values():
            if not answer.done():
                # One for each: with every raise an exception keeps the frames it came through, and their payloads.
                answer.set_exception(copy(error))


def trace_headers() -> list[tuple[str, bytes | None]]:
    """Return the headers by which the current span goes on in the service; none where there is no span.

    Whoever has a span has loaded OpenTelemetry; so where it is not loaded, it is not looked for.
    """
    if "opentelemetry.trace" not in sys.modules:
        return []
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - only where its user has it
        TraceContextTextMapPropagator,
    )

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return [(name, value.encode()) for name, value in carrier.items()]


def response_of(context: ObjectContext, fields: Mapping[str, Any]) -> OpResponse:
    """Turn the fields of a response to an operation in *context* into the value that the Python API has for it.

    Raises:
        TierstreamError: it is a failure; the class is that of its code.
    """
    key, result = fields["key"], fields["result"]
    match result["type"]:
        case "Inserted":
            return Inserted(ObjectId(context, key), _metadata(result["metadata"]))
        case "Got":
            found = result["object"]
            return Got(key, None if found is None else StoredObject(_metadata(found["metadata"]), _payload(found)))
        case "Headed":
            found = result["metadata"]
            return Headed(key, None if found is None else _metadata(found))
        case "Deleted":
            return Deleted(key)
        case _:
            code = result["code"]
            raise _FAILURES.get(code, TierstreamError)(result["message"], code=code)


def _payload(stored: Mapping[str, Any]) -> bytes | PayloadReference:
    payload = stored["payload"]
    if isinstance(payload, bytes):
        return payload
    return PayloadReference(payload["uri"], payload["size"], payload["crc32c"])


def _metadata(fields: Mapping[str, Any]) -> Metadata:
    expiration = fields["expiration"]
    if expiration is not None:
        policy = TimeToLive if expiration["policy"] == "ttl" else TimeToIdle
        expiration = policy(expiration["seconds"])
    return Metadata(
        content_type=fields["content_type"],
        expiration=expiration,
        compression=fields["compression"],
        filename=fields["filename"],
        origin=fields["origin"],
        custom=fields["custom"],
        time_created=_moment(fields["time_created"]),
        time_expires=_moment(fields["time_expires"]),
        size=fields["size"],
    )


def _moment(micros: int | None) -> datetime | None:
    return None if micros is None else _EPOCH + timedelta(microseconds=micros)
