"""Requests to Google Cloud Storage: threads, attempts, deadlines, errors as ours, and the sources of references."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any

import google.auth
import google_crc32c
import pytest
import requests
import urllib3
from google.api_core import exceptions as answers
from google.auth import exceptions as auth_errors
from google.cloud.storage import Blob
from google.cloud.storage.exceptions import InvalidResponse

from consumer.errors import BackendError, BackendUnavailable, ConfigError, ReferenceFailure
from consumer.ids import ObjectContext
from consumer.operations import Insert, Inserted, Metadata, PayloadReference
from consumer.references import References
from consumer.retry import RetryPolicy
from consumer.service import StorageService
from consumer.storage import gcs_client
from consumer.storage.backend import Revision
from consumer.storage.factory import make_bucket_reader
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.gcs import GcsBackend
from consumer.storage.gcs_client import (
    REFERENCE_PIECE_BYTES,
    Effect,
    GcsClient,
    NoAnswer,
    StartAnew,
    crc32c_number,
    crc32c_text,
    translate,
)
from consumer.storage.memory import MemoryBackend
from consumer.storage.tiered import TieredStorage
from strict_gcs import StrictGcs

LARGE = bytes(range(256)) * 5000


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many attempts as always, without the time between them."""
    monkeypatch.setattr(gcs_client, "RETRIES", RetryPolicy(attempts=3, initial_seconds=0.0, max_seconds=0.0))


@pytest.fixture
async def client(strict_gcs: StrictGcs) -> AsyncIterator[GcsClient]:
    """A client with two threads."""
    opened = GcsClient(strict_gcs.endpoint, threads=2)
    yield opened
    strict_gcs.release()
    await opened.close()


def upload(server: StrictGcs, payload: bytes, name: str = "in/x") -> PayloadReference:
    """Put an object where producers put theirs, and return a reference to it that says all about it."""
    server.bucket("uploads")
    server.store("uploads", {"name": name, "contentType": "video/mp4"}, payload, {}, None)
    return PayloadReference(f"gs://uploads/{name}", len(payload), google_crc32c.value(payload))


class TestErrors:
    """Every fault of the vendor's client is one of ours, once."""

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (answers.TooManyRequests("secret/name"), BackendUnavailable("gcs: 429 Too Many Requests")),
            (answers.from_http_status(408, "secret/name"), BackendUnavailable("gcs: 408 Request Timeout")),
            (answers.InternalServerError("secret/name"), BackendUnavailable("gcs: 500 Internal Server Error")),
            (answers.BadGateway("secret/name"), BackendUnavailable("gcs: 502 Bad Gateway")),
            (answers.ServiceUnavailable("secret/name"), BackendUnavailable("gcs: 503 Service Unavailable")),
            (answers.GatewayTimeout("secret/name"), BackendUnavailable("gcs: 504 Gateway Timeout")),
            (answers.from_http_status(599, "secret/name"), BackendUnavailable("gcs: 599")),
            (answers.BadRequest("secret/name"), BackendError("gcs: 400 Bad Request")),
            (answers.BadRequest("Provided CRC32C does not match"), BackendUnavailable("gcs: 400 Bad Request")),
            (answers.Unauthorized("secret/name"), BackendError("gcs: 401 Unauthorized")),
            (answers.Forbidden("secret/name"), BackendError("gcs: 403 Forbidden")),
            (answers.NotFound("secret/name"), BackendError("gcs: 404 Not Found")),
            (requests.ConnectionError("secret/name"), NoAnswer("gcs: ConnectionError")),
            (requests.ReadTimeout("secret/name"), NoAnswer("gcs: ReadTimeout")),
            (requests.ConnectTimeout("secret/name"), BackendUnavailable("gcs: ConnectTimeout")),
            (urllib3.exceptions.ProtocolError("secret/name"), NoAnswer("gcs: ProtocolError")),
            (RemoteDisconnected("secret/name"), NoAnswer("gcs: RemoteDisconnected")),
            (TimeoutError("secret/name"), NoAnswer("gcs: TimeoutError")),
            (auth_errors.TransportError("secret"), BackendUnavailable("gcs: credentials: TransportError")),
            (auth_errors.RefreshError("secret"), BackendError("gcs: credentials: RefreshError")),
            (
                auth_errors.RefreshError("secret", retryable=True),
                BackendUnavailable("gcs: credentials: RefreshError"),
            ),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_a_fault_is_passing_or_permanent_and_its_text_says_no_name(
        self, error: Exception, expected: Exception
    ) -> None:
        """GCS-4, ERR-4."""
        ours = translate(error)
        assert (type(ours), str(ours)) == (type(expected), str(expected))

    def test_the_answer_to_a_download_has_its_status_inside(self) -> None:
        response = requests.Response()
        response.status_code = 503
        assert type(translate(InvalidResponse(response, "secret"))) is BackendUnavailable

    def test_missing_credentials_are_a_configuration_error(self) -> None:
        assert isinstance(translate(auth_errors.DefaultCredentialsError("secret")), ConfigError)

    def test_a_mistake_in_our_own_code_is_not_hidden(self) -> None:
        error = KeyError("x")
        assert translate(error) is error

    def test_a_checksum_is_read_as_it_is_written(self) -> None:
        """Base64 of four bytes, highest first; what is none is none."""
        assert crc32c_text(google_crc32c.value(b"abc")) == "Nks/tw=="
        assert crc32c_number("Nks/tw==") == google_crc32c.value(b"abc")
        assert [crc32c_number(text) for text in (None, "", "AAA=", "not base64!", "AAAAAAAA")] == [None] * 5


