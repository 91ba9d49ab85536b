"""A developer behind a proxy, on the real platform: the tunnel serves, `diagnose` finds nothing, `logs -f` tells what happens."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.agent.proxies import TestProxy, proxy
from tests.system.platform import Account, Agent, Child, Up
from tests.system.targets import Request, app, port_of
from tests.system.visitor import get

pytestmark = [pytest.mark.system, pytest.mark.realtime]


async def hello(request: Request) -> None:
    await request.respond(b"hello")


def settings(account: Account, folder: Path, way: TestProxy) -> dict[str, Any]:
    return {
        "server": account.api_url,
        "agent_key": account.agent_key,
        "config_dir": folder / "config",
        "proxy_url": way.url_for("me", "s3cret"),
        "logs_poll_seconds": 0.1,
    }


async def seen(child: Child, count: int, limit: float = 30.0) -> list[dict[str, Any]]:
    """The first ``count`` lines of JSON that ``child`` wrote."""
    async with asyncio.timeout(limit):
        while len(lines := child.out.split("\n")[:-1]) < count:
            assert child.process.poll() is None, child.out
            await asyncio.sleep(0.05)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", ["http", "socks5"])
async def test_a_tunnel_through_a_proxy_and_its_history(
    up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack, kind: str
) -> None:
    name = f"behind-{kind}"
    async with proxy(kind) as way, app(target, who=hello):
        way.users = {"me": "s3cret"}
        own = settings(account, folder, way)
        agent = Agent(account, folder, port_of(target), name, proxy_url=own["proxy_url"])
        started.callback(agent.end)
        await agent.is_online()
        assert (await get(up.http_port, f"{name}.localhost", "/who")).body == b"hello"
        assert way.opened >= 2, "the API and the relay"

        diagnosis = Child(f"diagnose-{kind}", ["diagnose", str(port_of(target)), "--json"], folder, own)
        started.callback(diagnosis.end)
        assert await diagnosis.exit(20) == 0, diagnosis.out
        assert {finding["level"] for finding in json.loads(diagnosis.out)} == {"OK"}, diagnosis.out

        logs = Child(f"logs-{kind}", ["logs", "-f", "--json", name], folder, own)
        started.callback(logs.end)
        assert [row["kind"] for row in await seen(logs, 3)] == ["created", "session", "online"]
        agent.kill(signal.SIGKILL)
        lost = (await seen(logs, 4))[3]
        assert (lost["kind"], lost["name"], lost["details"]["reason"]) == ("offline", name, "connection lost")
        again = Agent(account, folder, port_of(target), name, proxy_url=own["proxy_url"])
        started.callback(again.end)
        await again.is_online()
        await seen(logs, 6)  # it was online for a heartbeat, at least
        again.kill(signal.SIGTERM)
        rows = await seen(logs, 7)
        assert [row["kind"] for row in rows[4:7]] == ["session", "online", "offline"]
        assert rows[6]["details"]["reason"] == "the agent is stopping"
        assert len({row["id"] for row in rows}) == len(rows)
        logs.kill(signal.SIGINT)
        assert await logs.exit(10) == 130 and not logs.err
        assert "s3cret" not in agent.said + again.said + diagnosis.out + logs.out
