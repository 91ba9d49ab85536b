"""Roles that an organization makes for itself, from the permissions of ``access.PERMISSION_TABLE``.

Built-in roles cannot be changed. A role holds nothing that its maker does not hold, never ``owners:write``, and is not
deleted while somebody has it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import exc as sa_exc

from portico.control.access import OWNERS_ONLY, PERMISSIONS, ROLE_TABLE, ROLES, Caller
from portico.control.audit import service as audit
from portico.control.identity import invitation_store, roster
from portico.control.identity.members import Members, not_above
from portico.control.identity.quotas import Quotas
from portico.errors import Problem
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx, is_unique_violation
from portico.kit.ids import new_id


class Roles:
    """The verbs on roles."""

    def __init__(self, quotas: Quotas, clock: Clock, members: Members) -> None:
        self._quotas = quotas
        self._clock = clock
        self._members = members

    async def listing(self, reader: Reader, caller: Caller) -> dict[str, Any]:
        """Every role of the organization, the built-in ones first; few enough for one page."""
        built_in = [
            {"id": name, "name": name, "built_in": True, "about": role.about, "permissions": sorted(role.permissions)}
            for name, role in ROLE_TABLE.items()
        ]
        made = [_render(row.id, row.name, row.permissions) for row in await roster.own_roles(reader, caller.org)]
        return {"data": [*built_in, *made], "next_cursor": None}

    async def create(self, tx: Tx, caller: Caller, name: str, permissions: list[str]) -> dict[str, Any]:
        """Make a role. Raises ``role.permission_invalid``, ``auth.forbidden``, ``role.name_taken``, ``role.limit_reached``,
        ``quota.exceeded``, ``quota.feature_missing``."""
        held = await self._members.hold(tx, caller, "roles:write")
        granted = _granted(held, permissions)
        await self._quotas.require(tx, caller.org, "custom_roles")
        await self._quotas.claim(tx, caller.org, "roles")
        role_id = new_id("rol")
        await self._write(tx, name, roster.insert_role(tx, role_id, caller.org, name, granted, self._clock.wall()))
        await audit.record(tx, caller, "role.create", role_id, details={"name": name, "permissions": granted})
        return _render(role_id, name, granted)

    async def change(
        self, tx: Tx, caller: Caller, role_id: str, name: str | None, permissions: list[str] | None
    ) -> dict[str, Any]:
        """Change a role; who has it has the new rights at the next request, live tunnels within 2 s.

        Raises ``request.not_found``, ``role.built_in``, and what ``create`` raises.
        """
        held = await self._members.hold(tx, caller, "roles:write")
        role = await self._own(tx, caller, role_id)
        not_above(held, role.permissions)
        granted = sorted(role.permissions) if permissions is None else _granted(held, permissions)
        wanted = name or role.name
        keys = await roster.lock_keys_of(tx, caller.org, await roster.holders(tx, caller.org, role.id))
        await self._write(tx, wanted, roster.update_role(tx, role.id, wanted, granted, self._clock.wall()))
        await self._members.end_lost(tx, keys, role.permissions, frozenset(granted))
        facts = {"name": wanted, "permissions": granted, "before": sorted(role.permissions)}
        await audit.record(tx, caller, "role.change", role.id, details=facts)
        return _render(role.id, wanted, granted)

    async def delete(self, tx: Tx, caller: Caller, role_id: str) -> None:
        """Delete a role that nobody has. Raises ``request.not_found``, ``role.built_in``, ``role.in_use``, ``auth.forbidden``."""
        held = await self._members.hold(tx, caller, "roles:write")
        role = await self._own(tx, caller, role_id)
        not_above(held, role.permissions)
        if count := await roster.count_holders(tx, caller.org, role.id):
            raise Problem("role.in_use", f"{count} of the members have this role", members=count)
        revoked = await invitation_store.revoke_to_role(tx, caller.org, role.id, self._clock.wall())
        await roster.delete_role(tx, role.id)
        facts = {"name": role.name, "invitations": revoked}
        await audit.record(tx, caller, "role.delete", role.id, details=facts)

    @staticmethod
    async def _own(tx: Tx, caller: Caller, role_id: str) -> roster.HeldRole:
        if role_id in ROLES:
            raise Problem("role.built_in")
        found = await roster.role(tx, caller.org, role_id)
        if found is None:
            raise Problem("request.not_found", "there is no such role")
        return found

    @staticmethod
    async def _write(tx: Tx, name: str, change: Any) -> None:
        if name.lower() in ROLES:
            change.close()
            raise Problem("role.name_taken", f"{name.lower()} is a built-in role")
        try:
            await change
        except sa_exc.IntegrityError as err:
            if is_unique_violation(err, "roles_organization_id_name_ix"):
                raise Problem("role.name_taken") from None
            raise


def _granted(held: frozenset[str], permissions: list[str]) -> list[str]:
    """``permissions`` in order, each once, if the caller may give them to a role."""
    for name in permissions:
        if name not in PERMISSIONS:
            raise Problem("role.permission_invalid", f"there is no permission {name}", permissions=sorted(PERMISSIONS))
        if name in OWNERS_ONLY:
            raise Problem("role.permission_invalid", f"{name} belongs to owners alone")
    not_above(held, frozenset(permissions))
    return sorted(set(permissions))


def _render(role_id: str, name: str, permissions: Any) -> dict[str, Any]:
    return {"id": role_id, "name": name, "built_in": False, "about": None, "permissions": roster.known(permissions)}
