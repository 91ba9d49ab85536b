"""Agent-side termination: TLS with the visitor on one side of a stream, plain bytes for the pipe to the target on the other.

    relay ◄── Stream (TLS records) ──► TlsStream ──► RawPipe (plain bytes) ──► target

It is the sink of its stream and looks like a stream to its pipe, so that nothing else of a connection differs. A half-close
is a close_notify each way (RFC 8446, 6.1); an end without one may be cut off by somebody on the way, so the target sees a
reset and not an end. No byte is sent before OPENED, so the handshake begins when the target has accepted.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Final

from portico.agent.raw import RawPipe
from portico.wire import frames as f
from portico.wire.stream import Stream

#: The longest plain text of a TLS record, and more than a record adds to it with any suite that is offered.
RECORD: Final = 16_384
OVERHEAD: Final = 64


class TlsStream:
    """See the module. ``failed`` is called with a sentence when a visitor's TLS fails; ``doubts`` says of a name that a visitor
    asked for what it may have against the certificate. ``pipe`` is set right after the making."""

    __slots__ = (
        "_doubts", "_eof", "_failed", "_incoming", "_loop", "_opened", "_out", "_outgoing", "_over", "_ready",
        "_recv_ended", "_said_end", "_send_ended", "_timer", "_tls", "_unpaid", "_unread", "_wanted", "_within", "pipe",
        "stream",
    )  # fmt: skip

    pipe: RawPipe

    def __init__(
        self,
        stream: Stream,
        context: ssl.SSLContext,
        failed: Callable[[str], None],
        handshake_seconds: float,
        doubts: Callable[[str | None], str] = lambda name: "",
    ) -> None:
        self.stream = stream
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._failed = failed
        self._doubts = doubts
        self._within = handshake_seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._out = b""  # records that wait for credit
        self._unread = 0  # plain bytes that the pipe has not taken yet
        self._unpaid = 0  # bytes of the stream whose credit has not been returned
        self._opened = self._ready = self._eof = self._over = self._wanted = False
        self._recv_ended = self._send_ended = self._said_end = False

    # ── as the stream of a pipe ───────────────────────────────────────────────────────────────────────────────────
    @property
    def closed(self) -> bool:
        """Both directions ended, or the stream did."""
        return self._over or (self._send_ended and self._recv_ended) or self.stream.closed

    @property
    def stalled(self) -> bool:
        return self.stream.stalled

    @stalled.setter
    def stalled(self, slow: bool) -> None:
        self.stream.stalled = slow

    def sendable(self) -> int:
        """How many plain bytes fit into the stream's credit as records."""
        if not self._ready or self._out:
            return 0
        room = self.stream.sendable()
        room -= (room // RECORD + 1) * OVERHEAD
        return room if room > 0 else 0

    def wait(self) -> None:
        self._wanted = True
        if self._ready:
            self.stream.wait()

    def send_opened(self) -> None:
        self.stream.send_opened()
        self._opened = True
        self._timer = self._loop.call_later(self._within, self._late)
        self._loop.call_soon(self._pump)  # once the pipe has its connection

    def send_data(self, data: bytes | memoryview) -> None:
        if self._over or self._send_ended:
            return
        try:
            while data:
                data = data[self._tls.write(data) :]
        except ssl.SSLError as err:
            self._fail(err)
            return
        self._flush()

    def send_end(self) -> None:
        """A close_notify: nothing more comes this way. What the visitor still sends is read on (RFC 8446, 6.1)."""
        if self._send_ended or self._over:
            return
        self._send_ended = True
        self._say_end()

    def _say_end(self) -> None:
        """Not before the handshake is done, and not before what came was read: OpenSSL would refuse that."""
        if self._said_end or not self._ready:
            return
        self._said_end = True
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass  # it asks for the visitor's, which comes in its own time
        self._flush()

    def consumed(self, size: int) -> None:
        self._unread -= size
        self._pay()

    def reset(self, code: int, detail: str = "") -> None:
        """End both ways; an orderly end lets go of what waits for credit first."""
        if self._over:
            return
        self._end()
        if code != f.NO_ERROR or not self._out:
            self.stream.reset(code, detail)

    # ── as the sink of the stream ─────────────────────────────────────────────────────────────────────────────────
    def on_data(self, data: bytes, end: bool) -> None:
        self._unpaid += len(data)
        if self._over or self._recv_ended:
            self._pay()
        else:
            self._incoming.write(data)
            self._pump()
        if end:
            self.on_end([])

    def on_end(self, trailers: list[bytes]) -> None:
        self._eof = True
        self._pump()

    def on_reset(self, code: int, detail: str) -> None:
        self._end()
        self.pipe.on_reset(code, detail)

    def on_credit(self) -> None:
        self._flush()
        if self._wanted and not self._over and self._ready:
            if self.sendable() > 0:
                self._wanted = False
                self.pipe.on_credit()
            else:
                self.stream.wait()

    def on_response(self, status: int, head: list[bytes], end: bool) -> None: ...
    def on_interim(self, status: int, head: list[bytes]) -> None: ...
    def on_opened(self) -> None: ...

    # ── TLS ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def _pump(self) -> None:
        """Go on with what came: the handshake, then records."""
        if self._over or not self._opened:
            return
        try:
            if not self._ready:
                self._tls.do_handshake()
                self._shake_hands()
            self._read()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as err:
            self._fail(err)
            return
        if self._send_ended:
            self._say_end()
        self._flush()
        self._pay()
        if self._eof and not self._recv_ended and not self._over:
            self._cut()

    def _shake_hands(self) -> None:
        """The handshake is done."""
        self._ready = True
        if self._timer is not None:
            self._timer.cancel()
        self._flush()
        if self._wanted:
            self.on_credit()

    def _read(self) -> None:
        """Plain bytes of all complete records to the pipe; raises ``SSLWantReadError`` when there are no more."""
        while not self._over:
            try:
                plain = self._tls.read(RECORD)
            except ssl.SSLZeroReturnError:
                plain = b""
            if not plain:
                self._recv_ended = True
                self.pipe.on_end([])
                if self._send_ended:
                    self._say_end()
                    self._close()
                return
            self._unread += len(plain)
            self.pipe.on_data(plain, False)

    def _flush(self) -> None:
        """Send records as far as there is credit, and end the stream behind the last one."""
        if self._outgoing.pending:
            self._out += self._outgoing.read()
        stream = self.stream
        if stream.send_ended:  # OpenSSL answers what comes later, an error among it; nobody hears that any more
            self._out = b""
        while self._out and (room := stream.sendable()) > 0:
            part, self._out = self._out[:room], self._out[room:]
            stream.send_data(part)
        if self._out:
            stream.wait()
        elif self._over:
            stream.reset(f.NO_ERROR, "the connection is complete")
        elif self._said_end:
            if self._recv_ended:
                self._close()
            else:
                stream.send_end()

    def _pay(self) -> None:
        """Return the credit of records whose plain bytes the target has taken."""
        if self._unread <= 0 and self._unpaid:
            size, self._unpaid = self._unpaid, 0
            self.stream.consumed(size)

    # ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _end(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()

    def _close(self) -> None:
        """Both directions are complete: what waits for credit goes, then the end."""
        if not self._over:
            self._end()
            self._flush()

    def _cut(self) -> None:
        """The visitor's bytes ended without a close_notify."""
        if not self._ready:
            self._end()
            self.pipe.on_reset(f.CANCELLED, "the visitor left in its TLS handshake")
            self.stream.reset(f.NO_ERROR, "the visitor left in its TLS handshake")
            return
        self._end()
        self.pipe.on_reset(f.CANCELLED, "the visitor's TLS ended without a close_notify")
        self.stream.reset(f.NO_ERROR, "the visitor's TLS ended without a close_notify")

    def _late(self) -> None:
        self._give_up(f"was not complete within {self._within:g} s")

    def _fail(self, err: ssl.SSLError) -> None:
        sentence = f"failed: {why(err)}"
        if str(err.reason or "") in DISTRUST and (more := self._doubts(getattr(self._tls, "asked_for", None))):
            sentence += f"; {more}"
        self._give_up(sentence)

    def _give_up(self, sentence: str) -> None:
        """An alert, if OpenSSL has one for it, is the last thing that the visitor hears."""
        if self._over:
            return
        stage = "" if self._ready else " handshake"
        self._end()
        self._failed(f"a visitor's TLS{stage} {sentence}")
        self.pipe.on_reset(f.CANCELLED, sentence)
        self._flush()


#: Alerts of visitors that do not take a certificate. Many say all of it with the last one.
DISTRUST: Final = frozenset((
    "TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_CERTIFICATE_EXPIRED",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
))  # fmt: skip
_REASONS: Final = {
    "NO_SHARED_CIPHER": "it offers none of the cipher suites that are taken",
    "UNSUPPORTED_PROTOCOL": "it offers no version of TLS from 1.2 on",
    "HTTP_REQUEST": "it speaks HTTP without TLS",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not trust the certificate (unknown authority)",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not take the certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it found the certificate expired",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not trust the certificate",
    "NO_APPLICATION_PROTOCOL": "it offers none of the protocols of tls_alpn",
}


def why(err: ssl.SSLError) -> str:
    """One plain clause for a failure of OpenSSL's."""
    reason = str(err.reason or "")
    return _REASONS.get(reason) or (reason.lower().replace("_", " ") if reason else "it is not valid TLS")
