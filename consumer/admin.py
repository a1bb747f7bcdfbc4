"""The admin port: what is true now, for people, probes and Prometheus; read-only, and built from callables alone.

Each callable answers at once, or, where what it tells has to be asked for elsewhere, with an awaitable that bounds its
own time.

==================  ====================================================================================
``/``               status page: one HTML file, with what is true now in it, and a script that watches ``/events``
``/events``         what the page shows, again once a second, as server-sent events
``/healthz``        200 while the event loop turns; not tied to Kafka, so that no broker outage restarts pods
``/readyz``         200 or 503 with ``{"ready": bool, "reasons": [str]}``
``/metrics``        Prometheus text, or OpenMetrics where ``Accept`` names it
``/debug/state``    the snapshot as JSON
==================  ====================================================================================

Everything else is 404, every method but GET and HEAD is 405, a callable that raises is 500 with the error in the log.

How it is kept from harming the service it watches:

1. A scrape is two steps: samples are *collected* on the event loop's thread, where the counts are written (a few
   milliseconds for a hundred partitions), and *rendered* in a thread, one scrape at a time.
2. Connections are bounded: one beyond :data:`CONNECTIONS_MAX` takes the place of the oldest, so that neither a port
   scan nor a forgotten client takes the process's descriptors, or keeps a probe out and gets the pod restarted.
3. Slow clients are cut off: who sends no whole request within :data:`IDLE_SECONDS`, who does not take an answer, or one
   event, within :data:`SEND_SECONDS`.
4. Whoever watches ``/events`` shares one look a second with all others (:mod:`consumer.viewers`), rendered in a thread;
   nothing is kept for a slow one, and at most :data:`VIEWERS_MAX` may watch.
5. The page may run its own script and style, known by hash, and talk to this port; nothing else (CSP).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from http import HTTPStatus
from inspect import isawaitable
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import orjson
from aiohttp import web
from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder

from consumer.log import get_logger
from consumer.status_page import PAGE, Speedometer, View, contents, page, title
from consumer.viewers import LOOK_SECONDS, Viewers

_Told = TypeVar("_Told")

Told: TypeAlias = _Told | Awaitable[_Told]
"""An answer, now or soon."""

Snapshot: TypeAlias = Callable[[], Told[Mapping[str, Any]]]
"""Returns a :class:`~consumer.metrics.DebugState`."""

Readiness: TypeAlias = Callable[[], Told[tuple[bool, list[str]]]]
"""Returns whether the service is ready, and every reason why not."""


class Families(Protocol):
    """What ``/metrics`` shows; a registry of prometheus_client is one."""

    def collect(self) -> Told[Iterable[Metric]]:
        """Return the families with the samples of now."""

_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

CONNECTIONS_MAX: Final = 128
"""Two scrapers, a few probes and some open pages need a dozen; the usual limit of descriptors is 1,024. Connections
that arrive in the same turn of the event loop (at most :data:`BACKLOG`) may exceed it until the next turn."""
BACKLOG: Final = 32
"""Connections the system keeps until they are accepted, and most that are accepted in one turn."""
IDLE_SECONDS: Final = 75.0
"""Longer than the longest usual scrape interval (60 s), so that scrapers keep their connection."""
SEND_SECONDS: Final = 10.0
"""Prometheus gives up after 10 s; who reads more slowly than that is no scraper, probe or page."""
SCRAPE_SECONDS: Final = 8.0
"""Below Prometheus's usual timeout (10 s): the scraper hears 503 instead of nothing."""
VIEWERS_MAX: Final = 16
"""A team that looks at an incident together; what is beyond is asked to come back."""
EVENTS_BUFFER_BYTES: Final = 65_536
"""What the system keeps for a viewer that does not read: a few events. By itself it would keep megabytes, minutes of
them, before anybody noticed."""
STOP_SECONDS: Final = 2.0
"""The port is closed last, when all that matters is done; requests under way get this long, then they are cut off."""
EVENTS_END_SECONDS: Final = 0.5
"""Before that, for the viewers' last event."""

