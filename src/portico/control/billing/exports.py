"""Report exports: asked for, made once, delivered as often as it takes, acknowledged.

    queued → generating → ready → delivering → delivered → acked        (``report_states``)

The row of a report is its job. What is made is one file that never changes: its SHA-256, its rows, its totals by currency, the
version of its columns and the ledger's cut-off are recorded in the transaction that makes it ready, and its hash is checked again
before every delivery, so a re-delivery is the same bytes or none. The file has the token of the worker's lease in its name: a
worker that lost its lease wrote another file than its successor, and only the one that the row names is ever served.

The token of the acknowledgement is drawn when the report is asked for and never changes: a receiver may answer with it before our
own record of the delivery is committed.
"""

from __future__ import annotations

import asyncio
import calendar
import contextlib
import hashlib
import hmac
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.audit.tally import Seldom
from portico.control.billing import export_delivery as delivery
from portico.control.billing import export_formats as formats
from portico.control.billing import export_store as store
from portico.control.billing import settlement_store
from portico.control.billing.export_datasets import DATASETS
from portico.control.finance import ledger
from portico.control.identity import standing
from portico.control.notifications import store as channel_store
from portico.errors import Problem
from portico.kit import pages
from portico.kit.clock import Clock
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import new_id
from portico.kit.queue import Hopeless, LeaseLost, Work
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

