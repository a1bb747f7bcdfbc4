"""What will be done to a fleet of members, drawn from a seed before anything is started (pure).

A plan is a list of actions in their order. An action takes place when, counted from the one before it, its time has
passed and its number of responses has come out: so a slow machine plays the same plan, only more slowly. What begins
also ends within the plan: who is frozen thaws, a broker comes back. The same seed gives the same plan.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, TypeAlias, TypeVar

Kind: TypeAlias = Literal[
    "start",  # a member
    "open",  # wait until the member has begun to read
    "kill",  # SIGKILL
    "bury",  # end the session of a killed member at once, instead of waiting for it to run out
    "stop",  # SIGTERM; the next action does not wait for the end
    "freeze",  # SIGSTOP
    "thaw",  # SIGCONT
    "stop broker",
    "kill broker",
    "freeze broker",
    "start broker",
    "thaw broker",
    "sync brokers",  # wait until all nodes of a cluster have everything in sync
    "hold storage",  # somebody else keeps the write lock of the storage's file
    "release storage",
    "lose answer",  # to the next request of one kind, which the broker carries out
    "slow output",
    "quick output",
]

Delivery: TypeAlias = Literal["at-least-once", "exactly-once"]

ANSWERED_REQUESTS: dict[Delivery, tuple[str, ...]] = {
    "at-least-once": ("Produce", "OffsetCommit"),
    "exactly-once": ("Produce", "TxnOffsetCommit", "EndTxn"),
}
"""What a member of each kind asks for that is done once it is asked, whether it hears so or not; by Kafka's names."""

FROZEN_SECONDS = (8.0, 14.0)
"""Beyond the session time-out of the members, 6 s, so that their partitions are taken over meanwhile."""

BURST = 960
"""More than is answered while it is put in: twice the windows of four partitions, and more."""

BROKER_DOWN_SECONDS = (0.0, 6.0)
BROKER_FROZEN_SECONDS = (5.0, 30.0)
NODE_DOWN_SECONDS = (0.0, 8.0)
NODE_FROZEN_SECONDS = (5.0, 15.0)
"""Beyond the session time-out of the nodes, 3 s, so that another one leads what this one has led."""

NODE_ROUND_SECONDS = 18.0
"""How long one fault of one node takes, with what comes before and after it: to make a plan about as long as asked."""

STORAGE_HELD_SECONDS = (24.0, 30.0)
"""Longer than the service's three attempts, of 5 s each, before it says that storage is unavailable, also where they
begin late: a plan goes on to stop and to kill members meanwhile. And longer than a drain may take, 10 s, after somebody
has come or gone next, within 6 s, and is missed after another 6 s: such a drain runs into its deadline."""

REST_SECONDS = 20.0
"""From the end of an outage to the next of its kind: some time to work in."""


OUTPUT_SLOW_SECONDS = (8.0, 16.0)
"""Around the 10 s that a drain may take."""


@dataclass(frozen=True)
class Action:
    """One thing that is done."""

    kind: Kind
    member: int = -1
    """Which place of the fleet, or which node of a cluster; -1 where it is about neither."""
    wait: float = 0.0
    """Seconds after the action before, at the earliest."""
    answers: int = 0
    """Responses after the action before, at the earliest."""
    burst: int = 0
    """Records put in at once just before, so that there is something to do."""
    request: str = ""
    """The kind whose answer is lost."""

    def __str__(self) -> str:
        """As it stands in a printed timeline."""
        if self.request:
            return f"{self.kind} to {self.request}"
        return self.kind if self.member < 0 else f"{self.kind} {self.member}"


Plan: TypeAlias = list[Action]


