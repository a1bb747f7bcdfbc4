"""What expands too far is delivered as not read, once at each of its offsets, and nothing around it is touched (H9)."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable
from typing import Any

import cramjam
import pytest
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer import fetcher
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.errors import CorruptRecordException
from aiokafka.record import default_records
from aiokafka.record._crecords import default_records as fast_default_records
from aiokafka.record.legacy_records import LegacyRecordBatchBuilder
from hypothesis import given
from hypothesis import strategies as st

from consumer.codec import OperationDecoder
from consumer.config import Config, Limits
from consumer.kafka import expansion
from consumer.kafka.clients import make_consumer, make_reader
from consumer.kafka.expansion import TooMuchExpanded
from consumer.kafka.header_names import FetchedRecords, PartitionRecords
from consumer.kafka.replay import Replay
from consumer.kafka.tools import _fetched
from consumer.operations import Unread
from consumer.responses import DeadLetters
from raw_batches import GZIP, LZ4, SNAPPY, TRANSACTIONAL, ZSTD, batch, compressed

KINDS = {"gzip": GZIP, "snappy": SNAPPY, "lz4": LZ4, "zstd": ZSTD}
LIMIT = 1_000_000
PARTITION = TopicPartition("operations", 3)


@pytest.fixture(autouse=True)
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service's parsers, with a limit that tests can go over quickly."""
    expansion.install(0)
    buffer = expansion._Buffer()
    buffer.size = LIMIT
    monkeypatch.setattr(expansion, "_buffer", buffer)


