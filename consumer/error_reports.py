"""Error reports to Sentry: the unexpected and nothing else, and of that only what cannot hold a key or a payload.

What is reported is what the log says of it: a line of ours, or of the event loop, at ERROR or above that carries an
exception.

* CRITICAL: the process ends with 3, whatever the exception is; the watchdog's trips are among them.
* ERROR: an exception that is not one of ours: a defect. A panicking operation is one of these.
* One of ours at ERROR is expected to happen (storage is away, a record is poison), and is for metrics and alerts.

A report is built here, field by field, and is not what the SDK would collect: the constant text of the line, the topic
and partition in it, the classes of the exception and its causes, and the functions and lines it came through. No local
variables, no source, no breadcrumbs, no environment. The text of an exception is left out unless its class is ours,
since texts of ours are safe to show (:class:`~consumer.errors.TierstreamError`); a panic's repeats somebody else's.

The same line with the same exception is reported :data:`REPORTS_A_MINUTE` times a minute. Reports wait for their
delivery in the SDK's bounded queue; nothing here waits for it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import sentry_sdk
from sentry_sdk.transport import Transport
from sentry_sdk.types import Event as Report

from consumer.errors import OperationPanic, TierstreamError
from consumer.log import ROOT_LOGGER, Event, Repeats, safe

REPORTS_A_MINUTE: Final = 5
"""Of one kind; a defect that every record meets is known after the first."""

FRAMES_MAX: Final = 100
"""Of one exception, the innermost ones: an endless recursion has a thousand."""

CAUSES_MAX: Final = 8

FIELDS: Final = ("topic", "partition", "epoch", "kind", "code", "step", "process")
"""What of a line's fields is told: names and numbers of ours, bounded."""


class ErrorReports:
    """Reports what is unexpected, from now until :meth:`stop`.

    Args:
        address: Where reports go: a DSN.
        transport: Takes reports instead, in tests.

    Raises:
        sentry_sdk.utils.BadDsn: *address* is none.
    """

    def __init__(self, address: str, *, transport: Callable[[Any], Transport] | Transport | None = None) -> None:
        self._client = sentry_sdk.Client(
            dsn=address,
            transport=transport,  # type: ignore[arg-type]  # an instance is taken too
            release=f"tierstream@{metadata.version('tierstream')}",
            default_integrations=False,
            auto_enabling_integrations=False,
            auto_session_tracking=False,
            send_client_reports=False,
            include_local_variables=False,
            include_source_context=False,
            max_breadcrumbs=0,
        )
        self._handler = _Listener(self._client)
        logging.getLogger().addHandler(self._handler)

    def stop(self, seconds: float) -> None:
        """Report nothing more, and wait *seconds* at most for what is on its way. Blocks."""
        logging.getLogger().removeHandler(self._handler)
        self._client.close(timeout=seconds)


class _Listener(logging.Handler):
    """Hears every line of the process, and reports the unexpected ones."""

    def __init__(self, client: Any) -> None:
        super().__init__(logging.ERROR)
        self._client = client
        self._repeats = Repeats()

    def emit(self, record: logging.LogRecord) -> None:
        """Report *record* if it is unexpected; what fails in that is nobody's trouble."""
        try:
            error = unexpected(record)
            if error is not None:
                list(self._repeats.due())
                kind = (record.name, record.levelno, f"{_text(record)} {type(error).__qualname__}")
                if self._repeats.admits(kind, REPORTS_A_MINUTE):
                    self._client.capture_event(report(record, error))
        except Exception:  # noqa: BLE001 - a report must never be what stops the service
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say nothing: a line about a line would be heard here as well."""


def unexpected(record: logging.LogRecord) -> BaseException | None:
    """Return the exception of a line that is to be reported, None where it is not."""
    own = record.name.partition(".")[0]
    error = record.exc_info[1] if record.exc_info else None
    if error is None or own not in {ROOT_LOGGER, "asyncio"} or record.levelno < logging.ERROR:
        return None
    expected = isinstance(error, TierstreamError) and not isinstance(error, OperationPanic)
    return None if expected and record.levelno < logging.CRITICAL else error


def report(record: logging.LogRecord, error: BaseException) -> Report:
    """Return the report of a line and its exception."""
    fields = record.msg.fields if isinstance(record.msg, Event) else {}
    return {
        "level": "fatal" if record.levelno >= logging.CRITICAL else "error",
        "logger": record.name,
        "message": _text(record),
        "tags": {name: str(safe(fields[name])) for name in FIELDS if name in fields},
        "exception": {"values": [_shown(one) for one in reversed(list(_chain(error)))]},
    }


def _text(record: logging.LogRecord) -> str:
    """Return what a line says, without what varies: the loop's own texts hold the contents of tasks."""
    return record.msg.text if isinstance(record.msg, Event) else "the event loop reports an exception"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and what it came from."""
    one: BaseException | None = error
    for _ in range(CAUSES_MAX):
        if one is None:
            return
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _shown(error: BaseException) -> dict[str, Any]:
    kind = type(error)
    ours = kind.__module__.partition(".")[0] == ROOT_LOGGER and not isinstance(error, OperationPanic)
    frames = [
        {
            "function": frame.f_code.co_name,
            "module": frame.f_globals.get("__name__"),
            "filename": Path(frame.f_code.co_filename).name,
            "lineno": line,
            "in_app": str(frame.f_globals.get("__name__")).partition(".")[0] == ROOT_LOGGER,
        }
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return {
        "type": kind.__qualname__,
        "module": kind.__module__,
        "value": str(error) if ours else "",
        "stacktrace": {"frames": frames[-FRAMES_MAX:]},
    }
