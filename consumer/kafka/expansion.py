"""Compressed batches that expand to more than a process can hold are delivered as records that were not read.

A broker bounds a batch as it is sent. What it expands to nobody bounds: 16 KB of zstd are 512 MiB, the megabyte that
brokers take by default 30 GiB, and aiokafka expands a batch at one go, on the event loop, before the service sees a
record of it (hazard H9). One batch would end every process that is given its partition.

1. A batch is expanded into a buffer of :func:`limit` bytes that is made once and is handed back to the system after
   much of it was used. What does not fit is :class:`TooMuchExpanded`; what comes after the limit is never expanded.
2. :class:`consumer.kafka.header_names.PartitionRecords` then delivers each offset of that batch as one
   that was not read (:class:`consumer.operations.Unread`), which is answered ``payload_too_large``, and goes on with
   the next batch.
3. One poll takes :data:`POLL_BYTES_MAX` and a record at most; the rest stays where it is until the next one. So many
   batches that are each within the limit are not in memory at the same time.

A batch within the limit costs no more than before: the client copies what it has expanded, too.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import mmap
import struct
from collections.abc import Callable
from typing import Any, Final

import cramjam
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record import default_records, legacy_records
from aiokafka.record._crecords import default_records as fast_default_records
from aiokafka.record._crecords import legacy_records as fast_legacy_records

from consumer.config import MIB

EXPANDED_BYTES_MAX: Final = 64 * MIB
"""Of one batch, unless records may be larger (:func:`limit`). A broker takes batches of 1 MiB by default, and what
services write shrinks to a fifth or a twentieth of its size; expanding so much stops the event loop for 0.1 s."""

POLL_BYTES_MAX: Final = 16 * MIB
"""Of records handed over by one poll, after which it ends; usual polls bring 4,000 of a kilobyte."""

KEPT_BYTES_MAX: Final = MIB
"""Of the buffer, beyond which its memory is handed back after use; most batches take less."""

_XERIAL_HEADER: Final = b"\x82SNAPPY\0"
_XERIAL_HEADER_BYTES: Final = 16
_NO_ROOM: Final = "failed to write whole buffer"
"""What cramjam says, and a test holds it to, where the buffer is full; all else is a damaged batch."""


class TooMuchExpanded(CorruptRecordException):
    """A batch expands to more than :func:`limit` bytes; it was not expanded further."""


class _Buffer:
    """What batches are expanded into, one after the other."""

    def __init__(self) -> None:
        self.size = EXPANDED_BYTES_MAX
        self._memory: mmap.mmap | None = None

    def expanded(self, expand_into: Callable[[Any, Any], int], payload: Any) -> bytes:
        """Return what *payload* expands to.

        Raises:
            TooMuchExpanded: it does not fit.
            cramjam.DecompressionError: it is damaged.
        """
        memory, self._memory = self._memory, None  # the interpreter is let go meanwhile: another thread makes its own
        if memory is None or len(memory) < self.size:
            # Memory is taken only for what is written to; of a mapping that is shared it could not be handed back.
            memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            used = expand_into(payload, memory)
        except cramjam.DecompressionError as error:
            if _NO_ROOM not in str(error):
                raise
            memory.madvise(mmap.MADV_DONTNEED)
            raise TooMuchExpanded(f"the batch expands to more than {self.size} bytes") from None
        else:
            with memoryview(memory) as whole, whole[:used] as part:
                result = bytes(part)
            if used > KEPT_BYTES_MAX:
                memory.madvise(mmap.MADV_DONTNEED)
        finally:
            self._memory = memory
        return result


_buffer = _Buffer()


def limit() -> int:
    """Return how many bytes a batch may expand to in this process."""
    return _buffer.size


def install(record_bytes: int) -> None:
    """Bound what every consumer of the process expands, those that are made later too. May be called again.

    Args:
        record_bytes: Largest record that is to be read. Two of them, and all that is around them, are within the limit;
            of several calls the largest holds.
    """
    _buffer.size = max(_buffer.size, 2 * record_bytes)
    for module in (default_records, legacy_records, fast_default_records, fast_legacy_records):
        for name, decode in _DECODERS.items():
            if hasattr(module, name):  # the old format has no zstd
                setattr(module, name, decode)
    fetcher.FetchResult = FetchResult  # type: ignore[misc]  # made by the client from there


def _gzip_decode(payload: Any) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(payload)) as stream:
        result = stream.read(_buffer.size + 1)
    if len(result) > _buffer.size:
        raise TooMuchExpanded(f"the batch expands to more than {_buffer.size} bytes")
    return result


def _zstd_decode(payload: Any) -> bytes:
    return _buffer.expanded(cramjam.zstd.decompress_into, payload)


def _lz4_decode(payload: Any) -> bytes:
    return _buffer.expanded(cramjam.lz4.decompress_into, payload)


def _snappy_decode(payload: Any) -> bytes:
    """Blocks, as Java's producers write them, or one block; each says in front how much it is."""
    if bytes(payload[: len(_XERIAL_HEADER)]) != _XERIAL_HEADER:
        blocks = [payload]
    else:
        blocks, at = [], _XERIAL_HEADER_BYTES
        while at < len(payload):
            (size,) = struct.unpack_from(">i", payload, at)
            at += 4
            if not 0 < size <= len(payload) - at:  # one below zero would lead back, again and again
                raise CorruptRecordException(f"a block of {size} bytes, where there are {len(payload) - at}")
            blocks.append(payload[at : at + size])
            at += size
    if sum(cramjam.snappy.decompress_raw_len(block) for block in blocks) > _buffer.size:
        raise TooMuchExpanded(f"the batch expands to more than {_buffer.size} bytes")
    return b"".join(bytes(cramjam.snappy.decompress_raw(block)) for block in blocks)


_DECODERS: Final = {
    "gzip_decode": _gzip_decode,
    "snappy_decode": _snappy_decode,
    "lz4_decode": _lz4_decode,
    "zstd_decode": _zstd_decode,
}


class FetchResult(fetcher.FetchResult):
    """As the client's, but that one poll is given no more than :data:`POLL_BYTES_MAX` and a record."""

    _given = 0
    """Bytes that the poll which runs now was given, of all partitions: a poll takes them in one step of the loop."""

    def getall(self, max_records: int | None = None) -> list[Any]:
        """Return the next records of the partition; what is left stays here for the next poll."""
        cls = FetchResult
        if cls._given >= POLL_BYTES_MAX or not self.has_more():  # type: ignore[no-untyped-call]  # the vendor's has no types
            return []
        if not self.check_assignment(self._topic_partition):  # type: ignore[no-untyped-call]  # as above
            return []
        if not cls._given:  # the first of this poll
            asyncio.get_running_loop().call_soon(cls._poll_ended)
        taken: list[Any] = []
        most = float("inf") if max_records is None else max_records
        given, all_taken = cls._given, False
        try:
            for record in self._partition_records:
                taken.append(record)
                given += len(record.value or b"") + len(record.key or b"")
                for name, content in record.headers:
                    given += len(name) + len(content or b"")
                if len(taken) >= most or given >= POLL_BYTES_MAX:
                    break
            else:
                all_taken = True
        finally:
            cls._given = given
        self._update_position()  # type: ignore[no-untyped-call]  # as above
        if all_taken:
            self._partition_records = None
        return taken

    @classmethod
    def _poll_ended(cls) -> None:
        cls._given = 0
