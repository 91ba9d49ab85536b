"""A target that refuses the visitor's Host: the way out is said once, and the answer passes untouched."""

from __future__ import annotations

import gzip

import pytest

from portico.agent.hints import LOOK_BYTES, LOOKS, HostHint
from portico.agent.target import Target
from portico.settings import AgentSettings
from tests.agent.harness import Tunnel, answering, target_server, tunnel_to

#: The pages as the servers write them.
VITE = (
    b'Blocked request. This host ("web.localhost") is not allowed.\n'
    b'To allow this host, add "web.localhost" to `server.allowedHosts` in vite.config.js.'
)
DJANGO = (
    b"<!DOCTYPE html>\n<html lang=en><head><title>DisallowedHost\n          at /</title>" + b"<style>x</style>" * 500
)
RAILS = (
    b"<!DOCTYPE html><html><head><style>"
    + b"a { b: c }\n" * 600
    + b"</style></head><h1>Blocked hosts: web.localhost</h1>"
)
WEBPACK = b"Invalid Host header"
STARLETTE = b"Invalid host header"
ASPNET = b"<h2>Bad Request - Invalid Hostname</h2>"


def response(status: int, body: bytes, *fields: bytes) -> bytes:
    head = [b"HTTP/1.1 %d No" % status, b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


class Told(list[str]):
    """What was told of a tunnel."""

    def watch(self, tunnel: Tunnel) -> Told:
        tunnel.forwarder.host_hint = HostHint("localhost:8000", self.append)
        return self


@pytest.mark.parametrize(
    ("status", "page"),
    [(403, VITE), (400, DJANGO), (403, RAILS), (403, WEBPACK), (400, STARLETTE), (400, ASPNET)],
    ids=["vite", "django", "rails", "webpack", "starlette", "aspnet"],
)
async def test_the_pages_of_the_usual_servers(status: int, page: bytes) -> None:
    async with target_server(answering(response(status, page))) as port:
        async with tunnel_to(Target("tcp", "127.0.0.1", port)) as tunnel:
            told = Told().watch(tunnel)
            for _ in range(3):
                visit = await tunnel.get().over()
                assert (visit.status, bytes(visit.body)) == (status, page)
            assert len(told) == 1 and told[0].startswith("localhost:8000 refuses the visitor's Host")
            assert "--host-header rewrite" in told[0] and "host_header: rewrite" in told[0]


@pytest.mark.parametrize(
    "answer",
    [
        response(403, b"You may not see this."),
        response(400, b'{"error": "bad request"}'),
        response(404, VITE),
        response(200, WEBPACK),
        response(403, b"x" * LOOK_BYTES + VITE),
        response(403, gzip.compress(VITE), b"Content-Encoding: gzip"),
        b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["forbidden", "api", "not found", "ok", "far below", "compressed", "empty"],
)
async def test_other_answers_are_nobodys_business(answer: bytes) -> None:
    async with target_server(answering(answer)) as port:
        async with tunnel_to(Target("tcp", "127.0.0.1", port)) as tunnel:
            told = Told().watch(tunnel)
            visit = await tunnel.get().over()
            assert bytes(visit.body) == answer.split(b"\r\n\r\n", 1)[1] and told == []


async def test_a_chunked_page_in_pieces_to_a_slow_reader() -> None:
    pieces = [RAILS[i : i + 1000] for i in range(0, len(RAILS), 1000)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"
    answer = b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    async with target_server(answering(answer)) as port:
        async with tunnel_to(Target("tcp", "127.0.0.1", port), AgentSettings()) as tunnel:
            told = Told().watch(tunnel)
            visit = tunnel.get(hold=True)
            await visit.until(lambda: visit.unread)
            visit.release()
            assert bytes((await visit.over()).body) == RAILS and len(told) == 1


async def test_after_some_answers_that_were_something_else_it_looks_no_more() -> None:
    answers = [response(403, b"no")] * LOOKS + [response(403, VITE)]
    async with target_server(answering(*answers)) as port:
        async with tunnel_to(Target("tcp", "127.0.0.1", port)) as tunnel:
            told = Told().watch(tunnel)
            for _ in range(LOOKS + 1):
                await tunnel.get().over()
            assert told == []


async def test_large_uploads_and_downloads_through_the_glass() -> None:
    """A refusal with a body above the parser's bypass, by credit."""
    body = b"no" * 200_000
    async with target_server(answering(response(403, body))) as port:
        async with tunnel_to(Target("tcp", "127.0.0.1", port)) as tunnel:
            Told().watch(tunnel)
            for _ in range(2):
                visit = await tunnel.get().over()
                assert bytes(visit.body) == body
