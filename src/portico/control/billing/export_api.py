"""Routes of reports: /billing/report-exports for organizations, /admin/report-exports for operators, and for receivers."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import FileResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints

from portico.control.access import (
    PUBLIC,
    Caller,
    Instant,
    InTx,
    Paging,
    Reading,
    anonymous,
    require,
    require_operator,
)
from portico.control.billing import export_formats as formats
from portico.control.billing.exports import Exports, Wanted, period_of
from portico.control.requests import JsonRoute, UnitOfWork, shown
from portico.errors import Problem
from portico.kit.pages import Page

router = APIRouter(prefix="/billing/report-exports", tags=["billing"], route_class=UnitOfWork)
scheduling = APIRouter(prefix="/billing/report-schedules", tags=["billing"], route_class=UnitOfWork)
admin = APIRouter(prefix="/admin/report-exports", tags=["admin"], route_class=UnitOfWork)
admin_scheduling = APIRouter(prefix="/admin/report-schedules", tags=["admin"], route_class=UnitOfWork)
#: Of receivers, who have no credential but what a delivery brought.
receiving = APIRouter(prefix="/billing/report-exports", tags=["billing"], route_class=JsonRoute)
#: Files: checking a large one takes long, and holds no connection of the pool.
files = APIRouter(prefix="/billing/report-exports", tags=["billing"], route_class=JsonRoute)
admin_files = APIRouter(prefix="/admin/report-exports", tags=["admin"], route_class=JsonRoute)
routers = (receiving, files, admin_files, router, scheduling, admin, admin_scheduling)


async def service(request: Request) -> Exports:
    """Dependency: the process's reports."""
    found: Exports = request.app.state.report_exports
    return found


Service = Annotated[Exports, Depends(service)]
Reader = Annotated[Caller, Depends(require("billing:read"))]
Exporter = Annotated[Caller, Depends(require("billing:export", act="report_export.create"))]
Downloader = Annotated[Caller, Depends(require("billing:export", act="report_export.download"))]
Sender = Annotated[Caller, Depends(require("billing:export", act="report_export.redeliver"))]
Scheduler = Annotated[Caller, Depends(require("billing:export", act="report_schedule.create"))]
Ender = Annotated[Caller, Depends(require("billing:export", act="report_schedule.delete"))]
Operator = Annotated[Caller, Depends(require_operator())]
Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Named = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Reason = Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True), AfterValidator(shown)]
State = Literal["queued", "generating", "ready", "delivering", "delivered", "acked", "expired", "failed"]
DatasetName = Literal["finance_events", "ledger", "invoices", "dunning", "settlements", "usage"]
FormatName = Literal["csv", "jsonl", "parquet"]
Every = Literal["day", "week", "month"]


def _dangerous(act: str) -> Any:
    return Depends(require_operator(step_up=True, act=act))


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Destination(_Body):
    """Where a report goes. `download`: it waits here. `webhook`: to a channel of the organization (`channel`), or an operator's
    to a settlement sink (`sink`). `s3`: of an operator's, to the object store of the installation."""

    kind: Literal["download", "webhook", "s3"] = "download"
    channel: Named | None = None
    sink: Named | None = None


class ReportBody(_Body):
    """A report to be made. Without a period: of yesterday, in UTC. `settlements` are for operators."""

    dataset: DatasetName
    format: FormatName = "csv"
    period_start: Instant | None = None
    period_end: Instant | None = None
    destination: Destination = Destination()


class ScheduleBody(_Body):
    """A report that is made of every day, week (from Monday) or month, in UTC, when it has ended."""

    dataset: DatasetName
    every: Every
    format: FormatName = "csv"
    destination: Destination = Destination()


class RedeliverBody(_Body):
    """Why; it is kept in the audit log."""

    reason: Reason


class AckBody(_Body):
    """What a receiver answers with: the token of the delivery, and the hash of what arrived. `receipt`: its own name for it."""

    token: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    receipt: Annotated[str, StringConstraints(max_length=255), AfterValidator(shown)] | None = None