def kills(seed: int, rounds: int, *, records: int = 0, unburied: float = 0.1) -> Plan:
    """One member, killed and started again *rounds* times.

    Most die while they work, after some number of responses, three in four of them with a burst just put in; one in
    five at some moment of its start. A share of *unburied* leaves the broker to find out by itself. At least *records*
    are answered before the last kill: the kills then lie further apart.
    """
    chance = random.Random(seed)
    plan = []
    for number in range(rounds):
        plan.append(Action("start", 0))
        early = number % 5 == 4
        plan.append(
            Action("kill", 0, wait=chance.uniform(0.05, 1.5))
            if early
            else Action(
                "kill",
                0,
                answers=chance.randint(1, 1_500),
                wait=chance.uniform(0.0, 0.3),
                burst=chance.choice([0, BURST, BURST, BURST]),
            )
        )
        if chance.random() >= unburied:
            plan.append(Action("bury", 0, wait=chance.choice([0.0, 0.2])))
    answers = sum(action.answers for action in plan)
    if answers < records:
        plan = [replace(action, answers=ceil(action.answers * records / answers)) for action in plan]
    return [*plan, Action("start", 0)]


def stops(seed: int, rounds: int) -> Plan:
    """SIGTERM *rounds* times, under load: every other time the successor is there before, as in a rolling update."""
    chance = random.Random(seed)
    plan = [Action("start", 0)]
    here = 0
    for number in range(rounds):
        stop = Action("stop", here, answers=chance.randint(50, 800), wait=chance.uniform(0.0, 0.3), burst=BURST)
        plan.append(Action("open", here))
        if number % 2:
            here = 1 - here
            plan += [Action("start", here), replace(stop, wait=chance.uniform(0.0, 2.0))]
        else:
            plan += [stop, Action("start", here)]
    return plan


def brokers(seed: int, *, frozen_seconds: float = 30.0) -> Plan:
    """Five restarts of the broker under two members: clean, by SIGKILL, and one SIGSTOP as long as a request waits."""
    chance = random.Random(seed)
    outages: list[Kind] = ["stop broker", "kill broker", "freeze broker", "kill broker", "stop broker"]
    chance.shuffle(outages)
    plan = [Action("start", 0), Action("start", 1)]
    for outage in outages:
        plan.append(Action(outage, answers=chance.randint(200, 1_500)))
        if outage == "freeze broker":
            plan.append(Action("thaw broker", wait=frozen_seconds))
        else:
            plan.append(Action("start broker", wait=chance.uniform(*BROKER_DOWN_SECONDS)))
    return plan


def leaders(seed: int, seconds: float, *, nodes: int = 3) -> Plan:
    """One node of a cluster after another, never two at a time, stopped, killed or frozen under two members.

    In every nine rounds each node meets each of the three. Something is in flight when it does, and everything is in
    sync again before the next.
    """
    chance = random.Random(seed)
    outages: list[Kind] = ["stop broker", "kill broker", "freeze broker"]
    faults = _dealt(chance, [(outage, node) for outage in outages for node in range(nodes)])
    plan = [Action("start", 0), Action("start", 1), Action("open", 0)]
    for _ in range(max(len(outages), round(seconds / NODE_ROUND_SECONDS))):
        outage, node = next(faults)
        plan.append(Action(outage, node, answers=chance.randint(200, 1_500), burst=BURST))
        if outage == "freeze broker":
            plan.append(Action("thaw broker", node, wait=chance.uniform(*NODE_FROZEN_SECONDS)))
        else:
            plan.append(Action("start broker", node, wait=chance.uniform(*NODE_DOWN_SECONDS)))
        plan.append(Action("sync brokers"))
    return plan


def storm(seed: int, seconds: float, *, members: int = 5) -> Plan:
    """Members join, leave and are killed every 0.5 to 3 s; there is always one, and never more than *members*."""
    return _timed(_storm(random.Random(seed), seconds, members), seconds)


def mixed(seed: int, seconds: float, *, members: int = 4, delivery: Delivery = "at-least-once") -> Plan:
    """Everything at once.

    The storm, frozen members, brokers that go and come, a storage nobody can write to while members come and go, lost
    answers to what members of this *delivery* ask for, and output that is slow.
    """
    return _timed(_mixed(random.Random(seed), seconds, members, ANSWERED_REQUESTS[delivery]), seconds)


Timed: TypeAlias = Iterator[tuple[float, Action]]


