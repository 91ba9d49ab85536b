"""Small real proxies for tests, HTTP CONNECT and SOCKS5, that misbehave on request."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
from collections.abc import AsyncIterator


class TestProxy:
    """One proxy. ``asked`` keeps every (host, port) that a client wanted, as it wrote it; ``opened`` counts connections through.

    ``users``: who may use it, with passwords; none: everybody. ``names``: where host names lead that exist only here.
    ``answer``: what is said instead of working, byte for byte, ``b""`` to say nothing and hang, ``None`` to work.
    ``trickle``: send answers one byte at a time.
    """

    __test__ = False

    def __init__(self, kind: str = "http") -> None:
        self.kind = kind
        self.users: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.answer: bytes | None = None
        self.trickle = False
        self.asked: list[tuple[str, int]] = []
        self.accepted = 0
        self.opened = 0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self.kind == 'http' else 'socks5h'}://127.0.0.1:{self.port}"

    def url_for(self, user: str, password: str, scheme: str = "") -> str:
        scheme = scheme or self.url.partition(":")[0]
        return f"{scheme}://{user}:{password}@127.0.0.1:{self.port}"

    async def start(self) -> TestProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        try:
            await (self._http if self.kind == "http" else self._socks)(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _say(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        for part in [data[i : i + 1] for i in range(len(data))] if self.trickle else [data]:
            writer.write(part)
            await writer.drain()
            if self.trickle:
                await asyncio.sleep(0.001)

    async def _instead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self.answer is not None
        await self._say(writer, self.answer)
        if not self.answer:
            await reader.read()  # until the client gives up

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split("\r\n")[0].split(" ")
        host, _, port = target.rpartition(":")
        self.asked.append((host, int(port)))
        if self.answer is not None:
            return await self._instead(reader, writer)
        if self.users:
            given = [
                line.split(" ", 2)[2] for line in head.split("\r\n") if line.startswith("Proxy-Authorization: Basic ")
            ]
            user, _, password = base64.b64decode(given[0]).decode().partition(":") if given else ("", "", "")
            if self.users.get(user) != password or not given:
                said = b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\n\r\n"
                return await self._say(writer, said)
        if method != "CONNECT":
            return await self._say(writer, b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")
        try:
            far = await self._dial(host.strip("[]"), int(port))
        except OSError:
            return await self._say(writer, b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        await self._say(writer, b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")
        await self._splice(reader, writer, *far)
        return None

    async def _socks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.answer is not None:
            await reader.read(1)
            return await self._instead(reader, writer)
        version, count = await reader.readexactly(2)
        assert version == 5
        methods = await reader.readexactly(count)
        wanted = 2 if self.users else 0
        if wanted not in methods:
            return await self._say(writer, b"\x05\xff")
        await self._say(writer, bytes([5, wanted]))
        if self.users:
            assert await reader.readexactly(1) == b"\x01"
            user = await reader.readexactly((await reader.readexactly(1))[0])
            password = await reader.readexactly((await reader.readexactly(1))[0])
            good = self.users.get(user.decode()) == password.decode()
            await self._say(writer, b"\x01\x00" if good else b"\x01\x01")
            if not good:
                return None
        _, _, _, kind = await reader.readexactly(4)
        if kind == 3:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        else:
            host = str(ipaddress.ip_address(await reader.readexactly(4 if kind == 1 else 16)))
        port = int.from_bytes(await reader.readexactly(2), "big")
        self.asked.append((host, port))
        try:
            far = await self._dial(host, port)
        except ConnectionRefusedError:
            return await self._say(writer, b"\x05\x05\x00\x01" + bytes(6))
        except PermissionError:
            return await self._say(writer, b"\x05\x02\x00\x01" + bytes(6))
        except OSError:
            return await self._say(writer, b"\x05\x04\x00\x01" + bytes(6))
        await self._say(
            writer, b"\x05\x00\x00\x03\x04here\x00\x01"
        )  # a bound address that is a name: allowed, and rare
        await self._splice(reader, writer, *far)
        return None

    async def _dial(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if host == "forbidden.example":
            raise PermissionError
        far = await asyncio.open_connection(self.names.get(host, host), port)
        self.opened += 1
        return far

    async def _splice(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
    ) -> None:
        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
                sink.write_eof()

        try:
            await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))
        finally:
            far_writer.transport.abort()


@contextlib.asynccontextmanager
async def proxy(kind: str = "http") -> AsyncIterator[TestProxy]:
    """A proxy for the length of a test."""
    made = await TestProxy(kind).start()
    try:
        yield made
    finally:
        await made.stop()
