"""Tiered storage under any mix of writers, failures, cancellations, crashes: objects stay whole, nothing is left over.

The model, and what holds in it, is in `storage_model.py`. Here it is driven by a hypothesis state machine, which makes
a failure small; by seeds, for a hundred thousand operations, which are counted; and, for fewer, over real files, over a
bucket, and over a table and a bucket. A second kind of model reads by reference: every one that was handed out leads to
its payload until the retention is over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import strict_gcs
from bigtable_emulator import Emulator
from consumer.operations import PayloadReference
from consumer.retry import RetryPolicy
from consumer.storage import filesystem, gcs, gcs_client
from consumer.storage.backend import ChangeLog
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.gcs import GcsBackend
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog
from storage_model import (
    KEYS,
    KINDS,
    MEMBERS,
    OPERATIONS_MAX,
    RETENTION_SECONDS,
    SIZES,
    TURNS_MAX,
    Clock,
    InMemory,
    Model,
    Operation,
    Place,
    play_many,
)
from strict_gcs import StrictGcs
from weather import GustyGcs, in_gusts

MEMBER = st.integers(0, MEMBERS - 1)
TURNS = st.integers(0, TURNS_MAX)
SEED = st.integers(0, 2**32 - 1)
FAILING = st.sampled_from([0.0, 0.1, 0.4])
OPERATIONS = st.lists(
    st.tuples(MEMBER, st.sampled_from(KINDS), st.sampled_from(KEYS), st.sampled_from(SIZES), st.booleans()),
    min_size=1,
    max_size=OPERATIONS_MAX,
)

OPERATIONS_MIN = 100_000
"""Operations of a run of the suite, over the memory backends."""

OPERATIONS_ON_FILES_MIN = 1_000
"""A hundred times slower."""

OPERATIONS_IN_A_BUCKET_MIN = 2_000
"""Fifty times slower."""

OPERATIONS_ON_CLOUDS_MIN = 500
"""Two hundred times slower."""

MUST_HAPPEN = {"before", "after", "late", "killed", "taken for dead", "refused", "called off"}
"""Without it, the model has shown nothing."""

MUST_HAPPEN_SOON = MUST_HAPPEN - {"refused"}
"""As above, with few operations: a swap to a forbidden revision takes several accidents in a row."""


class Machine(RuleBasedStateMachine):
    """What can be done to a model."""

    retention: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(retention=self.retention)

    @rule(operations=OPERATIONS, seed=SEED, failing=FAILING)
    def batch(self, operations: list[Operation], seed: int, failing: float) -> None:
        self.model.batch(operations, seed, failing)

    @rule(operations=OPERATIONS, seed=SEED, failing=FAILING, turns=TURNS)
    def batch_called_off(self, operations: list[Operation], seed: int, failing: float, turns: int) -> None:
        self.model.batch(operations, seed, failing, cancelled_after=turns)

    @rule(operations=OPERATIONS, seed=SEED, failing=FAILING, member=MEMBER, turns=TURNS)
    def batch_of_one_taken_for_dead(
        self, operations: list[Operation], seed: int, failing: float, member: int, turns: int
    ) -> None:
        self.model.batch(operations, seed, failing, buried=(member, turns))

    @rule(member=MEMBER)
    def kill(self, member: int) -> None:
        self.model.kill(member)

    @rule(member=MEMBER, seed=SEED, failing=FAILING)
    def recover(self, member: int, seed: int, failing: float) -> None:
        self.model.recover(member, seed, failing)

    @rule(index=st.integers(0, 10))
    def arrive(self, index: int) -> None:
        self.model.arrive(index)

    @rule(seconds=st.floats(0, 150))
    def wait(self, seconds: float) -> None:
        self.model.wait(seconds)

    @rule()
    def settle(self) -> None:
        self.model.settle()

    @invariant()
    def promises_are_kept(self) -> None:
        self.model.promises_are_kept()

    def teardown(self) -> None:
        with self.model:
            self.model.settle_for_good()


class ReferringMachine(Machine):
    """The same, read by callers who can take no payload."""

    retention = RETENTION_SECONDS


TestTieredStorage = pytest.mark.slow(Machine.TestCase)
TestTieredStorage.settings = settings(max_examples=60, stateful_step_count=25)

TestReferringStorage = pytest.mark.slow(ReferringMachine.TestCase)
TestReferringStorage.settings = settings(max_examples=60, stateful_step_count=25)


def first_seed() -> int:
    """Return where to begin: in CI always there, else anywhere."""
    return 0 if os.environ.get("CI") else int.from_bytes(os.urandom(3), "big")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_operations_leave_every_object_whole_and_nothing_over() -> None:
    """I7, I8: half of the episodes read by reference."""
    happened = play_many(OPERATIONS_MIN, first_seed())

    assert happened["operations"] >= OPERATIONS_MIN
    assert set(happened) >= MUST_HAPPEN, "void: something has not happened once"
    assert happened["late"] > 1000
    assert happened["killed"] > 1000


class Opening:
    """A place whose parts are opened, and closed in the end."""

    lease_seconds = 3000.0
    """A third of it, between two signs of life, is longer than any test in real time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._opened: list[Any] = []

    def opening(self, part: Any) -> Any:
        """Return *part*, noted as open."""
        self._opened.append(part)
        return part

    def end_log(self, _member: int) -> None:
        """Let every lease be over; who lives has a new one as soon as it records something."""
        self.clock.advance(self.lease_seconds + 1)

    async def close(self) -> None:
        """Close everything, logs of the dead too."""
        for part in reversed(self._opened):
            await part.close()


