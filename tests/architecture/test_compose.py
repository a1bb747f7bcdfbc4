"""docs/compose.yaml, as far as it can be checked without an engine that runs it; CI starts it and waits for health.

The parts are held against each other: what one of them says of an address, a port, a file or a name, the other one has.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from brokers import kafka_version, unused_port, wait_until
from cli_runner import Tierstream
from consumer.config import load
from gcs_servers import fake_gcs_binary

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "compose.yaml"
PARTS = FILE.parent / "compose"
CHART = ROOT / "helm" / "tierstream"


class _Strict(BaseModel):
    """A part of the compose specification: the keys that are used here, each with its type; others are mistakes."""

    model_config = ConfigDict(extra="forbid", strict=True)


Text = Annotated[str, Field(min_length=1)]
Duration = Annotated[str, Field(pattern=r"^\d+s$")]
Loopback = Annotated[str, Field(pattern=r"^127\.0\.0\.1:\d+:\d+$")]


class Build(_Strict):
    """Where an image comes from that nobody publishes."""

    context: Text
    dockerfile: Text


class Health(_Strict):
    """When a container is well."""

    test: Annotated[list[Text], Field(min_length=2)]
    interval: Duration
    timeout: Duration
    retries: Annotated[int, Field(ge=3)]
    start_period: Duration


class Awaited(_Strict):
    """What has to be the case with another service first."""

    condition: Literal["service_healthy"]


class Logging(_Strict):
    """How much of what a container says is kept."""

    driver: Literal["json-file"]
    options: dict[Literal["max-size", "max-file"], str]


class Service(_Strict):
    """One container; what has no default here has to be there."""

    image: Annotated[str, Field(pattern=r"^[a-z/-]+:(v?\d+\.\d+\.\d+|compose)$")]
    user: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")]
    restart: Literal["unless-stopped"]
    read_only: Literal[True]
    cap_drop: Annotated[list[Literal["ALL"]], Field(min_length=1)]
    security_opt: Annotated[list[Literal["no-new-privileges:true"]], Field(min_length=1)]
    logging: Logging
    mem_limit: Annotated[str, Field(pattern=r"^\d+[gm]$")]
    healthcheck: Health
    build: Build | None = None
    command: list[Text] = []
    environment: dict[str, str] = {}
    ports: list[Loopback] = []
    volumes: list[Text] = []
    tmpfs: list[Text] = []
    stop_grace_period: Duration = "10s"
    depends_on: dict[str, Awaited] = {}


def _empty(value: Any) -> Any:
    assert value == {}
    return value


class Compose(_Strict):
    """The whole file."""

    name: Literal["tierstream"]
    hardened: dict[str, Any] = Field(alias="x-hardened")
    services: dict[str, Service]
    volumes: dict[str, Annotated[dict[str, Any], BeforeValidator(_empty)]]


COMPOSE = Compose.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def mounts(service: Service) -> Iterator[tuple[str, str, str]]:
    """What is mounted: source, target, mode."""
    for volume in service.volumes:
        source, target, *mode = volume.split(":")
        yield source, target, mode[0] if mode else "rw"


def mounted(service: str, target: str) -> Path:
    """The file or folder of this repository that stands at *target* in a container."""
    (source,) = [source for source, at, _ in mounts(COMPOSE.services[service]) if at == target]
    return FILE.parent / source


def seconds(duration: str) -> int:
    """A duration as a number."""
    return int(duration.removesuffix("s"))


def test_it_holds_the_parts_that_are_promised() -> None:
    """Broker, bucket, service, metrics, pictures."""
    assert set(COMPOSE.services) == {"kafka", "gcs", "tierstream", "prometheus", "grafana"}
    assert [name for name, service in COMPOSE.services.items() if service.build] == ["tierstream"]


def test_every_file_that_is_mounted_is_there_and_cannot_be_written() -> None:
    """A bind mount of what is not there becomes an empty folder, silently."""
    for name, service in COMPOSE.services.items():
        for source, target, mode in mounts(service):
            if source.startswith("."):
                assert (FILE.parent / source).exists(), (name, source)
                assert mode == "ro", (name, source)
            else:
                assert source in COMPOSE.volumes, (name, source)
            assert target.startswith("/")
    used = {source for service in COMPOSE.services.values() for source, _, _ in mounts(service)}
    assert set(COMPOSE.volumes) <= used
    kept = {path for path in PARTS.rglob("*") if path.is_file()}
    reached = {path for source in used if source.startswith(".") for path in _files(FILE.parent / source)}
    assert kept <= {path.resolve() for path in reached}


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def test_who_depends_on_whom_ends_somewhere() -> None:
    """Every service that is waited for exists and is in nobody's debt for this one."""
    started: set[str] = set()
    while len(started) < len(COMPOSE.services):
        free = {name for name, service in COMPOSE.services.items() if service.depends_on.keys() <= started} - started
        assert free, f"{set(COMPOSE.services) - started} wait for each other"
        started |= free


