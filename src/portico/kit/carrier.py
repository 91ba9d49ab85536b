"""One WebSocket as the carrier of a session: frames of a loop tick joined into one message, pings with a deadline.

Used by both ends. The carrier knows nothing of the frames; the session knows nothing of sockets (see :class:`Peer`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from struct import Struct
from time import monotonic
from typing import Protocol

from picows import WSCloseCode, WSFrame, WSListener, WSMsgType, WSTransport

from portico.kit.masked import CLOSE, PING, Reader, masked

log = logging.getLogger("portico.carrier")

HEADROOM = 14
_PAD = bytes(HEADROOM)
_JOIN = bytearray()
_STAMP = Struct("!d")

_BINARY = WSMsgType.BINARY

MAX_MESSAGE = 1_048_576
#: Messages up to this size are copied as they come; of larger ones the session takes parts.
COPIED = 16_384
#: Small frames are joined into messages of at most about this many bytes.
JOIN_LIMIT = 262_144
#: Messages from this size on are masked by us (see :mod:`portico.kit.masked`).
MASK_FROM = 4_096
#: A peer that reads nothing while it makes us answer is cut off at this many unsent bytes.
MAX_UNSENT = 67_108_864
#: Unsent bytes above which streams are told to wait.
HIGH_WATER = 1_048_576


class Peer(Protocol):
    """The session on top of the carrier."""

    wake: Callable[[], None]
    heard: float
    began: float
    bulky: bool

    def feed(self, message: bytes | memoryview) -> bool:
        """Take one message; ``False`` ends the connection after what is queued was sent."""

    def take(self) -> list[bytes | bytearray]:
        """What is queued: small frames, and, if :attr:`bulky` is set, large ones."""

    def next_turn(self) -> None:
        """What was taken is with the transport."""

    def ping(self, payload: bytes) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self, detail: str = ...) -> None: ...


class Carrier(WSListener):
    """Carries ``session`` over one picows WebSocket. ``on_lost(detail)`` is called once, when the connection is gone.

    ``ping_interval`` and ``ping_timeout`` are seconds: a connection on which nothing was heard for their sum is aborted.
    """

    def __init__(
        self,
        session: Peer,
        *,
        ping_interval: float,
        ping_timeout: float,
        on_lost: Callable[[str], None],
        on_open: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.session = session
        self.ping_interval = ping_interval
        self.ping_timeout = ping_timeout
        self.transport: WSTransport | None = None
        self.rtt: float | None = None
        self.heard = 0.0
        self._on_lost = on_lost
        self._on_open = on_open
        self._loop = asyncio.get_running_loop()
        self._ticked = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._scheduled = False
        self._reason = "connection lost"
        self._ended = False
        session.wake = self._wake

    # ── WebSocket events ──────────────────────────────────────────────────────────────────────────────────────────
    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport
        transport.underlying_transport.set_write_buffer_limits(high=HIGH_WATER, low=HIGH_WATER // 4)
        if not transport.is_client_side:
            Reader(self, transport.underlying_transport, MAX_MESSAGE)
        self.heard = self._ticked = self._loop.time()
        self._timer = self._loop.call_later(self.ping_interval, self._tick)
        if self._on_open is not None:
            self._on_open()
        self._wake()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        kind = frame.msg_type
        if kind == _BINARY and frame.fin:
            small = frame.payload_size <= COPIED
            self.on_message(frame.get_payload_as_bytes() if small else frame.get_payload_as_memoryview())
        elif kind in (WSMsgType.CLOSE, WSMsgType.PING, WSMsgType.PONG):
            self.on_control(kind.value, frame.get_payload_as_bytes())
        else:
            self.end(WSCloseCode.UNSUPPORTED_DATA, "only whole binary messages are spoken here")

    def on_message(self, message: bytes | memoryview) -> None:
        """A whole binary message."""
        # The clock of the loop, but as fine as there is: uvloop's counts whole milliseconds.
        self.heard = self.session.heard = monotonic()
        if not self.session.feed(message):
            self.end(WSCloseCode.PROTOCOL_ERROR, "session ended")

    def on_control(self, kind: int, payload: bytes) -> None:
        """CLOSE, PING or PONG."""
        self.heard = self._loop.time()
        transport = self.transport
        assert transport is not None
        if kind == CLOSE:
            self._reason = payload[2:].decode(errors="replace") or "closed by the other side"
            transport.disconnect()
        elif kind == PING and transport.underlying_transport.get_write_buffer_size() < HIGH_WATER:
            # picows would answer without a look at what is unsent: a peer that reads nothing could fill our memory.
            transport.send_pong(payload)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self.session.close(self._reason)
        self._on_lost(self._reason)

    def pause_writing(self) -> None:
        self.session.pause()

    def resume_writing(self) -> None:
        self.session.resume()

    # ── sending ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _wake(self) -> None:
        if not self._scheduled and self.transport is not None:
            self._scheduled = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Send what is queued: small frames joined, a large frame (``bytearray`` with headroom) as a message of its own."""
        self._scheduled = False
        transport = self.transport
        if transport is None or self._ended:
            return
        session = self.session
        bulky = session.bulky
        parts = session.take()
        session.began = 0.0
        if bulky:
            self._send_each(parts)
        elif parts:
            message = _JOIN.join((_PAD, *parts))  # nearly always that is all
            if len(message) <= JOIN_LIMIT + HEADROOM:
                self._send(message)
            else:
                self._send_each(parts)
        session.next_turn()

    def _send_each(self, parts: list[bytes | bytearray]) -> None:
        """Large frames as messages of their own, small ones joined as far as they fit."""
        small: list[bytes] = [_PAD]
        size = 0
        for part in parts:
            if type(part) is bytearray:
                if size:
                    self._send(_JOIN.join(small))
                    small, size = [_PAD], 0
                self._send(part)
                continue
            if size + len(part) > JOIN_LIMIT:
                self._send(_JOIN.join(small))
                small, size = [_PAD], 0
            small.append(part)  # type: ignore[arg-type]
            size += len(part)
        if size:
            self._send(_JOIN.join(small))

    def _send(self, message: bytearray) -> None:
        transport = self.transport
        assert transport is not None
        if len(message) >= MASK_FROM and transport.is_client_side:
            transport.underlying_transport.writelines(masked(memoryview(message)[HEADROOM:]))
        else:
            # The one picows call that never keeps a reference to a buffer of ours, and frames it in place.
            transport.send_reuse_external_bytearray(_BINARY, message, HEADROOM)
        if transport.underlying_transport.get_write_buffer_size() > MAX_UNSENT:
            self.abort("the other side does not read")

    # ── ending ────────────────────────────────────────────────────────────────────────────────────────────────────
    def end(self, code: WSCloseCode, reason: str) -> None:
        """Send what is queued and a close frame, then disconnect."""
        if self.transport is None or self._ended:
            return
        self.flush()
        self._reason = reason
        self.transport.send_close(code, reason.encode()[:120])
        self.transport.disconnect()

    def abort(self, reason: str) -> None:
        """Cut the connection without waiting for anything."""
        if self.transport is not None and not self._ended:
            self._reason = reason
            self.transport.disconnect(graceful=False)

    # ── pings ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def set_pace(self, interval: float, timeout: float) -> None:
        """Take over the other side's ping interval and timeout (seconds), from now on."""
        self.ping_interval, self.ping_timeout = interval, timeout
        if self._timer is not None and not self._ended:
            self._timer.cancel()
            self._timer = self._loop.call_later(min(interval, timeout), self._tick)

    def probe(self) -> None:
        """Send a ping now; :attr:`heard` tells whether anything came back."""
        self.session.ping(_STAMP.pack(self._loop.time()))

    def note_pong(self, payload: bytes) -> None:
        """Take the round-trip time from a PONG of ours."""
        rtt = self._loop.time() - _STAMP.unpack(payload)[0]
        if 0 <= rtt < 3600:
            self.rtt = rtt

    def _tick(self) -> None:
        now = self._loop.time()
        if now - self._ticked > self.ping_interval + self.ping_timeout:
            # This process itself stood still (stopped, or the machine slept): the silence proves nothing yet.
            self.heard = now
        self._ticked = now
        if now - self.heard > self.ping_interval + self.ping_timeout:
            self.abort(f"no sign of life for {now - self.heard:.0f} s")
            return
        self.probe()
        self._timer = self._loop.call_later(min(self.ping_interval, self.ping_timeout), self._tick)
