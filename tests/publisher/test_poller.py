"""The poller on real brokers, where a record does not fit a fetch: nothing is lost by it, and nobody held up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.protocol.fetch import FetchRequest
from confluent_kafka.cimpl import NewTopic

from brokers import Broker
from consumer.assignment import Assignment
from consumer.codec import OperationDecoder
from consumer.commits import CommitPolicy
from consumer.config import Config
from consumer.kafka.clients import TopicPartition, make_consumer
from consumer.kafka.poller import BUSY_MILLISECONDS, Poller
from consumer.kafka.topics import Cluster
from consumer.storage.memory import MemoryBackend
from consumer.storage.tiered import TieredStorage
from lanes import Workplace
from wire import operation

WAIT_SECONDS = 30
"""Bound of every wait; none of them is a measure of anything."""

RECORD_BYTES = 2_000
"""Largest record that is decoded."""

MIB = 1024 * 1024


class _OldBroker:
    """Lets a client see fetches as a broker before 0.10.1 answers them: cut off at the limit, amid a record.

    Also what a broker today cuts is cut by it, so that the limits are those the client asks for.
    """

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self.cut = 0
        """Answers in which not one record was whole."""
        self.limits: list[int] = []
        """What was asked for, without repeats."""
        self.held: set[int] = set()
        """For how many milliseconds the broker might hold a fetch."""
        self._send: Callable[..., Awaitable[Any]] = consumer._client.send
        consumer._client.send = self.send  # type: ignore[method-assign, assignment]  # passes everything on

    async def send(self, node: Any, request: Any, **named: Any) -> Any:
        answer = await self._send(node, request, **named)
        if isinstance(request, FetchRequest):
            (limit,) = {most for _, partitions in request._topics for _, _, most in partitions}
            if limit not in self.limits:
                self.limits.append(limit)
            self.held.add(request._max_wait_ms)
            answer.topics = [
                (topic, [self._cut(limit, *partition) for partition in partitions])
                for topic, partitions in answer.topics
            ]
        return answer

    def _cut(self, limit: int, *partition: Any) -> tuple[Any, ...]:
        *head, batches = partition
        if batches and len(batches) > limit:
            self.cut += int.from_bytes(batches[8:12], "big") + 12 > limit  # the first batch's own length
            batches = batches[:limit]
        return (*head, batches)


class Setting:
    """A poller over a topic of two partitions, its clients made as for the service, with a fetch limit of its own."""

    def __init__(self, broker: Broker, budget_bytes: int) -> None:
        self.broker = broker
        self.topic = broker.create_topic("operations", 2, max_message_bytes=min(broker.record_bytes_max, 8_000_000))
        self.config = Config.model_validate(
            {
                "kafka": {
                    "bootstrap_servers": [broker.bootstrap],
                    "group_id": broker.unused_name("group"),
                    "session_timeout": "6s",
                    "heartbeat_interval": "1s",
                },
                "input": {"topics": [self.topic]},
                "limits": {"record_bytes": RECORD_BYTES},
            }
        )
        self.place = Workplace(
            TieredStorage(MemoryBackend(), MemoryBackend()),
            budget_bytes=budget_bytes,
            changes={"decoder": OperationDecoder(record_bytes_max=RECORD_BYTES)},
        )
        self.place.responses.acknowledge_always()
        self.place.dead_letters.acknowledge_always()
        self.old_brokers: list[_OldBroker] = []
        self.fatal: list[BaseException] = []
        self.poller = Poller(
            self.place.pipeline,
            topics=[self.topic],
            group_id=self.config.kafka.group_id,
            make_consumer=self._make_consumer,
            ask_cluster=partial(Cluster, self.config),
            drain_timeout_seconds=10.0,
            commit_policy=CommitPolicy(0.05, 100),
            start="earliest",
            out_of_range="pause",
            window_policy="equal-share",
            window_exhausted="equal-share",
            output_stuck=lambda: False,
            storage_blocked=lambda: False,
            fatal=self.fatal.append,
        )

    def _make_consumer(self) -> AIOKafkaConsumer:
        consumer = make_consumer(self.config)
        consumer._max_partition_fetch_bytes = 10_000
        self.old_brokers.append(_OldBroker(consumer))
        return consumer

    async def send(self, partition: int, *sizes: int) -> None:
        """Produce inserts with payloads of these sizes."""
        producer = AIOKafkaProducer(bootstrap_servers=self.broker.bootstrap, max_request_size=8_000_000)
        await producer.start()
        for size in sizes:
            await producer.send_and_wait(self.topic, operation("insert", f"{size}", bytes(size)), partition=partition)
        await producer.stop()

    def answers(self) -> dict[tuple[int, int], str | None]:
        """Return the failure code of each response, None for a success, by partition and offset."""
        found = {}
        for record in self.place.responses.appended:
            source = record.response["source"]
            found[source["partition"], source["offset"]] = record.code
        assert len(found) == len(self.place.responses.appended), "answered twice"
        return found

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until *condition* holds, and nothing fatal has happened."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                assert not self.fatal
                await asyncio.sleep(0.02)


@pytest.fixture
async def set_up(broker: Broker) -> AsyncIterator[Callable[[int], Setting]]:
    """A maker of settings, whose pollers are stopped in the end."""
    made: list[Setting] = []

    def make(budget_bytes: int) -> Setting:
        made.append(Setting(broker, budget_bytes))
        return made[-1]

    yield make
    for setting in made:
        await setting.poller.stop(5.0, 5.0)


async def test_a_record_larger_than_the_fetch_limit_is_answered_and_takes_nobody_with_it(
    set_up: Callable[[int], Setting],
) -> None:
    """H2: the client moves past a record it could not fetch. It is fetched with a higher limit, and is too large."""
    setting = set_up(16 * MIB)
    await setting.send(0, 10, 300_000, 11, 50_000, 12)
    await setting.send(1, 10, 11)

    await setting.poller.start()
    await setting.until(lambda: len(setting.answers()) == 7)

    assert setting.answers() == {
        (0, 0): None,
        (0, 1): "payload_too_large",
        (0, 2): None,
        (0, 3): "payload_too_large",
        (0, 4): None,
        (1, 0): None,
        (1, 1): None,
    }
    (old,) = setting.old_brokers
    assert old.cut >= 5, "the provoked fault did not happen"
    assert old.limits == [10_000 * 2**doubled for doubled in range(6)], "it stops growing when the record fits"
    assert setting.poller.not_ready() == []
    await setting.until(lambda: all(part["committed"] == part["high_watermark"] for part in setting.poller.snapshot()))


async def test_one_that_would_not_even_fit_the_byte_budget_stops_its_partition_alone(
    set_up: Callable[[int], Setting],
) -> None:
    """What is fetched has to be held; who operates the service is told, and the other partition goes on."""
    setting = set_up(100_000)
    await setting.send(0, 10, 300_000, 11)
    await setting.send(1, 10)
    await setting.poller.start()
    await setting.until(lambda: bool(setting.poller._unreadable))

    await setting.send(1, 11, 12)
    await setting.until(lambda: len(setting.answers()) == 4)

    assert setting.answers() == dict.fromkeys([(0, 0), (1, 0), (1, 1), (1, 2)])
    assert set(setting.poller._unreadable) == {TopicPartition(setting.topic, 0)}
    assert any("RecordTooLarge" in reason or "read" in reason for reason in setting.poller.not_ready())
    assert max(setting.old_brokers[0].limits) == 100_000


async def test_the_broker_holds_fetches_for_a_short_time_alone_while_there_is_work(
    set_up: Callable[[int], Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for next would wait for a fetch that finds nothing: the client has one under way to each broker."""
    setting = set_up(16 * MIB)
    await setting.poller.start()
    await setting.until(lambda: bool(setting.old_brokers[0].held))
    monkeypatch.setattr(Assignment, "buffered_bytes", 1)
    await setting.until(lambda: len(setting.old_brokers[0].held) > 1)

    assert setting.old_brokers[0].held == {500, BUSY_MILLISECONDS}


