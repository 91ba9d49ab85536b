"""Queries over people, organizations, keys and sign-in sessions. Identity's own; other domains ask its service."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import sqlalchemy as sa

from portico.control.identity.tables import (
    api_keys,
    members,
    operator_grants,
    organizations,
    refresh_tokens,
    sign_in_sessions,
    users,
)
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, Reader, Tx

Row = sa.Row[Any]

# Raw SQL for the two look-ups that every request makes; asyncpg keeps them prepared on each connection.
_KEY_BY_DIGEST = """
SELECT k.id, k.kind, k.organization_id, k.user_id, k.scopes, k.expires_at, k.revoked_at, k.allowed_cidrs, u.disabled_at,
       u.email_verified_at, m.role, r.permissions AS role_permissions, o.suspended_at, o.suspended_reason, o.delete_after
FROM api_keys k LEFT JOIN users u ON u.id = k.user_id
LEFT JOIN organizations o ON o.id = k.organization_id
LEFT JOIN members m ON m.user_id = k.user_id AND m.organization_id = k.organization_id
LEFT JOIN roles r ON r.id = m.role AND r.organization_id = k.organization_id
WHERE k.digest = $1
"""
_SESSION = """
SELECT s.id, s.created_at, s.last_used_at, s.user_id, o.id AS organization_id, s.ended_at, s.expires_at, s.authenticated_at,
       s.methods, u.disabled_at, u.email_verified_at, m.role, r.permissions AS role_permissions,
       o.suspended_at, o.suspended_reason, o.delete_after, {organization} IS NOT NULL AND m.role IS NULL AS outside,
       g.id AS operator_grant, g.expires_at AS operator_until,
       EXISTS (SELECT FROM totp_keys t WHERE t.user_id = s.user_id AND t.confirmed_at IS NOT NULL)
       OR g.id IS NOT NULL AND EXISTS (SELECT FROM passkeys p WHERE p.user_id = s.user_id) AS second_factor
FROM sign_in_sessions s
JOIN users u ON u.id = s.user_id
LEFT JOIN operator_grants g ON g.user_id = s.user_id AND g.revoked_at IS NULL
LEFT JOIN organizations o ON o.id = {organization}
LEFT JOIN members m ON m.user_id = s.user_id AND m.organization_id = o.id
LEFT JOIN roles r ON r.id = m.role AND r.organization_id = o.id
"""
_SESSION_BY_ID = _SESSION.format(organization="$2::text") + "WHERE s.id = $1"
_SESSION_BY_COOKIE = _SESSION.format(organization="s.organization_id") + "WHERE s.cookie_digest = $1"


async def key_by_digest(reader: Reader, digest: bytes) -> asyncpg.Record | None:
    """The key with its maker's standing, live or not."""
    return await reader.raw.fetchrow(_KEY_BY_DIGEST, digest)


async def session_by_id(reader: Reader, session: str, organization: str | None) -> asyncpg.Record | None:
    """The sign-in session with its person's standing, live or not, and the role that the person has in ``organization``."""
    return await reader.raw.fetchrow(_SESSION_BY_ID, session, organization)


async def session_by_cookie(reader: Reader, digest: bytes) -> asyncpg.Record | None:
    """The same for the session that a browser's cookie belongs to."""
    return await reader.raw.fetchrow(_SESSION_BY_COOKIE, digest)


# --- people and organizations


async def insert_account(tx: Tx, user: dict[str, Any], organization: dict[str, Any], role: str) -> None:
    """A person, an organization and the membership that joins them."""
    await insert_user(tx, user)
    plan = {name: value for name, value in organization.items() if name.startswith("plan")}
    await insert_organization(tx, organization["id"], organization["name"], user["id"], role, plan)


async def insert_user(tx: Tx, user: dict[str, Any]) -> None:
    """A person."""
    await tx.execute(sa.insert(users).values(**user))


async def insert_organization(
    tx: Tx, organization_id: str, name: str, user_id: str, role: str, plan: dict[str, Any]
) -> None:
    """An organization with its first member, on the plan of ``plans.starting``."""
    await tx.execute(sa.insert(organizations).values(id=organization_id, name=name, **plan))
    await tx.execute(sa.insert(members).values(organization_id=organization_id, user_id=user_id, role=role))


async def user_by_email(reader: Reader, email: str, address: str | None) -> Row | None:
    """The person with this e-mail address, with the organization used last; ``known_address``: signed in from there before."""
    earlier = sign_in_sessions.c
    known = sa.exists().where(earlier.user_id == users.c.id, earlier.address == address)
    query = (
        sa.select(
            users.c.id,
            users.c.email,
            users.c.password_hash,
            users.c.disabled_at,
            users.c.email_verified_at,
            organizations.c.id.label("organization_id"),
            organizations.c.name.label("organization_name"),
            known.label("known_address"),
        )
        .select_from(users)
        .outerjoin(members, members.c.user_id == users.c.id)
        .outerjoin(organizations, organizations.c.id == members.c.organization_id)
        .where(users.c.email == email)
        .order_by(*used_last())
        .limit(1)
    )
    return await reader.fetch_one(query)


