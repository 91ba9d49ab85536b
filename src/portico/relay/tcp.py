"""TCP tunnels: a public port for each one that is live here, and the connections of its visitors.

    visitor ─► port ─► TcpPorts ─► TcpVisitor ──OPEN──► wire.Stream ─► agent ─► target
                                       ◄── bytes, END, RESET ──

A port is open exactly while its tunnel is live on this relay, and this relay alone has it (no SO_REUSEPORT): a port that
two processes held could take visitors to two tunnels. Both ends' half-close and reset are kept. A refused connection is
closed without a byte, with its reason in the log.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from typing import TYPE_CHECKING, Any, Final, cast

from portico.errors import Problem
from portico.kit.sockets import bind_tcp
from portico.relay.decide import decide
from portico.relay.door import Door
from portico.relay.exchange import RESET_CODES
from portico.relay.http1 import READ_SIZE, STALL_SECONDS, plain_address, reset_transport
from portico.wire import frames as f
from portico.wire.session import Stream

if TYPE_CHECKING:
    from portico.relay.listeners import PublicServer
    from portico.relay.sessions import Agents, LiveTunnel

log = logging.getLogger("portico.relay.tcp")

#: Seconds between two tries to open a port that somebody still has.
RETRY_SECONDS: Final = 0.01
#: Seconds between two log lines for one reason of one tunnel: a flood of refused visitors is one line with a count.
QUIET_SECONDS: Final = 5.0
#: Reasons remembered for that.
MAX_SAID: Final = 10_000
#: Bytes that may be read from a visitor without credit, so that a read is never of nothing.
MIN_READ: Final = 4096


class Port:
    """One open port and the tunnel behind it; ``live`` is ``None`` for the moment in which a connection of its agent takes
    over from another, and once the port is closed."""

    __slots__ = ("live", "number", "server", "sock", "tunnel")

    def __init__(self, number: int, live: LiveTunnel, sock: socket.socket) -> None:
        self.number = number
        self.tunnel = live.grant.tun
        self.live: LiveTunnel | None = live
        self.sock = sock
        self.server: asyncio.Server | None = None


class TcpPorts:
    """The open ports of this relay. All methods run on the loop.

    While the relay drains (``draining``) a port stays open until its agent gives it back, which it does when it has another
    connection, or until :meth:`close`; none is opened any more.
    """

    def __init__(self, public: PublicServer, agents: Agents) -> None:
        self.public = public
        self.agents = agents
        self.settings = agents.settings
        self.loop = public.loop
        self.open: dict[int, Port] = {}
        self._starting: set[asyncio.Task[None]] = set()
        self._said: dict[tuple[str, str], tuple[float, int]] = {}
        self.draining = False
        agents.listen = self.listen
        agents.on_dropped.append(self._dropped)
        agents.on_ended.append(self._ended)

    # ── ports ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def listen(self, live: LiveTunnel) -> bool:
        """Open the port of a tunnel that was just bound. ``False``: not yet; ``Agents`` hears once it is open, or will not
        be."""
        number = live.grant.port
        if (
            number is None or self.draining
        ):  # a grant that is renewed now: an open port stays, a closed one is another's
            return True
        for port in [p for p in self.open.values() if p.tunnel == live.grant.tun and p.number != number]:
            self._close(port)
        refusal = self._open(number, live)
        if refusal is not None:
            self._retry(number, live, self.loop.time() + self.settings.tcp_bind_seconds, refusal)
        return refusal is None

    def _retry(self, number: int, live: LiveTunnel, deadline: float, refusal: Problem) -> None:
        """Whoever has the port (a relay that just died or drains) may be letting it go: try until ``deadline``."""
        passing = refusal.code == "up.port_taken" and self.loop.time() < deadline and not self.draining
        self.loop.call_later(RETRY_SECONDS if passing else 0, self._again, number, live, deadline, passing, refusal)

    def _again(self, number: int, live: LiveTunnel, deadline: float, passing: bool, refusal: Problem) -> None:
        if self.agents.by_tunnel.get(live.grant.tun) is not live or live.grant.port != number:
            return
        found = self._open(number, live) if passing else refusal
        if found is None:
            self.agents.announce(live)
        elif passing:
            self._retry(number, live, deadline, found)
        else:
            detail = f"the relay cannot open the tunnel's port: {found.detail}"
            self.agents.refuse(live, Problem("tunnel.port_unavailable", detail))

    def _open(self, number: int, live: LiveTunnel) -> Problem | None:
        """Listen: from now on visitors queue, and are taken in when the loop gets to it. The reason if that is not possible."""
        port = self.open.get(number)
        if port is not None and port.tunnel == live.grant.tun:
            port.live = live
            return None
        if port is not None:
            return Problem("up.port_taken", f"port {number} is still open for another tunnel")
        limits = self.settings
        try:
            sock = bind_tcp(limits.tcp_host, number, what="TCP tunnel", backlog=limits.listen_backlog)
        except Problem as problem:
            return problem
        port = self.open[number] = Port(number, live, sock)
        task = self.loop.create_task(self._serve(port))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)
        return None

    async def _serve(self, port: Port) -> None:
        server = await self.loop.create_server(
            lambda: TcpVisitor(self, port), sock=port.sock, backlog=self.settings.listen_backlog
        )
        if self.open.get(port.number) is port:
            port.server = server
        else:  # closed meanwhile
            server.close()

    def _dropped(self, live: LiveTunnel) -> None:
        """The tunnel is not live here any more. The port closes at the end of this tick, unless the same tunnel was bound
        again meanwhile: a newer connection of its agent takes the port over with what waits in its queue."""
        port = self.open.get(live.grant.port or 0)
        if port is not None and port.live is live:
            port.live = None
            self.loop.call_soon(self._reap, port)

    def _reap(self, port: Port) -> None:
        if port.live is None:
            self._close(port)

    def _close(self, port: Port) -> None:
        """Close the port. What waits in its queue is reset; connections that were taken in go on."""
        if self.open.get(port.number) is port:
            del self.open[port.number]
            port.live = None
            if port.server is not None:
                port.server.close()

    def close(self) -> None:
        """The relay stops: no port is open any more."""
        for port in list(self.open.values()):
            self._close(port)

    def _ended(self, live: LiveTunnel, code: str) -> None:
        """The platform ended a tunnel (stop, deletion, suspension): its connections end with it."""
        for visitor in [v for v in self.public.connections if isinstance(v, TcpVisitor)]:
            if visitor.tunnel is not None and visitor.tunnel.grant.tun == live.grant.tun:
                visitor.end(code, "the platform ended the tunnel")

    # ── reasons ───────────────────────────────────────────────────────────────────────────────────────────────────
    def say(self, visitor: TcpVisitor, code: str, detail: str = "") -> None:
        """Log why a connection ended early: at once, then with a count every few seconds per tunnel and code."""
        self.public.refused(code)
        key = (visitor.port.tunnel, code)
        now = self.loop.time()
        at, unsaid = self._said.get(key, (-math.inf, 0))
        if now - at < QUIET_SECONDS:
            self._said[key] = (at, unsaid + 1)
            return
        if len(self._said) >= MAX_SAID:
            self._said.clear()
        self._said[key] = (now, 0)
        fields = {"tunnel": key[0], "port": visitor.port.number, "code": code, "visitor": visitor.address}
        more = {"detail": detail} if detail else {}
        log.warning("TCP connection ended", extra={"f": fields | more | ({"unsaid": unsaid} if unsaid else {})})


class TcpVisitor(asyncio.BufferedProtocol):
    """One visitor's connection: its socket on this side, the sink of its stream on the other. Also the facts of its
    decision (``tunnel``, ``door``, ``address`` …) and a guest of ``PublicServer`` (``address``, ``deadline``, ``drain`` …)."""

    NEVER: Final = math.inf
    host, standing, secure, certified = b"", "active", False, False
    __slots__ = (
        "address", "closed", "closing", "counted", "deadline", "door", "draining", "eof", "heard", "opened", "paused",
        "paused_at", "pending", "port", "ports", "reading", "server", "stream", "transport", "tunnel", "unconsumed",
        "unsent",
    )  # fmt: skip

    def __init__(self, ports: TcpPorts, port: Port) -> None:
        self.ports = ports
        self.port = port
        self.server = ports.public
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.tunnel: LiveTunnel | None = port.live
        self.door = Door(b"tcp", port.number)
        self.stream: Stream | None = None
        self.address = ""
        self.pending = b""
        self.unconsumed = self.unsent = 0
        self.deadline = self.heard = self.paused_at = 0.0
        self.closed = self.closing = self.counted = self.draining = self.eof = self.opened = self.paused = False
        self.reading = True

    # ── the visitor's side ────────────────────────────────────────────────────────────────────────────────────────
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.address = plain_address(peer)
        settings = self.server.settings
        self.deadline = self.server.now + settings.tcp_open_timeout_seconds
        live = self.tunnel
        code = "edge.too_many_connections" if not self.server.admit(self) else decide(self)
        if code is not None or live is None:
            self._refuse(code or "edge.tunnel_offline")
            return
        self.transport.set_write_buffer_limits(high=settings.visitor_write_buffer_bytes)
        info = {"peer": _place(peer), "local": _place(transport.get_extra_info("sockname"))}
        try:
            self.stream = live.open_tcp(info, self)
        except OverflowError:
            self._refuse("edge.agent_unreachable")
            return
        if live.rates is not None:
            live.rates.take(self.address, self.server.loop.time())
        live.inflight += 1
        self.counted = True
        live.counters.connections += 1

    def password(self) -> str:
        """No head, no password: not asked."""
        return "missing"

    def wait(self) -> float:
        """Seconds until the rates have room."""
        assert self.tunnel is not None
        assert self.tunnel.rates is not None
        return self.tunnel.rates.check(self.address, self.server.loop.time())

    def get_buffer(self, sizehint: int) -> memoryview:
        room = self.stream.sendable() if self.stream is not None else READ_SIZE
        if room >= READ_SIZE:
            return self.server.buffer_view
        return self.server.buffer[: room if room > MIN_READ else MIN_READ]

    def buffer_updated(self, nbytes: int) -> None:
        stream, live = self.stream, self.tunnel
        if stream is None or live is None:
            return
        self.heard = self.server.now
        room = stream.sendable()
        if self.pending or nbytes > room:
            self.pending += self.server.buffer[:nbytes]
            self._pump(stream, live)
            return
        live.counters.bytes_in += nbytes
        stream.send_data(self.server.buffer[:nbytes])
        if nbytes == room:
            self._hold(stream)

    def eof_received(self) -> bool:
        """A half-close: the target hears of it after all that came before; the way back stays open."""
        self.eof = True
        stream = self.stream
        if stream is None:
            return False
        if not self.pending:
            self._send_end(stream)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.server.leave(self)
        stream = self._let_go()
        if stream is not None:
            stream.reset(f.CANCELLED, "the visitor reset the connection" if exc else "the visitor's connection ended")

    def pause_writing(self) -> None:
        self.paused = True
        self.paused_at = self.server.now

    def resume_writing(self) -> None:
        self.paused = False
        size, self.unconsumed = self.unconsumed, 0
        stream = self.stream
        if stream is not None and size:
            if self.server.now - self.paused_at >= STALL_SECONDS:
                stream.stalled = True
            stream.consumed(size)

    # ── towards the agent ─────────────────────────────────────────────────────────────────────────────────────────
    def on_credit(self) -> None:
        if self.stream is not None and self.tunnel is not None:
            self._pump(self.stream, self.tunnel)

    def _pump(self, stream: Stream, live: LiveTunnel) -> None:
        """Send what waits, as far as there is credit; read on only when nothing does."""
        while self.pending:
            room = stream.sendable()
            if room <= 0:
                self._hold(stream)
                return
            part, self.pending = self.pending[:room], self.pending[room:]
            live.counters.bytes_in += len(part)
            stream.send_data(part)
        if self.eof:
            self._send_end(stream)
        elif stream.sendable() <= 0:
            self._hold(stream)
        elif not self.reading and not self.closed:
            self.reading = True
            self.transport.resume_reading()

    def _hold(self, stream: Stream) -> None:
        """Read nothing more until the agent gives credit."""
        if self.reading and not self.eof and not self.closed:
            self.reading = False
            self.transport.pause_reading()
        stream.wait()

    def _send_end(self, stream: Stream) -> None:
        stream.send_end()
        if stream.closed:
            self._close()

    # ── from the agent ────────────────────────────────────────────────────────────────────────────────────────────
    def on_opened(self) -> None:
        self.opened = True
        self.heard = self.server.now
        limit = self.server.settings.tcp_idle_timeout_seconds
        self.deadline = self.heard + limit if limit > 0 else self.NEVER

    def on_data(self, data: bytes, end: bool) -> None:
        stream, live = self.stream, self.tunnel
        if stream is None or live is None:
            return
        size = len(data)
        self.heard = self.server.now
        live.counters.bytes_out += size
        self.transport.write(data)
        if self.paused:
            self.unconsumed += size
        else:
            stream.consumed(size)
        if end:
            self.on_end([])

    def on_end(self, trailers: list[bytes]) -> None:
        """The target sends no more: a half-close, or the end when the visitor sends no more either."""
        stream = self.stream
        if stream is None or self.closed:
            return
        if stream.send_ended:
            self._close()
        else:
            self.transport.write_eof()

    def on_reset(self, code: int, detail: str) -> None:
        live = self.tunnel
        self._let_go()
        if self.closed or self.closing or live is None:
            return
        if not self.opened:
            live.counters.errors += 1
            self._refuse(RESET_CODES.get(code, "edge.agent_unreachable"), detail)
        elif code == f.NO_ERROR:
            self._close()
        else:
            if code != f.TARGET_RESET:
                live.counters.errors += 1
                self.ports.say(self, RESET_CODES.get(code, "edge.agent_unreachable"), detail)
            self._reset()

    def on_response(self, status: int, head: list[bytes], end: bool) -> None: ...
    def on_interim(self, status: int, head: list[bytes]) -> None: ...

    # ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _let_go(self) -> Stream | None:
        """The stream, which is not ours any more; its place in the tunnel is free."""
        stream, self.stream = self.stream, None
        self.pending = b""
        if self.counted and self.tunnel is not None:
            self.counted = False
            self.tunnel.inflight -= 1
        return stream

    def _refuse(self, code: str, detail: str = "") -> None:
        """Close without a byte."""
        self.ports.say(self, code, detail)
        self._close()

    def _close(self) -> None:
        """Close once the visitor took what is written; it has to go on taking it, else the sweep cuts it off."""
        self._let_go()
        if self.closed or self.closing:
            return
        self.closing = True
        self.unsent = self.transport.get_write_buffer_size()
        self.deadline = self.server.now + self.server.settings.close_timeout_seconds
        self.transport.close()

    def _reset(self) -> None:
        """End with RST, so that it does not look like a complete connection; after what was just written, if the visitor
        takes it at once."""
        self._let_go()
        if self.closed or self.closing:
            return
        self.closing = True
        self.deadline = self.server.now
        self.server.loop.call_soon(self._abort)

    def _abort(self) -> None:
        if not self.closed:
            self.closed = True
            reset_transport(self.transport)

    def end(self, code: str, detail: str) -> None:
        """End both ways for a reason of the platform's."""
        stream = self._let_go()
        if stream is not None:
            stream.reset(f.CANCELLED, detail)
        if not (self.closed or self.closing):
            self.ports.say(self, code, detail)
        self._reset()

    # ── as a guest of the server ──────────────────────────────────────────────────────────────────────────────────
    def expire(self) -> None:
        """The deadline passed (called by the server's sweep)."""
        now, limits = self.server.now, self.server.settings
        if self.closed:
            return
        if self.closing:
            unsent = self.transport.get_write_buffer_size()
            if unsent < self.unsent:
                self.unsent = unsent
                self.deadline = now + limits.close_timeout_seconds
            else:
                self._abort()
        elif not self.opened:
            stream, live = self._let_go(), self.tunnel
            if stream is not None and live is not None:
                stream.reset(f.CANCELLED, "the target was not reached in time")
                live.counters.errors += 1
            self._refuse("edge.target_timeout", "the target was not reached in time")
        elif now - self.heard < limits.tcp_idle_timeout_seconds:
            self.deadline = self.heard + limits.tcp_idle_timeout_seconds
        else:
            stream = self._let_go()
            if stream is not None:
                stream.reset(f.IDLE_TIMEOUT, "no data in either direction")
            self.end("edge.connection_idle", "no data in either direction")

    def drain(self) -> None:
        """The relay stops: a connection goes on, up to the drain limit."""
        self.draining = True

    def close_idle(self) -> None:
        """A connection that is silent is still one."""

    def cut_off(self) -> None:
        """The drain limit is over."""
        self.end("session.relay_draining", "the relay shuts down")
        self._abort()


def _place(name: Any) -> str:
    """``host:port`` of a socket's name, as OPEN carries it."""
    if not isinstance(name, tuple):
        return ""
    host = plain_address(name)
    return f"[{host}]:{name[1]}" if ":" in host else f"{host}:{name[1]}"
