"""Why no broker can be reached, in words, with what to do about it.

aiokafka puts the reason into its log and raises that it was "unable to bootstrap". So when that has happened, one more
connection is made here, by the same means, to one broker after the other:

1. The first that is reached and says no (to the certificate, the password, the token, the protocol) is the answer: the
   others belong to the same cluster, and each attempt with a wrong password may count towards a lock-out.
2. Where none is reached, that is the answer, with what the last one failed with.

Texts and hints name settings, addresses and what the peer's protocol says, and hold no credential.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from aiokafka.conn import AIOKafkaConnection, collect_hosts
from aiokafka.errors import (
    IllegalSaslStateError,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    UnsupportedSaslMechanismError,
)
from aiokafka.protocol.metadata import MetadataRequest

from consumer.kafka.connection import TokenUnavailable
from consumer.kafka.frames import NotAKafkaAnswer

ATTEMPT_SECONDS: Final = 5.0
"""Longest wait for one broker; who diagnoses has waited already."""
CLOSE_SECONDS: Final = 1.0
"""Longest wait for the end of a connection: TLS says farewell, and a broker that delays its refusals answers late."""

_CONNECTING: Final = (
    "client_id",
    "request_timeout_ms",
    "security_protocol",
    "ssl_context",
    "sasl_mechanism",
    "sasl_plain_username",
    "sasl_plain_password",
    "sasl_oauth_token_provider",
)
"""The settings of a client that are those of a connection."""

_NAME_MISMATCH: Final = frozenset({62, 64})
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""
_NOT_YET, _EXPIRED = 9, 10
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED."""


class _NoBrokers(ConnectionError):
    """The answer to the first question names no broker, not even the one that gave it: it is a refusal.

    The client takes the error of OAUTHBEARER, which is a part of the exchange (RFC 7628, 3.2.2), for its success; the
    broker, which still waits for the end of the exchange, refuses the first question in its stead, and closes.
    """


@dataclass(frozen=True, slots=True)
class Reason:
    """Why, and what to do about it."""

    text: str
    hint: str
    reached: bool = True
    """False where nobody was there to say no: another broker may say more."""


async def why_unreachable(settings: Mapping[str, Any]) -> Reason:
    """Try the brokers of a client's *settings* once more and say what fails.

    Cancellation: nothing stays open.
    """
    servers = ", ".join(settings["bootstrap_servers"])
    last = Reason("", "is one of them running, and does kafka.bootstrap_servers name it?", reached=False)
    for host, port, _ in collect_hosts(list(settings["bootstrap_servers"]), randomize=False):
        error = await _attempt(host, port, settings)
        if error is None:
            return Reason(f"{host}:{port} did not answer, and does so now", "try again")
        last = _reason(error, settings)
        if last.reached:
            return Reason(f"{host}:{port}: {last.text}", last.hint)
    detail = f" ({last.text})" if last.text else ""
    return Reason(f"no broker answers at {servers}{detail}", last.hint, reached=False)


