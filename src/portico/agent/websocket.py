"""WebSocket messages in the recorded bytes of one direction (RFC 6455, and permessage-deflate of RFC 7692), for showing."""

from __future__ import annotations

import base64
import zlib
from itertools import cycle
from typing import Any

#: Messages of one direction that are shown.
MOST = 1000
_NAMES = {1: "text", 2: "binary", 8: "close", 9: "ping", 10: "pong"}


def messages(data: bytes, extensions: str, side: str, limit: int) -> list[dict[str, Any]]:
    """What ``side`` (``client`` or ``server``) sent: ``type``, ``bytes`` on the wire, and ``text`` or ``base64``.

    ``limit`` bounds the bytes that compressed messages unpack to. A message whose end was not kept has ``cut``; bytes that
    are no frame end the list.
    """
    unpack = _Unpack(extensions, side, limit)
    found: list[dict[str, Any]] = []
    parts: list[bytes] = []
    kind, packed, at = 0, False, 0
    while len(found) < MOST and (frame := _frame(data, at)) is not None:
        first, payload, size, at = frame
        opcode, final = first & 15, bool(first & 0x80)
        if opcode in (8, 9, 10):
            found.append(_shown(opcode, payload, size))
            continue
        if (opcode == 0 and not kind) or opcode not in (0, 1, 2):
            break
        if opcode:
            kind, packed, parts = opcode, bool(first & 0x40), []
        parts.append(payload)
        cut = len(payload) < size
        if final or cut:
            whole = b"".join(parts)
            found.append(_shown(kind, unpack(whole) if packed else whole, len(whole), cut=cut))
            kind = 0
    return found


def _frame(data: bytes, at: int) -> tuple[int, bytes, int, int] | None:
    """First byte, payload (as far as it is there), its length, and where the next frame begins."""
    if len(data) < at + 2:
        return None
    first, second = data[at], data[at + 1]
    at += 2
    size = second & 127
    if size > 125:
        width = 2 if size == 126 else 8
        if len(data) < at + width:
            return None
        size = int.from_bytes(data[at : at + width], "big")
        at += width
    mask = b""
    if second & 0x80:
        mask = data[at : at + 4]
        at += 4
    payload = data[at : at + size]
    if mask:
        payload = bytes(byte ^ key for byte, key in zip(payload, cycle(mask), strict=False))
    return first, payload, size, at + size


class _Unpack:
    """Inflates messages one after the other, with the window that they share unless the extension says otherwise."""

    def __init__(self, extensions: str, side: str, limit: int) -> None:
        self._each = f"{side}_no_context_takeover" in extensions
        self._left = limit if "permessage-deflate" in extensions else 0
        self._stream = zlib.decompressobj(-15)

    def __call__(self, payload: bytes) -> bytes:
        """The message; as it was sent when it cannot be unpacked."""
        if self._left <= 0:
            return payload
        if self._each:
            self._stream = zlib.decompressobj(-15)
        try:
            plain = self._stream.decompress(payload + b"\0\0\xff\xff", self._left)
        except zlib.error:
            self._left = 0
            return payload
        self._left -= len(plain)
        return plain


def _shown(opcode: int, payload: bytes, size: int, cut: bool = False) -> dict[str, Any]:
    made: dict[str, Any] = {"type": _NAMES[opcode], "bytes": size}
    if cut:
        made["cut"] = True
    if opcode == 8 and len(payload) >= 2:
        made["code"] = int.from_bytes(payload[:2], "big")
        payload = payload[2:]
    try:
        if opcode == 2:
            raise ValueError
        made["text"] = payload.decode("utf-8")
    except ValueError:
        made["base64"] = base64.b64encode(payload).decode()
    return made
