"""A stream of operations runs at most *window* at a time, and its permits come back once, whole, after the last one."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from contextvars import ContextVar

import pytest

from consumer.errors import (
    AtCapacity,
    DecodeError,
    InvalidMetadata,
    InvalidOperation,
    OperationDropped,
    OperationPanic,
    TierstreamError,
)
from consumer.executor import Item, Ordering, Outcome, Outcomes, StreamExecutor
from consumer.handler import Handler
from consumer.ids import ObjectContext, ObjectId
from consumer.log import Event
from consumer.metrics import Counts
from consumer.operations import (
    Deleted,
    Got,
    Head,
    Headed,
    Insert,
    Inserted,
    Metadata,
    StoredObject,
    TimeToLive,
)
from consumer.permits import ConcurrencyLimiter
from consumer.retry import RetryPolicy
from consumer.storage.backend import Payload
from gates import GatedStorage, Source, delete, get, head, insert, settled


class Stream:
    """An executor under test, with the limiter it takes its window from."""

    def __init__(self, storage: object, window: int = 10, ordering: Ordering = "unordered", **more: object) -> None:
        self.limiter = ConcurrencyLimiter(window)
        self.executor = StreamExecutor(
            Handler(storage, **more),  # type: ignore[arg-type]  # doubles and policies are told apart by their names
            self.limiter.acquire_many_nowait(window),
            ordering=ordering,
        )

    def run(self, *things: object) -> Outcomes:
        """Execute a whole input."""
        return self.executor.execute(Source(things))


async def all_of(outcomes: AsyncIterator[Outcome]) -> list[Outcome]:
    """Consume the output to its end."""
    return [outcome async for outcome in outcomes]


def waiting(outcomes: AsyncIterator[Outcome]) -> asyncio.Task[Outcome]:
    """Wait for the next outcome in a task of its own."""

    async def wait() -> Outcome:
        return await anext(outcomes)

    return asyncio.create_task(wait())


class TestItems:
    """Each item gives one outcome."""

    async def test_every_item_gives_one_outcome_with_its_index(self) -> None:
        """EXE-1, EXE-2, EXE-3: indexes come back as they were given, whatever they are."""
        storage = GatedStorage()
        source = Source()
        source.feed((7, insert("a")), (9, get("a")), (1_000_000, head("a")), (1_000_001, delete("b")))

        outcomes = dict(await all_of(Stream(storage, 1).executor.execute(source)))

        assert outcomes == {
            7: Inserted(ObjectId(ObjectContext("testing"), "a"), Metadata()),
            9: Got("a", StoredObject(Metadata(), b"payload")),
            1_000_000: Headed("a", Metadata()),
            1_000_001: Deleted("b"),
        }

    async def test_each_kind_makes_its_own_call_only(self) -> None:
        """EXE-18, OP-11: one call each, a get without a range."""
        storage = GatedStorage()

        await all_of(Stream(storage).run(insert("i"), get("g"), delete("d"), head("h")))

        assert sorted(storage.calls) == [("delete", "d"), ("get", "g"), ("head", "h"), ("put", "i")]

    async def test_a_missing_object_is_a_success(self) -> None:
        """OP-8."""
        outcomes = dict(await all_of(Stream(GatedStorage()).run(get("a"), head("b"), delete("c"))))

        assert outcomes == {0: Got("a", None), 1: Headed("b", None), 2: Deleted("c")}

    async def test_operations_have_their_own_contexts(self) -> None:
        """EXE-14, K-4: unlike the reference, one stream carries many contexts; the same key is then another object."""
        storage = GatedStorage()
        one, two = ObjectContext("one"), ObjectContext("two")

        await all_of(
            Stream(storage).run(Insert(one, "k", Metadata(), b"1"), Insert(two, "k", Metadata(), b"2")),
        )

        assert {path: stored.payload for path, stored in storage.objects.items()} == {
            "one/objects/k": b"1",
            "two/objects/k": b"2",
        }

    async def test_errors_pass_through_as_the_same_object(self) -> None:
        """EXE-8, EXE-10: any exception of the caller's, started nowhere, counted nowhere."""
        storage, counts = GatedStorage(), Counts()
        limiter = ConcurrencyLimiter(3)
        executor = StreamExecutor(Handler(storage), limiter.acquire_many_nowait(3), counts=counts.operations)
        mine, ours = KeyError("mine"), DecodeError("cut off")

        outcomes = dict(await all_of(executor.execute(Source([mine, ours, head("a")]))))

        assert outcomes[0] is mine
        assert outcomes[1] is ours
        assert storage.calls == [("head", "a")]
        assert {kind: counting.started for kind, counting in counts.operations.items()} == {
            "insert": 0,
            "get": 0,
            "delete": 0,
            "head": 1,
        }

    @pytest.mark.parametrize("thing", [None, "insert", object(), Head, asyncio.CancelledError(), KeyboardInterrupt()])
    async def test_what_is_no_operation_is_an_outcome_of_its_index(self, thing: object) -> None:
        """Contract 10: neither an operation nor an exception; a class is none, a BaseException is none."""
        storage = GatedStorage()

        outcomes = dict(await all_of(Stream(storage).run(thing, head("a"))))

        assert isinstance(outcomes[0], InvalidOperation)
        assert outcomes[1] == Headed("a", None)
        assert storage.calls == [("head", "a")]

    async def test_an_operation_that_breaks_a_rule_never_reaches_storage(self) -> None:
        """Contract 10: checked at execution, also in a stream: unlike the reference (OP-13), a deliberate addition."""
        storage = GatedStorage()
        timeless = Insert(ObjectContext("u"), "k", Metadata(expiration=TimeToLive(0)), b"")

        outcomes = dict(await all_of(Stream(storage).run(head(""), get("a\n"), timeless, delete("k" * 1000))))

        assert {index: type(outcome) for index, outcome in outcomes.items()} == {
            0: InvalidOperation,
            1: InvalidOperation,
            2: InvalidMetadata,
            3: InvalidOperation,
        }
        assert storage.calls == []

    async def test_a_keyless_insert_learns_its_key(self) -> None:
        """OP-5, OP-12: each gets its own random UUIDv4."""
        storage = GatedStorage()

        outcomes = await all_of(Stream(storage).run(insert(None), insert(None)))

        keys = [outcome.key for _, outcome in outcomes if isinstance(outcome, Inserted)]
        assert len(set(keys)) == 2
        assert all(key[14] == "4" and len(key) == 36 for key in keys)
        assert sorted(storage.objects) == sorted(f"testing/objects/{key}" for key in keys)

    async def test_an_empty_input_gives_an_empty_output(self) -> None:
        """EXE-15: then the permits are released."""
        stream = Stream(GatedStorage())

        assert await all_of(stream.run()) == []
        assert stream.limiter.in_use == 0

    async def test_an_output_that_has_ended_stays_ended(self) -> None:
        """As every iterator."""
        outcomes = Stream(GatedStorage()).run(head("a"))
        await all_of(outcomes)

        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(outcomes)

    @pytest.mark.parametrize("window", [1, 3, 50])
    async def test_items_that_come_one_by_one_are_answered_one_by_one(self, window: int) -> None:
        """A live input, such as a partition, waits between records."""
        source = Source(ended=False)
        outcomes = Stream(GatedStorage(), window).executor.execute(source)

        for index in range(10):
            following = waiting(outcomes)
            await settled()
            assert not following.done()
            source.feed((index, head("a")))
            assert await following == (index, Headed("a", None))
        source.end()
        assert await all_of(outcomes) == []


