"""What the Kafka client does that could lose, repeat or hang: one fault for each hazard, on the real client.

These tests hold aiokafka, in the pinned version, to what the service is built around; `unit/test_poller.py` holds the
service to it, over a double that does the same. A test that fails after an upgrade says which of the service's
precautions may go, or which private name has moved. The faults are played on Apache Kafka, some through a proxy that
counts and damages; where no broker can be brought to it, the client's own request is answered by the test.

Every hazard, and the files with a test that names it (this one is *here*); `test_the_table_is_true` keeps this so.
What is here, in `e2e/` and in `publisher/` is done to a real broker, and in `test_hazards_met.py` to the service on it;
`unit/` has doubles. H18g and H37 have nothing else: they are about what is written, and no broker has a part in it.

====== =======================================================================================================
H1     here; unit/test_poller
H2     here; unit/test_poller
H3     here; e2e/test_watchdogs, unit/test_poller
H4     here; e2e/test_watchdogs, unit/test_poller
H5     here; unit/test_poller
H6     here; unit/test_poller
H7     here; unit/test_poller
H8     here
H9     e2e/test_hazards_met, unit/test_expansion; unit/test_metrics (the loop's lag)
H9b    here; e2e/test_delivery, unit/test_offsets, unit/test_poller
H9c    e2e/test_hazards_met, unit/test_poller; beyond the end of the log alone: the client cannot tell more
H10    here; unit/test_poller, e2e/test_network
H11    here; e2e/test_drain, unit/test_poller, unit/test_connection
H12    here; unit/test_poller
H13    here; unit/test_poller
H14    here; unit/test_poller
H15    here; e2e/test_drain, unit/test_poller
H16    here; unit/test_connection
H16b   here; unit/test_poller
H16c   here; unit/test_poller
H16d   here; e2e/test_hazards_met, unit/test_config
H16e   here
H16f   here; unit/test_poller
H16g   here; unit/test_poller
H16h   here; unit/test_poller
H16i   e2e/test_hazards_met, unit/test_poller, unit/test_connection
H17    here; unit/test_poller
H17b   here; unit/test_poller
H17c   here; e2e/test_watchdogs, unit/test_poller
H18    publisher/test_publisher, unit/test_transactions
H18b   publisher/test_publisher
H18c   publisher/test_publisher, e2e/test_exactly_once, unit/test_transactions
H18d   publisher/test_publisher
H18e   publisher/test_publisher
H18f   e2e/test_network
H18g   unit/test_responses
H20    here; e2e/test_exactly_once, unit/test_transactions
H21    e2e/test_exactly_once, unit/test_transactions, unit/test_poller
H22    e2e/test_hazards_met, e2e/test_key_order, unit/test_poller
H23    e2e/test_network, unit/test_transactions
H24    e2e/test_hazards_met, unit/test_transactions
H25    e2e/test_hazards_met, e2e/test_key_order, unit/test_connection
H26    e2e/test_hazards_met, unit/test_transactions
H30    here; e2e/test_hazards_met, unit/test_bootstrap, unit/test_poller (silence is told)
H31    e2e/test_watchdogs, unit/test_watchdog
H32    e2e/test_hazards_met, e2e/test_security, unit/test_connection
H33    e2e/test_security, unit/test_connection
H34    here; e2e/test_watchdogs, unit/test_poller
H35    unit/test_certificates, e2e/test_security
H36    e2e/test_hazards_met, unit/test_connections, unit/test_connection
H37    unit/test_log
====== =======================================================================================================
"""

from __future__ import annotations

import ast
import asyncio
import random
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    CorruptRecordException,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.structs import BrokerMetadata

from brokers import Broker
from consumer.config import load
from consumer.kafka.connection import consumer_settings, producer_settings
from load import PARTITIONS, Load, check_nothing_is_committed_without_its_response, ends
from proxy import FETCH, HEARTBEAT, LEAVE_GROUP, OFFSET_COMMIT, Proxy
from stages import SetStage

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.apache]

PATIENCE_SECONDS = 20.0
"""Bound of every wait; none of them is a measure of anything."""

JOIN_GROUP = 11
"""Kind of request."""

