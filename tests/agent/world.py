"""An agent with its API and relay, and an ear for what it tells."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from portico.agent.api import Api
from portico.agent.client import Agent
from portico.agent.tunnel import Events, Tunnel
from portico.errors import Problem
from portico.settings import AgentSettings, Secret
from portico.wire.session import Session
from portico.wire.stream import Sink, Stream
from tests.agent.api_server import KEY, TestApi
from tests.agent.harness import Relay

FAST = AgentSettings(
    reconnect_first_seconds=0.05, reconnect_max_seconds=0.2, drain_seconds=2.0, connect_timeout_seconds=1.0
)


class Hello:
    """Serves every request with `hello`, after ``wait``."""

    def __init__(self) -> None:
        self.wait: asyncio.Event | None = None

    def on_request(self, stream: Stream, head: list[bytes], flags: int) -> Sink | None:
        async def answer() -> None:
            if self.wait is not None:
                await self.wait.wait()
            stream.send_response(200, [b"OK"], end=False)
            stream.send_data(b"hello", end=True)

        self.task = asyncio.ensure_future(answer())
        return None

    def quick(self, session: Session, ident: int, payload: bytes) -> None: ...

    def on_open(self, stream: Stream, info: dict[str, Any]) -> Sink | None:
        return None


class Seen(Events):
    """Keeps what the agent told."""

    def __init__(self) -> None:
        self.states: list[str] = []
        self.tunnels: list[tuple[str, str, str]] = []
        self.warnings: list[str] = []
        self.news = asyncio.Event()

    def connection(self, state: str, detail: str) -> None:
        self.states.append(state)
        self.news.set()

    def tunnel(self, tunnel: Tunnel) -> None:
        self.tunnels.append((tunnel.name, tunnel.state, tunnel.problem.code if tunnel.problem else ""))
        self.news.set()

    def warning(self, text: str) -> None:
        self.warnings.append(text)
        self.news.set()

    async def until(self, what: Any, limit: float = 30.0) -> None:
        async with asyncio.timeout(limit):
            while not what():
                self.news.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), 0.05)


class World:
    """An API, a relay and an agent with one tunnel."""

    def __init__(self, api: TestApi, relay: Relay) -> None:
        self.api = api
        self.api_url = api.url
        self.relay = relay
        self.seen = Seen()
        self.serves = Hello()
        self.agent: Agent
        self.task: asyncio.Task[None]
        self.http: Api | None = None

    def start(self, settings: AgentSettings = FAST, names: tuple[str, ...] = ("web",)) -> World:
        self.http = Api(self.api_url, Secret(KEY), settings)
        specs = [({"name": name}, self.serves, "http://localhost:8000") for name in names]
        self.agent = Agent(settings, self.http, specs, self.seen)
        self.task = asyncio.create_task(self.agent.run())
        return self

    async def online(self, count: int = 1) -> World:
        await self.seen.until(lambda: sum(t[1] == "online" for t in self.seen.tunnels) >= count or self.task.done())
        assert not self.task.done(), self.task
        return self

    async def get(self) -> bytes:
        """One request through the newest connection."""
        visit = await self.relay.connections[-1].get().over()
        assert visit.status == 200, visit.reset
        return bytes(visit.body)

    async def ended(self, limit: float = 30.0) -> Problem | None:
        try:
            await asyncio.wait_for(self.task, limit)
        except Problem as err:
            return err
        return None
