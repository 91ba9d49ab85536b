"""Messages in recorded WebSocket bytes: the examples of RFC 6455 (5.7) and RFC 7692 (7.2.3), and bytes that are none."""

from __future__ import annotations

import zlib

import pytest

from portico.agent.websocket import MOST, messages

DEFLATE = "permessage-deflate"


def frame(payload: bytes, opcode: int = 1, first: int = 0x80) -> bytes:
    size = len(payload)
    length = (
        bytes((size,))
        if size < 126
        else b"\x7e" + size.to_bytes(2, "big")
        if size < 65_536
        else b"\x7f" + size.to_bytes(8, "big")
    )
    return bytes((first | opcode,)) + length + payload


def read(data: bytes, extensions: str = "", side: str = "server", limit: int = 1_000_000) -> list[dict[str, object]]:
    return messages(data, extensions, side, limit)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bytes.fromhex("810548656c6c6f"), {"type": "text", "bytes": 5, "text": "Hello"}),
        (bytes.fromhex("818537fa213d7f9f4d5158"), {"type": "text", "bytes": 5, "text": "Hello"}),
        (bytes.fromhex("010348656c80026c6f"), {"type": "text", "bytes": 5, "text": "Hello"}),
        (bytes.fromhex("890548656c6c6f"), {"type": "ping", "bytes": 5, "text": "Hello"}),
        (frame(b"\0\xff", 2), {"type": "binary", "bytes": 2, "base64": "AP8="}),
        (frame(b"\x03\xe8bye", 8), {"type": "close", "bytes": 5, "code": 1000, "text": "bye"}),
        (frame(b"x" * 70_000), {"type": "text", "bytes": 70_000, "text": "x" * 70_000}),
        (frame(b"x" * 300)[:104], {"type": "text", "bytes": 100, "text": "x" * 100, "cut": True}),
    ],
)  # fmt: skip
def test_frames(data: bytes, expected: dict[str, object]) -> None:
    assert read(data) == [expected]


def test_a_ping_between_fragments() -> None:
    data = frame(b"Hel", 1, 0) + frame(b"", 9) + frame(b"lo", 0)
    assert [(m["type"], m["text"]) for m in read(data)] == [("ping", ""), ("text", "Hello")]


def test_compressed_messages_share_a_window() -> None:
    first = bytes.fromhex("c107f248cdc9c90700")
    again = bytes.fromhex("c105f200110000")
    assert [m["text"] for m in read(first + again, DEFLATE)] == ["Hello", "Hello"]
    alone = read(first + first, f"{DEFLATE}; server_no_context_takeover")
    assert [m["text"] for m in alone] == ["Hello", "Hello"]


def test_a_bomb_unpacks_to_the_limit() -> None:
    packer = zlib.compressobj(wbits=-15)
    bomb = packer.compress(b"x" * 10_000_000) + packer.flush(zlib.Z_SYNC_FLUSH)
    (message,) = read(frame(bomb.removesuffix(b"\0\0\xff\xff"), 1, 0xC0), DEFLATE, limit=1000)
    assert message["text"] == "x" * 1000


@pytest.mark.parametrize("data", [b"", b"\x81", b"\x81\x7e\0", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x80\x01x", b"\x83\x01x"])
def test_what_is_no_message(data: bytes) -> None:
    assert read(data) == []


def test_no_endless_list() -> None:
    assert len(read(frame(b"") * (MOST + 10))) == MOST
