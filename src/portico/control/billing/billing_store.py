"""The tables of customers, subscriptions, payments and what waits for its base; and their statements.

What a provider calls a thing is unique within (provider, account, mode); ``Source`` is those three. None of these tables has a
foreign key to the organization: money outlives it, and a late refund must still find whose it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from portico.control.billing.subscription_states import STATUSES, Snapshot, State
from portico.kit.db import Reader, Tx, metadata
from portico.kit.ids import new_id

_WHEN: Final = sa.DateTime(timezone=True)


def _source() -> list[sa.Column[Any]]:
    return [
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("livemode", sa.Boolean, nullable=False),
    ]


def _made() -> sa.Column[Any]:
    return sa.Column("created_at", _WHEN, nullable=False, server_default=sa.func.now())


customers = sa.Table(
    "billing_customers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False, index=True),
    *_source(),
    sa.Column("ref", sa.Text, nullable=False),
    _made(),
    sa.UniqueConstraint("provider", "account", "livemode", "ref", name="billing_customers_ref_key"),
)

subscriptions = sa.Table(
    "billing_subscriptions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False, index=True),
    *_source(),
    sa.Column("ref", sa.Text, nullable=False),
    sa.Column("customer_ref", sa.Text),
    # It was bought although the organization had this other one already: it is ended, and its money goes back (doubles.py).
    sa.Column("beside", sa.Text),
    # What was bought here; what the provider says of its price afterwards decides.
    sa.Column("checkout_plan", sa.Text),
    sa.Column("checkout_plan_version", sa.Integer),
    # All of what follows is folded from ``billing_subscription_states``.
    sa.Column("status", sa.Text, nullable=False, server_default="pending"),
    sa.Column("object_version", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("status_at", _WHEN),
    sa.Column("plan_ref", sa.Text),
    sa.Column("cancel_at_period_end", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("period_start", _WHEN),
    sa.Column("period_end", _WHEN),
    _made(),
    sa.Column("updated_at", _WHEN, nullable=False, server_default=sa.func.now()),
    sa.UniqueConstraint("provider", "account", "livemode", "ref", name="billing_subscriptions_ref_key"),
    sa.CheckConstraint(f"status IN ({', '.join(repr(each) for each in STATUSES)})", name="status"),
)

# What each event said of a subscription. A row never changes; the state is what they all say together.
states = sa.Table(
    "billing_subscription_states",
    metadata,
    sa.Column("subscription_id", sa.Text, sa.ForeignKey("billing_subscriptions.id"), primary_key=True),
    sa.Column("effect_key", sa.Text, primary_key=True),
    sa.Column("event_id", sa.Text, nullable=False),
    sa.Column("object_version", sa.BigInteger, nullable=False),
    sa.Column("occurred_at", _WHEN, nullable=False),
    sa.Column("status", sa.Text),
    sa.Column("plan_ref", sa.Text),
    sa.Column("cancel_at_period_end", sa.Boolean),
    sa.Column("period_start", _WHEN),
    sa.Column("period_end", _WHEN),
    _made(),
)

payments = sa.Table(
    "billing_payments",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False),
    *_source(),
    sa.Column("ref", sa.Text, nullable=False),
    sa.Column("subscription_id", sa.Text, sa.ForeignKey("billing_subscriptions.id"), index=True),
    sa.Column("invoice_ref", sa.Text),
    # Our invoice that it pays.
    sa.Column("invoice_id", sa.Text),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("tax_minor", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("fee_minor", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("paid_at", _WHEN, nullable=False),
    _made(),
    sa.UniqueConstraint("provider", "account", "livemode", "ref", name="billing_payments_ref_key"),
    sa.Index("billing_payments_organization_ix", "organization_id", "id"),
    sa.CheckConstraint("amount_minor >= 0 AND tax_minor >= 0", name="amounts"),
)

# Attempts to pay that failed. What is owed of them follows from the payments that came after.
failures = sa.Table(
    "billing_payment_failures",
    metadata,
    sa.Column("effect_key", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False),
    sa.Column("subscription_id", sa.Text, sa.ForeignKey("billing_subscriptions.id"), nullable=False),
    sa.Column("invoice_ref", sa.Text),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("occurred_at", _WHEN, nullable=False),
    sa.Column("next_attempt_at", _WHEN),
    sa.Column("is_final", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("failure_code", sa.Text),
    # Somebody closed its case by hand: it opens none again.
    sa.Column("waived_at", _WHEN),
    _made(),
    sa.Index("billing_payment_failures_subscription_ix", "subscription_id", "occurred_at"),
)

# Events whose base is not here: whose they are is not known yet, or what they change has not come. ``needs``: any of these keys.
waiting = sa.Table(
    "billing_waiting_events",
    metadata,
    sa.Column("effect_key", sa.Text, primary_key=True),
    sa.Column("needs", ARRAY(sa.Text), nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("event", JSONB, nullable=False),
    sa.Column("occurred_at", _WHEN, nullable=False),
    _made(),
    sa.Index("billing_waiting_events_needs_ix", "needs", postgresql_using="gin"),
)

# What billing gave an organization last, so that it changes nothing that an operator changed since for another reason.
standings = sa.Table(
    "billing_standings",
    metadata,
    sa.Column("organization_id", sa.Text, primary_key=True),
    sa.Column("plan", sa.Text, nullable=False),
    sa.Column("plan_version", sa.Integer),
    sa.Column("subscription_id", sa.Text),
    sa.Column("restricted", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("updated_at", _WHEN, nullable=False, server_default=sa.func.now()),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a reference is from: a provider, our account there, and its mode."""

    provider: str
    account: str
    livemode: bool

    @classmethod
    def of(cls, row: Any) -> Source:
        """Of an event, or of a row of these tables."""
        return cls(row.provider, row.account, row.livemode)

    def key(self, what: str, ref: str) -> str:
        """The one name of a thing of the provider's, for locks and for what waits."""
        return f"{what}:{self.provider}:{self.account}:{'live' if self.livemode else 'test'}:{ref}"

    @property
    def columns(self) -> dict[str, Any]:
        """As the tables have it."""
        return {"provider": self.provider, "account": self.account, "livemode": self.livemode}

    def where(self, table: sa.Table, ref: str | None) -> sa.ColumnElement[bool]:
        """The row of ``table`` that the provider calls ``ref``."""
        c = table.c
        same = (c.provider == self.provider, c.account == self.account, c.livemode.is_(self.livemode))
        return sa.and_(*same, c.ref == ref)


