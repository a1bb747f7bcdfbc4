"""Spans from the record to its response: what they say, how they hang together, and what they never say."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanContext, SpanKind, StatusCode

from consumer.errors import BackendUnavailable
from consumer.retry import RetryPolicy
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.tiered import TieredStorage
from consumer.telemetry import start_tracing, wants_traces
from consumer.tracing import Tracing, exporting_provider
from failures import FailingRead
from gates import GatedStorage, settled
from lanes import Fetched, Workplace, fetched, poison, until
from service_process import ROOT, clean_environment

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID, PARENT_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
CANARY = "canary-7f3a"
"""Stands in keys and payloads; must stand in no span."""

Make = Callable[..., Workplace]


def identity(span: ReadableSpan) -> SpanContext:
    """Which span of which trace it is."""
    context = span.get_span_context()
    assert context is not None
    return context


class Spans:
    """The spans that have ended."""

    def __init__(self, sampler: Any = None) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = Tracing(self.provider, "group")

    @property
    def ended(self) -> list[ReadableSpan]:
        """All, in order of their end."""
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        """Those of a name."""
        return [span for span in self.ended if span.name == name]

    def tree(self, name: str) -> dict[str, Any]:
        """The one span of a name, with those below it by name, in order of their start."""

        def below(parent: ReadableSpan) -> dict[str, Any]:
            span_id = identity(parent).span_id
            children = [one for one in self.ended if one.parent is not None and one.parent.span_id == span_id]
            return {one.name: below(one) for one in sorted(children, key=lambda one: one.start_time or 0)}

        (root,) = self.named(name)
        return below(root)


@pytest.fixture
def spans() -> Spans:
    """Where spans go."""
    return Spans()


@pytest.fixture
async def make(spans: Spans) -> AsyncIterator[Make]:
    """A maker of traced workplaces; when all is over no record may still be remembered."""
    places: list[Workplace] = []

    def make(
        storage: Any, tracing: Tracing | None = None, retry: RetryPolicy | None = None, **changes: Any
    ) -> Workplace:
        tracing = tracing or spans.tracing
        place = Workplace(
            storage,
            changes=changes,
            retry=retry,
            make_assignment=tracing.assignment("responses", 2),
            make_handler=tracing.handler(),
        )
        places.append(place)
        return place

    yield make
    for place in places:
        await place.clear_up()
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()
        await settled()
        assert not place.failures
    assert spans.tracing.operations == {}


def tiers(tracing: Tracing, high_volume: Any = None, threshold: int = 100) -> TieredStorage:
    """Storage whose tiers are traced."""
    return TieredStorage(
        tracing.tier(high_volume or MemoryBackend(), "high_volume"),
        tracing.tier(MemoryBackend(), "long_term"),
        tracing.tier(MemoryChangeLog(), "change_log"),
        threshold,
    )


def carrying(record: Fetched, *headers: tuple[str, bytes]) -> Fetched:
    """A record with headers."""
    record.headers = headers
    return record


async def test_a_record_is_one_trace_from_its_producer_to_its_response(make: Make, spans: Spans) -> None:
    """The producer's span, ours, the attempt, each request to a tier, the response, which carries the last of them."""
    place = make(tiers(spans.tracing))
    assignment = place.assign(partition=3)
    record = fetched("insert", 7, "object", b"x" * 200)
    assignment.begin(7)

    assignment.receive([carrying(record, ("traceparent", PARENT.encode()), ("tracestate", b"vendor=1"))])
    await until(lambda: len(place.responses.appended) == 1)
    assert spans.named("send responses") == [], "the response is not acknowledged"
    place.responses.acknowledge()
    await place.service.join()

    assert spans.tree("process operations") == {
        "insert": {
            "high_volume head_tiered": {},
            "change_log record": {},
            "long_term put": {},
            "high_volume compare_and_write": {},
            "change_log remove": {},
        },
        "send responses": {},
    }
    assert {identity(span).trace_id for span in spans.ended} == {TRACE_ID}
    (processing,), (sending,) = spans.named("process operations"), spans.named("send responses")
    assert processing.parent is not None
    assert processing.parent.span_id == PARENT_ID
    assert processing.kind is SpanKind.CONSUMER
    assert dict(processing.attributes or {}) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "operations",
        "messaging.destination.partition.id": "3",
        "messaging.consumer.group.name": "group",
        "messaging.kafka.offset": 7,
        "tierstream.kind": "insert",
        "tierstream.status": 201,
    }
    assert sending.kind is SpanKind.PRODUCER
    assert dict(sending.attributes or {}) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "responses",
        "messaging.destination.partition.id": "1",
    }
    headers = place.responses.appended[0].headers
    span_id = identity(sending).span_id
    assert [value for name, value in headers if name == "traceparent"] == [
        f"00-{TRACE_ID:032x}-{span_id:016x}-01".encode()
    ]
    assert [value for name, value in headers if name == "tracestate"] == [b"vendor=1"]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("traceparent", b"nonsense")],
        [("traceparent", b"\xff\xfe")],
        [("traceparent", PARENT.encode()), ("traceparent", PARENT.replace("31-01", "32-01").encode())],
    ],
    ids=["none", "no context", "no text", "two"],
)
async def test_without_a_usable_context_a_trace_begins_here(
    make: Make, spans: Spans, headers: list[tuple[str, bytes]]
) -> None:
    """And its response carries that one alone."""
    place = make(GatedStorage())
    place.responses.acknowledge_always()
    assignment = place.assign()

    assignment.receive([carrying(fetched("head", 0, "k"), *headers)])
    await until(lambda: assignment.watermark == 1)

    (processing,) = spans.named("process operations")
    assert processing.parent is None
    carried = [value for name, value in place.responses.appended[0].headers if name == "traceparent"]
    assert [f"{identity(processing).trace_id:032x}".encode()] == [
        (value or b"").split(b"-")[1] for value in carried
    ]
    (exemplar,) = place.counts.response_latency.exemplars.values()
    assert exemplar.labels["trace_id"] == f"{identity(processing).trace_id:032x}", "the one that can be looked at"


