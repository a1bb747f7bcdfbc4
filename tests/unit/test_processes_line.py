"""The line between the supervisor and a process: questions are answered, deadlines kept, the end of it is noticed."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from consumer.app import App
from consumer.config import Config, Kafka, Runtime, Secret
from consumer.config import SqliteChangeLog as ChangeLogSettings
from consumer.config import Storage as StorageSettings
from consumer.metrics import TierstreamCollector, new_registry
from consumer.processes import member
from consumer.processes.channel import (
    FRAME_BYTES_MAX,
    METRICS,
    PULSE,
    READINESS,
    STATE,
    Asking,
    NoAnswer,
    framed,
    read_frame,
    receive_config,
)
from consumer.processes.supervisor import config_of

ROOT = Path(__file__).parents[2]
CONFIG = Config(kafka=Kafka(sasl_password=Secret("p")), runtime=Runtime(processes=2))
WAIT_SECONDS = 10.0

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def asking(script: Script) -> AsyncIterator[Asking]:
    """The supervisor's end of a line, with a process at the other end that does what *script* says."""
    ours, theirs = socket.socketpair()
    line = Asking(ours)
    await line.open(CONFIG)
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    assert await read_frame(reader) is not None, "the configuration comes first"
    other = asyncio.create_task(_run(script, reader, writer))
    try:
        yield line
    finally:
        await line.close()
        other.cancel()
        await asyncio.wait([other])


