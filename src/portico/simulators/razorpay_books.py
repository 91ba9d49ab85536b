"""What Razorpay does with subscriptions and money, in the simulator: every change, with the events that it makes.

    created ─page paid─► active ─period over─► the next charge: captured, or ``pending`` and tried again on the next three days,
    then ``halted`` (invoices go on and are not collected); ``completed`` after ``total_count`` charges

Amounts are in the smallest unit; a payment's ``tax`` is inside its ``fee``. Ids are 14 characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from portico.simulators.billing_world import DAY, Doc, Offer, World, after, fixed, per_mille, share, token

#: Attempts after the first that failed, a day apart.
RETRIES: Final = 3
_PERIODS: Final = {"day": "daily", "month": "monthly", "year": "yearly"}
_INTERVALS: Final = {name: interval for interval, name in _PERIODS.items()}
_LIVE: Final = ("active", "pending", "halted")

#: Event, and the entities of its payload by name.
Emit = Callable[[str, dict[str, Doc]], None]


def new_id(prefix: str) -> str:
    """``pay_29QQoUBi66xm2f``."""
    return f"{prefix}_{token(14)}"


def plan_id(offer: Offer) -> str:
    """The id of a plan; the same in every run."""
    return "plan_" + fixed(14, "plan", offer.plan, offer.currency, str(offer.amount_minor), offer.interval)


def plan_of(offer: Offer, created: int) -> Doc:
    """A plan of the catalogue."""
    item = {
        "id": "item_" + fixed(14, "item", offer.plan), "active": True, "amount": offer.amount_minor,
        "unit_amount": offer.amount_minor,
        "currency": offer.currency, "created_at": created, "description": None, "hsn_code": None, "name": offer.name,
        "sac_code": None,
        "tax_group_id": None, "tax_id": None, "tax_inclusive": False, "tax_rate": None, "type": "plan", "unit": None,
        "updated_at": created,
    }  # fmt: skip
    return {
        "id": plan_id(offer), "entity": "plan", "created_at": created, "interval": 1, "item": item, "notes": {"plan": offer.plan},
        "period": _PERIODS[offer.interval],
    }  # fmt: skip


class RazorpayBooks:
    """All of it but HTTP."""

    def __init__(self, world: World, emit: Emit) -> None:
        self.world, self.emit = world, emit

    @property
    def now(self) -> int:
        return self.world.clock.now

    def plan(self, sub: Doc) -> Doc:
        return self.world.kinds["plans"][sub["plan_id"]]

    def price(self, sub: Doc) -> int:
        amount: int = self.plan(sub)["item"]["amount"]
        return amount * int(sub["quantity"])

    # -- subscriptions -----------------------------------------------------------------------------------------------

    def create(self, params: Doc, page: str) -> Doc:
        """A subscription that nobody authenticated yet."""
        total = int(params["total_count"])
        code = token(7)
        return self.world.put("subscriptions", {
            "id": new_id("sub"), "entity": "subscription", "plan_id": params["plan_id"], "customer_id": params.get("customer_id"),
            "status": "created", "current_start": None, "current_end": None, "ended_at": None,
            "quantity": int(params.get("quantity", 1)), "notes": params.get("notes") or [], "charge_at": None,
            "start_at": params.get("start_at"),
            "end_at": None, "auth_attempts": 0, "total_count": total, "paid_count": 0,
            "customer_notify": bool(params.get("customer_notify", True)), "created_at": self.now,
            "expire_by": params.get("expire_by"),
            "short_url": f"{page}/i/{code}", "has_scheduled_changes": False, "change_scheduled_at": None, "source": "api",
            "offer_id": None, "remaining_count": total, "_code": code, "_card": "good", "_cancel_at_end": False, "_change": None,
            "_email": ((params.get("notify_info") or {}).get("notify_email")), "_done": 0,
        })  # fmt: skip

    def authenticate(self, sub: Doc, card: str) -> None:
        """The buyer paid on the page: the mandate stands, and the first period is charged."""
        if sub["customer_id"] is None:
            sub["customer_id"] = self.customer({"email": sub["_email"] or "buyer@example.com", "name": "Buyer"})["id"]
        sub["_card"] = card
        if sub["start_at"] and sub["start_at"] > self.now:  # a trial: nothing is charged before
            sub |= {"status": "authenticated", "charge_at": sub["start_at"]}
            sub["end_at"] = after(sub["start_at"], self._interval(sub), sub["total_count"])
            self.emit("subscription.authenticated", {"subscription": sub})
            return
        start = self.now
        end = self._end_of(sub, start)
        invoice = self.invoice(sub, start, end, self.price(sub))
        payment = self.payment(invoice, good=True)
        sub |= {"status": "authenticated", "start_at": start, "charge_at": start, "auth_attempts": 0}
        sub["end_at"] = after(start, self._interval(sub), sub["total_count"])
        self.emit("subscription.authenticated", {"subscription": sub, "payment": payment})
        sub |= {"status": "active", "current_start": start, "current_end": end, "charge_at": end}
        self._counted(sub)
        self.emit("subscription.activated", {"subscription": sub, "payment": payment})
        self._captured(payment, invoice)
        self.emit("subscription.charged", {"subscription": sub, "payment": payment})

    def customer(self, params: Doc) -> Doc:
        """A customer."""
        return self.world.put("customers", {
            "id": new_id("cust"), "entity": "customer", "name": params.get("name"), "email": params.get("email"),
            "contact": params.get("contact"), "gstin": params.get("gstin"), "notes": params.get("notes") or [],
            "created_at": self.now,
        })  # fmt: skip

    def _interval(self, sub: Doc) -> str:
        return _INTERVALS[self.plan(sub)["period"]]

    def _end_of(self, sub: Doc, start: int) -> int:
        return after(start, self._interval(sub))

    def _counted(self, sub: Doc) -> None:
        sub["paid_count"] += 1
        sub["_done"] += 1
        sub["remaining_count"] = max(0, sub["total_count"] - sub["_done"])

    def cancel(self, sub: Doc, at_end: bool) -> None:
        """Now, or with the period."""
        if at_end and sub["status"] in _LIVE:
            sub["_cancel_at_end"] = True
            return
        sub |= {
            "status": "cancelled",
            "ended_at": self.now,
            "charge_at": None,
            "current_end": sub["current_end"] and self.now,
        }
        self.emit("subscription.cancelled", {"subscription": sub})

    def change(self, sub: Doc, plan: str, quantity: int, at_end: bool) -> None:
        """Another plan; now: the difference for the rest of the period is charged or paid back."""
        if at_end:
            sub |= {
                "_change": {"plan_id": plan, "quantity": quantity},
                "has_scheduled_changes": True,
                "change_scheduled_at": sub["current_end"],
            }
            self.emit("subscription.updated", {"subscription": sub})
            return
        before = self.price(sub)
        sub |= {"plan_id": plan, "quantity": quantity}
        left, whole = sub["current_end"] - self.now, sub["current_end"] - sub["current_start"]
        due = share(self.price(sub) - before, left, whole)
        entities = {"subscription": sub}
        if due > 0:
            invoice = self.invoice(sub, self.now, sub["current_end"], due)
            payment = self.payment(invoice, good=True)
            self._captured(payment, invoice)
            entities["payment"] = payment
        elif due < 0 and (last := self._last_payment(sub)) is not None:
            self.refund(last, min(-due, last["amount"] - last["amount_refunded"]), {"notes": {"reason": "proration"}})
        self.emit("subscription.updated", entities)

    def unschedule(self, sub: Doc) -> None:
        """Take a change back that waits for the end of the period."""
        sub |= {"_change": None, "has_scheduled_changes": False, "change_scheduled_at": None}

    def pause(self, sub: Doc) -> None:
        sub["status"] = "paused"
        self.emit("subscription.paused", {"subscription": sub})

    def resume(self, sub: Doc) -> None:
        """Go on; the next period begins now when the last one is over."""
        sub["status"] = "active"
        sub["charge_at"] = max(self.now, sub["current_end"])
        self.emit("subscription.resumed", {"subscription": sub})

    def _last_payment(self, sub: Doc) -> Doc | None:
        found = [row for row in self.world.all("payments") if row["_subscription"] == sub["id"] and row["captured"]]
        return found[-1] if found else None

    # -- time --------------------------------------------------------------------------------------------------------

    def next_due(self) -> tuple[float, Callable[[], None]] | None:
        """The next thing that happens by itself."""
        return min(self._coming(), key=lambda due: due[0], default=None)

    def _coming(self) -> Iterator[tuple[float, Callable[[], None]]]:
        for sub in self.world.all("subscriptions"):
            if sub["status"] == "created" and sub["expire_by"]:
                yield sub["expire_by"], partial(self._expire, sub)
            elif sub["status"] == "authenticated":
                yield sub["charge_at"], partial(self._begin, sub)
            elif sub["status"] in ("active", "halted"):
                yield sub["charge_at"], partial(self._renew, sub)
            elif sub["status"] == "pending":
                yield sub["charge_at"], partial(self.try_again, sub)

    def _expire(self, sub: Doc) -> None:
        sub |= {"status": "expired", "ended_at": self.now}

    def _begin(self, sub: Doc) -> None:
        """The trial is over: the first charge."""
        start = self.now
        end = self._end_of(sub, start)
        sub |= {"current_start": start, "current_end": end, "charge_at": end}
        self._collect(sub, self.invoice(sub, start, end, self.price(sub)))

    def _renew(self, sub: Doc) -> None:
        if sub["_cancel_at_end"]:
            self.cancel(sub, at_end=False)
            return
        if sub["_done"] >= sub["total_count"]:
            sub |= {"status": "completed", "ended_at": self.now, "charge_at": None}
            self.emit("subscription.completed", {"subscription": sub})
            return
        if sub["_change"]:
            sub |= sub["_change"]
            self.unschedule(sub)
        start = max(sub["current_end"], sub["charge_at"])
        end = self._end_of(sub, start)
        sub |= {"current_start": start, "current_end": end, "auth_attempts": 0, "charge_at": end}
        invoice = self.invoice(sub, start, end, self.price(sub), addons=sub["status"] != "halted")
        if sub["status"] == "halted":  # issued, and not collected any more
            sub["_done"] += 1
            sub["remaining_count"] = max(0, sub["total_count"] - sub["_done"])
            return
        self._collect(sub, invoice)

    def try_again(self, sub: Doc) -> None:
        """Another attempt at the invoice of the current period."""
        rows = list(self.world.where("invoices", subscription_id=sub["id"], status="issued"))
        self._collect(sub, rows[-1])

    def _collect(self, sub: Doc, invoice: Doc) -> None:
        good = sub["_card"] == "good"
        payment = self.payment(invoice, good)
        if good:
            was = sub["status"]
            sub |= {"status": "active", "charge_at": sub["current_end"], "auth_attempts": 0}
            self._counted(sub)
            if was != "active":
                self.emit("subscription.activated", {"subscription": sub, "payment": payment})
            self._captured(payment, invoice)
            self.emit("subscription.charged", {"subscription": sub, "payment": payment})
            return
        sub["auth_attempts"] += 1
        self.emit("payment.failed", {"payment": payment})
        if sub["auth_attempts"] > RETRIES:
            sub |= {"status": "halted", "charge_at": sub["current_end"]}
            self.emit("subscription.halted", {"subscription": sub, "payment": payment})
            return
        sub |= {"status": "pending", "charge_at": self.now + DAY}
        self.emit("subscription.pending", {"subscription": sub, "payment": payment})

    def new_card(self, sub: Doc, card: str) -> None:
        """Another card. A halted subscription that gets a good one is active again; its old invoices stay as they are."""
        sub["_card"] = card
        if sub["status"] == "halted" and card == "good":
            sub |= {"status": "active", "auth_attempts": 0}
            self.emit("subscription.activated", {"subscription": sub})

    # -- money -------------------------------------------------------------------------------------------------------

    def addon(self, sub: Doc, item: Doc, quantity: int) -> Doc:
        """Something beside the plan, on the next invoice of a subscription."""
        return self.world.put("addons", {
            "id": new_id("ao"), "entity": "addon", "item": {
                "id": new_id("item"), "active": True, "name": item["name"], "description": item.get("description"),
                "amount": int(item["amount"]), "unit_amount": int(item["amount"]), "currency": item["currency"],
                "type": "addon", "unit": None, "tax_inclusive": False,
            },
            "quantity": quantity, "subscription_id": sub["id"], "invoice_id": None, "created_at": self.now,
        })  # fmt: skip

    def invoice(self, sub: Doc, start: int, end: int, amount: int, *, addons: bool = False) -> Doc:
        """An invoice of a subscription, to be paid; ``addons``: with what is to be charged beside the plan."""
        item = self.plan(sub)["item"]
        lines = [_line(item["name"], None, amount, item["currency"], "plan")]
        ref = new_id("inv")
        for one in list(self.world.where("addons", subscription_id=sub["id"], invoice_id=None)) if addons else []:
            one["invoice_id"] = ref
            cost = one["item"]["amount"] * one["quantity"]
            lines.append(_line(one["item"]["name"], one["item"]["description"], cost, item["currency"], "addon"))
        amount = sum(line["amount"] for line in lines)
        customer = self.world.kinds["customers"][sub["customer_id"]]
        return self.world.put("invoices", {
            "id": ref, "entity": "invoice", "receipt": None, "invoice_number": None, "customer_id": sub["customer_id"],
            "customer_details": {"id": customer["id"], "name": customer["name"], "email": customer["email"], "contact": None},
            "order_id": new_id("order"), "subscription_id": sub["id"], "line_items": lines, "payment_id": None,
            "status": "issued",
            "expire_by": None, "issued_at": self.now, "paid_at": None, "cancelled_at": None, "expired_at": None, "date": self.now,
            "partial_payment": False, "gross_amount": amount, "tax_amount": 0, "taxable_amount": amount, "amount": amount,
            "amount_paid": 0, "amount_due": amount, "currency": item["currency"], "description": None, "notes": [],
            "short_url": None,
            "billing_start": start, "billing_end": end, "type": "invoice", "group_taxes_discounts": False, "created_at": self.now,
        })  # fmt: skip

    def payment(self, invoice: Doc, good: bool) -> Doc:
        """A payment of an invoice: authorized, or failed. 2 % and 18 % tax on that, in ``fee``."""
        amount = invoice["amount_due"]
        base = per_mille(amount, 20)
        tax = share(base * 18, 1, 100)
        refused = "Your payment was declined by the bank. Try another card."
        customer = self.world.kinds["customers"][invoice["customer_id"]]
        return self.world.put("payments", {
            "id": new_id("pay"), "entity": "payment", "amount": amount, "currency": invoice["currency"], "base_amount": amount,
            "status": "authorized" if good else "failed", "order_id": invoice["order_id"], "invoice_id": invoice["id"],
            "international": False, "method": "card", "amount_refunded": 0, "refund_status": None, "captured": False,
            "description": "Recurring payment via subscription", "card_id": new_id("card"), "bank": None,
            "wallet": None, "vpa": None,
            "email": customer["email"], "contact": "+919000090000", "customer_id": customer["id"], "token_id": new_id("token"),
            "notes": [], "fee": base + tax if good else None, "tax": tax if good else None,
            "error_code": None if good else "BAD_REQUEST_ERROR", "error_description": None if good else refused,
            "error_source": None if good else "bank", "error_step": None if good else "payment_authorization",
            "error_reason": None if good else "payment_failed",
            "acquirer_data": {"auth_code": token(6, "0123456789") if good else None},
            "created_at": self.now, "_subscription": invoice["subscription_id"], "_settlement": None,
        })  # fmt: skip

    def _captured(self, payment: Doc, invoice: Doc) -> None:
        payment |= {"status": "captured", "captured": True}
        invoice |= {
            "status": "paid", "paid_at": self.now, "payment_id": payment["id"], "amount_paid": invoice["amount"], "amount_due": 0,
        }  # fmt: skip
        self.emit("payment.captured", {"payment": payment})
        self.emit("invoice.paid", {"payment": payment, "invoice": invoice})

    def refund(self, payment: Doc, amount: int, params: Doc) -> Doc:
        """Pay back; the fee is kept."""
        made = self.world.put("refunds", {
            "id": new_id("rfnd"), "entity": "refund", "amount": amount, "currency": payment["currency"],
            "payment_id": payment["id"],
            "notes": params.get("notes") or [], "receipt": params.get("receipt"), "acquirer_data": {"arn": token(23,
            "0123456789")},
            "created_at": self.now, "batch_id": None, "status": "processed", "speed_processed": "normal",
            "speed_requested": params.get("speed", "normal"), "_settlement": None,
        })  # fmt: skip
        payment["amount_refunded"] += amount
        whole = payment["amount_refunded"] == payment["amount"]
        payment |= {
            "refund_status": "full" if whole else "partial",
            "status": "refunded" if whole else payment["status"],
        }
        self.emit("refund.created", {"refund": made, "payment": payment})
        self.emit("refund.processed", {"refund": made, "payment": payment})
        return made

    def dispute(self, payment: Doc, reason: str) -> Doc:
        """The bank takes the payment back until it is decided."""
        amount = payment["amount"] - payment["amount_refunded"]
        made = self.world.put("disputes", {
            "id": new_id("disp"), "entity": "dispute", "payment_id": payment["id"], "amount": amount,
            "currency": payment["currency"],
            "amount_deducted": amount, "reason_code": reason, "respond_by": self.now + 7 * DAY, "status": "open",
            "phase": "chargeback",
            "comments": None, "created_at": self.now, "_settlement": None,
        })  # fmt: skip
        self.emit("payment.dispute.created", {"payment": payment, "dispute": made})
        return made

    def decide(self, dispute: Doc, won: bool) -> None:
        """The end of a dispute."""
        dispute["status"] = "won" if won else "lost"
        if won:
            dispute["amount_deducted"] = 0
        payment = self.world.kinds["payments"][dispute["payment_id"]]
        self.emit(f"payment.dispute.{dispute['status']}", {"payment": payment, "dispute": dispute})

    def rows(self) -> list[Doc]:
        """What settlements are made of, in recon form; ``_of`` is the object."""
        found = [
            self._row(row, "payment", row["amount"], row["fee"], row["tax"])
            for row in self.world.all("payments")
            if row["captured"]
        ]
        found += [self._row(row, "refund", -row["amount"], 0, 0) for row in self.world.all("refunds")]
        found += [
            self._row(row, "adjustment", -row["amount"], 0, 0)
            for row in self.world.all("disputes")
            if row["status"] != "won"
        ]
        return sorted(found, key=lambda row: row["created_at"])

    def _row(self, doc: Doc, kind: str, amount: int, fee: int, tax: int) -> Doc:
        net = amount - fee
        settlement = self.world.get("settlements", doc["_settlement"])
        payment = doc if kind == "payment" else self.world.kinds["payments"][doc["payment_id"]]
        return {
            "entity_id": doc["id"], "type": kind, "debit": max(0, -net), "credit": max(0, net), "amount": abs(amount),
            "currency": doc["currency"], "fee": fee, "tax": tax, "on_hold": False, "settled": settlement is not None,
            "created_at": doc["created_at"], "settled_at": settlement and settlement["created_at"],
            "settlement_id": doc["_settlement"],
            "description": None, "notes": [], "payment_id": None if kind == "payment" else payment["id"],
            "settlement_utr": settlement and settlement["utr"], "order_id": payment["order_id"], "order_receipt": None,
            "method": payment["method"], "card_network": "Visa", "card_issuer": "KARB", "card_type": "credit",
            "dispute_id": doc["id"] if kind == "adjustment" else None, "_of": doc,
        }  # fmt: skip

    def settle(self) -> Doc | None:
        """Pay out what was earned since the last time."""
        rows: list[Any] = [row for row in self.rows() if row["settlement_id"] is None]
        amount = sum(row["credit"] - row["debit"] for row in rows)
        if amount <= 0:
            return None
        made = self.world.put("settlements", {
            "id": new_id("setl"), "entity": "settlement", "amount": amount, "status": "processed",
            "fees": sum(row["fee"] for row in rows), "tax": sum(row["tax"] for row in rows),
            "utr": token(10, "0123456789") + token(6, "abcdefghijklmnopqrstuvwxyz"), "created_at": self.now,
        })  # fmt: skip
        for row in rows:
            row["_of"]["_settlement"] = made["id"]
        self.emit("settlement.processed", {"settlement": made})
        return made


def _line(name: str, about: str | None, amount: int, currency: str, kind: str) -> Doc:
    return {
        "id": new_id("li"), "item_id": None, "name": name, "description": about, "amount": amount, "unit_amount": amount,
        "gross_amount": amount, "tax_amount": 0, "taxable_amount": amount, "net_amount": amount, "currency": currency,
        "type": kind, "tax_inclusive": False, "quantity": 1, "taxes": [],
    }  # fmt: skip
