"""The relay's side of a session for tests: a real WebSocket server made of the same Session and Carrier."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

from picows import WSUpgradeRequest, WSUpgradeResponse, WSUpgradeResponseWithListener, ws_create_server

from portico.agent.forward import Forwarder
from portico.agent.link import Link, Serves
from portico.agent.stats import Stats
from portico.agent.target import Target
from portico.errors import Problem
from portico.kit.carrier import Carrier
from portico.settings import AgentSettings
from portico.wire import frames as f
from portico.wire.session import Session
from portico.wire.stream import Stream


class Visit:
    """One stream as the relay sees it: everything that came is kept. ``hold`` keeps the credit back (a slow reader)."""

    def __init__(self, hold: bool = False) -> None:
        self.stream: Stream
        self.status = 0
        self.head: list[bytes] = []
        self.interim: list[tuple[int, list[bytes]]] = []
        self.body = bytearray()
        self.chunks: list[bytes] = []
        self.trailers: list[bytes] | None = None
        self.reset: tuple[int, str] | None = None
        self.opened = False
        self.ended = False
        self.hold = hold
        self.unread = 0
        self._news = asyncio.Event()

    def on_response(self, status: int, head: list[bytes], end: bool) -> None:
        self.status, self.head, self.ended = status, head, end
        self._news.set()

    def on_interim(self, status: int, head: list[bytes]) -> None:
        self.interim.append((status, head))
        self._news.set()

    def on_opened(self) -> None:
        self.opened = True
        self._news.set()

    def on_data(self, data: bytes, end: bool) -> None:
        self.body += data
        self.chunks.append(data)
        self.ended = end
        if self.hold:
            self.unread += len(data)
        else:
            self.stream.consumed(len(data))
        self._news.set()

    def on_end(self, trailers: list[bytes]) -> None:
        self.trailers, self.ended = trailers, True
        self._news.set()

    def on_reset(self, code: int, detail: str) -> None:
        self.reset = (code, detail)
        self._news.set()

    def on_credit(self) -> None:
        self._news.set()

    def release(self) -> None:
        """Read what was held back, and from now on everything at once."""
        self.hold = False
        size, self.unread = self.unread, 0
        self.stream.consumed(size)

    def field(self, name: bytes) -> list[bytes]:
        """The values of one response field."""
        pairs = zip(self.head[1::2], self.head[2::2], strict=True)
        return [value for key, value in pairs if key.lower() == name.lower()]

    async def until(self, what: Callable[[], Any], limit: float = 30.0) -> None:
        """Wait until ``what()`` holds."""
        async with asyncio.timeout(limit):
            while not what():
                self._news.clear()
                await self._news.wait()

    async def over(self, limit: float = 30.0) -> Visit:
        """Wait until the response is complete or the stream was reset."""
        await self.until(lambda: self.ended or self.reset is not None, limit)
        return self

    async def send(self, data: bytes, end: bool = False) -> None:
        """Send request bytes, within credit."""
        while data:
            room = self.stream.sendable()
            if room <= 0:
                self.stream.wait()
                self._news.clear()
                await asyncio.wait_for(self._news.wait(), 30)
                if self.reset is not None:
                    return
                continue
            part, data = data[:room], data[room:]
            self.stream.send_data(part, end and not data)


class RelayConnection:
    """One agent's connection. What it asked for is in ``grants``, ``auths``, ``unbinds``."""

    def __init__(self, relay: Relay, token: str) -> None:
        self.relay = relay
        self.token = token
        self.hello: dict[str, Any] = {}
        self.grants: list[tuple[int, str]] = []
        self.auths: list[str] = []
        self.unbinds: list[int] = []
        self.goaway = ""
        self.lost = False
        self.error: tuple[str, str] | None = None
        self.session = Session(self, relay=True)
        self.carrier = Carrier(self.session, ping_interval=5, ping_timeout=5, on_lost=self._lost)

    def _lost(self, detail: str) -> None:
        self.lost = True
        self.relay.news.set()

    def on_hello(self, body: dict[str, Any]) -> None:
        self.hello = body
        if self.relay.mute:
            return
        self.session.control(f.HELLO, 0, version=1, relay="test", session="ses_1", **self.relay.pings)

    def on_bind(self, bind: int, grant: str) -> None:
        self.grants.append((bind, grant))
        self.relay.news.set()
        answer = self.relay.on_bind(self, bind, grant)
        if answer is None:
            name = grant.split(":")[0]
            self.session.control(f.BOUND, bind, tunnel=f"tun_{name}", name=name, url=f"http://{name}.localhost:7080")
        elif answer:
            self.session.control(f.REFUSED, bind, code=answer, detail=f"refused: {answer}", retryable=True)

    def on_auth(self, token: str) -> None:
        self.auths.append(token)
        self.session.control(f.AUTHED, 0, expires_at="2026-11-23T15:21:20Z")
        self.relay.news.set()

    def on_unbind(self, bind: int, code: str, detail: str) -> None:
        self.unbinds.append(bind)
        self.relay.news.set()

    def on_goaway(self, code: str, detail: str, retry_after_ms: int) -> None:
        self.goaway = code
        self.relay.news.set()

    def on_error(self, code: str, detail: str, retryable: bool) -> None:
        self.error = (code, detail)

    def on_pong(self, payload: bytes) -> None:
        self.carrier.note_pong(payload)

    def on_bound(self, *_: Any) -> None: ...
    def on_refused(self, *_: Any) -> None: ...
    def on_authed(self, *_: Any) -> None: ...
    def on_counts(self, *_: Any) -> None: ...
    def on_request(self, *_: Any) -> None: ...
    def on_open(self, *_: Any) -> None: ...

    # ── what a test says ──────────────────────────────────────────────────────────────────────────────────────────
    def request(
        self, head: list[bytes], *, end: bool = True, flags: int = 0, bind: int = 1, hold: bool = False
    ) -> Visit:
        """REQUEST with ``head``; ``end``: no body follows."""
        visit = Visit(hold)
        visit.stream = self.session.open_request(bind, head, flags | (f.F_END if end else 0), visit)
        return visit

    def get(self, path: bytes = b"/", *fields: bytes, hold: bool = False, method: bytes = b"GET") -> Visit:
        return self.request([method, path, b"Host", b"web.localhost", *fields], hold=hold)

    def open_tcp(self, bind: int = 1) -> Visit:
        visit = Visit()
        visit.stream = self.session.open_tcp(bind, {"peer": "1.2.3.4:5", "local": "0.0.0.0:6"}, visit)
        return visit

    def unbind(self, bind: int, code: str) -> None:
        self.session.control(f.UNBIND, bind, code=code, detail=f"the platform says {code}")

    def end(self, code: str) -> None:
        self.session.fail(code, f"the platform says {code}")
        self.carrier.end(1008, code)  # type: ignore[arg-type]


