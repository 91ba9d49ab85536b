"""What a tunnel costs while nobody asks for it, and how it lets go."""

from __future__ import annotations

import asyncio
import tracemalloc

from portico.agent.forward import Forwarder
from portico.agent.stats import Stats
from portico.agent.target import Target
from portico.settings import AgentSettings
from tests.agent.harness import answering, target_server, tunnel_to

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SHORT = AgentSettings(target_idle_seconds=0.1, first_byte_timeout_seconds=0.4)


async def test_idle_tunnels_hold_no_buffer() -> None:
    async with target_server(answering(OK)) as port:
        target = Target("tcp", "127.0.0.1", port)
        tracemalloc.start()
        try:
            forwarders = [Forwarder(target, AgentSettings(), Stats()) for _ in range(100)]
            assert all([await forwarder.probe() is None for forwarder in forwarders])
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 100 * 10_000
        for forwarder in forwarders:
            await forwarder.abort()


async def test_the_buffer_goes_with_the_last_idle_connection_and_comes_back() -> None:
    async with target_server(answering(OK)) as port:
        async with tunnel_to(Target("tcp", "127.0.0.1", port), SHORT) as tunnel:
            pool = tunnel.forwarder.pool
            for _ in range(2):
                assert bytes((await tunnel.get().over()).body) == b"ok"
                assert pool._view is not None
                async with asyncio.timeout(30):
                    while pool._view is not None:
                        await asyncio.sleep(0.02)
                assert not pool.open and not pool.busy


async def test_a_retired_pool_finishes_and_keeps_nothing() -> None:
    go = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            await go.wait()
            writer.write(OK)

    async with target_server(slow) as port:
        async with tunnel_to(Target("tcp", "127.0.0.1", port), SHORT) as tunnel:
            visit = tunnel.get()
            while not tunnel.forwarder.pool.open:
                await asyncio.sleep(0.01)
            tunnel.forwarder.retire()
            assert tunnel.forwarder.busy
            late = tunnel.get()  # a request that crossed the removal
            go.set()
            assert bytes((await visit.over()).body) == bytes((await late.over()).body) == b"ok"
            async with asyncio.timeout(30):
                while tunnel.forwarder.busy:
                    await asyncio.sleep(0.01)
            assert tunnel.forwarder.pool.idle == []


async def test_why_a_target_is_not_there() -> None:
    forwarder = Forwarder(Target("tcp", "127.0.0.1", 1), AgentSettings(), Stats())
    assert await forwarder.probe() == "nothing listens on 127.0.0.1:1"
