"""Cells of CSV files: text that a spreadsheet would take for a formula."""

from __future__ import annotations

from typing import Any

import pytest

from portico.kit import cells


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "＝1", "－1"])
def test_formulas_begin_with_an_apostrophe(text: str) -> None:
    assert cells.safe(text) == f"'{text}"


@pytest.mark.parametrize("value", ["", "Acme", "1=1", "a@b", -5, 0, None, True])
def test_all_else_stays_as_it_is(value: Any) -> None:
    assert cells.safe(value) is value


def test_a_row_has_nothing_for_none() -> None:
    assert cells.row([None, "=x", -5]) == ["", "'=x", -5]
