"""Visitors that stop: in the middle of a body, or of reading an answer. Streams that have nothing to say are left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from portico.relay.server import Relay
from tests.relay.doubles import Client, ScriptedAgent, ScriptedStream

Visit = Callable[..., Awaitable[Client]]
LIMIT = 0.6
POST = b"POST /%b HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: %d\r\n%b\r\n"
GET = b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n"
BODY_LIMIT = pytest.mark.parametrize("relay_settings", [{"body_timeout_seconds": LIMIT}])
WRITE_LIMIT = pytest.mark.parametrize("relay_settings", [{"write_timeout_seconds": LIMIT}])


def silent(stream: ScriptedStream) -> None:
    """No answer yet."""


@BODY_LIMIT
class TestBodies:
    @pytest.mark.parametrize("sent", [b"", b"abc"])
    async def test_one_that_stops_is_408(self, relay: Relay, agent: ScriptedAgent, visit: Visit, sent: bytes) -> None:
        agent.on_stream = silent
        client = await visit(POST % (b"", 6, b"") + sent)
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (408, [b"edge.body_timeout"])
        assert await client.rest() == b""
        await agent.until(lambda: agent.streams[0].reset is not None)
        assert relay.agents.by_tunnel["tun_web"].inflight == 0

    async def test_chunks_without_an_end(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = silent
        client = await visit(
            b"POST / HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
        )
        await asyncio.sleep(LIMIT / 2)
        client.send(b"0000000")  # the framing of a body is none of it
        assert (await client.response())[0] == 408

    async def test_a_slow_one_arrives(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = silent
        client = await visit(POST % (b"", 5, b""))
        for _ in range(5):
            await asyncio.sleep(LIMIT / 2)
            client.send(b"x")
        await agent.until(lambda: agent.streams[0].ended.is_set())
        agent.streams[0].answer(body=b"got it")
        assert (await client.response())[2] == b"got it"

    async def test_the_target_may_take_its_time(self, agent: ScriptedAgent, visit: Visit) -> None:
        def hold(stream: ScriptedStream) -> None:
            stream.take = False

        agent.on_stream = hold
        size = 1_000_000
        client = await visit(POST % (b"", size, b"") + bytes(size))
        await asyncio.sleep(2.2 * LIMIT)
        stream = agent.streams[0]
        assert stream.reset is None and len(stream.body) < size
        stream.take = True
        stream.stream.consumed(len(stream.body))
        await agent.until(lambda: stream.ended.is_set())
        stream.answer(body=b"at last")
        assert (await client.response())[2] == b"at last"

    async def test_the_answer_may_take_its_time(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = silent
        client = await visit(POST % (b"", 3, b"") + b"abc")
        await asyncio.sleep(2.2 * LIMIT)
        agent.streams[0].answer(body=b"ok")
        assert (await client.response())[2] == b"ok"

    async def test_who_waits_for_100_is_waited_for(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = silent
        client = await visit(POST % (b"", 3, b"Expect: 100-continue\r\n"))
        await asyncio.sleep(2.2 * LIMIT)
        agent.streams[0].stream.send_interim(100, [b"Continue"])
        assert await client.read_head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"abc")
        await agent.until(lambda: agent.streams[0].ended.is_set())
        agent.streams[0].answer()
        assert (await client.response())[0] == 200

    async def test_a_conversation_may_pause(self, agent: ScriptedAgent, visit: Visit) -> None:
        """Where the answer has begun, both directions are the app's own affair."""
        agent.on_stream = lambda s: s.stream.send_response(200, [b"OK"], end=False)
        client = await visit(POST % (b"", 6, b"") + b"abc")
        await client.read_head()
        await asyncio.sleep(2.2 * LIMIT)
        client.send(b"def")
        await agent.until(lambda: agent.streams[0].ended.is_set())
        assert bytes(agent.streams[0].body) == b"abcdef"

    async def test_the_second_of_two(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: s.answer(body=b"one") if s.target == b"/one" else None
        client = await visit(POST % (b"one", 1, b"") + b"1" + POST % (b"two", 2, b"") + b"2")
        assert (await client.response())[2] == b"one"
        assert (await client.response())[0] == 408


def pouring(size: int) -> Callable[[ScriptedStream], None]:
    """Answers of ``size`` bytes, as credit comes."""

    def on_stream(stream: ScriptedStream) -> None:
        left = size
        stream.stream.send_response(200, [b"OK", b"Content-Length", b"%d" % size], end=False)

        def feed() -> None:
            nonlocal left
            while left and (room := stream.stream.sendable()):
                part = min(room, left)
                left -= part
                stream.stream.send_data(bytes(part), end=not left)
            if left:
                stream.stream.wait()

        stream.feeding = feed
        feed()

    return on_stream


@WRITE_LIMIT
class TestAnswers:
    async def test_who_does_not_read_is_reset(self, relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = pouring(50_000_000)
        client = await visit(GET)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await agent.until(lambda: agent.streams and agent.streams[0].reset is not None, 10)
        assert relay.agents.by_tunnel["tun_web"].inflight == 0 and not relay.public.connections

    async def test_who_asks_again_and_again_and_reads_nothing(
        self, relay: Relay, agent: ScriptedAgent, visit: Visit
    ) -> None:
        agent.on_stream = lambda s: s.answer(body=bytes(60_000))
        client = await visit()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(GET * 1000)
        await agent.until(lambda: agent.streams and not relay.public.connections, 10)
        assert len(agent.streams) < 200, "answers piled up before a visitor that does not read"

    async def test_who_asks_for_much_and_then_reads_gets_it(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: s.answer(body=bytes(60_000))
        client = await visit()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(GET * 300)
        await asyncio.sleep(LIMIT / 2)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(300):
            assert len((await client.response())[2]) == 60_000

    async def test_who_reads_slowly_gets_everything(self, agent: ScriptedAgent, visit: Visit) -> None:
        size = 12_000_000
        agent.on_stream = pouring(size)
        client = await visit(GET)
        await client.read_head()
        transport = client.writer.transport
        got = 0
        for _ in range(6):
            transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(LIMIT * 0.7)
            transport.resume_reading()  # type: ignore[attr-defined]
            got += len(await client.read(size // 6))
        assert got == size

    async def test_events_may_be_rare(self, agent: ScriptedAgent, visit: Visit) -> None:
        agent.on_stream = lambda s: s.stream.send_response(200, [b"OK"], end=False)
        client = await visit(GET)
        await client.read_head()
        for _ in range(2):
            await asyncio.sleep(2 * LIMIT)
            agent.streams[0].stream.send_data(b"data: 1\n\n")
            assert b"data" in await client.read(14)

    async def test_a_websocket_may_wait(self, agent: ScriptedAgent, visit: Visit) -> None:
        def upgrade(stream: ScriptedStream) -> None:
            stream.stream.send_response(101, [b"Switching", b"Upgrade", b"websocket"], end=False)

        agent.on_stream = upgrade
        client = await visit(
            b"GET / HTTP/1.1\r\nHost: web.localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        await client.read_head()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        stream = agent.streams[0].stream
        sent = 0
        while (room := stream.sendable()) and sent < 20_000_000:
            stream.send_data(bytes(room))
            sent += room
            await asyncio.sleep(0.01)
        await asyncio.sleep(2.5 * LIMIT)
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await client.read(sent)) == sent