def used_last() -> list[sa.ColumnElement[Any]]:
    """The order of a person's organizations in which a sign-in chooses: those in good standing first, by last use."""
    ill = sa.or_(organizations.c.suspended_at.is_not(None), organizations.c.delete_after.is_not(None))
    return [ill, members.c.last_used_at.desc().nulls_last(), members.c.created_at, members.c.organization_id]


async def user(reader: Reader, user_id: str) -> Row | None:
    """One person."""
    return await reader.fetch_one(sa.select(users.c.id, users.c.email).where(users.c.id == user_id))


async def set_password_hash(tx: Tx, user_id: str, hashed: str) -> None:
    """Replace a stored hash."""
    await tx.execute(sa.update(users).where(users.c.id == user_id).values(password_hash=hashed))


async def organization(reader: Reader, organization_id: str) -> Row | None:
    """One organization."""
    return await reader.fetch_one(sa.select(organizations).where(organizations.c.id == organization_id))


async def lock_organization(tx: Tx, organization_id: str) -> None:
    """Hold the organization's row, so that counts under it cannot race. Foreign keys to it do not wait."""
    query = sa.select(organizations.c.id).where(organizations.c.id == organization_id)
    await tx.execute(query.with_for_update(key_share=True))


async def first_organization(reader: Reader) -> Row | None:
    """The oldest organization with a person who was ever a platform operator among its members, with that person."""
    query = (
        sa.select(organizations.c.id, organizations.c.name, users.c.id.label("user_id"), users.c.email)
        .join(members, members.c.organization_id == organizations.c.id)
        .join(users, users.c.id == members.c.user_id)
        .where(sa.exists().where(operator_grants.c.user_id == users.c.id))
        .order_by(organizations.c.created_at, organizations.c.id)
        .limit(1)
    )
    return await reader.fetch_one(query)


# --- keys


def _live(now: datetime) -> sa.ColumnElement[bool]:
    return sa.and_(
        api_keys.c.revoked_at.is_(None), sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now)
    )


async def insert_key(tx: Tx, row: dict[str, Any]) -> None:
    """Add a key."""
    await tx.execute(sa.insert(api_keys).values(**row))


async def count_keys(reader: Reader, organization_id: str, now: datetime) -> int:
    """How many live keys the organization has."""
    query = sa.select(sa.func.count()).where(api_keys.c.organization_id == organization_id, _live(now))
    return int(await reader.scalar(query))


async def keys(
    reader: Reader, organization_id: str, maker: str | None, limit: int, before: str | None, now: datetime
) -> Sequence[Row]:
    """Live keys of the organization, newest first; of one ``maker`` alone where one is given."""
    query = sa.select(api_keys).where(api_keys.c.organization_id == organization_id, _live(now))
    if maker is not None:
        query = query.where(api_keys.c.user_id == maker)
    if before is not None:
        query = query.where(api_keys.c.id < before)
    return await reader.fetch_all(query.order_by(api_keys.c.id.desc()).limit(limit))


async def live_key(reader: Reader, organization_id: str, key_id: str, now: datetime) -> Row | None:
    """A live key of the organization."""
    query = sa.select(api_keys).where(
        api_keys.c.organization_id == organization_id, api_keys.c.id == key_id, _live(now)
    )
    return await reader.fetch_one(query)


async def keys_with_makers(reader: Reader, organization_id: str, maker: str | None, now: datetime) -> Sequence[Row]:
    """Every live key (of one ``maker`` alone where one is given), oldest first, with its maker's standing here."""
    query = (
        sa.select(api_keys, users.c.email, users.c.disabled_at, members.c.role)
        .outerjoin(users, users.c.id == api_keys.c.user_id)
        .outerjoin(
            members,
            sa.and_(members.c.user_id == api_keys.c.user_id, members.c.organization_id == api_keys.c.organization_id),
        )
        .where(api_keys.c.organization_id == organization_id, _live(now))
        .order_by(api_keys.c.id)
    )
    return await reader.fetch_all(query if maker is None else query.where(api_keys.c.user_id == maker))


async def key(reader: Reader, key_id: str) -> Row | None:
    """One key whatever its state, for its own bearer."""
    return await reader.fetch_one(sa.select(api_keys).where(api_keys.c.id == key_id))


async def lock_live_key(tx: Tx, organization_id: str, key_id: str, now: datetime) -> Row | None:
    """A live key of the organization, held until the transaction ends."""
    query = sa.select(api_keys).where(
        api_keys.c.organization_id == organization_id, api_keys.c.id == key_id, _live(now)
    )
    return await tx.fetch_one(query.with_for_update())


