"""The relay's listeners: visitors on the public ports, agents on the control port. Exposure is visible here and nowhere else.

The public ports answer visitors only: nothing of the relay's own (health, metrics) is served under a tenant's host name.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import picows

from portico.errors import Problem
from portico.kit.carrier import MAX_MESSAGE
from portico.kit.networks import is_loopback, network
from portico.relay import introduction, pages
from portico.relay.access_log import AccessLog
from portico.relay.agent_connection import LiveTunnel
from portico.relay.challenges import Challenges
from portico.relay.client_address import Networks
from portico.relay.credentials import Credentials, authorization
from portico.relay.door import Door
from portico.relay.exchange import Exchange
from portico.relay.heads import STATUS_LINES
from portico.relay.holding import Holding
from portico.relay.http1 import BULK_READ, HEAD_READ, READ_SIZE, Visitor, plain_address
from portico.relay.introduction import Introduction
from portico.relay.peers import Peers, RemoteTunnel
from portico.relay.proxied import ProxiedVisitor
from portico.relay.sessions import Agents
from portico.relay.snapshot import Snapshot
from portico.relay.tally import Tally
from portico.settings import RelaySettings
from portico.wire.frames import PROTOCOL

log = logging.getLogger("portico.relay.listeners")

SWEEP_SECONDS = 0.5
#: A sweep this late says that the process stood still.
STOOD_STILL_SECONDS = 1.5
#: Seconds between two log lines about proxies that do not do as they must.
QUIET_SECONDS = 30.0
#: Connections over a limit that are told so and given a moment to read it; those above this number are cut off unheard.
MAX_TURNED_AWAY = 1024
_REASONS = {
    408: b"Request Timeout",
    421: b"Misdirected Request",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
}


#: Fields of an answer of ours.
Headers = Sequence[tuple[bytes, bytes]]


#: The longest wait until a month's turn.
_MONTH_SECONDS = 31 * 86_400.0


class Guest(Protocol):
    """A visitor's connection, of whatever protocol, as the server counts and times it."""

    address: str
    deadline: float
    draining: bool
    transport: asyncio.Transport

    @property
    def door(self) -> Door:
        """What it came in by."""

    def expire(self) -> None:
        """Its deadline passed."""

    def drain(self) -> None:
        """The relay stops: finish what is under way."""

    def close_idle(self) -> None:
        """A moment later: end, unless something is under way."""

    def cut_off(self) -> None:
        """The time for that is over."""


