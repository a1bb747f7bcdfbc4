"""Faults by the dozen under load, on one Apache Kafka of their own, judged by the broker's own records.

What is done is drawn from a seed (`chaos_plan`), done by a fleet (`fleet`), and judged by `invariants` and the ledger:
I1 to I13, of every commit and of every response, not of samples. Each test also says what has to have
happened for it to mean anything. `make soak` does the same for as long as it is asked to.

One member after another, or a few at once; 4 partitions, or 12; both ways of delivery, side by side where the fault is
the broker's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import chaos_plan
from brokers import RETURNS_QUICKLY, Broker, apache_source, maven_broker
from fleet import Findings, Fleet, fleet_stage, now_ms, timestamp_ms
from group_history import read_history
from load import Questions
from second_try import void_unless
from stages import Stage

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.apache, pytest.mark.timeout(400, func_only=True)]

SEED = 20
"""Of all plans here; another one is as good, and `make soak` takes others."""

ZOMBIE_SECONDS_MAX = 15.0
"""I10: from SIGCONT until a member that was taken for dead works again."""

OWN_LINES = 80
"""Lines of a member's log that a failing test shows, without those of the client: they tell a whole test's story."""

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

    def make(delivery: str, partitions: int, *, questions: bool = False, rate: float = 600, **settings: Any) -> Fleet:
        folder = tmp_path / f"fleet{len(stages)}"
        folder.mkdir()
        stage = fleet_stage(own_broker, folder, partitions=partitions, delivery=delivery, **settings)
        stages.append(stage)
        return Fleet(stage, load=Questions(stage.ledger) if questions else None, rate=rate)

    yield make
    for stage in stages:
        stage.put_down()
        for service in stage.processes[-5:]:
            own = [line for line in service.log_lines() if str(line.get("logger")).startswith("consumer.")]
            print(f"--- {service.log.name}, exit {service.process.poll()}", *own[-OWN_LINES:], sep="\n")


def check(*fleets: Findings, **happened: int) -> None:
    """Nothing is wrong, and so many of each really took place in each fleet."""
    print(*[findings.report() for findings in fleets], sep="\n")
    assert [findings.wrong for findings in fleets] == [[] for _ in fleets]
    for found in [findings.happened for findings in fleets]:
        too_few = {name: found[name] for name in happened if found[name] < happened[name]}
        void_unless(not too_few, f"too few of {too_few}")


@pytest.mark.parametrize(("delivery", "rounds"), [("at-least-once", 20), ("exactly-once", 10)])
def test_hard_kills_under_load_lose_nothing_and_repeat_only_what_was_not_committed(
    fleet: MakeFleet, delivery: str, rounds: int
) -> None:
    """I1-I10, contract 3: 30 times SIGKILL at random moments, those of a start too; 31,200 records at least.

    So many are answered before the last kill, and what is put in after it is not counted. `tierstream verify` is asked
    too, and has to find what the ledger has found.
    """
    under_test = fleet(delivery, partitions=4, rate=1_000)
    under_test.play(chaos_plan.kills(SEED, rounds, records=rounds * 1_040))
    answered_between_kills = len(under_test.stage.ledger.answers)
    under_test.settle()
    under_test.second_opinion()

    findings = under_test.judge(silence_max=20)
    assert answered_between_kills >= rounds * 1_040
    check(
        findings,
        **{
            "kills": rounds,
            "kills with work left": rounds * 3 // 4,
            "kills of a member at work": rounds // 2,
            "rebalances with work in flight": rounds // 2,
            "tombstones in storage": 50,
            "records to be dead-lettered": rounds * 3,
            "members with whole permits at the end": 1,
            "looks at permits": 3,
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
    check(findings, **{"clean stops": 10, "stops with work left": 6, "rebalances with work in flight": 6})


def test_a_storm_of_rebalances_loses_nothing_and_stands_still_nowhere(fleet: MakeFleet) -> None:
    """I1, I4-I6, I9, I10, I12: 60 s of one to five members over 12 partitions, that join, leave and are killed."""
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
            "records to be dead-lettered": 5,
            "members with whole permits at the end": 1,
            "looks at permits": 10,
        },
    )


def test_restarts_of_the_broker_are_survived(fleet: MakeFleet) -> None:
    """I1-I6, I10, H17, H18, H24: two clean ones, two by SIGKILL, and 30 s of SIGSTOP, under two members of each kind.

    No member ends, or has to be started again; nor does one stay silent for long once the broker is back.
    """
    fleets = [fleet(delivery, partitions=4, rate=300) for delivery in DELIVERIES]
    first, second = fleets
    second.start(0)
    second.start(1)
    second.feed()
    first.beside = [second]
    first.play(chaos_plan.brokers(SEED))
    for one in fleets:
        one.settle()
    second.share_outages(first)

    assert first.happened["broker: stop"] + first.happened["broker: kill"] + first.happened["broker: freeze"] == 5
    check(*[one.judge() for one in fleets], **{"clean stops": 2, "rebalances": 2})


def test_members_frozen_beyond_their_session_commit_nothing_when_they_wake(fleet: MakeFleet) -> None:
    """I2, I5, I6, I10, H16c, H21: three times SIGSTOP under load, takeover, SIGCONT; of each kind of delivery.

    Each member has a storage of its own, as one that is frozen while it holds the lock of a shared file would hold up
    the other one, which is another subject.
    """
    memory = {"type": "memory"}
    storage = {"high_volume": memory, "long_term": memory, "change_log": memory}
    fleets = [fleet(delivery, partitions=4, questions=True, rate=300, storage=storage) for delivery in DELIVERIES]
    for one in fleets:
        one.feed()
        one.start(0)
        one.start(1)
    for number in range(3):
        freeze_and_thaw(fleets, number % 2, 1 - number % 2)

    for one in fleets:
        one.settle()
    check(*[one.judge() for one in fleets], **{"members frozen": 3, "releases: lost": 3, "clean stops": 2})


def freeze_and_thaw(fleets: list[Fleet], frozen: int, awake: int) -> None:
    """Freeze a member of each fleet under load; wake it up when the other one has done all there was to do."""
    for one in fleets:
        one.until(partial(half_is_owned_by_each, one), "both members to own half")
        one.burst(1_500)
        one.freeze(frozen)
    for one in fleets:
        one.until(partial(all_is_owned_by, one, awake), "the other member to own everything")
        one.feeder.feeding = False
        one.until(partial(all_is_answered, one), "everything to be answered")
    time.sleep(1)  # several commit intervals: everything is committed
    before = [commits_of(one) for one in fleets]
    for one in fleets:
        thawed = now_ms()
        one.thaw(frozen)
        one.until(partial(assigned_since, one, frozen, thawed), "the zombie to be back")
        assert assigned_since(one, frozen, thawed) - thawed <= ZOMBIE_SECONDS_MAX * 1000
    assert [commits_of(one) for one in fleets] == before, "a member committed for partitions that it had lost"
    for one in fleets:
        one.feeder.feeding = True


def half_is_owned_by_each(fleet: Fleet) -> bool:
    """Whether two members share four partitions."""
    return owned(fleet, 0) == owned(fleet, 1) == 2


def all_is_owned_by(fleet: Fleet, place: int) -> bool:
    """Whether a member has all four partitions."""
    return owned(fleet, place) == 4


def all_is_answered(fleet: Fleet) -> bool:
    """Whether nothing is left to do."""
    return fleet.all_answered


def owned(fleet: Fleet, place: int) -> int:
    """How many partitions a member has open."""
    states = fleet.members[place].service.partitions().values()
    return sum(state["position"] is not None for state in states)


def commits_of(fleet: Fleet) -> int:
    """How often the group has committed, so far."""
    return len(read_history(fleet.stage.broker, fleet.stage.group, fleet.stage.ledger.input).commits)


def assigned_since(fleet: Fleet, place: int, moment: int) -> int:
    """When a member was first assigned partitions after *moment*; 0 while it was not."""
    times = [
        timestamp_ms(line)
        for line in fleet.members[place].service.log_lines()
        if line.get("event") == "partitions assigned"
    ]
    return next((at for at in times if at > moment), 0)
