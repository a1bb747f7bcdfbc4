"""Several processes under one supervisor: one service for brokers, operators and signals, whatever becomes of each.

Kills of a process are played on Apache Kafka alone: the embedded broker never expires a dead member.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from brokers import Broker, noida_broker, wait_until
from load import PARTITIONS, Load, check_nothing_is_committed_without_its_response, ends, read_back
from sabotage import sabotage
from service_process import ServiceProcess, command_line
from stages import SetStage, Stage, set_up

TWO = {"processes": 2}


def last_lines(service: ServiceProcess, event: str) -> dict[int, dict[str, Any]]:
    """The last line of the log with *event*, by process."""
    return {line["process"]: line for line in service.log_lines() if line.get("event") == event}


def pids(service: ServiceProcess) -> dict[int, int]:
    """The process ids of the processes, by number, as last told."""
    return {number: line["pid"] for number, line in last_lines(service, "process started").items()}


def shares(service: ServiceProcess) -> dict[int, int]:
    """How many partitions each process has been assigned last."""
    return {number: len(line["partitions"]) for number, line in last_lines(service, "partitions assigned").items()}


def lives(pid: int) -> bool:
    """Whether a process of this id exists, zombies of ours aside."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:  # no such file system
        return True
    except ProcessLookupError:
        return False