class TestCalls:
    """Steps run in threads, bounded in number and time."""

    async def test_no_more_requests_than_threads_are_sent_at_a_time(
        self, client: GcsClient, strict_gcs: StrictGcs
    ) -> None:
        """The others wait in line."""
        strict_gcs.plan("find", times=6, stall=True)
        asking = [asyncio.create_task(client.find("bucket", str(number))) for number in range(6)]
        for _ in range(2):
            assert await asyncio.to_thread(strict_gcs.stalled.acquire, timeout=20)
        await asyncio.sleep(0.1)
        assert len(strict_gcs.requests) == 2
        strict_gcs.release()

        assert await asyncio.gather(*asking) == [None] * 6

    async def test_a_line_that_is_full_refuses(
        self, client: GcsClient, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gcs_client, "STEPS_MAX", 3)
        strict_gcs.plan("find", times=3, stall=True)
        asking = [asyncio.create_task(client.find("bucket", str(number))) for number in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(BackendUnavailable, match="too many requests wait"):
            await client.find("bucket", "one more")
        strict_gcs.release()
        await asyncio.gather(*asking)

    async def test_a_step_that_does_not_end_is_given_up_and_its_effect_stays_unknown(
        self, client: GcsClient, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the sockets say: a trickle of bytes keeps them happy for ever."""
        monkeypatch.setattr(gcs_client, "STEP_SECONDS", 0.1)
        strict_gcs.plan("find", stall=True)
        effect = Effect()
        with pytest.raises(NoAnswer, match="no answer within"):
            await client.call(gcs_client._find, "bucket", "x", effect=effect, attempts=1)

        assert effect.unanswered
        assert effect.running is not None
        assert not effect.running.done()

    async def test_a_step_still_in_line_is_withdrawn_and_has_no_effect(
        self, client: GcsClient, strict_gcs: StrictGcs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By its time limit and by a cancellation alike."""
        strict_gcs.plan("find", times=2, stall=True)
        busy = [asyncio.create_task(client.find("bucket", "busy")) for _ in range(2)]
        for _ in range(2):
            assert await asyncio.to_thread(strict_gcs.stalled.acquire, timeout=20)
        cancelled, late = Effect(), Effect()
        waiting = asyncio.create_task(client.call(gcs_client._find, "bucket", "x", effect=cancelled))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        monkeypatch.setattr(gcs_client, "STEP_SECONDS", 0.05)
        with pytest.raises(BackendUnavailable, match="too many requests wait"):
            await client.call(gcs_client._find, "bucket", "x", effect=late, attempts=1)
        strict_gcs.release()
        await asyncio.gather(*busy)

        assert len(strict_gcs.requests) == 2
        assert not cancelled.unanswered
        assert not late.unanswered

    @pytest.mark.parametrize(("error", "attempts"), [(BackendUnavailable, 3), (StartAnew, 1), (BackendError, 1)])
    async def test_only_what_may_succeed_is_tried_again(
        self, client: GcsClient, error: type[Exception], attempts: int
    ) -> None:
        """GCS-4: two retries."""
        tried = 0

        def step(_connection: Any) -> None:
            nonlocal tried
            tried += 1
            raise error("planned")

        with pytest.raises(error, match="planned"):
            await client.call(step)
        assert tried == attempts

    async def test_a_mistake_in_a_step_is_raised_as_it_is(self, client: GcsClient) -> None:
        """It becomes a panic of its operation."""

        def step(_connection: Any) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await client.call(step)

    async def test_waits_between_attempts_grow_and_are_jittered(
        self, client: GcsClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waits: list[float] = []

        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        monkeypatch.undo()
        monkeypatch.setattr("random.random", lambda: 0.5)
        monkeypatch.setattr("asyncio.sleep", sleep)

        def step(_connection: Any) -> None:
            raise BackendUnavailable("planned")

        with pytest.raises(BackendUnavailable):
            await client.call(step)
        assert waits == [0.1, 0.2]

    async def test_without_an_endpoint_the_environment_has_the_credentials(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 5: only an endpoint implies anonymous ones. No variable leads requests elsewhere."""
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")

        def absent(**_named: Any) -> Any:
            raise auth_errors.DefaultCredentialsError("secret")

        monkeypatch.setattr(google.auth, "default", absent)
        client = GcsClient()
        assert client.endpoint == "https://storage.googleapis.com"
        with pytest.raises(ConfigError, match="GOOGLE_APPLICATION_CREDENTIALS"):
            await client.find("bucket", "x")
        await client.close()

    async def test_closing_twice_is_closing_once(self, client: GcsClient) -> None:
        await client.find("bucket", "x")
        await client.close()
        await client.close()
        with pytest.raises(BackendUnavailable, match="closed"):
            await client.find("bucket", "x")


class TestReferences:
    """Claim checks in buckets."""

    @pytest.mark.parametrize("size", [0, 1, REFERENCE_PIECE_BYTES, REFERENCE_PIECE_BYTES + 1])
    async def test_a_referenced_object_is_read_in_pieces(
        self, client: GcsClient, strict_gcs: StrictGcs, size: int
    ) -> None:
        """All checks that files get, and none of them needs the whole in memory."""
        payload = (LARGE * 2)[:size]
        reference = upload(strict_gcs, payload)
        references = References(["gs://uploads/in/"], 10_000_000, openers={"gs": client.open_object})
        opened = await references.open(reference)

        assert b"".join([chunk async for chunk in opened]) == payload
        assert strict_gcs.kinds() == ["find", *["media"] * -(-size // REFERENCE_PIECE_BYTES)]
        await references.close()

    async def test_what_the_reference_says_is_compared_before_anything_is_read(
        self, client: GcsClient, strict_gcs: StrictGcs
    ) -> None:
        """Size, CRC-32C and limit, from the object's own properties."""
        good = upload(strict_gcs, b"payload")
        references = References(["gs://uploads/"], 1000, openers={"gs": client.open_object})
        codes = []
        for size, crc32c in ((8, None), (None, 1), (7, 1)):
            with pytest.raises(ReferenceFailure) as raised:
                await references.open(PayloadReference(good.uri, size, crc32c))
            codes.append(raised.value.code)
        await references.close()

        assert codes == ["reference_mismatch"] * 3
        assert set(strict_gcs.kinds()) == {"find"}

    @pytest.mark.parametrize("status", [403, 404])
    async def test_an_object_that_is_not_there_or_not_ours_to_read_is_unreadable(
        self, client: GcsClient, strict_gcs: StrictGcs, status: int
    ) -> None:
        """At the beginning and, when it is deleted, in the middle."""
        reference = upload(strict_gcs, b"payload")
        references = References(["gs://uploads/"], 1000, openers={"gs": client.open_object})
        opened = await references.open(reference)
        strict_gcs.plan("media", status=status)
        with pytest.raises(ReferenceFailure) as in_the_middle:
            await anext(opened)
        strict_gcs.plan("find", status=status)
        with pytest.raises(ReferenceFailure) as at_the_beginning:
            await references.open(reference)
        await references.close()

        assert in_the_middle.value.code == at_the_beginning.value.code == "reference_unreadable"

    async def test_an_object_damaged_on_its_way_is_not_the_producers_fault(
        self, client: GcsClient, strict_gcs: StrictGcs
    ) -> None:
        """Trying again may help, whether or not the reference names a checksum."""
        reference = upload(strict_gcs, b"payload")
        references = References(["gs://uploads/"], 1000, openers={"gs": client.open_object})
        for known in (reference, PayloadReference(reference.uri)):
            strict_gcs.plan("media", damage=True)
            opened = await references.open(known)
            with pytest.raises(BackendUnavailable):
                [chunk async for chunk in opened]
        await references.close()

    async def test_a_service_that_is_away_says_nothing_about_the_reference(
        self, client: GcsClient, strict_gcs: StrictGcs
    ) -> None:
        reference = upload(strict_gcs, b"payload")
        references = References(["gs://uploads/"], 1000, openers={"gs": client.open_object})
        strict_gcs.plan("find", times=3, status=503)
        with pytest.raises(BackendUnavailable):
            await references.open(reference)
        await references.close()

    async def test_a_payload_of_which_some_has_been_read_is_not_copied(
        self, client: GcsClient, strict_gcs: StrictGcs
    ) -> None:
        """Whoever has begun to read it has taken something away from it."""
        references = References(["gs://uploads/"], 10_000_000, openers={"gs": client.open_object})
        opened = await references.open(upload(strict_gcs, LARGE))
        before = opened.copy_source
        await anext(opened)
        after = opened.copy_source
        assert (before is not None, after) == (True, None)
        await references.close()


class TestWholeWay:
    """An insert by reference, from the operation to both tiers."""

    @staticmethod
    def insert(reference: PayloadReference) -> Insert:
        """Return the operation."""
        return Insert(ObjectContext("usecase"), "key", Metadata("text/plain"), reference)

    async def test_from_bucket_to_bucket_no_byte_passes_through_here(self, strict_gcs: StrictGcs) -> None:
        """The size is known, so nothing is read ahead either; what reads back is whole."""
        long_term = GcsBackend("bucket", endpoint=strict_gcs.endpoint)
        buckets = make_bucket_reader(["gs://uploads/"], long_term)
        assert buckets is long_term.gcs
        references = References(["gs://uploads/"], 10_000_000, openers={"gs": buckets.open_object})
        storage = TieredStorage(MemoryBackend(), long_term, handout_seconds=3600)
        service = StorageService(storage, references=references)

        reference = upload(strict_gcs, LARGE)
        done = await service.insert(self.insert(reference))

        assert isinstance(done, Inserted)
        assert done.metadata.size == len(LARGE)
        assert strict_gcs.kinds() == ["find", "rewrite"]
        (stored,) = strict_gcs.bucket("bucket")
        handed_out = await storage.get(done.id, fits=lambda _metadata: False)
        assert handed_out is not None
        assert handed_out.payload == replace(reference, uri=f"gs://bucket/{stored}")
        assert "media" not in strict_gcs.kinds()
        read = await storage.get(done.id)
        assert read is not None
        assert (read.payload, read.metadata.content_type) == (LARGE, "text/plain")
        await service.join()
        await references.close()
        await storage.close()

    async def test_what_is_handed_out_can_be_handed_in(self, strict_gcs: StrictGcs) -> None:
        """The URI of a response opens as one of an insert, whatever is in its name; the vendor reads it alike."""
        tier = GcsBackend("bucket", endpoint=strict_gcs.endpoint, prefix="tier/")
        revision = Revision("usecase/objects/ключ/../% %41?#/018f2d3a-0000-7000-8000-000000000001")
        await tier.put(revision, Metadata(), LARGE)
        reference = await tier.reference(revision)
        assert reference is not None
        references = References(["gs://bucket/tier/"], 10_000_000, openers={"gs": tier.gcs.open_object})
        opened = await references.open(reference)

        assert b"".join([chunk async for chunk in opened]) == LARGE
        assert Blob.from_uri(reference.uri).name == f"tier/{revision.name}"
        await references.close()
        await tier.close()

    async def test_a_small_one_is_read_and_kept_inline(self, strict_gcs: StrictGcs) -> None:
        """SIZ-1 counts for references too."""
        long_term = GcsBackend("bucket", endpoint=strict_gcs.endpoint)
        references = References(["gs://uploads/"], 10_000_000, openers={"gs": long_term.gcs.open_object})
        storage = TieredStorage(MemoryBackend(), long_term)
        service = StorageService(storage, references=references)

        await service.insert(self.insert(upload(strict_gcs, b"small")))

        assert strict_gcs.kinds() == ["find", "media"]
        assert not strict_gcs.bucket("bucket")
        await service.join()
        await references.close()
        await storage.close()

    async def test_from_a_bucket_to_a_folder_it_streams(self, strict_gcs: StrictGcs, tmp_path: Path) -> None:
        """A client of its own opens it."""
        client = GcsClient(strict_gcs.endpoint)
        references = References(["gs://uploads/"], 10_000_000, openers={"gs": client.open_object})
        storage = TieredStorage(MemoryBackend(), FilesystemBackend(tmp_path))
        service = StorageService(storage, references=references)

        done = await service.insert(self.insert(upload(strict_gcs, LARGE)))

        assert isinstance(done, Inserted)
        read = await storage.get(done.id)
        assert read is not None
        assert read.payload == LARGE
        await service.join()
        await references.close()
        await storage.close()
        await client.close()


class TestMaking:
    """What is opened when, and what is said when it is not installed."""

    def test_no_client_is_made_where_no_bucket_is_allowed(self) -> None:
        assert make_bucket_reader(["file:///srv/"], MemoryBackend()) is None

    async def test_another_tier_gets_a_client_with_the_environments_credentials(self) -> None:
        reader = make_bucket_reader(["file:///srv/", "gs://uploads/"], MemoryBackend())
        assert isinstance(reader, GcsClient)
        assert reader.endpoint == "https://storage.googleapis.com"
        await reader.close()

    def test_a_missing_extra_is_a_configuration_error_that_says_what_to_install(self) -> None:
        """However the name is asked for."""
        script = (
            "import sys; sys.modules['google.auth'] = None; import consumer\n"
            "try: consumer.GcsBackend\n"
            "except consumer.ConfigError as error: print(error)\n"
        )
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
        assert said.stdout.strip() == "storage type gcs needs the extra: pip install tierstream[gcs]"
