"""Routes of an organization's exports: /org/exports."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import FileResponse
from pydantic import BaseModel

from portico.control.access import Caller, Db, InTx, Paging, Reading, require, require_recent
from portico.control.identity.api import Service
from portico.control.identity.org_api import Id
from portico.control.requests import UnitOfWork
from portico.kit.pages import Page

router = APIRouter(prefix="/org/exports", tags=["organization"], route_class=UnitOfWork)
Exporter = Annotated[Caller, Depends(require("organization:export", act="organization.export"))]
Asker = Annotated[Caller, Depends(require_recent("organization:export", act="organization.export"))]


class Export(BaseModel):
    """An export: a zip of JSON Lines, to be downloaded until `expires_at`."""

    id: str
    state: Literal["pending", "ready", "failed", "expired"]
    created_at: datetime
    bytes: int | None
    sha256: str | None
    expires_at: datetime | None


@router.get("", response_model=Page[Export])
async def list_exports(reader: Reading, service: Service, who: Exporter, page: Paging) -> Any:
    """The organization's exports, newest first."""
    return await service.exports.listing(reader, who, page)


@router.post("", status_code=202, response_model=Export)
async def create_export(tx: InTx, service: Service, who: Asker) -> Any:
    """Have everything that the organization has written into a file, without secrets. It takes a while; ask for its `state`."""
    return await service.exports.create(tx, who)


@router.get("/{export}", response_model=Export)
async def get_export(export: Id, reader: Reading, service: Service, who: Exporter) -> Any:
    """How far an export is."""
    return await service.exports.one(reader, who, export)


@router.get(
    "/{export}/download",
    response_class=FileResponse,
    responses={200: {"content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def download_export(export: Id, db: Db, service: Service, who: Asker) -> FileResponse:
    """The file of a finished export. As for asking for one, the person must have proved who they are a short time ago."""
    async with db.transaction() as tx:  # who took it is recorded
        path = await service.exports.file(tx, who, export)
    headers = {"Cache-Control": "no-store"}
    return FileResponse(path, media_type="application/zip", filename=f"{export}.zip", headers=headers)
