"""TCP tunnels through the whole platform, two relays behind one address: what passes, what ends, and what stays."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from portico.cli.output import TUNNEL_REFUSED
from portico.embedded.folders import temp_home
from portico.embedded.ports import holder
from tests.system.memory import MIB, MemoryWatch, resident
from tests.system.platform import Account, Agent, Child, Up, port_in, port_span
from tests.system.targets import content_crc, listener, piece, port_of
from tests.timing import allowed

pytestmark = [pytest.mark.system, pytest.mark.realtime]

BULK_MIB = 64
GROWTH_MIB = 40
PARALLEL = 200
REACH_SECONDS = 2.0
DISORDER_SECONDS = 4.0

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = temp_home("portico-tcp-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        yield Up(home, tmp_path_factory.mktemp("up"), stack, relays=2, tcp_ports=port_span(20))


class TcpAgent(Agent):
    """``portico tcp TARGET --name NAME --json``."""

    def __init__(self, where: Account, folder: Path, target: str | int, name: str, *more: str) -> None:
        own = {"server": where.api_url, "agent_key": where.agent_key, "config_dir": folder / "config"}
        args = ["tcp", str(target), "--name", name, "--json", *more]
        Child.__init__(self, f"agent-{name}", args, folder, own)

    @property
    def port(self) -> int:
        """The public port."""
        return port_in(next(event["url"] for event in self.events() if event["event"] == "online"))


class Visitor:
    """A connection to a tunnel's port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes | memoryview) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        abort(self.writer)


def abort(writer: asyncio.StreamWriter) -> None:
    """Close with RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.asynccontextmanager
async def visiting(port: int) -> AsyncIterator[Visitor]:
    async with asyncio.timeout(60):
        visitor = Visitor(*await asyncio.open_connection("127.0.0.1", port))
        try:
            yield visitor
        finally:
            visitor.writer.transport.abort()


@contextlib.asynccontextmanager
async def service(sock: socket.socket, handler: Handler) -> AsyncIterator[None]:
    """A local TCP service on ``sock`` that runs ``handler`` for each connection and closes it afterwards."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await handler(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, sock=sock.dup(), backlog=512)
    try:
        yield
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


async def is_up(port: int) -> bool:
    """Whether the port leads to an echo service now."""
    try:
        async with visiting(port) as visitor, asyncio.timeout(2):
            await visitor.send(b"?")
            return await visitor.reader.read(1) == b"?"
    except (OSError, TimeoutError):
        return False


