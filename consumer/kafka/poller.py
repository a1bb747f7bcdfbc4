"""The only reader of aiokafka's consumer: poll, pause and resume, rebalance, commit.

Tasks, each with one job, so that none can hold up another:

* *poll* asks for records of the partitions that want some and hands them to their assignments. It is never cancelled
  while the consumer lives on (hazard H4) and is not a clock (H5).
* *prepare*, one for each generation: start offsets, windows in sorted order, gates. Spawned by the rebalance callback,
  which itself returns at once, since no heartbeat is sent while it runs (H12).
* *commit* sends the watermarks when the schedule says so, one commit at a time, each with a deadline (H10, H17).
* *log ends* asks how far the partitions go that are not being fetched, as only fetches tell that by themselves.

A rebalance, told by aiokafka's listener:

1. Revoked: gates close; the watermarks are committed, which tells whether the partitions are still ours (a commit
   refused for our membership means *lost*: nothing is drained, H16b, H16c); what was started is finished within the
   drain deadline; the watermarks are committed again; the epoch ends. Reservations go back with their last operation.
2. Assigned: fetching is paused, at a position of no meaning, or the client would look for its own; the new epoch's
   preparation is spawned.
3. Prepared: windows are reserved, committed offsets read, a start is chosen where there is none and committed at once,
   each partition is sought to its start and its gate opened. Each for itself: a partition without leader, one whose
   transactional producer cannot start yet, or whose older run is not over in this process (``recovering``, so that no
   record runs twice at the same time here), holds up no other.

Any exception out of ``getmany`` means that positions are no longer what was handed out (H1): every open partition is
sought to its own cursor again. Where what the client has fetched of a partition cannot be read (a damaged batch), that
partition is set aside for a while, or it would take the others' records with it again and again. A record that a broker
does not give whole, because it is larger than a fetch may be, is fetched with a higher limit, and answered like any
other that is too large; above the byte budget its partition is set aside. The client's
background tasks can die while polling goes on finding nothing (H3, H17c); poll looks at them each time round and ends
the process with *fatal*, as a restart is right then. A poll that itself hangs, and whatever else stands still for no
reason, is for :mod:`consumer.watchdog` to judge: it is shown :meth:`Poller.observation`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any, Literal, TypeAlias

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    InvalidCommitOffsetSizeError,
    KafkaError,
    OffsetMetadataTooLargeError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    RecordTooLargeError,
)
from aiokafka.structs import OffsetAndMetadata

from consumer.assignment import Assignment, Lane, Pipeline
from consumer.budget import RESUME_SHARE
from consumer.commits import CommitPolicy, CommitSchedule
from consumer.errors import AtCapacity, ConfigError
from consumer.executor import StreamExecutor
from consumer.kafka.clients import connect_client, see_that_the_cluster_is_known
from consumer.kafka.topics import (
    EARLIEST,
    LATEST,
    Cluster,
    ClusterRefusal,
    ClusterUnavailable,
    Committed,
    Partition,
)
from consumer.kafka.transactions import Transactions, TransactionWriter
from consumer.log import get_logger
from consumer.metrics import CommitOutcome, PartitionState, RebalanceOutcome
from consumer.offset_map import Run, SizeLimit, count, decode
from consumer.permits import WindowExhausted, WindowPolicy, plan_windows
from consumer.poison import PoisonLimitReached
from consumer.suspects import Note
from consumer.watchdog import Observation, PartitionSeen, Suspicion

Start: TypeAlias = Literal["earliest", "latest"]
OutOfRange: TypeAlias = Literal["pause", "earliest", "latest"]

POLL_MILLISECONDS = 200
"""Longest wait of one poll: how late a newly opened partition is asked for."""

POLL_RECORDS_MAX = 4_000
"""Records of one poll: parsing them blocks the loop for about 8 ms."""

COMMIT_TIMEOUT_SECONDS = 5.0
"""One commit, after which its outcome is unknown and the next one starts from the then current watermark. Twice this
and the drain deadline have to fit the rebalance time-out."""

NOTES_TIMEOUT_SECONDS = 2.0
"""Opening the notes of all partitions takes a tenth of a millisecond each on a disk that answers."""

START_TIMEOUT_SECONDS = 10.0
"""One attempt to connect."""

RETRY_BACKOFF_SECONDS = (0.25, 0.5, 1.0, 2.0, 5.0)
"""Waits after failures of the broker; the last one repeats."""

STARVED_SECONDS = 60.0
"""A partition with lag and no window for this long makes the service not ready (contract 8); so does one that cannot be
opened, and one whose fetches nobody answers."""

LOG_END_SECONDS = 5.0
"""How often the end of the log is asked for where no fetch tells it: one small request to each broker. Partitions
without a window are told apart by it, those with lag from those without."""

UNREADABLE_SECONDS = 5.0
"""How long a partition is set aside of which something cannot be read: each attempt has the others fetch again."""

BUSY_MILLISECONDS = 10
"""Longest wait of a poll, and of a fetch at the broker, while some partition has records. A partition that has enough
of them is left out of both, and is asked for again when a thousand are left (``BUFFER_RECORDS_RESUME``): two such waits
fit into the 20 ms that those take. A hundred fetches a second that bring nothing cost 3 % of a core."""

BUSY_SECONDS = 10.0
"""Where for so long no record has come and none was finished, those that wait are held up by something else."""

FETCH_BYTES_MAX = 2**31 - 1
"""Largest fetch limit that the protocol can express."""

POLL_FAILURES_MAX = 3
"""Polls that fail one after the other before the service counts as not ready; one alone is a rebalance or a hiccup."""

SHIELDED_COMMIT = "GroupCoordinator._do_commit_offsets"
"""The coroutine of aiokafka that goes on when a commit is cancelled; a test holds the installed release to it."""

NOT_YET = 0
"""Position of a partition that is not open, and so not fetched. For one without a position the client looks by itself:
where it finds none at two brokers, as the leader has moved meanwhile, it trips over the second finding (H3)."""

_NOWHERE = TopicPartition("-", 0)
"""Polled when no partition wants records: keeps the member alive (H16b) without draining any partition's buffer."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StartPoint:
    """Where reading begins in a partition."""

    offset: int
    committed: bool = False
    """True where the group has committed this offset; else it was chosen."""
    metadata: str = ""
    """What stands beside that commit."""
    finished: tuple[Run, ...] = ()
    """What is finished above it."""
    source: str | None = None
    """What offsets in it can be compared by over time: topic id and partition; None where topics have no ids."""


