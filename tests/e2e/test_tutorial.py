"""The documentation's commands, run: the tutorial from its beginning to its end, and what other pages show beside it.

What a reader would have to type is taken from the pages as it stands. Three things are replaced, as the suite shares
its machine: the ports, the number of records of the last part, and the environment, which is the suite's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers import Broker, dies_with_us, kafka_jars, noida_command, tail, unused_port, wait_until
from service_process import clean_environment, command_line
from shown import ALONE, OWN_KAFKA, ROOT, SHELL, STORY, TOPICS, blocks, commands_of

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.broker, pytest.mark.timeout(300)]

START_SECONDS = 60
COMMAND_SECONDS = 120
MAVEN_SECONDS = 240

RECORDS_SHOWN, RECORDS = "20000", "4000"

JAVA = "mvn -q -f docs/java package dependency:copy-dependencies\n"


def shell_block(beginning: str) -> str:
    """The tutorial's block that begins so."""
    (found,) = [text for text in blocks(STORY, *SHELL) if text.startswith(beginning)]
    return found


class Reader:
    """Somebody who follows the tutorial: a folder that looks like the checkout, and what was started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.admin = unused_port(), unused_port()
        for name in ("schemas", "consumer"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "docs" / "java").mkdir(parents=True)
        (folder / "venv").symlink_to(Path(sys.executable).parent.parent)
        self.started: list[subprocess.Popen[bytes]] = []
        self.environment = clean_environment(
            PATH=f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}",
            TIERSTREAM_KAFKA__BOOTSTRAP_SERVERS=f"127.0.0.1:{self.port}",
            TIERSTREAM_ADMIN__PORT=str(self.admin),
        )
        del self.environment["PYTHONPATH"]

    def typed(self, text: str) -> str:
        """What the reader types for a block: with this machine's ports."""
        return text.replace("9092", str(self.port)).replace("9464", str(self.admin)).replace(RECORDS_SHOWN, RECORDS)

    def run(self, text: str) -> str:
        """Run a block to its end; return what it printed."""
        done = subprocess.run(
            [*dies_with_us(), "sh", "-e", "-c", self.typed(text)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}\n{self.logs()}"
        return done.stdout

    def start(self, text: str, name: str) -> subprocess.Popen[bytes]:
        """Run a block that stays in the foreground, in a terminal of its own."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*dies_with_us(), "sh", "-e", "-c", f"exec {self.typed(text)}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def start_service(self) -> subprocess.Popen[bytes]:
        """Start the service, and wait as the tutorial does."""
        service = self.start(shell_block("venv/bin/tierstream run"), "service")
        health = self.typed(shell_block("venv/bin/tierstream health"))

        def ready() -> bool:
            assert service.poll() is None, self.logs()
            done = subprocess.run(health, shell=True, cwd=self.folder, env=self.environment, check=False, timeout=30)
            return done.returncode == 0

        wait_until(ready, START_SECONDS, f"the service to be ready\n{self.logs()}", every=0.5)
        return service

    def logs(self) -> str:
        """The ends of the logs."""
        return "\n".join(f"--- {log.name}\n{tail(log)}" for log in self.folder.glob("*.log"))

    def write(self, number: int, name: str) -> None:
        """Write the tutorial's Python block of that number into the file it is meant to be."""
        assert f"`{name}`" in STORY.read_text(encoding="utf-8")
        (self.folder / name).write_text(self.typed(blocks(STORY, "python")[number]), encoding="utf-8")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Part 1 of the tutorial: a broker and a service, each started as it says."""
    noida_command()  # the extra `demo`
    reader = Reader(tmp_path_factory.mktemp("checkout"))
    reader.start(shell_block("venv/bin/tierstream broker"), "broker")
    log = reader.folder / "broker.log"
    wait_until(lambda: b"Ctrl-C ends it" in log.read_bytes(), START_SECONDS, "the broker's address")
    reader.start_service()
    yield reader
    for process in reversed(reader.started):
        process.kill()
        process.wait(20)


def test_operations_as_lines(reader: Reader) -> None:
    """Part 2: four responses, in order, in one partition."""
    printed = reader.run(shell_block("cat > operations.jsonl"))

    responses = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    ours = [one for one in responses if one["request_id"] in {"1", "2", "3", "4"}]
    assert [(one["request_id"], one["status"]) for one in ours] == [("1", 201), ("2", 200), ("3", 204), ("4", 404)]
    assert len({one["partition"] for one in ours}) == 1


def test_ones_own_producer_in_python(reader: Reader) -> None:
    """Part 3: by the client, and by any client; both are answered."""
    reader.write(0, "client.py")
    assert "not really a picture" in reader.run(shell_block("venv/bin/python client.py"))

    reader.write(1, "producer.py")
    printed = reader.run(shell_block("venv/bin/python producer.py"))
    responses = {one["request_id"]: one for one in map(json.loads, printed.splitlines())}

    assert {name: one["status"] for name, one in responses.items() if name} == {"own-1": 201, "own-2": 200}


@pytest.fixture(scope="module")
def java_project() -> Path:
    """What Maven makes of docs/java, made the first time; later runs need no network."""
    if not (shutil.which("java") and shutil.which("mvn")):
        if os.environ.get("TIERSTREAM_REQUIRE_KAFKA") == "1":
            pytest.fail("the tutorial's part in Java needs java and mvn")
        pytest.skip("the tutorial's part in Java needs java and mvn")
    project = ROOT / "docs" / "java"
    sources = sorted(file for file in project.rglob("*") if file.is_file() and "target" not in file.parts)
    key = hashlib.sha256(b"".join(file.read_bytes() for file in [*sources, *sorted((ROOT / "schemas").glob("*.avsc"))]))
    made = ROOT / ".cache" / "java" / key.hexdigest()[:12]
    if not made.is_dir():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent, prefix="making-") as fresh:
            shutil.copytree(project, Path(fresh) / "docs" / "java", ignore=shutil.ignore_patterns("target"))
            shutil.copytree(ROOT / "schemas", Path(fresh) / "schemas")
            assert shell_block("mvn").startswith(JAVA), "the tutorial makes it in another way"
            done = subprocess.run(
                ["sh", "-e", "-c", JAVA], cwd=fresh, capture_output=True, text=True, timeout=MAVEN_SECONDS, check=False
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            (Path(fresh) / "docs" / "java" / "target").rename(made)
    return made


def test_ones_own_producer_in_java(reader: Reader, java_project: Path) -> None:
    """Part 4: the project compiles, and its program prints what the tutorial says it prints."""
    (reader.folder / "docs" / "java" / "target").symlink_to(java_project)

    printed = reader.run(shell_block("mvn").removeprefix(JAVA))

    (shown,) = [text for text in blocks(STORY, "text") if "inserted" in text]
    assert printed == shown


def test_the_java_that_is_shown_is_of_the_project() -> None:
    """A piece of it, so that it is compiled and run."""
    (shown,) = blocks(STORY, "java")
    source = (ROOT / "docs" / "java" / "src" / "main" / "java" / "example" / "Photos.java").read_text(encoding="utf-8")

    assert " ".join(shown.split()) in " ".join(source.split())


def test_break_it_and_ask_whether_anything_is_missing(reader: Reader) -> None:
    """Part 5 and 6: Ctrl-C while it works, once more, and the ledger; then what shows its state."""
    service = reader.started[-1]
    reader.run(shell_block("venv/bin/tierstream produce --count"))
    service.send_signal(signal.SIGINT)
    assert service.wait(60) == 0, reader.logs()
    reader.start_service()

    verdict = reader.run(shell_block("venv/bin/tierstream verify"))
    state = reader.run(shell_block("venv/bin/tierstream lag"))

    assert verdict.endswith(": 0 missing, 0 duplicated, 0 mismatched\n"), verdict
    assert int(verdict.split()[0]) >= int(RECORDS)
    assert "partition operations/" in state
    assert "tierstream running" in state


@pytest.mark.parametrize("page", OWN_KAFKA, ids=lambda page: page.name)
def test_commands_with_a_file_of_ones_own(reader: Reader, page: Path) -> None:
    """The page's own YAML, its brokers replaced by ours; `run` runs already, and `--follow` would not end."""
    (text,) = [text for text in blocks(page, "yaml") if text.startswith("# tierstream.yaml")]
    text = text.replace("[kafka-1:9092, kafka-2:9092]", f"[127.0.0.1:{reader.port}]")
    (reader.folder / "tierstream.yaml").write_text(
        text.replace("/var/lib/tierstream", str(reader.folder / "data")), encoding="utf-8"
    )
    (reader.folder / "operations.jsonl").write_text(
        blocks(ROOT / "README.md", "json")[0].replace("…", "a picture"), encoding="utf-8"
    )
    shown = [line for text in blocks(page, *SHELL) for line in commands_of(text) if "--config tierstream.yaml" in line]

    assert shown
    for line in shown:
        if not line.startswith("tierstream run "):
            reader.run(line.replace(" --follow", " --limit 1"))


def test_topics_made_by_kafkas_own_tool_are_what_the_settings_need(apache: Broker, tmp_path: Path) -> None:
    """docs/deploy.md: its commands on Apache Kafka, with one node; then the page's own file finds nothing missing."""
    if shutil.which("java") is None:
        pytest.skip("Kafka's tools need java")
    page = ROOT / "docs" / "deploy.md"
    (made,) = [text for text in blocks(page, *SHELL) if text.startswith(TOPICS)]
    (settings,) = [text for text in blocks(page, "yaml") if text.startswith("# tierstream.yaml")]
    tool = tmp_path / TOPICS
    java = f"java -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -cp '{kafka_jars()}/*'"
    tool.write_text(f'#!/bin/sh\nexec {java} org.apache.kafka.tools.TopicCommand "$@"\n', encoding="utf-8")
    tool.chmod(0o755)
    replaced = {
        "--replication-factor 3": "--replication-factor 1",
        "kafka-1:9092, kafka-2:9092": apache.bootstrap,
        "kafka-1:9092": apache.bootstrap,
        "/var/lib/tierstream": str(tmp_path / "data"),
    }
    suffix = apache.unused_name("")

    def ours(text: str) -> str:
        for shown, here in replaced.items():
            text = text.replace(shown, here)
        return re.sub(r"(?<=[ \[])(operations(?:\.dlq)?|responses)(?=[ \]}])", rf"\g<1>{suffix}", text)

    environment = clean_environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "tierstream.yaml").write_text(ours(settings), encoding="utf-8")
    makers = [
        subprocess.Popen(["sh", "-c", ours(line)], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
        for line in commands_of(made)
    ]
    said = [maker.communicate(timeout=COMMAND_SECONDS)[1] for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0, 0], said

    done = command_line("check-config", "--config", "tierstream.yaml", "--online", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "text", [line for page in ALONE for text in blocks(page, *SHELL) for line in commands_of(text)]
)
def test_commands_that_need_nothing(reader: Reader, text: str) -> None:
    """As they stand."""
    reader.run(text)


def test_what_the_calculator_is_shown_to_say_is_what_it_says(reader: Reader) -> None:
    """docs/sizing.md: its arithmetic and its lines for the configuration."""
    page = ALONE[0]
    (command,), (shown,) = blocks(page, *SHELL), blocks(page, "text")

    assert reader.run(f"{command.strip()} 2>&1") == shown
