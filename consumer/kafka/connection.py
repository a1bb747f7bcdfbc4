"""From the configuration to the arguments of aiokafka's clients; the one place that decides them.

:func:`consumer_settings`, :func:`producer_settings` and :func:`admin_settings` return keyword arguments. What is fixed
here and not configurable is fixed because a hazard of the client depends on it; the reasons stand beside each value.

Credentials: certificates are those that are in their files when a connection is made, OAuth tokens are asked for when a
connection needs one; user names and passwords are those of the start. No error text holds a secret.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from aiokafka.abc import AbstractTokenProvider
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

from consumer.certificates import identified, trusting
from consumer.config import KIB, MIB, Config, Kafka, Oauth

METADATA_MAX_AGE_MS: Final = 60_000
"""New partitions and deleted topics are noticed within a minute; by default it would be five (hazard H16i)."""

RETRY_BACKOFF_MS: Final = 250
"""aiokafka's waits between attempts do not grow; at its default of 100 ms a lost broker is asked, and an account with
a wrong password tried, ten times a second (hazard H32)."""

MAX_POLL_INTERVAL_MS: Final = 300_000
"""The service polls all the time, also when every partition is paused (hazard H16b); its own watchdog is quicker."""

FETCH_BYTES_MAX: Final = 8 * MIB
"""Decompressing and parsing a fetch runs within one turn of the event loop (hazard H9): small fetches, short turns."""

RECORD_OVERHEAD_BYTES: Final = MIB
"""Key, headers and batch around a value of ``limits.record_bytes``; a broker's own default for all of it is 1 MiB."""

BATCH_BYTES: Final = 512 * KIB
"""Largest batch before compression: half of a broker's default limit. Below 64 KiB throughput is lost (measured)."""

TOKEN_SECONDS_MAX: Final = 10.0
"""Longest wait for an OAuth token; connecting waits for it, and with it everything on that client (hazard H30)."""

TOKEN_BYTES_MAX: Final = 64 * KIB
"""Largest answer of a token endpoint that is read."""

TOKEN_LIFE_SECONDS: Final = 300.0
"""Life of a token whose endpoint does not tell."""

TOKEN_RENEWAL: Final = 0.8
"""Part of its life after which a token is replaced by a fresh one at the next connection: the broker closes connections
when their token expires, so one used late would be closed at once (hazard H33)."""


def consumer_settings(config: Config) -> dict[str, Any]:
    """Return the arguments of the service's consumer, without topics.

    Raises:
        ConfigError: a certificate or key cannot be used; the text names the setting.
    """
    kafka = config.kafka
    return {
        **_client_settings(config),
        "group_id": kafka.group_id,
        "auto_offset_reset": "none",  # where to start is decided by the service; a lost offset is an alarm (rule 3)
        "enable_auto_commit": False,  # only answered records are committed
        "check_crcs": True,
        "isolation_level": config.input.isolation,
        # Exactly one, and always this one: with two the group never forms (H16); another would be a new protocol.
        "partition_assignment_strategy": (StickyPartitionAssignor,),
        "session_timeout_ms": _milliseconds(kafka.session_timeout),
        "heartbeat_interval_ms": _milliseconds(kafka.heartbeat_interval),
        "rebalance_timeout_ms": _milliseconds(config.rebalance.timeout),  # else it is the session timeout (H11)
        "max_poll_interval_ms": MAX_POLL_INTERVAL_MS,
        "fetch_max_bytes": FETCH_BYTES_MAX,
        "max_partition_fetch_bytes": config.limits.record_bytes + RECORD_OVERHEAD_BYTES,  # H2
    }


def reader_settings(config: Config, *, committed_only: bool = True) -> dict[str, Any]:
    """Return the arguments of a consumer outside any group, that commits nothing: for looking at topics.

    Raises:
        ConfigError: as :func:`consumer_settings`.
    """
    return {
        **_client_settings(config),
        "group_id": None,
        "auto_offset_reset": "none",
        "enable_auto_commit": False,
        "isolation_level": "read_committed" if committed_only else "read_uncommitted",
        "fetch_max_bytes": FETCH_BYTES_MAX,
        "max_partition_fetch_bytes": max(config.limits.record_bytes, config.output.max_request_bytes)
        + RECORD_OVERHEAD_BYTES,
    }


def producer_settings(
    config: Config, *, batch_bytes: int = BATCH_BYTES, transactional_id: str | None = None
) -> dict[str, Any]:
    """Return the arguments of an idempotent producer; a transactional one with *transactional_id*.

    Args:
        config: The configuration.
        batch_bytes: Largest batch before compression.
        transactional_id: Makes the producer transactional, and fences an older one of the same id.

    Raises:
        ConfigError: as :func:`consumer_settings`.
    """
    settings: dict[str, Any] = {
        **_client_settings(config),
        "acks": "all",
        "enable_idempotence": True,
        "compression_type": None if config.output.compression == "none" else config.output.compression,
        "linger_ms": _milliseconds(config.output.linger),
        "max_batch_size": batch_bytes,
        "max_request_size": config.output.max_request_bytes,  # of one record, uncompressed (H18d)
    }
    if transactional_id is not None:
        settings["transactional_id"] = transactional_id
        settings["transaction_timeout_ms"] = _milliseconds(config.kafka.transaction_timeout)
    return settings


