"""Razorpay's events: every row of the table of kinds, and one effect for one payment however it is told."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from portico.control.billing.normalize import normalize
from portico.control.billing.provider import Fetched
from portico.control.finance.events import FinanceEvent, check
from portico.errors import Problem
from tests.control.billing.providers import origin

START, END = 1_793_923_200, 1_796_515_200
CREATED = 1_793_923_260
_AT = datetime.fromtimestamp(CREATED + 5, UTC)


def subscription(status: str = "active", **changes: Any) -> dict[str, Any]:
    return {
        "id": "sub_1", "entity": "subscription", "plan_id": "plan_pro", "customer_id": "cust_1", "status": status,
        "current_start": START, "current_end": END, "start_at": START, "charge_at": END, "paid_count": 1, "remaining_count": 119,
        "total_count": 120, "quantity": 1, "auth_attempts": 0, "notes": {"organization": "org_of_somebody_else"},
        "has_scheduled_changes": False, "short_url": "https://rzp.io/i/1", **changes,
    }  # fmt: skip


def payment(status: str = "captured", **changes: Any) -> dict[str, Any]:
    return {
        "id": "pay_1", "entity": "payment", "amount": 190_000, "currency": "INR", "status": status, "invoice_id": "inv_1",
        "order_id": "order_1", "customer_id": "cust_1", "fee": 4484, "tax": 684, "error_code": None, "error_reason": None,
        "error_description": None, "created_at": CREATED, **changes,
    }  # fmt: skip


def invoice(**changes: Any) -> dict[str, Any]:
    return {
        "id": "inv_1", "entity": "invoice", "subscription_id": "sub_1", "customer_id": "cust_1", "amount": 190_000,
        "tax_amount": 28_983, "currency": "INR", "billing_start": START, "billing_end": END, "invoice_number": "RZP-7",
        "line_items": [{"id": "li_1", "name": "Pro", "amount": 190_000}], **changes,
    }  # fmt: skip


def body(name: str, **entities: Any) -> dict[str, Any]:
    return {
        "entity": "event", "account_id": "acc_1", "event": name, "contains": list(entities), "created_at": CREATED,
        "payload": {kind.replace("__", "."): {"entity": entity} for kind, entity in entities.items()},
    }  # fmt: skip


def found(document: dict[str, Any], event_id: str = "evt_header", **objects: Any) -> list[FinanceEvent]:
    raw = json.dumps(document).encode()
    where = origin(raw, account="acc_1", event_id=event_id)
    events = normalize("razorpay", document, Fetched(_AT, objects) if objects else None, origin=where)
    for each in events:
        check(each)
        assert (each.provider, each.account, each.event_id) == ("razorpay", "acc_1", event_id)
        assert each.organization_id is None
    return events


@pytest.mark.parametrize(
    ("name", "status", "expected", "internal"),
    [
        ("activated", "active", "subscription.activated", "active"),
        ("resumed", "active", "subscription.activated", "active"),
        ("updated", "active", "subscription.updated", "active"),
        ("pending", "pending", "subscription.past_due", "past_due"),
        ("halted", "halted", "subscription.suspended", "suspended"),
        ("paused", "paused", "subscription.paused", "paused"),
        ("cancelled", "cancelled", "subscription.canceled", "canceled"),
        ("completed", "completed", "subscription.completed", "completed"),
        ("updated", "expired", "subscription.canceled", "expired"),
        ("updated", "created", "subscription.updated", "pending"),
    ],
)
def test_subscriptions(name: str, status: str, expected: str, internal: str) -> None:
    (got,) = found(body(f"subscription.{name}", subscription=subscription(status)))
    assert (got.kind, got.status, got.subscription_ref, got.plan_ref) == (expected, internal, "sub_1", "plan_pro")
    assert (got.customer_ref, got.cancel_at_period_end) == ("cust_1", None)
    assert (got.period_start, got.period_end) == (datetime.fromtimestamp(START, UTC), datetime.fromtimestamp(END, UTC))


def test_an_authenticated_subscription_completes_its_checkout() -> None:
    done, state = found(body("subscription.authenticated", subscription=subscription("authenticated", start_at=None)))
    assert (done.kind, done.checkout_ref, done.effect_key) == (
        "checkout.completed", "sub_1", "checkout.completed:razorpay:sub_1",
    )  # fmt: skip
    assert state.status == "pending", "authorised is not paid"
    later = subscription("authenticated", start_at=CREATED + 86_400)
    assert found(body("subscription.authenticated", subscription=later))[1].status == "trialing"


def test_a_state_that_is_old_is_not_believed() -> None:
    (got,) = found(body("subscription.activated", subscription=subscription()), subscription=subscription("cancelled"))
    assert (got.kind, got.status, got.object_version) == (
        "subscription.canceled", "canceled", int(_AT.timestamp() * 1_000_000),
    )  # fmt: skip


def test_an_old_body_under_a_new_id_has_the_effects_that_it_had() -> None:
    """Nothing signs the id, and nothing the time."""
    document = body("subscription.charged", subscription=subscription(), payment=payment())
    first, second = found(document, "evt_a"), found(document, "evt_b")
    assert [each.effect_key for each in first] == [each.effect_key for each in second]
    assert len(first) == 3


def test_a_charge_renews_invoices_and_pays() -> None:
    document = body("subscription.charged", subscription=subscription(), payment=payment())
    state, issued, paid = found(document, invoice=invoice(), payment=payment(), subscription=subscription())
    assert (state.kind, state.status) == ("subscription.updated", "active")
    assert (issued.kind, issued.effect_key) == ("invoice.issued", "invoice.issued:razorpay:inv_1")
    assert (issued.amount_minor, issued.tax_minor, issued.net_minor) == (190_000, 28_983, 161_017)
    assert (issued.invoice_number, issued.plan_ref, len(issued.lines)) == ("RZP-7", "plan_pro", 1)
    assert issued.lines[0].net_minor + issued.lines[0].tax_minor == 190_000
    assert (paid.kind, paid.effect_key) == ("payment.succeeded", "payment.succeeded:razorpay:pay_1")
    assert (paid.amount_minor, paid.fee_minor, paid.net_minor, paid.currency) == (190_000, 4484, 185_516, "INR")
    for each in (issued, paid):
        assert (each.subscription_ref, each.invoice_ref, each.period_end) == (
            "sub_1",
            "inv_1",
            datetime.fromtimestamp(END, UTC),
        )


def test_one_payment_is_one_effect_however_it_is_told() -> None:
    objects = {"invoice": invoice(), "payment": payment(), "subscription": subscription()}
    told = [
        body("subscription.charged", subscription=subscription(), payment=payment()),
        body("payment.captured", payment=payment()),
        body("invoice.paid", payment=payment(), invoice=invoice()),
    ]
    effects = [
        {each.effect_key for each in found(document, **objects) if each.kind in ("payment.succeeded", "invoice.issued")}
        for document in told
    ]
    assert effects[0] == effects[1] == effects[2] != set()


def test_money_that_is_not_a_subscriptions_is_left_alone() -> None:
    for name, status in (("payment.captured", "captured"), ("payment.failed", "failed")):
        assert found(body(name, payment=payment(status, invoice_id=None))) == []
    assert found(body("invoice.issued", invoice=invoice(subscription_id=None))) == []
    waiting = payment("authorized")
    assert found(body("payment.captured", payment=waiting), payment=waiting, invoice=invoice()) == []


def test_a_fee_in_another_currency_stands_by_itself() -> None:
    abroad = payment(currency="USD", amount=1900, base_currency="INR", base_amount=160_000, fee=4800)
    objects = {"payment": abroad, "invoice": invoice(currency="USD", amount=1900, tax_amount=0)}
    issued, paid, fee = found(body("payment.captured", payment=abroad), **objects)
    assert (issued.currency, paid.fee_minor, paid.currency) == ("USD", None, "USD")
    assert (fee.kind, fee.amount_minor, fee.currency) == ("fee.charged", 4800, "INR")


def test_a_failed_payment_is_owed_and_names_its_next_attempt() -> None:
    failed = payment("failed", error_code="BAD_REQUEST_ERROR", error_reason="payment_failed", fee=None, tax=None)
    waiting = subscription("pending", charge_at=CREATED + 86_400, auth_attempts=1)
    objects = {"payment": failed, "invoice": invoice(), "subscription": waiting}
    for document in (
        body("payment.failed", payment=failed),
        body("subscription.pending", subscription=waiting, payment=failed),
    ):
        issued, got = [each for each in found(document, **objects) if not each.kind.startswith("subscription.")]
        assert (issued.kind, issued.effect_key) == ("invoice.issued", "invoice.issued:razorpay:inv_1")
        assert (got.kind, got.effect_key) == ("payment.failed", "payment.failed:razorpay:pay_1")
        assert (got.failure_code, got.attempt, got.is_final_attempt) == ("payment_failed", 1, False)
        assert got.next_attempt_at == datetime.fromtimestamp(CREATED + 86_400, UTC)
    objects["subscription"] = subscription("halted")
    got = found(body("payment.failed", payment=failed), **objects)[-1]
    assert (got.is_final_attempt, got.next_attempt_at) == (True, None)


@pytest.mark.parametrize(
    ("stage", "expected", "internal"),
    [
        ("created", "refund.pending", None),
        ("processed", "refund.succeeded", "succeeded"),
        ("failed", "refund.failed", "failed"),
    ],
)
def test_refunds(stage: str, expected: str, internal: str | None) -> None:
    refund = {"id": "rfnd_1", "amount": 50_000, "currency": "INR", "payment_id": "pay_1", "status": "processed"}
    (got,) = found(body(f"refund.{stage}", refund=refund, payment=payment()), invoice=invoice(), payment=payment())
    assert (got.kind, got.status, got.effect_key) == (expected, internal, f"{expected}:razorpay:rfnd_1")
    assert (got.amount_minor, got.payment_ref, got.invoice_ref, got.subscription_ref) == (
        50_000,
        "pay_1",
        "inv_1",
        "sub_1",
    )


@pytest.mark.parametrize(
    ("stage", "expected", "internal"),
    [
        ("created", "dispute.opened", "open"), ("won", "dispute.won", "won"), ("lost", "dispute.lost", "lost"),
        ("closed", "dispute.won", "won"),
    ],
)  # fmt: skip
def test_disputes(stage: str, expected: str, internal: str) -> None:
    dispute = {"id": "disp_1", "payment_id": "pay_1", "amount": 190_000, "currency": "INR", "reason_code": "chargeback"}
    (got,) = found(body(f"payment.dispute.{stage}", payment__dispute=dispute, payment=payment()), invoice=invoice())
    assert (got.kind, got.status, got.dispute_ref, got.amount_minor) == (expected, internal, "disp_1", 190_000)
    assert (got.payment_ref, got.failure_code) == ("pay_1", "chargeback")


def test_a_dispute_that_was_lost_is_closed_too() -> None:
    dispute = {"id": "disp_1", "payment_id": "pay_1", "amount": 190_000, "currency": "INR", "status": "lost"}
    (got,) = found(body("payment.dispute.closed", payment__dispute=dispute, payment=payment()), dispute=dispute)
    assert (got.kind, got.effect_key) == ("dispute.lost", "dispute.lost:razorpay:disp_1")


def test_settlements() -> None:
    settlement = {"id": "setl_1", "amount": 185_516, "status": "processed", "fees": 4484, "tax": 684, "utr": "U1"}
    (got,) = found(body("settlement.processed", settlement=settlement))
    assert (got.kind, got.payout_ref, got.amount_minor, got.currency) == ("payout.paid", "setl_1", 185_516, "INR")


@pytest.mark.parametrize(
    "document",
    [
        body("subscription.activated", subscription=subscription("dancing")),
        body("subscription.activated"),
        {**body("subscription.activated", subscription=subscription()), "created_at": None},
        body("refund.processed", refund={"id": "rfnd_1", "amount": -5, "currency": "INR"}),
        body("refund.processed", refund={"id": "rfnd_1", "amount": 5, "currency": "rupees"}),
        body("settlement.processed", settlement={"id": "setl_1", "amount": "185516"}),
        {**body("refund.processed"), "payload": []},
    ],
)
def test_what_lacks_something_is_refused_with_a_code(document: dict[str, Any]) -> None:
    with pytest.raises(Problem) as caught:
        found(document)
    assert caught.value.code == "billing.event_unreadable"


def test_other_events_mean_nothing() -> None:
    for name in ("payment.authorized", "order.paid", "payment.dispute.under_review", "", "payment_link.paid"):
        assert found(body(name, payment=payment())) == []