async def test_each_attempt_is_a_span_and_an_error_is_told_by_its_code(make: Make, spans: Spans) -> None:
    """Two that fail, one that does not: the record is none that failed."""
    backend = FailingRead(2)
    place = make(tiers(spans.tracing, backend), retry=RetryPolicy(3, 0.0, 0.0, "answer", None))
    place.responses.acknowledge_always()
    assignment = place.assign()

    assignment.receive([fetched("get", 0, "k")])
    await until(lambda: assignment.watermark == 1)

    attempts = spans.named("get")
    assert [dict(span.attributes or {}).get("tierstream.attempt") for span in attempts] == [1, 2, 3]
    assert [span.status.status_code for span in attempts] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert [dict(span.attributes or {}).get("error.type") for span in attempts] == ["backend_unavailable"] * 2 + [None]
    requests = spans.named("high_volume get_tiered")
    assert [(span.parent.span_id if span.parent else None) for span in requests] == [
        identity(span).span_id for span in attempts
    ]
    (processing,) = spans.named("process operations")
    assert processing.status.status_code is StatusCode.UNSET


async def test_an_insert_that_is_given_a_random_key_is_the_same_operation(make: Make, spans: Spans) -> None:
    """`storage.key_generation: random`: what is executed is another object than what was decoded."""
    place = make(GatedStorage(), derive_keys=False)
    place.responses.acknowledge_always()
    assignment = place.assign()

    assignment.receive([fetched("insert", 0, None)])
    await until(lambda: assignment.watermark == 1)

    assert spans.tree("process operations") == {"insert": {}, "send responses": {}}


def test_what_a_backend_says_of_itself_is_said_of_the_traced_one(spans: Spans) -> None:
    """An attribute is no request: what is asked for its truth would be true of every function."""

    class Repeating(MemoryBackend):
        repeats_requests = False

    traced = spans.tracing.tier(Repeating(), "high_volume")

    assert traced.repeats_requests is False
    assert not hasattr(spans.tracing.tier(MemoryBackend(), "high_volume"), "repeats_requests")


