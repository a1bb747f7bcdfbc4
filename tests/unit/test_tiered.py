"""Tiered storage: where an object goes, what replaces what, and what is left after every failure."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from consumer.errors import BackendError, BackendUnavailable, TooLarge
from consumer.ids import ObjectContext, ObjectId, Scope
from consumer.metrics import Counts
from consumer.operations import DEFAULT_METADATA, Metadata, StoredObject, TimeToIdle, TimeToLive
from consumer.storage import tiered
from consumer.storage.backend import Change, InlineObject, Payload, Revision, Tombstone
from consumer.storage.memory import MemoryBackend, MemoryChangeLog
from consumer.storage.revision import new_revision, parse_revision, uuid7
from consumer.storage.tiered import THRESHOLD, TieredStorage
from failures import (
    Away,
    FailingDeletion,
    FailingExtension,
    FailingRead,
    FailingRecord,
    FailingSwap,
    FailingUpload,
    InheritedChanges,
    LateSwap,
    LostDeletionAnswer,
    LostRecordAnswer,
    LostSwapAnswer,
    LostUploadAnswer,
    PauseAfterRecord,
    PauseAfterSwap,
    PauseAfterUpload,
    PauseBeforeSwap,
    Paused,
    ReplacedWhileRead,
    RevisionMissing,
    SwapConflict,
    TornUpload,
    assert_nothing_left_over,
    revisions,
    tombstones,
)

OBJECT = ObjectId(ObjectContext("usecase", [Scope("org", "17")]), "a/key")
SMALL, OTHER_SMALL = b"small", b"other"
LARGE, OTHER_LARGE = b"L" * 11, b"l" * 12
LIMIT = 10
"""Threshold of most tests here."""


class Clock:
    """A wall clock that moves when told to."""

    def __init__(self) -> None:
        self.time = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def advance(self, seconds: float) -> None:
        """Move on."""
        self.time += timedelta(seconds=seconds)


class Setup:
    """A storage with all it stands on; joins, then checks that nothing is left over."""

    def __init__(
        self,
        high_volume: MemoryBackend | None = None,
        long_term: MemoryBackend | None = None,
        log: MemoryChangeLog | None = None,
        *,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self.high_volume = high_volume or MemoryBackend()
        self.long_term = long_term or MemoryBackend()
        self.log = log or MemoryChangeLog()
        self.storage = TieredStorage(self.high_volume, self.long_term, self.log, LIMIT, clock=clock or Clock())
        self.storage.changes._delay = lambda _failed: 0.0

    async def settled(self) -> None:
        """Wait for all clean-up and assert that it was complete."""
        await self.storage.join()
        await assert_nothing_left_over(self.high_volume, self.long_term, self.log)

    async def payload(self) -> bytes | None:
        """Read the object."""
        found = await self.storage.get(OBJECT)
        if found is None:
            return None
        assert isinstance(found.payload, bytes)
        return found.payload


async def put(setup: Setup, payload: Payload) -> Metadata:
    """Put the one object."""
    return await setup.storage.put(OBJECT, DEFAULT_METADATA, payload)


async def before(setup: Setup, payload: bytes | None) -> None:
    """Let *payload* be what was there before, whatever the doubles do to a put."""
    if payload is None:
        return
    metadata = Metadata(size=len(payload))
    if len(payload) <= LIMIT:
        assert await MemoryBackend.put_non_tombstone(setup.high_volume, OBJECT, metadata, payload) is None
        return
    revision = new_revision(OBJECT)
    await MemoryBackend.put(setup.long_term, revision, metadata, payload)
    assert await MemoryBackend.compare_and_write(setup.high_volume, OBJECT, None, Tombstone(revision, metadata))


class Noted:
    """A backend whose calls are noted; a join is none."""

    def __init__(self, backend: object, calls: list[str]) -> None:
        self._backend = backend
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        if name not in {"join", "owner"}:
            self._calls.append(name)
        return getattr(self._backend, name)


def up_to(size: int) -> Callable[[Metadata], bool]:
    """What a caller can take who can take payloads of *size* bytes."""
    return lambda metadata: (metadata.size or 0) <= size


async def chunks(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Yield *parts*."""
    for part in parts:
        yield part


