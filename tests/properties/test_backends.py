"""Generated histories and names: all answer as memory does, no name leads out of the folder, metadata come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bigtable_emulator import Emulator
from consumer.errors import BackendError, BackendUnavailable, InvalidOperation
from consumer.ids import ObjectContext, ObjectId, check_key
from consumer.operations import Metadata, StoredObject, TimeToIdle, TimeToLive
from consumer.storage.backend import HighVolumeBackend, InlineObject, Removal, Revision, TieredWrite, Tombstone
from consumer.storage.filesystem import FilesystemBackend, revision_path
from consumer.storage.memory import MemoryBackend
from consumer.storage.metadata import decode_metadata, encode_metadata, expired, micros
from consumer.storage.sqlite import SqliteBackend

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _is_key(text: str) -> bool:
    try:
        check_key(text)
    except InvalidOperation:
        return False
    return True


KEYS = st.text(min_size=1, max_size=220).filter(_is_key) | st.sampled_from(
    ["..", "../../x", "/etc/passwd", "metadata.json", ".lock", "incoming", "FORMAT", "a" * 880, "/" * 880, "K", "k"]
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TIMES = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))  # noqa: DTZ001 - zone beside it
METADATA = st.builds(
    Metadata,
    content_type=st.sampled_from(["application/octet-stream", "text/plain; charset=utf-8"]),
    expiration=st.none() | st.builds(TimeToLive, st.integers(1, 10**8)) | st.builds(TimeToIdle, st.integers(1, 10**8)),
    compression=st.sampled_from([None, "zstd"]),
    filename=st.none() | TEXTS.filter(bool),
    origin=st.none() | TEXTS.filter(bool),
    custom=st.dictionaries(TEXTS, TEXTS, max_size=5),
    time_created=st.none() | TIMES,
    time_expires=st.none() | TIMES,
    size=st.none() | st.integers(0, 2**63 - 1),
)


@given(METADATA)
def test_metadata_come_back_exactly(metadata: Metadata) -> None:
    """MD-7, MD-8: to the microsecond, and equal metadata are equal bytes."""
    stored = encode_metadata(metadata)

    assert decode_metadata(stored) == metadata
    assert encode_metadata(decode_metadata(stored)) == stored
    if metadata.time_expires is not None:
        assert EPOCH + timedelta(microseconds=micros(metadata.time_expires)) == metadata.time_expires


@given(
    st.binary(max_size=60)
    | METADATA.map(encode_metadata).flatmap(lambda stored: st.integers(0, len(stored)).map(lambda cut: stored[:cut]))
)
def test_damaged_metadata_are_never_anything_but_our_error(stored: bytes) -> None:
    """What a disk gives back must not end the process."""
    try:
        decoded = decode_metadata(stored)
    except BackendError:
        return
    assert isinstance(decoded, Metadata)


# -------------------------------------------------------------------------------------- one history, two backends

KEY = st.integers(0, 2)
TARGET = st.sampled_from("ABC")
LIFE = st.none() | st.integers(0, 4)
"""Seconds until the expiry, from now."""
WRITE = st.tuples(st.sampled_from(["tombstone", "object", "removal"]), TARGET, LIFE)
STEP = st.one_of(
    st.tuples(st.just("put"), KEY, LIFE),
    st.tuples(st.just("delete"), KEY),
    st.tuples(st.just("swap"), KEY, st.none() | TARGET, WRITE),
    st.tuples(st.just("forbid"), KEY, TARGET),
    st.tuples(st.just("extend"), KEY, LIFE),
    st.tuples(st.just("wait"), st.integers(1, 3)),
)
Step: TypeAlias = tuple[Any, ...]

_numbers = count()


class History:
    """The same steps on a memory backend and on another, with one clock."""

    def __init__(self, make: Callable[..., HighVolumeBackend]) -> None:
        # Far ahead of every real clock: a Bigtable table itself forgets, by its own clock, what has expired.
        self.now = datetime(2096, 1, 1, tzinfo=UTC)
        self.memory = MemoryBackend(clock=self.clock)
        self.other = make(clock=self.clock)
        self.context = ObjectContext("none")

    def clock(self) -> datetime:
        return self.now

    async def play(self, steps: list[Step]) -> None:
        """Play *steps* on rows of their own; after each, both answer and hold the same."""
        self.context = ObjectContext(f"u{next(_numbers)}")
        for number, step in enumerate(steps):
            if step[0] == "wait":
                self.now += timedelta(seconds=step[1])
                continue
            object_id = ObjectId(self.context, str(step[1]))
            seen = await self.memory.head_tiered(object_id)
            answers = [await self._take(backend, step, number, seen) for backend in (self.memory, self.other)]
            assert answers[0] == answers[1]
            for backend in (self.memory, self.other):
                read, head = await backend.get_tiered(object_id), await backend.head_tiered(object_id)
                assert head == (read.metadata if isinstance(read, StoredObject) else read)
                assert read is None or not expired(read.metadata, self.clock)
            assert await self.memory.get_tiered(object_id) == await self.other.get_tiered(object_id)

    async def _take(self, backend: HighVolumeBackend, step: Step, number: int, seen: Any) -> Any:
        match step:
            case ("put", key, life):
                return await backend.put_non_tombstone(self._id(key), self._metadata(number, life), b"%d" % number)
            case ("delete", key):
                return await backend.delete_non_tombstone(self._id(key))
            case ("swap", key, current, write):
                try:
                    return await backend.compare_and_write(
                        self._id(key), current and self._revision(key, current), self._write(key, number, *write)
                    )
                except BackendUnavailable:
                    return "forbidden"
            case ("forbid", key, target):
                return await backend.forbid(self._id(key), self._revision(key, target))
            case ("extend", key, life):
                known = seen.metadata if isinstance(seen, Tombstone) else seen or Metadata()
                expires = self._metadata(number, life).time_expires
                return await backend.extend(self._id(key), known, replace(known, time_expires=expires))
        raise AssertionError(step)

    def _id(self, key: int) -> ObjectId:
        return ObjectId(self.context, str(key))

    def _metadata(self, number: int, life: int | None) -> Metadata:
        return Metadata(filename=f"{number}", time_expires=None if life is None else self.now + timedelta(seconds=life))

    def _revision(self, key: int, target: str) -> Revision:
        return Revision(f"{self.context.usecase}/{key}/{target}")

    def _write(self, key: int, number: int, kind: str, target: str, life: int | None) -> TieredWrite:
        if kind == "removal":
            return Removal()
        metadata = self._metadata(number, life)
        if kind == "object":
            return InlineObject(metadata, b"%d" % number)
        return Tombstone(self._revision(key, target), metadata)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """Lend one event loop to all examples."""
    with asyncio.Runner() as made:
        yield made


@pytest.fixture(scope="module")
def sqlite_history(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """Lend one pair of backends; each example has rows of its own."""
    made = History(partial(SqliteBackend, tmp_path_factory.mktemp("sqlite") / "objects.sqlite"))
    yield made
    runner.run(made.other.close())


@pytest.fixture(scope="module")
def bigtable_history(runner: asyncio.Runner, bigtable_emulator: Emulator) -> Iterator[History]:
    """Lend one pair of backends; each example has rows of its own."""
    table = runner.run(bigtable_emulator.create(bigtable_emulator.unused_table()))
    made = History(partial(bigtable_emulator.backend, table))
    yield made
    runner.run(made.other.close())


def histories(examples: int) -> Callable[[Any], Any]:
    """Decorate a test that takes *steps*."""

    def decorate(test: Any) -> Any:
        for steps in (
            [("swap", 0, None, ("tombstone", "A", 2)), ("wait", 2), ("put", 0, None)],
            [("forbid", 0, "A"), ("put", 0, 1), ("swap", 0, None, ("tombstone", "A", None)), ("delete", 0)],
            [
                ("swap", 0, None, ("tombstone", "A", 2)),
                ("swap", 0, "A", ("tombstone", "B", 0)),
                ("forbid", 0, "B"),
            ],
        ):
            test = example(steps=steps)(test)
        return settings(max_examples=examples)(given(steps=st.lists(STEP, max_size=25))(test))

    return decorate


@histories(150)
def test_sqlite_answers_every_history_as_memory_does(
    runner: asyncio.Runner, sqlite_history: History, steps: list[Step]
) -> None:
    """HV-1, HV-2, HV-4 to HV-10, BT-5, BT-7: the fake that everything is tested over is true to the real one."""
    runner.run(sqlite_history.play(steps))


@pytest.mark.emulator
@pytest.mark.slow
@histories(100)
def test_bigtable_answers_every_history_as_memory_does(
    runner: asyncio.Runner, bigtable_history: History, steps: list[Step]
) -> None:
    """As above, and BT-4, BT-8."""
    runner.run(bigtable_history.play(steps))


# --------------------------------------------------------------------------------------------- names and the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a root in it, and a file beside the root that nobody may touch."""
    made = tmp_path_factory.mktemp("filesystem")
    (made / "beside").write_bytes(b"untouched")
    return made