# -- locks ---------------------------------------------------------------------------------------------------------------

# In one order everywhere: who brings a base and who looks for it see one another, and nobody waits in a ring.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(key, 7)) FROM unnest($1::text[]) AS key"


async def lock(tx: Tx, keys: Sequence[str]) -> None:
    """Hold ``keys`` until the transaction ends."""
    await tx.raw.execute(_LOCK, sorted(set(keys)))


# -- customers -----------------------------------------------------------------------------------------------------------


async def customer(reader: Reader, source: Source, ref: str) -> Any | None:
    """The row of a customer."""
    return await reader.fetch_one(sa.select(customers).where(source.where(customers, ref)))


async def customer_of(reader: Reader, organization: str, source: Source) -> Any | None:
    """How the provider called the organization last."""
    c = customers.c
    mine = sa.select(customers).where(
        c.organization_id == organization, c.provider == source.provider, c.account == source.account,
        c.livemode.is_(source.livemode),
    )  # fmt: skip
    return await reader.fetch_one(mine.order_by(c.id.desc()).limit(1))


async def add_customer(tx: Tx, organization: str, source: Source, ref: str) -> None:
    """Know whose a customer is; of one that is known nothing changes."""
    await tx.raw.execute(
        "INSERT INTO billing_customers (id, organization_id, provider, account, livemode, ref)"
        " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (provider, account, livemode, ref) DO NOTHING",
        new_id("cus"), organization, source.provider, source.account, source.livemode, ref,
    )  # fmt: skip


