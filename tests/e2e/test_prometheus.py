"""A running service under load, seen by Prometheus itself: what it exports, and what rules and dashboard make of it."""

from __future__ import annotations

import re
import subprocess
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator

import promql_parser
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from brokers import Broker
from load import Load
from outages import locked
from prometheus import (
    ANSWER_SECONDS,
    Prometheus,
    as_asked,
    expressions,
    panels,
    program,
    rules,
    running_prometheus,
    selectors,
)
from service_process import ServiceProcess
from stages import Stage, set_up

PARTITIONS = 4
BY_PROMETHEUS = {"job", "namespace", "pod", "instance", "le"}
QUIET = {"Since the last commit", "Offset map", "Oldest in flight by partition"}
"""Panels that may have nothing to show for a moment."""

pytestmark = [pytest.mark.slow, pytest.mark.process]


@pytest.fixture(scope="module")
def stage(embedded: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A service with windows of 5, 3, 1 and 1 permits that has answered a load with poison in it."""
    made = set_up(
        embedded,
        tmp_path_factory.mktemp("scraped"),
        PARTITIONS,
        PARTITIONS,
        concurrency={"limit": 10},
        window={"fraction": 0.5},
        storage={"threshold": "1KiB"},
    )
    made.start(partitions=PARTITIONS)
    load = Load(made.ledger, poison_every=7)
    deadline = time.monotonic() + 3
    load.pump(lambda: time.monotonic() > deadline)
    made.ledger.wait_answered(seconds=120)
    yield made
    made.put_down()


@pytest.fixture(scope="module")
def service(stage: Stage) -> ServiceProcess:
    """Its process."""
    return stage.processes[-1]


@pytest.fixture(scope="module")
def prometheus(service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scrapes it."""
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), service.admin.removeprefix("http://")) as running:
        yield running


