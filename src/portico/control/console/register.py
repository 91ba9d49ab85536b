"""Registration by browser.

GET  /register           the form
POST /register           an account, its organization and a session → /check-mail
GET  /check-mail         that a mail with a link is under way
POST /check-mail         another one
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from portico.control import access
from portico.control.console import browser, frame, inputs
from portico.control.console.frame import PageRoute, Who, identity_of
from portico.errors import Problem

router = APIRouter(include_in_schema=False, route_class=PageRoute)

_SHOWN = frozenset(
    {
        "auth.email_taken", "auth.password_weak", "auth.registration_closed", "auth.throttled", "console.form_rejected",
        "request.invalid", "service.unavailable",
    }
)  # fmt: skip
_SAID = {"sent": "Another mail is under way."}


@router.get("/register")
async def show(request: Request) -> Response:
    """The form; who is signed in goes on at once."""
    after = frame.next_path(request.query_params.get("next", ""))
    if await browser.signed_in(request) is not None:
        return frame.to(after)
    return await _page(request, {"next": after})


@router.post("/register")
async def register(request: Request) -> Response:
    """Make an account and the organization that it owns, and sign in."""
    fields: dict[str, str] = {}
    try:
        fields = await browser.form(request)
        email, organization = inputs.email(fields), inputs.name(fields, "organization")
        who, client = access.anonymous(request), browser.client(request)
        signed = await identity_of(request).register(
            who, email, inputs.password(fields), organization, client, cookie=True
        )
    except Problem as problem:
        if problem.code not in _SHOWN:
            raise
        if problem.code == "console.form_rejected" and await browser.signed_in(request) is not None:
            return frame.to("/check-mail")  # sent twice: the first one made the account
        return await _page(request, fields, problem)
    response = frame.to("/check-mail")
    await browser.end_before(request)
    browser.keep_session(request, response, signed)
    return response


async def _page(request: Request, fields: dict[str, str], problem: Problem | None = None) -> Response:
    settings: Any = request.app.state.settings
    return await frame.page(
        request, "register.html", problem,
        email=fields.get("email", "")[:254], organization=fields.get("organization", "")[:100],
        after=frame.next_path(fields.get("next", "")), open=settings.registration_open, shortest=settings.password_min_length,
    )  # fmt: skip


@router.get("/check-mail")
async def check_mail(request: Request, who: Who) -> Response:
    """That a link is under way to the address of who is signed in."""
    return await _check_mail(request)


@router.post("/check-mail")
async def send_again(request: Request, who: Who) -> Response:
    """Mail another link."""
    try:
        await browser.form(request)
        await identity_of(request).accounts.resend(who)
    except Problem as problem:
        if problem.code == "auth.email_verified":
            return frame.to("/account/security")
        if problem.code not in ("auth.throttled", "console.form_rejected"):
            raise
        return await _check_mail(request, problem)
    return frame.to("/check-mail?said=sent")


async def _check_mail(request: Request, problem: Problem | None = None) -> Response:
    settings: Any = request.app.state.settings
    hours = settings.email_verification_seconds // 3600
    said = _SAID.get(request.query_params.get("said", ""))
    return await frame.page(
        request, "check_mail.html", problem, said=said, hours=hours, must=settings.require_verified_email
    )
