"""Backends in the weather: every call may wait, fail before or after its effect, or arrive when nobody expects it.

What is *late* has its caller told that it failed while its request is still on its way; it takes effect whenever
somebody lets it, in the order of nobody. Only writes of a row can be late: all else is idempotent and harmless.

*Gusts* blow below a backend that repeats its requests by itself: now and then one of them gets no answer, having had
its effect or not. None is hit so often that it fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from google.api_core.exceptions import DeadlineExceeded

from consumer.storage.backend import InlineObject, Tombstone
from failures import Away
from strict_gcs import Fault, Kind, StrictGcs

LATE = {"put_non_tombstone", "delete_non_tombstone", "compare_and_write"}

GUST = 0.1
"""How likely a request to Bigtable gets no answer, the first time it is sent."""

GUST_SECONDS = (0.0, 0.0, 0.005, 0.02)
"""After how long it turns out: others may have done much meanwhile."""

REQUESTS_BETWEEN_GUSTS = 20
"""Requests of a kind to a bucket that go well after one that did not: more than are made at a time."""


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


def in_gusts(part: Any, random: Random) -> Any:
    """Return a backend or change log in a Bigtable, its connection in gusts."""
    connect = part._table._connect

    async def connect_in_gusts() -> GustyConnection:
        part._table._connection = GustyConnection(await connect(), random)
        return part._table._connection  # type: ignore[no-any-return]  # what has just been set

    part._table._connect = connect_in_gusts
    return part


class GustyConnection:
    """What a Bigtable's requests go through."""

    def __init__(self, connection: Any, random: Random) -> None:
        self._connection = connection
        self._random = random
        self._hit: set[int] = set()
        """What has gone without an answer and is sent again, by identity."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._connection, name)
        if name not in {"check_and_mutate_row", "mutate_row", "read_row", "read_rows"}:
            return method

        async def request(*given: Any, **named: Any) -> Any:
            again = id(given[0]) in self._hit
            self._hit.discard(id(given[0]))
            if again or self._random.random() >= GUST:
                return await method(*given, **named)
            self._hit.add(id(given[0]))
            if self._random.random() < 0.5:
                await method(*given, **named)
            await asyncio.sleep(self._random.choice(GUST_SECONDS))
            raise DeadlineExceeded("a gust")

        return request


class GustyGcs(StrictGcs):
    """A bucket's server in gusts."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random
        self._calm: dict[Kind, int] = {}

    def fault_for(self, kind: Kind, params: dict[str, str]) -> Fault:
        """Let one request of a kind go wrong after so many that did not."""
        planned = super().fault_for(kind, params)
        with self._lock:
            self._calm[kind] = self._calm.get(kind, 0) + 1
            if self._calm[kind] <= REQUESTS_BETWEEN_GUSTS:
                return planned
            self._calm[kind] = 0
            return self._random.choice(
                (Fault(before=True), Fault(after_effect=True), Fault(status=503), Fault(status=429))
            )
