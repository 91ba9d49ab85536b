"""Routes of one's own account: /auth/email, /auth/password, /auth/mfa, /auth/passkeys, /auth/step-up.

Those of ``router`` open their own transactions, since they hash passwords or count attempts, and refusals write counters that
must outlive the refusal; so they take no Idempotency-Key. Those of ``own`` are units of work.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel, Field, StringConstraints

from portico.control.access import Caller, InTx, Reading, identify, require_recent
from portico.control.identity.api import (
    Anybody,
    Body,
    Email,
    MailAddress,
    Name,
    Password,
    Person,
    Service,
    Tokens,
    client_of,
    tokens_of,
)
from portico.control.identity.proofs import Proof
from portico.control.requests import JsonRoute, UnitOfWork
from portico.errors import Problem

router = APIRouter(prefix="/auth", tags=["account"], route_class=JsonRoute)
own = APIRouter(prefix="/auth", tags=["account"], route_class=UnitOfWork)

Recent = Annotated[Caller, Depends(require_recent())]


Link = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Code = Annotated[str, StringConstraints(min_length=1, max_length=64)]
PasskeyId = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Credential = Annotated[
    dict[str, Any], Field(description="The PublicKeyCredential that the browser made, as its toJSON() gives it")
]
Method = Literal["pwd", "otp", "recovery", "passkey"]


class LinkBody(Body):
    """The token of a link that came by mail."""

    token: Link


class VerifyBody(LinkBody):
    """The token, and a new password from whoever is not signed in to the account that it is of."""

    password: Password | None = None


class ForgotBody(Body):
    """Whose password is forgotten."""

    email: Email


class ResetBody(Body):
    """The token of the link, and the new password."""

    token: Link
    password: Password


class ChangePasswordBody(Body):
    """The password of now, and the new one."""

    current_password: Password
    password: Password


class ChangeEmailBody(Body):
    """The new address; it counts once the link in the mail to it is followed."""

    email: MailAddress


class CodeBody(Body):
    """A code of the authenticator app."""

    code: Code


class MfaVerifyBody(Body):
    """The token of the first step, and one proof for the second."""

    mfa_token: Link
    code: Code | None = None
    recovery_code: Code | None = None
    passkey: Credential | None = None


class MfaTokenBody(Body):
    """The token of the first step."""

    mfa_token: Link


class StepUpBody(Body):
    """A proof of who one is; one of these. With an authenticator app set up, a password is none."""

    password: Password | None = None
    code: Code | None = None
    recovery_code: Code | None = None
    passkey: Credential | None = None


class PasskeyBody(Body):
    """A new passkey, and what to call it."""

    credential: Credential
    name: Name = "Passkey"


class PasskeySignInBody(Body):
    """What the authenticator signed."""

    credential: Credential


class PasskeyPatch(Body):
    """Another name."""

    name: Name


class Address(BaseModel):
    """The e-mail address that a link was about."""

    email: str


class Factors(BaseModel):
    """What the person signs in with; `recovery_codes` and `passkeys` are how many there are."""

    password: bool
    totp: bool
    recovery_codes: int
    passkeys: int


class TotpKey(BaseModel):
    """A key for an authenticator app, as text and as the URI of a QR code."""

    secret: str
    uri: str


class RecoveryCodes(BaseModel):
    """Ten codes, each good for one sign-in without the app; shown this once."""

    recovery_codes: list[str]


class Passkey(BaseModel):
    """A passkey of the person; `backed_up`: its authenticator keeps copies elsewhere."""

    id: str
    name: str
    backed_up: bool
    created_at: datetime
    last_used_at: datetime | None


class Passkeys(BaseModel):
    """All passkeys of the person."""

    data: list[Passkey]


class ProvenAnswer(BaseModel):
    """When the person of this session last proved who they are, and by what."""

    authenticated_at: datetime
    methods: list[Method]


# --- the address


async def _signed_in(request: Request) -> str | None:
    """The person whose access token came along, if one did; these routes are for anybody."""
    try:
        found = await identify(request)
    except Problem:
        return None
    return found.user_id if found.kind == "person" else None


@router.post("/email/verify", response_model=Address)
async def verify_email(request: Request, body: VerifyBody, service: Service, who: Anybody) -> Any:
    """Verify the address of an account by the link that was mailed to it. A link works once.

    With the access token of a session of that account, it is verified. Without one, whoever made it may be somebody else: a new
    `password` takes it over, and everything ends that was there to sign in by: sessions, keys, second steps and passkeys.
    """
    return {"email": await service.accounts.verify_email(who, body.token, await _signed_in(request), body.password)}


@router.post("/email/resend", status_code=202, response_class=Response)
async def resend_verification(service: Service, who: Person) -> Response:
    """Mail the link again, to the address of one's own account."""
    await service.accounts.resend(who)
    return Response(status_code=202)


@router.post("/email/change", status_code=202, response_class=Response)
async def change_email(body: ChangeEmailBody, service: Service, who: Recent) -> Response:
    """Ask for another address. The link in the mail to it makes it the account's."""
    await service.accounts.change_email(who, body.email)
    return Response(status_code=202)


@router.post("/email/confirm", response_model=Address)
async def confirm_email(request: Request, body: LinkBody, service: Service, who: Anybody) -> Any:
    """Make a new address the account's by the link that was mailed to it, with the access token of a session of that account.
    The old address is told."""
    return {"email": await service.accounts.confirm_email(who, body.token, await _signed_in(request))}


# --- the password


