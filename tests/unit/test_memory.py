"""What the memory backend promises beyond its contracts: no suspension, and memory that comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from consumer.ids import ObjectContext, ObjectId
from consumer.operations import Metadata
from consumer.storage.backend import InlineObject, Removal, Revision, Tombstone
from consumer.storage.memory import SWEEP_WRITES_MIN, MemoryBackend, MemoryChangeLog
from consumer.storage.revision import new_revision

START = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """Time that is set by hand."""

    now = START

    def __call__(self) -> datetime:
        return self.now


def an_id(key: object = "k") -> ObjectId:
    """Return the id of *key*."""
    return ObjectId(ObjectContext("u"), str(key))


def run_through(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that may not suspend, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    raise AssertionError("it suspended")


async def test_every_request_takes_the_latency_it_was_given() -> None:
    """For measurements: what a tier elsewhere would take."""
    backend = MemoryBackend(latency=0.005)
    revision = new_revision(an_id())
    loop = asyncio.get_running_loop()
    requests: list[Callable[[], Awaitable[object]]] = [
        lambda: backend.put_non_tombstone(an_id(), Metadata(), b"x"),
        lambda: backend.get_tiered(an_id()),
        lambda: backend.head_tiered(an_id()),
        lambda: backend.compare_and_write(an_id(), None, Tombstone(revision, Metadata(size=1))),
        lambda: backend.delete_non_tombstone(an_id()),
        lambda: backend.put(revision, Metadata(), b"x"),
        lambda: backend.get(revision),
        lambda: backend.head(revision),
        lambda: backend.delete(revision),
    ]

    for request in requests:
        began = loop.time()
        await request()
        assert loop.time() - began >= 0.005


async def test_requests_at_once_share_a_timer_and_none_is_early_or_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer for each would be what is measured; one that is cancelled keeps no other one waiting."""
    backend = MemoryBackend(latency=0.05)
    loop = asyncio.get_running_loop()
    timers: list[object] = []
    call_at = loop.call_at

    def counted(when: float, callback: Any, *args: Any, **more: Any) -> asyncio.TimerHandle:
        timers.append(callback)
        return call_at(when, callback, *args, **more)

    monkeypatch.setattr(loop, "call_at", counted)
    took: list[float] = []

    async def timed() -> None:
        began = loop.time()
        await backend.get_tiered(an_id())
        took.append(loop.time() - began)

    first = [asyncio.create_task(timed()) for _ in range(100)]
    await asyncio.sleep(0)
    first[0].cancel()
    await asyncio.sleep(0.001)
    second = [asyncio.create_task(timed()) for _ in range(100)]
    await asyncio.gather(*first, *second, return_exceptions=True)

    assert len(took) == 199
    assert min(took) >= 0.05
    assert len(timers) < 20


def test_no_method_suspends() -> None:
    """Each is one atomic step on the loop, and costs no turn of it."""
    backend = MemoryBackend()
    tombstone = Tombstone(new_revision(an_id()), Metadata(size=1))

    assert run_through(backend.put_non_tombstone(an_id(), Metadata(), b"x")) is None
    assert run_through(backend.get_tiered(an_id())).payload == b"x"
    assert run_through(backend.head_tiered(an_id())) == Metadata(size=1)
    assert run_through(backend.compare_and_write(an_id(), None, tombstone))
    assert run_through(backend.forbid(an_id(), tombstone.target)) is False
    assert run_through(backend.compare_and_write(an_id(), tombstone.target, Removal()))
    assert run_through(backend.delete_non_tombstone(an_id())) is None
    assert run_through(backend.put(tombstone.target, Metadata(), b"xy")) == 2
    assert run_through(backend.get(tombstone.target)).payload == b"xy"
    assert run_through(backend.extend(tombstone.target, Metadata(filename="f"))) is None
    assert run_through(backend.head(tombstone.target)) == Metadata(filename="f")
    run_through(backend.delete(tombstone.target))
    run_through(backend.join())
    run_through(backend.close())


async def test_one_instance_may_serve_as_both_tiers() -> None:
    """Contract 10: a row and a revision of the same name are two things."""
    backend = MemoryBackend()
    same_name = Revision(an_id().storage_path)
    await backend.put_non_tombstone(an_id(), Metadata(), b"row")
    await backend.put(same_name, Metadata(), b"revision")

    await backend.delete(same_name)

    assert await backend.get_tiered(an_id()) is not None


async def test_bytes_are_not_copied() -> None:
    """They are immutable; a copy per put would be the largest part of its cost."""
    backend = MemoryBackend()
    payload = bytes(1000)
    await backend.put_non_tombstone(an_id(1), Metadata(), payload)
    await backend.compare_and_write(an_id(2), None, InlineObject(Metadata(), payload))
    await backend.put(Revision("r"), Metadata(), payload)

    rows = [await backend.get_tiered(an_id(1)), await backend.get_tiered(an_id(2)), await backend.get(Revision("r"))]
    assert all(getattr(row, "payload", None) is payload for row in rows)


async def test_memory_of_expired_entries_comes_back_unasked() -> None:
    """Nobody reads them again; writing goes on."""
    clock = Clock()
    backend = MemoryBackend(clock=clock)
    for number in range(SWEEP_WRITES_MIN // 2):
        short = Metadata(time_expires=clock.now + timedelta(seconds=1))
        await backend.put_non_tombstone(an_id(number), short, b"x")
        await backend.put(Revision(f"r{number}"), short, b"x")
    clock.now += timedelta(seconds=1)
    for _ in range(2 * SWEEP_WRITES_MIN):
        await backend.put_non_tombstone(an_id("new"), Metadata(time_expires=clock.now + timedelta(hours=1)), b"x")

    assert list(backend._rows) == [an_id("new").storage_path]
    assert not backend._revisions


async def test_fences_are_taken_down_after_a_day() -> None:
    """They are kept as long as a late swap is conceivable, and no longer."""
    clock = Clock()
    backend = MemoryBackend(clock=clock)
    for number in range(100):
        await backend.forbid(an_id(), Revision(f"r{number}"))
    await backend.forbid(an_id(), Revision("r0"))
    clock.now += timedelta(days=1)
    await backend.forbid(an_id(), Revision("another"))

    assert list(backend._forbidden) == ["another"]


async def test_the_change_log_has_nothing_to_recover() -> None:
    """LOG-15: what a process kept to itself went with it."""
    log = MemoryChangeLog(owner="me")

    assert (log.owner, list(await log.recoverable())) == ("me", [])
