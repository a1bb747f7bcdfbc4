"""The ledger beside the system: what was put in, what came out, and the judgement, by clients of its own.

Records are produced and responses read with librdkafka (confluent-kafka) and Apache's Avro (`wire`); nothing here is
shared with the service, and nothing the service says about itself is believed. For every input record the ledger knows
topic, partition and offset (from the broker's acknowledgement) and what an answer may look like; `verdict` compares:

missing
    input records without any response.
duplicated
    input records with more than one, by the count of surplus ones.
mismatched
    responses that contradict their record: index, source, request id, object key, payload, kind, status, headers,
    record key, output partition.

And of dead letters, which are due to all that cannot be decoded and to what is answered with certain codes:

letters missing, letters repeated, letters mismatched
    the same three; a letter is mismatched where it is not its record as it was, or where its record deserves none.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

import wire
from brokers import Broker

LEADER_SECONDS = 20
"""A client of ours has found the new leader of a partition by then."""

DEAD_LETTER_CODES = frozenset(
    {
        *("decode_error", "unknown_schema", "unsafe_schema", "null_value", "invalid_operation", "invalid_metadata"),
        *("panic", "backend_error"),
    }
)
"""Contract 2.2: what is answered with one of these is dead-lettered as well; so is what is too large to be decoded."""

OF_THE_RUN = frozenset({"panic", "backend_error"})
"""Those of them that say nothing of the record: run again, it may be answered otherwise."""

DEAD_LETTER_HEADER = "tierstream-dlq-"

Headers = list[tuple[str, bytes | None]]


@dataclass(frozen=True)
class Content:
    """What an object holds, in few bytes."""

    size: int
    sha256: str

    @classmethod
    def of(cls, payload: bytes) -> Content:
        """Describe a payload."""
        return cls(len(payload), hashlib.sha256(payload).hexdigest())


@dataclass(frozen=True)
class Entry:
    """One input record as acknowledged by the broker, and what its response may say (None: anything)."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    request_id: str | None = None
    kind: str | None = None
    """Operation kind, ``unknown`` for a record that cannot be decoded."""
    statuses: frozenset[int] = frozenset()
    timestamp: int = 0
    """Milliseconds since the epoch: the producer's time, or the broker's where the topic is made so."""
    object_key: str | None = None
    """Of the object it is about; None where the service chooses it, too."""
    content: Content | None = None
    """Of that object, once it is done: of an insert what it brings, of another one what its only writer has written."""

    @property
    def id(self) -> str:
        """The response id of the contract: TOPIC/PARTITION/OFFSET."""
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True)
class Answer:
    """One record of the output or dead letter topic."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp: int

    def header(self, name: str) -> str | None:
        """The text of the only header *name*; None if there is none."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} stands {len(values)} times"
        return values[0].decode() if values and values[0] is not None else None

    @cached_property
    def response(self) -> dict[str, Any]:
        """The value, decoded as a response."""
        assert self.value is not None
        return wire.read_response(self.value)

    @property
    def status(self) -> int:
        """The response's status."""
        status: int = self.response["status"]
        return status

    @property
    def result(self) -> dict[str, Any]:
        """The result's fields; its type stands in `result_type`."""
        fields: dict[str, Any] = self.response["result"][1]
        return fields

    @property
    def result_type(self) -> str:
        """Inserted, Got, Headed, Deleted or Failure."""
        name: str = self.response["result"][0]
        return name

    @property
    def code(self) -> str | None:
        """The failure's code; None for a success."""
        return self.result["code"] if self.result_type == "Failure" else None


@dataclass
class Verdict:
    """What is wrong; all empty is right."""

    records: int
    responses: int
    missing: list[str]
    duplicated: dict[str, int]
    mismatched: list[str]
    letters_missing: list[str] = field(default_factory=list)
    letters_repeated: dict[str, int] = field(default_factory=dict)
    letters_mismatched: list[str] = field(default_factory=list)
    """Of dead letters: only where the ledger has been asked to read them (`Ledger.read_all`)."""

    @property
    def surplus(self) -> int:
        """Responses beyond one a record."""
        return sum(self.duplicated.values())

    def __str__(self) -> str:
        """Counts, then the first few of everything that is wrong."""
        return (
            f"{self.records} records, {self.responses} responses, {len(self.missing)} missing {self.missing[:5]}, "
            f"{self.surplus} surplus {list(self.duplicated.items())[:5]}, "
            f"{len(self.mismatched)} mismatched {self.mismatched[:5]}"
        )