async def test_operations_that_run_side_by_side_keep_their_requests_apart(make: Make, spans: Spans) -> None:
    """Runners are shared by operations: a span that stayed behind would have the next one's requests."""
    storage = GatedStorage(*(f"object-{offset}" for offset in range(0, 20, 2)))
    place = make(storage)
    place.responses.acknowledge_always()
    assignment = place.assign(window=4)

    assignment.receive([fetched("insert", offset, f"object-{offset}") for offset in range(20)])
    await settled()
    storage.let_all_go()
    await until(lambda: assignment.watermark == 20)

    by_identity = {identity(span).span_id: span for span in spans.named("process operations")}
    parents = [span.parent.span_id for span in spans.named("insert") if span.parent is not None]
    assert sorted(parents) == sorted(by_identity)
    assert not trace.get_current_span().get_span_context().is_valid


async def test_failures_are_errors_by_code_and_poison_is_no_operation(make: Make, spans: Spans) -> None:
    """What an exception says stays here: it may hold anything."""
    storage = GatedStorage()
    storage.failures = {"a": lambda: RuntimeError(CANARY), "b": lambda: BackendUnavailable("away")}
    place = make(storage)
    place.responses.acknowledge_always()
    place.dead_letters.acknowledge_always()
    assignment = place.assign()

    assignment.receive([fetched("head", 0, "a"), fetched("head", 1, "b"), poison(2)])
    await until(lambda: assignment.watermark == 3)

    found = {
        (dict(span.attributes or {}).get("messaging.kafka.offset"), dict(span.attributes or {}).get("error.type"))
        for span in spans.named("process operations")
    }
    assert found == {(0, "panic"), (1, "backend_unavailable"), (2, "decode_error")}
    assert {event.name: dict(event.attributes or {}) for span in spans.named("head") for event in span.events} == {
        "exception": {"exception.type": "consumer.errors.BackendUnavailable"}
    }
    assert len(spans.named("head")) == 2, "poison was attempted"
    assert CANARY not in json.dumps([json.loads(span.to_json()) for span in spans.ended])


async def test_no_span_holds_a_key_or_a_payload(make: Make, spans: Spans) -> None:
    """Contract 9's rule for labels holds for attributes as well."""
    place = make(tiers(spans.tracing))
    place.responses.acknowledge_always()
    assignment = place.assign()
    payload = CANARY.encode() * 20

    assignment.receive(
        [
            fetched("insert", 0, CANARY, payload, request_id=CANARY),
            fetched("get", 1, CANARY),
            fetched("delete", 2, CANARY),
        ]
    )
    await until(lambda: assignment.watermark == 3)
    await place.service.join()

    assert len(spans.named("process operations")) == 3
    assert CANARY not in json.dumps([json.loads(span.to_json()) for span in spans.ended])


async def test_what_is_not_sampled_is_passed_on_all_the_same(make: Make) -> None:
    """The next service has to hear that this trace is not sampled."""
    unsampled = Spans(ALWAYS_OFF)
    place = make(tiers(unsampled.tracing), unsampled.tracing)
    place.responses.acknowledge_always()
    assignment = place.assign()

    assignment.receive([carrying(fetched("head", 0, "k"), ("traceparent", PARENT.encode()))])
    await until(lambda: assignment.watermark == 1)

    assert unsampled.ended == []
    (exemplar,) = place.counts.response_latency.exemplars.values()
    assert exemplar.labels["trace_id"] == f"{TRACE_ID:032x}", "who sent it may have kept it"
    carried = place.responses.appended[0].header("traceparent")
    assert carried is not None
    assert carried.startswith(f"00-{TRACE_ID:032x}-".encode())
    assert carried.endswith(b"-00")
    assert unsampled.tracing.operations == {}