# -- subscriptions -------------------------------------------------------------------------------------------------------


async def subscription(reader: Reader, source: Source, ref: str) -> Any | None:
    """The row of a subscription by the provider's reference."""
    return await reader.fetch_one(sa.select(subscriptions).where(source.where(subscriptions, ref)))


async def subscription_by_id(reader: Reader, subscription_id: str) -> Any | None:
    """The row of a subscription by ours."""
    return await reader.fetch_one(sa.select(subscriptions).where(subscriptions.c.id == subscription_id))


async def hold_subscription(tx: Tx, subscription_id: str) -> Any:
    """The row of a subscription, held until the transaction ends: of an organization that is gone, nothing else is."""
    query = sa.select(subscriptions).where(subscriptions.c.id == subscription_id)
    return await tx.fetch_one(query.with_for_update())


async def subscriptions_of(reader: Reader, organization: str) -> Sequence[Any]:
    """All that the organization has or had, the oldest first."""
    t = subscriptions.c
    return await reader.fetch_all(sa.select(subscriptions).where(t.organization_id == organization).order_by(t.id))


async def add_subscription(tx: Tx, organization: str, source: Source, ref: str, customer_ref: str | None) -> Any:
    """The row of a subscription; made if there is none."""
    await tx.raw.execute(
        "INSERT INTO billing_subscriptions (id, organization_id, provider, account, livemode, ref, customer_ref)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (provider, account, livemode, ref) DO UPDATE"
        " SET customer_ref = coalesce(billing_subscriptions.customer_ref, excluded.customer_ref)",
        new_id("sub"), organization, source.provider, source.account, source.livemode, ref, customer_ref,
    )  # fmt: skip
    return await subscription(tx, source, ref)


async def bought(tx: Tx, subscription_id: str, plan: str, version: int | None) -> None:
    """Note which plan was chosen at the checkout of a subscription."""
    t = subscriptions
    values = {"checkout_plan": plan, "checkout_plan_version": version}
    await tx.execute(sa.update(t).where(t.c.id == subscription_id, t.c.checkout_plan.is_(None)).values(**values))


async def add_snapshot(tx: Tx, subscription_id: str, said: Snapshot) -> None:
    """Keep what an event said."""
    await tx.raw.execute(
        "INSERT INTO billing_subscription_states (subscription_id, effect_key, event_id, object_version, occurred_at, status,"
        " plan_ref, cancel_at_period_end, period_start, period_end) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
        " ON CONFLICT (subscription_id, effect_key) DO NOTHING",
        subscription_id, said.effect_key, said.event_id, said.version, said.occurred_at, said.status, said.plan_ref,
        said.cancel_at_period_end, said.period_start, said.period_end,
    )  # fmt: skip


async def snapshots(reader: Reader, subscription_id: str) -> list[Snapshot]:
    """Everything that was said of a subscription."""
    t = states.c
    rows = await reader.fetch_all(sa.select(states).where(t.subscription_id == subscription_id))
    return [
        Snapshot(
            row.effect_key, row.event_id, row.object_version, row.occurred_at, row.status, row.plan_ref,
            row.cancel_at_period_end, row.period_start, row.period_end,
        )
        for row in rows
    ]  # fmt: skip


async def put_state(tx: Tx, subscription_id: str, state: State) -> None:
    """Write what was folded."""
    values = {
        "status": state.status,
        "object_version": state.version,
        "status_at": state.status_at,
        "plan_ref": state.plan_ref,
        "cancel_at_period_end": state.cancel_at_period_end,
        "period_start": state.period_start,
        "period_end": state.period_end,
        "updated_at": sa.func.now(),
    }
    await tx.execute(sa.update(subscriptions).where(subscriptions.c.id == subscription_id).values(**values))


# -- payments ------------------------------------------------------------------------------------------------------------


async def payment(reader: Reader, source: Source, ref: str) -> Any | None:
    """The row of a payment by the provider's reference."""
    return await reader.fetch_one(sa.select(payments).where(source.where(payments, ref)))


