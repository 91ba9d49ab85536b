"""Agent sessions and the tunnels bound on them: who may bind, who takes over from whom, when a grant is too old.

    Agents (the table) ── by host, by tunnel ──► LiveTunnel ──► AgentConnection ──► wire.Session ──► kit.Carrier

Order of two connections of one session is (generation from the API, connect counter of the agent): a late packet of
the old one cannot take a name back. Another instance is refused while the holder answers pings (``contracts/wire.md`` 3).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from picows import WSCloseCode

from portico.errors import Problem
from portico.relay.agent_connection import AgentConnection, LiveTunnel
from portico.relay.control_link import ControlLink
from portico.relay.edge_rows import TunnelRow
from portico.relay.ended import why_ended
from portico.relay.meter import Meter
from portico.relay.policy import PolicyInvalid
from portico.relay.snapshot import Change, Snapshot
from portico.settings import RelaySettings
from portico.wire import frames as f
from portico.wire.grants import GrantClaims, SessionClaims, verify_grant, verify_session

if TYPE_CHECKING:
    from portico.relay.rates import TunnelRates

log = logging.getLogger("portico.relay.sessions")

#: A grant older than this whose tunnel the (current) edge state does not know belongs to a deleted tunnel; a younger one
#: may have overtaken its own row on the edge stream.
ROW_DELAY_SECONDS = 15.0
#: Departures whose reason is kept while no heartbeat gets through, and characters of a reason.
MAX_DEPARTURES, REASON_CHARS = 20_000, 120


class Agents:
    """The table of connections and live tunnels. All methods run on the loop; nothing here waits."""

    def __init__(
        self, settings: RelaySettings, snapshot: Snapshot, meter: Meter, *, wall: Callable[[], float] = time.time
    ) -> None:
        self.settings = settings
        self.snapshot = snapshot
        self.meter = meter
        self.link: ControlLink | None = None
        self.draining = False
        self.connections: set[AgentConnection] = set()
        self.by_host: dict[bytes, LiveTunnel] = {}
        self.by_tunnel: dict[str, LiveTunnel] = {}
        self.by_session: dict[str, AgentConnection] = {}
        #: Why tunnels went, until a heartbeat has told the control plane.
        self.left: dict[str, str] = {}
        #: Hosts of tunnels that went without a word a moment ago, and until when (loop time) they are waited for.
        self.returning: dict[bytes, float] = {}
        self.on_bound: list[Callable[[LiveTunnel], None]] = []
        self.on_dropped: list[Callable[[LiveTunnel], None]] = []
        #: A live tunnel has another policy.
        self.on_governed: list[Callable[[LiveTunnel], None]] = []
        #: The rates that a tunnel's policy and grant set.
        self.rates_of: Callable[[LiveTunnel], TunnelRates | None] = lambda live: None
        #: The platform ended a tunnel, with this code: what is in flight on it ends too, where it has no end of its own.
        self.on_ended: list[Callable[[LiveTunnel, str], None]] = []
        #: Opens what a tunnel needs beside its hosts. ``False``: :meth:`announce` or :meth:`refuse` is called later.
        self.listen: Callable[[LiveTunnel], bool] = lambda live: True
        self._connected_since = math.inf
        self._wall = wall
        snapshot.on_change(self._on_change)

    # ── the control plane's reach ─────────────────────────────────────────────────────────────────────────────────
    @property
    def online(self) -> bool:
        """Whether the edge stream is up; while it is not, tokens are believed for the outage grace longer."""
        return self.link is not None and self.link.connected

    @property
    def _grace(self) -> float:
        limits = self.settings
        return limits.grant_refresh_grace_seconds if self.online else limits.grant_outage_grace_seconds

    def stream_connected(self) -> None:
        """The edge stream is back: expired grants have ``grant_refresh_grace_seconds`` from now."""
        self._connected_since = self._wall()

    def poke(self) -> None:
        if self.link is not None:
            self.link.poke()

    # ── connecting ────────────────────────────────────────────────────────────────────────────────────────────────
    def verify(self, token: str) -> SessionClaims:
        """The claims of a session token that may connect now; raises a ``session.*`` problem."""
        if self.snapshot.version is None:
            raise Problem("session.relay_not_ready", "this relay has not heard from its control plane yet")
        claims = verify_session(
            token,
            self.snapshot.keys,
            self._wall(),
            leeway=self.settings.token_leeway_seconds,
            grace=self._token_grace(),
        )
        ended = self.snapshot.ended(claims.sid)
        if ended is not None:
            raise Problem(ended.code, why_ended(ended.code))
        return claims

    def _token_grace(self) -> float:
        """Reconnects with an expired token are taken during an outage, and for a moment after it."""
        limits = self.settings
        if not self.online:
            return limits.grant_outage_grace_seconds
        since_back = self._wall() - self._connected_since
        return limits.grant_outage_grace_seconds if 0 <= since_back < limits.grant_refresh_grace_seconds else 0.0

    def connect(self, authorization: str | None) -> AgentConnection:
        """A new connection for an ``Authorization`` header; raises a problem that refuses the upgrade.

        It is in the table once the WebSocket is open.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Problem("session.token_invalid", "the Authorization header carries no session token")
        if self.draining:
            raise Problem("session.relay_draining", "this relay is shutting down")
        if len(self.connections) >= self.settings.max_sessions:
            raise Problem("session.relay_full", "this relay holds as many sessions as it may")
        return AgentConnection(self, self.verify(token.strip()))

    def greet(self, connection: AgentConnection) -> bool:
        """Put a connection in its order; ``False`` when a later one of the same session is here."""
        sid = connection.claims.sid
        holder = self.by_session.get(sid)
        if holder is not None and not holder.session.closed and holder.order > connection.order:
            return False
        self.by_session[sid] = connection
        return True

    def connection_lost(self, connection: AgentConnection, detail: str) -> None:
        self.connections.discard(connection)
        if self.by_session.get(connection.claims.sid) is connection:
            del self.by_session[connection.claims.sid]
        for live in list(connection.binds.values()):
            live.returning = True
            self.drop(live, detail)
        log.info(
            "session disconnected",
            extra={"f": {"session": connection.claims.sid, "agent": connection.claims.agent, "reason": detail}},
        )

    # ── binding ───────────────────────────────────────────────────────────────────────────────────────────────────
    def bind(self, connection: AgentConnection, bind: int, token: str) -> None:
        """Answer a BIND: bound, refused, or after the holder was asked for a sign of life. Raises the refusal."""
        grant = self._check_grant(connection, token)
        bound = connection.binds.get(bind)
        if bound is not None and bound.grant.tun != grant.tun:
            raise Problem("tunnel.grant_invalid", "this bind id holds another tunnel")
        if bound is None and len(connection.binds) + len(connection.pending) >= self.settings.max_tunnels_per_session:
            raise Problem("tunnel.too_many_binds", "this session has as many tunnels as a relay takes")
        holder = self.by_tunnel.get(grant.tun)
        if holder is None or holder.connection is connection or holder.connection.session.closed:
            self._install(connection, bind, grant)
        elif holder.connection.claims.sid == connection.claims.sid:
            self._succeed(connection, bind, grant, holder)
        else:
            self._contend(connection, bind, token, holder)

    def _check_grant(self, connection: AgentConnection, token: str) -> GrantClaims:
        limits, now = self.settings, self._wall()
        grant = verify_grant(
            token, self.snapshot.keys, now, leeway=limits.token_leeway_seconds, grace=self._token_grace()
        )
        if grant.sid != connection.claims.sid or grant.org != connection.claims.org:
            raise Problem("tunnel.grant_invalid", "the grant is for another session")
        row = self.snapshot.tunnel(grant.tun)
        if row is None:
            if self.online and now - grant.iat > ROW_DELAY_SECONDS + limits.token_leeway_seconds:
                raise Problem("tunnel.deleted", f"tunnel {grant.name} was deleted")
        elif row.generation > grant.gen:
            if not row.active:
                raise Problem(_STATE_CODES.get(row.state, "tunnel.stopped"), f"tunnel {grant.name} is {row.state}")
            raise Problem("tunnel.grant_stale", f"tunnel {grant.name} changed after this grant was made")
        return grant

    def _install(self, connection: AgentConnection, bind: int, grant: GrantClaims) -> None:
        """Bind, or renew the grant of what is bound."""
        held = self.by_tunnel.get(grant.tun)
        if held is not None and held.connection is connection and held.bind == bind:
            live = held
            self._govern(live, grant)
        else:
            live = LiveTunnel(connection, bind, grant, self.meter.counters(grant.tun, grant.org))
            self._govern(live, grant)
            if held is not None:
                self.drop(held)
            self.by_tunnel[grant.tun] = connection.binds[bind] = live
            self.poke()
        self._unmap(live)
        domains = self.snapshot.domains_of(grant.tun)
        live.adopt(grant, self.snapshot.organization(grant.org), self.settings.default_concurrency, domains)
        live.settle(self.rates_of(live))
        for host in live.hosts:
            self.by_host[host] = live
        for callback in self.on_bound:
            callback(live)
        if self.listen(live):
            self.announce(live)

    def _govern(self, live: LiveTunnel, grant: GrantClaims) -> None:
        """The newest policy that can be read, of the grant's and the edge state's; raises when there is none: a tunnel whose
        policy is not understood is not served without it."""
        row = self.snapshot.tunnel(grant.tun)
        refusal: PolicyInvalid | None = None
        offered = [(grant.policy_version, grant.policy)]
        if row is not None:
            offered.append((row.policy_version, row.policy))
        for version, document in sorted(offered, key=lambda offer: offer[0], reverse=True):
            try:
                live.govern(version, document)
            except PolicyInvalid as err:
                _say_unread(live, version, err)
                refusal = err
                continue
            return
        if live.policy_version < 0:
            raise Problem("tunnel.policy_invalid", f"this relay cannot read the tunnel's policy: {refusal}")

    def announce(self, live: LiveTunnel) -> None:
        """Tell the agent that its tunnel is bound."""
        grant = live.grant
        live.connection.session.control(f.BOUND, live.bind, tunnel=grant.tun, name=grant.name, url=grant.url)
        log.info("tunnel bound", extra={"f": {"tunnel": grant.tun, "name": grant.name, "session": grant.sid}})

    def refuse(self, live: LiveTunnel, problem: Problem) -> None:
        """Take back a bind that could not be completed."""
        log.warning("tunnel refused", extra={"f": {"tunnel": live.grant.tun, "why": problem.detail}})
        live.connection.refuse(live.bind, problem)
        self.drop(live)

    def _succeed(self, connection: AgentConnection, bind: int, grant: GrantClaims, holder: LiveTunnel) -> None:
        """The same instance on a newer connection takes over at once; what is in flight on the old one finishes there."""
        if holder.connection.order > connection.order:
            raise Problem("session.superseded", "a later connection of this session holds the tunnel")
        old = holder.connection
        old.unbind(holder, "tunnel.moved", "the tunnel moved to a newer connection of this session")
        self._install(connection, bind, grant)
        if not old.binds:
            self._retire(old)

    def moved(self, tunnel: str, session: str, order: tuple[int, int]) -> None:
        """A peer has the tunnel, by a connection of this order: let go of it if ours is an older one of the same session."""
        live = self.by_tunnel.get(tunnel)
        if live is None or live.connection.claims.sid != session or live.connection.order >= order:
            return
        old = live.connection
        old.unbind(live, "tunnel.moved", "the tunnel moved to a newer connection of this session")
        if not old.binds:
            self._retire(old)

    def _retire(self, old: AgentConnection) -> None:
        """An old connection that answers no ping is cut, so that what is in flight on it fails now and not at the deadline."""
        asked = old.carrier.heard
        old.carrier.probe()

        def judge() -> None:
            if old.carrier.heard <= asked:
                old.carrier.abort("superseded by a newer connection")

        asyncio.get_running_loop().call_later(self.settings.takeover_probe_seconds, judge)

    def _contend(self, connection: AgentConnection, bind: int, token: str, holder: LiveTunnel) -> None:
        """Another instance asks for a held tunnel: the holder keeps it if it answers a ping within the deadline."""
        if bind in connection.pending:
            return
        old = holder.connection

        def alive() -> None:
            timer = connection.pending.pop(bind, None)
            if timer is None:
                return
            timer.cancel()
            problem = Problem(
                "tunnel.in_use",
                f"tunnel {holder.grant.name} is online from another agent ({old.claims.agent})",
            )
            if not connection.session.closed:
                connection.refuse(bind, problem)

        def dead() -> None:
            connection.pending.pop(bind, None)
            if connection.session.closed:
                return
            if self.by_tunnel.get(holder.grant.tun) is holder:
                old.carrier.abort("took no part in a take-over within the deadline")
                self.drop(holder, "another agent took over")
            # Asked anew: meanwhile the tunnel may have been stopped, or another one who waited may hold it.
            connection.on_bind(bind, token)

        loop = asyncio.get_running_loop()
        connection.pending[bind] = loop.call_later(self.settings.takeover_probe_seconds, dead)
        old.alive.append(alive)
        old.carrier.probe()

    def drop(self, live: LiveTunnel, why: str = "") -> None:
        """The tunnel is not live here any more; ``why`` is for its history."""
        if why and len(self.left) < MAX_DEPARTURES:
            self.left[live.grant.tun] = "".join(c if c.isprintable() else "?" for c in why[:REASON_CHARS])
        live.connection.binds.pop(live.bind, None)
        if self.by_tunnel.get(live.grant.tun) is live:
            del self.by_tunnel[live.grant.tun]
        self._unmap(live)
        if live.returning:
            self.expect(live.hosts)
        for callback in self.on_dropped:
            callback(live)
        if live.line is not None:
            live.line.dissolve()
        self.meter.release(live.counters)
        self.poke()

    def expect(self, hosts: Sequence[bytes]) -> None:
        """Their tunnels went without a word: for a moment their requests wait instead of being refused."""
        until = asyncio.get_running_loop().time() + self.settings.hold_seconds
        self.returning.update(dict.fromkeys(hosts, until))

    def _unmap(self, live: LiveTunnel) -> None:
        for host in live.hosts:
            if self.by_host.get(host) is live:
                del self.by_host[host]

    # ── the platform's word ───────────────────────────────────────────────────────────────────────────────────────
    def _on_change(self, change: Change) -> None:
        """A change of the edge state reaches what is live at once."""
        if change.kind == "session_ended":
            for connection in [c for c in self.connections if c.claims.sid == change.id]:
                connection.end(change.code, why_ended(change.code))
            return
        if change.kind == "organization":
            self._entitle(change.id)
            return
        if change.kind == "domain":
            for tunnel in change.tunnels:
                self._lead(tunnel)
            return
        live = self.by_tunnel.get(change.id)
        if live is None:
            return
        if change.kind == "tunnel_removed":
            self._end(live, change.code, "the tunnel was deleted")
            return
        if change.row is not None and change.row.policy_version > live.policy_version:
            self._new_policy(live, change.row)
        if change.row is not None and change.row.generation > live.grant.gen:
            if change.row.active:
                live.connection.unbind(live, "tunnel.grant_stale", "the tunnel changed; ask for a new grant")
            else:
                code = _STATE_CODES.get(change.row.state, "tunnel.stopped")
                self._end(live, code, f"the tunnel is {change.row.state}")

    def _lead(self, tunnel: str) -> None:
        """Domains that lead to a tunnel have changed: what comes from now on goes by them. Peers, and who waits, are told."""
        live = self.by_tunnel.get(tunnel)
        if live is None:
            return
        self._unmap(live)
        live.lead(self.snapshot.domains_of(tunnel))
        live.settle(self.rates_of(live))
        for host in live.hosts:
            self.by_host[host] = live
        for callback in self.on_bound:
            callback(live)

    def _new_policy(self, live: LiveTunnel, row: TunnelRow) -> None:
        """A new policy holds for what comes from now on; one that cannot be read leaves the old one as it is."""
        try:
            live.govern(row.policy_version, row.policy)
        except PolicyInvalid as err:
            _say_unread(live, row.policy_version, err)
            return
        live.settle(self.rates_of(live))
        log.info("tunnel policy changed", extra={"f": {"tunnel": row.id, "version": row.policy_version}})
        for callback in self.on_governed:
            callback(live)

    def _entitle(self, organization: str) -> None:
        """The plan of an organization changed, or its standing: in force for what comes from now on. Where traffic is refused,
        connections without an end of their own end."""
        row = self.snapshot.organization(organization)
        refused = row is not None and row.refuses(self._wall())
        for live in [live for live in self.by_tunnel.values() if live.grant.org == organization]:
            live.entitle(row, self.settings.default_concurrency)
            live.settle(self.rates_of(live))
            for told in self.on_governed:
                told(live)
            if refused and row is not None and row.code is not None:
                for callback in self.on_ended:
                    callback(live, row.code)

    def _end(self, live: LiveTunnel, code: str, detail: str) -> None:
        live.connection.unbind(live, code, detail)
        for callback in self.on_ended:
            callback(live, code)

    def sweep(self) -> None:
        """End what is too old: grants and tokens past their time and the grace that holds now."""
        now, grace = self._wall(), self._grace
        since = self._connected_since if self.online else 0.0
        for live in list(self.by_tunnel.values()):
            if now > max(live.grant.exp, since) + grace:
                live.connection.unbind(live, "tunnel.grant_expired", "the grant was not renewed in time")
        for connection in list(self.connections):
            if now > max(connection.claims.exp, since) + grace:
                connection.end("session.token_expired", "the session token was not renewed in time", retryable=True)
        if self.returning:
            at = asyncio.get_running_loop().time()
            self.returning = {host: until for host, until in self.returning.items() if until > at}

    # ── figures and ending ────────────────────────────────────────────────────────────────────────────────────────
    def bound(self) -> list[dict[str, Any]]:
        """The live tunnels, for heartbeats."""
        return [
            {"tunnel": live.grant.tun, "session": live.grant.sid, "generation": live.grant.gen}
            for live in self.by_tunnel.values()
        ]

    def streams(self) -> int:
        return sum(len(connection.session.streams) for connection in self.connections)

    def go_away(self) -> None:
        """Ask every agent to open its replacement elsewhere, each at a moment of its own, so that the others are not
        stormed; nothing new connects here from now on."""
        self.draining = True
        limits = self.settings
        spread = min(len(self.connections) / max(limits.drain_agents_per_second, 1), limits.drain_seconds / 2)
        for connection in self.connections:
            connection.session.control(
                f.GOAWAY,
                0,
                code="session.relay_draining",
                detail="the relay is shutting down",
                retry_after_ms=int(random.uniform(0, spread) * 1000),  # noqa: S311 - no secret
            )

    def staying(self) -> int:
        """Connections whose agents have not moved elsewhere."""
        return sum(not connection.moved and bool(connection.binds) for connection in self.connections)

    async def close(self) -> None:
        """Close every connection (with what is queued sent) and wait a moment for the close frames to leave."""
        for connection in list(self.connections):
            connection.carrier.end(WSCloseCode.GOING_AWAY, "relay shut down")
        await asyncio.sleep(0)


def _say_unread(live: LiveTunnel, version: int, why: PolicyInvalid) -> None:
    fields = {"tunnel": live.grant.tun, "version": version, "why": str(why)}
    log.error("a tunnel's policy cannot be read; the one before it stays", extra={"f": fields})


_STATE_CODES = {"stopped": "tunnel.stopped", "suspended": "edge.account_suspended", "frozen": "tunnel.frozen"}
