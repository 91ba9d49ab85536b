"""Stripe's objects as its webhooks have them, in the API versions before 2025-03-31 (`old`) and since (`new`)."""

from __future__ import annotations

from typing import Any, Literal

Shape = Literal["old", "new"]
VERSIONS = {"old": "2024-06-20", "new": "2025-03-31.basil"}
START, END = 1_793_923_200, 1_796_515_200  # 2026-11-06, 2026-12-06
CREATED = 1_793_923_260


def event(kind: str, obj: dict[str, Any], shape: Shape = "new", **changes: Any) -> dict[str, Any]:
    """An event around an object; ``previous``: what the object had before."""
    previous = changes.pop("previous", None)
    data: dict[str, Any] = {"object": obj}
    if previous is not None:
        data["previous_attributes"] = previous
    return {
        "id": "evt_1", "object": "event", "api_version": VERSIONS[shape], "created": CREATED, "data": data, "livemode": False,
        "pending_webhooks": 1, "request": {"id": None, "idempotency_key": None}, "type": kind, **changes,
    }  # fmt: skip


def subscription(shape: Shape, status: str = "active", **changes: Any) -> dict[str, Any]:
    period = {"current_period_start": START, "current_period_end": END}
    item = {
        "id": "si_1", "object": "subscription_item", "price": {"id": "price_pro", "object": "price", "unit_amount": 1900},
        "quantity": 1, "subscription": "sub_1", **(period if shape == "new" else {}),
    }  # fmt: skip
    return {
        "id": "sub_1", "object": "subscription", "customer": "cus_1", "status": status, "currency": "eur",
        "cancel_at_period_end": False, "cancel_at": None, "cancellation_details": {"reason": None}, "schedule": None,
        "items": {"object": "list", "data": [item], "has_more": False}, "metadata": {"organization": "org_of_somebody_else"},
        **(period if shape == "old" else {}), **changes,
    }  # fmt: skip


def line(shape: Shape, **changes: Any) -> dict[str, Any]:
    proration = changes.pop("proration", False)
    common = {
        "id": "il_1", "object": "line_item", "amount": 1900, "currency": "eur", "description": "1 × Pro (at €19.00 / month)",
        "discount_amounts": [], "period": {"start": START, "end": END}, "quantity": 1,
    }  # fmt: skip
    if shape == "old":
        return {
            **common, "type": "subscription", "proration": proration,
            "price": {"id": "price_pro", "unit_amount": 1900, "recurring": {"usage_type": "licensed"}},
            "tax_amounts": [{"amount": 361, "inclusive": False, "tax_rate": {"id": "txr_1", "percentage": 19.0}}], **changes,
        }  # fmt: skip
    return {
        **common,
        "parent": {
            "type": "subscription_item_details",
            "subscription_item_details": {"subscription": "sub_1", "subscription_item": "si_1", "proration": proration},
            "invoice_item_details": None,
        },
        "pricing": {"type": "price_details", "price_details": {"price": "price_pro"}, "unit_amount_decimal": "1900"},
        "taxes": [{"amount": 361, "tax_behavior": "exclusive", "taxable_amount": 1900}],
        **changes,
    }  # fmt: skip


def invoice(shape: Shape, **changes: Any) -> dict[str, Any]:
    lines = changes.pop("lines", [line(shape)])
    common = {
        "id": "in_1", "object": "invoice", "customer": "cus_1", "currency": "eur", "status": "open", "number": "A1B2-0001",
        "total": 2261, "subtotal": 1900, "amount_due": 2261, "amount_paid": 0, "amount_remaining": 2261, "attempt_count": 0,
        "next_payment_attempt": None, "billing_reason": "subscription_cycle",
        # The period before: not what is paid for.
        "period_start": START - 2_592_000, "period_end": START,
        "lines": {"object": "list", "data": lines, "has_more": False},
    }  # fmt: skip
    if shape == "old":
        return {
            **common, "subscription": "sub_1", "tax": 361, "total_tax_amounts": [{"amount": 361, "inclusive": False}],
            "payment_intent": "pi_1", "charge": "ch_1", "paid": False, **changes,
        }  # fmt: skip
    return {
        **common, "total_taxes": [{"amount": 361, "tax_behavior": "exclusive"}],
        "parent": {"type": "subscription_details", "subscription_details": {"subscription": "sub_1", "metadata": {}}}, **changes,
    }  # fmt: skip


def paid_invoice(shape: Shape, **changes: Any) -> dict[str, Any]:
    facts = {"status": "paid", "amount_paid": 2261, "amount_remaining": 0, "attempt_count": 1}
    return invoice(shape, **{**facts, **changes})


def fetched_invoice() -> dict[str, Any]:
    """An invoice as it is fetched: always in the new shape, with its payments."""
    payment = {"type": "payment_intent", "payment_intent": "pi_1"}
    rows = [{"id": "inpay_1", "object": "invoice_payment", "status": "paid", "invoice": "in_1", "payment": payment}]
    return paid_invoice("new", payments={"object": "list", "data": rows, "has_more": False})


def balance_transaction(**changes: Any) -> dict[str, Any]:
    return {
        "id": "txn_1", "object": "balance_transaction", "amount": 2261, "fee": 96, "net": 2165, "currency": "eur", **changes,
    }  # fmt: skip


def checkout(**changes: Any) -> dict[str, Any]:
    return {
        "id": "cs_test_1", "object": "checkout.session", "mode": "subscription", "status": "complete", "payment_status": "paid",
        "customer": "cus_1", "subscription": "sub_1", "invoice": "in_1", "amount_total": 2261, "currency": "eur",
        "client_reference_id": "chk_1", "metadata": {"reference": "chk_1"}, **changes,
    }  # fmt: skip


def refund(**changes: Any) -> dict[str, Any]:
    return {
        "id": "re_1", "object": "refund", "amount": 1000, "currency": "eur", "charge": "ch_1", "payment_intent": "pi_1",
        "status": "succeeded", "reason": "requested_by_customer", "failure_reason": None, **changes,
    }  # fmt: skip


def charge(shape: Shape, **changes: Any) -> dict[str, Any]:
    old = {"invoice": "in_1", "refunds": {"object": "list", "data": [refund(), refund(id="re_2", amount=261)]}}
    return {
        "id": "ch_1", "object": "charge", "amount": 2261, "amount_refunded": 1261, "currency": "eur", "customer": "cus_1",
        "payment_intent": "pi_1", **(old if shape == "old" else {}), **changes,
    }  # fmt: skip


def dispute(**changes: Any) -> dict[str, Any]:
    return {
        "id": "dp_1", "object": "dispute", "amount": 2261, "currency": "eur", "charge": "ch_1", "payment_intent": "pi_1",
        "reason": "fraudulent", "status": "needs_response",
        "balance_transactions": [{"id": "txn_2", "amount": -2261, "fee": 2000, "net": -4261, "currency": "eur"}], **changes,
    }  # fmt: skip


def payout(**changes: Any) -> dict[str, Any]:
    return {
        "id": "po_1",
        "object": "payout",
        "amount": 50_000,
        "currency": "eur",
        "status": "paid",
        "failure_code": None,
        **changes,
    }
