"""A visitor with no library between it and the bytes: HTTP/1.1 over asyncio streams, and WebSocket frames by hand."""

from __future__ import annotations

import asyncio
import ssl
import struct
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.timing import allowed

Fields = list[tuple[str, str]]
READ_LIMIT = 1024 * 1024


@dataclass
class Answer:
    """One response."""

    status: int
    fields: Fields
    body: bytes = b""
    trailers: Fields = field(default_factory=list)

    def get(self, name: str) -> str:
        """The values of a field, joined."""
        return ", ".join(value for key, value in self.fields if key.lower() == name.lower())

    @property
    def error(self) -> str:
        return self.get("Portico-Error")


class Wire:
    """One connection as a visitor has it; also a target's side of one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))
        await self.writer.drain()

    async def head(self) -> tuple[str, Fields]:
        """A start line and its fields."""
        text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text[:-4].split("\r\n")
        pairs = (line.split(":", 1) for line in lines)
        return first, [(name.strip(), value.strip()) for name, value in pairs]

    async def answer_head(self) -> Answer:
        first, fields = await self.head()
        return Answer(int(first.split()[1]), fields)

    async def chunk(self) -> bytes:
        """One chunk of a chunked body; empty: the last one (its trailers are still there to be read)."""
        size = int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16)
        if not size:
            return b""
        data = await self.reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def trailers(self) -> Fields:
        fields: Fields = []
        while (line := (await self.reader.readuntil(b"\r\n"))[:-2].decode("latin-1")) != "":
            name, value = line.split(":", 1)
            fields.append((name, value.strip()))
        return fields

    async def answer(self, method: str = "GET") -> Answer:
        """A whole response."""
        got = await self.answer_head()
        if method == "HEAD" or got.status in (204, 304):
            return got
        if "chunked" in got.get("Transfer-Encoding"):
            parts = []
            while data := await self.chunk():
                parts.append(data)
            got.body = b"".join(parts)
            got.trailers = await self.trailers()
        elif got.get("Content-Length"):
            got.body = await self.reader.readexactly(int(got.get("Content-Length")))
        else:
            got.body = await self.reader.read()
        return got

    def close(self) -> None:
        self.writer.close()
        self.writer.transport.abort()


def request(host: str, path: str = "/", method: str = "GET", fields: Sequence[str] = ()) -> bytes:
    """A request head."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *fields, "", ""]
    return "\r\n".join(lines).encode()


@asynccontextmanager
async def connected(
    port: int, tls: ssl.SSLContext | None = None, server_hostname: str | None = None
) -> AsyncIterator[Wire]:
    """A connection to 127.0.0.1."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, limit=READ_LIMIT, ssl=tls, server_hostname=server_hostname
    )
    wire = Wire(reader, writer)
    try:
        yield wire
    finally:
        wire.close()


async def get(port: int, host: str, path: str = "/", limit: float = 30.0) -> Answer:
    """One GET on a connection of its own."""
    async with asyncio.timeout(limit), connected(port) as wire:
        await wire.send(request(host, path, fields=["Connection: close"]))
        return await wire.answer()


@dataclass
class Visit:
    """One request of a poll: when it began and was over (monotonic), and what came of it."""

    began: float
    ended: float
    status: int
    what: str

    @property
    def good(self) -> bool:
        return self.status == 200


class Poller:
    """Asks for one URL again and again, ``rate`` times a second, each on a connection of its own; keeps every result."""

    def __init__(self, port: int, host: str, path: str = "/", rate: float = 20.0, limit: float = 30.0) -> None:
        self._port, self._host, self._path, self._rate, self._limit = port, host, path, rate, limit
        self.visits: list[Visit] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Poller:
        self._driver = asyncio.create_task(self._drive())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._driver.cancel()
        await asyncio.gather(self._driver, *self._tasks, return_exceptions=True)

    async def _drive(self) -> None:
        due = time.monotonic()
        while True:
            task = asyncio.create_task(self._visit())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            due = max(due + 1 / self._rate, time.monotonic() - 1)
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _visit(self) -> None:
        began = time.monotonic()
        try:
            got = await get(self._port, self._host, self._path, self._limit)
            status, what = got.status, got.error or got.body.decode("latin-1")[:80]
        except (OSError, EOFError, TimeoutError, asyncio.IncompleteReadError) as err:
            status, what = 0, repr(err)
        self.visits.append(Visit(began, time.monotonic(), status, what))

    def since(self, at: float) -> list[Visit]:
        return [visit for visit in self.visits if visit.began >= at]

    def bad(self, since: float = 0.0) -> list[Visit]:
        return [visit for visit in self.since(since) if not visit.good]

    async def until(self, good: bool, since: float, limit: float) -> float:
        """Seconds from ``since`` until the end of the first visit begun after it that was (not) good."""
        while True:
            found = [visit.ended - since for visit in self.since(since) if visit.good is good]
            if found:
                return min(found)
            assert time.monotonic() - since < allowed(limit, since), (
                f"no {'good' if good else 'bad'} answer in {limit:g} s; last: {self.visits[-3:]}"
            )
            await asyncio.sleep(0.01)


# ── WebSocket, RFC 6455 ───────────────────────────────────────────────────────────────────────────────────────────────


def mask(data: bytes, key: bytes) -> bytes:
    """The payload under a masking key (and back)."""
    if not data:
        return b""
    repeated = (key * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data, "big") ^ int.from_bytes(repeated, "big")).to_bytes(len(data), "big")


def frame_head(opcode: int, size: int, key: bytes = b"") -> bytes:
    """The head of one final frame, masked when there is a key."""
    flag = 0x80 if key else 0
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, flag | size) + key
    if size < 65536:
        return struct.pack("!BBH", 0x80 | opcode, flag | 126, size) + key
    return struct.pack("!BBQ", 0x80 | opcode, flag | 127, size) + key


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """First byte (FIN and opcode) and payload of one frame."""
    first, second = await reader.readexactly(2)
    size = second & 0x7F
    if size == 126:
        (size,) = struct.unpack("!H", await reader.readexactly(2))
    elif size == 127:
        (size,) = struct.unpack("!Q", await reader.readexactly(8))
    key = await reader.readexactly(4) if second & 0x80 else b""
    payload = await reader.readexactly(size)
    return first, mask(payload, key) if key else payload
