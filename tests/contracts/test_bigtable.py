"""What holds for Bigtable alone, on the emulator: rows and families, lost answers, races, limits (BT-1 to BT-14)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any, TypeAlias

import pytest
from google.api_core import exceptions as google

from bigtable_emulator import Emulator, FaultyConnection
from cli_runner import Tierstream
from consumer.errors import BackendError, BackendUnavailable, ConfigError, TooLarge
from consumer.ids import ObjectId
from consumer.metrics import Counts
from consumer.operations import Metadata, Position, StoredObject, TimeToIdle, TimeToLive
from consumer.storage import bigtable
from consumer.storage.backend import InlineObject, Removal, Revision, TieredWrite, Tombstone
from consumer.storage.bigtable import NEVER, RACES_MAX, BigtableBackend
from consumer.storage.bigtable_table import ATTEMPTS, GROUPS_AT_ONCE, BigtableTable, TableName, delete_column
from consumer.storage.memory import MemoryBackend
from consumer.storage.metadata import FORBIDDEN_FOR, encode_metadata, micros
from consumer.storage.revision import new_revision
from consumer.storage.tiered import TieredStorage
from failures import Paused

pytestmark = pytest.mark.emulator

AnId: TypeAlias = Callable[..., ObjectId]

A, B = Revision("attachments/objects/k/A"), Revision("attachments/objects/k/B")


def position(offset: int) -> Position:
    """Return where a record stands."""
    return Position("topic/0", offset)


NOBODY = {"bootstrap_servers": ["127.0.0.1:1"]}
"""Brokers that are not there."""

WAIT_SECONDS = 30.0
"""Longest wait for what happens in the background."""


MARK = ("fr", b"o/NAME")
"""The mark of a swap for nothing, whatever its name."""


def lost() -> Exception:
    """Return what the client raises where an answer does not come in time (BT-13)."""
    return google.DeadlineExceeded("deadline exceeded")


@pytest.fixture
async def table(bigtable_emulator: Emulator) -> str:
    """Make a table for rows and changes."""
    return await bigtable_emulator.create(bigtable_emulator.unused_table())


@pytest.fixture
async def backend(bigtable_emulator: Emulator, table: str, clock: Any) -> AsyncIterator[BigtableBackend]:
    """Lend the tier in the table."""
    made = bigtable_emulator.backend(table, clock=clock)
    yield made
    await made.close()


@pytest.fixture
async def other(bigtable_emulator: Emulator, table: str, clock: Any) -> AsyncIterator[BigtableBackend]:
    """Lend the tier as another process has it."""
    made = bigtable_emulator.backend(table, clock=clock)
    yield made
    await made.close()


@pytest.fixture
async def connection(backend: BigtableBackend) -> FaultyConnection:
    """Lend what the backend's requests go through."""
    return await FaultyConnection.under(backend)


async def cells_of(backend: BigtableBackend, object_id: ObjectId) -> dict[tuple[str, bytes], tuple[bytes, int]]:
    """Return all cells of a row, random names of writes replaced, and of all marks the last."""
    raw = await (await backend._table._connect()).read_row(object_id.storage_path.encode())
    found = {} if raw is None else {(one.family, one.qualifier): one for one in raw.cells}
    assert raw is None or len(found) == len(raw.cells), "two cells in a column"
    return {
        MARK if column[1].startswith(b"o/") else column: (
            b"W" if column[1] == b"w" else one.value,
            one.timestamp_micros,
        )
        for column, one in found.items()
    }


