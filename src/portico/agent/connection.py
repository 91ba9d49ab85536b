"""One connection to the target: parses its responses and carries them, within credit, into the stream being served.

    idle ──attach(exchange)──► head ──► body (parser, or counted down) ──► done ──► idle or closed
                                 └──101──► raw (portico.agent.raw takes the transport over)

Nothing piles up here: a read is never larger than the stream's credit, and at zero credit reading stops. What a decoder
still yields above that (the head's own read) is held, bounded by one read.
"""

from __future__ import annotations

import asyncio
import logging
import os
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Literal

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from portico.agent.heads import KNOWN_ANSWERS, HeadError, KnownAnswer, ResponseHead, trailer_fields
from portico.kit.gone import GONE
from portico.kit.sockets import reset_transport
from portico.wire import frames as f

if TYPE_CHECKING:
    from portico.agent.forward import Exchange, Forwarder
    from portico.agent.pool import Pool
    from portico.agent.raw import RawPipe
    from portico.wire.session import Session
    from portico.wire.stream import Stream

log = logging.getLogger("portico.agent")

#: Smallest read: credit below it would mean a system call for a few bytes.
MIN_READ = 4096
#: From this Content-Length on the body bypasses the parser: no copy but the one into the frame.
BYPASS = 65_536
#: Bytes of an answer that may be taken whole, head and body.
SMALL = 16_384
#: Bytes of the read that brings an answer's head.
HEAD_READ = 65_536
#: Answers without the usual framing, and refusals, which a :class:`hints.HostHint` wants to see.
_NOT_LEARNED = frozenset((204, 304, 400, 403))
_known: Final = KNOWN_ANSWERS.get
#: One receive buffer for all connections of a loop: bytes are used before the next read.
RECEIVE_BYTES = 131_072


