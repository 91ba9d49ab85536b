"""Requests of all kinds through one HTTP and one TCP tunnel, each checked to the byte, and the local app that they reach.

A kind is a coroutine that makes one request and returns ``""``, or in a word what was wrong with its answer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import random
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from portico.kit.sockets import reset_transport
from tests.system.targets import MIB, Request, app, piece
from tests.system.visitor import READ_LIMIT, Wire, connected, frame_head, mask, read_frame, request

UPLOAD_MIB = 4
DOWNLOAD_MIB = 4
#: Seconds that a streaming answer, a WebSocket or a TCP connection lasts: below the drain limit, so that a restart in order
#: cuts none of them.
STREAM_SECONDS = 2.0
LIMIT_SECONDS = 30.0
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


# ── the local app ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def read_body(request: Request) -> bytes:
    """The body of a request, by length or in chunks."""
    if "chunked" in "".join(request.values("Transfer-Encoding")):
        parts = []
        while data := await request.chunk():
            parts.append(data)
        await request.trailers()
        return b"".join(parts)
    return await request.reader.readexactly(int("".join(request.values("Content-Length")) or 0))


async def echo(request: Request) -> None:
    await request.respond(await read_body(request))


async def upload(request: Request) -> None:
    """Reads a body in pieces and answers its size and CRC-32."""
    left, crc, size = int("".join(request.values("Content-Length"))), 0, 0
    while left:
        data = await request.reader.read(min(left, 65536))
        if not data:
            raise EOFError
        crc, left, size = zlib.crc32(data, crc), left - len(data), size + len(data)
    await request.respond(b"%d %08x" % (size, crc))


async def download(request: Request) -> None:
    await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (DOWNLOAD_MIB * MIB))
    for number in range(DOWNLOAD_MIB):
        await request.send(bytes(piece(number)))


async def chunks(request: Request) -> None:
    await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n")
    for number in range(8):
        await request.send(b"5\r\nline%d\r\n" % number)
        await asyncio.sleep(0.02)
    await request.send(b"0\r\nX-Sum: 8\r\n\r\n")


async def events(request: Request) -> None:
    await request.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    for number in range(int(STREAM_SECONDS / 0.2)):
        line = b"data: %d\n\n" % number
        await request.send(b"%x\r\n%b\r\n" % (len(line), line))
        await asyncio.sleep(0.2)
    await request.send(b"0\r\n\r\n")


async def expect(request: Request) -> None:
    """Asks for the body that was announced with Expect."""
    if request.values("Expect"):
        await request.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    await request.respond(await read_body(request))


async def head(request: Request) -> None:
    await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n")


async def breaks(request: Request) -> None:
    """Ends in the middle of its answer."""
    await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 5000)
    raise ConnectionError


async def silent(request: Request) -> None:
    """Closes without an answer."""
    raise ConnectionError


async def stuck(request: Request) -> None:
    """Never answers; ends when the visitor goes away."""
    await request.reader.read()


async def websocket(request: Request) -> None:
    key = "".join(request.values("Sec-WebSocket-Key")).encode()
    accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
    await request.send(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )
    while True:
        first, payload = await read_frame(request.reader)
        await request.send(frame_head(first & 0x0F, len(payload)), payload)
        if first & 0x0F == 8:
            raise EOFError


ROUTES: dict[str, Callable[[Request], Awaitable[None]]] = {
    "echo": echo, "upload": upload, "download": download, "chunks": chunks, "events": events, "expect": expect,
    "head": head, "breaks": breaks, "silent": silent, "stuck": stuck, "websocket": websocket,
}  # fmt: skip


@asynccontextmanager
async def served(http: socket.socket, tcp: socket.socket) -> AsyncIterator[None]:
    """The local apps: HTTP by :data:`ROUTES`, TCP that sends everything back."""
    tasks: set[asyncio.Task[None]] = set()

    async def back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(back(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accepted, sock=tcp.dup())
    async with app(http, **ROUTES):
        yield
    server.close()
    for task in list(tasks):
        task.cancel()


# ── the visitors ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tunnels are."""

    http_port: int
    host: str
    tcp_port: int


def wrong(good: bool, what: str) -> str:
    return "" if good else what


async def ask(place: Place, path: str, method: str = "GET", body: bytes = b"", fields: tuple[str, ...] = ()) -> str:
    """``status code body`` of a request with a body of known length; used by kinds whose answer is short."""
    async with connected(place.http_port) as wire:
        length = (f"Content-Length: {len(body)}",) if body else ()
        await wire.send(request(place.host, path, method, [*fields, *length]), body)
        answer = await wire.answer(method)
        return f"{answer.status} {answer.error} {answer.body.decode('latin-1')}"


