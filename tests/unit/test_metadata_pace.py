"""Metadata are asked for at once a few times, and then at intervals, however often a client calls for them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.client import AIOKafkaClient
from hypothesis import given
from hypothesis import strategies as st

from consumer.config import Config
from consumer.kafka.clients import make_consumer, make_producer, make_reader, make_transactional_producer
from consumer.kafka.metadata_pace import AT_ONCE_MAX, INTERVAL_SECONDS, MetadataPace, pace_metadata


class TestMetadataPace:
    """The pure part."""

    def test_the_first_are_sent_at_once_and_the_others_at_intervals(self) -> None:
        pace = MetadataPace()
        sent: list[float] = []
        now = 100.0

        for _ in range(AT_ONCE_MAX + 3):
            now += pace.wait(now)  # it is answered at once, and called for again
            sent.append(now)

        assert sent[:AT_ONCE_MAX] == [100.0] * AT_ONCE_MAX
        assert sent[AT_ONCE_MAX:] == pytest.approx([100.0 + INTERVAL_SECONDS * number for number in (1, 2, 3)])

    def test_after_a_quiet_while_they_are_sent_at_once_again(self) -> None:
        pace = MetadataPace()
        for _ in range(AT_ONCE_MAX):
            pace.wait(0.0)

        assert [round(pace.wait(60.0), 9) for _ in range(AT_ONCE_MAX)] == [0.0] * AT_ONCE_MAX

    @given(st.lists(st.floats(0, 2), max_size=60))
    def test_no_second_has_more_than_its_share_and_none_waits_longer_than_that(self, pauses: list[float]) -> None:
        pace = MetadataPace()
        now, sent = 0.0, []

        for pause in pauses:
            seconds = pace.wait(now + pause)
            assert 0 <= seconds <= INTERVAL_SECONDS * 1.001
            now += pause + seconds
            sent.append(now)

        for first in sent:
            assert sum(first <= at < first + 1 for at in sent) <= AT_ONCE_MAX + 1 / INTERVAL_SECONDS


class TestPacedClients:
    """The clients around it."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What was asked of a broker that answers at once; no pause takes any time."""
        asked: list[Any] = []

        async def update(_client: Any, _cluster: Any, topics: Any) -> bool:
            asked.append(topics)
            return True

        async def sleep(seconds: float) -> None:
            asked.append(round(seconds, 3))

        monkeypatch.setattr("aiokafka.client.AIOKafkaClient._metadata_update", update)
        monkeypatch.setattr("consumer.kafka.metadata_pace.asyncio.sleep", sleep)
        monkeypatch.setattr("consumer.kafka.metadata_pace.time.monotonic", lambda: 0.0)
        return asked

    async def test_a_client_that_is_told_again_and_again_to_look_looks_in_time(self, asked: list[Any]) -> None:
        """Its own task that asks, as the fetcher of a partition without leader calls for it."""
        client = AIOKafkaClient(bootstrap_servers="127.0.0.1:1")
        pace_metadata(client)
        client._sync_task = asyncio.create_task(client._md_synchronizer())

        for _ in range(AT_ONCE_MAX + 2):
            assert await client.force_metadata_update()

        await client.close()
        waited = [one for one in asked if isinstance(one, float)]
        assert waited == pytest.approx([INTERVAL_SECONDS, 2 * INTERVAL_SECONDS])  # the clock stands still
        assert len(asked) == AT_ONCE_MAX + 2 + 2

    async def test_every_client_of_the_service_is_paced(self, asked: list[Any]) -> None:
        config = Config()
        readers = [make_consumer(config), make_reader(config)]
        writers = [make_producer(config, 65_536), make_transactional_producer(config, "operations-0")]

        for client in [*(one._client for one in readers), *(one.client for one in writers)]:
            for _ in range(AT_ONCE_MAX + 1):
                await client._metadata_update(client.cluster, ["operations"])

        assert [one for one in asked if isinstance(one, float)] == [INTERVAL_SECONDS] * 4
        for reader in readers:
            await reader.stop()
        for writer in writers:
            await writer.stop()
