"""Relays of one region behind one public address: a request that lands on the wrong relay takes one hop to the right one.

    visitor ─► relay A ──REQUEST on a peer link──► relay B ──► agent

Every relay connects to each of its peers' control ports (``/v1/peer``, a shared key) and announces there the tunnels that
are live on it, in the agents' own protocol: towards its peers a relay is an agent with many tunnels. So a relay knows
from its links alone who owns a host, also while the control plane and Redis are away. Only live tunnels are announced
and only live tunnels are served to a peer, so there is never a second hop. The owner counts usage and concurrency.

A TCP port is open at its owner alone. When an agent is back on another relay before the old one has missed it, the
announcement makes the old one let go.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import ssl
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import picows

from portico.errors import Problem
from portico.kit.carrier import MAX_MESSAGE, Carrier
from portico.relay.agent_connection import LiveTunnel, new_session
from portico.relay.control_link import Backoff
from portico.relay.meter import Counters
from portico.relay.policy import Governed, PolicyInvalid
from portico.relay.sessions import Agents
from portico.relay.snapshot import Change
from portico.relay.telling import Told, heard
from portico.settings import RelaySettings
from portico.wire import frames as f
from portico.wire.counts import Counts
from portico.wire.session import Session
from portico.wire.stream import IGNORE, Sink, Stream

if TYPE_CHECKING:
    from portico.relay.rates import TunnelRates

log = logging.getLogger("portico.relay.peers")

CONNECT_SECONDS = 5.0
RETRY_MIN_SECONDS = 0.1
RETRY_MAX_SECONDS = 0.5
#: Seconds for which a tunnel that was withdrawn still answers a peer's requests that were on their way.
CROSSING_SECONDS = 5.0
#: Why a tunnel is withdrawn: it went elsewhere or ended, or its agent was lost and may be back in a moment.
GONE, LOST = "tunnel.moved", "tunnel.lost"


class RemoteTunnel(Governed):
    """A tunnel that is live on a peer; what a decision and an exchange need of one. Where the visitor came in is decided on;
    the owner counts."""

    __slots__ = ("bind", "bind_bytes", "counters", "hosts", "organization", "plan", "session", "told", "tunnel")

    def __init__(self, session: Session, bind: int, announced: Mapping[str, Any]) -> None:
        """Raises ``PolicyInvalid``: what this relay cannot enforce it does not pass on."""
        super().__init__(raw=announced["proto"] != "http", passthrough=announced["proto"] == "tls")
        self.session = session
        self.bind = bind
        self.bind_bytes = f.U32.pack(bind)
        self.tunnel = str(announced["tunnel"])
        self.organization = str(announced["organization"])
        self.hosts = tuple(str(host).encode() for host in announced["hosts"])
        self.plan = {str(name): int(limit) for name, limit in announced["limits"].items()}
        self.allowance = int(announced["concurrency"])
        self.counters = Counters("", "")  # of refusals, of which the owner hears
        self.told = Told(self.counters)
        self.govern(int(announced["policy_version"]), _unpacked(announced["policy"]))

    def limits(self) -> Mapping[str, int]:
        """The limits of the plan."""
        return self.plan

    @property
    def reachable(self) -> bool:
        return not self.session.closed and len(self.session.streams) < self.session.max_streams

    def open_tcp(self, info: dict[str, Any], sink: Sink) -> Stream:
        """A new raw stream; raises ``OverflowError`` at a limit."""
        return self.session.open_tcp(self.bind, info, sink)


class _Quiet:
    """Session events that a peer link does not use."""

    def on_bound(self, bind: int, tunnel: str, name: str, url: str) -> None: ...
    def on_refused(self, bind: int, code: str, detail: str, retryable: bool) -> None: ...
    def on_auth(self, token: str) -> None: ...
    def on_authed(self, body: dict[str, Any]) -> None: ...
    def on_goaway(self, code: str, detail: str, retry_after_ms: int) -> None: ...
    def on_error(self, code: str, detail: str, retryable: bool) -> None: ...
    def on_counts(self, bind: int, counts: Counts) -> None: ...
    def on_open(self, stream: Stream, bind: int, info: dict[str, Any]) -> Sink | None:
        stream.reset(f.NO_SUCH_BIND)
        return None


class Inbound(_Quiet):
    """A peer that connected to us: its announcements fill the remote table, our requests go to it."""

    def __init__(self, peers: Peers) -> None:
        limits = peers.settings
        self.peers = peers
        self.tunnels: dict[int, RemoteTunnel] = {}
        self.session = new_session(self, limits, relay=True)
        self.carrier = Carrier(
            self.session,
            ping_interval=limits.ping_interval_seconds,
            ping_timeout=limits.ping_timeout_seconds,
            on_lost=self._lost,
            on_open=lambda: peers.inbound.add(self),
        )

    def on_hello(self, body: dict[str, Any]) -> None:
        limits = self.peers.settings
        self.session.control(
            f.HELLO,
            0,
            version=f.VERSION,
            relay=limits.relay_name,
            session="peer",
            ping_interval_ms=int(limits.ping_interval_seconds * 1000),
            ping_timeout_ms=int(limits.ping_timeout_seconds * 1000),
        )

    def on_bind(self, bind: int, grant: str) -> None:
        """An announcement: hosts and concurrency of a tunnel that is live on the peer, and by which connection."""
        self.on_unbind(bind, "", "")
        announced = json.loads(grant)
        self.peers.agents.moved(announced["tunnel"], announced["session"], (announced["gen"], announced["connect"]))
        try:
            remote = RemoteTunnel(self.session, bind, announced)
        except PolicyInvalid as err:
            fields = {"tunnel": announced["tunnel"], "why": str(err)}
            log.error("a peer's tunnel has a policy that this relay cannot read", extra={"f": fields})
            return
        remote.bar(self.peers.agents.snapshot.organization(remote.organization))
        remote.strict = self.peers.strict(remote.tunnel)
        remote.settle(self.peers.rates_of(remote))
        self.tunnels[bind] = remote
        self.peers.add(remote)

    def on_unbind(self, bind: int, code: str, detail: str) -> None:
        remote = self.tunnels.pop(bind, None)
        if remote is not None:
            self.peers.remove(remote, expected=code == LOST)

    def on_pong(self, payload: bytes) -> None:
        self.carrier.note_pong(payload)

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> None:
        """Not sent to the side that asks (the session refuses it)."""

    def _lost(self, detail: str) -> None:
        self.peers.inbound.discard(self)
        for bind in list(self.tunnels):
            self.on_unbind(bind, LOST, "")


class Outbound(_Quiet):
    """Our link to one peer: announces what is live here and serves what the peer asks for."""

    def __init__(self, peers: Peers, url: str) -> None:
        limits = peers.settings
        self.peers = peers
        self.url = url
        self.binds: dict[LiveTunnel, int] = {}
        self.by_bind: dict[int, LiveTunnel] = {}
        self.lost = asyncio.Event()
        self.over = asyncio.Event()  # lost, or the peer asked for another link
        self.greeted = asyncio.Event()
        self._serial = 0
        self.session = new_session(self, limits, relay=False)
        self.carrier = Carrier(
            self.session,
            ping_interval=limits.ping_interval_seconds,
            ping_timeout=limits.ping_timeout_seconds,
            on_lost=self._lost,
        )

    def _lost(self, detail: str) -> None:
        self.peers.outbound.discard(self)
        self.lost.set()
        self.over.set()

    async def open(self, key: str) -> None:
        """Connect and announce; raises ``OSError``, ``TimeoutError`` or ``picows.WSError``."""
        async with asyncio.timeout(CONNECT_SECONDS):
            await picows.ws_connect(
                lambda: self.carrier,
                self.url,
                websocket_handshake_timeout=CONNECT_SECONDS,
                max_frame_size=MAX_MESSAGE,
                enable_auto_pong=False,
                max_redirects=0,
                ssl_context=self.peers.trust if self.url.startswith("wss:") else None,
                extra_headers={"Authorization": f"Bearer {key}", "Sec-WebSocket-Protocol": f.PROTOCOL},
            )
            name = self.peers.settings.relay_name
            self.session.control(f.HELLO, 0, versions=[f.VERSION], agent=name, connect=1, counts=True)
            for live in self.peers.agents.by_tunnel.values():
                self.announce(live)
            await self.greeted.wait()

    def announce(self, live: LiveTunnel) -> None:
        """Tell the peer of a tunnel, or of its new grant."""
        bind = self.binds.get(live)
        if bind is None:
            self._serial += 1
            bind = self.binds[live] = self._serial
            self.by_bind[bind] = live
        generation, connect = live.connection.order
        announced = {
            "hosts": [host.decode() for host in live.hosts],
            "concurrency": live.allowance,
            "limits": dict(live.grant.limits),
            "proto": live.grant.proto,
            "organization": live.grant.org,
            "policy_version": live.policy_version,
            "policy": _packed(live.document),
            "tunnel": live.grant.tun,
            "session": live.connection.claims.sid,
            "gen": generation,
            "connect": connect,
        }
        try:
            self.session.control(f.BIND, bind, grant=json.dumps(announced))
        except ValueError as err:  # too large for a frame: this one is not to be had by the peer, all others are
            log.error("a tunnel cannot be announced", extra={"f": {"tunnel": live.grant.tun, "why": str(err)}})

    def withdraw(self, live: LiveTunnel) -> None:
        bind = self.binds.pop(live, None)
        if bind is not None:
            self.session.control(f.UNBIND, bind, code=LOST if live.returning else GONE, detail="")
            asyncio.get_running_loop().call_later(CROSSING_SECONDS, self.by_bind.pop, bind, None)

    def on_goaway(self, code: str, detail: str, retry_after_ms: int) -> None:
        """The peer drains: its successor is to hear of our tunnels too; this link serves until the peer closes it."""
        self.over.set()

    def on_hello(self, body: dict[str, Any]) -> None:
        self.greeted.set()

    def on_bind(self, bind: int, grant: str) -> None:
        """Not sent to the side that announces (the session refuses it)."""

    def on_unbind(self, bind: int, code: str, detail: str) -> None:
        """A peer cannot end a tunnel of ours."""

    def on_counts(self, bind: int, counts: Counts) -> None:
        """The peer refused visitors of a tunnel of ours."""
        live = self.by_bind.get(bind)
        if live is not None:
            heard(live.counters, counts)

    def on_pong(self, payload: bytes) -> None:
        self.carrier.note_pong(payload)

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> Sink | None:
        """A visitor's request from the peer: on to the agent, if the tunnel is live here and has room."""
        live = self._with_room(stream, bind)
        if live is None:
            return None
        try:
            hop = Hop(self.peers, stream, live, live.open(head, flags, IGNORE))
        except (ValueError, OverflowError):
            stream.reset(f.TOO_MANY_STREAMS, "the agent's session takes no more")
            return None
        live.counters.requests += 1
        return hop.asking

    def on_open(self, stream: Stream, bind: int, info: dict[str, Any]) -> Sink | None:
        """A visitor's connection from the peer, likewise."""
        live = self._with_room(stream, bind)
        if live is None:
            return None
        try:
            hop = Hop(self.peers, stream, live, live.open_tcp(_passed_on(info), IGNORE))
        except OverflowError:
            stream.reset(f.TOO_MANY_STREAMS, "the agent's session takes no more")
            return None
        live.counters.connections += 1
        self.peers.raw_hops.add(hop)
        return hop.asking

    def _with_room(self, stream: Stream, bind: int) -> LiveTunnel | None:
        """The tunnel that a peer asks for; ``None`` after the refusal."""
        live = self.by_bind.get(bind)
        if live is None or not live.reachable:
            stream.reset(f.NO_SUCH_BIND, "the tunnel is not live on this relay")
            return None
        if live.inflight >= live.concurrency or (live.line is not None and live.line.closed):
            stream.reset(f.TOO_MANY_STREAMS, "the tunnel has no room")
            return None
        if live.rates is not None and (wait := live.rates.check(None, self.peers.clock())) > 0:
            stream.reset(f.RATE_LIMITED, f"{wait:.3f}")
            return None
        return live


