"""Signing in and out by browser: cookies, how long they last, where a form may lead."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from portico.control.app import create_app
from portico.kit.db import Database
from portico.kit.ids import check_token
from portico.settings import ApiSettings
from tests.control.conftest import PASSWORD, Account, MovableClock
from tests.control.console.conftest import SignIn, form_token, problem_text
from tests.control.identity.mailbox import last

SESSIONS = "/account/sessions"
HOME = "/account/security"


async def _send(browser: httpx.AsyncClient, account: Account, **more: str) -> httpx.Response:
    page = await browser.get("/sign-in")
    form = {"form_token": form_token(page), "email": account.email, "password": PASSWORD, **more}
    return await browser.post("/sign-in", data=form)


class TestForm:
    async def test_wrong_password_is_said_once_for_all_fields(self, owner: Account, browser: httpx.AsyncClient) -> None:
        answer = await _send(browser, owner, password="wrong-Password-1")
        assert answer.status_code == 401
        assert problem_text(answer).startswith("E-mail or password wrong")
        assert answer.text.count('aria-describedby="problem"') == 2
        assert "<title>Error: Sign in" in answer.text
        assert f'value="{owner.email}"' in answer.text
        assert "wrong-Password-1" not in answer.text
        assert "portico_session" not in browser.cookies

    async def test_an_unknown_address_answers_the_same(self, owner: Account, browser: httpx.AsyncClient) -> None:
        texts = []
        for email in (owner.email, "nobody@example.com"):
            answer = await _send(browser, owner, email=email, password="wrong-Password-1")
            texts.append((answer.status_code, answer.text.replace(email, "")))
        assert texts[0] == texts[1]

    async def test_throttled_tells_when(self, owner: Account, browser: httpx.AsyncClient) -> None:
        answers = [await _send(browser, owner, password="wrong-Password-1") for _ in range(11)]
        assert [a.status_code for a in answers] == [401] * 10 + [429]
        assert int(answers[-1].headers["retry-after"]) > 0
        assert problem_text(answers[-1]).startswith("Too many attempts; wait")

    async def test_who_is_signed_in_goes_on(self, owner: Account, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        assert (await browser.get("/sign-in?next=/device")).headers["location"] == "/device"

    @pytest.mark.parametrize("another", [False, True])
    async def test_signing_in_again_ends_the_session_that_this_browser_had(
        self, another: bool, owner: Account, stranger: Account, sign_in: SignIn, connect: Any
    ) -> None:
        """Of the same person, or of another on a shared machine: nobody would sign out of it any more."""
        browser, copy = await sign_in(owner), connect()
        copy.cookies.update(dict(browser.cookies))
        token = form_token(await browser.get(SESSIONS))
        form = {"form_token": token, "email": (stranger if another else owner).email, "password": PASSWORD}
        assert (await browser.post("/sign-in", data={**form, "password": "wrong-Password-1"})).status_code == 401
        assert (await copy.get(HOME)).status_code == 200
        assert (await browser.post("/sign-in", data=form)).status_code == 303
        assert (await browser.get(HOME)).status_code == 200
        assert (await copy.get(HOME)).headers["location"].startswith("/sign-in")
        assert (await owner.client.get("/v1/whoami")).status_code == 200  # a session of another program

    async def test_signing_out_leaves_no_link_behind(self, owner: Account, sign_in: SignIn, app: Any) -> None:
        browser = await sign_in(owner)
        token = (await last(app, owner.email, "account.verify")).token
        await browser.get(f"/verify-email?token={token}")
        assert "portico_link" in browser.cookies
        await browser.post("/sign-out", data={"form_token": form_token(await browser.get(SESSIONS))})
        assert not {"portico_link", "portico_session"} & set(browser.cookies)

    async def test_sent_twice_signs_in_once_and_leads_on(self, owner: Account, browser: httpx.AsyncClient) -> None:
        form = {
            "form_token": form_token(await browser.get("/sign-in")), "email": owner.email, "password": PASSWORD,
            "next": "/device",
        }  # fmt: skip
        first, second = [await browser.post("/sign-in", data=form) for _ in range(2)]
        assert [first.headers["location"], second.headers["location"]] == ["/device", "/device"]
        assert "set-cookie" not in second.headers

    async def test_where_it_leads(self, owner: Account, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        for own in ("/device?code=BCDF-GHJK", "/organizations"):
            assert (await browser.get("/sign-in", params={"next": own})).headers["location"] == own
        for other in (
            "", "https://evil.example/", "//evil.example/account", "/\\evil.example", "/account/../../evil",
            "/account/sessions\r\nX: y", "/account@evil.example", "/device?code=BCDF&next=//evil.example",
            "javascript:alert(1)", "/sign-out", "/v1/whoami",
        ):  # fmt: skip
            answer = await browser.get("/sign-in", params={"next": other})
            assert answer.headers["location"] == HOME, other

    async def test_pages_of_people_ask_who_it_is_first(self, browser: httpx.AsyncClient) -> None:
        for path in (SESSIONS, "/organizations", "/device"):
            assert (await browser.get(path)).headers["location"] == f"/sign-in?next={path}"


class TestCookie:
    async def test_what_it_is(self, owner: Account, browser: httpx.AsyncClient, db: Database) -> None:
        answer = await _send(browser, owner)
        (cookie,) = [c for c in answer.headers.get_list("set-cookie") if c.startswith("portico_session=")]
        attributes = {part.strip().lower() for part in cookie.split(";")[1:]}
        assert attributes == {"httponly", "samesite=lax", "path=/", "max-age=2592000"}  # http://: no Secure
        secret = browser.cookies["portico_session"]
        assert check_token(secret) == "bs"
        async with db.read() as reader:
            stored = await reader.fetch_all(sa.text("SELECT s::text FROM sign_in_sessions s"))
            audited = await reader.fetch_all(sa.text("SELECT a::text FROM audit_events a"))
        assert not any(secret in row[0] for row in [*stored, *audited])

    async def test_behind_https_no_other_host_can_plant_one(
        self, settings: ApiSettings, db: Database, owner: Account
    ) -> None:
        app = create_app(replace(settings, api_url="https://portico.example"), db=db)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="https://portico.example") as client,
        ):
            page = await client.get("/sign-in")
            answer = await _send(client, owner)
            for cookie in [*page.headers.get_list("set-cookie"), *answer.headers.get_list("set-cookie")]:
                name, _, rest = cookie.partition("=")
                assert name in ("__Host-portico_form", "__Host-portico_session")
                assert {"Secure", "HttpOnly", "Path=/"} <= {part.strip() for part in rest.split(";")}
                assert "domain" not in rest.lower()
            secret = client.cookies["__Host-portico_session"]
            client.cookies.clear()
            client.cookies.set("portico_session", secret)  # the plain name counts for nothing here
            assert (await client.get(SESSIONS)).status_code == 303
        assert page.headers["strict-transport-security"].startswith("max-age=")

    async def test_a_planted_one_is_replaced(self, owner: Account, stranger: Account, sign_in: SignIn) -> None:
        attacker = await sign_in(stranger)
        planted = attacker.cookies["portico_session"]
        victim = await sign_in(owner)
        victim.cookies.delete("portico_session")
        victim.cookies.set("portico_session", planted, "api.test", "/")
        await victim.post("/sign-out", data={"form_token": form_token(await victim.get(SESSIONS))})
        await _send(victim, owner)
        assert victim.cookies["portico_session"] != planted
        assert (await attacker.get(SESSIONS)).status_code == 303  # signed out with the victim's click, not signed in
        assert owner.email in (await victim.get(SESSIONS)).text

    @pytest.mark.parametrize("kind", ["key", "access", "refresh"])
    async def test_other_credentials_in_it_sign_nobody_in(
        self, owner: Account, browser: httpx.AsyncClient, kind: str
    ) -> None:
        text = {"key": (await owner.key())["key"], "access": owner.access, "refresh": owner.refresh}[kind]
        browser.cookies.set("portico_session", text)
        assert (await browser.get(SESSIONS)).status_code == 303

    async def test_it_is_no_bearer_credential(self, owner: Account, sign_in: SignIn, connect: Any) -> None:
        secret = (await sign_in(owner)).cookies["portico_session"]
        assert (await connect(secret).get("/v1/whoami")).status_code == 401

    async def test_it_slides_and_ends(
        self, owner: Account, sign_in: SignIn, clock: MovableClock, settings: ApiSettings
    ) -> None:
        browser, idle = await sign_in(owner), await sign_in(owner)
        for _ in range(5):  # five of the seven days at a time, to the bound of thirty
            clock.advance(settings.browser_idle_seconds * 5 / 7)
            assert (await browser.get(SESSIONS)).status_code == 200
        assert (await idle.get(SESSIONS)).status_code == 303
        clock.advance(settings.browser_idle_seconds * 5 / 7 + 60)
        assert (await browser.get(SESSIONS)).status_code == 303

    async def test_use_is_written_once_a_minute(
        self, owner: Account, sign_in: SignIn, clock: MovableClock, db: Database
    ) -> None:
        browser = await sign_in(owner)

        async def written() -> Any:
            async with db.read() as reader:
                return await reader.scalar(
                    sa.text("SELECT last_used_at FROM sign_in_sessions WHERE user_id = :u ORDER BY id DESC LIMIT 1"),
                    {"u": owner.user},
                )

        first = await written()
        clock.advance(59)
        await browser.get(SESSIONS)
        assert await written() == first
        clock.advance(2)
        await asyncio.gather(*(browser.get(SESSIONS) for _ in range(5)))
        assert (await written() - first).total_seconds() >= 61


class TestOut:
    async def test_ends_the_session_not_only_the_cookie(self, owner: Account, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        secret = browser.cookies["portico_session"]
        token = form_token(await browser.get(SESSIONS))
        answer = await browser.post("/sign-out", data={"form_token": token}, follow_redirects=True)
        assert "You are signed out." in answer.text
        assert "portico_session" not in browser.cookies
        browser.cookies.set("portico_session", secret)
        assert (await browser.get(SESSIONS)).status_code == 303

    async def test_twice(self, owner: Account, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        token = form_token(await browser.get(SESSIONS))
        for _ in range(2):
            answer = await browser.post("/sign-out", data={"form_token": token})
            assert answer.headers["location"] == "/sign-in?said=out"

    async def test_another_site_signs_nobody_out(self, owner: Account, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        token = form_token(await browser.get(SESSIONS))
        answer = await browser.post("/sign-out", data={"form_token": token}, headers={"Origin": "https://evil.example"})
        assert answer.status_code == 403
        assert (await browser.get(SESSIONS)).status_code == 200