async def payment_by_id(reader: Reader, payment_id: str) -> Any | None:
    """The row of a payment by ours."""
    return await reader.fetch_one(sa.select(payments).where(payments.c.id == payment_id))


async def payments_of(reader: Reader, organization: str, limit: int, before: str | None) -> Sequence[Any]:
    """The organization's payments, the newest first."""
    t = payments.c
    query = sa.select(payments).where(t.organization_id == organization)
    if before is not None:
        query = query.where(t.id < before)
    return await reader.fetch_all(query.order_by(t.id.desc()).limit(limit))


async def payments_for(reader: Reader, subscription_id: str) -> Sequence[Any]:
    """What was paid for a subscription, the oldest first."""
    t = payments.c
    return await reader.fetch_all(sa.select(payments).where(t.subscription_id == subscription_id).order_by(t.id))


async def beside(tx: Tx, subscription_id: str, other: str) -> None:
    """Mark a subscription as bought beside another one, for good."""
    t = subscriptions
    await tx.execute(sa.update(t).where(t.c.id == subscription_id, t.c.beside.is_(None)).values(beside=other))


async def add_payment(tx: Tx, values: dict[str, Any]) -> Any:
    """Keep a payment; its row."""
    return (await tx.execute(sa.insert(payments).values(id=new_id("pay"), **values).returning(payments))).one()


async def add_failure(tx: Tx, values: dict[str, Any]) -> None:
    """Keep a failed attempt."""
    await tx.execute(sa.insert(failures).values(**values))


# Failed attempts by invoice. Those of no invoice (a provider that makes none before money comes) are owed until the next payment
# of the subscription; of the others the ledger says what is open.
_DEBTS = """
SELECT f.currency, coalesce(f.invoice_ref, '') AS invoice_ref, min(f.occurred_at) AS since, max(f.attempt) AS attempts,
    bool_or(f.is_final) AS is_final,
    (array_agg(f.amount_minor ORDER BY f.attempt DESC, f.occurred_at DESC, f.effect_key))[1] AS amount,
    (array_agg(f.next_attempt_at ORDER BY f.attempt DESC, f.occurred_at DESC, f.effect_key))[1] AS next_attempt_at,
    (array_agg(f.failure_code ORDER BY f.attempt DESC, f.occurred_at DESC, f.effect_key))[1] AS failure_code
FROM billing_payment_failures f
WHERE f.subscription_id = $1 AND f.waived_at IS NULL AND (f.invoice_ref IS NOT NULL OR NOT EXISTS (
    SELECT FROM billing_payments p
    WHERE p.subscription_id = f.subscription_id AND p.currency = f.currency AND p.paid_at >= f.occurred_at))
GROUP BY f.currency, coalesce(f.invoice_ref, '') ORDER BY 1, 2
"""


async def debts(reader: Reader, subscription_id: str) -> list[Any]:
    """Failed attempts that may still be owed, one row for each currency and invoice ('': of none)."""
    return list(await reader.raw.fetch(_DEBTS, subscription_id))


async def waive(tx: Tx, subscription_id: str, currency: str) -> None:
    """Let what is owed in a currency open no case again."""
    t = failures
    mine = (t.c.subscription_id == subscription_id, t.c.currency == currency, t.c.waived_at.is_(None))
    await tx.execute(sa.update(t).where(*mine).values(waived_at=sa.func.now()))


# -- what waits ----------------------------------------------------------------------------------------------------------


async def park(tx: Tx, event: Any, needs: Sequence[str], document: dict[str, Any]) -> None:
    """Keep an event until one of ``needs`` is there."""
    await tx.raw.execute(
        "INSERT INTO billing_waiting_events (effect_key, needs, kind, event, occurred_at)"
        " VALUES ($1, $2, $3, $4::text::jsonb, $5)"
        # A later look at the same event knows more.
        " ON CONFLICT (effect_key) DO UPDATE SET needs = excluded.needs, event = excluded.event",
        f"{event.source} {event.effect_key}", list(needs), event.kind, json.dumps(document), event.occurred_at,
    )  # fmt: skip


