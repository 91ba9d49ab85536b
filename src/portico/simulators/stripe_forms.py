"""Stripe's way of sending parameters: ``a[b][0][c]=v`` in a form or a query, as nested objects and lists."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from portico.simulators.billing_world import Doc

_PART: Final = re.compile(r"\[([^\]]*)\]")
#: Levels of nesting that are read.
MAX_DEPTH: Final = 10


def nested(pairs: Iterable[tuple[str, str]]) -> Doc:
    """``[("a[b][0]", "v")]`` → ``{"a": {"b": ["v"]}}``. Raises ``ValueError`` for what cannot be."""
    root: Doc = {}
    for name, value in pairs:
        head, _, _ = name.partition("[")
        path = [head, *_PART.findall(name[len(head) :])]
        if len(path) > MAX_DEPTH:
            raise ValueError(f"too many levels in {name}")
        _set(root, path, value)
    found: Doc = {key: _lists(inner) for key, inner in root.items()}
    return found


def _set(root: Doc, path: list[str], value: str) -> None:
    at = root
    for part in path[:-1]:
        inner = at.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{part} is a value and an object")
        at = inner
    last = path[-1] if path[-1] else str(len(at))
    at[last] = value


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(found) for key, found in value.items()}
    if inner and all(key.isdigit() for key in inner):
        return [inner[key] for key in sorted(inner, key=int)]
    return inner


def flag(value: object) -> bool:
    """``true`` and ``false`` as forms have them."""
    return value is True or value == "true"
