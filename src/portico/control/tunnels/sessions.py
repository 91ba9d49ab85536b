"""Agent sessions: a session token, a grant per tunnel, and the relays to connect to.

An agent *instance* is an agent key and the random ``agent_id`` that the process made at its start. It has at most one live
session; asking again continues it under the next generation, by which a relay tells the newer connection from a late
packet of the older. A session ends by its agent, or with its key; relays are told in the same transaction and refuse its
tokens for as long as any of them could be accepted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from portico.control import changes
from portico.control.access import Caller, Standing
from portico.control.audit import service as audit
from portico.control.identity import facts, plans
from portico.control.identity.facts import Account
from portico.control.identity.plans import Entitlements
from portico.control.identity.quotas import Quotas
from portico.control.identity.service import Identity
from portico.control.identity.signing_keys import SigningKeys
from portico.control.tunnels import frozen, policy, session_store, store
from portico.control.tunnels.relays import RelayDirectory
from portico.control.tunnels.service import Tunnels, kind_of
from portico.control.tunnels.spec import TunnelSpec
from portico.errors import Problem
from portico.kit import networks
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.kit.ids import digest, new_id
from portico.kit.jwt import InvalidToken, SigningKey
from portico.settings import ApiSettings
from portico.wire import grants

# Relays accept a token this much past its expiry for the sake of clocks; a refusal must last longer.
_LEEWAY_SECONDS: Final = 2 * grants.DEFAULT_LEEWAY_SECONDS
# Ends of sessions that their agents are told of by name.
_TOLD: Final = ("session.revoked", "organization.suspended", "organization.deleting")
_INSERT_ATTEMPTS: Final = 3
_MAX_RECENT: Final = 50_000


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """What an agent says of itself."""

    agent_id: str
    hostname: str
    version: str
    region: str | None


class Sessions:
    """The verbs on agent sessions. One per process."""

    def __init__(
        self,
        settings: ApiSettings,
        tunnels: Tunnels,
        directory: RelayDirectory,
        keys: SigningKeys,
        clock: Clock,
        quotas: Quotas,
        identity: Identity,
    ) -> None:
        self._quotas = quotas
        self._identity = identity
        self._settings = settings
        self._tunnels = tunnels
        self._directory = directory
        self._keys = keys
        self._clock = clock
        self._accounts = facts.Accounts(clock)
        self._recent: set[tuple[bytes, str]] = set()
        self._key_ids: dict[bytes, str] = {}
        self._life = max(settings.session_token_seconds, settings.grant_life_seconds)
        self._refusal_seconds = settings.grant_outage_grace_seconds + _LEEWAY_SECONDS

    # -- hints

    def knows(self, credential: str, agent_id: str) -> bool:
        """Whether this process opened a session for that instance lately, so that ``continued`` is worth a try."""
        return (digest(credential), agent_id) in self._recent

    def remember(self, credential: str, agent_id: str, caller: Caller) -> None:
        """Note that a session was opened. Only a hint: forgetting it costs a few round trips."""
        if len(self._recent) >= _MAX_RECENT:
            self._recent.clear()
            self._key_ids.clear()
        mark = digest(credential)
        self._recent.add((mark, agent_id))
        self._key_ids[mark] = caller.id

    def recalled(self, credential: str, address: str) -> Caller | None:
        """Whom the credential belonged to a moment ago, if that is remembered and they could open sessions from ``address``.

        Not authenticated: only ``started`` takes such a caller. Its statement holds the key and compares all that was remembered
        with what is so; when it is not, the caller is authenticated then.
        """
        key_id = self._key_ids.get(digest(credential))
        held = self._accounts.recalled(key_id) if key_id is not None else None
        if held is None or not held.allows("agent:connect", address):
            return None
        try:
            found = self._identity.key_bearer(held.key, address)
            found.check("agent:connect")
        except Problem:
            return None
        return found

    # -- verbs

    async def open(self, tx: Tx, caller: Caller, agent: AgentFacts, specs: Sequence[TunnelSpec]) -> dict[str, Any]:
        """Start or continue the instance's session with exactly these tunnels, made where they do not exist.

        Raises what ``Tunnels.create`` raises, ``edge.no_relay``, ``auth.key_revoked``, ``tunnel.suspended``.
        """
        key_id = _key_of(caller)
        edges = await self._directory.edges(tx, agent.region)
        specs = await self._tunnels.domains.named(tx, caller, specs)
        account = await facts.hold_key(tx, key_id, "agent:connect", caller.address)
        if account.entitlements.limit("tunnels_online") is not None:
            await store.lock_set(tx, caller.org)
        session = await session_store.open_session(
            tx,
            new_id("ses"),
            caller.org,
            key_id,
            agent.agent_id,
            (agent.hostname, agent.version, agent.region),
            self._life,
            caller.address,
        )
        if session["generation"] == 1:
            about = {"agent_id": agent.agent_id, "hostname": agent.hostname}
            # A fleet that starts comes by the hundred a second.
            await audit.record(tx, caller, "agent_session.open", session["id"], details=about, numbered=False)
        rows, others = await self._resolve(tx, caller, session["id"], agent.hostname, specs, account.entitlements)
        await self._room_online(tx, account.entitlements, session["id"], [row["id"] for row in rows], len(rows))
        await self._bind_exactly(tx, session["id"], rows, others)
        signer = await self._keys.current_signer(tx)
        return self._answer(signer, key_id, caller, agent, session, rows, account, edges)

    async def continued(
        self, reader: Reader, caller: Caller, agent: AgentFacts, specs: Sequence[TunnelSpec]
    ) -> dict[str, Any] | None:
        """``open`` for the common case, a reconnect that changes nothing, in one statement; ``None`` when it is not that.

        A generation that was then drawn for nothing is a gap, and gaps mean nothing. Under a limit of tunnels on line it is for
        those alone that are so: the places of others may have been taken meanwhile.
        """
        key_id = _key_of(caller)
        edges = await self._directory.edges(reader, agent.region)
        account = await self._accounts.of(reader, key_id)
        limited = account.entitlements.limit("tunnels_online") is not None
        lease = self._settings.relay_lease_seconds if limited else None
        life, about = self._life, (agent.hostname, agent.version, agent.region)
        found = await session_store.continue_session(reader, key_id, agent.agent_id, life, about, caller.address, lease)
        rows = [_parsed(row) for row in found if row["id"] is not None]
        if not found or len(rows) != len(specs) or not all(map(_fits, rows, specs)):
            return None
        session = {"id": found[0]["session"], "generation": found[0]["session_generation"]}
        signer = await self._keys.current_signer(reader)
        return self._answer(signer, key_id, caller, agent, session, rows, account, edges)

    async def started(
        self, reader: Reader, caller: Caller, agent: AgentFacts, specs: Sequence[TunnelSpec]
    ) -> dict[str, Any] | None:
        """``open`` for a new instance with named tunnels that exist as it asks for them, in one statement: what a fleet does that
        comes back. ``None`` when it is not that, or something has just changed; then ``open`` decides, and says why not."""
        key_id = _key_of(caller)
        for spec in specs:
            self._tunnels.check_shape(spec.protocol, spec.subdomain, spec.remote_port)
        edges = await self._directory.edges(reader, agent.region)
        held = await self._accounts.marked(reader, key_id)
        # What was remembered decides nothing alone: the statement holds the key, and compares the mark of all of it.
        if held.account.organization != caller.org or not held.allows("agent:connect", caller.address):
            self._accounts.forget(key_id)
            return None
        session, about = new_id("ses"), {"agent_id": agent.agent_id, "hostname": agent.hostname}
        found = await session_store.start_session(
            reader,
            (session, caller.org, key_id, held.mark, agent.agent_id),
            (agent.hostname, agent.version, agent.region),
            caller.address,
            self._life,
            (held.account.entitlements.limit("tunnels_online"), self._settings.relay_lease_seconds),
            [(spec.name or "", spec.protocol, spec.subdomain, spec.remote_port, spec.target) for spec in specs],
            audit.unnumbered(caller, "agent_session.open", session, about),
        )
        if not found:
            self._accounts.forget(key_id)
            return None
        self._identity.note_use(key_id, caller.address)
        signer = await self._keys.current_signer(reader)
        begun = {"id": session, "generation": 1}
        return self._answer(signer, key_id, caller, agent, begun, [_parsed(row) for row in found], held.account, edges)

    async def refresh(self, reader: Reader, caller: Caller, session_id: str, agent_id: str) -> dict[str, Any] | None:
        """New tokens for a live session and its active tunnels; ``None`` when it may not be live, or may have lost its place
        among those on line: ``refresh_again`` looks then."""
        account = await self._accounts.of(reader, _key_of(caller))
        limited = account.entitlements.limit("tunnels_online") is not None
        lease = self._settings.relay_lease_seconds if limited else None
        return await self._refreshed(reader, caller, session_id, agent_id, account, lease)

    async def refresh_again(self, tx: Tx, caller: Caller, session_id: str, agent_id: str) -> dict[str, Any]:
        """The same for a session whose tunnels do not count as on line, if there is room for them.

        Raises ``session.not_found`` or why the session ended, and ``quota.exceeded``.
        """
        key_id = _key_of(caller)
        account = await facts.hold_key(tx, key_id, "agent:connect", caller.address)
        if account.entitlements.limit("tunnels_online") is not None:
            await store.lock_set(tx, caller.org)
        if await session_store.lock_session(tx, session_id, key_id) is None:
            raise await self._gone(tx, session_id, key_id)
        tunnels = await session_store.tunnels_of_session(tx, session_id)
        await self._room_online(tx, account.entitlements, session_id, tunnels, len(tunnels))
        found = await self._refreshed(tx, caller, session_id, agent_id, account, None)
        if found is None:
            raise await self._gone(tx, session_id, key_id)
        return found

    async def _refreshed(
        self, reader: Reader, caller: Caller, session_id: str, agent_id: str, account: Account, lease: float | None
    ) -> dict[str, Any] | None:
        key_id = _key_of(caller)
        rows = await session_store.refresh_session(
            reader, key_id, agent_id, self._life, session_id, caller.address, lease
        )
        if not rows:
            return None
        edges = await self._directory.edges(reader, rows[0]["region"])
        session = {"id": session_id, "generation": rows[0]["session_generation"]}
        agent = AgentFacts(agent_id, "", "", rows[0]["region"])
        active = [_parsed(row) for row in rows if row["state"] == "active" and row["frozen"] is None]
        signer = await self._keys.current_signer(reader)
        return self._answer(signer, key_id, caller, agent, session, active, account, edges)

    async def add(self, tx: Tx, caller: Caller, session_id: str, spec: TunnelSpec) -> dict[str, Any]:
        """One more tunnel in a live session: ``{"grants": [one]}``. Raises as ``open`` does, and ``session.not_found``."""
        key_id = _key_of(caller)
        spec = (await self._tunnels.domains.named(tx, caller, [spec]))[0]
        account = await facts.hold_key(tx, key_id, "agent:connect", caller.address)
        if account.entitlements.limit("tunnels_online") is not None:
            await store.lock_set(tx, caller.org)
        session = await session_store.lock_session(tx, session_id, key_id)
        if session is None:
            raise await self._gone(tx, session_id, key_id)
        size, position = await session_store.session_size(tx, session_id)
        if size >= self._settings.session_max_tunnels:
            limit = self._settings.session_max_tunnels
            raise Problem("tunnel.limit_reached", f"a session has at most {limit} tunnels", limit=limit)
        (row,), _ = await self._resolve(tx, caller, session_id, session["hostname"], [spec], account.entitlements)
        if row["position"] is None:
            await self._room_online(tx, account.entitlements, session_id, [row["id"]], size + 1)
            await session_store.bind(tx, session_id, {row["id"]: position}, [row["id"]])
        now = int(self._clock.wall().timestamp())
        signer = await self._keys.current_signer(tx)
        life = _within_key(caller, now, self._settings.grant_life_seconds)
        return {"grants": [self._grant(signer, session_id, account.entitlements, row, now, life)]}

    async def remove(self, tx: Tx, caller: Caller, session_id: str, tunnel_id: str) -> None:
        """Take a tunnel out of a live session: the next refresh has no grant for it. Twice is no error."""
        key_id = _key_of(caller)
        if await session_store.lock_session(tx, session_id, key_id) is None:
            raise await self._gone(tx, session_id, key_id)
        await session_store.unbind(tx, session_id, [tunnel_id])

    async def end(self, tx: Tx, caller: Caller, session_id: str) -> None:
        """End a live session; relays are told within 2 s. Raises ``session.not_found``."""
        key_id = _key_of(caller)
        ended = await session_store.end_session(
            tx, session_id, "session.ended", self._refusal_seconds, key_id, caller.org
        )
        if not ended:
            raise Problem("session.not_found")
        await audit.record(tx, caller, "agent_session.end", session_id)
        _announce(tx, ended, "session.ended")

    async def on_key_revoked(self, tx: Tx, key_id: str) -> None:
        """Identity's callback: the sessions of a revoked key end with it."""
        ended = await session_store.end_sessions_of_key(tx, key_id, "session.revoked", self._refusal_seconds)
        _announce(tx, ended, "session.revoked")

    async def on_key_restricted(self, tx: Tx, key_id: str, cidrs: Sequence[str]) -> None:
        """Identity's callback: sessions that were opened or last refreshed outside the key's new networks end."""
        found = await session_store.session_addresses(tx, key_id)
        outside = [row["id"] for row in found if not networks.allows(cidrs, row["address"])]
        if outside:
            ended = await session_store.end_sessions_by_id(tx, outside, "session.revoked", self._refusal_seconds)
            _announce(tx, ended, "session.revoked")

    async def on_standing(self, tx: Tx, organization: str, standing: Standing | None) -> None:
        """Identity's callback: the sessions of an organization that does not stand well end."""
        if standing is not None:
            code = f"organization.{standing}"
            ended = await session_store.end_sessions_of_organization(tx, organization, code, self._refusal_seconds)
            _announce(tx, ended, code)

    async def _gone(self, reader: Reader, session_id: str, key_id: str) -> Problem:
        code = await session_store.session_end_code(reader, session_id, key_id)
        return Problem(code if code in _TOLD else "session.not_found")

    # -- which tunnels the specs mean

    async def _resolve(
        self,
        tx: Tx,
        caller: Caller,
        session_id: str,
        hostname: str,
        specs: Sequence[TunnelSpec],
        held: Entitlements,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """One tunnel per spec, in order, an existing one made to fit or a new one; and what else the session has.

        Two sessions wait for each other and never deadlock, since all take their locks in one order: whoever makes or changes
        tunnels the set of the organization's, then the rows to change, then new names, each kind in an order of its own.
        Whoever finds all of them as they should be locks none.
        """
        for spec in specs:
            self._tunnels.check_shape(spec.protocol, spec.subdomain, spec.remote_port)
        if any(spec.policy is not None and policy.weighs(spec.policy.document) for spec in specs):
            await store.lock_policies(tx, caller.org)
        origins = _origins(_key_of(caller), hostname, specs)
        order = sorted(range(len(specs)), key=lambda i: (specs[i].subdomain or specs[i].name or "", i))
        choice = await self._candidates(tx, caller, session_id, specs, origins)
        chosen = {index: choice.take(specs[index], origins[index]) for index in order}
        if not all(row is not None and _suits(row, specs[index]) for index, row in chosen.items()):
            await store.lock_set(tx, caller.org)
            if changed := [row["id"] for i, row in chosen.items() if row is not None and not _suits(row, specs[i])]:
                await store.lock_rows(tx, caller.org, changed)
            # What was seen before may have been about to change.
            choice = await self._candidates(tx, caller, session_id, specs, origins)
            chosen = {index: choice.take(specs[index], origins[index]) for index in order}
        rows: dict[int, dict[str, Any]] = {}
        for index in order:
            row = chosen[index] or await self._make(tx, caller, specs[index], origins[index])
            rows[index] = await self._fit(tx, caller, row, specs[index], held)
        ordered = [rows[index] for index in range(len(specs))]
        name, times = Counter(row["name"] for row in ordered).most_common(1)[0] if ordered else ("", 0)
        if times > 1:
            raise Problem("tunnel.name_taken", f"the session names the tunnel {name} twice")
        used = {row["id"] for row in ordered}
        return ordered, [
            row["id"] for row in choice.by_id.values() if row["position"] is not None and row["id"] not in used
        ]

    async def _candidates(
        self,
        tx: Tx,
        caller: Caller,
        session_id: str,
        specs: Sequence[TunnelSpec],
        origins: Sequence[str | None],
    ) -> _Choice:
        found = await session_store.session_candidates(
            tx,
            caller.org,
            session_id,
            [spec.name for spec in specs if spec.name],
            [spec.subdomain for spec in specs if spec.subdomain],
            [origin for origin in origins if origin],
            [spec.remote_port for spec in specs if spec.remote_port],
        )
        choice = _Choice([_parsed(row) for row in found])
        if any(origins):
            taken = [row["id"] for row in choice.by_id.values() if row["origin"] and row["position"] is None]
            choice.busy = await session_store.busy_tunnels(tx, taken, session_id, self._settings.relay_lease_seconds)
        return choice

    async def _make(self, tx: Tx, caller: Caller, spec: TunnelSpec, origin: str | None) -> dict[str, Any]:
        caller.check("tunnels:write")
        for _ in range(_INSERT_ATTEMPTS):
            row = await self._tunnels.insert(
                tx,
                caller,
                protocol=spec.protocol,
                name=spec.name,
                subdomain=spec.subdomain,
                remote_port=spec.remote_port,
                target=spec.target,
                wanted=spec.policy,
                origin=origin,
            )
            if row is None and spec.name is not None:  # made by another session a moment ago
                row = await store.tunnel_by_name(tx, caller.org, spec.name)
            if row is not None:
                return {**row._mapping, "position": None}
        raise Problem("tunnel.name_taken", f"the tunnel {spec.name} comes and goes; try again")

    async def _room_online(
        self, tx: Tx, held: Entitlements, session_id: str, coming: Sequence[str], wanted: int
    ) -> None:
        """Raises ``quota.exceeded`` when the session's tunnels, ``wanted`` of them, would be more on line than the plan allows,
        with those of others. Of ``coming`` one that another session has as well (an agent that was started anew) counts once.

        The caller holds ``lock_set`` where there is a limit; what the plan says is asked again under it."""
        if held.limit("tunnels_online") is None:
            return
        held = await plans.entitlements(tx, held.organization)
        allowed = held.limit("tunnels_online")
        online = await session_store.online_tunnels(
            tx, held.organization, session_id, self._settings.relay_lease_seconds
        )
        used = len(set(online).difference(coming))
        if allowed is not None and used + wanted > allowed:
            raise await self._quotas.exceeded(tx, held, "tunnels_online", used, allowed, wanted)

    async def _fit(
        self, tx: Tx, caller: Caller, row: dict[str, Any], spec: TunnelSpec, held: Entitlements
    ) -> dict[str, Any]:
        """Start a stopped tunnel, and give it the subdomain or port, target and policy that its agent declares."""
        if row["protocol"] != spec.protocol:
            raise Problem("tunnel.protocol_mismatch", f"the tunnel {row['name']} is {kind_of(row['protocol'])} tunnel")
        if row["state"] == "suspended":
            raise Problem("tunnel.suspended", f"the tunnel {row['name']} is suspended")
        if row["frozen"] is not None:
            raise frozen.refusal(row, held)
        wanted: dict[str, Any] = {"state": "active"}
        if spec.subdomain is not None:
            wanted["subdomain"] = spec.subdomain
        if spec.remote_port is not None:
            wanted["port"] = spec.remote_port
        if spec.target is not None:
            wanted["target"] = spec.target
        if spec.policy is not None:
            wanted["policy"] = spec.policy
        changed = await self._tunnels.apply(tx, caller, row, wanted)
        if spec.domain is not None:
            await self._tunnels.domains.attach(tx, caller, row, spec.domain)
        return row if changed is None else {**changed._mapping, "position": row["position"]}

    async def _bind_exactly(self, tx: Tx, session_id: str, rows: list[dict[str, Any]], others: list[str]) -> None:
        """Make the session's tunnels these, writing nothing when they are so already (every reconnect)."""
        wanted = {row["id"]: index for index, row in enumerate(rows)}
        current = {row["id"]: row["position"] for row in rows if row["position"] is not None}
        if others:
            await session_store.unbind(tx, session_id, others)
        if current != wanted:
            await session_store.bind(tx, session_id, wanted, [tunnel for tunnel in wanted if tunnel not in current])

    # -- what the agent gets

    def _answer(
        self,
        signer: SigningKey,
        key_id: str,
        caller: Caller,
        agent: AgentFacts,
        session: Any,
        rows: Sequence[dict[str, Any]],
        account: Account,
        edges: list[str],
    ) -> dict[str, Any]:
        settings = self._settings
        now = int(self._clock.wall().timestamp())
        token_life = _within_key(caller, now, settings.session_token_seconds)
        grant_life = _within_key(caller, now, settings.grant_life_seconds)
        claims = grants.session_claims(
            key=key_id,
            session=session["id"],
            organization=caller.org,
            agent=agent.agent_id,
            region=agent.region,
            generation=session["generation"],
            now=now,
            life=token_life,
        )
        who: dict[str, Any] = {
            "organization": {"id": account.organization, "name": account.organization_name},
            "plan": account.plan,
        }
        if account.email is not None:
            who["user"] = account.email
        return {
            "session": session["id"],
            "token": signer.sign(grants.SESSION_TYP, claims),
            "expires_at": _rfc3339(claims["exp"]),
            "refresh_after": max(1, min(token_life, grant_life) * 2 // 3),
            "edges": edges,
            "account": who,
            "grants": [self._grant(signer, session["id"], account.entitlements, row, now, grant_life) for row in rows],
        }

    def _grant(
        self, signer: SigningKey, session_id: str, held: Entitlements, row: dict[str, Any], now: int, life: int
    ) -> dict[str, Any]:
        addresses = self._tunnels.addresses
        url = addresses.url(row)
        claims = grants.grant_claims(
            session=session_id,
            organization=held.organization,
            tunnel=row["id"],
            name=row["name"],
            protocol=row["protocol"],
            hosts=addresses.grant_hosts(row),
            port=row["port"],
            limits=policy.limits(self._settings, row["protocol"], held),
            generation=row["generation"],
            policy_hash=row["policy_hash"],
            policy=row["policy"],
            policy_version=row["policy_version"],
            url=url,
            now=now,
            life=life,
        )
        try:
            token = signer.sign(grants.GRANT_TYP, claims, limit=grants.MAX_GRANT_BYTES)
        except InvalidToken as err:
            raise Problem(
                "tunnel.policy_invalid", f"the policy is too large for a grant: {err}", path="policy"
            ) from None
        return {
            "tunnel": row["id"],
            "name": row["name"],
            "url": url,
            "grant": token,
            "expires_at": _rfc3339(claims["exp"]),
        }


def _within_key(caller: Caller, now: int, seconds: int) -> int:
    """``seconds``, or less where the key ends sooner: what a key gives out does not outlive it."""
    if caller.expires_at is None:
        return seconds
    return max(1, min(seconds, int(caller.expires_at.timestamp()) - now))


def startable(specs: Sequence[TunnelSpec]) -> bool:
    """Whether ``Sessions.started`` is worth a try: every tunnel is named, once, and keeps its policy and domains."""
    names = {spec.name for spec in specs if spec.name is not None and spec.policy is None and spec.domain is None}
    return 0 < len(names) == len(specs)


class _Choice:
    """Existing tunnels that specs may mean, each used once."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.by_id = {row["id"]: row for row in rows}
        self.busy: set[str] = set()
        self._by_name = {row["name"]: row for row in rows}
        self._by_subdomain = {row["subdomain"]: row for row in rows}
        self._by_port = {row["port"]: row for row in rows}
        self._used: set[str] = set()

    def take(self, spec: TunnelSpec, origin: str | None) -> dict[str, Any] | None:
        """The tunnel that ``spec`` means, or ``None`` when it has to be made."""
        if spec.name is not None:
            row = self._by_name.get(spec.name)
        elif spec.subdomain is not None:
            row = self._by_subdomain.get(spec.subdomain)
        elif spec.remote_port is not None:
            row = self._by_port.get(spec.remote_port)
        else:
            row = self._of_origin(origin)
        if row is not None:
            self._used.add(row["id"])
        return row

    def _of_origin(self, origin: str | None) -> dict[str, Any] | None:
        """The session's own first, then one that no running agent uses."""
        free = [
            row
            for row in self.by_id.values()
            if row["origin"] == origin
            and row["state"] != "suspended"
            and row["frozen"] is None
            and row["id"] not in self._used | self.busy
        ]
        return min(free, key=lambda row: (row["position"] is None, row["id"]), default=None)


def _origins(key_id: str, hostname: str, specs: Sequence[TunnelSpec]) -> list[str | None]:
    """What unnamed tunnels are found again by when their agent restarts: key, machine, target, and which of its kind."""
    seen: Counter[str] = Counter()
    origins: list[str | None] = []
    for spec in specs:
        if spec.name is not None or spec.subdomain is not None or spec.remote_port is not None:
            origins.append(None)
            continue
        base = f"{key_id}\0{hostname}\0{spec.target or ''}"
        if spec.protocol != "http":
            base += f"\0{spec.protocol}"
        origins.append(hashlib.sha256(f"{base}\0{seen[base]}".encode()).hexdigest()[:32])
        seen[base] += 1
    return origins


def _fits(row: dict[str, Any], spec: TunnelSpec) -> bool:
    """Whether a bound tunnel is what the spec in its place asks for, by name and in everything that the spec says; where domains
    lead is not in the row."""
    return row["name"] == spec.name and spec.domain is None and _suits(row, spec)


def _suits(row: dict[str, Any], spec: TunnelSpec) -> bool:
    """Whether there is nothing to change about a tunnel that the spec means."""
    return (
        row["state"] == "active"
        and row["frozen"] is None
        and row["protocol"] == spec.protocol
        and spec.subdomain in (None, row["subdomain"])
        and spec.remote_port in (None, row["port"])
        and spec.target in (None, row["target"])
        and (spec.policy is None or spec.policy.settle(spec.protocol, row["policy"])[1] == row["policy_hash"])
    )


def _parsed(row: Any) -> dict[str, Any]:
    """A raw row as a dict; raw queries give JSON as text."""
    return {**row, "policy": policy.stored(row["policy"])}


def _key_of(caller: Caller) -> str:
    """The key that a session belongs to. A person signs in by making an agent key (``portico login``)."""
    if caller.kind not in ("agent_key", "api_key"):
        raise Problem("auth.forbidden", "agent sessions need an agent key", permission="agent:connect")
    return caller.id


def _announce(tx: Tx, ended: list[Any], code: str) -> None:
    changes.append(tx, *(changes.session_ended(row["id"], code, row["until"]) for row in ended))


def _rfc3339(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def ended_sessions(reader: Reader, now: float) -> list[dict[str, Any]]:
    """Ended sessions whose tokens could still be accepted after ``now`` (unix seconds), as relays hold them."""
    rows = await session_store.edge_ended(reader, now)
    return [{"session": row["id"], "code": row["ended_code"], "until": row["until"]} for row in rows]