def start_two(
    stage: Stage, partitions: int = PARTITIONS, environment: Mapping[str, str] | None = None
) -> ServiceProcess:
    """Start the service with two processes, and wait until each has its half of the partitions."""
    stage.config["runtime"] = TWO
    service = stage.start(partitions=partitions, environment=environment)
    half = {1: partitions // 2, 2: partitions // 2}
    service.wait(lambda: shares(service) == half and service.ready, "each process to have its share")
    return service


@pytest.fixture
def breakable(tmp_path: Path) -> Iterator[Stage]:
    """A stage on an embedded broker of its own, which the test may freeze; nothing is started on it."""
    with noida_broker(tmp_path) as own:
        stage = set_up(own, tmp_path, PARTITIONS, PARTITIONS)
        yield stage
        own.node.thaw()
        stage.put_down()


@pytest.mark.slow
def test_two_processes_are_one_service(broker: Broker, set_stage: SetStage) -> None:
    """Contract 3, 6, 8, 9, 11, I1, I2: both work, one admin port tells of all, SIGTERM exits 0, each record once."""
    stage = set_stage(broker, partitions=PARTITIONS)
    ledger, load = stage.ledger, Load(stage.ledger)
    service = start_two(stage)
    children = pids(service)
    load.pump(lambda: ledger.answered() >= 2000)
    ledger.wait_answered(seconds=60)
    service.wait(lambda: ledger.committed(stage.group) == ends(ledger), "everything to be committed")

    state, metrics = service.state(), service.metrics()
    service.stop()
    ledger.read_all()

    assert state["state"] == "running"
    assert [entry["partition"] for entry in state["partitions"]] == list(range(PARTITIONS))
    assert state["limiter"]["limit"] == metrics["tierstream_concurrency_limit"] == 2 * 500
    assert state["totals"]["records"] == state["totals"]["responses"] == len(ledger.entries)
    answered = sum(value for name, value in metrics.items() if name.startswith("tierstream_responses_total"))
    assert answered == metrics["tierstream_response_latency_seconds_count"] == len(ledger.entries)
    for partition in range(PARTITIONS):
        topic = f'topic="{ledger.input}"'
        committed = metrics[f'tierstream_partition_committed_offset{{partition="{partition}",{topic}}}']
        records = metrics[f'tierstream_records_total{{partition="{partition}",result="operation",{topic}}}']
        assert committed == records == ends(ledger)[partition]
    assert metrics["tierstream_assigned_partitions"] == PARTITIONS
    assert sum(name.startswith("tierstream_build_info") for name in metrics) == 1
    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert not any(map(lives, children.values()))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_clean_stop_of_two_processes_under_load_repeats_nothing(apache: Broker, set_stage: SetStage) -> None:
    """I1, I2, I6, I12, contract 3, 11: SIGTERM under load: both drain side by side, and a restart goes on from there.

    Not on the embedded broker, which begins a new generation as soon as the first of them leaves.
    """
    stage = set_stage(apache, partitions=PARTITIONS)
    ledger, load = stage.ledger, Load(stage.ledger)
    service = start_two(stage)
    load.pump(lambda: ledger.answered() >= 1000)
    load.put(8 * load.batch)
    service.stop()

    ledger.flush()
    committed = check_nothing_is_committed_without_its_response(stage, {})
    left = len(ledger.entries) - ledger.answered()
    beyond = [entry.id for entry in ledger.entries.values() if entry.offset >= committed[entry.partition]]
    assert not set(beyond) & set(ledger.answers), "answered, drained, and yet not committed"
    again = start_two(stage)
    ledger.wait_answered(seconds=60)
    again.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert ledger.committed(stage.group) == ends(ledger)
    assert left > 0, "void: the stop found nothing left to do"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_process_that_is_killed_is_started_again_and_nothing_is_missing(apache: Broker, set_stage: SetStage) -> None:
    """I1, I3-I7: SIGKILL of one of two under load, twice: told, restarted; sums do not fall; no record is lost."""
    stage = set_stage(apache, partitions=PARTITIONS)
    ledger, load = stage.ledger, Load(stage.ledger)
    service = start_two(stage)
    for killed in (1, 2):
        goal = len(ledger.answers) + 1000
        load.pump(lambda goal=goal: len(ledger.answers) >= goal)  # type: ignore[misc]  # bound now, as it is called now
        seen, totals = service.metrics(), service.state()["totals"]
        load.put(4 * load.batch)
        victim = pids(service)[killed]
        os.kill(victim, signal.SIGKILL)

        service.wait(lambda: not service.ready, "the missing process to be told")
        assert any(f"process {killed}: " in reason for reason in json.loads(service.get("/readyz")[1])["reasons"])
        assert service.get("/healthz")[0] == 200
        service.wait(lambda: pids(service)[killed] != victim, "it to be started again")  # noqa: B023 - as above
        service.wait(lambda: service.ready and len(service.partitions()) == PARTITIONS, "all to be owned again", 60)
        falls = {
            name: (value, service.metrics().get(name, value))
            for name, value in seen.items()
            if "_total" in name and service.metrics().get(name, value) < value
        }
        assert falls == {}, "a counter that falls is taken for a restart, and the whole rest for an increase"
        assert service.state()["totals"]["responses"] >= totals["responses"]
    ledger.flush()
    ledger.wait_answered(seconds=60)
    read_back(load, 200)
    service.stop()
    check_nothing_is_committed_without_its_response(stage, {})

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.mismatched) == ([], []), verdict
    assert ledger.committed(stage.group) == ends(ledger)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_exactly_once_holds_across_processes_and_their_kills(apache: Broker, set_stage: SetStage) -> None:
    """Contract 3, I1, I2: transactional ids belong to partitions, whichever process has them."""
    stage = set_stage(apache, partitions=PARTITIONS, delivery="exactly-once")
    ledger, load = stage.ledger, Load(stage.ledger)
    service = start_two(stage)
    load.pump(lambda: ledger.answered() >= 1000)
    load.put(4 * load.batch)
    os.kill(pids(service)[1], signal.SIGKILL)
    service.wait(lambda: not service.ready, "the missing process to be told")
    service.wait(lambda: service.ready and len(service.partitions()) == PARTITIONS, "all to be owned again", 60)
    load.pump(lambda: ledger.answered() >= 2000)
    ledger.wait_answered(seconds=60)
    load.put(4 * load.batch)
    service.stop()
    ledger.flush()
    again = start_two(stage)
    ledger.wait_answered(seconds=60)
    again.stop()
    ledger.read_all()

    verdict = ledger.verdict()
    assert (verdict.missing, verdict.duplicated, verdict.mismatched) == ([], {}, []), verdict
    assert ledger.committed(stage.group) == ends(ledger)


@pytest.mark.slow
def test_a_process_that_does_not_answer_holds_nothing_up_and_is_told(embedded: Broker, set_stage: SetStage) -> None:
    """Contract 8: a frozen process: its partitions are missing, readiness names it, and everything answers in time."""
    stage = set_stage(embedded, partitions=PARTITIONS)
    service = start_two(stage)
    frozen = pids(service)[2]
    os.kill(frozen, signal.SIGSTOP)
    try:
        began = time.monotonic()
        answers = {path: service.get(path, seconds=30) for path in ("/healthz", "/readyz", "/debug/state", "/metrics")}
        took = time.monotonic() - began
    finally:
        os.kill(frozen, signal.SIGCONT)

    assert {path: status for path, (status, _) in answers.items()} == {
        "/healthz": 200,
        "/readyz": 503,
        "/debug/state": 200,
        "/metrics": 200,
    }
    assert json.loads(answers["/readyz"][1])["reasons"] == ["process 2: does not answer"]
    assert len(json.loads(answers["/debug/state"][1])["partitions"]) == PARTITIONS // 2
    assert answers["/metrics"][1].count("\ntierstream_partition_lag{") == PARTITIONS // 2
    assert took < 20, "each of three waits 2 s for the frozen one"
    service.wait(lambda: service.ready and len(service.partitions()) == PARTITIONS, "it to be well again")
    service.stop()


