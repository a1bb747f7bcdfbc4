"""The offset tracker against a model that is too simple to be wrong."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, pairwise

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from consumer.offsets import OffsetTracker, Run


def offsets_of(runs: Iterable[Run]) -> list[int]:
    """Every offset of *runs*, which have to ascend with gaps between them."""
    runs = list(runs)
    assert all(before[1] + 1 < after[0] for before, after in pairwise(runs))
    assert all(first <= last for first, last in runs)
    return list(chain.from_iterable(range(first, last + 1) for first, last in runs))


GAPS = st.integers(min_value=0, max_value=1_000) | st.just(0)


class TrackerAgainstModel(RuleBasedStateMachine):
    """Any order of deliveries, resolutions and advances; the model keeps every delivered offset and whether it is done.

    H9b and contract 3: the watermark is the lowest unfinished delivered offset, else the position; it never goes back
    and never passes what is unfinished.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tracker = OffsetTracker(100)
        self.delivered: dict[int, bool] = {}
        self.position = 100
        self.last_watermark = 100

    @rule(gaps=st.lists(GAPS, min_size=1, max_size=20))
    def deliver(self, gaps: list[int]) -> None:
        """Deliver records, each after a gap of so many offsets that hold none."""
        offsets = []
        for gap in gaps:
            offsets.append(self.position + gap)
            self.position += gap + 1
        self.tracker.track(offsets)
        self.delivered.update(dict.fromkeys(offsets, False))

    @precondition(lambda self: not all(self.delivered.values()))
    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        """Finish some of what is unfinished, in any order."""
        unfinished = [offset for offset, done in self.delivered.items() if not done]
        finished = data.draw(st.lists(st.sampled_from(unfinished), unique=True, min_size=1))
        self.tracker.resolve(finished)
        self.delivered.update(dict.fromkeys(finished, True))

    @precondition(lambda self: not all(self.delivered.values()))
    @rule()
    def resolve_the_lowest(self) -> None:
        """Finish what everything waits for."""
        lowest = min(offset for offset, done in self.delivered.items() if not done)
        self.tracker.resolve([lowest])
        self.delivered[lowest] = True

    @rule(distance=st.integers(min_value=-50, max_value=50))
    def advance(self, distance: int) -> None:
        """Tell of a position, which may be an old one."""
        self.tracker.advance(self.position + distance)
        self.position = max(self.position, self.position + distance)

    @invariant()
    def it_agrees_with_the_model(self) -> None:
        """Every number, after every step."""
        tracker = self.tracker
        unfinished = [offset for offset, done in self.delivered.items() if not done]
        watermark = min(unfinished, default=self.position)

        assert tracker.watermark == watermark
        assert tracker.position == self.position
        assert tracker.unfinished == len(unfinished)
        assert tracker.finished_above_gap == sum(done and offset > watermark for offset, done in self.delivered.items())
        assert tracker.distance == self.position - watermark
        assert offsets_of(tracker.finished_runs()) == sorted(
            offset for offset, done in self.delivered.items() if done and offset > watermark
        )

    @invariant()
    def the_watermark_never_goes_back(self) -> None:
        """A commit that goes back makes the group run finished records again."""
        watermark = self.tracker.watermark
        assert watermark >= self.last_watermark
        self.last_watermark = watermark


TestTrackerAgainstModel = TrackerAgainstModel.TestCase


@given(gaps=st.lists(GAPS, min_size=1, max_size=60), data=st.data())
def test_whatever_the_order_everything_finished_is_committed_at_the_end(gaps: list[int], data: st.DataObject) -> None:
    """One at a time in any order: below the watermark nothing is ever unfinished, and in the end nothing is left."""
    offsets = [gap + 1 + index * 1_001 for index, gap in enumerate(gaps)]
    tracker = OffsetTracker(0)
    tracker.track(offsets)
    unfinished = set(offsets)

    for offset in data.draw(st.permutations(offsets)):
        tracker.resolve([offset])
        unfinished.remove(offset)
        assert tracker.watermark == min(unfinished, default=offsets[-1] + 1)

    assert tracker.unfinished == tracker.finished_above_gap == tracker.distance == 0


@given(st.lists(st.integers(min_value=0, max_value=30), max_size=12), st.integers(min_value=0, max_value=30))
def test_offsets_are_tracked_exactly_when_they_follow(offsets: list[int], start: int) -> None:
    """Ascending, without repeats, from the position on; else refused, with nothing changed."""
    tracker = OffsetTracker(start)
    follow = offsets == sorted(set(offsets)) and all(offset >= start for offset in offsets)

    try:
        tracker.track(offsets)
    except ValueError:
        assert not follow
        assert (tracker.position, tracker.unfinished) == (start, 0)
    else:
        assert follow
        assert tracker.unfinished == len(offsets)
