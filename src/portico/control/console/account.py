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

from portico.control.access import Caller
from portico.control.console import agents, browser, frame, inputs
from portico.control.console.frame import PageRoute, Who, identity_of
from portico.errors import Problem
from portico.kit.pages import MAX_LIMIT, PageRequest

router = APIRouter(include_in_schema=False, route_class=PageRoute)

_SAID: Mapping[str, str] = {
    "ended": "The session has ended; that browser is signed out.",
    "others-ended": "All other sessions have ended.",
    "made": "The organization is there, and you are in it.",
    "joined": "Welcome. You are a member now.",
    "switched": "You are in another organization now.",
}


def _said(request: Request) -> str | None:
    return _SAID.get(request.query_params.get("said", ""))


@router.get("/account")
async def account() -> Response:
    """The first page of it."""
    return frame.to("/account/security")


@router.get("/account/sessions")
async def sessions(request: Request, who: Who) -> Response:
    """Where the person is signed in, this browser first."""
    return await _sessions(request, who)


async def _sessions(request: Request, who: Caller, problem: Problem | None = None) -> Response:
    identity = identity_of(request)
    async with identity.db.read() as reader:
        found = await identity.sessions(reader, who, PageRequest(MAX_LIMIT))
    rows: list[dict[str, Any]] = [{**row, "device": agents.named(row["user_agent"])} for row in found["data"]]
    rows.sort(key=lambda row: (not row["current"], -row["last_used_at"].timestamp()))
    return await frame.page(request, "sessions.html", problem, sessions=rows, said=_said(request))


@router.post("/account/sessions")
async def end_session(request: Request, who: Who) -> Response:
    """End one session, or all but this one."""
    identity = identity_of(request)
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
        return await _sessions(request, who, problem)
    if session == who.session_id:
        response = frame.to("/sign-in?said=out")
        browser.drop(request, response, browser.SESSION)
        return response
    return frame.to(f"/account/sessions?said={'others-ended' if session == 'others' else 'ended'}")


@router.get("/organizations")
async def organizations(request: Request, who: Who) -> Response:
    """The person's organizations, to turn this browser to one of them."""
    return await _organizations(request, who)


async def _organizations(request: Request, who: Caller, problem: Problem | None = None, name: str = "") -> Response:
    identity = identity_of(request)
    async with identity.db.read() as reader:
        found = await identity.organizations.listing(reader, who, PageRequest(MAX_LIMIT))
    after = frame.next_path(request.query_params.get("next", ""), "")
    return await frame.page(
        request,
        "organizations.html",
        problem,
        script=True,
        rows=found["data"],
        said=_said(request),
        after=after,
        name=name,
    )


@router.post("/organizations")
async def switch(request: Request, who: Who) -> Response:
    """Turn this browser to another organization."""
    identity = identity_of(request)
    try:
        fields = await browser.form(request)
        wanted = fields.get("organization", "")
        if wanted != who.organization:
            async with identity.db.transaction() as tx:
                await identity.organizations.switch(tx, who, wanted)
    except Problem as problem:
        if problem.code not in ("console.form_rejected", "request.not_found"):
            raise
        return await _organizations(request, who, problem)
    return frame.to(frame.next_path(fields.get("next", ""), "/organizations?said=switched"))


@router.post("/organizations/new")
async def create(request: Request, who: Who) -> Response:
    """Make another organization, and turn this browser there."""
    identity, fields = identity_of(request), dict[str, str]()
    try:
        fields = await browser.form(request)
        name = inputs.name(fields, "name")
        async with identity.db.transaction() as tx:
            made = await identity.organizations.create(tx, who, name)
            await identity.organizations.switch(tx, who, made["id"])
    except Problem as problem:
        if problem.code not in ("console.form_rejected", "organization.limit_reached", "request.invalid"):
            raise
        return await _organizations(request, who, problem, fields.get("name", "")[:100])
    return frame.to("/organizations?said=made")
