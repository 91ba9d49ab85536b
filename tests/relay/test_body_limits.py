"""What a visitor can send around a body without being a body: trailers, chunk headers, and a fault behind a waiting request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.relay.doubles import Client, ScriptedAgent, ScriptedStream

Visit = Callable[..., Awaitable[Client]]
POST = b"POST / HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"3\r\nabc\r\n"


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(b"0\r\nX-T: " + b"v" * 400_000, id="one endless trailer"),
        pytest.param(b"0\r\n" + b"X-T: 1\r\n" * 50_000, id="endless trailers"),
        pytest.param(b"0\r\n" + b"X" * 300 + b": 1\r\n\r\n", id="a trailer name that no frame carries"),
        pytest.param(b"0\r\n" + b"X-T: 1\r\n" * 300 + b"\r\n", id="more trailers than a frame carries"),
        pytest.param(b"1;" + b"x" * 400_000, id="an endless chunk extension"),
    ],
)
async def test_a_flood_around_the_body_is_refused(agent: ScriptedAgent, visit: Visit, flood: bytes) -> None:
    """Without a limit of its own a trailer would be collected in memory for as long as the visitor likes to send."""
    agent.on_stream = lambda s: None
    client = await visit(POST + CHUNK)
    await agent.until(lambda: len(agent.streams) == 1 and bytes(agent.streams[0].body) == b"abc")
    client.writer.write(flood)
    status, fields, _ = await client.response()
    assert (status, fields[b"portico-error"]) == (431, [b"edge.head_too_large"])
    await agent.until(lambda: agent.streams[0].reset is not None)
    assert agent.streams[0].trailers is None


async def test_trailers_within_the_limits_pass(agent: ScriptedAgent, visit: Visit) -> None:
    client = await visit(POST + CHUNK + b"0\r\n" + b"X-T: 1\r\n" * 100 + b"\r\n")
    assert (await client.response())[0] == 200
    await agent.streams[0].ended.wait()
    assert agent.streams[0].trailers == [b"X-T", b"1"] * 100


async def test_a_large_body_in_small_chunks_passes(agent: ScriptedAgent, visit: Visit) -> None:
    agent.on_stream = lambda s: None
    client = await visit(POST + b"1\r\na\r\n" * 60_000 + b"0\r\n\r\n")
    await agent.until(lambda: len(agent.streams) == 1)
    await agent.streams[0].ended.wait()
    assert bytes(agent.streams[0].body) == b"a" * 60_000
    agent.streams[0].answer()
    assert (await client.response())[0] == 200


async def test_a_broken_body_behind_a_waiting_request_is_not_forwarded_as_whole(
    agent: ScriptedAgent, visit: Visit
) -> None:
    waiting: list[ScriptedStream] = []
    agent.on_stream = waiting.append
    client = await visit(b"GET /first HTTP/1.1\r\nHost: web.localhost\r\n\r\n" + POST + CHUNK + b"zz\r\n")
    await agent.until(lambda: len(waiting) == 1)
    waiting[0].answer(body=b"one")
    assert (await client.response())[2] == b"one"
    status, _, _ = await client.response()
    assert status == 400
    assert all(stream.reset is not None for stream in waiting[1:])
