"""Exactly-once: responses, dead letters and the input offset of one partition, together in Kafka transactions.

One :class:`TransactionWriter` per owned input partition, with a producer of its own whose ``transactional.id`` is
``GROUP/TOPIC/PARTITION``. Starting it fences whoever owned the partition before and ends what that left open, so it is
started *before* the committed offset is read (hazard H22). Ended is what the broker *knows* to be open. Some forget:
Apache Kafka 4.3 takes a partition without a leader, as after a restart, for a deleted one, and counts a transaction as
complete without its marker there; its records then become visible with whatever the same producer commits next, or are
lost with what it aborts. So each producer begins with a *sweep*: it ends a transaction of its own that holds no record,
on all partitions it will write to, and the marker ends whatever is open there. Three things make a sweep right:

* The *decision*. Before the producer starts, the coordinator is asked how the last transaction was decided. Committed:
  the sweep commits. Anything else: it aborts. Once decided, that stands for all attempts to start.
* All partitions are *led*, as the coordinator itself sees it, before the sweep and, without a break, until its markers
  are written; else it might be forgotten as well, and starts anew.
* A dead letter topic that is gone or denied is left out: nothing has to be written there before it is swept.

1. What is appended gathers for the transaction interval, or until there is much of it.
2. *One transaction*: begin; one batch after another for each output partition; every batch's future is awaited, because
   a transaction commits although its sends have failed (H20); the offset and map that hold once these responses are
   written; commit.
3. Committed: owners hear that their records are acknowledged. After a commit that took long, as where a broker has come
   back meanwhile, there first is a sweep that commits: it may be one of those without markers.
4. *Anything else* (refused, fenced, no answer in time): the producer is thrown away, which ends its transaction. Before
   a new one is started the group is asked whether this process is still a member: a member that was expelled while it
   was frozen would otherwise fence the rightful owner, and write its own stale responses. And again once it has
   started, as it could have been expelled in between: who is a member *then* knows that a later owner will fence it.
   No member: the partition is *lost*, and what was not committed goes nowhere.
5. Whether a transaction that was to be committed took effect is told by its answer, else by the coordinator's decision,
   else, where there is none yet or the broker does not tell, by the group's offset and map, once the new producer has
   fenced the old one. If so, the sweep commits what may be left of it: step 3, else step 2 again with the same records.
   Where a broker takes no map, a transaction above a gap may leave both as they were: then they tell nothing, and its
   records are written again rather than lost.
6. An abort takes along what a broker has forgotten of the commit before it. So what was committed *last* in each output
   partition is kept, and where it begins. If the oldest open transaction of the partition begins there too, that commit
   is *forgotten* there. The process looks before anything can be aborted: before the sweep that follows a slow commit,
   and before a new producer starts. And once more when that has started and its sweep is going to commit, as from then
   on nothing but the sweep ends anything. What was forgotten and is not open any more has ended by a commit, and is
   seen, if that is what the coordinator has decided; else by an abort, and has to be written *again*. What is still
   open ends as the sweep does: one that aborts has it written again, one that commits completes it.
7. What has to be written again is part of the next transaction. Where the present one has taken effect by then, one
   follows for it alone, and only after that the owners hear that their records are acknowledged: who drains the
   partition waits for both. Until then it is in memory alone: a process that is killed, or loses the partition, between
   the abort and this commit, loses it. Offset and map need no such care: they tell all that went before.
8. Sometimes nobody can tell what is forgotten: the coordinator has aborted a transaction by itself before the process
   has looked, or an older transaction of somebody else hides it. If offset and map are not those of the last commit,
   the process ends, and its successor runs again what that commit carried. If they are, an error in the log names the
   offsets of which responses may be missing.

A record that is refused for its size alone is handed back to its owner and replaced in its place, in its transaction.
An offset map that is refused for its size is left out, then and from then on (contract 3).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    InvalidCommitOffsetSizeError,
    KafkaError,
    MessageSizeTooLargeError,
    OffsetMetadataTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)
from aiokafka.structs import OffsetAndMetadata

from consumer.assignment import Lane, Owner
from consumer.kafka.clients import connect_client, its_assertions_are_failures
from consumer.kafka.publisher import (
    BACKOFF_SECONDS,
    DISCARD_TIMEOUT_SECONDS,
    discard,
    nobody_waits_for,
)
from consumer.kafka.topics import LATEST, Cluster, ClusterRefusal, ClusterUnavailable, Partition
from consumer.kafka.transaction_states import TransactionState
from consumer.log import get_logger
from consumer.offset_map import SizeLimit
from consumer.responses import Header

TRANSACTION_RECORDS_MAX = 5_000
"""Records of one transaction: what is sent again after a failure."""

TRANSACTION_BYTES_MAX = 1024 * 1024
"""Bytes of one transaction, unless a single record has more. What does not come through within
:data:`STEP_TIMEOUT_SECONDS` is sent again as it is: this much does on any network above 52 KB/s."""

STEP_TIMEOUT_SECONDS = 20.0
"""One whole transaction, or one start of a producer. A step that takes longer than the broker's own time-out may have
any outcome, and the producer is not to be used any more (H23)."""

SLOW_COMMIT_SECONDS = 1.0
"""A transaction takes milliseconds; one that takes longer has met a broker that was away: a sweep follows."""

HIDDEN_SECONDS = 60.0
"""How long older transactions of others may hide what has become of the last commit: brokers end them sooner."""

MARKERS_SECONDS = 0.05
"""Wait between two questions whether the markers of a sweep are written; they are so within milliseconds."""

log = get_logger(__name__)


class Lost(Exception):
    """This process is no longer a member of the group: the partition belongs to somebody else."""


class _Refused(Exception):
    """The broker takes no record of this size."""

    def __init__(self, item: _Item) -> None:
        super().__init__(f"{len(item.value or b'')} bytes")
        self.item = item


class CommitForgotten(Exception):
    """The group's offsets are not those last committed: what was answered has to run again, after a restart."""


