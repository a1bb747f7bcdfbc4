"""An object never goes back in time, whatever members replay, lose, take for dead and see come back (contract 5).

A simulation: records of two partitions are run by members over the same storage, each record's operations on one object
one after the other, as the service does it. Every call to a backend is a step of its own, and one seed decides which
step is next, which call fails before or after its effect, which request is still on its way when its caller has been
told that it failed, and when another member takes a partition over, from a commit that lies anywhere below what is
finished, while the former one goes on with what it has begun.

After every single step the objects are looked at. What is there comes from a record, and records of an object have a
number: it never falls, nor below that of any operation that was answered. In the end it is the last one, and nothing
is left over in the long-term tier.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumer.ids import ObjectContext, ObjectId
from consumer.operations import DEFAULT_METADATA, Position
from consumer.storage.backend import Tombstone
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.metadata import FORBIDDEN_FOR
from consumer.storage.tiered import TieredStorage
from failures import Away, revisions, tombstones
from storage_model import Clock
from weather import Unreliable, Weather

CONTEXT = ObjectContext("simulation")
THRESHOLD = 8
PARTITIONS, KEYS, RECORDS = 2, 2, 6
"""Small, so that members meet: each partition has two objects of its own, and six records."""

STEPS_MAX = 20_000
"""A run takes a few hundred."""

MEMBERS_MAX = 6
FAILING = 0.1
LOOP_TURNS = 15
"""More than lie between two calls to a backend."""


class StepByStep(Weather):
    """Which call to a backend goes on next is drawn too."""

    def __init__(self, random: Random) -> None:
        super().__init__(random, FAILING)
        self.waiting: list[asyncio.Future[None]] = []

    async def before(self) -> None:
        """Wait to be the next."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        await turn

    async def after(self) -> None:
        """Hear at once: what others do before is drawn where they begin."""


