"""Configuration: four sources in order of strength, every mistake told at once and where it stands, no secret shown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from consumer.config import (
    GIB,
    KIB,
    MIB,
    BigtableTier,
    Config,
    Secret,
    format_duration,
    format_size,
    json_schema,
    load,
    parse_duration,
    parse_size,
)
from consumer.errors import ConfigError

CANARY = "hunter2-CANARY"

CONTRACT = """
kafka:
  bootstrap_servers: [127.0.0.1:9092]
  group_id: tierstream
  client_id: tierstream
  security_protocol: PLAINTEXT
  allow_insecure: false
  sasl_mechanism: null
  sasl_username: null
  sasl_password: null
  oauth: null
  ssl_ca_file: null
  ssl_cert_file: null
  ssl_key_file: null
  ssl_key_password: null
  session_timeout: 45s
  heartbeat_interval: 3s
  request_timeout: 70s
  transaction_timeout: 30s
input:
  topics: [operations]
  framing: auto
  start: earliest
  out_of_range: pause
  isolation: read_committed
output:
  topic: responses
  framing: bare
  compression: lz4
  linger: 0ms
  max_request_bytes: 3MiB
  copy_headers: [traceparent, tracestate, correlation-id]
  allow_compacted: false
topics:
  create: false
  partitions: 12
  replication_factor: 3
dead_letter:
  topic: operations.dlq
  max_consecutive: null
  max_ratio: null
  ratio_window: 1000
  on_limit: pause
schema_registry:
  url: null
  username: null
  password: null
  bearer_token: null
  ssl_ca_file: null
concurrency:
  limit: 500
window:
  policy: share-of-available
  fraction: 0.10
  exhausted: equal-share
ordering: key
delivery: at-least-once
commit:
  interval: 1s
  max_records: 5000
  transaction_interval: 100ms
rebalance:
  timeout: 60s
  drain_timeout: 25s
retry:
  attempts: 3
  initial: 100ms
  max: 5s
  attempt_timeout: 20s
  exhausted: block
limits:
  in_flight_bytes: 256MiB
  record_bytes: 8MiB
  object_bytes: 1GiB
  response_bytes: 2MiB
  avro_depth: 64
  avro_elements: 100000
references:
  allowed_prefixes: []
  in_responses: auto
  base_uri: null
  retention: 1h
storage:
  threshold: 1MiB
  key_generation: derived
  high_volume: {type: sqlite, path: data/objects.sqlite}
  long_term: {type: filesystem, path: data/objects}
  change_log: {type: sqlite, path: data/objects.sqlite, owner: null, lease: 30s}
usecases: {}
admin:
  host: 127.0.0.1
  port: 9464
  show_keys: false
log:
  level: info
  format: auto
runtime:
  loop: auto
  processes: 1
"""
"""The settings as the contract lists them, with their defaults."""


def loaded(
    folder: Path, text: str = "", environ: Mapping[str, str] | None = None, **flags: object
) -> Config:
    """Load a YAML text with an environment; no secret files but those the environment names."""
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, environ or {}, {name.replace("__", "."): value for name, value in flags.items()})


def problems(folder: Path, text: str = "", environ: Mapping[str, str] | None = None) -> list[str]:
    """Load what is wrong; return the problems."""
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text, environ)
    return str(caught.value).splitlines()


def names(tree: Mapping[str, Any], before: str = "") -> set[str]:
    """The dotted names of all settings in a nested mapping."""
    found: set[str] = set()
    for name, value in tree.items():
        found |= names(value, f"{before}{name}.") if isinstance(value, dict) and value else {before + name}
    return found


class TestDefaults:
    """What holds when nobody says anything."""

    def test_the_settings_of_the_contract_are_all_there_and_no_others(self) -> None:
        """Contract 6: names."""
        assert names(Config().shown()) == names(yaml.safe_load(CONTRACT))

    def test_the_defaults_are_those_of_the_contract(self, tmp_path: Path) -> None:
        """Contract 6: writing every default out changes nothing."""
        assert loaded(tmp_path, CONTRACT).shown() == load(None, {}).shown() == Config().shown()

    def test_values_have_plain_units_inside(self) -> None:
        """Seconds and bytes, so that nobody converts twice."""
        config = Config()

        assert (config.rebalance.drain_timeout, config.commit.transaction_interval) == (25.0, 0.1)
        assert (config.limits.in_flight_bytes, config.limits.object_bytes) == (256 * MIB, GIB)
        assert config.window.fraction == Fraction(1, 10)
        assert config.kafka.bootstrap_servers == ["127.0.0.1:9092"]

    def test_a_configuration_cannot_be_changed(self) -> None:
        """What was checked is what is used."""
        with pytest.raises(ValidationError):
            Config().kafka.group_id = "other"

    def test_the_small_legal_timing_of_the_contract_is_accepted(self, tmp_path: Path) -> None:
        """Contract 6: session 6 s, heartbeat 1 s, drain 10 s, rebalance 20 s, transaction 20 s, request 30 s."""
        text = """
