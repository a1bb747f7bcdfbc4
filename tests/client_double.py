"""A double of aiokafka's consumer, and of the client for questions, at the boundary where the poller uses them.

What it does alike was observed on aiokafka 0.14 (``tests/e2e/test_hazards.py`` holds the real one to it): records come
from the position on, of the partitions asked for that are assigned and not paused; taking them moves the position, in
the step of the event loop in which they are returned, and also where the poll then raises; a rebalance has polls wait,
calls the listener, and ends with all partitions resumed and without position.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import SimpleNamespace, TracebackType
from typing import Any, Self
from uuid import UUID

from aiokafka import ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import CorruptRecordException, IllegalStateError, OffsetOutOfRangeError
from aiokafka.structs import OffsetAndMetadata

from consumer.kafka.topics import EARLIEST, LATEST, ClusterUnavailable, Committed, GroupState, Partition, Topic
from lanes import Fetched

CommitAnswer = Exception | Callable[[], Awaitable[None]] | None
"""What becomes of a commit: it is raised, or awaited before the commit takes effect, or nothing special."""

POLLS_KEPT = 50
"""How many polls a double remembers the partitions of."""


class ConsumerDouble:
    """The consumer of one member of one group."""

    def __init__(self) -> None:
        self.log: dict[TopicPartition, list[Fetched]] = {}
        """What lies in each partition."""
        self.first: dict[TopicPartition, int] = {}
        """First offset that still exists, where it is not 0."""
        self._ends: dict[TopicPartition, int] = {}
        self.positions: dict[TopicPartition, int] = {}
        self.paused: set[TopicPartition] = set()
        self.committed: dict[TopicPartition, OffsetAndMetadata] = {}
        """What the group has committed."""
        self.commits: list[dict[TopicPartition, OffsetAndMetadata]] = []
        """Every commit that was asked for, in order."""
        self.commit_answers: deque[CommitAnswer] = deque()
        """What becomes of the next commits; of those after them, nothing special."""
        self.poll_errors: deque[Exception] = deque()
        """Raised by the next polls that take records, after they have taken them."""
        self.poll_always_fails: Exception | None = None
        """Raised by every poll for something."""
        self.damaged: set[TopicPartition] = set()
        """Partitions at whose records a poll breaks off, having taken those of others."""
        self.polls_cancelled = self.polls_broken_off = self.polls_out_of_range = 0
        self.start_errors: deque[Exception] = deque()
        """Raised by the next starts."""
        self.stop_answer: BaseException | Callable[[], Awaitable[None]] | None = None
        """Raised by stopping, or awaited by it."""
        self.calls: list[str] = []
        """The order of what was asked of it: seek, pause, resume, commit, stop."""
        self.polls = 0
        self.polled: list[tuple[TopicPartition, ...]] = []
        """The partitions asked for in the last polls."""
        self.end_offsets_error: Exception | None = None
        self.answered_ms: dict[TopicPartition, int] = {}
        self.topics: dict[str, set[int]] = {}
        self.started = self.stopped = False
        self._assigned: set[TopicPartition] = set()
        self._listener: ConsumerRebalanceListener | None = None
        self._changed = asyncio.Event()
        self._joined = asyncio.Event()
        self._joined.set()
        forever: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._fetch_max_wait_ms = 500
        self._fetcher = SimpleNamespace(
            _fetch_task=forever,
            _records={},
            _max_partition_fetch_bytes=1000,
            _fetch_max_bytes=5000,
            _fetch_max_wait_ms=500,
        )
        self._coordinator = SimpleNamespace(_coordination_task=forever, generation=-1, member_id="")
        self.brokers = {0}
        """Those that the metadata have told."""
        cluster = SimpleNamespace(_last_successful_refresh_ms=0, brokers=lambda: self.brokers)
        self._client = SimpleNamespace(_sync_task=forever, cluster=cluster)

    # ------------------------------------------------------------------------------------------ for the test

    def write(self, topic: str, partition: int, *records: Fetched) -> None:
        """Add records to a partition."""
        self.log.setdefault(TopicPartition(topic, partition), []).extend(records)
        self._changed.set()

    def dead(self, name: str) -> None:
        """Have one of the client's own tasks end."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ended.set_exception(ValueError("token"))
        ended.exception()
        for owner in (self._fetcher, self._coordinator, self._client):
            if hasattr(owner, name):
                setattr(owner, name, ended)

    async def rebalance(self, *assigned: TopicPartition) -> None:
        """Take part in a rebalance that ends with these partitions."""
        await self.revoke()
        await self.assign(*assigned)

    async def revoke(self) -> None:
        """Begin a rebalance: polls wait from now on until it ends (H5)."""
        assert self._listener is not None
        self._joined.clear()
        await self._listener.on_partitions_revoked(set(self._assigned))

    async def assign(self, *assigned: TopicPartition) -> None:
        """End a rebalance."""
        assert self._listener is not None
        self._coordinator.generation += 1 if self._coordinator.generation >= 0 else 2
        self._assigned = set(assigned)
        self.paused.clear()
        self.positions.clear()
        self._joined.set()
        await self._listener.on_partitions_assigned(set(assigned))

    @property
    def member_id(self) -> str:
        """Who the group says we are."""
        member_id: str = self._coordinator.member_id
        return member_id

    @member_id.setter
    def member_id(self, member_id: str) -> None:
        self._coordinator.member_id = member_id

    def expel(self) -> None:
        """The client hears that it is no member any more."""
        self._coordinator.generation = -1

    def cross(self, partition: TopicPartition, position: int) -> None:
        """Let the log go on up to *position* with offsets that hold no record, and the client get over them."""
        self._ends[partition] = self.positions[partition] = position

    def end(self, partition: TopicPartition) -> int:
        """The offset after the last record, or after what lies behind it."""
        records = self.log.get(partition, [])
        end = records[-1].offset + 1 if records else self.first.get(partition, 0)
        return max(end, self._ends.get(partition, 0))

    # ------------------------------------------------------------------------------------------ the client's own

    async def start(self) -> None:
        if self.start_errors:
            raise self.start_errors.popleft()
        self.started = True

    async def stop(self) -> None:
        self.calls.append("stop")
        if isinstance(self.stop_answer, BaseException):
            raise self.stop_answer
        if self.stop_answer is not None:
            await self.stop_answer()
        self.stopped = True

    def subscribe(self, topics: Iterable[str], listener: ConsumerRebalanceListener) -> None:
        for topic in topics:
            self.topics.setdefault(topic, {0})
        self._listener = listener

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return self.topics.get(topic)

    def assignment(self) -> set[TopicPartition]:
        return set(self._assigned)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._own(partition)
        self.calls.append(f"seek {partition.partition} {offset}")
        self.positions[partition] = offset
        self._fetcher._records.pop(partition, None)
        self._changed.set()

    def pause(self, *partitions: TopicPartition) -> None:
        for partition in partitions:
            self._own(partition)
            self.calls.append(f"pause {partition.partition}")
            self.paused.add(partition)

    def resume(self, *partitions: TopicPartition) -> None:
        for partition in partitions:
            self._own(partition)
            self.calls.append(f"resume {partition.partition}")
            self.paused.discard(partition)

    async def position(self, partition: TopicPartition) -> int:
        self._own(partition)
        return self.positions[partition]

    def highwater(self, partition: TopicPartition) -> int | None:
        self._own(partition)
        return self.end(partition)

    def last_poll_timestamp(self, partition: TopicPartition) -> int | None:
        return self.answered_ms.get(partition)

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        if self.end_offsets_error is not None:
            error = self.end_offsets_error
            raise error
        return {partition: self.end(partition) for partition in partitions}

    async def commit(self, offsets: Mapping[TopicPartition, OffsetAndMetadata]) -> None:
        self.calls.append("commit")
        self.commits.append(dict(offsets))
        answer = self.commit_answers.popleft() if self.commit_answers else None
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            await answer()
        self.committed.update(offsets)

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> dict[TopicPartition, list[Fetched]]:
        self.polls += 1
        self.polled.append(partitions)
        del self.polled[:-POLLS_KEPT]
        try:
            await asyncio.sleep(0)
            await self._joined.wait()
            taken = self._take(partitions, max_records)
            if not taken and timeout_ms:
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(timeout_ms / 1000):
                        await self._changed.wait()
                taken = self._take(partitions, max_records)
        except asyncio.CancelledError:
            self.polls_cancelled += 1
            raise
        if self.poll_always_fails is not None and timeout_ms:
            raise self.poll_always_fails
        if taken and self.poll_errors:
            raise self.poll_errors.popleft()
        for partition in self.damaged & taken.keys():
            self._fetcher._records[partition] = SimpleNamespace(
                _partition_records=SimpleNamespace(_records_iterator=_ended_generator())
            )
            self.polls_broken_off += 1
            raise CorruptRecordException
        return taken

    def _take(
        self, partitions: tuple[TopicPartition, ...], max_records: int | None
    ) -> dict[TopicPartition, list[Fetched]]:
        taken: dict[TopicPartition, list[Fetched]] = {}
        for partition in partitions:
            if partition not in self._assigned or partition in self.paused or partition not in self.positions:
                continue
            position = self.positions[partition]
            if not self.first.get(partition, 0) <= position <= self.end(partition):
                self.polls_out_of_range += 1
                raise OffsetOutOfRangeError({partition: position})
            records = [record for record in self.log.get(partition, []) if record.offset >= position][:max_records]
            if records:
                taken[partition] = records
                self.positions[partition] = records[-1].offset + 1
        return taken

    def _own(self, partition: TopicPartition) -> None:
        if partition not in self._assigned:
            raise IllegalStateError(f"Partition {partition} is not assigned")


