"""`demo` and `bench` as a newcomer meets them: they end by themselves, and what they report can be believed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from brokers import wait_until
from consumer.demo import CONTEXT, Expected, Ledger
from consumer.profiling import STAGES
from service_process import clean_environment, command_line


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a few real files, one of them above 512 KiB."""
    folder = tmp_path / "source"
    (folder / "below").mkdir(parents=True)
    for number in range(20):
        (folder / "below" / f"{number}.txt").write_text(f"file {number}\n" * (number + 1))
    (folder / "above.bin").write_bytes(bytes(range(256)) * 2500)
    # What somebody's own folder may hold: names that are no object key, nothing behind a link, no file at all.
    (folder / "two\nlines.txt").write_text("left out")
    Path(os.fsdecode(bytes(folder) + b"/\xff.txt")).write_text("left out")
    (folder / "below" / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    (folder / "empty.txt").touch()
    return folder


class RunningDemo:
    """``tierstream demo`` in a session of its own, with its temporary folder below *folder*."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder / "temporary"
        self.folder.mkdir()
        self.errors = folder / "stderr"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "consumer", "demo", *arguments],
                cwd=folder,
                env=clean_environment(TMPDIR=str(self.folder)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def until(self, text: str) -> None:
        """Wait until *text* stands on stderr."""
        wait_until(lambda: text in self.errors.read_text(), 60, f"the demo never said {text!r}")

    def service_pid(self) -> int:
        """The service's process, as its own log names it."""
        (log,) = self.folder.glob("tierstream-demo-*/service.log")
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        return next(int(entry["pid"]) for entry in entries if entry["event"] == "started")

    def end(self) -> str:
        """Wait for its end; return its stdout."""
        return self.process.communicate(timeout=60)[0]


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Callable[..., RunningDemo]]:
    """Start demos that are gone after the test."""
    started: list[RunningDemo] = []

    def start(*arguments: str) -> RunningDemo:
        started.append(RunningDemo(tmp_path, *arguments))
        return started[-1]

    yield start
    for demo in started:
        if demo.process.poll() is None:
            demo.process.kill()
        demo.process.communicate()


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_demo_checks_every_response_and_says_so(source: Path, tmp_path: Path) -> None:
    """Contract 7: a report that has checked itself; exit 0 only if nothing is missing or wrong; nothing left behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = command_line(
        *("demo", "--no-wait", "--json", "--source", str(source)),
        cwd=tmp_path,
        environment={"TMPDIR": str(temporary)},
        seconds=110,
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert report["records"] == report["responses"] > 3_500
    assert (report["missing"], report["duplicated"], report["mismatched"]) == ([], [], [])
    assert report["by_kind"].keys() == {"insert", "get", "head", "delete", "unknown"}
    assert report["failures"] == {"decode_error": 4, "null_value": 1, "unknown_schema": 1}
    assert report["bytes_stored"]["high_volume"] > 0
    assert report["bytes_stored"]["long_term"] > 6 * 1024 * 1024
    assert len(report["windows"]) == 6
    assert "left out: 2 files" in done.stderr
    assert list(temporary.iterdir()) == []


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_is_missing_is_named_and_makes_the_exit_code_1(
    source: Path, start_demo: Callable[..., RunningDemo]
) -> None:
    """The service is killed in the middle: the report says so, record by record."""
    demo = start_demo("--no-wait", "--json", "--source", str(source))
    demo.until("counting the files")
    os.kill(demo.service_pid(), signal.SIGKILL)

    report = json.loads(demo.end())

    assert demo.process.returncode == 1
    assert report["ok"] is False
    assert report["missing"]
    assert len(report["missing"]) == report["records"] - report["responses"]
    assert all(record.startswith("operations/") for record in report["missing"])
    assert "the service ended" in demo.errors.read_text()


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_the_page_stays_up_until_the_demo_is_ended_and_then_all_of_it_ends(
    source: Path, start_demo: Callable[..., RunningDemo], ended_by: signal.Signals
) -> None:
    """Ctrl-C reaches the whole process group, SIGTERM the demo alone: either way the service leaves cleanly, exit 0."""
    demo = start_demo("--records", "50", "--source", str(source))
    demo.until("Ctrl-C ends it")
    service = demo.service_pid()
    if ended_by == signal.SIGINT:
        os.killpg(demo.process.pid, ended_by)
    else:
        demo.process.send_signal(ended_by)

    report = demo.end()

    assert demo.process.returncode == 0, demo.errors.read_text()
    assert "every response is there, once, and right" in report
    assert not Path(f"/proc/{service}").exists()
    assert not list(demo.folder.iterdir())


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_demo_that_is_killed_leaves_no_process(source: Path, start_demo: Callable[..., RunningDemo]) -> None:
    """Neither the service nor the broker outlives it."""
    demo = start_demo("--records", "50", "--source", str(source))
    demo.until("Ctrl-C ends it")
    service = demo.service_pid()
    demo.process.kill()
    demo.end()

    wait_until(lambda: not Path(f"/proc/{service}").exists(), 20, "the service lives on")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_benchmark_reports_both_sides_and_the_stages(tmp_path: Path) -> None:
    """One run, one broker, medians and their ratio; how large it is decides no test."""
    done = command_line("bench", "--records", "5000", "--rounds", "1", "--profile", "--json", cwd=tmp_path, seconds=110)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["records"] == 5000
    assert len(report["bare"]) == len(report["service"]) == 1
    assert report["ratio"] > 0
    assert all(cost > 0 for cost in report["stages_microseconds"].values())
    profile = report["profile"]
    assert list(profile["microseconds"]) == list(STAGES)
    assert sum(profile["samples"].values()) > 0
    assert sum(profile["microseconds"].values()) == pytest.approx(profile["run"]["cpu_microseconds"])


def answer(partition: int = 0, offset: int = 0, **fields: Any) -> dict[str, Any]:
    """A response as decoded, right unless *fields* say otherwise."""
    response: dict[str, Any] = {
        "index": offset,
        "source": {"topic": "operations", "partition": partition, "offset": offset},
        "status": 201,
        "key": "k",
        "result": {"type": "Inserted", "metadata": {"size": 1}},
    }
    return {**response, **fields}


class TestTheLedgerOfTheDemo:
    """A report that cannot be wrong proves nothing: each mistake of a service is seen."""

    @pytest.fixture
    def ledger(self) -> Ledger:
        """A ledger with one insert."""
        ledger = Ledger()
        ledger.sent(0, 0, Expected("insert", 201, "k"))
        return ledger

    def test_a_right_response_is_right(self, ledger: Ledger) -> None:
        ledger.check(answer())

        assert (ledger.missing, ledger.duplicated, ledger.unexpected, ledger.wrong) == ([], [], [], {})
        assert ledger.is_right

    def test_a_record_without_response_is_missing(self, ledger: Ledger) -> None:
        assert ledger.missing == ["operations/0/0"]
        assert not ledger.is_right

    def test_a_second_response_is_a_duplicate(self, ledger: Ledger) -> None:
        ledger.check(answer())
        ledger.check(answer())

        assert (ledger.missing, ledger.duplicated) == ([], ["operations/0/0"])
        assert not ledger.is_right

    def test_a_response_to_nothing_is_unexpected(self, ledger: Ledger) -> None:
        ledger.check(answer(partition=1))

        assert (ledger.missing, ledger.unexpected) == (["operations/0/0"], ["operations/1/0"])
        assert not ledger.is_right

    @pytest.mark.parametrize(
        "mistake",
        [
            {"status": 200},
            {"index": 1},
            {"key": "other"},
            {"result": {"type": "Failure", "code": "panic", "message": "x", "retriable": False}},
        ],
    )
    def test_a_response_that_says_something_else_is_wrong(self, ledger: Ledger, mistake: dict[str, Any]) -> None:
        ledger.check(answer(**mistake))

        assert list(ledger.wrong) == ["operations/0/0"]
        assert not ledger.is_right

    def test_other_bytes_than_were_stored_are_wrong(self) -> None:
        ledger = Ledger()
        ledger.sent(0, 0, Expected("get", 200, "k", size=1, crc32c=0))
        ledger.check(
            answer(status=200, result={"type": "Got", "object": {"metadata": {"size": 1}, "payload": b"other"}})
        )

        assert list(ledger.wrong) == ["operations/0/0"]
        assert not ledger.is_right

    def test_an_answer_where_a_failure_is_expected_is_wrong(self) -> None:
        ledger = Ledger()
        ledger.sent(0, 0, Expected("unknown", 400, code="decode_error"))
        ledger.check(answer(status=400, key=None))

        assert list(ledger.wrong) == ["operations/0/0"]
        assert not ledger.is_right


def test_objects_of_the_demo_have_a_scope() -> None:
    """The demo shows scopes, as most users have them."""
    assert CONTEXT.storage_prefix == "demo/source.files/objects/"
