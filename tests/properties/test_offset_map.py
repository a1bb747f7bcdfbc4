"""The offset map with the tracker it comes from and goes to, against a log and a set of answers kept naively."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from hypothesis import given, settings
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

    The end of a log is cut where a replica becomes leader that had not caught up (unclean leader election). Other
    records then come to stand where the lost ones stood. That shows as long as the log is shorter than what an owner
    has read, or than what a map speaks of: a position that is out of range, a map that is not believed. Where the log
    has grown past that before anybody looked, nothing shows: offsets, which is all that commits, maps and fetches of
    the client speak of, say the same of either log. Records that came to stand where somebody counts another one as
    finished are *mistaken*: they may go unanswered, and no others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []
        self.records: dict[int, int] = {}
        """Which record stands at an offset: no two have the same number, also at the same offset."""
        self.written = 0
        self.end = 0
        self.begin = 0
        self.answers: Counter[int] = Counter()
        """By record."""
        self.mistaken: set[int] = set()
        """Records."""
        self.committed = 0
        self.text = ""
        self.answered_at_commit: set[int] = set()
        self._begin_at(OffsetTracker(0), set())

    def _begin_at(self, tracker: OffsetTracker, known: set[int]) -> None:
        """Another owner, or one that has heard of another log, begins."""
        self.tracker = tracker
        self.running: list[int] = []
        self.delivered: dict[int, int] = {}
        """Records by offset, as this owner got them."""
        self.known = known
        """Finished, as far as this owner knows."""
        self.not_again = set(known)
        """What is committed as finished, as far as this owner believes it."""
        self.began_anew = False

    # ------------------------------------------------------------------------------------------ the log

    @rule(gaps=st.lists(GAPS, min_size=1, max_size=20), marker=st.booleans())
    def produce(self, gaps: list[int], marker: bool) -> None:
        """Put records at the end, each after so many offsets that hold none; maybe a marker after the last."""
        for gap in gaps:
            offset = self.end + gap
            self.log.append(offset)
            self.records[offset] = self.written
            if (
                offset < max(self.tracker.position, self.committed)
                or offset in self.known
                or offset in self.answered_at_commit
            ):
                self.mistaken.add(self.written)
            self.written += 1
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

    @precondition(lambda self: self.log)
    @rule(data=st.data())
    def cut_the_end(self, data: st.DataObject) -> None:
        """Take the last records away, with all that was said of them; nobody is told."""
        self._cut(data.draw(st.sampled_from(self.log)))

    @precondition(lambda self: self.text)
    @rule(data=st.data(), grown=st.booleans(), earliest=st.booleans())
    def cut_the_end_where_the_map_speaks_of_it_and_crash(
        self, data: st.DataObject, grown: bool, earliest: bool
    ) -> None:
        """Up to any offset of the map, or behind all of them; then the log may grow past it again, or half the way."""
        mapped = sorted(offset for offset in self.answered_at_commit if self.committed <= offset < self.end)
        if mapped:
            self._cut(max(self.begin, data.draw(st.sampled_from([*mapped, mapped[-1] + 1]))))
        if grown:
            self.produce([data.draw(GAPS)], marker=False)
        self.crash(earliest=earliest)

    def _cut(self, end: int) -> None:
        self.end = end
        self.log = [offset for offset in self.log if offset < end]

    # ------------------------------------------------------------------------------------------ the owner

    @rule(count=st.integers(min_value=1, max_value=30), earliest=st.booleans())
    def deliver(self, count: int, earliest: bool) -> None:
        """Track the next records, as far as the distance allows; run what is not finished."""
        tracker = self.tracker
        if tracker.position > self.end:
            self._find_another_log(earliest)
            return
        ahead = [offset for offset in self.log if offset >= tracker.position][:count]
        if ahead and not tracker.unfinished:
            tracker.advance(ahead[0])
        ceiling = tracker.watermark + DISTANCE_MAX
        offsets = [offset for offset in ahead if offset < ceiling]
        fresh = tracker.track(offsets)
        self.delivered.update({offset: self.records[offset] for offset in offsets})
        assert list(fresh) == [offset for offset in offsets if offset not in self.known]
        assert not self.not_again.intersection(fresh), "a mapped record ran again"
        self.running.extend(fresh)

    def _find_another_log(self, earliest: bool) -> None:
        """The position is out of range: what runs is finished first, then the owner begins as it is told to."""
        if not self.running:
            self._begin_at(OffsetTracker(self.begin if earliest else self.end), set())
            self.began_anew = True

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """Finish some of what runs, in any order."""
        finished = data.draw(st.lists(st.sampled_from(self.running), unique=True, min_size=1))
        self._finish(finished)

    @precondition(lambda self: len(self.running) > 1)
    @rule(committed=st.booleans())
    def answer_all_but_the_first(self, committed: bool) -> None:
        """One record is stuck; a commit may follow."""
        self._finish(self.running[1:])
        if committed:
            self.commit()

    def _finish(self, offsets: list[int]) -> None:
        self.tracker.resolve(offsets)
        self.answers.update(self.delivered[offset] for offset in offsets)
        self.known.update(offsets)
        self.running = [offset for offset in self.running if offset not in set(offsets)]

    @rule()
    def commit(self) -> None:
        """Commit the watermark with the map; it goes back only where the owner has found another log."""
        before = self.committed
        self.committed = self.tracker.watermark
        self.text = encode(self.committed, self.tracker.finished_runs(), CLUSTER)
        self.answered_at_commit = {offset for offset in self.known if offset < self.committed or self._in_map(offset)}
        self.not_again = set(self.answered_at_commit)
        assert self.committed >= before or self.began_anew
        self.began_anew = False
        assert len(self.text) <= CHARACTERS_MAX

    def _in_map(self, offset: int) -> bool:
        """Whether the owner may still say that *offset* is finished: it met it, or has not come so far."""
        return offset in self.delivered or offset >= self.tracker.position

    @rule(earliest=st.booleans())
    def crash(self, earliest: bool) -> None:
        """Forget everything but the commit; another owner begins there, as the service does.

        The map is believed where all it speaks of is in the log, or was; where that ends before, nothing of it is.
        """
        found = decode(self.text, committed_offset=self.committed, cluster_id=CLUSTER, end=self.end)
        mapped = {offset for offset in self.answered_at_commit if offset >= self.committed}
        assert found.valid == (bool(mapped) and max(mapped) < self.end)
        assert found.reason == (None if found.valid else "beyond_log_end" if mapped else "absent")
        if self.committed > self.end:
            self._begin_at(OffsetTracker(self.begin if earliest else self.end), set())
            self.began_anew = True
            return
        self._begin_at(
            OffsetTracker(self.committed, found.finished if found.valid else ()), mapped if found.valid else set()
        )
        if self.committed < self.begin:
            self.tracker.advance(self.begin)

    # ------------------------------------------------------------------------------------------ what holds

    @invariant()
    def nothing_is_committed_past_unanswered_records(self) -> None:
        """Contract 3: every record that exists below the commit was answered, but for those taken for another."""
        below = [self.records[offset] for offset in self.log if offset < self.committed]
        assert [record for record in below if not self.answers[record] and record not in self.mistaken] == []

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
TestPartitionThroughManyOwners.settings = settings(max_examples=500)
"""As many as it takes to cut a log exactly where a map ends, again and again."""
