"""Names that an organization keeps, with or without a tunnel: ``/v1/reserved-names``.

A reserved name is no other organization's, whatever happens to the tunnel that has it. Without one a name is free again for
its organization at once, and for others after ``name_cooldown_seconds``: who still calls it must not reach a stranger.
"""

from __future__ import annotations

from typing import Any

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.identity.quotas import Quotas
from portico.control.tunnels import claim_store as store
from portico.control.tunnels.addresses import Addresses
from portico.control.tunnels.name_rules import NameRules
from portico.errors import Problem
from portico.kit import pages
from portico.kit.db import Reader, Tx
from portico.settings import ApiSettings


class Reservations:
    """The verbs on reserved names. One per process."""

    def __init__(self, settings: ApiSettings, rules: NameRules, addresses: Addresses, quotas: Quotas) -> None:
        self._settings = settings
        self._quotas = quotas
        self._rules = rules
        self._addresses = addresses

    async def listing(self, reader: Reader, caller: Caller, page: pages.PageRequest) -> dict[str, Any]:
        """A page of the organization's reserved names, in order."""
        rows = await store.reserved(reader, caller.org, page.limit + 1, page.after[0] if page.after else None)
        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row["subdomain"],), self._render)
        return document

    async def reserve(self, tx: Tx, caller: Caller, name: str) -> dict[str, Any]:
        """Keep a name that nobody else has. Reserving it twice is no error.

        Raises ``tunnel.name_invalid``, ``tunnel.name_reserved``, ``tunnel.subdomain_taken``, ``name.limit_reached``,
        ``quota.exceeded``.
        """
        self._rules.check(name)
        await store.lock_reservations(tx, caller.org)
        if await store.is_reserved(tx, caller.org, name):
            return self._render(await store.reserve(tx, caller.org, name))
        await self._quotas.claim(tx, caller.org, "reserved_names")
        claimed = await store.claim(tx, caller.org, name, self._settings.name_cooldown_seconds)
        row = await store.reserve(tx, caller.org, name) if claimed else None
        if row is None:
            raise Problem("tunnel.subdomain_taken", f"the subdomain {name} is taken")
        await audit.record(tx, caller, "name.reserve", name)
        return self._render(row)

    async def release(self, tx: Tx, caller: Caller, name: str) -> None:
        """Keep a name no longer; a tunnel that has it goes on with it. Raises ``request.not_found``."""
        if not await store.release(tx, caller.org, name):
            raise Problem("request.not_found", "there is no such reserved name")
        await audit.record(tx, caller, "name.release", name)

    def _render(self, row: Any) -> dict[str, Any]:
        url = self._addresses.url({"protocol": "http", "subdomain": row["subdomain"], "port": None})
        return {"name": row["subdomain"], "url": url, "tunnel": row["tunnel"], "reserved_at": row["reserved_at"]}
