"""Queries over invitations. Identity's own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from portico.control.identity.tables import invitations, organizations, roles, users
from portico.kit.db import Reader, Tx

Row = sa.Row[Any]
t = invitations.c

_OPEN = sa.and_(t.accepted_at.is_(None), t.revoked_at.is_(None))


def _shown() -> sa.Select[Any]:
    return (
        sa.select(invitations, roles.c.name.label("role_name"), users.c.email.label("inviter"))
        .join(users, users.c.id == t.invited_by)
        .outerjoin(roles, sa.and_(roles.c.id == t.role, roles.c.organization_id == t.organization_id))
    )


async def add(tx: Tx, row: dict[str, Any]) -> bool:
    """Add an invitation; false when an open one to the address is there."""
    statement = insert(invitations).values(**row).on_conflict_do_nothing().returning(t.id)
    return (await tx.execute(statement)).first() is not None


async def listing(reader: Reader, organization_id: str, limit: int, before: str | None) -> Sequence[Row]:
    """Open invitations of the organization, expired ones included, newest first."""
    query = _shown().where(t.organization_id == organization_id, _OPEN)
    if before is not None:
        query = query.where(t.id < before)
    return await reader.fetch_all(query.order_by(t.id.desc()).limit(limit))


async def one(reader: Reader, organization_id: str, invitation_id: str) -> Row | None:
    """An open invitation of the organization."""
    return await reader.fetch_one(_shown().where(t.organization_id == organization_id, t.id == invitation_id, _OPEN))


async def by_digest(reader: Reader, digest: bytes) -> Row | None:
    """The invitation of a token, in whatever state, with the name of its organization."""
    query = _shown().add_columns(organizations.c.name.label("organization_name"))
    return await reader.fetch_one(
        query.join(organizations, organizations.c.id == t.organization_id).where(t.digest == digest)
    )


async def accept(tx: Tx, invitation_id: str, digest: bytes, user_id: str, now: datetime) -> bool:
    """Use an open, unexpired invitation up; false when it is not that any more."""
    live = sa.and_(t.id == invitation_id, t.digest == digest, _OPEN, t.expires_at > now)
    change = sa.update(invitations).where(live).values(accepted_at=now, accepted_by=user_id)
    return (await tx.execute(change.returning(t.id))).first() is not None


async def sent_again(
    tx: Tx, invitation_id: str, digest: bytes, inviter: str, now: datetime, expires_at: datetime
) -> int:
    """Note a new mail, with another token, to an invitation that the caller's lock keeps; returns how many there were."""
    values = {
        "digest": digest, "invited_by": inviter, "sends": t.sends + 1, "sent_at": now, "expires_at": expires_at,
    }  # fmt: skip
    change = sa.update(invitations).where(t.id == invitation_id).values(**values)
    row = (await tx.execute(change.returning(t.sends))).one()
    return int(row.sends)


async def _revoke(tx: Tx, now: datetime, *where: sa.ColumnElement[bool]) -> int:
    return int((await tx.execute(sa.update(invitations).where(_OPEN, *where).values(revoked_at=now))).rowcount)


async def revoke(tx: Tx, organization_id: str, invitation_id: str, now: datetime) -> bool:
    """End an open invitation; false when there is none."""
    return bool(await _revoke(tx, now, t.organization_id == organization_id, t.id == invitation_id))


async def revoke_expired(tx: Tx, organization_id: str, email: str, now: datetime) -> None:
    """End the invitation to an address that has expired, which is in the way of another."""
    await _revoke(tx, now, t.organization_id == organization_id, t.email == email, t.expires_at <= now)


async def revoke_of(tx: Tx, organization_id: str, user_id: str, now: datetime) -> int:
    """End every open invitation by this person; returns how many."""
    return await _revoke(tx, now, t.organization_id == organization_id, t.invited_by == user_id)


async def revoke_by(tx: Tx, user_id: str, now: datetime) -> int:
    """End every open invitation by this person, in every organization; returns how many."""
    return await _revoke(tx, now, t.invited_by == user_id)


async def revoke_to_role(tx: Tx, organization_id: str, role_id: str, now: datetime) -> int:
    """End every open invitation to a role; returns how many."""
    return await _revoke(tx, now, t.organization_id == organization_id, t.role == role_id)


async def count_open(reader: Reader, organization_id: str, now: datetime) -> int:
    """How many invitations stand."""
    query = sa.select(sa.func.count()).where(t.organization_id == organization_id, _OPEN, t.expires_at > now)
    return int(await reader.scalar(query))


def over(before: datetime) -> sa.ColumnElement[bool]:
    """Those that were of no use any more before ``before``."""
    return sa.func.coalesce(t.accepted_at, t.revoked_at, t.expires_at) < before
