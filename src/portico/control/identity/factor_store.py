"""Queries over authenticator apps, recovery codes and passkeys. Identity's own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from portico.control.identity.account_tables import passkey_challenges, passkeys, recovery_codes, totp_keys
from portico.control.identity.tables import sign_in_sessions
from portico.kit.db import Reader, Tx

Row = sa.Row[Any]


async def known_address(reader: Reader, user_id: str, address: str | None) -> bool:
    """Whether the person signed in from this address before."""
    t = sign_in_sessions
    found = sa.exists().where(t.c.user_id == user_id, t.c.address == address)
    return bool(await reader.scalar(sa.select(found)))


# --- authenticator apps


async def put_totp(tx: Tx, user_id: str, sealed: bytes, now: datetime) -> bool:
    """Store an unconfirmed key in the place of another unconfirmed one; ``False`` when a confirmed one is there."""
    values = {"sealed_secret": sealed, "last_step": 0, "created_at": now}
    statement = insert(totp_keys).values(user_id=user_id, **values)
    statement = statement.on_conflict_do_update(
        index_elements=["user_id"], set_=values, where=totp_keys.c.confirmed_at.is_(None)
    )
    return (await tx.execute(statement.returning(totp_keys.c.user_id))).first() is not None


async def totp(reader: Reader, user_id: str) -> Row | None:
    """The key, confirmed or not."""
    return await reader.fetch_one(sa.select(totp_keys).where(totp_keys.c.user_id == user_id))


async def lock_totp(tx: Tx, user_id: str) -> Row | None:
    """The key, confirmed or not, held: codes of one person are checked one after the other."""
    return await tx.fetch_one(sa.select(totp_keys).where(totp_keys.c.user_id == user_id).with_for_update())


async def has_totp(reader: Reader, user_id: str) -> bool:
    """Whether the person's sign-in takes a second step."""
    found = sa.exists().where(totp_keys.c.user_id == user_id, totp_keys.c.confirmed_at.is_not(None))
    return bool(await reader.scalar(sa.select(found)))


async def update_totp(tx: Tx, user_id: str, **values: Any) -> None:
    """Change a key that is held."""
    await tx.execute(sa.update(totp_keys).where(totp_keys.c.user_id == user_id).values(**values))


async def drop_totp(tx: Tx, user_id: str) -> bool:
    """Delete the key and the recovery codes that came with it; whether a confirmed key was there."""
    await tx.execute(sa.delete(recovery_codes).where(recovery_codes.c.user_id == user_id))
    gone = await tx.execute(
        sa.delete(totp_keys).where(totp_keys.c.user_id == user_id).returning(totp_keys.c.confirmed_at)
    )
    row = gone.first()
    return row is not None and row.confirmed_at is not None


# --- recovery codes


async def replace_recovery_codes(tx: Tx, user_id: str, digests: Sequence[bytes], now: datetime) -> None:
    """These, in the place of all others."""
    await tx.execute(sa.delete(recovery_codes).where(recovery_codes.c.user_id == user_id))
    rows = [{"user_id": user_id, "digest": digest, "created_at": now} for digest in digests]
    await tx.execute(sa.insert(recovery_codes), rows)


async def use_recovery_code(tx: Tx, user_id: str, digest: bytes, now: datetime) -> bool:
    """Use one up: of two that try at once, one is told yes."""
    t = recovery_codes
    where = sa.and_(t.c.user_id == user_id, t.c.digest == digest, t.c.used_at.is_(None))
    return int((await tx.execute(sa.update(t).where(where).values(used_at=now))).rowcount) == 1


async def recovery_codes_left(reader: Reader, user_id: str) -> int:
    """How many are unused."""
    t = recovery_codes
    return int(await reader.scalar(sa.select(sa.func.count()).where(t.c.user_id == user_id, t.c.used_at.is_(None))))


# --- passkeys


async def insert_challenge(tx: Tx, row: dict[str, Any]) -> None:
    """Remember what an authenticator is asked to sign."""
    await tx.execute(sa.insert(passkey_challenges).values(**row))


async def take_challenge(tx: Tx, challenge: bytes, purpose: str, bound_to: str | None, now: datetime) -> Row | None:
    """Use a challenge up: of two that try at once, one gets the row and the other ``None``."""
    t = passkey_challenges
    same = t.c.bound_to.is_not_distinct_from(bound_to)
    where = sa.and_(t.c.challenge == challenge, t.c.purpose == purpose, same, t.c.expires_at > now)
    return (await tx.execute(sa.delete(t).where(where).returning(t))).first()


async def insert_passkey(tx: Tx, row: dict[str, Any]) -> None:
    """Add one. Raises an integrity error (``passkeys_credential_id_key``) when some account has it already."""
    await tx.execute(sa.insert(passkeys).values(**row))


async def passkeys_of(reader: Reader, user_id: str) -> Sequence[Row]:
    """All of a person, in the order in which they were made."""
    return await reader.fetch_all(sa.select(passkeys).where(passkeys.c.user_id == user_id).order_by(passkeys.c.id))


async def passkey_by_credential(reader: Reader, credential_id: bytes) -> Row | None:
    """The passkey that an authenticator calls by this id."""
    return await reader.fetch_one(sa.select(passkeys).where(passkeys.c.credential_id == credential_id))


async def lock_passkey(tx: Tx, user_id: str, passkey_id: str) -> Row | None:
    """A passkey of the person, held until the transaction ends."""
    query = sa.select(passkeys).where(passkeys.c.user_id == user_id, passkeys.c.id == passkey_id)
    return await tx.fetch_one(query.with_for_update())


async def update_passkey(tx: Tx, passkey_id: str, **values: Any) -> None:
    """Change one that is held."""
    await tx.execute(sa.update(passkeys).where(passkeys.c.id == passkey_id).values(**values))


async def drop_passkeys(tx: Tx, user_id: str, passkey_id: str | None = None) -> int:
    """Delete one passkey of a person, or all; how many it were."""
    statement = sa.delete(passkeys).where(passkeys.c.user_id == user_id)
    if passkey_id is not None:
        statement = statement.where(passkeys.c.id == passkey_id)
    return int((await tx.execute(statement)).rowcount)
