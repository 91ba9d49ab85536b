"""Stripe's objects as its API returns them, in the shape since 2025-03-31 ("basil") and in the one before.

Kept here is the newer shape; :func:`shaped` turns it into the older one for callers (``Stripe-Version``) and webhook
endpoints of an older
version: periods on the subscription instead of its items, ``invoice.subscription``, ``.charge``,
``.payment_intent``, ``.tax``, ``charge.invoice``.
"""

from __future__ import annotations

import copy
from typing import Any, Final

from portico.simulators.billing_world import Doc, Offer, fixed, public, token

#: The first version of the newer shape, and what a caller gets who names none.
BASIL: Final = "2025-03-31"
#: Lines that an invoice has in itself.
_LINES: Final = 10
CURRENT: Final = "2026-01-28.clover"
#: Kind of object → beginning of its ids, and how many random characters follow.
ID_FORMS: Final = {
    "customers": ("cus_", 14), "subscriptions": ("sub_1", 23), "items": ("si_", 14), "invoices": ("in_1", 23),
    "lines": ("il_1", 23), "invoice_payments": ("inpay_1", 23), "payment_intents": ("pi_3", 23), "charges": ("ch_3", 23),
    "refunds": ("re_3", 23), "disputes": ("du_1", 23), "payouts": ("po_1", 23), "balance_transactions": ("txn_3", 23),
    "events": ("evt_1", 23), "sessions": ("cs_test_a1", 56), "payment_methods": ("pm_1", 23), "portals": ("bps_1", 23),
    "invoiceitems": ("ii_1", 23),
    "products": ("prod_", 14), "prices": ("price_1", 23), "requests": ("req_", 14), "schedules": ("sub_sched_1", 23),
}  # fmt: skip


def new_id(kind: str) -> str:
    """An id of this kind of object."""
    prefix, length = ID_FORMS[kind]
    return prefix + token(length)


def product_of(offer: Offer, created: int) -> Doc:
    """The product of a plan; its id is the same in every run."""
    return {
        "id": "prod_" + fixed(14, "product", offer.plan), "object": "product", "active": True, "created": created,
        "description": None, "images": [], "livemode": False, "metadata": {"plan": offer.plan}, "name": offer.name,
        "type": "service", "updated": created, "url": None,
    }  # fmt: skip


def price_of(offer: Offer, created: int) -> Doc:
    """The price of a plan."""
    recurring = {
        "interval": offer.interval,
        "interval_count": 1,
        "meter": None,
        "trial_period_days": None,
        "usage_type": "licensed",
    }
    return {
        "id": price_id(offer), "object": "price", "active": True, "billing_scheme": "per_unit", "created": created,
        "currency": offer.currency.lower(), "livemode": False, "lookup_key": offer.plan, "metadata": {"plan": offer.plan},
        "nickname": offer.name, "product": "prod_" + fixed(14, "product", offer.plan), "recurring": recurring,
        "tax_behavior": "exclusive", "tiers_mode": None, "transform_quantity": None, "type": "recurring",
        "unit_amount": offer.amount_minor, "unit_amount_decimal": str(offer.amount_minor),
    }  # fmt: skip


def price_id(offer: Offer) -> str:
    """The id of a plan's price; the same in every run."""
    return "price_1" + fixed(23, "price", offer.plan, offer.currency, str(offer.amount_minor), offer.interval)


def item_of(subscription: str, price: Doc, quantity: int, start: int, end: int) -> Doc:
    """A subscription's item."""
    return {
        "id": new_id("items"), "object": "subscription_item", "created": start, "current_period_end": end,
        "current_period_start": start, "discounts": [], "metadata": {}, "price": copy.deepcopy(price), "plan": plan_of(price),
        "quantity": quantity, "subscription": subscription, "tax_rates": [],
    }  # fmt: skip


