"""Traces: what happens to a record, from its producer's span to its response, as OpenTelemetry spans.

::

    (the producer's span, by the record's headers ``traceparent`` and ``tracestate``)
    └─ process TOPIC          consumer   from the record being decoded to its response being handed in
       ├─ insert              internal   one for each attempt
       │  ├─ high_volume head_tiered     client     one for each request to a tier, or to the change log
       │  └─ …
       └─ send RESPONSES      producer   until the broker has acknowledged; ``traceparent`` of the response is this one

* Attributes follow the semantic conventions for messaging. No key, no payload, no text of an exception: errors are
  given by their code, or by the name of their class.
* A record without a usable ``traceparent`` begins a trace of its own. What is not sampled is still passed on.
* Clean-up that outlives its operation belongs to its trace as well.
* Spans wait for their exporter in a bounded queue (``OTEL_BSP_MAX_QUEUE_SIZE``); what finds it full is dropped, and the
  record does not wait.

How it costs nothing where it is off: nothing of the pipeline asks whether it is on. What is traced is made otherwise
when the service is put together: another class of assignment, another class of handler, another front of each tier.
This module is not even imported without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from importlib import metadata
from typing import Any, Final, TypeVar, cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import PROCESS_PID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from consumer.assignment import Assignment, Lane, Outcome, Owner, Pipeline, Record
from consumer.errors import TierstreamError
from consumer.executor import Item
from consumer.handler import Handler, with_key
from consumer.metrics import record_labels
from consumer.operations import Operation, OpResponse
from consumer.responses import Header, response_partition

CONTEXT_HEADERS: Final = frozenset({"traceparent", "tracestate"})
"""What carries a span from one record to the next (W3C Trace Context)."""

NOT_REQUESTS: Final = frozenset({"close", "join", "open", "owner"})
"""What is no request to a backend, and no span."""

_Backend = TypeVar("_Backend")
_propagator: Final = TraceContextTextMapPropagator()


def exporting_provider() -> TracerProvider:
    """Return a source of tracers whose spans go where the ``OTEL_…`` variables say, over OTLP and HTTP."""
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "tierstream"}))
    # Of several processes under one supervisor all else is the same, whatever the environment says.
    resource = resource.merge(Resource({SERVICE_VERSION: metadata.version("tierstream"), PROCESS_PID: os.getpid()}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # the service stops it, with a deadline
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class Tracing:
    """Makes the traced parts of one service process.

    Args:
        provider: Makes tracers, and is stopped with this.
        group_id: The consumer group.
    """

    def __init__(self, provider: TracerProvider, group_id: str) -> None:
        self.tracer = provider.get_tracer("tierstream")
        self.group_id = group_id
        self.operations: dict[int, TracedRecord] = {}
        """The record of each operation on its way, by the identity of the operation, which the record keeps alive."""
        self._provider = provider

    def handler(self) -> Callable[..., Handler]:
        """Return what makes a handler whose attempts are spans."""
        return partial(TracedHandler, self)

    def tier(self, backend: _Backend, name: str) -> _Backend:
        """Return *backend* with each request to it a span, where it is made for a traced record."""
        return cast("_Backend", _TracedTier(self.tracer, backend, name))

    def assignment(self, output_topic: str, output_partitions: int) -> Callable[..., Assignment]:
        """Return what makes an assignment whose records are spans."""
        return partial(TracedAssignment, self, output_topic, output_partitions)

    def stop(self) -> None:
        """Send what waits, and send nothing more. Blocks; for up to 30 s where nobody takes it."""
        self._provider.shutdown()


class TracedRecord:
    """The spans of one record."""

    __slots__ = ("attempts", "error", "operation", "processing", "sending")

    def __init__(self, processing: Span, operation: Operation | None) -> None:
        self.processing = processing
        self.operation = operation
        """Held, so that no other one can have its identity."""
        self.attempts = 0
        self.error: BaseException | None = None
        self.sending: Span | None = None


def extracted(headers: Sequence[Header]) -> Context:
    """Return the context that the headers of a record carry; an empty one where they carry none, or more than one."""
    carrier: dict[str, str] = {}
    for name, value in headers:
        if name in CONTEXT_HEADERS:
            if name in carrier and name == "traceparent":
                return Context()
            carrier[name] = (value or b"").decode("ascii", "replace")
    return _propagator.extract(carrier, Context())


def injected(headers: Sequence[Header], span: Span) -> list[Header]:
    """Return *headers* with the context of *span* in the place of any they had."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span, Context()))
    kept = [header for header in headers if header[0] not in CONTEXT_HEADERS]
    return [*kept, *((name, value.encode()) for name, value in carrier.items())]


