"""Traces and error reports of a real service process, received as a collector and a Sentry would."""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from brokers import Broker, wait_until
from sabotage import on_signal, sabotage
from stages import SetStage

pytestmark = [pytest.mark.slow, pytest.mark.process]

TRACE = "0af7651916cd43dd8448eb211c80319c"
CANARY = "canary-7f3a"

FORBIDDING = """
import sys


class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"opentelemetry", "sentry_sdk"}:
            print("FORBIDDEN", name, file=sys.stderr, flush=True)
            raise ImportError(name)


sys.meta_path.insert(0, Forbidden())
"""


class Receiver:
    """An HTTP server that keeps what is posted; *answering* False keeps everybody waiting."""

    def __init__(self, *, answering: bool = True) -> None:
        self.bodies: list[tuple[str, bytes]] = []
        self.leave = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                match self.headers.get("Content-Encoding"):
                    case "gzip":
                        body = gzip.decompress(body)
                    case "deflate":
                        body = zlib.decompress(body)
                receiver.bodies.append((self.path, body))
                if not answering:
                    receiver.leave.wait(60)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self.leave.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def spans(self) -> list[Any]:
        """Every span received."""
        return [span for spans in self.spans_by_process().values() for span in spans]

    def spans_by_process(self) -> dict[int, list[Any]]:
        """Every span received, by the process that made it."""
        found: dict[int, list[Any]] = defaultdict(list)
        for path, body in list(self.bodies):
            if path == "/v1/traces":
                request = ExportTraceServiceRequest()
                request.ParseFromString(body)  # type: ignore[no-untyped-call]  # made by protoc
                for part in request.resource_spans:
                    (pid,) = [one.value.int_value for one in part.resource.attributes if one.key == "process.pid"]
                    found[pid] += [span for scope in part.scope_spans for span in scope.spans]
        return found

    def reports(self) -> list[dict[str, Any]]:
        """Every error report received."""
        bodies = list(self.bodies)
        return [json.loads(body.splitlines()[2]) for path, body in bodies if path == "/api/1/envelope/"]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A collector and a Sentry."""
    standing = Receiver()
    yield standing
    standing.stop()


@pytest.fixture
def silent() -> Iterator[Receiver]:
    """A collector that takes and never answers."""
    standing = Receiver(answering=False)
    yield standing
    standing.stop()


def test_a_record_is_traced_and_the_end_of_the_process_reported(
    embedded: Broker, set_stage: SetStage, receiver: Receiver
) -> None:
    """From the producer's span to the response's header; then exit 3, with what waited sent before it."""
    stage = set_stage(embedded)
    environment = {
        **sabotage(stage.folder, on_signal("consumer._client._sync_task.cancel()")),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{receiver.address}",
        "OTEL_BSP_SCHEDULE_DELAY": "600000",  # nothing goes out by itself while the test runs
        "SENTRY_DSN": f"http://{CANARY}@{receiver.address}/1",
    }
    service = stage.start(partitions=2, environment=environment)
    headers = [("traceparent", f"00-{TRACE}-b7ad6b7169203331-01".encode())]
    entry = stage.ledger.operate("insert", CANARY, CANARY.encode() * 10, headers=headers, statuses={201})
    answer = stage.ledger.answer(entry)
    stage.ledger.operate("head", f"{CANARY}/none", partition=1, statuses={404})
    stage.ledger.wait_answered()
    assert receiver.bodies == []

    service.process.send_signal(signal.SIGUSR2)

    assert service.wait_exit() == 3, service.obituary()
    spans = receiver.spans()
    named = {span.name: span for span in spans if span.trace_id.hex() == TRACE}
    topics = stage.config["input"]["topics"][0], stage.config["output"]["topic"]
    process, send = named[f"process {topics[0]}"], named[f"send {topics[1]}"]
    assert process.parent_span_id.hex() == "b7ad6b7169203331"
    assert send.parent_span_id == named["insert"].parent_span_id == process.span_id
    assert named["high_volume put_non_tombstone"].parent_span_id == named["insert"].span_id
    assert answer.header("traceparent") == f"00-{TRACE}-{send.span_id.hex()}-01"
    attributes = {one.key: one.value for one in process.attributes}
    assert attributes["messaging.consumer.group.name"].string_value == stage.group
    assert attributes["messaging.kafka.offset"].int_value == 0
    assert len([span for span in spans if span.name == f"process {topics[0]}"]) == 2
    (report,) = receiver.reports()
    assert (report["level"], report["message"]) == ("fatal", "fatal: a restart is right")
    assert CANARY.encode() not in b"".join(body for path, body in receiver.bodies if path == "/v1/traces")
    assert f"{CANARY}/none" not in json.dumps(report)
    assert CANARY not in service.log.read_text(encoding="utf-8")


def test_two_processes_in_transactions_are_traced_and_the_crash_of_one_is_reported(
    apache: Broker, set_stage: SetStage, receiver: Receiver
) -> None:
    """Each record's spans hang together in the process that had it, whose end by a signal only the other can report."""
    partitions = 4
    stage = set_stage(apache, partitions=partitions, delivery="exactly-once", runtime={"processes": 2})
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{receiver.address}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "SENTRY_DSN": f"http://{CANARY}@{receiver.address}/1",
    }
    service = stage.start(partitions=partitions, environment=environment)
    pids = {line["pid"] for line in service.log_lines() if line.get("event") == "process started"}
    topics = stage.config["input"]["topics"][0], stage.config["output"]["topic"]
    names = [f"process {topics[0]}", "insert", "high_volume put_non_tombstone", f"send {topics[1]}"]
    entries = []
    for partition in range(partitions):
        headers = [("traceparent", f"00-{partition + 1:032x}-b7ad6b7169203331-01".encode())]
        entries += stage.ledger.operate("insert", f"k{partition}", b"x", partition=partition, headers=headers)
    stage.ledger.wait_answered()

    def complete() -> bool:
        return sorted(span.name for span in receiver.spans()) == sorted(names * partitions)

    wait_until(complete, 30, "the spans of each record")
    by_process = receiver.spans_by_process()
    assert set(by_process) == pids
    for entry in entries:
        trace_id = f"{entry.partition + 1:032x}"
        of_record = [[one for one in spans if one.trace_id.hex() == trace_id] for spans in by_process.values()]
        (spans,) = filter(None, of_record)
        process, insert, request, send = (next(one for one in spans if one.name == name) for name in names)
        assert process.parent_span_id.hex() == "b7ad6b7169203331"
        assert insert.parent_span_id == send.parent_span_id == process.span_id
        assert request.parent_span_id == insert.span_id
        assert stage.ledger.answer([entry]).header("traceparent") == f"00-{trace_id}-{send.span_id.hex()}-01"
        assert not any(one.status.code for one in spans)

    crashed = min(pids)
    os.kill(crashed, signal.SIGSEGV)

    wait_until(lambda: bool(receiver.reports()), 60, "the crash to be reported")
    (report,) = receiver.reports()
    (error,) = report["exception"]["values"]
    assert (report["level"], report["message"]) == ("error", "process ended")
    assert "ended by SIGSEGV" in error["value"]
    service.stop()


