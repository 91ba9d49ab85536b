"""Agent sessions and the tunnels bound on them: who may bind, who takes over from whom, when a grant is too old.

    Agents (the table) ── by host, by tunnel ──► LiveTunnel ──► AgentConnection ──► wire.Session ──► kit.Carrier

Order of two connections of one session is (generation from the API, connect counter of the agent): a late packet of
the old one cannot take a name back. Another instance is refused while the holder answers pings (``contracts/wire.md`` 3).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from picows import WSCloseCode

from portico.errors import Problem
from portico.kit.carrier import Carrier
from portico.relay.control_link import ControlLink
from portico.relay.ended import why_ended
from portico.relay.meter import Counters, Meter
from portico.relay.policy import Governed, PolicyInvalid
from portico.relay.snapshot import Change, Domain, Organization, Snapshot, TunnelRow
from portico.relay.telling import Told
from portico.settings import RelaySettings
from portico.wire import frames as f
from portico.wire.counts import Counts
from portico.wire.grants import GrantClaims, SessionClaims, verify_grant, verify_session
from portico.wire.session import Handler, Session, Sink, Stream

if TYPE_CHECKING:
    from portico.relay.rates import TunnelRates

log = logging.getLogger("portico.relay.sessions")

#: A grant older than this whose tunnel the (current) edge state does not know belongs to a deleted tunnel; a younger one
#: may have overtaken its own row on the edge stream.
ROW_DELAY_SECONDS = 15.0
#: Departures whose reason is kept while no heartbeat gets through, and characters of a reason.
MAX_DEPARTURES, REASON_CHARS = 20_000, 120


class LiveTunnel(Governed):
    """A tunnel bound on a connection of this relay."""

    __slots__ = (
        "bind", "bind_bytes", "connection", "counters", "given_back", "grant", "hosts", "organization_row", "returning",
        "session", "told",
    )  # fmt: skip

    def __init__(self, connection: AgentConnection, bind: int, grant: GrantClaims, counters: Counters) -> None:
        super().__init__(raw=grant.proto != "http", passthrough=grant.proto == "tls")
        self.connection = connection
        self.session = connection.session
        self.bind = bind
        self.bind_bytes = f.U32.pack(bind)
        self.counters = counters
        self.hosts: tuple[bytes, ...] = ()
        self.grant = grant
        self.organization_row: Organization | None = None
        self.told = Told(counters)
        self.returning = False  # it went without a word, or to come again at once
        self.given_back = False  # by its agent, which still answers what crosses that

    def adopt(
        self,
        grant: GrantClaims,
        organization: Organization | None,
        default_concurrency: int,
        domains: Iterable[Domain] = (),
    ) -> None:
        self.grant = grant
        self.lead(domains)
        self.entitle(organization, default_concurrency)

    def lead(self, domains: Iterable[Domain]) -> None:
        """Take the domains that lead here, beside the hosts of the grant; :meth:`settle` is called after it."""
        domains = tuple(domains)
        named = (*(host.host for host in self.grant.hosts), *(domain.host for domain in domains))
        self.hosts = tuple(dict.fromkeys(host.encode() for host in named))
        self.strict = any(domain.valid_until is not None for domain in domains)

    def entitle(self, organization: Organization | None, default_concurrency: int) -> None:
        """Take what holds for its organization; :meth:`settle` is called after it."""
        self.organization_row = organization
        self.allowance = self.limits().get("concurrency") or default_concurrency
        self.bar(organization)

    @property
    def organization(self) -> str:
        """The id of its organization."""
        return self.grant.org

    @property
    def tunnel(self) -> str:
        """Its id."""
        return self.grant.tun

    def limits(self) -> Mapping[str, int]:
        """The limits of the plan: of the grant, or of the organization's row where that is newer."""
        row = self.organization_row
        if row is None or row.version <= self.grant.limits.get("version", 0):
            return self.grant.limits
        if self.grant.proto == "http":
            return row.limits
        return {**row.limits, "concurrency": row.limits.get("connections", 0)}

    @property
    def reachable(self) -> bool:
        session = self.session
        return not session.closed and len(session.streams) < session.max_streams

    def open(self, head: Sequence[bytes], flags: int, sink: Sink) -> Stream:
        """A new request stream; raises as :meth:`wire.session.Session.open_request`."""
        return self.connection.session.open_request(self.bind, head, flags, sink, parsed=True)

    def open_tcp(self, info: dict[str, Any], sink: Sink) -> Stream:
        """A new TCP stream; raises ``OverflowError`` at a limit."""
        return self.connection.session.open_tcp(self.bind, info, sink)


def new_session(handler: Handler, limits: RelaySettings, *, relay: bool) -> Session:
    """A session with this relay's limits, towards an agent or a peer."""
    return Session(
        handler,
        relay=relay,
        max_streams=limits.max_streams_per_session,
        max_window=limits.stream_window_max_bytes,
        growth=limits.window_growth_budget_bytes,
    )


