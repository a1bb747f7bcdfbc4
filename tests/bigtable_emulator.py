"""Google's Bigtable emulator for the tests: started when the first test asks, stopped at the end, on a port of its own.

Its program, ``cbtemulator``, comes with the Google Cloud SDK: it is taken from PATH, or from where ``gcloud`` says the
SDK is. Where there is none its tests are skipped and say why; with ``TIERSTREAM_REQUIRE_BIGTABLE=1`` they fail.

It keeps everything in memory and enforces no limits of size. Every test has a table of its own.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from brokers import dies_with_us, tail, unused_port
from consumer.storage import bigtable_table
from consumer.storage.bigtable import BigtableBackend
from consumer.storage.bigtable_change_log import BigtableChangeLog

START_SECONDS = 60
"""It is up in 50 ms; a machine under load may take longer."""

STOP_SECONDS = 10

PATIENCE_SECONDS = 40.0
"""Deadline of an attempt in tests: a machine under load is no outage."""

SDK_SECONDS = 30
"""How long ``gcloud`` may take to say where it is."""

BELOW_SDK = Path("platform", "bigtable-emulator", "cbtemulator")


@cache
def emulator_command() -> str:
    """Return the emulator's program, empty where there is none."""
    found = shutil.which("cbtemulator")
    if found or not shutil.which("gcloud"):
        return found or ""
    asked = subprocess.run(
        ["gcloud", "info", "--format=value(installation.sdk_root)"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SDK_SECONDS,
        check=False,
    )
    program = Path(asked.stdout.strip()) / BELOW_SDK
    return str(program) if os.access(program, os.X_OK) else ""


class Emulator:
    """A running emulator."""

    project, instance = "test-project", "test-instance"

    def __init__(self, host: str, pid: int) -> None:
        self.host = host
        """HOST:PORT."""
        self.pid = pid

    @staticmethod
    def unused_table() -> str:
        """Return the name of a table that is not there yet."""
        return f"t-{uuid4().hex[:12]}"

    def section(self, table: str) -> dict[str, str]:
        """Return the configuration of a tier in *table*."""
        return {
            "type": "bigtable",
            "project": self.project,
            "instance": self.instance,
            "table": table,
            "emulator_host": self.host,
        }

    def storage(self) -> dict[str, dict[str, str]]:
        """Make a table; return the configuration of storage in it, without a long-term tier."""
        section = self.section(asyncio.run(self.create(self.unused_table())))
        return {"high_volume": section, "change_log": {**section, "lease": "5s"}}

    def backend(self, table: str, **given: object) -> BigtableBackend:
        """Return a high-volume tier in *table*."""
        where = (self.project, self.instance, table)
        return BigtableBackend(*where, emulator_host=self.host, **given)  # type: ignore[arg-type]  # as given

    def change_log(self, table: str, *given: object, **named: object) -> BigtableChangeLog:
        """Return a change log in *table*."""
        where = (self.project, self.instance, table)
        return BigtableChangeLog(*where, *given, emulator_host=self.host, **named)  # type: ignore[arg-type]  # as given

    async def create(self, table: str) -> str:
        """Make *table*, for rows of both kinds; return its name."""
        backend, log = self.backend(table), self.change_log(table)
        try:
            await backend.create()
            await log.create()
        finally:
            await log.close()
            await backend.close()
        return table


@contextmanager
def running_emulator(folder: Path) -> Iterator[Emulator]:
    """Run the emulator for the block."""
    port = unused_port()
    log = folder / "bigtable-emulator.log"
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [*dies_with_us(), emulator_command(), "-host", "127.0.0.1", "-port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the Bigtable emulator did not start:\n{tail(log)}")
            time.sleep(0.02)
        yield Emulator(f"127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def bigtable_emulator() -> Iterator[Emulator]:
    """Lend the emulator, or skip, or fail where it is required."""
    if not emulator_command():
        lacking = "the Bigtable emulator is missing: cbtemulator on PATH, or a Google Cloud SDK that has it"
        if os.environ.get("TIERSTREAM_REQUIRE_BIGTABLE") == "1":
            pytest.fail(f"TIERSTREAM_REQUIRE_BIGTABLE=1, but {lacking}", pytrace=False)
        pytest.skip(lacking)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_emulator(Path(folder)) as emulator,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(bigtable_table, "ATTEMPT_SECONDS", PATIENCE_SECONDS)
        yield emulator


class FaultyConnection:
    """What a table sends its requests over; some of the next ones fail, or are answered late: the faults of a network.

    Put between a backend and its table by :meth:`under`.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._planned: list[tuple[str, Exception | None, Callable[[], Awaitable[object]] | None, bool]] = []
        self.sent: list[str] = []
        """Names of the requests made."""

    @classmethod
    async def under(cls, backend: Any) -> FaultyConnection:
        """Put one under *backend*, a tier or a change log."""
        connection = cls(await backend._table._connect())
        backend._table._connection = connection
        return connection

    def not_sent(self, name: str, error: Exception, times: int = 1) -> None:
        """Let the next requests *name* fail without an effect."""
        self._planned += [(name, error, None, False)] * times

    def answer_lost(
        self, name: str, error: Exception, meanwhile: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        """Let the next request *name* have its effect, then *meanwhile* run, then fail."""
        self._planned.append((name, error, meanwhile, True))

    def after(self, name: str, meanwhile: Callable[[], Awaitable[object]]) -> None:
        """Let *meanwhile* run between the next request *name* and its answer."""
        self._planned.append((name, None, meanwhile, True))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._connection, name)
        if name not in {"check_and_mutate_row", "mutate_row", "read_row", "read_rows"}:
            return method

        async def request(*given: Any, **named: Any) -> Any:
            self.sent.append(name)
            plan = next((plan for plan in self._planned if plan[0] == name), None)
            if plan is None:
                return await method(*given, **named)
            self._planned.remove(plan)
            _, error, meanwhile, applied = plan
            answer = await method(*given, **named) if applied else None
            if meanwhile is not None:
                await meanwhile()
            if error is not None:
                raise error
            return answer

        return request