kafka: {session_timeout: 6s, heartbeat_interval: 1s, request_timeout: 30s, transaction_timeout: 20s}
rebalance: {timeout: 20s, drain_timeout: 10s}
"""
        assert loaded(tmp_path, text).rebalance.timeout == 20.0

    def test_every_setting_says_what_it_does(self) -> None:
        """The schema is documentation: each setting of each section has a description."""
        schema = json_schema()
        silent = [
            f"{section}.{name}"
            for section, described in schema["$defs"].items()
            for name, setting in described["properties"].items()
            if not setting.get("description")
        ]

        assert not silent


class TestSources:
    """Where values come from."""

    def test_the_stronger_source_wins(self, tmp_path: Path) -> None:
        """Contract 6: flags > environment > secret files > YAML > defaults."""
        secrets = tmp_path / "secrets"
        secrets.mkdir()
        (secrets / "kafka__group_id").write_text("from-secret\n", encoding="utf-8")
        yaml_text = "kafka: {group_id: from-yaml}"
        files = {"TIERSTREAM_SECRETS_DIR": str(secrets)}
        variable = {"TIERSTREAM_KAFKA__GROUP_ID": "from-env"}

        groups = [
            load(None, {}).kafka.group_id,
            loaded(tmp_path, yaml_text).kafka.group_id,
            loaded(tmp_path, yaml_text, files).kafka.group_id,
            loaded(tmp_path, yaml_text, files | variable).kafka.group_id,
            loaded(tmp_path, yaml_text, files | variable, kafka__group_id="from-flag").kafka.group_id,
        ]

        assert groups == ["tierstream", "from-yaml", "from-secret", "from-env", "from-flag"]

    def test_every_value_knows_its_origin(self, tmp_path: Path) -> None:
        """Contract 7: `config show --origin`."""
        secrets = tmp_path / "secrets"
        secrets.mkdir()
        (secrets / "kafka__sasl_password").write_text(CANARY, encoding="utf-8")
        environ = {"TIERSTREAM_SECRETS_DIR": str(secrets), "TIERSTREAM_ORDERING": "unordered"}

        config = loaded(tmp_path, "\nkafka:\n  client_id: c\n", environ, kafka__group_id="g")

        assert config.origin("kafka.client_id") == f"{tmp_path / 'config.yaml'}:3"
        assert config.origin("ordering") == "TIERSTREAM_ORDERING"
        assert config.origin("kafka.sasl_password") == f"secret file {secrets / 'kafka__sasl_password'}"
        assert config.origin("kafka.group_id") == "flag"
        assert config.origin("admin.port") == "default"

    def test_the_file_may_be_named_by_the_environment(self, tmp_path: Path) -> None:
        """Contract 6: `TIERSTREAM_CONFIG`; a file given by flag is stronger."""
        (tmp_path / "a.yaml").write_text("ordering: unordered", encoding="utf-8")
        (tmp_path / "b.yaml").write_text("ordering: partition", encoding="utf-8")
        environ = {"TIERSTREAM_CONFIG": str(tmp_path / "a.yaml")}

        assert load(None, environ).ordering == "unordered"
        assert load(tmp_path / "b.yaml", environ).ordering == "partition"

    @pytest.mark.parametrize("text", ["a:1,b:2", " a:1 , b:2 ,"])
    def test_lists_are_comma_separated_in_the_environment_and_may_be_in_yaml(self, tmp_path: Path, text: str) -> None:
        """Contract 6: `TIERSTREAM_KAFKA__BOOTSTRAP_SERVERS=a:9092,b:9092`."""
        from_env = load(None, {"TIERSTREAM_KAFKA__BOOTSTRAP_SERVERS": text})
        from_yaml = loaded(tmp_path, f"kafka: {{bootstrap_servers: '{text}'}}")

        assert from_env.kafka.bootstrap_servers == from_yaml.kafka.bootstrap_servers == ["a:1", "b:2"]

    @pytest.mark.parametrize("text", ["", "null"])
    def test_an_empty_variable_means_none_where_none_is_allowed(self, text: str) -> None:
        """A dead letter topic can be switched off without a file."""
        assert load(None, {"TIERSTREAM_DEAD_LETTER__TOPIC": text}).dead_letter.topic is None

    def test_an_empty_variable_is_no_value_where_none_is_not_allowed(self, tmp_path: Path) -> None:
        """A chart that renders an empty value must not configure an empty group."""
        (problem,) = problems(tmp_path, environ={"TIERSTREAM_KAFKA__GROUP_ID": ""})

        assert problem.startswith("TIERSTREAM_KAFKA__GROUP_ID: kafka.group_id ")

    def test_usecases_keep_the_case_of_their_names(self) -> None:
        """Names of usecases are data, not settings."""
        config = load(None, {"TIERSTREAM_USECASES__Photos__ENABLED": "false"})

        assert not config.usecases["Photos"].enabled
        assert config.usecases["Photos"].expirations == ["none", "ttl", "tti"]

    def test_a_storage_section_is_chosen_by_its_type(self) -> None:
        """Contract 5: a backend has its own settings."""
        config = load(
            None,
            {
                "TIERSTREAM_STORAGE__HIGH_VOLUME__TYPE": "bigtable",
                "TIERSTREAM_STORAGE__HIGH_VOLUME__PROJECT": "p",
                "TIERSTREAM_STORAGE__HIGH_VOLUME__INSTANCE": "i",
                "TIERSTREAM_STORAGE__HIGH_VOLUME__TABLE": "t",
                "TIERSTREAM_STORAGE__LONG_TERM__TYPE": "memory",
                "TIERSTREAM_STORAGE__CHANGE_LOG__OWNER": "pod-0",
            },
        )

        assert config.storage.high_volume == BigtableTier(type="bigtable", project="p", instance="i", table="t")
        assert config.storage.long_term.type == "memory"
        assert (config.storage.change_log.type, config.storage.change_log.owner) == ("sqlite", "pod-0")

    def test_a_secret_file_loses_one_newline_and_no_more(self, tmp_path: Path) -> None:
        """Contract 6: one trailing newline stripped; a password may end in one."""
        (tmp_path / "kafka__sasl_password").write_bytes(b" a\n\n")
        password = load(None, {"TIERSTREAM_SECRETS_DIR": str(tmp_path)}).kafka.sasl_password

        assert password
        assert password.get() == " a\n"

    def test_the_folders_of_mounted_secrets_are_not_looked_at(self, tmp_path: Path) -> None:
        """Kubernetes mounts secrets as links into `..data` folders."""
        (tmp_path / "..2024").mkdir()
        (tmp_path / "..2024" / "kafka__sasl_password").write_text("p", encoding="utf-8")
        (tmp_path / "..data").symlink_to("..2024")
        (tmp_path / "kafka__sasl_password").symlink_to("..data/kafka__sasl_password")
        config = load(None, {"TIERSTREAM_SECRETS_DIR": str(tmp_path)})

        assert config.kafka.sasl_password == Secret("p")
        assert not [warning for warning in config.warnings if "secret file" in warning]

    def test_empty_sections_and_empty_files_are_defaults(self, tmp_path: Path) -> None:
        """A section whose settings are all commented out is no mistake."""
        commented_out = loaded(tmp_path, "kafka:\nstorage:\n  high_volume:\n")

        assert loaded(tmp_path, "# nothing\n").shown() == commented_out.shown() == Config().shown()


class TestMistakes:
    """What is wrong by itself."""

    def test_everything_that_is_wrong_is_said_at_once_and_where(self, tmp_path: Path) -> None:
        """Contract 6: YAML ones with file and line, environment ones with the variable's name."""
        text = """kafka:
  bootstrap_server: [x:1]
  session_timeout: soon
concurrency:
  limit: many
window: {fraction: 1.5}
"""
        environ = {"TIERSTREAM_KAFKA__GROUP": "g", "TIERSTREAM_ADMIN__PORT": "70000"}
        file = tmp_path / "config.yaml"

        found = problems(tmp_path, text, environ)

        assert sorted(found) == sorted(
            [
                f"{file}:2: kafka.bootstrap_server is not a setting; did you mean kafka.bootstrap_servers?",
                "TIERSTREAM_KAFKA__GROUP: is not a setting; did you mean TIERSTREAM_KAFKA__GROUP_ID?",
                f"{file}:3: kafka.session_timeout is a duration such as 30s, 250ms or 5m, not 'soon'",
                f"{file}:5: concurrency.limit should be a valid integer",
                f"{file}:6: window.fraction is a decimal number above 0 and at most 1, not 1.5",
                "TIERSTREAM_ADMIN__PORT: admin.port should be less than or equal to 65535",
            ]
        )

    def test_a_setting_in_the_wrong_section_is_found_in_the_right_one(self, tmp_path: Path) -> None:
        """Most unknown settings are known ones, elsewhere."""
        (problem,) = problems(tmp_path, "drain_timeout: 10s\n")

        assert problem.endswith(":1: drain_timeout is not a setting; did you mean rebalance.drain_timeout?")

    def test_below_a_name_of_the_users_choice_there_are_suggestions_too(self, tmp_path: Path) -> None:
        """In the file and in variables; the chosen name stays as it is."""
        text = "usecases:\n  Photos:\n    max_secods: 5\n"

        found = problems(tmp_path, text, {"TIERSTREAM_USECASES__Photos__ENABLE": "no"})

        assert [problem.rpartition("/")[2] for problem in found] == [
            "config.yaml:3: usecases.Photos.max_secods is not a setting; did you mean usecases.Photos.max_seconds?",
            "TIERSTREAM_USECASES__Photos__ENABLE: is not a setting; did you mean TIERSTREAM_USECASES__Photos__ENABLED?",
        ]

    def test_every_wrong_entry_of_a_list_is_named(self, tmp_path: Path) -> None:
        """Contract 6: all errors at once."""
        text = "kafka: {bootstrap_servers: [a, b:1, c]}\nreferences: {allowed_prefixes: [/x, 'gs://b/', 'file:///y']}\n"

        servers, prefixes = problems(tmp_path, text)

        assert servers.endswith("HOST:PORT, not 'a' or 'c'")
        assert prefixes.endswith("not '/x' or 'file:///y'")

    def test_a_setting_given_twice_is_a_mistake(self, tmp_path: Path) -> None:
        """YAML would silently take the last one."""
        (problem,) = problems(tmp_path, "kafka:\n  group_id: a\n  client_id: c\n  group_id: b\n")

        assert problem.endswith(":4: kafka.group_id is set twice, first in line 2")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("kafka: [unclosed\n", "is no YAML"),
            ("- a\n", "holds settings by name"),
            ("kafka: 5\n", ":1: kafka holds settings by name"),
            ("a: &a\n  b: *a\n", "a is not a setting"),
            ("kafka: {? [1] : 2}\n", "is a plain text"),
            ("kafka:\n\tgroup_id: g\n", ":2: is no YAML"),
            ("\x00", "is no YAML"),
            ("kafka: {group_id: 17}\n", "kafka.group_id is a text: put it in quotes"),
            ("concurrency: {limit: yes}\n", "concurrency.limit is a number, not True"),
            ("usecases: {'a b': {}}\n", "usecases.a b should match pattern"),
            ("storage: {high_volume: {type: tiered}}\n", "storage.high_volume.type is one of 'memory', 'sqlite'"),
            ("storage: {long_term: {type: s3}}\n", "storage.long_term.type is one of 'memory', 'filesystem', 'gcs'"),
            ("storage: {long_term: {type: gcs}}\n", ":1: storage.long_term.bucket is required"),
            ("storage: {long_term: {path: x, bucket: b}}\n", "storage.long_term.bucket is not a setting here"),
            ("kafka: {bootstrap_servers: [a:1, b]}\n", "kafka.bootstrap_servers holds HOST:PORT, not 'b'"),
            ("input: {topics: []}\n", "input.topics should have at least 1 item"),
            ("input: {topics: [a, a]}\n", "input.topics names a topic twice"),
            ("input: {topics: ['a b']}\n", "input.topics is a topic name"),
            ("references: {allowed_prefixes: ['gs://b/x']}\n", "ending with a slash"),
            ("references: {allowed_prefixes: ['file://host/x/']}\n", "holds prefixes like"),
            ("dead_letter: {max_ratio: .nan}\n", "dead_letter.max_ratio should be a finite number"),
        ],
    )
    def test_what_is_no_configuration_is_told_in_words(self, tmp_path: Path, text: str, expected: str) -> None:
        """Contract 11: wrong configuration is exit 2 with a reason, never a trace. TIER-20: tiers are not nested."""
        (problem,) = problems(tmp_path, text)

        assert expected in problem

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        """Contract 11."""
        (tmp_path / "latin").write_bytes(b"kafka: {group_id: \xe9}")

        with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'none'}: cannot be read: No such file")):
            load(tmp_path / "none", {})
        with pytest.raises(ConfigError, match="is not UTF-8"):
            load(tmp_path / "latin", {})

    def test_a_folder_of_secrets_that_was_named_has_to_be_there(self, tmp_path: Path) -> None:
        """The default folder may be missing; one that somebody named may not."""
        (problem,) = problems(tmp_path, environ={"TIERSTREAM_SECRETS_DIR": str(tmp_path / "none")})

        assert problem.startswith("TIERSTREAM_SECRETS_DIR: ")

    @pytest.mark.parametrize(
        "name",
        [
            "TIERSTREAM_CONFIG",
            "TIERSTREAM_SECRETS_DIR",
            "TIERSTREAM_TEST_BOOTSTRAP",
            "TIERSTREAM_REQUIRE_KAFKA",
            "TIERSTREAM_TEST__NESTED",
            "TIERSTREAM_SERVICE_HOST",
            "TIERSTREAM_SERVICE_PORT_METRICS",
            "TIERSTREAM_PORT",
            "TIERSTREAM_PORT_9464_TCP_ADDR",
            "TIERSTREAM_BROKER_PORT_9092_TCP",
            "OTHER_THING__X",
        ],
    )
    def test_variables_of_others_are_left_alone(self, tmp_path: Path, name: str) -> None:
        """Contract 6: test switches and Kubernetes service links are neither errors nor warnings."""
        folder = tmp_path / "value"
        folder.mkdir()
        file = tmp_path / "value.yaml"
        file.write_text("", encoding="utf-8")
        config = load(None, {name: str(file if name == "TIERSTREAM_CONFIG" else folder)})

        assert not [warning for warning in config.warnings if name in warning]

    def test_an_unknown_variable_without_nesting_is_a_warning(self) -> None:
        """Contract 6: it may belong to somebody else."""
        config = load(None, {"TIERSTREAM_ORDERNIG": "key", "TIERSTREAM_KAFKA": "x"})

        expected = "the variable TIERSTREAM_ORDERNIG means nothing here; did you mean TIERSTREAM_ORDERING?"
        assert expected in config.warnings
        assert [warning for warning in config.warnings if "TIERSTREAM_KAFKA means nothing" in warning]

    def test_unknown_secret_files_follow_the_same_rule(self, tmp_path: Path) -> None:
        """A misspelt password file would otherwise connect without a password."""
        (tmp_path / "kafka__sasl_pasword").write_text(CANARY, encoding="utf-8")

        found = problems(tmp_path, environ={"TIERSTREAM_SECRETS_DIR": str(tmp_path)})

        assert found == [
            f"secret file {tmp_path / 'kafka__sasl_pasword'}: is not a setting; did you mean kafka__sasl_password?"
        ]

    def test_plain_transport_is_warned_about(self) -> None:
        """Contract 6: plain transport warns at start."""
        assert not Config().warnings  # made by hand: nobody asked
        assert any("not encrypted" in warning for warning in load(None, {}).warnings)
        assert not load(None, {"TIERSTREAM_KAFKA__SECURITY_PROTOCOL": "SSL"}).warnings


