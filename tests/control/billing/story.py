"""A provider's events as tests of billing need them, about an organization and an account of their own; and what they led to."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from portico.control.billing import billing_store, checkout_store
from portico.control.billing.apply import Applied, Applier, Ignored
from portico.control.billing.billing_store import Source
from portico.control.finance.events import FinanceEvent, Line
from portico.control.identity import tables
from portico.kit.db import Database
from portico.kit.ids import new_id

_numbers = itertools.count(1)
PRICES = ("pro=price_pro", "team=price_team")


class Story:
    """The events of one organization at Stripe. Times are minutes before now, so that the clock takes nothing away."""

    def __init__(self, db: Database, applier: Applier, provider: str = "stripe") -> None:
        self.db, self.applier, self.provider = db, applier, provider
        self.organization = new_id("org")
        self.source = Source(provider, f"acct_{next(_numbers)}_{new_id('x')}", False)
        self.start = datetime.now(UTC) - timedelta(hours=6)
        self._made = itertools.count(1)
        # The ledger knows invoices and payments by what their provider calls them, which is unique there.
        self.tag = self.organization[-10:]

    def __call__(self, kind: str, minute: int, about: str = "", **more: Any) -> FinanceEvent:
        """An event whose effect is ``about`` something; every one names customer and subscription unless told otherwise."""
        number = next(self._made)
        known: dict[str, Any] = {
            "provider": self.provider, **self.source.columns, "event_id": f"evt_{number}", "event_type": kind,
            "api_version": None, "kind": kind, "occurred_at": self.start + timedelta(minutes=minute),
            "received_at": self.start + timedelta(minutes=minute), "raw_sha256": hashlib.sha256(kind.encode()).digest(),
            "effect_key": f"{kind}:{self.provider}:{about or number}", "customer_ref": "cus_1", "subscription_ref": "sub_1",
        }  # fmt: skip
        for name in {"invoice_ref", "payment_ref"} & more.keys():
            more[name] = more[name] and f"{more[name]}_{self.tag}"
        return FinanceEvent(**{**known, **more})

    def state(self, minute: int, status: str, **more: Any) -> FinanceEvent:
        """A snapshot of the subscription."""
        facts = {"plan_ref": "price_pro", "period_start": self.start, "period_end": self.start + timedelta(days=30)}
        version = int((self.start + timedelta(minutes=minute)).timestamp() * 1_000_000)
        return self(
            "subscription.updated", minute, f"{minute}", status=status, object_version=version, **{**facts, **more}
        )

    def invoice(self, minute: int, ref: str, amount: int = 1190, tax: int = 190) -> FinanceEvent:
        line = Line("Pro", 1, amount - tax, amount - tax, tax, 1900, self.start, self.start + timedelta(days=30))
        return self(
            "invoice.issued", minute, ref, invoice_ref=ref, amount_minor=amount, tax_minor=tax, currency="EUR",
            net_minor=amount - tax, lines=(line,), plan_ref="price_pro", invoice_number=ref.upper(),
        )  # fmt: skip

    def paid(self, minute: int, invoice: str, payment: str, amount: int = 1190) -> FinanceEvent:
        return self(
            "payment.succeeded", minute, payment, invoice_ref=invoice, payment_ref=payment, amount_minor=amount,
            tax_minor=190, fee_minor=31, net_minor=amount - 31, currency="EUR",
        )  # fmt: skip

    def failed(
        self, minute: int, invoice: str | None, attempt: int, *, final: bool = True, **more: Any
    ) -> FinanceEvent:
        later = None if final else datetime.now(UTC) + timedelta(days=2)
        return self(
            "payment.failed", minute, f"{invoice}:{attempt}", invoice_ref=invoice, amount_minor=1190, currency="EUR",
            attempt=attempt, next_attempt_at=later, is_final_attempt=final, failure_code="card_declined", **more,
        )  # fmt: skip

    def refund(self, minute: int, payment: str, ref: str, amount: int, status: str = "succeeded") -> FinanceEvent:
        """As some providers tell it: by its payment alone."""
        return self(
            f"refund.{status}", minute, ref, refund_ref=ref, payment_ref=payment, status=status, amount_minor=amount,
            currency="EUR", customer_ref=None, subscription_ref=None,
        )  # fmt: skip

    async def found(self) -> Story:
        """Make the organization, on the plan that everybody begins with."""
        async with self.db.transaction() as tx:
            row = {"id": self.organization, "name": "Acme", "plan": "free", "plan_version": 1}
            await tx.execute(sa.insert(tables.organizations).values(**row))
        return self

    async def page(self, *, plan: str = "pro", subscription: str | None = None) -> None:
        """A checkout that the provider has answered, as it is recorded; whoever waited for it is woken."""
        made = new_id("chk")
        keys = [self.source.key("checkout", "cs_1"), self.source.key("customer", "cus_1")]
        keys += [self.source.key("subscription", subscription)] if subscription else []
        async with self.db.transaction() as tx:
            await billing_store.lock(tx, keys)
            values = {"id": made, "organization_id": self.organization, **self.source.columns, "plan": plan}
            await checkout_store.add_checkout(tx, {**values, "plan_version": 1})
            opened = {
                "ref": "cs_1",
                "customer_ref": "cus_1",
                "subscription_ref": subscription,
                "url": "https://x.example",
            }
            await checkout_store.opened(tx, made, opened)
            await billing_store.add_customer(tx, self.organization, self.source, "cus_1")
            await self.applier.wake(tx, keys)

    async def apply(self, *some: FinanceEvent) -> list[str]:
        """Apply events, each in a transaction of its own; what came of each."""
        found = []
        for event in some:
            async with self.db.transaction() as tx:
                outcome = await self.applier.apply(tx, event)
            found.append("applied" if isinstance(outcome, Applied) else outcome.reason)
            assert isinstance(outcome, Applied | Ignored)
            await self.balanced()
        return found

    async def balanced(self) -> None:
        """The ledger sums to zero in every currency."""
        async with self.db.read() as reader:
            query = "SELECT currency FROM ledger_postings GROUP BY currency HAVING sum(amount_minor) <> 0"
            assert await reader.raw.fetch(query) == []

    async def end(self) -> dict[str, Any]:
        """What it all led to, without ids and times of writing."""
        queries = {
            "plan": "SELECT plan, plan_version, (SELECT json_object_agg(name, value) FROM plan_overrides v"
            " WHERE v.organization_id = o.id)::text AS restricted FROM organizations o WHERE id = $1",
            "subscription": "SELECT ref, status, plan_ref, object_version, status_at, cancel_at_period_end, period_start,"
            " period_end, checkout_plan FROM billing_subscriptions WHERE organization_id = $1",
            "said": "SELECT s.effect_key FROM billing_subscription_states s JOIN billing_subscriptions b"
            " ON b.id = s.subscription_id WHERE b.organization_id = $1 ORDER BY 1",
            "ledger": "SELECT account, currency, sum(amount_minor)::bigint AS balance FROM ledger_postings"
            " WHERE organization_id = $1 GROUP BY 1, 2 HAVING sum(amount_minor) <> 0 ORDER BY 1, 2",
            "events": "SELECT effect_key FROM billing_finance_events WHERE organization_id = $1 ORDER BY 1",
            "payments": "SELECT ref, invoice_ref, amount_minor, fee_minor FROM billing_payments"
            " WHERE organization_id = $1 ORDER BY 1",
            "refunds": "SELECT ref, state, amount_minor FROM billing_refunds WHERE organization_id = $1 ORDER BY 1",
            "invoices": "SELECT provider_ref, status, gross_minor, tax_minor, paid_minor FROM billing_invoices"
            " WHERE organization_id = $1 ORDER BY 1",
            "checkout": "SELECT state, subscription_ref FROM billing_checkouts WHERE organization_id = $1",
            "dunning": "SELECT currency, state, stage, amount_minor, attempts, opened_at FROM billing_dunning_cases"
            " WHERE organization_id = $1 AND closed_at IS NULL ORDER BY 1",
            "waiting": "SELECT kind FROM billing_waiting_events WHERE effect_key LIKE $1 ORDER BY 1",
        }
        async with self.db.read() as reader:
            found = {}
            for name, query in queries.items():
                by = f"%{self.source.account}%" if name == "waiting" else self.organization
                found[name] = [self._anonymous(row) for row in await reader.raw.fetch(query, by)]
            return found

    def _anonymous(self, row: Any) -> tuple[Any, ...]:
        """Times as minutes of the story; versions as what they are made of."""

        def plain(name: str, value: Any) -> Any:
            if isinstance(value, str):
                return value.replace(f"_{self.tag}", "")
            if isinstance(value, datetime):
                return round((value - self.start).total_seconds() / 60)
            return round((value / 1e6 - self.start.timestamp()) / 60) if name == "object_version" and value else value

        return tuple(plain(name, value) for name, value in row.items())


class Crash(Exception):
    """What a fault hook raises in place of a statement."""


class Statements:
    """Counts the statements of a transaction, and ends it before the one at ``at``."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def tick(self) -> None:
        if self.count == self.at:
            raise Crash
        self.count += 1

    @asynccontextmanager
    async def hook(self, tx: Any) -> Any:
        """Every statement of ``tx``, those before its commit too."""
        raw, run, counter = tx.raw, tx._run, self

        class Raw:
            def __getattr__(self, name: str) -> Any:
                if name in ("execute", "executemany", "fetch", "fetchrow", "fetchval"):
                    counter.tick()
                return getattr(raw, name)

        async def counted(*given: Any, **more: Any) -> Any:
            counter.tick()
            return await run(*given, **more)

        tx.raw, tx._run = Raw(), counted
        yield


def effects(events: Iterable[FinanceEvent]) -> set[str]:
    """The effect keys of events."""
    return {event.effect_key for event in events}
