"""Exports: everything that an organization has, as a zip of JSON Lines, made by the worker `maintenance`.

The row of an export is its job. What goes in is read in one snapshot, so that files agree with each other whatever changes
meanwhile, and leaves out every secret: keys without their digests, policies without passwords and header values. The file
has the token of the worker's lease in its name: a worker that lost its lease writes another file than its successor, and only
the one whose name the row got (in the transaction that ends the job) is ever served.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.audit import export as audit_export
from portico.control.audit import service as audit
from portico.control.identity import standing
from portico.control.identity.tables import organization_exports
from portico.errors import Problem
from portico.kit import pages, queue
from portico.kit.clock import Clock
from portico.kit.db import Reader, Tx
from portico.kit.ids import new_id
from portico.kit.queue import Hopeless, Work
from portico.settings import ApiSettings

#: Its jobs.
EXPORT: Final = queue.Kind("organizations.export", organization_exports)
#: What goes into a file of the export: from a snapshot and an organization to its lines, some at a time.
Source = Callable[[Reader, str], AsyncIterator[bytes]]

t = organization_exports.c
_ROWS: Final = 500
_DAY: Final = timedelta(days=1)
_STATES: Final = {"pending": "pending", "done": "ready", "dead": "failed"}


class Exports:
    """The verbs on exports."""

    def __init__(self, settings: ApiSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock

    async def create(self, tx: Tx, caller: Caller) -> dict[str, Any]:
        """Have one made. Raises ``export.unavailable``, ``export.limit_reached``."""
        if self._settings.objects_dir is None:
            raise Problem("export.unavailable")
        await standing.hold(tx, caller, ("organization:export",), any_standing=True)
        today = sa.and_(t.organization_id == caller.org, t.created_at > self._clock.wall() - _DAY)
        limit = self._settings.exports_per_day
        if await tx.scalar(sa.select(sa.func.count()).where(today)) >= limit:
            raise Problem("export.limit_reached", f"an organization makes at most {limit} exports a day", limit=limit)
        row = {
            "id": new_id("exp"),
            "organization_id": caller.org,
            "requested_by": caller.id,
            "created_at": self._clock.wall(),
        }
        await tx.execute(sa.insert(organization_exports).values(**row))
        await queue.wake(tx, EXPORT)
        await audit.record(tx, caller, "organization.export", str(row["id"]))
        return self._render(await self._one(tx, caller, str(row["id"])))

    async def listing(self, reader: Reader, caller: Caller, page: pages.PageRequest) -> dict[str, Any]:
        """A page of the organization's exports, newest first."""
        query = sa.select(organization_exports).where(t.organization_id == caller.org)
        if page.after:
            query = query.where(t.id < page.after[0])
        rows = await reader.fetch_all(query.order_by(t.id.desc()).limit(page.limit + 1))
        document: dict[str, Any] = pages.listing(rows, page.limit, lambda row: (row.id,), self._render)
        return document

    async def one(self, reader: Reader, caller: Caller, export: str) -> dict[str, Any]:
        """One export. Raises ``request.not_found``."""
        return self._render(await self._one(reader, caller, export))

    async def file(self, tx: Tx, caller: Caller, export: str) -> Path:
        """The finished file, whose download is recorded. Raises ``request.not_found``, ``export.not_ready``, ``export.over``."""
        row = await self._one(tx, caller, export)
        if row.queue_state != "done":
            raise Problem("export.not_ready")
        folder = self._settings.objects_dir
        path: Path | None = None
        if folder is not None and row.file is not None:
            path = folder / "exports" / row.file
        if path is None or self._over(row) or not await asyncio.to_thread(path.is_file):
            raise Problem("export.over")
        await audit.record(tx, caller, "organization.export_download", row.id)
        return path

    async def _one(self, reader: Reader, caller: Caller, export: str) -> Any:
        mine = sa.and_(t.id == export, t.organization_id == caller.org)
        row = await reader.fetch_one(sa.select(organization_exports).where(mine))
        if row is None:
            raise Problem("request.not_found", "there is no such export")
        return row

    def _over(self, row: Any) -> bool:
        return row.expires_at is None or bool(row.expires_at <= self._clock.wall())

    def _render(self, row: Any) -> dict[str, Any]:
        state = _STATES[row.queue_state]
        return {
            "id": row.id,
            "state": "expired" if state == "ready" and self._over(row) else state,
            "created_at": row.created_at,
            "bytes": row.bytes,
            "sha256": row.sha256.hex() if row.sha256 is not None else None,
            "expires_at": row.expires_at,
        }


# -- the worker's part ---------------------------------------------------------------------------------------------------


async def make(work: Work, settings: ApiSettings, sources: Mapping[str, Source], now: datetime) -> None:
    """The job: write the file, then record it with the job's end. Raises ``Hopeless`` without a folder, or for too much."""
    if settings.objects_dir is None:
        raise Hopeless("there is no folder for files: set objects_dir")
    folder = settings.objects_dir / "exports"
    await asyncio.to_thread(folder.mkdir, 0o700, True, True)
    path = folder / f"{work.id}-{work.token.hex}.zip"
    try:
        size, digest = await _write(work, path, sources, settings.export_max_bytes)
        async with work.done() as tx:
            values = {"file": path.name, "bytes": size, "sha256": digest}
            values["expires_at"] = now + timedelta(days=settings.export_days)
            await tx.execute(sa.update(organization_exports).where(t.id == work.id).values(**values))
    except BaseException:
        await asyncio.shield(asyncio.to_thread(path.unlink, True))
        raise


