"""Ctrl-C of an agent: what is in flight is answered, nothing new is taken, and a second one does not wait."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.system.platform import Account, Agent, Up
from tests.system.targets import Request, app, port_of
from tests.system.visitor import connected, get, request
from tests.timing import PATIENCE_SECONDS

pytestmark = [pytest.mark.system, pytest.mark.realtime]

INTERRUPTED = 130


async def websocket(request: Request) -> None:
    await request.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    await request.reader.read()


async def until_offline(up: Up, host: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (await get(up.http_port, host)).error != "edge.tunnel_offline":
        assert time.monotonic() < deadline, "visitors still reach an agent that leaves"


async def test_the_first_answers_what_is_in_flight(
    up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack
) -> None:
    release = asyncio.Event()

    async def slow(request: Request) -> None:
        await release.wait()
        await request.respond(b"late")

    agent = Agent(account, folder, port_of(target), "leaves")
    started.callback(agent.end)
    async with app(target, slow=slow, websocket=websocket), connected(up.http_port) as page:
        await agent.is_online()
        fields = ["Connection: Upgrade", "Upgrade: websocket"]
        await page.send(request("leaves.localhost", "/websocket", fields=fields))
        assert (await page.answer_head()).status == 101
        visit = asyncio.create_task(get(up.http_port, "leaves.localhost", "/slow"))
        await asyncio.sleep(0.3)
        agent.kill(signal.SIGINT)
        await until_offline(up, "leaves.localhost")
        await asyncio.sleep(1.5)
        assert agent.process.poll() is None, "a request is still in flight"
        release.set()
        assert (await visit).body == b"late"
        # A WebSocket has no end of its own, and does not hold the agent up.
        assert await agent.exit(2) == INTERRUPTED
        with pytest.raises((EOFError, OSError)):
            await page.reader.readexactly(1)
    assert account.tunnels()["leaves"]["state"] == "offline"


async def test_the_second_ends_it_at_once(
    up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack
) -> None:
    async def stuck(request: Request) -> None:
        await request.reader.read()

    agent = Agent(account, folder, port_of(target), "hurries")
    started.callback(agent.end)
    async with app(target, stuck=stuck):
        await agent.is_online()
        visit = asyncio.create_task(get(up.http_port, "hurries.localhost", "/stuck"))
        await asyncio.sleep(0.3)
        agent.kill(signal.SIGINT)
        await asyncio.sleep(0.5)
        assert agent.process.poll() is None
        agent.kill(signal.SIGINT)
        assert await agent.exit(2) == INTERRUPTED
        assert (await visit).error == "edge.agent_unreachable"
