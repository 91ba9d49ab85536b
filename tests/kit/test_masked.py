"""Masked messages, read and written by us: every cut gives the same messages, and what is not allowed ends the connection."""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import struct
from typing import Any

import picows
import pytest
import websockets.speedups
from websockets.frames import Frame, Opcode
from websockets.utils import apply_mask

from portico.kit import loop, masked
from portico.kit.carrier import MASK_FROM, Carrier
from portico.kit.tlsfiles import CertificateFiles
from tests.authority import Authority

LIMIT = 1_048_576


class Listener:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def on_message(self, message: bytes) -> None:
        self.said.append(("message", message))

    def on_control(self, kind: int, payload: bytes) -> None:
        self.said.append((kind, payload))

    def end(self, code: picows.WSCloseCode, reason: str) -> None:
        self.said.append(("end", code, reason))


class Transport:
    """As much of a transport as a reader asks for; what picows would hear goes to ``below``."""

    def __init__(self) -> None:
        self.below: list[str] = []
        self.protocol: Any = self

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.below.append(name)


def reader() -> tuple[masked.Reader, Listener]:
    listener = Listener()
    return masked.Reader(listener, Transport(), LIMIT), listener  # type: ignore[arg-type]


def feed(into: masked.Reader, data: bytes, cuts: list[int]) -> None:
    """``data`` in reads that end at ``cuts``, and whenever the reader's buffer is full."""
    at = 0
    for cut in [*cuts, len(data)]:
        while at < cut:
            room = into.get_buffer(-1)
            size = min(len(room), cut - at)
            room[:size] = data[at : at + size]
            into.buffer_updated(size)
            at += size


def wire(payload: bytes, opcode: Opcode = Opcode.BINARY, **flags: bool) -> bytes:
    """A masked frame, by another implementation."""
    return Frame(opcode, payload, **flags).serialize(mask=True)


SIZES = (0, 1, 2, 5, 6, 7, 125, 126, 127, 1000, 65_535, 65_536, 70_000, 300_000, LIMIT)


def messages(most: int) -> tuple[list[tuple[Any, ...]], bytes]:
    """What should be told, and the bytes that say it: sizes around every border up to ``most``, pings in between."""
    told: list[tuple[Any, ...]] = []
    data = b""
    for size in (*SIZES, *reversed(SIZES)):
        if size > most:
            continue
        payload = os.urandom(size)
        told.append(("message", payload))
        data += wire(payload)
        told.append((masked.PING, payload[:100]))
        data += wire(payload[:100], Opcode.PING)
    told.append((masked.CLOSE, struct.pack("!H", 1000) + b"bye"))
    return told, data + wire(struct.pack("!H", 1000) + b"bye", Opcode.CLOSE)


@pytest.mark.parametrize("seed", range(12))
def test_however_the_bytes_are_cut_the_messages_are_the_same(seed: int) -> None:
    most = (3, 40, 1000, 70_000, 400_000)[seed % 5]
    told, data = messages(most * 1000)
    into, listener = reader()
    chance = random.Random(seed)
    cuts, at = [], 0
    while (at := at + chance.randint(1, most)) < len(data):
        cuts.append(at)
    feed(into, data, cuts)
    assert listener.said == told


def test_the_compiled_mask_is_the_one_in_use() -> None:
    """The one in Python gives the same bytes and costs a download ten times as much CPU."""
    assert masked.apply_mask is websockets.speedups.apply_mask


@pytest.mark.parametrize("size", [126, 127, 4096, 65_535, 65_536, LIMIT])
def test_what_we_mask_is_what_others_read(size: int) -> None:
    message = os.urandom(size)
    head, body = masked.masked(memoryview(message))
    into, listener = reader()
    feed(into, head + body, [])
    assert listener.said == [("message", message)]
    assert apply_mask(body, head[-4:]) == message
    assert len(head) + size == len(wire(message))
    assert masked.masked(memoryview(message))[0][-4:] != head[-4:], "every message has a key of its own"


