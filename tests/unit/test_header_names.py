"""A record whose header has a name that is no UTF-8 is delivered once and in its place, like all around it."""

from __future__ import annotations

from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder
from hypothesis import given
from hypothesis import strategies as st

from consumer.config import Config
from consumer.kafka import header_names
from consumer.kafka.clients import make_consumer
from consumer.kafka.header_names import FetchedRecords, PartitionRecords
from raw_batches import CONTROL, GZIP, TRANSACTIONAL, UNREADABLE_NAME, batch

SHOWN = "\\xff\\xfe\\xc3"
ABORT_MARKER = b"\x00\x00\x00\x00"


def unpacker(data: bytes, position: int = 0, aborted: list[tuple[int, int]] | None = None) -> Any:
    """What the client unpacks a fetch with, from *position* on, where these transactions were aborted."""
    partition = TopicPartition("operations", 3)
    return PartitionRecords(  # type: ignore[no-untyped-call]  # the vendor's has no types
        partition, FetchedRecords(data), aborted, position, None, None, True, fetcher.READ_COMMITTED
    )


@pytest.mark.parametrize("attributes", [0, GZIP], ids=["plain", "gzip"])
@pytest.mark.parametrize("unreadable", [(0,), (1,), (2,), (0, 1, 2), (0, 2)])
def test_all_of_a_batch_is_delivered_once_and_in_order(
    unreadable: tuple[int, ...], attributes: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The value holds the bytes of the name too; only the name is changed."""
    values = [b"0", UNREADABLE_NAME, None]

    unpacking = unpacker(batch(values, unreadable, base_offset=70, attributes=attributes), 70)
    records = list(unpacking)

    assert [(one.offset, one.key, one.value) for one in records] == [(70 + at, b"k", values[at]) for at in range(3)]
    for at, record in enumerate(records):
        expected = ((SHOWN, b"of a header"), ("correlation-id", b"%d" % at)) if at in unreadable else ()
        assert record.headers == expected
        assert record.timestamp == 1_700_000_000_000
    assert unpacking.next_fetch_offset == 73
    assert len(caplog.records) == 1


def test_batches_around_it_are_delivered_once_too() -> None:
    """What was delivered before is not repeated, gaps and all, and the position does not go back."""
    data = batch([b"a", b"b"]) + batch([b"c", b"d"], (1,), base_offset=5) + batch([b"e"], base_offset=9)
    unpacking, positions = unpacker(data), []

    offsets = []
    for record in unpacking:
        offsets.append(record.offset)
        positions.append(unpacking.next_fetch_offset)

    assert offsets == [0, 1, 5, 6, 9]
    assert positions == [1, 2, 6, 7, 10]


def test_a_batch_that_is_cut_off_is_left_for_the_next_fetch() -> None:
    """As the client does it: what came of the second batch is not enough."""
    unpacking = unpacker(batch([b"a"], (0,)) + batch([b"b"], base_offset=1)[:-1])

    assert [record.value for record in unpacking] == [b"a"]
    assert unpacking.next_fetch_offset == 1


def test_what_a_transaction_has_aborted_stays_so() -> None:
    """Before and after the name: aborted records and markers are passed over, committed ones delivered."""
    of_a_transaction = {"attributes": TRANSACTIONAL, "producer_id": 7}
    marker = {"attributes": TRANSACTIONAL | CONTROL, "producer_id": 7, "keys": [ABORT_MARKER]}
    data = (
        batch([b"aborted"], **of_a_transaction)  # type: ignore[arg-type]  # of several types
        + batch([b""], base_offset=1, **marker)  # type: ignore[arg-type]  # as above
        + batch([b"x", b"committed"], (1,), base_offset=2, **of_a_transaction)  # type: ignore[arg-type]  # as above
        + batch([b"aborted"], (0,), base_offset=4, **of_a_transaction)  # type: ignore[arg-type]  # as above
        + batch([b""], base_offset=5, **marker)  # type: ignore[arg-type]  # as above
        + batch([b"last"], base_offset=6)
    )
    unpacking = unpacker(data, aborted=[(7, 0), (7, 4)])

    assert [record.value for record in unpacking] == [b"x", b"committed", b"last"]
    assert unpacking.next_fetch_offset == 7


def test_another_fault_is_raised_as_before(caplog: pytest.LogCaptureFixture) -> None:
    """A checksum that is wrong, before the name and after it (H1)."""
    damaged = bytearray(batch([b"a"], (0,)))
    damaged[-1] ^= 1
    good = batch([b"a"], (0,))

    with pytest.raises(CorruptRecordException):
        next(unpacker(bytes(damaged)))
    assert not caplog.records
    unpacking = unpacker(good + bytes(damaged), 0)
    assert next(unpacking).value == b"a"
    with pytest.raises(CorruptRecordException):
        next(unpacking)


@given(
    st.lists(
        st.tuples(
            st.none() | st.binary(max_size=20),
            st.none() | st.binary(max_size=200),
            st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=5)), max_size=3),
            st.integers(0, 2**41),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_both_parsers_read_the_same(records: list[tuple[Any, Any, list[tuple[str, bytes | None]], int]]) -> None:
    """Whatever has names that can be read is read by ours as by the client's."""
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 1_000_000)
    for offset, (key, value, headers, timestamp) in enumerate(records):
        builder.append(offset, timestamp, key, value, headers)
    data = bytes(builder.build())

    ours, theirs = header_names._ForgivingBatch(data), DefaultRecordBatch(data)

    assert [fields(one) for one in ours] == [fields(one) for one in theirs]
    assert ours.next_offset == theirs.next_offset == len(records)


def fields(record: Any) -> tuple[Any, ...]:
    """All there is in a record."""
    return (
        record.offset, record.timestamp, record.timestamp_type, record.key, record.value, list(record.headers)
    )  # fmt: skip


async def test_the_client_s_own_unpacking_stops_at_it_and_the_service_s_does_not() -> None:
    """Rule 2: why this is there, and that it is in use. When the first half fails, the module may go."""
    client_s: Any = PartitionRecords.__base__
    assert client_s.__module__ == fetcher.__name__
    data = batch([b"a"], (0,))
    plain = client_s(
        TopicPartition("operations", 3), FetchedRecords(data), None, 0, None, None, True, fetcher.READ_COMMITTED
    )
    with pytest.raises(UnicodeDecodeError):
        next(plain)

    consumer = make_consumer(Config())

    used: Any = fetcher
    assert (used.MemoryRecords, used.PartitionRecords) == (FetchedRecords, PartitionRecords)
    await consumer.stop()
