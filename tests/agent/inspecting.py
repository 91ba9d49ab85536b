"""A tunnel whose requests are recorded, with its local page, and a client for that."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from portico.agent.files import FileServer
from portico.agent.forward import Forwarder
from portico.agent.inspector import Inspector
from portico.agent.recorder import Entry
from portico.agent.stats import Stats
from portico.agent.target import Target
from portico.settings import AgentSettings
from tests.agent.harness import Relay, RelayConnection, serving


class Inspected:
    """``relay`` sends visitors' requests; ``web`` talks to the page."""

    def __init__(self, relay: RelayConnection, hub: Relay, inspector: Inspector, serves: Any, web: Any) -> None:
        self.relay, self.hub, self.inspector, self.serves, self.web = relay, hub, inspector, serves, web
        self.recorder = inspector.recorder
        self.get = relay.get
        self.request = relay.request

    def entry(self, back: int = 1) -> Entry:
        """The newest entry, or the one ``back`` requests ago."""
        found = self.recorder.find(self.recorder.last + 1 - back)
        assert found is not None
        return found

    async def until(self, what: Callable[[], Any], limit: float = 30.0) -> None:
        async with asyncio.timeout(limit):
            while not what():
                await asyncio.sleep(0.005)

    async def ended(self, back: int = 1) -> Entry:
        """The entry of :meth:`entry` once it is over."""
        await self.until(lambda: len(self.recorder.entries) >= back and self.entry(back).ended)
        return self.entry(back)

    async def json(self, path: str, **options: Any) -> Any:
        answer = await self.web.get(path, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def detail(self, back: int = 1) -> Any:
        """The page's document of an entry."""
        return await self.json(f"/api/requests/{self.entry(back).id}")

    async def replay(self, entry: Entry | None = None, **edit: Any) -> httpx.Response:
        answer: httpx.Response = await self.web.post(
            f"/api/requests/{(entry or self.entry()).id}/replay", **({"json": edit} if edit else {})
        )
        return answer


@contextlib.asynccontextmanager
async def inspected(
    target: Target, settings: AgentSettings | None = None, *, answers: bool = False, **options: Any
) -> AsyncIterator[Inspected]:
    """A tunnel to ``target`` with its page on a free port; ``answers``: its relay takes whole answers in one frame."""
    settings = dataclasses.replace(settings or AgentSettings(), web_addr="127.0.0.1:0")
    stats = Stats()
    inspector = Inspector(settings, stats)
    serves: Any = (
        FileServer(target, settings, stats) if target.kind == "file" else Forwarder(target, settings, stats, **options)
    )
    serves.tap = inspector.recorder.tap(serves, target.url)
    serves.tap.name = "web"
    assert await inspector.start()
    try:
        async with serving(serves, settings, answers=answers) as (relay, hub, _):
            async with httpx.AsyncClient(base_url=inspector.url, trust_env=False, timeout=20) as web:
                yield Inspected(relay, hub, inspector, serves, web)
    finally:
        await serves.abort()
        await inspector.close()
