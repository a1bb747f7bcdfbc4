"""Why no broker can be reached: the first that says no is the answer, else that nobody is there.

What a real broker says no to is tried in e2e/test_security.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import pytest
from aiokafka.errors import KafkaConnectionError, SaslAuthenticationFailed

from brokers import unused_port
from consumer.config import Config
from consumer.kafka import diagnosis
from consumer.kafka.connection import admin_settings
from consumer.kafka.diagnosis import Reason, why_unreachable
from consumer.kafka.frames import NotAKafkaAnswer


class Rude:
    """Listens, and closes every connection at once."""

    def __init__(self) -> None:
        self.met = 0
        self.address = ""

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Rude]:
        """Listen on a free port."""

        async def meet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.met += 1
            writer.close()

        server = await asyncio.start_server(meet, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self


async def why(*servers: str, protocol: str = "PLAINTEXT") -> Reason:
    """Ask for the reason."""
    kafka = {"bootstrap_servers": list(servers), "security_protocol": protocol}
    return await why_unreachable(admin_settings(Config.model_validate({"kafka": kafka})))


async def test_where_nobody_listens_all_addresses_are_named() -> None:
    """The text and the hint are those of a broker that is not there."""
    first, second = (f"127.0.0.1:{unused_port()}" for _ in range(2))

    reason = await why(first, second)

    assert reason.text == f"no broker answers at {first}, {second} (connection refused)"
    assert "kafka.bootstrap_servers" in reason.hint
    assert not reason.reached


async def test_a_name_that_nobody_knows_is_told_as_such() -> None:
    """The name server is somebody else than the broker."""
    reason = await why("no-such-host.invalid:9092")

    assert "the name is not known" in reason.text
    assert not reason.reached


async def test_the_first_that_says_no_is_the_answer_and_the_next_is_not_asked() -> None:
    """Each attempt with a wrong password may count towards a lock-out; who is not there counts nothing."""
    nobody = f"127.0.0.1:{unused_port()}"
    async with Rude().listening() as rude, Rude().listening() as other:
        reason = await why(nobody, rude.address, other.address)

    assert reason.text == f"{rude.address}: the broker closes the connection"
    assert "kafka.security_protocol" in reason.hint
    assert (rude.met, other.met) == (1, 0)


async def test_a_broker_that_is_silent_is_waited_for_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen broker accepts connections and says nothing."""
    monkeypatch.setattr(diagnosis, "ATTEMPT_SECONDS", 0.05)
    monkeypatch.setattr(diagnosis, "CLOSE_SECONDS", 0.05)
    released = asyncio.Event()

    async def wait(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    server = await asyncio.start_server(wait, "127.0.0.1", 0)
    async with server:
        reason = await why(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        released.set()

    assert "no answer in time" in reason.text
    assert not reason.reached


def alert(reason: str) -> ssl.SSLError:
    """An error as OpenSSL makes it."""
    error = ssl.SSLError(1, f"[SSL: {reason}] in other words")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SaslAuthenticationFailed("for user x"), "refuses the user name or the password"),
        (alert("TLSV13_ALERT_CERTIFICATE_REQUIRED"), "breaks off the TLS handshake (certificate required)"),
        (alert("WRONG_VERSION_NUMBER"), "no TLS connection (WRONG_VERSION_NUMBER)"),
        (ssl.SSLError("unlike OpenSSL's"), "no TLS connection (SSLError)"),
        (OSError("Multiple exceptions: [Errno 111] …, [Errno 101] …"), "Multiple exceptions"),
        (NotAKafkaAnswer("an answer of 1213486160 bytes"), "not speak plain Kafka (an answer of 1213486160 bytes)"),
        (RuntimeError("a secret perhaps"), "RuntimeError"),
    ],
    ids=["password", "alert", "no TLS", "no reason", "several addresses", "no broker", "unknown"],
)
def test_what_led_to_an_error_is_what_is_told(error: Exception, words: str) -> None:
    """The client wraps the reason into an error of the connection; what is unknown is named and not shown."""
    wrapped = KafkaConnectionError("closed")
    wrapped.__cause__ = error

    for given in (error, wrapped):
        reason = diagnosis._reason(given, {"security_protocol": "SSL"})

        assert words in reason.text
        assert "secret" not in reason.text