class Report(BaseModel):
    """A report. `sha256`, `rows`, `totals` (by currency, minor units), `schema_version` and `ledger_cut_off` are there once it is
    ready, and never change."""

    id: str
    organization: str | None
    dataset: DatasetName
    format: FormatName
    period_start: datetime
    period_end: datetime
    destination: Destination
    schedule: str | None
    state: State
    error: str | None
    bytes: int | None
    rows: int | None
    sha256: str | None
    totals: dict[str, dict[str, int]] | None
    schema_version: int | None
    ledger_cut_off: int | None
    created_at: datetime
    generated_at: datetime | None
    deliveries: int
    delivered_at: datetime | None
    acked_at: datetime | None
    ack_mismatches: int
    expires_at: datetime | None


class Schedule(BaseModel):
    """A schedule. The next report is of `[next_start, next_end)`, and made when that has ended."""

    id: str
    organization: str | None
    dataset: DatasetName
    format: FormatName
    every: Every
    destination: Destination
    next_start: datetime
    next_end: datetime
    created_at: datetime


class Acked(BaseModel):
    """What came of an acknowledgement. `applied` is false for one that came after the report had expired."""

    id: str
    state: State
    applied: bool


def _wanted(request: Request, organization: str | None, body: ReportBody) -> Wanted:
    today, _ = period_of("day", request.app.state.clock.wall())
    try:
        start = body.period_start or (body.period_end or today) - timedelta(days=1)
        end = body.period_end or start + timedelta(days=1)
    except OverflowError:
        raise Problem("report.invalid", "the period leaves the calendar") from None
    return Wanted(organization, body.dataset, body.format, start, end, _plain(body.destination))


def _plain(destination: Destination) -> dict[str, str]:
    return {name: value for name, value in destination.model_dump().items() if value is not None}


def _scheduled(request: Request, organization: str | None, body: ScheduleBody) -> Wanted:
    start, end = period_of(body.every, request.app.state.clock.wall())
    return Wanted(organization, body.dataset, body.format, start, end, _plain(body.destination))


def _file(row: Any, path: Any, more: dict[str, str]) -> FileResponse:
    headers = {
        "Cache-Control": "no-store", "Portico-Sha256": row.sha256.hex(), "Portico-Rows": str(row.row_count), **more,
    }  # fmt: skip
    return FileResponse(path, media_type=formats.MEDIA[row.format], filename=f"{row.id}.{row.format}", headers=headers)


_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}

# -- an organization's ---------------------------------------------------------------------------------------------------


@router.get("", response_model=Page[Report])
async def list_reports(
    reader: Reading, service: Service, who: Reader, page: Paging, state: Annotated[State | None, Query()] = None
) -> Any:
    """The organization's reports, the newest first."""
    return await service.listing(reader, who.org, state, page)


@router.post("", status_code=202, response_model=Report)
async def create_report(body: ReportBody, request: Request, tx: InTx, service: Service, who: Exporter) -> Any:
    """Have a report made. It takes a while; ask for its `state`."""
    return await service.create(tx, who, _wanted(request, who.org, body))


@router.get("/{report}", response_model=Report)
async def get_report(report: Id, reader: Reading, service: Service, who: Reader) -> Any:
    """How far a report is."""
    return await service.document(reader, who.org, report)


@files.get("/{report}/download", response_class=FileResponse, responses=_FILE)
async def download_report(report: Id, service: Service, who: Downloader) -> FileResponse:
    """The file of a report. `Portico-Ack-Token` is the token to acknowledge it with."""
    row, path, token = await service.download(who, who.org, report)
    return _file(row, path, {"Portico-Ack-Token": token})


@router.post("/{report}/redeliver", status_code=202, response_model=Report)
async def redeliver_report(report: Id, body: RedeliverBody, tx: InTx, service: Service, who: Sender) -> Any:
    """Send the same bytes once more."""
    return await service.redeliver(tx, who, who.org, report, body.reason)


@scheduling.get("", response_model=Page[Schedule])
async def list_schedules(reader: Reading, service: Service, who: Reader, page: Paging) -> Any:
    """The organization's schedules, the oldest first."""
    return await service.schedules(reader, who.org, page)