def plan_of(price: Doc) -> Doc:
    """The older view of a price."""
    recurring = price["recurring"]
    return {
        "id": price["id"], "object": "plan", "active": True, "amount": price["unit_amount"], "currency": price["currency"],
        "interval": recurring["interval"], "interval_count": recurring["interval_count"], "livemode": False,
        "metadata": price["metadata"], "nickname": price["nickname"], "product": price["product"], "usage_type": "licensed",
    }  # fmt: skip


def line_of(
    invoice: str,
    subscription: Doc,
    item: Doc,
    price: Doc,
    amount: int,
    tax: int,
    period: tuple[int, int],
    text: str,
    proration: bool,
) -> Doc:
    """An invoice's line."""
    details = {
        "invoice_item": None, "proration": proration, "proration_details": {"credited_items": None},
        "subscription": subscription["id"], "subscription_item": item["id"],
    }  # fmt: skip
    taxes = [] if not tax else [tax_row(amount, tax, subscription.get("_tax_bp", 0))]
    return {
        "id": new_id("lines"), "object": "line_item", "amount": amount, "currency": subscription["currency"],
        "description": text, "discount_amounts": [], "discountable": not proration, "discounts": [], "invoice": invoice,
        "livemode": False, "metadata": {}, "parent": {"invoice_item_details": None, "subscription_item_details": details,
        "type": "subscription_item_details"}, "period": {"start": period[0], "end": period[1]}, "pretax_credit_amounts": [],
        "pricing": {"price_details": {"price": price["id"], "product": price["product"]}, "type": "price_details",
        "unit_amount_decimal": price["unit_amount_decimal"]}, "quantity": item["quantity"], "subtotal": amount, "taxes": taxes,
        "_price": copy.deepcopy(price),
    }  # fmt: skip


def invoice_item(customer: Doc, params: Doc, now: int) -> Doc:
    """Something that is charged beside the plan."""
    period, sub = params.get("period") or {}, params.get("subscription")
    parent = {"subscription_details": {"subscription": sub, "subscription_item": None}, "type": "subscription_details"}
    return {
        "id": new_id("invoiceitems"), "object": "invoiceitem", "amount": int(params["amount"]),
        "currency": str(params["currency"]).lower(), "customer": customer["id"], "date": now,
        "description": params.get("description"), "discountable": True, "discounts": [], "invoice": params.get("invoice"),
        "livemode": False, "metadata": params.get("metadata") or {}, "parent": parent if sub else None,
        "period": {"start": int(period.get("start", now)), "end": int(period.get("end", now))}, "pricing": None,
        "proration": False, "quantity": 1, "tax_rates": [], "test_clock": None, "_subscription": sub,
    }  # fmt: skip


def item_line(invoice: str, item: Doc, tax: int, rate_bp: int) -> Doc:
    """An invoice's line for an invoice item."""
    details = {
        "invoice_item": item["id"], "proration": False, "proration_details": {"credited_items": None},
        "subscription": item["_subscription"],
    }  # fmt: skip
    return {
        "id": new_id("lines"), "object": "line_item", "amount": item["amount"], "currency": item["currency"],
        "description": item["description"], "discount_amounts": [], "discountable": True, "discounts": [], "invoice": invoice,
        "livemode": False, "metadata": item["metadata"], "parent": {"invoice_item_details": details,
        "subscription_item_details": None, "type": "invoice_item_details"}, "period": item["period"],
        "pretax_credit_amounts": [], "pricing": None, "quantity": 1, "subtotal": item["amount"],
        "taxes": [tax_row(item["amount"], tax, rate_bp)] if tax else [], "_price": None,
    }  # fmt: skip


def tax_row(base: int, tax: int, rate_bp: int) -> Doc:
    """A row of an invoice's taxes."""
    rate = "txr_1" + fixed(23, "rate", str(rate_bp))
    return {
        "amount": tax, "tax_behavior": "exclusive", "tax_rate_details": {"tax_rate": rate}, "taxability_reason": "standard_rated",
        "taxable_amount": base, "type": "tax_rate_details",
    }  # fmt: skip