_OPENMETRICS: Final = "application/openmetrics-text"
_JSON: Final = "application/json"

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

_HEADERS: Final = {
    "Server": "tierstream",
    "Cache-Control": "no-store",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""On every answer to an HTTP request; what is no HTTP gets the library's plain 400."""


class AdminServer:
    """The admin port, from :meth:`start` to :meth:`stop`; it owns its socket and its connections, nothing else.

    Args:
        host: Address to listen on.
        port: 0 for any free port.
        snapshot: The state of the service, as JSON can hold it; called on the event loop.
        readiness: Called on the event loop, for every probe.
        registry: What ``/metrics`` shows; collected on the event loop.
    """

    def __init__(
        self, host: str, port: int, *, snapshot: Snapshot, readiness: Readiness, registry: Families
    ) -> None:
        self._host = host
        self._port = port
        self._snapshot = snapshot
        self._readiness = readiness
        self._registry = registry
        self._scraping = asyncio.Lock()
        self._viewers = Viewers(self._look)
        self._speedometer = Speedometer()
        self._watched_by: set[asyncio.Transport] = set()
        self._nobody_watches = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self._listener: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            OSError: the address is in use or not ours.
            RuntimeError: it listens already.

        Cancellation: nothing listens; :meth:`stop` may be called.
        """
        if self._runner is not None:
            raise RuntimeError("the admin port is open already")
        application = web.Application(middlewares=[_answer])
        application.on_response_prepare.append(_put_headers)
        application.router.add_get("/", self._page)
        application.router.add_get("/events", self._events)
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/debug/state", self._debug_state)
        self._runner = web.AppRunner(
            application,
            access_log=None,
            keepalive_timeout=IDLE_SECONDS,
            lingering_time=1.0,
            shutdown_timeout=STOP_SECONDS,
        )
        try:
            await self._runner.setup()
            assert self._runner.server is not None
            # Not `web.TCPSite`, which gives no say in how many connections there may be.
            self._listener = await asyncio.get_running_loop().create_server(
                partial(_accept, self._runner.server), self._host, self._port, backlog=BACKLOG
            )
        except BaseException:
            await self.stop()
            raise
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        """Close the port and every connection; requests under way may end first, for :data:`STOP_SECONDS`.

        May be called twice, and without :meth:`start`. Cancellation: the port is closed, connections may remain until
        the event loop ends.
        """
        listener, runner = self._listener, self._runner
        self._listener = self._runner = None
        if listener is not None:
            listener.close()
            # Connections that were just accepted are made in the next turn, and only then known to the runner.
            await asyncio.sleep(0)
        await self._end_events()
        if runner is not None:
            await runner.cleanup()
        if listener is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(listener.wait_closed(), STOP_SECONDS)

    # ------------------------------------------------------------------------------------------ answers

    async def _page(self, _request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                html = await asyncio.to_thread(page, await self._view(Speedometer()))
        except Exception:  # noqa: BLE001 - whatever it is, it is logged, and the page may do better by itself
            _log.exception("the status page has nothing to show yet")
            html = page(None)
        return web.Response(text=html, content_type="text/html")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if len(self._watched_by) >= VIEWERS_MAX:
            return _plain(HTTPStatus.SERVICE_UNAVAILABLE)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        transport = request.transport
        if request.method == "HEAD" or transport is None:
            return response
        connection = transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, EVENTS_BUFFER_BYTES)
        self._watched_by.add(transport)
        try:
            async with contextlib.aclosing(self._viewers.frames()) as frames:
                await response.prepare(request)
                async for frame in frames:
                    async with asyncio.timeout(SEND_SECONDS):
                        await response.write(frame)
            async with asyncio.timeout(SEND_SECONDS):
                await response.write(b"event: end\ndata:\n\n")
        except (TimeoutError, ConnectionError):  # the viewer does not read, or has left
            transport.abort()
        finally:
            self._watched_by.discard(transport)
            if not self._watched_by:
                self._nobody_watches.set()
        return response

    async def _end_events(self) -> None:
        """Let all viewers go: with their last event where they take it at once."""
        await self._viewers.close()
        if self._watched_by:
            self._nobody_watches.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nobody_watches.wait(), EVENTS_END_SECONDS)
        for transport in self._watched_by:
            transport.abort()
        self._viewers = Viewers(self._look)

    async def _look(self) -> bytes:
        """Return what the page shows now as one event."""
        view = await self._view(self._speedometer)
        return await asyncio.to_thread(_event, view)

    async def _view(self, speedometer: Speedometer) -> View:
        state = await _told(self._snapshot())
        ready, reasons = await _told(self._readiness())
        return View(state, ready, reasons, speedometer.look(state, time.monotonic()), time.time())

    async def _healthz(self, _request: web.Request) -> web.Response:
        return _plain(HTTPStatus.OK)

    async def _readyz(self, _request: web.Request) -> web.Response:
        ready, reasons = await _told(self._readiness())
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return web.Response(status=status, body=orjson.dumps({"ready": ready, "reasons": reasons}), content_type=_JSON)

    async def _debug_state(self, _request: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(await _told(self._snapshot())), content_type=_JSON)

    async def _metrics(self, request: web.Request) -> web.Response:
        # The encoder is not given the header itself: a version that is no number in it is an exception there.
        named = {entry.partition(";")[0].strip().lower() for entry in request.headers.get("Accept", "").split(",")}
        encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS in named else "")
        try:
            async with asyncio.timeout(SCRAPE_SECONDS), self._scraping:
                collected = _Collected(await _told(self._registry.collect()))
                body = await asyncio.to_thread(encode, collected)
        except TimeoutError:
            return _plain(HTTPStatus.SERVICE_UNAVAILABLE)
        return web.Response(body=body, headers={"Content-Type": content_type})


def _event(view: View) -> bytes:
    return b"data: " + orjson.dumps({"title": title(view), "contents": contents(view)}) + b"\n\n"


class _Collected:
    """Families already collected, in the form of the registry that the encoders ask for them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> list[Metric]:
        """Return the families; safe in any thread, as nothing changes them."""
        return self._families


async def _told(answer: Told[_Told]) -> _Told:
    return await answer if isawaitable(answer) else answer


@web.middleware
async def _answer(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer one request, whatever happens, and see to it that the answer is taken."""
    if request.transport is not None:
        # Nothing of the answer may stay behind in a buffer of ours: a transport closes only once that is empty.
        request.transport.set_write_buffer_limits(high=0)
    try:
        response = await handler(request)
    except web.HTTPException as refusal:
        response = _plain(HTTPStatus(refusal.status), allow=refusal.headers.get("Allow"))
    except Exception:  # noqa: BLE001 - whatever it is, it is logged and the port goes on answering
        _log.exception("admin request failed", path=request.path)
        response = _plain(HTTPStatus.INTERNAL_SERVER_ERROR)
    transport = request.transport
    if transport is None:  # the client is gone, which aiohttp finds out when it sends
        return response
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await response.prepare(request)
            await response.write_eof()
    except (TimeoutError, ConnectionError):
        transport.abort()
    except asyncio.CancelledError:
        transport.abort()
        raise
    return response


def _accept(server: web.Server) -> asyncio.Protocol:
    """Make the protocol of a new connection; the oldest go where there are too many."""
    connections = server.connections  # in the order they were made
    for oldest in connections[: max(0, len(connections) + 1 - CONNECTIONS_MAX)]:
        oldest.force_close()
    return server()


async def _put_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def _plain(status: HTTPStatus, allow: str | None = None) -> web.Response:
    return web.Response(status=status, text=f"{status.phrase}\n", headers={"Allow": allow} if allow else None)
