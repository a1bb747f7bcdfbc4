"""``make soak``: faults for as long as asked, from one printed seed; fails where anything was wrong.

First the storage alone, without a broker:

operations
    A model of members that write the same objects, in memory, in all processors (`storage_model.py`):
    ``SOAK_OPERATIONS`` (10,000,000).

Then services, in parts of episodes on topics of their own. First on one Apache Kafka of one node, at-least-once and
exactly-once in turn:

key order
    Objects that are rewritten, large and small in turn, by a service that is killed again and again (`rewrites.py`):
    ``SOAK_REWRITE_KILLS`` (100).

And fleets:

kills
    One member, killed again and again: ``SOAK_KILLS`` (500).
storm
    One to five members that join, leave and are killed, over 12 partitions: ``SOAK_STORM_MINUTES`` (20).
mixed
    The storm, frozen members, broker outages, a storage nobody can write to across a rebalance, and a network that
    loses answers and is slow, beside a member that lives through all of it: ``SOAK_MINUTES`` (20).

And then on one of three nodes, at-least-once and exactly-once at the same time:

leaders
    One node after another is stopped, killed and frozen, so that the leaders of input and output and the coordinators
    of groups and transactions move; no silence is excused by that: ``SOAK_LEADER_MINUTES`` (5).

``SOAK_SEED`` plays the same plans again; without it one is drawn. What was done, what happened and what was measured is
printed as it goes. A part is void, and the soak fails, where something it is about has not happened once. The exit code
is 0 for nothing wrong, 1 for anything, and the folder with all logs is kept then.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, cycle, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import chaos_plan
import rewrites
import storage_model
from brokers import RETURNS_QUICKLY, Broker, maven_broker
from chaos_plan import Delivery, Plan
from fleet import Findings, Fleet, fleet_stage
from leadership import Leadership
from load import PARTITIONS
from proxy import Proxy, proxied_broker
from stages import set_up

DELIVERIES: tuple[Delivery, ...] = ("at-least-once", "exactly-once")

KILLS_OF_AN_EPISODE = 50
REWRITE_KILLS_OF_AN_EPISODE = 10
"""Every one is about 70 MB of payloads, which the ledger holds in memory, and the broker on its disk."""

EPISODE_SECONDS = 300.0
"""Long enough for a tendency of memory, short enough for its ledger to be held in memory itself."""

RATE = 500.0
"""Records a second, of all fleets of an episode."""

SMALL_HEAP = ("-Xmx256m",)
"""Of each of several nodes on one machine."""

SURVIVOR = 99
"""The place of the member to which nothing is done, in the mixed part."""

MUST_HAPPEN = {
    "operations": ("before", "after", "late", "killed", "taken for dead", "refused", "called off"),
    "key order": ("kills with work left", "operations finished above a gap at a kill", "objects deleted at last"),
    "kills": (
        "kills with work left",
        "kills of a member at work",
        "kills of a member starting",
        "sessions ended by hand",
        "rebalances with work in flight",
        "responses hidden in aborted transactions",
        "tombstones in storage",
        "records to be dead-lettered",
        "members with whole permits at the end",
    ),
    "storm": (
        "rebalances with work in flight",
        "kills with work left",
        "clean stops",
        "stops with work left",
        "records to be dead-lettered",
        "members with whole permits at the end",
    ),
    "mixed": (
        "rebalances with work in flight",
        "kills with work left",
        "clean stops",
        "members frozen",
        "releases: lost",
        "commits refused",
        "broker: stop",
        "broker: kill",
        "broker: freeze",
        "storage held",
        "storage found unavailable",
        "transactions given up",
        "members with a tendency of memory",
        "members with whole permits at the end",
        "releases: timeout",
        *(f"answers lost: {request}" for request in sorted({*chain(*chaos_plan.ANSWERED_REQUESTS.values())})),
        "output slow and work held back by nothing else",
    ),
    "leaders": (
        "broker: stop",
        "broker: kill",
        "broker: freeze",
        *(f"input leaders moved after: {outage} broker" for outage in ("stop", "kill", "freeze")),
        *(f"output leaders moved after: {outage} broker" for outage in ("stop", "kill", "freeze")),
        "group coordinators moved",
        "transaction coordinators moved",
        "clean stops",
        "members with a tendency of memory",
        "members with whole permits at the end",
    ),
}
"""What a part is about: without it, it has shown nothing."""


@dataclass
class Part:
    """One part of the soak."""

    name: str
    episodes: Sequence[Callable[[int], Plan]] = ()
    """How to draw the plan of each that a fleet plays."""
    partitions: int = PARTITIONS
    proxied: bool = False
    """Whether its members go through the proxy."""
    survivor: bool = False
    nodes: int = 1
    """Of the Apache Kafka it is played on; where there are several, it is watched who leads what."""
    together: bool = False
    """Whether each episode has a fleet of each delivery; else one, of the one and the other in turn."""
    happened: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def parts() -> Iterator[Part]:
    """What was asked for of fleets."""
    kills = int(os.environ.get("SOAK_KILLS") or 500)
    storm = float(os.environ.get("SOAK_STORM_MINUTES") or 20) * 60
    mixed = float(os.environ.get("SOAK_MINUTES") or 20) * 60
    leaders = float(os.environ.get("SOAK_LEADER_MINUTES") or 5) * 60
    if kills:
        sizes = divided(kills, KILLS_OF_AN_EPISODE)
        yield Part("kills", [partial(chaos_plan.kills, rounds=size) for size in sizes])
    if storm:
        yield Part("storm", [partial(chaos_plan.storm, seconds=each) for each in in_episodes(storm)], partitions=12)
    if mixed:
        plans = [
            partial(chaos_plan.mixed, seconds=each, delivery=delivery)
            for each, delivery in zip(in_episodes(mixed), cycle(DELIVERIES), strict=False)
        ]
        yield Part("mixed", plans, partitions=12, proxied=True, survivor=True)
    if leaders:
        plans = [partial(chaos_plan.leaders, seconds=each) for each in in_episodes(leaders, 1)]
        yield Part("leaders", plans, nodes=3, together=True)


def divided(kills: int, most: int) -> list[int]:
    """Divide *kills* into episodes of *most* at the most."""
    return [min(most, kills - done) for done in range(0, kills, most)]


def in_episodes(seconds: float, in_turn: int = len(DELIVERIES)) -> list[float]:
    """Divide *seconds* equally into episodes; where deliveries take turns, each has as many as the other."""
    number = in_turn * max(1, round(seconds / EPISODE_SECONDS / in_turn))
    return [seconds / number] * number


def play_operations(part: Part, seed: int) -> None:
    """Play the storage's model."""
    operations = int(os.environ.get("SOAK_OPERATIONS") or 10_000_000)
    say(f"\n==> operations: {operations} on a storage in memory")
    began = time.monotonic()
    try:
        part.happened.update(storage_model.soak(operations, seed))
    except Exception as error:  # noqa: BLE001 - whatever it was, the other parts can still tell something
        part.wrong.append(f"{error!r}, {', '.join(getattr(error, '__notes__', ()))}")
        say(f"WRONG: {type(error).__name__}: {error}")
    say(f"--- {time.monotonic() - began:.0f} s")


