"""Every item is answered once, within the window, in order where order is asked for, and no permit is ever lost."""

from __future__ import annotations

import asyncio
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from consumer.errors import OperationDropped, OperationPanic
from consumer.executor import Item, Ordering, Outcome, StreamExecutor
from consumer.handler import Handler
from consumer.ids import ObjectId
from consumer.operations import Metadata, StoredObject
from consumer.permits import ConcurrencyLimiter
from consumer.storage.backend import Payload
from gates import delete, get, head, insert

KINDS = ("insert", "get", "delete", "head", "error", "nonsense")


class CallerError(Exception):
    """An error that comes in with the input."""


@dataclass
class Scenario:
    """All choices of one run."""

    things: list[tuple[str, str, int, str]]
    """For each item: kind, key, times it suspends, how it ends (``fine``, ``raise``, ``cancelled``, ``cancel``)."""
    window: int
    ordering: Ordering
    seed: int
    """Decides who goes on when: storage, input, consumer."""
    input_waits: int
    """One item in so many is waited for; 0 = none is."""
    consumer_waits: int
    """The consumer does something else after one outcome in so many; 0 = never."""
    ends_after: int | None
    """Outcomes after which the output is left; None = it is consumed to its end."""
    ends_by: str
    """``aclose``, ``executor``, ``forget`` or ``cancel``; served, ``forget`` is a delivery that fails."""
    input_error: bool
    """Whether the input ends by raising."""
    served: bool = False
    """Whether items are taken and outcomes delivered without waiting, instead of pulled and consumed."""


SCENARIOS = st.builds(
    Scenario,
    things=st.lists(
        st.tuples(
            st.sampled_from(KINDS),
            # One hot key among some others.
            st.sampled_from(["hot", "hot", "hot", "a", "b", "c", "d", "e"]),
            st.sampled_from([0, 0, 0, 1, 2, 5]),
            st.sampled_from(["fine", "fine", "fine", "fine", "raise", "cancelled", "cancel"]),
        ),
        max_size=60,
    ),
    window=st.integers(1, 12),
    ordering=st.sampled_from(["unordered", "key", "partition"]),
    seed=st.integers(0, 2**32),
    input_waits=st.integers(0, 4),
    consumer_waits=st.integers(0, 4),
    ends_after=st.one_of(st.none(), st.integers(0, 40)),
    ends_by=st.sampled_from(["aclose", "executor", "forget", "cancel"]),
    input_error=st.booleans(),
    served=st.booleans(),
)


@dataclass
class World:
    """Storage, input and consumer of one run; waits end in an order drawn from the seed."""

    scenario: Scenario
    random: Random
    waits: list[asyncio.Future[None]] = field(default_factory=list)
    pulled: int = 0
    yielded: int = 0
    outstanding_max: int = 0
    consuming: bool = False
    running: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    running_now: int = 0
    running_max: int = 0
    overlapped: bool = False
    started: list[tuple[str, int]] = field(default_factory=list)
    limiter: ConcurrencyLimiter = field(default_factory=ConcurrencyLimiter)
    lost_permits: bool = False
    waited_for: int = -1
    """The item that was last waited for, where the execution is served."""
    dry: bool = False
    """True from an item that is not at hand until it has been waited for."""

    async def wait(self) -> None:
        """Wait until the scheduler picks this wait."""
        future = asyncio.get_running_loop().create_future()
        self.waits.append(future)
        await future

    async def schedule(self) -> None:
        """End one wait after the other, for as long as anything goes on."""
        idle = 0
        while idle < 20:
            await asyncio.sleep(0)
            self.waits = [wait for wait in self.waits if not wait.done()]
            if self.waits and self.random.random() < 0.7:
                self.waits.pop(self.random.randrange(len(self.waits))).set_result(None)
            idle = 0 if self.waits else idle + 1

    # ---- storage; the payload of an insert, and the suffix of every other key, say which item a call belongs to

    async def put(self, object_id: ObjectId, metadata: Metadata, payload: Payload) -> Metadata:
        await self.apply(object_id)
        return metadata

    async def get(self, object_id: ObjectId) -> StoredObject | None:
        await self.apply(object_id)
        return None

    async def head(self, object_id: ObjectId) -> Metadata | None:
        await self.apply(object_id)
        return None

    async def delete(self, object_id: ObjectId) -> None:
        await self.apply(object_id)

    async def apply(self, object_id: ObjectId) -> None:
        """Suspend and end as the scenario says. Calls on one object take their items' turns in input order."""
        key = object_id.key
        things = enumerate(self.scenario.things)
        order = [number for number, (kind, other, *_) in things if other == key and kind in KINDS[:4]]
        number = order[sum(started == key for started, _ in self.started)]
        self.started.append((key, number))
        _, _, suspensions, ending = self.scenario.things[number]
        self.running[key] += 1
        self.running_now += 1
        self.running_max = max(self.running_max, self.running_now)
        self.overlapped = self.overlapped or self.running[key] > 1
        self.lost_permits = self.lost_permits or self.limiter.in_use != self.limiter.limit
        try:
            for _ in range(suspensions):
                await self.wait()
            match ending:
                case "raise":
                    raise ValueError(key)
                case "cancelled":
                    raise asyncio.CancelledError
                case "cancel":
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                    await self.wait()
        finally:
            self.running[key] -= 1
            self.running_now -= 1

    # ---- input

    async def inputs(self) -> Any:
        """Yield the items of the scenario; typed loosely, because some are nonsense."""
        for number in range(len(self.scenario.things)):
            if self.scenario.input_waits and number % self.scenario.input_waits == 0:
                await self.wait()
            yield self.item(number)
        if self.scenario.input_error:
            raise CallerError

    def item(self, number: int) -> Any:
        """Make one item, which is pulled by that."""
        kind, key, _, _ = self.scenario.things[number]
        self.pulled += 1
        self.outstanding_max = max(self.outstanding_max, self.pulled - self.yielded)
        return number, thing(kind, key)

    # ---- input that says what it has at hand

    def take(self) -> Any:
        """Give the next item; None where it is one that is waited for, and at the end."""
        assert not self.dry, "asked again before it was waited for"
        number, waits = self.pulled, self.scenario.input_waits
        if number == len(self.scenario.things) or (waits and number % waits == 0 and self.waited_for != number):
            self.dry = True
            return None
        return self.item(number)

    async def wait_for_input(self) -> bool:
        """Wait for the next item, or end the input as the scenario says."""
        assert self.dry, "waited for though it was at hand"
        if self.pulled < len(self.scenario.things):
            await self.wait()
            self.waited_for = self.pulled
            self.dry = False
            return True
        if self.scenario.input_error:
            raise CallerError
        return False


