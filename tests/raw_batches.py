"""Batches of records as a producer could send them that has a client of its own: bytes where clients have text.

Kafka's brokers do not look at the names of headers, and clients in C pass on whatever they are given.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Collection, Sequence

import cramjam
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c, encode_varint

from brokers import Broker

UNREADABLE_NAME = b"\xff\xfe\xc3"
"""Of a header: no UTF-8."""

GZIP, SNAPPY, LZ4, ZSTD, TRANSACTIONAL, CONTROL = 0x01, 0x02, 0x03, 0x04, 0x10, 0x20
"""Attributes of a batch."""

_NAME = "nam"
"""As long as that."""

_COMPRESSION = 0x07

_CHUNK_BYTES = 1024 * 1024

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
        batch_size=2**31 - 1,
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
    made[_RECORDS:] = compressed(made[_RECORDS:], attributes & _COMPRESSION)
    struct.pack_into(">q", made, 0, base_offset)
    return _sealed(made, attributes)


def bomb(value_bytes: int) -> bytes:
    """Return a batch of one record whose value are so many zeros, compressed to next to nothing as it is made."""
    length, head = bytearray(), bytearray(b"\0\0\0")  # attributes, and both deltas
    encode_varint(-1, head.append)  # no key
    encode_varint(value_bytes, head.append)
    encode_varint(len(head) + value_bytes + 1, length.append)  # and the number of headers
    compressor = cramjam.zstd.Compressor()
    compressor.compress(bytes(length + head))
    for at in range(0, value_bytes, _CHUNK_BYTES):
        compressor.compress(bytes(min(_CHUNK_BYTES, value_bytes - at)))
    compressor.compress(b"\0")
    made = bytearray(batch([b""]))
    made[_RECORDS:] = bytes(compressor.finish())
    return _sealed(made, ZSTD)


def _sealed(made: bytearray, attributes: int) -> bytes:
    struct.pack_into(">i", made, _LENGTH, len(made) - _LENGTH - 4)
    struct.pack_into(">h", made, _ATTRIBUTES, attributes)
    struct.pack_into(">I", made, _CRC, calc_crc32c(bytes(made[_ATTRIBUTES:])))
    return bytes(made)


def compressed(data: bytes | bytearray, kind: int) -> bytes:
    """Return *data* as a batch of this compression has it; Snappy in blocks, as Java's producers write it."""
    match kind:
        case 0:
            return bytes(data)
        case 1:
            return gzip.compress(data)
        case 2:
            blocks = [cramjam.snappy.compress_raw(data[at : at + 32768]) for at in range(0, len(data), 32768)]
            return b"\x82SNAPPY\0\0\0\0\1\0\0\0\1" + b"".join(
                struct.pack(">i", len(block)) + bytes(block) for block in blocks
            )
        case 3:
            return bytes(cramjam.lz4.compress(data))
        case 4:
            return bytes(cramjam.zstd.compress(data))
        case _:
            raise ValueError(f"no compression: {kind}")


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
