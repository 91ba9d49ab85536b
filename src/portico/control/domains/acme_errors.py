"""What a certificate authority (CA) says when it refuses, in our own words.

Codes are the problem types of RFC 8555 (6.7) and RFC 9773 in snake case, and a few of our own. Only a code decides anything, and
only codes are counted: the detail holds request ids and times that differ each time, and is for people.
"""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

_URN: Final = "urn:ietf:params:acme:error:"
#: Problem types of RFC 8555, RFC 9773, RFC 9444 and the draft on profiles; what else comes is ``ca_error``.
_TYPES: Final = {
    "accountDoesNotExist": "account_unknown",
    "alreadyReplaced": "already_replaced",
    "alreadyRevoked": "already_revoked",
    "badCSR": "bad_csr",
    "badNonce": "bad_nonce",
    "badPublicKey": "bad_public_key",
    "badRevocationReason": "bad_revocation_reason",
    "badSignatureAlgorithm": "bad_signature_algorithm",
    "caa": "caa",
    "compound": "compound",
    "connection": "connection",
    "dns": "dns",
    "externalAccountRequired": "external_account_required",
    "incorrectResponse": "incorrect_response",
    "invalidContact": "invalid_contact",
    "invalidProfile": "invalid_profile",
    "malformed": "malformed",
    "orderNotReady": "order_not_ready",
    "rateLimited": "rate_limited",
    "rejectedIdentifier": "rejected_identifier",
    "serverInternal": "server_internal",
    "tls": "tls",
    "unauthorized": "unauthorized",
    "unsupportedContact": "unsupported_contact",
    "unsupportedIdentifier": "unsupported_identifier",
    "userActionRequired": "user_action_required",
}
#: Our own: no answer was had, the answer is none of a CA, or one that says no more than "too many" (no limit of ACME's).
UNREACHABLE: Final = "ca_unreachable"
BUSY: Final = "ca_busy"
UNREADABLE: Final = "ca_unreadable"
#: What another attempt at the same step may well mend, since nothing about the request was wrong.
TRANSIENT: Final = frozenset({UNREACHABLE, UNREADABLE, BUSY, "server_internal", "bad_nonce", "order_not_ready"})
#: What another CA may do better.
OF_THE_CA: Final = TRANSIENT | {
    "rate_limited", "rejected_identifier", "external_account_required", "user_action_required", "invalid_profile",
    "unsupported_identifier", "ca_error",
}  # fmt: skip
#: Characters of a detail that are kept.
DETAIL_CHARS: Final = 500
#: Seconds that a ``Retry-After`` may ask for at most: a week, the longest window of the limits that CAs publish.
RETRY_MAX_SECONDS: Final = 604_800.0
_SECONDS: Final = re.compile(r"[0-9]{1,9}")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f]+")


class AcmeError(Exception):
    """A CA refused, or could not be asked. ``code``: see the module; ``retry_after``: seconds that it wants to be left alone."""

    def __init__(self, code: str, detail: str, *, retry_after: float | None = None, status: int = 0) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.retry_after = retry_after
        self.status = status

    @property
    def transient(self) -> bool:
        """Whether the same step may be tried again."""
        return self.code in TRANSIENT


def of_problem(document: Any, status: int, retry_after: float | None = None) -> AcmeError:
    """The error of a problem document (RFC 8555, 6.7), or of what stands in its place."""
    found: Mapping[str, Any] = document if isinstance(document, dict) else {}
    code = _code(found.get("type"), status)
    detail = _text(found.get("detail")) or f"the CA answered {status}"
    parts = found.get("subproblems")
    if isinstance(parts, list):
        each = [part for part in parts[:20] if isinstance(part, dict)]
        if code == "compound" and each:
            code = _code(each[0].get("type"), status)
        named = [_text(part.get("detail")) for part in each]
        detail = "; ".join([detail, *(text for text in named if text)])
    return AcmeError(code, detail[:DETAIL_CHARS], retry_after=retry_after, status=status)


def _code(kind: Any, status: int) -> str:
    if isinstance(kind, str) and kind.startswith(_URN) and (known := _TYPES.get(kind.removeprefix(_URN))) is not None:
        return known
    if status == 429:
        return BUSY
    return "server_internal" if status >= 500 or status == 408 else "ca_error"


def _text(value: Any) -> str:
    return _UNPRINTABLE.sub(" ", value)[:DETAIL_CHARS] if isinstance(value, str) else ""


def retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds from ``now`` on that a ``Retry-After`` asks for (RFC 9110, 10.2.3); ``None`` without one that can be read."""
    if value is None:
        return None
    text = value.strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), RETRY_MAX_SECONDS)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except (ValueError, IndexError):
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    seconds = (at - now).total_seconds()
    return min(max(0.0, seconds), RETRY_MAX_SECONDS) if math.isfinite(seconds) else None
