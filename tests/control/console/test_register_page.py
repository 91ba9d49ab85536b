"""Registration by browser, and the mails that follow."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import httpx
import pytest

from portico.settings import ApiSettings
from tests.control.conftest import PASSWORD, Account
from tests.control.console.conftest import SignIn, form_token, problem_text
from tests.control.identity.mailbox import letters

FORM = {"email": "new@example.com", "organization": "New & co", "password": PASSWORD}


async def _send(browser: httpx.AsyncClient, **more: str) -> httpx.Response:
    page = await browser.get("/register")
    return await browser.post("/register", data={"form_token": form_token(page), **FORM, **more})


async def test_an_account_a_session_and_a_mail(browser: httpx.AsyncClient, app: Any) -> None:
    page = await browser.get("/register")
    form = {"form_token": form_token(page), **FORM}
    answer = await browser.post("/register", data=form)
    assert answer.headers["location"] == "/check-mail"
    page = await browser.get("/check-mail")
    assert "new@example.com" in page.text and "New &amp; co" in page.text
    again = await browser.post("/register", data=form)  # sent twice
    assert again.headers["location"] == "/check-mail"
    answer = await browser.post("/check-mail", data={"form_token": form_token(page)}, follow_redirects=True)
    assert "Another mail is under way" in answer.text
    assert [letter.topic for letter in await letters(app, "new@example.com")] == ["account.verify"] * 2
    assert (await browser.get("/register")).headers["location"] == "/account/security"


@pytest.mark.parametrize(
    ("more", "status", "field"),
    [
        ({"password": "short"}, 400, "password"),
        ({"password": FORM["email"]}, 400, "password"),
        ({"email": "nobody"}, 422, "email"),
        ({"email": "a@b, c@d.example"}, 422, "email"),
        ({"organization": " "}, 422, "organization"),
    ],
)
async def test_what_is_wrong_is_said_at_its_field(
    browser: httpx.AsyncClient, more: dict[str, str], status: int, field: str
) -> None:
    answer = await _send(browser, **more)
    assert answer.status_code == status
    (wrong,) = re.findall(r'<input id="([a-z]+)"[^>]*aria-invalid="true"', answer.text)
    assert wrong == field
    assert f'<a href="#{field}">' in answer.text
    assert re.search(rf'<input id="{field}"[^>]* autofocus', answer.text)
    assert f'value="{more.get("password", PASSWORD)}"' not in answer.text.replace(
        f'name="email" type="email" value="{FORM["email"]}"', ""
    )
    assert "portico_session" not in browser.cookies


async def test_an_address_that_is_taken(owner: Account, browser: httpx.AsyncClient) -> None:
    answer = await _send(browser, email=owner.email)
    assert answer.status_code == 409
    assert problem_text(answer).startswith("E-mail address in use")
    assert 'href="/forgot-password"' in answer.text


async def test_no_more_mails_than_a_few(owner: Account, sign_in: SignIn) -> None:
    browser = await sign_in(owner)
    token = form_token(await browser.get("/check-mail"))
    answers = [await browser.post("/check-mail", data={"form_token": token}) for _ in range(6)]
    assert [a.status_code for a in answers] == [303] * 5 + [429]


class TestClosed:
    @pytest.fixture
    def settings(self, settings: ApiSettings) -> ApiSettings:
        return replace(settings, registration_open=False)

    async def test_says_so(self, browser: httpx.AsyncClient) -> None:
        assert "<form" not in (await browser.get("/register")).text
        page = await browser.get("/sign-in")
        assert "/register" not in page.text
        answer = await browser.post("/register", data={"form_token": form_token(page), **FORM})
        assert answer.status_code == 403
