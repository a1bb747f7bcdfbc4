"""The edge to Google's client: imported late, closed in time, its credentials and its absence explained."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import grpc
import pytest
from google.auth.credentials import AnonymousCredentials

from consumer import BigtableBackend, BigtableChangeLog
from consumer.config import CELL_BYTES_MAX, load
from consumer.errors import BackendUnavailable, ConfigError
from consumer.ids import ObjectContext, ObjectId
from consumer.storage import bigtable_table
from consumer.storage.bigtable_table import (
    WRITES_AT_ONCE,
    BigtableTable,
    TableName,
    _channel,
    _Connection,
    _Writes,
    delete_row,
    vendor,
    wire_kinds,
)
from consumer.storage.factory import make_change_log, make_high_volume

ROOT = Path(__file__).parents[2]

AN_ID = ObjectId(ObjectContext("u"), "k")


def test_the_names_cost_nothing_until_they_are_used() -> None:
    """Contract 10: heavy clients only on use, the health check and `--help` never pay for them."""
    program = (
        "import sys; from consumer import BigtableBackend, BigtableChangeLog;"
        "import consumer.storage.factory;"
        "sys.exit(any(name.partition('.')[0] in {'google', 'grpc'} for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("make", [BigtableBackend, BigtableChangeLog])
def test_without_the_client_the_error_says_what_to_install(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract 11: configuration."""
    vendor.cache_clear()
    monkeypatch.setitem(sys.modules, "google.cloud.bigtable", None)
    with pytest.raises(ConfigError, match=r"pip install tierstream\[bigtable\]"):
        make("p", "i", "t")
    vendor.cache_clear()


@pytest.fixture
def storage_section(tmp_path: Path) -> Any:
    """Return a configuration's section of storage, read from a file."""
    section = "{type: bigtable, project: p, instance: i, table: t, emulator_host: 'h:1', app_profile: a"
    file = tmp_path / "c.yaml"
    file.write_text(f"storage:\n  high_volume: {section}}}\n  change_log: {section}, owner: me, lease: 7s}}\n")
    return load(file, {}).storage


async def test_sections_of_the_configuration_become_backends(storage_section: Any) -> None:
    """Contract 5: all settings arrive."""
    backend, log = make_high_volume(storage_section.high_volume), make_change_log(storage_section.change_log)

    assert isinstance(backend, BigtableBackend)
    assert isinstance(log, BigtableChangeLog)
    assert backend.inline_bytes_max == CELL_BYTES_MAX["bigtable"]
    assert backend._table._name == log._table._name == TableName("p", "i", "t", "h:1", "a")
    assert (log.owner, log._lease_micros) == ("me", 7_000_000)
    await log.close()
    await backend.close()


