"""Queries over people as account holders and over their ways in. Identity's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from portico.control.identity.account_tables import account_tokens, passkey_challenges, totp_keys
from portico.control.identity.store import used_last
from portico.control.identity.tables import api_keys, device_codes, members, organizations, sign_in_sessions, users
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, Reader, Tx

Row = sa.Row[Any]


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who can sign in, and the organization that a sign-in leads to: the one used last, if any."""

    id: str
    email: str
    password_hash: str | None
    email_verified_at: datetime | None
    organization_id: str | None
    organization_name: str | None


async def lock_user(tx: Tx, user_id: str) -> Row | None:
    """A person's row, held until the transaction ends. Foreign keys to it do not wait."""
    return await tx.fetch_one(sa.select(users).where(users.c.id == user_id).with_for_update(key_share=True))


async def hold_person(tx: Tx, user_id: str) -> Person | None:
    """The person and the membership used last, both held; ``None`` for who is disabled."""
    row = await lock_user(tx, user_id)
    if row is None or row.disabled_at is not None:
        return None
    query = (
        sa.select(organizations.c.id, organizations.c.name)
        .join(members, members.c.organization_id == organizations.c.id)
        .where(members.c.user_id == user_id)
        .order_by(*used_last())
        .limit(1)
    )
    home = await tx.fetch_one(query.with_for_update(read=True, of=members))
    found = (home.id, home.name) if home is not None else (None, None)
    return Person(row.id, row.email, row.password_hash, row.email_verified_at, *found)


async def user(reader: Reader, user_id: str) -> Row | None:
    """A person, whole."""
    return await reader.fetch_one(sa.select(users).where(users.c.id == user_id))


async def home(reader: Reader, user_id: str) -> str | None:
    """The organization in whose audit log acts on the person's account are: the one joined first."""
    query = sa.select(members.c.organization_id).where(members.c.user_id == user_id)
    found = await reader.scalar(query.order_by(members.c.created_at, members.c.organization_id).limit(1))
    return None if found is None else str(found)


async def has_company(reader: Reader, user_id: str) -> bool:
    """Whether somebody else is a member of an organization that the person belongs to."""
    mine, other = members.alias(), members.alias()
    found = sa.exists().where(
        mine.c.user_id == user_id, other.c.organization_id == mine.c.organization_id, other.c.user_id != user_id
    )
    return bool(await reader.scalar(sa.select(found)))


async def lock_keys(tx: Tx, user_id: str) -> list[str]:
    """The unrevoked keys that a person made, in every organization, held until the transaction ends."""
    query = sa.select(api_keys.c.id).where(api_keys.c.user_id == user_id, api_keys.c.revoked_at.is_(None))
    return [row.id for row in await tx.fetch_all(query.order_by(api_keys.c.id).with_for_update())]


async def update_user(tx: Tx, user_id: str, **values: Any) -> None:
    """Change a person."""
    await tx.execute(sa.update(users).where(users.c.id == user_id).values(**values))


# --- sessions


async def lock_session(tx: Tx, session: str) -> Row | None:
    """A live sign-in session, held until the transaction ends."""
    t = sign_in_sessions
    return await tx.fetch_one(sa.select(t).where(t.c.id == session, t.c.ended_at.is_(None)).with_for_update())


async def note_proof(tx: Tx, session: str, now: datetime, methods: Sequence[str]) -> None:
    """Write that the person of a session proved who they are."""
    t = sign_in_sessions
    await tx.execute(sa.update(t).where(t.c.id == session).values(authenticated_at=now, methods=list(methods)))


async def end_other_sessions(tx: Tx, user_id: str, kept: str | None, reason: str, now: datetime) -> int:
    """End every live session of a person but ``kept``; how many it were."""
    t = sign_in_sessions
    where = sa.and_(t.c.user_id == user_id, t.c.ended_at.is_(None), t.c.expires_at > now)
    if kept is not None:
        where = sa.and_(where, t.c.id != kept)
    return int((await tx.execute(sa.update(t).where(where).values(ended_at=now, end_reason=reason))).rowcount)


async def deny_device_codes(tx: Tx, user_id: str) -> None:
    """Take back the approvals of a person whose devices have not fetched their key yet."""
    where = sa.and_(device_codes.c.user_id == user_id, device_codes.c.state == "approved")
    await tx.execute(sa.update(device_codes).where(where).values(state="denied"))


async def drop_begun(tx: Tx, user_id: str) -> None:
    """Void what sessions of a person began and others may finish: another address, the key of an authenticator app that no code
    confirmed, approvals of devices that have not fetched their key. Whoever ends a session for fear of a thief ends this too."""
    await drop_tokens(tx, user_id, "change")
    unconfirmed = sa.and_(totp_keys.c.user_id == user_id, totp_keys.c.confirmed_at.is_(None))
    await tx.execute(sa.delete(totp_keys).where(unconfirmed))
    await deny_device_codes(tx, user_id)


# --- secrets with one use


async def insert_token(tx: Tx, row: dict[str, Any]) -> None:
    """Add one."""
    await tx.execute(sa.insert(account_tokens).values(**row))


async def token(reader: Reader, digest: bytes, purpose: str, now: datetime) -> Row | None:
    """One that is unused and has not expired."""
    t = account_tokens
    live = sa.and_(t.c.digest == digest, t.c.purpose == purpose, t.c.used_at.is_(None), t.c.expires_at > now)
    return await reader.fetch_one(sa.select(t).where(live))


async def use_token(tx: Tx, digest: bytes, purpose: str, now: datetime) -> Row | None:
    """Use one: of two that try at once, one gets the row and the other ``None``."""
    t = account_tokens
    live = sa.and_(t.c.digest == digest, t.c.purpose == purpose, t.c.used_at.is_(None), t.c.expires_at > now)
    return (await tx.execute(sa.update(t).where(live).values(used_at=now).returning(t))).first()


async def drop_tokens(tx: Tx, user_id: str, *purposes: str) -> None:
    """Delete a person's tokens of these purposes."""
    t = account_tokens
    await tx.execute(sa.delete(t).where(t.c.user_id == user_id, t.c.purpose.in_(purposes)))


async def expire(db: Database, before: datetime) -> None:
    """Delete tokens and challenges that expired before ``before``."""
    for t in (account_tokens, passkey_challenges):
        await delete_in_batches(db, t, t.c.expires_at < before)
