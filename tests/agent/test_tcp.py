"""TCP tunnels at the agent: dialling, bytes both ways, and every way in which a connection ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from portico.agent.stats import CONNECTION, Stats
from portico.agent.target import Target
from portico.agent.tcp import TcpForwarder
from portico.settings import AgentSettings
from portico.wire import frames as f
from tests.agent.harness import RelayConnection, serving, target_server
from tests.ports import free_port


class Tunnel:
    """A TCP forwarder behind a real link."""

    def __init__(self, relay: RelayConnection, forwarder: TcpForwarder) -> None:
        self.relay, self.forwarder = relay, forwarder
        self.open = relay.open_tcp

    @property
    def idle(self) -> bool:
        """Nothing is left: no connection, no dial, no count."""
        forwarder = self.forwarder
        return not (forwarder._open or forwarder._tasks or forwarder.stats.open)

    async def until_idle(self) -> None:
        async with asyncio.timeout(30):
            while not self.idle:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def tunnel_to(target: Target, settings: AgentSettings | None = None, **options: Any) -> AsyncIterator[Tunnel]:
    settings = settings or AgentSettings()
    forwarder = TcpForwarder(target, settings, Stats(), **options)
    async with serving(forwarder, settings) as (relay, _, _):
        yield Tunnel(relay, forwarder)
    await forwarder.abort()


def local(port: int) -> Target:
    return Target("tcp", "127.0.0.1", port, raw=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()


def abort(writer: asyncio.StreamWriter) -> None:
    """Close with RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class TestBytes:
    async def test_both_ways_with_half_close(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"banner ")
            writer.write(await reader.read())

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.open()
            visit.stream.send_data(b"early")  # before OPENED
            await visit.until(lambda: visit.opened)
            await visit.send(b" late", end=True)
            await visit.over()
            assert (bytes(visit.body), visit.reset) == (b"banner early late", None)
            await tunnel.until_idle()
            ((method, visitor, status, began, ended, _),) = tunnel.forwarder.stats.records
            assert (method, visitor, status) == (CONNECTION, b"1.2.3.4:5", 0) and 0 < ended - began < 5

    async def test_everything_before_the_dial_is_done(self) -> None:
        """A visitor that says all it has, ends, and is answered."""
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.set_result(await reader.read())
            writer.write(b"thanks")

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.open()
            visit.stream.send_data(b"x" * 65_536, end=True)
            await visit.over()
            assert await got == b"x" * 65_536 and bytes(visit.body) == b"thanks"
            await tunnel.until_idle()

    async def test_the_target_may_end_first(self) -> None:
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"bye")
            writer.write_eof()
            got.set_result(await reader.read())

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.open()
            await visit.over()
            assert bytes(visit.body) == b"bye"
            await visit.send(b"still sent", end=True)
            assert await asyncio.wait_for(got, 30) == b"still sent"
            await tunnel.until_idle()

    async def test_megabytes_each_way_at_once(self) -> None:
        data = os.urandom(8 << 20)
        async with target_server(echo) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.open()
            await visit.send(data, end=True)
            await visit.over(30)
            assert visit.body == data
            await tunnel.until_idle()

    async def test_a_slow_reader_stops_its_target(self) -> None:
        """No more than the window is read from a target whose visitor reads nothing."""
        sent = 0

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.transport.set_write_buffer_limits(high=0)
            for _ in range(512):
                writer.write(b"x" * 65_536)
                await writer.drain()
                sent += 65_536

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.open()
            visit.hold = True
            await visit.until(lambda: len(visit.body) >= 65_536)
            await asyncio.sleep(0.3)
            assert len(visit.body) == 65_536  # the first window, and not a byte more
            assert sent < 16 << 20  # what kernel buffers took
            visit.release()
            await visit.over(20)
            assert len(visit.body) == 32 << 20

    async def test_a_unix_socket(self, tmp_path: Path) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await echo(reader, writer)
            writer.close()

        path = str(tmp_path / "app.sock")
        server = await asyncio.start_unix_server(handler, path)
        try:
            async with tunnel_to(Target("unix", path=path, raw=True)) as tunnel:
                visit = tunnel.open()
                await visit.send(b"hello", end=True)
                await visit.over()
                assert bytes(visit.body) == b"hello"
        finally:
            server.close()

    async def test_localhost_is_either_family(self) -> None:
        async with target_server(echo) as port, tunnel_to(Target("tcp", "localhost", port, raw=True)) as tunnel:
            visit = tunnel.open()
            await visit.send(b"hello", end=True)
            await visit.over()
            assert bytes(visit.body) == b"hello"


