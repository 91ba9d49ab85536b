"""Serves the streams of a TCP or TLS tunnel: each one is a connection to the target, dialled while its first bytes wait.

relay ──OPEN──► TcpForwarder ──dial──► target
relay ◄─OPENED, or RESET─┘
      ◄── bytes, END, RESET both ways (portico.agent.raw) ──►

The TLS of a TLS tunnel's visitors is bytes like any other, unless the agent ends it (portico.agent.tls_stream).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, Final

from portico.agent.connection import MIN_READ, RECEIVE_BYTES
from portico.agent.proxy_protocol import header
from portico.agent.raw import RawPipe
from portico.agent.stats import CONNECTION, Stats, connection_id
from portico.agent.target import Target, dial, why_unreachable
from portico.agent.tls_files import TlsIdentity, doubts
from portico.agent.tls_stream import TlsStream
from portico.errors import Problem
from portico.kit.sockets import keep_alive, reset_transport
from portico.settings import AgentSettings
from portico.wire import frames as f
from portico.wire.session import Session
from portico.wire.stream import Sink, Stream

#: A write that the target takes within this many seconds is no sign of a slow reader.
STALL_SECONDS: Final = 0.02


class TcpForwarder:
    """Serves the streams of one tunnel from a TCP or Unix socket. ``proxy_protocol``: 1, 2 or 0 for none. ``identity``: with
    which visitors' TLS ends here; ``None``: it does not. ``kind``: what its
    connections are shown as."""

    def __init__(
        self,
        target: Target,
        settings: AgentSettings,
        stats: Stats,
        *,
        proxy_protocol: int = 0,
        identity: TlsIdentity | None = None,
        kind: bytes = CONNECTION,
    ) -> None:
        self.target = target
        self.identity = identity
        self.kind = kind
        self.settings = settings
        self.stats = stats
        self.proxy_protocol = proxy_protocol
        self.loop = asyncio.get_running_loop()
        self._view: memoryview | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[TcpConnection] = set()

    @property
    def view(self) -> memoryview:
        """One receive buffer for all connections: bytes are used before the next read."""
        if self._view is None:
            self._view = memoryview(bytearray(RECEIVE_BYTES))
        return self._view

    def on_request(self, stream: Stream, head: list[bytes], flags: int) -> Sink | None:
        """No relay asks for it: what comes in here is a connection."""
        stream.reset(f.NO_SUCH_BIND, "this tunnel carries connections")
        return None

    def quick(self, session: Session, ident: int, payload: bytes) -> None:
        """Requests are no connections."""

    def on_open(self, stream: Stream, info: dict[str, Any]) -> Sink | None:
        """Start serving one connection."""
        stats = self.stats
        stats.opened()
        peer: str = info["peer"]
        began = time.perf_counter()
        front: Stream | TlsStream = stream
        if self.identity is not None:
            try:
                context = self.identity.context()
            except Problem as problem:  # the files went away before the first visitor came
                stats.failed(problem.detail)
                stats.closed()
                stream.reset(f.INTERNAL, "the agent has no certificate to show")
                return None
            certificate = self.identity.files.certificate
            limit = self.settings.tls_handshake_timeout_seconds
            front = TlsStream(stream, context, stats.failed, limit, lambda name: doubts(certificate, name))
        ident = connection_id(info)
        pipe = RawPipe(front, lambda: stats.answered(self.kind, peer.encode(), 0, began, time.perf_counter(), ident))
        first = header(self.proxy_protocol, peer, info["local"]) if self.proxy_protocol else b""
        self._keep(self._dial(pipe, first))
        if isinstance(front, TlsStream):
            front.pipe = pipe
            return front
        return pipe

    async def _dial(self, pipe: RawPipe, first: bytes) -> None:
        try:
            await self._connect(pipe, first)
        except (
            ConnectionResetError,
            BrokenPipeError,
        ):  # it accepted, and reset before we saw that: so will the visitor
            if not pipe.over:
                pipe.stream.send_opened()
                pipe.fail(f.TARGET_RESET, "the target reset the connection")
        except OSError as err:
            if pipe.over:
                return
            why = self._why(err)
            self.stats.failed(why)
            pipe.fail(f.TARGET_TIMEOUT if isinstance(err, TimeoutError) else f.TARGET_REFUSED, why)

    async def _connect(self, pipe: RawPipe | None, first: bytes = b"") -> TcpConnection:
        """A connection, which has joined ``pipe`` on its own when it was made; raises ``OSError``."""
        made: TcpConnection = await dial(
            self.target, lambda: TcpConnection(self, pipe, first), None, self.settings.target_connect_timeout_seconds
        )
        return made

    def _why(self, err: BaseException) -> str:
        return why_unreachable(self.target, err, self.settings.target_connect_timeout_seconds)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def joined(self, connection: TcpConnection) -> None:
        """The connection serves a stream from now on."""
        self._open.add(connection)

    def forget(self, connection: TcpConnection) -> None:
        """The connection is closed."""
        self._open.discard(connection)

    async def probe(self) -> str | None:
        """Why the target cannot be reached now, or ``None``."""
        try:
            connection = await self._connect(None)
        except OSError as err:
            return self._why(err)
        connection.transport.close()
        return None

    @property
    def busy(self) -> bool:
        """Whether connections are open or being dialled."""
        return bool(self._open or self._tasks)

    def retire(self) -> None:
        """Another forwarder takes the connections from now on; those that are open go on."""

    async def abort(self) -> None:
        """Cut everything, dials in progress included."""
        for connection in list(self._open):
            if connection.raw is not None:
                connection.raw.fail(f.TARGET_RESET, "the agent ended the tunnel")
            connection.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class TcpConnection(asyncio.BufferedProtocol):
    """One connection to the target: reads within the credit of the stream, and tells ``raw`` what happens."""

    __slots__ = (
        "first", "forwarder", "lost", "pipe", "raw", "reading_paused", "transport", "view", "write_paused",
        "writing_since",
    )  # fmt: skip

    def __init__(self, forwarder: TcpForwarder, pipe: RawPipe | None, first: bytes) -> None:
        self.forwarder = forwarder
        self.pipe = pipe
        self.first = first
        self.view = forwarder.view
        self.transport: Any = None
        self.raw: RawPipe | None = None
        self.lost = self.write_paused = self.reading_paused = False
        self.writing_since = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=self.forwarder.settings.target_write_buffer_bytes)
        pipe, self.pipe = self.pipe, None
        if pipe is None:  # a probe
            return
        if pipe.over:
            self.abort()
            return
        self.forwarder.joined(self)
        if not self.forwarder.target.loopback:
            self._keep_alive()
        pipe.stream.send_opened()
        if self.first:
            transport.write(self.first)
        pipe.attach(self)

    def _keep_alive(self) -> None:
        """A machine that vanished would hold an idle connection for ever."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            keep_alive(sock)

    def get_buffer(self, sizehint: int) -> memoryview:
        credit = self.raw.stream.sendable() if self.raw is not None else 0
        if credit >= RECEIVE_BYTES:
            return self.view
        return self.view[: credit if credit > MIN_READ else MIN_READ]

    def buffer_updated(self, nbytes: int) -> None:
        if self.raw is not None:
            self.raw.received(self.view[:nbytes])

    def eof_received(self) -> bool:
        return self.raw.eof() if self.raw is not None else False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.forwarder.forget(self)
        if self.raw is not None:
            self.raw.lost(exc)

    def pause_writing(self) -> None:
        self.write_paused = True
        self.writing_since = self.forwarder.loop.time()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.raw is not None:
            if self.forwarder.loop.time() - self.writing_since > STALL_SECONDS:
                self.raw.stream.stalled = True
            self.raw.writable()

    def hold(self) -> None:
        """Stop reading until the relay grants credit."""
        if not self.reading_paused and not self.lost:
            self.reading_paused = True
            self.transport.pause_reading()
        if self.raw is not None:
            self.raw.stream.wait()

    def unpause(self) -> None:
        """Read from the target again."""
        if self.reading_paused and not self.lost:
            self.reading_paused = False
            self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once, with RST: the target must not take it for a complete connection."""
        self.raw = None
        if self.transport is None or self.lost:
            return
        if self.transport.get_write_buffer_size():
            self.forwarder.loop.call_soon(self._cut)  # what was written in this tick goes first, if it goes at once
        else:
            self._cut()

    reset = abort

    def _cut(self) -> None:
        if not self.lost:
            reset_transport(self.transport)
