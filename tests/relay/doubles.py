"""An agent made of the same session and carrier, scripted by the test, and a visitor that writes exact bytes."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any

import picows

from portico.kit.carrier import MAX_MESSAGE, Carrier
from portico.kit.jwt import SigningKey
from portico.relay.server import Relay
from portico.wire import frames as f
from portico.wire import grants
from portico.wire.counts import Counts
from portico.wire.session import Session
from portico.wire.stream import Stream

KEY = SigningKey.generate()
ORG = "org_test"


def session_token(
    session: str = "ses_a", agent: str = "agt-a", generation: int = 1, life: int = 900, age: int = 0
) -> str:
    claims = grants.session_claims(
        key="key_1", session=session, organization=ORG, agent=agent, region=None, generation=generation,
        now=int(time.time()) - age, life=life,
    )  # fmt: skip
    return KEY.sign(grants.SESSION_TYP, claims)


def grant(
    name: str = "web",
    session: str = "ses_a",
    generation: int = 1,
    life: int = 900,
    age: int = 0,
    concurrency: int = 100,
    policy: dict[str, Any] | None = None,
    policy_version: int = 0,
    tunnel: str | None = None,
    protocol: str = "http",
    limits: dict[str, int] | None = None,
) -> str:
    mode = "passthrough" if protocol == "tls" else "terminate"
    claims = grants.grant_claims(
        session=session, organization=ORG, tunnel=tunnel or f"tun_{name}", name=name, protocol=protocol,
        hosts=[{"host": f"{name}.localhost", "tls": mode}], limits=limits or {"concurrency": concurrency},
        generation=generation, policy_hash="none", policy=policy or {}, url=f"http://{name}.localhost",
        now=int(time.time()) - age, life=life,
    )  # fmt: skip
    return KEY.sign(grants.GRANT_TYP, claims | {"policy_version": policy_version}, limit=grants.MAX_GRANT_BYTES)


def row(
    name: str, state: str = "active", generation: int = 1, policy: dict[str, Any] | None = None, policy_version: int = 0
) -> dict[str, Any]:
    return {
        "id": f"tun_{name}", "organization": ORG, "hosts": [f"{name}.localhost"], "state": state, "generation": generation,
        "policy": policy or {}, "policy_version": policy_version,
    }  # fmt: skip


class ScriptedStream:
    """A stream at the agent; records what came and acknowledges it."""

    def __init__(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> None:
        self.stream, self.bind, self.flags = stream, bind, flags
        self.method, self.target = head[0], head[1]
        self.fields = list(zip(head[2::2], head[3::2], strict=True))
        self.body = bytearray()
        self.trailers: list[bytes] | None = None
        self.reset: tuple[int, str] | None = None
        self.take = True
        self.ended = asyncio.Event()
        if flags & f.F_END:
            self.ended.set()

    def get(self, name: bytes) -> list[bytes]:
        return [value for field, value in self.fields if field.lower() == name.lower()]

    def on_data(self, data: bytes, end: bool) -> None:
        self.body += data
        if self.take:
            self.stream.consumed(len(data))
        if end:
            self.ended.set()

    def on_end(self, trailers: list[bytes]) -> None:
        self.trailers = trailers
        self.ended.set()

    def on_reset(self, code: int, detail: str) -> None:
        self.reset = (code, detail)
        self.ended.set()

    def on_credit(self) -> None:
        if self.feeding is not None:
            self.feeding()

    feeding: Callable[[], None] | None = None

    def answer(self, status: int = 200, fields: tuple[bytes, ...] = (), body: bytes | None = b"") -> None:
        """A whole answer that fits into the credit."""
        length = () if body is None else (b"Content-Length", b"%d" % len(body))
        self.stream.send_response(status, [b"OK", *fields, *length], end=not body)
        if body:
            self.stream.send_data(body, end=True)


class ScriptedAgent:
    """The agent's side of a session; ``on_stream`` is called with each request."""

    def __init__(self) -> None:
        self.session = Session(self, relay=False)
        self.carrier = Carrier(self.session, ping_interval=5, ping_timeout=5, on_lost=self._lost)
        self.bound: dict[int, tuple[str, str, str]] = {}
        self.refused: dict[int, tuple[str, str, bool]] = {}
        self.unbound: dict[int, str] = {}
        self.error: tuple[str, str] | None = None
        self.goaway: str | None = None
        self.goaway_hint = 0
        self.authed: Any = None
        self.counted: list[tuple[int, dict[str, Any]]] = []
        #: Members of HELLO besides those that every agent has.
        self.says: dict[str, Any] = {}
        self.streams: list[ScriptedStream] = []
        self.on_stream: Callable[[ScriptedStream], None] = lambda s: s.answer(body=b"hello")
        self.lost: str | None = None
        self.hello: dict[str, Any] | None = None

    async def connect(
        self, port: int, token: str, connect: int = 1, tls: ssl.SSLContext | None = None
    ) -> ScriptedAgent:
        await picows.ws_connect(
            lambda: self.carrier,
            f"ws://127.0.0.1:{port}/v1/connect" if tls is None else f"wss://localhost:{port}/v1/connect",
            ssl_context=tls,
            extra_headers={"Authorization": f"Bearer {token}", "Sec-WebSocket-Protocol": f.PROTOCOL},
            max_frame_size=2 * MAX_MESSAGE,
        )
        self.session.control(f.HELLO, 0, versions=[1], agent="test", connect=connect, **self.says)
        return self

    def bind(self, token: str, bind: int = 1) -> None:
        self.session.control(f.BIND, bind, grant=token)

    async def until(self, condition: Callable[[], Any], seconds: float = 30.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    async def online(self, token: str | None = None, bind: int = 1) -> ScriptedAgent:
        self.bind(token or grant(), bind)
        await self.until(lambda: bind in self.bound or bind in self.refused)
        assert bind in self.bound, self.refused
        return self

    def _lost(self, detail: str) -> None:
        self.lost = detail

    def on_hello(self, body: dict[str, Any]) -> None:
        self.hello = body

    def on_bound(self, bind: int, tunnel: str, name: str, url: str) -> None:
        self.bound[bind] = (tunnel, name, url)

    def on_refused(self, bind: int, code: str, detail: str, retryable: bool) -> None:
        self.refused[bind] = (code, detail, retryable)

    def on_unbind(self, bind: int, code: str, detail: str) -> None:
        self.unbound[bind] = code

    def on_counts(self, bind: int, counts: Counts) -> None:
        self.counted.append((bind, counts.body()))

    def on_authed(self, body: dict[str, Any]) -> None:
        self.authed = body

    def on_goaway(self, code: str, detail: str, retry_after_ms: int) -> None:
        self.goaway, self.goaway_hint = code, retry_after_ms

    def on_error(self, code: str, detail: str, retryable: bool) -> None:
        self.error = (code, detail)

    def on_pong(self, payload: bytes) -> None:
        self.carrier.note_pong(payload)

    def on_request(self, stream: Stream, bind: int, head: list[bytes], flags: int) -> Any:
        scripted = ScriptedStream(stream, bind, head, flags)
        stream.sink = scripted
        self.streams.append(scripted)
        self.on_stream(scripted)
        return scripted

    def close(self) -> None:
        self.carrier.abort("test over")


def port(relay: Relay, which: int) -> int:
    """0 control, 1 public, 2 https."""
    return int(relay.servers[which].sockets[0].getsockname()[1])


class Client:
    """A visitor that writes and reads exact bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def read_head(self) -> bytes:
        async with asyncio.timeout(30):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def read(self, count: int) -> bytes:
        async with asyncio.timeout(30):
            return await self.reader.readexactly(count)

    async def rest(self) -> bytes:
        async with asyncio.timeout(30):
            return await self.reader.read(-1)

    async def response(self) -> tuple[int, dict[bytes, list[bytes]], bytes]:
        """One answer with a Content-Length."""
        head = await self.read_head()
        lines = head.split(b"\r\n")[:-2]
        fields: dict[bytes, list[bytes]] = {}
        for line in lines[1:]:
            name, _, value = line.partition(b": ")
            fields.setdefault(name.lower(), []).append(value)
        status = int(lines[0].split(b" ")[1])
        body = await self.read(int(fields.get(b"content-length", [b"0"])[0]))
        return status, fields, body
