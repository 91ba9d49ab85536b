"""Chromium without a window, driven by its own protocol (CDP): what a browser test needs, and no more."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


def program() -> str:
    """The browser; skips loudly without one, and fails where skips are forbidden."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        why = "NO CHROMIUM: browser tests need one (apt-get install chromium)"
        if os.environ.get("PORTICO_REQUIRE_ALL"):
            pytest.fail(why)
        pytest.skip(why)
    return found


class Page(WSListener):  # type: ignore[misc]
    """One tab."""

    def __init__(self) -> None:
        super().__init__()
        self.transport: WSTransport
        self.errors: list[str] = []
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        message = json.loads(frame.get_payload_as_bytes())
        method, told = message.get("method"), message.get("params", {})
        if "id" in message:
            waiting = self._waiting.pop(message["id"])
            if not waiting.done():
                waiting.set_result(message)
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    async def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol."""
        self._number += 1
        waiting = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        message = {"id": self._number, "method": method, "params": params}
        self.transport.send(WSMsgType.TEXT, json.dumps(message).encode())
        answer = await asyncio.wait_for(waiting, 30)
        assert "error" not in answer, answer
        return answer["result"]

    async def open(
        self, url: str, width: int = 1280, height: int = 800, dark: bool = False, script: bool = True
    ) -> None:
        """Go to ``url`` and wait until it is loaded."""
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Emulation.setScriptExecutionDisabled", value=not script)
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def js(self, code: str) -> Any:
        """The value of an expression (of a promise too)."""
        answer = await self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, code: str, limit: float = 30.0) -> None:
        """Wait until an expression holds."""
        async with asyncio.timeout(limit):
            while not await self.js(f"Boolean({code})"):
                await asyncio.sleep(0.05)

    async def text(self, selector: str) -> str:
        return str(await self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def key(self, key: str) -> None:
        """Press and release one key."""
        text = {"text": key} if len(key) == 1 else {}
        if key == "Enter":
            text = {"text": "\r"}
        code = {"Escape": 27, "Enter": 13, "Tab": 9}.get(key, ord(key[0].upper()))
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    async def go(self, url: str) -> None:
        """Go on to ``url`` in the window as it is."""
        await self.leaving(self.call("Page.navigate", url=url))

    async def leaving(self, act: Awaitable[Any], limit: float = 30.0) -> None:
        """Do ``act`` and wait until another page is there and loaded."""
        await self.js("window.before = true")
        await act
        async with asyncio.timeout(limit):
            while not await self._loaded():
                await asyncio.sleep(0.02)

    async def _loaded(self) -> bool:
        # In the moment between two pages an expression has no world to run in.
        answer = await self.call(
            "Runtime.evaluate", expression="!window.before && document.readyState === 'complete'", returnByValue=True
        )
        return bool(answer["result"].get("value"))

    async def fill(self, fields: dict[str, str]) -> None:
        """Type into the fields of these names that can be seen."""
        for name, value in fields.items():
            where = json.dumps(f"[name={json.dumps(name)}]:not([type=hidden])")
            assert await self.js(f"Boolean(document.querySelector({where}))"), f"there is no field {name}"
            await self.js(f"document.querySelector({where}).select()")
            await self.call("Input.insertText", text=value)

    async def press(self, label: str) -> None:
        """Press the button or link with this label that can be seen, and wait for the page that it leads to."""
        await self.leaving(self.click(label))

    async def click(self, label: str, times: int = 1) -> None:
        """Click what has this label and can be seen, with a mouse; twice as in a double click."""
        where = await self.js(
            "(() => { const found = [...document.querySelectorAll('button, a, summary')].find(node =>"
            f" node.innerText.trim() === {json.dumps(label)} && node.checkVisibility());"
            "if (!found) return null; found.scrollIntoView({block: 'center'}); const box = found.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        assert where is not None, f"there is no {label!r} on {await self.text('body')!r}"
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    async def authenticator(self) -> str:
        """Plug a virtual authenticator in whose user is always there and verified; its id."""
        await self.call("WebAuthn.enable")
        options = {
            "protocol": "ctap2", "transport": "internal", "hasResidentKey": True, "hasUserVerification": True,
            "isUserVerified": True, "automaticPresenceSimulation": True,
        }  # fmt: skip
        made = await self.call("WebAuthn.addVirtualAuthenticator", options=options)
        return str(made["authenticatorId"])

    async def screenshot(self, path: Path) -> None:
        """What the window shows, as a PNG."""
        got = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(got["data"]))


@contextlib.asynccontextmanager
async def browser(*flags: str) -> AsyncIterator[Page]:
    """A tab of a browser of its own, started with ``flags`` too."""
    with tempfile.TemporaryDirectory(prefix="ptest-chromium-", ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            program(), *FLAGS, *flags, f"--user-data-dir={folder}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            page = await _connect(Path(folder))
            yield page
            page.transport.disconnect()
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii") if path.exists() else ""


async def _connect(folder: Path) -> Page:
    import httpx

    async with asyncio.timeout(30):
        # The file is there before it is written.
        while not (said := _read(folder / "DevToolsActivePort").split()):
            await asyncio.sleep(0.05)
        port = said[0]
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                tabs = (await client.get(f"http://127.0.0.1:{port}/json/list")).json()
                found = [tab for tab in tabs if tab["type"] == "page"]
                if found:
                    break
                await asyncio.sleep(0.05)
    _, page = await ws_connect(Page, found[0]["webSocketDebuggerUrl"], max_frame_size=1 << 26)
    return page
