"""What the documentation shows: its pages, their blocks of code, and which blocks nothing here can run, and why."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "helm" / "tierstream" / "README.md"])
SHELL = ("sh", "console")

STORY = ROOT / "docs" / "tutorial.md"
"""Run from its beginning to its end, as it stands, by tests/e2e/test_tutorial.py."""

OWN_KAFKA = (ROOT / "README.md", ROOT / "docs" / "deploy.md")
"""Their commands with ``--config tierstream.yaml`` are run there too, with the page's own file."""

ALONE = (ROOT / "docs" / "sizing.md", ROOT / "docs" / "evolution.md")
"""Their commands need nothing, and are run as they stand."""

OUT_OF_REACH = {
    "python3 -m venv venv": "makes an environment from the package index; CI installs the wheel (test_project.py)",
    "make demo": "the demo is e2e/test_demo.py, the tests are what runs this",
    "pip install": "from the package index, as above",
    "docker build": "needs a container engine; the image is built and started by the workflow on GitHub",
    "docker compose": "needs a container engine; the file itself is checked (architecture/test_compose.py)",
    "kubectl": "needs a cluster",
    "kafka-topics.sh": "comes with Apache Kafka; the suite makes its topics by the same settings (brokers.py)",
    "helm": "needs a cluster; the chart is rendered, checked and linted by Helm's own engine (tests/chart)",
    "$ pip install": "from the package index, then Google's services; e2e/test_bigtable.py does it on an emulator",
}
"""How a block begins that no test runs, and why."""


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the code blocks of some languages on a page, in their order; one within a list without its indent."""
    found = re.findall(
        rf"^( *)```(?:{'|'.join(languages)})\n(.*?)^\1```$",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return [textwrap.dedent(text) for _, text in found]


def reason_not_run(text: str) -> str | None:
    """Return why a block is not run; None where it is to be run."""
    return next((reason for beginning, reason in OUT_OF_REACH.items() if text.startswith(beginning)), None)
