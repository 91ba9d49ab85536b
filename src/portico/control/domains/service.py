"""Domains of one's own: add, look at, change, delete.

    hostname_status   pending    claimed; nothing is proved
                      verified   the organization proved that the name is its own; nobody else can have it
                      active     and the name points here
                      moved      proof or pointing is gone, for days; it is deleted some days later
                      blocked    by an operator (blocking.py), or by an event of a source (ownership.py)
                      deleted    lost; kept for a while, so that its owner can read why

Any number of organizations may claim a name; the first that proves it holds it (a unique index decides between two at once).
What the certificate is about stands in columns of its own, ``cert_*``. Other parts ask ``find``, ``by_name`` and ``covering``.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import edge, failure_policy, frozen, names, store, vault
from portico.control.domains.judging import Looked
from portico.control.domains.names import Name, NameRules
from portico.control.domains.rendering import Rendering
from portico.control.domains.verification import Verification
from portico.control.identity.org_standing import check_standing, standing
from portico.control.identity.quotas import Kind, Quotas
from portico.errors import Problem
from portico.kit import pages
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.kit.ids import new_id
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

_TOKEN_BYTES: Final = 20
#: The states in which a domain is served when it leads to a tunnel.
SERVED: Final = store.SERVED


async def find(reader: Reader, domain_id: str) -> Any | None:
    """A domain by its id, whosever it is, with its columns as attributes; ``None`` when there is none."""
    return await store.find(reader, domain_id)


async def by_name(reader: Reader, name: str) -> Any | None:
    """The domain that holds exactly this name (A-labels; ``*.…`` for a wildcard); ``None`` when nobody proved it."""
    found = await store.holder(reader, [name])
    return found[0] if found else None


async def leave_tunnels(tx: Tx, tunnels: Sequence[str]) -> None:
    """Tunnels are being deleted: their domains lead nowhere, and stay their organization's."""
    for row in await store.leading_to(tx, tunnels, lock=True):
        edge.tell(tx, row, await store.update(tx, row.id, tunnel_id=None))


async def covering(reader: Reader, hostname: str) -> Any | None:
    """The domain that serves a host: the one of its very name, else the wildcard above it."""
    found = {row.name: row for row in await store.holder(reader, [hostname, names.parent(hostname)])}
    return found.get(hostname) or found.get(names.parent(hostname))


def kinds(settings: ApiSettings) -> dict[str, Kind]:
    """What the quotas of domains count."""
    most = settings.domains_per_organization
    detail = f"your organization has {most} domains already"
    return {
        "custom_domains": Kind(store.count, ceiling=most, ceiling_code="domain.limit_reached", ceiling_detail=detail)
    }