FAULTS = {
    "not masked": (Frame(Opcode.BINARY, b"hello").serialize(mask=False) + bytes(8), picows.WSCloseCode.PROTOCOL_ERROR),
    "reserved bit": (b"\xc2" + wire(b"hello")[1:], picows.WSCloseCode.PROTOCOL_ERROR),
    "text": (wire(b"hello", Opcode.TEXT), picows.WSCloseCode.UNSUPPORTED_DATA),
    "first fragment": (wire(b"hello", fin=False), picows.WSCloseCode.UNSUPPORTED_DATA),
    "continuation": (wire(b"hello", Opcode.CONT), picows.WSCloseCode.UNSUPPORTED_DATA),
    "unknown opcode": (b"\x83\x85" + bytes(9), picows.WSCloseCode.UNSUPPORTED_DATA),
    "fragmented ping": (b"\x09\x85" + bytes(9), picows.WSCloseCode.PROTOCOL_ERROR),
    "long ping": (b"\x89\xfe\x00\xc8" + bytes(204), picows.WSCloseCode.PROTOCOL_ERROR),
    "too long": (b"\x82\xff" + struct.pack("!Q", LIMIT + 1) + bytes(20), picows.WSCloseCode.MESSAGE_TOO_BIG),
    "length with its highest bit": (b"\x82\xff" + b"\xff" * 8 + bytes(20), picows.WSCloseCode.MESSAGE_TOO_BIG),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", [1, 1000])
def test_a_fault_ends_the_connection_and_nothing_more_is_read(fault: str, step: int) -> None:
    data, code = FAULTS[fault]
    into, listener = reader()
    before = wire(b"whole")
    data = before + data + wire(b"after it")
    feed(into, data, list(range(step, len(data), step)))
    assert [said[:2] for said in listener.said] == [("message", b"whole"), ("end", code)]


def test_a_head_with_the_longest_length_is_not_taken_for_a_short_one() -> None:
    """127 in the length's place is a mark, not a length, also when that many bytes are here."""
    into, listener = reader()
    feed(into, b"\x82\xff" + struct.pack("!Q", 70_000) + b"abcd" + bytes(119), [])
    assert listener.said == []


def test_memory_of_a_message_is_not_taken_before_its_length_is_checked() -> None:
    into, listener = reader()
    feed(into, b"\x82\xff" + struct.pack("!Q", 2**40) + b"abcd", [])
    assert listener.said[0][:2] == ("end", picows.WSCloseCode.MESSAGE_TOO_BIG)
    assert into._partial is None


def test_what_is_not_data_goes_to_picows() -> None:
    transport = Transport()
    into = masked.Reader(Listener(), transport, LIMIT)  # type: ignore[arg-type]
    into.pause_writing()
    into.resume_writing()
    into.eof_received()
    into.connection_lost(None)
    assert transport.below == ["pause_writing", "resume_writing", "eof_received", "connection_lost"]


# ── two carriers over real sockets ────────────────────────────────────────────────────────────────────────────────────


class Echo:
    """A session that sends back what it gets, or writes it down."""

    def __init__(self, back: bool) -> None:
        self.back, self.got, self.out = back, [], []  # type: ignore[var-annotated]
        self.wake = lambda: None

    bulky = True

    def feed(self, message: bytes | memoryview) -> bool:
        (self.out if self.back else self.got).append(self._frame(bytes(message)) if self.back else bytes(message))
        self.wake()
        return True

    @staticmethod
    def _frame(data: bytes) -> bytearray:
        return bytearray(14) + data

    def take(self) -> list[bytes | bytearray]:
        out, self.out = self.out, []
        return out

    def next_turn(self) -> None: ...
    def ping(self, payload: bytes) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self, detail: str = "") -> None: ...


def _contexts(folder: Any) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = Authority(folder)
    return CertificateFiles("tls", *authority.issue("server", "127.0.0.1")).context, authority.client()


async def _there_and_back(tls: tuple[ssl.SSLContext, ssl.SSLContext] | None, sizes: list[int]) -> None:
    lost: list[str] = []

    def carrier(session: Echo) -> Carrier:
        return Carrier(session, ping_interval=5, ping_timeout=5, on_lost=lost.append)  # type: ignore[arg-type]

    far, near = Echo(back=True), Echo(back=False)
    server = await picows.ws_create_server(lambda _: carrier(far), "127.0.0.1", 0, ssl=tls and tls[0])
    port = server.sockets[0].getsockname()[1]
    url = f"{'wss' if tls else 'ws'}://127.0.0.1:{port}/"
    mine = carrier(near)
    await picows.ws_connect(lambda: mine, url, ssl_context=tls and tls[1])
    sent = [os.urandom(size) for size in sizes]
    near.out += [Echo._frame(data) for data in sent]
    mine.flush()
    async with asyncio.timeout(30):
        while len(near.got) < len(sent):
            await asyncio.sleep(0.005)
    assert near.got == sent
    mine.end(picows.WSCloseCode.OK, "over")
    server.close()
    async with asyncio.timeout(30):
        while len(lost) < 2:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("fast", [True, False], ids=["uvloop", "asyncio"])
def test_messages_cross_and_come_back(secure: bool, fast: bool, tmp_path: Any) -> None:
    tls = _contexts(tmp_path) if secure else None
    sizes = [1, MASK_FROM - 15, MASK_FROM - 14, MASK_FROM, 65_546, 400_000, 1_000_000] * 3
    with asyncio.Runner(loop_factory=loop.factory() if fast else None) as runner:
        runner.run(_there_and_back(tls, sizes))
