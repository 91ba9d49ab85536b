"""Routes of identity: /auth/…, /whoami, /api-keys and the JWKS.

Sign-in routes (``auth``) open their own transactions: they hash passwords, and their refusals write counters that must
outlive the refusal. They take no Idempotency-Key: a repeated sign-in is a new session, and a repeated registration is
refused as taken. Everything else is a unit of work.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal
from unicodedata import category

from fastapi import APIRouter, Depends, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import (
    PUBLIC,
    Caller,
    Instant,
    InTx,
    Paging,
    Reading,
    anonymous,
    caller,
    client_address,
    require,
)
from portico.control.identity.posture import Severity
from portico.control.identity.service import Client, Identity, SecondStep, SignedIn, normal_email
from portico.control.notifications import mail
from portico.control.requests import JsonRoute, UnitOfWork, shown
from portico.kit.clock import utcnow
from portico.kit.pages import Page

auth = APIRouter(prefix="/auth", tags=["auth"], route_class=JsonRoute)
sessions = APIRouter(tags=["auth"], route_class=UnitOfWork)
keys = APIRouter(prefix="/api-keys", tags=["keys"], route_class=UnitOfWork)
well_known = APIRouter(tags=["auth"], route_class=UnitOfWork)


async def identity(request: Request) -> Identity:
    """Dependency: the process's identity service."""
    found: Identity = request.app.state.identity
    return found


Service = Annotated[Identity, Depends(identity)]
Anybody = Annotated[Caller, Depends(anonymous)]
Known = Annotated[Caller, Depends(caller)]
Leaver = Annotated[Caller, Depends(require(kinds=("person", "agent_key")))]
Person = Annotated[Caller, Depends(require(kinds=("person",)))]
KeyReader = Annotated[Caller, Depends(require("keys:own", "keys:read"))]
Approver = Annotated[Caller, Depends(require("keys:own", "keys:write", kinds=("person",), act="device.approve"))]

# Shape alone; whether an address exists is for a mail to find out.
_ADDRESS = r"^[^@\s\x00-\x1f\x7f]{1,64}@[^@\s\x00-\x1f\x7f]{1,189}$"


def _reachable(text: str) -> str:
    mail.address(text)
    return text


def _address(text: str) -> str:
    """The address in the form that is stored, without what nobody sees: it would make two accounts look like one."""
    found = normal_email(text)
    if not re.fullmatch(_ADDRESS, found) or found.endswith(".") or any(category(c)[0] in "CZ" for c in found):
        raise ValueError("this is not an e-mail address")
    return found


Email = Annotated[
    str, StringConstraints(strip_whitespace=True, max_length=254, pattern=_ADDRESS), AfterValidator(_address)
]
#: One that mail can be sent to: of who registers.
MailAddress = Annotated[Email, AfterValidator(_reachable)]
Name = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$"),
    AfterValidator(shown),
]
Password = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
TokenText = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class Body(BaseModel):
    """A request body: a member that nobody reads is a mistake of the caller's, and said so."""

    model_config = ConfigDict(extra="forbid")


class RegisterBody(Body):
    """A new account and its organization."""

    email: MailAddress
    password: Password
    organization: Name


class LoginBody(Body):
    """Sign-in by password."""

    email: Email
    password: Password


class SwitchBody(Body):
    """Another organization of the person's."""

    organization: Annotated[str, StringConstraints(min_length=1, max_length=64)]


class RefreshBody(Body):
    """One unused refresh token."""

    refresh_token: TokenText


class DeviceBody(Body):
    """A terminal that wants a key."""

    hostname: Name = "unnamed device"


class DeviceTokenBody(Body):
    """A terminal that asks whether its code was approved."""

    device_code: TokenText


class ApproveBody(Body):
    """A person's answer to a code."""

    user_code: Annotated[str, StringConstraints(min_length=1, max_length=32)]
    approve: bool = True


Cidrs = Annotated[
    list[Annotated[str, StringConstraints(max_length=64)]],
    Field(max_length=1000, description="Networks and addresses that the key may be used from; none: from anywhere"),
]
Scopes = Annotated[list[Annotated[str, StringConstraints(max_length=64)]], Field(max_length=64)]


