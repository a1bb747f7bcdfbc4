"""The offset map with the tracker it comes from and goes to, against a log and a set of answers kept naively."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from consumer.offset_map import CHARACTERS_MAX, Run, decode, encode
from consumer.offsets import DISTANCE_MAX, OffsetTracker

CLUSTER = "cluster"

GAPS = st.just(0) | st.integers(min_value=0, max_value=3) | st.integers(min_value=0, max_value=DISTANCE_MAX // 2)


@st.composite
def runs_above(draw: st.DrawFn, base: int) -> list[Run]:
    """Runs that the tracker of a partition could hold: within the distance, with gaps between them."""
    runs: list[Run] = []
    first = base + draw(GAPS)
    while first < base + DISTANCE_MAX and len(runs) < 200:
        last = min(first + draw(GAPS), base + DISTANCE_MAX - 1)
        runs.append((first, last))
        if draw(st.integers(min_value=0, max_value=20)) == 0:
            break
        first = last + 2 + draw(GAPS)
    return runs


BASES = st.integers(min_value=0, max_value=2**63 - 1 - DISTANCE_MAX)


@given(st.data(), BASES, st.text(max_size=300))
def test_what_is_written_is_read_back(data: st.DataObject, base: int, cluster: str) -> None:
    """Contract 3: any runs, base and cluster."""
    runs = data.draw(runs_above(base))
    text = encode(base, runs, cluster)

    assert text.isascii()
    found = decode(text, committed_offset=base, cluster_id=cluster, end=base + DISTANCE_MAX)
    assert found.valid or not runs
    assert list(found.finished) == runs


@given(BASES, st.binary(min_size=DISTANCE_MAX // 8, max_size=DISTANCE_MAX // 8), st.text(min_size=100, max_size=300))
def test_any_pattern_within_the_distance_fits_a_commit(base: int, pattern: bytes, cluster: str) -> None:
    """Contract 3: one bit for each offset of the distance, in any order, never more than 4,096 characters."""
    digits = "".join(f"{byte:08b}" for byte in pattern)
    runs: list[Run] = []
    for offset, digit in enumerate(digits, base):
        if digit == "1":
            if runs and runs[-1][1] == offset - 1:
                runs[-1] = runs[-1][0], offset
            else:
                runs.append((offset, offset))
    text = encode(base, runs, cluster)

    assert len(text) <= CHARACTERS_MAX
    assert list(decode(text, committed_offset=base, cluster_id=cluster, end=None).finished) == runs


@given(st.text(), st.text(max_size=3))
def test_no_text_raises(text: str, cluster: str) -> None:
    """Metadata is anybody's."""
    for given_text in (text, "ts1:" + text):
        assert not decode(given_text, committed_offset=0, cluster_id=cluster, end=None).valid


@given(st.data(), st.integers(min_value=0, max_value=1000))
def test_a_changed_text_says_the_same_or_nothing(data: st.DataObject, base: int) -> None:
    """A character changed, lost or added: never other offsets."""
    runs = data.draw(runs_above(base))
    text = encode(base, runs, CLUSTER)
    where = data.draw(st.integers(min_value=0, max_value=len(text)))
    lost = data.draw(st.integers(min_value=0, max_value=3))
    added = data.draw(st.text("ABCabc019+/=\x00", max_size=3))
    found = decode(text[:where] + added + text[where + lost :], committed_offset=base, cluster_id=CLUSTER, end=None)

    assert not found.valid or list(found.finished) == runs