class Simulation:
    """Two partitions, their records, and the members that have owned them."""

    def __init__(self, seed: int, *, fenced: bool = True) -> None:
        self.random = Random(seed)
        self.weather = StepByStep(self.random)
        self.clock = Clock()
        self.fenced = fenced
        self.high_volume, self.long_term = MemoryBackend(clock=self.clock), MemoryBackend(clock=self.clock)
        self.logs: list[MemoryChangeLog] = []
        self.storages: list[TieredStorage] = []
        self.records = [
            [
                (self.random.randrange(KEYS), self.random.choice(("delete", "small", "large")))
                for _ in range(RECORDS)
            ]
            for _ in range(PARTITIONS)
        ]
        self.floor: dict[tuple[int, int], int] = {}
        """For each object the highest offset that has been seen in it, or answered."""
        self.finished: list[set[int]] = [set() for _ in range(PARTITIONS)]
        self.members: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Run everything; raises where an object went back."""
        for partition in range(PARTITIONS):
            self._take_over(partition)
        try:
            await self._play()
        finally:
            self.weather.failing = 0.0
            await self._let_go_on(*self.members, *(storage.join() for storage in self.storages))
        self.clock.advance(FORBIDDEN_FOR.total_seconds() + 1)
        await self._let_go_on(*(storage.recover() for storage in self.storages))
        self._judge()

    async def _play(self) -> None:
        """Take one step after the other until every member has run its records."""
        random, weather = self.random, self.weather
        for _ in range(STEPS_MAX):
            await _settled()
            self._look()
            if all(member.done() for member in self.members) and not weather.late:
                return
            if random.random() < 0.02 and len(self.members) < MEMBERS_MAX:
                self._take_over(random.randrange(PARTITIONS))
            elif weather.late and (random.random() < 0.1 or not weather.waiting):
                late = weather.late.pop(random.randrange(len(weather.late)))
                await asyncio.gather(late.arrive(), return_exceptions=True)
            elif weather.waiting:
                weather.waiting.pop(random.randrange(len(weather.waiting))).set_result(None)
        raise AssertionError("no end to it")

    async def _let_go_on(self, *works: Awaitable[Any]) -> None:
        """Let everybody come to an end, clean-ups too."""
        ends = asyncio.gather(*works)
        while not ends.done():
            await _settled()
            while self.weather.waiting:
                self.weather.waiting.pop().set_result(None)
        await ends

    def _judge(self) -> None:
        for partition, records in enumerate(self.records):
            for key in range(KEYS):
                last = [(offset, kind) for offset, (at, kind) in enumerate(records) if at == key][-1:]
                expected = last[0][0] if last and last[0][1] != "delete" else None
                assert self._seen(partition, key) == expected, "the last record is not what is there"
        assert revisions(self.long_term) == tombstones(self.high_volume)
        assert not any(log._changes for log in self.logs)

    def _take_over(self, partition: int) -> None:
        """Let a new member own a partition: it begins at a commit, not above anything unfinished."""
        finished = self.finished[partition]
        watermark = next(offset for offset in range(RECORDS + 1) if offset not in finished)
        start = self.random.randint(0, watermark)
        log = MemoryChangeLog(clock=self.clock)
        storage = TieredStorage(
            cast("Any", Unreliable(self.high_volume, self.weather)),
            cast("Any", Unreliable(self.long_term, self.weather)),
            cast("Any", Unreliable(log, self.weather)),
            THRESHOLD,
            clock=self.clock,
        )
        storage.changes._delay = lambda _failed: 0.0
        self.logs.append(log)
        self.storages.append(storage)
        self.members.append(asyncio.create_task(self._own(storage, partition, start)))

    async def _own(self, storage: TieredStorage, partition: int, start: int) -> None:
        await asyncio.gather(*(self._in_order(storage, partition, key, start) for key in range(KEYS)))

    async def _in_order(self, storage: TieredStorage, partition: int, key: int, start: int) -> None:
        """Run the records of one object; each is tried until it is answered."""
        for offset in range(start, RECORDS):
            at, kind = self.records[partition][offset]
            if at != key:
                continue
            while True:
                try:
                    await self._operate(storage, partition, key, offset, kind)
                except Away:
                    continue
                break
            self.finished[partition].add(offset)
            self.floor[partition, key] = max(self.floor.get((partition, key), -1), offset)

    async def _operate(self, storage: TieredStorage, partition: int, key: int, offset: int, kind: str) -> None:
        object_id = ObjectId(CONTEXT, f"{partition}/{key}")
        position = (Position(f"topic/{partition}", offset),) if self.fenced else ()
        if kind == "delete":
            await storage.delete(object_id, *position)
        else:
            payload = bytes([offset]) * (3 if kind == "small" else THRESHOLD + 3)
            await storage.put(object_id, DEFAULT_METADATA, payload, *position)

    def _seen(self, partition: int, key: int) -> int | None:
        """Return the offset of the record whose payload is there now, None where nothing is."""
        row = self.high_volume._live_row(ObjectId(CONTEXT, f"{partition}/{key}").storage_path)
        if row is None:
            return None
        found = self.long_term._revisions[row.target.name] if isinstance(row, Tombstone) else row
        payload = cast("bytes", found.payload)
        assert set(payload) == {payload[0]}, "torn"
        return payload[0]

    def _look(self) -> None:
        """Assert that no object has gone back."""
        for partition, records in enumerate(self.records):
            for key in range(KEYS):
                floor = self.floor.get((partition, key), -1)
                seen = self._seen(partition, key)
                if seen is not None:
                    assert seen >= floor, f"object {partition}/{key} went back from {floor} to {seen}"
                    self.floor[partition, key] = seen
                elif floor >= 0:
                    deleted = [offset for offset, record in enumerate(records) if record == (key, "delete")]
                    assert max(deleted, default=-1) >= floor, f"object {partition}/{key} of {floor} is gone"


async def _settled() -> None:
    """Let everybody go on to their next step."""
    for _ in range(LOOP_TURNS):
        await asyncio.sleep(0)


@pytest.mark.slow
@settings(max_examples=400)
@given(seed=st.integers(0, 2**32 - 1))
def test_an_object_never_goes_back_in_time(seed: int) -> None:
    """And no replay leaves anything behind."""
    asyncio.run(Simulation(seed).run())


@pytest.mark.slow
def test_without_positions_objects_do_go_back() -> None:
    """What the simulation is there to find, it finds: within a few seeds, and with every kind of fault."""
    happened: set[str] = set()
    caught = members = 0
    for seed in range(60):
        simulation = Simulation(seed, fenced=False)
        try:
            asyncio.run(simulation.run())
        except AssertionError:
            caught += 1
        happened |= simulation.weather.happened
        members += len(simulation.members)

    assert caught >= 10
    assert members >= 150
    assert happened == {"before", "after", "late"}
