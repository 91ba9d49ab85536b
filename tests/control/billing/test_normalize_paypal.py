"""PayPal's events: every row of the table of kinds, decimal amounts, and bodies that nothing but ids is taken from."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from portico.control.billing.normalize import normalize
from portico.control.billing.provider import Fetched
from portico.control.finance.events import FinanceEvent, check
from portico.errors import Problem
from tests.control.billing.providers import origin

_AT = datetime(2026, 11, 6, 12, 0, 5, tzinfo=UTC)
_PAID, _NEXT = "2026-11-06T12:00:00Z", "2026-12-06T10:00:00Z"


def subscription(status: str = "ACTIVE", **changes: Any) -> dict[str, Any]:
    info = {
        "outstanding_balance": {"currency_code": "EUR", "value": "0.0"}, "failed_payments_count": 0,
        "cycle_executions": [{"tenure_type": "REGULAR", "sequence": 1, "cycles_completed": 1, "cycles_remaining": 0}],
        "last_payment": {"amount": {"currency_code": "EUR", "value": "19.0"}, "time": _PAID}, "next_billing_time": _NEXT,
        **changes.pop("billing_info", {}),
    }  # fmt: skip
    return {
        "id": "I-1", "plan_id": "P-PRO", "status": status, "status_update_time": _PAID, "custom_id": "chk_1",
        "subscriber": {"payer_id": "PAYER1", "email_address": "a@example.com"}, "start_time": _PAID, "update_time": _PAID,
        "billing_info": info, **changes,
    }  # fmt: skip


def sale(**changes: Any) -> dict[str, Any]:
    return {
        "id": "SALE1", "state": "completed", "billing_agreement_id": "I-1", "create_time": _PAID,
        "amount": {"total": "19.00", "currency": "EUR", "details": {"subtotal": "19.00"}},
        "transaction_fee": {"value": "0.86", "currency": "EUR"}, **changes,
    }  # fmt: skip


def event(kind: str, resource: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "id": "WH-1", "event_version": "1.0", "create_time": "2026-11-06T12:00:02.123Z", "event_type": kind,
        "resource_type": "subscription", "resource_version": "2.0", "resource": resource or {"id": "I-1"}, **changes,
    }  # fmt: skip


def found(document: dict[str, Any], **objects: Any) -> list[FinanceEvent]:
    events = normalize("paypal", document, Fetched(_AT, objects), origin=origin(account="MERCHANT1"))
    for each in events:
        check(each)
        assert (each.provider, each.account, each.event_id) == ("paypal", "MERCHANT1", "WH-1")
        assert each.organization_id is None
    return events


_RETRYING = {
    "failed_payments_count": 1,
    "last_failed_payment": {
        "amount": {"currency_code": "EUR", "value": "19.00"}, "time": "2026-11-06T11:00:00Z", "reason_code": "PAYMENT_DENIED",
        "next_payment_retry_time": "2026-11-11T10:00:00Z",
    },
}  # fmt: skip
_TRIAL = {"cycle_executions": [{"tenure_type": "TRIAL", "sequence": 1, "cycles_completed": 1}]}


@pytest.mark.parametrize(
    ("kind", "now", "expected", "internal"),
    [
        ("CREATED", subscription("APPROVAL_PENDING"), "subscription.updated", "pending"),
        ("CREATED", subscription("APPROVED"), "subscription.updated", "pending"),
        ("ACTIVATED", subscription(), "subscription.activated", "active"),
        ("RE-ACTIVATED", subscription(), "subscription.activated", "active"),
        ("ACTIVATED", subscription(billing_info=_TRIAL), "subscription.activated", "trialing"),
        ("UPDATED", subscription(), "subscription.updated", "active"),
        ("PAYMENT.FAILED", subscription(billing_info=_RETRYING), "subscription.past_due", "past_due"),
        ("SUSPENDED", subscription("SUSPENDED", billing_info=_RETRYING), "subscription.suspended", "suspended"),
        ("SUSPENDED", subscription("SUSPENDED"), "subscription.paused", "paused"),
        ("CANCELLED", subscription("CANCELLED"), "subscription.canceled", "canceled"),
        ("EXPIRED", subscription("EXPIRED"), "subscription.completed", "completed"),
    ],
)
def test_subscriptions(kind: str, now: dict[str, Any], expected: str, internal: str) -> None:
    events = [each for each in found(event(f"BILLING.SUBSCRIPTION.{kind}"), subscription=now) if each.status]
    (got,) = events
    assert (got.kind, got.status, got.subscription_ref, got.plan_ref) == (expected, internal, "I-1", "P-PRO")
    assert (got.customer_ref, got.object_version) == ("PAYER1", int(_AT.timestamp() * 1_000_000))
    assert got.effect_key == "subscription.state:paypal:I-1:WH-1"


def test_a_checkout_is_completed_by_approval_and_payment_not_by_being_made() -> None:
    kinds = [
        [each.kind for each in found(event("BILLING.SUBSCRIPTION.CREATED"), subscription=subscription(status))]
        for status in ("APPROVAL_PENDING", "APPROVED")
    ]
    assert kinds == [["subscription.updated"]] * 2
    done, _ = found(event("BILLING.SUBSCRIPTION.ACTIVATED"), subscription=subscription())
    assert (done.kind, done.checkout_ref, done.effect_key) == (
        "checkout.completed", "I-1", "checkout.completed:paypal:I-1",
    )  # fmt: skip


def test_nothing_but_ids_is_taken_from_a_body() -> None:
    """Its signature fits 2^32 other bodies."""
    forged = {
        **sale(),
        "amount": {"total": "9999.00", "currency": "EUR"},
        "billing_agreement_id": "I-9",
        "state": "completed",
    }
    events = found(event("PAYMENT.SALE.COMPLETED", forged), payment=sale(), subscription=subscription())
    assert {each.amount_minor for each in events if each.amount_minor is not None} == {1900}
    assert {each.subscription_ref for each in events} == {"I-1"}
    state = found(event("BILLING.SUBSCRIPTION.ACTIVATED", subscription()), subscription=subscription("CANCELLED"))
    assert [each.status for each in state if each.status] == ["canceled"]


@pytest.mark.parametrize(
    ("kind", "resource", "objects"),
    [
        ("BILLING.SUBSCRIPTION.ACTIVATED", subscription(), {}),
        ("PAYMENT.SALE.COMPLETED", sale(), {}),
        ("PAYMENT.SALE.COMPLETED", sale(), {"subscription": subscription()}),
        ("PAYMENT.SALE.COMPLETED", sale(), {"payment": sale(state="pending")}),
        ("PAYMENT.SALE.REFUNDED", {"id": "REF1"}, {"payment": sale()}),
        ("PAYMENT.SALE.REVERSED", sale(), {"payment": sale()}),
        ("CUSTOMER.DISPUTE.CREATED", {"dispute_id": "PP-D-1"}, {"payment": sale()}),
    ],
)
def test_what_paypal_does_not_confirm_does_nothing(
    kind: str, resource: dict[str, Any], objects: dict[str, Any]
) -> None:
    with pytest.raises(Problem) as caught:
        found(event(kind, resource), **objects)
    assert (caught.value.code, caught.value.retryable) == ("billing.event_unconfirmed", True)


def test_a_failed_payment_names_its_next_attempt() -> None:
    _, got = found(event("BILLING.SUBSCRIPTION.PAYMENT.FAILED"), subscription=subscription(billing_info=_RETRYING))
    assert (got.kind, got.amount_minor, got.currency, got.attempt) == ("payment.failed", 1900, "EUR", 1)
    assert got.effect_key == "payment.failed:paypal:I-1:1793962800"
    assert got.occurred_at == datetime(2026, 11, 6, 11, tzinfo=UTC)
    assert (got.next_attempt_at, got.is_final_attempt) == (datetime(2026, 11, 11, 10, tzinfo=UTC), False)
    last = {**_RETRYING, "last_failed_payment": {**_RETRYING["last_failed_payment"], "next_payment_retry_time": None}}  # type: ignore[dict-item]
    now = subscription("SUSPENDED", billing_info=last)
    assert found(event("BILLING.SUBSCRIPTION.PAYMENT.FAILED"), subscription=now)[1].is_final_attempt is True
    healed = found(event("BILLING.SUBSCRIPTION.PAYMENT.FAILED"), subscription=subscription())
    assert [each.kind for each in healed] == ["subscription.updated"]


def test_a_sale_is_its_own_invoice() -> None:
    issued, paid, state = found(event("PAYMENT.SALE.COMPLETED", sale()), payment=sale(), subscription=subscription())
    assert (issued.kind, issued.effect_key) == ("invoice.issued", "invoice.issued:paypal:SALE1")
    assert (issued.amount_minor, issued.tax_minor, issued.net_minor, issued.invoice_ref) == (1900, 0, 1900, "SALE1")
    assert (issued.period_start, issued.period_end) == (
        datetime(2026, 11, 6, 12, tzinfo=UTC), datetime(2026, 12, 6, 10, tzinfo=UTC),
    )  # fmt: skip
    assert (paid.kind, paid.effect_key) == ("payment.succeeded", "payment.succeeded:paypal:SALE1")
    assert (paid.amount_minor, paid.fee_minor, paid.net_minor, paid.payment_ref) == (1900, 86, 1814, "SALE1")
    assert (state.kind, state.status, state.subscription_ref) == ("subscription.updated", "active", "I-1")


def test_an_old_sale_does_not_get_the_period_of_the_last_one() -> None:
    old = sale(create_time="2026-10-06T12:00:00Z")
    issued, *_ = found(event("PAYMENT.SALE.COMPLETED", old), payment=old, subscription=subscription())
    assert (issued.period_start, issued.period_end) == (datetime(2026, 10, 6, 12, tzinfo=UTC), None)


def test_a_sale_that_was_given_back_meanwhile_was_paid_all_the_same() -> None:
    for state in ("partially_refunded", "refunded", "reversed"):
        events = found(event("PAYMENT.SALE.COMPLETED", sale()), payment=sale(state=state))
        assert [each.kind for each in events] == ["invoice.issued", "payment.succeeded"]


@pytest.mark.parametrize(
    ("amount", "minor"),
    [
        ({"total": "1900", "currency": "JPY"}, 1900),
        ({"total": "1900.00", "currency": "JPY"}, 1900),
        ({"total": "1.234", "currency": "KWD"}, 1234),
        ({"value": "19.9", "currency_code": "USD"}, 1990),
        ({"total": "0.01", "currency": "GBP"}, 1),
    ],
)
def test_decimal_amounts_become_minor_units_of_their_currency(amount: dict[str, str], minor: int) -> None:
    other = sale(amount=amount, transaction_fee=None)
    _, paid = found(event("PAYMENT.SALE.COMPLETED"), payment=other)
    assert (paid.amount_minor, paid.fee_minor) == (minor, None)


@pytest.mark.parametrize(
    "amount",
    [
        {"total": "19.005", "currency": "EUR"}, {"total": "1900.5", "currency": "JPY"}, {"total": "1,900.00", "currency": "EUR"},
        {"total": 19.0, "currency": "EUR"}, {"total": "19.00"}, {"currency": "EUR"}, {"total": "19.00", "currency": "EURO"}, {},
    ],
)  # fmt: skip
def test_amounts_that_are_none_are_refused_not_rounded(amount: dict[str, Any]) -> None:
    with pytest.raises(Problem) as caught:
        found(event("PAYMENT.SALE.COMPLETED"), payment=sale(amount=amount))
    assert caught.value.code == "billing.event_unreadable"


def test_a_fee_in_another_currency_stands_by_itself() -> None:
    abroad = sale(transaction_fee={"value": "0.95", "currency": "USD"})
    _, paid, fee = found(event("PAYMENT.SALE.COMPLETED"), payment=abroad)
    assert (paid.fee_minor, fee.kind, fee.amount_minor, fee.currency) == (None, "fee.charged", 95, "USD")


def test_sales_of_something_else_are_left_alone() -> None:
    other = sale(billing_agreement_id=None)
    assert found(event("PAYMENT.SALE.COMPLETED"), payment=other) == []
    dispute = {"dispute_id": "PP-D-1", "dispute_amount": {"value": "19.00", "currency_code": "EUR"}}
    assert found(event("CUSTOMER.DISPUTE.CREATED"), payment=other, dispute=dispute) == []


@pytest.mark.parametrize(
    ("state", "expected"),
    [("completed", "refund.succeeded"), ("pending", "refund.pending"), ("failed", "refund.failed")],
)
def test_refunds(state: str, expected: str) -> None:
    refund = {"id": "REF1", "sale_id": "SALE1", "state": state, "amount": {"total": "-5.00", "currency": "EUR"}}
    (got,) = found(
        event("PAYMENT.SALE.REFUNDED", {"id": "REF1"}), refund=refund, payment=sale(), subscription=subscription()
    )
    assert (got.kind, got.refund_ref, got.amount_minor, got.payment_ref) == (expected, "REF1", 500, "SALE1")
    assert (got.invoice_ref, got.subscription_ref, got.effect_key) == ("SALE1", "I-1", f"{expected}:paypal:REF1")


def _dispute(**changes: Any) -> dict[str, Any]:
    return {
        "dispute_id": "PP-D-1", "reason": "UNAUTHORISED", "status": "OPEN",
        "dispute_amount": {"value": "19.00", "currency_code": "EUR"},
        "disputed_transactions": [{"seller_transaction_id": "SALE1"}], **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "state", "expected"),
    [
        ("RESOLVED_BUYER_FAVOUR", "completed", "dispute.lost"),
        ("ACCEPTED", "completed", "dispute.lost"),
        ("RESOLVED_BUYER_FAVOUR", "refunded", "dispute.won"),
        ("RESOLVED_SELLER_FAVOUR", "completed", "dispute.won"),
        ("CANCELED_BY_BUYER", "completed", "dispute.won"),
        ("RESOLVED_WITH_PAYOUT", "completed", "dispute.won"),
    ],
)
def test_disputes_end_once(outcome: str, state: str, expected: str) -> None:
    (opened,) = found(event("CUSTOMER.DISPUTE.CREATED"), dispute=_dispute(), payment=sale())
    assert (opened.kind, opened.status, opened.amount_minor) == ("dispute.opened", "open", 1900)
    done = _dispute(status="RESOLVED", dispute_outcome={"outcome_code": outcome})
    again, ended = found(event("CUSTOMER.DISPUTE.RESOLVED"), dispute=done, payment=sale(state=state))
    assert again.effect_key == opened.effect_key == "dispute.opened:paypal:SALE1"
    assert (ended.kind, ended.effect_key) == (expected, f"{expected}:paypal:SALE1")


@pytest.mark.parametrize("state", ["completed", "refunded", "partially_refunded"])
def test_a_sale_that_was_given_back_is_none_that_was_taken_back(state: str) -> None:
    """Somebody makes a body with a CRC of PayPal's: it names a sale of another customer, and no money was lost."""
    open_ = _dispute()
    for objects in ({}, {"dispute": open_}):
        with pytest.raises(Problem) as caught:
            found(event("PAYMENT.SALE.REVERSED"), payment=sale(state=state), **objects)
        assert caught.value.code == "billing.event_unconfirmed"
    lost = _dispute(status="RESOLVED", dispute_outcome={"outcome_code": "ACCEPTED"})
    assert len(found(event("PAYMENT.SALE.REVERSED"), payment=sale(state=state), dispute=lost)) == 2
    assert len(found(event("PAYMENT.SALE.REVERSED"), payment=sale(state=state, reason_code="CHARGEBACK"))) == 2


