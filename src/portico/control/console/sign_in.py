"""Signing in and out by browser.

GET  /sign-in?next=…     the form
POST /sign-in            by password → next
POST /sign-out           → /sign-in
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from portico.control import access
from portico.control.console import browser, frame
from portico.control.identity.service import Identity
from portico.errors import Problem

router = APIRouter(include_in_schema=False)

_SHOWN = frozenset({"auth.credentials_invalid", "auth.throttled", "console.form_rejected", "service.unavailable"})
_SAID = {"out": "You are signed out.", "ended": "Your session has ended. Sign in to go on."}


@router.get("/sign-in")
async def show(request: Request) -> Response:
    """The form; who is signed in already goes on at once."""
    after = frame.next_path(request.query_params.get("next", ""))
    if await browser.signed_in(request) is not None:
        return frame.to(after)
    return await _page(request, after, said=_SAID.get(request.query_params.get("said", "")))


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Sign in by password."""
    after, email = frame.next_path(""), ""
    identity: Identity = request.app.state.identity
    try:
        fields = await browser.form(request)
        after = frame.next_path(fields.get("next", ""))
        email, password = fields.get("email", "")[:254], fields.get("password", "")[:1024]
        who = access.anonymous(request)
        signed = await identity.login(who, email, password, browser.client(request), cookie=True)
    except Problem as problem:
        if problem.code not in _SHOWN:
            raise
        if problem.code == "console.form_rejected" and await browser.signed_in(request) is not None:
            # Sent twice: the first one signed in.
            return frame.to(frame.next_path((await browser.fields(request)).get("next", "")))
        return await _page(request, after, email, problem)
    response = frame.to(after)
    browser.keep_session(request, response, signed)
    return response


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End the browser's session. Done twice, or with a session that has ended, it is done all the same."""
    who = await browser.signed_in(request)
    if who is not None:
        await browser.form(request)
        identity: Identity = request.app.state.identity
        async with identity.db.transaction() as tx:
            await identity.logout(tx, who)
    response = frame.to("/sign-in?said=out")
    browser.drop(request, response, browser.SESSION)
    return response


async def _page(
    request: Request, after: str, email: str = "", problem: Problem | None = None, said: str | None = None
) -> Response:
    _, _, code = after.partition("/device?code=")
    return await frame.page(request, "sign_in.html", problem, after=after, email=email, code=code, said=said)