class TestEnds:
    async def test_refused_with_a_reason_for_the_user(self) -> None:
        port = free_port()
        async with tunnel_to(local(port)) as tunnel:
            visit = tunnel.open()
            visit.stream.send_data(b"waits for the dial")
            await visit.over()
            assert visit.reset == (f.TARGET_REFUSED, f"nothing listens on 127.0.0.1:{port}")
            assert not visit.opened and not visit.body
            assert tunnel.forwarder.stats.last_failure == f"nothing listens on 127.0.0.1:{port}"
            assert tunnel.forwarder.stats.failures == 1
            await tunnel.until_idle()

    async def test_a_target_that_does_not_accept_in_time(self) -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            waiting = []
            for _ in range(3):  # fill its queue, so that the next connection is not answered
                waiting.append(one := socket.socket())
                one.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    one.connect(("127.0.0.1", port))
            async with tunnel_to(local(port), AgentSettings(target_connect_timeout_seconds=0.3)) as tunnel:
                visit = await tunnel.open().over()
                assert visit.reset is not None and visit.reset[0] == f.TARGET_TIMEOUT
                await tunnel.until_idle()
            for one in waiting:
                one.close()

    async def test_a_visitor_that_leaves_during_the_dial(self) -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            port = full.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)):
                async with tunnel_to(local(port), AgentSettings(target_connect_timeout_seconds=0.4)) as tunnel:
                    visit = tunnel.open()
                    await asyncio.sleep(0.05)
                    visit.stream.reset(f.CANCELLED, "gone")
                    await tunnel.until_idle()
                    assert tunnel.forwarder.stats.failures == 0  # nobody was there to be failed

    async def test_a_visitor_that_left_before_the_target_was_reached(self) -> None:
        """OPEN and RESET in one message: the connection that was dialled for it is closed again."""
        ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                ended.set_result(await reader.read())
            except ConnectionResetError:
                ended.set_result(b"reset")

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            tunnel.open().stream.reset(f.CANCELLED, "gone")
            assert await asyncio.wait_for(ended, 30) in (b"", b"reset")
            await tunnel.until_idle()

    async def test_a_reset_by_the_target_is_a_reset(self) -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(2)
            abort(writer)

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.open()
            await visit.send(b"xy")
            await visit.over()
            assert visit.reset == (f.TARGET_RESET, "the target reset the connection")
            await tunnel.until_idle()

    async def test_a_reset_at_once_is_a_reset(self) -> None:
        """Seen as a failed connect or as a reset of a connection: to the visitor it is the same."""
        with socket.create_server(("127.0.0.1", 0)) as server:

            def cut() -> None:
                for _ in range(50):
                    conn = server.accept()[0]
                    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    conn.close()

            cutting = asyncio.create_task(asyncio.to_thread(cut))
            async with tunnel_to(local(server.getsockname()[1])) as tunnel:
                for _ in range(50):
                    visit = await tunnel.open().over()
                    assert visit.opened and visit.reset == (f.TARGET_RESET, "the target reset the connection")
                assert tunnel.forwarder.stats.failures == 0
                await tunnel.until_idle()
            await cutting

    async def test_a_reset_by_the_visitor_is_a_reset(self) -> None:
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hi")
            try:
                await reader.read()
                ended.set_result("end")
            except ConnectionResetError:
                ended.set_result("reset")

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.open()
            await visit.until(lambda: visit.body)
            visit.stream.reset(f.CANCELLED, "the visitor reset the connection")
            assert await asyncio.wait_for(ended, 30) == "reset"
            await tunnel.until_idle()

    async def test_what_came_before_the_visitors_reset_arrives(self) -> None:
        got = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hi")
            first = await reader.read(100)
            try:
                got.set_result((first, await reader.read()))
            except ConnectionResetError:
                got.set_result((first, "reset"))

        async with target_server(handler) as port, tunnel_to(local(port)) as tunnel:
            visit = tunnel.open()
            await visit.until(lambda: visit.body)
            visit.stream.send_data(b"last words")
            visit.stream.reset(f.CANCELLED, "the visitor reset the connection")
            assert await asyncio.wait_for(got, 30) == (b"last words", "reset")

    async def test_a_request_is_refused(self) -> None:
        async with target_server(echo) as port, tunnel_to(local(port)) as tunnel:
            visit = await tunnel.relay.get().over()
            assert visit.reset is not None and visit.reset[0] == f.NO_SUCH_BIND

    async def test_abort_cuts_everything(self) -> None:
        async with target_server(echo) as port, tunnel_to(local(port)) as tunnel:
            visits = [tunnel.open() for _ in range(5)]
            for visit in visits:
                await visit.until(lambda visit=visit: visit.opened)  # type: ignore[misc]
            await tunnel.forwarder.abort()
            await tunnel.until_idle()


class TestProxyProtocol:
    @pytest.mark.parametrize(
        ("version", "expected"),
        [
            (1, b"PROXY TCP4 1.2.3.4 0.0.0.0 5 6\r\n"),
            (2, bytes.fromhex("0d0a0d0a000d0a515549540a2111000c 01020304 00000000 0005 0006")),
        ],
    )
    async def test_comes_before_the_visitors_bytes(self, version: int, expected: bytes) -> None:
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.set_result(await reader.read())

        async with target_server(handler) as port, tunnel_to(local(port), proxy_protocol=version) as tunnel:
            visit = tunnel.open()
            visit.stream.send_data(b"first words", end=True)
            assert await asyncio.wait_for(got, 30) == expected + b"first words"


class TestProbe:
    async def test_says_what_is_wrong(self) -> None:
        port = free_port()
        forwarder = TcpForwarder(local(port), AgentSettings(), Stats(), proxy_protocol=1)
        assert await forwarder.probe() == f"nothing listens on 127.0.0.1:{port}"

    async def test_sends_nothing(self) -> None:
        got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.set_result(await reader.read())

        async with target_server(handler) as port:
            assert await TcpForwarder(local(port), AgentSettings(), Stats(), proxy_protocol=1).probe() is None
            assert await asyncio.wait_for(got, 30) == b""