class _NotSwept(Exception):
    """A partition cannot be written to before it is swept, or had no leader for a moment while it was."""


class _Commit(Enum):
    """How far the commit of a transaction has come."""

    NOT_ASKED = auto()
    ASKED = auto()
    ANSWERED = auto()


_FAILURES = (KafkaError, OSError, TimeoutError, ClusterUnavailable, ClusterRefusal, _NotSwept)
"""What a step may fail with; the producer is then thrown away."""


class _MapRefused(Exception):
    """The broker takes no metadata of this size."""


class Source(Protocol):
    """The assignment behind a writer."""

    committed: int | None
    """The group's offset as last committed or found; None where there is none."""
    committed_map: str
    """The metadata beside it."""

    def settle(self, offsets: Sequence[int]) -> tuple[int, str]:
        """Count *offsets* as finished; return the offset and map that may be committed with their responses."""

    def transaction_committed(self, offset: int, metadata: str, *, map_left_out: bool) -> None:
        """The group's offset is *offset* now; *map_left_out* where there was a map that the broker does not take."""

    def lose(self) -> None:
        """The partition is lost: nothing more will be acknowledged."""


class _Item:
    """One encoded record on its way."""

    __slots__ = ("headers", "key", "owner", "size", "target", "token", "value")

    def __init__(
        self,
        target: TopicPartition,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[Header],
        owner: Owner,
        token: int,
    ) -> None:
        self.target = target
        self.key = key
        self.value = value
        self.headers = headers
        self.owner = owner
        self.token = token
        self.size = len(key or b"") + len(value or b"")


@dataclass(frozen=True, slots=True)
class _Written:
    """What was committed last in one output partition, as far as its answer tells."""

    items: Sequence[_Item]
    first: int
    """Where it begins; -1 where the broker has not said."""


class _Lane:
    """What goes to one output partition, in the same transactions as everything else of the writer."""

    def __init__(self, writer: TransactionWriter, target: TopicPartition) -> None:
        self._writer = writer
        self._target = target

    def append(
        self, key: bytes | None, value: bytes | None, headers: Sequence[Header], owner: Owner, token: int
    ) -> None:
        """Hand one record in; *owner* hears of it by *token* when its transaction is committed."""
        self._writer.append(_Item(self._target, key, value, headers, owner, token))


