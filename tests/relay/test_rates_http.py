"""Rates as visitors meet them: 429 with the seconds to wait, over every way in, and shared by the relays that serve a tunnel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from portico.relay.server import Relay
from portico.settings import RelaySettings, Secret
from tests.ports import free_port
from tests.relay.doubles import KEY, Client, ScriptedAgent, grant, port, row, session_token
from tests.relay.test_tcp import TcpAgent, tcp_grant

GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"


def rate(requests: int, burst: int, seconds: float = 1) -> dict[str, Any]:
    return {"requests": requests, "seconds": seconds, "burst": burst}


def policy(**rates: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "rate_limits": rates}


@asynccontextmanager
async def online(relay: Relay, document: dict[str, Any], limits: dict[str, int] | None = None) -> AsyncIterator[Any]:
    agent = await ScriptedAgent().connect(port(relay, 0), session_token())
    await agent.online(grant(policy=document, policy_version=1, limits={"concurrency": 100} | (limits or {})))
    yield agent
    agent.close()


async def statuses(client: Client, count: int) -> list[int]:
    found = []
    for _ in range(count):
        client.send(GET)
        found.append((await client.response())[0])
    return found


async def test_of_a_tunnel(relay: Relay, visit: Any) -> None:
    async with online(relay, policy(tunnel=rate(1, 6, seconds=5))) as agent:
        one, two = await visit(), await visit()
        assert await statuses(one, 4) == [200] * 4
        assert await statuses(two, 4) == [200, 200, 429, 429]
        two.send(GET)
        status, fields, body = await two.response()
        assert (status, fields[b"portico-error"]) == (429, [b"edge.rate_limited"])
        assert fields[b"retry-after"][0] in (b"4", b"5") and fields[b"cache-control"] == [b"no-store"]
        assert len(agent.streams) == 6 and b"edge.rate_limited" in body


async def test_it_comes_back_with_time(relay: Relay, visit: Any) -> None:
    async with online(relay, policy(tunnel=rate(10, 1))):
        client = await visit()
        assert await statuses(client, 2) == [200, 429]
        await asyncio.sleep(0.12)
        assert await statuses(client, 2) == [200, 429]


async def test_an_edit_holds_at_once_and_fills_nothing(relay: Relay, visit: Any) -> None:
    async with online(relay, policy(tunnel=rate(1, 3, seconds=60))):
        client = await visit()
        assert await statuses(client, 4) == [200, 200, 200, 429]
        for version, (document, seen) in enumerate(
            [(policy(tunnel=rate(1, 5, seconds=60)), [200, 200, 429]), ({"version": 1}, [200] * 3)], 2
        ):
            changed = {"kind": "tunnel", "tunnel": row("web", policy=document, policy_version=version)}
            relay.snapshot.apply({"type": "delta", "version": version, "changes": [changed]})
            assert await statuses(client, 3) == seen


async def test_of_an_organization(relay: Relay, visit: Any) -> None:
    async with online(relay, {"version": 1}, {"org_requests": 1, "org_burst": 3}) as agent:
        other = grant("other", limits={"concurrency": 9, "org_requests": 1, "org_burst": 3})
        await agent.online(other, bind=2)
        client = await visit()
        assert await statuses(client, 2) == [200, 200]
        client.send(GET.replace(b"web", b"other") * 2)
        assert [(await client.response())[0] for _ in range(2)] == [200, 429]
        client.send(GET)
        assert (await client.response())[1][b"portico-error"] == [b"edge.rate_limited"]


async def test_what_was_refused_for_something_else_costs_nothing(relay: Relay, visit: Any) -> None:
    document = policy(tunnel=rate(1, 1, seconds=60)) | {"concurrency": 1}
    async with online(relay, document) as agent:
        agent.on_stream = lambda stream: None
        first, second = await visit(GET), await visit()
        await agent.until(lambda: agent.streams)
        assert await statuses(second, 1) == [429]
        live = relay.agents.by_tunnel["tun_web"]
        assert live.rates is not None and 0 < live.rates.check("", asyncio.get_running_loop().time()) <= 60
        agent.streams[0].answer()
        assert (await first.response())[0] == 200


async def test_of_tcp_connections(relay: Relay) -> None:
    number = free_port()
    agent = TcpAgent()
    await agent.connect(port(relay, 0), session_token())
    await agent.online(tcp_grant(number, policy=policy(client=rate(1, 2, seconds=60))))
    for _ in range(4):
        _, writer = await asyncio.open_connection("127.0.0.1", number)
        writer.close()
    await agent.until(lambda: relay.public.refusals["edge.rate_limited"] == 2)
    assert len(agent.tcp) == 2
    agent.close()


async def started(path: Path, name: str, peers: tuple[str, ...], redis: str | None) -> Relay:
    settings = RelaySettings(
        relay_key=Secret("tnl_rly_unused"), api_url="http://127.0.0.1:9", state_dir=path / name, relay_name=name,
        public_port=0, https_port=0, control_port=0, exempt_loopback=True, peers=peers, peer_key=Secret("shared"),
        redis_url=Secret(redis) if redis else None,
    )  # fmt: skip
    relay = Relay(settings)
    relay.snapshot.apply(
        {"type": "snapshot", "version": 1, "state": {"keys": [KEY.public_jwk()], "tunnels": [], "ended": []}}
    )
    await relay.start()
    return relay


async def visitor(relay: Relay) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", port(relay, 1)))


async def test_a_tunnel_has_one_rate_whatever_relay_its_visitors_come_by(tmp_path: Path) -> None:
    front = await started(tmp_path, "front", (), None)
    owner = await started(tmp_path, "owner", (f"ws://127.0.0.1:{port(front, 0)}/v1/peer",), None)
    document = policy(tunnel=rate(1, 5, seconds=30), client=rate(1, 40, seconds=60))
    async with online(owner, document) as agent:
        await agent.until(lambda: front.peers.by_host)
        here, there = await visitor(owner), await visitor(front)
        assert await statuses(there, 3) == [200] * 3
        assert await statuses(here, 3) == [200, 200, 429]
        there.send(GET)
        status, fields, body = await there.response()
        assert (status, fields[b"portico-error"]) == (429, [b"edge.rate_limited"])
        assert int(fields[b"retry-after"][0]) in range(25, 31), "the owner's word"
        assert b"29." not in body and b"30.0" not in body
        assert await statuses(there, 1) == [429]
        assert len(agent.streams) == 5
        for client in (here, there):
            client.writer.close()
    await front.stop()
    await owner.stop()


async def test_relays_share_the_rate_of_an_organization(tmp_path: Path, valkey: Any) -> None:
    """Two relays, each with a tunnel of one organization, and visitors that ask both as fast as they are answered."""
    relays = [await started(tmp_path, name, (), valkey.url) for name in ("one", "two")]
    agents, tasks, served = [], [], [0, 0]
    for number, relay in enumerate(relays):
        agent = await ScriptedAgent().connect(port(relay, 0), session_token())
        limits = {"concurrency": 100, "org_requests": 50, "org_burst": 25}
        agents.append(await agent.online(grant("web", limits=limits)))

        async def ask(relay: Relay, number: int) -> None:
            client = await visitor(relay)
            while True:
                passed = await statuses(client, 1) == [200]
                served[number] += passed
                await asyncio.sleep(0.002)

        tasks += [asyncio.ensure_future(ask(relay, number)) for _ in range(2)]
    await asyncio.sleep(1.5)
    before = sum(served)
    await asyncio.sleep(2)
    got = sum(served) - before
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert 80 <= got <= 120, (got, served)
    assert all(relay.shared_rates is not None and relay.shared_rates.connected for relay in relays)
    for agent, relay in zip(agents, relays, strict=True):
        agent.close()
        await relay.stop()


@pytest.mark.parametrize("url", ["http://127.0.0.1", "127.0.0.1:6379"])
async def test_a_relay_refuses_to_start_with_no_redis_at_all(tmp_path: Path, url: str) -> None:
    with pytest.raises(Exception, match="redis_url"):
        await started(tmp_path, "one", (), url)
