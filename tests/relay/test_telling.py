"""What agents hear of their tunnels: refusals at the edge, at most once a second, and only those who asked for it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from portico.errors import catalogue
from portico.relay import telling
from portico.relay.meter import Counters
from portico.relay.server import Relay
from portico.relay.telling import Told, is_news
from portico.wire import frames as f
from portico.wire.counts import Counts
from tests.relay.doubles import Client, ScriptedAgent, grant, port, session_token
from tests.relay.test_peers import made
from tests.relay.test_peers import visit as visit_at

GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"
Visit = Callable[..., Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "TELL_SECONDS", 0.05)


async def connected(relay: Relay, concurrency: int = 1, **says: Any) -> ScriptedAgent:
    agent = ScriptedAgent()
    agent.says = says
    return await (await agent.connect(port(relay, 0), session_token())).online(grant(concurrency=concurrency))


@pytest.fixture
async def agent(relay: Relay) -> AsyncIterator[ScriptedAgent]:
    scripted = await connected(relay, counts=True)
    yield scripted
    scripted.close()


def heard(agent: ScriptedAgent) -> dict[str, Any]:
    """All frames so far added up."""
    sums: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for _, body in agent.counted:
        refused.update(body.get("refused", {}))
        sums.update({name: value for name, value in body.items() if name not in ("refused", "open")})
    return {**sums, **({"refused": dict(refused)} if refused else {}), "open": agent.counted[-1][1]["open"]}


async def test_requests_and_refusals(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    agent.on_stream = lambda stream: None
    waiting: Client = await visit(GET)
    await agent.until(lambda: agent.streams)
    refused: Client = await visit(GET)
    assert (await refused.response())[0] == 429
    refused.send(GET)
    assert (await refused.response())[0] == 429
    await agent.until(lambda: agent.counted and heard(agent).get("refused") == {"edge.concurrency_exceeded": 2})
    assert heard(agent) == {"requests": 1, "refused": {"edge.concurrency_exceeded": 2}, "open": 1}
    agent.streams[0].answer(body=b"hello")
    await waiting.response()
    await agent.until(lambda: heard(agent)["open"] == 0)
    assert heard(agent)["bytes_out"] == 43
    assert {bind for bind, _ in agent.counted} == {1}
    count = len(agent.counted)
    await asyncio.sleep(0.2)
    assert len(agent.counted) == count, "nothing happened, nothing is said"


async def test_an_agent_that_did_not_ask_hears_nothing(relay: Relay, visit: Visit) -> None:
    for says in ({}, {"counts": False}, {"counts": "yes"}):
        agent = await connected(relay, **says)
        client: Client = await visit(GET)
        assert (await client.response())[0] == 200
        await asyncio.sleep(0.15)
        assert agent.counted == [] and agent.error is None and agent.lost is None
        agent.close()
        await agent.until(lambda: not relay.agents.by_tunnel)


async def test_a_target_that_fails_is_no_news_to_its_agent(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    agent.on_stream = lambda stream: stream.stream.reset(f.TARGET_REFUSED, "nothing listens")
    client: Client = await visit(GET)
    assert (await client.response())[0] == 502
    await agent.until(lambda: agent.counted and heard(agent).get("errors"))
    assert "refused" not in heard(agent)
    assert not is_news("edge.target_refused")
    assert is_news("edge.concurrency_exceeded") and is_news("edge.of_a_newer_version")
    assert {code for code in catalogue() if code.startswith("edge.") and not is_news(code)} == {
        "edge.target_refused", "edge.target_timeout", "edge.target_invalid",
    }  # fmt: skip


async def test_what_was_before_a_bind_is_not_told(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    client: Client = await visit(GET)
    await client.response()
    await agent.until(lambda: agent.counted and heard(agent)["open"] == 0)
    agent.close()
    await agent.until(lambda: not relay.agents.by_tunnel)
    again = await connected(relay, counts=True)
    await asyncio.sleep(0.15)
    assert again.counted == []
    client.send(GET)
    await client.response()
    await again.until(lambda: again.counted)
    assert heard(again)["requests"] == 1
    again.close()


async def test_the_last_word_comes_when_a_tunnel_goes(
    relay: Relay, agent: ScriptedAgent, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.sleep(0.1)
    monkeypatch.setattr(telling, "TELL_SECONDS", 60)
    await asyncio.sleep(0.1)
    client: Client = await visit(GET)
    await client.response()
    assert agent.counted == []
    agent.session.control(f.UNBIND, 1, code="tunnel.stopped", detail="")
    await agent.until(lambda: agent.counted)
    assert heard(agent)["requests"] == 1


async def test_refusals_at_another_relay_reach_the_agent(tmp_path: Path) -> None:
    front = await made(tmp_path, "front", ())
    owner = await made(tmp_path, "owner", (f"ws://127.0.0.1:{port(front, 0)}/v1/peer",))
    agent = await connected(owner, counts=True)
    await agent.until(lambda: front.peers.by_host)
    agent.on_stream = lambda stream: None
    waiting = await visit_at(front, GET)
    await agent.until(lambda: agent.streams)
    refused = await visit_at(front, GET)
    assert (await refused.response())[0] == 429
    await agent.until(lambda: agent.counted and heard(agent).get("refused"))
    assert heard(agent)["refused"] == {"edge.concurrency_exceeded": 1}
    assert heard(agent)["requests"] == 1, "the owner alone counts what it forwards"
    assert front.agents.by_tunnel == {}
    agent.streams[0].answer(body=b"hello")
    await waiting.response()
    for client in (waiting, refused):
        client.writer.close()
    agent.close()
    await asyncio.gather(front.stop(), owner.stop())


def test_news_are_what_was_added() -> None:
    counters = Counters("t", "o")
    counters.requests = 5
    counters.refuse("edge.ip_denied")
    told = Told(counters)
    assert told.news(counters, 0) is None
    counters.requests += 2
    counters.refuse("edge.ip_denied", 3)
    assert told.news(counters, 1) == Counts(requests=2, open=1, refused={"edge.ip_denied": 3})
    assert told.news(counters, 1) is None
    assert told.news(counters, 0) == Counts()
    for number in range(70):
        counters.refuse(f"edge.code_{number}")
    news = told.news(counters, 0)
    assert news is not None and len(news.refused) == 64, "a frame has room for no more"
