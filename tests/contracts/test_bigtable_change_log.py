"""What holds for the change log on Bigtable alone, on the emulator: leases, claims, damaged entries (LOG-14)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import pytest
from google.api_core import exceptions as google

from bigtable_emulator import Emulator, FaultyConnection
from consumer.errors import BackendUnavailable
from consumer.ids import ObjectId
from consumer.storage.backend import Change
from consumer.storage.bigtable_change_log import BigtableChangeLog
from consumer.storage.bigtable_table import Cells, columns, set_cell
from consumer.storage.metadata import now_utc
from consumer.storage.revision import new_revision, uuid7

pytestmark = pytest.mark.emulator

AnId: TypeAlias = Callable[..., ObjectId]
OpenLog: TypeAlias = Callable[..., BigtableChangeLog]

WAIT_SECONDS = 30.0
"""Longest wait for what happens in the background."""


@pytest.fixture
async def open_log(bigtable_emulator: Emulator, clock: Any) -> AsyncIterator[OpenLog]:
    """Open logs over one table; they are closed in the end."""
    table = await bigtable_emulator.create(bigtable_emulator.unused_table())
    opened: list[BigtableChangeLog] = []

    def open_one(*given: Any, **named: Any) -> BigtableChangeLog:
        opened.append(bigtable_emulator.change_log(table, *given, **{"clock": clock, "sleep": clock.sleep} | named))
        return opened[-1]

    yield open_one
    for log in opened:
        await log.close()


def a_change(object_id: ObjectId) -> Change:
    """Return a change nobody has recorded before."""
    return Change(uuid7(), object_id, new_revision(object_id), None)


async def rows_of(log: BigtableChangeLog, prefix: bytes) -> dict[bytes, Cells]:
    """Return the rows whose keys begin with *prefix*."""
    found = await log._table.read_page(b"~", b"\x7f", columns(b"."), 1000)
    return {key: cells for key, cells in found if key.startswith(prefix)}


class TestLeases:
    """Who is alive."""

    async def test_a_heartbeat_keeps_an_idle_owner_alive(self, open_log: OpenLog, an_id: AnId) -> None:
        """Renewed before a third of the lease has passed twice, though nothing is recorded."""
        lease = 0.6
        log = open_log("idle", lease, clock=now_utc, sleep=asyncio.sleep)
        await log.record(a_change(an_id()))
        seen: set[bytes] = set()
        deadline = time.monotonic() + WAIT_SECONDS
        while len(seen) < 3:
            assert time.monotonic() < deadline
            ((_, cells),) = (await rows_of(log, b"~owner/")).items()
            seen.add(cells["fl", b"l"].value)
            await asyncio.sleep(0.02)

    async def test_a_failing_heartbeat_goes_on(self, open_log: OpenLog, an_id: AnId) -> None:
        """An outage shorter than the lease costs nothing."""
        log = open_log("outage", 0.3, clock=now_utc, sleep=asyncio.sleep)
        await log.record(a_change(an_id()))
        connection = await FaultyConnection.under(log)
        connection.not_sent("mutate_row", google.ServiceUnavailable("x"), times=6)
        before = connection.sent.count("mutate_row")
        deadline = time.monotonic() + WAIT_SECONDS
        while connection.sent.count("mutate_row") < before + 7:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    async def test_an_entry_is_never_there_before_its_lease(self, open_log: OpenLog, an_id: AnId) -> None:
        """Else a recoverer would take it for a dead owner's."""
        log = open_log("me")
        connection = await FaultyConnection.under(log)
        connection.not_sent("mutate_row", google.ServiceUnavailable("x"), times=3)

        with pytest.raises(BackendUnavailable):
            await log.record(a_change(an_id()))
        assert await rows_of(log, b"~change/") == {}
        await log.record(a_change(an_id()))
        assert connection.sent.index("mutate_row") < connection.sent.index("check_and_mutate_row")

    async def test_leases_that_are_over_are_forgotten(self, open_log: OpenLog, an_id: AnId, clock: Any) -> None:
        """And nobody's else: renewed between the reading and the forgetting, one stays."""
        dead, revived = open_log("dead"), open_log("revived")
        for log in (dead, revived):
            await log.record(a_change(an_id(log.owner)))
        clock.advance(31)
        recoverer = open_log("recoverer")
        connection = await FaultyConnection.under(recoverer)
        connection.after("read_rows", _nothing)  # of the entries, the only page of them
        connection.after("read_rows", _nothing)
        connection.after("read_rows", revived._renew)  # of the leases

        await recoverer.recoverable()

        owners = {cells["fl", b"o"].value for cells in (await rows_of(recoverer, b"~owner/")).values()}
        assert owners == {b"revived", b"recoverer"}


