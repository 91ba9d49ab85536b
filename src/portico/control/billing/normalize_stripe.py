"""Stripe's events (https://docs.stripe.com/api/events), in the shapes before and after the API version 2025-03-31 (basil).

| fact | since basil | before |
|---|---|---|
| an invoice's subscription | `parent.subscription_details.subscription` | `subscription` |
| a subscription's period | `items.data[].current_period_*` | `current_period_*` |
| an invoice's tax | `total_taxes[].amount` | `tax`, `total_tax_amounts[].amount` |
| an invoice's payment | `payments.data[].payment` (fetched) | `payment_intent`, `charge` |
| a line's price, tax, proration | `pricing`, `taxes`, `parent.…_details` | `price`, `tax_amounts`, `proration` |

The shape is that of the endpoint's API version, not of the object's age, so each field is looked for in both places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from portico.control.billing import refund_words
from portico.control.billing.foreign import REF_CHARS, currency, part, ref, rows, seconds, whole, word
from portico.control.billing.normalize_event import Head, unreadable
from portico.control.billing.provider import Fetched, Origin
from portico.control.billing.stripe_units import iso
from portico.control.finance.events import FinanceEvent, Line, LineKind
from portico.errors import Problem
from portico.kit import money

_STATUSES: Final[Mapping[str, str]] = {
    "incomplete": "pending",
    "incomplete_expired": "expired",
    "trialing": "trialing",
    "active": "active",
    "past_due": "past_due",
    "unpaid": "suspended",
    "canceled": "canceled",
    "paused": "paused",
}
_KINDS: Final[Mapping[str, str]] = {
    "past_due": "subscription.past_due",
    "suspended": "subscription.suspended",
    "paused": "subscription.paused",
    "canceled": "subscription.canceled",
    "expired": "subscription.canceled",
}
Object = Mapping[str, Any]


def normalize(body: Object, fetched: Fetched | None, origin: Origin) -> list[FinanceEvent]:
    """What an event means; see ``normalize``."""
    kind, found = word(body.get("type")), part(body, "data", "object")
    handler = _HANDLERS.get(kind)
    if handler is None:
        return []
    event_id, created = ref(body.get("id")), seconds(body.get("created"))
    if event_id is None or created is None or ref(found) is None:
        raise unreadable("stripe", "id, time or object")
    head = Head("stripe", origin, event_id, kind, word(body.get("api_version")) or None, created)
    try:
        return handler(head, body, found, fetched or Fetched(created))
    except money.MoneyError as err:
        raise Problem("billing.event_unreadable", f"an event of stripe: {err}", provider="stripe") from None


def _money(found: Object, *names: str) -> tuple[list[int | None], str]:
    """The amounts of these names, and their currency."""
    code = currency(found.get("currency"))
    if code is None:
        raise unreadable("stripe", "a currency")
    return [None if (value := whole(found.get(name))) is None else iso(value, code) for name in names], code


# -- subscriptions ---------------------------------------------------------------------------------------------------------


def _subscription(head: Head, body: Object, told: Object, fetched: Fetched) -> list[FinanceEvent]:
    own = fetched.objects.get("subscription")
    now = own if own is not None and ref(own) == ref(told) else told
    status = _STATUSES.get(word(now.get("status")))
    if status is None:
        raise unreadable("stripe", "a status of the subscription that is known")
    kind = _KINDS.get(status, "subscription.updated")
    before = part(body, "data", "previous_attributes")
    if status in ("active", "trialing") and (head.event_type.endswith(".created") or "status" in before):
        kind = "subscription.activated"
    if head.event_type.endswith(".trial_will_end"):
        kind = "trial.ending"
    items = rows(now, "items")
    first = items[0] if items else {}
    ends = now.get("cancel_at_period_end") is True or whole(now.get("cancel_at")) is not None
    return [
        head.event(
            kind,
            f"{'trial.ending' if kind == 'trial.ending' else 'subscription.state'}:stripe:{ref(now)}:{head.event_id}",
            subscription_ref=ref(now),
            customer_ref=ref(now.get("customer")),
            status=status,
            plan_ref=ref(first.get("price")) or ref(first.get("plan")),
            cancel_at_period_end=ends and status != "canceled",
            period_start=seconds(first.get("current_period_start")) or seconds(now.get("current_period_start")),
            period_end=seconds(first.get("current_period_end")) or seconds(now.get("current_period_end")),
            failure_code=word(part(now, "cancellation_details").get("reason")) or None,
            object_version=head.version(fetched if now is own else None, "subscription"),
        )
    ]


# -- checkouts -------------------------------------------------------------------------------------------------------------


def _checkout(head: Head, body: Object, told: Object, fetched: Fetched) -> list[FinanceEvent]:
    if told.get("mode") != "subscription":
        return []
    kind = {
        "checkout.session.expired": "checkout.expired",
        "checkout.session.async_payment_failed": "checkout.failed",
    }.get(head.event_type, "checkout.completed")
    # Paid later by a bank: the checkout is done when the money is there, and that is another event.
    if kind == "checkout.completed" and told.get("payment_status") not in ("paid", "no_payment_required"):
        return []
    facts: dict[str, Any] = {}
    if told.get("currency") is not None:
        (facts["amount_minor"],), facts["currency"] = _money(told, "amount_total")
    return [
        head.event(
            kind,
            f"{kind}:stripe:{ref(told)}",
            checkout_ref=ref(told),
            customer_ref=ref(told.get("customer")),
            subscription_ref=ref(told.get("subscription")),
            invoice_ref=ref(told.get("invoice")),
            **facts,
        )
    ]


# -- invoices and payments -------------------------------------------------------------------------------------------------


def _invoice_facts(told: Object, fetched: Fetched) -> dict[str, Any]:
    (total, tax), code = _money(told, "total", "tax")
    for name in ("total_taxes", "total_tax_amounts"):
        if isinstance(told.get(name), list):
            tax = sum(iso(whole(one.get("amount")) or 0, code) for one in rows(told, name))
            break
    details = part(told, "parent", "subscription_details")
    # An event has ten lines at most; all of them are fetched when there are more.
    listed = rows(fetched.objects, "lines") or rows(told, "lines")
    lines = tuple(_line(one, code) for one in listed)
    newest = _newest(lines)
    priced = [ref(_price(one)) for one in listed if _line_kind(one) == "plan"]
    return {
        "customer_ref": ref(told.get("customer")),
        "subscription_ref": ref(details.get("subscription")) or ref(told.get("subscription")),
        "invoice_ref": ref(told),
        "plan_ref": priced[-1] if priced else None,
        "amount_minor": total,
        "tax_minor": tax or 0,
        "currency": code,
        "invoice_number": word(told.get("number")) or None,
        # Not the invoice's own period, which is the one before: what is paid in advance is the period of its lines.
        "period_start": newest.period_start if newest else seconds(told.get("period_start")),
        "period_end": newest.period_end if newest else seconds(told.get("period_end")),
        "lines": lines,
    }


def _newest(lines: Sequence[Line]) -> Line | None:
    """The line whose period ends last; a plan's, if there is one."""
    dated = [(line.period_end or line.period_start, line) for line in lines if line.period_start is not None]
    plans = [pair for pair in dated if pair[1].kind == "plan"]
    found = max(plans or dated, key=lambda pair: pair[0], default=None)
    return found[1] if found is not None else None


