"""An organization about to be deleted is off line within two seconds, and comes back when that is taken back."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.system.platform import Account, Agent, Up
from tests.system.targets import app, port_of
from tests.system.visitor import get
from tests.timing import allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime]


async def test_a_deletion_reaches_live_tunnels_and_can_be_taken_back(
    up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack
) -> None:
    agent = Agent(account, folder, port_of(target), "leaving-us")
    started.callback(agent.end)
    async with app(target):
        await agent.is_online()
        assert (await get(up.http_port, "leaving-us.localhost")).status == 200
        name = account.call("GET", "/org")["name"]
        account.call("POST", "/org/deletion", {"name": name})
        asked = time.monotonic()
        while (await get(up.http_port, "leaving-us.localhost")).error != "edge.tunnel_offline":
            assert time.monotonic() - asked < allowed(2, asked), (
                "a tunnel outlives its organization by more than two seconds"
            )
            await asyncio.sleep(0.02)
        assert account.call("GET", "/org")["standing"] == "deleting"
        account.call("DELETE", "/org/deletion")
        back = time.monotonic()
        while (await get(up.http_port, "leaving-us.localhost")).status != 200:
            assert time.monotonic() - back < 90, "the agent does not come back"
            await asyncio.sleep(0.1)
