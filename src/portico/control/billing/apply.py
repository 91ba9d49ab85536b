"""One finance event into everything that follows from it, in the caller's transaction.

    event ─► whose? ─► its base here? ─► finance event ─► ledger ─► subscription ─► invoice ─► dunning ─► plan ─► notices
                └──────── no: waits (waiting.py), and is applied with what it waits for

What is promised:

- **Each effect once.** ``finance.events`` has one row of an effect, and everything else is written with that row.
- **The set decides, not the order.** Whatever order the events of a history come in, and however often each, the subscription,
  the plan, the ledger and the invoices end the same: states are folded from everything that was said, the ledger's postings
  commute, debts are looked up, and what lacks its base waits.
- **All or nothing.** Nothing is written elsewhere and nothing is called: a crash at any statement leaves no trace.

An event that a state machine does not admit changes no state and is kept: ``Ignored("illegal_transition")``, loudly.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Final

from portico.control.billing import (
    billing_store,
    booking,
    checkout_store,
    customers,
    endings,
    recurring,
    subscriptions,
    waiting,
    webhook_store,
)
from portico.control.billing.billing_store import Source
from portico.control.billing.customers import MappingConflict
from portico.control.billing.doubles import Doubles
from portico.control.billing.dunning import Dunning
from portico.control.billing.dunning_notices import Notices
from portico.control.billing.entitlement import Entitlement
from portico.control.finance import events, postings
from portico.control.finance.events import FinanceEvent
from portico.control.identity import plans
from portico.control.identity.plan_service import Plans
from portico.kit.clock import Clock
from portico.kit.db import Tx
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

#: Kinds about our account at the provider, which belong to no organization.
OURS: Final = ("payout.",)
#: Kinds that change a payment, which must be here first.
_AFTER_PAYMENT: Final = ("refund.", "dispute.")
#: Kinds by which a page may turn out to be paid.
_BUYING: Final = ("checkout.", "subscription.", "payment.")
#: Reasons for which an event changed no state, and is recorded all the same: it may be the base of others.
_KEPT: Final = frozenset({"superseded", "illegal_transition"})


@dataclass(frozen=True, slots=True)
class Applied:
    """It was new. ``woken``: effects that had waited for it, and came with it."""

    woken: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ignored:
    """It changed nothing, or not yet: ``duplicate_effect``, ``superseded``, ``illegal_transition``, ``mapping_conflict``, or
    ``waiting`` for its base, with which it will be applied."""

    reason: str


class Applier:
    """Applies events. One for each process; holds no state."""

    def __init__(self, settings: ApiSettings, clock: Clock, sealer: Sealer, service: Plans) -> None:
        self.dunning = Dunning(settings, clock, Notices(settings, sealer))
        self.entitlement = Entitlement(settings, service)
        self.doubles = Doubles(settings, sealer)
        self._book = booking.Booking()
        self._settings, self._clock = settings, clock

    async def apply(self, tx: Tx, event: FinanceEvent) -> Applied | Ignored:
        """Apply ``event``, and what waited for it. Locks what it names, then its organization."""
        await billing_store.lock(tx, waiting.keys(event))
        outcome = await self._one(tx, event)
        if isinstance(outcome, Ignored) and outcome.reason not in _KEPT:
            return outcome
        woken = tuple(await self.wake(tx, waiting.keys(event)))
        return Applied(woken) if isinstance(outcome, Applied) else outcome

    async def wake(self, tx: Tx, keys: list[str]) -> list[str]:
        """Apply what waits for one of ``keys``, which the caller holds, and what waits for that; their effects."""
        woken, brought = list[str](), list(keys)
        while found := await waiting.unpark(tx, brought):
            brought = []
            for event in found:
                await billing_store.lock(tx, waiting.keys(event))
                outcome = await self._one(tx, event)
                if isinstance(outcome, Applied) or outcome.reason in _KEPT:
                    webhook_store.came(tx, event.provider, event.account, event.livemode, event.event_id)
                    woken.append(event.effect_key)
                    brought += waiting.keys(event)
        return woken

    async def _one(self, tx: Tx, event: FinanceEvent) -> Applied | Ignored:
        if event.kind.startswith(OURS):
            return await self._ours(tx, event)
        try:
            organization = await customers.organization_of(tx, event)
        except MappingConflict:
            return Ignored("mapping_conflict")
        if organization is None:
            return await self._wait(tx, event, waiting.keys(event, customers.BY))
        # Whoever changes what an organization has holds it; it may be gone, and its money is booked all the same.
        known = await plans.hold(tx, organization) is not None
        event = replace(event, organization_id=organization)
        if event.kind.startswith(_AFTER_PAYMENT) and event.payment_ref is not None:
            payment = await billing_store.payment(tx, Source.of(event), event.payment_ref)
            if payment is None:
                return await self._wait(tx, event, waiting.keys(event, ("payment_ref",)))
            event = await booking.of_payment(tx, event, payment)
        await customers.learn(tx, organization, event)
        if not await events.record(tx, event):
            return Ignored("duplicate_effect")
        await billing_store.unparked(tx, event)
        return await self._effects(tx, event, organization, known)

    async def _effects(self, tx: Tx, event: FinanceEvent, organization: str, known: bool) -> Applied | Ignored:
        outcome: Applied | Ignored = Applied()
        row = await subscriptions.of(tx, organization, event)
        if event.kind.startswith(subscriptions.SNAPSHOTS) and row is not None:
            said = await subscriptions.say(tx, row, event)
            row, outcome = said.after, _outcome(said.outcome, event)
        if event.kind.startswith("checkout."):
            await self._checkout(tx, event)
        await postings.post(tx, event)
        await self._book.book(tx, event, row)
        await self._follow(tx, event, row, organization, known=known)
        if row is not None:
            await recurring.follow(tx, row, event, self.entitlement.plan(row)[0])
            await self.settle(tx, row, known=known, reason=event.kind)
        elif known:
            await self.entitlement.settle(tx, organization, event.kind)
        return outcome

    async def _follow(self, tx: Tx, event: FinanceEvent, row: Any | None, organization: str, *, known: bool) -> None:
        """Have subscriptions ended that nobody should pay for: bought beside another one, of an organization that is gone, or
        one of whose payments somebody took back."""
        if row is not None and not known:
            await endings.gone(tx, row)
        lost = postings.kind_of(event) == "dispute.lost" and self._settings.dispute_ends_subscription
        if row is not None and lost:
            await endings.end(tx, row, f"dispute:{row.id}:{event.dispute_ref}", "a payment was disputed and lost")
        if event.kind.startswith(_BUYING):
            await self.doubles.settle(tx, organization)

    async def settle(self, tx: Tx, subscription: Any, *, known: bool, reason: str) -> None:
        """Bring dunning and the plan to where they belong now; for the clock, too. ``known``: the organization is there, and
        held."""
        for case in await self.dunning.settle(tx, subscription):
            await self._book.write_off(tx, subscription, case, self._clock.wall())
            await endings.end(tx, subscription, f"dunning:{case.id}", "it was not paid")
        if known:
            await self.entitlement.settle(tx, subscription.organization_id, reason)

    async def _ours(self, tx: Tx, event: FinanceEvent) -> Applied | Ignored:
        if not await events.record(tx, event):
            return Ignored("duplicate_effect")
        await postings.post(tx, event)
        return Applied()

    @staticmethod
    async def _wait(tx: Tx, event: FinanceEvent, needs: list[str]) -> Ignored:
        if not needs:
            return Ignored("unmapped")
        await waiting.park(tx, event, needs)
        return Ignored("waiting")

    @staticmethod
    async def _checkout(tx: Tx, event: FinanceEvent) -> None:
        """The page on which it was bought, by what the provider calls it."""
        source, page = Source.of(event), None
        if event.checkout_ref is not None:
            page = await checkout_store.by_ref(tx, source, event.checkout_ref)
        elif event.subscription_ref is not None:
            page = await checkout_store.by_subscription(tx, source, event.subscription_ref)
        if page is None:
            return
        state = {"checkout.completed": "completed", "checkout.expired": "expired"}.get(event.kind, "failed")
        learned = {"customer_ref": event.customer_ref, "subscription_ref": event.subscription_ref}
        await checkout_store.ended(tx, page.id, state, {name: ref for name, ref in learned.items() if ref is not None})


def _outcome(said: str, event: FinanceEvent) -> Applied | Ignored:
    if said == "illegal":
        log.error("a subscription cannot go there", extra={"f": {"event": event.event_id, "status": event.status}})
        return Ignored("illegal_transition")
    return Applied() if said == "moved" else Ignored("superseded")
