"""Makes the picture of the status page that the README shows, from a real run; ``make picture`` calls it.

A service on an embedded broker works off a load: its high-volume tier takes 20 ms for each request, as one at the other
end of a network does, and its partitions are more than its permits make windows for.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from brokers import noida_broker
from browser import chromium, running_browser, window
from ledger import Ledger
from load import Load
from service_process import ServiceProcess, settings

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "status-page.png"
PARTITIONS = 7
WIDTH = 1120
LOOKS = 30
"""Seconds of load before the picture, for the curve."""


def main() -> None:
    """Run, look, write."""
    executable = chromium()
    if executable is None:
        sys.exit("hint: apt install chromium")
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
            try:
                _take(service, ledger, executable)
            finally:
                ledger.close()
        finally:
            service.kill()


def _take(service: ServiceProcess, ledger: Ledger, executable: str) -> None:
    load, enough = Load(ledger, batch=24 * PARTITIONS, poison_every=97), threading.Event()
    with (
        ThreadPoolExecutor() as pool,
        running_browser(executable) as browser,
        window(browser, service.admin + "/", width=WIDTH) as seen,
    ):
        pumping = pool.submit(load.pump, enough.is_set, 10 * LOOKS)
        try:
            seen.page.wait_for_timeout(1000 * LOOKS)
            seen.page.screenshot(path=PICTURE, full_page=True)
        finally:
            enough.set()
        pumping.result()
    print(f"written: {PICTURE.relative_to(ROOT)}, {PICTURE.stat().st_size:,} bytes")  # noqa: T201 - it is a command


if __name__ == "__main__":
    main()
