"""A small real HTTP server that speaks the edge API, and misbehaves on request: stalls, cuts, garbage, refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

Script = Callable[["Stream"], Awaitable[None]]
Answer = tuple[int, bytes]


class Stream:
    """One open edge stream, as its script sees it."""

    def __init__(self, writer: asyncio.StreamWriter, version: str | None, authorization: str) -> None:
        self._writer = writer
        self.version = version
        self.authorization = authorization

    async def head(self, status: int = 200, extra: str = "") -> None:
        self._writer.write(
            f"HTTP/1.1 {status} X\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n{extra}\r\n".encode()
        )
        await self._writer.drain()

    async def raw(self, data: bytes) -> None:
        self._writer.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self._writer.drain()

    async def line(self, message: Any) -> None:
        await self.raw(json.dumps(message).encode() + b"\n")

    async def end(self) -> None:
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    def cut(self) -> None:
        """The connection is reset, in the middle of whatever it carried."""
        self._writer.transport.abort()


class EdgeApi:
    """Each stream request runs the next script; the last one runs for all that follow."""

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.streams: list[Stream] = []
        self.heartbeats: list[dict[str, Any]] = []
        self.usage: list[dict[str, Any]] = []
        self.heartbeat_times: list[float] = []
        self.on_heartbeat: Callable[[], Awaitable[Answer]] = self._ok
        self.on_certificates: Callable[[str, dict[str, Any]], Answer] | None = None
        self.on_usage: Callable[[dict[str, Any]], Awaitable[Answer]] = self._count
        self.arrived = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """On the port of the first start, so that a restart is one."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Waits for ``condition``, looked at after every request and every few milliseconds."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    @staticmethod
    async def _ok() -> Answer:
        return 200, b'{"ok":true,"time":0}'

    @staticmethod
    async def _count(report: dict[str, Any]) -> Answer:
        return 200, json.dumps({"acknowledged": report["batches"][-1]["seq"]}).encode()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = lines[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path, _, query = target.partition("?")
        if (method, path) == ("GET", "/v1/edge/stream"):
            version = query.removeprefix("version=") if query else None
            stream = Stream(writer, version, headers.get("authorization", ""))
            self.streams.append(stream)
            script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
            await script(stream)
            return False
        status, answer = await self._post(path, json.loads(body))
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(answer), answer))
        await writer.drain()
        return True

    async def _post(self, path: str, message: dict[str, Any]) -> Answer:
        if path == "/v1/edge/heartbeat":
            self.heartbeats.append(message)
            self.heartbeat_times.append(asyncio.get_running_loop().time())
            return await self.on_heartbeat()
        if path in ("/v1/edge/certificates", "/v1/edge/acks") and self.on_certificates is not None:
            return self.on_certificates(path, message)
        assert path == "/v1/edge/usage"
        self.usage.append(message)
        return await self.on_usage(message)
