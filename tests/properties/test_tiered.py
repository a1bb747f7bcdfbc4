"""Tiered storage under any mix of writers, failures, cancellations, crashes: objects stay whole, nothing is left over.

The model, and what holds in it, is in `storage_model.py`. Here it is driven by a hypothesis state machine, which makes
a failure small; by seeds, for a hundred thousand operations, which are counted; and, for fewer, over the backends that
are real files, or a table. A second kind of model reads by reference: every one that was handed out leads to its
payload until the retention is over.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from bigtable_emulator import Emulator
from consumer.storage import filesystem
from consumer.storage.backend import ChangeLog, HighVolumeBackend
from consumer.storage.filesystem import FilesystemBackend
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
    Model,
    Operation,
    Place,
    play_many,
)

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

MUST_HAPPEN = {"before", "after", "late", "killed", "taken for dead", "refused", "called off"}
"""Without it, the model has shown nothing."""


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


class OnFiles:
    """Rows and changes in a SQLite file, revisions in a folder."""

    lease_seconds = 3000.0
    """A third of it, between two signs of life, is longer than any test in real time."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._file = folder / "objects.sqlite"
        self._clock = clock
        self._opened: list[Any] = []
        self.high_volume = self._opening(self._open_rows())
        self.long_term = self._opening(FilesystemBackend(folder / "objects", clock=clock))

    def _opening(self, part: Any) -> Any:
        self._opened.append(part)
        return part

    def _open_rows(self) -> HighVolumeBackend:
        return SqliteBackend(self._file, clock=self._clock)

    def open_log(self, member: int) -> ChangeLog:
        """Open a log in the same file."""
        file, seconds = self._file, self._clock.seconds
        owner = f"member-{member}"
        log: ChangeLog = self._opening(
            SqliteChangeLog(file, owner, self.lease_seconds, monotonic=seconds, clock=self._clock)
        )
        return log

    def end_log(self, _member: int) -> None:
        """Let every lease be over; who lives has a new one as soon as it records something."""
        self._clock.advance(self.lease_seconds + 1)

    async def close(self) -> None:
        """Close everything, logs of the dead too."""
        for part in reversed(self._opened):
            await part.close()


class OnBigtable(OnFiles):
    """Rows and changes in a table of the emulator, revisions in a folder."""

    def __init__(self, emulator: Emulator, table: str, folder: Path, clock: Clock) -> None:
        self._emulator = emulator
        self._table = table
        super().__init__(folder, clock)

    def _open_rows(self) -> HighVolumeBackend:
        return self._emulator.backend(self._table, clock=self._clock)

    def open_log(self, member: int) -> ChangeLog:
        """Open a log in the same table."""
        owner = f"member-{member}"
        log: ChangeLog = self._opening(
            self._emulator.change_log(self._table, owner, self.lease_seconds, clock=self._clock)
        )
        return log


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
    assert set(happened) >= MUST_HAPPEN, "void: something has not happened once"


@pytest.mark.emulator
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("few_folders")
def test_on_a_bigtable_it_is_the_same(tmp_path: Path, bigtable_emulator: Emulator) -> None:
    """Rows and changes over a network."""

    async def make_place(clock: Clock) -> Place:
        table = await bigtable_emulator.create(bigtable_emulator.unused_table())
        return OnBigtable(bigtable_emulator, table, tmp_path / table, clock)

    happened = play_many(OPERATIONS_ON_FILES_MIN // 2, first_seed(), lambda _seed: Model(make_place))

    assert happened["operations"] >= OPERATIONS_ON_FILES_MIN // 2
    assert set(happened) >= MUST_HAPPEN - {"refused"}, "void: something has not happened once"
