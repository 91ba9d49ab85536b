"""WebSocket frames by hand (RFC 6455, 5.2), right and wrong, and compressed ones (RFC 7692)."""

from __future__ import annotations

import struct
import zlib

from tests.system.visitor import mask

TEXT, BINARY, CLOSE, PING, PONG, CONTINUE = 1, 2, 8, 9, 10, 0
KEY = b"\x12\x34\x56\x78"


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, key: bytes | None = KEY, size_as: int = 0
) -> bytes:
    """One frame of a client. ``key``: ``None`` leaves the mask off. ``size_as``: 126 or 127 for a length longer than needed."""
    size = len(payload)
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    masked = 0x80 if key is not None else 0
    if size_as == 127 or size > 65535:
        head = struct.pack("!BBQ", first, masked | 127, size)
    elif size_as == 126 or size > 125:
        head = struct.pack("!BBH", first, masked | 126, size)
    else:
        head = struct.pack("!BB", first, masked | size)
    return head + (payload if key is None else key + mask(payload, key))


def close(code: int | None = 1000, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason)


def fragments(opcode: int, *parts: bytes, rsv: int = 0, between: bytes = b"") -> bytes:
    """A message in several frames, with ``between`` after each but the last."""
    out = b""
    for at, part in enumerate(parts):
        last = at == len(parts) - 1
        out += frame(CONTINUE if at else opcode, part, fin=last, rsv=0 if at else rsv)
        out += b"" if last else between
    return out


class Deflater:
    """Messages of one direction, compressed with one window."""

    def __init__(self, bits: int = 15) -> None:
        self._compressor = zlib.compressobj(wbits=-bits)

    def __call__(self, data: bytes) -> bytes:
        return (self._compressor.compress(data) + self._compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(
            b"\x00\x00\xff\xff"
        )
