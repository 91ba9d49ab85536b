"""A relay on all addresses of both families: visitors, agents, and what targets are told of them."""

from __future__ import annotations

import asyncio
from typing import Any

import picows
import pytest

from portico.relay.door import Door
from portico.relay.server import Relay
from portico.wire import frames as f
from tests.relay.doubles import Client, ScriptedAgent, port, session_token

GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"


@pytest.fixture
def relay_settings() -> dict[str, Any]:
    return {"public_host": "::", "https_host": "::", "control_host": "::"}


async def visit(relay: Relay, address: str, request: bytes = GET) -> Client:
    reader, writer = await asyncio.open_connection(address, port(relay, 1))
    client = Client(reader, writer)
    client.send(request)
    return client


@pytest.mark.parametrize(("address", "node"), [("::1", b'"[::1]"'), ("127.0.0.1", b"127.0.0.1")])
async def test_the_target_is_told_the_visitors_address(
    relay: Relay, agent: ScriptedAgent, address: str, node: bytes
) -> None:
    client = await visit(relay, address)
    await agent.until(lambda: agent.streams)
    request = agent.streams[0]
    assert request.get(b"x-forwarded-for") == [address.encode()]
    assert request.get(b"forwarded") == [b"for=%b;host=web.localhost;proto=http" % node]
    assert (await client.response())[2] == b"hello"
    client.writer.close()


async def test_an_address_as_host_is_no_tunnel(relay: Relay, agent: ScriptedAgent) -> None:
    client = await visit(relay, "::1", b"GET / HTTP/1.1\r\nHost: [::1]:7080\r\nAccept: application/json\r\n\r\n")
    status, fields, _ = await client.response()
    assert status == 404 and fields[b"portico-error"] == [b"edge.host_unassigned"]
    client.writer.close()


@pytest.mark.parametrize("relay_settings", [{"public_host": "::1", "control_host": "::1", "https_host": "::1"}])
async def test_on_ipv6_alone(relay: Relay) -> None:
    agent = ScriptedAgent()
    await picows.ws_connect(
        lambda: agent.carrier,
        f"ws://[::1]:{port(relay, 0)}/v1/connect",
        extra_headers={"Authorization": f"Bearer {session_token()}", "Sec-WebSocket-Protocol": f.PROTOCOL},
    )
    agent.session.control(f.HELLO, 0, versions=[1], agent="test", connect=1)
    await agent.online()
    client = await visit(relay, "::1")
    assert (await client.response())[2] == b"hello"
    client.writer.close()
    with pytest.raises(OSError):
        await visit(relay, "127.0.0.1")
    agent.close()


async def test_only_this_machine_is_exempt_and_a_64_is_one_client(relay: Relay) -> None:
    class Guest:
        deadline = 0.0
        draining = False
        door = Door(b"http", 80)

        def __init__(self, address: str) -> None:
            self.address = address

    public = relay.public
    limit = public.settings.connections_per_address
    here = [Guest("::1") for _ in range(limit + 1)]
    assert all(public.admit(guest) for guest in here)  # type: ignore[arg-type]
    theirs = [Guest(f"2001:db8::{n:x}") for n in range(limit)]
    assert all(public.admit(guest) for guest in theirs)  # type: ignore[arg-type]
    assert not public.admit(Guest("2001:db8::ffff:1"))  # type: ignore[arg-type]
    other = Guest("2001:db8:0:1::1")
    assert public.admit(other)  # type: ignore[arg-type]
    for guest in (*here, *theirs, other):
        public.leave(guest)  # type: ignore[arg-type]
    assert not public._by_address and not public.connections
