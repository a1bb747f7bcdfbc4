"""The service with its long-term tier in a bucket: on the strict server, and on an emulator others wrote.

A threshold of a few bytes sends nearly every object of the load to the bucket.
"""

from __future__ import annotations

from typing import Any

import google_crc32c
import pytest

from brokers import Broker
from gcs_servers import NewBucket
from load import PARTITIONS, PUMP_SECONDS, Load, check_nothing_is_committed_without_its_response, read_back
from stages import SetStage
from strict_gcs import StrictGcs

THRESHOLD = 35
"""The load's payloads are 30 bytes and more: its first hundred objects are small, all others large."""


@pytest.fixture(params=["strict", pytest.param("emulator", marks=pytest.mark.emulator)])
def long_term(request: Any) -> dict[str, str]:
    """Settings of a tier in an empty bucket of each server."""
    if request.param == "strict":
        server: StrictGcs = request.getfixturevalue("strict_gcs")
        return {"type": "gcs", "bucket": "bucket", "prefix": "tier/", "endpoint": server.endpoint}
    new_bucket: NewBucket = request.getfixturevalue("fake_gcs")
    endpoint, bucket = new_bucket()
    return {"type": "gcs", "bucket": bucket, "prefix": "tier/", "endpoint": endpoint}


@pytest.mark.slow
@pytest.mark.timeout(60 + 2 * PUMP_SECONDS)
def test_a_clean_stop_under_load_loses_and_repeats_nothing(
    broker: Broker, set_stage: SetStage, long_term: dict[str, str]
) -> None:
    """I1, I2, I7: whatever the tier, every response is there, once, right; what was acknowledged reads back."""
    stage = set_stage(broker, partitions=PARTITIONS, storage={"threshold": THRESHOLD, "long_term": long_term})
    ledger, load = stage.ledger, Load(stage.ledger)
    service = stage.start(partitions=PARTITIONS)
    load.put(25 * load.batch)
    ledger.flush()
    ledger.wait_answered(seconds=2 * PUMP_SECONDS)
    service.stop()
    service = stage.start(partitions=PARTITIONS)
    read_back(load, 100)
    service.stop()
    check_nothing_is_committed_without_its_response(stage, {})

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.mismatched, verdict.duplicated) == ([], [], {})


@pytest.mark.slow
@pytest.mark.timeout(60 + 3 * PUMP_SECONDS)
def test_a_kill_under_load_loses_nothing_and_leaves_no_orphan(
    apache: Broker, set_stage: SetStage, strict_gcs: StrictGcs
) -> None:
    """I1, I7, LOG: what the kill left half done in the bucket is removed by the next start."""
    long_term = {"type": "gcs", "bucket": "bucket", "prefix": "tier/", "endpoint": strict_gcs.endpoint}
    stage = set_stage(
        apache,
        partitions=PARTITIONS,
        storage={"threshold": THRESHOLD, "long_term": long_term},
        references={"in_responses": "never"},  # else what is replaced stays for those who were referred to it
    )
    stage.config["storage"]["change_log"] = stage.config["storage"]["change_log"] | {"owner": "pod-0"}
    ledger, load = stage.ledger, Load(stage.ledger)
    service = stage.start(partitions=PARTITIONS)
    load.pump(lambda: len(ledger.answers) >= 400)
    load.put(4 * load.batch)
    service.kill()
    ledger.flush()
    service = stage.start(partitions=PARTITIONS)
    ledger.wait_answered(seconds=60)
    read_back(load, 100)
    service.stop()
    committed = check_nothing_is_committed_without_its_response(stage, {})

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.mismatched) == ([], [])
    assert committed
    large = {key for _, key in load.kept if len(key.encode()) * 5 > THRESHOLD}
    in_bucket = [name.split("/objects/", 1)[1].rsplit("/", 1)[0] for name in strict_gcs.bucket("bucket")]
    assert sorted(in_bucket) == sorted(large), "each large object has one revision, and no other revision is there"


def test_a_reference_into_a_bucket_is_copied_there(broker: Broker, set_stage: SetStage, strict_gcs: StrictGcs) -> None:
    """Contract 2.1: an insert by reference; no byte of it passes through the service."""
    long_term = {"type": "gcs", "bucket": "bucket", "endpoint": strict_gcs.endpoint}
    stage = set_stage(broker, storage={"long_term": long_term}, references={"allowed_prefixes": ["gs://uploads/in/"]})
    payload = bytes(range(256)) * 8192
    strict_gcs.bucket("uploads")
    strict_gcs.store("uploads", {"name": "in/film", "contentType": "video/mp4"}, payload, {}, None)
    stage.start(partitions=2)
    good = {"uri": "gs://uploads/in/film", "size": len(payload), "crc32c": google_crc32c.value(payload)}
    answers = [
        stage.ledger.answer(stage.ledger.operate("insert", "film", reference, statuses={status}))
        for reference, status in (
            (good, 201),
            (good | {"size": 1}, 409),
            ({"uri": "gs://uploads/in/absent"}, 404),
            ({"uri": "gs://uploads/out/film"}, 403),
        )
    ]

    assert answers[0].result["metadata"]["size"] == len(payload)
    assert [stored.payload for stored in strict_gcs.bucket("bucket").values()] == [payload]
    assert "media" not in strict_gcs.kinds()
