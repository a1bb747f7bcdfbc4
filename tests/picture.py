"""Makes the pictures that the documentation shows, from one real run; ``make picture`` calls it.

A service on an embedded broker works off a load that swells and ebbs: its high-volume tier takes 20 ms for each
request, as one at the other end of a network does, and its partitions are more than its permits make windows for. A
browser looks at its status page. Prometheus itself scrapes it, is then asked what the dashboard asks, and the browser
draws the answers (``drawn.py``).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import Browser

from brokers import noida_broker
from browser import chromium, running_browser, window
from drawn import COLUMN, GAP, ROW, page, series_of
from ledger import Ledger
from load import Load
from prometheus import CHART, Prometheus, as_asked, running_prometheus
from service_process import ServiceProcess, settings

ROOT = Path(__file__).parents[1]
STATUS_PAGE = ROOT / "docs" / "status-page.png"
DASHBOARD, HEADLINE = ROOT / "docs" / "dashboard.png", ROOT / "docs" / "dashboard-windows.png"
"""All of it, and its first two rows."""
PARTITIONS = 7
WIDTH = 1120
LOOKS = 30
"""Seconds of load before the picture of the status page, for the curve."""
BEFORE, AFTER = 60, 12
"""Seconds of load before that, for the dashboard, and of work that is left after it."""
RECORDS_PER_SECOND, SWELL, PERIOD = 600, 250, 30.0
"""The load: so many records, as many more or fewer, and seconds from one crest to the next."""
RATES_OVER = "10s"
"""What the dashboard's rates are taken over; a run of two minutes has no room for five."""
CHUNK = b"tEXt"
PANELS_KEY = b"Panels"


def main() -> None:
    """Run, look, write."""
    executable = chromium()
    if executable is None or shutil.which("prometheus") is None:
        sys.exit("hint: apt install chromium prometheus")
    with TemporaryDirectory() as name, noida_broker(Path(name)) as broker:
        folder = Path(name)
        config = settings(
            folder,
            kafka={
                **settings(folder)["kafka"],
                "bootstrap_servers": [broker.bootstrap],
                "group_id": "tierstream",
            },
            input={"topics": ["operations"]},
            output={"topic": "responses"},
            dead_letter={"topic": "operations.dlq"},
            topics={"create": True, "partitions": PARTITIONS, "replication_factor": 1},
            concurrency={"limit": 32},
            window={"fraction": 0.4, "exhausted": "pause"},
            storage={
                **settings(folder)["storage"],
                "high_volume": {"type": "memory", "latency": "20ms"},
                "threshold": "2KiB",
            },
        )
        service = ServiceProcess(folder, config)
        try:
            service.wait_ready(PARTITIONS)
            ledger = Ledger(broker, "operations", "responses", "operations.dlq")
            target = service.admin.removeprefix("http://")
            try:
                with running_prometheus(folder, target) as prometheus, running_browser(executable) as browser:
                    _take(service, ledger, prometheus, browser)
            finally:
                ledger.close()
        finally:
            service.kill()


def _take(service: ServiceProcess, ledger: Ledger, prometheus: Prometheus, browser: Browser) -> None:
    load, enough = Load(ledger, batch=8 * PARTITIONS, poison_every=97), threading.Event()
    began = time.time()

    def is_enough() -> bool:
        now = RECORDS_PER_SECOND + SWELL * math.sin(2 * math.pi * (time.time() - began) / PERIOD)
        return enough.wait(load.batch / now)

    with ThreadPoolExecutor() as pool:
        pumping = pool.submit(load.pump, is_enough, 10 * (BEFORE + LOOKS))
        try:
            time.sleep(BEFORE)
            with window(browser, service.admin + "/", width=WIDTH) as seen:
                seen.page.wait_for_timeout(1000 * LOOKS)
                seen.page.screenshot(path=STATUS_PAGE, full_page=True)
        finally:
            enough.set()
        pumping.result()
    time.sleep(AFTER)
    draw(prometheus, began, time.time(), browser)
    for place in (STATUS_PAGE, DASHBOARD, HEADLINE):
        print(f"written: {place.relative_to(ROOT)}, {place.stat().st_size:,} bytes")  # noqa: T201 - it is a command


def draw(prometheus: Prometheus, first: float, last: float, browser: Browser) -> None:
    """Ask what every panel asks of the time from *first* to *last*, and write the pictures of the dashboard."""
    (dashboard,) = (CHART / "dashboards").glob("*.json")
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    series = {
        panel["id"]: [
            one
            for target in panel.get("targets", ())
            for one in series_of(
                target,
                prometheus.ask(
                    "query_range",
                    query=as_asked(target["expr"], RATES_OVER),
                    start=str(first),
                    end=str(last),
                    step="1",
                ),
            )
        ]
        for panel in panels
    }
    rows = [panel["gridPos"]["y"] for panel in panels if panel["type"] == "row"]
    with window(browser, "about:blank", width=24 * COLUMN) as seen:
        seen.page.set_content(page(panels, series))
        for place, end in ((DASHBOARD, None), (HEADLINE, rows[2])):
            shown = [panel for panel in panels if end is None or panel["gridPos"]["y"] < end]
            bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in shown)
            clip: Any = {"x": 0, "y": 0, "width": 24 * COLUMN, "height": bottom * ROW + GAP // 2}
            titles = [panel["title"] for panel in shown if panel["type"] != "row"]
            place.write_bytes(with_panels(seen.page.screenshot(clip=clip, full_page=True), titles))


def with_panels(png: bytes, titles: Iterable[str]) -> bytes:
    """Return a PNG that says which panels are on it, for whoever wants to know whether it is still true."""
    said = PANELS_KEY + b"\0" + json.dumps(list(titles)).encode("latin-1")
    checksum = zlib.crc32(CHUNK + said).to_bytes(4, "big")
    end = png.rindex(b"IEND") - 4
    return png[:end] + len(said).to_bytes(4, "big") + CHUNK + said + checksum + png[end:]


def panels_on(png: bytes) -> list[str]:
    """Return what :func:`with_panels` has put there."""
    at = png.rindex(CHUNK + PANELS_KEY)
    size = int.from_bytes(png[at - 4 : at], "big")
    found: list[str] = json.loads(png[at + len(CHUNK) + len(PANELS_KEY) + 1 : at + len(CHUNK) + size])
    return found


if __name__ == "__main__":
    main()
