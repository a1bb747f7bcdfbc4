"""The admin port tells what is true now, to whoever asks politely; the others cannot harm the service."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from aiohttp import ClientSession, web
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from prometheus_client.registry import Collector

from consumer import admin, viewers
from consumer.admin import AdminServer
from consumer.metrics import Counts
from consumer.status_page import PAGE

ROUTES = ("/", "/healthz", "/readyz", "/metrics", "/debug/state")

WAIT_SECONDS = 10
"""Bound of every wait in these tests; none of them is a measure of anything."""


class Metrics(Collector):
    """One gauge, and the thread that collected it."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.fails = False

    def collect(self) -> Iterable[GaugeMetricFamily]:
        if self.fails:
            raise RuntimeError("CANARY-secret")
        self.thread = threading.get_ident()
        family = GaugeMetricFamily("tierstream_concurrency_limit", "Permits.")
        family.add_metric([], 500)
        return [family]


@dataclass
class Service:
    """What the port is built from, each part in reach."""

    state: dict[str, Any] = field(
        default_factory=lambda: {
            "state": "running",
            "limiter": {"limit": 500, "in_use": 0, "available": 500, "queued": 0},
            "partitions": [],
            "totals": Counts().totals(),
            "storage": None,
        }
    )
    reasons: list[str] = field(default_factory=list)
    snapshots: int = 0
    collector: Metrics = field(default_factory=Metrics)
    fails: bool = False

    def snapshot(self) -> dict[str, Any]:
        self.snapshots += 1
        if self.fails:
            raise RuntimeError("CANARY-secret")
        return self.state

    def readiness(self) -> tuple[bool, list[str]]:
        return not self.reasons, self.reasons

    def port(self, number: int = 0) -> AdminServer:
        registry = CollectorRegistry()
        registry.register(self.collector)
        return AdminServer("127.0.0.1", number, snapshot=self.snapshot, readiness=self.readiness, registry=registry)


@dataclass
class Answer:
    """One HTTP answer, read whole."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Client:
    """Asks one port."""

    port: int
    session: ClientSession

    async def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        url = f"http://127.0.0.1:{self.port}{path}"
        async with self.session.request(method, url, headers=headers, allow_redirects=False) as answer:
            return Answer(answer.status, dict(answer.headers), await answer.read())


@pytest.fixture
def service() -> Service:
    """A service that is well."""
    return Service()


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Client]:
    """A client of a port that is open."""
    server = service.port()
    async with ClientSession() as session:
        yield Client(await server.start(), session)
    await server.stop()


async def connect(port: int, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, and send what no HTTP library would."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    await writer.drain()
    return reader, writer


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Wait for the other side to close; True where it did, without an answer."""
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            return await reader.read() == b""
    except ConnectionResetError:
        return True


