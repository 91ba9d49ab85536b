"""Stripe's events: every row of the table of kinds, in the shapes before and after the API change of 2025."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from portico.control.billing.normalize import normalize
from portico.control.billing.provider import Fetched
from portico.control.billing.stripe_units import iso, stripe_integer
from portico.control.finance.events import FinanceEvent, check
from portico.errors import Problem
from portico.kit.money import MoneyError
from tests.control.billing import stripe_shapes as shapes
from tests.control.billing.providers import origin
from tests.control.billing.stripe_shapes import CREATED, END, START, VERSIONS, Shape, event

BOTH = pytest.mark.parametrize("shape", ["old", "new"])
_AT = datetime.fromtimestamp(CREATED + 5, UTC)


def found(body: dict[str, Any], **objects: Any) -> list[FinanceEvent]:
    fetched = Fetched(_AT, objects) if objects else None
    events = normalize("stripe", body, fetched, origin=origin())
    for each in events:
        check(each)
        assert (each.provider, each.account, each.livemode, each.event_id) == ("stripe", "acct_1", False, "evt_1")
        assert each.organization_id is None, "whose it is, is not the provider's to say"
        assert each.occurred_at == datetime.fromtimestamp(CREATED, UTC)
    return events


def one(body: dict[str, Any], **objects: Any) -> FinanceEvent:
    events = found(body, **objects)
    assert len(events) == 1, events
    return events[0]


def moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


# -- subscriptions


@BOTH
@pytest.mark.parametrize(
    ("kind", "status", "previous", "expected", "internal"),
    [
        ("created", "active", None, "subscription.activated", "active"),
        ("created", "trialing", None, "subscription.activated", "trialing"),
        ("created", "incomplete", None, "subscription.updated", "pending"),
        ("updated", "active", {"status": "incomplete"}, "subscription.activated", "active"),
        ("updated", "active", {"items": {}}, "subscription.updated", "active"),
        ("updated", "past_due", {"status": "active"}, "subscription.past_due", "past_due"),
        ("updated", "unpaid", {"status": "past_due"}, "subscription.suspended", "suspended"),
        ("updated", "incomplete_expired", {"status": "incomplete"}, "subscription.canceled", "expired"),
        ("paused", "paused", None, "subscription.paused", "paused"),
        ("resumed", "active", None, "subscription.updated", "active"),
        ("deleted", "canceled", None, "subscription.canceled", "canceled"),
        ("trial_will_end", "trialing", None, "trial.ending", "trialing"),
    ],
)
def test_subscriptions(shape: Shape, kind: str, status: str, previous: Any, expected: str, internal: str) -> None:
    body = event(f"customer.subscription.{kind}", shapes.subscription(shape, status), shape, previous=previous)
    got = one(body)
    assert (got.kind, got.status, got.event_type) == (expected, internal, f"customer.subscription.{kind}")
    assert (got.subscription_ref, got.customer_ref, got.plan_ref) == ("sub_1", "cus_1", "price_pro")
    assert (got.period_start, got.period_end) == (moment(START), moment(END))
    assert (got.api_version, got.cancel_at_period_end) == (VERSIONS[shape], False)
    assert got.object_version == CREATED * 1_000_000
    assert got.effect_key.endswith(":stripe:sub_1:evt_1")


@BOTH
def test_what_holds_now_is_taken_from_the_fetched_subscription(shape: Shape) -> None:
    """The event is an old one: meanwhile the subscription is another."""
    now = shapes.subscription("new", "past_due", cancel_at_period_end=True)
    got = one(event("customer.subscription.updated", shapes.subscription(shape, "active"), shape), subscription=now)
    assert (got.kind, got.status, got.cancel_at_period_end) == ("subscription.past_due", "past_due", True)
    assert got.object_version == int(_AT.timestamp() * 1_000_000) > CREATED * 1_000_000


def test_another_subscription_that_was_fetched_by_mistake_is_not_believed() -> None:
    other = shapes.subscription("new", "canceled", id="sub_2")
    got = one(event("customer.subscription.updated", shapes.subscription("new", "active")), subscription=other)
    assert (got.status, got.subscription_ref, got.object_version) == ("active", "sub_1", CREATED * 1_000_000)


def test_a_subscription_that_ends_on_a_day_ends_with_a_period() -> None:
    got = one(event("customer.subscription.updated", shapes.subscription("new", cancel_at=END)))
    assert got.cancel_at_period_end is True


# -- checkouts


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("completed", {}, "checkout.completed"),
        ("completed", {"payment_status": "no_payment_required"}, "checkout.completed"),
        ("async_payment_succeeded", {}, "checkout.completed"),
        ("async_payment_failed", {"payment_status": "unpaid"}, "checkout.failed"),
        ("expired", {"payment_status": "unpaid", "status": "expired", "subscription": None}, "checkout.expired"),
    ],
)
def test_checkouts(kind: str, changes: dict[str, Any], expected: str) -> None:
    got = one(event(f"checkout.session.{kind}", shapes.checkout(**changes)))
    assert (got.kind, got.checkout_ref, got.customer_ref) == (expected, "cs_test_1", "cus_1")
    assert (got.amount_minor, got.currency) == (2261, "EUR")
    assert got.effect_key == f"{expected}:stripe:cs_test_1"


@pytest.mark.parametrize("changes", [{"payment_status": "unpaid"}, {"mode": "payment"}, {"mode": "setup"}])
def test_checkouts_that_are_not_paid_or_no_subscriptions_mean_nothing(changes: dict[str, Any]) -> None:
    assert found(event("checkout.session.completed", shapes.checkout(**changes))) == []


# -- invoices and payments


@BOTH
def test_an_invoice_is_issued_with_its_tax_lines_and_period(shape: Shape) -> None:
    got = one(event("invoice.finalized", shapes.invoice(shape), shape))
    assert (got.kind, got.effect_key) == ("invoice.issued", "invoice.issued:stripe:in_1")
    assert (got.invoice_ref, got.subscription_ref, got.customer_ref) == ("in_1", "sub_1", "cus_1")
    assert (got.amount_minor, got.tax_minor, got.net_minor, got.currency) == (2261, 361, 1900, "EUR")
    assert (got.period_start, got.period_end) == (moment(START), moment(END)), "the period that is paid for"
    assert (got.invoice_number, got.plan_ref) == ("A1B2-0001", "price_pro")
    (line,) = got.lines
    assert (line.kind, line.quantity, line.unit_minor, line.net_minor, line.tax_minor) == ("plan", 1, 1900, 1900, 361)
    assert line.tax_rate_bp == (1900 if shape == "old" else None), "a rate is told, not worked out"
    assert (line.period_start, line.period_end) == (moment(START), moment(END))


@BOTH
def test_prorations_discounts_and_taxes_inside_prices(shape: Shape) -> None:
    inside = {"inclusive": True} if shape == "old" else {"tax_behavior": "inclusive"}
    taxes = {"tax_amounts" if shape == "old" else "taxes": [{"amount": 303, **inside}]}
    lines = [
        shapes.line(shape, amount=-950, proration=True, description="Unused time"),
        shapes.line(shape, discount_amounts=[{"amount": 100, "discount": "di_1"}], amount=2000, **taxes),
    ]
    got = one(event("invoice.finalized", shapes.invoice(shape, lines=lines, total=1250), shape))
    assert [(line.kind, line.net_minor, line.tax_minor) for line in got.lines] == [
        ("proration", -950, 361), ("plan", 1597, 303),
    ]  # fmt: skip


def test_what_was_used_and_what_was_added_is_overage() -> None:
    metered = {"price": {"id": "price_u", "unit_amount": 2, "recurring": {"usage_type": "metered"}}}
    old = one(event("invoice.finalized", shapes.invoice("old", lines=[shapes.line("old", **metered)]), "old"))
    added = {
        "parent": {"type": "invoice_item_details", "invoice_item_details": {"invoice_item": "ii_1", "proration": False}}
    }
    new = one(event("invoice.finalized", shapes.invoice("new", lines=[shapes.line("new", **added)])))
    assert [old.lines[0].kind, new.lines[0].kind] == ["overage", "overage"]


def test_an_invoice_below_zero_is_a_credit() -> None:
    got = one(event("invoice.finalized", shapes.invoice("new", total=-500, lines=[])))
    assert (got.kind, got.amount_minor) == ("invoice.credited", 500)


@BOTH
def test_what_was_to_the_customers_credit_pays_a_later_invoice(shape: Shape) -> None:
    told = shapes.invoice(shape, amount_due=1071, starting_balance=-1190, ending_balance=0)
    issued, used = found(event("invoice.finalized", told, shape))
    assert (issued.kind, issued.amount_minor) == ("invoice.issued", 2261)
    assert (used.kind, used.amount_minor, used.currency, used.invoice_ref, used.subscription_ref) == (
        "credit.applied", 1190, "EUR", "in_1", "sub_1",
    )  # fmt: skip
    for before, after in ((0, -500), (300, 0), (-500, -500), (None, None)):
        other = shapes.invoice(shape, starting_balance=before, ending_balance=after)
        assert one(event("invoice.finalized", other, shape)).kind == "invoice.issued"


@BOTH
@pytest.mark.parametrize(
    ("kind", "expected"), [("voided", "invoice.voided"), ("marked_uncollectible", "invoice.uncollectible")]
)
def test_invoices_that_are_given_up(shape: Shape, kind: str, expected: str) -> None:
    got = one(event(f"invoice.{kind}", shapes.invoice(shape), shape))
    assert (got.kind, got.invoice_ref, got.amount_minor, got.subscription_ref) == (expected, "in_1", 2261, "sub_1")


@BOTH
def test_a_payment_with_the_fee_that_was_fetched(shape: Shape) -> None:
    objects = {"invoice": shapes.fetched_invoice(), "balance_transaction": shapes.balance_transaction()}
    got = one(event("invoice.paid", shapes.paid_invoice(shape), shape), **objects)
    assert (got.kind, got.effect_key) == ("payment.succeeded", "payment.succeeded:stripe:in_1")
    assert (got.amount_minor, got.fee_minor, got.net_minor, got.currency) == (2261, 96, 2165, "EUR")
    assert (got.payment_ref, got.invoice_ref, got.subscription_ref) == ("pi_1", "in_1", "sub_1")
    assert got.lines == ()


def test_a_payment_has_one_effect_whatever_else_is_known() -> None:
    """What could not be fetched must not make another payment of it."""
    bare = one(event("invoice.paid", shapes.paid_invoice("new")))
    full = one(event("invoice.paid", shapes.paid_invoice("new")), invoice=shapes.fetched_invoice())
    assert bare.effect_key == full.effect_key
    assert (bare.payment_ref, bare.fee_minor, full.payment_ref) == (None, None, "pi_1")


def test_a_payment_is_told_once_although_stripe_tells_it_twice() -> None:
    assert found(event("invoice.payment_succeeded", shapes.paid_invoice("new"))) == []


def test_a_fee_in_another_currency_stands_by_itself() -> None:
    paid, fee = found(
        event("invoice.paid", shapes.paid_invoice("new")),
        balance_transaction=shapes.balance_transaction(currency="usd", amount=2450, fee=104, net=2346),
    )
    assert (paid.fee_minor, paid.net_minor, paid.currency) == (None, None, "EUR")
    assert (fee.kind, fee.amount_minor, fee.currency, fee.invoice_ref) == ("fee.charged", 104, "USD", "in_1")


def test_a_free_invoice_is_paid_with_nothing() -> None:
    got = one(event("invoice.paid", shapes.paid_invoice("new", total=0, amount_paid=0, total_taxes=[])))
    assert (got.kind, got.amount_minor, got.fee_minor) == ("payment.succeeded", 0, None)


@BOTH
@pytest.mark.parametrize("later", [None, CREATED + 259_200])
def test_a_failed_attempt(shape: Shape, later: int | None) -> None:
    failed = shapes.invoice(shape, attempt_count=2, next_payment_attempt=later)
    payment = {"id": "pi_1", "last_payment_error": {"code": "card_declined", "decline_code": "insufficient_funds"}}
    got = one(event("invoice.payment_failed", failed, shape), payment=payment)
    assert (got.kind, got.effect_key) == ("payment.failed", "payment.failed:stripe:in_1:2")
    assert (got.attempt, got.amount_minor, got.failure_code) == (2, 2261, "insufficient_funds")
    assert (got.next_attempt_at, got.is_final_attempt) == (moment(later) if later else None, later is None)


@BOTH
def test_an_action_is_required(shape: Shape) -> None:
    body = event("invoice.payment_action_required", shapes.invoice(shape, attempt_count=1), shape)
    got = one(body)
    assert (got.kind, got.effect_key) == ("payment.action_required", "payment.action_required:stripe:in_1:1")


@BOTH
def test_an_invoice_of_many_lines_has_all_of_them(shape: Shape) -> None:
    """Ten are in the event; all of them were fetched, in the shape of the API, whatever that of the event."""
    many = [shapes.line("new", amount=100 + n) for n in range(12)]
    told = shapes.invoice(shape, lines=[shapes.line(shape)] * 10)
    told["lines"]["has_more"] = True
    got = one(event("invoice.finalized", told, shape), lines={"data": many})
    assert len(got.lines) == 12
    assert [line.net_minor for line in got.lines] == [100 + n for n in range(12)]


# -- refunds, disputes, payouts


def test_a_refund_in_a_state_that_nobody_knows_is_pending_and_said(caplog: pytest.LogCaptureFixture) -> None:
    got = one(event("refund.created", shapes.refund(status="teleported")), charge=shapes.charge("new"))
    assert (got.kind, got.status) == ("refund.pending", None)
    assert [record.getMessage() for record in caplog.records] == ["a refund is in a state that nobody knows"]


@pytest.mark.parametrize(
    ("kind", "status", "expected", "internal"),
    [
        ("refund.created", "succeeded", "refund.succeeded", "succeeded"),
        ("refund.created", "pending", "refund.pending", None),
        ("refund.created", "requires_action", "refund.pending", None),
        ("refund.updated", "succeeded", "refund.succeeded", "succeeded"),
        ("refund.failed", "failed", "refund.failed", "failed"),
        ("refund.updated", "canceled", "refund.failed", "failed"),
        ("charge.refund.updated", "succeeded", "refund.succeeded", "succeeded"),
    ],
)
def test_refunds(kind: str, status: str, expected: str, internal: str | None) -> None:
    charge, invoice = shapes.charge("new"), shapes.fetched_invoice()
    got = one(event(kind, shapes.refund(status=status)), charge=charge, invoice=invoice)
    assert (got.kind, got.status, got.refund_ref) == (expected, internal, "re_1")
    assert (got.amount_minor, got.currency, got.payment_ref) == (1000, "EUR", "pi_1")
    assert (got.invoice_ref, got.subscription_ref, got.customer_ref) == ("in_1", "sub_1", "cus_1")
    assert got.effect_key == f"{expected}:stripe:re_1"


def test_refunds_told_by_their_charge_have_the_effects_of_their_own_events() -> None:
    old = found(event("charge.refunded", shapes.charge("old"), "old"))
    assert [(each.effect_key, each.amount_minor) for each in old] == [
        ("refund.succeeded:stripe:re_1", 1000), ("refund.succeeded:stripe:re_2", 261),
    ]  # fmt: skip
    refunds = {"object": "list", "data": [shapes.refund()]}
    new = found(event("charge.refunded", shapes.charge("new")), refunds=refunds)
    assert [each.effect_key for each in new] == ["refund.succeeded:stripe:re_1"]
    assert found(event("charge.refunded", shapes.charge("new"))) == []


@pytest.mark.parametrize(
    ("stage", "status", "expected"),
    [
        ("created", "needs_response", "dispute.opened"),
        ("funds_withdrawn", "needs_response", "dispute.opened"),
        ("closed", "won", "dispute.won"),
        ("closed", "lost", "dispute.lost"),
        ("funds_reinstated", "won", "dispute.won"),
        ("created", "warning_needs_response", None),
        ("funds_withdrawn", "warning_needs_response", "dispute.opened"),
        ("closed", "warning_closed", None),
        ("updated", "under_review", None),
        ("funds_reinstated", "under_review", None),
    ],
)
def test_disputes_move_money_once_and_inquiries_none(stage: str, status: str, expected: str | None) -> None:
    events = found(event(f"charge.dispute.{stage}", shapes.dispute(status=status)), charge=shapes.charge("new"))
    assert [each.kind for each in events] == ([expected] if expected else [])
    for got in events:
        assert got.effect_key == f"{expected}:stripe:dp_1", "told twice, by its state and by its money, it is one"
        assert (got.dispute_ref, got.amount_minor, got.payment_ref) == ("dp_1", 2261, "pi_1")
        assert got.status == {"dispute.opened": "open"}.get(got.kind, got.kind.partition(".")[2])
        assert got.fee_minor == (2000 if got.kind == "dispute.opened" else None)


def test_a_dispute_is_booked_when_its_money_moves_with_all_that_stripe_keeps() -> None:
    """When it is told of nothing has moved: what Stripe keeps for it is in the dispute as it is now, or in a later event."""
    early, charge = shapes.dispute(balance_transactions=[]), shapes.charge("new")
    assert found(event("charge.dispute.created", early), charge=charge) == []
    opened = one(event("charge.dispute.created", early), charge=charge, dispute=shapes.dispute())
    assert (opened.kind, opened.fee_minor) == ("dispute.opened", 2000)
    other = {"id": "txn_3", "amount": -100, "fee": 1500, "currency": "usd"}
    abroad = shapes.dispute(balance_transactions=[other])
    opened, fee = found(event("charge.dispute.funds_withdrawn", abroad), charge=charge)
    assert (opened.fee_minor, fee.kind, fee.fee_minor, fee.currency) == (None, "fee.charged", 1500, "USD")
    assert (fee.effect_key, fee.customer_ref) == ("fee.charged:stripe:dp_1:USD", "cus_1")


@pytest.mark.parametrize(
    ("stage", "amount", "expected"),
    [
        ("paid", 50_000, "payout.paid"),
        ("failed", 50_000, "payout.failed"),
        ("canceled", 50_000, "payout.failed"),
        ("reconciliation_completed", 50_000, "payout.reconciled"),
        ("paid", -700, "payout.debit_paid"),
    ],
)
def test_payouts(stage: str, amount: int, expected: str) -> None:
    got = one(event(f"payout.{stage}", shapes.payout(amount=amount)))
    assert (got.kind, got.payout_ref, got.amount_minor) == (expected, "po_1", abs(amount))


# -- money that Stripe counts differently


def test_currencies_that_stripe_counts_by_itself() -> None:
    got = one(event("payout.paid", shapes.payout(amount=1500, currency="isk")))
    assert (got.amount_minor, got.currency) == (15, "ISK")
    assert (iso(15, "MGA"), iso(500, "JPY"), iso(1234, "KWD")) == (1500, 500, 1234)
    assert (stripe_integer(15, "ISK"), stripe_integer(1500, "MGA"), stripe_integer(1250, "USD")) == (1500, 15, 1250)
    with pytest.raises(MoneyError):
        stripe_integer(1550, "MGA")
    with pytest.raises(Problem) as caught:
        found(event("payout.paid", shapes.payout(amount=1550, currency="isk")))
    assert caught.value.code == "billing.event_unreadable"


# -- what is none


@pytest.mark.parametrize(
    "body",
    [
        event("invoice.finalized", {"object": "invoice"}),
        event("invoice.finalized", shapes.invoice("new", total=None)),
        event("invoice.finalized", shapes.invoice("new", currency="xxx")),
        event("invoice.finalized", shapes.invoice("new"), id=None),
        event("invoice.finalized", shapes.invoice("new"), created="yesterday"),
        event("invoice.finalized", shapes.invoice("new"), data=[]),
        event("customer.subscription.updated", shapes.subscription("new", "some_new_status")),
        event("payout.paid", shapes.payout(amount=True)),
        event("payout.paid", shapes.payout(amount=2**80)),
    ],
)
def test_what_lacks_something_is_refused_with_a_code(body: dict[str, Any]) -> None:
    try:
        events = normalize("stripe", body, None, origin=origin())
    except Problem as problem:
        assert problem.code == "billing.event_unreadable"
    else:
        with pytest.raises(ValueError):
            for each in events:
                check(each)


def test_other_events_mean_nothing() -> None:
    for kind in ("customer.created", "price.updated", "v2.core.event", "", "invoice.created"):
        assert found(event(kind, {"id": "x_1"})) == []


def test_mode_and_account_are_ours_whatever_the_body_says() -> None:
    body = event("payout.paid", shapes.payout(), livemode=True, account="acct_other")
    (got,) = normalize("stripe", body, None, origin=origin(received_at=_AT + timedelta(hours=1)))
    assert (got.account, got.livemode, got.received_at) == ("acct_1", False, _AT + timedelta(hours=1))
