"""What a browser adds to a request: the session cookie, and the proof that a form came from our own page.

The session cookie holds a short access token of a session made for it; it is HttpOnly and SameSite=Lax. Every form
carries a token that is a MAC over a random cookie and the session, so another site can neither read nor make one; a
POST whose Origin or Sec-Fetch-Site names another site is refused before that.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import replace
from typing import Final
from urllib.parse import parse_qs, urlsplit

from fastapi import Request, Response

from portico.control import access
from portico.control.access import Caller
from portico.control.identity.service import Identity
from portico.errors import Problem
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

SESSION: Final = "portico_session"
FORM: Final = "portico_form"
_NONCE = re.compile(r"[A-Za-z0-9_-]{43}")
_MAX_FIELDS: Final = 16

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


async def signed_in(request: Request) -> Caller | None:
    """The person whose session cookie this is, if it is good."""
    token = request.cookies.get(SESSION, "")
    if not token or token.startswith("tnl_"):  # keys sign programs in, never a browser
        return None
    identity: Identity = request.app.state.identity
    try:
        async with identity.db.read() as reader:
            caller = await identity.authenticate(reader, token)
    except Problem as problem:
        if problem.status == 401:
            return None
        raise
    return replace(caller, request_id=access.request_id(request), address=access.client_address(request))


def nonce(request: Request) -> str:
    """The random value that this browser's form tokens hang on; made when there is none."""
    found = request.cookies.get(FORM, "")
    return found if _NONCE.fullmatch(found) else secrets.token_urlsafe(32)


def form_token(request: Request, value: str) -> str:
    """The token of a form on a page for this browser and session."""
    sealer: Sealer = request.app.state.sealer
    return sealer.mac("form token", f"{value} {request.cookies.get(SESSION, '')}")


async def form(request: Request) -> dict[str, str]:
    """The fields of a form that our own page sent. Raises ``console.form_rejected`` for any other."""
    settings: ApiSettings = request.app.state.settings
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if site not in (None, "same-origin", "none") or (origin is not None and not _is_own(origin, request, settings)):
        raise Problem("console.form_rejected", "the form was sent by another site")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise Problem("console.form_rejected", "the form is not URL-encoded")
    try:
        text = (await request.body()).decode("ascii")
        fields = parse_qs(text, keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict", encoding="utf-8")
    except (UnicodeDecodeError, ValueError):
        raise Problem("console.form_rejected", "the form cannot be read") from None
    found = {name: values[0] for name, values in fields.items()}
    if any("\0" in value for value in found.values()):
        raise Problem("console.form_rejected", "the form cannot be read")
    sent, kept = found.get("form_token", ""), request.cookies.get(FORM, "")
    if not _NONCE.fullmatch(kept) or not hmac.compare_digest(sent.encode(), form_token(request, kept).encode()):
        raise Problem("console.form_rejected", "the page is too old, or cookies are off")
    return found


def _is_own(origin: str, request: Request, settings: ApiSettings) -> bool:
    own = urlsplit(settings.api_url)
    if origin == f"{own.scheme}://{own.netloc}":
        return True
    scheme, _, host = origin.partition("://")
    return scheme in ("http", "https") and bool(host) and host == request.headers.get("host")


def _secure(request: Request) -> bool:
    return bool(request.app.state.settings.api_url.startswith("https://"))


def keep_nonce(request: Request, response: Response, value: str) -> None:
    """Store the form cookie, for this page alone."""
    if request.cookies.get(FORM) != value:
        response.set_cookie(FORM, value, httponly=True, samesite="strict", secure=_secure(request))


def keep_session(request: Request, response: Response, token: str, life_seconds: int) -> None:
    """Sign the browser in."""
    response.set_cookie(
        SESSION, token, max_age=life_seconds, httponly=True, samesite="lax", secure=_secure(request), path="/"
    )


def drop_session(response: Response) -> None:
    """Sign the browser out."""
    response.delete_cookie(SESSION, path="/")
