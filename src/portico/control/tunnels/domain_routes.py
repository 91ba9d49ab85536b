"""Domains as hosts of tunnels: route one to a tunnel, and take it away again.

A routed domain is a row of its own at relays (``domains/edge.py``), beside the tunnel's: no grant changes, no agent is disturbed,
and visitors go by it within 2 s. Locks: the tunnel first, then the domain, whoever takes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import frozen
from portico.control.domains.service import SERVED, Domains
from portico.control.tunnels import store
from portico.control.tunnels.spec import TunnelSpec
from portico.errors import Problem
from portico.kit.db import Tx
from portico.kit.ids import new_id
from portico.settings import ApiSettings

#: Who ends TLS for the visitors of a tunnel, by its protocol; a TCP tunnel has no host.
MODES: Final = {"http": "terminate", "tls": "passthrough"}


class DomainRoutes:
    """The verbs. One per process."""

    def __init__(self, settings: ApiSettings, domains: Domains) -> None:
        self._settings = settings
        self._domains = domains

    async def route(self, tx: Tx, caller: Caller, domain_id: str, tunnel: str) -> dict[str, Any]:
        """Serve a domain by a tunnel, which its id or its name tells; from another tunnel it moves over.

        Raises ``domain.not_found``, ``domain.not_verified``, ``domain.mode_mismatch``, ``domain.limit_reached``,
        ``domain.blocked``, ``domain.frozen``, ``domain.lost``, ``tunnel.not_found``.
        """
        caller.check("tunnels:write")
        await self._domains.row(tx, caller, domain_id)  # of two things that are not there, the first is named
        found = await store.tunnel(tx, caller.org, tunnel) or await store.tunnel_by_name(tx, caller.org, tunnel)
        held = None if found is None else await store.lock_tunnel(tx, caller.org, found.id)
        if held is None:
            raise Problem("tunnel.not_found", f"there is no tunnel {tunnel[:80]}")
        row = await self._domains.row(tx, caller, domain_id, lock=True)
        return self._domains.rendering.document(await self._lead(tx, caller, row, held._mapping))

    async def unroute(self, tx: Tx, caller: Caller, domain_id: str) -> dict[str, Any]:
        """Serve a domain no longer; twice is no error. Raises ``domain.not_found``."""
        caller.check("tunnels:write")
        seen = (await self._domains.row(tx, caller, domain_id)).tunnel_id
        held = None if seen is None else await store.lock_tunnel(tx, caller.org, seen)
        row = await self._domains.row(tx, caller, domain_id, lock=True)
        if row.tunnel_id is not None:
            before = row.tunnel_id
            row = await self._domains.lead(tx, row, None)
            facts = {"name": row.name, "tunnel": before}
            await audit.record(tx, caller, "domain.unroute", domain_id, details=facts)
            if held is not None and held.id == before:  # else it was led elsewhere in this moment
                await store.add_events(tx, [_event(before, "domain_unrouted", row)])
        return self._domains.rendering.document(row)

    async def attach(self, tx: Tx, caller: Caller, tunnel: Any, text: str) -> None:
        """Serve the domain that an agent, or whoever makes a tunnel, named with it.

        Raises ``tunnel.domain_unavailable`` for one that is not the organization's, ``domain.routed`` for one that another tunnel
        has, and what ``route`` raises.
        """
        row = await self._domains.claim(tx, caller, text)
        if row is not None and row.tunnel_id == tunnel["id"]:
            return  # as at every reconnect; nothing is held for it
        row = None if row is None else await self._domains.claim(tx, caller, text, lock=True)
        if row is None:
            raise Problem("tunnel.domain_unavailable", f"{text[:80]!r} is not a domain of your organization")
        caller.check("domains:write")
        if row.tunnel_id not in (None, tunnel["id"]):
            raise Problem("domain.routed", f"{row.name} is routed to another tunnel")
        await self._lead(tx, caller, row, tunnel)

    async def named(self, tx: Tx, caller: Caller, specs: Sequence[TunnelSpec]) -> list[TunnelSpec]:
        """The specs, where those that are known by their domain alone name the tunnel that it is routed to."""
        return [await self._named(tx, caller, spec) for spec in specs]

    async def _named(self, tx: Tx, caller: Caller, spec: TunnelSpec) -> TunnelSpec:
        if spec.domain is None or spec.name is not None or spec.subdomain is not None:
            return spec
        row = await self._domains.claim(tx, caller, spec.domain)
        if row is None:
            raise Problem("tunnel.domain_unavailable", f"{spec.domain[:80]!r} is not a domain of your organization")
        found = None if row.tunnel_id is None else await store.tunnel(tx, caller.org, row.tunnel_id)
        return spec if found is None else replace(spec, name=found.name)

    async def _lead(self, tx: Tx, caller: Caller, row: Any, tunnel: Any) -> Any:
        """Both are held."""
        self._domains.check_open(row)
        if row.hostname_status not in SERVED:
            raise Problem("domain.not_verified", f"nobody has proved yet that {row.name} is your organization's")
        if row.frozen is not None:
            raise frozen.refusal(row.name)
        mode = MODES.get(tunnel["protocol"])
        if mode != row.tls_mode:
            what = "has a port and no host" if mode is None else f"needs a domain with tls_mode {mode}"
            raise Problem("domain.mode_mismatch", f"the {tunnel['protocol'].upper()} tunnel {tunnel['name']} {what}")
        if row.tunnel_id == tunnel["id"]:
            return row
        most = self._settings.domains_per_tunnel
        if await self._domains.number_of(tx, tunnel["id"]) >= most:
            raise Problem("domain.limit_reached", f"a tunnel has at most {most} domains", limit=most)
        after = await self._domains.lead(tx, row, tunnel["id"])
        facts = {"name": row.name, "tunnel": tunnel["id"], "before": row.tunnel_id}
        await audit.record(tx, caller, "domain.route", row.id, details=facts)
        await store.add_events(tx, [_event(tunnel["id"], "domain_routed", row)])
        return after


def _event(tunnel: str, kind: str, row: Any) -> dict[str, Any]:
    return {"id": new_id("evt"), "tunnel_id": tunnel, "kind": kind, "details": {"domain": row.name}}