@pytest.mark.parametrize(
    ("in_responses", "long_term", "seconds"),
    [
        ("auto", "{type: gcs, bucket: b}", 1800),
        ("auto", "{type: filesystem}", None),
        ("auto", "{type: memory}", None),
        ("always", "{type: filesystem}", 1800),
        ("never", "{type: gcs, bucket: b}", None),
    ],
)
def test_references_are_given_where_the_setting_and_the_tier_allow(
    tmp_path: Path, in_responses: str, long_term: str, seconds: float | None
) -> None:
    """Contract 5: auto is gcs yes, filesystem and memory no; only what may have been handed out is retained."""
    text = f"references: {{in_responses: {in_responses}, retention: 30m}}\nstorage: {{long_term: {long_term}}}\n"

    assert loaded(tmp_path, text).handout_seconds == seconds


SASL = "kafka: {security_protocol: SASL_SSL, "


class TestContradictions:
    """What is wrong together."""

    @pytest.mark.parametrize(
        ("text", "first", "second"),
        [
            ("rebalance: {drain_timeout: 90s}", "rebalance.drain_timeout (90s)", "rebalance.timeout (60s)"),
            ("rebalance: {drain_timeout: 60s}", "rebalance.drain_timeout", "rebalance.timeout"),
            ("rebalance: {timeout: 65s}", "rebalance.timeout (65s)", "kafka.request_timeout (70s)"),
            ("kafka: {heartbeat_interval: 15001ms}", "kafka.heartbeat_interval", "kafka.session_timeout (45s)"),
            ("commit: {transaction_interval: 30s}", "commit.transaction_interval", "kafka.transaction_timeout"),
            ("retry: {initial: 6s}", "retry.initial (6s)", "retry.max (5s)"),
            ("limits: {record_bytes: 512MiB}", "limits.record_bytes (512MiB)", "limits.in_flight_bytes (256MiB)"),
            ("limits: {response_bytes: 3MiB}", "limits.response_bytes (3MiB)", "output.max_request_bytes (3MiB)"),
            ("storage: {threshold: 2GiB}", "storage.threshold (2GiB)", "storage.high_volume.type"),
            ("kafka: {security_protocol: SASL_PLAINTEXT, sasl_mechanism: PLAIN, sasl_username: u, sasl_password: p}",
             "kafka.security_protocol", "kafka.allow_insecure"),
            (SASL + "sasl_username: u}", "kafka.security_protocol SASL_SSL", "kafka.sasl_mechanism"),
            (SASL + "sasl_mechanism: PLAIN, sasl_username: u}", "kafka.sasl_mechanism PLAIN", "kafka.sasl_password"),
            (SASL + "sasl_mechanism: OAUTHBEARER}", "kafka.sasl_mechanism OAUTHBEARER", "kafka.oauth"),
            ("kafka: {ssl_key_file: k.pem}", "kafka.ssl_key_file", "kafka.ssl_cert_file"),
            ("schema_registry: {password: p}", "schema_registry.password", "schema_registry.username"),
            ("schema_registry: {username: u, password: p, bearer_token: t}",
             "schema_registry.bearer_token", "schema_registry.username"),
            ("output: {topic: operations}", "output.topic operations", "input.topics"),
            ("dead_letter: {topic: operations}", "dead_letter.topic operations", "input.topics"),
            ("dead_letter: {topic: responses}", "dead_letter.topic responses", "output.topic"),
            ("output: {framing: confluent}", "output.framing", "schema_registry.url"),
            ("references: {in_responses: always}\nstorage: {long_term: {type: memory}}",
             "references.in_responses always", "storage.long_term.type"),
            ("references: {in_responses: always, retention: 0s}", "references.retention", "references.in_responses"),
            ("references: {retention: 0s}\nstorage: {long_term: {type: gcs, bucket: b}}",
             "references.retention", "references.in_responses"),
            ("runtime: {processes: 2}\nstorage: {long_term: {type: memory}}",
             "runtime.processes (2)", "storage.long_term.type"),
            ("runtime: {processes: 3}\nstorage: {high_volume: {type: memory}}",
             "runtime.processes (3)", "storage.high_volume.type"),
            ("runtime: {processes: 2}\nstorage: {change_log: {type: memory}}",
             "runtime.processes (2)", "storage.change_log.type"),
        ],
    )  # fmt: skip
    def test_settings_that_exclude_each_other_are_both_named(
        self, tmp_path: Path, text: str, first: str, second: str
    ) -> None:
        """Contract 6, H16d: cross-field rules, each naming both settings, and the line of what was set."""
        (problem,) = problems(tmp_path, text)

        assert first in problem
        assert second in problem
        assert problem.startswith(f"{tmp_path / 'config.yaml'}:1")

    @pytest.mark.parametrize(
        "text",
        [
            "rebalance: {timeout: 64999ms}",
            "kafka: {heartbeat_interval: 15s}",
            "limits: {record_bytes: 256MiB}",
            "limits: {response_bytes: 3008KiB}",
            "kafka: {security_protocol: SASL_SSL, sasl_mechanism: PLAIN, sasl_username: u, sasl_password: p}",
            "dead_letter: {topic: null}",
            "storage: {high_volume: {type: memory}, threshold: 2GiB}",
            "references: {in_responses: never, retention: 0s}\nstorage: {long_term: {type: gcs, bucket: b}}",
            "references: {retention: 0s}",
        ],
    )
    def test_the_edge_of_each_rule_is_allowed(self, tmp_path: Path, text: str) -> None:
        """A rule that refuses too much is as wrong as one that refuses too little."""
        loaded(tmp_path, text)

    def test_both_places_are_told_where_both_were_set(self, tmp_path: Path) -> None:
        """The mistake may be in either."""
        environ = {"TIERSTREAM_REBALANCE__DRAIN_TIMEOUT": "40s"}

        (problem,) = problems(tmp_path, "rebalance:\n  timeout: 30s\n", environ)

        assert problem.startswith(f"TIERSTREAM_REBALANCE__DRAIN_TIMEOUT and {tmp_path / 'config.yaml'}:2: ")

    def test_a_setting_wrong_by_itself_is_reported_once_beside_the_contradictions_of_others(
        self, tmp_path: Path
    ) -> None:
        """One mistake, one line; and the other mistakes are told as well."""
        found = problems(tmp_path, "rebalance: {drain_timeout: soon}\nlimits: {record_bytes: 1GiB}\n")

        assert len(found) == 2
        assert "rebalance.drain_timeout is a duration" in found[0]
        assert "limits.record_bytes (1GiB)" in found[1]


