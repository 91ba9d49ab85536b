"""JSON that is read in one way, or not at all."""

from __future__ import annotations

import json

import pytest

from portico.kit import strict_json


def test_json_is_read() -> None:
    document = {"a": [1, 2.5, None, True, "é\u0000"], "b": {}}
    assert strict_json.loads(json.dumps(document).encode()) == document
    assert strict_json.loads('{"ä": "ö"}'.encode()) == {"ä": "ö"}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a": 1, "a": 1}',
        b'{"x": {"a": 1, "a": 2}}',
        b"[NaN]",
        b"[-Infinity]",
        b'{"a": "\xff"}',
        b"[" * 100_000,
    ]
    + ['{"a": 1}'.encode(code) for code in ("utf-16", "utf-32", "utf-8-sig")],
)
def test_what_could_be_read_in_two_ways_is_not(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        strict_json.loads(text)