class TestSizeRouting:
    """SIZ-1 … SIZ-6."""

    @pytest.mark.parametrize("streamed", [False, True])
    @pytest.mark.parametrize("size", [0, 1, LIMIT - 1, LIMIT])
    async def test_up_to_the_threshold_is_small(self, size: int, streamed: bool) -> None:
        """SIZ-1, SIZ-4: exactly the threshold is small, and so is nothing at all."""
        setup = Setup()
        payload = bytes(size)
        await put(setup, chunks([payload[:3], payload[3:]]) if streamed else payload)

        assert revisions(setup.long_term) == set()
        assert await setup.payload() == payload
        await setup.settled()

    @pytest.mark.parametrize("streamed", [False, True])
    async def test_one_byte_more_is_large(self, streamed: bool) -> None:
        """SIZ-1."""
        setup = Setup()
        payload = bytes(range(LIMIT + 1))
        await put(setup, chunks([payload[:LIMIT], payload[LIMIT:]]) if streamed else payload)

        assert len(revisions(setup.long_term)) == 1
        assert await setup.payload() == payload
        await setup.settled()

    async def test_the_default_threshold_is_a_mebibyte(self) -> None:
        """SIZ-1."""
        long_term = MemoryBackend()
        storage = TieredStorage(MemoryBackend(), long_term)
        await storage.put(OBJECT, DEFAULT_METADATA, bytes(1_048_576))
        assert not revisions(long_term)

        await storage.put(OBJECT, DEFAULT_METADATA, bytes(1_048_577))
        assert revisions(long_term)
        await storage.join()

    async def test_no_more_is_read_ahead_than_decides(self) -> None:
        """SIZ-2: the threshold, and the chunk that crosses it; nothing beyond before the entry is durable."""
        given: list[int] = []

        async def counted() -> AsyncIterator[bytes]:
            for number in range(5):
                given.append(number)
                yield b"12345"

        log = PauseAfterRecord()
        setup = Setup(log=log)
        source = counted()
        task = asyncio.create_task(put(setup, source))
        await log.reached.wait()

        assert given == [0, 1, 2]
        log.go_on.set()
        await task
        assert await setup.payload() == b"12345" * 5
        await setup.settled()

    async def test_chunks_arrive_in_order_and_uncopied(self) -> None:
        """SIZ-3: the very same objects, the crossing chunk included."""
        seen: list[bytes] = []

        class Watched(MemoryBackend):
            async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
                assert not isinstance(payload, bytes)
                seen.extend([chunk async for chunk in payload])
                return sum(map(len, seen))

        parts = [bytes([number]) * 4 for number in range(6)]
        setup = Setup(long_term=Watched())
        stamped = await put(setup, chunks(parts))

        assert all(got is part for got, part in zip(seen, parts, strict=True))
        assert stamped.size == 24
        await setup.storage.join()

    @pytest.mark.parametrize("parts", [[b"", b"", b"x" * LIMIT, b""], [b"x" * LIMIT], [b"x"] * LIMIT + [b""]])
    async def test_empty_chunks_change_nothing(self, parts: list[bytes]) -> None:
        """SIZ-4."""
        setup = Setup()
        await put(setup, chunks(parts))

        assert revisions(setup.long_term) == set()
        assert await setup.payload() == b"x" * LIMIT
        await setup.settled()

    @pytest.mark.parametrize("good", [0, 1, 2, 3, 5])
    async def test_a_stream_that_breaks_stores_nothing(self, good: int) -> None:
        """SIZ-5: its own error comes out, before and after the threshold, and the old object stays."""
        broken = RuntimeError("the client is gone")

        async def breaking() -> AsyncIterator[bytes]:
            for _ in range(good):
                yield b"12345"
            raise broken

        setup = Setup()
        await put(setup, LARGE)
        with pytest.raises(RuntimeError) as caught:
            await put(setup, breaking())

        assert caught.value is broken
        assert await setup.payload() == LARGE
        await setup.settled()

    @pytest.mark.parametrize("kind", [bytearray, memoryview])
    async def test_anything_like_bytes_is_taken_whole(self, kind: Callable[[bytes], bytes]) -> None:
        setup = Setup()
        await put(setup, kind(LARGE))

        assert await setup.payload() == LARGE
        await setup.settled()


class TestStamps:
    """MD-5."""

    @pytest.mark.parametrize("payload", [SMALL, LARGE])
    async def test_what_the_client_says_of_read_only_fields_is_ignored(self, payload: bytes) -> None:
        clock = Clock()
        setup = Setup(clock=clock)
        never = datetime(1, 1, 1, tzinfo=UTC)
        given = Metadata("text/plain", custom={"a": "b"}, time_created=never, time_expires=never, size=-1)

        stamped = await setup.storage.put(OBJECT, given, payload)

        assert stamped == Metadata("text/plain", custom={"a": "b"}, time_created=clock(), size=len(payload))
        assert await setup.storage.head(OBJECT) == stamped
        assert await setup.storage.get(OBJECT) == StoredObject(stamped, payload)
        await setup.settled()

    @pytest.mark.parametrize("expiration", [TimeToLive(60), TimeToIdle(60)])
    @pytest.mark.parametrize("payload", [SMALL, LARGE])
    async def test_an_expiry_is_counted_from_the_write(
        self, payload: bytes, expiration: TimeToLive | TimeToIdle
    ) -> None:
        clock = Clock()
        setup = Setup(MemoryBackend(clock=clock), MemoryBackend(clock=clock), clock=clock)

        stamped = await setup.storage.put(OBJECT, Metadata(expiration=expiration), payload)
        assert stamped.time_expires == clock() + timedelta(seconds=60)

        clock.advance(59.999)
        assert await setup.payload() == payload
        clock.advance(60)
        assert await setup.payload() is None
        assert await setup.storage.head(OBJECT) is None

    async def test_a_streamed_object_gets_the_size_it_turned_out_to_have(self) -> None:
        setup = Setup()
        assert (await put(setup, chunks([LARGE, LARGE]))).size == 22
        found = await setup.storage.head(OBJECT)

        assert found is not None
        assert found.size == 22
        await setup.settled()


