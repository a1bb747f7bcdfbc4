"""What storage on local disks needs of its host: its identity, a name for an owner, folders, and a lock for each.

SQLite files and plain files serve the processes of *one* host: their shared memory, leases and locks mean nothing to
another one that sees the same disk over a network. :class:`HostLock` notices that where it can be noticed:

1. The first process takes the lock file exclusively, writes the host's identity into it, and goes on with a shared
   lock; the kernel drops locks with their process, so nothing is ever left behind.
2. A later process cannot have it exclusively, takes a shared lock, and reads the identity.
   * Same host: the two share the storage.
   * Another host (the lock was passed on by a network filesystem): refused.

A network filesystem that does not pass locks on hides the other host; then nothing is noticed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
from functools import cache
from pathlib import Path

from consumer.errors import ConfigError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def boot_id() -> str:
    """Return what all processes of this host have in common until it restarts, and no other host has.

    On Linux the kernel's boot id, which containers of one host share as they share its locks and clocks; elsewhere
    the host name, which does not change with a restart. Blocking: reads a file, once.
    """
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def default_owner() -> str:
    """Return a change log owner that no other process has: host name and 32 random bits."""
    return f"{socket.gethostname()}-{secrets.token_hex(4)}"


def make_folder(folder: Path) -> None:
    """Make *folder*, for our eyes only, and those above it, where they are missing; their names are durable then.

    Else a power cut soon after the first start could take all that was acknowledged until then, folder and all.
    Blocking.

    Raises:
        OSError: it cannot be made, or is something else.
    """
    missing = [folder]
    while not missing[-1].exists() and missing[-1] != missing[-1].parent:
        missing.append(missing[-1].parent)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for above in missing[1:]:
        sync_folder(above)


def sync_folder(folder: Path) -> None:
    """Make new names in *folder* durable. Blocking."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class HostLock:
    """A held lock file, shared by the processes of this host. All methods block: call them in a thread.

    Raises:
        ConfigError: a process of another host holds it.
        OSError: the file cannot be opened or locked.
    """

    def __init__(self, path: str, *, dir_fd: int | None = None) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o600, dir_fd=dir_fd)
        try:
            self._take(boot_id().encode())
        except BaseException:
            os.close(self._fd)
            raise

    def _take(self, identity: bytes) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, identity, 0)
        # Changing the kind of a lock is not atomic: another process may come in between, so the identity is read
        # even by the one that has just written it. The wait is short: an exclusive lock is held for one write.
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        if os.pread(self._fd, 256, 0) != identity:
            raise ConfigError("the storage is in use by another host; local storage serves the processes of one host")

    def release(self) -> None:
        """Let go of the lock; the file stays."""
        os.close(self._fd)
