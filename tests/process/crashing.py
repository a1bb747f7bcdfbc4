"""A process that runs storage operations and dies, or stops, at a named step; a program, started by `test_crashes.py`.

It reads one request a line from stdin, forks a child for it (modules are loaded once, a run takes milliseconds), and
answers with a line: how the child ended and what it had told until then. A *step* is a moment before or after a call to
a backend, or before or after one of the system calls that change files; steps are counted by name.

A request:

* ``folder``, ``bigtable``: where; null, or a table that holds rows and changes instead of a file in the folder;
* ``owner``, ``later``: who, and how many seconds the clock of leases is ahead;
* ``operations``: a list of [kind, key, payload size, fill];
* ``watched``: ``all`` steps are told, those ``after recovery``, or ``none``;
* ``at``: [name, number] of the step to end at, or null;
* ``meanwhile``: null to die there by SIGKILL; or a request served while the first child is stopped there by SIGSTOP.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, cast

from consumer.errors import TierstreamError
from consumer.ids import ObjectContext, ObjectId
from consumer.operations import DEFAULT_METADATA
from consumer.storage.backend import ChangeLog, HighVolumeBackend
from consumer.storage.bigtable import BigtableBackend
from consumer.storage.bigtable_change_log import BigtableChangeLog
from consumer.storage.bigtable_table import vendor
from consumer.storage.filesystem import FilesystemBackend
from consumer.storage.metadata import now_utc
from consumer.storage.sqlite import SqliteBackend
from consumer.storage.sqlite_change_log import SqliteChangeLog
from consumer.storage.tiered import TieredStorage

THRESHOLD = 100
"""Objects above it are large: small enough that runs are quick."""

WATCHED_CALLS = ("fsync", "mkdir", "rename", "rmdir", "unlink", "write")
"""System calls that change files or make changes durable."""

WATCHED_METHODS = {
    "high_volume": {"put_non_tombstone", "head_tiered", "delete_non_tombstone", "compare_and_write", "forbid"},
    "long_term": {"put", "delete"},
    "change_log": {"record", "remove", "recoverable"},
}

CONTEXT = ObjectContext("crash")

say = os.write
"""The genuine call, whatever is watched."""


class Steps:
    """Tells every step it reaches, and dies or stops at one of them."""

    def __init__(self, told: int, at: list[Any] | None, by: signal.Signals) -> None:
        self.watched = False
        self._told = told
        self._at = at
        self._by = by
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def tell(self, what: str, *details: object) -> None:
        """Write a line that survives our death."""
        say(self._told, (json.dumps([what, *details]) + "\n").encode())

    def reached(self, name: str) -> None:
        """Be at step *name*; perhaps no further."""
        if not self.watched:
            return
        with self._lock:
            self._counts[name] += 1
            self.tell("step", name, self._counts[name])
            if self._at == [name, self._counts[name]]:
                os.kill(os.getpid(), self._by)

    def watch_system(self) -> None:
        """Make steps of the calls in :data:`WATCHED_CALLS`."""
        for name in WATCHED_CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self.reached(f"before {name}")
            answer = genuine(*given, **named)
            self.reached(f"after {name}")
            return answer

        return call


class Watched:
    """A backend, with a step before and after every call that matters."""

    def __init__(self, backend: object, tier: str, steps: Steps) -> None:
        self._backend = backend
        self._tier = tier
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        if name not in WATCHED_METHODS[self._tier]:
            return method

        async def call(*given: Any) -> Any:
            self._steps.reached(f"before {self._tier}.{name}")
            answer = await method(*given)
            self._steps.reached(f"after {self._tier}.{name}")
            return answer

        return call


def rows_and_changes(request: dict[str, Any]) -> tuple[HighVolumeBackend, ChangeLog]:
    """Open the high-volume tier and the change log."""
    owner: str = request["owner"]
    later: float = request["later"]
    if request["bigtable"] is None:
        file = Path(request["folder"]) / "objects.sqlite"
        return SqliteBackend(file), SqliteChangeLog(file, owner, monotonic=lambda: time.monotonic() + later)
    project, instance, table, host = (
        request["bigtable"][name] for name in ("project", "instance", "table", "emulator_host")
    )
    change_log = BigtableChangeLog(
        project, instance, table, owner, emulator_host=host, clock=lambda: now_utc() + timedelta(seconds=later)
    )
    return BigtableBackend(project, instance, table, emulator_host=host), change_log


async def run(request: dict[str, Any], steps: Steps) -> None:
    """Open the storage, apply the operations, join, close."""
    folder = Path(request["folder"])
    steps.watched = request["watched"] == "all"
    high_volume, change_log = rows_and_changes(request)
    storage = TieredStorage(
        cast("Any", Watched(high_volume, "high_volume", steps)),
        cast("Any", Watched(FilesystemBackend(folder / "objects"), "long_term", steps)),
        cast("Any", Watched(change_log, "change_log", steps)),
        THRESHOLD,
    )
    if request["watched"] == "after recovery":
        await storage.recover()
        await storage.join()
        steps.watched = True
    for number, (kind, key, size, fill) in enumerate(request["operations"]):
        object_id = ObjectId(CONTEXT, key)
        try:
            if kind == "put":
                await storage.put(object_id, DEFAULT_METADATA, fill.encode() * size)
            elif kind == "delete":
                await storage.delete(object_id)
            else:
                found = await storage.get(object_id)
                steps.tell("read", key, None if found is None else cast("bytes", found.payload).decode())
        except TierstreamError as error:
            steps.tell("refused", type(error).__name__)
        else:
            steps.tell("acknowledged", number)
    await storage.join()
    steps.watched = False
    await storage.close()


def child(request: dict[str, Any], told: int) -> NoReturn:
    """Serve one request and end."""
    steps = Steps(told, request["at"], signal.SIGSTOP if request["meanwhile"] else signal.SIGKILL)
    steps.watch_system()
    try:
        asyncio.run(run(request, steps))
    except BaseException:  # noqa: BLE001 - shown by pytest, with what the server has said
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Run a child for *request*; return how it ended and what it told."""
    reading, writing = os.pipe()  # its 64 KiB hold all that a child tells
    pid = os.fork()
    if not pid:
        child(request, writing)
    os.close(writing)
    _, status = os.waitpid(pid, os.WUNTRACED)
    stopped = os.WIFSTOPPED(status)
    if stopped:
        meanwhile = serve(request["meanwhile"])
        if meanwhile["exit"] != 0:
            raise RuntimeError(meanwhile)
        os.kill(pid, signal.SIGCONT)
        _, status = os.waitpid(pid, 0)
    with os.fdopen(reading) as told:
        lines = [json.loads(text) for text in told]
    return {"exit": os.waitstatus_to_exitcode(status), "stopped": stopped, "told": lines}


def main() -> None:
    """Answer requests until stdin ends; ``bigtable`` as argument loads what only that needs, once for all children."""
    if "bigtable" in sys.argv:
        vendor()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(serve(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