def web_server(server: AdminServer) -> web.Server:
    """The library's server behind a port, which knows the connections."""
    assert server._runner is not None
    assert server._runner.server is not None
    return server._runner.server


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close our side, whatever became of the other."""
    writer.transport.abort()
    await asyncio.sleep(0)


# --------------------------------------------------------------------------------------------- what is answered


async def test_every_route_answers_with_its_own_type(client: Client) -> None:
    """Contract 8: five addresses."""
    types = {route: (await client.ask(route)).headers["Content-Type"].partition(";")[0] for route in ROUTES}

    assert types == {
        "/": "text/html",
        "/healthz": "text/plain",
        "/readyz": "application/json",
        "/metrics": "text/plain",
        "/debug/state": "application/json",
    }


async def test_what_has_to_be_asked_for_elsewhere_is_waited_for() -> None:
    """Contract 8: one admin port for several processes answers as that of one does."""

    class Elsewhere(Service):
        async def later(self) -> dict[str, Any]:
            await asyncio.sleep(0)
            return self.state

        async def ready(self) -> tuple[bool, list[str]]:
            await asyncio.sleep(0)
            return False, ["process 2: draining"]

        async def collect(self) -> Iterable[GaugeMetricFamily]:
            await asyncio.sleep(0)
            return self.collector.collect()

    service = Elsewhere()
    server = AdminServer("127.0.0.1", 0, snapshot=service.later, readiness=service.ready, registry=service)
    async with ClientSession() as session:
        client = Client(await server.start(), session)
        state, ready, scraped = [await client.ask(path) for path in ("/debug/state", "/readyz", "/metrics")]
    await server.stop()

    assert orjson.loads(state.body) == service.state
    assert (ready.status, orjson.loads(ready.body)) == (503, {"ready": False, "reasons": ["process 2: draining"]})
    assert b"tierstream_concurrency_limit 500.0" in scraped.body


@pytest.mark.parametrize("path", ["/nothing", "/metrics/", "//", "/debug", "/debug/state/x", "/%2e%2e/etc/passwd"])
async def test_other_paths_are_not_found(client: Client, path: str) -> None:
    """No directory, no file, nothing beside the routes."""
    assert (await client.ask(path)).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_nothing_can_be_changed_through_the_port(client: Client, service: Service, method: str) -> None:
    """Contract 8: read-only; the answer says which methods there are, and nothing of the service was asked."""
    answers = [await client.ask(route, method) for route in ROUTES]

    assert {answer.status for answer in answers} == {405}
    assert {answer.headers["Allow"] for answer in answers} == {"GET,HEAD"}
    assert service.snapshots == 0


@pytest.mark.parametrize("route", ROUTES)
async def test_head_is_get_without_the_body(client: Client, route: str) -> None:
    """HTTP: the same status and headers."""
    got, headed = await client.ask(route), await client.ask(route, "HEAD")

    assert headed.body == b""
    assert headed.status == got.status
    assert {**headed.headers, "Date": ""} == {**got.headers, "Date": ""}


async def test_the_snapshot_is_told_as_it_is(client: Client, service: Service) -> None:
    """Contract 8: unknown numbers are null, texts are whatever they are."""
    service.state = {"state": "draining", "partitions": [{"topic": "ö", "lag": None, "position": 2**53 + 1}]}

    assert orjson.loads((await client.ask("/debug/state")).body) == service.state


async def test_readiness_has_a_status_and_all_reasons(client: Client, service: Service) -> None:
    """Contract 8: 200 where no reason is listed, else 503, with the same shape."""
    ready = await client.ask("/readyz")
    service.reasons = ["operations/3 at_capacity", "starting"]
    not_ready = await client.ask("/readyz")

    assert (ready.status, orjson.loads(ready.body)) == (200, {"ready": True, "reasons": []})
    assert (not_ready.status, orjson.loads(not_ready.body)) == (503, {"ready": False, "reasons": service.reasons})


async def test_liveness_depends_on_nothing(client: Client, service: Service) -> None:
    """Contract 8: a broker outage, or a snapshot that raises, must not restart every pod at once."""
    service.reasons = ["broker unreachable"]
    service.fails = service.collector.fails = True

    answer = await client.ask("/healthz")

    assert answer.status == 200
    assert service.snapshots == 0


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        (None, False),
        ("*/*", False),
        ("text/plain;version=0.0.4", False),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1", True),
        ("text/plain, Application/OpenMetrics-Text ;version=1.0.0", True),
        ("application/openmetrics-text;version=one", True),
        ("application/openmetrics-text;version=1.0.0;escaping=\x7f", True),
    ],
)
async def test_a_scrape_has_the_format_that_was_asked_for(
    client: Client, accept: str | None, openmetrics: bool
) -> None:
    """Contract 8: both formats are well-formed, also for an `Accept` that is not."""
    reader, writer = await connect(
        client.port,
        b"GET /metrics HTTP/1.0\r\n" + (f"Accept: {accept}\r\n".encode() if accept is not None else b"") + b"\r\n",
    )
    async with asyncio.timeout(WAIT_SECONDS):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    await hang_up(writer)

    if accept is not None and "\x7f" in accept:
        assert b" 400 " in head.splitlines()[0]  # no HTTP: the library's own business
        return
    assert b" 200 " in head.splitlines()[0]
    assert (b"application/openmetrics-text; version=1.0.0" in head) == openmetrics
    read: Callable[[str], Iterable[Any]] = parse_openmetrics if openmetrics else parse
    assert [(family.name, family.samples[0].value) for family in read(body.decode())] == [
        ("tierstream_concurrency_limit", 500)
    ]


async def test_samples_are_collected_where_the_counts_are_written(client: Client, service: Service) -> None:
    """Collecting in another thread would read a dictionary while the event loop changes it."""
    await client.ask("/metrics")

    assert service.collector.thread == threading.get_ident()


@pytest.mark.parametrize("path", ["/debug/state", "/metrics"])
async def test_a_part_that_raises_is_logged_and_not_shown(
    client: Client, service: Service, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The client learns nothing of the inside, the operator everything; the next request is answered."""
    service.fails = service.collector.fails = True
    failed = await client.ask(path)
    service.fails = service.collector.fails = False

    assert failed.status == 500
    assert b"CANARY" not in failed.body
    (record,) = caplog.records
    assert record.getMessage() == f"admin request failed path={path}"
    assert record.exc_info is not None
    assert (await client.ask(path)).status == 200


