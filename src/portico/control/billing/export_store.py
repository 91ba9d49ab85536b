"""The tables of report exports and their schedules, and every query on them.

billing_report_exports      every report: what was asked for, what was made, where it went; the queue of what is to be made
billing_report_schedules    reports that are made again and again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from portico.control.billing.report_states import EXPORT
from portico.kit import outbox, queue
from portico.kit.db import Reader, Tx, metadata
from portico.kit.queue import Kind


def _time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True))


def _now(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())


def _required(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Text, nullable=False)


exports = sa.Table(
    "billing_report_exports",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # Null: about the whole installation, and its operators' alone.
    sa.Column("organization_id", sa.Text),
    _required("requested_by"),
    sa.Column("schedule_id", sa.Text),
    _required("dataset"),
    _required("format"),
    sa.Column("period_start", sa.DateTime(timezone=True), nullable=False),
    sa.Column("period_end", sa.DateTime(timezone=True), nullable=False),
    # {"kind": "download"}, {"kind": "webhook", "channel" | "sink": …}, {"kind": "s3"}
    sa.Column("destination", JSONB, nullable=False),
    _required("state"),
    sa.Column("error", sa.Text),
    # What was made, once: never changed after `ready`.
    sa.Column("file", sa.Text),
    sa.Column("bytes", sa.BigInteger),
    sa.Column("sha256", sa.LargeBinary),
    sa.Column("row_count", sa.BigInteger),
    sa.Column("totals", JSONB),
    sa.Column("schema_version", sa.Integer),
    # The highest number of the ledger that it can hold; what is posted later is not in it.
    sa.Column("cut_off", sa.BigInteger),
    _time("generated_at"),
    # Fixed when the report is asked for, so before anybody can know that there is one.
    sa.Column("sealed_ack_token", sa.LargeBinary, nullable=False),
    sa.Column("ack_digest", sa.LargeBinary, nullable=False),
    sa.Column("delivery", sa.Integer, nullable=False, server_default="0"),
    sa.Column("message_id", sa.Text),
    _time("delivered_at"),
    sa.Column("receipt", sa.Text),
    _time("acked_at"),
    sa.Column("ack_mismatches", sa.Integer, nullable=False, server_default="0"),
    _time("late_ack_at"),
    _time("expires_at"),
    _now("created_at"),
    *queue.columns(),
    *queue.rules("billing_report_exports"),
    sa.UniqueConstraint("schedule_id", "period_start", name="billing_report_exports_schedule_id_key"),
    sa.CheckConstraint("state IN (" + ", ".join(repr(state) for state in EXPORT.states) + ")", name="state"),
    sa.CheckConstraint("period_start < period_end", name="period"),
    sa.Index("billing_report_exports_organization_id_id_ix", "organization_id", "id"),
    sa.Index("billing_report_exports_expires_at_ix", "expires_at", postgresql_where=sa.text("file IS NOT NULL")),
    sa.Index("billing_report_exports_state_ix", "state", "id"),
)

schedules = sa.Table(
    "billing_report_schedules",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text),
    _required("created_by"),
    _required("dataset"),
    _required("format"),
    # day, week, month
    _required("every"),
    sa.Column("destination", JSONB, nullable=False),
    # The next period to be reported; it is when it has ended.
    sa.Column("next_start", sa.DateTime(timezone=True), nullable=False),
    sa.Column("next_end", sa.DateTime(timezone=True), nullable=False),
    _now("created_at"),
    sa.CheckConstraint("every IN ('day', 'week', 'month')", name="every"),
    sa.Index("billing_report_schedules_organization_id_id_ix", "organization_id", "id"),
    sa.Index("billing_report_schedules_next_end_ix", "next_end"),
)

KIND: Final = Kind("billing.reports", exports)
E = exports.c
C = schedules.c


async def one(reader: Reader, export: str, *, lock: bool = False) -> Any | None:
    """One report, whoever's."""
    query = sa.select(exports).where(E.id == export)
    return await reader.fetch_one(query.with_for_update() if lock else query)


async def of(reader: Reader, organization: str | None, export: str, *, lock: bool = False) -> Any | None:
    """One report of an organization, or (``None``) of anybody's: for operators."""
    query = sa.select(exports).where(E.id == export)
    if organization is not None:
        query = query.where(E.organization_id == organization)
    return await reader.fetch_one(query.with_for_update() if lock else query)


async def listing(
    reader: Reader, organization: str | None, state: str | None, limit: int, before: str | None
) -> Sequence[Any]:
    """Reports of an organization, or of all, the newest first."""
    query = sa.select(exports)
    if organization is not None:
        query = query.where(E.organization_id == organization)
    if state is not None:
        query = query.where(E.state == state)
    if before is not None:
        query = query.where(E.id < before)
    return await reader.fetch_all(query.order_by(E.id.desc()).limit(limit))


async def take_turns(tx: Tx, organization: str | None) -> None:
    """Who asks for reports of one organization takes turns: how many there are is counted here."""
    name = organization or "installation"
    await tx.raw.execute("SELECT pg_advisory_xact_lock(hashtextextended('reports of ' || $1, 0))", name)


