"""The frame of every page: templates, headers, who is signed in, problems in place, and where a form may lead.

A page is rendered with ``person`` (``None`` or who is signed in), ``problem`` (``None`` or what went wrong) and
``wrong``, the name of the field that is to blame. No page has inline script or style; one that needs a script names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote, urlsplit

import jinja2
from fastapi import Depends, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute

from portico.control.access import Caller, check_step_up
from portico.control.console import browser
from portico.control.identity.service import Identity
from portico.errors import Problem

_POLICY: Final = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
#: Referrer-Policy: with ``no-referrer`` browsers send ``Origin: null`` with our own forms. Other sites hear nothing either way.
HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
SCRIPT_HEADERS: Final = {
    **HEADERS,
    "Content-Security-Policy": f"{_POLICY}; script-src 'self'; connect-src 'self'",
}

templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

# The field that a problem is about, where it is one of a form.
_FIELDS: Final[Mapping[str, str]] = {
    "auth.email_taken": "email",
    "auth.password_weak": "password",
    "auth.second_step_invalid": "code",
    "device.code_invalid": "code",
}

# What is wrong, for people in front of a page, where the catalogue's title is one for programs.
_TITLES: Final[Mapping[str, str]] = {
    "auth.passkey_invalid": "This passkey does not fit",
    "auth.proof_invalid": "This does not fit",
    "auth.second_step_invalid": "This does not fit",
}
# Advice for people in front of a page, where that of the catalogue speaks to programs or of the command line.
_ADVICE: Final[Mapping[str, str]] = {
    "auth.credentials_invalid": "Check both and try again.",
    "auth.email_unverified": "Follow the link in the mail that we sent you. Your account's security page sends another.",
    "auth.forbidden": "Your role in this organization does not allow it. Ask an owner, or change to another organization.",
    "auth.passkey_invalid": "Sign in with your password, or with another passkey.",
    "auth.proof_invalid": "Check it and try again. A code works once: wait for the next one.",
    "auth.second_step_invalid": "Check it and try again. A code works once: wait for the next one.",
    "auth.throttled": "Nothing is wrong with your account; this keeps guessers out.",
    "console.form_rejected": "Nothing was changed. Send the form again from here.",
    "request.not_found": "Check the address, or go on from the start page.",
}

# Paths that a form may lead to: pages of ours that show something, without a scheme or host to be fooled about.
_NEXT = re.compile(
    r"/(?:account|change-email|check-mail|device|invitation|organizations|verify-email)(?:/[a-z-]{1,32}){0,2}(?:\?code=[A-Za-z-]{1,16})?"
)


@dataclass(frozen=True, slots=True)
class Person:
    """Who is signed in, as pages show it."""

    email: str
    organization: str | None  # none, when the one that the session was in is gone


def next_path(typed: str, default: str = "/account/security") -> str:
    """``typed`` when it is a page of ours, else ``default``."""
    return typed if _NEXT.fullmatch(typed) else default


def to(path: str) -> RedirectResponse:
    """By GET to a page of ours, so that a reload repeats nothing."""
    return RedirectResponse(path, 303)


class Leave(Exception):
    """Ends a page: the browser goes elsewhere. Raised by what pages depend on."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class PageRoute(APIRoute):
    """A route of pages: who must sign in, or prove again who they are, is led there and back."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def page(request: Request) -> Response:
            try:
                return await handle(request)
            except Leave as leave:
                return to(leave.path)
            except Problem as problem:
                if problem.code == "auth.step_up_required":
                    return to(f"/account/confirm?next={quote(here(request), safe='/')}")
                if problem.code == "auth.session_ended":
                    return to_sign_in(here(request))
                raise

        return page


def here(request: Request) -> str:
    """The page that a request is about: its own address, or of a form that of the page it was on."""
    if request.method == "GET":
        return next_path(request.url.path)
    return next_path(urlsplit(request.headers.get("referer", "")).path)


async def person(request: Request) -> Caller:
    """Dependency: who is signed in; others sign in first."""
    found = await browser.signed_in(request)
    if found is None:
        raise Leave(_sign_in(here(request)))
    return found


async def recent(request: Request) -> Caller:
    """Dependency: who is signed in and proved it a short time ago; others prove it first."""
    found = await person(request)
    state: Any = request.app.state
    check_step_up(found, state.clock.wall(), state.settings.step_up_seconds)
    return found


Who = Annotated[Caller, Depends(person)]
Recent = Annotated[Caller, Depends(recent)]


def identity_of(request: Request) -> Identity:
    """The process's identity service."""
    found: Identity = request.app.state.identity
    return found


def _sign_in(after: str) -> str:
    return f"/sign-in?next={quote(after, safe='/')}"


def to_sign_in(after: str) -> RedirectResponse:
    """To the sign-in page, and from there on to ``after``."""
    return to(_sign_in(after))


async def person_of(request: Request, caller: Caller) -> Person:
    """The names of who is signed in."""
    identity: Identity = request.app.state.identity
    async with identity.db.read() as reader:
        facts = await identity.whoami(reader, caller)
    return Person(facts["user"]["email"], (facts["organization"] or {"name": "none"})["name"])


async def page(
    request: Request,
    template: str,
    problem: Problem | None = None,
    *,
    wrong: str | None = None,
    script: bool = False,
    status: int | None = None,
    **values: Any,
) -> HTMLResponse:
    """A page. ``problem`` is shown on it, at the field ``wrong`` (by default the one that its code is about)."""
    caller = await browser.signed_in(request)
    html = templates.get_template(template).render(
        person=await person_of(request, caller) if caller else None,
        path=request.url.path,
        site=urlsplit(request.app.state.settings.api_url).netloc,
        problem=problem,
        wrong=wrong or (problem.extra.get("field", _FIELDS.get(problem.code)) if problem else None),
        form_token=browser.form_token(request, browser.nonce(request)),
        now=datetime.now(UTC),
        **values,
    )
    headers = {**(SCRIPT_HEADERS if script else HEADERS)}
    headers |= {k: v for k, v in (problem.headers if problem else {}).items() if k == "Retry-After"}
    response = HTMLResponse(html, status or (problem.status if problem else 200), headers)
    browser.keep_nonce(request, response)
    return response


def wants_page(request: Request) -> bool:
    """Whether a failure of this request is read by a person: a browser that opens an address outside the API."""
    outside = not request.url.path.startswith(("/v1/", "/.well-known/", "/scim/"))
    return outside and "text/html" in request.headers.get("accept", "")


def problem_page(problem: Problem, request_id: str) -> Response:
    """A failure as a page. Asks nothing of the database, which may be what failed."""
    html = templates.get_template("failed.html").render(person=None, problem=problem, request_id=request_id, path="")
    headers = {**HEADERS} | {k: v for k, v in problem.headers.items() if k in ("Retry-After", "Allow", "Connection")}
    return HTMLResponse(html, problem.status, headers)


def ago(then: datetime, now: datetime) -> str:
    """How long ago something was, for a person."""
    minutes = int((now - then).total_seconds() // 60)
    for size, unit in ((1440, "day"), (60, "hour"), (1, "minute")):
        if minutes >= size:
            count = minutes // size
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def said(problem: Problem) -> str:
    """What went wrong, as a sentence begins."""
    own = problem.detail == problem.spec.title
    detail = _TITLES.get(problem.code, problem.detail) if own else problem.detail
    return detail[:1].upper() + detail[1:]


def advice(problem: Problem) -> str:
    """What to do about it."""
    return _ADVICE.get(problem.code, problem.hint)


templates.filters |= {"ago": ago, "said": said, "advice": advice}
