"""Routes of incidents: /admin/cert-incidents for operators, /domains/{domain}/incidents for who has the domain."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from portico.control.access import Caller, InTx, Paging, Reading, require, require_operator
from portico.control.domains import incident_store as store
from portico.control.domains.incidents import Incidents
from portico.control.domains.service import Domains
from portico.control.requests import UnitOfWork, shown
from portico.errors import Problem
from portico.kit import pages
from portico.kit.pages import Page

router = APIRouter(prefix="/admin/cert-incidents", tags=["admin"], route_class=UnitOfWork)
of_domains = APIRouter(prefix="/domains", tags=["domains"], route_class=UnitOfWork)


async def service(request: Request) -> Incidents:
    """Dependency: the process's incidents."""
    found: Incidents = request.app.state.cert_incidents
    return found


Service = Annotated[Incidents, Depends(service)]
Operator = Annotated[Caller, Depends(require_operator())]
Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Note = Annotated[str, StringConstraints(min_length=1, max_length=2000, strip_whitespace=True), AfterValidator(shown)]
Status = Literal["open", "acknowledged", "resolved"]
IncidentClass = Literal[
    "ownership", "validation", "issuance", "deployment", "renewal", "revocation", "expiry", "deletion", "replication",
    "integrity",
]  # fmt: skip


class IncidentCondition(BaseModel):
    """Something wrong. `origin`: what events and the clock say (`state`), a late renewal (`sla`), what the edge really serves
    (`probe`), or a private key that was sent (`key_material`)."""

    origin: str
    tier: int
    code: str
    detail: str | None


class DomainIncident(BaseModel):
    """Something wrong with a domain's certificate; tier 1 is the worst. `reopened`: how often it came back within a day."""

    id: str
    domain: str
    hostname: str
    incident_class: IncidentClass
    tier: int
    status: Status
    conditions: list[IncidentCondition]
    opened_at: datetime
    changed_at: datetime
    escalated_at: datetime | None
    acknowledged_at: datetime | None
    resolved_at: datetime | None
    reopened: int


class IncidentNote(BaseModel):
    """What somebody wrote about it."""

    id: str
    author: str
    text: str
    created_at: datetime


class Incident(DomainIncident):
    """The same as operators see it. `resolved_by`: an operator, an event, or `clock`."""

    organization: str
    acknowledged_by: str | None
    resolved_by: str | None
    told_at: datetime | None
    notes: list[IncidentNote]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AckBody(_Body):
    """What you are about to do, if you like."""

    note: Note | None = None


class NoteBody(_Body):
    """What you found, or did."""

    note: Note


def _shown(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "domain": row.domain_id,
        "hostname": row.hostname,
        "incident_class": row.incident_class,
        "tier": row.tier,
        "status": row.status,
        "conditions": [
            {"origin": origin, "tier": each["tier"], "code": each["code"], "detail": each["detail"]}
            for origin, each in sorted(row.conditions.items())
        ],
        "opened_at": row.opened_at,
        "changed_at": row.changed_at,
        "escalated_at": row.escalated_at,
        "acknowledged_at": row.acknowledged_at,
        "resolved_at": row.resolved_at,
        "reopened": row.reopened,
    }


async def _whole(reader: Any, rows: Any) -> list[dict[str, Any]]:
    notes: dict[str, list[dict[str, Any]]] = {}
    for note in await store.notes_of(reader, [row.id for row in rows]):
        document = {"id": note.id, "author": note.author, "text": note.text, "created_at": note.created_at}
        notes.setdefault(note.incident_id, []).append(document)
    return [
        _shown(row) | {
            "organization": row.organization_id, "acknowledged_by": row.acknowledged_by, "resolved_by": row.resolved_by,
            "told_at": row.told_at, "notes": notes.get(row.id, []),
        }
        for row in rows
    ]  # fmt: skip


@router.get("", response_model=Page[Incident])
async def list_incidents(
    reader: Reading,
    who: Operator,
    page: Paging,
    status: Annotated[Status | None, Query()] = None,
    incident_class: Annotated[IncidentClass | None, Query()] = None,
    tier: Annotated[int | None, Query(ge=1, le=3)] = None,
    domain: Annotated[str | None, Query(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")] = None,
) -> Any:
    """Incidents of all domains, the newest first."""
    filters = {"status": status, "incident_class": incident_class, "tier": tier, "domain": domain}
    rows = await store.listing(reader, filters, page.limit + 1, page.after[0] if page.after else None)
    kept, cursor = pages.page(rows, page.limit, lambda row: (row.id,))
    return {"data": await _whole(reader, kept), "next_cursor": cursor}


@router.get("/{cert_incident}", response_model=Incident)
async def get_incident(cert_incident: Id, reader: Reading, who: Operator) -> Any:
    """One incident with its notes."""
    row = await store.one(reader, cert_incident)
    if row is None:
        raise Problem("cert.incident_not_found")
    return (await _whole(reader, [row]))[0]


@router.post("/{cert_incident}/ack", response_model=Incident)
async def acknowledge_incident(
    cert_incident: Id,
    body: AckBody,
    tx: InTx,
    incidents: Service,
    who: Annotated[Caller, Depends(require_operator(act="cert_incident.acknowledge"))],
) -> Any:
    """Say that somebody is at it. It still tells people when it becomes worse."""
    return (await _whole(tx, [await incidents.acknowledge(tx, who, cert_incident, body.note)]))[0]


@router.post("/{cert_incident}/resolve", response_model=Incident)
async def resolve_incident(
    cert_incident: Id,
    body: NoteBody,
    tx: InTx,
    incidents: Service,
    who: Annotated[Caller, Depends(require_operator(act="cert_incident.resolve"))],
) -> Any:
    """End it by hand. What is known does not open it again; a new failure, or a worse tier, does."""
    return (await _whole(tx, [await incidents.resolve(tx, who, cert_incident, body.note)]))[0]


@router.post("/{cert_incident}/notes", response_model=Incident, status_code=201)
async def add_incident_note(
    cert_incident: Id,
    body: NoteBody,
    tx: InTx,
    incidents: Service,
    who: Annotated[Caller, Depends(require_operator(act="cert_incident.note"))],
) -> Any:
    """Write down what you found, or did."""
    return (await _whole(tx, [await incidents.note(tx, who, cert_incident, body.note)]))[0]


@of_domains.get("/{domain}/incidents", response_model=Page[DomainIncident])
async def list_domain_incidents(
    domain: Annotated[str, Path(max_length=64)],
    request: Request,
    reader: Reading,
    who: Annotated[Caller, Depends(require("domains:read"))],
    page: Paging,
) -> Any:
    """What was or is wrong with a domain's certificate, the newest first."""
    domains: Domains = request.app.state.domains
    row = await domains.row(reader, who, domain)
    rows = await store.listing(reader, {"domain": row.id}, page.limit + 1, page.after[0] if page.after else None)
    return pages.listing(rows, page.limit, lambda each: (each.id,), _shown)
