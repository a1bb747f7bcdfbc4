"""The least that anybody can do between two topics with this client: what is fetched is answered with 100 bytes.

Called with a broker's address, input topic, output topic and the milliseconds that each record waits, and ends when it
is terminated. The floor under the latency of the service, measured with the same producer on the same broker:

1. Records are fetched as the service fetches them, and not decoded.
2. All records of one fetch wait together, in one timer; no window, no operation, no key order.
3. What has waited leaves at once in one batch for each partition, one at a time, as the order of a partition demands.
   Nothing is gathered, nothing is committed.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TypeAlias

import uvloop
from aiokafka import AIOKafkaProducer, ConsumerRecord

from consumer.bench import BATCH_BYTES, plain_consumer

Record: TypeAlias = "ConsumerRecord[bytes, bytes]"

ANSWER = b"x" * 100


class Echo:
    """Sends answers, one batch of a partition after the other."""

    def __init__(self, producer: AIOKafkaProducer, output: str, tasks: asyncio.TaskGroup) -> None:
        self._producer = producer
        self._output = output
        self._tasks = tasks
        self._waiting: dict[int, list[Record]] = {}
        """By partition, while batches of it are being sent."""

    def answer(self, records: list[Record]) -> None:
        """Answer records of one partition, after those before them."""
        partition = records[0].partition
        if partition in self._waiting:
            self._waiting[partition].extend(records)
        else:
            self._waiting[partition] = list(records)
            self._tasks.create_task(self._send(partition))

    async def _send(self, partition: int) -> None:
        waiting = self._waiting[partition]
        while waiting:
            batch, count = self._producer.create_batch(), 0
            for record in waiting:
                origin = f"{record.topic}/{partition}/{record.offset}".encode()
                headers = [("tierstream-response-id", origin)]
                if batch.append(key=record.key, value=ANSWER, timestamp=record.timestamp, headers=headers) is None:
                    break
                count += 1
            del waiting[:count]
            batch.close()
            await (await self._producer.send_batch(batch, self._output, partition=partition))
        del self._waiting[partition]


async def run(bootstrap: str, topic: str, output: str, seconds: float) -> None:
    """Answer until cancelled."""
    consumer = plain_consumer(bootstrap, topic, output)
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, max_batch_size=BATCH_BYTES
    )
    await consumer.start()
    await producer.start()
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        echo = Echo(producer, output, tasks)
        while True:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                if seconds:
                    loop.call_later(seconds, echo.answer, records)
                else:
                    echo.answer(records)


if __name__ == "__main__":
    uvloop.run(run(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]) / 1000))
