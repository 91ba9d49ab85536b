"""Visitors' passwords through the whole platform: set by the API, asked for within two seconds, and nowhere to be found."""

from __future__ import annotations

import asyncio
import socket
import time
from base64 import b64encode
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.system.platform import Account, Agent, Up
from tests.system.targets import Request, app, port_of
from tests.system.visitor import Answer, connected, request
from tests.timing import allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime]

#: What a change of policy may take to reach a relay.
CHANGE_SECONDS = 2.0
PASSWORD = "a-pässword-that-occurs-nowhere-else-7261"
WRONG = "a-wrong-one-that-occurs-nowhere-else-9182"


def given(name: str, password: str) -> str:
    return f"Authorization: Basic {b64encode(f'{name}:{password}'.encode()).decode()}"


async def ask(up: Up, host: str, *fields: str) -> Answer:
    async with asyncio.timeout(30), connected(up.http_port) as wire:
        await wire.send(request(host, "/keep", fields=[*fields, "Connection: close"]))
        return await wire.answer()


async def becomes(up: Up, host: str, status: int, *fields: str) -> float:
    """Seconds until a request has this status."""
    began = time.monotonic()
    while (got := (await ask(up, host, *fields)).status) != status:
        assert time.monotonic() - began < allowed(2 * CHANGE_SECONDS, began), got
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def holders(folder: Path, words: list[bytes]) -> list[Path]:
    """Files below a folder that hold one of the words."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            found += [path] * any(word in data for word in words)
    return found


async def test_set_asked_for_changed_and_kept_by_nobody(
    up: Up, account: Account, agent: Agent, host: str, target: socket.socket
) -> None:
    seen: list[list[str]] = []

    async def keep(request: Request) -> None:
        seen.append(request.values("Authorization"))
        await request.respond(b"kept")

    tunnel = account.tunnels()["passwords"]["id"]
    async with app(target, keep=keep):
        assert (await ask(up, host)).status == 200
        users = [{"name": "alice", "password": PASSWORD}, {"name": "bob", "password": "another-long-one"}]
        shown = account.call("PATCH", f"/tunnels/{tunnel}", {"policy": {"basic_auth": {"users": users}}})
        assert PASSWORD not in str(shown) and "argon2id" not in str(shown)
        assert await becomes(up, host, 401) < CHANGE_SECONDS
        refused = await ask(up, host)
        assert (refused.error, refused.get("WWW-Authenticate")) == (
            *("edge.auth_required", 'Basic realm="Portico", charset="UTF-8"'),
        )
        before = len(seen)
        assert (await ask(up, host, given("alice", WRONG))).error == "edge.auth_invalid"
        assert (await ask(up, host, given("bob", PASSWORD))).error == "edge.auth_invalid"
        assert len(seen) == before
        for _ in range(3):
            assert (await ask(up, host, given("alice", PASSWORD))).body == b"kept"
            assert (await ask(up, host, given("bob", "another-long-one"))).body == b"kept"
        assert seen[before:] == [[]] * 6

        account.call("PATCH", f"/tunnels/{tunnel}", {"policy": {"basic_auth": {"users": users[1:]}}})
        assert await becomes(up, host, 401, given("alice", PASSWORD)) < CHANGE_SECONDS
        assert (await ask(up, host, given("bob", "another-long-one"))).status == 200
        account.call("PATCH", f"/tunnels/{tunnel}", {"policy": {}})
        assert await becomes(up, host, 200) < CHANGE_SECONDS

    words = [word for text in (PASSWORD, WRONG) for word in (text.encode(), given("alice", text)[21:].encode())]
    assert holders(up.home, [b"$argon2id$"]), "a digest is found, so that a password would be"
    assert holders(up.folder, words) == [], "logs of the platform"
    assert holders(up.home, words) == [], "database, edge state, spools and logs below the data folder"
    assert not any(word in (agent.out + agent.err).encode() for word in words)


async def test_set_where_the_agent_starts(
    up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack
) -> None:
    """By its environment, so that it is in no list of processes; online with it at once, and again after a restart without."""
    password = "typed-once-and-stored-nowhere-5530"
    words = [password.encode(), given("carol", password)[21:].encode()]
    for settings in ({"basic_auth": f"carol:{password}"}, {}):
        agent = Agent(account, folder, port_of(target), "guarded", **settings)
        started.callback(agent.end)
        await agent.is_online()
        host = next(str(e["url"]) for e in agent.events() if e["event"] == "online").split("//")[1].split(":")[0]
        async with app(target, keep=kept):
            assert (await ask(up, host)).error == "edge.auth_required"
            assert (await ask(up, host, given("carol", password))).body == b"kept"
            assert (await ask(up, host, given("carol", password + "x"))).error == "edge.auth_invalid"
        assert password not in Path(f"/proc/{agent.pid}/cmdline").read_text()
        agent.end()
        assert not any(word in agent.said.encode() for word in words)
    for place in (up.home, up.folder, folder):
        assert holders(place, words) == []


async def kept(request: Request) -> None:
    assert request.values("Authorization") == []
    await request.respond(b"kept")
