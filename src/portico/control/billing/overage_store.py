"""The tables of what use beyond a plan is charged, and their statements."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from portico.control.billing.subscription_states import TERMINAL
from portico.kit.db import Reader, Tx, metadata
from portico.kit.ids import new_id

_WHEN: Final = sa.DateTime(timezone=True)
STATES: Final = ("priced", "charged", "waived", "failed")

# A month of an organization whose use was priced: by whose terms. They hold for what relays report of it later, too.
closings = sa.Table(
    "billing_overage_closings",
    metadata,
    sa.Column("organization_id", sa.Text, primary_key=True),
    sa.Column("month", sa.Date, primary_key=True),
    # Null: nobody pays for what was used.
    sa.Column("subscription_id", sa.Text),
    sa.Column("plan", sa.Text),
    # [{"limit", "allowed", "currency", "amount_minor", "per"}]
    sa.Column("terms", JSONB, nullable=False),
    # The last month with which late reports were looked for.
    sa.Column("looked_on", sa.Date, nullable=False),
    sa.Column("created_at", _WHEN, nullable=False, server_default=sa.func.now()),
    sa.Index("billing_overage_closings_month_ix", "month", "looked_on"),
)

# What is to be paid of it: of one subscription, limit, month of use and month of billing there is one. The latter is a later
# month for what relays reported late.
charges = sa.Table(
    "billing_overage_charges",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False),
    sa.Column("subscription_id", sa.Text, sa.ForeignKey("billing_subscriptions.id"), nullable=False),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("plan", sa.Text, nullable=False),
    sa.Column("metric", sa.Text, nullable=False),
    sa.Column("month", sa.Date, nullable=False),
    sa.Column("billed_month", sa.Date, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    # What was used of the month until it was priced, and what the plan has.
    sa.Column("used", sa.BigInteger, nullable=False),
    sa.Column("allowed", sa.BigInteger, nullable=False),
    sa.Column("quantity", sa.BigInteger, nullable=False),
    sa.Column("unit_minor", sa.BigInteger, nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, server_default="priced"),
    # Why it failed: a code.
    sa.Column("reason", sa.Text),
    # What the provider calls it; or the invoice of our own.
    sa.Column("provider_ref", sa.Text),
    sa.Column("invoice_id", sa.Text),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("created_at", _WHEN, nullable=False, server_default=sa.func.now()),
    sa.Column("settled_at", _WHEN),
    sa.UniqueConstraint(
        "subscription_id", "metric", "month", "billed_month", name="billing_overage_charges_subscription_id_key"
    ),
    sa.CheckConstraint(f"state IN ({', '.join(repr(each) for each in STATES)})", name="state"),
    sa.CheckConstraint("quantity > 0 AND month <= billed_month", name="quantity"),
    sa.Index("billing_overage_charges_organization_id_ix", "organization_id", "id"),
)
_C: Final = charges.c

# Organizations with a subscription that had begun by the end of a month, and was not over when it began.
_DUE = """
SELECT DISTINCT s.organization_id FROM billing_subscriptions s
WHERE s.status <> 'pending' AND s.created_at < $3 AND (s.status <> ALL($4::text[]) OR s.status_at >= $2)
    AND NOT EXISTS (SELECT FROM billing_overage_closings c WHERE c.organization_id = s.organization_id AND c.month = $1)
    AND s.organization_id > $5