async def get(place: Place) -> str:
    said = await ask(place, "/")
    return wrong(said == "200  hello", said[:60])


async def get_head(place: Place) -> str:
    async with connected(place.http_port) as wire:
        await wire.send(request(place.host, "/head", "HEAD"))
        answer = await wire.answer("HEAD")
        return wrong((answer.status, answer.get("Content-Length")) == (200, "12345"), f"{answer.status} {answer.error}")


async def post(place: Place) -> str:
    body = random.randbytes(random.choice((0, 1, 700, 70_000))).hex()
    said = await ask(place, "/echo", "POST", body.encode())
    return wrong(said == f"200  {body}", said[:60])


async def post_chunked(place: Place) -> str:
    parts = [random.randbytes(random.randrange(1, 40_000)) for _ in range(5)]
    async with connected(place.http_port) as wire:
        await wire.send(request(place.host, "/echo", "POST", ["Transfer-Encoding: chunked"]))
        for part in parts:
            await wire.send(b"%x\r\n%b\r\n" % (len(part), part))
        await wire.send(b"0\r\n\r\n")
        answer = await wire.answer()
        return wrong((answer.status, answer.body) == (200, b"".join(parts)), f"{answer.status} {answer.error}")


async def post_expect(place: Place) -> str:
    body = b"as announced" * 100
    async with connected(place.http_port) as wire:
        fields = ["Expect: 100-continue", f"Content-Length: {len(body)}"]
        await wire.send(request(place.host, "/expect", "POST", fields))
        first = await wire.answer_head()
        if first.status != 100:
            return f"{first.status} {first.error}"
        await wire.send(body)
        answer = await wire.answer()
        return wrong((answer.status, answer.body) == (200, body), f"{answer.status} {answer.error}")


async def read_chunked(place: Place) -> str:
    async with connected(place.http_port) as wire:
        await wire.send(request(place.host, "/chunks", fields=["TE: trailers", "Connection: TE"]))
        answer = await wire.answer()
        good = answer.body == b"".join(b"line%d" % n for n in range(8)) and answer.trailers == [("X-Sum", "8")]
        return wrong(answer.status == 200 and good, f"{answer.status} {answer.error} {answer.trailers}"[:60])


async def read_events(place: Place) -> str:
    async with connected(place.http_port) as wire:
        await wire.send(request(place.host, "/events"))
        answer = await wire.answer()
        return wrong(answer.status == 200 and answer.body.count(b"data: ") == 10, f"{answer.status} {answer.error}")


async def large_upload(place: Place) -> str:
    crc = 0
    async with connected(place.http_port) as wire:
        await wire.send(request(place.host, "/upload", "POST", [f"Content-Length: {UPLOAD_MIB * MIB}"]))
        for number in range(UPLOAD_MIB):
            data = bytes(piece(number))
            crc = zlib.crc32(data, crc)
            await wire.send(data)
        answer = await wire.answer()
        expected = b"%d %08x" % (UPLOAD_MIB * MIB, crc)
        return wrong((answer.status, answer.body) == (200, expected), f"{answer.status} {answer.error}")


async def large_download(place: Place, pause: float = 0.0) -> str:
    crc, expected = 0, 0
    for number in range(DOWNLOAD_MIB):
        expected = zlib.crc32(piece(number), expected)
    async with connected(place.http_port) as wire:
        await wire.send(request(place.host, "/download"))
        answer = await wire.answer_head()
        if answer.status != 200:
            return f"{answer.status} {answer.error}"
        left = DOWNLOAD_MIB * MIB
        while left:
            data = await wire.reader.read(65536)
            if not data:
                return "cut in the body"
            crc, left = zlib.crc32(data, crc), left - len(data)
            if pause:
                await asyncio.sleep(pause)
        return wrong(crc == expected, "other bytes")


async def slow_reader(place: Place) -> str:
    """64 pieces with a pause after each: the answer waits for it, and nobody else does."""
    return await large_download(place, STREAM_SECONDS / 64)


async def websocket_echo(place: Place) -> str:
    async with connected(place.http_port) as wire:
        key = base64.b64encode(os.urandom(16)).decode()
        fields = ["Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13"]
        await wire.send(request(place.host, "/websocket", fields=fields))
        answer = await wire.answer_head()
        if answer.status != 101:
            return f"{answer.status} {answer.error}"
        for _ in range(10):
            payload = random.randbytes(random.choice((10, 200, 20_000)))
            masking = os.urandom(4)
            await wire.send(frame_head(2, len(payload), masking), mask(payload, masking))
            if (await read_frame(wire.reader))[1] != payload:
                return "other bytes"
            await asyncio.sleep(STREAM_SECONDS / 10)
        masking = os.urandom(4)
        await wire.send(frame_head(8, 2, masking), mask(b"\x03\xe8", masking))
        return wrong((await read_frame(wire.reader))[0] == 0x88, "no close frame")


