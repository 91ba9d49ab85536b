"""What signs a person in, as pages: second steps, passkeys, the password; and what asks for a proof first."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import httpx
import pytest

from portico.control.identity import operators, totp
from portico.kit.db import Database
from tests.control.conftest import PASSWORD, Account, MovableClock
from tests.control.console.conftest import SignIn, form_token, problem_text
from tests.control.identity.authenticator import Authenticator
from tests.control.test_http import problem

PAGE = "/account/security"
NEW = "short-Zebra-24"


@pytest.fixture
def settings(settings: Any) -> Any:
    from dataclasses import replace

    return replace(settings, api_url="http://api.test")


@pytest.fixture
def key() -> Authenticator:
    return Authenticator("http://api.test")


async def _post(browser: httpx.AsyncClient, path: str, **fields: str) -> httpx.Response:
    """As a form of the security page would be sent."""
    token = form_token(await browser.get(PAGE))
    return await browser.post(path, data={"form_token": token, **fields}, headers={"Referer": f"http://api.test{PAGE}"})


class App:
    """An authenticator app, on the test's clock."""

    def __init__(self, shown: str, clock: MovableClock) -> None:
        self.key, self.clock = base64.b32decode(shown + "=" * (-len(shown) % 8)), clock

    def code(self) -> str:
        self.clock.advance(totp.STEP_SECONDS)
        return totp.code(self.key, totp.step_at(self.clock.wall().timestamp()))


async def _set_up(browser: httpx.AsyncClient, clock: MovableClock) -> tuple[App, list[str]]:
    answer = await _post(browser, "/account/authenticator", act="start")
    assert answer.headers["location"] == "/account/authenticator"
    page = await browser.get("/account/authenticator")
    (shown,) = re.findall(r'class="key">([A-Z2-7 ]+)<', page.text)
    app = App(shown.replace(" ", ""), clock)
    done = await _post(browser, "/account/authenticator", act="confirm", code=app.code())
    return app, re.findall(r"<li><code>([A-Z0-9-]{19})</code></li>", done.text)


async def _first_step(browser: httpx.AsyncClient, account: Account, **more: str) -> httpx.Response:
    page = await browser.get("/sign-in")
    form = {"form_token": form_token(page), "email": account.email, "password": PASSWORD, **more}
    return await browser.post("/sign-in", data=form)


async def _second(browser: httpx.AsyncClient, **fields: str) -> httpx.Response:
    page = await browser.get("/sign-in/second")
    return await browser.post("/sign-in/second", data={"form_token": form_token(page), **fields})


async def test_a_browser_from_before_the_app_must_use_it(owner: Account, sign_in: SignIn, clock: MovableClock) -> None:
    """Who stole it, signed in by password a minute ago, cannot take the app away that was set up since."""
    stolen, mine = await sign_in(owner), await sign_in(owner)
    await _set_up(mine, clock)
    answer = await _post(stolen, "/account/authenticator", act="remove")
    assert answer.headers["location"].startswith("/account/confirm")
    assert (await owner.client.get("/v1/auth/mfa")).json()["totp"] is True


class TestSecondStep:
    async def test_by_app_and_by_recovery_code(
        self, owner: Account, sign_in: SignIn, connect: Any, clock: MovableClock
    ) -> None:
        app, codes = await _set_up(await sign_in(owner), clock)
        assert len(set(codes)) == 10
        for proof in ({"by": "otp", "code": app.code()}, {"by": "recovery", "code": codes[0].lower()}):
            browser = connect()
            first = await _first_step(browser, owner, next="/device")
            assert first.headers["location"] == "/sign-in/second?next=/device"
            assert "portico_session" not in browser.cookies
            step = browser.cookies["portico_step"]
            assert (await browser.get(PAGE)).status_code == 303, "half a sign-in opens nothing"
            wrong = await _second(browser, by=proof["by"], code="000000")
            assert wrong.status_code == 401 and 'aria-invalid="true"' in wrong.text
            form = {"form_token": form_token(wrong), "next": "/device", **proof}
            done = await browser.post("/sign-in/second", data=form)
            assert done.headers["location"] == "/device"
            twice = await browser.post("/sign-in/second", data=form)
            assert twice.headers["location"] == "/device"
            thief = connect()  # the token of the first step, and a proof that was right: both were used up
            thief.cookies.set("portico_step", step)
            late = await _second(thief, **proof)
            assert late.headers["location"].startswith("/sign-in?said=late")
            assert "portico_session" not in thief.cookies

    async def test_it_ends_after_five_minutes(
        self, owner: Account, sign_in: SignIn, connect: Any, clock: MovableClock
    ) -> None:
        app, _ = await _set_up(await sign_in(owner), clock)
        browser = connect()
        await _first_step(browser, owner)
        clock.advance(301)
        answer = await _second(browser, by="otp", code=app.code())
        assert "took longer than five minutes" in (await browser.get(answer.headers["location"])).text
        assert (await browser.get("/sign-in/second")).headers["location"].startswith("/sign-in?next=")

    async def test_codes_show_once_and_new_ones_void_them(
        self, owner: Account, sign_in: SignIn, connect: Any, clock: MovableClock
    ) -> None:
        browser = await sign_in(owner)
        _, codes = await _set_up(browser, clock)
        assert codes[0] not in (await browser.get(PAGE)).text
        again = await _post(browser, "/account/authenticator", act="confirm", code="000000")
        assert again.headers["location"] == PAGE
        assert (await browser.get("/account/authenticator")).text.count('<svg class="qr"') == 0
        new = re.findall(
            r"<li><code>([A-Z0-9-]{19})</code></li>", (await _post(browser, "/account/recovery-codes")).text
        )
        assert len(new) == 10 and not set(new) & set(codes)
        other = connect()
        await _first_step(other, owner)
        assert (await _second(other, by="recovery", code=codes[1])).status_code == 401
        assert (await _second(other, by="recovery", code=new[1])).status_code == 303

    async def test_removed(self, owner: Account, sign_in: SignIn, connect: Any, clock: MovableClock) -> None:
        browser = await sign_in(owner)
        await _set_up(browser, clock)
        answer = await _post(browser, "/account/authenticator", act="remove")
        assert answer.headers["location"] == f"{PAGE}?said=app-removed"
        assert (await _first_step(connect(), owner)).headers["location"] == PAGE


