"""What goes wrong with payment providers, in our own codes.

A provider's message is for people: it is cut, and kept out of decisions. Its code goes along as ``provider_code``. Nothing of
what we sent is ever in an error: it may hold names, addresses and keys.
"""

from __future__ import annotations

import re
from typing import Any, Final

from portico.errors import Problem

#: Characters of a provider's message that people are shown.
DETAIL_CHARS: Final = 300
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f]+")
_CODE: Final = re.compile(r"[^A-Za-z0-9_.:-]+")
_TITLES: Final = {"stripe": "Stripe", "razorpay": "Razorpay", "paypal": "PayPal"}


def title(provider: str) -> str:
    """A provider's name as people write it."""
    return _TITLES.get(provider, provider)


def unconfigured(provider: str) -> Problem:
    return Problem(
        "billing.provider_unconfigured", f"{title(provider)} is not set up on this installation", provider=provider
    )


def unsupported(provider: str, what: str) -> Problem:
    return Problem("billing.provider_unsupported", f"{title(provider)} cannot {what}", provider=provider)


def circuit_open(provider: str, seconds: float) -> Problem:
    wait = max(1, round(seconds))
    return Problem(
        "billing.provider_circuit_open",
        f"{title(provider)} does not answer; it is asked again in {wait} s",
        headers={"Retry-After": str(wait)},
        provider=provider,
    )


def unreachable(provider: str, why: str) -> Problem:
    return Problem(
        "billing.provider_unreachable", f"{title(provider)} cannot be asked: {words(why)}", provider=provider
    )


def busy(provider: str, status: int) -> Problem:
    return Problem(
        "billing.provider_busy",
        f"{title(provider)} is in trouble or asks us to slow down ({status})",
        provider=provider,
    )


def credentials(provider: str, status: int) -> Problem:
    return Problem("billing.provider_credentials", f"{title(provider)} refuses our keys ({status})", provider=provider)


def unreadable(provider: str, what: str) -> Problem:
    return Problem(
        "billing.provider_unreadable", f"{title(provider)}'s answer cannot be read: {words(what)}", provider=provider
    )


def missing(provider: str, ref: str) -> Problem:
    return Problem("billing.provider_object_missing", f"{title(provider)} knows no {words(ref)}", provider=provider)


def declined(provider: str, code: str, message: str) -> Problem:
    return Problem(
        "billing.payment_declined", words(message) or "the payment was declined",
        provider=provider, provider_code=plain_code(code),
    )  # fmt: skip


def key_reused(provider: str) -> Problem:
    return Problem(
        "billing.provider_key_reused",
        f"{title(provider)} knows this idempotency key from another request",
        provider=provider,
    )


def refused(provider: str, status: int, code: str, message: str) -> Problem:
    return Problem(
        "billing.provider_refused", f"{title(provider)} refuses: {words(message) or status}",
        provider=provider, provider_code=plain_code(code),
    )  # fmt: skip


def words(text: Any) -> str:
    """A foreign text as people may see it: one line, not too long."""
    return _UNPRINTABLE.sub(" ", str(text)).strip()[:DETAIL_CHARS] if text is not None else ""


def plain_code(text: Any) -> str:
    """A foreign code as it may go into logs and documents."""
    return _CODE.sub("_", str(text))[:64] if text else ""
