"""Every high-volume backend keeps one atomic row per object: HV-1 to HV-11 of the checklist, expiry, and the fence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import pytest

from consumer.errors import BackendUnavailable
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import Metadata, Position, StoredObject, TimeToIdle, TimeToLive
from consumer.storage.backend import HighVolumeBackend, InlineObject, Removal, Revision, TieredWrite, Tombstone
from consumer.storage.metadata import POSITION_KEPT
from consumer.storage.revision import new_revision

AnId: TypeAlias = Callable[..., ObjectId]

CREATED = datetime(2026, 1, 1, 12, 0, 0, 7, tzinfo=UTC)

FULL = Metadata(
    content_type="text/plain; charset=utf-8",
    expiration=TimeToIdle(3600),
    compression="zstd",
    filename="naïve \N{SNOWMAN}.txt",
    origin="203.0.113.7",
    custom={"b": "2", "a": "ünï", "empty": ""},
    time_created=CREATED,
    time_expires=datetime(2100, 1, 1, 0, 0, 0, 999_999, tzinfo=UTC),
)

HOSTILE_KEYS = [
    ".",
    "..",
    "../../../etc/passwd",
    "/etc/passwd",
    "//",
    "a/",
    "a//b",
    "a/../b",
    "metadata.json",
    ".lock",
    "FORMAT",
    "incoming",
    "-rf",
    "~root",
    "%2e%2e%2f",
    "%",
    "a b",
    "'; DROP TABLE objects; --",
    "*?[x]",
    "C:\\con",
    "Key",
    "key",
    "KEY",
    "é",
    "e\N{COMBINING ACUTE ACCENT}",
    "\N{RIGHT-TO-LEFT OVERRIDE}txt",
    "\N{ZERO WIDTH JOINER}",
    "\U0001f600" * 100,
    "x" * 850,
    "é" * 425,
]


def a_tombstone(object_id: ObjectId, **metadata: Any) -> Tombstone:
    """Return a tombstone for a revision nobody has named before."""
    return Tombstone(new_revision(object_id), Metadata(size=5_000_000, **metadata))


async def put_tombstone(backend: HighVolumeBackend, object_id: ObjectId, **metadata: Any) -> Tombstone:
    """Swap a tombstone into a row that has none."""
    tombstone = a_tombstone(object_id, **metadata)
    assert await backend.compare_and_write(object_id, None, tombstone)
    return tombstone


class TestPut:
    """Objects kept inline."""

    async def test_a_put_object_reads_back_whole(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """HV-1, HV-10, MD-7: the size is filled in, everything else comes back as it was."""
        assert await high_volume.put_non_tombstone(an_id(), FULL, b"payload") is None

        kept = replace(FULL, size=7)
        assert await high_volume.get_tiered(an_id()) == StoredObject(kept, b"payload")
        assert await high_volume.head_tiered(an_id()) == kept

    async def test_what_was_never_put_is_not_there(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """HV-2."""
        assert await high_volume.get_tiered(an_id()) is None
        assert await high_volume.head_tiered(an_id()) is None

    async def test_a_second_put_replaces_the_first(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        await high_volume.put_non_tombstone(an_id(), FULL, b"first")
        await high_volume.put_non_tombstone(an_id(), Metadata(), b"2")

        assert await high_volume.get_tiered(an_id()) == StoredObject(Metadata(size=1), b"2")

    async def test_an_empty_object_is_an_object(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """SIZ-4."""
        await high_volume.put_non_tombstone(an_id(), Metadata(), b"")

        assert await high_volume.get_tiered(an_id()) == StoredObject(Metadata(size=0), b"")

    async def test_a_mebibyte_is_kept_inline(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """SIZ-1."""
        payload = bytes(range(256)) * 4096
        await high_volume.put_non_tombstone(an_id(), Metadata(), payload)

        assert await high_volume.get_tiered(an_id()) == StoredObject(Metadata(size=1_048_576), payload)

    async def test_what_the_caller_does_to_its_buffer_later_changes_nothing(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        buffer: Any = bytearray(b"payload")
        await high_volume.put_non_tombstone(an_id("put"), Metadata(), buffer)
        await high_volume.compare_and_write(an_id("swapped"), None, InlineObject(Metadata(), buffer))
        buffer[:] = b"changed"

        for key in ("put", "swapped"):
            found = await high_volume.get_tiered(an_id(key))
            assert isinstance(found, StoredObject)
            assert (type(found.payload), found.payload) == (bytes, b"payload")

    async def test_a_put_over_a_tombstone_leaves_it_and_returns_it(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        """HV-1."""
        tombstone = await put_tombstone(high_volume, an_id(), custom={"a": "b"})

        assert await high_volume.put_non_tombstone(an_id(), Metadata(), b"x") == tombstone
        assert await high_volume.get_tiered(an_id()) == tombstone

    @pytest.mark.parametrize("key", HOSTILE_KEYS, ids=range(len(HOSTILE_KEYS)))
    async def test_a_hostile_key_is_a_key_like_any_other(
        self, high_volume: HighVolumeBackend, an_id: AnId, key: str
    ) -> None:
        await high_volume.put_non_tombstone(an_id(key), Metadata(filename=key[:50]), key.encode())

        found = await high_volume.get_tiered(an_id(key))
        assert found == StoredObject(Metadata(filename=key[:50], size=len(key.encode())), key.encode())
        assert await high_volume.delete_non_tombstone(an_id(key)) is None
        assert await high_volume.get_tiered(an_id(key)) is None

    async def test_keys_that_look_alike_are_different_objects(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        """No folding of case or Unicode, no cleaning of paths."""
        await asyncio.gather(
            *(high_volume.put_non_tombstone(an_id(key), Metadata(), key.encode()) for key in HOSTILE_KEYS)
        )

        for key in HOSTILE_KEYS:
            found = await high_volume.get_tiered(an_id(key))
            assert isinstance(found, StoredObject)
            assert found.payload == key.encode()

    async def test_the_order_of_scopes_is_part_of_the_address(self, high_volume: HighVolumeBackend) -> None:
        """ID-1."""
        one = ObjectId.parse("u/a.1/b.2/objects/k")
        other = ObjectId.parse("u/b.2/a.1/objects/k")
        await high_volume.put_non_tombstone(one, Metadata(), b"one")

        assert await high_volume.get_tiered(other) is None

    async def test_objects_of_another_usecase_are_untouched(self, high_volume: HighVolumeBackend) -> None:
        one, other = (ObjectId(ObjectContext(usecase), "k") for usecase in ("one", "other"))
        await high_volume.put_non_tombstone(one, Metadata(), b"one")
        await high_volume.put_non_tombstone(other, Metadata(), b"other")
        await high_volume.delete_non_tombstone(one)

        assert await high_volume.get_tiered(other) == StoredObject(Metadata(size=5), b"other")


class TestTombstones:
    """Rows that point to the long-term tier."""

    async def test_a_tombstone_reads_as_itself(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """HV-2, TIER-12: target and metadata as they were written, for both kinds of read."""
        tombstone = Tombstone(new_revision(an_id()), replace(FULL, size=9))
        assert await high_volume.compare_and_write(an_id(), None, tombstone)

        assert await high_volume.get_tiered(an_id()) == tombstone
        assert await high_volume.head_tiered(an_id()) == tombstone

    async def test_a_delete_leaves_a_tombstone_and_returns_it(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        """HV-4."""
        tombstone = await put_tombstone(high_volume, an_id())

        assert await high_volume.delete_non_tombstone(an_id()) == tombstone
        assert await high_volume.get_tiered(an_id()) == tombstone

    async def test_a_delete_removes_an_object_and_is_content_with_none(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        """HV-4."""
        await high_volume.put_non_tombstone(an_id(), Metadata(), b"x")

        assert await high_volume.delete_non_tombstone(an_id()) is None
        assert await high_volume.get_tiered(an_id()) is None
        assert await high_volume.delete_non_tombstone(an_id()) is None


STATES = ["nothing", "object", "expired object", "expired tombstone", "tombstone A", "tombstone B"]
WRITES = ["tombstone A", "tombstone B", "object", "removal"]
A, B = Revision("attachments/objects/k/A"), Revision("attachments/objects/k/B")


def as_write(name: str) -> TieredWrite:
    """Return the write a test names."""
    match name:
        case "tombstone A":
            return Tombstone(A, Metadata(filename="written"))
        case "tombstone B":
            return Tombstone(B, Metadata(filename="written"))
        case "object":
            return InlineObject(Metadata(filename="written"), b"written")
        case _:
            return Removal()


async def bring_into(backend: HighVolumeBackend, object_id: ObjectId, state: str, now: datetime) -> None:
    """Make the row *state*."""
    metadata = Metadata(filename="before", time_expires=now if state.startswith("expired") else None)
    if "object" in state:
        await backend.put_non_tombstone(object_id, metadata, b"before")
    elif "tombstone" in state:
        target = A if state.endswith("A") else B
        assert await backend.compare_and_write(object_id, None, Tombstone(target, metadata))


class TestCompareAndWrite:
    """The atomic step."""

    @pytest.mark.parametrize("write", WRITES)
    @pytest.mark.parametrize("current", [None, A])
    @pytest.mark.parametrize("state", STATES)
    async def test_every_case_of_the_table(
        self,
        high_volume: HighVolumeBackend,
        an_id: AnId,
        clock: Callable[[], datetime],
        state: str,
        current: Revision | None,
        write: str,
    ) -> None:
        """HV-5 to HV-9, BT-8: applied, already as wanted and then untouched, or lost and untouched."""
        await bring_into(high_volume, an_id(), state, clock())
        before = await high_volume.get_tiered(an_id())
        found = A if state == "tombstone A" else B if state == "tombstone B" else None
        wanted = A if write == "tombstone A" else B if write == "tombstone B" else None

        answer = await high_volume.compare_and_write(an_id(), current, as_write(write))

        after = await high_volume.get_tiered(an_id())
        assert answer is (found in {current, wanted})
        if found != current:
            assert after == before
        elif write == "object":
            assert after == StoredObject(Metadata(filename="written"), b"written")
        else:
            assert after == (None if write == "removal" else as_write(write))

    async def test_a_repeated_swap_says_yes_again(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """HV-6: the answer of the first may have been lost."""
        first = await put_tombstone(high_volume, an_id())
        second = a_tombstone(an_id())

        answers = [await high_volume.compare_and_write(an_id(), first.target, second) for _ in range(3)]

        assert answers == [True, True, True]
        assert await high_volume.get_tiered(an_id()) == second

    async def test_a_late_removal_never_destroys_a_younger_object(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        """HV-9: the retry of a swap whose answer was lost, arriving after somebody's put."""
        tombstone = await put_tombstone(high_volume, an_id())
        assert await high_volume.compare_and_write(an_id(), tombstone.target, Removal())
        await high_volume.put_non_tombstone(an_id(), Metadata(), b"younger")

        assert await high_volume.compare_and_write(an_id(), tombstone.target, Removal())
        assert await high_volume.compare_and_write(an_id(), tombstone.target, InlineObject(Metadata(), b"older"))
        assert await high_volume.get_tiered(an_id()) == StoredObject(Metadata(size=7), b"younger")

    async def test_metadata_are_written_as_given(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """HV-10."""
        await high_volume.compare_and_write(an_id(), None, InlineObject(Metadata(), b"four"))

        assert await high_volume.head_tiered(an_id()) == Metadata()

    @pytest.mark.parametrize("writers", [2, 16])
    async def test_of_swaps_from_one_state_exactly_one_wins(
        self, high_volume: HighVolumeBackend, an_id: AnId, writers: int
    ) -> None:
        """HV-7: the others are told so, without an error."""
        first = await put_tombstone(high_volume, an_id())
        candidates = [a_tombstone(an_id()) for _ in range(writers)]

        answers = await asyncio.gather(
            *(high_volume.compare_and_write(an_id(), first.target, candidate) for candidate in candidates)
        )

        assert answers.count(True) == 1
        assert await high_volume.get_tiered(an_id()) == candidates[answers.index(True)]

    async def test_a_chain_of_swaps_loses_none(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """Writers that read and swap until they win: each win is seen by exactly one later winner."""
        replaced: list[Revision | None] = []

        async def swap_in_own() -> None:
            mine = a_tombstone(an_id())
            while True:
                seen = await high_volume.head_tiered(an_id())
                current = seen.target if isinstance(seen, Tombstone) else None
                if await high_volume.compare_and_write(an_id(), current, mine):
                    replaced.append(current)
                    return

        await asyncio.gather(*(swap_in_own() for _ in range(24)))

        assert len(set(replaced)) == len(replaced) == 24


class TestExpiry:
    """Expired is absent."""

    @pytest.mark.parametrize("kind", ["object", "tombstone"])
    async def test_what_has_expired_is_absent_for_every_method(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Any, kind: str
    ) -> None:
        """BT-5, BT-7: from the very moment named, whoever asks."""
        metadata = Metadata(expiration=TimeToLive(10), time_expires=clock() + timedelta(seconds=10), size=1)
        keys = [an_id(str(number)) for number in range(4)]
        for key in keys:
            write = InlineObject(metadata, b"x") if kind == "object" else Tombstone(A, metadata)
            await high_volume.compare_and_write(key, None, write)
        clock.advance(9.999_999)
        assert await high_volume.head_tiered(keys[0]) is not None
        clock.advance(0.000_001)

        assert await high_volume.get_tiered(keys[0]) is None
        assert await high_volume.head_tiered(keys[0]) is None
        assert await high_volume.delete_non_tombstone(keys[1]) is None
        assert await high_volume.extend(keys[2], metadata, replace(metadata, time_expires=None)) is False
        assert await high_volume.put_non_tombstone(keys[3], Metadata(), b"new") is None
        assert await high_volume.get_tiered(keys[2]) is None
        assert await high_volume.get_tiered(keys[3]) == StoredObject(Metadata(size=3), b"new")

    async def test_an_expired_target_is_no_precondition(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Any
    ) -> None:
        """HV-5: a swap from it loses, unless nothing is what it wants."""
        await put_tombstone(high_volume, an_id(), time_expires=clock() + timedelta(seconds=1))
        seen = await high_volume.get_tiered(an_id())
        assert isinstance(seen, Tombstone)
        clock.advance(1)

        assert await high_volume.compare_and_write(an_id(), seen.target, a_tombstone(an_id())) is False
        assert await high_volume.compare_and_write(an_id(), seen.target, Removal()) is True

    async def test_what_never_expires_is_there_in_a_hundred_years(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Any
    ) -> None:
        await high_volume.put_non_tombstone(an_id(), Metadata(), b"x")
        clock.advance(100 * 365 * 86_400)

        assert await high_volume.get_tiered(an_id()) is not None


class TestExtend:
    """Time to idle, pushed back."""

    @pytest.mark.parametrize("kind", ["object", "tombstone"])
    async def test_the_expiry_moves_and_nothing_else(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Any, kind: str
    ) -> None:
        """BT-11, without the hazard of BT-12."""
        seen = replace(FULL, time_expires=clock() + timedelta(seconds=10), size=1)
        write = InlineObject(seen, b"x") if kind == "object" else Tombstone(A, seen)
        await high_volume.compare_and_write(an_id(), None, write)
        extended = replace(seen, time_expires=clock() + timedelta(seconds=20))

        assert await high_volume.extend(an_id(), seen, extended) is True

        clock.advance(15)
        expected = StoredObject(extended, b"x") if kind == "object" else Tombstone(A, extended)
        assert await high_volume.get_tiered(an_id()) == expected
        clock.advance(5)
        assert await high_volume.get_tiered(an_id()) is None

    async def test_an_object_written_meanwhile_is_not_touched(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Any
    ) -> None:
        """BT-12: a bump from a read value must not overwrite."""
        seen = Metadata(time_created=CREATED, time_expires=clock() + timedelta(seconds=10), size=3)
        await high_volume.put_non_tombstone(an_id(), seen, b"old")
        younger = replace(seen, time_created=CREATED + timedelta(microseconds=1))
        await high_volume.put_non_tombstone(an_id(), younger, b"new")

        assert await high_volume.extend(an_id(), seen, replace(seen, time_expires=None)) is False
        assert await high_volume.get_tiered(an_id()) == StoredObject(younger, b"new")

    async def test_a_deleted_object_does_not_come_back(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Any
    ) -> None:
        seen = Metadata(time_expires=clock() + timedelta(seconds=10), size=1)
        await high_volume.put_non_tombstone(an_id(), seen, b"x")
        await high_volume.delete_non_tombstone(an_id())

        assert await high_volume.extend(an_id(), seen, replace(seen, time_expires=None)) is False
        assert await high_volume.get_tiered(an_id()) is None


class TestForbid:
    """The fence between clean-up and late swaps."""

    async def test_a_forbidden_revision_never_becomes_a_target(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        """The late swap of a paused process: refused, and nothing has changed."""
        late = a_tombstone(an_id())
        await high_volume.put_non_tombstone(an_id(), Metadata(), b"x")

        assert await high_volume.forbid(an_id(), late.target) is True

        with pytest.raises(BackendUnavailable):
            await high_volume.compare_and_write(an_id(), None, late)
        assert await high_volume.get_tiered(an_id()) == StoredObject(Metadata(size=1), b"x")

    @pytest.mark.parametrize("state", STATES)
    async def test_a_forbidden_revision_is_refused_whatever_it_would_replace(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Callable[[], datetime], state: str
    ) -> None:
        """And every other revision is not."""
        await bring_into(high_volume, an_id(), state, clock())
        current = A if state == "tombstone A" else B if state == "tombstone B" else None
        late, other = a_tombstone(an_id()), a_tombstone(an_id())
        assert await high_volume.forbid(an_id(), late.target) is True
        before = await high_volume.get_tiered(an_id())

        with pytest.raises(BackendUnavailable):
            await high_volume.compare_and_write(an_id(), current, late)
        assert await high_volume.get_tiered(an_id()) == before
        assert await high_volume.compare_and_write(an_id(), current, other) is True

    async def test_what_the_row_points_to_cannot_be_forbidden(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        tombstone = await put_tombstone(high_volume, an_id())

        assert await high_volume.forbid(an_id(), tombstone.target) is False
        assert await high_volume.compare_and_write(an_id(), None, tombstone) is True

    async def test_other_writes_of_the_row_leave_the_fence_standing(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Any
    ) -> None:
        late = a_tombstone(an_id())
        assert await high_volume.forbid(an_id(), late.target)
        assert await high_volume.forbid(an_id(), late.target)
        other = await put_tombstone(high_volume, an_id())
        await high_volume.compare_and_write(an_id(), other.target, Removal())
        await high_volume.put_non_tombstone(an_id(), Metadata(), b"x")
        await high_volume.delete_non_tombstone(an_id())
        clock.advance(86_399)

        with pytest.raises(BackendUnavailable):
            await high_volume.compare_and_write(an_id(), None, late)

    async def test_a_lost_swap_to_a_forbidden_revision_is_just_lost(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        late = a_tombstone(an_id())
        await high_volume.forbid(an_id(), late.target)
        await put_tombstone(high_volume, an_id())

        assert await high_volume.compare_and_write(an_id(), None, late) is False

    async def test_a_swap_and_a_ban_at_once_have_one_winner(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        for number in range(20):
            object_id = an_id(str(number))
            tombstone = a_tombstone(object_id)
            swapped, forbidden = await asyncio.gather(
                high_volume.compare_and_write(object_id, None, tombstone),
                high_volume.forbid(object_id, tombstone.target),
                return_exceptions=True,
            )
            assert (swapped is True) is (forbidden is False)
            assert (await high_volume.get_tiered(object_id) == tombstone) is (swapped is True)


class TestPositions:
    """The position fence of contract 5: what is older than the row is answered, and not applied."""

    @staticmethod
    def at(offset: int, source: str = "cluster/operations/0") -> Position:
        return Position(source, offset)

    @staticmethod
    async def left(high_volume: HighVolumeBackend, object_id: ObjectId) -> str | None:
        """Return the file name in the metadata of what the row holds: the tests tell writes apart by it."""
        row = await high_volume.head_tiered(object_id)
        return (row.metadata if isinstance(row, Tombstone) else row or Metadata()).filename

    async def write(
        self, high_volume: HighVolumeBackend, object_id: ObjectId, kind: str, name: str, position: Position | None
    ) -> Tombstone | bool | None:
        """Write once, in one of all ways there are, over whatever is there."""
        metadata = Metadata(filename=name)
        row = await high_volume.head_tiered(object_id)
        current = row.target if isinstance(row, Tombstone) else None
        match kind:
            case "put":
                return await high_volume.put_non_tombstone(object_id, metadata, b"x", position)
            case "delete":
                return await high_volume.delete_non_tombstone(object_id, position)
            case "swap in an object":
                return await high_volume.compare_and_write(object_id, current, InlineObject(metadata, b"x"), position)
            case "swap in a tombstone":
                target = Tombstone(new_revision(object_id), metadata)
                return await high_volume.compare_and_write(object_id, current, target, position)
            case _:
                return await high_volume.compare_and_write(object_id, current, Removal(), position)

    WRITES = ("put", "delete", "swap in an object", "swap in a tombstone", "swap out")
    FIRST = ("put", "delete", "swap in an object", "swap in a tombstone")

    @pytest.mark.parametrize("later", FIRST)
    @pytest.mark.parametrize("older", WRITES)
    async def test_an_older_write_changes_nothing_and_is_told_that_another_one_has_come(
        self, high_volume: HighVolumeBackend, an_id: AnId, later: str, older: str
    ) -> None:
        """Whatever the two are; a deletion is a write like any other."""
        await self.write(high_volume, an_id(), "put", "before", self.at(5))
        await self.write(high_volume, an_id(), later, "later", self.at(7))

        answer = await self.write(high_volume, an_id(), older, "older", self.at(6))

        assert answer is (False if older.startswith("swap") else None)
        assert await self.left(high_volume, an_id()) == (None if later == "delete" else "later")

    @pytest.mark.parametrize("kind", FIRST)
    @pytest.mark.parametrize(
        "position", [Position("cluster/operations/0", 7), Position("cluster/operations/1", 1), None]
    )
    async def test_what_is_not_older_is_applied(
        self, high_volume: HighVolumeBackend, an_id: AnId, kind: str, position: Position | None
    ) -> None:
        """The same record again, as it may not have ended; another partition's; what has no position."""
        await self.write(high_volume, an_id(), "swap in an object", "before", self.at(7))

        await self.write(high_volume, an_id(), kind, "again", position)

        assert await self.left(high_volume, an_id()) == (None if kind == "delete" else "again")

    async def test_a_swap_that_has_happened_is_not_too_late(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """HV-6: it is asked whether the row is as wanted, and it is."""
        tombstone = Tombstone(new_revision(an_id()), Metadata())
        await high_volume.compare_and_write(an_id(), None, tombstone, self.at(7))

        assert await high_volume.compare_and_write(an_id(), None, tombstone, self.at(7))
        assert await high_volume.compare_and_write(an_id(), None, tombstone, self.at(3))

    @pytest.mark.parametrize("between", ["put", "swap in a tombstone", "swap out"])
    @pytest.mark.parametrize("write", ["object", "tombstone", "removal"])
    async def test_a_swap_that_lost_to_an_older_write_is_told_to_look_again(
        self, high_volume: HighVolumeBackend, an_id: AnId, between: str, write: str
    ) -> None:
        """Neither won nor lost: taking it for lost would leave the older value, though this one is answered."""
        first = Tombstone(new_revision(an_id()), Metadata())
        await high_volume.compare_and_write(an_id(), None, first, self.at(3))
        if between == "put":
            await self.write(high_volume, an_id(), "swap in an object", "between", self.at(4))
        else:
            await self.write(high_volume, an_id(), between, "between", self.at(4))
        wanted: dict[str, TieredWrite] = {
            "object": InlineObject(Metadata(filename="later"), b"x"),
            "tombstone": Tombstone(new_revision(an_id()), Metadata(filename="later")),
            "removal": Removal(),
        }

        assert await high_volume.compare_and_write(an_id(), first.target, wanted[write], self.at(5)) is None
        assert await self.left(high_volume, an_id()) == (None if between == "swap out" else "between")
        row = await high_volume.head_tiered(an_id())
        now = row.target if isinstance(row, Tombstone) else None
        assert await high_volume.compare_and_write(an_id(), now, wanted[write], self.at(5)) is True
        assert await self.left(high_volume, an_id()) == (None if write == "removal" else "later")

    async def test_a_swap_that_lost_to_its_own_record_is_decided(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        """Two members run one record: one of them has written it, and the other one has lost."""
        first, mine, others = (Tombstone(new_revision(an_id()), Metadata()) for _ in range(3))
        await high_volume.compare_and_write(an_id(), None, first, self.at(3))
        await high_volume.compare_and_write(an_id(), first.target, others, self.at(4))

        assert await high_volume.compare_and_write(an_id(), first.target, mine, self.at(4)) is False
        assert await high_volume.compare_and_write(an_id(), others.target, Removal(), self.at(4)) is True
        assert await high_volume.compare_and_write(an_id(), others.target, Removal(), self.at(4)) is True

    @pytest.mark.parametrize("ending", ["deletion", "swap out", "expiry"])
    async def test_the_position_outlives_its_object_for_a_while(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Any, ending: str
    ) -> None:
        """Nobody who was taken for dead may bring it back; then it is forgotten, or each would cost a row for ever."""
        expires = clock() + timedelta(seconds=10)
        await high_volume.put_non_tombstone(an_id(), Metadata(time_expires=expires), b"x", self.at(6))
        if ending == "deletion":
            await high_volume.delete_non_tombstone(an_id(), self.at(7))
        elif ending == "swap out":
            await high_volume.compare_and_write(an_id(), None, Removal(), self.at(7))
        else:
            clock.advance(10)
        assert await high_volume.head_tiered(an_id()) is None

        clock.advance(POSITION_KEPT.total_seconds() - 20)
        await high_volume.put_non_tombstone(an_id(), Metadata(filename="older"), b"x", self.at(5))
        assert await high_volume.get_tiered(an_id()) is None
        clock.advance(40)
        await high_volume.put_non_tombstone(an_id(), Metadata(filename="older"), b"x", self.at(5))
        assert await self.left(high_volume, an_id()) == "older"

    async def test_a_deletion_of_nothing_is_remembered_too(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """The insert before it may still be on its way."""
        await high_volume.delete_non_tombstone(an_id(), self.at(7))
        await high_volume.put_non_tombstone(an_id(), Metadata(), b"x", self.at(6))

        assert await high_volume.get_tiered(an_id()) is None

    async def test_extending_and_forbidding_are_no_writes_of_it(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Any
    ) -> None:
        seen = Metadata(filename="later", time_expires=clock() + timedelta(seconds=10), size=1)
        await high_volume.put_non_tombstone(an_id(), seen, b"x", self.at(7))
        assert await high_volume.extend(an_id(), seen, replace(seen, time_expires=clock() + timedelta(seconds=20)))
        assert await high_volume.forbid(an_id(), new_revision(an_id()))

        await high_volume.put_non_tombstone(an_id(), Metadata(filename="older"), b"x", self.at(6))

        assert await self.left(high_volume, an_id()) == "later"

    async def test_of_many_writers_at_once_the_latest_position_stays(
        self, high_volume: HighVolumeBackend, an_id: AnId
    ) -> None:
        """In whatever order they arrive: the comparison and the write are one step."""
        offsets = [offset * 7 % 40 for offset in range(40)]
        writes: list[Any] = [
            high_volume.delete_non_tombstone(an_id(), self.at(offset))
            if offset % 3 == 0
            else high_volume.put_non_tombstone(an_id(), Metadata(filename=str(offset)), b"x", self.at(offset))
            for offset in offsets
            if offset != 39
        ]
        await asyncio.gather(*writes)

        assert await self.left(high_volume, an_id()) == "38"


class TestEnd:
    """Join and close."""

    async def test_reads_work_after_a_join(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """HV-11."""
        await high_volume.put_non_tombstone(an_id(), Metadata(), b"x")
        await high_volume.join()

        assert await high_volume.get_tiered(an_id()) is not None

    async def test_closing_twice_is_closing_once(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        await high_volume.put_non_tombstone(an_id(), Metadata(), b"x")
        await high_volume.close()
        await high_volume.close()
