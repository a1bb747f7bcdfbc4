"""A disk that loses at a power cut what was not flushed: what a tier does to files is recorded, and undone in part.

:class:`Recorder` stands for the module ``os`` in :mod:`consumer.storage.filesystem`: everything is done, to real files,
and written down. :func:`restore` makes the folder as it may be found after a power cut behind any of those steps:

* What a file held when it was last flushed is there. Of what was written since, each piece is there, or half of it, or
  zeros, or nothing.
* What names a folder had when it was last flushed are as they were then. Of the changes since, each is there or not,
  whatever the others: a rename can leave a file under both names, or under neither.

No filesystem is as bad as that, and POSIX promises no more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeAlias


@dataclass(eq=False)
class Node:
    """A file or a folder, whatever its names are."""

    folder: bool = False
    names: dict[str, Node] = field(default_factory=dict)
    size: int = 0


@dataclass(frozen=True)
class Written:
    """A piece of a file was written."""

    node: Node
    at: int
    data: bytes


@dataclass(frozen=True)
class Named:
    """A name in a folder came to mean *node*; None: nothing."""

    folder: Node
    name: str
    node: Node | None


@dataclass(frozen=True)
class Flushed:
    """What was done to a file, or to the names in a folder, is durable."""

    node: Node


@dataclass(frozen=True)
class Said:
    """Something else happened, of which the recorder was told."""

    what: Any


Step: TypeAlias = Written | Named | Flushed | Said


class Recorder:
    """The module ``os``, as far as a tier changes files with it; open descriptors are followed to their nodes.

    Args:
        folder: The root; it is there, and durable.
        flushes: Which kinds of nodes are really flushed: a tier that forgets one kind has to be found out.
    """

    def __init__(self, folder: Path, flushes: Sequence[str] = ("file", "folder")) -> None:
        self.root = Node(folder=True)
        self.steps: list[Step] = []
        self._path = str(folder)
        self._flushes = flushes
        self._nodes: dict[int, Node] = {}
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def say(self, what: Any) -> None:
        """Write down that something has happened."""
        with self._lock:
            self.steps.append(Said(what))

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """Open, perhaps make, a file; or open a folder."""
        with self._lock:
            fd = os.open(path, flags, mode, dir_fd=dir_fd)
            if dir_fd is None:
                assert path == self._path
                self._nodes[fd] = self.root
                return fd
            names = self._nodes[dir_fd].names
            if path not in names:
                self._name(dir_fd, path, Node())
            self._nodes[fd] = names[path]
            return fd

    def dup(self, fd: int) -> int:
        """Open the same once more."""
        with self._lock:
            other = os.dup(fd)
            self._nodes[other] = self._nodes[fd]
            return other

    def write(self, fd: int, data: bytes) -> int:
        """Append."""
        with self._lock:
            count = os.write(fd, data)
            node = self._nodes[fd]
            self.steps.append(Written(node, node.size, bytes(data[:count])))
            node.size += count
            return count

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write at a place."""
        with self._lock:
            count = os.pwrite(fd, data, offset)
            self.steps.append(Written(self._nodes[fd], offset, data[:count]))
            return count

    def fsync(self, fd: int) -> None:
        """Make durable; the real disk is not kept waiting."""
        with self._lock:
            node = self._nodes[fd]
            if ("folder" if node.folder else "file") in self._flushes:
                self.steps.append(Flushed(node))

    def mkdir(self, path: str, mode: int, *, dir_fd: int) -> None:
        """Make a folder."""
        with self._lock:
            os.mkdir(path, mode, dir_fd=dir_fd)
            self._name(dir_fd, path, Node(folder=True))

    def rename(self, source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        """Give a file another name, in another folder."""
        with self._lock:
            os.rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            self._name(dst_dir_fd, target, self._nodes[src_dir_fd].names[source])
            self._name(src_dir_fd, source, None)

    def unlink(self, path: str, *, dir_fd: int) -> None:
        """Take a file its name."""
        with self._lock:
            os.unlink(path, dir_fd=dir_fd)
            self._name(dir_fd, path, None)

    def rmdir(self, path: str, *, dir_fd: int) -> None:
        """Remove an empty folder."""
        with self._lock:
            os.rmdir(path, dir_fd=dir_fd)
            self._name(dir_fd, path, None)

    def _name(self, fd: int, name: str, node: Node | None) -> None:
        folder = self._nodes[fd]
        self.steps.append(Named(folder, name, node))
        if node is None:
            folder.names.pop(name, None)
        else:
            folder.names[name] = node


def restore(root: Node, steps: Sequence[Step], folder: Path, random: Random) -> None:
    """Make *folder* what may be found there after a power cut behind *steps*."""
    durable = _durable(steps)
    luck = random.choice((0.0, 0.5, 1.0))
    contents: dict[Node, bytearray] = {}
    names: dict[Node, dict[str, Node]] = {}
    for number, step in enumerate(steps):
        kept = number in durable or random.random() < luck
        if isinstance(step, Written):
            data = step.data if number in durable else _damaged(step.data, random, luck)
            held = contents.setdefault(step.node, bytearray())
            held.extend(bytes(max(0, step.at + len(data) - len(held))) if data else b"")
            held[step.at : step.at + len(data)] = data
        elif isinstance(step, Named) and kept:
            if step.node is None:
                names.get(step.folder, {}).pop(step.name, None)
            else:
                names.setdefault(step.folder, {})[step.name] = step.node
    _make(root, folder, names, contents)


def _durable(steps: Sequence[Step]) -> set[int]:
    flushed: set[Node] = set()
    durable: set[int] = set()
    for number in range(len(steps) - 1, -1, -1):
        match steps[number]:
            case Flushed(node):
                flushed.add(node)
            case Written(node=node) | Named(folder=node) if node in flushed:
                durable.add(number)
    return durable


def _damaged(data: bytes, random: Random, luck: float) -> bytes:
    if random.random() < luck:
        return data
    return random.choice((b"", bytes(len(data)), data[: len(data) // 2]))


def _make(node: Node, path: Path, names: dict[Node, dict[str, Node]], contents: dict[Node, bytearray]) -> None:
    if not node.folder:
        path.write_bytes(contents.get(node, b""))
        return
    path.mkdir(exist_ok=True)
    for name, below in names.get(node, {}).items():
        _make(below, path / name, names, contents)
