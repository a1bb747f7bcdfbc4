"""Logging: one line per event on stderr, structured, bounded, and free of anything that must not be in a log.

Every line of the process takes the same way, whoever wrote it:

1. Our own modules call ``get_logger(__name__)``: a structlog logger on top of the standard library's logger of that
   name. Event and fields travel in an :class:`Event`, not in a text. Without :func:`configure` (the package used as a
   library) this is ordinary standard library logging: no handler, nothing on stdout.
2. Libraries log through the standard library already; :data:`PINNED` bounds how much of that is let through.
3. :class:`LineHandler`, installed once on the root logger by :func:`configure`, limits repeats, makes every value safe
   to show, renders JSON or console text and writes one line of bytes.

What never reaches a line: control characters (no forged line, no terminal escape), bytes (only their number), objects
that could hold a payload (only their type), local variables of a traceback. Object keys are the caller's to replace by
:func:`key_digest`. A line that cannot be written is dropped: logging never stops the service.

Levels: ERROR = data at risk or unavailable, WARNING = unexpected but recovered, INFO = lifecycle and assignment,
DEBUG = single operations.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import os
import re
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any, BinaryIO, Final, TypeAlias
from uuid import UUID

import orjson
import structlog
from structlog.stdlib import BoundLogger
from structlog.typing import EventDict, WrappedLogger

ROOT_LOGGER: Final = "consumer"
"""Parent of all our own loggers; ``log.level`` is the level of this one."""

FORMATS: Final = ("auto", "console", "json")
LEVELS: Final = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}

PINNED: Final = {
    "aiokafka": (logging.INFO, logging.WARNING),
    "aiokafka.conn": (logging.WARNING, logging.WARNING),
    "aiohttp": (logging.INFO, logging.WARNING),
    "asyncio": (logging.ERROR, logging.ERROR),
    "google": (logging.INFO, logging.WARNING),
    "opentelemetry": (logging.INFO, logging.WARNING),
    "sentry_sdk": (logging.WARNING, logging.WARNING),
    "urllib3": (logging.INFO, logging.WARNING),
}
"""Logger: (lowest level at ``debug``, lowest level otherwise).

aiokafka's DEBUG prints requests with keys and values, so it is let through at no setting; the INFO of its connections
prints the SASL user name (hazard H37). asyncio's debug mode prints call arguments in its warnings."""

FOREIGN_LIMIT: Final = 5
"""Lines per :data:`WINDOW_SECONDS` of one foreign logger and template. aiokafka retries every 100 ms without growing
back-off (hazard H32): 600 lines a minute for each connection while a broker is away become 5 and a count."""
OWN_LIMIT: Final = 60
"""The same for our own warnings and errors; our INFO is lifecycle, bounded by what happens to partitions."""
WINDOW_SECONDS: Final = 60.0
TEMPLATES_MAX: Final = 256
"""Templates remembered at a time; the oldest is summed up early when there are more."""

TEXT_MAX: Final = 2_048
"""Characters of one value in a line. Far above our own events; bounds what a vendor's error text brings along."""
TRACE_MAX: Final = 16_384
"""Characters of a traceback, the end of it: there stands the error."""
ITEMS_MAX: Final = 50
"""Members of one list or mapping in a line."""
DEPTH_MAX: Final = 4

LAST_ERRORS_MAX: Final = 10
"""Warnings and errors kept to be shown: what fits on a screen."""
SHOWN_MAX: Final = 300
"""Characters of each of them; the whole of it is in the log."""

_UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0, C1, DEL), line and paragraph separators, bidirectional overrides, lone surrogates."""
_DIGITS: Final = re.compile(r"\d+")

Fields: TypeAlias = dict[str, Any]


def get_logger(name: str) -> BoundLogger:
    """Return the structured logger *name*: ``log.info("partition assigned", topic=…, window=…)``, ``log.bind(…)``.

    Fields bound with :mod:`structlog.contextvars` are added. Events are constant texts, what varies goes into fields:
    the event is what repeats are counted by.
    """
    logger: BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.contextvars.merge_contextvars, _to_event],
        wrapper_class=_Logger,
    ).bind()
    return logger


def bind_task(**fields: object) -> None:
    """Add *fields* to every line that this asyncio task says from now on, and that the tasks say which it starts.

    For whoever works on one thing all its life: code below it that knows nothing of partitions still says which.
    """
    structlog.contextvars.bind_contextvars(**fields)


def key_digest(key: str) -> str:
    """Return 16 hexadecimal digits that stand for an object key in logs and in ``/debug/state``.

    The same in every process and release, so that lines can be joined and an operator can compute it for a key at
    hand: ``printf %s KEY | b2sum -l 64``. It is a pseudonym, not a secret: a key that can be guessed can be confirmed.
    """
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def configure(
    level: str = "info",
    line_format: str = "auto",
    *,
    stream: BinaryIO | None = None,
    bound: Mapping[str, object] | None = None,
) -> None:
    """Install the one handler of the process; a second call replaces it.

    Args:
        level: One of :data:`LEVELS`, for our own loggers. Foreign ones stay at :data:`PINNED`, at INFO at the lowest.
        line_format: ``json``, ``console``, or ``auto``: console on a terminal, else JSON.
        stream: Where lines go; None is stderr. stdout belongs to the data of commands.
        bound: Fields of every line, also of foreign ones; a line's own fields win.

    Raises:
        ValueError: *level* or *line_format* is none of these.
    """
    if level not in LEVELS:
        raise ValueError(f"log.level is one of {', '.join(LEVELS)}")
    if line_format not in FORMATS:
        raise ValueError(f"log.format is one of {', '.join(FORMATS)}")
    target = sys.stderr.buffer if stream is None else stream
    terminal = target.isatty()
    console = line_format == "console" or (line_format == "auto" and terminal)
    render = console_line(colors=terminal and not os.environ.get("NO_COLOR")) if console else json_line
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, LineHandler)]:
        root.removeHandler(handler)
        handler.close()
    root.addHandler(LineHandler(target, render, bound=bound))
    number: int = LEVELS[level]
    logging.getLogger(ROOT_LOGGER).setLevel(number)
    root.setLevel(max(number, logging.INFO))
    for name, (when_debugging, otherwise) in PINNED.items():
        lowest = when_debugging if number <= logging.DEBUG else otherwise
        logging.getLogger(name).setLevel(max(number, lowest))
    logging.captureWarnings(capture=True)


class Event:
    """What one of our own lines says: a constant text and its fields. Shows as ``text name=value …``."""

    __slots__ = ("fields", "text")

    def __init__(self, text: str, fields: Fields) -> None:
        self.text = text
        self.fields = fields

    def __str__(self) -> str:
        return " ".join([self.text, *(f"{name}={safe(value)}" for name, value in self.fields.items())])


class _Logger(BoundLogger):
    """structlog's logger with the level checked first: a line below the level costs a comparison, no processing."""

    def _proxy_to_logger(self, method_name: str, event: str | None = None, *event_args: str, **event_kw: Any) -> Any:
        # `exception` logs at ERROR; every other method is named after its level.
        number = LEVELS.get("error" if method_name == "exception" else method_name, logging.CRITICAL)
        if self._logger.isEnabledFor(number):
            return super()._proxy_to_logger(method_name, event, *event_args, **event_kw)
        return None


def _to_event(_logger: WrappedLogger, _method: str, fields: EventDict) -> tuple[tuple[Event], Fields]:
    """Hand over to the standard library: the last processor of our own loggers."""
    text = str(fields.pop("event", ""))
    exc_info = fields.pop("exc_info", None)
    return (Event(text, dict(fields)),), {"exc_info": exc_info} if exc_info else {}


