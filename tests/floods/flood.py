"""Floods against a relay, each with a bounded rate: ``python -m tests.floods.flood KIND HTTP_PORT HTTPS_PORT HOST SECONDS``.

A process of its own, which gives way to everybody else (nice 19): what is measured is the relay, not the scheduler. It prints one
line when the flood stands, and a count of what it did at its end.
"""

from __future__ import annotations

import asyncio
import base64
import math
import os
import resource
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import cast

import uvloop

#: Connections that are opened at once, and a pause after each lot: a flood, not a test of the backlog.
LOT, PAUSE = 50, 0.02
#: What an endless target writes at a time.
MUCH = bytes(65_536)


@dataclass
class Flood:
    """The flood of one run; ``done`` counts what each kind counts."""

    http_port: int
    https_port: int
    host: bytes
    seconds: float
    until: float = math.inf  # the flood lasts from when it stands
    done: int = 0
    stood: bool = False
    open: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    def stands(self) -> None:
        if not self.stood:
            self.stood = True
            self.until = time.monotonic() + self.seconds
            print("stands", flush=True)

    async def connect(self, receive: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket()
        sock.setblocking(False)
        if receive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.http_port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=max(receive, 4096))
        self.open.append(writer)
        return reader, writer

    async def lots(self, count: int, first: bytes = b"", receive: int = 0) -> list[asyncio.StreamWriter]:
        """``count`` connections that have sent ``first``."""
        made = []
        while len(made) < count and not self.over:
            for _, writer in await asyncio.gather(*(self.connect(receive) for _ in range(min(LOT, count - len(made))))):
                writer.write(first)
                made.append(writer)
            await asyncio.sleep(PAUSE)
        self.stands()
        return made

    async def drip(self, writers: list[asyncio.StreamWriter], data: bytes, every: float) -> None:
        """A little on each, again and again; those that were closed are opened no more."""
        while not self.over:
            began = time.monotonic()
            for writer in writers:
                if not writer.transport.is_closing():
                    writer.write(data)
                    self.done += 1
            await asyncio.sleep(max(0.05, every - (time.monotonic() - began)))

    async def at_rate(self, rate: float, one: Callable[[], Awaitable[None]], at_once: int = 32) -> None:
        """``one`` so many times a second."""
        self.stands()
        room = asyncio.Semaphore(at_once)

        async def run() -> None:
            async with room:
                try:
                    async with asyncio.timeout(5):
                        await one()
                    self.done += 1
                except (OSError, EOFError, TimeoutError, ssl.SSLError):
                    pass

        due, tasks = time.monotonic(), set()
        while not self.over:
            tasks.add(task := asyncio.create_task(run()))
            task.add_done_callback(tasks.discard)
            due = max(due + 1 / rate, time.monotonic() - 0.1)
            await asyncio.sleep(max(0.0, due - time.monotonic()))


async def slow_heads(flood: Flood) -> None:
    writers = await flood.lots(1000, b"GET / HTTP/1.1\r\nHost: %b\r\nX-A: " % flood.host)
    await flood.drip(writers, b"a", 0.25)


async def slow_bodies(flood: Flood) -> None:
    writers = await flood.lots(300, b"POST / HTTP/1.1\r\nHost: %b\r\nContent-Length: 100000\r\n\r\n" % flood.host)
    await flood.drip(writers, b"a", 0.25)


async def header_bombs(flood: Flood) -> None:
    start = b"GET / HTTP/1.1\r\nHost: %b\r\n" % flood.host
    bombs = [
        start + b"X-A: " + b"a" * 60_000,
        start + b"".join(b"X-%d: 1\r\n" % n for n in range(4000)),
        start + b"A: b\r\n" * 9000,
        start + b"Cookie: " + b"a=b; " * 9000 + b"\r\n\r\n",
    ]

    async def one() -> None:
        reader, writer = await flood.connect()
        writer.write(bombs[flood.done % len(bombs)])
        await reader.read(4096)
        writer.close()

    await flood.at_rate(60, one, at_once=200)


async def handshakes(flood: Flood) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    stuck = []
    for number in range(300):  # these stop in the middle of theirs
        sock = socket.create_connection(("127.0.0.1", flood.https_port))
        sock.sendall(b"\x16\x03\x01\x02\x00\x01" if number % 2 else b"")
        stuck.append(sock)

    async def one() -> None:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", flood.https_port, ssl=context, server_hostname=flood.host.decode().split(":")[0]
        )
        writer.transport.abort()

    await flood.at_rate(100, one)


async def storm(flood: Flood, one: Callable[[], Awaitable[None]]) -> None:
    """``one`` as fast as it goes, a hundred at once, from three processes."""
    flood.stands()
    for _ in range(2):
        if os.fork() == 0:
            # A loop cannot be shared with a parent: each child begins anew, by the arguments of the same command.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.execv(
                sys.executable, [sys.executable, "-m", "tests.floods.flood", f"{sys.argv[1]}_alone", *sys.argv[2:]]
            )
    await alone(flood, one)


