"""What a provider calls the state of a refund. A word that nobody knows is no news of the money: pending, and said loudly."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from portico.control.billing.provider import RefundStatus

log = logging.getLogger(__name__)

STRIPE: Final[Mapping[str, RefundStatus]] = {
    "succeeded": "succeeded", "failed": "failed", "canceled": "failed", "pending": "pending", "requires_action": "pending",
}  # fmt: skip
RAZORPAY: Final[Mapping[str, RefundStatus]] = {
    "processed": "succeeded", "failed": "failed", "pending": "pending", "created": "pending",
}  # fmt: skip
PAYPAL: Final[Mapping[str, RefundStatus]] = {
    "completed": "succeeded", "failed": "failed", "cancelled": "failed", "pending": "pending",
}  # fmt: skip


def status_of(provider: str, words: Mapping[str, RefundStatus], said: str) -> RefundStatus:
    """The status that ``said`` means; an event settles a pending one."""
    found = words.get(said)
    if found is None:
        log.warning("a refund is in a state that nobody knows", extra={"f": {"provider": provider, "state": said[:64]}})
    return found or "pending"