class Hop:
    """One request or connection that passes through this relay: two streams, each end's credit given as the other takes
    the bytes."""

    def __init__(self, peers: Peers, incoming: Stream, live: LiveTunnel, outgoing: Stream) -> None:
        self.peers = peers
        self.live = live
        self.answering = _Side(self, outgoing)
        self.asking = _Side(self, incoming)  # the peer's stream: request bytes come from it
        live.inflight += 1
        if live.rates is not None:
            live.rates.take(None, peers.clock())
        self.counted = True
        incoming.sink = self.asking
        self.answering.stream.sink = self.answering
        self.asking.other, self.answering.other = self.answering, self.asking

    def over(self) -> None:
        if self.counted:
            self.counted = False
            self.live.inflight -= 1
            if self.live.line is not None:
                self.live.line.freed()
            self.peers.raw_hops.discard(self)

    def end(self, detail: str) -> None:
        """End both streams at once."""
        self.over()
        self.asking.stream.reset(f.CANCELLED, detail)
        self.answering.stream.reset(f.CANCELLED, detail)


class _Side:
    """One of the two streams of a hop: what it hears goes to the other."""

    other: _Side

    def __init__(self, hop: Hop, stream: Stream) -> None:
        self.hop = hop
        self.stream = stream
        self.waiting: list[bytes] = []
        self.ending: list[bytes] | None = None

    def on_response(self, status: int, head: list[bytes], end: bool) -> None:
        self.other.stream.send_response(status, head, end)
        if end:
            self._check_over()

    def on_interim(self, status: int, head: list[bytes]) -> None:
        self.other.stream.send_interim(status, head)

    def on_opened(self) -> None:
        self.other.stream.send_opened()

    def on_data(self, data: bytes, end: bool) -> None:
        counters = self.hop.live.counters
        if self is self.hop.asking:
            counters.bytes_in += len(data)
        else:
            counters.bytes_out += len(data)
        self.other.waiting.append(data)
        if end:
            self.other.ending = []
        self.other.pump()

    def on_end(self, trailers: list[bytes]) -> None:
        self.other.ending = trailers
        self.other.pump()

    def on_credit(self) -> None:
        self.pump()

    def pump(self) -> None:
        """Send what waits for this stream; what was sent is what the other stream's sender may send again."""
        waiting = self.waiting
        while waiting and (room := self.stream.sendable()):
            data = waiting[0]
            if len(data) > room:
                waiting[0] = data[room:]
                data = data[:room]
            else:
                waiting.pop(0)
            self.stream.send_data(data)
            self.other.stream.consumed(len(data))
        if waiting:
            self.stream.wait()
        elif self.ending is not None:
            trailers, self.ending = self.ending, None
            self.stream.send_end(trailers)
            self._check_over()

    def on_reset(self, code: int, detail: str) -> None:
        self.other.stream.reset(code, detail)
        self.hop.over()

    def _check_over(self) -> None:
        if self.hop.asking.stream.closed or self.hop.answering.stream.closed:
            self.hop.over()