class KeyBody(Body):
    """A new key; `scopes` are for API keys alone and default to everything the caller may do."""

    kind: Literal["agent", "api"]
    name: Name
    scopes: Scopes | None = None
    expires_at: Instant | None = None
    allowed_cidrs: Cidrs | None = None


class KeyPatch(Body):
    """What to change; members left out stay. Scopes can only become fewer and the expiry earlier."""

    # None of them can be null; the factories only say that they may be left out, and what they make is never looked at.
    name: Name = Field(default_factory=str)
    scopes: Scopes = Field(default_factory=list)
    expires_at: Instant = Field(default_factory=utcnow)
    allowed_cidrs: Cidrs = Field(default_factory=list)


class RotateBody(Body):
    """How long the old key still works."""

    overlap_seconds: Annotated[int, Field(ge=0, le=604_800)] = 0


class UserRef(BaseModel):
    """A person."""

    id: str
    email: str


class OrganizationRef(BaseModel):
    """An organization."""

    id: str
    name: str


class Tokens(BaseModel):
    """A signed-in session."""

    user: UserRef
    organization: Annotated[OrganizationRef | None, Field(description="None for a person who belongs to none")]
    session: str
    access_token: str
    refresh_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105 - the scheme, not a secret
    expires_in: int


class Switched(BaseModel):
    """An access token for another organization. The refresh token of the session stays as it is."""

    organization: OrganizationRef
    session: str
    access_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105 - the scheme, not a secret
    expires_in: int


class MfaRequired(BaseModel):
    """A sign-in that takes a second step, by one of these methods, within `expires_in` seconds."""

    mfa_required: Literal[True]
    mfa_token: str
    methods: list[Literal["otp", "recovery", "passkey"]]
    expires_in: int


class DeviceStarted(BaseModel):
    """What to show, and what to poll with."""

    device_code: str
    user_code: str
    verification_uri: str
    verification_uri_complete: str
    interval: int
    expires_in: int


class DeviceKey(BaseModel):
    """The key of an approved device, once."""

    agent_key: str
    key_id: str
    name: str
    organization: OrganizationRef
    user: UserRef


class DeviceDecided(BaseModel):
    """The device that was approved or denied."""

    user_code: str
    hostname: str
    state: Literal["approved", "denied"]


class Session(BaseModel):
    """A live sign-in session."""

    id: str
    user_agent: str | None
    address: str | None
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    authenticated_at: datetime
    methods: list[str]
    current: bool


class Key(BaseModel):
    """A live key, without its text."""

    id: str
    kind: Literal["agent", "api"]
    name: str
    prefix: str
    scopes: list[str]
    permissions: list[str]
    allowed_cidrs: list[str]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None = None
    last_used_address: str | None = None


class KeyDetails(Key):
    """A live key; `allows` says in words what its permissions let it do, if its maker still may."""

    allows: dict[str, str]


class Finding(BaseModel):
    """One thing that is wrong with a key, and what to do."""

    code: Literal[
        "maker_gone", "broad_scopes", "very_old", "unused", "never_used", "old", "no_expiry", "no_cidrs"
    ]  # fmt: skip
    severity: Severity
    advice: str


class KeyFindings(BaseModel):
    """A key that something is wrong with; `severity` is that of its worst finding."""

    id: str
    kind: Literal["agent", "api"]
    name: str
    prefix: str
    maker: str | None
    age_days: int
    last_used_at: datetime | None
    expires_at: datetime | None
    severity: Severity
    findings: list[Finding]


class FindingCounts(BaseModel):
    """How many findings there are."""

    high: int
    medium: int
    low: int


class Posture(BaseModel):
    """The state of the organization's keys; `keys` counts the live ones, `data` has those with findings, the worst first."""

    generated_at: datetime
    keys: int
    findings: FindingCounts
    data: list[KeyFindings]


class CreatedKey(Key):
    """A key just made; `key` is shown this once."""

    key: str


class OrganizationFacts(OrganizationRef):
    """An organization with its plan."""

    plan: str


