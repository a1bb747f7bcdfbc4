"""One partition's transactions: what goes into one, and what becomes of it when a step is refused, lost or fenced.

The producer is a double of the client's: a transaction's records count once it is committed, and a step fails as told.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Self

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    OffsetMetadataTooLargeError,
    ProducerFenced,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
)
from aiokafka.producer.transaction_manager import TransactionManager
from aiokafka.structs import OffsetAndMetadata

from consumer.assignment import Owner
from consumer.kafka import transactions as transactions_module
from consumer.kafka.topics import LATEST, ClusterUnavailable
from consumer.kafka.transaction_states import TransactionState
from consumer.kafka.transactions import CommitForgotten, TransactionWriter
from consumer.offset_map import SizeLimit
from gates import settled
from lanes import until

INPUT = TopicPartition("operations", 3)
OUTPUT = TopicPartition("responses", 1)
DEAD = TopicPartition("dead", 1)

BATCH_RECORDS = 4
"""Records that fit a batch of the double."""


def ended(error: Exception) -> KafkaError:
    """What the client raises for a refusal that it does not expect."""
    failure = KafkaError("Unexpected error during batch delivery")
    failure.__cause__ = error
    return failure


class Log:
    """What the broker has: committed records and offsets, and the steps that fail next."""

    def __init__(self) -> None:
        self.records: list[tuple[TopicPartition, bytes | None]] = []
        self.transactions: list[int] = []
        """Records of each committed transaction."""
        self.committed: tuple[int, str] | None = None
        self.failures: dict[str, deque[Exception | Callable[[], object]]] = {}
        """By step: what the next ones raise, or call, which raises."""
        self.commit_answers_lost = 0
        """So many commits take effect, and fail."""
        self.forgets: deque[set[str]] = deque()
        """Where the next commits that are decided take no effect, `output` or `offsets`; `slow`: nor at once."""
        self.ends: Counter[TopicPartition] = Counter()
        """Where the next record will be."""
        self.open: dict[TopicPartition, int] = {}
        """Where what is open begins."""
        self.places_told = True
        """Whether an answer says where records are."""
        self.markers: deque[set[TopicPartition | str]] = deque()
        """All that the next transactions hold that are not ended as they ought to be."""
        self.hidden = 0
        """So many questions for that find an older transaction of somebody else."""
        self.forgotten: list[tuple[TopicPartition, bytes | None]] = []
        """Records of theirs."""
        self.forgotten_offsets: tuple[int, str] | None = None
        """And their offsets."""
        self.state: str | None = "Empty"
        """Of the last transaction, as its coordinator knows it; None where brokers do not tell."""
        self.markers_under_way = 0
        """So many questions find the markers not yet written."""
        self.leaders: dict[TopicPartition, tuple[int, int]] = {OUTPUT: (1, 0), DEAD: (1, 0)}
        """Of partitions that there are."""
        self.elections = 0
        """So many sweeps meet partitions that change hands."""
        self.denied: set[TopicPartition] = set()
        """What may not be written to."""
        self.coordinator_answers = True
        self.now = 0.0
        """Seconds on the writer's clock."""
        self.metadata_max = 4096
        self.value_max = 1000
        self.member = True
        self.memberships: deque[bool] = deque()
        """What the next questions for it are answered; after them `member` counts."""
        self.producers: list[ProducerDouble] = []

    def fail(self, step: str, *errors: Exception | Callable[[], object]) -> None:
        """Have a step fail: connect, start, begin, sweep, swept, send, offsets, commit, question."""
        self.failures.setdefault(step, deque()).extend(errors)

    def step(self, name: str) -> None:
        """Come to a step."""
        failures = self.failures.get(name)
        if failures:
            failure = failures.popleft()
            if isinstance(failure, Exception):
                raise failure
            failure()

    def make(self) -> ProducerDouble:
        """Make a producer; it fences the one before."""
        self.producers.append(ProducerDouble(self))
        return self.producers[-1]

    def monotonic(self) -> float:
        """The writer's clock, which goes by itself only where it is looked at."""
        self.now += 0.01
        return self.now

    def time_ns(self) -> int:
        """The time of records."""
        return 0

    async def is_member(self) -> bool:
        self.step("question")
        return self.memberships.popleft() if self.memberships else self.member

    async def committed_now(self) -> tuple[int, str] | None:
        self.step("question")
        return self.committed

    def ask_cluster(self) -> ClusterDouble:
        return ClusterDouble(self)

    def end(self, *, commit: bool) -> None:
        """Write the markers of a transaction: they end what has been forgotten too."""
        reached = self.markers.popleft() if self.markers else {OUTPUT, DEAD, "offsets"}
        if commit:
            self.records.extend(record for record in self.forgotten if record[0] in reached)
        self.forgotten = [record for record in self.forgotten if record[0] not in reached]
        if "offsets" in reached:
            self.committed = (commit and self.forgotten_offsets) or self.committed
            self.forgotten_offsets = None
        self.open = {target: at for target, at in self.open.items() if target not in reached}
        self.state = self.state and ("CompleteCommit" if commit else "CompleteAbort")

    def time_out(self) -> None:
        """End what is open, as a coordinator does by itself after the transaction time-out."""
        self.end(commit=False)
        raise RequestTimedOutError

    def begun(self) -> None:
        """A transaction has come to its coordinator."""
        self.state = self.state and "Ongoing"


