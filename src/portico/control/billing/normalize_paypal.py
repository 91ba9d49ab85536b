"""PayPal's events (https://developer.paypal.com/api/rest/webhooks/event-names/).

PayPal signs a CRC of 32 bits, so somebody who has seen one good delivery can make another body that fits its signature. Nothing
but ids is taken from a body: amounts, times, states and who paid come from the objects that were fetched by them, and an event
whose object PayPal does not have is refused (``billing.event_unconfirmed``). A time that an object does not have is the body's.

| what | how it is known |
|---|---|
| a payment failed, PayPal tries again | `ACTIVE` with `billing_info.failed_payments_count` above 0 |
| suspended for failed payments, or paused by somebody | `SUSPENDED`, with failed payments or without |
| a period | from the last payment to `billing_info.next_billing_time` |

A sale is its own invoice. A dispute is known by its sale, as a reversal is: money of a sale is lost once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

from portico.control.billing import refund_words
from portico.control.billing.foreign import moment, part, ref, rows, whole, word
from portico.control.billing.normalize_event import Head, unconfirmed, unreadable
from portico.control.billing.provider import Fetched, Origin
from portico.control.finance.events import FinanceEvent, Line
from portico.errors import Problem
from portico.kit import money

_STATUSES: Final[Mapping[str, str]] = {
    "APPROVAL_PENDING": "pending",
    "APPROVED": "pending",
    "ACTIVE": "active",
    "SUSPENDED": "suspended",
    "CANCELLED": "canceled",
    "EXPIRED": "completed",
}
_KINDS: Final[Mapping[str, str]] = {
    "past_due": "subscription.past_due",
    "suspended": "subscription.suspended",
    "paused": "subscription.paused",
    "canceled": "subscription.canceled",
    "completed": "subscription.completed",
}
_BEGUN: Final = frozenset({"BILLING.SUBSCRIPTION.ACTIVATED", "BILLING.SUBSCRIPTION.RE-ACTIVATED"})
#: States of a sale that brought money, whatever became of it later.
_TAKEN: Final = frozenset({"completed", "partially_refunded", "refunded", "reversed"})
_LOST: Final = frozenset({"RESOLVED_BUYER_FAVOUR", "ACCEPTED"})
#: Why PayPal takes a sale back; it says so where it has no state for that.
_TAKEN_BACK: Final = frozenset({"CHARGEBACK", "CHARGEBACK_SETTLEMENT", "BUYER_COMPLAINT", "GUARANTEE"})

Object = Mapping[str, Any]


def normalize(body: Object, fetched: Fetched | None, origin: Origin) -> list[FinanceEvent]:
    """What an event means; see ``normalize``."""
    name = word(body.get("event_type"))
    handler = _HANDLERS.get(name)
    if handler is None:
        return []
    event_id, created = ref(body.get("id")), moment(body.get("create_time"))
    if event_id is None or created is None:
        raise unreadable("paypal", "id or time")
    head = Head("paypal", origin, event_id, name, word(body.get("resource_version")) or None, created)
    try:
        return handler(head, fetched or Fetched(created))
    except (money.MoneyError, KeyError) as err:
        raise Problem("billing.event_unreadable", f"an event of paypal: {err}", provider="paypal") from None


def _have(fetched: Fetched, kind: str) -> Object:
    found = fetched.objects.get(kind)
    if found is None:
        raise unconfirmed("paypal", f"the {kind}")
    return found


def _amount(found: Object) -> tuple[int, str]:
    """An amount as PayPal's old and new APIs have it; raises ``MoneyError`` or ``KeyError``."""
    code = money.currency_code(word(found.get("currency")) or word(found["currency_code"]))
    return money.minor(word(found.get("total")) or word(found["value"]), code), code


# -- subscriptions ---------------------------------------------------------------------------------------------------------


def _status(found: Object) -> str:
    status = _STATUSES.get(word(found.get("status")))
    if status is None:
        raise unreadable("paypal", "a status of the subscription that is known")
    info = part(found, "billing_info")
    failed = (whole(info.get("failed_payments_count")) or 0) > 0
    if status == "suspended":
        return "suspended" if failed else "paused"
    if status == "active" and failed:
        return "past_due"
    if status == "active":
        done = {
            word(one.get("tenure_type")): whole(one.get("cycles_completed")) or 0
            for one in rows(info, "cycle_executions")
        }
        return "trialing" if "TRIAL" in done and not done.get("REGULAR") else "active"
    return status


