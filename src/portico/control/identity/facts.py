"""What the domains above identity ask of it: whose key this is, in what standing, and which organizations exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portico.control.access import role_permissions
from portico.control.identity import plans
from portico.control.identity.keys import permissions
from portico.control.identity.org_standing import check_standing, standing_of
from portico.control.identity.plans import Entitlements
from portico.errors import Problem
from portico.kit import networks
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx


@dataclass(frozen=True, slots=True)
class Account:
    """What an agent's status screen shows of the account behind its key."""

    organization: str
    organization_name: str
    email: str | None
    entitlements: Entitlements

    @property
    def plan(self) -> str:
        """The id of its plan."""
        return self.entitlements.plan


_REMEMBER_SECONDS = 60.0
_MAX_REMEMBERED = 10_000

_ACCOUNT = f"""
SELECT o.name, o.suspended_at, o.delete_after, u.email, k.revoked_at, k.kind, k.scopes, k.allowed_cidrs, m.role,
       r.permissions AS role_permissions, {plans.COLUMNS}
FROM api_keys k JOIN organizations o ON o.id = k.organization_id {plans.JOIN} LEFT JOIN users u ON u.id = k.user_id
LEFT JOIN members m ON m.user_id = k.user_id AND m.organization_id = k.organization_id
LEFT JOIN roles r ON r.id = m.role AND r.organization_id = k.organization_id
WHERE k.id = $1
"""  # noqa: S608 - our own names


# The same with all that a key is authenticated by (as ``store.key_by_digest``), and the mark of it all as ``start_agent_session``
# compares it under a lock; of one snapshot.
_MARKED = f"""
SELECT key_mark(k.id) AS mark, k.id, k.kind, k.organization_id, k.user_id, k.scopes, k.expires_at, k.revoked_at,
       k.allowed_cidrs, u.email, u.disabled_at, u.email_verified_at, m.role, r.permissions AS role_permissions, o.name,
       o.suspended_at, o.suspended_reason, o.delete_after, {plans.COLUMNS}
FROM api_keys k JOIN organizations o ON o.id = k.organization_id {plans.JOIN} LEFT JOIN users u ON u.id = k.user_id
LEFT JOIN members m ON m.user_id = k.user_id AND m.organization_id = k.organization_id
LEFT JOIN roles r ON r.id = m.role AND r.organization_id = k.organization_id
WHERE k.id = $1
"""  # noqa: S608 - our own names


@dataclass(frozen=True, slots=True)
class Marked:
    """An account as it was a moment ago, the row of its key then, and the mark by which a statement that holds the key tells that
    all of it is so still."""

    account: Account
    mark: str
    key: Any

    def allows(self, permission: str, address: str | None) -> bool:
        """Whether ``hold_key`` would have found nothing to refuse."""
        key = self.key
        fine = standing_of(key) is None and networks.allows(key["allowed_cidrs"], address)
        return fine and permission in _allowed(key)


async def hold_key(tx: Tx, key_id: str, permission: str, address: str | None) -> Account:
    """The account behind a live key that may ``permission`` from ``address``; none of it changes before the transaction ends.

    Without the lock, a revocation that commits between authentication and the end of this transaction would miss what the
    transaction makes. Changes of roles take the same lock first, and the second statement sees what they did.
    Raises ``auth.key_invalid``, ``auth.key_revoked``, ``auth.forbidden``, ``auth.address_denied``, and as ``check_standing``.
    """
    await tx.raw.execute("SELECT 1 FROM api_keys WHERE id = $1 FOR SHARE", key_id)
    row = await tx.raw.fetchrow(_ACCOUNT, key_id)
    found = _account(row)
    check_standing(standing_of(row))
    allowed = _allowed(row)
    if not networks.allows(row["allowed_cidrs"], address):
        raise Problem("auth.address_denied")
    if permission not in allowed:
        raise Problem("auth.forbidden", f"this credential lacks {permission}", permission=permission)
    return found


def _allowed(row: Any) -> frozenset[str]:
    return permissions(row["kind"], row["scopes"]) & role_permissions(row["role"], row["role_permissions"])


def _account(row: Any) -> Account:
    if row is None:
        raise Problem("auth.key_invalid")
    if row["revoked_at"] is not None:
        raise Problem("auth.key_revoked")
    return Account(row["organization"], row["name"], row["email"], plans.entitlements_in(row))


class Accounts:
    """Accounts remembered for a minute, by key. They grant nothing: every request is authenticated on its own, and what is made
    for a key is made by a statement that holds it and compares the mark."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[str, tuple[float, Marked]] = {}

    async def of(self, reader: Reader, key_id: str) -> Account:
        """The account behind a key, at most ``_REMEMBER_SECONDS`` old. Raises ``auth.key_invalid``, ``auth.key_revoked``."""
        return (await self.marked(reader, key_id)).account

    async def marked(self, reader: Reader, key_id: str) -> Marked:
        """The same with what the key could do."""
        if (known := self.recalled(key_id)) is not None:
            return known
        now = self._clock.monotonic()
        row = await reader.raw.fetchrow(_MARKED, key_id)
        account = _account(row)
        found = Marked(account, row["mark"], row)
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[key_id] = (now + _REMEMBER_SECONDS, found)
        return found

    def recalled(self, key_id: str) -> Marked | None:
        """The same if it is remembered."""
        until, found = self._known.get(key_id, (0.0, None))
        return found if self._clock.monotonic() < until else None

    def forget(self, key_id: str) -> None:
        """Read anew at the next question: this was no longer so."""
        self._known.pop(key_id, None)


async def known_organizations(reader: Reader, ids: list[str]) -> set[str]:
    """Those of ``ids`` that exist."""
    rows = await reader.raw.fetch("SELECT id FROM organizations WHERE id = ANY($1)", ids)
    return {row["id"] for row in rows}


async def owner_addresses(reader: Reader, organization: str) -> list[str]:
    """The addresses of an organization's owners who can sign in."""
    query = (
        "SELECT u.email FROM members m JOIN users u ON u.id = m.user_id"
        " WHERE m.organization_id = $1 AND m.role = 'owner' AND u.disabled_at IS NULL ORDER BY u.email"
    )
    return [row["email"] for row in await reader.raw.fetch(query, organization)]


_PAYERS = """
SELECT u.id, u.email, o.name AS organization
FROM members m JOIN users u ON u.id = m.user_id JOIN organizations o ON o.id = m.organization_id
WHERE m.organization_id = $1 AND m.role IN ('owner', 'billing') AND u.disabled_at IS NULL
ORDER BY m.created_at, u.id LIMIT $2
"""


async def payers(reader: Reader, organization: str, limit: int) -> list[Any]:
    """The people who decide what the organization pays for: ``(id, email, organization)``, its owners among them."""
    return list(await reader.raw.fetch(_PAYERS, organization, limit))
