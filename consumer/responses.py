"""The Kafka side of responses and dead letters: which partition, which key, which headers (contract 2.3; pure rules).

1. **Identity.** A response id is ``TOPIC/PARTITION/OFFSET`` of the input record, the same after any replay.
2. **Partition.** The input's, folded into the partitions the output topic has.
3. **A response** has the input's key, four headers of ours, and those of the input that are to be copied, bytes, order
   and repeats kept. Key and copied headers over 64 KiB: neither, and ``tierstream-key-dropped: true``, so that what a
   producer sends along can never make its response too large to be written.
4. **A dead letter** has the input's key, value and headers, and ours, which replace any of the same name: a dead letter
   put back on the input topic and dead-lettered again tells of the last time. A value that does not fit is left out
   and said to be (``tierstream-dlq-truncated: true``).

Everything that does not change from record to record is made once, when a partition is assigned.
"""

from __future__ import annotations

from collections.abc import Collection

from consumer.avro_schemas import RESPONSE_FINGERPRINT
from consumer.codec import Headers
from consumer.errors import STATUS_BY_CODE
from consumer.operations import Kind, Unread

Header = tuple[str, bytes | None]

COPY_HEADERS = ("traceparent", "tracestate", "correlation-id")
"""Input headers copied into responses by default (``output.copy_headers``)."""

COPIED_BYTES_MAX = 64 * 1024
"""Bytes of key and copied headers a response may carry; configuration keeps as much room above
``limits.response_bytes`` in ``output.max_request_bytes``."""

_RESPONSE_ID = "tierstream-response-id"
_SCHEMA = ("tierstream-schema", RESPONSE_FINGERPRINT.encode())
_KEY_DROPPED = ("tierstream-key-dropped", b"true")
_STATUSES: dict[int, Header] = {
    status: ("tierstream-status", b"%d" % status) for status in {200, 201, 204, 404, *STATUS_BY_CODE.values()}
}
_KINDS: dict[Kind | None, Header] = {
    None: ("tierstream-kind", b"unknown"),
    "insert": ("tierstream-kind", b"insert"),
    "get": ("tierstream-kind", b"get"),
    "delete": ("tierstream-kind", b"delete"),
    "head": ("tierstream-kind", b"head"),
}

_DLQ_TRUNCATED = ("tierstream-dlq-truncated", b"true")
_DLQ_HEADERS = frozenset(
    f"tierstream-dlq-{name}"
    for name in ("topic", "partition", "offset", "timestamp", "group", "code", "message", "schema-id", "truncated")
)
"""Headers of a dead letter that are ours."""


def response_id(topic: str, partition: int, offset: int) -> str:
    """Return the id of the response to one input record, by which duplicates are known."""
    return f"{topic}/{partition}/{offset}"


def response_partition(partition: int, partition_count: int) -> int:
    """Return where the answer to a record of *partition* goes, in a topic of *partition_count* (at least 1)."""
    return partition if partition < partition_count else partition % partition_count


class ResponseHeaders:
    """Keys and headers of the responses to one input partition.

    Args:
        topic: The input topic.
        partition: The input partition.
        copy_headers: Names of the input headers to copy.
        compacted: The output topic is compacted, so a null key is replaced by the response id.
    """

    def __init__(
        self, topic: str, partition: int, copy_headers: Collection[str] = COPY_HEADERS, *, compacted: bool = False
    ) -> None:
        self._id = f"{topic}/{partition}/".encode()
        self._copied = frozenset(copy_headers)
        self._compacted = compacted

    def make(
        self, offset: int, status: int, kind: Kind | None, key: bytes | None, headers: Headers
    ) -> tuple[bytes | None, list[Header]]:
        """Return key and headers of one response.

        Args:
            offset: Of the input record.
            status: Of the response.
            kind: Of the operation; None if the record could not be decoded.
            key: Of the input record.
            headers: Of the input record.
        """
        identity = b"%s%d" % (self._id, offset)
        made: list[Header] = [(_RESPONSE_ID, identity), _STATUSES[status], _KINDS[kind], _SCHEMA]
        size = 0 if key is None else len(key)
        if headers:
            copied = [header for header in headers if header[0] in self._copied]
            for name, value in copied:
                size += len(name.encode()) + (0 if value is None else len(value))
            if size <= COPIED_BYTES_MAX:
                made += copied
        if size > COPIED_BYTES_MAX:
            key = None
            made.append(_KEY_DROPPED)
        if key is None and self._compacted:
            key = identity
        return key, made


class DeadLetters:
    """Values and headers of the dead letters of one input partition.

    Args:
        topic: The input topic.
        partition: The input partition.
        group: The consumer group.
        record_bytes_max: Bytes of key, value and headers that fit one record of the dead letter topic.
    """

    def __init__(self, topic: str, partition: int, group: str, *, record_bytes_max: int) -> None:
        self._record_bytes_max = record_bytes_max
        self._topic = ("tierstream-dlq-topic", topic.encode())
        self._partition = ("tierstream-dlq-partition", b"%d" % partition)
        self._group = ("tierstream-dlq-group", group.encode())

    def make(
        self,
        offset: int,
        timestamp_ms: int,
        key: bytes | None,
        value: bytes | None,
        headers: Headers,
        *,
        code: str,
        message: str,
        schema_id: str | None = None,
    ) -> tuple[bytes | None, list[Header]]:
        """Return value and headers of one dead letter; its key is the record's.

        Args:
            offset: Of the input record.
            timestamp_ms: Of the input record, in milliseconds since the epoch.
            key: Of the input record.
            value: Of the input record; comes back unless it does not fit, or could not be read.
            headers: Of the input record.
            code: Of the failure.
            message: Of the failure, as the response has it.
            schema_id: As the record's frame gives it, if it has one.
        """
        made: list[Header] = [header for header in headers if header[0] not in _DLQ_HEADERS]
        made += [
            self._topic,
            self._partition,
            ("tierstream-dlq-offset", b"%d" % offset),
            ("tierstream-dlq-timestamp", b"%d" % timestamp_ms),
            self._group,
            ("tierstream-dlq-code", code.encode()),
            ("tierstream-dlq-message", message.encode()),
        ]
        if schema_id is not None:
            made.append(("tierstream-dlq-schema-id", schema_id.encode()))
        if isinstance(value, Unread) or (
            value is not None and _record_bytes(key, value, made) > self._record_bytes_max
        ):
            made.append(_DLQ_TRUNCATED)
            value = None
        return value, made


def _record_bytes(key: bytes | None, value: bytes, headers: list[Header]) -> int:
    """Return an upper bound for what a record takes in a batch of one.

    Source: Kafka's record format v2. A batch begins with 61 bytes; a record's own length, attributes, time, offset, and
    the lengths of key, value and header list take at most 36; each header's two lengths at most 10.
    """
    size = 61 + 36 + len(value) + (0 if key is None else len(key))
    for name, text in headers:
        size += 10 + len(name.encode()) + (0 if text is None else len(text))
    return size
