"""A model of the storage: members that write the same objects at once, whatever befalls their calls and themselves.

A :class:`Model` has members, each with a storage of its own over the same backends, and knows for each object the set
of values that it may hold. What can be done to it: run operations of several members at once, perhaps call them off, or
have one taken for dead while it goes on; let a request arrive that was taken for lost; kill a member; recover; let time
pass. Held all along, and when all has settled:

* what can be read is whole, and a value that somebody wrote;
* a write that was acknowledged stays until a later one;
* what was referred to can be read until the retention is over;
* after a join and a recovery there is no tombstone to nothing, and no revision without a tombstone, unless a change
  that waits for its time names it; when that has come, there is none at all, and no change.

Who draws what happens is outside: a hypothesis state machine, which makes a failure small
(`properties/test_tiered.py`), or a seed, which is quick (:func:`play`). ``make soak`` plays a hundred times as many as
the suite (``SOAK_OPERATIONS``).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Protocol, Self, TypeAlias, cast
from uuid import UUID

from consumer.errors import TierstreamError
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import DEFAULT_METADATA, Metadata, PayloadReference
from consumer.storage.backend import Change, ChangeLog, Payload, Revision, Tombstone
from consumer.storage.handouts import is_copy
from consumer.storage.memory import MemoryChangeLog
from consumer.storage.metadata import FORBIDDEN_FOR
from consumer.storage.tiered import TieredStorage
from failures import Away, Referenced
from weather import Unreliable, Weather

THRESHOLD = 8
CONTEXT = ObjectContext("model")
KEYS = ("a", "b")
SIZES = (0, 3, THRESHOLD, THRESHOLD + 1, 20)
KINDS = ("put", "put", "put", "delete", "get", "head")
MEMBERS = 2
RETENTION_SECONDS = 100.0

PART_OPERATIONS = 20_000
"""What a processor does at a time, from a seed of its own."""

EPISODE_STEPS = 25
OPERATIONS_MAX = 6
"""Of a batch. Fewer than 256 in an episode: payloads are told apart by one byte."""

TURNS_MAX = 60
"""Of the loop, until something befalls a batch: about as many as the longest operation takes."""

Value: TypeAlias = bytes | None
Operation: TypeAlias = tuple[int, str, str, int, bool]
"""Member, kind, key, size, and whether the payload comes in chunks."""


class Clock:
    """A wall clock that moves when told to; :meth:`seconds` is the same as a monotonic clock."""

    def __init__(self) -> None:
        self.time = self._start = datetime(2096, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def advance(self, seconds: float) -> None:
        """Move on."""
        self.time += timedelta(seconds=seconds)

    def seconds(self) -> float:
        """Return the seconds passed since a start a day ago."""
        return 86_400.0 + (self.time - self._start).total_seconds()


class Place(Protocol):
    """Where the storage of a model lies: backends for all members, a change log for each."""

    high_volume: Any
    long_term: Any
    lease_seconds: float

    def open_log(self, member: int) -> ChangeLog:
        """Open the log of a member that begins; what its former self has left it may recover at once."""
        ...

    def end_log(self, member: int) -> None:
        """Let a member be dead for all others, whether it is or not."""
        ...

    async def close(self) -> None:
        """Close whatever was opened."""
        ...


class InMemory:
    """Everything in memory, kept by the model."""

    lease_seconds = 30.0

    def __init__(self, clock: Clock) -> None:
        self.high_volume = self.long_term = Referenced(clock=clock)
        self.changes: dict[UUID, Change] = {}
        self.holders: dict[UUID, object] = {}
        self.alive: set[object] = set()
        self._logs: dict[int, MemberLog] = {}
        self._clock = clock

    def open_log(self, member: int) -> ChangeLog:
        """Open one that shares all entries."""
        self._logs[member] = MemberLog(self, self._clock)
        return self._logs[member]

    def end_log(self, member: int) -> None:
        """Let the lease be over."""
        self.alive.discard(self._logs[member])

    async def close(self) -> None:
        """Nothing was opened."""


class MemberLog(MemoryChangeLog):
    """A change log whose entries outlive their member: whoever asks gets those of the dead."""

    def __init__(self, place: InMemory, clock: Clock) -> None:
        super().__init__(clock=clock)
        self._place = place
        self._changes = place.changes
        self._claimed: set[UUID] = set()
        place.alive.add(self)

    async def record(self, change: Change) -> None:
        await super().record(change)
        self._place.holders.setdefault(change.change_id, self)
        if change.not_before is not None:
            self._claimed.discard(change.change_id)
        self._place.alive.add(self)

    async def recoverable(self, after: UUID | None = None) -> Sequence[Change]:
        found = await super().recoverable(after)
        for change in found:
            self._place.holders[change.change_id] = self
            self._claimed.add(change.change_id)
        return found

    def _is_recoverable(self, change: Change) -> bool:
        if change.not_before is not None:
            return self._is_due(change)
        holder = self._place.holders[change.change_id]
        return holder not in self._place.alive or (holder is self and change.change_id in self._claimed)


class Heard:
    """A long-term tier, and what was uploaded to it."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.payloads: dict[str, bytes] = {}

    async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
        """Upload, and remember."""
        if isinstance(payload, bytes):
            self.payloads[revision.name] = payload
            return cast("int", await self._backend.put(revision, metadata, payload))
        chunks: list[bytes] = []
        written = cast("int", await self._backend.put(revision, metadata, _heard(payload, chunks)))
        self.payloads[revision.name] = b"".join(chunks)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


