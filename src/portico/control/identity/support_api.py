"""Routes by which an organization lets operators in, sees what they did, and puts them out: /org/support-access."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

from portico.control.access import Caller, InTx, Paging, Reading, require, require_recent
from portico.control.identity.api import Body, Service
from portico.control.identity.org_api import Id
from portico.control.identity.people import Reason
from portico.control.requests import UnitOfWork
from portico.kit.pages import Page

router = APIRouter(prefix="/org/support-access", tags=["organization"], route_class=UnitOfWork)


class ConsentBody(Body):
    """How long operators may come in, and whether they may change tunnels or only look."""

    minutes: Annotated[int, Field(ge=1, le=525_600)]
    scope: Literal["read", "write"] = "read"
    reason: Reason | None = None


class SupportSession(BaseModel):
    """What an operator began under a consent."""

    id: str
    operator_id: str
    reason: str
    created_at: datetime
    expires_at: datetime
    ended_at: datetime | None


class Consent(BaseModel):
    """A consent to support access, and the sessions begun under it."""

    id: str
    scope: Literal["read", "write"]
    reason: str | None
    given_by: str
    created_at: datetime
    expires_at: datetime
    withdrawn_at: datetime | None
    state: Literal["live", "expired", "withdrawn"]
    sessions: list[SupportSession]


Owner = Annotated[Caller, Depends(require_recent("owners:write", act="support_access.consent"))]
Withdrawer = Annotated[Caller, Depends(require("owners:write", kinds=("person",), act="support_access.withdraw"))]


@router.get("", response_model=Page[Consent])
async def list_support_access(
    reader: Reading, service: Service, who: Annotated[Caller, Depends(require("organization:read"))], page: Paging
) -> Any:
    """Consents to support access, newest first, and who came in under each. What they did is in the audit log."""
    return await service.support.listing(reader, who, page)


@router.post("", status_code=201, response_model=Consent)
async def consent_to_support_access(body: ConsentBody, tx: InTx, service: Service, who: Owner) -> Any:
    """Let platform operators into the organization for some minutes, to look (`read`) or to change tunnels, too (`write`).

    They see and do nothing in it without this. Only an owner may, in person, who proved a moment ago who they are.
    """
    return await service.support.consent(tx, who, body.minutes, body.scope, body.reason)


@router.delete("/{consent}", status_code=204)
async def withdraw_support_access(consent: Id, tx: InTx, service: Service, who: Withdrawer) -> Response:
    """Withdraw a consent; whoever is in under it is out with the next request."""
    await service.support.withdraw(tx, who, consent)
    return Response(status_code=204)
