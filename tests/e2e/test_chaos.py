"""Faults by the dozen under load, on one Apache Kafka of their own, judged by the broker's own records.

What is done is drawn from a seed (`chaos_plan`), done by a fleet (`fleet`), and judged by `invariants` and the ledger:
I1 to I8 and I10 to I13, of every commit and of every response, not of samples. Each test also says what has to have
happened for it to mean anything. `make soak` does the same for as long as it is asked to.

One member after another, or a few at once; 4 partitions, or 12; both ways of delivery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import chaos_plan
from brokers import Broker, apache_source, maven_broker, tail
from fleet import Findings, Fleet, fleet_stage
from stages import Stage

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.apache, pytest.mark.timeout(400, func_only=True)]

SEED = 20
"""Of all plans here; another one is as good, and `make soak` takes others."""

RETURNS_QUICKLY = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
"""A broker that was killed is let in again after its old session, of 9 s unless told otherwise."""

DELIVERIES = ("at-least-once", "exactly-once")

MakeFleet = Callable[..., Fleet]


@pytest.fixture(scope="module")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Apache Kafka that these tests may kill."""
    if apache_source() != "maven":
        pytest.skip("needs an Apache Kafka whose process is ours: java and mvn")
    with maven_broker(tmp_path_factory.mktemp("chaos"), RETURNS_QUICKLY) as own:
        yield own


@pytest.fixture
def fleet(own_broker: Broker, tmp_path: Path) -> Iterator[MakeFleet]:
    """A maker of fleets, put down after the test; a failing one shows the ends of its logs."""
    stages: list[Stage] = []

    def make(delivery: str, partitions: int) -> Fleet:
        folder = tmp_path / f"fleet{len(stages)}"
        folder.mkdir()
        stage = fleet_stage(own_broker, folder, partitions=partitions, delivery=delivery)
        stages.append(stage)
        return Fleet(stage)

    yield make
    for stage in stages:
        stage.put_down()
        for service in stage.processes[-5:]:
            print(f"--- {service.log.name}, exit {service.process.poll()}\n{tail(service.log, 15)}")


def check(findings: Findings, **happened: int) -> None:
    """Nothing is wrong, and so many of each really took place."""
    print(findings.report())
    assert findings.wrong == []
    too_few = {name: findings.happened[name] for name in happened if findings.happened[name] < happened[name]}
    assert not too_few, f"void: too few of {too_few}"


@pytest.mark.parametrize(("delivery", "rounds"), [("at-least-once", 20), ("exactly-once", 10)])
def test_hard_kills_under_load_lose_nothing_and_repeat_only_what_was_not_committed(
    fleet: MakeFleet, delivery: str, rounds: int
) -> None:
    """I1-I8, I10, contract 3: 30 times SIGKILL at random moments, those of a start too; 31,000 records at least."""
    under_test = fleet(delivery, partitions=4)
    under_test.play(chaos_plan.kills(SEED, rounds))
    under_test.settle(records=rounds * 1_040)

    findings = under_test.judge(silence_max=20)
    assert findings.figures["records"] >= rounds * 1_040
    check(
        findings,
        **{
            "kills": rounds,
            "kills with work left": rounds,
            "kills of a member at work": rounds // 2,
            "rebalances with work in flight": rounds // 2,
            "tombstones in storage": 50,
        },
    )


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_clean_stops_under_load_repeat_nothing_at_all(fleet: MakeFleet, delivery: str) -> None:
    """I1, I2, I6, I10, I12, contract 11: 20 times SIGTERM, with and without a successor that is there already."""
    under_test = fleet(delivery, partitions=4)
    under_test.play(chaos_plan.stops(SEED, 10))
    under_test.settle()

    findings = under_test.judge(silence_max=20)
    assert findings.figures["repeated"] == 0
    assert under_test.faults == [], "no drain ran out of time, no partition was lost"
    check(findings, **{"clean stops": 10, "stops with work left": 9, "rebalances with work in flight": 10})


def test_a_storm_of_rebalances_loses_nothing_and_stands_still_nowhere(fleet: MakeFleet) -> None:
    """I1, I4-I6, I10, I12: 60 s of one to five members over 12 partitions, that join, leave and are killed."""
    under_test = fleet("at-least-once", partitions=12)
    under_test.play(chaos_plan.storm(SEED, 60))
    under_test.settle()

    check(
        under_test.judge(),
        **{
            "rebalances with work in flight": 8,
            "kills with work left": 3,
            "clean stops": 3,
            "sessions ended by hand": 1,
        },
    )


def test_restarts_of_the_broker_are_survived(fleet: MakeFleet) -> None:
    """I1-I6, I10, H17, H18: two clean ones, two by SIGKILL, and 30 s of SIGSTOP, under two members.

    No member ends, or has to be started again; nor does one stay silent for long once the broker is back.
    """
    under_test = fleet("at-least-once", partitions=4)
    under_test.play(chaos_plan.brokers(SEED))
    under_test.settle()

    happened = {"broker: stop": 2, "broker: kill": 2, "broker: freeze": 1, "clean stops": 2, "rebalances": 2}
    check(under_test.judge(), **happened)