async def _heard(payload: AsyncIterable[bytes], chunks: list[bytes]) -> AsyncGenerator[bytes, None]:
    async for chunk in payload:
        chunks.append(chunk)
        yield chunk


class Model:
    """Members, what befalls them, and for each object the set of what it may hold.

    Args:
        make_place: Makes where the storage lies; by default in memory.
        retention: How long what was referred to stays readable; None: payloads are read, not referred to.
    """

    def __init__(
        self, make_place: Callable[[Clock], Awaitable[Place]] | None = None, retention: float | None = None
    ) -> None:
        self.runner = asyncio.Runner()
        self.weather = Weather()
        self.clock = Clock()
        self.happened: Counter[str] = Counter()
        self.possible: dict[str, set[Value]] = {key: {None} for key in KEYS}
        self.operations = 0
        self._retention = retention
        self._payloads = 0
        self._promised: list[tuple[PayloadReference, bytes, datetime]] = []
        """What was handed out, what it led to, and until when it has to."""
        self.storages: list[TieredStorage] = []

        async def make() -> None:
            self.place: Place = InMemory(self.clock) if make_place is None else await make_place(self.clock)
            self._heard = Heard(self.place.long_term)
            self.storages += [self._storage(member) for member in range(MEMBERS)]

        self.runner.run(make())

    def _storage(self, member: int) -> TieredStorage:
        self._log: Any = self.place.open_log(member)
        storage = TieredStorage(
            cast("Any", Unreliable(self.place.high_volume, self.weather)),
            cast("Any", Unreliable(self._heard, self.weather)),
            cast("Any", Unreliable(self._log, self.weather)),
            THRESHOLD,
            handout_seconds=self._retention,
            clock=self.clock,
        )
        storage.changes._delay = lambda _failed: 0.0
        return storage

    # ------------------------------------------------------------------------------------------- what can be done

    def batch(
        self,
        operations: Sequence[Operation],
        seed: int,
        failing: float,
        *,
        cancelled_after: int | None = None,
        buried: tuple[int, int] | None = None,
    ) -> None:
        """Run operations at once, in the weather of *seed*.

        Call them off some turns of the loop later, or have a member taken for dead then, which goes on all the same:
        another one recovers what it is doing. *buried* is who, and when.
        """
        self.weather.random, self.weather.failing = Random(seed), failing
        self.runner.run(self._batch(operations, cancelled_after, buried))
        self.weather.random = None

    def kill(self, member: int) -> None:
        """Let a process die, none of its clean-ups taking another step, and start it again."""
        self.happened["killed"] += 1

        async def die_and_start() -> None:
            await _stop(self.storages[member])
            self.place.end_log(member)
            self.storages[member] = self._storage(member)

        self.runner.run(die_and_start())

    def recover(self, member: int, seed: int, failing: float) -> None:
        """Let a member recover what there is, in bad weather."""
        self.weather.random, self.weather.failing = Random(seed), failing
        self.runner.run(_unless_away(self.storages[member].recover()))
        self.weather.random = None

    def arrive(self, index: int) -> None:
        """Let a request arrive whose caller was told that it had failed: it counts, or is refused for good."""
        if not self.weather.late:
            return
        late = self.weather.late[index % len(self.weather.late)]
        self.happened["late"] += 1
        self.possible[late.object_key] |= self._late(late.object_key)
        self.weather.late.remove(late)
        self.runner.run(_unless_away(late.arrive()))

    def wait(self, seconds: float) -> None:
        """Let time pass, and recovery with it."""
        self.clock.advance(seconds)
        self.recover(0, 0, 0.0)

    def settle(self) -> None:
        """With all faults over, nothing is left over, and each object holds what it may."""
        self.runner.run(self._settle())

    def settle_for_good(self) -> None:
        """Settle at last, requests that are late included."""
        self.settle()
        while self.weather.late:
            self.arrive(0)
        self.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.runner.run(self._end())
        self.runner.close()

    def promises_are_kept(self) -> None:
        """Assert that whoever was referred to something finds it."""
        self._promised = [promise for promise in self._promised if promise[2] > self.clock()]
        for reference, payload, _ in self._promised:
            assert self.place.long_term.read(reference) == payload

    # --------------------------------------------------------------------------------------------------- the inside

    async def _end(self) -> None:
        for storage in self.storages:
            await _stop(storage)
        await self.place.close()

    async def _bury(self, member: int, after: int) -> None:
        for _ in range(after):
            await asyncio.sleep(0)
        self.happened["taken for dead"] += 1
        self.place.end_log(member)
        await _unless_away(self.storages[(member + 1) % MEMBERS].recover())

    async def _batch(
        self, operations: Sequence[Operation], cancelled_after: int | None, buried: tuple[int, int] | None
    ) -> None:
        attempts: list[tuple[str, str, Value, asyncio.Task[Any]]] = []
        task: asyncio.Task[Any]
        for member, kind, key, size, streamed in operations:
            storage, object_id = self.storages[member], ObjectId(CONTEXT, key)
            value: Value = None
            if kind == "put":
                self._payloads += 1
                value = bytes([self._payloads % 256]) * size
                payload = _streamed(value) if streamed else value
                task = asyncio.create_task(storage.put(object_id, DEFAULT_METADATA, payload))
            elif kind == "get":
                task = asyncio.create_task(self._get(storage, object_id))
            else:
                task = asyncio.create_task(getattr(storage, kind)(object_id))
            attempts.append((kind, key, value, task))
        burying = None if buried is None else asyncio.create_task(self._bury(*buried))
        if cancelled_after is not None:
            for _ in range(cancelled_after):
                await asyncio.sleep(0)
            for *_, task in attempts:
                task.cancel()
        outcomes = await asyncio.gather(*(task for *_, task in attempts), return_exceptions=True)
        if burying is not None:
            await burying
        self.operations += len(operations)
        if any(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes):
            self.happened["called off"] += 1
        self._learn([(kind, key, value) for kind, key, value, _ in attempts], outcomes)

    async def _get(self, storage: TieredStorage, object_id: ObjectId) -> Value:
        found = await storage.get(object_id, fits=None if self._retention is None else _fits_nobody)
        if found is None:
            return None
        if not isinstance(found.payload, PayloadReference):
            assert isinstance(found.payload, bytes)
            return found.payload
        assert self._retention is not None
        payload: bytes = self.place.long_term.read(found.payload)
        self._promised.append((found.payload, payload, self.clock() + timedelta(seconds=self._retention)))
        return payload

    def _learn(self, operations: list[tuple[str, str, Value]], outcomes: list[Any]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Away | asyncio.CancelledError):
                assert isinstance(outcome, TierstreamError), repr(outcome)
                assert outcome.retriable, repr(outcome)
                self.happened["refused"] += 1
        for key, before in self.possible.items():
            written = {value for kind, at, value in operations if kind in {"put", "delete"} and at == key}
            readable = before | written | self._late(key)
            acknowledged = False
            for (kind, at, _), outcome in zip(operations, outcomes, strict=True):
                if at != key or isinstance(outcome, BaseException):
                    continue
                if kind == "get":
                    assert outcome in readable
                elif kind == "head":
                    sizes = {None if value is None else len(value) for value in readable}
                    assert (None if outcome is None else outcome.size) in sizes
                else:
                    acknowledged = True
            self.possible[key] = written if acknowledged else before | written

    def _late(self, key: str) -> set[Value]:
        """Return what *key* may come to hold at any moment, by a request still on its way."""
        values: set[Value] = set()
        for late in self.weather.late:
            if late.object_key != key:
                continue
            if isinstance(late.write, Tombstone):
                values.add(self._heard.payloads[late.write.target.name])
            else:
                values.add(cast("Value", late.write))
        return values

    async def _settle(self) -> None:
        for storage in self.storages:
            await storage.join()
        self.promises_are_kept()
        self.clock.advance(max(self.place.lease_seconds, self._retention or 0.0) + 1)
        await self._recover()
        await self._look(with_changes=True)
        if not self.weather.late:  # what is late arrives within a day
            self.clock.advance(FORBIDDEN_FOR.total_seconds() + 1)
            await self._recover()
            await self._look(with_changes=False)
        for key, possible in self.possible.items():
            found = await self.storages[0].get(ObjectId(CONTEXT, key))
            payload = None if found is None else found.payload
            assert payload in possible, f"{payload!r} is none of {possible}"
            assert payload is None or isinstance(payload, bytes)
            self.possible[key] = {payload}

    async def _recover(self) -> None:
        for storage in self.storages:
            await storage.recover()
            await storage.join()

    async def _look(self, *, with_changes: bool) -> None:
        """Assert that every revision has its tombstone, or a change that waits, and every tombstone its revision."""
        place = self.place
        revisions = {one.name async for one in place.long_term.scan_revisions() if not is_copy(one.name)}
        pointed = {target.name async for _, target in place.high_volume.scan_tombstones()}
        changes = [change async for _, change in self._log.scan_changes()]
        waiting = {one.name for change in changes for one in (change.old, change.new) if one is not None}
        assert not pointed - revisions, "a tombstone points to nothing"
        assert not revisions - pointed - (waiting if with_changes else set()), "an orphan"
        assert all(change.not_before is not None for change in changes), "an unfinished change"
        assert with_changes or not changes, "a change is left over"


