"""The first start of an installation: a platform operator, a first organization, and the credentials that `up` hands out.

Idempotent: what exists is kept. A key whose text is no longer known (``credentials.json`` was lost) cannot be shown
again, so it is replaced; an operator key that nobody holds any more is revoked with that.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from portico.control import changes
from portico.control.access import Caller
from portico.control.domains import regions
from portico.control.identity import installation, operators
from portico.control.identity.passwords import Passwords
from portico.control.identity.service import Identity
from portico.control.identity.signing_keys import SigningKeys
from portico.control.tunnels import relays as relay_registry
from portico.kit.clock import SystemClock
from portico.kit.db import Database, PoolLimits, Tx
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

_LOCK_KEY = 0x6669727374  # "first"
_INSTALLER = Caller("operator", "installation", None, platform_operator=True)
FIRST_ORGANIZATION = "First organization"

RelayKey = Callable[[Tx, Caller, str], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class FirstAdmin:
    """The person that the first start made; the password is shown once."""

    email: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What `up` writes down and hands to its children."""

    organization_id: str
    operator_key: str = field(repr=False)
    agent_key: str = field(repr=False)
    relay_keys: dict[str, str] = field(repr=False)
    first_admin: FirstAdmin | None = field(repr=False)


async def new_relay_key(tx: Tx, caller: Caller, name: str) -> str:
    """A key for the relay called ``name``, bound to that name; the one of the run before is revoked."""
    return await relay_registry.replace_key(tx, caller, name)


async def ensure_first(
    settings: ApiSettings,
    *,
    relays: Sequence[str] = (),
    known: Mapping[str, str | None] | None = None,
    relay_key: RelayKey = new_relay_key,
    region_key: tuple[str, str] | None = None,
) -> Credentials:
    """Make what is missing, on a migrated database, and return working credentials.

    ``known`` are ``operator_key`` and ``agent_key`` of an earlier start, kept while they are live. Every relay named
    gets a fresh key. ``region_key``: a region, and the public key that certificates are wrapped for there.
    """
    known = known or {}
    limits = PoolLimits(size=2)
    db = Database(settings.database_url.reveal(), limits, application="portico first start")
    passwords = Passwords(settings)
    try:
        password = secrets.token_urlsafe(15)
        hashed = await passwords.hash(password)
        clock = SystemClock()
        sealer = Sealer(settings.master_key)
        signing_keys = SigningKeys(settings, sealer, clock)
        signing_keys.on_changed.append(_announce_keys)
        identity = Identity(settings, db, clock, sealer, signing_keys, passwords)
        async with db.transaction() as tx:
            await tx.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
            await signing_keys.rotate(tx)
            if region_key is not None:
                await regions.ensure_key(tx, _INSTALLER, *region_key)
            organization, user_id, email = await _organization(tx, identity, hashed, settings)
            return Credentials(
                organization,
                await installation.operator_key(tx, _INSTALLER, clock.wall(), known.get("operator_key")),
                await installation.agent_key(
                    tx, _INSTALLER, clock.wall(), organization, user_id, known.get("agent_key")
                ),
                {name: await relay_key(tx, _INSTALLER, name) for name in relays},
                FirstAdmin(email, password) if email else None,
            )
    finally:
        passwords.close()
        await db.close()


async def _announce_keys(tx: Tx, jwks: Sequence[dict[str, str]]) -> None:
    changes.append(tx, changes.keys(jwks))


async def _organization(tx: Tx, identity: Identity, hashed: str, settings: ApiSettings) -> tuple[str, str, str | None]:
    """The first organization and its owner; the third value is the owner's address when it was made just now."""
    found = await installation.first_organization(tx)
    if found is not None:
        return found.id, found.user_id, None
    email = f"admin@{settings.base_domain}"
    user_id, organization = await identity.create_account(
        tx, _INSTALLER, email, hashed, FIRST_ORGANIZATION, verified=True
    )
    await operators.grant(tx, _INSTALLER, user_id, now=identity.clock.wall(), reason="first start")
    return organization, user_id, email


def document(credentials: Credentials) -> dict[str, Any]:
    """The credentials as JSON, for the process that asked for them."""
    admin = credentials.first_admin
    return {
        "organization_id": credentials.organization_id,
        "operator_key": credentials.operator_key,
        "agent_key": credentials.agent_key,
        "relay_keys": credentials.relay_keys,
        "first_admin": {"email": admin.email, "password": admin.password} if admin else None,
    }
