"""Whatever visitors, policies and agents do at once: every place, wait and count is given back, and no answer is another's."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
from typing import Any

import pytest
from argon2 import PasswordHasher

from portico.relay.agent_connection import LiveTunnel
from portico.relay.server import Relay
from portico.wire import frames as f
from tests.relay.doubles import Client, ScriptedAgent, ScriptedStream, grant, port, row, session_token
from tests.relay.known import forget, whole

DIGEST = PasswordHasher(time_cost=1, memory_cost=64).hash("secret")
POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"concurrency": 2},
    {"concurrency": 1, "queue": {"requests": 4, "seconds": 0.05}},
    {"concurrency": 2, "queue": {"requests": 50, "seconds": 1}},
    {"basic_auth": {"users": [{"name": "alice", "digest": DIGEST}]}},
    {
        "basic_auth": {"realm": "other", "users": [{"name": "alice", "digest": DIGEST}]},
        "concurrency": 1,
        "queue": {"requests": 9, "seconds": 0.1},
    },
    {"headers": {"response": {"remove": ["X-Path"], "add": [{"name": "X-Edge", "value": "1"}]}}},
    {"headers": {"request": {"add": [{"name": "X-Edge", "value": "1"}]}}},
    {"rate_limits": {"client": {"requests": 300, "burst": 20}}},
    {"addresses": {"rules": [{"deny": "127.0.0.0/8"}]}},
    {"plain_http": "redirect"},
)
PASSWORDS = tuple(
    b"Authorization: Basic " + base64.b64encode(b"alice:" + word) + b"\r\n" for word in (b"secret", b"wrong")
)


@pytest.fixture
def relay_settings() -> dict[str, Any]:
    return {
        "hold_seconds": 0.2,
        "hold_max_requests": 20,
        "password_attempts_per_address": 10_000,
        "password_attempts_burst": 10_000,
    }


class Chaos:
    """One run."""

    def __init__(self, relay: Relay, seed: int) -> None:
        self.relay = relay
        self.random = random.Random(seed)
        self.lives: list[LiveTunnel] = []
        self.agents: list[ScriptedAgent] = []
        self.number = 0
        self.answers = 0
        relay.agents.on_bound.append(self.lives.append)

    async def connect(self) -> None:
        made = await ScriptedAgent().connect(port(self.relay, 0), session_token(), len(self.agents) + 1)
        made.on_stream = self.serve
        made.bind(grant())
        await made.until(lambda: 1 in made.bound)
        self.agents.append(made)

    def serve(self, stream: ScriptedStream) -> None:
        """What a target may do."""
        name = stream.target.rpartition(b"/")[2]
        fields = (b"X-Path", name)
        roll = self.random.random()
        loop = asyncio.get_running_loop()

        def say() -> None:
            if stream.stream.closed or stream.reset is not None:
                return
            with contextlib.suppress(Exception):
                if stream.flags & f.F_UPGRADE and roll < 0.7:
                    stream.stream.send_response(101, [b"Switching", b"Upgrade", b"x"], end=False)
                    loop.call_later(0.01, stream.stream.send_end)
                elif roll < 0.1:
                    stream.stream.reset(f.TARGET_REFUSED, "no")
                elif roll < 0.2:
                    stream.stream.send_response(200, [b"OK", *fields], end=False)
                    stream.stream.send_data(name, end=False)
                    stream.stream.send_end([b"X-Trailer", b"1"])
                elif stream.method == b"HEAD" or roll < 0.3:
                    stream.stream.send_response(204, [b"No", *fields], end=True)
                elif stream.ended.is_set() and not stream.body:
                    whole(stream, name, fields=fields)
                else:
                    stream.answer(fields=fields, body=name)

        if self.random.random() < 0.5:
            say()
        else:
            loop.call_later(self.random.random() * 0.03, say)

    def request(self) -> tuple[bytes, bytes]:
        """A request and the name that its answer must have."""
        self.number += 1
        name = b"n%d" % self.number if self.random.random() < 0.5 else b"same"
        fields = b"Host: web.localhost\r\n" + self.random.choice((b"", b"", *PASSWORDS))
        roll = self.random.random()
        if roll < 0.6:
            return b"GET /%b HTTP/1.1\r\n%b\r\n" % (name, fields), name
        if roll < 0.7:
            return b"HEAD /%b HTTP/1.1\r\n%b\r\n" % (name, fields), b""
        if roll < 0.8:
            return b"GET /%b HTTP/1.1\r\n%bConnection: Upgrade\r\nUpgrade: x\r\n\r\n" % (name, fields), b""
        if roll < 0.9:
            return b"POST /%b HTTP/1.1\r\n%bContent-Length: 9000\r\n\r\n%b" % (name, fields, b"x" * 9000), name
        return b"POST /%b HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" % (name, fields), name

    async def visitor(self) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port(self.relay, 1))
            client = Client(reader, writer)
            try:
                for _ in range(self.random.randrange(1, 8)):
                    await self.some(client)
            finally:
                if self.random.random() < 0.5:
                    writer.transport.abort()
                else:
                    writer.close()

    async def some(self, client: Client) -> None:
        """A few requests at once, in odd pieces; perhaps the visitor leaves before the answers."""
        asked = [self.request() for _ in range(self.random.choice((1, 1, 1, 2, 4)))]
        data = b"".join(request for request, _ in asked)
        cut = self.random.randrange(len(data)) if self.random.random() < 0.4 else len(data)
        client.send(data[:cut])
        if cut < len(data):
            await asyncio.sleep(self.random.random() * 0.01)
            if self.random.random() < 0.2:
                raise ConnectionError
            client.send(data[cut:])
        if self.random.random() < 0.15:
            raise ConnectionError
        for request, name in asked:
            head = await client.read_head()
            fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            if request.startswith(b"HEAD") or b"Upgrade" in request:
                raise ConnectionError  # how it ends is its own affair
            status = int(head[9:12])
            self.answers += 1
            body = await client.read(int(fields.get(b"Content-Length", b"0")))
            if b"Transfer-Encoding" in fields:
                body = (await client.reader.readuntil(b"0\r\nX-Trailer: 1\r\n\r\n")).split(b"\r\n")[1]
            assert b"Portico-Error" in fields or body == (b"" if status == 204 else name), (head, body)
            assert b"Portico-Error" in fields or fields.get(b"X-Path", name) == name
            if fields.get(b"Connection") == b"close":
                raise ConnectionError

    def change(self, version: int) -> None:
        now = self.relay.snapshot.version
        assert now is not None
        tunnel = row("web", policy=self.random.choice(POLICIES), policy_version=version)
        self.relay.snapshot.apply(
            {"type": "delta", "version": now + 1, "changes": [{"kind": "tunnel", "tunnel": tunnel}]}
        )

    async def run(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        await self.connect()
        visitors: set[asyncio.Task[None]] = set()
        version = 1
        faults: list[BaseException] = []

        def over(task: asyncio.Task[None]) -> None:
            visitors.discard(task)
            if (err := task.exception()) is not None:
                faults.append(err)

        while loop.time() < until and not faults:
            while len(visitors) < 12:
                visitors.add(task := loop.create_task(self.visitor()))
                task.add_done_callback(over)
            await asyncio.sleep(self.random.random() * 0.02)
            if self.random.random() < 0.6:
                version += 1
                self.change(version)
            if self.random.random() < 0.05:
                await self.connect()
            elif self.random.random() < 0.02:
                self.agents[-1].close()
                await self.connect()
        if visitors:
            await asyncio.wait(visitors)
        if faults:
            raise faults[0]

    def leaks(self) -> dict[str, Any]:
        """What should have been given back."""
        public = self.relay.public
        found: dict[str, Any] = {
            "connections": len(public.connections) + len(public.turned_away),
            "addresses": dict(public._by_address),
            "held": public.holding.count,
            "passwords": (public.credentials.waiting, dict(public.credentials._waiting)),
            "inflight": [live.inflight for live in self.lives if live.inflight],
            "lines": [
                len(live.line) for live in self.lives if live.line is not None and (live.line or live.line.closed)
            ],
            "streams": sum(len(agent.session.streams) for agent in self.relay.agents.connections),
        }
        return {name: value for name, value in found.items() if value and value != (0, {})}


@pytest.mark.parametrize("seed", [1, 2])
async def test_everything_is_given_back(relay: Relay, seed: int) -> None:
    forget()
    chaos = Chaos(relay, seed)
    await chaos.run(2.0)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(30):
            while chaos.leaks():
                await asyncio.sleep(0.05)
    assert not chaos.leaks()
    assert chaos.answers > 50
    assert all(count >= 0 for counters in relay.public.tally.quick.values() for row in counters for count in row)
    for agent in chaos.agents:
        agent.close()
