"""/device in a browser without JavaScript: sign in, compare, approve; and what other sites cannot do."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from portico.errors import Problem
from tests.control.conftest import PASSWORD, Account
from tests.control.test_http import problem


def _token(page: httpx.Response) -> str:
    found = re.search(r'name="form_token" value="([0-9a-f]{64})"', page.text)
    assert found, page.text
    return found[1]


async def _start(client: httpx.AsyncClient, hostname: str = "laptop") -> dict[str, Any]:
    return dict((await client.post("/v1/auth/device", json={"hostname": hostname})).json())


async def _sign_in(browser: httpx.AsyncClient, account: Account, code: str, password: str = PASSWORD) -> httpx.Response:
    page = await browser.get("/device", params={"code": code})
    form = {"form_token": _token(page), "code": code, "email": account.email, "password": password}
    return await browser.post("/device/sign-in", data=form)


async def _poll(client: httpx.AsyncClient, started: dict[str, Any]) -> httpx.Response:
    return await client.post("/v1/auth/device/token", json={"device_code": started["device_code"]})


@pytest.fixture
def browser(connect: Any) -> httpx.AsyncClient:
    made: httpx.AsyncClient = connect()
    return made


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

        form = {"form_token": _token(page), "code": started["user_code"], "answer": answer}
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

    async def test_sign_out(self, owner: Account, browser: httpx.AsyncClient) -> None:
        await _sign_in(browser, owner, "")
        page = await browser.get("/device")
        assert "Sign out" in page.text
        await browser.post("/device/sign-out", data={"form_token": _token(page)})
        assert "<h1>Sign in</h1>" in (await browser.get("/device")).text
        rows = (await owner.client.get("/v1/auth/sessions")).json()["data"]
        assert [row["id"] for row in rows] == [owner.session]


class TestBrowserRules:
    async def test_page_headers(self, browser: httpx.AsyncClient) -> None:
        page = await browser.get("/device")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert "<script" not in page.text
        assert not re.search(r'(?:src|href)="(?:https?:)?//', page.text)
        assert page.headers["cache-control"] == "no-store"
        assert (await browser.get("/static/console.css")).headers["content-type"].startswith("text/css")

    async def test_cookies(self, owner: Account, browser: httpx.AsyncClient) -> None:
        signed_in = await _sign_in(browser, owner, "")
        (session,) = [c for c in signed_in.headers.get_list("set-cookie") if c.startswith("portico_session=")]
        assert "HttpOnly" in session
        assert "SameSite=lax" in session
        assert "Max-Age=900" in session
        assert "Secure" not in session  # http:// in this test; with https:// it is set

    async def test_secure_behind_https(self, settings: Any, db: Any) -> None:
        from dataclasses import replace

        from portico.control.app import create_app

        app = create_app(replace(settings, api_url="https://portico.example"), db=db)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://portico.example") as client,
        ):
            page = await client.get("/device")
        assert "Secure" in page.headers["set-cookie"]
        assert page.headers["strict-transport-security"].startswith("max-age=")

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://[::1"},
            {"Origin": "api.test"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ],
    )
    async def test_forms_of_other_sites(
        self, owner: Account, client: httpx.AsyncClient, browser: httpx.AsyncClient, headers: dict[str, str]
    ) -> None:
        started = await _start(client)
        await _sign_in(browser, owner, started["user_code"])
        page = await browser.get("/device", params={"code": started["user_code"]})
        form = {"form_token": _token(page), "code": started["user_code"], "answer": "approve"}
        answer = await browser.post("/device", data=form, headers=headers)
        assert answer.status_code == 403
        assert "another site" in answer.text
        problem(await _poll(client, started), 400, "device.authorization_pending")

    async def test_tokens_of_another_browser_session_or_none(
        self, owner: Account, client: httpx.AsyncClient, browser: httpx.AsyncClient, connect: Any
    ) -> None:
        started = await _start(client)
        before = _token(await browser.get("/device"))
        other = _token(await connect().get("/device"))
        await _sign_in(browser, owner, started["user_code"])
        for token in (before, other, "", "0" * 64, "é"):
            form = {"form_token": token, "code": started["user_code"], "answer": "approve"}
            answer = await browser.post("/device", data=form)
            assert answer.status_code == 403, token
        problem(await _poll(client, started), 400, "device.authorization_pending")

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            (b"{}", "application/json"),
            (b"a=%FF", "application/x-www-form-urlencoded"),
            (b"a=%00", "application/x-www-form-urlencoded"),
            (b"&".join(b"a=1" for _ in range(100)), "application/x-www-form-urlencoded"),
            (b"\xff\x00", "application/x-www-form-urlencoded"),
            (b"--x\r\n", "multipart/form-data; boundary=x"),
        ],
    )
    async def test_hostile_forms(self, browser: httpx.AsyncClient, body: bytes, kind: str) -> None:
        for path in ("/device", "/device/sign-in", "/device/sign-out"):
            answer = await browser.post(path, content=body, headers={"Content-Type": kind})
            assert answer.status_code == 403
            assert Problem("console.form_rejected").hint[:20] in answer.text

    async def test_a_key_in_the_cookie_signs_nobody_in(self, owner: Account, browser: httpx.AsyncClient) -> None:
        browser.cookies.set("portico_session", (await owner.key())["key"])
        assert "<h1>Sign in</h1>" in (await browser.get("/device")).text

    async def test_the_code_is_reflected_safely(self, browser: httpx.AsyncClient) -> None:
        page = await browser.get("/device", params={"code": '"><script>BCDF'})
        assert "<script" not in page.text
