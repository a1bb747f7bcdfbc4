"""The long-term tier in a bucket, over a server that keeps to the letter and fails as planned: GCS-1 … GCS-8.

What every long-term tier has to do is in ``contracts/``, over this server and over an emulator; here is what only a
bucket can do or suffer.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import google_crc32c
import pytest

from consumer.errors import BackendError, BackendUnavailable, ConfigError, InvalidMetadata, ReferenceFailure
from consumer.ids import ObjectContext, ObjectId
from consumer.metrics import Counts
from consumer.operations import Metadata, StoredObject, TimeToIdle, TimeToLive
from consumer.retry import RetryPolicy
from consumer.storage import gcs, gcs_client
from consumer.storage.backend import CopySource, Revision
from consumer.storage.gcs import GATHER_BYTES, WHOLE_BYTES, GcsBackend
from consumer.storage.memory import MemoryBackend
from consumer.storage.tiered import TieredStorage
from strict_gcs import StrictGcs

NOON = datetime(2026, 1, 1, 12, 0, 0, 5, tzinfo=UTC)
REVISION = Revision("usecase/org.17/objects/key/018f2d3a-0000-7000-8000-000000000001")
NAME = f"tier/{REVISION.name}"
QUARTER = 256 * 1024
LARGE = b"a" * GATHER_BYTES + b"b" * GATHER_BYTES + b"rest"
"""Two pieces that are not the last one, and the last one."""


class Clock:
    """A wall clock that stands still."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many attempts as always, without the time between them."""
    monkeypatch.setattr(gcs_client, "RETRIES", RetryPolicy(attempts=3, initial_seconds=0.0, max_seconds=0.0))


@pytest.fixture
def clock() -> Clock:
    """The time of this test."""
    return Clock()


@pytest.fixture
async def tier(strict_gcs: StrictGcs, clock: Clock) -> AsyncIterator[GcsBackend]:
    """A tier in an empty bucket."""
    backend = GcsBackend("bucket", endpoint=strict_gcs.endpoint, prefix="tier/", clock=clock)
    yield backend
    strict_gcs.release()
    await backend.join()
    await backend.close()


async def stream(payload: bytes, size: int = 700_001) -> AsyncIterator[bytes]:
    """Give *payload* in chunks that fit nothing."""
    for start in range(0, len(payload), size):
        yield payload[start : start + size]


def impatient(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.3) -> None:
    """Wait for an answer only so long."""
    monkeypatch.setattr(gcs, "REQUEST_TIMEOUT", (5.0, seconds))
    monkeypatch.setattr(gcs, "_COPY_TIMEOUT", (5.0, seconds))
    monkeypatch.setattr(gcs_client, "REQUEST_TIMEOUT", (5.0, seconds))


async def begun_to_stall(server: StrictGcs) -> None:
    """Wait until a request stalls."""
    assert await asyncio.to_thread(server.stalled.acquire, timeout=20)


