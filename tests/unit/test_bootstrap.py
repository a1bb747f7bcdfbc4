"""An address that says nothing costs a client a moment, where there is another one (H30)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaConnectionError

from consumer.config import Config, Kafka
from consumer.kafka import bootstrap
from consumer.kafka.bootstrap import ask_the_next_address
from consumer.kafka.clients import make_consumer, make_producer
from consumer.kafka.topics import Cluster, ClusterUnavailable

REQUEST_TIMEOUT_MS = 30_000


class Silent:
    """Servers that take connections and say nothing."""

    def __init__(self) -> None:
        self.connections: list[int] = []
        self._servers: list[asyncio.Server] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def address(self) -> str:
        """Start another one; return where it is."""
        number = len(self._servers)

        def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections.append(number)
            self._writers.append(writer)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self._servers.append(server)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """End them all."""
        for server in self._servers:
            server.close()
        for writer in self._writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@pytest.fixture
async def silent(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Silent]:
    """Addresses that are given up quickly."""
    monkeypatch.setattr(bootstrap, "ADDRESS_SECONDS", 0.1)
    servers = Silent()
    yield servers
    await servers.close()


async def test_of_several_addresses_each_is_asked_and_the_time_out_is_as_before(silent: Silent) -> None:
    """H30: none of three takes its request time-out; what comes after the bootstrap has that again."""
    addresses = [await silent.address() for _ in range(3)]
    client = AIOKafkaClient(bootstrap_servers=addresses, request_timeout_ms=REQUEST_TIMEOUT_MS)
    ask_the_next_address(client)

    async with asyncio.timeout(10):
        with pytest.raises(KafkaConnectionError):
            await client.bootstrap()

    assert sorted(set(silent.connections)) == [0, 1, 2]
    assert client._request_timeout_ms == REQUEST_TIMEOUT_MS
    await client.close()


async def test_the_only_address_has_all_the_time(silent: Silent) -> None:
    """There is no other one to be asked: who gives up early would only have to begin again."""
    client = AIOKafkaClient(bootstrap_servers=[await silent.address()], request_timeout_ms=700)
    ask_the_next_address(client)
    began = time.monotonic()

    with pytest.raises(KafkaConnectionError):
        await client.bootstrap()

    assert time.monotonic() - began >= 0.65
    await client.close()


async def test_every_client_of_the_service_does_so(silent: Silent) -> None:
    """For reading, for writing and for asking; the last one says why nobody answers, too."""
    addresses = [await silent.address() for _ in range(2)]
    config = Config(kafka=Kafka(bootstrap_servers=addresses))
    for client in (make_consumer(config), make_producer(config, 65_536)):
        async with asyncio.timeout(10):
            with pytest.raises(KafkaConnectionError):
                await client.start()  # type: ignore[no-untyped-call]  # the vendor's has no types
        await client.stop()  # type: ignore[no-untyped-call]  # as above
        assert isinstance(client, AIOKafkaConsumer) or client.client._request_timeout_ms > 1_000
    assert sorted(set(silent.connections)) == [0, 1]
    silent.connections.clear()
    with pytest.raises(ClusterUnavailable):
        async with asyncio.timeout(10), Cluster(config, seconds=1):
            pass
    assert sorted(set(silent.connections)) == [0, 1]
