"""The documentation, as far as a machine can follow it: links, commands, settings and code that are there."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from consumer.config import load
from consumer.metrics import CATALOGUE
from documents import SECRETS
from shown import (
    ALONE,
    CHART,
    LANGUAGES,
    OUT_OF_REACH,
    OWN_KAFKA,
    PAGES,
    ROOT,
    SHELL,
    STORY,
    TOPICS,
    Call,
    blocks,
    calls,
    calls_in,
    check_tierstream,
    commands_of,
    reason_not_run,
)

VALUES = "# values.yaml"
"""How a block begins that is of the chart's values, not of the service's settings."""


def _tierstream(words: Sequence[str], call: Call) -> None:
    check_tierstream(words, named=call.named)


def _make(words: Sequence[str], _call: Call) -> None:
    """Targets, and variables that a target reads."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        variable = re.match(r"([A-Z_]+)=", word)
        if variable:
            read = f"$({variable[1]})" in makefile or f'environ.get("{variable[1]}"' in makefile
            assert read, f"no target reads {variable[1]}"
        else:
            assert re.search(rf"^{word}:", makefile, re.MULTILINE), f"no target {word}"


def _pip(words: Sequence[str], _call: Call) -> None:
    """Extras of ours, and files of locked packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] == "install"
    for word in words[1:]:
        own = re.fullmatch(r"(?:\.|tierstream)(?:\[(.+)\])?", word)
        if own:
            assert {name for name in (own[1] or "").split(",") if name} <= set(project["optional-dependencies"]), word
        else:
            assert word in {"-r", "--require-hashes", "--no-deps"} or (ROOT / word).is_file(), word


HELM = {
    "install": {"--values"},
    "upgrade": {"--install", "--values", "--wait"},
    "lint": {"--values"},
    "test": set[str](),
}
"""What of Helm's own commands and options is shown."""


def _helm(words: Sequence[str], _call: Call) -> None:
    """Known options; the chart is ours; the values are those of its page, which tests/chart renders."""
    options = {word for word in words if word.startswith("-")}
    assert options <= HELM[words[0]], f"helm {words[0]} takes no {options - HELM[words[0]]}"
    for word in words[1:]:
        assert "/" not in word or ROOT / word == CHART, word
        assert not word.endswith(".yaml") or word == "my-values.yaml", word


def _docker(words: Sequence[str], call: Call) -> None:
    """Files that are there; and in the container, where there is one, a command of ours."""
    for option, value in pairwise(words):
        if option == "--file":
            assert (ROOT / value).is_file(), value
    if words[0] == "run":
        assert not call.named
        check_tierstream(words[words.index("tierstream") + 1 :])
    if words[0] == "build":
        assert (ROOT / words[-1] / "Dockerfile").is_file()


def _kubectl(words: Sequence[str], _call: Call) -> None:
    """Secrets as the chart's page names them, whose keys are settings that are secrets, or files; commands of ours."""
    if words[:3] == ["create", "secret", "generic"]:
        assert f"{{existingSecret: {words[3]}}}" in (CHART / "README.md").read_text(encoding="utf-8"), words[3]
        for key in [word.removeprefix("--from-file=").partition("=")[0] for word in words[4:]]:
            assert key.rpartition("__")[2] in SECRETS or key.endswith(".crt"), key


def _python(words: Sequence[str], _call: Call) -> None:
    """Programs that can be compiled, modules that are there, files that a page has its reader write."""
    match words:
        case ["-m", "venv", _]:
            pass
        case ["-m", "pytest", *files]:
            assert all((ROOT / "tests" / "e2e" / file).is_file() for file in files)
        case ["-c", program]:
            compile(program, "shown", "exec")
        case [file]:
            assert f"As `{file}`" in STORY.read_text(encoding="utf-8"), file
        case _:
            pytest.fail(f"python {shlex.join(words)}")


def _curl(words: Sequence[str], _call: Call) -> None:
    """Paths of the admin port."""
    (address,) = words
    assert urlsplit(address).path in {"/", "/metrics", "/healthz", "/readyz", "/debug/state"}, address


def _cd(words: Sequence[str], _call: Call) -> None:
    (folder,) = words
    assert (ROOT / folder).is_dir()


CHECKS: dict[str, Callable[[Sequence[str], Call], None]] = {
    "tierstream": _tierstream,
    "make": _make,
    "pip": _pip,
    "helm": _helm,
    "docker": _docker,
    "kubectl": _kubectl,
    "python": _python,
    "python3": _python,
    "curl": _curl,
    "cd": _cd,
}
"""What knows the arguments of a program."""

UNCHECKED = {
    TOPICS: "is run, by e2e/test_tutorial.py",
    "cat": "is run, by e2e/test_tutorial.py",
    "mvn": "is run, by e2e/test_tutorial.py",
    "java": "is run, by e2e/test_tutorial.py",
}
"""Programs whose arguments nothing here has to know."""


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


COMPOSE = ROOT / "docs" / "compose.yaml"
CALLS = [
    *(call for page in PAGES for call in calls(page, tuple(CHECKS))),
    *(
        call
        for line in re.findall(r"^#   (.+)$", COMPOSE.read_text(encoding="utf-8"), re.MULTILINE)
        for call in calls_in(COMPOSE.name, line)
    ),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_shown_command_can_be_given(call: Call) -> None:
    """What it names is there: subcommands, options, kinds of arguments, targets, files, extras, paths."""
    program, *words = call.words
    if program in UNCHECKED:
        return
    assert program in CHECKS, f"{program}: nothing here knows what it takes"
    CHECKS[program](words, call)


def test_only_programs_that_are_shown_have_a_reason_not_to_be_checked() -> None:
    """A reason that nothing needs any more hides the next one."""
    assert {call.words[0] for call in CALLS if call.words[0] in UNCHECKED} == set(UNCHECKED)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_of_a_kind_that_is_looked_at(page: Path) -> None:
    """One without a language, or of another, or made by an indent, would be seen by no test."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^ *```(.*)$", text, re.MULTILINE)

    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}
    outside = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\n    \S.*$", outside, re.MULTILINE) == []


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
            for line in commands_of(text):
                used |= {beginning for beginning in OUT_OF_REACH if line.startswith(beginning)}
                own_kafka = page in OWN_KAFKA and (line.startswith(TOPICS) or "--config tierstream.yaml" in line)
                assert page in {STORY, *ALONE} or own_kafka or reason_not_run(line), f"{page.name}: {line}"
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
