"""WebSocket targets that say what they made of a connection: one by the `websockets` library, one that follows a script.

Go's own (`/websocket/echo` of go-httpbin) is the third; it says what it thinks in its close frame alone.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
import zlib
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory

from portico.kit.sockets import reset_transport
from tests.differential.exact import Connection, parse_fields

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
WAIT_SECONDS = 5.0


class Verdicts:
    """What targets noted, by the path that was asked for. Filled in one thread, waited for in another."""

    def __init__(self) -> None:
        self._by_path: dict[str, Any] = {}
        self._news = threading.Condition()

    def note(self, path: str, verdict: Any) -> None:
        with self._news:
            self._by_path[path] = verdict
            self._news.notify_all()

    def get(self, path: str) -> Any:
        """The verdict on ``path``, when it is there; ``None`` when the target never had that connection."""
        with self._news:
            self._news.wait_for(lambda: path in self._by_path, WAIT_SECONDS)
            return self._by_path.pop(path, None)


class Library:
    """Echoes messages; the verdict is what they were, the close codes both ways, and whether the end was clean."""

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._ready = threading.Event()
        self.port = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _main(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        deflate = ServerPerMessageDeflateFactory()
        async with serve(
            self._echo,
            "127.0.0.1",
            0,
            compression=None,
            extensions=[deflate],
            select_subprotocol=lambda _, offered: next((name for name in ("two", "one") if name in offered), None),  # type: ignore[arg-type, return-value]
            max_size=2**25,
            ping_interval=None,
            close_timeout=0.5,
        ) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            self._ready.set()
            await self._over.wait()

    async def _echo(self, connection: ServerConnection) -> None:
        heard: list[tuple[str, int, int]] = []
        end: Any = None
        try:
            while True:
                message = await connection.recv()
                data = message.encode() if isinstance(message, str) else message
                heard.append((type(message).__name__, len(data), zlib.crc32(data)))
                await connection.send(message)
        except ConnectionClosed as closed:
            end = tuple((c.code, c.reason) if c is not None else None for c in (closed.rcvd, closed.sent))
            end += (type(closed).__name__,)
        assert connection.request is not None
        self._verdicts.note(connection.request.path, (tuple(heard), end))

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)


class Scripted:
    """A target that upgrades and then does what its path says (`/speak/N`, `/half/N`, …); notes the bytes and the end."""

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        first, *lines = (await connection.head_bytes())[:-4].split(b"\r\n")
        path = first.split(b" ")[1].decode()
        key = next(value for name, value in parse_fields(lines) if name.lower() == b"sec-websocket-key")
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
        upgrade = (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
        )
        heard = await getattr(self, "_" + path.split("/")[1])(connection, upgrade)
        self._verdicts.note(path, heard)

    @staticmethod
    async def _until_end(connection: Connection) -> tuple[bytes, str]:
        data = bytearray()
        try:
            while more := await connection.reader.read(65536):
                data += more
        except OSError:
            return bytes(data), "reset"
        return bytes(data), "end"

    async def _speak(self, connection: Connection, upgrade: bytes) -> Any:
        """The first frames come in the segment of the 101."""
        await connection.send(upgrade + b"\x81\x05hello" + b"\x89\x02hi" + b"\x82\x7e\x10\x00" + b"x" * 4096)
        return await self._until_end(connection)

    async def _half(self, connection: Connection, upgrade: bytes) -> Any:
        """After the visitor's end there is still something to say."""
        await connection.send(upgrade)
        heard = await self._until_end(connection)
        await connection.send(b"\x81\x04late")
        return heard

    async def _first(self, connection: Connection, upgrade: bytes) -> Any:
        """It ends its own way first, and still listens."""
        await connection.send(upgrade + b"\x88\x02\x03\xe8")
        connection.writer.write_eof()
        return await self._until_end(connection)

    async def _reset(self, connection: Connection, upgrade: bytes) -> Any:
        """It is gone in the middle of a frame."""
        await connection.send(upgrade + b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00" + b"y" * 1000)
        await connection.reader.readexactly(1)
        reset(connection)
        return b"", "gone"


def reset(connection: Connection) -> None:
    """End it with RST."""
    reset_transport(connection.writer.transport)
