"""Payloads handed out by reference: what a reader of a response finds there, and until when."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from consumer.errors import BackendError, BackendUnavailable, ConfigError, InvalidOperation, TooLarge
from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.operations import DEFAULT_METADATA, Metadata, PayloadReference, TimeToIdle
from consumer.storage.backend import Payload, Revision
from consumer.storage.handouts import Handouts, is_copy
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.revision import new_revision, parse_revision
from consumer.storage.tiered import TieredStorage
from failures import Away, FailingUpload, Referenced, assert_nothing_left_over, revisions

OBJECT = ObjectId(ObjectContext("usecase", [Scope("org", "17")]), "a/key")
RETENTION = 100.0
SMALL, LARGE, OTHER_LARGE = b"small", b"L" * 11, b"l" * 12
LIMIT = 10


class Clock:
    """A wall clock that moves when told to; begins with a period of the retention."""

    def __init__(self) -> None:
        self.time = datetime(2030, 1, 1, tzinfo=UTC)
        assert self.time.timestamp() % RETENTION == 0

    def __call__(self) -> datetime:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


class Setup:
    """A storage that gives references, with all it stands on."""

    def __init__(self, long_term: Referenced | None = None) -> None:
        self.clock = Clock()
        self.high_volume = MemoryBackend(clock=self.clock)
        self.long_term = long_term or Referenced(clock=self.clock)
        self.log = MemoryChangeLog(clock=self.clock)
        self.storage = TieredStorage(
            self.high_volume, self.long_term, self.log, LIMIT, handout_seconds=RETENTION, clock=self.clock
        )
        self.storage.changes._delay = lambda _failed: 0.0

    async def put(self, payload: Payload, metadata: Metadata = DEFAULT_METADATA) -> None:
        await self.storage.put(OBJECT, metadata, payload)

    async def refer(self) -> PayloadReference:
        """Get the object as a caller who can take no payload."""
        found = await self.storage.get(OBJECT, fits=lambda _metadata: False)
        assert found is not None
        assert isinstance(found.payload, PayloadReference)
        return found.payload

    @property
    def copies(self) -> list[str]:
        return [name for name in self.long_term._revisions if is_copy(name)]

    async def settled(self) -> None:
        """Let everything that is kept for readers go, and assert that nothing is left over."""
        await self.storage.join()
        self.clock.advance(RETENTION)
        await self.storage.recover()
        await assert_nothing_left_over(self.high_volume, self.long_term, self.log)


class TestLongTermObjects:
    """Referred to as they lie."""

    async def test_a_reference_leads_to_the_bytes_with_size_and_checksum(self) -> None:
        setup = Setup()
        await setup.put(LARGE)

        assert setup.long_term.read(await setup.refer()) == LARGE
        assert setup.copies == []
        await setup.settled()

    async def test_metadata_come_as_stored(self) -> None:
        setup = Setup()
        await setup.put(LARGE, Metadata(content_type="text/plain", custom={"a": "b"}))
        inline, referred = await setup.storage.get(OBJECT), await setup.storage.get(OBJECT, fits=lambda _: False)

        assert inline is not None
        assert referred is not None
        assert referred.metadata == inline.metadata
        await setup.storage.join()

    async def test_what_fits_is_given_as_ever(self) -> None:
        setup = Setup()
        for payload in (SMALL, LARGE):
            await setup.put(payload)
            found = await setup.storage.get(OBJECT, fits=lambda metadata: metadata.size in {len(SMALL), len(LARGE)})
            assert found is not None
            assert found.payload == payload
        await setup.settled()

    @pytest.mark.parametrize("replacement", [None, SMALL, OTHER_LARGE])
    async def test_a_reference_leads_there_for_the_retention_after_the_object_has_gone(
        self, replacement: bytes | None
    ) -> None:
        """Contract 5: replaced and deleted revisions are removed after `references.retention`."""
        setup = Setup()
        await setup.put(LARGE)
        reference = await setup.refer()
        if replacement is None:
            await setup.storage.delete(OBJECT)
        else:
            await setup.put(replacement)
        await setup.storage.join()

        setup.clock.advance(RETENTION - 0.000001)
        await setup.storage.recover()
        assert setup.long_term.read(reference) == LARGE
        setup.clock.advance(0.000001)
        await setup.storage.recover()
        assert reference.uri.removeprefix("memory:") not in setup.long_term._revisions
        await setup.settled()

    async def test_the_retention_goes_on_after_a_crash(self) -> None:
        """It stands in the change log, so another process ends it, no sooner and no later."""
        setup = Setup()
        await setup.put(LARGE)
        reference = await setup.refer()
        await setup.storage.delete(OBJECT)
        await setup.storage.join()
        setup.clock.advance(RETENTION - 1)

        class Inherited(MemoryChangeLog):
            def __init__(self) -> None:
                super().__init__("another", clock=setup.clock)
                self._changes = setup.log._changes

        restarted = TieredStorage(
            setup.high_volume, setup.long_term, Inherited(), LIMIT, handout_seconds=RETENTION, clock=setup.clock
        )
        await restarted.recover()
        assert setup.long_term.read(reference) == LARGE
        setup.clock.advance(1)
        await restarted.recover()

        assert revisions(setup.long_term) == set()
        await restarted.join()
        await setup.settled()

    async def test_an_object_replaced_between_row_and_reference_is_looked_up_again(self) -> None:
        class Replacing(Referenced):
            rival = False

            async def reference(self, revision: Revision) -> PayloadReference | None:
                if self.rival:
                    self.rival = False
                    await setup.put(OTHER_LARGE)
                    await self.delete(revision)
                return await super().reference(revision)

        long_term = Replacing()
        setup = Setup(long_term)
        await setup.put(LARGE)
        long_term.rival = True

        assert long_term.read(await setup.refer()) == OTHER_LARGE
        await setup.settled()

    async def test_a_tombstone_whose_revision_is_gone_is_no_object(self) -> None:
        """TIER-11."""
        setup = Setup()
        await setup.put(LARGE)
        (name,) = revisions(setup.long_term)
        await setup.long_term.delete(Revision(name))

        assert await setup.storage.get(OBJECT, fits=lambda _: False) is None
        await setup.storage.join()

    async def test_a_reference_counts_as_a_read_for_idle_expiry(self) -> None:
        setup = Setup()
        await setup.put(LARGE, Metadata(expiration=TimeToIdle(50)))
        setup.clock.advance(30)
        await setup.refer()
        setup.clock.advance(30)

        assert setup.long_term.read(await setup.refer()) == LARGE
        await setup.storage.join()


class TestInlineObjects:
    """Copied below `responses/` first."""

    async def test_a_reference_leads_to_a_copy_of_the_bytes(self) -> None:
        setup = Setup()
        await setup.put(SMALL, Metadata(content_type="text/plain"))
        found = await setup.storage.get(OBJECT, fits=lambda _: False)

        assert found is not None
        assert setup.long_term.read(found.payload) == SMALL
        assert (found.metadata.content_type, found.metadata.time_expires) == ("text/plain", None)
        (copy,) = setup.copies
        assert copy.startswith(f"responses/{OBJECT.storage_path}/")
        await setup.settled()

    async def test_an_object_read_often_is_copied_once_a_period(self) -> None:
        """Also by another process, and by a replay."""
        setup = Setup()
        await setup.put(SMALL)
        first = await setup.refer()
        setup.clock.advance(RETENTION - 1)
        other = Handouts(setup.long_term, timedelta(seconds=RETENTION), clock=setup.clock)
        row = await setup.high_volume.get_tiered(OBJECT)
        assert row is not None

        assert await setup.refer() == await other.to_inline(OBJECT, row) == first  # type: ignore[arg-type]
        setup.clock.advance(1)
        assert await setup.refer() != first
        assert len(setup.copies) == 2
        await setup.settled()

    @pytest.mark.parametrize("into_the_period", [0.0, RETENTION - 0.000001])
    async def test_a_copy_lives_one_to_two_retentions_and_goes_by_itself(self, into_the_period: float) -> None:
        setup = Setup()
        await setup.put(SMALL)
        setup.clock.advance(into_the_period)
        reference = await setup.refer()
        (copy,) = setup.copies

        setup.clock.advance(RETENTION)
        assert setup.long_term.read(reference) == SMALL
        assert await setup.long_term.head(Revision(copy)) is not None
        setup.clock.advance(RETENTION)
        assert await setup.long_term.head(Revision(copy)) is None
        await setup.settled()

    async def test_another_version_is_another_copy(self) -> None:
        """Same size and time, other bytes; and same bytes, other time."""
        setup = Setup()
        for payload in (b"aaaaa", b"bbbbb"):
            await setup.put(payload)
            assert setup.long_term.read(await setup.refer()) == payload
        setup.clock.advance(1)
        await setup.put(b"bbbbb")
        await setup.refer()

        assert len(setup.copies) == 3
        await setup.settled()

    async def test_the_copy_outlives_the_object(self) -> None:
        setup = Setup()
        await setup.put(SMALL)
        reference = await setup.refer()
        await setup.storage.delete(OBJECT)

        assert setup.long_term.read(reference) == SMALL
        await setup.settled()

    async def test_a_copy_that_cannot_be_made_is_a_passing_fault(self) -> None:
        class Failing(FailingUpload, Referenced):
            pass

        long_term = Failing()
        setup = Setup(long_term)
        await setup.put(SMALL)
        with pytest.raises(Away):
            await setup.refer()
        long_term.repair()

        assert long_term.read(await setup.refer()) == SMALL
        await setup.settled()

    async def test_a_copy_that_is_not_what_it_was_made_from_is_not_handed_out(self) -> None:
        setup = Setup()
        await setup.put(SMALL)
        await setup.refer()
        (copy,) = setup.copies
        stored = setup.long_term._revisions[copy]
        setup.long_term._revisions[copy] = replace(stored, payload=b"other")

        with pytest.raises(BackendError):
            await setup.refer()
        await setup.storage.join()

    async def test_a_copy_that_vanishes_at_once_is_a_passing_fault(self) -> None:
        class Vanishing(Referenced):
            async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
                assert isinstance(payload, bytes)
                return len(payload)

        setup = Setup(Vanishing())
        await setup.put(SMALL)

        with pytest.raises(BackendUnavailable):
            await setup.refer()
        await setup.storage.join()


class TestWithoutReferences:
    """The plain API, and tiers that nobody else reads."""

    def test_memory_has_none_to_give(self) -> None:
        with pytest.raises(ConfigError, match="in_responses"):
            TieredStorage(MemoryBackend(), MemoryBackend(), handout_seconds=1.0)

    async def test_what_does_not_fit_is_too_large_and_nothing_is_kept(self) -> None:
        """Contract 10: the retention concerns the service only, not the plain API."""
        high_volume, long_term, log = MemoryBackend(), Referenced(), MemoryChangeLog()
        storage = TieredStorage(high_volume, long_term, log, LIMIT)
        for payload in (SMALL, LARGE):
            await storage.put(OBJECT, DEFAULT_METADATA, payload)
            with pytest.raises(TooLarge) as caught:
                await storage.get(OBJECT, fits=lambda _: False)
            assert caught.value.code == "response_too_large"
        await storage.delete(OBJECT)
        await storage.join()

        await assert_nothing_left_over(high_volume, long_term, log)
        assert long_term._revisions == {}


class TestNames:
    """Copies and revisions cannot be taken for each other, whatever usecases are called."""

    @pytest.mark.parametrize("usecase", ["usecase", "responses", "objects"])
    async def test_a_copy_is_no_revision_and_a_revision_no_copy(self, usecase: str) -> None:
        long_term, clock = Referenced(), Clock()
        handouts = Handouts(long_term, timedelta(seconds=RETENTION), clock=clock)
        object_id = ObjectId(ObjectContext(usecase), "objects/key")
        high_volume = MemoryBackend()
        await high_volume.put_non_tombstone(object_id, DEFAULT_METADATA, SMALL)
        row = await high_volume.get_tiered(object_id)
        await handouts.to_inline(object_id, row)  # type: ignore[arg-type]
        (copy,) = long_term._revisions

        assert is_copy(copy)
        with pytest.raises(InvalidOperation):
            parse_revision(copy)
        assert not is_copy(new_revision(object_id).name)
        assert len(copy.encode()) <= len(new_revision(object_id).name) + len("responses/")

    @pytest.mark.parametrize("name", ["responses/", "responses/t/0/1", "x", "responses/a/not-a-uuid"])
    def test_what_is_neither_is_neither(self, name: str) -> None:
        assert not is_copy(name)

    async def test_a_cancelled_read_harms_nothing(self) -> None:
        setup = Setup()
        await setup.put(SMALL)
        task = asyncio.create_task(setup.refer())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

        assert setup.long_term.read(await setup.refer()) == SMALL
        await setup.settled()