_ACK: Final = "report ack token"
_DAY: Final = timedelta(days=1)
_UNMADE: Final = "every attempt to make it has failed"
_UNSENT: Final = "every attempt at its delivery has failed"
#: Who an audit row names for what the platform does by itself.
PLATFORM: Final = Caller("operator", "installation", None)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A report to be made. ``organization`` ``None``: of the whole installation."""

    organization: str | None
    dataset: str
    format: str
    start: datetime
    end: datetime
    destination: Mapping[str, str]


class Exports:
    """The verbs on reports. One per process."""

    def __init__(self, settings: ApiSettings, db: Database, clock: Clock, sealer: Sealer) -> None:
        self._settings, self._db, self._clock, self._sealer = settings, db, clock, sealer
        self._refusals = Seldom(clock, settings.settlement_refusal_audit_seconds)

    # -- asking for them

    async def create(self, tx: Tx, caller: Caller, wanted: Wanted) -> dict[str, Any]:
        """Have one made. Raises ``report.unavailable``, ``report.invalid``, ``report.limit_reached``."""
        await self._admit(tx, caller, wanted)
        limit = self._settings.reports_per_day
        if await store.count_since(tx, wanted.organization, self._clock.wall() - _DAY) >= limit:
            raise Problem("report.limit_reached", f"at most {limit} reports a day", limit=limit)
        row = new_row(self._sealer, wanted, caller.id, self._clock.wall())
        await store.add(tx, row)
        await self._record(tx, caller, "report_export.create", row["id"], wanted.organization, _asked(wanted))
        return render(await store.one(tx, row["id"]))

    async def schedule(self, tx: Tx, caller: Caller, wanted: Wanted, every: str) -> dict[str, Any]:
        """Have one made of every day, week (from Monday) or month, in UTC, once it has ended. Raises as ``create``."""
        await self._admit(tx, caller, wanted)
        known = await store.schedule_listing(tx, wanted.organization, self._settings.report_schedules_max, None)
        if len(known) >= self._settings.report_schedules_max:
            raise Problem("report.limit_reached", f"at most {self._settings.report_schedules_max} schedules")
        start, end = period_of(every, self._clock.wall())
        row: dict[str, Any] = {
            "id": new_id("rsc"), "organization_id": wanted.organization, "created_by": caller.id,
            "dataset": wanted.dataset, "format": wanted.format, "every": every, "destination": dict(wanted.destination),
            "next_start": start, "next_end": end, "created_at": self._clock.wall(),
        }  # fmt: skip
        await tx.execute(store.schedules.insert().values(**row))
        details = {**_asked(wanted), "every": every}
        await self._record(tx, caller, "report_schedule.create", row["id"], wanted.organization, details)
        return _render_schedule(row)

    async def schedules(self, reader: Reader, organization: str | None, page: pages.PageRequest) -> Any:
        """A page of schedules, the oldest first."""
        rows = await store.schedule_listing(reader, organization, page.limit + 1, page.after[0] if page.after else None)
        return pages.listing(rows, page.limit, lambda row: (row.id,), lambda row: _render_schedule(row._mapping))

    async def unschedule(self, tx: Tx, caller: Caller, organization: str | None, schedule: str) -> None:
        """End a schedule; what it had made stays. Raises ``report.schedule_not_found``."""
        if not await store.drop_schedule(tx, organization, schedule):
            raise Problem("report.schedule_not_found")
        await self._record(tx, caller, "report_schedule.delete", schedule, organization, {})

    async def _admit(self, tx: Tx, caller: Caller, wanted: Wanted) -> None:
        if self._settings.objects_dir is None:
            raise Problem("report.unavailable")
        dataset = DATASETS.get(wanted.dataset)
        if dataset is None or (dataset.operators_only and wanted.organization is not None):
            raise Problem("report.invalid", f"there is no dataset {wanted.dataset} here")
        if not wanted.start < wanted.end:
            raise Problem("report.invalid", "the period ends before it begins")
        if wanted.organization is not None:
            await standing.hold(tx, caller, ("billing:export",), any_standing=True)
        await self._check_destination(tx, wanted)
        await store.take_turns(tx, wanted.organization)

    async def _check_destination(self, tx: Tx, wanted: Wanted) -> None:
        """Where it goes: an organization's reports to a webhook of its own, the installation's to a sink or the store."""
        to = wanted.destination
        match to["kind"], wanted.organization:
            case "webhook", str(organization):
                channel = await channel_store.one(tx, organization, to.get("channel", ""))
                if channel is None or channel.kind != "webhook":
                    raise Problem("report.invalid", "destination.channel names no webhook of the organization")
            case "webhook", None:
                sink = await settlement_store.sink(tx, to.get("sink", ""))
                if sink is None or sink.url is None:
                    raise Problem("report.invalid", "destination.sink names no sink with a URL")
            case "s3", None if self._settings.report_store_url:
                pass
            case "s3", _:
                raise Problem("report.invalid", "reports go to an object store for operators, and where one is set")
            case "download", _:
                pass
            case _:
                raise Problem("report.invalid", "there is no such destination")

    # -- looking at them

    async def listing(
        self, reader: Reader, organization: str | None, state: str | None, page: pages.PageRequest
    ) -> Any:
        """A page of an organization's reports, or (``None``) of all, the newest first."""
        before = page.after[0] if page.after else None
        rows = await store.listing(reader, organization, state, page.limit + 1, before)
        return pages.listing(rows, page.limit, lambda row: (row.id,), render)

    async def document(self, reader: Reader, organization: str | None, export: str) -> dict[str, Any]:
        """One report. Raises ``report.not_found``."""
        return render(await self._of(reader, organization, export))

    async def _of(self, reader: Reader, organization: str | None, export: str, *, lock: bool = False) -> Any:
        row = await store.of(reader, organization, export, lock=lock)
        if row is None:
            raise Problem("report.not_found")
        return row

    # -- giving them out

    async def download(self, caller: Caller, organization: str | None, export: str) -> tuple[Any, Path, str]:
        """The row, the file, whose hash was checked, and the token to acknowledge it with. It counts as a delivery.

        Raises ``report.not_found``, ``report.not_ready``, ``report.expired``, ``report.corrupt``.
        """
        async with self._db.read() as reader:
            row = await self._of(reader, organization, export)
        # Large files take long to read: no row is held meanwhile. What a report's file is never changes.
        path = await self._file(row)
        async with self._db.transaction() as tx:
            row = await self._of(tx, organization, export, lock=True)
            if row.file != path.name:
                raise Problem("report.expired")
            if row.state == "ready" and await store.move(tx, export, "delivering") is not None:
                await store.move(tx, export, "delivered", delivered_at=self._clock.wall(), delivery=row.delivery + 1)
            details = {"sha256": row.sha256.hex()}
            await self._record(tx, caller, "report_export.download", export, row.organization_id, details)
        return row, path, token_of(self._sealer, row)

    async def content(self, export: str, token: str) -> tuple[Any, Path]:
        """The same for who has the link of a delivery. Raises ``report.ack_refused`` (401) for every link that is not good."""
        async with self._db.read() as reader:
            row = await store.one(reader, export)
        good = delivery.link_token(self._sealer, row) if row is not None and row.sha256 is not None else "-" * 64
        if not hmac.compare_digest(good.encode(), token.encode()) or row is None or row.sha256 is None:
            raise Problem("report.ack_refused")
        return row, await self._file(row)

    async def _file(self, row: Any) -> Path:
        if row.state in ("queued", "generating") or (row.state == "failed" and row.file is None):
            raise Problem("report.not_ready", state=row.state)
        try:
            return await delivery.checked_file(self._settings, row, self._clock.wall())
        except delivery.Gone:
            raise Problem("report.expired") from None
        except delivery.Changed:
            raise Problem("report.corrupt") from None

    async def redeliver(
        self, tx: Tx, caller: Caller, organization: str | None, export: str, reason: str
    ) -> dict[str, Any]:
        """Send the same bytes again. Raises ``report.not_found``, ``report.state`` for what cannot be sent."""
        row = await self._of(tx, organization, export, lock=True)
        if row.file is None or row.destination["kind"] == "download" or row.state in ("ready", "expired"):
            raise Problem("report.state", f"the report is {row.state}", state=row.state)
        if row.expires_at is not None and row.expires_at <= self._clock.wall():
            raise Problem("report.expired")
        if await delivery.begin(tx, self._sealer, row) is None:
            raise Problem("report.state", f"the report is {row.state}", state=row.state)
        await self._record(tx, caller, "report_export.redeliver", export, row.organization_id, {"reason": reason})
        return render(await store.one(tx, export))

    # -- being told that they arrived

    async def ack(self, caller: Caller, export: str, token: str, sha256: str, receipt: str | None) -> dict[str, Any]:
        """A receiver has it. One answer, 401, to every token that is not the report's; ``report.ack_mismatch`` (409), and an
        incident, when what arrived has another hash. Late ones are written down and change nothing. Raises also
        ``report.state`` for a report that was never sent."""
        async with self._db.transaction() as tx:
            row = await store.one(tx, export, lock=True)
            known = bytes(row.ack_digest) if row is not None else bytes(32)
            given = hashlib.sha256(token.encode()).digest()
            good = hmac.compare_digest(known, given) and row is not None
            answer = await self._acked(tx, caller, row, sha256, receipt) if good else None
        if answer is None:
            # In the installation's log: whoever has no token writes nothing into a tenant's.
            await self._refused(caller, export if row is not None else None, None, "token")
            raise Problem("report.ack_refused")
        if isinstance(answer, str):
            await self._refused(caller, export, row.organization_id if row is not None else None, answer)
            raise Problem("report.ack_mismatch" if answer == "sha256" else "report.state")
        return answer

    async def _acked(self, tx: Tx, caller: Caller, row: Any, sha256: str, receipt: str | None) -> dict[str, Any] | str:
        if row.sha256 is None or row.state in ("queued", "generating", "ready"):
            return "state"
        if not hmac.compare_digest(row.sha256.hex().encode(), sha256.encode()):
            await store.update(tx, row.id, ack_mismatches=row.ack_mismatches + 1)
            return "sha256"
        now = self._clock.wall()
        if row.state == "expired" or (row.expires_at is not None and row.expires_at <= now):
            if row.acked_at is None and row.late_ack_at is None:
                await store.update(tx, row.id, late_ack_at=now)
                await self._record(tx, caller, "report_export.ack_late", row.id, row.organization_id, {})
            return {"id": row.id, "state": row.state, "applied": False}
        if row.state == "acked":
            return {"id": row.id, "state": "acked", "applied": True}
        # It may come before the record of the delivery that it answers, or after a failure whose answer was lost.
        if row.state == "failed":
            await store.move(tx, row.id, "delivering")
        if row.state in ("delivering", "failed"):
            await store.move(tx, row.id, "delivered", delivered_at=now, error=None)
        await store.move(tx, row.id, "acked", acked_at=now, receipt=receipt)
        details = {"sha256": sha256, "receipt": receipt}
        await self._record(tx, caller, "report_export.ack", row.id, row.organization_id, details)
        return {"id": row.id, "state": "acked", "applied": True}

    async def _refused(self, caller: Caller, export: str | None, organization: str | None, why: str) -> None:
        """One row in the audit log for each report and reason in a while: whoever guesses does not fill it."""
        if (unrecorded := self._refusals.due(f"{export}:{why}")) is None:
            return
        await audit.refused(
            self._db, caller, "report_export.ack", export, {"reason": why, "unrecorded": unrecorded},
            organization=organization or audit.INSTALLATION,
        )  # fmt: skip

    @staticmethod
    async def _record(
        tx: Tx, caller: Caller, act: str, target: str, organization: str | None, details: dict[str, Any]
    ) -> None:
        await audit.record(tx, caller, act, target, details=details, organization=organization or audit.INSTALLATION)


