"""Signing in and out by browser.

    GET  /sign-in?next=…             the form
    POST /sign-in                    by password → next, or → /sign-in/second
    GET  /sign-in/second             the second step: a code, a recovery code, a passkey
    POST /sign-in/second             → next
    POST /sign-in/second/options     a challenge for a passkey, for our script
    POST /sign-in/passkey            without name or password → next
    POST /sign-in/passkey/options    a challenge, for our script
    POST /sign-out                   → /sign-in

Between the two steps a cookie of five minutes holds what proves the first; it opens nothing by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from portico.control import access
from portico.control.console import browser, frame, inputs
from portico.control.console.frame import PageRoute, identity_of
from portico.control.console.links import LINK
from portico.control.identity.passkeys import site
from portico.control.identity.proofs import Proof
from portico.control.identity.second_step import SecondStep
from portico.control.identity.sign_in import SignedIn
from portico.errors import Problem

router = APIRouter(include_in_schema=False, route_class=PageRoute)

#: The cookie between the steps: the token of the first, a dot, the methods that are there for the second.
STEP: Final = "portico_step"
_METHODS: Final = ("otp", "recovery", "passkey")
_SHOWN: Final = frozenset(
    {
        "auth.credentials_invalid", "auth.passkey_invalid", "auth.second_step_invalid", "auth.throttled",
        "console.form_rejected", "passkey.unavailable", "service.unavailable",
    }
)  # fmt: skip
_SAID: Final[Mapping[str, str]] = {
    "out": "You are signed out.",
    "late": "That took longer than five minutes. Sign in again.",
    "reset": "Your password is set. Sign in with it.",
}


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
    try:
        fields = await browser.form(request)
        after, email = frame.next_path(fields.get("next", "")), fields.get("email", "")[:254]
        who, client = access.anonymous(request), browser.client(request)
        found = await identity_of(request).login(who, email, inputs.password(fields), client, cookie=True)
    except Problem as problem:
        return await _refused(request, problem) or await _page(request, after, email, problem)
    if isinstance(found, SecondStep):
        response = frame.to(f"/sign-in/second?next={quote(after, safe='/')}")
        browser.keep(request, response, STEP, f"{found.mfa_token}.{'-'.join(found.methods)}", found.expires_in)
        return response
    return await _in(request, found, after)


@router.post("/sign-in/passkey")
async def sign_in_by_passkey(request: Request) -> Response:
    """Sign in with what an authenticator signed."""
    after = frame.next_path("")
    try:
        fields = await browser.form(request)
        after = frame.next_path(fields.get("next", ""))
        who, client = access.anonymous(request), browser.client(request)
        passkeys = identity_of(request).passkeys
        found = await passkeys.sign_in(who, inputs.credential(fields), client, cookie=True)
    except Problem as problem:
        return await _refused(request, problem) or await _page(request, after, "", problem)
    return await _in(request, found, after)


@router.post("/sign-in/passkey/options")
async def passkey_options(request: Request) -> Response:
    """A challenge to sign in by passkey."""
    await browser.form(request)
    return JSONResponse(await identity_of(request).passkeys.sign_in_options(access.anonymous(request)))


@router.get("/sign-in/second")
async def show_second(request: Request) -> Response:
    """The second step, by the method that was asked for, or the first there is."""
    after = frame.next_path(request.query_params.get("next", ""))
    if await browser.signed_in(request) is not None:
        return frame.to(after)
    return await _second(request, after, request.query_params.get("by", ""))


@router.post("/sign-in/second")
async def second(request: Request) -> Response:
    """Prove the second step."""
    after, by = frame.next_path(""), ""
    try:
        fields = await browser.form(request)
        after, by = frame.next_path(fields.get("next", "")), fields.get("by", "")
        who, client = access.anonymous(request), browser.client(request)
        steps, token = identity_of(request).second_steps, _step(request)[0]
        found = await steps.verify(who, token, proof_of(by, fields), client, cookie=True)
    except Problem as problem:
        if problem.code == "auth.mfa_token_invalid":
            return await _again(request, after)
        return await _refused(request, problem) or await _second(request, after, by, problem)
    return await _in(request, found, after)


@router.post("/sign-in/second/options")
async def second_options(request: Request) -> Response:
    """A challenge for the passkeys of the person who took the first step."""
    await browser.form(request)
    token, _ = _step(request)
    return JSONResponse(await identity_of(request).second_steps.passkey_options(token))


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End the browser's session. Done twice, or with a session that has ended, it is done all the same."""
    who, after = await browser.signed_in(request), ""
    if who is not None:
        after = frame.next_path((await browser.form(request)).get("next", ""), "")
        identity = identity_of(request)
        async with identity.db.transaction() as tx:
            await identity.logout(tx, who)
    response = frame.to(after if after == "/invitation" else "/sign-in?said=out")
    if browser.cookie(request, browser.SESSION):  # none comes along from another site, which so signs nobody out
        browser.drop(request, response, browser.SESSION)
        if after != "/invitation":  # which is what they sign out for
            for left in (LINK, STEP):
                if browser.cookie(request, left):
                    browser.drop(request, response, left)
    return response


