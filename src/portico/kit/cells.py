"""Text in cells of CSV files that people open in a spreadsheet, where some text would be a formula (OWASP, CSV injection)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

#: What begins a formula. The full-width forms are read as the plain ones by spreadsheets of East Asia.
FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def safe(value: Any) -> Any:
    """``value``, with an apostrophe in front where text would begin a formula; numbers are numbers."""
    return f"'{value}" if isinstance(value, str) and value.lstrip(" ").startswith(FORMULA) else value


def row(values: Iterable[Any]) -> list[Any]:
    """All cells of a row; nothing for ``None``."""
    return ["" if value is None else safe(value) for value in values]