def new_row(sealer: Sealer, wanted: Wanted, asker: str, now: datetime, schedule: str | None = None) -> dict[str, Any]:
    """The row of a report that is to be made, with the token that will acknowledge it."""
    export, token = new_id("rex"), secrets.token_urlsafe(32)
    return {
        "id": export, "organization_id": wanted.organization, "requested_by": asker, "schedule_id": schedule,
        "dataset": wanted.dataset, "format": wanted.format, "period_start": wanted.start, "period_end": wanted.end,
        "destination": dict(wanted.destination), "state": "queued", "created_at": now,
        "sealed_ack_token": sealer.seal(_ACK, export, token.encode()), "ack_digest": hashlib.sha256(token.encode()).digest(),
    }  # fmt: skip


def token_of(sealer: Sealer, row: Any) -> str:
    """The token that acknowledges a report."""
    return sealer.open(_ACK, row.id, bytes(row.sealed_ack_token)).decode()


def _asked(wanted: Wanted) -> dict[str, Any]:
    return {
        "dataset": wanted.dataset, "format": wanted.format, "period_start": wanted.start.isoformat(),
        "period_end": wanted.end.isoformat(), "destination": dict(wanted.destination),
    }  # fmt: skip


def render(row: Any) -> dict[str, Any]:
    """A report as people see it; never its tokens."""
    return {
        "id": row.id, "organization": row.organization_id, "dataset": row.dataset, "format": row.format,
        "period_start": row.period_start, "period_end": row.period_end, "destination": row.destination,
        "schedule": row.schedule_id, "state": row.state, "error": row.error, "bytes": row.bytes, "rows": row.row_count,
        "sha256": row.sha256.hex() if row.sha256 is not None else None, "totals": row.totals,
        "schema_version": row.schema_version, "ledger_cut_off": row.cut_off, "created_at": row.created_at,
        "generated_at": row.generated_at, "deliveries": row.delivery, "delivered_at": row.delivered_at,
        "acked_at": row.acked_at, "ack_mismatches": row.ack_mismatches, "expires_at": row.expires_at,
    }  # fmt: skip


