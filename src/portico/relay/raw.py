"""Connections that are bytes both ways: what visitors of TCP tunnels and of TLS tunnels that pass through have in common.

    visitor ─► RawVisitor ──OPEN──► wire.Stream ─► agent (perhaps behind a peer) ─► target
                   ◄── bytes, END, RESET ──

Both ends' half-close and reset are kept, credit stops whoever is too fast, and an idle limit ends what nobody uses. The reason
of an early end is in the log.
"""

from __future__ import annotations

import asyncio
import logging
import math
from time import monotonic as clock
from typing import TYPE_CHECKING, Any, Final, cast

from portico.kit.sockets import end_output, reset_transport
from portico.relay.decide import decide
from portico.relay.door import Door
from portico.relay.exchange import ANSWERED, BROKEN, REFUSED, RESET_CODES, request_id
from portico.relay.http1 import READ_SIZE, STALL_SECONDS, plain_address
from portico.relay.telling import is_news
from portico.wire import frames as f
from portico.wire.stream import Stream

if TYPE_CHECKING:
    from portico.relay.agent_connection import LiveTunnel
    from portico.relay.listeners import PublicServer
    from portico.relay.peers import RemoteTunnel
    from portico.relay.sessions import Agents

log = logging.getLogger("portico.relay.raw")

#: Seconds between two log lines for one reason of one tunnel: a flood of refused visitors is one line with a count.
QUIET_SECONDS: Final = 5.0
#: Reasons remembered for that.
MAX_SAID: Final = 10_000
#: Bytes that may be read from a visitor without credit, so that a read is never of nothing.
MIN_READ: Final = 4096


class RawServer:
    """What all raw connections of a process share."""

    def __init__(self, public: PublicServer, agents: Agents) -> None:
        self.public = public
        self.loop = public.loop
        self._said: dict[tuple[str, str], tuple[float, int]] = {}
        agents.on_ended.append(self._ended)

    def _ended(self, live: LiveTunnel, code: str) -> None:
        """The platform ended a tunnel (stop, deletion, suspension): its connections end with it."""
        for visitor in [v for v in self.public.connections if isinstance(v, RawVisitor)]:
            if visitor.tunnel is not None and visitor.tunnel.tunnel == live.tunnel:
                visitor.end(code, "the platform ended the tunnel")

    def say(self, visitor: RawVisitor, code: str, detail: str = "") -> None:
        """Log why a connection ended early: at once, then with a count every few seconds per tunnel and code."""
        self.public.refused(code)
        visitor.code = code
        if visitor.tunnel is not None and not visitor.opened and is_news(code):
            visitor.tunnel.counters.refuse(code)
        place = visitor.place()
        key = (place["tunnel"], code)
        now = self.loop.time()
        at, unsaid = self._said.get(key, (-math.inf, 0))
        if now - at < QUIET_SECONDS:
            self._said[key] = (at, unsaid + 1)
            return
        if len(self._said) >= MAX_SAID:
            self._said.clear()
        self._said[key] = (now, 0)
        fields = {**place, "code": code, "visitor": visitor.address, "request": visitor.id.decode()}
        more = {"detail": detail} if detail else {}
        what = visitor.door.scheme.decode().upper()
        log.warning("%s connection ended", what, extra={"f": fields | more | ({"unsaid": unsaid} if unsaid else {})})