class Repeats:
    """Counts lines by template and tells which are one too many (bounded; times in seconds of *clock*).

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: OrderedDict[tuple[str, int, str], list[float]] = OrderedDict()
        """Template: [end of its window, lines seen in it, limit]; ordered by end, as all windows are equally long."""

    def admits(self, template: tuple[str, int, str], limit: int) -> bool:
        """Count a line of *template* (logger, level, text); False where it is beyond *limit* in this window."""
        window = self._windows.get(template)
        if window is None:
            self._windows[template] = [self._clock() + WINDOW_SECONDS, 1, limit]
            return True
        window[1] += 1
        return window[1] <= limit

    def due(self, *, everything: bool = False) -> Iterator[tuple[tuple[str, int, str], int]]:
        """Forget windows that have ended (or all); yield template and number of the lines held back, where any were."""
        now = self._clock()
        while self._windows:
            template, (end, seen, limit) = next(iter(self._windows.items()))
            if not everything and end > now and len(self._windows) <= TEMPLATES_MAX:
                return
            del self._windows[template]
            if seen > limit:
                yield template, int(seen - limit)


class LineHandler(logging.Handler):
    """Renders and writes every line of the process; called by ``logging`` under the handler's lock, from any thread.

    Args:
        stream: Written one whole line at a time, and flushed.
        render: Safe fields to the bytes of a line.
        repeats: The count of repeated lines.
        bound: Fields of every line.
    """

    def __init__(
        self,
        stream: BinaryIO,
        render: Callable[[Fields], bytes],
        repeats: Repeats | None = None,
        *,
        bound: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self._bound = {_text(name): safe(value) for name, value in (bound or {}).items()}
        self._stream = stream
        self._render = render
        self._repeats = repeats or Repeats()
        self.lines_lost = 0
        """Lines that could not be written: stderr closed, its reader gone, or its disk full."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write *record*, after the counts of repeats whose minute is over; hold it back where it is one too many."""
        own = record.name.partition(".")[0] == ROOT_LOGGER
        if not own and record.levelno < logging.INFO:
            return  # somebody set a library's logger to DEBUG: H37 has no exception
        self._write(self._summaries(everything=False))
        admitted = own and record.levelno < logging.WARNING
        if not admitted:
            text = record.msg.text if isinstance(record.msg, Event) else str(record.msg)
            template = (record.name, record.levelno, _DIGITS.sub("#", text[:TEXT_MAX]))
            admitted = self._repeats.admits(template, OWN_LIMIT if own else FOREIGN_LIMIT)
        if admitted:
            self._write([_fields_of(record)])

    def close(self) -> None:
        """Write the counts of all lines held back, then be gone; the stream stays open."""
        self.acquire()
        try:
            self._write(self._summaries(everything=True))
        finally:
            self.release()
        super().close()

    def _summaries(self, *, everything: bool) -> Iterator[Fields]:
        for (logger, level, text), held_back in self._repeats.due(everything=everything):
            fields = {"repeated_event": text, "held_back": held_back}
            yield _line("repeated lines held back", level, time.time(), logger, fields)

    def _write(self, lines: Iterable[Fields]) -> None:
        for fields in lines:
            for name, value in self._bound.items():
                fields.setdefault(name, value)
            try:
                self._stream.write(self._render(fields))
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: the stream is closed
                self.lines_lost += 1


class LastErrors(logging.Handler):
    """Keeps the last lines at warning or above, for whoever looks at the state of the service and not at its log.

    Lines that say the same (logger, level and event) are one, with the time and the fields of the last: so a storm of
    one error leaves the others in sight. Values are as safe and bounded as those of a line.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: OrderedDict[tuple[str, str, str], Fields] = OrderedDict()
        """By what they say; the newest last."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep *record*; called under the handler's lock, from any thread."""
        line = _fields_of(record)
        event, level, timestamp, logger = (line.pop(name) for name in ("event", "level", "timestamp", "logger"))
        if "exception" in line:  # the last line of a traceback says what it is
            line["exception"] = line["exception"].rpartition("\n")[2]
        detail = " ".join(f"{name}={value}" for name, value in line.items())
        says = logger, level, _DIGITS.sub("#", event)
        times = self._kept.pop(says, {"times": 0})["times"] + 1
        self._kept[says] = {
            "timestamp": timestamp,
            "level": level,
            "event": event[:SHOWN_MAX],
            "detail": detail[:SHOWN_MAX],
            "times": times,
        }
        if len(self._kept) > LAST_ERRORS_MAX:
            self._kept.popitem(last=False)

    def newest(self) -> list[Fields]:
        """Return what is kept, the newest last: ``timestamp``, ``level``, ``event``, ``detail`` and ``times``."""
        self.acquire()
        try:
            return [dict(fields) for fields in self._kept.values()]
        finally:
            self.release()


