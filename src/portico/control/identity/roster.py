"""Queries over members and the roles of an organization. Identity's own; other domains ask its service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from portico.control.access import PERMISSIONS, ROLES, role_permissions
from portico.control.identity.tables import api_keys, members, organizations, roles, users
from portico.kit.db import Reader, Tx

Row = sa.Row[Any]


@dataclass(frozen=True, slots=True)
class HeldRole:
    """A role of an organization: ``id`` is the name of a built-in one."""

    id: str
    name: str
    permissions: frozenset[str]


def _held(role: str, name: str | None, custom: list[str] | None) -> HeldRole:
    return HeldRole(role, name or role, role_permissions(role, custom))


# --- roles


async def role(reader: Reader, organization_id: str, role_id: str) -> HeldRole | None:
    """A built-in role by its name, or one of the organization's own by its id."""
    if role_id in ROLES:
        return _held(role_id, None, None)
    row = await reader.fetch_one(
        sa.select(roles).where(roles.c.organization_id == organization_id, roles.c.id == role_id)
    )
    return _held(row.id, row.name, row.permissions) if row else None


async def own_roles(reader: Reader, organization_id: str) -> Sequence[Row]:
    """The roles that the organization made, by name."""
    return await reader.fetch_all(
        sa.select(roles).where(roles.c.organization_id == organization_id).order_by(sa.func.lower(roles.c.name))
    )


async def count_roles(reader: Reader, organization_id: str) -> int:
    """How many roles the organization made."""
    return int(await reader.scalar(sa.select(sa.func.count()).where(roles.c.organization_id == organization_id)))


async def insert_role(tx: Tx, role_id: str, organization_id: str, name: str, granted: list[str], now: datetime) -> None:
    """Add a role."""
    row = {"id": role_id, "organization_id": organization_id, "name": name, "permissions": granted}
    await tx.execute(sa.insert(roles).values(**row, created_at=now, updated_at=now))


async def update_role(tx: Tx, role_id: str, name: str, granted: list[str], now: datetime) -> None:
    """Change a role."""
    values = {"name": name, "permissions": granted, "updated_at": now}
    await tx.execute(sa.update(roles).where(roles.c.id == role_id).values(**values))


async def delete_role(tx: Tx, role_id: str) -> None:
    """Delete a role."""
    await tx.execute(sa.delete(roles).where(roles.c.id == role_id))


# --- members


async def count_members(reader: Reader, organization_id: str) -> int:
    """How many people the organization has."""
    return int(await reader.scalar(sa.select(sa.func.count()).where(members.c.organization_id == organization_id)))


def _members() -> sa.Select[Any]:
    return (
        sa.select(
            members.c.user_id,
            members.c.organization_id,
            members.c.role,
            members.c.created_at,
            users.c.email,
            users.c.disabled_at,
            roles.c.name.label("role_name"),
            roles.c.permissions,
        )
        .join(users, users.c.id == members.c.user_id)
        .outerjoin(roles, sa.and_(roles.c.id == members.c.role, roles.c.organization_id == members.c.organization_id))
    )


async def listing(reader: Reader, organization_id: str, limit: int, after: tuple[str, ...] | None) -> Sequence[Row]:
    """Members, in the order in which their accounts were made."""
    query = _members().where(members.c.organization_id == organization_id)
    if after is not None:
        query = query.where(members.c.user_id > after[0])
    return await reader.fetch_all(query.order_by(members.c.user_id).limit(limit))


async def member(reader: Reader, organization_id: str, user_id: str) -> Row | None:
    """One member."""
    return await reader.fetch_one(
        _members().where(members.c.organization_id == organization_id, members.c.user_id == user_id)
    )


def role_in(row: Row) -> HeldRole:
    """The role of a member's row."""
    return _held(row.role, row.role_name, row.permissions)


async def role_of(reader: Reader, organization_id: str, user_id: str) -> HeldRole | None:
    """The role of a person in an organization; ``None`` for who is no member."""
    row = await member(reader, organization_id, user_id)
    return role_in(row) if row is not None else None


async def count_holders(reader: Reader, organization_id: str, role_id: str) -> int:
    """How many members have the role."""
    query = sa.select(sa.func.count()).where(members.c.organization_id == organization_id, members.c.role == role_id)
    return int(await reader.scalar(query))


async def able_owners(reader: Reader, organization_id: str) -> Sequence[Row]:
    """Id and address of the owners who can sign in."""
    query = (
        sa.select(users.c.id, users.c.email)
        .join(members, members.c.user_id == users.c.id)
        .where(members.c.organization_id == organization_id, members.c.role == "owner", users.c.disabled_at.is_(None))
    )
    return await reader.fetch_all(query.order_by(users.c.id))