class ClusterDouble:
    """The client for questions."""

    def __init__(self, log: Log) -> None:
        self.log = log

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing is open."""

    async def transaction(self, transactional_id: str) -> TransactionState | None:
        assert transactional_id == "group/operations/3"
        self.log.step("question")
        if self.log.state is None:
            return None
        if self.log.markers_under_way:
            self.log.markers_under_way -= 1
            return TransactionState(self.log.state.replace("Complete", "Prepare"))
        return TransactionState(self.log.state)

    async def marker_leaders(
        self, transactional_id: str, group: str, partitions: Sequence[TopicPartition]
    ) -> dict[TopicPartition, tuple[int, int]] | None:
        assert (transactional_id, group) == ("group/operations/3", "group")
        self.log.step("leaders")
        if self.log.state is None:
            return None
        return {one: self.log.leaders[one] for one in partitions if one in self.log.leaders}

    async def offsets(
        self, partitions: Sequence[TopicPartition], at: int, *, committed_only: bool
    ) -> dict[TopicPartition, int]:
        assert (at, committed_only) == (LATEST, True)
        self.log.step("open")
        if away := set(partitions) - self.log.leaders.keys():
            raise ClusterUnavailable(f"not led by any broker: {away}")
        if self.log.hidden:
            self.log.hidden -= 1
            return dict.fromkeys(partitions, -1)
        return {one: self.log.open.get(one, self.log.ends[one]) for one in partitions}


class Batch:
    """A batch that is full at so many records."""

    def __init__(self) -> None:
        self.values: list[bytes | None] = []

    def append(self, *, value: bytes | None, **_: object) -> object | None:
        if len(self.values) == BATCH_RECORDS:
            return None
        self.values.append(value)
        return object()

    def close(self) -> None:
        """Nothing more comes."""


class ProducerDouble:
    """A transactional producer."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.open: list[tuple[TopicPartition, bytes | None]] = []
        self.offsets: OffsetAndMetadata | None = None
        self.stopped = False
        self.swept: set[TopicPartition | str] = set()
        """Where the transaction under way will have its marker."""
        self._sender = SimpleNamespace(sender_task=None, _do_add_offsets_to_txn=self._add_offsets)
        self._txn_manager = SimpleNamespace(
            _pid_waiter=None,
            _transaction_waiter=None,
            _pending_txn_offsets=(),
            maybe_add_partition_to_txn=self._add_partition,
            wait_for_transaction_end=lambda: self.failed,
        )
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._message_accumulator = SimpleNamespace(_pending_batches=set(), _batches={})
        self.client = SimpleNamespace(close=self._closed)

    async def start(self) -> None:
        self.log.step("connect")
        if self.log.state == "Ongoing":
            self.log.end(commit=False)
        self.log.step("start")
        self.log.state = self.log.state and "Empty"

    async def stop(self) -> None:
        self.stopped = True

    async def _closed(self) -> None:
        """Nothing is open."""

    async def begin_transaction(self) -> None:
        assert not self.stopped
        self.log.step("begin")
        self.open.clear()

    def _add_partition(self, target: TopicPartition) -> None:
        self.swept.add(target)
        if target in self.log.denied:
            self.failed.set_exception(TopicAuthorizationFailedError({target.topic}))

    async def _add_offsets(self, group: str) -> bool:
        """The client's own: False where it is to be asked again."""
        self.log.step("sweep")
        self.log.coordinator_answers = not self.log.coordinator_answers
        if self.log.coordinator_answers:
            self.swept.add(group)
            self.log.begun()
        return self.log.coordinator_answers

    async def abort_transaction(self) -> None:
        self._end_sweep(commit=False)

    def _end_sweep(self, *, commit: bool) -> None:
        self.log.step("swept")
        assert self.swept == {*self.log.leaders, "group"} - self.log.denied
        self.swept.clear()
        if self.log.elections:
            self.log.elections -= 1
            self.log.leaders = {one: (leader, epoch + 2) for one, (leader, epoch) in self.log.leaders.items()}
            self.log.state = "CompleteCommit" if commit else "CompleteAbort"
            return
        self.log.end(commit=commit)

    def create_batch(self) -> Batch:
        return Batch()

    async def send_batch(self, batch: Batch, topic: str, *, partition: int) -> asyncio.Future[SimpleNamespace]:
        self.log.begun()
        self.log.step("send")
        sent: asyncio.Future[SimpleNamespace] = asyncio.get_running_loop().create_future()
        target = TopicPartition(topic, partition)
        if any(len(value or b"") > self.log.value_max for value in batch.values):
            sent.set_exception(MessageSizeTooLargeError())
        else:
            self.open.extend((target, value) for value in batch.values)
            self.log.open.setdefault(target, self.log.ends[target])
            sent.set_result(SimpleNamespace(offset=self.log.ends[target] if self.log.places_told else -1))
            self.log.ends[target] += len(batch.values)
        return sent

    async def send_offsets_to_transaction(self, offsets: dict[TopicPartition, OffsetAndMetadata], group: str) -> None:
        assert group == "group"
        self.log.begun()
        self.log.step("offsets")
        ((partition, point),) = offsets.items()
        assert partition == INPUT
        if len(point.metadata) > self.log.metadata_max:
            raise ended(OffsetMetadataTooLargeError())
        self.offsets = point

    async def commit_transaction(self) -> None:
        if self.swept:
            self._end_sweep(commit=True)
            return
        self.log.step("commit")
        assert self.offsets is not None
        log, offsets = self.log, (self.offsets.offset, self.offsets.metadata)
        log.transactions.append(len(self.open))
        forgets = log.forgets.popleft() if log.forgets else set()
        log.forgotten.extend(self.open)
        log.forgotten_offsets = offsets
        log.state = log.state and "CompleteCommit"
        if "output" not in forgets:
            written = {target for target, _ in self.open}
            log.records.extend(record for record in log.forgotten if record[0] in written)
            log.forgotten = [record for record in log.forgotten if record[0] not in written]
            log.open = {target: at for target, at in log.open.items() if target not in written}
        if "offsets" not in forgets:
            log.committed, log.forgotten_offsets = offsets, None
        if "slow" in forgets:
            log.now += 60
        if log.commit_answers_lost:
            log.commit_answers_lost -= 1
            raise RequestTimedOutError


class Assigned:
    """The assignment behind the writer, and the owner of what is appended."""

    def __init__(self) -> None:
        self.finished: set[int] = set()
        self.acknowledged_tokens: list[int] = []
        self.refused_tokens: list[int] = []
        self.committed: int | None = None
        self.committed_map = ""
        self.maps_left_out = 0
        self.stuck: int | None = None
        """The offset of a record that does not end."""
        self.offset_map = ""
        self.lost = False
        self.instead: Callable[[int], None] = lambda _: None
        """What the owner appends for a refused record."""

    def settle(self, offsets: Sequence[int]) -> tuple[int, str]:
        self.finished.update(offsets)
        return max(self.finished, default=-1) + 1 if self.stuck is None else self.stuck, self.offset_map

    def transaction_committed(self, offset: int, metadata: str, *, map_left_out: bool) -> None:
        self.committed, self.committed_map = offset, metadata
        self.maps_left_out += map_left_out

    def lose(self) -> None:
        self.lost = True

    def acknowledged(self, tokens: Sequence[int]) -> None:
        self.acknowledged_tokens.extend(tokens)

    def refused(self, token: int) -> None:
        self.refused_tokens.append(token)
        self.instead(token)


