"""Routes of tunnels and agent sessions: /tunnels and /agent/sessions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import (
    KEYS,
    Access,
    Caller,
    Instant,
    InTx,
    Paging,
    Reading,
    client_address,
    credential_of,
    request_id,
    require,
)
from portico.control.requests import Repeatable, UnitOfWork, once, permitted, shown, writing
from portico.control.shortcuts import Shortcut, document
from portico.control.tunnels import history, policy
from portico.control.tunnels.service import Tunnels
from portico.control.tunnels.sessions import AgentFacts, Sessions, startable
from portico.control.tunnels.spec import TunnelSpec
from portico.control.tunnels.visitors import VisitorPasswords
from portico.errors import Problem
from portico.kit.db import Tx
from portico.kit.pages import Page

reserved = APIRouter(prefix="/reserved-names", tags=["tunnels"], route_class=UnitOfWork)
tunnels = APIRouter(prefix="/tunnels", tags=["tunnels"], route_class=UnitOfWork)
agent = APIRouter(prefix="/agent/sessions", tags=["tunnels"], route_class=UnitOfWork)
policies = APIRouter(prefix="/tunnels", tags=["tunnels"], route_class=Repeatable)
events = APIRouter(prefix="/events", tags=["tunnels"], route_class=UnitOfWork)
hot = APIRouter(prefix="/agent/sessions", tags=["tunnels"], route_class=Repeatable)


async def service(request: Request) -> Tunnels:
    """Dependency: the process's tunnels service."""
    found: Tunnels = request.app.state.tunnels
    return found


async def session_service(request: Request) -> Sessions:
    """Dependency: the process's agent session service."""
    found: Sessions = request.app.state.agent_sessions
    return found


Service = Annotated[Tunnels, Depends(service)]
SessionService = Annotated[Sessions, Depends(session_service)]
Reads = Annotated[Caller, Depends(require("tunnels:read"))]
Writes = Annotated[Caller, Depends(require("tunnels:write"))]
Connects = Annotated[Caller, Depends(require("agent:connect", kinds=KEYS))]
Id = Annotated[str, Path(max_length=64)]
ObjectId = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]

Label = Annotated[str, StringConstraints(min_length=1, max_length=63)]
Shown = Annotated[
    str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$"), AfterValidator(shown)
]
AgentId = Annotated[str, StringConstraints(min_length=8, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
Region = Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=r"^[a-z0-9-]+$")]
Protocol = Literal["http", "tcp", "tls"]
RemotePort = Annotated[
    int, Field(ge=1, le=65_535, strict=True, description="Public port of a TCP tunnel, of the platform's range")
]
Domain = Annotated[str, StringConstraints(min_length=1, max_length=253), Field(description="A domain of your own")]
Document = Annotated[
    dict[str, Any] | Annotated[str, StringConstraints(max_length=policy.MAX_TEXT_CHARS)],
    Field(
        description="Policy of the tunnel (contracts/policy.schema.json): an object, or the text of one as YAML or JSON, whose"
        " faults then have a line and a column. A user given by name alone keeps the password that the tunnel has for it"
    ),
]
PolicyVersion = Annotated[
    int, Field(ge=1, strict=True, description="Change the tunnel only if its policy still has this version; else 409")
]


class Body(BaseModel):
    """A request body: a member that nobody reads is a mistake of the caller's, and said so."""

    model_config = ConfigDict(extra="forbid")


class TunnelBody(Body):
    """A new tunnel. Without `name` or `subdomain` they are derived from each other, or made up.

    A tunnel with `protocol` `tcp` has a public port instead of a subdomain: `remote_port`, or a free one. One with `tls` has a
    subdomain, and its visitors' TLS is passed through by that name, untouched."""

    protocol: Protocol = "http"
    name: Label | None = None
    subdomain: Label | None = None
    remote_port: RemotePort | None = None
    domain: Domain | None = None
    target: Shown | None = None
    policy: Document | None = None


