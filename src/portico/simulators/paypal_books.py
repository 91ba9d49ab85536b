"""What PayPal does with subscriptions and money, in the simulator: every change, with the events that it makes.

    APPROVAL_PENDING ─approved─► ACTIVE ─period over─► a sale; or a failed payment, tried again after five days, twice;
    then SUSPENDED. ACTIVE ⇄ SUSPENDED, either → CANCELLED; EXPIRED after the last cycle. There is no end with the period.

Amounts are decimal strings, by the currency's exponent. What is the simulator's own (minor units, dates) begins with ``_``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from typing import Final

from portico.simulators.billing_world import DAY, Doc, Offer, World, after, exponent, fixed, iso, per_mille, token

#: Days between attempts at a payment that failed, and how many there are in a cycle after the first.
RETRY_DAYS: Final = 5
RETRIES: Final = 2
_UPPER: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_UNITS: Final = {"day": "DAY", "month": "MONTH", "year": "YEAR"}

#: Event type, kind and version of the resource, summary, resource.
Emit = Callable[[str, str, str, Doc], None]


def new_id(prefix: str, length: int) -> str:
    """``I-BW452GLLEP1G``."""
    return prefix + token(length, _UPPER)


def plan_id(offer: Offer) -> str:
    """The id of a plan; the same in every run."""
    return "P-" + fixed(
        24, "plan", offer.plan, offer.currency, str(offer.amount_minor), offer.interval, alphabet=_UPPER
    )


def plan_of(offer: Offer, created: int) -> Doc:
    """A plan of the catalogue."""
    price = {
        "version": 1,
        "fixed_price": money(offer.amount_minor, offer.currency),
        "create_time": iso(created),
        "update_time": iso(created),
    }
    cycle = {
        "pricing_scheme": price, "frequency": {"interval_unit": _UNITS[offer.interval], "interval_count": 1},
        "tenure_type": "REGULAR", "sequence": 1, "total_cycles": 0,
    }  # fmt: skip
    return {
        "id": plan_id(offer), "product_id": "PROD-" + fixed(17, "product", offer.plan, alphabet=_UPPER), "name": offer.name,
        "status": "ACTIVE", "description": offer.name, "usage_type": "LICENSED", "billing_cycles": [cycle],
        "payment_preferences": {"service_type": "PREPAID", "auto_bill_outstanding": True, "setup_fee_failure_action": "CONTINUE",
        "payment_failure_threshold": RETRIES + 1}, "quantity_supported": True, "create_time": iso(created),
        "update_time": iso(created),
        "_amount": offer.amount_minor, "_currency": offer.currency, "_interval": offer.interval,
    }  # fmt: skip


def decimal(minor: int, currency: str) -> str:
    """``19.00``; ``1900`` in yen."""
    digits = exponent(currency)
    return f"{Decimal(minor).scaleb(-digits):.{digits}f}"


def minor_of(text: str, currency: str) -> int:
    """The other way; raises ``ValueError`` for more digits than the currency has."""
    exact = Decimal(text).scaleb(exponent(currency))
    if exact != exact.to_integral_value():
        raise ValueError(f"{text} has more digits than {currency}")
    return int(exact)


def money(minor: int, currency: str) -> Doc:
    """An amount of the newer APIs."""
    return {"currency_code": currency, "value": decimal(minor, currency)}


class PayPalBooks:
    """All of it but HTTP."""

    def __init__(self, world: World, emit: Emit) -> None:
        self.world, self.emit = world, emit
        self.url = ""

    @property
    def now(self) -> int:
        return self.world.clock.now

    def plan(self, sub: Doc) -> Doc:
        return self.world.kinds["plans"][sub["plan_id"]]

    def price(self, sub: Doc) -> int:
        amount: int = self.plan(sub)["_amount"]
        return amount * int(sub["quantity"])

    def currency(self, sub: Doc) -> str:
        found: str = self.plan(sub)["_currency"]
        return found

    # -- subscriptions -----------------------------------------------------------------------------------------------

    def create(self, params: Doc) -> Doc:
        """A subscription that waits for approval."""
        context = params.get("application_context") or {}
        ref, approval = new_id("I-", 12), "BA-" + token(17, _UPPER)
        subscriber = params.get("subscriber") or {}
        made = self.world.put("subscriptions", {
            "id": ref, "plan_id": params["plan_id"], "start_time": iso(self.now), "quantity": str(params.get("quantity", "1")),
            "subscriber": {"email_address": subscriber.get("email_address") or "buyer@example.com",
            "name": {"given_name": "Ann", "surname": "Buyer"}},
            "billing_info": None, "create_time": iso(self.now), "update_time": iso(self.now),
            "custom_id": params.get("custom_id"),
            "plan_overridden": False, "status": "APPROVAL_PENDING", "status_update_time": iso(self.now), "links": [],
            "_token": approval, "_return": context.get("return_url") or "", "_cancel": context.get("cancel_url") or "",
            "_next": None, "_start": None, "_card": "good", "_failed": 0, "_done": 0, "_owed": 0, "_revision": None,
            "_last": None, "_failure": None,
        })  # fmt: skip
        self._links(made)
        self._tell("CREATED", made)
        return made

    def _links(self, sub: Doc) -> None:
        at = f"{self.url}/v1/billing/subscriptions/{sub['id']}"
        found = [{"href": at, "rel": "self", "method": "GET"}, {"href": at, "rel": "edit", "method": "PATCH"}]
        if sub["status"] == "APPROVAL_PENDING":
            page = f"{self.url}/webapps/billing/subscriptions?ba_token={sub['_token']}"
            found.insert(0, {"href": page, "rel": "approve", "method": "GET"})
        else:
            found += [
                {"href": f"{at}/{verb}", "rel": verb, "method": "POST"} for verb in ("cancel", "suspend", "capture")
            ]
        sub["links"] = found

    def approve(self, sub: Doc, card: str) -> None:
        """The buyer agreed: active, and the first cycle is paid."""
        sub["_card"] = card
        sub["subscriber"]["payer_id"] = token(13, _UPPER)
        sub["_start"], sub["_next"] = self.now, after(self.now, self.plan(sub)["_interval"])
        self._status(sub, "ACTIVE")
        sub["_done"] = 1
        sale = self._sale(sub)
        self._info(sub)
        self._tell("ACTIVATED", sub)
        self._sold(sale)

    def _status(self, sub: Doc, status: str) -> None:
        sub |= {"status": status, "status_update_time": iso(self.now), "update_time": iso(self.now)}
        self._links(sub)

    def _info(self, sub: Doc) -> None:
        currency = self.currency(sub)
        cycle = {
            "tenure_type": "REGULAR", "sequence": 1, "cycles_completed": sub["_done"], "cycles_remaining": 0,
            "current_pricing_scheme_version": 1, "total_cycles": 0,
        }  # fmt: skip
        found = {
            "outstanding_balance": money(sub["_owed"], currency), "cycle_executions": [cycle],
            "failed_payments_count": sub["_failed"],
        }  # fmt: skip
        if sub["_last"]:
            found["last_payment"] = sub["_last"]
        if sub["_failure"]:  # kept until a payment goes well, also when it is suspended for it
            found["last_failed_payment"] = sub["_failure"]
        if sub["status"] == "ACTIVE":
            found["next_billing_time"] = iso(sub["_next"])
        sub["billing_info"] = found

    def turn(self, sub: Doc, status: str, reason: str) -> None:
        """Cancel, suspend or activate."""
        sub["status_change_note"] = reason
        self._status(sub, status)
        if status == "ACTIVE":
            sub["_failed"] = 0
            sub["_next"] = max(sub["_next"], self.now)
        self._info(sub)
        self._tell({"CANCELLED": "CANCELLED", "SUSPENDED": "SUSPENDED", "ACTIVE": "RE-ACTIVATED"}[status], sub)

    def revise(self, sub: Doc, plan: str, quantity: str) -> Doc:
        """Another plan from the next cycle on, once the buyer agrees: the answer with the page."""
        approval = "BA-" + token(17, _UPPER)
        sub["_revision"] = {"plan_id": plan, "quantity": quantity, "token": approval, "agreed": False}
        at = f"{self.url}/v1/billing/subscriptions/{sub['id']}"
        page = f"{self.url}/webapps/billing/subscriptions/update?ba_token={approval}"
        links = [{"href": page, "rel": "approve", "method": "GET"}, {"href": at, "rel": "self", "method": "GET"}]
        return {"plan_id": plan, "plan_overridden": False, "quantity": quantity, "links": links}

    def agree(self, sub: Doc) -> None:
        """The buyer agreed to a revision: the subscription is of the other plan; what is paid changes with the next cycle."""
        revision = sub["_revision"]
        sub |= {
            "plan_id": revision["plan_id"],
            "quantity": revision["quantity"],
            "update_time": iso(self.now),
            "_revision": None,
        }
        self._info(sub)
        self._tell("UPDATED", sub)

    def _tell(self, word: str, sub: Doc) -> None:
        self.emit(f"BILLING.SUBSCRIPTION.{word}", "subscription", f"Subscription {word.lower()}", sub)

    # -- time --------------------------------------------------------------------------------------------------------

    def next_due(self) -> tuple[float, Callable[[], None]] | None:
        """The next thing that happens by itself."""
        return min(self._coming(), key=lambda due: due[0], default=None)

    def _coming(self) -> Iterator[tuple[float, Callable[[], None]]]:
        for sub in self.world.all("subscriptions"):
            if sub["status"] == "ACTIVE":
                at = sub["_next"] if not sub["_failed"] else sub["_retry"]
                yield at, partial(self._bill, sub)

    def _bill(self, sub: Doc) -> None:
        if not sub["_failed"]:
            sub["_next"] = after(sub["_next"], self.plan(sub)["_interval"])
        self.charge(sub)

    def charge(self, sub: Doc) -> bool:
        """Try to be paid for this cycle and what is owed; whether it went well."""
        if sub["_card"] == "good":
            sub |= {"_failed": 0, "_owed": 0, "_done": sub["_done"] + 1, "_failure": None}
            sale = self._sale(sub)
            self._info(sub)
            self._sold(sale)
            return True
        sub["_failed"] += 1
        sub["_owed"] = self.price(sub)
        last = sub["_failed"] > RETRIES
        sub["_retry"] = self.now + RETRY_DAYS * DAY
        failed = {
            "amount": money(self.price(sub), self.currency(sub)),
            "time": iso(self.now),
            "reason_code": "PAYMENT_DENIED",
        }
        if not last:
            failed["next_payment_retry_time"] = iso(sub["_retry"])
        sub["_failure"] = failed
        self._info(sub)
        self._tell("PAYMENT.FAILED", sub)
        if last:
            self.turn(sub, "SUSPENDED", "too many payments failed")
        return False

    # -- money -------------------------------------------------------------------------------------------------------

    def _sale(self, sub: Doc) -> Doc:
        currency, amount = self.currency(sub), self.price(sub)
        fee = per_mille(amount, 35, 49 if exponent(currency) else 40)
        ref = token(17, _UPPER)
        sub["_last"] = {"amount": money(amount, currency), "time": iso(self.now)}
        at = f"{self.url}/v1/payments/sale/{ref}"
        return self.world.put("sales", {
            "id": ref, "state": "completed", "billing_agreement_id": sub["id"],
            "amount": {"total": decimal(amount, currency), "currency": currency, "details": {"subtotal": decimal(amount,
            currency)}},
            "payment_mode": "INSTANT_TRANSFER", "protection_eligibility": "ELIGIBLE",
            "protection_eligibility_type": "ITEM_NOT_RECEIVED_ELIGIBLE,UNAUTHORIZED_PAYMENT_ELIGIBLE",
            "transaction_fee": {"currency": currency, "value": decimal(fee, currency)}, "invoice_number": "",
            "custom": sub["custom_id"] or "",
            "create_time": iso(self.now), "update_time": iso(self.now),
            "links": [{"method": "GET", "rel": "self", "href": at}, {"method": "POST", "rel": "refund", "href": f"{at}/refund"}],
            "_amount": amount, "_fee": fee, "_currency": currency, "_refunded": 0, "_at": self.now,
        })  # fmt: skip

    def _sold(self, sale: Doc) -> None:
        text = f"Payment completed for {sale['amount']['total']} {sale['_currency']}"
        self.emit("PAYMENT.SALE.COMPLETED", "sale", text, sale)

    def refund(self, sale: Doc, amount: int, reason: str) -> Doc:
        """Pay back; the fee is kept."""
        currency, ref = sale["_currency"], token(17, _UPPER)
        sale["_refunded"] += amount
        sale |= {
            "state": "refunded" if sale["_refunded"] == sale["_amount"] else "partially_refunded",
            "update_time": iso(self.now),
        }
        at = f"{self.url}/v1/payments/refund/{ref}"
        made = self.world.put("refunds", {
            "id": ref, "state": "completed", "sale_id": sale["id"], "amount": {"total": decimal(amount, currency),
            "currency": currency},
            "reason": reason, "refund_reason_code": "REFUND", "create_time": iso(self.now), "update_time": iso(self.now),
            "refund_from_transaction_fee": {"currency": currency, "value": decimal(0, currency)},
            "refund_from_received_amount": {"currency": currency, "value": decimal(amount, currency)},
            "total_refunded_amount": {"currency": currency, "value": decimal(sale["_refunded"], currency)},
            "links": [{"method": "GET", "rel": "self", "href": at}], "_amount": amount, "_currency": currency, "_at": self.now,
        })  # fmt: skip
        # Its webhooks have what is paid back with a minus sign.
        told = made | {"amount": {"total": decimal(-amount, currency), "currency": currency}}
        self.emit(
            "PAYMENT.SALE.REFUNDED",
            "refund",
            f"A {decimal(amount, currency)} {currency} sale payment was refunded",
            told,
        )
        return made

    def dispute(self, sale: Doc, reason: str) -> Doc:
        """A buyer or a bank wants the payment back."""
        amount, currency = sale["_amount"] - sale["_refunded"], sale["_currency"]
        made = self.world.put("disputes", {
            "dispute_id": (ref := "PP-D-" + token(5, "0123456789")), "create_time": iso(self.now), "update_time": iso(self.now),
            "disputed_transactions": [{"seller_transaction_id": sale["id"], "gross_amount": money(sale["_amount"], currency)}],
            "reason": reason, "status": "WAITING_FOR_SELLER_RESPONSE", "dispute_state": "REQUIRED_ACTION",
            "dispute_amount": money(amount, currency), "dispute_life_cycle_stage": "CHARGEBACK", "dispute_channel": "EXTERNAL",
            "seller_response_due_date": iso(self.now + 10 * DAY), "links": [], "id": ref, "_sale": sale["id"], "_amount": amount,
            "_at": self.now,
        })  # fmt: skip
        self.emit("CUSTOMER.DISPUTE.CREATED", "dispute", "A new dispute opened", _dispute(made))
        return made

    def decide(self, dispute: Doc, won: bool) -> None:
        """The end of a dispute; a lost one takes the payment back."""
        sale = self.world.kinds["sales"][dispute["_sale"]]
        outcome = {"outcome_code": "RESOLVED_SELLER_FAVOUR" if won else "RESOLVED_BUYER_FAVOUR"}
        refunded = {} if won else {"amount_refunded": dispute["dispute_amount"]}
        dispute |= {
            "status": "RESOLVED",
            "dispute_state": "RESOLVED",
            "dispute_outcome": outcome | refunded,
            "update_time": iso(self.now),
        }
        if not won:
            sale |= {
                "state": "reversed",
                "update_time": iso(self.now),
                "_reversed": dispute["_amount"],
                "_reversed_at": self.now,
            }
            total = decimal(-dispute["_amount"], sale["_currency"])
            told = {
                "id": token(17, _UPPER), "sale_id": sale["id"], "state": "completed", "reason_code": "CHARGEBACK",
                "amount": {"total": total, "currency": sale["_currency"], "details": {"subtotal": total}},
                "billing_agreement_id": sale["billing_agreement_id"], "create_time": iso(self.now),
                "update_time": iso(self.now), "links": [],
            }  # fmt: skip
            self.emit("PAYMENT.SALE.REVERSED", "sale", f"A {total} {sale['_currency']} sale payment was reversed", told)
        self.emit("CUSTOMER.DISPUTE.RESOLVED", "dispute", "A dispute was resolved", _dispute(dispute))


def _dispute(doc: Doc) -> Doc:
    return {key: value for key, value in doc.items() if key != "id"}