class TestRows:
    """The layout."""

    async def test_an_object_that_does_not_expire_lies_in_the_kept_family(
        self, backend: BigtableBackend, an_id: AnId
    ) -> None:
        """BT-1, BT-2, BT-6: payload, and metadata with the size, which so is never missing; a deadline far away."""
        await backend.put_non_tombstone(an_id(), Metadata(filename="f"), b"payload")

        assert await cells_of(backend, an_id()) == {
            ("fm", b"p"): (b"payload", NEVER),
            ("fm", b"m"): (encode_metadata(Metadata(filename="f", size=7)), NEVER),
            ("fm", b"w"): (b"W", NEVER),
        }

    async def test_an_object_that_expires_has_its_deadline_as_timestamp(
        self, backend: BigtableBackend, an_id: AnId, clock: Any
    ) -> None:
        """BT-2, BT-3: in the family that is collected by it; whole milliseconds, rounded down."""
        expiring = Metadata(expiration=TimeToLive(10), time_expires=clock() + timedelta(seconds=10), size=1)
        await backend.put_non_tombstone(an_id(), expiring, b"x")

        deadline = micros(clock()) + 10_000_000
        assert deadline % 1000
        cells = await cells_of(backend, an_id())
        assert {column: at for column, (_, at) in cells.items()} == {
            ("fg", column): deadline - deadline % 1000 for column in (b"p", b"m", b"w")
        }

    @pytest.mark.parametrize("seconds", [None, 10])
    async def test_a_tombstone_names_its_target(
        self, backend: BigtableBackend, an_id: AnId, clock: Any, seconds: int | None
    ) -> None:
        """BT-1: never beside an object. Swapped in for nothing, it leaves a mark, for a day."""
        expires = None if seconds is None else clock() + timedelta(seconds=seconds)
        tombstone = Tombstone(A, Metadata(size=5_000_000, time_expires=expires))
        await backend.put_non_tombstone(an_id(), Metadata(), b"x")
        assert await backend.compare_and_write(an_id(), None, tombstone)

        deadline = NEVER if expires is None else micros(expires) - micros(expires) % 1000
        marked_until = micros(clock() + FORBIDDEN_FOR)
        assert await cells_of(backend, an_id()) == {
            MARK: (b"", marked_until - marked_until % 1000),
            ("fr", b"r"): (A.name.encode(), deadline),
            ("fr", b"t"): (encode_metadata(tombstone.metadata), deadline),
            ("fr", b"w"): (b"W", deadline),
        }

    async def test_every_write_begins_by_deleting_what_is_there_but_not_the_bans(
        self, backend: BigtableBackend, an_id: AnId, clock: Any
    ) -> None:
        """BT-4: whatever follows whatever."""
        expiring = Metadata(time_expires=clock() + timedelta(days=400), size=1)
        writes: list[TieredWrite] = [
            InlineObject(Metadata(), b"x"),
            InlineObject(expiring, b"y"),
            Tombstone(A, Metadata()),
            Removal(),
        ]
        await backend.forbid(an_id(), B)
        left = [
            {("fm", b"p"), ("fm", b"m"), ("fm", b"w")},
            {("fg", b"p"), ("fg", b"m"), ("fg", b"w")},
            {("fr", b"r"), ("fr", b"t"), ("fr", b"w")},
            set(),
        ]
        for first, second in product(range(4), repeat=2):
            for number in (first, second):
                seen = await backend.head_tiered(an_id())
                current = seen.target if isinstance(seen, Tombstone) else None
                assert await backend.compare_and_write(an_id(), current, writes[number])
            found = set(await cells_of(backend, an_id())) - {MARK}
            assert found == left[second] | {("fr", b"f/" + B.name.encode())}

    async def test_a_removed_object_leaves_no_row(self, backend: BigtableBackend, an_id: AnId) -> None:
        """Nothing to pay for."""
        await backend.put_non_tombstone(an_id(), Metadata(), b"x")
        await backend.delete_non_tombstone(an_id())

        assert await cells_of(backend, an_id()) == {}

    @pytest.mark.slow
    async def test_the_table_itself_forgets_what_has_expired(
        self, bigtable_emulator: Emulator, table: str, an_id: AnId
    ) -> None:
        """BT-2: objects, tombstones and bans, within the second; what is kept is kept."""
        now = datetime.now(UTC)
        backend = bigtable_emulator.backend(table, clock=lambda: now - timedelta(days=2))
        past = Metadata(time_expires=now - timedelta(seconds=5), size=1)
        await backend.put_non_tombstone(an_id("object"), past, b"x")
        await backend.compare_and_write(an_id("tombstone"), None, Tombstone(A, past))
        await backend.forbid(an_id("ban"), A)
        await backend.put_non_tombstone(an_id("kept"), Metadata(), b"x")

        deadline = time.monotonic() + WAIT_SECONDS
        while any([await cells_of(backend, an_id(key)) for key in ("object", "tombstone", "ban")]):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        assert len(await cells_of(backend, an_id("kept"))) == 3
        await backend.close()

    async def test_a_row_half_collected_has_expired(self, backend: BigtableBackend, an_id: AnId, clock: Any) -> None:
        """BT-5: collection takes cells one by one, by a clock that may be ahead of ours."""
        expiring = Metadata(time_expires=clock() + timedelta(seconds=1), size=1)
        await backend.put_non_tombstone(an_id("object"), expiring, b"x")
        await backend.compare_and_write(an_id("tombstone"), None, Tombstone(A, expiring))
        await remove_cell(backend, an_id("object"), "fg", b"p")
        await remove_cell(backend, an_id("tombstone"), "fr", b"t")

        assert await backend.get_tiered(an_id("object")) is None
        assert await backend.get_tiered(an_id("tombstone")) is None
        assert await backend.head_tiered(an_id("tombstone")) is None

    async def test_a_kept_row_that_misses_a_cell_is_damaged(self, backend: BigtableBackend, an_id: AnId) -> None:
        """Not absent: somebody has to look."""
        await backend.put_non_tombstone(an_id("object"), Metadata(), b"x")
        await backend.compare_and_write(an_id("tombstone"), None, Tombstone(A, Metadata()))
        await remove_cell(backend, an_id("object"), "fm", b"p")
        await remove_cell(backend, an_id("tombstone"), "fr", b"t")

        for key in ("object", "tombstone"):
            with pytest.raises(BackendError, match="damaged"):
                await backend.get_tiered(an_id(key))


async def remove_cell(backend: BigtableBackend, object_id: ObjectId, family: str, column: bytes) -> None:
    """Take a cell away behind the backend's back."""
    await backend._table.mutate(object_id.storage_path.encode(), [delete_column(family, column)])


Request: TypeAlias = Callable[[BigtableBackend, ObjectId], Awaitable[object]]

