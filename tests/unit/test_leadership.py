"""The watch over a cluster's leaders counts each move once, believes no node that slept, and knows who coordinates."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

import ledger
from chaos_plan import Action
from fleet import Fleet
from group_history import OFFSETS_TOPIC
from leadership import TRANSACTIONS_TOPIC, Leadership, Led, Place, View, in_sync, parse_view, partition_of
from ledger import Reader
from protocol import Fields, ask, string

INPUT, OUTPUT = ("in", 0), ("out", 0)


def view(brokers: int = 3, **partitions: Led) -> View:
    """What a node says: ``input=Led(...)``, ``offsets=...``."""
    places: dict[str, Place] = {"input": INPUT, "output": OUTPUT}
    return View(brokers, {places[name]: led for name, led in partitions.items()})


def led(leader: int, epoch: int, in_sync: int = 3) -> Led:
    """A partition of three replicas."""
    return Led(leader, epoch, 3, in_sync)


@pytest.fixture
def watch() -> Leadership:
    """Over one stage with exactly-once delivery and two partitions; nobody is asked."""
    stage: Any = SimpleNamespace(
        group="g",
        config={"delivery": "exactly-once"},
        ledger=SimpleNamespace(input="in", output="out", partition_count=2),
    )
    broker: Any = SimpleNamespace(nodes=[])
    return Leadership(broker, [stage])


class TestMoves:
    """Counted once, whoever tells them."""

    def test_who_is_seen_first_has_not_moved(self, watch: Leadership) -> None:
        watch.note(view(input=led(1, 7), output=led(2, 0)))

        assert not watch.moves

    def test_a_move_is_counted_once_by_what_moved_and_after_what(self, watch: Leadership) -> None:
        watch.note(view(input=led(1, 0), output=led(1, 0)))
        watch.cause = "kill broker"
        for _ in range(3):
            watch.note(view(input=led(2, 1), output=led(1, 0)))

        assert watch.moves == {"input leaders moved": 1, "input leaders moved after: kill broker": 1}

    def test_a_node_that_tells_what_was_once_true_is_not_believed(self, watch: Leadership) -> None:
        """It was frozen, or has just come back."""
        watch.note(view(output=led(1, 4)))
        watch.note(view(output=led(2, 5)))
        watch.note(view(output=led(1, 4)))
        watch.note(view(output=led(2, 5)))

        assert watch.moves["output leaders moved"] == 1

    def test_a_leader_that_was_away_and_leads_again_has_not_moved(self, watch: Leadership) -> None:
        watch.note(view(input=led(1, 0)))
        watch.note(view(input=led(-1, 1)))
        watch.note(view(input=led(1, 2)))
        assert not watch.moves

        watch.note(view(input=led(-1, 3)))
        watch.note(view(input=led(3, 4)))
        assert watch.moves["input leaders moved"] == 1, "and from nobody to another it has"

    def test_topics_of_others_are_none_of_ours(self, watch: Leadership) -> None:
        for epoch in range(3):
            watch.note(View(3, {("theirs", 0): led(epoch, epoch)}))

        assert not watch.moves

    @pytest.mark.parametrize(
        ("topic", "what", "ours"),
        [
            (OFFSETS_TOPIC, "group coordinators moved", {partition_of("g", 50)}),
            (TRANSACTIONS_TOPIC, "transaction coordinators moved", {partition_of(f"g/in/{n}", 50) for n in range(2)}),
        ],
    )
    def test_a_coordinator_moves_with_the_one_partition_that_keeps_it(
        self, watch: Leadership, topic: str, what: str, ours: set[int]
    ) -> None:
        for epoch in range(2):
            watch.note(View(3, {(topic, partition): led(epoch, epoch) for partition in range(50)}))

        assert watch.moves == {what: len(ours), f"{what} after: nothing": len(ours)}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("hello", 99162322),
        ("", 0),
        ("polygenelubricants", 0),  # the smallest integer of all, which has no absolute value
        ("Hello World", 862545276),  # negative before its sign is taken away
    ],
)
def test_a_name_is_kept_where_java_says(name: str, code: int) -> None:
    """``Utils.abs(name.hashCode()) % partitions``."""
    assert partition_of(name, 1 << 31) == code
    assert partition_of(name, 50) == code % 50


class TestInSync:
    """Everything is back when all nodes say so, and all the same."""

    WHOLE = view(input=led(1, 3), output=led(2, 5))

    def test_all_agree(self) -> None:
        assert in_sync([self.WHOLE] * 3)

    @pytest.mark.parametrize(
        "other",
        [
            pytest.param(None, id="one says nothing"),
            pytest.param(view(2, input=led(1, 3), output=led(2, 5)), id="one misses a node"),
            pytest.param(view(input=led(1, 3, in_sync=2), output=led(2, 5)), id="a replica is behind"),
            pytest.param(view(input=led(-1, 3), output=led(2, 5)), id="a partition is led by nobody"),
            pytest.param(view(input=led(3, 2), output=led(2, 5)), id="one tells what was once true"),
            pytest.param(view(input=led(1, 3)), id="one does not know a topic yet"),
        ],
    )
    @pytest.mark.parametrize("place", range(3))
    def test_one_that_says_otherwise_is_enough(self, other: View | None, place: int) -> None:
        views: list[View | None] = [self.WHOLE] * 3
        views[place] = other

        assert not in_sync(views)


def test_a_view_is_read_as_kafka_writes_it() -> None:
    """`MetadataResponse.json`, version 7."""
    nodes = b"".join(struct.pack(">i", n) + string("127.0.0.1") + struct.pack(">ih", 9000 + n, -1) for n in (1, 2))
    first = struct.pack(">hiii", 0, 0, 2, 9) + struct.pack(">4i", 3, 1, 2, 3) + struct.pack(">3i", 2, 1, 2)
    first += struct.pack(">2i", 1, 3)
    second = struct.pack(">hiii", 5, 1, -1, 4) + struct.pack(">iii", 0, 0, 0)
    topic = struct.pack(">h", 0) + string("in") + b"\x00" + struct.pack(">i", 2) + first + second
    answer = struct.pack(">ii", 0, 2) + nodes + string("cluster") + struct.pack(">ii", 1, 1) + topic

    assert parse_view(Fields(answer)) == View(2, {("in", 0): Led(2, 9, 3, 2), ("in", 1): Led(-1, 4, 0, 0)})


class TestAsking:
    """One request to one node, whatever it does with it."""

    def test_the_answer_is_what_follows_its_number(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            heard = answering(server, struct.pack(">iih", 6, 0, 42))
            answer = ask(f"127.0.0.1:{server.getsockname()[1]}", 3, 7, b"all", seconds=10)

        assert answer.number("h") == 42
        assert heard() == struct.pack(">hhi", 3, 7, 0) + string("ledger") + b"all"

    @pytest.mark.parametrize("said", [b"", b"\x00\x00", struct.pack(">i", 6), struct.pack(">ii", 6, 0)])
    def test_one_that_goes_away_within_its_answer_is_not_there(self, said: bytes) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            answering(server, said)
            with pytest.raises(OSError, match="went away"):
                ask(f"127.0.0.1:{server.getsockname()[1]}", 3, 7, b"", seconds=10)

    def test_one_that_is_frozen_is_waited_for_as_long_as_said(self) -> None:
        """The system accepts the connection for it."""
        with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(TimeoutError):
            ask(f"127.0.0.1:{server.getsockname()[1]}", 3, 7, b"", seconds=0.1)


def answering(server: socket.socket, said: bytes) -> Callable[[], bytes]:
    """Read one request, say *said* and hang up, in a thread; return what waits for it and tells the request."""
    heard = []

    def answer() -> None:
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as stream:
            heard.append(stream.read(struct.unpack(">i", stream.read(4))[0]))
            connection.sendall(said)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()

    def wait() -> bytes:
        thread.join(10)
        return heard[0]

    return wait


class MovedClient:
    """A reader's client that believes in an old leader until it is asked expressly for metadata."""

    def __init__(self, code: int, *, learns: bool = True) -> None:
        self.code = code
        self.learns = learns

    def get_watermark_offsets(self, place: Any, timeout: float) -> tuple[int, int]:
        if self.code:
            raise KafkaException(KafkaError(self.code))
        return 0, 7

    def list_topics(self, topic: str, timeout: float) -> None:
        self.code = 0 if self.learns else self.code


