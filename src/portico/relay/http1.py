"""A visitor's HTTP/1.1 connection: strict parsing, pipelining in order, backpressure, half-close, and its time limits.

The parser (llhttp, strict) refuses malformed framing; this file refuses what is well-formed but could be read in two
ways by someone behind us: two ``Host`` fields, a target for another host, a transfer coding that is not exactly
``chunked``, a length together with a coding, HTTP/1.0 with a coding. Heads are always re-serialised from the parsed fields.

Time limits cost nothing per request: every connection has a ``deadline``, and the server sweeps all of them twice a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

import httptools

from portico.kit.gone import GONE
from portico.kit.sockets import end_output, reset_transport
from portico.relay import challenges, heads
from portico.relay.exchange import Exchange, request_id
from portico.relay.outgoing import untaken
from portico.relay.repeats import Repeats
from portico.relay.telling import is_news

if TYPE_CHECKING:
    from portico.relay.door import Door
    from portico.relay.listeners import Headers, PublicServer

log = logging.getLogger("portico.relay.http1")

#: Bytes of body that one read may take, and that may be kept of a request until there is credit for them.
READ_SIZE: Final = 65_536
#: The same where all of it can go on at once: nothing of it is kept.
BULK_READ: Final = 131_072
#: The same where no body is due: a read is parsed in one go, and 64 KiB of pipelined requests held the loop for 15 ms.
HEAD_READ: Final = 4096
#: Bytes of a request body that are read and thrown away after a refusal, before the connection is cut.
LINGER_BYTES: Final = 262_144
LINGER_SECONDS: Final = 2.0
#: Chunks below this size are copied together with their framing; larger ones are passed on in pieces.
SMALL_CHUNK: Final = 16_384
#: Seconds in which a visitor read nothing, after which its stream's window falls back to the smallest.
STALL_SECONDS: Final = 1.0
#: Seconds after a visitor's half-close in which something must be sent to it, or it is taken to be gone.
HALF_CLOSE_SECONDS: Final = 1.0
#: Header fields of one head; a frame's head carries 256, and ours are added. Trailer fields as well.
MAX_FIELDS: Final = 200

NO_CERTIFICATE: Final = (
    "Only visitors who show a certificate of an authority that the owner named are let in, by https."
)

#: Digits of a Content-Length: more is no length of anything.
MAX_LENGTH_DIGITS: Final = 18

_known_head: Final = heads.KNOWN_HEADS.get
_METHODS_REFUSED = frozenset((b"CONNECT", b"PRI"))


class Visitor(Repeats, asyncio.BufferedProtocol):
    """One connection. ``current`` is the exchange being answered, ``queue`` the pipelined ones behind it."""

    # Defaults stand on the class: many connections bring one request and change few of them.
    parser: Any = None  # made when the first request comes that is not a known one
    queue = cast("deque[Exchange]", ())  # a deque once something is pipelined
    closed = eof = raw = False
    reading = True
    paused_at = 0.0
    head_bytes = 0  # of the fields that are complete
    head_read = 0  # of the head that is not: those of its first read, and all of later ones
    quiet_bytes = 0  # of a body's framing (chunk headers, trailers) since the last byte of body
    fields = cast(list[bytes], ())
    target = b""
    host_given = b""
    host_normal: bytes | None = None
    leftover = b""
    lingering = False
    lingered = 0
    expect_close = False
    written = written_at_eof = 0
    body_at = 0.0  # when the last byte of a body came, or room for more
    behind = -1  # bytes that the visitor had not taken at the last look, while an answer waits for it
    unwritten = b""
    unsent = -1  # bytes that the visitor had not taken at the last look after the close; -1 before it

    def __init__(self, server: PublicServer, door: Door) -> None:
        self.server = server
        self.door = door
        self.plain = door.scheme == b"http"
        self.tallied = server.tally.quick[door.scheme]

    # ── transport events ──────────────────────────────────────────────────────────────────────────────────────────
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.address = plain_address(self.door.client or transport.get_extra_info("peername"))
        if self.door.client_ca is not None:
            self.certified = presented_certificate(transport)
        if self.server.access is not None and not self.plain:
            self.tls = tls_version(transport)
        settings = self.server.settings
        self.transport.set_write_buffer_limits(high=settings.visitor_write_buffer_bytes)
        self.deadline = self.server.now + settings.head_timeout_seconds
        if self.server.admit(self):
            return
        if not self.server.turn_away(self):
            self.transport.abort()
        else:
            self._respond("edge.too_many_connections", request_id(), html=False, keep_alive=False)
            self._linger()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.server.leave(self)
        if self.asked is not None:
            self.materialise()
        current, self.current, self.parsing = self.current, None, None
        self.queue = cast("deque[Exchange]", ())
        if current is not None:
            current.abandon()
        self.parser = None
        self.transport = GONE

    def get_buffer(self, sizehint: int) -> memoryview:
        current = self.current
        if current is not None and current.sending and (self.raw or self.parsing is current):
            room = current.credit_room()
            if room >= BULK_READ:
                return self.server.bulk_view
            if 0 < room < READ_SIZE:
                return self.server.buffer[:room]
            return self.server.buffer_view
        return self.server.head_view

    def buffer_updated(self, nbytes: int) -> None:
        data = self.server.buffer[:nbytes]
        if self.resting:
            line, _, section = data.tobytes().partition(b"\r\n")
            known = _known_head(section)
            if known is None and self.own is not None and self.own[0] == section:
                known = self.own[1]
            try:
                asked = known is not None and self._ask(line, known)
            except Exception:
                asked = False  # a fault of ours: the parser's way meets it too, and answers with its name
                tally = self.server.tally
                tally.short_faults += 1
                if tally.short_faults == 1:  # the others would say the same
                    log.exception("fault on the short way of a repeated request")
            if not asked:
                self.resting = False
                self._unknown(data, line, section)
            return
        if self.asked is not None:
            self.materialise()
        if self.raw:
            if self.current is not None:
                self.current.body(bytes(data))
        elif self.lingering:
            self.lingered += nbytes
            if self.lingered > LINGER_BYTES:
                self.transport.abort()
        else:
            self._parse(data)

    def eof_received(self) -> bool:
        """A half-close. On an upgraded connection it is passed on; an HTTP visitor may still be waiting for its answer."""
        self.eof = True
        self.resting = False
        if self.asked is not None:
            self.materialise()
        current = self.current
        if current is None or self.closed or self.lingering:
            return False
        if self.raw:
            current.end()
            return self.plain  # TLS has no half-close: the connection ends both ways
        if not current.received:
            return False  # the request can never be complete
        self.written_at_eof = self.written
        self.deadline = min(self.deadline, self.server.now + HALF_CLOSE_SECONDS)
        return self.plain

    def pause_writing(self) -> None:
        self.paused = True
        self.paused_at = self.server.now
        if self.resting:
            self.update_reading()
        elif self.current is not None and self.current.responded:
            self.watch_reader()

    def resume_writing(self) -> None:
        self.paused = False
        current = self.current
        if current is not None:
            # Waiting for a visitor is the ordinary state of a download; only one that stood still loses its large window.
            if current.stream is not None and self.server.now - self.paused_at >= STALL_SECONDS:
                current.stream.stalled = True
            if current.responded and not self.eof:
                self.deadline = self.NEVER
            current.drained()
        elif self.queue:
            self.server.loop.call_soon(self._next)
        elif not self.reading:
            self.update_reading()

    # ── reading on and off ────────────────────────────────────────────────────────────────────────────────────────
    def update_reading(self) -> None:
        """Read while there is something to do with what comes: not while a body waits for credit, a pipelined request
        for its turn, a connection for its end, or answers for a visitor that asks and does not read."""
        if self.closed:
            return
        current = self.current
        want = self.lingering or not (
            self.queue
            or self.leftover
            or self.expect_close
            or (self.paused if current is None and not self.raw else current is not None and current.blocked)
        )
        if want is not self.reading:
            self.reading = want
            if want:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    # ── parsing ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _parse(self, data: memoryview) -> None:
        if self.parsing is not None and self.parsing.upgrade:
            self._keep_leftover(bytes(data))
            return
        was_in_head = self.in_head
        if self.parser is None:
            self.parser = httptools.HttpRequestParser(self)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.skipped:
                self._read_body(bytes(data[upgrade.args[0] :]))
                return
            self._keep_leftover(bytes(data[upgrade.args[0] :]))
        except httptools.HttpParserCallbackError as err:
            ident = self.parsing.id if self.parsing is not None else b""
            fields = {"request": ident.decode()} if ident else {}
            log.error("fault while handling a request", exc_info=err.__context__ or err, extra={"f": fields})
            self.fault = "edge.internal"
        except httptools.HttpParserError:
            self.fault = self.fault or "edge.bad_request"
        if self.parsing is not None and not self.in_head and not self.parsing.received:
            self.quiet_bytes = max(0, self.quiet_bytes + len(data))
            if self.quiet_bytes > self.server.settings.max_head_bytes and self.parsing.with_body:
                self.fault = self.fault or "edge.head_too_large"
        if self.in_head:
            self.head_read = self.head_read + len(data) if was_in_head else self.head_bytes
            if self.head_read > self.server.settings.max_head_bytes:
                self.fault = "edge.head_too_large"
        if self.fault is not None:
            self._refuse_parse(self.fault)
        elif self.queue or self.leftover:
            self.update_reading()

    def _keep_leftover(self, rest: bytes) -> None:
        """What follows an upgrade request: raw bytes if the target agrees, else HTTP again. No more is read until then."""
        if self.fault is None:
            self.leftover += rest
            self.update_reading()

    def _read_body(self, rest: bytes) -> None:
        """The body of a request that has an Upgrade field. The parser reads none then: what is a body to everybody else
        would be read as the next request. Another parser, which knows of no upgrade, reads it and what comes after."""
        framing, self.skipped = self.skipped, b""
        if self.lingering:
            return
        kept = self.parsing, self.expect_close, self.deadline
        self.expect_close = True  # the head that goes before makes no exchange
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)
        self.parsing, self.expect_close, self.deadline = kept
        self.head_bytes = 0
        if rest:
            self._parse(memoryview(rest))
        else:
            self.update_reading()

    def _refuse_parse(self, code: str) -> None:
        """Malformed input ends the connection; requests before it are answered first."""
        if self.lingering or self.expect_close:
            return
        self.expect_close = True
        if self.current is None:
            self._respond(code, request_id(), html=self.server.wants_html(self.fields), keep_alive=False)
            self._linger()
        elif self.parsing is self.current and not self.current.received:
            # The body itself is broken: the target has half of a request, which must not look whole.
            current, self.current = self.current, None
            responded = current.responded
            if responded:
                current.abandon()
                self.transport.abort()
            else:
                self._respond(code, current.id or request_id(), html=False, keep_alive=False, exchange=current)
                current.abandon()
                self._linger()
        else:
            if self.queue and self.queue[-1] is self.parsing and not self.parsing.received:
                # Nothing of it was forwarded yet; it must not wait for a body that never ends.
                self.queue.pop()
            self.update_reading()

    def on_message_begin(self) -> None:
        self.in_head = True
        self.resting = False  # also where the request before it ended in this very read
        self.head_bytes = self.head_read = 0
        self.fields = []
        self.target = b""
        self.parsing = None
        if self.current is None:
            self.deadline = self.server.now + self.server.settings.head_timeout_seconds

    def on_url(self, url: bytes) -> None:
        self.target += url
        self.head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_head:
            self._on_trailer(name, value)
            return
        self.fields += (name, value)
        self.head_bytes += len(name) + len(value) + 4

    def _found(self, code: str) -> None:
        """Remember the first fault; the connection ends with it."""
        self.fault = self.fault or code

    def _on_trailer(self, name: bytes, value: bytes) -> None:
        """Trailers are held until the body ends, and leave in one frame: they have the limits of a head."""
        self.head_bytes += len(name) + len(value) + 4
        if self.parsing is None:
            return
        self.parsing.trailers += (name, value)
        too_many = len(self.parsing.trailers) > 2 * MAX_FIELDS or len(name) > heads.MAX_NAME
        if too_many or self.head_bytes > self.server.settings.max_head_bytes:
            self.parsing.trailers.clear()
            self.fault = self.fault or "edge.head_too_large"

    def on_headers_complete(self) -> None:
        self.in_head = False
        if self.fault is not None or self.expect_close:
            return
        if self.head_bytes > self.server.settings.max_head_bytes or len(self.fields) > 2 * MAX_FIELDS:
            self.fault = "edge.head_too_large"
            return
        exchange = self._exchange()
        if exchange is None and self._strip_values():
            exchange = self._exchange()
        if exchange is None:
            self._found("edge.bad_request")
            return
        self.parsing = exchange
        self.head_bytes = self.quiet_bytes = 0
        if self.current is None and not self.queue:
            self.current = exchange
            self.deadline = self.NEVER
            if exchange.with_body:
                self._watch_sender()
            exchange.start()
        else:
            self.queue = self.queue or deque()
            self.queue.append(exchange)

    def on_body(self, body: bytes) -> None:
        self.quiet_bytes = -BULK_READ  # a read that brought body is not quiet, however it ends
        self.body_at = self.server.now
        if self.parsing is not None:
            self.parsing.body(body)

    def on_message_complete(self) -> None:
        exchange = self.parsing
        if exchange is None or self.fault is not None or self.skipped:
            return
        if exchange.upgrade:
            return  # its direction goes on, as bytes or as the body of nothing
        exchange.end()
        if exchange is self.current and not exchange.responded:
            limit = self.server.settings.first_byte_timeout_seconds
            self.deadline = self.server.now + limit if limit else self.NEVER

    def _exchange(self) -> Exchange | None:
        """The exchange of a complete head, or ``None`` when the head is not acceptable."""
        fields = self.fields
        plan = heads.REQUEST_PLANS[tuple(fields[::2])]
        if plan is None:
            return self._by_field()
        host_at, length_at, connection_at, drop = plan
        if connection_at and fields[connection_at] not in heads.PLAIN_CONNECTION:
            return self._by_field()
        length = 0
        if length_at:
            value = fields[length_at]
            if not value.isdigit() or len(value) > MAX_LENGTH_DIGITS:
                return None
            length = int(value)
        host = fields[host_at]
        if drop:
            fields = fields[:]
        for at in drop:
            del fields[at : at + 2]
        return self._make(fields, host, length > 0, chunked=False)

    def _strip_values(self) -> bool:
        """Take off the white space that the parser leaves after values; whether there was any. Only a head that was not
        acceptable with it is looked at again: elsewhere it has no meaning."""
        fields = self.fields
        self.fields = [part.strip(b" \t") for part in fields]
        return self.fields != fields

    def _by_field(self) -> Exchange | None:
        """As :meth:`_exchange`, for heads with fields that say more than their values: field by field."""
        kinds, fields = heads.REQUEST_KINDS, self.fields
        head: list[bytes] = []
        host = length = coding = upgrade = None
        named: list[bytes] = []
        te_trailers = False
        for at in range(0, len(fields), 2):
            name = fields[at]
            value = fields[at + 1]
            kind = kinds[name]
            if kind == heads.PASS:
                head += (name, value)
            elif kind == heads.HOST:
                if host is not None:
                    return None
                host = value
                head += (name, value)
            elif kind == heads.LENGTH:
                if length is not None or not value.isdigit() or len(value) > MAX_LENGTH_DIGITS:
                    return None
                length = int(value)
                head += (name, value)
            elif kind == heads.ENCODING:
                if coding is not None or value.lower() != b"chunked":
                    return None
                coding = value
            elif kind == heads.CONNECTION:
                named += heads.tokens(value)
            elif kind == heads.UPGRADE:
                upgrade = value if upgrade is None else upgrade + b", " + value
            elif kind == heads.TE:
                te_trailers = te_trailers or b"trailers" in heads.tokens(value)
            elif kind == heads.TOO_LONG:
                self._found("edge.head_too_large")
                return None
        if host is None or (coding is not None and length is not None):
            return None
        if named:
            # Connection may not name what the message needs to be understood (RFC 9110, 7.6.1).
            head = heads.without(head, set(named) - {b"host", b"content-length", b"connection", b"cookie"})
        exchange = self._make(head, host, bool(length), chunked=coding is not None)
        if exchange is None:
            return None
        if upgrade is not None and b"upgrade" in named and not exchange.with_body and not exchange.http10:
            self._ask_upgrade(exchange, upgrade)
        if exchange.with_body and self.parser.should_upgrade():
            self.skipped = b"Content-Length: %d" % length if length else b"Transfer-Encoding: chunked"
        exchange.te_trailers = te_trailers
        return exchange

    def _make(self, fields: list[bytes], host: bytes, sized: bool, *, chunked: bool) -> Exchange | None:
        """The exchange for flat fields; ``None`` when line, host or framing mean nothing here."""
        parser, target = self.parser, self.target
        method: bytes = parser.get_method()
        version = parser.get_http_version()
        if version != "1.1" and (version != "1.0" or chunked):
            return None
        if host != self.host_given:
            self.host_given, self.host_normal = host, heads.normal_host(host)
        normal = self.host_normal
        if target[:1] != b"/":
            target = heads.origin_form(target, method, host) or b""
        if normal is None or not target or method in _METHODS_REFUSED:
            return None
        exchange = Exchange(self, normal, method, target, fields)
        exchange.http10 = version == "1.0"
        exchange.keep_alive = parser.should_keep_alive()
        exchange.with_body = chunked or sized
        exchange.pending, exchange.trailers = [], []
        return exchange

    @staticmethod
    def _ask_upgrade(exchange: Exchange, protocols: bytes) -> None:
        """Pass an upgrade on, but for h2c: HTTP/2 in clear text is not asked for this way (RFC 9113, 3.1)."""
        wanted = [p.strip() for p in protocols.split(b",") if p.strip().lower() not in (b"h2c", b"")]
        if wanted:
            exchange.upgrade = True
            exchange.fields += (b"Upgrade", b", ".join(wanted))

    # ── answering ─────────────────────────────────────────────────────────────────────────────────────────────────
    def write_head(self, head: bytes) -> None:
        """A head whose body may be in the next frame: one system call for both if it is, else written this tick."""
        self.written += len(head)
        if self.unwritten:
            self.unwritten += head
            return
        self.unwritten = head
        self.server.hold_back(self)

    def flush(self) -> None:
        """Write the head that no body came for."""
        head, self.unwritten = self.unwritten, b""
        if head and not self.closed:
            self.transport.write(head)

    def write(self, data: bytes) -> None:
        self.written += len(data)
        if self.unwritten:
            data, self.unwritten = self.unwritten + data, b""
        if not self.closed:
            self.transport.write(data)

    def write_chunk(self, data: bytes) -> None:
        size = b"%x\r\n" % len(data)
        if len(data) < SMALL_CHUNK:
            self.write(b"%b%b\r\n" % (size, data))
            return
        self.flush()
        self.written += len(data)
        if not self.closed:
            self.transport.writelines((size, data, b"\r\n"))

    def refuse(self, exchange: Exchange, code: str, detail: str | None) -> None:
        """Answer an exchange with a refusal and go on, or close when its request is not whole yet."""
        if exchange.tunnel is not None and is_news(code):
            exchange.tunnel.counters.refuse(code)
        exchange.release_place()
        whole = exchange.received or not (exchange.with_body or exchange.upgrade)
        # The page has no field that would tell an HTTP/1.0 client that the connection stays.
        keep = exchange.keep_alive and whole and not self.draining and not exchange.http10
        fields = self.server.refusal_fields(exchange, code)
        if code == "edge.auth_required" and self._lacks_certificate(exchange):
            # Another handshake may bring one. A password would not help, so none is asked for.
            keep, fields, detail = False, (), NO_CERTIFICATE
        html = self.server.wants_html(exchange.fields)
        self._respond(
            code,
            exchange.id,
            html=html,
            keep_alive=keep,
            head_only=exchange.head_only,
            host=exchange.host,
            detail=detail,
            fields=fields,
            exchange=exchange,
        )
        exchange.keep_alive = keep
        self.finished(exchange)

    def answer_challenge(self, exchange: Exchange, body: bytes) -> None:
        """Answer a certificate authority (or whoever asks): 200 with the text that proves whose this edge is."""
        whole = exchange.received or not (exchange.with_body or exchange.upgrade)
        exchange.keep_alive = exchange.keep_alive and whole and not self.draining and not exchange.http10
        data = challenges.response(body, keep_alive=exchange.keep_alive, head_only=exchange.head_only)
        exchange.status = 200
        exchange.sent += len(data)
        self.write(data)
        self.finished(exchange)

    def _lacks_certificate(self, exchange: Exchange) -> bool:
        """Whether only another handshake can bring what the policy asks for: a client may not even have been asked."""
        tunnel = exchange.tunnel
        wanted = tunnel.policy.client_ca if tunnel is not None else None
        return wanted is not None and not (self.certified and self.door.client_ca == wanted)

    def _respond(
        self,
        code: str,
        ident: bytes,
        *,
        html: bool,
        keep_alive: bool,
        head_only: bool = False,
        host: bytes = b"",
        detail: str | None = None,
        fields: Headers = (),
        exchange: Exchange | None = None,
    ) -> None:
        """Write a refusal, and count it; one without an exchange is of what was no request yet."""
        self.server.refused(code)
        page = self.server.page(
            code, ident, html=html, keep_alive=keep_alive, head_only=head_only, host=host, detail=detail, extra=fields
        )
        self.write(page)
        status = int(page[9:12])
        if exchange is None:
            self.server.unread(self, ident, code, status)
        else:
            exchange.code, exchange.status = code, status
            exchange.sent += len(page)

    def finished(self, exchange: Exchange) -> None:
        """The exchange is over in both directions: the next one, or the end of the connection."""
        exchange.release_place()
        exchange.over()
        if self.current is not exchange:
            return
        self.current = None
        if self.unwritten:
            self.flush()
        if self.closed:
            return
        if self.raw:
            self._close()
        elif not exchange.keep_alive or (self.draining and not self.queue):
            self._close_after(exchange)
        elif self.queue:
            self.server.loop.call_soon(self._next)  # not from here: a chain of refusals would nest
        elif self.leftover:
            self._reparse()
        elif self.fault is not None:
            self._respond(self.fault, request_id(), html=self.server.wants_html(self.fields), keep_alive=False)
            self._linger()
        elif self.eof:
            self._close()
        else:
            limits = self.server.settings
            limit = limits.head_timeout_seconds if self.in_head else limits.idle_timeout_seconds
            self.deadline = self.server.now + limit
            self.resting = exchange.received and not (self.in_head or self.skipped)
            if self.paused or not self.reading:
                self.update_reading()

    def _next(self) -> None:
        """The turn of the first pipelined request."""
        if self.closed or self.current is not None or not self.queue:
            return
        if self.paused:
            # One read may hold a thousand requests: their answers may not pile up before a visitor that does not read.
            self.watch_reader()
            return
        self.current = current = self.queue.popleft()
        current.start()
        if self.current is current and current.received and not current.responded:
            limit = self.server.settings.first_byte_timeout_seconds
            self.deadline = self.server.now + limit if limit else self.NEVER
        elif self.current is current and current.sending and current.with_body and not current.responded:
            self._watch_sender()
        self.update_reading()

    def _reparse(self) -> None:
        """An upgrade request was answered without upgrading: what followed it is HTTP."""
        rest, self.leftover = self.leftover, b""
        self.parser = httptools.HttpRequestParser(self)
        self.parsing = None
        self._parse(memoryview(rest))
        self.update_reading()

    def _close_after(self, exchange: Exchange) -> None:
        if exchange.received or not (exchange.with_body or exchange.upgrade):
            self.queue = cast("deque[Exchange]", ())
            self._close()
        else:
            self._linger()

    def _close(self) -> None:
        """Close once the visitor took what is written; it has to go on taking it, else the sweep cuts it off."""
        self.unsent = self.transport.get_write_buffer_size()
        self.deadline = self.server.now + self.server.settings.close_timeout_seconds
        self.transport.close()

    def _linger(self) -> None:
        """Close so that the answer arrives: a close with unread input would reset the connection under it (RFC 9112, 9.6)."""
        if self.closed:
            return
        self.resting = False
        self.expect_close = True
        self.lingering = True
        self.current = None
        self.queue = cast("deque[Exchange]", ())
        self.deadline = self.server.now + LINGER_SECONDS
        if self.eof or not self.plain or not self.transport.can_write_eof():
            self.transport.close()
            return
        end_output(self.transport)
        self.update_reading()

    def become_raw(self) -> None:
        """The target switched protocols: both directions are bytes from here on."""
        self.raw = True
        self.deadline = self.NEVER
        rest, self.leftover = self.leftover, b""
        if rest and self.current is not None:
            self.current.body(rest)
        if self.eof and self.current is not None:
            self.current.end()
        self.update_reading()

    def end_writing(self) -> None:
        """Half-close towards the visitor of an upgraded connection; TLS has none, so that it is closed both ways."""
        self.flush()
        if self.closed or self.eof:
            return
        if self.transport.can_write_eof():
            end_output(self.transport)
        else:
            self._close()

    def break_off(self, *, reset: bool) -> None:
        """End the connection so that an incomplete answer shows; ``reset`` where a plain close would look complete."""
        self.current = None
        self.flush()
        if reset:
            reset_transport(self.transport)
        else:
            self._close()

    # ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def expire(self) -> None:
        """The deadline passed (called by the server's sweep)."""
        if self.asked is not None:
            self.materialise()
        current = self.current
        if self.lingering or self.closed:
            self.transport.abort()
        elif self.unsent >= 0:
            unsent = self.transport.get_write_buffer_size()
            if unsent < self.unsent:
                self.unsent = unsent
                self.deadline = self.server.now + self.server.settings.close_timeout_seconds
            else:
                self.transport.abort()
        elif current is None and self.queue:
            self._look_at_reader()
        elif current is None:
            if self.in_head:
                self._respond(
                    "edge.head_timeout", request_id(), html=self.server.wants_html(self.fields), keep_alive=False
                )
                self._linger()
            else:
                self._close()
        elif self.eof and not self.raw and self.written != self.written_at_eof:
            # It reads what is sent: only its own direction is closed.
            self.written_at_eof = self.written
            self.deadline = self.server.now + HALF_CLOSE_SECONDS
        elif self.eof and not self.raw:
            self.transport.abort()
        elif current.responded:
            self._look_at_reader()
        elif current.with_body and not current.received:
            self._look_at_sender(current)
        else:
            current.time_out()

    def watch_reader(self) -> None:
        """An answer waits for the visitor. The bytes of an upgraded connection may wait as long as both sides like."""
        limit = self.server.settings.write_timeout_seconds
        if limit and not (self.raw or self.eof):
            self.behind = -1
            self.deadline = self.server.now + limit

    def _look_at_reader(self) -> None:
        """Whether the visitor took some of the answer since the last look; the first one only counts what there is to take."""
        left = untaken(self.transport)
        if not self.paused or self.raw:
            self.deadline = self.NEVER
        elif self.behind < 0 or left < self.behind:
            self.behind = left
            self.deadline = self.server.now + self.server.settings.write_timeout_seconds
        else:
            reset_transport(self.transport)

    def _watch_sender(self) -> None:
        """A body is to come."""
        limit = self.server.settings.body_timeout_seconds
        self.body_at = self.server.now
        self.deadline = self.body_at + limit if limit else self.NEVER

    def _look_at_sender(self, current: Exchange) -> None:
        """Whether the body stands still for want of the visitor; what waits for room or for a tunnel is not its fault."""
        limits, now = self.server.settings, self.server.now
        limit = limits.body_timeout_seconds
        if any(name.lower() == b"expect" for name in current.fields[::2]):
            limit = max(limit, limits.first_byte_timeout_seconds)
        if current.blocked:
            self.body_at = now
        if self.body_at + limit > now:
            self.deadline = self.body_at + limit
        else:
            current.break_up("edge.body_timeout", "the request's body stands still")

    def cut_off(self) -> None:
        """The time for that is over. The bytes of an upgraded connection are not ours, so no WebSocket close frame can be put
        among them: its end is the end of the TCP connection (FIN), as for the rest."""
        self.transport.close()

    def drain(self) -> None:
        """The connection ends with its next answer, which says so."""
        self.draining = True

    def close_idle(self) -> None:
        """End the connection unless something is under way on it."""
        if self.current is None and self.asked is None and not self.in_head and not self.lingering:
            self.transport.close()


def tls_version(transport: asyncio.BaseTransport) -> str | None:
    """``TLSv1.3`` and the like; ``None`` without TLS."""
    tls = transport.get_extra_info("ssl_object")
    return tls.version() if tls is not None else None


def plain_address(peer: Any) -> str:
    """The client address as text, IPv4-mapped IPv6 as IPv4; empty for a Unix socket."""
    if not isinstance(peer, tuple):
        return ""
    address = str(peer[0]).split("%", 1)[0]
    return address[7:] if address.startswith("::ffff:") and "." in address else address


def presented_certificate(transport: asyncio.BaseTransport) -> bool:
    """Whether the visitor presented a certificate; the handshake verified it against the context's authority, or failed."""
    tls = transport.get_extra_info("ssl_object")
    return tls is not None and tls.getpeercert(binary_form=True) is not None