async def count_able_owners(reader: Reader, organization_id: str) -> int:
    """Owners who can sign in: a disabled one does not keep an organization in hands."""
    query = (
        sa.select(sa.func.count())
        .select_from(members)
        .join(users, users.c.id == members.c.user_id)
        .where(members.c.organization_id == organization_id, members.c.role == "owner", users.c.disabled_at.is_(None))
    )
    return int(await reader.scalar(query))


async def set_role(tx: Tx, organization_id: str, user_id: str, role_id: str) -> None:
    """Give a member another role."""
    where = sa.and_(members.c.organization_id == organization_id, members.c.user_id == user_id)
    await tx.execute(sa.update(members).where(where).values(role=role_id))


async def remove(tx: Tx, organization_id: str, user_id: str) -> None:
    """Take a person out of the organization."""
    where = sa.and_(members.c.organization_id == organization_id, members.c.user_id == user_id)
    await tx.execute(sa.delete(members).where(where))


async def add(tx: Tx, organization_id: str, user_id: str, role_id: str) -> bool:
    """Make a person a member; false when they are one already."""
    row = {"organization_id": organization_id, "user_id": user_id, "role": role_id}
    added = insert(members).values(**row).on_conflict_do_nothing().returning(members.c.user_id)
    return (await tx.execute(added)).first() is not None


async def has_address(reader: Reader, organization_id: str, email: str) -> bool:
    """Whether the account with this address is a member."""
    query = sa.select(sa.func.count()).select_from(members).join(users, users.c.id == members.c.user_id)
    return bool(await reader.scalar(query.where(members.c.organization_id == organization_id, users.c.email == email)))


async def used(tx: Tx, organization_id: str, user_id: str, now: datetime) -> None:
    """Note that the person signed in to the organization, or switched to it."""
    where = sa.and_(members.c.organization_id == organization_id, members.c.user_id == user_id)
    await tx.execute(sa.update(members).where(where).values(last_used_at=now))


async def memberships(reader: Reader, user_id: str, limit: int, after: str | None) -> Sequence[Row]:
    """The organizations that a person belongs to, the oldest first, with the role there."""
    query = (
        sa.select(
            organizations,
            members.c.role,
            roles.c.name.label("role_name"),
            roles.c.permissions,
        )
        .join(members, members.c.organization_id == organizations.c.id)
        .outerjoin(roles, sa.and_(roles.c.id == members.c.role, roles.c.organization_id == members.c.organization_id))
        .where(members.c.user_id == user_id)
    )
    if after is not None:
        query = query.where(organizations.c.id > after)
    return await reader.fetch_all(query.order_by(organizations.c.id).limit(limit))


async def count_owned(tx: Tx, user_id: str) -> int:
    """How many organizations the person owns; until the transaction ends no other is made in their name."""
    await tx.execute(sa.select(users.c.id).where(users.c.id == user_id).with_for_update(key_share=True))
    query = sa.select(sa.func.count()).where(members.c.user_id == user_id, members.c.role == "owner")
    return int(await tx.scalar(query))


async def lock_keys_of_organization(tx: Tx, organization_id: str) -> list[str]:
    """Every unrevoked key of the organization, held until the transaction ends: no session begins with one meanwhile."""
    query = (
        sa.select(api_keys.c.id)
        .where(api_keys.c.organization_id == organization_id, api_keys.c.revoked_at.is_(None))
        .order_by(api_keys.c.id)
        .with_for_update()
    )
    return [row.id for row in await tx.fetch_all(query)]


async def lock_keys_of(tx: Tx, organization_id: str, user_ids: Sequence[str]) -> list[str]:
    """The unrevoked keys that these people made, held until the transaction ends: no session begins with one meanwhile."""
    query = (
        sa.select(api_keys.c.id)
        .where(
            api_keys.c.organization_id == organization_id,
            api_keys.c.user_id.in_(user_ids),
            api_keys.c.revoked_at.is_(None),
        )
        .order_by(api_keys.c.id)
        .with_for_update()
    )
    return [row.id for row in await tx.fetch_all(query)]


async def holders(reader: Reader, organization_id: str, role_id: str) -> list[str]:
    """Who has the role, as user ids."""
    query = sa.select(members.c.user_id).where(members.c.organization_id == organization_id, members.c.role == role_id)
    return [row.user_id for row in await reader.fetch_all(query)]


def known(permissions: Sequence[str]) -> list[str]:
    """Those that this version of the code knows, in order, each once."""
    return sorted(set(permissions) & PERMISSIONS)