class TestSecrets:
    """What must not be seen."""

    SETTINGS = (
        "kafka.sasl_password",
        "kafka.ssl_key_password",
        "schema_registry.password",
        "schema_registry.bearer_token",
        "kafka.oauth.client_secret",
    )

    def test_no_secret_is_shown(self) -> None:
        """Contract 7: `config show` masks secrets."""
        environ = {
            f"TIERSTREAM_{name.upper().replace('.', '__')}": CANARY for name in self.SETTINGS if "bearer" not in name
        }
        environ |= {
            "TIERSTREAM_SCHEMA_REGISTRY__USERNAME": "u",
            "TIERSTREAM_KAFKA__OAUTH__TOKEN_URL": "https://t/",
            "TIERSTREAM_KAFKA__OAUTH__CLIENT_ID": "c",
            "TIERSTREAM_KAFKA__SSL_CERT_FILE": "cert.pem",
        }
        config = load(None, environ)
        kafka = config.kafka

        assert kafka.sasl_password
        assert kafka.sasl_password.get() == CANARY
        assert kafka.oauth
        assert CANARY not in repr(config) + str(config) + json.dumps(config.shown()) + config.model_dump_json()
        assert config.shown()["kafka"]["sasl_password"] == "***"
        assert config.shown()["kafka"]["oauth"]["client_secret"] == "***"

    @pytest.mark.parametrize(
        "text",
        [
            f"kafka: {{sasl_password: *{CANARY}}}",
            f"kafka: {{sasl_password: !{CANARY} x}}",
            f"kafka: {{sasl_password: [{CANARY}]}}",
            f"kafka: {{sasl_password: {{a: {CANARY}}}}}",
            f"kafka:\n  sasl_password: '{CANARY}\n",
            f"kafka:\n  sasl_password: @{CANARY}\n",
            f"kafka:\n  sasl_password: %{CANARY}: x\n",
            f'kafka:\n  sasl_password: "\\q{CANARY}"\n',
            f"kafka: {{sasl_password: {CANARY}, session_timeout: x, security_protocol: {'{'}{'}'}}}",
        ],
    )
    def test_no_problem_shows_a_secret(self, tmp_path: Path, text: str) -> None:
        """Error texts end up in logs and tickets."""
        assert CANARY not in "\n".join(problems(tmp_path, text))

    def test_a_secret_compares_by_value_and_shows_nothing(self) -> None:
        """Equality is what tests and reloads need; the text stays inside."""
        assert Secret("a") == Secret("a") != Secret("b")
        assert len({Secret("a"), Secret("a")}) == 1
        assert Secret("a") != "a"
        assert f"{Secret('a')} {Secret('a')!r}" == "*** ***"


