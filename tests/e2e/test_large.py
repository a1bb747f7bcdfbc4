"""Big things: payloads by reference both ways, records that do not fit, and bytes that are bounded whatever comes."""

from __future__ import annotations

import re
import time
import uuid
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import google_crc32c
import pytest

from brokers import Broker, wait_until
from service_process import ServiceProcess
from stages import SetStage, Stage

pytestmark = pytest.mark.slow

MIB = 1_048_576

RESPONSE_BYTES = 100_000
"""Largest response here: payloads above it come by reference, inline objects (up to 1 MiB) among them."""


def fresh(name: str = "key") -> str:
    """An object key that no other test uses."""
    return f"{name}/{uuid.uuid4()}"


def noise(size: int) -> bytes:
    """Bytes that do not compress and differ everywhere."""
    return b"".join(zlib.crc32(b"%d" % number).to_bytes(4, "big") for number in range(-(-size // 4)))[:size]


def giving_references(set_stage: SetStage, broker: Broker, **references: Any) -> Stage:
    """A stage whose responses give references; what lies in its folder may be inserted by reference."""
    stage = set_stage(
        broker,
        limits={"response_bytes": RESPONSE_BYTES},
        references={"in_responses": "always", **references},
    )
    allowed = stage.config["references"]
    allowed["allowed_prefixes"] = [stage.folder.as_uri() + "/", stage.payloads.prefix]
    return stage


def upload(stage: Stage, payload: bytes) -> dict[str, Any]:
    """Write a file to be inserted by reference."""
    path = stage.folder / f"{uuid.uuid4()}.bin"
    path.write_bytes(payload)
    return {"uri": path.as_uri(), "size": len(payload), "crc32c": google_crc32c.value(payload)}


def referred(stage: Stage, answer: Any) -> tuple[bytes, dict[str, Any]]:
    """Return the payload that the answer to a get refers to, and the reference; checks what it says of the payload."""
    reference = answer.result["object"]["payload"]
    content = stage.payloads.read(reference["uri"])
    assert (reference["size"], reference["crc32c"]) == (len(content), google_crc32c.value(content))
    return content, reference


@pytest.mark.parametrize("size", [RESPONSE_BYTES, 900_000, MIB + 1, 3_000_000])
def test_a_payload_that_fits_no_response_is_given_by_reference(
    broker: Broker, set_stage: SetStage, size: int
) -> None:
    """Contract 5, OP-6: size and crc32c filled, from both tiers; and the reference can be inserted again."""
    stage = giving_references(set_stage, broker)
    stage.start(partitions=2)
    ledger, key, copy = stage.ledger, fresh("ключ #?%"), fresh()
    ledger.answer(ledger.operate("insert", key, upload(stage, noise(size)), content_type="text/x", statuses={201}))

    got = ledger.answer(ledger.operate("get", key, statuses={200}))
    payload, reference = referred(stage, got)
    ledger.answer(ledger.operate("insert", copy, reference, statuses={201}))
    again = ledger.answer(ledger.operate("get", copy, statuses={200}))

    assert payload == noise(size) == referred(stage, again)[0]
    assert (got.result["object"]["metadata"]["size"], reference["size"]) == (size, size)
    assert got.result["object"]["metadata"]["content_type"] == "text/x"
    copied = "responses/" in unquote(unquote(reference["uri"]))
    assert copied == (size <= MIB), "inline objects are copied, others are not"


def test_a_payload_that_fits_is_never_given_by_reference(broker: Broker, set_stage: SetStage) -> None:
    """The edge: what certainly fits, with everything else a response may have, comes inline."""
    stage = giving_references(set_stage, broker)
    stage.start(partitions=2)
    payload = noise(RESPONSE_BYTES - 3_500)
    key = fresh()
    stage.ledger.answer(stage.ledger.operate("insert", key, payload, statuses={201}))

    got = stage.ledger.answer(stage.ledger.operate("get", key, statuses={200}))

    assert got.result["object"]["payload"] == payload


def test_what_was_referred_to_outlives_its_object_for_the_retention_and_then_goes(
    apache: Broker, set_stage: SetStage
) -> None:
    """Contract 5, LOG-4: replaced and deleted revisions stay, through a kill too; nothing is left over in the end."""
    stage = giving_references(set_stage, apache, retention="20s")
    service = stage.start(partitions=2)
    ledger, replaced, deleted = stage.ledger, fresh("replaced"), fresh("deleted")
    uris = []
    for key in (replaced, deleted):
        ledger.answer(ledger.operate("insert", key, upload(stage, noise(MIB + 1)), statuses={201}))
        uris.append(referred(stage, ledger.answer(ledger.operate("get", key, statuses={200})))[1]["uri"])

    ledger.answer(ledger.operate("insert", replaced, b"small", statuses={201}))
    ledger.answer(ledger.operate("delete", deleted, statuses={204}))
    gone_at = time.monotonic()
    service.kill()
    stage.start(partitions=2)
    there = [stage.payloads.read(uri) == noise(MIB + 1) for uri in uris]

    assert there == [True, True] or time.monotonic() - gone_at > 20, "removed before the retention was over"
    there_still = stage.payloads.size
    wait_until(lambda: all(there_still(uri) is None for uri in uris), 90, "the revisions to be removed")
    assert time.monotonic() - gone_at >= 20
    service = stage.processes[-1]
    service.wait(lambda: service.state()["storage"]["change_log_entries"] == 0, "the change log to be empty")
    assert stage.payloads.sizes() == []


def test_another_base_may_stand_for_the_folder(broker: Broker, set_stage: SetStage) -> None:
    """`references.base_uri` replaces the file:// root; what follows is the path below it. Only a folder needs that."""
    stage = giving_references(set_stage, broker, base_uri="https://files.example/large")
    stage.config["storage"]["long_term"] = {"type": "filesystem", "path": str(stage.folder / "objects")}
    stage.start(partitions=2)
    key = fresh()
    stage.ledger.answer(stage.ledger.operate("insert", key, upload(stage, noise(MIB + 1)), statuses={201}))

    got = stage.ledger.answer(stage.ledger.operate("get", key, statuses={200}))

    path = unquote(got.result["object"]["payload"]["uri"].removeprefix("https://files.example/large/"))
    assert (stage.folder / "objects" / path).read_bytes() == noise(MIB + 1)


def peak_kib(service: ServiceProcess) -> int:
    """The most memory the process has had so far, in KiB."""
    status = Path(f"/proc/{service.process.pid}/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1])


@pytest.mark.timeout(240)
def test_a_referenced_payload_is_never_wholly_in_memory(broker: Broker, set_stage: SetStage) -> None:
    """Issue: streamed both ways. 256 MiB go in by reference and are referred to, within 48 MiB of memory more.

    The file is sparse, so that writing it costs nothing; its checksum is held against the one given all the same.
    """
    stage = giving_references(set_stage, broker)
    stage.config["retry"] = {"attempt_timeout": "120s"}
    service = stage.start(partitions=2)
    ledger, key, size = stage.ledger, fresh(), 256 * MIB
    path = stage.folder / "sparse"
    with path.open("wb") as file:
        file.truncate(size)
    crc32c = 0
    for _ in range(256):
        crc32c = google_crc32c.extend(crc32c, bytes(MIB))
    reference = {"uri": path.as_uri(), "size": size, "crc32c": crc32c}
    ledger.answer(ledger.operate("insert", fresh(), upload(stage, noise(2 * MIB)), statuses={201}))
    before = peak_kib(service)

    ledger.answer(ledger.operate("insert", key, {**reference, "crc32c": 1}, statuses={409}), seconds=200)
    ledger.answer(ledger.operate("head", key, statuses={404}))
    ledger.answer(ledger.operate("insert", key, reference, statuses={201}), seconds=200)
    got = ledger.answer(ledger.operate("get", key, statuses={200}), seconds=200)

    assert peak_kib(service) - before < 48 * 1024
    given = got.result["object"]["payload"]
    assert (given["size"], given["crc32c"]) == (size, crc32c)
    assert stage.payloads.size(given["uri"]) == size


def test_a_record_larger_than_a_fetch_is_answered_and_does_not_stop_its_partition(
    apache: Broker, set_stage: SetStage
) -> None:
    """H2: the topic takes records far above what one fetch of a partition asks for (record_bytes + 1 MiB).

    Apache Kafka gives such a record whole all the same; it is too large to be decoded, and kept as a dead letter.
    """
    stage = set_stage(apache, limits={"record_bytes": "100KB"})
    stage.start(partitions=2)
    ledger = stage.ledger
    around = [ledger.operate("insert", fresh(), noise(1000), statuses={201})]
    huge = ledger.operate("insert", fresh(), noise(5_000_000))
    ledger.entries[huge[0].id] = huge[0] = type(huge[0])(**{**vars(huge[0]), "kind": "unknown", "request_id": None})
    around += [ledger.operate("insert", fresh(), noise(1000), statuses={201}) for _ in range(3)]

    answer = ledger.answer(huge)
    for entries in around:
        ledger.answer(entries)

    assert (answer.status, answer.code, answer.response["request_id"]) == (413, "payload_too_large", None)
    assert ledger.wait_dead_letter(huge[0]).value == huge[0].value


@pytest.mark.timeout(180)
def test_one_huge_record_among_many_neither_stops_the_others_nor_is_stopped_by_them(
    apache: Broker, set_stage: SetStage
) -> None:
    """Contract 4: a byte budget that one record fills; reads wait for room on four partitions, and all get through.

    The budget is 1.5 MB: near it one record of 1.4 MB, above it one of 3 MB, which runs alone; each read reserves
    1 MiB.
    """
    stage = set_stage(
        apache,
        partitions=4,
        limits={"in_flight_bytes": "1500KB", "record_bytes": "1500KB", "response_bytes": RESPONSE_BYTES},
    )
    ledger = stage.ledger
    for round_ in range(3):
        for partition in range(4):
            for number in range(30):
                key = f"budget/{partition}/{number}"
                if round_ == 1 and number == 10 + partition:
                    size, statuses = (1_400_000, {201}) if partition % 2 else (3_000_000, {413})
                    sent = {} if partition % 2 else {"kind": "unknown", "request_id": None}
                    value = noise(size)
                    (entry,) = ledger.operate("insert", fresh("huge"), value, partition=partition, statuses=statuses)
                    ledger.entries[entry.id] = type(entry)(**{**vars(entry), **sent})
                elif round_:
                    ledger.operate("get", key, partition=partition, statuses={200}, wait=False)
                else:
                    ledger.operate("insert", key, noise(20_000), partition=partition, statuses={201}, wait=False)
    ledger.flush()
    service = stage.start(partitions=4)

    ledger.wait_answered(seconds=90)

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, [])
    service.wait(lambda: all(part["lag"] == 0 for part in service.partitions().values()), "everything to be committed")
    assert service.state()["in_flight_bytes"] == 0
