"""Members of an organization: listed, given another role, removed.

Nobody gives a role that may do more than himself, or touches a member who may do more; so only owners make and unmake
owners, since ``owners:write`` is theirs alone; and a role with power over others is given by a person with a recent proof.
Changes of one organization take turns on its row, and each looks at the caller's rights again under that lock: of two owners
who demote each other at once one succeeds.

What a member may not do any more ends with the change: keys are limited by their maker's role whenever they are used,
agent sessions end in the same transaction when the role has no ``agent:connect``, and with a member who leaves end the
keys and sign-in sessions that the person had here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from portico.control.access import GIVING, Caller, check_step_up
from portico.control.audit import service as audit
from portico.control.identity import invitation_store, roster, standing, store
from portico.control.identity.keys import Keys
from portico.errors import Problem
from portico.kit import pages
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.settings import ApiSettings

_CONNECT = "agent:connect"


class Members:
    """The verbs on members."""

    def __init__(self, settings: ApiSettings, clock: Clock, keys: Keys) -> None:
        self._settings = settings
        self._clock = clock
        self._keys = keys

    async def listing(self, reader: Reader, caller: Caller, page: pages.PageRequest) -> dict[str, Any]:
        """A page of the organization's members."""
        rows = await roster.listing(reader, caller.org, page.limit + 1, page.after)
        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.user_id,), _render)
        return document

    async def change(self, tx: Tx, caller: Caller, user_id: str, role_id: str) -> dict[str, Any]:
        """Give a member another role. Raises ``request.not_found``, ``auth.forbidden``, ``member.last_owner``,
        ``auth.step_up_required`` for one with power over others (``check_giving``), ``organization.limit_reached``."""
        held = await self.hold(tx, caller, "members:write")
        row = await self._member(tx, caller, user_id)
        before = roster.role_in(row)
        wanted = await roster.role(tx, caller.org, role_id)
        if wanted is None:
            raise Problem("request.not_found", "there is no such role")
        not_above(held, before.permissions | wanted.permissions)
        if wanted.id != before.id:
            self.check_giving(caller, wanted.permissions - before.permissions)
            if wanted.id == "owner":
                await self.room_to_own(tx, user_id)
            await self._not_the_last_owner(tx, row, wanted)
            keys = await roster.lock_keys_of(tx, caller.org, [user_id])
            await roster.set_role(tx, caller.org, user_id, wanted.id)
            await self.end_lost(tx, keys, before.permissions, wanted.permissions)
            facts = {"role": wanted.name, "before": before.name}
            await audit.record(tx, caller, "member.change", user_id, details=facts)
        return _render(await self._member(tx, caller, user_id))

    async def remove(self, tx: Tx, caller: Caller, user_id: str) -> None:
        """Take a member out, with keys and sessions. Raises ``request.not_found``, ``auth.forbidden``, ``member.last_owner``."""
        held = await self.hold(tx, caller, "members:write")
        row = await self._member(tx, caller, user_id)
        not_above(held, roster.role_in(row).permissions)
        await self._out(tx, caller, row, "member.remove", "removed from the organization")

    async def leave(self, tx: Tx, caller: Caller) -> None:
        """Take the caller out, as ``remove`` does. Raises ``member.last_owner``, ``request.not_found``."""
        await store.lock_organization(tx, caller.org)
        row = await self._member(tx, caller, caller.user_id or "")
        await self._out(tx, caller, row, "member.leave", "left the organization")

    async def _out(self, tx: Tx, caller: Caller, row: Any, act: str, reason: str) -> None:
        user_id = row.user_id
        await self._not_the_last_owner(tx, row, None)
        keys = await roster.lock_keys_of(tx, caller.org, [user_id])
        await roster.remove(tx, caller.org, user_id)
        await self._keys.end_all_of(tx, keys)
        now = self._clock.wall()
        ended = await store.end_sessions(tx, user_id, None, reason, now, organization=caller.org)
        revoked = await invitation_store.revoke_of(tx, caller.org, user_id, now)
        facts = {"role": roster.role_in(row).name, "keys": len(keys), "sessions": len(ended), "invitations": revoked}
        await audit.record(tx, caller, act, user_id, details=facts)

    async def transfer(self, tx: Tx, caller: Caller, user_id: str, role_id: str) -> dict[str, Any]:
        """Make a member an owner in the caller's place, who is given another role, in one step; the new owner.

        Raises ``request.not_found``, ``auth.forbidden``, ``member.unable``, ``organization.limit_reached``.
        """
        await self.hold(tx, caller, "owners:write")
        new, old = await self._member(tx, caller, user_id), await self._member(tx, caller, caller.user_id or "")
        given = await roster.role(tx, caller.org, role_id)
        if given is None or given.id == "owner":
            raise Problem("request.not_found", "there is no such role to keep")
        if new.disabled_at is not None or new.user_id == old.user_id:
            raise Problem("member.unable")
        if new.role != "owner":
            await self.room_to_own(tx, new.user_id)
        keys = await roster.lock_keys_of(tx, caller.org, [old.user_id])
        await roster.set_role(tx, caller.org, new.user_id, "owner")
        await roster.set_role(tx, caller.org, old.user_id, given.id)
        await self.end_lost(tx, keys, roster.role_in(old).permissions, given.permissions)
        facts = {"owner": new.user_id, "before": old.user_id, "role": given.name}
        await audit.record(tx, caller, "organization.transfer", caller.org, details=facts)
        return _render(await self._member(tx, caller, user_id))

    def check_giving(self, caller: Caller, given: frozenset[str]) -> None:
        """Raises ``auth.step_up_required`` when ``given`` has power over others and the caller is not a person who proved a
        short time ago who they are: a stolen session or key makes no accomplice."""
        if GIVING & given:
            check_step_up(caller, self._clock.wall(), self._settings.step_up_seconds)

    async def room_to_own(self, tx: Tx, user_id: str) -> None:
        """Raises ``organization.limit_reached`` when the person owns as many organizations as one may."""
        limit = self._settings.organizations_per_person
        if await roster.count_owned(tx, user_id) >= limit:
            raise Problem("organization.limit_reached", f"a person owns at most {limit} organizations", limit=limit)

    async def hold(self, tx: Tx, caller: Caller, permission: str) -> frozenset[str]:
        """What the caller may do now, while roles and members stay as they are until the transaction ends."""
        return await standing.hold(tx, caller, (permission,))

    async def end_lost(self, tx: Tx, keys: Sequence[str], before: frozenset[str], now: frozenset[str]) -> None:
        """End the agent sessions of locked keys whose makers may not serve tunnels any more."""
        if _CONNECT in before - now:
            for key_id in keys:
                await self._keys.end_work(tx, key_id)

    @staticmethod
    async def _member(reader: Reader, caller: Caller, user_id: str) -> Any:
        row = await roster.member(reader, caller.org, user_id)
        if row is None:
            raise Problem("request.not_found", "there is no such member")
        return row

    @staticmethod
    async def _not_the_last_owner(tx: Tx, row: Any, wanted: roster.HeldRole | None) -> None:
        """One owner who can sign in stays. To lose one who cannot changes nothing about that."""
        ends = row.role == "owner" and row.disabled_at is None and (wanted is None or wanted.id != "owner")
        if ends and await roster.count_able_owners(tx, row.organization_id) <= 1:
            raise Problem("member.last_owner")


def not_above(held: frozenset[str], touched: frozenset[str]) -> None:
    """Raises ``auth.forbidden`` when a role that may do more than the caller would be given, taken or changed."""
    if beyond := sorted(touched - held, key=lambda name: (name != "owners:write", name)):
        raise Problem("auth.forbidden", f"this credential lacks {beyond[0]} itself", permission=beyond[0])


def _render(row: Any) -> dict[str, Any]:
    role = roster.role_in(row)
    return {
        "user": {"id": row.user_id, "email": row.email},
        "role": role.id,
        "role_name": role.name,
        "joined_at": row.created_at,
    }
