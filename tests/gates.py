"""Doubles with gates for the executor and the service: storage and input that go on exactly when a test says so."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from consumer.executor import Item
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import Delete, Get, Head, Insert, Metadata, StoredObject
from consumer.storage.backend import Payload

CONTEXT = ObjectContext("testing")

LOOP_TURNS = 50
"""Times the event loop turns before everything that can happen without a gate being opened has happened."""


async def settled() -> None:
    """Let the event loop turn until everything waits for a gate."""
    for _ in range(LOOP_TURNS):
        await asyncio.sleep(0)


def insert(key: str | None, payload: bytes = b"payload") -> Insert:
    """Make an insert in the tests' context."""
    return Insert(CONTEXT, key, Metadata(), payload)


def get(key: str) -> Get:
    """Make a get in the tests' context."""
    return Get(CONTEXT, key)


def delete(key: str) -> Delete:
    """Make a delete in the tests' context."""
    return Delete(CONTEXT, key)


def head(key: str) -> Head:
    """Make a head in the tests' context."""
    return Head(CONTEXT, key)


class GatedStorage:
    """Objects in memory; a call on a held key waits at its gate, one on a failing key raises.

    Args:
        held: Keys whose calls wait from the start.
        hold_all: Calls on all keys wait, until the key is let go.
    """

    def __init__(self, *held: str, hold_all: bool = False) -> None:
        self.objects: dict[str, StoredObject] = {}
        self.calls: list[tuple[str, str]] = []
        """Every call, in order of its start: method and key."""
        self.ended: list[tuple[str, str]] = []
        """Every call, in order of its end, however it ended."""
        self.running: list[tuple[str, str]] = []
        """Calls that have started and not ended."""
        self.running_max = 0
        self.failures: dict[str, Callable[[], BaseException]] = {}
        """Key to what a call on it raises, once through the gate."""
        self.joined = 0
        self._gates = {key: asyncio.Event() for key in held}
        self._hold_all = hold_all

    def hold(self, *keys: str) -> None:
        """Have calls on *keys* wait."""
        for key in keys:
            self._gates[key] = asyncio.Event()

    def let_go(self, *keys: str) -> None:
        """Let the calls on *keys* go on, those that wait and all later ones."""
        for key in keys:
            self._gates.setdefault(key, asyncio.Event()).set()

    def let_all_go(self) -> None:
        """Let all calls go on."""
        self._hold_all = False
        self.let_go(*self._gates)

    async def put(self, object_id: ObjectId, metadata: Metadata, payload: Payload) -> Metadata:
        await self._call("put", object_id)
        if not isinstance(payload, bytes):
            payload = b"".join([chunk async for chunk in payload])
        self.objects[object_id.storage_path] = StoredObject(metadata, payload)
        return metadata

    async def get(self, object_id: ObjectId) -> StoredObject | None:
        await self._call("get", object_id)
        return self.objects.get(object_id.storage_path)

    async def head(self, object_id: ObjectId) -> Metadata | None:
        await self._call("head", object_id)
        stored = self.objects.get(object_id.storage_path)
        return None if stored is None else stored.metadata

    async def delete(self, object_id: ObjectId) -> None:
        await self._call("delete", object_id)
        self.objects.pop(object_id.storage_path, None)

    async def join(self) -> None:
        self.joined += 1

    async def _call(self, method: str, object_id: ObjectId) -> None:
        call = (method, object_id.key)
        self.calls.append(call)
        self.running.append(call)
        self.running_max = max(self.running_max, len(self.running))
        try:
            if self._hold_all:
                self._gates.setdefault(object_id.key, asyncio.Event())
            gate = self._gates.get(object_id.key)
            if gate is not None and not gate.is_set():
                await gate.wait()
            if object_id.key in self.failures:
                error = self.failures[object_id.key]()
                raise error
        finally:
            self.running.remove(call)
            self.ended.append(call)


class Source:
    """An input that counts what is pulled from it, and waits where nothing is left until it is fed or ended."""

    def __init__(self, things: Iterable[object] = (), *, ended: bool = True) -> None:
        self.pulled = 0
        """Items handed out."""
        self.waiting = 0
        """Pulls that wait for an item now."""
        self._items: deque[tuple[int, object]] = deque(enumerate(things))
        self._ended = ended
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    def feed(self, *items: tuple[int, object]) -> None:
        """Add items."""
        self._items.extend(items)
        self._changed.set()

    def end(self, error: BaseException | None = None) -> None:
        """End the input, or have it raise *error*, after what has been fed."""
        self._ended = True
        self._error = error
        self._changed.set()

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        while not self._items and not self._ended:
            self._changed.clear()
            self.waiting += 1
            try:
                await self._changed.wait()
            finally:
                self.waiting -= 1
        if self._items:
            self.pulled += 1
            return self._items.popleft()  # type: ignore[return-value]  # some tests put in what does not belong there
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration
