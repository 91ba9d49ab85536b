"""Links that come by mail, and asking for one.

    GET  /forgot-password            whose password is forgotten
    POST /forgot-password            mails a link, if there is such an account
    GET  /verify-email?token=…       → /verify-email, with the token in a cookie
    GET  /verify-email               what the link will do, and a button
    POST /verify-email               uses the link up
    … and so /change-email and /reset-password

Programs that look at links before people do (mail scanners, previews) open them by GET, so a GET uses nothing up; and the token
leaves the address bar, the history and every Referer with the first answer.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from fastapi import APIRouter, Request, Response

from portico.control import access
from portico.control.console import browser, frame, inputs
from portico.control.console.frame import PageRoute, identity_of
from portico.errors import Problem

router = APIRouter(include_in_schema=False, route_class=PageRoute)

#: The cookie that keeps a link's token between its first answer and the button.
LINK: Final = "portico_link"
_LINK_SECONDS: Final = 1800
_TOKEN: Final = re.compile(r"[A-Za-z0-9_]{1,128}")
_SHOWN: Final = frozenset(
    {"auth.email_taken", "auth.link_unproved", "auth.password_weak", "auth.throttled", "console.form_rejected"}
)


@dataclass(frozen=True, slots=True)
class Link:
    """A kind of link: its page, and what using it does (given the request, the token and the form's fields)."""

    path: str
    template: str
    use: Callable[[Request, str, dict[str, str]], Awaitable[str]]


async def _verify(request: Request, token: str, fields: dict[str, str]) -> str:
    password = inputs.password(fields) if "password" in fields else None
    accounts = identity_of(request).accounts
    return await accounts.verify_email(access.anonymous(request), token, await _person(request), password)


async def _change(request: Request, token: str, fields: dict[str, str]) -> str:
    accounts = identity_of(request).accounts
    return await accounts.confirm_email(access.anonymous(request), token, await _person(request))


async def _person(request: Request) -> str | None:
    person = await browser.signed_in(request)
    return person.user_id if person is not None else None


async def _reset(request: Request, token: str, fields: dict[str, str]) -> str:
    return await identity_of(request).accounts.reset(access.anonymous(request), token, inputs.password(fields))


LINKS: Final = (
    Link("/verify-email", "verify_email.html", _verify),
    Link("/change-email", "change_email.html", _change),
    Link("/reset-password", "reset_password.html", _reset),
)


def keep_link(request: Request, path: str) -> Response:
    """Away from the address that holds a token: it goes into a cookie, and the browser to ``path`` without it."""
    response = frame.to(path)
    response.headers["Referrer-Policy"] = "no-referrer"
    token = request.query_params["token"]
    browser.keep(request, response, LINK, token if _TOKEN.fullmatch(token) else "none", _LINK_SECONDS)
    return response


def _serve(link: Link) -> None:
    async def show(request: Request) -> Response:
        if "token" in request.query_params:
            return keep_link(request, link.path)
        return await _page(request, link)

    async def use(request: Request) -> Response:
        try:
            fields = await browser.form(request)
            email = await link.use(request, browser.cookie(request, LINK), fields)
        except Problem as problem:
            if problem.code == "auth.link_invalid":
                return await frame.page(request, "link_over.html", path_of_link=link.path, status=problem.status)
            if problem.code not in _SHOWN:
                raise
            return await _page(request, link, problem)
        request.state.__dict__.pop("person", None)  # a reset ends sessions
        response = await _done(request, link, email)
        browser.drop(request, response, LINK)
        return response

    router.add_api_route(link.path, show, methods=["GET"])
    router.add_api_route(link.path, use, methods=["POST"])


async def _page(request: Request, link: Link, problem: Problem | None = None) -> Response:
    if not browser.cookie(request, LINK):
        return await frame.page(request, "link_over.html", path_of_link=link.path, status=400)
    settings, identity, person = request.app.state.settings, identity_of(request), await _person(request)
    async with identity.db.read() as reader:
        own = await identity.accounts.follows_own(reader, browser.cookie(request, LINK), person)
    return await frame.page(
        request, link.template, problem, shortest=settings.password_min_length, own=own, elsewhere=person is not None
    )


async def _done(request: Request, link: Link, email: str) -> Response:
    if link.path == "/reset-password" or await browser.signed_in(request) is None:  # the password is new
        return frame.to("/sign-in?said=reset")
    return await frame.page(request, "link_done.html", path_of_link=link.path, email=email)


for _link in LINKS:
    _serve(_link)


@router.get("/forgot-password")
async def forgot(request: Request) -> Response:
    """Whose password is forgotten?"""
    return await frame.page(request, "forgot_password.html", email="", sent=False, minutes=_minutes(request))


@router.post("/forgot-password")
async def mail_reset(request: Request) -> Response:
    """Mail a link. The answer is the same for an address that nobody has."""
    fields: dict[str, str] = {}
    try:
        fields = await browser.form(request)
        email = inputs.email(fields)
        await identity_of(request).accounts.forgot(access.anonymous(request), email)
    except Problem as problem:
        if problem.code not in (*_SHOWN, "request.invalid"):
            raise
        typed = fields.get("email", "")[:254]
        return await frame.page(
            request, "forgot_password.html", problem, email=typed, sent=False, minutes=_minutes(request)
        )
    return await frame.page(request, "forgot_password.html", email=email, sent=True, minutes=_minutes(request))


def _minutes(request: Request) -> int:
    return int(request.app.state.settings.password_reset_seconds) // 60
