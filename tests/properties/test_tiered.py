"""Tiered storage under any mix of writers, failures, cancellations, crashes: objects stay whole, nothing is left over.

A state machine applies random batches of concurrent operations over backends that suspend, fail before or after their
effect, or carry out a swap only after its caller has been told that it failed. Now and then the process dies, or all is
allowed to settle. Each payload is unique and uniform, so that a torn or mixed one shows.

A second machine reads by reference: every one that was handed out leads to its payload until the retention is over,
whatever befalls the object and the process; and then nothing is left over either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, TypeAlias, cast
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from consumer.errors import TierstreamError
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import DEFAULT_METADATA, PayloadReference, StoredObject
from consumer.storage.backend import Change, Tombstone
from consumer.storage.memory import MemoryBackend
from consumer.storage.tiered import TieredStorage
from failures import Away, DurableLog, Referenced, assert_nothing_left_over

THRESHOLD = 8
CONTEXT = ObjectContext("machine")
KEYS = st.sampled_from(["a", "b"])
SIZES = st.sampled_from([0, 3, THRESHOLD, THRESHOLD + 1, 20])
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "put", "delete", "get", "head"]), KEYS, SIZES, st.booleans()),
    min_size=1,
    max_size=5,
)

Value: TypeAlias = bytes | None
Late: TypeAlias = tuple[str, str, Callable[[], Awaitable[bool]]]
"""A swap still on its way: key, revision, and what lets it arrive."""


class Weather:
    """What befalls the calls to all backends: drawn anew for each batch."""

    def __init__(self) -> None:
        self.random: Random | None = None
        self.failing = 0.0
        self.late: list[Late] = []
        self.seen: set[str] = set()

    async def pass_time(self) -> None:
        """Let others run, or not."""
        if self.random is not None:
            for _ in range(self.random.choice((0, 0, 1, 2, 10))):
                await asyncio.sleep(0)

    def fault(self, *kinds: str) -> str:
        """Draw what happens to a call; most of the time nothing."""
        if self.random is None or self.random.random() >= self.failing:
            return "none"
        kind = self.random.choice(kinds)
        self.seen.add(kind)
        return kind


class Unreliable:
    """A backend in the weather."""

    def __init__(self, backend: object, weather: Weather) -> None:
        self._backend = backend
        self._weather = weather

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        if name in {"join", "close", "owner"}:
            return method

        async def call(*given: Any) -> Any:
            weather = self._weather
            await weather.pass_time()
            swap = name == "compare_and_write" and isinstance(given[2], Tombstone)
            fault = weather.fault("before", "after", "late") if swap else weather.fault("before", "after")
            if fault == "late":
                object_id, _, write, *_ = given
                weather.late.append((object_id.key, write.target.name, lambda: method(*given)))
            if fault in {"before", "late"}:
                raise Away("away")
            answer = await method(*given)
            await weather.pass_time()
            if fault == "after":
                raise Away("answer lost")
            return answer

        return call


class Clock:
    """A wall clock that moves when told to."""

    def __init__(self) -> None:
        self.time = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def advance(self, seconds: float) -> None:
        """Move on."""
        self.time += timedelta(seconds=seconds)


class Machine(RuleBasedStateMachine):
    """A storage, and for each key the set of what it may hold."""

    retention: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.weather = Weather()
        self.clock = Clock()
        self.high_volume, self.long_term = MemoryBackend(clock=self.clock), Referenced(clock=self.clock)
        self.entries: dict[UUID, Change] = {}
        self.possible: dict[str, set[Value]] = {"a": {None}, "b": {None}}
        self.payloads = 0

    @initialize()
    def start(self) -> None:
        """Make a storage over what there is; recovery begins in the background."""
        self.log = DurableLog(self.entries, self.clock)

        async def make() -> TieredStorage:
            storage = TieredStorage(
                cast("Any", Unreliable(self.high_volume, self.weather)),
                cast("Any", Unreliable(self.long_term, self.weather)),
                cast("Any", Unreliable(self.log, self.weather)),
                THRESHOLD,
                handout_seconds=self.retention,
                clock=self.clock,
            )
            storage.changes._delay = lambda _failed: 0.0
            return storage

        self.storage = self.runner.run(make())

    @rule(
        operations=OPERATIONS,
        seed=st.integers(0, 2**32 - 1),
        failing=st.sampled_from([0.0, 0.1, 0.4]),
        cancelled_after=st.none() | st.integers(0, 30),
        dies=st.booleans(),
    )
    def batch(
        self,
        operations: list[tuple[str, str, int, bool]],
        seed: int,
        failing: float,
        cancelled_after: int | None,
        dies: bool,
    ) -> None:
        """Run operations at once; cancel them some time later, perhaps because the process dies."""
        self.weather.random, self.weather.failing = Random(seed), failing
        self.runner.run(self._batch(operations, cancelled_after, dies=dies and cancelled_after is not None))
        self.weather.random = None
        if dies and cancelled_after is not None:
            self.start()

    async def _batch(
        self, operations: list[tuple[str, str, int, bool]], cancelled_after: int | None, *, dies: bool
    ) -> None:
        attempts: list[tuple[str, str, Value, asyncio.Task[Any]]] = []
        task: asyncio.Task[Any]
        for kind, key, size, streamed in operations:
            object_id = ObjectId(CONTEXT, key)
            value: Value = None
            if kind == "put":
                self.payloads += 1
                value = bytes([self.payloads % 256]) * size
                payload = _streamed(value) if streamed else value
                task = asyncio.create_task(self.storage.put(object_id, DEFAULT_METADATA, payload))
            elif kind == "get":
                task = asyncio.create_task(self._get(object_id))
            else:
                task = asyncio.create_task(getattr(self.storage, kind)(object_id))
            attempts.append((kind, key, value, task))
        if cancelled_after is not None:
            for _ in range(cancelled_after):
                await asyncio.sleep(0)
            for *_, task in attempts:
                task.cancel()
        outcomes = await asyncio.gather(*(task for *_, task in attempts), return_exceptions=True)
        if dies:
            await _kill(self.storage)
        self._learn([(kind, key, value) for kind, key, value, _ in attempts], outcomes)

    async def _get(self, object_id: ObjectId) -> StoredObject | None:
        return await self.storage.get(object_id)

    def _learn(self, operations: list[tuple[str, str, Value]], outcomes: list[Any]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Away | asyncio.CancelledError):
                assert isinstance(outcome, TierstreamError), repr(outcome)
                assert outcome.retriable, repr(outcome)
        for key, before in self.possible.items():
            written = {value for kind, at, value in operations if kind in {"put", "delete"} and at == key}
            readable = before | written | self._late(key)
            acknowledged = False
            for (kind, at, _), outcome in zip(operations, outcomes, strict=True):
                if at != key or isinstance(outcome, BaseException):
                    continue
                if kind == "get":
                    assert (None if outcome is None else outcome.payload) in readable
                elif kind == "head":
                    sizes = {None if value is None else len(value) for value in readable}
                    assert (None if outcome is None else outcome.size) in sizes
                else:
                    acknowledged = True
            self.possible[key] = written if acknowledged else before | written

    def _late(self, key: str) -> set[Value]:
        """Return what *key* may come to hold at any moment, by a swap still on its way."""
        there = self.long_term._revisions
        return {cast("bytes", there[name].payload) for at, name, _ in self.weather.late if at == key and name in there}

    @precondition(lambda self: self.weather.late)
    @rule(index=st.integers(0, 10))
    def arrive(self, index: int) -> None:
        """Let a swap arrive whose caller was told that it had failed: it counts, or is refused for good."""
        index %= len(self.weather.late)
        key, _, swap = self.weather.late[index]
        self.possible[key] |= self._late(key)
        del self.weather.late[index]
        try:
            self.runner.run(_awaited(swap()))
        except TierstreamError as error:
            assert error.retriable  # noqa: PT017 - refusing is one of two right answers

    @rule()
    def settle(self) -> None:
        """With all faults over, what is left is what rows point to, and each object is one that it may be."""
        self.runner.run(self._settle())

    async def _settle(self) -> None:
        await self.storage.join()
        await self._wait_for_readers()
        await assert_nothing_left_over(self.high_volume, self.long_term, self.log)
        for key, possible in self.possible.items():
            found = await self.storage.get(ObjectId(CONTEXT, key))
            payload = None if found is None else found.payload
            assert payload in possible
            assert payload is None or isinstance(payload, bytes)
            self.possible[key] = {payload}

    async def _wait_for_readers(self) -> None:
        """Let the time pass for which something is kept."""

    def teardown(self) -> None:
        """Settle at last, late swaps included: those are refused now."""
        self.settle()
        while self.weather.late:
            self.arrive(0)
            self.settle()
        self.runner.close()


async def _streamed(payload: bytes) -> Any:
    for at in range(0, len(payload), 5):
        yield payload[at : at + 5]


async def _awaited(step: Awaitable[Any]) -> Any:
    return await step


async def _kill(storage: TieredStorage) -> None:
    """Let the process die: no clean-up takes another step."""
    for task in storage.changes._tasks:
        task.cancel()
    await asyncio.gather(*storage.changes._tasks, return_exceptions=True)


class ReferringMachine(Machine):
    """The same, read by callers who can take no payload."""

    retention = 100.0

    def __init__(self) -> None:
        super().__init__()
        self.promised: list[tuple[PayloadReference, bytes, datetime]] = []
        """What was handed out, what it led to, and until when it has to."""

    async def _get(self, object_id: ObjectId) -> StoredObject | None:
        found = await self.storage.get(object_id, fits=lambda _metadata: False)
        if found is None:
            return None
        assert isinstance(found.payload, PayloadReference)
        payload = self.long_term.read(found.payload)
        self.promised.append((found.payload, payload, self.clock() + timedelta(seconds=100)))
        return StoredObject(found.metadata, payload)

    @rule(seconds=st.floats(0, 150))
    def wait(self, seconds: float) -> None:
        """Let time pass, and recovery with it."""
        self.clock.advance(seconds)
        self.runner.run(_awaited(self.storage.recover()))

    @invariant()
    def promises_are_kept(self) -> None:
        """Whoever was referred to something finds it."""
        self.promised = [promise for promise in self.promised if promise[2] > self.clock()]
        for reference, payload, _ in self.promised:
            assert self.long_term.read(reference) == payload

    async def _wait_for_readers(self) -> None:
        self.promises_are_kept()
        self.clock.advance(100)
        await self.storage.recover()
        await self.storage.join()


TestTieredStorage = pytest.mark.slow(Machine.TestCase)
TestTieredStorage.settings = settings(max_examples=150, stateful_step_count=25)

TestReferringStorage = pytest.mark.slow(ReferringMachine.TestCase)
TestReferringStorage.settings = settings(max_examples=150, stateful_step_count=25)
