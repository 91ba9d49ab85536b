"""The audit table and its queries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from portico.kit.db import Reader, Tx, metadata

audit_events = sa.Table(
    "audit_events",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # Null: an act outside every organization (a failed sign-in to an unknown account, the installation itself).
    sa.Column("organization_id", sa.Text),
    sa.Column("at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("actor_kind", sa.Text, nullable=False),
    sa.Column("actor_id", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("target", sa.Text),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("details", JSONB, nullable=False),
    sa.Column("request_id", sa.Text),
    sa.Column("address", sa.Text),
    sa.CheckConstraint("outcome IN ('success', 'refused')", name="outcome"),
    sa.Index("audit_events_organization_id_id_ix", "organization_id", "id"),
)


# Raw: it is part of every write, and a prepared statement costs a third of a compiled one.
_INSERT = """
INSERT INTO audit_events
    (id, organization_id, actor_kind, actor_id, action, target, outcome, details, request_id, address)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8::text::jsonb, $9, $10)
"""
_COLUMNS = ("id", "organization_id", "actor_kind", "actor_id", "action", "target", "outcome")


async def insert(tx: Tx, row: dict[str, Any]) -> None:
    """Add one row."""
    values = [row[column] for column in _COLUMNS]
    await tx.raw.execute(_INSERT, *values, json.dumps(row["details"]), row["request_id"], row["address"])


async def listing(
    reader: Reader, organization: str, limit: int, before: str | None, action: str | None
) -> Sequence[sa.Row[Any]]:
    """Newest first: up to ``limit`` rows of one organization with ids below ``before``."""
    query = sa.select(audit_events).where(audit_events.c.organization_id == organization)
    if before is not None:
        query = query.where(audit_events.c.id < before)
    if action is not None:
        query = query.where(audit_events.c.action == action)
    return await reader.fetch_all(query.order_by(audit_events.c.id.desc()).limit(limit))
