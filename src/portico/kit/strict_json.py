"""JSON that every program reads alike: UTF-8, no name twice in one object, no numbers that JSON does not have."""

from __future__ import annotations

import json
from typing import Any


def loads(text: bytes) -> Any:
    """The document. Raises ``ValueError`` for what is not JSON (RFC 8259), or could be read in two ways."""
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_once_each)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member is there twice: two programs would believe different ones")
    return found