class TargetConnection(asyncio.BufferedProtocol):
    """See the module. ``pool`` owns it while it is idle, ``exchange`` while it serves a request, ``raw`` after a 101."""

    lazy: Literal[True] = True
    __slots__ = (
        "asked", "chunked", "close_after", "complete", "exchange", "fields", "fresh_parser", "head", "head_bytes",
        "head_size", "head_view", "held",
        "held_end", "idle_since", "junk", "left", "lost", "parser", "pool", "raw", "reading_paused", "reason",
        "reused", "skip_body", "transport", "unknown", "view", "write_paused", "writing_since",
    )  # fmt: skip

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.view = pool.view
        self.head_view = self.view[:HEAD_READ]
        self.transport: Any = None
        self.exchange: Exchange | None = None
        self.raw: RawPipe | None = None
        self.parser: Any = HttpResponseParser(self)
        self.reused = self.lost = self.write_paused = self.reading_paused = False
        self.idle_since = self.writing_since = 0.0
        self.head_size = 0  # of the last answer, in bytes
        self.unknown = b""  # the first read of an answer whose head was not known
        #: Session, stream id, forwarder, method, target, bytes written and when, and the request's own id, of a request that
        #: nothing was heard of.
        self.asked: tuple[Session, int, Forwarder, bytes, bytes, bytes, float, bytes] | None = None
        self.held: list[bytes] = []
        self._reset()

    def _reset(self) -> None:
        """Be ready for the next response."""
        self.head: ResponseHead | None = None
        self.fields: list[bytes] = []
        self.reason = b""
        self.left = -1
        self.head_bytes = 0
        self.held_end: list[bytes] | None = None
        self.chunked = self.close_after = self.complete = self.fresh_parser = self.junk = self.skip_body = False

    # ── transport events ──────────────────────────────────────────────────────────────────────────────────────────
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=self.pool.settings.target_write_buffer_bytes)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self.head is None and self.raw is None:
            # A head, and what comes with it: what of that is above the credit is held.
            return self.head_view
        owner = self.exchange or self.raw
        if owner is None:
            return self.view
        credit = owner.stream.sendable()
        if credit >= RECEIVE_BYTES:
            return self.view
        return self.view[: credit if credit > MIN_READ else MIN_READ]

    def buffer_updated(self, nbytes: int) -> None:
        if self.asked is not None and self._answer(nbytes):
            return
        exchange = self.exchange
        if exchange is None:
            if self.raw is not None:
                self.raw.received(self.view[:nbytes])
            else:
                # Bytes that nobody asked for: whatever they are, they must not answer the next request.
                self.abort()
            return
        if self.fresh_parser and self.left > 0:
            self._count_down(exchange, nbytes)
            return
        try:
            self.parser.feed_data(self.view[:nbytes])
        except HttpParserUpgrade as upgrade:
            self._switch(exchange, nbytes, upgrade.args[0])
        except HttpParserError as err:
            self._broken(exchange, err)
        else:
            self._after_read(exchange, nbytes)

    def _answer(self, nbytes: int) -> bool:
        """A whole answer in the first read of it, whose head is known, to what was asked; else it is for the exchange."""
        assert self.asked is not None
        session, ident, forwarder, method, target, out, started, request = self.asked
        if nbytes <= SMALL:
            data = self.view[:nbytes].tobytes()
            size = self.head_size
            known = _known(data[:size])  # heads of one app are mostly of one size
            if known is None and (size := data.find(b"\r\n\r\n") + 4) != self.head_size:
                self.head_size = size
                known = _known(data[:size])
            if known is not None and not session.congested:
                length, payload, status = known
                if length == nbytes - size <= session.send_credit:
                    self.asked = None
                    body = data[size:]
                    session.answer(ident, payload, body)
                    now = perf_counter()
                    if forwarder.tap is not None:
                        forwarder.tap.whole(out, started, now, status, payload, body)
                    forwarder.stats.answered(method, target, status, started, now, request)
                    pool = self.pool
                    if pool.waiting or len(pool.idle) >= pool.idle_max:
                        pool.release(self, now)
                    else:  # as `release` does; the timer runs while there are connections
                        self.idle_since = now
                        pool.idle.append(self)
                    return True
            self.unknown = data
        self.materialise()
        return False

    def materialise(self) -> Stream:
        """The exchange of what was asked, since something else than a whole answer happened to it."""
        from portico.agent.forward import Exchange

        assert self.asked is not None
        session, ident, forwarder, method, target, out, started, request = self.asked
        self.asked = None
        self.exchange = exchange = Exchange(forwarder, method, target)
        exchange.stream = stream = session.make(ident, exchange)
        exchange.resume(self, out, started, request)
        return stream

    def on_whole(self, response: bytes, body: bytes) -> bool:
        """Not sent to agents (the session refuses it)."""
        return False

    def _learn(self, exchange: Exchange) -> None:
        """Remember the head of an answer that came in one read, ended by its length and kept the connection."""
        data, self.unknown = self.unknown, b""
        size = data.find(b"\r\n\r\n") + 4
        head = data[:size]
        known = self.head
        status = exchange.status
        if known is None or known.length != len(data) - size or self.close_after or self.junk or self.held:
            return
        if status >= 200 and status not in _NOT_LEARNED and KNOWN_ANSWERS.worth(head):
            response = f.encode_response(status, known.fields)
            KNOWN_ANSWERS.remember(head, KnownAnswer(known.length, f.encode_answer(response), status))

    def _after_read(self, exchange: Exchange, nbytes: int) -> None:
        if self.complete:
            if self.unknown:
                self._learn(exchange)
            if self.held:
                self.hold()
            else:
                self._finish(exchange)
            return
        self.unknown = b""
        if self.head is None:
            self.head_bytes += nbytes
            if self.head_bytes > self.pool.settings.target_head_max_bytes:
                exchange.fail(
                    f.TARGET_INVALID, f"the response head is over {self.pool.settings.target_head_max_bytes} bytes"
                )
        elif self.held or exchange.stream.sendable() <= 0:
            self.hold()

    def _count_down(self, exchange: Exchange, nbytes: int) -> None:
        """Body of a known length that bypasses the parser."""
        size = nbytes if nbytes <= self.left else self.left
        self.junk = size < nbytes
        self._send(exchange, self.view[:size])
        if self.left == 0:
            self.complete = True
        self._after_read(exchange, nbytes)

    def eof_received(self) -> bool:
        if self.asked is not None:
            self.materialise()
        if self.raw is not None:
            return self.raw.eof()
        exchange = self.exchange
        if exchange is not None:
            self._ended(exchange, None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.asked is not None:
            self.materialise()
        self.pool.forget(self)
        if self.raw is not None:
            self.raw.lost(exc)
            self.transport = GONE
            return
        if exc is not None and self.exchange is not None and not self.complete:
            self._read_rest()
        if self.exchange is not None:
            self._ended(self.exchange, exc)
        self.transport = GONE

    def _read_rest(self) -> None:
        """A write failed since the target wants no more of the request; why it does not, it said before: that is still
        in the kernel, and the loop does not read it any more."""
        sock = self.transport.get_extra_info("socket")
        if sock is None or self.transport.get_extra_info("ssl_object") is not None or not hasattr(os, "readv"):
            return
        while self.exchange is not None and not self.held:
            try:
                size = os.readv(sock.fileno(), [self.get_buffer(-1)])
            except OSError:
                return
            if not size:
                return
            self.buffer_updated(size)

    def _ended(self, exchange: Exchange, exc: Exception | None) -> None:
        """The target closed the connection while it owed (part of) a response."""
        if self.complete:
            self.junk = True
            if not self.held:
                self._finish(exchange)
        elif self.head is None:
            exchange.lost_before_head(self, exc, nothing_arrived=self.head_bytes == 0 and not self.reason)
        elif exc is None and self.left < 0 and not self.chunked:
            self.complete = self.junk = True
            self._end_body(exchange, [])
            if not self.held:
                self._finish(exchange)
        else:
            exchange.fail(f.TARGET_RESET, "the target closed the connection in the middle of its answer")

    def pause_writing(self) -> None:
        self.write_paused = True
        self.writing_since = self.pool.loop.time()

    def resume_writing(self) -> None:
        self.write_paused = False
        owner = self.exchange or self.raw
        if owner is not None:
            # A buffer that empties within the tick is no slow reader: only real waits cost a stream its window.
            if self.pool.loop.time() - self.writing_since > 0.02:
                owner.stream.stalled = True
            owner.writable()

    # ── parser callbacks ──────────────────────────────────────────────────────────────────────────────────────────
    def on_message_begin(self) -> None:
        if self.complete:
            self.junk = True

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields += (name, value)

    def on_headers_complete(self) -> None:
        exchange = self.exchange
        if self.complete or exchange is None:
            self.junk = True
            return
        parser = self.parser
        status = parser.get_status_code()
        if not self.reused and parser.get_http_version() not in ("1.1", "1.0"):
            raise HeadError(f"it speaks HTTP/{parser.get_http_version()}")
        if not 100 <= status <= 599:
            raise HeadError(f"status {status} does not exist")
        head = ResponseHead(self.reason, self.fields, status)
        self.fields = []
        if status < 200:
            self._interim(exchange, status, head)
            return
        self.head = head
        self.chunked = head.chunked
        if exchange.bodiless or status == 204 or status == 304:
            self.left = 0
            self.chunked = False
            # The parser does not know HEAD: it would wait for the body that Content-Length speaks of.
            self.fresh_parser = self.skip_body = exchange.bodiless
            self.complete = exchange.bodiless
            self.close_after = head.close or (parser.get_http_version() == "1.0")
        else:
            self.left = head.length
            self.close_after = not parser.should_keep_alive()
        exchange.respond(status, head.fields, end=self.left == 0)

    def _interim(self, exchange: Exchange, status: int, head: ResponseHead) -> None:
        if status == 101:
            # Without "Connection: upgrade" the parser does not switch either, and nobody would ever take the bytes.
            if not exchange.upgrade or not head.upgrade or not self.parser.should_upgrade():
                raise HeadError("it switched protocols without being asked")
            self.head = head
            self.skip_body = True
            return
        if head.length > 0 or head.chunked:
            # The parser would read a body, which no frame may carry here: it would end the session of all tunnels.
            raise HeadError(f"an interim answer ({status}) with a body")
        exchange.touched()
        if exchange.entry is not None:
            exchange.entry.interim(status, head.fields)
        exchange.stream.send_interim(status, head.fields)

    def on_body(self, body: bytes) -> None:
        exchange = self.exchange
        if self.skip_body or self.complete or exchange is None:
            self.junk = True
            return
        self._send(exchange, body)
        if self.left >= BYPASS:
            self.fresh_parser = True

    def on_message_complete(self) -> None:
        exchange = self.exchange
        if self.head is None:
            # An interim response is over, the next head begins.
            self.reason = b""
            self.head_bytes = 0
            return
        if self.complete or self.skip_body or exchange is None:
            return
        self.complete = True
        if self.left < 0:
            self._end_body(exchange, trailer_fields(self.fields) if self.chunked else [])

    # ── body towards the relay ────────────────────────────────────────────────────────────────────────────────────
    def _send(self, exchange: Exchange, data: bytes | memoryview) -> None:
        stream = exchange.stream
        if exchange.entry is not None:
            exchange.entry.response_data(data)
        size = len(data)
        end = False
        if self.left >= 0:
            self.left -= size
            end = self.left == 0
        room = 0 if self.held else stream.sendable()
        if size <= room:
            stream.send_data(data, end)
            return
        if room > 0:
            stream.send_data(data[:room])
        self.held.append(bytes(data[max(room, 0) :]))
        if end:
            self.held_end = []

    def _end_body(self, exchange: Exchange, trailers: list[bytes]) -> None:
        if trailers and exchange.entry is not None:
            exchange.entry.response_trailers(trailers)
        if self.held:
            self.held_end = trailers
        else:
            exchange.stream.send_end(trailers)

    def hold(self) -> None:
        """Stop reading until the relay grants credit."""
        owner = self.exchange or self.raw
        if owner is None:
            return
        if not self.reading_paused and not self.lost:
            self.reading_paused = True
            self.transport.pause_reading()
        owner.stream.wait()

    def credit(self) -> None:
        """The stream may send again: what is held goes first."""
        exchange = self.exchange
        if exchange is None:
            return
        stream = exchange.stream
        while self.held:
            room = stream.sendable()
            if room <= 0:
                stream.wait()
                return
            data = self.held[0]
            stream.send_data(data[:room])
            if room < len(data):
                self.held[0] = data[room:]
            else:
                del self.held[0]
        if self.held_end is not None:
            stream.send_end(self.held_end)
        if self.complete:
            self._finish(exchange)
        elif stream.sendable() <= 0:
            stream.wait()
        else:
            self.unpause()

    def unpause(self) -> None:
        """Read from the target again."""
        if self.reading_paused and not self.lost:
            self.reading_paused = False
            self.transport.resume_reading()

    # ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _finish(self, exchange: Exchange) -> None:
        """The response is with the relay, whole. Keep the connection only when nothing about it is doubtful."""
        self.exchange = None
        keep = not (self.close_after or self.junk or self.lost) and exchange.sent_whole() and not self.write_paused
        exchange.finished()
        if not keep:
            self.abort()
            return
        if self.fresh_parser:
            self.parser = HttpResponseParser(self)
        if self.chunked or self.reading_paused or self.fresh_parser or not self.reused:
            self._reset()
            self.unpause()
            self.reused = True
        else:
            # The usual case: only this much has changed.
            self.head = None
            self.reason = b""
            self.left = -1
            self.head_bytes = 0
            self.complete = False
        self.pool.release(self, perf_counter())

    def _switch(self, exchange: Exchange, nbytes: int, offset: int) -> None:
        """101: from ``offset`` on the bytes belong to the new protocol; they may have come in the same segment."""
        assert self.head is not None
        self.exchange = None
        self.pool.forget(self)
        self.raw = exchange.switch(self, self.head.fields)
        if offset < nbytes:
            self.raw.received(self.view[offset:nbytes])

    def _broken(self, exchange: Exchange, err: Exception) -> None:
        if self.complete:
            self.junk = True
            if not self.held:
                self._finish(exchange)
            return
        cause = err.__context__ if isinstance(err.__context__, HeadError) else err
        if cause is err and err.__context__ is not None:
            log.error("fault while reading the target's answer", exc_info=err.__context__)
        code = f.TARGET_RESET if exchange.status else f.TARGET_INVALID
        exchange.fail(code, f"the target's answer is not valid HTTP: {cause}")

    def abort(self) -> None:
        """Close at once; nothing more is heard of the connection."""
        if self.asked is not None:
            self.materialise()  # what it serves is cut with it, and not sent again once the transport says that it is lost
        self.exchange = None
        self.raw = None
        self.pool.forget(self)
        if self.transport is not None and not self.lost:
            self.transport.abort()

    def reset(self) -> None:
        """Close at once with RST, so that the target does not take what it got for all that there was."""
        self.raw = None
        self.pool.forget(self)
        if not self.lost and self.transport.get_write_buffer_size():
            self.pool.loop.call_soon(self._cut)  # what was written in this tick goes first
        else:
            self._cut()

    def _cut(self) -> None:
        if not self.lost:
            reset_transport(self.transport)
