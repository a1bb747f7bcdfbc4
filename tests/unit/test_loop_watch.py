"""A loop that does not come round is found by counting looks, and nothing else is."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from consumer import loop_watch
from consumer.loop_watch import LoopWatch
from lanes import until

LOOK_SECONDS = 0.005


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look two hundred times as often."""
    monkeypatch.setattr(loop_watch, "LOOK_SECONDS", LOOK_SECONDS)
    monkeypatch.setattr(loop_watch, "BLOCKED_LOOKS", 40)


@pytest.fixture
def ended() -> threading.Event:
    """Set by what would end the process."""
    return threading.Event()


@pytest.fixture
def watch(ended: threading.Event) -> Iterator[LoopWatch]:
    """A watch that has not begun."""
    watch = LoopWatch(ended.set)
    yield watch
    watch.stop()


async def another_beat(watch: LoopWatch) -> None:
    """Wait until the loop has come round once more."""
    seen = watch._beats
    await until(lambda: watch._beats > seen)


async def test_a_loop_that_is_blocked_ends_the_process(watch: LoopWatch, ended: threading.Event) -> None:
    """It is not asked: it has to be noticed from another thread."""
    watch.start()

    assert ended.wait(30)  # on the loop: nothing beats meanwhile


async def test_a_loop_that_comes_round_now_and_then_does_not(watch: LoopWatch, ended: threading.Event) -> None:
    """Long computations block for a while, and are no reason to end."""
    watch.start()

    for _ in range(5):
        time.sleep(LOOK_SECONDS * 4)  # noqa: ASYNC251 - blocks, for a tenth of what is too long
        await another_beat(watch)

    assert not ended.is_set()


async def test_nothing_is_watched_after_the_stop(watch: LoopWatch, ended: threading.Event) -> None:
    """A stop has its own deadlines."""
    watch.start()
    watch.stop()

    assert not ended.wait(LOOK_SECONDS * 80)
    await until(lambda: "loop watch" not in {thread.name for thread in threading.enumerate()})
    beats = watch._beats
    await asyncio.sleep(LOOK_SECONDS * 4)
    assert watch._beats == beats
