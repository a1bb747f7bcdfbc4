"""The admin port: what is true now, for people, probes and Prometheus; read-only, and built from callables alone.

==================  ====================================================================================
``/``               status page: one HTML file, which asks for ``/debug/state`` every second
``/healthz``        200 while the event loop turns; not tied to Kafka, so that no broker outage restarts pods
``/readyz``         200 or 503 with ``{"ready": bool, "reasons": [str]}``
``/metrics``        Prometheus text, or OpenMetrics where ``Accept`` asks for it
``/debug/state``    the snapshot as JSON
==================  ====================================================================================

Everything else is 404, every method but GET and HEAD is 405, a callable that raises is 500 with the error in the log.

How it is kept from harming the service it watches:

1. A scrape is two steps: samples are *collected* on the event loop's thread, where the counts are written (a few
   milliseconds for a hundred partitions), and *rendered* in a thread, one scrape at a time.
2. Connections are bounded: beyond :data:`CONNECTIONS_MAX` they are refused, silent ones are dropped, idle ones closed.
   So neither a port scan nor a forgotten client takes the process's descriptors.
3. The page may run its own script and style, known by hash, and talk to this port; nothing else (CSP). Answers name no
   software version.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Final, TypeAlias

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder

from consumer.log import get_logger
from consumer.metrics import Snapshot

Readiness: TypeAlias = Callable[[], tuple[bool, list[str]]]
"""Returns whether the service is ready, and every reason why not."""

PAGE: Final = files("consumer").joinpath("status.html").read_text(encoding="utf-8")
"""Read once, at import: no file is opened on the event loop."""

CONNECTIONS_MAX: Final = 128
"""Two scrapers, a few probes and some open pages need a dozen; the usual limit of descriptors is 1,024."""
FIRST_REQUEST_SECONDS: Final = 10.0
"""A client that connects and has not sent a whole request by then is dropped."""
IDLE_SECONDS: Final = 75.0
"""Longer than the longest usual scrape interval (60 s), so that scrapers keep their connection."""
SCRAPE_SECONDS: Final = 8.0
"""Below Prometheus's usual timeout (10 s): the scraper hears 503 instead of nothing."""
STOP_SECONDS: Final = 2.0
"""The port is closed last, when all that matters is done; requests under way get this long, then they are cut off."""

_OPENMETRICS: Final = "application/openmetrics-text"
_JSON: Final = "application/json"

