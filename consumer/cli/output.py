"""What commands print: data on stdout, complaints on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

EXIT_FAILURE: Final = 1
"""Something failed, or the answer is no."""
EXIT_USAGE: Final = 2
"""Wrong arguments or configuration."""
EXIT_INTERRUPTED: Final = 130
"""Ended by Ctrl-C, as a shell reports it."""


class Failure(Exception):
    """The command cannot do what was asked; the text says why.

    Args:
        text: What went wrong.
        hint: What can be done about it.
        exit_code: How the process ends.
    """

    def __init__(self, text: str, hint: str | None = None, *, exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(text)
        self.hint = hint
        self.exit_code = exit_code


def complain(text: str, hint: str | None = None) -> None:
    """Print an error, each of its lines marked as one, and what to do about it."""
    lines = [f"error: {line}" for line in text.splitlines() or ["unknown"]]
    if hint:
        lines.append(f"hint: {hint}")
    print(*lines, sep="\n", file=sys.stderr, flush=True)  # noqa: T201 - the purpose of this module


def note(text: str) -> None:
    """Print a remark that is no data."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the purpose of this module


def say(text: str) -> None:
    """Print data as text."""
    print(text, flush=True)  # noqa: T201 - the purpose of this module


def say_json(value: object, *, line: bool = False) -> None:
    """Print data as one JSON document; with *line* on a single line."""
    say(json.dumps(value, ensure_ascii=False, indent=None if line else 2))


def confirm(question: str, *, yes: bool) -> None:
    """Return if *yes* was given on the command line, or is the answer of somebody at the terminal.

    Raises:
        Failure: the answer is no (exit 1), or nobody is there to be asked (exit 2).
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Failure("nobody is there to be asked", "give --yes to go on, --dry-run to see", exit_code=EXIT_USAGE)
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)  # noqa: T201 - the purpose of this module
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise Failure("nothing was changed")


def say_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows under their columns, numbers to the right; nothing known is a dash."""
    cells = [["-" if row[column] is None else str(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [all(isinstance(row[column], int | None) for row in rows) for column in columns]
    for line in [list(columns), *cells]:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        say("  ".join(padded).rstrip())
