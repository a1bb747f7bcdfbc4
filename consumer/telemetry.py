"""Traces and error reports: whether they are wanted, and what makes them; without them, no module of theirs is loaded.

Both are extras and off unless the environment asks, by the names that every tool of their kind reads:

* **Traces** (``tierstream[tracing]``): ``OTEL_EXPORTER_OTLP_ENDPOINT`` or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` is
  set, or ``OTEL_TRACES_EXPORTER`` is ``otlp``. ``OTEL_SDK_DISABLED=true`` and ``OTEL_TRACES_EXPORTER=none`` win over
  all.
* **Error reports** (``tierstream[sentry]``): ``SENTRY_DSN`` is set.

Wanted and not installed, or not to be started, is a warning: nobody's records wait for their traces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from consumer.log import get_logger

if TYPE_CHECKING:
    from consumer.error_reports import ErrorReports
    from consumer.tracing import Tracing

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL: Final = "http/protobuf"
"""The one there is an exporter for."""

REPORTS_STOP_SECONDS: Final = 2.0
"""For the last error reports to be taken, after all else."""

log = get_logger(__name__)


def wants_traces(environment: Mapping[str, str]) -> bool:
    """Tell whether the environment asks for traces."""
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter == "none" or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    return exporter == "otlp" or any(environment.get(name) for name in ENDPOINTS)


def start_tracing(environment: Mapping[str, str], group_id: str) -> Tracing | None:
    """Start tracing where the environment asks for it; None where it does not, or where it cannot be had."""
    if not wants_traces(environment):
        return None
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), PROTOCOL)
    if protocol != PROTOCOL:
        log.warning("traces go out by another protocol than asked for", asked=protocol, used=PROTOCOL)
    try:
        from consumer.tracing import Tracing, exporting_provider  # noqa: PLC0415 - only where it is wanted

        return Tracing(exporting_provider(), group_id)
    except ModuleNotFoundError as error:
        log.warning("traces are wanted and cannot be made: pip install tierstream[tracing]", missing=error.name)
    except Exception as error:  # noqa: BLE001 - whatever a setting of others makes it raise, the service goes on
        log.warning("traces cannot be made", error=f"{type(error).__name__}: {error}")
    return None


def start_error_reports(environment: Mapping[str, str]) -> ErrorReports | None:
    """Start reporting what is unexpected where the environment names a place for it; None where it does not."""
    address = environment.get("SENTRY_DSN")
    if not address:
        return None
    try:
        from consumer.error_reports import ErrorReports  # noqa: PLC0415 - only where it is wanted

        return ErrorReports(address)
    except ModuleNotFoundError as error:
        log.warning("error reports are wanted and cannot be made: pip install tierstream[sentry]", missing=error.name)
    except Exception as error:  # noqa: BLE001 - as above; the text may repeat the address, which is a secret
        log.warning("error reports cannot be made", error=type(error).__name__)
    return None
