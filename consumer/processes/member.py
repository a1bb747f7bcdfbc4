"""One process of several: the service as always, told by its supervisor when to stop, and asked what it is doing.

``python -m consumer.processes.member NUMBER SUPERVISOR_PID``, with its line to the supervisor as standard input;
started by the supervisor, and by nobody else.

1. The kernel is asked to end it with its supervisor (Linux); elsewhere the end of the line is noticed, as long as the
   event loop turns.
2. It reads its configuration from the line.
3. It runs, without an admin port of its own, and answers on the line. Every line of its log says which process it is.

Its exit code is the service's. Signals mean what they always mean, so one process alone can be drained by hand; the
supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from consumer import log
from consumer.app import App, loop_factory
from consumer.config import Config
from consumer.errors import ConfigError
from consumer.exits import FAILURE, USAGE
from consumer.lifeline import dies_with
from consumer.metrics import plain
from consumer.processes.channel import METRICS, PULSE, READINESS, STATE, STOP, framed, read_frame, receive_config

_log = log.get_logger("consumer.processes.member")


def main(number: int, line: socket.socket) -> int:
    """Run process *number* on its *line* to the supervisor; return the exit code."""
    config = receive_config(line)
    if config is None:
        return FAILURE  # the supervisor is gone
    log.configure(config.log.level, config.log.format, bound={"process": number})
    try:
        with asyncio.Runner(loop_factory=loop_factory(config)) as runner:
            return runner.run(run(config, line))
    except ConfigError as error:
        _log.error("cannot start", error=str(error))
        return USAGE


async def run(config: Config, line: socket.socket) -> int:
    """Run the service and answer on *line*, until one of both ends; return the exit code."""
    app = App(config, listens=False)
    answering = asyncio.create_task(answer(line, app), name="answers to the supervisor")
    try:
        return await app.run()
    finally:
        answering.cancel()
        await asyncio.wait([answering])


async def answer(line: socket.socket, app: App) -> None:
    """Answer questions until the supervisor is gone; then end the process: nobody would see it, or stop it."""
    reader, writer = await asyncio.open_unix_connection(sock=line)
    try:
        while (body := await read_frame(reader)) is not None:
            question: Mapping[str, Any] = orjson.loads(body)
            if question["ask"] == STOP:
                app.stop()
                continue
            try:
                told = orjson.dumps({"id": question["id"], "told": tell(app, question["ask"])})
            except Exception:  # noqa: BLE001 - whatever it is, it is logged, and the process goes on answering
                _log.exception("question of the supervisor failed", ask=question["ask"])
                told = orjson.dumps({"id": question["id"], "told": None})
            writer.write(framed(told))
            await writer.drain()
    except ConnectionError:
        pass  # as at the end of the line
    finally:
        writer.close()
    _log.error("the supervisor is gone, ending at once")
    sys.stderr.flush()
    os._exit(FAILURE)


def tell(app: App, what: str) -> Any:
    """Answer one question, as JSON can hold it.

    Raises:
        KeyError: nobody can answer that.
    """
    if what == PULSE:
        state = app.snapshot()
        return {"state": state["state"], "totals": state["totals"]}
    answers: Mapping[str, Callable[[], Any]] = {
        STATE: app.snapshot,
        READINESS: app.readiness,
        METRICS: lambda: plain(app.registry.collect()),
    }
    return answers[what]()


def _take_line() -> socket.socket:
    """Return the line that stands as standard input, and leave nothing there that anybody could read from."""
    line = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return line


if __name__ == "__main__":
    bind = dies_with(int(sys.argv[2]))
    if bind is not None:
        bind()
    sys.exit(main(int(sys.argv[1]), _take_line()))
