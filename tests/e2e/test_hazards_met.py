"""What the Kafka client does that could lose, repeat or hang, done to the running service on a real broker.

`test_hazards.py` shows each hazard on the client alone, and its table says where all of them are. Here the service is
brought to the ones whose provoking fault lies outside the client: in a batch, a broker, a topic or another member.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from confluent_kafka.admin import NewPartitions  # type: ignore[attr-defined]  # documented, and not in __all__
from confluent_kafka.cimpl import NewTopic

from brokers import RETURNS_QUICKLY, Broker, apache_source, maven_broker, unused_port, wait_until
from consumer.config import load
from consumer.kafka.connection import consumer_settings
from consumer.kafka.topics import LATEST, Cluster
from leadership import TRANSACTIONS_TOPIC, Leadership, partition_of
from ledger import Entry
from load import Load, ends
from proxy import Proxy
from raw_batches import bomb, send_batch
from sabotage import sabotage
from service_process import ServiceProcess
from stages import RESPONSE_BYTES, SetStage, Stage

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.apache]

MIB = 1024 * 1024


# ---------------------------------------------------------------------------------------------------- fetching


MANY = 60
"""Batches within the limit: together nearly seven times it."""


def sent_raw(stage: Stage, made: bytes) -> Entry:
    """Produce a batch of one record of which nothing can be made, and enter it."""
    ledger = stage.ledger
    offset = asyncio.run(send_batch(stage.broker, ledger.input, 0, made))
    entry = Entry(ledger.input, 0, offset, None, None, [], None, "unknown", frozenset({400, 413}))
    ledger.entries[entry.id] = entry
    return entry


def test_batches_that_expand_to_gigabytes_are_answered_and_hold_up_nobody(apache: Broker, set_stage: SetStage) -> None:
    """H9: 8 KB each, a quarter of a gigabyte expanded; then many that are within the limit, but not together.

    All of it is there when the service starts, in one fetch. One answer and one dead letter for each, in its place;
    records around them are answered as ever, the neighbour's too; memory stays within a few times the limit of one.
    """
    stage = set_stage(apache, limits={"response_bytes": RESPONSE_BYTES, "in_flight_bytes": "64MiB"})
    ledger = stage.ledger
    put(stage, "before", 2)
    bombs = [sent_raw(stage, made) for made in [bomb(256 * MIB)] * 4]
    put(stage, "between", 2)
    many = [sent_raw(stage, made) for made in [bomb(7 * MIB)] * MANY]
    put(stage, "after", 2)
    put(stage, "elsewhere", 20, partition=1)
    service = stage.start(partitions=2)
    ledger.wait_answered(seconds=90)
    letters = [ledger.wait_dead_letter(entry) for entry in bombs]
    service.wait(lambda: ledger.committed(stage.group) == ends(ledger), "all of it to be committed")
    at_most = service.memory_peak()
    service.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert {ledger.answers[entry.id][0].code for entry in bombs} == {"payload_too_large"}
    assert {ledger.answers[entry.id][0].code for entry in many} == {"unknown_schema"}
    assert {(letter.value, letter.header("tierstream-dlq-truncated")) for letter in letters} == {(None, "true")}
    print(f"memory {at_most / MIB:.0f} MiB at most")
    assert at_most < 350 * MIB


# ---------------------------------------------------------------------------------------------------- transactions

JOIN_GROUP, WRITE_TXN_MARKERS = 11, 27
"""Kinds of request; by the last one the coordinator of a transaction has its decision written everywhere."""

SHORT_SESSION = {"session_timeout": "2s", "heartbeat_interval": "500ms"}
"""A killed member is missed soon."""

HELD = 0.001
"""Bytes a second: nothing of a request comes through before the proxy is quick again."""


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Broker, Proxy]]:
    """Apache Kafka whose broker goes through a proxy to itself; its clients may, or reach it directly."""
    if apache_source() != "maven":
        pytest.skip("needs an Apache Kafka with settings of its own: java and mvn")
    port = unused_port()
    settings = {
        "inter.broker.listener.name": "PROXIED",
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": "500",
        "group.min.session.timeout.ms": "1000",
    }
    folder = tmp_path_factory.mktemp("marked")
    with closing(Proxy(port)) as proxy, maven_broker(folder, settings, proxied=(port, proxy.port)) as broker:
        yield broker, proxy


@contextmanager
def held(proxy: Proxy, kind: int) -> Iterator[None]:
    """Keep back requests of this kind."""
    proxy.slow(kind, HELD)
    try:
        yield
    finally:
        proxy.quick()


def put(stage: Stage, name: str, number: int, *, partition: int = 0) -> list[Entry]:
    """Produce so many inserts to a partition; the broker has them."""
    sent = [
        stage.ledger.operate("insert", f"{name}/{count}", b"x", statuses={201}, partition=partition, wait=False)
        for count in range(number)
    ]
    stage.ledger.flush()
    return [entry for (entry,) in sent]


def each_has_one_response(stage: Stage) -> None:
    """I1-I3, and everything is committed; after a clean end."""
    stage.ledger.read_all()
    verdict = stage.ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert stage.ledger.committed(stage.group) == ends(stage.ledger)


def cluster_of(broker: Broker) -> Cluster:
    """For questions."""
    return Cluster(load(None, {}, {"kafka.bootstrap_servers": broker.bootstrap}))


async def state_of(broker: Broker, transactional_id: str) -> str:
    """What the coordinator says of a transaction."""
    async with cluster_of(broker) as cluster:
        state = await cluster.transaction(transactional_id)
    assert state is not None
    return state.name


async def hidden(broker: Broker, topic: str) -> int:
    """How many offsets of partition 0 an open transaction hides from readers of committed records."""
    async with cluster_of(broker) as cluster:
        (end,) = (await cluster.offsets([(topic, 0)], LATEST)).values()
        (stable,) = (await cluster.offsets([(topic, 0)], LATEST, committed_only=True)).values()
    return end - stable


def test_a_commit_whose_markers_are_not_written_is_waited_for(
    marked: tuple[Broker, Proxy], set_stage: SetStage
) -> None:
    """H22: decided, and told to nobody when its owner is killed; who reads the offsets then begins too early.

    The next owner has the partition, and neither opens it nor counts as ready before the markers are there.
    """
    broker, proxy = marked
    stage = set_stage(broker, partitions=1, delivery="exactly-once", kafka=SHORT_SESSION)
    ledger, place = stage.ledger, (stage.ledger.input, 0)
    first = stage.start(partitions=1, name="first")
    ledger.wait_answered(put(stage, "before", 50))
    asked = proxy.asked[WRITE_TXN_MARKERS]
    with held(proxy, WRITE_TXN_MARKERS):
        put(stage, "during", 200)
        wait_until(lambda: proxy.asked[WRITE_TXN_MARKERS] > asked, 30, "a transaction to be decided")
        first.kill()
        assert asyncio.run(state_of(broker, f"{stage.group}/{ledger.input}/0")) == "PrepareCommit"
        second = stage.start(ready=False, name="second")
        second.wait(lambda: place in second.partitions(), "the next owner to have the partition")
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert second.partitions()[place]["committed"] is None, "it has read offsets that are not settled"
            assert not second.ready
            time.sleep(0.1)
        ledger.read_all()
        assert ledger.answered() == 50
    second.wait_ready(1)
    ledger.wait_answered()
    second.stop()

    each_has_one_response(stage)


DIES_BEFORE_A_COMMIT = """
import os, signal