def test_the_broker_is_the_one_that_is_tested() -> None:
    """Its version is that of the tests, and its settings are those of the tests' own single node."""
    kafka = COMPOSE.services["kafka"]
    advertised = dict(part.split("://") for part in kafka.environment["KAFKA_ADVERTISED_LISTENERS"].split(","))
    listening = dict(part.split("://") for part in kafka.environment["KAFKA_LISTENERS"].split(","))
    protocols = dict(part.split(":") for part in kafka.environment["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(","))

    assert kafka.image == f"apache/kafka:{kafka_version()}"
    assert advertised == {"INSIDE": "kafka:9092", "OUTSIDE": "127.0.0.1:29092"}
    assert set(listening) == set(protocols) == {"INSIDE", "OUTSIDE", "CONTROLLER"}
    assert listening["OUTSIDE"] == ":29092"
    assert kafka.ports == ["127.0.0.1:29092:29092"]
    assert listening["INSIDE"].removeprefix(":") in kafka.healthcheck.test[1]
    assert kafka.environment["KAFKA_CONTROLLER_QUORUM_VOTERS"] == f"1@{listening['CONTROLLER']}"
    assert ("kafka", kafka.environment["KAFKA_LOG_DIRS"], "rw") in list(mounts(kafka))


def test_the_services_configuration_is_valid_and_leads_to_its_neighbours(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By the command that a user would check it with, under the environment that the container has."""
    service = COMPOSE.services["tierstream"]
    path = mounted("tierstream", "/etc/tierstream/config.yaml")
    command = Tierstream(monkeypatch, capfd, tmp_path)
    for name, value in service.environment.items():
        monkeypatch.setenv(name, value)
    done = command("check-config", "--config", str(path))
    config = load(path, service.environment)
    long_term = config.storage.long_term

    assert done.code == 0
    assert [line for line in done.err.splitlines() if "kafka.security_protocol is PLAINTEXT" not in line] == []
    assert service.command == ["run", "--config", "/etc/tierstream/config.yaml"]
    assert config.kafka.bootstrap_servers == ["kafka:9092"]
    assert long_term.type == "gcs"
    port = COMPOSE.services["gcs"].command[COMPOSE.services["gcs"].command.index("-port") + 1]
    assert long_term.endpoint == f"http://gcs:{port}"
    assert (mounted("gcs", "/data") / long_term.bucket).is_dir()
    assert service.ports == [f"127.0.0.1:{config.admin.port}:{config.admin.port}"]
    (data,) = [target for _, target, mode in mounts(service) if mode == "rw"]
    for part in (config.storage.high_volume, config.storage.change_log):
        assert part.type == "sqlite"
        assert part.path.is_relative_to(data)
    assert seconds(service.stop_grace_period) > config.rebalance.drain_timeout + 15
    assert config.topics.create
    assert config.topics.replication_factor == 1


def test_the_service_is_the_image_of_the_dockerfile() -> None:
    """User, folder, port and health check are those of the image; two statements of one thing would drift apart."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    service = COMPOSE.services["tierstream"]

    assert service.build is not None
    assert (FILE.parent / service.build.context / service.build.dockerfile).resolve() == ROOT / "Dockerfile"
    assert f"USER {service.user}" in dockerfile
    assert f"VOLUME {next(target for source, target, _ in mounts(service) if source == 'tierstream')}" in dockerfile
    assert json.dumps(service.healthcheck.test[1:]) in dockerfile
    assert "TIERSTREAM_ADMIN__HOST=0.0.0.0" in dockerfile


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
@pytest.mark.process
def test_prometheus_understands_its_configuration_and_the_charts_rules(tmp_path: Path) -> None:
    """With the rules where the container has them."""
    assert mounted("prometheus", "/etc/prometheus/rules").samefile(CHART / "rules")
    text = mounted("prometheus", "/etc/prometheus/prometheus.yml").read_text(encoding="utf-8")
    placed = tmp_path / "prometheus.yml"
    placed.write_text(text.replace("/etc/prometheus/rules", str(CHART / "rules")), encoding="utf-8")

    done = subprocess.run(
        ["promtool", "check", "config", placed], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"SUCCESS: \d+ rules found", done.stdout), done.stdout


def test_prometheus_scrapes_the_service_under_the_labels_that_the_dashboard_selects_by() -> None:
    """A job and a namespace; a panel that selects by a label nobody has shows nothing."""
    (job,) = yaml.safe_load((PARTS / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    config = load(PARTS / "tierstream.yaml", {})
    (dashboard,) = (CHART / "dashboards").glob("*.json")
    selected = {entry["name"] for entry in json.loads(dashboard.read_text(encoding="utf-8"))["templating"]["list"]}

    (static,) = job["static_configs"]
    assert static["targets"] == [f"tierstream:{config.admin.port}"]
    assert selected - {"datasource"} <= {"job", *static["labels"]}


def test_grafana_is_provisioned_with_the_charts_dashboard_and_a_source_for_it() -> None:
    """The very files of the chart; the data source is of the kind that the dashboard asks for, and is the default."""
    provisioning = "/etc/grafana/provisioning"
    (source,) = yaml.safe_load(mounted("grafana", f"{provisioning}/datasources/tierstream.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load(mounted("grafana", f"{provisioning}/dashboards/tierstream.yaml").read_text())[
        "providers"
    ]
    (dashboard,) = (CHART / "dashboards").glob("*.json")
    described = json.loads(dashboard.read_text(encoding="utf-8"))
    (variable,) = [entry for entry in described["templating"]["list"] if entry["name"] == "datasource"]

    assert mounted("grafana", provider["options"]["path"]).samefile(dashboard.parent)
    assert (source["type"], source["isDefault"]) == (variable["query"], True)
    assert any("exemplar" in target for panel in described["panels"] for target in panel.get("targets", ()))
    assert "--enable-feature=exemplar-storage" in COMPOSE.services["prometheus"].command
    assert source["url"] == "http://prometheus:9090"
    assert f"/d/{described['uid']}" in FILE.read_text(encoding="utf-8")


@pytest.mark.emulator
@pytest.mark.process
def test_the_bucket_emulator_takes_its_command_line_and_has_the_bucket(tmp_path: Path) -> None:
    """The emulator itself, of the same version, on the files of this repository; the health check is one it answers."""
    binary = fake_gcs_binary()
    if binary is None:
        pytest.skip("no fake-gcs-server in the test environment")
    gcs, port = COMPOSE.services["gcs"], unused_port()
    places = {"/data": str(mounted("gcs", "/data")), "4443": str(port)}
    process = subprocess.Popen(
        [binary, *(places.get(part, part) for part in gcs.command), "-host", "127.0.0.1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (health,) = re.findall(r"http://127\.0\.0\.1:4443(/\S+)$", gcs.healthcheck.test[1])
    bucket = yaml.safe_load((PARTS / "tierstream.yaml").read_text(encoding="utf-8"))["storage"]["long_term"]["bucket"]

    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                found: int = answer.status
                return found
        except OSError:
            return 0

    try:
        wait_until(lambda: status(health) == 200, 30, "the health check to be answered")
        assert status(f"/storage/v1/b/{bucket}") == 200
    finally:
        process.kill()
        process.wait()
    version = re.search(rb"fake-gcs-server\tv(\d+\.\d+\.\d+)", binary.read_bytes())
    assert version
    assert gcs.image.endswith(f":{version[1].decode()}")