def openmetrics(service: ServiceProcess) -> str:
    """A scrape in the format that has exemplars."""
    request = urllib.request.Request(service.admin + "/metrics", headers={"Accept": "application/openmetrics-text"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def test_what_is_exported_passes_promtool(service: ServiceProcess) -> None:
    """Names, types, units and help texts, as Prometheus' own checker wants them; it has no complaint at all."""
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=service.get("/metrics")[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_an_exemplar_leads_to_a_record_that_was_answered(stage: Stage, service: ServiceProcess) -> None:
    """Contract 9: OpenMetrics with exemplars, each within its limit and of a record of ours; none in plain text."""
    answered = {(entry.topic, str(entry.partition), str(entry.offset)) for entry in stage.ledger.entries.values()}
    exemplars = [
        (family.name, sample.exemplar)
        for family in parse_openmetrics(openmetrics(service))  # type: ignore[no-untyped-call]  # the vendor's
        for sample in family.samples
        if sample.exemplar is not None
    ]

    assert {name for name, _ in exemplars} == {
        "tierstream_response_latency_seconds",
        "tierstream_operation_duration_seconds",
        "tierstream_storage_request_duration_seconds",
    }
    for _, exemplar in exemplars:
        labels = exemplar.labels
        assert (labels["topic"], labels["partition"], labels["offset"]) in answered
        assert sum(len(name) + len(value) for name, value in labels.items()) <= 128
    assert " # {" not in service.get("/metrics")[1]


def test_every_expression_asks_for_what_a_running_service_exports(stage: Stage, service: ServiceProcess) -> None:
    """Not for what is declared: each name, each label, and each value of a label that is asked for by name."""
    with locked(stage.config["storage"]["high_volume"]["path"]):  # some series are there while something is in flight
        stage.ledger.operate("insert", "in-flight", b"x", partition=0, statuses={201}, wait=False)
        stage.ledger.flush()
        service.wait(lambda: any(one["oldest"] for one in service.partitions().values()), "an operation in flight")
        exported = service.get("/metrics")[1]
    values: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for family in parse(exported):
        for sample in family.samples:
            labels = values[sample.name]
            for label, value in sample.labels.items():
                labels[label].add(value)
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    asked = [(place, one) for place, text in expressions() for one in selectors(promql_parser.parse(text))]

    assert len(asked) > 50
    for place, selector in asked:
        if selector.name in recorded:
            continue
        assert selector.name in values, f"{place}: {selector.name} is not exported"
        for matcher in selector.matchers.matchers:
            if matcher.name in BY_PROMETHEUS:
                continue
            known = values[selector.name][matcher.name]
            exact = matcher.op == promql_parser.MatchOp.Equal
            there = matcher.value in known if exact else any(re.fullmatch(matcher.value, value) for value in known)
            assert there, f"{place}: no {selector.name} has {matcher.name}={matcher.value}"
    stage.ledger.wait_answered(seconds=120)


def test_prometheus_answers_how_full_each_window_is(
    stage: Stage, service: ServiceProcess, prometheus: Prometheus
) -> None:
    """The headline of the dashboard, while storage cannot be written to and every window has something in flight."""
    headline = panels()[0]
    expression = as_asked(headline["targets"][0]["expr"])
    with locked(stage.config["storage"]["high_volume"]["path"]):
        for number in range(8 * PARTITIONS):
            stage.ledger.operate(
                "insert", f"full/{number}", b"x", partition=number % PARTITIONS, statuses={201}, wait=False
            )
        stage.ledger.flush()

        def agree() -> bool:
            full = {str(number): one["in_flight"] / one["window"] for (_, number), one in service.partitions().items()}
            told = {labels["partition"]: value for labels, value in prometheus.query(expression)}
            return len(told) == PARTITIONS and all(told.values()) and told == pytest.approx(full)

        service.wait(agree, "Prometheus to tell what the service tells", ANSWER_SECONDS)
        windows = {str(number): one["window"] for (_, number), one in service.partitions().items()}
        permits = prometheus.query("max by (partition) (tierstream_window_permits)")

    assert {labels["partition"]: value for labels, value in permits} == windows
    assert sum(windows.values()) == 10
    stage.ledger.wait_answered(seconds=120)


def test_prometheus_evaluates_everything_that_is_shipped(
    stage: Stage, service: ServiceProcess, prometheus: Prometheus
) -> None:
    """Every rule is healthy, every panel is answered, with data wherever a busy service has some; nothing is down."""
    load = Load(stage.ledger)
    load.put(160)

    def evaluated() -> bool:
        groups = prometheus.ask("rules")["groups"]
        return all(rule["health"] == "ok" for group in groups for rule in group["rules"])

    service.wait(evaluated, "every rule to be healthy", ANSWER_SECONDS)
    recorded = [rule["record"] for rule in rules() if "record" in rule]
    service.wait(lambda: all(map(prometheus.query, recorded)), "every recorded series", ANSWER_SECONDS)
    empty = {
        panel["title"]
        for panel in panels()
        if not any(prometheus.query(as_asked(target["expr"])) for target in panel["targets"])
    }
    stage.ledger.flush()
    stage.ledger.wait_answered(seconds=120)

    assert empty <= QUIET
    assert prometheus.query("ALERTS{alertname='TierstreamDown'}") == []
    (target,) = prometheus.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_prometheus_keeps_the_exemplars(stage: Stage, prometheus: Prometheus) -> None:
    """It scrapes OpenMetrics by itself, and leads from the latency's bucket to the record."""
    stage.ledger.answer(stage.ledger.operate("head", "example", statuses={404}))
    now = time.time()

    def found() -> list[dict[str, str]]:
        series = prometheus.ask(
            "query_exemplars",
            query="tierstream_response_latency_seconds_bucket",
            start=str(now - 600),
            end=str(now + 600),
        )
        return [exemplar["labels"] for one in series for exemplar in one["exemplars"]]

    stage.processes[-1].wait(lambda: bool(found()), "an exemplar", ANSWER_SECONDS)

    assert all({"topic", "partition", "offset"} <= set(labels) for labels in found())
