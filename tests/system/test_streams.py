"""What has a shape in time: events, upgrades, trailers, requests side by side, and the HTTPS port."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable

import pytest

from tests.system.memory import MemoryWatch, resident
from tests.system.platform import Agent, Up
from tests.system.targets import MIB, Request, app, port_of
from tests.system.visitor import Fields, connected, frame_head, get, mask, read_frame, request

pytestmark = [pytest.mark.system, pytest.mark.realtime]

MESSAGE_MIB = 64
GROWTH_MIB = 40
PARALLEL = 20
PARALLEL_SECONDS = 0.2
PARALLEL_EXTRA_SECONDS = 0.05
UPGRADE = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
BINARY, TEXT, FINAL = 2, 1, 0x80


async def test_each_event_arrives_before_the_next_is_sent(up: Up, host: str, target: socket.socket) -> None:
    """The app sends the head alone, then an event only after the visitor has the one before: nothing can be held back."""
    steps: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def events(request: Request) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n\r\n")
        while (event := await steps.get()) is not None:
            await request.send(event)
        request.close()

    async with app(target, events=events), asyncio.timeout(60), connected(up.http_port) as visitor:
        await visitor.send(request(host, "/events", fields=["Accept: text/event-stream"]))
        head = await visitor.answer_head()
        assert (head.status, head.get("Content-Type")) == (200, "text/event-stream")
        delays = []
        for number in range(30):
            event = f"id: {number}\ndata: {'x' * (number * 7)}\n\n".encode()
            began = time.monotonic()
            steps.put_nowait(event)
            got = b""
            while len(got) < len(event):
                got += await visitor.chunk()
            delays.append(time.monotonic() - began)
            assert got == event
        steps.put_nowait(None)
        assert await visitor.chunk() == b""
    assert min(delays) < 0.02, f"every event was held back: {delays} s"


def accept_key(fields: Fields) -> str:
    key = next(value for name, value in fields if name.lower() == "sec-websocket-key")
    magic = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    return b64encode(hashlib.sha1((key + magic).encode()).digest()).decode()


def switching(request: Request) -> bytes:
    """The 101 of a WebSocket server."""
    accept = accept_key(request.fields)
    return (
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
    ).encode()


async def test_a_64_mib_websocket_message_both_ways(up: Up, host: str, target: socket.socket, agent: Agent) -> None:
    received: list[tuple[int, bytes]] = []

    async def echo(request: Request) -> None:
        await request.send(switching(request))
        opcode, payload = await read_frame(request.reader)
        received.append((opcode, payload))
        await request.send(frame_head(BINARY, len(payload)), payload)
        await request.reader.read()

    payload = os.urandom(MESSAGE_MIB * MIB)
    masking = os.urandom(4)
    masked = mask(payload, masking)
    async with app(target, echo=echo), asyncio.timeout(60):
        await get(up.http_port, host)
        pids = {"relay": up.pid("relay-1"), "agent": agent.pid}
        with MemoryWatch(pids, {name: resident(pid) for name, pid in pids.items()}) as watch:
            async with connected(up.http_port) as visitor:
                key = b64encode(os.urandom(16)).decode()
                await visitor.send(request(host, "/echo", fields=[*UPGRADE, f"Sec-WebSocket-Key: {key}"]))
                head = await visitor.answer_head()
                assert head.status == 101
                assert head.get("Sec-WebSocket-Accept") == accept_key([("Sec-WebSocket-Key", key)])
                await visitor.send(frame_head(BINARY, len(payload), masking), masked)
                opcode, echoed = await read_frame(visitor.reader)
    assert received[0][0] == opcode == FINAL | BINARY
    assert received[0][1] == payload, "the app did not get what the visitor sent"
    assert echoed == payload, "the visitor did not get what the app sent"
    watch.assert_within(GROWTH_MIB)


async def test_the_server_speaks_first_in_the_same_segment_as_the_101(up: Up, host: str, target: socket.socket) -> None:
    async def greet(request: Request) -> None:
        await request.send(switching(request), frame_head(TEXT, 5), b"first")
        _, payload = await read_frame(request.reader)
        await request.send(frame_head(TEXT, len(payload)), payload.upper())
        await request.reader.read()

    async with app(target, greet=greet), asyncio.timeout(30):
        for _ in range(20):
            async with connected(up.http_port) as visitor:
                await visitor.send(
                    request(host, "/greet", fields=[*UPGRADE, "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="])
                )
                assert (await visitor.answer_head()).status == 101
                assert await read_frame(visitor.reader) == (FINAL | TEXT, b"first")
                await visitor.send(frame_head(TEXT, 6, b"\x01\x02\x03\x04"), mask(b"second", b"\x01\x02\x03\x04"))
                assert await read_frame(visitor.reader) == (FINAL | TEXT, b"SECOND")


async def test_chunked_upload_with_trailers(up: Up, host: str, target: socket.socket) -> None:
    chunks = [os.urandom(size) for size in (1, 100_000, 0x10, 65_536, 3)]

    async def upload(request: Request) -> None:
        assert request.values("Transfer-Encoding") == ["chunked"]
        parts = []
        while data := await request.chunk():
            parts.append(data)
        fields = await request.trailers()
        await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Digest\r\n\r\n")
        said = repr(sorted((name.lower(), value) for name, value in fields)).encode()
        await request.send(b"%x\r\n%b\r\n0\r\n" % (len(said), said))
        await request.send(f"X-Digest: {hashlib.sha256(b''.join(parts)).hexdigest()}\r\n\r\n".encode())

    async with app(target, upload=upload), asyncio.timeout(30), connected(up.http_port) as visitor:
        fields = ["Transfer-Encoding: chunked", "Trailer: X-Sum, X-Note", "TE: trailers"]
        await visitor.send(request(host, "/upload", "POST", fields))
        for chunk in chunks:
            await visitor.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await asyncio.sleep(0.01)
        await visitor.send(b"0\r\nX-Sum: 17\r\nX-Note: that is all\r\n\r\n")
        got = await visitor.answer()
    assert got.status == 200
    assert got.body.decode() == repr([("x-note", "that is all"), ("x-sum", "17")])
    assert got.trailers == [("X-Digest", hashlib.sha256(b"".join(chunks)).hexdigest())]


async def together(port: int, host: str) -> float:
    """Seconds for 20 slow requests side by side."""
    began = time.monotonic()
    answers = await asyncio.gather(*(get(port, host, "/slow") for _ in range(PARALLEL)))
    seconds = time.monotonic() - began
    assert [answer.status for answer in answers] == [200] * PARALLEL
    return seconds


async def best_of(count: int, measure: Callable[[], Awaitable[float]], good: float) -> float:
    best = float("inf")
    for _ in range(count):
        best = min(best, await measure())
        if best <= good:
            break
    return best


async def test_parallel_requests_take_the_time_of_one(up: Up, host: str, target: socket.socket) -> None:
    async def slow(request: Request) -> None:
        await asyncio.sleep(PARALLEL_SECONDS)
        await request.respond(b"done")

    async with app(target, slow=slow):
        began = time.monotonic()
        assert (await get(port_of(target), host, "/slow")).status == 200
        direct = time.monotonic() - began
        limit = direct + PARALLEL_EXTRA_SECONDS
        tunnelled = await best_of(5, lambda: together(up.http_port, host), limit)
    print(f"one direct request {direct * 1000:.0f} ms, {PARALLEL} through the tunnel {tunnelled * 1000:.0f} ms")
    assert tunnelled <= limit


async def test_the_https_port_serves_the_same_tunnel(up: Up, host: str, target: socket.socket) -> None:
    async def seen(request: Request) -> None:
        names = ("X-Forwarded-Proto", "X-Forwarded-Port", "Host")
        await request.respond(repr([request.values(name) for name in names]).encode())

    tls = ssl.create_default_context()
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE
    async with app(target, seen=seen), asyncio.timeout(30), connected(up.https_port, tls, host) as visitor:
        der = visitor.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        await visitor.send(request(f"{host}:{up.https_port}", "/seen"))
        got = await visitor.answer()
    expected = [["https"], [str(up.https_port)], [f"{host}:{up.https_port}"]]
    assert (got.status, got.body.decode()) == (200, repr(expected))
    names = certificate_names(der)
    assert names == [host]


def certificate_names(der: bytes) -> list[str]:
    """The DNS names in a certificate."""
    from cryptography import x509

    found = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return list(found.value.get_values_for_type(x509.DNSName))