class PublicServer:
    """What all visitor connections of a process share: the read buffer, the clock of deadlines, look-ups, counts."""

    def __init__(self, settings: RelaySettings, snapshot: Snapshot, agents: Agents, peers: Peers) -> None:
        self.settings = settings
        self.snapshot = snapshot
        self.challenges = Challenges(snapshot)
        self.agents = agents
        self.loop = asyncio.get_running_loop()
        self.buffer = memoryview(bytearray(BULK_READ))
        self.bulk_view, self.buffer_view = self.buffer[:], self.buffer[:READ_SIZE]
        self.head_view = self.buffer[:HEAD_READ]
        self.idle_seconds = settings.idle_timeout_seconds
        self.first_byte_seconds = settings.first_byte_timeout_seconds or math.inf
        self.tick(self.loop.time())
        self.connections: set[Guest] = set()
        self.returning = 0  # repeated requests of connections that had asked before
        self.turned_away: set[Guest] = set()
        self.refusals: Counter[str] = Counter()
        self.tally = Tally()
        self.seconds = 0.0  # that all requests of the short way took
        self.access: AccessLog | None = None  # where there is one, it is told of each request
        self._by_address: Counter[str] = Counter()
        self.by_host = agents.by_host
        self._remote = peers.by_host
        self._base = settings.base_domain.encode().lower()
        self._held: list[Visitor] = []
        self.trusted = Networks(settings.trusted_proxies, "trusted_proxies")
        self.introducing = Networks(settings.proxy_protocol_from, "proxy_protocol_from")
        self._say_at, self._unsaid = 0.0, 0
        self._draining = False
        self.holding = Holding(settings, snapshot, agents, peers)
        self.credentials = Credentials(settings, self.loop)
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)

    # ── connections ───────────────────────────────────────────────────────────────────────────────────────────────
    def admit(self, visitor: Guest) -> bool:
        """Count a connection in; ``False`` when its address or the process holds too many."""
        limits = self.settings
        address = network(visitor.address)
        if len(self.connections) >= limits.max_connections:
            return False
        if self._by_address[address] >= limits.connections_per_address and not self._exempt(visitor.address):
            return False
        self._by_address[address] += 1
        self.tally.accepted[visitor.door.scheme] += 1
        self.connections.add(visitor)
        visitor.draining = self._draining
        return True

    def _exempt(self, address: str) -> bool:
        """Whether an address may hold any number of connections: a proxy's are those of many clients."""
        by_setting = self.settings.exempt_loopback and is_loopback(address)
        return by_setting or address in self.trusted or address in self.introducing

    def protocol(self, door: Door, make: introduction.Make) -> Callable[[], asyncio.BufferedProtocol]:
        """What serves connections that come in by ``door``: ``make(door)``, once it is known who they are from."""
        if self.trusted or self.introducing:
            return lambda: Introduction(self, door, make)
        return lambda: make(door)

    def visitor(self, door: Door) -> Visitor:
        """Who serves HTTP on a connection that is over TLS, or from a client that its door does not name."""
        if door.client is not None and plain_address(door.client) in self.trusted:
            return ProxiedVisitor(self, door)
        return Visitor(self, door)

    def refuse_proxy(self, address: str, why: str) -> None:
        """Count a connection of a proxy without the header that it must have; now and then one is logged."""
        self.refused(introduction.INVALID)
        self._unsaid += 1
        if self.now >= self._say_at:
            fields = {"code": introduction.INVALID, "proxy": address, "why": why, "count": self._unsaid}
            log.warning("proxy did not introduce its visitor", extra={"f": fields})
            self._say_at, self._unsaid = self.now + QUIET_SECONDS, 0

    def turn_away(self, visitor: Visitor) -> bool:
        """Whether a connection that was not admitted may be answered; the sweep ends it when it stays."""
        if len(self.turned_away) >= MAX_TURNED_AWAY:
            return False
        self.turned_away.add(visitor)
        return True

    def leave(self, visitor: Guest) -> None:
        self.turned_away.discard(visitor)
        if visitor in self.connections:
            self.connections.remove(visitor)
            address = network(visitor.address)
            self._by_address[address] -= 1
            if self._by_address[address] <= 0:
                del self._by_address[address]

    def tick(self, now: float) -> None:
        """Take the time (of the loop), and with it the deadlines that begin now: of a visitor who may ask, and of an answer."""
        self.now = now
        self.idle_at = now + self.idle_seconds
        self.first_byte_at = now + self.first_byte_seconds

    def _sweep(self) -> None:
        before = self.now
        self.tick(self.loop.time())
        if self.now - before > STOOD_STILL_SECONDS:
            self.holding.stood_still()
        for visitors in (self.connections, self.turned_away):
            for visitor in [v for v in visitors if v.deadline < self.now]:
                visitor.expire()
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)

    def drain(self) -> None:
        """Every connection ends with its next answer, which says so."""
        self._draining = True
        for visitor in self.connections:
            visitor.drain()

    def close_idle(self) -> None:
        """Visitors that asked nothing since :meth:`drain` are not waited for. Not at once: a request that is on its way to a
        connection just closed would be lost."""
        for visitor in list(self.connections):
            visitor.close_idle()

    def close(self) -> int:
        """End what is left; how many connections were cut off."""
        left = [visitor for visitor in self.connections if not visitor.transport.is_closing()]
        for visitor in left:
            visitor.cut_off()
        for visitor in self.turned_away:
            visitor.transport.abort()
        self._sweeper.cancel()
        self.holding.close()
        self.credentials.close()
        return len(left)

    # ── batching ──────────────────────────────────────────────────────────────────────────────────────────────────
    def hold_back(self, visitor: Visitor) -> None:
        """``visitor.flush`` is called in this loop tick, after everything that arrived in it."""
        self._held.append(visitor)
        if len(self._held) == 1:
            self.loop.call_soon(self._flush_held)

    def _flush_held(self) -> None:
        held, self._held = self._held, []
        for visitor in held:
            if visitor.unwritten:
                visitor.flush()

    # ── look-ups and answers ──────────────────────────────────────────────────────────────────────────────────────
    def find(self, host: bytes) -> LiveTunnel | RemoteTunnel | None:
        """The live tunnel of a normalised host, here or on a peer; of a host that has none by itself, that of the wildcard
        right above it."""
        found = self.by_host.get(host) or self._remote.get(host)
        if found is None and self.snapshot.wildcards and (above := self.snapshot.above(host)) is not None:
            found = self.by_host.get(above) or self._remote.get(above)
        return found

    def valid_until(self, host: bytes) -> float | None:
        """Until when (unix seconds) a host may be served, by HTTPS alone; ``None``: there is no such rule."""
        domain = self.snapshot.domain_for_host(host.decode("ascii", "replace"))
        return None if domain is None else domain.valid_until

    def knows(self, host: bytes) -> bool:
        """Whether a normalised host is anybody's, live or not."""
        return self.find(host) is not None or self.standing(host) is not None

    def client_ca(self, host: bytes) -> tuple[str, str] | None:
        """Hash and PEM of the authority that visitors of a host should have a certificate of."""
        tunnel = self.find(host)
        if tunnel is None or tunnel.policy.client_ca is None or tunnel.policy.client_ca_pem is None:
            return None
        return tunnel.policy.client_ca, tunnel.policy.client_ca_pem

    def standing(self, host: bytes) -> str | None:
        """The state of the tunnel that the platform has for a normalised host, live or not; the code of its refusal when it is a
        domain that is served to nobody; ``None`` when it is nobody's."""
        text = host.decode("ascii", "replace")
        row = self.snapshot.tunnel_for_host(text)
        return row.state if row is not None else self.snapshot.closed(text)

    def password(self, tunnel: LiveTunnel | RemoteTunnel, fields: list[bytes], address: str) -> str:
        """What is known of a request's password: missing, valid, invalid, throttled, or need (see :meth:`judge`)."""
        users = tunnel.policy.users
        assert users is not None
        return self.credentials.look(users, authorization(fields), address, self.loop.time())

    def judge(
        self, tunnel: LiveTunnel | RemoteTunnel, fields: list[bytes], address: str, done: Callable[[], None]
    ) -> None:
        """Check a request's password off the loop; ``done`` is called when :meth:`password` knows more."""
        users, given = tunnel.policy.users, authorization(fields)
        assert users is not None
        assert given is not None
        self.credentials.verify(users, given, address, done)

    def refusal_fields(self, exchange: Exchange, code: str) -> Headers:
        """The header fields that a refusal of this request has beside its code's own."""
        tunnel = exchange.tunnel
        if tunnel is None:
            return ()
        policy = tunnel.policy
        if code in ("edge.auth_required", "edge.auth_invalid") and policy.users is not None:
            return (pages.challenge(policy.realm),)
        if code == "edge.https_redirect":
            port = self.settings.public_https_port or self.settings.https_port
            return (pages.location(exchange.host, port, exchange.target),)
        if code == "edge.quota_exceeded" and tunnel.barred is not None:
            return (pages.retry_after(min(tunnel.barred.until - time.time(), _MONTH_SECONDS)),)
        if code == "edge.rate_limited":
            return (pages.retry_after(exchange.wait()),)
        if code == "edge.auth_throttled":
            return (pages.retry_after(self.credentials.retry_after(exchange.address)),)
        return ()

    def wants_html(self, fields: Sequence[bytes]) -> bool:
        """Whether flat fields are a browser's, as far as they got."""
        accept = [fields[at + 1] for at in range(0, len(fields), 2) if fields[at].lower() == b"accept"]
        return pages.prefers_html(b",".join(accept))

    def unread(self, visitor: Visitor, ident: bytes, code: str, status: int) -> None:
        """A visitor was refused before there was a request, or for one that could not be read."""
        self.tally.refused[visitor.door.scheme][status // 100] += 1
        if self.access is not None:
            self.access.unread(visitor, ident, code, status)

    def refused(self, code: str) -> None:
        self.refusals[code] += 1

    def page(
        self,
        code: str,
        ident: bytes,
        *,
        html: bool,
        keep_alive: bool,
        head_only: bool = False,
        host: bytes = b"",
        detail: str | None = None,
        extra: Headers = (),
    ) -> bytes:
        """A whole refusal (``extra``: see ``pages.refusal``), or the landing page of the base domain where nothing else is."""
        if code == "edge.host_unassigned" and host == self._base:
            status, fields, body = pages.landing(self.settings.base_domain, html=html)
        else:
            name = host.decode("ascii", "replace") or None
            status, fields, body = pages.refusal(
                code, request_id=ident.decode(), html=html, detail=detail, host=name, extra=extra
            )
        out = [STATUS_LINES[status, _REASONS.get(status) or _reason(status)]]
        out += [b"%b: %b\r\n" % field for field in fields]
        if not keep_alive:
            out.append(b"Connection: close\r\n")
        out.append(b"\r\n")
        if not head_only:
            out.append(body)
        return b"".join(out)


def _reason(status: int) -> bytes:
    from http import HTTPStatus

    return HTTPStatus(status).phrase.encode()


async def serve_public(public: PublicServer, sock: socket.socket, backlog: int) -> asyncio.Server:
    """Visitors on ``sock``, in clear text; those with TLS come by ``tls_port.py``."""
    name = sock.getsockname()
    door = Door(b"http", name[1] if isinstance(name, tuple) else 0)
    return await public.loop.create_server(public.protocol(door, public.visitor), sock=sock, backlog=backlog)


def _answer(status: int, body: bytes, kind: str) -> picows.WSUpgradeResponseWithListener:
    headers = {"Content-Type": kind, "Cache-Control": "no-store"}
    if status == 200:
        return picows.WSUpgradeResponseWithListener(picows.WSUpgradeResponse.create_ok_response(body, headers), None)
    response = picows.WSUpgradeResponse.create_error_response(status, body, headers)
    return picows.WSUpgradeResponseWithListener(response, None)


def _refusal(problem: Problem) -> picows.WSUpgradeResponseWithListener:
    return _answer(problem.status, problem.json(), "application/problem+json")


class ControlListener:
    """Answers the control port: ``/v1/connect`` upgrades an agent, ``/v1/peer`` another relay, ``/healthz`` and
    ``/readyz`` say how the relay is."""

    def __init__(self, agents: Agents, peers: Peers) -> None:
        self.agents = agents
        self.peers = peers
        self.refusals: Counter[str] = Counter()
        #: Whether the certificates that should serve do.
        self.caught_up: Callable[[], bool] = lambda: True

    def __call__(self, request: Any) -> Any:
        path = request.path.split(b"?", 1)[0]
        if path == b"/healthz":
            return _answer(200, b"ok\n", "text/plain")
        if path == b"/readyz":
            ready = self.ready()
            return _answer(200 if ready else 503, b"ready\n" if ready else b"not ready\n", "text/plain")
        if path not in (b"/v1/connect", b"/v1/peer"):
            return None
        try:
            return self._connect(request, peer=path == b"/v1/peer")
        except Problem as problem:
            self.refusals[problem.code] += 1
            log.info("agent refused", extra={"f": {"code": problem.code, "detail": problem.detail}})
            return _refusal(problem)

    def ready(self) -> bool:
        """Whether visitors and agents should come here."""
        return self.agents.snapshot.version is not None and not self.agents.draining and self.caught_up()

    def _connect(self, request: Any, *, peer: bool) -> Any:
        offered = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        if PROTOCOL not in offered:
            raise Problem("wire.version_unsupported", f"the agent offers no WebSocket subprotocol {PROTOCOL}")
        authorization = request.headers.get("Authorization")
        connection = self._peer(authorization) if peer else self.agents.connect(authorization)
        response = picows.WSUpgradeResponse.create_101_response({"Sec-WebSocket-Protocol": PROTOCOL})
        return picows.WSUpgradeResponseWithListener(response, connection.carrier)

    def _peer(self, authorization: str | None) -> Any:
        """Another relay, by the shared key; without a key set nobody is one."""
        key = self.agents.settings.peer_key
        given = (authorization or "").removeprefix("Bearer ").encode(errors="replace")
        if key is None or not hmac.compare_digest(given, key.reveal().encode()):
            raise Problem("session.token_invalid", "the Authorization header carries no key of a peer relay")
        return self.peers.accept()


async def serve_control(
    control: ControlListener, sock: socket.socket, context: ssl.SSLContext | None, backlog: int
) -> asyncio.Server:
    """Agents on ``sock``, with TLS if there is a context."""
    seconds = control.agents.settings.hello_timeout_seconds
    return await picows.ws_create_server(
        control,
        sock=sock,
        ssl=context,
        ssl_handshake_timeout=seconds if context is not None else None,
        backlog=backlog,
        websocket_handshake_timeout=seconds,
        max_frame_size=MAX_MESSAGE,
        enable_auto_pong=False,  # the carrier answers
    )
