"""Claim checks: what may be opened, how it is read, and what is noticed while reading."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import google_crc32c
import pytest

from consumer.errors import BackendUnavailable, ConfigError, ReferenceFailure, TierstreamError, TooLarge
from consumer.operations import PayloadReference
from consumer.references import CHUNK_BYTES, CheckedPayload, References

LIMIT = 10 * CHUNK_BYTES


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    """A directory that references may point below, with a file `small` in it and one `secret` beside it."""
    (tmp_path / "secret").write_bytes(b"not yours")
    below = tmp_path / "uploads"
    below.mkdir()
    (below / "small").write_bytes(b"payload")
    return below


@pytest.fixture
async def references(uploads: Path) -> AsyncIterator[References]:
    """References that may point below *uploads*."""
    made = References([uploads.as_uri()], LIMIT)
    yield made
    await made.close()


async def read(references: References, uri: str, size: int | None = None, crc32c: int | None = None) -> bytes:
    """Read what *uri* points to, as its only user does."""
    payload = await references.open(PayloadReference(uri, size, crc32c))
    try:
        return b"".join([chunk async for chunk in payload])
    finally:
        await payload.aclose()


async def code_of(references: References, uri: str, size: int | None = None, crc32c: int | None = None) -> str:
    """Return the code of the failure that reading *uri* ends in; no failure shows any part of the path."""
    with pytest.raises(TierstreamError) as caught:
        await read(references, uri, size, crc32c)
    text = str(caught.value)
    assert text
    assert not any(part in text for part in ("pytest", "uploads", "small", "secret"))
    return caught.value.code


def open_descriptors() -> int:
    """Count the files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


class TestWhatMayBeOpened:
    """A regular file below an allowed prefix, named without ambiguity, and nothing else."""

    async def test_a_file_below_an_allowed_prefix_is_read(self, references: References, uploads: Path) -> None:
        assert await read(references, (uploads / "small").as_uri()) == b"payload"

    async def test_a_prefix_with_and_without_last_slash_and_localhost_are_the_same(self, uploads: Path) -> None:
        for prefix in (f"file://{uploads}", f"file://{uploads}/", f"FILE://localhost{uploads}/"):
            references = References([prefix], LIMIT)
            assert await read(references, f"file://LOCALHOST{uploads}/small") == b"payload"
            await references.close()

    async def test_percent_encoding_and_any_byte_but_slash_and_nul_are_a_name(
        self, references: References, uploads: Path
    ) -> None:
        name = "a b%41ü\n?#.."
        (uploads / name).write_bytes(b"odd")
        (uploads / os.fsdecode(b"\xff")).write_bytes(b"not unicode")

        assert await read(references, (uploads / name).as_uri()) == b"odd"
        assert await read(references, f"{uploads.as_uri()}/%FF") == b"not unicode"

    async def test_the_whole_tree_may_be_allowed(self, uploads: Path) -> None:
        references = References(["file:///"], LIMIT)

        assert await read(references, (uploads / "small").as_uri()) == b"payload"
        await references.close()

    @pytest.mark.parametrize(
        "uri",
        [
            "file://{}/../secret",
            "file://{}/%2e%2e/secret",
            "file://{}/./small",
            "file://{}//small",
            "file://{}/",
            "file://{}",
            "file://{}-not/small",
            "file://elsewhere{}/small",
            "file://{}/small?x",
            "file://{}/small#x",
            "file://{}/..%2fsecret",
            "file://{}/small%00",
            "file://{}/%zz",
            "file://{}/\ud800",
            "file:{}/small",
            "{}/small",
            "http://localhost{}/small",
            "gs://bucket/small",
            "",
        ],
    )
    async def test_everything_else_is_denied(self, references: References, uploads: Path, uri: str) -> None:
        assert await code_of(references, uri.format(uploads)) == "reference_denied"

    async def test_without_prefixes_nothing_is_allowed(self, uploads: Path) -> None:
        references = References([], LIMIT)

        assert await code_of(references, (uploads / "small").as_uri()) == "reference_denied"
        await references.close()

    async def test_no_symbolic_link_below_the_prefix_is_followed(self, references: References, uploads: Path) -> None:
        (uploads / "file-link").symlink_to(uploads.parent / "secret")
        (uploads / "directory-link").symlink_to(uploads.parent)
        (uploads / "inner-link").symlink_to(uploads / "small")

        for path in ("file-link", "directory-link/secret", "inner-link"):
            assert await code_of(references, f"{uploads.as_uri()}/{path}") == "reference_denied"

    async def test_symbolic_links_in_the_prefix_itself_are_the_administrators(self, uploads: Path) -> None:
        (uploads.parent / "alias").symlink_to(uploads)
        references = References([(uploads.parent / "alias").as_uri()], LIMIT)

        assert await read(references, (uploads.parent / "alias" / "small").as_uri()) == b"payload"
        await references.close()

    async def test_of_nested_prefixes_the_inner_one_counts(self, uploads: Path) -> None:
        """A link that the outer prefix would refuse may be the inner prefix itself."""
        (uploads / "inner").symlink_to(uploads.parent)
        references = References([uploads.as_uri(), f"{uploads.as_uri()}/inner"], LIMIT)

        assert await read(references, f"{uploads.as_uri()}/inner/secret") == b"not yours"
        await references.close()

    async def test_only_regular_files_are_read(self, references: References, uploads: Path) -> None:
        (uploads / "directory").mkdir()
        os.mkfifo(uploads / "pipe")

        for name in ("directory", "pipe"):
            assert await code_of(references, f"{uploads.as_uri()}/{name}") == "reference_denied"

    async def test_a_missing_file_is_unreadable(self, references: References, uploads: Path) -> None:
        for name in ("absent", "absent/below", "small/below", "n" * 300):
            assert await code_of(references, f"{uploads.as_uri()}/{name}") == "reference_unreadable"

    @pytest.mark.parametrize("prefix", ["file://host/x/", "/srv/uploads", "file:///srv/../etc/", "uploads"])
    def test_a_prefix_that_cannot_be_used_is_a_configuration_error(self, prefix: str) -> None:
        with pytest.raises(ConfigError):
            References([prefix], LIMIT)


