"""Batches of records as a producer could send them that has a client of its own: bytes where clients have text.

Kafka's brokers do not look at the names of headers, and clients in C pass on whatever they are given.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Collection, Sequence

from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

from brokers import Broker

UNREADABLE_NAME = b"\xff\xfe\xc3"
"""Of a header: no UTF-8."""

GZIP, TRANSACTIONAL, CONTROL = 0x01, 0x10, 0x20
"""Attributes of a batch."""

_NAME = "nam"
"""As long as that."""

_LENGTH, _CRC, _ATTRIBUTES, _RECORDS = 8, 17, 21, 61
"""Where in a batch."""


def batch(
    values: Sequence[bytes | None],
    unreadable: Collection[int] = (),
    *,
    base_offset: int = 0,
    attributes: int = 0,
    producer_id: int = -1,
    keys: Sequence[bytes] = (),
) -> bytes:
    """Return a batch of *values*; those at the places *unreadable* have a header nobody can name, and one more."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=False,
        producer_id=producer_id,
        producer_epoch=0 if producer_id >= 0 else -1,
        base_sequence=0 if producer_id >= 0 else -1,
        batch_size=16_000_000,
    )
    for place, value in enumerate(values):
        headers: list[tuple[str, bytes | None]] = []
        if place in unreadable:
            headers = [(_NAME, b"of a header"), ("correlation-id", b"%d" % place)]
        key = keys[place] if keys else b"k"
        assert builder.append(place, timestamp=1_700_000_000_000, key=key, value=value, headers=headers) is not None
    named = b"\x06" + _NAME.encode()
    made = bytearray(builder.build())
    assert made.count(named) == len(unreadable)
    made = made.replace(named, b"\x06" + UNREADABLE_NAME)
    if attributes & GZIP:
        made[_RECORDS:] = gzip.compress(made[_RECORDS:])
    struct.pack_into(">q", made, 0, base_offset)
    struct.pack_into(">i", made, _LENGTH, len(made) - _LENGTH - 4)
    struct.pack_into(">h", made, _ATTRIBUTES, attributes)
    struct.pack_into(">I", made, _CRC, calc_crc32c(bytes(made[_ATTRIBUTES:])))
    return bytes(made)


async def send_batch(broker: Broker, topic: str, partition: int, made: bytes) -> int:
    """Produce a batch; return the offset of its first record."""
    client = AIOKafkaClient(bootstrap_servers=broker.bootstrap)
    await client.bootstrap()
    try:
        client.add_topic(topic)
        await client.force_metadata_update()
        leader = client.cluster.leader_for_partition(TopicPartition(topic, partition))
        answer = await client.send(leader, ProduceRequest(None, -1, 10_000, [(topic, [(partition, made)])]))
        ((_, ((_, error, offset, *_more),)),) = answer.topics
        assert error == 0, f"the broker refuses the batch: error {error}"
        return int(offset)
    finally:
        await client.close()
