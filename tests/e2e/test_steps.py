"""Killed at each step from fetch to commit, just before it and just after it: nothing is lost, nothing goes too far.

Kills at random moments (`test_chaos.py`) hardly ever come between two steps that follow each other at once. Here a
member ends itself, by SIGKILL, at a step given by name (`sabotage.py`); the next one, which starts on what that left
behind, does so at the next step, under a load that goes on all the time. In the end one member works everything off,
and the whole history is judged, every commit and every response. The steps within storage, and those of its recovery,
are `process/test_crashes.py`'s.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from brokers import Broker
from fleet import Fleet, Member, fleet_stage, reads
from sabotage import on_signal, sabotage
from second_try import void_unless
from stages import Stage

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.apache, pytest.mark.timeout(400, func_only=True)]

DIES_AT_A_STEP = (
    on_signal("consumer._coordinator.request_rejoin(); globals().update(left=abs(int(number)))")
    + """
import importlib, inspect, os

when, module, name, number = os.environ["DIE_AT"].split()
owner, (*path, last) = importlib.import_module(module), name.split(".")
for part in path:
    owner = getattr(owner, part)
step, left = getattr(owner, last), int(number)  # a negative one counts from the signal on


def come_to(moment):
    global left
    left -= moment == when
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)


if inspect.iscoroutinefunction(step):

    async def dying(*arguments, **more):
        come_to("before")
        result = await step(*arguments, **more)
        come_to("after")
        return result

else:

    def dying(*arguments, **more):
        come_to("before")
        result = step(*arguments, **more)
        come_to("after")
        return result


setattr(owner, last, dying)
"""
)

POLLER, PUBLISHER, WRITER = "consumer.kafka.poller Poller", "consumer.kafka.publisher", "consumer.kafka.transactions"

STEPS = {
    "at-least-once": {
        "records are taken": f"{POLLER}._hand_over 3",
        "storage applies an operation": "consumer.storage.tiered TieredStorage.put 60",
        "a response is handed in": f"{PUBLISHER} Lane.append 90",
        "a batch is written": f"{PUBLISHER} Publisher.send 6",
        "offsets count as finished": f"{POLLER}._resolved 6",
        "offsets are committed": f"{POLLER}._commit_by_client 2",
    },
    "exactly-once": {
        "partitions are assigned": f"{POLLER}.on_partitions_assigned 1",
        "start offsets are read": f"{POLLER}._starts 1",
        "a partition is opened": f"{POLLER}._begin 2",
        "a producer is started": f"{WRITER} TransactionWriter.start 2",
        "what was left behind is swept away": f"{WRITER} TransactionWriter._sweep 3",
        "a transaction begins": "aiokafka AIOKafkaProducer.begin_transaction 7",
        "a batch is written": "aiokafka AIOKafkaProducer.send_batch 3",
        "offsets are added": "aiokafka AIOKafkaProducer.send_offsets_to_transaction 3",
        "a transaction is committed": "aiokafka AIOKafkaProducer.commit_transaction 3",
    },
}
"""Name of a step to module, name and which call of it: late enough that there is work in flight. What both kinds of
delivery have in common is met in one of them: the shorter run would else wait for the longer one."""

REVOKED = {
    "partitions are revoked": f"{POLLER}.on_partitions_revoked -1",
    "the first commit of a revocation": f"{POLLER}._commit -1",
    "the commit after the drain": f"{POLLER}._commit -2",
}
"""Met in a rebalance, which a signal begins."""


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[list[Stage]]:
    """Put down after the test."""
    made: list[Stage] = []
    yield made
    for stage in made:
        stage.put_down()
        for service in stage.processes[-3:]:
            print(f"--- {service.log.name}, exit {service.process.poll()}", *service.log_lines()[-40:], sep="\n")


STANDSTILL_SECONDS = 90.0
"""No member lives long enough here to be asked for more; what each kill may take is bounded by `Fleet.until`."""


def play(fleet: Fleet, delivery: str) -> int:
    """Kill one member after another, before and after each step; let the last one finish. Return how many were."""
    stage, revoked = fleet.stage, REVOKED if delivery == "at-least-once" else {}
    kills = [(name, when, at) for name, at in (STEPS[delivery] | revoked).items() for when in ("before", "after")]
    fleet.feed()
    for name, when, at in kills:
        if name in revoked:  # no commit but that of the chosen starts, and those of the revocation
            stage.config["commit"] = {"interval": "5m", "max_records": 1_000_000}
        member = fleet.start(0, sabotage(stage.folder, DIES_AT_A_STEP) | {"DIE_AT": f"{when} {at}"})
        if name in revoked:
            fleet.until(partial(reads, member), "it to read")
            member.service.process.send_signal(signal.SIGUSR2)
        fleet.until(partial(fell, fleet, member), f"a kill {when} this: {name}")
        fleet.bury(0)
    stage.config["commit"] = {"interval": "200ms"}
    fleet.start(0)
    fleet.settle()
    return len(kills)


def fell(fleet: Fleet, member: Member) -> bool:
    """Whether a doomed member has come to its end, and been seen to."""
    return member not in fleet.members.values()


def test_members_killed_before_and_after_each_step_lose_and_repeat_nothing_they_may_not(
    apache: Broker, stages: list[Stage], tmp_path: Path
) -> None:
    """I1-I9, I11-I13, contract 3: each step twice, of both kinds of delivery, side by side."""
    fleets = {}
    for delivery in STEPS:
        folder = tmp_path / delivery
        folder.mkdir()
        stages.append(fleet_stage(apache, folder, partitions=4, delivery=delivery))
        fleets[delivery] = Fleet(stages[-1], rate=600)
    with ThreadPoolExecutor() as threads:
        played = {delivery: threads.submit(play, fleet, delivery) for delivery, fleet in fleets.items()}
    for delivery, fleet in fleets.items():
        kills = played[delivery].result()
        findings = fleet.judge(silence_max=STANDSTILL_SECONDS, stagnation_max=STANDSTILL_SECONDS)
        print(delivery, findings.report(), sep="\n")
        assert findings.wrong == []
        assert findings.happened["kills at a step"] == kills
    for delivery, fleet in fleets.items():
        left = fleet.happened["kills with work left"]
        void_unless(left >= played[delivery].result() * 3 // 4, f"{delivery}: only {left} kills found work left")
        poison = fleet.happened["records to be dead-lettered"]
        void_unless(poison >= played[delivery].result(), f"{delivery}: only {poison} records to be dead-lettered")
    void_unless(fleets["at-least-once"].happened["releases: drained"] >= 2, "nothing was killed in a revocation")