def fail(span: Span, error: BaseException) -> None:
    """Say on *span* that it ended with *error*: by code or class, as texts may hold what must not leave."""
    code = error.code if isinstance(error, TierstreamError) else type(error).__qualname__
    span.set_attribute("error.type", code)
    span.set_status(StatusCode.ERROR, code)
    cause = error.__cause__ or error
    span.add_event("exception", {"exception.type": f"{type(cause).__module__}.{type(cause).__qualname__}"})


class TracedAssignment(Assignment):
    """An assignment that has a span for each of its records; all else is as it was."""

    def __init__(
        self,
        tracing: Tracing,
        output_topic: str,
        output_partitions: int,
        pipeline: Pipeline,
        topic: str,
        partition: int,
        **given: Any,
    ) -> None:
        self._tracing = tracing
        self._records: dict[int, TracedRecord] = {}
        """By offset: those decoded and not yet acknowledged, which the window and the byte budget bound."""
        super().__init__(pipeline, topic, partition, **given)
        self._processing_attributes: Mapping[str, Any] = {
            "messaging.system": "kafka",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": topic,
            "messaging.destination.partition.id": str(partition),
            "messaging.consumer.group.name": tracing.group_id,
        }
        self._sending_attributes: Mapping[str, Any] = {
            "messaging.system": "kafka",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": output_topic,
            "messaging.destination.partition.id": str(response_partition(partition, output_partitions)),
        }
        self._output_topic = output_topic
        self._lane = _TracedLane(self._lane, self)

    def _items(self) -> Iterator[Item | None]:
        tracer, operations = self._tracing.tracer, self._tracing.operations
        for item in super()._items():
            if item is None:
                yield None
                continue
            offset, given = item
            processing = tracer.start_span(
                f"process {self.topic}",
                extracted(self._entries[offset].record.headers),
                SpanKind.CONSUMER,
                {**self._processing_attributes, "messaging.kafka.offset": offset},
            )
            if isinstance(given, Exception):
                self._records[offset] = TracedRecord(processing, None)
            else:
                given = with_key(given)  # what is executed is this very object
                processing.set_attribute("tierstream.kind", given.kind)
                operations[id(given)] = self._records[offset] = TracedRecord(processing, given)
            yield offset, given

    def _answer(self, offset: int, outcome: Outcome) -> None:
        if isinstance(outcome, Exception):
            self._records[offset].error = outcome
        super()._answer(offset, outcome)

    def labels_of(self, record: Record) -> Mapping[str, str]:
        """As :meth:`Assignment.labels_of`; its trace is ours where ours is kept."""
        traced = self._records.get(record.offset)
        context = None if traced is None else traced.processing.get_span_context()
        if context is None or not context.trace_flags.sampled:
            return super().labels_of(record)
        trace_id = trace.format_trace_id(context.trace_id)
        return record_labels(self.topic, self.partition, record.offset, (), trace_id)

    def send(self, offset: int, headers: Sequence[Header]) -> Sequence[Header]:
        """A response is handed in: processing is over, sending begins; return the headers it goes out with."""
        record = self._records.get(offset)
        if record is None:
            return headers
        if record.sending is None:
            status = next(value for name, value in headers if name == "tierstream-status")
            record.processing.set_attribute("tierstream.status", int(status or b"0"))
        else:  # the broker has refused the first one for its size
            record.sending.set_status(StatusCode.ERROR, "response_too_large")
            record.sending.end()
        record.sending = self._tracing.tracer.start_span(
            f"send {self._output_topic}",
            trace.set_span_in_context(record.processing, Context()),
            SpanKind.PRODUCER,
            self._sending_attributes,
        )
        self._end_processing(record)
        return injected(headers, record.sending)

    def _end_processing(self, record: TracedRecord) -> None:
        if record.operation is not None:
            self._tracing.operations.pop(id(record.operation), None)
            record.operation = None
        if record.processing.is_recording():
            if record.error is not None:
                fail(record.processing, record.error)
            record.processing.end()

    def acknowledged(self, tokens: Sequence[int]) -> None:
        """As :meth:`Assignment.acknowledged`; these responses are sent."""
        super().acknowledged(tokens)
        for offset in tokens:
            record = self._records.pop(offset, None)
            if record is not None and record.sending is not None:
                record.sending.end()

    def forget_answers(self) -> None:
        """As :meth:`Assignment.forget_answers`; nobody will say what became of these records."""
        super().forget_answers()
        self._forget_records()

    def _forget_buffer(self) -> None:
        super()._forget_buffer()
        self._forget_records()

    def _forget_records(self) -> None:
        """End the spans of records that this assignment has nothing more to do with: another run has them anew."""
        for offset in [offset for offset in self._records if offset not in self._entries]:
            record = self._records.pop(offset)
            for span in (record.sending, record.processing):
                if span is not None and span.is_recording():
                    span.set_attribute("error.type", "abandoned")
                    span.set_status(StatusCode.ERROR, "abandoned")
            if record.sending is not None:
                record.sending.end()
            self._end_processing(record)


