"""Money: decimal texts, other scales, parts that sum exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.kit import money
from portico.kit.money import MoneyError


@pytest.mark.parametrize(
    ("text", "currency", "amount"),
    [
        ("12.50", "USD", 1250), ("12.5", "usd", 1250), ("0", "EUR", 0), ("-0.01", "EUR", -1), ("1250", "JPY", 1250),
        ("1250.0", "JPY", 1250), ("1.234", "KWD", 1234), ("1.2", "KWD", 1200), ("14.550000", "CAD", 1455), ("0.0001", "CLF", 1),
        ("7", "XAF", 7), ("900000000000000.00", "USD", 90_000_000_000_000_000),
    ],
)  # fmt: skip
def test_decimal_texts_become_minor_units(text: str, currency: str, amount: int) -> None:
    assert money.minor(text, currency) == amount


@pytest.mark.parametrize(
    ("text", "currency"),
    [
        ("12.505", "USD"), ("1.5", "JPY"), ("822.016", "CZK"), ("", "USD"), (".5", "USD"), ("5.", "USD"), ("1e3", "USD"),
        ("1,000.00", "USD"), (" 1.00", "USD"), ("+1.00", "USD"), ("NaN", "USD"), ("١", "USD"), ("1.00", "BTC"), ("1.00", "US"),
        ("1.00", "uſd"), ("999999999999999999.00", "USD"),
    ],
)  # fmt: skip
def test_what_is_no_amount_is_refused_not_rounded(text: str, currency: str) -> None:
    with pytest.raises(MoneyError):
        money.minor(text, currency)


@given(st.integers(-(10**15), 10**15), st.sampled_from(sorted(money.EXPONENTS)))
def test_every_amount_survives_being_written_and_read(amount: int, currency: str) -> None:
    text = money.decimal_text(amount, currency)
    assert money.minor(text, currency) == amount
    assert len(text.partition(".")[2]) == money.exponent(currency)


def test_fewer_places_lose_nothing_or_are_refused() -> None:
    assert money.decimal_text(120_000, "HUF", 0) == "1200"
    assert money.decimal_text(-5, "USD") == "-0.05"
    with pytest.raises(MoneyError):
        money.decimal_text(120_050, "HUF", 0)


def test_other_scales_become_minor_units_or_are_refused() -> None:
    assert money.rescale(1500, "ISK", 2) == 15
    assert money.rescale(15, "MGA", 0) == 1500
    with pytest.raises(MoneyError):
        money.rescale(1550, "ISK", 2)
    with pytest.raises(MoneyError):
        money.rescale(2**62, "KWD", 0)


@given(st.integers(-(10**12), 10**12), st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any))
def test_parts_sum_exactly_and_are_fair(total: int, weights: list[int]) -> None:
    parts = money.allocate(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        exact = abs(total) * weight / sum(weights)
        assert abs(abs(part) - exact) <= 1 + exact * 1e-9
        assert part == 0 or (part < 0) == (total < 0)
        assert weight or not part


def test_equal_remainders_go_in_order_and_weights_make_sense() -> None:
    assert money.allocate(100, [1, 1, 1]) == [34, 33, 33]
    assert money.allocate(-100, [1, 1, 1]) == [-34, -33, -33]
    for weights in ([], [0, 0], [3, -1]):
        with pytest.raises(MoneyError):
            money.allocate(1, weights)


def test_shares_round_halves_away_from_zero() -> None:
    assert [money.share(amount, 1900) for amount in (100, 50, -50, 3, 0)] == [19, 10, -10, 1, 0]
