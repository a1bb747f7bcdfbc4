"""How often an idle consumer asks real brokers: those that hold a fetch which finds nothing, and those that do not."""

from __future__ import annotations

import asyncio
import time

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from brokers import Broker
from consumer.kafka.fetch_pace import AT_ONCE_MAX, PAUSE_SECONDS, FetchPace, paced

WAIT_SECONDS = 30
"""Bound of every wait; none of them is a measure of anything."""

HOLD_SECONDS = 0.2
"""How long a broker may hold a fetch here: some are seen within a second."""

FETCHES = 12


class _Observed(FetchPace):
    """Keeps the pauses it asks for, and tells when there have been enough."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []
        self.enough = asyncio.Event()

    def pause(self, broker: int, seconds: float, max_wait_seconds: float, *, records: bool) -> float:
        assert max_wait_seconds == HOLD_SECONDS
        self.pauses.append(super().pause(broker, seconds, max_wait_seconds, records=records))
        if len(self.pauses) >= FETCHES:
            self.enough.set()
        return self.pauses[-1]


async def test_an_idle_consumer_asks_seldom_and_still_reads_what_comes(broker: Broker) -> None:
    """A broker that holds its fetches is never paused for; the embedded one, which does not, after a few fetches."""
    partition = TopicPartition(broker.create_topic("idle"), 0)
    observed = _Observed()
    consumer = AIOKafkaConsumer(bootstrap_servers=broker.bootstrap, fetch_max_wait_ms=round(HOLD_SECONDS * 1000))
    paced(consumer, observed)
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap)
    async with asyncio.timeout(WAIT_SECONDS), consumer, producer:
        consumer.assign([partition])
        consumer.seek(partition, 0)
        began = time.monotonic()
        await observed.enough.wait()
        seconds = time.monotonic() - began

        await producer.send_and_wait(partition.topic, b"here")
        record = await consumer.getone()

    assert record.value == b"here"
    assert seconds > (FETCHES - AT_ONCE_MAX - 1) * PAUSE_SECONDS
    if broker.kind == "apache":
        assert set(observed.pauses) == {0.0}
    else:
        assert observed.pauses[:FETCHES] == [0.0] * AT_ONCE_MAX + [PAUSE_SECONDS] * (FETCHES - AT_ONCE_MAX)