async def alone(flood: Flood, one: Callable[[], Awaitable[None]]) -> None:
    async def again() -> None:
        while not flood.over:
            try:
                async with asyncio.timeout(5):
                    await one()
                flood.done += 1
            except (OSError, EOFError, TimeoutError, ssl.SSLError):
                await asyncio.sleep(0.001)

    flood.stands()
    await asyncio.gather(*(again() for _ in range(100)))


def shaking(flood: Flood) -> Callable[[], Awaitable[None]]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    name = flood.host.decode().split(":")[0]

    async def one() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", flood.https_port, ssl=context, server_hostname=name)
        writer.transport.abort()

    return one


def stammering(flood: Flood) -> Callable[[], Awaitable[None]]:
    async def one() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", flood.https_port)
        writer.write(b"\x16\x03\x01\x02")
        writer.transport.abort()

    return one


async def handshake_storm(flood: Flood) -> None:
    await storm(flood, shaking(flood))


async def handshake_storm_alone(flood: Flood) -> None:
    await alone(flood, shaking(flood))


async def half_hello_storm(flood: Flood) -> None:
    await storm(flood, stammering(flood))


async def half_hello_storm_alone(flood: Flood) -> None:
    await alone(flood, stammering(flood))


async def idle_connections(flood: Flood) -> None:
    # What the hard limit allows: the relay holds as many.
    await flood.lots(min(5000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200))
    flood.done = len(flood.open)
    while not flood.over:
        await asyncio.sleep(0.1)


async def pipelining(flood: Flood) -> None:
    many = b"GET /large HTTP/1.1\r\nHost: %b\r\n\r\n" % flood.host * 1000
    writers = await flood.lots(60, many, receive=4096)
    await flood.drip(writers, b"", 0.25)


async def small_windows(flood: Flood) -> None:
    await flood.lots(200, b"GET /endless HTTP/1.1\r\nHost: %b\r\n\r\n" % flood.host, receive=2048)
    while not flood.over:
        await asyncio.sleep(0.1)
        flood.done += 1


class Endless(asyncio.Protocol):
    """A target whose answer never ends, as fast as it is taken."""

    paused = asked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self.asked:
            self.asked = True
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
            self.more()

    def more(self) -> None:
        if not self.paused and not self.transport.is_closing():
            self.transport.write(MUCH)
            asyncio.get_running_loop().call_soon(self.more)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.more()


class Taker(asyncio.BufferedProtocol):
    """A visitor who takes all that comes, at once."""

    buffer = memoryview(bytearray(262_144))

    def __init__(self, flood: Flood) -> None:
        self.flood = flood

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % self.flood.host)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.flood.done += nbytes


async def downloads(flood: Flood, target: int) -> None:
    """200 at once, of a target of their own at the port ``target``; counts bytes from when they stand."""
    loop = asyncio.get_running_loop()
    await loop.create_server(Endless, "127.0.0.1", target, backlog=1024)
    for _ in range(200):
        await loop.create_connection(lambda: Taker(flood), "127.0.0.1", flood.http_port)
    while flood.done < 200 * len(MUCH):
        await asyncio.sleep(0.05)
    flood.stands()
    flood.done = 0
    while not flood.over:
        await asyncio.sleep(0.05)


async def passwords(flood: Flood) -> None:
    async def one() -> None:
        guess = base64.b64encode(b"alice:%d" % flood.done)
        reader, writer = await flood.connect()
        fields = b"Host: locked%b\r\nAuthorization: Basic %b" % (flood.host[flood.host.index(b".") :], guess)
        writer.write(b"GET / HTTP/1.1\r\n%b\r\nConnection: close\r\n\r\n" % fields)
        answer = await reader.read(64)
        assert answer[9:12] in (b"401", b"429"), answer
        writer.close()

    await flood.at_rate(100, one)


KINDS: dict[str, Callable[[Flood], Awaitable[None]]] = {
    kind.__name__: kind
    for kind in (
        *(slow_heads, slow_bodies, header_bombs, handshakes, idle_connections, pipelining, small_windows, passwords),
        *(handshake_storm, half_hello_storm),
    )
}
#: What the other processes of a storm are.
PARTS: dict[str, Callable[[Flood], Awaitable[None]]] = {
    one.__name__: one for one in (handshake_storm_alone, half_hello_storm_alone)
}


def main() -> None:
    kind, http_port, https_port, host, seconds, *target = sys.argv[1:]
    os.nice(19)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 8192), hard))
    flood = Flood(int(http_port), int(https_port), host.encode(), float(seconds))
    if kind == "downloads":
        uvloop.run(downloads(flood, int(target[0])))
    else:
        uvloop.run((KINDS | PARTS)[kind](flood))  # type: ignore[arg-type]
    print(flood.done, flush=True)
    os._exit(0)  # thousands of connections need no orderly end


if __name__ == "__main__":
    main()