class _TracedLane:
    """The lane of responses, with the context of their spans."""

    def __init__(self, lane: Lane, assignment: TracedAssignment) -> None:
        self._append = lane.append
        self._send = assignment.send

    def append(
        self, key: bytes | None, value: bytes | None, headers: Sequence[Header], owner: Owner, token: int
    ) -> None:
        """Hand one record in."""
        self._append(key, value, self._send(token, headers), owner, token)


class TracedHandler(Handler):
    """A handler that has a span for each attempt at the operation of a traced record."""

    def __init__(self, tracing: Tracing, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._tracing = tracing

    async def attempt(self, operation: Operation) -> OpResponse:
        """As :meth:`Handler.attempt`."""
        record = self._tracing.operations.get(id(operation))
        if record is None:
            return await super().attempt(operation)
        record.attempts += 1
        parent = trace.set_span_in_context(record.processing, Context())
        attributes = {"tierstream.attempt": record.attempts}
        span = self._tracing.tracer.start_span(operation.kind, parent, SpanKind.INTERNAL, attributes)
        with _inside(span):
            return await super().attempt(operation)


class _TracedTier:
    """One tier, or the change log: each request for a traced record is a span."""

    def __init__(self, tracer: trace.Tracer, backend: object, name: str) -> None:
        self._tracer = tracer
        self._backend = backend
        self._name = name

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        if name in NOT_REQUESTS or not callable(method):
            return method
        tracer, span_name = self._tracer, f"{self._name} {name}"
        attributes = {"tierstream.tier": self._name, "tierstream.request": name}

        @wraps(method)
        async def traced(*given: Any, **named: Any) -> Any:
            if not trace.get_current_span().get_span_context().is_valid:
                return await method(*given, **named)
            with _inside(tracer.start_span(span_name, None, SpanKind.CLIENT, attributes)):
                return await method(*given, **named)

        setattr(self, name, traced)
        return traced


@contextmanager
def _inside(span: Span) -> Iterator[None]:
    """Make *span* the current one, and end it with whatever ends the block."""
    with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield
        except BaseException as error:
            fail(span, error)
            raise
