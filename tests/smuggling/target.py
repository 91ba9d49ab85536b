"""A target that records the bytes of every connection, and what two parsers that are not ours make of them."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import h11
import httptools

from tests.differential.echo import read_body
from tests.differential.exact import Connection, parse_fields
from tests.smuggling import vectors


@dataclass(frozen=True)
class Request:
    """A request as a parser read it."""

    method: bytes
    target: bytes
    body: bytes
    fields: tuple[tuple[bytes, bytes], ...]


class Recorder:
    """Answers every request, ``/answer-N`` with the answer of that number and the end of the connection."""

    def __init__(self) -> None:
        self.connections: list[bytearray] = []
        self.faults: list[str] = []
        self._lock = threading.Lock()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept = bytearray()
        with self._lock:
            self.connections.append(kept)
        feed = reader.feed_data

        def feed_and_keep(data: bytes) -> None:
            kept.extend(data)
            feed(data)

        kept += bytes(reader._buffer)  # type: ignore[attr-defined]
        reader.feed_data = feed_and_keep  # type: ignore[method-assign]
        connection = Connection(reader, writer)
        answers = list(vectors.ANSWERS.values())
        while True:
            head = await connection.head_bytes()
            first, *lines = head[:-4].split(b"\r\n")
            method, target, version = first.split(b" ", 2)
            if version != b"HTTP/1.1":
                self.faults.append(f"a request line that is odd: {first!r}")
            body, _ = await read_body(connection, parse_fields(lines))
            if target.startswith(b"/answer-"):
                await connection.send(answers[int(target.rsplit(b"-", 1)[1])][0])
                return
            text = b"%b %b %d" % (method, target, len(body))
            await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text))
            if method != b"HEAD":
                await connection.send(text)


class _Llhttp:
    def __init__(self) -> None:
        self.found: list[Request] = []
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        self.target, self.body, self.fields = b"", b"", []  # type: ignore[var-annotated]

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.head = tuple(self.fields)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.found.append(Request(self.parser.get_method(), self.target, self.body, self.head))


def by_llhttp(stream: bytes) -> list[Request]:
    """The whole requests of a connection. Raises for bytes that are none."""
    reader = _Llhttp()
    reader.parser.feed_data(stream)
    return reader.found


def by_h11(stream: bytes) -> list[Request]:
    """The same by h11, which is written from the RFC's grammar."""
    found: list[Request] = []
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
    connection.receive_data(stream)
    head: Any = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA or event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
            return found
        if isinstance(event, h11.Request):
            head, body = event, b""
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            found.append(Request(head.method, head.target, body, tuple(head.headers)))
            connection.send(h11.Response(status_code=200, headers=[(b"Content-Length", b"0")]))
            connection.send(h11.EndOfMessage())
            connection.start_next_cycle()


def requests(stream: bytes) -> list[Request]:
    """The requests of a connection, on which both parsers agree to the byte."""
    one, other = by_llhttp(stream), by_h11(stream)
    assert one == other, f"two readers, two meanings: {one} and {other}"
    return one
