"""A person's own account: security, sessions, organizations.

GET  /account/security           what signs the person in
GET  /account/sessions           where the person is signed in
POST /account/sessions           end one (``session``), or all others
GET  /organizations              the person's organizations
POST /organizations              turn this browser to another one
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from portico.control.console import agents, browser, frame
from portico.control.identity.service import Identity
from portico.errors import Problem
from portico.kit.pages import MAX_LIMIT, PageRequest

router = APIRouter(include_in_schema=False)

_SAID: Mapping[str, str] = {
    "ended": "The session has ended; that browser is signed out.",
    "others-ended": "All other sessions have ended.",
    "switched": "You are in another organization now.",
}


def _said(request: Request) -> str | None:
    return _SAID.get(request.query_params.get("said", ""))


@router.get("/account/sessions")
async def sessions(request: Request) -> Response:
    """Where the person is signed in, this browser first."""
    who = await browser.signed_in(request)
    if who is None:
        return frame.to_sign_in("/account/sessions")
    return await _sessions(request)


async def _sessions(request: Request, problem: Problem | None = None) -> Response:
    who = await browser.signed_in(request)
    assert who is not None
    identity: Identity = request.app.state.identity
    async with identity.db.read() as reader:
        found = await identity.sessions(reader, who, PageRequest(MAX_LIMIT))
    rows: list[dict[str, Any]] = [{**row, "device": agents.named(row["user_agent"])} for row in found["data"]]
    rows.sort(key=lambda row: (not row["current"], -row["last_used_at"].timestamp()))
    return await frame.page(request, "sessions.html", problem, sessions=rows, said=_said(request))


@router.post("/account/sessions")
async def end_session(request: Request) -> Response:
    """End one session, or all but this one."""
    who = await browser.signed_in(request)
    if who is None:
        return frame.to_sign_in("/account/sessions")
    identity: Identity = request.app.state.identity
    try:
        fields = await browser.form(request)
        session = fields.get("session", "")
        async with identity.db.transaction() as tx:
            if session == "others":
                await identity.end_all_sessions(tx, who, keep_current=True)
            else:
                await identity.end_session(tx, who, session)
    except Problem as problem:
        if problem.code == "request.not_found":  # gone meanwhile: what was wanted
            return frame.to("/account/sessions?said=ended")
        if problem.code != "console.form_rejected":
            raise
        return await _sessions(request, problem)
    if session == who.session_id:
        response = frame.to("/sign-in?said=out")
        browser.drop(request, response, browser.SESSION)
        return response
    return frame.to(f"/account/sessions?said={'others-ended' if session == 'others' else 'ended'}")


@router.get("/organizations")
async def organizations(request: Request) -> Response:
    """The person's organizations, to turn this browser to one of them."""
    if await browser.signed_in(request) is None:
        return frame.to_sign_in("/organizations")
    return await _organizations(request)


async def _organizations(request: Request, problem: Problem | None = None) -> Response:
    who = await browser.signed_in(request)
    assert who is not None
    identity: Identity = request.app.state.identity
    async with identity.db.read() as reader:
        rows = await identity.browsers.organizations(reader, who)
    after = frame.next_path(request.query_params.get("next", ""), "")
    return await frame.page(
        request, "organizations.html", problem, rows=rows, current=who.organization, said=_said(request), after=after
    )


@router.post("/organizations")
async def switch(request: Request) -> Response:
    """Turn this browser to another organization."""
    who = await browser.signed_in(request)
    if who is None:
        return frame.to_sign_in("/organizations")
    identity: Identity = request.app.state.identity
    try:
        fields = await browser.form(request)
        wanted = fields.get("organization", "")
        if wanted != who.organization:
            async with identity.db.transaction() as tx:
                await identity.browsers.switch(tx, who, wanted)
    except Problem as problem:
        if problem.code not in ("console.form_rejected", "request.not_found"):
            raise
        return await _organizations(request, problem)
    return frame.to(frame.next_path(fields.get("next", ""), "/organizations?said=switched"))
