"""Stripe's integers, which count some currencies by other places than ISO 4217 does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from portico.kit import money

#: Decimal places of Stripe's integers where they are not those of ISO 4217 (https://docs.stripe.com/currencies#special-cases).
_PLACES: Final[Mapping[str, int]] = {"ISK": 2, "UGX": 2, "MGA": 0}


def iso(amount: int, code: str) -> int:
    """Stripe's integer as minor units of ISO 4217."""
    places = _PLACES.get(code)
    return money.checked(amount) if places is None else money.rescale(amount, code, places)


def stripe_integer(amount: int, code: str) -> int:
    """Minor units of ISO 4217 as Stripe's integer; raises ``MoneyError`` when Stripe cannot express them."""
    places = _PLACES.get(code)
    if places is None:
        return amount
    step = places - money.exponent(code)
    found, lost = divmod(amount, int(10**-step)) if step < 0 else (amount * int(10**step), 0)
    if lost:
        raise money.MoneyError(f"Stripe has no fractions of {code}")
    return found