def _storm(chance: random.Random, seconds: float, members: int) -> Timed:
    alive = {0}
    now = 0.0
    yield now, Action("start", 0)
    while (now := now + chance.uniform(0.5, 3.0)) < seconds:
        kind = _next_kind(chance, len(alive), members)
        if kind == "start":
            who = chance.choice(sorted(set(range(members)) - alive))
            alive.add(who)
        else:
            who = chance.choice(sorted(alive))
            alive.remove(who)
        yield now, Action(kind, who)
        if kind == "kill" and chance.random() < 0.7:
            yield now + 0.1, Action("bury", who)


def _next_kind(chance: random.Random, alive: int, members: int) -> Literal["start", "stop", "kill"]:
    if alive <= 1:
        return "start"
    if alive < members and chance.random() < 0.45:
        return "start"
    return "stop" if chance.random() < 0.5 else "kill"


def _mixed(chance: random.Random, seconds: float, members: int, requests: tuple[str, ...]) -> Timed:
    alive, frozen = {0, 1}, dict.fromkeys(range(members), 0.0)
    broker_back = broker_works = storage_back = output_back = 0.0
    rebalance_due = False
    whats = _dealt(chance, [*["members"] * 12, "freeze", "freeze", "broker", "storage", "answer", "answer", "output"])
    asked = _dealt(chance, list(requests))
    outages = _dealt(chance, list[Kind](["stop broker", "kill broker", "freeze broker"]))
    now = 0.0
    yield now, Action("start", 0)
    yield now, Action("start", 1)
    while (now := now + chance.uniform(0.5, 6.0)) < seconds:
        active = sorted(who for who in alive if frozen[who] < now)
        what = "members" if rebalance_due else next(whats)
        if what == "freeze" and len(active) > 1:
            who = chance.choice(active)
            frozen[who] = now + chance.uniform(*FROZEN_SECONDS)
            yield now, Action("freeze", who)
            yield frozen[who], Action("thaw", who)
        elif what == "broker" and broker_back < now:
            kind = next(outages)
            back: Kind = "thaw broker" if kind == "freeze broker" else "start broker"
            lasts = BROKER_FROZEN_SECONDS if kind == "freeze broker" else BROKER_DOWN_SECONDS
            end = now + chance.uniform(*lasts)
            broker_works, broker_back = end, end + REST_SECONDS
            yield now, Action(kind)
            yield end, Action(back)
        elif what == "storage" and max(storage_back, broker_works) < now:
            end = now + chance.uniform(*STORAGE_HELD_SECONDS)
            storage_back = end + REST_SECONDS
            rebalance_due = True
            yield now, Action("hold storage")
            yield end, Action("release storage")
        elif what == "answer":
            yield now, Action("lose answer", request=next(asked))
        elif what == "output" and output_back < now:
            end = now + chance.uniform(*OUTPUT_SLOW_SECONDS)
            output_back = end + REST_SECONDS
            yield now, Action("slow output", burst=BURST)
            yield end, Action("quick output")
        else:
            asleep = alive - set(active)
            kind = _next_kind(chance, len(active), members - len(asleep))
            if kind == "start":
                absent = sorted(set(range(members)) - alive)
                if not absent:
                    continue
                who = chance.choice(absent)
                alive.add(who)
            else:
                who = chance.choice(active)
                alive.remove(who)
            rebalance_due = False
            yield now, Action(kind, who)
            if kind == "kill" and chance.random() < 0.5:
                yield now + 0.1, Action("bury", who)


T = TypeVar("T")


def _dealt(chance: random.Random, cards: list[T]) -> Iterator[T]:
    """One card after another, and shuffled again when all are dealt: at random, and yet none comes too seldom."""
    while True:
        chance.shuffle(cards)
        yield from cards


def _timed(drawn: Timed, seconds: float) -> Plan:
    """Put actions in the order of their times, and turn times into waits; what would end too late ends at the end."""
    ordered: list[tuple[float, int, Action]] = []
    for number, (at, action) in enumerate(drawn):
        heapq.heappush(ordered, (min(at, seconds), number, action))
    plan: Plan = []
    now = 0.0
    while ordered:
        at, _, action = heapq.heappop(ordered)
        plan.append(replace(action, wait=round(at - now, 3)))
        now = at
    return plan
