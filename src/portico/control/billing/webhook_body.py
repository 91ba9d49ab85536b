"""What a provider's event says of itself, whatever it is about: id, type, account, mode and time.

    facts = read("stripe", headers, body)

| | id | type | account | mode | time |
|---|---|---|---|---|---|
| Stripe | `id` | `type` | `account` (of another's account alone) | `livemode` | `created` |
| Razorpay | header `X-Razorpay-Event-Id`, which no signature covers | `event` | `account_id` | – (the secret's) | `created_at` |
| PayPal | `id` | `event_type` | – (the webhook id's) | – (the certificate's) | `create_time` |

What the event means is for normalization, not for this.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from portico.kit import strict_json

RAZORPAY_ID: Final = "x-razorpay-event-id"
#: Characters of an id or a type.
_CHARS: Final = 255
_PLAIN: Final = re.compile(r"[\x21-\x7e]{1,255}")


class Unreadable(Exception):
    """The body is none of an event of its provider; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Facts:
    """See the module. ``account`` and ``livemode`` are ``None`` where a body does not say."""

    event_id: str
    event_type: str
    account: str | None
    livemode: bool | None
    occurred_at: datetime
    api_version: str | None


def read(provider: str, fields: Mapping[str, str], body: bytes) -> tuple[Facts, Mapping[str, Any]]:
    """The facts of a body (``fields``: headers by lower-case name), and the document. Raises :class:`Unreadable`."""
    try:
        document = strict_json.loads(body)
    except ValueError:
        raise Unreadable("the body is not JSON that everybody reads alike") from None
    if not isinstance(document, dict):
        raise Unreadable("the body is no JSON object")
    return facts_of(provider, document, fields.get(RAZORPAY_ID), body), document


def facts_of(provider: str, document: Mapping[str, Any], given_id: str | None, body: bytes) -> Facts:
    """The facts of a document. Raises :class:`Unreadable`."""
    return _READERS[provider](document, given_id, body)


def _stripe(document: Mapping[str, Any], given_id: str | None, body: bytes) -> Facts:
    livemode, version = document.get("livemode"), document.get("api_version")
    if not isinstance(livemode, bool):
        raise Unreadable("livemode is missing")
    return Facts(
        _text(document, "id"),
        _text(document, "type"),
        _text(document, "account") if document.get("account") is not None else None,
        livemode,
        _time(document.get("created")),
        version[:_CHARS] if isinstance(version, str) else None,
    )


def _razorpay(document: Mapping[str, Any], given_id: str | None, body: bytes) -> Facts:
    # Made up of the body where no header names one, and in lists that we made: the same body is the same event.
    event_id = document.get("id") or given_id or f"sha256:{hashlib.sha256(body).hexdigest()}"
    if not isinstance(event_id, str) or not _PLAIN.fullmatch(event_id):
        raise Unreadable("the id of the event is not readable")
    event_type, account = _text(document, "event"), _text(document, "account_id")
    return Facts(event_id, event_type, account, None, _time(document.get("created_at")), None)


def _paypal(document: Mapping[str, Any], given_id: str | None, body: bytes) -> Facts:
    version = document.get("event_version")
    return Facts(
        _text(document, "id"),
        _text(document, "event_type"),
        None,
        None,
        _time(document.get("create_time")),
        version[:_CHARS] if isinstance(version, str) else None,
    )


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any], str | None, bytes], Facts]]] = {
    "stripe": _stripe, "razorpay": _razorpay, "paypal": _paypal,
}  # fmt: skip


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    if not isinstance(value, str) or not _PLAIN.fullmatch(value):
        raise Unreadable(f"{name} is missing")
    return value


def _time(value: Any) -> datetime:
    """Of seconds since 1970, or of RFC 3339 with its zone."""
    try:
        if isinstance(value, int) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
        if isinstance(value, str) and (at := datetime.fromisoformat(value)).tzinfo is not None:
            return at.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise Unreadable("its time is missing")