async def _run(script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await script(reader, writer)
    finally:
        writer.close()


async def question(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next question."""
    body = await read_frame(reader)
    assert body is not None
    asked: dict[str, Any] = orjson.loads(body)
    return asked


def answered(asked: dict[str, Any], told: Any) -> bytes:
    """The frame that answers a question."""
    return framed(orjson.dumps({"id": asked["id"], "told": told}))


class TestAsking:
    """The supervisor's end."""

    async def test_answers_find_their_questions_in_any_order(self) -> None:
        async def backwards(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            first, second = await question(reader), await question(reader)
            writer.write(answered(second, second["ask"].upper()))
            writer.write(answered(first, first["ask"].upper()))
            await reader.read()

        async with asking(backwards) as line:
            one, two = await asyncio.gather(line.ask("one", WAIT_SECONDS), line.ask("two", WAIT_SECONDS))

        assert (one, two) == ("ONE", "TWO")

    async def test_who_does_not_answer_in_time_is_not_waited_for_and_may_answer_the_next_one(self) -> None:
        late = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            first = await question(reader)
            await late.wait()
            writer.write(answered(first, "late"))
            writer.write(answered(await question(reader), "in time"))
            await reader.read()

        async with asking(slow) as line:
            with pytest.raises(NoAnswer):
                await line.ask(STATE, 0.01)
            late.set()

            assert await line.ask(STATE, WAIT_SECONDS) == "in time"

    async def test_an_answer_given_twice_does_no_harm(self) -> None:
        async def stutters(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for _ in range(2):
                writer.write(answered(await question(reader), "so") * 2)
            await reader.read()

        async with asking(stutters) as line:
            assert await line.ask(STATE, WAIT_SECONDS) == "so"
            assert await line.ask(STATE, WAIT_SECONDS) == "so"

    async def test_a_process_that_is_gone_is_not_waited_for(self) -> None:
        async def dies(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
            await question(reader)

        async with asking(dies) as line:
            for _ in range(2):  # while it is asked, and ever after
                with pytest.raises(NoAnswer, match="gone"):
                    await line.ask(STATE, WAIT_SECONDS)
            line.stop()

    async def test_a_process_that_cannot_tell_has_answered(self) -> None:
        async def cannot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(answered(await question(reader), None))
            await reader.read()

        async with asking(cannot) as line:
            assert await line.ask(STATE, WAIT_SECONDS) is None

    async def test_closing_the_line_ends_the_waiting(self) -> None:
        async def dumb(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
            await reader.read()

        async with asking(dumb) as line:
            waiting = asyncio.create_task(line.ask(STATE, WAIT_SECONDS))
            await asyncio.sleep(0)
            await line.close()
            with pytest.raises(NoAnswer):
                await waiting

    async def test_a_frame_that_is_too_long_is_the_end_of_the_line(self) -> None:
        async def lies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await question(reader)
            writer.write((FRAME_BYTES_MAX + 1).to_bytes(4, "big") + b"x")
            await reader.read()

        async with asking(lies) as line:
            with pytest.raises(NoAnswer, match="gone"):
                await line.ask(STATE, WAIT_SECONDS)


class TestConfig:
    """What a process is told first."""

    def test_the_configuration_comes_whole_with_its_secrets(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(framed(pickle.dumps(CONFIG)))
            received = receive_config(theirs)

        assert received == CONFIG
        assert received.kafka.sasl_password is not None
        assert received.kafka.sasl_password.get() == "p"

    @pytest.mark.parametrize("sent", [b"", b"\x00\x00", framed(pickle.dumps(CONFIG))[:-1]])
    def test_a_supervisor_that_dies_before_it_has_told_all_is_noticed(self, sent: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            with ours:
                ours.sendall(sent)
            assert receive_config(theirs) is None

    def test_processes_are_told_apart_by_brokers_and_in_the_change_log(self) -> None:
        """Contract 5: an owner is used by one running process at a time."""
        named = CONFIG.model_copy(update={"storage": StorageSettings(change_log=ChangeLogSettings(owner="pod-0"))})

        first, second = config_of(named, 1), config_of(named, 2)

        assert (first.kafka.client_id, second.kafka.client_id) == ("tierstream-1", "tierstream-2")
        assert (first.storage.change_log.owner, second.storage.change_log.owner) == ("pod-0-1", "pod-0-2")
        assert first.kafka.group_id == second.kafka.group_id == named.kafka.group_id

    def test_without_a_given_owner_each_run_makes_its_own(self) -> None:
        assert config_of(CONFIG, 1).storage.change_log.owner is None


class TestMember:
    """The process's end."""

    @pytest.fixture
    def app(self) -> App:
        """A service that has not been started.

        Made outside the event loop, as its release is read from a file; without the metrics that come from ``/proc``.
        """
        app = App(CONFIG, listens=False)
        app.registry = new_registry()
        app.registry.register(TierstreamCollector(app._counts, app._limiter, app.snapshot))
        return app

    async def test_it_tells_its_state_its_readiness_and_its_metrics(self, app: App) -> None:
        ours, theirs = socket.socketpair()
        line = Asking(ours)
        await line.open(CONFIG)
        await asyncio.to_thread(receive_config, theirs)
        answering = asyncio.create_task(member.answer(theirs, app))
        try:
            told = {what: await line.ask(what, WAIT_SECONDS) for what in (PULSE, STATE, READINESS, METRICS, "love")}
            line.stop()
            assert await line.ask(PULSE, WAIT_SECONDS) is not None, "answered behind the stop"
        finally:
            answering.cancel()
            await asyncio.wait([answering])
            await line.close()

        assert told[PULSE] == {"state": "starting", "totals": app.snapshot()["totals"]}
        assert told[STATE] == app.snapshot()
        assert told[READINESS] == [False, ["connecting to the broker"]]
        assert "tierstream_concurrency_limit" in {family["name"] for family in told[METRICS]}
        assert told["love"] is None
        assert app._stop.is_set()

    def test_a_signal_beside_the_supervisors_request_is_a_first_one(
        self, app: App, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A service manager signals all processes of a unit, the supervisor included."""
        exits: list[int] = []
        monkeypatch.setattr(os, "_exit", exits.append)
        app.stop()
        app._signalled(signal.SIGTERM)
        once = list(exits)
        app._signalled(signal.SIGTERM)

        assert (once, exits) == ([], [143])

    def test_without_its_supervisor_it_does_not_begin(self) -> None:
        """The supervisor is gone before the kernel has been asked to watch it: another process is its parent."""
        code = subprocess.run(
            [sys.executable, "-m", "consumer.processes.member", "1", "1"],
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            timeout=60,
            check=False,
        ).returncode

        assert code == 1
