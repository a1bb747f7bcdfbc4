"""Every backend can be looked through while it is in use: tombstones, revisions, unfinished changes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias, cast

from consumer.ids import ObjectId
from consumer.operations import Metadata, TimeToLive
from consumer.storage.backend import (
    Change,
    ChangeScan,
    HighVolumeBackend,
    LongTermBackend,
    Removal,
    Revision,
    RevisionScan,
    Tombstone,
    TombstoneScan,
)
from consumer.storage.revision import new_revision, uuid7

AnId: TypeAlias = Callable[..., ObjectId]


async def tombstones_of(backend: HighVolumeBackend) -> dict[ObjectId, Revision]:
    """Return all that a scan yields."""
    found = [row async for row in cast("TombstoneScan", backend).scan_tombstones()]
    assert len(dict(found)) == len(found)
    return dict(found)


async def revisions_of(backend: LongTermBackend) -> list[str]:
    """Return all that a scan yields, sorted."""
    return sorted([revision.name async for revision in cast("RevisionScan", backend).scan_revisions()])


async def changes_of(log: Any) -> dict[Change, str]:
    """Return all that a scan yields."""
    return {change: owner async for owner, change in cast("ChangeScan", log).scan_changes()}


def expiring(clock: Any, seconds: int) -> Metadata:
    """Return metadata of something that has so long to live."""
    return Metadata(expiration=TimeToLive(seconds), time_expires=clock() + timedelta(seconds=seconds))


class TestTombstones:
    """The high-volume tier."""

    async def test_nothing_is_found_in_nothing(self, high_volume: HighVolumeBackend) -> None:
        """A scan of a new one ends."""
        assert await tombstones_of(high_volume) == {}

    async def test_every_live_tombstone_is_found_and_nothing_else(
        self, high_volume: HighVolumeBackend, an_id: AnId, clock: Any
    ) -> None:
        """Inline objects, removed and expired rows are none."""
        expected: dict[ObjectId, Revision] = {}
        for number in range(40):
            object_id = an_id(f"key {number}/ü")
            if number % 2:
                await high_volume.put_non_tombstone(object_id, Metadata(), b"inline")
                continue
            revision = new_revision(object_id)
            metadata = expiring(clock, 10) if number % 4 == 0 else expiring(clock, 100)
            await high_volume.compare_and_write(object_id, None, Tombstone(revision, metadata))
            if number % 10 == 2:
                await high_volume.compare_and_write(object_id, revision, Removal())
            elif number % 4:
                expected[object_id] = revision
        clock.advance(10)

        assert await tombstones_of(high_volume) == expected

    async def test_more_rows_than_one_step_takes(
        self, high_volume: HighVolumeBackend, an_id: AnId, monkeypatch: Any
    ) -> None:
        """None twice, none left out, with steps that hold no tombstone at all."""
        for module in ("sqlite", "bigtable"):
            monkeypatch.setattr(f"consumer.storage.{module}.SCAN_ROWS", 3)
        expected = {}
        for number in range(20):
            object_id = an_id(str(number))
            if number in {0, 10, 19}:
                expected[object_id] = new_revision(object_id)
                await high_volume.compare_and_write(object_id, None, Tombstone(expected[object_id], Metadata()))
            else:
                await high_volume.put_non_tombstone(object_id, Metadata(), b"x")

        assert await tombstones_of(high_volume) == expected

    async def test_a_scan_goes_on_while_rows_come_and_go(self, high_volume: HighVolumeBackend, an_id: AnId) -> None:
        """What was there all the time is found."""
        for key in "abc":
            await high_volume.compare_and_write(an_id(key), None, Tombstone(new_revision(an_id(key)), Metadata()))
        found = set()
        async for object_id, revision in cast("TombstoneScan", high_volume).scan_tombstones():
            found.add(object_id.key)
            await high_volume.compare_and_write(object_id, revision, Removal())
            await high_volume.put_non_tombstone(an_id("new"), Metadata(), b"x")

        assert found == set("abc")
        assert await tombstones_of(high_volume) == {}


class TestRevisions:
    """The long-term tier."""

    async def test_nothing_is_found_in_nothing(self, long_term: LongTermBackend) -> None:
        """A scan of a new one ends."""
        assert await revisions_of(long_term) == []

    async def test_every_revision_that_has_not_expired_is_found(
        self, long_term: LongTermBackend, an_id: AnId, clock: Any
    ) -> None:
        """Also one with a long name, or that is no revision's at all; removed ones are not."""
        names = [new_revision(an_id(str(number))).name for number in range(20)]
        names += [new_revision(an_id("x" * 850)).name, "responses/t/0/1", "../.."]
        for number, name in enumerate(names):
            metadata = expiring(clock, 10) if number % 3 == 0 else Metadata()
            await long_term.put(Revision(name), metadata, b"payload")
        await long_term.delete(Revision(names[1]))
        clock.advance(10)

        expected = sorted(name for number, name in enumerate(names) if number % 3 and number != 1)
        assert await revisions_of(long_term) == expected


class TestChanges:
    """The change log."""

    async def test_entries_of_everybody_are_found_and_none_is_claimed(self, open_log: Any, an_id: AnId) -> None:
        """Looking must not take anything away from its owner."""
        log = open_log(owner="alive")
        changes = [Change(uuid7(), an_id(), new_revision(an_id()), None), Change(uuid7(), an_id("b"), None, None)]
        for change in changes:
            await log.record(change)

        assert await changes_of(log) == dict.fromkeys(changes, "alive")
        await log.remove(changes[0].change_id)
        assert await changes_of(log) == {changes[1]: "alive"}
        assert not await log.recoverable()

    async def test_another_instance_sees_what_is_durable(self, open_durable_log: Any, an_id: AnId) -> None:
        """Any process can look; more entries than one step takes, and their owner keeps them."""
        owner, other = open_durable_log(owner="owner"), open_durable_log(owner="other")
        changes = [Change(uuid7(), an_id(str(number)), None, new_revision(an_id())) for number in range(7)]
        for change in changes:
            await owner.record(change)

        assert await changes_of(other) == dict.fromkeys(changes, "owner")
        assert (await owner.count(), await other.count()) == (7, 0)

    async def test_steps_are_small(self, open_durable_log: Any, an_id: AnId, monkeypatch: Any) -> None:
        """None twice, none left out."""
        for module in ("sqlite_change_log", "bigtable_change_log"):
            monkeypatch.setattr(f"consumer.storage.{module}.SCAN_ENTRIES", 2)
        log = open_durable_log(owner="owner")
        changes = [Change(uuid7(), an_id(str(number)), None, None) for number in range(5)]
        for change in changes:
            await log.record(change)

        found = [change.change_id async for _, change in cast("ChangeScan", log).scan_changes()]
        assert sorted(found) == sorted(change.change_id for change in changes)
