"""Razorpay's events (https://razorpay.com/docs/webhooks/): a name, and the entities that it is about in ``payload``.

Their id is a header that nothing signs, and no time is signed either. So effects are named by the objects that they are about,
states by the digest of the whole body: an old body that comes again under another id has the effects that it had. What holds
now is taken from the fetched objects.

A payment does not name its subscription; its invoice does, which is fetched for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

from portico.control.billing.foreign import REF_CHARS, currency, part, ref, rows, seconds, whole, word
from portico.control.billing.normalize_event import Head, unreadable
from portico.control.billing.provider import Fetched, Origin
from portico.control.finance.events import FinanceEvent, Line

_STATUSES: Final[Mapping[str, str]] = {
    "created": "pending",
    "authenticated": "pending",
    "active": "active",
    "pending": "past_due",
    "halted": "suspended",
    "paused": "paused",
    "cancelled": "canceled",
    "completed": "completed",
    "expired": "expired",
}
_KINDS: Final[Mapping[str, str]] = {
    "past_due": "subscription.past_due",
    "suspended": "subscription.suspended",
    "paused": "subscription.paused",
    "canceled": "subscription.canceled",
    "expired": "subscription.canceled",
    "completed": "subscription.completed",
}
#: What Razorpay settles in where its settlements do not say.
_HOME: Final = "INR"
#: Payments that brought money, whatever became of it later.
_TAKEN: Final = frozenset({"captured", "refunded"})

Object = Mapping[str, Any]


def normalize(body: Object, fetched: Fetched | None, origin: Origin) -> list[FinanceEvent]:
    """What an event means; see ``normalize``."""
    name = word(body.get("event"))
    handler = _HANDLERS.get(name)
    if handler is None:
        return []
    created = seconds(body.get("created_at"))
    event_id = origin.event_id or ref(body.get("id")) or ""
    if created is None or not event_id:
        raise unreadable("razorpay", "id or time")
    return handler(_View(Head("razorpay", origin, event_id, name, None, created), body, fetched))


class _View:
    """An event's entities: ``now`` as they were fetched, ``told`` as the event has them."""

    def __init__(self, head: Head, body: Object, fetched: Fetched | None) -> None:
        self.head, self.fetched, self._payload = head, fetched, part(body, "payload")
        self.digest = head.origin.raw_sha256.hex()[:32]

    def told(self, kind: str) -> Object:
        found = part(self._payload, kind)
        return part(found, "entity") or (found if ref(found) else {})

    def now(self, kind: str) -> Object:
        objects = self.fetched.objects if self.fetched is not None else {}
        return objects.get(kind) or self.told(kind)

    def links(self) -> dict[str, Any]:
        """Whose it is, as far as payment, invoice and subscription tell."""
        payment, invoice, subscription = (self.now(kind) for kind in ("payment", "invoice", "subscription"))
        return {
            "subscription_ref": ref(subscription) or ref(invoice.get("subscription_id")),
            "customer_ref": ref(subscription.get("customer_id"))
            or ref(payment.get("customer_id"))
            or ref(invoice.get("customer_id")),
            "invoice_ref": ref(payment.get("invoice_id")) or ref(invoice),
            "payment_ref": ref(payment),
        }


# -- subscriptions ---------------------------------------------------------------------------------------------------------


def _subscription(view: _View) -> list[FinanceEvent]:
    head, found = view.head, view.now("subscription")
    status = _STATUSES.get(word(found.get("status")))
    if status is None or ref(found) is None:
        raise unreadable("razorpay", "a subscription whose status is known")
    start = seconds(found.get("start_at"))
    if word(found.get("status")) == "authenticated" and start is not None and start > head.occurred_at:
        status = "trialing"
    kind = _KINDS.get(status, "subscription.updated")
    if status == "active" and head.event_type in ("subscription.activated", "subscription.resumed"):
        kind = "subscription.activated"
    facts = {
        "subscription_ref": ref(found),
        "customer_ref": ref(found.get("customer_id")),
        "plan_ref": ref(found.get("plan_id")),
        "period_start": seconds(found.get("current_start")),
        "period_end": seconds(found.get("current_end")),
    }
    events = []
    if head.event_type == "subscription.authenticated":
        events.append(
            head.event(
                "checkout.completed", f"checkout.completed:razorpay:{ref(found)}", checkout_ref=ref(found), **facts
            )
        )
    version = head.version(view.fetched, "subscription")
    events.append(
        head.event(
            kind,
            f"subscription.state:razorpay:{ref(found)}:{view.digest}",
            status=status,
            object_version=version,
            **facts,
        )
    )
    if head.event_type == "subscription.charged":
        events += _payment(view)
    if head.event_type == "subscription.pending" and view.told("payment").get("status") == "failed":
        events += _failed(view)
    return events


