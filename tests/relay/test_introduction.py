"""PROXY headers: required from configured proxies on every public port, in any pieces."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest

from portico.kit.proxy_protocol import SIGNATURE
from portico.relay.server import Relay
from tests.ports import free_port
from tests.relay.clienthello import hello, server_name
from tests.relay.doubles import Client, ScriptedAgent, grant, port, session_token
from tests.relay.known import forget
from tests.relay.test_proxies import any_certificate, client, ended, said
from tests.relay.test_tcp import TcpAgent, tcp_grant

GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"
V1 = b"PROXY TCP4 203.0.113.7 198.51.100.9 40000 80\r\n"
V2 = (
    SIGNATURE + b"\x21\x11\0\x12" + bytes([203, 0, 113, 8, 198, 51, 100, 9]) + struct.pack("!HH", 1, 443) + b"\4\0\3abc"
)
LOCAL = SIGNATURE + b"\x20\0\0\0"
UNIX = SIGNATURE + b"\x21\x31" + struct.pack("!H", 216) + b"/a".ljust(108, b"\0") + b"/b".ljust(108, b"\0")

INTRODUCED = {"proxy_protocol_from": ("127.0.0.0/8",), "head_timeout_seconds": 0.3}

pytestmark = pytest.mark.parametrize("relay_settings", [INTRODUCED])


@pytest.mark.parametrize(
    ("header", "address", "from_port"),
    [(V1, b"203.0.113.7", b"80"), (V2, b"203.0.113.8", b"443"), (LOCAL, b"127.0.0.1", None), (UNIX, b"unknown", None)],
)
async def test_http(
    relay: Relay, agent: ScriptedAgent, visit: Any, header: bytes, address: bytes, from_port: bytes | None
) -> None:
    visitor = await visit(header + GET + GET)
    assert [(await visitor.response())[0] for _ in range(2)] == [200, 200]
    assert client(agent) == client(agent, 0) == address
    assert said(agent)[b"x-forwarded-port"] == from_port or from_port is None
    visitor.send(header)  # once is enough
    assert (await visitor.response())[0] == 400


async def test_byte_by_byte(agent: ScriptedAgent, visit: Any) -> None:
    visitor = await visit()
    for byte in V2 + GET:
        visitor.send(bytes([byte]))
        await visitor.writer.drain()
        await asyncio.sleep(0)
    assert (await visitor.response())[0] == 200
    assert client(agent) == b"203.0.113.8"


async def test_known_requests_are_each_clients_own(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    """The short way: another connection's client must not be in it."""
    forget()
    for last in (1, 2, 3, 1):
        visitor = await visit(V1.replace(b"203.0.113.7", b"203.0.113.%d" % last))
        for _ in range(4):
            visitor.send(GET)
            assert (await visitor.response())[0] == 200
            assert client(agent) == b"203.0.113.%d" % last


@pytest.mark.parametrize("data", [GET, b"PROXY TCP5 ", V1[:-2] + b"\n", SIGNATURE + b"\x31", b"\x16\x03\x01"])
async def test_whoever_must_and_does_not_is_closed(relay: Relay, agent: ScriptedAgent, visit: Any, data: bytes) -> None:
    assert await ended(await visit(data + GET)) == b""
    assert relay.public.refusals["edge.proxy_header_invalid"] == 1
    assert not agent.streams and not relay.public.connections


@pytest.mark.parametrize("data", [b"", V1[:20], SIGNATURE])
async def test_in_time(relay: Relay, visit: Any, data: bytes) -> None:
    visitor = await visit(data)
    async with asyncio.timeout(30):
        assert await ended(visitor) == b""
    assert relay.public.refusals["edge.proxy_header_invalid"] == 1
    assert not relay.public.connections


async def test_the_end_instead(relay: Relay, visit: Any) -> None:
    visitor = await visit(V1[:20])
    visitor.writer.write_eof()
    assert await ended(visitor) == b""
    assert not relay.public.connections


