"""What a browser adds to a request: the session cookie, and the proof that a form came from our own page.

The session cookie is HttpOnly and SameSite=Lax, and ``__Host-`` wherever the site is https: no other host of the domain,
a tunnel's least of all, can plant one. Every form carries a token that is a MAC over a random cookie and the session, so
another site can neither read nor make one; a POST whose Origin or Sec-Fetch-Site names another site is refused before that.
"""

from __future__ import annotations

import hmac
import re
import secrets
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from fastapi import Request, Response

from portico.control import access
from portico.control.access import Caller
from portico.control.identity.service import Client, Identity
from portico.errors import Problem
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

SESSION: Final = "portico_session"
FORM: Final = "portico_form"
_NONCE = re.compile(r"[A-Za-z0-9_-]{43}")
_MAX_FIELDS: Final = 16


def _secure(request: Request) -> bool:
    return bool(request.app.state.settings.api_url.startswith("https://"))


def _named(request: Request, name: str) -> str:
    return f"__Host-{name}" if _secure(request) else name


def cookie(request: Request, name: str) -> str:
    """The value of one of our cookies; empty without it."""
    return request.cookies.get(_named(request, name), "")


def keep(request: Request, response: Response, name: str, value: str, seconds: int | None = None) -> None:
    """Set one of our cookies, for ``seconds`` or as long as the browser stays open."""
    response.set_cookie(
        _named(request, name), value, max_age=seconds, httponly=True, samesite="lax", secure=_secure(request), path="/"
    )


def drop(request: Request, response: Response, name: str) -> None:
    """Delete one of our cookies."""
    response.delete_cookie(_named(request, name), path="/", secure=_secure(request), httponly=True, samesite="lax")


async def end_before(request: Request) -> None:
    """End the session that this browser had until now: signed in anew, nobody would ever sign out of it."""
    if (before := await signed_in(request)) is not None:
        identity: Identity = request.app.state.identity
        with suppress(Problem):  # it ended in this moment
            async with identity.db.transaction() as tx:
                await identity.logout(tx, before)
    request.state.__dict__.pop("person", None)


async def signed_in(request: Request) -> Caller | None:
    """The person whose session cookie this is, if it is good."""
    if hasattr(request.state, "person"):
        known: Caller | None = request.state.person
        return known
    request.state.person = await _person(request)
    return request.state.person  # type: ignore[no-any-return]


async def _person(request: Request) -> Caller | None:
    identity: Identity = request.app.state.identity
    secret = cookie(request, SESSION)
    if not secret:
        return None
    try:
        caller = await identity.browser(secret)
    except Problem as problem:
        if problem.status == 401:
            return None
        raise
    return replace(caller, request_id=access.request_id(request), address=access.client_address(request))


def client(request: Request) -> Client:
    """What a sign-in session remembers of this browser."""
    agent = "".join(c for c in request.headers.get("user-agent", "") if c.isprintable())
    return Client(access.client_address(request), agent)


def nonce(request: Request) -> str:
    """The random value that this browser's form tokens hang on; made when there is none."""
    found: str | None = getattr(request.state, "nonce", None)
    if found is None:
        found = cookie(request, FORM)
        found = request.state.nonce = found if _NONCE.fullmatch(found) else secrets.token_urlsafe(32)
    return found


def form_token(request: Request, value: str) -> str:
    """The token of a form on a page for this browser and session."""
    sealer: Sealer = request.app.state.sealer
    return sealer.mac("form token", f"{value} {cookie(request, SESSION)}")


async def fields(request: Request) -> dict[str, str]:
    """The fields of a form, whoever made it. Raises ``console.form_rejected`` when it cannot be read."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise Problem("console.form_rejected", "the form is not URL-encoded")
    try:
        text = (await request.body()).decode("ascii")
        values = parse_qs(text, keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict", encoding="utf-8")
    except (UnicodeDecodeError, ValueError):
        raise Problem("console.form_rejected", "the form cannot be read") from None
    found = {name: several[0] for name, several in values.items()}
    if any("\0" in value for value in found.values()):
        raise Problem("console.form_rejected", "the form cannot be read")
    return found


async def form(request: Request) -> dict[str, str]:
    """The fields of a form that our own page sent. Raises ``console.form_rejected`` for any other."""
    settings: ApiSettings = request.app.state.settings
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if site not in (None, "same-origin", "none") or (origin is not None and not _is_own(origin, request, settings)):
        raise Problem("console.form_rejected", "the form was sent by another site")
    found = await fields(request)
    sent, kept = found.get("form_token", ""), cookie(request, FORM)
    if not _NONCE.fullmatch(kept) or not hmac.compare_digest(sent.encode(), form_token(request, kept).encode()):
        raise Problem("console.form_rejected", "the page is too old, or cookies are off")
    return found


def _is_own(origin: str, request: Request, settings: ApiSettings) -> bool:
    own = urlsplit(settings.api_url)
    if origin == f"{own.scheme}://{own.netloc}":
        return True
    scheme, _, host = origin.partition("://")
    return scheme in ("http", "https") and bool(host) and host == request.headers.get("host")


def keep_nonce(request: Request, response: Response) -> None:
    """Store what the form tokens of a page hang on.

    Not in the answer to a form of another site: it came without our cookies, and a new one would spoil the forms of open pages.
    """
    value, foreign = nonce(request), request.headers.get("sec-fetch-site") == "cross-site"
    if cookie(request, FORM) != value and not (foreign and request.method == "POST"):
        keep(request, response, FORM, value)


def keep_session(request: Request, response: Response, signed: Any) -> None:
    """Sign the browser in: ``signed`` has the new ``cookie``."""
    settings: ApiSettings = request.app.state.settings
    keep(request, response, SESSION, signed.cookie, settings.browser_max_seconds)