class TestReplacing:
    """TIER-2, TIER-3, TIER-4, TIER-14, without failures."""

    @pytest.mark.parametrize("after", [None, SMALL, OTHER_LARGE])
    @pytest.mark.parametrize("first", [None, OTHER_SMALL, LARGE])
    async def test_anything_replaces_anything(self, first: bytes | None, after: bytes | None) -> None:
        """TIER-14: large over large leaves one revision, small over large none, deleting leaves nothing."""
        setup = Setup()
        if first is not None:
            await put(setup, first)
        if after is None:
            await setup.storage.delete(OBJECT)
        else:
            await put(setup, after)

        assert await setup.payload() == after
        await setup.settled()
        assert len(revisions(setup.long_term)) == (after is OTHER_LARGE)
        assert bool(setup.high_volume._rows) == (after is not None)

    @pytest.mark.parametrize(
        ("after", "steps"),
        [
            (OTHER_LARGE, ["head_tiered", "record", "put", "compare_and_write"]),
            (SMALL, ["put_non_tombstone", "record", "compare_and_write"]),
            (None, ["delete_non_tombstone", "record", "compare_and_write"]),
        ],
        ids=["large", "small", "deleted"],
    )
    async def test_what_replaces_a_revision_takes_its_steps_in_order(
        self, after: bytes | None, steps: list[str]
    ) -> None:
        """TIER-2, TIER-3, TIER-4: recorded before anything happens, and nothing removed before the swap."""
        setup = Setup()
        await put(setup, LARGE)
        await setup.storage.join()
        taken: list[str] = []
        parts: list[Any] = [Noted(part, taken) for part in (setup.high_volume, setup.long_term, setup.log)]
        setup.storage = TieredStorage(parts[0], parts[1], parts[2], LIMIT)
        await setup.storage.join()
        taken.clear()

        await apply(setup, after)()
        await setup.settled()

        assert taken == [*steps, "delete", "remove"]

    async def test_what_touches_one_tier_is_not_recorded(self) -> None:
        """TIER-3: the common path writes no entry, and asks the high-volume tier once."""
        setup = Setup(long_term=FailingUpload(), log=FailingRecord())

        await put(setup, SMALL)
        await put(setup, OTHER_SMALL)
        assert await setup.payload() == OTHER_SMALL
        await setup.storage.delete(OBJECT)
        await setup.storage.delete(OBJECT)

        assert await setup.payload() is None
        await setup.settled()

    async def test_a_small_put_starts_no_task_and_never_suspends(self) -> None:
        setup = Setup()
        await setup.storage.join()
        tasks = asyncio.all_tasks()
        step = put(setup, SMALL)

        with pytest.raises(StopIteration):
            step.send(None)
        assert asyncio.all_tasks() == tasks

    async def test_the_entry_is_durable_before_the_upload(self) -> None:
        """LOG-1, TIER-2."""
        setup = Setup()
        entries: list[int] = []

        class Watched(MemoryBackend):
            async def put(self, revision: Revision, metadata: Metadata, payload: Payload) -> int:
                entries.append(await setup.log.count())
                return await super().put(revision, metadata, payload)

        setup.storage._long_term = Watched()
        await put(setup, LARGE)

        assert entries == [1]
        await setup.storage.join()

    async def test_a_revision_belongs_to_its_object(self) -> None:
        """TIER-1."""
        setup = Setup()
        await put(setup, LARGE)
        (name,) = revisions(setup.long_term)

        assert parse_revision(name)[0] == OBJECT
        await setup.settled()

    async def test_the_caller_does_not_wait_for_the_old_revision_to_go(self) -> None:
        """TIER-5, TIER-13: and does not hear of it either."""
        long_term = FailingDeletion()
        setup = Setup(long_term=long_term)
        await put(setup, LARGE)
        await put(setup, OTHER_LARGE)
        assert len(revisions(long_term)) == 2
        await setup.storage.delete(OBJECT)
        assert await setup.payload() is None

        await setup.storage.join()
        assert await setup.log.count() == 2
        assert len(revisions(long_term)) == 2


