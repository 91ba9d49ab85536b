"""The names of places inside a document: ``addresses.rules[2].allow``, as faults and marks write them."""

from __future__ import annotations

import re

MAX_KEY_CHARS = 80

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,80}")


def member(path: str, key: object) -> str:
    """The path of a member; what could upset a terminal or a log is escaped."""
    text = key if isinstance(key, str) else type(key).__name__
    plain = text if _PLAIN.fullmatch(text) else ascii(text[:MAX_KEY_CHARS])
    return f"{path}.{plain}" if path else plain


def item(path: str, index: int) -> str:
    """The path of an element of a list."""
    return f"{path}[{index}]"
