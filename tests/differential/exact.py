"""A visitor that writes exact bytes and keeps exact bytes: HTTP/1.1 without a library in between.

What is read is read strictly (every line ends in CRLF, a chunk has its size), so that an answer which two readers could
take in two ways fails here.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

READ_LIMIT = 2**25

Fields = list[tuple[bytes, bytes]]


@dataclass
class Head:
    """A start line and its fields as they came."""

    first: bytes
    fields: Fields

    @property
    def status(self) -> int:
        return int(self.first.split(b" ", 2)[1])

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.fields if key.lower() == name]


@dataclass
class Answer:
    """One final answer, with the interim ones before it."""

    head: Head
    interims: list[Head] = field(default_factory=list)
    body: bytes = b""
    trailers: Fields = field(default_factory=list)
    framing: str = "none"  # none, length, chunked, close

    @property
    def status(self) -> int:
        return self.head.status

    @property
    def closes(self) -> bool:
        """Whether the connection ends with it, by what it says (RFC 9112, 9.3)."""
        options = b",".join(self.head.values(b"connection")).lower()
        http10 = self.head.first.startswith(b"HTTP/1.0") and b"keep-alive" not in options
        return self.framing == "close" or b"close" in options or http10


def parse_fields(lines: list[bytes]) -> Fields:
    """Fields of lines without their ends; one space behind the colon is not part of a value."""
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        assert colon and name == name.strip(), f"no field: {line!r}"
        fields.append((name, value.removeprefix(b" ")))
    return fields


class Connection:
    """One connection, as a visitor has it; also a target's side of one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def line(self) -> bytes:
        line = await self.reader.readuntil(b"\r\n")
        assert b"\r" not in line[:-2] and b"\n" not in line[:-2], f"a bare CR or LF: {line!r}"
        return line[:-2]

    async def head_bytes(self) -> bytes:
        """A head to its empty line, as it came."""
        return await self.reader.readuntil(b"\r\n\r\n")

    async def head(self) -> Head:
        first, *lines = (await self.head_bytes())[:-4].split(b"\r\n")
        assert not any(b"\r" in line or b"\n" in line for line in lines), f"a bare CR or LF: {lines!r}"
        return Head(first, parse_fields(lines))

    async def chunked(self) -> tuple[bytes, Fields]:
        """A chunked body and its trailers."""
        parts = []
        while size := int((await self.line()).split(b";")[0], 16):
            parts.append(await self.reader.readexactly(size))
            assert await self.reader.readexactly(2) == b"\r\n"
        lines = []
        while line := await self.line():
            lines.append(line)
        return b"".join(parts), parse_fields(lines)

    async def answer(self, *, head_only: bool = False, interims: list[Head] | None = None) -> Answer:
        """One whole answer; ``head_only``: to HEAD. ``interims``: those that were read before."""
        got = Answer(await self.head(), interims or [])
        while got.status < 200 and got.status != 101:
            got.interims.append(got.head)
            got.head = await self.head()
        lengths = got.head.values(b"content-length")
        codings = got.head.values(b"transfer-encoding")
        assert len(lengths) + len(codings) <= 1, f"framed twice: {got.head}"
        if head_only or got.status in (101, 204, 304):
            return got
        if codings:
            assert codings == [b"chunked"]
            got.framing = "chunked"
            got.body, got.trailers = await self.chunked()
        elif lengths:
            got.framing = "length"
            got.body = await self.reader.readexactly(int(lengths[0]))
        else:
            got.framing = "close"
            got.body = await self.rest()
        return got

    async def rest(self) -> bytes:
        """What comes until the end of the connection. An end by reset raises."""
        return await self.reader.read()

    def close(self) -> None:
        self.writer.close()
        with suppress(AttributeError):  # of a TLS connection that is closed already, asyncio's before Python 3.11.4
            self.writer.transport.abort()


def no_verification(*, protocols: tuple[str, ...] = ("http/1.1",)) -> ssl.SSLContext:
    """A client's context that takes any certificate (which one is presented is another test's question)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(list(protocols))
    return context


@dataclass(frozen=True)
class Way:
    """How a target is reached: a port of 127.0.0.1, and for TLS the name that is asked for."""

    name: str
    port: int
    tls: str | None = None

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        context = no_verification() if self.tls else None
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, limit=READ_LIMIT, ssl=context, server_hostname=self.tls
        )
        connection = Connection(reader, writer)
        try:
            yield connection
        finally:
            connection.close()