@pytest.mark.parametrize("path", [*ROUTES, "/nothing"])
async def test_every_answer_is_guarded(client: Client, path: str) -> None:
    """No sniffing, no framing, no caching, no other site; no software version."""
    headers = (await client.ask(path)).headers

    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert headers["Server"] == "tierstream"
    assert "Access-Control-Allow-Origin" not in headers


# --------------------------------------------------------------------------------------------- the page


async def test_the_page_may_run_its_own_script_and_style_and_nothing_else(client: Client) -> None:
    """A strict CSP: both inline elements are known by hash; nothing is allowed by place or kind."""
    answer = await client.ask("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    page = answer.body.decode()

    for element, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{element}[^>]*>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["Content-Security-Policy"]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    """It works in a cluster without a way out, and nothing outside learns that somebody looks."""
    addresses = set(re.findall(r"""(?:src|href|action)=["']([^"']*)""", PAGE))

    assert {address.partition(":")[0] for address in addresses} == {"data", *ROUTES[1:]}
    without_icon = re.sub(r'href="data:[^"]*"', "", PAGE)
    assert not re.findall(r"@import|url\(|import\(|//[a-z]+\.", without_icon)
    assert not re.findall(r"<[^>]*\s(?:on\w+|style)=", PAGE)


def test_the_script_runs_nothing_of_what_it_is_sent() -> None:
    """Topics, errors and keys are somebody else's texts: they are parsed where nothing runs, and nowhere else."""
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|createRange", PAGE)
    assert PAGE.count("DOMParser") == 1


async def test_the_page_has_what_is_true_now_in_it(client: Client, service: Service) -> None:
    """Contract 8: who has no script sees it too."""
    service.state["state"] = "draining"
    service.reasons = ["draining"]

    page = (await client.ask("/")).body.decode()

    assert 'class="chip warn">draining</span>' in page
    assert "not ready" in page


async def test_the_page_is_there_though_nothing_is_known(
    client: Client, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot that raises is logged; the page says so, and may do better by itself a moment later."""
    service.fails = True

    answer = await client.ask("/")

    assert answer.status == 200
    assert b"not known yet" in answer.body
    assert b"CANARY" not in answer.body
    assert caplog.records[0].getMessage() == "the status page has nothing to show yet"


async def test_windows_come_first(client: Client) -> None:
    """What is looked for most stands on top: permits and windows, then totals, storage and errors."""
    page = (await client.ask("/")).body.decode()
    places = [page.index(f'id="{name}-title"') for name in ("permits", "windows", "totals", "storage", "errors")]

    assert places == sorted(places)


# --------------------------------------------------------------------------------------------- the page, live


async def watch(port: int, *, buffer: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Watch the events, without an HTTP library that would read ahead; *buffer* is what the system takes for us."""
    loop, peer = asyncio.get_running_loop(), socket.socket()
    peer.setblocking(False)
    if buffer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    await loop.sock_connect(peer, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=peer, limit=4096 if buffer else 1 << 24)
    writer.write(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
    return reader, writer


async def next_event(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next event that says something."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not (line := await reader.readline()).startswith(b"data: "):
            assert line
    told: dict[str, Any] = orjson.loads(line[len(b"data: ") :])
    return told


async def test_events_say_what_the_page_says_again_and_again(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract 8: live; each event is the whole of it, for one look of all viewers."""
    monkeypatch.setattr(viewers, "INTERVAL_SECONDS", 0.01)
    reader, writer = await watch(client.port)

    first = await next_event(reader)
    service.state = {**service.state, "state": "draining"}
    while (later := await next_event(reader))["title"] == first["title"]:
        pass

    assert first["title"] == "running · tierstream"
    assert later["title"] == "draining · tierstream"
    assert 'class="chip good">running</span>' in first["contents"]
    assert 'class="chip warn">draining</span>' in later["contents"]
    await hang_up(writer)


async def test_events_are_announced_as_what_they_are(client: Client) -> None:
    """No proxy may keep them back, none may be stored; a HEAD ends at once."""
    reader, writer = await watch(client.port)
    async with asyncio.timeout(WAIT_SECONDS):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    headed = await client.ask("/events", "HEAD")

    for line in ("Content-Type: text/event-stream", "X-Accel-Buffering: no", "Cache-Control: no-store"):
        assert line in head
    assert headed.headers["Content-Type"] == "text/event-stream"
    assert (await client.ask("/events", "POST")).status == 405
    await hang_up(writer)


async def test_a_viewer_that_does_not_read_is_dropped_and_harms_nobody(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its events stay where they are until its time is over; others have theirs meanwhile."""
    monkeypatch.setattr(viewers, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(admin, "SEND_SECONDS", 0.2)
    service.state["storage"] = {"high_volume": "x" * 500_000}
    server = service.port()
    port = await server.start()
    slow_reader, slow = await watch(port, buffer=4096)
    reader, writer = await watch(port)

    async with asyncio.timeout(WAIT_SECONDS):
        while len(web_server(server).connections) < 2:
            await next_event(reader)
        while len(web_server(server).connections) > 1:
            await next_event(reader)
    (left,) = server._watched_by

    assert left.get_extra_info("peername") == writer.get_extra_info("sockname")
    await next_event(reader)
    for end in (slow, writer):
        await hang_up(end)
    assert slow_reader is not reader
    await server.stop()


async def test_a_viewer_that_leaves_is_forgotten(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed page costs nothing: the service is asked no more."""
    monkeypatch.setattr(viewers, "INTERVAL_SECONDS", 0.0)
    reader, writer = await watch(client.port)
    await next_event(reader)
    await hang_up(writer)
    async with asyncio.timeout(WAIT_SECONDS):
        before = -1
        while service.snapshots != before:
            before = service.snapshots
            await asyncio.sleep(0.05)


async def test_only_so_many_may_watch(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is asked to come back, and everything else is answered; a place that is free is given again."""
    monkeypatch.setattr(viewers, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(admin, "VIEWERS_MAX", 2)
    watching = [await watch(client.port) for _ in range(2)]
    for reader, _ in watching:
        await next_event(reader)

    refused = await client.ask("/events")
    page = await client.ask("/")
    await hang_up(watching[0][1])
    async with asyncio.timeout(WAIT_SECONDS):
        while (await client.ask("/events", "HEAD")).status == 503:
            pass

    assert (refused.status, page.status) == (503, 200)
    await hang_up(watching[1][1])


async def test_a_stop_shows_the_end_to_those_who_watch(service: Service) -> None:
    """The last event says that it is the end, so that a page knows a stop from a lost connection."""
    server = service.port()
    reader, writer = await watch(await server.start())
    await next_event(reader)
    service.state["state"] = "stopped"

    async with asyncio.timeout(WAIT_SECONDS):
        await server.stop()
        rest = (await reader.read()).decode()

    assert "stopped · tierstream" in rest
    assert rest.rstrip("\r\n0").endswith("event: end\ndata:")
    await hang_up(writer)


async def test_a_stop_does_not_wait_for_a_viewer_that_does_not_read(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port is closed within its time, whoever is still being told the end."""
    monkeypatch.setattr(viewers, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(admin, "EVENTS_END_SECONDS", 0.05)
    monkeypatch.setattr(admin, "STOP_SECONDS", 10 * WAIT_SECONDS)
    service.state["storage"] = {"high_volume": "x" * 500_000}
    server = service.port()
    _, writer = await watch(await server.start(), buffer=4096)
    async with asyncio.timeout(WAIT_SECONDS):
        while service.snapshots < 20:  # noqa: ASYNC110 - by then its buffers are full, of which nothing tells
            await asyncio.sleep(0.01)

        await server.stop()

    assert not server._watched_by
    await hang_up(writer)


# --------------------------------------------------------------------------------------------- slow and many clients


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_client_that_never_asks_is_dropped(
    service: Service, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Silent from the start, or in the middle of a request: both only hold a descriptor."""
    monkeypatch.setattr(admin, "IDLE_SECONDS", 0.05)
    server = service.port()
    reader, writer = await connect(await server.start(), sent)

    assert await is_closed(reader)

    await hang_up(writer)
    await server.stop()


async def drip(writer: asyncio.StreamWriter, dripped: bytes, closed: asyncio.Task[bool]) -> None:
    """Send *dripped*, again and again, until the other side has had enough."""
    with contextlib.suppress(ConnectionError):
        while not closed.done():
            writer.write(dripped)
            await writer.drain()
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    "begun", [b"GET /healthz?", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "], ids=["line", "field"]
)
async def test_a_request_that_goes_on_for_ever_has_a_deadline_all_the_same(
    service: Service, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    """A byte now and then is no sign of life: the request has to be whole in time (slow loris)."""
    monkeypatch.setattr(admin, "IDLE_SECONDS", 0.1)
    server = service.port()
    reader, writer = await connect(await server.start(), begun)
    closed = asyncio.create_task(is_closed(reader))

    await drip(writer, b"x", closed)

    assert await closed
    await hang_up(writer)
    await server.stop()


@pytest.mark.parametrize(
    "endless",
    [b"X-Many: y\r\n", b"x" * 1024],
    ids=["fields without number", "a field without end"],
)
async def test_a_request_has_a_size_beyond_which_it_is_refused(
    client: Client, service: Service, endless: bytes
) -> None:
    """Far below what would show in the memory of the process: refused before its time is over."""
    reader, writer = await connect(client.port, b"GET /debug/state HTTP/1.1\r\nHost: x\r\nX-First: ")
    answered = asyncio.create_task(reader.readline())
    sent = 0
    with contextlib.suppress(ConnectionError):
        while not answered.done() and sent < 1_000_000:
            writer.write(endless)
            await writer.drain()
            await asyncio.sleep(0)
            sent += len(endless)

    async with asyncio.timeout(WAIT_SECONDS):
        assert (await answered).startswith((b"HTTP/1.1 400", b"HTTP/1.1 431", b"HTTP/1.0 400"))
    assert sent < 200_000
    assert service.snapshots == 0
    await hang_up(writer)


async def test_a_body_without_end_is_not_read(client: Client, service: Service) -> None:
    """Nothing here takes a body: the answer comes at once, and the connection ends though the body does not."""
    head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    reader, writer = await connect(client.port, head)
    async with asyncio.timeout(WAIT_SECONDS):
        answer = await reader.readuntil(b"OK\n")
    closed = asyncio.create_task(is_closed(reader))

    await drip(writer, b"400\r\n" + b"x" * 1024 + b"\r\n", closed)

    assert b" 200 " in answer.splitlines()[0]
    assert await closed
    await hang_up(writer)


async def test_a_client_that_does_not_read_is_cut_off(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that stays in our buffers would keep connection and memory for ever."""
    monkeypatch.setattr(admin, "SEND_SECONDS", 0.05)
    service.state = {"storage": "x" * 32_000_000}  # more than the system's buffers take
    server = service.port()
    port = await server.start()
    loop = asyncio.get_running_loop()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        await loop.sock_connect(slow, ("127.0.0.1", port))
        await loop.sock_sendall(slow, b"GET /debug/state HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(WAIT_SECONDS):
            while service.snapshots == 0 or web_server(server).connections:  # noqa: ASYNC110 - aiohttp has no event for it
                await asyncio.sleep(0)

        received = 0
        with contextlib.suppress(ConnectionResetError):
            while some := await loop.sock_recv(slow, 1 << 20):
                received += len(some)
        assert received < 32_000_000  # what the system had taken; the rest was thrown away

    await server.stop()


async def test_an_answer_counts_as_taken_only_when_none_of_it_is_left_here(service: Service) -> None:
    """A transport with bytes to send closes only when they are gone: for a client that reads nothing, never."""
    server = service.port()
    reader, writer = await connect(await server.start(), b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"OK\n")
    (connection,) = web_server(server).connections
    assert isinstance(connection.transport, asyncio.Transport)

    assert connection.transport.get_write_buffer_limits() == (0, 0)
    await hang_up(writer)
    await server.stop()


async def test_the_oldest_connection_makes_room_for_a_new_one(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that opens connections and says nothing must not keep the probe out."""
    monkeypatch.setattr(admin, "CONNECTIONS_MAX", 4)
    server = service.port()
    port = await server.start()
    silent = [await connect(port) for _ in range(4)]

    reader, writer = await connect(port, b"GET /healthz HTTP/1.0\r\n\r\n")
    async with asyncio.timeout(WAIT_SECONDS):
        answer = await reader.read()
    others = [await connect(port) for _ in range(3)]
    oldest_closed = [await is_closed(silent[index][0]) for index in range(3)]

    assert b" 200 " in answer.splitlines()[0]
    assert oldest_closed == [True] * 3
    assert not others[-1][0].at_eof()
    for _, open_end in [*silent, (reader, writer), *others]:
        await hang_up(open_end)
    await server.stop()


async def test_a_scrape_that_takes_too_long_is_refused(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scraper hears of it before it gives up, and later scrapes are answered."""
    release = threading.Event()

    def slow(_registry: Any) -> bytes:
        release.wait(WAIT_SECONDS)
        return b""

    with monkeypatch.context() as patch:
        patch.setattr(admin, "SCRAPE_SECONDS", 0.02)
        patch.setattr(admin, "choose_encoder", lambda _accept: (slow, "text/plain"))
        refused = await client.ask("/metrics")
        release.set()

    assert refused.status == 503
    assert (await client.ask("/metrics")).status == 200


async def test_one_scrape_is_rendered_at_a_time(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Impatient scrapers must not take every thread of the process."""
    begun, release = threading.Event(), threading.Event()
    rendering: list[int] = []
    most: list[int] = []

    def slow(_registry: Any) -> bytes:
        rendering.append(1)
        most.append(len(rendering))
        begun.set()
        release.wait(WAIT_SECONDS)
        rendering.pop()
        return b""

    monkeypatch.setattr(admin, "choose_encoder", lambda _accept: (slow, "text/plain"))
    scrapes = [asyncio.create_task(client.ask("/metrics")) for _ in range(3)]
    assert await asyncio.to_thread(begun.wait, WAIT_SECONDS)
    assert (await client.ask("/healthz")).status == 200  # rendering is in nobody's way
    release.set()

    assert [answer.status for answer in await asyncio.gather(*scrapes)] == [200, 200, 200]
    assert most == [1, 1, 1]


async def test_what_is_no_http_is_refused(client: Client) -> None:
    """Whatever is sent to the port, it answers or closes, and goes on."""
    for sent in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 70_000):
        reader, writer = await connect(client.port, sent)
        async with asyncio.timeout(WAIT_SECONDS):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.") is bool(answer)
        assert b" 200 " not in answer
        await hang_up(writer)

    assert (await client.ask("/healthz")).status == 200


# --------------------------------------------------------------------------------------------- opening and closing


async def test_a_stopped_port_is_closed_with_all_its_connections(service: Service) -> None:
    """Idle connections do not hold up the stop; stopping twice is stopping once; it can be opened again."""
    server = service.port()
    port = await server.start()
    reader, writer = await connect(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"OK\n")

    await server.stop()
    await server.stop()

    assert await is_closed(reader)
    await hang_up(writer)
    with pytest.raises(ConnectionRefusedError):
        await connect(port)
    again = service.port(port)
    assert await again.start() == port
    await again.stop()
    assert await server.start() > 0
    await server.stop()


async def test_a_port_never_opened_can_be_stopped(service: Service) -> None:
    """Stopping is part of cleaning up after a start that never came to this."""
    await service.port().stop()


async def test_a_port_opens_once(service: Service) -> None:
    """A second listener would be forgotten and never closed."""
    server = service.port()
    await server.start()

    with pytest.raises(RuntimeError, match="open already"):
        await server.start()

    await server.stop()


async def test_an_address_in_use_leaves_nothing_behind(service: Service) -> None:
    """The caller hears of it, may stop, and may try again."""
    first, second = service.port(), service.port()
    port = await first.start()
    second = service.port(port)

    with pytest.raises(OSError, match="address already in use"):
        await second.start()
    await first.stop()

    assert await second.start() == port
    await second.stop()


async def test_a_request_under_way_may_end_before_the_port_closes(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last scrape of a process that stops is the one with the last counts."""
    begun, release = threading.Event(), threading.Event()

    def slow(_registry: Any) -> bytes:
        begun.set()
        release.wait(WAIT_SECONDS)
        return b"the last counts\n"

    monkeypatch.setattr(admin, "choose_encoder", lambda _accept: (slow, "text/plain"))
    server = service.port()
    reader, writer = await connect(await server.start(), b"GET /metrics HTTP/1.0\r\n\r\n")
    assert await asyncio.to_thread(begun.wait, WAIT_SECONDS)

    stopping = asyncio.create_task(server.stop())
    await asyncio.sleep(0)
    release.set()
    async with asyncio.timeout(WAIT_SECONDS):
        answer = await reader.read()
        await stopping

    assert answer.endswith(b"\r\n\r\nthe last counts\n")
    await hang_up(writer)


async def test_a_request_that_does_not_end_is_cut_off(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop is bounded by `STOP_SECONDS`, whoever is still being answered."""
    begun, release = threading.Event(), threading.Event()

    def stuck(_registry: Any) -> bytes:
        begun.set()
        release.wait(WAIT_SECONDS)
        return b"too late"

    monkeypatch.setattr(admin, "choose_encoder", lambda _accept: (stuck, "text/plain"))
    monkeypatch.setattr(admin, "STOP_SECONDS", 0.05)
    server = service.port()
    reader, writer = await connect(await server.start(), b"GET /metrics HTTP/1.0\r\n\r\n")
    assert await asyncio.to_thread(begun.wait, WAIT_SECONDS)

    async with asyncio.timeout(WAIT_SECONDS):
        await server.stop()

    assert await is_closed(reader)
    release.set()
    await hang_up(writer)
