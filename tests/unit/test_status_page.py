"""What the status page says, to whoever looks and whoever listens, of any state there can be."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from consumer import metrics, status_page
from consumer.metrics import Counts
from consumer.status_page import (
    FORGET_SECONDS,
    PARTITIONS_MAX,
    TOTALS,
    Rates,
    Speedometer,
    View,
    contents,
    element,
    most_interesting,
    page,
    rate,
    seconds,
    size,
    title,
)

HOSTILE = "<script>alert(1)</script>\" onload='x' &amp; \u202e"


def partition(number: int = 0, **known: Any) -> dict[str, Any]:
    """One entry of ``partitions``."""
    return {
        "topic": "operations",
        "partition": number,
        "epoch": 1,
        "window": 50,
        "in_flight": 20,
        "buffered": 0,
        "position": 1240,
        "committed": 1110,
        "lowest_unfinished": 1120,
        "finished_above_gap": 0,
        "high_watermark": 5000,
        "lag": 3880,
        "paused_for": [],
        "oldest": None,
        **known,
    }


def view(*partitions: dict[str, Any], ready: bool = True, reasons: tuple[str, ...] = (), **known: Any) -> View:
    """What there is to be seen."""
    state = {
        "state": "running",
        "limiter": {"limit": 500, "in_use": 50, "available": 450, "queued": 0},
        "partitions": list(partitions),
        "totals": Counts().totals(),
        "storage": {"high_volume": "sqlite", "long_term": "filesystem", "change_log": "sqlite"},
        **known,
    }
    return View(state, ready=ready, reasons=reasons, rates=Rates(), at=0.0)


class Read(HTMLParser):
    """Reads markup as a browser does: the texts, and the elements with their attributes; nothing may stay open."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "|".join(self.texts)

    def attributes(self, **wanted: str) -> list[dict[str, str | None]]:
        """Attributes of the elements that have all of *wanted*."""
        return [said for _, said in self.elements if wanted.items() <= {k: v for k, v in said.items() if v}.items()]


def test_no_text_can_become_markup() -> None:
    """Topics, reasons, errors and codes are somebody else's texts: each comes out as it went in, and as a text."""
    oldest = {
        "offset": 1,
        "kind": HOSTILE,
        "key_digest": HOSTILE,
        "attempts": 1,
        "age_seconds": 1.0,
        "last_error": HOSTILE,
        "last_error_message": HOSTILE,
    }
    harmless = Read(contents(view(partition(oldest={**oldest, "last_error": "x"}, paused_for=["x"]), reasons=("x",))))
    seen = view(
        partition(topic=HOSTILE, paused_for=[HOSTILE], oldest=oldest),
        reasons=(HOSTILE,),
        state=f"s{HOSTILE}",
        storage={"high_volume": HOSTILE},
        last_errors=[
            {"timestamp": HOSTILE, "level": HOSTILE, "event": HOSTILE, "detail": HOSTILE, "times": 1},
        ],
    )

    read = Read(contents(seen))

    assert "script" not in {name for name, _ in read.elements}
    assert {name for _, said in read.elements for name in said} <= {
        name for _, said in harmless.elements for name in said
    } | {"datetime"}
    assert read.texts.count(HOSTILE) == 6
    assert f"{HOSTILE}: {HOSTILE}" in read.texts
    assert f"s{HOSTILE}" in read.texts
    assert title(seen) == f"s{HOSTILE} · tierstream"


def test_markup_is_only_what_was_made_here() -> None:
    """A text in an element is escaped, an element in an element is not, and what is None is not there."""
    inner = element("b", "<i>")

    assert element("p", inner, "&", class_="a", aria_label='"', hidden=None) == (
        '<p class="a" aria-label="&quot;"><b>&lt;i&gt;</b>&amp;</p>'
    )


def test_the_page_is_whole_with_and_without_something_to_show() -> None:
    """One HTML file; where nothing is known it says so, and is live all the same."""
    known, unknown = Read(page(view(partition()))), Read(page(None))

    assert "operations/0" in known.text
    assert "not known yet" in unknown.text
    assert [said for said in unknown.elements if said[0] == "script"]


