"""Organizations: those of a person, another one, its name, and its end.

A person belongs to any number of organizations. A sign-in session acts in one of them at a time: the access token names
it, and every request asks anew whether the person is still a member there.

Deletion has days of grace. From the moment it is asked for the organization's tunnels are off line, its agent sessions have
ended, and nobody can make or change anything in it (``access.in_standing``); its owners can sign in, look, export, and take
the deletion back. When the days are over the worker `maintenance` deletes it (``departure.py``). Whoever holds live state of
an organization (tunnels, agent sessions) is told of a change of its standing in the same transaction (``on_standing``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from portico.control.access import Caller, Standing
from portico.control.audit import service as audit
from portico.control.identity import operators, plans, roster, store
from portico.control.identity.org_standing import standing, standing_of
from portico.control.identity.standing import hold
from portico.control.identity.tables import organizations, sign_in_sessions
from portico.control.notifications import channels, mail
from portico.control.notifications.mail import Mail
from portico.errors import Problem
from portico.kit import pages
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.kit.ids import new_id
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

StandingChanged = Callable[[Tx, str, Standing | None], Awaitable[None]]
t = organizations.c


class Organizations:
    """The verbs on organizations."""

    def __init__(self, settings: ApiSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._sealer = Sealer(settings.master_key)
        self.on_standing: list[StandingChanged] = []

    async def listing(self, reader: Reader, caller: Caller, page: pages.PageRequest) -> dict[str, Any]:
        """A page of the organizations that the person belongs to, with the role there."""
        after = page.after[0] if page.after else None
        rows = await roster.memberships(reader, caller.user_id or "", page.limit + 1, after)

        def render(row: Any) -> dict[str, Any]:
            role = roster.role_in(row)
            return {**_render(row), "role": role.id, "role_name": role.name, "current": row.id == caller.organization}

        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), render)
        return document

    async def create(self, tx: Tx, caller: Caller, name: str) -> dict[str, Any]:
        """Another organization, which the person owns. Raises ``organization.limit_reached``."""
        user_id, limit = caller.user_id or "", self._settings.organizations_per_person
        if await roster.count_owned(tx, user_id) >= limit:
            raise Problem("organization.limit_reached", f"a person owns at most {limit} organizations", limit=limit)
        organization = new_id("org")
        plan = plans.starting(self._settings.default_plan)
        await store.insert_organization(tx, organization, name, user_id, "owner", plan)
        about = {"name": name, "owner": user_id}
        await audit.record(tx, caller, "organization.create", organization, details=about, organization=organization)
        row = await store.organization(tx, organization)
        return {**_render(row), "role": "owner", "role_name": "owner", "current": False}

    async def facts(self, reader: Reader, caller: Caller) -> dict[str, Any]:
        """The caller's organization and how it stands."""
        row = await store.organization(reader, caller.org)
        if row is None:
            raise Problem("request.not_found", "there is no such organization")
        contact = self._settings.operator_contact
        return {**_render(row), "suspended_reason": row.suspended_reason, "operator_contact": contact or None}

    async def rename(self, tx: Tx, caller: Caller, name: str) -> dict[str, Any]:
        """Give the caller's organization another name."""
        await hold(tx, caller, ("organization:write",))
        row = await self._row(tx, caller)
        if row.name != name:
            await tx.execute(sa.update(organizations).where(t.id == caller.org).values(name=name))
            await audit.record(
                tx, caller, "organization.change", caller.org, details={"name": name, "before": row.name}
            )
        return _render(await store.organization(tx, caller.org))

    async def switch(self, tx: Tx, caller: Caller, organization: str) -> Any:
        """Let the session go on in another organization of the person's; its row. Raises ``request.not_found``."""
        user_id = caller.user_id or ""
        if await roster.role_of(tx, organization, user_id) is None:
            raise Problem("request.not_found", "you belong to no such organization")
        # The membership before the session, as whoever removes a member changes them.
        await roster.used(tx, organization, user_id, self._clock.wall())
        session = sign_in_sessions.c
        here = sa.and_(session.id == caller.session_id, session.ended_at.is_(None))
        await tx.execute(sa.update(sign_in_sessions).where(here).values(organization_id=organization))
        about = {"session": caller.session_id}
        await audit.record(tx, caller, "session.switch", organization, details=about, organization=organization)
        return await store.organization(tx, organization)

    # -- standing

    async def request_deletion(self, tx: Tx, caller: Caller, name: str) -> dict[str, Any]:
        """Stop everything now, and have the organization deleted when the grace is over. Asking twice changes nothing.

        Raises ``organization.name_mismatch``, ``organization.suspended``.
        """
        await hold(tx, caller, ("organization:delete",), any_standing=True)
        row = await self._row(tx, caller)
        if _standing(row) == "suspended":
            raise Problem("organization.suspended")
        if row.name != name:
            raise Problem("organization.name_mismatch")
        if row.delete_after is None:
            grace = timedelta(days=self._settings.organization_deletion_days)
            # PostgreSQL's clock: the one that decides between taking it back and carrying it out.
            change = {"deletion_requested_at": sa.func.now(), "delete_after": sa.func.now() + grace}
            await self._stand(tx, caller, change)
            row = await self._row(tx, caller)
            about = {"name": name, "delete_after": row.delete_after.isoformat()}
            await audit.record(tx, caller, "organization.delete_request", caller.org, details=about)
            told = {"organization": name, "delete_after": about["delete_after"]}
            await channels.notify(
                tx, self._sealer, row.id, "organization.deletion", told, f"deletion:{about['delete_after']}"
            )
            await self._tell_owners(tx, caller, row)
        return _render(row)

    async def _tell_owners(self, tx: Tx, caller: Caller, row: Any) -> None:
        """Mail to every owner, so that none learns of it when the grace is over."""
        person = await store.user(tx, caller.user_id or "")
        facts = {
            "organization": row.name,
            "by": person.email if person is not None else "An owner",
            "until": f"{row.delete_after:%Y-%m-%d %H:%M} UTC",
            "page": f"{self._settings.api_url.rstrip('/')}/organizations",
        }
        for owner in await roster.able_owners(tx, row.id):
            try:
                mail.address(owner.email)
            except ValueError:  # an account from before addresses were held to what mail can reach
                continue
            key = f"deletion:{row.id}:{row.delete_after.isoformat()}:{owner.id}"
            letter = Mail(key, owner.email, "organization.deletion", facts, organization=row.id)
            await mail.send(tx, self._sealer, letter)

    async def cancel_deletion(self, tx: Tx, caller: Caller) -> dict[str, Any]:
        """Take a deletion back: tunnels may serve again, once their agents reconnect. Raises ``organization.not_deleting``."""
        await hold(tx, caller, ("organization:delete",), any_standing=True)
        still = sa.and_(t.id == caller.org, t.delete_after > sa.func.clock_timestamp(), t.suspended_at.is_(None))
        change = sa.update(organizations).where(still).values(deletion_requested_at=None, delete_after=None)
        if (await tx.execute(change.returning(t.id))).first() is None:
            raise Problem("organization.not_deleting")
        await self.tell_standing(tx, caller.org)
        await audit.record(tx, caller, "organization.delete_cancel", caller.org)
        return _render(await store.organization(tx, caller.org))

    async def _stand(self, tx: Tx, caller: Caller, change: dict[str, Any]) -> None:
        await tx.execute(sa.update(organizations).where(t.id == caller.org).values(**change))
        await self.tell_standing(tx, caller.org)

    async def suspend(self, tx: Tx, caller: Caller, organization: str, reason: str) -> bool:
        """Suspend an organization, as an operator; false when it is suspended already. Raises ``request.not_found``."""
        return await self._suspension(tx, caller, organization, "organization.suspend", sa.func.now(), reason)

    async def resume(self, tx: Tx, caller: Caller, organization: str, reason: str) -> bool:
        """Take a suspension back; false when there is none. Raises ``request.not_found``."""
        return await self._suspension(tx, caller, organization, "organization.resume", None, reason)

    async def _suspension(self, tx: Tx, caller: Caller, organization: str, act: str, at: Any, reason: str) -> bool:
        await store.lock_organization(tx, organization)
        row = await store.organization(tx, organization)
        if row is None:
            raise Problem("request.not_found", "there is no such organization")
        if (row.suspended_at is not None) == (at is not None):
            return False
        change = {"suspended_at": at, "suspended_reason": None if at is None else reason}
        await tx.execute(sa.update(organizations).where(t.id == organization).values(**change))
        await self.tell_standing(tx, organization)
        await operators.record(tx, caller, act, organization, {"reason": reason}, organization)
        return True

    async def tell_standing(self, tx: Tx, organization: str) -> None:
        """Tell whoever holds live state how the organization stands now. Its row is held, and was changed before.

        Every key of it is held first: what begins with one of them (agent sessions) has begun, and ends now, or asks for the
        standing after this transaction.
        """
        await roster.lock_keys_of_organization(tx, organization)
        now = await standing(tx, organization)
        for tell in self.on_standing:
            await tell(tx, organization, now)

    @staticmethod
    async def _row(tx: Tx, caller: Caller) -> Any:
        row = await store.organization(tx, caller.org)
        if row is None:
            raise Problem("request.not_found", "there is no such organization")
        return row


def _standing(row: Any) -> Standing | None:
    return standing_of(row._mapping)


def _render(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "plan": row.plan,
        "standing": _standing(row) or "active",
        "delete_after": row.delete_after,
    }
