"""Starting and stopping: exit codes, signals, health, and what is said about a wrong configuration."""

from __future__ import annotations

import json
import signal
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from brokers import Broker, noida_broker, unused_port, wait_until
from outages import locked
from sabotage import sabotage
from service_process import ServiceProcess, command_line, settings
from stages import SetStage, Stage, set_up


@pytest.fixture
def unconnected(tmp_path: Path) -> Iterator[ServiceProcess]:
    """A service whose broker does not exist."""
    config = settings(tmp_path, kafka={"bootstrap_servers": [f"127.0.0.1:{unused_port()}"]})
    service = ServiceProcess(tmp_path, config)
    yield service
    service.kill()


@pytest.fixture
def breakable(tmp_path: Path) -> Iterator[Stage]:
    """A stage on an embedded broker of its own, which the test may freeze; nothing is started on it."""
    with noida_broker(tmp_path) as own:
        stage = set_up(own, tmp_path, 2, 2)
        yield stage
        own.node.thaw()
        stage.put_down()


@pytest.mark.process
@pytest.mark.slow
def test_without_a_broker_it_lives_is_not_ready_and_stops_cleanly(unconnected: ServiceProcess) -> None:
    """Contract 6, 8, 11: an unreachable broker is no exit; health is not tied to Kafka; SIGTERM still exits 0."""
    unconnected.wait(lambda: unconnected.get("/healthz")[0] == 200, "health")
    status, body = unconnected.get("/readyz")
    answer = json.loads(body)

    unconnected.stop()

    assert (status, answer["ready"]) == (503, False)
    assert answer["reasons"]
    assert all(isinstance(reason, str) for reason in answer["reasons"])


@pytest.mark.broker
@pytest.mark.slow
def test_a_broker_that_comes_late_is_found(tmp_path: Path) -> None:
    """Contract 6: the service goes on trying, and works once the broker is there."""
    port = unused_port()
    with noida_broker(tmp_path, port) as early:
        stage = set_up(early, tmp_path, 2, 2)
    try:
        service = stage.start(ready=False)
        service.wait(lambda: service.get("/healthz")[0] == 200, "health")
        assert not service.ready
        with noida_broker(tmp_path, port):
            service.wait_ready(partitions=2)
            stage.ledger.answer(stage.ledger.operate("head", "late", statuses={404}))
            service.stop()
    finally:
        stage.put_down()


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["input", "output", "dead_letter"])
def test_a_missing_topic_is_an_exit_that_names_it(broker: Broker, set_stage: SetStage, missing: str) -> None:
    """Contract 6 and 11: with `topics.create: false`, exit 2."""
    stage = set_stage(broker)
    absent = broker.unused_name("absent")
    stage.config[missing] |= {"topics": [absent]} if missing == "input" else {"topic": absent}

    service = stage.start(ready=False)

    assert service.wait_exit() == 2, service.obituary()
    assert absent in service.log.read_text(encoding="utf-8")
    assert absent not in broker.admin.list_topics(timeout=20).topics, "looking for a topic must not create it"


@pytest.mark.slow
def test_missing_topics_are_created_where_that_is_asked_for(broker: Broker, set_stage: SetStage) -> None:
    """Contract 6: `topics.create: true` makes what is missing, with the partitions and replication asked for."""
    stage = set_stage(broker, topics={"create": True, "partitions": 3, "replication_factor": 1})
    absent = broker.unused_name("created")
    stage.config["output"]["topic"] = absent

    service = stage.start(partitions=2)
    service.stop()

    assert len(broker.admin.list_topics(timeout=20).topics[absent].partitions) == 3