VALUE = random.Random(1).randbytes(2000)
"""Of a record, large enough for the proxy to damage it, and not to be compressed."""


async def until(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds, which depends on a broker."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - it depends on the vendor's tasks, which set no event
            await asyncio.sleep(0.02)


class Held:
    """A callback that says when it has begun, and ends when it may."""

    def __init__(self) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self.begun.set()
        await self.may_end.wait()


class Listener(ConsumerRebalanceListener):
    """Writes down what it is told, and does what a test wants on top."""

    def __init__(self) -> None:
        self.revoked: list[set[TopicPartition]] = []
        self.assigned: list[set[TopicPartition]] = []
        self.on_revoked: Callable[[], Awaitable[object]] | None = None
        self.on_assigned: Callable[[], Awaitable[object]] | None = None

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        self.revoked.append(revoked)
        if self.on_revoked is not None and revoked:
            await self.on_revoked()

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self.assigned.append(assigned)
        if self.on_assigned is not None:
            await self.on_assigned()


class Rig:
    """Topics of one test, and consumers as the service makes them."""

    def __init__(self, broker: Broker, partitions: int) -> None:
        self.broker = broker
        self.topic = broker.create_topic("hazard", partitions)
        self.group = broker.unused_name("hazard")
        self.first, self.second = (TopicPartition(self.topic, partition) for partition in range(2))
        self.config = load(
            None,
            {},
            {
                "kafka.bootstrap_servers": broker.bootstrap,
                "kafka.group_id": self.group,
                "kafka.session_timeout": "6s",
                "kafka.heartbeat_interval": "200ms",
            },
        )

    async def write(self, partition: int, *values: bytes) -> None:
        """Produce records."""
        producer = AIOKafkaProducer(**producer_settings(self.config))
        await producer.start()
        try:
            for value in values:
                await producer.send_and_wait(self.topic, value, partition=partition)
        finally:
            await producer.stop()

    @asynccontextmanager
    async def member(self, listener: Listener | None = None, **changes: Any) -> AsyncIterator[Any]:
        """A member of the group that is started and subscribed; the vendor's private parts have no types."""
        consumer = AIOKafkaConsumer(**(consumer_settings(self.config) | changes))
        await consumer.start()
        consumer.subscribe([self.topic], listener=listener)
        try:
            yield consumer
        finally:
            with suppress(KafkaError, TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await consumer.stop()
            await consumer._client.close()  # a stop that raises leaves its connections open

    async def joined(self, consumer: Any, partitions: int = 2) -> None:
        """Wait for an assignment, and begin at the start of every partition."""
        await until(lambda: len(consumer.assignment()) == partitions)
        for partition in consumer.assignment():
            consumer.seek(partition, 0)

    async def fetched(self, consumer: Any, *partitions: TopicPartition) -> None:
        """Wait until the client holds records of *partitions*."""
        await until(lambda: set(partitions) <= set(consumer._fetcher._records))

    async def expel(self, consumer: Any) -> None:
        """Have the group believe that this member has left."""
        client = AIOKafkaClient(bootstrap_servers=self.broker.bootstrap)
        await client.bootstrap()
        try:
            coordinator = consumer._coordinator
            await client.send(coordinator.coordinator_id, LeaveGroupRequest(self.group, coordinator.member_id))
        finally:
            await client.close()


@pytest.fixture
def rig(apache: Broker) -> Rig:
    """Two partitions on Apache Kafka."""
    return Rig(apache, 2)


@pytest.fixture
def proxied_rig(proxied: tuple[Broker, Proxy]) -> tuple[Rig, Proxy]:
    """Two partitions on Apache Kafka behind the proxy."""
    broker, proxy = proxied
    rig = Rig(broker, 2)
    rig.config = load(
        None,
        {},
        {
            "kafka.bootstrap_servers": f"127.0.0.1:{proxy.port}",
            "kafka.group_id": rig.group,
            "kafka.session_timeout": "6s",
            "kafka.heartbeat_interval": "200ms",
        },
    )
    return rig, proxy


def finishes_at_once(work: Awaitable[Any]) -> Any:
    """Return what *work* comes to without waiting for anything; fail where it waits."""
    steps = work.__await__()
    try:
        next(steps)
    except StopIteration as done:
        return done.value
    steps.close()
    raise AssertionError("it waits")


def named_by_tests(path: Path) -> set[str]:
    """Hazards in the names and docstrings of the tests of a file; what else it says of hazards proves nothing."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            said = f"{node.name.replace('_', ' ')} {ast.get_docstring(node) or ''}"
            named |= set(re.findall(r"\bH[0-9]+[a-z]?\b", said))
    return named


def test_the_table_is_true() -> None:
    """Each hazard of the client has its row, and each file of a row has a test that is about the hazard."""
    tests = Path(__file__).parents[1]
    rows = dict(re.findall(r"^(H[0-9]+[a-z]?) +(.+)$", __doc__ or "", re.MULTILINE))
    named: dict[str, set[str]] = {}
    wrong: list[str] = []
    for hazard, row in rows.items():
        files = re.findall(r"\w+/test_\w+", row) + ["e2e/test_hazards"] * row.startswith("here")
        for name in files:
            if name not in named:
                named[name] = named_by_tests(tests / f"{name}.py")
            if hazard not in named[name]:
                wrong.append(f"{hazard}: {name}")
        if not files:
            wrong.append(f"{hazard}: nowhere")
    assert wrong == []
    letters = {9: " bc", 16: " bcdefghi", 17: " bc", 18: " bcdefg"}
    numbers = [*range(1, 19), *range(20, 27), *range(30, 38)]
    assert list(rows) == [f"H{number}{letter}".strip() for number in numbers for letter in letters.get(number, " ")]


# ---------------------------------------------------------------------------------------------------- polling


async def test_private_names_are_where_the_poller_looks_for_them(rig: Rig) -> None:
    """H3, H17c, H34, H1, H21: told by nothing public; an upgrade that moves one of them fails here."""
    await rig.write(0, VALUE)
    async with rig.member() as consumer:
        await rig.joined(consumer)
        await rig.fetched(consumer, rig.first)

        tasks = [consumer._fetcher._fetch_task, consumer._coordinator._coordination_task, consumer._client._sync_task]
        assert [type(task) for task in tasks] == [asyncio.Task] * 3
        assert not any(task.done() for task in tasks)
        assert consumer._coordinator.generation > 0
        assert consumer._coordinator.member_id
        assert consumer._client.cluster.brokers()
        held = consumer._fetcher._records[rig.first]
        assert held._partition_records._records_iterator.gi_frame is not None


async def test_records_are_taken_in_the_step_in_which_they_are_returned(rig: Rig) -> None:
    """The position is never ahead of what was handed over, where others of our tasks could see it (H9b)."""
    await rig.write(0, VALUE, VALUE)
    async with rig.member() as consumer:
        await rig.joined(consumer)
        await rig.fetched(consumer, rig.first)
        assert await consumer.position(rig.first) == 0

        found = finishes_at_once(consumer.getmany(rig.first, timeout_ms=200))

        assert [record.offset for record in found[rig.first]] == [0, 1]
        assert finishes_at_once(consumer.position(rig.first)) == 2


async def test_a_poll_that_breaks_off_takes_the_records_of_others_with_it(proxied_rig: tuple[Rig, Proxy]) -> None:
    """H1: their position has moved, and nobody has seen them; a generator that has ended tells where it broke off."""
    rig, proxy = proxied_rig
    await rig.write(0, VALUE)
    await rig.write(1, VALUE)
    async with rig.member() as consumer:
        await until(lambda: len(consumer.assignment()) == 2)
        consumer.pause(rig.second)
        consumer.seek(rig.first, 0)
        await rig.fetched(consumer, rig.first)
        proxy.damage_answers(FETCH, 1)
        consumer.seek(rig.second, 0)
        consumer.resume(rig.second)
        await rig.fetched(consumer, rig.first, rig.second)

        with pytest.raises(CorruptRecordException):
            await consumer.getmany(rig.first, rig.second, timeout_ms=200)

        assert await consumer.position(rig.first) == 1, "the hazard is gone: record 0 was handed to nobody"
        broken = consumer._fetcher._records[rig.second]
        assert broken._partition_records._records_iterator.gi_frame is None
        consumer.seek(rig.first, 0)
        consumer.seek(rig.second, 0)
        found: dict[TopicPartition, Any] = {}
        while len(found) < 2:
            found |= await consumer.getmany(rig.first, rig.second, timeout_ms=2000)
        assert [[record.offset for record in records] for records in found.values()] == [[0], [0]]


UNREADABLE = "partition cannot be read: trying again later"
DAMAGES_MAX = 15
"""Fetches to be damaged until one of them is noticed."""


@pytest.mark.timeout(240)
def test_damaged_answers_under_load_lose_nothing(proxied: tuple[Broker, Proxy], set_stage: SetStage) -> None:
    """H1, I1, I2: three fetches that cannot be read; the partition waits a while, and nobody misses anything."""
    broker, proxy = proxied
    stage = set_stage(broker, partitions=PARTITIONS, kafka={"bootstrap_servers": [f"127.0.0.1:{proxy.port}"]})
    ledger, load_ = stage.ledger, Load(stage.ledger)
    service = stage.start(partitions=PARTITIONS)
    before = proxy.damaged[FETCH]

    def noticed() -> bool:
        return any(line.get("event") == UNREADABLE for line in service.log_lines())

    number = 0
    while number < 3 or not noticed():  # what is damaged may lie in records that the client throws away
        number += 1
        assert number <= DAMAGES_MAX, "void: the damage was not noticed"
        proxy.damage_answers(FETCH, 1)
        load_.pump(lambda number=number: proxy.damaged[FETCH] - before == number)  # type: ignore[misc]  # bound now
        goal = ledger.answered() + 500
        load_.pump(lambda goal=goal: ledger.answered() >= goal)  # type: ignore[misc]  # as above
    ledger.wait_answered(seconds=90)
    check_nothing_is_committed_without_its_response(stage, {})
    service.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert ledger.committed(stage.group) == ends(ledger)


async def test_a_record_larger_than_the_fetch_limit_is_read(rig: Rig) -> None:
    """H2: brokers answer with one whole batch at least; the client's skip of what it cannot read needs another one."""
    await rig.write(0, b"y" * 200_000, VALUE)
    async with rig.member(max_partition_fetch_bytes=1000, fetch_max_bytes=1000) as consumer:
        await rig.joined(consumer)
        sizes: list[int] = []
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(sizes) < 2:
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    sizes.extend(len(record.value) for record in records)

    assert sizes == [200_000, 2000]


async def test_a_fetch_task_that_dies_makes_polling_find_nothing_for_ever(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H3: no error, and heartbeats go on; only the task itself tells."""
    await rig.write(0, VALUE)
    async with rig.member() as consumer:
        await until(lambda: len(consumer.assignment()) == 2)

        send = consumer._client.send

        async def fetches_refused(node: int, request: Any, **named: Any) -> Any:
            if not isinstance(request, FetchRequest):  # a refused heartbeat would end another task as well
                return await send(node, request, **named)
            raise ValueError("of a token provider")

        with monkeypatch.context() as patched:
            patched.setattr(consumer._client, "send", fetches_refused)
            consumer.seek(rig.first, 0)
            consumer.seek(rig.second, 0)
            await until(consumer._fetcher._fetch_task.done)

        assert await consumer.getmany(rig.first, timeout_ms=300) == {}
        assert not consumer._coordinator._coordination_task.done()
        assert isinstance(consumer._fetcher._fetch_task.exception(), KafkaError)


async def test_a_coordination_task_that_dies_is_over_for_good(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """H17c: every later poll raises the same; a new client has to be made, or a new process."""
    async with rig.member() as consumer:
        await rig.joined(consumer)
        monkeypatch.setattr(consumer._coordinator, "need_rejoin", lambda _: 1 // 0)
        consumer._coordinator.request_rejoin()
        await until(consumer._coordinator._coordination_task.done)

        for _ in range(2):
            with pytest.raises(KafkaError, match="Unexpected error during coordination"):
                await consumer.getmany(rig.first, timeout_ms=100)


async def test_a_cancelled_poll_counts_as_one_that_goes_on(rig: Rig) -> None:
    """H4: the client would never find that nobody polls, and keep its partitions however stuck the process is."""
    async with rig.member() as consumer:
        await rig.joined(consumer)
        await consumer.getmany(rig.first, timeout_ms=1)
        await asyncio.sleep(0.05)
        assert consumer._subscription.fetcher_idle_time > 0

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(consumer.getmany(rig.first, timeout_ms=10_000), 0.1)
        await asyncio.sleep(0.05)

        assert consumer._subscription.fetcher_idle_time == 0


async def test_a_poll_in_a_rebalance_waits_past_its_time_out_and_past_the_stop(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H5, H6: polling is no clock; and whoever stops the client has to end the poll himself."""
    async with rig.member() as consumer:
        await rig.joined(consumer)

        async def no_broker(_: object) -> bool:
            await asyncio.sleep(0.01)
            return False

        monkeypatch.setattr(consumer._coordinator, "_do_rejoin_group", no_broker)
        consumer._coordinator.request_rejoin()
        await until(lambda: bool(consumer._subscription.reassignment_in_progress))
        polling = asyncio.ensure_future(consumer.getmany(rig.first, timeout_ms=50))
        await asyncio.sleep(0.5)
        assert not polling.done()

        async with asyncio.timeout(PATIENCE_SECONDS):
            await consumer.stop()
        await asyncio.sleep(0.1)
        waits_on = not polling.done()
        polling.cancel()
        await asyncio.wait([polling])

    assert waits_on


async def test_what_has_been_fetched_is_kept_by_not_asking_and_dropped_by_pausing(rig: Rig) -> None:
    """H7: so a partition that wants no records is left out of the poll."""
    await rig.write(0, VALUE)
    async with rig.member() as consumer:
        await rig.joined(consumer)
        await rig.fetched(consumer, rig.first)
        consumer.pause(rig.first)

        await consumer.getmany(TopicPartition("-", 0), timeout_ms=0)
        assert rig.first in consumer._fetcher._records
        await consumer.getmany(rig.first, timeout_ms=0)
        assert rig.first not in consumer._fetcher._records


async def test_a_partition_that_is_not_taken_holds_up_its_neighbours(rig: Rig) -> None:
    """H8: the next fetch waits for it each time, so records are taken at once and wait in buffers of ours."""
    await rig.write(0, VALUE)
    await rig.write(1, *[VALUE] * 3)
    async with rig.member() as consumer:
        consumer._fetcher._prefetch_backoff = PATIENCE_SECONDS * 2
        await rig.joined(consumer)
        await rig.fetched(consumer, rig.first, rig.second)
        found = await consumer.getmany(rig.second, timeout_ms=200)
        assert len(found[rig.second]) == 3
        await rig.write(1, VALUE)

        assert await consumer.getmany(rig.second, timeout_ms=1000) == {}

        await consumer.getmany(rig.first, timeout_ms=200)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (found := await consumer.getmany(rig.second, timeout_ms=500)):
                pass
        assert [record.offset for record in found[rig.second]] == [3]


# ---------------------------------------------------------------------------------------------------- the group


async def test_a_rebalance_resumes_everything_and_forgets_the_positions(rig: Rig) -> None:
    """H7, H15: whatever was paused or sought to begins anew, so each assignment pauses and seeks for itself."""
    listener = Listener()
    async with rig.member(listener) as consumer:
        await rig.joined(consumer)
        consumer.pause(rig.first, rig.second)
        consumer._coordinator.request_rejoin()
        await until(lambda: len(listener.assigned) == 2)

        assert consumer.paused() == set()
        assert not consumer._subscription.subscription.assignment.state_value(rig.first).has_valid_position


async def test_a_rebalance_takes_everything_from_everybody(rig: Rig) -> None:
    """H15: also what stays with its owner; so work in flight is finished, and what comes back does not run twice."""
    listener = Listener()
    async with rig.member(listener) as first:
        await rig.joined(first)
        polling = asyncio.ensure_future(_poll_for_ever(first))
        async with rig.member() as second:
            await until(lambda: len(second.assignment()) == 1)
            await until(lambda: len(first.assignment()) == 1)
            polling.cancel()
            await asyncio.wait([polling])

    assert listener.revoked[1] == {rig.first, rig.second}
    assert len(listener.assigned[1]) == 1


async def _poll_for_ever(consumer: AIOKafkaConsumer) -> None:
    while True:
        await consumer.getmany(TopicPartition("-", 0), timeout_ms=100)


async def test_heartbeats_go_on_while_partitions_are_revoked_and_not_while_they_are_assigned(
    proxied_rig: tuple[Rig, Proxy],
) -> None:
    """H11, H12: a drain may take its time, within the rebalance time-out; the other callback may not take any."""
    rig, proxy = proxied_rig
    beats: dict[str, int] = {}
    listener = Listener()

    async def count(name: str) -> None:
        before = proxy.asked[HEARTBEAT]
        await asyncio.sleep(2)
        beats[name] = proxy.asked[HEARTBEAT] - before

    listener.on_revoked = lambda: count("revoked")
    listener.on_assigned = lambda: count("assigned")
    async with rig.member(listener) as consumer:
        await until(lambda: "assigned" in beats)
        await rig.joined(consumer)
        before = proxy.asked[HEARTBEAT]
        await until(lambda: proxy.asked[HEARTBEAT] > before)
        consumer._coordinator.request_rejoin()
        await until(lambda: "revoked" in beats)
        await until(lambda: len(listener.assigned) == 2)
        listener.on_assigned = None

    assert beats["revoked"] > 0
    assert beats["assigned"] == 0


async def test_records_come_before_the_callback_for_their_partition_is_done(rig: Rig) -> None:
    """H13: so a gate of ours is opened by us, and the client's word for it is not taken."""
    await rig.write(0, VALUE)
    listener, go_on = Listener(), asyncio.Event()
    listener.on_assigned = go_on.wait
    async with rig.member(listener) as consumer:
        await until(lambda: bool(listener.assigned))
        consumer.seek(rig.first, 0)
        found: dict[TopicPartition, Any] = {}
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not found:
                found = await consumer.getmany(rig.first, timeout_ms=200)
        go_on.set()

    assert len(found[rig.first]) == 1


async def test_a_callback_that_fails_is_only_logged(rig: Rig) -> None:
    """H14: the client goes on with an assignment of which half is prepared."""
    listener = Listener()

    async def fail() -> None:
        raise ZeroDivisionError

    listener.on_assigned = listener.on_revoked = fail
    async with rig.member(listener) as consumer:
        await rig.joined(consumer)
        consumer._coordinator.request_rejoin()
        await until(lambda: len(listener.assigned) == 2)

        assert await consumer.getmany(TopicPartition("-", 0), timeout_ms=10) == {}
        assert not consumer._coordinator._coordination_task.done()


async def test_who_does_not_poll_has_left_before_he_is_told(proxied_rig: tuple[Rig, Proxy]) -> None:
    """H16b: the membership that a commit could be judged by is gone; the partitions are lost, not to be drained."""
    rig, proxy = proxied_rig
    listener, found = Listener(), []
    async with rig.member(listener, max_poll_interval_ms=1000) as consumer:
        await rig.joined(consumer)
        left = proxy.asked[LEAVE_GROUP]

        async def look() -> None:
            found.append((proxy.asked[LEAVE_GROUP] - left, consumer._coordinator.generation, consumer.assignment()))

        listener.on_revoked = look
        await until(lambda: bool(found))
        listener.on_revoked = None

    assert found[0] == (1, -1, {rig.first, rig.second})


async def test_who_is_expelled_hears_of_it_as_of_a_revocation_and_may_commit_into_the_empty_group(rig: Rig) -> None:
    """H16c, H16f: only the commit tells; and once the client knows, the group takes its commits as anybody's."""
    listener, held = Listener(), Held()
    async with rig.member(listener) as consumer:
        await rig.joined(consumer)
        listener.on_revoked = held
        await rig.expel(consumer)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await held.begun.wait()

        assert consumer._coordinator.generation == -1
        assert consumer.assignment() == {rig.first, rig.second}
        await consumer.commit({rig.first: 7})
        assert await consumer.committed(rig.first) == 7, "the hazard is gone: nobody is a member, and it is taken"
        listener.on_revoked = None
        held.may_end.set()
        await until(lambda: len(listener.assigned) == 2)


async def test_a_commit_of_one_who_was_expelled_and_does_not_know_is_refused(rig: Rig) -> None:
    """H16c: the first commit in the callback is the question whether the partitions are still ours."""
    async with rig.member(heartbeat_interval_ms=5000) as consumer:
        await rig.joined(consumer)
        await rig.expel(consumer)

        with pytest.raises(CommitFailedError) as refusal:
            await consumer.commit({rig.first: 0})

        assert isinstance(refusal.value.__cause__, UnknownMemberIdError)
        assert consumer._coordinator.generation == -1


async def test_a_commit_s_refusals_look_alike_but_for_their_cause(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """H16g: one of them is no loss, but a commit in the wrong moment."""
    async with rig.member() as consumer:
        await rig.joined(consumer)

        async def in_progress(_assignment: object, _offsets: object) -> None:
            raise RebalanceInProgressError

        monkeypatch.setattr(consumer._coordinator, "_do_commit_offsets", in_progress)
        with pytest.raises(CommitFailedError) as refusal:
            await consumer.commit({rig.first: 0})

        assert isinstance(refusal.value.__cause__, RebalanceInProgressError)


async def test_a_commit_that_is_tried_again_goes_out_with_the_generation_of_that_moment(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H10: begun in one generation, sent in the next, and taken; so each attempt is ours, and checked."""
    async with rig.member() as consumer:
        await rig.joined(consumer)
        coordinator, sent = consumer._coordinator, []
        began_in, commit = coordinator.generation, coordinator._do_commit_offsets

        async def attempt(assignment: Any, offsets: Any) -> None:
            sent.append(coordinator.generation)
            if len(sent) == 1:
                coordinator.request_rejoin()
                await until(lambda: coordinator.generation > began_in)
                raise KafkaConnectionError("the answer is lost")
            await commit(assignment, offsets)

        monkeypatch.setattr(coordinator, "_do_commit_offsets", attempt)
        await consumer.commit({rig.first: 1})

        assert sent == [began_in, began_in + 1]
        assert await consumer.committed(rig.first) == 1, (
            "the hazard is gone: a commit of an older generation is refused"
        )


async def test_a_stop_does_not_call_the_listener(rig: Rig) -> None:
    """H16h: the service drains and commits by itself before it stops the client."""
    listener = Listener()
    async with rig.member(listener) as consumer:
        await rig.joined(consumer)
        await consumer.stop()

    assert listener.revoked == [set()]


async def test_a_join_that_outlasts_a_request_is_begun_again_and_again(proxied_rig: tuple[Rig, Proxy]) -> None:
    """H16d: a member that is slow to rejoin makes it last; so a request may take longer than a rebalance."""
    rig, proxy = proxied_rig
    listener, held = Listener(), Held()
    async with rig.member(listener) as slow:
        await rig.joined(slow)
        listener.on_revoked = held
        before = proxy.asked[JOIN_GROUP]
        async with rig.member(request_timeout_ms=1000) as other:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await held.begun.wait()
            await until(lambda: proxy.asked[JOIN_GROUP] - before >= 5)
            in_the_group = other.assignment()
            listener.on_revoked = None
            held.may_end.set()

    assert in_the_group == set()


async def test_two_processes_of_one_id_take_everything_from_each_other_for_ever(
    proxied_rig: tuple[Rig, Proxy],
) -> None:
    """H16e: each believes that it has all partitions; so there is no static membership."""
    assert "group_instance_id" not in consumer_settings(proxied_rig[0].config)
    rig, proxy = proxied_rig
    async with rig.member(group_instance_id="same") as first:
        await rig.joined(first)
        before = proxy.asked[JOIN_GROUP]
        async with rig.member(group_instance_id="same") as second:
            await until(lambda: proxy.asked[JOIN_GROUP] - before >= 12)
            both = [first.assignment(), second.assignment()]

    assert both == [{rig.first, rig.second}] * 2


async def test_each_assignor_more_is_another_request_to_join(proxied_rig: tuple[Rig, Proxy]) -> None:
    """H16: sent before the answer to the one before is worked off; so there is one, and always the same."""
    rig, proxy = proxied_rig
    assert consumer_settings(rig.config)["partition_assignment_strategy"] == (StickyPartitionAssignor,)
    joins = []
    for assignors in ((StickyPartitionAssignor,), (StickyPartitionAssignor, RoundRobinPartitionAssignor)):
        before = proxy.asked[JOIN_GROUP]
        async with rig.member(group_id=f"{rig.group}-{len(assignors)}", partition_assignment_strategy=assignors) as one:
            await rig.joined(one)
            joins.append(proxy.asked[JOIN_GROUP] - before)

    assert joins[1] > joins[0]


# ---------------------------------------------------------------------------------------------------- commit, stop


async def test_a_commit_without_answer_hangs_until_our_deadline(proxied_rig: tuple[Rig, Proxy]) -> None:
    """H17: the client tries again without end; whoever awaits it has to bring a deadline."""
    rig, proxy = proxied_rig
    async with rig.member() as consumer:
        await rig.joined(consumer)
        lost = proxy.lost[OFFSET_COMMIT]
        proxy.lose_answers(OFFSET_COMMIT, 1_000_000)
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5):
                    await consumer.commit({rig.first: 0})
        finally:
            proxy.lose_answers(OFFSET_COMMIT, 0)

    assert proxy.lost[OFFSET_COMMIT] - lost >= 2


async def test_a_stop_raises_a_cancellation_that_nobody_has_made(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """H17b: where a fetch waits to be tried again; a chain of `finally` would lose its other steps."""
    async with rig.member(retry_backoff_ms=60_000) as consumer:
        await rig.joined(consumer)

        failed = asyncio.Event()

        async def gone(*_: object, **__: object) -> None:
            failed.set()
            raise KafkaConnectionError("gone")

        with monkeypatch.context() as patched:
            patched.setattr(consumer._client, "send", gone)
            await asyncio.wait_for(failed.wait(), PATIENCE_SECONDS)
            await asyncio.sleep(0.05)  # from the failure to the wait
        task = asyncio.current_task()
        assert task is not None

        with pytest.raises(asyncio.CancelledError):
            await consumer.stop()

        assert task.cancelling() == 0
        await consumer._client.close()


async def test_connecting_to_one_broker_that_says_nothing_holds_up_all_the_others(rig: Rig) -> None:
    """H30: until the request's time-out; so clients for reading, for writing and for asking are separate ones."""
    seconds = 2.0
    client: Any = AIOKafkaClient(bootstrap_servers=rig.broker.bootstrap, request_timeout_ms=int(seconds * 1000))
    await client.bootstrap()
    try:
        with closing(socket.create_server(("127.0.0.1", 0))) as silent:
            (healthy,) = client.cluster.brokers()
            port = silent.getsockname()[1]
            client.cluster._brokers[healthy.nodeId + 1] = BrokerMetadata(healthy.nodeId + 1, "127.0.0.1", port, None)
            began = time.monotonic()
            connecting = asyncio.ensure_future(client.ready(healthy.nodeId + 1))
            await until(client._get_conn_lock.locked)

            assert await client.ready(healthy.nodeId)
            took = time.monotonic() - began
            assert not await connecting
    finally:
        await client.close()

    assert took >= seconds / 2, "the hazard is gone: the healthy one was connected to meanwhile"


# ---------------------------------------------------------------------------------------------------- transactions


async def test_a_transaction_commits_though_a_send_in_it_has_failed(rig: Rig) -> None:
    """H20: so every send is awaited, and one failure aborts all of it."""
    producer = AIOKafkaProducer(**producer_settings(rig.config, transactional_id=rig.group))
    await producer.start()
    try:
        async with producer.transaction():
            await producer.send(rig.topic, VALUE, partition=0)
            with pytest.raises(MessageSizeTooLargeError):
                await producer.send(rig.topic, b"z" * 50_000_000, partition=0)
    finally:
        await producer.stop()

    async with rig.member() as consumer:
        await rig.joined(consumer)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (found := await consumer.getmany(rig.first, timeout_ms=500)):
                pass
    assert [record.value for record in found[rig.first]] == [VALUE], "the hazard is gone: half of it was not committed"
