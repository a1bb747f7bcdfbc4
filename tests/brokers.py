"""Kafka brokers for the tests: started when the first test asks, stopped at the end, on ports of their own.

Two brokers for tests, each started at most once a run:

``noida-db``
    An embedded development broker that comes with the test environment. Always there.
``apache``
    Apache Kafka itself: the broker named by ``TIERSTREAM_TEST_BOOTSTRAP``, else one from Maven where there are ``java``
    and ``mvn`` (the jars are kept in ``.cache/kafka``), else one from Docker. Where none can be had its tests are
    skipped and say why; with ``TIERSTREAM_REQUIRE_KAFKA=1`` they fail. ``TIERSTREAM_REQUIRE_DOCKER=1`` takes Docker
    and nothing else.

Beside them there are brokers that one test or program has for itself, and may do to what it likes: `maven_broker`, of
one node or of several.

A test that takes the fixture ``broker`` runs on both. The head and the end of a run say which brokers there were.
Every wait is bounded; every process is started here, in a session of its own, and only such are ever stopped.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # documented, and not all in __all__
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    OffsetSpec,
)
from confluent_kafka.cimpl import NewTopic

ROOT = Path(__file__).parents[1]
POM = Path(__file__).with_name("kafka") / "pom.xml"

START_SECONDS = 60
"""A broker that does not answer by then will not: Apache Kafka needs 4 s on two idle cores."""

STOP_SECONDS = 10
DOWNLOAD_SECONDS = 300
IMAGE_SECONDS = 300
ADMIN_SECONDS = 30

TEST_SECONDS = 120
"""A test with a broker is bounded by this unless it says otherwise; the start of the broker is not counted."""

SINGLE_NODE = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "auto.create.topics.enable": "false",
    "message.max.bytes": "16777216",
}
"""What Apache Kafka needs to run alone, with limits raised so that a record can carry a long-term object."""

REPLICATED = {
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
    "min.insync.replicas": "2",
    "log.cleaner.dedupe.buffer.size": "4194304",  # of 128 MiB, which a small heap has not
}
"""What nodes have beside that where there are several: one of three may be away, and nothing acknowledged is lost."""

REPLICAS_MAX = 3

RETURNS_QUICKLY = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
"""A node that was killed is let in again after its old session, of 9 s unless told otherwise; and where there are
several, they take over so long after it has fallen silent."""

_names = itertools.count(1)


class BrokerUnavailableError(Exception):
    """This machine cannot provide the broker; the text says what is missing."""


@dataclass
class Broker:
    """A running broker. ``kind`` is ``noida-db`` or ``apache``; ``label`` says what it is and where it came from."""

    kind: str
    label: str
    bootstrap: str
    record_bytes_max: int
    """Largest record it can be made to accept."""
    log: Path | None = None
    """What its process printed."""
    nodes: Sequence[Node] = ()
    """Its processes, to be frozen and killed; empty where they are not ours alone."""
    _admin: AdminClient | None = field(default=None, repr=False)

    @property
    def node(self) -> Node:
        """Its process, where it is ours alone and the only one."""
        assert len(self.nodes) == 1, f"{self.label} is not one process of ours"
        return self.nodes[0]

    @property
    def replicas(self) -> int:
        """How many of its nodes have each partition."""
        return min(REPLICAS_MAX, max(1, len(self.nodes)))

    @property
    def admin(self) -> AdminClient:
        """An administration client, shared."""
        if self._admin is None:
            self._admin = AdminClient(
                {"bootstrap.servers": self.bootstrap, "socket.timeout.ms": ADMIN_SECONDS * 1000, "log_level": 0}
            )
        return self._admin

    def create_topic(self, name: str, partitions: int = 1, **config: str | int) -> str:
        """Create a topic under a name that no other test has, beginning with *name*; return it.

        Settings are given with underscores: ``max_message_bytes=4096``.
        """
        unique = f"{name}-{os.getpid()}-{next(_names)}"
        settings = {key.replace("_", "."): str(value) for key, value in config.items()}
        topic = NewTopic(unique, num_partitions=partitions, replication_factor=self.replicas, config=settings)
        self._settle(self.admin.create_topics([topic], operation_timeout=ADMIN_SECONDS))
        asked = {TopicPartition(unique, partition): OffsetSpec.latest() for partition in range(partitions)}

        def led() -> bool:
            # Known is not enough: for a moment after its creation a partition has no leader that answers. Who has asked
            # in that moment goes on believing it, unless metadata are asked for expressly.
            try:
                self.admin.list_topics(unique, timeout=ADMIN_SECONDS)
                self._settle(self.admin.list_offsets(asked, request_timeout=ADMIN_SECONDS))
            except KafkaException:
                self._admin = None  # one client may go on believing for ever that a new partition has no leader
                return False
            return True

        wait_until(led, ADMIN_SECONDS, f"the {partitions} partitions of {unique} to be led")
        return unique

    def alter_topic(self, topic: str, **config: str | int) -> None:
        """Change settings of a topic, given as to `create_topic`."""
        self._alter(ConfigResource.Type.TOPIC, topic, config)

    def alter_brokers(self, **config: str | int) -> None:
        """Change settings that all brokers take while they run, written as those of topics."""
        for broker in self.admin.list_topics(timeout=ADMIN_SECONDS).brokers:
            self._alter(ConfigResource.Type.BROKER, str(broker), config)

    def _alter(self, kind: Any, name: str, config: Mapping[str, str | int]) -> None:
        entries = [
            ConfigEntry(key.replace("_", "."), str(value), incremental_operation=AlterConfigOpType.SET)
            for key, value in config.items()
        ]
        resource = ConfigResource(kind, name, incremental_configs=entries)
        self._settle(self.admin.incremental_alter_configs([resource]))

    def delete_topic(self, topic: str) -> None:
        """Delete a topic; its records are gone at once for readers that look it up anew."""
        self._settle(self.admin.delete_topics([topic], operation_timeout=ADMIN_SECONDS))

    def unused_name(self, name: str) -> str:
        """A topic or group name beginning with *name* that nothing else in this run has."""
        return f"{name}-{os.getpid()}-{next(_names)}"

    @staticmethod
    def _settle(answers: Mapping[Any, Future[Any]]) -> None:
        for answer in answers.values():
            answer.result(timeout=ADMIN_SECONDS + 5)


def wait_until(condition: Callable[[], bool], seconds: float, what: str, *, every: float = 0.05) -> None:
    """Return once *condition* holds; fail the test, naming *what* was awaited, after *seconds*."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(every)