def _fields_of(record: logging.LogRecord) -> Fields:
    """Turn a record of ``logging`` into the safe fields of a line."""
    if isinstance(record.msg, Event):
        line = _line(record.msg.text, record.levelno, record.created, record.name, record.msg.fields)
    else:
        line = _line(_foreign_text(record), record.levelno, record.created, record.name, {})
    if record.exc_info and record.exc_info[1] is not None:
        line["exception"] = trace(record.exc_info[1])
    return line


def _foreign_text(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception:  # noqa: BLE001 - arguments of others may raise anything when formatted; the template still tells
        return str(record.msg)
    # What follows asyncio's first line is the repr of handles and tasks, in debug mode with their arguments.
    return text.partition("\n")[0] if record.name == "asyncio" else text


def _line(event: str, level: int, created: float, logger: str, fields: Mapping[str, Any]) -> Fields:
    """Put a line together; the four fixed names win over fields of the same name."""
    timestamp = datetime.fromtimestamp(created, UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"
    line: Fields = {
        "event": _text(event),
        "level": logging.getLevelName(level).lower(),
        "timestamp": timestamp,
        "logger": _text(logger),
    }
    for name, value in fields.items():
        line.setdefault(_text(name), safe(value))
    return line


def safe(value: object, depth: int = 0) -> Any:  # noqa: PLR0911 - one case for each kind of value is the whole function
    """Return *value* as something JSON can hold, bounded, without control characters, without contents of objects."""
    match value:
        case None | bool() | float():
            return value
        case enum.Enum():
            return safe(value.value, depth)
        case int():
            return int(value) if -(2**63) <= value < 2**63 else str(value)[:TEXT_MAX]
        case str():
            return _text(value)
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case BaseException():
            return _text(f"{type(value).__name__}: {value}")
        case datetime() | date():
            return value.isoformat()
        case UUID() | PurePath() | Decimal() | Fraction():
            return _text(str(value))
        case timedelta():
            return value.total_seconds()
        case Mapping() if depth < DEPTH_MAX:
            return {_text(str(name)): safe(member, depth + 1) for name, member in list(value.items())[:ITEMS_MAX]}
        case list() | tuple() | set() | frozenset() if depth < DEPTH_MAX:
            return [safe(member, depth + 1) for member in list(value)[:ITEMS_MAX]]
    return f"<{type(value).__qualname__}>"


def _text(text: str) -> str:
    if len(text) > TEXT_MAX:
        text = f"{text[:TEXT_MAX]}… ({len(text)} characters)"
    if text.isascii() and text.isprintable():
        return text
    return _UNSAFE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def trace(error: BaseException) -> str:
    """Format a traceback: no local variables, no control characters but the line breaks, bounded by TRACE_MAX."""
    text = "".join(traceback.TracebackException.from_exception(error, compact=True).format()).rstrip("\n")
    if len(text) > TRACE_MAX:
        text = "…" + text[-TRACE_MAX:]
    return "\n".join(_UNSAFE.sub(_escaped, line) for line in text.split("\n"))


def json_line(fields: Fields) -> bytes:
    """Render a line as one JSON object."""
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)


def console_line(*, colors: bool) -> Callable[[Fields], bytes]:
    """Return a renderer for people; traceback lines are indented, so that none of them can pass for a line of ours."""
    import structlog.dev  # noqa: PLC0415 - pulls in rich, which only a terminal needs

    renderer = structlog.dev.ConsoleRenderer(
        colors=colors, exception_formatter=structlog.dev.plain_traceback, pad_event_to=0
    )

    def render(fields: Fields) -> bytes:
        if "exception" in fields:
            fields["exception"] = "    | " + fields["exception"].replace("\n", "\n    | ")
        return (renderer(None, "", fields) + "\n").encode("utf-8", "backslashreplace")

    return render