class TestReading:
    """TIER-10 … TIER-12."""

    async def test_a_missing_object_is_none_and_the_long_term_tier_is_not_asked(self) -> None:
        """TIER-10."""
        counts = Counts()
        storage = TieredStorage(MemoryBackend(), MemoryBackend(), observer=counts)

        assert await storage.get(OBJECT) is None
        assert await storage.head(OBJECT) is None
        await storage.join()
        assert not [key for key in counts._requests if key[0] == "long_term"]

    async def test_a_tombstone_without_its_revision_is_none(self) -> None:
        """TIER-11."""
        setup = Setup(long_term=RevisionMissing())
        await put(setup, LARGE)

        assert await setup.storage.get(OBJECT) is None
        assert await setup.storage.head(OBJECT) is None
        await setup.settled()

    async def test_the_tombstone_says_where_the_payload_is(self) -> None:
        """TIER-12: its target counts, wherever that is; deleting removes that very revision."""
        setup = Setup()
        elsewhere = Revision("somewhere/else")
        await setup.long_term.put(elsewhere, DEFAULT_METADATA, LARGE)
        await setup.high_volume.compare_and_write(OBJECT, None, Tombstone(elsewhere, DEFAULT_METADATA))

        assert await setup.payload() == LARGE
        await setup.storage.delete(OBJECT)
        await setup.settled()
        assert not revisions(setup.long_term)

    @pytest.mark.parametrize("after", [SMALL, OTHER_LARGE])
    async def test_an_object_replaced_while_read_is_read_again(self, after: bytes) -> None:
        """TIER-11 only after a second look: replacing an object never makes it look absent."""
        high_volume = ReplacedWhileRead()
        setup = Setup(high_volume)
        await put(setup, LARGE)

        async def replace_once() -> None:
            high_volume.rival = None
            await put(setup, after)
            await setup.storage.changes.join()

        high_volume.rival = replace_once
        assert await setup.payload() == after

        await put(setup, LARGE)
        await setup.storage.changes.join()
        high_volume.rival = replace_once
        head = await setup.storage.head(OBJECT)
        assert head is not None
        assert head.size == len(after)
        await setup.settled()

    async def test_an_object_deleted_while_read_is_none(self) -> None:
        high_volume = ReplacedWhileRead()
        setup = Setup(high_volume)
        await put(setup, LARGE)

        async def delete_once() -> None:
            high_volume.rival = None
            await setup.storage.delete(OBJECT)
            await setup.storage.changes.join()

        high_volume.rival = delete_once
        assert await setup.payload() is None
        await setup.settled()

    async def test_an_object_replaced_at_every_look_is_unavailable_not_absent(self) -> None:
        high_volume = ReplacedWhileRead()
        setup = Setup(high_volume)
        await put(setup, LARGE)
        replacing = False

        async def replace_always() -> None:
            nonlocal replacing
            if not replacing:
                replacing = True
                await put(setup, LARGE)
                await setup.storage.changes.join()
                replacing = False

        high_volume.rival = replace_always
        with pytest.raises(BackendUnavailable):
            await setup.storage.get(OBJECT)
        with pytest.raises(BackendUnavailable):
            await setup.storage.head(OBJECT)
        high_volume.rival = None
        await setup.settled()

    @pytest.mark.parametrize("payload", [SMALL, LARGE])
    async def test_a_payload_over_the_callers_limit_is_refused(self, payload: bytes) -> None:
        setup = Setup()
        await put(setup, payload)

        assert await setup.storage.get(OBJECT, fits=up_to(len(payload))) is not None
        with pytest.raises(TooLarge) as caught:
            await setup.storage.get(OBJECT, fits=up_to(len(payload) - 1))
        assert caught.value.code == "response_too_large"
        await setup.settled()

    async def test_a_payload_over_the_callers_limit_is_not_loaded(self) -> None:
        counts = Counts()
        storage = TieredStorage(MemoryBackend(), MemoryBackend(), threshold=LIMIT, observer=counts)
        await storage.put(OBJECT, DEFAULT_METADATA, LARGE)

        with pytest.raises(TooLarge):
            await storage.get(OBJECT, fits=up_to(1))
        await storage.join()
        assert ("long_term", "get") not in counts._requests

    async def test_half_a_payload_is_an_error(self) -> None:
        """A readable object is whole: a revision of another size than its tombstone's is not handed out."""
        setup = Setup()
        await put(setup, LARGE)
        (name,) = revisions(setup.long_term)
        await setup.long_term.put(Revision(name), DEFAULT_METADATA, LARGE[:-1])

        with pytest.raises(BackendError):
            await setup.storage.get(OBJECT)
        await setup.settled()


