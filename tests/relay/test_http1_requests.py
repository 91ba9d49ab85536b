"""Requests as generated, cut and pipelined at random, through a real relay: the agent gets what h11 reads, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.relay.doubles import ScriptedAgent, ScriptedStream

Visit = Callable[..., Any]

_TOKEN = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789-_!#$%&'*+.^`|~", min_size=1, max_size=12)
_VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E) | st.just("\t"), max_size=30)
_NAME = _TOKEN.map(lambda name: f"X-{name}")
_FIELDS = st.lists(st.tuples(_NAME, _VALUE), max_size=6)
_BODY = st.binary(max_size=200)


@st.composite
def request(draw: Any) -> tuple[bytes, bool]:
    """The bytes of a valid request, and whether it asks for an upgrade (which is declined)."""
    method = draw(st.sampled_from(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")))
    path = draw(st.text("abcxyz0123/?&=%.;:@-~", max_size=20))
    target = draw(st.sampled_from((f"/{path}", f"http://web.localhost/{path}")))
    lines = [f"{method} {target} HTTP/1.1", draw(st.sampled_from(("Host: web.localhost", "hOST:web.localhost ")))]
    lines += [f"{name}: {value}" for name, value in draw(_FIELDS)]
    upgrade = draw(st.booleans()) and draw(st.booleans())
    if upgrade:
        lines += ["Connection: Upgrade", f"Upgrade: {draw(st.sampled_from(('h2c', 'other')))}"]
    framing = draw(st.sampled_from(("none", "length", "chunked")))
    body = b""
    if framing == "length":
        body = draw(_BODY)
        lines.append(f"Content-Length: {len(body)}")
    elif framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
        for chunk in draw(st.lists(st.binary(min_size=1, max_size=60), max_size=4)):
            body += b"%x%b\r\n%b\r\n" % (len(chunk), draw(st.sampled_from((b"", b";a=b"))), chunk)
        trailers = draw(st.lists(st.tuples(_NAME, _VALUE), max_size=2))
        body += b"0\r\n" + b"".join(f"{name}: {value}\r\n".encode() for name, value in trailers) + b"\r\n"
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body, upgrade


Reading = tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes, list[bytes]]
_OURS = (b"x-forwarded-", b"forwarded", b"x-request-id", b"connection", b"upgrade", b"transfer-encoding")


def _passed(fields: Any) -> list[tuple[bytes, bytes]]:
    pairs = ((bytes(name).lower(), bytes(value).strip(b" \t")) for name, value in fields)
    return [pair for pair in pairs if not pair[0].startswith(_OURS)]


def h11_reading(data: bytes) -> list[Reading]:
    """The requests that h11 finds."""
    found: list[Reading] = []
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    while isinstance(event := connection.next_event(), h11.Request):
        body = b""
        while isinstance(part := connection.next_event(), h11.Data):
            body += bytes(part.data)
        assert isinstance(part, h11.EndOfMessage)
        target = bytes(event.target).removeprefix(b"http://web.localhost") or b"/"
        trailers = [bytes(item).strip() for pair in part.headers.raw_items() for item in pair]
        found.append((bytes(event.method), target, _passed(event.headers), body, trailers))
        connection.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
        connection.send(h11.EndOfMessage())
        connection.start_next_cycle()
    return found


def agents_reading(stream: ScriptedStream) -> Reading:
    return (
        stream.method,
        stream.target,
        _passed(stream.fields),
        bytes(stream.body),
        [part.strip() for part in stream.trailers or []],
    )


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(request(), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 2000), max_size=8),
    together=st.booleans(),
)
async def test_the_agent_gets_what_h11_reads(
    agent: ScriptedAgent, visit: Visit, requests: list[tuple[bytes, bool]], cuts: list[int], together: bool
) -> None:
    agent.streams.clear()

    async def answer(stream: ScriptedStream) -> None:
        if not stream.flags & 2:  # an upgrade has no end to wait for
            await stream.ended.wait()
        if stream.reset is None:
            stream.answer(body=b"hello")

    tasks: set[asyncio.Task[None]] = set()
    agent.on_stream = lambda stream: tasks.add(asyncio.ensure_future(answer(stream)))
    data = b"".join(data for data, _ in requests)
    visitor = await visit()
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    at = 0
    for end in ends:
        visitor.send(data[at:end])
        at = end
        if not together:
            await asyncio.sleep(0.001)
    for _ in requests:
        status, _, body = await visitor.response()
        assert (status, body) == (200, b"hello")
    assert [agents_reading(stream) for stream in agent.streams] == h11_reading(data)
    visitor.writer.close()
    await asyncio.gather(*tasks)
    await agent.until(lambda: not agent.session.streams)