def test_a_bar_says_what_it_shows() -> None:
    """For the eye two lengths, relative to the widest window; for the ear a label, and the numbers in words."""
    partitions = partition(0), partition(1, window=25, in_flight=25), partition(2, window=0, in_flight=0)
    read = Read(contents(view(*partitions)))
    bars = read.attributes(role="meter")
    widths = [said["width"] for name, said in read.elements if name == "rect"]

    assert [(bar["aria-label"], bar["aria-valuetext"], bar["aria-valuenow"], bar["aria-valuemax"]) for bar in bars] == [
        ("Permits of the service", "45 operations in flight, 50 of 500 permits reserved", "45", "50"),
        ("Window of operations/0", "20 of 50 in flight", "20", "50"),
        ("Window of operations/1", "25 of 25 in flight", "25", "25"),
        ("Window of operations/2", "no permits", "0", "1"),
    ]
    assert widths[1:3] == ["10.00%", "9.00%"]
    assert widths[4:6] == ["100.00%", "40.00%"]
    assert widths[7:9] == ["50.00%", "50.00%"]


def test_a_window_that_is_not_reserved_yet_is_no_empty_one() -> None:
    """Contract 8: unknown numbers are null, and a dash on the page."""
    names = ("window", "position", "committed", "finished_above_gap", "high_watermark", "lag")
    unknown: dict[str, Any] = dict.fromkeys(names)

    read = Read(contents(view(partition(**unknown))))

    assert "not reserved yet" in [bar["aria-valuetext"] for bar in read.attributes(role="meter")]
    assert "None" not in read.texts
    assert read.texts.count("\N{EN DASH}") >= 6


def test_every_pause_reason_and_every_reason_not_to_be_ready_is_shown() -> None:
    """Contract 8: whoever looks learns why nothing moves."""
    read = Read(
        contents(view(partition(paused_for=list(metrics.PAUSE_REASONS)), ready=False, reasons=("storage unavailable",)))
    )

    assert set(metrics.PAUSE_REASONS) | {"not ready", "storage unavailable"} <= set(read.texts)


@pytest.mark.parametrize("state", ["starting", "running", "rebalancing", "draining", "stopped"])
def test_the_state_is_a_word_and_is_said_aloud(state: str) -> None:
    """Contract 8: shown, and in the one place that screen readers read out when it changes."""
    read = Read(contents(view(state=state)))

    assert state in read.texts
    assert f"Service {state}, ready." in read.texts
    assert len(read.attributes(role="status")) == 1


def test_the_oldest_operation_says_what_it_waits_for() -> None:
    """The record everything waits for, with its attempts and their error; late ones stand out."""
    oldest = {
        "offset": 1842,
        "kind": "insert",
        "key_digest": "0123456789abcdef",
        "attempts": 3,
        "age_seconds": 31.0,
        "last_error": "backend_unavailable",
        "last_error_message": "sqlite: SQLITE_BUSY",
    }
    young = {**oldest, "age_seconds": 0.5, "attempts": 1, "last_error": None, "last_error_message": None}

    read = Read(contents(view(partition(0, oldest=oldest), partition(1, oldest=young))))

    assert "offset 1842 · insert · 0123456789abcdef · attempt 3" in read.texts
    assert {"31.0 s", "500 ms", "backend_unavailable: sqlite: SQLITE_BUSY"} <= set(read.texts)
    assert len([said for _, said in read.elements if said.get("class") == "late"]) == 2


def test_the_last_errors_come_newest_first_and_repeats_are_counted() -> None:
    """As the snapshot has them, in the order in which they are read."""
    errors = [
        {"timestamp": f"2026-01-01T00:00:0{n}Z", "level": "error", "event": f"event {n}", "detail": "", "times": n}
        for n in (1, 2)
    ]

    read = Read(contents(view(last_errors=errors)))

    assert read.text.index("event 2") < read.text.index("event 1")
    assert " \N{MULTIPLICATION SIGN} 2" in read.texts
    assert " \N{MULTIPLICATION SIGN} 1" not in read.texts


def test_tiers_show_their_kind_and_their_traffic() -> None:
    """What went where, and whether storage can be used."""
    counts = Counts()
    counts.requests("long_term", "put").success.observe(0.1)
    counts.requests("long_term", "put").error.observe(0.1)
    counts.storage_bytes["long_term", "write"] += 5 * 1024 * 1024
    storage = {"long_term": "gcs", "blocked": True, "traffic": counts.traffic(), "change_log_entries": 77}

    texts = Read(contents(view(storage=storage))).texts

    assert {"gcs", "unavailable", "5.0 MiB", "77"} <= set(texts)
    place = texts.index("gcs")
    assert texts[place + 1 : place + 5] == ["requests", "2", "failed requests", "1"]


