"""Folders of storage on local disks."""

from __future__ import annotations

from pathlib import Path

import pytest

from consumer.storage.host import make_folder


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which folders are flushed, in order."""
    seen: list[Path] = []
    monkeypatch.setattr("os.fsync", lambda fd: seen.append(Path(f"/proc/self/fd/{fd}").readlink()))
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks the kernel what a descriptor means")
def test_the_names_of_new_folders_are_durable_up_to_one_that_was_there(tmp_path: Path, flushed: list[Path]) -> None:
    """A power cut after the first start does not take the storage, folder and all."""
    make_folder(tmp_path / "a" / "b" / "c")

    assert flushed == [tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    assert (tmp_path / "a" / "b" / "c").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_there_costs_nothing(tmp_path: Path, flushed: list[Path]) -> None:
    """Nor does it need the right to read what is above it."""
    make_folder(tmp_path)

    assert flushed == []


def test_a_relative_folder_is_made_below_the_current_one(
    tmp_path: Path, flushed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the default configuration has it."""
    monkeypatch.chdir(tmp_path)
    make_folder(Path("data"))

    assert (tmp_path / "data").is_dir()
    assert len(flushed) == 1


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    """Whether it is the folder itself, or above it."""
    (tmp_path / "file").touch()

    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        make_folder(tmp_path / "file" / "below")
