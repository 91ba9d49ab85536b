"""WebSocket directly and through tunnels: every connection gets the same verdict, from both ends."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import struct
from dataclasses import dataclass
from typing import Any

import pytest

from tests.differential import differences
from tests.differential.exact import Connection, Way
from tests.differential.frames import (
    BINARY,
    CLOSE,
    CONTINUE,
    KEY,
    PING,
    PONG,
    TEXT,
    Deflater,
    close,
    fragments,
    frame,
)
from tests.differential.places import Place
from tests.differential.verdicts import reset
from tests.system.visitor import read_frame

pytestmark = pytest.mark.system
LIMIT = 6.0
MIB = 1024 * 1024
_serial = itertools.count()


@dataclass(frozen=True)
class Case:
    """``joined`` is sent with the request, ``data`` once the target serves the connection, whole or in pieces of ``cut`` bytes.

    ``loose``: where nobody upgrades, the target hears of no upgrade, and words its refusal accordingly.
    """

    data: bytes = b""
    fields: tuple[str, ...] = ()
    joined: bytes = b""
    cut: int = 0
    loose: bool = False
    line: str = "GET %PATH% HTTP/1.1"
    key: str = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    version: str = "Sec-WebSocket-Version: 13"
    upgrade: str = "Connection: Upgrade\r\nUpgrade: websocket"


DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate"
END = close(1000)
EURO = "€".encode()


def deflated() -> dict[str, Case]:
    """Compression: what is asked for, what is sent, what is wrong with it."""
    deflate, again = Deflater(), Deflater()
    same = b"the same words again and again " * 20
    stream = b"".join(frame(TEXT, deflate(same), rsv=4) for _ in range(3))
    parts = again(same)
    asked = (DEFLATE,)
    return {
        "deflate: asked for": Case(END, asked),
        "deflate: with window bits": Case(END, (DEFLATE + "; client_max_window_bits; server_max_window_bits=10",)),
        "deflate: without takeover": Case(END, (DEFLATE + "; server_no_context_takeover; client_no_context_takeover",)),
        "deflate: a parameter that is not there": Case(END, (DEFLATE + "; nonsense=1",)),
        "deflate: window bits that cannot be": Case(END, (DEFLATE + "; server_max_window_bits=99",)),
        "deflate: the second offer": Case(END, (DEFLATE + "; nonsense=1, permessage-deflate",)),
        "deflate: two fields": Case(END, ("Sec-WebSocket-Extensions: x-nothing", DEFLATE)),
        "deflate: another extension": Case(END, ("Sec-WebSocket-Extensions: x-nothing; a=b",)),
        "deflate: messages that share a window": Case(stream + END, asked),
        "deflate: a message in fragments": Case(fragments(TEXT, parts[:20], parts[20:], rsv=4) + END, asked),
        "deflate: an uncompressed message": Case(frame(TEXT, same) + END, asked),
        "deflate: an empty message": Case(frame(TEXT, Deflater()(b"") or b"\x00", rsv=4) + END, asked),
        "deflate: not compressed at all": Case(frame(BINARY, b"\xff" * 30, rsv=4) + END, asked),
        "deflate: invalid UTF-8 inside": Case(frame(TEXT, Deflater()(b"\xc3\x28"), rsv=4) + END, asked),
        "deflate: RSV1 on a continuation": Case(
            frame(TEXT, parts[:20], fin=False, rsv=4) + frame(CONTINUE, parts[20:], rsv=4) + END, asked
        ),
        "deflate: RSV1 on a ping": Case(frame(PING, b"x", rsv=4) + END, asked),
        "deflate: too large when unpacked": Case(frame(BINARY, Deflater()(b"\0" * (40 * MIB)), rsv=4) + END, asked),
        "deflate: not asked for": Case(frame(TEXT, parts, rsv=4) + END),
    }


CASES: dict[str, Case] = {
    # ── messages ──
    "text": Case(frame(TEXT, b"hello") + END),
    "binary": Case(frame(BINARY, bytes(range(256))) + END),
    "empty messages": Case(frame(TEXT) + frame(BINARY) + END),
    **{f"{size} bytes": Case(frame(BINARY, b"z" * size) + END) for size in (1, 125, 126, 127, 65535, 65536)},
    "16 MiB": Case(frame(BINARY, bytes(range(256)) * 65536) + END),
    "16 MiB in frames of 64 KiB": Case(fragments(BINARY, *[b"f" * 65536] * 256) + END),
    "500 messages at once": Case(b"".join(frame(TEXT, b"%d" % n) for n in range(500)) + END),
    "byte by byte": Case(frame(TEXT, "grüße".encode()) + frame(PING, b"p") + END, cut=1),
    "with the request": Case(END, joined=frame(TEXT, b"early") + frame(BINARY, b"e")),
    "64 KiB with the request": Case(END, joined=frame(BINARY, b"e" * 65536)),
    "a length of two bytes too many": Case(frame(TEXT, b"abc", size_as=126) + END),
    "a length of eight bytes too many": Case(frame(TEXT, b"abc", size_as=127) + END),
    "a length with its highest bit": Case(b"\x82\xff" + b"\xff" * 8 + KEY + END),
    "a mask of zeros": Case(frame(TEXT, b"abc", key=b"\0\0\0\0") + END),
    "not masked": Case(frame(TEXT, b"abc", key=None) + END),
    "a ping that is not masked": Case(frame(PING, b"abc", key=None) + END),
    "a close that is not masked": Case(frame(CLOSE, struct.pack("!H", 1000), key=None)),
    # ── fragments ──
    "three fragments": Case(fragments(TEXT, b"one ", b"two ", b"three") + END),
    "empty fragments": Case(fragments(TEXT, b"", b"", b"a", b"") + END),
    "a ping between fragments": Case(fragments(TEXT, b"a", b"b", b"c", between=frame(PING, b"now")) + END),
    "a pong between fragments": Case(fragments(BINARY, b"a", b"b", between=frame(PONG, b"unasked")) + END),
    "a close between fragments": Case(frame(TEXT, b"a", fin=False) + close(1001)),
    "a continuation of nothing": Case(frame(CONTINUE, b"a") + END),
    "a continuation after the last": Case(fragments(TEXT, b"a", b"b") + frame(CONTINUE, b"c") + END),
    "a message within another": Case(frame(TEXT, b"a", fin=False) + frame(TEXT, b"b") + END),
    "a ping in two fragments": Case(frame(PING, b"a", fin=False) + frame(CONTINUE, b"b") + END),
    # ── control frames ──
    "a ping": Case(frame(PING, b"") + frame(PING, b"x" * 125) + END),
    "a ping that is too long": Case(frame(PING, b"x" * 126) + END),
    "a pong nobody asked for": Case(frame(PONG, b"x") + frame(TEXT, b"after") + END),
    "a flood of pings": Case(b"".join(frame(PING, b"%d" % n) for n in range(2000)) + END),
    **{f"opcode {code}": Case(frame(code, b"x") + END) for code in (3, 7, 11, 15)},
    **{f"reserved bit {bit}": Case(frame(TEXT, b"x", rsv=bit) + END) for bit in (1, 2, 4)},
    # ── UTF-8 ──
    "a character over two fragments": Case(fragments(TEXT, EURO[:1], EURO[1:]) + END),
    "a character over two pieces": Case(frame(TEXT, EURO) + END, cut=7),
    "octets that are no UTF-8": Case(frame(TEXT, b"a\xffb") + END),
    "UTF-8 that breaks off": Case(frame(TEXT, EURO[:2]) + END),
    "UTF-8 that breaks off in a fragment": Case(fragments(TEXT, EURO[:2], b"a") + END),
    "an overlong form": Case(frame(TEXT, b"\xc0\xaf") + END),
    "a surrogate": Case(frame(TEXT, b"\xed\xa0\x80") + END),
    "above Unicode": Case(frame(TEXT, b"\xf4\x90\x80\x80") + END),
    "NUL and non-characters": Case(frame(TEXT, b"\0" + "\uffff".encode()) + END),
    "octets in binary": Case(frame(BINARY, b"\xff\xfe\xc0") + END),
    # ── closing ──
    **{f"close {code}": Case(close(code)) for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011)},
    **{f"close {code}": Case(close(code)) for code in (1012, 1013, 1014, 3000, 3999, 4000, 4999)},
    **{f"close {code}, which may not be": Case(close(code)) for code in (0, 999, 1004, 1005, 1006, 1015)},
    **{f"close {code}, which may not be": Case(close(code)) for code in (1016, 1100, 2000, 2999, 5000, 65535)},
    "close without a code": Case(close(None)),
    "close with half a code": Case(frame(CLOSE, b"\x03")),
    "close with a reason": Case(close(1000, "tschüß".encode())),
    "close with the longest reason": Case(close(4000, b"r" * 123)),
    "close with a reason too long": Case(close(4000, b"r" * 124)),
    "close with a reason that is no UTF-8": Case(close(1000, b"\xff")),
    "messages after the close": Case(END + frame(TEXT, b"late") + END),
    # ── the handshake ──
    "handshake: other spellings": Case(END, upgrade="connection: keep-alive, UPGRADE\r\nupgrade: WebSocket"),
    "handshake: a subprotocol": Case(END, ("Sec-WebSocket-Protocol: one, two", "Origin: https://a.example")),
    "handshake: no subprotocol that is known": Case(END, ("Sec-WebSocket-Protocol: three",)),
    "handshake: version 8": Case(version="Sec-WebSocket-Version: 8"),
    "handshake: no version": Case(version="X-No: version"),
    "handshake: no key": Case(key="X-No: key"),
    "handshake: a key that is none": Case(key="Sec-WebSocket-Key: !!!"),
    "handshake: a short key": Case(key="Sec-WebSocket-Key: YQ=="),
    "handshake: no Connection": Case(upgrade="Upgrade: websocket"),
    "handshake: no Upgrade": Case(upgrade="Connection: Upgrade", loose=True),
    "handshake: another protocol": Case(upgrade="Connection: Upgrade\r\nUpgrade: x-other"),
    "handshake: POST": Case(line="POST %PATH% HTTP/1.1", fields=("Content-Length: 0",)),
    **deflated(),
}


@dataclass(frozen=True)
class Verdict:
    """The answer to the upgrade, the bytes after it, how they ended, and what the target says."""

    answer: Any
    heard: bytes
    end: str
    target: Any = None


async def until_end(connection: Connection) -> tuple[bytes, str]:
    """Everything until the connection ends, and how: ``end`` or ``reset``."""
    data = bytearray()
    try:
        while more := await connection.reader.read(MIB):
            data += more
    except (ConnectionError, ssl.SSLError):
        return bytes(data), "reset"
    return bytes(data), "end"


async def send(connection: Connection, data: bytes, cut: int) -> None:
    """Until the other side wants no more."""
    step = cut or len(data) or 1
    try:
        for at in range(0, len(data), step):
            if cut and at + step >= len(data):
                # The library echoes nothing more once it has read a whole close frame; it must not come with a message.
                await asyncio.sleep(0.2)
            await connection.send(data[at : at + step])
            if cut:
                await asyncio.sleep(0.001)
    except (OSError, ssl.SSLError):
        pass


async def play(case: Case, way: Way, host: str, path: str) -> Verdict:
    lines = (case.line.replace("%PATH%", path), f"Host: {host}", case.upgrade, case.key, case.version, *case.fields)
    request = "\r\n".join((*lines, "", "")).encode()
    async with asyncio.timeout(LIMIT), way.connect() as connection:
        await connection.send(request + case.joined)
        answer = await connection.answer()
        if answer.status != 101:
            return Verdict(answer.status if case.loose else differences.answer_seen(answer), b"", "")
        first = await ready(connection)
        sending = asyncio.create_task(send(connection, case.data, case.cut))
        heard, end = await until_end(connection)
        await sending
        return Verdict(differences.answer_seen(answer), first + heard, end)


async def ready(connection: Connection) -> bytes:
    """The frames that come until the target has echoed a message: before, it may close without a verdict."""
    await connection.send(frame(TEXT, b"ready"))
    heard = b""
    while not heard.endswith(b"ready"):
        first, payload = await read_frame(connection.reader)
        heard += bytes([first]) + payload
        if first & 0x40:
            break  # compressed
    return heard


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("target", ["library", "httpbin"])
async def test_the_same_verdict(place: Place, target: str, case: Case) -> None:
    host = place.host(target)
    found = []
    for way in place.ways(target):
        path = "/websocket/echo" if target == "httpbin" else f"/{next(_serial)}"
        path += "?max_message_size=33554432&max_fragment_size=33554432" if target == "httpbin" else ""
        verdict = await play(case, way, host, path)
        said = await asyncio.to_thread(place.verdicts.get, path) if target == "library" and verdict.end else None
        found.append(Verdict(verdict.answer, verdict.heard, verdict.end, said))
    assert found[1] == found[0], "by HTTP"
    assert found[2] == found[0], "by HTTPS"


async def scripted(place: Place, way: Way, what: str, act: str) -> tuple[bytes, str, Any]:
    """One connection to the target that does ``what``; ``act``: how the visitor ends its side of it.

    Returns what the visitor heard and how that ended, and what the target notes of its side.
    """
    path = f"/{what}/{next(_serial)}"
    case = Case(line=f"GET {path} HTTP/1.1")
    request = "\r\n".join((case.line, f"Host: {place.host('scripted')}", case.upgrade, case.key, case.version, "", ""))
    async with asyncio.timeout(LIMIT), way.connect() as connection:
        await connection.send(request.encode())
        assert (await connection.answer()).status == 101
        await connection.send(frame(TEXT, b"words"))
        if act == "half":
            await asyncio.sleep(0.05)
            connection.writer.write_eof()
        elif act == "reset":
            await asyncio.sleep(0.1)
            reset(connection)
            return b"", "", await asyncio.to_thread(place.verdicts.get, path)
        elif act == "close":
            await asyncio.sleep(0.1)
            connection.close()
            return b"", "", await asyncio.to_thread(place.verdicts.get, path)
        heard, end = await until_end(connection)
    return heard, end, await asyncio.to_thread(place.verdicts.get, path)


SCRIPTS = [
    ("speak", "close"),
    ("speak", "half"),
    ("half", "half"),
    ("first", "half"),
    ("reset", "wait"),
    ("speak", "reset"),
]


@pytest.mark.parametrize(("what", "act"), SCRIPTS, ids=lambda text: text)
async def test_the_same_end(place: Place, what: str, act: str) -> None:
    direct, http, https = place.ways("scripted")
    expected = await scripted(place, direct, what, act)
    assert expected[0] or expected[2][0]
    assert await scripted(place, http, what, act) == expected
    if act != "half":  # TLS has none
        assert await scripted(place, https, what, act) == expected