class RawVisitor(asyncio.BufferedProtocol):
    """One visitor's connection: its socket on this side, the sink of its stream on the other. Also the facts of its
    decision (``tunnel``, ``door``, ``address`` …) and a guest of ``PublicServer`` (``address``, ``deadline``, ``drain`` …)."""

    NEVER: Final = math.inf
    secure = certified = False
    valid_until: float | None = None
    host = b""
    __slots__ = (
        "address", "began", "closed", "closing", "code", "counted", "deadline", "door", "draining", "eof", "got", "heard", "id",
        "opened", "paused", "paused_at", "pending", "raw", "reading", "sent", "server", "stream", "transport", "tunnel",
        "unconsumed", "unsent",
    )  # fmt: skip

    def __init__(self, raw: RawServer, door: Door, tunnel: LiveTunnel | RemoteTunnel | None) -> None:
        self.raw = raw
        self.server = raw.public
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.tunnel = tunnel
        self.door = door
        self.stream: Stream | None = None
        self.address = ""
        self.id = request_id()
        self.code: str | None = None  # why it ended early
        self.began = clock()
        self.got = self.sent = 0  # bytes from the visitor, and to it
        self.pending = b""
        self.unconsumed = self.unsent = 0
        self.deadline = self.heard = self.paused_at = 0.0
        self.closed = self.closing = self.counted = self.draining = self.eof = self.opened = self.paused = False
        self.reading = True

    # ── the visitor's side ────────────────────────────────────────────────────────────────────────────────────────
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.address = plain_address(self.peer())
        settings = self.server.settings
        self.transport.set_write_buffer_limits(high=settings.visitor_write_buffer_bytes)
        self.deadline = self.server.now + settings.tcp_open_timeout_seconds
        if self.server.admit(self):
            self.begin()
        else:
            self.refuse("edge.too_many_connections")

    def begin(self) -> None:
        """Decide, and open the stream."""
        live = self.tunnel
        code = decide(self)
        if code is not None or live is None:
            self.refuse(code or "edge.tunnel_offline")
            return
        info = {
            "peer": _place(self.peer()),
            "local": _place(self.door.local or self.transport.get_extra_info("sockname")),
            "id": self.id.decode(),
        }
        try:
            self.stream = live.open_tcp(info, self)
        except OverflowError:
            self.refuse("edge.agent_unreachable")
            return
        if live.rates is not None:
            live.rates.take(self.address, self.server.loop.time())
        live.inflight += 1
        self.counted = True
        live.counters.connections += 1

    def peer(self) -> Any:
        """The visitor's address, as sockets have it."""
        return self.door.client or self.transport.get_extra_info("peername")

    def place(self) -> dict[str, Any]:
        """What it came to, for the log."""
        raise NotImplementedError

    @property
    def standing(self) -> str | None:
        """The state of its tunnel by the platform; a tunnel that is live is active."""
        return "active"

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
            if not self.closing:  # it waits for its tunnel
                self.pending += self.server.buffer[:nbytes]
                self._pause()
            return
        self.heard = self.server.now
        room = stream.sendable()
        if self.pending or nbytes > room:
            self.pending += self.server.buffer[:nbytes]
            self.pump(stream, live)
            return
        live.counters.bytes_in += nbytes
        self.got += nbytes
        stream.send_data(self.server.buffer[:nbytes])
        if nbytes == room:
            self._hold(stream)

    def eof_received(self) -> bool:
        """A half-close: the target hears of it after all that came before; the way back stays open."""
        self.eof = True
        stream = self.stream
        if stream is None:
            return not self.closing
        if not self.pending:
            self._send_end(stream)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.server.leave(self)
        self.over()
        stream = self.let_go()
        if stream is not None:
            stream.reset(f.CANCELLED, "the visitor reset the connection" if exc else "the visitor's connection ended")

    def over(self) -> None:
        """Count and log it; its socket is closed."""
        self.server.tally.connections[self.door.scheme][not self.opened] += 1
        if self.server.access is not None:
            end = ANSWERED if self.code is None else BROKEN if self.opened else REFUSED
            self.server.access.connection(self, end, clock() - self.began)

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
            self.pump(self.stream, self.tunnel)

    def pump(self, stream: Stream, live: LiveTunnel | RemoteTunnel) -> None:
        """Send what waits, as far as there is credit; read on only when nothing does."""
        while self.pending:
            room = stream.sendable()
            if room <= 0:
                self._hold(stream)
                return
            part, self.pending = self.pending[:room], self.pending[room:]
            live.counters.bytes_in += len(part)
            self.got += len(part)
            stream.send_data(part)
        if self.eof:
            self._send_end(stream)
        elif stream.sendable() <= 0:
            self._hold(stream)
        else:
            self.resume()

    def resume(self) -> None:
        """Read on."""
        if not self.reading and not self.closed:
            self.reading = True
            self.transport.resume_reading()

    def _pause(self) -> None:
        if self.reading and not self.eof and not self.closed:
            self.reading = False
            self.transport.pause_reading()

    def _hold(self, stream: Stream) -> None:
        """Read nothing more until the agent gives credit."""
        self._pause()
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
        self.sent += size
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
            end_output(self.transport)

    def on_reset(self, code: int, detail: str) -> None:
        live = self.tunnel
        self.let_go()
        if self.closed or self.closing or live is None:
            return
        if not self.opened:
            live.counters.errors += 1
            self.refuse(RESET_CODES.get(code, "edge.agent_unreachable"), detail)
        elif code == f.NO_ERROR:
            self._close()
        else:
            if code != f.TARGET_RESET:
                live.counters.errors += 1
                self.raw.say(self, RESET_CODES.get(code, "edge.agent_unreachable"), detail)
            self._reset()

    def on_response(self, status: int, head: list[bytes], end: bool) -> None: ...
    def on_interim(self, status: int, head: list[bytes]) -> None: ...

    # ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def let_go(self) -> Stream | None:
        """The stream, which is not ours any more; its place in the tunnel is free."""
        stream, self.stream = self.stream, None
        self.pending = b""
        if self.counted and self.tunnel is not None:
            self.counted = False
            self.tunnel.inflight -= 1
        return stream

    def refuse(self, code: str, detail: str = "") -> None:
        """Close without a byte."""
        self.raw.say(self, code, detail)
        self._close()

    def _close(self) -> None:
        """Close once the visitor took what is written; it has to go on taking it, else the sweep cuts it off."""
        self.let_go()
        if self.closed or self.closing:
            return
        self.closing = True
        self.unsent = self.transport.get_write_buffer_size()
        self.deadline = self.server.now + self.server.settings.close_timeout_seconds
        self.transport.close()

    def _reset(self) -> None:
        """End with RST, so that it does not look like a complete connection; after what was just written, if the visitor
        takes it at once."""
        self.let_go()
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
        stream = self.let_go()
        if stream is not None:
            stream.reset(f.CANCELLED, detail)
        if not (self.closed or self.closing):
            self.raw.say(self, code, detail)
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
            stream, live = self.let_go(), self.tunnel
            if stream is not None and live is not None:
                stream.reset(f.CANCELLED, "the target was not reached in time")
                live.counters.errors += 1
            self.refuse("edge.target_timeout", "the target was not reached in time")
        elif now - self.heard < limits.tcp_idle_timeout_seconds:
            self.deadline = self.heard + limits.tcp_idle_timeout_seconds
        else:
            stream = self.let_go()
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
    if not isinstance(name, tuple) or not name[0]:
        return ""
    host = plain_address(name)
    return f"[{host}]:{name[1]}" if ":" in host else f"{host}:{name[1]}"