class Nodes:
    """Of a broker, on which it is only noted what is done to them."""

    def __init__(self, count: int) -> None:
        self.done: list[str] = []
        self.nodes = [self.node(number) for number in range(count)]

    def node(self, number: int) -> Any:
        """One of them."""
        verbs = ("start", "stop", "kill", "freeze", "thaw")
        return SimpleNamespace(**{verb: partial(self.done.append, f"{verb} {number}") for verb in verbs})


@pytest.mark.parametrize(("there", "back"), [("stop", "start"), ("kill", "start"), ("freeze", "thaw")])
@pytest.mark.parametrize("alone", [True, False])
def test_a_node_that_is_away_excuses_silence_only_where_it_is_the_only_one(there: str, back: str, alone: bool) -> None:
    """I10; either way work may be repeated after it (I6)."""
    broker = Nodes(1 if alone else 3)
    config = {"commit": {"interval": "200ms"}}
    stage: Any = SimpleNamespace(broker=broker, ledger=SimpleNamespace(partition_count=4), config=config)
    fleet = Fleet(stage)
    place = -1 if alone else 2

    fleet._alone_at = 0  # as if it had members
    fleet._carry_out(Action(f"{there} broker", place))  # type: ignore[arg-type]
    assert len(fleet._current_outages()) == alone
    fleet._carry_out(Action(f"{back} broker", place))  # type: ignore[arg-type]

    assert broker.done == [f"{there} {max(0, place)}", f"{back} {max(0, place)}"]
    assert len(fleet._current_outages()) == alone
    assert [fault.windows for fault in fleet.faults] == [1, 2 if back == "thaw" else 1]
    assert fleet.happened[f"broker: {there}"] == 1


class TestEnds:
    """A reader learns where a partition ends after its leader has moved."""

    @staticmethod
    def end_of(client: MovedClient) -> int:
        reader = Reader.__new__(Reader)
        reader.topic = "out"
        reader._consumer = client  # type: ignore[assignment]
        return reader._end(0)

    def test_it_asks_for_the_new_leader(self) -> None:
        assert self.end_of(MovedClient(KafkaError.NOT_LEADER_FOR_PARTITION)) == 7

    def test_not_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger, "LEADER_SECONDS", 0.0)

        with pytest.raises(KafkaException, match="Not leader"):
            self.end_of(MovedClient(KafkaError.NOT_LEADER_FOR_PARTITION, learns=False))

    def test_what_is_wrong_otherwise_is_told_at_once(self) -> None:
        with pytest.raises(KafkaException, match="authorization"):
            self.end_of(MovedClient(KafkaError.TOPIC_AUTHORIZATION_FAILED))