def proof_of(by: str, fields: dict[str, str]) -> Proof:
    """The proof in a form that asked for one."""
    if by == "passkey":
        return Proof(passkey=inputs.credential(fields))
    if by == "recovery":
        return Proof(recovery_code=fields.get("code", "")[:64])
    if by == "password":
        return Proof(password=inputs.password(fields))
    return Proof(code=fields.get("code", "")[:16])


def _step(request: Request) -> tuple[str, list[str]]:
    token, _, methods = browser.cookie(request, STEP).partition(".")
    return token, [method for method in _METHODS if method in methods.split("-")]


async def _in(request: Request, signed: SignedIn, after: str) -> Response:
    await browser.end_before(request)
    response = frame.to(after)
    browser.keep_session(request, response, signed)
    if browser.cookie(request, STEP):
        browser.drop(request, response, STEP)
    return response


async def _again(request: Request, after: str) -> Response:
    """From the first step on: the time of the second is over, or another tab took it."""
    if await browser.signed_in(request) is not None:
        return frame.to(after)
    response = frame.to(f"/sign-in?said=late&next={quote(after, safe='/')}")
    browser.drop(request, response, STEP)
    return response


async def _refused(request: Request, problem: Problem) -> Response | None:
    """Raise what no form can show; on to the next page where a form was sent twice and the first one signed in."""
    if problem.code not in _SHOWN:
        raise problem
    if problem.code == "console.form_rejected" and await browser.signed_in(request) is not None:
        return frame.to(frame.next_path((await browser.fields(request)).get("next", "")))
    return None


async def _page(
    request: Request, after: str, email: str = "", problem: Problem | None = None, said: str | None = None
) -> Response:
    _, _, code = after.partition("/device?code=")
    settings: Any = request.app.state.settings
    return await frame.page(
        request, "sign_in.html", problem, script=True,
        after=after, email=email, code=code, said=said, open=settings.registration_open, passkeys=passkeys_here(request),
    )  # fmt: skip


async def _second(request: Request, after: str, by: str, problem: Problem | None = None) -> Response:
    _, methods = _step(request)
    if not methods:
        return frame.to(f"/sign-in?next={quote(after, safe='/')}")
    by = by if by in methods else methods[0]
    if "passkey" in methods and not passkeys_here(request):
        methods.remove("passkey")
    return await frame.page(request, "second.html", problem, script=True, after=after, by=by, methods=methods)


def passkeys_here(request: Request) -> bool:
    """Whether passkeys work on the page that this request is for."""
    try:
        origins = site(request.app.state.settings).origins
    except Problem:
        return False
    return any(origin.partition("://")[2] == request.headers.get("host") for origin in origins)