@scheduling.post("", status_code=201, response_model=Schedule)
async def create_schedule(body: ScheduleBody, request: Request, tx: InTx, service: Service, who: Scheduler) -> Any:
    """Have reports made from now on."""
    return await service.schedule(tx, who, _scheduled(request, who.org, body), body.every)


@scheduling.delete("/{report_schedule}", status_code=204)
async def delete_schedule(report_schedule: Id, tx: InTx, service: Service, who: Ender) -> None:
    """End a schedule; what it had made stays."""
    await service.unschedule(tx, who, who.org, report_schedule)


# -- receivers' ----------------------------------------------------------------------------------------------------------


@receiving.post("/{report}/ack", response_model=Acked, openapi_extra=PUBLIC.openapi())
async def ack_report(report: Id, body: AckBody, service: Service, who: Annotated[Caller, Depends(anonymous)]) -> Any:
    """Say that a report arrived, with the token that its delivery brought."""
    return await service.ack(who, report, body.token, body.sha256, body.receipt)


@receiving.get("/{report}/content", response_class=FileResponse, responses=_FILE, openapi_extra=PUBLIC.openapi())
async def report_content(
    report: Id,
    service: Service,
    who: Annotated[Caller, Depends(anonymous)],
    token: Annotated[str, Query(max_length=128)] = "",
) -> FileResponse:
    """The content of a report, by the link of its delivery."""
    row, path = await service.content(report, token)
    return _file(row, path, {})


# -- operators' ----------------------------------------------------------------------------------------------------------


@admin.get("", response_model=Page[Report])
async def list_all_reports(
    reader: Reading, service: Service, who: Operator, page: Paging, state: Annotated[State | None, Query()] = None
) -> Any:
    """Reports of everybody, the newest first."""
    return await service.listing(reader, None, state, page)


@admin.post("", status_code=202, response_model=Report)
async def create_installation_report(
    body: ReportBody, request: Request, tx: InTx, service: Service,
    who: Annotated[Caller, _dangerous("report_export.create")],
) -> Any:  # fmt: skip
    """Have a report made of the whole installation."""
    return await service.create(tx, who, _wanted(request, None, body))


@admin.get("/{report}", response_model=Report)
async def get_any_report(report: Id, reader: Reading, service: Service, who: Operator) -> Any:
    """How far a report is."""
    return await service.document(reader, None, report)


@admin_files.get("/{report}/download", response_class=FileResponse, responses=_FILE)
async def download_any_report(
    report: Id, service: Service, who: Annotated[Caller, _dangerous("report_export.download")]
) -> FileResponse:
    """The file of a report."""
    row, path, token = await service.download(who, None, report)
    return _file(row, path, {"Portico-Ack-Token": token})


@admin.post("/{report}/redeliver", status_code=202, response_model=Report)
async def redeliver_any_report(
    report: Id, body: RedeliverBody, tx: InTx, service: Service,
    who: Annotated[Caller, _dangerous("report_export.redeliver")],
) -> Any:  # fmt: skip
    """Send the same bytes once more."""
    return await service.redeliver(tx, who, None, report, body.reason)


@admin_scheduling.get("", response_model=Page[Schedule])
async def list_installation_schedules(reader: Reading, service: Service, who: Operator, page: Paging) -> Any:
    """Schedules of the installation itself, the oldest first."""
    return await service.schedules(reader, None, page)


@admin_scheduling.post("", status_code=201, response_model=Schedule)
async def create_installation_schedule(
    body: ScheduleBody, request: Request, tx: InTx, service: Service,
    who: Annotated[Caller, _dangerous("report_schedule.create")],
) -> Any:  # fmt: skip
    """Have reports of the whole installation made from now on."""
    return await service.schedule(tx, who, _scheduled(request, None, body), body.every)


@admin_scheduling.delete("/{report_schedule}", status_code=204)
async def delete_installation_schedule(
    report_schedule: Id, tx: InTx, service: Service, who: Annotated[Caller, _dangerous("report_schedule.delete")]
) -> None:
    """End a schedule of the installation; what it had made stays."""
    await service.unschedule(tx, who, None, report_schedule)
