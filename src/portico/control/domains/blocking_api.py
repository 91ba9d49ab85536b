"""Routes of platform operators about domains of all organizations: /admin/domains."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from portico.control.access import Caller, InTx, Paging, Reading, require_operator
from portico.control.domains import blocking
from portico.control.requests import UnitOfWork, shown
from portico.kit.pages import Page

router = APIRouter(prefix="/admin/domains", tags=["admin"], route_class=UnitOfWork)

Operator = Annotated[Caller, Depends(require_operator())]
Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=254, pattern=r"^[\x21-\x7e]+$")]
Reason = Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True), AfterValidator(shown)]
Status = Literal["pending", "verified", "active", "moved", "blocked", "deleted"]


def dangerous(act: str) -> Any:
    """An operator who proved a moment ago who they are; refusals are recorded as ``act``."""
    return Depends(require_operator(step_up=True, act=act))


class BlockBody(BaseModel):
    """Why; it is kept in the organization's audit log, and its people see it."""

    model_config = ConfigDict(extra="forbid")

    reason: Reason


class AnyDomain(BaseModel):
    """A domain as operators see it."""

    id: str
    name: str
    organization: str
    hostname_status: Status
    dns_error: str | None
    tunnel: str | None
    certificate_status: str
    verified_at: datetime | None
    created_at: datetime
    updated_at: datetime


@router.get("", response_model=Page[AnyDomain])
async def list_any_domains(
    reader: Reading,
    who: Operator,
    page: Paging,
    name: Annotated[Name | None, Query(description="Exactly this name, as A-labels; `*.…` for a wildcard")] = None,
    status: Annotated[Status | None, Query()] = None,
) -> Any:
    """Domains of all organizations, the oldest first."""
    return await blocking.listing(reader, page, name, status)


@router.post("/{domain}/block", response_model=AnyDomain)
async def block_domain(
    domain: Id, body: BlockBody, request: Request, tx: InTx, who: Annotated[Caller, dangerous("domain.block")]
) -> Any:
    """Serve a domain no longer: relays stop within 2 s, nobody can prove the name anew, and its owner is told why."""
    return blocking.shown(await blocking.block(tx, who, domain, body.reason, request.app.state.clock.wall()))


@router.post("/{domain}/unblock", response_model=AnyDomain)
async def unblock_domain(
    domain: Id, body: BlockBody, request: Request, tx: InTx, who: Annotated[Caller, dangerous("domain.unblock")]
) -> Any:
    """Serve a domain again, by the tunnel that it led to; its records are looked at right afterwards."""
    return blocking.shown(await blocking.unblock(tx, who, domain, body.reason, request.app.state.clock.wall()))
