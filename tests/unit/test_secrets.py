"""No command says a secret, whatever goes wrong: each is run with a secret in every setting that can hold one.

The settings are found in the model and the commands in the command line, so that new ones are tried too. Nobody listens
where the configuration leads, so that every command comes to its error. What the service itself says, with brokers, is
looked at in e2e/test_security.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml
from pydantic import BaseModel

from cli_runner import Tierstream
from consumer.cli import app, schemas
from consumer.config import Config, Secret, load

CANARY = "canary-e6b1f4"

NOWHERE = "127.0.0.1:1"

STARTS_A_SERVICE = frozenset({"run", "demo", "broker", "bench"})
"""Run for long or start processes; e2e/test_security.py looks at what `run` says."""

ARGUMENTS: Mapping[str, list[str]] = {
    "inspect": ["operations", "0", "0"],
    "offset-map clear": ["--yes"],
    "produce": ["--count", "1"],
    "replay": ["operations", "0", "--from", "earliest", "--to", "latest", "--yes"],
    "reset-offsets": ["--to", "earliest", "--yes"],
    "schema register": ["operation", "--yes"],
    "storage get": ["u/objects/k"],
    "storage head": ["u/objects/k"],
    "storage init": ["--yes"],
    "storage recover": ["nobody", "--yes"],
    "storage rm": ["u/objects/k", "--yes"],
    "tail": ["--limit", "1"],
    "verify": ["--from", "earliest", "--to", "latest"],
    "check-config": ["--online"],
}
"""What a command needs beside the configuration."""


def secret_settings(model: type[BaseModel] = Config, path: str = "") -> Iterator[str]:
    """Every setting that holds a secret, by its path."""
    for name, described in model.model_fields.items():
        for kind in [described.annotation, *get_args(described.annotation)]:
            if kind is Secret:
                yield path + name
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from secret_settings(kind, f"{path}{name}.")


@cache
def commands() -> list[str]:
    """Every command that reads the configuration."""
    found: list[str] = []

    def walk(command: Any, path: list[str]) -> None:
        for name, below in getattr(command, "commands", {}).items():
            walk(below, [*path, name])
        if any("--config" in parameter.opts for parameter in command.params):
            found.append(" ".join(path))

    walk(typer.main.get_command(app), [])
    return sorted(set(found) - STARTS_A_SERVICE)


def settings_with_secrets(way: str, folder: Path) -> dict[str, Any]:
    """A valid configuration in which the secrets of *way* are all set."""
    nowhere = f"http://{NOWHERE}"
    kafka: dict[str, Any] = {"bootstrap_servers": NOWHERE, "security_protocol": "SASL_SSL"}
    if way == "passwords":
        kafka |= {"sasl_mechanism": "SCRAM-SHA-512", "sasl_username": "u", "sasl_password": CANARY}
        # Not there: a file that is, would be read, and the password of its key used, before anything else went wrong.
        kafka |= {"ssl_cert_file": str(folder / "none.pem"), "ssl_key_password": CANARY}
        registry = {"url": nowhere, "username": "u", "password": CANARY}
    else:
        kafka |= {
            "sasl_mechanism": "OAUTHBEARER",
            "oauth": {"token_url": f"{nowhere}/token", "client_id": "c", "client_secret": CANARY},
        }
        registry = {"url": nowhere, "bearer_token": CANARY}
    return {"kafka": kafka, "schema_registry": registry, "admin": {"port": 1}, "log": {"level": "debug"}}


@pytest.fixture
def tierstream(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Tierstream:
    """The command, in an empty folder."""
    return Tierstream(monkeypatch, capfd, tmp_path)


def test_every_secret_setting_is_one_that_is_tried(tmp_path: Path) -> None:
    """A new one has to come into one of the two configurations below."""
    tried = set()
    for way in ("passwords", "tokens"):
        path = tmp_path / f"{way}.yaml"
        path.write_text(yaml.safe_dump(settings_with_secrets(way, tmp_path)), encoding="utf-8")
        config = load(path, {})
        for setting in secret_settings():
            value: Any = config
            for name in setting.split("."):
                value = getattr(value, name, None)
            if value == Secret(CANARY):
                tried.add(setting)

    assert tried == set(secret_settings())
    assert len(tried) >= 5


@pytest.mark.parametrize("way", ["passwords", "tokens"])
@pytest.mark.parametrize("command", commands())
def test_no_command_says_a_secret(
    tierstream: Tierstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, way: str
) -> None:
    """On neither stream, for people and as JSON; not with success, not with any error."""
    monkeypatch.setattr(schemas, "REGISTRY_SECONDS", 0.2)
    config = settings_with_secrets(way, tmp_path)
    for form in ([], ["--json"]):
        done = tierstream(*command.split(), *ARGUMENTS.get(command, []), *form, config=config)

        assert done.out + done.err, "a command that says nothing says nothing about its secrets either"
        assert CANARY not in done.out + done.err
        assert "Traceback" not in done.err
