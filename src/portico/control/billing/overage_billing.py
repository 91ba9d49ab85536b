"""Use beyond a plan becomes a charge, once, when its month is over.

    month over ─► terms kept (closing) ─► charge `priced` and a call ─► on the provider's next invoice: `charged`
                                                  └─ the provider cannot ─► an invoice of our own, unpaid: `charged`

Limits are of calendar months (UTC), so that is what is priced, whatever day a subscription began on; a charge is on the invoice
of the subscription's next period, or on one of its own when that is far away or will not come. Terms are those of whoever paid
for the plan at the end of the month, and stay: what relays report later of that month is a charge of a later month, by the same
terms.

Everything is decided in one transaction for each organization, with the organization held: a crash before its commit leaves no
trace, and what it has written is asked of the provider by ``calls``, under a reference that the provider is asked for first.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import date, timedelta
from functools import partial
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.billing import (
    billing_store,
    booking,
    checkout_store,
    endings,
    invoice_store,
    overage,
    subscription_states,
    tax,
    tax_ids,
)  # fmt: skip
from portico.control.billing import overage_store as store
from portico.control.billing.dunning import WORKER
from portico.control.billing.entitlement import Entitlement
from portico.control.billing.overage import Overage
from portico.control.billing.provider import Ability, Name, Providers
from portico.control.billing.subscription_states import ENTITLED, TERMINAL
from portico.control.finance import events, postings
from portico.control.finance.events import FinanceEvent, Line
from portico.control.identity import plans
from portico.control.tunnels.standing import midnight, month_of, next_month
from portico.errors import Problem
from portico.kit.canonical import MAX_INTEGER
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

#: Organizations that one look is for.
ROUND: Final = 200
#: Months back that a round looks at: workers may have been away, and relays report for up to 31 days.
BACK: Final = 3
#: Why a charge waits for a person: it is larger than ``overage_review_minor``.
REVIEW: Final = "needs_review"


def month_before(month: date) -> date:
    """The month before, by its first day."""
    return (month - timedelta(days=1)).replace(day=1)


class OverageBilling:
    """The verbs on charges for use. One for each process."""

    def __init__(
        self, settings: ApiSettings, clock: Clock, shown: Overage, entitlement: Entitlement, providers: Providers
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._prices = shown.prices
        self._entitlement = entitlement
        self._providers = providers
        self._book = booking.Booking()

    # -- by the clock

    async def round(self, db: Database) -> int:
        """Price what is over, and what came late; how many months of organizations. Any number of workers may."""
        over = month_before(month_of(self._clock.wall() - timedelta(seconds=self._settings.overage_lag_seconds)))
        months = [over]
        while len(months) < BACK:
            months.insert(0, month_before(months[0]))
        count = 0
        for month in months:
            span = midnight(month), next_month(month)
            count += await self._each(db, partial(store.due, month=month, span=span), partial(self.close, month=month))
            if month != over:
                late = partial(store.late, month=month, over=over)
                count += await self._each(db, late, partial(self.correct, month=month, over=over))
        return count

    async def _each(
        self, db: Database, find: Callable[..., Awaitable[list[str]]], act: Callable[..., Awaitable[int]]
    ) -> int:
        """Do something with each organization that is found, each in a transaction of its own."""
        count, after = 0, ""
        while True:
            async with db.read() as reader:
                found = await find(reader, after=after, limit=ROUND)
            for organization in found:
                try:
                    async with db.transaction() as tx:
                        count += await act(tx, organization)
                except Exception:
                    # One that fails is no reason for the others to wait; it is due still.
                    log.exception("use was not priced", extra={"f": {"organization": organization}})
            if len(found) < ROUND:
                return count
            after = found[-1]

    async def leave(self, tx: Tx, organization: str) -> int:
        """Price what an organization used that goes now; always 0: nothing is left to do another time."""
        if not await billing_store.subscriptions_of(tx, organization):
            return 0
        this = month_of(self._clock.wall())
        for month in (month_before(this), this):
            await self.close(tx, organization, month, leaving=True)
        return 0

    async def close(self, tx: Tx, organization: str, month: date, *, leaving: bool = False) -> int:
        """Price a month of an organization; 0: that was done before."""
        held = await plans.hold(tx, organization)
        payer = await self._payer(tx, organization, month)
        plan, terms = None, list[dict[str, Any]]()
        if held is not None and payer is not None:
            plan, terms = await self._terms(tx, held[0], payer[1], payer[2])
        subscription = payer[0] if payer is not None else None
        if not await store.close(
            tx, organization, month, subscription.id if subscription is not None else None, plan, terms
        ):
            return 0
        if subscription is not None:
            await self._price(tx, subscription, str(plan), terms, month, month, leaving=leaving)
        return 1

    async def correct(self, tx: Tx, organization: str, month: date, over: date) -> int:
        """Price what was reported of ``month`` since, as part of the month ``over``."""
        await plans.hold(tx, organization)
        closing = await store.hold_closing(tx, organization, month)
        if closing is None or closing.looked_on >= over:
            return 0
        subscription = await billing_store.subscription_by_id(tx, closing.subscription_id)
        await self._price(tx, subscription, closing.plan, closing.terms, month, over)
        await store.looked(tx, organization, month, over)
        return 1

    # -- by whose terms

    async def _payer(self, reader: Reader, organization: str, month: date) -> tuple[Any, str, int | None] | None:
        """The subscription that a month is charged to, with its plan at the end of it: one that had the plan then, else the last
        that had it before; of several the dearest plan."""
        start, end = midnight(month), next_month(month)
        position = {plan.id: plan.position for plan in await plans.current(reader)}
        best: tuple[Any, tuple[Any, str, int | None]] | None = None
        for row in await billing_store.subscriptions_of(reader, organization):
            said = await billing_store.snapshots(reader, row.id)
            before, _ = subscription_states.derive(each for each in said if each.occurred_at < start)
            then, _ = subscription_states.derive(each for each in said if each.occurred_at < end)
            within = any(each.status in ENTITLED for each in said if start <= each.occurred_at < end)
            plan, version = self._entitlement.plan_by(row, then.plan_ref)
            if plan is None or row.beside is not None or not (within or before.status in ENTITLED):
                continue
            has, since, worth = then.status in ENTITLED, (then.status_at or start).timestamp(), position.get(plan, 0)
            rank = (has, worth, since, row.ref) if has else (has, since, worth, row.ref)
            if best is None or rank > best[0]:
                best = rank, (row, plan, version)
        return best[1] if best is not None else None

    async def _terms(
        self, tx: Tx, held: plans.Entitlements, plan: str, version: int | None
    ) -> tuple[str, list[dict[str, Any]]]:
        """The plan that counts, and its limits that have a price.

        What an operator gave an organization counts, as it is what it is shown; what billing gave it since does not.
        """
        limits, hard_cap = held.limits, held.hard_cap
        if held.plan != plan:
            given = await billing_store.standing(tx, held.organization)
            if given is None or given.plan != held.plan:
                plan = held.plan
            elif (bought := await plans.one(tx, plan, version)) is not None:
                limits, hard_cap = bought.limits, bought.hard_cap
        if hard_cap:
            return plan, []
        return plan, [
            {
                "limit": price.limit, "allowed": allowed, "currency": price.currency,
                "amount_minor": price.amount_minor, "per": price.per,
            }
            for price in self._prices.get(plan, ())
            if (allowed := limits.get(price.limit)) is not None
        ]  # fmt: skip

    # -- what it comes to

    async def _price(
        self, tx: Tx, subscription: Any, plan: str, terms: Sequence[Mapping[str, Any]], month: date, billed: date,
        *, leaving: bool = False,
    ) -> None:  # fmt: skip
        if not terms:
            return
        organization = subscription.organization_id
        used = await overage.counted(tx, organization, month)
        known = await store.quantities(tx, organization, month)
        for term in terms:
            name = term["limit"]
            units = overage.begun(used[name], term["allowed"], term["per"]) - known.get(name, 0)
            if units <= 0:
                continue
            amount = min(units * term["amount_minor"], MAX_INTEGER)
            row = await store.add(tx, {
                "organization_id": organization, "subscription_id": subscription.id, "provider": subscription.provider,
                "plan": plan, "metric": name, "month": month, "billed_month": billed,
                "description": describe(name, units, term["per"], plan, month, late=month != billed),
                "used": used[name], "allowed": term["allowed"], "quantity": units, "unit_minor": term["amount_minor"],
                "amount_minor": amount, "currency": term["currency"], "created_at": self._clock.wall(),
            })  # fmt: skip
            facts = {"metric": name, "month": str(month), "amount_minor": amount, "currency": row.currency}
            await audit.record(tx, WORKER, "overage.price", row.id, details=facts, organization=organization)
            if amount > self._settings.overage_review_minor:
                log.error("a charge for use waits for a person", extra={"f": {"charge": row.id, **facts}})
                await store.failed(tx, row.id, REVIEW)
            elif amount == 0:
                await store.waived(tx, row.id, "priced", "free")
            else:
                await self._have_charged(tx, row, subscription, leaving=leaving)

    async def _have_charged(self, tx: Tx, row: Any, subscription: Any, *, leaving: bool = False) -> None:
        """Have the provider put a charge that is ``priced`` on an invoice, or make one of our own."""
        can = self._can(subscription.provider)
        if can is None:
            await store.failed(tx, row.id, "billing.provider_unconfigured")
            return
        alone = leaving or self._comes_no_more(subscription)
        if ("charge_now" if alone else "charge") not in can:
            await self._own_invoice(tx, row, subscription)
            return
        held = await store.asked(tx, row.id, "priced")
        assert held is not None, "whoever calls holds the organization"
        await endings.ask(tx, subscription, "overage", row.id, f"overage:{row.id}:{held.attempts}", {
            "reference": row.id, "subscription_ref": subscription.ref, "customer_ref": subscription.customer_ref,
            "description": row.description, "amount_minor": row.amount_minor, "currency": row.currency,
            "period_start": midnight(row.month).isoformat(), "period_end": next_month(row.month).isoformat(),
            "since": row.created_at.isoformat(), "at_once": alone,
        })  # fmt: skip

    def _can(self, provider: Name) -> frozenset[Ability] | None:
        try:
            return self._providers.of(provider).can
        except Problem:
            return None

    def _comes_no_more(self, subscription: Any) -> bool:
        """Whether the next invoice of a subscription does not come, or not soon (a plan that is paid by the year)."""
        if subscription.status in TERMINAL or subscription.cancel_at_period_end or subscription.period_end is None:
            return True
        return bool(subscription.period_end > self._clock.wall() + timedelta(days=self._settings.overage_wait_days))

    async def _own_invoice(self, tx: Tx, row: Any, subscription: Any) -> None:
        """An invoice that no provider collects: numbered, booked and open."""
        seller, profile = await invoice_store.entity(tx), await invoice_store.profile(tx, row.organization_id)
        found = tax_ids.best(profile)
        customer = tax.Customer()
        if profile is not None:
            customer = tax.Customer(profile.country, found["value"] if found else None, profile.exempt)
        wanted = tax.assess(seller.country, seller.rates, customer)
        taxed = tax.of(row.amount_minor, wanted.rate_bp, seller.rounding)
        start, end, now = midnight(row.month), next_month(row.month), self._clock.wall()
        line = Line(
            row.description,
            row.quantity,
            row.unit_minor,
            row.amount_minor,
            taxed,
            wanted.rate_bp,
            start,
            end,
            kind="overage",
        )
        event = FinanceEvent(
            provider="platform", account=subscription.account, livemode=subscription.livemode, event_id=row.id,
            event_type="overage.invoiced", api_version=None, kind="invoice.issued", occurred_at=now, received_at=now,
            raw_sha256=hashlib.sha256(row.id.encode()).digest(), effect_key=f"invoice.issued:platform:{row.id}",
            organization_id=row.organization_id, subscription_ref=subscription.ref, invoice_ref=row.id,
            amount_minor=row.amount_minor + taxed, tax_minor=taxed, net_minor=row.amount_minor, currency=row.currency,
            period_start=start, period_end=end, lines=(line,),
        )  # fmt: skip
        if await events.record(tx, event):
            await postings.post(tx, event)
            await self._book.book(tx, event, subscription)
        await store.charged(tx, row.id, invoice=await invoice_store.id_of(tx, event))

    # -- by hand

    async def waive(self, tx: Tx, caller: Caller, charge: str, reason: str) -> Any:
        """Let nobody pay a charge that no provider was asked for, or that failed.

        Raises ``overage.not_found``, ``overage.state``.
        """
        row = await self._found(tx, charge)
        if row.state == "priced" and await checkout_store.withdraw(tx, "overage", charge, untried=True) == 0:
            raise Problem("overage.state", "the provider is being asked for it", state=row.state)
        after = await store.waived(tx, charge, row.state, reason) if row.state in ("priced", "failed") else None
        if after is None:
            raise Problem("overage.state", f"the charge is {row.state}", state=row.state)
        await self._by_hand(tx, caller, "overage.waive", row, reason)
        return after

    async def retry(self, tx: Tx, caller: Caller, charge: str) -> Any:
        """Have a charge that failed charged after all. Raises ``overage.not_found``, ``overage.state``."""
        row = await self._found(tx, charge)
        if await store.asked(tx, charge, "failed") is None:
            raise Problem("overage.state", f"the charge is {row.state}, not failed", state=row.state)
        subscription = await billing_store.subscription_by_id(tx, row.subscription_id)
        await self._have_charged(tx, await store.one(tx, charge), subscription)
        await self._by_hand(tx, caller, "overage.retry", row, row.reason)
        return await store.one(tx, charge)

    async def _found(self, tx: Tx, charge: str) -> Any:
        row = await store.one(tx, charge)
        if row is None:
            raise Problem("overage.not_found")
        await plans.hold(tx, row.organization_id)
        return await store.one(tx, charge)

    @staticmethod
    async def _by_hand(tx: Tx, caller: Caller, action: str, row: Any, reason: str | None) -> None:
        details = {"before": row.state, "amount_minor": row.amount_minor, "currency": row.currency, "reason": reason}
        for organization in (row.organization_id, audit.INSTALLATION):
            await audit.record(tx, caller, action, row.id, details=details, organization=organization)


def describe(limit: str, units: int, per: int, plan: str, month: date, *, late: bool) -> str:
    """A charge as an invoice has it: ``12 × 1 GiB beyond the plan pro, 2026-11``."""
    if limit == "bytes_per_month":
        size, unit = per, "bytes"
        for larger in ("KiB", "MiB", "GiB", "TiB"):
            if size % 1024:
                break
            size, unit = size // 1024, larger
        what = f"{size:,} {unit}"
    else:
        what = f"{per:,} requests"
    return f"{units:,} × {what} beyond the plan {plan}, {month.isoformat()[:7]}{' (reported late)' if late else ''}"