class TestUnits:
    """Durations, sizes, fractions."""

    @pytest.mark.parametrize(
        ("text", "seconds"),
        [("30s", 30), ("250ms", 0.25), ("5m", 300), ("1h30m", 5400), ("1.5s", 1.5), ("1d", 86400), ("0", 0), (0, 0)],
    )
    def test_durations_have_units(self, text: object, seconds: float) -> None:
        """Contract 6."""
        assert parse_duration(text) == seconds

    @pytest.mark.parametrize("text", ["30", 30, 1.5, "", "s", "-1s", "1 s", "30S", "1e3s", True, None, "\u0661s"])
    def test_what_has_no_unit_is_no_duration(self, text: object) -> None:
        """30 what?"""
        with pytest.raises(ValueError, match="is a duration such as"):
            parse_duration(text)

    @pytest.mark.parametrize(
        ("text", "size"),
        [("64MiB", 64 * MIB), ("1MB", 10**6), ("1kB", 1000), ("1.5KiB", 1536), (17, 17), ("7", 7)],
    )
    def test_sizes_are_binary_decimal_or_bytes(self, text: object, size: int) -> None:
        """Contract 6."""
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["64M", "-1", -1, 1.5, "1.5", "0.3KiB", "MiB", "", True, None, "1e3"])
    def test_what_is_no_whole_number_of_bytes_is_no_size(self, text: object) -> None:
        """64M could be either."""
        with pytest.raises(ValueError, match="is a size such as"):
            parse_size(text)

    @given(st.integers(0, 10**10))
    def test_a_duration_written_is_read_back(self, milliseconds: int) -> None:
        """What `config show` prints can be configured."""
        assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)

    @given(st.integers(0, 2**60))
    def test_a_size_written_is_read_back(self, size: int) -> None:
        """What `config show` prints can be configured."""
        assert parse_size(format_size(size)) == size

    @pytest.mark.parametrize(("given", "fraction"), [(0.1, "1/10"), ("0.10", "1/10"), (1, "1"), ("1/3", "1/3")])
    def test_a_fraction_is_read_as_the_decimal_it_is_written_as(self, given: object, fraction: str) -> None:
        """Contract 6: 0.1 is a tenth, not the binary number beside it (window of 500 is 50, not 51)."""
        config = load(None, {}, {"window.fraction": given})

        assert config.window.fraction == Fraction(fraction)

    @pytest.mark.parametrize("given", [0, -0.1, 1.01, "nan", "inf", "x", "1/0", True, []])
    def test_a_fraction_outside_its_bounds_is_refused(self, given: object) -> None:
        """Contract 6: 0 < fraction <= 1."""
        with pytest.raises(ConfigError, match=r"window\.fraction is a decimal number"):
            load(None, {}, {"window.fraction": given})