class KeyRef(BaseModel):
    """The key that a request was made with."""

    id: str
    name: str
    prefix: str


class WhoAmI(BaseModel):
    """The bearer of a credential."""

    kind: Literal["person", "agent_key", "api_key", "support", "operator"]
    user: UserRef | None
    organization: OrganizationFacts | None
    key: KeyRef | None
    session: str | None
    permissions: list[str]
    platform_operator: bool


class Jwk(BaseModel):
    """A public Ed25519 key (RFC 8037)."""

    kty: Literal["OKP"]
    crv: Literal["Ed25519"]
    x: str
    kid: str
    use: Literal["sig"]
    alg: Literal["EdDSA"]


class Jwks(BaseModel):
    """Every key that a token may be signed with now or soon."""

    keys: list[Jwk]


def client_of(request: Request) -> Client:
    """What a sign-in session remembers of whoever sent ``request``."""
    agent = "".join(c for c in request.headers.get("user-agent", "") if c.isprintable())
    return Client(client_address(request), agent)


def tokens_of(signed_in: SignedIn) -> dict[str, Any]:
    """A session as the API shows it, this once."""
    return {
        "user": {"id": signed_in.user_id, "email": signed_in.email},
        "organization": {"id": signed_in.organization_id, "name": signed_in.organization_name}
        if signed_in.organization_id is not None
        else None,
        "session": signed_in.session_id,
        "access_token": signed_in.access_token,
        "refresh_token": signed_in.refresh_token,
        "expires_in": signed_in.expires_in,
    }


@auth.post("/register", status_code=201, response_model=Tokens)
async def register(request: Request, body: RegisterBody, service: Service, who: Anybody) -> Any:
    """Make an account and the organization that it owns, and sign in."""
    return tokens_of(await service.register(who, body.email, body.password, body.organization, client_of(request)))


@auth.post("/login", response_model=Tokens | MfaRequired)
async def login(request: Request, body: LoginBody, service: Service, who: Anybody) -> Any:
    """Sign in by password. An unknown address and a wrong password answer alike.

    An account with an authenticator app answers `mfa_required` instead of tokens; `POST /auth/mfa/verify` goes on from there.
    """
    found = await service.login(who, body.email, body.password, client_of(request))
    return {"mfa_required": True, **asdict(found)} if isinstance(found, SecondStep) else tokens_of(found)


@auth.post("/refresh", response_model=Tokens)
async def refresh(body: RefreshBody, service: Service, who: Anybody) -> Any:
    """Trade an unused refresh token for new tokens. A token that comes back a second time ends its session."""
    return tokens_of(await service.refresh(who, body.refresh_token))


@auth.post("/device", status_code=201, response_model=DeviceStarted)
async def device(body: DeviceBody, service: Service, who: Anybody) -> Any:
    """Start a device sign-in (RFC 8628)."""
    return asdict(await service.device.start(who, body.hostname))


@auth.post("/device/token", response_model=DeviceKey)
async def device_token(body: DeviceTokenBody, service: Service, who: Anybody) -> Any:
    """The agent key of an approved device, once; a `device.…` problem until then."""
    made, person, organization = await service.device_key(who, body.device_code)
    return {"agent_key": made.key, "key_id": made.id, "name": made.name, "organization": organization, "user": person}


@auth.post("/device/approve", response_model=DeviceDecided)
async def device_approve(body: ApproveBody, service: Service, who: Approver) -> Any:
    """Approve or deny a device's code as the signed-in person."""
    done = await service.device.decide(who, body.user_code, approve=body.approve)
    state = "approved" if body.approve else "denied"
    return {"user_code": done.user_code, "hostname": done.hostname, "state": state}


@sessions.post("/auth/logout", status_code=204)
async def logout(tx: InTx, service: Service, who: Leaver) -> Response:
    """End the credential of this request: the sign-in session, or the agent key of this machine."""
    await service.logout(tx, who)
    return Response(status_code=204)


@sessions.post("/auth/switch", response_model=Switched)
async def switch(body: SwitchBody, tx: InTx, service: Service, who: Person) -> Any:
    """Go on in another organization that the person belongs to, with the same session."""
    return await service.switch(tx, who, body.organization)


