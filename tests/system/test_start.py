"""`portico start` against the whole platform: its file changes while visitors come, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.platform import Account, Child, Up, port_in
from tests.system.targets import Request, app, listener, port_of
from tests.system.visitor import Poller, get

pytestmark = [pytest.mark.system, pytest.mark.realtime]


class Starter(Child):
    """``portico start --all --json`` with a file of its own."""

    def __init__(self, account: Account, folder: Path, file: Path) -> None:
        settings = {"server": account.api_url, "agent_key": account.agent_key, "config_dir": folder / "config"}
        super().__init__("start", ["start", "--all", "--json", "--config", str(file)], folder, settings)

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.out.split("\n")[:-1]]
        return [line for line in lines if line.get("name") == name]

    async def until(self, name: str, event: str, count: int = 1, limit: float = 30.0) -> dict[str, Any]:
        """The ``count``-th event of that kind of that tunnel."""
        async with asyncio.timeout(limit):
            while len(found := [e for e in self.events(name) if e["event"] == event]) < count:
                assert self.process.poll() is None, self.tail()
                await asyncio.sleep(0.02)
        return found[count - 1]


@contextmanager
def starting(account: Account, folder: Path, file: Path) -> Iterator[Starter]:
    with ExitStack() as stack:
        child = Starter(account, folder, file)
        stack.callback(child.end)
        yield child


def host_of(event: dict[str, Any]) -> str:
    return str(event["url"].split("//")[1].split(":")[0])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "portico.yml"


async def test_tunnels_come_go_and_move_under_load(
    up: Up, account: Account, folder: Path, file: Path, target: socket.socket
) -> None:
    """A steady visitor of one tunnel sees no failure while others come and go, and while its own target moves."""
    with listener() as second:
        entry = "  {name}: {{addr: {port}, subdomain: start-{name}}}\n"
        one, two = port_of(target), port_of(second)
        head = "version: 1\ntunnels:\n"
        file.write_text(head + entry.format(name="steady", port=one) + entry.format(name="goes", port=one))

        async def says_two(request: Request) -> None:
            await request.respond(b"two")

        async with app(target, which=lambda request: request.respond(b"one")), app(second, which=says_two):
            with starting(account, folder, file) as agent:
                host = host_of(await agent.until("steady", "online"))
                gone = host_of(await agent.until("goes", "online"))
                assert (await get(up.http_port, host, "/which")).body == b"one"
                async with Poller(up.http_port, host) as poller:
                    file.write_text(head + entry.format(name="steady", port=two) + entry.format(name="comes", port=two))
                    new = host_of(await agent.until("comes", "online"))
                    await agent.until("goes", "removed")
                    await asyncio.sleep(1)
                assert poller.bad() == [] and len(poller.visits) > 20
                assert (await get(up.http_port, host, "/which")).body == b"two"
                assert (await get(up.http_port, new, "/which")).body == b"two"
                assert (await get(up.http_port, gone)).error == "edge.tunnel_offline"
                rows = account.tunnels()
                assert rows["steady"]["target"] == f"http://localhost:{two}" and rows["goes"]["state"] == "offline"


async def test_http_and_tcp_in_one_file_and_another_subdomain_later(
    up: Up, account: Account, folder: Path, file: Path, target: socket.socket
) -> None:
    text = "version: 1\ntunnels:\n  mix: {{addr: {port}, subdomain: {sub}}}\n  raw: {{protocol: tcp, addr: {port}}}\n"
    file.write_text(text.format(port=port_of(target), sub="mix-one"))
    async with app(target):
        with starting(account, folder, file) as agent:
            assert (await get(up.http_port, host_of(await agent.until("mix", "online")))).body == b"hello"
            raw = await agent.until("raw", "online")
            assert raw["url"].startswith("tcp://")
            assert (await get(port_in(raw["url"]), "anything")).body == b"hello"
            file.write_text(text.format(port=port_of(target), sub="mix-two"))
            again = await agent.until("mix", "online", 2)
            assert host_of(again).startswith("mix-two.")
            assert (await get(up.http_port, host_of(again))).body == b"hello"


async def test_a_target_that_refuses_the_host_until_the_file_says_rewrite(
    up: Up, account: Account, folder: Path, file: Path, target: socket.socket
) -> None:
    """What a development server does, what the agent says, and that following its advice in the file helps at once."""

    async def strict(request: Request) -> None:
        if request.values("Host") == [f"localhost:{port_of(target)}"]:
            await request.respond(b"welcome")
        else:
            await request.respond(b"Invalid Host header", "403 Forbidden")

    file.write_text(f"version: 1\ntunnels:\n  dev: {{addr: {port_of(target)}}}\n")
    async with app(target, strict=strict):
        with starting(account, folder, file) as agent:
            host = host_of(await agent.until("dev", "online"))
            for _ in range(3):
                assert (await get(up.http_port, host, "/strict")).status == 403
            async with asyncio.timeout(30):
                while "refuses the visitor's Host" not in agent.err:
                    await asyncio.sleep(0.02)
            file.write_text(file.read_text().replace("}", ", host_header: rewrite}"))
            async with asyncio.timeout(30):
                while (await get(up.http_port, host, "/strict")).body != b"welcome":
                    await asyncio.sleep(0.05)
            assert agent.err.count("refuses the visitor's Host") == 1


async def test_one_refused_tunnel_and_one_that_is_stopped_by_its_owner(
    up: Up, account: Account, folder: Path, file: Path, target: socket.socket
) -> None:
    file.write_text(
        "version: 1\ntunnels:\n"
        + f"  kept: {{addr: {port_of(target)}}}\n"
        + f"  barred: {{addr: {port_of(target)}, subdomain: admin}}\n"
        + f"  halted: {{addr: {port_of(target)}}}\n"
    )
    async with app(target):
        with starting(account, folder, file) as agent:
            host = host_of(await agent.until("kept", "online"))
            assert (await agent.until("barred", "error"))["code"] == "tunnel.name_reserved"
            await agent.until("halted", "online")
            assert up.command(account, "stop", "halted").returncode == 0
            assert (await agent.until("halted", "error"))["code"] == "tunnel.stopped"
            assert (await get(up.http_port, host)).body == b"hello"
            assert up.command(account, "stop", "kept").returncode == 0
            assert await agent.exit(10) == 5