class ClientDead(Exception):
    """A background task of the Kafka client has ended: it will never deliver anything again."""


class Poller(ConsumerRebalanceListener):
    """Owns the consumer and the set of assignments.

    Args:
        pipeline: What all assignments share.
        topics: Input topics.
        group_id: The consumer group.
        make_consumer: Makes an unstarted consumer without subscription, in the group.
        ask_cluster: Makes an unopened client for questions.
        drain_timeout_seconds: Deadline of a drain on revocation.
        commit_policy: When to commit.
        start: Where to begin in a topic of which the group has committed nothing.
        out_of_range: What to do where a start offset no longer exists.
        window_policy: ``window.policy``.
        window_exhausted: ``window.exhausted``.
        output_stuck: Tells whether responses are not being acknowledged.
        storage_blocked: Tells whether storage counts as unavailable.
        fatal: Called once with the exception that makes a restart right.
        poison_stops: Whether a partition with too many poison records ends the service, or is only read no more.
        transactions: Exactly-once: responses and offsets in transactions; None = offsets are committed by schedule.
        committed_only: Whether input is read ``read_committed``, that is up to the oldest open transaction.
        make_assignment: Makes each partition's assignment.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        topics: Iterable[str],
        group_id: str,
        make_consumer: Callable[[], AIOKafkaConsumer],
        ask_cluster: Callable[[], Cluster],
        drain_timeout_seconds: float,
        commit_policy: CommitPolicy,
        start: Start,
        out_of_range: OutOfRange,
        window_policy: WindowPolicy,
        window_exhausted: WindowExhausted,
        output_stuck: Callable[[], bool],
        storage_blocked: Callable[[], bool],
        fatal: Callable[[BaseException], None],
        poison_stops: bool = False,
        transactions: Transactions | None = None,
        committed_only: bool = True,
        make_assignment: Callable[..., Assignment] = Assignment,
    ) -> None:
        self.rebalancing = True
        """True until the first assignment, and from each revocation to the next assignment."""
        self._pipeline = pipeline
        self._topics = sorted(topics)
        self._group_id = group_id
        self._make_consumer = make_consumer
        self._ask_cluster = ask_cluster
        self._drain_timeout = drain_timeout_seconds
        self._start_at = start
        self._out_of_range = out_of_range
        self._window_policy: WindowPolicy = window_policy
        self._window_exhausted: WindowExhausted = window_exhausted
        self._output_stuck = output_stuck
        self._storage_blocked = storage_blocked
        self._fatal = fatal
        self._poison_stops = poison_stops
        self._poison_limits: dict[TopicPartition, str] = {}
        """Partitions of which this process reads no more, and why; some may be assigned to other members by now."""
        self._transactions = transactions
        self._committed_only = committed_only
        self._make_assignment = make_assignment
        self._writers: dict[TopicPartition, TransactionWriter] = {}
        self._consumer: AIOKafkaConsumer | None = None
        self._epoch = 0
        self._stopping = False
        self._assignments: dict[TopicPartition, Assignment] = {}
        self._fetching: dict[TopicPartition, Assignment] = {}
        self._older_runs: dict[TopicPartition, StreamExecutor] = {}
        self._short_of_bytes = False
        self._moved_at = time.monotonic()
        """When records last came or were finished."""
        self._buffer_bytes_max = pipeline.budget.limit
        """Buffered bytes of one partition above which it is not fetched for: a partition that stands still must not
        hold the bytes that all of them need."""
        self._lost = False
        self._fresh: dict[str, frozenset[int]] = {}
        """Topics of which the group had committed nothing when it was first asked, and the partitions they had then."""
        self._generation = -1
        """Of the group, when the partitions were assigned."""
        self._assigned_at = time.monotonic()
        self._fetching_since: dict[TopicPartition, float] = {}
        self._unreadable: dict[TopicPartition, str] = {}
        """Set aside: what the client could not read."""
        self._poll_failures = 0
        """In a row."""
        self._poll_error = ""
        self._polls = 0
        """How often the poll loop has come round."""
        self._map_size = SizeLimit()
        self._releasing = asyncio.Lock()
        self._released_in_order = True
        """What the last release has returned."""
        self._committing = asyncio.Lock()
        self._schedule = CommitSchedule(commit_policy, time.monotonic())
        self._commit_due = asyncio.Event()
        self._opened = asyncio.Event()
        self._prepare_task: asyncio.Task[None] | None = None
        self._poll_task: asyncio.Task[None] | None = None
        self._commit_task: asyncio.Task[None] | None = None
        self._log_end_task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------------------ start and stop

    async def start(self) -> None:
        """Connect and join the group; goes on trying while the broker cannot be reached.

        Cancellation: nothing is left connected.
        """
        self._consumer = await _started(self._make_consumer)
        self._consumer.subscribe(self._topics, listener=self)
        self._poll_task = self._spawn(self._poll(), "poll")
        self._commit_task = self._spawn(self._commit_when_due(), "commit")
        self._log_end_task = self._spawn(self._ask_for_log_ends(), "log ends")

    async def stop(self, drain_timeout_seconds: float, stop_timeout_seconds: float) -> bool:
        """Drain, commit, leave the group.

        Order: polling first, since a poll blocked in a rebalance is not released by stopping the client (H6); then the
        drain and its commit, which the listener is not asked for on stop (H16h); then the client, which may hang with
        the broker gone and gets a deadline (H17).

        Returns:
            True where everything started was answered and committed.
        """
        self._stopping = True
        await _end(self._poll_task)
        await _end(self._commit_task)
        await _end(self._log_end_task)
        done = await self._release(drain_timeout_seconds)
        await _end(self._prepare_task)
        if self._consumer is not None:
            await _closed(self._consumer, stop_timeout_seconds)
        return done

    def _spawn(self, work: Awaitable[None], name: str) -> asyncio.Task[None]:
        """Start one of this poller's own tasks; one that fails ends the process."""
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        task.set_name(name)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fatal(error)

    # ------------------------------------------------------------------------------------------ poll

    async def _poll(self) -> None:
        consumer = self._client
        while True:
            self._check_client()
            self._polls += 1
            wanted = tuple(self._fetching)
            wait = self._wait_milliseconds() if wanted else 0
            try:
                fetched = await consumer.getmany(
                    *(wanted or (_NOWHERE,)), timeout_ms=wait, max_records=POLL_RECORDS_MAX
                )
            except OffsetOutOfRangeError as error:
                await self._reset(error.args[0])
            except RecordTooLargeError as error:
                self._fetch_more(error)
            except Exception as error:  # noqa: BLE001 - H1: whatever it was, positions are not to be trusted
                unreadable = self._unreadable_partition()
                self._seek_all()
                if unreadable is not None:
                    self._set_aside(unreadable, error)
                    continue
                self._poll_error = repr(error)
                log.warning("poll failed", error=self._poll_error, failures=self._poll_failures + 1)
                await asyncio.sleep(RETRY_BACKOFF_SECONDS[min(self._poll_failures, len(RETRY_BACKOFF_SECONDS) - 1)])
                self._poll_failures += 1
            else:
                self._poll_failures = 0
                self._hand_over(fetched)
                if not wanted:
                    await self._until_opened()

    def _wait_milliseconds(self) -> int:
        """Say how long a poll may wait, and tell the client how long a broker may hold a fetch that finds nothing.

        Neither can be called off for a partition that is to be asked for again: a poll waits for the partitions it was
        begun with, and the client has one fetch under way to each broker. While some partition has records, and is not
        held up, both are kept short, or it would wait for those that have none. Private names, held by a test.
        """
        moving = time.monotonic() - self._moved_at < BUSY_SECONDS
        busy = moving and any(one.buffered_bytes for one in self._assignments.values())
        usual = self._client._fetch_max_wait_ms  # noqa: SLF001 - as set for all fetches
        fetcher: Any = self._client._fetcher  # noqa: SLF001 - what a running client asks for is set nowhere else
        fetcher._fetch_max_wait_ms = min(BUSY_MILLISECONDS, usual) if busy else usual  # noqa: SLF001 - as above
        return BUSY_MILLISECONDS if busy else POLL_MILLISECONDS

    def _hand_over(self, fetched: Mapping[TopicPartition, list[Any]]) -> None:
        """Give records to their assignments; stop fetching where enough is buffered, in the same step of the loop."""
        if fetched:
            self._moved_at = time.monotonic()
        for partition, records in fetched.items():
            assignment = self._fetching.get(partition)
            if assignment is not None:
                assignment.receive(records)
                if not assignment.open or assignment.full or assignment.buffered_bytes >= self._buffer_bytes_max:
                    self._stop_fetching(partition)
        if self._pipeline.budget.fetching_stopped and not self._short_of_bytes:
            self._short_of_bytes = True
            for partition in list(self._fetching):
                self._stop_fetching(partition)

    async def _until_opened(self) -> None:
        self._opened.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_MILLISECONDS / 1000):
                await self._opened.wait()

    def _stop_fetching(self, partition: TopicPartition) -> None:
        assignment = self._fetching.pop(partition)
        assignment.fetching = False
        with suppress(IllegalStateError):
            self._client.pause(partition)

    def _refill(self, assignment: Assignment) -> None:
        """Fetch for *assignment* again, where it wants records and there are bytes to spare."""
        partition = TopicPartition(assignment.topic, assignment.partition)
        if (
            self._assignments.get(partition) is assignment
            and assignment.wants_records
            and not assignment.fetching
            and assignment.buffered_bytes <= self._buffer_bytes_max // 2
            and not assignment.out_of_range
            and partition not in self._unreadable
            and not self._short_of_bytes
        ):
            # No seek: what was prefetched before the pause is still there, as paused partitions are not asked for (H7).
            with suppress(IllegalStateError):
                self._client.resume(partition)
                assignment.fetching = True
                self._fetching_since[partition] = time.monotonic()
                self._fetching[partition] = assignment
                self._opened.set()

    def _poisoned(self, assignment: Assignment) -> None:
        """A partition has too many poison records: fetch no more of it, or end the service."""
        assert assignment.poison_limit is not None
        partition = TopicPartition(assignment.topic, assignment.partition)
        self._poison_limits[partition] = assignment.poison_limit
        if self._fetching.get(partition) is assignment:
            self._stop_fetching(partition)
        if self._poison_stops:
            name = f"{partition.topic}/{partition.partition}"
            self._fatal(PoisonLimitReached(f"{name}: {assignment.poison_limit}"))

    def _seek_all(self) -> None:
        """Put the client where reading has got to; also in what is fetched no more: an answer may have come since."""
        for partition, assignment in self._assignments.items():
            if assignment.begun and assignment.open:
                with suppress(IllegalStateError):
                    self._client.seek(partition, assignment.cursor)

    def _fetch_more(self, error: RecordTooLargeError) -> None:
        """A fetch brought less than one record, over which the client has moved (H2): go back, and allow twice as much.

        Brokers since 0.10.1 give one batch whole, whatever the limit is; what stands behind an address is not always
        one. Private names, held by a test.
        """
        self._seek_all()
        partition: TopicPartition = error.args[1]
        fetcher: Any = self._client._fetcher  # noqa: SLF001 - what a running client asks for is set nowhere else
        most = min(self._pipeline.budget.limit, FETCH_BYTES_MAX)
        limit = min(2 * fetcher._max_partition_fetch_bytes, most)  # noqa: SLF001 - as above
        if limit > fetcher._max_partition_fetch_bytes:  # noqa: SLF001 - as above
            log.warning("record larger than a fetch: fetching more at a time", **_named(partition), fetch_bytes=limit)
            fetcher._max_partition_fetch_bytes = limit  # noqa: SLF001 - as above
            fetcher._fetch_max_bytes = max(fetcher._fetch_max_bytes, limit)  # noqa: SLF001 - as above
        elif partition in self._fetching:
            self._set_aside(partition, error)

    def _unreadable_partition(self) -> TopicPartition | None:
        """Find the partition at whose records the last poll broke off; private names, held by a test."""
        fetcher: Any = self._client._fetcher  # noqa: SLF001 - told nowhere else
        for partition, result in fetcher._records.items():  # noqa: SLF001 - told nowhere else
            records = getattr(result, "_partition_records", None)
            reading = getattr(records, "_records_iterator", None)
            if reading is not None and reading.gi_frame is None:  # a generator that has raised
                return partition if partition in self._fetching else None
        return None

    def _set_aside(self, partition: TopicPartition, error: Exception) -> None:
        """Fetch a partition no more for a while, since something in it cannot be read."""
        assignment = self._fetching[partition]
        self._stop_fetching(partition)
        self._unreadable[partition] = repr(error)
        log.error(
            "partition cannot be read: trying again later",
            **_named(partition),
            offset=assignment.cursor,
            error=repr(error),
        )
        asyncio.get_running_loop().call_later(UNREADABLE_SECONDS, self._try_to_read, partition, assignment)

    def _try_to_read(self, partition: TopicPartition, assignment: Assignment) -> None:
        if self._assignments.get(partition) is assignment:
            self._unreadable.pop(partition, None)  # gone where the partition is being given up
            self._refill(assignment)

    async def _reset(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Start offsets that no longer exist: by configuration an alarm, or a jump that is said aloud."""
        self._seek_all()
        for partition, offset in offsets.items():
            assignment = self._assignments.get(partition)
            if assignment is None or not assignment.open:
                continue
            if self._out_of_range == "pause":
                assignment.out_of_range = True
                if partition in self._fetching:
                    self._stop_fetching(partition)
                log.error(
                    "offset out of range: partition paused; set input.out_of_range or reset the group's offsets",
                    **_named(partition),
                    offset=offset,
                )
                continue
            try:
                async with self._ask_cluster() as cluster:
                    at = EARLIEST if self._out_of_range == "earliest" else LATEST
                    position = (await cluster.offsets([partition], at))[partition]
            except (ClusterUnavailable, ClusterRefusal) as error:
                log.warning("log end unknown", **_named(partition), error=str(error))
                await asyncio.sleep(RETRY_BACKOFF_SECONDS[1])
                continue
            if self._assignments.get(partition) is not assignment or not assignment.open:
                continue
            if not assignment.jump(position):
                log.warning("log begins anew: work from the old one is finished first", **_named(partition))
                await asyncio.sleep(RETRY_BACKOFF_SECONDS[0])
                continue
            log.error(
                "offset out of range: reading goes on elsewhere", **_named(partition), offset=offset, position=position
            )
            with suppress(IllegalStateError):
                self._client.seek(partition, position)

    def _check_client(self) -> None:
        """See that the client's own tasks live (H3, H17c).

        Raises:
            ClientDead: one of them has ended.
        """
        ended = self._ended_task()
        if ended is not None:
            raise ClientDead(ended)

    def _ended_task(self) -> str | None:
        """Tell which of the client's own tasks has ended; private names, held by a test against the pinned version."""
        consumer = self._client
        for owner, name in (
            (consumer._fetcher, "_fetch_task"),  # noqa: SLF001
            (consumer._coordinator, "_coordination_task"),  # noqa: SLF001
            (consumer._client, "_sync_task"),  # noqa: SLF001
        ):
            task = getattr(owner, name)
            if task is not None and task.done():
                return f"the client's {name} has ended: {_why(task)}"
        return None

    # ------------------------------------------------------------------------------------------ rebalance

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Aiokafka's callback; it may take as long as the rebalance time-out allows."""
        self.rebalancing = True
        log.info("partitions revoked", epoch=self._epoch, partitions=len(revoked))
        try:
            await self._release(self._drain_timeout)
        except Exception as error:
            self._fatal(error)  # aiokafka only logs what a callback raises (H14)
            raise

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """Aiokafka's callback; returns without waiting for anything (H12)."""
        if self._stopping:
            return
        try:
            self._epoch += 1
            self._lost = False
            self._generation = self._generation_now()
            self._assigned_at = time.monotonic()
            with suppress(IllegalStateError):
                self._client.pause(*assigned)
                for partition in assigned:
                    self._client.seek(partition, NOT_YET)
            names = [f"{partition.topic}/{partition.partition}" for partition in sorted(assigned)]
            log.info("partitions assigned", epoch=self._epoch, partitions=names)
            if self._prepare_task is not None:
                self._prepare_task.cancel()
            self._prepare_task = self._spawn(self._prepare(sorted(assigned)), f"prepare epoch {self._epoch}")
        except Exception as error:
            self._fatal(error)  # aiokafka only logs what a callback raises (H14)
            raise

    def _generation_now(self) -> int:
        """Return the group's generation as the client believes; it forgets it when it hears that it was expelled."""
        coordinator = self._client._coordinator  # noqa: SLF001 - told nowhere else
        return -1 if coordinator is None else int(coordinator.generation)

    async def _release(self, drain_timeout_seconds: float) -> bool:
        """Give all partitions up: gates, drain, commit. A second caller waits for the first and finds nothing left.

        Returns:
            True where everything started was answered and committed, also by a first caller that had to be waited for.
        """
        under_way = self._releasing.locked()
        async with self._releasing:
            before = not under_way or self._released_in_order
            if self._prepare_task is not None:
                self._prepare_task.cancel()
                await asyncio.wait([self._prepare_task])
            began = time.monotonic()
            leaving = dict(self._assignments)
            for assignment in leaving.values():
                assignment.close_gate()
                assignment.fetching = False
            self._fetching.clear()
            self._unreadable.clear()
            self._short_of_bytes = False
            outcomes: dict[TopicPartition, RebalanceOutcome] = dict.fromkeys(leaving, "drained")
            # On a stop nobody takes the partitions meanwhile, and a commit that hangs would use up the drain's time.
            if leaving and not self._stopping and await self._commit(COMMIT_TIMEOUT_SECONDS) == "lost":
                outcomes = dict.fromkeys(leaving, "lost")
            elif leaving:
                remaining = max(0.0, drain_timeout_seconds - (time.monotonic() - began))
                drained = await asyncio.gather(*(one.drain(remaining) for one in leaving.values()))
                outcomes |= {partition: "timeout" for partition, done in zip(leaving, drained, strict=True) if not done}
                committed = await self._commit(COMMIT_TIMEOUT_SECONDS)
                if committed != "success":
                    outcomes |= dict.fromkeys(self._uncommitted(), "lost" if committed == "lost" else "timeout")
            self._assignments = {}
            for partition, assignment in leaving.items():
                running = await assignment.abandon()
                if running is not None:
                    self._older_runs[partition] = running
                self._pipeline.counts.drained(outcomes[partition], time.monotonic() - began)
            writers, self._writers = self._writers, {}
            await asyncio.gather(*(writer.stop() for writer in writers.values()))
            if writers:
                for assignment in leaving.values():
                    assignment.forget_answers()
            if leaving:
                seconds = round(time.monotonic() - began, 3)
                log.info("partitions released", epoch=self._epoch, seconds=seconds, outcomes=Counter(outcomes.values()))
            self._released_in_order = before and set(outcomes.values()) <= {"drained"}
            return self._released_in_order

    def _uncommitted(self) -> list[TopicPartition]:
        """Partitions with finished work that is not committed; a start that was only chosen is none."""
        return [partition for partition in self._commit_points() if self._assignments[partition].committed is not None]

    async def _prepare(self, partitions: list[TopicPartition]) -> None:
        """Reserve windows, find start offsets, open gates."""
        for partition, run in list(self._older_runs.items()):
            if not run.in_flight:
                del self._older_runs[partition]
        self._buffer_bytes_max = int(self._pipeline.budget.limit * RESUME_SHARE / max(1, len(partitions)))
        self._make_writers(partitions)
        notes = await self._notes(partitions)
        executors = self._reserve(partitions)
        for partition in partitions:
            self._assignments[partition] = self._make_assignment(
                self._pipeline,
                partition.topic,
                partition.partition,
                epoch=self._epoch,
                executor=executors[partition],
                refill=self._refill,
                resolved=self._resolved,
                failed=self._fatal,
                wanted=self._pass_on_a_window,
                freed=self._window_freed,
                lanes=self._lanes(partition),
                poisoned=self._poisoned,
                poison_limit=self._poison_limits.get(partition),
                note=notes.get(partition),
            )
        self.rebalancing = bool(self._writers)  # until it is known that they write for a member
        await self._open(partitions)

    async def _open(self, partitions: list[TopicPartition]) -> None:
        """Open the gate of each partition as soon as it can be; what fails is asked again until there is an answer.

        Exactly-once: that this process is a member is asked *after* producers have started. One that was expelled
        before may have fenced who owns the partitions now, and must write nothing, or both would.

        Raises:
            ConfigError: a newer release has been at work in this group.

        Cancellation: by the next rebalance; what is open stays so.
        """
        clearing = {asyncio.create_task(self._clear(partition)): partition for partition in partitions}
        clear: list[TopicPartition] = []
        failures = 0
        try:
            while clearing or clear:
                wait = RETRY_BACKOFF_SECONDS[min(failures, len(RETRY_BACKOFF_SECONDS)) - 1] if failures else None
                if clearing:
                    done, _ = await asyncio.wait(clearing, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()  # a defect is raised
                        clear.append(clearing.pop(task))
                elif wait is not None:
                    await asyncio.sleep(wait)
                try:
                    if self._writers:
                        self.rebalancing = not await self._is_member()
                        if self.rebalancing:
                            log.warning("no longer in the group: waiting for the next assignment", epoch=self._epoch)
                            return
                    starts = await self._starts(sorted(clear))
                except (ClusterUnavailable, ClusterRefusal) as error:
                    starts = {}
                    log.warning("start offsets unknown", error=str(error), failures=failures + 1)
                for partition, start in starts.items():
                    clear.remove(partition)
                    self._begin(partition, start)
                if starts:
                    self._commit_due.set()  # the chosen ones, at once
                failures = failures + 1 if clear else 0
        finally:
            for task in clearing:
                task.cancel()
            if clearing:
                await asyncio.wait(clearing)

    async def _clear(self, partition: TopicPartition) -> None:
        """Wait until nobody else is at work on *partition*: neither a former owner nor this process.

        Exactly-once: the start of its producer ends what the former owner left open (H22).
        """
        if partition in self._writers:
            await self._writers[partition].start()
        if partition in self._older_runs:
            await self._older_runs[partition].wait_finished()
            del self._older_runs[partition]

    async def _notes(self, partitions: list[TopicPartition]) -> Mapping[Partition, Note]:
        """Open the notes of what is decoded; none where the disk does not answer, as they are only a belt."""
        suspects = self._pipeline.suspects
        if suspects is None:
            return {}
        opening = asyncio.create_task(asyncio.to_thread(suspects.open_notes, partitions), name="open notes")
        done, _ = await asyncio.wait([opening], timeout=NOTES_TIMEOUT_SECONDS)
        if not done:
            log.warning("notes of decoding cannot be opened in time", seconds=NOTES_TIMEOUT_SECONDS)
            return {}
        return opening.result()

    def _make_writers(self, partitions: list[TopicPartition]) -> None:
        """Exactly-once: make the transactions of each partition, not started."""
        if self._transactions is not None:
            self._writers = {
                partition: self._transactions.writer(
                    partition,
                    is_member=self._is_member,
                    committed=partial(self._committed_now, partition),
                    map_size=self._map_size,
                    failed=self._fatal,
                )
                for partition in partitions
            }

    def _lanes(self, partition: TopicPartition) -> tuple[Lane, Lane | None] | None:
        if self._transactions is None:
            return None
        return self._transactions.lanes(self._writers[partition], partition.partition)

    async def _is_member(self) -> bool:
        """Ask the group whether we are still in it; a member that was expelled while frozen does not know."""
        async with self._ask_cluster() as cluster:
            state = await cluster.group(self._group_id)
        coordinator = self._client._coordinator  # noqa: SLF001 - the member's id is told nowhere else
        return coordinator is not None and coordinator.member_id in state.member_ids

    async def _committed_now(self, partition: TopicPartition) -> tuple[int, str] | None:
        async with self._ask_cluster() as cluster:
            found = (await cluster.committed(self._group_id, [partition])).get(partition)
        return None if found is None else (found.offset, found.metadata)

    def _begin(self, partition: TopicPartition, start: StartPoint) -> None:
        assignment = self._assignments[partition]
        if start.committed:
            assignment.committed, assignment.committed_map = start.offset, start.metadata
        with suppress(IllegalStateError):
            self._client.seek(partition, start.offset)
        assignment.begin(start.offset, start.finished, start.source)
        if partition in self._writers:
            self._writers[partition].begin(assignment)
        log.info("partition open", **_named(partition), offset=start.offset, finished_above=count(start.finished))

    def _reserve(self, partitions: list[TopicPartition]) -> dict[TopicPartition, StreamExecutor | None]:
        """Take the windows in sorted order, after the old ones are back."""
        pipeline, limiter = self._pipeline, self._pipeline.service.limiter
        readable = [partition for partition in partitions if partition not in self._poison_limits]
        plan = plan_windows(
            readable,
            limit=limiter.limit,
            available=limiter.available,
            fraction=pipeline.fraction,
            policy=self._window_policy,
            exhausted=self._window_exhausted,
            window_max=1 if pipeline.ordering == "partition" else None,
        )
        if plan.divided_equally:
            log.warning(
                "windows divided equally: the share rule would leave a partition with nothing",
                partitions=len(readable),
                permits=limiter.available,
            )
        executors: dict[TopicPartition, StreamExecutor | None] = dict.fromkeys(partitions)
        for partition in readable:
            window = plan.windows[partition]
            if window:
                with suppress(AtCapacity):
                    executors[partition] = pipeline.service.stream(ordering=pipeline.ordering, window=window)
        return executors

    async def _starts(self, partitions: list[TopicPartition]) -> dict[TopicPartition, StartPoint]:
        """Return where to start, and what is finished above; without those that no broker leads, and none can read.

        ``latest`` applies only to a topic of which the group had committed nothing at all, and the partitions it had
        then, whenever they open: another one without a commit was added later, and its first records must not be
        skipped.

        Raises:
            ClusterUnavailable, ClusterRefusal: not to be had now.
            ConfigError: a newer release has been at work in this group.
        """
        async with self._ask_cluster() as cluster:
            names = {partition.topic for partition in partitions}
            topics = await cluster.topics(names)
            led = [
                partition
                for partition in partitions
                if (topic := topics[partition.topic]) is not None and topic.leaders.get(partition.partition, -1) >= 0
            ]
            if without := sorted(set(partitions).difference(led)):
                log.warning("partitions without leader", partitions=[f"{one.topic}/{one.partition}" for one in without])
            if not led:
                return {}
            committed = await cluster.committed(self._group_id)
            known = {topic for topic, _ in committed}
            for name, topic in topics.items():
                if topic is not None and name not in known:
                    self._fresh.setdefault(name, frozenset(topic.leaders))
            chosen = await self._committed_starts(
                cluster, {partition: committed[partition] for partition in led if partition in committed}
            )
            for side, at in (("earliest", EARLIEST), ("latest", LATEST)):
                uncommitted = [
                    partition
                    for partition in led
                    if partition not in committed
                    and side == (self._start_at if self._is_fresh(partition) else "earliest")
                ]
                found = await cluster.offsets(uncommitted, at) if uncommitted else {}
                chosen |= {partition: StartPoint(found[partition]) for partition in uncommitted}
            ids = await cluster.topic_ids(names)
            return {
                partition: replace(start, source=f"{ids[partition.topic]}/{partition.partition}")
                if partition.topic in ids
                else start
                for partition, start in chosen.items()
            }

    def _is_fresh(self, partition: TopicPartition) -> bool:
        return partition.partition in self._fresh.get(partition.topic, ())

    async def _committed_starts(
        self, cluster: Cluster, commits: Mapping[TopicPartition, Committed]
    ) -> dict[TopicPartition, StartPoint]:
        """Read the offset maps of *commits*; one that is not to be believed has no effect, which is said aloud.

        Raises:
            ClusterUnavailable, ClusterRefusal: the ends of logs that maps are compared with are not to be had now.
            ConfigError: a newer release has been at work in this group.
        """
        with_map = [partition for partition, commit in commits.items() if commit.metadata]
        ends = await cluster.offsets(with_map, LATEST) if with_map else {}
        starts: dict[TopicPartition, StartPoint] = {}
        for partition, commit in commits.items():
            found = decode(
                commit.metadata,
                committed_offset=commit.offset,
                cluster_id=self._pipeline.cluster_id,
                end=ends.get(partition),
            )
            name = f"{partition.topic}/{partition.partition}"
            if found.reason == "newer_version":
                raise ConfigError(
                    f"the offset map of {name} was written by a newer release: upgrade, or see `offset-map clear`"
                )
            if found.reason not in {None, "absent"}:
                self._pipeline.counts.offset_maps_dropped[str(found.reason)] += 1
                log.warning(
                    "offset map not used: what it says is finished runs again", partition=name, reason=found.reason
                )
            starts[partition] = StartPoint(
                commit.offset, committed=True, metadata=commit.metadata, finished=() if found.reason else found.finished
            )
        return starts

    def _pass_on_a_window(self, wanting: Assignment) -> None:
        """Ask one idle partition for its window, unless *wanting* has nothing to read."""
        if wanting.lag == 0:
            return
        for assignment in self._assignments.values():
            if assignment.idle:
                partition = TopicPartition(assignment.topic, assignment.partition)
                if partition in self._fetching:
                    self._stop_fetching(partition)
                assignment.give_up_window()
                return

    def _window_freed(self) -> None:
        """A window is back: who has something to read and has waited longest tries first."""
        waiting = [
            (one.lag == 0, since, one) for one in self._assignments.values() if (since := one.waiting_since) is not None
        ]
        if waiting:
            min(waiting, key=itemgetter(0, 1))[2].try_now()

    # ------------------------------------------------------------------------------------------ commit

    def _resolved(self, records: int) -> None:
        """Records are finished and their bytes free."""
        self._moved_at = time.monotonic()
        if self._schedule.resolved(records):
            self._commit_due.set()
        if self._short_of_bytes and self._pipeline.budget.fetching_may_resume:
            self._short_of_bytes = False
            for assignment in self._assignments.values():
                self._refill(assignment)

    async def _commit_when_due(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._schedule.due_in(time.monotonic())):
                    await self._commit_due.wait()
            self._commit_due.clear()
            self._schedule.committed(time.monotonic())  # what is resolved from now on waits for the next one
            await self._commit(COMMIT_TIMEOUT_SECONDS)

    async def _commit(self, timeout_seconds: float) -> CommitOutcome:
        """Commit what has changed. One commit at a time; the epoch is checked again after waiting for a turn.

        Returns:
            ``lost`` where the group no longer counts us as a member, ``unknown`` where there was no usable answer: the
            next commit then starts from the current watermarks.
        """
        async with self._committing:
            await self._advance_over_gaps()
            began, epoch = time.monotonic(), self._epoch
            points = self._commit_points()
            # Without a membership, what is committed counts where the group is empty, though others were in it (H16f).
            self._lost = self._lost or bool(self._assignments and self._generation_now() != self._generation)
            if not points or self._lost:
                return "lost" if self._lost else "success"
            if self._writers:
                for partition in points:  # an ordinary commit could overtake a transaction's and take it back
                    self._writers[partition].commit_offset()
                return "success"
            outcome: CommitOutcome = "success"
            try:
                async with asyncio.timeout(timeout_seconds):
                    points = await self._send_commit(points)
            except CommitFailedError as error:
                if isinstance(error.__cause__, RebalanceInProgressError):
                    outcome = "unknown"
                else:
                    outcome = "lost"
                    self._lost = epoch == self._epoch
                log.warning("commit refused", outcome=outcome, error=repr(error.__cause__ or error))
            except (KafkaError, OSError, TimeoutError) as error:
                outcome = "unknown"
                log.warning("commit without answer", error=repr(error))
            else:
                for partition, point in points.items():
                    assignment = self._assignments.get(partition)
                    if assignment is not None and assignment.epoch == epoch:
                        assignment.committed, assignment.committed_map = point.offset, point.metadata
                        assignment.committed_at = time.time()
            self._pipeline.counts.committed(outcome, time.monotonic() - began)
            return outcome

    def _commit_points(self) -> dict[TopicPartition, OffsetAndMetadata]:
        """Return watermark and offset map of every partition where they are not what is committed."""
        points: dict[TopicPartition, OffsetAndMetadata] = {}
        for partition, assignment in self._assignments.items():
            if assignment.begun:
                text = assignment.offset_map
                point = OffsetAndMetadata(assignment.watermark, self._map_size.fitting(text))
                if point != (assignment.committed, assignment.committed_map):
                    points[partition] = point
        return points

    async def _send_commit(
        self, points: dict[TopicPartition, OffsetAndMetadata]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        """Commit *points*, without their maps where the broker takes none of that size; return what was committed."""
        left_out = sum(1 for name, point in points.items() if not point.metadata and self._assignments[name].offset_map)
        try:
            await self._commit_by_client(points)
        except (OffsetMetadataTooLargeError, InvalidCommitOffsetSizeError) as error:
            longest = max(len(point.metadata) for point in points.values())
            if not longest:
                raise
            if self._map_size.refused(longest):
                log.warning("broker refuses offset maps: committing without", characters=longest, error=repr(error))
            left_out += sum(1 for point in points.values() if point.metadata)
            points = {partition: OffsetAndMetadata(point.offset, "") for partition, point in points.items()}
            if self._generation_now() != self._generation:  # as before the first attempt (H10, H16f)
                raise CommitFailedError from error
            await self._commit_by_client(points)
        if left_out:
            self._pipeline.counts.offset_maps_dropped["too_large"] += left_out
        return points

    async def _commit_by_client(self, points: dict[TopicPartition, OffsetAndMetadata]) -> None:
        try:
            await self._client.commit(points)
        except asyncio.CancelledError:
            # The client shields the request that is on its way; what becomes of that nobody will ask.
            for task in asyncio.all_tasks():
                if getattr(task.get_coro(), "__qualname__", "") == SHIELDED_COMMIT:
                    task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    async def _advance_over_gaps(self) -> None:
        """Move idle partitions over offsets without records (control batches, aborted ones): only the client knows.

        Not while the next poll has still something to tell of the partition: it may be that the client has moved past a
        record which it could not fetch (H2).
        """
        fetcher: Any = self._client._fetcher  # noqa: SLF001 - told nowhere else; private names, held by a test
        for partition, assignment in list(self._assignments.items()):
            if assignment.open and assignment.fetching:
                with suppress(KafkaError, TimeoutError):
                    async with asyncio.timeout(1):
                        position = await self._client.position(partition)
                    if partition not in fetcher._records:  # noqa: SLF001 - as above
                        assignment.advance(position)

    # ------------------------------------------------------------------------------------------ for the watchdog

    def observation(self) -> Observation:
        """Describe what moves, and why what stands does."""
        shared = self.shared_reasons()
        if self._poll_failures and "AuthorizationFailed" in self._poll_error:
            shared.append("refused")
        preparing = self._prepare_task is not None and not self._prepare_task.done()
        return Observation(
            polls=self._polls,
            epoch=self._epoch,
            rebalancing=self.rebalancing and not preparing,
            metadata=self._client._client.cluster._last_successful_refresh_ms,  # noqa: SLF001 - held by a test
            partitions=[self._seen(partition, shared) for partition in self._assignments],
            dead=self._ended_task(),
        )

    def _seen(self, partition: TopicPartition, shared: list[str]) -> PartitionSeen:
        self._look_at_the_log_end(partition)
        reasons = self._reasons(partition, shared)
        if partition in self._unreadable:
            reasons.append("unreadable")
        older = self._older_runs.get(partition)
        return self._assignments[partition].seen(reasons, None if older is None else older.oldest())

    async def confirms(self, suspicion: Suspicion) -> bool:
        """Hold a suspicion against the brokers, over a connection of its own: would a restart help?

        Returns:
            False where the brokers do not answer either, or the group is busy rebalancing, or there is nothing to read.
        """
        if suspicion.kind == "client":
            return True
        try:
            async with self._ask_cluster() as cluster:
                if suspicion.partition is None:
                    group = await cluster.group(self._group_id)
                    return suspicion.kind == "metadata" or "Rebalance" not in group.state
                partition = TopicPartition(*suspicion.partition)
                await cluster.committed(self._group_id, [partition])
                ends = await cluster.offsets([partition], LATEST, committed_only=self._committed_only)
        except (ClusterUnavailable, ClusterRefusal) as error:
            log.warning("the brokers do not answer either: waiting on", suspicion=suspicion.text, error=str(error))
            return False
        assignment = self._assignments.get(partition)
        if assignment is None:
            return False
        return not assignment.begun or assignment.holds_records or assignment.cursor < ends[partition]

    # ------------------------------------------------------------------------------------------ what can be seen

    @property
    def assigned(self) -> int:
        """Partitions assigned now."""
        return len(self._assignments)

    def shared_reasons(self) -> list[str]:
        """Pause reasons that hold for every partition of the process."""
        reasons = []
        if self._short_of_bytes:
            reasons.append("bytes")
        if self._storage_blocked():
            reasons.append("storage_unavailable")
        if self._output_stuck():
            reasons.append("output")
        return reasons

    def _reasons(self, partition: TopicPartition, shared: Sequence[str]) -> list[str]:
        """Reasons for which one partition waits: the shared ones, and those that are told here alone."""
        writer = self._writers.get(partition)
        return [*shared, "output"] if writer is not None and writer.stuck and "output" not in shared else [*shared]

    def snapshot(self) -> list[PartitionState]:
        """Describe every assigned partition, sorted."""
        shared = self.shared_reasons()
        states = []
        for partition in sorted(self._assignments):
            self._look_at_the_log_end(partition)
            reasons = self._reasons(partition, shared)
            if partition in self._older_runs:
                reasons.append("recovering")
            states.append(self._assignments[partition].snapshot(reasons))
        return states

    def _look_at_the_log_end(self, partition: TopicPartition) -> None:
        """Take over the high watermark that came with the last fetch, where fetches tell it."""
        assignment = self._assignments[partition]
        if self._is_told_by_fetches(partition) and partition in self._client.assignment():
            end = self._client.highwater(partition)
            if end is not None:
                assignment.log_ends_at(end)

    def _is_told_by_fetches(self, partition: TopicPartition) -> bool:
        """Tell whether fetches are sent and answered, be it with nothing: each answer tells the end of the log."""
        return partition in self._fetching and self._silent_seconds(partition, time.monotonic()) < LOG_END_SECONDS

    async def _ask_for_log_ends(self) -> None:
        """Ask again and again for the log ends that no fetch tells."""
        while True:
            await asyncio.sleep(LOG_END_SECONDS)
            untold = {
                partition: one
                for partition, one in self._assignments.items()
                if one.begun and not self._is_told_by_fetches(partition)
            }
            if not untold:
                continue
            try:
                async with asyncio.timeout(LOG_END_SECONDS):
                    ends = await self._client.end_offsets(list(untold))
            except (KafkaError, OSError, TimeoutError) as error:
                log.warning("log ends unknown", partitions=len(untold), error=repr(error))
                continue
            for partition, end in ends.items():
                if not self._is_told_by_fetches(partition):
                    untold[partition].log_ends_at(end)

    def not_ready(self) -> list[str]:
        """Reasons why the service should not count as ready."""
        if self._consumer is None:
            return ["not connected to the broker"]
        if self.rebalancing:
            reasons = ["rebalancing"]
        else:
            topics = [topic for topic in self._topics if not self._client.partitions_for_topic(topic)]
            reasons = [f"topic {topic} does not exist" for topic in topics]
        if self._poll_failures >= POLL_FAILURES_MAX:
            reasons.append(f"polling fails: {self._poll_error}")
        now = time.monotonic()
        for partition, assignment in sorted(self._assignments.items()):
            name = f"{partition.topic}/{partition.partition}"
            reasons += [f"{name}: {reason}" for reason in self._held_up_by(partition, assignment, now)]
        return reasons

    def _held_up_by(self, partition: TopicPartition, assignment: Assignment, now: float) -> Iterator[str]:
        """Tell what keeps a partition from being worked on, where somebody should look at it."""
        if assignment.out_of_range:
            yield "offset out of range"
        if partition in self._unreadable:
            yield f"cannot be read: {self._unreadable[partition]}"
        if not assignment.begun and now - self._assigned_at >= STARVED_SECONDS:
            yield f"not open for {now - self._assigned_at:.0f} s"
        if (silent := self._silent_seconds(partition, now)) >= STARVED_SECONDS:
            yield f"no answer to fetches for {silent:.0f} s"
        if assignment.poison_limit is not None:
            yield f"poison limit: {assignment.poison_limit}"
        if assignment.starving_since is not None and now - assignment.starving_since >= STARVED_SECONDS:
            yield f"no permits for {now - assignment.starving_since:.0f} s"
        if (writer := self._writers.get(partition)) is not None and writer.stuck:
            yield "responses are not being acknowledged"

    def _silent_seconds(self, partition: TopicPartition, now: float) -> float:
        """Return how long nobody has answered a fetch; an answer without records counts too. 0 where none is sent."""
        if partition not in self._fetching or partition not in self._client.assignment():
            return 0.0
        fetching = now - self._fetching_since[partition]
        answered_ms = self._client.last_poll_timestamp(partition)
        return fetching if answered_ms is None else min(fetching, time.time() - answered_ms / 1000)

    @property
    def _client(self) -> AIOKafkaConsumer:
        assert self._consumer is not None
        return self._consumer


async def _started(make: Callable[[], AIOKafkaConsumer]) -> AIOKafkaConsumer:
    """Start a client, trying until it works; ``start`` has no deadline of its own (H17)."""
    failures = 0
    while True:
        client = make()
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                await connect_client(client)
            see_that_the_cluster_is_known(client)
        except (KafkaError, OSError, TimeoutError) as error:
            log.warning("broker not reachable, trying again", error=repr(error), failures=failures + 1)
            await _closed(client, START_TIMEOUT_SECONDS)
        except BaseException:
            await _closed(client, START_TIMEOUT_SECONDS)
            raise
        else:
            return client
        await asyncio.sleep(RETRY_BACKOFF_SECONDS[min(failures, len(RETRY_BACKOFF_SECONDS) - 1)])
        failures += 1


async def _closed(client: AIOKafkaConsumer, timeout_seconds: float) -> None:
    """Close a client that may hang (H17) or raise what nobody caused (H17b)."""
    closing = asyncio.ensure_future(client.stop())
    done, _ = await asyncio.wait([closing], timeout=timeout_seconds)
    if not done:
        log.warning("client did not stop in time", seconds=timeout_seconds)
        closing.cancel()
        await asyncio.wait([closing], timeout=1)
    elif not closing.cancelled() and (error := closing.exception()) is not None:
        log.debug("client stopped with an error", error=repr(error))


async def _end(task: asyncio.Task[None] | None) -> None:
    """Cancel a task of our own and wait for its end."""
    if task is not None:
        task.cancel()
        await asyncio.wait([task])


def _why(task: asyncio.Task[Any]) -> str:
    return "cancelled" if task.cancelled() else repr(task.exception())


def _named(partition: TopicPartition) -> dict[str, Any]:
    """Return the fields of a log line by which a partition is known."""
    return {"topic": partition.topic, "partition": partition.partition}
