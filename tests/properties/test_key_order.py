"""Operations on one object, in every interleaving of storage, responses and dead letters: nothing goes ahead.

The model is two sentences of the contract: in the ordering ``key`` a response leaves only behind every earlier
operation on its object, and an offset counts as finished, for a commit or in the offset map, only behind them too. A
replay of the earlier one alone would otherwise undo the later one.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from hypothesis import event, given, settings
from hypothesis import strategies as st

from consumer.assignment import Assignment
from consumer.errors import BackendError
from consumer.offset_map import decode
from gates import GatedStorage
from lanes import Workplace, fetched, until

OBJECTS = ("a", "b", "c")

LOOP_TURNS = 12
"""Enough for an operation that was let go to end, be answered, and the next one on its object to begin."""

STEP = st.one_of(
    st.tuples(st.just("end"), st.sampled_from(OBJECTS), st.sampled_from([False, False, True])),
    st.tuples(st.just("responses"), st.integers(1, 4), st.just(False)),
    st.tuples(st.just("dead letters"), st.integers(1, 2), st.just(False)),
)
"""An operation ends, perhaps failing for good; or a broker acknowledges some of what waits."""


class SteppedStorage(GatedStorage):
    """Calls wait until the one that runs on an object is told to end."""

    def __init__(self) -> None:
        super().__init__(*OBJECTS)

    def end(self, key: str, *, failing: bool) -> None:
        """Let the call that waits on *key* end; the next one on it waits again."""
        self.failures.pop(key, None)
        if failing:
            self.failures[key] = lambda: BackendError("refused for good")
        gate = self._gates[key]
        gate.set()
        self._gates[key] = asyncio.Event()


async def turns() -> None:
    """Let everything happen that can."""
    for _ in range(LOOP_TURNS):
        await asyncio.sleep(0)


def check(place: Workplace, assignment: Assignment, objects: list[str]) -> int:
    """Hold the two sentences against what is there now; return how many offsets stand in the map."""
    watermark = assignment.watermark
    said = decode(assignment.offset_map, committed_offset=watermark, cluster_id="cluster", end=len(objects))
    above = {offset for first, last in said.finished for offset in range(first, last + 1)}
    by_object: defaultdict[str, list[int]] = defaultdict(list)
    for offset, name in enumerate(objects):
        by_object[name].append(offset)
    for offsets in by_object.values():
        finished = [offset < watermark or offset in above for offset in offsets]
        assert finished == sorted(finished, reverse=True), (offsets, watermark, above)
    answered: defaultdict[str, list[int]] = defaultdict(list)
    for token in place.responses.tokens:
        answered[objects[token]].append(token)
    for name, tokens in answered.items():
        assert tokens == by_object[name][: len(tokens)]
    return len(above)


async def played(objects: list[str], steps: list[tuple[str, str | int, bool]], window: int) -> int:
    """Play *steps*, checking after each; then let everything end, and return the most that stood in a map."""
    storage = SteppedStorage()
    place = Workplace(storage, limit=window)
    assignment = place.assign(window=window)
    assignment.receive([fetched("insert", offset, name) for offset, name in enumerate(objects)])
    most = 0
    try:
        for kind, what, failing in steps:
            await turns()
            if isinstance(what, str):
                storage.end(what, failing=failing)
            else:
                lane = place.responses if kind == "responses" else place.dead_letters
                lane.acknowledge(min(what, len(lane.waiting)))
            await turns()
            most = max(most, check(place, assignment, objects))
    finally:
        storage.failures.clear()
        storage.let_all_go()
        place.responses.acknowledge_always()
        place.dead_letters.acknowledge_always()
        await until(lambda: assignment.watermark == len(objects))
        await place.clear_up()
    assert not place.failures
    assert place.budget.used == 0
    return most


@given(
    objects=st.lists(st.sampled_from(OBJECTS), min_size=4, max_size=12),
    steps=st.lists(STEP, min_size=8, max_size=40),
    window=st.integers(1, 6),
)
@settings(max_examples=150)
def test_no_operation_goes_ahead_of_an_earlier_one_on_its_object(
    objects: list[str], steps: list[tuple[str, str | int, bool]], window: int
) -> None:
    """Contract 3, 4: insert A, insert B on one object never ends as A."""
    most = asyncio.run(played(objects, steps, window))
    event("offsets stood in a map" if most else "no map")
