"""The status page's contents: one state of the service, as HTML (pure).

The same markup is the answer to ``/``, so that it says everything without a script, and what is sent once a second to
whoever watches; the script of ``status.html`` only carries differences over. Nothing is rendered in the browser.

* Every text is escaped where it is put in (:func:`element`); only what was made here goes in as it is.
* No style is inline, which the page's CSP would drop: bars are SVG, whose lengths are attributes.
* At most :data:`PARTITIONS_MAX` partitions are shown; those that need somebody's attention are never left out for
  others.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import Any, Final, TypeAlias

PAGE: Final = files("consumer").joinpath("status.html").read_text(encoding="utf-8")
"""Read once, at import: no file is opened on the event loop."""

_BEFORE, _AFTER = PAGE.split("<!-- contents -->")

PARTITIONS_MAX: Final = 256
"""More than anybody reads; about 300 KB a second for each viewer."""
LATE_SECONDS: Final = 30.0
"""An operation older than one attempt and a half (``retry.attempt_timeout``, 20 s) is marked."""
FORGET_SECONDS: Final = 10.0
"""A look that is older than this says nothing about how fast the service is now."""
HISTORY: Final = 60
"""Rates kept for the curve: about a minute."""

LOOKS: Final = {
    "running": "good",
    "starting": "warn",
    "rebalancing": "warn",
    "draining": "warn",
    "stopped": "bad",
}
"""How each state looks."""

TOTALS: Final = (
    ("records", "records"),
    ("responses", "responses"),
    ("failures", "failures"),
    ("poison", "poison records"),
    ("dead_letters", "dead letters"),
    ("commits", "commits"),
    ("rebalances", "rebalances"),
)
"""Totals of ``/debug/state``, and what they are called."""
_BAD_TOTALS: Final = frozenset({"failures", "poison", "dead_letters"})

TIERS: Final = (("high_volume", "High-volume tier"), ("long_term", "Long-term tier"), ("change_log", "Change log"))

UNKNOWN: Final = "\N{EN DASH}"

State: TypeAlias = Mapping[str, Any]
"""A :class:`~consumer.metrics.DebugState`."""

PartitionName: TypeAlias = tuple[str, int]


# ------------------------------------------------------------------------------------------------- what is shown


@dataclass(frozen=True, slots=True)
class Rates:
    """Operations per second, where two looks tell."""

    of_all: float | None = None
    of_partition: Mapping[PartitionName, float] = field(default_factory=dict)
    history: Sequence[float] = ()
    """Of all, oldest first."""


@dataclass(frozen=True, slots=True)
class View:
    """What the page shows at one moment."""

    state: State
    ready: bool
    reasons: Sequence[str]
    rates: Rates
    at: float
    """Seconds since the epoch."""


class Speedometer:
    """Turns counts of successive looks into rates; a count that falls is a process that began again."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._records = 0
        self._by_partition: Mapping[PartitionName, int] = {}
        self._history: deque[float] = deque(maxlen=HISTORY)

    def look(self, state: State, now: float) -> Rates:
        """Take in *state* as seen at *now* (monotonic seconds), and return the rates since the look before."""
        records = state["totals"]["records"]
        by_partition = {
            (one["topic"], one["partition"]): one["records"]
            for one in state["partitions"]
            if one.get("records") is not None
        }
        passed = None if self._at is None else now - self._at
        of_all: float | None = None
        of_partition: dict[PartitionName, float] = {}
        if passed is None or not 0 < passed <= FORGET_SECONDS:
            self._history.clear()
        else:
            if records >= self._records:
                of_all = (records - self._records) / passed
                self._history.append(of_all)
            for name, count in by_partition.items():
                before = self._by_partition.get(name)
                if before is not None and count >= before:
                    of_partition[name] = (count - before) / passed
        self._at, self._records, self._by_partition = now, records, by_partition
        return Rates(of_all, of_partition, list(self._history))


def page(view: View | None) -> str:
    """Return the whole page; with None one that says that nothing is known yet."""
    return f"{_BEFORE}{contents(view) if view is not None else NOTHING}{_AFTER}"


def contents(view: View) -> Html:
    """Return what is inside the page's ``main``."""
    state = view.state
    return _all(
        _header(view),
        _permits(view),
        _windows(view),
        _totals(state),
        _tiers(state),
        _errors(state),
    )


