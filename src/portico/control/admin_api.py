"""Routes of platform operators: /admin/users, /admin/organizations, /admin/audit, /admin/relays.

Nobody else is admitted to any of them, whatever they are in an organization. Acts that harm or that open somebody's data ask
for a proof of who the operator is from the last minutes (``step_up``); all of them, refused ones too, are in the log of the
installation, and in that of the organization concerned.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, StringConstraints

from portico.control.access import Caller, Db, InTx, Paging, Reading, require_operator
from portico.control.audit import api as audit_api
from portico.control.audit import export
from portico.control.audit import service as audit
from portico.control.audit.api import AuditEvent, Checkpoints, Filters, Seq, Verification
from portico.control.identity import operators, tenants
from portico.control.identity.api import Body, OrganizationRef, Service
from portico.control.identity.org_api import Id
from portico.control.identity.people import Reason
from portico.control.requests import UnitOfWork
from portico.kit.pages import Page

users = APIRouter(prefix="/admin/users", tags=["admin"], route_class=UnitOfWork)
resets = APIRouter(prefix="/admin/mfa-resets", tags=["admin"], route_class=UnitOfWork)
organizations = APIRouter(prefix="/admin/organizations", tags=["admin"], route_class=UnitOfWork)
support = APIRouter(prefix="/admin/support-sessions", tags=["admin"], route_class=UnitOfWork)
logs = APIRouter(prefix="/admin/audit", tags=["admin"], route_class=UnitOfWork)
fleet = APIRouter(prefix="/admin/relays", tags=["admin"], route_class=UnitOfWork)
routers = (users, resets, organizations, support, logs, fleet)

Operator = Annotated[Caller, Depends(require_operator())]
Search = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=254, pattern=r"^[^\x00]+$")]


def dangerous(act: str) -> Any:
    """Who may carry out an act that asks for a recent proof, and whose refusal is recorded as ``act``."""
    return Depends(require_operator(step_up=True, act=act))


class ReasonBody(Body):
    """Why. It is kept in the audit log, where the organization reads it, too."""

    reason: Reason


class Person(BaseModel):
    """An account."""

    id: str
    email: str
    email_verified_at: datetime | None
    created_at: datetime
    disabled_at: datetime | None
    second_factor: bool
    platform_operator: bool
    sessions: int


class Membership(OrganizationRef):
    """An organization that a person belongs to."""

    role: str


class PersonWithOrganizations(Person):
    """An account, and where the person is a member."""

    organizations: list[Membership]


class MfaReset(BaseModel):
    """A request to take somebody's second factors away. Another operator than `requested_by` confirms it."""

    id: str
    user_id: str
    requested_by: str
    reason: str
    created_at: datetime
    expires_at: datetime
    confirmed_by: str | None
    confirmed_at: datetime | None
    state: Literal["waiting", "done", "expired", "withdrawn"]


class Tenant(BaseModel):
    """An organization as operators see it."""

    id: str
    name: str
    plan: str
    created_at: datetime
    suspended_at: datetime | None
    suspended_reason: str | None
    delete_after: datetime | None
    members: int
    tunnels: int


class SupportToken(BaseModel):
    """A session of support access; `token` is shown this once."""

    id: str
    organization: str
    operator_id: str
    scope: Literal["read", "write"]
    reason: str
    created_at: datetime
    expires_at: datetime
    token: str


class Relay(BaseModel):
    """A relay as it last told of itself; `live` while it did so within the lease."""

    name: str
    region: str
    connect_url: str
    public_url: str
    version: int
    load: dict[str, float]
    draining: bool
    tunnels: int
    created_at: datetime
    seen_at: datetime
    live: bool


# -- people


@users.get("", response_model=Page[Person])
async def list_users(
    reader: Reading,
    service: Service,
    who: Operator,
    page: Paging,
    search: Annotated[Search | None, Query(description="A part of the address, or an id")] = None,
    disabled: Annotated[bool | None, Query()] = None,
) -> Any:
    """Accounts, oldest first."""
    return await service.people.listing(reader, page, search, disabled)


@users.get("/{user}", response_model=PersonWithOrganizations)
async def get_user(user: Id, reader: Reading, service: Service, who: Operator) -> Any:
    """One account and its organizations."""
    return await service.people.get(reader, user)