async def _write(work: Work, path: Path, sources: Mapping[str, Source], most: int) -> tuple[int, bytes]:
    total = 0
    with await asyncio.to_thread(_create, path) as file:
        async with work.db.read(snapshot=True) as reader:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, source in sources.items():
                    with archive.open(f"{name}.jsonl", "w", force_zip64=True) as member:
                        async for lines in source(reader, work.row["organization_id"]):
                            total += len(lines)
                            if total > most:
                                raise Hopeless(f"the organization has more than {most} bytes")
                            await asyncio.to_thread(member.write, lines)
        return await asyncio.to_thread(_finish, file)


def _create(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b")


def _finish(file: Any) -> tuple[int, bytes]:
    file.flush()
    os.fsync(file.fileno())
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size, hashlib.file_digest(file, "sha256").digest()


async def sweep(tx: Tx, settings: ApiSettings, now: datetime, rows: int) -> int:
    """Delete up to ``rows`` exports that are over, their files first; how many."""
    over = sa.or_(t.expires_at <= now, sa.and_(t.queue_state == "dead", t.finished_at <= now - _DAY))
    query = sa.select(t.id, t.file).where(over).limit(rows).with_for_update(skip_locked=True)
    return await _drop(tx, settings, await tx.fetch_all(query))


async def drop_all(tx: Tx, settings: ApiSettings, organization: str, rows: int) -> int:
    """Delete up to ``rows`` exports of an organization that is being deleted, their files first; how many."""
    query = sa.select(t.id, t.file).where(t.organization_id == organization).order_by(t.id).limit(rows)
    return await _drop(tx, settings, await tx.fetch_all(query.with_for_update()))


async def _drop(tx: Tx, settings: ApiSettings, rows: Sequence[Any]) -> int:
    folder = settings.objects_dir
    for row in rows:
        if folder is not None and row.file is not None:
            with suppress(OSError):
                await asyncio.to_thread((folder / "exports" / row.file).unlink, True)
    await tx.execute(sa.delete(organization_exports).where(t.id.in_([row.id for row in rows])))
    return len(rows)


async def forget_strays(tx: Tx, settings: ApiSettings, now: datetime) -> int:
    """Delete files that no row names, of workers that ended between file and row, after a day; how many."""
    if settings.objects_dir is None or not settings.objects_dir.is_dir():
        return 0
    known = {row.file for row in await tx.fetch_all(sa.select(t.file).where(t.file.is_not(None)))}

    def remove() -> int:
        old = (now - _DAY).timestamp()
        strays = [p for p in settings.objects_dir.glob("exports/exp_*.zip") if p.name not in known]  # type: ignore[union-attr]
        gone = [path for path in strays if path.stat().st_mtime < old]
        for path in gone:
            path.unlink(missing_ok=True)
        return len(gone)

    return await asyncio.to_thread(remove)


# -- what goes in --------------------------------------------------------------------------------------------------------


def rows_of(query: str) -> Source:
    """Lines of a query, whose ``$1`` is the organization; column ``line`` is the JSON text of one."""

    async def lines(reader: Reader, organization: str) -> AsyncIterator[bytes]:
        batch: list[str] = []
        async for row in reader.raw.cursor(query, organization, prefetch=_ROWS):
            batch.append(row["line"])
            if len(batch) == _ROWS:
                yield _joined(batch)
                batch = []
        if batch:
            yield _joined(batch)

    return lines


def _joined(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def json_line(value: Any) -> str:
    """One line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _table(columns: str, source: str) -> Source:
    # Our own names.
    return rows_of(f"SELECT to_json(x)::text AS line FROM (SELECT {columns} FROM {source}) x")  # noqa: S608


async def _audit(reader: Reader, organization: str) -> AsyncIterator[bytes]:
    async for lines in audit_export.lines_of(reader, organization, "jsonl", _ROWS):
        yield lines


#: What identity knows of an organization, by the name of its file.
SOURCES: Final[Mapping[str, Source]] = {
    "organization": _table("id, name, plan, created_at, suspended_at, delete_after", "organizations WHERE id = $1"),
    "members": _table(
        "u.id, u.email, m.role, m.created_at AS joined_at, m.last_used_at",
        "members m JOIN users u ON u.id = m.user_id WHERE m.organization_id = $1 ORDER BY u.id",
    ),
    "invitations": _table(
        "id, email, role, invited_by, created_at, sent_at, sends, expires_at, accepted_at, accepted_by, revoked_at",
        "invitations WHERE organization_id = $1 ORDER BY id",
    ),
    "roles": _table("id, name, permissions, created_at, updated_at", "roles WHERE organization_id = $1 ORDER BY id"),
    "keys": _table(
        "id, kind, name, prefix, scopes, user_id, created_at, expires_at, last_used_at, revoked_at, rotated_from",
        "api_keys WHERE organization_id = $1 ORDER BY id",
    ),
    "audit": _audit,
}