def title(view: View) -> str:
    """Return what the browser's tab says."""
    return f"{view.state['state']} · tierstream"


# ------------------------------------------------------------------------------------------------- markup


class Html(str):
    """A text that is markup, and was made here."""

    __slots__ = ()


def element(name: str, *content: str, **attributes: object) -> Html:
    """Return an element; texts and values of attributes are escaped, :class:`Html` is not.

    An attribute that is None is left out; ``class_`` is ``class``, and ``aria_label`` is ``aria-label``.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{said}>{_all(*content)}</{name}>")


def _all(*content: str) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in content))


NOTHING: Final = element(
    "p",
    "The state of the service is not known yet. ",
    element("a", "/debug/state", href="/debug/state"),
    class_="card empty",
)


def _span(look: str, *content: str) -> Html:
    return element("span", *content, class_=look)


def _chip(look: str, *content: str) -> Html:
    return _span(f"chip {look}".rstrip(), *content)


def _rect(look: str, share: float) -> Html:
    return element("rect", class_=look, width=f"{100 * min(1.0, max(0.0, share)):.2f}%", height="100%", rx="5")


def _bar(label: str, said: str, in_flight: int, window: int, whole: int) -> Html:
    """Return a bar: what is in flight, in front of what is reserved, in front of *whole*."""
    whole = max(1, whole)
    drawn = element(
        "svg",
        _rect("track", 1),
        _rect("reserved", window / whole),
        _rect("flight", in_flight / whole),
        aria_hidden="true",
        focusable="false",
    )
    return element(
        "div",
        drawn,
        class_="bar",
        role="meter",
        aria_label=label,
        aria_valuemin=0,
        aria_valuemax=max(1, window),
        aria_valuenow=min(in_flight, max(1, window)),
        aria_valuetext=said,
    )


# ------------------------------------------------------------------------------------------------- numbers


def number(value: float | None) -> str:
    """Return a number with its thousands apart."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Return a rate: small ones with one decimal."""
    if value is None:
        return UNKNOWN
    return f"{value:.1f}" if 0 < value < 10 else number(value)


def seconds(value: float | None) -> str:
    """Return a duration in the unit that is read most easily."""
    if value is None:
        return UNKNOWN
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def size(value: float | None) -> str:
    """Return a number of bytes."""
    if value is None:
        return UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


# ------------------------------------------------------------------------------------------------- parts of the page


def _header(view: View) -> Html:
    state = view.state["state"]
    ready = _chip("good", "ready") if view.ready else _chip("warn", "not ready")
    reasons = [element("li", reason) for reason in view.reasons if reason != state]
    at = datetime.fromtimestamp(view.at, UTC)
    return element(
        "header",
        element("h1", "tierstream"),
        element("span", state, id="state", class_=f"chip {LOOKS.get(state, '')}".rstrip()),
        ready,
        element("time", f"{at:%H:%M:%S} UTC", class_="quiet", datetime=f"{at:%Y-%m-%dT%H:%M:%SZ}"),
        *([element("ul", *reasons, class_="reasons", aria_label="Why not ready")] if reasons else []),
        # Said aloud when it changes, and only then: the script touches nothing that is as it was.
        element("p", f"Service {state}, {'ready' if view.ready else 'not ready'}.", class_="unseen", role="status"),
    )


def _permits(view: View) -> Html:
    state = view.state
    limiter, partitions = state["limiter"], state["partitions"]
    in_flight = sum(one["in_flight"] or 0 for one in partitions)
    lags = [one["lag"] for one in partitions if one["lag"] is not None]
    facts = [
        ("operations per second", rate(view.rates.of_all), _curve(view.rates.history)),
        ("in flight", number(in_flight), f"of {number(limiter['in_use'])} reserved"),
        ("permits available", number(limiter["available"]), f"of {number(limiter['limit'])}"),
        ("lag", number(sum(lags)) if lags else UNKNOWN, ""),
    ]
    if limiter["queued"]:
        facts.append(("queued for a permit", number(limiter["queued"]), ""))
    if state.get("in_flight_bytes") is not None:
        facts.append(("held in memory", size(state["in_flight_bytes"]), ""))
    said = f"{in_flight} operations in flight, {limiter['in_use']} of {limiter['limit']} permits reserved"
    return element(
        "section",
        element(
            "div",
            element("h2", "Permits", id="permits-title"),
            element(
                "p",
                _span("key flight", "in flight"),
                _span("key reserved", "reserved"),
                class_="legend quiet",
                aria_hidden="true",
            ),
            class_="head",
        ),
        _bar("Permits of the service", said, in_flight, limiter["in_use"], limiter["limit"]),
        element("dl", *(_fact(*fact) for fact in facts), class_="facts"),
        class_="card permits",
        aria_labelledby="permits-title",
    )