class PartitionThroughManyOwners(RuleBasedStateMachine):
    """A log with holes, owners that come and go, answers in any order, commits at any time, truncation at both ends.

    The model keeps every record that exists, how often each was answered, and what the last commit knew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []
        self.end = 0
        self.begin = 0
        self.answers: Counter[int] = Counter()
        self.committed = 0
        self.text = ""
        self.answered_at_commit: set[int] = set()
        self.tracker = OffsetTracker(0)
        self.running: list[int] = []
        self.delivered: set[int] = set()
        self.known: set[int] = set()
        """Finished, as far as this owner knows."""

    # ------------------------------------------------------------------------------------------ the log

    @rule(gaps=st.lists(GAPS, min_size=1, max_size=20), marker=st.booleans())
    def produce(self, gaps: list[int], marker: bool) -> None:
        """Put records at the end, each after so many offsets that hold none; maybe a marker after the last."""
        for gap in gaps:
            self.log.append(self.end + gap)
            self.end += gap + 1
        self.end += marker

    @precondition(lambda self: self.log)
    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        """Take records out of the middle; not those that run, which were fetched before."""
        gone = data.draw(st.sets(st.sampled_from(self.log)))
        self.log = [offset for offset in self.log if offset not in gone]

    @precondition(lambda self: self.log)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        """Cut the beginning off; who reads there jumps."""
        self.begin = max(self.begin, data.draw(st.sampled_from(self.log)))
        self.log = [offset for offset in self.log if offset >= self.begin]
        if self.tracker.position < self.begin and not self.tracker.unfinished:
            self.tracker.advance(self.begin)

    # ------------------------------------------------------------------------------------------ the owner

    @rule(count=st.integers(min_value=1, max_value=30))
    def deliver(self, count: int) -> None:
        """Track the next records, as far as the distance allows; run what is not finished."""
        tracker = self.tracker
        ahead = [offset for offset in self.log if offset >= tracker.position][:count]
        if ahead and not tracker.unfinished:
            tracker.advance(ahead[0])
        ceiling = tracker.watermark + DISTANCE_MAX
        offsets = [offset for offset in ahead if offset < ceiling]
        fresh = tracker.track(offsets)
        self.delivered.update(offsets)
        assert list(fresh) == [offset for offset in offsets if offset not in self.known]
        assert not self.answered_at_commit.intersection(fresh), "a mapped record ran again"
        self.running.extend(fresh)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """Finish some of what runs, in any order."""
        finished = data.draw(st.lists(st.sampled_from(self.running), unique=True, min_size=1))
        self._finish(finished)

    @precondition(lambda self: len(self.running) > 1)
    @rule()
    def answer_all_but_the_first(self) -> None:
        """One record is stuck."""
        self._finish(self.running[1:])

    def _finish(self, offsets: list[int]) -> None:
        self.tracker.resolve(offsets)
        self.answers.update(offsets)
        self.known.update(offsets)
        self.running = [offset for offset in self.running if offset not in set(offsets)]

    @rule()
    def commit(self) -> None:
        """Commit the watermark with the map."""
        before = self.committed
        self.committed = self.tracker.watermark
        self.text = encode(self.committed, self.tracker.finished_runs(), CLUSTER)
        self.answered_at_commit = {offset for offset in self.known if offset < self.committed or self._in_map(offset)}
        assert self.committed >= before
        assert len(self.text) <= CHARACTERS_MAX

    def _in_map(self, offset: int) -> bool:
        """Whether the owner may still say that *offset* is finished: it met it, or has not come so far."""
        return offset in self.delivered or offset >= self.tracker.position

    @rule()
    def crash(self) -> None:
        """Forget everything but the commit; another owner begins there, as the service does."""
        found = decode(self.text, committed_offset=self.committed, cluster_id=CLUSTER, end=self.end)
        assert found.valid == bool(self.text)
        self.tracker = OffsetTracker(self.committed, found.finished)
        self.running = []
        self.delivered = set()
        self.known = {offset for offset in self.answered_at_commit if offset >= self.committed}
        if self.committed < self.begin:
            self.tracker.advance(self.begin)

    # ------------------------------------------------------------------------------------------ what holds

    @invariant()
    def nothing_is_committed_past_unanswered_records(self) -> None:
        """Contract 3: every record that exists below the commit was answered."""
        assert [offset for offset in self.log if offset < self.committed and not self.answers[offset]] == []

    @invariant()
    def the_runs_are_what_was_finished(self) -> None:
        """Everything known to be finished above the watermark, and nothing else."""
        tracker = self.tracker
        runs = tracker.finished_runs()
        above = sorted(
            offset
            for offset in self.known
            if offset >= tracker.watermark and (offset in self.delivered or offset >= tracker.position)
        )
        assert list(chain.from_iterable(range(first, last + 1) for first, last in runs)) == above
        assert tracker.finished_above_gap == len(above)
        assert tracker.unfinished == len(self.running)


TestPartitionThroughManyOwners = PartitionThroughManyOwners.TestCase
