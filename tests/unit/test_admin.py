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

from consumer import admin, metrics
from consumer.admin import AdminServer

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

    state: dict[str, Any] = field(default_factory=lambda: {"state": "running", "partitions": [], "storage": None})
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
    addresses = set(re.findall(r"""(?:src|href|action)=["']([^"']*)""", admin.PAGE))

    assert {address.partition(":")[0] for address in addresses} == {"data", *ROUTES[1:]}
    without_icon = re.sub(r'href="data:[^"]*"', "", admin.PAGE)
    assert not re.findall(r"@import|url\(|import\(|//[a-z]+\.", without_icon)
    assert not re.findall(r"<[^>]*\s(?:on\w+|style)=", admin.PAGE)


def test_the_page_cannot_turn_a_text_into_markup() -> None:
    """Topics, errors and keys are somebody else's texts."""
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(", admin.PAGE)


def test_the_page_reads_what_the_snapshot_has() -> None:
    """Contract 8: a field that the page asks for under another name would be a dash for ever."""
    of = {
        "state": {*metrics.DebugState.__annotations__},
        "partition": {*metrics.PartitionState.__annotations__},
        "operation": {*metrics.OldestState.__annotations__},
    }
    read: dict[str, set[str]] = {name: set(re.findall(rf"\b{name}\.([a-z_]+)\b(?!\()", admin.PAGE)) for name in of}

    assert read["partition"] >= {"window", "in_flight", "paused_for", "lag", "oldest"}
    assert read["state"] - {"ok", "json", "status"} <= of["state"]
    assert read["partition"] <= of["partition"]
    assert read["operation"] <= of["operation"]
    totals = re.search(r"const TOTALS = (.*?);", admin.PAGE, re.DOTALL)
    assert totals
    assert set(re.findall(r'\["(\w+)"', totals[1])) == {*metrics.Totals.__annotations__}


def test_the_page_shows_windows_first() -> None:
    """What is looked for most stands on top: the windows, then totals, then storage."""
    places = [admin.PAGE.index(f'id="{name}"') for name in ("limiter-text", "partitions", "totals", "storage")]

    assert places == sorted(places)


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