class TestConflicts:
    """TIER-6, TIER-15: losing is a success, and the loser cleans up after itself."""

    @pytest.mark.parametrize("rival", [None, OTHER_SMALL, OTHER_LARGE])
    @pytest.mark.parametrize("mine", [None, SMALL, LARGE])
    async def test_whoever_swaps_first_wins(self, mine: bytes | None, rival: bytes | None) -> None:
        """A large object is there; two writers meet on it, and one of them is between its read and its swap."""
        high_volume = SwapConflict()
        setup = Setup(high_volume)
        await put(setup, b"before that")
        high_volume.rival = apply(setup, rival)

        await apply(setup, mine)()

        # Mine counts as the earlier of the two, whatever they are.
        assert await setup.payload() == rival
        await setup.settled()

    async def test_a_first_large_write_wins_over_a_small_one_in_between(self) -> None:
        """HV-5: an inline object is no tombstone, so a large write that saw none goes through."""
        high_volume = SwapConflict()
        setup = Setup(high_volume)
        high_volume.rival = apply(setup, SMALL)

        await put(setup, LARGE)

        assert await setup.payload() == LARGE
        await setup.settled()

    async def test_of_two_first_large_writes_one_stays(self) -> None:
        high_volume = SwapConflict()
        setup = Setup(high_volume)
        high_volume.rival = apply(setup, OTHER_LARGE)

        stamped = await put(setup, LARGE)

        assert stamped.size == len(LARGE)
        assert await setup.payload() == OTHER_LARGE
        await setup.settled()

    async def test_conflicts_are_counted(self) -> None:
        counts = Counts()
        high_volume = SwapConflict()
        setup = Setup(high_volume)
        storage = TieredStorage(high_volume, setup.long_term, threshold=LIMIT, observer=counts)
        high_volume.rival = apply(setup, OTHER_LARGE)
        await storage.put(OBJECT, DEFAULT_METADATA, LARGE)
        await storage.join()

        assert counts.requests("high_volume", "compare_and_write").conflicts == 1
        assert counts.orphans_removed == 1
        await setup.settled()

    async def test_sixteen_writers_leave_one_object(self) -> None:
        setup = Setup()
        payloads: list[bytes | None] = [bytes([number]) * (5 + number % 12) for number in range(16)]
        payloads[3] = payloads[7] = None

        await asyncio.gather(*(apply(setup, payload)() for payload in payloads))

        assert await setup.payload() in payloads
        await setup.settled()

    @pytest.mark.parametrize("payload", [SMALL, LARGE + b"r"], ids=["small", "large"])
    async def test_a_tombstone_that_expires_before_the_swap_does_not_lose_the_object(self, payload: bytes) -> None:
        """The swap finds nothing to swap, and calls that done, or lost; the object is put all the same."""
        clock = Clock()
        high_volume = SwapConflict()
        high_volume._clock = clock
        setup = Setup(high_volume, clock=clock)
        await setup.storage.put(OBJECT, Metadata(expiration=TimeToLive(5)), LARGE)
        await setup.storage.changes.join()

        async def expire() -> None:
            clock.advance(6)

        high_volume.rival = expire
        await put(setup, payload)

        assert await setup.payload() == payload
        await setup.settled()


def apply(setup: Setup, payload: bytes | None) -> Callable[[], Awaitable[object]]:
    """Return what puts *payload*, or deletes where there is none."""
    if payload is None:
        return lambda: setup.storage.delete(OBJECT)
    return lambda: put(setup, payload)


BEFORE = [None, OTHER_SMALL, OTHER_LARGE]