def _render_schedule(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"], "organization": row["organization_id"], "dataset": row["dataset"], "format": row["format"],
        "every": row["every"], "destination": row["destination"], "next_start": row["next_start"],
        "next_end": row["next_end"], "created_at": row["created_at"],
    }  # fmt: skip


def period_of(every: str, at: datetime) -> tuple[datetime, datetime]:
    """The day, the week or the month that ``at`` lies in, in UTC."""
    day = at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if every == "day":
        return day, day + _DAY
    if every == "week":
        monday = day - timedelta(days=day.weekday())
        return monday, monday + 7 * _DAY
    first = day.replace(day=1)
    return first, first + timedelta(days=calendar.monthrange(first.year, first.month)[1])


# -- the worker's part ---------------------------------------------------------------------------------------------------


async def make(work: Work, settings: ApiSettings, sealer: Sealer, clock: Clock) -> None:
    """The job: write the file, then record it, and that it is on its way, with the job's end."""
    if settings.objects_dir is None:
        raise Hopeless("there is no folder for files: set objects_dir")
    row = work.row
    if row["state"] not in ("queued", "generating"):
        raise Hopeless(f"the report is {row['state']}: ask for another")
    async with work.step() as tx:
        await store.move(tx, work.id, "generating")
    folder = settings.objects_dir / "reports"
    path = folder / f"{work.id}-{work.token.hex}.{row['format']}"
    try:
        await asyncio.to_thread(folder.mkdir, 0o700, True, True)
        values = await _write(work, settings, path)
        async with work.done() as tx:
            now = clock.wall()
            values |= {"generated_at": now, "expires_at": now + timedelta(days=settings.report_days), "error": None}
            made = await store.move(tx, work.id, "ready", **values)
            if made is None:
                raise LeaseLost(work.id)
            if made.destination["kind"] != "download":
                await delivery.begin(tx, sealer, made)
            details = {"sha256": values["sha256"].hex(), "rows": values["row_count"], "cut_off": values["cut_off"]}
            await _note(tx, "report_export.ready", work.id, made.organization_id, details)
    except formats.TooLarge as err:
        await _unlink(path)
        await _give_up(work, str(err))
    except BaseException as err:
        await _unlink(path)
        last = work.attempt >= work.limits.max_attempts and isinstance(err, Exception)
        if last and not isinstance(err, LeaseLost):
            log.exception("a report could not be made", extra={"f": {"report": work.id}})
            await _give_up(work, _told(err))
            return
        raise


