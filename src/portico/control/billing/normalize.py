"""Providers' events in one form: pure functions from a verified body, and the objects fetched for it, to finance events.

    found = normalize("stripe", body, await adapter.authority(body), origin=Origin(account, livemode, received_at, sha256))

An empty list is an event that means nothing to us. Whose it is (``organization_id``) is not decided here: that is our own
mapping's to say, never a note of the provider's.

**Which of the two is believed.** Where the signature covers the body (Stripe, Razorpay), what happened then is taken from the
body (an attempt, an amount), and what holds now from the fetched object (a subscription's state): deliveries come in any
order, so a state in a body may be an old one. PayPal signs a checksum that can be forged, so nothing of its bodies but ids is
taken; an event whose object is not there any more is refused (``billing.event_unconfirmed``), to be tried again.

**Effects.** ``effect_key`` names what may happen once: a payment by the provider's id of it, an attempt by its number, a state
by the event that told of it. Two events that tell of one payment have one key.

**Versions.** ``object_version`` is microseconds since 1970: of the moment before a subscription was fetched, or of the event
itself where nothing was fetched. A later look is a later version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from portico.control.billing.normalize_paypal import normalize as _paypal
from portico.control.billing.normalize_razorpay import normalize as _razorpay
from portico.control.billing.normalize_stripe import normalize as _stripe
from portico.control.billing.provider import Fetched, Name, Origin
from portico.control.finance.events import FinanceEvent

_OF: Final[Mapping[str, Callable[[Mapping[str, Any], Fetched | None, Origin], list[FinanceEvent]]]] = {
    "stripe": _stripe,
    "razorpay": _razorpay,
    "paypal": _paypal,
}


def normalize(
    provider: Name, body: Mapping[str, Any], fetched: Fetched | None = None, *, origin: Origin
) -> list[FinanceEvent]:
    """What an event means. Raises ``billing.event_unreadable`` for one that lacks what its kind always has."""
    return _OF[provider](body, fetched, origin)