async def test_credentials_that_are_missing_are_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text says where they may come from."""
    from google import auth

    def none_found() -> Any:
        raise auth.exceptions.DefaultCredentialsError("a path")

    monkeypatch.delenv("BIGTABLE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(auth, "default", none_found)
    with pytest.raises(ConfigError, match="GOOGLE_APPLICATION_CREDENTIALS") as raised:
        await BigtableBackend("p", "i", "t").get_tiered(AN_ID)
    assert "a path" not in str(raised.value)


async def test_credentials_that_do_not_come_in_time_are_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metadata server that hangs; the event loop is not blocked meanwhile."""
    from google import auth

    let_go = threading.Event()
    monkeypatch.delenv("BIGTABLE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(auth, "default", let_go.wait)
    monkeypatch.setattr(bigtable_table, "CONNECT_SECONDS", 0.01)
    with pytest.raises(BackendUnavailable, match="in time"):
        await BigtableBackend("p", "i", "t").get_tiered(AN_ID)
    let_go.set()


class HangingClient:
    """A client whose connection does not close."""

    async def close(self, **_limits: float) -> None:
        await asyncio.Event().wait()


class Exporter:
    """What exports metrics; ending it blocks."""

    def __init__(self) -> None:
        self.closed_in: list[int] = []

    def close(self) -> None:
        self.closed_in.append(threading.get_ident())


class IdleTable:
    """A table with nothing to let go of."""

    read_row = read_rows = None

    async def close(self) -> None:
        return None


def connected(client: Any) -> BigtableTable:
    """Return a table that holds *client*."""
    table = BigtableTable(TableName("p", "i", "t"), {})
    table._connection = _Connection(client, IdleTable(), _Writes("t", None, None, "127.0.0.1:1"))
    return table


async def test_closing_a_connection_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping has its time; a second close finds nothing to do."""
    monkeypatch.setattr(bigtable_table, "CLOSE_SECONDS", 0.01)
    table = connected(HangingClient())
    async with asyncio.timeout(20):
        await table.close()
        await table.close()


async def test_what_exports_metrics_is_ended_in_a_thread() -> None:
    """It sends a last request, and waits for it up to 30 s."""
    exporter = Exporter()

    class Client:
        _metrics = SimpleNamespace(handlers=[exporter])

        async def close(self, **_limits: float) -> None:
            for handler in self._metrics.handlers:
                handler.close()

    await connected(Client()).close()

    assert len(exporter.closed_in) == 1
    assert exporter.closed_in != [threading.get_ident()]


AT_ONCE = 150
"""Writes that need a second connection."""


class WritesHeld:
    """A server whose answers to conditional writes wait; it remembers what came with each, and on which connection."""

    def __init__(self) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()
        self.headers: list[dict[str, str]] = []
        self.by_connection: Counter[str] = Counter()
        self.all_there = asyncio.Event()
        """As many as :data:`AT_ONCE`."""
        self.given_up = asyncio.Event()
        """A caller waits no more."""
        self.answered = 0

    async def answer(self, _request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self.reached.set()
        self.headers.append({name: str(value) for name, value in context.invocation_metadata() or ()})
        self.by_connection[context.peer()] += 1
        if self.by_connection.total() == AT_ONCE:
            self.all_there.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.given_up.set()
            raise
        self.answered += 1
        return b""


@pytest.fixture
async def writes_held() -> AsyncIterator[tuple[WritesHeld, _Writes]]:
    """Lend such a server, and what sends writes to it."""
    held, server = WritesHeld(), grpc.aio.server()
    untyped: Any = grpc
    handler = untyped.unary_unary_rpc_method_handler(held.answer)
    service = untyped.method_handlers_generic_handler("google.bigtable.v2.Bigtable", {"CheckAndMutateRow": handler})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    writes = _Writes("projects/p/instances/i/tables/t/1", "profile", None, f"127.0.0.1:{port}")
    yield held, writes
    held.go_on.set()
    await writes.close()
    await server.stop(0)


def a_write() -> Any:
    """Return a conditional write, as it is sent."""
    return wire_kinds().CheckAndMutate(table_name="t", row_key=b"k", true_mutations=[delete_row()])


async def test_writes_fill_one_connection_before_they_use_the_next(writes_held: tuple[WritesHeld, _Writes]) -> None:
    """Google's servers take 100 requests at a time on each; what is sent together travels together."""
    held, writes = writes_held
    request = a_write()
    at_once = [asyncio.create_task(writes.check_and_mutate_row(request)) for _ in range(AT_ONCE)]
    async with asyncio.timeout(30):
        await held.all_there.wait()
    assert sorted(held.by_connection.values()) == [AT_ONCE - WRITES_AT_ONCE, WRITES_AT_ONCE]
    held.go_on.set()

    assert await asyncio.gather(*at_once) == [False] * AT_ONCE
    await writes.check_and_mutate_row(request)
    assert max(held.by_connection.values()) == WRITES_AT_ONCE + 1, "the first one has room again"


async def test_a_cancelled_write_is_waited_for(writes_held: tuple[WritesHeld, _Writes]) -> None:
    """What its caller does next finds what became of it, instead of being overtaken by it."""
    held, writes = writes_held
    write = asyncio.create_task(writes.check_and_mutate_row(a_write()))
    async with asyncio.timeout(30):
        await held.reached.wait()
    write.cancel()
    for _ in range(10):
        await asyncio.sleep(0.001)
    assert not write.done()
    assert writes._lines[0].on_the_way == 1

    held.go_on.set()
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await write
    assert held.answered == 1
    assert writes._lines[0].on_the_way == 0


async def test_a_cancelled_write_is_not_waited_for_for_ever(
    writes_held: tuple[WritesHeld, _Writes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not answer holds up nobody's stop; the request is given up then."""
    held, writes = writes_held
    monkeypatch.setattr(bigtable_table, "SETTLE_SECONDS", 0.01)
    write = asyncio.create_task(writes.check_and_mutate_row(a_write()))
    async with asyncio.timeout(30):
        await held.reached.wait()
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
        await held.given_up.wait()
    assert writes._lines[0].on_the_way == 0


async def test_writes_say_what_they_are_routed_by(writes_held: tuple[WritesHeld, _Writes]) -> None:
    """As Google's client has it: without it a request takes a longer way, or none."""
    held, writes = writes_held
    held.go_on.set()
    await writes.check_and_mutate_row(a_write())

    routing = held.headers[0]["x-goog-request-params"]
    assert parse_qs(routing) == {"table_name": ["projects/p/instances/i/tables/t/1"], "app_profile_id": ["profile"]}


async def test_credentials_and_encryption_where_it_is_not_an_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The channel of Google's own transport, to Google's own address."""
    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(grpc.aio, "secure_channel", lambda target, credentials, **_: made.append((target, credentials)))
    _channel(AnonymousCredentials(), None)

    ((target, credentials),) = made
    assert target == "bigtable.googleapis.com"
    assert isinstance(credentials, grpc.ChannelCredentials)