@pytest.mark.slow
def test_operators_see_one_service(embedded: Broker, set_stage: SetStage) -> None:
    """Contract 7: `top`, `why`, `health` and the page on the one admin port; each line of the log says who wrote it."""
    stage = set_stage(embedded, partitions=PARTITIONS)
    service = start_two(stage)
    stage.ledger.answer(stage.ledger.operate("head", "k", statuses={404}))

    def ask(*arguments: str) -> str:
        done = command_line(*arguments, "--url", service.admin, cwd=stage.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    top, why, health = ask("top"), json.loads(ask("why", "--json")), ask("health")
    page = service.get("/")[1]
    with urllib.request.urlopen(service.admin + "/events", timeout=20) as events:
        live = next(line for line in events if line.startswith(b"data: ")).decode()
    log = service.log_lines()
    service.stop()

    assert top.startswith("tierstream running")
    assert "/1000 " in top, "the permits of both"
    assert top.count(f"{stage.ledger.input}/") == PARTITIONS
    assert [row["partition"] for row in why] == list(range(PARTITIONS))
    assert health.strip() == "ready"
    assert page.count('role="rowheader"') == live.count('role=\\"rowheader\\"') == PARTITIONS
    assert "of 1,000" in page, "the permits of both"
    told = {line.get("process") for line in log if line["logger"].startswith("consumer.kafka")}
    assert told == {1, 2}, "no line of a process is without its number"
    supervised = [line for line in log if line["logger"] == "consumer.processes.supervisor"]
    assert [line["processes"] for line in supervised if line["event"] == "started"] == [2]


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_all_processes_at_once(breakable: Stage, number: signal.Signals, code: int) -> None:
    """Contract 11: the first one drains, here against a frozen broker; the second one waits for nobody."""
    service = start_two(breakable)
    children = pids(service)
    for partition in range(PARTITIONS):
        breakable.ledger.operate("insert", f"k{partition}", bytes(100), partition=partition)
    breakable.ledger.wait_answered()
    breakable.broker.node.freeze()
    service.process.send_signal(number)
    service.wait(lambda: service.state().get("state") == "draining", "the drain to begin")
    began = time.monotonic()

    service.process.send_signal(number)

    assert service.wait_exit() == code, service.obituary()
    assert time.monotonic() - began < 2
    wait_until(lambda: not any(map(lives, children.values())), 5, "the processes to be gone")


@pytest.mark.broker
@pytest.mark.slow
def test_a_drain_that_cannot_end_is_cut_at_one_deadline_for_all(breakable: Stage) -> None:
    """Contract 11: at most drain_timeout + 15 s in all, then exit 1, and nobody is left behind."""
    breakable.config["rebalance"] |= {"drain_timeout": "2s"}
    service = start_two(breakable)
    children = pids(service)
    for number in range(400):
        breakable.ledger.operate("insert", f"k{number}", bytes(1000), partition=number % PARTITIONS, wait=False)
    breakable.ledger.flush()
    breakable.broker.node.freeze()
    os.kill(children[2], signal.SIGSTOP)
    began = time.monotonic()

    service.terminate()
    code = service.wait_exit(2 + 15 + 5)

    assert code == 1, service.obituary()
    assert time.monotonic() - began < 2 + 15 + 1
    wait_until(lambda: not any(map(lives, children.values())), 5, "the processes to be gone")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["the processes", "the supervisor"])
def test_a_service_manager_that_signals_everybody_has_sent_one_signal(
    embedded: Broker, set_stage: SetStage, first: str
) -> None:
    """Contract 11: systemd sends SIGTERM to all processes of a unit, in any order: a clean stop, no second signal."""
    stage = set_stage(embedded, partitions=PARTITIONS)
    service = start_two(stage)
    children = list(pids(service).values())
    stage.ledger.answer(stage.ledger.operate("head", "k", statuses={404}))
    everybody = [*children, service.process.pid] if first == "the processes" else [service.process.pid, *children]

    for pid in everybody:
        os.kill(pid, signal.SIGTERM)

    assert service.wait_exit() == 0, service.obituary()
    assert [line["exit_code"] for line in service.log_lines() if line["event"] == "process ended"] == [0, 0]


@pytest.mark.slow
def test_no_process_outlives_its_supervisor(embedded: Broker, set_stage: SetStage) -> None:
    """The supervisor is killed and can do nothing: the kernel ends its processes."""
    stage = set_stage(embedded, partitions=PARTITIONS)
    service = start_two(stage)
    children = pids(service)
    assert all(map(lives, children.values()))

    service.kill()

    wait_until(lambda: not any(map(lives, children.values())), 10, "the processes to be gone")


