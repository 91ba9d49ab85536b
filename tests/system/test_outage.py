"""The control plane is gone for longer than a grant lives: what is online stays, and what was decided meanwhile holds."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from portico.agent.client import STEADY_SECONDS
from portico.cli.output import TUNNEL_REFUSED
from portico.embedded.folders import temp_home
from portico.settings import RelaySettings
from tests.system.parts import LEEWAY, LIFE, OUTAGE_SECONDS, REFRESH_GRACE, SHORT_LIVES, Parts
from tests.system.platform import Account, Agent, Up, signal_all, tree
from tests.system.targets import app, port_of
from tests.system.visitor import Poller
from tests.timing import PATIENCE_SECONDS, allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime]

#: An agent that was cut off is back within its back-off, a relay within its start as well.
BACK_SECONDS = 5.0
REACH_SECONDS = 2.0
HOLD_SECONDS = RelaySettings.__dataclass_fields__["hold_seconds"].default


@pytest.fixture
def parts(folder: Path) -> Iterator[Parts]:
    """Separate processes, of this test alone: it kills them."""
    home = temp_home("portico-parts-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        yield Parts(home, folder, stack)


def online(parts: Parts, name: str, port: int, started: ExitStack, key: str | None = None) -> Agent:
    agent = Agent(parts.account, parts.folder, port, name, key, **SHORT_LIVES)
    started.callback(agent.end)
    return agent


async def until_stream_is_up(parts: Parts, seen: int) -> float:
    """Wait until the relay says that its edge stream is up once more than ``seen`` times; when that was."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while parts.streams_up() <= seen:
        assert time.monotonic() < deadline, "the relay did not reach the control plane again"
        await asyncio.sleep(0.01)
    return time.monotonic()


async def test_tunnels_outlive_their_grants_while_the_control_plane_is_dead(
    parts: Parts, target: socket.socket, started: ExitStack
) -> None:
    assert LIFE - 2 < parts.grant_life() <= LIFE
    agent = online(parts, "steady", port_of(target), started)
    async with app(target), Poller(parts.http_port, "steady.localhost") as poller:
        await agent.is_online()
        began = time.monotonic()
        await asyncio.sleep(LIFE + 2)  # with the control plane, through a refresh
        parts.kill_control_plane()
        await asyncio.sleep(OUTAGE_SECONDS)
        assert not poller.bad(since=began)
        assert len(poller.since(began)) > 5 * OUTAGE_SECONDS

        parts.to_relay.shut()
        cut = time.monotonic()
        # Requests wait for the agent for a while, then they are told.
        await poller.until(good=False, since=cut, limit=HOLD_SECONDS + 2)
        parts.to_relay.open()
        opened = time.monotonic()
        took = await poller.until(good=True, since=opened, limit=BACK_SECONDS)
        print(f"an agent that was cut off is back after {took:.1f} s")
        began = time.monotonic()
        await asyncio.sleep(STEADY_SECONDS + 1)  # its back-off begins anew
        assert not poller.bad(since=began)

        parts.relay.kill(signal.SIGKILL)
        await parts.relay.exit(5)
        killed = time.monotonic()
        parts.relay = parts.start_relay()
        took = await poller.until(good=True, since=killed, limit=BACK_SECONDS)
        print(f"after kill -9 of the relay the URL is back after {took:.1f} s")
        began = time.monotonic()
        await asyncio.sleep(2)
        assert not poller.bad(since=began)
        assert parts.streams_up() == 0, "the control plane was not away"

        parts.restart_control_plane()
        await until_stream_is_up(parts, 0)
        began = time.monotonic()
        await asyncio.sleep(REFRESH_GRACE + LEEWAY + 3)  # longer than an expired grant is suffered
        assert not poller.bad(since=began)
    assert agent.process.poll() is None
    assert parts.account.tunnels()["steady"]["state"] == "online"


async def test_a_revocation_made_during_an_outage_applies_when_the_stream_is_back(
    parts: Parts, target: socket.socket, started: ExitStack
) -> None:
    key_id, key = parts.account.new_key()
    revoked = online(parts, "revoked", port_of(target), started, key)
    other = online(parts, "other", port_of(target), started)
    async with (
        app(target),
        Poller(parts.http_port, "revoked.localhost") as poller,
        Poller(parts.http_port, "other.localhost") as bystander,
    ):
        await revoked.is_online()
        await other.is_online()
        began = time.monotonic()
        parts.kill_control_plane()
        await asyncio.sleep(LIFE + 3)
        for gate in (parts.relay_to_api, parts.to_api):
            gate.shut()
        parts.restart_control_plane()
        await asyncio.to_thread(parts.account.revoke, key_id)
        await asyncio.sleep(1)
        assert not poller.bad(since=began)  # nobody can have told the relay yet
        seen = parts.streams_up()
        parts.relay_to_api.open()
        back = await until_stream_is_up(parts, seen)
        took = await poller.until(good=False, since=back, limit=REACH_SECONDS)
        print(f"the revocation applied {took * 1000:.0f} ms after the stream was back")
        assert await revoked.exit(BACK_SECONDS) == TUNNEL_REFUSED
        await asyncio.sleep(1)
        assert {visit.what for visit in poller.bad(since=back + took)} == {"edge.tunnel_offline"}
        assert not [visit for visit in poller.since(back + allowed(REACH_SECONDS, back)) if visit.good]
        assert not bystander.bad(since=began)
    assert "session.revoked" in revoked.said
    assert other.process.poll() is None


async def test_a_control_plane_that_hangs_takes_nothing_down(
    folder: Path, target: socket.socket, started: ExitStack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`portico up` with API, PostgreSQL and Valkey stopped: every connection stays open and nothing answers. The relay is
    killed meanwhile, and its supervisor starts it again from what it has on disk."""
    home = temp_home("portico-hang-")
    started.callback(shutil.rmtree, home, ignore_errors=True)
    up = Up(home, tmp_path_factory.mktemp("up-hang"), started, **SHORT_LIVES)
    account = Account(up.api_url)
    started.callback(account.close)
    agent = Agent(account, folder, port_of(target), "hanging", **SHORT_LIVES)
    started.callback(agent.end)
    async with app(target), Poller(up.http_port, "hanging.localhost") as poller:
        await agent.is_online()
        began = time.monotonic()
        stopped = [pid for name in ("api", "postgres", "valkey") for pid in tree(up.pid(name))]
        started.callback(signal_all, stopped, signal.SIGCONT)
        signal_all(stopped, signal.SIGSTOP)
        await asyncio.sleep(OUTAGE_SECONDS + SHORT_LIVES["edge_silence_seconds"])
        assert not poller.bad(since=began)

        signal_all([up.pid("relay-1")], signal.SIGKILL)
        killed = time.monotonic()
        took = await poller.until(good=True, since=killed + 0.1, limit=BACK_SECONDS)
        print(f"after kill -9 of the relay the URL is back after {took + 0.1:.1f} s")
        assert {visit.what for visit in poller.bad(since=killed + 0.1)} == set()
        began = time.monotonic()
        await asyncio.sleep(2)
        assert not poller.bad(since=began)

        signal_all(stopped, signal.SIGCONT)
        began = time.monotonic()
        await asyncio.sleep(REFRESH_GRACE + LEEWAY + SHORT_LIVES["edge_silence_seconds"] + 2)
        assert not poller.bad(since=began)
    assert agent.process.poll() is None
    assert account.tunnels()["hanging"]["state"] == "online"
