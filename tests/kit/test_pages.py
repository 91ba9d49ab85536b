"""Cursors round-trip and refuse what is not one."""

from __future__ import annotations

import base64
import json

import pytest

from portico.errors import Problem
from portico.kit import pages


def test_a_cursor_round_trips() -> None:
    assert pages.decode(pages.encode(["tun_1"])) == ("tun_1",)
    assert pages.decode(pages.encode(["2026-01-01", "é"]), 2) == ("2026-01-01", "é")


def _b64(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "!",
        "AAAA",
        "a" * 600,
        _b64("x"),
        _b64([1]),
        _b64([]),
        _b64(["a", "b"]),
        _b64(["a\0"]),
        _b64(["\ud800"]),
        _b64({"a": 1}),
        "é",
    ],
)
def test_what_is_no_cursor_is_refused(cursor: str) -> None:
    with pytest.raises(Problem) as refused:
        pages.decode(cursor)
    assert refused.value.code == "request.cursor_invalid"
    assert refused.value.status == 400


def test_a_page_has_a_cursor_only_when_more_rows_follow() -> None:
    rows = ["a", "b", "c"]
    assert pages.page(rows, 3, lambda r: (r,)) == (rows, None)
    kept, cursor = pages.page(rows, 2, lambda r: (r,))
    assert kept == ["a", "b"]
    assert cursor is not None
    assert pages.decode(cursor) == ("b",)
    assert pages.listing(rows, 2, lambda r: (r,), str.upper) == {"data": ["A", "B"], "next_cursor": cursor}
