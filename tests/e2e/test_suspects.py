"""A record that really ends the process while it is decoded: it does so twice, and is then answered as poison."""

from __future__ import annotations

import signal

import pytest

import wire
from brokers import Broker
from ledger import Entry
from sabotage import sabotage
from stages import SetStage, Stage

DIES_OF_KILLERS = """
import os, signal

from consumer.codec import OperationDecoder

decode = OperationDecoder.decode


def dies(self, value, *more):
    if value is not None and b"KILLER" in value:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(self, value, *more)


OperationDecoder.decode = dies
"""


def send_killer(stage: Stage, number: int) -> Entry:
    """Produce a record that would be a good insert, and ends whoever decodes it."""
    value = wire.operation("insert", f"KILLER/{number}", b"x")
    (entry,) = stage.ledger.send(value, partition=0, kind="unknown", statuses={400})
    return entry


@pytest.mark.slow
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_record_that_ends_the_process_twice_is_answered_undecoded(
    apache: Broker, set_stage: SetStage, delivery: str
) -> None:
    """Two such records: each ends two processes; the fifth answers them and everything around them, once."""
    stage = set_stage(apache, delivery=delivery)
    ledger = stage.ledger
    environment = sabotage(stage.folder, DIES_OF_KILLERS)
    entries: list[Entry] = []
    killers: list[Entry] = []
    for number in range(2):
        entries += ledger.operate("insert", f"before/{number}", b"x", partition=0, statuses={201})
        killers.append(send_killer(stage, number))
    entries += ledger.operate("insert", "after", b"x", partition=0, statuses={201})
    deaths = []

    for _ in range(4):
        service = stage.start(ready=False, environment=environment)
        deaths.append(service.wait_exit(60))
    last = stage.start(ready=False, environment=environment)
    ledger.wait_answered()

    assert deaths == [128 + signal.SIGSEGV] * 4
    for killer in killers:
        (answer,) = ledger.answers[killer.id]
        assert answer.code == "decode_error"
        assert answer.result["message"] == "decoding the record has ended the process twice"
        ledger.wait_dead_letter(killer)
    last.stop()
    ledger.read_all()
    verdict = ledger.verdict()
    assert (verdict.missing, verdict.mismatched) == ([], [])
    assert not verdict.duplicated or delivery == "at-least-once"
    said = [line for line in last.log_lines() if line.get("event") == "record is poison, undecoded"]
    assert [line["offset"] for line in said] == [killer.offset for killer in killers]
