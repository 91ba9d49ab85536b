"""Tax: rules by country, rounding, and what is recorded of what was charged."""

from __future__ import annotations

from decimal import ROUND_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.control.billing import tax
from portico.control.billing.tax import Assessment, Customer

RATES = {"DE": 1900, "FR": 2000, "GB": 2000}


@pytest.mark.parametrize(
    ("seller", "customer", "wanted"),
    [
        ("DE", Customer(), ("standard", "DE", 1900)),
        ("DE", Customer("DE", "DE136695976"), ("standard", "DE", 1900)),
        ("DE", Customer("FR", "FR40303265045"), ("reverse_charge", "FR", 0)),
        ("DE", Customer("FR"), ("standard", "FR", 2000)),
        ("DE", Customer("AT"), ("standard", "DE", 1900)),
        ("DE", Customer("US"), ("out_of_scope", "US", 0)),
        ("DE", Customer("GB"), ("standard", "GB", 2000)),
        ("DE", Customer("FR", exempt=True), ("exempt", "FR", 0)),
        ("US", Customer("DE", "DE136695976"), ("standard", "DE", 1900)),
        (None, Customer("AT"), ("zero", "AT", 0)),
        (None, Customer(), ("zero", "", 0)),
    ],
)
def test_rules(seller: str | None, customer: Customer, wanted: Any) -> None:
    assert tax.assess(seller, RATES, customer) == Assessment(*wanted)


@given(st.integers(-(10**12), 10**12), st.integers(0, 10_000))
def test_rounding_is_that_of_decimal(base: int, rate: int) -> None:
    exact = Decimal(base) * rate / 10_000
    for name, mode in (("half_up", ROUND_HALF_UP), ("half_even", ROUND_HALF_EVEN), ("down", ROUND_DOWN)):
        assert tax.of(base, rate, name) == int(exact.quantize(Decimal(1), mode))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("charged", "told", "wanted", "recorded"),
    [
        (190, 1900, Assessment("standard", "DE", 1900), ("standard", 1900, 0)),
        (191, None, Assessment("standard", "DE", 1900), ("standard", 1910, 1)),
        # No rate, and more than a column of the database holds.
        (2**52, None, Assessment("standard", "DE", 1900), ("standard", 10_000, 2**52 - 190)),
        (0, None, Assessment("standard", "DE", 1900), ("zero", 0, -190)),
        (0, 0, Assessment("reverse_charge", "FR", 0), ("reverse_charge", 0, 0)),
        (200, 2000, Assessment("reverse_charge", "FR", 0), ("standard", 2000, 200)),
    ],
)
def test_what_was_charged_stays_and_the_difference_is_said(
    charged: int, told: int | None, wanted: Assessment, recorded: Any
) -> None:
    found = tax.record(0, 1000, charged, told, wanted, "half_up")
    assert (found.assessment.treatment, found.assessment.rate_bp, found.difference_minor) == recorded
    assert found.tax_minor == charged


@given(st.integers(1, 2**53), st.integers(0, 2**53))
def test_a_rate_is_exact_whatever_the_amounts(base: int, charged: int) -> None:
    exact = (Decimal(charged) * 10_000 / base).quantize(Decimal(1), ROUND_HALF_UP)
    assert tax._rate(base, charged) == tax._rate(-base, -charged) == min(10_000, int(exact))


def test_the_foot_of_an_invoice_sums_by_treatment() -> None:
    one, two = Assessment("standard", "DE", 1900), Assessment("zero", "DE", 0)
    lines = [tax.TaxedLine(0, 100, 19, one, 0), tax.TaxedLine(1, 50, 10, one, 0), tax.TaxedLine(2, 7, 0, two, 0)]
    assert [(each["treatment"], each["base_minor"], each["tax_minor"]) for each in tax.summary(lines)] == [
        ("standard", 150, 29), ("zero", 7, 0),
    ]  # fmt: skip
