"""Step-up: who is signed in proves again who they are, before what a stolen session must not be enough for.

GET  /account/confirm?next=…     password, or where there is an authenticator app a code; or a passkey
POST /account/confirm            → next, with a new cookie
POST /account/confirm/options    a challenge for a passkey, for our script
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from portico.control.access import Caller, check_step_up
from portico.control.console import browser, frame
from portico.control.console.frame import PageRoute, Who, identity_of
from portico.control.console.sign_in import passkeys_here, proof_of
from portico.errors import Problem

router = APIRouter(include_in_schema=False, route_class=PageRoute)

_SHOWN = frozenset({"auth.proof_invalid", "auth.throttled", "console.form_rejected"})


@router.get("/account/confirm")
async def show(request: Request, who: Who) -> Response:
    """The page, by the method that was asked for, or the first there is."""
    return await _page(
        request, frame.next_path(request.query_params.get("next", "")), request.query_params.get("by", "")
    )


@router.post("/account/confirm")
async def confirm(request: Request, who: Who) -> Response:
    """Note the proof; the cookie of before ends with it."""
    after, by = frame.next_path(""), ""
    identity = identity_of(request)
    try:
        fields = await browser.form(request)
        after, by = frame.next_path(fields.get("next", "")), fields.get("by", "")
        await identity.step_up.prove(who, proof_of(by, fields))
    except Problem as problem:
        if problem.code not in _SHOWN:
            raise
        if problem.code == "console.form_rejected" and _is_recent(request, who):
            # Sent twice: the first one proved it, and changed the cookie.
            return frame.to(frame.next_path((await browser.fields(request)).get("next", "")))
        return await _page(request, after, by, problem)
    response = frame.to(after)
    await renew(request, response, who)
    return response


async def renew(request: Request, response: Response, who: Caller) -> None:
    """Give the browser a new cookie for its session; the one before ends."""
    identity = identity_of(request)
    async with identity.db.transaction() as tx:
        secret = await identity.browsers.renew(tx, who)
    browser.keep(request, response, browser.SESSION, secret, identity.settings.browser_max_seconds)


@router.post("/account/confirm/options")
async def options(request: Request, who: Who) -> Response:
    """A challenge for the person's passkeys."""
    await browser.form(request)
    identity = identity_of(request)
    async with identity.db.transaction() as tx:
        return JSONResponse(await identity.step_up.passkey_options(tx, who))


def _is_recent(request: Request, who: Caller) -> bool:
    state = request.app.state
    try:
        check_step_up(who, state.clock.wall(), state.settings.step_up_seconds)
    except Problem:
        return False
    return True


async def _page(request: Request, after: str, by: str, problem: Problem | None = None) -> Response:
    who = await browser.signed_in(request)
    assert who is not None
    identity = identity_of(request)
    async with identity.db.read() as reader:
        factors = await identity.factors.status(reader, who)
    # A password is no second factor: for whoever needs one (`check_step_up`) it would lead back to this page.
    password = ["password"] if factors["password"] and not who.second_factor else []
    methods = ["otp"] if factors["totp"] else password
    if factors["totp"] and factors["recovery_codes"]:
        methods.append("recovery")
    if factors["passkeys"] and passkeys_here(request):
        methods.append("passkey")
    by = by if by in methods else methods[0] if methods else ""
    wrong = ("password" if by == "password" else "code") if problem and problem.code == "auth.proof_invalid" else None
    return await frame.page(
        request, "confirm.html", problem, wrong=wrong, script=True, after=after, by=by, methods=methods
    )
