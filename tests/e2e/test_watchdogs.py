"""A service that looks alive and does nothing ends with 3 and says where everything stood; an outage ends nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers import Broker, noida_broker, wait_until
from sabotage import on_signal, sabotage
from service_process import ServiceProcess
from stages import SetStage, Stage, set_up

LIMIT_SECONDS = 4.0
"""What the watchdogs wait in these tests instead of minutes."""

IMPATIENT = f"""
from consumer import watchdog

watchdog.LOOK_SECONDS = 0.2
watchdog.watchdog_limits = lambda **_settings: watchdog.WatchdogLimits(
    poll_seconds={LIMIT_SECONDS},
    operation_seconds={LIMIT_SECONDS},
    stall_seconds={LIMIT_SECONDS},
    metadata_seconds={LIMIT_SECONDS},
)
"""

FREQUENT_METADATA = """
from consumer.kafka import connection

connection.METADATA_MAX_AGE_MS = 500
"""

EVERY_ADDRESS_CHANGED = (
    "from aiokafka.structs import BrokerMetadata; "
    "cluster = consumer._client.cluster; "
    "cluster._brokers = {node: BrokerMetadata(node, '127.0.0.1', 1, None) for node in cluster._brokers}; "
    "[connection.close() for connection in list(consumer._client._conns.values())]"
)

DELIVERS_NOTHING = (
    "import asyncio, pathlib; "
    "consumer.getmany = lambda *_, **__: (pathlib.Path('blind').touch(), asyncio.sleep(0.05, result={}))[1]"
)


BLOCKS_THE_LOOP = (
    "import time; from consumer import loop_watch; loop_watch.BLOCKED_LOOKS = 2; time.sleep(600)  # as a lock would"
)


def sabotaged(stage: Stage, fault: str = "pass") -> ServiceProcess:
    """Start a service with impatient watchdogs, to whose client SIGUSR2 does *fault*; wait until it has worked."""
    code = FREQUENT_METADATA + on_signal(fault) + IMPATIENT
    service = stage.start(partitions=2, environment=sabotage(stage.folder, code))
    for partition in (0, 1):
        stage.ledger.operate("insert", f"before/{partition}", b"x", partition=partition, statuses={201})
    stage.ledger.wait_answered()
    wait_until(lambda: stage.ledger.committed(stage.group) == {0: 1, 1: 1}, 20, "what was answered to be committed")
    return service


def ends_with_its_stacks(service: ServiceProcess) -> str:
    """Wait for exit 3; return what it says about why, having checked that it tells where every task stood."""
    assert service.wait_exit(60) == 3, service.obituary()
    lines = service.log_lines()
    (fatal,) = [line for line in lines if line.get("event") == "fatal: a restart is right"]
    stacks = [stack for line in lines if line.get("event") == "task stacks" for stack in line["tasks"]]
    tasks = {stack["task"] for stack in stacks}
    assert {"commit", "log ends", "keep the producer"} <= tasks, sorted(tasks)
    assert all(stack["waits_in"] for stack in stacks), stacks
    assert any("assignment.py" in frame for stack in stacks for frame in stack["waits_in"]), stacks
    return str(fatal["exception"])


@pytest.mark.apache
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param("consumer._fetcher._fetch_task.cancel()", "_fetch_task has ended", id="H3-fetch-task"),
        pytest.param(
            "consumer._coordinator._coordination_task.cancel()", "_coordination_task has ended", id="H17c-coordination"
        ),
        pytest.param("consumer._client._sync_task.cancel()", "_sync_task has ended", id="H34-metadata-task"),
        pytest.param("producer.client._sync_task.cancel()", "the producer's _sync_task", id="H34-of-the-producer"),
        pytest.param(
            "import asyncio; consumer.getmany = lambda *_, **__: asyncio.sleep(10_000)",
            "the poll loop has not come round",
            id="H4-poll-hangs",
        ),
        pytest.param(EVERY_ADDRESS_CHANGED, "where the brokers are", id="H31-all-brokers-moved"),
    ],
)
def test_what_cannot_go_on_ends_with_3_and_a_restart_goes_on(
    apache: Broker, set_stage: SetStage, fault: str, said: str
) -> None:
    """Rule 4, contract 11, H3, H4, H17c, H31, H34: exit 3 with all task stacks; the next process answers all, once."""
    stage = set_stage(apache)
    service = sabotaged(stage, fault)

    service.process.send_signal(signal.SIGUSR2)

    assert said in ends_with_its_stacks(service)
    again = stage.start(partitions=2)
    for partition in (0, 1):
        stage.ledger.operate("get", f"before/{partition}", partition=partition, statuses={200})
    stage.ledger.wait_answered()
    again.stop()
    stage.ledger.read_all()
    verdict = stage.ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, [])


@pytest.mark.apache
@pytest.mark.slow
def test_records_that_are_never_delivered_end_it_whatever_the_client_says(apache: Broker, set_stage: SetStage) -> None:
    """Rule 4b: the client's tasks live, polls come round, heartbeats go on; there is lag, and nothing moves."""
    stage = set_stage(apache)
    service = sabotaged(stage, DELIVERS_NOTHING)
    service.process.send_signal(signal.SIGUSR2)
    wait_until((stage.folder / "blind").exists, 20, "a poll that finds nothing")
    stage.ledger.operate("head", "never read", partition=1, statuses={404})

    said = ends_with_its_stacks(service)

    assert f"{stage.ledger.input}/1 has not moved" in said
    stage.start(partitions=2)
    stage.ledger.wait_answered()


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """An embedded broker that the test may freeze."""
    with noida_broker(tmp_path) as own:
        yield own
        own.node.thaw()


@pytest.mark.broker
@pytest.mark.slow
def test_an_outage_of_the_brokers_ends_nothing_however_long(own_broker: Broker, tmp_path: Path) -> None:
    """Contract 6: an unreachable broker is no exit; the suspicion is held against the broker, and dropped."""
    stage = set_up(own_broker, tmp_path, 2, 2)
    try:
        service = sabotaged(stage)
        own_broker.node.freeze()

        def suspicions() -> int:
            return sum("the brokers do not answer either" in str(line.get("event")) for line in service.log_lines())

        wait_until(lambda: suspicions() >= 2, 90, "the watchdog to be suspicious twice")

        assert service.process.poll() is None, service.obituary()
        assert service.get("/healthz")[0] == 200
    finally:
        stage.put_down()


@pytest.mark.broker
@pytest.mark.slow
def test_an_event_loop_that_is_blocked_ends_it_and_the_log_says_by_what(own_broker: Broker, tmp_path: Path) -> None:
    """No task of the service can notice it, and the probes are asked by nobody where there is no cluster."""
    stage = set_up(own_broker, tmp_path, 2, 2)
    try:
        service = sabotaged(stage, BLOCKS_THE_LOOP)

        service.process.send_signal(signal.SIGUSR2)

        assert service.wait_exit(60) == 3, service.obituary()
        said = service.log.read_text(encoding="utf-8")
        assert "the event loop is blocked" in said
        assert "in do_it" in said, "the stack of what blocks"
    finally:
        stage.put_down()
