"""The end of an organization whose days of grace are over: who is due, and the last step. What lies between is the worker's."""

from __future__ import annotations

import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity.tables import organizations, sign_in_sessions
from portico.kit.db import Database, Tx

t = organizations.c
_WORKER = Caller("operator", "maintenance", None)
# A suspended one stays as it is until the operator has looked at it. By PostgreSQL's clock, as taking a deletion back.
_DUE = sa.and_(t.delete_after <= sa.func.now(), t.suspended_at.is_(None))


async def due(db: Database, limit: int) -> list[str]:
    """Organizations to be deleted now, the longest due first."""
    async with db.read() as reader:
        rows = await reader.fetch_all(sa.select(t.id).where(_DUE).order_by(t.delete_after, t.id).limit(limit))
    return [row.id for row in rows]


async def still_due(tx: Tx, organization: str) -> bool:
    """Whether it is still to be deleted; holds its row, so that two workers take turns and a suspension waits."""
    query = sa.select(t.id).where(t.id == organization, _DUE)
    return await tx.fetch_one(query.with_for_update()) is not None


async def leave_sessions(tx: Tx, organization: str, rows: int) -> int:
    """Take up to ``rows`` sign-in sessions out of the organization: they go on without one, or in another; how many."""
    session = sign_in_sessions.c
    found = sa.select(session.id).where(session.organization_id == organization).order_by(session.id).limit(rows)
    change = sa.update(sign_in_sessions).where(session.id.in_(found.with_for_update()))
    return int((await tx.execute(change.values(organization_id=None))).rowcount)


async def finish(tx: Tx, organization: str) -> None:
    """Delete the row, which is all that is left, and record the end: in its own audit log, which stays until its retention is
    over, and in the installation's."""
    gone = sa.delete(organizations).where(t.id == organization).returning(t.name)
    if (row := (await tx.execute(gone)).first()) is None:
        return
    facts = {"name": row.name}
    await audit.record(tx, _WORKER, "organization.delete", organization, details=facts, organization=organization)
    await audit.record(tx, _WORKER, "organization.delete", organization, details=facts)