class Reader:
    """Reads all partitions of a topic from the start, as far as asked; remembers nothing but its position."""

    def __init__(self, broker: Broker, topic: str, *, isolation: str = "read_uncommitted") -> None:
        """Prepare; nothing is read before `read_to_end`."""
        self.topic = topic
        self._reached: defaultdict[int, int] = defaultdict(int)
        self._delivered: defaultdict[int, int] = defaultdict(lambda: -1)
        """Partition to the last offset given out: what the client brings again after an outage is no new record."""
        self.brought_again = 0
        self._consumer = Consumer(
            {
                "bootstrap.servers": broker.bootstrap,
                "group.id": "ledger",  # never joined: partitions are assigned by hand and nothing is committed
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "isolation.level": isolation,
                "fetch.message.max.bytes": 2_000_000,  # what a look does not finish is dropped by the pause after it
                "fetch.wait.max.ms": 50,
                "log_level": 0,
            }
        )
        partitions = broker.admin.list_topics(topic, timeout=20).topics[topic].partitions
        self.partition_count = len(partitions)
        self._partitions = [TopicPartition(topic, partition, 0) for partition in partitions]
        self._consumer.assign(self._partitions)
        self._consumer.pause(self._partitions)

    def poll(self, seconds: float = 0.1) -> list[Answer]:
        """Whatever arrives within *seconds*, at most 10,000 records.

        Raises:
            KafkaException: the topic cannot be read.
        """
        answers = []
        # Fetching only while asked: the embedded broker answers a fetch of nothing at once, so that a client left alone
        # would ask again without end and take the processor from the service under test.
        self._consumer.resume(self._partitions)
        records = self._consumer.consume(10_000, timeout=seconds)
        self._consumer.pause(self._partitions)
        for record in records:
            partition, offset, error = record.partition() or 0, record.offset() or 0, record.error()
            if error is None:
                self._reached[partition] = offset + 1
                if offset > self._delivered[partition]:
                    self._delivered[partition] = offset
                    answers.append(self._answer(record))
                else:
                    self.brought_again += 1
            elif error.code() == KafkaError._PARTITION_EOF:
                self._reached[partition] = offset  # beyond transaction markers, which are never delivered
            else:
                raise KafkaException(error)
        return answers

    def read_to_end(self, deadline_seconds: float = 30) -> Iterator[Answer]:
        """Read up to the end offsets as they are at the call."""
        ends = {partition: self._end(partition) for partition in range(self.partition_count)}
        deadline = time.monotonic() + deadline_seconds
        while any(self._reached[partition] < end for partition, end in ends.items()):
            yield from self.poll()
            assert time.monotonic() < deadline, f"{self.topic} not read to its end: at {dict(self._reached)} of {ends}"

    def _end(self, partition: int) -> int:
        """Where a partition ends; asks again where its leader has moved and the client does not know it yet."""
        deadline = time.monotonic() + LEADER_SECONDS
        while True:
            try:
                return self._consumer.get_watermark_offsets(TopicPartition(self.topic, partition), timeout=20)[1]
            except KafkaException as error:
                if error.args[0].code() != KafkaError.NOT_LEADER_FOR_PARTITION or time.monotonic() > deadline:
                    raise
            self._consumer.list_topics(self.topic, timeout=20)  # expressly, as else it goes on believing
            time.sleep(0.1)

    def close(self) -> None:
        """Release the client."""
        self._consumer.close()

    @staticmethod
    def _answer(record: Message) -> Answer:
        headers: Any = record.headers() or []
        return Answer(
            partition=record.partition() or 0,
            offset=record.offset() or 0,
            key=record.key(),
            value=record.value(),
            headers=headers,
            timestamp=record.timestamp()[1],
        )


