"""A plan as visitors meet it: however many ask at once there is no more than it allows, and a change is there within 2 s."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from portico.cli.output import TUNNEL_REFUSED
from tests.system.platform import Account, Agent, Up
from tests.system.targets import Request, app, port_of
from tests.system.visitor import Poller, connected, get, request
from tests.timing import allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime]

REACH_SECONDS = 2.0
#: Of a relay's report of usage, which comes every two seconds, and of the change that follows from it.
REPORT_SECONDS = 2.0 + REACH_SECONDS
EXIT_SECONDS = 5.0


class Operator:
    """Moves the organization of an account from plan to plan."""

    def __init__(self, up: Up, account: Account) -> None:
        self._account, self._key = account, up.credentials["operator_key"]
        self.organization = account.call("GET", "/whoami")["organization"]["id"]

    def move(self, plan: str, **overrides: int | None) -> float:
        """When it was done (monotonic)."""
        rows = [{"name": name, "value": value} for name, value in overrides.items()]
        body = {"plan": plan, "reason": "system test", "overrides": rows}
        self.ask("PUT", f"organizations/{self.organization}/plan", body)
        return time.monotonic()

    def ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        return self._account.call(method, f"/admin/{path}", body, self._key)


@pytest.fixture(scope="module")
def operator(up: Up, account: Account) -> Operator:
    return Operator(up, account)


@pytest.fixture(autouse=True)
def on_its_first_plan(operator: Operator) -> Iterator[None]:
    yield
    operator.move("unlimited")


async def becomes(poller: Poller, what: str, since: float, limit: float = REACH_SECONDS) -> float:
    """Seconds from ``since`` until visitors get this (an error code, or the start of a body); nothing else afterwards."""
    while not any(visit.what == what for visit in poller.since(since)):
        assert time.monotonic() - since < allowed(limit, since), (
            f"no {what} within {limit:g} s; last: {poller.visits[-3:]}"
        )
        await asyncio.sleep(0.01)
    first = min(visit.ended for visit in poller.since(since) if visit.what == what)
    await asyncio.sleep(0.2)
    assert {visit.what for visit in poller.since(first)} <= {what}
    return first - since


async def test_fifty_at_a_limit_of_ten_leave_ten(up: Up) -> None:
    account = Account(up.api_url)
    try:
        Operator(up, account).move("free", tunnels=10)
        limits = httpx.Limits(max_connections=50)
        headers = {"Authorization": f"Bearer {account.token}"}
        async with httpx.AsyncClient(base_url=up.api_url, headers=headers, limits=limits, timeout=30) as client:
            answers = await asyncio.gather(*(client.post("/v1/tunnels", json={}) for _ in range(50)))
        refused = [answer.json() for answer in answers if answer.status_code == 403]
        assert sum(answer.status_code == 201 for answer in answers) == 10 == len(account.tunnels())
        assert len(refused) == 40
        assert {problem["code"] for problem in refused} == {"quota.exceeded"}
    finally:
        account.close()


async def test_concurrency(up: Up, operator: Operator, host: str, target: socket.socket, agent: Agent) -> None:
    async def held(request: Request) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: here\n\n")
        await request.reader.read()

    async with app(target, events=held), connected(up.http_port) as stream:
        await stream.send(request(host, "/events"))
        assert (await stream.answer_head()).status == 200
        async with Poller(up.http_port, host, rate=10) as poller:
            await poller.until(good=True, since=time.monotonic(), limit=5)
            at = await asyncio.to_thread(operator.move, "pro", concurrency=1)
            fell = await becomes(poller, "edge.concurrency_exceeded", at)
            assert await stream.chunk() == b"data: here\n\n"  # what is under way goes on
            at = await asyncio.to_thread(operator.move, "unlimited")
            rose = await becomes(poller, "hello", at)
        stream.close()
    print(f"less after {fell * 1000:.0f} ms, more after {rose * 1000:.0f} ms")


async def test_a_month_that_is_used_up(
    up: Up, operator: Operator, host: str, target: socket.socket, agent: Agent
) -> None:
    """By a smaller plan at once; by traffic with the relay's next report. Lifted at once, and the agent never left."""
    async with app(target), Poller(up.http_port, host, rate=20) as poller:
        await poller.until(good=True, since=time.monotonic(), limit=5)
        while operator._account.call("GET", "/usage")["month"]["limits"][0]["used"] < 1:
            await asyncio.sleep(0.1)
        at = await asyncio.to_thread(operator.move, "free", requests_per_month=1)
        fell = await becomes(poller, "edge.quota_exceeded", at)
        refused = await get(up.http_port, host)
        assert (refused.status, refused.error) == (429, "edge.quota_exceeded")
        assert 1 <= int(refused.get("Retry-After")) <= 31 * 86_400
        month = operator._account.call("GET", "/usage")["month"]
        assert month["refused"] is True
        at = await asyncio.to_thread(operator.move, "free", requests_per_month=month["limits"][0]["used"] + 30)
        rose = await becomes(poller, "hello", at)
        counted = await becomes(poller, "edge.quota_exceeded", time.monotonic(), 2 + REPORT_SECONDS)
        at = await asyncio.to_thread(operator.move, "pro")  # has no hard cap
        await becomes(poller, "hello", at)
    events = [event["event"] for event in agent.events()]
    assert events.count("online") == 1 and "offline" not in events
    print(f"down after {fell * 1000:.0f} ms, up after {rose * 1000:.0f} ms, by traffic after {counted:.1f} s")


