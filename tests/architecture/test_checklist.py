"""Every statement about the reference system that this project was built after is proved by a test that names it.

The statements have ids such as ``WIN-3``: what they are about, and a number. A test names in its docstring those that
it proves; "HV-5 to HV-9" and "HV-5 … HV-9" name all in between.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

STATEMENTS = {
    "OP": 13,  # operations and responses
    "WIN": 9,  # how large a window is
    "RES": 11,  # how long its permits are held
    "EXE": 19,  # the executor
    "LIM": 13,  # the limiter
    "SVC": 7,  # the service around them
    "ERR": 4,  # errors
    "ID": 7,  # identity
    "MD": 10,  # metadata and expiry
    "SIZ": 7,  # which size goes where
    "HV": 11,  # the contract of the high-volume tier
    "BT": 14,  # Bigtable
    "GCS": 8,  # Google Cloud Storage
    "TIER": 20,  # operations over both tiers
    "LOG": 15,  # change log and recovery
}
"""How many statements there are about what."""

NOT_HERE = {
    "BT-10": "rows of older systems; there are none, as this one began without them",
    "HV-3": "no backend has a plain read that could meet a tombstone: both reads return it as a value",
    "LIM-12": "nothing emits counts every second: they are plain integers, read when metrics are scraped",
    "LOG-7": "phases are inner state, without `assembling`; what each leaves behind is LOG-8",
    "LOG-11": "the phase `assembling` belongs to multipart uploads (TIER-19)",
    "MD-6": "an expiry cannot be missing: storage computes it from the policy at every write (MD-5)",
    "SIZ-7": "the reference's cap on batched inserts; here records have limits of their own; both tiers are reached",
    "SVC-6": "there is no emitter that could have captured an older limiter (LIM-12)",
    "SVC-7": "limit and gauges are read when metrics are scraped (LIM-12)",
    "TIER-19": "multipart uploads are not among the four operations",
}
"""Statements that do not hold here, and why."""

_ID = r"\b({kinds})-(\d+)\b".format(kinds="|".join(STATEMENTS))
_NAMED = re.compile(rf"{_ID}(?:\s*(?:to|…|-)\s*\1-(\d+))?")


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of the test classes and test functions in *path*."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.name.startswith(("test_", "Test"))
        ):
            yield ast.get_docstring(node) or ""


def named() -> set[str]:
    """Return every id that the docstring of a test names."""
    ids: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        for text in docstrings(path):
            for kind, first, last in _NAMED.findall(text):
                ids.update(f"{kind}-{number}" for number in range(int(first), int(last or first) + 1))
    return ids


NAMED = named()
ALL = [f"{kind}-{number}" for kind, count in STATEMENTS.items() for number in range(1, count + 1)]


@pytest.mark.parametrize("statement", ALL)
def test_every_statement_is_named_by_a_test_or_has_a_reason(statement: str) -> None:
    """And not both: a reason that has become wrong goes."""
    assert (statement in NAMED) != (statement in NOT_HERE)


def test_no_test_names_a_statement_that_does_not_exist() -> None:
    """A slip of the pen would prove nothing."""
    assert set(ALL) >= NAMED
    assert set(ALL) >= set(NOT_HERE)