class TestShown:
    """What is printed."""

    TEXT = """
kafka: {group_id: g, ssl_ca_file: /ca.pem, session_timeout: 1500ms, heartbeat_interval: 500ms}
window: {fraction: 0.25}
storage:
  threshold: 1000
  high_volume: {type: memory}
  long_term: {type: gcs, bucket: b, prefix: p/}
usecases: {photos: {expirations: [ttl], max_seconds: 60, max_object_bytes: 1MB}}
"""

    def test_what_is_shown_is_the_same_configuration(self, tmp_path: Path) -> None:
        """Contract 7: `config show` has the YAML's nesting, and reading it back changes nothing."""
        config = loaded(tmp_path, self.TEXT)

        again = loaded(tmp_path, yaml.safe_dump(config.shown()))

        assert again.shown() == config.shown()
        assert again.storage == config.storage

    def test_the_schema_names_every_setting_with_its_default_as_people_write_it(self) -> None:
        """Contract 7: `config schema`."""
        schema = json_schema()
        kafka = schema["$defs"]["Kafka"]["properties"]

        assert set(schema["properties"]) == set(Config.model_fields)
        assert kafka["session_timeout"]["default"] == "45s"
        assert schema["$defs"]["Limits"]["properties"]["record_bytes"]["default"] == "8MiB"
        assert schema["$defs"]["Admin"]["properties"]["port"]["maximum"] == 65535
        assert schema["additionalProperties"] is False
        json.dumps(schema)

    def test_every_section_refuses_what_it_does_not_know(self) -> None:
        """A misspelt setting that is ignored is worse than one that is refused."""

        def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
            below = set(model.__subclasses__())
            return below | {deeper for sub in below for deeper in sections(sub)}

        base = Config.__mro__[1]
        assert all(section.model_config.get("extra") == "forbid" for section in sections(base))
        assert KIB * KIB == MIB