def _told(err: BaseException) -> str:
    """What whoever asked for a report is told of a failure: no path and no statement of ours; the log has it all."""
    if isinstance(err, OSError) and err.strerror:
        return f"it could not be written: {err.strerror}"
    return f"it could not be made ({type(err).__name__})"


async def _unlink(path: Path) -> None:
    await asyncio.shield(asyncio.to_thread(path.unlink, True))


async def _give_up(work: Work, why: str) -> None:
    async with work.done() as tx:
        await store.move(tx, work.id, "failed", error=why)
        await _note(tx, "report_export.failed", work.id, work.row["organization_id"], {"reason": why})


async def _write(work: Work, settings: ApiSettings, path: Path) -> dict[str, Any]:
    row, most = work.row, settings.report_max_bytes
    dataset = DATASETS[row["dataset"]]
    # Everything up to it is committed before the snapshot begins: what is read up to it is the same whenever it is read.
    cut_off = await ledger.cut_off(work.db)
    scope = formats.Scope(row["organization_id"], row["period_start"], row["period_end"], cut_off)
    file = await asyncio.to_thread(formats.create, path)
    try:
        async with work.db.read(snapshot=True) as reader:
            rows = await formats.write(reader, dataset, scope, row["format"], file, most, settings.report_seconds)
            totals = await formats.totals(reader, dataset, scope)
        size, digest = await asyncio.to_thread(formats.finish, file, path, most)
    finally:
        await asyncio.to_thread(file.close)
    return {
        "file": path.name, "bytes": size, "sha256": digest, "row_count": rows, "totals": totals,
        "schema_version": dataset.version, "cut_off": cut_off,
    }  # fmt: skip


async def run_schedules(db: Database, sealer: Sealer, now: datetime, batch: int = 50) -> int:
    """Ask for the reports of periods that have ended; how many. Two workers at once ask for each once."""
    found = 0
    while True:
        async with db.transaction() as tx:
            due = await store.due_schedules(tx, now, batch)
            for row in due:
                wanted = Wanted(
                    row.organization_id, row.dataset, row.format, row.next_start, row.next_end, row.destination
                )
                made = new_row(sealer, wanted, row.created_by, now, row.id)
                found += await store.add(tx, made)
                await store.advance(tx, row.id, *period_of(row.every, row.next_end))
        if len(due) < batch:
            return found


async def sweep(tx: Tx, settings: ApiSettings, now: datetime, limit: int) -> int:
    """Up to ``limit`` reports past their time, their files first; and those whose job or message died. How many."""
    rows = await store.expiring(tx, now, limit)
    for row in rows:
        await delivery.remove(settings, row)
        if row.state != "acked" and await store.move(tx, row.id, "expired") is not None:
            await _note(tx, "report_export.expired", row.id, row.organization_id, {"was": row.state})
        await store.update(tx, row.id, file=None)
    left: Sequence[Any] = await store.abandoned(tx, limit)
    for row in left:
        # What its job says last is the operator's to read (`portico admin queues dead`).
        why = _UNSENT if row.state == "delivering" else _UNMADE
        if await store.move(tx, row.id, "failed", error=why) is not None:
            await _note(tx, "report_export.failed", row.id, row.organization_id, {"reason": why})
    return max(len(rows), len(left))


async def _note(tx: Tx, act: str, export: str, organization: str | None, details: dict[str, Any]) -> None:
    """What becomes of a report by itself."""
    await audit.record(tx, PLATFORM, act, export, details=details, organization=organization or audit.INSTALLATION)


async def drop_all(tx: Tx, settings: ApiSettings, organization: str, limit: int) -> int:
    """Delete up to ``limit`` reports of an organization that is being deleted, their files first; how many."""
    rows = await store.all_of(tx, organization, limit)
    for row in rows:
        await delivery.remove(settings, row)
    await store.drop(tx, [row.id for row in rows])
    return len(rows)


async def forget_strays(db: Database, settings: ApiSettings, now: datetime) -> int:
    """Delete files that no row names, of workers that ended between file and row, after a day; how many."""
    if settings.objects_dir is None:
        return 0
    folder = settings.objects_dir / "reports"
    async with db.read() as reader:
        known = await store.files(reader)

    def remove() -> int:
        old, gone = (now - _DAY).timestamp(), 0
        for path in folder.glob("rex_*"):
            with contextlib.suppress(FileNotFoundError):  # another worker sweeps, too
                if path.name not in known and path.stat().st_mtime < old:
                    path.unlink()
                    gone += 1
        return gone

    return await asyncio.to_thread(remove)