_UNPARK = """
DELETE FROM billing_waiting_events WHERE needs && $1::text[] RETURNING event::text AS event, occurred_at, effect_key
"""


async def unpark(tx: Tx, keys: Sequence[str]) -> list[Any]:
    """Take out what waited for one of ``keys``, the oldest first."""
    rows = await tx.raw.fetch(_UNPARK, list(keys))
    return [json.loads(row["event"]) for row in sorted(rows, key=lambda row: (row["occurred_at"], row["effect_key"]))]


async def unparked(tx: Tx, event: Any) -> None:
    """What waited is done: it came by another way."""
    await tx.raw.execute(
        "DELETE FROM billing_waiting_events WHERE effect_key = $1", f"{event.source} {event.effect_key}"
    )


_SAID: Final = ("provider", "account", "livemode", "event_id")


async def waiting_since(reader: Reader, before: datetime, limit: int) -> Sequence[Any]:
    """What has waited since before a time, the oldest first."""
    t = waiting.c
    columns = (t.effect_key, t.kind, t.needs, t.created_at)
    return await reader.fetch_all(sa.select(*columns).where(t.created_at < before).order_by(t.created_at).limit(limit))


async def waiting_listing(
    reader: Reader, provider: str | None, limit: int, after: tuple[datetime, str] | None
) -> Sequence[Any]:
    """What waits, the longest first: after the one that waits since a time and has an effect."""
    t = waiting.c
    said = [t.event[name].astext.label(name) for name in _SAID]
    query = sa.select(t.effect_key, t.kind, t.needs, t.occurred_at, t.created_at, *said)
    if provider is not None:
        query = query.where(t.event["provider"].astext == provider)
    if after is not None:
        query = query.where(
            sa.tuple_(t.created_at, t.effect_key) > sa.tuple_(sa.literal(after[0]), sa.literal(after[1]))
        )
    return await reader.fetch_all(query.order_by(t.created_at, t.effect_key).limit(limit))


async def waiting_count(reader: Reader) -> list[Any]:
    """By provider: how many wait (``count``), and for how many seconds the oldest has (``seconds``)."""
    return list(
        await reader.raw.fetch(
            "SELECT event ->> 'provider' AS provider, count(*) AS count,"
            " greatest(0, extract(epoch FROM now() - min(created_at)))::float8 AS seconds"
            " FROM billing_waiting_events GROUP BY 1"
        )
    )


async def wait_no_longer(tx: Tx, effect: str) -> Any | None:
    """Take out one that waited; of which event it was, or ``None`` when it came to be applied in this moment."""
    query = (
        "DELETE FROM billing_waiting_events WHERE effect_key = $1 RETURNING event ->> 'provider' AS provider,"
        " event ->> 'account' AS account, (event ->> 'livemode')::boolean AS livemode, event ->> 'event_id' AS event_id"
    )
    return await tx.raw.fetchrow(query, effect)


# -- what billing gave ---------------------------------------------------------------------------------------------------


async def standing(tx: Tx, organization: str) -> Any | None:
    """What billing gave the organization last."""
    return await tx.fetch_one(sa.select(standings).where(standings.c.organization_id == organization))


async def put_standing(
    tx: Tx, organization: str, plan: str, version: int | None, subscription_id: str | None, restricted: bool
) -> None:
    """Note what billing gives."""
    await tx.raw.execute(
        "INSERT INTO billing_standings (organization_id, plan, plan_version, subscription_id, restricted)"
        " VALUES ($1, $2, $3, $4, $5) ON CONFLICT (organization_id) DO UPDATE SET plan = excluded.plan,"
        " plan_version = excluded.plan_version, subscription_id = excluded.subscription_id,"
        " restricted = excluded.restricted, updated_at = now()",
        organization, plan, version, subscription_id, restricted,
    )  # fmt: skip