def play_key_order(part: Part, kills: int, seed: int, folder: Path) -> None:
    """Play all episodes of it."""
    place = folder / "broker-key-order"
    place.mkdir()
    with maven_broker(place) as broker:
        sizes = divided(kills, REWRITE_KILLS_OF_AN_EPISODE)
        for number, (size, delivery) in enumerate(zip(sizes, cycle(DELIVERIES), strict=False)):
            own = own_seed(seed, part, number)
            say(f"\n==> {part.name}, episode {number + 1} of {len(sizes)}, {delivery}, seed {own}, {size} kills")
            episode = folder / f"key-order-{number}"
            episode.mkdir()
            stage = set_up(broker, episode, PARTITIONS, PARTITIONS, delivery=delivery, **rewrites.SETTINGS)
            began = time.monotonic()
            try:
                findings = rewrites.play(stage, size, own, delivery)
            except Exception as error:  # noqa: BLE001 - whatever it was, the other episodes can still tell something
                part.wrong.append(f"episode {number + 1}: {error!r}")
                say(f"WRONG: {type(error).__name__}: {error}")
                continue
            finally:
                stage.put_down()
                for topic in (stage.ledger.input, stage.ledger.output):
                    broker.delete_topic(topic)
            say(f"--- {time.monotonic() - began:.0f} s")
            remember(part, number, episode, {delivery: findings})


def own_seed(seed: int, part: Part, number: int) -> int:
    """Return the seed of one episode."""
    return random.Random(f"{seed}/{part.name}/{number}").randrange(10**6)


def remember(part: Part, number: int, folder: Path, findings: Mapping[Delivery, Findings]) -> None:
    """Tell and keep what an episode has shown; the folder of one without fault is removed."""
    for delivery, found in findings.items():
        say(f"{delivery}\n{found.report()}")
        part.happened.update(found.happened)
        part.wrong += [f"episode {number + 1}, {delivery}: {text}" for text in found.wrong]
    if not any(found.wrong for found in findings.values()):
        shutil.rmtree(folder)


