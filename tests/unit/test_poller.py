"""The poller's decisions, over a double of the client: what is read, kept, waited for, committed, given up, and said.

The double does what was observed on the real client; `e2e/test_hazards.py` holds the real one to the same. Storage
waits at gates and lanes acknowledge on command, so that no test depends on time.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from fractions import Fraction
from typing import Any
from uuid import UUID

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    IllegalGenerationError,
    KafkaConnectionError,
    OffsetMetadataTooLargeError,
    RebalanceInProgressError,
    RecordTooLargeError,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
    UnknownMemberIdError,
)
from aiokafka.structs import OffsetAndMetadata

from client_double import ClusterDouble, CommitAnswer, ConsumerDouble
from consumer import assignment as assignment_module
from consumer.commits import CommitPolicy
from consumer.errors import ConfigError
from consumer.kafka import poller as poller_module
from consumer.kafka.poller import ClientDead, Poller
from consumer.kafka.topics import ClusterUnavailable
from consumer.metrics import PartitionState
from consumer.offset_map import decode, encode
from consumer.poison import PoisonLimitReached, PoisonPolicy
from consumer.watchdog import Suspicion
from gates import GatedStorage, settled
from lanes import CommandedLane, Fetched, Workplace, fetched, inserts, poison, until

FIRST = TopicPartition("operations", 0)
SECOND = TopicPartition("operations", 1)

SELDOM = CommitPolicy(interval_seconds=3600.0, max_records=1_000_000)
"""Only the commits that a rebalance or a stop makes, and the one of the chosen starts."""

AT_ONCE = CommitPolicy(interval_seconds=3600.0, max_records=1)
"""A commit after each acknowledgement."""

LONG_SECONDS = 3600.0
"""A deadline that no test reaches."""


class Rig:
    """A poller with everything around it."""

    def __init__(self, storage: GatedStorage, place: dict[str, Any], settings: dict[str, Any]) -> None:
        self.storage = storage
        self.place = Workplace(storage, **place)
        self.transactions: TransactionsDouble | None = settings.get("transactions")
        self.consumer = ConsumerDouble()
        self.cluster = ClusterDouble(self.consumer)
        self.fatal: list[BaseException] = []
        usual: dict[str, Any] = {
            "topics": ["operations"],
            "group_id": "group",
            "make_consumer": lambda: self.consumer,
            "ask_cluster": lambda: self.cluster,
            "drain_timeout_seconds": LONG_SECONDS,
            "commit_policy": SELDOM,
            "start": "earliest",
            "out_of_range": "pause",
            "window_policy": "share-of-available",
            "window_exhausted": "equal-share",
            "output_stuck": lambda: False,
            "storage_blocked": lambda: False,
            "fatal": self.fatal.append,
        }
        self.poller = Poller(self.place.pipeline, **(usual | settings))
        self.stopped = False

    async def join(self, *assigned: TopicPartition) -> None:
        """Start, and be assigned partitions, all of them opened."""
        await self.poller.start()
        await self.consumer.rebalance(*assigned)
        await self.opened(*assigned)

    async def opened(self, *partitions: TopicPartition) -> None:
        """Wait until *partitions* are open."""
        await until(lambda: all(self.state(partition)["position"] is not None for partition in partitions))

    def state(self, partition: TopicPartition = FIRST) -> PartitionState:
        """What is shown of a partition; of one that is not assigned, nothing is known."""
        shown = {TopicPartition(state["topic"], state["partition"]): state for state in self.poller.snapshot()}
        return shown.get(partition) or {"position": None}  # type: ignore[return-value]

    async def answered(self, *offsets: int) -> None:
        """Wait until exactly these offsets are answered, in any order."""
        await until(lambda: len(self.place.responses.appended) >= len(offsets))
        assert sorted(self.place.responses.tokens) == sorted(offsets)

    async def polled_again(self, times: int = 2) -> None:
        """Wait for further polls to begin."""
        seen = self.consumer.polls
        await until(lambda: self.consumer.polls >= seen + times)

    async def stop(self) -> bool:
        """Stop the poller."""
        self.stopped = True
        return await self.poller.stop(LONG_SECONDS, LONG_SECONDS)


MakeRig = Callable[..., Rig]


@pytest.fixture
async def make() -> AsyncIterator[MakeRig]:
    """A maker of rigs; at the end all are stopped, and nothing may be left charged, reserved, or to be said."""
    rigs: list[Rig] = []
    expected: list[type[BaseException]] = []

    def make(
        storage: GatedStorage | None = None,
        *,
        limit: int = 10,
        budget_bytes: int = 64 * 1024 * 1024,
        pipeline: dict[str, Any] | None = None,
        fails: type[BaseException] | None = None,
        **settings: Any,
    ) -> Rig:
        place = {"limit": limit, "budget_bytes": budget_bytes, "changes": pipeline or {}}
        rig = Rig(storage or GatedStorage(), place, settings)
        rigs.append(rig)
        if fails is not None:
            expected.append(fails)
        return rig

    yield make
    for rig in rigs:
        rig.storage.let_all_go()
        rig.place.responses.acknowledge_always()
        rig.place.dead_letters.acknowledge_always()
        for writer in rig.transactions.writers.values() if rig.transactions is not None else ():
            writer.lane.acknowledge_always()
        rig.consumer.commit_answers.clear()
        rig.cluster.failures.clear()
        if not rig.stopped:
            await rig.stop()
        await until(lambda rig=rig: rig.place.limiter.in_use == 0 and rig.place.budget.used == 0)  # type: ignore[misc]
        assert [type(error) for error in rig.fatal] == expected


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of the poller that are only there to spare a broker last next to no time."""
    monkeypatch.setattr(poller_module, "POLL_MILLISECONDS", 5)
    monkeypatch.setattr(poller_module, "RETRY_BACKOFF_SECONDS", (0.001, 0.001))
    monkeypatch.setattr(poller_module, "UNREADABLE_SECONDS", 0.01)
    monkeypatch.setattr(poller_module, "LOG_END_SECONDS", 0.01)
    monkeypatch.setattr(poller_module, "COMMIT_TIMEOUT_SECONDS", LONG_SECONDS)
    monkeypatch.setattr(assignment_module, "IDLE_SECONDS", LONG_SECONDS)
    monkeypatch.setattr(assignment_module, "RESERVE_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(assignment_module, "RESERVE_BACKOFF_SECONDS_MAX", 0.001)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Moves the clocks of the poller and its assignments forward."""

    class Time:
        time_ns = staticmethod(time.time_ns)

        def __init__(self) -> None:
            self.ahead = 0.0

        def monotonic(self) -> float:
            return asyncio.get_running_loop().time() + self.ahead

        def time(self) -> float:
            return 1_700_000_000.0 + self.ahead

    moved = Time()
    monkeypatch.setattr(poller_module, "time", moved)
    monkeypatch.setattr(assignment_module, "time", moved)

    def forward(seconds: float) -> None:
        moved.ahead += seconds

    return iter([forward])


def refused(cause: Exception) -> CommitFailedError:
    """What the client raises for a commit that the group refuses."""
    error = CommitFailedError("refused")
    error.__cause__ = cause
    return error


def hanging(event: asyncio.Event) -> CommitAnswer:
    """A commit that takes until *event*."""

    async def wait() -> None:
        await event.wait()

    return wait


def finishes_at_once(work: Awaitable[None]) -> bool:
    """Whether awaiting *work* comes to its end without waiting for anything."""
    steps = work.__await__()
    try:
        next(steps)
    except StopIteration:
        return True
    steps.close()
    return False


# ---------------------------------------------------------------------------------------------------- polling


class TestPolling:
    """What is asked of the client, and what becomes of its answers and failures."""

    async def test_records_are_answered_and_committed(self, make: MakeRig) -> None:
        """The ordinary way: read, answered, acknowledged, committed."""
        rig = make(commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 3))
        await rig.join(FIRST)

        await rig.answered(0, 1, 2)
        await until(lambda: rig.consumer.committed == {FIRST: OffsetAndMetadata(3, "")})

    @pytest.mark.parametrize(
        "error",
        [
            CorruptRecordException("Invalid CRC"),
            RecordTooLargeError("no complete batch at %s=%s within %s", FIRST, 0, 1000),
            TopicAuthorizationFailedError("operations"),
            ValueError("of a decompressor"),
        ],
        ids=lambda error: type(error).__name__,
    )
    async def test_records_that_a_failing_poll_took_with_it_are_read_again(
        self, make: MakeRig, error: Exception
    ) -> None:
        """H1, H2: the client has moved its positions over what it then did not hand over."""
        rig = make()
        await rig.join(FIRST, SECOND)
        rig.consumer.poll_errors.extend([error, error])

        rig.consumer.write(*FIRST, *inserts(0, 2))
        rig.consumer.write(*SECOND, *inserts(0, 1))

        await rig.answered(0, 0, 1)
        assert not rig.consumer.poll_errors, "void: no poll has failed"

    async def test_a_partition_that_cannot_be_read_is_set_aside_and_the_others_go_on(self, make: MakeRig) -> None:
        """H1: each attempt at it would throw away what has been fetched of the others."""
        rig = make()
        await rig.join(FIRST, SECOND)
        rig.consumer.damaged.add(FIRST)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        rig.consumer.write(*SECOND, *inserts(0, 2))

        await rig.answered(0, 1)
        assert {answer.response["source"]["partition"] for answer in rig.place.responses.appended} == {1}
        await until(lambda: "operations/0: cannot be read: CorruptRecordException()" in rig.poller.not_ready())

        rig.consumer.damaged.clear()
        await rig.answered(0, 0, 1)
        assert rig.poller.not_ready() == []

    async def test_a_partition_set_aside_stays_so_over_no_rebalance(self, make: MakeRig) -> None:
        """H1, H15: every rebalance begins anew, and the timer of the old epoch does nothing to the new one."""
        rig = make()
        await rig.join(FIRST)
        rig.consumer.damaged.add(FIRST)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await until(lambda: bool(rig.poller.not_ready()))

        rig.consumer.damaged.clear()
        await rig.consumer.rebalance(FIRST)

        await rig.answered(0)
        assert rig.poller.not_ready() == []

    async def test_a_partition_set_aside_is_not_fetched_for_its_own_progress(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """H1: what was read of it before goes on, and asks for more."""
        monkeypatch.setattr(poller_module, "UNREADABLE_SECONDS", LONG_SECONDS)
        rig = make(GatedStorage("object-0"), limit=1)
        rig.consumer.write(*FIRST, *inserts(0, 3))
        await rig.join(FIRST)
        await until(lambda: bool(rig.storage.running))
        rig.consumer.damaged.add(FIRST)
        rig.consumer.write(*FIRST, *inserts(3, 1))
        await until(lambda: bool(rig.poller.not_ready()))

        rig.storage.let_all_go()
        await rig.answered(0, 1, 2)
        await rig.polled_again(5)

        assert rig.consumer.polls_broken_off == 1

    async def test_a_partition_set_aside_is_not_tried_again_while_it_is_given_up(self, make: MakeRig) -> None:
        """H1, H15: the time is over in the middle of a drain."""
        rig = make(GatedStorage("object-0"))
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.join(FIRST)
        await until(lambda: bool(rig.storage.running))
        rig.consumer.damaged.add(FIRST)
        rig.consumer.write(*FIRST, *inserts(1, 1))
        await until(lambda: bool(rig.poller.not_ready()))

        revoking = asyncio.ensure_future(rig.consumer.revoke())
        await asyncio.sleep(2 * poller_module.UNREADABLE_SECONDS)
        rig.storage.let_all_go()
        rig.place.responses.acknowledge_always()
        await revoking

        assert rig.consumer.committed == {FIRST: OffsetAndMetadata(1, "")}

    async def test_a_poll_is_never_cancelled_before_the_stop(self, make: MakeRig) -> None:
        """H4: a cancelled poll counts as one that goes on for ever, and a stuck member would keep its partitions."""
        rig = make(commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 2))
        await rig.join(FIRST)
        await rig.answered(0, 1)
        rig.consumer.poll_errors.append(KafkaConnectionError("gone"))
        rig.consumer.write(*FIRST, *inserts(2, 1))
        await rig.answered(0, 1, 2)
        await rig.consumer.rebalance(FIRST, SECOND)
        await rig.consumer.rebalance()
        await rig.polled_again()

        assert rig.consumer.polls_cancelled == 0
        await rig.stop()
        assert rig.consumer.polls_cancelled == 1

    async def test_polling_goes_on_where_nothing_is_wanted(self, make: MakeRig) -> None:
        """H16b: who does not poll is thrown out of the group; asked is then for a partition that is nobody's."""
        rig = make()
        await rig.join()
        rig.consumer.write(*FIRST, *inserts(0, 1))

        await rig.polled_again(5)

        assert set(rig.consumer.polled[-3:]) == {(TopicPartition("-", 0),)}

    async def test_a_poll_asks_for_the_open_partitions_alone(self, make: MakeRig) -> None:
        """H7: what has been fetched of a paused partition is kept by not asking for it."""
        rig = make(GatedStorage(hold_all=True), limit=1, pipeline={"ordering": "unordered"})
        await rig.join(FIRST)
        value = fetched("insert", 0, "object").value
        rig.consumer.write(*FIRST, *(Fetched(offset, value) for offset in range(20_000)))
        await until(lambda: FIRST in rig.consumer.paused)
        taken = rig.consumer.positions[FIRST]
        await rig.polled_again()

        assert taken < 20_000
        assert rig.consumer.polled[-1] == (TopicPartition("-", 0),)
        assert rig.consumer.positions[FIRST] == taken

    async def test_fetching_goes_on_where_it_stopped_and_not_for_every_record(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """H7: pausing is rare, and resuming seeks nowhere, which would drop what has been fetched."""
        monkeypatch.setattr(poller_module, "POLL_RECORDS_MAX", 400)
        monkeypatch.setattr(assignment_module, "BUFFER_RECORDS_MAX", 800)
        monkeypatch.setattr(assignment_module, "BUFFER_RECORDS_RESUME", 200)
        rig = make(limit=1, pipeline={"ordering": "unordered"})
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        before = len(rig.consumer.calls)
        value = fetched("insert", 0, "object").value
        rig.consumer.write(*FIRST, *(Fetched(offset, value) for offset in range(3_000)))

        await until(lambda: len(rig.place.responses.appended) == 3_000)

        calls = rig.consumer.calls[before:]
        assert calls.count("pause 0") == calls.count("resume 0")
        assert 1 <= calls.count("pause 0") <= 5
        assert not [call for call in calls if call.startswith("seek")]

    async def test_a_record_cut_short_is_read_again_though_its_partition_is_fetched_no_more(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """H2: the client moves over it when the answer comes, and says so, paused or not."""
        rig = make()
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST, SECOND)
        getmany = rig.consumer.getmany
        cut_short = [RecordTooLargeError("no complete batch at %s=%s within %s", FIRST, 0, 1000)]

        async def stopped_meanwhile(*partitions: TopicPartition, **named: Any) -> Any:
            if cut_short and FIRST in partitions:
                rig.poller._stop_fetching(FIRST)
                rig.consumer.write(*FIRST, *inserts(0, 2))
                rig.consumer.positions[FIRST] = 1
                raise cut_short.pop()
            return await getmany(*partitions, **named)

        monkeypatch.setattr(rig.consumer, "getmany", stopped_meanwhile)
        await until(lambda: not cut_short)
        await rig.polled_again()
        rig.poller._refill(rig.poller._assignments[FIRST])

        await rig.answered(0, 1)

    async def test_a_partition_is_asked_for_again_though_another_one_has_nothing(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A poll waits for the partitions it was begun with, so that it has to be short while others have records."""
        monkeypatch.setattr(poller_module, "POLL_MILLISECONDS", int(LONG_SECONDS * 1000))
        monkeypatch.setattr(poller_module, "POLL_RECORDS_MAX", 400)
        monkeypatch.setattr(assignment_module, "BUFFER_RECORDS_MAX", 300)
        monkeypatch.setattr(assignment_module, "BUFFER_RECORDS_RESUME", 100)
        rig = make(GatedStorage(hold_all=True), limit=10, pipeline={"ordering": "unordered"})
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST, SECOND)
        value = fetched("insert", 0, "object").value
        rig.consumer.write(*FIRST, *(Fetched(offset, value) for offset in range(1_000)))
        await until(lambda: FIRST in rig.consumer.paused)
        await rig.polled_again()
        assert rig.consumer._fetcher._fetch_max_wait_ms == poller_module.BUSY_MILLISECONDS

        rig.storage.let_all_go()

        await until(lambda: len(rig.place.responses.appended) == 1_000)
        await until(lambda: rig.consumer._fetcher._fetch_max_wait_ms == rig.consumer._fetch_max_wait_ms)

    async def test_where_nothing_moves_brokers_hold_fetches_as_ever(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A partition may wait for hours, with all the records it may hold."""
        rig = make(GatedStorage(hold_all=True))
        await rig.join(FIRST, SECOND)
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 10))
        await until(lambda: rig.consumer._fetcher._fetch_max_wait_ms == poller_module.BUSY_MILLISECONDS)

        monkeypatch.setattr(poller_module, "BUSY_SECONDS", 0.0)
        await rig.polled_again(2)
        assert rig.consumer._fetcher._fetch_max_wait_ms == rig.consumer._fetch_max_wait_ms

    async def test_bytes_that_are_short_stop_all_fetching_until_some_are_free(self, make: MakeRig) -> None:
        """Contract 9: fetched records take half of the budget at most; the reason is shown."""
        rig = make(GatedStorage(hold_all=True), limit=2, budget_bytes=400_000)
        await rig.join(FIRST, SECOND)
        for partition in (FIRST, SECOND):
            records = [fetched("insert", offset, f"{offset}", b"x" * 50_000) for offset in range(8)]
            rig.consumer.write(*partition, *records)

        await until(lambda: "bytes" in rig.poller.shared_reasons())
        assert rig.consumer.paused == {FIRST, SECOND}
        assert "bytes" in rig.state(SECOND)["paused_for"]

        rig.storage.let_all_go()
        rig.place.responses.acknowledge_always()
        await until(lambda: len(rig.place.responses.appended) == 16)
        assert rig.poller.shared_reasons() == []

    async def test_bytes_that_are_short_stop_also_those_that_hold_none(self, make: MakeRig) -> None:
        """Contract 9: a partition that has finished its records would else bring more into a full process."""
        rig = make(GatedStorage(hold_all=True), limit=2, budget_bytes=400_000)
        await rig.join(FIRST, SECOND)
        rig.consumer.write(*SECOND, *inserts(0, 3))
        await until(lambda: bool(rig.storage.running))
        rig.consumer.write(*FIRST, *(fetched("insert", offset, f"{offset}", b"x" * 50_000) for offset in range(8)))
        await until(lambda: "bytes" in rig.poller.shared_reasons())

        rig.storage.let_go("object-0", "object-1", "object-2")
        await rig.answered(0, 1, 2)
        await rig.polled_again()

        assert rig.consumer.paused == {FIRST, SECOND}
        rig.storage.let_all_go()
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*SECOND, *inserts(3, 2))
        await until(lambda: len(rig.place.responses.appended) == 13)

    async def test_a_partition_that_stands_still_does_not_hold_the_bytes_of_all(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 4: it is fetched for up to its own share of them, and its neighbour goes on."""
        monkeypatch.setattr(poller_module, "POLL_RECORDS_MAX", 1)
        rig = make(GatedStorage("stuck"), limit=2, budget_bytes=400_000)
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST, SECOND)
        for offset in range(20):
            rig.consumer.write(*FIRST, fetched("insert", offset, "stuck", b"x" * 30_000))
        await until(lambda: rig.consumer.paused == {FIRST})

        rig.consumer.write(*SECOND, *inserts(0, 3))

        await rig.answered(0, 1, 2)
        assert rig.state(FIRST)["buffered"] == 3  # 90 KB, above half of three eighths of the budget
        assert rig.poller.shared_reasons() == []

    async def test_failing_polls_make_the_service_unready_and_one_alone_does_not(self, make: MakeRig) -> None:
        """Contract 8: a rebalance's hiccup is no news; a topic that may not be read is."""
        rig = make()
        await rig.join(FIRST)
        rig.consumer.poll_always_fails = TopicAuthorizationFailedError("operations")

        await until(lambda: bool(rig.poller.not_ready()))
        assert rig.poller.not_ready() == ["polling fails: TopicAuthorizationFailedError('operations')"]

        rig.consumer.poll_always_fails = None
        await until(lambda: not rig.poller.not_ready())

    @pytest.mark.parametrize("task", ["_fetch_task", "_coordination_task", "_sync_task"])
    async def test_a_client_whose_own_task_has_died_ends_the_process(self, make: MakeRig, task: str) -> None:
        """H3, H17c, H34: polling would go on finding nothing for ever, heartbeats and all."""
        rig = make(fails=ClientDead)
        await rig.join(FIRST)

        rig.consumer.dead(task)

        await until(lambda: bool(rig.fatal))
        assert str(rig.fatal[0]) == f"the client's {task} has ended: ValueError('token')"


# ---------------------------------------------------------------------------------------------------- assigned


class TestAssigned:
    """From the callback to the first record."""

    async def test_the_callback_waits_for_nothing(self, make: MakeRig) -> None:
        """H12: no heartbeat is sent while it runs; the brokers that are asked for offsets may not answer at all."""
        rig = make()
        rig.cluster.held = asyncio.Event()
        await rig.poller.start()
        await rig.consumer.revoke()

        assert finishes_at_once(rig.consumer.assign(FIRST, SECOND))
        rig.cluster.held.set()
        await rig.opened(FIRST, SECOND)

    async def test_the_client_has_no_reason_to_look_for_a_position(self, make: MakeRig) -> None:
        """H3: it does for a partition without one, and dies where it finds none at two brokers as a leader moves."""
        rig = make()
        rig.cluster.held = asyncio.Event()
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST, SECOND)

        assert set(rig.consumer.positions) == rig.consumer.paused == {FIRST, SECOND}

    async def test_no_record_is_taken_before_the_start_is_known(self, make: MakeRig) -> None:
        """H13: the client would hand records over before its callback is done, from wherever it stands."""
        rig = make()
        rig.cluster.held = asyncio.Event()
        rig.consumer.committed[FIRST] = OffsetAndMetadata(2, "")
        rig.consumer.write(*FIRST, *inserts(0, 3))
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST)
        rig.consumer.positions[FIRST] = 0
        rig.consumer.paused.clear()

        await rig.polled_again(5)
        assert rig.place.responses.appended == []
        assert set(rig.consumer.polled[-3:]) == {(TopicPartition("-", 0),)}

        rig.cluster.held.set()
        await rig.answered(2)

    async def test_a_partition_is_paused_while_it_is_closed(self, make: MakeRig) -> None:
        """H7: a rebalance clears the client's flags, and what it fetches too early would be of nobody's use."""
        rig = make()
        rig.cluster.held = asyncio.Event()
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST, SECOND)
        assert rig.consumer.paused == {FIRST, SECOND}

        rig.cluster.held.set()
        await rig.opened(FIRST, SECOND)
        assert rig.consumer.paused == set()

    async def test_a_preparation_ends_with_the_next_rebalance(self, make: MakeRig) -> None:
        """Rule 7: the brokers' late answer opens nothing in the epoch after."""
        rig = make()
        rig.cluster.held = asyncio.Event()
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST)
        await until(lambda: rig.cluster.asked == 1)

        await rig.consumer.rebalance(SECOND)
        rig.cluster.held.set()

        await rig.opened(SECOND)
        assert [(state["partition"], state["epoch"]) for state in rig.poller.snapshot()] == [(1, 2)]

    async def test_offsets_are_asked_for_until_there_is_an_answer(self, make: MakeRig) -> None:
        """H17: no deadline of the client's is waited for, and no start is guessed meanwhile."""
        rig = make()
        rig.consumer.committed[FIRST] = OffsetAndMetadata(1, "")
        rig.consumer.write(*FIRST, *inserts(0, 2))
        rig.cluster.failures.extend([ClusterUnavailable("away")] * 3)

        await rig.join(FIRST)

        await rig.answered(1)

    @pytest.mark.parametrize(("start", "expected"), [("earliest", 5), ("latest", 9)])
    async def test_a_group_that_has_committed_nothing_starts_as_configured(
        self, make: MakeRig, start: str, expected: int
    ) -> None:
        """Contract 6, `input.start`; and that start is committed at once: the next one is not chosen again."""
        rig = make(start=start)
        rig.consumer.first[FIRST] = 5
        rig.consumer.write(*FIRST, *inserts(5, 4))

        await rig.join(FIRST)

        await until(lambda: rig.consumer.committed == {FIRST: OffsetAndMetadata(expected, "")})
        await rig.answered(*range(expected, 9))

    async def test_a_partition_that_opens_later_starts_as_configured_too(self, make: MakeRig) -> None:
        """Contract 6: that the others have committed their starts meanwhile makes it no new one."""
        rig = make(start="latest")
        rig.consumer.write(*FIRST, *inserts(0, 4))
        rig.cluster.leaderless.add(FIRST)
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST, SECOND)
        await until(lambda: SECOND in rig.consumer.committed)

        await rig.consumer.rebalance(FIRST, SECOND)
        rig.cluster.leaderless.clear()

        await until(lambda: FIRST in rig.consumer.committed)
        assert rig.consumer.committed[FIRST] == OffsetAndMetadata(4, "")

    async def test_a_partition_added_to_a_known_topic_is_read_from_its_first_record(self, make: MakeRig) -> None:
        """H16i: with `latest`, records written before the new partition was noticed would be skipped."""
        rig = make(start="latest")
        rig.consumer.committed[FIRST] = OffsetAndMetadata(0, "")
        rig.consumer.write(*SECOND, *inserts(0, 2))

        await rig.join(FIRST, SECOND)

        await rig.answered(0, 1)

    async def test_what_the_offset_map_says_is_finished_is_not_run_again(self, make: MakeRig) -> None:
        """Contract 3: read back from the commit, skipped, and then gone with the watermark."""
        rig = make(commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        rig.consumer.committed[FIRST] = OffsetAndMetadata(1, encode(1, [(2, 3)], "cluster"))
        rig.consumer.write(*FIRST, *inserts(0, 5))

        await rig.join(FIRST)

        await rig.answered(1, 4)
        await until(lambda: rig.consumer.committed[FIRST] == OffsetAndMetadata(5, ""))

    @pytest.mark.parametrize(
        ("metadata", "reason"),
        [
            ("written by somebody else", "foreign"),
            (encode(1, [(2, 3)], "another cluster"), "other_cluster"),
            (encode(7, [(8, 9)], "cluster"), "other_base"),
            (encode(1, [(2, 30)], "cluster"), "beyond_log_end"),
        ],
    )
    async def test_an_offset_map_that_is_not_to_be_believed_is_counted_and_has_no_effect(
        self, make: MakeRig, metadata: str, reason: str
    ) -> None:
        """Contract 3: repeating loses nothing, believing might."""
        rig = make()
        rig.consumer.committed[FIRST] = OffsetAndMetadata(1, metadata)
        rig.consumer.write(*FIRST, *inserts(0, 4))

        await rig.join(FIRST)

        await rig.answered(1, 2, 3)
        assert rig.place.counts.offset_maps_dropped == {reason: 1}

    async def test_a_partition_waits_until_its_offset_map_can_be_judged(self, make: MakeRig) -> None:
        """H9c: a log that was cut holds other records at the same offsets; who tells no end gives no records either."""
        rig = make()
        rig.consumer.committed[FIRST] = OffsetAndMetadata(1, encode(1, [(2, 3)], "cluster"))
        rig.consumer.write(*FIRST, *inserts(0, 5))
        rig.cluster.ends_unknown = True
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST)
        await until(lambda: rig.cluster.asked > 5)
        assert not rig.poller.rebalancing
        assert rig.state()["position"] is None

        rig.cluster.ends_unknown = False

        await rig.answered(1, 4)
        assert not rig.place.counts.offset_maps_dropped

    @pytest.mark.parametrize("exactly_once", [False, True])
    async def test_a_member_that_is_given_no_partition_is_ready(self, make: MakeRig, *, exactly_once: bool) -> None:
        """There may be more members than partitions: one that waits for a place has nothing to wait for."""
        rig = make(transactions=TransactionsDouble() if exactly_once else None)

        await rig.join()
        await until(lambda: not rig.poller.rebalancing)

        assert rig.poller.not_ready() == []
        assert not rig.poller.observation().rebalancing

    @pytest.mark.parametrize("committed", [True, False])
    async def test_a_partition_without_leader_holds_up_no_other(self, make: MakeRig, *, committed: bool) -> None:
        """It opens when it has one."""
        rig = make()
        if committed:
            rig.consumer.committed[FIRST] = OffsetAndMetadata(1, encode(1, [(2, 3)], "cluster"))
        rig.consumer.write(*FIRST, *inserts(0, 4))
        rig.consumer.write(*SECOND, *inserts(0, 2))
        rig.cluster.leaderless.add(FIRST)
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST, SECOND)
        await rig.answered(0, 1)
        assert rig.state(FIRST)["position"] is None

        rig.cluster.leaderless.clear()

        await rig.answered(0, 1, *([1] if committed else [0, 1, 2, 3]))

    async def test_an_offset_map_of_a_newer_release_ends_the_process(self, make: MakeRig) -> None:
        """Contract 3: this one cannot tell what is finished, and would take that knowledge away with its commit."""
        rig = make(fails=ConfigError)
        rig.consumer.committed[FIRST] = OffsetAndMetadata(1, "ts2:" + encode(1, [(2, 3)], "cluster")[4:])
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST)

        await until(lambda: bool(rig.fatal))
        assert "operations/0 was written by a newer release" in str(rig.fatal[0])

    async def test_an_assignment_while_stopping_opens_nothing(self, make: MakeRig) -> None:
        """Contract 11: what a rebalance brings meanwhile is the next member's."""
        rig = make()
        await rig.join(FIRST)
        await rig.stop()

        await rig.consumer.assign(FIRST, SECOND)
        await settled()

        assert rig.poller.snapshot() == []