class Relay:
    """A relay of a test: accepts agents, answers their binds by ``on_bind`` (``None``: bound, a code: refused)."""

    def __init__(self) -> None:
        self.connections: list[RelayConnection] = []
        self.refuse: dict[str, Any] | None = None
        self.refused = 0
        self.hosts: list[str] = []
        self.mute = False
        self.pings = {"ping_interval_ms": 5000, "ping_timeout_ms": 5000}
        self.on_bind: Callable[[RelayConnection, int, str], str | None] = lambda *_: None
        self.news = asyncio.Event()
        self.server: asyncio.Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/connect"

    def _accept(self, request: WSUpgradeRequest) -> Any:
        if self.refuse is not None:
            self.refused += 1
            self.news.set()
            status = HTTPStatus(self.refuse["status"])
            body = json.dumps(self.refuse).encode()
            return WSUpgradeResponseWithListener(
                WSUpgradeResponse.create_error_response(status, body, {"Content-Type": "application/problem+json"}),
                None,
            )
        token = request.headers["Authorization"].removeprefix("Bearer ")
        self.hosts.append(request.headers["Host"])
        connection = RelayConnection(self, token)
        self.connections.append(connection)
        self.news.set()
        return WSUpgradeResponseWithListener(
            WSUpgradeResponse.create_101_response(
                {"Sec-WebSocket-Protocol": request.headers["Sec-WebSocket-Protocol"]}
            ),
            connection.carrier,
        )

    async def start(self, port: int = 0, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Relay:
        self.server = await ws_create_server(
            self._accept, host, port, max_frame_size=2 * 1024 * 1024, reuse_address=True, ssl=tls
        )
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self.server is not None:
            self.server.close()
            self.server = None
        for connection in self.connections:
            connection.carrier.abort("relay stopped")
        await asyncio.sleep(0)

    async def until(self, what: Callable[[], Any], limit: float = 30.0) -> None:
        async with asyncio.timeout(limit):
            while not what():
                self.news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), 0.05)

    async def bound(self, count: int = 1, limit: float = 30.0) -> RelayConnection:
        """The newest connection, once it has asked for ``count`` binds."""
        await self.until(lambda: self.connections and len(self.connections[-1].grants) >= count, limit)
        return self.connections[-1]


