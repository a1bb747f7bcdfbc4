"""How the work grows: four times as much of anything costs about four times the operations, never sixteen.

Counted are the bytecode instructions that the package itself executes, the same on every machine however busy it is.
What C code does inside one of them is not seen; where a structure could hide a loop there (deleting from the front of a
list), the structure is one that has none: dictionaries in order, and deques.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Self

import pytest

from consumer.assignment import CHUNK_RECORDS
from consumer.executor import Item, Ordering, StreamExecutor
from consumer.handler import Handler
from consumer.ids import ObjectId
from consumer.offset_map import decode, encode
from consumer.offsets import OffsetTracker, Run
from consumer.operations import Metadata
from consumer.permits import ConcurrencyLimiter
from consumer.retry import RetryPolicy
from gates import GatedStorage, head

FOURFOLD = 4
LINEAR_AT_MOST = 5.0
"""Times the instructions for four times the work: 4 where every piece costs the same, 4.8 where it costs a logarithm of
their number (256 to 1,024), 16 where it costs their number."""
FLAT_AT_MOST = 1.25
"""Times the instructions for the same work where only the surroundings have grown."""


class Instructions:
    """Counts the instructions that functions of the package execute inside the ``with`` block."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        if not frame.f_globals.get("__name__", "").startswith("consumer."):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._executed

    def _executed(self, _frame: FrameType, event: str, _argument: Any) -> Callable[..., Any]:
        if event == "opcode":
            self.count += 1
        return self._executed


def instructions(work: Callable[[], object]) -> int:
    """Count what *work* executes."""
    with Instructions() as counted:
        work()
    return counted.count


def test_a_quadratic_step_would_be_seen() -> None:
    """The measure itself: a tracker asked for everything after every record is what it is there to find."""

    def ask_too_often(records: int) -> int:
        tracker = OffsetTracker(0)
        tracker.track(range(0, records * 2, 2))

        def work() -> None:
            for offset in range(records * 2 - 2, 0, -2):
                tracker.resolve([offset])
                tracker.finished_runs()

        return instructions(work)

    assert ask_too_often(40 * FOURFOLD) > ask_too_often(40) * FOURFOLD * 2


# --------------------------------------------------------------------------------------------------- offsets


def _shuffled(offsets: range) -> list[int]:
    mixed = list(offsets)
    random.Random(7).shuffle(mixed)
    return mixed


@pytest.mark.parametrize(
    "order", [list, lambda offsets: list(reversed(offsets)), _shuffled], ids=["as read", "backwards", "mixed"]
)
@pytest.mark.parametrize("gap", [1, 2], ids=["dense", "with holes"])
def test_tracking_and_resolving_cost_the_same_for_each_record(order: Callable[[range], list[int]], gap: int) -> None:
    """In chunks as they are read, in groups as they are acknowledged, with the watermark looked at after each."""

    def work(records: int) -> int:
        tracker = OffsetTracker(0)
        offsets = range(0, records * gap, gap)
        finished = order(offsets)

        def run() -> None:
            for begin in range(0, records, CHUNK_RECORDS):
                tracker.track(offsets[begin : begin + CHUNK_RECORDS])
            for begin in range(0, records, 16):
                tracker.resolve(finished[begin : begin + 16])
                assert tracker.watermark >= 0

        return instructions(run)

    assert work(4096 * FOURFOLD) <= work(4096) * LINEAR_AT_MOST


def test_a_stuck_record_makes_those_above_it_no_dearer() -> None:
    """Finished records above a gap are runs: neither the commit nor the next record pays for their number."""

    def work(above: int) -> int:
        tracker = OffsetTracker(0)
        tracker.track(range(above))
        tracker.resolve(range(1, above))

        def run() -> None:
            for offset in range(above, above + 64):
                tracker.track([offset])
                tracker.resolve([offset])
                encode(tracker.watermark, tracker.finished_runs(), "cluster")

        return instructions(run)

    assert work(4000 * FOURFOLD) <= work(4000) * FLAT_AT_MOST


