"""Guards that stand around every test, and the fixtures all rings share.

1. No asyncio task outlives its test, and nothing the event loop could only *report* (an exception nobody retrieved, a
   callback that raised) goes unnoticed: both fail the test that caused them.
2. Unit and property tests may not block the event loop from the service's own code (blockbuster, over `consumer`).
3. Warnings are errors (pyproject.toml), ResourceWarning and un-awaited coroutines included.
4. Hypothesis: the same examples every time in CI, random ones at home, where a failure prints how to repeat it.
   The order of tests is random; pytest-randomly prints its seed.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from blockbuster import blockbuster_ctx
from hypothesis import HealthCheck, Verbosity, settings

TESTS = Path(__file__).parent
ROOT = TESTS.parent

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell starts jobs in the background with SIGINT ignored, and what the tests start would inherit that."""

pytest_plugins = ["brokers", "bigtable_emulator", "gcs_servers", "second_try"]
pytest.register_assert_rewrite("ledger", "service_process", "stages", "wire")

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,  # CI machines stall; the per-test timeout bounds what hangs
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],  # judged by wall clock, which a shared machine does not own
)
settings.register_profile("dev", parent=settings.get_profile("ci"), derandomize=False, verbosity=Verbosity.normal)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

LOOP_ROUNDS = 10
"""Times the loop turns before a task still alive counts as leaked: enough for a cancelled task to end, and for the few
callbacks between a finished task and its owner; nothing that really waits is done by then."""


@pytest.fixture(autouse=True)
def guarded_event_loop(request: pytest.FixtureRequest) -> None:
    """Put the guards around every async test; a sync test needs no loop and pays nothing."""
    if pytest_asyncio.is_async_test(request.node):
        request.getfixturevalue("no_leaked_task_no_unseen_error")


@pytest.fixture
async def no_leaked_task_no_unseen_error() -> AsyncIterator[None]:
    """Fail when a task outlives the test, or when the loop had an error to report and nobody to give it to."""
    loop = asyncio.get_running_loop()
    before = asyncio.all_tasks()
    unseen: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: unseen.append(context))
    yield
    for _ in range(LOOP_ROUNDS):
        await asyncio.sleep(0)
    leaked = asyncio.all_tasks() - before - {asyncio.current_task()}
    for left in leaked:
        left.cancel()
    await asyncio.gather(*leaked, return_exceptions=True)
    loop.set_exception_handler(None)
    if leaked:
        pytest.fail("tasks outlived the test: " + ", ".join(map(repr, leaked)), pytrace=False)
    if unseen:
        pytest.fail("the event loop reported: " + "; ".join(map(repr, unseen)), pytrace=False)


@pytest.fixture(autouse=True)
def no_blocking_call(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a unit or property test in which code of `consumer` makes a blocking call on the event loop's thread."""
    ring = request.path.relative_to(TESTS).parts[0]
    if ring not in {"unit", "properties"} or not pytest_asyncio.is_async_test(request.node):
        yield
        return
    with blockbuster_ctx("consumer"):
        yield
