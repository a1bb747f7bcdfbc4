"""TLS and SASL against Apache Kafka with real certificates and users: who is let in works, who is not is told why.

One broker and one service for each way in, all started together; the wrong ones too. Every service logs at debug, and
all that is secret holds a canary: passwords, keys of certificates, tokens, record and object keys, payloads, metadata.
"""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from brokers import apache_source, wait_until
from cli_runner import Tierstream
from consumer.client import TierstreamClient
from consumer.config import Config
from consumer.ids import ObjectContext
from consumer.kafka.topics import ClusterUnavailable
from secured import CANARY, TOKEN_SECONDS, Identity, Secured, secured_broker
from service_process import ServiceProcess, settings
from stages import Stage, set_up

pytestmark = [pytest.mark.apache, pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(180)]

WAYS = ("TLS", "MTLS", "SCRAM", "OAUTH")

RECORDS = 8

ELSEWHERE = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
    "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={CANARY}",
    "SENTRY_DSN": f"http://{CANARY}@127.0.0.1:1/1",
}
"""Credentials of collectors of traces and error reports, which nobody is at home at: the libraries have much to say.
For one of the services, as loading them takes seconds."""


@dataclass(frozen=True)
class Wrong:
    """A way in that is wrong in one respect."""

    way: str
    said: str
    """Part of the error."""
    hint: str
    """Part of the hint: the settings to look at."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """To the right settings; a mapping is merged, None is left out."""
    files: str = "client"
    """Whose certificates."""


WRONG = {
    "wrong password": Wrong(
        "SCRAM", "refuses the user name or the password", "kafka.sasl_password", {"sasl_password": f"no-{CANARY}"}
    ),
    "unknown user": Wrong(
        "SCRAM", "refuses the user name or the password", "kafka.sasl_username", {"sasl_username": "nobody"}
    ),
    "mechanism not offered": Wrong(
        "SCRAM", "does not offer PLAIN there", "kafka.sasl_mechanism", {"sasl_mechanism": "PLAIN"}
    ),
    "unknown authority": Wrong(
        "TLS", "certificate is refused: unable to get local issuer", "kafka.ssl_ca_file", files="deceived"
    ),
    "other name": Wrong(
        "TLS",
        "certificate is refused: Hostname mismatch",
        "kafka.bootstrap_servers",
        {"bootstrap_servers": "localhost"},
    ),
    "no client certificate": Wrong(
        "MTLS",
        "breaks off the TLS handshake",
        "kafka.ssl_cert_file",
        {"ssl_cert_file": None, "ssl_key_file": None, "ssl_key_password": None},
    ),
    "foreign client certificate": Wrong(
        "MTLS", "breaks off the TLS handshake", "kafka.ssl_cert_file", files="stranger"
    ),
    "expired token": Wrong(
        "OAUTH", "refuses the token of kafka.oauth", "lifetime of the token", {"oauth": {"client_id": "expired"}}
    ),
    "token for another audience": Wrong(
        "OAUTH", "refuses the token of kafka.oauth", "audience", {"oauth": {"client_id": "astray"}}
    ),
    "wrong client secret": Wrong(
        "OAUTH", "no OAuth token: status 401", "kafka.oauth", {"oauth": {"client_secret": f"no-{CANARY}"}}
    ),
    "no TLS where it is spoken": Wrong(
        "TLS", "does not speak plain Kafka (a TLS alert)", "kafka.security_protocol", {"security_protocol": "PLAINTEXT"}
    ),
}

RUN_WRONG = ("wrong password", "unknown authority", "no client certificate", "expired token")
"""Those that are also tried with a whole service: one of each kind, as a process costs seconds."""


@dataclass
class Gate:
    """The broker, a service behind each way in, and those that are not let in."""

    secured: Secured
    folder: Path
    files: dict[str, Identity]
    stages: dict[str, Stage] = field(default_factory=dict)
    shut_out: dict[str, ServiceProcess] = field(default_factory=dict)

    def kafka(self, way: str) -> dict[str, Any]:
        """The right settings."""
        return self.secured.kafka(way, self.files["renewed" if way == "MTLS" else "client"])

    def wrong_kafka(self, name: str) -> dict[str, Any]:
        """The settings of a wrong way in."""
        wrong = WRONG[name]
        right = self.secured.kafka(wrong.way, self.files[wrong.files])
        changed = {
            name: right[name] | value if isinstance(value, Mapping) else value for name, value in wrong.changes.items()
        }
        if "bootstrap_servers" in changed:
            changed["bootstrap_servers"] = [f"localhost:{self.secured.ports[wrong.way]}"]
        return {name: value for name, value in (right | changed).items() if value is not None}

    def service(self, way: str) -> ServiceProcess:
        """The service behind a way in, ready."""
        service = self.stages[way].processes[-1]
        service.wait_ready(2)
        return service


def said(service: ServiceProcess) -> str:
    """Everything a service has said so far, on both streams."""
    return service.log.read_text(encoding="utf-8") + service.output.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    """Everything, started at once; at the end nothing of it may have said a secret."""
    if apache_source() != "maven":
        pytest.skip("needs an Apache Kafka with settings of its own: java and mvn")
    folder = tmp_path_factory.mktemp("secured")
    with secured_broker(folder) as secured:
        deceived = Identity(folder / "deceived")
        deceived.put(secured.stranger, secured.authority)
        files = {
            "client": secured.identity("client"),
            "renewed": secured.identity("renewed"),
            "stranger": secured.identity("stranger", secured.stranger),
            "deceived": deceived,
        }
        gate = Gate(secured, folder, files)
        try:
            for way in WAYS:
                own = folder / way
                own.mkdir()
                stage = set_up(secured.broker, own, 2, 2, kafka=gate.kafka(way), log={"level": "debug"})
                stage.start(ready=False, environment=ELSEWHERE if way == "TLS" else None)
                gate.stages[way] = stage
            for name in RUN_WRONG:
                own = folder / name.replace(" ", "-")
                own.mkdir()
                config = settings(own, kafka=gate.wrong_kafka(name), log={"level": "debug"})
                gate.shut_out[name] = ServiceProcess(own, config)
            yield gate
            services = [stage.processes[-1] for stage in gate.stages.values()] + list(gate.shut_out.values())
            for service in services:
                service.stop()
            assert [service.log for service in services if CANARY in said(service)] == []
        finally:
            for stage in gate.stages.values():
                stage.put_down()
            for service in gate.shut_out.values():
                service.kill()


def ask(stage: Stage, records: int = RECORDS) -> None:
    """Put in objects whose every text is a canary, and what cannot be decoded; wait for the right answer to each."""
    ledger, run = stage.ledger, uuid.uuid4()
    entries = []
    for number in range(records):
        name, partition = f"{CANARY}/{run}/{number}", number % 2
        texts: dict[str, Any] = {"content_type": f"text/{CANARY}", "filename": CANARY, "custom": {CANARY: CANARY}}
        entries += ledger.operate(
            "insert", name, CANARY.encode(), statuses={201}, key=name.encode(), partition=partition, **texts
        )
        entries += ledger.operate("get", name, statuses={200}, key=name.encode(), partition=partition)
    entries += ledger.send(b"\xff" + CANARY.encode(), key=CANARY.encode(), kind="unknown", statuses={400})
    ledger.wait_answered(entries)
    verdict = ledger.verdict()
    # What the clients of other tests have put in is not in this ledger.
    wrong = [text for text in verdict.mismatched if not text.endswith("a response to no record")]
    assert (verdict.missing, wrong) == ([], []), verdict


@pytest.mark.parametrize("way", WAYS)
def test_records_are_answered_behind_every_kind_of_door(gate: Gate, way: str) -> None:
    """Issue item: TLS, mTLS, SCRAM and OAUTHBEARER, by the service as it is run."""
    service = gate.service(way)

    ask(gate.stages[way])

    assert service.state()["totals"]["records"] >= RECORDS


@pytest.mark.parametrize("way", WAYS)
def test_no_secret_is_said_anywhere(gate: Gate, way: str) -> None:
    """At level debug, on the admin port, and in the dump of threads and tasks that an operator asks for."""
    service = gate.service(way)
    ask(gate.stages[way])
    before = service.log.stat().st_size

    answers = [service.get(path)[1] for path in ("/", "/debug/state", "/metrics", "/readyz", "/nowhere")]
    service.process.send_signal(signal.SIGUSR1)
    service.wait(lambda: service.log.stat().st_size > before, "the dump of threads and tasks")

    assert all(answers)
    assert CANARY not in "".join(answers)
    assert CANARY not in said(service)


@pytest.mark.parametrize("name", RUN_WRONG)
def test_a_service_that_is_not_let_in_says_why_and_goes_on_trying(gate: Gate, name: str) -> None:
    """H32, contract 6: an unreachable broker is no exit; it is told in the log and by readiness, with what to do."""
    service, wrong = gate.shut_out[name], WRONG[name]

    def refusals() -> list[dict[str, Any]]:
        # Others stand beside them while another test replaces the broker's certificate.
        told = [line for line in service.log_lines() if line.get("event") == "cluster cannot be reached"]
        return [line for line in told if wrong.said in line["error"] and wrong.hint in line["hint"]]

    service.wait(lambda: len(refusals()) >= 2, "two attempts to be refused")
    service.wait(lambda: wrong.said in service.get("/readyz")[1], "readiness to tell why")
    status, body = service.get("/readyz")

    assert status == 503
    assert CANARY not in said(service) + body


@pytest.fixture
def tierstream(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, gate: Gate
) -> Tierstream:
    """The command, in this process."""
    return Tierstream(monkeypatch, capfd, tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_check_config_goes_through_every_kind_of_door(tierstream: Tierstream, gate: Gate, way: str) -> None:
    """The check before a deployment, with the configuration of the service itself."""
    config = {**gate.stages[way].config, "log": {"level": "info"}}

    done = tierstream("check-config", "--online", "--json", config=config)

    reached = {check["check"].partition(" ")[0]: check["ok"] for check in done.json["checks"]}
    assert (reached["brokers"], reached["topic"], reached["group"]) == (True, True, True), done.out
    assert CANARY not in done.out + done.err


@pytest.mark.parametrize("name", list(WRONG))
def test_check_config_says_what_is_wrong_and_what_to_do(tierstream: Tierstream, gate: Gate, name: str) -> None:
    """A `hint:` that names the setting, and no secret."""
    wrong = WRONG[name]

    done = tierstream("check-config", "--online", config={"kafka": gate.wrong_kafka(name)})

    (line,) = [line for line in done.out.splitlines() if line.startswith("FAILED       brokers:")]
    (hint,) = [line for line in done.err.splitlines() if line.startswith("hint: ")]
    assert done.code == 1
    assert wrong.said in line
    assert wrong.hint in hint
    assert CANARY not in done.out + done.err


@pytest.mark.parametrize("way", WAYS)
async def test_the_client_for_python_services_uses_the_same_doors(gate: Gate, way: str) -> None:
    """Its configuration is that of the service."""
    stage = gate.stages[way]
    gate.service(way)
    config = Config.model_validate({"kafka": gate.kafka(way)})
    topics = {"operations": stage.config["input"]["topics"][0], "responses": stage.config["output"]["topic"]}

    async with TierstreamClient(config, **topics) as client:
        await client.insert(ObjectContext("u"), "k", b"v")
        found = await client.get(ObjectContext("u"), "k")

    assert found is not None
    assert found.payload == b"v"


@pytest.mark.parametrize("name", RUN_WRONG)
async def test_the_client_for_python_services_is_told_why_it_is_not_let_in(
    gate: Gate, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As an error with a hint; what the Kafka client logs holds no secret either."""
    client = TierstreamClient(Config.model_validate({"kafka": gate.wrong_kafka(name)}))

    with pytest.raises(ClusterUnavailable, match=WRONG[name].said) as caught:
        await client.start()

    assert WRONG[name].hint in (caught.value.hint or "")
    assert CANARY not in f"{caught.value!r} {caught.value.__cause__!r} {caplog.text}"


