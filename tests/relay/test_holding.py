"""Requests for a tunnel whose agent was lost a moment ago wait for it, within a limit; for one given back they do not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from portico.kit.sockets import reset_transport
from portico.relay.server import Relay
from portico.wire import frames as f
from tests.relay.doubles import ScriptedAgent, ScriptedStream, grant, port, row, session_token
from tests.timing import Since

GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"
HOLD: dict[str, Any] = {"hold_seconds": 1.0}

Visit = Callable[..., Any]
pytestmark = pytest.mark.parametrize("relay_settings", [HOLD])


@pytest.fixture(autouse=True)
def known(relay: Relay) -> None:
    """The platform knows the tunnel, and the first moments of the process are over."""
    change = {"kind": "tunnel", "tunnel": row("web")}
    relay.snapshot.apply({"type": "delta", "version": 2, "changes": [change]})
    relay.public.holding._settled_at = 0.0


async def lose(relay: Relay, agent: ScriptedAgent) -> None:
    agent.close()
    await agent.until(lambda: not relay.agents.by_tunnel)


async def test_a_request_waits_for_the_agents_return(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    await lose(relay, agent)
    body = b"x" * 300_000
    plain = await visit(GET)
    upload = await visit(b"POST / HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 300000\r\n\r\n" + body)
    await asyncio.sleep(0.3)
    assert relay.public.holding.count == 2

    def answer(stream: ScriptedStream) -> None:
        async def later() -> None:
            await stream.ended.wait()
            stream.answer(body=b"%d" % len(stream.body))

        tasks.append(asyncio.ensure_future(later()))

    tasks: list[asyncio.Future[None]] = []
    back = ScriptedAgent()
    back.on_stream = answer
    await (await back.connect(port(relay, 0), session_token(generation=2))).online(grant(generation=2))
    assert (await plain.response())[::2] == (200, b"0")
    assert (await upload.response())[::2] == (200, b"300000")
    assert relay.public.holding.count == 0
    plain.send(GET)
    assert (await plain.response())[0] == 200  # the connection goes on as if nothing had been
    back.close()


async def test_not_for_ever(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    await lose(relay, agent)
    since = Since()
    status, fields, _ = await (await visit(GET)).response()
    assert (status, fields[b"portico-error"]) == (404, [b"edge.tunnel_offline"])
    assert since.waited() < 2
    since = Since()
    assert (await (await visit(GET)).response())[0] == 404
    assert since.waited() < 0.5  # it is not expected any more


async def test_a_tunnel_that_was_given_back_is_not_waited_for(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    agent.session.control(f.GOAWAY, 0, code="session.ended", detail="", retry_after_ms=0)
    await agent.until(lambda: not relay.agents.by_tunnel)
    since = Since()
    assert (await (await visit(GET)).response())[0] == 404
    assert since.waited() < 0.5


async def test_a_stopped_or_unknown_tunnel_is_not_waited_for(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    stopped = {"kind": "tunnel", "tunnel": row("web", "stopped", 2)}
    relay.snapshot.apply({"type": "delta", "version": 3, "changes": [stopped]})
    await lose(relay, agent)
    relay.agents.expect((b"web.localhost", b"nobody.localhost"))
    since = Since()
    for host, code in ((b"web", b"edge.tunnel_offline"), (b"nobody", b"edge.host_unassigned")):
        status, fields, _ = await (await visit(GET.replace(b"web", host))).response()
        assert (status, fields[b"portico-error"]) == (404, [code])
    assert since.waited() < 0.5


async def test_more_may_wait_than_may_be_in_flight(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    await lose(relay, agent)
    clients = [await visit(GET) for _ in range(12)]
    most = 0

    def answer(stream: ScriptedStream) -> None:
        nonlocal most
        most = max(most, len(back.session.streams))
        asyncio.get_running_loop().call_later(0.02, lambda: stream.answer(body=b"ok"))

    back = ScriptedAgent()
    back.on_stream = answer
    token = grant(generation=2, concurrency=5)
    await (await back.connect(port(relay, 0), session_token(generation=2))).online(token)
    for client in clients:
        assert (await client.response())[::2] == (200, b"ok")
    assert most <= 5
    back.close()


async def test_after_a_stand_still_what_is_too_much_waits_for_room(relay: Relay, visit: Visit) -> None:
    full = await (await ScriptedAgent().connect(port(relay, 0), session_token())).online(grant(concurrency=1))
    full.on_stream = lambda stream: None
    first, refused = await visit(GET), await visit()
    await full.until(lambda: full.streams)
    refused.send(GET)
    assert (await refused.response())[0] == 429
    relay.public.now -= 10  # the last sweep was long ago
    relay.public._sweep()
    second = await visit(GET)
    await asyncio.sleep(0.2)
    full.streams[0].answer(body=b"one")
    assert (await first.response())[2] == b"one"
    await full.until(lambda: len(full.streams) == 2)
    full.streams[1].answer(body=b"two")
    assert (await second.response())[2] == b"two"
    full.close()


async def test_a_visitor_that_leaves_meanwhile(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    await lose(relay, agent)
    client = await visit(GET)
    await agent.until(lambda: relay.public.holding.count == 1)
    reset_transport(client.writer.transport)
    await agent.until(lambda: not relay.public.connections)
    back = await (await ScriptedAgent().connect(port(relay, 0), session_token(generation=2))).online(
        grant(generation=2)
    )
    await agent.until(lambda: relay.public.holding.count == 0)
    assert not back.streams
    back.close()


async def test_a_process_just_started_waits_for_tunnels_that_it_does_not_know_yet(relay: Relay, visit: Visit) -> None:
    relay.public.holding._settled_at = asyncio.get_running_loop().time() + 1
    client = await visit(GET)
    await asyncio.sleep(0.2)
    back = await (await ScriptedAgent().connect(port(relay, 0), session_token())).online()
    assert (await client.response())[0] == 200
    back.close()