class Rig:
    """A writer on the doubles."""

    def __init__(self) -> None:
        self.log = Log()
        self.assigned = Assigned()
        self.failures: list[BaseException] = []
        self.limit = SizeLimit()
        self.writer = TransactionWriter(
            INPUT,
            output=OUTPUT,
            dead_letters=DEAD,
            group_id="group",
            transactional_id="group/operations/3",
            ask_cluster=self.log.ask_cluster,  # type: ignore[arg-type]  # a double
            make_producer=self.log.make,  # type: ignore[arg-type]  # a double
            interval_seconds=0.0,
            is_member=self.log.is_member,
            committed=self.log.committed_now,
            map_size=self.limit,
            failed=self.failures.append,
        )

    def append(self, token: int, value: bytes, target: TopicPartition = OUTPUT) -> None:
        """Hand one record in."""
        owner: Owner = self.assigned
        self.writer.lane(target).append(b"key", value, [], owner, token)

    async def begun(self) -> None:
        """Start the producer and begin to write."""
        await self.writer.start()
        self.writer.begin(self.assigned)

    async def acknowledged(self, *tokens: int) -> None:
        """Wait until exactly these are acknowledged, in this order."""
        await until(lambda: len(self.assigned.acknowledged_tokens) >= len(tokens))
        assert self.assigned.acknowledged_tokens == list(tokens)

    def values(self, target: TopicPartition = OUTPUT) -> list[bytes | None]:
        """What is committed in a partition."""
        return [value for partition, value in self.log.records if partition == target]


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """A writer that has not started; it is stopped at the end, and has not failed by itself."""
    monkeypatch.setattr(transactions_module, "BACKOFF_SECONDS", (0.0,))
    rig = Rig()
    monkeypatch.setattr(transactions_module, "time", rig.log)
    yield rig
    await rig.writer.stop()
    assert rig.failures == []


async def test_what_gathers_is_one_transaction_with_its_offset(rig: Rig) -> None:
    """Contract 3: responses, dead letters and offset together; several batches in their order."""
    for token in range(10):
        rig.append(token, b"%d" % token)
    rig.append(10, b"letter", DEAD)
    rig.append(10, b"answer")
    rig.assigned.offset_map = "map"
    await rig.begun()

    await rig.acknowledged(*range(11), 10)
    assert rig.log.transactions == [12]
    assert rig.values() == [*(b"%d" % token for token in range(10)), b"answer"]
    assert rig.values(DEAD) == [b"letter"]
    assert rig.log.committed == (rig.assigned.committed, rig.assigned.committed_map) == (11, "map")
    assert rig.assigned.maps_left_out == 0


async def test_an_offset_alone_is_committed_where_it_is_wanted(rig: Rig) -> None:
    """H9b: it has moved over offsets without records, to which there is no response."""
    await rig.begun()
    rig.assigned.finished.add(6)

    rig.writer.commit_offset()

    await until(lambda: rig.log.committed == (7, ""))
    assert rig.log.transactions == [0]


async def test_a_transaction_is_bounded_by_bytes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is too large for a slow network would be sent again as it is, for ever."""
    monkeypatch.setattr(transactions_module, "TRANSACTION_BYTES_MAX", 1000)
    for token in range(5):
        rig.append(token, b"x" * 400)
    rig.log.value_max = 10_000
    rig.append(5, b"y" * 5000)
    rig.append(6, b"z")
    await rig.begun()

    await rig.acknowledged(*range(7))
    assert rig.log.transactions == [2, 2, 1, 1, 1]


async def test_what_is_less_than_a_transaction_gathers_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transactions of one record each would cost a round of commits each."""
    monkeypatch.setattr(transactions_module, "TRANSACTION_BYTES_MAX", 1000)
    monkeypatch.setattr(rig.writer, "_interval", 3600.0)
    for token in range(3):
        rig.append(token, b"x" * 400)
    await rig.begun()

    await rig.acknowledged(0, 1)
    await settled()
    assert rig.log.transactions == [2]