def _fact(name: str, value: str, more: str = "") -> Html:
    return element(
        "div", element("dt", name), element("dd", element("b", value), *([_span("quiet", more)] if more else []))
    )


def _curve(history: Sequence[float]) -> Html:
    """Return a curve of the last minute, drawn from right to left; nothing where there is none yet."""
    if len(history) < 2:
        return Html("")
    top = max(*history, 1.0)
    points = [(HISTORY - len(history) + place, 19 - 17 * value / top) for place, value in enumerate(history)]
    line = " ".join(f"{x},{y:.1f}" for x, y in points)
    return element(
        "svg",
        element("polygon", points=f"{points[0][0]},20 {line} {points[-1][0]},20"),
        element("polyline", points=line),
        class_="curve",
        viewBox=f"0 0 {HISTORY - 1} 20",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"The last minute, at most {rate(top)}",
    )


COLUMNS: Final = (
    ("Partition", ""),
    ("Window", ""),
    ("Ops/s", "number"),
    ("Lag", "number"),
    ("Position", "number"),
    ("Committed", "number"),
    ("Oldest in flight", ""),
    ("Paused for", ""),
)


def _windows(view: View) -> Html:
    partitions = view.state["partitions"]
    shown = most_interesting(partitions)
    widest = max((one["window"] or 0 for one in shown), default=0)
    # Roles are said again, as the table of a narrow screen is laid out as a list, and would lose them.
    table = element(
        "table",
        element("caption", "Windows of the assigned partitions", class_="unseen"),
        element(
            "thead",
            element(
                "tr",
                *(
                    element("th", name, scope="col", role="columnheader", class_=look or None)
                    for name, look in COLUMNS
                ),
                role="row",
            ),
            role="rowgroup",
        ),
        element("tbody", *(_row(one, widest, view.rates) for one in shown), role="rowgroup"),
        role="table",
    )
    left_out = len(partitions) - len(shown)
    more = element("p", f"{number(left_out)} more, all of them quiet: see /debug/state.", class_="empty")
    nothing = element("p", "No partition is assigned now.", class_="empty")
    return element(
        "section",
        element(
            "div",
            element("h2", "Windows", id="windows-title"),
            _span("quiet", f"{number(len(partitions))} partitions"),
            class_="head",
        ),
        element("div", table, class_="sideways") if shown else nothing,
        *([more] if left_out else []),
        class_="card windows",
        aria_labelledby="windows-title",
    )


def most_interesting(partitions: Iterable[State]) -> list[State]:
    """Return the partitions to show, in their order; paused and lagging ones first to be chosen."""
    chosen = heapq.nlargest(PARTITIONS_MAX, partitions, key=lambda one: (bool(one["paused_for"]), one["lag"] or 0))
    return sorted(chosen, key=lambda one: (one["topic"], one["partition"]))