def test_a_collector_that_does_not_answer_holds_up_neither_records_nor_the_end(
    embedded: Broker, set_stage: SetStage, silent: Receiver
) -> None:
    """Two thousand records, more than the queue holds; then a clean end within its deadline."""
    stage = set_stage(embedded)
    environment = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://{silent.address}/v1/traces",
        "OTEL_BSP_MAX_QUEUE_SIZE": "512",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    service = stage.start(partitions=2, environment=environment)
    for number in range(1_000):
        stage.ledger.operate("insert", f"k{number}", b"x", partition=number % 2, wait=False)
    stage.ledger.flush()
    stage.ledger.wait_answered()
    wait_until(lambda: bool(silent.bodies), 20, "the collector to be asked")

    service.terminate()

    assert service.wait_exit() == 0, service.obituary()
    assert any(line.get("step") == "traces" for line in service.log_lines()), "the spans' end was not waited for"


def test_without_a_wish_the_service_runs_where_neither_can_be_imported(embedded: Broker, set_stage: SetStage) -> None:
    """Nobody even looks for them: not at the start, not with a record, not at the end."""
    stage = set_stage(embedded)
    service = stage.start(partitions=2, environment=sabotage(stage.folder, FORBIDDING))
    headers = [("traceparent", f"00-{TRACE}-b7ad6b7169203331-01".encode())]
    entry = stage.ledger.operate("insert", "k", b"x", headers=headers, statuses={201})
    answer = stage.ledger.answer(entry)
    service.stop()

    assert answer.header("traceparent") == f"00-{TRACE}-b7ad6b7169203331-01", "copied as it is"
    assert "FORBIDDEN" not in service.log.read_text(encoding="utf-8")
