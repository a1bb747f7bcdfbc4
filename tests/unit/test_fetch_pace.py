"""A broker that says at once that it has nothing is asked less often; nothing that has records is ever late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.metadata import MetadataRequest
from hypothesis import given
from hypothesis import strategies as st

from consumer.kafka.fetch_pace import AT_ONCE_MAX, PAUSE_SECONDS, FetchPace, paced

HOLD = 0.5
"""Seconds that a broker may hold a fetch."""

AT_ONCE, IN_TIME = 0.001, HOLD
"""Seconds that an answer takes."""


class TestFetchPace:
    """The pure part."""

    def test_what_comes_at_once_without_records_again_and_again_is_kept_back(self) -> None:
        pace = FetchPace()

        pauses = [pace.pause(0, AT_ONCE, HOLD, records=False) for _ in range(AT_ONCE_MAX + 2)]

        assert pauses == [0.0] * AT_ONCE_MAX + [PAUSE_SECONDS] * 2

    @pytest.mark.parametrize(("seconds", "records"), [(AT_ONCE, True), (0.25, False)], ids=["records", "in time"])
    def test_any_other_answer_ends_that(self, seconds: float, records: bool) -> None:
        pace = FetchPace()
        for _ in range(AT_ONCE_MAX + 1):
            pace.pause(0, AT_ONCE, HOLD, records=False)

        assert pace.pause(0, seconds, HOLD, records=records) == 0
        assert pace.pause(0, AT_ONCE, HOLD, records=False) == 0

    def test_each_broker_is_judged_alone(self) -> None:
        pace = FetchPace()
        for _ in range(AT_ONCE_MAX + 1):
            pace.pause(0, AT_ONCE, HOLD, records=False)

        assert pace.pause(1, AT_ONCE, HOLD, records=False) == 0
        assert pace.pause(0, AT_ONCE, HOLD, records=False) == PAUSE_SECONDS

    def test_what_is_soon_depends_on_how_long_it_may_be_held(self) -> None:
        """A fetch that may be held for 10 ms alone is not answered too soon after 6."""
        pace = FetchPace()

        assert [pace.pause(0, 0.006, 0.01, records=False) for _ in range(AT_ONCE_MAX + 2)] == [0.0] * (AT_ONCE_MAX + 2)

    @given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([AT_ONCE, 0.249, IN_TIME]), st.booleans())))
    def test_no_record_and_no_answer_of_a_broker_that_waits_is_ever_late(
        self, answers: list[tuple[int, float, bool]]
    ) -> None:
        pace = FetchPace()

        for broker, seconds, records in answers:
            pause = pace.pause(broker, seconds, HOLD, records=records)
            assert not pause or (seconds < 0.25 and not records)


class TestPaced:
    """The client around it."""

    @pytest.fixture
    def slept(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
        """The pauses that were made; none of them takes any time."""
        made: list[float] = []

        async def sleep(seconds: float) -> None:
            made.append(seconds)

        with monkeypatch.context() as patch:
            patch.setattr("consumer.kafka.fetch_pace.asyncio.sleep", sleep)
            yield made

    @pytest.fixture
    async def consumer(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AIOKafkaConsumer]:
        """A consumer whose every request is answered, at once, with what it asks for."""

        async def send(_client: Any, _node: int, request: Any, **_named: Any) -> Any:
            return request

        monkeypatch.setattr("aiokafka.client.AIOKafkaClient.send", send)
        made = paced(AIOKafkaConsumer(bootstrap_servers="127.0.0.1:1"))
        yield made
        await made.stop()

    @staticmethod
    def fetch(*batches: bytes | None) -> Any:
        """A fetch that is answered with *batches*, one of each partition of a topic."""
        partitions: Any = [(number, 0, 7, batch) for number, batch in enumerate(batches)]
        return FetchRequest(500, 1, 1000, 0, [("operations", partitions)])

    async def test_answers_to_fetches_without_records_are_kept_back(
        self, consumer: AIOKafkaConsumer, slept: list[float]
    ) -> None:
        """Whether it says "nothing" with no bytes or with none at all."""
        nothing = self.fetch(b"", None)

        for _ in range(AT_ONCE_MAX + 2):
            assert await consumer._client.send(0, nothing) is nothing

        assert slept == [PAUSE_SECONDS] * 2

    async def test_one_partition_with_records_is_enough(self, consumer: AIOKafkaConsumer, slept: list[float]) -> None:
        for _ in range(AT_ONCE_MAX + 2):
            await consumer._client.send(0, self.fetch(b"", b"batch"))

        assert slept == []

    async def test_other_requests_are_never_kept_back(self, consumer: AIOKafkaConsumer, slept: list[float]) -> None:
        for _ in range(AT_ONCE_MAX + 2):
            await consumer._client.send(0, MetadataRequest([]))

        assert slept == []

    async def test_an_answer_that_is_kept_back_can_be_cancelled(self, consumer: AIOKafkaConsumer) -> None:
        """As the client does when it loses its partitions, or is stopped."""
        for _ in range(AT_ONCE_MAX):
            await consumer._client.send(0, self.fetch(b""))
        kept = asyncio.ensure_future(consumer._client.send(0, self.fetch(b"")))
        await asyncio.sleep(0)
        assert not kept.done()

        kept.cancel()

        with pytest.raises(asyncio.CancelledError):
            await kept