def unused_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def dies_with_us() -> list[str]:
    """A command prefix that lets a child end with the test run, also when that is killed, where the system has one."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def tail(path: Path, lines: int = 30) -> str:
    """The last lines of a log file."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def answers(bootstrap: str) -> bool:
    """Whether a broker answers at *bootstrap*; gives it two seconds."""
    host, _, port = bootstrap.rpartition(":")
    try:
        # Asking with a Kafka client before anything listens makes it wait for its reconnect backoff.
        socket.create_connection((host, int(port)), timeout=2).close()
        AdminClient({"bootstrap.servers": bootstrap, "log_level": 0}).list_topics(timeout=2)
    except (OSError, KafkaException):
        return False
    return True


class Node:
    """A broker's process. A test may stop, kill or freeze it, and start it again: same ports, same data."""

    def __init__(self, command: list[str], bootstrap: str, log: Path) -> None:
        self.bootstrap = bootstrap
        self.log = log
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process started last."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait for its first answer.

        Raises:
            BrokerUnavailableError: it ended, or did not answer in time; the text ends with its last words.
        """
        self.launch()
        self.wait_answers()

    def launch(self) -> None:
        """Start it; of several nodes none answers before most of them run."""
        with self.log.open("ab") as sink:
            self._process = subprocess.Popen(
                [*dies_with_us(), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,  # Ctrl-C ends the tests first, then they end the broker
            )

    def wait_answers(self) -> None:
        """Wait for its first answer.

        Raises:
            BrokerUnavailableError: it ended, or did not answer in time; the text ends with its last words.
        """
        process, name = self._process, self._command[0]
        assert process is not None
        deadline = time.monotonic() + START_SECONDS
        while not answers(self.bootstrap):
            if process.poll() is not None:
                raise BrokerUnavailableError(f"{name} exited with {process.returncode}:\n{tail(self.log)}")
            if time.monotonic() > deadline:
                raise BrokerUnavailableError(f"{name} did not answer within {START_SECONDS} s:\n{tail(self.log)}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Let it end as its operators would; kill it if that takes too long."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        self._process.send_signal(signal.SIGCONT)  # a test may have frozen it
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_SECONDS)

    def freeze(self) -> None:
        """Stop it where it stands, and wait until it does: connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it go on; a dead one stays dead."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def bring_back(self) -> None:
        """Have it running again, whatever was done to it.

        Raises:
            BrokerUnavailableError: it did not start.
        """
        assert self._process is not None
        self.thaw()
        if self._process.poll() is not None:
            self.start()


