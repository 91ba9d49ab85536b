"""GET /audit: the organization's audit log, newest first."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from portico.control.access import Caller, Paging, Reading, require
from portico.control.audit import service
from portico.control.requests import UnitOfWork
from portico.kit.pages import Page

router = APIRouter(prefix="/audit", tags=["audit"], route_class=UnitOfWork)


class Actor(BaseModel):
    """Who acted: a person, a key, the operator, or nobody known."""

    kind: str
    id: str
    address: str | None


class AuditEvent(BaseModel):
    """One act."""

    id: str
    at: datetime
    actor: Actor
    action: str
    target: str | None
    outcome: Literal["success", "refused"]
    details: dict[str, Any]
    request_id: str | None


@router.get("", response_model=Page[AuditEvent])
async def list_audit(
    reader: Reading,
    who: Annotated[Caller, Depends(require("audit:read"))],
    page: Paging,
    action: Annotated[str | None, Query(max_length=64, pattern=r"^[a-z_.]+$")] = None,
) -> Any:
    """The organization's audit events, newest first; `action` filters by one kind of act."""
    return await service.listing(reader, who, page, action)