async def tcp_echo(place: Place) -> str:
    async with connected(place.tcp_port) as wire:
        for _ in range(10):
            data = random.randbytes(random.choice((10, 1000, 50_000)))
            await wire.send(data)
            if await wire.reader.readexactly(len(data)) != data:
                return "other bytes"
            await asyncio.sleep(STREAM_SECONDS / 10)
        wire.writer.write_eof()
        return wrong(await wire.reader.read() == b"", "bytes after the end")


async def aborted_by_visitor(place: Place) -> str:
    """Gone in the middle of an upload, of a download, or while nothing answers."""
    path, method, fields = random.choice(
        [("/upload", "POST", ["Content-Length: 500000"]), ("/download", "GET", []), ("/stuck", "GET", [])]
    )
    async with connected(place.http_port) as wire:
        await wire.send(request(place.host, path, method, fields))
        if method == "POST":
            await wire.send(b"x" * 100_000)
        elif path == "/download":
            await wire.reader.read(100_000)
        await asyncio.sleep(random.uniform(0, 0.2))
        if random.random() < 0.5:
            reset_transport(wire.writer.transport)
    return ""


async def broken_by_target(place: Place) -> str:
    """An answer that ends early must not look whole."""
    try:
        said = await ask(place, "/breaks")
    except asyncio.IncompleteReadError as err:
        if not err.partial:
            raise
        return wrong(len(err.partial) == 5000, "cut in the body")
    return said[:60]


async def refused_by_target(place: Place) -> str:
    said = await ask(place, "/silent")
    return wrong(said.startswith("502 edge.target_invalid "), said[:60])


async def malformed(place: Place) -> str:
    async with connected(place.http_port) as wire:
        await wire.send(f"GET / HTTP/1.1\r\nHost: {place.host}\r\nHost: other\r\n\r\n".encode())
        answer = await wire.answer()
        return wrong((answer.status, answer.error) == (400, "edge.bad_request"), f"{answer.status} {answer.error}")


Kind = Callable[[Place], Awaitable[str]]

#: How many of a kind are made a second. Together about 60.
RATES: dict[Kind, float] = {
    get: 20, get_head: 3, post: 6, post_chunked: 3, post_expect: 3, read_chunked: 3, read_events: 2, large_upload: 1,
    large_download: 1, slow_reader: 0.5, websocket_echo: 2, tcp_echo: 2, aborted_by_visitor: 4, broken_by_target: 2,
    refused_by_target: 2, malformed: 2,
}  # fmt: skip


async def once(kind: Kind, place: Place) -> str:
    """One request; how it failed, by name, if it did."""
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            return await kind(place)
    except asyncio.IncompleteReadError as err:
        return "cut in the body" if err.partial else "closed before an answer"
    except (OSError, EOFError, TimeoutError, ValueError) as err:
        return type(err).__name__


class Kept:
    """A keep-alive connection, a WebSocket and a TCP connection that stay open as long as they can, with a message a second.

    ``cuts`` are the moments at which one ended, and what it was.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self.cuts: list[tuple[float, str]] = []
        self.messages = 0

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hold("websocket", self._websocket))
            group.create_task(self._hold("tcp", self._tcp))

    async def _hold(self, what: str, session: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = self.messages
            try:
                await session()
            except (OSError, EOFError, ValueError):
                if self.messages > before:  # not a try that found nobody
                    self.cuts.append((loop.time(), what))
                await asyncio.sleep(0.5)

    async def _websocket(self) -> None:
        async with connected(self._place.http_port) as wire:
            fields = [
                "Connection: Upgrade",
                "Upgrade: websocket",
                "Sec-WebSocket-Key: eA==",
                "Sec-WebSocket-Version: 13",
            ]
            await wire.send(request(self._place.host, "/websocket", fields=fields))
            answer = await wire.answer_head()
            if answer.status != 101:
                raise ValueError(answer.error)
            while True:
                await wire.send(frame_head(2, 5, b"abcd"), mask(b"hello", b"abcd"))
                if (await read_frame(wire.reader))[1] != b"hello":
                    raise ValueError("other bytes")
                self.messages += 1
                await asyncio.sleep(1)

    async def _tcp(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._place.tcp_port, limit=READ_LIMIT)
        wire = Wire(reader, writer)
        try:
            while True:
                await wire.send(b"hello")
                if await reader.readexactly(5) != b"hello":
                    raise ValueError("other bytes")
                self.messages += 1
                await asyncio.sleep(1)
        finally:
            wire.close()
