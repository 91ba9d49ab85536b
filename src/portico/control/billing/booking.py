"""What an event is to payments, refunds, failed attempts and invoices; the ledger itself is in ``finance``."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import datetime
from typing import Any

from portico.control.billing import billing_store, checkout_store, invoices
from portico.control.billing.billing_store import Source
from portico.control.finance import events, postings
from portico.control.finance.events import FinanceEvent
from portico.kit.db import Tx
from portico.kit.ids import new_id


async def of_payment(tx: Tx, event: FinanceEvent, payment: Any) -> FinanceEvent:
    """A refund or dispute with what is known of its payment."""
    subscription = None
    if payment.subscription_id is not None:
        subscription = await billing_store.subscription_by_id(tx, payment.subscription_id)
    return replace(
        event,
        invoice_ref=event.invoice_ref or payment.invoice_ref,
        subscription_ref=event.subscription_ref or (subscription.ref if subscription is not None else None),
        currency=event.currency or payment.currency,
    )


class Booking:
    """The verbs on what money an event is about."""

    async def book(self, tx: Tx, event: FinanceEvent, subscription: Any | None) -> None:
        """Write what follows from ``event``, which is recorded and posted."""
        await invoices.follow(tx, event)
        handler = getattr(self, "_" + postings.kind_of(event).replace(".", "_"), None)
        if handler is not None:
            await handler(tx, event, subscription)

    async def _payment_succeeded(self, tx: Tx, event: FinanceEvent, subscription: Any | None) -> None:
        ref = event.payment_ref or event.invoice_ref or event.effect_key
        invoice = await invoices.hold(tx, event)
        await billing_store.add_payment(tx, {
            "organization_id": event.organization_id,
            **Source.of(event).columns,
            "ref": ref,
            "subscription_id": subscription.id if subscription is not None else None,
            "invoice_ref": event.invoice_ref or event.payment_ref,
            "invoice_id": invoice.id if invoice is not None else None,
            "currency": event.currency,
            "amount_minor": event.amount_minor or 0,
            "tax_minor": event.tax_minor or 0,
            "fee_minor": event.fee_minor or 0,
            "paid_at": event.occurred_at,
        })  # fmt: skip

    async def _payment_failed(self, tx: Tx, event: FinanceEvent, subscription: Any | None) -> None:
        if subscription is None or event.currency is None:
            return
        await billing_store.add_failure(tx, {
            "effect_key": f"{event.source} {event.effect_key}",
            "organization_id": event.organization_id,
            "subscription_id": subscription.id,
            "invoice_ref": event.invoice_ref,
            "currency": event.currency,
            "amount_minor": event.amount_minor or 0,
            "attempt": event.attempt or 1,
            "occurred_at": event.occurred_at,
            "next_attempt_at": event.next_attempt_at,
            "is_final": bool(event.is_final_attempt),
            "failure_code": event.failure_code,
        })  # fmt: skip

    async def _refund_succeeded(self, tx: Tx, event: FinanceEvent, subscription: Any | None) -> None:
        await self._refund(tx, event, "succeeded")

    async def _refund_failed(self, tx: Tx, event: FinanceEvent, subscription: Any | None) -> None:
        await self._refund(tx, event, "failed")

    async def _refund(self, tx: Tx, event: FinanceEvent, state: str) -> None:
        """The row of a refund, made if the refund was begun at the provider. A failure is the last word, whenever it comes."""
        source = Source.of(event)
        if event.refund_ref is None or event.payment_ref is None:
            return
        row = await checkout_store.refund_by_ref(tx, source, event.refund_ref)
        if row is not None:
            if row.state != "failed":
                await checkout_store.put_refund(tx, row.id, state=state)
            return
        payment = await billing_store.payment(tx, source, event.payment_ref)
        if payment is None or not event.amount_minor:
            return
        await checkout_store.add_refund(tx, {
            "id": new_id("rfd"),
            "organization_id": payment.organization_id,
            "payment_id": payment.id,
            **source.columns,
            "ref": event.refund_ref,
            "state": state,
            "amount_minor": event.amount_minor,
            "currency": event.currency or payment.currency,
        })  # fmt: skip

    async def write_off(self, tx: Tx, subscription: Any, case: Any, now: datetime) -> None:
        """Nobody will pay what a case is about: its invoices become bad debt, by an event of our own. Its effect is that of the
        provider's word that it gave up, should that come, too."""
        for row in await billing_store.debts(tx, subscription.id):
            ref = row["invoice_ref"]
            if row["currency"] != case.currency or not ref:
                continue
            event = FinanceEvent(
                provider=subscription.provider,
                account=subscription.account,
                livemode=subscription.livemode,
                event_id=case.id,
                event_type="dunning.written_off",
                api_version=None,
                kind="invoice.uncollectible",
                occurred_at=now,
                received_at=now,
                raw_sha256=hashlib.sha256(f"{case.id} {ref}".encode()).digest(),
                effect_key=f"invoice.uncollectible:{subscription.provider}:{ref}",
                organization_id=subscription.organization_id,
                customer_ref=subscription.customer_ref,
                subscription_ref=subscription.ref,
                invoice_ref=ref,
                currency=case.currency,
            )
            if await events.record(tx, event):
                await postings.post(tx, event)
                await self.book(tx, event, subscription)