async def test_a_transaction_is_bounded_by_records_and_parts_no_record_from_its_dead_letter(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract 3: else one of the two could be committed without the other."""
    monkeypatch.setattr(transactions_module, "TRANSACTION_RECORDS_MAX", 2)
    monkeypatch.setattr(transactions_module, "TRANSACTION_BYTES_MAX", 10)
    rig.append(0, b"0")
    rig.append(1, b"letter", DEAD)
    rig.append(1, b"answer")
    rig.append(2, b"2")
    await rig.begun()

    await rig.acknowledged(0, 1, 1, 2)
    assert rig.log.transactions == [1, 2, 1]


@pytest.mark.parametrize("step", ["send", "offsets", "commit"])
@pytest.mark.parametrize("error", [ProducerFenced(), OSError("reset"), TimeoutError()], ids=repr)
async def test_a_failed_step_aborts_all_and_a_new_producer_writes_it_once(
    rig: Rig, step: str, error: Exception
) -> None:
    """H20: the client would commit the rest of it; H18: its producer is good for nothing more."""
    rig.log.fail(step, error)
    for token in range(6):
        rig.append(token, b"%d" % token)
    await rig.begun()

    await rig.acknowledged(*range(6))
    assert rig.values() == [b"%d" % token for token in range(6)]
    assert len(rig.log.producers) == 2
    assert rig.log.producers[0].stopped
    assert not rig.writer.stuck


async def test_a_commit_whose_answer_is_lost_is_not_written_again(rig: Rig) -> None:
    """H23: the group's own offset tells that it took effect."""
    rig.log.commit_answers_lost = 1
    rig.append(0, b"0")
    await rig.begun()

    await rig.acknowledged(0)
    assert rig.values() == [b"0"]
    assert len(rig.log.producers) == 2


async def test_whether_a_commit_took_effect_is_asked_until_there_is_an_answer(rig: Rig) -> None:
    """H23: not knowing is no reason to write again."""
    rig.log.commit_answers_lost = 1
    rig.log.fail("question", ClusterUnavailable("away"), ClusterUnavailable("away"))
    rig.append(0, b"0")
    await rig.begun()

    await rig.acknowledged(0)
    assert rig.values() == [b"0"]
    assert not rig.log.failures["question"]


@pytest.mark.parametrize("state", ["Empty", "Ongoing", "PrepareAbort", "CompleteAbort", "PrepareEpochFence", None])
async def test_what_was_not_committed_is_aborted_before_anything_else(rig: Rig, state: str | None) -> None:
    """I2: else it would become visible with the first thing that is committed."""
    rig.log.forgotten, rig.log.forgotten_offsets = [(OUTPUT, b"forgotten")], (7, "")
    rig.log.state = state
    await rig.writer.start()

    assert (rig.log.forgotten, rig.log.records, rig.log.committed) == ([], [], None)


@pytest.mark.parametrize("state", ["PrepareCommit", "CompleteCommit"])
async def test_what_was_committed_is_completed_before_anything_else(rig: Rig, state: str) -> None:
    """I1: whoever reads the offsets next takes it for answered, or answers it again."""
    rig.log.forgotten, rig.log.forgotten_offsets = [(OUTPUT, b"forgotten")], (7, "")
    rig.log.state = state
    await rig.writer.start()

    assert (rig.values(), rig.log.committed) == ([b"forgotten"], (7, ""))


async def test_a_decision_stands_for_all_attempts_to_start(rig: Rig) -> None:
    """I1: the first of them makes the coordinator forget it."""
    rig.log.forgotten = [(OUTPUT, b"forgotten")]
    rig.log.state = "CompleteCommit"
    rig.log.fail("begin", OSError("reset"))
    await rig.writer.start()

    assert rig.values() == [b"forgotten"]
    assert len(rig.log.producers) == 2


async def test_how_it_was_decided_is_asked_until_there_is_an_answer(rig: Rig) -> None:
    """I1: no producer is started before, which would make the coordinator forget it."""
    rig.log.forgotten = [(OUTPUT, b"forgotten")]
    rig.log.state = "CompleteCommit"
    rig.log.fail("question", ClusterUnavailable("away"), ClusterUnavailable("away"))
    await rig.writer.start()

    assert rig.values() == [b"forgotten"]


async def test_a_sweep_waits_until_all_is_led(rig: Rig) -> None:
    """I2: it would be forgotten itself."""
    rig.log.forgotten = [(OUTPUT, b"forgotten")]
    rig.log.fail("leaders", ClusterUnavailable("not led by any broker"))
    began: list[int] = []
    rig.log.fail("begin", lambda: began.append(len(rig.log.failures["leaders"])))
    await rig.writer.start()

    assert began == [0]
    assert rig.log.forgotten == []


async def test_a_sweep_is_over_when_its_markers_are_written(rig: Rig) -> None:
    """I2: an answer says only that they are going to be."""
    rig.log.markers_under_way = 3
    rig.log.state = "CompleteAbort"
    await rig.writer.start()

    assert rig.log.markers_under_way == 0


@pytest.mark.parametrize("state", ["CompleteCommit", "CompleteAbort"])
async def test_a_sweep_during_which_a_leader_was_lost_is_repeated(rig: Rig, state: str) -> None:
    """I1, I2: its markers may have been forgotten too."""
    rig.log.forgotten = [(OUTPUT, b"forgotten")]
    rig.log.state = state
    rig.log.elections = 2
    await rig.writer.start()

    assert rig.log.forgotten == []
    assert rig.values() == ([b"forgotten"] if state == "CompleteCommit" else [])
    assert len(rig.log.producers) == 3


async def test_a_producer_that_cannot_sweep_is_replaced(rig: Rig) -> None:
    """What it may have left open is ended by the next one."""
    rig.log.forgotten = [(OUTPUT, b"forgotten")]
    rig.log.fail("sweep", ProducerFenced())
    rig.append(0, b"0")
    await rig.begun()

    await rig.acknowledged(0)
    assert rig.values() == [b"0"]
    assert [producer.stopped for producer in rig.log.producers] == [True, False]


async def test_without_an_output_topic_nothing_begins(rig: Rig) -> None:
    """It may come back, with what was left open in it."""
    output = rig.log.leaders.pop(OUTPUT)
    starting = asyncio.create_task(rig.writer.start())
    await until(lambda: len(rig.log.producers) > 2)
    assert rig.writer.stuck

    rig.log.leaders[OUTPUT] = output
    await starting


@pytest.mark.parametrize("denied", [False, True], ids=["gone", "denied"])
async def test_a_dead_letter_topic_that_is_not_there_keeps_only_dead_letters_waiting(
    rig: Rig, caplog: pytest.LogCaptureFixture, denied: bool
) -> None:
    """Contract 3: responses are written; who operates the service is told, once; a dead letter waits for its sweep."""
    there = dict(rig.log.leaders)
    if denied:
        rig.log.denied = {DEAD}
    else:
        del rig.log.leaders[DEAD]
    rig.log.forgotten = [(DEAD, b"forgotten")]
    rig.append(0, b"0")
    await rig.begun()
    await rig.acknowledged(0)
    rig.log.fail("commit", ProducerFenced())
    rig.append(1, b"1")
    await rig.acknowledged(0, 1)
    assert len([record for record in caplog.records if "dead letter topic" in record.getMessage()]) == 1

    rig.log.state, rig.log.forgotten = "CompleteAbort", [(DEAD, b"forgotten")]  # the double's markers are everywhere
    rig.append(2, b"letter", DEAD)
    rig.append(2, b"2")
    await until(lambda: rig.writer.stuck)
    rig.log.denied, rig.log.leaders = set(), there
    await rig.acknowledged(0, 1, 2, 2)
    assert (rig.values(), rig.values(DEAD)) == ([b"0", b"1", b"2"], [b"letter"])


def trip() -> None:
    """What the client raises when it hears of an outage at a moment that it does not expect."""
    TransactionManager("group/operations/3", 1).begin_transaction()


def trip_over_a_future() -> None:
    """The other kind."""
    manager = TransactionManager("group/operations/3", 1)
    manager.set_pid_and_epoch(1, 0)
    manager.set_pid_and_epoch(1, 1)


@pytest.mark.parametrize("step", ["start", "begin", "sweep", "swept", "send", "offsets", "commit"])
@pytest.mark.parametrize("defect", [trip, trip_over_a_future])
async def test_a_client_that_trips_over_itself_is_replaced(rig: Rig, step: str, defect: Callable[[], None]) -> None:
    """Contract 11: an outage of the brokers ends nothing."""
    rig.log.fail(step, defect)
    rig.append(0, b"0")
    await rig.begun()

    await rig.acknowledged(0)
    assert rig.values() == [b"0"]
    assert len(rig.log.producers) == 2


async def test_a_defect_of_our_own_is_none_of_the_client(rig: Rig) -> None:
    """It ends the process, as any other."""
    await rig.begun()
    rig.log.fail("begin", AssertionError("ours"))
    rig.append(0, b"0")

    await until(lambda: bool(rig.failures))
    assert isinstance(rig.failures.pop(), AssertionError)


async def test_a_slow_commit_is_followed_by_a_sweep(rig: Rig) -> None:
    """I1: a broker may have answered and forgotten it, and the next transaction that is aborted would end it."""
    rig.log.forgets.append({"output", "offsets", "slow"})
    rig.append(0, b"0")
    await rig.begun()

    await rig.acknowledged(0)
    assert (rig.values(), rig.log.committed) == ([b"0"], (1, ""))
    assert len(rig.log.producers) == 1


@pytest.mark.parametrize("state", ["Empty", None])
async def test_a_commit_that_was_answered_is_completed_though_its_sweep_fails(rig: Rig, state: str | None) -> None:
    """I1: its answer stands, also where nobody tells how it was decided."""
    await rig.begun()
    rig.log.state = state
    rig.log.forgets.append({"output", "offsets", "slow"})
    rig.log.fail("leaders", ClusterUnavailable("not led by any broker"))
    rig.append(0, b"0")

    await rig.acknowledged(0)
    assert (rig.values(), rig.log.committed) == ([b"0"], (1, ""))
    assert len(rig.log.producers) == 2


def nothing() -> None:
    """A step that takes its course."""


def times_out(rig: Rig) -> None:
    """Have the sweep ended by the coordinator, and told so late that it is decided when the process looks."""
    rig.log.fail("swept", rig.log.time_out)


def is_left_open(rig: Rig) -> None:
    """Have the sweep ended by the start of the next producer."""
    rig.log.fail("swept", RequestTimedOutError())


def times_out_late(rig: Rig) -> None:
    """Have the sweep ended by the coordinator while it is asked what is open, for the second time."""
    is_left_open(rig)
    rig.log.fail("open", nothing, lambda: rig.log.end(commit=False))


def is_left_open_and_cannot_be_asked(rig: Rig) -> None:
    """Have the sweep ended by the start of the next producer, of which the effect shows to the one after it."""
    is_left_open(rig)
    rig.log.fail("open", nothing, nothing, ClusterUnavailable("away"))


@pytest.mark.parametrize("sweep", [is_left_open, times_out, times_out_late, is_left_open_and_cannot_be_asked])
async def test_a_commit_that_was_answered_is_written_again_where_its_sweep_is_aborted(
    rig: Rig, sweep: Callable[[Rig], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1: it takes along what the commit has left open. Who hears of it may stop the writer at once (a drain)."""
    seen: list[list[bytes | None]] = []
    monkeypatch.setattr(rig.assigned, "acknowledged", lambda _: seen.append(rig.values()))
    await rig.begun()
    rig.log.forgets.append({"output", "slow"})
    sweep(rig)
    rig.append(0, b"0")

    await until(lambda: bool(seen))
    await settled()
    assert seen == [[b"0"]]
    assert (rig.values(), rig.log.committed, rig.assigned.committed) == ([b"0"], (1, ""), 1)
    assert not rig.writer.stuck


def does_not_begin(rig: Rig) -> None:
    """Have the sweep fail before it is begun."""
    rig.log.fail("sweep", RequestTimedOutError())


def holds_the_offsets_alone(rig: Rig) -> None:
    """Have the sweep refused as a whole for the dead letters, when the group is part of it already."""
    rig.log.denied.add(DEAD)
    rig.log.markers.append({"offsets"})


def is_committed_late(rig: Rig) -> None:
    """Have the sweep take effect while the process asks, for the second time, what is open."""
    is_left_open(rig)
    rig.log.fail("open", nothing, lambda: rig.log.end(commit=True))


def is_not_told(rig: Rig) -> None:
    """Have brokers that do not tell, and a marker of the commit that comes late."""
    rig.log.state = None
    does_not_begin(rig)
    rig.log.fail("connect", lambda: rig.log.end(commit=True))


def waits_for_markers(rig: Rig) -> None:
    """Have the commit complete only when it was asked for several times, and its sweep abort nothing then."""
    rig.log.markers_under_way = 2
    rig.log.fail("question", nothing, nothing, lambda: rig.log.end(commit=True))
    times_out(rig)


def takes_its_course(rig: Rig) -> None:
    """Have nothing go wrong."""


COMPLETED = [
    takes_its_course,
    does_not_begin,
    holds_the_offsets_alone,
    is_committed_late,
    is_not_told,
    waits_for_markers,
]
"""What may become of the sweep after a commit that is complete in the end."""


@pytest.mark.parametrize("sweep", COMPLETED)
async def test_what_was_forgotten_and_is_completed_after_all_is_not_written_again(
    rig: Rig, sweep: Callable[[Rig], None]
) -> None:
    """I2: it would be there twice."""
    await rig.begun()
    rig.log.forgets.append({"output", "slow"})
    sweep(rig)
    rig.append(0, b"0")
    await rig.acknowledged(0)
    rig.log.fail("commit", ProducerFenced())
    rig.append(1, b"1")

    await rig.acknowledged(0, 1)
    assert rig.values() == [b"0", b"1"]


@pytest.mark.parametrize("step", ["open", "connect"])
async def test_a_commit_that_takes_effect_while_the_next_producer_starts_is_written_once(rig: Rig, step: str) -> None:
    """I2: it was still on its way, and completes what was forgotten before. An earlier decision says nothing of it."""
    await rig.begun()
    rig.append(0, b"0")
    await rig.acknowledged(0)
    rig.log.fail("begin", OSError("reset"))
    rig.log.forgets.append({"output"})
    rig.append(1, b"1")
    await rig.acknowledged(0, 1)

    def arrive() -> None:
        rig.log.forgotten.extend(rig.log.producers[1].open)
        rig.log.forgotten_offsets = (3, "")
        rig.log.end(commit=True)

    rig.log.fail("commit", RequestTimedOutError())
    rig.log.fail(step, arrive)
    rig.append(2, b"2")

    await rig.acknowledged(0, 1, 2)
    assert rig.values() == [b"0", b"1", b"2"]


async def test_where_nobody_tells_what_was_aborted_is_written_again(rig: Rig) -> None:
    """I1: the first producer that starts aborts it, which the second one sees."""
    await rig.begun()
    rig.log.state = None
    rig.log.forgets.append({"output"})
    rig.append(0, b"0")
    await rig.acknowledged(0)
    rig.log.fail("commit", ProducerFenced())
    rig.log.fail("connect", lambda: rig.log.end(commit=False))
    rig.log.fail("start", OSError("refused"))
    rig.append(1, b"1")

    await rig.acknowledged(0, 1)
    assert rig.values() == [b"0", b"1"]


async def test_offsets_that_somebody_else_has_put_there_end_the_process(rig: Rig) -> None:
    """What is known of an earlier commit, which was swept after, is no excuse for them."""
    await rig.begun()
    rig.log.forgets.append({"slow"})
    rig.append(0, b"0")
    await rig.acknowledged(0)
    rig.log.committed = (7, "")
    rig.log.fail("commit", ProducerFenced())
    rig.append(1, b"1")

    await until(lambda: bool(rig.failures))
    assert isinstance(rig.failures.pop(), CommitForgotten)


@pytest.mark.parametrize("first", [is_left_open, times_out])
async def test_a_commit_without_an_answer_is_written_again_where_the_sweep_that_completes_it_is_aborted(
    rig: Rig, first: Callable[[Rig], None]
) -> None:
    """I1: it counts as answered, for it is decided."""
    await rig.begun()
    rig.log.forgets.append({"output"})
    rig.log.commit_answers_lost = 1
    first(rig)
    rig.append(0, b"0")

    await rig.acknowledged(0)
    assert (rig.values(), rig.log.committed) == ([b"0"], (1, ""))


async def test_a_commit_is_written_again_where_the_next_producers_sweep_is_aborted(rig: Rig) -> None:
    """I1: the transaction after it has not come to its coordinator, which has it still as the last."""
    await rig.begun()
    rig.log.forgets.append({"output"})
    rig.append(0, b"0")
    await rig.acknowledged(0)
    rig.log.fail("begin", OSError("reset"))
    is_left_open(rig)
    rig.append(1, b"1")

    await rig.acknowledged(0, 1)
    assert rig.values() == [b"0", b"1"]


async def test_an_older_transaction_does_not_hold_up_the_sweep_after_an_answer(rig: Rig) -> None:
    """It would hold up all responses; what it hides is looked at again where the sweep fails."""
    await rig.begun()
    rig.log.forgets.append({"output", "slow"})
    rig.log.hidden = 2
    is_left_open(rig)
    rig.append(0, b"0")

    await rig.acknowledged(0)
    assert (rig.values(), len(rig.log.producers)) == ([b"0"], 3)


@pytest.mark.parametrize("left", ["gone", "denied"])
@pytest.mark.parametrize("step", ["commit", "connect"], ids=["after it was aborted", "before"])
async def test_a_forgotten_dead_letter_whose_topic_is_not_there_any_more_holds_up_nothing(
    rig: Rig, caplog: pytest.LogCaptureFixture, left: str, step: str
) -> None:
    """Nobody can write it; who operates the service is told."""
    await rig.begun()
    rig.log.forgets.append({"output"})
    rig.append(0, b"letter", DEAD)
    rig.append(0, b"0")
    await rig.acknowledged(0, 0)

    def leave() -> None:
        if left == "gone":
            del rig.log.leaders[DEAD]
        else:
            rig.log.denied.add(DEAD)
        raise ProducerFenced

    rig.log.fail("commit", ProducerFenced())
    rig.log.fail(step, leave)
    rig.append(1, b"1")

    await rig.acknowledged(0, 0, 1)
    assert (rig.values(), rig.values(DEAD)) == ([b"0", b"1"], [])
    (told,) = [record for record in caplog.records if "forgotten dead letters are lost" in record.getMessage()]
    assert told.levelname == "ERROR"


async def test_what_is_found_forgotten_after_an_answer_is_not_forgotten_again(rig: Rig) -> None:
    """I1: the answered one has gone to the dead letters alone; the one before it is what has to be written again."""
    await rig.begun()
    rig.log.forgets.append({"output"})
    rig.log.forgets.append({"slow"})
    rig.append(0, b"0")
    await rig.acknowledged(0)
    rig.log.fail("swept", RequestTimedOutError())
    rig.append(1, b"letter", DEAD)

    await rig.acknowledged(0, 1)
    await until(lambda: rig.values() == [b"0"])
    assert rig.values(DEAD) == [b"letter"]


async def test_dead_letters_that_are_gone_after_some_were_written_hold_up_nothing(rig: Rig) -> None:
    """What has become of them cannot be asked, and need not be."""
    await rig.begun()
    rig.append(0, b"letter", DEAD)
    rig.append(0, b"0")
    await rig.acknowledged(0, 0)
    del rig.log.leaders[DEAD]
    rig.log.fail("send", RequestTimedOutError())
    rig.append(1, b"1")

    await rig.acknowledged(0, 0, 1)
    assert rig.values() == [b"0", b"1"]


SIDES = [{"output"}, {"offsets"}, {"output", "offsets"}]
"""Where a broker may forget a commit."""


@pytest.mark.parametrize("sides", SIDES, ids=" and ".join)
async def test_a_commit_without_an_answer_that_was_decided_is_completed(rig: Rig, sides: set[str]) -> None:
    """I1, I2: forgotten in the output, nobody would write it again; in the offsets, it would be there twice."""
    rig.log.forgets.append(sides)
    rig.log.commit_answers_lost = 1
    rig.append(0, b"0")
    await rig.begun()

    await rig.acknowledged(0)
    assert (rig.values(), rig.log.forgotten, rig.log.committed) == ([b"0"], [], (1, ""))
    assert len(rig.log.producers) == 2


async def test_where_nobody_tells_the_offsets_tell_that_a_commit_took_effect(rig: Rig) -> None:
    """I1: brokers before 3.0; what is left open of it in the output is completed too."""
    rig.log.state = None
    rig.log.forgets.append({"output"})
    rig.log.commit_answers_lost = 1
    rig.append(0, b"0")
    await rig.begun()

    await rig.acknowledged(0)
    assert (rig.values(), rig.log.forgotten) == ([b"0"], [])


async def test_the_decision_of_an_earlier_transaction_says_nothing_of_one_that_never_came_to_its_commit(
    rig: Rig,
) -> None:
    """I1: it would be taken for written."""
    rig.append(0, b"0")
    await rig.begun()
    await rig.acknowledged(0)
    assert rig.log.state == "CompleteCommit"

    rig.log.fail("begin", OSError("reset"))
    rig.append(1, b"1")

    await rig.acknowledged(0, 1)
    rig.log.fail("commit", TimeoutError())
    rig.append(2, b"2")

    await rig.acknowledged(0, 1, 2)
    assert rig.values() == [b"0", b"1", b"2"]


async def test_a_decision_counts_where_the_offsets_tell_nothing(rig: Rig) -> None:
    """I2: above a gap, where the map is refused, a commit changes nothing there."""
    rig.log.metadata_max = 0
    rig.assigned.stuck = rig.assigned.committed = 0
    rig.log.committed = (0, "")
    rig.limit.refused(1)
    rig.assigned.offset_map = "map"
    rig.log.commit_answers_lost = 1
    rig.append(1, b"1")
    await rig.begun()

    await rig.acknowledged(1)
    assert rig.values() == [b"1"]


@pytest.mark.parametrize("sides", SIDES, ids=" and ".join)
@pytest.mark.parametrize("step", ["begin", "send", "offsets", "commit"])
async def test_a_commit_that_turns_out_to_be_forgotten_is_made_good(rig: Rig, sides: set[str], step: str) -> None:
    """I1, I2: it was answered at once, and the transaction after it, which fails, is aborted together with it."""
    await rig.begun()
    rig.log.forgets.append(sides)
    rig.append(0, b"letter", DEAD)
    for token in range(BATCH_RECORDS + 1):
        rig.append(token, b"%d" % token)
    await rig.acknowledged(0, *range(BATCH_RECORDS + 1))
    rig.log.fail(step, ProducerFenced(), ProducerFenced())
    rig.log.fail("connect", OSError("refused"))
    rig.log.fail("sweep", ProducerFenced())
    rig.append(BATCH_RECORDS + 1, b"next")

    await rig.acknowledged(0, *range(BATCH_RECORDS + 2))
    assert rig.values() == [*(b"%d" % token for token in range(BATCH_RECORDS + 1)), b"next"]
    assert (rig.values(DEAD), rig.log.committed) == ([b"letter"], (BATCH_RECORDS + 2, ""))


async def test_a_commit_is_made_good_by_the_next_one_that_takes_effect(rig: Rig) -> None:
    """I2: to write it again would be once too often."""
    await rig.begun()
    rig.log.forgets.append({"output", "offsets"})
    rig.append(0, b"0")
    await rig.acknowledged(0)
    rig.log.commit_answers_lost = 1
    rig.append(1, b"1")
    await rig.acknowledged(0, 1)
    rig.log.fail("commit", ProducerFenced())
    rig.append(2, b"2")

    await rig.acknowledged(0, 1, 2)
    assert rig.values() == [b"0", b"1", b"2"]


async def test_a_commit_is_made_good_by_no_other_that_does_not_go_there(rig: Rig) -> None:
    """I1: markers go only where a transaction was written to, and there may be few dead letters."""
    await rig.begun()
    rig.log.forgets.append({"output"})
    rig.append(0, b"letter", DEAD)
    rig.append(0, b"0")
    await rig.acknowledged(0, 0)
    rig.append(1, b"1")
    await rig.acknowledged(0, 0, 1)
    rig.assigned.finished.add(2)
    rig.writer.commit_offset()
    await until(lambda: rig.log.committed == (3, ""))
    assert (rig.values(), rig.values(DEAD)) == ([b"0", b"1"], [])
    rig.log.fail("commit", ProducerFenced())
    rig.append(3, b"3")

    await rig.acknowledged(0, 0, 1, 3)
    assert (rig.values(), rig.values(DEAD)) == ([b"0", b"1", b"3"], [b"letter"])


async def test_what_is_made_good_is_so_once(rig: Rig) -> None:
    """I2: it is no part of the transactions after it."""
    await rig.begun()
    rig.log.forgets.append({"output"})
    rig.append(0, b"0")
    await rig.acknowledged(0)
    for token, failures in ((1, [ProducerFenced()]), (2, []), (3, [ProducerFenced()])):
        rig.log.fail("commit", *failures)
        rig.append(token, b"%d" % token)
        await rig.acknowledged(*range(token + 1))

    assert rig.values() == [b"0", b"1", b"2", b"3"]


async def test_an_older_transaction_that_hides_the_last_commit_is_waited_for(rig: Rig) -> None:
    """I1: it is somebody else's, in the same partition; no producer starts, which would abort what is behind it."""
    await rig.begun()
    rig.log.forgets.append({"output"})
    rig.append(0, b"0")
    await rig.acknowledged(0)
    rig.log.hidden = 3
    rig.log.fail("open", ClusterUnavailable("away"))
    rig.log.fail("commit", ProducerFenced())
    rig.append(1, b"1")

    await rig.acknowledged(0, 1)
    assert rig.values() == [b"0", b"1"]


@pytest.mark.parametrize("why", ["hidden", "hidden until it was aborted", "its place is not known"])
async def test_a_commit_of_which_nobody_can_tell_what_is_forgotten_ends_the_process(
    rig: Rig, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I1: who starts anew begins with its records, as the offsets say. That an earlier one was told counts for it."""
    monkeypatch.setattr(transactions_module, "HIDDEN_SECONDS", 1.0)
    await rig.begun()
    rig.append(0, b"0")
    await rig.acknowledged(0)
    rig.log.fail("commit", ProducerFenced())
    rig.log.forgets.append({"output", "offsets"})
    rig.log.places_told = why != "its place is not known"
    rig.append(1, b"1")
    await rig.acknowledged(0, 1)
    if why != "its place is not known":
        rig.log.hidden = 1_000_000

    def show() -> None:
        rig.log.hidden, rig.log.state = 0, "Empty"
        raise OSError("reset")

    if why == "hidden until it was aborted":
        rig.log.fail("start", show)
    rig.log.fail("commit", ProducerFenced())
    rig.append(2, b"2")

    await until(lambda: bool(rig.failures))
    assert isinstance(rig.failures.pop(), CommitForgotten)
    assert rig.assigned.acknowledged_tokens == [0, 1]


@pytest.mark.parametrize("late", [False, True], ids=["before it was asked", "while it was"])
async def test_a_transaction_that_the_broker_has_aborted_by_itself_takes_what_is_forgotten_with_it(
    rig: Rig, late: bool
) -> None:
    """I1: nobody can tell then, unless the offsets are forgotten too; the same end."""
    await rig.begun()
    rig.log.forgets.append({"output", "offsets"})
    rig.append(0, b"0")
    await rig.acknowledged(0)

    def time_out() -> None:
        rig.log.end(commit=False)
        if not late:
            raise TimeoutError

    if late:
        rig.log.fail("open", time_out)
        rig.log.fail("commit", TimeoutError())
    else:
        rig.log.fail("commit", time_out)
    rig.append(1, b"1")

    await until(lambda: bool(rig.failures))
    assert isinstance(rig.failures.pop(), CommitForgotten)


async def test_what_the_coordinator_has_aborted_by_itself_may_be_lost_and_is_named(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """I1: the offsets are committed, and nobody can tell any more that the responses are not."""
    await rig.begun()
    rig.log.forgets.append({"output"})
    for token in range(3):
        rig.append(token, b"%d" % token)
    await rig.acknowledged(0, 1, 2)
    rig.log.fail("commit", rig.log.time_out)
    rig.append(3, b"3")

    await rig.acknowledged(0, 1, 2, 3)
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    for part in ("cannot be told", "into=responses", "records=3", "from_offset=0", "to_offset=2"):
        assert part in told.getMessage()


@pytest.mark.parametrize("slow", [False, True], ids=["of the next producer", "after a slow commit"])
async def test_no_error_names_what_a_sweep_completes(rig: Rig, caplog: pytest.LogCaptureFixture, slow: bool) -> None:
    """Here nobody can see it before, as an older transaction hides it."""
    await rig.begun()
    if slow:
        rig.log.forgets.append({"slow"})
        rig.log.hidden = 1
    rig.append(0, b"0")
    await rig.acknowledged(0)
    if not slow:
        rig.log.fail("begin", OSError("reset"))
        rig.log.hidden = 1
        rig.log.fail("commit", ProducerFenced())
    rig.log.fail("commit", rig.log.time_out)
    rig.append(1, b"1")

    await rig.acknowledged(0, 1)
    assert rig.values() == [b"0", b"1"]
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_what_the_coordinator_has_aborted_by_itself_takes_along_only_what_is_where_it_was_written_to(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """I1: the sweep, which aborts, would take along the rest, which therefore is written again."""
    await rig.begun()
    rig.log.forgets.append({"output"})
    rig.append(0, b"letter", DEAD)
    await rig.acknowledged(0)
    rig.log.markers.append({OUTPUT, "offsets"})
    rig.log.fail("commit", rig.log.time_out)
    rig.append(1, b"1")

    await rig.acknowledged(0, 1)
    assert (rig.values(), rig.values(DEAD)) == ([b"1"], [b"letter"])
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_what_is_to_be_made_good_and_has_become_too_large_holds_up_nothing(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """Its owner was told long ago that it is written."""
    await rig.begun()
    rig.log.forgets.append({"output"})
    rig.append(0, b"x" * 100)
    rig.append(1, b"1")
    await rig.acknowledged(0, 1)
    rig.log.fail("commit", ProducerFenced())
    rig.log.value_max = 10
    rig.append(2, b"2")

    await rig.acknowledged(0, 1, 2)
    assert rig.values() == [b"1", b"2"]
    assert "too large by now, and lost" in caplog.text


async def test_a_commit_that_would_have_changed_nothing_is_written_again(rig: Rig) -> None:
    """Contract 3: above a gap, where the map is refused, the offset tells nothing: repeating loses nothing."""
    rig.log.metadata_max = 0
    rig.assigned.stuck = 0
    rig.assigned.committed = 0
    rig.log.committed = (0, "")
    rig.limit.refused(1)
    rig.assigned.offset_map = "map"
    rig.log.fail("commit", TimeoutError())
    rig.append(1, b"1")
    await rig.begun()

    await rig.acknowledged(1)
    assert rig.values() == [b"1"]


async def test_who_is_no_member_any_more_starts_no_producer(rig: Rig) -> None:
    """H21: it would fence the rightful owner, and write stale responses."""
    rig.log.fail("commit", ProducerFenced())
    rig.log.member = False
    rig.append(0, b"0")
    await rig.begun()

    await until(lambda: rig.assigned.lost)
    assert (rig.values(), rig.assigned.acknowledged_tokens) == ([], [])
    assert len(rig.log.producers) == 1


async def test_who_is_expelled_while_its_producer_starts_writes_nothing_with_it(rig: Rig) -> None:
    """I2: it has fenced the rightful owner, who writes its responses again: so nobody else may."""
    rig.log.fail("commit", ProducerFenced())
    rig.log.memberships.extend([True, False])
    rig.append(0, b"0")
    await rig.begun()

    await until(lambda: rig.assigned.lost)
    assert (rig.values(), rig.assigned.acknowledged_tokens) == ([], [])
    await until(lambda: not rig.writer.stuck)  # contract 8: the output holds up nothing of it any more
    assert [producer.stopped for producer in rig.log.producers] == [True, True]


async def test_nor_does_who_cannot_ask_whether_it_was(rig: Rig) -> None:
    """The producer that has started meanwhile is thrown away, and all is asked anew with the next."""
    rig.log.fail("commit", ProducerFenced())
    answers: deque[bool | Exception] = deque([True, ClusterUnavailable("gone")])

    async def is_member() -> bool:
        answer = answers.popleft() if answers else True
        if isinstance(answer, Exception):
            raise answer
        return answer

    rig.writer._is_member = is_member
    rig.append(0, b"0")
    await rig.begun()

    await until(lambda: rig.assigned.acknowledged_tokens == [0])
    assert rig.values() == [b"0"]
    assert [producer.stopped for producer in rig.log.producers] == [True, True, False]


async def test_a_record_that_is_too_large_is_replaced_in_its_place(rig: Rig) -> None:
    """H18c, H20: its neighbours are written, in their order, and nothing of the first attempt is."""
    rig.assigned.instead = lambda token: rig.append(token, b"too large")
    for token, value in enumerate((b"0", b"x" * 2000, b"2")):
        rig.append(token, value)
    await rig.begun()

    await rig.acknowledged(0, 1, 2)
    assert rig.values() == [b"0", b"too large", b"2"]
    assert rig.assigned.refused_tokens == [1]


async def test_a_map_that_is_too_large_is_left_out_then_and_from_then_on(rig: Rig) -> None:
    """Contract 3: `offset.metadata.max.bytes` may be lower than a map."""
    rig.log.metadata_max = 40
    rig.assigned.offset_map = "m" * 100
    rig.append(0, b"0")
    await rig.begun()
    await rig.acknowledged(0)
    rig.append(1, b"1")
    await rig.acknowledged(0, 1)

    assert rig.values() == [b"0", b"1"]
    assert (rig.assigned.committed, rig.assigned.committed_map, rig.assigned.maps_left_out) == (2, "", 2)
    assert len(rig.log.producers) == 2, "one refusal, one new producer"
    assert rig.limit.fitting("m" * 51) == ""


async def test_a_producer_that_cannot_start_is_tried_again(rig: Rig) -> None:
    """H17, H26: producers are made anew, as often as it takes; the assertion tells that no broker is known."""
    rig.log.fail("start", OSError("refused"), AssertionError("Did we not perform bootstrap?"))

    await rig.begun()

    assert [producer.stopped for producer in rig.log.producers] == [True, True, False]
    assert not rig.writer.stuck


async def test_a_step_that_hangs_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """H23, H24: the client asks a coordinator that has moved for ever; after a deadline the producer is replaced."""
    monkeypatch.setattr(transactions_module, "STEP_TIMEOUT_SECONDS", 0.02)
    await rig.begun()
    hangs = asyncio.Event()
    monkeypatch.setattr(rig.log.producers[0], "commit_transaction", hangs.wait)
    rig.append(0, b"0")

    await rig.acknowledged(0)
    assert rig.values() == [b"0"]


async def test_being_stuck_shows_while_it_lasts(rig: Rig) -> None:
    """Contract 8, reason `output`."""
    rig.log.fail("commit", ProducerFenced())
    rig.log.fail("start", *[OSError("refused")] * 3)
    await rig.writer.start()
    rig.log.fail("start", *[OSError("refused")] * 1000)
    rig.writer.begin(rig.assigned)
    rig.append(0, b"0")

    await until(lambda: rig.writer.stuck)
    rig.log.failures["start"].clear()
    await rig.acknowledged(0)
    assert not rig.writer.stuck


async def test_a_stop_that_cuts_the_throwing_away_of_a_producer_does_it_again(rig: Rig) -> None:
    """I12: whoever is fenced loses its partition at the same time; nothing of its producer may be left behind."""
    await rig.begun()
    producer = rig.log.producers[0]
    cut, closed = asyncio.Event(), []

    async def never_stops() -> None:
        cut.set()
        await asyncio.Event().wait()

    async def close() -> None:
        closed.append(producer)

    producer.stop = never_stops  # type: ignore[method-assign]
    producer.client.close = close
    rig.log.fail("commit", ProducerFenced())
    rig.append(0, b"0")
    await cut.wait()

    await rig.writer.stop()

    assert closed == [producer]
    assert rig.values() == []