@users.post("/{user}/disable", response_model=PersonWithOrganizations)
async def disable_user(
    user: Id, body: ReasonBody, tx: InTx, service: Service, who: Annotated[Caller, dangerous("user.disable")]
) -> Any:
    """Refuse the person's sign-in, sessions and keys, and end their live tunnels within two seconds."""
    return await service.people.disable(tx, who, user, body.reason)


@users.post("/{user}/enable", response_model=PersonWithOrganizations)
async def enable_user(
    user: Id, body: ReasonBody, tx: InTx, service: Service, who: Annotated[Caller, dangerous("user.enable")]
) -> Any:
    """Let the person in again. Keys work again; ended sessions do not come back."""
    return await service.people.enable(tx, who, user, body.reason)


@users.delete("/{user}/sessions", status_code=204)
async def end_user_sessions(
    user: Id, tx: InTx, service: Service, who: Annotated[Caller, dangerous("session.end_all")]
) -> Response:
    """End every sign-in session of a person."""
    await service.people.end_sessions(tx, who, user)
    return Response(status_code=204)


@users.post("/{user}/mfa-reset", status_code=201, response_model=MfaReset)
async def ask_mfa_reset(
    user: Id, body: ReasonBody, tx: InTx, service: Service, who: Annotated[Caller, dangerous("user.mfa_reset_request")]
) -> Any:
    """Ask that a person's authenticator app, recovery codes and passkeys be taken away. Nothing happens until another
    operator confirms it."""
    return await service.people.ask_mfa_reset(tx, who, user, body.reason)


@resets.get("", response_model=Page[MfaReset])
async def list_mfa_resets(reader: Reading, service: Service, who: Operator, page: Paging) -> Any:
    """Requests to take second factors away, newest first."""
    return await service.people.mfa_resets(reader, page)


@resets.post("/{mfa_reset}/confirm", response_model=MfaReset)
async def confirm_mfa_reset(
    mfa_reset: Id, tx: InTx, service: Service, who: Annotated[Caller, dangerous("user.mfa_reset")]
) -> Any:
    """Take the second factors away and end the person's sessions, as another operator than the one who asked."""
    return await service.people.confirm_mfa_reset(tx, who, mfa_reset)


@resets.delete("/{mfa_reset}", status_code=204)
async def withdraw_mfa_reset(mfa_reset: Id, tx: InTx, service: Service, who: Operator) -> Response:
    """Take a request back."""
    await service.people.withdraw_mfa_reset(tx, who, mfa_reset)
    return Response(status_code=204)


# -- organizations


@organizations.get("", response_model=Page[Tenant])
async def list_tenants(
    request: Request,
    reader: Reading,
    who: Operator,
    page: Paging,
    search: Annotated[Search | None, Query(description="A part of the name, or an id")] = None,
    suspended: Annotated[bool | None, Query()] = None,
) -> Any:
    """Organizations, oldest first."""
    document = await tenants.listing(reader, page, search, suspended)
    counts = await request.app.state.tunnels.counts(reader, [row["id"] for row in document["data"]])
    return {**document, "data": [{**row, "tunnels": counts.get(row["id"], 0)} for row in document["data"]]}


@organizations.get("/{tenant}", response_model=Tenant)
async def get_tenant(tenant: Id, request: Request, reader: Reading, who: Operator) -> Any:
    """One organization."""
    return await _tenant(request, reader, tenant)


async def _tenant(request: Request, reader: Any, tenant: str) -> dict[str, Any]:
    found = await tenants.get(reader, tenant)
    counts = await request.app.state.tunnels.counts(reader, [tenant])
    return {**found, "tunnels": counts.get(tenant, 0)}


@organizations.post("/{tenant}/suspend", response_model=Tenant)
async def suspend_tenant(
    tenant: Id,
    body: ReasonBody,
    request: Request,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, dangerous("organization.suspend")],
) -> Any:
    """Stop an organization: its live tunnels end within two seconds and are answered by a page that says so, its keys serve
    nothing, nobody changes anything in it. Its people can sign in, look and export; they are told the reason and whom to ask.
    """
    await service.organizations.suspend(tx, who, tenant, body.reason)
    return await _tenant(request, tx, tenant)