async def update_key(tx: Tx, key_id: str, **values: Any) -> None:
    """Change a key that the caller holds."""
    await tx.execute(sa.update(api_keys).where(api_keys.c.id == key_id).values(**values))


async def revoke_operator_keys(tx: Tx, now: datetime) -> None:
    """End every operator key."""
    live = sa.and_(api_keys.c.kind == "operator", api_keys.c.revoked_at.is_(None))
    await tx.execute(sa.update(api_keys).where(live).values(revoked_at=now))


async def touch_keys(tx: Tx, used: Iterable[tuple[str, datetime, str | None]]) -> None:
    """Write when and from where keys were last used; never moves a time back."""
    sql = """UPDATE api_keys k SET last_used_at = v.at, last_used_address = v.address
             FROM unnest($1::text[], $2::timestamptz[], $3::text[]) AS v (id, at, address)
             WHERE k.id = v.id AND (k.last_used_at IS NULL OR k.last_used_at <= v.at)"""
    rows = sorted(used, key=lambda row: row[0])
    await tx.raw.execute(sql, [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


# --- sign-in sessions


async def insert_session(tx: Tx, row: dict[str, Any]) -> None:
    """Add a sign-in session."""
    await tx.execute(sa.insert(sign_in_sessions).values(**row))


async def insert_refresh_token(tx: Tx, row: dict[str, Any]) -> None:
    """Add a refresh token to a session."""
    await tx.execute(sa.insert(refresh_tokens).values(**row))


async def lock_refresh_token(tx: Tx, digest: bytes) -> Row | None:
    """The token with its session and person; the session's row is held, so uses of one family take turns."""
    r, s = refresh_tokens, sign_in_sessions
    query = (
        sa.select(
            r.c.used_at,
            r.c.expires_at,
            s.c.id.label("session_id"),
            s.c.user_id,
            s.c.organization_id,
            s.c.expires_at.label("session_expires_at"),
            s.c.ended_at,
            users.c.disabled_at,
        )
        .join(s, s.c.id == r.c.session_id)
        .join(users, users.c.id == s.c.user_id)
        .where(r.c.digest == digest)
        .with_for_update(of=[s, r])
    )
    return await tx.fetch_one(query)


async def use_refresh_token(tx: Tx, digest: bytes, session: str, now: datetime) -> None:
    """Mark the token used and its session alive."""
    await tx.execute(sa.update(refresh_tokens).where(refresh_tokens.c.digest == digest).values(used_at=now))
    await tx.execute(sa.update(sign_in_sessions).where(sign_in_sessions.c.id == session).values(last_used_at=now))


async def sessions(reader: Reader, user_id: str, limit: int, before: str | None, now: datetime) -> Sequence[Row]:
    """A person's live sign-in sessions, newest first."""
    t = sign_in_sessions
    query = sa.select(t).where(t.c.user_id == user_id, t.c.ended_at.is_(None), t.c.expires_at > now)
    if before is not None:
        query = query.where(t.c.id < before)
    return await reader.fetch_all(query.order_by(t.c.id.desc()).limit(limit))


async def end_sessions(
    tx: Tx,
    user_id: str,
    session: str | None,
    reason: str,
    now: datetime,
    *,
    organization: str | None = None,
) -> Sequence[str]:
    """End one or all live sessions of a person (in one organization, where one is given); returns their ids."""
    t = sign_in_sessions
    update = sa.update(t).where(t.c.user_id == user_id, t.c.ended_at.is_(None), t.c.expires_at > now)
    if session is not None:
        update = update.where(t.c.id == session)
    if organization is not None:
        update = update.where(t.c.organization_id == organization)
    result = await tx.execute(update.values(ended_at=now, end_reason=reason).returning(t.c.id))
    return [str(row.id) for row in result]


def _live_session(session: str, now: datetime) -> sa.ColumnElement[bool]:
    t = sign_in_sessions
    return sa.and_(t.c.id == session, t.c.ended_at.is_(None), t.c.expires_at > now)


async def touch_session(tx: Tx, session: str, now: datetime, expires: datetime) -> None:
    """Note a use of a live session, and put its end off."""
    t = sign_in_sessions
    await tx.execute(sa.update(t).where(_live_session(session, now)).values(last_used_at=now, expires_at=expires))


async def set_cookie(tx: Tx, session: str, digest: bytes, now: datetime) -> bool:
    """Give a live session of a browser another cookie; whether there is such a session."""
    t = sign_in_sessions
    update = sa.update(t).where(_live_session(session, now), t.c.cookie_digest.is_not(None))
    return bool((await tx.execute(update.values(cookie_digest=digest).returning(t.c.id))).all())


async def expire_sessions(db: Database, before: datetime) -> None:
    """Delete sessions (and with them their tokens) that ended or expired before ``before``."""
    t = sign_in_sessions
    await delete_in_batches(db, t, sa.or_(t.c.ended_at < before, t.c.expires_at < before))