def thing(kind: str, key: str) -> Any:
    """Make one item's thing."""
    match kind:
        case "insert":
            return insert(key)
        case "get":
            return get(key)
        case "delete":
            return delete(key)
        case "head":
            return head(key)
        case "error":
            return CallerError(key)
        case _:
            return key


async def consume(world: World, executor: StreamExecutor, seen: list[Outcome]) -> None:
    """Consume the output as the scenario says."""
    scenario = world.scenario
    if scenario.served:
        await serve(world, executor, seen)
        return
    outcomes = executor.execute(world.inputs())
    if scenario.ends_after == 0:
        return
    try:
        async for outcome in outcomes:
            world.yielded += 1
            seen.append(outcome)
            if scenario.consumer_waits and len(seen) % scenario.consumer_waits == 0:
                await world.wait()
            if len(seen) == scenario.ends_after:
                match scenario.ends_by:
                    case "aclose":
                        await outcomes.aclose()
                    case "executor":
                        await executor.aclose()
                    case "cancel":
                        task = asyncio.current_task()
                        assert task is not None
                        task.cancel()
                    case _:
                        return
    except asyncio.CancelledError:
        await outcomes.aclose()  # the traceback refers to the output: it would be forgotten with the task only
        raise


async def serve(world: World, executor: StreamExecutor, seen: list[Outcome]) -> None:
    """Have the input served, to the end that the scenario says."""
    scenario, task, closing = world.scenario, asyncio.current_task(), []
    assert task is not None

    def deliver(index: int, outcome: Any) -> None:
        world.yielded += 1
        seen.append((index, outcome))
        if len(seen) == scenario.ends_after:
            match scenario.ends_by:
                case "forget":
                    raise ValueError
                case "cancel":
                    task.cancel()
                case _:
                    closing.append(asyncio.ensure_future(executor.aclose()))

    await executor.serve(world.take, world.wait_for_input, deliver)
    await asyncio.gather(*closing)


async def play(scenario: Scenario) -> tuple[World, list[Outcome], BaseException | None]:
    """Run one scenario to its very end."""
    if scenario.ordering == "partition":
        scenario.window = 1
    world = World(scenario, Random(scenario.seed), limiter=ConcurrencyLimiter(scenario.window))
    executor = StreamExecutor(
        Handler(world), world.limiter.acquire_many_nowait(scenario.window), ordering=scenario.ordering
    )
    seen: list[Outcome] = []
    consumer = asyncio.create_task(consume(world, executor, seen))
    del executor
    while not consumer.done():
        await world.schedule()
    await world.schedule()
    assert world.limiter.in_use == 0
    return world, seen, None if consumer.cancelled() else consumer.exception()


