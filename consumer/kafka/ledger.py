"""The production ledger: every input record and every response read again, and held against each other.

Nothing the service says about itself is believed: no commit, no metric, no log. What counts is what stands in the
topics:

1. **Range.** From and to, per input partition, narrowed to what is there.
2. **Input.** Each record of the range is decoded as the service would. Of each, five bytes are kept: what kind of
   answer it may have, and a checksum of what the answer has to repeat (kind, key, request id, context; of a record that
   cannot be decoded its failure's code). So a million records take 5 MB, whatever their size.
3. **Output.** Each response is attributed by its ``tierstream-response-id``, or its ``source`` where it has none, and
   held against those five bytes. Responses to records outside the range are passed over.
4. **Verdict**: *missing* = no response; *duplicated* = more than one; *mismatched* = a response contradicts its record,
   or stands for an offset that has none, or cannot be read (then it is named by its own place in the output topic).

What cannot be known here is not judged: policies and limits may have been others when the record was processed, so a
decoded operation may have failed for any reason that its kind can have; a schema that the registry knows now may have
been unknown then, and one that it does not tell now is taken as it was answered; a generated key may be any.
"""

from __future__ import annotations

import asyncio
import re
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from zlib import crc32

from aiokafka import TopicPartition

from consumer.avro_schemas import OPERATION_FINGERPRINT
from consumer.codec import Decoded, Headers, OperationDecoder, decode_response
from consumer.config import GIB, Config
from consumer.errors import POISON_CODES, STATUS_BY_CODE, DecodeError, TierstreamError
from consumer.kafka.ranges import Position, offsets_at
from consumer.kafka.tools import Record, ends_of, open_reader, read_until
from consumer.kafka.topics import Cluster, Partition
from consumer.responses import response_id

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer

    from consumer.registry import SchemaRegistry

OFFSETS_MAX: Final = 100_000_000
"""Offsets of one run, over all partitions: half a gigabyte of memory. More are verified range by range."""

EXPLAINED_MAX: Final = 20
"""Mismatches of which the reason is kept; the others are named only."""

LOOK_AGAIN_SECONDS: Final = 0.5
"""Between looks at the output topic while records are still unanswered and there is time to wait."""

# Of the byte of an offset, the low half says what was seen, the high half what kind of answer is expected.
_KNOWN, _ANSWERED, _DUPLICATED, _MISMATCHED = 1, 2, 4, 8
_ANYTHING, _POISON, _INSERT, _KEYLESS, _GET, _HEAD, _DELETE = range(0, 112, 16)
_EXPECTATION, _FRAMED = 0x70, 0x80
"""The bits of the above, and of a value whose schema only the registry knows."""

REGISTRY_SECONDS: Final = 20.0
"""Longest wait for the registry to tell a schema; its records are then taken as they were answered."""

_EXPECTED: Final = {"insert": _INSERT, "get": _GET, "head": _HEAD, "delete": _DELETE}

_SUCCESSES: Final[Mapping[int, tuple[str, Sequence[int]]]] = {
    _INSERT: ("Inserted", (201,)),
    _KEYLESS: ("Inserted", (201,)),
    _GET: ("Got", (200, 404)),
    _HEAD: ("Headed", (204, 404)),
    _DELETE: ("Deleted", (204,)),
}
_CONTENT: Final = {"Got": "object", "Headed": "metadata"}
"""What a result with a missing object lacks."""

_FAILURES: Final = frozenset(STATUS_BY_CODE) - POISON_CODES - {"at_capacity", "config_error"}
_REFERENCE_FAILURES: Final = frozenset(code for code in _FAILURES if code.startswith("reference_"))
_INSERT_FAILURES: Final = _REFERENCE_FAILURES | {"payload_too_large"}
"""Failures that only inserts have."""

_ID: Final = re.compile(r"(.+)/(\d{1,10})/(\d{1,19})")


@dataclass(frozen=True, slots=True)
class Span:
    """Offsets of one partition, from *start* up to but not including *end*."""

    topic: str
    partition: int
    start: int
    end: int
    lost: int = 0
    """Offsets that were asked for and that the topic has already dropped."""


