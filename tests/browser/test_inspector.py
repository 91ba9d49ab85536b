"""The local page in a real browser: what a developer sees and presses."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from portico.wire import frames as f
from tests.agent.harness import target_server
from tests.agent.inspecting import Inspected, inspected
from tests.agent.test_forward import local, read_request
from tests.browser.chromium import Page, browser

EVIL = '<img src=x onerror="document.title=1">'


class App:
    """The target: JSON that repeats the request, a stream, a failure."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body, _ = await read_request(reader)
            line = head.split(b"\r\n")[0].decode()
            self.seen.append((line, body))
            if "/events" in line:
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: 1\n\n"
                )
                await reader.read()
                return
            status = b"500 Oops" if "/fail" in line else b"200 OK"
            data = b'{"id":12345678901234567890,"line":%b,"evil":%b}' % (
                json.dumps(line).encode(), json.dumps(EVIL).encode(),
            )  # fmt: skip
            writer.write(
                b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % (status, len(data))
            )
            writer.write(b"Set-Cookie: sid=secret\r\n\r\n" + data)


@contextlib.asynccontextmanager
async def opened(path: str = "/", **options: object) -> AsyncIterator[tuple[Inspected, Page, App]]:
    """The page of a tunnel that served three requests, in a browser. A fault of its script or policy fails the test."""
    app = App()
    async with target_server(app) as port, inspected(local(port)) as tunnel:
        for target in (b"/first", b"/second?q=%3Cb%3E", b"/fail"):
            await tunnel.get(target, b"Authorization", b"Bearer s3cret", b"X-Evil", EVIL.encode()).over()
        await tunnel.ended()
        async with browser() as page:
            await page.open(tunnel.inspector.url + path, **options)  # type: ignore[arg-type]
            await page.until("document.querySelectorAll('#rows tr').length === 3")
            yield tunnel, page, app
            assert page.errors == []


async def listed(page: Page) -> list[str]:
    """The paths of the list, from its top."""
    return json.loads(
        await page.js("JSON.stringify([...document.querySelectorAll('#rows .path a')].map(a => a.innerText))")
    )  # type: ignore[no-any-return]


async def test_the_list_is_live() -> None:
    async with opened() as (tunnel, page, _):
        assert await listed(page) == ["/fail", "/second?q=%3Cb%3E", "/first"]
        await tunnel.get(b"/now").over()
        await page.until("document.querySelector('#rows .path a').innerText === '/now'")
        await tunnel.web.delete("/api/requests")
        await page.until("document.querySelectorAll('#rows tr').length === 0")
        assert "No requests yet" in await page.text("#empty")


async def test_keys_open_a_request_and_its_parts() -> None:
    async with opened() as (_, page, app):
        await page.key("j")
        await page.until("document.querySelector('h1')?.innerText === 'GET /fail'")
        await page.key("j")
        await page.until("document.querySelector('h1')?.innerText.startsWith('GET /second')")
        await page.key("k")
        await page.until("document.querySelector('h1')?.innerText === 'GET /fail'")
        await page.key("3")
        shown = await page.text("#panel")
        assert (
            "500 Oops" in shown
            and '"id": 12345678901234567890' in shown
            and EVIL in json.loads(json.dumps(shown)).replace('\\"', '"')
        )
        assert "secret" not in shown and "show" in shown
        await page.js("document.querySelector('.reveal').click()")
        assert "sid=secret" in await page.text("#panel")
        await page.key("2")
        shown = await page.text("#panel")
        assert EVIL in shown and "s3cret" not in shown
        await page.key("1")
        assert "Timing" in await page.text("#panel") and "[object" not in await page.text("#panel")
        await page.key("r")
        await page.until("document.querySelector('.notice')?.innerText.startsWith('Replay of')")
        assert len(app.seen) == 4 and app.seen[3][0] == app.seen[2][0]
        assert "status 500" in await page.text(".notice")
        await page.key("Escape")
        assert await page.js("document.getElementById('detail').hidden")
        assert await page.js("document.title") != "1"


async def test_edit_and_replay() -> None:
    async with opened() as (_, page, app):
        await page.key("j")
        await page.until("document.querySelector('h1')")
        await page.key("e")
        await page.js(
            "(() => { const set = (id, value) => { document.getElementById(id).value = value; };"
            "set('edit-method', 'PUT'); set('edit-path', '/new'); set('edit-body', 'grüße\\n');"
            "document.querySelector('.edit .primary').click(); })()"
        )
        await page.until("document.querySelector('h1').innerText === 'PUT /new'")
        assert app.seen[-1] == ("PUT /new HTTP/1.1", "grüße\n".encode())
        assert await page.js("document.querySelector('.notice del').innerText") == "500"