def listed(url: str, data: list[Doc], more: bool = False) -> Doc:
    """Stripe's list."""
    return {"object": "list", "data": data, "has_more": more, "url": url}


def error(kind: str, message: str, code: str | None = None, param: str | None = None, **more: object) -> Doc:
    """Stripe's error body."""
    found: Doc = {"type": kind, "message": message}
    if code:
        found |= {"code": code, "doc_url": f"https://stripe.com/docs/error-codes/{code.replace('_', '-')}"}
    if param:
        found["param"] = param
    return {"error": found | more | {"request_log_url": None}}


def shaped(doc: Doc, version: str) -> Doc:
    """A copy of an object as this version of the API has it."""
    found: Doc = public(doc) if version[:10] >= BASIL else _older(doc)
    if found.get("object") == "invoice" and (lines := found.get("lines")):  # the rest is at /v1/invoices/{id}/lines
        lines["data"], lines["has_more"] = lines["data"][:_LINES], len(lines["data"]) > _LINES
    return found


def _older(value: Any) -> Any:
    if isinstance(value, list):
        return [_older(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    made = {key: _older(inner) for key, inner in value.items() if not key.startswith("_")}
    change = _CHANGES.get(str(value.get("object", "")))
    if change is not None:
        change(made, value)
    return made


def _subscription(made: Doc, doc: Doc) -> None:
    first = doc["items"]["data"][0]
    made |= {"current_period_start": first["current_period_start"], "current_period_end": first["current_period_end"]}
    made["plan"], made["quantity"] = plan_of(first["price"]), first["quantity"]


def _item(made: Doc, _: Doc) -> None:
    del made["current_period_start"], made["current_period_end"]


def _invoice(made: Doc, doc: Doc) -> None:
    details = (doc.get("parent") or {}).get("subscription_details") or {}
    del made["parent"], made["total_taxes"]
    made.pop("payments", None)
    tax = sum(row["amount"] for row in doc["total_taxes"])
    made |= {
        "subscription": details.get("subscription"), "subscription_details": {"metadata": details.get("metadata", {})},
        "paid": doc["status"] == "paid", "charge": doc.get("_charge"), "payment_intent": doc.get("_payment_intent"),
        "tax": tax or None, "total_tax_amounts": [_tax(row) for row in doc["total_taxes"]], "paid_out_of_band": False,
    }  # fmt: skip


def _tax(row: Doc) -> Doc:
    return {
        "amount": row["amount"], "inclusive": False, "tax_rate": row["tax_rate_details"]["tax_rate"],
        "taxability_reason": row["taxability_reason"], "taxable_amount": row["taxable_amount"],
    }  # fmt: skip


def _line(made: Doc, doc: Doc) -> None:
    details = doc["parent"]["subscription_item_details"]
    added = doc["parent"]["invoice_item_details"]
    for name in ("parent", "pricing", "taxes", "subtotal"):
        made.pop(name, None)
    if details is None:
        made |= {
            "price": None, "plan": None, "proration": False, "type": "invoiceitem", "subscription": added["subscription"],
            "invoice_item": added["invoice_item"], "tax_amounts": [_tax(row) for row in doc["taxes"]],
        }  # fmt: skip
        return
    made |= {
        "price": doc["_price"], "plan": plan_of(doc["_price"]), "proration": details["proration"], "type": "subscription",
        "subscription": details["subscription"], "subscription_item": details["subscription_item"],
        "tax_amounts": [_tax(row) for row in doc["taxes"]],
    }  # fmt: skip


def _charge(made: Doc, doc: Doc) -> None:
    made["invoice"] = doc.get("_invoice")


_CHANGES: Final = {
    "subscription": _subscription,
    "subscription_item": _item,
    "invoice": _invoice,
    "line_item": _line,
    "charge": _charge,
    "payment_intent": _charge,
}