def _runs(count: int) -> list[Run]:
    return [(at * 3 + 1, at * 3 + 1) for at in range(count)]


@pytest.mark.parametrize("step", ["finished_runs", "encode", "decode", "restored"])
def test_an_offset_map_costs_by_its_runs(step: str) -> None:
    """Each step between a tracker and the next tracker, up to the largest map there is."""

    def work(runs: int) -> int:
        tracker = OffsetTracker(0, _runs(runs))
        tracker.track(range(runs * 3 + 3))
        text = encode(0, _runs(runs), "cluster")
        steps: dict[str, Callable[[], object]] = {
            "finished_runs": tracker.finished_runs,
            "encode": lambda: encode(0, _runs(runs), "cluster"),
            "decode": lambda: decode(text, committed_offset=0, cluster_id="cluster", end=None),
            "restored": lambda: OffsetTracker(0, _runs(runs)).track(range(runs * 3 + 3)),
        }
        return instructions(steps[step])

    assert work(1600 * FOURFOLD) <= max(work(1600), 1) * LINEAR_AT_MOST


# --------------------------------------------------------------------------------------------------- execution


class Waiting(GatedStorage):
    """Every call waits for one turn of the event loop, as one to a backend waits for its answer."""

    async def head(self, object_id: ObjectId) -> Metadata | None:
        await asyncio.sleep(0)
        return await super().head(object_id)


async def executed(keys: Iterable[str], window: int, ordering: Ordering, *, waits: bool) -> int:
    """Run a head for each key; return what that took."""

    async def inputs() -> AsyncIterator[Item]:
        for index, key in enumerate(keys):
            yield index, head(key)

    limiter = ConcurrencyLimiter(window)
    handler = Handler(Waiting() if waits else GatedStorage(), retry=RetryPolicy())
    executor = StreamExecutor(handler, limiter.acquire_many_nowait(window), ordering=ordering)
    with Instructions() as counted:
        async for _ in executor.execute(inputs()):
            pass
    assert limiter.in_use == 0
    return counted.count


def _keys(count: int, objects: int) -> Iterator[str]:
    return (str(number % objects) for number in range(count))


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "waiting"])
@pytest.mark.parametrize("objects", [1, 7, 10_000], ids=["one object", "few", "each its own"])
async def test_an_operation_costs_the_same_however_many_there_are(objects: int, *, waits: bool) -> None:
    """Key order with one object for all, which is one chain; with a few; and with none shared."""
    few = await executed(_keys(300, objects), 64, "key", waits=waits)
    many = await executed(_keys(300 * FOURFOLD, objects), 64, "key", waits=waits)

    assert many <= few * LINEAR_AT_MOST


@pytest.mark.parametrize("objects", [1, 7, 10_000], ids=["one object", "few", "each its own"])
async def test_an_operation_costs_the_same_however_large_the_window_is(objects: int) -> None:
    """A wide window is no dearer than a narrow one: nobody looks through what is in flight."""
    narrow = await executed(_keys(1200, objects), 60, "key", waits=True)
    wide = await executed(_keys(1200, objects), 60 * FOURFOLD, "key", waits=True)

    assert wide <= narrow * FLAT_AT_MOST


async def test_time_limits_cost_the_same_however_many_run() -> None:
    """All of one length, so that only the oldest is looked at."""

    async def work(at_once: int) -> int:
        storage = GatedStorage(hold_all=True)
        handler = Handler(storage, retry=RetryPolicy())
        applied: list[Awaitable[object]] = []
        with Instructions() as counted:
            applied += [asyncio.ensure_future(handler.apply(head(str(number)))) for number in range(at_once)]
            await asyncio.sleep(0)
            storage.let_all_go()
            await asyncio.gather(*applied)
        return counted.count

    assert await work(100 * FOURFOLD) <= await work(100) * LINEAR_AT_MOST
