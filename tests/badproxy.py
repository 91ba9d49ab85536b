"""An HTTPS proxy in front of a server that does what its script says to each request: pass it on, refuse, or break off.

``script(method, path)`` gives one of: None (pass it on), "drop" (close without an answer, nothing passed on), "drop after" (the
server has done it, and the answer is lost), or bytes (a whole answer, nothing passed on).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

Script = Callable[[str, str], bytes | str | None]


class Proxy:
    """``passed``: what the server was asked, as "METHOD /first-part-of-the-path", but for what it refused to look at because of
    its nonce (as Pebble does by chance, RFC 8555 section 6.5): the client asks that again."""

    def __init__(self, upstream: str, context: ssl.SSLContext, script: Script) -> None:
        self._host, self._port = urlsplit(upstream).hostname, urlsplit(upstream).port
        self._context = context
        self.script = script
        self.passed: list[str] = []
        self.asked = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            await self._one(reader, writer)
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        length = next((int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:")), 0)
        body = await reader.readexactly(length)
        method, path, _ = lines[0].split(" ")
        self.asked += 1
        said = self.script(method, path)
        if isinstance(said, bytes):
            writer.write(said)
            await writer.drain()
            return
        if said == "drop":
            return
        up, down = await asyncio.open_connection(self._host, self._port, ssl=self._context)
        kept = "\r\n".join(line for line in lines if not line.lower().startswith("connection:"))
        down.write(kept.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode("latin-1") + body)
        answer = await up.read()
        down.close()
        if b":badNonce" not in answer:
            self.passed.append(f"{method} /{path.split('/')[1]}")
        if said != "drop after":
            writer.write(answer)
            await writer.drain()


def answer(status: int, body: str = "", *fields: str, kind: str = "application/problem+json") -> bytes:
    """A whole answer."""
    more = "".join(f"{field}\r\n" for field in fields)
    head = f"HTTP/1.1 {status} Said\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return f"{head}{more}\r\n{body}".encode()


@contextlib.asynccontextmanager
async def proxy(
    upstream: str, trust: Path, certificate: tuple[Path, Path], script: Script
) -> AsyncIterator[tuple[Proxy, str]]:
    """The proxy and its own address; it shows ``certificate``, and trusts the server by ``trust``."""
    made = Proxy(upstream, ssl.create_default_context(cafile=str(trust)), script)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*map(str, certificate))
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
    try:
        yield made, f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
