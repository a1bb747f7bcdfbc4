"""The embedded broker as a child process: up when it says so, gone when told, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from brokers import answers, unused_port, wait_until
from consumer import broker
from consumer.broker import BrokerFailure, DevBroker

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.process, pytest.mark.slow]


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def pretender(folder: Path, script: str) -> Path:
    """A program that stands in for the broker."""
    program = folder / "pretender"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    return program


def test_it_is_up_when_started_and_gone_when_stopped(tmp_path: Path) -> None:
    """Contract 7: `broker`, `demo`."""
    embedded = DevBroker(tmp_path / "new" / "folder")
    embedded.start()
    pid = embedded.pid or 0
    during = (alive(pid), embedded.running, answers(embedded.bootstrap))
    embedded.stop()

    assert during == (True, True, True)
    assert (alive(pid), embedded.running, answers(embedded.bootstrap)) == (False, False, False)


def test_stopping_twice_or_unstarted_does_nothing(tmp_path: Path) -> None:
    """Cleanup runs whatever happened before."""
    never = DevBroker(tmp_path)

    never.stop()
    never.stop()

    assert never.pid is None


def test_its_data_survives_a_restart(tmp_path: Path) -> None:
    """`broker --data-dir`: topics are there again."""
    with DevBroker(tmp_path):
        pass

    with DevBroker(tmp_path) as again:
        assert answers(again.bootstrap)


def test_a_taken_port_is_said_to_be_taken(tmp_path: Path) -> None:
    """With what can be done about it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(BrokerFailure, match=f"port {port}: Address already in use") as caught:
            DevBroker(tmp_path, port=port).start()

    assert caught.value.hint
    assert "--port" in caught.value.hint


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_one_is_said(tmp_path: Path, place: str) -> None:
    """With what can be done about it."""
    (tmp_path / "file").touch()

    with pytest.raises(BrokerFailure, match=r"file.*: (File exists|Not a directory)") as caught:
        DevBroker(tmp_path / place).start()

    assert caught.value.hint
    assert "--data-dir" in caught.value.hint


def test_a_missing_package_is_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra: `pip install 'tierstream[demo]'`."""
    monkeypatch.setitem(sys.modules, "noida_db", None)

    with pytest.raises(BrokerFailure, match="not installed") as caught:
        DevBroker(tmp_path).start()

    assert caught.value.hint
    assert "tierstream[demo]" in caught.value.hint


def test_one_that_ends_at_once_tells_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a user would wait, and then know nothing."""
    program = pretender(tmp_path, "echo this machine is too old >&2; exit 7")
    monkeypatch.setattr(broker, "program", lambda: program)

    with pytest.raises(BrokerFailure, match="ended with 7: this machine is too old"):
        DevBroker(tmp_path).start()


def test_one_that_never_answers_is_given_up_and_put_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind by a start that failed, not even one deaf to SIGTERM."""
    program = pretender(tmp_path, f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.05; done")
    monkeypatch.setattr(broker, "program", lambda: program)
    monkeypatch.setattr(broker, "START_SECONDS", 0.3)
    monkeypatch.setattr(broker, "STOP_SECONDS", 0.2)

    with pytest.raises(BrokerFailure, match="did not answer within"):
        DevBroker(tmp_path).start()

    assert not alive(int((tmp_path / "pid").read_text(encoding="utf-8")))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends a child with its parent")
def test_it_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """A demo that is killed leaves no broker behind."""
    script = (
        "import sys, time; from pathlib import Path; from consumer.broker import DevBroker\n"
        "b = DevBroker(Path(sys.argv[1])); b.start(); print(b.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout
    with parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)

        parent.send_signal(signal.SIGKILL)

    wait_until(lambda: not alive(pid), 10, "the broker to end with its parent")


def test_a_port_may_be_chosen(tmp_path: Path) -> None:
    """`broker --port N`."""
    port = unused_port()

    with DevBroker(tmp_path, port=port) as running:
        assert running.bootstrap == f"127.0.0.1:{port}"
        assert answers(running.bootstrap)
