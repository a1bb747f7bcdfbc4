"""The source tree keeps its own rules: modules explain themselves, names say one thing, vendors stay at their edge."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "consumer"

MODULES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))

TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))

EXPLAINS_NOTHING = {"base", "common", "helpers", "manager", "misc", "types", "util", "utils"}
"""Names that fit anything, so that anything ends up there."""

OTHER_WORDS = {
    "blob": "object, payload or revision",
    "changelog": "change_log (the file CHANGELOG.md is something else)",
    "helper": "what it does",
    "job": "operation",
    "jobs": "operations",
    "manager": "what it does",
    "messages": "records",
    "msg": "record, or text",
    "utils": "what it does",
    "worker": "what it does, or the thread or task it is",
    "workers": "as worker",
}
"""Words of the field that have another name here: one word, one meaning."""

EDGES = {
    # The benchmark measures a bare client loop beside the service: aiokafka and fastavro as most people use them.
    "aiokafka": {"consumer/kafka/", "consumer/bench.py"},
    "fastavro": {"consumer/codec.py", "consumer/avro_schemas.py", "consumer/bench.py"},
    "prometheus_client": {"consumer/metrics.py", "consumer/admin.py"},
    "google": {"consumer/storage/bigtable_table.py", "consumer/storage/gcs_client.py"},
}
"""The only places that may import a vendor's package, directly."""


@cache
def tree(module: str) -> ast.Module:
    """Parse *module*, a path below the root."""
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def defined_names(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of all that *node* defines: classes, functions, arguments, assigned names and attributes."""
    for child in ast.walk(node):
        match child:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield child.lineno, name
            case ast.arg(arg=name):
                yield child.lineno, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield child.lineno, name


def words(name: str) -> list[str]:
    """Split an identifier into its words: `recordSize`, `RecordSize` and `record_size` give record, size."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def imported_packages(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and top-level package of every absolute import in *node*, wherever it stands."""
    for child in ast.walk(node):
        match child:
            case ast.Import(names=names):
                for name in names:
                    yield child.lineno, name.name.partition(".")[0]
            case ast.ImportFrom(module=str(module), level=0):
                yield child.lineno, module.partition(".")[0]


def test_the_package_is_where_this_test_looks() -> None:
    """Guards the tests below against passing over an empty list."""
    assert "consumer/errors.py" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_what_it_is_for(module: str) -> None:
    """Style 7.1: a reader checks code against claims, so there have to be claims."""
    docstring = ast.get_docstring(tree(module))

    assert docstring, f"{module} has no docstring"
    assert docstring.splitlines()[0].endswith((".", ":")), f"{module}: the first line is a sentence"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_name_explains_something(module: str) -> None:
    """Style 5.2: a name that fits anything explains nothing."""
    named = {part.removesuffix(".py").strip("_") for part in Path(module).parts}

    assert not named & EXPLAINS_NOTHING


@pytest.mark.parametrize("module", MODULES)
def test_identifiers_use_the_vocabulary(module: str) -> None:
    """Style 6: strays from other systems' vocabularies are banned from our own identifiers."""
    strays = [
        f"{module}:{line} {name}: say {OTHER_WORDS[word]}"
        for line, name in defined_names(tree(module))
        for word in words(name)
        if word in OTHER_WORDS
    ]

    assert not strays, "\n".join(strays)


@pytest.mark.parametrize("vendor", EDGES)
def test_a_vendor_is_imported_only_at_its_edge(vendor: str) -> None:
    """Style 5.3, independent of import-linter and blind to no import, wherever in a function it hides."""
    allowed = tuple(EDGES[vendor])
    strays = [
        f"{module}:{line}"
        for module in MODULES
        if not module.startswith(allowed)
        for line, package in imported_packages(tree(module))
        if package == vendor
    ]

    assert not strays


@pytest.mark.parametrize("path", TESTS)
def test_a_test_is_a_sentence(path: str) -> None:
    """Style 8: a test's name is the sentence that fails, and nothing is switched off."""
    source = tree(path)
    too_short = [name for _, name in defined_names(source) if name.startswith("test_") and name.count("_") < 2]

    assert ast.get_docstring(source), f"{path} has no docstring"
    assert not too_short, f"{path}: {too_short} say too little"
