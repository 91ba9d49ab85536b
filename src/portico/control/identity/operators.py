"""Platform operators: people with a grant that no organization can give.

A grant is made on the machine of the installation (its first start, `portico admin grant`), never by a route of the API:
neither a sign-up, an invitation nor an import comes here. It may expire. It is looked at in every request, so revoking it
ends what the person may do at once, with sessions that they have open. The last operator who can sign in and whose grant
does not expire stays: an installation without one could not be run by people any more. Everything is in the audit log of the
installation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity.tables import operator_grants, users
from portico.errors import Problem
from portico.kit.db import Reader, Tx
from portico.kit.ids import new_id

#: Who acts on the machine of the installation, with its database.
INSTALLATION: Final = Caller("operator", "installation", None, platform_operator=True)
# Whoever makes the number of operators smaller holds this: of two who revoke each other at once, one succeeds.
_LOCK: Final = 0x6F70_6572_6174_6F72

_g = operator_grants.c


def holds(grant: str | None, until: datetime | None, now: datetime) -> bool:
    """Whether an unrevoked grant (its id, its expiry) makes an operator now."""
    return grant is not None and (until is None or until > now)


async def by_email(reader: Reader, email: str) -> str:
    """The id of the person with this address, in its normal form. Raises ``request.not_found``."""
    found = await reader.scalar(sa.select(users.c.id).where(users.c.email == email))
    if found is None:
        raise Problem("request.not_found", f"nobody has an account as {email}")
    return str(found)


async def grant(
    tx: Tx,
    caller: Caller,
    user_id: str,
    *,
    now: datetime,
    expires_at: datetime | None = None,
    reason: str | None = None,
    details: dict[str, Any] | None = None,
) -> str:
    """Make a person an operator, or replace the grant that they have; returns its id.

    Raises ``auth.expiry_invalid``, ``operator.disabled`` for an account that cannot sign in, ``operator.last`` when the
    only grant without expiry would be given one.
    """
    if expires_at is not None and expires_at <= now:
        raise Problem("auth.expiry_invalid")
    await _lock(tx)
    person = await tx.fetch_one(sa.select(users.c.email, users.c.disabled_at).where(users.c.id == user_id))
    if person is None or person.disabled_at is not None:
        raise Problem("operator.disabled")
    if expires_at is not None:
        await keep_one(tx, user_id)
    before = await _end(tx, caller, user_id, now)
    row = {"id": new_id("opg"), "user_id": user_id, "granted_by": caller.id, "granted_at": now}
    await tx.execute(sa.insert(operator_grants).values(**row, reason=reason, expires_at=expires_at))
    await _mirror(tx, user_id, expires_at is None)
    facts = {
        "email": person.email,
        "reason": reason,
        "expires_at": expires_at and expires_at.isoformat(),
        **(details or {}),
    }
    if before is not None:
        facts["replaces"] = before
    await audit.record(tx, caller, "operator.grant", user_id, details=facts, organization=audit.INSTALLATION)
    return str(row["id"])


async def revoke(
    tx: Tx,
    caller: Caller,
    user_id: str,
    *,
    now: datetime,
    reason: str | None = None,
    details: dict[str, Any] | None = None,
) -> None:
    """End a person's grant, at once. Raises ``request.not_found`` when there is none, ``operator.last``."""
    await _lock(tx)
    await keep_one(tx, user_id)
    ended = await _end(tx, caller, user_id, now)
    if ended is None:
        raise Problem("request.not_found", "this person is no platform operator")
    await _mirror(tx, user_id, False)
    facts = {"grant": ended, "reason": reason, **(details or {})}
    await audit.record(tx, caller, "operator.revoke", user_id, details=facts, organization=audit.INSTALLATION)


async def keep_one(tx: Tx, user_id: str) -> None:
    """Raises ``operator.last`` when ``user_id`` is the last operator who can sign in and whose grant does not expire.

    Until the transaction ends nobody else can become one less.
    """
    await _lock(tx)
    lasting = (
        sa.select(_g.user_id)
        .join(users, users.c.id == _g.user_id)
        .where(_g.revoked_at.is_(None), _g.expires_at.is_(None), users.c.disabled_at.is_(None))
    )
    if {row.user_id for row in await tx.fetch_all(lasting)} == {user_id}:
        raise Problem("operator.last")


async def record(tx: Tx, caller: Caller, act: str, target: str, details: dict[str, Any], *organizations: str) -> None:
    """Record an operator's act in the log of the installation, and in those of the ``organizations`` that it concerns.

    These see which operator it was, not from where.
    """
    await audit.record(tx, caller, act, target, details=details, organization=audit.INSTALLATION)
    seen = replace(caller, kind="operator", address=None)
    for organization in organizations:
        await audit.record(tx, seen, act, target, details=details, organization=organization)


async def listing(reader: Reader) -> Sequence[sa.Row[Any]]:
    """Every grant that was not revoked, those past their expiry too, with the person's address; oldest first."""
    query = (
        sa.select(operator_grants, users.c.email, users.c.disabled_at)
        .join(users, users.c.id == _g.user_id)
        .where(_g.revoked_at.is_(None))
        .order_by(_g.granted_at, _g.id)
    )
    return await reader.fetch_all(query)


async def _lock(tx: Tx) -> None:
    await tx.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))


async def _end(tx: Tx, caller: Caller, user_id: str, now: datetime) -> str | None:
    """Revoke the live grant of a person, if there is one; its id."""
    live = sa.update(operator_grants).where(_g.user_id == user_id, _g.revoked_at.is_(None))
    row = (await tx.execute(live.values(revoked_at=now, revoked_by=caller.id).returning(_g.id))).first()
    return str(row.id) if row is not None else None


async def _mirror(tx: Tx, user_id: str, operator: bool) -> None:
    """What code from before grants reads; it knows no expiry, so a grant with one is none to it."""
    await tx.execute(sa.update(users).where(users.c.id == user_id).values(platform_operator=operator))