_COMMON_HEADERS: Final = {
    "Server": "tierstream",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_log = get_logger(__name__)


def _sources(element: str) -> str:
    """Return the CSP sources of every inline *element* of the page: its hash, nothing else."""
    contents = re.findall(rf"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


CONTENT_SECURITY_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        f"script-src {_sources('script')}",
        f"style-src {_sources('style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)


class AdminServer:
    """The admin port, from :meth:`start` to :meth:`stop`; it owns its socket and its connections, nothing else.

    Args:
        host: Address to listen on.
        port: 0 for any free port.
        snapshot: The state of the service, as JSON can hold it; called on the event loop.
        readiness: Called on the event loop, for every probe.
        registry: What ``/metrics`` shows.
    """

    def __init__(
        self, host: str, port: int, *, snapshot: Snapshot, readiness: Readiness, registry: CollectorRegistry
    ) -> None:
        self._host = host
        self._port = port
        self._snapshot = snapshot
        self._readiness = readiness
        self._registry = registry
        self._scraping = asyncio.Lock()
        self._http: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._silent: dict[web.RequestHandler, asyncio.TimerHandle] = {}
        """Connections that have not made a request yet, with the timer that drops them."""
        self._routes: dict[str, Callable[[web.BaseRequest], Awaitable[web.Response]]] = {
            "/": self._page,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics,
            "/debug/state": self._debug_state,
        }

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            OSError: the address is in use or not ours.
            RuntimeError: it listens already.

        Cancellation: nothing listens.
        """
        if self._listener is not None:
            raise RuntimeError("the admin port is open already")
        self._http = web.Server(
            self._answer,
            request_factory=_Request.of,
            access_log=None,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=1.0,
        )
        self._listener = await asyncio.get_running_loop().create_server(self._accept, self._host, self._port)
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def stop(self, timeout: float = STOP_SECONDS) -> None:
        """Close the port and every connection; requests under way may end first, for at most *timeout* seconds.

        May be called twice, and without :meth:`start`. Cancellation: the port is closed, connections may remain until
        the event loop ends.
        """
        listener, http = self._listener, self._http
        self._listener = self._http = None
        for timer in self._silent.values():
            timer.cancel()
        self._silent.clear()
        if listener is None or http is None:
            return
        listener.close()
        # One turn, so that requests already received have begun and are not mistaken for idle connections.
        await asyncio.sleep(0)
        http.pre_shutdown()
        await http.shutdown(timeout)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(listener.wait_closed(), timeout)

    # ------------------------------------------------------------------------------------------ connections

    def _accept(self) -> asyncio.Protocol:
        assert self._http is not None
        if len(self._http.connections) >= CONNECTIONS_MAX:
            return _Refusal()
        connection = self._http()
        self._silent[connection] = asyncio.get_running_loop().call_later(
            FIRST_REQUEST_SECONDS, self._drop_silent, connection
        )
        return connection

    def _drop_silent(self, connection: web.RequestHandler) -> None:
        self._silent.pop(connection, None)
        connection.force_close()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        """Answer one request, whatever happens."""
        timer = self._silent.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()
        route = self._routes.get(request.path)
        if route is None:
            return _plain(HTTPStatus.NOT_FOUND)
        if request.method not in {"GET", "HEAD"}:
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, Allow="GET, HEAD")
        try:
            return await route(request)
        except Exception:
            _log.exception("admin request failed", path=request.path)
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR)

    # ------------------------------------------------------------------------------------------ answers

    async def _page(self, _request: web.BaseRequest) -> web.Response:
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Frame-Options": "DENY"}
        return web.Response(text=PAGE, content_type="text/html", headers=headers)

    async def _healthz(self, _request: web.BaseRequest) -> web.Response:
        return _plain(HTTPStatus.OK)

    async def _readyz(self, _request: web.BaseRequest) -> web.Response:
        ready, reasons = self._readiness()
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return web.Response(status=status, body=orjson.dumps({"ready": ready, "reasons": reasons}), content_type=_JSON)

    async def _debug_state(self, _request: web.BaseRequest) -> web.Response:
        return web.Response(body=orjson.dumps(self._snapshot()), content_type=_JSON)

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        wanted = _OPENMETRICS if _prefers_openmetrics(request.headers.get("Accept", "")) else ""
        encode, content_type = choose_encoder(wanted)
        try:
            async with asyncio.timeout(SCRAPE_SECONDS), self._scraping:
                collected = _Collected(self._registry.collect())
                body = await asyncio.to_thread(encode, collected)
        except TimeoutError:
            return _plain(HTTPStatus.SERVICE_UNAVAILABLE)
        return web.Response(body=body, headers={"Content-Type": content_type})


class _Request(web.BaseRequest):
    """A request whose answer has our headers, also where the request was no HTTP and aiohttp answers by itself."""

    @classmethod
    def of(cls, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> _Request:
        """Make a request as :class:`web.Server` asks for it."""
        return cls(message, payload, protocol, writer, task, task.get_loop())

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        response.headers.update(_COMMON_HEADERS)


class _Refusal(asyncio.Protocol):
    """Closes a connection that is one too many, before a byte is read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Reset the connection."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.abort()


class _Collected:
    """Families already collected, in the form of the registry that the encoders ask for them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        """Return the families; safe in any thread, as nothing changes them."""
        return self._families


def _plain(status: HTTPStatus, **headers: str) -> web.Response:
    return web.Response(status=status, text=f"{status.phrase}\n", headers=headers)


def _prefers_openmetrics(accept: str) -> bool:
    """Read ``Accept``: OpenMetrics only where it is named, and not named after plain text."""
    openmetrics, text = _quality(accept, _OPENMETRICS), _quality(accept, "text/plain")
    return openmetrics > 0.0 and openmetrics >= text


def _quality(accept: str, media_type: str) -> float:
    """Return the highest ``q`` of *media_type* in *accept*, 0 where it is absent or its ``q`` is no number."""
    found = 0.0
    for entry in accept.split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        if name == media_type:
            given = next((part[2:] for part in parameters if part.startswith("q=")), "1")
            with contextlib.suppress(ValueError):
                found = max(found, float(given))
    return found