@pytest.fixture(scope="module")
def backend(runner: asyncio.Runner, folder: Path) -> Iterator[FilesystemBackend]:
    """Lend one backend to all examples."""
    made = FilesystemBackend(folder / "root" / "objects")
    yield made
    runner.run(made.close())


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(key=KEYS, other=KEYS, payload=st.binary(max_size=2000))
def test_any_key_reads_back_and_nothing_outside_the_root_changes(
    runner: asyncio.Runner, backend: FilesystemBackend, folder: Path, key: str, other: str, payload: bytes
) -> None:
    """Faults 4.5: the root holds what was put, and after the deletes what it held before."""

    async def put_read_delete() -> None:
        revisions = [Revision(f"u/objects/{key}/1"), Revision(f"u/objects/{other}/2")]
        for revision in revisions:
            await backend.put(revision, Metadata(filename="f"), payload + revision.name.encode())
        for revision in revisions:
            expected = payload + revision.name.encode()
            assert await backend.get(revision) == StoredObject(Metadata(filename="f", size=len(expected)), expected)
            inside = folder.joinpath("root", "objects", *revision_path(revision.name)).with_suffix("")
            assert inside.resolve() == inside
            assert inside.with_name(f"{inside.name}.payload").read_bytes() == expected
        for revision in revisions:
            await backend.delete(revision)

    runner.run(put_read_delete())

    assert (folder / "beside").read_bytes() == b"untouched"
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    root = {"root/objects/.lock", "root/objects/FORMAT", "root/objects/incoming"}
    assert left == {"beside", "root", "root/objects"} | root


@given(one=st.text(max_size=400), other=st.text(max_size=400))
def test_two_names_are_two_paths(one: str, other: str) -> None:
    """And no path is the folder of another: files have a suffix that no folder can have."""
    names = [name.encode("utf-8", "replace").decode() for name in (one, other)]

    assert (revision_path(names[0]) == revision_path(names[1])) is (names[0] == names[1])
    for name in names:
        assert "." not in "".join(revision_path(name))
