"""Balance transactions of Stripe and recon rows of Razorpay as receipts."""

from __future__ import annotations

from typing import Any

import pytest

from portico.control.billing import settlement_import
from portico.control.billing.settlement_body import ReceiptLine
from portico.errors import Problem


def txn(kind: str, amount: int, fee: int, source: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": f"txn_{kind}", "object": "balance_transaction", "type": kind, "amount": amount, "fee": fee,
        "net": amount - fee, "currency": "eur", "source": source, "exchange_rate": None, "reporting_category": kind, **more,
    }  # fmt: skip


def recon(kind: str, credit: int, debit: int, amount: int, fee: int, tax: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "entity_id": f"{kind[:3]}_1", "type": kind, "credit": credit, "debit": debit, "amount": amount, "fee": fee,
        "tax": tax, "currency": "INR", "settlement_id": "setl_1", **more,
    }  # fmt: skip


class TestStripe:
    def test_signs_kinds_and_references(self) -> None:
        charge = {"id": "ch_1", "payment_intent": "pi_1", "invoice": "in_1", "amount": 11900, "currency": "eur"}
        lines = settlement_import.stripe([
            txn("charge", 11900, 375, charge),
            txn("refund", -2500, 0, "re_1"),
            txn("adjustment", -5000, 1500, "du_1", reporting_category="dispute"),
            txn("adjustment", 5000, -1500, "du_1", reporting_category="dispute_reversal"),
            txn("stripe_fee", -200, 0, None),
            txn("payout", -9000, 0, "po_1"),
        ])  # fmt: skip
        found = [(each["ref"], each["kind"], each["amount_minor"], each["fee_minor"]) for each in lines]
        assert found == [
            ("ch_1", "payment", 11900, 375), ("re_1", "refund", -2500, 0), ("du_1", "dispute", -5000, 1500),
            ("du_1", "dispute", 5000, -1500), ("txn_stripe_fee", "fee", -200, 0),
        ]  # fmt: skip
        assert lines[0]["aliases"] == ["pi_1", "in_1"]
        assert "original_currency" not in lines[0]

    def test_what_was_exchanged_carries_both_amounts(self) -> None:
        charge = {"id": "ch_1", "amount": 12000, "currency": "usd"}
        (line,) = settlement_import.stripe([txn("charge", 11009, 350, charge, exchange_rate=0.91742)])
        assert ReceiptLine.model_validate(line).line().compared_currency == "USD"
        assert (line["original_minor"], line["exchange_rate"]) == (12000, "0.91742")

    @pytest.mark.parametrize(
        ("told", "rate"), [(0.000062, "0.000062"), (6.2e-05, "0.000062"), (1e-12, "0.000000000001"), (15_900.25, "15900.25")]
    )  # fmt: skip
    def test_a_rate_of_many_places_is_a_rate(self, told: float, rate: str) -> None:
        charge = {"id": "ch_1", "amount": 100_000_000, "currency": "idr"}
        (line,) = settlement_import.stripe([txn("charge", 6200, 350, charge, exchange_rate=told)])
        assert ReceiptLine.model_validate(line).exchange_rate == rate

    @pytest.mark.parametrize("told", ["soon", True, float("nan"), [1]])
    def test_a_rate_that_is_none_is_named(self, told: Any) -> None:
        charge = {"id": "ch_1", "amount": 12000, "currency": "usd"}
        with pytest.raises(Problem, match="row 1: exchange_rate is no number"):
            settlement_import.stripe([txn("charge", 11009, 350, charge, exchange_rate=told)])

    @pytest.mark.parametrize(
        "change", [{"net": 1}, {"amount": "11900"}, {"amount": True}, {"source": None}, {"currency": "euro"}]
    )
    def test_a_row_that_does_not_add_up_is_named(self, change: dict[str, Any]) -> None:
        rows = [txn("charge", 1000, 10, "ch_1"), {**txn("charge", 11900, 375, "ch_2"), **change}]
        with pytest.raises(Problem) as refused:
            settlement_import.stripe(rows)
        assert (refused.value.code, refused.value.extra["row"]) == ("settlement.import_invalid", 2)


class TestRazorpay:
    def test_the_documented_arithmetic(self) -> None:
        lines = settlement_import.razorpay([
            recon("payment", 97100, 0, 100000, 2900, 442),
            recon("refund", 0, 242500, 242500, 0),
            recon("transfer", 0, 100296, 100000, 296, 46),
            recon("adjustment", 1012, 0, 0, 0),
            recon("adjustment", 0, 300, 0, 0),
        ])  # fmt: skip
        assert [(each["kind"], each["amount_minor"], each["fee_minor"]) for each in lines] == [
            ("payment", 100000, 2900), ("refund", -242500, 0), ("adjustment", -100000, 296), ("adjustment", 1012, 0),
            ("adjustment", -300, 0),
        ]  # fmt: skip
        for each in lines:
            ReceiptLine.model_validate(each)

    @pytest.mark.parametrize(
        "change", [{"credit": 97101}, {"debit": 1}, {"tax": 2901}, {"type": "other"}, {"entity_id": ""}, {"fee": 1.5}]
    )
    def test_a_row_that_does_not_add_up_is_named(self, change: dict[str, Any]) -> None:
        with pytest.raises(Problem, match="row 1"):
            settlement_import.razorpay([{**recon("payment", 97100, 0, 100000, 2900, 442), **change}])