TOMBSTONE_A, TOMBSTONE_B = Tombstone(A, Metadata(size=5)), Tombstone(B, Metadata(size=6))
SMALL = InlineObject(Metadata(size=1), b"y")

WRITES: dict[str, tuple[str, Request, object]] = {
    "put": ("object", lambda backend, whose: backend.put_non_tombstone(whose, Metadata(), b"y"), None),
    "put over a tombstone": (
        "tombstone",
        lambda backend, whose: backend.put_non_tombstone(whose, Metadata(), b"y"),
        TOMBSTONE_A,
    ),
    "delete": ("object", lambda backend, whose: backend.delete_non_tombstone(whose), None),
    "swap nothing for a tombstone": (
        "nothing",
        lambda backend, whose: backend.compare_and_write(whose, None, TOMBSTONE_B),
        True,
    ),
    "swap an object for a tombstone": (
        "object",
        lambda backend, whose: backend.compare_and_write(whose, None, TOMBSTONE_B),
        True,
    ),
    "swap a tombstone for another": (
        "tombstone",
        lambda backend, whose: backend.compare_and_write(whose, A, TOMBSTONE_B),
        True,
    ),
    "swap a tombstone for an object": (
        "tombstone",
        lambda backend, whose: backend.compare_and_write(whose, A, SMALL),
        True,
    ),
    "swap a tombstone for nothing": (
        "tombstone",
        lambda backend, whose: backend.compare_and_write(whose, A, Removal()),
        True,
    ),
    "forbid": ("tombstone", lambda backend, whose: backend.forbid(whose, B), True),
    "extend": (
        "object",
        lambda backend, whose: backend.extend(whose, Metadata(size=1), Metadata(size=1, filename="extended")),
        True,
    ),
}
"""Requests: what is there before, the request, its answer."""


async def bring_into(backend: BigtableBackend, object_id: ObjectId, state: str) -> None:
    """Make the row *state*."""
    if state == "object":
        await backend.put_non_tombstone(object_id, Metadata(), b"x")
    elif state == "tombstone":
        await backend.compare_and_write(object_id, None, TOMBSTONE_A)


