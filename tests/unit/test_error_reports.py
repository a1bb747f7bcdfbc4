"""Reports to Sentry: the unexpected alone, and of that nothing that could hold a key, a payload or a secret."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from consumer import log
from consumer.error_reports import REPORTS_A_MINUTE, ErrorReports
from consumer.errors import BackendError, BackendUnavailable, DecodeError, OperationPanic
from consumer.handler import failure_of
from consumer.telemetry import start_error_reports
from consumer.watchdog import WatchdogTripped

ADDRESS = "http://public-key@127.0.0.1:9/1"
CANARY = "canary-7f3a"

logger = log.get_logger("consumer.test")


class Recording(Transport):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[str] = []
        self.flushed: list[float] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        self.bodies.append(envelope.serialize().decode())

    def flush(self, timeout: float, callback: object = None) -> None:
        self.flushed.append(timeout)

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The events sent."""
        return [json.loads(body.splitlines()[2]) for body in self.bodies]


@pytest.fixture
def sent() -> Iterator[Recording]:
    """What is reported while a test runs."""
    transport = Recording()
    reports = ErrorReports(ADDRESS, transport=transport)
    yield transport
    reports.stop(0.0)


def raised(error: Exception) -> Exception:
    """The error, after it was raised by something that held a secret."""
    with pytest.raises(type(error)) as caught:
        fails(error, CANARY)
    return caught.value


def fails(error: Exception, _password: str) -> None:
    """Raise the error, with a local variable that must not be told."""
    raise error


def test_a_panic_is_reported_with_where_it_came_from(sent: Recording) -> None:
    """A defect of ours or of storage's client: class, functions, lines; nothing that it says."""
    failure_of("insert", raised(KeyError(CANARY)))

    (report,) = sent.reports
    (value,) = report["exception"]["values"]
    assert (report["level"], report["message"]) == ("error", "operation failed")
    assert report["tags"] == {"kind": "insert", "code": "panic"}
    assert (value["type"], value["value"]) == ("KeyError", "")
    assert value["stacktrace"]["frames"][-1]["function"] == "fails"
    assert report["release"].startswith("tierstream@")
    assert CANARY not in "".join(sent.bodies)


@pytest.mark.parametrize(
    "error",
    [BackendUnavailable("away"), BackendError("no permission"), DecodeError("truncated"), asyncio.CancelledError()],
)
def test_what_is_expected_to_happen_is_not_reported(sent: Recording, error: BaseException) -> None:
    """Storage that is away, poison, a cancelled operation: metrics and alerts are for these."""
    failure_of("get", error)
    logger.error("stop step failed", exc_info=error if isinstance(error, Exception) else None)
    logger.warning("reading failed", exc_info=RuntimeError("recovered"))
    logger.error("cannot start", error="a setting is wrong")

    assert sent.reports == []


def test_the_end_of_the_process_is_reported_whatever_it_was(sent: Recording) -> None:
    """Exit 3: the watchdog, a broker that is lost, a task that ended; our own words are told, as they are safe."""
    logger.critical("fatal: a restart is right", exc_info=WatchdogTripped("operations/3 has not moved for 300 s"))
    logger.critical("fatal: a restart is right", exc_info=BackendUnavailable("storage is away"))
    logger.critical("fatal: a restart is right", exc_info=RuntimeError(f"token {CANARY}"))

    assert [report["level"] for report in sent.reports] == ["fatal"] * 3
    assert [report["exception"]["values"][-1]["value"] for report in sent.reports] == [
        "operations/3 has not moved for 300 s",
        "storage is away",
        "",
    ]


def test_the_chain_is_told_from_its_beginning_and_a_panics_text_is_not(sent: Recording) -> None:
    """Sentry's order: the oldest first. A panic repeats the text of what caused it."""
    logger.critical("fatal: a restart is right", exc_info=OperationPanic.from_exception(raised(ValueError(CANARY))))

    (report,) = sent.reports
    values = report["exception"]["values"]
    assert [(value["type"], value["value"]) for value in values] == [("ValueError", ""), ("OperationPanic", "")]


async def test_what_only_the_event_loop_sees_is_reported_without_its_words(sent: Recording) -> None:
    """Its lines hold the contents of tasks and futures."""
    asyncio.get_running_loop().set_exception_handler(None)
    future = asyncio.get_running_loop().create_future()
    future.set_exception(raised(LookupError(CANARY)))
    del future
    gc.collect()
    await asyncio.sleep(0)

    (report,) = sent.reports
    assert report["message"] == "the event loop reports an exception"
    assert report["exception"]["values"][0]["type"] == "LookupError"
    assert CANARY not in "".join(sent.bodies)


def test_no_key_payload_or_secret_is_in_a_report(
    sent: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the line's fields, nor of variables, nor of the environment."""
    monkeypatch.setenv("TIERSTREAM_KAFKA__SASL_PASSWORD", CANARY)
    monkeypatch.setattr(sys, "argv", ["tierstream", CANARY])
    logger.error(
        "stop step failed",
        exc_info=raised(RuntimeError(CANARY)),
        topic="operations",
        partition=3,
        key=CANARY,
        error=CANARY,
        payload=CANARY.encode(),
    )
    logging.getLogger("aiokafka").error("of a library: %s", CANARY, exc_info=raised(RuntimeError(CANARY)))

    (report,) = sent.reports
    assert report["tags"] == {"topic": "operations", "partition": "3"}
    assert CANARY not in "".join(sent.bodies)


def test_the_same_defect_is_reported_a_few_times_a_minute(sent: Recording) -> None:
    """Every record may meet it."""
    for _ in range(100):
        failure_of("insert", raised(KeyError("one")))
    failure_of("insert", raised(IndexError("another")))

    assert len(sent.reports) == REPORTS_A_MINUTE + 1


def test_what_fails_in_reporting_disturbs_nobody(sent: Recording, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even by a line."""
    sent.capture_envelope = None  # type: ignore[assignment,method-assign]

    failure_of("insert", raised(KeyError("one")))

    assert capfd.readouterr().err == ""


def test_the_end_waits_for_what_is_on_its_way_and_reports_nothing_more() -> None:
    """With a deadline."""
    transport = Recording()
    reports = ErrorReports(ADDRESS, transport=transport)
    reports.stop(1.5)
    failure_of("insert", raised(KeyError("late")))

    assert transport.flushed == [1.5]
    assert transport.reports == []


class TestWhetherItIsWanted:
    """By the variable that Sentry's tools read."""

    def test_without_an_address_there_is_none(self) -> None:
        assert start_error_reports({}) is None
        assert start_error_reports({"SENTRY_DSN": ""}) is None

    def test_with_one_there_are_reports(self) -> None:
        reports = start_error_reports({"SENTRY_DSN": ADDRESS})
        assert reports is not None
        reports.stop(0.0)

    @pytest.mark.parametrize("missing", [True, False])
    def test_one_that_cannot_be_used_is_a_warning_that_does_not_repeat_it(
        self, missing: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        if missing:
            monkeypatch.setitem(sys.modules, "consumer.error_reports", None)

        assert start_error_reports({"SENTRY_DSN": f"no-address-{CANARY}"}) is None

        assert ("pip install tierstream[sentry]" if missing else "cannot be made") in caplog.text
        assert CANARY not in caplog.text
