"""Masked WebSocket messages (RFC 6455, 5.3), the way from agent to relay: cheaper than picows makes and reads them.

picows masks with stores that go past the cache, so that what it has masked or unmasked comes back from memory when it is
sent or copied right after: a quarter of a download's cost. Here unmasking is the copy that is needed anyway. The handshake,
small messages, and everything that is not masked stay with picows.

    transport ──bytes──► Reader ──messages──► Carrier          Carrier ──large message──► masked() ──► transport
"""

from __future__ import annotations

import asyncio
import os
from struct import Struct
from typing import Any, Final, Protocol, cast

from picows import WSCloseCode

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without a compiled wheel: right, and slow
    from websockets.utils import apply_mask

#: Bytes that one read may bring. Shared by all readers of the process: what a read brought is used before the next.
READ_BYTES: Final = 262_144
_SHARED: Final = memoryview(bytearray(READ_BYTES))
_U16: Final = Struct("!H")
_U64: Final = Struct("!Q")
_HEAD: Final = Struct("!BBQ")
_HEAD_16: Final = Struct("!BBH")
#: Opcodes (RFC 6455, 11.8).
BINARY, CLOSE, PING, PONG = 0x2, 0x8, 0x9, 0xA
_FINAL_BINARY: Final = 0x80 | BINARY
_MASKED: Final = 0x80


def masked(message: memoryview) -> tuple[bytes, bytes]:
    """Head and payload of a binary message of 126 bytes or more under a fresh key, to be written one after the other."""
    key = os.urandom(4)
    size = len(message)
    if size < 65_536:
        head = _HEAD_16.pack(_FINAL_BINARY, _MASKED | 126, size)
    else:
        head = _HEAD.pack(_FINAL_BINARY, _MASKED | 127, size)
    return head + key, apply_mask(message, key)


class Listener(Protocol):
    """Whom a :class:`Reader` tells what it read."""

    def on_message(self, message: bytes) -> None:
        """A whole binary message."""

    def on_control(self, kind: int, payload: bytes) -> None:
        """CLOSE, PING or PONG."""

    def end(self, code: WSCloseCode, reason: str) -> None:
        """The other side broke RFC 6455: send what is queued and a close frame, then disconnect."""


class Reader(asyncio.BufferedProtocol):
    """Reads a connection on which picows did the handshake; what else the transport reports goes to picows still.

    A message over ``limit`` bytes, an unmasked or fragmented one, or one of a kind that is not spoken here ends the
    connection, and nothing more of it is read.
    """

    def __init__(self, listener: Listener, transport: asyncio.Transport, limit: int) -> None:
        self._listener = listener
        self._limit = limit
        self._below = cast(Any, transport.get_protocol())
        self._rest = b""  # the beginning of a head
        self._partial: bytearray | None = None  # a message of which a part is here, masked
        self._filled = 0
        self._kind = self._length = 0
        self._key = b""
        self._over = False
        transport.set_protocol(self)

    # ── transport events ──────────────────────────────────────────────────────────────────────────────────────────
    def get_buffer(self, sizehint: int) -> memoryview:
        if self._partial is not None:
            return memoryview(self._partial)[self._filled :]
        rest = self._rest
        if not rest:
            return _SHARED
        _SHARED[: len(rest)] = rest
        return _SHARED[len(rest) :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._over:
            return
        partial = self._partial
        if partial is None:
            if not self._rest and _SHARED[0] == _FINAL_BINARY:
                # The usual read: one message of less than 64 KiB.
                length = _SHARED[1] - _MASKED
                body = 6
                if length == 126:
                    length = _SHARED[2] << 8 | _SHARED[3]
                    body = 8
                if body + length == nbytes and length != 127 and length >= 0:
                    self._listener.on_message(apply_mask(_SHARED[body:nbytes], bytes(_SHARED[body - 4 : body])))
                    return
            nbytes += len(self._rest)
            self._rest = b""
            self._read(_SHARED[:nbytes])
            return
        self._filled += nbytes
        if self._filled == len(partial):
            self._partial = None
            self._deliver(self._kind, apply_mask(partial, self._key))

    def eof_received(self) -> bool:
        return bool(self._below.eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._below.connection_lost(exc)

    def pause_writing(self) -> None:
        self._below.pause_writing()

    def resume_writing(self) -> None:
        self._below.resume_writing()

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────
    def _read(self, data: memoryview) -> None:
        """All whole messages of one read; the beginning of the next one is kept."""
        at, size = 0, len(data)
        while at < size:
            body = self._head(data, at, size)
            if body is None:
                return
            at = body + self._length
            if at > size:
                self._partial = partial = bytearray(self._length)
                self._filled = size - body
                partial[: self._filled] = data[body:]
                return
            self._deliver(self._kind, apply_mask(data[body:at], self._key))

    def _head(self, data: memoryview, at: int, size: int) -> int | None:
        """Read a head into ``_kind``, ``_length`` and ``_key``; where its payload begins. ``None`` when the head is not
        whole (it is kept) or nothing more is to be read."""
        body, length = at + 6, 0
        if size - at >= 2:
            length = data[at + 1] & 0x7F
            body += 2 if length == 126 else 8 if length == 127 else 0
        if body > size:
            self._rest = bytes(data[at:])
            return None
        if length == 126:
            length = _U16.unpack_from(data, at + 2)[0]
        elif length == 127:
            length = _U64.unpack_from(data, at + 2)[0]
        self._kind, self._length, self._key = data[at] & 0x0F, length, bytes(data[body - 4 : body])
        if not (data[at] == _FINAL_BINARY and data[at + 1] >= _MASKED and length <= self._limit):
            self._check(data[at], data[at + 1], length)
        return None if self._over else body

    def _check(self, first: int, second: int, length: int) -> None:
        """What is not an ordinary head: a control frame, or a fault that ends the connection."""
        control = self._kind in (CLOSE, PING, PONG)
        if second < _MASKED:
            self._fail(WSCloseCode.PROTOCOL_ERROR, "a client's frames are masked")
        elif first & 0x70 or (control and (first < 0x80 or length > 125)):
            self._fail(WSCloseCode.PROTOCOL_ERROR, "the frame's head is not valid")
        elif length > self._limit:
            self._fail(WSCloseCode.MESSAGE_TOO_BIG, f"a message of {length} bytes is over {self._limit}")
        elif first != _FINAL_BINARY and not control:
            self._fail(WSCloseCode.UNSUPPORTED_DATA, "only whole binary messages are spoken here")

    def _fail(self, code: WSCloseCode, reason: str) -> None:
        self._over = True
        self._listener.end(code, reason)

    def _deliver(self, kind: int, payload: bytes) -> None:
        if kind == BINARY:
            self._listener.on_message(payload)
        else:
            self._listener.on_control(kind, payload)