async def test_a_response_the_broker_refuses_is_sent_twice(make: Make, spans: Spans) -> None:
    """Both are told; what goes out carries the second."""
    place = make(GatedStorage())
    assignment = place.assign()

    assignment.receive([fetched("insert", 0, "k")])
    await until(lambda: len(place.responses.appended) == 1)
    place.responses.refuse()
    place.responses.acknowledge()

    first, second = spans.named("send responses")
    assert [first.status.status_code, second.status.status_code] == [StatusCode.ERROR, StatusCode.UNSET]
    carried = place.responses.appended[1].header("traceparent") or b""
    assert carried.split(b"-")[2] == f"{identity(second).span_id:016x}".encode()
    assert len(spans.named("process operations")) == 1


async def test_what_a_drain_deadline_leaves_behind_is_told_as_abandoned(make: Make, spans: Spans) -> None:
    """No span stays open, and none is remembered, also where a response was never acknowledged."""
    storage = GatedStorage("stuck")
    place = make(storage)
    assignment = place.assign()

    assignment.receive([fetched("insert", 0, "stuck"), fetched("insert", 1, "answered")])
    await until(lambda: len(place.responses.appended) == 1)
    running = await assignment.abandon()
    (stuck,) = spans.named("process operations")[1:]
    storage.let_all_go()
    assert running is not None
    await running.wait_finished()
    place.responses.waiting.clear()  # the lanes have ended: nobody will say what became of it
    assignment.forget_answers()

    assert dict(stuck.attributes or {})["messaging.kafka.offset"] == 0
    assert dict(stuck.attributes or {})["error.type"] == "abandoned"
    assert [span.status.description for span in spans.named("send responses")] == ["abandoned"]


class TestWhetherItIsWanted:
    """The variables that every tool with OpenTelemetry reads."""

    @pytest.mark.parametrize(
        ("environment", "wanted"),
        [
            ({}, False),
            ({"OTEL_SERVICE_NAME": "x"}, False),
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
            ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
            ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
            ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
            ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, False),
        ],
    )
    def test_the_environment_decides(self, environment: dict[str, str], wanted: bool) -> None:
        assert wants_traces(environment) is wanted

    def test_where_the_extra_is_missing_the_service_goes_on(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "consumer.tracing", None)

        assert start_tracing({"OTEL_TRACES_EXPORTER": "otlp"}, "group") is None

        assert "pip install tierstream[tracing]" in caplog.text

    def test_a_setting_that_cannot_be_used_does_not_stop_the_service(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")

        assert start_tracing({"OTEL_TRACES_EXPORTER": "otlp"}, "group") is None

        assert "traces cannot be made" in caplog.text

    def test_the_service_has_a_name_unless_it_is_given_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
        unnamed = exporting_provider()
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        named = exporting_provider()

        assert [one.resource.attributes["service.name"] for one in (unnamed, named)] == ["tierstream", "mine"]
        unnamed.shutdown()
        named.shutdown()

    def test_without_a_wish_nothing_of_it_is_loaded(self) -> None:
        """Neither by the service nor by the client: whoever does not use it does not pay for it, or need it."""
        code = (
            "import sys, consumer.app, consumer.client, consumer.processes.supervisor\n"
            "from consumer.telemetry import start_error_reports, start_tracing\n"
            "assert start_tracing({}, 'group') is None and start_error_reports({}) is None\n"
            "assert consumer.client.trace_headers() == []\n"
            "print([name for name in sys.modules if name.partition('.')[0] in {'opentelemetry', 'sentry_sdk'}])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment(), check=True, cwd=ROOT
        )

        assert done.stdout.strip() == "[]"


def test_the_queue_of_spans_is_bounded_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that does not answer costs spans, never records."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "50")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    reached, leave = threading.Event(), threading.Event()

    def export(*_: object) -> None:
        reached.set()
        leave.wait(20)

    provider = exporting_provider()
    (processor,) = provider._active_span_processor._span_processors
    monkeypatch.setattr(processor.span_exporter, "export", export)  # type: ignore[attr-defined]
    tracer = provider.get_tracer("test")
    for _ in range(500):
        tracer.start_span("span").end()
    assert reached.wait(20)
    for _ in range(500):
        tracer.start_span("span").end()

    assert len(processor._batch_processor._queue) <= 50  # type: ignore[attr-defined]
    leave.set()
    provider.shutdown()
