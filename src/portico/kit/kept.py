"""HTTP/1.1 requests to a few servers that we chose ourselves, over connections that are kept: certificate authorities.

    client = kept.Client(context, kept.Limits())
    answer = await client.request("GET", "https://ca.example.net/directory")

For addresses that customers name there is ``outbound.py``; this one goes where the operator's settings lead, thousands of times,
so a request costs a tenth of a millisecond. What a server may do to us is bounded all the same: the time of the whole exchange,
the bytes of head and body, connections that stay open; no redirect is followed, nothing is decompressed, no proxy is used.

A connection that the server closed while it was idle costs another attempt, of what may be repeated (GET, HEAD); whether a POST
came through that was broken off is for its caller to find out.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from portico.kit import dial

_PORTS: Final = {"https": 443, "http": 80}
#: Bytes of an answer beyond its body: its head, interim answers, and what divides chunks.
HEAD_BYTES: Final = 65_536
#: Connections that wait for the next request; the longest unused makes room.
IDLE: Final = 16

Origin = tuple[str, str, int]


class Broken(OSError):
    """No whole answer was had; ``strerror`` says why."""

    def __init__(self, why: str) -> None:
        super().__init__(0, why)

    def __str__(self) -> str:
        return str(self.strerror)


class TooLong(Exception):
    """The answer has more bytes than it may."""


class _Unheard(Broken):
    """The connection ended before the first byte of an answer."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may take: seconds of all of it, and bytes of the body of its answer."""

    timeout_seconds: float = 30.0
    body_bytes: int = 1_048_576


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Names of headers are lower-case; values of one that came twice are joined by commas (RFC 9110, 5.3)."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class Client:
    """Requests within ``limits``. ``context`` decides which servers are trusted. ``close`` at the end."""

    def __init__(self, context: ssl.SSLContext, limits: Limits, headers: Mapping[str, str] | None = None) -> None:
        self.limits = limits
        self._context = context
        self._context.set_alpn_protocols(["http/1.1"])
        self._headers = {"Accept-Encoding": "identity", **(headers or {})}
        self._idle: list[_Connection] = []

    async def request(
        self, method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request; any answer is an answer. Raises ``OSError`` (:class:`Broken`, ``TimeoutError``, ``ssl.SSLError`` are some)
        and :class:`TooLong`."""
        origin, host, target = _parts(url)
        fields = {"Host": host, **self._headers, **(headers or {})}
        if body:
            fields["Content-Length"] = str(len(body))
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        data = f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body
        async with asyncio.timeout(self.limits.timeout_seconds):
            while (connection := self._take(origin)) is not None:
                try:
                    return await self._over(connection, method, data)
                except _Unheard:
                    if method not in ("GET", "HEAD"):
                        raise
            return await self._over(await self._connect(origin), method, data)

    async def close(self) -> None:
        """Close its connections."""
        while self._idle:
            self._idle.pop().end()

    async def _over(self, connection: _Connection, method: str, data: bytes) -> Answer:
        answer = await connection.ask(data, self.limits.body_bytes, bodiless=method == "HEAD")
        if connection.usable:
            self._idle.append(connection)
            if len(self._idle) > IDLE:
                self._idle.pop(0).end()
        else:
            connection.end()
        return answer

    def _take(self, origin: Origin) -> _Connection | None:
        """The connection to ``origin`` that was used last."""
        self._idle = [each for each in self._idle if each.usable]
        for position in range(len(self._idle) - 1, -1, -1):
            if self._idle[position].origin == origin:
                return self._idle.pop(position)
        return None

    async def _connect(self, origin: Origin) -> _Connection:
        scheme, host, port = origin
        sock = await dial.connect_tcp(host, port)
        tls = self._context if scheme == "https" else None
        try:
            _, made = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(origin), sock=sock, ssl=tls, server_hostname=host if tls else None
            )
        except BaseException:
            sock.close()
            raise
        return made


def _parts(url: str) -> tuple[Origin, str, str]:
    """Where to connect, the Host header, and the target of a request; raises :class:`Broken` for what is no URL of ours."""
    try:
        found = urlsplit(url)
        port = found.port or _PORTS[found.scheme]
    except (ValueError, KeyError):
        raise Broken("that is no address of a server") from None
    host = found.hostname or ""
    target = (found.path or "/") + (f"?{found.query}" if found.query else "")
    plain = f"{host}{target}"
    if not host or not plain.isascii() or not plain.isprintable() or " " in plain or found.username is not None:
        raise Broken("that is no address of a server")
    shown = dial.bracketed(host)
    return (found.scheme, host, port), shown if port == _PORTS[found.scheme] else f"{shown}:{port}", target


class _Connection(asyncio.Protocol):
    """One connection: a request at a time. The callbacks without an underscore are the loop's and the parser's."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.usable = True
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._begin(0, bodiless=False)

    def _begin(self, most: int, *, bodiless: bool) -> None:
        self._parser: Any = HttpResponseParser(self)
        self._most, self._bodiless = most, bodiless
        self._read = 0
        self._status = 0
        self._fields: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size = 0
        self._headed = self._over = False

    async def ask(self, data: bytes, most: int, *, bodiless: bool) -> Answer:
        """Send a request, and wait for its answer; whoever gives up waiting ends the connection."""
        if self._transport is None or not self.usable:
            raise _Unheard("the connection ended before an answer")
        self._begin(most, bodiless=bodiless)
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            return await self._answer
        finally:
            self._answer = None
            if not self._over:
                self.end()

    def end(self) -> None:
        """Close it, whatever is under way."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # -- the loop

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.end()  # bytes that nobody asked for must not answer the next request
            return
        self._read += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            self._fail(Broken("it switched protocols without being asked"))
        except HttpParserError as err:
            self._fail(Broken(f"what came back is not HTTP: {str(err)[:100]}"))
        if not self._over and (self._size > self._most or self._read > self._most + HEAD_BYTES):
            self._fail(TooLong())

    def eof_received(self) -> bool:
        self._ended(None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._ended(exc)

    def _ended(self, exc: Exception | None) -> None:
        self.usable = False
        if self._answer is None or self._answer.done():
            return
        framed = "content-length" in self._fields or "transfer-encoding" in self._fields
        if self._headed and not framed and exc is None:
            self._succeed()  # its body ends with the connection
            return
        why = dial.reason(exc) if isinstance(exc, OSError) else "the connection ended before a whole answer"
        self._fail(_Unheard(why) if not self._read else Broken(why))

    def _fail(self, err: Exception) -> None:
        self.usable = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(err)

    def _succeed(self) -> None:
        self._over = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(self._status, self._fields, b"".join(self._body)))

    # -- the parser

    def on_message_begin(self) -> None:
        if self._over:
            self.usable = False  # a second answer to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._over:
            return
        text, known = name.decode("latin-1").lower(), value.decode("latin-1")
        self._fields[text] = f"{self._fields[text]}, {known}" if text in self._fields else known

    def on_headers_complete(self) -> None:
        if self._over:
            return
        self._status = self._parser.get_status_code()
        if self._status < 200:
            return
        self._headed = True
        if self._bodiless:  # the parser does not know HEAD: it waits for a body that does not come
            self.usable = self.usable and bool(self._parser.should_keep_alive())
            self._succeed()

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if not self._over and self._size <= self._most:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._over:
            return
        if self._status < 200:  # an interim answer: the next head begins
            self._fields = {}
            return
        if self._size > self._most:
            return
        self.usable = self.usable and bool(self._parser.should_keep_alive())
        self._succeed()