class TestWindow:
    """At most *window* items are pulled and not yet yielded."""

    async def test_outcomes_come_in_order_of_completion(self) -> None:
        """EXE-4."""
        storage = GatedStorage("a", "b", "c")
        outcomes = Stream(storage).run(head("a"), head("b"), head("c"), head("d"))

        assert (await anext(outcomes))[0] == 3
        storage.let_go("b")
        assert (await anext(outcomes))[0] == 1
        storage.let_go("c")
        assert (await anext(outcomes))[0] == 2
        storage.let_go("a")
        assert (await anext(outcomes))[0] == 0
        assert await all_of(outcomes) == []

    async def test_a_whole_window_really_runs_together(self) -> None:
        """EXE-16: ten inserts at limit 100, all in flight at once; an eleventh is not even pulled (EXE-5)."""
        storage, source = GatedStorage(hold_all=True), Source([insert(str(number)) for number in range(11)])
        stream = Stream(storage, 10)
        outcomes = stream.executor.execute(source)
        first = waiting(outcomes)
        await settled()

        assert len(storage.running) == stream.executor.in_flight == source.pulled == 10
        storage.let_all_go()
        await first
        assert len(await all_of(outcomes)) == 10
        assert storage.running_max == 10

    async def test_every_ready_operation_starts_without_waiting_for_a_suspended_one(self) -> None:
        """Suspended and immediate operations in any order: only the suspended ones are not finished."""
        storage = GatedStorage(*(f"held {number}" for number in range(30)))
        things = [head(f"held {number // 3}" if number % 3 == 0 else f"free {number}") for number in range(90)]
        outcomes = Stream(storage, 90).run(*things)

        free = [await anext(outcomes) for _ in range(60)]
        assert {index % 3 for index, _ in free} == {1, 2}
        assert len(storage.running) == 30
        storage.let_all_go()
        assert len(await all_of(outcomes)) == 30

    async def test_yielding_frees_a_place_and_finishing_does_not(self) -> None:
        """EXE-5, EXE-6: finished but unread outcomes still occupy the window."""
        storage, source = GatedStorage(), Source([head(str(number)) for number in range(20)])
        outcomes = Stream(storage, 4).executor.execute(source)

        for yielded in range(1, 17):
            await anext(outcomes)
            await settled()
            assert source.pulled - yielded <= 4 - 1
            assert len(storage.ended) == source.pulled
        assert len(await all_of(outcomes)) == 4

    async def test_nothing_is_pulled_before_the_output_is_consumed(self) -> None:
        """EXE-6: neither ``stream`` nor ``execute`` pull."""
        source = Source([head("a")])
        outcomes = Stream(GatedStorage()).executor.execute(source)
        await settled()

        assert source.pulled == 0
        await anext(outcomes)
        assert source.pulled == 1

    async def test_a_consumer_that_stops_reading_stops_the_pulling(self) -> None:
        """EXE-6: whatever finishes meanwhile."""
        storage, source = GatedStorage("a", "b"), Source([head("a"), head("b"), head("c")] + [head("x")] * 100)
        outcomes = Stream(storage, 3).executor.execute(source)
        await anext(outcomes)
        pulled = source.pulled

        storage.let_all_go()
        await settled()

        assert source.pulled == pulled == 3
        await outcomes.aclose()

    async def test_an_input_that_is_waited_for_gives_one_item_more(self) -> None:
        """EXE-6, stated: it was asked for while the output was consumed, and cannot be taken back."""
        source = Source([head("a")], ended=False)
        storage = GatedStorage()
        outcomes = Stream(storage, 10).executor.execute(source)
        await anext(outcomes)

        source.feed((1, head("b")), (2, head("c")))
        await settled()

        assert source.pulled == 2
        source.end()
        assert [index for index, _ in await all_of(outcomes)] == [1, 2]

    async def test_an_error_occupies_a_place(self) -> None:
        """EXE-9: with window 1 it waits for the running operation; with 2 it overtakes it."""
        storage, source = GatedStorage("a"), Source([head("a"), KeyError()])
        outcomes = Stream(storage, 1).executor.execute(source)
        first = waiting(outcomes)
        await settled()
        assert source.pulled == 1
        storage.let_go("a")
        assert [(await first)[0], *[index for index, _ in await all_of(outcomes)]] == [0, 1]

        storage = GatedStorage("a")
        outcomes = Stream(storage, 2).run(head("a"), KeyError())
        assert (await anext(outcomes))[0] == 1
        storage.let_go("a")
        assert (await anext(outcomes))[0] == 0

    async def test_storage_is_kept_busy_while_outcomes_are_consumed(self) -> None:
        """A consumer that takes its time has at least half the window running, as long as there is input."""
        storage, source = GatedStorage(), Source([head(str(number)) for number in range(100)])
        outcomes = Stream(storage, 8).executor.execute(source)

        for yielded in range(1, 90):
            await anext(outcomes)
            await settled()
            assert source.pulled - yielded >= 8 // 2 - 1

        assert len(await all_of(outcomes)) == 11

    async def test_operations_run_in_few_tasks_and_in_none_of_their_own(self) -> None:
        """No task for an operation: those that do not suspend share one, suspended ones use theirs again."""

        class Spy(GatedStorage):
            tasks: set[object]

            async def _call(self, method: str, object_id: ObjectId) -> None:
                self.tasks.add(asyncio.current_task())
                await super()._call(method, object_id)

        storage = Spy()
        storage.tasks = set()
        await all_of(Stream(storage, 10).run(*[head("a")] * 200))
        assert len(storage.tasks) == 1

        class Slow(Spy):
            async def _call(self, method: str, object_id: ObjectId) -> None:
                await super()._call(method, object_id)
                await asyncio.sleep(0)

        storage = Slow()
        storage.tasks = set()
        await all_of(Stream(storage, 10).run(*[head("a")] * 200))
        assert len(storage.tasks) <= 10

    async def test_the_input_is_advanced_by_one_task(self) -> None:
        """What an input holds across its items, a timeout or a cancel scope, belongs to a task."""
        tasks = set()

        async def inputs() -> AsyncIterator[Item]:
            async with asyncio.timeout(30):
                for index in range(20):
                    tasks.add(asyncio.current_task())
                    yield index, head(str(index))
                    await asyncio.sleep(0)

        assert len(await all_of(Stream(GatedStorage(), 4).executor.execute(inputs()))) == 20
        assert len(tasks) == 1

    async def test_a_timeout_of_storage_ends_the_right_operation(self) -> None:
        """An operation runs in one task from its first step to its last, so that timeouts inside it work."""

        class Impatient(GatedStorage):
            async def head(self, object_id: ObjectId) -> Metadata | None:
                async with asyncio.timeout(0.001):
                    return await super().head(object_id)

        storage = Impatient("a")
        outcomes = dict(await all_of(Stream(storage).run(head("a"), get("b"))))

        assert isinstance(outcomes[0], OperationPanic)
        assert str(outcomes[0]) == "TimeoutError"
        assert outcomes[1] == Got("b", None)

    async def test_an_operation_may_handle_what_is_thrown_into_it_and_wait_again(self) -> None:
        """Storage that settles when it is cancelled: what is thrown in is its own to handle, more than once."""

        class Settling(GatedStorage):
            async def head(self, object_id: ObjectId) -> Metadata | None:
                for _ in range(3):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.001):
                            await super().head(object_id)
                    await asyncio.sleep(0)
                return None

        outcomes = dict(await all_of(Stream(Settling("a")).run(head("a"), get("b"))))

        assert outcomes == {0: Headed("a", None), 1: Got("b", None)}

    async def test_only_one_may_wait_for_the_output(self) -> None:
        """As with asynchronous generators."""
        storage = GatedStorage("a")
        outcomes = Stream(storage).run(head("a"))
        first = waiting(outcomes)
        await settled()

        with pytest.raises(RuntimeError, match="already being waited for"):
            await anext(outcomes)

        storage.let_go("a")
        assert (await first)[0] == 0

    async def test_a_cancelled_wait_loses_nothing(self) -> None:
        """``asyncio.timeout`` around ``anext`` is a fair thing to do."""
        storage = GatedStorage("a", "b")
        outcomes = Stream(storage, 2).run(head("a"), head("b"), head("c"))
        first = waiting(outcomes)
        await settled()
        first.cancel()
        await asyncio.wait([first])
        storage.let_all_go()
        await settled()

        assert sorted(index for index, _ in await all_of(outcomes)) == [0, 1, 2]

    @pytest.mark.parametrize("turns", range(6))
    async def test_a_wait_cancelled_at_any_moment_loses_nothing(self, turns: int) -> None:
        """The same after each number of turns of the event loop."""
        stream = Stream(GatedStorage(), 4)
        outcomes = stream.run(*[head(str(number)) for number in range(40)])
        seen: list[int] = []
        while len(seen) < 40:
            wait = waiting(outcomes)
            for _ in range(turns):
                await asyncio.sleep(0)
            wait.cancel()
            await asyncio.wait([wait])
            seen += [] if wait.cancelled() else [wait.result()[0]]
            if len(seen) < 40:
                seen.append((await anext(outcomes))[0])

        assert sorted(seen) == list(range(40))
        assert await all_of(outcomes) == []