def play(part: Part, number: int, seed: int, broker: Broker, proxy: Proxy | None, folder: Path) -> None:
    """Play one episode and remember what it has shown."""
    through = proxy if part.proxied else None
    deliveries = DELIVERIES if part.together else DELIVERIES[number % 2 :][:1]
    say(f"\n==> {part.name}, episode {number + 1} of {len(part.episodes)}, {', '.join(deliveries)}, seed {seed}")
    stages = []
    for delivery in deliveries:
        own = folder / delivery
        own.mkdir(parents=True)
        settings: dict[str, Any] = {"kafka": {"bootstrap_servers": [f"127.0.0.1:{through.port}"]}} if through else {}
        # One attempt, so that a member hears of a storage that is held before it is stopped or killed in its turn.
        settings["retry"] = {"attempts": 1}
        stages.append(fleet_stage(broker, own, partitions=part.partitions, delivery=delivery, **settings))
    fleets = [Fleet(stage, rate=RATE / len(stages), proxy=through, say=say) for stage in stages]
    leadership = Leadership(broker, stages) if part.nodes > 1 else None
    began = time.monotonic()
    try:
        findings = played(part.episodes[number](seed), fleets, leadership, survivor=part.survivor)
    except Exception as error:  # noqa: BLE001 - whatever it was, the other episodes can still tell something
        part.wrong.append(f"episode {number + 1}: {error!r}")
        for fleet in fleets:
            part.happened.update(fleet.happened)
        say(f"WRONG: {type(error).__name__}: {error}")
        return
    finally:
        part.happened.update(leadership.moves if leadership else ())
        for stage in stages:
            stage.put_down()
        if through is not None:
            through.heal()
        for node in broker.nodes:
            node.bring_back()
    say(f"--- {time.monotonic() - began:.0f} s")
    remember(part, number, folder, dict(zip(deliveries, findings, strict=True)))


@contextmanager
def cluster(place: Path, nodes: int) -> Iterator[tuple[Broker, Proxy | None]]:
    """Run Apache Kafka of so many nodes; before one that is alone there is a proxy."""
    if nodes == 1:
        with proxied_broker(place) as both:
            yield both
    else:
        with maven_broker(place, RETURNS_QUICKLY, nodes=nodes, java_settings=SMALL_HEAP) as broker:
            yield broker, None


def played(plan: Plan, fleets: list[Fleet], leadership: Leadership | None, *, survivor: bool) -> list[Findings]:
    """Do *plan* to the first of *fleets*, beside which the others work; return what each of them has shown."""
    first, *others = fleets
    first.beside = others
    if survivor:
        first.start(SURVIVOR)
    for other in others:
        other.start(0)
        other.start(1)
        other.feed()
    if leadership is None:
        first.play(plan)
    else:
        with leadership:
            first.leadership = leadership
            first.play(plan)
    for fleet in fleets:
        fleet.settle()
    for other in others:
        other.share_outages(first)
    return [fleet.judge() for fleet in fleets]


def say(text: str) -> None:
    """Print at once: a soak is watched."""
    print(text, flush=True)  # noqa: T201 - a program, whose output this is


def main() -> int:
    """Play all parts; return the exit code."""
    seed = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10**6))
    say(f"SOAK_SEED={seed} repeats this")
    folder = Path(tempfile.mkdtemp(prefix="tierstream-soak-"))
    played: list[Part] = []
    if os.environ.get("SOAK_OPERATIONS") != "0":
        played.append(Part("operations"))
        play_operations(played[0], seed)
    rewritten = int(os.environ.get("SOAK_REWRITE_KILLS") or 100)
    if rewritten:
        played.append(Part("key order"))
        play_key_order(played[-1], rewritten, seed, folder)
    fleets = list(parts())
    played += fleets
    for nodes, asked in groupby(fleets, key=attrgetter("nodes")):
        place = folder / f"broker-{nodes}"
        place.mkdir()
        with cluster(place, nodes) as (broker, proxy):
            for part in asked:
                for number in range(len(part.episodes)):
                    play(part, number, own_seed(seed, part, number), broker, proxy, folder / f"{part.name}-{number}")
    wrong = [f"{part.name}, {text}" for part in played for text in part.wrong]
    for part in played:
        missing = [what for what in MUST_HAPPEN[part.name] if not part.happened[what]]
        wrong += [f"{part.name}: void, as this has not happened once: {what}" for what in missing]
        say(f"\n==> {part.name}: this really happened")
        for what, count in sorted(part.happened.items()):
            say(f"  {what}: {count}")
    if wrong:
        say("\n".join([f"\n==> WRONG, with SOAK_SEED={seed}; logs are in {folder}", *wrong]))
        return 1
    shutil.rmtree(folder)
    say(f"\n==> nothing was wrong, with SOAK_SEED={seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
