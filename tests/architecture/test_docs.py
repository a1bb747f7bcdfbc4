"""The documentation, as far as a machine can follow it: links, commands, settings and code that are there."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from consumer.config import load
from consumer.metrics import CATALOGUE
from shown import ALONE, OUT_OF_REACH, OWN_KAFKA, PAGES, ROOT, SHELL, STORY, blocks, reason_not_run

VALUES = "# values.yaml"
"""How a block begins that is of the chart's values, not of the service's settings."""


def lines_with_tierstream() -> Iterator[tuple[str, str]]:
    """Every shown call of the command, with its page; comments and here-documents left out."""
    for page in PAGES:
        for block in blocks(page, *SHELL):
            text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.MULTILINE | re.DOTALL)
            for line in text.splitlines():
                call = re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*/)?tierstream (.+)", line)
                if call:
                    yield page.name, call[1]


@cache
def command() -> Any:
    """The command line, as click sees it."""
    from consumer.cli import app

    return typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_something(page: Path) -> None:
    """A file beside it, and a heading in it where one is meant."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, link


@pytest.mark.parametrize(("page", "call"), list(lines_with_tierstream()))
def test_a_shown_command_is_one(page: str, call: str) -> None:
    """Its subcommand and options are known; arguments that stand for something are taken as they are."""
    words = shlex.split(call, comments=True)
    found: Any = command()
    while hasattr(found, "commands"):
        name, *words = words
        found = found.commands[name]
    known = {option for parameter in found.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known, f"{page}: tierstream {call}"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (page.name, text)
        for page in PAGES
        if "helm" not in page.parts
        for text in blocks(page, "yaml")
        if not text.startswith(VALUES)
    ],
)
def test_shown_settings_are_settings(
    page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They can be copied as they are; credentials come from where the page says."""
    monkeypatch.setenv("TIERSTREAM_SECRETS_DIR", str(tmp_path))
    (tmp_path / "kafka__sasl_password").write_text("s", encoding="utf-8")
    file = tmp_path / f"{page}.yaml"
    file.write_text(text, encoding="utf-8")

    assert load(file).kafka.group_id == "tierstream"


def test_shown_values_are_values_of_the_chart() -> None:
    """Every name in them is one of values.yaml."""
    values = yaml.safe_load((ROOT / "helm" / "tierstream" / "values.yaml").read_text(encoding="utf-8"))
    shown = [yaml.safe_load(text) for page in PAGES for text in blocks(page, "yaml") if text.startswith(VALUES)]

    assert shown
    for section in shown:
        for name, members in section.items():
            assert set(members) <= set(values[name]), name


def test_every_shown_command_is_run_by_a_test_or_has_a_reason_not_to_be() -> None:
    """A command that nobody runs is wrong one day; and a reason that nothing needs any more hides the next one."""
    used: set[str] = set()
    for page in PAGES:
        for text in blocks(page, *SHELL):
            used |= {beginning for beginning in OUT_OF_REACH if text.startswith(beginning)}
            run = page in {STORY, *ALONE} or (page in OWN_KAFKA and "--config tierstream.yaml" in text)
            assert run or reason_not_run(text), f"{page.name}: {text.splitlines()[0]}"
    assert used == set(OUT_OF_REACH)


@pytest.mark.parametrize(("page", "text"), [(page.name, text) for page in PAGES for text in blocks(page, "python")])
def test_shown_python_is_python(page: str, text: str) -> None:
    """And what it imports of this package is there."""
    code = text if "async with" not in text or "async def" in text else f"async def shown():\n{_indented(text)}"
    tree = ast.parse(code, page)

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("consumer"):
            module = __import__(str(node.module), fromlist=[alias.name for alias in node.names])
            assert all(hasattr(module, alias.name) for alias in node.names)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def test_metrics_named_in_the_documentation_are_exported() -> None:
    """A name that is gone would be searched for in vain."""
    for page in PAGES:
        named = set(re.findall(r"tierstream_[a-z_]+[a-z]", page.read_text(encoding="utf-8")))
        assert {name for name in named if name not in CATALOGUE and not name.endswith("_")} <= {"tierstream_yaml"}, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_are_named_as_evidence_are_there(page: Path) -> None:
    """A claim whose test was renamed away has nothing under it."""
    named = re.findall(r"\btests/[\w/]+\.py\b", page.read_text(encoding="utf-8"))

    assert [path for path in named if not (ROOT / path).is_file()] == []
