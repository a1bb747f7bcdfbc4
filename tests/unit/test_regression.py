"""The look at costs in CI warns of what got dearer, and of nothing else."""

from __future__ import annotations

import json

import regression


def test_what_got_dearer_is_warned_of_and_the_rest_is_told() -> None:
    """Within the tolerance nothing has happened: no two runs are the same."""
    recorded = {"decode": 1.0, "encode": 0.5, "execute": 2.0}

    lines = regression.compare({"decode": 1.4, "encode": 0.8, "execute": 0.2}, recorded)

    assert [line.startswith("warning: ") for line in lines] == [False, True, False]
    assert "encode: 0.80 x the yardstick, and was 0.50 x" in lines[1]


def test_a_stage_that_came_or_went_is_warned_of() -> None:
    """Else one that was renamed would never be compared again."""
    lines = regression.compare({"new": 1.0}, {"old": 1.0})

    assert [line.partition(":")[0] for line in lines] == ["warning", "warning"]
    assert "new" in lines[0]
    assert "old" in lines[1]


def test_recorded_are_the_stages_there_are() -> None:
    """The file and the measurement belong together."""
    recorded = json.loads(regression.RATIOS.read_text(encoding="utf-8"))

    assert len(recorded) >= 6
    assert all(0 < ratio < 100 for ratio in recorded.values())
