"""A person's whole way, on the whole platform, in a browser: register, verify, second steps, passkey, every way in, a device."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from portico.control.identity import totp
from tests.browser.chromium import Page, browser
from tests.system.platform import Child, Up

PASSWORD = "tall-Giraffe-42"
NEW_PASSWORD = "short-Zebra-24!"


async def mailed(up: Up, to: str, topic: str) -> dict[str, Any]:
    """The mail that the worker delivered into the outbox."""
    async with asyncio.timeout(30):
        while True:
            for path in sorted((up.home / "outbox").glob("*.json")):
                found = json.loads(path.read_text(encoding="utf-8"))
                if found["recipient"] == to and found["topic"] == topic:
                    return dict(found)
            await asyncio.sleep(0.05)


async def link(up: Up, to: str, topic: str) -> str:
    """The link in it."""
    (found,) = set(re.findall(r"http://\S+\?token=\S+", (await mailed(up, to, topic))["body"]["text"]))
    return str(found)


def codes(secret: str) -> Any:
    """Codes of an authenticator app, each once: the next step's is taken too, and waited for only after that."""
    key, last = base64.b32decode(secret + "=" * (-len(secret) % 8)), 0
    while True:
        step = max(totp.step_at(time.time()), last + 1)
        last = step
        yield totp.code(key, step)


async def sign_out(page: Page) -> None:
    await page.press("Sign out")
    assert "You are signed out." in await page.text("main")


async def test_from_registration_to_a_connected_device(up: Up, tmp_path: Path) -> None:
    email = f"ann-{os.urandom(4).hex()}@example.com"
    site = up.api_url.replace("127.0.0.1", "localhost")
    async with browser() as page:
        await page.open(f"{site}/register", width=1000, height=900)
        await page.authenticator()
        await register_and_verify(page, up, email, site)
        app = await set_up_app(page)
        kept = await page.js("[...document.querySelectorAll('.codes code')].map(node => node.innerText)")
        assert len(kept) == 10
        await page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        await page.click("Copy")
        await page.until("document.querySelector('[role=status]').textContent === 'Copied.'")
        assert await page.js("navigator.clipboard.readText()") == "\n".join(kept) + "\n"
        await page.press("I have kept them")
        await page.fill({"name": "Virtual key"})
        await page.press("Add a passkey")
        assert "The passkey is added" in await page.text("main") and "Virtual key" in await page.text(".rows")
        await every_way_in(page, email, app, kept)
        await approve_device(page, up, tmp_path, email, kept)
        assert page.errors == []


async def register_and_verify(page: Page, up: Up, email: str, site: str) -> None:
    await page.fill({"email": email, "organization": "Observatory", "password": PASSWORD})
    await page.press("Create account")
    assert email in await page.text("main")
    await page.go((await link(up, email, "account.verify")).replace("127.0.0.1", "localhost"))
    assert await page.js("location.href") == f"{site}/verify-email", "the token has left the address"
    await page.press("Verify address")
    await page.press("Go on")
    assert "verified" in await page.text("#h-email ~ p")


async def set_up_app(page: Page) -> Any:
    await page.press("Set up")
    await page.click("The camera does not work?")
    app = codes((await page.text(".key")).replace(" ", ""))
    await page.fill({"code": "000000"})
    await page.press("Switch it on")
    assert await page.js("document.activeElement.getAttribute('aria-invalid')") == "true"
    await page.fill({"code": next(app)})
    await page.press("Switch it on")
    page.errors.clear()  # that the answer to the wrong code was a 400
    return app


async def every_way_in(page: Page, email: str, app: Any, kept: list[str]) -> None:
    await sign_out(page)
    await page.press("Sign in with a passkey")
    assert "Security" in await page.text("h1")
    for method in ("app", "recovery", "passkey"):
        await sign_out(page)
        await page.fill({"email": email, "password": PASSWORD})
        await page.press("Sign in")
        if method == "app":
            await page.fill({"code": next(app)})
            await page.press("Sign in")
        elif method == "recovery":
            await page.press("Use a recovery code")
            await page.fill({"code": kept[0].lower()})
            await page.press("Sign in")
        else:
            await page.press("Use a passkey")
        assert "Security" in await page.text("h1"), method
    assert "9 of 10 are left" in await page.text("main")


async def approve_device(page: Page, up: Up, folder: Path, email: str, kept: list[str]) -> None:
    """By the address that the terminal shows, where nobody is signed in: a passkey of ``localhost`` is none there."""
    config = {"config_dir": folder / "config"}
    login = Child("login", ["login", "--server", up.api_url], folder, config)
    try:
        url = login.wait_for(lambda: re.search(r"http://\S+/device\?code=\S+", login.out), 20, "address")[0]
        await page.go(url)
        assert "approve the device" in await page.text("main")
        await page.fill({"email": email, "password": PASSWORD})
        await page.press("Sign in")
        await page.press("Use a recovery code")
        await page.fill({"code": kept[1]})
        await page.press("Sign in")
        assert await page.text(".big") == url[-9:] and "Observatory" in await page.text("main")
        await page.press("Approve")
        assert "is connected to Observatory" in await page.text("main")
        assert await login.exit(20) == 0, login.tail()
        assert f"as {email} · Observatory" in login.out
    finally:
        login.end()
