"""/device in a browser without JavaScript: compare, approve; and what other sites cannot do."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.control.conftest import PASSWORD, Account
from tests.control.console.conftest import SignIn, form_token, problem_text
from tests.control.identity.mailbox import last
from tests.control.test_http import problem


async def _start(client: httpx.AsyncClient, hostname: str = "laptop") -> dict[str, Any]:
    return dict((await client.post("/v1/auth/device", json={"hostname": hostname})).json())


async def _sign_in(browser: httpx.AsyncClient, account: Account, code: str, password: str = PASSWORD) -> httpx.Response:
    page = await browser.get("/device", params={"code": code}, follow_redirects=True)
    (after,) = re.findall(r'name="next" value="([^"]+)"', page.text)
    form = {"form_token": form_token(page), "next": after, "email": account.email, "password": password}
    return await browser.post("/sign-in", data=form)


async def _poll(client: httpx.AsyncClient, started: dict[str, Any]) -> httpx.Response:
    return await client.post("/v1/auth/device/token", json={"device_code": started["device_code"]})


class TestFlow:
    @pytest.mark.parametrize(("answer", "code"), [("approve", None), ("deny", "device.denied")])
    async def test_decide(
        self, owner: Account, client: httpx.AsyncClient, browser: httpx.AsyncClient, answer: str, code: str | None
    ) -> None:
        started = await _start(client, "dev<b>box")
        signed_in = await _sign_in(browser, owner, started["user_code"])
        assert signed_in.status_code == 303
        assert signed_in.headers["location"] == f"/device?code={started['user_code']}"

        page = await browser.get(signed_in.headers["location"])
        assert page.status_code == 200
        assert started["user_code"] in page.text
        assert "dev&lt;b&gt;box" in page.text
        assert "127.0.0.1" in page.text
        problem(await _poll(client, started), 400, "device.authorization_pending")  # looking approves nothing

        form = {"form_token": form_token(page), "code": started["user_code"], "answer": answer}
        done = await browser.post("/device", data=form)
        assert done.status_code == 200
        got = await _poll(client, started)
        if code is None:
            assert got.json()["agent_key"].startswith("tnl_agt_")
        else:
            problem(got, 400, code)

    async def test_wrong_password_and_wrong_code_are_said_in_place(
        self, owner: Account, client: httpx.AsyncClient, browser: httpx.AsyncClient
    ) -> None:
        started = await _start(client)
        wrong = await _sign_in(browser, owner, started["user_code"], "wrong-Password-1")
        assert wrong.status_code == 401
        assert "E-mail or password wrong" in wrong.text
        assert started["user_code"] in wrong.text
        assert "wrong-Password-1" not in wrong.text
        await _sign_in(browser, owner, started["user_code"])
        page = await browser.get("/device", params={"code": "BBBB-BBBB"})
        assert page.status_code == 400
        assert "Unknown device code" in page.text

    async def test_guesses_by_page_count_too(self, owner: Account, browser: httpx.AsyncClient) -> None:
        await _sign_in(browser, owner, "")
        answers = [await browser.get("/device", params={"code": f"BBBB-BBB{c}"}) for c in "BCDFGHJKLMNP"]
        assert [a.status_code for a in answers] == [400] * 10 + [429] * 2
        assert "retry-after" in answers[-1].headers


class TestUnverified:
    @pytest.fixture
    def settings(self, settings: Any) -> Any:
        return replace(settings, require_verified_email=True)

    async def test_is_told_what_to_do(
        self, owner: Account, client: httpx.AsyncClient, sign_in: SignIn, app: Any
    ) -> None:
        started, browser = await _start(client), await sign_in(owner)
        page = await browser.get("/device", params={"code": started["user_code"]})
        form = {"form_token": form_token(page), "code": started["user_code"], "answer": "approve"}
        refused = await browser.post("/device", data=form)
        assert refused.status_code == 403
        assert "Follow the link in the mail" in problem_text(refused)
        letter = await last(app, owner.email, "account.verify")
        page = await browser.get(f"/verify-email?token={letter.token}", follow_redirects=True)
        await browser.post("/verify-email", data={"form_token": form_token(page)})
        assert "Device approved" in (await browser.post("/device", data=form)).text


class TestBrowserRules:
    async def test_page_headers(self, browser: httpx.AsyncClient) -> None:
        page = await browser.get("/device", follow_redirects=True)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert not re.search(
            r'<script(?! src="/static/[a-z]+\.js" defer></script>)|<style| style=| on[a-z]+=', page.text
        )
        assert not re.search(r'(?:src|href)="(?:https?:)?//', page.text)
        assert page.headers["cache-control"] == "no-store"
        assert (await browser.get("/static/console.css")).headers["content-type"].startswith("text/css")

    async def test_forms_of_other_sites(
        self, owner: Account, client: httpx.AsyncClient, browser: httpx.AsyncClient
    ) -> None:
        started = await _start(client)
        await _sign_in(browser, owner, started["user_code"])
        page = await browser.get("/device", params={"code": started["user_code"]})
        form = {"form_token": form_token(page), "code": started["user_code"], "answer": "approve"}
        for name, value in (
            ("Origin", "https://evil.example"), ("Origin", "null"), ("Origin", "http://[::1"), ("Origin", "api.test"),
            ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Site", "same-site"),
        ):  # fmt: skip
            answer = await browser.post("/device", data=form, headers={name: value})
            assert answer.status_code == 403, value
            assert "another site" in answer.text
        problem(await _poll(client, started), 400, "device.authorization_pending")

    async def test_tokens_of_another_browser_session_or_none(
        self, owner: Account, client: httpx.AsyncClient, browser: httpx.AsyncClient, connect: Any
    ) -> None:
        started = await _start(client)
        before = form_token(await browser.get("/sign-in"))
        other = form_token(await connect().get("/sign-in"))
        await _sign_in(browser, owner, started["user_code"])
        for token in (before, other, "", "0" * 64, "é"):
            form = {"form_token": token, "code": started["user_code"], "answer": "approve"}
            answer = await browser.post("/device", data=form)
            assert answer.status_code == 403, token
        problem(await _poll(client, started), 400, "device.authorization_pending")

    async def test_hostile_forms(self, owner: Account, client: httpx.AsyncClient, sign_in: SignIn) -> None:
        browser = await sign_in(owner)
        for body, kind in (
            (b"{}", "application/json"),
            (b"a=%FF", "application/x-www-form-urlencoded"),
            (b"a=%00", "application/x-www-form-urlencoded"),
            (b"&".join(b"a=1" for _ in range(100)), "application/x-www-form-urlencoded"),
            (b"\xff\x00", "application/x-www-form-urlencoded"),
            (b"--x\r\n", "multipart/form-data; boundary=x"),
        ):
            for who, path in (
                (browser, "/device"),
                (browser, "/account/sessions"),
                (client, "/sign-in"),
                (client, "/register"),
            ):
                answer = await who.post(path, content=body, headers={"Content-Type": kind})
                assert answer.status_code == 403, (path, body)
                assert "Nothing was changed" in answer.text

    async def test_the_code_is_reflected_safely(self, browser: httpx.AsyncClient) -> None:
        page = await browser.get("/device", params={"code": '"><script>BCDF'}, follow_redirects=True)
        assert "<script>" not in page.text