class TunnelPatch(Body):
    """What to change; members left out stay."""

    name: Label | None = None
    subdomain: Label | None = None
    remote_port: RemotePort | None = None
    target: Shown | None = None
    policy: Document | None = None
    policy_version: PolicyVersion | None = None


class TunnelAgent(BaseModel):
    """Who serves an online tunnel."""

    hostname: str
    relay: str


class Tunnel(BaseModel):
    """One tunnel."""

    id: str
    name: str
    protocol: Protocol
    subdomain: str | None
    remote_port: int | None
    url: str
    domains: Annotated[list[str], Field(description="Domains of one's own that lead to it, beside `url`")]
    state: Literal["offline", "online", "stopped", "suspended"]
    frozen: Annotated[
        str | None, Field(description="The limit or feature of the plan for want of which it is suspended")
    ]
    target: str | None
    policy: dict[str, Any]
    policy_version: int
    agent: TunnelAgent | None
    created_at: datetime
    updated_at: datetime


class TunnelEvent(BaseModel):
    """One thing that happened to a tunnel."""

    id: str
    at: datetime
    kind: str
    details: dict[str, Any]


class OrganizationEvent(TunnelEvent):
    """One thing that happened to one of the organization's tunnels; `name` is the tunnel's name now."""

    tunnel: str
    name: str


# -- writes that may bring passwords ------------------------------------------------------------------------------------


async def _credential(request: Request) -> str:
    """Dependency: the bearer credential, not looked up yet; without one nobody learns whether a body would fit."""
    return credential_of(request)


Credential = Annotated[str, Depends(_credential)]
# Of the routes that ask ``permitted`` themselves.
_CONNECTS: dict[str, Any] = {"security": [{"bearer": []}], **Access(KEYS, ("agent:connect",)).openapi()}


def _wanted(written: dict[str, Any] | str | None, tunnel: str | None = None) -> policy.Wanted | None:
    """The policy of a body; a fault says which tunnel of several it is of."""
    try:
        return None if written is None else policy.read(written)
    except Problem as problem:
        if tunnel is not None:
            problem.extra["tunnel"] = tunnel
        raise


async def _digested(request: Request, who: Caller, wanted: policy.Wanted | None) -> policy.Wanted | None:
    """The policy with digests in the place of passwords, made before any transaction."""
    return (await _all_digested(request, who, [wanted]))[0]


async def _all_digested(
    request: Request, who: Caller, wanted: list[policy.Wanted | None]
) -> list[policy.Wanted | None]:
    visitors: VisitorPasswords = request.app.state.visitor_passwords
    made = await visitors.digested(who.org, wanted)
    if made != wanted:
        request.state.caller = None  # it took its time: the credential may be revoked by now
    return made


def _shown(tunnel: dict[str, Any], status: int) -> Response:
    return Response(Tunnel.model_validate(tunnel).model_dump_json(), status, media_type="application/json")


@policies.post("", response_model=Tunnel, status_code=201)
async def create_tunnel(request: Request, who: Writes, tunnels: Service, body: TunnelBody) -> Response:
    """Make a tunnel, and so reserve its name and subdomain. It goes online when an agent session names it."""
    wanted = await _digested(request, who, _wanted(body.policy))

    async def run(tx: Tx, who: Caller) -> Response:
        made = await tunnels.create(
            tx,
            who,
            protocol=body.protocol,
            name=body.name,
            subdomain=body.subdomain,
            remote_port=body.remote_port,
            target=body.target,
            wanted=wanted,
            domain=body.domain,
        )
        return _shown(made, 201)

    return await writing(request, "tunnels:write", run)


