"""An invitation opened in a browser: by a new person, by who it is for, by somebody else; once."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.control.conftest import PASSWORD, Account
from tests.control.console.conftest import SignIn, form_token
from tests.control.identity.mailbox import last

NEW = "new.person@example.com"


async def _invited(owner: Account, app: Any, email: str) -> str:
    answer = await owner.client.post("/v1/org/invitations", json={"email": email, "role": "developer"})
    assert answer.status_code == 201, answer.text
    return (await last(app, email, "organization.invitation")).token


async def _open(browser: httpx.AsyncClient, token: str) -> httpx.Response:
    first = await browser.get(f"/invitation?token={token}")
    assert (first.headers["location"], first.headers["referrer-policy"]) == ("/invitation", "no-referrer")
    return await browser.get("/invitation")


async def _members(owner: Account) -> list[str]:
    rows = (await owner.client.get("/v1/org/members")).json()["data"]
    return [row["user"]["email"] for row in rows]


async def test_a_new_person_joins_with_a_password(owner: Account, browser: httpx.AsyncClient, app: Any) -> None:
    page = await _open(browser, await _invited(owner, app, NEW))
    assert "Join Acme" in page.text and owner.email in page.text and f'value="{NEW}"' in page.text
    assert NEW not in await _members(owner), "looking joins nothing"
    weak = await browser.post("/invitation", data={"form_token": form_token(page), "password": "short"})
    assert weak.status_code == 400 and 'aria-invalid="true"' in weak.text
    form = {"form_token": form_token(page), "password": PASSWORD, "email": "evil@example.com"}
    done = await browser.post("/invitation", data=form, follow_redirects=True)
    assert "You are a member now" in done.text and "you are developer" in done.text
    assert NEW in await _members(owner)
    twice = await browser.post("/invitation", data=form)
    assert twice.headers["location"] == "/organizations"


async def test_who_it_is_for_joins_and_lands_there(
    owner: Account, stranger: Account, sign_in: SignIn, app: Any
) -> None:
    browser = await sign_in(stranger)
    page = await _open(browser, await _invited(owner, app, stranger.email))
    assert f"Join as {stranger.email}" in page.text and "password" not in page.text
    evil = {"Origin": "https://evil.example"}
    assert (await browser.post("/invitation", data={"form_token": form_token(page)}, headers=evil)).status_code == 403
    assert stranger.email not in await _members(owner)
    done = await browser.post("/invitation", data={"form_token": form_token(page)}, follow_redirects=True)
    assert "You are a member now" in done.text and "you are developer" in done.text and "you are owner" in done.text
    assert stranger.email in await _members(owner)


async def test_somebody_else_changes_accounts_first(
    owner: Account, stranger: Account, sign_in: SignIn, app: Any
) -> None:
    browser = await sign_in(stranger)
    page = await _open(browser, await _invited(owner, app, "else.where@example.com"))
    assert "is for <strong>else.where@example.com" in page.text
    forced = await browser.post("/invitation", data={"form_token": form_token(page)})
    assert "is for <strong>else.where@example.com" in forced.text
    form = {"form_token": form_token(page), "next": "/invitation"}
    out = await browser.post("/sign-out", data=form, follow_redirects=True)
    assert "Create account and join" in out.text
    assert stranger.email not in await _members(owner)


async def test_an_address_with_an_account_signs_in_first(
    owner: Account, stranger: Account, browser: httpx.AsyncClient, app: Any
) -> None:
    page = await _open(browser, await _invited(owner, app, stranger.email))
    taken = await browser.post("/invitation", data={"form_token": form_token(page), "password": PASSWORD})
    assert taken.status_code == 409
    page = await browser.get("/sign-in?next=/invitation")
    form = {"form_token": form_token(page), "email": stranger.email, "password": PASSWORD, "next": "/invitation"}
    done = await browser.post("/sign-in", data=form, follow_redirects=True)
    assert f"Join as {stranger.email}" in done.text


@pytest.mark.parametrize("state", ["revoked", "used", "none"])
async def test_over(owner: Account, browser: httpx.AsyncClient, connect: Any, app: Any, state: str) -> None:
    token = "tnl_inv_nonsense"
    if state != "none":
        token = await _invited(owner, app, f"{state}@example.com")
        page = await _open(browser, token)
        if state == "used":
            await browser.post("/invitation", data={"form_token": form_token(page), "password": PASSWORD})
        else:
            (row,) = (await owner.client.get("/v1/org/invitations")).json()["data"]
            await owner.client.delete(f"/v1/org/invitations/{row['id']}")
    late = await _open(connect(), token)
    assert late.status_code in (400, 404, 409, 410)
    assert "This link is over" in late.text and "Ask whoever invited you" in late.text
