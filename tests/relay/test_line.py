"""The line of a tunnel at its concurrency: in order of arrival, so many and so long, and emptied by whatever ends the wait."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from portico.kit.sockets import reset_transport
from portico.relay.server import Relay
from tests.relay.doubles import Client, ScriptedAgent, ScriptedStream, grant, port, row, session_token
from tests.relay.known import forget, learn, whole
from tests.relay.test_rates_http import started, visitor
from tests.timing import Since


def get(path: str) -> bytes:
    return f"GET /{path} HTTP/1.1\r\nHost: web.localhost\r\n\r\n".encode()


def document(requests: int = 3, seconds: float = 1.5, concurrency: int = 1) -> dict[str, Any]:
    return {"version": 1, "concurrency": concurrency, "queue": {"requests": requests, "seconds": seconds}}


@pytest.fixture
async def agent(relay: Relay) -> AsyncIterator[ScriptedAgent]:
    """A tunnel that takes one request at a time and lets three wait; its target answers when it is told to."""
    made = await ScriptedAgent().connect(port(relay, 0), session_token())
    made.on_stream = lambda stream: None
    await made.online(grant(policy=document(), policy_version=1))
    yield made
    made.close()


def waiting(relay: Relay) -> int:
    line = relay.agents.by_tunnel["tun_web"].line
    assert line is not None and line.closed is (len(line) > 0)
    return len(line)


async def queue(relay: Relay, agent: ScriptedAgent, visit: Any, *paths: str) -> list[Client]:
    """Visitors that ask, in this order; the first of them is served."""
    clients = []
    for at, path in enumerate(paths):
        clients.append(await visit(get(path)))
        await agent.until(lambda at=at: len(agent.streams) + waiting(relay) == at + 1)
    return clients


async def test_in_order_of_arrival(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    clients = await queue(relay, agent, visit, "0", "1", "2", "3")
    assert len(agent.streams) == 1 and waiting(relay) == relay.public.holding.count == 3
    status, fields, _ = await (await visit(get("4"))).response()
    assert (status, fields[b"portico-error"]) == (429, [b"edge.concurrency_exceeded"])
    assert b"retry-after" in fields
    for at, client in enumerate(clients):
        await agent.until(lambda at=at: len(agent.streams) == at + 1)
        agent.streams[at].answer(body=agent.streams[at].target)
        assert (await client.response())[::2] == (200, b"/%d" % at)
        assert relay.agents.by_tunnel["tun_web"].inflight <= 1
    assert waiting(relay) == relay.public.holding.count == 0
    clients[0].send(get("again"))  # the connection goes on as if nothing had been
    await agent.until(lambda: len(agent.streams) == 5)
    agent.streams[4].answer()
    assert (await clients[0].response())[0] == 200


async def test_nobody_overtakes(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    """Those served come back at once with requests that take the short way; who waited is first."""
    forget()
    agent.on_stream = whole
    fast = [await visit() for _ in range(2)]
    for client in fast:
        await learn(client, get("fast"))
    agent.on_stream = lambda stream: None
    agent.streams.clear()
    fast[0].send(get("fast"))
    await agent.until(lambda: len(agent.streams) == 1)
    slow = await visit(get("slow"))
    await agent.until(lambda: waiting(relay) == 1)
    fast[1].send(get("fast"))
    await agent.until(lambda: waiting(relay) == 2)
    whole(agent.streams[0])
    fast[0].send(get("fast"))  # in the same moment in which a place is free
    assert (await fast[0].response())[0] == 200
    await agent.until(lambda: len(agent.streams) == 2 and waiting(relay) == 2)
    assert agent.streams[1].target == b"/slow"
    for at, client in ((1, slow), (2, fast[1]), (3, fast[0])):
        await agent.until(lambda at=at: len(agent.streams) == at + 1)
        whole(agent.streams[at])
        assert (await client.response())[0] == 200


async def test_so_long_and_no_longer(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    change(relay, document(seconds=0.3))
    began, since = time.monotonic(), Since()
    _, *late = await queue(relay, agent, visit, "0", "1", "2")
    for client in late:
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (429, [b"edge.concurrency_exceeded"])
    assert time.monotonic() - began >= 0.3 and since.waited() < 1.5
    assert waiting(relay) == relay.public.holding.count == 0 and len(agent.streams) == 1


@pytest.mark.parametrize("abruptly", [True, False])
async def test_a_visitor_that_goes_away_leaves(relay: Relay, agent: ScriptedAgent, visit: Any, abruptly: bool) -> None:
    first, second, third = await queue(relay, agent, visit, "0", "1", "2")
    reset_transport(second.writer.transport) if abruptly else second.writer.close()
    await agent.until(lambda: waiting(relay) == 1, 3)
    agent.streams[0].answer()
    await agent.until(lambda: len(agent.streams) == 2)
    assert agent.streams[1].target == b"/2" and relay.public.holding.count == 0
    agent.streams[1].answer()
    assert (await first.response())[0] == (await third.response())[0] == 200


async def test_a_body_waits_within_one_read(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    (first,) = await queue(relay, agent, visit, "0")
    body = b"x" * 3_000_000
    upload = await visit(b"POST /1 HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 3000000\r\n\r\n" + body)
    await agent.until(lambda: waiting(relay) == 1)
    await asyncio.sleep(0.1)
    (exchange,) = [e for e, _ in relay.agents.by_tunnel["tun_web"].line._waiting]  # type: ignore[union-attr]
    assert sum(map(len, exchange.pending)) <= 2 * 65_536
    agent.streams[0].answer()
    await agent.until(lambda: len(agent.streams) == 2)
    await asyncio.wait_for(agent.streams[1].ended.wait(), 30)
    assert bytes(agent.streams[1].body) == body
    agent.streams[1].answer()
    assert (await first.response())[0] == (await upload.response())[0] == 200


async def test_another_policy(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    """More places are taken at once; without a line nobody waits any more."""
    await queue(relay, agent, visit, "0", "1", "2", "3")
    change(relay, document(concurrency=3))
    await agent.until(lambda: len(agent.streams) == 3 and waiting(relay) == 1)
    assert [stream.target for stream in agent.streams] == [b"/0", b"/1", b"/2"]


async def test_a_policy_without_one(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    _, *late = await queue(relay, agent, visit, "0", "1", "2")
    change(relay, {"version": 1, "concurrency": 1})
    for client in late:
        assert (await client.response())[0] == 429
    assert relay.agents.by_tunnel["tun_web"].line is None and relay.public.holding.count == 0


async def test_one_that_left_a_moment_before_keeps_nobody_waiting(
    relay: Relay, agent: ScriptedAgent, visit: Any
) -> None:
    """The relay answers before it hears that the visitor is gone, is reset for it, and then ends its output."""
    change(relay, document(seconds=30))
    await queue(relay, agent, visit, "0")
    gone = socket.create_connection(("127.0.0.1", port(relay, 1)))
    gone.sendall(b"POST /1 HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: 9\r\n\r\n")
    await agent.until(lambda: waiting(relay) == 1)
    late = await visit(get("2"))
    await agent.until(lambda: waiting(relay) == 2)
    gone.close()
    change(relay, {"version": 1, "concurrency": 1})
    assert (await late.response())[0] == 429
    assert relay.public.holding.count == 0


async def test_another_decision(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    """What waited is decided on by the policy that holds when its turn comes."""
    _, late = await queue(relay, agent, visit, "0", "1")
    change(relay, document() | {"addresses": {"rules": [{"allow": "192.0.2.0/24"}]}})
    agent.streams[0].answer()
    assert (await late.response())[0] == 403
    assert len(agent.streams) == 1 and waiting(relay) == 0


async def test_the_tunnel_ends(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    _, *late = await queue(relay, agent, visit, "0", "1", "2")
    stopped = {"kind": "tunnel", "tunnel": row("web", "stopped", 2)}
    relay.snapshot.apply({"type": "delta", "version": 2, "changes": [stopped]})
    for client in late:
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (404, [b"edge.tunnel_offline"])
    assert relay.public.holding.count == 0


async def test_the_agents_next_connection_serves_who_waited(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    _, late = await queue(relay, agent, visit, "0", "1")
    again = await ScriptedAgent().connect(port(relay, 0), session_token(generation=2))
    await again.online(grant(generation=2, policy=document(), policy_version=1))
    assert (await late.response())[0] == 200
    assert [stream.target for stream in again.streams] == [b"/1"] and relay.public.holding.count == 0
    again.close()


async def test_a_relay_that_stops(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    first, late = await queue(relay, agent, visit, "0", "1")
    relay.public.drain()
    agent.streams[0].answer()
    await agent.until(lambda: len(agent.streams) == 2)
    agent.streams[1].answer()
    assert (await first.response())[0] == (await late.response())[0] == 200


@pytest.mark.parametrize("relay_settings", [{"hold_max_requests": 2}])
async def test_all_that_wait_in_a_process_are_bounded(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    await queue(relay, agent, visit, "0", "1", "2")
    assert (await (await visit(get("3"))).response())[0] == 429
    assert waiting(relay) == 2


async def test_many_visitors_are_all_served_and_in_order(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    """Sixty at once through four places."""
    change(relay, document(requests=100, seconds=20, concurrency=4))
    most, order = 0, []

    def answer(stream: ScriptedStream) -> None:
        nonlocal most
        most = max(most, relay.agents.by_tunnel["tun_web"].inflight)
        order.append(int(stream.target[1:]))
        asyncio.get_running_loop().call_later(0.002, stream.answer)

    agent.on_stream = answer
    clients = []
    for number in range(60):
        clients.append(await visit(get(str(number))))
        await asyncio.sleep(0)
    assert [(await client.response())[0] for client in clients] == [200] * 60
    assert most <= 4 and relay.public.holding.count == 0
    assert max(abs(at - number) for at, number in enumerate(order)) <= 6, (
        "but for the order of arrival at the relay itself"
    )


async def test_not_without_the_rule(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    change(relay, {"version": 1, "concurrency": 1})
    await visit(get("0"))
    await agent.until(lambda: agent.streams)
    since = Since()
    assert (await (await visit(get("1"))).response())[0] == 429
    assert since.waited() < 0.5


def change(relay: Relay, policy: dict[str, Any]) -> None:
    """The tunnel's policy from now on."""
    live = relay.agents.by_tunnel["tun_web"]
    version = live.policy_version + 1
    changed = {"kind": "tunnel", "tunnel": row("web", policy=policy, policy_version=version)}
    relay.snapshot.apply({"type": "delta", "version": (relay.snapshot.version or 0) + 1, "changes": [changed]})
    assert live.policy_version == version


async def test_who_comes_by_another_relay_neither_waits_nor_overtakes(tmp_path: Path) -> None:
    front = await started(tmp_path, "front", (), None)
    owner = await started(tmp_path, "owner", (f"ws://127.0.0.1:{port(front, 0)}/v1/peer",), None)
    agent = await ScriptedAgent().connect(port(owner, 0), session_token())
    agent.on_stream = lambda stream: None
    await agent.online(grant(policy=document(seconds=20), policy_version=1))
    await agent.until(lambda: front.peers.by_host)
    here = [await visitor(owner) for _ in range(2)]
    for at, client in enumerate(here):
        client.send(get(str(at)))
        await agent.until(lambda at=at: len(agent.streams) + waiting(owner) == at + 1)
    there = await visitor(front)
    there.send(get("2"))
    status, fields, _ = await there.response()
    assert (status, fields[b"portico-error"]) == (429, [b"edge.concurrency_exceeded"])
    agent.streams[0].answer()
    await agent.until(lambda: len(agent.streams) == 2)
    assert agent.streams[1].target == b"/1" and waiting(owner) == 0
    agent.streams[1].answer()
    for client in (*here, there):
        client.writer.close()
    agent.close()
    await front.stop()
    await owner.stop()
