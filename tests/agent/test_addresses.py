"""IPv6, and platforms whose name has several addresses: what an agent's connections do about a dead one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from portico.agent.api import Api, server_url
from portico.agent.link import Link
from portico.agent.target import parse_target
from portico.errors import Problem
from portico.kit import dial
from portico.settings import AgentSettings, Secret
from tests.agent.api_server import KEY, TestApi
from tests.agent.harness import Relay, SilentOwner, answering, target_server, tunnel_to
from tests.agent.world import World
from tests.kit.test_dial import address, blackhole
from tests.timing import Since


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("[::1]:7000", "http://[::1]:7000"),
        ("::1", "http://[::1]"),
        ("[::1]", "http://[::1]"),
        ("http://[::1]:7000/", "http://[::1]:7000"),
        ("[2001:db8::1]:7000", "https://[2001:db8::1]:7000"),
        ("2001:db8::1", "https://[2001:db8::1]"),
        ("https://[2001:db8::1]/v1", "https://[2001:db8::1]"),
        ("localhost:7000", "http://localhost:7000"),
        ("portico.example", "https://portico.example"),
    ],
)
def test_addresses_of_an_api(typed: str, url: str) -> None:
    assert server_url(typed) == url


@pytest.mark.parametrize("typed", ["http://::1", "http://[::1", "http://[::1]x:1", "[::g]:1", "::1:7000:x"])
def test_what_is_no_address_of_an_api(typed: str) -> None:
    with pytest.raises(Problem) as caught:
        server_url(typed)
    assert caught.value.code == "config.invalid"


async def test_an_agent_over_ipv6_alone() -> None:
    relay = await Relay().start(host="::1")
    api = await TestApi([f"ws://[::1]:{relay.port}/v1/connect"]).start(host="::1")
    world = World(api, relay)
    world.api_url = f"http://[::1]:{api.port}"
    await world.start().online()
    assert await world.get() == b"hello"
    assert relay.hosts == [f"[::1]:{relay.port}"]
    world.agent.stop()
    assert await world.ended() is None
    assert world.http is not None
    await world.http.aclose()
    await api.stop()
    await relay.stop()


async def test_a_dead_address_of_a_relay_costs_a_fraction_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    relay = await Relay().start()
    with blackhole("127.0.0.2") as dead:
        known = [address("127.0.0.2", dead), address("::1", 1), address("127.0.0.1", relay.port)]

        async def resolve(host: str, port: int) -> Any:
            assert host == "relays.example"
            return known

        monkeypatch.setattr(dial, "resolve", resolve)
        link = Link(SilentOwner(), AgentSettings(), f"ws://relays.example:{relay.port}/v1/connect", 1)
        since = Since()
        await link.open("token")
        assert since.waited() < 1
        link.close("test over")
        assert relay.hosts == [f"relays.example:{relay.port}"]
    await relay.stop()


async def test_a_dead_address_of_the_api_costs_a_fraction_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    server = await TestApi().start()
    server.routes["GET /v1/whoami"] = lambda body: (200, {"kind": "agent_key"})
    with blackhole("127.0.0.2") as dead:
        known = [address("127.0.0.2", dead), address("127.0.0.1", server.port)]

        async def resolve(host: str, port: int) -> Any:
            return known

        monkeypatch.setattr(dial, "resolve", resolve)
        api = Api("http://api.example:1", Secret(KEY), AgentSettings())
        since = Since()
        assert await api.call("GET", "whoami") == {"kind": "agent_key"}
        assert since.waited() < 1
        await api.aclose()
    await server.stop()


async def test_a_dead_address_of_the_target_costs_a_fraction_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    async with target_server(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")) as port:
        with blackhole("127.0.0.2") as dead:
            known = [address("127.0.0.2", dead), address("127.0.0.1", port)]

            async def resolve(host: str, port: int) -> Any:
                assert host == "app.example"
                return known

            async with tunnel_to(parse_target(f"app.example:{port}")) as tunnel:
                monkeypatch.setattr(dial, "resolve", resolve)
                since = Since()
                visit = await tunnel.get().over()
                assert (visit.status, bytes(visit.body)) == (200, b"ok")
                assert since.waited() < 1
                known[:] = [address("::1", 1), address("127.0.0.1", 1)]
                assert "[::1]" in str(await tunnel.forwarder.probe())


async def test_an_unreachable_api_says_why_for_each_address(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int) -> Any:
        return [address("::1", 1), address("127.0.0.1", 1)]

    for url, why in (
        ("http://nowhere.invalid", "Name or service not known"),
        ("http://127.0.0.1:1", "Connection refused"),
        ("http://both.example", "Connection refused (tried [::1], 127.0.0.1)"),
    ):
        if "both" in url:
            monkeypatch.setattr(dial, "resolve", resolve)
        api = Api(url, Secret(KEY), AgentSettings())
        with pytest.raises(Problem) as caught:
            await api.call("GET", "whoami")
        await api.aclose()
        assert caught.value.code == "api.unreachable" and why.lower() in caught.value.detail.lower(), (
            caught.value.detail
        )


async def test_a_silent_api_is_given_up_in_time() -> None:
    with blackhole("127.0.0.2") as dead:
        api = Api(f"http://127.0.0.2:{dead}", Secret(KEY), AgentSettings())
        with pytest.raises(Problem) as caught:
            await asyncio.wait_for(api.call("GET", "whoami", timeout=0.2), 30)
        await api.aclose()
    assert caught.value.code == "api.unreachable" and "did not answer in time" in caught.value.detail