def test_no_time_is_taken_from_a_body_that_a_checksum_vouches_for() -> None:
    """Somebody makes a body that says when: in which month a refund is booked is not theirs to choose."""
    then, at = "2019-01-01T00:00:00Z", datetime(2026, 11, 6, 12, 0, tzinfo=UTC)
    refund = {
        "id": "REF1", "state": "completed", "sale_id": "SALE1", "create_time": _PAID, "amount": {"total": "-5", "currency": "EUR"}
    }  # fmt: skip
    dispute = _dispute(
        status="RESOLVED", dispute_outcome={"outcome_code": "ACCEPTED"}, create_time=_PAID, update_time=_PAID
    )
    objects = {"payment": sale(update_time=_PAID, state="reversed"), "subscription": subscription()}
    forged = [
        *found(event("PAYMENT.SALE.REFUNDED", {"id": "REF1"}, create_time=then), refund=refund, **objects),
        *found(event("CUSTOMER.DISPUTE.RESOLVED", create_time=then), dispute=dispute, **objects),
        *found(event("PAYMENT.SALE.REVERSED", create_time=then), dispute=dispute, **objects),
        *found(event("PAYMENT.SALE.REVERSED", create_time=then), **objects),
        *found(event("PAYMENT.SALE.COMPLETED", create_time=then), **objects),
        *found(event("BILLING.SUBSCRIPTION.UPDATED", create_time=then), subscription=subscription()),
    ]
    assert len(forged) == 11
    assert {each.occurred_at for each in forged} == {at}