class TestFaults:
    """Requests that fail, with and without an effect."""

    @pytest.mark.parametrize("applied", [False, True])
    @pytest.mark.parametrize("name", WRITES)
    async def test_a_repeated_write_answers_and_does_the_same_as_one(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId, name: str, *, applied: bool
    ) -> None:
        """HV-6, BT-13: repeated at once; the client does not, for it takes a conditional write for unrepeatable."""
        state, request, answer = WRITES[name]
        for key in ("undisturbed", "disturbed"):
            await bring_into(backend, an_id(key), state)
        assert await request(backend, an_id("undisturbed")) == answer

        fail = connection.answer_lost if applied else connection.not_sent
        fail("check_and_mutate_row", lost())
        connection.sent.clear()

        assert await request(backend, an_id("disturbed")) == answer
        assert connection.sent.count("check_and_mutate_row") == 2
        assert await cells_of(backend, an_id("disturbed")) == await cells_of(backend, an_id("undisturbed"))

    async def test_what_is_repeated_is_counted(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        """MET-12: by tier and operation, each attempt after the first."""
        counts = Counts()
        storage = TieredStorage(backend, MemoryBackend(), observer=counts)
        connection.not_sent("check_and_mutate_row", lost(), ATTEMPTS - 1)
        connection.not_sent("read_row", lost())
        await storage.put(an_id(), Metadata(), b"x")
        await storage.get(an_id())
        await storage.put(an_id(), Metadata(), b"x")

        operations = ("put_non_tombstone", "get_tiered", "head_tiered")
        repeats = [counts.requests("high_volume", operation).retries for operation in operations]
        assert repeats == [ATTEMPTS - 1, 1, 0]
        await storage.join()

    async def test_a_swap_won_unheard_and_replaced_since_is_not_called_lost(
        self, backend: BigtableBackend, other: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        """TIER-8: "lost" would leave the revision that it has replaced to nobody."""
        await bring_into(backend, an_id(), "tombstone")
        won = TOMBSTONE_B
        connection.answer_lost(
            "check_and_mutate_row",
            lost(),
            meanwhile=lambda: other.compare_and_write(an_id(), B, Tombstone(Revision("C"), Metadata())),
        )

        with pytest.raises(BackendUnavailable, match="unknown"):
            await backend.compare_and_write(an_id(), A, won)

    @pytest.mark.parametrize("write", [TOMBSTONE_B, SMALL, Removal()], ids=["tombstone", "object", "nothing"])
    async def test_a_swap_won_unheard_and_replaced_by_a_later_record_is_not_called_lost(
        self,
        backend: BigtableBackend,
        other: BigtableBackend,
        connection: FaultyConnection,
        an_id: AnId,
        write: TieredWrite,
    ) -> None:
        """TIER-8: a member taken for dead, whose successor is further on. "Lost" would leave revision A to nobody."""
        await bring_into(backend, an_id(), "tombstone")

        async def replace_it() -> None:
            current = write.target if isinstance(write, Tombstone) else None
            assert await other.compare_and_write(an_id(), current, Tombstone(Revision("C"), Metadata()), position(2))

        connection.answer_lost("check_and_mutate_row", lost(), meanwhile=replace_it)
        with pytest.raises(BackendUnavailable, match="unknown"):
            await backend.compare_and_write(an_id(), A, write, position(1))

    async def test_an_object_put_unheard_and_replaced_by_a_later_one_is_no_swap_lost(
        self, backend: BigtableBackend, other: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        """As above, where nothing tells the two apart: the tombstone is gone, as was wanted."""
        await bring_into(backend, an_id(), "tombstone")

        async def replace_it() -> None:
            assert await other.put_non_tombstone(an_id(), Metadata(), b"later", position(2)) is None

        connection.answer_lost("check_and_mutate_row", lost(), meanwhile=replace_it)

        assert await backend.compare_and_write(an_id(), A, SMALL, position(1)) is True
        assert await other.get_tiered(an_id()) == StoredObject(Metadata(size=5), b"later")

    @pytest.mark.parametrize("write", [Removal(), SMALL], ids=["deleted", "replaced"])
    async def test_a_swap_repeated_after_it_was_undone_is_not_applied_again(
        self,
        backend: BigtableBackend,
        other: BigtableBackend,
        connection: FaultyConnection,
        an_id: AnId,
        write: TieredWrite,
    ) -> None:
        """Won unheard, and undone by another writer, who removes the revision, before the repeat is sent.

        It finds no tombstone, as the first attempt did. Applied again, it would point to nothing, and what the other
        writer has been acknowledged would be lost.
        """
        connection.answer_lost(
            "check_and_mutate_row", lost(), meanwhile=lambda: other.compare_and_write(an_id(), B, write)
        )

        assert await backend.compare_and_write(an_id(), None, TOMBSTONE_B) is True
        assert await other.get_tiered(an_id()) == (StoredObject(SMALL.metadata, b"y") if write is SMALL else None)

    @pytest.mark.parametrize(
        "error",
        [
            google.ServiceUnavailable("x"),
            google.Cancelled("x"),
            google.DeadlineExceeded("x"),
            google.Unauthenticated("x"),
            google.Aborted("x"),
            google.InternalServerError("x"),
            google.FailedPrecondition("x"),
            google.Unknown("x"),
            ConnectionResetError("x"),
        ],
        ids=lambda error: type(error).__name__,
    )
    async def test_a_passing_fault_is_repeated_twice_and_then_an_outage(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId, error: Exception
    ) -> None:
        """BT-13; reads and writes alike."""
        for request in ("read_row", "check_and_mutate_row"):
            connection.sent.clear()
            connection.not_sent(request, error, ATTEMPTS)
            with pytest.raises(BackendUnavailable, match="bigtable: ") as raised:
                await (backend.get_tiered if request == "read_row" else backend.delete_non_tombstone)(an_id())
            assert connection.sent == [request] * ATTEMPTS
            assert raised.value.__cause__ is error
        connection.not_sent("read_row", error, ATTEMPTS - 1)
        assert await backend.get_tiered(an_id()) is None

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (google.PermissionDenied("secret"), BackendError),
            (google.InvalidArgument("secret"), BackendError),
            (google.NotFound("secret"), BackendError),
            (google.ResourceExhausted("secret"), BackendUnavailable),
        ],
        ids=lambda value: type(value).__name__,
    )
    async def test_any_other_fault_is_not_repeated(
        self,
        backend: BigtableBackend,
        connection: FaultyConnection,
        an_id: AnId,
        error: Exception,
        expected: type[Exception],
    ) -> None:
        """The text is the status; what the server said may hold keys."""
        connection.not_sent("read_row", error)
        with pytest.raises(expected) as raised:
            await backend.get_tiered(an_id())

        assert connection.sent == ["read_row"]
        assert type(raised.value) is expected
        assert "secret" not in str(raised.value)

    async def test_a_request_to_nobody_ends_in_time(self, an_id: AnId) -> None:
        """Nothing listens there: an outage, not a hang."""
        backend = BigtableBackend("p", "i", "t", emulator_host="127.0.0.1:1")
        with pytest.raises(BackendUnavailable, match="UNAVAILABLE"):
            await backend.get_tiered(an_id())
        await backend.close()

    async def test_a_cancelled_request_leaves_the_connection_usable(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        answer = Paused()
        connection.after("check_and_mutate_row", answer.pause)
        putting = asyncio.create_task(backend.put_non_tombstone(an_id(), Metadata(), b"x"))
        await answer.reached.wait()
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting

        assert await backend.get_tiered(an_id()) == StoredObject(Metadata(size=1), b"x")


class BlindExtension(BigtableBackend):
    """Extends as the reference does: what it has read is written back, whatever is there by now (BT-12)."""

    async def extend(self, object_id: ObjectId, seen: Metadata, extended: Metadata) -> bool:
        found = await self.get_tiered(object_id)
        assert isinstance(found, StoredObject)
        payload = found.payload
        assert isinstance(payload, bytes)
        key = object_id.storage_path.encode()
        await self._table.mutate(key, self._changes(object_id, InlineObject(extended, payload)))
        return True


class TestRaces:
    """Others come in between."""

    @pytest.mark.parametrize("kind", [BlindExtension, BigtableBackend])
    async def test_a_deleted_object_does_not_come_back_by_a_read_that_extends_it(
        self, bigtable_emulator: Emulator, table: str, clock: Any, an_id: AnId, other: BigtableBackend, kind: Any
    ) -> None:
        """BT-11, BT-12: deleted between the bump's read and its write. Written blindly, it is there again."""
        where = (bigtable_emulator.project, bigtable_emulator.instance, table)
        backend = kind(*where, emulator_host=bigtable_emulator.host, clock=clock)
        connection = await FaultyConnection.under(backend)
        seen = Metadata(expiration=TimeToIdle(100), time_expires=clock() + timedelta(seconds=100), size=1)
        await backend.put_non_tombstone(an_id(), seen, b"x")
        connection.after("read_row", lambda: other.delete_non_tombstone(an_id()))

        extended = replace(seen, time_expires=clock() + timedelta(seconds=200))
        answer = await backend.extend(an_id(), seen, extended)

        resurrected = await other.get_tiered(an_id()) is not None
        assert (answer, resurrected) == ((True, True) if kind is BlindExtension else (False, False))
        await backend.close()

    async def test_an_object_of_equal_metadata_put_meanwhile_keeps_its_payload(
        self, backend: BigtableBackend, other: BigtableBackend, connection: FaultyConnection, clock: Any, an_id: AnId
    ) -> None:
        """Metadata alone are no condition: two writes of one microsecond may have the same."""
        seen = Metadata(time_expires=clock() + timedelta(seconds=100), size=3)
        await backend.put_non_tombstone(an_id(), seen, b"old")
        connection.after("read_row", lambda: other.put_non_tombstone(an_id(), seen, b"new"))

        assert await backend.extend(an_id(), seen, replace(seen, time_expires=None)) is False
        assert await other.get_tiered(an_id()) == StoredObject(seen, b"new")

    async def test_an_object_that_expires_meanwhile_is_not_extended(
        self, backend: BigtableBackend, connection: FaultyConnection, clock: Any, an_id: AnId
    ) -> None:
        """BT-7."""
        seen = Metadata(time_expires=clock() + timedelta(seconds=1), size=1)
        await backend.put_non_tombstone(an_id(), seen, b"x")

        async def expire() -> None:
            clock.advance(1)

        connection.after("read_row", expire)

        assert await backend.extend(an_id(), seen, replace(seen, time_expires=None)) is False
        assert await backend.get_tiered(an_id()) is None

    @pytest.mark.parametrize("request_", ["put", "delete"])
    async def test_a_tombstone_that_goes_before_it_is_read_is_tried_for_again(
        self,
        backend: BigtableBackend,
        other: BigtableBackend,
        connection: FaultyConnection,
        an_id: AnId,
        request_: str,
    ) -> None:
        """BT-9: three times; a row gone is a success of both."""

        async def come() -> None:
            assert await other.compare_and_write(an_id(), None, TOMBSTONE_A)

        async def go() -> None:
            assert await other.compare_and_write(an_id(), A, Removal())

        async def send() -> Tombstone | None:
            if request_ == "put":
                return await backend.put_non_tombstone(an_id(), Metadata(), b"x")
            return await backend.delete_non_tombstone(an_id())

        async def go_and_come() -> None:
            await go()
            come_back.append(None)

        come_back: list[None] = []
        await come()
        connection.after("check_and_mutate_row", go)
        assert await send() is None
        assert (await other.get_tiered(an_id()) is not None) is (request_ == "put")

        await backend.delete_non_tombstone(an_id())
        await come()
        for _ in range(RACES_MAX):
            connection.after("check_and_mutate_row", go_and_come)
            connection.after("read_row", come)
        with pytest.raises(BackendUnavailable, match="faster"):
            await send()
        assert len(come_back) == RACES_MAX

    async def test_a_condition_that_never_holds_and_never_fails_ends(
        self, backend: BigtableBackend, other: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        """BT-9: the swap finds another target, the reading the one it wanted, again and again."""

        async def away() -> None:
            assert await other.compare_and_write(an_id(), A, TOMBSTONE_B)

        async def back() -> None:
            assert await other.compare_and_write(an_id(), B, TOMBSTONE_A)

        await bring_into(backend, an_id(), "tombstone")
        await away()
        for _ in range(RACES_MAX):
            connection.after("check_and_mutate_row", back)
            connection.after("read_row", away)

        with pytest.raises(BackendUnavailable, match="faster"):
            await backend.compare_and_write(an_id(), A, Tombstone(Revision("C"), Metadata()))

    @pytest.mark.parametrize("write", [TOMBSTONE_B, SMALL], ids=["tombstone", "object"])
    async def test_the_last_millisecond_of_a_life_is_waited_for(
        self, backend: BigtableBackend, connection: FaultyConnection, clock: Any, an_id: AnId, write: TieredWrite
    ) -> None:
        """BT-3: timestamps are whole milliseconds, reads exact.

        A swap that finds nothing to swap says so only once a read would; else the caller could take an object for
        stored that is not.
        """
        expires = clock() + timedelta(seconds=1)
        await backend.compare_and_write(an_id(), None, Tombstone(A, Metadata(time_expires=expires)))
        clock.advance(0.999_999)
        assert await backend.head_tiered(an_id()) is not None
        connection.sent.clear()

        async def pass_on() -> None:
            clock.advance(0.000_001)

        connection.after("read_row", _nothing)
        connection.after("read_row", pass_on)

        assert await backend.compare_and_write(an_id(), A, write) is (write is SMALL)
        assert await backend.head_tiered(an_id()) is None
        assert connection.sent.count("check_and_mutate_row") == 2

    async def test_in_the_last_millisecond_of_a_tombstone_an_object_may_be_put(
        self, backend: BigtableBackend, clock: Any, an_id: AnId
    ) -> None:
        """What it replaces has as good as expired, and so has its revision."""
        expires = clock() + timedelta(seconds=1)
        await backend.compare_and_write(an_id(), None, Tombstone(A, Metadata(time_expires=expires)))
        clock.advance(0.999_999)

        assert await backend.put_non_tombstone(an_id(), Metadata(), b"x") is None
        assert await backend.get_tiered(an_id()) == StoredObject(Metadata(size=1), b"x")


class TestGroups:
    """Rows asked for at the same time."""

    @pytest.mark.parametrize("request_", ["get", "head"])
    async def test_a_window_of_reads_is_one_request(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId, request_: str
    ) -> None:
        """Each gets its own row, of whatever kind; a row asked for twice is read once."""
        for number in range(0, 50, 3):
            await backend.put_non_tombstone(an_id(str(number)), Metadata(), b"%d" % number)
            await backend.compare_and_write(an_id(str(number + 1)), None, Tombstone(A, Metadata(size=number)))
        connection.sent.clear()

        read: Callable[[ObjectId], Awaitable[Any]] = backend.get_tiered if request_ == "get" else backend.head_tiered
        found = await asyncio.gather(*(read(an_id(str(number % 45))) for number in range(60)))

        assert connection.sent == ["read_rows"]
        for number, row in enumerate(found):
            kind, key = (number % 45) % 3, number % 45
            if kind == 0:
                metadata = Metadata(size=len(str(key)))
                assert row == (StoredObject(metadata, b"%d" % key) if request_ == "get" else metadata)
            else:
                assert row == (Tombstone(A, Metadata(size=key - 1)) if kind == 1 else None)

    async def test_more_rows_than_a_request_takes(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        await backend.put_non_tombstone(an_id("119"), Metadata(), b"x")
        connection.sent.clear()

        found = await asyncio.gather(*(backend.get_tiered(an_id(str(number))) for number in range(120)))

        assert connection.sent == ["read_rows"] * 3
        assert found == [None] * 119 + [StoredObject(Metadata(size=1), b"x")]

    async def test_a_group_that_fails_is_read_row_by_row_and_only_one_at_fault_fails(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        """And the others as ever: with attempts of their own."""
        for key in "abc":
            await backend.put_non_tombstone(an_id(key), Metadata(), key.encode())
        connection.not_sent("read_rows", lost())
        connection.not_sent("read_row", google.PermissionDenied("x"))
        connection.not_sent("read_row", lost(), ATTEMPTS - 1)

        found = await asyncio.gather(*(backend.get_tiered(an_id(key)) for key in "abc"), return_exceptions=True)

        assert [type(one) for one in found].count(BackendError) == 1
        for key, one in zip("abc", found, strict=True):
            assert isinstance(one, BackendError) or one == StoredObject(Metadata(size=1), key.encode())

    async def test_a_damaged_row_is_damaged_for_itself_alone(self, backend: BigtableBackend, an_id: AnId) -> None:
        for key in "ab":
            await backend.put_non_tombstone(an_id(key), Metadata(), b"x")
        await remove_cell(backend, an_id("a"), "fm", b"p")

        damaged, whole = await asyncio.gather(
            backend.get_tiered(an_id("a")), backend.get_tiered(an_id("b")), return_exceptions=True
        )

        assert isinstance(damaged, BackendError)
        assert whole == StoredObject(Metadata(size=1), b"x")

    async def test_a_read_sees_what_was_answered_before_it_though_others_are_on_their_way(
        self, backend: BigtableBackend, other: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        """It joins no request that has been sent."""
        answer = Paused()
        connection.after("read_rows", answer.pause)
        early = [asyncio.create_task(backend.get_tiered(an_id(key))) for key in "ab"]
        await answer.reached.wait()
        await other.put_non_tombstone(an_id("a"), Metadata(), b"x")

        assert await backend.get_tiered(an_id("a")) == StoredObject(Metadata(size=1), b"x")
        answer.go_on.set()
        assert await asyncio.gather(*early) == [None, None]

    async def test_what_gathers_behind_requests_on_their_way_is_sent_after_them(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        """At most four at a time; the rest as one."""
        answers, readers = await hold_all_requests(backend, connection, an_id)
        for key in "cdefg":
            readers.append(asyncio.create_task(backend.get_tiered(an_id(key))))
            await asyncio.sleep(0)
        assert connection.sent == ["read_rows"] * GROUPS_AT_ONCE
        for answer in answers:
            answer.go_on.set()

        assert await asyncio.gather(*readers) == [None] * (2 * GROUPS_AT_ONCE + 5)
        assert connection.sent == ["read_rows"] * (GROUPS_AT_ONCE + 1)

    async def test_a_cancelled_reader_disturbs_nobody(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        """Before its request is sent, and while it is on its way."""
        answer = Paused()
        connection.after("read_rows", answer.pause)
        early, late, staying, other_one = (asyncio.create_task(backend.get_tiered(an_id(key))) for key in "abcd")
        await asyncio.sleep(0)
        early.cancel()
        await answer.reached.wait()
        late.cancel()
        answer.go_on.set()

        outcomes = await asyncio.gather(early, late, staying, other_one, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes[:2]] == [asyncio.CancelledError] * 2
        assert (outcomes[2], outcomes[3]) == (None, None)

    async def test_closing_ends_reads_on_their_way_and_sends_no_more(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId
    ) -> None:
        """Nothing is left behind, no new connection either: those that gather behind are ended too."""
        _, reads = await hold_all_requests(backend, connection, an_id)
        reads += [asyncio.create_task(backend.get_tiered(an_id(key))) for key in "cd"]
        await asyncio.sleep(0)
        await backend.close()

        outcomes = await asyncio.gather(*reads, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {asyncio.CancelledError}
        assert connection.sent == ["read_rows"] * GROUPS_AT_ONCE
        assert backend._table._connection is None


async def hold_all_requests(
    backend: BigtableBackend, connection: FaultyConnection, an_id: AnId
) -> tuple[list[Paused], list[asyncio.Task[Any]]]:
    """Let as many requests for rows be on their way as may be, two rows each; return their answers and readers."""
    answers, readers = [], []
    for number in range(GROUPS_AT_ONCE):
        answers.append(Paused())
        connection.after("read_rows", answers[-1].pause)
        readers += [asyncio.create_task(backend.get_tiered(an_id(f"{number}{key}"))) for key in "ab"]
        await answers[-1].reached.wait()
    return answers, readers


class TestLimits:
    """Held by us: the emulator takes anything."""

    @pytest.mark.parametrize(
        "write",
        [
            InlineObject(Metadata(), b"x" * 101),
            InlineObject(Metadata(filename="x" * 200), b"x"),
            Tombstone(Revision("x" * 101), Metadata()),
        ],
        ids=["payload", "metadata", "target"],
    )
    async def test_a_cell_too_large_is_refused_and_nothing_sent(
        self,
        backend: BigtableBackend,
        connection: FaultyConnection,
        an_id: AnId,
        monkeypatch: pytest.MonkeyPatch,
        write: TieredWrite,
    ) -> None:
        """100 MB; here 100 bytes."""
        monkeypatch.setattr(bigtable, "CELL_BYTES_MAX", 100)
        with pytest.raises(TooLarge, match="at most 100 bytes"):
            await backend.compare_and_write(an_id(), None, write)

        assert connection.sent == []

    async def test_a_row_too_large_is_refused(
        self, backend: BigtableBackend, connection: FaultyConnection, an_id: AnId, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """256 MB; here so much that the key makes the difference."""
        write = InlineObject(Metadata(size=50), b"x" * 50)
        row = 50 + len(encode_metadata(write.metadata)) + len(an_id().storage_path)
        monkeypatch.setattr(bigtable, "ROW_BYTES_MAX", row)
        assert await backend.compare_and_write(an_id(), None, write)
        connection.sent.clear()
        monkeypatch.setattr(bigtable, "ROW_BYTES_MAX", row - 1)

        with pytest.raises(TooLarge, match=f"at most {row - 1} bytes, not {row}"):
            await backend.put_non_tombstone(an_id(), Metadata(), b"x" * 50)
        assert connection.sent == []

    async def test_a_backend_may_have_a_lower_limit(self, bigtable_emulator: Emulator, table: str, an_id: AnId) -> None:
        backend = bigtable_emulator.backend(table, inline_bytes_max=10)
        assert bigtable_emulator.backend(table, inline_bytes_max=10**12).inline_bytes_max == 100_000_000

        await backend.put_non_tombstone(an_id(), Metadata(), b"x" * 10)
        with pytest.raises(TooLarge):
            await backend.put_non_tombstone(an_id(), Metadata(), b"x" * 11)
        await backend.close()

    async def test_the_longest_names_fit(self, backend: BigtableBackend, an_id: AnId) -> None:
        """A storage path of 900 bytes as row key, its revision as value, as ban, and as condition."""
        longest = an_id("x" * (900 - len(an_id("x").storage_path) + 1))
        assert len(longest.storage_path) == 900
        first, second = new_revision(longest), new_revision(longest)
        assert await backend.compare_and_write(longest, None, Tombstone(first, Metadata()))
        assert await backend.forbid(longest, second)
        with pytest.raises(BackendUnavailable):
            await backend.compare_and_write(longest, first, Tombstone(second, Metadata()))


class TestTable:
    """What everything lies in."""

    async def test_it_is_made_once_and_then_left_alone(
        self, bigtable_emulator: Emulator, an_id: AnId, clock: Any
    ) -> None:
        """BT-14: by many at once, and again over what is there."""
        table = bigtable_emulator.unused_table()
        backends = [bigtable_emulator.backend(table, clock=clock) for _ in range(4)]
        await asyncio.gather(*(backend.create() for backend in backends))
        await backends[0].put_non_tombstone(an_id(), Metadata(), b"x")
        await backends[1].create()
        await backends[1].open()

        assert await backends[2].get_tiered(an_id()) is not None
        for backend in backends:
            await backend.close()

    async def test_rows_and_changes_may_share_a_table(self, bigtable_emulator: Emulator) -> None:
        """Contract 5: whichever is made first, the other adds its family."""
        for first in ("backend", "change_log"):
            table = bigtable_emulator.unused_table()
            parts = [getattr(bigtable_emulator, first)(table)]
            parts += [bigtable_emulator.backend(table), bigtable_emulator.change_log(table)]
            for part in parts:
                await part.create()
            for part in parts:
                await part.open()
                await part.close()

    @pytest.mark.parametrize("part", ["backend", "change_log"])
    async def test_a_missing_table_or_family_is_told_at_start(
        self, bigtable_emulator: Emulator, part: str, an_id: AnId
    ) -> None:
        """Contract 11: configuration; the text says what to do. Later it is a permanent fault."""
        table = bigtable_emulator.unused_table()
        made = getattr(bigtable_emulator, part)(table)
        with pytest.raises(ConfigError, match=f"storage init.*{table}"):
            await made.open()
        await make_table(bigtable_emulator, table, {"stranger": False})

        connection = await FaultyConnection.under(made)
        with pytest.raises(ConfigError, match=f"storage init.*{table}"):
            await made.open()
        assert connection.sent == ["mutate_row"]
        if isinstance(made, BigtableBackend):
            with pytest.raises(BackendError, match="storage init"):
                await made.put_non_tombstone(an_id(), Metadata(), b"x")
        await made.close()

    async def test_a_kept_family_with_a_collection_rule_is_refused(self, bigtable_emulator: Emulator) -> None:
        """It would lose objects."""
        table = bigtable_emulator.unused_table()
        await make_table(bigtable_emulator, table, {"fm": True})

        backend = bigtable_emulator.backend(table)
        with pytest.raises(ConfigError, match="fm"):
            await backend.create()
        await backend.close()

    async def test_the_emulator_of_the_environment_is_used(
        self, bigtable_emulator: Emulator, table: str, monkeypatch: pytest.MonkeyPatch, an_id: AnId
    ) -> None:
        """Where the configuration names none."""
        monkeypatch.setenv("BIGTABLE_EMULATOR_HOST", bigtable_emulator.host)
        backend = BigtableBackend(bigtable_emulator.project, bigtable_emulator.instance, table)
        await backend.create()
        await backend.put_non_tombstone(an_id(), Metadata(), b"x")
        assert await backend.get_tiered(an_id()) is not None
        await backend.close()

    def test_storage_init_makes_what_the_service_needs(
        self, bigtable_emulator: Emulator, monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Any
    ) -> None:
        """Contract 7, BT-14; a second time over what is there, and objects can be looked at."""
        section = bigtable_emulator.section(bigtable_emulator.unused_table())
        parts = {
            "high_volume": section,
            "long_term": {"type": "filesystem", "path": "objects"},
            "change_log": section | {"owner": "me"},
        }
        config = {"storage": parts}
        tierstream = Tierstream(monkeypatch, capfd, tmp_path)
        refused = tierstream("storage", "head", "u/objects/k", config=config)
        assert refused.code != 0
        assert "tierstream storage init" in refused.err
        asked = tierstream("check-config", "--online", config=config | {"kafka": NOBODY})
        assert "FAILED       storage.high_volume (bigtable): bigtable: the table or one of" in asked.out

        dry = tierstream("storage", "init", "--dry-run", config=config)
        assert "would be created" in dry.out
        first, made = (tierstream("storage", "init", "--json", config=config) for _ in range(2))
        assert (first.code, made.code) == (0, 0), first.err + made.err
        place = "/".join(section[name] for name in ("project", "instance", "table"))
        assert made.json["parts"][0] == {"part": "high_volume", "type": "bigtable", "where": place}

        asked = tierstream("check-config", "--online", "--json", config=config | {"kafka": NOBODY}).json
        found = {check["check"]: check["ok"] for check in asked["checks"] if "bigtable" in check["check"]}
        assert found == {"storage.high_volume (bigtable)": True, "storage.change_log (bigtable)": True}

        assert "there is no object" in tierstream("storage", "head", "u/objects/k", config=config).err
        assert tierstream("storage", "verify", "--json", config=config).code == 0
        assert tierstream("storage", "recover", "--json", "--yes", config=config).json["entries"] == 0


async def make_table(emulator: Emulator, name: str, families: dict[str, bool]) -> None:
    """Make a table with these families alone."""
    table = BigtableTable(TableName(emulator.project, emulator.instance, name, emulator.host), families)
    await table.create()
    await table.close()


async def _nothing() -> None:
    """Come in between, and do nothing."""
