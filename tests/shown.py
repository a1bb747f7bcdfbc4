"""What the documentation shows: pages, their blocks of code, their commands, and why some of these are not run."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "tierstream"
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        *(folder / "README.md" for folder in (CHART, ROOT / "schemas", ROOT / "tests")),
    ]
)
SHELL = ("sh", "console")
LANGUAGES = {*SHELL, "yaml", "json", "python", "java", "text"}
"""What blocks may be of; ``text`` is what something prints."""

USAGE = ROOT / "docs" / "commands.md"
"""Made from the declarations of the commands; what it shows of each is how to use it, and no call."""

STORY = ROOT / "docs" / "tutorial.md"
"""Run from its beginning to its end, as it stands, by tests/e2e/test_tutorial.py."""

OWN_KAFKA = (ROOT / "README.md", ROOT / "docs" / "deploy.md")
"""Their commands with ``--config tierstream.yaml`` are run there too, with the page's own file."""

TOPICS = "kafka-topics.sh"
"""What makes the topics on a page of :data:`OWN_KAFKA`; run there on Apache Kafka."""

ALONE = (ROOT / "docs" / "sizing.md", ROOT / "docs" / "evolution.md")
"""Their commands need nothing, and are run as they stand."""

OUT_OF_REACH = {
    "python3 -m venv venv": "makes an environment from the package index; CI installs the wheel (test_project.py)",
    "venv/bin/pip install": "from the package index, as above",
    "pip install": "from the package index, as above",
    "make demo": "the demo is e2e/test_demo.py",
    "make test": "this is what runs it",
    "docker build": "needs a container engine; the image is built and started by the workflow on GitHub",
    "docker run": "needs a container engine, as above",
    "docker compose": "needs a container engine; the file itself is checked (architecture/test_compose.py)",
    "kubectl": "needs a cluster",
    "helm": "needs a cluster; the chart is rendered, checked and linted by Helm's own engine (tests/chart)",
    "tierstream storage init": "makes things at Google; e2e/test_bigtable.py does it on an emulator",
    "OTEL_EXPORTER_OTLP_ENDPOINT=": "needs a collector; e2e/test_telemetry.py has one of its own",
    "SENTRY_DSN=": "needs a Sentry; e2e/test_telemetry.py has one of its own",
    "cd tests/e2e": "takes half an hour and the emulators; for who changes storage",
}
"""How a command begins that no test runs, and why."""


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the code blocks of some languages on a page, in their order; one within a list without its indent."""
    found = re.findall(
        rf"^( *)```(?:{'|'.join(languages)})\n(.*?)^\1```$",
        page.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return [textwrap.dedent(text) for _, text in found]


def commands_of(block: str) -> list[str]:
    """Return the commands of a block, each in one line; here-documents, prompts and comments left out."""
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.MULTILINE | re.DOTALL).replace("\\\n", " ")
    lines = (line.removeprefix("$ ") for line in text.splitlines())
    return [line for line in lines if shlex.split(line, comments=True)]


def reason_not_run(command: str) -> str | None:
    """Return why a command is not run; None where it is to be run."""
    return next((reason for beginning, reason in OUT_OF_REACH.items() if command.startswith(beginning)), None)


@dataclass(frozen=True, slots=True)
class Call:
    """One program that is called on a page."""

    place: str
    words: tuple[str, ...]
    """The program and its arguments."""
    named: bool
    """Within a sentence: it may be just the name of a command."""

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def calls_in(place: str, line: str, *, named: bool = False) -> Iterator[Call]:
    """Yield the programs that a command line calls, with their arguments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for token in [*lexer, ";"]:
        if re.fullmatch(r"[&|;<>]+", token):
            if words:
                yield Call(place, (words[0].rpartition("/")[2], *words[1:]), named)
            words = ["cat"] if token in {">", "<<", "<"} else []  # what follows is a file, and no program
        elif words or not re.match(r"[A-Z_]+=", token):
            words.append(token)


def calls(page: Path, programs: Sequence[str]) -> Iterator[Call]:
    """Yield every call on a page: those of its blocks, and those of *programs* within its sentences."""
    place = str(page.relative_to(ROOT))
    for block in blocks(page, *SHELL):
        for line in commands_of(block):
            yield from calls_in(place, line)
    if page == USAGE:
        return
    prose = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`]+)`", prose):
        if re.match(rf"(?:{'|'.join(map(re.escape, programs))}) ", span):
            yield from calls_in(place, " ".join(span.split()), named=True)


@cache
def command_line() -> Any:
    """The command line, as its parser sees it."""
    from consumer.cli import app

    return typer.main.get_command(app)


STAND_INS = {"TOPIC": "operations", "PARTITION": "3", "OFFSET": "42", "HOST:PORT": "host:9092", "…": "earliest"}
"""What is put for what a reader puts something for, where it has to be of a kind."""


def check_tierstream(words: Sequence[str], *, named: bool = False) -> None:
    """Have the real command line parse arguments of ``tierstream``; nothing is run.

    Raises:
        Exception: they are none.
    """
    found, names, rest = command_line(), ["tierstream"], [STAND_INS.get(word, word) for word in words]
    while hasattr(found, "commands") and rest[0] not in {name for option in found.params for name in option.opts}:
        name, *rest = rest
        names.append(name)
        found = found.commands[name]
    if rest or not named:
        found.make_context(" ".join(names), rest)
