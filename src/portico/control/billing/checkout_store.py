"""The tables of checkouts, refunds and calls to providers, and their statements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from portico.control.billing.billing_store import Source, payments
from portico.kit import queue
from portico.kit.db import Reader, Tx, metadata

_WHEN: Final = sa.DateTime(timezone=True)
CHECKOUT_STATES: Final = ("requested", "open", "completed", "expired", "failed")
REFUND_STATES: Final = ("requested", "pending", "succeeded", "failed")


def _among(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


checkouts = sa.Table(
    "billing_checkouts",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("account", sa.Text, nullable=False),
    sa.Column("livemode", sa.Boolean, nullable=False),
    sa.Column("plan", sa.Text, nullable=False),
    # The version that was offered: what is bought is what was seen.
    sa.Column("plan_version", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False, server_default="requested"),
    # What the provider calls the page, the customer and the subscription, once it has answered.
    sa.Column("ref", sa.Text),
    sa.Column("customer_ref", sa.Text),
    sa.Column("subscription_ref", sa.Text),
    sa.Column("url", sa.Text),
    sa.Column("expires_at", _WHEN),
    sa.Column("created_at", _WHEN, nullable=False, server_default=sa.func.now()),
    sa.CheckConstraint(f"state IN ({_among(CHECKOUT_STATES)})", name="state"),
    sa.Index("billing_checkouts_organization_ix", "organization_id", "id"),
    sa.Index("billing_checkouts_ref_ix", "provider", "account", "livemode", "ref", unique=True),
    sa.Index("billing_checkouts_subscription_ix", "provider", "account", "livemode", "subscription_ref", unique=True),
)

refunds = sa.Table(
    "billing_refunds",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False),
    sa.Column("payment_id", sa.Text, sa.ForeignKey("billing_payments.id"), nullable=False, index=True),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("account", sa.Text, nullable=False),
    sa.Column("livemode", sa.Boolean, nullable=False),
    sa.Column("ref", sa.Text),
    sa.Column("state", sa.Text, nullable=False, server_default="requested"),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("created_at", _WHEN, nullable=False, server_default=sa.func.now()),
    sa.CheckConstraint(f"state IN ({_among(REFUND_STATES)})", name="state"),
    sa.CheckConstraint("amount_minor > 0", name="amount"),
    sa.Index("billing_refunds_organization_ix", "organization_id", "id"),
    sa.Index("billing_refunds_ref_ix", "provider", "account", "livemode", "ref", unique=True),
)

# Calls to be made of a provider. A row is written with what it changes here, carried out when that is committed, under its id as
# the key: by whoever asked, or, when that process has died, by the worker.
calls = sa.Table(
    "billing_calls",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False),
    # Of one key of an organization there is one call, however often it is asked for.
    sa.Column("request_key", sa.Text, nullable=False),
    sa.Column("act", sa.Text, nullable=False),
    # The checkout (to be made, or closed), the subscription, the refund, the dunning case, or the charge of use.
    sa.Column("subject", sa.Text, nullable=False, index=True),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("arguments", JSONB, nullable=False),
    sa.Column("actor", JSONB, nullable=False),
    sa.Column("result", JSONB(none_as_null=True)),
    # Why the provider will never do it: a code, and its words.
    sa.Column("refusal", JSONB(none_as_null=True)),
    sa.UniqueConstraint("organization_id", "request_key", name="billing_calls_request_key"),
    *queue.columns(),
    *queue.rules("billing_calls"),
)
CALL: Final = queue.Kind("billing.call", calls)


# -- checkouts -----------------------------------------------------------------------------------------------------------


async def checkout(reader: Reader, checkout_id: str) -> Any | None:
    """The row of a checkout."""
    return await reader.fetch_one(sa.select(checkouts).where(checkouts.c.id == checkout_id))


async def by_ref(reader: Reader, source: Source, ref: str) -> Any | None:
    """The checkout that the provider calls so."""
    return await reader.fetch_one(sa.select(checkouts).where(source.where(checkouts, ref)))


async def by_subscription(reader: Reader, source: Source, subscription_ref: str) -> Any | None:
    """The checkout that a subscription came from."""
    c = checkouts.c
    where = (
        c.provider == source.provider, c.account == source.account, c.livemode.is_(source.livemode),
        c.subscription_ref == subscription_ref,
    )  # fmt: skip
    return await reader.fetch_one(sa.select(checkouts).where(*where))


async def latest_open(reader: Reader, organization: str) -> Any | None:
    """The newest page of the organization on which it can still pay."""
    c = checkouts.c
    query = sa.select(checkouts).where(c.organization_id == organization, c.state == "open")
    return await reader.fetch_one(query.order_by(c.id.desc()).limit(1))


async def open_pages(reader: Reader, organization: str) -> Sequence[Any]:
    """Pages of the organization on which somebody can still pay."""
    c = checkouts.c
    query = sa.select(checkouts).where(
        c.organization_id == organization, c.state == "open", sa.func.coalesce(c.expires_at > sa.func.now(), True)
    )
    return await reader.fetch_all(query.order_by(c.id))


async def closed(reader: Reader, organization: str) -> dict[tuple[Source, str], str]:
    """Subscriptions that came from pages which were to be closed, and beside which other one (by our id)."""
    c, t = checkouts.c, calls.c
    query = (
        sa.select(checkouts, t.arguments)
        .join(calls, (t.subject == c.id) & (t.act == "close"))
        .where(c.organization_id == organization, c.subscription_ref.is_not(None))
    )
    return {(Source.of(row), row.subscription_ref): row.arguments["first"] for row in await reader.fetch_all(query)}


async def add_checkout(tx: Tx, values: dict[str, Any]) -> None:
    """Insert a checkout."""
    await tx.execute(sa.insert(checkouts).values(**values))


async def opened(tx: Tx, checkout_id: str, values: dict[str, Any]) -> bool:
    """Note what the provider answered; whether that was new."""
    c = checkouts.c
    change = sa.update(checkouts).where(c.id == checkout_id, c.state == "requested").values(state="open", **values)
    return bool((await tx.execute(change)).rowcount)


async def ended(tx: Tx, checkout_id: str, state: str, values: dict[str, Any]) -> None:
    """Note how a checkout ended. One that was completed stays so."""
    c = checkouts.c
    states = ("requested", "open", "expired", "failed") if state == "completed" else ("requested", "open")
    await tx.execute(sa.update(checkouts).where(c.id == checkout_id, c.state.in_(states)).values(state=state, **values))


# -- refunds -------------------------------------------------------------------------------------------------------------


async def refund(reader: Reader, refund_id: str) -> Any | None:
    """The row of a refund by our id."""
    return await reader.fetch_one(sa.select(refunds).where(refunds.c.id == refund_id))


async def refund_by_ref(reader: Reader, source: Source, ref: str) -> Any | None:
    """The row of a refund by the provider's reference."""
    return await reader.fetch_one(sa.select(refunds).where(source.where(refunds, ref)))


