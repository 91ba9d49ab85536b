"""Tunnels: make, change, stop, delete, list.

    state        offline | online   an active tunnel, by whether a relay has it bound
                 stopped            by its owner; naming it in a new agent session makes it active again
                 suspended          by the operator, or frozen: the plan has no room for it (frozen.py)
    generation   rises with every change that must fence grants issued before it: stop, start, new host or port
    policy_version   rises with every change of the policy, which relays take over without ending anything

An HTTP or TLS tunnel has a subdomain, a TCP tunnel a port (:mod:`~portico.control.tunnels.ports`); both are kept until it is
deleted. Names and subdomains are unique by constraints, never by looking first: of any number of simultaneous creations of one
subdomain, one succeeds. Between organizations its claim decides (:mod:`~portico.control.tunnels.claim_store`). Every write
appends its audit row, its event and its edge change in the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy.exc import IntegrityError

from portico.control import changes
from portico.control.access import Caller, Standing
from portico.control.audit import service as audit
from portico.control.domains.service import Domains, leave_tunnels
from portico.control.identity import plans
from portico.control.identity.org_standing import check_standing, standing
from portico.control.identity.plans import Entitlements
from portico.control.identity.quotas import Quotas
from portico.control.tunnels import claim_store, names, policy, presence, session_store, store
from portico.control.tunnels.addresses import Addresses
from portico.control.tunnels.domain_routes import DomainRoutes
from portico.control.tunnels.frozen import Frozen
from portico.control.tunnels.name_rules import NameRules
from portico.control.tunnels.ports import Ports
from portico.control.tunnels.relays import RelayDirectory
from portico.control.tunnels.reservations import Reservations
from portico.errors import Problem
from portico.kit import pages
from portico.kit.db import Reader, Tx, is_unique_violation
from portico.kit.ids import new_id
from portico.kit.redis import Redis
from portico.settings import ApiSettings

_RANDOM_ATTEMPTS = 8
# What the state of a tunnel is shown as while its organization does not stand well.
_HELD = {"suspended": "suspended", "deleting": "stopped"}


class _NotFree(Exception):
    """Ends the savepoint of an attempt."""


class Tunnels:
    """The verbs on tunnels of one organization."""

    def __init__(
        self,
        settings: ApiSettings,
        directory: RelayDirectory,
        redis: Redis | None,
        quotas: Quotas,
        domains: Domains,
    ) -> None:
        self._settings = settings
        self._domains = domains
        self.domains = DomainRoutes(settings, domains)
        self._quotas = quotas
        self._directory = directory
        self._redis = redis
        self.addresses = Addresses(settings)
        self.rules = NameRules.load(settings)
        self.reservations = Reservations(settings, self.rules, self.addresses, quotas)
        self.ports = Ports(settings)
        self.frozen = Frozen(settings, self.addresses)

    # -- reading

    async def listing(self, reader: Reader, caller: Caller, page: pages.PageRequest) -> dict[str, Any]:
        """A page of the organization's tunnels, oldest first."""
        rows = await store.list_tunnels(reader, caller.org, page.limit + 1, page.after[0] if page.after else None)
        kept, cursor = pages.page(rows, page.limit, lambda row: (row.id,))
        return {"data": await self._render(reader, caller.org, kept, self._redis), "next_cursor": cursor}

    async def get(self, reader: Reader, caller: Caller, tunnel_id: str) -> dict[str, Any]:
        """One tunnel. Raises ``tunnel.not_found``, for another organization's too."""
        row = await store.tunnel(reader, caller.org, tunnel_id)
        if row is None:
            raise Problem("tunnel.not_found")
        return (await self._render(reader, caller.org, [row], self._redis))[0]

    async def counts(self, reader: Reader, organizations: Sequence[str]) -> dict[str, int]:
        """How many tunnels each of these organizations has; those without one are left out."""
        return await store.count_tunnels(reader, organizations)

    async def events(self, reader: Reader, caller: Caller, tunnel_id: str, page: pages.PageRequest) -> dict[str, Any]:
        """A page of what happened to a tunnel, newest first. Raises ``tunnel.not_found``."""
        if await store.tunnel(reader, caller.org, tunnel_id) is None:
            raise Problem("tunnel.not_found")
        rows = await store.list_events(reader, tunnel_id, page.limit + 1, page.after[0] if page.after else None)
        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), _render_event)
        return document

    async def _render(
        self, reader: Reader, organization: str, rows: Sequence[Any], redis: Redis | None = None
    ) -> list[dict[str, Any]]:
        """``redis`` is given by reads alone: inside a transaction nobody waits for another server."""
        active = [row.id for row in rows if row.state == "active" and row.held is None and row.frozen is None]
        places = await presence.places(
            reader,
            redis,
            await self._directory.live_names(reader),
            active,
            lease=self._settings.relay_lease_seconds,
        )
        sessions = list({place.session for place in places.values()})
        machines = await session_store.hostnames(reader, organization, sessions) if sessions else {}
        led = await self._domains.names_of(reader, [row.id for row in rows]) if rows else {}
        return [self._document(row, places.get(row.id), machines, led.get(row.id, [])) for row in rows]

    def _document(
        self, row: Any, place: presence.Place | None, machines: dict[str, str], domains: list[str]
    ) -> dict[str, Any]:
        state = row.state if row.state != "active" else "online" if place else "offline"
        state = _HELD.get(row.held, state if row.frozen is None else "suspended")
        agent = None
        if place is not None:
            agent = {"hostname": machines.get(place.session, ""), "relay": place.relay}
        return {
            "id": row.id,
            "name": row.name,
            "protocol": row.protocol,
            "subdomain": row.subdomain,
            "remote_port": row.port,
            "url": self.addresses.url(row._mapping),
            "domains": domains,
            "state": state,
            "target": row.target,
            "frozen": row.frozen,
            "policy": policy.shown(row.policy),
            "policy_version": row.policy_version,
            "agent": agent,
            "created_at": row.created_at,
            "updated_at": row.updated_at,
        }

    # -- writing

    async def create(
        self,
        tx: Tx,
        caller: Caller,
        *,
        protocol: str,
        name: str | None = None,
        subdomain: str | None = None,
        remote_port: int | None = None,
        target: str | None = None,
        wanted: policy.Wanted | None = None,
        domain: str | None = None,
    ) -> dict[str, Any]:
        """A new tunnel; ``domain`` leads to it from the start.

        Raises ``tunnel.name_taken``, ``tunnel.subdomain_taken``, ``tunnel.name_invalid``, ``tunnel.name_reserved``,
        ``tunnel.limit_reached``, ``tunnel.policy_invalid``, ``tunnel.protocol_unavailable``, ``tunnel.port_invalid``,
        ``tunnel.port_taken``, ``tunnel.ports_exhausted``, and what ``DomainRoutes.attach`` raises.
        """
        row = await self.insert(
            tx,
            caller,
            protocol=protocol,
            name=name,
            subdomain=subdomain,
            remote_port=remote_port,
            target=target,
            wanted=wanted,
        )
        if row is None:
            raise Problem("tunnel.name_taken", f"there is already a tunnel named {name}")
        if domain is not None:
            await self.domains.attach(tx, caller, row._mapping, domain)
        return (await self._render(tx, caller.org, [row]))[0]

    async def insert(
        self,
        tx: Tx,
        caller: Caller,
        *,
        protocol: str,
        name: str | None,
        subdomain: str | None,
        target: str | None,
        wanted: policy.Wanted | None,
        remote_port: int | None = None,
        origin: str | None = None,
    ) -> Any:
        """The row of a new tunnel with its audit row, event and edge change; ``None`` when ``name`` is taken."""
        self.check_shape(protocol, subdomain, remote_port)
        settled, policy_hash = (wanted or policy.NONE).settle(protocol, {})
        if name is not None:
            names.check_name(name)
        if subdomain is not None:
            self.rules.check(subdomain)
        if policy.weighs(settled):
            await store.lock_policies(tx, caller.org)
        try:
            held = await self._quotas.claim(tx, caller.org, "tunnels")
        except Problem:
            # A name that exists is the truer answer: the agent is about to use that tunnel.
            if name is not None and await store.tunnel_by_name(tx, caller.org, name) is not None:
                return None
            raise
        check_standing(await standing(tx, caller.org))  # asked under the lock, which a change of the standing takes too
        await self._check_features(tx, held, protocol, settled)
        await self._check_policy_room(tx, caller.org, None, settled)
        for chosen, public in self._candidates(name, subdomain) if protocol != "tcp" else _names(name):
            row = await self._insert(
                tx,
                {
                    "id": new_id("tun"),
                    "organization_id": caller.org,
                    "name": chosen,
                    "protocol": protocol,
                    "subdomain": public,
                    "target": target,
                    "policy": settled,
                    "policy_hash": policy_hash,
                    "origin": origin,
                },
            )
            if row is not None:
                if protocol == "tcp":
                    port = await self.ports.lease(tx, caller.org, remote_port)
                    row = await store.update_tunnel(tx, caller.org, row.id, {"port": port})
                await self._created(tx, caller, row)
                return row
            if name is not None and await store.tunnel_by_name(tx, caller.org, name) is not None:
                return None
        raise Problem("tunnel.subdomain_taken", f"the subdomain {subdomain or name} is taken")

    async def _insert(self, tx: Tx, row: dict[str, Any]) -> Any:
        """The new row; ``None``, and no claim of its subdomain, when that or its name is taken."""
        if row["subdomain"] is None:
            return await store.insert_tunnel(tx, row)
        cooldown = self._settings.name_cooldown_seconds
        try:
            async with tx.savepoint():
                if await claim_store.claim(tx, row["organization_id"], row["subdomain"], cooldown):
                    made = await store.insert_tunnel(tx, row)
                    if made is not None:
                        return made
                raise _NotFree
        except _NotFree:
            return None

    async def _created(self, tx: Tx, caller: Caller, row: Any) -> None:
        facts = _identity(row)
        await audit.record(tx, caller, "tunnel.create", row.id, details=facts)
        await store.add_events(tx, [event(row.id, "created", facts)])
        changes.append(tx, changes.tunnel(self.addresses.edge_row(row._mapping)))

    async def update(
        self, tx: Tx, caller: Caller, tunnel_id: str, wanted: dict[str, Any], policy_version: int | None = None
    ) -> dict[str, Any]:
        """Change ``name``, ``subdomain``, ``port``, ``target`` or ``policy``.

        Raises as ``create`` does, ``tunnel.not_found``, and ``tunnel.policy_conflict`` when the policy is not of the
        ``policy_version`` that the caller saw.
        """
        if wanted.get("policy") is not None and policy.weighs(wanted["policy"].document):
            await store.lock_policies(tx, caller.org)
        row = await self._lock(tx, caller, tunnel_id)
        if policy_version not in (None, row.policy_version):
            now = row.policy_version
            detail = f"the policy is version {now} now, not {policy_version}; read it and decide again"
            raise Problem("tunnel.policy_conflict", detail, policy_version=now)
        changed = await self.apply(tx, caller, row._mapping, wanted)
        if changed is None:
            return (await self._render(tx, caller.org, [row]))[0]
        return (await self._render(tx, caller.org, [changed]))[0]

    async def apply(self, tx: Tx, caller: Caller, row: Any, wanted: dict[str, Any]) -> Any:
        """Make the tunnel ``row`` what ``wanted`` says; the new row, or ``None`` when it is so already."""
        values = self._differences(row, wanted)
        if not values:
            return None
        if values.keys() & {"name", "subdomain", "port", "policy"}:
            caller.check("tunnels:write")  # an agent may come here that may only serve what is there
        if "subdomain" in values or "port" in values:
            self.check_shape(row["protocol"], values.get("subdomain"), values.get("port"))
        if "port" in values:
            await self.ports.lease(tx, caller.org, values["port"])
            await store.free_port(tx, row["port"])
        if values.keys() & {"subdomain", "port", "state"}:
            values["generation"] = store.tunnels.c.generation + 1
        if "policy" in values:
            held = await plans.entitlements(tx, caller.org)
            await self._check_features(tx, held, row["protocol"], values["policy"])
            await self._check_policy_room(tx, caller.org, row["id"], values["policy"])
            values["policy_version"] = store.tunnels.c.policy_version + 1
        try:
            async with tx.savepoint():
                await self._move_claim(tx, caller, row, values)
                changed = await store.update_tunnel(tx, caller.org, row["id"], values)
        except IntegrityError as err:
            raise _taken(err, values) from err
        if changed is None:
            raise Problem("tunnel.not_found")
        plain = ("name", "subdomain", "port", "target", "state")
        facts: dict[str, Any] = {key: values[key] for key in plain if key in values}
        if "policy" in values:
            facts |= {"policy": policy.told(values["policy"]), "policy_version": changed.policy_version}
        kind = {"stopped": "stopped", "active": "started"}.get(values.get("state", ""), "changed")
        action = {"stopped": "tunnel.stop", "started": "tunnel.start"}.get(kind, "tunnel.update")
        await audit.record(tx, caller, action, row["id"], details=facts)
        await store.add_events(tx, [event(row["id"], kind, facts)])
        if values.keys() & {"generation", "policy_version"}:
            changes.append(tx, changes.tunnel(self.addresses.edge_row(changed._mapping)))
        return changed

    async def _move_claim(self, tx: Tx, caller: Caller, row: Any, values: dict[str, Any]) -> None:
        """From the tunnel's subdomain to its next. Raises ``tunnel.subdomain_taken``."""
        if "subdomain" in values:
            public, cooldown = values["subdomain"], self._settings.name_cooldown_seconds
            if not await claim_store.claim(tx, caller.org, public, cooldown):
                raise Problem("tunnel.subdomain_taken", f"the subdomain {public} is taken")
            if row["subdomain"] is not None:
                await claim_store.free(tx, caller.org, row["subdomain"])

    async def _check_features(self, tx: Tx, held: Entitlements, protocol: str, document: dict[str, Any]) -> None:
        for feature in policy.needs(protocol, document):
            await self._quotas.check_feature(tx, held, feature)

    async def _check_policy_room(
        self, tx: Tx, organization: str, tunnel_id: str | None, document: dict[str, Any]
    ) -> None:
        """Every relay holds every policy: one organization may not fill them. Small ones are bounded by their number.

        The caller holds ``lock_policies`` when the document weighs something."""
        size, most = policy.size(document), self._settings.policy_bytes_per_organization
        if size > policy.SMALL_BYTES and size + await store.policy_bytes(tx, organization, tunnel_id) > most:
            what = f"the policies of your organization's tunnels would have more than {most} bytes together"
            raise Problem("tunnel.limit_reached", what, limit=most)

    async def stop(self, tx: Tx, caller: Caller, tunnel_id: str) -> dict[str, Any]:
        """Take an active tunnel off line; its live session is told within 2 s. Stopping it twice is no error."""
        row = await self._lock(tx, caller, tunnel_id)
        if row.state == "active":
            row = await self.apply(tx, caller, row._mapping, {"state": "stopped"})
        return (await self._render(tx, caller.org, [row]))[0]

    async def delete(self, tx: Tx, caller: Caller, tunnel_id: str) -> None:
        """Delete the tunnel and free its name, subdomain and port; its live session is told within 2 s.

        Subdomain and port go to no other organization before they have cooled down."""
        await store.lock_set(tx, caller.org)
        row = await self._lock(tx, caller, tunnel_id)
        await leave_tunnels(tx, [tunnel_id])
        await store.delete_tunnel(tx, caller.org, tunnel_id)
        if row.port is not None:
            await store.free_port(tx, row.port)
        if row.subdomain is not None:
            await claim_store.free(tx, caller.org, row.subdomain)
        await audit.record(tx, caller, "tunnel.delete", tunnel_id, details=_identity(row))
        changes.append(tx, changes.tunnel_removed(tunnel_id, "tunnel.deleted"))
        await self.frozen.settle(tx, caller.org)  # there may be room for one that was frozen

    async def _lock(self, tx: Tx, caller: Caller, tunnel_id: str) -> Any:
        row = await store.lock_tunnel(tx, caller.org, tunnel_id)
        if row is None:
            raise Problem("tunnel.not_found")
        return row

    def check_shape(self, protocol: str, subdomain: str | None, port: int | None) -> None:
        """Raises when no relay of this installation serves the protocol, or when it has no such address."""
        if protocol == "tcp" and not self.ports.offered:
            raise Problem("tunnel.protocol_unavailable", f"{protocol} tunnels are not available")
        if protocol == "tcp" and subdomain is not None:
            raise Problem("tunnel.name_invalid", "a TCP tunnel has a port and no subdomain", hint="Leave it out.")
        if protocol != "tcp" and port is not None:
            raise Problem(
                "tunnel.port_invalid", f"{kind_of(protocol)} tunnel has a subdomain and no port", hint="Leave it out."
            )

    async def on_standing(self, tx: Tx, organization: str, standing: Standing | None) -> None:
        """Identity's callback: an organization that does not stand well has no live tunnel, and makes none."""
        await store.lock_set(tx, organization)
        rows = await store.hold_tunnels(tx, organization, standing)
        changes.append(tx, *(changes.tunnel(self.addresses.edge_row(row._mapping)) for row in rows))

    def _candidates(self, name: str | None, subdomain: str | None) -> Iterator[tuple[str, str]]:
        """(name, subdomain) to try in turn; what the caller named is never changed."""
        if name is not None and subdomain is not None:
            yield name, subdomain
            return
        if subdomain is not None:
            yield subdomain, subdomain
            yield names.with_suffix(subdomain), subdomain  # another of our tunnels has this as its name
            return
        if name is not None and self.rules.usable(name):
            yield name, name
        for _ in range(_RANDOM_ATTEMPTS):
            free = names.with_suffix(name) if name is not None else names.random_name()
            if not self.rules.usable(free):  # a suffix does not make every name a harmless one
                free = names.random_name()
            if self.rules.usable(free):  # of some ten thousand one imitates somebody by chance
                yield name or free, free

    def _differences(self, row: Any, wanted: dict[str, Any]) -> dict[str, Any]:
        """The columns to write, checked; empty when the tunnel is as wanted."""
        plain = ("name", "subdomain", "port", "target", "state")
        values: dict[str, Any] = {key: wanted[key] for key in plain if key in wanted and wanted[key] != row[key]}
        if "name" in values:
            names.check_name(values["name"])
        if "subdomain" in values:
            self.rules.check(values["subdomain"])
        if wanted.get("policy") is not None:
            settled, policy_hash = wanted["policy"].settle(row["protocol"], row["policy"])
            if policy_hash != row["policy_hash"]:
                values |= {"policy": settled, "policy_hash": policy_hash}
        return values

    # -- what relays hold

    async def edge_rows(self, reader: Reader) -> list[dict[str, Any]]:
        """Every tunnel as relays hold it, in the reader's snapshot."""
        rows = await store.edge_tunnels(reader)
        return [self.addresses.edge_row({**row, "policy": policy.stored(row["policy"])}) for row in rows]


