"""Reading foreign JSON: a field is there in the shape that it should have, or it is not there."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from portico.kit import money

#: Characters of an id or a code of a provider's; more is none.
REF_CHARS: Final = 255
_LAST_SECOND: Final = 253_402_300_799  # 9999-12-31
_NOTHING: Final[Mapping[str, Any]] = {}


def part(found: Mapping[str, Any] | None, *path: str) -> Mapping[str, Any]:
    """The object at ``path``, empty when there is none."""
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else _NOTHING


def rows(found: Mapping[str, Any], *path: str) -> list[Mapping[str, Any]]:
    """The objects of the list at ``path``, or of its ``data``."""
    value: Any = found
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("data")
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def ref(value: Any) -> str | None:
    """An id; that of an object, when the object stands in its place."""
    if isinstance(value, Mapping):
        value = value.get("id")
    return value if isinstance(value, str) and 0 < len(value) <= REF_CHARS and value.isprintable() else None


def word(value: Any) -> str:
    """A short text, empty when there is none."""
    return value if isinstance(value, str) and len(value) <= REF_CHARS else ""


def whole(value: Any) -> int | None:
    """An integer that is no truth value."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def seconds(value: Any) -> datetime | None:
    """A moment from unix seconds."""
    found = whole(value)
    return datetime.fromtimestamp(found, UTC) if found is not None and 0 < found <= _LAST_SECOND else None


def moment(value: Any) -> datetime | None:
    """A moment from RFC 3339 text."""
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return found.astimezone(UTC) if found is not None and found.tzinfo is not None else None


def currency(value: Any) -> str | None:
    """A currency as ISO 4217 writes it."""
    try:
        return money.currency_code(value) if isinstance(value, str) else None
    except money.MoneyError:
        return None
