"""Tax on invoices: who is owed tax on a line, at which rate, and whether what was charged is that.

What was charged is the payment provider's decision, and stays as it is; a record of each line says how it is to be treated, on
which evidence, and what the difference is to the rate that the seller has set for that country. An operator who sees a
difference corrects the provider's settings, not the record.

The rules are those of VAT in the EU and of its neighbours in shape: the customer's country; reverse charge for a business with
a tax id in another EU country; nothing for one outside of the EU for which the seller has set no rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

Treatment = Literal["standard", "reverse_charge", "exempt", "zero", "out_of_scope"]
Rounding = Literal["half_up", "half_even", "down"]

#: Members of the EU's VAT area (ISO 3166; Greece's VAT prefix is EL).
EU: Final = frozenset(
    [
        "AT",
        "BE",
        "BG",
        "CY",
        "CZ",
        "DE",
        "DK",
        "EE",
        "ES",
        "FI",
        "FR",
        "GR",
        "HR",
        "HU",
        "IE",
        "IT",
        "LT",
        "LU",
        "LV",
        "MT",
        "NL",
        "PL",
        "PT",
        "RO",
        "SE",
        "SI",
        "SK",
    ]
)
#: What an invoice must say with a treatment.
REMARKS: Final[Mapping[Treatment, str]] = {
    "reverse_charge": "Reverse charge: the recipient owes the tax.",
    "exempt": "Exempt from tax: a certificate of exemption was shown.",
    "out_of_scope": "Not subject to tax in the seller's country.",
}


@dataclass(frozen=True, slots=True)
class Customer:
    """What matters of a customer: the country, a tax id of it that looks right, and whether it is exempt."""

    country: str | None = None
    tax_id: str | None = None
    exempt: bool = False


@dataclass(frozen=True, slots=True)
class Assessment:
    """How a line is to be treated. ``jurisdiction``: whose tax it is, by country; empty: nobody said."""

    treatment: Treatment
    jurisdiction: str
    rate_bp: int


def assess(seller_country: str | None, rates: Mapping[str, int], customer: Customer) -> Assessment:
    """How a seller's lines to a customer are to be treated; ``rates`` are basis points by country."""
    home = seller_country or ""
    country = customer.country or home
    if customer.exempt:
        return Assessment("exempt", country, 0)
    if country == home or not home:
        return _at_rate(country, rates.get(country, 0))
    if home in EU and country in EU:
        if customer.tax_id is not None:
            return Assessment("reverse_charge", country, 0)
        return _at_rate(country, rates[country]) if country in rates else _at_rate(home, rates.get(home, 0))
    return _at_rate(country, rates[country]) if country in rates else Assessment("out_of_scope", country, 0)


def _at_rate(country: str, rate_bp: int) -> Assessment:
    return Assessment("standard" if rate_bp else "zero", country, rate_bp)


def of(base_minor: int, rate_bp: int, rounding: Rounding) -> int:
    """The tax on ``base_minor`` in whole minor units."""
    sign = -1 if base_minor < 0 else 1
    whole, rest = divmod(abs(base_minor) * rate_bp, 10_000)
    if rounding == "half_up":
        whole += rest * 2 >= 10_000
    elif rounding == "half_even":
        whole += rest * 2 > 10_000 or (rest * 2 == 10_000 and whole % 2 == 1)
    return sign * whole


@dataclass(frozen=True, slots=True)
class TaxedLine:
    """A line as its record has it."""

    line: int
    base_minor: int
    tax_minor: int
    assessment: Assessment
    difference_minor: int


def record(
    line: int, base_minor: int, tax_minor: int, rate_bp: int | None, wanted: Assessment, rounding: Rounding
) -> TaxedLine:
    """What to record of a line on which ``tax_minor`` was charged, at ``rate_bp`` where the provider said so.

    Where tax was charged it is standard, whatever the rules say; where none was, it is what the rules say, ``zero`` if they
    would have it taxed.
    """
    due = of(base_minor, wanted.rate_bp, rounding)
    if tax_minor:
        treatment: Treatment = "standard"
        rate = rate_bp if rate_bp is not None else _rate(base_minor, tax_minor)
    else:
        treatment, rate = ("zero" if wanted.treatment == "standard" else wanted.treatment), 0
    return TaxedLine(line, base_minor, tax_minor, Assessment(treatment, wanted.jurisdiction, rate), tax_minor - due)


def _rate(base_minor: int, tax_minor: int) -> int:
    """The rate that was charged, to the nearest basis point; more than the whole base is no rate, and is 100 %."""
    base = abs(base_minor)
    return min(10_000, (2 * abs(tax_minor) * 10_000 + base) // (2 * base)) if base else 0


def summary(records: Sequence[TaxedLine]) -> list[dict[str, Any]]:
    """Base and tax by treatment, country and rate, as the foot of an invoice has them."""
    found: dict[Assessment, list[int]] = {}
    for each in records:
        sums = found.setdefault(each.assessment, [0, 0])
        sums[0] += each.base_minor
        sums[1] += each.tax_minor
    return [
        {
            "treatment": key.treatment,
            "jurisdiction": key.jurisdiction,
            "rate_bp": key.rate_bp,
            "base_minor": base,
            "tax_minor": tax,
        }
        for key, (base, tax) in found.items()
    ]
