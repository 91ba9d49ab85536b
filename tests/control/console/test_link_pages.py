"""Links that came by mail: looked at by machines, used by a button, once."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from portico.control.console.links import LINKS
from portico.kit.ids import new_token
from tests.control.conftest import PASSWORD, Account
from tests.control.console.conftest import SignIn, form_token, problem_text
from tests.control.identity.mailbox import last, letters

NEW = "short-Zebra-24"


async def _reset_token(browser: httpx.AsyncClient, app: Any, email: str) -> str:
    page = await browser.get("/forgot-password")
    answer = await browser.post("/forgot-password", data={"form_token": form_token(page), "email": email})
    assert answer.status_code == 200
    return (await last(app, email, "account.reset")).token


async def test_opening_a_link_uses_nothing_up_and_hides_it(
    owner: Account, connect: Any, sign_in: SignIn, app: Any
) -> None:
    token = (await last(app, owner.email, "account.verify")).token
    for _ in range(2):  # a mail scanner, and its second look
        scanner = connect()
        page = await scanner.get(f"/verify-email?token={token}", follow_redirects=True)
        assert page.url.query == b""
        assert token not in page.text
    browser = await sign_in(owner)
    first = await browser.get(f"/verify-email?token={token}")
    assert first.status_code == 303
    assert first.headers["location"] == "/verify-email"
    assert first.headers["referrer-policy"] == "no-referrer"
    assert first.headers["cache-control"] == "no-store"
    (cookie,) = first.headers.get_list("set-cookie")
    assert {"HttpOnly", "SameSite=lax", "Max-Age=1800"} <= {part.strip() for part in cookie.split(";")}
    form = {"form_token": form_token(await browser.get("/verify-email"))}
    done = await browser.post("/verify-email", data=form)
    assert "Address verified" in done.text and owner.email in done.text
    assert "portico_link" not in browser.cookies
    again = await browser.post("/verify-email", data=form)  # the back button, and once more
    assert again.status_code == 400
    assert "This link is over" in again.text


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.path[1:])
async def test_a_link_that_is_none(browser: httpx.AsyncClient, link: Any) -> None:
    bare = await browser.get(link.path)
    assert bare.status_code == 400 and "This link is over" in bare.text
    for token in ("x" * 500, "€", "a\r\nSet-Cookie: b=c", '";', "", new_token("ev"), new_token("pr")):
        first = await browser.get(link.path, params={"token": token})
        assert first.status_code == 303 and len(first.headers.get_list("set-cookie")) == 1
        assert (await browser.get(link.path)).status_code == 200
        form = {"form_token": form_token(await browser.get("/sign-in")), "password": NEW}
        answer = await browser.post(link.path, data=form)
        assert answer.status_code == 400 and "This link is over" in answer.text


async def test_who_is_not_signed_in_signs_in_or_takes_the_account_over(
    owner: Account, stranger: Account, browser: httpx.AsyncClient, sign_in: SignIn, app: Any
) -> None:
    token = (await last(app, owner.email, "account.verify")).token
    other = await sign_in(stranger)
    page = await other.get(f"/verify-email?token={token}", follow_redirects=True)
    assert "You are signed in to another one" in page.text and "Verify address</button>" not in page.text
    page = await browser.get(f"/verify-email?token={token}", follow_redirects=True)
    assert 'href="/sign-in?next=/verify-email"' in page.text
    refused = await browser.post("/verify-email", data={"form_token": form_token(page)})  # the button of another page
    assert (refused.status_code, "Not signed in" in problem_text(refused)) == (403, True)
    # Signed in, the browser comes back, and has the link still.
    page = await browser.get("/sign-in?next=/verify-email")
    form = {"form_token": form_token(page), "email": owner.email, "password": PASSWORD, "next": "/verify-email"}
    page = await browser.post("/sign-in", data=form, follow_redirects=True)
    assert "Verify address</button>" in page.text
    # Somebody who reads the mail and did not make the account.
    page = await other.get("/verify-email")
    taken = await other.post("/verify-email", data={"form_token": form_token(page), "password": NEW})
    assert taken.status_code == 303 or "Address verified" in taken.text
    page = await browser.get("/account/security")
    assert page.status_code == 303 and page.headers["location"].startswith("/sign-in")


async def test_another_site_cannot_use_a_link_that_is_open(owner: Account, sign_in: SignIn, app: Any) -> None:
    browser = await sign_in(owner)
    token = (await last(app, owner.email, "account.verify")).token
    page = await browser.get(f"/verify-email?token={token}", follow_redirects=True)
    answer = await browser.post(
        "/verify-email", data={"form_token": form_token(page)}, headers={"Origin": "https://evil.example"}
    )
    assert answer.status_code == 403
    assert "Address verified" in (await browser.post("/verify-email", data={"form_token": form_token(page)})).text


class TestPassword:
    async def test_set_a_new_one(self, owner: Account, browser: httpx.AsyncClient, sign_in: SignIn, app: Any) -> None:
        elsewhere = await sign_in(owner)
        token = await _reset_token(browser, app, owner.email)
        page = await browser.get(f"/reset-password?token={token}", follow_redirects=True)
        weak = await browser.post("/reset-password", data={"form_token": form_token(page), "password": "short"})
        assert weak.status_code == 400 and 'aria-invalid="true"' in weak.text
        done = await browser.post(
            "/reset-password", data={"form_token": form_token(page), "password": NEW}, follow_redirects=True
        )
        assert "Your password is set" in done.text
        assert (await elsewhere.get("/account/security")).status_code == 303
        form = {"form_token": form_token(done), "email": owner.email, "password": PASSWORD}
        assert (await browser.post("/sign-in", data=form)).status_code == 401
        assert (await browser.post("/sign-in", data={**form, "password": NEW})).status_code == 303

    async def test_who_exists_does_not_show(self, owner: Account, browser: httpx.AsyncClient, app: Any) -> None:
        texts = []
        for email in (owner.email, "nobody@example.com"):
            page = await browser.get("/forgot-password")
            answer = await browser.post("/forgot-password", data={"form_token": form_token(page), "email": email})
            texts.append((answer.status_code, answer.text.replace(email, "").replace(form_token(page), "")))
        assert texts[0] == texts[1]
        assert await letters(app, "nobody@example.com") == []

    async def test_no_address(self, browser: httpx.AsyncClient) -> None:
        page = await browser.get("/forgot-password")
        answer = await browser.post("/forgot-password", data={"form_token": form_token(page), "email": "x"})
        assert answer.status_code == 422
        assert problem_text(answer).startswith("This is not an e-mail address")


async def test_another_address(owner: Account, sign_in: SignIn, connect: Any, app: Any) -> None:
    browser = await sign_in(owner)
    page = await browser.get("/account/email")
    form = {"form_token": form_token(page), "email": f"new-{owner.email}"}
    answer = await browser.post("/account/email", data=form, follow_redirects=True)
    assert "We sent a link" in answer.text and owner.email in answer.text
    token = (await last(app, form["email"], "account.change_email")).token
    other = connect()
    page = await other.get(f"/change-email?token={token}", follow_redirects=True)
    assert "Change address</button>" not in page.text and 'href="/sign-in?next=/change-email"' in page.text
    page = await browser.get(f"/change-email?token={token}", follow_redirects=True)
    done = await browser.post("/change-email", data={"form_token": form_token(page)})
    assert f"<strong>{form['email']}</strong>" in done.text
    assert form["email"] in (await browser.get("/account/security")).text