@policies.patch("/{tunnel_id}", response_model=Tunnel)
async def change_tunnel(request: Request, who: Writes, tunnels: Service, tunnel_id: Id, body: TunnelPatch) -> Response:
    """Change a tunnel. A new subdomain or port fences the grants given before, and agents get new ones by themselves. A new
    policy ends nothing: relays apply it within 2 s, and requests in flight finish under the one that they began with."""
    wanted = body.model_dump(exclude_unset=True, exclude={"policy", "policy_version"})
    if any(wanted.get(key, "") is None for key in ("name", "subdomain", "remote_port")):
        raise Problem("tunnel.name_invalid", "a tunnel keeps its name and address; give one or leave the member out")
    if "remote_port" in wanted:
        wanted["port"] = wanted.pop("remote_port")
    wanted["policy"] = await _digested(request, who, _wanted(body.policy))

    async def run(tx: Tx, who: Caller) -> Response:
        return _shown(await tunnels.update(tx, who, tunnel_id, wanted, body.policy_version), 200)

    return await writing(request, "tunnels:write", run)


# -- reading and the rest ----------------------------------------------------------------------------------------------


@events.get("", response_model=Page[OrganizationEvent])
async def list_organization_events(
    reader: Reading,
    who: Reads,
    page: Paging,
    tunnel: Annotated[list[ObjectId] | None, Query(max_length=100, description="only of these tunnels")] = None,
    since: Annotated[Instant | None, Query(description="nothing older than this")] = None,
) -> Any:
    """What happened to the organization's tunnels, newest first. To follow: ask again with `since`, leave known ids out."""
    return await history.organization(reader, who, tunnel or [], since, page)


@tunnels.get("", response_model=Page[Tunnel])
async def list_tunnels(reader: Reading, who: Reads, tunnels: Service, page: Paging) -> Any:
    """The organization's tunnels, oldest first."""
    return await tunnels.listing(reader, who, page)


@tunnels.get("/{tunnel_id}", response_model=Tunnel)
async def get_tunnel(reader: Reading, who: Reads, tunnels: Service, tunnel_id: Id) -> Any:
    """One tunnel."""
    return await tunnels.get(reader, who, tunnel_id)


@tunnels.delete("/{tunnel_id}", status_code=204)
async def delete_tunnel(tx: InTx, who: Writes, tunnels: Service, tunnel_id: Id) -> Response:
    """Delete a tunnel and free its names; a live session is told within 2 s."""
    await tunnels.delete(tx, who, tunnel_id)
    return Response(status_code=204)


@tunnels.post("/{tunnel_id}/stop", response_model=Tunnel)
async def stop_tunnel(tx: InTx, who: Writes, tunnels: Service, tunnel_id: Id) -> Any:
    """Take a tunnel off line; a live session is told within 2 s. Starting its agent again makes it active."""
    return await tunnels.stop(tx, who, tunnel_id)


@tunnels.get("/{tunnel_id}/events", response_model=Page[TunnelEvent])
async def list_events(reader: Reading, who: Reads, tunnels: Service, tunnel_id: Id, page: Paging) -> Any:
    """What happened to a tunnel, newest first."""
    return await tunnels.events(reader, who, tunnel_id, page)


# -- reserved names ----------------------------------------------------------------------------------------------------


class NameBody(Body):
    """A name to keep."""

    name: Label


class ReservedName(BaseModel):
    """A name that the organization keeps; `tunnel` is the one that has it now."""

    name: str
    url: str
    tunnel: str | None
    reserved_at: datetime


@reserved.get("", response_model=Page[ReservedName])
async def list_reserved_names(reader: Reading, who: Reads, tunnels: Service, page: Paging) -> Any:
    """The names that the organization keeps, with or without a tunnel."""
    return await tunnels.reservations.listing(reader, who, page)


@reserved.post("", response_model=ReservedName, status_code=201)
async def reserve_name(tx: InTx, who: Writes, tunnels: Service, body: NameBody) -> Any:
    """Keep a name: no other organization can take it, whatever happens to the tunnel that has it."""
    return await tunnels.reservations.reserve(tx, who, body.name)


