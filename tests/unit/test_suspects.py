"""Notes of what is being decoded: what outlives a process, what is counted, and what is condemned."""

from __future__ import annotations

import mmap
import os
import signal
from pathlib import Path

import pytest

from consumer.suspects import ENTRIES_MAX, NOBODY, OFFSET, TIMESTAMP, Suspects

HERE = ("in", 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that is made when it is needed."""
    return tmp_path / "data" / "decoding"


class Process:
    """One life of a process that decodes one partition, until it dies."""

    def __init__(self, folder: Path, *, cluster: str = "c", group: str = "g", where: tuple[str, int] = HERE) -> None:
        self.note = Suspects(folder, cluster_id=cluster, group_id=group).open_notes([where])[where]

    @property
    def condemned(self) -> set[tuple[int, int]]:
        """What it would not decode."""
        return set(self.note.condemned)

    def decode(self, offset: int, timestamp: int = 7) -> None:
        """Decode a record, and survive it."""
        self.note.slots[TIMESTAMP], self.note.slots[OFFSET] = timestamp, offset
        self.note.slots[OFFSET] = NOBODY

    def die_of(self, offset: int, timestamp: int = 7) -> None:
        """End while decoding a record."""
        self.note.slots[TIMESTAMP], self.note.slots[OFFSET] = timestamp, offset
        self.note.close()

    def end(self) -> None:
        """End at any other moment, cleanly or not."""
        self.note.close()


def test_a_record_that_ends_two_processes_is_condemned(folder: Path) -> None:
    """Once can be chance."""
    seen = []
    for _ in range(2):
        process = Process(folder)
        seen.append(process.condemned)
        process.die_of(5)
    process = Process(folder)
    seen.append(process.condemned)
    process.end()

    assert seen == [set(), set(), {(5, 7)}]


def test_it_stays_condemned(folder: Path) -> None:
    """A process that passed it by may end before that is committed."""
    for _ in range(2):
        Process(folder).die_of(5)
    for _ in range(3):
        process = Process(folder)
        process.decode(6)
        assert process.condemned == {(5, 7)}
        process.end()


def test_processes_that_end_elsewhere_condemn_nothing(folder: Path) -> None:
    """A kill, a power switch, a deployment: nothing was being decoded."""
    for _ in range(5):
        process = Process(folder)
        process.decode(5)
        process.end()

    process = Process(folder)

    assert process.condemned == set()
    process.end()


def test_deaths_need_not_follow_one_another(folder: Path) -> None:
    """Another record killed in between, as it will where there are several."""
    for offset in (5, 9, 5, 9):
        Process(folder).die_of(offset)

    process = Process(folder)

    assert process.condemned == {(5, 7), (9, 7)}
    process.end()


def test_the_same_offset_at_another_time_is_another_record(folder: Path) -> None:
    """A topic that was deleted and created anew counts from 0 again."""
    Process(folder).die_of(5, timestamp=1)
    Process(folder).die_of(5, timestamp=2)

    process = Process(folder)

    assert process.condemned == set()
    process.end()


@pytest.mark.parametrize(
    "other", [{"cluster": "d"}, {"group": "h"}, {"where": ("in", 4)}, {"where": ("out", 3)}], ids=str
)
def test_each_partition_of_each_group_has_its_own(folder: Path, other: dict[str, str]) -> None:
    """All of them may share a folder."""
    for _ in range(2):
        Process(folder).die_of(5)

    process = Process(folder, **other)  # type: ignore[arg-type]

    assert process.condemned == set()
    process.end()


def test_the_newest_are_remembered(folder: Path) -> None:
    """The file does not grow; one that keeps killing is always new."""
    Process(folder).die_of(5)
    for offset in range(1000, 1000 + ENTRIES_MAX - 1):
        Process(folder).die_of(offset)
    Process(folder).die_of(5)
    for offset in range(1000, 1000 + ENTRIES_MAX - 1):
        Process(folder).die_of(offset)
    process = Process(folder)
    assert process.condemned == {(5, 7), *((offset, 7) for offset in range(1000, 1000 + ENTRIES_MAX - 1))}
    process.die_of(9_999)

    process = Process(folder)

    assert (5, 7) not in process.condemned, "the oldest had to go"
    assert len(process.condemned) == ENTRIES_MAX - 1
    process.end()
    assert [file.stat().st_size for file in folder.iterdir()] == [mmap.PAGESIZE]


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"x" * mmap.PAGESIZE, bytes(mmap.PAGESIZE)], ids=len)
def test_a_damaged_note_is_an_empty_one(folder: Path, content: bytes) -> None:
    """Cut off, or of another program: nothing is known, and the next death is noted."""
    for _ in range(2):
        Process(folder).die_of(5)
    (file,) = folder.iterdir()
    file.write_bytes(content)
    process = Process(folder)
    assert process.condemned == set()
    process.die_of(6)
    Process(folder).die_of(6)

    process = Process(folder)

    assert process.condemned == {(6, 7)}
    process.end()


def test_files_are_their_owners_alone(folder: Path) -> None:
    """Below the system's temporary folder others look on."""
    Process(folder).end()

    modes = [path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())]

    assert modes == [0o700, 0o600]


@pytest.mark.parametrize("kind", ["file", "link", "open to all", "another's"])
def test_a_folder_that_is_not_ours_alone_is_not_used_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """There are no notes then; the service runs as well."""
    folder = tmp_path / "decoding"
    if kind == "file":
        folder.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "another's":
        folder.mkdir(mode=0o700)
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    suspects = Suspects(folder, cluster_id="c", group_id="g")

    assert suspects.open_notes([HERE]) == {}
    assert suspects.open_notes([HERE]) == {}

    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_each_death_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which record, and how often; not again at every start."""
    for _ in range(2):
        Process(folder).die_of(5)
    for _ in range(3):
        Process(folder).end()

    texts = [str(record.msg).rpartition("decoded ")[2] for record in caplog.records]
    assert texts == ["partition=in/3 offset=5 times=1", "partition=in/3 offset=5 times=2"]


def test_a_death_is_seen_by_another_process_at_once(folder: Path) -> None:
    """What is in a shared mapping outlives the process that put it there, unflushed."""
    for _ in range(2):
        child = os.fork()
        if child == 0:
            Process(folder).note.slots[OFFSET] = 5
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0)[1] != 0

    process = Process(folder)

    assert process.condemned == {(5, 0)}
    process.end()
