"""Policies through the whole platform: from options and files to what visitors get, changed while answers stream."""

from __future__ import annotations

import asyncio
import socket
import time
from base64 import b64encode
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.relay.authorities import client_ca_pem
from tests.system.platform import Account, Agent, Child, Up, port_in
from tests.system.targets import Request, app, port_of
from tests.system.visitor import Answer, connected, get, request
from tests.timing import allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime]

#: What a change of policy may take to reach a relay.
CHANGE_SECONDS = 2.0
ALICE = f"Authorization: Basic {b64encode(b'alice:open sesame 7').decode()}"


class PolicyAgent(Agent):
    """``portico PROTOCOL PORT --name NAME --json`` with more options."""

    def __init__(
        self, where: Account, folder: Path, protocol: str, port: int, name: str, *more: str, **own: Any
    ) -> None:
        settings = {"server": where.api_url, "agent_key": where.agent_key, "config_dir": folder / "config"}
        Child.__init__(
            self, f"agent-{name}", [protocol, str(port), "--name", name, "--json", *more], folder, settings | own
        )


async def ask(up: Up, host: str, path: str = "/", *fields: str) -> Answer:
    async with asyncio.timeout(30), connected(up.http_port) as wire:
        await wire.send(request(host, path, fields=[*fields, "Connection: close"]))
        return await wire.answer()


async def becomes(up: Up, host: str, what: tuple[int, str], *fields: str) -> float:
    """Seconds until a request has this status and this code."""
    began = time.monotonic()
    while ((got := await ask(up, host, "/", *fields)).status, got.error) != what:
        assert time.monotonic() - began < allowed(2 * CHANGE_SECONDS, began), got
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def patch(account: Account, name: str, policy: Any, **more: Any) -> dict[str, Any]:
    return account.call("PATCH", f"/tunnels/{account.tunnels()[name]['id']}", {"policy": policy, **more})


def told(account: Account, name: str) -> tuple[dict[str, Any], int]:
    row = account.tunnels()[name]
    return row["policy"], row["policy_version"]


async def test_options_become_what_visitors_get(
    up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack
) -> None:
    """And an agent that starts again with the same ones changes nothing, one without any leaves the policy alone."""
    seen: list[Request] = []

    async def show(request: Request) -> None:
        seen.append(request)
        await request.respond(b"shown", fields="Server: secret/1.0\r\nX-Kept: yes\r\n")

    options = [
        "--allow-cidr", "127.0.0.1", "--deny-cidr", "192.0.2.0/24", "--host-header", "rewrite",
        "--request-header-add", "X-Env: staging", "--request-header-remove", "X-Debug",
        "--response-header-add", "X-Frame-Options: DENY", "--response-header-remove", "server",
    ]  # fmt: skip
    host = "options.localhost"
    async with app(target, show=show):
        for again in (False, True):
            agent = PolicyAgent(
                account, folder, "http", port_of(target), "options", *options, basic_auth="alice:open sesame 7\nbob:b"
            )
            started.callback(agent.end)
            await agent.is_online()
            assert (await ask(up, host, "/show")).error == "edge.auth_required" and len(seen) == int(again)
            got = await ask(up, host, "/show", ALICE, "X-Debug: 1", "X-Other: 2")
            assert (got.status, got.body) == (200, b"shown")
            assert (got.get("Server"), got.get("X-Kept"), got.get("X-Frame-Options")) == ("", "yes", "DENY")
            last = seen[-1]
            assert last.values("Host") == [f"localhost:{port_of(target)}"]
            assert (last.values("X-Env"), last.values("X-Debug"), last.values("X-Other")) == (["staging"], [], ["2"])
            assert last.values("Authorization") == []
            assert account.tunnels()["options"]["policy_version"] == 1
            agent.end()
        plain = PolicyAgent(account, folder, "http", port_of(target), "options")
        started.callback(plain.end)
        await plain.is_online()
        assert (await ask(up, host, "/show")).error == "edge.auth_required"
        assert "open sesame" not in agent.said + plain.said