# ---------------------------------------------------------------------------------------------------- windows


class TestWindows:
    """Permits among the partitions."""

    async def test_windows_are_shared_and_no_partition_is_left_without(self, make: MakeRig) -> None:
        """Contract 4: by default each partition that can have a permit has one."""
        rig = make(limit=5)
        await rig.join(FIRST, SECOND)

        windows = [state["window"] for state in rig.poller.snapshot()]
        assert all(windows)
        assert sum(window or 0 for window in windows) <= 5

    @pytest.mark.parametrize(("policy", "windows"), [("share-of-available", [10, 9]), ("equal-share", [50, 50])])
    async def test_windows_are_as_the_policy_says(self, make: MakeRig, policy: str, windows: list[int]) -> None:
        """Contract 4: a tenth of what is left, one after the other; or the limit, divided."""
        rig = make(limit=100, window_policy=policy, pipeline={"fraction": Fraction(1, 10)})
        await rig.join(SECOND, FIRST)

        assert [state["window"] for state in rig.poller.snapshot()] == windows
        assert rig.place.limiter.in_use == sum(windows)

    async def test_reservations_are_taken_after_the_old_ones_are_back(self, make: MakeRig) -> None:
        """Contract 3: else a rebalance would find its own permits taken."""
        rig = make(limit=4)
        await rig.join(FIRST)
        before = rig.place.limiter.in_use

        for _ in range(5):
            await rig.consumer.rebalance(FIRST)
            await rig.opened(FIRST)

        assert before > 0
        assert rig.place.limiter.in_use == before

    async def test_the_starved_partition_gets_the_window_of_an_idle_one(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 4, `window.exhausted: pause`: visible, paused, retried, and helped."""
        monkeypatch.setattr(assignment_module, "IDLE_SECONDS", 0.0)
        rig = make(limit=1, window_exhausted="pause")
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST, SECOND)
        await rig.opened(FIRST, SECOND)
        starved = next(state for state in rig.poller.snapshot() if state["window"] == 0)
        assert "at_capacity" in starved["paused_for"]

        rig.consumer.write("operations", starved["partition"], *inserts(0, 1))

        await rig.answered(0)

    async def test_a_window_that_comes_back_is_taken_at_once_by_who_waits_for_one(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 4: however long it would have waited until its next attempt."""
        monkeypatch.setattr(assignment_module, "IDLE_SECONDS", 0.0)
        monkeypatch.setattr(assignment_module, "RESERVE_BACKOFF_SECONDS", 1e9)
        monkeypatch.setattr(assignment_module, "RESERVE_BACKOFF_SECONDS_MAX", 1e9)
        rig = make(limit=1, window_exhausted="pause")
        await rig.join(FIRST, SECOND)

        await until(lambda: (rig.state(FIRST)["window"], rig.state(SECOND)["window"]) == (0, 1))

    async def test_an_idle_window_stays_where_it_is_while_nobody_has_anything_to_read(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 4, 8: else it would wander from one idle partition to the next for ever."""
        monkeypatch.setattr(assignment_module, "IDLE_SECONDS", 0.0)
        rig = make(limit=1, window_exhausted="pause")
        await rig.join(FIRST, SECOND)
        reservations = rig.place.counts.reservations
        await until(lambda: rig.state(FIRST)["lag"] == rig.state(SECOND)["lag"] == 0)
        await until(lambda: rig.place.limiter.in_use == 1)
        granted, refused = reservations["granted"], reservations["at_capacity"]

        await until(lambda: reservations["at_capacity"] >= refused + 10)

        assert reservations["granted"] <= granted + 1  # one may have been on its way

    @pytest.mark.parametrize(("exhausted", "windows"), [("equal-share", 50), ("pause", 22)])
    async def test_more_partitions_than_permits_is_a_normal_state(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch, exhausted: str, windows: int
    ) -> None:
        """Contract 4: 60 partitions on 50 permits; who has none says so, and all are served by and by.

        By the share rule: 5, 5, 4, 4, 4, 3, 3, 3, 2, 2, 2, 2, 2, and nine times 1.
        """
        sixty = [TopicPartition("operations", number) for number in range(60)]
        rig = make(limit=50, window_exhausted=exhausted, pipeline={"fraction": Fraction(1, 10)})
        await rig.poller.start()
        await rig.consumer.rebalance(*sixty)
        await rig.opened(*sixty)

        states = rig.poller.snapshot()
        with_window = [state for state in states if state["window"]]
        starved = [state for state in states if state["window"] == 0]
        assert (len(with_window), len(starved)) == (windows, 60 - windows)
        assert sum(state["window"] or 0 for state in with_window) == rig.place.limiter.in_use == 50
        assert {tuple(state["paused_for"]) for state in starved} == {("at_capacity",)}
        assert {tuple(state["paused_for"]) for state in with_window} == {()}
        refused = rig.place.counts.reservations["at_capacity"]
        await until(lambda: rig.place.counts.reservations["at_capacity"] >= refused + 2 * len(starved))

        rig.place.responses.acknowledge_always()
        for partition in sixty:
            rig.consumer.write(*partition, *inserts(0, 3))
        monkeypatch.setattr(assignment_module, "IDLE_SECONDS", 0.0)
        await until(lambda: len(rig.place.responses.appended) == 180)

        assert rig.place.limiter.in_use <= 50

    async def test_a_poisoned_partition_takes_no_window_in_the_next_epoch(self, make: MakeRig) -> None:
        """Contract 5: it reads nothing more in this process, and its neighbours have the permits."""
        rig = make(limit=2, pipeline={"poison": PoisonPolicy(max_consecutive=1)})
        rig.place.responses.acknowledge_always()
        rig.place.dead_letters.acknowledge_always()
        rig.consumer.write(*FIRST, poison(0), *inserts(1, 1))
        await rig.join(FIRST)
        await until(lambda: "poison_limit" in rig.state()["paused_for"])

        await rig.consumer.rebalance(FIRST, SECOND)
        await rig.opened(FIRST, SECOND)

        assert rig.state(FIRST)["window"] is None
        assert rig.state(SECOND)["window"]
        assert "operations/0: poison limit: 1 poison records in a row" in rig.poller.not_ready()

    async def test_a_poison_limit_ends_the_process_where_that_is_asked_for(self, make: MakeRig) -> None:
        """Contract 5, `dead_letter.on_limit: stop`."""
        rig = make(fails=PoisonLimitReached, poison_stops=True, pipeline={"poison": PoisonPolicy(max_consecutive=1)})
        rig.consumer.write(*FIRST, poison(0))
        await rig.join(FIRST)

        await until(lambda: bool(rig.fatal))


# ---------------------------------------------------------------------------------------------------- revoked


class TestRevoked:
    """Giving partitions up."""

    async def test_what_was_started_is_finished_and_committed_before_the_partition_goes(self, make: MakeRig) -> None:
        """H15, contract 3: every record in flight would else be answered again by the next owner."""
        rig = make(GatedStorage("object-1"))
        rig.consumer.write(*FIRST, *inserts(0, 2))
        await rig.join(FIRST)
        await rig.answered(0)

        revoking = asyncio.ensure_future(rig.consumer.revoke())
        await settled()
        assert not revoking.done()
        rig.storage.let_all_go()
        rig.place.responses.acknowledge_always()
        await revoking

        assert rig.consumer.committed == {FIRST: OffsetAndMetadata(2, "")}
        assert rig.place.counts.rebalances == {"drained": 1, "timeout": 0, "lost": 0}
        assert rig.poller.snapshot() == []

    async def test_nothing_new_is_started_in_a_drain(self, make: MakeRig) -> None:
        """Contract 3: the gate closes first, or the drain would not end."""
        rig = make(GatedStorage("object-0"), limit=1)
        rig.consumer.write(*FIRST, *inserts(0, 50))
        await rig.join(FIRST)
        await until(lambda: bool(rig.storage.running))

        revoking = asyncio.ensure_future(rig.consumer.revoke())
        await settled()
        rig.storage.let_all_go()
        rig.place.responses.acknowledge_always()
        await revoking

        assert len(rig.storage.calls) < 5
        committed = rig.consumer.committed[FIRST].offset
        assert committed == len(rig.place.responses.appended)

    async def test_nothing_new_is_started_while_the_first_commit_is_on_its_way(self, make: MakeRig) -> None:
        """Contract 3: that commit may take seconds, and what begins in them lengthens the drain."""
        rig = make(GatedStorage("object-1"), limit=1)
        held = asyncio.Event()
        rig.consumer.write(*FIRST, *inserts(0, 50))
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        await rig.answered(0)
        rig.consumer.commit_answers.append(hanging(held))

        revoking = asyncio.ensure_future(rig.consumer.revoke())
        await until(lambda: not rig.consumer.commit_answers)
        rig.storage.let_all_go()
        await settled()
        held.set()
        await revoking

        assert len(rig.storage.calls) < 5

    async def test_a_drain_ends_at_its_deadline(self, make: MakeRig) -> None:
        """H11: the broker drops who takes longer than the rebalance time-out, in the middle of its work."""
        rig = make(GatedStorage("object-1"), drain_timeout_seconds=0.02)
        rig.consumer.write(*FIRST, *inserts(0, 2))
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        await rig.answered(0)

        await rig.consumer.revoke()

        assert rig.consumer.committed == {FIRST: OffsetAndMetadata(1, "")}
        assert rig.place.counts.rebalances == {"drained": 0, "timeout": 1, "lost": 0}
        assert rig.place.limiter.in_use == 1, "a straggler keeps its own permit and no other"

    @pytest.mark.parametrize("cause", [UnknownMemberIdError(), IllegalGenerationError()])
    async def test_a_partition_that_is_lost_is_not_drained(self, make: MakeRig, cause: Exception) -> None:
        """H16b, H16c: the callback does not tell lost from revoked; the commit does. Its new owner is at work."""
        rig = make(GatedStorage("object-1"))
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 2))
        await rig.join(FIRST)
        await rig.answered(0)
        rig.consumer.commit_answers.append(refused(cause))
        commits = len(rig.consumer.commits)

        await rig.consumer.revoke()

        assert rig.place.counts.rebalances == {"drained": 0, "timeout": 0, "lost": 1}
        assert len(rig.consumer.commits) == commits + 1

    async def test_a_commit_refused_for_a_rebalance_is_no_loss(self, make: MakeRig) -> None:
        """H16g: the client wraps all three refusals alike; this one only comes too early."""
        rig = make()
        rig.consumer.write(*FIRST, *inserts(0, 1))
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        await rig.answered(0)
        rig.consumer.commit_answers.append(refused(RebalanceInProgressError()))

        await rig.consumer.revoke()

        assert rig.place.counts.rebalances == {"drained": 1, "timeout": 0, "lost": 0}
        assert rig.consumer.committed == {FIRST: OffsetAndMetadata(1, "")}
        assert rig.place.counts.commits["unknown"] == 1

    async def test_a_member_without_membership_commits_nothing(self, make: MakeRig) -> None:
        """H16f: the broker takes such a commit where the group is empty, whoever has worked in it meanwhile."""
        rig = make()
        rig.consumer.write(*FIRST, *inserts(0, 1))
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        await rig.answered(0)
        commits = len(rig.consumer.commits)

        rig.consumer.expel()
        await rig.consumer.revoke()

        assert len(rig.consumer.commits) == commits
        assert rig.place.counts.rebalances["lost"] == 1

    async def test_no_commit_is_on_its_way_when_the_callback_returns(self, make: MakeRig) -> None:
        """H10: the client would send it again, in the next generation, and it would take back the new owner's."""
        rig = make(commit_policy=AT_ONCE)
        held = asyncio.Event()
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.join(FIRST)
        await rig.answered(0)
        await until(lambda: bool(rig.consumer.committed))
        rig.consumer.commit_answers.append(hanging(held))
        rig.place.responses.acknowledge_always()
        await until(lambda: not rig.consumer.commit_answers)

        revoking = asyncio.ensure_future(rig.consumer.revoke())
        await settled()
        assert not revoking.done()
        held.set()
        await revoking

        assert rig.consumer.committed == {FIRST: OffsetAndMetadata(1, "")}

    async def test_a_commit_that_hangs_holds_up_neither_callback_nor_drain(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """H17: with the coordinator gone a commit never ends by itself; the deadline is ours."""
        monkeypatch.setattr(poller_module, "COMMIT_TIMEOUT_SECONDS", 0.01)
        rig = make()
        rig.consumer.write(*FIRST, *inserts(0, 1))
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        await rig.answered(0)
        never = asyncio.Event()
        rig.consumer.commit_answers.extend([hanging(never), hanging(never)])

        await rig.consumer.revoke()

        assert rig.place.counts.commits["unknown"] == 2
        assert rig.place.counts.rebalances == {"drained": 0, "timeout": 1, "lost": 0}

    async def test_a_failing_callback_ends_the_process(self, make: MakeRig) -> None:
        """H14: the client only logs what a callback raises, and goes on with half of an assignment."""
        rig = make(fails=ZeroDivisionError)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        await rig.answered(0)
        rig.consumer.commit_answers.append(ZeroDivisionError())

        with pytest.raises(ZeroDivisionError):
            await rig.consumer.revoke()

        assert len(rig.fatal) == 1

    async def test_a_failing_assigned_callback_ends_the_process_too(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """H14."""
        rig = make(fails=ZeroDivisionError)
        await rig.join()
        monkeypatch.setattr(rig.consumer, "pause", lambda *_: 1 // 0)

        with pytest.raises(ZeroDivisionError):
            await rig.consumer.assign(FIRST)

        assert len(rig.fatal) == 1


class TestStragglers:
    """Work that outlives its epoch."""

    async def test_late_work_of_a_dead_epoch_commits_nothing_and_answers_nothing(self, make: MakeRig) -> None:
        """Rule 7, H10: whoever owns the partition now runs the record again, and answers it."""
        rig = make(GatedStorage("object-1"), drain_timeout_seconds=0.02, commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 3))
        await rig.join(FIRST)
        await rig.answered(0, 2)
        await rig.consumer.rebalance(SECOND)
        await rig.opened(SECOND)
        commits = len(rig.consumer.commits)

        rig.storage.let_all_go()
        await until(lambda: rig.place.limiter.in_use == (rig.state(SECOND)["window"] or 0))
        await rig.polled_again()

        assert rig.place.responses.tokens == [0, 2]
        assert not [points for points in rig.consumer.commits[commits:] if FIRST in points]

    async def test_a_partition_that_comes_back_waits_for_its_older_run_and_the_others_do_not(
        self, make: MakeRig
    ) -> None:
        """H15: a record of which the older run goes on must not run beside it, and nobody else has to do with that."""
        rig = make(GatedStorage("object-1"), drain_timeout_seconds=0.02)
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 2))
        await rig.join(FIRST)
        await rig.answered(0)

        await rig.consumer.rebalance(FIRST, SECOND)
        rig.consumer.write(*SECOND, *inserts(0, 1))
        await rig.answered(0, 0)
        assert rig.state(FIRST)["paused_for"] == ["recovering"]
        assert rig.storage.running == [("put", "object-1")]

        rig.storage.let_all_go()
        await rig.answered(0, 0, 1)
        assert rig.storage.calls.count(("put", "object-1")) == 2
        assert rig.state(FIRST)["paused_for"] == []

    async def test_a_straggler_over_two_rebalances_is_waited_for_once(self, make: MakeRig) -> None:
        """H15: the wait of the epoch between ends with it, and the last one opens the partition."""
        rig = make(GatedStorage("object-0"), drain_timeout_seconds=0.02)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.join(FIRST)
        await until(lambda: bool(rig.storage.running))

        await rig.consumer.rebalance(FIRST)
        await rig.consumer.rebalance(FIRST)
        await rig.polled_again()
        assert rig.storage.calls == [("put", "object-0")]

        rig.storage.let_all_go()
        await rig.answered(0)
        assert rig.storage.calls == [("put", "object-0")] * 2

    async def test_an_older_run_that_is_over_is_forgotten(self, make: MakeRig) -> None:
        """It would else be waited for, or kept for ever."""
        rig = make(GatedStorage("object-0"), drain_timeout_seconds=0.02)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.join(FIRST)
        await until(lambda: bool(rig.storage.running))
        await rig.consumer.rebalance()
        rig.storage.let_all_go()
        await until(lambda: rig.place.limiter.in_use == 0)

        await rig.consumer.rebalance(FIRST)

        await rig.answered(0)


# ---------------------------------------------------------------------------------------------------- commits


class TestCommits:
    """What is committed, when, and what its failure means."""

    async def test_a_commit_goes_no_further_than_what_is_acknowledged(self, make: MakeRig) -> None:
        """Guarantee 2: an answer that the broker has not acknowledged is none."""
        rig = make(commit_policy=AT_ONCE)
        rig.consumer.write(*FIRST, *inserts(0, 3))
        await rig.join(FIRST)
        await rig.answered(0, 1, 2)

        rig.place.responses.acknowledge(2)
        await until(lambda: rig.consumer.committed.get(FIRST, (0,))[0] == 2)
        await settled()

        assert rig.consumer.committed[FIRST] == OffsetAndMetadata(2, "")

    async def test_what_is_finished_above_a_gap_goes_with_the_commit(self, make: MakeRig) -> None:
        """Contract 3: the offset stays at the unfinished record, the map names the others."""
        rig = make(GatedStorage("object-0"), commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 3))
        await rig.join(FIRST)
        await rig.answered(1, 2)

        await until(lambda: bool(rig.consumer.committed and rig.consumer.committed[FIRST].metadata))
        found = rig.consumer.committed[FIRST]
        said = decode(found.metadata, committed_offset=found.offset, cluster_id="cluster", end=3)
        assert (found.offset, said.finished) == (0, ((1, 2),))

    async def test_positions_are_those_of_the_topic_that_has_the_name_now(self, make: MakeRig) -> None:
        """Contract 5: the topic's id and the partition, asked for with each assignment, as a topic may be made anew."""
        rig = make()
        for topic_id in (UUID(int=1), UUID(int=2)):
            rig.cluster.ids["operations"] = topic_id
            await (rig.consumer.rebalance if rig.poller._epoch else rig.join)(FIRST, SECOND)
            await rig.opened(FIRST, SECOND)

            sources = [assignment._source for assignment in rig.poller._assignments.values()]
            assert sources == [f"{topic_id}/0", f"{topic_id}/1"]

    async def test_where_brokers_tell_no_ids_writes_have_no_positions(self, make: MakeRig) -> None:
        rig = make()
        await rig.join(FIRST)

        assert rig.poller._assignments[FIRST]._source is None

    async def test_only_what_has_changed_is_committed(self, make: MakeRig) -> None:
        """A commit without news is a request for nothing."""
        rig = make(commit_policy=CommitPolicy(interval_seconds=0.005, max_records=1))
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST, SECOND)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await until(lambda: rig.consumer.committed.get(FIRST) == OffsetAndMetadata(1, ""))
        await rig.polled_again(4)

        assert rig.consumer.commits[1:] == [{FIRST: OffsetAndMetadata(1, "")}]

    @pytest.mark.parametrize(
        "error", [RequestTimedOutError(), KafkaConnectionError("gone"), OSError("reset"), TimeoutError()]
    )
    async def test_a_commit_without_answer_is_made_again_from_where_things_then_stand(
        self, make: MakeRig, error: Exception
    ) -> None:
        """H16g, rule 8: never the old one again."""
        rig = make(commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        await until(lambda: bool(rig.consumer.committed))
        rig.consumer.commit_answers.append(error)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await until(lambda: rig.place.counts.commits["unknown"] == 1)

        rig.consumer.write(*FIRST, *inserts(1, 1))
        await until(lambda: rig.consumer.committed[FIRST].offset == 2)

        assert [points[FIRST].offset for points in rig.consumer.commits] == [0, 1, 2]

    async def test_a_commit_given_up_that_fails_later_fails_unnoticed(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """I12: the client goes on with the request; the guards of every test report what nobody has looked at."""
        assert GroupCoordinator._do_commit_offsets.__qualname__ == poller_module.SHIELDED_COMMIT
        monkeypatch.setattr(poller_module, "COMMIT_TIMEOUT_SECONDS", 0.01)
        rig = make(commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        await until(lambda: bool(rig.consumer.committed))
        gone = asyncio.Event()

        async def request() -> None:
            await gone.wait()
            raise KafkaConnectionError

        request.__qualname__ = poller_module.SHIELDED_COMMIT
        rig.consumer.commit_answers.append(lambda: asyncio.shield(request()))
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await until(lambda: rig.place.counts.commits["unknown"] == 1)
        gone.set()
        await settled()
        gc.collect()

    async def test_after_a_refusal_nothing_more_is_committed_in_this_epoch(self, make: MakeRig) -> None:
        """H16c: the partitions are somebody else's; the next assignment begins anew."""
        rig = make(commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        await until(lambda: bool(rig.consumer.committed))
        rig.consumer.commit_answers.append(refused(IllegalGenerationError()))
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await until(lambda: rig.place.counts.commits["lost"] == 1)

        rig.consumer.write(*FIRST, *inserts(1, 1))
        await until(lambda: len(rig.place.responses.appended) == 2)
        await rig.polled_again()
        assert rig.consumer.committed[FIRST].offset == 0

        await rig.consumer.rebalance(FIRST)
        await until(lambda: rig.consumer.committed[FIRST].offset == 2)

    async def test_a_broker_that_takes_no_map_gets_the_offset_and_is_not_asked_again(self, make: MakeRig) -> None:
        """Contract 3: degraded, said and counted, not stuck."""
        rig = make(GatedStorage("object-0", "object-2"), commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 4))
        await rig.join(FIRST)
        await until(lambda: bool(rig.consumer.committed))
        refusal = OffsetMetadataTooLargeError()
        rig.consumer.commit_answers.append(refusal)

        await rig.answered(1, 3)
        await until(lambda: not rig.consumer.commit_answers)
        rig.consumer.write(*FIRST, *inserts(4, 1))
        await rig.answered(1, 3, 4)
        rig.storage.let_go("object-0")
        await until(lambda: rig.consumer.committed[FIRST].offset == 2)

        with_map = [points for points in rig.consumer.commits if points[FIRST].metadata]
        assert len(with_map) == 1
        assert rig.consumer.committed[FIRST] == OffsetAndMetadata(2, "")
        assert rig.place.counts.offset_maps_dropped["too_large"] >= 2

    async def test_a_commit_repeated_without_its_map_asks_again_whether_the_partition_is_ours(
        self, make: MakeRig
    ) -> None:
        """H10, H16f: the refusal may have come with the end of our membership."""
        rig = make(GatedStorage("object-0"), commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 2))
        await rig.join(FIRST)
        await until(lambda: bool(rig.consumer.committed))

        async def refuse() -> None:
            rig.consumer.expel()
            raise OffsetMetadataTooLargeError

        rig.consumer.commit_answers.append(refuse)
        await until(lambda: rig.place.counts.commits["lost"] == 1)

        assert rig.consumer.committed[FIRST] == OffsetAndMetadata(0, "")
        assert len([points for points in rig.consumer.commits if points[FIRST].metadata]) == 1

    async def test_offsets_without_a_record_are_crossed_where_nothing_waits(self, make: MakeRig) -> None:
        """H9b: markers of transactions are never delivered; only the client's position tells of them."""
        rig = make(commit_policy=CommitPolicy(interval_seconds=0.005, max_records=1))
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.join(FIRST)
        await rig.answered(0)

        rig.consumer.cross(FIRST, 7)

        await until(lambda: rig.consumer.committed[FIRST] == OffsetAndMetadata(7, ""))

    async def test_offsets_without_a_record_are_not_crossed_while_something_is_unfinished(self, make: MakeRig) -> None:
        """Guarantee 2: the position is ahead of what is finished, always."""
        rig = make(GatedStorage("object-0"), commit_policy=CommitPolicy(interval_seconds=0.005, max_records=1))
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.join(FIRST)
        await until(lambda: bool(rig.storage.running))

        rig.consumer.cross(FIRST, 7)
        await rig.polled_again(5)

        assert {points[FIRST].offset for points in rig.consumer.commits} == {0}

    async def test_offsets_of_which_the_client_has_still_something_to_tell_are_not_crossed(self, make: MakeRig) -> None:
        """H2: it moves past a record that it cannot fetch *before* a poll tells that; to commit there would lose it."""
        rig = make(commit_policy=CommitPolicy(interval_seconds=0.005, max_records=1))
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.join(FIRST)
        await rig.answered(0)
        await until(lambda: rig.consumer.committed[FIRST].offset == 1)

        rig.consumer._fetcher._records[FIRST] = "an error, for the next poll"
        rig.consumer.cross(FIRST, 2)
        await rig.polled_again(20)
        commits = len(rig.consumer.commits)
        assert rig.consumer.committed[FIRST].offset == 1

        rig.consumer._fetcher._records.clear()
        await until(lambda: rig.consumer.committed[FIRST].offset == 2)
        assert len(rig.consumer.commits) == commits + 1


# ---------------------------------------------------------------------------------------------------- out of range


class TestOutOfRange:
    """The start, or the position, does not exist any more."""

    async def test_it_is_an_alarm_and_the_others_go_on(self, make: MakeRig) -> None:
        """H16i, rule 3: by default nothing is skipped silently; the partition stands until somebody decides."""
        rig = make()
        rig.consumer.committed[FIRST] = OffsetAndMetadata(3, "")
        rig.consumer.first[FIRST] = 10
        rig.consumer.write(*FIRST, *inserts(10, 2))
        await rig.join(FIRST, SECOND)
        rig.consumer.write(*SECOND, *inserts(0, 2))

        await rig.answered(0, 1)

        assert "operations/0: offset out of range" in rig.poller.not_ready()
        assert "out_of_range" in rig.state(FIRST)["paused_for"]
        assert rig.consumer.committed[FIRST] == OffsetAndMetadata(3, "")

    async def test_what_was_read_before_is_finished_and_asks_for_no_more(self, make: MakeRig) -> None:
        """H16i: the alarm stands though its partition makes progress."""
        rig = make(GatedStorage("object-0"), limit=1)
        rig.consumer.write(*FIRST, *inserts(0, 3))
        await rig.join(FIRST)
        await until(lambda: bool(rig.storage.running))
        rig.consumer.first[FIRST] = 10
        rig.consumer.log[FIRST] = inserts(10, 1)
        await until(lambda: "operations/0: offset out of range" in rig.poller.not_ready())

        rig.storage.let_all_go()
        await rig.answered(0, 1, 2)
        await rig.polled_again(5)

        assert rig.consumer.polls_out_of_range == 1

    @pytest.mark.parametrize(("policy", "offsets"), [("earliest", [10, 11, 12]), ("latest", [12])])
    async def test_reading_goes_on_where_that_is_asked_for(
        self, make: MakeRig, policy: str, offsets: list[int]
    ) -> None:
        """Contract 6, `input.out_of_range`."""
        rig = make(out_of_range=policy)
        rig.consumer.committed[FIRST] = OffsetAndMetadata(3, "")
        rig.consumer.first[FIRST] = 10
        rig.consumer.write(*FIRST, *inserts(10, 2))
        await rig.join(FIRST)
        await until(lambda: rig.consumer.positions[FIRST] == 12)
        rig.consumer.write(*FIRST, *inserts(12, 1))

        await rig.answered(*offsets)
        assert rig.consumer.polls_out_of_range == 1

    async def test_a_log_that_begins_anew_is_read_after_the_work_from_the_old_one(self, make: MakeRig) -> None:
        """H16i: a topic created again has other records at the same offsets."""
        rig = make(GatedStorage("object-8"), out_of_range="earliest", commit_policy=AT_ONCE)
        rig.place.responses.acknowledge_always()
        rig.consumer.first[FIRST] = 8
        rig.consumer.write(*FIRST, *inserts(8, 1))
        await rig.join(FIRST)
        await until(lambda: bool(rig.storage.running))

        rig.consumer.log[FIRST] = inserts(0, 2)
        rig.consumer.first[FIRST] = 0
        await rig.polled_again()
        assert rig.place.responses.appended == []

        rig.storage.let_all_go()
        await rig.answered(8, 0, 1)
        await until(lambda: rig.consumer.committed[FIRST] == OffsetAndMetadata(2, ""))

    async def test_the_brokers_are_asked_again_where_they_do_not_answer(self, make: MakeRig) -> None:
        """H17: no jump without knowing where to."""
        rig = make(out_of_range="earliest")
        rig.consumer.committed[FIRST] = OffsetAndMetadata(3, "")
        rig.consumer.first[FIRST] = 10
        rig.consumer.write(*FIRST, *inserts(10, 1))
        await rig.join(FIRST)
        rig.cluster.failures.append(ClusterUnavailable("away"))

        await rig.answered(10)
        assert not rig.cluster.failures, "void: nobody was asked meanwhile"


# ---------------------------------------------------------------------------------------------------- start, stop


class TestStartAndStop:
    """The client's life."""

    async def test_a_start_is_tried_until_the_broker_is_there(self, make: MakeRig) -> None:
        """H17: the service comes up before its broker; each client that could not start is closed."""
        rig = make()
        rig.consumer.start_errors.extend([KafkaConnectionError("nobody"), OSError("refused"), TimeoutError()])

        await rig.poller.start()

        assert rig.consumer.started
        assert rig.consumer.calls == ["stop"] * 3

    async def test_a_broker_that_does_not_know_the_cluster_yet_is_not_there(self, make: MakeRig) -> None:
        """The client takes such metadata for an answer, and its coordination task ends by them: a needless exit 3."""
        rig = make()
        rig.consumer.brokers = set()
        stop = rig.consumer.stop

        async def tell_the_cluster() -> None:
            rig.consumer.brokers = {0}
            await stop()

        rig.consumer.stop = tell_the_cluster  # type: ignore[method-assign]

        await rig.poller.start()

        assert rig.consumer.calls == ["stop"]

    async def test_a_start_that_hangs_is_given_up(self, make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
        """H17, H30: the client has no deadline of its own."""
        monkeypatch.setattr(poller_module, "START_TIMEOUT_SECONDS", 0.01)
        rig = make()
        start, attempts = rig.consumer.start, []

        async def hang_once() -> None:
            attempts.append(1)
            if len(attempts) == 1:
                await asyncio.Event().wait()
            await start()

        monkeypatch.setattr(rig.consumer, "start", hang_once)

        await rig.poller.start()

        assert len(attempts) == 2

    async def test_a_start_does_not_wait_for_an_assignment(self, make: MakeRig) -> None:
        """H17: the client's own start does, without limit, where it is subscribed before."""
        rig = make()

        await rig.poller.start()

        assert rig.poller.not_ready() == ["rebalancing"]

    async def test_a_stop_drains_commits_and_then_leaves(self, make: MakeRig) -> None:
        """H16h, contract 11: the listener is not called on a stop."""
        rig = make(GatedStorage("object-1"))
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 2))
        await rig.join(FIRST)
        await rig.answered(0)

        stopping = asyncio.ensure_future(rig.stop())
        await settled()
        assert not rig.consumer.stopped
        rig.storage.let_all_go()

        assert await stopping is True
        assert rig.consumer.committed == {FIRST: OffsetAndMetadata(2, "")}
        assert rig.consumer.calls[-2:] == ["commit", "stop"]

    async def test_a_stop_in_a_rebalance_does_not_wait_for_its_end(self, make: MakeRig) -> None:
        """H5, H6: a poll waits for the next assignment without limit, and stopping the client does not release it."""
        rig = make()
        await rig.join(FIRST)
        await rig.consumer.revoke()
        await settled()

        assert await rig.stop() is True
        assert rig.consumer.polls_cancelled == 1, "void: no poll was waiting"

    async def test_a_stop_in_a_release_that_runs_out_of_time_says_so(self, make: MakeRig) -> None:
        """Contract 11: exit 1; the release was a rebalance's, and the stop finds nothing left to do."""
        rig = make(GatedStorage("object-0"), drain_timeout_seconds=0.05)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.join(FIRST)
        await until(lambda: rig.state()["in_flight"] == 1)
        revoking = asyncio.ensure_future(rig.consumer.revoke())
        await settled()

        assert await rig.stop() is False
        await revoking

    async def test_a_stop_that_could_not_commit_says_so(self, make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
        """Contract 11: exit 1, since a restart repeats something."""
        monkeypatch.setattr(poller_module, "COMMIT_TIMEOUT_SECONDS", 0.01)
        rig = make()
        rig.place.responses.acknowledge_always()
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.join(FIRST)
        await rig.answered(0)
        rig.consumer.commit_answers.append(hanging(asyncio.Event()))

        assert await rig.stop() is False

    async def test_a_client_that_does_not_stop_is_left_behind(self, make: MakeRig) -> None:
        """H17: with the broker gone it may hang for ever."""
        rig = make()
        await rig.join(FIRST)
        rig.consumer.stop_answer = asyncio.Event().wait  # type: ignore[assignment]  # what it returns is of no interest
        rig.stopped = True

        assert await rig.poller.stop(LONG_SECONDS, 0.01) is True

    @pytest.mark.parametrize("error", [asyncio.CancelledError(), KafkaConnectionError("gone")])
    async def test_a_client_that_fails_to_stop_does_not_end_the_stop(self, make: MakeRig, error: BaseException) -> None:
        """H17b: it raises `CancelledError`, though nobody has cancelled, where a fetch waits to be tried again."""
        rig = make()
        await rig.join(FIRST)
        rig.consumer.stop_answer = error

        assert await rig.stop() is True


# ---------------------------------------------------------------------------------------------------- what is said


class TestReadiness:
    """Contract 8: reasons that an operator can act upon."""

    async def test_a_topic_that_is_gone_is_told(self, make: MakeRig) -> None:
        """H16i: the client says nothing, the assignment is empty, and the service would idle for ever."""
        rig = make(topics=["operations", "gone"])
        await rig.join(FIRST)
        del rig.consumer.topics["gone"]

        assert rig.poller.not_ready() == ["topic gone does not exist"]

    async def test_a_partition_that_is_not_opened_is_told(
        self, make: MakeRig, clock: Iterator[Callable[[float], None]]
    ) -> None:
        """Contract 8: brokers that do not tell the start are not silently waited for."""
        rig = make()
        rig.cluster.held = asyncio.Event()
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST)
        await until(lambda: rig.cluster.asked > 0)
        assert rig.poller.not_ready() == []

        next(clock)(61)
        assert rig.poller.not_ready() == ["operations/0: not open for 61 s"]
        rig.cluster.held.set()

    async def test_fetches_that_nobody_answers_are_told(
        self, make: MakeRig, clock: Iterator[Callable[[float], None]]
    ) -> None:
        """H3, H30: an answer without records counts as one, silence does not."""
        forward = next(clock)
        rig = make()
        await rig.join(FIRST)
        forward(61)
        assert rig.poller.not_ready() == ["operations/0: no answer to fetches for 61 s"]

        rig.consumer.answered_ms[FIRST] = 1000 * (1_700_000_000 + 60)
        assert rig.poller.not_ready() == []

    async def test_a_partition_that_starves_is_told_once_it_has_missed_permits_for_a_minute(
        self, make: MakeRig, clock: Iterator[Callable[[float], None]]
    ) -> None:
        """Contract 4 and 8: 60 s with lag and without permits; time with nothing to read does not count."""
        forward = next(clock)
        rig = make(limit=1, window_exhausted="pause")
        for partition in (FIRST, SECOND):
            rig.consumer.answered_ms[partition] = 1000 * 1_800_000_000
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST, SECOND)
        await rig.opened(FIRST, SECOND)
        starved = next(state["partition"] for state in rig.poller.snapshot() if state["window"] == 0)
        await until(lambda: rig.state(TopicPartition("operations", starved))["lag"] == 0)
        forward(3600)
        assert rig.poller.not_ready() == []

        rig.consumer.write("operations", starved, *inserts(0, 1))
        await until(lambda: rig.state(TopicPartition("operations", starved))["lag"] == 1)
        assert rig.poller.not_ready() == [], "it has missed nothing before"
        forward(59)
        assert rig.poller.not_ready() == []
        forward(2)
        assert rig.poller.not_ready() == [f"operations/{starved}: no permits for 61 s"]

    async def test_log_ends_are_asked_for_where_no_fetch_tells_them(self, make: MakeRig) -> None:
        """Contract 8: the lag of a partition without a window is known."""
        rig = make(limit=1, window_exhausted="pause")
        rig.consumer.end_offsets_error = KafkaConnectionError("gone")
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST, SECOND)
        await rig.opened(FIRST, SECOND)
        starved = next(state["partition"] for state in rig.poller.snapshot() if state["window"] == 0)
        rig.consumer.write("operations", starved, *inserts(0, 3))
        await rig.polled_again()
        assert rig.state(TopicPartition("operations", starved))["high_watermark"] is None

        rig.consumer.end_offsets_error = None
        await until(lambda: rig.state(TopicPartition("operations", starved))["high_watermark"] == 3)

    async def test_shared_reasons_stand_at_every_partition(self, make: MakeRig) -> None:
        """Contract 8, `paused_for`."""
        rig = make(output_stuck=lambda: True, storage_blocked=lambda: True)
        await rig.join(FIRST, SECOND)

        assert [state["paused_for"] for state in rig.poller.snapshot()] == [["storage_unavailable", "output"]] * 2