class TestFailures:
    """TIER-7, TIER-8, TIER-9, LOG-1: the error goes to the caller, and nothing is left over."""

    @pytest.mark.parametrize("first", BEFORE)
    @pytest.mark.parametrize("double", [FailingUpload, LostUploadAnswer, TornUpload])
    async def test_a_failed_upload_changes_nothing(self, double: type[MemoryBackend], first: bytes | None) -> None:
        """TIER-9."""
        setup = Setup(long_term=double())
        await before(setup, first)

        with pytest.raises((Away, BackendError)):
            await put(setup, LARGE)

        assert await setup.payload() == first
        await setup.settled()

    @pytest.mark.parametrize("first", BEFORE)
    async def test_a_swap_that_did_not_happen_changes_nothing(self, first: bytes | None) -> None:
        """TIER-7."""
        setup = Setup(FailingSwap())
        await before(setup, first)

        with pytest.raises(Away):
            await put(setup, LARGE)

        assert await setup.payload() == first
        await setup.settled()

    @pytest.mark.parametrize("first", BEFORE)
    async def test_a_swap_whose_answer_is_lost_has_happened(self, first: bytes | None) -> None:
        """TIER-8: the new revision survives, the old one goes."""
        setup = Setup(LostSwapAnswer())
        await before(setup, first)

        with pytest.raises(Away):
            await put(setup, LARGE)

        assert await setup.payload() == LARGE
        await setup.settled()

    @pytest.mark.parametrize("mine", [None, SMALL])
    async def test_a_tombstone_that_could_not_be_replaced_stays(self, mine: bytes | None) -> None:
        """TIER-7, for the two changes without a new revision."""
        setup = Setup(FailingSwap())
        await before(setup, LARGE)

        with pytest.raises(Away):
            await apply(setup, mine)()

        assert await setup.payload() == LARGE
        await setup.settled()

    @pytest.mark.parametrize("mine", [None, SMALL])
    async def test_a_tombstone_replaced_without_an_answer_is_replaced(self, mine: bytes | None) -> None:
        """TIER-8, likewise."""
        setup = Setup(LostSwapAnswer())
        await before(setup, LARGE)

        with pytest.raises(Away):
            await apply(setup, mine)()

        assert await setup.payload() == mine
        await setup.settled()

    @pytest.mark.parametrize("double", [FailingRecord, LostRecordAnswer])
    @pytest.mark.parametrize("mine", [None, SMALL, LARGE])
    async def test_without_an_entry_nothing_happens(self, mine: bytes | None, double: type[MemoryChangeLog]) -> None:
        """LOG-1."""
        setup = Setup(log=double())
        await before(setup, OTHER_LARGE)
        there = revisions(setup.long_term)

        with pytest.raises(Away):
            await apply(setup, mine)()

        assert revisions(setup.long_term) == there
        assert await setup.payload() == OTHER_LARGE
        await setup.settled()

    async def test_a_row_that_cannot_be_read_stops_a_large_put_at_once(self) -> None:
        setup = Setup(FailingRead(1), FailingUpload(), FailingRecord())

        with pytest.raises(Away):
            await put(setup, LARGE)
        await setup.settled()

    @pytest.mark.parametrize("arrives", ["before clean-up", "after clean-up"])
    @pytest.mark.parametrize("first", BEFORE)
    async def test_a_swap_that_arrives_late_never_points_to_nothing(self, first: bytes | None, arrives: str) -> None:
        """TIER-7 with a request still on its way: it counts before clean-up has decided, and is refused afterwards."""
        high_volume = LateSwap()
        setup = Setup(high_volume)
        await before(setup, first)
        with pytest.raises(Away):
            await put(setup, LARGE)

        if arrives == "before clean-up":
            assert await high_volume.arrive()
            await setup.storage.join()
        else:
            await setup.storage.join()
            with pytest.raises(BackendUnavailable):
                await high_volume.arrive()

        assert await setup.payload() == (LARGE if arrives == "before clean-up" else first)
        await setup.settled()

    @pytest.mark.parametrize("double", [FailingDeletion, LostDeletionAnswer])
    async def test_clean_up_that_fails_is_tried_again(self, double: type[FailingDeletion | LostDeletionAnswer]) -> None:
        long_term = double(2)
        setup = Setup(long_term=long_term)
        await put(setup, LARGE)
        await put(setup, SMALL)

        await setup.settled()
        assert long_term.failures == 2


class TestCancellation:
    """TIER-18."""

    @pytest.mark.parametrize("first", BEFORE)
    @pytest.mark.parametrize("at", ["record", "upload", "before swap", "after swap"])
    async def test_a_cancelled_put_leaves_the_old_object_or_the_new_one(self, at: str, first: bytes | None) -> None:
        paused: Paused
        if at == "record":
            setup = Setup(log=(paused := PauseAfterRecord()))
        elif at == "upload":
            setup = Setup(long_term=(paused := PauseAfterUpload()))
        else:
            setup = Setup(paused := PauseBeforeSwap() if at == "before swap" else PauseAfterSwap())
        await before(setup, first)
        task = asyncio.create_task(put(setup, LARGE))
        await paused.reached.wait()
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task

        assert await setup.payload() == (LARGE if at == "after swap" else first)
        await setup.settled()

    async def test_a_put_cancelled_at_any_of_its_steps_leaves_nothing_over(self) -> None:
        """Cancelled after every number of turns of the loop, over backends that suspend before and after each step."""

        class Suspending(MemoryBackend):
            def __getattribute__(self, name: str) -> object:
                found = super().__getattribute__(name)
                if name not in {"put", "compare_and_write", "head_tiered", "forbid", "delete"}:
                    return found

                async def step(*given: object) -> object:
                    await asyncio.sleep(0)
                    answer = await found(*given)
                    await asyncio.sleep(0)
                    return answer

                return step

        outcomes = set()
        for turns in range(30):
            setup = Setup(Suspending(), Suspending())
            await before(setup, OTHER_LARGE)
            task = asyncio.create_task(put(setup, LARGE))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            (error,) = await asyncio.gather(task, return_exceptions=True)
            payload = await setup.payload()

            assert payload == LARGE if isinstance(error, Metadata) else payload in {LARGE, OTHER_LARGE}
            outcomes.add((payload, isinstance(error, Metadata)))
            await setup.settled()
        assert len(outcomes) == 3