class TestFailures:
    """What goes wrong in one operation is the outcome of that one alone."""

    async def test_an_unexpected_exception_is_a_panic(self, caplog: pytest.LogCaptureFixture) -> None:
        """EXE-11, EXE-12, ERR-4: type and text, the cause kept, logged once with the kind; others are unaffected."""
        storage = GatedStorage("slow", "slow and broken")
        broken = ValueError("no such thing")
        storage.failures["broken"] = storage.failures["slow and broken"] = lambda: broken

        with caplog.at_level(logging.DEBUG, "consumer"):
            outcomes = Stream(storage).run(head("broken"), get("fine"), get("slow"), get("slow and broken"))
            storage.let_all_go()
            answers = dict(await all_of(outcomes))

        panic = answers[0]
        assert isinstance(panic, OperationPanic)
        assert str(panic) == "ValueError: no such thing"
        assert panic.__cause__ is broken
        assert isinstance(answers[3], OperationPanic)
        assert [answers[1], answers[2]] == [Got("fine", None), Got("slow", None)]
        lines = [(record.levelno, record.msg) for record in caplog.records if isinstance(record.msg, Event)]
        assert sorted((level, line.fields["kind"], line.fields["code"]) for level, line in lines) == [
            (logging.ERROR, "get", "panic"),
            (logging.ERROR, "head", "panic"),
        ]

    async def test_an_exception_without_text_is_named(self) -> None:
        """EXE-12: never an empty message."""
        storage = GatedStorage()
        storage.failures["a"] = ZeroDivisionError

        outcomes = await all_of(Stream(storage).run(head("a")))

        assert str(outcomes[0][1]) == "ZeroDivisionError"

    async def test_an_error_of_ours_passes_as_itself(self) -> None:
        """Contract 10: ``OperationPanic`` or the domain error."""
        storage = GatedStorage()
        error = AtCapacity("full")
        storage.failures["a"] = lambda: error

        assert await all_of(Stream(storage).run(head("a"))) == [(0, error)]

    @pytest.mark.parametrize("error", [type("Odd", (BaseException,), {}), GeneratorExit, StopAsyncIteration])
    @pytest.mark.parametrize("held", [False, True])
    async def test_a_base_exception_is_a_panic_too(self, error: type[BaseException], *, held: bool) -> None:
        """Contract 10: a ``BaseException`` that is not an ``Exception``, also one Python itself uses."""
        storage = GatedStorage("a" if held else "")
        storage.failures["a"] = lambda: error("odd")
        stream = Stream(storage)
        outcomes = stream.run(head("a"), head("b"))
        first = await anext(outcomes)
        storage.let_all_go()

        answers = dict([first, *await all_of(outcomes)])

        assert isinstance(answers[0], OperationPanic)
        assert str(answers[0]) == f"{error.__name__}: odd"
        assert answers[1] == Headed("b", None)
        assert stream.limiter.in_use == 0

    @pytest.mark.parametrize("held", [False, True])
    async def test_a_cancelled_operation_is_dropped(self, *, held: bool, caplog: pytest.LogCaptureFixture) -> None:
        """EXE-13, contract 10: outcome unknown, retriable, logged."""
        storage = GatedStorage("a" if held else "")
        storage.failures["a"] = asyncio.CancelledError
        outcomes = Stream(storage).run(head("a"), head("b"))
        storage.let_all_go()

        answers = dict(await all_of(outcomes))

        dropped = answers[0]
        assert isinstance(dropped, OperationDropped)
        assert (dropped.code, dropped.retriable) == ("dropped", True)
        assert answers[1] == Headed("b", None)
        assert "dropped" in caplog.text

    @pytest.mark.parametrize("ordering", ["unordered", "key"])
    async def test_cancelling_what_an_operation_runs_in_drops_it_alone(self, ordering: Ordering) -> None:
        """Everything behind it is still answered."""

        class SelfCancelling(GatedStorage):
            async def head(self, object_id: ObjectId) -> Metadata | None:
                if object_id.key.startswith("odd"):
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                    await asyncio.sleep(0)
                return await super().head(object_id)

        stream = Stream(SelfCancelling(), 3, ordering)
        things = [head("odd one"), head("odd one"), get("odd one"), *[head(str(n)) for n in range(20)], head("odd two")]

        answers = dict(await all_of(stream.run(*things)))

        dropped = [index for index, answer in answers.items() if isinstance(answer, OperationDropped)]
        assert sorted(dropped) == [0, 1, 23]
        assert len(answers) == 24
        assert stream.limiter.in_use == 0

    @pytest.mark.parametrize(
        "error", [KeyError("broken input"), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit()]
    )
    async def test_what_the_input_raises_comes_after_the_outcomes(self, error: BaseException) -> None:
        """Contract 10: in-flight results first, then it propagates, the same object; then the output has ended."""
        storage, source = GatedStorage("a"), Source([head("a"), head("b")])
        source.end(error)
        stream = Stream(storage)
        outcomes = stream.executor.execute(source)

        assert (await anext(outcomes))[0] == 1
        last = waiting(outcomes)
        await settled()
        assert not last.done()
        storage.let_go("a")
        assert (await last)[0] == 0
        assert stream.limiter.in_use == 10
        with pytest.raises(type(error)) as raised:
            await anext(outcomes)

        assert raised.value is error
        assert stream.limiter.in_use == 0
        assert await all_of(outcomes) == []

    async def test_an_input_of_the_wrong_shape_is_an_input_that_raises(self) -> None:
        """A defect of the caller's, told to the caller."""

        async def inputs() -> AsyncIterator[Item]:
            yield 0, head("a")
            yield head("b")  # type: ignore[misc]  # the defect

        outcomes = Stream(GatedStorage()).executor.execute(inputs())

        assert (await anext(outcomes))[0] == 0
        with pytest.raises(TypeError):
            await anext(outcomes)

    @pytest.mark.parametrize("exit_error", [KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("held", [False, True])
    async def test_an_exit_propagates_after_release(self, exit_error: type[BaseException], *, held: bool) -> None:
        """Contract 10: raised to the consumer, once the other operations have ended and the permits are back."""
        storage, source = GatedStorage("a", "other"), Source([head("other"), head("a")] + [head("late")] * 50)
        storage.failures["a"] = exit_error
        if not held:
            storage.let_go("a")
        stream = Stream(storage, 3)
        outcomes = stream.executor.execute(source)

        if held:
            assert await anext(outcomes) == (2, Headed("late", None))
            storage.let_go("a")
        exiting = asyncio.create_task(caught(outcomes))
        await settled()
        assert not exiting.done()
        assert stream.limiter.in_use == 3
        storage.let_go("other")

        assert isinstance(await exiting, exit_error)
        assert stream.limiter.in_use == 0
        assert await all_of(outcomes) == []
        if not held:
            assert storage.calls == [("head", "other"), ("head", "a")]


async def caught(outcomes: AsyncIterator[Outcome]) -> BaseException | None:
    """Return what waiting for an outcome raises: an exit raised by a task would end the run of the event loop."""
    try:
        await anext(outcomes)
    except BaseException as error:  # noqa: BLE001 - that is the point
        return error
    return None


class TestRelease:
    """The permits come back once, whole, when the output has ended and nothing is in flight."""

    async def test_all_permits_are_held_while_the_executor_lives(self) -> None:
        """RES-2, RES-3, WIN-6: with nothing in flight as well as with everything; the window stays what it was."""
        storage = GatedStorage(hold_all=True)
        stream = Stream(storage, 5)
        assert stream.limiter.in_use == stream.executor.window == 5

        outcomes = stream.run(head("a"), head("b"))
        first = waiting(outcomes)
        await settled()
        assert (stream.limiter.in_use, stream.limiter.acquired_total, stream.executor.window) == (5, 5, 5)

        storage.let_all_go()
        await first
        assert (stream.limiter.in_use, stream.executor.in_flight) == (5, 0)
        await all_of(outcomes)
        assert (stream.limiter.in_use, stream.limiter.acquired_total, stream.executor.window) == (0, 5, 5)

    async def test_permits_are_held_while_the_last_outcome_is_delivered(self) -> None:
        """RES-10, contract 10: until the output has *ended*."""
        stream = Stream(GatedStorage(), 3)
        outcomes = stream.run(head("a"))

        await anext(outcomes)
        await settled()
        assert stream.limiter.in_use == 3

        assert await all_of(outcomes) == []
        assert stream.limiter.in_use == 0

    async def test_permits_come_back_all_together(self) -> None:
        """RES-4, RES-8: not one by one as operations finish; seen by whoever waits for the limiter."""
        storage = GatedStorage("a", "b", "c")
        stream = Stream(storage, 3)
        outcomes = stream.run(head("a"), head("b"), head("c"))
        first = waiting(outcomes)
        await settled()
        await outcomes.aclose()

        for key in "abc":
            assert (stream.limiter.in_use, stream.limiter.released_total) == (3, 0)
            storage.let_go(key)
            await settled()
        assert (stream.limiter.in_use, stream.limiter.released_total) == (0, 3)
        with pytest.raises(StopAsyncIteration):
            await first

    async def test_permits_come_back_after_failures(self) -> None:
        """RES-7."""
        storage = GatedStorage()
        storage.failures["a"] = ValueError
        stream = Stream(storage, 3)

        await all_of(stream.run(*[head("a")] * 10))

        assert (stream.limiter.in_use, stream.limiter.released_total) == (0, 3)

    async def test_closing_returns_at_once_and_operations_run_to_their_end(self) -> None:
        """RES-5, contract 10: nothing in flight is cancelled; only then the permits are released."""
        storage = GatedStorage(hold_all=True)
        stream = Stream(storage, 3)
        outcomes = stream.run(*[insert(str(number)) for number in range(3)])
        first = waiting(outcomes)
        await settled()
        first.cancel()
        await asyncio.wait([first])

        await asyncio.wait_for(outcomes.aclose(), 5)
        assert (len(storage.running), stream.limiter.in_use) == (3, 3)
        storage.let_all_go()
        await stream.limiter.wait_all_released()

        assert len(storage.objects) == 3

    async def test_what_was_pulled_before_closing_is_run(self) -> None:
        """RES-5: also where it had not begun, because the consumer closed in the very turn it was pulled in."""
        storage = GatedStorage("1", "2")
        stream = Stream(storage, 4)
        outcomes = stream.run(*[insert(str(number)) for number in range(4)])
        await anext(outcomes)
        await outcomes.aclose()
        await settled()

        assert len(storage.calls) == 4
        storage.let_all_go()
        await stream.limiter.wait_all_released()
        assert len(storage.objects) == 4

    async def test_closing_stops_the_pulling_at_once(self) -> None:
        """RES-6: an input that is waited for is not waited for any longer, and what it gives later is not taken."""
        source = Source([head("a")], ended=False)
        stream = Stream(GatedStorage(), 3)
        outcomes = stream.executor.execute(source)
        await anext(outcomes)
        waits = waiting(outcomes)
        await settled()
        assert source.waiting == 1

        await outcomes.aclose()
        await settled()
        source.feed((1, head("b")))
        await settled()

        assert (source.waiting, source.pulled, stream.limiter.in_use) == (0, 1, 0)
        with pytest.raises(StopAsyncIteration):
            await waits

    async def test_an_item_that_arrives_in_the_turn_of_closing_is_not_run(self) -> None:
        """RES-6: nobody would hear of it."""
        source, storage = Source([head("a")], ended=False), GatedStorage()
        stream = Stream(storage, 3)
        outcomes = stream.executor.execute(source)
        await anext(outcomes)

        source.feed((1, head("b")))
        await outcomes.aclose()
        await settled()

        assert storage.calls == [("head", "a")]
        assert stream.limiter.in_use == 0

    async def test_an_input_may_close_the_executor(self) -> None:
        """RES-6: what it gives after that is not run, for the permits are back."""
        storage = GatedStorage()
        stream = Stream(storage, 3)

        async def inputs() -> AsyncIterator[Item]:
            yield 0, head("a")
            await stream.executor.aclose()
            yield 1, head("b")

        assert await all_of(stream.executor.execute(inputs())) == []
        await settled()
        assert stream.limiter.in_use == 0
        assert ("head", "b") not in storage.calls

    async def test_closing_twice_does_nothing(self) -> None:
        """RES-8."""
        stream = Stream(GatedStorage(), 3)
        outcomes = stream.run(head("a"))
        await anext(outcomes)

        for _ in range(2):
            await outcomes.aclose()
            await stream.executor.aclose()

        assert stream.limiter.released_total == 3
        assert await all_of(outcomes) == []

    async def test_closing_before_the_first_item_returns_the_permits(self) -> None:
        """Contract 10."""
        source = Source([head("a")])
        stream = Stream(GatedStorage(), 3)
        outcomes = stream.executor.execute(source)

        await outcomes.aclose()

        assert (stream.limiter.in_use, source.pulled) == (0, 0)
        assert await all_of(outcomes) == []

    async def test_closing_one_that_was_never_run_returns_the_permits(self) -> None:
        """RES-9, contract 10: and then it cannot be run any more."""
        stream = Stream(GatedStorage(), 3)

        await stream.executor.aclose()

        assert stream.limiter.in_use == 0
        with pytest.raises(RuntimeError, match="closed"):
            stream.run(head("a"))

    async def test_leaving_the_context_closes(self) -> None:
        """Contract 10: ``async with service.stream() as executor``; operations in flight end by themselves."""
        storage = GatedStorage("b")
        stream = Stream(storage, 3)

        async with stream.executor as executor:
            async for index, _ in executor.execute(Source([head("a"), head("b"), head("c"), head("d")])):
                if index == 2:
                    break
        assert stream.limiter.in_use == 3

        storage.let_all_go()
        await stream.limiter.wait_all_released()

    async def test_forgetting_one_that_was_never_run_returns_the_permits_and_warns(self) -> None:
        """RES-9, contract 10."""
        stream = Stream(GatedStorage(), 3)

        with pytest.warns(ResourceWarning, match="unreleased reservation of 3 permits"):
            del stream.executor

        assert stream.limiter.in_use == 0

    async def test_forgetting_the_output_returns_the_permits_after_the_last_operation(self) -> None:
        """RES-5, contract 10: it need not be closed; nothing more is pulled."""
        storage, source = GatedStorage("b"), Source([head("a"), head("b")], ended=False)
        stream = Stream(storage, 3)
        outcomes = stream.executor.execute(source)
        await anext(outcomes)
        assert source.waiting == 1

        del outcomes
        await settled()
        assert (source.waiting, stream.limiter.in_use) == (0, 3)
        storage.let_all_go()
        await stream.limiter.wait_all_released()

    async def test_forgetting_output_and_executor_is_the_same(self) -> None:
        """The operations hold what they need until they have ended."""
        storage = GatedStorage("b")
        stream = Stream(storage, 3)
        limiter = stream.limiter
        outcomes = stream.run(head("a"), head("b"))
        await anext(outcomes)

        del outcomes, stream
        gc.collect()
        await settled()
        assert limiter.in_use == 3
        storage.let_all_go()
        await limiter.wait_all_released()

    async def test_forgetting_an_output_that_was_never_consumed_returns_the_permits(self) -> None:
        """Contract 10: without a warning, for it was run as far as anybody wanted."""
        stream = Stream(GatedStorage(), 3)
        outcomes = stream.run(head("a"))

        del outcomes

        assert stream.limiter.in_use == 0

    async def test_an_output_is_not_forgotten_while_it_is_waited_for(self) -> None:
        """``await anext(executor.execute(...))``, with no name for the output."""
        stream = Stream(GatedStorage(), 3)

        assert await anext(stream.run(head("a"))) == (0, Headed("a", None))
        await settled()
        assert stream.limiter.in_use == 0

    async def test_an_output_may_be_collected_on_another_thread(self) -> None:
        """The garbage collector runs anywhere; the loop stops what is its own."""
        stream = Stream(GatedStorage(), 3)
        held = [stream.run(*[head("a")] * 5)]
        await anext(held[0])

        await asyncio.to_thread(held.clear)
        await asyncio.wait_for(stream.limiter.wait_all_released(), 5)

    def test_an_output_may_outlive_its_event_loop(self) -> None:
        """The permits come back when it is forgotten, although nothing can be stopped any more."""
        stream = Stream(GatedStorage(), 3)

        async def begin() -> Outcomes:
            outcomes = stream.run(*[head("a")] * 5)
            await anext(outcomes)
            return outcomes

        outcomes = asyncio.run(begin())
        assert stream.limiter.in_use == 3
        del outcomes
        assert stream.limiter.in_use == 0

    def test_the_end_of_the_event_loop_leaves_nothing_behind(self) -> None:
        """What ``asyncio.run`` cancels at its end, ends: the input, the operations, whoever is parked."""
        storage, source = GatedStorage("b"), Source([head("a"), head("b"), head("b")], ended=False)
        stream = Stream(storage, 9, "key")

        async def begin() -> None:
            async for _ in stream.executor.execute(source):
                break

        asyncio.run(begin())

        assert (stream.limiter.in_use, storage.running, source.waiting) == (0, [], 0)

    async def test_executes_once(self) -> None:
        """Contract 10: a second call is a RuntimeError, during the first and after it."""
        stream = Stream(GatedStorage(), 3)
        outcomes = stream.run(head("a"))

        with pytest.raises(RuntimeError, match="once"):
            stream.run(head("b"))
        await all_of(outcomes)
        with pytest.raises(RuntimeError, match="once"):
            stream.run(head("b"))

    async def test_an_input_that_is_none_takes_nothing(self) -> None:
        """A TypeError at the call, and the executor can still be used."""
        stream = Stream(GatedStorage(), 3)

        with pytest.raises(TypeError):
            stream.executor.execute([(0, head("a"))])  # type: ignore[arg-type]  # the defect

        assert len(await all_of(stream.run(head("a")))) == 1

    async def test_an_unknown_ordering_is_refused(self) -> None:
        """Contract 10."""
        limiter = ConcurrencyLimiter(1)
        with limiter.acquire_many_nowait(1) as reservation, pytest.raises(ValueError, match="ordering is one of"):
            StreamExecutor(Handler(GatedStorage()), reservation, ordering="random")  # type: ignore[arg-type]

    async def test_operations_that_end_after_closing_log_their_failures(self, caplog: pytest.LogCaptureFixture) -> None:
        """ERR-4: there is no outcome any more that could tell."""
        storage = GatedStorage("a")
        storage.failures["a"] = lambda: ValueError("too late")
        stream = Stream(storage, 3)
        outcomes = stream.run(head("a"), head("b"))
        await anext(outcomes)
        await outcomes.aclose()

        storage.let_all_go()
        await stream.limiter.wait_all_released()

        assert "too late" in caplog.text


class TestOrdering:
    """Operations on one object, one after the other; all others meanwhile."""

    async def test_operations_on_one_object_run_one_after_the_other_in_input_order(self) -> None:
        """K-8, contract 4: and their outcomes come in that order, whatever the others do."""
        storage = GatedStorage("x")
        things = [insert("x", b"1"), get("x"), insert("y"), insert("x", b"2"), get("x"), delete("x"), get("x")]
        outcomes = Stream(storage, 10, "key").run(*things)

        assert (await anext(outcomes))[0] == 2
        assert storage.running == [("put", "x")]
        storage.let_go("x")
        rest = await all_of(outcomes)

        assert [index for index, _ in rest] == [0, 1, 3, 4, 5, 6]
        assert [got.object.payload for _, got in rest if isinstance(got, Got) and got.object] == [b"1", b"2"]
        assert rest[-1] == (6, Got("x", None))

    async def test_the_reference_gives_no_such_order(self) -> None:
        """EXE-17: ``unordered``: a delete overtakes the insert before it."""

        class SlowPut(GatedStorage):
            async def put(self, object_id: ObjectId, metadata: Metadata, payload: Payload) -> Metadata:
                self.hold(object_id.key)
                return await super().put(object_id, metadata, payload)

            async def delete(self, object_id: ObjectId) -> None:
                self.let_go(object_id.key)
                await super().delete(object_id)

        storage = SlowPut()
        outcomes = await all_of(Stream(storage, 2).run(insert("x"), delete("x")))

        assert [index for index, _ in outcomes] == [1, 0]
        assert "testing/objects/x" in storage.objects

    async def test_an_object_is_its_context_and_key(self) -> None:
        """Contract 10: the same key of another context is another object, and so is every keyless insert."""
        storage = GatedStorage("x")
        mine, other = ObjectContext("mine"), ObjectContext("other")
        stream = Stream(storage, 10, "key")
        outcomes = stream.run(
            Head(mine, "x"), Head(other, "x"), Head(ObjectContext("mine"), "x"), insert(None), insert(None)
        )

        assert sorted([(await anext(outcomes))[0], (await anext(outcomes))[0]]) == [3, 4]
        assert stream.executor.in_flight == 2
        storage.let_go("x")
        assert [index for index, _ in await all_of(outcomes)] in ([0, 1, 2], [1, 0, 2], [0, 2, 1])

    async def test_waiters_occupy_the_window(self) -> None:
        """Contract 4: with a window full of one object, nothing else is pulled."""
        storage, source = GatedStorage("hot"), Source([head("hot")] * 4 + [head("cold")])
        stream = Stream(storage, 4, "key")
        outcomes = stream.executor.execute(source)
        first = waiting(outcomes)
        await settled()

        assert (source.pulled, stream.executor.in_flight, storage.calls) == (4, 1, [("head", "hot")])
        storage.let_go("hot")
        assert (await first)[0] == 0
        assert [index for index, _ in await all_of(outcomes)] == [1, 2, 3, 4]

    async def test_a_hot_object_does_not_starve_the_others(self) -> None:
        """One hot key among many: each other operation finishes while the hot one of the same window still waits."""
        storage = GatedStorage("hot")
        things = [head("hot") if number % 2 else head(f"cold {number}") for number in range(20)]
        outcomes = Stream(storage, 20, "key").run(*things)

        cold = [(await anext(outcomes))[0] for _ in range(10)]
        assert cold == list(range(0, 20, 2))
        assert storage.running == [("head", "hot")]
        storage.let_go("hot")
        assert [index for index, _ in await all_of(outcomes)] == list(range(1, 20, 2))

    async def test_a_failure_passes_the_turn_on(self) -> None:
        """Otherwise the object would be locked for ever."""
        storage = GatedStorage("x")
        storage.failures["x"] = ValueError
        outcomes = Stream(storage, 5, "key").run(*[head("x")] * 5)
        first = waiting(outcomes)
        await settled()
        storage.let_go("x")

        assert (await first)[0] == 0
        assert [index for index, _ in await all_of(outcomes)] == [1, 2, 3, 4]

    async def test_the_turn_is_held_while_an_operation_is_tried_again(self) -> None:
        """Contract 2.2: until the work has really ended."""
        waits: deque[asyncio.Future[None]] = deque()

        def sleep(_seconds: float) -> asyncio.Future[None]:
            waits.append(asyncio.get_running_loop().create_future())
            return waits[-1]

        class AwayOnce(GatedStorage):
            away = True

            async def head(self, object_id: ObjectId) -> Metadata | None:
                if self.away:
                    self.away = False
                    raise AtCapacity("away")
                return await super().head(object_id)

        storage = AwayOnce()
        stream = Stream(storage, 5, "key", retry=RetryPolicy(), sleep=sleep)
        outcomes = stream.run(head("x"), get("x"), get("y"))

        assert await anext(outcomes) == (2, Got("y", None))
        oldest = stream.executor.oldest()
        assert oldest is not None
        assert isinstance(oldest.last_error, AtCapacity)
        assert storage.calls == [("get", "y")]
        waits.popleft().set_result(None)
        assert await all_of(outcomes) == [(0, Headed("x", None)), (1, Got("x", None))]

    async def test_nothing_that_waits_for_its_turn_begins_after_closing(self) -> None:
        """Contract 3: another process may have it by then; only what was running runs to its end."""
        storage = GatedStorage("x")
        stream = Stream(storage, 5, "key")
        outcomes = stream.run(head("x"), get("x"), delete("x"), get("y"))
        await anext(outcomes)

        await outcomes.aclose()
        storage.let_go("x")
        await stream.limiter.wait_all_released()

        assert storage.calls == [("head", "x"), ("get", "y")]

    async def test_by_partition_it_is_strictly_one_at_a_time(self) -> None:
        """Contract 4: window 1, so outcomes come in input order."""
        storage = GatedStorage("b")
        outcomes = Stream(storage, 1, "partition").run(head("a"), head("b"), head("c"))

        assert (await anext(outcomes))[0] == 0
        second = waiting(outcomes)
        await settled()
        assert storage.running == [("head", "b")]
        assert ("head", "c") not in storage.calls
        storage.let_go("b")
        assert (await second)[0] == 1
        assert (await anext(outcomes))[0] == 2


class TestQuestions:
    """What the owner of an executor may ask while it runs."""

    async def test_the_oldest_operation_says_what_it_is(self) -> None:
        """Contract 8, ``oldest``: the one that everything waits for."""
        storage = GatedStorage("a", "b")
        stream = Stream(storage, 5)
        assert stream.executor.oldest() is None
        outcomes = stream.run(head("a"), insert("b"), get("c"))
        await anext(outcomes)

        oldest = stream.executor.oldest()
        assert oldest is not None
        assert (oldest.index, oldest.kind, oldest.key, oldest.attempts, oldest.last_error) == (0, "head", "a", 1, None)
        assert oldest.age_seconds >= 0
        storage.let_go("a")
        await anext(outcomes)
        oldest = stream.executor.oldest()
        assert oldest is not None
        assert (oldest.index, oldest.kind, oldest.key) == (1, "insert", "b")
        storage.let_go("b")
        await all_of(outcomes)
        assert stream.executor.oldest() is None

    async def test_shrinking_leaves_the_permits_of_what_runs(self) -> None:
        """Contract 3: at the drain deadline; the rest comes back after the last operation."""
        storage = GatedStorage("a", "b", "x")
        stream = Stream(storage, 10, "key")
        outcomes = stream.run(head("a"), head("b"), head("x"), head("x"), head("x"), head("c"))
        await anext(outcomes)

        with pytest.raises(RuntimeError, match="not closed"):
            stream.executor.shrink_to_running()
        await stream.executor.aclose()
        stream.executor.shrink_to_running()

        assert (stream.limiter.in_use, stream.executor.in_flight) == (3, 3)
        storage.let_go("a", "x")
        await settled()
        assert (stream.limiter.in_use, stream.executor.in_flight) == (3, 1)
        storage.let_go("b")
        await stream.limiter.wait_all_released()
        assert await all_of(outcomes) == []

    async def test_shrinking_with_nothing_running_changes_nothing(self) -> None:
        """The permits are back already."""
        stream = Stream(GatedStorage(), 10)
        await stream.executor.aclose()

        stream.executor.shrink_to_running()

        assert stream.limiter.released_total == 10

    @pytest.mark.parametrize("close", [False, True])
    async def test_waiting_for_the_end_of_what_is_in_flight(self, *, close: bool) -> None:
        """At once where nothing is; else after the last one, also where the output is not consumed."""
        storage = GatedStorage("a", "b")
        stream = Stream(storage, 5)
        await stream.executor.wait_finished()
        outcomes = stream.run(head("a"), head("b"), head("c"))
        await anext(outcomes)
        if close:
            await outcomes.aclose()
        finished = asyncio.create_task(stream.executor.wait_finished())
        await settled()

        storage.let_go("a")
        await settled()
        assert not finished.done()
        storage.let_go("b")
        await finished
        assert stream.executor.in_flight == 0
        assert stream.limiter.in_use == (0 if close else 5)
        await outcomes.aclose()

    async def test_waiting_for_the_end_can_be_cancelled(self) -> None:
        """It leaves nothing behind."""
        storage = GatedStorage("a")
        stream = Stream(storage, 5)
        outcomes = stream.run(head("a"), head("b"))
        await anext(outcomes)
        finished = asyncio.create_task(stream.executor.wait_finished())
        await settled()

        finished.cancel()
        await asyncio.wait([finished])
        assert stream.executor._finish_waiters == []
        storage.let_all_go()
        assert len(await all_of(outcomes)) == 1

    async def test_operations_are_counted_by_kind_and_outcome(self) -> None:
        """MET-1, MET-2: started once, observed once, with the seconds between; what is no operation is not counted."""
        storage, counts = GatedStorage("slow"), Counts()
        storage.failures["bad"] = ValueError
        limiter = ConcurrencyLimiter(5)
        executor = StreamExecutor(Handler(storage), limiter.acquire_many_nowait(5), counts=counts.operations)
        outcomes = executor.execute(Source([head("slow"), head("bad"), get("fine"), KeyError(), "nonsense"]))
        first = waiting(outcomes)
        await settled()

        heads = counts.operations["head"]
        assert (heads.started, heads.success.count, heads.error.count) == (2, 0, 1)
        storage.let_go("slow")
        await first
        await all_of(outcomes)

        gets = counts.operations["get"]
        assert (heads.started, heads.success.count, heads.error.count) == (2, 1, 1)
        assert (gets.started, gets.success.count, gets.error.count) == (1, 1, 0)
        assert heads.success.sum > 0
        assert counts.operations["insert"].started == counts.operations["delete"].started == 0

    async def test_context_of_the_consumer_is_seen_by_operations(self) -> None:
        """Whoever starts the stream gives it its context: log fields, traces."""
        variable: ContextVar[str] = ContextVar("variable", default="unset")
        seen = []

        class Reading(GatedStorage):
            async def head(self, object_id: ObjectId) -> Metadata | None:
                seen.append(variable.get())
                return await super().head(object_id)

        variable.set("set")
        await all_of(Stream(Reading()).run(head("a")))

        assert seen == ["set"]


class TestDefects:
    """Of this module or of the event loop's other users: nobody is left waiting for ever."""

    async def test_a_defect_stops_the_stream_and_is_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Better than an output that never ends."""
        stream = Stream(GatedStorage("a"), 3)
        outcomes = stream.run(head("a"), head("b"), head("c"))

        def broken(*_: object) -> TierstreamError:
            raise RuntimeError("defect")

        monkeypatch.setattr("consumer.executor.failure_of", broken)
        await anext(outcomes)
        for runner in stream.executor._runners:
            runner.cancel()

        with pytest.raises(RuntimeError, match="defect"):
            await all_of(outcomes)
        assert stream.limiter.in_use == 0

    async def test_runners_that_are_cancelled_are_replaced(self) -> None:
        """Parked ones, called ones, and those that have not taken their first step."""
        storage = GatedStorage("1", "2")
        stream = Stream(storage, 3)
        source = Source(ended=False)
        outcomes = stream.executor.execute(source)
        source.feed((0, head("0")))
        await anext(outcomes)
        following = waiting(outcomes)
        await settled()

        for runner in list(stream.executor._runners):  # parked
            runner.cancel()
        await settled()
        assert not stream.executor._runners
        source.feed((1, head("1")))
        await asyncio.sleep(0)
        for runner in list(stream.executor._runners):  # new, before its first step
            runner.cancel()
        await settled()
        assert storage.running == [("head", "1")]
        storage.let_go("1")
        assert (await following)[0] == 1

        following = waiting(outcomes)
        await settled()
        source.feed((2, head("2")))
        await asyncio.sleep(0)
        for runner in list(stream.executor._runners):  # called, before it looked
            runner.cancel()
        await settled()
        assert storage.running == [("head", "2")]
        storage.let_go("2")
        assert (await following)[0] == 2

        following = waiting(outcomes)
        await settled()
        storage.hold("3")
        source.feed((3, head("3")))  # nobody is thought to be on the way who has been cancelled
        await settled()
        assert storage.running == [("head", "3")]
        storage.let_go("3")
        assert (await following)[0] == 3
        source.end()
        assert await all_of(outcomes) == []

    async def test_no_runner_is_called_for_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A call costs a turn of the event loop: of operations that suspend, no more are made than there are."""
        calls = 0
        call = StreamExecutor._call_runner

        def counted(executor: StreamExecutor) -> None:
            nonlocal calls
            calls += 1
            call(executor)

        monkeypatch.setattr(StreamExecutor, "_call_runner", counted)
        storage, window = GatedStorage(hold_all=True), 64
        outcomes = Stream(storage, window).run(*[head(str(number)) for number in range(window)])
        following = waiting(outcomes)
        await settled()
        assert len(storage.running) == window
        assert calls == window

        storage.let_all_go()
        await following
        assert len(await all_of(outcomes)) == window - 1
        assert calls == window


class Served:
    """An execution that is served, with an input that is fed and outcomes as they were delivered."""

    def __init__(self, storage: object, window: int, ordering: Ordering = "unordered") -> None:
        self.stream = Stream(storage, window, ordering)
        self.executor = self.stream.executor
        self.items: deque[Item] = deque()
        self.delivered: list[Outcome] = []
        self.over = False
        self.takes_nothing = False
        self._fed = asyncio.Event()
        self.task = asyncio.create_task(self.executor.serve(self.take, self.wait, self.deliver))

    def feed(self, *items: Item) -> None:
        """Have *items* at hand."""
        self.items.extend(items)
        self._fed.set()

    def end(self) -> None:
        """End the input."""
        self.over = True
        self._fed.set()

    def take(self) -> Item | None:
        """Give what is at hand."""
        return self.items.popleft() if self.items else None

    async def wait(self) -> bool:
        """Wait until something is, or the input is over."""
        while not self.items and not self.over:
            self._fed.clear()
            await self._fed.wait()
        return bool(self.items)

    def deliver(self, index: int, outcome: object) -> None:
        """Keep one outcome."""
        if self.takes_nothing:
            raise ValueError("not taken")
        self.delivered.append((index, outcome))  # type: ignore[arg-type]  # whatever comes


class TestServed:
    """An input that says what it has at hand, and an output that never waits; the rest is held by properties."""

    async def test_all_is_delivered_before_it_ends(self) -> None:
        """As an execution that is consumed, errors and keyless inserts included."""
        served = Served(GatedStorage(), 2)
        error = DecodeError("poison")
        served.feed((4, insert(None)), (7, error), (9, get("a")), (10, "nonsense"))  # type: ignore[arg-type]
        served.end()

        await asyncio.wait_for(served.task, 5)

        outcomes = dict(served.delivered)
        assert isinstance(outcomes[4], Inserted)
        assert outcomes[7] is error
        assert outcomes[9] == Got("a", None)
        assert isinstance(outcomes[10], InvalidOperation)
        assert served.stream.limiter.in_use == 0

    async def test_the_next_item_is_taken_in_the_step_that_finishes_an_operation(self) -> None:
        """Nobody is called for it: that is what being served is for."""
        storage = GatedStorage("a", "b")
        served = Served(storage, 1)
        served.feed((0, head("a")), (1, head("b")))
        await settled()

        storage.let_go("a")
        turns = 0
        while ("head", "b") not in storage.calls:
            await asyncio.sleep(0)
            turns += 1

        assert turns <= 3  # of them one for the gate, one for whoever waits at it
        storage.let_all_go()
        served.end()
        await asyncio.wait_for(served.task, 5)

    async def test_the_window_stays_full_though_turns_are_passed(self) -> None:
        """A runner that goes on with the turn of its object takes nothing: others have to."""
        storage = GatedStorage(hold_all=True)
        served = Served(storage, 3, "key")
        served.feed(*enumerate([head(key) for key in ("hot", "hot", "hot", "a", "b", "c")]))
        await settled()
        assert storage.running == [("head", "hot")]

        storage.let_go("hot")
        await settled()

        assert len(storage.running) == 3
        storage.let_all_go()
        served.end()
        await asyncio.wait_for(served.task, 5)

    async def test_a_window_that_has_found_nothing_fills_up_again(self) -> None:
        """What comes later is waited for by the puller, and started at once."""
        storage = GatedStorage(hold_all=True)
        served = Served(storage, 2)
        served.feed((0, head("a")))
        await settled()

        served.feed((1, head("b")), (2, head("c")))
        await settled()
        assert storage.running == [("head", "a"), ("head", "b")]

        storage.let_go("a")
        await settled()

        assert storage.running == [("head", "b"), ("head", "c")]
        storage.let_all_go()
        served.end()
        await asyncio.wait_for(served.task, 5)

    @pytest.mark.parametrize("thing", [head("a"), DecodeError("poison")], ids=["operations", "errors"])
    async def test_others_have_their_turn_though_nothing_suspends(self, thing: Head | DecodeError) -> None:
        """After a window's worth at the latest."""
        served = Served(GatedStorage(), 10)
        served.feed(*[(number, thing) for number in range(1_000)])
        served.end()

        turns = 0
        while not served.task.done():
            before = len(served.delivered)
            await asyncio.sleep(0)
            turns += 1
            assert len(served.delivered) - before <= 2 * 10

        assert turns >= 1_000 / 20
        assert len(served.delivered) == 1_000

    @pytest.mark.parametrize("thing", [head("a"), DecodeError("poison")], ids=["operation", "error"])
    async def test_a_delivery_that_fails_ends_it(self, thing: Head | DecodeError) -> None:
        """With the permits back; a defect must not go unseen."""
        served = Served(GatedStorage(), 2)
        served.takes_nothing = True
        served.feed((0, thing))
        served.end()

        with pytest.raises(ValueError, match="not taken"):
            await asyncio.wait_for(served.task, 5)

        assert served.stream.limiter.in_use == 0

    @pytest.mark.parametrize("side", ["input", "output"])
    async def test_a_defect_is_told_though_an_operation_is_held_up(self, side: str) -> None:
        """By storage that is away, it may be for hours; its permits come back when it has ended."""
        storage = GatedStorage("a")
        served = Served(storage, 3)
        served.feed((0, head("a")))
        await settled()
        served.takes_nothing = True
        served.feed((1, DecodeError("poison")) if side == "input" else (1, head("b")))

        with pytest.raises(ValueError, match="not taken"):
            await asyncio.wait_for(served.task, 5)

        assert served.stream.limiter.in_use == 3
        storage.let_go("a")
        await asyncio.wait_for(served.executor.wait_finished(), 5)
        assert served.stream.limiter.in_use == 0

    async def test_cancelled_it_leaves_what_runs_to_its_end(self) -> None:
        """The permits come back after the last operation, whose outcome nobody hears of."""
        storage = GatedStorage("a")
        served = Served(storage, 2)
        served.feed((0, head("a")))
        await settled()

        served.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await served.task
        served.feed((1, head("b")))
        await settled()
        assert served.stream.limiter.in_use == 2

        storage.let_go("a")
        await settled()

        assert served.stream.limiter.in_use == 0
        assert storage.ended == [("head", "a")]
        assert not served.delivered

    async def test_a_runner_that_is_cancelled_leaves_the_window_to_others(self) -> None:
        """Also where it has just let others have their turn, and would have taken more."""
        served = Served(GatedStorage(), 10)
        served.feed(*[(number, head("a")) for number in range(1_000)])
        while not served.delivered:  # noqa: ASYNC110 - to be met in its first steps
            await asyncio.sleep(0)

        for runner in served.executor._runners:
            runner.cancel()
        await settled()
        served.end()
        await asyncio.wait_for(served.task, 5)

        assert len(served.delivered) == 1_000

    async def test_it_is_served_once(self) -> None:
        """As it is executed once."""
        served = Served(GatedStorage(), 1)
        served.end()
        await asyncio.wait_for(served.task, 5)

        with pytest.raises(RuntimeError, match="once"):
            await served.executor.serve(served.take, served.wait, served.deliver)
        with pytest.raises(RuntimeError, match="once"):
            served.executor.execute(Source())