# ---------------------------------------------------------------------------------------------------- the watchdog


STALL = Suspicion("stall", "operations/0 has not moved", ("operations", 0))
POLL = Suspicion("poll", "the poll loop has not come round")
METADATA = Suspicion("metadata", "the client has not learned where the brokers are")


class TestObservation:
    """What the watchdog is shown."""

    async def test_what_moves_is_seen_moving(self, make: MakeRig) -> None:
        """Rule 4: rounds of the loop, metadata, and where each partition is."""
        rig = make()
        await rig.join(FIRST)
        before = rig.poller.observation()

        rig.consumer._client.cluster._last_successful_refresh_ms += 1
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.answered(0)
        read = rig.poller.observation()
        rig.place.responses.acknowledge()
        finished = rig.poller.observation()
        await rig.consumer.rebalance(FIRST)
        await rig.opened(FIRST)
        again = rig.poller.observation()

        places = [seen.partitions[0].progress for seen in (before, read, finished, again)]
        assert len(set(places)) == 4
        assert read.polls > before.polls
        assert read.metadata != before.metadata
        assert again.epoch == before.epoch + 1
        assert (before.rebalancing, before.dead) == (False, None)

    async def test_a_rebalance_is_one_until_the_group_has_told(self, make: MakeRig) -> None:
        """Hazard H5: what is ours is prepared then, which is no longer the group's affair."""
        rig = make()
        await rig.join(FIRST)
        rig.cluster.held = asyncio.Event()
        seen = []

        await rig.consumer.revoke()
        seen.append(rig.poller.observation())
        await rig.consumer.assign(FIRST)
        seen.append(rig.poller.observation())
        rig.cluster.held.set()
        await rig.opened(FIRST)

        assert [one.rebalancing for one in seen] == [True, False]

    async def test_a_dead_task_is_named(self, make: MakeRig) -> None:
        """Hazard H3, also while a poll hangs that would have looked itself."""
        rig = make()
        await rig.join(FIRST)
        await rig.consumer.revoke()
        await rig.polled_again(0)

        rig.consumer.dead("_fetch_task")

        assert "_fetch_task" in str(rig.poller.observation().dead)
        rig.consumer._fetcher._fetch_task = asyncio.get_running_loop().create_future()
        await rig.consumer.assign(FIRST)

    async def test_why_a_partition_stands_is_told(self, make: MakeRig) -> None:
        """Its own reasons, those of all, the age of its oldest operation, and what it holds."""
        rig = make(GatedStorage("object-0"), output_stuck=lambda: True)
        await rig.join(FIRST)
        (idle,) = rig.poller.observation().partitions
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await until(lambda: rig.state()["in_flight"] == 1)

        (busy,) = rig.poller.observation().partitions

        assert (idle.oldest_seconds, idle.holds_bytes, idle.holds_permits) == (None, False, True)
        assert busy.oldest_seconds is not None
        assert (busy.oldest_seconds >= 0, busy.holds_bytes, busy.holds_permits) == (True, True, True)
        assert list(busy.reasons) == ["output"]
        assert (idle.lag, busy.lag) == (0, 1)

    async def test_a_partition_that_waits_for_its_older_run_shows_its_age(self, make: MakeRig) -> None:
        """Contract 3: as long as the older run can still end, that is the reason."""
        rig = make(GatedStorage("object-0"), drain_timeout_seconds=0.01)
        await rig.join(FIRST)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await until(lambda: rig.state()["in_flight"] == 1)
        await rig.consumer.rebalance(FIRST)
        await until(lambda: bool(rig.poller.snapshot()))

        (waiting,) = rig.poller.observation().partitions

        assert waiting.lag is None
        assert waiting.oldest_seconds is not None
        assert waiting.holds_permits

    async def test_what_cannot_or_may_not_be_read_is_a_reason(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A restart would meet the same batch, and the same authorisation."""
        monkeypatch.setattr(poller_module, "UNREADABLE_SECONDS", LONG_SECONDS)
        rig = make()
        await rig.join(FIRST, SECOND)
        rig.consumer.damaged.add(FIRST)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await until(lambda: any("cannot be read" in reason for reason in rig.poller.not_ready()))
        damaged = {one.partition: list(one.reasons) for one in rig.poller.observation().partitions}
        rig.consumer.poll_always_fails = TopicAuthorizationFailedError("operations")
        await until(lambda: any("polling fails" in reason for reason in rig.poller.not_ready()))
        refused_too = {one.partition: list(one.reasons) for one in rig.poller.observation().partitions}
        rig.consumer.poll_always_fails = None

        assert damaged == {0: ["unreadable"], 1: []}
        assert refused_too == {0: ["refused", "unreadable"], 1: ["refused"]}


class TestConfirming:
    """A suspicion is held against the brokers."""

    async def test_a_dead_task_needs_no_asking(self, make: MakeRig) -> None:
        """It never comes to life again."""
        rig = make()
        await rig.join(FIRST)
        asked = rig.cluster.asked

        assert await rig.poller.confirms(Suspicion("client", "dead"))
        assert rig.cluster.asked == asked

    @pytest.mark.parametrize("suspicion", [STALL, POLL, METADATA], ids=lambda suspicion: suspicion.kind)
    async def test_brokers_that_do_not_answer_excuse_everything_else(
        self, make: MakeRig, suspicion: Suspicion
    ) -> None:
        """Contract 6: an unreachable broker is no exit."""
        rig = make()
        await rig.join(FIRST)
        rig.consumer.paused.add(FIRST)  # by nobody: what is written now is not delivered
        rig.consumer.write(*FIRST, *inserts(0, 1))
        assert await rig.poller.confirms(suspicion)

        rig.cluster.failures.append(ClusterUnavailable("gone"))

        assert not await rig.poller.confirms(suspicion)

    async def test_a_group_that_rebalances_excuses_a_poll_that_waits_for_it(self, make: MakeRig) -> None:
        """Hazard H5: another member holds it up; that says nothing of metadata."""
        rig = make()
        await rig.join(FIRST)
        rig.cluster.group_state = "PreparingRebalance"

        assert not await rig.poller.confirms(POLL)
        assert await rig.poller.confirms(METADATA)

    async def test_a_stall_is_one_where_there_is_something_to_read(self, make: MakeRig) -> None:
        """The brokers' own answer counts, not what the client last heard."""
        rig = make()
        await rig.join(FIRST)
        assert not await rig.poller.confirms(STALL)
        rig.consumer.paused.add(FIRST)

        rig.consumer.write(*FIRST, *inserts(0, 1))

        assert await rig.poller.confirms(STALL)

    async def test_what_lies_behind_an_open_transaction_is_not_to_be_read(self, make: MakeRig) -> None:
        """A producer may keep one open for many minutes; `read_committed` waits for its end."""
        rig = make()
        rig.consumer.write(*FIRST, *inserts(0, 3))
        rig.place.responses.acknowledge_always()
        await rig.join(FIRST)
        await until(lambda: rig.state()["lowest_unfinished"] == 3)
        rig.cluster.open_transactions[FIRST] = 3
        rig.consumer.paused.add(FIRST)
        rig.consumer.write(*FIRST, *inserts(3, 2))

        assert not await rig.poller.confirms(STALL)

        rig.cluster.open_transactions[FIRST] = 5
        assert await rig.poller.confirms(STALL)

    async def test_records_that_were_fetched_and_go_nowhere_are_a_stall(self, make: MakeRig) -> None:
        """Everything is read, and not answered: that is ours."""
        rig = make()
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.join(FIRST)
        await rig.answered(0)

        assert await rig.poller.confirms(STALL)

    async def test_a_partition_that_is_not_opened_though_its_start_can_be_asked_for_is_a_stall(
        self, make: MakeRig
    ) -> None:
        """Whether there is something to read is not known then."""
        rig = make(GatedStorage("object-0"), drain_timeout_seconds=0.01)
        await rig.join(FIRST)
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await until(lambda: rig.state()["in_flight"] == 1)
        await rig.consumer.rebalance(FIRST)
        await until(lambda: bool(rig.poller.snapshot()))
        rig.cluster.open_transactions[FIRST] = 0

        assert await rig.poller.confirms(STALL)

    async def test_a_partition_that_is_gone_stalls_nobody(self, make: MakeRig) -> None:
        """Revoked while the brokers were asked."""
        rig = make()
        await rig.join(SECOND)

        assert not await rig.poller.confirms(STALL)


# ---------------------------------------------------------------------------------------------------- exactly-once


class WriterDouble:
    """A partition's transactions: starts when told, and writes down what it is asked."""

    def __init__(self, partition: TopicPartition, events: list[str]) -> None:
        self.partition = partition
        self.events = events
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.stuck = False
        self.lane = CommandedLane()
        self.options: dict[str, Any] = {}

    async def start(self) -> None:
        await self.may_start.wait()
        self.events.append(f"start {self.partition.partition}")

    def begin(self, _source: object) -> None:
        self.events.append(f"begin {self.partition.partition}")

    def commit_offset(self) -> None:
        self.events.append(f"commit {self.partition.partition}")

    async def stop(self) -> None:
        self.events.append(f"stop {self.partition.partition}")
        self.lane.waiting.clear()


class TransactionsDouble:
    """Makes a writer for each owned partition."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.writers: dict[TopicPartition, WriterDouble] = {}
        self.held = False

    def writer(self, partition: TopicPartition, **options: Any) -> WriterDouble:
        made = self.writers[partition] = WriterDouble(partition, self.events)
        made.options = options
        if self.held:
            made.may_start.clear()
        return made

    def lanes(self, writer: WriterDouble, _partition: int) -> tuple[CommandedLane, None]:
        return writer.lane, None


class TestExactlyOnce:
    """Where the offsets go with the responses."""

    async def test_who_is_expelled_while_its_producers_start_reads_and_writes_nothing(self, make: MakeRig) -> None:
        """I2: they may have fenced who owns the partitions now; the next assignment begins anew."""
        rig = make(transactions=TransactionsDouble())
        rig.cluster.members = frozenset({"another"})
        rig.consumer.write(*FIRST, *inserts(0, 1))
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST)
        await until(lambda: rig.cluster.asked == 1)
        await settled()
        assert (rig.state()["position"], rig.poller.not_ready()) == (None, ["rebalancing"])

        rig.cluster.members = frozenset({""})
        await rig.consumer.rebalance(FIRST)
        await rig.opened(FIRST)

    async def test_membership_is_asked_for_until_there_is_an_answer(self, make: MakeRig) -> None:
        rig = make(transactions=TransactionsDouble())
        rig.cluster.failures.append(ClusterUnavailable("gone"))
        await rig.join(FIRST)

        assert (rig.poller.assigned, list(rig.cluster.failures)) == (1, [])

    async def test_the_former_owner_is_fenced_before_the_committed_offset_is_read(self, make: MakeRig) -> None:
        """H22: its open transaction would else move the offset after it has been read, and records would run twice."""
        transactions = TransactionsDouble()
        transactions.held = True
        rig = make(transactions=transactions)
        rig.consumer.committed[FIRST] = OffsetAndMetadata(1, "")
        rig.consumer.write(*FIRST, *inserts(0, 4))
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST)
        await until(lambda: FIRST in transactions.writers)
        await settled()
        assert rig.cluster.asked == 0

        rig.consumer.committed[FIRST] = OffsetAndMetadata(3, "")  # what was open has been committed meanwhile
        transactions.writers[FIRST].may_start.set()
        await rig.opened(FIRST)
        lane = transactions.writers[FIRST].lane
        await until(lambda: bool(lane.appended))

        assert transactions.events == ["start 0", "begin 0"]
        assert lane.tokens == [3]

    async def test_no_offset_is_committed_but_by_the_transactions(self, make: MakeRig) -> None:
        """H20, H21: a commit beside them could take one back, or go ahead of its responses."""
        transactions = TransactionsDouble()
        rig = make(transactions=transactions, commit_policy=AT_ONCE)
        rig.consumer.write(*FIRST, *inserts(0, 2))
        await rig.join(FIRST)
        lane = transactions.writers[FIRST].lane
        await until(lambda: len(lane.appended) == 2)
        lane.acknowledge()
        await until(lambda: "commit 0" in transactions.events)
        await rig.consumer.revoke()

        assert rig.consumer.commits == []
        assert transactions.events[-1] == "stop 0"

    async def test_a_producer_that_cannot_start_holds_up_no_other_partition(self, make: MakeRig) -> None:
        """Its output partition may be without leader for long."""
        transactions = TransactionsDouble()
        transactions.held = True
        rig = make(transactions=transactions)
        rig.consumer.write(*SECOND, *inserts(0, 2))
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST, SECOND)
        await until(lambda: SECOND in transactions.writers)

        transactions.writers[SECOND].may_start.set()
        await until(lambda: len(transactions.writers[SECOND].lane.appended) == 2)
        assert rig.state(FIRST)["position"] is None
        transactions.writers[FIRST].may_start.set()
        await rig.opened(FIRST)

        begun = [event for event in transactions.events if not event.startswith("commit")]
        assert begun == ["start 1", "begin 1", "start 0", "begin 0"]

    async def test_whose_producer_starts_later_begins_as_configured_too(self, make: MakeRig) -> None:
        """Contract 6: its topic has commits by then, of this very start."""
        transactions = TransactionsDouble()
        transactions.held = True
        rig = make(transactions=transactions, start="latest")
        rig.consumer.write(*FIRST, *inserts(0, 4))
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST, SECOND)
        await until(lambda: SECOND in transactions.writers)
        transactions.writers[SECOND].may_start.set()
        await rig.opened(SECOND)
        rig.consumer.committed[SECOND] = OffsetAndMetadata(0, "")

        transactions.writers[FIRST].may_start.set()
        await rig.opened(FIRST)

        assert rig.state(FIRST)["position"] == 4

    async def test_who_is_expelled_fences_nobody_any_more(self, make: MakeRig) -> None:
        """I2: producers that have not started by then would fence the rightful owners."""
        transactions = TransactionsDouble()
        transactions.held = True
        rig = make(transactions=transactions)
        rig.cluster.members = frozenset({"another"})
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST, SECOND)
        await until(lambda: SECOND in transactions.writers)
        transactions.writers[SECOND].may_start.set()
        await until(lambda: rig.poller._prepare_task is not None and rig.poller._prepare_task.done())

        transactions.writers[FIRST].may_start.set()
        await settled()

        assert transactions.events == ["start 1"]

    async def test_a_writer_that_is_stuck_shows(self, make: MakeRig) -> None:
        """Contract 8."""
        transactions = TransactionsDouble()
        rig = make(transactions=transactions)
        await rig.join(FIRST, SECOND)

        transactions.writers[FIRST].stuck = True

        assert rig.state(FIRST)["paused_for"] == ["output"]
        assert rig.state(SECOND)["paused_for"] == []
        assert rig.poller.not_ready() == ["operations/0: responses are not being acknowledged"]

    async def test_what_does_not_open_shows_while_it_is_not_known_whether_we_are_a_member(
        self, make: MakeRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 8: as where no producer can start."""
        monkeypatch.setattr(poller_module, "STARVED_SECONDS", 1e-9)
        transactions = TransactionsDouble()
        transactions.held = True
        rig = make(transactions=transactions)
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST)
        await until(lambda: FIRST in rig.poller._assignments)

        assert rig.poller.not_ready() == ["rebalancing", "operations/0: not open for 0 s"]

    async def test_a_partition_that_turns_out_to_be_lost_is_not_fetched(self, make: MakeRig) -> None:
        """Its records would be thrown away, as many as come until the client hears of it, too."""
        transactions = TransactionsDouble()
        rig = make(transactions=transactions)
        await rig.join(FIRST)

        rig.poller._assignments[FIRST].lose()
        rig.consumer.write(*FIRST, *inserts(0, 1))

        await until(lambda: FIRST in rig.consumer.paused)

    async def test_a_member_that_the_group_does_not_know_is_none(self, make: MakeRig) -> None:
        """H21: a member that was expelled while it was frozen would fence the rightful owner."""
        transactions = TransactionsDouble()
        rig = make(transactions=transactions)
        await rig.join(FIRST)
        is_member = transactions.writers[FIRST].options["is_member"]
        rig.consumer.member_id = "ours"

        rig.cluster.members = frozenset({"ours", "another"})
        assert await is_member() is True
        rig.cluster.members = frozenset({"another"})
        assert await is_member() is False

    async def test_partitions_wait_until_their_offset_maps_can_be_judged(self, make: MakeRig) -> None:
        """I2: without its map, what is finished above the offset would be answered twice."""
        transactions = TransactionsDouble()
        rig = make(transactions=transactions)
        rig.consumer.committed[FIRST] = OffsetAndMetadata(1, encode(1, [(2, 3)], "cluster"))
        rig.consumer.write(*FIRST, *inserts(0, 5))
        rig.cluster.ends_unknown = True
        await rig.poller.start()
        await rig.consumer.rebalance(FIRST)
        await until(lambda: rig.cluster.asked > 3)
        assert "begin 0" not in transactions.events

        rig.cluster.ends_unknown = False
        lane = transactions.writers[FIRST].lane
        await until(lambda: len(lane.appended) == 2)
        assert lane.tokens == [1, 4]
        assert not rig.place.counts.offset_maps_dropped

    async def test_what_the_group_has_committed_can_be_asked(self, make: MakeRig) -> None:
        """H23: after a commit without answer, offset and map tell whether it took effect."""
        transactions = TransactionsDouble()
        rig = make(transactions=transactions)
        await rig.join(FIRST)
        committed = transactions.writers[FIRST].options["committed"]

        assert await committed() is None
        rig.consumer.committed[FIRST] = OffsetAndMetadata(7, "map")
        assert await committed() == (7, "map")