def _state(head: Head, fetched: Fetched) -> FinanceEvent:
    found = _have(fetched, "subscription")
    status = _status(found)
    kind = _KINDS.get(status, "subscription.updated")
    if status in ("active", "trialing") and head.event_type in _BEGUN:
        kind = "subscription.activated"
    start, end = _period(found)
    return head.event(
        kind,
        f"subscription.state:paypal:{ref(found)}:{head.event_id}",
        subscription_ref=ref(found),
        customer_ref=ref(part(found, "subscriber").get("payer_id")),
        status=status,
        occurred_at=moment(found.get("status_update_time")) or head.occurred_at,
        plan_ref=ref(found.get("plan_id")),
        period_start=start,
        period_end=end,
        object_version=head.version(fetched, "subscription"),
    )


def _period(found: Object) -> tuple[datetime | None, datetime | None]:
    info = part(found, "billing_info")
    start = moment(part(info, "last_payment").get("time")) or moment(found.get("start_time"))
    end = moment(info.get("next_billing_time"))
    return start, end if end is not None and (start is None or end > start) else None


def _subscription(head: Head, fetched: Fetched) -> list[FinanceEvent]:
    state = _state(head, fetched)
    events = [state]
    if head.event_type in ("BILLING.SUBSCRIPTION.CREATED", *_BEGUN) and state.status != "pending":
        done = f"checkout.completed:paypal:{state.subscription_ref}"
        events.insert(
            0,
            head.event(
                "checkout.completed", done, checkout_ref=state.subscription_ref, subscription_ref=state.subscription_ref,
                customer_ref=state.customer_ref,
            ),
        )  # fmt: skip
    if head.event_type == "BILLING.SUBSCRIPTION.PAYMENT.FAILED":
        events += _failed(head, fetched, state)
    return events


def _failed(head: Head, fetched: Fetched, state: FinanceEvent) -> list[FinanceEvent]:
    info = part(_have(fetched, "subscription"), "billing_info")
    failure = part(info, "last_failed_payment")
    at = moment(failure.get("time"))
    if at is None:
        return []  # it was made good meanwhile
    amount, code = _amount(part(failure, "amount"))
    again = moment(failure.get("next_payment_retry_time"))
    return [
        head.event(
            "payment.failed",
            f"payment.failed:paypal:{state.subscription_ref}:{int(at.timestamp())}",
            subscription_ref=state.subscription_ref,
            customer_ref=state.customer_ref,
            plan_ref=state.plan_ref,
            occurred_at=at,
            amount_minor=amount,
            currency=code,
            attempt=whole(info.get("failed_payments_count")) or None,
            next_attempt_at=again,
            is_final_attempt=again is None or state.status in ("suspended", "canceled", "completed"),
            failure_code=word(failure.get("reason_code")) or None,
        )
    ]


# -- sales -----------------------------------------------------------------------------------------------------------------


def _links(fetched: Fetched) -> dict[str, Any]:
    sale, subscription = fetched.objects.get("payment", {}), fetched.objects.get("subscription", {})
    return {
        "subscription_ref": ref(sale.get("billing_agreement_id")) or ref(subscription),
        "customer_ref": ref(part(subscription, "subscriber").get("payer_id")),
        "invoice_ref": ref(sale),
        "payment_ref": ref(sale),
    }


def _sale_state(sale: Object) -> str:
    return (word(sale.get("state")) or word(sale.get("status"))).lower()


def _sale(head: Head, fetched: Fetched) -> list[FinanceEvent]:
    sale = _have(fetched, "payment")
    if ref(sale.get("billing_agreement_id")) is None:
        return []  # money that PayPal took for something else of the same account
    if _sale_state(sale) not in _TAKEN:
        raise unconfirmed("paypal", "that the sale is completed")
    amount, code = _amount(part(sale, "amount"))
    fee_of = part(sale, "transaction_fee") or part(sale, "seller_receivable_breakdown", "paypal_fee")
    fee, of = _amount(fee_of) if fee_of else (None, code)
    subscription = fetched.objects.get("subscription", {})
    at = moment(sale.get("create_time")) or head.occurred_at
    last, end = _period(subscription)
    # Only of the last payment is it known until when it pays.
    own = last is not None and abs((last - at).total_seconds()) < 86_400
    period = {"period_start": at, "period_end": end if own or last is None else None}
    links, plan = _links(fetched), ref(subscription.get("plan_id"))
    line = Line("Subscription", 1, amount, amount, 0, None, period["period_start"], period["period_end"])
    events = [
        head.event(
            "invoice.issued", f"invoice.issued:paypal:{ref(sale)}", **{**links, "payment_ref": None}, **period, plan_ref=plan,
            occurred_at=at, amount_minor=amount, tax_minor=0, net_minor=amount, currency=code, lines=(line,),
        ),
        head.event(
            "payment.succeeded", f"payment.succeeded:paypal:{ref(sale)}", **links, **period, plan_ref=plan, occurred_at=at,
            amount_minor=amount, currency=code, fee_minor=fee if of == code else None,
            net_minor=amount - fee if fee is not None and of == code else None,
        ),
    ]  # fmt: skip
    if fee and of != code:
        events.append(
            head.event(
                "fee.charged", f"fee.charged:paypal:{ref(sale)}", **links, amount_minor=fee, fee_minor=fee, currency=of
            )
        )
    return events + ([_state(head, fetched)] if subscription else [])