async def test_each_client_has_its_own_count(relay: Relay, agent: ScriptedAgent, visit: Any) -> None:
    limits = relay.public.settings
    object.__setattr__(limits, "connections_per_address", 2)
    held = [await visit(V1 + GET) for _ in range(2)]
    for each in held:
        assert (await each.response())[0] == 200
    status, fields, _ = await (await visit(V1 + GET)).response()
    assert (status, fields[b"portico-error"]) == (429, [b"edge.too_many_connections"])
    for _ in range(4):
        assert (await (await visit(V2 + GET)).response())[0] in (200, 429)
    assert relay.public._by_address["203.0.113.7"] <= 3 and relay.public._by_address["203.0.113.8"] == 2
    idle = [await visit() for _ in range(5)]  # not known yet: the proxy may have any number
    await agent.until(lambda: relay.public._by_address["127.0.0.1"] == len(idle))


async def test_tcp(relay: Relay) -> None:
    number = free_port()
    agent = TcpAgent()
    await agent.connect(port(relay, 0), session_token())
    await agent.online(tcp_grant(number))
    for header, peer, local in (
        (V1, "203.0.113.7:40000", "198.51.100.9:80"),
        (V2, "203.0.113.8:1", "198.51.100.9:443"),
        (UNIX, "", ""),
    ):
        agent.tcp.clear()
        reader, writer = await asyncio.open_connection("127.0.0.1", number)
        writer.write(header + b"SSH-2.0")
        stream = await agent.stream()
        await agent.until(lambda stream=stream: stream.body == b"SSH-2.0")
        assert (stream.info["peer"], stream.info["local"]) == (peer, local)
        stream.stream.send_data(b"hi", end=True)
        assert await reader.read(2) == b"hi"
        writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", number)
    writer.write(b"SSH-2.0 without one")
    assert await ended(Client(reader, writer)) == b"" and len(agent.tcp) == 1
    writer.close()
    agent.close()


async def test_tls(relay: Relay, agent: ScriptedAgent) -> None:
    """The header goes before the ClientHello, in any pieces, and is no part of it."""
    for header, pieces, address in ((V1, 1, b"203.0.113.7"), (V2, 40, b"203.0.113.8"), (LOCAL, 3, b"127.0.0.1")):
        reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 2))
        size = -(-len(header) // pieces)
        for at in range(0, len(header), size):
            writer.write(header[at : at + size])
            await asyncio.sleep(0.001)
        await writer.start_tls(any_certificate(), server_hostname="web.localhost")
        visitor = Client(reader, writer)
        visitor.send(GET)
        assert (await visitor.response())[0] == 200
        assert client(agent) == address
        writer.close()
    assert said(agent, 1)[b"x-forwarded-port"] == b"443"


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00", V1[:20], b"", SIGNATURE + b"\x21\x11\xff\xff"])
async def test_tls_without_one(relay: Relay, data: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port(relay, 2))
    writer.write(data)
    try:
        async with asyncio.timeout(30):
            assert await reader.read(-1) == b""
    except ConnectionError:
        pass
    assert relay.public.refusals["edge.proxy_header_invalid"] == 1 and not relay.public.connections
    writer.close()


@pytest.mark.parametrize(("header", "peer", "local"), [(V1, "203.0.113.7:40000", "198.51.100.9:80"), (UNIX, "", "")])
async def test_tls_that_passes_through(relay: Relay, header: bytes, peer: str, local: str) -> None:
    agent = TcpAgent()
    await agent.connect(port(relay, 0), session_token())
    await agent.online(grant("vault", protocol="tls"))
    said_hello = hello(server_name(b"vault.localhost"))
    _, writer = await asyncio.open_connection("127.0.0.1", port(relay, 2))
    writer.write(header + said_hello)
    stream = await agent.stream()
    await agent.until(lambda: bytes(stream.body) == said_hello)
    assert (stream.info["peer"], stream.info["local"]) == (peer, local)
    writer.close()
    agent.close()
