"""Refusal pages and the landing page in a real browser, with their own headers (forbidden styles would leave them bare)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from portico.errors import catalogue
from portico.relay import pages
from tests.browser.chromium import browser

CODES = [code for code, spec in catalogue().items() if code.startswith("edge.") and spec.hop is not None]
HOST = "a-rather-long-name-of-a-preview.of-some-team.tunnels.example.com"

#: Text whose contrast with what is behind it is below 4.5 (WCAG 2.2, 1.4.3), with the ratio.
FAINT = """(() => {
  const parts = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const color = parts(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
  };
  return [...document.querySelectorAll('main *')]
    .filter(node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()))
    .map(node => {
      const [a, b] = [light(parts(getComputedStyle(node).color)), light(behind(node))];
      return [node.textContent.slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    }).filter(([, ratio]) => !(ratio >= 4.5));
})()"""


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[str]:
    """Every page by the path of its code, as the relay sends it, but with 200: some statuses make a browser do other things."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            code = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()[1:]
            if code in CODES:
                detail = "The local app's answer was not usable: its answer has two lengths."
                _, fields, body = pages.refusal(code, request_id="req_" + "0" * 22, html=True, host=HOST, detail=detail)
            else:
                _, fields, body = pages.landing(HOST, html=True)
            head = b"".join(b"%b: %b\r\n" % field for field in fields)
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + head + b"\r\n" + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize(("width", "dark"), [(380, True), (1280, False)])
async def test_they_fit_and_can_be_read(width: int, dark: bool) -> None:
    async with served() as url, browser() as page:
        for code in [*CODES, "landing"]:
            await page.open(f"{url}/{code}", width=width, height=760, dark=dark, script=False)
            assert await page.js("document.documentElement.scrollWidth") == width, code
            assert await page.js(FAINT) == [], code
            assert await page.js("getComputedStyle(document.querySelector('main')).maxWidth") == "680px", "styles apply"
            if code != "landing":
                assert HOST in await page.text("main p:not(.status)") and code in await page.text("footer")
        assert page.errors == []
