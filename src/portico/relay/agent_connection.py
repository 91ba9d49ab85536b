"""One agent's connection and the tunnels that are bound on it: the relay's side of the session protocol.

What it is asked for is decided by the table of all connections (``sessions.Agents``).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from picows import WSCloseCode

from portico.errors import Problem
from portico.kit.carrier import Carrier
from portico.relay.edge_rows import Domain, Organization
from portico.relay.meter import Counters
from portico.relay.policy import Governed
from portico.relay.telling import Told
from portico.settings import RelaySettings
from portico.wire import frames as f
from portico.wire.counts import Counts
from portico.wire.grants import GrantClaims, SessionClaims
from portico.wire.session import Handler, Session
from portico.wire.stream import Sink, Stream

if TYPE_CHECKING:
    from portico.relay.sessions import Agents

log = logging.getLogger("portico.relay.sessions")


class LiveTunnel(Governed):
    """A tunnel bound on a connection of this relay."""

    __slots__ = (
        "bind", "bind_bytes", "connection", "counters", "given_back", "grant", "hosts", "organization_row", "returning",
        "session", "told",
    )  # fmt: skip

    def __init__(self, connection: AgentConnection, bind: int, grant: GrantClaims, counters: Counters) -> None:
        super().__init__(raw=grant.proto != "http", passthrough=grant.proto == "tls")
        self.connection = connection
        # Said to the type checker, which comes here before it knows what these are.
        self.session: Session = connection.session
        self.bind = bind
        self.bind_bytes: bytes = f.U32.pack(bind)
        self.counters: Counters = counters
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