@router.post("/password/forgot", status_code=202, response_class=Response)
async def forgot_password(body: ForgotBody, service: Service, who: Anybody) -> Response:
    """Mail a link that sets a new password, if there is such an account. The answer is the same if there is none."""
    await service.accounts.forgot(who, body.email)
    return Response(status_code=202)


@router.post("/password/reset", response_model=Address)
async def reset_password(body: ResetBody, service: Service, who: Anybody) -> Any:
    """Set a new password by the link that was mailed. Every session of the account ends; its second steps stay."""
    return {"email": await service.accounts.reset(who, body.token, body.password)}


@router.post("/password/change", status_code=204)
async def change_password(body: ChangePasswordBody, service: Service, who: Person) -> Response:
    """Set a new password. Every other session of the person ends."""
    await service.accounts.change_password(who, body.current_password, body.password)
    return Response(status_code=204)


# --- second steps


@own.get("/mfa", response_model=Factors)
async def factors(reader: Reading, service: Service, who: Person) -> Any:
    """What the person signs in with."""
    return await service.factors.status(reader, who)


@own.post("/mfa/totp", status_code=201, response_model=TotpKey)
async def start_totp(tx: InTx, service: Service, who: Recent) -> Any:
    """A key for an authenticator app (RFC 6238). It counts once a code made with it is confirmed."""
    return await service.factors.start(tx, who)


@router.post("/mfa/totp/confirm", response_model=RecoveryCodes)
async def confirm_totp(body: CodeBody, service: Service, who: Recent) -> Any:
    """Switch the second step on; the answer has the recovery codes, this once."""
    return {"recovery_codes": await service.factors.confirm(who, body.code)}


@own.delete("/mfa/totp", status_code=204)
async def remove_totp(tx: InTx, service: Service, who: Recent) -> Response:
    """Switch the second step off. The recovery codes go with it."""
    await service.factors.disable(tx, who)
    return Response(status_code=204)


@own.post("/mfa/recovery-codes", response_model=RecoveryCodes)
async def new_recovery_codes(tx: InTx, service: Service, who: Recent) -> Any:
    """Ten new recovery codes, in the place of the old."""
    return {"recovery_codes": await service.factors.new_recovery_codes(tx, who)}


@router.post("/mfa/verify", response_model=Tokens)
async def verify_second_step(request: Request, body: MfaVerifyBody, service: Service, who: Anybody) -> Any:
    """The second step of a sign-in, after `POST /auth/login` answered `mfa_required`."""
    proof = Proof(code=body.code, recovery_code=body.recovery_code, passkey=body.passkey)
    return tokens_of(await service.second_steps.verify(who, body.mfa_token, proof, client_of(request)))


@router.post("/mfa/passkey/options", response_model=dict[str, Any])
async def second_step_options(body: MfaTokenBody, service: Service, who: Anybody) -> Any:
    """What to hand to `navigator.credentials.get` for the second step."""
    return await service.second_steps.passkey_options(body.mfa_token)


@router.post("/step-up", response_model=ProvenAnswer)
async def step_up(body: StepUpBody, service: Service, who: Person) -> Any:
    """Prove again who one is, for acts that ask for a recent sign-in (`auth.step_up_required`)."""
    proof = Proof(body.password, body.code, body.recovery_code, body.passkey)
    return asdict(await service.step_up.prove(who, proof))


@own.post("/step-up/passkey/options", response_model=dict[str, Any])
async def step_up_options(tx: InTx, service: Service, who: Person) -> Any:
    """What to hand to `navigator.credentials.get` for a step-up."""
    return await service.step_up.passkey_options(tx, who)


# --- passkeys


@router.post("/passkeys/authenticate/options", response_model=dict[str, Any])
async def sign_in_options(service: Service, who: Anybody) -> Any:
    """What to hand to `navigator.credentials.get` to sign in without a name or password."""
    return await service.passkeys.sign_in_options(who)


@router.post("/passkeys/authenticate/verify", response_model=Tokens)
async def sign_in_by_passkey(request: Request, body: PasskeySignInBody, service: Service, who: Anybody) -> Any:
    """Sign in by passkey alone."""
    return tokens_of(await service.passkeys.sign_in(who, body.credential, client_of(request)))


@own.get("/passkeys", response_model=Passkeys)
async def list_passkeys(reader: Reading, service: Service, who: Person) -> Any:
    """The person's passkeys."""
    return {"data": await service.passkeys.listing(reader, who)}


@own.post("/passkeys/register/options", response_model=dict[str, Any])
async def registration_options(tx: InTx, service: Service, who: Recent) -> Any:
    """What to hand to `navigator.credentials.create`."""
    return await service.passkeys.registration(tx, who)


@router.post("/passkeys", status_code=201, response_model=Passkey)
async def register_passkey(body: PasskeyBody, service: Service, who: Recent) -> Any:
    """Keep a passkey that the browser made."""
    return await service.passkeys.register(who, body.credential, body.name)


@own.patch("/passkeys/{passkey}", response_model=Passkey)
async def rename_passkey(passkey: PasskeyId, body: PasskeyPatch, tx: InTx, service: Service, who: Person) -> Any:
    """Call a passkey something else."""
    return await service.passkeys.rename(tx, who, passkey, body.name)


@own.delete("/passkeys/{passkey}", status_code=204)
async def remove_passkey(passkey: PasskeyId, tx: InTx, service: Service, who: Recent) -> Response:
    """Forget a passkey; not the last way to sign in."""
    await service.passkeys.remove(tx, who, passkey)
    return Response(status_code=204)
