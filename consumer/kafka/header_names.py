r"""Records whose headers have names that are no UTF-8 are read like any other; batches that expand too far are not.

Kafka calls a header's name a string, but its brokers do not look at it, and producers in C pass on whatever bytes they
are given. aiokafka decodes names while it unpacks a batch and raises ``UnicodeDecodeError`` out of ``getmany``: nothing
of that batch, and nothing after it, would ever be delivered. One record would stop its partition for ever.

1. Batches are unpacked by the client's compiled code as ever; what a fetch brought is kept until it is unpacked.
2. A name that cannot be decoded has the rest of what was fetched read anew, from that record on, by the client's other
   parser, in Python. A byte that is no UTF-8 is written as ``\xff`` there.
3. The next fetch is unpacked by the compiled code again.
4. A batch that expands to more than a process can hold (:mod:`consumer.kafka.expansion`) is delivered as records that
   were not read, one for each of its offsets, without key or headers; what comes after it is unpacked as ever. One in
   the formats before Kafka 0.11 does not say in front which offsets it has, and is raised.

A record costs nothing more for it, a fetch one object for each partition. Anything else that is wrong in a batch is
raised as before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import _DefaultRecordBatchPy, _DefaultRecordPy
from aiokafka.record.legacy_records import LegacyRecordBatch
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import decode_varint

from consumer.kafka.expansion import TooMuchExpanded
from consumer.log import get_logger
from consumer.operations import Unread

_BEFORE_LENGTH: Final = 8
_BEFORE_BATCH: Final = 12
"""Offset and length; the length counts what comes after it."""
_MAGIC: Final = 16

log = get_logger(__name__)


def install() -> None:
    """Have every consumer of the process, those that are made later too, read such records. May be called again."""
    fetcher.MemoryRecords = FetchedRecords  # type: ignore[attr-defined]  # read by the client from there
    fetcher.PartitionRecords = PartitionRecords  # type: ignore[misc]  # as above


class FetchedRecords(MemoryRecords):  # type: ignore[valid-type, misc]  # a variable: one of two classes
    """What a fetch brought of one partition, and the bytes of it."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.data = data


class PartitionRecords(fetcher.PartitionRecords):
    """As the client's, but that no name of a header stops it."""

    def __next__(self) -> Any:
        try:
            return next(self._records_iterator)
        except StopIteration:
            self._records_iterator = None  # a cycle, as in the client
            raise
        except (UnicodeDecodeError, CorruptRecordException) as error:
            records = self._records
            if isinstance(error, TooMuchExpanded) and isinstance(records, FetchedRecords | _ForgivingRecords):
                self._go_on_with(_without_expanding(records.data, self.next_fetch_offset, error))
                log.warning("batch not read", **self._where(), error=error.args[0])
                return next(self)
            if not isinstance(records, FetchedRecords) or not _is_about_a_name(error):
                raise
        log.warning("header name is no UTF-8", **self._where())
        self._go_on_with(_ForgivingRecords(records.data, self.next_fetch_offset))
        return next(self)

    def _go_on_with(self, records: Any) -> None:
        """Unpack *records*, which begin with the batch that holds the next one.

        To go over those before it would take the position back.
        """
        self._records = records
        self._records_iterator = self._unpack_records()  # type: ignore[no-untyped-call]  # the vendor's has no types

    def _where(self) -> dict[str, Any]:
        return {"topic": self._tp.topic, "partition": self._tp.partition, "offset": self.next_fetch_offset}


def _is_about_a_name(error: Exception) -> bool:
    """Tell whether a name of a header is what cannot be read: it is the only text in a batch."""
    return isinstance(error, UnicodeDecodeError) or isinstance(error.__cause__, UnicodeDecodeError)