@dataclass(frozen=True, slots=True)
class Transactions:
    """What the writers of all partitions share."""

    group_id: str
    ask_cluster: Callable[[], Cluster]
    """Makes an unopened client for questions."""
    make_producer: Callable[[str], AIOKafkaProducer]
    """Makes an unstarted producer with a ``transactional.id``."""
    interval_seconds: float
    """How long responses gather."""
    output: Callable[[int], TopicPartition]
    """Where the responses of an input partition go."""
    dead_letters: Callable[[int], TopicPartition] | None
    """Where its dead letters go; None where there is no dead letter topic."""

    def writer(
        self,
        partition: TopicPartition,
        *,
        is_member: Callable[[], Awaitable[bool]],
        committed: Callable[[], Awaitable[tuple[int, str] | None]],
        map_size: SizeLimit,
        failed: Callable[[BaseException], None],
    ) -> TransactionWriter:
        """Make the unstarted writer of one input partition."""
        transactional_id = f"{self.group_id}/{partition.topic}/{partition.partition}"
        return TransactionWriter(
            partition,
            output=self.output(partition.partition),
            dead_letters=None if self.dead_letters is None else self.dead_letters(partition.partition),
            group_id=self.group_id,
            transactional_id=transactional_id,
            ask_cluster=self.ask_cluster,
            make_producer=lambda: self.make_producer(transactional_id),
            interval_seconds=self.interval_seconds,
            is_member=is_member,
            committed=committed,
            map_size=map_size,
            failed=failed,
        )

    def lanes(self, writer: TransactionWriter, partition: int) -> tuple[Lane, Lane | None]:
        """Return the lanes of *writer* for the responses and dead letters of an input partition."""
        dead_letters = None if self.dead_letters is None else writer.lane(self.dead_letters(partition))
        return writer.lane(self.output(partition)), dead_letters


