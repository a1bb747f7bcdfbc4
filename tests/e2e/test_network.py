"""A network that loses answers, and one that is slow: judged by the ledger, which does not go through it.

The service reaches Apache Kafka through a proxy (`proxy.py`) and the ledger reaches it directly. A lost answer is the
fault that corrupts: the broker has done what it was asked, and who asked cannot know.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from brokers import Broker
from load import PARTITIONS, Load, check_nothing_is_committed_without_its_response, ends, read_back
from proxy import END_TXN, OFFSET_COMMIT, PRODUCE, TXN_OFFSET_COMMIT, Proxy
from second_try import void_unless
from service_process import ServiceProcess
from stages import SetStage, Stage

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.apache]

LOST = 3
"""Answers of each kind that are lost."""

SLOW_BYTES_PER_SECOND = 200_000
"""So that what the slow tests have to say takes about half a minute."""

MIB = 1024 * 1024


@pytest.fixture
def set_proxied(proxied: tuple[Broker, Proxy], set_stage: SetStage) -> Callable[..., tuple[Stage, Proxy]]:
    """A maker of stages whose service goes through the proxy."""
    broker, proxy = proxied

    def make(partitions: int = PARTITIONS, **sections: object) -> tuple[Stage, Proxy]:
        through = {"bootstrap_servers": [f"127.0.0.1:{proxy.port}"], **sections.pop("kafka", {})}  # type: ignore[dict-item]
        return set_stage(broker, partitions=partitions, kafka=through, **sections), proxy

    return make


SetProxied = Callable[..., tuple[Stage, Proxy]]


def lose_under_load(stage: Stage, proxy: Proxy, kind: int) -> None:
    """Lose an answer of this kind in the middle of a load, :data:`LOST` times; each time go on until work is done."""
    load, ledger = Load(stage.ledger), stage.ledger
    service = stage.start(partitions=PARTITIONS)
    for _ in range(LOST):
        goal = ledger.answered() + 200
        load.pump(lambda goal=goal: ledger.answered() >= goal)  # type: ignore[misc]  # bound now, as it is called now
        before = proxy.lost[kind]
        proxy.lose_answers(kind, 1)
        load.pump(lambda before=before: proxy.lost[kind] > before)  # type: ignore[misc]  # as above
        goal = ledger.answered() + 500
        load.pump(lambda goal=goal: ledger.answered() >= goal)  # type: ignore[misc]  # as above
    ledger.flush()
    ledger.wait_answered(seconds=90)
    read_back(load, 100)
    check_nothing_is_committed_without_its_response(stage, {})
    service.stop()
    ledger.read_all()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", [PRODUCE, OFFSET_COMMIT], ids=["Produce", "OffsetCommit"])
def test_lost_answers_lose_nothing_and_repeat_nothing(set_proxied: SetProxied, kind: int) -> None:
    """I1, I2, I4, I5, H10, H18f: what is sent again is known by its sequence number, and a commit by its watermark."""
    stage, proxy = set_proxied()
    lost = proxy.lost[kind]

    lose_under_load(stage, proxy, kind)

    verdict = stage.ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert stage.ledger.committed(stage.group) == ends(stage.ledger)
    assert proxy.lost[kind] - lost == LOST


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", [PRODUCE, TXN_OFFSET_COMMIT, END_TXN], ids=["Produce", "TxnOffsetCommit", "EndTxn"])
def test_lost_answers_in_transactions_lose_nothing_and_repeat_nothing(set_proxied: SetProxied, kind: int) -> None:
    """I1, I2, H20, H23: a reader of committed records sees each response once, whatever became of the commit."""
    stage, proxy = set_proxied(delivery="exactly-once")
    lost = proxy.lost[kind]

    lose_under_load(stage, proxy, kind)

    verdict = stage.ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert stage.ledger.committed(stage.group) == ends(stage.ledger)
    assert proxy.lost[kind] - lost == LOST


def resident(service: ServiceProcess) -> int:
    """Bytes of memory the process has now."""
    status = Path(f"/proc/{service.process.pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


@pytest.mark.timeout(300)
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_slow_output_topic_holds_the_input_back(set_proxied: SetProxied, delivery: str) -> None:
    """I2, I9-I11: in flight never above the window, no rebalance, memory within the byte budget, nothing twice.

    Without back-pressure the reads, which are quick, would pile all of their payloads up in memory.
    """
    budget = 16 * MIB
    stage, proxy = set_proxied(
        partitions=2,
        delivery=delivery,
        limits={"in_flight_bytes": budget, "record_bytes": 2 * MIB},
        storage={"threshold": "64KiB"},
        output={"max_request_bytes": 700_000},
    )
    ledger, chance = stage.ledger, random.Random(5)
    service = stage.start(partitions=2)
    payload = chance.randbytes(60_000)  # nothing that could be compressed
    for partition in range(2):
        ledger.operate("insert", "large", payload, statuses={201}, partition=partition, wait=False)
    ledger.flush()
    ledger.wait_answered()
    generation = {name: state["epoch"] for name, state in service.partitions().items()}
    slowed, most_charged, most_resident, paused = proxy.slowed_bytes, 0.0, 0, set()
    at_rest = resident(service)

    proxy.slow(PRODUCE, SLOW_BYTES_PER_SECOND)
    try:
        for number in range(2_000):  # 120 MB of answers, of which the network takes a few
            ledger.operate("get", "large", statuses={200}, partition=number % 2, wait=False)
        ledger.flush()
        until = time.monotonic() + 30
        while time.monotonic() < until:
            state = service.state()
            for part in state["partitions"]:
                assert part["in_flight"] <= part["window"], part
                paused |= set(part["paused_for"])
            most_charged = max(most_charged, state["in_flight_bytes"])
            most_resident = max(most_resident, resident(service))
            ledger.poll(0.2)
        answered = ledger.answered()
    finally:
        proxy.quick()
    ledger.wait_answered(seconds=120)

    assert {name: state["epoch"] for name, state in service.partitions().items()} == generation, "a rebalance"
    rebalances = sum(value for name, value in service.metrics().items() if "rebalances_total" in name)
    service.stop()
    ledger.read_all()
    verdict = ledger.verdict()
    print(
        f"{answered} of {len(ledger.entries)} answered in 30 s, {proxy.slowed_bytes - slowed} bytes slowly; "
        f"charged at most {most_charged / MIB:.1f} MiB; memory {at_rest / MIB:.0f} to {most_resident / MIB:.0f} MiB; "
        f"paused for {sorted(paused)}"
    )
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert rebalances == 0
    assert most_charged <= budget + MIB
    assert most_resident - at_rest <= 4 * budget
    void_unless(proxy.slowed_bytes > slowed, "nothing was slow")
    void_unless(answered < 1_000, "the network kept up")