@contextmanager
def _running(nodes: Sequence[Node]) -> Iterator[None]:
    """Run a broker's processes from their first answers to the end of the block.

    Raises:
        BrokerUnavailableError: one did not start.
    """
    with ExitStack() as started:
        for node in nodes:
            started.callback(node.stop)
            node.launch()
        for node in nodes:
            node.wait_answers()
        yield


def noida_command() -> str:
    """The embedded broker's own program: its Python wrapper would only stand between us and the process.

    Raises:
        BrokerUnavailableError: it is not installed.
    """
    try:
        import noida_db
    except ImportError as error:
        raise BrokerUnavailableError("the package noida-db is not installed") from error
    program = Path(noida_db.__file__).with_name("noida-db")
    if not os.access(program, os.X_OK):
        raise BrokerUnavailableError(f"{program.name} is not executable")
    return str(program)


@contextmanager
def noida_broker(folder: Path, port: int | None = None) -> Iterator[Broker]:
    """Run the embedded broker on *port* (default: a free one) with its data in *folder*."""
    port = port or unused_port()
    log = folder / "noida-db.log"
    command = [
        noida_command(),
        "start",
        "--only",
        "kafka",
        "--kafka-port",
        str(port),
        "--data-dir",
        str(folder / "data"),
    ]
    node = Node(command, f"127.0.0.1:{port}", log)
    with _running([node]):
        yield Broker("noida-db", "noida-db", node.bootstrap, record_bytes_max=1_000_000, log=log, nodes=[node])


def kafka_version() -> str:
    """The version of Apache Kafka the tests are made for: what tests/kafka/pom.xml says."""
    found = re.search(
        r"<artifactId>kafka_[\d.]+</artifactId>\s*<version>([\d.]+)</version>", POM.read_text(encoding="utf-8")
    )
    assert found
    return found[1]