class TestRecovery:
    """LOG-5, LOG-6 seen from the storage; the change log's own tests have the details."""

    async def leftovers(self) -> tuple[MemoryBackend, MemoryBackend, Change]:
        """Return tiers in which a process has died between its upload and its swap, and its entry."""
        high_volume, long_term = MemoryBackend(), MemoryBackend()
        change = Change(uuid7(), OBJECT, new_revision(OBJECT), None)
        assert change.new is not None
        await long_term.put(change.new, DEFAULT_METADATA, LARGE)
        return high_volume, long_term, change

    async def test_begins_by_itself_and_join_waits_for_it(self) -> None:
        """LOG-6, TIER-17."""
        high_volume, long_term, change = await self.leftovers()
        log = InheritedChanges([change])
        await TieredStorage(high_volume, long_term, log).join()

        await assert_nothing_left_over(high_volume, long_term, log)

    def test_begins_with_the_first_operation_where_no_loop_ran_before(self) -> None:
        """LOG-6: a storage may be made outside of a loop."""
        high_volume, long_term, change = asyncio.run(self.leftovers())
        log = InheritedChanges([change])
        storage = TieredStorage(high_volume, long_term, log)

        async def use() -> None:
            assert await storage.head(OBJECT) is None
            await storage.join()
            await assert_nothing_left_over(high_volume, long_term, log)

        asyncio.run(use())

    async def test_can_be_asked_for(self) -> None:
        high_volume, long_term, change = await self.leftovers()
        log = InheritedChanges([change])
        storage = TieredStorage(high_volume, long_term, log)

        assert await storage.recover() == 1
        await storage.join()
        await assert_nothing_left_over(high_volume, long_term, log)

    @pytest.mark.parametrize("first", BEFORE)
    async def test_a_process_that_resumes_after_it_was_recovered_harms_nothing(self, first: bytes | None) -> None:
        """The zombie: paused between upload and swap, taken for dead, recovered, alive again."""
        high_volume = PauseBeforeSwap()
        zombie = Setup(high_volume)
        await before(zombie, first)
        task = asyncio.create_task(put(zombie, LARGE))
        await high_volume.reached.wait()
        log = InheritedChanges(zombie.log._changes.values())
        await TieredStorage(high_volume, zombie.long_term, log, LIMIT).join()
        assert revisions(zombie.long_term) == tombstones(high_volume)

        high_volume.go_on.set()
        with pytest.raises(BackendUnavailable) as caught:
            await task

        assert caught.value.retriable
        assert await zombie.payload() == first
        await put(zombie, LARGE)
        assert await zombie.payload() == LARGE
        await zombie.settled()

    async def test_never_touches_a_change_begun_after_construction(self) -> None:
        """Contract 10: the reference's scan has this race."""
        long_term = PauseAfterUpload()
        setup = Setup(long_term=long_term)
        task = asyncio.create_task(put(setup, LARGE))
        await long_term.reached.wait()

        assert await setup.storage.recover() == 0
        long_term.go_on.set()
        await task

        assert await setup.payload() == LARGE
        await setup.settled()


class TestIdleExpiry:
    """Contract 5: extended when the remaining life is below tti - min(24 h, tti/10)."""

    @pytest.mark.parametrize("payload", [SMALL, LARGE])
    @pytest.mark.parametrize("read", ["get", "head"])
    @pytest.mark.parametrize(("idle", "slack"), [(100, 10), (10 * 86_400, 86_400), (365 * 86_400, 86_400)])
    async def test_is_extended_by_a_read_when_due(self, read: str, payload: bytes, idle: int, slack: int) -> None:
        clock = Clock()
        setup = Setup(MemoryBackend(clock=clock), MemoryBackend(clock=clock), clock=clock)

        async def expires() -> datetime | None:
            found = await getattr(setup.storage, read)(OBJECT)
            return found.time_expires if isinstance(found, Metadata) else found.metadata.time_expires

        await setup.storage.put(OBJECT, Metadata(expiration=TimeToIdle(idle)), payload)
        first = clock() + timedelta(seconds=idle)
        clock.advance(slack)
        assert await expires() == first

        clock.advance(1)
        second = clock() + timedelta(seconds=idle)
        assert await expires() == second
        for row in (*setup.high_volume._rows.values(), *setup.long_term._revisions.values()):
            assert row.metadata.time_expires == second
        clock.advance(idle - 1)
        assert await setup.payload() == payload
        await setup.settled()

    async def test_a_time_to_live_is_not_extended(self) -> None:
        clock = Clock()
        setup = Setup(clock=clock)
        stamped = await setup.storage.put(OBJECT, Metadata(expiration=TimeToLive(100)), SMALL)
        clock.advance(99)

        assert await setup.storage.head(OBJECT) == stamped

    @pytest.mark.parametrize("payload", [SMALL, LARGE])
    async def test_a_failure_to_extend_is_nobodys_business(self, payload: bytes) -> None:
        clock = Clock()
        for broken in (FailingExtension(), None):
            setup = Setup(broken, None if broken else FailingExtension(), clock=clock)
            stamped = await setup.storage.put(OBJECT, Metadata(expiration=TimeToIdle(100)), payload)
            clock.advance(99)

            assert await setup.payload() == payload
            row = setup.high_volume._rows[OBJECT.storage_path].metadata
            assert row == stamped or (broken is None and payload == SMALL)  # a small object has but one expiry
            await setup.storage.join()

    async def test_an_extension_never_brings_back_what_was_replaced(self) -> None:
        """It is conditional on the metadata that was read (the reference's is not)."""
        clock = Clock()
        high_volume = ReplacedWhileRead()
        setup = Setup(high_volume, clock=clock)
        await setup.storage.put(OBJECT, Metadata(expiration=TimeToIdle(100)), SMALL)
        clock.advance(50)

        async def delete_once() -> None:
            high_volume.rival = None
            await setup.storage.delete(OBJECT)

        high_volume.rival = delete_once
        assert await setup.payload() == SMALL
        assert await setup.payload() is None


