"""The pieces of the demo: the sample app, the visitor, and a request that goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from portico.embedded.demo import Demo, _unchunk, fetch
from portico.embedded.sample_app import SampleApp
from portico.errors import Problem
from portico.kit.paint import Paint


@pytest.fixture
async def app() -> AsyncIterator[SampleApp]:
    made = SampleApp()
    await made.start()
    yield made
    await made.stop()


class TestSampleApp:
    async def test_json_shows_the_request(self, app: SampleApp) -> None:
        answer = await fetch("127.0.0.1", app.port, "hello.localhost", "/api/hello?nonce=n1")
        seen = json.loads(answer.body)
        assert answer.status == 200 and seen["nonce"] == "n1"
        assert seen["request"]["headers"]["host"] == "hello.localhost"
        assert app.requests == 1

    async def test_the_page_escapes_what_a_visitor_sent(self, app: SampleApp) -> None:
        answer = await fetch("127.0.0.1", app.port, "<script>x</script>", "/")
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
        assert b"&lt;script&gt;" in answer.body and b"<script>x" not in answer.body

    async def test_other_paths_and_noise(self, app: SampleApp) -> None:
        assert (await fetch("127.0.0.1", app.port, "x", "/nothing")).status == 404
        reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
        writer.write(b"not http\r\n\r\n")
        assert await reader.read() == b""
        writer.close()

    async def test_keeps_connections_open(self, app: SampleApp) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
        for _ in range(2):
            writer.write(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_connection_that_ends_without_an_answer() -> None:
    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(leave, "127.0.0.1", 0) as server:
        with pytest.raises(ValueError, match="without an answer"):
            await fetch("127.0.0.1", server.sockets[0].getsockname()[1], "hello.localhost", "/")


def test_chunked_answers_are_joined() -> None:
    assert _unchunk(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n") == b"abcde"


class Lines(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def platform(port: int) -> Any:
    relay = SimpleNamespace(http=port, https=port)
    return SimpleNamespace(host="127.0.0.1", relay=lambda _: relay, settings=SimpleNamespace(base_domain="localhost"))


async def demo_with(app: SampleApp) -> tuple[Demo, Lines]:
    lines = Lines()
    demo = Demo(Paint(False), lines)
    demo._app = app
    demo._heard("not json")
    demo._heard('{"event": "online", "name": "hello", "url": "http://hello.localhost:7080"}')
    return demo, lines


class TestRequest:
    async def test_the_apps_own_answer_counts(self, app: SampleApp) -> None:
        demo, lines = await demo_with(app)
        assert await demo.request(platform(app.port)) is True
        assert any("✓ 200" in line for line in lines)
        assert demo.url(platform(1)) == "http://hello.localhost:7080"
        assert demo.url(platform(7443), "https") == "https://hello.localhost:7443"

    async def test_somebody_elses_answer_does_not(self, app: SampleApp) -> None:
        other = SampleApp()
        await other.start()
        demo, lines = await demo_with(app)
        assert await demo.request(platform(other.port)) is False
        assert any("not the app's" in line for line in lines)
        await other.stop()

    async def test_no_answer_is_a_clear_failure(self, app: SampleApp) -> None:
        demo, _ = await demo_with(app)
        closed = SampleApp()
        await closed.start()
        await closed.stop()
        with pytest.raises(Problem) as caught:
            await demo.request(platform(closed.port))
        assert caught.value.code == "up.demo_failed"