async def refunds_of(reader: Reader, organization: str, limit: int, before: str | None) -> Sequence[Any]:
    """The organization's refunds, the newest first."""
    t = refunds.c
    query = sa.select(refunds).where(t.organization_id == organization)
    if before is not None:
        query = query.where(t.id < before)
    return await reader.fetch_all(query.order_by(t.id.desc()).limit(limit))


async def refunded(reader: Reader, payment_id: str) -> int:
    """What was given back of a payment, or is about to be."""
    t = refunds.c
    query = sa.select(sa.func.coalesce(sa.func.sum(t.amount_minor), 0)).where(
        t.payment_id == payment_id, t.state != "failed"
    )
    return int(await reader.scalar(query))


async def hold_payment(tx: Tx, organization: str | None, payment_id: str) -> Any | None:
    """A payment (of the organization), held until the transaction ends: two refunds of it take turns."""
    query = sa.select(payments).where(payments.c.id == payment_id)
    if organization is not None:
        query = query.where(payments.c.organization_id == organization)
    return await tx.fetch_one(query.with_for_update())


async def add_refund(tx: Tx, values: dict[str, Any]) -> None:
    """Insert a refund."""
    await tx.execute(sa.insert(refunds).values(**values))


async def put_refund(tx: Tx, refund_id: str, **values: Any) -> None:
    """Change a refund. What succeeded or failed for good is not undone by what was known before."""
    t = refunds.c
    where = [t.id == refund_id]
    if values.get("state") == "pending":
        where.append(t.state.in_(("requested", "pending")))
    await tx.execute(sa.update(refunds).where(*where).values(**values))