class TestPasskeys:
    async def _options(self, browser: httpx.AsyncClient, path: str, page: str = PAGE) -> Any:
        token = form_token(await browser.get(page))
        answer = await browser.post(path, data={"form_token": token})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def _add(self, browser: httpx.AsyncClient, key: Authenticator, name: str = "Blue key") -> httpx.Response:
        made = key.create(await self._options(browser, "/account/passkeys/options"))
        return await _post(browser, "/account/passkeys", credential=json.dumps(made), name=name)

    async def test_added_named_used_removed(
        self, owner: Account, sign_in: SignIn, connect: Any, key: Authenticator, clock: MovableClock
    ) -> None:
        browser = await sign_in(owner)
        assert (await self._add(browser, key)).headers["location"] == f"{PAGE}?said=passkey"
        page = await browser.get(PAGE)
        (ident,) = re.findall(r"passkey=(psk_[0-9a-z]+)", page.text)
        assert "Blue key" in page.text
        await _post(browser, "/account/passkeys/edit", passkey=ident, name="Red <key>")
        assert "Red &lt;key&gt;" in (await browser.get(f"/account/passkeys/edit?passkey={ident}")).text

        other = connect()
        signed = key.get(await self._options(other, "/sign-in/passkey/options", "/sign-in"))
        form = {
            "form_token": form_token(await other.get("/sign-in")),
            "credential": json.dumps(signed),
            "next": "/device",
        }
        done = await other.post("/sign-in/passkey", data=form)
        assert done.headers["location"] == "/device"
        thief = connect()
        replay = {**form, "form_token": form_token(await thief.get("/sign-in"))}
        assert (await thief.post("/sign-in/passkey", data=replay)).status_code == 401

        await _set_up(browser, clock)
        third = connect()
        await _first_step(third, owner)
        signed = key.get(await self._options(third, "/sign-in/second/options", "/sign-in/second"))
        assert (await _second(third, by="passkey", credential=json.dumps(signed))).status_code == 303

        assert (await _post(browser, "/account/passkeys/remove", passkey=ident)).headers["location"].endswith("removed")
        assert "Red" not in (await browser.get(PAGE)).text
        gone = await _post(browser, "/account/passkeys/remove", passkey=ident)
        assert gone.headers["location"] == PAGE

    @pytest.mark.parametrize("credential", ["", "{}", "[]", "null", '{"response": 1}', "[" * 5000])
    async def test_what_is_no_credential(self, owner: Account, sign_in: SignIn, connect: Any, credential: str) -> None:
        browser = await sign_in(owner)
        answer = await _post(browser, "/account/passkeys", credential=credential, name="x")
        assert answer.status_code in (400, 403)
        problem_text(answer)
        other = connect()
        token = form_token(await other.get("/sign-in"))
        answer = await other.post("/sign-in/passkey", data={"form_token": token, "credential": credential})
        assert answer.status_code in (401, 403)

    async def test_not_those_of_others(
        self, owner: Account, stranger: Account, sign_in: SignIn, key: Authenticator
    ) -> None:
        browser = await sign_in(owner)
        await self._add(browser, key)
        (ident,) = re.findall(r"passkey=(psk_[0-9a-z]+)", (await browser.get(PAGE)).text)
        other = await sign_in(stranger)
        for path in ("edit", "remove"):
            answer = await _post(other, f"/account/passkeys/{path}", passkey=ident, name="mine")
            assert answer.headers["location"] == PAGE
        assert "Blue key" in (await browser.get(PAGE)).text
        assert (await other.get(f"/account/passkeys/edit?passkey={ident}")).headers["location"] == PAGE

    async def test_options_are_for_our_own_pages(self, owner: Account, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        token = form_token(await browser.get(PAGE))
        for path in ("/account/passkeys/options", "/account/confirm/options", "/sign-in/passkey/options"):
            evil = {"Origin": "https://evil.example"}
            problem(await browser.post(path, data={"form_token": token}, headers=evil), 403, "console.form_rejected")
            problem(await browser.post(path, data={}), 403, "console.form_rejected")


class TestProof:
    GUARDED = ("/account/authenticator", "/account/email")
    ACTS = (
        ("/account/authenticator", {"act": "start"}),
        ("/account/authenticator", {"act": "remove"}),
        ("/account/recovery-codes", {}),
        ("/account/passkeys", {"credential": "{}", "name": "x"}),
        ("/account/passkeys/options", {}),
        ("/account/passkeys/remove", {"passkey": "psk_x"}),
        ("/account/email", {"email": "evil@example.com"}),
    )

    async def test_an_old_session_proves_it_first(self, owner: Account, sign_in: SignIn, clock: MovableClock) -> None:
        browser = await sign_in(owner)
        clock.advance(901)
        for path in self.GUARDED:
            assert (await browser.get(path)).headers["location"] == f"/account/confirm?next={path}"
        for path, fields in self.ACTS:
            answer = await _post(browser, path, **fields)
            assert answer.headers["location"] == f"/account/confirm?next={PAGE}", path
        page = await browser.get("/account/confirm?next=/account/authenticator")
        before = browser.cookies["portico_session"]
        form = {"form_token": form_token(page), "by": "password", "next": "/account/authenticator", "password": "wrong"}
        wrong = await browser.post("/account/confirm", data=form)
        assert wrong.status_code == 400 and problem_text(wrong).startswith("This does not fit")
        right = await browser.post("/account/confirm", data={**form, "password": PASSWORD})
        assert right.headers["location"] == "/account/authenticator"
        assert browser.cookies["portico_session"] != before, "the cookie of before is worth nothing"
        twice = await browser.post("/account/confirm", data={**form, "password": PASSWORD})
        assert twice.headers["location"] == "/account/authenticator"
        assert (await browser.get("/account/authenticator")).status_code == 200
        browser.cookies.clear()
        browser.cookies.set("portico_session", before)
        assert (await browser.get(PAGE)).status_code == 303

    async def test_where_there_is_an_app_the_password_is_no_proof(
        self, owner: Account, sign_in: SignIn, clock: MovableClock
    ) -> None:
        browser = await sign_in(owner)
        app, _ = await _set_up(browser, clock)
        clock.advance(901)
        page = await browser.get("/account/confirm?by=password")
        assert 'name="password"' not in page.text and 'name="code"' in page.text
        form = {"form_token": form_token(page), "by": "password", "password": PASSWORD}
        assert (await browser.post("/account/confirm", data=form)).status_code == 400
        form = {"form_token": form_token(page), "by": "otp", "code": app.code(), "next": "//evil.example"}
        assert (await browser.post("/account/confirm", data=form)).headers["location"] == PAGE

    async def test_an_operator_with_a_passkey_alone_needs_that(
        self, owner: Account, sign_in: SignIn, clock: MovableClock, key: Authenticator, db: Database
    ) -> None:
        browser = await sign_in(owner)
        token = form_token(await browser.get(PAGE))
        options = (await browser.post("/account/passkeys/options", data={"form_token": token})).json()
        await _post(browser, "/account/passkeys", credential=json.dumps(key.create(options)), name="key")
        async with db.transaction() as tx:
            await operators.grant(tx, operators.INSTALLATION, owner.user, now=clock.wall())
        assert (await browser.get("/account/email")).headers["location"] == "/account/confirm?next=/account/email"
        page = await browser.get("/account/confirm?next=/account/email")
        assert 'type="password"' not in page.text
        form = {"form_token": form_token(page), "next": "/account/email", "by": "passkey"}
        options = (await browser.post("/account/confirm/options", data=form)).json()
        done = await browser.post("/account/confirm", data={**form, "credential": json.dumps(key.get(options))})
        assert done.headers["location"] == "/account/email"
        assert (await browser.get("/account/email")).status_code == 200


class TestPassword:
    async def test_changed(self, owner: Account, sign_in: SignIn) -> None:
        browser, other = await sign_in(owner), await sign_in(owner)
        before = browser.cookies["portico_session"]
        wrong = await _post(browser, "/account/password", current="wrong", password=NEW)
        assert wrong.status_code == 400
        assert re.search(r'id="current"[^>]*aria-invalid="true"', wrong.text)
        weak = await _post(browser, "/account/password", current=PASSWORD, password="short")
        assert re.search(r'id="password"[^>]*aria-invalid="true"', weak.text)
        done = await _post(browser, "/account/password", current=PASSWORD, password=NEW)
        assert "All other sessions have ended" in (await browser.get(done.headers["location"])).text
        assert browser.cookies["portico_session"] != before
        assert (await other.get(PAGE)).status_code == 303