class TestObserver:
    """Contract 9: every request, by tier and operation."""

    async def test_requests_and_bytes_are_counted_by_tier(self) -> None:
        counts = Counts()
        storage = TieredStorage(MemoryBackend(), MemoryBackend(), threshold=LIMIT, observer=counts)
        await storage.put(OBJECT, DEFAULT_METADATA, SMALL)
        await storage.get(OBJECT)
        await storage.put(OBJECT, DEFAULT_METADATA, LARGE)
        await storage.get(OBJECT)
        await storage.delete(OBJECT)
        await storage.join()

        assert {key: requests.success.count for key, requests in counts._requests.items()} == {
            ("high_volume", "put_non_tombstone"): 1,
            ("high_volume", "get_tiered"): 2,
            ("high_volume", "head_tiered"): 1,
            ("high_volume", "compare_and_write"): 2,
            ("high_volume", "delete_non_tombstone"): 1,
            ("long_term", "put"): 1,
            ("long_term", "get"): 1,
            ("long_term", "delete"): 1,
            ("change_log", "recoverable"): 1,
            ("change_log", "record"): 2,
            ("change_log", "remove"): 2,
        }
        assert counts.storage_bytes == {
            ("high_volume", "write"): len(SMALL),
            ("high_volume", "read"): len(SMALL),
            ("long_term", "write"): len(LARGE),
            ("long_term", "read"): len(LARGE),
        }

    async def test_failures_are_counted_as_errors(self) -> None:
        counts = Counts()
        storage = TieredStorage(FailingSwap(), MemoryBackend(), threshold=LIMIT, observer=counts)
        with pytest.raises(Away):
            await storage.put(OBJECT, DEFAULT_METADATA, LARGE)
        await storage.join()

        swaps = counts.requests("high_volume", "compare_and_write")
        assert (swaps.success.count, swaps.error.count) == (0, 1)
        assert counts.storage_bytes == {}

    async def test_what_the_backend_is_stays_visible(self) -> None:
        """Attributes that are no requests are the backend's own."""
        storage = TieredStorage(MemoryBackend(), MemoryBackend(), MemoryChangeLog("me"), observer=Counts())

        assert storage.change_log.owner == "me"
        await storage.join()


class Closing(MemoryBackend):
    """Counts how often it is closed."""

    closed = 0

    async def close(self) -> None:
        self.closed += 1


async def test_closing_closes_each_part_once() -> None:
    """One backend may serve as both tiers."""
    both, high_volume, long_term = Closing(), Closing(), Closing()
    for parts in ((both, both), (high_volume, long_term)):
        storage = TieredStorage(*parts)
        await storage.join()
        await storage.close()

    assert both.closed == high_volume.closed == long_term.closed == 1


async def test_one_backend_may_be_both_tiers() -> None:
    """Contract 10: MemoryBackend serves as both."""
    both = MemoryBackend()
    setup = Setup(both, both)
    for payload in (SMALL, LARGE, OTHER_LARGE, SMALL, LARGE):
        await put(setup, payload)
        assert await setup.payload() == payload
    await setup.settled()


async def test_reads_and_writes_work_after_a_join() -> None:
    """Contract 10: a join ends nothing but the waiting."""
    setup = Setup()
    await setup.settled()
    await put(setup, LARGE)
    await put(setup, SMALL)
    assert await setup.payload() == SMALL
    await setup.settled()


def test_the_constants_of_the_algorithm_are_those_of_the_contract() -> None:
    """Contract 5."""
    assert THRESHOLD == 1_048_576
    assert timedelta(hours=24) == tiered.IDLE_SLACK_MAX


async def test_an_inline_row_keeps_its_object_when_a_swap_is_repeated() -> None:
    """HV-6, HV-9: a late retry never destroys a younger inline object."""
    high_volume = MemoryBackend()
    revision = new_revision(OBJECT)
    await high_volume.compare_and_write(OBJECT, None, Tombstone(revision, DEFAULT_METADATA))
    younger = InlineObject(replace(DEFAULT_METADATA, size=5), OTHER_SMALL)
    assert await high_volume.compare_and_write(OBJECT, revision, younger)
    assert await high_volume.compare_and_write(OBJECT, revision, InlineObject(DEFAULT_METADATA, SMALL))

    assert await high_volume.get_tiered(OBJECT) == StoredObject(younger.metadata, OTHER_SMALL)
