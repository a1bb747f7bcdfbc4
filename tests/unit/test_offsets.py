"""What may be committed is exactly what is finished without a gap in between."""

from __future__ import annotations

import pytest

from consumer.offsets import OffsetTracker, Run


def test_with_nothing_delivered_the_start_may_be_committed() -> None:
    """The committed offset is where reading starts; committing it again changes nothing."""
    tracker = OffsetTracker(17)

    assert (tracker.watermark, tracker.position) == (17, 17)
    assert (tracker.unfinished, tracker.finished_above_gap, tracker.distance) == (0, 0, 0)


def test_the_watermark_stays_at_the_lowest_unfinished_offset() -> None:
    """H9b, contract 3: nothing is committed past an unfinished record, whatever else is finished."""
    tracker = OffsetTracker(0)
    tracker.track(range(5))

    tracker.resolve([4, 2, 3])

    assert tracker.watermark == 0
    assert tracker.finished_above_gap == 3
    assert tracker.unfinished == 2


def test_the_watermark_goes_over_everything_that_was_finished_before_its_turn() -> None:
    """Finishing the lowest offset frees all finished ones above it at once."""
    tracker = OffsetTracker(0)
    tracker.track(range(5))
    tracker.resolve([1, 2, 4])

    tracker.resolve([0])
    assert tracker.watermark == 3
    assert tracker.finished_above_gap == 1

    tracker.resolve([3])
    assert tracker.watermark == tracker.position == 5
    assert tracker.finished_above_gap == 0


def test_a_finished_partition_commits_the_offset_after_the_last_record() -> None:
    """A commit is exclusive, as Kafka's is."""
    tracker = OffsetTracker(10)
    tracker.track([10, 11])
    tracker.resolve([10, 11])

    assert tracker.watermark == 12


def test_gaps_between_delivered_offsets_are_nothing_to_wait_for() -> None:
    """H9b: compaction and transaction markers leave offsets that never come."""
    tracker = OffsetTracker(0)
    tracker.track([3, 7, 1_000_000])

    assert tracker.watermark == 3
    tracker.resolve([3])
    assert tracker.watermark == 7
    tracker.resolve([7])
    assert tracker.watermark == 1_000_000
    tracker.resolve([1_000_000])
    assert tracker.watermark == 1_000_001


def test_a_gap_before_the_first_record_is_open_until_the_record_is_finished() -> None:
    """The start may be committed, the first delivered offset too, nothing after it."""
    tracker = OffsetTracker(5)
    tracker.track([9])

    assert tracker.watermark == 9
    assert tracker.distance == 1


def test_the_position_moves_over_offsets_that_hold_no_record() -> None:
    """H9b: behind a last record come markers; without moving over them there would be lag for ever."""
    tracker = OffsetTracker(0)
    tracker.track([0])
    tracker.resolve([0])

    tracker.advance(4)
    assert tracker.watermark == tracker.position == 4
    tracker.advance(2)
    assert tracker.position == 4


def test_moving_the_position_passes_no_unfinished_offset() -> None:
    """Only the position moves; the watermark waits."""
    tracker = OffsetTracker(0)
    tracker.track([0, 1])
    tracker.resolve([1])

    tracker.advance(100)

    assert tracker.watermark == 0
    assert tracker.distance == 100
    tracker.resolve([0])
    assert tracker.watermark == 100


@pytest.mark.parametrize(
    "offsets",
    [[4], [3, 9], [6, 6], [6, 5], [5, 9, 7, 10], [5, 6, 6, 9], [9, 5]],
)
def test_offsets_that_do_not_follow_are_refused_whole(offsets: list[int]) -> None:
    """A record delivered twice, or out of order, would be answered twice or committed unread."""
    tracker = OffsetTracker(5)

    with pytest.raises(ValueError, match="do not follow position 5"):
        tracker.track(offsets)

    assert (tracker.watermark, tracker.position, tracker.unfinished) == (5, 5, 0)


def test_tracking_nothing_changes_nothing() -> None:
    """A fetch may be empty."""
    tracker = OffsetTracker(5)
    tracker.track([])

    assert (tracker.watermark, tracker.position, tracker.unfinished) == (5, 5, 0)


