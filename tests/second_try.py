"""Which tests that failed may be run a second time: a plugin of pytest that notes it, and what `.ci/run` asks.

A machine that others use too makes one test in thousands fail now and then, and a second run, alone, decides. For the
tests that are about chance that would be wrong: a loss that one run in ten shows would pass 99 times in a hundred.

1. Modules in :data:`JUDGING` hold the invariants against what a run of faults has done. Where one of their tests fails,
   that is the result, with one exception.
2. A run is *void* where it has not met what it is about: no stop found work left, no kill hit a busy service. It has
   shown nothing, good or bad, and may be run again. The test says so by :func:`void_unless`, after everything that it
   holds against the run; a fixture that could not be set up (no broker, no port) counts as well.
3. Above :data:`FAILED_MAX` failures it is not the machine.

Which failures were void stands beside pytest's own list of what failed, in its cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Generator, Sequence
from pathlib import Path

import pytest

FAILED_MAX = 5
"""Of some thousands of tests."""

JUDGING = frozenset(
    f"tests/e2e/test_{name}.py"
    for name in ("chaos", "delivery", "exactly_once", "key_order", "network", "steps")
)
"""Modules whose tests judge what chance has made of a run."""

CACHE = Path(".pytest_cache")
"""Pytest's own folder, in the one the tests are started in."""

LAST_FAILED = Path("v", "cache", "lastfailed")
"""Where in it pytest keeps what failed."""

VOID = Path("v", "tierstream", "void")
"""Where it keeps which of them were void."""


class Void(Exception):
    """The run has not met what it is about."""


def void_unless(met: bool, what: str) -> None:
    """Say that a run is void, after all that is held against it.

    Raises:
        Void: *what* is not so.
    """
    if not met:
        raise Void(f"void: {what}")


# ------------------------------------------------------------------------------------------------- what is noted

_FAILURES = pytest.StashKey[dict[str, bool]]()
"""Of this session: each test that failed, and whether it was void and nothing else."""


def pytest_configure(config: pytest.Config) -> None:
    """Begin with nothing."""
    config.stash[_FAILURES] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note what failed, and how."""
    report = yield
    if report.failed:
        assert call.excinfo is not None
        failures = item.config.stash[_FAILURES]
        void = call.when == "setup" or call.excinfo.errisinstance(Void)
        failures[item.nodeid] = void and failures.get(item.nodeid, True)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep it where pytest keeps what failed."""
    cache = getattr(session.config, "cache", None)  # not even that with "-p no:cacheprovider"
    if cache is not None:
        void = [name for name, was_void in session.config.stash[_FAILURES].items() if was_void]
        cache.set(Path(*VOID.parts[1:]).as_posix(), void)


# ------------------------------------------------------------------------------------------------- what is decided


def refusals(failed: Sequence[str], void: Collection[str]) -> list[str]:
    """Return why the tests in *failed* may not be tried again; nothing where they may (pure).

    Args:
        failed: Their names, as pytest's.
        void: Those among them that failed for nothing but that.
    """
    if not failed:
        return ["nobody knows what failed"]
    if len(failed) > FAILED_MAX:
        return [f"{len(failed)} failed, which is more than {FAILED_MAX}"]
    return [f"{name} has judged its run" for name in failed if name.partition("::")[0] in JUDGING and name not in void]


def noted(cache: Path, place: Path) -> list[str]:
    """Return the names in a list of the cache; none where there is none."""
    found = cache / place
    return list(json.loads(found.read_text(encoding="utf-8"))) if found.exists() else []


def main() -> int:
    """Say whether what failed may be tried again; 0 where it may."""
    failed = noted(CACHE, LAST_FAILED)
    why_not = refusals(failed, noted(CACHE, VOID))
    for line in [f"no second try: {reason}" for reason in why_not] or [f"{len(failed)} failed: run once more, alone"]:
        print(f"==> {line}", flush=True)  # noqa: T201 - the purpose
    return int(bool(why_not))


if __name__ == "__main__":
    sys.exit(main())
