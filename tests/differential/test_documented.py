"""The reference page and the tables of the comparison name the same differences."""

from __future__ import annotations

from pathlib import Path

from tests.differential import differences

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "headers.md"


def test_the_page_names_every_difference() -> None:
    text = PAGE.read_text(encoding="utf-8").lower()
    names = differences.DOCUMENTED_REQUEST | differences.DOCUMENTED_ANSWER | differences.NOT_IN_TRAILERS
    assert [name for name in sorted(names) if f"`{name.decode()}`" not in text] == []