class TestWhatIsChecked:
    """Size, checksum and limit, before and while reading."""

    @pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
    async def test_size_and_checksum_that_agree_pass(self, references: References, uploads: Path, size: int) -> None:
        payload = os.urandom(size)
        (uploads / "large").write_bytes(payload)

        assert await read(references, f"{uploads.as_uri()}/large", size, google_crc32c.value(payload)) == payload

    async def test_chunks_are_bounded_and_never_empty(self, references: References, uploads: Path) -> None:
        (uploads / "large").write_bytes(bytes(2 * CHUNK_BYTES + 1))

        payload = await references.open(PayloadReference(f"{uploads.as_uri()}/large"))

        assert [len(chunk) async for chunk in payload] == [CHUNK_BYTES, CHUNK_BYTES, 1]

    @pytest.mark.parametrize("size", [0, 6, 8])
    async def test_another_size_is_a_mismatch(self, references: References, uploads: Path, size: int) -> None:
        assert await code_of(references, f"{uploads.as_uri()}/small", size) == "reference_mismatch"

    async def test_another_checksum_is_a_mismatch(self, references: References, uploads: Path) -> None:
        assert await code_of(references, f"{uploads.as_uri()}/small", 7, 0) == "reference_mismatch"

    async def test_the_checksum_of_an_empty_file_counts(self, references: References, uploads: Path) -> None:
        (uploads / "empty").touch()

        assert await read(references, f"{uploads.as_uri()}/empty", 0, 0) == b""
        assert await code_of(references, f"{uploads.as_uri()}/empty", 0, 1) == "reference_mismatch"

    async def test_the_limit_itself_fits_and_one_byte_more_does_not(
        self, references: References, uploads: Path
    ) -> None:
        (uploads / "fits").write_bytes(bytes(LIMIT))
        (uploads / "over").write_bytes(bytes(LIMIT + 1))

        assert len(await read(references, f"{uploads.as_uri()}/fits")) == LIMIT
        assert await code_of(references, f"{uploads.as_uri()}/over") == "payload_too_large"

    async def test_a_size_over_the_limit_is_refused_before_anything_is_opened(
        self, references: References, uploads: Path
    ) -> None:
        assert await code_of(references, f"{uploads.as_uri()}/absent", LIMIT + 1) == "payload_too_large"

    async def test_a_file_that_shrinks_while_read_is_a_mismatch(self, references: References, uploads: Path) -> None:
        (uploads / "large").write_bytes(bytes(3 * CHUNK_BYTES))
        payload = await references.open(PayloadReference(f"{uploads.as_uri()}/large", 3 * CHUNK_BYTES))
        await anext(payload)
        os.truncate(uploads / "large", CHUNK_BYTES)

        with pytest.raises(ReferenceFailure) as caught:
            await anext(payload)
        assert caught.value.code == "reference_mismatch"

    async def test_a_file_that_grows_beyond_the_limit_while_read_is_too_large(
        self, references: References, uploads: Path
    ) -> None:
        (uploads / "large").write_bytes(bytes(LIMIT))
        payload = await references.open(PayloadReference(f"{uploads.as_uri()}/large"))
        with (uploads / "large").open("ab") as file:
            file.write(b"!")

        with pytest.raises(TooLarge):
            assert [chunk async for chunk in payload]