def play(seed: int, model: Model) -> int:
    """Play one episode, drawn from *seed*; return the number of operations in it."""
    random_ = Random(seed)
    with model:
        for _ in range(EPISODE_STEPS):
            _step(model, random_)
            model.promises_are_kept()
        model.settle_for_good()
    return model.operations


def _step(model: Model, random_: Random) -> None:
    draw = random_.random()
    seed, failing = random_.getrandbits(32), random_.choice((0.0, 0.1, 0.4))
    member = random_.randrange(MEMBERS)
    if draw < 0.6:
        operations = [
            (
                random_.randrange(MEMBERS),
                random_.choice(KINDS),
                random_.choice(KEYS),
                random_.choice(SIZES),
                random_.random() < 0.3,
            )
            for _ in range(random_.randint(1, OPERATIONS_MAX))
        ]
        turns = random_.randint(0, TURNS_MAX)
        what = random_.random()
        if what < 0.25:
            model.batch(operations, seed, failing, cancelled_after=turns)
        elif what < 0.5:
            model.batch(operations, seed, failing, buried=(member, turns))
        else:
            model.batch(operations, seed, failing)
    elif draw < 0.75:
        model.arrive(seed)
    elif draw < 0.85:
        model.kill(member)
    elif draw < 0.9:
        model.recover(member, seed, failing)
    elif draw < 0.96:
        model.wait(random_.uniform(0, 150))
    else:
        model.settle()


