"""The production ledger without brokers: what it finds missing, duplicated and mismatched."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumer.codec import OperationDecoder, ResponseEncoder, decode_response, encode_operation
from consumer.errors import (
    BackendUnavailable,
    DecodeError,
    InvalidOperation,
    OperationPanic,
    ReferenceFailure,
    TierstreamError,
    TooLarge,
)
from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.kafka.ledger import EXPLAINED_MAX, PartitionLedger, Span, Verdict, source_of
from consumer.kafka.tools import Record
from consumer.operations import (
    Delete,
    Deleted,
    Get,
    Got,
    Head,
    Headed,
    Insert,
    Inserted,
    Metadata,
    Operation,
    OpResponse,
    StoredObject,
)

CONTEXT = ObjectContext("u", [Scope("org", "1")])
INSERT = Insert(CONTEXT, "k", Metadata(), b"payload")
KEYLESS = Insert(CONTEXT, None, Metadata(), b"payload")
STORED = Metadata(time_created=datetime(2026, 1, 1, tzinfo=UTC), size=7)

GOOD: list[tuple[Operation, OpResponse | Exception]] = [
    (INSERT, Inserted(ObjectId(CONTEXT, "k"), STORED)),
    (KEYLESS, Inserted(ObjectId(CONTEXT, "generated"), STORED)),
    (Get(CONTEXT, "k"), Got("k", StoredObject(STORED, b"payload"))),
    (Get(CONTEXT, "k"), Got("k", None)),
    (Head(CONTEXT, "k"), Headed("k", STORED)),
    (Head(CONTEXT, "k"), Headed("k", None)),
    (Delete(CONTEXT, "k"), Deleted("k")),
    (INSERT, TooLarge("too large")),
    (INSERT, ReferenceFailure("no")),
    (KEYLESS, BackendUnavailable("gone")),
    (Get(CONTEXT, "k"), TooLarge("too large", code="response_too_large")),
    (Delete(CONTEXT, "k"), RuntimeError("a surprise")),
]
"""Operations, and outcomes they can have."""

decoder = OperationDecoder()


def value_of(offset: int, record: bytes | None, outcome: OpResponse | Exception, topic: str = "t") -> bytes:
    """Encode the response to a record as the service would."""
    return ResponseEncoder(topic, 3).encode(offset, decoder.decode(record), outcome, 0)[1]


def response_to(offset: int, record: bytes | None, outcome: OpResponse | Exception) -> dict[str, Any]:
    """Return the fields of that response."""
    return decode_response(value_of(offset, record, outcome))


def ledger_of(*records: bytes | None, start: int = 100) -> PartitionLedger:
    """Return a ledger of t/3 with *records* from offset *start* on."""
    ledger = PartitionLedger(Span("t", 3, start, start + len(records)))
    for offset, record in enumerate(records, start):
        ledger.enter(offset, decoder.decode(record))
    return ledger


def findings(ledger: PartitionLedger) -> tuple[list[str], list[str], list[str]]:
    """Return what is missing, duplicated, mismatched."""
    return list(ledger.missing()), list(ledger.duplicated()), list(ledger.mismatched())


class TestCounting:
    """Missing and duplicated."""

    def test_a_record_without_a_response_is_missing(self) -> None:
        """DEL: none may be lost."""
        record = encode_operation(INSERT)
        ledger = ledger_of(record, record, record)
        ledger.answer(101, response_to(101, record, GOOD[0][1]))

        assert findings(ledger) == (["t/3/100", "t/3/102"], [], [])
        assert (ledger.records, ledger.answered, ledger.responses) == (3, 1, 1)

    def test_a_second_response_is_a_duplicate_however_many_there_are(self) -> None:
        """Each id is named once."""
        record = encode_operation(INSERT)
        ledger = ledger_of(record)
        for _ in range(3):
            assert ledger.answer(100, response_to(100, record, GOOD[0][1])) is None

        assert findings(ledger) == ([], ["t/3/100"], [])
        assert (ledger.answered, ledger.responses) == (1, 3)

    def test_a_gap_between_offsets_is_no_record(self) -> None:
        """H9b: transaction markers and compaction leave gaps."""
        ledger = PartitionLedger(Span("t", 3, 10, 20))
        ledger.enter(14, decoder.decode(None))

        assert findings(ledger) == (["t/3/14"], [], [])

    def test_a_response_to_a_gap_is_a_mismatch(self) -> None:
        """Nobody asked."""
        ledger = PartitionLedger(Span("t", 3, 10, 20))

        problem = ledger.answer(15, response_to(15, None, InvalidOperation("no")))

        assert problem == "there is no such record"
        assert findings(ledger) == ([], [], ["t/3/15"])

    def test_a_record_read_twice_counts_once(self) -> None:
        """A reader may go back a little."""
        ledger = ledger_of(encode_operation(INSERT))
        ledger.enter(100, decoder.decode(encode_operation(INSERT)))

        assert ledger.records == 1

    def test_memory_is_five_bytes_an_offset_whatever_records_hold(self) -> None:
        """Millions of records fit."""
        record = decoder.decode(encode_operation(Insert(CONTEXT, "k" * 800, Metadata(), b"")))
        tracemalloc.start()
        ledger = PartitionLedger(Span("t", 3, 0, 1_000_000))
        for offset in range(0, 1_000_000, 100):
            ledger.enter(offset, record)
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert ledger.records == 10_000
        assert used < 6_000_000


class TestMatching:
    """Mismatched."""

    @pytest.mark.parametrize(("operation", "outcome"), GOOD)
    def test_what_the_service_writes_fits(self, operation: Operation, outcome: OpResponse | Exception) -> None:
        """Every kind of outcome of contract 2.2, with and without a request id."""
        for request_id in (None, "r"):
            record = encode_operation(operation, request_id)
            ledger = ledger_of(record)

            assert ledger.answer(100, response_to(100, record, outcome)) is None
            assert findings(ledger) == ([], [], [])

    @pytest.mark.parametrize("record", [None, b"", b"\x00\x00\x00\x00\x09x", encode_operation(INSERT)[:-1], b"\xc3"])
    def test_poison_fits_the_failure_it_decodes_to(self, record: bytes | None) -> None:
        """Contract 2.2: exactly that code."""
        ledger = ledger_of(record)
        error = decoder.decode(record).error
        assert error is not None

        assert ledger.answer(100, response_to(100, record, error)) is None

    def test_poison_with_another_failure_does_not(self) -> None:
        """A truncated record is not an invalid one."""
        ledger = ledger_of(b"")

        assert ledger.answer(100, response_to(100, b"", InvalidOperation("no"))) is not None
        assert findings(ledger) == ([], [], ["t/3/100"])

    @pytest.mark.parametrize(
        ("asked", "answered", "outcome"),
        [
            pytest.param(INSERT, Insert(CONTEXT, "other", Metadata(), b""), None, id="another key"),
            pytest.param(INSERT, Insert(ObjectContext("v"), "k", Metadata(), b""), None, id="another usecase"),
            pytest.param(
                INSERT, Insert(ObjectContext("u", [Scope("org", "2")]), "k", Metadata(), b""), None, id="another scope"
            ),
            pytest.param(Get(CONTEXT, "k"), Head(CONTEXT, "k"), Headed("k", None), id="another kind"),
            pytest.param(Get(CONTEXT, "k"), Get(CONTEXT, "k"), Deleted("k"), id="another kind of result"),
            pytest.param(Get(CONTEXT, "k"), Get(CONTEXT, "k"), ReferenceFailure("no"), id="an insert's failure"),
            pytest.param(INSERT, INSERT, InvalidOperation("no"), id="poison it is not"),
            pytest.param(INSERT, INSERT, TierstreamError("no", code="at_capacity"), id="a failure never answered"),
        ],
    )
    def test_what_contradicts_the_record_is_found(
        self, asked: Operation, answered: Operation, outcome: OpResponse | Exception | None
    ) -> None:
        """Kind, key and context have to be the record's; the result one its kind can have."""
        ledger = ledger_of(encode_operation(asked))
        if outcome is None:
            outcome = Inserted(ObjectId(answered.context, answered.key or "generated"), STORED)

        problem = ledger.answer(100, response_to(100, encode_operation(answered), outcome))

        assert problem
        assert findings(ledger) == ([], [], ["t/3/100"])

    @pytest.mark.parametrize("request_id", [None, "", "other"])
    def test_another_request_id_is_found(self, request_id: str | None) -> None:
        """Absent, empty and different are three things."""
        ledger = ledger_of(encode_operation(INSERT, "r"))

        assert ledger.answer(100, response_to(100, encode_operation(INSERT, request_id), GOOD[0][1]))

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"index": 101}, "index"),
            ({"source": {"topic": "t", "partition": 3, "offset": 101}}, "source"),
            ({"source": {"topic": "t", "partition": 2, "offset": 100}}, "source"),
            ({"status": 200}, "status"),
            ({"status": 404}, "status"),
        ],
    )
    def test_every_field_is_held_against_the_record(self, change: dict[str, Any], reason: str) -> None:
        """Contract 2.2: index, source, status."""
        record = encode_operation(INSERT)
        ledger = ledger_of(record)

        problem = ledger.answer(100, {**response_to(100, record, GOOD[0][1]), **change})

        assert problem
        assert reason in problem

    @pytest.mark.parametrize(("status", "found"), [(200, False), (404, True)])
    def test_a_missing_object_is_404_and_a_found_one_is_not(self, *, status: int, found: bool) -> None:
        """Contract 2.2."""
        record = encode_operation(Get(CONTEXT, "k"))
        ledger = ledger_of(record)
        outcome = Got("k", StoredObject(STORED, b"") if found else None)

        assert ledger.answer(100, {**response_to(100, record, outcome), "status": status})

    @pytest.mark.parametrize(
        "header", [("tierstream-status", b"200"), ("tierstream-kind", b"get"), ("tierstream-kind", None)]
    )
    def test_headers_have_to_say_the_same(self, header: tuple[str, bytes | None]) -> None:
        """Contract 2.3."""
        record = encode_operation(INSERT)
        right = [("tierstream-status", b"201"), ("tierstream-kind", b"insert"), ("traceparent", None)]

        assert ledger_of(record).answer(100, response_to(100, record, GOOD[0][1]), right) is None
        assert ledger_of(record).answer(100, response_to(100, record, GOOD[0][1]), [*right, header])

    def test_a_response_that_could_not_be_written_echoes_nothing(self) -> None:
        """It is a panic without an echo, and the record's answer all the same."""
        ledger = ledger_of(encode_operation(INSERT, "r"))

        assert ledger.answer(100, response_to(100, None, OperationPanic("cannot be written"))) is None

    def test_what_cannot_be_known_is_not_judged_except_for_its_place(self) -> None:
        """Values whose schema only a registry knows."""
        ledger = PartitionLedger(Span("t", 3, 100, 102))
        for offset in (100, 101):
            ledger.enter(offset, decoder.decode(b"\x00\x00\x00\x00\x09x"), framed=True)
        right = response_to(100, encode_operation(INSERT, "r"), GOOD[0][1])
        wrong = {**response_to(101, encode_operation(INSERT, "r"), GOOD[0][1]), "index": 100}

        assert ledger.answer(100, right) is None
        assert ledger.answer(101, wrong)

    def test_a_schema_known_now_may_have_been_unknown_then(self) -> None:
        """It was registered later; without a frame there is no such excuse."""
        record = encode_operation(INSERT, "r")
        bare, framed = ledger_of(record), PartitionLedger(Span("t", 3, 100, 102))
        for offset in (100, 101):
            framed.enter(offset, decoder.decode(record), framed=True)
        unknown = response_to(100, None, DecodeError("nobody knows it", code="unknown_schema"))

        assert framed.answer(100, unknown) is None
        assert framed.answer(101, response_to(101, encode_operation(INSERT, "other"), GOOD[0][1]))
        assert bare.answer(100, unknown)


