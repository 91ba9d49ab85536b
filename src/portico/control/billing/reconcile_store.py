"""The table of reconcile runs, which is their queue, and every query on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from portico.kit import queue
from portico.kit.db import Reader, Tx, metadata
from portico.kit.queue import Kind

#: Ids of missing events that a run names.
NAMED: Final = 20

runs = sa.Table(
    "billing_reconcile_runs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("since", sa.DateTime(timezone=True), nullable=False),
    sa.Column("until", sa.DateTime(timezone=True), nullable=False),
    # Nothing is taken in, only counted.
    sa.Column("dry_run", sa.Boolean, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("requested_by", sa.Text, nullable=False),
    sa.Column("scheduled", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    # What the provider's list had; what of it was not here, and was taken in; what was another account's or mode's.
    sa.Column("listed", sa.Integer),
    sa.Column("missing", sa.Integer),
    sa.Column("added", sa.Integer),
    sa.Column("foreign_events", sa.Integer),
    sa.Column("unreadable", sa.Integer),
    sa.Column("missing_events", JSONB),
    *queue.columns(),
    *queue.rules("billing_reconcile_runs"),
    # A provider has one run at a time that came by itself.
    sa.Index("billing_reconcile_runs_scheduled_ix", "provider", unique=True,
             postgresql_where=sa.text("scheduled AND queue_state = 'pending'")),
    sa.Index("billing_reconcile_runs_provider_until_ix", "provider", "until"),
)  # fmt: skip

KIND: Final = Kind("billing.reconcile", runs)
_R = runs.c


@dataclass(slots=True)
class Found:
    """What a run has seen so far. ``missing`` names the first of those that were not here."""

    listed: int = 0
    missing: int = 0
    added: int = 0
    foreign: int = 0
    unreadable: int = 0
    first: list[str] = field(default_factory=list)


async def add(tx: Tx, row: Mapping[str, Any]) -> sa.Row[Any]:
    """A run that was asked for."""
    made = (await tx.execute(sa.insert(runs).values(**row).returning(runs))).one()
    await queue.wake(tx, KIND)
    return made


async def add_scheduled(tx: Tx, row: Mapping[str, Any]) -> bool:
    """A run that is due; false when one waits."""
    made = (await tx.execute(insert(runs).values(**row).on_conflict_do_nothing().returning(_R.id))).first()
    if made is not None:
        await queue.wake(tx, KIND)
    return made is not None


async def last_until(reader: Reader, provider: str) -> datetime | None:
    """Until when a provider's list has been looked at without a gap: by runs that came by themselves, each from where the last
    one ended. What somebody asked for looks at any part of it."""
    query = sa.select(sa.func.max(_R.until)).where(_R.provider == provider, _R.queue_state == "done", _R.scheduled)
    found: datetime | None = await reader.scalar(query)
    return found


async def finish(tx: Tx, run: str, found: Found) -> None:
    """What a run has seen."""
    values = {
        "listed": found.listed, "missing": found.missing, "added": found.added, "foreign_events": found.foreign,
        "unreadable": found.unreadable, "missing_events": found.first,
    }  # fmt: skip
    await tx.execute(sa.update(runs).where(_R.id == run).values(**values))


async def listing(reader: Reader, limit: int, before: str | None) -> Sequence[sa.Row[Any]]:
    """Runs, the newest first."""
    query = sa.select(runs)
    if before is not None:
        query = query.where(_R.id < before)
    return await reader.fetch_all(query.order_by(_R.id.desc()).limit(limit))