async def _attempt(host: str, port: int, settings: Mapping[str, Any]) -> Exception | None:
    """Connect, authenticate, ask one question; return what went wrong."""
    connection = AIOKafkaConnection(host, port, **{name: settings[name] for name in _CONNECTING if name in settings})
    try:
        async with asyncio.timeout(ATTEMPT_SECONDS):
            await connection.connect()
            answer = await connection.send(MetadataRequest([]))
            if not answer.brokers:
                raise _NoBrokers
    except (OSError, EOFError, KafkaError, TimeoutError) as error:
        return error
    finally:
        closed = connection.close()
        if connection._protocol is not None:  # noqa: SLF001 - else there was no connection, and nobody tells of its end
            await asyncio.wait([closed], timeout=CLOSE_SECONDS)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and what led to it, nearest first."""
    known: BaseException | None = error
    while known is not None:
        yield known
        known = known.__cause__ or known.__context__


def _reason(error: Exception, settings: Mapping[str, Any]) -> Reason:
    """Put *error* into words: the first of its causes that says something."""
    causes = list(_causes(error))
    for cause in causes:
        reason = _in_words(cause, settings)
        if reason is not None:
            return reason
    return Reason(type(causes[-1]).__name__, "the broker's log may say more")


def _in_words(cause: BaseException, settings: Mapping[str, Any]) -> Reason | None:  # noqa: PLR0911 - a table of cases
    match cause:
        case ssl.SSLCertVerificationError():
            return _of_certificate(cause)
        case ssl.SSLError() if "ALERT" in _ssl_reason(cause):
            return _of_alert(cause)
        case ssl.SSLError():
            hint = "does that listener speak TLS? kafka.security_protocol and kafka.bootstrap_servers have to agree"
            return Reason(f"no TLS connection ({_ssl_reason(cause)})", hint)
        case TokenUnavailable():
            hint = "kafka.oauth names the token endpoint, client_id and client_secret; its own log says why it refuses"
            return Reason(str(cause), hint)
        case SaslAuthenticationFailed():
            hint = (
                "kafka.sasl_username, kafka.sasl_password and kafka.sasl_mechanism have to be those of an account of "
                "the broker"
            )
            return Reason("the broker refuses the user name or the password", hint)
        case UnsupportedSaslMechanismError() | IllegalSaslStateError():
            hint = "kafka.sasl_mechanism and kafka.bootstrap_servers have to be those of one listener of the broker"
            return Reason(f"the broker does not offer {settings.get('sasl_mechanism', 'SASL')} there", hint)
        case NotAKafkaAnswer():
            hint = "kafka.bootstrap_servers has to name a broker, and kafka.security_protocol what its listener speaks"
            return Reason(f"what answers there does not speak plain Kafka ({cause})", hint)
        case socket.gaierror():
            hint = "is the name in kafka.bootstrap_servers right, and known to the name server of this machine?"
            return Reason(f"the name is not known: {cause.strerror}", hint, reached=False)
        case TimeoutError():
            hint = "does a firewall or a network policy stand between? a broker that is frozen looks the same"
            return Reason("no answer in time", hint, reached=False)
        case ConnectionRefusedError():
            hint = "is one of them running, and does kafka.bootstrap_servers name it?"
            return Reason("connection refused", hint, reached=False)
        case asyncio.IncompleteReadError() | ConnectionResetError() | BrokenPipeError() | _NoBrokers():
            return _of_closing(settings)
        case KafkaConnectionError() if cause.__cause__ is None and cause.__context__ is None:
            return _of_closing(settings)
        case OSError():  # also several at once, where a name has several addresses
            hint = "kafka.bootstrap_servers has to name brokers that run, and that this machine can reach"
            return Reason(cause.strerror or str(cause) or type(cause).__name__, hint, reached=False)
    return None


def _of_certificate(error: ssl.SSLCertVerificationError) -> Reason:
    text = f"the broker's certificate is refused: {error.verify_message}"
    if error.verify_code in _NAME_MISMATCH:
        return Reason(text, "kafka.bootstrap_servers has to use a name that stands in the broker's certificate")
    if error.verify_code in {_NOT_YET, _EXPIRED}:
        return Reason(text, "renew the certificate of the broker; the clock of this machine may be wrong too")
    return Reason(text, "kafka.ssl_ca_file has to hold the authority that has signed the broker's certificate")


def _ssl_reason(error: ssl.SSLError) -> str:
    """Return OpenSSL's name of what happened; errors that are not from there have none."""
    return getattr(error, "reason", None) or type(error).__name__


def _of_alert(error: ssl.SSLError) -> Reason:
    alert = _ssl_reason(error).rpartition("ALERT_")[2].replace("_", " ").lower()
    hint = (
        "does it ask for a client certificate? kafka.ssl_cert_file and kafka.ssl_key_file have to hold one that the "
        "broker trusts and that has not expired"
    )
    return Reason(f"the broker breaks off the TLS handshake ({alert})", hint)


def _of_closing(settings: Mapping[str, Any]) -> Reason:
    """The broker has closed the connection without a word: what that means depends on what it was told."""
    if settings.get("sasl_mechanism") == "OAUTHBEARER":
        hint = "audience, issuer, scope and lifetime of the token have to be what the broker expects; its log says why"
        return Reason("the broker refuses the token of kafka.oauth", hint)
    if settings["security_protocol"] == "SSL":
        hint = (
            "does that listener speak TLS, does it ask for a client certificate (kafka.ssl_cert_file), or for SASL "
            "(kafka.security_protocol)?"
        )
        return Reason("the broker closes the connection", hint)
    hint = "does that listener speak TLS or SASL? kafka.security_protocol and kafka.bootstrap_servers have to agree"
    return Reason("the broker closes the connection", hint)


__all__ = ["Reason", "why_unreachable"]
