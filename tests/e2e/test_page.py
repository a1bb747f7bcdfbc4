"""The status page in a browser, on a service in its own process: live, honest about what it does not know, readable."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from brokers import Broker, unused_port
from browser import Scheme, Window, chromium, running_browser, window
from consumer.metrics import PAUSE_REASONS
from consumer.status_page import HISTORY, TOTALS, Rates, View, page
from outages import locked
from service_process import ServiceProcess
from stages import Stage, set_up

PARTITIONS = 4
STATE = "document.getElementById('state').textContent"
CONNECTION = "document.getElementById('connection')"

pytestmark = [pytest.mark.slow, pytest.mark.process]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The browser; where it has to be there, its absence is a failure."""
    found = chromium()
    if found is None:
        if os.environ.get("TIERSTREAM_REQUIRE_CHROMIUM") == "1":
            pytest.fail("TIERSTREAM_REQUIRE_CHROMIUM=1, and chromium is not installed")
        pytest.skip("chromium is not installed (Debian: apt install chromium)")
    with running_browser(found) as running:
        yield running


@pytest.fixture(scope="module")
def watched(embedded: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A service with fewer permits than its partitions ask for: windows of 4, 1, 1 and none."""
    stage = set_up(
        embedded,
        tmp_path_factory.mktemp("watched"),
        PARTITIONS,
        PARTITIONS,
        concurrency={"limit": 6},
        window={"fraction": 0.6, "exhausted": "pause"},
        admin={"host": "127.0.0.1", "port": unused_port()},
        input={"start": "latest"},
    )
    yield stage
    stage.put_down()


@pytest.fixture
def service(watched: Stage) -> ServiceProcess:
    """Its process; a new one where a test has ended the one before, in a group that does not wait for that one."""
    if not watched.processes or watched.processes[-1].process.poll() is not None:
        watched.config["kafka"]["group_id"] = watched.broker.unused_name("group")
        watched.start(partitions=PARTITIONS)
    return watched.processes[-1]


def row(partition: int) -> str:
    """A JavaScript expression for the text of a partition's row."""
    return f"document.querySelector('tr[id$=\"/{partition}\"]').innerText"


def meters(seen: Window) -> list[dict[str, str]]:
    """What a screen reader is told of each bar."""
    found: list[dict[str, str]] = seen.page.eval_on_selector_all(
        "[role=meter]",
        "all => all.map(one => Object.fromEntries([...one.attributes].map(said => [said.name, said.value])))",
    )
    return found


def test_numbers_move_without_a_reload(browser: Browser, watched: Stage, service: ServiceProcess) -> None:
    """Contract 8: the page is live; what has not changed is left alone, so that focus and selection stay."""
    with window(browser, service.admin + "/") as seen:
        seen.wait("document.querySelector('header time').textContent.includes('UTC')")
        seen.page.evaluate("window.row = document.querySelector('tbody tr')")
        seen.page.evaluate("getSelection().selectAllChildren(row.cells[0])")
        records = "Number(document.querySelector('[aria-labelledby=totals-title] dd').innerText.replace(',', ''))"
        before = seen.page.evaluate(records)
        for number in range(8):
            watched.ledger.operate("head", f"live/{number}", partition=number % 3, statuses={404}, wait=False)
        watched.ledger.flush()

        seen.wait(f"{records} === {before + 8}")

        assert seen.page.evaluate("row.isConnected && getSelection().toString() === row.cells[0].innerText.trim()")
        assert seen.page.evaluate("document.title") == "running · tierstream"
        assert (seen.said, seen.violations()) == ([], [])


def test_a_partition_without_permits_says_so(browser: Browser, service: ServiceProcess) -> None:
    """Contract 8: at capacity is a state to be seen, in words and for a screen reader."""
    starved = next(number for (_, number), one in service.partitions().items() if one["window"] == 0)
    with window(browser, service.admin + "/") as seen:
        seen.wait(f"{row(starved)}.includes('at_capacity')")

        assert "no permits" in seen.page.evaluate(row(starved))
        said = [meter["aria-valuetext"] for meter in meters(seen) if meter["aria-label"].endswith(f"/{starved}")]
        assert said == ["no permits"]


def test_everything_on_the_page_has_a_name(browser: Browser, service: ServiceProcess) -> None:
    """Landmarks, headings, headers of rows and columns, bars with their values: also on a narrow screen."""
    with window(browser, service.admin + "/", width=360, height=740) as seen:
        seen.wait("document.querySelectorAll('tbody tr').length > 0")
        tree = seen.page.locator("body").aria_snapshot()

    for part in (
        "main",
        'heading "tierstream" [level=1]',
        'region "Windows"',
        'table "Windows of the assigned partitions"',
        'columnheader "Window"',
        'meter "Permits of the service"',
        'navigation "Other addresses of this port"',
        'link "/debug/state"',
    ):
        assert part in tree, (part, tree)
    assert tree.count("rowheader") == PARTITIONS
    assert tree.count('meter "Window of') == PARTITIONS
    assert "status: Service running, ready." in tree


@pytest.mark.parametrize("width", [320, 360, 896, 1024, 1280])
def test_no_width_needs_scrolling_sideways(browser: Browser, width: int) -> None:
    """A phone in the hand of whoever is on call, and the widest of everything on it."""
    with window(browser, "about:blank", width=width, height=740, script=False) as seen:
        seen.page.set_content(page(the_widest_view()))

        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        outside = "all => all.filter(one => one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.id)"
        assert seen.page.eval_on_selector_all("main *:not(.unseen):not(.sideways *)", outside) == []
        within = "one => one.scrollWidth <= one.clientWidth"
        assert seen.page.eval_on_selector(".sideways", within) or width == 1024, "only the table, and only there"


def the_widest_view() -> View:
    """Everything that can be shown, as wide as it gets."""
    topic, many = "t" * 249, 10**12
    partition = {
        "topic": topic,
        "partition": 99_999,
        "epoch": many,
        "window": 500,
        "in_flight": 499,
        "buffered": many,
        "position": many,
        "committed": many,
        "lowest_unfinished": many,
        "finished_above_gap": many,
        "high_watermark": many,
        "lag": many,
        "paused_for": list(PAUSE_REASONS),
        "oldest": {
            "offset": many,
            "kind": "insert",
            "key_digest": "0" * 16,
            "attempts": 33,
            "age_seconds": 99.9,
            "last_error": "backend_unavailable",
            "last_error_message": "e" * 300,
        },
    }
    state = {
        "state": "rebalancing",
        "limiter": {"limit": many, "in_use": many, "available": many, "queued": many},
        "partitions": [partition, {**partition, "topic": "operations"}],
        "totals": dict.fromkeys(dict(TOTALS), many),
        "storage": {
            "high_volume": "bigtable",
            "long_term": "filesystem",
            "change_log": "bigtable",
            "change_log_entries": many,
            "blocked": True,
            "traffic": {
                tier: dict.fromkeys(("requests", "errors", "bytes_read", "bytes_written"), many * 999)
                for tier in ("high_volume", "long_term", "change_log")
            },
        },
        "in_flight_bytes": many,
        "last_errors": [
            {
                "timestamp": "2026-01-01T00:00:00Z",
                "level": "critical",
                "event": "e" * 300,
                "detail": "d" * 300,
                "times": many,
            }
        ],
    }
    rates = Rates(of_all=many, of_partition={(topic, 99_999): 10**7}, history=[many] * HISTORY)
    return View(state, ready=False, reasons=["r" * 100, "process 2: does not answer"], rates=rates, at=1.7e9)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(browser: Browser, service: ServiceProcess, scheme: Scheme) -> None:
    """Contrast of 4.5 and more (WCAG AA) between each text and what is behind it, in both colour schemes."""
    with window(browser, service.admin + "/", scheme=scheme) as seen:
        seen.wait("document.querySelectorAll('.chip.warn').length > 0")
        page_is_dark = seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 23)"
        poor = seen.page.evaluate(CONTRASTS)

    assert page_is_dark == (scheme == "dark")
    assert poor == []


