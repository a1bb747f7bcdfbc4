"""What may be tried again in `.ci/run`: not what has judged a run of chance."""

from __future__ import annotations

from pathlib import Path

import pytest

from second_try import FAILED_MAX, JUDGING, Void, refusals, void_unless

JUDGE = "tests/e2e/test_chaos.py::test_hard_kills[at-least-once-20]"
OTHER = "tests/e2e/test_page.py::test_it_is_drawn"


@pytest.mark.parametrize(
    ("failed", "void", "refused"),
    [
        ([], [], True),
        ([OTHER], [], False),
        ([OTHER] * FAILED_MAX, [], False),
        ([OTHER] * (FAILED_MAX + 1), [], True),
        ([JUDGE], [], True),
        ([JUDGE, OTHER], [OTHER], True),
        ([JUDGE, OTHER], [JUDGE], False),
        ([JUDGE] * (FAILED_MAX + 1), [JUDGE], True),
    ],
)
def test_judges_are_asked_once_unless_the_run_was_void(failed: list[str], void: list[str], refused: bool) -> None:
    """A loss that one run in ten shows would else pass 99 times in a hundred."""
    assert bool(refusals(failed, void)) is refused


def test_whoever_is_refused_is_named() -> None:
    """The one among several."""
    (reason,) = refusals([OTHER, JUDGE], [])

    assert reason.startswith(JUDGE)


def test_every_module_that_judges_is_there() -> None:
    """A name that changes would silently be tried again."""
    root = Path(__file__).parents[2]
    assert [module for module in JUDGING if not (root / module).is_file()] == []


def test_a_void_run_says_what_it_has_not_met() -> None:
    """Only where it has not."""
    void_unless(True, "nothing was killed")
    with pytest.raises(Void, match="void: nothing was killed"):
        void_unless(False, "nothing was killed")