@pytest.mark.slow
def test_what_no_process_can_start_with_is_an_exit_and_no_restart(embedded: Broker, set_stage: SetStage) -> None:
    """Contract 11: a missing topic is exit 2, as with one process."""
    stage = set_stage(embedded, runtime=TWO)
    stage.config["output"]["topic"] = embedded.unused_name("absent")

    service = stage.start(ready=False)

    assert service.wait_exit() == 2, service.obituary()
    assert stage.config["output"]["topic"] in service.log.read_text(encoding="utf-8")
    starts = Counter(line["process"] for line in service.log_lines() if line.get("event") == "process started")
    assert set(starts.values()) == {1}, "tried once each"


@pytest.mark.slow
def test_the_poison_limit_of_one_process_stops_them_all(embedded: Broker, set_stage: SetStage) -> None:
    """Contract 11: exit 4."""
    stage = set_stage(embedded, partitions=PARTITIONS)
    stage.config["dead_letter"] |= {"max_consecutive": 3, "on_limit": "stop"}
    service = start_two(stage)
    children = pids(service)

    for _ in range(3):
        stage.ledger.send(b"\x02", partition=0, kind="unknown", statuses={400})

    assert service.wait_exit() == 4, service.obituary()
    assert not any(map(lives, children.values()))


STUCK = """
import asyncio
import os

from consumer.storage import filesystem

genuine = filesystem.FilesystemBackend.put


async def put(self, *given):
    answer = await genuine(self, *given)
    if await asyncio.to_thread(is_the_stuck_one):
        await asyncio.Event().wait()
    return answer


def is_the_stuck_one():
    try:
        with open(PATH, "x", encoding="ascii") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        with open(PATH, encoding="ascii") as file:
            return file.read() == str(os.getpid())
    return True


filesystem.FilesystemBackend.put = put
"""
"""One of the processes comes no further than its uploads: a kill finds it between the tiers."""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("owner", "lease"), [(None, "2s"), ("pod-0", "10m")], ids=["by lease", "by name"])
def test_what_a_killed_process_left_between_the_tiers_is_cleaned_up(
    apache: Broker, set_stage: SetStage, owner: str | None, lease: str
) -> None:
    """LOG-5, LOG-6, contract 5: when the lease is over, by anybody; where owners are named, by its next run at once."""
    stage = set_stage(apache, partitions=PARTITIONS)
    change_log = {**stage.config["storage"]["change_log"], "owner": owner, "lease": lease}
    stage.config["storage"] |= {"threshold": "1KiB", "change_log": change_log}
    ledger, stuck = stage.ledger, stage.folder / "stuck"
    service = start_two(stage, environment=sabotage(stage.folder, STUCK.replace("PATH", repr(str(stuck)))))
    for number in range(1000):
        payload, partition = bytes(5000 + number % 7), number % PARTITIONS
        ledger.operate("insert", f"k{number % 40}", payload, statuses={201}, partition=partition, wait=False)
    service.wait(lambda: stuck.exists() and stuck.read_text(encoding="ascii").isdigit(), "a process to get stuck")
    victim = int(stuck.read_text(encoding="ascii"))
    (number,) = (number for number, pid in pids(service).items() if pid == victim)
    service.wait(lambda: entries_left(stage) > 0, "it to be between the tiers")
    os.kill(victim, signal.SIGKILL)

    def recovered() -> list[dict[str, Any]]:
        return [line for line in service.log_lines() if line.get("event") == "change log recovered"]

    service.wait(lambda: bool(recovered()), "what it left to be cleaned up", 60)
    ledger.flush()
    ledger.wait_answered(seconds=60)
    service.stop()
    path = stage.folder / "verify.yaml"
    path.write_text(json.dumps(stage.config), encoding="utf-8")
    verify = "storage", "verify", "--json", "--min-age", "0s", "--config", str(path)
    found = json.loads(command_line(*verify, cwd=stage.folder).stdout)

    assert (found["changes"], found["orphans"], found["dangling"]) == (0, [], [])
    if owner is not None:
        assert {line["process"] for line in recovered()} == {number}, "nobody else may before the lease is over"


def entries_left(stage: Stage) -> int:
    """How many changes the file holds."""
    with closing(sqlite3.connect(stage.config["storage"]["high_volume"]["path"], timeout=30)) as file:
        found: tuple[int] = file.execute("SELECT count(*) FROM change_log_entries").fetchone()
    return found[0]