def admin_settings(config: Config) -> dict[str, Any]:
    """Return the arguments of an administration client.

    Raises:
        ConfigError: as :func:`consumer_settings`.
    """
    return _client_settings(config)


def _client_settings(config: Config) -> dict[str, Any]:
    kafka = config.kafka
    settings: dict[str, Any] = {
        "bootstrap_servers": list(kafka.bootstrap_servers),
        "client_id": kafka.client_id,
        "request_timeout_ms": _milliseconds(kafka.request_timeout),
        "retry_backoff_ms": RETRY_BACKOFF_MS,
        "metadata_max_age_ms": METADATA_MAX_AGE_MS,
        "security_protocol": kafka.security_protocol,
    }
    if kafka.security_protocol in {"SSL", "SASL_SSL"}:
        settings["ssl_context"] = ssl_context(kafka)
    if kafka.security_protocol.startswith("SASL_"):
        settings["sasl_mechanism"] = kafka.sasl_mechanism
        if kafka.oauth is not None and kafka.sasl_mechanism == "OAUTHBEARER":
            settings["sasl_oauth_token_provider"] = OauthTokens(kafka.oauth, kafka.ssl_ca_file)
        else:
            settings["sasl_plain_username"] = kafka.sasl_username
            settings["sasl_plain_password"] = kafka.sasl_password.get() if kafka.sasl_password else None
    return settings


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def ssl_context(kafka: Kafka) -> ssl.SSLContext:
    """Return a context that verifies the broker's certificate and host name, and shows our certificate if there is one.

    It follows the files: what replaces them holds from the next connection on.

    Raises:
        ConfigError: a file is missing, unreadable, or not what it should be; the text names the setting.
    """
    password = kafka.ssl_key_password.get() if kafka.ssl_key_password else ""
    return identified(kafka.ssl_ca_file, kafka.ssl_cert_file, kafka.ssl_key_file, password, "kafka")


class TokenUnavailable(OSError):
    """There is no OAuth token to be had; the text says why, and holds no secret."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the request carries a secret, meant for one address."""

    def redirect_request(self, *_redirect: object, **_more: object) -> None:
        """Refuse; the status becomes an ``HTTPError``."""


class OauthTokens(AbstractTokenProvider):
    """Access tokens by OAuth 2 client credentials, one kept until :data:`TOKEN_RENEWAL` of its life is over.

    An exception that is no ``OSError`` would end aiokafka's fetch task without a word (hazard H3), so every failure
    becomes one.

    Args:
        oauth: Whom to ask, and as whom.
        ca_file: Authorities to trust for the token endpoint, besides those of the system.
        clock: Monotonic seconds.
    """

    def __init__(self, oauth: Oauth, ca_file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._oauth = oauth
        self._clock = clock
        context = trusting(ca_file, "kafka.ssl_ca_file", besides_system=True)
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=context))
        self._token = ""
        self._renew_at = 0.0

    async def token(self) -> str:
        """Return a token that is good for a while.

        Raises:
            TokenUnavailable: the endpoint did not give one within :data:`TOKEN_SECONDS_MAX`.

        Cancellation: the request ends by itself in its thread; its token is lost.
        """
        if self._clock() >= self._renew_at:
            asked = self._clock()
            try:
                async with asyncio.timeout(TOKEN_SECONDS_MAX):
                    token, life = await asyncio.to_thread(self._ask)
            except Exception as error:  # noqa: BLE001 - see the class: nothing else may come out of here
                detail = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
                raise TokenUnavailable(f"no OAuth token: {detail}") from None
            self._token, self._renew_at = token, asked + life * TOKEN_RENEWAL
        return self._token

    def _ask(self) -> tuple[str, float]:
        """Ask for a token; return it and its life in seconds."""
        oauth = self._oauth
        form = {"grant_type": "client_credentials"} | ({"scope": oauth.scope} if oauth.scope else {})
        # RFC 6749, 2.3.1: both are form-encoded before they are joined.
        pair = ":".join(urllib.parse.quote_plus(part) for part in (oauth.client_id, oauth.client_secret.get()))
        request = urllib.request.Request(  # noqa: S310 - the configuration allows http and https only
            oauth.token_url,
            data=urllib.parse.urlencode(form).encode(),
            headers={"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()},
        )
        try:
            with self._opener.open(request, timeout=TOKEN_SECONDS_MAX) as answer:
                said = json.loads(answer.read(TOKEN_BYTES_MAX))
        except urllib.error.HTTPError as refusal:
            refusal.close()  # it is an answer too, and holds the connection
            raise
        token = said["access_token"]
        if not isinstance(token, str) or not token:
            raise ValueError("access_token is no text")
        return token, float(said.get("expires_in") or TOKEN_LIFE_SECONDS)
