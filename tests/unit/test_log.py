"""A line of the log is one line, is structured, is bounded, and holds nothing that must not be in a log."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog

from consumer import log
from consumer.operations import Metadata, StoredObject

CANARY = "CANARY-hunter2"


class Terminal(io.BytesIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class BrokenPipe(io.BytesIO):
    """A stream whose reader has gone away."""

    def write(self, _line: object) -> int:
        raise BrokenPipeError


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Give the process its logging back."""
    names = ["", log.ROOT_LOGGER, *log.PINNED, "aiokafka.consumer.fetcher"]
    levels = {name: logging.getLogger(name).level for name in names}
    before = list(logging.getLogger().handlers)
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def written() -> io.BytesIO:
    """Where the lines go."""
    return io.BytesIO()


@pytest.fixture
def lines(written: io.BytesIO) -> Callable[[], list[dict[str, Any]]]:
    """Read the JSON lines written so far."""
    return lambda: [json.loads(line) for line in written.getvalue().splitlines()]


def test_a_line_has_event_level_timestamp_and_logger_and_then_its_fields(
    written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """The shape that log pipelines rely on."""
    log.configure("info", "json", stream=written)

    log.get_logger("consumer.assignment").bind(topic="operations").info("partition assigned", partition=3, window=50)

    (line,) = lines()
    stamped = datetime.fromisoformat(line.pop("timestamp"))
    assert stamped.tzinfo == UTC
    assert abs((datetime.now(UTC) - stamped).total_seconds()) < 60
    assert line == {
        "event": "partition assigned",
        "level": "info",
        "logger": "consumer.assignment",
        "topic": "operations",
        "partition": 3,
        "window": 50,
    }
    assert list(json.loads(written.getvalue()))[:4] == ["event", "level", "timestamp", "logger"]
    assert b'Z","logger"' in written.getvalue()


def test_a_field_cannot_take_the_place_of_a_fixed_one(
    written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """Fields come from callers and contexts; the level and the time of a line are the line's own."""
    log.configure("info", "json", stream=written)

    log.get_logger("consumer.x").info("started", level="none", logger="other", timestamp="never")

    (line,) = lines()
    assert (line["level"], line["logger"]) == ("info", "consumer.x")
    assert line["timestamp"] != "never"


def test_fields_bound_to_the_context_are_in_every_line(
    written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """What belongs to an assignment is bound once, not repeated by each caller."""
    log.configure("info", "json", stream=written)
    structlog.contextvars.bind_contextvars(epoch=7)

    log.get_logger("consumer.x").info("drained")

    assert lines()[0]["epoch"] == 7


def test_fields_bound_to_the_handler_are_in_every_line_whoever_wrote_it(
    written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """Lines of several processes on one stderr are told apart by it; a line's own field of that name wins."""
    log.configure("info", "json", stream=written, bound={"process": 2})

    log.get_logger("consumer.x").info("drained")
    logging.getLogger("aiokafka").warning("away")
    log.get_logger("consumer.x").info("process ended", process=1)

    assert [line["process"] for line in lines()] == [2, 2, 1]
    assert list(lines()[0])[:4] == ["event", "level", "timestamp", "logger"]


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_decides_which_of_our_lines_are_written(
    level: str, expected: list[str], written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """Contract 6: log.level."""
    log.configure(level, "json", stream=written)
    logger = log.get_logger("consumer.x")

    logger.debug("one")
    logger.info("two")
    logger.log(logging.WARNING, "three")
    logger.error("four")

    assert [line["level"] for line in lines()] == expected


@pytest.mark.parametrize(("level", "line_format"), [("verbose", "json"), ("info", "xml")])
def test_an_unknown_setting_is_refused_by_its_name(level: str, line_format: str) -> None:
    """Contract 6: the configuration checks this first; nobody else gets a silent default."""
    with pytest.raises(ValueError, match=r"log\.(level|format) is one of"):
        log.configure(level, line_format)


def test_auto_is_text_for_a_terminal_and_json_for_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 6: log.format auto. NO_COLOR is honoured (contract 7)."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, plain, pipe = Terminal(), Terminal(), io.BytesIO()

    log.configure("info", "auto", stream=terminal)
    log.get_logger("consumer.x").info("started", port=9464)
    monkeypatch.setenv("NO_COLOR", "1")
    log.configure("info", "auto", stream=plain)
    log.get_logger("consumer.x").info("started", port=9464)
    log.configure("info", "auto", stream=pipe)
    log.get_logger("consumer.x").info("started", port=9464)

    assert b"\x1b[" in terminal.getvalue()
    assert b"\x1b" not in plain.getvalue()
    assert b"started" in plain.getvalue()
    assert b"port=9464" in plain.getvalue()
    assert json.loads(pipe.getvalue())["port"] == 9464


@pytest.mark.parametrize("line_format", ["json", "console"])
def test_text_from_outside_cannot_forge_a_line_or_steer_a_terminal(line_format: str, written: io.BytesIO) -> None:
    """CR, LF, escapes, C1 controls, line separators, bidirectional overrides and surrogates are shown, not sent."""
    log.configure("info", line_format, stream=written)
    hostile = 'x\r\n{"event":"forged"}\x1b[2J\x9b31m\x00\u2028\u202e\ud800'

    log.get_logger("consumer.x").warning("record refused " + hostile, request_id=hostile, nested={hostile: [hostile]})
    logging.getLogger("aiokafka.conn").warning("refused by %s", hostile)

    text = written.getvalue().decode()
    assert len(text.splitlines()) == 2
    texts = [text.replace("\n", "")]
    if line_format == "json":
        ours, theirs = map(json.loads, text.splitlines())
        texts = [ours["event"], theirs["event"], ours["request_id"], *ours["nested"], *ours["nested"].popitem()[1]]
    for shown in texts:
        assert "\\r\\n" in shown
        assert not set(shown) & set("\r\n\x1b\x9b\x00\u2028\u202e\ud800")


@pytest.mark.parametrize("line_format", ["json", "console"])
def test_no_payload_local_variable_or_object_content_reaches_a_line(line_format: str, written: io.BytesIO) -> None:
    """Faults 4.2: a canary put everywhere a payload can be is in no line."""
    log.configure("debug", line_format, stream=written)
    payload = CANARY.encode()

    class Holder:
        def __repr__(self) -> str:
            return CANARY

    def fail(secret: str) -> None:
        held = secret
        raise RuntimeError(f"no payload of {len(held)} characters here")

    logger = log.get_logger("consumer.x")
    logger.info(
        "stored",
        payload=payload,
        view=memoryview(payload),
        stored=StoredObject(Metadata(), payload),
        holder=Holder(),
        deep=[[[[[[payload]]]]]],
        several={"a": payload},
    )
    try:
        fail(CANARY)
    except RuntimeError:
        logger.exception("operation failed")
    logging.getLogger("aiokafka.producer").debug("Sending (key=%s value=%s)", CANARY, CANARY)

    assert CANARY.encode() not in written.getvalue()
    assert b"<14 bytes>" in written.getvalue()
    assert b"no payload of 14 characters here" in written.getvalue()


@pytest.mark.parametrize("level", list(log.LEVELS))
@pytest.mark.parametrize("name", ["aiokafka", "aiokafka.consumer.fetcher", "aiokafka.conn"])
def test_the_debug_lines_of_the_kafka_client_are_never_written(name: str, level: str, written: io.BytesIO) -> None:
    """Hazard H37: they print requests with keys and values, so not even an explicit level brings them back."""
    log.configure(level, "json", stream=written)
    logging.getLogger("aiokafka.consumer.fetcher").setLevel(logging.DEBUG)

    logging.getLogger(name).debug("value=%s", CANARY)

    assert written.getvalue() == b""


def test_the_kafka_client_may_warn_but_never_names_the_user(
    written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """Hazard H37: the connection's INFO has the SASL user name, also at debug."""
    log.configure("debug", "json", stream=written)

    logging.getLogger("aiokafka.conn").info("Authenticated as %s via %s", CANARY, "PLAIN")
    logging.getLogger("aiokafka").error('Unable connect to "%s:%s": %s', "broker", 9092, "refused")

    assert [line["event"] for line in lines()] == ['Unable connect to "broker:9092": refused']


def test_what_asyncio_reports_is_kept_to_its_first_line(
    written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """Faults 4.2: the lines after the first show handles with their arguments in debug mode."""
    log.configure("info", "json", stream=written)

    logging.getLogger("asyncio").error("Task exception was never retrieved\nhandle: <Handle f(%r)>", CANARY)
    logging.getLogger("asyncio").warning("Executing <Handle f(%r)> took 1 seconds", CANARY)

    assert [line["event"] for line in lines()] == ["Task exception was never retrieved"]


def test_a_library_that_formats_badly_still_gets_its_template_written(
    written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """A wrong line of a library is shown as far as it goes, and raises nothing at its caller."""
    handler = log.LineHandler(written, log.json_line)

    handler.handle(logging.LogRecord("aiokafka", logging.ERROR, "", 0, "wrong: %s %s", ("one",), None))

    assert lines()[0]["event"] == "wrong: %s %s"


def test_repeats_of_a_library_become_a_few_lines_and_a_count(
    written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """Hazard H32: a broker that is away is retried ten times a second."""
    now = [0.0]
    handler = log.LineHandler(written, log.json_line, log.Repeats(lambda: now[0]))
    logger = logging.getLogger("aiokafka.test")
    records = [
        logger.makeRecord(logger.name, logging.ERROR, "", 0, "Unable connect to %s", (f"node {n}",), None)
        for n in range(600)
    ]

    for record in records:
        handler.handle(record)
    in_the_first_minute = len(lines())
    now[0] = log.WINDOW_SECONDS
    handler.handle(records[0])

    assert in_the_first_minute == log.FOREIGN_LIMIT
    summary, again = lines()[log.FOREIGN_LIMIT :]
    assert summary["event"] == "repeated lines held back"
    assert summary["logger"] == "aiokafka.test"
    assert summary["repeated_event"] == "Unable connect to %s"
    assert summary["held_back"] == 600 - log.FOREIGN_LIMIT
    assert again["event"] == "Unable connect to node 0"


def test_numbers_inside_a_text_do_not_make_it_another_template(
    written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """Some lines of libraries are formatted before they are logged."""
    log.configure("info", "json", stream=written)

    for attempt in range(20):
        logging.getLogger("aiokafka").error(f"attempt {attempt} failed")  # noqa: G004 - what is tested

    assert len(lines()) == log.FOREIGN_LIMIT


def test_our_own_lifecycle_lines_are_all_written_and_our_warnings_bounded(
    written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """A rebalance of many partitions says one line for each; a flood of poison does not fill the disk."""
    log.configure("info", "json", stream=written)
    logger = log.get_logger("consumer.x")

    for partition in range(200):
        logger.info("partition assigned", partition=partition)
        logger.warning("record refused", partition=partition)

    levels = [line["level"] for line in lines()]
    assert levels.count("info") == 200
    assert levels.count("warning") == log.OWN_LIMIT


def test_replacing_the_handler_writes_the_counts_held_back(written: io.BytesIO) -> None:
    """What was held back is told at the end, also when no further line comes."""
    log.configure("info", "json", stream=written)
    for _ in range(50):
        logging.getLogger("aiokafka").error("gone")

    log.configure("info", "json", stream=io.BytesIO())

    assert json.loads(written.getvalue().splitlines()[-1])["held_back"] == 50 - log.FOREIGN_LIMIT
    assert sum(isinstance(handler, log.LineHandler) for handler in logging.getLogger().handlers) == 1


def test_the_memory_of_repeats_is_bounded() -> None:
    """Texts that are all different cannot grow the table; the oldest is summed up first."""
    repeats = log.Repeats(lambda: 0.0)
    first = ("x", logging.ERROR, "first")
    for _ in range(3):
        repeats.admits(first, 1)
    for number in range(log.TEMPLATES_MAX):
        assert list(repeats.due()) == []
        assert repeats.admits(("x", logging.ERROR, str(number)), 1)

    assert list(repeats.due()) == [(first, 2)]
    assert list(repeats.due()) == []


def test_a_line_that_cannot_be_written_stops_nothing() -> None:
    """Logging never stops the service."""
    log.configure("info", "json", stream=BrokenPipe())
    closed = io.BytesIO()
    closed.close()

    log.get_logger("consumer.x").error("lost")

    handler = next(handler for handler in logging.getLogger().handlers if isinstance(handler, log.LineHandler))
    assert handler.lines_lost == 1
    unwritable = log.LineHandler(closed, log.json_line)
    unwritable.handle(logging.getLogger("x").makeRecord("x", logging.ERROR, "", 0, "lost", (), None))
    assert unwritable.lines_lost == 1


def test_long_texts_and_traces_are_cut(written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]) -> None:
    """A line is bounded whatever an error text brings along; the end of a trace stays."""
    log.configure("info", "json", stream=written)

    error = ValueError("y" * 100_000 + " the end")
    log.get_logger("consumer.x").error("failed", exc_info=error, text="x" * 100_000, many=list(range(1000)))

    (line,) = lines()
    assert len(line["text"]) < log.TEXT_MAX + 50
    assert len(line["many"]) == log.ITEMS_MAX
    assert len(line["exception"]) <= log.TRACE_MAX + 1
    assert line["exception"].endswith(" the end")


def test_values_of_common_types_stay_readable(written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]) -> None:
    """Numbers too large for JSON, not-a-number, ids, paths and errors are no reason to lose a line."""
    log.configure("info", "json", stream=written)
    known = uuid.UUID(int=1)

    log.get_logger("consumer.x").info(
        "values", big=2**70, nan=float("nan"), id=known, path=Path("data"), error=OSError("x\ny"), none=None, yes=True
    )

    (line,) = lines()
    shown = {name: line[name] for name in ("big", "nan", "id", "path", "error", "none", "yes")}
    assert shown == {
        "big": str(2**70),
        "nan": None,
        "id": str(known),
        "path": "data",
        "error": "OSError: x\\ny",
        "none": None,
        "yes": True,
    }


def test_a_traceback_on_the_console_cannot_pass_for_a_line(written: io.BytesIO) -> None:
    """An error's text is often somebody else's; every line of a trace is marked as such."""
    log.configure("info", "console", stream=written)

    error = ValueError("x\n2026-01-01T00:00:00Z [error] forged")
    log.get_logger("consumer.x").error("failed", exc_info=error)

    first, *rest = written.getvalue().decode().rstrip("\n").split("\n")
    assert "failed" in first
    assert rest
    assert all(line.startswith("    | ") for line in rest)


def test_warnings_of_python_are_lines_too(written: io.BytesIO, lines: Callable[[], list[dict[str, Any]]]) -> None:
    """A ResourceWarning in production is a permit or a file that somebody forgot."""
    log.configure("info", "json", stream=written)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("reservation never released", ResourceWarning, stacklevel=1)

    assert lines()[0]["logger"] == "py.warnings"
    assert "reservation never released" in lines()[0]["event"]


def test_a_key_digest_is_what_b2sum_prints() -> None:
    """An operator finds a key in the logs with a tool that is on every machine."""
    assert log.key_digest("invoices/2026.pdf") == "1ffe122e89944067"
    assert log.key_digest("a") != log.key_digest("b")
    assert len(log.key_digest("\ud800")) == 16


def test_used_as_a_library_we_log_like_a_library(caplog: pytest.LogCaptureFixture) -> None:
    """Without `configure`, lines are ordinary records whose text has event and fields."""
    with caplog.at_level(logging.INFO, "consumer"):
        log.get_logger("consumer.x").info("reserved", window=50, payload=b"xyz")

    assert caplog.messages == ["reserved window=50 payload=<3 bytes>"]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("configured", [True, False])
def test_stdout_stays_empty(configured: bool) -> None:
    """Contract 7: `run` prints nothing on stdout; nor does the package used as a library."""
    program = (
        "import logging; from consumer import log\n"
        + ("log.configure('debug', 'auto')\n" if configured else "")
        + "log.get_logger('consumer.x').warning('said')\n"
        + "logging.getLogger('aiokafka').warning('said too')\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)

    assert done.stdout == ""
    assert "said" in done.stderr
    assert "said too" in done.stderr
    if configured:
        assert [json.loads(line)["level"] for line in done.stderr.splitlines()] == ["warning", "warning"]


# --------------------------------------------------------------------------------------------- the last errors


@pytest.fixture
def last_errors() -> Iterator[log.LastErrors]:
    """What is kept of this test's lines."""
    kept = log.LastErrors()
    logging.getLogger().addHandler(kept)
    yield kept
    logging.getLogger().removeHandler(kept)


def test_the_last_errors_are_warnings_and_worse_with_their_fields(last_errors: log.LastErrors) -> None:
    """Whoever looks at the status page need not read the log first."""
    ours = log.get_logger("consumer.part")
    ours.info("nothing")
    ours.warning("no permits", partition=3)
    ours.error("it broke", exc_info=ValueError("why"))

    first, second = last_errors.newest()

    assert first["timestamp"].endswith("Z")
    assert {**first, "timestamp": ""} == {
        "timestamp": "",
        "level": "warning",
        "event": "no permits",
        "detail": "partition=3",
        "times": 1,
    }
    assert (second["level"], second["event"], second["detail"]) == ("error", "it broke", "exception=ValueError: why")


def test_an_error_that_repeats_leaves_the_others_in_sight(last_errors: log.LastErrors) -> None:
    """One line for all that say the same, the newest last, with the fields of the last; not more than a screen."""
    ours, foreign = log.get_logger("consumer.part"), logging.getLogger("aiokafka.conn")
    ours.error("first")
    for number in range(500):
        foreign.warning("connection %d failed", number)
    for number in range(log.LAST_ERRORS_MAX - 2):
        ours.error(f"other {chr(97 + number)}")
    everything = last_errors.newest()
    ours.error("first")
    ours.error("one more")

    assert [error["times"] for error in everything[:2]] == [1, 500]
    assert everything[1]["event"] == "connection 499 failed"
    newest = last_errors.newest()
    assert len(newest) == log.LAST_ERRORS_MAX
    assert [(error["event"], error["times"]) for error in newest[-2:]] == [("first", 2), ("one more", 1)]
    assert "connection 499 failed" not in [error["event"] for error in newest]


def test_the_last_errors_are_as_safe_as_the_log(last_errors: log.LastErrors) -> None:
    """No payload, no control character, and no end without bound."""
    ours = log.get_logger("consumer.part")
    ours.error("x" * 5000, payload=CANARY.encode(), held=StoredObject(Metadata(), CANARY.encode()), text="a\x1b[31m\nb")

    (kept,) = last_errors.newest()

    assert CANARY not in repr(kept)
    assert "\x1b" not in kept["detail"]
    assert "\n" not in kept["detail"]
    assert len(kept["event"]) == log.SHOWN_MAX
