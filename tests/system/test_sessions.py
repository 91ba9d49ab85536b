"""Who holds a name, and how long: two agents, an agent that dies, a target that restarts, and the platform's word."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from portico.cli.output import TUNNEL_REFUSED
from portico.embedded.postgres import EmbeddedPostgres
from portico.kit.ids import new_id
from tests.conftest import sql
from tests.system.platform import Account, Agent, Child, Up
from tests.system.targets import Request, app, listener, port_of
from tests.system.visitor import Poller, connected, get, request
from tests.timing import PATIENCE_SECONDS, allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime]

#: How long two agents fight over a name, and how often at least.
CONTEST_SECONDS = float(os.environ.get("PORTICO_TEST_CONTEST_SECONDS", "12"))
CONTESTS = 3
#: A holder that is gone or silent is replaced within the relay's take-over probe (2 s) and the start of a process.
TAKEOVER_SECONDS = 5.0
REACH_SECONDS = 2.0
EXIT_SECONDS = 5.0


@pytest.fixture
def rival() -> Iterator[socket.socket]:
    """The listening socket of a second local app."""
    with listener() as sock:
        yield sock


async def first(request: Request) -> None:
    await request.respond(b"first")


async def second(request: Request) -> None:
    await request.respond(b"second")


async def contest(
    up: Up, account: Account, folder: Path, port: int, name: str, key: str | None, until: float, started: ExitStack
) -> list[tuple[int, str]]:
    """Start a second agent for ``name`` again and again; how each of them ended and what it said."""
    ends: list[tuple[int, str]] = []
    while time.monotonic() < until or len(ends) < CONTESTS:
        child = Agent(account, folder, port, name, key)
        started.callback(child.end)
        ends.append((await child.exit(PATIENCE_SECONDS), child.said))
        await asyncio.sleep(1.0)
    return ends


async def test_two_agents_on_one_name_do_not_flap(
    up: Up, account: Account, folder: Path, target: socket.socket, rival: socket.socket, started: ExitStack
) -> None:
    """With two keys, and with one and the same: the first keeps serving every request, the second is told and leaves."""
    holders = [Agent(account, folder, port_of(target), name) for name in ("twokeys", "onekey")]
    for holder in holders:
        started.callback(holder.end)
    _, other_key = account.new_key()
    async with app(target, who=first), app(rival, who=second):
        for holder in holders:
            await holder.is_online()
        until = time.monotonic() + CONTEST_SECONDS
        async with (
            Poller(up.http_port, "twokeys.localhost", "/who") as two_keys,
            Poller(up.http_port, "onekey.localhost", "/who") as one_key,
        ):
            ends = await asyncio.gather(
                contest(up, account, folder, port_of(rival), "twokeys", other_key, until, started),
                contest(up, account, folder, port_of(rival), "onekey", None, until, started),
            )
        for poller in (two_keys, one_key):
            answers = Counter((visit.status, visit.what) for visit in poller.visits)
            assert set(answers) == {(200, "first")}, answers
            assert len(poller.visits) > 3 * CONTEST_SECONDS
    for side in ends:
        assert len(side) >= CONTESTS
        for code, said in side:
            assert code == TUNNEL_REFUSED, said
            assert "tunnel.in_use" in said, said
    for holder in holders:
        assert holder.process.poll() is None
        assert [event["event"] for event in holder.events() if event["event"] != "request"] == ["online"]


async def test_a_killed_agent_is_replaced_at_once(
    up: Up, account: Account, folder: Path, target: socket.socket, rival: socket.socket, started: ExitStack
) -> None:
    old = Agent(account, folder, port_of(target), "killed")
    started.callback(old.end)
    async with app(target, who=first), app(rival, who=second):
        await old.is_online()
        assert (await get(up.http_port, "killed.localhost", "/who")).body == b"first"
        old.kill(signal.SIGKILL)
        began = time.monotonic()
        new = Agent(account, folder, port_of(rival), "killed")
        started.callback(new.end)
        async with Poller(up.http_port, "killed.localhost", "/who") as poller:
            took = await poller.until(good=True, since=began, limit=TAKEOVER_SECONDS)
    print(f"after kill -9 the next agent serves after {took:.1f} s")
    assert {visit.what for visit in poller.visits if visit.good} == {"second"}
    assert {visit.what for visit in poller.bad()} <= {"edge.tunnel_offline"}


async def test_an_agent_that_stands_still_is_replaced_and_does_not_take_the_name_back(
    up: Up, account: Account, folder: Path, target: socket.socket, rival: socket.socket, started: ExitStack
) -> None:
    """A half-open connection: nothing says that the holder is gone but its silence."""
    old = Agent(account, folder, port_of(target), "frozen")
    started.callback(old.end)
    async with app(target, who=first), app(rival, who=second):
        await old.is_online()
        old.kill(signal.SIGSTOP)
        began = time.monotonic()
        new = Agent(account, folder, port_of(rival), "frozen")
        started.callback(new.end)
        await new.is_online(TAKEOVER_SECONDS)
        print(f"a silent holder was replaced after {time.monotonic() - began:.1f} s")
        old.kill(signal.SIGCONT)
        async with Poller(up.http_port, "frozen.localhost", "/who") as poller:
            await asyncio.sleep(5)
    answers = Counter((visit.status, visit.what) for visit in poller.visits)
    assert set(answers) == {(200, "second")}, answers
    assert "tunnel.in_use" in old.said


SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class App(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
    def log_message(self, *_): pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), App).serve_forever()
"""


