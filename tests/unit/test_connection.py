"""The arguments of the Kafka clients: values that hazards depend on, and credentials that stay where they belong."""

from __future__ import annotations

import asyncio
import inspect
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

from consumer.config import MIB, Config, Oauth, load
from consumer.errors import ConfigError
from consumer.kafka.connection import (
    OauthTokens,
    admin_settings,
    consumer_settings,
    producer_settings,
    reader_settings,
    ssl_context,
)

CANARY = "hunter2-CANARY"


def configured(**flags: object) -> Config:
    """A configuration with settings given as ``kafka__group_id``."""
    return load(None, {}, {name.replace("__", "."): value for name, value in flags.items()})


def sasl(mechanism: str = "PLAIN", **flags: object) -> Config:
    """A configuration that authenticates, over TLS."""
    return configured(kafka__security_protocol="SASL_SSL", kafka__sasl_mechanism=mechanism, **flags)


class TestSettings:
    """What the clients are given."""

    @pytest.mark.parametrize(
        ("client", "settings"),
        [
            (AIOKafkaConsumer, consumer_settings),
            (AIOKafkaConsumer, reader_settings),
            (AIOKafkaProducer, producer_settings),
            (AIOKafkaClient, admin_settings),
        ],
    )
    @pytest.mark.parametrize("config", [configured(), sasl(kafka__sasl_username="u", kafka__sasl_password="p")])
    async def test_the_client_takes_every_argument(
        self, client: Callable[..., Any], settings: Callable[[Config], dict[str, Any]], config: Config
    ) -> None:
        """A misspelt argument would show at the first start in production."""
        given = settings(config)

        assert set(given) <= set(inspect.signature(client).parameters)
        made = client(**given)
        await (made.close() if client is AIOKafkaClient else made.stop())

    def test_offsets_are_ours_alone(self) -> None:
        """Hazards, rule 3: no auto commit, no silent jump."""
        given = consumer_settings(configured())

        assert (given["enable_auto_commit"], given["auto_offset_reset"]) == (False, "none")
        assert given["check_crcs"] is True

    def test_there_is_exactly_one_assignor_and_it_is_sticky(self) -> None:
        """H16: two make several JoinGroup requests; contract 3: changing it is a breaking release."""
        assert consumer_settings(configured())["partition_assignment_strategy"] == (StickyPartitionAssignor,)

    def test_timing_is_the_configured_one_in_milliseconds(self) -> None:
        """H11: without a rebalance timeout of its own it would be the session timeout; H16i, H32: not the defaults."""
        given = consumer_settings(configured(kafka__session_timeout="6s", kafka__heartbeat_interval="500ms"))

        assert (given["session_timeout_ms"], given["heartbeat_interval_ms"]) == (6000, 500)
        assert (given["rebalance_timeout_ms"], given["request_timeout_ms"]) == (60_000, 70_000)
        assert given["metadata_max_age_ms"] == 60_000
        assert given["retry_backoff_ms"] >= 250

    def test_a_fetch_is_small_and_yet_holds_the_largest_record(self) -> None:
        """H2, H9: a record that does not fit moves the position by one, unread."""
        given = consumer_settings(configured(limits__record_bytes="32MiB"))

        assert given["fetch_max_bytes"] == 8 * MIB
        assert given["max_partition_fetch_bytes"] > 32 * MIB

    def test_isolation_is_the_configured_one(self) -> None:
        """Contract 6: `input.isolation`."""
        assert consumer_settings(configured())["isolation_level"] == "read_committed"
        loose = consumer_settings(configured(input__isolation="read_uncommitted"))
        assert loose["isolation_level"] == "read_uncommitted"

    def test_responses_are_written_once_and_by_all(self) -> None:
        """Contract 3: acknowledged means written by all in-sync replicas."""
        given = producer_settings(configured())

        assert (given["acks"], given["enable_idempotence"]) == ("all", True)
        assert "transactional_id" not in given

    @pytest.mark.parametrize(("configured_as", "given_as"), [("none", None), ("lz4", "lz4"), ("zstd", "zstd")])
    def test_no_compression_is_none_for_the_client(self, configured_as: str, given_as: str | None) -> None:
        """The client refuses the text "none"."""
        given = producer_settings(configured(output__compression=configured_as))

        assert given["compression_type"] == given_as

    def test_a_transactional_producer_has_an_id_and_a_time_limit(self) -> None:
        """H25: an open transaction holds up readers until its time is over."""
        given = producer_settings(configured(), transactional_id="g/t/0", batch_bytes=1000)

        assert (given["transactional_id"], given["transaction_timeout_ms"]) == ("g/t/0", 30_000)
        assert given["max_batch_size"] == 1000

    def test_a_reader_is_in_no_group(self) -> None:
        """Looking at a topic must not take partitions from the service."""
        assert reader_settings(configured())["group_id"] is None

    def test_without_sasl_no_password_is_handed_over(self) -> None:
        """What is not used is not spread."""
        config = configured(kafka__sasl_username="u", kafka__sasl_password=CANARY)

        assert CANARY not in repr(consumer_settings(config))

    def test_user_and_password_go_to_the_client(self) -> None:
        """SASL PLAIN and SCRAM."""
        config = sasl("SCRAM-SHA-512", kafka__sasl_username="u", kafka__sasl_password="p")
        given = consumer_settings(config)

        assert (given["sasl_mechanism"], given["sasl_plain_username"]) == ("SCRAM-SHA-512", "u")
        assert given["sasl_plain_password"] == "p"

    def test_tls_verifies_certificate_and_host_name(self) -> None:
        """H36: a wrong endpoint could ask for gigabytes."""
        context = consumer_settings(configured(kafka__security_protocol="SSL"))["ssl_context"]

        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