class TestForm:
    """What lies in the bucket: it is kept for years, and other tools read it."""

    async def test_metadata_has_its_places(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """GCS-1, MD-7, MD-8, MD-9: pairs, content type, content encoding, custom time; no size."""
        metadata = Metadata(
            content_type="text/plain; charset=utf-8",
            expiration=TimeToIdle(3600),
            compression="zstd",
            filename="naïve.txt",
            origin="203.0.113.7",
            custom={"Case": "ünï", "": "empty name", "empty": ""},
            time_created=NOON,
            time_expires=NOON + timedelta(hours=1),
            size=7,
        )
        await tier.put(REVISION, metadata, b"payload")

        stored = strict_gcs.bucket("bucket")[NAME]
        assert stored.payload == b"payload"
        assert stored.fields == {
            "contentType": "text/plain; charset=utf-8",
            "contentEncoding": "zstd",
            "customTime": "2026-01-01T13:00:00.000005Z",
            "metadata": {
                "x-sn-expiration": "tti:3600s",
                "x-sn-filename": "naïve.txt",
                "x-sn-origin": "203.0.113.7",
                "x-sn-time-created": "2026-01-01T12:00:00.000005Z",
                "x-sn-time-expires": "2026-01-01T13:00:00.000005Z",
                "x-snme-Case": "ünï",
                "x-snme-": "empty name",
                "x-snme-empty": "",
            },
        }
        assert await tier.get(REVISION) == StoredObject(metadata, b"payload")

    async def test_a_resumable_upload_has_the_same_form(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """GCS-1."""
        metadata = Metadata("image/png", TimeToLive(60), compression="zstd", time_expires=NOON + timedelta(minutes=1))
        await tier.put(REVISION, metadata, b"x")
        whole = strict_gcs.bucket("bucket").pop(NAME)
        await tier.put(REVISION, metadata, stream(LARGE))

        assert strict_gcs.bucket("bucket")[NAME].fields == whole.fields

    async def test_an_object_that_does_not_expire_has_no_custom_time(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """GCS-1: the lifecycle rule must never find it."""
        await tier.put(REVISION, Metadata(), b"x")

        assert strict_gcs.bucket("bucket")[NAME].fields == {"contentType": "application/octet-stream"}

    @pytest.mark.parametrize(("encoding", "payload"), [("gzip", gzip.compress(b"text")), ("zstd", b"not even zstd")])
    async def test_payloads_come_back_as_they_were_stored(
        self, tier: GcsBackend, encoding: str, payload: bytes
    ) -> None:
        """GCS-8: nobody decompresses on the way, neither the service nor the client."""
        await tier.put(REVISION, Metadata(compression=encoding), payload)

        found = await tier.get(REVISION)
        assert found is not None
        assert (found.payload, found.metadata.size) == (payload, len(payload))

    async def test_all_the_metadata_an_operation_may_have_fits(self, tier: GcsBackend) -> None:
        """Contract 2.1: 64 pairs and 7 KiB."""
        custom = {f"{number:03}": "v" * 109 for number in range(64)}
        metadata = Metadata(expiration=TimeToIdle(315_360_000), custom=custom, time_created=NOON, time_expires=NOON)
        metadata.validate()
        assert sum(len(name) + len(text) for name, text in custom.items()) == 7 * 1024
        await tier.put(REVISION, metadata, b"x")

    async def test_metadata_that_does_not_fit_is_refused_before_anything_is_sent(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """The service takes 8 KiB."""
        with pytest.raises(InvalidMetadata):
            await tier.put(REVISION, Metadata(filename="x" * 8200), b"x")
        assert not strict_gcs.requests

    @pytest.mark.parametrize(("prefix", "name"), [("", ".."), ("", ""), ("tier/", "x" * 1020)])
    async def test_what_is_no_name_of_an_object_is_refused(self, strict_gcs: StrictGcs, prefix: str, name: str) -> None:
        backend = GcsBackend("bucket", endpoint=strict_gcs.endpoint, prefix=prefix)
        with pytest.raises(BackendError):
            await backend.put(Revision(name), Metadata(), b"x")
        await backend.close()
        assert not strict_gcs.requests

    async def test_a_scan_goes_page_by_page_below_the_prefix_and_survives_what_others_wrote(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """None twice, none left out; a page that fails is asked for again; the unreadable has not expired."""
        monkeypatch.setattr(gcs, "SCAN_OBJECTS", 3)
        for number in range(8):
            await tier.put(Revision(f"r/{number}"), Metadata(), b"x")
        other = GcsBackend("bucket", endpoint=strict_gcs.endpoint, prefix="other/")
        await other.put(Revision("r"), Metadata(), b"x")
        await other.close()
        strict_gcs.bucket("bucket")["tier/r/3"].fields["metadata"] = {"x-sn-time-expires": "some day"}
        strict_gcs.plan("list", after=1, status=503)

        assert [revision.name async for revision in tier.scan_revisions()] == [f"r/{number}" for number in range(8)]
        assert strict_gcs.kinds().count("list") == 4


class TestUpload:
    """A put is whole or not there, once."""

    async def test_a_small_one_is_one_request_on_the_condition_that_there_is_none(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        await tier.put(REVISION, Metadata(), b"x" * WHOLE_BYTES)
        await tier.put(Revision("other"), Metadata(), stream(b"x" * GATHER_BYTES))

        assert strict_gcs.kinds() == ["insert", "insert"]
        assert [params["ifGenerationMatch"] for _, params in strict_gcs.requests] == ["0", "0"]

    async def test_a_large_one_is_sent_in_pieces_and_appears_at_the_end(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """TIER-16; and what has been taken from the iterator is never far ahead of what has been sent."""
        chunk = b"c" * 300_000
        ahead = 0

        async def watched() -> AsyncIterator[bytes]:
            nonlocal ahead
            for number in range(40):
                yield chunk
                sent = sum(len(session.arrived) for session in strict_gcs._sessions.values())
                ahead = max(ahead, (number + 1) * len(chunk) - sent)
                assert not strict_gcs.bucket("bucket")

        assert await tier.put(REVISION, Metadata(), watched()) == 40 * len(chunk)

        assert strict_gcs.kinds() == ["begin", *["piece"] * 6]
        assert strict_gcs.requests[0][1]["ifGenerationMatch"] == "0"
        assert strict_gcs.bucket("bucket")[NAME].payload == chunk * 40
        assert ahead <= GATHER_BYTES + 2 * len(chunk)

    async def test_a_large_one_given_whole_is_sent_in_pieces(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        payload = b"p" * WHOLE_BYTES * 2
        assert await tier.put(REVISION, Metadata(), payload + b"!") == len(payload) + 1
        assert await tier.put(Revision("even"), Metadata(), payload) == len(payload)

        assert strict_gcs.kinds() == ["begin", *["piece"] * 3, "begin", *["piece"] * 2]
        assert strict_gcs.bucket("bucket")[NAME].payload == payload + b"!"
        assert strict_gcs.bucket("bucket")["tier/even"].payload == payload

    @pytest.mark.parametrize("fault", [{"status": 503}, {"before": True}, {"after_effect": True}], ids=str)
    async def test_a_small_upload_that_fails_in_passing_is_repeated(
        self, tier: GcsBackend, strict_gcs: StrictGcs, fault: Any
    ) -> None:
        """GCS-4, GCS-5: the payload is at hand. After a lost answer the 412 is recognised as our own success."""
        strict_gcs.plan("insert", times=2, **fault)

        assert await tier.put(REVISION, Metadata(), b"payload") == 7
        assert await tier.get(REVISION) == StoredObject(Metadata(size=7), b"payload")

    @pytest.mark.parametrize("at", [0, 1, 2], ids=["first", "second", "last"])
    @pytest.mark.parametrize(
        "fault",
        [{"status": 503}, {"status": 429}, {"before": True}, {"after_effect": True}, {"keep": 0}, {"keep": QUARTER}],
        ids=str,
    )
    async def test_a_piece_that_fails_in_passing_goes_on_from_what_has_arrived(
        self, tier: GcsBackend, strict_gcs: StrictGcs, at: int, fault: Any
    ) -> None:
        """GCS-5: of the stream, one piece is at hand, and that is enough."""
        payload = LARGE[: 2 * GATHER_BYTES] + b"c" * (QUARTER + 5)
        strict_gcs.plan("piece", after=at, **fault)

        assert await tier.put(REVISION, Metadata(), stream(payload)) == len(payload)
        assert strict_gcs.bucket("bucket")[NAME].payload == payload

    async def test_an_upload_whose_state_cannot_be_asked_for_is_asked_again(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        strict_gcs.plan("piece", after=2, after_effect=True)
        strict_gcs.plan("ask", status=503)

        assert await tier.put(REVISION, Metadata(), stream(LARGE)) == len(LARGE)
        assert strict_gcs.kinds() == ["begin", *["piece"] * 3, "ask", "ask"]

    async def test_a_piece_that_keeps_failing_ends_the_put_and_the_upload(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """GCS-4: three attempts; whoever called may begin anew under another name."""
        strict_gcs.plan("piece", times=3, status=503)

        with pytest.raises(BackendUnavailable):
            await tier.put(REVISION, Metadata(), stream(LARGE))
        await tier.join()
        assert strict_gcs.kinds() == ["begin", "piece", "ask", "piece", "ask", "piece", "cancel"]
        assert not strict_gcs.bucket("bucket")

    @pytest.mark.parametrize("at", [1, 2], ids=["in the middle", "at the end"])
    async def test_an_upload_that_the_service_gave_up_is_unavailable_at_once(
        self, tier: GcsBackend, strict_gcs: StrictGcs, at: int
    ) -> None:
        """What was sent before is lost and not at hand: no attempt at the same upload can succeed."""
        strict_gcs.plan("piece", after=at, forget=True)

        with pytest.raises(BackendUnavailable):
            await tier.put(REVISION, Metadata(), stream(LARGE))
        await tier.join()
        looked = ["find"] if at == 2 else []  # after the last piece, the object could be there
        assert strict_gcs.kinds() == ["begin", *["piece"] * (at + 1), *looked, "cancel"]
        assert not strict_gcs.bucket("bucket")

    async def test_an_upload_of_which_a_part_was_lost_is_unavailable_at_once(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """What had arrived is not at hand any more."""
        strict_gcs.plan("piece", after=1, lose=True)

        with pytest.raises(BackendUnavailable, match="lost a part"):
            await tier.put(REVISION, Metadata(), stream(LARGE))
        assert strict_gcs.kinds().count("piece") == 2

    async def test_an_upload_that_does_not_get_on_is_given_up(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """A service that takes nothing, and says so politely, would be asked for ever."""
        strict_gcs.plan("piece", times=50, keep=0)

        with pytest.raises(BackendUnavailable, match="does not get on"):
            await tier.put(REVISION, Metadata(), stream(LARGE))
        assert strict_gcs.kinds().count("piece") == 3

    async def test_an_upload_forgotten_because_it_is_finished_is_a_success(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """The answer to the last piece is lost, and nobody knows the upload any more: the object itself tells."""
        strict_gcs.plan("piece", after=2, after_effect=True)
        strict_gcs.plan("ask", forget=True)

        assert await tier.put(REVISION, Metadata(), stream(LARGE)) == len(LARGE)
        assert strict_gcs.kinds()[-2:] == ["ask", "find"]

    async def test_a_retry_from_the_start_finds_what_the_first_attempt_left(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """412 at the beginning: the payload is read, compared, and sent nowhere."""
        await tier.put(REVISION, Metadata(), stream(LARGE))
        before = len(strict_gcs.requests)

        assert await tier.put(REVISION, Metadata(), stream(LARGE)) == len(LARGE)
        assert strict_gcs.kinds()[before:] == ["begin", "find"]

    async def test_the_first_attempt_may_finish_in_the_middle_of_the_second(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """412 at the end."""

        async def overtaken() -> AsyncIterator[bytes]:
            yield LARGE[:-1]
            await tier.put(REVISION, Metadata(), stream(LARGE))
            yield LARGE[-1:]

        assert await tier.put(REVISION, Metadata(), overtaken()) == len(LARGE)
        assert strict_gcs.bucket("bucket")[NAME].payload == LARGE

    @pytest.mark.parametrize("payload", [b"other", LARGE[:-1] + b"!"], ids=["small", "large"])
    async def test_another_payload_under_the_same_name_is_an_error(
        self, tier: GcsBackend, strict_gcs: StrictGcs, payload: bytes
    ) -> None:
        """A name stands for one payload; nothing is overwritten, and trying again would not help."""
        await tier.put(REVISION, Metadata(), stream(LARGE))

        with pytest.raises(BackendError, match="another payload"):
            await tier.put(REVISION, Metadata(), stream(payload))
        assert strict_gcs.bucket("bucket")[NAME].payload == LARGE

    async def test_what_was_damaged_on_its_way_is_refused_by_the_service_and_sent_again(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """The CRC-32C goes along."""
        strict_gcs.plan("insert", damage=True)
        payload = bytes(100_000)  # long enough that the bit is one of the payload's

        assert await tier.put(REVISION, Metadata(), payload) == len(payload)
        assert strict_gcs.kinds() == ["insert", "insert"]
        assert strict_gcs.bucket("bucket")[NAME].payload == payload

    @pytest.mark.parametrize("at", [0, 2], ids=["first", "last"])
    async def test_a_piece_damaged_on_its_way_is_noticed_at_the_end(
        self, tier: GcsBackend, strict_gcs: StrictGcs, at: int
    ) -> None:
        """The CRC-32C of all goes along with the last piece."""
        strict_gcs.plan("piece", after=at, damage=True)

        with pytest.raises(BackendUnavailable):
            await tier.put(REVISION, Metadata(), stream(LARGE))
        assert "delete" not in strict_gcs.kinds(), "the service refuses it, and nobody ever sees it"
        assert not strict_gcs.bucket("bucket")

    @pytest.mark.parametrize(("kind", "payload"), [("insert", b"small"), ("piece", LARGE)], ids=["small", "large"])
    async def test_what_the_service_stored_wrongly_does_not_stay(
        self, tier: GcsBackend, strict_gcs: StrictGcs, kind: Any, payload: bytes
    ) -> None:
        """Size and CRC-32C in its answer are compared too."""
        strict_gcs.plan(kind, after=0 if kind == "insert" else 2, times=3, lie=True)

        with pytest.raises(BackendUnavailable, match="what arrived is not what was sent"):
            await tier.put(REVISION, Metadata(), stream(payload))
        assert not strict_gcs.bucket("bucket")

    async def test_an_iterator_that_fails_leaves_nothing_and_calls_the_upload_off(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """SIZ-5, ERR-3: the error passes on as the object it is."""
        error = RuntimeError("the client went away")

        async def failing() -> AsyncIterator[bytes]:
            yield LARGE
            raise error

        with pytest.raises(RuntimeError) as raised:
            await tier.put(REVISION, Metadata(), failing())
        await tier.join()

        assert raised.value is error
        assert strict_gcs.kinds() == ["begin", "piece", "piece", "cancel"]
        assert not strict_gcs.bucket("bucket")
        assert not strict_gcs._sessions

    @pytest.mark.parametrize("fault", [{"status": 503}, {"after_effect": True}], ids=str)
    async def test_an_upload_that_cannot_be_called_off_is_left_to_expire(
        self, tier: GcsBackend, strict_gcs: StrictGcs, fault: Any
    ) -> None:
        strict_gcs.plan("piece", times=3, status=503)
        strict_gcs.plan("cancel", **fault)

        with pytest.raises(BackendUnavailable):
            await tier.put(REVISION, Metadata(), stream(LARGE))
        await tier.join()
        assert strict_gcs.kinds().count("cancel") == 1


class TestDelete:
    """Nothing appears after a delete that has returned (TIER-18)."""

    async def test_the_request_a_cancelled_put_has_running_is_waited_for(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A thread cannot be stopped: the put ends, its request does not, and the delete comes after it."""
        monkeypatch.setattr(gcs_client, "SETTLE_SECONDS", 0.01)
        strict_gcs.plan("insert", stall=True)
        putting = asyncio.create_task(tier.put(REVISION, Metadata(), b"late"))
        await begun_to_stall(strict_gcs)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting

        deleting = asyncio.create_task(tier.delete(REVISION))
        await asyncio.wait({deleting}, timeout=0.2)
        assert not deleting.done()
        strict_gcs.release()
        await deleting

        assert strict_gcs.kinds() == ["insert", "delete"]
        assert not strict_gcs.bucket("bucket")
        assert not tier._uploads

    async def test_a_request_that_does_not_end_keeps_the_delete_from_succeeding(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is tried again later: clean-up keeps the entry in the change log."""
        monkeypatch.setattr(gcs_client, "SETTLE_SECONDS", 0.01)
        monkeypatch.setattr(gcs, "STEP_SECONDS", 0.1)
        strict_gcs.plan("insert", stall=True)
        putting = asyncio.create_task(tier.put(REVISION, Metadata(), b"late"))
        await begun_to_stall(strict_gcs)
        putting.cancel()
        await asyncio.wait({putting})

        with pytest.raises(BackendUnavailable, match="still being written"):
            await tier.delete(REVISION)
        assert "delete" not in strict_gcs.kinds()
        monkeypatch.setattr(gcs, "STEP_SECONDS", 60.0)
        strict_gcs.release()
        await tier.delete(REVISION)
        assert not strict_gcs.bucket("bucket")

    @pytest.mark.parametrize("retried", [True, False], ids=["a retry succeeded", "no retry succeeded"])
    async def test_a_request_without_answer_finds_the_name_taken_when_it_arrives_late(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch, retried: bool
    ) -> None:
        """An empty object that has expired takes its place; the lifecycle rule removes that one."""
        impatient(monkeypatch)
        strict_gcs.plan("insert", times=1 if retried else 3, stall=True)
        if retried:
            await tier.put(REVISION, Metadata(), b"payload")
        else:
            with pytest.raises(BackendUnavailable):
                await tier.put(REVISION, Metadata(), b"payload")

        await tier.delete(REVISION)
        strict_gcs.release()
        await asyncio.to_thread(strict_gcs.idle)

        assert await tier.get(REVISION) is None
        assert await tier.head(REVISION) is None
        assert [revision async for revision in tier.scan_revisions()] == []
        stored = strict_gcs.bucket("bucket")[NAME]
        assert stored.payload == b""
        assert stored.fields["customTime"] == "2026-01-01T12:00:00.000005Z"
        await tier.delete(REVISION)
        assert await tier.head(REVISION) is None

    async def test_a_put_still_at_work_counts_too(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """It has had a request without answer, and has not ended yet."""
        strict_gcs.plan("piece", after_effect=True)

        async def interrupted() -> AsyncIterator[bytes]:
            yield LARGE
            await tier.delete(REVISION)

        with pytest.raises(BackendUnavailable, match="deleted while it was written"):
            await tier.put(REVISION, Metadata(), interrupted())
        assert strict_gcs.bucket("bucket")[NAME].payload == b""
        assert await tier.head(REVISION) is None

    async def test_a_put_that_finds_what_a_delete_has_left_in_its_place_may_be_tried_anew(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """Clean-up after a member that was taken for dead: no fault of the object, nor of the storage."""
        strict_gcs.plan("insert", times=3, before=True)
        with pytest.raises(BackendUnavailable):
            await tier.put(REVISION, Metadata(), b"payload")
        await tier.delete(REVISION)
        assert strict_gcs.bucket("bucket")[NAME].payload == b""

        with pytest.raises(BackendUnavailable, match="deleted while it was written"):
            await tier.put(REVISION, Metadata(), b"payload")

    async def test_an_answered_request_leaves_nothing_to_be_replaced(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        strict_gcs.plan("insert", times=2, status=503)
        await tier.put(REVISION, Metadata(), b"payload")
        await tier.delete(REVISION)

        assert not strict_gcs.bucket("bucket")

    async def test_what_is_repeated_is_counted(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """MET-12: by tier and operation, each attempt after the first."""
        counts = Counts()
        storage = TieredStorage(MemoryBackend(), tier, threshold=1, observer=counts)
        object_id = ObjectId(ObjectContext("u"), "k")
        strict_gcs.plan("insert", times=2, status=503)
        await storage.put(object_id, Metadata(), b"payload")
        strict_gcs.plan("find", status=503)
        assert await storage.head(object_id) is not None
        await storage.put(object_id, Metadata(), b"payload")
        await storage.join()

        assert [counts.requests("long_term", name).retries for name in ("put", "head", "delete")] == [2, 1, 0]

    async def test_what_may_still_arrive_is_forgotten_after_an_hour(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And never more than so many are remembered."""
        monkeypatch.setattr(gcs, "UNANSWERED_MAX", 2)
        for number in range(4):
            strict_gcs.plan("insert", after_effect=True)
            await tier.put(Revision(str(number)), Metadata(), b"x")
        assert list(tier._unanswered) == ["tier/2", "tier/3"]

        monkeypatch.setattr(gcs, "UNANSWERED_MAX", 100)
        monkeypatch.setattr("time.monotonic", lambda: max(tier._unanswered.values()) + 1)
        strict_gcs.plan("insert", after_effect=True)
        await tier.put(Revision("4"), Metadata(), b"x")
        assert list(tier._unanswered) == ["tier/4"]

    async def test_a_put_between_two_pieces_is_called_off(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """It sends nothing more, and its upload is given up."""

        async def interrupted() -> AsyncIterator[bytes]:
            yield LARGE
            await tier.delete(REVISION)
            yield LARGE

        with pytest.raises(BackendUnavailable, match="deleted while it was written"):
            await tier.put(REVISION, Metadata(), interrupted())
        await tier.join()
        assert strict_gcs.kinds() == ["begin", "piece", "piece", "delete", "cancel"]
        assert not strict_gcs.bucket("bucket")

    @pytest.mark.parametrize("fault", [{"status": 429}, {"before": True}, {"after_effect": True}], ids=str)
    async def test_a_delete_that_fails_in_passing_is_repeated(
        self, tier: GcsBackend, strict_gcs: StrictGcs, fault: Any
    ) -> None:
        """GCS-6: after a lost answer there is nothing to delete, and that is a success."""
        await tier.put(REVISION, Metadata(), b"x")
        strict_gcs.plan("delete", times=2, **fault)
        await tier.delete(REVISION)

        assert not strict_gcs.bucket("bucket")


class TestRead:
    """What is read is what was stored, or an error."""

    async def test_a_large_object_is_read_in_pieces_of_one_generation(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gcs, "PIECE_BYTES", 1000)
        payload = bytes(range(256)) * 14
        await tier.put(REVISION, Metadata(), payload)
        found = await tier.get(REVISION)

        assert found is not None
        assert found.payload == payload
        assert strict_gcs.kinds()[1:] == ["find", *["media"] * 4]
        generation = str(strict_gcs.bucket("bucket")[NAME].generation)
        assert {params["generation"] for kind, params in strict_gcs.requests if kind == "media"} == {generation}

    @pytest.mark.parametrize(
        "fault", [{"status": 503}, {"before": True}, {"truncate": True}, {"damage": True}], ids=str
    )
    async def test_a_read_that_fails_in_passing_is_repeated(
        self, tier: GcsBackend, strict_gcs: StrictGcs, fault: Any
    ) -> None:
        """GCS-4; an answer cut short or damaged is never taken for the payload."""
        await tier.put(REVISION, Metadata(), b"payload")
        strict_gcs.plan("media", **fault)

        assert await tier.get(REVISION) == StoredObject(Metadata(size=7), b"payload")
        assert strict_gcs.kinds().count("media") == 2

    async def test_a_payload_damaged_for_good_is_an_error(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """The CRC-32C is compared on the way back too."""
        await tier.put(REVISION, Metadata(), b"payload")
        strict_gcs.plan("media", times=2, damage=True)

        with pytest.raises(BackendError, match="checksum"):
            await tier.get(REVISION)

    async def test_answers_always_cut_short_are_unavailable(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        await tier.put(REVISION, Metadata(), b"payload")
        strict_gcs.plan("media", times=3, truncate=True)

        with pytest.raises(BackendUnavailable):
            await tier.get(REVISION)

    async def test_an_answer_shorter_than_asked_for_is_not_taken_for_the_payload(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """Also where the answer itself is whole."""
        await tier.put(REVISION, Metadata(), b"payload")
        strict_gcs.plan("media", times=3, short=True)

        with pytest.raises(BackendUnavailable, match="cut short"):
            await tier.get(REVISION)

    async def test_an_answer_longer_than_asked_for_is_not_taken_in(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that ignores ranges cannot fill the memory."""
        monkeypatch.setattr(gcs, "PIECE_BYTES", 1000)
        await tier.put(REVISION, Metadata(), bytes(5000))
        strict_gcs.plan("media", times=3, whole=True)

        with pytest.raises(BackendUnavailable, match="longer than asked for"):
            await tier.get(REVISION)

    async def test_an_object_deleted_while_it_is_read_is_absent(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """TIER-11 needs a clear answer here."""
        await tier.put(REVISION, Metadata(), b"payload")
        strict_gcs.plan("media", status=404)

        assert await tier.get(REVISION) is None

    async def test_an_empty_object_needs_no_second_request(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """GCS-7: no range that cannot be satisfied is ever asked for."""
        await tier.put(REVISION, Metadata(), b"")

        assert await tier.get(REVISION) == StoredObject(Metadata(size=0), b"")
        assert strict_gcs.kinds() == ["insert", "find"]

    async def test_a_range_that_cannot_be_satisfied_is_an_error(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """GCS-7: it would not be satisfied the next time."""
        await tier.put(REVISION, Metadata(), b"payload")
        strict_gcs.plan("media", status=416)

        with pytest.raises(BackendError, match="gcs: 416"):
            await tier.get(REVISION)

    async def test_metadata_of_a_newer_version_is_refused(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        await tier.put(REVISION, Metadata(), b"payload")
        strict_gcs.bucket("bucket")[NAME].fields["metadata"] = {"x-sn-version": "2"}

        with pytest.raises(BackendError, match="newer version"):
            await tier.head(REVISION)


class TestExtend:
    """A later expiry (GCS-3)."""

    async def test_custom_time_moves_with_the_expiry(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """Else the lifecycle rule would delete what lives on. Everything else stays."""
        metadata = Metadata(
            expiration=TimeToIdle(60), custom={"a": "b"}, time_expires=NOON + timedelta(seconds=60), size=1
        )
        await tier.put(REVISION, metadata, b"x")
        extended = replace(metadata, time_expires=NOON + timedelta(seconds=90))
        await tier.extend(REVISION, extended)

        stored = strict_gcs.bucket("bucket")[NAME]
        assert stored.fields["customTime"] == "2026-01-01T12:01:30.000005Z"
        assert await tier.get(REVISION) == StoredObject(extended, b"x")
        _, params = strict_gcs.requests[-3]
        assert (params["ifGenerationMatch"], params["ifMetagenerationMatch"]) == (str(stored.generation), "1")

    async def test_an_earlier_expiry_is_ignored(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """Custom time cannot go back; of two extensions that race, the later one counts."""
        metadata = Metadata(expiration=TimeToIdle(60), time_expires=NOON + timedelta(seconds=60), size=1)
        await tier.put(REVISION, metadata, b"x")
        await tier.extend(REVISION, replace(metadata, time_expires=NOON + timedelta(seconds=59)))
        await tier.extend(REVISION, replace(metadata, time_expires=None))

        assert await tier.head(REVISION) == metadata
        assert "patch" not in strict_gcs.kinds()

    @pytest.mark.parametrize("status", [404, 412])
    async def test_an_extension_that_loses_a_race_is_forgotten(
        self, tier: GcsBackend, strict_gcs: StrictGcs, status: int
    ) -> None:
        """Best effort."""
        metadata = Metadata(expiration=TimeToIdle(60), time_expires=NOON + timedelta(seconds=60), size=1)
        await tier.put(REVISION, metadata, b"x")
        strict_gcs.plan("patch", status=status)
        await tier.extend(REVISION, replace(metadata, time_expires=NOON + timedelta(seconds=90)))

        assert await tier.head(REVISION) == metadata


class TestCopy:
    """A payload that lies in the same service is copied there: no byte of it passes through here."""

    @staticmethod
    def source(server: StrictGcs, payload: bytes = b"payload") -> CopySource:
        """Put an object into another bucket and return where it lies."""
        fields = {"name": "in/x", "contentType": "video/mp4", "metadata": {"theirs": "not ours"}}
        server.bucket("uploads")
        made = server.store("uploads", fields, payload, {}, None)
        crc32c = google_crc32c.value(payload)
        return CopySource(server.endpoint, "uploads", "in/x", int(made["generation"]), len(payload), crc32c)

    @dataclass
    class Elsewhere:
        """A payload that says where it lies; reading it is a mistake."""

        copy_source: CopySource

        def __aiter__(self) -> AsyncIterator[bytes]:
            raise AssertionError("the payload is read")

    @pytest.mark.parametrize("steps", [1, 3])
    async def test_the_service_copies_and_the_metadata_is_ours(
        self, tier: GcsBackend, strict_gcs: StrictGcs, steps: int
    ) -> None:
        """However many requests the service makes of it."""
        strict_gcs.rewrite_steps = steps
        source = self.source(strict_gcs)
        metadata = Metadata("text/plain", custom={"a": "b"}, time_expires=NOON + timedelta(hours=1))

        assert await tier.put(REVISION, metadata, self.Elsewhere(source)) == 7

        assert strict_gcs.kinds() == ["rewrite"] * steps
        params = strict_gcs.requests[-1][1]
        assert (params["ifGenerationMatch"], params["ifSourceGenerationMatch"]) == ("0", str(source.generation))
        assert await tier.get(REVISION) == StoredObject(replace(metadata, size=7), b"payload")

    @pytest.mark.parametrize("fault", [{"status": 503}, {"before": True}, {"after_effect": True}], ids=str)
    async def test_a_copy_that_fails_in_passing_is_repeated(
        self, tier: GcsBackend, strict_gcs: StrictGcs, fault: Any
    ) -> None:
        """After a lost answer the 412 is recognised as our own success."""
        strict_gcs.plan("rewrite", **fault)

        assert await tier.put(REVISION, Metadata(), self.Elsewhere(self.source(strict_gcs))) == 7
        assert strict_gcs.bucket("bucket")[NAME].payload == b"payload"

    async def test_a_source_replaced_meanwhile_is_not_copied(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """Whoever called opens the reference again, and finds out what it is now."""
        source = self.source(strict_gcs)
        self.source(strict_gcs, b"another")

        with pytest.raises((BackendUnavailable, ReferenceFailure)):
            await tier.put(REVISION, Metadata(), self.Elsewhere(source))
        assert not strict_gcs.bucket("bucket")

    async def test_a_source_that_is_gone_cannot_be_read(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        source = self.source(strict_gcs)
        strict_gcs.buckets["uploads"].clear()

        with pytest.raises(ReferenceFailure) as raised:
            await tier.put(REVISION, Metadata(), self.Elsewhere(source))
        assert raised.value.code == "reference_unreadable"

    async def test_a_copy_that_is_not_what_was_promised_does_not_stay(
        self, tier: GcsBackend, strict_gcs: StrictGcs
    ) -> None:
        """Size and CRC-32C of what the service has made are compared."""
        source = replace(self.source(strict_gcs), crc32c=1)

        with pytest.raises(BackendUnavailable, match="not what was copied"):
            await tier.put(REVISION, Metadata(), self.Elsewhere(source))
        assert not strict_gcs.bucket("bucket")

    async def test_a_payload_in_another_service_is_read(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """Its name would mean something else here."""

        class Foreign:
            copy_source = replace(self.source(strict_gcs), store="https://elsewhere.example")

            def __aiter__(self) -> AsyncIterator[bytes]:
                return stream(b"read")

        assert await tier.put(REVISION, Metadata(), Foreign()) == 4
        assert "rewrite" not in strict_gcs.kinds()


class TestOpen:
    """A bucket that cannot be used is noticed at start."""

    async def test_a_bucket_that_is_there_is_opened(self, tier: GcsBackend, strict_gcs: StrictGcs) -> None:
        """One listed object below the prefix: a right that the tier needs anyway, unlike that to look at buckets."""
        await tier.open()
        assert [(kind, params["prefix"], params["maxResults"]) for kind, params in strict_gcs.requests] == [
            ("list", "tier/", "1")
        ]

    async def test_a_bucket_that_is_not_there_is_a_configuration_error(self, strict_gcs: StrictGcs) -> None:
        backend = GcsBackend("absent", endpoint=strict_gcs.endpoint)
        with pytest.raises(ConfigError, match="there is no bucket absent"):
            await backend.open()
        with pytest.raises(BackendError):
            await backend.put(REVISION, Metadata(), b"x")
        with pytest.raises(BackendError):
            await anext(backend.scan_revisions())
        await backend.close()

    @pytest.mark.parametrize("status", [401, 403])
    async def test_missing_rights_are_a_permanent_fault(
        self, tier: GcsBackend, strict_gcs: StrictGcs, status: int
    ) -> None:
        strict_gcs.plan("list", status=status)
        with pytest.raises(BackendError):
            await tier.open()

    async def test_a_service_that_is_away_is_unavailable(self) -> None:
        backend = GcsBackend("bucket", endpoint="http://127.0.0.1:9")
        with pytest.raises(BackendUnavailable):
            await backend.open()
        await backend.close()


class TestDeadlines:
    """No request waits for ever."""

    @pytest.mark.parametrize(
        "kind", ["insert", "begin", "piece", "find", "media", "patch", "delete", "list", "rewrite"]
    )
    async def test_every_request_has_a_time_limit_and_three_attempts(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch, kind: Any
    ) -> None:
        """GCS-4: ours, and not the vendor's on top of them."""
        metadata = Metadata(expiration=TimeToIdle(60), time_expires=NOON + timedelta(seconds=60))
        await tier.put(REVISION, metadata, b"payload")
        source = TestCopy.source(strict_gcs)
        impatient(monkeypatch, 0.15)
        strict_gcs.plan(kind, times=3, stall=True)
        before = len(strict_gcs.requests)
        calls: dict[str, Any] = {
            "insert": lambda: tier.put(Revision("new"), Metadata(), b"x"),
            "begin": lambda: tier.put(Revision("new"), Metadata(), stream(LARGE)),
            "piece": lambda: tier.put(Revision("new"), Metadata(), stream(LARGE)),
            "find": lambda: tier.head(REVISION),
            "media": lambda: tier.get(REVISION),
            "patch": lambda: tier.extend(REVISION, replace(metadata, time_expires=NOON + timedelta(seconds=90))),
            "delete": lambda: tier.delete(REVISION),
            "list": tier.open,
            "rewrite": lambda: tier.put(Revision("new"), Metadata(), TestCopy.Elsewhere(source)),
        }
        with pytest.raises(BackendUnavailable, match="gcs: "):
            await calls[kind]()
        assert strict_gcs.kinds()[before:].count(kind) == 3

    async def test_looking_at_what_is_there_already_has_one_too(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It follows a 412 in the same step."""
        await tier.put(REVISION, Metadata(), b"payload")
        impatient(monkeypatch, 0.15)
        strict_gcs.plan("find", times=2, stall=True)
        strict_gcs.plan("find", status=503)

        with pytest.raises(BackendUnavailable, match="gcs: "):
            await tier.put(REVISION, Metadata(), b"payload")
        assert strict_gcs.kinds()[1:] == ["insert", "find"] * 3

    async def test_taking_a_name_has_one_too(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A delete that replaces."""
        strict_gcs.plan("insert", after_effect=True)
        await tier.put(REVISION, Metadata(), b"payload")
        impatient(monkeypatch, 0.15)
        strict_gcs.plan("insert", times=3, stall=True)
        before = len(strict_gcs.requests)

        with pytest.raises(BackendUnavailable, match="gcs: "):
            await tier.delete(REVISION)
        assert strict_gcs.kinds()[before:] == ["insert"] * 3

    async def test_calling_off_has_one_too_and_is_tried_once(
        self, tier: GcsBackend, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A join waits for it."""
        impatient(monkeypatch, 0.15)
        strict_gcs.plan("piece", times=3, status=503)
        strict_gcs.plan("cancel", stall=True)
        with pytest.raises(BackendUnavailable):
            await tier.put(REVISION, Metadata(), stream(LARGE))
        async with asyncio.timeout(20):
            await tier.join()
        assert strict_gcs.kinds().count("cancel") == 1


async def test_closing_waits_for_what_runs_and_refuses_what_comes(strict_gcs: StrictGcs) -> None:
    """No thread, no connection is left."""
    backend = GcsBackend("bucket", endpoint=strict_gcs.endpoint)
    strict_gcs.plan("insert", stall=True)
    putting = asyncio.create_task(backend.put(REVISION, Metadata(), b"x"))
    await begun_to_stall(strict_gcs)
    closing = asyncio.create_task(backend.close())
    await asyncio.wait({closing}, timeout=0.1)
    assert not closing.done()
    strict_gcs.release()
    await closing
    await putting

    with pytest.raises(BackendUnavailable, match="closed"):
        await backend.head(REVISION)
