"""One organization, one subscription: of two pages that were both paid the first one stays, and the other's money goes back.

    a page is paid ─► every other open page of the organization is closed at its provider (a call, ``close``)
    one of those is paid all the same ─► its subscription is marked (``beside``), ended, and every payment of it refunded

Whoever decides holds the organization, so one page is the first, however many workers there are. What is to be done is written
down as calls (``calls.py``) in the same transaction, each once. A mark stays: what is told later of a payment goes back, too. A
subscription that is marked gives no plan, and is nobody's to change.
"""

from __future__ import annotations

from typing import Any, Final

from portico.control.audit import service as audit
from portico.control.billing import billing_store, checkout_store, endings
from portico.control.billing.billing_store import Source
from portico.control.billing.subscription_states import TERMINAL
from portico.control.billing.subscriptions import WORKER
from portico.control.identity import payer_mail
from portico.control.notifications import channels
from portico.kit.db import Tx
from portico.kit.ids import new_id
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

#: What channels, and whoever pays, hear.
TOPIC: Final = "subscription.double"
REASON: Final = "the organization has another subscription"


def alive(row: Any) -> bool:
    """Whether a subscription was begun and is not over."""
    return row.status not in TERMINAL and row.status != "pending"


class Doubles:
    """The verb. One for each process; holds no state."""

    def __init__(self, settings: ApiSettings, sealer: Sealer) -> None:
        self._settings, self._sealer = settings, sealer

    async def settle(self, tx: Tx, organization: str) -> None:
        """Bring pages and subscriptions of an organization, which the caller holds, to where they belong now."""
        rows = await billing_store.subscriptions_of(tx, organization)
        closed = await checkout_store.closed(tx, organization)
        there = {"", *(row.id for row in rows if alive(row))}
        for row in rows:
            other = closed.get((Source.of(row), row.ref))
            # Where the first one is over by now, this one takes its place.
            if other is not None and row.beside is None and other != row.id and other in there:
                await self._mark(tx, row, other)
        if closed:
            rows = await billing_store.subscriptions_of(tx, organization)
        for row in rows:
            if row.beside is not None:
                await self._give_back(tx, row)
        bought = [row for row in rows if alive(row) and row.beside is None]
        first = next((row for row in bought if row.checkout_plan is not None), None)
        if first is not None:
            await self._close_pages(tx, organization, first.id, {(Source.of(row), row.ref) for row in bought})

    @staticmethod
    async def _close_pages(tx: Tx, organization: str, first: str, kept: set[tuple[Source, str]]) -> None:
        """Have every open page closed but those that led to what is ``kept``: these are completed, whether or not the provider
        says so (Razorpay's list of what it has tells of no page)."""
        for page in await checkout_store.open_pages(tx, organization):
            if (Source.of(page), page.subscription_ref) in kept:
                await checkout_store.ended(tx, page.id, "completed", {})
            else:
                arguments = {"ref": page.ref, "first": first}
                await endings.ask(tx, page, "close", page.id, f"close:{page.id}", arguments)

    async def _mark(self, tx: Tx, row: Any, first: str) -> None:
        """A subscription of a page that was to be closed, unless nobody paid for it. ``first`` empty: its organization went."""
        if not alive(row) and not await billing_store.payments_for(tx, row.id):
            return
        await billing_store.beside(tx, row.id, first)
        await endings.end(tx, row, f"double:{row.id}", REASON)
        facts = {"subscription": row.id, "first": first, "provider": row.provider}
        await audit.record(tx, WORKER, "subscription.double", row.id, details=facts, organization=row.organization_id)
        key = f"double:{row.id}"
        await channels.notify(tx, self._sealer, row.organization_id, TOPIC, facts, key)
        about = {**facts, "console": self._settings.api_url}
        await payer_mail.send(tx, self._sealer, row.organization_id, TOPIC, about, key)

    @staticmethod
    async def _give_back(tx: Tx, row: Any) -> None:
        """Have what is left of every payment of a subscription refunded, once each."""
        for payment in await billing_store.payments_for(tx, row.id):
            key = f"double:{payment.id}"
            if await checkout_store.call_by_request(tx, payment.organization_id, key) is not None:
                continue
            await checkout_store.hold_payment(tx, None, payment.id)
            amount = payment.amount_minor - await checkout_store.refunded(tx, payment.id)
            if amount <= 0:
                continue
            made = new_id("rfd")
            await checkout_store.add_refund(tx, {
                "id": made, "organization_id": payment.organization_id, "payment_id": payment.id,
                **Source.of(payment).columns, "amount_minor": amount, "currency": payment.currency, "reason": REASON,
            })  # fmt: skip
            arguments = {
                "payment": payment.id, "asked_minor": None, "reason": REASON, "ref": payment.ref, "amount_minor": amount,
                "currency": payment.currency,
            }  # fmt: skip
            await endings.ask(tx, payment, "refund", made, key, arguments)
            facts = {"payment": payment.id, "amount_minor": amount, "currency": payment.currency, "reason": REASON}
            await audit.record(tx, WORKER, "refund.create", made, details=facts, organization=payment.organization_id)
