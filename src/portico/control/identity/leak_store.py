"""Queries by the digest of a leaked credential, whosever it is. For ``leaks.py`` alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from portico.control.identity.tables import (
    api_keys,
    members,
    operator_grants,
    organizations,
    refresh_tokens,
    sign_in_sessions,
    support_sessions,
    users,
)
from portico.kit.db import Tx

Row = sa.Row[Any]


async def lock_key(tx: Tx, digest: bytes) -> Row | None:
    """The key, live or not, held until the transaction ends."""
    return await tx.fetch_one(sa.select(api_keys).where(api_keys.c.digest == digest).with_for_update())


async def lock_session(tx: Tx, digest: bytes) -> Row | None:
    """The sign-in session of a refresh token or a browser's cookie, live or not, held until the transaction ends."""
    t = sign_in_sessions
    by_token = sa.select(refresh_tokens.c.session_id).where(refresh_tokens.c.digest == digest)
    query = sa.select(t).where(sa.or_(t.c.cookie_digest == digest, t.c.id.in_(by_token)))
    return await tx.fetch_one(query.with_for_update())


async def lock_support(tx: Tx, digest: bytes) -> Row | None:
    """The session of support access, live or not, held until the transaction ends."""
    return await tx.fetch_one(sa.select(support_sessions).where(support_sessions.c.digest == digest).with_for_update())


async def end_support(tx: Tx, session: str, now: datetime) -> None:
    """End a session of support access that the caller holds."""
    await tx.execute(sa.update(support_sessions).where(support_sessions.c.id == session).values(ended_at=now))


async def end_session(tx: Tx, session: str, now: datetime) -> None:
    """End a session that the caller holds."""
    where = sign_in_sessions.c.id == session
    await tx.execute(sa.update(sign_in_sessions).where(where).values(ended_at=now, end_reason="its credential leaked"))


async def people(tx: Tx, organization: str | None, maker: str | None, now: datetime, limit: int) -> Sequence[Row]:
    """Who is told: the owners of the organization and the maker, who must be a member; without one, the operators."""
    able = users.c.disabled_at.is_(None)
    if organization is None:
        g = operator_grants.c
        live = sa.and_(g.revoked_at.is_(None), sa.or_(g.expires_at.is_(None), g.expires_at > now))
        query = (
            sa.select(users.c.id, users.c.email, sa.literal(None).label("organization_name"))
            .where(able, sa.exists().where(g.user_id == users.c.id, live))
            .order_by(users.c.id)
        )
        return await tx.fetch_all(query.limit(limit))
    concerned = sa.or_(members.c.role == "owner", users.c.id == maker)
    query = (
        sa.select(users.c.id, users.c.email, organizations.c.name.label("organization_name"))
        .join(members, members.c.user_id == users.c.id)
        .join(organizations, organizations.c.id == members.c.organization_id)
        .where(members.c.organization_id == organization, concerned, able)
        .order_by(users.c.id != maker, users.c.id)
    )
    return await tx.fetch_all(query.limit(limit))