class PartitionLedger:
    """What is known of the records of one span: five bytes per offset.

    Args:
        span: Which records.
    """

    def __init__(self, span: Span) -> None:
        self.span = span
        self.records = 0
        """Records entered."""
        self.answered = 0
        """Records with at least one response."""
        self.responses = 0
        """Responses to offsets of the span."""
        size = max(0, span.end - span.start)
        self._flags = bytearray(size)
        self._digests = array("I", bytes(4 * size))

    def enter(self, offset: int, decoded: Decoded, *, framed: bool = False) -> None:
        """Enter an input record of the span.

        Args:
            offset: Its offset.
            decoded: What became of its value.
            framed: Only a registry knows its schema, if that; so it may have been, or be now, an unknown one.
        """
        at = offset - self.span.start
        if framed and decoded.error is not None and decoded.error.code == "unknown_schema":
            expected, code = _ANYTHING, None
        elif decoded.poison:
            expected, code = _POISON, decoded.error.code if decoded.error is not None else None
        else:
            expected, code = _EXPECTED[decoded.kind or "insert"], None
            if expected == _INSERT and decoded.key is None:
                expected = _KEYLESS
        context = decoded.context
        scopes = None if context is None else (context.usecase, [(one.name, one.value) for one in context.scopes])
        self.records += not self._flags[at] & _KNOWN
        self._flags[at] = _KNOWN | expected | (_FRAMED if framed else 0)
        self._digests[at] = _digest(decoded.kind, decoded.key, decoded.request_id, scopes, code)

    def answer(self, offset: int, response: Mapping[str, Any] | None, headers: Headers = ()) -> str | None:
        """Enter a response to an offset of the span; return how it contradicts its record, None if it does not.

        Args:
            offset: Of the input record.
            response: Its fields; None if they could not be read.
            headers: Of its record.
        """
        at = offset - self.span.start
        flags = self._flags[at]
        self.responses += 1
        if not flags & _KNOWN:
            problem: str | None = "there is no such record"
        elif response is None:
            problem = "the response cannot be decoded"
        else:
            problem = self._contradiction(offset, flags, self._digests[at], response)
            problem = problem or _header_contradiction(response, headers)
        if flags & _KNOWN and not flags & _ANSWERED:
            self.answered += 1
        flags |= _ANSWERED | (_DUPLICATED if flags & _ANSWERED else 0) | (_MISMATCHED if problem else 0)
        self._flags[at] = flags
        return problem

    def missing(self) -> Iterator[str]:
        """Yield the ids of records without a response, in order."""
        return self._ids(_KNOWN | _ANSWERED, _KNOWN)

    def duplicated(self) -> Iterator[str]:
        """Yield the ids that have more than one response, in order."""
        return self._ids(_DUPLICATED, _DUPLICATED)

    def mismatched(self) -> Iterator[str]:
        """Yield the ids of which a response contradicts the record, in order."""
        return self._ids(_MISMATCHED, _MISMATCHED)

    def _ids(self, mask: int, wanted: int) -> Iterator[str]:
        values = bytes(value for value in range(256) if value & mask == wanted)
        for found in re.finditer(b"[" + re.escape(values) + b"]", self._flags):
            yield response_id(self.span.topic, self.span.partition, self.span.start + found.start())

    def _contradiction(self, offset: int, flags: int, digest: int, response: Mapping[str, Any]) -> str | None:
        span, expected = self.span, flags & _EXPECTATION
        if response["source"] != {"topic": span.topic, "partition": span.partition, "offset": offset}:
            return "its source is another record than its id says"
        if response["index"] != offset:
            return f"its index is {response['index']}"
        result = response["result"]
        code = result["code"] if result["type"] == "Failure" else None
        if flags & _FRAMED and code == "unknown_schema":
            expected = _ANYTHING
        problem = _result_contradiction(expected, result, response["status"])
        if problem is not None or expected == _ANYTHING:
            return problem
        if code == "panic" and response["kind"] is None and response["key"] is None:
            return None  # a response that could not be written; nothing is echoed then
        context = response["context"]
        scopes = (
            None
            if context is None
            else (context["usecase"], [(one["name"], one["value"]) for one in context["scopes"]])
        )
        key = None if expected == _KEYLESS else response["key"]
        if expected != _POISON:
            code = None
        if _digest(response["kind"], key, response["request_id"], scopes, code) != digest:
            return "kind, key, request id, context or failure differ from its record's"
        return None


def _digest(
    kind: str | None,
    key: str | None,
    request_id: str | None,
    context: tuple[str, list[tuple[str, str]]] | None,
    code: str | None,
) -> int:
    return crc32(repr((kind, key, request_id, context, code)).encode("utf-8", "backslashreplace"))


