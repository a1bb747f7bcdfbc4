"""A replaced certificate holds for the next connection, and one that cannot be used changes nothing (H35)."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from consumer.certificates import FollowingContext, identified, trusting
from consumer.errors import ConfigError

HOST = "broker.example"
ROUNDS = 10
"""Flights of a TLS handshake are three or four; more means that it does not come to an end."""


class Peer:
    """The server's end of a connection in memory; says which certificate of ours it has seen."""

    def __init__(self, authority: trustme.CA, clients: trustme.CA | None = None) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(HOST).configure_cert(self._context)
        if clients is not None:
            clients.configure_trust(self._context)
            self._context.verify_mode = ssl.CERT_REQUIRED

    def meet(self, client_context: ssl.SSLContext) -> bytes:
        """Carry out a handshake and a byte behind it; return the client's certificate, empty if it showed none.

        Raises:
            SSLError: of the side that refuses.
        """
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = self._context.wrap_bio(to_server, to_client, server_side=True)
        client = client_context.wrap_bio(to_client, to_server, server_hostname=HOST)
        done = {client: False, server: False}
        for _ in range(ROUNDS):
            for side in (client, server):
                try:
                    if not done[side]:
                        side.do_handshake()
                        done[side] = True
                except ssl.SSLWantReadError:
                    pass
        assert all(done.values())
        return server.getpeercert(binary_form=True) or b""


@pytest.fixture(scope="module")
def old() -> trustme.CA:
    """The authority before the change."""
    return trustme.CA()


@pytest.fixture(scope="module")
def new() -> trustme.CA:
    """The authority after it."""
    return trustme.CA()


@pytest.fixture
def ca_file(tmp_path: Path, old: trustme.CA) -> Path:
    """The authority to trust."""
    file = tmp_path / "ca.pem"
    old.cert_pem.write_to_path(str(file))
    return file


def put(file: Path, content: bytes) -> None:
    """Replace *file* as careful tools do: by another one of the same name."""
    beside = file.with_suffix(".new")
    beside.write_bytes(content)
    beside.replace(file)


def test_an_authority_that_is_replaced_is_the_one_that_is_trusted(
    ca_file: Path, old: trustme.CA, new: trustme.CA
) -> None:
    """The new one from the next connection on, and the old one no more: it may have been replaced for a reason."""
    context = trusting(ca_file, "kafka.ssl_ca_file")
    Peer(old).meet(context)

    put(ca_file, new.cert_pem.bytes())

    Peer(new).meet(context)
    with pytest.raises(ssl.SSLCertVerificationError):
        Peer(old).meet(context)


def test_a_secret_that_is_mounted_as_a_link_is_followed(tmp_path: Path, old: trustme.CA, new: trustme.CA) -> None:
    """H35: Kubernetes replaces the folder behind a link; the file itself never changes."""
    for name, authority in (("first", old), ("second", new)):
        (tmp_path / name).mkdir()
        authority.cert_pem.write_to_path(str(tmp_path / name / "ca.crt"))
    link = tmp_path / "..data"
    link.symlink_to("first")
    (tmp_path / "ca.crt").symlink_to("..data/ca.crt")
    context = trusting(tmp_path / "ca.crt", "kafka.ssl_ca_file")
    Peer(old).meet(context)

    (tmp_path / "next").symlink_to("second")
    (tmp_path / "next").replace(link)

    Peer(new).meet(context)


def test_a_certificate_of_ours_that_is_replaced_is_the_one_that_is_shown(
    tmp_path: Path, ca_file: Path, old: trustme.CA, new: trustme.CA
) -> None:
    """With its key, in two files or in one."""
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def issue(authority: trustme.CA) -> bytes:
        issued = authority.issue_cert("client")
        put(certificate, issued.cert_chain_pems[0].bytes())
        put(key, issued.private_key_pem.bytes())
        return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())

    first = issue(old)
    context = identified(ca_file, certificate, key, "", "kafka")
    assert Peer(old, old).meet(context) == first

    second = issue(new)

    assert Peer(old, new).meet(context) == second