def _line(found: Object, code: str) -> Line:
    amount = iso(whole(found.get("amount")) or 0, code)
    taxes = rows(found, "taxes") if isinstance(found.get("taxes"), list) else rows(found, "tax_amounts")
    tax = sum(iso(whole(one.get("amount")) or 0, code) for one in taxes)
    inside = sum(
        iso(whole(one.get("amount")) or 0, code)
        for one in taxes
        if one.get("inclusive") is True or one.get("tax_behavior") == "inclusive"
    )
    off = sum(iso(whole(one.get("amount")) or 0, code) for one in rows(found, "discount_amounts"))
    net = amount - inside - off
    quantity = whole(found.get("quantity")) or 1
    unit = word(part(found, "pricing").get("unit_amount_decimal"))
    each = whole(part(found, "price").get("unit_amount"))
    if unit.lstrip("-").isdigit():
        each = int(unit)
    rates = [part(one, "tax_rate").get("percentage") for one in taxes]
    told = [rate for rate in rates if isinstance(rate, int | float) and not isinstance(rate, bool)]
    return Line(
        description=str(found.get("description") or "")[:REF_CHARS],
        quantity=quantity,
        unit_minor=iso(each, code) if each is not None else net // quantity,
        net_minor=net,
        tax_minor=tax,
        tax_rate_bp=round(sum(told) * 100) if told and len(told) == len(taxes) else None,
        period_start=seconds(part(found, "period").get("start")),
        period_end=seconds(part(found, "period").get("end")),
        kind=_line_kind(found),
    )


