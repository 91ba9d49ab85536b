"""The Ed25519 keys that sign access tokens, session tokens and grants.

    next ──(published for signing_key_publish_seconds)──► active ──(signing_key_seconds)──► retired ──► gone

A key is in the JWKS before it signs, so no verifier meets an unknown ``kid``; it stays there after it retires until every
token that it signed has expired. At most one key is next and one active (unique indexes); rotation runs under a
transaction advisory lock. Private halves are sealed under the master key and erased on retirement.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from portico.control.identity.tables import signing_keys as t
from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx
from portico.kit.jwt import KeySet, SigningKey, public_jwk
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

_LOCK_KEY = 0x6A776B73  # "jwks"
_PURPOSE = "signing key"

# Called in the rotating transaction with the new key set, lowest layer first; tunnels tells the relays through it.
KeysChanged = Callable[[Tx, Sequence[dict[str, str]]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Cached:
    signer: SigningKey
    jwks: tuple[dict[str, str], ...]
    keys: KeySet
    until: float


class SigningKeys:
    """Signs and publishes. One per process; holds the keys in memory for ``signing_key_cache_seconds``."""

    def __init__(self, settings: ApiSettings, sealer: Sealer, clock: Clock) -> None:
        self._settings = settings
        self._sealer = sealer
        self._clock = clock
        self._cached: _Cached | None = None
        self.on_changed: list[KeysChanged] = []

    async def current_signer(self, reader: Reader) -> SigningKey:
        """The key that signs now. Raises ``service.unavailable`` before the first ``rotate``."""
        return (await self._load(reader)).signer

    async def public_jwks(self, reader: Reader) -> list[dict[str, str]]:
        """Every published key (next, active, retired and not yet gone) as JWKs, in order of ``kid``."""
        return list((await self._load(reader)).jwks)

    async def published(self, reader: Reader) -> list[dict[str, str]]:
        """The same as ``public_jwks``, as this reader's snapshot has it and never from memory."""
        return [_jwk(row) for row in await reader.fetch_all(sa.select(t).order_by(t.c.kid))]

    async def key_set(self, reader: Reader) -> KeySet:
        """The published keys, for verification."""
        return (await self._load(reader)).keys

    async def _load(self, reader: Reader) -> _Cached:
        cached = self._cached
        if cached is not None and self._clock.monotonic() < cached.until:
            return cached
        rows = await reader.fetch_all(sa.select(t).order_by(t.c.kid))
        active = next((row for row in rows if row.state == "active"), None)
        if active is None:
            raise Problem("service.unavailable", "there is no signing key yet")
        jwks = tuple(_jwk(row) for row in rows)
        until = self._clock.monotonic() + self._settings.signing_key_cache_seconds
        self._cached = _Cached(self._open(active), jwks, KeySet.from_jwks({"keys": list(jwks)}), until)
        return self._cached

    def _open(self, row: Any) -> SigningKey:
        return SigningKey(self._sealer.open(_PURPOSE, row.kid, row.sealed_seed), row.kid)

    async def rotate(self, tx: Tx, *, force: bool = False) -> bool:
        """Bring the keys to where the clock says they should be; returns whether anything changed.

        ``force`` makes the next key active at once, however short it was published (a leaked key).
        """
        await tx.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
        now = self._clock.wall()
        rows = {row.state: row for row in await tx.fetch_all(sa.select(t).where(t.c.state != "retired"))}
        changed = await self._drop_old(tx, now)
        active, following = rows.get("active"), rows.get("next")
        if active is None:
            await self._insert(tx, "active", now)
            changed = True
        elif following is not None and (force or self._due(active, following, now)):
            await self._advance(tx, active.kid, following.kid, now)
            following, changed = None, True
        if following is None:
            await self._insert(tx, "next", now)
            changed = True
        if changed:
            await self._announce(tx)
        return changed

    def _due(self, active: Any, following: Any, now: datetime) -> bool:
        settings = self._settings
        served = now - active.activated_at >= timedelta(seconds=settings.signing_key_seconds)
        published = now - following.created_at >= timedelta(seconds=settings.signing_key_publish_seconds)
        return bool(served and published)

    async def _drop_old(self, tx: Tx, now: datetime) -> bool:
        edge = now - timedelta(seconds=self._settings.signing_key_retired_seconds)
        gone = await tx.execute(sa.delete(t).where(t.c.state == "retired", t.c.retired_at < edge))
        return int(gone.rowcount) > 0

    async def _advance(self, tx: Tx, active: str, following: str, now: datetime) -> None:
        retire = sa.update(t).where(t.c.kid == active)
        await tx.execute(retire.values(state="retired", retired_at=now, sealed_seed=None))
        await tx.execute(sa.update(t).where(t.c.kid == following).values(state="active", activated_at=now))

    async def _insert(self, tx: Tx, state: str, now: datetime) -> None:
        key = SigningKey.generate()
        await tx.execute(
            insert(t).values(
                kid=key.kid,
                state=state,
                public_x=key.public.public_bytes_raw(),
                sealed_seed=self._sealer.seal(_PURPOSE, key.kid, key.seed()),
                created_at=now,
                activated_at=now if state == "active" else None,
            )
        )

    async def _announce(self, tx: Tx) -> None:
        jwks = [_jwk(row) for row in await tx.fetch_all(sa.select(t).order_by(t.c.kid))]
        for tell in self.on_changed:
            await tell(tx, jwks)
        tx.after_commit(self.forget)

    def forget(self) -> None:
        """Drop the copy in memory; the next use reads the table."""
        self._cached = None


def _jwk(row: Any) -> dict[str, str]:
    return public_jwk(row.kid, row.public_x)


async def ensure(db: Database, keys: SigningKeys) -> None:
    """Make the first keys if there are none, rotate if it is time. Called at start and by housekeeping."""
    async with db.transaction() as tx:
        await keys.rotate(tx)
