"""The organization's audit log: list and search, verify, checkpoints, export."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from portico.control.access import Caller, Db, Instant, Paging, Reading, require
from portico.control.audit import export, service
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
    seq: int | None
    hash: str | None
    erased_at: datetime | None


class Place(BaseModel):
    """A row of the chain: its number and its hash in hex."""

    seq: int
    hash: str


class Fault(BaseModel):
    """The first thing that is wrong with the chain."""

    seq: int
    kind: Literal[
        "missing", "hash", "personal", "chain", "head", "truncated", "checkpoint", "signature", "anchor", "unreadable"
    ]
    detail: str


class Verification(BaseModel):
    """What checking a stretch of the chain found. `next` is where to go on; null at the head, or at a fault."""

    chain: str
    valid: bool
    from_: Annotated[int, Field(alias="from")]
    checked: int
    last: Place
    head: Place
    fault: Fault | None
    next: int | None


class Checkpoint(BaseModel):
    """A signed statement of where the chain ended: a compact JWS, to be kept elsewhere."""

    seq: int
    created_at: datetime
    kid: str
    token: str


_ID = r"^[A-Za-z0-9_.:@-]+$"


class Anchor(BaseModel):
    """A signed statement that retention deleted the rows up to a number."""

    seq: int
    kid: str
    token: str


class Checkpoints(Page[Checkpoint]):
    """Checkpoints, newest first, the anchor if rows were deleted, and the public keys that signed them."""

    anchor: Anchor | None
    keys: list[dict[str, str]]


async def filters(
    action: Annotated[str | None, Query(max_length=64, pattern=r"^[a-z_.]+$")] = None,
    actor: Annotated[str | None, Query(max_length=64, pattern=_ID)] = None,
    target: Annotated[str | None, Query(max_length=64, pattern=_ID)] = None,
    outcome: Annotated[Literal["success", "refused"] | None, Query()] = None,
    since: Annotated[Instant | None, Query()] = None,
    until: Annotated[Instant | None, Query()] = None,
) -> dict[str, Any]:
    """Dependency: which events a list shows; each filter leaves only rows with that value or time."""
    given = {"action": action, "actor": actor, "target": target, "outcome": outcome, "since": since, "until": until}
    return {name: value for name, value in given.items() if value is not None}


Filters = Annotated[dict[str, Any], Depends(filters)]

#: What an export answers with.
EXPORTED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}}

Auditor = Annotated[Caller, Depends(require("audit:read"))]
Seq = Annotated[int | None, Query(ge=1, le=2**53 - 1)]


@router.get("", response_model=Page[AuditEvent])
async def list_audit(reader: Reading, who: Auditor, page: Paging, filters: Filters) -> Any:
    """The organization's audit events, newest first; each filter leaves only rows with that value or time."""
    return await service.listing(reader, who.org, page, **filters)


@router.get("/verify", response_model=Verification)
async def verify_audit(
    request: Request, reader: Reading, who: Auditor, first: Annotated[Seq, Query(alias="from")] = None
) -> Any:
    """Check a bounded stretch of the organization's hash chain from a number on (the oldest row kept by default).

    Go on at `next` until it is null. The answer is 200 for a broken chain, too: `valid` and `fault` say what is wrong.
    """
    return await service.verify(reader, who.org, first, request.app.state.settings.audit_verify_rows)


@router.get("/checkpoints", response_model=Checkpoints)
async def list_checkpoints(reader: Reading, who: Auditor, page: Paging) -> Any:
    """Signed checkpoints of the organization's chain, newest first. Keep them where this platform cannot write."""
    return await service.checkpoint_listing(reader, who.org, page)


@router.get(
    "/export",
    response_class=StreamingResponse,
    responses=EXPORTED,
)
async def export_audit(
    request: Request,
    db: Db,
    who: Auditor,
    first: Annotated[Seq, Query(alias="from")] = None,
    form: Annotated[Literal["jsonl", "ocsf"], Query(alias="format")] = "jsonl",
) -> StreamingResponse:
    """The organization's audit log in order of its numbers, one JSON object a line, up to where it ends now.

    `jsonl` has everything that the hashes cover, for `portico audit verify`; `ocsf` is for security tools.
    """
    lines = export.lines(db, who.org, first or 1, form, request.app.state.settings.audit_export_rows)
    return StreamingResponse(lines, media_type="application/jsonl")