def unpacker(data: bytes, position: int = 0, aborted: list[tuple[int, int]] | None = None) -> Any:
    """What the client unpacks a fetch with, from *position* on, where these transactions were aborted."""
    return PartitionRecords(  # type: ignore[no-untyped-call]  # the vendor's has no types
        PARTITION, FetchedRecords(data), aborted, position, None, None, True, fetcher.READ_COMMITTED
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_up_to_the_limit_it_is_read(kind: int) -> None:
    """To the byte: the batch's records, their lengths included, are as many bytes as may be."""
    room = LIMIT - len(batch([b"x" * 900_000])) + 900_000 + 61  # the head is not compressed

    (fits,) = unpacker(batch([bytes(room)], attributes=kind))
    (unread,) = unpacker(batch([bytes(room + 1)], attributes=kind))

    assert fits.value == bytes(room)
    assert isinstance(unread.value, Unread)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_one_that_does_not_fit_is_delivered_as_not_read_and_the_next_one_as_ever(
    kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each offset once and in order, before it and after it; said once in the log."""
    data = (
        batch([b"a"], base_offset=7, attributes=kind)
        + batch([bytes(LIMIT), b"small", bytes(LIMIT)], base_offset=8, attributes=kind)
        + batch([b"z"], base_offset=11, attributes=kind)
    )
    unpacking = unpacker(data, 7)

    records = list(unpacking)

    assert [record.offset for record in records] == [7, 8, 9, 10, 11]
    assert [record.value for record in records] == [b"a", b"", b"", b"", b"z"]
    assert [isinstance(record.value, Unread) for record in records] == [False, True, True, True, False]
    assert {(record.key, record.headers, record.timestamp) for record in records[1:4]} == {
        (None, (), 1_700_000_000_000)
    }
    assert unpacking.next_fetch_offset == 12
    (line,) = caplog.records
    assert "1000000 bytes" in str(line.msg)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_comes_after_the_limit_is_never_in_memory(kind: int) -> None:
    """H9: a hundred times the limit, of which no more is made than the limit."""
    bomb = batch([bytes(100 * LIMIT)], attributes=kind)
    tracemalloc.start()
    try:
        list(unpacker(bomb))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 4 * LIMIT + 3 * len(bomb)
    memory = expansion._buffer._memory
    assert memory is None or len(memory) == LIMIT


def test_reading_goes_on_in_the_middle_of_one(caplog: pytest.LogCaptureFixture) -> None:
    """A poll ended within it, and it is fetched again; also where a name that is no UTF-8 comes before or after."""
    bomb = batch([bytes(LIMIT)] * 3, base_offset=5, attributes=ZSTD)
    assert [record.offset for record in unpacker(bomb, 6)] == [6, 7]

    odd = batch([b"odd"], (0,), base_offset=8)
    assert [record.value for record in unpacker(bomb + odd, 7)] == [b"", b"odd"]
    odd = batch([b"odd"], (0,), base_offset=4)
    assert [record.value for record in unpacker(odd + bomb + odd, 4)][:4] == [b"odd", b"", b"", b""]
    assert len(caplog.records) == 6


def test_one_that_a_transaction_has_aborted_is_passed_over() -> None:
    """It is not even expanded."""
    data = batch([bytes(LIMIT)], attributes=ZSTD | TRANSACTIONAL, producer_id=7) + batch([b"z"], base_offset=1)

    assert [record.value for record in unpacker(data, aborted=[(7, 0)])] == [b"z"]


@pytest.mark.parametrize("name", KINDS)
def test_one_that_is_damaged_is_no_large_one(name: str) -> None:
    """It is raised as ever: what a broker gives whole may be fetched again."""
    damaged = bytearray(compressed(b"x" * 1000, KINDS[name]))
    damaged[0] ^= 0xFF
    decode = expansion._DECODERS[f"{name}_decode"]

    with pytest.raises((cramjam.DecompressionError, OSError)) as raised:
        decode(bytes(damaged))

    assert not isinstance(raised.value, TooMuchExpanded)


@pytest.mark.parametrize("size", [-(2**31), -8, -4, -1, 0, 4, 2**31 - 1])
def test_snappy_that_gives_a_block_no_size_it_can_have_is_damaged(size: int) -> None:
    """Above all one that leads back to where it stands: the loop of events would never go on."""
    framed = compressed(b"x" * 1000, SNAPPY)[:16] + size.to_bytes(4, "big", signed=True) + b"xyz"

    with pytest.raises(CorruptRecordException, match=f"a block of {size} bytes") as raised:
        expansion._snappy_decode(framed)

    assert not isinstance(raised.value, TooMuchExpanded)


def test_one_in_an_old_format_is_raised() -> None:
    """It does not say in front which offsets it has."""
    builder: Any = LegacyRecordBatchBuilder(magic=1, compression_type=1, batch_size=10 * LIMIT)
    builder.append(0, timestamp=1, key=None, value=bytes(2 * LIMIT))

    with pytest.raises(TooMuchExpanded):
        next(unpacker(bytes(builder.build())))


@given(st.binary(max_size=3000), st.sampled_from(sorted(KINDS)))
def test_every_other_batch_expands_to_what_it_was(data: bytes, name: str) -> None:
    """By both parsers of the client, compiled and in Python; Snappy in one block, too."""
    made = compressed(data, KINDS[name])

    for module in (default_records, fast_default_records):
        assert getattr(module, f"{name}_decode")(made) == data
    if name == "snappy":
        assert expansion._snappy_decode(bytes(cramjam.snappy.compress_raw(data))) == data


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_threads_do_not_share_what_they_expand_into(name: str) -> None:
    """A decoder lets the interpreter go; here it begins the next one in the middle of the first."""
    first, second = (compressed(letter * 1000, KINDS[name]) for letter in (b"a", b"b"))
    decode, expand_into = expansion._DECODERS[f"{name}_decode"], getattr(cramjam, name).decompress_into
    found = []

    def interrupted(payload: Any, memory: Any) -> int:
        used: int = expand_into(payload, memory)
        found.append(decode(second))
        return used

    assert expansion._buffer.expanded(interrupted, first) == b"a" * 1000
    assert found == [b"b" * 1000]


@pytest.mark.parametrize("make", [make_consumer, make_reader])
async def test_every_consumer_is_bounded_by_the_largest_record_asked_for(make: Callable[[Config], Any]) -> None:
    """Two of the largest records fit; a process with several configurations goes by the largest."""
    for record_bytes in (3 * LIMIT, 1):
        consumer = make(Config(limits=Limits(record_bytes=record_bytes)))
        await consumer.stop()
        assert expansion.limit() == 6 * LIMIT


class _Assignment:
    """Of the client: one partition, never paused."""

    active = True
    paused = False
    position = 0

    def state_value(self, _partition: TopicPartition) -> _Assignment:
        return self

    def consumed_to(self, position: int) -> None:
        self.position = position


def fetched(data: bytes) -> Any:
    """What the client keeps of a partition until it is polled."""
    return expansion.FetchResult(  # type: ignore[no-untyped-call]  # the vendor's has no types
        PARTITION, assignment=_Assignment(), partition_records=unpacker(data), backoff=0.1
    )


async def test_a_poll_takes_so_many_bytes_of_all_partitions_and_the_next_one_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One record at least; a partition that gets none has its records still, and the next step may have as many."""
    monkeypatch.setattr(expansion, "POLL_BYTES_MAX", 250)
    first, second = (fetched(batch([b"v" * 100] * 4)) for _ in range(2))

    assert [record.offset for record in first.getall(100)] == [0, 1, 2]
    assert second.getall(100) == []
    assert second.has_more()
    await asyncio.sleep(0)
    assert [record.offset for record in first.getall(100)] == [3]
    assert not first.has_more()
    assert [record.offset for record in second.getall(1)] == [0]
    assert [record.offset for record in second.getall()] == [1]
    await asyncio.sleep(0)
    assert [record.offset for record in second.getall(100)] == [2, 3]
    assert second._assignment.position == 4
    assert second.getall(100) == []
    await asyncio.sleep(0)


async def test_what_a_reader_has_fetched_already_it_does_not_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll that brought all it may is followed by one that brings the rest, at once."""
    monkeypatch.setattr(expansion, "POLL_BYTES_MAX", 250)
    client = AIOKafkaClient()
    subscriptions = SubscriptionState()
    subscriptions.assign_from_user([PARTITION])
    fetching = fetcher.Fetcher(client, subscriptions)
    await asyncio.sleep(0)  # it begins with nothing
    fetching._records[PARTITION] = fetched(batch([b"v" * 100] * 4))

    class Reader:
        async def getmany(self, *, timeout_ms: int, max_records: int) -> Any:
            return await fetching.fetched_records((), timeout_ms / 1000, max_records)

    reader: Any = Reader()
    async with asyncio.timeout(30):
        assert [[record.offset for record in await _fetched(reader)] for _ in range(2)] == [[0, 1, 2], [3]]

    await fetching.close()
    await client.close()


async def test_keys_and_headers_count_for_a_poll_as_values_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch may expand to nothing else, or have no values at all."""
    monkeypatch.setattr(expansion, "POLL_BYTES_MAX", 250)

    assert len(fetched(batch([None] * 4, keys=[b"k" * 100] * 4)).getall(100)) == 3
    await asyncio.sleep(0)
    assert len(fetched(batch([b""] * 20, range(20), keys=[b""] * 20)).getall(100)) == 7
    await asyncio.sleep(0)


async def test_what_was_paused_or_sought_meanwhile_is_not_given_out() -> None:
    """As the client does it."""
    result = fetched(batch([b"v"] * 4))
    result._assignment.paused = True

    assert result.getall(100) == []
    assert not result.has_more()


def test_a_record_that_was_not_read_is_not_put_back() -> None:
    """It would be an empty one, without key or headers."""
    (unread,) = unpacker(batch([bytes(2 * LIMIT)], attributes=ZSTD))
    replay = Replay(Config(), None, None, None, {PARTITION.topic: 4})  # type: ignore[arg-type]  # nothing is read

    assert replay._step(unread, None).problem == unread.value.reason


def test_a_record_that_was_not_read_is_answered_and_dead_lettered_without_a_value() -> None:
    """As one that is too large."""
    unread = Unread("the batch expands to more than 5 bytes")

    decoded = OperationDecoder().decode(unread)
    value, headers = DeadLetters("t", 0, "g", record_bytes_max=1000).make(
        5, 0, None, unread, (), code="payload_too_large", message=unread.reason
    )

    assert decoded.error is not None
    assert (decoded.operation, decoded.poison, decoded.error.code) == (None, True, "payload_too_large")
    assert str(decoded.error) == unread.reason
    assert value is None
    assert ("tierstream-dlq-truncated", b"true") in headers