class TestClaims:
    """Of two recoverers one gets an entry."""

    async def test_an_entry_that_comes_while_the_log_is_read_is_left_to_its_owner(
        self, open_log: OpenLog, an_id: AnId
    ) -> None:
        """Entries are read before leases: the lease of an entry seen is seen too."""
        recoverer, newcomer = open_log("recoverer"), open_log("newcomer")
        connection = await FaultyConnection.under(recoverer)
        change = a_change(an_id())
        for _ in range(2):
            connection.after("read_rows", lambda: newcomer.record(change))

        assert await recoverer.recoverable() == []
        assert await recoverer.recoverable() == []
        assert await newcomer.count() == 1

    async def test_a_claim_whose_answer_is_lost_is_still_a_claim(
        self, open_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """Repeated, it finds itself."""
        change = a_change(an_id())
        await open_log("dead").record(change)
        clock.advance(31)
        first, second = open_log("first"), open_log("second")
        connection = await FaultyConnection.under(first)
        connection.answer_lost("check_and_mutate_row", google.DeadlineExceeded("x"))

        assert await first.recoverable() == [change]
        assert await second.recoverable() == []

    async def test_a_recovery_killed_between_two_claims_is_taken_over_whole(
        self, open_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """What it has claimed and what it has not go to the next, once its own lease is over."""
        dead = open_log("dead")
        changes = [a_change(an_id(str(number))) for number in range(5)]
        for change in changes:
            await dead.record(change)
        clock.advance(31)
        killed, next_one = open_log("killed"), open_log("next")
        connection = await FaultyConnection.under(killed)
        connection.not_sent("check_and_mutate_row", google.PermissionDenied("killed here"), times=2)
        with pytest.raises(Exception, match="PERMISSION_DENIED"):
            await killed.recoverable()
        left = await next_one.recoverable()
        assert len(left) == 2
        clock.advance(31)

        assert {change.change_id for change in await next_one.recoverable()} == {change.change_id for change in changes}

    async def test_a_zombie_may_remove_its_entry_though_it_has_been_claimed(
        self, open_log: OpenLog, an_id: AnId, clock: Any
    ) -> None:
        """It cleans up after itself; the recoverer finds nothing more to do."""
        zombie, recoverer = open_log("zombie"), open_log("recoverer")
        change = a_change(an_id())
        await zombie.record(change)
        clock.advance(31)
        assert await recoverer.recoverable() == [change]

        await zombie.remove(change.change_id)
        assert await recoverer.recoverable() == []

    async def test_recording_again_does_not_take_back_a_claim(self, open_log: OpenLog, an_id: AnId, clock: Any) -> None:
        """The late repetition of a record."""
        zombie, recoverer = open_log("zombie"), open_log("recoverer")
        change = a_change(an_id())
        await zombie.record(change)
        clock.advance(31)
        await recoverer.recoverable()
        await zombie.record(change)

        assert await recoverer.recoverable() == [change]
        assert (await zombie.count(), await recoverer.count()) == (0, 1)


class TestUnreadable:
    """Entries of nobody's making."""

    @pytest.mark.parametrize(
        "entry", [b"", b"{", b"[]", b"{}", b'{"path": "no path", "new": null, "old": null}', b'{"path": 5}']
    )
    async def test_an_unreadable_entry_is_set_aside_and_holds_up_nobody(
        self, open_log: OpenLog, an_id: AnId, clock: Any, entry: bytes
    ) -> None:
        """It stays in the table for inspection, is counted no more and never met again."""
        dead = open_log("dead")
        broken, whole = a_change(an_id("broken")), a_change(an_id("whole"))
        for change in (broken, whole):
            await dead.record(change)
        key = f"~change/{broken.change_id}".encode()
        await dead._table.mutate(key, [set_cell("fl", b"e", entry, 0)])
        clock.advance(31)
        log = open_log("recoverer")

        assert await log.recoverable() == [whole]
        assert await log.recoverable() == [whole]
        assert await log.count() == 1
        assert [change async for _, change in log.scan_changes()] == [whole]
        assert key in await rows_of(log, b"~change/")


async def _nothing() -> None:
    """Come in between, and do nothing."""
