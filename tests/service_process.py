"""The service as its users run it: a child process, known only by its command line, files, signals and admin port."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from brokers import dies_with_us, tail, wait_until

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("observed.py")

STACKS_SECONDS = 2
"""For a process to say where it stands, unless even that hangs."""

START_SECONDS = 30
"""From the start of the process to its admin port: importing everything, on two busy cores."""

READY_SECONDS = 40
"""From the start of the process to ready: joining a group can last a session time-out (6 s here) after a hard kill."""

EXIT_SECONDS = 30
"""Contract 11: a drain lasts at most drain_timeout (10 s here) + 15 s."""


def settings(folder: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration for tests: storage below *folder*, short timers that obey the cross-field rules.

    *sections* are merged in, one level deep.
    """
    base: dict[str, Any] = {
        "kafka": {
            "session_timeout": "6s",
            "heartbeat_interval": "1s",
            "request_timeout": "30s",
            "transaction_timeout": "20s",
        },
        "rebalance": {"timeout": "20s", "drain_timeout": "10s"},
        "commit": {"interval": "200ms"},
        "storage": {
            "high_volume": {"type": "sqlite", "path": str(folder / "objects.sqlite")},
            "long_term": {"type": "filesystem", "path": str(folder / "objects")},
            "change_log": {"type": "sqlite", "path": str(folder / "objects.sqlite")},
        },
        "admin": {"host": "127.0.0.1", "port": 0},
        "log": {"level": "info", "format": "json"},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return base


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment of a child: ours without any setting of the service's, the checkout importable."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TIERSTREAM_")}
    return {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **extra}


def command_line(
    *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run ``tierstream ARGUMENTS`` to its end; return exit code, stdout and stderr."""
    return subprocess.run(
        [sys.executable, "-m", "consumer", *arguments],
        cwd=cwd,
        env=clean_environment(**(environment or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


class ServiceProcess:
    """One run of ``tierstream run``. Not a context manager: the fixture that hands it out also puts it down."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, name: str = "service", **environment: str) -> None:
        """Write *config* into *folder* and start the process."""
        self.config = copy.deepcopy(dict(config))
        self.log = folder / f"{name}-{time.monotonic_ns()}.log"
        self.output = self.log.with_suffix(".out")
        path = self.log.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        self._admin: str | None = None
        with self.log.open("wb") as errors, self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [*dies_with_us(), sys.executable, "-P", str(PROGRAM), "run", "--config", str(path)],
                cwd=folder,
                env=clean_environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )

    # ------------------------------------------------------------------------------------------ what it says

    def log_lines(self) -> list[dict[str, Any]]:
        """The log, line by line; a line that is not JSON becomes ``{"text": …}``."""
        lines: list[dict[str, Any]] = []
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                parsed = json.loads(line)
            except ValueError:
                parsed = None
            lines.append(parsed if isinstance(parsed, dict) else {"text": line})
        return lines

    @property
    def admin(self) -> str:
        """The address of the admin port, from the "started" log line; waits for it."""
        if self._admin is None:
            found: list[int] = []

            def started() -> bool:
                assert self.process.poll() is None, self.obituary()
                found.extend(line["admin_port"] for line in self.log_lines() if "admin_port" in line)
                return bool(found)

            wait_until(started, START_SECONDS, f'the "started" log line; the log ends with\n{tail(self.log)}')
            self._admin = f"http://127.0.0.1:{found[0]}"
        return self._admin

    def get(self, path: str, seconds: float = 5) -> tuple[int, str]:
        """GET *path* from the admin port: status and body; (0, why) if nobody answers."""
        try:
            with urllib.request.urlopen(self.admin + path, timeout=seconds) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def state(self) -> dict[str, Any]:
        """The snapshot of ``/debug/state``; empty if nobody answers."""
        status, body = self.get("/debug/state")
        parsed: dict[str, Any] = json.loads(body) if status == 200 else {}
        return parsed

    def partitions(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What ``/debug/state`` says of each owned partition."""
        return {(entry["topic"], entry["partition"]): entry for entry in self.state().get("partitions", [])}

    def metrics(self) -> dict[str, float]:
        """The samples of ``/metrics``: name with labels, as written, to value."""
        status, body = self.get("/metrics")
        assert status == 200, body
        samples = re.findall(r"^([a-z_]+(?:\{[^\n]*\})?) (\S+)$", body, re.MULTILINE)
        return {name: float(value) for name, value in samples}

    @property
    def ready(self) -> bool:
        """Whether ``/readyz`` says so."""
        return self.get("/readyz")[0] == 200

    def obituary(self) -> str:
        """How it ended and its last words, for a failing assertion."""
        return f"the service exited with {self.process.poll()}; the log ends with\n{tail(self.log, 60)}"

    def account(self) -> str:
        """Where it stands, for a failing wait: its state, the end of its log, every thread and task."""
        state, said = self.state(), tail(self.log, 60)
        before = self.log.stat().st_size
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(STACKS_SECONDS)
        stacks = self.log.read_bytes()[before:].decode(errors="replace")
        return f"state: {state}\nthe log ends with\n{said}\nthreads and tasks\n{stacks}"

    def memory_peak(self) -> int:
        """The most memory it has ever had resident, in bytes; 0 where the system does not tell, or it has ended."""
        return self._memory("VmHWM")

    def memory(self) -> int:
        """The memory it has resident now, in bytes; 0 where the system does not tell, or it has ended."""
        return self._memory("VmRSS")

    def _memory(self, name: str) -> int:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return 0
        found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    # ------------------------------------------------------------------------------------------ what is done to it

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = READY_SECONDS) -> None:
        """Wait for *condition* while the process lives.

        Raises:
            AssertionError: it ended.
            TimeoutError: the condition did not come true within *seconds*.
        """

        def alive_and_true() -> bool:
            assert self.process.poll() is None, self.obituary()
            return condition()

        try:
            wait_until(alive_and_true, seconds, what)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.account()}") from None

    def wait_ready(self, partitions: int | None = None) -> None:
        """Wait until it is ready, and owns *partitions* if given."""
        self.wait(
            lambda: self.ready and (partitions is None or len(self.partitions()) == partitions),
            "the service to be ready" + (f" with {partitions} partitions" if partitions is not None else ""),
        )

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL and collect the process."""
        self.process.kill()
        self.process.wait(EXIT_SECONDS)

    def wait_exit(self, seconds: float = EXIT_SECONDS) -> int:
        """Wait for the end and return the exit code, as a shell reports it for a signal."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {seconds:g} s\n{self.account()}") from None
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Stop it as an operator would; it has to end cleanly, having said nothing on stdout."""
        self.terminate()
        assert self.wait_exit() == 0, self.obituary()
        assert self.output.read_text(encoding="utf-8") == "", "`run` prints nothing on stdout"