@reserved.delete("/{reserved_name}", status_code=204)
async def release_name(tx: InTx, who: Writes, tunnels: Service, reserved_name: Label) -> Response:
    """Keep a name no longer. A tunnel that has it goes on; without one, others can have it when it has cooled down."""
    await tunnels.reservations.release(tx, who, reserved_name)
    return Response(status_code=204)


# -- agent sessions -----------------------------------------------------------------------------------------------------


class SpecBody(BaseModel):
    """One tunnel that an agent serves. Members of later versions are passed over: agents are upgraded before servers."""

    protocol: Protocol = "http"
    name: Label | None = None
    subdomain: Label | None = None
    remote_port: RemotePort | None = None
    domain: Domain | None = None
    target: Shown | None = None
    policy: Document | None = None

    def spec(self) -> TunnelSpec:
        wanted = _wanted(self.policy, self.name)
        return TunnelSpec(self.protocol, self.name, self.subdomain, self.target, wanted, self.remote_port, self.domain)


class SessionBody(BaseModel):
    """An agent instance and the tunnels that it serves."""

    agent_id: AgentId
    hostname: Shown = "unknown"
    version: Shown = "unknown"
    region: Region | None = None
    tunnels: Annotated[list[SpecBody], Field(max_length=10_000)] = []


class RefreshBody(BaseModel):
    """The instance that the session belongs to."""

    agent_id: AgentId


class GrantDocument(BaseModel):
    """A tunnel of the session and the JWT by which a relay binds it."""

    tunnel: str
    name: str
    url: str
    grant: str
    expires_at: datetime


class SessionOrganization(BaseModel):
    """The organization behind the agent key."""

    id: str
    name: str


class SessionAccount(BaseModel):
    """What an agent shows of the account behind its key."""

    organization: SessionOrganization
    plan: str
    user: str | None = None


class SessionDocument(BaseModel):
    """A session: its JWT, the relays to connect to in order, and a grant per tunnel."""

    session: str
    token: str
    expires_at: datetime
    refresh_after: int
    edges: list[str]
    account: SessionAccount
    grants: list[GrantDocument]


class GrantsDocument(BaseModel):
    """Grants of tunnels just added."""

    grants: list[GrantDocument]


def _json(document: dict[str, Any], status: int) -> Response:
    """The answer as the service shaped it: this is the hottest route, and its shape is tested, not validated per call."""
    return Response(json.dumps(document, separators=(",", ":")), status, media_type="application/json")


# These two are asked by every agent of an installation at once when it comes back, hence without the usual ceremony: the
# caller is identified on the connection that serves the request, and a reconnect or refresh is one statement.
@hot.post("", response_model=SessionDocument, status_code=201, openapi_extra=_CONNECTS)
async def open_session(request: Request, credential: Credential, body: SessionBody) -> Response:
    """Start the session of an agent instance, or continue it under its next generation."""
    state = request.app.state
    sessions: Sessions = state.agent_sessions
    limit = state.settings.session_max_tunnels
    if len(body.tunnels) > limit:
        raise Problem("tunnel.limit_reached", f"a session has at most {limit} tunnels", limit=limit)
    facts = AgentFacts(body.agent_id, body.hostname, body.version, body.region)
    specs = [spec.spec() for spec in body.tunnels]
    if any(spec.policy is not None and spec.policy.passwords() for spec in specs):
        async with state.db.read() as reader:
            who = await permitted(request, reader, "agent:connect")
        made = await _all_digested(request, who, [spec.policy for spec in specs])
        specs = [replace(spec, policy=wanted) for spec, wanted in zip(specs, made, strict=True)]
    if "idempotency-key" in request.headers:
        async with state.db.transaction() as tx:
            who = await permitted(request, tx, "agent:connect")
            return await once(request, tx, lambda: _opened(sessions, tx, who, facts, specs))
    document = await _in_one_statement(request, sessions, credential, facts, specs)
    if document is not None:
        return _json(document, 201)
    async with state.db.transaction() as tx:
        who = await permitted(request, tx, "agent:connect")
        answer = await _opened(sessions, tx, who, facts, specs)
    sessions.remember(credential, body.agent_id, who)
    return answer


