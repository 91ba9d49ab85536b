"""The console's pages in a real browser: no rule of theirs is broken, they fit, they can be read and reached by keyboard."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import sqlalchemy as sa

from tests.browser.chromium import Page, browser
from tests.browser.site import Site, site
from tests.browser.test_refusals import FAINT

PASSWORD = "tall-Giraffe-42"
EMAIL = "ann@example.com"

#: Fields without a label, and what can be pressed without a name.
NAMELESS = """[...document.querySelectorAll('input:not([type=hidden]), button, a')]
  .filter(node => node.checkVisibility() && !(node.labels?.length || node.innerText?.trim() || node.getAttribute('aria-label')))
  .map(node => node.outerHTML)"""

PUBLIC = (
    "/",
    "/sign-in",
    "/register",
    "/forgot-password",
    "/verify-email?token=x",
    "/reset-password?token=x",
    "/nowhere",
)
OWN = (
    "/check-mail", "/account/security", "/account/sessions", "/account/confirm", "/account/email",
    "/account/authenticator", "/organizations", "/device", "/device?code=BBBB-BBBB",
)  # fmt: skip


@contextlib.asynccontextmanager
async def opened(database_url: str) -> AsyncIterator[tuple[Site, Page]]:
    """The site with one account, and a browser. A fault of a script or a rule that is broken fails the test."""
    async with site(database_url) as here, browser() as page:
        async with httpx.AsyncClient(base_url=here.url) as client:
            body = {"email": EMAIL, "password": PASSWORD, "organization": "Observatory"}
            answer = await client.post("/v1/auth/register", json=body)
            assert answer.status_code in (201, 409), answer.text
        yield here, page
        faults = [fault for fault in page.errors if "the server responded with a status of 4" not in fault]
        assert faults == []


async def sign_in(page: Page, here: Site, **options: Any) -> None:
    await page.open(f"{here.url}/sign-in", **options)
    await page.fill({"email": EMAIL, "password": PASSWORD})
    await page.press("Sign in")
    assert "Security" in await page.text("h1")


async def test_they_fit_and_can_be_read(database_url: str) -> None:
    async with opened(database_url) as (here, page):
        for paths in (PUBLIC, OWN):
            for width, dark in ((380, True), (640, False)):  # 640: 1280 at 200 %
                for path in paths:
                    await page.open(here.url + path, width=width, height=760, dark=dark)
                    assert await page.js("document.documentElement.scrollWidth") == width, path
                    assert await page.js(FAINT) == [], path
                    assert await page.js(NAMELESS) == [], path
                    landmarks = "[...document.querySelectorAll('main, h1')].map(node => node.localName).join()"
                    assert await page.js(landmarks) == "main,h1", path
            if paths is PUBLIC:
                await sign_in(page, here)


async def test_by_keyboard_alone(database_url: str) -> None:
    async with opened(database_url) as (here, page):
        await page.open(f"{here.url}/sign-in")
        assert await page.js("document.activeElement.id") == "email"
        await page.call("Input.insertText", text=EMAIL)
        await page.key("Tab")  # to "Forgotten?"
        await page.key("Tab")
        assert await page.js("document.activeElement.id") == "password"
        await page.call("Input.insertText", text="wrong")
        await page.leaving(page.key("Enter"))
        assert await page.js("document.activeElement.id") == "password", "the address is there, the password is due"
        assert await page.js("document.getElementById('problem').getAttribute('role')") == "alert"
        await page.call("Input.insertText", text=PASSWORD)
        await page.leaving(page.key("Enter"))
        assert await page.js("location.pathname") == "/account/security"
        await page.key("Tab")
        assert await page.js("document.activeElement.innerText") == "Skip to content"
        await page.key("Enter")
        await page.until("document.activeElement.id === 'main'")


async def test_without_javascript(database_url: str) -> None:
    async with opened(database_url) as (here, page):
        await page.open(f"{here.url}/register", script=False)
        email = "without@example.com"
        await page.fill({"email": email, "organization": "Plain", "password": PASSWORD})
        await page.press("Create account")
        assert email in await page.text("main")
        await page.press("Go on")
        assert not await page.js("document.getElementById('passkey').checkVisibility()")
        assert "Adding one needs JavaScript" in await page.text("main")
        await page.press("Set up")
        assert await page.js("document.querySelector('svg.qr').getBoundingClientRect().width") > 150
        await page.press("Sign out")
        assert not await page.js("document.getElementById('passkey').checkVisibility()")
        await page.fill({"email": email, "password": PASSWORD})
        await page.press("Sign in")
        await page.press("Sessions")
        assert "this browser" in await page.text("main")


async def test_sent_twice_and_back(database_url: str) -> None:
    async with opened(database_url) as (here, page):
        await page.open(f"{here.url}/sign-in?next=/account/sessions")
        await page.fill({"email": EMAIL, "password": PASSWORD})
        twice = (
            "(form => { form.requestSubmit(); setTimeout(() => form.requestSubmit(), 60); })"
            "(document.querySelector('main form'))"
        )
        await page.leaving(page.js(twice))
        await page.until("location.pathname === '/account/sessions'")
        assert "Sessions" in await page.text("h1")
        before = await page.js("document.querySelectorAll('.rows li').length")
        await page.leaving(page.js("history.back()"))
        assert await page.js("location.pathname") != "/sign-in", "no stale form comes back"
        await page.go(f"{here.url}/account/sessions")
        assert await page.js("document.querySelectorAll('.rows li').length") == before
        await page.go(f"{here.url}/account/confirm?next=/account/email")
        await page.fill({"password": PASSWORD})
        began = datetime.now(UTC)
        await page.js(twice)  # the answer to the first replaces the cookie
        await page.until("location.pathname === '/account/email' && document.readyState === 'complete'")
        async with here.app.state.db.read() as reader:
            proofs = sa.text("SELECT count(*) FROM audit_events WHERE action = 'session.step_up' AND at > :since")
            assert await reader.scalar(proofs, {"since": began}) == 1
        await page.press("Sign out")
        await page.leaving(page.js("history.back()"))
        await page.until("location.pathname === '/sign-in'")  # nothing of the account is in the cache


async def test_another_site_gets_nowhere(database_url: str) -> None:
    async def evil(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: 4\r\n\r\n"
        writer.write(head + b"evil")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(evil, "127.0.0.1", 0)
    async with server, opened(database_url) as (here, page):
        await sign_in(page, here)
        await page.press("Sessions")
        token = await page.js("document.querySelector('[name=form_token]').value")
        before = await page.js("document.querySelectorAll('.rows li').length")
        assert before > 1, "there is something to end"
        for host in ("127.0.0.1", "localhost"):  # another site, and the same site with another origin
            other = f"http://{host}:{server.sockets[0].getsockname()[1]}/"
            fields = {"form_token": token, "session": "others"}
            for path in ("/account/sessions", "/sign-out", "/account/authenticator"):
                await page.open(other)
                sent = (
                    "((path, fields) => { const form = document.createElement('form'); form.method = 'POST'; form.action = path;"
                    "for (const [name, value] of Object.entries(fields)) { const input = document.createElement('input');"
                    "input.name = name; input.value = value; form.append(input); } document.body.append(form); form.submit(); })"
                    f"({json.dumps(here.url + path)}, {json.dumps(fields)})"
                )
                await page.leaving(page.js(sent))
                # The same site (another port of this host) is refused by its origin; from another site no cookie comes along, and
                # whoever is signed in lands on a page that shows something, as by any link.
                said = await page.text("body")
                shows = await page.js("location.pathname") in ("/sign-in", "/account/security")
                assert "sent by another site" in said if host == "localhost" else shows, said
            await page.open(other)
            framed = (
                "new Promise(done => { const frame = document.createElement('iframe');"
                f"frame.src = '{here.url}/account/security';"
                "frame.onload = () => { let seen; try { seen = frame.contentDocument.body.innerText } catch { seen = 'refused' }"
                " done(seen) }; document.body.append(frame) })"
            )
            assert await page.js(framed) in ("refused", "")
        page.errors.clear()  # what the browser says of the refusals
        await page.open(f"{here.url}/account/sessions")
        assert await page.js("document.querySelectorAll('.rows li').length") == before
        await page.press("Security")
        assert await page.js("document.querySelector('#h-app .tag').innerText") == "off"
