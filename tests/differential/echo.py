"""A target that answers with the exact bytes of the request that it got: its head as it came, then its body and trailers.

GET /anything            200, the head and the body
/hints                   103 first
/expect                  100 for `Expect: 100-continue`, then as above (without this path the body is not waited for: 417)
/old                     an answer of HTTP/1.0 that ends with the connection
/raw/HEX                 the bytes of HEX, then the end of the connection
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

from tests.differential.exact import READ_LIMIT, Connection, Fields, parse_fields

SEPARATOR = b"\n=====\n"


class ThreadedServer:
    """An asyncio server in a thread with a loop of its own, for fixtures that outlive a test's loop."""

    def __init__(self, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self._serve = serve
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, limit=READ_LIMIT, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready.set()
        await self._over.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def run() -> None:
            try:
                await self._serve(reader, writer)
            except (OSError, EOFError):
                pass
            finally:
                writer.close()

        task = self._loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Requests of one connection, one after the other."""
    connection = Connection(reader, writer)
    while True:
        head = await connection.head_bytes()
        first, *lines = head[:-4].split(b"\r\n")
        method, target, version = first.split(b" ", 2)
        fields = parse_fields(lines)
        if target.startswith(b"/raw/"):
            await connection.send(bytes.fromhex(target[5:].decode()))
            return
        if target == b"/hints":
            await connection.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nlink: </b.js>\r\n\r\n")
        if any(name.lower() == b"expect" for name, _ in fields):
            if target != b"/expect":
                await connection.send(
                    b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
                return
            await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body, trailers = await read_body(connection, fields)
        shown = head + SEPARATOR + body + SEPARATOR + b"".join(b"%b: %b\r\n" % pair for pair in trailers)
        if target == b"/old":
            await connection.send(b"HTTP/1.0 200 Fine\r\nX-Old: 1\r\n\r\n" + shown)
            return
        await connection.send(
            b"HTTP/1.1 200 As It Came\r\nx-LOWER: 1\r\nX-Twice: a\r\nX-Empty:\r\nx-twice: b\r\nX-Octets: caf\xe9\r\n"
            b"Content-Length: %d\r\nX-Twice: c\r\n\r\n" % len(shown) + (shown if method != b"HEAD" else b"")
        )
        options = [value.lower() for name, value in fields if name.lower() == b"connection"]
        if b"close" in options or (version == b"HTTP/1.0" and b"keep-alive" not in options):
            return


async def read_body(connection: Connection, fields: Fields) -> tuple[bytes, Fields]:
    """The body as the fields frame it, and its trailers."""
    for name, value in fields:
        if name.lower() == b"transfer-encoding":
            assert value == b"chunked"
            return await connection.chunked()
        if name.lower() == b"content-length":
            return await connection.reader.readexactly(int(value)), []
    return b"", []