def expected(scenario: Scenario, number: int) -> type | None:
    """Say the class of an item's outcome, where it is a failure of storage that can be told from the item alone."""
    kind, _, _, ending = scenario.things[number]
    if kind == "error":
        return CallerError
    if kind in KINDS[:4]:
        return {"raise": OperationPanic, "cancelled": OperationDropped, "cancel": OperationDropped}.get(ending)
    return None


@given(SCENARIOS)
def test_whatever_happens_permits_come_back_once_and_whole(scenario: Scenario) -> None:
    """RES-1 … RES-10, EXE-5: held in full while anything runs; all back when the last operation has ended."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")  # an output left before its first item may leave an input that never began
        world, _, _ = asyncio.run(play(scenario))

    assert not world.lost_permits
    assert world.limiter.in_use == 0
    assert world.limiter.released_total == world.limiter.acquired_total == scenario.window
    assert world.running_now == 0
    assert world.running_max <= scenario.window


@given(SCENARIOS)
def test_at_most_the_window_is_pulled_and_not_yet_yielded(scenario: Scenario) -> None:
    """EXE-5, EXE-6, EXE-7: at every single pull."""
    world, _, _ = asyncio.run(play(scenario))

    assert world.outstanding_max <= scenario.window


@given(SCENARIOS)
def test_every_item_is_answered_exactly_once(scenario: Scenario) -> None:
    """EXE-1 … EXE-3, EXE-11, EXE-13: an output consumed to its end has them all, and then what the input raised.

    An execution that is served does not wait for them where its input has raised.
    """
    scenario.ends_after = None

    world, seen, error = asyncio.run(play(scenario))

    answered = [index for index, _ in seen]
    assert isinstance(error, CallerError) == scenario.input_error
    if scenario.served and scenario.input_error:
        assert len(set(answered)) == len(answered)
    else:
        assert sorted(answered) == list(range(len(scenario.things)))
        assert len(world.started) == sum(kind in KINDS[:4] for kind, *_ in scenario.things)
    if scenario.ordering != "unordered":  # the double tells calls on one object apart by their order
        for number, outcome in seen:
            failure = expected(scenario, number)
            assert failure is None or type(outcome) is failure, (number, outcome)


@given(SCENARIOS)
def test_one_object_is_never_touched_by_two_at_a_time(scenario: Scenario) -> None:
    """K-8: with the ordering ``key``, operations on one object run, and are answered, in input order."""
    scenario.ordering = "key"

    world, seen, _ = asyncio.run(play(scenario))

    assert not world.overlapped
    answered: dict[str, list[int]] = defaultdict(list)
    for number, _ in seen:
        kind, key, _, _ = scenario.things[number]
        if kind in KINDS[:4]:
            answered[key].append(number)
    assert all(numbers == sorted(numbers) for numbers in answered.values())
    for key in answered:
        started = [number for object_key, number in world.started if object_key == key]
        assert started == sorted(started)


@given(st.lists(st.booleans(), min_size=1, max_size=100), st.integers(1, 30), st.integers(0, 2**32))
def test_a_hot_object_never_stops_the_stream(hot: list[bool], window: int, seed: int) -> None:
    """K-8: no deadlock and no starvation, whatever the share of the hot one: the stream ends with all answered."""
    things = [("head", "hot" if is_hot else f"cold {number}", 1, "fine") for number, is_hot in enumerate(hot)]
    scenario = Scenario(things, window, "key", seed, 0, 0, None, "aclose", input_error=False)

    world, seen, _ = asyncio.run(play(scenario))

    assert len(seen) == len(hot)
    assert not world.overlapped


@given(SCENARIOS)
def test_items_are_the_callers_business(scenario: Scenario) -> None:
    """EXE-8: errors come out as they went in, in whatever company."""
    scenario.ends_after = None
    items: list[Item] = []

    class Remembering(World):
        def item(self, number: int) -> Any:
            items.append(super().item(number))
            return items[-1]

    async def drive() -> list[Outcome]:
        world = Remembering(scenario, Random(scenario.seed), limiter=ConcurrencyLimiter(scenario.window))
        executor = StreamExecutor(Handler(world), world.limiter.acquire_many_nowait(scenario.window))
        seen: list[Outcome] = []
        consumer = asyncio.create_task(consume(world, executor, seen))
        while not consumer.done():
            await world.schedule()
        assert (consumer.exception() is not None) == scenario.input_error
        return seen

    outcomes = dict(asyncio.run(drive()))

    for index, item in items:
        if isinstance(item, CallerError) and (index in outcomes or not (scenario.served and scenario.input_error)):
            assert outcomes[index] is item