async def test_the_client_finds_no_fault_with_a_partition_that_is_not_open(set_up: Callable[[int], Setting]) -> None:
    """It would look for a position of its own, find none, and keep that as an error that it does not expect twice."""
    setting = set_up(1_000_000)
    opening = asyncio.Event()

    @asynccontextmanager
    async def held() -> AsyncIterator[Cluster]:
        await opening.wait()
        async with Cluster(setting.config) as cluster:
            yield cluster

    setting.poller._ask_cluster = held  # type: ignore[assignment]
    await setting.send(0, 1)
    await setting.poller.start()
    await setting.until(lambda: setting.poller.assigned > 0)
    consumer: Any = setting.poller._consumer

    for partition in consumer.assignment():
        await consumer.committed(partition)  # answered after whatever the client has asked the coordinator for before
    await asyncio.sleep(0.1)

    assert consumer._fetcher._records == {}
    opening.set()
    await setting.until(lambda: bool(setting.answers()))


async def test_a_topic_made_anew_has_another_id(broker: Broker) -> None:
    """Contract 5: offsets of the two must not be compared. A broker that tells no ids is no error."""
    name = broker.create_topic("operations", 2)
    other = broker.create_topic("operations", 1)
    config = Config.model_validate({"kafka": {"bootstrap_servers": [broker.bootstrap]}})
    async with Cluster(config) as cluster:
        first = await cluster.topic_ids([name, other, "missing"])
        if broker.kind == "noida-db":
            assert first == {}
            return
        assert first.keys() == {name, other}
        assert await cluster.topic_ids([name]) == {name: first[name]}
        broker.delete_topic(name)
        broker.admin.create_topics([NewTopic(name, num_partitions=2)])[name].result(WAIT_SECONDS)
        async with asyncio.timeout(WAIT_SECONDS):
            while (await cluster.topic_ids([name])).get(name) in {None, first[name]}:  # noqa: ASYNC110 - a broker's event
                await asyncio.sleep(0.1)