async def test_filters() -> None:
    async with opened() as (tunnel, page, _):
        await page.key("/")
        for letter in "SEC":
            await page.key(letter)
        await page.until("document.querySelectorAll('#rows tr').length === 1")
        assert await listed(page) == ["/second?q=%3Cb%3E"]
        await tunnel.get(b"/other").over()
        await tunnel.get(b"/second/again").over()
        await page.until("document.querySelectorAll('#rows tr').length === 2")
        await page.js(
            "(() => { const s = document.getElementById('status'); s.value = '5xx';"
            "s.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        await page.until("document.querySelectorAll('#rows tr').length === 0")
        assert "No request matches" in await page.text("#empty")


async def test_a_stream_grows_while_it_is_open() -> None:
    async with opened() as (tunnel, page, _):
        visit = tunnel.get(b"/events")
        await visit.until(lambda: visit.body)
        await page.until("document.querySelector('#rows tr.running .tag')?.innerText === 'sse'")
        await page.key("j")
        await page.until("document.querySelector('h1')?.innerText === 'GET /events'")
        await page.key("3")
        assert "data: 1" in await page.text("#panel")
        visit.stream.reset(1, "the visitor left")
        await page.until("document.querySelector('.facts').innerText.includes('left')")


async def test_messages_of_a_websocket() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        writer.write(b'\x81\x0a{"a":[1]}\n\x88\x02\x03\xe8')
        await reader.read()

    async with target_server(talk) as port, inspected(local(port)) as tunnel, browser() as page:
        head = [b"GET", b"/ws", b"Host", b"h", b"Upgrade", b"websocket"]
        visit = tunnel.request(head, flags=f.F_UPGRADE, end=False)
        await visit.until(lambda: visit.body)
        await page.open(f"{tunnel.inspector.url}/#{tunnel.entry().id}")
        await page.until("document.querySelector('h1')")
        await page.key("3")
        shown = await page.text(".messages")
        assert '"a": [' in shown and "close 1000" in shown
        assert page.errors == []


@pytest.mark.parametrize("width", [380, 1280])
@pytest.mark.parametrize("dark", [False, True])
async def test_it_fits(width: int, dark: bool, tmp_path: Path) -> None:
    async with opened(width=width, height=760, dark=dark) as (_, page, _app):
        assert await page.js("document.documentElement.scrollWidth") == width
        await page.key("j")
        for number in "12345":
            await page.until("document.querySelector('h1')")
            await page.key(number)
            await page.key("Escape") if number == "5" else None
            assert await page.js("document.documentElement.scrollWidth") == width, number
        await page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000


async def test_without_javascript() -> None:
    app = App()
    async with target_server(app) as port, inspected(local(port)) as tunnel:
        await tunnel.get(b"/only", b"X-Evil", EVIL.encode()).over()
        entry = await tunnel.ended()
        async with browser() as page:
            await page.open(tunnel.inspector.url, script=False)
            assert "/only" in await page.text("#rows")
            await page.open(f"{tunnel.inspector.url}/requests/{entry.id}", script=False)
            text = await page.text("article")
            assert EVIL in text and "GET /only" in text and "sid=secret" not in text


async def test_another_page_can_neither_read_nor_replay() -> None:
    async with opened() as (tunnel, page, app):
        ident = tunnel.entry().id

        async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\nConnection: close\r\n\r\nevil"
            )

        async with target_server(other) as port:
            await page.open(f"http://127.0.0.1:{port}/")
            base = f"{tunnel.inspector.url}/api/requests"
            for url, options in (
                (base, "{}"), (base, "{mode: 'no-cors'}"), (f"{base}/{ident}/replay", "{method: 'POST', mode: 'no-cors'}"),
                (base, "{method: 'DELETE'}"),
            ):  # fmt: skip
                got = await page.js(
                    f"fetch('{url}', {options}).then(r => r.text().then(t => r.type + ':' + t), e => 'refused')"
                )
                assert got in ("refused", "opaque:"), got
            await page.js(
                f"(() => {{ const f = document.createElement('form'); f.method = 'POST'; f.action = '{base}/{ident}/replay';"
                "document.body.append(f); f.submit(); })()"
            )
            await page.until("document.body.innerText.includes('inspect.origin_denied')")
        page.errors.clear()  # what the browser says of the refusals
        assert len(app.seen) == 3 and len(tunnel.recorder.entries) == 3
