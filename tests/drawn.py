"""The dashboard's panels drawn as one page of SVG, for machines without Grafana (pure).

Each panel stands where the dashboard has it, with its title, its unit, its thresholds, and the legends that its targets
ask for. It is a picture of the data, and not of Grafana: nothing on it can be clicked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from consumer.status_page import Html, element, number, rate, seconds, size

COLUMN, ROW, GAP = 50, 22, 8
"""Pixels of one column and one row of the dashboard's grid, and between panels."""
LEFT, TOP, BOTTOM = 62, 6, 18
"""Pixels of a chart that its axes take."""
LEGENDS_MAX = 14
TICKS = 4

COLORS = (
    "#73bf69",
    "#f2cc0c",
    "#8ab8ff",
    "#ff9830",
    "#f2495c",
    "#5794f2",
    "#b877d9",
    "#96d98d",
    "#fade2a",
    "#ffb357",
    "#ff7383",
    "#ca95e5",
)
NAMED = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c"}

STYLE = """
body { margin: 0; background: #111217; color: #ccccdc; font: 12px system-ui, "DejaVu Sans", sans-serif; }
main { position: relative; }
section, h2 { position: absolute; box-sizing: border-box; margin: 0; }
section { background: #181b1f; border: 1px solid #25282e; border-radius: 3px; padding: 6px 8px; overflow: hidden; }
h2 { font-size: 14px; font-weight: 600; }
h3 { font-size: 12px; font-weight: 600; margin: 0 0 4px; }
svg { display: block; overflow: visible; }
svg text { fill: #9a9cab; font-size: 10px; }
p { margin: 4px 0 0; max-height: 26px; overflow: hidden; font-size: 10px; line-height: 13px; }
p span { display: inline-block; white-space: nowrap; }
p i { display: inline-block; width: 10px; height: 3px; margin: 0 4px 3px 8px; }
.none { color: #9a9cab; text-align: center; padding-top: 44px; }
"""

UNITS: Mapping[str, Callable[[float], str]] = {
    "short": lambda value: rate(value) if value < 10 else number(value),
    "percentunit": lambda value: f"{100 * value:.0f} %",
    "s": seconds,
    "ops": lambda value: f"{rate(value)}/s",
    "bytes": size,
    "Bps": lambda value: f"{size(value)}/s",
}
"""How Grafana's units are written."""


@dataclass(frozen=True, slots=True)
class Series:
    """What one line is called, and its points: seconds since the epoch, value."""

    legend: str
    points: Sequence[tuple[float, float]]


def series_of(target: Mapping[str, Any], answer: Mapping[str, Any]) -> list[Series]:
    """Return the series of one target of a panel, out of Prometheus' answer to it over a range."""

    def legend(labels: Mapping[str, str]) -> str:
        return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), target["legendFormat"])

    return [
        Series(
            legend(one["metric"]),
            [(float(at), float(value)) for at, value in one["values"] if math.isfinite(float(value))],
        )
        for one in answer["result"]
    ]


def page(panels: Sequence[Mapping[str, Any]], series: Mapping[int, Sequence[Series]]) -> str:
    """Return the page of *panels*, rows among them, with the series of each by its id."""
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    parts = [_row(panel) if panel["type"] == "row" else _panel(panel, series[panel["id"]]) for panel in panels]
    main = element("main", *parts, style=f"width: {24 * COLUMN}px; height: {bottom * ROW + GAP}px")
    return f"<!doctype html><meta charset=utf-8><title>tierstream</title><style>{STYLE}</style>{main}"


def _place(panel: Mapping[str, Any]) -> dict[str, int]:
    grid = panel["gridPos"]
    return {
        "left": grid["x"] * COLUMN + GAP // 2,
        "top": grid["y"] * ROW + GAP // 2,
        "width": grid["w"] * COLUMN - GAP,
        "height": grid["h"] * ROW - GAP,
    }


