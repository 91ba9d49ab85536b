"""HTTP directly and through tunnels: visitor and target see the same messages, but for what is documented."""

from __future__ import annotations

import asyncio

import pytest

from tests.differential import cases, differences
from tests.differential.cases import ANSWER, INTERIM, LEAVE, Case
from tests.differential.echo import SEPARATOR
from tests.differential.exact import Answer, Connection, Head, Way
from tests.differential.places import Place

pytestmark = pytest.mark.system
LIMIT = 20.0


async def play(case: Case, way: Way, host: str, scheme: bytes) -> list[Answer]:
    """Send what the case says and read its answers; then the connection must be over, or serve another request."""
    methods, answers = list(case.answers), []
    interims: list[Head] = []

    async def one() -> None:
        nonlocal interims
        answers.append(await connection.answer(head_only=methods[len(answers)] == "HEAD", interims=interims))
        interims = []

    async with asyncio.timeout(LIMIT), way.connect() as connection:
        for part in case.script:
            if isinstance(part, bytes):
                await connection.send(part.replace(b"%HOST%", host.encode()).replace(b"%SCHEME%", scheme))
            elif isinstance(part, float):
                await asyncio.sleep(part)
            elif part is INTERIM:
                interims.append(await connection.head())
            elif part is ANSWER:
                await one()
        while len(answers) < len(methods):
            await one()
        if LEAVE not in case.script:
            await check_what_follows(connection, answers[-1], host, of_target=way.name == "direct")
    return answers


async def check_what_follows(connection: Connection, last: Answer, host: str, *, of_target: bool) -> None:
    """Nothing is left on the connection that the answer's framing did not speak of. Only a target may close unannounced."""
    if last.closes:
        assert await connection.rest() == b""
    elif not of_target:
        await connection.send(b"GET /robots.txt HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % host.encode())
        assert (await connection.answer()).status == 200
        assert await connection.rest() == b""


def compare(case: Case, direct: Answer, tunnelled: Answer) -> None:
    one, other = differences.answer_seen(direct), differences.answer_seen(tunnelled)
    if case.target == "echo" and SEPARATOR in direct.body:
        at_target = [differences.request_seen(*answer.body.split(SEPARATOR)) for answer in (direct, tunnelled)]
        dropped = not case.framing  # an HTTP/1.0 request has no interim answers, and no trailers
        assert at_target[1] == at_target[0], "the target sees another request"
        one, other = (differences.replace(seen, body=b"") for seen in (one, other))
        assert not dropped or not one.trailers
    assert differences.less_trailers(other) == differences.less_trailers(one)
    if case.framing:
        assert tunnelled.framing == direct.framing
        assert tunnelled.closes == direct.closes or direct.head.first.startswith(b"HTTP/1.0") or direct.closes


@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: f"{case.target}: {case.name}")
async def test_a_tunnel_changes_only_what_is_documented(place: Place, case: Case) -> None:
    host = place.host(case.target)
    direct, *tunnels = place.ways(case.target)
    for way in tunnels:
        scheme = b"https" if way.tls else b"http"
        expected, got = await asyncio.gather(play(case, direct, host, scheme), play(case, way, host, scheme))
        assert len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            compare(case, one, other)


@pytest.mark.parametrize("request_bytes", cases.REFUSED.values(), ids=cases.REFUSED.keys())
async def test_what_is_refused_on_purpose(place: Place, request_bytes: bytes) -> None:
    host = place.host("echo")
    for way in place.ways("echo")[1:]:
        async with asyncio.timeout(LIMIT), way.connect() as connection:
            await connection.send(request_bytes.replace(b"%HOST%", host.encode()))
            answer = await connection.answer()
            assert (answer.status, answer.head.values(b"portico-error")) == (400, [b"edge.bad_request"])
            assert await connection.rest() == b""
