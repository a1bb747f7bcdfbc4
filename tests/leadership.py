"""Who leads what in a cluster of Kafka brokers, watched while brokers go and come: every move, counted once.

Each node is asked for its own view (`Metadata`), several times a second, by a thread. A node that was frozen, or that
has just come back, tells what was once true; so what counts is the leader with the highest epoch that anybody has told.
A coordinator is the leader of one partition of an internal topic: that of a group of ``__consumer_offsets``, that of a
transactional id of ``__transaction_state``, chosen by Java's hash of the name (`partition_of`).

Everything is in sync when all nodes answer and agree that it is (`Leadership.look`).
"""

from __future__ import annotations

import struct
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from brokers import Broker
from group_history import OFFSETS_TOPIC
from protocol import Fields, ask
from stages import Stage

METADATA = 3
METADATA_VERSION = 7
"""The first with leader epochs; every Kafka since 2.1 has it, 4 too."""

ANSWER_SECONDS = 1.0
"""A node that is frozen accepts a connection and says nothing."""

PAUSE_SECONDS = 0.2

TRANSACTIONS_TOPIC = "__transaction_state"

COORDINATORS = {OFFSETS_TOPIC: "group coordinators moved", TRANSACTIONS_TOPIC: "transaction coordinators moved"}

Place = tuple[str, int]
"""Topic and partition."""


@dataclass(frozen=True)
class Led:
    """What a node says of a partition."""

    leader: int
    """-1: nobody."""
    epoch: int
    replicas: int
    in_sync: int


@dataclass(frozen=True)
class View:
    """What a node says of its cluster."""

    brokers: int
    partitions: Mapping[Place, Led]


def parse_view(answer: Fields) -> View:
    """Read an answer to `Metadata` in `METADATA_VERSION`."""
    answer.number("i")  # throttle time
    brokers = answer.number("i")
    for _ in range(brokers):
        answer.number("i")  # id
        answer.string()  # host
        answer.number("i")  # port
        answer.string()  # rack
    answer.string()  # cluster id
    answer.number("i")  # controller
    partitions = {}
    for _ in range(answer.number("i")):
        answer.number("h")  # error
        topic = answer.string()
        answer.number("b")  # internal
        for _ in range(answer.number("i")):
            answer.number("h")  # error
            place = topic, answer.number("i")
            leader, epoch = answer.number("i"), answer.number("i")
            replicas, in_sync = answer.numbers(), answer.numbers()
            answer.numbers()  # offline
            partitions[place] = Led(leader, epoch, len(replicas), len(in_sync))
    return View(brokers, partitions)


def in_sync(views: Sequence[View | None]) -> bool:
    """Whether every node answers, and all tell the same leaders, with all nodes and all replicas at work."""
    first = views[0]
    return first is not None and all(
        view is not None
        and view.brokers == len(views)
        and {place: led.epoch for place, led in view.partitions.items()}
        == {place: led.epoch for place, led in first.partitions.items()}
        and all(led.leader >= 0 and led.in_sync == led.replicas for led in view.partitions.values())
        for view in views
    )


def partition_of(name: str, partitions: int) -> int:
    """Which partition of an internal topic keeps a group or a transactional id: by ``String.hashCode()``."""
    value = 0
    for character in name.encode("ascii"):
        value = (31 * value + character) & 0xFFFFFFFF
    signed = value - (1 << 32) if value >> 31 else value
    return 0 if signed == -(1 << 31) else abs(signed) % partitions


class Leadership:
    """Watches who leads the topics of some stages, and who coordinates their groups and transactions."""

    def __init__(self, broker: Broker, stages: Iterable[Stage]) -> None:
        self.moves: Counter[str] = Counter()
        """How often each kind of leadership has gone from one node to another: in all, and after each `cause`."""
        self.cause = "nothing"
        """What was last done to a node."""
        self._nodes = [node.bootstrap for node in broker.nodes]
        self._known: dict[Place, Led] = {}
        self._topics: dict[str, str] = {}
        self._coordinated: dict[str, list[str]] = {OFFSETS_TOPIC: [], TRANSACTIONS_TOPIC: []}
        for stage in stages:
            topic = stage.ledger.input
            self._topics |= {topic: "input leaders moved", stage.ledger.output: "output leaders moved"}
            self._coordinated[OFFSETS_TOPIC].append(stage.group)
            if stage.config.get("delivery") == "exactly-once":
                self._coordinated[TRANSACTIONS_TOPIC] += [
                    f"{stage.group}/{topic}/{partition}" for partition in range(stage.ledger.partition_count)
                ]
        self._ended = threading.Event()
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="leadership", daemon=True)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the watch does not end"

    def look(self) -> bool:
        """Ask all nodes now, note what has moved, and tell whether all of them say that everything is in sync."""
        with self._looking:
            views = [_view(node) for node in self._nodes]
            for view in views:
                if view is not None:
                    self.note(view)
        return in_sync(views)

    def note(self, view: View) -> None:
        """Count the moves that *view* is the first to tell."""
        counts = Counter(topic for topic, _ in view.partitions)
        kept = {
            (topic, partition_of(name, counts[topic])): what
            for topic, what in COORDINATORS.items()
            for name in self._coordinated[topic]
            if counts[topic]
        }
        for place, led in view.partitions.items():
            known = self._known.get(place)
            if led.leader < 0 or (known is not None and led.epoch <= known.epoch):
                continue
            self._known[place] = led
            what = self._topics.get(place[0]) or kept.get(place)
            if what and known is not None and known.leader != led.leader:
                self.moves[what] += 1
                self.moves[f"{what} after: {self.cause}"] += 1

    @property
    def leaders(self) -> dict[Place, int]:
        """Who leads what, by all that was told so far."""
        return {place: led.leader for place, led in self._known.copy().items()}

    def _watch(self) -> None:
        while not self._ended.wait(PAUSE_SECONDS):
            self.look()


def _view(node: str) -> View | None:
    """What a node says now; None where it says nothing."""
    everything = struct.pack(">i?", -1, False)  # all topics, none is to be created
    try:
        return parse_view(ask(node, METADATA, METADATA_VERSION, everything, seconds=ANSWER_SECONDS))
    except OSError:
        return None
