"""The pictures in the documentation are of what there is now: `make picture` takes them again."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from drawn import Series, ceiling, page, series_of
from picture import DASHBOARD, HEADLINE, STATUS_PAGE, panels_on, with_panels
from prometheus import panels

ROOT = Path(__file__).parents[2]
TITLES = [panel["title"] for panel in panels()]


def test_every_panel_is_on_the_picture_of_the_dashboard() -> None:
    """One that was added, renamed or taken away since is a picture of another dashboard."""
    headline = panels_on(HEADLINE.read_bytes())

    assert panels_on(DASHBOARD.read_bytes()) == TITLES
    assert headline == TITLES[: len(headline)]
    assert headline


@pytest.mark.parametrize("picture", [STATUS_PAGE, DASHBOARD, HEADLINE], ids=lambda picture: picture.name)
def test_a_picture_is_shown_where_a_stranger_looks_and_is_no_burden(picture: Path) -> None:
    """In the README or on the dashboard's page, as a PNG of moderate size."""
    content = picture.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    shown = [(ROOT / page_).read_text(encoding="utf-8") for page_ in ("README.md", "docs/dashboard.md")]

    assert content.startswith(b"\x89PNG")
    assert width >= 1000
    assert height >= 400
    assert len(content) < 500_000
    assert any(f"{picture.name})" in text for text in shown)
    assert picture.name == DASHBOARD.name or f"docs/{picture.name})" in shown[0]


def test_what_is_said_of_a_picture_can_be_read_again() -> None:
    """And what stood in it stays."""
    plain = STATUS_PAGE.read_bytes()

    written = with_panels(plain, ["Lag", "Oldest — by partition"])

    assert panels_on(written) == ["Lag", "Oldest — by partition"]
    assert written.endswith(plain[plain.rindex(b"IEND") - 4 :])


def panel(kind: str = "timeseries", **defaults: Any) -> dict[str, Any]:
    """A panel as the dashboard has them."""
    steps = [{"value": None, "color": "green"}, {"value": 0.8, "color": "red"}]
    return {
        "id": 1,
        "type": kind,
        "title": "Lag & co",
        "gridPos": {"x": 0, "y": 1, "w": 8, "h": 8},
        "fieldConfig": {"defaults": {"unit": "short", "thresholds": {"steps": steps}} | defaults},
    }


def test_the_drawing_shows_the_data_and_says_where_there_is_none() -> None:
    """A line through its points, from zero to the axis's end; bars in the colour of their threshold; texts as texts."""
    target = {"legendFormat": "{{topic}}/{{partition}} <b>"}
    answer = {
        "result": [{"metric": {"topic": "o", "partition": "3"}, "values": [[100, "0"], [150, "NaN"], [200, "8"]]}]
    }
    (series,) = series_of(target, answer)

    assert series == Series("o/3 <b>", [(100.0, 0.0), (200.0, 8.0)])
    drawn = page([panel()], {1: [series]})
    assert "Lag &amp; co" in drawn
    assert "o/3 &lt;b&gt;" in drawn
    assert 'points="62.0,94.0 374.0,6.0"' in drawn
    assert "No data" in page([panel()], {1: [Series("empty", [])]})
    gauge = panel("bargauge", unit="percentunit", max=1)
    bars = page([gauge], {1: [Series("low", [(1, 0.5)]), Series("high", [(1, 0.9)])]})
    assert ("50 %" in bars, "90 %" in bars) == (True, True)
    assert bars.index("#73bf69") < bars.index("#f2495c")


@pytest.mark.parametrize(("value", "top"), [(0, 1), (0.013, 0.02), (7, 8), (20, 20), (84_000, 100_000), (0.3, 0.4)])
def test_an_axis_ends_at_a_round_number(value: float, top: float) -> None:
    """At or above the highest value."""
    assert ceiling(value) == pytest.approx(top)