async def _stop(storage: TieredStorage) -> None:
    """Let no clean-up and no recovery of a storage take another step."""
    changes = storage.changes
    if changes._next_recovery is not None:
        changes._next_recovery.cancel()
    tasks = list(changes._tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _fits_nobody(_metadata: Metadata) -> bool:
    return False


async def _streamed(payload: bytes) -> AsyncGenerator[bytes, None]:
    for at in range(0, len(payload), 5):
        yield payload[at : at + 5]


async def _unless_away(step: Awaitable[Any]) -> None:
    """Do something that may be refused, to be tried again."""
    try:
        await step
    except TierstreamError as error:
        assert error.retriable  # noqa: PT017 - one of two right answers


def play_many(operations: int, first_seed: int, make_model: Callable[[int], Model] | None = None) -> Counter[str]:
    """Play episodes of one seed after the other until there were so many operations; return what happened in them.

    By default everything is in memory, and every other episode reads by reference.
    """
    happened: Counter[str] = Counter()
    seed = first_seed
    while happened["operations"] < operations:
        model = _in_memory(seed) if make_model is None else make_model(seed)
        try:
            play(seed, model)
        except BaseException as error:
            error.add_note(f"episode of seed {seed}")
            raise
        happened += model.happened
        happened.update({"operations": model.operations, "episodes": 1, **dict.fromkeys(model.weather.happened, 1)})
        seed += 1
    return happened


def _in_memory(seed: int) -> Model:
    return Model(retention=RETENTION_SECONDS if seed % 2 else None)


def soak(operations: int, seed: int) -> Counter[str]:
    """Play in all processors; return what happened. Raises where something went wrong."""
    happened: Counter[str] = Counter()
    parts = -(-operations // PART_OPERATIONS)
    with ProcessPoolExecutor(os.cpu_count(), initializer=logging.disable, initargs=(logging.WARNING,)) as processes:
        seeds = (seed + number * PART_OPERATIONS for number in range(parts))
        for part in processes.map(play_many, [PART_OPERATIONS] * parts, seeds):
            happened += part
    return happened