async def drop_refund(tx: Tx, refund_id: str) -> None:
    """Delete a row that another one of the same refund replaces."""
    await tx.execute(sa.delete(refunds).where(refunds.c.id == refund_id))


# -- calls ---------------------------------------------------------------------------------------------------------------


async def call_by_request(reader: Reader, organization: str, request_key: str) -> Any | None:
    """The call that was asked for under this key."""
    t = calls.c
    return await reader.fetch_one(
        sa.select(calls).where(t.organization_id == organization, t.request_key == request_key)
    )


async def call(reader: Reader, call_id: str) -> Any | None:
    """The row of a call."""
    return await reader.fetch_one(sa.select(calls).where(calls.c.id == call_id))


_TAKE = """
UPDATE billing_calls SET attempts = attempts + 1, lease_token = gen_random_uuid(), moved_at = now(),
    available_at = now() + make_interval(secs => $2)
WHERE id = $1 AND queue_state = 'pending' AND available_at <= now() + interval '5 minutes'
    AND (lease_token IS NULL OR available_at <= now()) RETURNING *
"""


async def take(tx: Tx, call_id: str, lease_seconds: float) -> Any | None:
    """Lease a call to whoever asked for it, as ``queue.claim`` does to a worker; ``None`` when somebody has it, or it is done."""
    return await tx.raw.fetchrow(_TAKE, call_id, lease_seconds)


async def add_call(tx: Tx, values: dict[str, Any]) -> None:
    """Insert a call to be made."""
    await tx.execute(sa.insert(calls).values(**values))


async def answered(tx: Tx, call_id: str, result: dict[str, Any] | None, refusal: dict[str, Any] | None) -> None:
    """Note what the provider answered."""
    await tx.execute(sa.update(calls).where(calls.c.id == call_id).values(result=result, refusal=refusal))


async def scheduled(reader: Reader, subscription_id: str) -> Any | None:
    """The cancellation that is made at the end of a subscription's period."""
    t = calls.c
    mine = (t.subject == subscription_id, t.act == "cancel", t.queue_state == "pending", t.lease_token.is_(None))
    query = sa.select(calls).where(
        *mine, t.attempts == 0, t.available_at > sa.func.now() + sa.text("interval '5 minutes'")
    )
    return await reader.fetch_one(query)


async def unfinished(reader: Reader, subscription_id: str) -> bool:
    """Whether something that was asked for of a subscription is not answered yet. What is scheduled for later does not count."""
    t = calls.c
    later = (t.attempts == 0) & (t.available_at > sa.func.now() + sa.text("interval '5 minutes'"))
    query = sa.select(t.id).where(
        t.subject == subscription_id, t.act.in_(("cancel", "resume", "change")), t.queue_state == "pending", ~later
    )
    return await reader.fetch_one(query.limit(1)) is not None


async def ending(reader: Reader, subscription_id: str) -> bool:
    """Whether the last that was asked for is an end with the period: not every provider shows that in the subscription."""
    t = calls.c
    query = sa.select(calls).where(t.subject == subscription_id, t.act.in_(("cancel", "resume")), t.refusal.is_(None))
    last = await reader.fetch_one(query.order_by(t.id.desc()).limit(1))
    return last is not None and last.act == "cancel" and bool(last.arguments["at_period_end"])


async def withdraw(tx: Tx, act: str, subject: str, *, untried: bool = False) -> int:
    """Take back calls that nobody makes now (``untried``: or has ever begun to make); how many."""
    t = calls.c
    mine = [t.act == act, t.subject == subject, t.queue_state == "pending", t.lease_token.is_(None)]
    if untried:
        mine.append(t.attempts == 0)
    return int((await tx.execute(sa.delete(calls).where(*mine))).rowcount)


async def unschedule(tx: Tx, subscription_id: str) -> bool:
    """Take it back; whether there was one that nobody makes already."""
    found = await scheduled(tx, subscription_id)
    if found is None:
        return False
    gone = sa.delete(calls).where(calls.c.id == found.id, calls.c.lease_token.is_(None), calls.c.attempts == 0)
    return bool((await tx.execute(gone)).rowcount)