CONTRASTS = """() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => {
    const [r, g, b] = numbers(color).map(part => part / 255)
        .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = one => {
    for (; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (numbers(color)[3] !== 0) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const poor = [];
  for (const one of document.querySelectorAll('body *')) {
    const text = [...one.childNodes].filter(node => node.nodeType === Node.TEXT_NODE && node.nodeValue.trim());
    if (!text.length || !one.checkVisibility() || ['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(one.nodeName)) continue;
    const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort();
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${text[0].nodeValue.trim()}: ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


def test_without_a_script_the_page_says_the_same(browser: Browser, service: ServiceProcess) -> None:
    """What is true now stands in the HTML; it is loaded anew every few seconds."""
    with window(browser, service.admin + "/", script=False) as seen:
        assert seen.text("#state") == "running"
        assert seen.page.locator("tbody tr").count() == PARTITIONS
        assert "loaded anew" in seen.text("footer")


def test_the_keyboard_reaches_every_link(browser: Browser, service: ServiceProcess) -> None:
    """In order, each with a visible focus."""
    with window(browser, service.admin + "/") as seen:
        seen.wait("document.querySelectorAll('tbody tr').length > 0")
        reached = []
        for _ in range(4):
            seen.page.keyboard.press("Tab")
            assert seen.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            reached.append(seen.page.evaluate("document.activeElement.getAttribute('href')"))

    assert reached == ["/debug/state", "/metrics", "/readyz", "/healthz"]


def test_a_page_that_is_looked_at_shows_the_drain_the_end_and_the_return(
    browser: Browser, watched: Stage, service: ServiceProcess
) -> None:
    """Draining while work is in flight; the end, in words; and the next process on the same port, without a reload."""
    with window(browser, service.admin + "/") as seen:
        seen.wait(f"{STATE} === 'running' && {CONNECTION}.hidden")
        with locked(watched.config["storage"]["high_volume"]["path"]):
            watched.ledger.operate("insert", "drained", b"x", partition=0, statuses={201}, wait=False)
            watched.ledger.flush()
            seen.wait("[...document.querySelectorAll('td.oldest')].some(one => one.innerText.includes('insert'))")
            service.terminate()
            seen.wait(f"{STATE} === 'draining'")
            assert seen.page.locator("header .chip", has_text="not ready").count() == 1
            assert "draining" in seen.text("[role=status]")
        assert service.wait_exit() == 0, service.obituary()

        seen.wait(f"!{CONNECTION}.hidden && {CONNECTION}.textContent.startsWith('The service stopped')")
        assert seen.page.evaluate("document.body.classList.contains('stale')")
        assert seen.page.evaluate("document.title") == "stopped · tierstream"

        again = watched.start(partitions=PARTITIONS)
        seen.wait(f"{CONNECTION}.hidden && {STATE} === 'running'")
        assert seen.page.evaluate("document.title") == "running · tierstream"
        again.kill()
        seen.wait(f"{CONNECTION}.textContent.startsWith('Disconnected')")
        assert seen.page.evaluate("document.title") == "disconnected · tierstream"
        refused = [text for text in seen.said if "ERR_CONNECTION_REFUSED" not in text and "ERR_INCOMPLETE" not in text]
        assert (refused, seen.violations()) == ([], [])
