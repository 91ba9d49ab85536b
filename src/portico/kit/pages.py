"""Cursor pages: ``{data, next_cursor}``.

A cursor is opaque to clients: base64url of a JSON array with the sort key of the last row seen. It holds no authority
(the query is scoped by the caller, never by the cursor), so it is not signed; a cursor that does not parse is 400.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from portico.errors import Problem

DEFAULT_LIMIT = 50
MAX_LIMIT = 100
_MAX_CURSOR_CHARS = 512

T = TypeVar("T")
Row = TypeVar("Row")


class Page(BaseModel, Generic[T]):
    """One page of a list; ``next_cursor`` is null on the last page."""

    data: list[T]
    next_cursor: str | None = None


@dataclass(frozen=True, slots=True)
class PageRequest:
    """What a list was asked for: at most ``limit`` rows, after the sort key ``after`` (from the start if None)."""

    limit: int = DEFAULT_LIMIT
    after: tuple[str, ...] | None = None


def encode(key: Sequence[str]) -> str:
    """The cursor for a sort key."""
    raw = json.dumps(list(key), separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode(cursor: str, length: int = 1) -> tuple[str, ...]:
    """The sort key of ``length`` strings in a cursor; raises ``request.cursor_invalid``."""
    try:
        if len(cursor) > _MAX_CURSOR_CHARS:
            raise ValueError("too long")
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        key = json.loads(raw)
    except (ValueError, binascii.Error, UnicodeError, RecursionError):
        raise Problem("request.cursor_invalid") from None
    if not isinstance(key, list) or len(key) != length or not all(isinstance(k, str) and _storable(k) for k in key):
        raise Problem("request.cursor_invalid")
    return tuple(key)


def _storable(text: str) -> bool:
    """Whether PostgreSQL can compare with it: JSON can spell NUL and lone surrogates, which are not text."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)


def page(rows: Sequence[Row], limit: int, key: Callable[[Row], Sequence[str]]) -> tuple[Sequence[Row], str | None]:
    """Cut ``rows`` (queried with ``limit + 1``) to a page and its next cursor."""
    if len(rows) <= limit:
        return rows, None
    kept = rows[:limit]
    return kept, encode(key(kept[-1]))


def listing(rows: Sequence[Row], limit: int, key: Callable[[Row], Sequence[str]], render: Callable[[Row], Any]) -> Any:
    """The ``{data, next_cursor}`` document for ``rows`` (queried with ``limit + 1``)."""
    kept, cursor = page(rows, limit, key)
    return {"data": [render(row) for row in kept], "next_cursor": cursor}