@sessions.get("/auth/sessions", response_model=Page[Session])
async def list_sessions(reader: Reading, service: Service, who: Person, page: Paging) -> Any:
    """The person's own live sign-in sessions."""
    return await service.sessions(reader, who, page)


@sessions.delete("/auth/sessions", status_code=204)
async def end_all_sessions(tx: InTx, service: Service, who: Person, keep_current: bool = False) -> Response:
    """End every sign-in session of the person; this one too, unless `keep_current`."""
    await service.end_all_sessions(tx, who, keep_current=keep_current)
    return Response(status_code=204)


@sessions.delete("/auth/sessions/{session}", status_code=204)
async def end_session(session: str, tx: InTx, service: Service, who: Person) -> Response:
    """End one of the person's own sign-in sessions."""
    await service.end_session(tx, who, session)
    return Response(status_code=204)


@sessions.get("/whoami", response_model=WhoAmI)
async def whoami(reader: Reading, service: Service, who: Known) -> Any:
    """Who the credential of this request belongs to, and what it may do."""
    return await service.whoami(reader, who)


@keys.get("", response_model=Page[Key])
async def list_keys(reader: Reading, service: Service, who: KeyReader, page: Paging) -> Any:
    """The organization's live keys, newest first; with `keys:own` alone, the caller's own."""
    return await service.keys.listing(reader, who, page)


@keys.post("", status_code=201, response_model=CreatedKey)
async def create_key(
    body: KeyBody,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("keys:own", "keys:write", act="key.create"))],
) -> Any:
    """Make an agent key or a scoped API key. Its text is in this answer and nowhere else."""
    made = await service.keys.create(tx, who, body.kind, body.name, body.scopes, body.expires_at, body.allowed_cidrs)
    return asdict(made)


@keys.get("/posture", response_model=Posture)
async def key_posture(reader: Reading, service: Service, who: KeyReader) -> Any:
    """What is wrong with the organization's keys (age, use, expiry, scopes, networks, makers), and what to do about it; with
    `keys:own` alone, with the caller's own."""
    return await service.keys.posture(reader, who)


@keys.get("/{key}", response_model=KeyDetails)
async def get_key(key: str, reader: Reading, service: Service, who: KeyReader) -> Any:
    """One live key, and in words what it allows; with `keys:own` alone, one of the caller's own."""
    return await service.keys.get(reader, who, key)


@keys.patch("/{key}", response_model=Key)
async def change_key(
    key: str,
    body: KeyPatch,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("keys:own", "keys:write", act="key.update"))],
) -> Any:
    """Rename a key, limit it to other networks, take scopes away or bring its expiry forward. Live tunnels that it may not
    serve any more, or not from where their agent is, end within two seconds."""
    return await service.keys.change(tx, who, key, body.model_dump(exclude_unset=True))


@keys.delete("/{key}", status_code=204)
async def revoke_key(
    key: str,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("keys:own", "keys:write", act="key.revoke"))],
) -> Response:
    """Revoke a key; live tunnels that it opened end within two seconds."""
    await service.keys.revoke(tx, who, key)
    return Response(status_code=204)


@keys.post("/{key}/rotate", status_code=201, response_model=CreatedKey)
async def rotate_key(
    key: str,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, Depends(require("keys:own", "keys:write", act="key.rotate"))],
    body: RotateBody | None = None,
) -> Any:
    """A new key with the same rights; the old one ends now, or after `overlap_seconds`."""
    return asdict(await service.keys.rotate(tx, who, key, body.overlap_seconds if body else 0))


@well_known.get("/.well-known/jwks.json", response_model=Jwks, openapi_extra=PUBLIC.openapi())
async def jwks(reader: Reading, service: Service, response: Response) -> Any:
    """The public keys of access tokens, session tokens and grants."""
    # Far shorter than the time that a key is published before it signs.
    response.headers["Cache-Control"] = "public, max-age=300"
    return {"keys": await service.signing_keys.public_jwks(reader)}