async def until(condition: Callable[[], Awaitable[bool]], limit: float, why: str) -> float:
    """Wait until it holds; the seconds that took."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < allowed(limit, began), f"no {why} in {limit:g} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def closed(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as sock:
        sock.settimeout(1)
        return sock.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture(scope="module")
def agent(up: Up, account: Account, target: socket.socket, folder: Path) -> Iterator[TcpAgent]:  # type: ignore[override]
    with ExitStack() as stack:
        child = TcpAgent(account, folder, port_of(target), "tcp")
        stack.callback(child.end)
        child.online()
        yield child


class TestBytes:
    async def test_a_service_that_speaks_first(self, agent: TcpAgent, target: socket.socket) -> None:
        """As SSH does: a banner, then small messages to and fro."""

        async def shell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-test\r\n")
            while line := await reader.readline():
                writer.write(b"got " + line)

        async with service(target, shell), visiting(agent.port) as visitor:
            assert await visitor.reader.readline() == b"SSH-2.0-test\r\n"
            for number in range(300):
                await visitor.send(b"%d\n" % number)
                assert await visitor.reader.readline() == b"got %d\n" % number
            visitor.writer.write_eof()
            assert await visitor.reader.read() == b""

    async def test_a_visitor_that_speaks_first(self, agent: TcpAgent, target: socket.socket) -> None:
        async with service(target, echo), visiting(agent.port) as visitor:
            await visitor.send(b"hello")
            visitor.writer.write_eof()
            assert await visitor.reader.read() == b"hello"

    async def test_half_close_by_the_service(self, agent: TcpAgent, target: socket.socket) -> None:
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def bye(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"all I have")
            writer.write_eof()
            got.set_result(await reader.read())

        async with service(target, bye), visiting(agent.port) as visitor:
            assert await visitor.reader.read() == b"all I have"
            await visitor.send(b"and this is mine")
            visitor.writer.write_eof()
            assert await asyncio.wait_for(got, 30) == b"and this is mine"

    async def test_bulk_each_way_at_once_in_little_memory(self, up: Up, agent: TcpAgent, target: socket.socket) -> None:
        crcs: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()

        async def pour(writer: asyncio.StreamWriter) -> None:
            for number in range(BULK_MIB):
                writer.write(piece(number))
                await writer.drain()
            writer.write_eof()

        async def count(reader: asyncio.StreamReader) -> tuple[int, int]:
            size = crc = 0
            while data := await reader.read(MIB):
                size, crc = size + len(data), zlib.crc32(data, crc)
            return size, crc

        async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            _, counted = await asyncio.gather(pour(writer), count(reader))
            crcs.set_result(counted)

        pids = {"relay-1": up.pid("relay-1"), "relay-2": up.pid("relay-2"), "agent": agent.pid}
        with MemoryWatch(pids, {name: resident(pid) for name, pid in pids.items()}) as watch:
            async with service(target, both), visiting(agent.port) as visitor:
                _, down = await asyncio.gather(pour(visitor.writer), count(visitor.reader))
                assert down == await crcs == (BULK_MIB * MIB, content_crc(BULK_MIB))
        watch.assert_within(GROWTH_MIB)

    async def test_readers_that_stand_still_hold_no_memory(
        self, up: Up, agent: TcpAgent, target: socket.socket
    ) -> None:
        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while True:
                writer.write(piece(0))
                await writer.drain()

        pids = {"relay-1": up.pid("relay-1"), "relay-2": up.pid("relay-2"), "agent": agent.pid}
        async with service(target, flood):
            with MemoryWatch(pids, {name: resident(pid) for name, pid in pids.items()}) as watch:
                socks = [socket.create_connection(("127.0.0.1", agent.port)) for _ in range(20)]
                await asyncio.sleep(3)
                async with visiting(agent.port) as visitor:  # nobody else is held up
                    assert len(await visitor.reader.readexactly(4 * MIB)) == 4 * MIB
                for sock in socks:
                    sock.close()
        watch.assert_within(GROWTH_MIB)

    async def test_many_at_once(self, agent: TcpAgent, target: socket.socket) -> None:
        data = os.urandom(100_000)

        async def one(number: int) -> bytes:
            async with visiting(agent.port) as visitor:
                await visitor.send(b"%08d" % number + data)
                visitor.writer.write_eof()
                return await visitor.reader.read()

        async with service(target, echo):
            answers = await asyncio.gather(*(one(number) for number in range(PARALLEL)))
        assert answers == [b"%08d" % number + data for number in range(PARALLEL)]


class TestEnds:
    async def test_a_reset_by_the_visitor(self, agent: TcpAgent, target: socket.socket) -> None:
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hi")
            try:
                await reader.read()
                ended.set_result("end")
            except ConnectionResetError:
                ended.set_result("reset")

        async with service(target, wait), visiting(agent.port) as visitor:
            assert await visitor.reader.readexactly(2) == b"hi"
            visitor.reset()
            assert await asyncio.wait_for(ended, 30) == "reset"

    async def test_a_reset_by_the_service(self, agent: TcpAgent, target: socket.socket) -> None:
        async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(2)
            abort(writer)

        async with service(target, cut), visiting(agent.port) as visitor:
            await visitor.send(b"hi")
            with pytest.raises(ConnectionResetError):
                await visitor.reader.read()

    async def test_a_service_that_is_down(self, up: Up, account: Account, folder: Path, started: ExitStack) -> None:
        """The visitor is closed without a byte; the agent's user and the relay's log hear why."""
        with listener() as sock:
            number = port_of(sock)
        agent = TcpAgent(account, folder, number, "down")
        started.callback(agent.end)
        agent.online()
        for data in (b"", b"anybody there?"):
            async with visiting(agent.port) as visitor:
                with contextlib.suppress(ConnectionResetError):  # bytes that reach a closed connection are answered so
                    await visitor.send(data)
                    assert await visitor.reader.read() == b""
        agent.wait_for(lambda: f"nothing listens on localhost:{number}" in agent.err, 5, "warning")
        up.child.wait_for(lambda: "edge.target_refused" in up.child.err, 5, "reason in the relay's log")

    async def test_a_service_that_accepts_late(self, agent: TcpAgent, target: socket.socket) -> None:
        async with visiting(agent.port) as visitor:
            await visitor.send(b"early")
            await asyncio.sleep(1)
            async with service(target, echo):
                assert await visitor.reader.readexactly(5) == b"early"

    async def test_stop_and_remove_reach_it(
        self, up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack
    ) -> None:
        """Its port closes and its connections end within 2 s; started again it has the same port, deleted it has none."""
        agent = TcpAgent(account, folder, port_of(target), "ends")
        started.callback(agent.end)
        port = agent.online().port
        async with service(target, echo), visiting(port) as visitor:
            await visitor.send(b"x")
            assert await visitor.reader.readexactly(1) == b"x"
            assert f"tcp://localhost:{port}" in up.command(account, "ls").stdout
            assert up.command(account, "stop", "ends").returncode == 0
            began = time.monotonic()
            with pytest.raises(ConnectionResetError):
                await visitor.reader.read()
            assert closed(port) and time.monotonic() - began < allowed(REACH_SECONDS, began)
            assert await agent.exit(10) == TUNNEL_REFUSED

            again = TcpAgent(account, folder, port_of(target), "ends")
            started.callback(again.end)
            assert again.online().port == port and await is_up(port)
            assert up.command(account, "rm", "ends").returncode == 0
            began = time.monotonic()
            while not closed(port):
                assert time.monotonic() - began < allowed(REACH_SECONDS, began)
                await asyncio.sleep(0.02)
        stranger = Account(up.api_url)
        started.callback(stranger.close)
        wish = ["tcp", "1", "--name", "greedy", "--remote-port", str(port)]
        refused = up.command(stranger, *wish)  # not at once
        assert refused.returncode != 0 and "tunnel.port_taken" in refused.stderr
        back = TcpAgent(account, folder, port_of(target), "ends", "--remote-port", str(port))
        started.callback(back.end)
        assert back.online().port == port


class TestDisorder:
    async def test_every_kind_of_end_leaves_nothing(self, up: Up, agent: TcpAgent, target: socket.socket) -> None:
        """Visitors and services that send, read, half-close, wait and reset as chance has it, both at once."""
        relays = (up.pid("relay-1"), up.pid("relay-2"))
        before = [descriptors(pid) for pid in (*relays, agent.pid)]
        over = time.monotonic() + DISORDER_SECONDS

        def serve() -> None:
            target.settimeout(0.1)
            while time.monotonic() < over + 1:
                with contextlib.suppress(TimeoutError):
                    conn = target.accept()[0]
                    threading.Thread(target=disorder, args=(conn, random.Random(conn.fileno())), daemon=True).start()
            target.settimeout(None)

        def visit(seed: int) -> int:
            chance, count = random.Random(seed), 0
            while time.monotonic() < over:
                with contextlib.suppress(
                    ConnectionResetError, BrokenPipeError
                ):  # by a service, before we saw that we were connected
                    disorder(socket.create_connection(("127.0.0.1", agent.port), timeout=5), chance)
                count += 1
            return count

        serving = asyncio.create_task(asyncio.to_thread(serve))
        counts = await asyncio.gather(*(asyncio.to_thread(visit, seed) for seed in range(8)))
        await serving
        print(f"{sum(counts)} connections")
        assert sum(counts) > 200
        for pid, had in zip((*relays, agent.pid), before, strict=True):
            await until(async_(lambda pid=pid, had=had: descriptors(pid) <= had + 2), 10, "end of connections")
        assert "Traceback" not in up.child.err + agent.err
        async with service(target, echo):
            assert await is_up(agent.port)


def async_(condition: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def ask() -> bool:
        return condition()

    return ask


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def disorder(conn: socket.socket, chance: random.Random) -> None:
    """A few steps of a connection's life, and one of its ends."""
    with contextlib.suppress(OSError), conn:
        conn.settimeout(chance.choice((0.05, 0.3)))
        for _ in range(chance.randrange(6)):
            step = chance.randrange(6)
            if step == 0:
                conn.sendall(bytes(chance.choice((1, 100, 70_000, 300_000))))
            elif step == 1:
                conn.recv(chance.choice((1, 4096, MIB)))
            elif step == 2:
                conn.shutdown(socket.SHUT_WR)
            elif step == 3:
                time.sleep(chance.random() * 0.05)
            elif step == 4:
                conn.shutdown(socket.SHUT_RD)
            else:
                conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return


