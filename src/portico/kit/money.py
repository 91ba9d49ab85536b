"""Money: integers in minor units with an ISO 4217 currency, never floats.

    minor("12.5", "USD") == 1250        minor("1250", "JPY") == 1250        minor("1.234", "KWD") == 1234
    decimal_text(1250, "USD") == "12.50"
    allocate(100, [1, 1, 1]) == [34, 33, 33]          sums exactly, whatever the weights

A decimal text with more places than its currency has is refused unless they are zeros: nobody rounds silently.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

#: Currencies whose minor unit is not a hundredth (ISO 4217, list one, 2026).
_NONE: Final = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
_THREE: Final = "BHD IQD JOD KWD LYD OMR TND"
_FOUR: Final = "CLF UYW"
_TWO: Final = (
    "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CNY COP CRC CUP "
    "CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR IRR JMD KES "
    "KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK "
    "NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB "
    "TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XCD XCG YER ZAR ZMW ZWG"
)
EXPONENTS: Final = {
    code: exponent for exponent, codes in ((0, _NONE), (2, _TWO), (3, _THREE), (4, _FOUR)) for code in codes.split()
}
_DECIMAL: Final = re.compile(r"(-?)([0-9]{1,18})(?:\.([0-9]{1,12}))?")
#: What fits a bigint: more is a mistake.
MOST_MINOR: Final = 2**63 - 1


class MoneyError(ValueError):
    """No amount, or one that its currency cannot express."""


def currency_code(text: str) -> str:
    """A currency as ISO 4217 writes it; raises :class:`MoneyError` for none."""
    code = text.upper()
    if code not in EXPONENTS or not text.isascii():
        raise MoneyError(f"{text[:8]!r} is no currency")
    return code


def exponent(currency: str) -> int:
    """Decimal places of a currency: 0 for JPY, 2 for EUR, 3 for KWD."""
    return EXPONENTS[currency_code(currency)]


def minor(text: str, currency: str) -> int:
    """The minor units of a decimal text such as ``-12.50``; raises :class:`MoneyError`."""
    places = exponent(currency)
    found = _DECIMAL.fullmatch(text)
    if found is None:
        raise MoneyError(f"{text[:24]!r} is no amount")
    sign, whole, fraction = found[1], found[2], (found[3] or "")
    if fraction[places:].strip("0"):
        raise MoneyError(f"{text!r} has more decimal places than {currency} ({places})")
    return checked(int(f"{sign}{whole}{fraction[:places].ljust(places, '0')}"))


def decimal_text(amount: int, currency: str, places: int | None = None) -> str:
    """An amount as decimal text with all the places of its currency.

    ``places``: fewer of them, where a provider takes no more; raises :class:`MoneyError` when that would lose something.
    """
    own = exponent(currency)
    places = own if places is None else places
    digits = str(abs(amount)).rjust(own + 1, "0")
    whole, fraction = (digits[:-own], digits[-own:]) if own else (digits, "")
    if fraction[places:].strip("0"):
        raise MoneyError(f"{amount} {currency} cannot be written with {places} decimal places")
    sign = "-" if amount < 0 else ""
    return f"{sign}{whole}.{fraction[:places].ljust(places, '0')}" if places else f"{sign}{whole}"


def rescale(amount: int, currency: str, places: int) -> int:
    """Minor units of ISO 4217 from an integer that counts ``places`` decimal places (a provider's own idea of a currency).

    Raises :class:`MoneyError` when that would lose something.
    """
    step = exponent(currency) - places
    if step >= 0:
        return checked(amount * int(10**step))
    found, lost = divmod(amount, int(10**-step))
    if lost:
        raise MoneyError(f"{amount} at {places} decimal places is no amount of {currency}")
    return found


def checked(amount: int) -> int:
    """``amount``, when a ledger can hold it."""
    if not -MOST_MINOR <= amount <= MOST_MINOR:
        raise MoneyError(f"an amount of more than {MOST_MINOR} minor units is a mistake")
    return amount


def allocate(total: int, weights: Sequence[int]) -> list[int]:
    """``total`` in parts as ``weights`` have it, by largest remainder: they sum exactly, and equal remainders go in order.

    Raises :class:`MoneyError` for negative weights, or none above zero.
    """
    whole = sum(weights)
    if whole <= 0 or min(weights) < 0:
        raise MoneyError("weights are not negative, and one is above zero")
    sign = -1 if total < 0 else 1
    shares = [divmod(abs(total) * weight, whole) for weight in weights]
    parts = [share for share, _ in shares]
    short = abs(total) - sum(parts)
    order = sorted(range(len(parts)), key=lambda at: -shares[at][1])
    for at in order[:short]:
        parts[at] += 1
    return [sign * part for part in parts]


def share(amount: int, basis_points: int) -> int:
    """``amount`` × ``basis_points`` / 10,000, halves away from zero (commercial rounding, as tax offices take it)."""
    found, rest = divmod(abs(amount) * basis_points, 10_000)
    found += rest * 2 >= 10_000
    return found if amount >= 0 else -found
