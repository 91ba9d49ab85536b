"""Routes of certificate events: /admin/cert-events for operators, /domains/{domain}/events for who has the domain."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from portico.control.access import Caller, Instant, InTx, Paging, Reading, require, require_operator
from portico.control.domains import event_store, lifecycle, replay
from portico.control.domains.event_body import WHOLE
from portico.control.domains.forgetting import Which, forget
from portico.control.domains.service import Domains
from portico.control.domains.source_api import Reason, dangerous
from portico.control.requests import UnitOfWork
from portico.errors import Problem
from portico.kit import pages
from portico.kit.pages import Page

router = APIRouter(prefix="/admin/cert-events", tags=["admin"], route_class=UnitOfWork)
of_domains = APIRouter(prefix="/domains", tags=["domains"], route_class=UnitOfWork)

Operator = Annotated[Caller, Depends(require_operator())]
Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Word = Annotated[str, StringConstraints(min_length=1, max_length=254, pattern=r"^[\x21-\x7e]+$")]
State = Literal["queued", "failed", "dead", "applied", "superseded", "unmapped", "unmatched", "forgotten"]


class CertFacts(BaseModel):
    """What an event says of the certificate and of what went wrong; never a key."""

    serial: str | None = None
    fingerprint: str | None = None
    issuer: str | None = None
    not_before: datetime | None = None
    not_after: datetime | None = None
    renews_at: datetime | None = None
    error_code: str | None = None
    error_detail: str | None = None
    retry_at: datetime | None = None
    regions_active: int | None = None
    regions_total: int | None = None


class DomainEvent(BaseModel):
    """Something that happened to a domain's certificate. `type` is null for what means nothing here."""

    id: str
    type: str | None
    callback_class: str
    callback_action: str
    hostname: str
    revision: int
    sequence: int
    occurred_at: datetime
    received_at: datetime
    state: State
    facts: CertFacts


class CertEventRow(DomainEvent):
    """The same with what operators see: who told it, and how its processing went. `repeated`: the effect was told before."""

    source: str
    event_id: str
    cluster: str
    environment: str
    domain: str | None
    repeated: bool
    key: str | None
    provenance: dict[str, Any]
    attempts: int
    last_error: str | None
    next_attempt_at: datetime | None
    finished_at: datetime | None
    replays: int
    replayed_at: datetime | None


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ReplayBody(_Body):
    """Why; it is kept in the audit log."""

    reason: Reason


class EventFilter(_Body):
    """Which events; by default dead ones."""

    source: Word | None = None
    cluster: Word | None = None
    callback_class: Word | None = None
    state: Literal["dead", "applied", "superseded", "unmapped", "unmatched"] | None = "dead"
    domain: Word | None = None
    hostname: Word | None = None
    since: Instant | None = None
    until: Instant | None = None


class ReplayManyBody(_Body):
    """Apply again what fits `filter`, the oldest first; with `dry_run` nothing is applied, only counted."""

    filter: EventFilter = EventFilter()
    reason: Reason
    dry_run: bool = True
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class Replayed(BaseModel):
    """What a replay did, or would do. `events` names the first of them."""

    replay: str | None
    matched: int
    replayed: int
    events: list[str]
    dry_run: bool


class ForgetBody(_Body):
    """Take events of `source` out of the state of their domains: of one domain, or from a revision on; with `dry_run` nothing is
    changed, only told."""

    source: Word
    domain: Word | None = None
    from_revision: Annotated[int, Field(ge=0, le=WHOLE)] = 0
    reason: Reason
    dry_run: bool = True


class Rebuilt(BaseModel):
    """A domain whose state is another without these events; `revision` is the newest that it knows of."""

    id: str
    name: str
    status: str
    revision: int | None
    status_after: str
    revision_after: int | None


class Forgotten(BaseModel):
    """What was forgotten, or would be. `changed` names the first of the domains."""

    events: int
    domains: int
    changed: list[Rebuilt]
    dry_run: bool


def state_of(row: Any) -> str:
    """How an event is, as people see it."""
    if row.queue_state == "dead":
        return "dead"
    if row.queue_state == "pending":
        return "failed" if row.last_error is not None else "queued"
    return str(row.status)