def _line_kind(found: Object) -> LineKind:
    item, added = part(found, "parent", "subscription_item_details"), part(found, "parent", "invoice_item_details")
    if found.get("proration") is True or item.get("proration") is True or added.get("proration") is True:
        return "proration"
    usage = part(found, "price", "recurring").get("usage_type") or part(found, "plan").get("usage_type")
    if usage == "metered" or added or found.get("type") == "invoiceitem":
        return "overage"
    return "plan"


def _price(found: Object) -> Any:
    return part(found, "pricing", "price_details").get("price") or found.get("price") or found.get("plan")


def _issued(head: Head, body: Object, told: Object, fetched: Fetched) -> list[FinanceEvent]:
    facts = _invoice_facts(told, fetched)
    total = facts["amount_minor"]
    if total is None:
        raise unreadable("stripe", "a total of the invoice")
    if total < 0:  # a credit, kept for the customer's next invoice: nobody owes anything for it
        return [
            head.event("invoice.credited", f"invoice.credited:stripe:{ref(told)}", **{**facts, "amount_minor": -total})
        ]
    facts["net_minor"] = total - facts["tax_minor"]
    events = [head.event("invoice.issued", f"invoice.issued:stripe:{ref(told)}", **facts)]
    if used := _credit_used(told, facts["currency"]):
        kept = {
            name: facts[name] for name in ("customer_ref", "subscription_ref", "invoice_ref", "plan_ref", "currency")
        }
        events.append(head.event("credit.applied", f"credit.applied:stripe:{ref(told)}", amount_minor=used, **kept))
    return events


def _closed(head: Head, body: Object, told: Object, fetched: Fetched) -> list[FinanceEvent]:
    kind = "invoice.voided" if head.event_type == "invoice.voided" else "invoice.uncollectible"
    facts = _invoice_facts(told, fetched)
    (left,), _ = _money(told, "amount_remaining")
    return [head.event(kind, f"{kind}:stripe:{ref(told)}", **{**facts, "amount_minor": left or 0})]


def _paid(head: Head, body: Object, told: Object, fetched: Fetched) -> list[FinanceEvent]:
    facts = _invoice_facts(told, fetched)
    (paid,), code = _money(told, "amount_paid")
    if paid is None:
        raise unreadable("stripe", "an amount that was paid")
    facts |= {"amount_minor": paid, "payment_ref": _payment(told, fetched), "lines": ()}
    events = []
    balance = fetched.objects.get("balance_transaction")
    if balance is not None and paid:
        (fee,), of = _money(balance, "fee")
        if of == code:
            facts |= {"fee_minor": fee, "net_minor": None if fee is None else paid - fee}
        elif fee:  # settled in another currency than it was paid in: so is the fee
            events.append(
                head.event(
                    "fee.charged", f"fee.charged:stripe:{ref(told)}", invoice_ref=ref(told), fee_minor=fee,
                    amount_minor=fee, currency=of, payment_ref=facts["payment_ref"], customer_ref=facts["customer_ref"],
                    subscription_ref=facts["subscription_ref"],
                )
            )  # fmt: skip
    return [head.event("payment.succeeded", f"payment.succeeded:stripe:{ref(told)}", **facts), *events]