class TestKeeping:
    """One port through everything that restarts."""

    async def test_agent_relays_and_api(
        self, up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack
    ) -> None:
        agent = TcpAgent(account, folder, port_of(target), "kept")
        port = agent.online().port
        async with service(target, echo):
            assert await is_up(port)
            agent.kill(signal.SIGTERM)
            await agent.exit(10)
            assert closed(port)
            agent.end()
            agent = TcpAgent(account, folder, port_of(target), "kept")
            started.callback(agent.end)
            assert agent.online().port == port and await is_up(port)

            for _ in range(2):  # the relay that has it, then the one that took over
                pid = self.holder_of(port)
                os.kill(pid, signal.SIGKILL)
                took = await until(lambda: is_up(port), 3, "take-over by the other relay")
                print(f"back {took:.2f} s after the relay's death")
                assert self.holder_of(port) != pid
                await asyncio.sleep(1.5)

            api = up.pid("api")
            os.kill(api, signal.SIGKILL)
            for _ in range(10):
                assert await is_up(port)
                await asyncio.sleep(0.1)
            up.child.wait_for(lambda: up.pid("api") != api, 10, "restart of the API")
            await until(lambda: asyncio.to_thread(self.listed, account), 10, "API")
            assert account.tunnels()["kept"]["url"].endswith(f":{port}")
            assert await is_up(port)

    async def test_a_rolling_restart(
        self, up: Up, account: Account, folder: Path, target: socket.socket, started: ExitStack
    ) -> None:
        """A relay that stops in order lets the other have the port; a connection that is open finishes."""
        agent = TcpAgent(account, folder, port_of(target), "rolling")
        started.callback(agent.end)
        port = agent.online().port
        async with service(target, echo), visiting(port) as visitor:
            await visitor.send(b"1")
            assert await visitor.reader.readexactly(1) == b"1"
            old = self.holder_of(port)
            os.kill(old, signal.SIGTERM)
            began = time.monotonic()
            while str(old) in (holder(port) or str(old)):  # none, then another
                assert time.monotonic() - began < allowed(5, began), "the relay that stops keeps the port"
                await asyncio.sleep(0.005)
            await until(lambda: is_up(port), 3, "take-over by another relay")
            print(f"back {time.monotonic() - began:.2f} s after the relay began to stop")
            await visitor.send(b"2")
            assert await visitor.reader.readexactly(1) == b"2"
            visitor.writer.write_eof()
            assert await visitor.reader.read() == b""

    @staticmethod
    def holder_of(port: int) -> int:
        found = re.search(r"pid (\d+)", holder(port) or "")
        assert found, f"nobody listens on {port}"
        return int(found[1])

    @staticmethod
    def listed(account: Account) -> bool:
        try:
            return "kept" in account.tunnels()
        except Exception:  # the API is starting
            return False