def _shown(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "type": row.event_type,
        "callback_class": row.callback_class,
        "callback_action": row.callback_action,
        "hostname": row.hostname,
        "revision": row.revision,
        "sequence": row.sequence,
        "occurred_at": row.occurred_at,
        "received_at": row.received_at,
        "state": state_of(row),
        "facts": {name: row.facts.get(name) for name in lifecycle.FACTS},
    }


def _whole(row: Any) -> dict[str, Any]:
    waits = row.queue_state == "pending" and row.lease_token is None
    return _shown(row) | {
        "source": row.source_id,
        "event_id": row.event_id,
        "cluster": row.cluster_id,
        "environment": row.environment,
        "domain": row.domain_id,
        "repeated": row.repeated,
        "key": row.key_id,
        "provenance": row.provenance,
        "attempts": row.attempts,
        "last_error": row.last_error,
        "next_attempt_at": row.available_at if waits else None,
        "finished_at": row.finished_at,
        "replays": row.replays,
        "replayed_at": row.replayed_at,
    }


Asked = Annotated[Word | None, Query()]


@router.get("", response_model=Page[CertEventRow])
async def list_events(
    reader: Reading,
    who: Operator,
    page: Paging,
    source: Asked = None,
    cluster: Asked = None,
    callback_class: Asked = None,
    state: Annotated[State | None, Query()] = None,
    domain: Asked = None,
    hostname: Asked = None,
    since: Annotated[Instant | None, Query()] = None,
    until: Annotated[Instant | None, Query()] = None,
) -> Any:
    """Certificate events of all sources, the newest first. Those of this installation itself have the source `platform`."""
    filters = {
        "source": source, "cluster": cluster, "callback_class": callback_class, "state": state, "domain": domain,
        "hostname": hostname, "since": since, "until": until,
    }  # fmt: skip
    rows = await event_store.listing(reader, filters, page.limit + 1, page.after[0] if page.after else None)
    return pages.listing(rows, page.limit, lambda row: (row.id,), _whole)


@router.post("/replay", response_model=Replayed)
async def replay_events(
    body: ReplayManyBody, request: Request, tx: InTx, who: Annotated[Caller, dangerous("cert_event.replay_many")]
) -> Any:
    """Apply events again that fit a filter, or (`dry_run`, the default) say how many they are."""
    limit = min(body.limit, request.app.state.settings.cert_replay_max)
    return await replay.REPLAYS.many(tx, who, body.filter.model_dump(), body.reason, limit, dry_run=body.dry_run)


@router.post("/forget", response_model=Forgotten)
async def forget_events(
    body: ForgetBody, request: Request, tx: InTx, who: Annotated[Caller, dangerous("cert_event.forget")]
) -> Any:
    """Forget what a source told, so that what it hid counts again, or (`dry_run`, the default) say what that would change."""
    which = Which(body.source, body.domain, body.from_revision)
    return await forget(tx, who, which, body.reason, request.app.state.clock.wall(), dry_run=body.dry_run)


@router.get("/{cert_event}", response_model=CertEventRow)
async def get_event(cert_event: Id, reader: Reading, who: Operator) -> Any:
    """One event."""
    row = await event_store.one(reader, cert_event)
    if row is None:
        raise Problem("cert.event_not_found")
    return _whole(row)


@router.post("/{cert_event}/replay", response_model=Replayed)
async def replay_event(
    cert_event: Id, body: ReplayBody, tx: InTx, who: Annotated[Caller, dangerous("cert_event.replay")]
) -> Any:
    """Apply one event again."""
    return await replay.one(tx, who, cert_event, body.reason)


@of_domains.get("/{domain}/events", response_model=Page[DomainEvent])
async def list_domain_events(
    domain: Annotated[str, Path(max_length=64)],
    request: Request,
    reader: Reading,
    who: Annotated[Caller, Depends(require("domains:read"))],
    page: Paging,
) -> Any:
    """What happened to a domain's certificate, the newest first."""
    domains: Domains = request.app.state.domains
    row = await domains.row(reader, who, domain)
    rows = await lifecycle.of_domain(reader, row.id, page.limit + 1, page.after[0] if page.after else None)
    return pages.listing(rows, page.limit, lambda row: (row.id,), _shown)