class Domains:
    """The verbs on domains of one organization. One per process."""

    def __init__(self, settings: ApiSettings, clock: Clock, quotas: Quotas, sealer: Sealer) -> None:
        self._settings = settings
        self._clock = clock
        self._quotas = quotas
        self.rules = NameRules(settings)
        self.rendering = Rendering(settings, self.rules)
        self.verification = Verification(settings, clock, sealer)

    # -- reading

    async def listing(self, reader: Reader, caller: Caller, page: pages.PageRequest) -> dict[str, Any]:
        """A page of the organization's domains, oldest first."""
        rows = await store.listing(reader, caller.org, page.limit + 1, page.after[0] if page.after else None)
        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), self.rendering.document)
        return document

    async def get(self, reader: Reader, caller: Caller, domain_id: str) -> dict[str, Any]:
        """One domain, with the records that its owner sets. Raises ``domain.not_found``, for another organization's too."""
        return self.rendering.document(await self.row(reader, caller, domain_id))

    async def row(self, reader: Reader, caller: Caller, domain_id: str, *, lock: bool = False) -> Any:
        """The row of a domain of the caller's organization. Raises ``domain.not_found``."""
        found = await store.one(reader, caller.org, domain_id, lock=lock)
        if found is None:
            raise Problem("domain.not_found")
        return found

    async def claim(self, reader: Reader, caller: Caller, text: str, *, lock: bool = False) -> Any | None:
        """The organization's domain of this name, as people write it; ``None`` when it has none."""
        try:
            name = self.rules.parse(text).name
        except Problem:
            return None
        found = await store.named(reader, caller.org, name)
        return await store.one(reader, caller.org, found.id, lock=True) if found is not None and lock else found

    async def names_of(self, reader: Reader, tunnels: Sequence[str]) -> dict[str, list[str]]:
        """The names of the domains by which each of some tunnels is served."""
        found: dict[str, list[str]] = {}
        for row in await store.leading_to(reader, tunnels):
            if row.frozen is not None:
                continue
            found.setdefault(row.tunnel_id, []).append(row.name)
        return found

    async def number_of(self, reader: Reader, tunnel: str) -> int:
        """How many domains lead to a tunnel."""
        return len(await store.leading_to(reader, [tunnel]))

    # -- for tunnels, above

    async def lead(self, tx: Tx, row: Any, tunnel: str | None) -> Any:
        """Lead a domain that the transaction holds to a tunnel, or nowhere, and tell relays; the row after it."""
        after = await store.update(tx, row.id, tunnel_id=tunnel)
        edge.tell(tx, row, after)
        return after

    # -- writing

    async def add(self, tx: Tx, caller: Caller, text: str, tls_mode: str, failure_policy: str) -> dict[str, Any]:
        """Claim a name.

        Raises ``domain.name_invalid``, ``domain.public_suffix``, ``domain.reserved``, ``domain.exists``,
        ``domain.limit_reached``, ``quota.exceeded``.
        """
        name = self.rules.parse(text)
        if await store.named(tx, caller.org, name.name) is not None:
            raise _exists(name)
        await self._quotas.claim(tx, caller.org, "custom_domains")
        check_standing(await standing(tx, caller.org))
        row = await store.add(
            tx,
            {
                "id": new_id("dom"),
                "organization_id": caller.org,
                "name": name.name,
                "tls_mode": tls_mode,
                "failure_policy": failure_policy,
                "verification_token": secrets.token_hex(_TOKEN_BYTES),
                "challenge_delegation": secrets.token_hex(_TOKEN_BYTES),
                "next_check_at": self._clock.wall(),
            },
        )
        if row is None:
            raise _exists(name)
        facts = {"name": name.name, "tls_mode": tls_mode, "failure_policy": failure_policy}
        await audit.record(tx, caller, "domain.add", row.id, details=facts)
        return self.rendering.document(row)

    def recently_checked(self, row: Any) -> bool:
        """Whether the last look is so fresh that another one would see the same."""
        pause = timedelta(seconds=self._settings.domain_verify_pause_seconds)
        return row.checked_at is not None and self._clock.wall() - row.checked_at < pause

    async def look_soon(self, tx: Tx, seen: Any) -> None:
        """Let the next look follow when another one would be worth something: who asks has changed something since the last one,
        which the worker made when the domain was added."""
        pause = timedelta(seconds=self._settings.domain_verify_pause_seconds)
        await store.look_by(tx, seen.id, seen.checked_at + pause)

    async def verified(self, tx: Tx, caller: Caller, seen: Any, looked: Looked) -> dict[str, Any]:
        """The domain after a look at ``seen`` that its owner asked for.

        Raises ``domain.not_found``, ``domain.blocked``, ``domain.lost``.
        """
        row = await self.verification.apply(tx, caller, seen, looked, manual=True)
        if row is None:
            raise Problem("domain.not_found")
        self.check_open(row)
        return self.rendering.document(row)

    @staticmethod
    def check_open(row: Any) -> None:
        """Raises ``domain.blocked`` or ``domain.lost`` for a domain with which nothing is done any more."""
        if row.hostname_status == "blocked":
            raise Problem("domain.blocked")
        if row.hostname_status == "deleted":
            raise Problem("domain.lost")

    async def change(
        self, tx: Tx, caller: Caller, domain_id: str, tls_mode: str | None, failure_policy_: str | None
    ) -> dict[str, Any]:
        """Change who ends TLS, and what happens while the certificate fails; ``None`` leaves one as it is.

        Raises ``domain.not_found``, ``domain.blocked``, ``domain.lost``, ``domain.routed``.
        """
        row = await self.row(tx, caller, domain_id, lock=True)
        self.check_open(row)
        values: dict[str, Any] = {}
        if tls_mode not in (None, row.tls_mode):
            if row.tunnel_id is not None:
                raise Problem("domain.routed", f"{row.name} is routed to a tunnel of the other kind; unroute it first")
            values["tls_mode"] = tls_mode
        if failure_policy_ not in (None, row.failure_policy):
            values["failure_policy"] = failure_policy_
            values |= failure_policy.left(row)
        if not values:
            return self.rendering.document(row)
        after = await store.update(tx, domain_id, **values)
        edge.tell(tx, row, after)
        changed: dict[str, Any] = {name: value for name, value in values.items() if name != "cert_held_at"}
        await audit.record(tx, caller, "domain.change", domain_id, details={"name": row.name, **changed})
        return self.rendering.document(after)

    async def delete(self, tx: Tx, caller: Caller, domain_id: str) -> None:
        """Let a domain go: relays serve it no longer within 2 s, and its name is free.

        No time must pass before another organization can have it: that one has to prove the name anew. Raises
        ``domain.not_found``, and ``domain.blocked``: removed and added again it would not be blocked any more.
        """
        await self.row(tx, caller, domain_id)
        await store.lock_set(tx, caller.org)
        row = await self.row(tx, caller, domain_id, lock=True)
        if row.hostname_status == "blocked":
            raise Problem("domain.blocked")
        await vault.remove(tx, domain_id)
        await store.delete(tx, domain_id)
        edge.tell(tx, row, None)
        await audit.record(tx, caller, "domain.delete", domain_id, details={"name": row.name})
        await frozen.settle(tx, caller.org)  # there may be room for one that was frozen


def _exists(name: Name) -> Problem:
    return Problem("domain.exists", f"your organization has the domain {name.display} already")
