"""Routes of platform operators about where certificates are: /admin/regions and /admin/cert-replicas."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import Caller, InTx, Paging, Reading, require_operator
from portico.control.domains import regions, replicas
from portico.control.requests import UnitOfWork
from portico.kit.pages import Page

region_router = APIRouter(prefix="/admin/regions", tags=["admin"], route_class=UnitOfWork)
replica_router = APIRouter(prefix="/admin/cert-replicas", tags=["admin"], route_class=UnitOfWork)
routers = (region_router, replica_router)

Operator = Annotated[Caller, Depends(require_operator())]
RegionName = Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=r"^[a-z0-9-]+$")]
KeyName = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
DomainId = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]


def dangerous(act: str) -> Any:
    """Who may carry out an act that asks for a recent proof, and whose refusal is recorded as ``act``."""
    return Depends(require_operator(step_up=True, act=act))


class RegionKey(BaseModel):
    """A public key of a region. `missing`: certificates that are not wrapped for it yet."""

    key_id: str
    public_key: str
    created_at: datetime
    missing: int


class Region(BaseModel):
    """A region with its keys, and its healthy relays by name. Without a key it takes no part in distribution."""

    region: str
    keys: list[RegionKey]
    relays: list[str]


class Regions(BaseModel):
    """Every region that has a key or a relay."""

    data: list[Region]
    next_cursor: None = None


class RegionKeyBody(BaseModel):
    """The public half of a region's key; the private half stays with its relays."""

    model_config = ConfigDict(extra="forbid")

    region: RegionName
    public_key: Annotated[
        str, Field(min_length=1, max_length=64, description="X25519, base64url", pattern=r"^[\x21-\x7e]+$")
    ]


class Replica(BaseModel):
    """How a region stands with a version of a certificate. `lag_seconds`: since when it is not where it should be."""

    certificate: str
    domain: str
    hostname: str
    version: int
    fingerprint: str
    region: str
    state: Literal["pending", "staged", "active", "stale", "failed"]
    relays: int
    relays_staged: int
    relays_active: int
    reason: str | None
    lag_seconds: float
    acked_at: datetime | None
    updated_at: datetime


@region_router.get("", response_model=Regions)
async def list_regions(request: Request, reader: Reading, who: Operator) -> Any:
    """Regions, their public keys and their relays."""
    return {"data": await regions.listing(reader, request.app.state.settings.relay_lease_seconds)}


@region_router.post("", status_code=201, response_model=RegionKey)
async def add_region_key(body: RegionKeyBody, tx: InTx, who: Annotated[Caller, dangerous("region.add_key")]) -> Any:
    """Register a public key of a region. The certificate worker wraps every certificate's data key for it within seconds, if its
    own settings allow that key."""
    return await regions.add_key(tx, who, body.region, body.public_key)


@region_router.delete("/{region}/keys/{region_key}", status_code=204)
async def remove_region_key(
    region: Annotated[RegionName, Path()],
    region_key: Annotated[KeyName, Path()],
    request: Request,
    tx: InTx,
    who: Annotated[Caller, dangerous("region.remove_key")],
) -> Response:
    """Take a key of a region out of use, once its successor has every certificate."""
    await regions.remove_key(tx, who, region, region_key, request.app.state.settings.relay_lease_seconds)
    return Response(status_code=204)


@replica_router.get("", response_model=Page[Replica])
async def list_cert_replicas(
    reader: Reading,
    who: Operator,
    page: Paging,
    domain: Annotated[DomainId | None, Query()] = None,
    region: Annotated[RegionName | None, Query()] = None,
    state: Annotated[Literal["pending", "staged", "active", "stale", "failed"] | None, Query()] = None,
) -> Any:
    """Which regions hold which versions of certificates, and how far behind they are."""
    return await replicas.listing(reader, page, domain=domain, region=region, state=state)