async def test_a_feature_that_is_lost(
    up: Up, account: Account, operator: Operator, folder: Path, target: socket.socket, started: ExitStack
) -> None:
    """A tunnel that needs it ends within 2 s: without its rule it would be open. It is frozen, and comes back with the plan."""
    rule = {"addresses": {"rules": [{"allow": "127.0.0.0/8"}]}}
    account.call("POST", "/tunnels", {"name": "ruled", "policy": rule})
    agent = Agent(account, folder, port_of(target), "ruled")
    started.callback(agent.end)
    async with app(target):
        await agent.is_online()
        async with Poller(up.http_port, "ruled.localhost", rate=20) as poller:
            await poller.until(good=True, since=time.monotonic(), limit=5)
            at = await asyncio.to_thread(operator.move, "free", tunnels=None)
            took = await becomes(poller, "edge.tunnel_offline", at)
        assert await agent.exit(EXIT_SECONDS) == TUNNEL_REFUSED, agent.said
        assert "tunnel.frozen" in agent.said, agent.said
        assert account.tunnels()["ruled"]["frozen"] == "ip_rules"
        again = Agent(account, folder, port_of(target), "ruled")
        started.callback(again.end)
        assert await again.exit(EXIT_SECONDS) == TUNNEL_REFUSED, again.said
        assert "has no address rules at the edge" in again.said, again.said
        operator.move("pro")
        assert account.tunnels()["ruled"]["state"] == "offline"
    print(f"lost after {took * 1000:.0f} ms")


async def test_a_suspension(
    up: Up, account: Account, operator: Operator, host: str, target: socket.socket, agent: Agent
) -> None:
    """The last of the module: its agent ends."""
    path = f"organizations/{operator.organization}"
    async with app(target), Poller(up.http_port, host, rate=20) as poller:
        await poller.until(good=True, since=time.monotonic(), limit=5)
        try:
            await asyncio.to_thread(operator.ask, "POST", f"{path}/suspend", {"reason": "system test"})
            took = await becomes(poller, "edge.account_suspended", time.monotonic())
        finally:
            await asyncio.to_thread(operator.ask, "POST", f"{path}/resume", {"reason": "system test"})
    print(f"suspended after {took * 1000:.0f} ms")
