"""The suite in several processes proves what it proves in one: each test runs once, and nothing that failed is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "side_by_side.py"
SECONDS = 50

MODULE = """
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def whole():
    with Path("ran").open("a") as ran:
        ran.write("begin {module}\\n")
        yield
        ran.write("end {module}\\n")


@pytest.mark.parametrize("number", range(5))
def test_it(number):
    with Path("ran").open("a") as ran:
        ran.write(f"{module}::test_it[{{number}}]\\n")
    {code}
"""

MEETING = f"""
    import os, time
    Path(f"here-{{os.getpid()}}").touch()
    deadline = time.monotonic() + {SECONDS / 2}
    while len(list(Path().glob("here-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
"""
"""Code of a test that ends when a test of another process has begun."""

pytestmark = [pytest.mark.process, pytest.mark.slow]


def suite(folder: Path, **modules: str) -> None:
    """Write modules of five tests each, of which each does *code*."""
    settings = "[pytest]\naddopts = -p no:cloudcoil\nasyncio_default_fixture_loop_scope = function\n"
    (folder / "pytest.ini").write_text(settings, encoding="utf-8")
    for ring in ("unit", "e2e"):
        (folder / ring).mkdir()
    for name, code in modules.items():
        module = f"{'e2e' if name.startswith('e') else 'unit'}/test_{name}.py"
        (folder / module).write_text(MODULE.format(module=module, code=code), encoding="utf-8")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it in two lanes."""
    command = [sys.executable, str(PROGRAM), "2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)


def ran(folder: Path) -> Counter[str]:
    """What ran, and how often."""
    return Counter((folder / "ran").read_text(encoding="utf-8").splitlines())


def last_failed(folder: Path) -> set[str] | None:
    """What pytest would take for `--last-failed`."""
    found = folder / ".pytest_cache" / "v" / "cache" / "lastfailed"
    return set(json.loads(found.read_text(encoding="utf-8"))) if found.exists() else None


def test_each_test_runs_once_and_its_module_is_not_divided(tmp_path: Path) -> None:
    """In whichever lane; and what waits longest is taken first."""
    modules = [f"e{number}" for number in range(3)] + [f"u{number}" for number in range(9)]
    suite(tmp_path, **dict.fromkeys(modules, "pass"))

    done = run(tmp_path)

    assert done.returncode == 0, done.stdout
    assert "==> 12 of 12 modules run, lanes ended with [0, 0], 0 tests failed" in done.stdout
    assert len(ran(tmp_path)) == 12 * (5 + 2)
    assert set(ran(tmp_path).values()) == {1}
    assert last_failed(tmp_path) == set()
    begun = [line for line in (tmp_path / "ran").read_text(encoding="utf-8").splitlines() if "begin" in line]
    assert all("e2e/" in line for line in begun[:2])


def test_lanes_run_at_the_same_time(tmp_path: Path) -> None:
    """Two modules that wait for each other would wait for ever one after the other."""
    suite(tmp_path, e1=MEETING, e2=MEETING)

    done = run(tmp_path)

    assert done.returncode == 0, done.stdout


def test_what_failed_is_what_a_single_process_would_have_kept(tmp_path: Path) -> None:
    """Of both lanes; a second look then takes these alone."""
    suite(tmp_path, e1="assert number != 1", e2="pass", u1="assert number != 2", u2="pass")

    done = run(tmp_path)
    again = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--last-failed", "--last-failed-no-failures=none"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )

    assert done.returncode == 1
    assert "2 tests failed" in done.stdout
    assert last_failed(tmp_path) == {"e2e/test_e1.py::test_it[1]", "unit/test_u1.py::test_it[2]"}
    assert "2 failed" in again.stdout


KINDS_OF_FAILURE = """
import pytest
from second_try import void_unless


@pytest.fixture
def not_there():
    raise OSError("no broker")


@pytest.fixture
def left_behind():
    yield
    raise AssertionError("something was left behind")


def test_void():
    void_unless(False, "nothing was killed")


def test_void_and_worse(left_behind):
    void_unless(False, "nothing was killed")


def test_set_up(not_there):
    pass


def test_skipped():
    pytest.skip("nothing to see")


def test_wrong():
    assert False
"""


@pytest.mark.parametrize("lanes", [False, True])
def test_what_was_void_and_nothing_else_is_noted(tmp_path: Path, *, lanes: bool) -> None:
    """For `.ci/run`, which tries no judge of a run again unless that run was void; an earlier run's notes are gone."""
    suite(tmp_path, e1="pass")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["second_try"]', encoding="utf-8")
    (tmp_path / "unit" / "test_kinds.py").write_text(KINDS_OF_FAILURE, encoding="utf-8")
    noted = tmp_path / ".pytest_cache" / "v" / "tierstream" / "void"
    noted.parent.mkdir(parents=True)
    noted.write_text('["unit/test_before.py::test_it"]', encoding="utf-8")

    if lanes:
        run(tmp_path)
    else:
        command = [sys.executable, "-m", "pytest"]
        environment = os.environ | {"PYTHONPATH": str(PROGRAM.parent)}
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=SECONDS, check=False)

    kinds = {f"unit/test_kinds.py::test_{name}" for name in ("void", "void_and_worse", "set_up", "wrong")}
    assert last_failed(tmp_path) == kinds
    assert sorted(json.loads(noted.read_text(encoding="utf-8"))) == [
        "unit/test_kinds.py::test_set_up",
        "unit/test_kinds.py::test_void",
    ]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "==> not run to its end: unit/test_u1.py"),
        ("import os; os._exit(0)", "==> not run to its end: unit/test_u1.py"),
        ("import pytest; pytest.exit('no more', 0)", "==> not run to its end: unit/test_u1.py"),
    ],
    ids=["killed", "ended", "left"],
)
def test_a_lane_that_does_not_come_to_its_end_fails_the_run_for_good(tmp_path: Path, code: str, said: str) -> None:
    """Though no test of its failed: there is nothing for a second look, which would find nothing and be content."""
    suite(tmp_path, e1="assert number != 1", u1=code)

    done = run(tmp_path)

    assert done.returncode == 1
    assert said in done.stdout
    assert last_failed(tmp_path) is None


def test_a_module_that_cannot_be_imported_fails_the_run_for_good(tmp_path: Path) -> None:
    """Nothing is run then, as in a single process."""
    suite(tmp_path, u1="pass")
    (tmp_path / "unit" / "test_broken.py").write_text("import nothing_of_this_name", encoding="utf-8")

    done = run(tmp_path)

    assert done.returncode == 1
    assert last_failed(tmp_path) is None
    assert not (tmp_path / "ran").exists()


def test_arguments_choose_as_they_do_for_pytest(tmp_path: Path) -> None:
    """Folders, modules, and whatever else it understands."""
    suite(tmp_path, e1="pass", u1="pass", u2="assert False")

    done = run(tmp_path, "e2e", "unit/test_u1.py")

    assert done.returncode == 0, done.stdout
    assert "==> 2 of 2 modules run" in done.stdout


@pytest.mark.parametrize("lanes", [[], ["0"], ["two"]])
def test_how_many_lanes_has_to_be_said(tmp_path: Path, lanes: list[str]) -> None:
    """In words, not by a trace."""
    command = [sys.executable, str(PROGRAM), *lanes]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith("usage: ")
