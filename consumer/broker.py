"""The embedded development broker: noida-db as a child process, for `tierstream broker`, `demo` and `bench`.

Never for `run`: it is a young program with one node, no authentication and a limit of 1 MiB a record. It answers a
fetch with all it has, whatever limits the client sets, so that a client's memory follows its backlog; and at once, also
with nothing (:mod:`consumer.kafka.fetch_pace`).

1. A free port is chosen, unless one is given, and the child started on it, with its output in ``broker.log``.
2. It counts as started when the port takes connections and the child still lives: a port taken by somebody else in
   between shows as a child that ended.
3. It is stopped by its own process id: SIGTERM, then SIGKILL after :data:`STOP_SECONDS`.

The child does not outlive this process where the system can promise that (Linux: the kernel kills it when its parent
dies); elsewhere a crash of this process may leave it behind. It has a session of its own, so that Ctrl-C in a terminal
reaches this process alone, which then stops it when everything that talks to it has ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from consumer.errors import TierstreamError
from consumer.lifeline import dies_with

START_SECONDS: Final = 15.0
"""It is up in well under one; a busy machine may take longer."""
STOP_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.02
LOG_TAIL_BYTES: Final = 2000
"""How much of its log an error shows."""

RECORD_BYTES_MAX: Final = 1_000_000
"""Largest record it takes, key, headers and overhead included; fixed in the program (1 MiB)."""


class BrokerFailure(TierstreamError):
    """The embedded broker is not installed, did not start, or ended."""


def program() -> Path:
    """Return the broker's own program; its Python wrapper would only stand between us and the process.

    Raises:
        BrokerFailure: the package is not installed, or has no program for this system.
    """
    hint = "install the extra: pip install 'tierstream[demo]'"
    try:
        import noida_db  # noqa: PLC0415 - an extra
    except ImportError:
        raise BrokerFailure("the embedded broker needs the package noida-db, which is not installed", hint) from None
    where = Path(noida_db.__file__).with_name("noida-db")
    if not os.access(where, os.X_OK):
        raise BrokerFailure("the package noida-db has no program for this system", "use a broker of your own")
    return where


class DevBroker:
    """The embedded broker, from :meth:`start` to :meth:`stop`; also a context manager. Blocks, briefly.

    Args:
        data_dir: Where it keeps its data and log; made where missing.
        port: 0 = any free one.
    """

    def __init__(self, data_dir: Path, *, port: int = 0) -> None:
        self._data_dir = data_dir
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        """``127.0.0.1:PORT``; known after the start."""
        return f"127.0.0.1:{self._port}"

    @property
    def log(self) -> Path:
        """What it printed."""
        return self._data_dir / "broker.log"

    @property
    def pid(self) -> int | None:
        """Its process id while it is started."""
        return self._process.pid if self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it takes connections.

        Raises:
            BrokerFailure: not installed; the folder cannot be used; the port is taken; it ended, or did not answer
                within :data:`START_SECONDS`.
        """
        assert self._process is None, "started already"
        command = [str(program()), "start", "--only", "kafka"]
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            self.log.touch()
        except OSError as error:
            reason = error.strerror or "cannot be used"
            raise BrokerFailure(f"{self._data_dir}: {reason}", "choose another folder with --data-dir") from error
        self._port = self._free_port()
        command += ["--kafka-port", str(self._port), "--data-dir", str(self._data_dir / "data")]
        with self.log.open("ab") as sink:
            self._process = subprocess.Popen(  # noqa: S603 - the program found above, with arguments of our own
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509 - it makes one system call and takes no lock
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise

    def _free_port(self) -> int:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self._port))
            except OSError as error:
                reason = error.strerror or "not available"
                raise BrokerFailure(f"port {self._port}: {reason}", "choose another with --port") from error
            port: int = probe.getsockname()[1]
            return port

    def _wait_until_up(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._process.poll() is not None:
                raise BrokerFailure(f"the embedded broker ended with {self._process.returncode}: {self._last_words()}")
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            except OSError:
                if time.monotonic() > deadline:
                    raise BrokerFailure(
                        f"the embedded broker did not answer within {START_SECONDS:g} s: {self._last_words()}"
                    ) from None
                time.sleep(POLL_SECONDS)
            else:
                return

    def _last_words(self) -> str:
        text = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return text or "it said nothing"

    def wait(self) -> int:
        """Wait until it ends; return its exit code."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """Stop it and wait for its end; does nothing where it is not started."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