def _packed(policy: Mapping[str, Any]) -> str:
    """A policy as an announcement has it. As JSON within JSON within JSON, one of quotes alone would be twice as long, and
    too long for a frame."""
    return base64.b64encode(json.dumps(policy, separators=(",", ":")).encode()).decode() if policy else ""


def _unpacked(packed: str) -> dict[str, Any]:
    policy: dict[str, Any] = json.loads(base64.b64decode(packed)) if packed else {}
    return policy


def _trust(settings: RelaySettings) -> ssl.SSLContext:
    """What peers that are reached with TLS must have a certificate of; raises ``config.invalid``."""
    try:
        return ssl.create_default_context(cafile=settings.peer_ca_file)
    except OSError as err:  # ssl.SSLError, for a file without certificates, is one too
        why = "holds no certificate" if isinstance(err, ssl.SSLError) else err.strerror
        raise Problem(
            "config.invalid", f"setting peer_ca_file: {settings.peer_ca_file} {why}", key="peer_ca_file"
        ) from None


def _passed_on(info: dict[str, Any]) -> dict[str, Any]:
    """What an agent is told of a connection: the members of OPEN that are known here."""
    return {name: info[name] for name in ("peer", "local", "id") if name in info}


class Peers:
    """All links of a relay. ``by_host`` is what :meth:`listeners.PublicServer.find` asks after the local table."""

    def __init__(self, settings: RelaySettings, agents: Agents) -> None:
        self.settings = settings
        self.agents = agents
        self.clock = asyncio.get_running_loop().time
        self.by_host: dict[bytes, RemoteTunnel] = {}
        self._places: dict[bytes, list[RemoteTunnel]] = {}
        self.inbound: set[Inbound] = set()
        self.outbound: set[Outbound] = set()
        #: Connections of peers' visitors to tunnels that are live here: they have no end of their own.
        self.raw_hops: set[Hop] = set()
        #: Called with the hosts of a tunnel that a peer announced.
        self.on_bound: list[Callable[[tuple[bytes, ...]], None]] = []
        #: The rates that a tunnel's policy and plan set.
        self.rates_of: Callable[[RemoteTunnel], TunnelRates | None] = lambda remote: None
        self.trust = _trust(settings) if any(url.startswith("wss:") for url in settings.peers) else None
        agents.on_bound.append(self._bound)
        agents.on_governed.append(self._bound)
        agents.on_dropped.append(self._dropped)
        agents.on_ended.append(self._ended)
        agents.snapshot.on_change(self._on_change)

    def accept(self) -> Inbound:
        """A peer passed the key check; it is one of ``inbound`` once its WebSocket is open."""
        return Inbound(self)

    def add(self, remote: RemoteTunnel) -> None:
        """A peer announced it; of several places of a host (a tunnel that moves) the latest is asked."""
        for host in remote.hosts:
            self._places.setdefault(host, []).append(remote)
            self.by_host[host] = remote
        for callback in self.on_bound:
            callback(remote.hosts)

    def remove(self, remote: RemoteTunnel, *, expected: bool) -> None:
        """It is not there any more; ``expected``: perhaps it is back in a moment, there or elsewhere."""
        for host in remote.hosts:
            places = self._places[host]
            places.remove(remote)
            if places:
                self.by_host[host] = places[-1]
                continue
            del self._places[host], self.by_host[host]
            if expected and host not in self.agents.by_host:
                self.agents.expect((host,))
        if remote.line is not None:
            remote.line.dissolve()

    def _on_change(self, change: Change) -> None:
        """The standing of an organization changed: visitors of its tunnels on peers are decided on here."""
        if change.kind == "domain":
            for remote in {remote for places in self._places.values() for remote in places}:
                if remote.tunnel in change.tunnels:
                    remote.strict = self.strict(remote.tunnel)
                    remote.settle(self.rates_of(remote))
            return
        if change.kind != "organization":
            return
        row = self.agents.snapshot.organization(change.id)
        for remote in [remote for places in self._places.values() for remote in places]:
            if remote.organization == change.id:
                remote.bar(row)
                remote.settle(self.rates_of(remote))

    def strict(self, tunnel: str) -> bool:
        """Whether a domain that is served by HTTPS with a good certificate alone leads to a tunnel."""
        return any(domain.valid_until is not None for domain in self.agents.snapshot.domains_of(tunnel))

    def hops(self) -> int:
        """Requests of peers under way."""
        return sum(len(link.session.streams) for link in self.outbound)

    def go_away(self) -> None:
        """Ask every peer for a link to whoever follows us; the present one serves until :meth:`close`."""
        for peer in self.inbound:
            peer.session.control(
                f.GOAWAY, 0, code="session.relay_draining", detail="the relay is shutting down", retry_after_ms=0
            )

    def withdraw_all(self) -> None:
        """Our tunnels are served elsewhere, or not at all: peers send us nothing more."""
        for link in self.outbound:
            for live in list(link.binds):
                link.withdraw(live)

    def _bound(self, live: LiveTunnel) -> None:
        for link in self.outbound:
            link.announce(live)

    def _dropped(self, live: LiveTunnel) -> None:
        for link in self.outbound:
            link.withdraw(live)

    def _ended(self, live: LiveTunnel, code: str) -> None:
        """The platform ended a tunnel: its connections end, also those that came in by a peer."""
        for hop in [hop for hop in self.raw_hops if hop.live.tunnel == live.tunnel]:
            hop.end(f"the platform ended the tunnel ({code})")

    async def run(self) -> None:
        """Keep a link to every peer until cancelled."""
        if self.settings.peer_key is None:
            return
        async with asyncio.TaskGroup() as group:
            for url in self.settings.peers:
                group.create_task(self._keep(url, self.settings.peer_key.reveal()))

    async def _keep(self, url: str, key: str) -> None:
        reported = False
        backoff = Backoff(RETRY_MIN_SECONDS, RETRY_MAX_SECONDS)
        while True:
            link = Outbound(self, url)
            try:
                await link.open(key)
            except (OSError, TimeoutError, picows.WSError) as err:
                if not reported:
                    log.info("peer is out of reach", extra={"f": {"peer": url, "why": str(err) or type(err).__name__}})
                    reported = True
                link.carrier.abort("no link")
                await asyncio.sleep(backoff.next())
                continue
            # What was bound while the link opened was announced by nobody yet.
            if not link.lost.is_set():
                self.outbound.add(link)
            for live in list(self.agents.by_tunnel.values()):
                if live not in link.binds:
                    link.announce(live)
            reported = False
            backoff.reset()
            log.info("peer link is up", extra={"f": {"peer": url}})
            await link.over.wait()
            log.info("peer link is down" if link.lost.is_set() else "peer drains", extra={"f": {"peer": url}})

    def close(self) -> None:
        for peer in list(self.inbound):
            peer.carrier.abort("relay shut down")
        for link in list(self.outbound):
            link.carrier.abort("relay shut down")