@pytest.mark.slow
def test_a_compacted_output_topic_is_refused_unless_allowed(apache: Broker, set_stage: SetStage) -> None:
    """Contract 2.3: exit 2; with `output.allow_compacted` a null key is replaced by the response id."""
    stage = set_stage(apache)
    stage.config["output"]["topic"] = apache.create_topic("compacted", 2, cleanup_policy="compact")
    refused = stage.start(ready=False)
    assert refused.wait_exit() == 2, refused.obituary()
    assert stage.config["output"]["topic"] in refused.log.read_text(encoding="utf-8")

    allowed = set_stage(apache)
    allowed.config["output"] |= {"topic": stage.config["output"]["topic"], "allow_compacted": True}
    allowed.ledger.close()
    allowed.ledger = type(allowed.ledger)(
        apache, allowed.ledger.input, allowed.config["output"]["topic"], allowed.ledger.dead_letter
    )
    service = allowed.start(partitions=2)
    (entry,) = allowed.ledger.operate("head", "none", statuses={404})
    allowed.ledger.wait_answered()
    service.stop()

    assert allowed.ledger.answers[entry.id][0].key == entry.id.encode()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_stops_an_idle_service_cleanly(
    embedded: Broker, set_stage: SetStage, number: signal.Signals
) -> None:
    """Contract 11, I12: exit 0, nothing on stdout, no task left behind, and quickly."""
    stage = set_stage(embedded)
    service = stage.start(partitions=2)
    stage.ledger.answer(stage.ledger.operate("head", "x", statuses={404}))
    began = time.monotonic()

    service.process.send_signal(number)

    assert service.wait_exit() == 0, service.obituary()
    assert time.monotonic() - began < 5
    assert service.output.read_bytes() == b""
    log = service.log.read_text(encoding="utf-8")
    assert not [text for text in ("Traceback", "never retrieved", "was destroyed but it is pending") if text in log]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_is_clean_also_while_the_service_is_still_being_loaded(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Contract 11: a pod may be told to go before it has begun; as process 1 it would not hear it without a handler."""
    slow_disk = """
        import pathlib, sys, time

        class SlowDisk:
            def find_spec(self, name, *_):
                if name == "consumer.app":
                    pathlib.Path("loading").touch()
                    time.sleep(60)

        sys.meta_path.insert(0, SlowDisk())
    """
    config = settings(tmp_path, kafka={"bootstrap_servers": [f"127.0.0.1:{unused_port()}"]})
    service = ServiceProcess(tmp_path, config, **sabotage(tmp_path, textwrap.dedent(slow_disk)))
    wait_until((tmp_path / "loading").exists, 30, "the service to be loaded")

    service.process.send_signal(number)

    assert service.wait_exit() == 0, service.obituary()
    assert "Traceback" not in service.log.read_text(encoding="utf-8")


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_exits_at_once(breakable: Stage, number: signal.Signals, code: int) -> None:
    """Contract 11: the first one drains, here against a frozen broker; the second one does not wait for it."""
    service = breakable.start(partitions=2)
    for partition in (0, 1):
        breakable.ledger.operate("insert", f"k{partition}", bytes(100), partition=partition)
    breakable.ledger.wait_answered()
    breakable.broker.node.freeze()
    service.process.send_signal(number)
    service.wait(lambda: service.state().get("state") == "draining", "the drain to begin")
    began = time.monotonic()

    service.process.send_signal(number)

    assert service.wait_exit() == code, service.obituary()
    assert time.monotonic() - began < 2


@pytest.mark.broker
@pytest.mark.slow
def test_a_drain_that_cannot_end_is_cut_at_its_deadline_and_reported(breakable: Stage) -> None:
    """Contract 11: at most drain_timeout + 15 s in all, then exit 1; a restart answers what was not committed."""
    breakable.config["rebalance"] |= {"drain_timeout": "2s"}
    service = breakable.start(partitions=2)
    ledger = breakable.ledger
    ledger.answer(ledger.operate("insert", "before", b"x", statuses={201}))
    with locked(breakable.config["storage"]["high_volume"]["path"]):
        for number in range(200):
            ledger.operate("insert", f"k{number}", bytes(1000), partition=number % 2, statuses={201}, wait=False)
        ledger.flush()
        service.wait(lambda: any(one["in_flight"] for one in service.partitions().values()), "work in flight")
        breakable.broker.node.freeze()
        began = time.monotonic()

        service.terminate()
        code = service.wait_exit()
        took = time.monotonic() - began
        breakable.broker.node.thaw()
    assert code == 1, service.obituary()
    assert took < 2 + 15
    log = service.log.read_text(encoding="utf-8")
    assert "never retrieved" not in log
    assert "stop deadline reached" not in log, "each step has its own"

    again = breakable.start(partitions=2)
    ledger.wait_answered()
    again.stop()
    assert (ledger.verdict().missing, ledger.verdict().mismatched) == ([], [])


STEPS_HANG = """
import asyncio, threading, time

from consumer.admin import AdminServer
from consumer.kafka.publisher import Publisher
from consumer.storage.tiered import TieredStorage


async def hang(*_arguments):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass


Publisher.stop = TieredStorage.join = TieredStorage.close = AdminServer.stop = hang
"""


@pytest.mark.slow
def test_steps_of_the_stop_that_hang_are_left_behind_one_after_the_other(embedded: Broker, set_stage: SetStage) -> None:
    """Contract 11: each has its own deadline; what they leave running does not keep the process from ending."""
    stage = set_stage(embedded)
    service = stage.start(partitions=2, environment=sabotage(stage.folder, STEPS_HANG))
    stage.ledger.answer(stage.ledger.operate("insert", "before", b"x", statuses={201}))

    service.terminate()

    assert service.wait_exit() == 0, "everything was answered and committed"
    lines = service.log_lines()
    assert [line["step"] for line in lines if "did not end in time" in str(line.get("event"))] == [
        "publisher",
        "storage's clean-ups",
        "storage",
        "admin port",
    ]
    assert not [line for line in lines if line.get("event") == "stop deadline reached, ending at once"]
    assert sum(stage.ledger.committed(stage.group).values()) == 1


# ---------------------------------------------------------------------------------------------------- configuration


def run_with(folder: Path, config: Any, **environment: str) -> tuple[int, str]:
    """Run the service with this configuration text or tree to its end: exit code and stderr."""
    path = folder / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config), encoding="utf-8")
    done = command_line("run", "--config", str(path), cwd=folder, environment=environment)
    assert done.stdout == "", "data goes to stdout, and there is none"
    return done.returncode, done.stderr


@pytest.mark.process
@pytest.mark.slow
def test_all_mistakes_of_a_configuration_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    """Contract 6 and 11: unknown keys with a suggestion, wrong values, wrong environment names: exit 2."""
    text = "kafka:\n  bootstrap_server: [x:1]\nconcurrency:\n  limit: many\nwindow:\n  fraction: 1.5\n"

    code, errors = run_with(tmp_path, text, TIERSTREAM_KAFKA__GROUP="g")

    assert code == 2, errors
    for expected in ("bootstrap_servers", ":2", "limit", ":4", "fraction", ":6", "TIERSTREAM_KAFKA__GROUP"):
        assert expected in errors, f"{expected} is not in\n{errors}"
    assert "Traceback" not in errors


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rebalance": {"drain_timeout": "90s"}}, ("drain_timeout", "rebalance.timeout")),
        ({"limits": {"record_bytes": "512MiB"}}, ("record_bytes", "in_flight_bytes")),
        ({"limits": {"response_bytes": "3MiB"}}, ("response_bytes", "max_request_bytes")),
        ({"kafka": {"heartbeat_interval": "30s"}}, ("heartbeat", "session")),
    ],
    ids=["drain", "record", "response", "heartbeat"],
)
def test_settings_that_contradict_each_other_are_refused_naming_both(
    tmp_path: Path, config: dict[str, Any], named: tuple[str, str]
) -> None:
    """Contract 6: relations between settings are checked at start."""
    code, errors = run_with(tmp_path, config)

    assert code == 2, errors
    assert all(name in errors for name in named), errors


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    "config", ["kafka: [unclosed\n", "- a\n- list\n", "kafka: 5\n", "\x00"], ids=["syntax", "list", "scalar", "binary"]
)
def test_a_file_that_is_no_configuration_is_refused_without_a_trace(tmp_path: Path, config: str) -> None:
    """Contract 11: usage or configuration: exit 2, in words."""
    code, errors = run_with(tmp_path, config)

    assert code == 2, errors
    assert "config.yaml" in errors
    assert "Traceback" not in errors


@pytest.mark.process
@pytest.mark.slow
def test_a_configuration_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    """Contract 11: exit 2, naming the file."""
    done = command_line("run", "--config", "nowhere.yaml", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.yaml" in done.stderr
