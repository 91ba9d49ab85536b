"""Routes of domains: /domains. Routing one to a tunnel is in ``tunnels/domain_api.py``."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import Caller, Db, InTx, Paging, Reading, require
from portico.control.domains import names
from portico.control.domains.service import Domains
from portico.control.requests import Repeatable, UnitOfWork, writing
from portico.kit.db import Tx
from portico.kit.pages import Page

router = APIRouter(prefix="/domains", tags=["domains"], route_class=UnitOfWork)
looking = APIRouter(prefix="/domains", tags=["domains"], route_class=Repeatable)


async def service(request: Request) -> Domains:
    """Dependency: the process's domains service."""
    found: Domains = request.app.state.domains
    return found


Service = Annotated[Domains, Depends(service)]
Reads = Annotated[Caller, Depends(require("domains:read"))]
Writes = Annotated[Caller, Depends(require("domains:write"))]
Id = Annotated[str, Path(max_length=64)]
TlsMode = Annotated[
    Literal["terminate", "passthrough"],
    Field(description="Who ends TLS: relays, with a certificate that the platform gets, or a TLS tunnel's target"),
]
FailurePolicy = Annotated[
    Literal["standard", "strict", "hold"],
    Field(description="What happens while its certificate fails: docs/how-to/custom-domains.md"),
]
Text = Annotated[
    str,
    StringConstraints(min_length=1, max_length=names.MAX_CHARS),
    Field(
        description="As people write it; `*.example.com` for every name one label below",
        json_schema_extra={"format": "idn-hostname"},
    ),
]


class DomainBody(BaseModel):
    """A domain to add."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    tls_mode: TlsMode = "terminate"
    failure_policy: FailurePolicy = "standard"


class DomainPatch(BaseModel):
    """What to change; members left out stay."""

    model_config = ConfigDict(extra="forbid")

    tls_mode: TlsMode | None = None
    failure_policy: FailurePolicy | None = None


class DnsRecord(BaseModel):
    """A record to set. `state` and `found`: what the last look saw; `fix`: what to do about it."""

    purpose: Literal["ownership", "routing", "delegation"]
    type: Literal["TXT", "CNAME", "A", "AAAA", "ALIAS"]
    name: str
    value: str
    required: bool
    state: Literal["unchecked", "ok", "missing", "wrong", "unknown"]
    found: list[str]
    fix: str | None


class CertificateStanding(BaseModel):
    """How the domain's certificate is; `held_at`: since when nothing is tried for it by itself (policy `hold`)."""

    status: str
    serial: str | None
    fingerprint: str | None
    issuer: str | None
    not_before: datetime | None
    not_after: datetime | None
    renews_at: datetime | None
    error_code: str | None
    error_detail: str | None
    failures: int
    retry_at: datetime | None
    source: str | None
    regions_active: int
    regions_total: int
    held_at: datetime | None


class Domain(BaseModel):
    """One domain. `tunnel`: the id of what it is routed to. `frozen`: the limit of the plan that leaves it unserved."""

    id: str
    name: str
    display_name: str
    wildcard: bool
    apex: bool
    hostname_status: Literal["pending", "verified", "active", "moved", "blocked", "deleted"]
    tls_mode: TlsMode
    failure_policy: FailurePolicy
    tunnel: str | None
    frozen: str | None
    records: list[DnsRecord]
    dns_error: str | None
    verified_at: datetime | None
    checked_at: datetime | None
    next_check_at: datetime | None
    certificate: CertificateStanding
    created_at: datetime
    updated_at: datetime


@router.get("", response_model=Page[Domain])
async def list_domains(reader: Reading, who: Reads, domains: Service, page: Paging) -> Any:
    """The organization's domains, oldest first."""
    return await domains.listing(reader, who, page)


@router.post("", response_model=Domain, status_code=201)
async def add_domain(tx: InTx, who: Writes, domains: Service, body: DomainBody) -> Any:
    """Claim a domain. The answer has the DNS records to set; set them, then verify."""
    return await domains.add(tx, who, body.name, body.tls_mode, body.failure_policy)


@router.get("/{domain}", response_model=Domain)
async def get_domain(reader: Reading, who: Reads, domains: Service, domain: Id) -> Any:
    """One domain, with its records and what the last look found of each."""
    return await domains.get(reader, who, domain)


@router.patch("/{domain}", response_model=Domain)
async def change_domain(tx: InTx, who: Writes, domains: Service, domain: Id, body: DomainPatch) -> Any:
    """Change who ends TLS for a domain, or what happens while its certificate fails."""
    return await domains.change(tx, who, domain, body.tls_mode, body.failure_policy)


@looking.post("/{domain}/verify", response_model=Domain)
async def verify_domain(request: Request, who: Writes, domains: Service, db: Db, domain: Id) -> Response:
    """Look at the domain's records now. The answer says of each what was found, and what to do about it. Where they were looked
    at a moment ago it says what was found then, and the next look follows within seconds."""
    async with db.read() as reader:
        seen = await domains.row(reader, who, domain)
    domains.check_open(seen)
    if domains.recently_checked(seen):
        async with db.transaction() as tx:
            await domains.look_soon(tx, seen)
        return _json(domains.rendering.document(seen))
    looked = await domains.verification.look(seen)
    request.state.caller = None  # it took its time: the credential may be revoked by now

    async def run(tx: Tx, who: Caller) -> Response:
        return _json(await domains.verified(tx, who, seen, looked))

    return await writing(request, "domains:write", run)


def _json(document: dict[str, Any]) -> Response:
    return Response(Domain.model_validate(document).model_dump_json(), media_type="application/json")


@router.delete("/{domain}", status_code=204)
async def delete_domain(tx: InTx, who: Writes, domains: Service, domain: Id) -> Response:
    """Let a domain go; relays serve it no longer within 2 s."""
    await domains.delete(tx, who, domain)
    return Response(status_code=204)
