"""Pages for people: `/` says what this is; /device signs in, compares the code with the terminal's, approves or denies.

    GET  /                   what this is, how to connect a machine
    GET  /device?code=…      sign-in form, or the code form, or what asks for approval
    POST /device/sign-in     → back to /device
    POST /device/sign-out    → back to /device
    POST /device             approve or deny

Nothing is approved by a GET, so a link cannot approve a device; the page says which machine asks, and from where.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import jinja2
from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from portico import kit
from portico.control import access
from portico.control.access import Caller
from portico.control.console import browser
from portico.control.identity.device import normal_code, shown_code
from portico.control.identity.service import Client, Identity
from portico.errors import Problem
from portico.settings import ApiSettings

router = APIRouter(include_in_schema=False)

_HERE = Path(__file__).parent
_STYLES = {
    "tokens.css": (Path(kit.__file__).parent / "static" / "tokens.css").read_bytes(),
    "console.css": (_HERE / "static" / "console.css").read_bytes(),
}
_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# Problems that the page shows in place; others are faults and keep their own answer.
_SHOWN = frozenset(
    {"auth.credentials_invalid", "auth.throttled", "auth.forbidden", "device.code_invalid", "console.form_rejected"}
)


@router.get("/static/tokens.css")
async def tokens() -> Response:
    """Colours and type, which the agent's local page shares."""
    return _style("tokens.css")


@router.get("/static/console.css")
async def style() -> Response:
    """The console's own style sheet."""
    return _style("console.css")


def _style(name: str) -> Response:
    return Response(_STYLES[name], media_type="text/css", headers={"Cache-Control": "public, max-age=300"})


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """What a person finds who opens the address of the API; nothing here needs or starts a session."""
    settings: ApiSettings = request.app.state.settings
    public = urlsplit(settings.public_url)
    port = f":{public.port}" if public.port is not None else ""
    html = _templates.get_template("index.html").render(
        who=None, api_url=settings.api_url.rstrip("/"), pattern=f"{public.scheme}://NAME.{settings.base_domain}{port}"
    )
    return HTMLResponse(html, headers={"Content-Security-Policy": browser.CONTENT_SECURITY_POLICY})


@router.get("/device")
async def show(request: Request) -> Response:
    """The page, at the step that fits: sign in, type the code, or decide."""
    return await _page(request, request.query_params.get("code", ""))


@router.post("/device/sign-in")
async def sign_in(request: Request) -> Response:
    """Sign in by password, then go back to the code."""
    code = ""
    try:
        fields = await browser.form(request)
        code = fields.get("code", "")
        identity: Identity = request.app.state.identity
        who = access.anonymous(request)
        agent = "".join(c for c in request.headers.get("user-agent", "") if c.isprintable())
        email, password = fields.get("email", "")[:254], fields.get("password", "")[:1024]
        signed_in = await identity.login(who, email, password, Client(who.address, agent), cookie=True)
    except Problem as problem:
        return await _page(request, code, problem)
    response = _back(code)
    browser.keep_session(request, response, signed_in.access_token, signed_in.expires_in)
    return response


@router.post("/device/sign-out")
async def sign_out(request: Request) -> Response:
    """End the browser's session."""
    try:
        fields = await browser.form(request)
    except Problem as problem:
        return await _page(request, "", problem)
    who = await browser.signed_in(request)
    if who is not None:
        identity: Identity = request.app.state.identity
        async with identity.db.transaction() as tx:
            await identity.logout(tx, who)
    response = _back(fields.get("code", ""))
    browser.drop_session(response)
    return response


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
        approve = fields["answer"] == "approve"
        identity: Identity = request.app.state.identity
        device = await identity.device.decide(who, code, approve=approve)
    except Problem as problem:
        return await _page(request, code, problem)
    return _render(request, "done.html", who, device=device, approved=approve)


async def _page(request: Request, typed: str, problem: Problem | None = None) -> Response:
    """The step that fits the browser's state, with ``problem`` shown where there is one."""
    if problem is not None and problem.code not in _SHOWN:
        raise problem
    code = normal_code(typed[:64])
    who = await browser.signed_in(request)
    if who is None:
        return _render(request, "sign_in.html", None, problem, code=shown_code(code) if code else "")
    if len(code) == 8 and problem is None:
        try:
            identity: Identity = request.app.state.identity
            device = await identity.device.look_up(who, code)
        except Problem as found:
            if found.code not in _SHOWN:
                raise
            return _render(request, "code.html", who, found, code=shown_code(code))
        return _render(request, "decide.html", who, device=device)
    return _render(request, "code.html", who, problem, code=shown_code(code) if code else "")


def _back(code: str) -> RedirectResponse:
    """To /device with the code, by GET, so that a reload repeats nothing."""
    code = normal_code(code[:64])
    return RedirectResponse("/device" + (f"?code={quote(shown_code(code))}" if code else ""), 303)


def _render(
    request: Request, template: str, who: Caller | None, problem: Problem | None = None, **values: Any
) -> HTMLResponse:
    nonce = browser.nonce(request)
    html = _templates.get_template(template).render(
        who=who, problem=problem, form_token=browser.form_token(request, nonce), **values
    )
    headers = {"Content-Security-Policy": browser.CONTENT_SECURITY_POLICY}
    headers |= {k: v for k, v in (problem.headers if problem else {}).items() if k == "Retry-After"}
    response = HTMLResponse(html, problem.status if problem else 200, headers)
    browser.keep_nonce(request, response, nonce)
    return response
