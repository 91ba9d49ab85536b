"""Device approval: a person compares the code on a terminal, then approves or denies it.

    GET  /device?code=…      the code form, or what asks for approval; who is not signed in signs in first
    POST /device             approve or deny

Nothing is approved by a GET, so a link cannot approve a device; the page says which machine asks, and from where.
"""

from __future__ import annotations

from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from portico.control.console import browser, frame
from portico.control.console.frame import PageRoute
from portico.control.identity.device import normal_code, shown_code
from portico.control.identity.service import Identity
from portico.errors import Problem
from portico.kit.pages import PageRequest

router = APIRouter(include_in_schema=False, route_class=PageRoute)

# Problems that the page shows in place; others are faults, or lead to the sign-in, and keep their own answer.
_SHOWN = frozenset({400, 403, 404, 409, 429})


@router.get("/device")
async def show(request: Request) -> Response:
    """The page, at the step that fits: type the code, or decide."""
    return await _page(request, request.query_params.get("code", ""))


@router.post("/device")
async def decide(request: Request) -> Response:
    """Approve or deny the device."""
    code = ""
    try:
        fields = await browser.form(request)
        code = fields.get("code", "")
        who = await browser.signed_in(request)
        if who is None or fields.get("answer") not in ("approve", "deny"):
            return await _page(request, code)
        if fields.get("organization", who.organization or "") != (who.organization or ""):
            return await _page(
                request, code
            )  # another tab turned the browser elsewhere: show where the key will belong
        approve = fields["answer"] == "approve"
        identity: Identity = request.app.state.identity
        device = await identity.device.decide(who, code, approve=approve)
    except Problem as problem:
        return await _page(request, code, problem)
    return await frame.page(request, "done.html", device=device, approved=approve)


async def _page(request: Request, typed: str, problem: Problem | None = None) -> Response:
    """The step that fits the browser's state, with ``problem`` shown where there is one."""
    if problem is not None and problem.status not in _SHOWN:
        raise problem
    code = normal_code(typed[:64])
    shown = shown_code(code) if code else ""
    who = await browser.signed_in(request)
    if who is None:
        return frame.to_sign_in("/device" + (f"?code={quote(shown)}" if code else ""))
    if len(code) == 8 and problem is None:
        try:
            identity: Identity = request.app.state.identity
            device = await identity.device.look_up(who, code)
        except Problem as found:
            if found.status not in _SHOWN:
                raise
            return await frame.page(request, "code.html", found, code=shown)
        async with identity.db.read() as reader:
            own = await identity.organizations.listing(reader, who, PageRequest(limit=2))
        return await frame.page(
            request, "decide.html", device=device, several=len(own["data"]) > 1, organization=who.organization or ""
        )
    return await frame.page(request, "code.html", problem, code=shown)
