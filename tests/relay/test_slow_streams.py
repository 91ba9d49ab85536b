"""Hundreds of slow streams on one session beside a fast one, and a carrier that does not keep up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from portico.relay.server import Relay
from tests.relay.doubles import ScriptedAgent, ScriptedStream

Visit = Callable[..., Any]
SIZE = 3_000_000
SLOW = 90


def feeding(stream: ScriptedStream, size: int) -> None:
    """Answer with ``size`` bytes, as credit comes."""
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


async def test_a_fast_reader_beside_stalled_ones_ends_and_so_do_they(
    relay: Relay, agent: ScriptedAgent, visit: Visit
) -> None:
    """No set of readers uses the credit up for good: when the stalled ones read again, each gets all of its bytes."""
    agent.on_stream = lambda stream: feeding(stream, SIZE)
    slow = []
    for _ in range(SLOW):
        visitor = await visit(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
        visitor.writer.transport.pause_reading()
        slow.append(visitor)
    await agent.until(lambda: len(agent.streams) == SLOW)
    fast = await visit()
    for _ in range(5):
        fast.send(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
        assert len((await fast.response())[2]) == SIZE
    for visitor in slow[::2]:
        visitor.writer.transport.abort()
    for visitor in slow[1::2]:
        visitor.writer.transport.resume_reading()
    for visitor in slow[1::2]:
        assert len((await visitor.response())[2]) == SIZE
    live = relay.agents.by_host[b"web.localhost"]
    await agent.until(lambda: not live.inflight and not agent.session.streams)
    (connection,) = relay.agents.connections
    assert not connection.session.streams
    assert not connection.session.waiting
    assert connection.session.growth == relay.settings.window_growth_budget_bytes


async def test_uploads_through_a_congested_carrier(relay: Relay, agent: ScriptedAgent, visit: Visit) -> None:
    """The agent does not read for a while: every visitor is held, and each goes on when it reads again."""
    agent.on_stream = lambda stream: None
    head = b"POST / HTTP/1.1\r\nHost: web.localhost\r\nContent-Length: %d\r\n\r\n" % SIZE
    assert agent.carrier.transport is not None
    visitors = [await visit(head) for _ in range(40)]
    await agent.until(lambda: len(agent.streams) == 40)
    agent.carrier.transport.underlying_transport.pause_reading()
    for visitor in visitors:
        visitor.send(bytes(SIZE))
    await asyncio.sleep(0.3)
    agent.carrier.transport.underlying_transport.resume_reading()
    for stream in agent.streams:
        async with asyncio.timeout(30):
            await stream.ended.wait()
        assert len(stream.body) == SIZE
        stream.answer(body=b"ok")
    for visitor in visitors:
        assert (await visitor.response())[0] == 200
    assert relay.agents.by_host[b"web.localhost"].inflight == 0