def _ended_generator() -> Iterator[None]:
    """A generator that has come to its end, as one has that has raised."""
    ended = (None for _ in ())
    next(ended, None)
    return ended


class ClusterDouble:
    """The client for questions, answering from the same log and commits."""

    def __init__(self, consumer: ConsumerDouble) -> None:
        self._consumer = consumer
        self.failures: deque[Exception] = deque()
        """Raised by the next questions."""
        self.held: asyncio.Event | None = None
        """Questions wait until this is set."""
        self.asked = 0
        self.ends_unknown = False
        """Ends of logs are not told: the leader does not answer."""
        self.leaderless: set[TopicPartition] = set()
        self.ids: dict[str, UUID] = {}
        """Of topics; by default brokers tell none."""
        self.members: frozenset[str] = frozenset({""})
        """Who is in the group."""
        self.group_state = "Stable"
        self.open_transactions: dict[TopicPartition, int] = {}
        """Where the oldest open transaction of a partition begins."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""

    async def committed(self, group: str, partitions: Iterable[Partition] | None = None) -> dict[Partition, Committed]:
        await self._question()
        assert group == "group"
        return {
            partition: Committed(commit.offset, commit.metadata)
            for partition, commit in self._consumer.committed.items()
            if partitions is None or partition in partitions
        }

    async def topics(self, names: Iterable[str]) -> dict[str, Topic | None]:
        await self._question()
        return {
            name: Topic(name, {number: -1 if (name, number) in self.leaderless else 0 for number in range(100)})
            for name in names
        }

    async def offsets(
        self, partitions: Iterable[Partition], at: int, *, committed_only: bool = False
    ) -> dict[Any, int]:
        await self._question()
        assert not self.leaderless.intersection(partitions), "asked of nobody"
        if at == LATEST and self.ends_unknown:
            raise ClusterUnavailable("no leader")
        asked = [TopicPartition(*partition) for partition in partitions]
        if committed_only and self.open_transactions:
            return {one: self.open_transactions[one] for one in asked}
        return {one: self._consumer.first.get(one, 0) if at == EARLIEST else self._consumer.end(one) for one in asked}

    async def topic_ids(self, names: Iterable[str]) -> dict[str, UUID]:
        await self._question()
        return {name: self.ids[name] for name in names if name in self.ids}

    async def group(self, group: str) -> GroupState:
        await self._question()
        assert group == "group"
        return GroupState(self.group_state, len(self.members), self.members)

    async def _question(self) -> None:
        self.asked += 1
        if self.held is not None:
            await self.held.wait()
        if self.failures:
            raise self.failures.popleft()