class TransactionWriter:
    """Owns the transactional producer of one input partition.

    Args:
        partition: The input partition.
        output: Where responses go.
        dead_letters: Where dead letters go, if anywhere.
        group_id: The consumer group.
        transactional_id: Of the producers.
        ask_cluster: Makes an unopened client for questions.
        make_producer: Makes an unstarted transactional producer.
        interval_seconds: How long responses gather.
        is_member: Tells whether this process still belongs to the group.
        committed: Reads what the group has committed for the partition: offset and metadata, None for nothing.
        map_size: What the broker takes as offset map; all writers of a process learn from one refusal.
        failed: Called with the exception that ended the writer: a defect.
    """

    def __init__(
        self,
        partition: TopicPartition,
        *,
        output: TopicPartition,
        dead_letters: TopicPartition | None,
        group_id: str,
        transactional_id: str,
        ask_cluster: Callable[[], Cluster],
        make_producer: Callable[[], AIOKafkaProducer],
        interval_seconds: float,
        is_member: Callable[[], Awaitable[bool]],
        committed: Callable[[], Awaitable[tuple[int, str] | None]],
        map_size: SizeLimit,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._partition = partition
        self._output = output
        self._dead_letters = dead_letters
        self._dead_letters_denied = False
        self._dead_letters_left_out = False
        self._group_id = group_id
        self._transactional_id = transactional_id
        self._ask_cluster = ask_cluster
        self._make_producer = make_producer
        self._interval = interval_seconds
        self._is_member = is_member
        self._committed = committed
        self._map_size = map_size
        self._failed = failed
        self._producer: AIOKafkaProducer | None = None
        self._swept: set[TopicPartition] = set()
        """Where the producer may write."""
        self._decided: bool | None = None
        """Whether the last transaction before it was committed; None while that is not known, or not decided."""
        self._commit = _Commit.NOT_ASKED
        self._written: dict[TopicPartition, _Written] = {}
        """What the transaction under way has written."""
        self._last: dict[TopicPartition, _Written] = {}
        """What was committed last; markers of a transaction go to where it was written to, and complete that alone."""
        self._forgotten: dict[TopicPartition, _Written] = {}
        """What of it was still open when that was looked at last: the next marker there will end it."""
        self._again: list[_Item] = []
        """What was forgotten, and then aborted."""
        self._last_is_told = False
        """Whether it is known, since the transaction under way has failed, what a broker has forgotten."""
        self._hidden_until = 0.0
        self._source: Source | None = None
        self._pending: deque[_Item] = deque()
        self._pending_bytes = 0
        self._arrived = asyncio.Event()
        self._failures = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def stuck(self) -> bool:
        """True from a failure until the next committed transaction."""
        return self._failures > 0

    def lane(self, target: TopicPartition) -> Lane:
        """Return where to append what goes to an output partition."""
        return _Lane(self, target)

    def append(self, item: _Item) -> None:
        """Take one record; never waits."""
        self._pending.append(item)
        self._pending_bytes += item.size
        self._arrived.set()

    def commit_offset(self) -> None:
        """Commit the offset though there is no response: it has moved over offsets that hold no record."""
        self._arrived.set()

    async def start(self) -> None:
        """Start the producer, and thereby fence the partition's former owner; tries until it works.

        Cancellation: no producer is left behind.
        """
        while self._producer is None:
            try:
                self._producer = await self._started()
            except _FAILURES as error:
                self._failures += 1
                log.warning("transactional producer cannot start", **self._where(), error=repr(error))
                await self._back_off()
        self._failures = 0

    def begin(self, source: Source) -> None:
        """Begin to write for *source*."""
        self._source = source
        self._task = asyncio.create_task(self._run(), name=f"transactions {self._partition}")
        self._task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """End at once; what is not committed is forgotten, an open transaction aborted by the next owner."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._throw_away()

    # ------------------------------------------------------------------------------------------ the loop

    async def _run(self) -> None:
        assert self._source is not None
        while True:
            await self._gather()
            items = self._take()
            try:
                await self._deliver(self._source, items)
            except Lost:
                log.warning("partition lost: no longer a member of the group", **self._where(), dropped=len(items))
                self._source.lose()
                await self._throw_away()
                self._failures = 0  # nothing is held up by the output any more
                return

    async def _gather(self) -> None:
        """Wait for something to write, then a little longer for more."""
        await self._arrived.wait()
        if len(self._pending) < TRANSACTION_RECORDS_MAX and self._pending_bytes < TRANSACTION_BYTES_MAX:
            await asyncio.sleep(self._interval)
        self._arrived.clear()

    def _take(self) -> list[_Item]:
        """Take what goes into one transaction: a record's dead letter and response are never apart."""
        pending = self._pending
        items: list[_Item] = []
        left = TRANSACTION_BYTES_MAX
        while pending and (
            not items
            or items[-1].token == pending[0].token
            or (len(items) < TRANSACTION_RECORDS_MAX and pending[0].size <= left)
        ):
            items.append(pending.popleft())
            left -= items[-1].size
        self._pending_bytes -= TRANSACTION_BYTES_MAX - left
        if pending:
            self._arrived.set()
        return items

    async def _deliver(self, source: Source, items: list[_Item]) -> None:
        """Write *items* and the offset that goes with them, until they are committed, with all that was forgotten.

        Raises:
            Lost: the partition belongs to somebody else; nothing is acknowledged.
        """
        left = items
        while True:
            offset, offset_map = source.settle([item.token for item in left])
            metadata = self._map_size.fitting(offset_map)
            began = time.monotonic()
            try:
                with its_assertions_are_failures():
                    await self._transact([*self._again, *left], offset, metadata)
                if time.monotonic() - began >= SLOW_COMMIT_SECONDS:
                    await self._sweep_again()
            except _Refused as error:
                await self._replace(error)
                self._hand_back(left, error.item)
                continue
            except _MapRefused as error:
                if self._map_size.refused(len(metadata)):
                    log.warning("broker refuses offset maps: committing without", characters=len(metadata))
                await self._replace(error)
                continue
            except _FAILURES as error:
                await self._replace(error, partial(self._took_effect, source, offset, metadata))
                if self._commit is not _Commit.ANSWERED:
                    continue
            self._last_is_told = False
            source.transaction_committed(offset, metadata, map_left_out=metadata != offset_map)
            if not self._again:
                break
            left = []
        self._failures = 0
        for owner, group in groupby(items, attrgetter("owner")):
            owner.acknowledged([item.token for item in group])

    async def _transact(self, items: list[_Item], offset: int, metadata: str) -> None:
        """Run one transaction.

        Raises:
            _Refused: a record is too large for the broker; nothing was committed.
            _MapRefused: *metadata* is; nothing was committed.
            _NotSwept: dead letters were left out of the producer's sweep; the next one tries to sweep them.
            KafkaError, OSError, TimeoutError: it failed, or its outcome is unknown; the producer is done for.
        """
        producer = self._producer
        assert producer is not None
        self._commit = _Commit.NOT_ASKED
        by_target: dict[TopicPartition, list[_Item]] = {}
        for item in items:
            by_target.setdefault(item.target, []).append(item)
        if not by_target.keys() <= self._swept:
            self._dead_letters_denied = False  # it may be granted by now
            raise _NotSwept("there is a dead letter to be written, and its topic is gone or denied")
        async with asyncio.timeout(STEP_TIMEOUT_SECONDS):
            await producer.begin_transaction()
            nobody_waits_for(producer)
            sending = (self._send(producer, target, group) for target, group in by_target.items())
            first = await asyncio.gather(*sending)
            point = {self._partition: OffsetAndMetadata(offset, metadata)}
            try:
                await producer.send_offsets_to_transaction(point, self._group_id)
            except KafkaError as error:
                # What the client does not expect here ends its sender, and is told as that failure's cause alone.
                refusal = isinstance(error.__cause__, OffsetMetadataTooLargeError | InvalidCommitOffsetSizeError)
                if metadata and refusal:
                    raise _MapRefused(repr(error.__cause__)) from error
                raise
            places = zip(by_target.items(), first, strict=True)
            self._written = {target: _Written(group, at) for (target, group), at in places}
            self._commit = _Commit.ASKED
            await producer.commit_transaction()
        self._took()

    def _took(self) -> None:
        """Take note that the transaction under way is committed."""
        self._commit = _Commit.ANSWERED
        self._again.clear()
        self._last |= self._written

    @staticmethod
    async def _send(producer: AIOKafkaProducer, target: TopicPartition, items: list[_Item]) -> int:
        """Send one output partition's records in their order, one batch after the other; return where the first is."""
        now = time.time_ns() // 1_000_000
        at = 0
        offset: int | None = None
        while at < len(items):
            batch = producer.create_batch()
            first = at
            while at < len(items):
                item = items[at]
                if batch.append(timestamp=now, key=item.key, value=item.value, headers=item.headers) is None:
                    break
                at += 1
            batch.close()
            try:
                sent = await (await producer.send_batch(batch, target.topic, partition=target.partition))
                offset = sent.offset if offset is None else offset
            except (MessageSizeTooLargeError, RecordListTooLargeError) as error:
                # Batches are half of a broker's default limit, so what is refused is the largest of this one.
                raise _Refused(max(items[first:at], key=lambda one: len(one.value or b""))) from error
        assert offset is not None, "there are items"
        return offset

    def _hand_back(self, items: list[_Item], refused: _Item) -> None:
        """Give a refused record to its owner, and put what it appends instead in the record's place."""
        if refused in self._again:
            self._again.remove(refused)
            log.error("a forgotten response is too large by now, and lost", **self._where(), offset=refused.token)
            return
        waiting = len(self._pending)
        refused.owner.refused(refused.token)
        replacements = [self._pending.pop() for _ in range(len(self._pending) - waiting)]
        self._pending_bytes -= sum(item.size for item in replacements)
        at = items.index(refused)
        items[at : at + 1] = reversed(replacements)

    # ------------------------------------------------------------------------------------------ after a failure

    async def _replace(self, error: BaseException, took_effect: Callable[[], Awaitable[bool]] | None = None) -> None:
        """Throw the producer away and start another, if the partition is still ours.

        Args:
            error: Why.
            took_effect: Tells whether the transaction that failed is committed; None where it is not.

        Raises:
            Lost: it is not.
        """
        self._failures += 1
        log.warning("transaction failed", **self._where(), error=repr(error), failures=self._failures)
        self._hidden_until = time.monotonic() + HIDDEN_SECONDS
        await self._throw_away()
        while self._producer is None:
            await self._back_off()
            try:
                if await self._is_member():
                    self._producer = await self._started(took_effect)
                # Only who is a member after its producer has started knows that whoever comes next will fence it.
                if not await self._is_member():
                    raise Lost
            except _FAILURES as failure:
                await self._throw_away()
                self._failures += 1
                log.warning("transactional producer cannot start", **self._where(), error=repr(failure))

    async def _took_effect(self, source: Source, offset: int, metadata: str) -> bool:
        """Tell whether the last transaction is committed; the old producer is fenced. Asked until there is an answer.

        Raises:
            CommitForgotten: it is not, nor is what was committed before it, and of that nothing else is known.
        """
        if self._decided:  # that is the one before, of which the sweep completes what is forgotten
            return False
        before = (source.committed, source.committed_map)
        if (offset, metadata) == before:
            return False  # the group's offsets tell nothing
        while True:
            with suppress(ClusterUnavailable, ClusterRefusal):
                found = await self._committed() or (None, "")
                strange = found not in {before, (offset, metadata)} and not self._last_is_told
                if strange and await self._is_member():
                    raise CommitForgotten(f"{self._partition}: committed were {before}, and there are {found}")
                return found == (offset, metadata)
            await self._back_off()

    # ------------------------------------------------------------------------------------------ the sweep

    async def _started(self, took_effect: Callable[[], Awaitable[bool]] | None = None) -> AIOKafkaProducer:
        """Start a producer and sweep with it; *took_effect* is asked before the sweep, where it is not known yet."""
        producer = self._make_producer()
        try:
            async with asyncio.timeout(STEP_TIMEOUT_SECONDS), self._ask_cluster() as cluster:
                leaders = await self._leaders(cluster)
                state = await self._look(cluster, leaders)
                if self._decided is None and state is not None:  # else it stands; a start makes the broker forget it
                    self._decided = state.committed
                self._give_up_what_cannot_be_told()
                with its_assertions_are_failures():
                    await connect_client(producer)
                ended_by_commit = self._ended_by_commit(state)
                if took_effect is not None and self._commit is not _Commit.ANSWERED and await took_effect():
                    self._took()
                    ended_by_commit = True  # since
                commit = self._commit is _Commit.ANSWERED or self._decided is True
                await self._look_again(cluster, ended_by_commit=ended_by_commit, commit=commit)
                await self._sweep(producer, cluster, leaders, commit=commit)
        except BaseException:
            await discard(producer, 0)
            raise
        self._decided = None
        self._all_is_complete()
        self._say_what_is_left_out()
        return producer

    def _all_is_complete(self) -> None:
        """Take note that a sweep has ended whatever was open."""
        self._last.clear()
        self._forgotten.clear()

    def _say_what_is_left_out(self) -> None:
        left_out = self._dead_letters is not None and self._dead_letters not in self._swept
        if left_out and not self._dead_letters_left_out:
            log.warning("dead letter topic is gone or denied: no dead letter can be written", **self._where())
        self._dead_letters_left_out = left_out

    async def _sweep_again(self) -> None:
        """Complete a commit that was answered, wherever it has been forgotten.

        Raises:
            KafkaError, OSError, TimeoutError, ClusterUnavailable, ClusterRefusal, _NotSwept: it may not be complete;
                the producer is done for.
        """
        producer = self._producer
        assert producer is not None
        async with asyncio.timeout(STEP_TIMEOUT_SECONDS), self._ask_cluster() as cluster:
            leaders = await self._leaders(cluster)
            await self._look(cluster, leaders)  # as long as there is nothing that could be aborted
            await self._sweep(producer, cluster, leaders, commit=True)
        self._all_is_complete()

    # ------------------------------------------------------------------------------------------ what is forgotten

    async def _look(self, cluster: Cluster, leaders: dict[TopicPartition, object]) -> TransactionState | None:
        """Find what a broker has forgotten of the last commit, and what has become of what was found before.

        A reader of committed records comes as far as where the oldest open transaction begins. That is the last commit,
        for a record is of one transaction, or it is an older one, behind which nothing can be seen: it will end. Where
        it is neither, the last commit is complete; or nobody can tell, as the coordinator has aborted something by
        itself. What cannot be told stays in :attr:`_last`.

        Args:
            cluster: To be asked.
            leaders: All that can be looked at.

        Returns:
            How far what came last has come; None from a broker that does not tell.

        Raises:
            ClusterUnavailable, ClusterRefusal: no answer.
            _NotSwept: there is an older one.
        """
        told = bool(self._last)
        while True:
            state = await cluster.transaction(self._transactional_id)
            if state is not None and state.committed and self._commit is _Commit.ASKED:
                self._took()
            self._forget_what_is_gone(leaders)
            targets = self._last.keys() | self._forgotten.keys()
            if not targets:
                return state
            while state is not None and state.marking:  # what is open until then is not forgotten
                await asyncio.sleep(MARKERS_SECONDS)
                state = await cluster.transaction(self._transactional_id)
            stable = await cluster.offsets(targets, LATEST, committed_only=True)
            before, state = state, await cluster.transaction(self._transactional_id)
            self._part_what_has_ended(stable, by_commit=self._ended_by_commit(state))
            for target in [target for target, written in self._last.items() if stable[target] == written.first]:
                log.warning("a broker has forgotten a commit", **self._where(), into=target.topic)
                self._forgotten[target] = self._last.pop(target)
            if state == before:
                break
        undecided = state is None or state.committed is None
        hidden = any(stable[target] < written.first for target, written in self._last.items())
        if hidden and undecided and time.monotonic() < self._hidden_until:
            raise _NotSwept("an older transaction of somebody else hides whether the last commit is complete")
        for target, written in list(self._last.items()):
            if 0 <= written.first < stable[target] and (state is None or state.committed is not False):
                del self._last[target]
        if told:
            self._last_is_told = not self._last
        return state

    async def _look_again(self, cluster: Cluster, *, ended_by_commit: bool, commit: bool) -> None:
        """Tell what has to be written again, when nothing but the sweep can end what is open.

        Args:
            cluster: To be asked.
            ended_by_commit: Whether what has ended since it was looked at last was committed.
            commit: Whether the sweep commits, and so completes what is still open.

        Raises:
            ClusterUnavailable, ClusterRefusal: no answer.
        """
        if not commit:
            for target in list(self._forgotten):
                self._write_again(target)
        elif self._forgotten:
            stable = await cluster.offsets(self._forgotten, LATEST, committed_only=True)
            self._part_what_has_ended(stable, by_commit=ended_by_commit)

    def _ended_by_commit(self, state: TransactionState | None) -> bool:
        """Tell whether what has ended was committed, as far as *state* tells.

        After an answered commit a broker that does not tell is believed to have only been late with its markers.
        """
        return self._commit is _Commit.ANSWERED if state is None else state.committed is True

    def _part_what_has_ended(self, stable: Mapping[Partition, int], *, by_commit: bool) -> None:
        """Keep no longer what is not open any more: it is complete, or has to be written again."""
        for target in [target for target, written in self._forgotten.items() if stable[target] > written.first]:
            if by_commit:
                del self._forgotten[target]
            else:
                self._write_again(target)

    def _write_again(self, target: TopicPartition) -> None:
        written = self._forgotten.pop(target)
        log.warning("what was forgotten is aborted: written again", **self._where(), into=target.topic)
        self._again.extend(written.items)

    def _forget_what_is_gone(self, leaders: dict[TopicPartition, object]) -> None:
        """Leave out what went to a topic that is gone or denied: nobody can tell of it, nor make it good."""
        for target in self._last.keys() - leaders.keys():
            del self._last[target]
        lost = [item for item in self._again if item.target not in leaders]
        for target in self._forgotten.keys() - leaders.keys():
            lost.extend(self._forgotten.pop(target).items)
        if lost:
            self._again = [item for item in self._again if item.target in leaders]
            log.error("forgotten dead letters are lost: their topic is gone or denied", **self._where(), **_which(lost))

    def _give_up_what_cannot_be_told(self) -> None:
        """Say what may be lost, unless it was decided to be committed: what is left of it then will be."""
        if self._decided is not True:
            for target, written in self._last.items():
                log.error(
                    "it cannot be told whether the last commit is complete: compare the responses to these offsets",
                    **self._where(),
                    into=target.topic,
                    **_which(written.items),
                )
        self._last.clear()

    # ------------------------------------------------------------------------------------------ the markers

    async def _leaders(self, cluster: Cluster) -> dict[TopicPartition, object]:
        """Wait until all that has to be swept is led; return who leads it, None from a broker that does not tell.

        Raises:
            ClusterUnavailable: that takes too long.
            ClusterRefusal: not authorised to know.
            _NotSwept: there is no output topic.
        """
        letters = self._dead_letters
        targets = [self._output] if letters is None or self._dead_letters_denied else [self._output, letters]
        told = await cluster.marker_leaders(self._transactional_id, self._group_id, targets)
        if told is None:
            return dict.fromkeys(targets)
        if self._output not in told:
            raise _NotSwept(f"topic {self._output.topic} has no partition {self._output.partition}, or it is denied")
        return {target: told[target] for target in targets if target in told}

    async def _sweep(
        self, producer: AIOKafkaProducer, cluster: Cluster, leaders: dict[TopicPartition, object], *, commit: bool
    ) -> None:
        """End a transaction without records on all partitions that are written to, that of the offsets included.

        Args:
            producer: In no transaction.
            cluster: To be asked.
            leaders: What is swept, and who leads it.
            commit: Whether what has been forgotten there is part of a commit that took effect; else it is aborted.

        Raises:
            KafkaError: it could not be ended; the producer is done for.
            ClusterUnavailable, ClusterRefusal, _NotSwept: it may not have been ended everywhere; so is it then.
        """
        sender, transactions = producer._sender, producer._txn_manager  # noqa: SLF001 - a test holds the release to them
        self._swept.clear()
        try:
            with its_assertions_are_failures():
                await producer.begin_transaction()
                nobody_waits_for(producer)
                for target in leaders:
                    transactions.maybe_add_partition_to_txn(target)
                while not await sender._do_add_offsets_to_txn(self._group_id):  # noqa: SLF001 - above
                    pass  # it has waited, and the caller has a deadline
                ending = transactions.wait_for_transaction_end()
                if ending.done():  # it has failed; an abort would end it here alone, without any marker
                    ending.result()
                await (producer.commit_transaction() if commit else producer.abort_transaction())
        except TopicAuthorizationFailedError as error:
            self._dead_letters_denied = self._dead_letters is not None and self._dead_letters.topic in error.args[0]
            raise
        while (state := await cluster.transaction(self._transactional_id)) is not None and not state.complete:  # noqa: ASYNC110 - a broker's event
            await asyncio.sleep(MARKERS_SECONDS)
        if await self._leaders(cluster) != leaders:
            raise _NotSwept("a partition had no leader for a moment while it was swept")
        self._swept.update(leaders)

    async def _throw_away(self) -> None:
        """End the producer. Cancellation: it is still ours, and has to be thrown away again."""
        if self._producer is not None:
            await discard(self._producer, 0 if self._failures else DISCARD_TIMEOUT_SECONDS)
            self._producer = None

    async def _back_off(self) -> None:
        await asyncio.sleep(BACKOFF_SECONDS[min(self._failures - 1, len(BACKOFF_SECONDS) - 1)])

    def _where(self) -> dict[str, object]:
        return {"topic": self._partition.topic, "partition": self._partition.partition}

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error)


def _which(items: Sequence[_Item]) -> dict[str, object]:
    """Return what the log says of records: how many, and between which offsets of the input."""
    return {"records": len(items), "from_offset": items[0].token, "to_offset": items[-1].token}