@dataclass
class Ledger:
    """Input, output and dead letter topic of one service, and everything that went through them."""

    broker: Broker
    input: str
    output: str
    dead_letter: str
    isolation: str = "read_uncommitted"
    """What the checking reader sees: also records of open and aborted transactions, or those of committed ones."""
    entries: dict[str, Entry] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))
    """Responses by response id."""
    dead_letters: dict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))
    """Dead letters by response id."""

    def __post_init__(self) -> None:
        """Open the clients."""
        self._producer = Producer(
            {
                "bootstrap.servers": self.broker.bootstrap,
                "enable.idempotence": True,
                "message.max.bytes": self.broker.record_bytes_max,
                "linger.ms": 1,
                "log_level": 0,
            }
        )
        self._unplaced: list[tuple[int, bytes | None, Callable[[int, int], None]]] = []
        """Acknowledged, nobody knows where: partition, value, and what enters it."""
        self._output = Reader(self.broker, self.output, isolation=self.isolation)
        self._dead_letter = Reader(self.broker, self.dead_letter, isolation=self.isolation)
        self.partition_count = len(self.broker.admin.list_topics(self.input, timeout=20).topics[self.input].partitions)

    @property
    def output_partition_count(self) -> int:
        """How many partitions the output topic has."""
        return self._output.partition_count

    @property
    def brought_again(self) -> int:
        """How many responses its own reader was brought more than once."""
        return self._output.brought_again

    def close(self) -> None:
        """Release the clients."""
        self._output.close()
        self._dead_letter.close()

    # ------------------------------------------------------------------------------------------------ in

    def send(
        self,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int = 0,
        headers: Sequence[tuple[str, bytes | None]] = (),
        request_id: str | None = None,
        kind: str | None = None,
        statuses: Collection[int] = (),
        object_key: str | None = None,
        content: Content | None = None,
        wait: bool = True,
    ) -> list[Entry]:
        """Produce one record; with *wait* return its entry (alone in a list) once the broker has acknowledged it.

        Without *wait* the entry is entered when the acknowledgement arrives; call `flush`.
        """
        sent: list[Entry] = []

        def enter(offset: int, timestamp: int) -> None:
            entry = Entry(
                self.input,
                partition,
                offset,
                key,
                value,
                list(headers),
                request_id,
                kind,
                frozenset(statuses),
                timestamp,
                object_key,
                content,
            )
            self.entries[entry.id] = entry
            sent.append(entry)

        def acknowledged(error: KafkaError | None, record: Message) -> None:
            if error is not None:
                raise KafkaException(error)
            offset = record.offset()
            if offset is None:  # written before the broker went away, which does not tell where
                self._unplaced.append((partition, value, enter))
            else:
                enter(offset, record.timestamp()[1])

        while True:
            try:
                self._producer.produce(
                    self.input,
                    value=value,
                    key=key,
                    partition=partition,
                    headers=list(headers),
                    on_delivery=acknowledged,
                )
                break
            except BufferError:  # librdkafka's queue is full: let it deliver
                self._producer.poll(0.5)
        self._producer.poll(0)
        if wait:
            self.flush()
            assert len(sent) == 1
        return sent

    def operate(
        self,
        kind: str,
        object_key: str | None = None,
        payload: Any = b"",
        *,
        statuses: Collection[int] = (),
        key: bytes | None = None,
        partition: int = 0,
        headers: Sequence[tuple[str, bytes | None]] = (),
        holds: bytes | None = None,
        wait: bool = True,
        **operation: Any,
    ) -> list[Entry]:
        """Produce one operation (`wire.operation`) and enter it; the request id is made up unless given.

        *holds* is what the object then holds, where nobody else writes it: what a get has to bring, if it finds it.
        """
        if kind == "insert" and isinstance(payload, bytes):
            holds = payload
        operation.setdefault("request_id", f"r-{partition}-{len(self.entries)}-{time.monotonic_ns()}")
        return self.send(
            wire.operation(kind, object_key, payload, **operation),
            key=key,
            partition=partition,
            headers=headers,
            request_id=operation["request_id"],
            kind=kind,
            statuses=statuses,
            object_key=object_key,
            content=None if holds is None else Content.of(holds),
            wait=wait,
        )

    def flush(self, seconds: float = 60) -> None:
        """Wait until the broker has acknowledged everything sent."""
        assert self._producer.flush(seconds) == 0, "the broker did not acknowledge the input"
        if self._unplaced:
            self._find_places()

    def _find_places(self) -> None:
        """Enter what was acknowledged without an offset where it is found in the input."""
        reader = Reader(self.broker, self.input)
        places: dict[tuple[int, bytes | None], list[Answer]] = defaultdict(list)
        for record in reader.read_to_end():
            if f"{self.input}/{record.partition}/{record.offset}" not in self.entries:
                places[record.partition, record.value].append(record)
        reader.close()
        while self._unplaced:
            partition, value, enter = self._unplaced.pop(0)
            found = places[partition, value].pop(0)
            enter(found.offset, found.timestamp)

    # ------------------------------------------------------------------------------------------------ out

    def _enter(self, answers: Iterable[Answer]) -> int:
        count = 0
        for answer in answers:
            self.answers[answer.header("tierstream-response-id") or "without an id"].append(answer)
            count += 1
        return count

    def _enter_dead_letters(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            where = (answer.header(f"{DEAD_LETTER_HEADER}{part}") for part in ("topic", "partition", "offset"))
            self.dead_letters["/".join(str(part) for part in where)].append(answer)

    def poll(self, seconds: float = 0.05) -> int:
        """Enter what arrives within *seconds*; return how many responses."""
        return self._enter(self._output.poll(seconds))

    def read_all(self) -> None:
        """Enter everything both topics hold by now."""
        self._enter(self._output.read_to_end())
        self._enter_dead_letters(self._dead_letter.read_to_end())

    def answered(self, entries: Iterable[Entry] | None = None) -> int:
        """How many of *entries* (default: of all) have a response by now."""
        return sum(entry.id in self.answers for entry in (self.entries.values() if entries is None else entries))

    def wait_answered(
        self, entries: Sequence[Entry] | None = None, *, seconds: float = 30, at_least: int | None = None
    ) -> None:
        """Read until *entries* (default: all, or *at_least* so many of them) are answered.

        Raises:
            TimeoutError: they were not, within *seconds*; names some.
        """
        wanted = list(self.entries.values()) if entries is None else entries
        deadline = time.monotonic() + seconds
        while self.answered(wanted) < (len(wanted) if at_least is None else at_least):
            if time.monotonic() > deadline:
                missing = [entry.id for entry in wanted if entry.id not in self.answers]
                raise TimeoutError(
                    f"{len(missing)} of {len(wanted)} records unanswered after {seconds:g} s: {missing[:10]}"
                )
            self.poll()

    def wait_dead_letter(self, entry: Entry, *, seconds: float = 20) -> Answer:
        """Read until *entry* stands on the dead letter topic; return the one record it has there."""
        deadline = time.monotonic() + seconds
        while entry.id not in self.dead_letters:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{entry.id} is not on the dead letter topic after {seconds:g} s")
            self._enter_dead_letters(self._dead_letter.poll(0.05))
        (answer,) = self.dead_letters[entry.id]
        return answer

    def answer(self, entries: Sequence[Entry], *, seconds: float = 30) -> Answer:
        """Wait for the response of the one entry given, check it against its record, and return it."""
        (entry,) = entries
        self.wait_answered([entry], seconds=seconds)
        (answer,) = self.answers[entry.id]
        assert self.contradictions(entry, answer) == []
        return answer

    def committed(self, group: str) -> dict[int, int]:
        """The group's committed offset by partition; partitions without one are left out. Joins nothing."""
        client = Consumer({"bootstrap.servers": self.broker.bootstrap, "group.id": group, "enable.auto.commit": False})
        try:
            asked = [TopicPartition(self.input, partition) for partition in range(self.partition_count)]
            return {where.partition: where.offset for where in client.committed(asked, timeout=20) if where.offset >= 0}
        finally:
            client.close()

    # ------------------------------------------------------------------------------------------------ judgement

    def contradictions(self, entry: Entry, answer: Answer) -> list[str]:
        """What *answer* says that cannot be said of *entry*."""
        response = answer.response
        expected = {
            "index": (entry.offset, response["index"]),
            "source": (
                {"topic": entry.topic, "partition": entry.partition, "offset": entry.offset},
                response["source"],
            ),
            "response id": (entry.id, answer.header("tierstream-response-id")),
            "status header": (str(response["status"]), answer.header("tierstream-status")),
            "kind header": (response["kind"] or "unknown", answer.header("tierstream-kind")),
            "output partition": (self._partition_of(entry, self._output), answer.partition),
        }
        if answer.header("tierstream-key-dropped") is None:
            expected["record key"] = (entry.key, answer.key)
        if entry.kind is not None:
            expected["kind"] = (entry.kind, response["kind"] or "unknown")
        if entry.request_id is not None:
            expected["request id"] = (entry.request_id, response["request_id"])
        if entry.object_key is not None and response["kind"] is not None and response["status"] != 400:
            expected["object key"] = (entry.object_key, response["key"])
        if entry.content is not None:
            expected |= _contents(entry.content, answer)
        wrong = _differences(entry, expected)
        if entry.statuses and response["status"] not in entry.statuses:
            wrong.append(f"{entry.id}: status {response['status']} {response['result']}, not {set(entry.statuses)}")
        return wrong

    def deserves_a_letter(self, entry: Entry) -> bool:
        """Whether *entry* has to be dead-lettered: it cannot be decoded, or was answered with a code that says so."""
        return entry.kind == "unknown" or any(
            answer.code in DEAD_LETTER_CODES for answer in self.answers.get(entry.id, ())
        )

    def letter_contradictions(self, entry: Entry, letter: Answer) -> list[str]:
        """What is in the dead letter *letter* that is not *entry*, whole and as it was."""
        code = letter.header(f"{DEAD_LETTER_HEADER}code")
        expected: dict[str, tuple[Any, Any]] = {
            "key": (entry.key, letter.key),
            "value": (
                None if letter.header(f"{DEAD_LETTER_HEADER}truncated") == "true" else entry.value,
                letter.value,
            ),
            "headers": (
                [header for header in entry.headers if not header[0].startswith(DEAD_LETTER_HEADER)],
                [header for header in letter.headers if not header[0].startswith(DEAD_LETTER_HEADER)],
            ),
            "partition": (self._partition_of(entry, self._dead_letter), letter.partition),
            "timestamp": (str(entry.timestamp), letter.header(f"{DEAD_LETTER_HEADER}timestamp")),
        }
        wrong = [f"dead letter of {text}" for text in _differences(entry, expected)]
        codes = {answer.code for answer in self.answers.get(entry.id, ())}
        if code not in OF_THE_RUN and not (self.deserves_a_letter(entry) and code in codes):
            wrong.append(f"dead letter of {entry.id}: because of {code}, but it is answered with {codes}")
        return wrong

    def _partition_of(self, entry: Entry, topic: Reader) -> int:
        """Contract 2.3: the same partition where there are as many."""
        count = topic.partition_count
        return entry.partition if count == self.partition_count else entry.partition % count

    def verdict(self) -> Verdict:
        """Compare everything that came out so far with everything that went in."""
        strangers = [f"{name}: a response to no record" for name in self.answers if name not in self.entries]
        lost = [f"{name}: a dead letter of no record" for name in self.dead_letters if name not in self.entries]
        return Verdict(
            records=len(self.entries),
            responses=sum(map(len, self.answers.values())),
            missing=[name for name in self.entries if name not in self.answers],
            duplicated=_surplus(self.answers),
            mismatched=strangers
            + [
                wrong
                for name, entry in self.entries.items()
                for answer in self.answers.get(name, [])
                for wrong in self.contradictions(entry, answer)
            ],
            letters_missing=[
                name
                for name, entry in self.entries.items()
                if name not in self.dead_letters and self.deserves_a_letter(entry)
            ],
            letters_repeated=_surplus(self.dead_letters),
            letters_mismatched=lost
            + [
                wrong
                for name, letters in self.dead_letters.items()
                if name in self.entries
                for letter in letters
                for wrong in self.letter_contradictions(self.entries[name], letter)
            ],
        )


def _differences(entry: Entry, expected: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"{entry.id}: {what} is {is_!r}, not {should!r}" for what, (should, is_) in expected.items() if should != is_
    ]


def _contents(content: Content, answer: Answer) -> dict[str, tuple[Any, Any]]:
    """What *answer* says of an object that holds *content*, where it says anything."""
    found = answer.result.get("object") if answer.result_type == "Got" else answer.result
    if found is None or found.get("metadata") is None:
        return {}
    said: dict[str, tuple[Any, Any]] = {"size": (content.size, found["metadata"]["size"])}
    payload = found.get("payload")
    if isinstance(payload, bytes):
        said["payload"] = (content, Content.of(payload))
    elif payload is not None:  # a reference: who follows it reads the bytes
        said["size of the payload referred to"] = (content.size, payload["size"])
    return said


def _surplus(copies: Mapping[str, Sequence[Answer]]) -> dict[str, int]:
    """How many there are too many of each."""
    return {name: len(all_of_it) - 1 for name, all_of_it in copies.items() if len(all_of_it) > 1}