def kind_of(protocol: str) -> str:
    """The protocol with its article, before the word tunnel."""
    return f"an {protocol.upper()}" if protocol == "http" else f"a {protocol.upper()}"


def event(tunnel_id: str, kind: str, details: dict[str, Any]) -> dict[str, Any]:
    """A row of a tunnel's history."""
    return {"id": new_id("evt"), "tunnel_id": tunnel_id, "kind": kind, "details": details}


def _identity(row: Any) -> dict[str, Any]:
    """What a tunnel is known by, for the audit log and its history."""
    if row.port is not None:
        return {"name": row.name, "port": row.port}
    return {"name": row.name, "subdomain": row.subdomain}


def _names(name: str | None) -> Iterator[tuple[str, None]]:
    """As :func:`_candidates`, for a tunnel without a subdomain."""
    if name is not None:
        yield name, None
        return
    for _ in range(_RANDOM_ATTEMPTS):
        yield names.random_name(), None


def _taken(err: IntegrityError, values: dict[str, Any]) -> Exception:
    if is_unique_violation(err, "tunnels_organization_id_name_key"):
        return Problem("tunnel.name_taken", f"there is already a tunnel named {values['name']}")
    if is_unique_violation(err, "tunnels_subdomain_key"):
        return Problem("tunnel.subdomain_taken", f"the subdomain {values['subdomain']} is taken")
    return err


def _render_event(row: Any) -> dict[str, Any]:
    return {"id": row.id, "kind": row.kind, "details": row.details, "at": row.at}