async def test_a_target_restarted_under_load_gives_only_502s_that_say_so(
    up: Up, account: Account, folder: Path, started: ExitStack
) -> None:
    with listener() as sock:
        port = port_of(sock)

    def start() -> Child:
        child = Child("target", [], folder, {}, [sys.executable, "-c", SERVER, str(port)])
        started.callback(child.end)
        return child

    server = start()
    agent = Agent(account, folder, port, "restarted")
    started.callback(agent.end)
    await agent.is_online()
    async with Poller(up.http_port, "restarted.localhost", rate=50) as poller:
        await poller.until(good=True, since=time.monotonic(), limit=10)
        clean_from = time.monotonic()
        for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            await asyncio.sleep(1)
            server.kill(signum)
            await server.exit(5)
            await asyncio.sleep(0.5)
            server = start()
            await poller.until(good=True, since=time.monotonic(), limit=10)
        await asyncio.sleep(1)
    seen = Counter((visit.status, visit.what) for visit in poller.since(clean_from))
    print(dict(seen))
    assert set(seen) <= {(200, "ok"), (502, "edge.target_refused"), (502, "edge.target_invalid")}, seen
    assert seen[502, "edge.target_refused"] > 0
    assert seen[200, "ok"] > 100


async def developer(up: Up, account: Account, key_id: str) -> str:
    """Another member of the organization, a developer, who made the key; returns the user id."""
    user = new_id("usr")
    await sql(
        EmbeddedPostgres(up.home).uri,
        f"INSERT INTO users (id, email) VALUES ('{user}', '{user}@example.test')",
        f"INSERT INTO members (organization_id, user_id, role) SELECT organization_id, '{user}', 'developer'"
        f" FROM api_keys WHERE id = '{key_id}'",
        f"UPDATE api_keys SET user_id = '{user}' WHERE id = '{key_id}'",
    )
    return user


@pytest.mark.parametrize(
    ("what", "code", "offline"),
    [
        ("stop", "tunnel.stopped", "edge.tunnel_offline"),
        ("rm", "tunnel.deleted", "edge.host_unassigned"),
        ("revoke", "session.revoked", "edge.tunnel_offline"),
        ("fence", "session.revoked", "edge.tunnel_offline"),
        ("demote", "session.revoked", "edge.tunnel_offline"),
        ("remove", "session.revoked", "edge.tunnel_offline"),
    ],
)
async def test_the_platforms_word_ends_a_live_session(
    what: str,
    code: str,
    offline: str,
    up: Up,
    account: Account,
    folder: Path,
    target: socket.socket,
    started: ExitStack,
) -> None:
    name = f"ended-{what}"
    key_id, key = account.new_key()
    member = await developer(up, account, key_id) if what in ("demote", "remove") else ""
    agent = Agent(account, folder, port_of(target), name, key)
    started.callback(agent.end)

    async def events(request: Request) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: here\n\n")
        await request.reader.read()

    async with app(target, events=events):
        await agent.is_online()
        async with Poller(up.http_port, f"{name}.localhost", rate=50) as poller, connected(up.http_port) as stream:
            await poller.until(good=True, since=time.monotonic(), limit=5)
            await stream.send(request(f"{name}.localhost", "/events"))
            assert (await stream.answer_head()).status == 200
            assert await stream.chunk() == b"data: here\n\n"
            if what == "revoke":
                await asyncio.to_thread(account.revoke, key_id)
            elif what == "fence":  # first as it is, then to where the agent is not
                for networks in (["127.0.0.0/8", "::1"], ["198.51.100.0/24"]):
                    assert poller.visits[-1].good
                    body = {"allowed_cidrs": networks}
                    await asyncio.to_thread(account.call, "PATCH", f"/api-keys/{key_id}", body)
            elif what == "demote":
                await asyncio.to_thread(account.call, "PATCH", f"/org/members/{member}", {"role": "viewer"})
            elif what == "remove":
                await asyncio.to_thread(account.call, "DELETE", f"/org/members/{member}")
            else:
                done = await asyncio.to_thread(up.command, account, what, name)
                assert done.returncode == 0, done.stderr
            began = time.monotonic()
            took = await poller.until(good=False, since=began, limit=REACH_SECONDS)
            last_good = max(visit.began for visit in poller.visits if visit.good)
            if code == "session.revoked":  # it is over, with all that is in flight
                with pytest.raises((EOFError, OSError)):
                    await asyncio.wait_for(stream.chunk(), PATIENCE_SECONDS)
            stream.close()
            exit_code = await agent.exit(EXIT_SECONDS)
            # The agent may be gone within one beat of the poller; what visitors are told from now on is the question.
            await poller.until(good=False, since=time.monotonic(), limit=REACH_SECONDS)
        print(f"{what} took effect after {took * 1000:.0f} ms")
        assert last_good - began < allowed(REACH_SECONDS, began)
        refused = poller.since(last_good + 0.001)
        # A request that was in flight when the session ended was not answered by its agent any more.
        assert {visit.what for visit in refused if visit.began > began + took} == {offline}
        assert {visit.what for visit in refused} <= {offline, "edge.agent_unreachable"}
    assert exit_code == TUNNEL_REFUSED, agent.said
    assert code in agent.said, agent.said