# -- payments --------------------------------------------------------------------------------------------------------------


def _payment(view: _View) -> list[FinanceEvent]:
    payment, links = view.now("payment"), view.links()
    if links["subscription_ref"] is None:
        return []  # money that Razorpay took for somebody else of the same account
    if payment.get("status") not in _TAKEN:
        return []
    amount, code = _amount(payment)
    events = [_invoice(view, links, amount, code)]
    facts = {**links, "amount_minor": amount, "currency": code}
    fee, home = whole(payment.get("fee")), currency(payment.get("base_currency")) or code
    if home == code:
        facts |= {"fee_minor": fee, "net_minor": None if fee is None else amount - fee}
    elif fee:
        events.append(
            view.head.event(
                "fee.charged", f"fee.charged:razorpay:{ref(payment)}", **{**links, "amount_minor": fee, "fee_minor": fee},
                currency=home,
            )
        )  # fmt: skip
    period = _period(view)
    events.insert(
        1, view.head.event("payment.succeeded", f"payment.succeeded:razorpay:{ref(payment)}", **facts, **period)
    )
    return events


def _period(view: _View) -> dict[str, datetime | None]:
    invoice, subscription = view.now("invoice"), view.now("subscription")
    return {
        "period_start": seconds(invoice.get("billing_start")) or seconds(subscription.get("current_start")),
        "period_end": seconds(invoice.get("billing_end")) or seconds(subscription.get("current_end")),
    }


def _invoice(view: _View, links: Mapping[str, Any], amount: int, code: str) -> FinanceEvent:
    """The invoice that a payment is for. Razorpay has one for each period; without it the payment stands for itself."""
    invoice = view.now("invoice")
    number = links["invoice_ref"] or links["payment_ref"]
    tax = whole(invoice.get("tax_amount")) or 0
    gross = whole(invoice.get("amount"))
    gross = amount if gross is None else gross
    period, plan = _period(view), ref(view.now("subscription").get("plan_id"))
    lines = _lines(rows(invoice, "line_items"), gross, tax, period)
    return view.head.event(
        "invoice.issued",
        f"invoice.issued:razorpay:{number}",
        **{**links, "invoice_ref": number, "payment_ref": None},
        **period,
        plan_ref=plan,
        amount_minor=gross,
        tax_minor=tax,
        net_minor=gross - tax,
        currency=code,
        invoice_number=word(invoice.get("invoice_number")) or None,
        lines=lines,
    )


def _lines(items: list[Any], gross: int, tax: int, period: Mapping[str, datetime | None]) -> tuple[Line, ...]:
    """The plan, and what was charged beside it: add-ons with their own tax, the plan with what is left."""
    start, end = period["period_start"], period["period_end"]
    added = []
    for one in items if len(items) > 1 else []:
        cost, own = whole(one.get("amount")), whole(one.get("tax_amount")) or 0
        if word(one.get("type")) == "addon" and cost is not None:
            about = str(one.get("name") or "Add-on")[:REF_CHARS]
            added.append(Line(about, 1, cost - own, cost - own, own, None, start, end, kind="overage"))
    plans = [one for one in items if word(one.get("type")) != "addon"]
    name = word(plans[0].get("name")) if len(plans) == 1 else ""
    tax -= sum(line.tax_minor for line in added)
    net = gross - tax - sum(line.net_minor + line.tax_minor for line in added)
    return Line(name or "Subscription", 1, net, net, tax, None, start, end), *added