async def test_a_change_reaches_a_live_tunnel_and_a_stream_under_way_goes_on(
    up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack
) -> None:
    release = asyncio.Event()

    async def drip(request: Request) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await release.wait()
        await request.send(b"3\r\ntwo\r\n0\r\n\r\n")

    agent = PolicyAgent(account, folder, "http", port_of(target), "changes")
    started.callback(agent.end)
    host = "changes.localhost"
    async with app(target, drip=drip), connected(up.http_port) as wire:
        await agent.is_online()
        await wire.send(request(host, "/drip"))
        assert (await wire.answer_head()).status == 200 and await wire.chunk() == b"one"
        for policy, refusal in (
            ({"addresses": {"otherwise": "deny"}}, (403, "edge.ip_denied")),
            ("basic_auth:\n  users:\n    - {name: a, password: b}\n", (401, "edge.auth_required")),
            (
                {"client_certificates": {"ca": client_ca_pem("Visitors")}, "plain_http": "refuse"},
                (421, "edge.tls_mode_mismatch"),
            ),
            ({"plain_http": "redirect"}, (308, "edge.https_redirect")),
            ({"rate_limits": {"tunnel": {"requests": 1, "seconds": 3600}}}, (429, "edge.rate_limited")),
        ):
            patch(account, "changes", policy)
            assert await becomes(up, host, refusal) < CHANGE_SECONDS
        assert int((await ask(up, host)).get("Retry-After")) > 0
        version = account.tunnels()["changes"]["policy_version"]
        assert patch(account, "changes", {"concurrency": 1}, policy_version=version)["policy_version"] == version + 1
        # Not timed: a relay that has just started lets what finds no room wait for some of `hold_seconds` first.
        await becomes(up, host, (429, "edge.concurrency_exceeded"))
        release.set()
        assert await wire.chunk() == b"two" and await wire.chunk() == b"" and await wire.trailers() == []
        assert await becomes(up, host, (200, "")) < CHANGE_SECONDS
        await wire.send(request(host))  # the connection outlived all of them, too
        assert (await wire.answer()).body == b"hello"
    assert [event["event"] for event in agent.events() if event["event"] in ("online", "offline")] == ["online"]


async def test_a_policy_with_a_fault_changes_nothing(
    up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack, tmp_path: Path
) -> None:
    file = tmp_path / "policy.yml"
    file.write_text("addresses:\n  otherwise: deny\n")
    agent = PolicyAgent(account, folder, "http", port_of(target), "faulty", "--policy-file", str(file))
    started.callback(agent.end)
    host = "faulty.localhost"
    async with app(target):
        await agent.is_online()
        assert (await ask(up, host)).error == "edge.ip_denied"
        before = told(account, "faulty")
        for wrong in ("addresses:\n  rules:\n    - allow: 127.0.0.1/8\n", "basic_auth: {users: [{name: nobody}]}"):
            with pytest.raises(AssertionError, match=r"400 .*tunnel\.policy_invalid.*\"line\":[13]"):
                patch(account, "faulty", wrong)
        with pytest.raises(AssertionError, match=r"409 .*tunnel\.policy_conflict"):
            patch(account, "faulty", {}, policy_version=before[1] + 1)
        assert told(account, "faulty") == before
        await asyncio.sleep(0.5)
        assert (await ask(up, host)).error == "edge.ip_denied"
        done = await asyncio.to_thread(up.command, account, "policy", "set", "faulty", "/dev/null")
        assert done.returncode == 0 and "faulty: no policy" in done.stdout, done.stderr
        assert await becomes(up, host, (200, "")) < CHANGE_SECONDS


async def test_tcp_and_a_file_that_is_followed(
    up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack, tmp_path: Path
) -> None:
    (tmp_path / "raw.yml").write_text("addresses: {rules: [{deny: 127.0.0.0/8}]}\n")
    file = tmp_path / "portico.yml"
    file.write_text(
        f"version: 1\ntunnels:\n  guarded: {{addr: {port_of(target)}, protocol: tcp, policy_file: raw.yml}}\n"
    )
    settings = {"server": account.api_url, "agent_key": account.agent_key, "config_dir": folder / "config"}
    agent = PolicyAgent.__new__(PolicyAgent)
    Child.__init__(agent, "guarded", ["start", "--all", "--json", "--config", str(file)], folder, settings)
    started.callback(agent.end)
    async with app(target):
        await agent.is_online()
        port = port_in(next(event["url"] for event in agent.events() if event["event"] == "online"))
        with pytest.raises((EOFError, OSError)):
            await get(port, "any")
        (tmp_path / "raw.yml").write_text("{}\n")
        async with asyncio.timeout(30):
            while True:
                try:
                    assert (await get(port, "any")).body == b"hello"
                    break
                except (EOFError, OSError):
                    await asyncio.sleep(0.05)
