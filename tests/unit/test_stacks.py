"""Task stacks: the whole chain of awaits of every task, down to what is waited for, and no contents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Generator
from types import coroutine
from typing import Any

from consumer.stacks import FRAMES_MAX, task_stacks


async def _waits(gate: asyncio.Event, _secret: str = "contents") -> None:
    await gate.wait()


async def _items(gate: asyncio.Event) -> AsyncIterator[int]:
    await _waits(gate)
    yield 1


async def _reads(gate: asyncio.Event) -> None:
    async for _ in _items(gate):
        pass


@coroutine
def _old_style(gate: asyncio.Event) -> Generator[Any, None, None]:
    yield from _waits(gate).__await__()


async def _awaits_old_style(gate: asyncio.Event) -> None:
    await _old_style(gate)  # a task of its own it cannot be since Python 3.12


async def _deep(gate: asyncio.Event, depth: int) -> None:
    await (_deep(gate, depth - 1) if depth else gate.wait())


async def _stacks_of(*work: tuple[str, Coroutine[Any, Any, None]]) -> dict[str, list[str]]:
    """Start named coroutines, let them run into their waits, and return their stacks without line numbers."""
    tasks = [asyncio.create_task(coro, name=name) for name, coro in work]
    await asyncio.sleep(0)
    found = {entry["task"]: entry["waits_in"] for entry in task_stacks()}
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return found


def _functions(chain: list[str]) -> list[str]:
    return [frame.rpartition(" ")[2] for frame in chain]


async def test_a_waiting_task_shows_its_whole_chain() -> None:
    """From its own coroutine to the future, with file and line."""
    gate = asyncio.Event()

    chain = (await _stacks_of(("one", _waits(gate))))["one"]

    assert _functions(chain) == ["_waits", "Event.wait", "FutureIter"]
    assert chain[0].startswith("test_stacks.py:")
    assert "contents" not in str(chain)


async def test_a_chain_goes_through_generators() -> None:
    """An operation's records come out of one: what it waits for is inside."""
    gate = asyncio.Event()

    found = await _stacks_of(("reader", _reads(gate)), ("old", _awaits_old_style(gate)))

    assert _functions(found["reader"]) == ["_reads", "_items", "_waits", "Event.wait", "FutureIter"]
    assert _functions(found["old"])[:3] == ["_awaits_old_style", "_old_style", "_waits"]


async def test_a_recursion_is_cut() -> None:
    """A line of the log stays a line."""
    gate = asyncio.Event()

    assert len((await _stacks_of(("deep", _deep(gate, 3 * FRAMES_MAX))))["deep"]) == FRAMES_MAX


async def test_the_running_task_is_among_them_and_ended_ones_are_not() -> None:
    """Whoever asks is seen where it asks."""
    ended = asyncio.create_task(asyncio.sleep(0), name="ended")
    await ended

    found = {entry["task"]: entry["waits_in"] for entry in task_stacks()}

    assert "ended" not in found
    assert any("test_the_running_task" in chain[-1] for chain in found.values() if chain)
