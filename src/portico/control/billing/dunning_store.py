"""The table of dunning cases, and its statements."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from portico.control.billing.dunning_states import STATES
from portico.kit.db import Reader, Tx, metadata
from portico.kit.ids import new_id

_WHEN: Final = sa.DateTime(timezone=True)

cases = sa.Table(
    "billing_dunning_cases",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False),
    sa.Column("subscription_id", sa.Text, sa.ForeignKey("billing_subscriptions.id"), nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    # The stage of the schedule that it has reached (``D3``); null: none yet.
    sa.Column("stage", sa.Text),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("failure_code", sa.Text),
    sa.Column("next_attempt_at", _WHEN),
    # When the first attempt failed; and when the clock next brings something.
    sa.Column("opened_at", _WHEN, nullable=False),
    sa.Column("due_at", _WHEN),
    # What an operator's pauses have added to every day of the schedule.
    sa.Column("paused_at", _WHEN),
    sa.Column("paused_days", sa.Float, nullable=False, server_default="0"),
    sa.Column("closed_at", _WHEN),
    sa.Column("reason", sa.Text),
    sa.Column("created_at", _WHEN, nullable=False, server_default=sa.func.now()),
    sa.Column("updated_at", _WHEN, nullable=False, server_default=sa.func.now()),
    sa.CheckConstraint(f"state IN ({', '.join(repr(each) for each in STATES)})", name="state"),
    sa.CheckConstraint("(closed_at IS NOT NULL) = (state IN ('recovered', 'canceled'))", name="closed"),
    sa.Index(
        "billing_dunning_cases_open_ix", "subscription_id", "currency", unique=True,
        postgresql_where=sa.text("closed_at IS NULL"),
    ),
    sa.Index("billing_dunning_cases_due_ix", "due_at", postgresql_where=sa.text("closed_at IS NULL")),
    sa.Index("billing_dunning_cases_organization_ix", "organization_id", "id"),
)  # fmt: skip


async def open_cases(reader: Reader, subscription_id: str) -> dict[str, Any]:
    """The cases of a subscription that are not over, by currency."""
    c = cases.c
    rows = await reader.fetch_all(sa.select(cases).where(c.subscription_id == subscription_id, c.closed_at.is_(None)))
    return {row.currency: row for row in rows}


async def open_states(reader: Reader, organization: str) -> list[tuple[str, str]]:
    """Subscription and state of every case of an organization that is not over."""
    c = cases.c
    query = sa.select(c.subscription_id, c.state).where(c.organization_id == organization, c.closed_at.is_(None))
    return [(row.subscription_id, row.state) for row in await reader.fetch_all(query)]


async def one(reader: Reader, case: str) -> Any | None:
    """A case."""
    return await reader.fetch_one(sa.select(cases).where(cases.c.id == case))


async def add(tx: Tx, values: dict[str, Any]) -> Any:
    """Open a case; its row."""
    return (await tx.execute(sa.insert(cases).values(id=new_id("dun"), **values).returning(cases))).one()


async def put(tx: Tx, case: str, **values: Any) -> Any:
    """Change a case that is not over; its row."""
    c = cases.c
    change = sa.update(cases).where(c.id == case, c.closed_at.is_(None)).values(updated_at=sa.func.now(), **values)
    return (await tx.execute(change.returning(cases))).one()


async def due(reader: Reader, now: datetime, limit: int, without: Collection[str] = ()) -> list[tuple[str, str]]:
    """Organization and subscription of cases that the clock has something for, the longest due first; ``without``: but for those
    of these subscriptions."""
    c = cases.c
    query = sa.select(c.organization_id, c.subscription_id).where(
        c.closed_at.is_(None), c.due_at <= now, c.state != "paused", c.subscription_id.not_in(without)
    )
    rows = await reader.fetch_all(query.order_by(c.due_at, c.id).limit(limit))
    return list(dict.fromkeys((row.organization_id, row.subscription_id) for row in rows))


async def listing(
    reader: Reader, limit: int, before: str | None, *, organization: str | None, state: str | None, open_only: bool
) -> Sequence[Any]:
    """Cases of an organization (``None``: of everybody), the newest first."""
    c = cases.c
    query = sa.select(cases)
    if organization is not None:
        query = query.where(c.organization_id == organization)
    if state is not None:
        query = query.where(c.state == state)
    if open_only:
        query = query.where(c.closed_at.is_(None))
    if before is not None:
        query = query.where(c.id < before)
    return await reader.fetch_all(query.order_by(c.id.desc()).limit(limit))