class SilentOwner:
    """Hears a link and does nothing."""

    def __init__(self) -> None:
        self.lost: Problem | None = None

    def link_bound(self, *_: Any) -> None: ...
    def link_refused(self, *_: Any) -> None: ...
    def link_unbound(self, *_: Any) -> None: ...
    def link_counts(self, *_: Any) -> None: ...
    def link_goaway(self, *_: Any) -> None: ...
    def link_lost(self, link: Link, problem: Problem) -> None:
        self.lost = problem


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Tunnel:
    """A forwarder behind a real link to a test relay, and a target written as a stream handler."""

    def __init__(self, relay: RelayConnection, forwarder: Any, hub: Relay, link: Link, port: int) -> None:
        self.relay, self.forwarder, self.hub, self.link, self.port = relay, forwarder, hub, link, port
        self.get = relay.get
        self.request = relay.request


@contextlib.asynccontextmanager
async def tunnel_to(target: Target, settings: AgentSettings | None = None, **options: Any) -> AsyncIterator[Tunnel]:
    """A tunnel to ``target``."""
    settings = settings or AgentSettings()
    forwarder = Forwarder(target, settings, Stats(), **options)
    async with serving(forwarder, settings) as (relay, hub, link):
        yield Tunnel(relay, forwarder, hub, link, target.port)
    await forwarder.abort()


@contextlib.asynccontextmanager
async def serving(
    serves: Serves, settings: AgentSettings, **hello: Any
) -> AsyncIterator[tuple[RelayConnection, Relay, Link]]:
    """``serves`` behind a link, as bind 1; ``hello``: more members of the relay's HELLO."""
    hub = await Relay().start()
    hub.pings |= hello
    link = Link(SilentOwner(), settings, hub.url, 1)
    await link.open("token")
    link.bound[1] = serves
    try:
        yield hub.connections[0], hub, link
    finally:
        link.close("test over")
        await hub.stop()


@contextlib.asynccontextmanager
async def target_server(handler: Handler, **options: Any) -> AsyncIterator[int]:
    """A TCP server that runs ``handler`` per connection; yields its port."""
    tasks: set[asyncio.Task[Any]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            with contextlib.suppress(ConnectionError):
                writer.close()

    server = await asyncio.start_server(run, "127.0.0.1", 0, limit=1 << 20, **options)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """One request head, with its empty line."""
    return await reader.readuntil(b"\r\n\r\n")


def answering(*responses: bytes, close: bool = False, seen: list[bytes] | None = None) -> Handler:
    """A target that answers each request head with the next of ``responses`` (the last one again and again)."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count = 0
        while True:
            head = await read_head(reader)
            if seen is not None:
                seen.append(head)
            writer.write(responses[min(count, len(responses) - 1)])
            await writer.drain()
            count += 1
            if close:
                return

    return handler