async def _opened(sessions: Sessions, tx: Tx, who: Caller, facts: AgentFacts, specs: Sequence[TunnelSpec]) -> Response:
    return _json(await sessions.open(tx, who, facts, specs), 201)


async def _in_one_statement(
    request: Request, sessions: Sessions, credential: str, facts: AgentFacts, specs: Sequence[TunnelSpec]
) -> dict[str, Any] | None:
    """The session when that takes one statement: a reconnect, or a new instance with tunnels that exist."""
    known = sessions.knows(credential, facts.agent_id)
    if not known and not startable(specs):
        return None
    async with request.app.state.db.direct() as reader:
        if not known and (recalled := sessions.recalled(credential, client_address(request))) is not None:
            who = replace(recalled, request_id=request_id(request), address=client_address(request))
            if (document := await sessions.started(reader, who, facts, specs)) is not None:
                request.state.caller = who
                sessions.remember(credential, facts.agent_id, who)
                return document
        who = await permitted(request, reader, "agent:connect")
        document = await (sessions.continued if known else sessions.started)(reader, who, facts, specs)
    if document is not None:
        sessions.remember(credential, facts.agent_id, who)
    return document


@hot.post("/{session_id}/refresh", response_model=SessionDocument, openapi_extra=_CONNECTS)
async def refresh_session(request: Request, _: Credential, session_id: Id, body: RefreshBody) -> Response:
    """New tokens for a live session, before the old ones expire. Repeating it is harmless."""
    state = request.app.state
    async with state.db.direct() as reader:
        who = await permitted(request, reader, "agent:connect")
        document = await state.agent_sessions.refresh(reader, who, session_id, body.agent_id)
    if document is None:
        async with state.db.transaction() as tx:
            document = await state.agent_sessions.refresh_again(tx, who, session_id, body.agent_id)
    return _json(document, 200)


async def _open_quickly(request: Request) -> Response | None:
    body = await document(request, SessionBody)
    return None if body is None else await open_session(request, credential_of(request), body)


async def _refresh_quickly(request: Request, session_id: str) -> Response | None:
    body = await document(request, RefreshBody)
    return None if body is None else await refresh_session(request, credential_of(request), session_id, body)


SHORTCUTS = (
    Shortcut("/v1/agent/sessions", _open_quickly),
    Shortcut(r"/v1/agent/sessions/([A-Za-z0-9_-]{1,64})/refresh", _refresh_quickly),
)


@agent.delete("/{session_id}", status_code=204)
async def end_session(tx: InTx, who: Connects, sessions: SessionService, session_id: Id) -> Response:
    """End a session; its relay closes it within 2 s."""
    await sessions.end(tx, who, session_id)
    return Response(status_code=204)


@hot.post("/{session_id}/tunnels", response_model=GrantsDocument, status_code=201)
async def add_tunnel(
    request: Request, who: Connects, sessions: SessionService, session_id: Id, body: SpecBody
) -> Response:
    """One more tunnel in a live session."""
    spec = body.spec()
    spec = replace(spec, policy=await _digested(request, who, spec.policy))

    async def run(tx: Tx, who: Caller) -> Response:
        return _json(await sessions.add(tx, who, session_id, spec), 201)

    return await writing(request, "agent:connect", run)


@agent.delete("/{session_id}/tunnels/{tunnel_id}", status_code=204)
async def remove_tunnel(tx: InTx, who: Connects, sessions: SessionService, session_id: Id, tunnel_id: Id) -> Response:
    """Take a tunnel out of a live session. The tunnel itself stays."""
    await sessions.remove(tx, who, session_id, tunnel_id)
    return Response(status_code=204)