def test_an_offset_is_resolved_once() -> None:
    """A record answered twice is a defect, and the offset of another record must not pay for it."""
    tracker = OffsetTracker(0)
    tracker.track([0, 1, 2])
    tracker.resolve([1])

    for never in ([1], [3], [-1]):
        with pytest.raises(ValueError, match="is not unfinished"):
            tracker.resolve(never)
    assert tracker.watermark == 0
    assert tracker.unfinished == 2


def test_what_precedes_a_wrong_offset_is_resolved() -> None:
    """As documented: the caller's list is taken from the front."""
    tracker = OffsetTracker(0)
    tracker.track([0, 1, 2])

    with pytest.raises(ValueError, match="offset 9 "):
        tracker.resolve([0, 9, 1])

    assert tracker.watermark == 1


def test_there_is_no_negative_start() -> None:
    """Kafka answers -1 where a group has no commit; committing that would be refused or worse."""
    with pytest.raises(ValueError, match="-1 is not an offset"):
        OffsetTracker(-1)


def test_offsets_may_be_as_large_as_kafka_s() -> None:
    """64 bits, less the one that the position after it needs."""
    tracker = OffsetTracker(2**63 - 3)
    tracker.track([2**63 - 3, 2**63 - 2])
    tracker.resolve([2**63 - 2, 2**63 - 3])

    assert tracker.watermark == 2**63 - 1


class TestFinishedRuns:
    """What an offset map is made of."""

    def test_nothing_is_finished_above_a_watermark_at_the_position(self) -> None:
        """All that is finished lies below the commit."""
        tracker = OffsetTracker(5)
        assert tracker.finished_runs() == []

        tracker.track(range(5, 9))
        tracker.resolve(range(5, 9))
        assert tracker.finished_runs() == []

    def test_the_finished_offsets_above_the_lowest_unfinished_one(self) -> None:
        """Contract 3: exactly those, whatever the order they were finished in."""
        tracker = OffsetTracker(0)
        tracker.track(range(10))
        tracker.resolve([9, 2, 0, 3, 5])

        assert tracker.watermark == 1
        assert tracker.finished_runs() == [(2, 3), (5, 5), (9, 9)]

        tracker.resolve([1, 4])
        assert tracker.finished_runs() == [(9, 9)]

    def test_offsets_that_were_never_delivered_are_not_finished(self) -> None:
        """H9b: a gap may hold a record another isolation level would deliver; only what was answered is skipped."""
        tracker = OffsetTracker(0)
        tracker.track([0, 1, 2, 5, 6, 9])
        tracker.track([10, 20])
        tracker.resolve([1, 2, 5, 6, 9, 10, 20])

        assert tracker.finished_runs() == [(1, 2), (5, 6), (9, 10), (20, 20)]

    def test_a_hole_at_the_end_of_a_run_and_at_the_start_of_one(self) -> None:
        """The runs end where something is unfinished."""
        tracker = OffsetTracker(0)
        tracker.track([0, 1, 2, 3, 6, 7, 8])
        tracker.resolve([1, 2, 7, 8])

        assert tracker.finished_runs() == [(1, 2), (7, 8)]


