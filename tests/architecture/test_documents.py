"""Documents made from the code are what would be made today."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from documents import DOCUMENTS


@pytest.mark.parametrize(("place", "make"), DOCUMENTS.items(), ids=lambda one: getattr(one, "name", ""))
def test_a_made_document_is_up_to_date(place: Path, make: Callable[[], str]) -> None:
    """`make docs` writes it again."""
    assert place.read_text(encoding="utf-8") == make()