class TestFiles:
    """Certificates and keys."""

    @pytest.mark.parametrize("setting", ["ssl_ca_file", "ssl_cert_file"])
    def test_a_file_that_is_not_there_is_named_by_its_setting(self, tmp_path: Path, setting: str) -> None:
        """Contract 11: configuration, exit 2, in words."""
        config = configured(kafka__security_protocol="SSL", **{f"kafka__{setting}": tmp_path / "none.pem"})

        with pytest.raises(ConfigError, match=rf"kafka\.{setting} cannot be used: No such file"):
            ssl_context(config.kafka)

    @pytest.mark.parametrize("setting", ["ssl_ca_file", "ssl_cert_file"])
    def test_a_file_that_holds_something_else_is_named_and_not_shown(self, tmp_path: Path, setting: str) -> None:
        """A key pasted into the wrong file must not end up in the log."""
        file = tmp_path / "wrong.pem"
        file.write_text(CANARY, encoding="utf-8")
        config = configured(kafka__security_protocol="SSL", **{f"kafka__{setting}": file})

        with pytest.raises(ConfigError, match=rf"kafka\.{setting} cannot be used") as caught:
            ssl_context(config.kafka)

        assert CANARY not in str(caught.value)


class TokenEndpoint:
    """An OAuth token endpoint on loopback that answers as it is told."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.answer: tuple[int, bytes] = (200, b"{}")
        self.location: str | None = None
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                endpoint.asked.append((self.headers["Authorization"], parse_qs(form)))
                status, body = endpoint.answer
                self.send_response(status)
                if endpoint.location:
                    self.send_header("Location", endpoint.location)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def says(self, token: str, **more: object) -> None:
        """Answer with a token."""
        self.answer = 200, json.dumps({"access_token": token, **more}).encode()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def endpoint() -> Iterator[TokenEndpoint]:
    """A token endpoint."""
    made = TokenEndpoint()
    yield made
    made.close()


class TestOauth:
    """Tokens for SASL OAUTHBEARER."""

    def tokens(self, endpoint: TokenEndpoint, clock: Callable[[], float] = lambda: 0.0) -> OauthTokens:
        """A provider that asks *endpoint*."""
        given = {"token_url": endpoint.url, "client_id": "me:1", "client_secret": CANARY, "scope": "kafka"}
        return OauthTokens(Oauth.model_validate(given), None, clock)

    def test_the_configuration_leads_to_a_provider(self) -> None:
        """Contract 6: `kafka.oauth`."""
        config = sasl(
            "OAUTHBEARER",
            kafka__oauth__token_url="https://t/",
            kafka__oauth__client_id="c",
            kafka__oauth__client_secret="s",
        )

        assert isinstance(consumer_settings(config)["sasl_oauth_token_provider"], OauthTokens)

    async def test_a_token_is_asked_for_by_client_credentials_and_kept(self, endpoint: TokenEndpoint) -> None:
        """RFC 6749, 4.4; H33: the provider caches."""
        endpoint.says("t1", expires_in=100)
        tokens = self.tokens(endpoint)

        assert [await tokens.token(), await tokens.token()] == ["t1", "t1"]

        ((authorization, form),) = endpoint.asked
        assert authorization.startswith("Basic ")
        assert form == {"grant_type": ["client_credentials"], "scope": ["kafka"]}

    async def test_a_token_is_renewed_before_it_ends(self, endpoint: TokenEndpoint) -> None:
        """H33: the broker closes the connection when the token expires."""
        now = 0.0
        tokens = self.tokens(endpoint, lambda: now)
        endpoint.says("t1", expires_in=100)
        first = await tokens.token()
        endpoint.says("t2", expires_in=100)
        now = 79.0
        kept = await tokens.token()
        now = 81.0

        assert [first, kept, await tokens.token()] == ["t1", "t1", "t2"]

    @pytest.mark.parametrize(
        "answer",
        [
            (401, b'{"error": "invalid_client"}'),
            (500, b""),
            (200, b"no json"),
            (200, b"[]"),
            (200, b'{"access_token": 5}'),
            (200, b'{"access_token": "t", "expires_in": "soon"}'),
        ],
    )
    async def test_every_failure_is_an_os_error(self, endpoint: TokenEndpoint, answer: tuple[int, bytes]) -> None:
        """H3: any other exception would end aiokafka's fetch task without a word."""
        endpoint.answer = answer

        with pytest.raises(OSError, match="no OAuth token") as caught:
            await self.tokens(endpoint).token()

        assert CANARY not in str(caught.value)

    async def test_nobody_there_is_an_os_error_too(self, endpoint: TokenEndpoint) -> None:
        """As above."""
        tokens = self.tokens(endpoint)
        await asyncio.to_thread(endpoint.close)

        with pytest.raises(OSError, match="no OAuth token"):
            await tokens.token()

    async def test_the_secret_follows_no_redirect(self, endpoint: TokenEndpoint) -> None:
        """It is meant for one address."""
        endpoint.answer, endpoint.location = (307, b""), endpoint.url

        with pytest.raises(OSError, match="status 307"):
            await self.tokens(endpoint).token()

        assert len(endpoint.asked) == 1