def _row(one: State, widest: int, rates: Rates) -> Html:
    name = f"{one['topic']}/{one['partition']}"
    window, in_flight = one["window"], one["in_flight"] or 0
    if window is None:
        said, counts = "not reserved yet", UNKNOWN
    elif window == 0:
        said, counts = "no permits", "no permits"
    else:
        said, counts = f"{in_flight} of {window} in flight", f"{number(in_flight)} / {number(window)}"
    buffered = [element("small", f"{number(one['buffered'])} buffered")] if one["buffered"] else []
    end = one["high_watermark"]
    above = one["finished_above_gap"]
    return element(
        "tr",
        element(
            "th",
            element("span", name),
            element("small", f"epoch {number(one['epoch'])}"),
            scope="row",
            role="rowheader",
            class_="name",
        ),
        _cell(
            "window",
            "",
            element("span", counts),
            _bar(f"Window of {name}", said, in_flight, window or 0, widest),
            *buffered,
        ),
        _cell("number", "ops/s", element("span", rate(rates.of_partition.get((one["topic"], one["partition"]))))),
        _cell("number", "lag", element("span", number(one["lag"]))),
        _cell(
            "number",
            "position",
            element("span", number(one["position"])),
            *([element("small", f"of {number(end)}")] if end is not None else []),
        ),
        _cell(
            "number committed",
            "committed",
            element("span", number(one["committed"])),
            *([element("small", f"+{number(above)} above a gap")] if above else []),
        ),
        _cell("oldest", "oldest", *_oldest(one["oldest"])),
        _cell("paused", "paused", *(_chip("warn", reason) for reason in one["paused_for"])),
        role="row",
        id=f"partition-{name}",
    )


def _cell(look: str, label: str, *content: str) -> Html:
    return element("td", *content, class_=look, role="cell", data_label=label or None)


def _oldest(oldest: State | None) -> list[Html]:
    if oldest is None:
        return [_span("quiet", UNKNOWN)]
    late = oldest["age_seconds"] >= LATE_SECONDS
    detail = [f"offset {oldest['offset']}", oldest["kind"], oldest["key_digest"]]
    if oldest["attempts"] > 1:
        detail.append(f"attempt {oldest['attempts']}")
    parts = [_span("late" if late else "", seconds(oldest["age_seconds"]))]
    parts.append(element("small", " · ".join(part for part in detail if part is not None)))
    if oldest["last_error"]:
        said = [oldest["last_error"], oldest.get("last_error_message")]
        parts.append(element("small", ": ".join(part for part in said if part), class_="late"))
    return parts


def _totals(state: State) -> Html:
    totals = state["totals"]
    tiles = [
        element(
            "div",
            element("dt", label),
            element(
                "dd",
                element("b", number(totals[name]), class_="bad" if name in _BAD_TOTALS and totals[name] else None),
            ),
        )
        for name, label in TOTALS
    ]
    return element(
        "section",
        element("div", element("h2", "Totals since the start", id="totals-title"), class_="head"),
        element("dl", *tiles, class_="facts"),
        class_="card",
        aria_labelledby="totals-title",
    )


def _tiers(state: State) -> Html:
    storage = state.get("storage") or {}
    traffic = storage.get("traffic") or {}
    tiers = []
    for name, label in TIERS:
        of_tier = traffic.get(name) or {}
        facts = [("requests", number(of_tier.get("requests"))), ("failed requests", number(of_tier.get("errors")))]
        if name == "change_log":
            facts.append(("entries", number(storage.get("change_log_entries"))))
        else:
            facts += [("read", size(of_tier.get("bytes_read"))), ("written", size(of_tier.get("bytes_written")))]
        tiers.append(
            element(
                "div",
                element("h3", label, " ", _chip("", str(storage.get(name) or UNKNOWN))),
                element("dl", *(element("div", element("dt", fact), element("dd", value)) for fact, value in facts)),
                class_="tier",
            )
        )
    return element(
        "section",
        element(
            "div",
            element("h2", "Storage", id="storage-title"),
            *([_chip("bad", "unavailable")] if storage.get("blocked") else []),
            class_="head",
        ),
        element("div", *tiers, class_="tiers"),
        class_="card",
        aria_labelledby="storage-title",
    )


def _errors(state: State) -> Html:
    errors = list(state.get("last_errors") or ())
    rows = [
        element(
            "li",
            element("time", error["timestamp"][11:19], datetime=error["timestamp"]),
            _chip("warn" if error["level"] == "warning" else "bad", error["level"]),
            element(
                "div",
                element("span", error["event"]),
                *([_span("quiet", f" \N{MULTIPLICATION SIGN} {number(error['times'])}")] if error["times"] > 1 else []),
                *([element("small", error["detail"])] if error["detail"] else []),
            ),
        )
        for error in reversed(errors)
    ]
    return element(
        "section",
        element("div", element("h2", "Last warnings and errors", id="errors-title"), class_="head"),
        element("ol", *rows, class_="errors") if rows else element("p", "None since the start.", class_="empty"),
        class_="card",
        aria_labelledby="errors-title",
    )
