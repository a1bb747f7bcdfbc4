"""Alerts, recording rules and dashboard: each expression is understood, and asks only for what the service exports."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import promql_parser
import pytest
import yaml

from consumer.metrics import CATALOGUE
from prometheus import RULES, expressions, panels, program, rules, selectors

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).with_name("rules_test.yaml")
BY_PROMETHEUS = {"job", "namespace", "pod", "instance"}
"""Labels that come with the scrape."""


@pytest.mark.parametrize(("place", "text"), list(expressions()))
def test_an_expression_asks_for_what_is_exported(place: str, text: str) -> None:
    """A metric or label renamed in the code and not here would leave an empty panel or an alert that never fires."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    found = list(selectors(promql_parser.parse(text)))

    assert found, place
    for selector in found:
        if selector.name in recorded:
            continue
        base = re.sub(r"_(bucket|count|sum)$", "", selector.name)
        definition = CATALOGUE.get(selector.name) or CATALOGUE[base]
        assert selector.name == definition.name or definition.kind == "histogram"
        labels = {matcher.name for matcher in selector.matchers.matchers}
        assert labels <= {*definition.labels, "le"} | BY_PROMETHEUS, (place, selector.name)


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    """Who is paged is told what to do."""
    alerts = [rule for rule in rules() if "alert" in rule]
    pages = {rule["annotations"]["runbook_url"].removeprefix("RUNBOOKS/"): rule["alert"] for rule in alerts}

    assert set(pages) == {path.name for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    for page, alert in pages.items():
        assert (ROOT / "docs" / "runbooks" / page).read_text(encoding="utf-8").startswith(f"# {alert}\n")
    assert all(rule["labels"]["severity"] in {"critical", "warning"} and rule["for"] for rule in alerts)


def test_runbooks_point_to_pages_and_metrics_that_are_there() -> None:
    """A link to nowhere, at night."""
    for page in (ROOT / "docs" / "runbooks").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert all((page.parent / link).exists() for link in re.findall(r"\]\(([^)]+)\)", text)), page.name
        assert set(re.findall(r"tierstream_[a-z_]+", text)) <= set(CATALOGUE), page.name


def test_the_window_comes_first() -> None:
    """Contract 9: window usage is the headline."""
    assert panels()[0]["title"] == "Window usage by partition"
    assert all(panel["description"] for panel in panels())


@pytest.fixture(scope="module")
def promtool() -> str:
    """Prometheus' own checker."""
    return program("promtool")


@pytest.mark.process
def test_alerts_fire_when_they_should_and_only_then(promtool: str, tmp_path: Path) -> None:
    """Each alert has a case in which it fires and one in which it does not, run by Prometheus' own evaluator."""
    cases = yaml.safe_load(CASES.read_text(encoding="utf-8"))
    cases["rule_files"] = [str(RULES)]
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump(cases), encoding="utf-8")

    done = subprocess.run(
        [promtool, "test", "rules", str(file)], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    expected = [
        (case["alertname"], bool(case.get("exp_alerts")))
        for test in cases["tests"]
        for case in test["alert_rule_test"]
    ]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {name for name, fires in expected if fires} == alerts
    assert {name for name, fires in expected if not fires} == alerts


@pytest.mark.process
def test_rules_pass_promtool(promtool: str) -> None:
    """Names, durations and templates are checked as Prometheus checks them."""
    done = subprocess.run(
        [promtool, "check", "rules", str(RULES)], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