async def count_since(reader: Reader, organization: str | None, since: datetime) -> int:
    """How many were asked for since a time, schedules aside."""
    mine = E.organization_id == organization if organization is not None else E.organization_id.is_(None)
    query = sa.select(sa.func.count()).where(mine, E.created_at > since, E.schedule_id.is_(None))
    return int(await reader.scalar(query))


async def add(tx: Tx, row: Mapping[str, Any]) -> bool:
    """Write a report to be made, and wake who makes it; false when its schedule has one of this period."""
    statement = insert(exports).values(**row).on_conflict_do_nothing(index_elements=["schedule_id", "period_start"])
    if (await tx.execute(statement.returning(E.id))).first() is None:
        return False
    await queue.wake(tx, KIND)
    return True


async def move(tx: Tx, export: str, to: str, **values: Any) -> Any | None:
    """Into a state, from one that leads there; ``None`` when it is in none of those by now."""
    statement = sa.update(exports).where(E.id == export, E.state.in_(EXPORT.sources(to))).values(state=to, **values)
    return (await tx.execute(statement.returning(exports))).first()


async def update(tx: Tx, export: str, **values: Any) -> None:
    """Change what is no state."""
    await tx.execute(sa.update(exports).where(E.id == export).values(**values))


async def expiring(tx: Tx, now: datetime, limit: int) -> Sequence[Any]:
    """Reports whose file is past its time, held until ``tx`` ends."""
    due = (E.expires_at <= now) & E.file.is_not(None) & E.state.in_((*EXPORT.sources("expired"), "acked"))
    query = sa.select(exports).where(due).order_by(E.id).limit(limit).with_for_update(skip_locked=True)
    return await tx.fetch_all(query)


async def abandoned(tx: Tx, limit: int) -> Sequence[Any]:
    """Reports whose job, or whose message, died without a word."""
    m = outbox.messages.c
    unmade = E.state.in_(("queued", "generating")) & (E.queue_state == "dead")
    dead = sa.select(m.id).where(m.id == E.message_id, m.queue_state == "dead").exists()
    unsent = (E.state == "delivering") & dead
    query = sa.select(exports).where(unmade | unsent).order_by(E.id).limit(limit).with_for_update(skip_locked=True)
    return await tx.fetch_all(query)


async def all_of(tx: Tx, organization: str, limit: int) -> Sequence[Any]:
    """Reports of an organization, held until ``tx`` ends."""
    query = sa.select(exports).where(E.organization_id == organization).order_by(E.id).limit(limit)
    return await tx.fetch_all(query.with_for_update())


async def drop(tx: Tx, ids: Sequence[str]) -> None:
    """Delete reports."""
    await tx.execute(sa.delete(exports).where(E.id.in_(ids)))


async def files(reader: Reader) -> set[str]:
    """The files that reports name."""
    return {row.file for row in await reader.fetch_all(sa.select(E.file).where(E.file.is_not(None)))}


#: Days for which a report that failed is a figure.
_FAILED_DAYS: Final = 7
_FIGURES: Final = f"""
SELECT state, count(*) AS n FROM billing_report_exports
WHERE state IN ('queued', 'generating', 'ready', 'delivering')
    OR (state = 'failed' AND created_at > now() - interval '{_FAILED_DAYS} days')
GROUP BY state
"""  # noqa: S608 - our own words


async def figures(reader: Reader) -> tuple[dict[str, int], int]:
    """Reports on their way, or that failed of late, by state; and acknowledgements of another hash, of those that are kept."""
    states = {row["state"]: row["n"] for row in await reader.raw.fetch(_FIGURES)}
    query = "SELECT coalesce(sum(ack_mismatches), 0)::bigint FROM billing_report_exports WHERE file IS NOT NULL"
    return states, int(await reader.raw.fetchval(query))


# -- schedules -----------------------------------------------------------------------------------------------------------


async def schedule_listing(reader: Reader, organization: str | None, limit: int, after: str | None) -> Sequence[Any]:
    """Schedules of an organization, or (``None``) of the installation itself, the oldest first."""
    mine = C.organization_id == organization if organization is not None else C.organization_id.is_(None)
    query = sa.select(schedules).where(mine)
    if after is not None:
        query = query.where(C.id > after)
    return await reader.fetch_all(query.order_by(C.id).limit(limit))


async def drop_schedule(tx: Tx, organization: str | None, schedule: str) -> bool:
    """Delete one; whether there was one."""
    mine = C.organization_id == organization if organization is not None else C.organization_id.is_(None)
    return bool((await tx.execute(sa.delete(schedules).where(C.id == schedule, mine))).rowcount)


async def due_schedules(tx: Tx, now: datetime, limit: int) -> Sequence[Any]:
    """Schedules whose period has ended, held until ``tx`` ends."""
    query = sa.select(schedules).where(C.next_end <= now).order_by(C.next_end, C.id).limit(limit)
    return await tx.fetch_all(query.with_for_update(skip_locked=True))


async def advance(tx: Tx, schedule: str, start: datetime, end: datetime) -> None:
    """On to the next period."""
    await tx.execute(sa.update(schedules).where(C.id == schedule).values(next_start=start, next_end=end))
