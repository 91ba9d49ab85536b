"""What operators see of people and do to accounts: disable and enable, end sessions, take second factors away.

An operator acts on an account, never as it: no verb here gives a session, a key or a password. Taking second factors away
leaves a password that somebody else may know, so it takes two operators, both people: one asks, another one confirms.
Acts are in the log of the installation, and in that of each organization that the person belongs to.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import AfterValidator, StringConstraints

from portico.control.access import Caller
from portico.control.identity import account_store, operators, store
from portico.control.identity.account_tables import passkeys, recovery_codes, totp_keys
from portico.control.identity.keys import Keys
from portico.control.identity.letters import Letters
from portico.control.identity.tables import (
    api_keys,
    members,
    mfa_resets,
    operator_grants,
    organizations,
    roles,
    sign_in_sessions,
    users,
)
from portico.control.requests import shown
from portico.errors import Problem
from portico.kit import pages
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.kit.ids import new_id
from portico.settings import ApiSettings

#: Why an operator, or an owner, does something: one line that others will read.
Reason = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500), AfterValidator(shown)]

_u = users.c
_r = mfa_resets.c


class People:
    """The verbs on accounts."""

    def __init__(self, settings: ApiSettings, clock: Clock, keys: Keys, letters: Letters) -> None:
        self._settings = settings
        self._letters = letters
        self._clock = clock
        self._keys = keys

    # -- reading

    async def listing(
        self, reader: Reader, page: pages.PageRequest, search: str | None, disabled: bool | None
    ) -> dict[str, Any]:
        """A page of accounts in the order in which they were made; ``search``: a part of the address, or an id."""
        query = self._facts()
        if search is not None:
            query = query.where(sa.or_(sa.func.strpos(_u.email, search.lower()) > 0, _u.id == search))
        if disabled is not None:
            query = query.where(_u.disabled_at.is_not(None) if disabled else _u.disabled_at.is_(None))
        if page.after is not None:
            query = query.where(_u.id > page.after[0])
        rows = await reader.fetch_all(query.order_by(_u.id).limit(page.limit + 1))
        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), lambda row: row._asdict())
        return document

    async def get(self, reader: Reader, user_id: str) -> dict[str, Any]:
        """One account with its organizations. Raises ``request.not_found``."""
        row = await reader.fetch_one(self._facts().where(_u.id == user_id))
        if row is None:
            raise Problem("request.not_found", "there is no such person")
        return {**row._asdict(), "organizations": await self._organizations(reader, user_id)}

    def _facts(self) -> sa.Select[Any]:
        now, g, s = self._clock.wall(), operator_grants.c, sign_in_sessions.c
        factor = sa.or_(
            sa.exists().where(passkeys.c.user_id == _u.id),
            sa.exists().where(totp_keys.c.user_id == _u.id, totp_keys.c.confirmed_at.is_not(None)),
        )
        grant = sa.exists().where(
            g.user_id == _u.id, g.revoked_at.is_(None), sa.or_(g.expires_at.is_(None), g.expires_at > now)
        )
        live = sa.select(sa.func.count()).where(s.user_id == _u.id, s.ended_at.is_(None), s.expires_at > now)
        return sa.select(
            _u.id,
            _u.email,
            _u.email_verified_at,
            _u.created_at,
            _u.disabled_at,
            factor.label("second_factor"),
            grant.label("platform_operator"),
            live.scalar_subquery().label("sessions"),
        )

    @staticmethod
    async def _organizations(reader: Reader, user_id: str) -> list[dict[str, Any]]:
        query = (
            sa.select(
                organizations.c.id, organizations.c.name, sa.func.coalesce(roles.c.name, members.c.role).label("role")
            )
            .join(members, members.c.organization_id == organizations.c.id)
            .outerjoin(roles, sa.and_(roles.c.id == members.c.role, roles.c.organization_id == organizations.c.id))
            .where(members.c.user_id == user_id)
            .order_by(organizations.c.id)
        )
        return [row._asdict() for row in await reader.fetch_all(query)]

    # -- acts

    async def disable(self, tx: Tx, caller: Caller, user_id: str, reason: str) -> dict[str, Any]:
        """Refuse sign-in, sessions and keys from now on, and end what runs with them. Disabling twice is no error.

        Raises ``request.not_found``, ``operator.self``, ``operator.last``.
        """
        if caller.user_id == user_id:
            raise Problem("operator.self")
        await operators.keep_one(tx, user_id)
        row = await self._lock(tx, user_id)
        if row.disabled_at is None:
            now = self._clock.wall()
            await account_store.update_user(tx, user_id, disabled_at=now)
            await account_store.drop_begun(tx, user_id)
            keys = await self._lock_keys(tx, user_id)
            for key_id in keys:
                await self._keys.end_work(tx, key_id)
            ended = await store.end_sessions(tx, user_id, None, "disabled by an operator", now)
            await self._record(tx, caller, "user.disable", user_id, reason=reason, sessions=len(ended), keys=len(keys))
        return await self.get(tx, user_id)

    async def enable(self, tx: Tx, caller: Caller, user_id: str, reason: str) -> dict[str, Any]:
        """Take that back; keys work again, sessions that were ended do not. Raises ``request.not_found``."""
        row = await self._lock(tx, user_id)
        if row.disabled_at is not None:
            await account_store.update_user(tx, user_id, disabled_at=None)
            await self._record(tx, caller, "user.enable", user_id, reason=reason)
        return await self.get(tx, user_id)

    async def end_sessions(self, tx: Tx, caller: Caller, user_id: str) -> None:
        """End every sign-in session of a person. Raises ``request.not_found``."""
        await self._lock(tx, user_id)
        await account_store.drop_begun(tx, user_id)
        ended = await store.end_sessions(tx, user_id, None, "ended by an operator", self._clock.wall())
        await self._record(tx, caller, "session.end_all", user_id, sessions=len(ended))

    # -- second factors, by two operators

    async def ask_mfa_reset(self, tx: Tx, caller: Caller, user_id: str, reason: str) -> dict[str, Any]:
        """Ask that a person's second factors be taken away; another operator confirms it. The newest request counts.

        Raises ``request.not_found``, ``operator.self``, ``operator.second_required``.
        """
        _a_person(caller)
        if caller.user_id == user_id:
            raise Problem("operator.self")
        await self._lock(tx, user_id)
        now = self._clock.wall()
        waiting = sa.and_(_r.user_id == user_id, _r.confirmed_at.is_(None), _r.withdrawn_at.is_(None))
        await tx.execute(sa.update(mfa_resets).where(waiting).values(withdrawn_at=now))
        row = {
            "id": new_id("mfr"),
            "user_id": user_id,
            "requested_by": caller.id,
            "reason": reason,
            "created_at": now,
            "expires_at": now + timedelta(seconds=self._settings.mfa_reset_seconds),
        }
        await tx.execute(sa.insert(mfa_resets).values(**row))
        await self._record(tx, caller, "user.mfa_reset_request", user_id, reason=reason, request=row["id"])
        return _reset(await self._reset(tx, str(row["id"])), now)

    async def mfa_resets(self, reader: Reader, page: pages.PageRequest) -> dict[str, Any]:
        """A page of such requests, newest first."""
        query = sa.select(mfa_resets)
        if page.after is not None:
            query = query.where(_r.id < page.after[0])
        rows, now = await reader.fetch_all(query.order_by(_r.id.desc()).limit(page.limit + 1)), self._clock.wall()
        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), lambda row: _reset(row, now))
        return document

    async def confirm_mfa_reset(self, tx: Tx, caller: Caller, request: str) -> dict[str, Any]:
        """Take the second factors away and end every session, as another operator than the one who asked.

        Raises ``request.not_found``, ``operator.second_required``, ``operator.request_over``.
        """
        _a_person(caller)
        row, now = await self._reset(tx, request, lock=True), self._clock.wall()
        # Before keys were left out of this, one may have asked.
        if caller.id == row.requested_by or row.requested_by.startswith("key_"):
            raise Problem("operator.second_required")
        if caller.user_id == row.user_id:
            raise Problem("operator.self")
        if _state(row, now) != "waiting":
            raise Problem("operator.request_over", f"the request is {_state(row, now)}")
        person = await self._lock(tx, row.user_id)
        for table in (totp_keys, recovery_codes, passkeys):
            await tx.execute(sa.delete(table).where(table.c.user_id == row.user_id))
        await account_store.drop_begun(tx, row.user_id)
        ended = await store.end_sessions(tx, row.user_id, None, "second factors taken away", now)
        await tx.execute(sa.update(mfa_resets).where(_r.id == request).values(confirmed_by=caller.id, confirmed_at=now))
        facts = {"request": request, "requested_by": row.requested_by, "sessions": len(ended)}
        await self._record(tx, caller, "user.mfa_reset", row.user_id, **facts)
        await self._letters.tell(tx, replace(caller, address=None), person.email, "factors_off")
        return _reset(await self._reset(tx, request), now)

    async def withdraw_mfa_reset(self, tx: Tx, caller: Caller, request: str) -> None:
        """Take a request back, as any operator. Raises ``request.not_found``, ``operator.request_over``."""
        row, now = await self._reset(tx, request, lock=True), self._clock.wall()
        if _state(row, now) != "waiting":
            raise Problem("operator.request_over", f"the request is {_state(row, now)}")
        await tx.execute(sa.update(mfa_resets).where(_r.id == request).values(withdrawn_at=now))
        await self._record(tx, caller, "user.mfa_reset_withdraw", row.user_id, request=request)

    @staticmethod
    async def _reset(reader: Reader, request: str, *, lock: bool = False) -> Any:
        query = sa.select(mfa_resets).where(_r.id == request)
        row = await reader.fetch_one(query.with_for_update() if lock else query)
        if row is None:
            raise Problem("request.not_found", "there is no such request")
        return row

    # -- shared

    @staticmethod
    async def _lock(tx: Tx, user_id: str) -> Any:
        row = await account_store.lock_user(tx, user_id)
        if row is None:
            raise Problem("request.not_found", "there is no such person")
        return row

    @staticmethod
    async def _lock_keys(tx: Tx, user_id: str) -> list[str]:
        """The unrevoked keys that the person made, in any organization, held: no agent session begins with one meanwhile."""
        mine = sa.and_(api_keys.c.user_id == user_id, api_keys.c.revoked_at.is_(None))
        query = sa.select(api_keys.c.id).where(mine).order_by(api_keys.c.id).with_for_update()
        return [row.id for row in await tx.fetch_all(query)]

    async def _record(self, tx: Tx, caller: Caller, act: str, user_id: str, **facts: Any) -> None:
        found = await self._organizations(tx, user_id)
        await operators.record(tx, caller, act, user_id, facts, *(row["id"] for row in found))


def _a_person(caller: Caller) -> None:
    """Raises ``operator.second_required`` for the operator key: whoever holds it may be the other operator, too."""
    if caller.kind != "person":
        raise Problem("operator.second_required", "two people are needed; the operator key may be held by either")


def _state(row: Any, now: datetime) -> str:
    if row.confirmed_at is not None:
        return "done"
    return "withdrawn" if row.withdrawn_at is not None else "expired" if row.expires_at <= now else "waiting"


def _reset(row: Any, now: datetime) -> dict[str, Any]:
    names = ("id", "user_id", "requested_by", "reason", "created_at", "expires_at", "confirmed_by", "confirmed_at")
    return {**{name: getattr(row, name) for name in names}, "state": _state(row, now)}
