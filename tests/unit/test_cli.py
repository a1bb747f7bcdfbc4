"""The command line: what is printed where, exit codes, hints, and what is not imported."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from brokers import unused_port
from cli_runner import Tierstream
from consumer import app as service
from consumer.config import Config
from service_process import clean_environment, command_line
from strict_gcs import StrictGcs

CANARY = "hunter2-CANARY"


@pytest.fixture
def tierstream(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Tierstream:
    """The command."""
    return Tierstream(monkeypatch, capfd, tmp_path)


def nobody() -> dict[str, Any]:
    """A configuration whose broker and admin port do not exist."""
    port = unused_port()
    return {"kafka": {"bootstrap_servers": [f"127.0.0.1:{port}"]}, "admin": {"port": port}}


class TestGeneral:
    """What holds for all commands."""

    COMMANDS = (
        "run", "demo", "broker", "check-config", "config", "produce", "tail", "lag", "bench", "health", "version",
    )  # fmt: skip

    def test_help_lists_the_commands(self, tierstream: Tierstream) -> None:
        """Contract 7."""
        said = tierstream("--help")

        assert said.code == 0
        assert all(f"  {command} " in said.out for command in self.COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_explains_itself(self, tierstream: Tierstream, command: str) -> None:
        """Contract 7: `--help`."""
        said = tierstream(command, "--help")

        assert (said.code, said.err) == (0, "")
        assert f"tierstream {command}" in said.out

    @pytest.mark.parametrize(
        "arguments", [["nonsense"], ["run", "--nonsense"], ["produce", "--count", "none"], ["produce", "--count", "0"]]
    )
    def test_wrong_usage_is_exit_2_on_stderr(self, tierstream: Tierstream, arguments: list[str]) -> None:
        """Contract 11."""
        said = tierstream(*arguments)

        assert (said.code, said.out) == (2, "")
        assert said.err.startswith("error: ")
        command = " ".join(["tierstream", *arguments[:1]]) if arguments != ["nonsense"] else "tierstream"
        assert said.err.splitlines()[-1] == f"hint: `{command} --help` says what there is"
        assert "\x1b" not in said.err

    def test_a_wrong_configuration_is_exit_2_with_every_problem_and_a_hint(self, tierstream: Tierstream) -> None:
        """Contract 6, 11; style: data to stdout, the rest to stderr, an error followed by a hint."""
        said = tierstream("lag", config={"kafka": {"grup_id": "g"}, "log": {"level": "loud"}})
        *errors, hint = said.err.splitlines()

        assert (said.code, said.out) == (2, "")
        assert len(errors) == 2
        assert all(line.startswith("error: config.yaml:") for line in errors)
        assert hint.startswith("hint: ")

    @pytest.mark.parametrize("command", ["lag", "tail", "check-config --online", "produce --count 1"])
    def test_a_broker_that_does_not_answer_is_exit_1_in_words(self, tierstream: Tierstream, command: str) -> None:
        """Contract 11: no trace, and no waiting for ever."""
        config = nobody()

        said = tierstream(*command.split(), config=config)

        assert said.code == 1
        assert config["kafka"]["bootstrap_servers"][0] in said.err + said.out
        assert "Traceback" not in said.err


class TestVersion:
    """`version`, `--version`."""

    def test_both_forms_say_the_same(self, tierstream: Tierstream) -> None:
        """Contract 7."""
        command, option = tierstream("version"), tierstream("--version")

        assert (command.code, option.code) == (0, 0)
        assert command.out == option.out
        assert command.out.startswith("tierstream ")
        said = tierstream("version", "--json").json
        assert set(said) == {"version", "python", "aiokafka", "compiled"}
        assert (said["compiled"], "compiled" in command.out) == (False, False), "this is a checkout"


class TestConfig:
    """`check-config`, `config show`, `config schema`."""

    def test_a_valid_configuration_is_exit_0_with_its_warnings(self, tierstream: Tierstream) -> None:
        """Contract 7: warnings are no data."""
        said = tierstream("check-config", config={})

        assert (said.code, said.out) == (0, "the configuration is valid\n")
        assert said.err.startswith("warning: ")
        assert tierstream("check-config", "--json", config={}).json["valid"] is True

    def test_problems_can_be_had_as_json(self, tierstream: Tierstream) -> None:
        """Contract 7: `--json` on every read command; the exit code stays."""
        said = tierstream("check-config", "--json", config={"log": {"level": "loud"}})

        assert said.code == 2
        assert (said.json["valid"], len(said.json["problems"])) == (False, 1)

    def test_show_prints_yaml_that_can_be_used(self, tierstream: Tierstream) -> None:
        """Contract 7: `config show` = the YAML's nesting."""
        config = {"kafka": {"group_id": "g: #"}, "usecases": {"a": {"max_seconds": 5}}}

        said = tierstream("config", "show", config=config)
        (tierstream.folder / "again.yaml").write_text(said.out, encoding="utf-8")
        again = tierstream("config", "show", "--config", "again.yaml")

        assert said.code == 0
        assert again.out == said.out
        assert yaml.safe_load(said.out) == tierstream("config", "show", "--json", config=config).json
        assert yaml.safe_load(said.out)["kafka"]["group_id"] == "g: #"

    def test_show_tells_where_values_come_from(
        self, tierstream: Tierstream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Contract 7: `--origin`; flags are the strongest."""
        monkeypatch.setenv("TIERSTREAM_ORDERING", "unordered")
        arguments = ("config", "show", "--origin", "--bootstrap", "b:1")

        lines = tierstream(*arguments, config={"admin": {"port": 1}}).out.splitlines()
        tree = tierstream(*arguments, "--json", config={"admin": {"port": 1}}).json

        assert '  bootstrap_servers: ["b:1"]  # flag' in lines
        assert 'ordering: "unordered"  # TIERSTREAM_ORDERING' in lines
        assert "  port: 1  # config.yaml:2" in lines
        assert tree["admin"]["port"] == {"value": 1, "origin": "config.yaml:2"}
        assert tree["admin"]["host"] == {"value": "127.0.0.1", "origin": "default"}

    def test_show_masks_secrets(self, tierstream: Tierstream) -> None:
        """Contract 7."""
        config = {"kafka": {"sasl_password": CANARY}}

        said = [tierstream("config", "show", *more, config=config) for more in ([], ["--origin"], ["--json"])]

        assert all(CANARY not in result.out + result.err for result in said)
        assert all("***" in result.out for result in said)

    def test_schema_is_json(self, tierstream: Tierstream) -> None:
        """Contract 7."""
        assert tierstream("config", "schema").json["properties"].keys() == Config.model_fields.keys()

    def test_online_lists_what_it_did_not_check(self, tierstream: Tierstream) -> None:
        """A report must not be taken for more than it says; storage is looked at also without a broker."""
        (tierstream.folder / "file").write_text("", encoding="utf-8")
        config = nobody() | {"storage": {"long_term": {"type": "filesystem", "path": "file"}}}

        said = tierstream("check-config", "--online", "--json", config=config)
        checks = {check["check"]: check["ok"] for check in said.json["checks"]}

        assert said.code == 1
        assert checks["brokers"] is False
        assert checks["storage.long_term (filesystem)"] is False
        assert checks["storage.high_volume (sqlite)"] is True
        assert sorted(tierstream.folder.iterdir()) == [tierstream.folder / "config.yaml", tierstream.folder / "file"]

    def test_online_asks_for_the_bucket(self, tierstream: Tierstream, strict_gcs: StrictGcs) -> None:
        """Nothing is written to it; one that is not there is said to be missing."""
        found = []
        for name in ("bucket", "absent"):
            section = {"type": "gcs", "bucket": name, "endpoint": strict_gcs.endpoint}
            config = nobody() | {"storage": {"long_term": section}}
            said = tierstream("check-config", "--online", "--json", config=config)
            found += [check for check in said.json["checks"] if check["check"] == "storage.long_term (gcs)"]

        assert [check["ok"] for check in found] == [True, False]
        assert found[1]["detail"] == "gcs: there is no bucket absent"
        assert strict_gcs.kinds() == ["list", "list"]


class TestRun:
    """`run` hands over to the application."""

    @pytest.fixture(autouse=True)
    def _own_signals_afterwards(self) -> Iterator[None]:
        """`run` is the end of a process elsewhere."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    @pytest.mark.parametrize("code", [0, 1, 3, 4])
    def test_the_exit_code_is_the_applications(
        self, tierstream: Tierstream, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """Contract 11; and nothing on stdout."""
        given: list[Config] = []

        def main(config: Config) -> int:
            given.append(config)
            return code

        monkeypatch.setattr(service, "main", main)

        said = tierstream("run", "--group", "g", "--bootstrap", "a:1,b:2", config={"log": {"format": "json"}})

        assert (said.code, said.out) == (code, "")
        assert given[0].kafka.group_id == "g"
        assert given[0].kafka.bootstrap_servers == ["a:1", "b:2"]
        assert "not encrypted" in said.err


class Admin:
    """An admin port that answers `/readyz` as it is told."""

    def __init__(self) -> None:
        self.status = 200
        self.body: bytes = b""
        self.paths: list[str] = []
        admin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                admin.paths.append(self.path)
                self.send_response(admin.status)
                self.end_headers()
                self.wfile.write(admin.body)

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port

    def says(self, status: int, **body: object) -> None:
        """Answer with this."""
        self.status, self.body = status, json.dumps(body).encode()


@pytest.fixture
def admin() -> Iterator[Admin]:
    """An admin port."""
    made = Admin()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


class TestHealth:
    """`health`, the container's check."""

    def test_ready_is_exit_0(self, tierstream: Tierstream, admin: Admin) -> None:
        """Contract 7: the address comes from the configuration; 0.0.0.0 is asked at loopback."""
        admin.says(200, ready=True, reasons=[])

        said = tierstream("health", config={"admin": {"host": "0.0.0.0", "port": admin.port}})

        assert (said.code, said.out) == (0, "ready\n")
        assert admin.paths == ["/readyz"]

    def test_not_ready_is_exit_1_with_the_reasons(self, tierstream: Tierstream, admin: Admin) -> None:
        """Contract 11."""
        admin.says(503, ready=False, reasons=["output", "registry"])

        said = tierstream("health", "--url", f"http://127.0.0.1:{admin.port}/")
        as_json = tierstream("health", "--json", "--url", f"http://127.0.0.1:{admin.port}")

        assert (said.code, said.out) == (1, "not ready: output, registry\n")
        assert (as_json.code, as_json.json) == (1, {"ready": False, "reasons": ["output", "registry"]})

    @pytest.mark.parametrize(
        ("status", "body"),
        [
            (503, b'{"ready": true, "reasons": []}'),
            (200, b'{"ready": false, "reasons": ["x"]}'),
            (200, b"<html>a proxy</html>"),
            (200, b"[]"),
            (200, b""),
            (404, b"{}"),
        ],
    )
    def test_anything_but_a_clear_yes_is_a_no(
        self, tierstream: Tierstream, admin: Admin, status: int, body: bytes
    ) -> None:
        """Somebody else's server on that port is not the service."""
        admin.status, admin.body = status, body

        assert tierstream("health", "--url", f"http://127.0.0.1:{admin.port}").code == 1

    def test_nobody_there_is_a_no(self, tierstream: Tierstream) -> None:
        """Contract 7: exit 1."""
        said = tierstream("health", config=nobody())

        assert said.code == 1
        assert re.fullmatch(r"not ready: no answer from http://127\.0\.0\.1:\d+/readyz: Connection refused\n", said.out)

    @pytest.mark.parametrize("arguments", [["--url", "localhost:1"], ["--config", "zero.yaml"]])
    def test_an_address_that_cannot_be_known_is_wrong_usage(
        self, tierstream: Tierstream, arguments: list[str]
    ) -> None:
        """With `admin.port: 0` only the log knows the port."""
        (tierstream.folder / "zero.yaml").write_text("admin: {port: 0}", encoding="utf-8")

        said = tierstream("health", *arguments)

        assert said.code == 2
        assert "hint: --url" in said.err

    @pytest.mark.process
    def test_it_imports_no_client_and_no_storage(self, tmp_path: Path) -> None:
        """Contract 7: a probe every few seconds must stay cheap."""
        program = (
            "import sys; from consumer import cli\n"
            "sys.argv = ['tierstream', 'health', '--url', 'http://127.0.0.1:1']\n"
            "try: cli.main()\n"
            "except SystemExit as ended: code = ended.code\n"
            "heavy = {'aiokafka', 'fastavro', 'aiohttp', 'google', 'prometheus_client', 'uvloop'}\n"
            "storage = [name for name in sys.modules if name.startswith('consumer.storage')]\n"
            "print(code, sorted(heavy & set(sys.modules)), storage)"
        )

        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )

        assert done.stdout.splitlines()[-1] == "1 [] []"


class TestProduce:
    """`produce` without a broker."""

    def test_something_has_to_be_produced(self, tierstream: Tierstream) -> None:
        """Neither file nor count is wrong usage, with a hint."""
        said = tierstream("produce")

        assert said.code == 2
        assert "hint: give --file" in said.err

    def test_a_dry_run_names_bad_lines_and_sends_nothing(self, tierstream: Tierstream) -> None:
        """Contract 7: a bad line is named, skipped, and makes the exit 1."""
        lines = [
            '{"kind": "get", "usecase": "u", "key": "k"}',
            "",
            "nonsense",
            '{"kind": "insert", "usecase": "u", "payload": "", "partition": 3}',
        ]
        (tierstream.folder / "f.jsonl").write_text("\n".join(lines), encoding="utf-8")

        said = tierstream("produce", "--dry-run", "--json", "--file", "f.jsonl", config=nobody())

        assert said.code == 1
        assert said.json == {"topic": "operations", "sent": 2, "bad": 1}
        assert "error: line 3: it is no JSON" in said.err
        assert "line 1: " in said.err
        assert "record key u/objects/k" in said.err
        assert "partition 3" in said.err

    def test_a_file_that_is_not_there_is_wrong_usage(self, tierstream: Tierstream) -> None:
        """Contract 11."""
        said = tierstream("produce", "--file", "none.jsonl")

        assert (said.code, said.err) == (2, "error: none.jsonl: No such file or directory\n")

    def test_count_bounds_what_is_read(self, tierstream: Tierstream) -> None:
        """`--count N` with a file: its first N records."""
        line = '{"kind": "head", "usecase": "u", "key": "k"}\n'
        (tierstream.folder / "f.jsonl").write_text(line * 5, encoding="utf-8")

        said = tierstream("produce", "--dry-run", "--file", "f.jsonl", "--count", "2", "--yes")

        assert said.out == "2 records would be sent to operations\n"


@pytest.mark.process
@pytest.mark.slow
def test_it_runs_as_a_module(tmp_path: Path) -> None:
    """`python -m consumer` is the same command; a closed pipe is no crash."""
    done = command_line("version", cwd=tmp_path)

    assert done.returncode == 0
    assert done.stdout.startswith("tierstream ")


@pytest.mark.process
@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_crash(tmp_path: Path) -> None:
    """`tierstream config schema | head -1` prints no trace."""
    command = [sys.executable, "-m", "consumer", "config", "schema"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        said = process.stderr.read()

    assert process.returncode == 1
    assert said == ""


class TestBench:
    """Where there is nothing to measure on."""

    def test_a_broker_that_cannot_be_used_is_named_with_what_it_takes(self, tierstream: Tierstream) -> None:
        """No trace, whatever the client calls it."""
        broker = f"127.0.0.1:{unused_port()}"

        said = tierstream("bench", "--bootstrap", broker, "--records", "5")

        assert (said.code, said.out) == (1, "")
        assert f"error: {broker} cannot be used: " in said.err
        assert "hint: it has to run, to be reached without TLS" in said.err
        assert "Traceback" not in said.err