class TestRestored:
    """A tracker that starts with what an earlier assignment has finished."""

    def test_what_was_finished_is_not_to_be_run(self) -> None:
        """Contract 3: a restart does not run mapped records again."""
        tracker = OffsetTracker(100, finished=[(102, 104), (107, 107)])

        assert tracker.track(range(100, 110)) == [100, 101, 105, 106, 108, 109]
        assert tracker.unfinished == 6
        assert tracker.finished_above_gap == 4

    def test_the_watermark_passes_over_it(self) -> None:
        """As over anything finished."""
        tracker = OffsetTracker(100, finished=[(101, 104)])
        tracker.track(range(100, 106))

        tracker.resolve([100])
        assert tracker.watermark == 105
        tracker.resolve([105])
        assert tracker.watermark == tracker.position == 106
        assert tracker.finished_above_gap == 0

    def test_what_is_tracked_is_returned_as_it_came_where_nothing_was_finished(self) -> None:
        """The usual case costs nothing: the same object."""
        tracker = OffsetTracker(0)
        offsets = [0, 1, 5]

        assert tracker.track(offsets) is offsets
        assert tracker.track([]) == []

    def test_until_it_is_delivered_it_stays_in_the_map(self) -> None:
        """Two restarts with the same stuck record: neither runs the finished ones again."""
        tracker = OffsetTracker(100, finished=[(102, 150), (160, 170)])
        assert tracker.finished_runs() == [(102, 150), (160, 170)]
        assert tracker.finished_above_gap == 60

        tracker.track(range(100, 120))
        tracker.resolve([101])
        assert tracker.finished_runs() == [(101, 150), (160, 170)]
        assert tracker.finished_above_gap == 61

    def test_a_watermark_that_has_reached_it_leaves_it_above(self) -> None:
        """It is not delivered yet: the position has not passed it, so neither may the commit."""
        tracker = OffsetTracker(100, finished=[(102, 150)])
        tracker.track([100, 101])
        tracker.resolve([100, 101])

        assert tracker.watermark == tracker.position == 102
        assert tracker.finished_runs() == [(102, 150)]
        assert tracker.track([102, 150, 151]) == [151]
        assert tracker.watermark == 151

    def test_where_everything_delivered_was_finished_the_watermark_is_the_position(self) -> None:
        """The first record after a restart may be a finished one, when the stuck one is gone from the log."""
        tracker = OffsetTracker(100, finished=[(103, 150)])

        assert tracker.track(range(103, 110)) == []
        assert (tracker.watermark, tracker.position, tracker.unfinished) == (110, 110, 0)
        assert tracker.finished_runs() == [(110, 150)]

    def test_retention_may_have_taken_it(self) -> None:
        """What is gone from the log is never delivered and takes no room in the next map."""
        tracker = OffsetTracker(100, finished=[(102, 150), (160, 170), (200, 210)])

        tracker.advance(165)
        assert tracker.finished_runs() == [(165, 170), (200, 210)]
        assert tracker.track(range(165, 175)) == [171, 172, 173, 174]
        tracker.advance(300)
        assert tracker.finished_runs() == []
        assert tracker.finished_above_gap == 0
        assert tracker.watermark == 171

    def test_compaction_may_have_taken_some_of_it(self) -> None:
        """Only what is delivered stays in the map; holes are nobody's."""
        tracker = OffsetTracker(0, finished=[(1, 9), (20, 29)])

        assert tracker.track([0, 3, 4, 15, 25, 26]) == [0, 15]
        assert tracker.finished_runs() == [(3, 4), (25, 29)]

    def test_a_run_that_a_delivery_ends_in_goes_on_in_the_next(self) -> None:
        """Fetches know nothing of runs."""
        tracker = OffsetTracker(0, finished=[(5, 14)])

        assert tracker.track(range(10)) == [0, 1, 2, 3, 4]
        assert tracker.track(range(10, 20)) == [15, 16, 17, 18, 19]
        assert tracker.finished_runs() == [(5, 14)]

    def test_a_run_that_begins_at_the_position_is_still_to_come(self) -> None:
        """The position is the next offset to be delivered, so it is not passed."""
        tracker = OffsetTracker(0, finished=[(5, 5), (7, 7)])

        tracker.advance(5)
        assert tracker.track([5, 6]) == [6]
        assert tracker.track([7, 8]) == [8]

    def test_offsets_that_do_not_follow_are_refused_here_too(self) -> None:
        """A refused delivery uses nothing up."""
        tracker = OffsetTracker(5, finished=[(6, 8)])

        with pytest.raises(ValueError, match="do not follow position 5"):
            tracker.track([6, 5])
        assert tracker.track([5, 6]) == [5]

    def test_it_cannot_be_resolved(self) -> None:
        """It was answered before: resolving it means that it was answered again."""
        tracker = OffsetTracker(0, finished=[(1, 1)])
        tracker.track([0, 1])

        with pytest.raises(ValueError, match="offset 1 is not unfinished"):
            tracker.resolve([1])

    @pytest.mark.parametrize(
        "finished", [[(99, 101)], [(103, 102)], [(103, 104), (105, 106)], [(105, 106), (101, 102)]]
    )
    def test_runs_that_are_none_are_refused(self, finished: list[Run]) -> None:
        """Below the start, without end, adjacent, descending: no offset map says that."""
        with pytest.raises(ValueError, match="begins below"):
            OffsetTracker(100, finished=finished)
