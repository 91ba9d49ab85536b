"""Following the history of tunnels: nothing twice, nothing lost, over outages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from portico.agent.api import Api
from portico.agent.events import PAGE, Event, History
from portico.errors import Problem
from portico.settings import AgentSettings, Secret
from tests.agent.api_server import KEY, problem
from tests.agent.event_api import START, EventApi


class Following:
    """A history that is followed in the background."""

    def __init__(self, history: History) -> None:
        self.got: list[str] = []
        self.outages: list[str] = []
        self.task = asyncio.create_task(self._run(history))

    async def _run(self, history: History) -> None:
        def waiting(problem: Problem | None) -> None:
            self.outages.append(problem.code if problem is not None else "back")

        async for event in history.follow(poll=0.01, retry_max=0.05, overlap=30, waiting=waiting):
            self.got.append(event.id)

    async def until(self, what: Any) -> None:
        async with asyncio.timeout(30):
            while not what():
                assert not self.task.done(), self.task
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def server() -> AsyncIterator[EventApi]:
    server = EventApi()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def api(server: EventApi) -> AsyncIterator[Api]:
    api = Api(server.url, Secret(KEY), AgentSettings(api_timeout_seconds=1))
    yield api
    await api.aclose()


class TestLatest:
    async def test_the_newest_come_in_order(self, server: EventApi, api: Api) -> None:
        for second in range(2 * PAGE + 50):
            server.add("web", "online", second)
        found = await History(api, []).latest(PAGE + 20, None)
        assert [event.id for event in found] == [f"evt_{n:04}" for n in range(PAGE + 30, 2 * PAGE + 50)]
        assert len(await History(api, []).latest(None, None)) == 2 * PAGE + 50
        since = START + timedelta(seconds=2 * PAGE + 47)
        assert [e.id for e in await History(api, []).latest(None, since)] == ["evt_0247", "evt_0248", "evt_0249"]
        assert await History(api, []).latest(0, None) == []

    async def test_an_answer_of_another_kind(self) -> None:
        with pytest.raises(Problem) as caught:
            Event.parse({"id": "evt_1", "at": "noon", "tunnel": "t", "name": "n", "kind": "k", "details": {}})
        assert caught.value.code == "api.unexpected"


class TestFollow:
    async def test_news_once_each_and_nothing_old(self, server: EventApi, api: Api) -> None:
        for second in range(10):
            server.add("web", "online", second)
        history = History(api, [])
        await history.mark(30)
        assert [e.id for e in await history.latest(2, None)] == ["evt_0008", "evt_0009"]
        following = Following(history)
        await asyncio.sleep(0.1)
        first = server.add("web", "offline", 12)
        await following.until(lambda: following.got)
        # One that was begun before the newest and committed after it.
        late = server.add("api", "online", 3)
        await following.until(lambda: len(following.got) == 2)
        await asyncio.sleep(0.1)
        assert following.got == [first, late]
        await following.stop()
        assert all("since" in query for query in server.asked[-3:])

    async def test_from_nothing_at_all(self, server: EventApi, api: Api) -> None:
        history = History(api, [])
        await history.mark(30)
        following = Following(history)
        await asyncio.sleep(0.05)
        first = server.add("web", "created", 1)
        await following.until(lambda: following.got == [first])
        await following.stop()

    async def test_more_news_than_a_page_between_two_looks(self, server: EventApi, api: Api) -> None:
        server.add("web", "created", 0)
        history = History(api, [])
        await history.mark(30)
        following = Following(history)
        await asyncio.sleep(0.05)
        made = [server.add("web", "online", 1 + second / 100) for second in range(3 * PAGE)]
        await following.until(lambda: len(following.got) >= len(made))
        assert following.got == made
        await following.stop()

    async def test_what_happens_between_the_first_answer_and_the_next(self, server: EventApi, api: Api) -> None:
        history = History(api, [])
        server.add("web", "created", 0)
        await history.mark(30)
        shown = server.add("web", "online", 1)
        assert [e.id for e in await history.latest(1, None)] == [shown]
        missed = server.add("web", "offline", 2)
        following = Following(history)
        await following.until(lambda: following.got == [missed])
        await following.stop()

    async def test_over_an_outage_nothing_is_lost(self, server: EventApi, api: Api) -> None:
        server.add("web", "created", 0)
        history = History(api, ["tun_web"])
        await history.mark(30)
        following = Following(history)
        await asyncio.sleep(0.03)
        port = server.port
        await server.stop()
        await following.until(lambda: following.outages == ["api.unreachable"])
        missed = [server.add("web", "offline", 5), server.add("web", "online", 6)]
        server.refuse = problem(503, "service.unavailable")
        await server.start(port)
        await asyncio.sleep(0.1)
        assert following.got == [] and following.outages == ["api.unreachable"], "said once"
        server.refuse = None
        await following.until(lambda: following.got == missed)
        assert following.outages == ["api.unreachable", "back"]
        await following.stop()

    async def test_what_will_not_pass_ends_it(self, server: EventApi, api: Api) -> None:
        server.add("web", "created", 0)
        history = History(api, ["tun_web"])
        await history.mark(30)
        following = Following(history)
        await asyncio.sleep(0.03)
        server.events.clear()
        with pytest.raises(Problem) as caught:
            await asyncio.wait_for(following.task, 30)
        assert caught.value.code == "tunnel.not_found"

    async def test_what_is_known_does_not_grow_for_ever(self, server: EventApi, api: Api) -> None:
        history = History(api, [])
        server.add("web", "created", 0)
        await history.mark(30)
        following = Following(history)
        for minute in range(1, 31):
            for n in range(60):
                server.add("web", "online", minute * 60 + n / 10)
            count = minute * 60
            await following.until(lambda count=count: len(following.got) == count)
        assert len(history._seen) < 15 * PAGE
        await following.stop()