def test_connections_outlive_their_tokens(gate: Gate) -> None:
    """H33: the broker closes a connection when its token ends, and the client knows nothing of renewing it there."""
    service, stage, tokens = gate.service("OAUTH"), gate.stages["OAUTH"], gate.secured.tokens
    before = tokens.issued

    def lives() -> bool:
        ask(stage, 2)
        return tokens.issued >= before + 4

    # Producer and consumer have a token each, and need the next ones only when connections have been closed.
    wait_until(lives, 10 * TOKEN_SECONDS, "tokens to be asked for again")
    ask(stage)

    assert service.process.poll() is None


def test_replaced_certificates_are_used_without_a_restart(gate: Gate) -> None:
    """H35: another authority signs all of them, and back again; nobody of the old one is trusted by either side."""
    service, stage, secured = gate.service("MTLS"), gate.stages["MTLS"], gate.secured
    client, successor = gate.files["renewed"], type(secured.authority)()
    ask(stage)
    try:
        client.put(successor, successor)
        secured.put_authority(successor)
        assert secured.relay.cut() > 0
        ask(stage)
    finally:
        client.put(secured.authority, secured.authority)
        secured.put_authority(secured.authority)
    secured.relay.cut()
    ask(stage)

    read_again = [line for line in service.log_lines() if line.get("event") == "certificates read again"]
    assert len(read_again) >= 2
    assert {"ca.crt", "tls.crt", "tls.key"} == set(read_again[0]["files"])