def _result_contradiction(expected: int, result: Mapping[str, Any], status: int) -> str | None:
    """Return how result and status contradict each other, or what the record can be answered with."""
    kind, code = result["type"], result.get("code")
    if kind == "Failure":
        if STATUS_BY_CODE.get(code or "") != status:
            return f"status {status} does not belong to {code}"
        if expected in {_ANYTHING, _POISON}:  # which failure it has to be is part of the checksum
            return None
        if code not in _FAILURES or (code in _INSERT_FAILURES and expected not in {_INSERT, _KEYLESS}):
            return f"no such operation fails with {code}"
        return None
    if expected == _POISON:
        return f"the record cannot be decoded, and was answered with {status}"
    if expected != _ANYTHING:
        name, statuses = _SUCCESSES[expected]
        if kind != name or status not in statuses:
            return f"no such operation is answered with {kind} and status {status}"
    content = _CONTENT.get(kind)
    if content is not None and (result[content] is None) != (status == 404):
        return f"status {status} contradicts what was found"
    return None


def _header_contradiction(response: Mapping[str, Any], headers: Headers) -> str | None:
    """Return which of our headers contradicts the value; one that is not there says nothing."""
    for name, value in headers:
        if name == "tierstream-status" and value != b"%d" % response["status"]:
            return "header tierstream-status differs from the response"
        if name == "tierstream-kind" and value != (response["kind"] or "unknown").encode():
            return "header tierstream-kind differs from the response"
    return None


@dataclass(slots=True)
class Verdict:
    """The ledgers of all partitions, and what belongs to none of them."""

    ledgers: dict[Partition, PartitionLedger]
    strays: list[str] = field(default_factory=list)
    """Places in the output topic of what is no response at all."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why responses are mismatched, by id: of the first :data:`EXPLAINED_MAX`."""

    @property
    def records(self) -> int:
        """Input records in the range."""
        return sum(ledger.records for ledger in self.ledgers.values())

    @property
    def responses(self) -> int:
        """Responses to them, repeated ones included."""
        return sum(ledger.responses for ledger in self.ledgers.values())

    @property
    def unanswered(self) -> int:
        """Records without a response."""
        return sum(ledger.records - ledger.answered for ledger in self.ledgers.values())

    def missing(self) -> Iterator[str]:
        """Yield ids, in order of topic, partition and offset."""
        for ledger in self.ledgers.values():
            yield from ledger.missing()

    def duplicated(self) -> Iterator[str]:
        """Yield ids, as above."""
        for ledger in self.ledgers.values():
            yield from ledger.duplicated()

    def mismatched(self) -> Iterator[str]:
        """Yield ids, as above, then the places of strays."""
        for ledger in self.ledgers.values():
            yield from ledger.mismatched()
        yield from self.strays

    def answer(self, record: Record, framing: str) -> None:
        """Enter a record of the output topic."""
        try:
            response = None if record.value is None else decode_response(unframed(record.value, framing))
        except DecodeError:
            response = None
        identity = source_of(record.headers, response)
        if identity is None:
            self.strays.append(response_id(record.topic, record.partition, record.offset))
            self._explain(self.strays[-1], "no response, and without a response id")
            return
        topic, partition, offset = identity
        ledger = self.ledgers.get((topic, partition))
        if ledger is not None and ledger.span.start <= offset < ledger.span.end:
            problem = ledger.answer(offset, response, record.headers)
            if problem is not None:
                self._explain(response_id(topic, partition, offset), problem)

    def _explain(self, identity: str, reason: str) -> None:
        if len(self.reasons) < EXPLAINED_MAX:
            self.reasons.setdefault(identity, reason)


def source_of(headers: Headers, response: Mapping[str, Any] | None) -> tuple[str, int, int] | None:
    """Return topic, partition and offset of the record that was answered: by the header, else by the response."""
    for name, value in headers:
        if name == "tierstream-response-id" and value is not None:
            found = _ID.fullmatch(value.decode(errors="replace"))
            if found is not None:
                return found[1], int(found[2]), int(found[3])
    if response is None:
        return None
    source = response["source"]
    return source["topic"], source["partition"], source["offset"]


def unframed(value: bytes, framing: str) -> bytes:
    """Return a response without the frame of a registry, if it has one; other frames are the decoder's."""
    if framing == "confluent" and value[:1] in {b"\x00", b"\x01"}:
        return value[5 if value[0] == 0 else 17 :]
    return value


# ------------------------------------------------------------------------------------------------- reading