def _credit_used(told: Object, code: str) -> int:
    """What of the customer's balance (below zero: to its credit) an invoice used up when it became final."""
    before, after = whole(told.get("starting_balance")) or 0, whole(told.get("ending_balance"))
    return iso(after - before, code) if before < 0 and after is not None and after > before else 0


def _payment(told: Object, fetched: Fetched) -> str | None:
    """What to give back when this invoice is refunded: a payment intent, or a charge."""
    own = fetched.objects.get("invoice", {})
    for invoice in (told, own if ref(own) == ref(told) else {}):
        paid = [one for one in rows(invoice, "payments") if one.get("status") == "paid"]
        for one in paid:
            payment = part(one, "payment")
            if found := ref(payment.get("payment_intent")) or ref(payment.get("charge")):
                return found
        if found := ref(invoice.get("payment_intent")) or ref(invoice.get("charge")):
            return found
    return None


def _failed(head: Head, body: Object, told: Object, fetched: Fetched) -> list[FinanceEvent]:
    facts = _invoice_facts(told, fetched)
    (left, due), _ = _money(told, "amount_remaining", "amount_due")
    attempt = whole(told.get("attempt_count")) or 0
    later = seconds(told.get("next_payment_attempt"))
    error = part(fetched.objects.get("payment"), "last_payment_error")
    kind = "payment.failed" if head.event_type == "invoice.payment_failed" else "payment.action_required"
    facts |= {
        "amount_minor": left if left is not None else due,
        "payment_ref": _payment(told, fetched),
        "attempt": attempt,
        "next_attempt_at": later,
        "is_final_attempt": later is None,
        "failure_code": word(error.get("decline_code")) or word(error.get("code")) or None,
        "lines": (),
    }
    return [head.event(kind, f"{kind}:stripe:{ref(told)}:{attempt}", **facts)]


# -- refunds, disputes, payouts --------------------------------------------------------------------------------------------


def _refund(head: Head, body: Object, told: Object, fetched: Fetched) -> list[FinanceEvent]:
    return [_one_refund(head, told, fetched)]


def _charge_refunded(head: Head, body: Object, told: Object, fetched: Fetched) -> list[FinanceEvent]:
    """Old endpoints hear of refunds by their charge alone. Each has the effect that its own event would have."""
    found = rows(told, "refunds") or rows(fetched.objects.get("refunds", {}), "data")
    return [_one_refund(head, one, fetched) for one in found if ref(one)]


def _one_refund(head: Head, told: Object, fetched: Fetched) -> FinanceEvent:
    found = refund_words.status_of("stripe", refund_words.STRIPE, word(told.get("status")))
    status, kind = None if found == "pending" else found, f"refund.{found}"
    (amount,), code = _money(told, "amount")
    return head.event(
        kind,
        f"{kind}:stripe:{ref(told)}",
        refund_ref=ref(told),
        status=status,
        amount_minor=amount,
        currency=code,
        failure_code=word(told.get("failure_reason")) or None,
        **_of_payment(told, fetched),
    )


def _of_payment(told: Object, fetched: Fetched) -> dict[str, Any]:
    """What a refund or a dispute is about, as far as it was fetched."""
    charge, invoice = fetched.objects.get("charge", {}), fetched.objects.get("invoice", {})
    details = part(invoice, "parent", "subscription_details")
    return {
        "payment_ref": ref(told.get("payment_intent")) or ref(told.get("charge")),
        "customer_ref": ref(charge.get("customer")) or ref(invoice.get("customer")),
        "invoice_ref": ref(invoice) or ref(charge.get("invoice")),
        "subscription_ref": ref(details.get("subscription")) or ref(invoice.get("subscription")),
    }


