"""What Stripe does with subscriptions, invoices and money, in the simulator: every change, with the events that it makes.

    checkout paid ─► customer, subscription, invoice ─► payment intent, charge, balance transaction ─► events
    period over   ─► the next invoice: paid, or open and tried again after 3, 5 and 7 days; then ``unpaid`` (or ``canceled``)

Time is the simulator's clock; :meth:`StripeBooks.next_due` says what is next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, Literal

from portico.simulators import stripe_objects as shapes
from portico.simulators.billing_world import DAY, Doc, World, after, per_mille, share, token

#: Days between the attempts at an invoice that was not paid, and what an unpaid subscription comes to after the last.
RETRY_DAYS: Final = (3, 5, 7)
CHECKOUT_SECONDS: Final = DAY
_DECLINE: Final = {"decline_code": "generic_decline", "code": "card_declined", "message": "Your card was declined."}
_TRIAL_WARNING: Final = 3 * DAY
_DISPUTE_FEE: Final = 1500

Emit = Callable[[str, Doc, Doc | None], None]
After = Literal["unpaid", "canceled", "past_due"]


class StripeBooks:
    """All of it but HTTP. ``emit`` takes the type of an event, its object and what the object had before."""

    def __init__(self, world: World, emit: Emit) -> None:
        self.world, self.emit = world, emit
        self.retry_days: Sequence[int] = RETRY_DAYS
        self.after_retries: After = "unpaid"
        #: Tax on top of every line, in hundredths of a per cent.
        self.tax_bp = 0

    @property
    def now(self) -> int:
        return self.world.clock.now

    # -- customers ---------------------------------------------------------------------------------------------------

    def customer(self, params: Doc) -> Doc:
        """A new customer."""
        made = {
            "id": shapes.new_id("customers"), "object": "customer", "address": params.get("address"), "balance": 0,
            "created": self.now, "currency": None, "default_source": None, "delinquent": False,
            "description": params.get("description"), "email": params.get("email"), "invoice_prefix": token(8,
            "0123456789ABCDEF"),
            "invoice_settings": {"custom_fields": None, "default_payment_method": None, "footer": None}, "livemode": False,
            "metadata": params.get("metadata") or {}, "name": params.get("name"), "next_invoice_sequence": 1, "phone": None,
            "preferred_locales": [], "shipping": None, "tax_exempt": params.get("tax_exempt", "none"), "test_clock": None,
            "_card": "good",
        }  # fmt: skip
        self.world.put("customers", made)
        self.emit("customer.created", made, None)
        return made

    # -- subscriptions -----------------------------------------------------------------------------------------------

    def subscribe(self, customer: Doc, price: Doc, quantity: int, metadata: Doc, trial_days: int = 0) -> Doc:
        """A new subscription with its first invoice, which is charged now: ``active``, ``trialing``, or ``incomplete``."""
        start = self.now
        ends = start + trial_days * DAY if trial_days else after(start, price["recurring"]["interval"])
        ref = shapes.new_id("subscriptions")
        item = shapes.item_of(ref, price, quantity, start, ends)
        trial = (start, ends) if trial_days else (None, None)
        made = {
            "id": ref, "object": "subscription", "automatic_tax": {"enabled": False},
            "billing_cycle_anchor": ends if trial_days else start,
            "cancel_at": None, "cancel_at_period_end": False, "canceled_at": None,
            "cancellation_details": {"comment": None, "feedback": None, "reason": None},
            "collection_method": "charge_automatically", "created": start, "currency": price["currency"],
            "customer": customer["id"], "days_until_due": None, "default_payment_method": None, "description": None,
            "discounts": [], "ended_at": None, "items": shapes.listed(f"/v1/subscription_items?subscription={ref}", [item]),
            "latest_invoice": None, "livemode": False, "metadata": metadata, "pause_collection": None,
            "pending_setup_intent": None, "pending_update": None, "schedule": None, "start_date": start,
            "status": "trialing" if trial_days else "incomplete", "test_clock": None, "trial_end": trial[1],
            "trial_settings": {"end_behavior": {"missing_payment_method": "create_invoice"}}, "trial_start": trial[0],
            "_tax_bp": self.tax_bp, "_pending": [], "_warned": False, "_waits_for": None,
        }  # fmt: skip
        self.world.put("subscriptions", made)
        amount = 0 if trial_days else price["unit_amount"] * quantity
        text = f"{quantity} × {price['nickname']}" if not trial_days else f"Trial period for {price['nickname']}"
        invoice = self._invoice(made, "subscription_create", [(item, price, amount, (start, ends), text, False)])
        paid = self._charge(invoice)
        if paid and not trial_days:
            made["status"] = "active"
        self.emit("customer.subscription.created", made, None)
        self._tell(invoice, paid)
        return made

    def change(self, sub: Doc, price: Doc, quantity: int, proration: str, wait: bool = False) -> None:
        """Another price from now on in the same period; the difference as ``proration`` has it. ``wait``: a change
        whose invoice is not
        paid waits for that (``pending_update``), for a day."""
        item = sub["items"]["data"][0]
        if wait and proration == "always_invoice" and not self._can_pay(self.world.kinds["customers"][sub["customer"]]):
            self._wait(sub, price, quantity)
            return
        before = {
            "items": copy.deepcopy(sub["items"]),
            "plan": shapes.plan_of(item["price"]),
            "quantity": item["quantity"],
        }
        start, end, now = item["current_period_start"], item["current_period_end"], self.now
        old, left, whole = item["price"]["unit_amount"] * item["quantity"], end - now, end - start
        lines = []
        if proration != "none" and sub["status"] != "trialing" and left > 0:
            lines = [
                (copy.deepcopy(item), copy.deepcopy(item["price"]), -share(old, left, whole), (now, end),
                 f"Unused time on {item['price']['nickname']} after {_day(now)}", True),
            ]  # fmt: skip
        item["price"], item["plan"], item["quantity"] = copy.deepcopy(price), shapes.plan_of(price), quantity
        if lines:
            amount = share(price["unit_amount"] * quantity, left, whole)
            lines.append(
                (item, price, amount, (now, end), f"Remaining time on {price['nickname']} after {_day(now)}", True)
            )
        self.emit("customer.subscription.updated", sub, before)
        if not lines:
            return
        if proration == "always_invoice":
            invoice = self._invoice(sub, "subscription_update", lines)
            paid = self._charge(invoice)
            self._tell(invoice, paid)
            if not paid:
                self._status(sub, "past_due")
        else:
            sub["_pending"] += [list(line) for line in lines]

    def _wait(self, sub: Doc, price: Doc, quantity: int) -> None:
        item = sub["items"]["data"][0]
        start, end, now = item["current_period_start"], item["current_period_end"], self.now
        old = copy.deepcopy(item["price"])
        lines = [
            (item, old, -share(old["unit_amount"] * item["quantity"], end - now, end - start), (now, end),
            f"Unused time on {old['nickname']}", True),
            (item, price, share(price["unit_amount"] * quantity, end - now, end - start), (now, end),
            f"Remaining time on {price['nickname']}", True),
        ]  # fmt: skip
        invoice = self._invoice(sub, "subscription_update", lines)
        paid = self._charge(invoice)
        sub["pending_update"] = {
            "billing_cycle_anchor": None, "expires_at": now + 23 * 3600, "trial_end": None, "trial_from_plan": None,
            "subscription_items": [{"id": item["id"], "price": copy.deepcopy(price), "quantity": quantity}],
        }  # fmt: skip
        sub["_waits_for"] = invoice["id"]
        self.emit("customer.subscription.updated", sub, {"pending_update": None})
        self._tell(invoice, paid)

    def _settle_update(self, sub: Doc, applied: bool) -> None:
        """The end of a change that waited: its invoice was paid, or nobody paid in time."""
        wanted = sub["pending_update"]["subscription_items"][0]
        before: Doc = {"pending_update": sub["pending_update"]}
        invoice = self.world.kinds["invoices"][sub["_waits_for"]]
        sub["pending_update"], sub["_waits_for"] = None, None
        if applied:
            item = sub["items"]["data"][0]
            before |= {"items": copy.deepcopy(sub["items"])}
            item |= {"price": wanted["price"], "plan": shapes.plan_of(wanted["price"]), "quantity": wanted["quantity"]}
            self.emit("customer.subscription.pending_update_applied", sub, None)
        else:
            self.void(invoice)
            self.emit("customer.subscription.pending_update_expired", sub, None)
        self.emit("customer.subscription.updated", sub, before)

    # -- schedules ---------------------------------------------------------------------------------------------------

    def schedule(self, sub: Doc) -> Doc:
        """A schedule that goes on from a subscription as it is."""
        item = sub["items"]["data"][0]
        phase = {
            "items": [{"price": item["price"]["id"], "quantity": item["quantity"]}], "proration_behavior": "create_prorations",
            "start_date": item["current_period_start"], "end_date": item["current_period_end"],
        }  # fmt: skip
        made = self.world.put("schedules", {
            "id": shapes.new_id("schedules"), "object": "subscription_schedule", "canceled_at": None, "completed_at": None,
            "created": self.now, "current_phase": {name: phase[name] for name in ("start_date", "end_date")},
            "customer": sub["customer"],
            "end_behavior": "release", "livemode": False, "metadata": {}, "phases": [phase], "released_at": None,
            "released_subscription": None, "status": "active", "subscription": sub["id"],
        })  # fmt: skip
        sub["schedule"] = made["id"]
        self.emit("subscription_schedule.created", made, None)
        self.emit("customer.subscription.updated", sub, {"schedule": None})
        return made

    def release(self, schedule: Doc) -> None:
        """The subscription goes on by itself."""
        sub = self.world.kinds["subscriptions"][schedule["subscription"]]
        schedule |= {
            "status": "released",
            "released_at": self.now,
            "released_subscription": sub["id"],
            "subscription": None,
            "current_phase": None,
        }
        sub["schedule"] = None
        self.emit("subscription_schedule.released", schedule, None)
        self.emit("customer.subscription.updated", sub, {"schedule": schedule["id"]})

    def _next_phase(self, sub: Doc, start: int) -> None:
        """What a schedule has for the period that begins."""
        schedule = self.world.kinds["schedules"][sub["schedule"]]
        phase = next((row for row in schedule["phases"] if row["start_date"] >= start), None)
        if phase is not None:
            wanted, item = phase["items"][0], sub["items"]["data"][0]
            price = copy.deepcopy(self.world.kinds["prices"][wanted["price"]])
            item |= {"price": price, "plan": shapes.plan_of(price), "quantity": wanted["quantity"]}
        self.release(schedule)

    def set_cancel(self, sub: Doc, at_end: bool) -> None:
        """Cancel at the end of the period, or not after all."""
        if sub["cancel_at_period_end"] == at_end:
            return
        before = {
            "cancel_at_period_end": sub["cancel_at_period_end"],
            "cancel_at": sub["cancel_at"],
            "canceled_at": sub["canceled_at"],
        }
        sub["cancel_at_period_end"] = at_end
        sub["cancel_at"] = sub["items"]["data"][0]["current_period_end"] if at_end else None
        sub["canceled_at"] = self.now if at_end else None
        self.emit("customer.subscription.updated", sub, before)

    def end(self, sub: Doc, reason: str) -> None:
        """Canceled, now."""
        sub["status"], sub["ended_at"] = "canceled", self.now
        sub["canceled_at"] = sub["canceled_at"] or self.now
        sub["cancellation_details"]["reason"] = reason
        self.emit("customer.subscription.deleted", sub, None)
        for invoice in list(self.world.where("invoices", _subscription=sub["id"], status="open")):
            invoice["next_payment_attempt"], invoice["auto_advance"] = None, False

    def _status(self, sub: Doc, status: str, more: Doc | None = None) -> None:
        before = {"status": sub["status"]} | (more or {})
        if sub["status"] == status and more is None:
            return
        sub["status"] = status
        self.emit("customer.subscription.updated", sub, before)

    # -- invoices ----------------------------------------------------------------------------------------------------

    def _invoice(self, sub: Doc, reason: str, lines: Sequence[Any], items: Sequence[Doc] = ()) -> Doc:
        """A finalized invoice: ``open``, or ``paid`` when nothing is due. Its events are made by :meth:`_tell`."""
        ref, bp = shapes.new_id("invoices"), sub["_tax_bp"]
        rows = [
            shapes.line_of(ref, sub, item, price, amount, share(amount * bp, 1, 10_000), period, text, proration)
            for item, price, amount, period, text, proration in lines
        ]
        made = self._finalized(
            ref, sub["customer"], sub["currency"], bp, reason, rows + self._take(ref, items, bp), sub
        )
        sub["latest_invoice"] = ref
        return made

    def _take(self, invoice: str, items: Sequence[Doc], bp: int) -> list[Doc]:
        """Lines of invoice items, which are on this invoice from now on."""
        for item in items:
            item["invoice"] = invoice
        return [shapes.item_line(invoice, item, share(item["amount"] * bp, 1, 10_000), bp) for item in items]

    def _finalized(
        self, ref: str, customer_ref: str, currency: str, bp: int, reason: str, rows: list[Doc], sub: Doc | None
    ) -> Doc:
        customer = self.world.kinds["customers"][customer_ref]
        subtotal = sum(row["amount"] for row in rows)
        tax = sum(entry["amount"] for row in rows for entry in row["taxes"])
        total, balance = subtotal + tax, customer["balance"]
        due = max(0, total + balance)
        customer["balance"] = min(0, total + balance)
        number = f"{customer['invoice_prefix']}-{customer['next_invoice_sequence']:04d}"
        customer["next_invoice_sequence"] += 1
        details = None if sub is None else {"metadata": sub["metadata"], "subscription": sub["id"]}
        parent = None if details is None else {
            "quote_details": None, "subscription_details": details, "type": "subscription_details"
        }  # fmt: skip
        made = {
            "id": ref, "object": "invoice", "account_country": "US", "amount_due": due, "amount_overpaid": 0, "amount_paid": 0,
            "amount_remaining": due, "amount_shipping": 0, "attempt_count": 0, "attempted": False, "auto_advance": True,
            "automatic_tax": {"enabled": False, "status": None}, "billing_reason": reason,
            "collection_method": "charge_automatically",
            "created": self.now, "currency": currency, "customer": customer["id"], "customer_email": customer["email"],
            "customer_name": customer["name"], "customer_tax_ids": [], "default_payment_method": None, "description": None,
            "discounts": [], "due_date": None, "effective_at": self.now, "ending_balance": customer["balance"],
            "hosted_invoice_url": None, "invoice_pdf": None, "lines": shapes.listed(f"/v1/invoices/{ref}/lines", rows),
            "livemode": False, "metadata": {}, "next_payment_attempt": None, "number": number,
            "parent": parent,
            "period_end": self.now, "period_start": self.now, "post_payment_credit_notes_amount": 0,
            "pre_payment_credit_notes_amount": 0, "starting_balance": balance, "status": "open",
            "status_transitions": {"finalized_at": self.now, "marked_uncollectible_at": None, "paid_at": None, "voided_at": None},
            "subtotal": subtotal, "subtotal_excluding_tax": subtotal, "total": total, "total_excluding_tax": subtotal,
            "total_taxes": _summed(rows, bp), "webhooks_delivered_at": None,
            "_subscription": sub and sub["id"], "_charge": None, "_payment_intent": None,
        }  # fmt: skip
        self.world.put("invoices", made)
        draft = copy.deepcopy(made) | {"status": "draft", "number": None, "effective_at": None, "attempted": False}
        draft["status_transitions"]["finalized_at"] = None
        made["_first"] = [draft, copy.deepcopy(made)]
        return made

    def item(self, customer: Doc, params: Doc) -> Doc:
        """Something beside the plan: on the invoice that is named, else on the next one of the subscription."""
        made = shapes.invoice_item(customer, params, self.now)
        self.world.put("invoiceitems", made)
        self.emit("invoiceitem.created", made, None)
        return made

    def draft(self, customer: Doc, params: Doc) -> Doc:
        """An invoice of its own, of no subscription, without a line yet."""
        return self.world.put("invoices", {
            "id": shapes.new_id("invoices"), "object": "invoice", "amount_due": 0, "amount_paid": 0, "amount_remaining": 0,
            "billing_reason": "manual", "created": self.now, "currency": params["currency"], "customer": customer["id"],
            "lines": shapes.listed("", []), "livemode": False, "metadata": params.get("metadata") or {}, "number": None,
            "next_payment_attempt": None, "parent": None, "status": "draft", "total": 0, "total_taxes": [],
            "_subscription": None, "_charge": None, "_payment_intent": None,
        })  # fmt: skip

    def finalize(self, draft: Doc) -> Doc:
        """Give a draft its lines and its number, and try to be paid."""
        items = list(self.world.where("invoiceitems", invoice=draft["id"]))
        rows = self._take(draft["id"], items, self.tax_bp)
        made = self._finalized(draft["id"], draft["customer"], draft["currency"], self.tax_bp, "manual", rows, None)
        made["metadata"] = draft["metadata"]
        self._tell(made, self._charge(made))
        return made

    def _tell(self, invoice: Doc, paid: bool) -> None:
        """The events of an invoice that was made and tried."""
        if first := invoice.pop("_first", None):
            self.emit("invoice.created", first[0], None)
            self.emit("invoice.finalized", first[1], None)
        if invoice["_charge"]:
            charge = self.world.kinds["charges"][invoice["_charge"]]
            intent = self.world.kinds["payment_intents"][invoice["_payment_intent"]]
            self.emit("payment_intent.succeeded" if paid else "payment_intent.payment_failed", intent, None)
            self.emit("charge.succeeded" if paid else "charge.failed", charge, None)
        if paid:
            self.emit("invoice.paid", invoice, None)
            self.emit("invoice.payment_succeeded", invoice, None)
        else:
            self.emit("invoice.payment_failed", invoice, None)

    def _charge(self, invoice: Doc) -> bool:
        """Try the customer's card for an open invoice; whether it is paid now."""
        customer = self.world.kinds["customers"][invoice["customer"]]
        if invoice["amount_due"] == 0:
            self._paid(invoice)
            return True
        good = self._can_pay(customer)
        invoice["attempt_count"] += 1
        invoice["attempted"] = True
        charge = self._money(invoice, customer, good)
        invoice["_charge"], invoice["_payment_intent"] = charge["id"], charge["payment_intent"]
        if good:
            self._paid(invoice)
            return True
        done = invoice["attempt_count"] - 1
        left = done < len(self.retry_days) and invoice["billing_reason"] != "subscription_create"
        invoice["next_payment_attempt"] = self.now + self.retry_days[done] * DAY if left else None
        return False

    def _can_pay(self, customer: Doc) -> bool:
        """Whether the customer's card is good for a charge now."""
        if customer["_card"] == "fails_later":
            return not any(self.world.where("charges", customer=customer["id"], paid=True))
        return bool(customer["_card"] == "good")

    def _paid(self, invoice: Doc) -> None:
        invoice |= {
            "status": "paid",
            "amount_paid": invoice["amount_due"],
            "amount_remaining": 0,
            "next_payment_attempt": None,
        }
        invoice["attempted"], invoice["auto_advance"] = True, False
        invoice["status_transitions"]["paid_at"] = self.now

    def _money(self, invoice: Doc, customer: Doc, good: bool) -> Doc:
        """The payment intent (one of each invoice), a charge, and the money that it moves."""
        amount, currency = invoice["amount_due"], invoice["currency"]
        intent = self.world.get("payment_intents", invoice["_payment_intent"])
        if intent is None:
            intent = self._intent(invoice, customer)
            entry = {
                "id": shapes.new_id("invoice_payments"), "object": "invoice_payment", "amount_paid": None,
                "amount_requested": amount,
                "created": self.now, "currency": currency, "invoice": invoice["id"], "is_default": True, "livemode": False,
                "payment": {"payment_intent": intent["id"], "type": "payment_intent"}, "status": "open",
                "status_transitions": {"canceled_at": None, "paid_at": None},
            }  # fmt: skip
            self.world.put("invoice_payments", entry)
        charge = {
            "id": shapes.new_id("charges"), "object": "charge", "amount": amount, "amount_captured": amount if good else 0,
            "amount_refunded": 0, "balance_transaction": None, "billing_details": {"email": customer["email"],
            "name": customer["name"]},
            "captured": good, "created": self.now, "currency": currency, "customer": customer["id"],
            "description": "Subscription",
            "disputed": False, "failure_code": None if good else _DECLINE["code"],
            "failure_message": None if good else _DECLINE["message"], "livemode": False, "metadata": {},
            "outcome": {"network_status": "approved_by_network" if good else "declined_by_network",
            "type": "authorized" if good else "issuer_declined"},
            "paid": good, "payment_intent": intent["id"], "payment_method_details": {"card": {"brand": "visa",
            "last4": "4242"}, "type": "card"},
            "receipt_url": None, "refunded": False, "status": "succeeded" if good else "failed", "_invoice": invoice["id"],
        }  # fmt: skip
        self.world.put("charges", charge)
        intent["latest_charge"] = charge["id"]
        if good:
            intent |= {"status": "succeeded", "amount_received": amount, "last_payment_error": None}
            for entry in self.world.where("invoice_payments", invoice=invoice["id"]):
                entry |= {"status": "paid", "amount_paid": amount}
                entry["status_transitions"]["paid_at"] = self.now
            fee = per_mille(amount, 29, 30)
            charge["balance_transaction"] = self.entry("charge", amount, fee, currency, charge["id"])["id"]
        else:
            intent |= {"status": "requires_payment_method", "last_payment_error": {"type": "card_error", **_DECLINE}}
        return charge

    def _intent(self, invoice: Doc, customer: Doc) -> Doc:
        ref = shapes.new_id("payment_intents")
        return self.world.put("payment_intents", {
            "id": ref, "object": "payment_intent", "amount": invoice["amount_due"], "amount_received": 0, "canceled_at": None,
            "capture_method": "automatic", "client_secret": f"{ref}_secret_{token(25)}", "created": self.now,
            "currency": invoice["currency"], "customer": customer["id"], "last_payment_error": None, "latest_charge": None,
            "livemode": False, "metadata": {}, "payment_method": None, "payment_method_types": ["card"], "status": "processing",
            "_invoice": invoice["id"],
        })  # fmt: skip

    def collect(self, invoice: Doc) -> bool:
        """Try an open invoice again (by the clock, or because somebody asked); whether it is paid now."""
        sub = self.world.get("subscriptions", invoice["_subscription"])
        paid = self._charge(invoice)
        self._tell(invoice, paid)
        if sub is None:
            return paid
        if paid:
            if sub["_waits_for"] == invoice["id"]:
                self._settle_update(sub, applied=True)
            elif sub["status"] in ("past_due", "unpaid", "incomplete"):
                self._status(sub, "active")
        elif sub["_waits_for"] == invoice["id"]:
            return False
        elif invoice["next_payment_attempt"] is None:
            if self.after_retries == "canceled":
                self.end(sub, "payment_failed")
            else:
                self._status(sub, self.after_retries)
        elif sub["status"] == "active":
            self._status(sub, "past_due")
        return paid

    def void(self, invoice: Doc) -> None:
        """Nothing is due any more."""
        invoice |= {"status": "void", "next_payment_attempt": None, "auto_advance": False}
        invoice["status_transitions"]["voided_at"] = self.now
        self.emit("invoice.voided", invoice, None)

    # -- time --------------------------------------------------------------------------------------------------------

    def next_due(self) -> tuple[float, Callable[[], None]] | None:
        """The next thing that happens by itself."""
        return min(self._coming(), key=lambda due: due[0], default=None)

    def _coming(self) -> Iterator[tuple[float, Callable[[], None]]]:
        for sub in self.world.all("subscriptions"):
            if sub["status"] not in ("active", "trialing", "past_due"):
                continue
            ends = sub["items"]["data"][0]["current_period_end"]
            if sub["status"] == "trialing" and not sub["_warned"]:
                yield max(ends - _TRIAL_WARNING, sub["created"]), partial(self._warn, sub)
            yield ends, partial(self._renew, sub)
            if sub["pending_update"]:
                yield sub["pending_update"]["expires_at"], partial(self._settle_update, sub, applied=False)
        for invoice in self.world.all("invoices"):
            if invoice["status"] == "open" and invoice["next_payment_attempt"]:
                yield invoice["next_payment_attempt"], partial(self._try_again, invoice)
        for session in self.world.all("sessions"):
            if session["status"] == "open":
                yield session["expires_at"], partial(self.expire, session)

    def _try_again(self, invoice: Doc) -> None:
        self.collect(invoice)

    def _warn(self, sub: Doc) -> None:
        sub["_warned"] = True
        self.emit("customer.subscription.trial_will_end", sub, None)

    def _renew(self, sub: Doc) -> None:
        item = sub["items"]["data"][0]
        if sub["cancel_at_period_end"]:
            self.end(sub, "cancellation_requested")
            return
        was = sub["status"]
        before: Doc = {"items": copy.deepcopy(sub["items"]), "latest_invoice": sub["latest_invoice"]}
        start = item["current_period_end"]
        if sub["schedule"]:
            self._next_phase(sub, start)
        end = after(start, item["price"]["recurring"]["interval"])
        item |= {"current_period_start": start, "current_period_end": end}
        price, quantity = item["price"], item["quantity"]
        lines: list[Any] = [
            *sub["_pending"],
            (item, price, price["unit_amount"] * quantity, (start, end), f"{quantity} × {price['nickname']}", False),
        ]
        sub["_pending"] = []
        waiting = self.world.where("invoiceitems", customer=sub["customer"], invoice=None)
        items = [one for one in waiting if one["_subscription"] in (None, sub["id"])]
        invoice = self._invoice(sub, "subscription_cycle", lines, items)
        paid = self._charge(invoice)
        after_it = "active" if paid and was == "trialing" else "past_due" if not paid else was
        self._status(sub, after_it, before)
        self._tell(invoice, paid)

    def expire(self, session: Doc) -> None:
        """Nobody paid in time."""
        session |= {"status": "expired", "url": None}
        self.emit("checkout.session.expired", session, None)

    # -- money back and money out --------------------------------------------------------------------------------------

    def refund(self, charge: Doc, amount: int, reason: str | None, metadata: Doc) -> Doc:
        """Pay back. The fee of the charge is kept, as Stripe keeps it."""
        made = {
            "id": shapes.new_id("refunds"), "object": "refund", "amount": amount, "balance_transaction": None,
            "charge": charge["id"],
            "created": self.now, "currency": charge["currency"], "destination_details": {"card": {"type": "refund"},
            "type": "card"},
            "metadata": metadata, "payment_intent": charge["payment_intent"], "reason": reason, "receipt_number": None,
            "source_transfer_reversal": None, "status": "succeeded", "transfer_reversal": None,
        }  # fmt: skip
        self.world.put("refunds", made)
        made["balance_transaction"] = self.entry("refund", -amount, 0, charge["currency"], made["id"])["id"]
        before = {"amount_refunded": charge["amount_refunded"], "refunded": charge["refunded"]}
        charge["amount_refunded"] += amount
        charge["refunded"] = charge["amount_refunded"] == charge["amount"]
        self.emit("refund.created", made, None)
        self.emit("charge.refunded", charge, before)
        return made

    def dispute(self, charge: Doc, reason: str) -> Doc:
        """The bank takes the money back, and a fee."""
        amount = charge["amount"] - charge["amount_refunded"]
        made = {
            "id": shapes.new_id("disputes"), "object": "dispute", "amount": amount, "balance_transactions": [],
            "charge": charge["id"],
            "created": self.now, "currency": charge["currency"], "enhanced_eligibility_types": [], "evidence": {},
            "evidence_details": {"due_by": self.now + 7 * DAY, "has_evidence": False, "past_due": False, "submission_count": 0},
            "is_charge_refundable": False, "livemode": False, "metadata": {}, "payment_intent": charge["payment_intent"],
            "reason": reason, "status": "needs_response",
        }  # fmt: skip
        self.world.put("disputes", made)
        charge["disputed"] = True
        self.emit("charge.dispute.created", made, None)
        made["balance_transactions"].append(
            self.entry("adjustment", -amount, _DISPUTE_FEE, charge["currency"], made["id"])
        )
        self.emit("charge.dispute.funds_withdrawn", made, None)
        return made

    def decide(self, dispute: Doc, won: bool) -> None:
        """The end of a dispute; when it is won the money comes back, the fee does not."""
        before = {"status": dispute["status"]}
        dispute["status"] = "won" if won else "lost"
        if won:
            entry = self.entry("adjustment", dispute["amount"], 0, dispute["currency"], dispute["id"])
            dispute["balance_transactions"].append(entry)
            self.emit("charge.dispute.funds_reinstated", dispute, None)
        self.emit("charge.dispute.closed", dispute, before)

    def entry(self, kind: str, amount: int, fee: int, currency: str, source: str) -> Doc:
        """A balance transaction; ``net`` is always ``amount`` without ``fee``."""
        details = [
            {
                "amount": fee,
                "application": None,
                "currency": currency,
                "description": "Stripe processing fees",
                "type": "stripe_fee",
            }
        ]
        category = {"adjustment": "dispute" if amount < 0 else "dispute_reversal"}.get(kind, kind)
        return self.world.put("balance_transactions", {
            "id": shapes.new_id("balance_transactions"), "object": "balance_transaction", "amount": amount,
            "available_on": self.now + 2 * DAY, "balance_type": "payments", "created": self.now, "currency": currency,
            "description": None, "exchange_rate": None, "fee": fee, "fee_details": details if fee else [], "net": amount - fee,
            "reporting_category": category, "source": source, "status": "pending", "type": kind, "_payout": None,
        })  # fmt: skip

    def payout(self) -> Doc | None:
        """Pay out everything of the currency that has most, itemised as automatic payouts are."""
        open_rows = [
            row for row in self.world.all("balance_transactions") if row["_payout"] is None and row["type"] != "payout"
        ]
        sums: dict[str, int] = {}
        for row in open_rows:
            sums[row["currency"]] = sums.get(row["currency"], 0) + row["net"]
        currency = max(sums, key=lambda name: sums[name], default=None)
        if currency is None or sums[currency] <= 0:
            return None
        made: Doc = {
            "id": shapes.new_id("payouts"), "object": "payout", "amount": sums[currency], "application_fee": None,
            "arrival_date": self.now + 2 * DAY, "automatic": True, "balance_transaction": None, "created": self.now,
            "currency": currency, "description": "STRIPE PAYOUT", "destination": "ba_1" + token(23), "failure_code": None,
            "failure_message": None, "livemode": False, "metadata": {}, "method": "standard",
            "reconciliation_status": "in_progress",
            "source_type": "card", "statement_descriptor": None, "status": "pending",
            "trace_id": {"status": "pending", "value": None}, "type": "bank_account",
        }  # fmt: skip
        self.world.put("payouts", made)
        for row in open_rows:
            if row["currency"] == currency:
                row |= {"_payout": made["id"], "status": "available"}
        entry = self.entry("payout", -sums[currency], 0, currency, made["id"])
        entry |= {"_payout": made["id"], "status": "available"}
        made["balance_transaction"] = entry["id"]
        self.emit("payout.created", made, None)
        made |= {"status": "paid", "trace_id": {"status": "supported", "value": token(15, "0123456789")}}
        self.emit("payout.paid", made, None)
        made["reconciliation_status"] = "completed"
        self.emit("payout.reconciliation_completed", made, None)
        return made


def _summed(rows: list[Doc], bp: int) -> list[Doc]:
    taxes = [entry for row in rows for entry in row["taxes"]]
    if not taxes:
        return []
    base = sum(entry["taxable_amount"] for entry in taxes)
    return [shapes.tax_row(base, sum(entry["amount"] for entry in taxes), bp)]


def _day(seconds: int) -> str:
    import time

    return time.strftime("%d %b %Y", time.gmtime(seconds))
