"""A partition of nothing but poison beside a healthy one, on a real process and Apache Kafka: who gets what.

One process, short rounds in turns: the healthy partition alone, then the same load beside poison. The process is held
(SIGSTOP) while a load is put in, so that everything is there before the first record is run, and neither producer nor
broker has a say in who goes first.

1. *Counted*, and that decides: poison records answered from the healthy partition's first response to its last. Their
   responses say when each was answered, by one clock.
2. *CPU time* of the process, told by the kernel, in which nobody else on the machine has a part: what a healthy record
   costs alone, and with its share of the poison. Their ratio is the speed that is left to a process with a core of its
   own. It is 0.93 in memory, and 0.68 where nobody makes way: a bound between them decides, too.
3. *Speed*, by the same responses: only printed, for it is also everybody else's. `make bench-growth BENCH_ARGS=poison`
   measures it, for docs/growth.md.
"""

from __future__ import annotations

import signal
import statistics
from bisect import bisect_right
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

import wire
from brokers import Broker
from consumer.assignment import OPERATIONS_PER_POISON, POISON_RUN, POISON_STEP
from ledger import Entry
from second_try import void_unless
from service_process import ServiceProcess
from stages import SetStage, Stage

ROUNDS = 3
HEALTHY, FLOODED = 0, 1
OPERATIONS = 6_000
POISON = 4_000
"""More than is worked off meanwhile, if their partition makes way."""

SHARE_SLACK = 2
"""Times the share of the poison: where a disk holds writes up for long, the poison does not wait for them."""

CPU_LEFT_MIN = 0.8
"""Of the healthy partition's speed, by CPU time: four fifths."""

SESSION = {"session_timeout": "30s", "heartbeat_interval": "1s"}
"""A process that is held for a second or two is still a member."""

MEMORY = {tier: {"type": "memory"} for tier in ("high_volume", "long_term", "change_log")}

VALUES = {
    "head": [wire.operation("head", f"healthy/{number}", request_id="r") for number in range(1_000)],
    "insert": [wire.operation("insert", f"healthy/{number}", b"x" * 100, request_id="r") for number in range(1_000)],
}


@dataclass(frozen=True)
class Round:
    """What one load came to."""

    cpu: float
    """Seconds of the process, from the first record to the last one, poison included."""
    seconds: float
    """From the first response to a healthy record to the last one."""
    poison: int
    """Answered in that time."""


def cpu_seconds(service: ServiceProcess) -> float:
    """CPU time that all threads of *service* have had."""
    threads = Path(f"/proc/{service.process.pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def play(stage: Stage, service: ServiceProcess, kind: str, poison: int) -> Round:
    """Put a load in while *service* is held, let it go, wait for every response."""
    ledger, values = stage.ledger, VALUES[kind]
    status = {"head": 404, "insert": 201}[kind]
    before = set(ledger.entries)
    service.process.send_signal(signal.SIGSTOP)
    try:
        for value in islice(cycle(values), OPERATIONS):
            ledger.send(value, partition=HEALTHY, kind=kind, statuses={status}, wait=False)
        for value in islice(cycle(values), poison):
            ledger.send(value[:-1], partition=FLOODED, kind="unknown", statuses={400}, wait=False)
        ledger.flush()
        cpu = cpu_seconds(service)
    finally:
        service.process.send_signal(signal.SIGCONT)
    entries = [entry for name, entry in ledger.entries.items() if name not in before]
    ledger.wait_answered(entries, seconds=60)
    cpu = cpu_seconds(service) - cpu
    healthy, flooded = (
        completed(stage, [one for one in entries if one.partition == side]) for side in (HEALTHY, FLOODED)
    )
    meanwhile = bisect_right(flooded, healthy[-1]) - bisect_right(flooded, healthy[0])
    return Round(cpu, (healthy[-1] - healthy[0]) / 1e6, meanwhile)


def completed(stage: Stage, entries: list[Entry]) -> list[int]:
    """When *entries* were answered, each once, ascending; in microseconds of the service's clock."""
    answers = [stage.ledger.answers[entry.id] for entry in entries]
    assert all(len(answer) == 1 for answer in answers)
    return sorted(answer.response["completed_at"] for (answer,) in answers)


@pytest.mark.slow
@pytest.mark.timeout(180, func_only=True)
@pytest.mark.parametrize(("kind", "storage"), [("head", MEMORY), ("insert", {})], ids=["memory", "as configured"])
def test_a_partition_of_pure_poison_leaves_a_healthy_one_four_fifths(
    apache: Broker, set_stage: SetStage, kind: str, storage: dict[str, Any]
) -> None:
    """Contract 6: it makes way for twelve operations for each record of its own, and both are answered whole."""
    stage = set_stage(apache, partitions=2, kafka=SESSION, storage=storage)
    service = stage.start(partitions=2)
    play(stage, service, kind, POISON)  # everything has been there once
    rounds = [(play(stage, service, kind, 0), play(stage, service, kind, POISON)) for _ in range(ROUNDS)]

    for alone, beside in rounds:
        print(f"alone {alone}, beside {beside}")
    alone_cpu = statistics.median(alone.cpu for alone, _ in rounds)
    each = (statistics.median(beside.cpu for _, beside in rounds) - alone_cpu) / POISON
    poison = statistics.median(beside.poison for _, beside in rounds)
    left = alone_cpu / (alone_cpu + each * poison)
    speeds = [alone.seconds / beside.seconds for alone, beside in rounds]
    print(f"{OPERATIONS} operations, {poison} poison, {left:.2f} by CPU time, speeds {speeds}")

    assert poison <= SHARE_SLACK * OPERATIONS / OPERATIONS_PER_POISON + POISON_RUN + POISON_STEP
    assert left >= CPU_LEFT_MIN
    service.stop()
    stage.ledger.read_all()
    assert len(stage.ledger.dead_letters) == POISON * (ROUNDS + 1)
    void_unless(min(beside.poison for _, beside in rounds) > 0, "they did not meet")
