"""What signs a person in: address, password, authenticator app, recovery codes, passkeys.

    GET  /account/security                   all of it
    POST /account/password                   another password
    GET, POST /account/email                 another address
    GET  /account/authenticator              the key of an authenticator app as a QR code, once it was asked for
    POST /account/authenticator              ``start``, ``confirm`` (answers with the recovery codes) or ``remove``
    POST /account/recovery-codes             new ones, shown in the answer and nowhere else
    POST /account/passkeys                   keeps what the authenticator made
    POST /account/passkeys/options           a challenge, for our script
    GET, POST /account/passkeys/edit         another name
    POST /account/passkeys/remove            away with it

What would let somebody in who found a browser open asks for a recent proof first (``Recent``).
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from markupsafe import Markup

from portico.control.access import Caller
from portico.control.console import agents, browser, frame, inputs
from portico.control.console.confirm import renew
from portico.control.console.frame import PageRoute, Recent, Who, identity_of
from portico.control.console.sign_in import passkeys_here
from portico.control.identity.passkeys import site
from portico.errors import Problem
from portico.kit.qr import qr_svg

router = APIRouter(include_in_schema=False, route_class=PageRoute)

_PAGE = "/account/security"
_SAID: Mapping[str, str] = {
    "password": "Your password is changed. All other sessions have ended.",
    "email": "We sent a link to the new address. It becomes yours when you follow the link.",
    "app-removed": "The authenticator app is removed. Signing in takes the password alone now.",
    "passkey": "The passkey is added. You can sign in with it from now on.",
    "passkey-named": "The passkey has another name.",
    "passkey-removed": "The passkey is removed.",
}


@router.get(_PAGE)
async def show(request: Request, who: Who) -> Response:
    """The page."""
    return await _page(request, who)


async def _page(request: Request, who: Caller, problem: Problem | None = None, wrong: str | None = None) -> Response:
    identity = identity_of(request)
    async with identity.db.read() as reader:
        factors = await identity.factors.status(reader, who)
        passkeys = await identity.passkeys.listing(reader, who)
        account = await identity.accounts.address(reader, who)
    return await frame.page(
        request, "security.html", problem, wrong=wrong, script=True,
        factors=factors, passkeys=passkeys, account=account, said=_SAID.get(request.query_params.get("said", "")),
        shortest=identity.settings.password_min_length, here=passkeys_here(request), elsewhere=_elsewhere(request),
        device=agents.named(request.headers.get("user-agent")),
    )  # fmt: skip


def _elsewhere(request: Request) -> str | None:
    """The same page at an address where passkeys work, where there is one."""
    try:
        return f"{site(request.app.state.settings).origins[0]}{_PAGE}"
    except Problem:
        return None


# --- password and address


@router.post("/account/password")
async def change_password(request: Request, who: Who) -> Response:
    """Set another password; every other session ends, and this one gets another cookie."""
    try:
        fields = await browser.form(request)
        current, new = inputs.password(fields, "current"), inputs.password(fields)
        await identity_of(request).accounts.change_password(who, current, new)
    except Problem as problem:
        if problem.code not in ("auth.proof_invalid", "auth.password_weak", "auth.throttled", "console.form_rejected"):
            raise
        return await _page(request, who, problem, "current" if problem.code == "auth.proof_invalid" else None)
    response = frame.to(f"{_PAGE}?said=password")
    await renew(request, response, who)
    return response


@router.get("/account/email")
async def show_email(request: Request, who: Recent) -> Response:
    """Ask for another address."""
    return await frame.page(request, "email.html", email="")


@router.post("/account/email")
async def change_email(request: Request, who: Recent) -> Response:
    """Mail a link to the new address."""
    fields: dict[str, str] = {}
    try:
        fields = await browser.form(request)
        await identity_of(request).accounts.change_email(who, inputs.email(fields))
    except Problem as problem:
        if problem.code not in ("auth.throttled", "console.form_rejected", "request.invalid"):
            raise
        return await frame.page(request, "email.html", problem, email=fields.get("email", "")[:254])
    return frame.to(f"{_PAGE}?said=email")


# --- authenticator app


@router.get("/account/authenticator")
async def authenticator(request: Request, who: Recent) -> Response:
    """The key of the app that is being set up."""
    return await _authenticator(request, who)


async def _authenticator(request: Request, who: Caller, problem: Problem | None = None) -> Response:
    identity = identity_of(request)
    async with identity.db.read() as reader:
        pending = await identity.factors.pending(reader, who)
        status = await identity.factors.status(reader, who)
    code = Markup(qr_svg(pending["uri"], "QR code for your authenticator app")) if pending else None  # noqa: S704 - ours
    spaced = " ".join(pending["secret"][i : i + 4] for i in range(0, len(pending["secret"]), 4)) if pending else ""
    return await frame.page(
        request, "authenticator.html", problem, wrong="code" if problem else None, code=code, key=spaced, on=status["totp"]
    )  # fmt: skip


@router.post("/account/authenticator")
async def set_up(request: Request, who: Recent) -> Response:
    """A key for an app; a first code of it, which switches the second step on; or the end of it."""
    identity = identity_of(request)
    try:
        fields = await browser.form(request)
        act = fields.get("act", "")
        if act == "confirm":
            codes = await identity.factors.confirm(who, fields.get("code", "")[:16])
            return await frame.page(request, "codes.html", script=True, codes=codes, first=True)
        async with identity.db.transaction() as tx:
            if act == "remove":
                await identity.factors.disable(tx, who)
            else:
                await identity.factors.start(tx, who)
    except Problem as problem:
        if problem.code in ("mfa.already_on", "mfa.not_on", "mfa.not_started"):  # sent twice, or from an old page
            return frame.to(_PAGE)
        if problem.code not in ("auth.proof_invalid", "auth.throttled", "console.form_rejected"):
            raise
        return await _authenticator(request, who, problem)
    return frame.to(f"{_PAGE}?said=app-removed" if act == "remove" else "/account/authenticator")


@router.post("/account/recovery-codes")
async def recovery_codes(request: Request, who: Recent) -> Response:
    """Ten new ones."""
    identity = identity_of(request)
    try:
        await browser.form(request)
        async with identity.db.transaction() as tx:
            codes = await identity.factors.new_recovery_codes(tx, who)
    except Problem as problem:
        if problem.code == "mfa.not_on":
            return frame.to(_PAGE)
        if problem.code != "console.form_rejected":
            raise
        return await _page(request, who, problem)
    return await frame.page(request, "codes.html", script=True, codes=codes, first=False)


# --- passkeys


@router.post("/account/passkeys/options")
async def passkey_options(request: Request, who: Recent) -> Response:
    """A challenge for a new passkey."""
    await browser.form(request)
    identity = identity_of(request)
    async with identity.db.transaction() as tx:
        return JSONResponse(await identity.passkeys.registration(tx, who))


@router.post("/account/passkeys")
async def add_passkey(request: Request, who: Recent) -> Response:
    """Keep what the authenticator made."""
    try:
        fields = await browser.form(request)
        credential, name = inputs.credential(fields), inputs.name(fields, "name")
        await identity_of(request).passkeys.register(who, credential, name)
    except Problem as problem:
        if not problem.code.startswith("passkey.") and problem.code not in ("console.form_rejected", "request.invalid"):
            raise
        return await _page(request, who, problem)
    return frame.to(f"{_PAGE}?said=passkey")


@router.get("/account/passkeys/edit")
async def edit_passkey(request: Request, who: Who) -> Response:
    """Another name for a passkey, or away with it."""
    return await _edit(request, who, request.query_params.get("passkey", ""))


async def _edit(request: Request, who: Caller, ident: str, problem: Problem | None = None) -> Response:
    identity = identity_of(request)
    async with identity.db.read() as reader:
        found = [row for row in await identity.passkeys.listing(reader, who) if row["id"] == ident]
    if not found:
        return frame.to(_PAGE)
    return await frame.page(request, "passkey.html", problem, passkey=found[0])


@router.post("/account/passkeys/edit")
async def change_passkey(request: Request, who: Who) -> Response:
    """Rename a passkey."""
    identity = identity_of(request)
    fields: dict[str, str] = {}
    try:
        fields = await browser.form(request)
        name = inputs.name(fields, "name")
        async with identity.db.transaction() as tx:
            await identity.passkeys.rename(tx, who, fields.get("passkey", ""), name)
    except Problem as problem:
        if problem.code == "request.not_found":
            return frame.to(_PAGE)
        if problem.code not in ("console.form_rejected", "request.invalid"):
            raise
        return await _edit(request, who, fields.get("passkey", ""), problem)
    return frame.to(f"{_PAGE}?said=passkey-named")


@router.post("/account/passkeys/remove")
async def remove_passkey(request: Request, who: Recent) -> Response:
    """Forget a passkey."""
    identity = identity_of(request)
    try:
        fields = await browser.form(request)
        async with identity.db.transaction() as tx:
            await identity.passkeys.remove(tx, who, fields.get("passkey", ""))
    except Problem as problem:
        if problem.code == "request.not_found":
            return frame.to(_PAGE)
        if problem.code not in ("passkey.last_way_in", "console.form_rejected"):
            raise
        return await _page(request, who, problem)
    return frame.to(f"{_PAGE}?said=passkey-removed")
