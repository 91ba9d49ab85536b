"""A browser without JavaScript: a client that keeps cookies and sends the forms of pages."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.control.conftest import PASSWORD, Account


def form_token(page: httpx.Response) -> str:
    """The token of the page's forms."""
    found = re.search(r'name="form_token" value="([0-9a-f]{64})"', page.text)
    assert found, page.text
    return found[1]


def problem_text(page: httpx.Response) -> str:
    """What the page announces as wrong."""
    found = re.search(r'role="alert" id="problem">(.*?)</div>', page.text, re.DOTALL)
    assert found, page.text
    return " ".join(re.sub(r"<[^>]+>", " ", found[1]).split())


@pytest.fixture
def browser(connect: Any) -> httpx.AsyncClient:
    """A browser that has been nowhere."""
    made: httpx.AsyncClient = connect()
    return made


SignIn = Callable[..., Awaitable[httpx.AsyncClient]]


@pytest.fixture
def sign_in(connect: Any) -> SignIn:
    """A browser in which an account is signed in."""

    async def make(account: Account, **where: str) -> httpx.AsyncClient:
        made: httpx.AsyncClient = connect(**where)
        page = await made.get("/sign-in")
        form = {"form_token": form_token(page), "email": account.email, "password": PASSWORD}
        answer = await made.post("/sign-in", data=form)
        assert answer.status_code == 303, answer.text
        return made

    return make