def test_what_cannot_be_used_leaves_the_last_good_one_in_use_until_it_can(
    tmp_path: Path, ca_file: Path, old: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    """Certificate and key are two files: between the two replacements they do not fit each other."""
    both = [old.issue_cert("client") for _ in range(2)]
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    put(certificate, both[0].cert_chain_pems[0].bytes())
    put(key, both[0].private_key_pem.bytes())
    context = identified(ca_file, certificate, key, "", "kafka")
    first = Peer(old, old).meet(context)

    put(certificate, both[1].cert_chain_pems[0].bytes())
    with caplog.at_level(logging.WARNING, "consumer"):
        assert Peer(old, old).meet(context) == first
        assert Peer(old, old).meet(context) == first
    put(key, both[1].private_key_pem.bytes())
    second = Peer(old, old).meet(context)

    assert second != first
    (warned,) = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING]
    assert "the last good ones stay error=kafka.ssl_cert_file or kafka.ssl_key_file cannot be used" in warned
    assert "KEY_VALUES_MISMATCH" in warned


def test_a_file_that_is_gone_for_a_moment_changes_nothing(ca_file: Path, old: trustme.CA) -> None:
    """As above: a tool that removes before it writes."""
    context = trusting(ca_file, "kafka.ssl_ca_file")
    content = ca_file.read_bytes()

    ca_file.unlink()
    Peer(old).meet(context)
    ca_file.write_bytes(content)

    Peer(old).meet(context)


def test_files_that_stay_are_not_read_again(ca_file: Path, old: trustme.CA) -> None:
    """A context holds a few hundred kilobytes, and making one takes milliseconds of the event loop."""
    made: list[ssl.SSLContext] = []

    def make() -> ssl.SSLContext:
        made.append(ssl.create_default_context(cafile=ca_file))
        return made[-1]

    context = FollowingContext(make, [ca_file])
    for _ in range(3):
        Peer(old).meet(context)
    assert len(made) == 1

    os.utime(ca_file, ns=(1, 1))
    Peer(old).meet(context)

    assert len(made) == 2


@pytest.mark.parametrize(
    "begin",
    [
        lambda context: context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=HOST),
        lambda context: context.current(),
    ],
    ids=["event loop", "directly"],
)
def test_names_are_checked_on_every_way(ca_file: Path, begin: Callable[[FollowingContext], object]) -> None:
    """The outer context is no way around the inner one, and trusts nobody by itself."""
    context = trusting(ca_file, "kafka.ssl_ca_file")
    assert isinstance(context, FollowingContext)

    inner = begin(context)

    inner = inner.context if isinstance(inner, ssl.SSLObject) else inner
    assert isinstance(inner, ssl.SSLContext)
    assert (inner.verify_mode, inner.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert (context.verify_mode, context.check_hostname, context.get_ca_certs()) == (ssl.CERT_REQUIRED, True, [])
    assert min(inner.minimum_version, context.minimum_version) >= ssl.TLSVersion.TLSv1_2


def test_besides_the_system_means_besides(ca_file: Path, old: trustme.CA) -> None:
    """A token endpoint may be out in the world though the brokers have an authority of their own."""
    alone = trusting(ca_file, "kafka.ssl_ca_file")
    besides = trusting(ca_file, "kafka.ssl_ca_file", besides_system=True)
    Peer(old).meet(besides)
    assert isinstance(alone, FollowingContext)
    assert isinstance(besides, FollowingContext)

    assert len(alone.current().get_ca_certs()) == 1
    assert len(besides.current().get_ca_certs()) == len(ssl.create_default_context().get_ca_certs()) + 1


def test_at_the_start_a_file_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    """Contract 11: nothing good has been read yet that could stay in use."""
    with pytest.raises(ConfigError, match=r"kafka\.ssl_ca_file cannot be used: No such file"):
        trusting(tmp_path / "none.pem", "kafka.ssl_ca_file")