class _ForgivingRecords:
    """The batches of *data* with records from *position* on; for the client what its ``MemoryRecords`` are."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self._batches = _batches(data, position)
        self._next = next(self._batches, None)

    def has_next(self) -> bool:
        """Whether there is another batch."""
        return self._next is not None

    def next_batch(self) -> Any:
        """Return the next batch."""
        batch, self._next = self._next, next(self._batches, None)
        return batch


def _batches(data: bytes, position: int) -> Iterator[Any]:
    return (batch for _, batch in _batches_and_their_ends(data, position))


def _batches_and_their_ends(data: bytes, position: int) -> Iterator[tuple[int, Any]]:
    """Yield the batches of *data* with records from *position* on, and where in it each of them ends."""
    whole = memoryview(data)
    start = 0
    while start + _BEFORE_BATCH <= len(data):
        (length,) = struct.unpack_from(">i", data, start + _BEFORE_LENGTH)
        end = start + _BEFORE_BATCH + length
        if end > len(data):  # cut off by the fetch's limit
            return
        magic = data[start + _MAGIC]
        batch: Any = _ForgivingBatch(whole[start:end]) if magic >= 2 else LegacyRecordBatch(whole[start:end], magic)
        if batch.next_offset > position:
            yield end, batch
        start = end


def _without_expanding(data: bytes, position: int, error: TooMuchExpanded) -> _WithoutExpanding:
    """Return what is in *data* from *position* on, its first batch as records that were not read.

    Raises:
        TooMuchExpanded: that batch is in an old format.
    """
    end, batch = next(_batches_and_their_ends(data, position))
    if not isinstance(batch, _ForgivingBatch):
        raise error
    return _WithoutExpanding(data[end:], _UnreadBatch(batch, Unread(error.args[0])))


class _WithoutExpanding(FetchedRecords):
    """A batch that was not read, and after it the batches of some bytes."""

    __slots__ = ("_first",)

    def __init__(self, rest: bytes, first: _UnreadBatch) -> None:
        super().__init__(rest)
        self._first: _UnreadBatch | None = first

    def has_next(self) -> bool:
        """Whether there is another batch."""
        return self._first is not None or bool(super().has_next())

    def next_batch(self) -> Any:
        """Return the next batch."""
        first, self._first = self._first, None
        return super().next_batch() if first is None else first


class _UnreadBatch:
    """What the head of a batch tells; for the client what a batch is."""

    def __init__(self, batch: _ForgivingBatch, value: Unread) -> None:
        self.base_offset = batch.base_offset
        self.next_offset = batch.next_offset
        self.producer_id = batch.producer_id
        self.is_transactional = batch.is_transactional
        self.is_control_batch = False
        self._timestamp = batch.max_timestamp
        self._timestamp_type = batch.timestamp_type
        self._value = value

    def validate_crc(self) -> bool:
        """Whether the batch is whole: it was found to be before it was expanded."""
        return True

    def __iter__(self) -> Iterator[_DefaultRecordPy]:
        for offset in range(self.base_offset, self.next_offset):
            yield _DefaultRecordPy(offset, self._timestamp, self._timestamp_type, None, self._value, [])


class _ForgivingBatch(_DefaultRecordBatchPy):  # type: ignore[misc]  # final for others, and pinned here
    """A batch by the client's parser in Python, but for the names of headers."""

    def __next__(self) -> _DefaultRecordPy:
        if self._next_record_index >= self._num_records:
            raise StopIteration
        try:
            record = self._record()
        except (ValueError, IndexError) as error:
            raise CorruptRecordException(f"found invalid record structure: {error!r}") from error
        self._next_record_index += 1
        return record

    def _record(self) -> _DefaultRecordPy:
        buffer: bytearray = self._buffer

        def sized(at: int) -> tuple[bytes | None, int]:
            size, at = decode_varint(buffer, at)
            return (None, at) if size < 0 else (bytes(buffer[at : at + size]), at + size)

        length, start = decode_varint(buffer, self._pos)
        _attributes, at = decode_varint(buffer, start)
        later, at = decode_varint(buffer, at)
        above, at = decode_varint(buffer, at)
        key, at = sized(at)
        value, at = sized(at)
        count, at = decode_varint(buffer, at)
        headers: list[tuple[str, bytes | None]] = []
        for _ in range(count):
            name, at = sized(at)
            content, at = sized(at)
            headers.append(((name or b"").decode("utf-8", "backslashreplace"), content))
        if at - start != length:
            raise ValueError(f"{length} bytes, of which {at - start} are used")
        self._pos = at
        timestamp = self.max_timestamp if self.timestamp_type == self.LOG_APPEND_TIME else self.first_timestamp + later
        return _DefaultRecordPy(self.base_offset + above, timestamp, self.timestamp_type, key, value, headers)