ORDER BY 1 LIMIT $6
"""
_CLOSE = """
INSERT INTO billing_overage_closings (organization_id, month, subscription_id, plan, terms, looked_on)
VALUES ($1, $2, $3, $4, $5::text::jsonb, $2) ON CONFLICT DO NOTHING RETURNING month
"""
_LATE = """
SELECT organization_id FROM billing_overage_closings
WHERE month = $1 AND looked_on < $2 AND terms <> '[]'::jsonb AND organization_id > $3 ORDER BY organization_id LIMIT $4
"""


async def due(reader: Reader, *, month: date, span: tuple[datetime, datetime], after: str, limit: int) -> list[str]:
    """Organizations whose use of a month (which has this span) is to be priced: those that come after one, in order."""
    rows = await reader.raw.fetch(_DUE, month, *span, sorted(TERMINAL), after, limit)
    return [row["organization_id"] for row in rows]


async def close(
    tx: Tx,
    organization: str,
    month: date,
    subscription_id: str | None,
    plan: str | None,
    terms: Sequence[dict[str, Any]],
) -> bool:
    """Note by which terms a month is priced; ``False``: that was done before."""
    made = await tx.raw.fetchval(_CLOSE, organization, month, subscription_id, plan, json.dumps(list(terms)))
    return made is not None


async def late(reader: Reader, *, month: date, over: date, after: str, limit: int) -> list[str]:
    """Organizations of which a month was priced, and is to be looked at again with the month ``over``; those after one."""
    return [row["organization_id"] for row in await reader.raw.fetch(_LATE, month, over, after, limit)]


async def hold_closing(tx: Tx, organization: str, month: date) -> Any | None:
    """The terms of a month, held until the transaction ends."""
    c = closings.c
    query = sa.select(closings).where(c.organization_id == organization, c.month == month)
    return await tx.fetch_one(query.with_for_update())


async def looked(tx: Tx, organization: str, month: date, on: date) -> None:
    """Note that late reports were looked for."""
    c = closings.c
    mine = sa.update(closings).where(c.organization_id == organization, c.month == month)
    await tx.execute(mine.values(looked_on=sa.func.greatest(c.looked_on, on)))


async def quantities(reader: Reader, organization: str, month: date) -> dict[str, int]:
    """How many units of each limit were priced of a month until now, whatever became of them."""
    query = sa.select(_C.metric, sa.func.sum(_C.quantity).label("n")).where(
        _C.organization_id == organization, _C.month == month
    )
    return {row.metric: int(row.n) for row in await reader.fetch_all(query.group_by(_C.metric))}


async def add(tx: Tx, values: dict[str, Any]) -> Any:
    """A charge; its row."""
    return (await tx.execute(sa.insert(charges).values(id=new_id("ovc"), **values).returning(charges))).one()


async def one(reader: Reader, charge: str) -> Any | None:
    """A charge."""
    return await reader.fetch_one(sa.select(charges).where(_C.id == charge))


async def charged(tx: Tx, charge: str, *, ref: str | None = None, invoice: str | None = None) -> None:
    """It is on its way to an invoice: of the provider's, or of our own."""
    values = {
        "state": "charged",
        "provider_ref": ref,
        "invoice_id": invoice,
        "reason": None,
        "settled_at": sa.func.now(),
    }
    await tx.execute(sa.update(charges).where(_C.id == charge, _C.state == "priced").values(**values))


async def failed(tx: Tx, charge: str, reason: str) -> None:
    """It will never be charged by itself."""
    await tx.execute(
        sa.update(charges).where(_C.id == charge, _C.state == "priced").values(state="failed", reason=reason)
    )


async def asked(tx: Tx, charge: str, before: str) -> Any | None:
    """One more attempt at a charge in the state ``before``; its row, ``None``: it is in another."""
    change = sa.update(charges).where(_C.id == charge, _C.state == before)
    return (
        await tx.execute(change.values(state="priced", reason=None, attempts=_C.attempts + 1).returning(charges))
    ).first()


async def waived(tx: Tx, charge: str, before: str, reason: str) -> Any | None:
    """Nobody has to pay it; its row, ``None``: it is not in the state ``before``."""
    values = {"state": "waived", "reason": reason, "settled_at": sa.func.now()}
    change = sa.update(charges).where(_C.id == charge, _C.state == before).values(**values)
    return (await tx.execute(change.returning(charges))).first()


async def listing(
    reader: Reader, limit: int, before: str | None, *, organization: str | None, state: str | None
) -> Sequence[Any]:
    """Charges of an organization (``None``: of everybody), the newest first."""
    query = sa.select(charges)
    if organization is not None:
        query = query.where(_C.organization_id == organization)
    if state is not None:
        query = query.where(_C.state == state)
    if before is not None:
        query = query.where(_C.id < before)
    return await reader.fetch_all(query.order_by(_C.id.desc()).limit(limit))