def _dispute(head: Head, body: Object, told: Object, fetched: Fetched) -> list[FinanceEvent]:
    status, stage = word(told.get("status")), head.event_type.rpartition(".")[2]
    (amount,), code = _money(told, "amount")
    facts = {
        "dispute_ref": ref(told), "amount_minor": amount, "currency": code,
        "failure_code": word(told.get("reason")) or None, **_of_payment(told, fetched),
    }  # fmt: skip
    if stage == "closed" and status in ("won", "lost"):
        return [head.event(f"dispute.{status}", f"dispute.{status}:stripe:{ref(told)}", status=status, **facts)]
    if stage == "funds_reinstated" and status == "won":
        return [head.event("dispute.won", f"dispute.won:stripe:{ref(told)}", status="won", **facts)]
    # An inquiry (`warning_…`) takes no money; when it becomes a dispute, money is withdrawn, and that is told. Before money has
    # moved nobody knows what Stripe keeps for it.
    own = fetched.objects.get("dispute", {})
    moved = rows(own if ref(own) == ref(told) else {}, "balance_transactions") or rows(told, "balance_transactions")
    if stage != "funds_withdrawn" and not (stage == "created" and moved and not status.startswith("warning_")):
        return []
    fees = dict[str, int]()
    for one in moved:
        each, of = whole(one.get("fee")), currency(one.get("currency"))
        if each and each > 0 and of is not None:
            fees[of] = fees.get(of, 0) + iso(each, of)
    fee = fees.pop(code, None)
    opened = head.event("dispute.opened", f"dispute.opened:stripe:{ref(told)}", status="open", fee_minor=fee, **facts)
    links = {name: facts[name] for name in ("customer_ref", "subscription_ref", "invoice_ref")}
    return [opened] + [
        head.event(
            "fee.charged", f"fee.charged:stripe:{ref(told)}:{of}", amount_minor=each, fee_minor=each, currency=of, **links
        )
        for of, each in sorted(fees.items())
    ]  # fmt: skip


def _payout(head: Head, body: Object, told: Object, fetched: Fetched) -> list[FinanceEvent]:
    (amount,), code = _money(told, "amount")
    if amount is None:
        raise unreadable("stripe", "an amount of the payout")
    kind = {"paid": "payout.paid", "failed": "payout.failed", "canceled": "payout.failed"}.get(
        head.event_type.rpartition(".")[2], "payout.reconciled"
    )
    if amount < 0:  # a balance below zero is collected from the bank account
        kind = kind.replace("payout.", "payout.debit_")
    return [
        head.event(
            kind, f"{kind}:stripe:{ref(told)}", payout_ref=ref(told), amount_minor=abs(amount), currency=code,
            failure_code=word(told.get("failure_code")) or None,
        )
    ]  # fmt: skip


_Handler = Callable[[Head, Object, Object, Fetched], list[FinanceEvent]]
#: Every event that means something; `invoice.payment_succeeded` is left out, since `invoice.paid` comes with it and without it.
_HANDLERS: Final[Mapping[str, _Handler]] = {
    **{
        f"customer.subscription.{stage}": _subscription
        for stage in ("created", "updated", "deleted", "paused", "resumed", "trial_will_end")
    },
    **{
        f"checkout.session.{stage}": _checkout
        for stage in ("completed", "expired", "async_payment_succeeded", "async_payment_failed")
    },
    "invoice.finalized": _issued,
    "invoice.paid": _paid,
    "invoice.payment_failed": _failed,
    "invoice.payment_action_required": _failed,
    "invoice.voided": _closed,
    "invoice.marked_uncollectible": _closed,
    **{f"refund.{stage}": _refund for stage in ("created", "updated", "failed")},
    "charge.refunded": _charge_refunded,
    "charge.refund.updated": _refund,
    **{
        f"charge.dispute.{stage}": _dispute
        for stage in ("created", "updated", "closed", "funds_withdrawn", "funds_reinstated")
    },
    **{f"payout.{stage}": _payout for stage in ("paid", "failed", "canceled", "reconciliation_completed")},
}
