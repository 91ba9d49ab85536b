"""Forwards streams to the local target: one :class:`Forwarder` per tunnel, one :class:`Exchange` per request.

    relay ──REQUEST──► Exchange ──head, body──► TargetConnection ──► target
    relay ◄─RESPONSE── stream  ◄──within credit── TargetConnection ◄── target

The hot path makes no task, no timer and no future: an idle connection is taken, the head is written, the parser's
callbacks answer into the stream.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, cast

from portico.agent.connection import TargetConnection
from portico.agent.heads import ID_PREFIX, METHODS_KNOWN, PLAIN_TARGETS, HeadError, RequestWriter
from portico.agent.hints import HostHint
from portico.agent.pool import Pool
from portico.agent.raw import RawPipe
from portico.agent.recorder import Entry, Tap, head_bytes
from portico.agent.stats import Stats, request_id
from portico.agent.target import Target, tls_context
from portico.settings import AgentSettings
from portico.wire import frames as f
from portico.wire.session import Session
from portico.wire.stream import Sink, Stream

#: Methods that may be sent twice (RFC 9110, 9.2.2): the only ones that are retried after bytes were written.
IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE", b"PROPFIND", b"REPORT", b"SEARCH"))


class Forwarder:
    """Serves the streams of one tunnel from an HTTP target."""

    #: Watches for a target that refuses the visitor's Host.
    host_hint: HostHint | None = None
    #: Where requests are recorded for the inspector, or nowhere.
    tap: Tap | None = None

    def __init__(
        self,
        target: Target,
        settings: AgentSettings,
        stats: Stats,
        *,
        tls_verify: bool | None = None,
    ) -> None:
        self.target = target
        self.settings = settings
        self.stats = stats
        self.pool = Pool(target, tls_context(target, tls_verify), settings)
        self.writer = RequestWriter(target.authority.encode("ascii"))
        self.known = self.writer.known.get

    def on_request(self, stream: Stream, head: list[bytes], flags: int) -> Sink | None:
        """Start serving one request."""
        exchange = Exchange(self, head[0], head[1])
        exchange.stream = stream
        exchange.begin(head, flags)
        return None if exchange.over else exchange

    def quick(self, session: Session, ident: int, payload: bytes) -> TargetConnection | None:
        """Serve a request with known fields on an idle connection; nothing is kept of it but what that connection notes."""
        idle = self.pool.idle
        parts = payload[4:].split(b"\0", 2)
        if not idle or len(parts) != 3:
            return None
        method, target, fields = parts
        fields, _, last = fields.rpartition(b"\0")
        known = self.known(fields)
        if known is None or method not in METHODS_KNOWN or not PLAIN_TARGETS[target]:
            return None
        if not ((last[:4] == ID_PREFIX and last[4:].isalnum()) or last.isalnum()):
            return None
        connection = idle.pop()
        transport = connection.transport
        if transport.is_closing():
            connection.abort()
            return None
        out = b"".join((method, b" ", target, known, last, b"\r\n\r\n"))
        # What is known has the request's id last, or is none of a relay's of ours.
        connection.asked = (session, ident, self, method, target, out, perf_counter(), last)
        self.stats.begun += 1
        transport.write(out)
        return connection

    def reveal(self) -> None:
        """Make exchanges of the requests that nothing was heard of yet, for somebody who wants to see what runs."""
        for connection in [c for c in self.pool.open if c.asked is not None]:
            connection.materialise()

    def on_open(self, stream: Stream, info: dict[str, Any]) -> Sink | None:
        """No relay asks for it: an HTTP tunnel has no port."""
        stream.reset(f.NO_SUCH_BIND, "this tunnel carries HTTP")
        return None

    async def probe(self) -> str | None:
        """Why the target cannot be reached now, or ``None``."""
        return await self.pool.probe()

    @property
    def busy(self) -> bool:
        """Whether requests are in flight."""
        return self.pool.busy

    def retire(self) -> None:
        """Another forwarder takes the requests from now on: finish those in flight and keep nothing."""
        self.pool.retire()

    async def abort(self) -> None:
        """Cut everything."""
        await self.pool.abort()


class Exchange:
    """One request and its response: the sink of its stream, and the owner of its connection while that serves it."""

    # Defaults on the class: an ordinary request sets few of them (half a microsecond each way).
    stream: Stream
    connection: TargetConnection | None = None
    entry: Entry | None = None
    over = False
    status = 0
    upgrade = False
    bodiless = False
    _whole = True
    _idempotent = True
    _since = 0.0
    _out = cast(list[bytes], ())
    _kept: list[bytes] | None = None
    _kept_bytes = 0
    _uncredited = 0
    _body_left = 0
    _chunked = False
    _flush_due = False
    _reused = False
    _trailing = False
    _request = b""  # its id

    def __init__(self, forwarder: Forwarder, method: bytes, path: bytes) -> None:
        self.pool = forwarder.pool
        self.forwarder = forwarder
        self.method = method
        self.path = path
        self._started = perf_counter()
        if method == b"HEAD":
            self.bodiless = True

    def resume(self, connection: TargetConnection, out: bytes, started: float, request: bytes) -> None:
        """Go on with a request that :meth:`Forwarder.quick` wrote to ``connection``."""
        self.connection = connection
        self._reused = True
        self._kept = [out]
        self._out = []
        self._started = self._since = started
        self._request = request
        tap = self.forwarder.tap
        if tap is not None:
            self.entry = tap.begin(out, f.F_END, started)
        self.pool.watch(self)

    def begin(self, head: list[bytes], flags: int) -> None:
        """Write the head to a connection of the pool, or wait for one."""
        self._out = []
        self._request = request_id(head)
        self._whole = flags & f.F_END != 0
        self._idempotent = self.method in IDEMPOTENT
        if flags & f.F_UPGRADE:
            self.upgrade = True
            self._early: list[bytes] = []
        forwarder = self.forwarder
        forwarder.stats.opened()
        tap = forwarder.tap
        try:
            out, self._body_left = forwarder.writer.write(head, flags)
        except HeadError as err:
            if tap is not None:
                self.entry = tap.begin(head_bytes(head), flags, self._started)
            self.fail(f.REQUEST_INVALID, str(err))
            return
        if tap is not None:
            self.entry = tap.begin(out, flags, self._started)
        if flags == f.F_END:
            self.forwarder.writer.learn(head, out)
        if self._body_left < 0:
            self._chunked = True
        if self.upgrade and not self._body_left:
            self._whole = True
        pool = self.pool
        pool.watch(self)
        connection = pool.take(not self._idempotent)
        if connection is not None and self._whole and not self.upgrade:
            # The hot path: a request without a body on an idle connection.
            self.connection = connection
            connection.exchange = self
            self._reused = True
            if self._idempotent:
                self._kept = [out]
            connection.transport.write(out)
            return
        self._out = [out]
        if connection is None:
            pool.enqueue(self)
        else:
            self.attach(connection)

    def attach(self, connection: TargetConnection) -> None:
        """Send what is there, now or (so that the body's start may join) at the end of this tick."""
        self.connection = connection
        connection.exchange = self
        self._reused = connection.reused
        self._kept = [] if self._reused and self._idempotent else None
        self._since = perf_counter()
        if self._whole or len(self._out) > 1:
            self._flush()
        else:
            self._flush_soon()

    # ── request body, from the relay ──────────────────────────────────────────────────────────────────────────────
    def on_data(self, data: bytes, end: bool) -> None:
        size = len(data)
        entry = self.entry
        if entry is not None:
            entry.request_data(data)
            if end:
                entry.request_end([])
        if self.upgrade and not self._chunked and not self._body_left:
            self._early.append(data)  # of the protocol to come: sent after the 101
            self._trailing = self._trailing or end
            return
        if self._chunked:
            if size:
                self._out.append(b"%x\r\n%b\r\n" % (size, data))
            if end:
                self._out.append(b"0\r\n\r\n")
        else:
            self._body_left -= size
            if self._body_left < 0 or (end and self._body_left):
                self._mismatch()
                return
            if size:
                self._out.append(data)
        self._whole = self._whole or end or (not self._chunked and not self._body_left)
        self._uncredited += size
        if end or size >= 16_384:
            self._flush()
        else:
            self._flush_soon()

    def on_end(self, trailers: list[bytes]) -> None:
        if self.entry is not None:
            self.entry.request_end(trailers)
        if self.upgrade and self._whole and not self._chunked:
            self._trailing = True  # the visitor ended its direction before the target answered
            return
        if self._chunked:
            fields = b"".join(b"%b: %b\r\n" % pair for pair in zip(trailers[::2], trailers[1::2], strict=True))
            self._out.append(b"0\r\n" + fields + b"\r\n")
        elif self._body_left:
            self._mismatch()
            return
        self._whole = True
        self._flush()

    def _mismatch(self) -> None:
        self.fail(f.REQUEST_INVALID, "the request body did not match its Content-Length")

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self.pool.loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Write what waits, as one piece, and give its credit back unless the target lags."""
        self._flush_due = False
        connection = self.connection
        if connection is None or self.over or not self._out:
            return
        out = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        if self._kept is not None:
            self._kept_bytes += len(out)
            if self._kept_bytes > self.pool.settings.retry_body_max_bytes:
                self._kept = None
            else:
                self._kept.append(out)
        self._since = perf_counter()
        connection.transport.write(out)
        if not connection.write_paused:
            self.writable()

    def writable(self) -> None:
        """The target took what was written."""
        size, self._uncredited = self._uncredited, 0
        if size:
            self.stream.consumed(size)

    # ── other events of the stream ────────────────────────────────────────────────────────────────────────────────
    def on_credit(self) -> None:
        if self.connection is not None:
            self.connection.credit()

    def on_reset(self, code: int, detail: str) -> None:
        """The visitor left, or the session ended: so does the request to the target, at once."""
        if self.entry is not None:
            self.entry.abort(detail)
        self._close(499)

    def on_response(self, status: int, head: list[bytes], end: bool) -> None: ...
    def on_interim(self, status: int, head: list[bytes]) -> None: ...
    def on_opened(self) -> None: ...

    # ── the connection's side ─────────────────────────────────────────────────────────────────────────────────────
    def respond(self, status: int, fields: list[bytes], end: bool) -> None:
        """The final response head."""
        self.status = status
        self._kept = None
        self.pool.active.pop(self, None)
        if (status == 403 or status == 400) and self.forwarder.host_hint is not None:
            self.forwarder.host_hint.look(self, fields)
        try:
            payload = self.stream.send_response(status, fields, end)
        except ValueError as err:
            self.status = 0
            raise HeadError(str(err)) from None
        if self.entry is not None:
            self.entry.answer(status, payload)

    def touched(self) -> None:
        """The target gave a sign of life before its answer."""
        self._since = perf_counter()

    def sent_whole(self) -> bool:
        """Whether the request was written to its end, so that the connection may serve another one."""
        return self._whole and not self._out

    def finished(self) -> None:
        """The response is complete; what is left of the request is not wanted."""
        self.over = True
        self.connection = None
        if not self.stream.closed:
            self.stream.reset(f.NO_ERROR, "the answer is complete")
        self._record(self.status)

    def switch(self, connection: TargetConnection, fields: list[bytes]) -> RawPipe:
        """101: the stream and the connection become a pipe."""
        self.over = True
        self.connection = None
        self.pool.active.pop(self, None)
        self._record(101, still_open=True)
        stream = self.stream
        payload = stream.send_response(101, fields, end=False)
        if self.entry is not None:
            self.entry.answer(101, payload)
        pipe = RawPipe(stream, self._closed)
        stream.sink = pipe
        pipe.attach(connection)
        for data in self._early:
            pipe.on_data(data, end=False)
        pipe.entry = self.entry  # what came early is in it already
        if self._trailing:
            pipe.on_end([])
        return pipe

    def lost_before_head(self, connection: TargetConnection, exc: Exception | None, nothing_arrived: bool) -> None:
        """The connection ended without an answer: try once more where that is safe, else say so."""
        kept = self._kept
        if self._reused and nothing_arrived and kept is not None and not self.over:
            connection.exchange = None
            self.connection = None
            self._kept = None
            self._out[:0] = kept
            self.pool.dial_for(self)
            return
        why = "reset" if isinstance(exc, OSError) else "closed"
        self.fail(f.TARGET_INVALID, f"{self.forwarder.target.place} {why} the connection without an answer")

    def silent_since(self, now: float) -> float:
        """Seconds for which the target owes an answer, or room for the request."""
        connection = self.connection
        if self.status or not (connection is None or self._whole or connection.write_paused):
            return 0.0
        if not self._since:  # the hot path reads no clock of the loop: the first look begins the time
            self._since = now
        return now - self._since

    def fail(self, code: int, detail: str) -> None:
        """End the stream with RESET and cut the connection to the target."""
        if self.over:
            return
        self.stream.reset(code, detail)
        if self.entry is not None:
            self.entry.fail(detail)
        if not self.status:
            self.forwarder.stats.failed(detail)
        self._close(self.status or (504 if code == f.TARGET_TIMEOUT else 502))

    def _close(self, status: int) -> None:
        if self.over:
            return
        self.over = True
        self.pool.active.pop(self, None)
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()
        self._record(status)

    def _record(self, status: int, still_open: bool = False) -> None:
        stats = self.forwarder.stats
        if still_open:
            stats.done(self.method, self.path, status, self._started, self._request)
            return
        ended = perf_counter()
        stats.answered(self.method, self.path, status, self._started, ended, self._request)
        if self.entry is not None:
            self.entry.finish(status, ended)

    def _closed(self) -> None:
        """The pipe that the request became has ended."""
        self.forwarder.stats.closed()
        if self.entry is not None:
            self.entry.finish(101)
