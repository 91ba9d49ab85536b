"""Somebody's webhook receiver: keeps what it got, checks signatures as Standard Webhooks has it, and misbehaves on request.

    async with WebhookReceiver(context, secrets=[secret]) as receiver:
        receiver.plan(Behaviour(status=429, headers={"retry-after": "30"}), Behaviour("hang"))
        …                                       # the next two requests fare so; all later ones get 200
        receiver.got[0].body

A message whose signature does not fit is answered 401, and is in ``refused``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import h11

from portico.kit import signing
from portico.simulators.loopback import Loopback

#: How a request can fare. ``answer``: as told. ``hang``: never an answer. ``reset``: the connection is reset when the request is
#: read. ``reset_in_head``, ``reset_in_body``: in the middle of the answer. ``drip``: a byte of the answer each ``seconds``.
#: ``garbage``: no HTTP. ``endless``: a body without an end. ``interim``: 103 answers without an end. ``big_head``: so the head.
Kind = Literal[
    "answer", "hang", "reset", "reset_in_head", "reset_in_body", "drip", "garbage", "endless", "interim", "big_head"
]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the receiver does with one request; ``seconds`` is the pause before it."""

    kind: Kind = "answer"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Got:
    """A request that was read whole. ``at`` is monotonic."""

    at: float
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        """Its webhook-id, empty without one."""
        return self.headers.get(signing.ID, "")


class WebhookReceiver(Loopback):
    """Listens on 127.0.0.1 while it is entered; ``url`` is where. With a ``context`` it speaks https."""

    broken: ClassVar = (h11.RemoteProtocolError,)

    def __init__(
        self,
        context: ssl.SSLContext | None = None,
        *,
        secrets: Sequence[str] = (),
        host: str = "localhost",
        port: int = 0,
    ) -> None:
        super().__init__(context, port=port)
        self._host = host
        self.secrets = list(secrets)
        self.got: list[Got] = []
        self.refused: list[Got] = []
        #: Requests in hand, and the most that there were at once.
        self.now = self.most = 0
        #: For everything that no plan is made for.
        self.usual = Behaviour()
        self._plan: deque[Behaviour] = deque()
        self._changed = asyncio.Condition()

    def plan(self, *behaviours: Behaviour) -> None:
        """How the next requests fare, one each."""
        self._plan.extend(behaviours)

    async def until(self, count: int, seconds: float = 10.0) -> list[Got]:
        """What was got, when it is ``count`` requests at least; ``TimeoutError`` when it never is."""
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(lambda: len(self.got) >= count)
        return self.got

    @property
    def url(self) -> str:
        return f"{'https' if self._context else 'http'}://{self._host}:{self.port}/hook"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self._serve(reader, writer)
        finally:
            self.now -= 1
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = await _read(reader)
        if got is None:
            return
        behaviour = self._plan.popleft() if self._plan else self.usual
        if self.secrets and not self._believed(got):
            self.refused.append(got)
            behaviour = Behaviour(status=401)
        async with self._changed:
            self.got.append(got)
            self._changed.notify_all()
        if behaviour.kind != "drip":
            await asyncio.sleep(behaviour.seconds)
        await _act(behaviour, writer)

    def _believed(self, got: Got) -> bool:
        try:
            signing.verify(self.secrets, got.headers, got.body, time.time())
        except signing.SignatureError:
            return False
        return True


async def _read(reader: asyncio.StreamReader) -> Got | None:
    connection = h11.Connection(h11.SERVER)
    request: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65_536))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            fields = {name.decode(): value.decode("latin-1") for name, value in request.headers}
            return Got(time.monotonic(), request.target.decode(), fields, bytes(body))
        else:
            return None


def _answer(behaviour: Behaviour, length: int | None = None) -> bytes:
    lines = [
        f"HTTP/1.1 {behaviour.status} Whatever",
        f"content-length: {len(behaviour.body) if length is None else length}",
    ]
    lines += [f"{name}: {value}" for name, value in behaviour.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + behaviour.body


async def _act(behaviour: Behaviour, writer: asyncio.StreamWriter) -> None:
    match behaviour.kind:
        case "answer":
            writer.write(_answer(behaviour))
            await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
            await asyncio.sleep(0.05)  # aborting now could take back what was written
        case "hang":
            await asyncio.Event().wait()
        case "reset":
            reset(writer)
        case "reset_in_head":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
            await writer.drain()
            reset(writer)
        case "reset_in_body":
            writer.write(_answer(behaviour, 1000))
            await writer.drain()
            await asyncio.sleep(0.05)
            reset(writer)
        case "drip":
            for byte in _answer(behaviour):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(behaviour.seconds)
        case "garbage":
            writer.write(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)
        case _:
            await _pour(behaviour, writer)


async def _pour(behaviour: Behaviour, writer: asyncio.StreamWriter) -> None:
    """Bytes without an end, until nobody reads them."""
    first, more = {
        "endless": (_answer(behaviour, 10**12), b"x" * 16_384),
        "interim": (b"", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 100),
        "big_head": (b"HTTP/1.1 200 OK\r\n", b"x-more: " + b"y" * 1000 + b"\r\n"),
    }[behaviour.kind]
    writer.write(first)
    while True:
        writer.write(more)
        await writer.drain()


def reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    sock: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