class TestAttribution:
    """Whose response it is."""

    def record(self, value: bytes | None, *headers: tuple[str, bytes | None], offset: int = 7) -> Record:
        """Return a record of the output topic."""
        return cast(
            "Record", SimpleNamespace(topic="responses", partition=0, offset=offset, value=value, headers=headers)
        )

    @pytest.fixture
    def verdict(self) -> Verdict:
        """A ledger of one record, t/3/100."""
        return Verdict({("t", 3): ledger_of(encode_operation(INSERT))})

    def test_the_id_says_it(self, verdict: Verdict) -> None:
        """Contract 2.3: the duplicate-detection key."""
        value = value_of(100, encode_operation(INSERT), GOOD[0][1])

        verdict.answer(self.record(value, ("tierstream-response-id", b"t/3/100")), "bare")

        assert (verdict.unanswered, list(verdict.mismatched())) == (0, [])

    def test_the_source_says_it_where_there_is_no_id(self, verdict: Verdict) -> None:
        """Headers may be lost on the way, in a mirror for instance."""
        verdict.answer(self.record(value_of(100, encode_operation(INSERT), GOOD[0][1])), "bare")

        assert (verdict.unanswered, list(verdict.mismatched())) == (0, [])

    @pytest.mark.parametrize("frame", [b"\x00\x00\x00\x00\x05", b"\x01" + bytes(16)])
    def test_a_registry_frame_is_taken_off(self, verdict: Verdict, frame: bytes) -> None:
        """Contract 2.4: `output.framing: confluent`."""
        value = frame + value_of(100, encode_operation(INSERT), GOOD[0][1])

        verdict.answer(self.record(value), "confluent")

        assert (verdict.unanswered, list(verdict.mismatched())) == (0, [])

    def test_an_unreadable_response_is_its_records_mismatch(self, verdict: Verdict) -> None:
        """It is an answer, and a wrong one."""
        verdict.answer(self.record(b"\xff", ("tierstream-response-id", b"t/3/100")), "bare")

        assert verdict.unanswered == 0
        assert list(verdict.mismatched()) == ["t/3/100"]
        assert verdict.reasons == {"t/3/100": "the response cannot be decoded"}

    @pytest.mark.parametrize("value", [None, b"", b"\xff"])
    def test_what_is_no_response_at_all_is_named_by_its_own_place(self, verdict: Verdict, value: bytes | None) -> None:
        """Somebody else writes to the output topic."""
        verdict.answer(self.record(value, ("tierstream-response-id", b"t/3")), "bare")

        assert list(verdict.mismatched()) == ["responses/0/7"]
        assert verdict.unanswered == 1

    @pytest.mark.parametrize("identity", [b"t/3/99", b"t/3/101", b"t/2/100", b"other/3/100"])
    def test_responses_to_other_records_are_passed_over(self, verdict: Verdict, identity: bytes) -> None:
        """The output topic holds more than the range."""
        verdict.answer(self.record(b"\xff", ("tierstream-response-id", identity)), "bare")

        assert (verdict.responses, list(verdict.mismatched())) == (0, [])

    def test_topics_may_have_slashes_in_no_name_but_ids_are_read_from_the_end(self) -> None:
        """The last two parts are numbers."""
        assert source_of([("tierstream-response-id", b"a/b/3/100")], None) == ("a/b", 3, 100)

    def test_reasons_are_bounded(self, verdict: Verdict) -> None:
        """A topic full of something else must not fill the memory with words."""
        for offset in range(EXPLAINED_MAX + 5):
            verdict.answer(self.record(None, offset=offset), "bare")

        assert len(verdict.reasons) == EXPLAINED_MAX
        assert len(list(verdict.mismatched())) == EXPLAINED_MAX + 5


def test_the_ledger_agrees_with_lists() -> None:
    """Against a naive model: random records, answers and repeats."""
    chance = random.Random(7)
    record = encode_operation(INSERT)
    ledger = PartitionLedger(Span("t", 3, 1000, 3000))
    known = sorted(chance.sample(range(1000, 3000), 1500))
    for offset in known:
        ledger.enter(offset, decoder.decode(record))
    answers = [offset for offset in known for _ in range(chance.choice([0, 1, 1, 1, 2, 3]))]
    chance.shuffle(answers)
    wrong = {offset for offset in answers if chance.random() < 0.1}
    encode: Callable[[int], dict[str, Any]] = lambda offset: response_to(offset, record, GOOD[0][1])  # noqa: E731
    for offset in answers:
        ledger.answer(offset, {**encode(offset), "index": -1} if offset in wrong else encode(offset))

    assert findings(ledger) == (
        [f"t/3/{offset}" for offset in known if offset not in answers],
        [f"t/3/{offset}" for offset in known if answers.count(offset) > 1],
        [f"t/3/{offset}" for offset in known if offset in wrong],
    )
    assert (ledger.records, ledger.responses) == (1500, len(answers))