def _failed(view: _View) -> list[FinanceEvent]:
    # An attempt that failed stays failed: what the event says of it is history, and its words are kept.
    told, links, subscription = view.told("payment"), view.links(), view.now("subscription")
    if links["subscription_ref"] is None:
        return []
    amount, code = _amount(told)
    again = seconds(subscription.get("charge_at")) if subscription.get("status") == "pending" else None
    events = [
        view.head.event(
            "payment.failed",
            f"payment.failed:razorpay:{ref(told)}",
            **{**links, "payment_ref": ref(told)},
            amount_minor=amount,
            currency=code,
            next_attempt_at=again,
            is_final_attempt=subscription.get("status") in ("halted", "cancelled", "completed", "expired"),
            attempt=whole(subscription.get("auth_attempts")) or None,
            failure_code=word(told.get("error_reason")) or word(told.get("error_code")) or None,
        )
    ]
    if links["invoice_ref"]:  # it is owed from now on
        events.insert(0, _invoice(view, links, amount, code))
    return events


def _issued(view: _View) -> list[FinanceEvent]:
    invoice, links = view.now("invoice"), view.links()
    if links["subscription_ref"] is None:
        return []
    amount, code = _amount(invoice)
    return [_invoice(view, links, amount, code)]


def _amount(found: Object) -> tuple[int, str]:
    amount, code = whole(found.get("amount")), currency(found.get("currency"))
    if amount is None or amount < 0 or code is None or ref(found) is None:
        raise unreadable("razorpay", "an amount")
    return amount, code


# -- refunds, disputes, settlements ----------------------------------------------------------------------------------------


def _refund(view: _View) -> list[FinanceEvent]:
    told = view.told("refund")
    # The event's name is what happened then; a refund that is processed may fail later.
    stage = {"refund.processed": "succeeded", "refund.failed": "failed"}.get(view.head.event_type)
    amount, code = _amount(told)
    kind = f"refund.{stage or 'pending'}"
    links = {**view.links(), "payment_ref": ref(told.get("payment_id")) or view.links()["payment_ref"]}
    return [
        view.head.event(
            kind, f"{kind}:razorpay:{ref(told)}", refund_ref=ref(told), status=stage, amount_minor=amount, currency=code, **links
        )
    ]  # fmt: skip


_DISPUTES: Final[Mapping[str, str]] = {"created": "open", "won": "won", "closed": "won", "lost": "lost"}


def _dispute(view: _View) -> list[FinanceEvent]:
    told = view.told("payment.dispute") or view.told("dispute")
    status = _DISPUTES[view.head.event_type.rpartition(".")[2]]
    # One that was lost is closed, too.
    if status == "won" and view.now("dispute").get("status") == "lost":
        status = "lost"
    amount, code = _amount(told)
    kind = f"dispute.{'opened' if status == 'open' else status}"
    links = {**view.links(), "payment_ref": ref(told.get("payment_id")) or view.links()["payment_ref"]}
    return [
        view.head.event(
            kind, f"{kind}:razorpay:{ref(told)}", dispute_ref=ref(told), status=status, amount_minor=amount, currency=code,
            failure_code=word(told.get("reason_code")) or None, **links,
        )
    ]  # fmt: skip


def _settlement(view: _View) -> list[FinanceEvent]:
    told = view.told("settlement")
    amount, code = whole(told.get("amount")), currency(told.get("currency")) or _HOME
    if amount is None or amount < 0 or ref(told) is None:
        raise unreadable("razorpay", "an amount of the settlement")
    return [
        view.head.event(
            "payout.paid", f"payout.paid:razorpay:{ref(told)}", payout_ref=ref(told), amount_minor=amount, currency=code
        )
    ]  # fmt: skip


_HANDLERS: Final[Mapping[str, Callable[[_View], list[FinanceEvent]]]] = {
    **{
        f"subscription.{stage}": _subscription
        for stage in (
            "authenticated", "activated", "charged", "updated", "pending", "halted", "paused", "resumed", "cancelled",
            "completed",
        )
    },
    "payment.captured": _payment,
    "payment.failed": _failed,
    "invoice.issued": _issued,
    "invoice.paid": _payment,
    **{f"refund.{stage}": _refund for stage in ("created", "processed", "failed")},
    **{f"payment.dispute.{stage}": _dispute for stage in _DISPUTES},
    "settlement.processed": _settlement,
}  # fmt: skip