class OnFiles(Opening):
    """Rows and changes in a SQLite file, revisions in a folder."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        super().__init__(clock)
        self._file = folder / "objects.sqlite"
        self.high_volume = self.opening(SqliteBackend(self._file, clock=clock))
        self.long_term = self.opening(FilesystemBackend(folder / "objects", clock=clock))

    def open_log(self, member: int) -> ChangeLog:
        """Open a log in the same file."""
        owner, seconds = f"member-{member}", self.clock.seconds
        log: ChangeLog = self.opening(
            SqliteChangeLog(self._file, owner, self.lease_seconds, monotonic=seconds, clock=self.clock)
        )
        return log


class Bucket(GcsBackend):
    """Revisions in a bucket of the strict server, read by references too."""

    def __init__(self, server: StrictGcs, clock: Clock) -> None:
        name = uuid4().hex
        super().__init__(name, endpoint=server.endpoint, clock=clock)
        self._objects = server.bucket(name)

    def read(self, reference: PayloadReference) -> bytes:
        """Return what somebody with the reference sees."""
        return self._objects[reference.uri.partition("://")[2].partition("/")[2]].payload


class InABucket(InMemory):
    """Rows and changes in memory, revisions in a bucket."""

    def __init__(self, server: StrictGcs, clock: Clock) -> None:
        super().__init__(clock)
        self.long_term: Any = Bucket(server, clock)

    async def close(self) -> None:
        """Let go of threads and connections."""
        await self.long_term.close()


class OnClouds(Opening):
    """Rows and changes in a table of the emulator, revisions in a bucket; all requests in gusts."""

    def __init__(self, emulator: Emulator, table: str, server: StrictGcs, clock: Clock, random: Random) -> None:
        super().__init__(clock)
        self._emulator, self._table, self._random = emulator, table, random
        self.high_volume = self.opening(in_gusts(emulator.backend(table, clock=clock), random))
        self.long_term = self.opening(Bucket(server, clock))

    def open_log(self, member: int) -> ChangeLog:
        """Open a log in the same table."""
        owner = f"member-{member}"
        log = self._emulator.change_log(self._table, owner, self.lease_seconds, clock=self.clock)
        opened: ChangeLog = self.opening(in_gusts(log, self._random))
        return opened


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictGcs]:
    """Lend a server of buckets in gusts, soon asked again; a stream of ten bytes takes three requests."""
    monkeypatch.setattr(gcs_client, "RETRIES", RetryPolicy(attempts=3, initial_seconds=0.001, max_seconds=0.01))
    monkeypatch.setattr(gcs, "GATHER_BYTES", 8)
    monkeypatch.setattr(strict_gcs, "QUARTER", 8)
    with GustyGcs(Random(first_seed())) as running:
        yield running


@pytest.fixture
def few_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans go through all folders there can be: a few are enough here."""
    monkeypatch.setattr(filesystem, "FOLDERS", 8)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("few_folders")
def test_on_real_files_it_is_the_same(tmp_path: Path) -> None:
    """SQLite, its change log, and the filesystem: not only their doubles."""
    async def make_place(clock: Clock) -> Place:
        return OnFiles(tmp_path / uuid4().hex, clock)

    happened = play_many(OPERATIONS_ON_FILES_MIN, first_seed(), lambda _seed: Model(make_place))

    assert happened["operations"] >= OPERATIONS_ON_FILES_MIN
    assert set(happened) >= MUST_HAPPEN_SOON, "void: something has not happened once"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_in_a_bucket_it_is_the_same(server: StrictGcs) -> None:
    """Every kind of request loses answers; every other episode reads by reference."""

    def make_model(seed: int) -> Model:
        async def make_place(clock: Clock) -> Place:
            return InABucket(server, clock)

        return Model(make_place, RETENTION_SECONDS if seed % 2 else None)

    happened = play_many(OPERATIONS_IN_A_BUCKET_MIN, first_seed(), make_model)

    assert happened["operations"] >= OPERATIONS_IN_A_BUCKET_MIN
    assert set(happened) >= MUST_HAPPEN_SOON, "void: something has not happened once"
    assert set(server.kinds()) >= {"insert", "begin", "piece", "find", "media", "delete", "list"}


@pytest.mark.emulator
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_the_clouds_it_is_the_same(bigtable_emulator: Emulator, server: StrictGcs) -> None:
    """Rows, changes and revisions over a network that loses answers."""

    def make_model(seed: int) -> Model:
        async def make_place(clock: Clock) -> Place:
            table = await bigtable_emulator.create(bigtable_emulator.unused_table())
            return OnClouds(bigtable_emulator, table, server, clock, Random(seed))

        return Model(make_place)

    happened = play_many(OPERATIONS_ON_CLOUDS_MIN, first_seed(), make_model)

    assert happened["operations"] >= OPERATIONS_ON_CLOUDS_MIN
    assert set(happened) >= MUST_HAPPEN_SOON, "void: something has not happened once"