def kafka_jars() -> Path:
    """The folder with the broker's jars; the first time Maven fills it.

    Raises:
        BrokerUnavailableError: the download failed or took too long.
    """
    jars = ROOT / ".cache" / "kafka" / hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    if jars.is_dir():
        return jars
    jars.parent.mkdir(parents=True, exist_ok=True)
    # Filled beside its place and renamed, so that an interrupted download never looks complete.
    with tempfile.TemporaryDirectory(dir=jars.parent, prefix="download-") as fresh:
        command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", f"-DoutputDirectory={fresh}/jars"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BrokerUnavailableError(f"mvn did not fetch Kafka within {DOWNLOAD_SECONDS} s") from error
        if done.returncode != 0:
            raise BrokerUnavailableError(f"mvn could not fetch Kafka:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        try:
            (Path(fresh) / "jars").rename(jars)
        except OSError:
            if not jars.is_dir():  # else another run was quicker, with the same jars
                raise
    return jars


@dataclass(frozen=True, slots=True)
class Listener:
    """One more listener of Apache Kafka. With a proxy before it, *advertised* is the proxy's port."""

    name: str
    protocol: str
    port: int
    advertised: int


@contextmanager
def maven_broker(
    folder: Path,
    settings: Mapping[str, str] | None = None,
    *,
    nodes: int = 1,
    proxied: tuple[int, int] | None = None,
    listeners: Sequence[Listener] = (),
    java_settings: Sequence[str] = (),
) -> Iterator[Broker]:
    """Run Apache Kafka from Maven's jars with its data in *folder*, and with *settings* of its own.

    With several *nodes* each is broker and controller, and three of them have each partition (`REPLICATED`). *proxied*
    is the port of a second listener, and the port of the proxy before it: who comes through the proxy is told to go on
    coming through it. *listeners* are further ones, which only a single node has, and *java_settings* arguments of the
    virtual machine.

    Raises:
        BrokerUnavailableError: a node did not start.
    """
    if proxied is not None:
        listeners = [*listeners, Listener("PROXIED", "PLAINTEXT", *proxied)]
    assert nodes == 1 or not listeners
    controllers = [unused_port() for _ in range(nodes)]
    voters = [f"{number}@127.0.0.1:{port}" for number, port in enumerate(controllers, 1)]
    shared = {
        "controller.quorum.voters": ",".join(voters),
        **(REPLICATED if nodes > 1 else {}),
        **(settings or {}),
    }
    run = [
        _prepared_node(folder, number, controller, shared, listeners, java_settings)
        for number, controller in enumerate(controllers, 1)
    ]
    with _running(run):
        label = f"Apache Kafka {kafka_version()} (Maven)"
        bootstrap = ",".join(node.bootstrap for node in run)
        yield Broker("apache", label, bootstrap, record_bytes_max=16_000_000, log=run[0].log, nodes=run)


def _prepared_node(
    folder: Path,
    number: int,
    controller: int,
    settings: Mapping[str, str],
    listeners: Sequence[Listener],
    java_settings: Sequence[str],
) -> Node:
    """Write the settings of one node of Apache Kafka and format its folder; *controller* is its port as one.

    Raises:
        BrokerUnavailableError: it could not format its folder.
    """
    port = unused_port()
    classpath = f"{kafka_jars()}/*"
    config = folder / f"server-{number}.properties"
    places = {
        "node.id": str(number),
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "listener.security.protocol.map": SINGLE_NODE["listener.security.protocol.map"],
        "inter.broker.listener.name": "PLAINTEXT",
        "log.dirs": str(folder / f"data-{number}"),
    }
    for listener in listeners:
        places["listeners"] += f",{listener.name}://127.0.0.1:{listener.port}"
        places["advertised.listeners"] += f",{listener.name}://127.0.0.1:{listener.advertised}"
        places["listener.security.protocol.map"] += f",{listener.name}:{listener.protocol}"
    properties = SINGLE_NODE | places | dict(settings)
    config.write_text("".join(f"{key}={value}\n" for key, value in properties.items()), encoding="utf-8")
    # Short-lived JVMs on few cores: the quick compiler alone and the simplest collector start fastest.
    java = ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
    cluster = "dGllcnN0cmVhbS10ZXN0cw"  # 16 bytes in URL-safe base64, as Kafka wants its cluster ids
    done = subprocess.run(
        [*java, "-cp", classpath, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(config)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise BrokerUnavailableError(f"Kafka could not format its folder:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    program = [*java, "-Xmx512m", *java_settings, "-cp", classpath, "kafka.Kafka", str(config)]
    return Node(program, f"127.0.0.1:{port}", folder / f"kafka-{number}.log")


@contextmanager
def docker_broker() -> Iterator[Broker]:
    """Run Apache Kafka as a container, one node."""
    port = unused_port()
    listeners = {
        "listeners": "PLAINTEXT://:9092,CONTROLLER://:9093",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "controller.quorum.voters": "1@localhost:9093",
    }
    environment = [
        part
        for key, value in (SINGLE_NODE | listeners).items()
        for part in ("--env", f"KAFKA_{key.replace('.', '_').upper()}={value}")
    ]
    image = f"apache/kafka:{kafka_version()}"
    command = ["docker", "run", "--rm", "--detach", "--publish", f"127.0.0.1:{port}:9092", *environment, image]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=IMAGE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BrokerUnavailableError(f"docker did not start {image} within {IMAGE_SECONDS} s") from error
    if done.returncode != 0:
        raise BrokerUnavailableError(f"docker could not start {image}:\n{done.stderr[-2000:]}")
    container = done.stdout.strip()
    try:
        wait_until(lambda: answers(f"127.0.0.1:{port}"), START_SECONDS, f"{image} to answer", every=0.2)
        label = f"Apache Kafka {kafka_version()} (Docker)"
        yield Broker("apache", label, f"127.0.0.1:{port}", record_bytes_max=16_000_000)
    finally:
        subprocess.run(["docker", "rm", "--force", container], capture_output=True, timeout=IMAGE_SECONDS, check=False)


@cache
def docker_engine() -> bool:
    """Whether a Docker engine answers; the command alone is not enough."""
    if shutil.which("docker") is None:
        return False
    try:
        asked = subprocess.run(["docker", "version"], capture_output=True, timeout=5, check=False)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0


def apache_source() -> str:
    """Where Apache Kafka would come from: ``given``, ``maven``, ``docker``; empty if from nowhere."""
    if os.environ.get("TIERSTREAM_REQUIRE_DOCKER") == "1":
        return "docker"
    if os.environ.get("TIERSTREAM_TEST_BOOTSTRAP"):
        return "given"
    if shutil.which("java") and shutil.which("mvn"):
        return "maven"
    return "docker" if docker_engine() else ""


@contextmanager
def apache_broker(folder: Path) -> Iterator[Broker]:
    """Provide Apache Kafka from wherever this machine has it.

    Raises:
        BrokerUnavailableError: from nowhere, or it did not start.
    """
    match apache_source():
        case "given":
            bootstrap = os.environ["TIERSTREAM_TEST_BOOTSTRAP"]
            if not answers(bootstrap.partition(",")[0]):
                raise BrokerUnavailableError(f"no broker answers at TIERSTREAM_TEST_BOOTSTRAP={bootstrap}")
            yield Broker("apache", f"the broker at {bootstrap}", bootstrap, record_bytes_max=16_000_000)
        case "maven":
            with maven_broker(folder) as broker:
                yield broker
        case "docker":
            with docker_broker() as broker:
                yield broker
        case _:
            raise BrokerUnavailableError("Apache Kafka needs java and mvn, or Docker, or TIERSTREAM_TEST_BOOTSTRAP")


# ---------------------------------------------------------------------------------------------------- pytest

STARTED = pytest.StashKey[list[str]]()


class _Brokers:
    """The brokers of one test run: each started on first use, its failure to start remembered."""

    def __init__(self, config: pytest.Config, folder: Path, stack: ExitStack) -> None:
        self._config = config
        self._folder = folder
        self._stack = stack
        self._known: dict[str, Broker | BrokerUnavailableError] = {}

    def get(self, kind: str) -> Broker:
        """The running broker of this kind. Skips, or where the broker is required fails, the asking test."""
        if kind not in self._known:
            self._known[kind] = self._start(kind)
        known = self._known[kind]
        if isinstance(known, Broker):
            return known
        required = kind == "noida-db" or "1" in {
            os.environ.get("TIERSTREAM_REQUIRE_KAFKA"),
            os.environ.get("TIERSTREAM_REQUIRE_DOCKER"),
        }
        if required:
            pytest.fail(f"required broker {kind}: {known}", pytrace=False)
        pytest.skip(f"no broker {kind}: {known}")

    def _start(self, kind: str) -> Broker | BrokerUnavailableError:
        folder = self._folder / kind
        folder.mkdir()
        began = time.monotonic()
        try:
            broker = self._stack.enter_context(noida_broker(folder) if kind == "noida-db" else apache_broker(folder))
        except BrokerUnavailableError as error:
            self._config.stash[STARTED].append(f"{kind}: not available: {str(error).partition(':')[0]}")
            return error
        self._config.stash[STARTED].append(f"{broker.label}, up in {time.monotonic() - began:.1f} s")
        return broker


@pytest.fixture(scope="session")
def _brokers(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Brokers]:
    with ExitStack() as stack:
        yield _Brokers(pytestconfig, tmp_path_factory.mktemp("brokers"), stack)


@pytest.fixture(params=["noida-db", pytest.param("apache", marks=pytest.mark.apache)])
def broker(request: pytest.FixtureRequest, _brokers: _Brokers) -> Broker:
    """Each broker in turn: the test runs once on each."""
    return _brokers.get(request.param)


@pytest.fixture(scope="session")
def embedded(_brokers: _Brokers) -> Broker:
    """The embedded broker alone, for tests whose subject is not the broker."""
    return _brokers.get("noida-db")


@pytest.fixture
def apache(_brokers: _Brokers) -> Broker:
    """Apache Kafka alone, for what the embedded broker cannot show."""
    return _brokers.get("apache")


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the list of started brokers."""
    config.stash[STARTED] = []


def pytest_report_header() -> str:
    """Say which brokers the run could use."""
    return f"brokers: noida-db, apache from {apache_source() or 'nowhere (its tests are skipped)'}"


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by the brokers it asks for, so that `-m "not broker"` means what it says."""
    for item in items:
        asked = set(getattr(item, "fixturenames", ()))
        if asked & {"broker", "embedded", "apache"}:
            item.add_marker(pytest.mark.broker)
            # The first test to ask for a broker waits for its start, perhaps its download: bounded there, not here.
            own = item.get_closest_marker("timeout")
            item.add_marker(pytest.mark.timeout(own.args[0] if own else TEST_SECONDS, func_only=True), append=False)
        if "apache" in asked:
            item.add_marker(pytest.mark.apache)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say which brokers the run did use."""
    for line in config.stash[STARTED]:
        terminalreporter.write_line(f"broker used: {line}")
