"""A plan that is bought, ended and not paid, as visitors of a live tunnel meet it: relays follow the payment provider in seconds.

A whole platform with the simulated Stripe: its webhooks, the worker `billing`, the change to every relay, an agent that stays.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from portico.embedded.folders import temp_home
from tests.system.platform import Account, Agent, Up, port_span
from tests.system.targets import Request, app, listener, port_of
from tests.system.test_plans import becomes
from tests.system.visitor import Poller, connected, request
from tests.timing import PATIENCE_SECONDS

pytestmark = [pytest.mark.system, pytest.mark.realtime]

DAY = 86_400
#: Requests at once of one tunnel on the plan free.
FREE_AT_ONCE = 20


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`portico up --demo-billing`, the simulators on free ports."""
    home = temp_home("portico-paying-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        folder = tmp_path_factory.mktemp("paying")
        yield Up(home, folder, stack, demo_billing=1, simulator_ports="0,0,0", tcp_ports=port_span(2))


class Buyer:
    """The owner of an organization, and the simulated Stripe."""

    def __init__(self, up: Up, account: Account) -> None:
        self.account = account
        settings = json.loads((up.home / "simulators" / "settings.json").read_text())
        self.stripe: str = settings["PORTICO_STRIPE_API_URL"]
        self.key: str = settings["PORTICO_STRIPE_SECRET_KEY"]

    async def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        return await asyncio.to_thread(self.account.call, method, path, body)

    async def buy(self) -> float:
        """Pay for the plan pro on the page; when that was done (monotonic)."""
        back = f"{self.account.api_url}/sign-in"
        body = {"plan": "pro", "provider": "stripe", "success_url": back, "cancel_url": back}
        page = await self.call("POST", "/billing/checkout-sessions", body)
        began = time.monotonic()
        async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
            answer = await http.post(page["url"], data={"act": "pay", "card": "good"})
        assert answer.status_code == 303, answer.text
        return began

    async def stripes(self, verb: str, body: dict[str, Any]) -> float:
        began = time.monotonic()
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
            answer = await http.post(f"{self.stripe}/_sim/{verb}", json=body)
        assert answer.is_success, answer.text
        return began

    async def subscription(self) -> str:
        """What Stripe calls the one that is alive."""
        async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
            answer = await http.get(f"{self.stripe}/v1/subscriptions", headers={"Authorization": f"Bearer {self.key}"})
        (found,) = answer.json()["data"]
        return str(found["id"])

    async def settled(self, status: str) -> None:
        """Wait until we know of it, too."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (found := (await self.call("GET", "/billing/subscription"))["subscription"]) is None or (
                found["status"] != status
            ):
                await asyncio.sleep(0.1)


@asynccontextmanager
async def held_open(port: int, host: str, count: int) -> AsyncIterator[None]:
    """So many requests in flight."""
    async with AsyncExitStack() as stack:
        for _ in range(count):
            stream = await stack.enter_async_context(connected(port))
            await stream.send(request(host, "/events"))
            assert (await stream.answer_head()).status == 200
        yield


async def endless(request: Request) -> None:
    await request.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: here\n\n")
    await request.reader.read()


async def test_a_live_tunnel_follows_what_is_paid(shop: Up, tmp_path: Path, started: ExitStack) -> None:
    target: socket.socket = started.enter_context(listener())
    account = Account(shop.api_url)
    started.callback(account.close)
    agent = Agent(account, tmp_path, port_of(target), "paid")
    started.callback(agent.end)
    buyer, host, took = Buyer(shop, account), "paid.localhost", dict[str, float]()
    async with app(target, events=endless):
        await agent.is_online()
        async with held_open(shop.http_port, host, FREE_AT_ONCE), Poller(shop.http_port, host, rate=5) as poller:
            await becomes(poller, "edge.concurrency_exceeded", time.monotonic(), PATIENCE_SECONDS)
            bought = await buyer.buy()
            took["bought"] = await becomes(poller, "hello", bought, PATIENCE_SECONDS)

            began = time.monotonic()
            await buyer.call("POST", "/billing/subscription/cancel", {"at_period_end": False})
            took["ended"] = await becomes(poller, "edge.concurrency_exceeded", began, PATIENCE_SECONDS)
            await buyer.settled("canceled")

            bought = await buyer.buy()
            took["bought again"] = await becomes(poller, "hello", bought, PATIENCE_SECONDS)
            await buyer.settled("active")
            # The renewal fails, and so does every attempt after it: Stripe ends up with an unpaid subscription.
            await buyer.stripes("card", {"subscription": await buyer.subscription(), "card": "declines"})
            began = await buyer.stripes("clock", {"advance": 50 * DAY})
            took["not paid"] = await becomes(poller, "edge.concurrency_exceeded", began, PATIENCE_SECONDS)
            await buyer.settled("suspended")
    events = [event["event"] for event in agent.events()]
    assert events.count("online") == 1 and "offline" not in events, "its agent never left"
    print(", ".join(f"{what} after {seconds * 1000:.0f} ms" for what, seconds in took.items()))