class TestWhatIsReleased:
    """Every file, however its reading ends."""

    @pytest.fixture(autouse=True)
    async def no_descriptor_leaks(self, references: References) -> AsyncIterator[None]:
        """All files are closed once the threads have ended."""
        before = open_descriptors()
        yield
        await references.close()
        assert open_descriptors() <= before

    async def test_a_file_read_to_its_end(self, references: References, uploads: Path) -> None:
        payload = await references.open(PayloadReference(f"{uploads.as_uri()}/small"))

        assert [chunk async for chunk in payload] == [b"payload"]
        assert [chunk async for chunk in payload] == []

    async def test_a_file_closed_before_its_end_twice(self, references: References, uploads: Path) -> None:
        payload = await references.open(PayloadReference(f"{uploads.as_uri()}/small"))
        await payload.aclose()
        await payload.aclose()

        assert [chunk async for chunk in payload] == []

    async def test_a_file_that_is_refused(self, references: References, uploads: Path) -> None:
        (uploads / "directory").mkdir()
        for path, size in (("directory", None), ("small", 6), ("small/below", None), ("absent", None)):
            await code_of(references, f"{uploads.as_uri()}/{path}", size)

    async def test_a_file_being_opened_when_the_operation_is_cancelled(
        self, references: References, uploads: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Cancellation does not stop a thread; what the thread opens later is closed all the same."""
        opening, go_on = threading.Event(), threading.Event()
        genuine = os.open

        def slow_open(*given: object, **named: object) -> int:
            opening.set()
            go_on.wait(10)
            return genuine(*given, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", slow_open)
        task = asyncio.create_task(references.open(PayloadReference(f"{uploads.as_uri()}/small")))
        await asyncio.to_thread(opening.wait, 10)
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    async def test_a_file_closed_after_the_threads_have_ended(self, references: References, uploads: Path) -> None:
        payload = await references.open(PayloadReference(f"{uploads.as_uri()}/small"))
        await references.close()
        await payload.aclose()


class OutOfDescriptors:
    """Opening fails for a reason that says nothing about the file."""

    def __call__(self, *given: object, **named: object) -> int:
        raise OSError(24, "too many open files")


async def test_a_passing_fault_of_the_disk_may_be_tried_again(
    references: References, uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own limits are not the producer's fault, and not for ever."""
    monkeypatch.setattr(os, "open", OutOfDescriptors())

    with pytest.raises(BackendUnavailable):
        await references.open(PayloadReference(f"{uploads.as_uri()}/small"))


class Bucket:
    """An opener for one more scheme; counts what is closed."""

    size: int | None = 4
    crc32c: int | None = None

    def __init__(self) -> None:
        self.chunks = [b"da", b"ta"]
        self.opened: list[tuple[str, str]] = []
        self.closed = 0

    async def __call__(self, authority: str, name: str) -> Bucket:
        self.opened.append((authority, name))
        return self

    async def read(self) -> bytes:
        return self.chunks.pop(0) if self.chunks else b""

    def close(self) -> None:
        self.closed += 1


class TestOtherSchemes:
    """Openers for buckets get the same checks around them."""

    async def test_are_opened_below_their_prefix(self) -> None:
        bucket = Bucket()
        references = References(["gs://uploads/in"], LIMIT, openers={"gs": bucket})

        assert await read(references, "gs://uploads/in/a/../b%20c", 4, google_crc32c.value(b"data")) == b"data"
        assert bucket.opened == [("uploads", "in/a/../b%20c")]  # an object's name is taken as it is
        assert bucket.closed
        await references.close()

    @pytest.mark.parametrize("uri", ["gs://uploads/inside", "gs://other/in/x", "gs://uploads/in", "s3://uploads/in/x"])
    async def test_are_denied_elsewhere(self, uri: str) -> None:
        bucket = Bucket()
        references = References(["gs://uploads/in/"], LIMIT, openers={"gs": bucket})

        assert await code_of(references, uri) == "reference_denied"
        assert not bucket.opened
        await references.close()

    async def test_are_checked_like_files(self) -> None:
        bucket = Bucket()
        references = References(["gs://uploads"], LIMIT, openers={"gs": bucket})

        assert await code_of(references, "gs://uploads/x", 5) == "reference_mismatch"
        assert bucket.closed
        await references.close()

    async def test_a_source_of_unknown_size_is_checked_while_read(self) -> None:
        bucket = Bucket()
        bucket.size = None
        checked = CheckedPayload(bucket, PayloadReference("gs://uploads/x", 3), LIMIT)

        assert await anext(checked) == b"da"
        with pytest.raises(ReferenceFailure) as caught:
            await anext(checked)
        assert caught.value.code == "reference_mismatch"
