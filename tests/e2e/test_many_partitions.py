"""A hundred partitions on one member: all of them move, and memory stays within what the README says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from brokers import Broker
from service_process import ServiceProcess
from stages import SetStage

PARTITIONS = 100
RECORDS = 20_000
PAYLOAD_BYTES = 4096
MEMORY_MIB = 400
"""Generous: measured were 226 and 265 MiB, 73 of them before the first record. What may add to that is bounded by
``limits.in_flight_bytes``, 256 MiB."""


def memory_mib(service: ServiceProcess, field: str = "VmHWM") -> float:
    """Resident memory of the service in MiB: the most it ever had, or with ``VmRSS`` what it has now."""
    status = Path(f"/proc/{service.process.pid}/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_a_hundred_partitions_on_one_member_stay_within_the_stated_memory(
    broker: Broker, set_stage: SetStage
) -> None:
    """I1, contract 4, 8: each partition has a window and is worked off; nothing is missing, repeated or wrong."""
    stage = set_stage(broker, partitions=PARTITIONS, output_partitions=12)
    ledger = stage.ledger
    for number in range(RECORDS):  # a backlog, so that every partition has all it can take at once
        payload = number.to_bytes(4, "big") * (PAYLOAD_BYTES // 4)
        ledger.operate(
            "insert", f"k{number}", payload, statuses={201}, partition=number % PARTITIONS, wait=False
        )
    ledger.flush()

    service = stage.start(partitions=PARTITIONS)
    began = memory_mib(service, "VmRSS")
    windows = {number: entry["window"] for (_, number), entry in service.partitions().items()}
    ledger.wait_answered(seconds=200)
    service.wait(lambda: len(service.partitions()) == PARTITIONS and service.ready, "it to be well")
    most, now = memory_mib(service), memory_mib(service, "VmRSS")
    service.stop()
    ledger.read_all()

    print(f"{PARTITIONS} partitions: {began:.0f} MiB when ready, {most:.0f} MiB at most, {now:.0f} MiB in the end")
    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert len(windows) == PARTITIONS
    assert all(window >= 1 for window in windows.values()), windows
    assert sum(windows.values()) <= 500
    assert most < MEMORY_MIB