def test_the_page_asks_for_what_the_snapshot_has() -> None:
    """Contract 8: every name that is read is one of the snapshot's; a misspelt one would be a dash for ever."""
    source = Path(status_page.__file__).read_text(encoding="utf-8")
    names = ("one", "oldest", "state", "limiter")
    read = {name: set(re.findall(rf"\b{name}(?:\[|\.get\()[\"'](\w+)[\"']", source)) for name in names}

    assert read["one"] <= {*metrics.PartitionState.__annotations__}
    assert read["oldest"] == {*metrics.OldestState.__annotations__}
    assert read["limiter"] == {*metrics.LimiterState.__annotations__}
    assert read["state"] <= {*metrics.DebugState.__annotations__}
    assert {"totals", "partitions", "last_errors", "in_flight_bytes", "storage"} <= read["state"]
    assert [name for name, _ in TOTALS] == [*metrics.Totals.__annotations__]


def test_with_too_many_partitions_those_in_trouble_stay() -> None:
    """The page is bounded; what needs nobody is left out first, and it says how many."""
    quiet = [partition(number, lag=0) for number in range(PARTITIONS_MAX + 10)]
    quiet[-1]["lag"] = 5
    quiet[-2]["paused_for"] = ["at_capacity"]

    shown = most_interesting(quiet)

    assert len(shown) == PARTITIONS_MAX
    assert [one["partition"] for one in shown][-2:] == [PARTITIONS_MAX + 8, PARTITIONS_MAX + 9]
    assert "10 more" in Read(contents(view(*quiet))).text


class TestRates:
    """Operations per second out of successive looks."""

    @staticmethod
    def state(total: int, *counts: int | None) -> dict[str, Any]:
        partitions = [partition(number, records=count) for number, count in enumerate(counts)]
        return {"totals": {**Counts().totals(), "records": total}, "partitions": partitions}

    def test_two_looks_make_a_rate(self) -> None:
        speed = Speedometer()
        first = speed.look(self.state(100, 50, None), 10.0)

        second = speed.look(self.state(300, 90, 7), 12.0)

        assert (first.of_all, first.of_partition, first.history) == (None, {}, [])
        assert (second.of_all, second.of_partition) == (100.0, {("operations", 0): 20.0})

    def test_a_count_that_falls_makes_none(self) -> None:
        """Another process has the partition now, or the process began again."""
        speed = Speedometer()
        speed.look(self.state(100, 50), 10.0)

        after = speed.look(self.state(5, 5), 11.0)

        assert (after.of_all, after.of_partition) == (None, {})

    def test_a_look_of_long_ago_is_no_beginning(self) -> None:
        """The mean of an hour in which nobody looked is not how fast it is."""
        speed = Speedometer()
        speed.look(self.state(100, 50), 10.0)
        speed.look(self.state(200, 60), 11.0)

        after = speed.look(self.state(10_000, 5000), 11.1 + FORGET_SECONDS)

        assert (after.of_all, after.of_partition, after.history) == (None, {}, [])

    def test_the_curve_holds_about_a_minute(self) -> None:
        speed = Speedometer()
        rates = [speed.look(self.state(second * second), float(second)) for second in range(500)][-1]

        assert len(rates.history) == 60
        assert list(rates.history) == sorted(rates.history)
        seen = View({**view().state}, ready=True, reasons=(), rates=rates, at=0.0)
        (curve,) = [said for name, said in Read(contents(seen)).elements if name == "polyline"]
        places = [tuple(map(float, point.split(","))) for point in (curve["points"] or "").split()]
        assert places[0][0] == 0
        assert places[-1][0] == 59
        assert all(0 <= y <= 20 for _, y in places)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (seconds(None), "\N{EN DASH}"),
        (seconds(0.0123), "12 ms"),
        (seconds(12.34), "12.3 s"),
        (seconds(600), "10 min"),
        (seconds(9000), "2.5 h"),
        (size(None), "\N{EN DASH}"),
        (size(1023), "1,023 B"),
        (size(1536), "1.5 KiB"),
        (size(5 * 1024**4), "5.0 TiB"),
        (rate(0), "0"),
        (rate(2.25), "2.2"),
        (rate(1234.5), "1,234"),
    ],
)
def test_numbers_are_written_to_be_read(said: str, expected: str) -> None:
    """In the unit that fits, with thousands apart; unknown is a dash."""
    assert said == expected
