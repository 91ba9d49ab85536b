"""Routes about getting certificates: /domains/{id}/certificate/retry."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, Field

from portico.control.access import Caller, InTx, require
from portico.control.domains import acme_retry
from portico.control.domains.service import Domains
from portico.control.requests import UnitOfWork

router = APIRouter(prefix="/domains", tags=["domains"], route_class=UnitOfWork)

Writes = Annotated[Caller, Depends(require("domains:write"))]
Id = Annotated[str, Path(max_length=64)]


class Retried(BaseModel):
    """The certificate is ordered by the next worker that is free."""

    domain: str
    due_at: Annotated[datetime, Field(description="From when on it is due: now")]


@router.post("/{domain}/certificate/retry", response_model=Retried, status_code=202)
async def retry_certificate(request: Request, tx: InTx, who: Writes, domain: Id) -> Any:
    """Order a domain's certificate now, whatever failed before. What the authority would refuse is refused here (429)."""
    domains: Domains = request.app.state.domains
    row = await domains.row(tx, who, domain, lock=True)
    return await acme_retry.retry(tx, request.app.state.settings, domains.rules, who, row)
