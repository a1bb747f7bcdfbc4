"""One assigned partition: every way of a record, a window and a byte from the fetch to the commit, and to the drain.

The storage service is the real one, over storage with gates; the lanes acknowledge on command.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from consumer import assignment as assignment_module
from consumer.assignment import (
    OPERATIONS_PER_POISON,
    POISON_BYTES,
    POISON_RUN,
    POISON_STEP,
    RECORD_OVERHEAD_BYTES,
)
from consumer.codec import Decoded, OperationDecoder
from consumer.errors import BackendError, BackendUnavailable
from consumer.ids import ObjectId
from consumer.log import Event
from consumer.metrics import Counts, Distribution
from consumer.offset_map import decode
from consumer.operations import Metadata, Position, StoredObject
from consumer.poison import PoisonPolicy
from consumer.retry import RetryPolicy
from consumer.storage.backend import Payload, Tombstone
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.tiered import TieredStorage
from consumer.suspects import NOBODY, OFFSET, TIMESTAMP, Note, Suspects
from gates import GatedStorage, settled
from lanes import TIMESTAMP_MS, Appended, CommandedLane, Fetched, Workplace, fetched, inserts, poison, until

MakeWorkplace = Callable[..., Workplace]


@pytest.fixture
async def make() -> AsyncIterator[MakeWorkplace]:
    """A maker of workplaces; after the test all assignments end, and nothing may be left charged or reserved."""
    places: list[Workplace] = []

    def make(storage: Any = None, **options: Any) -> Workplace:
        own = {name: options.pop(name) for name in ("limit", "budget_bytes", "retry") if name in options}
        place = Workplace(storage if storage is not None else GatedStorage(), changes=options, **own)
        places.append(place)
        return place

    yield make
    for place in places:
        storage = place.service._storage
        if isinstance(storage, GatedStorage):
            storage.let_all_go()
        await place.clear_up()
        place.dead_letters.acknowledge_always()
        place.responses.acknowledge_always()
        await settled()
        assert place.budget.used == 0, "bytes are charged and nobody holds them"
        assert place.limiter.in_use == 0, "permits are held and nobody uses them"
        assert not place.failures


def stored(size: int) -> StoredObject:
    """Make an object of so many bytes."""
    return StoredObject(Metadata(), b"x" * size)


def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have waits between attempts to get a window last no time."""
    monkeypatch.setattr(assignment_module, "RESERVE_BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(assignment_module, "RESERVE_BACKOFF_SECONDS_MAX", 0.0)


def codes(records: Iterable[Appended]) -> list[str | None]:
    """The failure codes of responses, None for each success."""
    return [record.code for record in records]


async def test_how_long_operations_and_requests_took_is_shown_with_the_record(make: MakeWorkplace) -> None:
    """Contract 9: exemplars. Records side by side, each request named after its own; clean-up is no record's."""
    tiers, slow = Counts(), 0.01
    high_volume, long_term = MemoryBackend(latency=slow), MemoryBackend(latency=slow)
    storage = TieredStorage(high_volume, long_term, MemoryChangeLog(), 4, observer=tiers)
    place = make(storage, retry=RetryPolicy())
    place.responses.acknowledge_always()
    assignment = place.assign(partition=3)

    async def run(*records: Fetched) -> None:
        assignment.receive(list(records))
        await until(lambda: assignment.watermark == records[-1].offset + 1)

    await run(fetched("insert", 0, "large", b"x" * 9), fetched("head", 1, "other"), fetched("insert", 2, "small", b"x"))
    await run(fetched("insert", 3, "large", b"y" * 9))
    await storage.join()

    def offsets(distribution: Distribution) -> set[str]:
        for one in distribution.exemplars.values():
            assert (one.labels["topic"], one.labels["partition"]) == ("operations", "3")
            assert one.value >= slow
        return {one.labels["offset"] for one in distribution.exemplars.values()}

    assert offsets(place.counts.operations["head"].success) == {"1"}
    assert offsets(place.counts.operations["insert"].success) <= {"0", "2", "3"}
    assert offsets(tiers.requests("high_volume", "put_non_tombstone").success) == {"2"}
    assert offsets(tiers.requests("long_term", "put").success) <= {"0", "3"}
    deletions = tiers.requests("long_term", "delete").success
    assert (deletions.count, offsets(deletions)) == (1, set())


class TestPositions:
    """Contract 5: writes say where they come from, so that storage can tell an older one."""

    class Listening(MemoryBackend):
        """Writes down the positions it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.positions: list[Position | None] = []

        async def put_non_tombstone(
            self, object_id: ObjectId, metadata: Metadata, payload: bytes, position: Position | None = None
        ) -> Tombstone | None:
            self.positions.append(position)
            return await super().put_non_tombstone(object_id, metadata, payload, position)

        async def delete_non_tombstone(
            self, object_id: ObjectId, position: Position | None = None
        ) -> Tombstone | None:
            self.positions.append(position)
            return await super().delete_non_tombstone(object_id, position)

    async def test_writes_say_which_offset_of_which_log_they_come_from(self, make: MakeWorkplace) -> None:
        """Inserts with and without key, and deletions; an older one that comes late is answered and not applied."""
        backend = self.Listening()
        place = make(TieredStorage(backend, MemoryBackend()), ordering="partition")
        place.responses.acknowledge_always()
        assignment = place.assign(begin=None)
        assignment.begin(5, source="topic-id/0")

        assignment.receive([fetched("insert", 5, None), fetched("delete", 6, "a"), fetched("insert", 7, "a")])
        await until(lambda: assignment.watermark == 8)
        late = place.assign(begin=None)
        late.begin(5, source="topic-id/0")
        late.receive([fetched("delete", 6, "a")])
        await until(lambda: late.watermark == 7)

        assert backend.positions == [Position("topic-id/0", offset) for offset in (5, 6, 7, 6)]
        assert [record.response["status"] for record in place.responses.appended] == [201, 204, 201, 204]
        assert len(backend._rows) == 2, "the late deletion was applied"

    async def test_where_the_log_has_no_identity_they_say_nothing(self, make: MakeWorkplace) -> None:
        """A topic made anew under the same name counts from 0: its offsets must not be compared with the old ones."""
        backend = self.Listening()
        place = make(TieredStorage(backend, MemoryBackend()), ordering="partition")
        place.responses.acknowledge_always()
        unnamed, replaced = place.assign(0), place.assign(1, begin=None)
        replaced.begin(100, source="topic-id/1")
        assert replaced.jump(0)

        unnamed.receive([fetched("insert", 0, "a"), fetched("delete", 1, "a")])
        replaced.receive([fetched("insert", 0, "b"), fetched("delete", 1, "b")])
        await until(lambda: unnamed.watermark == replaced.watermark == 2)

        assert backend.positions == [None] * 4


class TestRecords:
    """From `receive` to resolved."""

    async def test_each_record_is_answered_by_its_offset_and_finished_when_that_is_acknowledged(
        self, make: MakeWorkplace
    ) -> None:
        """I3, I4, contract 2.2, 3: index = offset; nothing is finished before its response is written."""
        place = make(TieredStorage(MemoryBackend(), MemoryBackend()))
        assignment = place.assign(begin=7)
        kinds = ["insert", "get", "head", "delete", "get"]
        assignment.receive([fetched(kind, 7 + at, "object", request_id=f"r{at}") for at, kind in enumerate(kinds)])

        await until(lambda: len(place.responses.appended) == 5)
        assert assignment.watermark == 7
        assert place.resolved == 0
        place.responses.acknowledge(2)
        assert (assignment.watermark, place.resolved) == (9, 2)
        place.responses.acknowledge()

        answers = [record.response for record in place.responses.appended]
        assert [(answer["index"], answer["status"]) for answer in answers] == [
            (7, 201),
            (8, 200),
            (9, 204),
            (10, 204),
            (11, 404),
        ]
        assert [answer["request_id"] for answer in answers] == ["r0", "r1", "r2", "r3", "r4"]
        assert place.responses.appended[0].header("tierstream-response-id") == b"operations/0/7"
        assert place.responses.appended[0].key == b"key"
        assert (assignment.watermark, place.resolved) == (12, 5)
        assert place.budget.used == 0
        assert place.dead_letters.appended == []
        assert place.counts.totals()["records"] == 5
        assert place.counts.totals()["responses"] == 5

    async def test_the_first_answer_of_a_batch_is_the_example_of_its_latency(self, make: MakeWorkplace) -> None:
        """Contract 9: an exemplar leads from a slow bucket to the record; records without a time are none."""
        place = make(TieredStorage(MemoryBackend(), MemoryBackend()))
        assignment = place.assign(begin=7)
        assignment.receive([fetched("get", 7 + at, "object") for at in range(4)])
        assignment.receive([replace(fetched("get", 11, "object"), timestamp=-1)])
        await until(lambda: len(place.responses.appended) == 5)

        place.responses.acknowledge(2)
        ((first, exemplar),) = place.counts.response_latency.exemplars.items()
        place.responses.acknowledge(2)
        ((_, newer),) = place.counts.response_latency.exemplars.items()
        place.responses.acknowledge()

        assert exemplar.labels == {"topic": "operations", "partition": "0", "offset": "7"}
        assert newer.labels["offset"] == "9"
        assert list(place.counts.response_latency.exemplars.values()) == [newer]
        assert place.counts.response_latency.buckets[first] == 4

    async def test_what_is_finished_above_a_running_operation_does_not_move_the_watermark(
        self, make: MakeWorkplace
    ) -> None:
        """I4: the watermark is the lowest unfinished offset, and the map speaks of what is finished above."""
        storage = GatedStorage("object-1")
        place = make(storage)
        assignment = place.assign()
        place.responses.acknowledge_always()

        assignment.receive(inserts(0, 5))
        await until(lambda: place.resolved == 4)

        assert assignment.watermark == 1
        assert decode(assignment.offset_map, committed_offset=1, cluster_id="cluster", end=None).finished == ((2, 4),)
        storage.let_go("object-1")
        await until(lambda: assignment.watermark == 5)
        assert assignment.offset_map == ""

    async def test_records_that_were_taken_before_are_ignored(self, make: MakeWorkplace) -> None:
        """H1: after a re-seek the client hands over again what has been taken; it runs once."""
        place = make()
        assignment = place.assign()
        place.responses.acknowledge_always()

        assignment.receive(inserts(0, 3))
        assignment.receive(inserts(0, 3))
        assignment.receive(inserts(1, 4))
        await until(lambda: assignment.watermark == 5)

        assert sorted(place.responses.tokens) == [0, 1, 2, 3, 4]
        assert assignment.cursor == 5

    async def test_records_before_the_gate_is_open_and_after_it_is_closed_are_ignored(
        self, make: MakeWorkplace
    ) -> None:
        """H13: the client delivers before an assignment is prepared; they are read again from the start offset."""
        place = make()
        assignment = place.assign(begin=None)

        assignment.receive(inserts(0, 3))
        assignment.begin(1)
        assert assignment.cursor == 1
        assignment.close_gate()
        assignment.receive(inserts(1, 3))
        await settled()

        assert place.responses.appended == []
        assert assignment.cursor == 1

    async def test_offsets_may_have_gaps_of_any_size(self, make: MakeWorkplace) -> None:
        """H9b: compaction and markers; a gap wider than the distance limit is crossed when nothing is unfinished."""
        place = make()
        assignment = place.assign()
        offsets = [3, 4, 1_000_000, 1_000_050, 10**15]

        assignment.receive([fetched("insert", offset, str(offset)) for offset in offsets])
        await until(lambda: len(place.responses.appended) == 2)
        assert assignment.paused_for() == ["offset_distance"]
        place.responses.acknowledge()
        await until(lambda: len(place.responses.appended) == 4)
        place.responses.acknowledge_always()
        await until(lambda: len(place.responses.appended) == 5)
        await settled()

        assert place.responses.tokens == offsets
        assert assignment.watermark == 10**15 + 1
        assert assignment.paused_for() == []

    async def test_reading_stops_at_a_distance_above_a_stuck_record(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """I10, I11, contract 3: finished work above a stuck record is bounded, and goes on when that is finished."""
        monkeypatch.setattr(assignment_module, "DISTANCE_MAX", 20)
        storage = GatedStorage("object-5")
        place = make(storage)
        assignment = place.assign()
        place.responses.acknowledge_always()

        assignment.receive(inserts(0, 60))
        await until(lambda: place.resolved == 24)
        await settled()

        assert (assignment.watermark, place.resolved) == (5, 24)
        assert max(place.responses.tokens) == 24
        assert assignment.paused_for() == ["offset_distance"]
        storage.let_go("object-5")
        await until(lambda: assignment.watermark == 60)
        assert assignment.paused_for() == []

    async def test_an_idle_partition_moves_over_offsets_that_hold_no_record(self, make: MakeWorkplace) -> None:
        """H9b: only where nothing is buffered or unfinished, or a record would be skipped."""
        place = make()
        assignment = place.assign()
        assignment.receive(inserts(0, 2))

        assignment.advance(9)
        assert assignment.cursor == 2
        await until(lambda: len(place.responses.appended) == 2)
        assignment.advance(9)
        assert assignment.watermark == 0
        place.responses.acknowledge()
        assignment.advance(9)
        assert (assignment.watermark, assignment.cursor) == (9, 9)
        assignment.advance(4)
        assert (assignment.watermark, assignment.cursor) == (9, 9)

    async def test_what_the_last_commits_map_says_is_finished_runs_no_more(self, make: MakeWorkplace) -> None:
        """Contract 3: mapped records are neither run nor answered, and their bytes come back."""
        storage = GatedStorage()
        place = make(storage)
        assignment = place.assign(begin=None)
        assignment.begin(10, ((11, 13), (15, 15)))
        place.responses.acknowledge_always()

        assignment.receive(inserts(10, 8))
        await until(lambda: assignment.watermark == 18)

        assert sorted(place.responses.tokens) == [10, 14, 16, 17]
        assert sorted(key for _, key in storage.calls) == ["object-10", "object-14", "object-16", "object-17"]
        assert place.resolved == 8

    async def test_fetching_stops_and_goes_on_with_room_between(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """H7, I11: a full buffer stops fetching; it is asked for again only when most of it is gone."""
        monkeypatch.setattr(assignment_module, "BUFFER_RECORDS_MAX", 8)
        monkeypatch.setattr(assignment_module, "BUFFER_RECORDS_RESUME", 2)
        monkeypatch.setattr(assignment_module, "CHUNK_RECORDS", 1)
        storage = GatedStorage(hold_all=True)
        place = make(storage)
        assignment = place.assign(window=1)
        place.responses.acknowledge_always()
        place.refills.clear()

        assignment.fetching = True
        assignment.receive(inserts(0, 9))
        await settled()
        assert (assignment.full, assignment.wants_records) == (True, False)
        assignment.fetching = False
        for offset in range(5):
            assert place.refills == []
            storage.let_go(f"object-{offset}")
            await until(lambda offset=offset: assignment.watermark == offset + 1)  # type: ignore[misc]  # bound now
            await settled()
        assert assignment.full is False
        storage.let_go("object-5")
        await until(lambda: assignment.watermark == 6)
        await settled()
        assert assignment.wants_records
        assert place.refills
        assert set(place.refills) == {assignment}


class TestOutcomes:
    """What is not an ordinary success."""

    @pytest.mark.parametrize("first", ["dead letter", "response"])
    async def test_poison_is_finished_when_response_and_dead_letter_are_both_written(
        self, make: MakeWorkplace, first: str
    ) -> None:
        """Contract 2.3: one response, one dead letter with the record as it was; whichever comes last finishes it."""
        place = make()
        assignment = place.assign(begin=4)
        headers = (("traceparent", b"00-1"), ("x", b"y"))
        assignment.receive([Fetched(4, b"\x02no operation", b"k", headers=headers)])
        await until(lambda: len(place.responses.appended) == 1)

        lanes = [place.dead_letters, place.responses]
        one, other = lanes if first == "dead letter" else reversed(lanes)
        one.acknowledge()
        assert (assignment.watermark, place.resolved) == (4, 0)
        assert place.budget.used > 0
        other.acknowledge()

        (response,), (letter,) = place.responses.appended, place.dead_letters.appended
        assert (assignment.watermark, place.resolved) == (5, 1)
        assert (response.code, response.response["status"], response.header("tierstream-kind")) == (
            "decode_error",
            400,
            b"unknown",
        )
        assert response.header("traceparent") == b"00-1"
        assert (letter.key, letter.value, letter.header("x")) == (b"k", b"\x02no operation", b"y")
        assert letter.header("tierstream-dlq-code") == b"decode_error"
        assert letter.header("tierstream-dlq-offset") == b"4"
        assert letter.header("tierstream-dlq-timestamp") == b"%d" % TIMESTAMP_MS
        assert place.counts.totals()["poison"] == place.counts.totals()["dead_letters"] == 1

    async def test_without_a_dead_letter_topic_the_response_alone_finishes_poison(self, make: MakeWorkplace) -> None:
        """Contract 6: `dead_letter.topic: null`."""
        place = make(dead_letter_lane=None)
        assignment = place.assign()
        assignment.receive([poison(0), Fetched(1, None)])
        await until(lambda: len(place.responses.appended) == 2)

        place.responses.acknowledge()

        assert codes(place.responses.appended) == ["decode_error", "null_value"]
        assert assignment.watermark == 2

    async def test_poison_between_operations_leaves_its_neighbours_alone(self, make: MakeWorkplace) -> None:
        """I1: errors take their place among the others."""
        place = make()
        assignment = place.assign()
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()

        assignment.receive([fetched("insert", 0, "a"), poison(1), fetched("insert", 2, "b"), Fetched(3, b"")])
        await until(lambda: assignment.watermark == 4)

        by_offset = {record.token: record.code for record in place.responses.appended}
        assert by_offset == {0: None, 1: "decode_error", 2: None, 3: "decode_error"}
        assert place.dead_letters.tokens == [1, 3]

    @pytest.mark.parametrize(
        ("error", "code", "lettered"),
        [
            (ZeroDivisionError("what"), "panic", True),
            (BackendError("permanent"), "backend_error", True),
            (BackendUnavailable("later"), "backend_unavailable", False),
            (asyncio.CancelledError(), "dropped", False),
        ],
    )
    async def test_panics_and_permanent_faults_are_dead_lettered_and_others_are_not(
        self, make: MakeWorkplace, error: BaseException, code: str, *, lettered: bool
    ) -> None:
        """Contract 2.2: dead-lettered are poison, `panic`, `backend_error`."""
        storage = GatedStorage()
        storage.failures["object-0"] = lambda: error
        place = make(storage)
        assignment = place.assign()
        assignment.receive([fetched("head", 0)])
        await until(lambda: len(place.responses.appended) == 1)

        place.responses.acknowledge()
        place.dead_letters.acknowledge()

        assert codes(place.responses.appended) == [code]
        assert bool(place.dead_letters.appended) is lettered
        assert assignment.watermark == 1

    async def test_what_is_said_of_a_record_says_which_one_it_is(
        self, make: MakeWorkplace, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Topic, partition, offset, epoch: also where it is said by code that knows nothing of partitions."""
        storage = GatedStorage()
        storage.failures["object-0"] = lambda: BackendUnavailable("later")
        place = make(storage, retry=RetryPolicy(attempts=1, initial_seconds=0.001, max_seconds=0.001))
        place.responses.acknowledge_always()
        assignment = place.assign(partition=3)
        with caplog.at_level(logging.WARNING, "consumer"):
            assignment.receive([fetched("head", 7, "object-0")])
            await until(lambda: "trying on" in caplog.text)
        del storage.failures["object-0"]
        await until(lambda: assignment.watermark == 8)

        said = [record.msg for record in caplog.records if isinstance(record.msg, Event)]
        (line,) = [event.fields for event in said if "trying on" in event.text]
        expected = {"topic": "operations", "partition": 3, "offset": 7, "epoch": assignment.epoch}
        assert {name: line.get(name) for name in expected} == expected

    async def test_a_response_that_does_not_fit_becomes_a_failure_that_says_so(self, make: MakeWorkplace) -> None:
        """Contract 2.2: `response_too_large`, 413; the object is there all the same."""
        place = make(response_bytes_max=400)
        assignment = place.assign()
        place.responses.acknowledge_always()

        insert = fetched("insert", 0, "big", b"x" * 1000)
        assignment.receive([insert, fetched("get", 1, "big"), fetched("head", 2, "big")])
        await until(lambda: assignment.watermark == 3)

        by_offset = {record.token: (record.code, record.response["status"]) for record in place.responses.appended}
        assert by_offset == {0: (None, 201), 1: ("response_too_large", 413), 2: (None, 204)}
        assert place.dead_letters.appended == []

    async def test_a_response_the_broker_refuses_is_replaced_in_its_place(self, make: MakeWorkplace) -> None:
        """H18d: refused for its size; what replaces it is small, and the record is finished once."""
        place = make()
        assignment = place.assign()
        assignment.receive([fetched("insert", 0, "a"), fetched("get", 1, "a"), fetched("head", 2, "a")])
        await until(lambda: len(place.responses.appended) == 3)

        place.responses.acknowledge(1)
        place.responses.refuse()
        assert place.responses.waiting[0].token == 1
        place.responses.acknowledge()

        assert [(record.token, record.code) for record in place.responses.appended] == [
            (0, None),
            (1, None),
            (2, None),
            (1, "response_too_large"),
        ]
        assert (assignment.watermark, place.resolved) == (3, 3)
        assert place.counts.responses["get", 413] == 1

    async def test_an_output_topic_that_refuses_the_small_failure_too_is_fatal(self, make: MakeWorkplace) -> None:
        """Nothing can be answered there: the lane hears it as an exception, which ends the process."""
        place = make()
        assignment = place.assign()
        assignment.receive([fetched("head", 0)])
        await until(lambda: len(place.responses.appended) == 1)

        place.responses.refuse()
        refused = place.responses.waiting[0]
        with pytest.raises(RuntimeError, match="refuses a failure response of operations/0"):
            refused.owner.refused(refused.token)

        assert assignment.watermark == 0

    async def test_a_dead_letter_that_is_refused_loses_its_value_and_then_what_is_not_ours(
        self, make: MakeWorkplace
    ) -> None:
        """Contract 2.3: `tierstream-dlq-truncated`; a record of headers alone must not end the process for ever."""
        place = make()
        assignment = place.assign()
        assignment.receive([Fetched(0, b"\x02no", b"key", headers=(("big", b"x" * 1000),))])
        await until(lambda: len(place.dead_letters.appended) == 1)
        place.responses.acknowledge()

        place.dead_letters.refuse()
        (second,) = place.dead_letters.waiting
        assert (second.key, second.value, second.header("big")) == (b"key", None, b"x" * 1000)
        assert second.header("tierstream-dlq-truncated") == b"true"
        place.dead_letters.refuse()
        (third,) = place.dead_letters.waiting
        assert (third.key, third.value, third.header("big")) == (None, None, None)
        assert [name for name, _ in third.headers].count("tierstream-dlq-truncated") == 1
        assert third.header("tierstream-dlq-offset") == b"0"
        with pytest.raises(RuntimeError, match="dead letter topic refuses"):
            third.owner.refused(third.token)

        assert assignment.watermark == 0
        place.dead_letters.acknowledge()
        assert assignment.watermark == 1
        assert place.counts.dead_letters == {"decode_error": 1}

    async def test_a_keyless_insert_gets_the_same_key_at_every_replay(self, make: MakeWorkplace) -> None:
        """Contract 5: a function of cluster, topic, partition, offset and timestamp."""
        storage = GatedStorage()
        place = make(storage)
        for _ in range(2):
            assignment = place.assign(begin=3, window=2)
            assignment.receive([fetched("insert", 3), fetched("insert", 4)])
            await until(lambda: len(place.responses.waiting) == 2)
            place.responses.acknowledge()
            assert await assignment.drain(1)

        first, second, *replayed = [record.response["key"] for record in place.responses.appended]
        assert first != second
        assert sorted(replayed) == sorted([first, second])
        assert len(storage.objects) == 2

    async def test_a_keyless_insert_gets_a_random_key_where_that_is_configured(self, make: MakeWorkplace) -> None:
        """Contract 5: `storage.key_generation: random`."""
        place = make(derive_keys=False)
        for _ in range(2):
            assignment = place.assign(begin=3, window=2)
            assignment.receive([fetched("insert", 3)])
            await until(lambda: len(place.responses.waiting) == 1)
            place.responses.acknowledge()
            assert await assignment.drain(1)

        first, second = [record.response["key"] for record in place.responses.appended]
        assert first != second

    async def test_a_null_key_becomes_the_response_id_in_a_compacted_topic(self, make: MakeWorkplace) -> None:
        """Contract 2.3."""
        place = make(compacted=True)
        assignment = place.assign()
        assignment.receive([Fetched(0, fetched("head", 0).value, None)])
        await until(lambda: len(place.responses.appended) == 1)

        assert place.responses.appended[0].key == b"operations/0/0"

    async def test_a_record_without_a_time_does_not_spoil_the_latencies(self, make: MakeWorkplace) -> None:
        """Records may have no timestamp (-1): their latency is unknown, not half a century."""
        place = make()
        assignment = place.assign()
        place.responses.acknowledge_always()

        assignment.receive([Fetched(0, fetched("head", 0).value, timestamp=-1)])
        await until(lambda: assignment.watermark == 1)
        assert place.counts.response_latency.count == 0
        assignment.receive([fetched("head", 1)])
        await until(lambda: assignment.watermark == 2)
        assert place.counts.response_latency.count == 1

    async def test_a_defect_is_told(self, make: MakeWorkplace) -> None:
        """An assignment that cannot go on ends the process instead of standing still."""
        place = make(response_lane=lambda _partition: _BrokenLane())
        assignment = place.assign()
        assignment.receive([fetched("head", 0)])

        await until(lambda: bool(place.failures))

        (error,) = place.failures
        assert isinstance(error, ArithmeticError)
        place.failures.clear()
        place.budget.release(place.budget.used)


class _BrokenLane(CommandedLane):
    def append(self, *_: Any) -> None:
        raise ArithmeticError("broken")


class TestSuspects:
    """Records that have ended a process while they were decoded."""

    async def test_a_condemned_record_is_poison_undecoded_and_its_neighbours_are_as_ever(
        self, make: MakeWorkplace, tmp_path: Path
    ) -> None:
        """Hostile input, the belt: answered and dead-lettered, also where it would decode, in its place."""
        suspects = Suspects(tmp_path / "notes", cluster_id="c", group_id="g")
        for _ in range(2):
            died = await asyncio.to_thread(suspects.open_notes, [("operations", 0)])
            died["operations", 0].slots[TIMESTAMP] = TIMESTAMP_MS
            died["operations", 0].slots[OFFSET] = 1
            died["operations", 0].close()
        note = (await asyncio.to_thread(suspects.open_notes, [("operations", 0)]))["operations", 0]
        decoder = WatchingDecoder(note)
        place = make(decoder=decoder)
        assignment = place.assign(note=note)
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()

        assignment.receive(inserts(0, 3))
        await until(lambda: assignment.watermark == 3)

        assert decoder.noted == [(0, TIMESTAMP_MS), (2, TIMESTAMP_MS)], "each while it was decoded, and no other"
        assert note.slots[OFFSET] == NOBODY
        found = {record.token: record.code for record in place.responses.appended}
        assert found == {0: None, 1: "decode_error", 2: None}
        (letter,) = place.dead_letters.appended
        assert (letter.token, letter.value) == (1, inserts(1, 1)[0].value)
        assert place.counts.poison == {"decode_error": 1}

        assert await assignment.drain(5)
        with pytest.raises(ValueError, match="released"):
            note.slots[OFFSET] = 1


class WatchingDecoder:
    """Looks at what is noted while a decoder decodes. None itself: the compiled one has no heirs."""

    def __init__(self, note: Note) -> None:
        self.noted: list[tuple[int, int]] = []
        self._note = note
        self._decoder = OperationDecoder()
        self.schema_id = self._decoder.schema_id

    def decode(self, value: bytes | None, headers: Any = (), position: Position | None = None) -> Decoded:
        self.noted.append((self._note.slots[OFFSET], self._note.slots[TIMESTAMP]))
        return self._decoder.decode(value, headers, position)


class TestFlood:
    """A partition of nothing but poison beside others."""

    @pytest.fixture(autouse=True)
    def no_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Operations are what is counted, however slow the machine."""
        monkeypatch.setattr(assignment_module, "POISON_WAIT_SECONDS_MAX", float("inf"))

    @pytest.mark.parametrize(
        ("turns", "bursts", "size"), [(1, False, 0), (10, False, 0), (1, True, 0), (1, False, 40_000)]
    )
    async def test_it_leaves_a_healthy_neighbour_twelve_operations_for_each_record_of_its_own(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch, turns: int, bursts: bool, size: int
    ) -> None:
        """Contract 6: counted in records, while both have as many as they can take; a fair half is too much here.

        Also where storage answers in groups, as durable writes do, or where there is a gap between two fetches: in
        either nothing begins for a while. A large record counts for more.
        """
        monkeypatch.setattr(assignment_module, "POISON_PAUSE_SECONDS", 0.0)
        place = make(StorageThatTakesTurns(turns), limit=100)
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()
        healthy, flooded = place.assign(0, 50), place.assign(1, 50)
        good, bad = fetched("head", 0).value, (poison(0).value or b"") + bytes(size)
        weight = 1 + (RECORD_OVERHEAD_BYTES + len(bad)) // POISON_BYTES

        while healthy.watermark < 10_000:
            for assignment, value in ((healthy, good), (flooded, bad)):
                if assignment is healthy and bursts:
                    wanted = assignment.watermark == assignment.cursor
                else:
                    wanted = assignment.snapshot(())["buffered"] < 500
                if wanted:
                    first = assignment.cursor
                    assignment.receive([Fetched(offset, value) for offset in range(first, first + 500)])
            await asyncio.sleep(0)

        turns_of_its_own = healthy.watermark / (POISON_STEP * OPERATIONS_PER_POISON)
        worked_off = flooded.watermark * weight
        assert worked_off >= POISON_STEP * turns_of_its_own / 2, "it goes on all the same"
        assert worked_off <= POISON_RUN + (POISON_STEP + weight) * (turns_of_its_own + 1)

    async def test_several_of_them_take_no_more_than_one(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 6: three floods wait three times as long, each."""
        monkeypatch.setattr(assignment_module, "POISON_PAUSE_SECONDS", 0.0)
        place = make(StorageThatTakesTurns(), limit=100)
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()
        healthy, *flooded = [place.assign(number, 20) for number in range(4)]
        good, bad = fetched("head", 0).value, poison(0).value

        while healthy.watermark < 10_000:
            for assignment in (healthy, *flooded):
                if assignment.snapshot(())["buffered"] < 500:
                    first = assignment.cursor
                    value = good if assignment is healthy else bad
                    assignment.receive([Fetched(offset, value) for offset in range(first, first + 500)])
            await asyncio.sleep(0)

        turns = healthy.watermark / (POISON_STEP * OPERATIONS_PER_POISON)
        worked_off = [one.watermark for one in flooded]
        assert sum(worked_off) <= len(flooded) * (POISON_RUN + POISON_STEP) + POISON_STEP * (turns + 1) * 1.1
        assert min(worked_off) >= POISON_RUN + POISON_STEP * turns / len(flooded) / 2, "none of them stands still"

    async def test_alone_it_waits_for_nobody(self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody else has anything to do."""
        monkeypatch.setattr(assignment_module, "POISON_PAUSE_SECONDS", 0.0)
        place = make()
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()
        assignment = place.assign()

        assignment.receive([poison(offset) for offset in range(2_000)])

        await until(lambda: assignment.watermark == 2_000)

    async def test_a_good_record_ends_it(self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch) -> None:
        """A producer with a fault now and then is no flood."""
        monkeypatch.setattr(assignment_module, "POISON_PAUSE_SECONDS", 3600.0)
        place = make()
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()
        assignment = place.assign()

        assignment.receive(
            [fetched("head", offset) if offset % 200 == 199 else poison(offset) for offset in range(2_000)]
        )

        await until(lambda: assignment.watermark == 2_000)

    async def test_it_drains_though_the_others_have_not_run_their_share(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 3: a drain does not wait for what it does not need."""
        monkeypatch.setattr(assignment_module, "OPERATIONS_PER_POISON", 1_000_000)
        place = make(StorageThatTakesTurns())
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()
        healthy, flooded = place.assign(0), place.assign(1)
        flooded.receive([poison(offset) for offset in range(2_000)])
        draining: asyncio.Task[bool] | None = None
        first = 0

        async with asyncio.timeout(30):
            while draining is None or not draining.done():
                if healthy.watermark == first:
                    healthy.receive(inserts(first, 50))
                    first += 50
                if draining is None and flooded.watermark >= assignment_module.POISON_RUN - 1:
                    draining = asyncio.create_task(flooded.drain(10))
                await asyncio.sleep(0)

        assert draining.result()
        assert flooded.watermark < 2_000
        assert place.pipeline.floods == set(), "nobody waits for it any more"

    async def test_others_that_are_never_idle_and_never_fast_do_not_stop_it(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They begin something in each pause, but would need an hour for their share, in which the CPU is free."""
        monkeypatch.setattr(assignment_module, "POISON_PAUSE_SECONDS", 0.0)
        monkeypatch.setattr(assignment_module, "POISON_WAIT_SECONDS_MAX", 0.0)
        monkeypatch.setattr(assignment_module, "OPERATIONS_PER_POISON", 1_000_000)
        place = make()
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()
        healthy, flooded = place.assign(0), place.assign(1)
        flooded.receive([poison(offset) for offset in range(2_000)])

        async with asyncio.timeout(30):
            while flooded.watermark < 2_000:
                if healthy.watermark == healthy.cursor:
                    healthy.receive(inserts(healthy.cursor, 50))
                await asyncio.sleep(0)

        assert place.pipeline.floods == set()

    async def test_storage_that_is_away_does_not_stop_it(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It needs none, and what is in flight there may be so for hours."""
        monkeypatch.setattr(assignment_module, "POISON_PAUSE_SECONDS", 0.0)
        storage = GatedStorage(hold_all=True)
        place = make(storage)
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()
        healthy, flooded = place.assign(0), place.assign(1)
        healthy.receive(inserts(0, 1))
        flooded.receive([poison(offset) for offset in range(2_000)])

        await until(lambda: flooded.watermark == 2_000)

        assert len(storage.running) == 1
        storage.let_all_go()

    async def test_nothing_waits_in_a_partition_that_is_given_up(self, make: MakeWorkplace) -> None:
        """What is dropped with it is charged to it no more: it would count as busy until the next rebalance."""
        place = make(poison=PoisonPolicy(max_consecutive=1))
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()
        assignment = place.assign()
        assignment.receive([poison(0), *inserts(1, 600)])

        await until(lambda: assignment.poison_limit is not None)

        assert assignment.buffered_bytes == 0


class StorageThatTakesTurns(GatedStorage):
    """Each call suspends for some turns of the event loop, as a call to any real storage does."""

    def __init__(self, turns: int = 1) -> None:
        super().__init__()
        self._turns = turns

    async def head(self, object_id: ObjectId) -> Metadata | None:
        for _ in range(self._turns):
            await asyncio.sleep(0)
        return None

    async def put(self, object_id: ObjectId, metadata: Metadata, payload: Payload) -> Metadata:
        await asyncio.sleep(0)
        return metadata


class TestOrdering:
    """What the three orderings mean for the responses of one partition."""

    async def test_by_key_one_object_goes_in_input_order(self, make: MakeWorkplace) -> None:
        """Contract 4: operations on one object run one after another and are answered in that order."""
        storage = GatedStorage("same")
        place = make(storage, ordering="key")
        assignment = place.assign()
        records = [fetched("insert", 0, "same"), fetched("head", 1, "same"), fetched("head", 2, "other")]
        assignment.receive([*records, fetched("delete", 3, "same")])
        await settled()

        assert storage.calls == [("put", "same"), ("head", "other")]
        assert place.responses.tokens == [2]
        storage.let_go("same")
        await until(lambda: len(place.responses.appended) == 4)

        assert place.responses.tokens == [2, 0, 1, 3]
        assert [call for call in storage.calls if call[1] == "same"] == [
            ("put", "same"),
            ("head", "same"),
            ("delete", "same"),
        ]

    async def test_unordered_all_run_at_once(self, make: MakeWorkplace) -> None:
        """Contract 4: the plain window."""
        storage = GatedStorage("same")
        place = make(storage, ordering="unordered")
        assignment = place.assign(window=2)
        assignment.receive([fetched("insert", 0, "same"), fetched("head", 1, "same"), fetched("head", 2, "other")])
        await settled()

        assert storage.calls == [("put", "same"), ("head", "same")]
        assert assignment.snapshot(())["in_flight"] == 2

    async def test_by_partition_one_at_a_time(self, make: MakeWorkplace) -> None:
        """Contract 4: a window of one."""
        storage = GatedStorage("object-1")
        place = make(storage, ordering="partition")
        assignment = place.assign(window=1)
        place.responses.acknowledge_always()
        assignment.receive(inserts(0, 4))
        await settled()

        assert storage.running_max == 1
        assert place.responses.tokens == [0]
        storage.let_go("object-1")
        await until(lambda: assignment.watermark == 4)
        assert place.responses.tokens == [0, 1, 2, 3]
        assert storage.running_max == 1

    async def test_the_map_leaves_out_what_may_be_overwritten_by_a_replay(self, make: MakeWorkplace) -> None:
        """Contract 3: by key an offset counts as finished only when every earlier operation on its object is.

        An operation that failed waits for its dead letter while later ones on its object are answered; were those in
        the map, a restart would run the failed one alone, over what they wrote.
        """
        storage = GatedStorage()
        storage.failures["same"] = lambda: BackendError("full")
        place = make(storage)
        assignment = place.assign()
        assignment.receive([fetched("insert", 0, "other"), fetched("insert", 1, "same")])
        await until(lambda: len(place.responses.appended) == 2)
        storage.failures.clear()
        later = [fetched("insert", 2, "same"), fetched("insert", 3, "third"), poison(4), fetched("head", 5)]
        assignment.receive(later)
        await until(lambda: len(place.responses.appended) == 6)

        place.responses.acknowledge()

        assert assignment.watermark == 1
        assert assignment.offset_map == ""
        place.dead_letters.acknowledge(1)
        assert assignment.watermark == 4
        assert decode(assignment.offset_map, committed_offset=4, cluster_id="cluster", end=None).finished == ((5, 5),)

    async def test_the_map_of_a_transaction_leaves_nothing_out(self, make: MakeWorkplace) -> None:
        """I2: what it carries is answered for good; whoever owns the partition next must not answer it again."""
        storage = GatedStorage("object-0")
        storage.failures["same"] = lambda: BackendError("full")
        place = make(storage)
        assignment = place.assign()
        assignment.receive([fetched("insert", 0, "object-0"), fetched("insert", 1, "same"), fetched("head", 2)])
        await until(lambda: len(place.responses.appended) == 2)

        offset, offset_map = assignment.settle([1, 1, 2])

        assert decode(offset_map, committed_offset=offset, cluster_id="cluster", end=None).finished == ((1, 2),)
        assert offset == 0
        storage.let_go("object-0")


class TestBytes:
    """The byte budget: charged once, given back once, whatever happens. The fixture checks that nothing is left."""

    async def test_a_record_is_charged_from_fetch_to_acknowledgement_and_a_payload_from_its_answer(
        self, make: MakeWorkplace
    ) -> None:
        """Contract 4."""
        storage = GatedStorage("object-0", "big")
        place = make(storage, read_bytes=5000)
        assignment = place.assign()
        records = [fetched("insert", 0, "object-0", b"x" * 1000), fetched("get", 1, "big")]

        assignment.receive(records)
        record_bytes = place.budget.used
        assert record_bytes > 1000
        await settled()
        assert place.budget.used == record_bytes + 5000
        storage.objects["e2e/org.1/objects/big"] = stored(3000)
        storage.let_go("big")
        await until(lambda: len(place.responses.appended) == 1)
        assert record_bytes + 3000 < place.budget.used < record_bytes + 3500
        place.responses.acknowledge()
        assert place.budget.used < record_bytes
        storage.let_go("object-0")
        await until(lambda: len(place.responses.appended) == 2)
        place.responses.acknowledge()
        assert place.budget.used == 0

    async def test_reads_wait_for_room_and_all_are_done(self, make: MakeWorkplace) -> None:
        """Contract 4, I10: reads that reserve more together than there is go one after another."""
        storage = GatedStorage(hold_all=True)
        place = make(storage, budget_bytes=10_000, read_bytes=4000)
        assignment = place.assign()
        place.responses.acknowledge_always()

        assignment.receive([fetched("get", offset) for offset in range(5)])
        await settled()
        assert len(storage.running) < 3
        storage.let_all_go()
        await until(lambda: assignment.watermark == 5)

    async def test_answers_that_are_not_acknowledged_keep_reads_from_beginning(self, make: MakeWorkplace) -> None:
        """I11: an output topic that is slow holds the input back, though no read is in flight any more."""
        storage = GatedStorage()
        storage.objects |= {f"e2e/org.1/objects/object-{offset}": stored(3000) for offset in range(8)}
        place = make(storage, budget_bytes=10_000, read_bytes=4000)
        place.assign().receive([fetched("get", offset) for offset in range(8)])
        await settled()
        begun = len(storage.calls)

        place.responses.acknowledge_always()
        await until(lambda: len(place.responses.appended) == 8)

        assert 1 <= begun <= 3

    async def test_a_read_larger_than_the_budget_runs_alone(self, make: MakeWorkplace) -> None:
        """Contract 4: one charge above the whole budget runs alone."""
        place = make(budget_bytes=1000, read_bytes=4000)
        assignment = place.assign()
        place.responses.acknowledge_always()

        assignment.receive([fetched("get", offset) for offset in range(3)])

        await until(lambda: assignment.watermark == 3)

    async def test_a_drain_gives_back_what_was_not_started(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """I11: the buffer, and the chunk that was taken from it and tracked."""
        monkeypatch.setattr(assignment_module, "CHUNK_RECORDS", 7)
        storage = GatedStorage(hold_all=True)
        place = make(storage)
        assignment = place.assign(window=2)
        assignment.receive(inserts(0, 30))
        await until(lambda: len(storage.running) == 2)

        draining = asyncio.create_task(assignment.drain(5))
        await settled()
        storage.let_all_go()
        await until(lambda: len(place.responses.appended) == 2)
        await settled()
        assert not draining.done()
        place.responses.acknowledge()

        assert await draining
        assert assignment.watermark == 2
        assert place.budget.used == 0
        assert place.limiter.in_use == 0

    async def test_an_abandoned_assignment_gives_back_everything_but_what_is_still_to_be_acknowledged(
        self, make: MakeWorkplace
    ) -> None:
        """I11: buffer, chunk, running operations, a read's reservation, a read that waits for its reservation."""
        storage = GatedStorage("object-1", "object-2")
        place = make(storage, budget_bytes=20_000, read_bytes=11_000)
        assignment = place.assign(window=4)
        records = [*inserts(0, 2), fetched("get", 2), fetched("get", 3), fetched("get", 4)]
        assignment.receive(records)
        await until(lambda: len(place.responses.appended) == 1)
        await settled()
        assert storage.running == [("put", "object-1"), ("get", "object-2")]

        assert not await assignment.drain(0)
        running = await assignment.abandon()

        assert running is not None
        assert 0 < place.budget.used < 1000, "the response that is on its way"
        place.responses.acknowledge()
        assert place.budget.used == 0
        assert place.resolved == 1

    async def test_answers_of_which_nothing_will_be_heard_give_their_bytes_back(self, make: MakeWorkplace) -> None:
        """Exactly-once: a partition's own writer ends with it, and what it has not committed is forgotten."""
        place = make()
        assignment = place.assign()
        assignment.receive([*inserts(0, 2), poison(2), fetched("get", 3)])
        await until(lambda: len(place.responses.appended) == 4)
        assert not await assignment.drain(0)
        assert await assignment.abandon() is None
        assert place.budget.used > 0

        place.responses.waiting.clear()
        place.dead_letters.waiting.clear()
        assignment.forget_answers()

        assert place.budget.used == 0

    async def test_buffered_bytes_are_those_not_yet_taken(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """I11: what a partition that stands still may hold of the bytes of all is bounded by it."""
        monkeypatch.setattr(assignment_module, "CHUNK_RECORDS", 2)
        storage = GatedStorage(hold_all=True)
        place = make(storage)
        assignment = place.assign(window=1)

        assignment.receive(inserts(0, 4))
        buffered = [assignment.buffered_bytes]
        await settled()
        buffered.append(assignment.buffered_bytes)
        place.responses.acknowledge_always()
        storage.let_all_go()
        await until(lambda: assignment.watermark == 4)
        buffered.append(assignment.buffered_bytes)

        assert buffered == [buffered[0], buffered[0] // 2, 0]
        assert buffered[0] > 1600


class TestEnd:
    """Drain and deadline."""

    async def test_a_drain_finishes_what_was_started_and_nothing_else(self, make: MakeWorkplace) -> None:
        """Contract 3: gate, in-flight work, acknowledgements; the rest is for whoever comes next."""
        storage = GatedStorage("object-0", "object-1")
        place = make(storage)
        assignment = place.assign(window=2)
        assignment.receive(inserts(0, 10))
        await settled()

        draining = asyncio.create_task(assignment.drain(5))
        await settled()
        assert not assignment.open
        storage.let_go("object-0", "object-1")
        await until(lambda: len(place.responses.appended) == 2)
        place.responses.acknowledge(1)
        await settled()
        assert not draining.done()
        place.responses.acknowledge()

        assert await draining
        assert storage.calls == [("put", "object-0"), ("put", "object-1")]
        assert (assignment.watermark, place.resolved) == (2, 2)
        assert await assignment.abandon() is None

    async def test_a_drain_waits_for_dead_letters_too(self, make: MakeWorkplace) -> None:
        """Contract 2.3: the dead letter is acknowledged before the offset is committed."""
        place = make()
        assignment = place.assign()
        place.responses.acknowledge_always()
        assignment.receive([poison(0)])
        await until(lambda: len(place.dead_letters.appended) == 1)

        draining = asyncio.create_task(assignment.drain(5))
        await settled()
        assert not draining.done()
        place.dead_letters.acknowledge()

        assert await draining
        assert assignment.watermark == 1

    @pytest.mark.parametrize("begin", [None, 0])
    @pytest.mark.parametrize("window", [None, 3])
    async def test_an_assignment_with_nothing_to_do_drains_at_once(
        self, make: MakeWorkplace, window: int | None, begin: int | None
    ) -> None:
        """I12: with or without window, opened or not; also before its task ran for the first time."""
        place = make()
        assignment = place.assign(window=window, begin=begin)
        assert await assignment.drain(5)
        assert place.limiter.in_use == 0

        later = place.assign(window=window, begin=begin)
        await settled()
        assert await later.drain(5)
        assert place.limiter.in_use == 0

    async def test_past_the_deadline_running_operations_keep_their_permits_and_their_outcome_goes_nowhere(
        self, make: MakeWorkplace
    ) -> None:
        """Contract 3: a reservation shrinks to its still-running operations; old work is not answered or resolved."""
        storage = GatedStorage("object-1", "object-3")
        place = make(storage)
        assignment = place.assign(window=5)
        place.responses.acknowledge_always()
        assignment.receive(inserts(0, 5))
        await until(lambda: place.resolved == 3)

        assert not await assignment.drain(0.01)
        running = await assignment.abandon()

        assert running is not None
        assert (running.in_flight, place.limiter.in_use) == (2, 2)
        assert assignment.watermark == 1
        answered = len(place.responses.appended)
        storage.let_go("object-3")
        await settled()
        assert place.limiter.in_use == 2, "they come back together"
        storage.let_go("object-1")
        await running.wait_finished()
        assert place.limiter.in_use == 0
        assert len(place.responses.appended) == answered
        assert assignment.watermark == 1
        assert storage.ended[-2:] == [("put", "object-3"), ("put", "object-1")]

    async def test_operations_about_to_start_count_as_running(self, make: MakeWorkplace) -> None:
        """H15: what was pulled and starts in the next turn of the loop must be waited for as well."""
        storage = GatedStorage(hold_all=True)
        place = make(storage)
        assignment = place.assign(window=3)
        assignment.receive(inserts(0, 3))
        await until(lambda: bool(assignment._entries))
        assert storage.calls == [], "void: it has started already"

        running = await assignment.abandon()
        await settled()

        assert storage.calls != []
        assert running is not None
        assert place.limiter.in_use == len(storage.calls)

    async def test_answers_on_their_way_when_an_assignment_is_abandoned_are_still_heard_of(
        self, make: MakeWorkplace
    ) -> None:
        """The lane acknowledges, or refuses, to an owner that is gone from everywhere else."""
        place = make()
        assignment = place.assign()
        assignment.receive([*inserts(0, 3), poison(3)])
        await until(lambda: len(place.responses.appended) == 4)
        assert not await assignment.drain(0)
        assert await assignment.abandon() is None

        place.responses.acknowledge(1)
        place.responses.refuse()
        place.responses.acknowledge()
        place.dead_letters.refuse()
        place.dead_letters.acknowledge()

        assert place.resolved == 4
        assert place.budget.used == 0


class TestWindow:
    """No permits, and windows that are passed on."""

    async def test_a_partition_without_permits_waits_and_gets_a_window_when_some_are_free(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 4: reason `at_capacity`, metric, another attempt, and then it reads."""
        no_wait(monkeypatch)
        place = make(limit=3)
        held = place.limiter.acquire_many_nowait(3)
        assignment = place.assign(window=None)
        assert place.refills == [assignment], "asked for, and refused, as it wants no records yet"
        assert assignment.paused_for() == ["at_capacity"]
        assert not assignment.wants_records
        state = assignment.snapshot(())
        assert (state["window"], state["in_flight"], state["paused_for"]) == (0, 0, ["at_capacity"])
        await until(lambda: len(place.wanted) > 2)
        refused = place.counts.reservations["at_capacity"]
        assert refused > 2
        assert place.counts.reservations["granted"] == 0

        held.release()
        await until(lambda: assignment.wants_records)

        assert place.refills == [assignment, assignment]
        assert assignment.paused_for() == []
        assert assignment.snapshot(())["window"] == 3
        assert place.counts.reservations["granted"] == place.counts.reservation_wait_seconds.count == 1
        place.responses.acknowledge_always()
        assignment.receive(inserts(0, 4))
        await until(lambda: assignment.watermark == 4)

    async def test_a_waiting_partition_that_is_drained_takes_no_permit(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """I9: permits that are free by then are for others."""
        monkeypatch.setattr(assignment_module, "RESERVE_BACKOFF_SECONDS", 1000.0)
        place = make(limit=3)
        held = place.limiter.acquire_many_nowait(3)
        assignment = place.assign(window=None)
        await settled()
        held.release()

        assert await assignment.drain(5)

        assert place.limiter.acquired_total == 3

    async def test_an_idle_window_goes_to_the_one_that_waits_and_not_back(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 4: passed on after it was idle; whoever had it waits like others, and comes back to its place."""
        monkeypatch.setattr(assignment_module, "IDLE_SECONDS", 0.0)
        place = make(limit=1)
        first = place.assign(0, window=1)
        place.responses.acknowledge_always()
        first.receive(inserts(0, 3))
        await until(lambda: first.watermark == 3)
        assert first.idle
        second = place.assign(1, window=None)
        assert place.wanted == [second]

        first.give_up_window()
        await until(lambda: place.freed == 1)
        second.try_now()
        await until(lambda: second.wants_records)
        await settled()

        assert not first.wants_records
        assert first.paused_for() == ["at_capacity"]
        second.receive(inserts(0, 2))
        await until(lambda: second.watermark == 2)
        second.give_up_window()
        await until(lambda: place.freed == 2)
        first.try_now()
        await until(lambda: first.wants_records)
        first.receive(inserts(3, 2))
        await until(lambda: first.watermark == 5)

    async def test_it_starves_from_when_it_has_something_to_read_and_no_window(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 8: whichever comes last begins the minute, and either ends it; an unknown end counts as more."""
        monkeypatch.setattr(assignment_module, "RESERVE_BACKOFF_SECONDS", 0.0)
        place = make(limit=3)
        held = place.limiter.acquire_many_nowait(3)
        assignment = place.assign(window=None, begin=None)
        since = [assignment.starving_since]
        assignment.begin(5)
        for end in (5, 6, 6, 5, 6, 7):
            assignment.log_ends_at(end)
            since.append(assignment.starving_since)
        assert [one is not None for one in since] == [True, False, True, True, False, True, True]
        assert since[2] == since[3]
        assert since[5] == since[6]
        assert assignment.jump(7)
        since = [assignment.starving_since]
        assignment.log_ends_at(8)
        since.append(assignment.starving_since)

        held.release()
        await until(lambda: assignment.wants_records)

        since.append(assignment.starving_since)
        assignment.log_ends_at(9)
        since.append(assignment.starving_since)
        assert [one is not None for one in since] == [False, True, False, False]

    async def test_the_last_answers_of_a_window_passed_on_end_starving(self, make: MakeWorkplace) -> None:
        """Contract 8: what is answered and not acknowledged yet is lag, and afterwards none."""
        place = make(limit=1)
        assignment = place.assign(window=1)
        assignment.receive(inserts(0, 3))
        assignment.log_ends_at(3)
        assignment.give_up_window()
        await until(lambda: place.freed == 1)
        before = assignment.starving_since

        place.responses.acknowledge()
        await until(lambda: assignment.watermark == 3)

        assert before is not None
        assert assignment.starving_since is None

    async def test_who_gave_its_window_up_waits_longer_than_one_turn_for_another(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 4: or it would take its own window back before the one that waits looks again."""
        waits: list[float] = []

        def longest(_low: float, high: float) -> float:
            waits.append(high)
            return 1000.0

        monkeypatch.setattr(random, "uniform", longest)
        place = make(limit=1)
        assignment = place.assign(window=1)
        await settled()

        assignment.give_up_window()
        await until(lambda: len(waits) == 1)

        assert waits == [assignment_module.RESERVE_BACKOFF_SECONDS_MAX]
        assert place.limiter.in_use == 0

    async def test_it_is_not_idle_while_a_response_is_to_be_acknowledged(
        self, make: MakeWorkplace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 4: idle is nothing in flight or buffered for 5 s."""
        place = make()
        assignment = place.assign()
        seen = [assignment.idle]
        monkeypatch.setattr(assignment_module, "IDLE_SECONDS", 0.0)
        seen.append(assignment.idle)
        assignment.receive(inserts(0, 1))
        seen.append(assignment.idle)
        await until(lambda: len(place.responses.appended) == 1)
        seen.append(assignment.idle)
        place.responses.acknowledge()
        seen.append(assignment.idle)

        assert seen == [False, True, False, False, True]


class TestState:
    """What can be seen."""

    async def test_the_snapshot_tells_what_is_known(self, make: MakeWorkplace) -> None:
        """Contract 8: every field; the key as a digest; unknown numbers are None."""
        storage = GatedStorage("object-12")
        place = make(storage)
        assignment = place.assign(3, begin=None, window=4)
        unknown = assignment.snapshot(["recovering"])
        assert (unknown["position"], unknown["committed"], unknown["lowest_unfinished"]) == (None, None, None)
        assert (unknown["finished_above_gap"], unknown["lag"]) == (None, None)
        assert (unknown["window"], unknown["paused_for"], unknown["oldest"]) == (4, ["recovering"], None)

        assignment.begin(10)
        assignment.log_ends_at(20)
        place.responses.acknowledge_always()
        assignment.receive(inserts(10, 5))
        await until(lambda: place.resolved == 4)
        state = assignment.snapshot(())

        assert {name: state[name] for name in ("topic", "partition", "epoch", "window", "in_flight", "buffered")} == {
            "topic": "operations",
            "partition": 3,
            "epoch": 1,
            "window": 4,
            "in_flight": 1,
            "buffered": 0,
        }
        assert (state["position"], state["lowest_unfinished"], state["finished_above_gap"]) == (15, 12, 2)
        assert (state["high_watermark"], state["lag"]) == (20, 8)
        oldest = state["oldest"]
        assert oldest is not None
        assert (oldest["offset"], oldest["kind"], oldest["attempts"], oldest["last_error"]) == (12, "insert", 1, None)
        assert oldest["key_digest"] not in {None, "object-12"}
        assert oldest["age_seconds"] >= 0

    async def test_keys_are_shown_where_that_is_configured(self, make: MakeWorkplace) -> None:
        """Contract 6: `admin.show_keys`."""
        place = make(GatedStorage("object-0"), show_keys=True)
        assignment = place.assign()
        assignment.receive(inserts(0, 1))
        await settled()

        oldest = assignment.snapshot(())["oldest"]

        assert oldest is not None
        assert oldest["key_digest"] == "object-0"


class TestJump:
    """Start offsets that are gone (`input.out_of_range`)."""

    async def test_forwards_with_work_below(self, make: MakeWorkplace) -> None:
        """Unfinished work below the new position is finished as usual; the watermark does not pass it."""
        storage = GatedStorage("object-1")
        place = make(storage)
        assignment = place.assign(window=2)
        place.responses.acknowledge_always()
        assignment.receive(inserts(0, 6))
        await settled()

        assert assignment.jump(100)
        assert assignment.cursor == 100
        assert assignment.watermark == 1
        assignment.receive(inserts(100, 2))
        storage.let_go("object-1")
        await until(lambda: assignment.watermark == 102)

        assert sorted(place.responses.tokens) == [0, 1, 2, 3, 4, 5, 100, 101]

    async def test_forwards_with_records_taken_and_not_yet_tracked(self, make: MakeWorkplace) -> None:
        """The records in the buffer lie below the new position and are answered before those above."""
        place = make()
        assignment = place.assign()
        place.responses.acknowledge_always()
        assignment.receive(inserts(0, 3))

        assert assignment.jump(100)
        assignment.receive(inserts(100, 1))
        await until(lambda: assignment.watermark == 101)

        assert place.responses.tokens == [0, 1, 2, 100]

    async def test_nothing_there(self, make: MakeWorkplace) -> None:
        """An idle partition goes where it is told, forwards and back."""
        place = make()
        assignment = place.assign(begin=50)

        assert assignment.jump(100)
        assert (assignment.cursor, assignment.watermark) == (100, 100)
        assert assignment.jump(20)
        assert (assignment.cursor, assignment.watermark) == (20, 20)

    async def test_backwards_waits_for_what_is_unfinished(self, make: MakeWorkplace) -> None:
        """A log that was cut or made anew: offsets mean other records now, so the old ones have to be over first."""
        storage = GatedStorage("object-51")
        place = make(storage)
        assignment = place.assign(begin=50)
        assignment.receive(inserts(50, 2))
        assert not assignment.jump(10)
        await until(lambda: len(place.responses.appended) == 1)
        assert not assignment.jump(10)
        storage.let_go("object-51")
        await until(lambda: len(place.responses.appended) == 2)
        assert not assignment.jump(10)
        assert assignment.cursor == 52
        place.responses.acknowledge_always()

        assert assignment.jump(10)
        assignment.receive(inserts(10, 2))
        await until(lambda: assignment.watermark == 12)

        assert place.responses.tokens == [50, 51, 10, 11]