def _placed(place: Mapping[str, int]) -> str:
    return "; ".join(f"{name}: {value}px" for name, value in place.items())


def _row(panel: Mapping[str, Any]) -> Html:
    return element("h2", panel["title"], style=_placed(_place(panel)))


def _panel(panel: Mapping[str, Any], series: Sequence[Series]) -> Html:
    place, defaults = _place(panel), panel["fieldConfig"]["defaults"]
    told = [one for one in series if one.points]
    if not told:
        body = element("div", "No data", class_="none")
    elif panel["type"] == "bargauge":
        body = _bars(told, defaults, place["width"] - 18)
    else:
        body = _chart(told, defaults, place["width"] - 18, place["height"] - 56)
    return element("section", element("h3", panel["title"]), body, style=_placed(place))


def _bars(series: Sequence[Series], defaults: Mapping[str, Any], width: int) -> Html:
    """Return a bar for each series, as long as its last value."""
    most = defaults.get("max") or max(one.points[-1][1] for one in series) or 1.0
    steps = defaults["thresholds"]["steps"]
    height = 15
    label, value = 110, 46
    parts: list[Html] = []
    for at, one in enumerate(series):
        y, last = at * (height + 3), one.points[-1][1]
        color = [NAMED[step["color"]] for step in steps if step["value"] is None or last >= step["value"]][-1]
        room = width - label - value
        parts += [
            element("text", one.legend, x=0, y=y + 11),
            element("rect", x=label, y=y, width=room, height=height, fill="#25282e"),
            element("rect", x=label, y=y, width=f"{room * min(1.0, last / most):.1f}", height=height, fill=color),
            element("text", _written(last, defaults), x=width - value + 6, y=y + 11),
        ]
    return element("svg", *parts, width=width, height=len(series) * (height + 3))


def _chart(series: Sequence[Series], defaults: Mapping[str, Any], width: int, height: int) -> Html:
    """Return a line for each series, over axes from zero."""
    moments = [at for one in series for at, _ in one.points]
    first, last = min(moments), max(moments)
    top = defaults.get("max") or ceiling(max(value for one in series for _, value in one.points))
    wide, high = width - LEFT, height - TOP - BOTTOM

    def x(at: float) -> float:
        return LEFT + wide * (at - first) / ((last - first) or 1.0)

    def y(value: float) -> float:
        return TOP + high * (1 - min(1.0, value / top))

    parts: list[Html] = []
    for tick in range(TICKS + 1):
        value = top * tick / TICKS
        parts += [
            element("line", x1=LEFT, x2=width, y1=f"{y(value):.1f}", y2=f"{y(value):.1f}", stroke="#25282e"),
            element("text", _written(value, defaults), x=LEFT - 6, y=f"{y(value) + 3:.1f}", text_anchor="end"),
        ]
    for tick in range(TICKS + 1):
        moment = first + (last - first) * tick / TICKS
        at = f"{datetime.fromtimestamp(moment, UTC):%H:%M:%S}"
        anchor = "end" if tick == TICKS else "middle"
        parts.append(element("text", at, x=f"{x(moment):.1f}", y=height, text_anchor=anchor))
    for color, one in zip(_colors(len(series)), series, strict=True):
        line = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in one.points)
        parts.append(element("polyline", points=line, fill="none", stroke=color, stroke_width=1.3))
    shown = list(zip(_colors(len(series)), series, strict=True))[:LEGENDS_MAX]
    legends = [element("span", element("i", style=f"background: {color}"), one.legend) for color, one in shown]
    return element("div", element("svg", *parts, width=width, height=height), element("p", *legends))


def _colors(count: int) -> list[str]:
    return [COLORS[place % len(COLORS)] for place in range(count)]


def _written(value: float, defaults: Mapping[str, Any]) -> str:
    return UNITS[defaults["unit"]](value)


def ceiling(value: float) -> float:
    """Return the next number that an axis may end at; 1 for nothing at all."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10, 20) if step * power >= value * (1 - 1e-9))
