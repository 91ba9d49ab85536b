"""Local apps behind tunnels: one of asyncio streams for what has a shape, one of threads for what has a size."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from tests.system.visitor import READ_LIMIT, Fields, Wire

MIB = 1024 * 1024


def listener() -> socket.socket:
    """A listening socket on a free port of 127.0.0.1; kept open by its fixture, so that nobody takes the port."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(512)
    return sock


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


# ── asyncio ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Request(Wire):
    """A request as the app gets it: its head is read."""

    def __init__(self, wire: Wire, first: str, fields: Fields) -> None:
        super().__init__(wire.reader, wire.writer)
        self.method, self.path, _ = first.split(" ")
        self.fields = fields

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower() == name.lower()]

    async def respond(self, body: bytes, status: str = "200 OK", fields: str = "") -> None:
        await self.send(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{fields}\r\n".encode(), body)


Route = Callable[[Request], Awaitable[None]]


async def hello(request: Request) -> None:
    await request.respond(b"hello")


@asynccontextmanager
async def app(sock: socket.socket, **routes: Route) -> AsyncIterator[None]:
    """Serve on ``sock``: ``/name…`` by the route of that name, ``/`` with hello; other paths are 404."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer)
        try:
            while True:
                request = Request(wire, *await wire.head())
                name = request.path.split("?")[0].strip("/").split("/")[0]
                route = hello if not name else routes.get(name)
                if route is None:
                    await request.respond(b"no such page", "404 Not Found")
                else:
                    await route(request)
        except (OSError, EOFError):
            pass
        finally:
            wire.close()

    tasks: set[asyncio.Task[None]] = set()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accepted, sock=sock.dup(), limit=READ_LIMIT)
    try:
        yield
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ── threads ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PATTERN = memoryview(random.Random(20260713).randbytes(2 * MIB))


def piece(number: int) -> memoryview:
    """MiB ``number`` of the endless content that bulk bodies are made of; no two neighbours are alike."""
    start = (number * 4099) % MIB
    return PATTERN[start : start + MIB]


def content_crc(mebibytes: int) -> int:
    """The CRC-32 of the first so many MiB of it."""
    crc = 0
    for number in range(mebibytes):
        crc = zlib.crc32(piece(number), crc)
    return crc


class BulkApp:
    """``GET /download/N``: N MiB of the content. ``POST /upload``: answers ``size crc``. ``GET /``: hello.

    A thread for each connection, so that a reader that stands still costs nothing and nobody else.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock.dup()
        self._open: set[socket.socket] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._sock.settimeout(0)
        self._thread.join(5)
        self._sock.close()
        for conn in list(self._open):
            with contextlib.suppress(OSError):
                conn.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        self._sock.settimeout(0.1)
        while not self._closing:
            try:
                conn, _ = self._sock.accept()
            except OSError:
                continue
            conn.settimeout(None)
            self._open.add(conn)
            threading.Thread(target=self._serve, args=(conn,), daemon=True).start()

    def _serve(self, conn: socket.socket) -> None:
        try:
            with conn, conn.makefile("rb", buffering=65536) as reader:
                while (first := reader.readline()) and not self._closing:
                    fields = {}
                    while (line := reader.readline().strip()) != b"":
                        name, value = line.split(b":", 1)
                        fields[name.strip().lower()] = value.strip()
                    self._answer(conn, reader, first.split()[1].decode(), int(fields.get(b"content-length", b"0")))
        except OSError:
            pass
        finally:
            self._open.discard(conn)

    def _answer(self, conn: socket.socket, reader: object, path: str, length: int) -> None:
        if path.startswith("/download/"):
            count = int(path.rsplit("/", 1)[1])
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (count * MIB))
            for number in range(count):
                conn.sendall(piece(number))
            return
        crc, left, buffer = 0, length, memoryview(bytearray(MIB))
        while left:
            got = reader.readinto1(buffer[: min(left, MIB)])  # type: ignore[attr-defined]
            if not got:
                raise ConnectionError("the body broke off")
            crc = zlib.crc32(buffer[:got], crc)
            left -= got
        body = b"hello" if path == "/" else b"%d %08x" % (length, crc)
        conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
