"""The suite in several pytest processes at once, each taking the next module that nobody has (``make test LANES=2``).

Most end-to-end tests wait more than they compute: for sessions that run out, for brokers and services that start. Where
one waits, another may compute.

1. Each process, a *lane*, collects everything and takes modules one by one: the rings that wait most come first, the
   quick ones fill in at the end. Taking a module is making a file in a common folder, which succeeds once.
2. A module is never divided, so its tests have the fixtures and the order they have in a single process. What is
   started once a session (brokers, emulators) is started once in each lane.
3. What lanes print is shown line by line, behind their number.
4. Every module that a lane has seen has to have been run to its end by one of them. Where one has not (a lane was
   killed), the run has failed, and no second look at single tests can mend it.
5. What failed stands in pytest's cache as after a single process, for ``--last-failed`` and :mod:`second_try`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import pytest

RINGS = ("e2e", "process", "publisher", "contracts", "properties", "chart", "architecture")
"""Folders, by how long their tests wait; what is in none of them comes last."""

AT_THE_END = frozenset({pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED})
"""How a lane exits that has come to its end."""


# ------------------------------------------------------------------------------------------------- within a lane


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a lane be told where modules are taken."""
    parser.addoption("--taken", type=Path, help="run only modules that nobody else has taken in this folder")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run what this lane can take; what pytest does otherwise, where it is no lane or could not collect."""
    folder: Path | None = session.config.option.taken
    if folder is None or session.testsfailed or session.config.option.collectonly:
        return None
    for item, following in pairwise(chain(_taken(session.items, folder), (None,))):
        assert item is not None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        if following is None or _module(following) != _module(item):
            _mark(folder, "ended", _module(item))
    return True


def _taken(items: list[pytest.Item], folder: Path) -> Iterator[pytest.Item]:
    """Yield the tests of one module after another, of those that could be taken."""
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(_module(item), []).append(item)
    for module in modules:
        _mark(folder, "seen", module)
    for module in sorted(modules, key=_place):
        if _mark(folder, "taken", module):
            yield from modules[module]


def _module(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _place(module: str) -> int:
    return next((place for place, ring in enumerate(RINGS) if f"{ring}/" in module), len(RINGS))


def _mark(folder: Path, what: str, module: str) -> bool:
    """Mark a module as seen, taken or ended; tell whether nobody else had."""
    try:
        (folder / what / module.replace("/", "+")).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


# ------------------------------------------------------------------------------------------------- around the lanes


def main(lanes: int, arguments: list[str]) -> int:
    """Run *lanes* of pytest with *arguments*; return 0 where everything was run and passed."""
    from second_try import CACHE, LAST_FAILED, VOID, noted  # not above: in a lane pytest has to be the first

    for kept in (LAST_FAILED, VOID):
        (CACHE / kept).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as place, ThreadPoolExecutor(lanes) as threads:
        folder = Path(place)
        for what in ("seen", "taken", "ended"):
            (folder / what).mkdir()
        exits = list(threads.map(lambda number: _run_lane(number, folder, arguments), range(1, lanes + 1)))
        seen, ended = ({mark.name for mark in (folder / what).iterdir()} for what in ("seen", "ended"))
        caches = [_cache_of(folder, number) for number in range(1, lanes + 1)]
        failed, void = ([name for cache in caches for name in noted(cache, kept)] for kept in (LAST_FAILED, VOID))
    _say(f"==> {len(ended)} of {len(seen)} modules run, lanes ended with {exits}, {len(failed)} tests failed")
    if seen != ended or not set(exits) <= AT_THE_END:
        for name in sorted(seen - ended):
            _say(f"==> not run to its end: {name.replace('+', '/')}")
        return 1
    for kept, content in ((LAST_FAILED, dict.fromkeys(failed, True)), (VOID, void)):
        (CACHE / kept).parent.mkdir(parents=True, exist_ok=True)
        (CACHE / kept).write_text(json.dumps(content), encoding="utf-8")
    return int(any(exits))


def _run_lane(number: int, folder: Path, arguments: list[str]) -> int:
    """Run one lane to its end, and pass on what it prints."""
    from brokers import dies_with_us  # not above, as before

    own = ["-p", "side_by_side", f"--taken={folder}", "-o", f"cache_dir={_cache_of(folder, number)}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *_python_path()])}
    with subprocess.Popen(
        [*dies_with_us(), sys.executable, "-m", "pytest", *own, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    ) as lane:
        assert lane.stdout is not None
        for line in lane.stdout:
            _say(f"{number}| {line.rstrip()}")
    return lane.returncode


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - the purpose


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _cache_of(folder: Path, number: int) -> Path:
    return folder / f"cache-{number}"


if __name__ == "__main__":
    if len(sys.argv) < 2 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        sys.exit("usage: side_by_side.py LANES [ARGUMENTS OF PYTEST], with LANES 1 or more")
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
