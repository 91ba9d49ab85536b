"""Invitations: a link in a mail that makes whoever it was sent to a member.

GET  /invitation?token=…         → /invitation, with the token in a cookie
GET  /invitation                 who invites to what, and what fits whoever looks: join, make an account, change accounts
POST /invitation                 join as who is signed in, or with a new account (``password``) → /organizations
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from portico.control import access
from portico.control.access import Caller
from portico.control.console import browser, frame, inputs
from portico.control.console.frame import PageRoute, identity_of
from portico.control.console.links import LINK, keep_link
from portico.errors import Problem

router = APIRouter(include_in_schema=False, route_class=PageRoute)

_PAGE = "/invitation"
_SHOWN = frozenset({"auth.email_taken", "auth.password_weak", "auth.throttled", "console.form_rejected"})


@router.get(_PAGE)
async def show(request: Request) -> Response:
    """What the invitation offers."""
    if "token" in request.query_params:
        return keep_link(request, _PAGE)
    return await _page(request)


@router.post(_PAGE)
async def accept(request: Request) -> Response:
    """Become a member."""
    token, who = browser.cookie(request, LINK), await browser.signed_in(request)
    try:
        fields = await browser.form(request)
        if who is not None:
            response = await _join(request, who, token)
        else:
            invitations, client = identity_of(request).invitations, browser.client(request)
            password = inputs.password(fields)
            signed = await invitations.register(access.anonymous(request), token, password, client, cookie=True)
            response = frame.to("/organizations?said=joined")
            await browser.end_before(request)
            browser.keep_session(request, response, signed)
    except Problem as problem:
        if problem.code == "console.form_rejected" and who is not None and not token:
            return frame.to("/organizations")  # sent twice: the first one joined
        if problem.code not in _SHOWN:
            return await _over(request, problem)
        return await _page(request, problem)
    browser.drop(request, response, LINK)
    return response


async def _join(request: Request, who: Caller, token: str) -> Response:
    """Make the person a member, and turn this browser to the organization."""
    identity = identity_of(request)
    async with identity.db.transaction() as tx:
        joined = await identity.invitations.accept(tx, who, token)
        await identity.organizations.switch(tx, who, joined["id"])
    return frame.to("/organizations?said=joined")


async def _over(request: Request, problem: Problem) -> Response:
    """Tell why an invitation cannot be accepted; raises what is no matter of invitations."""
    if problem.code == "invitation.member":
        response: Response = frame.to("/organizations")
        browser.drop(request, response, LINK)
        return response
    if problem.code == "invitation.other_address":  # another account signed in meanwhile
        return await _page(request)
    if problem.code.startswith(("invitation.", "organization.")):
        return await frame.page(request, "link_over.html", path_of_link=_PAGE, status=problem.status)
    raise problem


async def _page(request: Request, problem: Problem | None = None) -> Response:
    identity, token = identity_of(request), browser.cookie(request, LINK)
    try:
        offer = await identity.invitations.look(access.anonymous(request), token)
    except Problem as found:
        return await _over(request, found)
    who = await browser.signed_in(request)
    settings: Any = request.app.state.settings
    fits = None if who is None else (await frame.person_of(request, who)).email == offer["email"]
    return await frame.page(
        request, "invitation.html", problem, offer=offer, fits=fits, shortest=settings.password_min_length
    )
