"""A real relay on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from portico.relay.server import Relay
from portico.settings import RelaySettings, Secret
from tests.relay.doubles import KEY, Client, ScriptedAgent, port, session_token


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Relays run on uvloop, and can on plain asyncio; what deals with sockets itself, or with its end, is tested on both."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.SelectorEventLoop}
    both = (
        "test_tcp.py",
        "test_gone.py",
        "test_introduction.py",
        "test_tls_port.py",
        "test_passthrough.py",
        "test_chaos.py",
    )
    return {"uvloop": uvloop.new_event_loop, **loops} if item.path.name in both else loops


@pytest.fixture
def relay_settings(tmp_path: Path) -> dict[str, Any]:
    """Overridden by tests that need other limits."""
    return {}


@pytest.fixture
async def relay(tmp_path: Path, relay_settings: dict[str, Any]) -> AsyncIterator[Relay]:
    """A relay without a control plane: it knows the key and no tunnels, and its edge stream is down."""
    settings = RelaySettings(
        relay_key=Secret("tnl_rly_unused"),
        api_url="http://127.0.0.1:9",
        state_dir=tmp_path / "state",
        **{
            "public_port": 0,
            "https_port": 0,
            "control_port": 0,
            "exempt_loopback": True,
            "hold_seconds": 0.0,
            **relay_settings,
        },
    )
    relay = Relay(settings)
    relay.snapshot.apply(
        {"type": "snapshot", "version": 1, "state": {"keys": [KEY.public_jwk()], "tunnels": [], "ended": []}}
    )
    await relay.start()
    yield relay
    relay.public.settings = settings
    await relay.stop()


@pytest.fixture
async def agent(relay: Relay) -> AsyncIterator[ScriptedAgent]:
    """Connected, with the tunnel ``web.localhost`` bound as bind 1."""
    scripted = await (await ScriptedAgent().connect(port(relay, 0), session_token())).online()
    yield scripted
    scripted.close()


@pytest.fixture
async def visit(relay: Relay) -> AsyncIterator[Callable[..., Any]]:
    """Opens visitor connections; all are closed afterwards."""
    opened: list[Client] = []

    async def connect(data: bytes = b"") -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 1), limit=2**26)
        client = Client(reader, writer)
        opened.append(client)
        if data:
            client.send(data)
        return client

    yield connect
    for client in opened:
        client.writer.close()
