"""A real terminal for commands: a pseudo-terminal that a child runs in, drawn by pyte as a person would see it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pyte

from brokers import dies_with_us
from service_process import clean_environment

PATIENCE_SECONDS = 30.0
"""Bound of a wait that ends much earlier where the command is right: Python starts, a screen is drawn."""


class Terminal:
    """One command in a terminal of its own; a context manager, which ends it.

    Args:
        command: What runs, with its arguments.
        folder: Where.
        columns: Width.
        lines: Height.
        environment: Variables beside the usual ones of a terminal.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        columns: int = 80,
        lines: int = 24,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.raw = b""
        """Everything it wrote."""
        self._stream = pyte.ByteStream(self.screen)
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.settings_before = termios.tcgetattr(theirs)
        self._theirs = theirs  # kept open: its settings are looked at when the command has ended
        inherited = {
            name: value for name, value in clean_environment().items() if name not in {"NO_COLOR", "COLUMNS", "LINES"}
        }
        self.process = subprocess.Popen(
            [*dies_with_us(), *command],
            cwd=folder,
            env={**inherited, "TERM": "xterm-256color", **(environment or {})},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)
        os.close(self._theirs)
        os.close(self._ours)

    @property
    def settings(self) -> list[Any]:
        """Of the terminal: echo, line mode."""
        return list(termios.tcgetattr(self._theirs))

    @property
    def shown(self) -> list[str]:
        """The lines of the screen, without what is empty to the right."""
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        """The screen as one text."""
        return "\n".join(self.shown).rstrip()

    def press(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def read(self, seconds: float = 0.1) -> None:
        """Draw what is written within so many seconds."""
        if select.select([self._ours], [], [], seconds)[0]:
            written = os.read(self._ours, 65536)
            self.raw += written
            self._stream.feed(written)

    def wait(self, condition: Callable[[str], bool], what: str) -> None:
        """Draw until *condition* holds of the screen.

        Raises:
            TimeoutError: it does not; the text shows the screen.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition(self.text):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for {what}; the screen shows\n{self.text}")
            self.read()

    def wait_end(self) -> int:
        """Draw until the command has ended; return its exit code."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for its end; the screen shows\n{self.text}")
            self.read(0.02)
        while select.select([self._ours], [], [], 0)[0]:
            self.read(0)
        return self.process.returncode


def tierstream(*arguments: str) -> list[str]:
    """Return the command line of ``tierstream ARGUMENTS``."""
    return [sys.executable, "-m", "consumer", *arguments]
