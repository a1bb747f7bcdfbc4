"""TLS contexts that follow their files: a certificate or authority replaced on disk holds for the next connection.

:func:`trusting` and :func:`identified` make a :class:`FollowingContext`, which the clients keep for as long as they
live. Each new connection goes through these steps:

1. The files are looked at (one ``stat`` each). Unchanged: the context in use is used again.
2. Changed: a context is made of all of them, from nothing, so that an authority that was taken out is trusted no more.
3. It cannot be made (a certificate is there already and its key is not, a file is half written): the context in use
   stays, which the log tells; the files are tried again when they have changed again.

Connections that are open stay as they are. A new password of a key takes a restart: it is not in these files.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

from consumer.errors import ConfigError
from consumer.log import get_logger

Seen: TypeAlias = tuple[tuple[int, int, int, int], ...]
"""What tells whether files have changed: of each, its number, size and both times; all 0 where it is not there."""

log = get_logger(__name__)


class FollowingContext(ssl.SSLContext):
    """A client's context in front of the one that was last made of the files.

    It decides nothing itself: both ways by which Python makes a connection of a context (``wrap_bio`` for event loops,
    ``wrap_socket``) lead to the other one. Anything that bypassed them would find no authority here, and trust nobody.

    Args:
        make: Makes a context of the files, or raises ``ConfigError``.
        files: What is watched.
    """

    def __new__(cls, make: Callable[[], ssl.SSLContext], files: Sequence[Path]) -> Self:
        """Make the outer context; the first inner one is made here too.

        Raises:
            ConfigError: what *make* raised.
        """
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context._make = make
        context._files = tuple(files)
        # Looked at before they are read: what is written meanwhile is seen the next time.
        context._seen = _look(context._files)
        context._current = make()
        return context

    _make: Callable[[], ssl.SSLContext]
    _files: tuple[Path, ...]
    _seen: Seen
    _current: ssl.SSLContext

    def current(self) -> ssl.SSLContext:
        """Return the context of the files as they are now, or the last good one.

        It is asked once a connection, on the event loop: a few microseconds while nothing has changed, about a
        millisecond when something has. Not for a thread, as a connection cannot begin without it.
        """
        seen = _look(self._files)
        if seen != self._seen:
            self._seen = seen
            try:
                self._current = self._make()
            except ConfigError as error:
                log.warning("changed certificates cannot be used, the last good ones stay", error=str(error))
            else:
                log.info("certificates read again", files=[file.name for file in self._files])
        return self._current

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        """Begin a connection of an event loop."""
        return self.current().wrap_bio(*arguments, **named)

    def wrap_socket(self, *arguments: Any, **named: Any) -> ssl.SSLSocket:
        """Begin a connection on a socket."""
        return self.current().wrap_socket(*arguments, **named)


def _look(files: Sequence[Path]) -> Seen:
    return tuple(map(_look_at, files))


def _look_at(file: Path) -> tuple[int, int, int, int]:
    try:
        status = os.stat(file)  # noqa: PTH116 - follows links, as secrets mounted by Kubernetes are replaced by one
    except OSError:
        return 0, 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def trusting(ca_file: Path | None, setting: str, *, besides_system: bool = False) -> ssl.SSLContext:
    """Return a context that trusts *ca_file* and nobody else, or the system's authorities where it is None.

    Args:
        ca_file: PEM file of the authorities.
        setting: The setting that names it.
        besides_system: Trust the system's authorities too.

    Raises:
        ConfigError: the file cannot be used; the text names *setting*.
    """
    if ca_file is None:
        return _made(None, setting)
    return FollowingContext(lambda: _made(ca_file, setting, besides_system=besides_system), [ca_file])


def identified(
    ca_file: Path | None, cert_file: Path | None, key_file: Path | None, password: str, section: str
) -> ssl.SSLContext:
    """Return a context as :func:`trusting` does, that shows a certificate of ours to who asks for it.

    Args:
        ca_file: PEM file of the authorities; None = those of the system.
        cert_file: PEM file of our certificate; None = there is none.
        key_file: PEM file of its key; None = it is in *cert_file*.
        password: The key's; empty where it has none.
        section: Of the settings ``ssl_ca_file``, ``ssl_cert_file`` and ``ssl_key_file``, for the text of errors.

    Raises:
        ConfigError: a file is missing, unreadable, or not what it should be; the text names the setting.
    """
    if cert_file is None:
        return trusting(ca_file, f"{section}.ssl_ca_file")
    names = f"{section}.ssl_cert_file" + ("" if key_file is None else f" or {section}.ssl_key_file")

    def make() -> ssl.SSLContext:
        context = _made(ca_file, f"{section}.ssl_ca_file")
        try:
            # A password is always given: without one OpenSSL would ask for it on the terminal.
            context.load_cert_chain(cert_file, key_file, lambda: password)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{names} cannot be used: {_reason(error)}") from error
        return context

    return FollowingContext(make, [file for file in (ca_file, cert_file, key_file) if file is not None])


def _made(ca_file: Path | None, setting: str, *, besides_system: bool = False) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=None if besides_system else ca_file)
        if besides_system and ca_file is not None:
            context.load_verify_locations(ca_file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting} cannot be used: {_reason(error)}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not a PEM file with what is expected, or a wrong password ({error.reason or 'unreadable'})"
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
