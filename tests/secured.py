"""Apache Kafka with everything that keeps strangers out, on one process, each way on a listener of its own.

============  =============================================================================================
``TLS``       a certificate of the broker's
``MTLS``      the same, and one of the client's; behind `Relay`, which can cut its connections
``SCRAM``     TLS, then a user and a password by SCRAM-SHA-512
``OAUTH``     TLS, then a token by OAUTHBEARER: signed (RS256), issued by `TokenIssuer`, looked up there by the broker
============  =============================================================================================

The broker has one more listener without any of it, for the tests' own clients. Certificates are real ones, of
authorities made for the run; keys are those of no one.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # documented, and not all in __all__
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from brokers import ADMIN_SECONDS, Broker, Listener, maven_broker, unused_port, wait_until

CANARY = "canary-7d1e90"
"""Part of every credential, key, payload and text that must not be said by anybody."""

USER = "tierstream"
PASSWORD = f"password-{CANARY}"
KEY_PASSWORD = f"key-{CANARY}"
CLIENT_ID = "tierstream-service"
CLIENT_SECRET = f"secret-{CANARY}"
AUDIENCE = "kafka"
ISSUER = "https://issuer.example"

TOKEN_SECONDS = 8
"""Life of a token: short, so that connections are closed at its end while a test looks on."""

_JAAS = "org.apache.kafka.common.security"


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


class TokenIssuer:
    """An OAuth 2 token endpoint (client credentials) and the keys of what it signs, on loopback."""

    def __init__(self) -> None:
        self.issued = 0
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._say(200, issuer._keys())

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                pair = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode()
                client, _, secret = pair.partition(":")
                if secret != CLIENT_SECRET:
                    self._say(401, {"error": "invalid_client"})
                    return
                # Who asks for a client of another name is given what that name says.
                life = -60 if client == "expired" else TOKEN_SECONDS
                audience = "somebody-else" if client == "astray" else AUDIENCE
                self._say(200, {"access_token": issuer.token(life, audience), "expires_in": abs(life)})

            def _say(self, status: int, answer: dict[str, Any]) -> None:
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def token(self, life: float, audience: str) -> str:
        """A signed token that ends in *life* seconds."""
        self.issued += 1
        now = time.time()
        claims = {"sub": USER, "iss": ISSUER, "aud": audience, "scope": "kafka", "iat": now - 120, "exp": now + life}
        parts = ({"alg": "RS256", "typ": "JWT", "kid": "only"}, claims)
        signed = ".".join(_base64(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{_base64(self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"

    def _keys(self) -> dict[str, Any]:
        numbers = self._key.public_key().public_numbers()
        modulus, exponent = (
            _base64(number.to_bytes((number.bit_length() + 7) // 8, "big")) for number in (numbers.n, numbers.e)
        )
        return {"keys": [{"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "only", "n": modulus, "e": exponent}]}

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Relay:
    """Forwards bytes to a port of this machine, whatever they are; `cut` ends every connection."""

    def __init__(self, target: int) -> None:
        """Listen at once."""
        self._target = target
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def cut(self) -> int:
        """End every connection, and say how many there were."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # wakes both threads, which close
        return len(pairs)

    def close(self) -> None:
        """Listen no more, and end every connection."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                broker = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._pairs.append((client, broker))
            for source, sink in ((client, broker), (broker, client)):
                threading.Thread(target=_forward, args=(source, sink), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while received := source.recv(65536):
            sink.sendall(received)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    source.close()


def _private_key(issued: trustme.LeafCert, password: str = "") -> bytes:
    """The key of a certificate as Java reads it from PEM (PKCS#8), under a password if there is one."""
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        how = serialization.BestAvailableEncryption(password.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


@dataclass
class Identity:
    """What one client has on disk: the authority it trusts, its certificate, and the key under a password."""

    folder: Path

    def put(self, trusted: trustme.CA, issuer: trustme.CA) -> None:
        """Write the files, or replace them while they are used."""
        self.folder.mkdir(exist_ok=True)
        issued = issuer.issue_cert("client.example", common_name=USER)
        for name, content in (
            ("ca.crt", trusted.cert_pem.bytes()),
            ("tls.crt", issued.cert_chain_pems[0].bytes()),
            ("tls.key", _private_key(issued, KEY_PASSWORD)),
        ):
            beside = self.folder / f"{name}.new"
            beside.write_bytes(content)
            beside.replace(self.folder / name)

    def settings(self, *, certificate: bool = False) -> dict[str, Any]:
        """The part of the service's settings that names the files."""
        found: dict[str, Any] = {"ssl_ca_file": str(self.folder / "ca.crt")}
        if certificate:
            found |= {
                "ssl_cert_file": str(self.folder / "tls.crt"),
                "ssl_key_file": str(self.folder / "tls.key"),
                "ssl_key_password": KEY_PASSWORD,
            }
        return found


@dataclass
class Secured:
    """The running broker, and what is needed to get in, and to be kept out."""

    broker: Broker
    folder: Path
    tokens: TokenIssuer
    relay: Relay
    ports: dict[str, int]
    """By listener, the port to connect to."""
    authority: trustme.CA
    """Of the broker and of the clients it lets in."""
    stranger: trustme.CA = field(default_factory=trustme.CA)
    """An authority that nobody knows."""

    def identity(self, name: str, issuer: trustme.CA | None = None) -> Identity:
        """Files of a client that trusts the broker; its certificate is one the broker accepts unless told otherwise."""
        files = Identity(self.folder / name)
        files.put(self.authority, issuer or self.authority)
        return files

    def kafka(self, way: str, files: Identity) -> dict[str, Any]:
        """The service's settings for a listener, as they are right."""
        base = {"bootstrap_servers": [f"127.0.0.1:{self.ports[way]}"], "security_protocol": "SSL", **files.settings()}
        match way:
            case "MTLS":
                return base | files.settings(certificate=True)
            case "SCRAM":
                account = {"sasl_mechanism": "SCRAM-SHA-512", "sasl_username": USER, "sasl_password": PASSWORD}
                return base | {"security_protocol": "SASL_SSL"} | account
            case "OAUTH":
                oauth = {
                    "token_url": f"{self.tokens.address}/token",
                    "client_id": CLIENT_ID,
                    "client_secret": CLIENT_SECRET,
                    "scope": "kafka",
                }
                return base | {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER", "oauth": oauth}
        return base

    def put_authority(self, authority: trustme.CA) -> None:
        """Let the MTLS listener show a certificate of *authority*, and accept clients of it alone; wait until it does.

        Holds for new connections; `relay` cuts the old ones.
        """
        stores, certificate = _stores(self.folder, f"mtls-{time.monotonic_ns()}", authority)
        entries = [
            ConfigEntry(f"listener.name.mtls.ssl.{name}", value, incremental_operation=AlterConfigOpType.SET)
            for name, value in stores.items()
        ]
        resource = ConfigResource(ConfigResource.Type.BROKER, "1", incremental_configs=entries)
        (answer,) = self.broker.admin.incremental_alter_configs([resource]).values()
        answer.result(ADMIN_SECONDS)
        place = "127.0.0.1", self.ports["MTLS"]
        shown = ssl.PEM_cert_to_DER_cert(certificate)
        wait_until(
            lambda: ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(place)) == shown,
            ADMIN_SECONDS,
            "the broker to show its new certificate",
        )


def _stores(folder: Path, name: str, authority: trustme.CA) -> tuple[dict[str, str], str]:
    """Write a broker's certificate and whom it trusts; return the settings that name them, and the certificate."""
    issued = authority.issue_cert("127.0.0.1", organization_name="tests", organization_unit_name="broker")
    store, trusted = folder / f"{name}.pem", folder / f"{name}-trusted.pem"
    certificate = issued.cert_chain_pems[0].bytes()
    store.write_bytes(_private_key(issued) + certificate)
    trusted.write_bytes(authority.cert_pem.bytes())
    settings = {
        "keystore.type": "PEM",
        "keystore.location": str(store),
        "truststore.type": "PEM",
        "truststore.location": str(trusted),
    }
    return settings, certificate.decode()


@contextmanager
def secured_broker(folder: Path) -> Iterator[Secured]:
    """Run the broker with all its listeners.

    Raises:
        BrokerUnavailableError: it did not start.
    """
    tokens, authority = TokenIssuer(), trustme.CA()
    inner = {name: unused_port() for name in ("TLS", "MTLS", "SCRAM", "OAUTH")}
    relay = Relay(inner["MTLS"])
    try:
        keys = f"{tokens.address}/keys"
        stores, _ = _stores(folder, "broker", authority)
        settings = {f"listener.name.{way.lower()}.ssl.{name}": path for way in inner for name, path in stores.items()}
        oauth = "listener.name.oauth."
        settings |= {
            "listener.name.mtls.ssl.client.auth": "required",
            "listener.name.scram.sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.scram.scram-sha-512.sasl.jaas.config": f"{_JAAS}.scram.ScramLoginModule required;",
            f"{oauth}sasl.enabled.mechanisms": "OAUTHBEARER",
            f"{oauth}oauthbearer.sasl.jaas.config": f"{_JAAS}.oauthbearer.OAuthBearerLoginModule required;",
            f"{oauth}oauthbearer.sasl.server.callback.handler.class": (
                f"{_JAAS}.oauthbearer.OAuthBearerValidatorCallbackHandler"
            ),
            f"{oauth}oauthbearer.sasl.oauthbearer.jwks.endpoint.url": keys,
            f"{oauth}oauthbearer.sasl.oauthbearer.expected.audience": AUDIENCE,
            f"{oauth}oauthbearer.sasl.oauthbearer.expected.issuer": ISSUER,
            f"{oauth}oauthbearer.sasl.oauthbearer.clock.skew.seconds": "0",
            # Without it the broker lets a connection live on after its token; with it, no longer than the token.
            f"{oauth}oauthbearer.connections.max.reauth.ms": "3600000",
        }
        listeners = [
            Listener(
                way,
                "SASL_SSL" if way in {"SCRAM", "OAUTH"} else "SSL",
                port,
                relay.port if way == "MTLS" else port,
            )
            for way, port in inner.items()
        ]
        allowed = f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={keys}"
        with maven_broker(folder, settings, listeners=listeners, java_settings=[allowed]) as broker:
            credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
            change = UserScramCredentialUpsertion(USER, credential, PASSWORD.encode())
            (answer,) = broker.admin.alter_user_scram_credentials([change]).values()
            answer.result(ADMIN_SECONDS)
            ports = inner | {"MTLS": relay.port}
            yield Secured(broker, folder, tokens, relay, ports, authority)
    finally:
        relay.close()
        tokens.close()
