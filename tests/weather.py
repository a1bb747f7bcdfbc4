"""Backends in the weather: every call may wait, fail before or after its effect, or arrive when nobody expects it.

What is *late* has its caller told that it failed while its request is still on its way; it takes effect whenever
somebody lets it, in the order of nobody. Only writes of a row can be late: all else is idempotent and harmless.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from consumer.storage.backend import InlineObject, Tombstone
from failures import Away

LATE = {"put_non_tombstone", "delete_non_tombstone", "compare_and_write"}


@dataclass(frozen=True)
class Late:
    """A request still on its way: what it writes, and where."""

    object_key: str
    write: object
    """An inline payload, a tombstone, or None."""
    arrive: Callable[[], Awaitable[Any]]


class Weather:
    """What befalls the calls to all backends."""

    def __init__(self, random: Random | None = None, failing: float = 0.0) -> None:
        self.random = random
        self.failing = failing
        self.late: list[Late] = []
        self.happened: set[str] = set()

    async def before(self) -> None:
        """Let others run, or not, before a call takes effect."""
        if self.random is not None:
            for _ in range(self.random.choice((0, 0, 1, 2, 10))):
                await asyncio.sleep(0)

    async def after(self) -> None:
        """And before its answer arrives."""
        await self.before()

    def fault(self, name: str) -> str:
        """Draw what befalls a call of the method *name*; most of the time nothing."""
        if self.random is None or self.random.random() >= self.failing:
            return "none"
        kind = self.random.choice(("before", "after", "late") if name in LATE else ("before", "after"))
        self.happened.add(kind)
        return kind


class Unreliable:
    """A backend in the weather."""

    def __init__(self, backend: object, weather: Weather) -> None:
        self._backend = backend
        self._weather = weather

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        if name in {"join", "close", "owner"}:
            return method

        async def call(*given: Any) -> Any:
            weather = self._weather
            await weather.before()
            fault = weather.fault(name)
            if fault == "late":
                weather.late.append(Late(given[0].key, written_by(name, given), lambda: method(*given)))
            if fault in {"before", "late"}:
                raise Away("away")
            answer = await method(*given)
            await weather.after()
            if fault == "after":
                raise Away("answer lost")
            return answer

        setattr(self, name, call)
        return call


def written_by(name: str, given: tuple[Any, ...]) -> object:
    """Return what a write of a row writes: an inline payload, a tombstone, or None."""
    if name == "put_non_tombstone":
        return given[2]
    if name == "compare_and_write" and isinstance(given[2], InlineObject | Tombstone):
        return given[2].payload if isinstance(given[2], InlineObject) else given[2]
    return None