async def verify(
    config: Config,
    topics: Sequence[str],
    start: Position,
    end: Position,
    *,
    responses_from: Position = "earliest",
    wait_seconds: float = 0.0,
    registry: SchemaRegistry | None = None,
) -> Verdict:
    """Read *topics* from *start* to *end*, then the output topic, and compare.

    Args:
        config: Names the output topic and how brokers are reached; its framing and limits say how records are decoded.
        topics: Input topics.
        start: The first record, per partition.
        end: Where to stop, per partition; that record is not looked at.
        responses_from: Where the output topic is read from; it has to be before the first response of the range.
        wait_seconds: How long to go on looking for responses that are still missing.
        registry: Knows the schemas that frames name; None = nobody does.

    Raises:
        ClusterUnavailable: no broker answers, or records that exist do not come.
        ClusterRefusal: a topic does not exist, or may not be read.
        TooManyOffsets: the range has more than :data:`OFFSETS_MAX` offsets.
    """
    verdict = Verdict({})
    decoder = OperationDecoder(
        framing=config.input.framing,
        record_bytes_max=config.limits.record_bytes,
        object_bytes_max=64 * GIB,  # larger than any record: whether an object was too large is not judged here
        elements_max=config.limits.avro_elements,
        resolver=registry,
    )
    offsets = 0
    for topic in topics:
        committed_only = config.input.isolation == "read_committed"
        async with open_reader(config, topic, committed_only=committed_only) as (reader, partitions, first, ends):
            spans = await spans_of(config, partitions, first, ends, start, end)
            offsets += sum(span.end - span.start for span in spans.values())
            if offsets > OFFSETS_MAX:
                raise TooManyOffsets(f"the range has {offsets} offsets, and at most {OFFSETS_MAX} are verified at once")
            for span in spans.values():
                verdict.ledgers[topic, span.partition] = PartitionLedger(span)
            await _enter_all(reader, spans, verdict, decoder, registry)
    await _answer_all(config, verdict, responses_from, wait_seconds)
    return verdict


class TooManyOffsets(TierstreamError):
    """The range is too large for one run."""

    code = "config_error"


async def _enter_all(
    reader: AIOKafkaConsumer,
    spans: Mapping[TopicPartition, Span],
    verdict: Verdict,
    decoder: OperationDecoder,
    registry: SchemaRegistry | None,
) -> None:
    silent: set[str] = set()
    for partition, span in spans.items():
        reader.seek(partition, span.start)
    async for record in read_until(reader, {partition: span.end for partition, span in spans.items()}):
        framed = False
        if registry is not None:
            schema_id = decoder.schema_id(record.value, record.headers)
            framed = schema_id not in {None, OPERATION_FINGERPRINT}
            if framed and schema_id is not None and schema_id not in silent and not await told(registry, schema_id):
                silent.add(schema_id)
        decoded = decoder.decode(record.value, record.headers)
        verdict.ledgers[record.topic, record.partition].enter(record.offset, decoded, framed=framed)


async def told(registry: SchemaRegistry, schema_id: str) -> bool:
    """Wait until *registry* has told what a schema is, bounded; False where it does not."""
    try:
        async with asyncio.timeout(REGISTRY_SECONDS):
            await registry.ensure(schema_id)
    except TimeoutError:
        return False
    return True


async def _answer_all(config: Config, verdict: Verdict, begin: Position, wait_seconds: float) -> None:
    async with open_reader(config, config.output.topic) as (reader, partitions, first, ends):
        for partition, span in (await spans_of(config, partitions, first, ends, begin, "latest")).items():
            reader.seek(partition, span.start)
        deadline = time.monotonic() + wait_seconds
        until = ends
        while True:
            async for record in read_until(reader, until):
                verdict.answer(record, config.output.framing)
            if not verdict.unanswered or time.monotonic() >= deadline:
                return
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            until = await ends_of(reader, partitions)


async def spans_of(
    config: Config,
    partitions: Sequence[TopicPartition],
    first: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
    start: Position,
    end: Position,
) -> dict[TopicPartition, Span]:
    """Return what of *start* to *end* is there, given where partitions begin and end.

    Raises:
        ClusterUnavailable, ClusterRefusal: as :func:`~consumer.kafka.ranges.offsets_at`.
    """
    places = [(partition.topic, partition.partition) for partition in partitions]
    async with Cluster(config) as cluster:
        starts = await offsets_at(cluster, places, start)
        stops = await offsets_at(cluster, places, end)
    spans: dict[TopicPartition, Span] = {}
    for partition, place in zip(partitions, places, strict=True):
        begin = min(max(starts[place], first[partition]), ends[partition])
        stop = max(begin, min(stops[place], ends[partition]))
        lost = max(0, min(first[partition], stops[place]) - starts[place])
        spans[partition] = Span(partition.topic, partition.partition, begin, stop, lost)
    return spans