class AgentConnection:
    """One WebSocket of an agent: the relay's side of the session protocol."""

    def __init__(self, agents: Agents, claims: SessionClaims) -> None:
        limits = agents.settings
        self.agents = agents
        self.claims = claims
        self.connect = 0
        self.version = ""
        self.moved = False  # since this relay drains: its agent is bound elsewhere
        self.binds: dict[int, LiveTunnel] = {}
        self.pending: dict[int, asyncio.TimerHandle] = {}
        self.alive: list[Callable[[], None]] = []
        self.session = new_session(self, limits, relay=True)
        self.carrier = Carrier(
            self.session,
            ping_interval=limits.ping_interval_seconds,
            ping_timeout=limits.ping_timeout_seconds,
            on_lost=self._lost,
            on_open=self._opened,
        )
        self._hello: asyncio.TimerHandle | None = None

    @property
    def order(self) -> tuple[int, int]:
        return (self.claims.gen, self.connect)

    def end(self, code: str, detail: str, *, retryable: bool = False) -> None:
        """ERROR with a code, then the connection closes; its tunnels go offline at once."""
        self.session.fail(code, detail, retryable)
        for live in list(self.binds.values()):  # the socket may take its time when the agent does not read
            live.returning = retryable
            self.agents.drop(live, detail)
        self.carrier.end(WSCloseCode.POLICY_VIOLATION, code)

    def _opened(self) -> None:
        """The upgrade succeeded; one whose other header fields were wrong never comes here, nor does its end."""
        limit = self.agents.settings.hello_timeout_seconds
        self._hello = asyncio.get_running_loop().call_later(limit, self._no_hello)
        self.agents.connections.add(self)

    def _greeted(self) -> None:
        if self._hello is not None:
            self._hello.cancel()

    def _lost(self, detail: str) -> None:
        self._greeted()
        for timer in self.pending.values():
            timer.cancel()
        self.agents.connection_lost(self, detail)

    def _no_hello(self) -> None:
        if not self.session.greeted:
            self.end("wire.protocol_error", "no HELLO in time")

    # ── session events ────────────────────────────────────────────────────────────────────────────────────────────
    def on_hello(self, body: dict[str, Any]) -> None:
        self._greeted()
        self.connect = body["connect"]
        self.version = str(body.get("agent", ""))[:64]
        if not self.agents.greet(self):
            self.end("session.superseded", "a later connection of this session is here already")
            return
        limits = self.agents.settings
        self.session.control(
            f.HELLO,
            0,
            version=f.VERSION,
            relay=limits.relay_name,
            region=limits.region,
            session=self.claims.sid,
            ping_interval_ms=int(limits.ping_interval_seconds * 1000),
            ping_timeout_ms=int(limits.ping_timeout_seconds * 1000),
            answers=True,
            first_byte_timeout_ms=int(limits.first_byte_timeout_seconds * 1000),
        )

    def on_bind(self, bind: int, grant: str) -> None:
        try:
            self.agents.bind(self, bind, grant)
        except Problem as problem:
            self.refuse(bind, problem)

    def refuse(self, bind: int, problem: Problem) -> None:
        self.session.control(
            f.REFUSED, bind, code=problem.code, detail=problem.detail[:1024], retryable=problem.retryable
        )

    def on_unbind(self, bind: int, code: str, detail: str) -> None:
        timer = self.pending.pop(bind, None)
        if timer is not None:
            timer.cancel()
        live = self.binds.get(bind)
        if live is not None:
            live.given_back = True
            self.agents.drop(live, detail)

    def unbind(self, live: LiveTunnel, code: str, detail: str) -> None:
        """Tell the agent that a tunnel is over; streams in flight finish."""
        self.session.control(f.UNBIND, live.bind, code=code, detail=detail)
        live.returning = code in ("tunnel.grant_stale", "tunnel.grant_expired", "tunnel.moved")
        self.agents.drop(live, detail)

    def on_auth(self, token: str) -> None:
        try:
            claims = self.agents.verify(token)
            if claims.sid != self.claims.sid or claims.agent != self.claims.agent:
                raise Problem("session.token_invalid", "the token is for another session")
        except Problem as problem:
            self.end(problem.code, problem.detail, retryable=problem.retryable)
            return
        self.claims = claims
        expires = dt.datetime.fromtimestamp(claims.exp, dt.UTC).isoformat().replace("+00:00", "Z")
        self.session.control(f.AUTHED, 0, expires_at=expires)

    def on_pong(self, payload: bytes) -> None:
        self.carrier.note_pong(payload)
        waiting, self.alive = self.alive, []
        for callback in waiting:
            callback()

    def on_goaway(self, code: str, detail: str, retry_after_ms: int) -> None:
        """The agent leaves: it takes no new requests, those in flight finish. When it does so because we asked it to, it
        still answers here until we close, so that visitors who stay connected to us are served to the end."""
        if self.agents.draining and code == "session.moved":
            self.moved = True
            return
        for live in list(self.binds.values()):
            self.agents.drop(live, detail)

    def on_error(self, code: str, detail: str, retryable: bool) -> None:
        log.warning(
            "agent ended the session", extra={"f": {"session": self.claims.sid, "code": code, "detail": detail}}
        )
        self.carrier.end(WSCloseCode.OK, "")

    def on_bound(self, bind: int, tunnel: str, name: str, url: str) -> None:
        """Not sent to relays (the session refuses it)."""

    def on_refused(self, bind: int, code: str, detail: str, retryable: bool) -> None:
        """Not sent to relays (the session refuses it)."""

    def on_authed(self, body: dict[str, Any]) -> None:
        """Not sent to relays (the session refuses it)."""

    def on_counts(self, bind: int, counts: Counts) -> None:
        """Not sent to relays (the session refuses it)."""

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> None:
        """Not sent to relays (the session refuses it)."""

    def on_open(self, stream: Stream, bind: int, info: dict[str, Any]) -> None:
        """Not sent to relays (the session refuses it)."""


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