import aiokafka

commit = aiokafka.AIOKafkaProducer.commit_transaction


async def commit_or_die(producer):
    if os.path.exists("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    await commit(producer)


aiokafka.AIOKafkaProducer.commit_transaction = commit_or_die
"""


@pytest.mark.parametrize(("timeout", "next_owner"), [("2s", False), ("2m", True)], ids=["nobody comes", "next owner"])
def test_what_a_killed_owner_has_left_open_hides_nothing_for_long(
    marked: tuple[Broker, Proxy], set_stage: SetStage, timeout: str, next_owner: bool
) -> None:
    """H25: readers of committed records stand before it; until its time-out, or until the partition is taken over."""
    broker, _ = marked
    stage = set_stage(
        broker, partitions=1, delivery="exactly-once", kafka={"transaction_timeout": timeout} | SHORT_SESSION
    )
    service = stage.start(partitions=1, environment=sabotage(stage.folder, DIES_BEFORE_A_COMMIT))
    stage.ledger.wait_answered(put(stage, "before", 20))
    (stage.folder / "die").touch()
    put(stage, "during", 20)
    assert service.wait_exit() == 128 + 9
    (stage.folder / "die").unlink()
    assert asyncio.run(hidden(broker, stage.ledger.output)) > 0, "void: nothing was left open"

    if next_owner:
        stage.start(partitions=1)
    wait_until(lambda: asyncio.run(hidden(broker, stage.ledger.output)) == 0, 20, "readers to go on", every=0.5)

    if not next_owner:
        stage.start(partitions=1)
    stage.ledger.wait_answered()
    stage.processes[-1].stop()
    each_has_one_response(stage)


async def fence(broker: Broker, transactional_id: str) -> None:
    """Start another producer of the same id, which makes an older one useless for good."""
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap, transactional_id=transactional_id)
    await producer.start()
    await producer.stop()


def test_a_producer_that_was_made_useless_is_replaced(apache: Broker, set_stage: SetStage) -> None:
    """H26: fenced by a stranger, between transactions and in the middle of a load; the same process goes on."""
    stage = set_stage(apache, partitions=1, delivery="exactly-once")
    ledger, transactional_id = stage.ledger, f"{stage.group}/{stage.ledger.input}/0"
    service = stage.start(partitions=1)
    ledger.wait_answered(put(stage, "before", 20))

    for number in range(2):
        if number:
            put(stage, f"load/{number}", 500)
        asyncio.run(fence(apache, transactional_id))
        put(stage, f"after/{number}", 20)
        ledger.wait_answered(seconds=60)

    failed = [line for line in service.log_lines() if line.get("event") == "transaction failed"]
    service.stop()
    each_has_one_response(stage)
    assert failed, "void: no producer was fenced"
    assert len(stage.processes) == 1


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Apache Kafka of three nodes."""
    if apache_source() != "maven":
        pytest.skip("needs several nodes of Apache Kafka: java and mvn")
    with maven_broker(tmp_path_factory.mktemp("three"), RETURNS_QUICKLY, nodes=3) as broker:
        yield broker


@pytest.mark.timeout(240)
def test_coordinators_that_move_and_a_broker_that_says_nothing_hold_nobody_up(
    three: Broker, set_stage: SetStage
) -> None:
    """H24, H30: the coordinator of a partition's transactions is frozen under load, and another node takes over.

    A frozen broker takes connections and says nothing; whoever waits for it holds up no other one. Answers come while
    it is away, and the process goes on.
    """
    stage = set_stage(
        three,
        partitions=3,
        delivery="exactly-once",
        kafka={"request_timeout": "12s"},
        rebalance={"timeout": "6s", "drain_timeout": "1s"},
    )
    ledger = stage.ledger
    service = stage.start(partitions=3)
    work = Load(ledger, batch=12)
    moved = "transaction coordinators moved"
    with Leadership(three, [stage]) as leadership:
        wait_until(leadership.look, 60, "everything to be in sync", every=0.2)
        work.pump(lambda: ledger.answered() >= 300)
        node = three.nodes[coordinator(leadership, f"{stage.group}/{ledger.input}/0") - 1]
        moves = leadership.moves[moved]
        # What happens meanwhile is told by the service: the ledger's clients wait for the frozen node for a minute.
        node.freeze()
        try:
            wait_until(lambda: leadership.moves[moved] > moves, 40, "another coordinator")
            goal = answered(service) + 200
            work.put(600)
            service.wait(lambda: answered(service) >= goal, "answers while one node is frozen")
        finally:
            node.bring_back()
        wait_until(leadership.look, 60, "everything to be in sync again", every=0.2)
    ledger.flush()
    ledger.wait_answered(seconds=90)
    service.stop()

    each_has_one_response(stage)
    assert len(stage.processes) == 1


def answered(service: ServiceProcess) -> int:
    """How many responses it says that it has written."""
    responses: int = service.state()["totals"]["responses"]
    return responses


def coordinator(leadership: Leadership, transactional_id: str) -> int:
    """The node that coordinates the transactions of an id."""
    count = sum(topic == TRANSACTIONS_TOPIC for topic, _ in leadership.leaders)
    return leadership.leaders[TRANSACTIONS_TOPIC, partition_of(transactional_id, count)]


# ---------------------------------------------------------------------------------------------------- the group


class _Slow(ConsumerRebalanceListener):
    """Of a member that hears of a rebalance, and is not back in the group before it may."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.heard = asyncio.Event()

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        if revoked:
            self.heard.set()
            await self.may.wait()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        pass


async def test_a_join_that_waits_for_the_slowest_member_is_one_request(
    marked: tuple[Broker, Proxy], set_stage: SetStage
) -> None:
    """H16d: as long as the rebalance time-out, and the request is given up by nobody: that would begin it anew.

    The other member never comes back; the group goes on without it when that time is over.
    """
    broker, proxy = marked
    through = {"bootstrap_servers": [f"127.0.0.1:{proxy.port}"], "request_timeout": "20s"}
    stage = set_stage(broker, kafka=through, rebalance={"timeout": "9s", "drain_timeout": "1s"})
    settings = load(
        None,
        {},
        {
            "kafka.bootstrap_servers": broker.bootstrap,
            "kafka.group_id": stage.group,
            "rebalance.timeout": "9s",
            "rebalance.drain_timeout": "1s",
        },
    )
    slow = _Slow()
    member = AIOKafkaConsumer(**consumer_settings(settings))
    await member.start()
    try:
        member.subscribe([stage.ledger.input], listener=slow)
        async with asyncio.timeout(20):
            while len(member.assignment()) < 2:  # noqa: ASYNC110 - the vendor's tasks set no event
                await asyncio.sleep(0.05)
        joins, began = proxy.asked[JOIN_GROUP], time.monotonic()
        service = await asyncio.to_thread(stage.start, ready=False)
        async with asyncio.timeout(40):
            await slow.heard.wait()
        await asyncio.to_thread(service.wait_ready, 2)
        took, joins = time.monotonic() - began, proxy.asked[JOIN_GROUP] - joins
    finally:
        slow.may.set()
        await member.stop()

    assert took > 7, "void: nobody had to be waited for"
    assert joins <= 2, "the first one is told its member id, the second one joins"
    stage.ledger.wait_answered(put(stage, "after", 20))


FREQUENT_METADATA = """
from consumer.kafka import connection

connection.METADATA_MAX_AGE_MS = 500
"""


def test_partitions_that_are_added_are_read_from_their_start(apache: Broker, set_stage: SetStage) -> None:
    """H16i: also what was written before the service knew of them; nothing is skipped."""
    stage = set_stage(apache)
    ledger = stage.ledger
    service = stage.start(partitions=2, environment=sabotage(stage.folder, FREQUENT_METADATA))
    ledger.wait_answered(put(stage, "before", 10))

    apache.admin.create_partitions([NewPartitions(ledger.input, 4)])[ledger.input].result(30)
    ledger.partition_count = 4
    ledger._producer.list_topics(ledger.input, timeout=20)  # it goes by what it knows, else for minutes
    for partition in range(4):
        put(stage, f"added/{partition}", 10, partition=partition)
    service.wait(lambda: len(service.partitions()) == 4, "the added ones to be assigned")
    ledger.wait_answered()
    service.stop()

    each_has_one_response(stage)


def test_a_topic_that_is_deleted_is_said_to_be_gone_and_made_anew_is_read_from_its_start(
    apache: Broker, set_stage: SetStage
) -> None:
    """H16i: the client would stand idle, healthy and without a partition; what was committed is of the old topic."""
    stage = set_stage(apache)
    ledger = stage.ledger
    service = stage.start(partitions=2, environment=sabotage(stage.folder, FREQUENT_METADATA))
    old = put(stage, "old", 10)
    ledger.wait_answered(old)
    service.wait(lambda: ledger.committed(stage.group).get(0) == 10, "it to be committed")

    apache.delete_topic(ledger.input)
    service.wait(lambda: f"topic {ledger.input} does not exist" in service.get("/readyz")[1], "it to be said")
    assert service.get("/healthz")[0] == 200
    wait_until(lambda: ledger.input not in apache.admin.list_topics(timeout=20).topics, 30, "the topic to be gone")
    apache.admin.create_topics([NewTopic(ledger.input, num_partitions=2)])[ledger.input].result(30)
    service.wait_ready(2)
    new = put(stage, "new", 3) + put(stage, "new", 20, partition=1)
    wait_until(
        lambda: ledger.poll() >= 0 and ledger.answered(new) == 23 and len(ledger.answers[old[2].id]) == 2, 40, ""
    )
    service.stop()

    ledger.read_all()
    assert [len(ledger.answers[entry.id]) for entry in old] == [2] * 3 + [1] * 7
    assert [ledger.contradictions(entry, ledger.answers[entry.id][-1]) for entry in new] == [[]] * 23


# ---------------------------------------------------------------------------------------------------- connections


class Endpoint:
    """A server that is no broker, as a wrong address or a hostile host may be; counts who comes."""

    def __init__(self, says: bytes | None) -> None:
        """Listen; answer each connection with *says* over and over, close it where that is empty, be silent on None."""
        self.connections = 0
        self._says = says
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, name="endpoint", daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """End everything."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self._says == b"":
                connection.close()
                continue
            self._open.append(connection)
            if self._says is not None:
                self._threads.append(threading.Thread(target=self._say, args=(connection, self._says), daemon=True))
                self._threads[-1].start()

    @staticmethod
    def _say(connection: socket.socket, says: bytes) -> None:
        with suppress(OSError):
            connection.recv(1)
            while True:
                connection.sendall(says)


def has_said(service: ServiceProcess, text: str) -> bool:
    """Whether the log has a line with *text*."""
    return any(text in json.dumps(line) for line in service.log_lines())


def test_of_two_addresses_one_that_says_nothing_keeps_nobody_out(apache: Broker, set_stage: SetStage) -> None:
    """H30: whoever asks it first waits for it as long as for an answer; then somebody else is asked."""
    with closing(Endpoint(None)) as silent:
        stage = set_stage(apache, partitions=1, kafka={"bootstrap_servers": [silent.address, apache.bootstrap]})
        service = stage.start(ready=False)
        service.wait(lambda: service.ready, "it to be ready all the same", 60)
        stage.ledger.wait_answered(put(stage, "object", 20))
        service.stop()
        assert silent.connections > 0, "void: nobody has asked the silent one"

    each_has_one_response(stage)


SECONDS = 5.0
"""For which an address is refused that is asked again and again."""


def test_brokers_that_are_away_are_asked_in_measure_and_logged_in_measure(apache: Broker, set_stage: SetStage) -> None:
    """H32: the client's waits do not grow; so its attempts are counted at the other end, and its lines in the log."""
    with closing(Endpoint(b"")) as closed:
        stage = set_stage(apache, kafka={"bootstrap_servers": [closed.address]})
        service = stage.start(ready=False)
        wait_until(lambda: closed.connections > 0, 40, "the first attempt")
        connections, lines = closed.connections, len(service.log_lines())
        time.sleep(SECONDS)
        connections, lines = closed.connections - connections, len(service.log_lines()) - lines
        print(f"{connections} connections and {lines} lines in {SECONDS:g} s")
        assert service.process.poll() is None, service.obituary()

    assert 1 <= connections <= 8 * SECONDS
    assert lines <= 4 * SECONDS


def test_an_address_that_is_no_broker_is_told_and_takes_no_memory(apache: Broker, set_stage: SetStage) -> None:
    """H36: the first four bytes of whatever it says are believed to be a length: of "HTTP", 1.2 GB, that never end."""
    with closing(Endpoint(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4000)) as stranger:
        stage = set_stage(apache, kafka={"bootstrap_servers": [stranger.address]})
        service = stage.start(ready=False)
        wait_until(lambda: stranger.connections >= 4, 60, "some attempts")
        service.wait(lambda: has_said(service, "what answers there does not speak plain Kafka"), "it to be told")
        at_most = service.memory_peak()

    print(f"{at_most / MIB:.0f} MiB at most, {stranger.connections} connections")
    assert at_most < 200 * MIB


# ---------------------------------------------------------------------------------------------------- lost data


def test_a_log_that_has_lost_its_end_is_an_alarm_and_no_jump(set_stage: SetStage, tmp_path: Path) -> None:
    """H9c: the broker comes back without the partition's records; what was committed means nothing any more.

    The client cannot tell, but where the log ends before it: then the partition stands, and says so, until an operator
    has decided.
    """
    if apache_source() != "maven":
        pytest.skip("needs an Apache Kafka with a folder of its own: java and mvn")
    (tmp_path / "broker").mkdir()
    with maven_broker(tmp_path / "broker") as broker:
        stage = set_stage(broker, partitions=1)
        ledger = stage.ledger
        service = stage.start(partitions=1)
        old = put(stage, "old", 30)
        ledger.wait_answered(old)
        service.wait(lambda: ledger.committed(stage.group) == {0: 30}, "it to be committed")
        broker.node.stop()
        (data,) = (tmp_path / "broker" / "data-1").glob(f"{ledger.input}-0")
        shutil.rmtree(data)
        broker.node.start()
        put(stage, "new", 5)

        def said() -> bool:
            return f"{ledger.input}/0: offset out of range" in service.get("/readyz")[1]

        service.wait(said, "it to be said", 60)
        ledger.read_all()
        assert {len(ledger.answers[entry.id]) for entry in old} == {1}
        service.stop()
        stage.config["input"] |= {"out_of_range": "earliest"}
        again = stage.start(ready=False)
        again.wait(lambda: ledger.poll() >= 0 and len(ledger.answers[old[4].id]) == 2, "the new records to be answered")
        again.wait(lambda: again.ready, "it to be ready")
        again.stop()
        ledger.read_all()
        assert [len(ledger.answers[entry.id]) for entry in old] == [2] * 5 + [1] * 25