@organizations.post("/{tenant}/resume", response_model=Tenant)
async def resume_tenant(
    tenant: Id,
    body: ReasonBody,
    request: Request,
    tx: InTx,
    service: Service,
    who: Annotated[Caller, dangerous("organization.resume")],
) -> Any:
    """Take a suspension back; tunnels serve again once their agents reconnect."""
    await service.organizations.resume(tx, who, tenant, body.reason)
    return await _tenant(request, tx, tenant)


@organizations.post("/{tenant}/impersonate", status_code=201, response_model=SupportToken)
async def begin_support(
    tenant: Id, body: ReasonBody, tx: InTx, service: Service, who: Annotated[Caller, dangerous("support_access.begin")]
) -> Any:
    """A token with which the operator looks around in the organization, or changes its tunnels, as an owner consented to.

    It ends with the consent at the latest. It acts for the operator, never for a person of the organization, which sees every
    request of it in its audit log.
    """
    return await service.support.begin(tx, who, tenant, body.reason)


@support.delete("/{support_session}", status_code=204)
async def end_support(support_session: Id, tx: InTx, service: Service, who: Operator) -> Response:
    """End a session of support access that the operator began."""
    await service.support.end(tx, who, support_session)
    return Response(status_code=204)


@organizations.get("/{tenant}/audit", response_model=Page[AuditEvent])
async def list_tenant_audit(
    tenant: Id,
    reader: Reading,
    db: Db,
    who: Annotated[Caller, dangerous("audit.read")],
    page: Paging,
    filters: Filters,
) -> Any:
    """An organization's audit events, newest first. The organization sees in them that an operator read them."""
    await tenants.get(reader, tenant)
    async with db.transaction() as tx:
        await operators.record(
            tx, who, "audit.read", tenant, {name: str(value) for name, value in filters.items()}, tenant
        )
    return await audit.listing(reader, tenant, page, **filters)


# -- the installation's own log


@logs.get("", response_model=Page[AuditEvent])
async def list_installation_audit(reader: Reading, who: Operator, page: Paging, filters: Filters) -> Any:
    """What happened outside every organization, and what operators did, newest first."""
    return await audit.listing(reader, audit.INSTALLATION, page, **filters)


@logs.get("/verify", response_model=Verification)
async def verify_installation_audit(
    request: Request, reader: Reading, who: Operator, first: Annotated[Seq, Query(alias="from")] = None
) -> Any:
    """Check a bounded stretch of the installation's hash chain, as `GET /v1/audit/verify` does for an organization."""
    return await audit.verify(reader, audit.INSTALLATION, first, request.app.state.settings.audit_verify_rows)


@logs.get("/checkpoints", response_model=Checkpoints)
async def list_installation_checkpoints(reader: Reading, who: Operator, page: Paging) -> Any:
    """Signed checkpoints of the installation's chain, newest first. Keep them where this platform cannot write."""
    return await audit.checkpoint_listing(reader, audit.INSTALLATION, page)


@logs.get("/export", response_class=StreamingResponse, responses=audit_api.EXPORTED)
async def export_installation_audit(
    request: Request,
    db: Db,
    who: Annotated[Caller, dangerous("audit.export")],
    first: Annotated[Seq, Query(alias="from")] = None,
    form: Annotated[Literal["jsonl", "ocsf"], Query(alias="format")] = "jsonl",
) -> StreamingResponse:
    """The installation's audit log as JSON Lines, as `GET /v1/audit/export` has an organization's."""
    async with db.transaction() as tx:
        await operators.record(tx, who, "audit.export", audit.INSTALLATION, {"format": form})
    rows = request.app.state.settings.audit_export_rows
    lines = export.lines(db, audit.INSTALLATION, first or 1, form, rows)
    return StreamingResponse(lines, media_type="application/jsonl")


# -- the edge


@fleet.get("", response_model=Page[Relay])
async def list_relays(request: Request, reader: Reading, who: Operator, page: Paging) -> Any:
    """Every relay that was ever registered, by name, with what it last told of itself."""
    return await request.app.state.relays.listing(reader, page)
