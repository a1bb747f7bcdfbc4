"""The service with rows and change log in Bigtable and payloads in a bucket, on emulators: it keeps the same promises.

``TIERSTREAM_TEST_STORAGE=bigtable+gcs`` runs what else is end to end so.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from brokers import Broker
from clouds import Clouds
from load import PARTITIONS, PUMP_SECONDS, Load, check_nothing_is_committed_without_its_response, ends, read_back
from service_process import command_line
from stages import SetStage, Stage

pytestmark = [pytest.mark.emulator, pytest.mark.slow]

THRESHOLD = 10_000
"""Objects above it are large: both tiers are used by records that the embedded broker takes."""

NO_REFERENCES = {"in_responses": "never"}
"""Else what is replaced stays for those who were referred to it."""


def configuration(stage: Stage) -> str:
    """Return the name of a file with the configuration of the stage."""
    (stage.folder / "commands.yaml").write_text(json.dumps(stage.config), encoding="utf-8")
    return "commands.yaml"


def verified(stage: Stage) -> Any:
    """Return what ``tierstream storage verify`` finds."""
    done = command_line(
        "storage", "verify", "--json", "--min-age", "0s", "--config", configuration(stage), cwd=stage.folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_every_kind_of_operation_in_both_tiers(
    embedded: Broker, set_stage: SetStage, clouds: Clouds
) -> None:
    """BT, HV, TIER-14: stored, read back whole, replaced across the tiers, deleted; nothing is left over."""
    storage = {**clouds.storage(), "threshold": THRESHOLD}
    stage = set_stage(embedded, partitions=1, storage=storage, references=NO_REFERENCES)
    service = stage.start(partitions=1)
    ledger = stage.ledger
    small, large = b"s" * THRESHOLD, b"l" * (THRESHOLD + 1)
    sizes = [small, large, large + b"2", small + b"", large]
    before = set(ledger.entries)
    for payload in sizes:
        ledger.operate("insert", "k", payload, statuses={201}, custom={"a": "ü"}, wait=False)
        ledger.operate("get", "k", statuses={200}, wait=False)
        ledger.operate("head", "k", statuses={204}, wait=False)
    ledger.operate("insert", "expiring", b"x", statuses={201}, expiration={"policy": "tti", "seconds": 60}, wait=False)
    ledger.operate("get", "expiring", statuses={200}, wait=False)
    for key in ("k", "expiring", "k"):
        ledger.operate("delete", key, statuses={204}, wait=False)
    for kind in ("get", "head"):
        ledger.operate(kind, "k", statuses={404}, wait=False)
    ledger.operate("insert", "kept", large, statuses={201}, wait=False)
    ledger.flush()
    sent = [entry for name, entry in ledger.entries.items() if name not in before]

    answers = [ledger.answer([entry]) for entry in sent]

    assert [answer.result["object"]["payload"] for answer in answers[1:15:3]] == sizes
    assert {answer.result["metadata"]["size"] for answer in answers[2:15:3]} == {len(small), len(large), len(large) + 1}
    service.stop()
    report = verified(stage)
    assert (report["tombstones"], report["revisions"], report["changes"]) == (1, 1, 0)


@pytest.mark.timeout(90 + PUMP_SECONDS * 3)
def test_members_killed_under_load_are_taken_over_and_leave_nothing(
    apache: Broker, set_stage: SetStage, clouds: Clouds
) -> None:
    """I1, I5, I7, I8, LOG-14: two members over one table; one after the other dies, its work goes on, all is whole."""
    storage = {**clouds.storage(), "threshold": 40}  # all objects are large
    stage = set_stage(apache, partitions=PARTITIONS, storage=storage, references=NO_REFERENCES)
    ledger, load = stage.ledger, Load(stage.ledger)
    first = stage.start(partitions=PARTITIONS, name="first")
    committed: dict[int, int] = {}
    for name in ("second", "third"):
        joined = stage.start(name=name, ready=False)
        goal = len(ledger.answers) + 500
        load.pump(lambda goal=goal: len(ledger.answers) >= goal)  # type: ignore[misc]  # bound now, as it is called now
        load.put(4 * load.batch)
        first.kill()
        ledger.flush()
        committed = check_nothing_is_committed_without_its_response(stage, committed)
        first = joined
    first.wait_ready(PARTITIONS)
    ledger.wait_answered(seconds=120)
    read_back(load, 200)
    first.stop()
    # Every member cleans up after the dead, twice a minute; so does this, at once.
    assert command_line("storage", "recover", "--config", configuration(stage), cwd=stage.folder).returncode == 0
    check_nothing_is_committed_without_its_response(stage, committed)

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.mismatched) == ([], [])
    assert ledger.committed(stage.group) == {partition: ends(ledger)[partition] for partition in range(PARTITIONS)}
    report = verified(stage)
    assert (report["tombstones"], report["changes"]) == (report["revisions"], 0)
    assert report["tombstones"] > 100
