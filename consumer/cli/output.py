"""What commands print: data on stdout, complaints on stderr."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Final

EXIT_FAILURE: Final = 1
"""Something failed, or the answer is no."""
EXIT_USAGE: Final = 2
"""Wrong arguments or configuration."""
EXIT_INTERRUPTED: Final = 130
"""Ended by Ctrl-C, as a shell reports it."""

TEXT_COLUMNS_MIN: Final = 8
"""Characters of a cut text that are left: fewer say nothing."""


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


def end_on_sigterm() -> None:
    """Let SIGTERM end the command as Ctrl-C does, so that what it has begun is put away: a broker, a terminal."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def say_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows under their columns, numbers to the right; nothing known is a dash.

    On a terminal that is too narrow for that, names of columns are broken at their underscores, then the longest texts
    are cut: lines that wrap are no table. What goes into a pipe is never changed.
    """
    cells = [["-" if row[column] is None else str(row[column]) for column in columns] for row in rows]
    numeric = [all(isinstance(row[column], int | None) for row in rows) for column in columns]
    head = [list(columns)]
    space = _terminal_columns()
    if space is not None and _width([*head, *cells]) > space:
        parts = [column.split("_") for column in columns]
        height = max(map(len, parts))
        head = [[*([""] * (height - len(part))), *part] for part in parts]
        head = [list(line) for line in zip(*head, strict=True)]
        _shorten(head, cells, numeric, space)
    widths = [max(map(len, column)) for column in zip(*head, *cells, strict=True)]
    for line in [*head, *cells]:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        say("  ".join(padded).rstrip())


def _terminal_columns() -> int | None:
    """Return how wide the terminal is that data goes to; None where it goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _width(lines: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) for column in zip(*lines, strict=True)) + 2 * (len(lines[0]) - 1)


def _shorten(head: list[list[str]], cells: list[list[str]], numeric: Sequence[bool], space: int) -> None:
    """Cut texts, of the widest column first, until a line has *space*; numbers stay, as a part of one is another."""
    while (over := _width([*head, *cells]) - space) > 0:
        columns = zip(*cells, strict=True)
        widths = [0 if right else max(map(len, column)) for column, right in zip(columns, numeric, strict=True)]
        widest = max(range(len(widths)), key=widths.__getitem__)
        kept = max(TEXT_COLUMNS_MIN, widths[widest] - over)
        if kept >= widths[widest]:
            return
        for line in cells:
            if len(line[widest]) > kept:
                line[widest] = line[widest][: kept - 1] + "…"
