"""Storage that cannot be written to for a while: back-pressure by default, answers where that is asked for."""

from __future__ import annotations

import json
import re

import pytest

from brokers import Broker
from ledger import Entry
from outages import locked
from sabotage import sabotage
from service_process import ServiceProcess, command_line
from stages import SetStage, Stage
from terminal import Terminal, tierstream

RETRY = {"attempts": 2, "initial": "20ms", "max": "200ms"}

IMPATIENT = """
from consumer.storage import sqlite

sqlite.BUSY_SECONDS = 0.3
"""
"""An attempt at a locked database fails by itself, here after a moment instead of seconds."""


def insert_some(stage: Stage, name: str, *statuses: int, number: int = 20) -> list[Entry]:
    """Produce inserts to both partitions."""
    return [
        entry
        for count in range(number)
        for entry in stage.ledger.operate(
            "insert", f"{name}/{count}", b"x", partition=count % 2, statuses=set(statuses)
        )
    ]


def answered_at_all(stage: Stage, entries: list[Entry]) -> int:
    """How many of *entries* have a response once everything on the output topic is read."""
    stage.ledger.read_all()
    return stage.ledger.answered(entries)


def _on_call_is_told(stage: Stage, service: ServiceProcess) -> None:
    """`why` and `top`, in a terminal: which offset each partition waits for, since when, why, and how often tried."""
    said = command_line("why", "--url", service.admin, cwd=stage.folder)
    assert said.returncode == 0, said.stderr
    for number, line in enumerate(said.stdout.splitlines()):
        assert re.fullmatch(
            rf"partition {stage.ledger.input}/{number} waits for offset 10 "
            r"\(insert [0-9a-f]{16}, \d+\.\d s, attempt \d+, (backend_unavailable|timeout): .+\); "
            "storage is unavailable; operations are tried again until it is back",
            line,
        ), line
    with Terminal(tierstream("top", "--url", service.admin, "--interval", "0.2"), stage.folder) as terminal:
        terminal.wait(lambda text: text.count("storage_unavailable") == 2, "both partitions and their reason")
        terminal.press("q")
        assert terminal.wait_end() == 0


@pytest.mark.slow
def test_by_default_an_outage_pauses_and_nothing_fails(embedded: Broker, set_stage: SetStage) -> None:
    """Contract 6, `retry.exhausted: block`: reasons shown, permits held, nothing answered; it goes on by itself."""
    stage = set_stage(embedded, retry={**RETRY, "attempt_timeout": "20s"})
    service = stage.start(partitions=2, environment=sabotage(stage.folder, IMPATIENT))
    before = insert_some(stage, "before", 201)
    stage.ledger.wait_answered(before)
    service.wait(lambda: sum(stage.ledger.committed(stage.group).values()) == 20, "what was answered to be committed")

    with locked(stage.config["storage"]["high_volume"]["path"]):
        during = insert_some(stage, "during", 201, number=4)
        service.wait(
            lambda: all(
                one["paused_for"] == ["storage_unavailable"] and one["in_flight"] == 2
                for one in service.partitions().values()
            ),
            "both partitions to be paused, with everything in flight",
            60,
        )
        first = {name: one["oldest"]["attempts"] for name, one in service.partitions().items()}
        service.wait(
            lambda: all(one["oldest"]["attempts"] > first[name] for name, one in service.partitions().items()),
            "further attempts",
            60,
        )
        state, metrics, ready = service.state(), service.metrics(), service.get("/readyz")

        _on_call_is_told(stage, service)
        assert answered_at_all(stage, during) == 0
        assert sum(stage.ledger.committed(stage.group).values()) == 20
        assert state["storage"]["blocked"]
        assert {one["oldest"]["last_error"] for one in state["partitions"]} <= {"backend_unavailable", "timeout"}
        assert (ready[0], json.loads(ready[1])["reasons"]) == (503, ["storage unavailable"])
        paused = [value for name, value in metrics.items() if 'reason="storage_unavailable"' in name]
        assert paused == [1, 1]

    stage.ledger.wait_answered(during, seconds=60)
    service.wait(lambda: service.ready, "the service to be ready again")
    service.stop()
    stage.ledger.read_all()
    verdict = stage.ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attempt_timeout", "sabotaged", "status", "code"),
    [("100s", IMPATIENT, 503, "backend_unavailable"), ("1s", "", 504, "timeout")],
    ids=["unavailable", "too-late"],
)
def test_where_that_is_asked_for_attempts_used_up_are_an_answer(
    embedded: Broker, set_stage: SetStage, attempt_timeout: str, sabotaged: str, status: int, code: str
) -> None:
    """Contract 2.2 and 6, `retry.exhausted: answer`: each record one failure, retriable, not dead-lettered."""
    stage = set_stage(embedded, retry={**RETRY, "attempt_timeout": attempt_timeout, "exhausted": "answer"})
    service = stage.start(partitions=2, environment=sabotage(stage.folder, sabotaged))
    stage.ledger.wait_answered(insert_some(stage, "before", 201, number=2))

    with locked(stage.config["storage"]["high_volume"]["path"]):
        during = insert_some(stage, "during", status, number=2)
        stage.ledger.wait_answered(during, seconds=90)
        assert service.ready
    after = insert_some(stage, "after", 201)
    stage.ledger.wait_answered(after, seconds=60)

    for entry in during:
        (answer,) = stage.ledger.answers[entry.id]
        assert (answer.code, answer.result["retriable"]) == (code, True)
    assert not stage.ledger.dead_letters
    service.wait(lambda: sum(stage.ledger.committed(stage.group).values()) == 24, "everything to be committed")
    service.stop()
    stage.ledger.read_all()
    verdict = stage.ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, [])
