"""A tunnel from end to end: a real relay, the real agent's link and forwarder, its local page, and a target that keeps every byte
that it was sent."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator
from typing import Any

import httpx

from portico.agent.forward import Forwarder
from portico.agent.inspector import Inspector
from portico.agent.link import Link
from portico.agent.stats import Stats
from portico.agent.target import parse_target
from portico.relay.server import Relay
from portico.settings import AgentSettings
from tests.agent.harness import SilentOwner
from tests.relay.doubles import Client, grant, port, row, session_token
from tests.relay.known import forget

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
SWITCH = b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


class Target:
    """A local app: gives every request the same ``answer``, echoes after the ``switch`` of an upgrade, keeps what it was sent."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.answer = HELLO
        self.switch = SWITCH

    async def start(self) -> int:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self.server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.sent += head
                if b"\r\nupgrade:" in head.lower():
                    writer.write(self.switch)
                    while data := await reader.read(4096):
                        writer.write(data)
                else:
                    writer.write(self.answer)
        writer.close()

    @property
    def requests(self) -> int:
        return self.sent.count(b" HTTP/1.1\r\n")


@dataclasses.dataclass
class Edge:
    """A tunnel that is online, and what can be seen of it from every side."""

    relay: Relay
    target: Target
    page: httpx.AsyncClient
    versions: Any = dataclasses.field(default_factory=lambda: itertools.count(2))

    def change(self, policy: dict[str, Any]) -> None:
        """The edge stream brings another policy."""
        version = self.relay.snapshot.version
        assert version is not None
        tunnel = row("web", policy=policy, policy_version=next(self.versions))
        change = {"kind": "tunnel", "tunnel": tunnel}
        self.relay.snapshot.apply({"type": "delta", "version": version + 1, "changes": [change]})


@contextlib.asynccontextmanager
async def online(relay: Relay, policy: dict[str, Any], **agent: Any) -> AsyncIterator[Edge]:
    """The tunnel ``web.localhost`` under a policy; ``agent``: options of its forwarder."""
    forget()
    target = Target()
    settings = dataclasses.replace(AgentSettings(), web_addr="127.0.0.1:0")
    stats = Stats()
    inspector = Inspector(settings, stats)
    forwarder = Forwarder(parse_target(str(await target.start())), settings, stats, **agent)
    forwarder.tap = inspector.recorder.tap(forwarder, "web")
    assert await inspector.start()
    link = Link(SilentOwner(), settings, f"ws://127.0.0.1:{port(relay, 0)}/v1/connect", 1)
    await link.open(session_token())
    link.bound[1] = forwarder
    link.bind(1, grant(policy=policy, policy_version=1))
    async with asyncio.timeout(30):
        while b"web.localhost" not in relay.public.by_host:
            await asyncio.sleep(0.005)
    try:
        async with httpx.AsyncClient(base_url=inspector.url, trust_env=False) as page:
            yield Edge(relay, target, page)
    finally:
        link.close("test over")
        await forwarder.abort()
        await inspector.close()
        target.server.close()


async def ask(client: Client, request: bytes) -> tuple[int, bytes | None, dict[bytes, list[bytes]]]:
    """Status, code of the refusal, fields."""
    client.send(request)
    status, fields, _ = await client.response()
    return status, fields.get(b"portico-error", [None])[0], fields
