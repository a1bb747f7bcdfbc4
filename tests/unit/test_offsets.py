"""What may be committed is exactly what is finished without a gap in between."""

from __future__ import annotations

import base64

import pytest

from consumer.offsets import DISTANCE_MAX, OffsetTracker


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


def test_one_bit_for_each_offset_of_the_distance_fits_a_commit() -> None:
    """Contract 3: the distance is bounded so that the offset map fits the 4,096 characters of a commit's metadata."""
    assert len(base64.b64encode(bytes(DISTANCE_MAX // 8))) <= 4096 - len("ts1:") - 100
