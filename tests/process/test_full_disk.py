"""A full disk: refused and to be tried again, never half of anything, and all is well when there is space again.

A real one: a small filesystem in memory, filled to its last block (where root may mount it), and, everywhere, a limit
on how long files may grow, which fails the same calls. The process itself asserts that every object stays readable and
whole (`filling.py`); here stands what must have happened, and what is left in the folder.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from consumer.storage.filesystem import revision_path

PROGRAM = Path(__file__).with_name("filling.py")
ROOT = PROGRAM.parents[2]

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a filesystem of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tierstream-test", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no filesystem may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, how: str) -> dict[str, int]:
    """Run the program and return what happened to it."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    happened: dict[str, int] = json.loads(done.stdout)
    return happened


def assert_it_was_full_and_nothing_is_left(folder: Path, happened: dict[str, int]) -> None:
    """Assert that each act took place, and that the folder holds what rows point to."""
    assert happened["rows: large refused"] == 2
    assert (happened["rows: small done"], happened["rows: delete done"]) == (2, 1), "other operations go on"
    assert happened["nothing: small refused"] > 0
    assert happened["nothing: large refused"] > 0
    assert (happened["after: large done"], happened["after: small done"], happened["after: delete done"]) == (12, 6, 1)
    assert not any(what.startswith(("before", "after")) and what.endswith("refused") for what in happened)

    with closing(sqlite3.connect(folder / "objects.sqlite")) as file:
        targets = [target for (target,) in file.execute("SELECT target FROM objects WHERE target IS NOT NULL")]
        assert file.execute("SELECT count(*) FROM change_log_entries").fetchone() == (0,)
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    expected = {f"{'/'.join(revision_path(name))}.{suffix}" for name in targets for suffix in ("payload", "json")}
    found = {path.relative_to(folder / "objects").as_posix() for path in (folder / "objects").rglob("*")}
    assert {name for name in found if name.endswith((".payload", ".json"))} == expected
    assert not any(name.startswith("incoming/") for name in found)
    assert len(targets) == 5


def test_files_that_may_not_grow_refuse_and_lose_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: EFBIG, as of a quota."""
    assert_it_was_full_and_nothing_is_left(tmp_path, fill(tmp_path, "limit"))


def test_a_filesystem_without_space_refuses_and_loses_nothing(small_disk: Path) -> None:
    """ENOSPC, from the kernel."""
    assert_it_was_full_and_nothing_is_left(small_disk, fill(small_disk, "space"))