class TestProxyProtocol:
    @pytest.mark.parametrize("version", [1, 2])
    async def test_the_target_learns_who_the_visitor_is(
        self, account: Account, folder: Path, target: socket.socket, started: ExitStack, version: int
    ) -> None:
        agent = TcpAgent(account, folder, port_of(target), f"proxied{version}", "--proxy-protocol", str(version))
        started.callback(agent.end)
        port = agent.online().port
        got: asyncio.Queue[bytes] = asyncio.Queue()

        async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.put_nowait(await reader.read())

        async with service(target, keep), visiting(port) as visitor:
            own = visitor.writer.get_extra_info("sockname")[1]
            await visitor.send(b"hello")
            visitor.writer.write_eof()
            while not (data := await asyncio.wait_for(got.get(), 30)):
                pass  # the agent's look at its target when it started
        if version == 1:
            expected = f"PROXY TCP4 127.0.0.1 127.0.0.1 {own} {port}\r\n".encode()
        else:
            four = bytes((127, 0, 0, 1))
            expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack("!H4s4sHH", 12, four, four, own, port)
        assert data == expected + b"hello"


class TestTenants:
    async def test_each_has_its_own(
        self, up: Up, account: Account, agent: TcpAgent, folder: Path, target: socket.socket, started: ExitStack
    ) -> None:
        stranger = Account(up.api_url)
        started.callback(stranger.close)
        with listener() as other_target:
            other = TcpAgent(stranger, folder, port_of(other_target), "tcp")
            started.callback(other.end)
            assert other.online().port != agent.port

            async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(b"the stranger's")

            async with service(target, echo), service(other_target, say):
                async with visiting(other.port) as visitor:
                    assert await visitor.reader.read() == b"the stranger's"
                assert await is_up(agent.port)
        refused = up.command(stranger, "tcp", "22", "--name", "mine", "--remote-port", str(agent.port))
        assert refused.returncode != 0 and "tunnel.port_taken" in refused.stderr
        outside = up.command(stranger, "tcp", "22", "--name", "mine", "--remote-port", "22")
        assert outside.returncode != 0 and "tunnel.port_invalid" in outside.stderr
        assert str(agent.port) not in str(stranger.tunnels())