def _refunded(head: Head, fetched: Fetched) -> list[FinanceEvent]:
    refund = _have(fetched, "refund")
    found = refund_words.status_of("paypal", refund_words.PAYPAL, _sale_state(refund))
    status = None if found == "pending" else found
    amount, code = _amount(part(refund, "amount"))
    links = _links(fetched)
    links["payment_ref"] = links["payment_ref"] or ref(refund.get("sale_id"))
    links["invoice_ref"] = links["payment_ref"]
    kind = f"refund.{found}"
    return [
        head.event(
            kind, f"{kind}:paypal:{ref(refund)}", refund_ref=ref(refund), status=status, amount_minor=abs(amount),
            currency=code, occurred_at=moment(refund.get("create_time")) or head.occurred_at, **links,
        )
    ]  # fmt: skip


def _reversed(head: Head, fetched: Fetched) -> list[FinanceEvent]:
    sale = _have(fetched, "payment")
    dispute = fetched.objects.get("dispute", {})
    # A sale that was given back is none that was taken back, whatever a body says that only a checksum vouches for.
    if not (_sale_state(sale) == "reversed" or word(sale.get("reason_code")) in _TAKEN_BACK or _lost(dispute)):
        raise unconfirmed("paypal", "that the sale is reversed")
    # Without a case it is the bank's doing, and all of the sale.
    amount, code = _amount(part(dispute, "dispute_amount") or part(sale, "amount"))
    facts = {**_links(fetched), "dispute_ref": ref(sale), "amount_minor": amount, "currency": code}
    ended = moment(dispute.get("update_time")) or moment(sale.get("update_time")) or head.occurred_at
    since = moment(dispute.get("create_time")) or ended
    return [
        head.event("dispute.opened", f"dispute.opened:paypal:{ref(sale)}", status="open", occurred_at=since, **facts),
        head.event("dispute.lost", f"dispute.lost:paypal:{ref(sale)}", status="lost", occurred_at=ended, **facts),
    ]


def _lost(dispute: Object) -> bool:
    return word(part(dispute, "dispute_outcome").get("outcome_code")) in _LOST


def _dispute(head: Head, fetched: Fetched) -> list[FinanceEvent]:
    found, sale = _have(fetched, "dispute"), fetched.objects.get("payment", {})
    if ref(sale.get("billing_agreement_id")) is None:
        return []
    amount, code = _amount(part(found, "dispute_amount"))
    facts = {
        **_links(fetched), "dispute_ref": ref(sale), "amount_minor": amount, "currency": code,
        "failure_code": word(found.get("reason")) or None,
    }  # fmt: skip
    since, ended = (moment(found.get(name)) or head.occurred_at for name in ("create_time", "update_time"))
    events = [
        head.event("dispute.opened", f"dispute.opened:paypal:{ref(sale)}", status="open", occurred_at=since, **facts)
    ]
    if word(found.get("status")) == "RESOLVED":
        # A refund ended it: the refund is told of by itself, and what was held is free.
        status = "lost" if _lost(found) and _sale_state(sale) != "refunded" else "won"
        effect = f"dispute.{status}:paypal:{ref(sale)}"
        events.append(head.event(f"dispute.{status}", effect, status=status, occurred_at=ended, **facts))
    return events


_HANDLERS: Final[Mapping[str, Callable[[Head, Fetched], list[FinanceEvent]]]] = {
    **{
        f"BILLING.SUBSCRIPTION.{stage}": _subscription
        for stage in (
            "CREATED", "ACTIVATED", "RE-ACTIVATED", "UPDATED", "SUSPENDED", "CANCELLED", "EXPIRED", "PAYMENT.FAILED",
        )
    },
    "PAYMENT.SALE.COMPLETED": _sale,
    "PAYMENT.SALE.REFUNDED": _refunded,
    "PAYMENT.SALE.REVERSED": _reversed,
    **{f"CUSTOMER.DISPUTE.{stage}": _dispute for stage in ("CREATED", "UPDATED", "RESOLVED")},
}  # fmt: skip
