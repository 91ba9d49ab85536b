"""Routes that lead a domain to a tunnel: /domains/{domain}/route and /unroute."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, StringConstraints

from portico.control.access import InTx
from portico.control.domains.api import Domain, Id, Writes
from portico.control.requests import UnitOfWork
from portico.control.tunnels.api import Body, Service

router = APIRouter(prefix="/domains", tags=["domains"], route_class=UnitOfWork)


class RouteBody(Body):
    """Where a domain leads."""

    tunnel: Annotated[
        str,
        StringConstraints(min_length=1, max_length=64),
        Field(description="Id or name of the tunnel that serves it"),
    ]


@router.post("/{domain}/route", response_model=Domain)
async def route_domain(tx: InTx, who: Writes, tunnels: Service, domain: Id, body: RouteBody) -> Any:
    """Serve a domain by a tunnel; relays do within 2 s, and no agent is disturbed. From another tunnel it moves over."""
    return await tunnels.domains.route(tx, who, domain, body.tunnel)


@router.post("/{domain}/unroute", response_model=Domain)
async def unroute_domain(tx: InTx, who: Writes, tunnels: Service, domain: Id) -> Any:
    """Serve a domain no longer; relays stop within 2 s. The domain stays the organization's."""
    return await tunnels.domains.unroute(tx, who, domain)
