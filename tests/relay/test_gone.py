"""A connection that is over is freed at once, not when the cyclic collector comes."""

from __future__ import annotations

import asyncio
import gc
import ssl
import weakref
from collections.abc import Iterator

import pytest

from portico.relay.http1 import Visitor
from portico.relay.server import Relay
from tests.relay.doubles import ScriptedAgent, port


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("closes", ["visitor", "relay"])
@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
async def test_without_the_collector(
    relay: Relay, agent: ScriptedAgent, no_collector: None, secure: bool, closes: str
) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port(relay, 2 if secure else 1), ssl=context if secure else None
    )
    async with asyncio.timeout(30):
        while not (found := [weakref.ref(one) for one in relay.public.connections if isinstance(one, Visitor)]):
            await asyncio.sleep(0.01)
    (visitor,) = found
    close = b"Connection: close\r\n" if closes == "relay" else b""
    writer.write(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n" + close + b"\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert await reader.readexactly(5) == b"hello"
    agent.streams.clear()
    if closes == "relay":
        assert await reader.read() == b""
    writer.close()
    async with asyncio.timeout(30):
        while visitor() is not None:
            await asyncio.sleep(0.01)
