"""ClientHellos made by hand: of any extensions, cut into records of any size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

RECORDED = Path(__file__).parent / "hellos"
LIMIT = 32_768


def recorded(name: str) -> bytes:
    """What a real client sent."""
    return (RECORDED / f"{name}.bin").read_bytes()


def vector(prefix: int, data: bytes) -> bytes:
    return len(data).to_bytes(prefix) + data


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2) + vector(2, data)


def server_name(*names: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(2, b"".join(bytes((kind,)) + vector(2, name) for name in names)))


def alpn(*names: bytes) -> bytes:
    return extension(16, vector(2, b"".join(vector(1, name) for name in names)))


def body(extensions: bytes | None = b"", *, version: int = 0x0303, session: bytes = b"") -> bytes:
    head = version.to_bytes(2) + bytes(32) + vector(1, session) + vector(2, b"\x13\x01") + vector(1, b"\0")
    return head if extensions is None else head + vector(2, extensions)


def message(content: bytes, kind: int = 1) -> bytes:
    return bytes((kind,)) + vector(3, content)


def records(data: bytes, sizes: Iterable[int] = (16_384,), kind: int = 22) -> bytes:
    """``data`` in records of these sizes, of which the last is repeated."""
    out, at, size = b"", 0, 1
    cuts = iter(sizes)
    while at < len(data):
        size = next(cuts, size)
        part = data[at : at + size]
        out += bytes((kind, 3, 1)) + vector(2, part)
        at += size
    return out


def hello(*extensions: bytes, sizes: Iterable[int] = (16_384,)) -> bytes:
    return records(message(body(b"".join(extensions))), sizes)
