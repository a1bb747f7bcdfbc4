"""Prometheus itself, and what is asked of it: the expressions of the rules and of the dashboard.

Both programs, ``prometheus`` and ``promtool``, come from the system (Debian: ``apt install prometheus``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from brokers import dies_with_us, tail, unused_port, wait_until

CHART = Path(__file__).parents[1] / "helm" / "tierstream"
RULES = CHART / "rules" / "tierstream.yaml"
START_SECONDS = 60
ANSWER_SECONDS = 60


def program(name: str) -> str:
    """Where one of the two is; where it has to be there, its absence is a failure."""
    found = shutil.which(name)
    if found is None:
        if os.environ.get("TIERSTREAM_REQUIRE_PROMETHEUS") == "1":
            pytest.fail(f"TIERSTREAM_REQUIRE_PROMETHEUS=1, and {name} is not installed")
        pytest.skip(f"{name} is not installed (Debian: apt install prometheus)")
    return found


def rules() -> list[dict[str, Any]]:
    """All rules, recording ones first."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """All panels of the dashboard but its rows."""
    dashboard = json.loads((CHART / "dashboards" / "tierstream.json").read_text(encoding="utf-8"))
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def as_asked(expression: str, interval: str = "5m") -> str:
    """An expression of the dashboard as Grafana asks it when everything is chosen, rates over *interval*."""
    for variable, value in (("$__rate_interval", interval), ("$namespace", ".*"), ("$job", ".*")):
        expression = expression.replace(variable, value)
    return expression


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression, with where it stands."""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], as_asked(target["expr"])


def selectors(expression: Any) -> Iterator[Any]:
    """Every selector below a parsed expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
        return
    for name in ("lhs", "rhs", "expr", "vector_selector", "selector"):
        below = getattr(expression, name, None)
        if below is not None:
            yield from selectors(below)
    for argument in getattr(expression, "args", None) or ():
        yield from selectors(argument)


@dataclass
class Prometheus:
    """One that runs, and scrapes one target."""

    address: str

    def ask(self, path: str, **parameters: str) -> Any:
        """What its API answers under *path*.

        Raises:
            AssertionError: it refuses; with its reason.
        """
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of an expression now."""
        return [(one["metric"], float(one["value"][1])) for one in self.ask("query", query=expression)["result"]]


@contextmanager
def running_prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Start one that scrapes *target* and evaluates the chart's rules, five times a second and every second."""
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "tierstream",
                "static_configs": [{"targets": [target], "labels": {"namespace": "here", "pod": "tierstream-0"}}],
            }
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    port, log = unused_port(), folder / "prometheus.log"
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen([*dies_with_us(), *command], stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    running = Prometheus(f"http://127.0.0.1:{port}")

    def up() -> bool:
        assert process.poll() is None, tail(log)
        try:
            return bool(running.query("up == 1"))
        except (OSError, AssertionError):
            return False

    try:
        wait_until(up, START_SECONDS, "Prometheus to have scraped its target")
        yield running
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
