"""Every long-term backend keeps whole, immutable revisions: what tiered storage relies on, GCS-2, GCS-6, GCS-8."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import google_crc32c
import pytest

from consumer.ids import ObjectId
from consumer.operations import Metadata, StoredObject, TimeToIdle
from consumer.storage.backend import LongTermBackend, Revision
from consumer.storage.revision import new_revision

AnId: TypeAlias = Callable[..., ObjectId]

FULL = Metadata(
    content_type="text/plain; charset=utf-8",
    expiration=TimeToIdle(3600),
    compression="zstd",
    filename="naïve \N{SNOWMAN}.txt",
    origin="203.0.113.7",
    custom={"b": "2", "a": "ünï"},
    time_created=datetime(2026, 1, 1, 12, 0, 0, 7, tzinfo=UTC),
    time_expires=datetime(2100, 1, 1, 0, 0, 0, 999_999, tzinfo=UTC),
)

HOSTILE_NAMES = [
    "..",
    "../../outside",
    "/absolute",
    "a/./b",
    "metadata.json",
    "x.payload",
    "x.json",
    ".lock",
    "incoming",
    "FORMAT",
    "%2F",
    "Case",
    "case",
    "é",
    "e\N{COMBINING ACUTE ACCENT}",
    "\U0001f600" * 100,
    "x" * 850,
    "/" * 850,
    "x" * 200,
    "x" * 201,
]


class ClientFault(Exception):
    """What the iterator of a payload raises."""


async def chunks_of(*chunks: bytes, error: BaseException | None = None) -> AsyncIterator[bytes]:
    """Give the chunks, then the error."""
    for chunk in chunks:
        yield chunk
    if error is not None:
        raise error


class TestPut:
    """Payloads come in whole or in chunks."""

    @pytest.mark.parametrize("payload", [b"", b"x", bytes(range(256)) * 12_000], ids=["empty", "small", "3 MB"])
    async def test_a_payload_given_whole_reads_back(
        self, long_term: LongTermBackend, an_id: AnId, payload: bytes
    ) -> None:
        """GCS-8: bytes as stored; the size is filled in."""
        revision = new_revision(an_id())

        assert await long_term.put(revision, FULL, payload) == len(payload)

        kept = replace(FULL, size=len(payload))
        assert await long_term.get(revision) == StoredObject(kept, payload)
        assert await long_term.head(revision) == kept

    @pytest.mark.parametrize(
        "chunks",
        [[], [b""], [b"a", b"", b"bc"], [b"x" * 65_536] * 50, [b"y" * 2_500_000, b"z"]],
        ids=["none", "empty", "few", "many", "large"],
    )
    async def test_a_payload_given_in_chunks_reads_back(
        self, long_term: LongTermBackend, an_id: AnId, chunks: list[bytes]
    ) -> None:
        """TIER-16: in order, none lost, none twice."""
        revision = new_revision(an_id())

        assert await long_term.put(revision, Metadata(), chunks_of(*chunks)) == len(b"".join(chunks))

        found = await long_term.get(revision)
        assert found is not None
        assert found.payload == b"".join(chunks)

    @pytest.mark.parametrize("before", [[], [b"x"], [b"x" * 1_000_000] * 3], ids=["at once", "soon", "late"])
    async def test_an_error_of_the_iterator_passes_unchanged_and_leaves_nothing(
        self, long_term: LongTermBackend, an_id: AnId, before: list[bytes]
    ) -> None:
        """ERR-3, SIZ-5."""
        revision = new_revision(an_id())
        error = ClientFault("the client went away")

        with pytest.raises(ClientFault) as raised:
            await long_term.put(revision, Metadata(), chunks_of(*before, error=error))

        assert raised.value is error
        assert await long_term.get(revision) is None
        assert await long_term.head(revision) is None

    async def test_an_os_error_of_the_iterator_is_not_taken_for_the_backends(
        self, long_term: LongTermBackend, an_id: AnId
    ) -> None:
        """ERR-3."""
        error = OSError(5, "the client's disk")

        with pytest.raises(OSError) as raised:
            await long_term.put(new_revision(an_id()), Metadata(), chunks_of(b"x", error=error))

        assert raised.value is error

    async def test_putting_a_revision_again_changes_nothing(self, long_term: LongTermBackend, an_id: AnId) -> None:
        """A retry after a lost answer."""
        revision = new_revision(an_id())
        for _ in range(3):
            assert await long_term.put(revision, FULL, b"payload") == 7

        assert await long_term.get(revision) == StoredObject(replace(FULL, size=7), b"payload")

    async def test_a_retry_may_overtake_its_first_attempt(self, long_term: LongTermBackend, an_id: AnId) -> None:
        """The first one timed out at the caller and goes on all the same."""
        revision = new_revision(an_id())
        payload = b"p" * 1_500_000

        assert await asyncio.gather(
            *(long_term.put(revision, FULL, chunks_of(payload[:700_000], payload[700_000:])) for _ in range(8))
        ) == [len(payload)] * 8

        assert await long_term.get(revision) == StoredObject(replace(FULL, size=len(payload)), payload)

    async def test_a_cancelled_put_does_not_appear_after_a_delete(
        self, long_term: LongTermBackend, an_id: AnId
    ) -> None:
        """TIER-18: cut off at any moment; once the delete has returned, the revision is gone for good."""
        for delay in range(12):
            revision = new_revision(an_id())
            reached = asyncio.Event()

            async def payload(reached: asyncio.Event = reached) -> AsyncIterator[bytes]:
                yield b"x" * 1_100_000
                reached.set()
                yield b"y" * 1_100_000

            putting = asyncio.create_task(long_term.put(revision, Metadata(), payload()))
            await reached.wait()
            for _ in range(delay):
                await asyncio.sleep(0)
            putting.cancel()
            await asyncio.gather(putting, return_exceptions=True)
            await long_term.delete(revision)
            await long_term.put(new_revision(an_id()), Metadata(), b"another")

            assert await long_term.get(revision) is None

    async def test_many_puts_at_once_do_not_meet(self, long_term: LongTermBackend, an_id: AnId) -> None:
        revisions = [new_revision(an_id()) for _ in range(40)]
        await asyncio.gather(*(long_term.put(r, Metadata(filename=r.name), r.name.encode()) for r in revisions))

        for revision in revisions:
            found = await long_term.get(revision)
            assert found is not None
            assert (found.payload, found.metadata.filename) == (revision.name.encode(), revision.name)

    async def test_hostile_names_are_names_like_any_other(self, long_term: LongTermBackend) -> None:
        """All of them at once, so that none can hide behind, replace or lie in another."""
        revisions = [Revision(name) for name in HOSTILE_NAMES]
        for revision in revisions:
            await long_term.put(revision, Metadata(), revision.name.encode())

        for revision in revisions:
            found = await long_term.get(revision)
            assert found is not None
            assert found.payload == revision.name.encode()
        for revision in revisions:
            await long_term.delete(revision)
            assert await long_term.head(revision) is None


class TestDelete:
    """Removal is for good."""

    async def test_a_deleted_revision_is_gone_and_its_neighbour_is_not(
        self, long_term: LongTermBackend, an_id: AnId
    ) -> None:
        one, other = new_revision(an_id()), new_revision(an_id())
        await long_term.put(one, Metadata(), b"one")
        await long_term.put(other, Metadata(), b"other")

        await long_term.delete(one)

        assert await long_term.get(one) is None
        assert await long_term.head(one) is None
        assert await long_term.get(other) == StoredObject(Metadata(size=5), b"other")

    async def test_deleting_what_is_not_there_is_a_success(self, long_term: LongTermBackend, an_id: AnId) -> None:
        """GCS-6."""
        revision = new_revision(an_id())
        await long_term.delete(revision)
        await long_term.put(revision, Metadata(), b"x")
        await long_term.delete(revision)
        await long_term.delete(revision)

        assert await long_term.get(revision) is None

    async def test_puts_and_deletes_of_neighbours_do_not_disturb_each_other(
        self, long_term: LongTermBackend, an_id: AnId
    ) -> None:
        """Whatever a delete tidies up, a put at the same time finds its place."""
        stay = [new_revision(an_id("x" * 500)) for _ in range(60)]
        go = [new_revision(an_id("x" * 500)) for _ in range(60)]

        async def come_and_go(revision: Revision) -> None:
            await long_term.put(revision, Metadata(), b"x")
            await long_term.delete(revision)

        await asyncio.gather(
            *(come_and_go(revision) for revision in go),
            *(long_term.put(revision, Metadata(), b"x") for revision in stay),
        )

        assert [await long_term.get(revision) for revision in go] == [None] * 60
        assert None not in [await long_term.get(revision) for revision in stay]


class TestExpiry:
    """Expired is absent here too (GCS-2)."""

    async def test_an_expired_revision_is_absent(self, long_term: LongTermBackend, an_id: AnId, clock: Any) -> None:
        revision = new_revision(an_id())
        await long_term.put(revision, Metadata(time_expires=clock() + timedelta(seconds=10)), b"x")
        clock.advance(9.999_999)
        assert await long_term.get(revision) is not None
        clock.advance(0.000_001)

        assert await long_term.get(revision) is None
        assert await long_term.head(revision) is None
        await long_term.extend(revision, Metadata())
        assert await long_term.get(revision) is None

    async def test_an_extended_revision_lives_on(self, long_term: LongTermBackend, an_id: AnId, clock: Any) -> None:
        """GCS-3."""
        revision = new_revision(an_id())
        metadata = replace(FULL, time_expires=clock() + timedelta(seconds=10), size=1)
        await long_term.put(revision, metadata, b"x")
        extended = replace(metadata, time_expires=clock() + timedelta(seconds=20))

        await long_term.extend(revision, extended)

        clock.advance(15)
        assert await long_term.get(revision) == StoredObject(extended, b"x")
        clock.advance(5)
        assert await long_term.get(revision) is None

    async def test_extending_what_is_not_there_makes_nothing(self, long_term: LongTermBackend, an_id: AnId) -> None:
        revision = new_revision(an_id())
        await long_term.extend(revision, Metadata())

        assert await long_term.head(revision) is None

    async def test_an_extension_does_not_bring_a_deleted_revision_back(
        self, long_term: LongTermBackend, an_id: AnId
    ) -> None:
        for _ in range(20):
            revision = new_revision(an_id())
            await long_term.put(revision, Metadata(), b"x")
            await asyncio.gather(long_term.extend(revision, FULL), long_term.delete(revision))

            assert await long_term.head(revision) is None


class TestReferences:
    """What a response may refer to; a tier that nobody else can read has no such method."""

    @pytest.mark.parametrize("key", ["a-key", "ключ/../% ?#", "x" * 700])
    @pytest.mark.parametrize("payload", [b"", bytes(range(256)) * 5_000], ids=["empty", "1 MB"])
    async def test_a_reference_says_where_the_bytes_lie_with_size_and_checksum(
        self, referenced: Any, an_id: AnId, key: str, payload: bytes
    ) -> None:
        """Contract 2.1, 5: size and crc32c filled; a file's URI is percent-encoded, a bucket's name is as it is."""
        revision = new_revision(an_id(key))
        await referenced.put(revision, FULL, payload)

        reference = await referenced.reference(revision)

        assert reference is not None
        assert (reference.size, reference.crc32c) == (len(payload), google_crc32c.value(payload))
        if not re.fullmatch(r"file:///[A-Za-z0-9/%._~!$&'()*+,;=:@-]+", reference.uri):
            assert re.fullmatch(rf"gs://[a-z0-9._-]+/tier/{re.escape(revision.name)}", reference.uri)

    async def test_revisions_have_references_of_their_own(
        self, referenced: Any, an_id: AnId
    ) -> None:
        revisions = [new_revision(an_id()), new_revision(an_id()), Revision("responses/" + new_revision(an_id()).name)]
        for revision in revisions:
            await referenced.put(revision, Metadata(), b"x")

        assert len({await referenced.reference(revision) for revision in revisions} - {None}) == 3

    async def test_what_is_not_there_has_none(
        self, referenced: Any, an_id: AnId, clock: Any
    ) -> None:
        missing, deleted, expired = (new_revision(an_id()) for _ in range(3))
        await referenced.put(deleted, Metadata(), b"x")
        await referenced.delete(deleted)
        await referenced.put(expired, Metadata(time_expires=clock() + timedelta(seconds=1)), b"x")
        clock.advance(1)

        assert [await referenced.reference(name) for name in (missing, deleted, expired)] == [None] * 3


class TestEnd:
    """Join and close."""

    async def test_reads_work_after_a_join(self, long_term: LongTermBackend, an_id: AnId) -> None:
        """HV-11."""
        revision = new_revision(an_id())
        await long_term.put(revision, Metadata(), b"x")
        await long_term.join()

        assert await long_term.get(revision) is not None

    async def test_closing_twice_is_closing_once(self, long_term: LongTermBackend, an_id: AnId) -> None:
        await long_term.put(new_revision(an_id()), Metadata(), b"x")
        await long_term.close()
        await long_term.close()