def test_a_reversal_and_the_dispute_behind_it_lose_the_money_of_a_sale_once() -> None:
    gone = found(event("PAYMENT.SALE.REVERSED"), payment=sale(state="reversed"))
    done = _dispute(status="RESOLVED", dispute_outcome={"outcome_code": "RESOLVED_BUYER_FAVOUR"})
    told = found(event("CUSTOMER.DISPUTE.RESOLVED"), dispute=done, payment=sale(state="reversed"))
    assert [each.effect_key for each in gone] == [each.effect_key for each in told]


@pytest.mark.parametrize(
    "document",
    [
        event("BILLING.SUBSCRIPTION.ACTIVATED", create_time="yesterday"),
        event("BILLING.SUBSCRIPTION.ACTIVATED", create_time="2026-11-06T12:00:02"),
        event("BILLING.SUBSCRIPTION.ACTIVATED", id=7),
        event("BILLING.SUBSCRIPTION.ACTIVATED"),
    ],
)
def test_what_lacks_something_is_refused_with_a_code(document: dict[str, Any]) -> None:
    with pytest.raises(Problem) as caught:
        found(document, subscription=subscription("SOMETHING_NEW"))
    assert caught.value.code == "billing.event_unreadable"


def test_other_events_mean_nothing() -> None:
    for kind in ("PAYMENT.SALE.PENDING", "BILLING.PLAN.CREATED", "", "PAYMENT.CAPTURE.COMPLETED"):
        assert found(event(kind)) == []
