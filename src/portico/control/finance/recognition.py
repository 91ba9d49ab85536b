"""Recognition: an invoice's net amount is deferred when it is issued and becomes revenue a day at a time.

Each line of an invoice is a schedule. Its amount is spread over the UTC days that its period touches, in proportion to the
seconds of each, by largest remainder: the days of a schedule sum exactly to its amount. A day is in the ledger once the day
is over; a schedule without a period is recognized with the invoice. Who works on a schedule holds its row, so that any number
of workers may.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from portico.control.finance import accounts, ledger
from portico.control.finance.ledger import Entry, Posting
from portico.control.finance.store import schedules
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import new_id
from portico.kit.money import allocate

log = logging.getLogger(__name__)

#: Days of one schedule that one transaction recognizes at most (one that nobody saw for long catches up in pieces).
DAYS_AT_ONCE: Final = 100
_DAY: Final = timedelta(days=1)
_S = schedules.c


@dataclass(frozen=True, slots=True)
class Schedule:
    """A line to be recognized: ``total_minor`` (negative for a credit) from ``starts_at`` up to ``ends_at``."""

    line: int
    total_minor: int
    starts_at: datetime
    ends_at: datetime


def daily(total_minor: int, starts_at: datetime, ends_at: datetime) -> list[tuple[date, int]]:
    """Each UTC day from the first to the last that the period touches, with its share; they sum to ``total_minor``."""
    start, end = starts_at.astimezone(UTC), ends_at.astimezone(UTC)
    if end <= start:
        return [(start.date(), total_minor)]
    days: list[date] = []
    seconds: list[int] = []
    midnight = datetime.combine(start.date(), time(), UTC)
    while midnight < end:
        following = midnight + _DAY
        days.append(midnight.date())
        # Microseconds would be no truer: periods of providers are whole seconds.
        seconds.append(max(1, round((min(end, following) - max(start, midnight)).total_seconds())))
        midnight = following
    return list(zip(days, allocate(total_minor, seconds), strict=True))


async def plan(
    tx: Tx,
    source: str,
    invoice_ref: str,
    lines: Sequence[Schedule],
    *,
    organization_id: str | None,
    provider: str,
    currency: str,
    subscription_ref: str | None,
    plan_ref: str | None,
) -> None:
    """Schedule the lines of an invoice; those that are scheduled already stay as they are."""
    rows = [
        {
            "id": new_id("rec"), "source": source, "invoice_ref": invoice_ref, "line": each.line,
            "organization_id": organization_id, "provider": provider, "subscription_ref": subscription_ref,
            "plan_ref": plan_ref, "currency": currency, "total_minor": each.total_minor, "starts_at": each.starts_at,
            "ends_at": max(each.starts_at, each.ends_at), "next_on": each.starts_at.astimezone(UTC).date(),
            "recognized_minor": 0, "done": False,
        }
        for each in lines
        if each.total_minor
    ]  # fmt: skip
    if rows:
        await tx.execute(insert(schedules).on_conflict_do_nothing(constraint="ledger_recognition_line_key"), rows)


async def cancel(tx: Tx, source: str, invoice_ref: str, at: datetime) -> None:
    """End the schedules of a voided invoice, and give back to deferred revenue what was recognized of it."""
    query = sa.select(schedules).where(_S.source == source, _S.invoice_ref == invoice_ref)
    for row in await tx.fetch_all(query.order_by(_S.line).with_for_update()):
        if row.recognized_minor:
            key = f"recognition.canceled:{row.id}"
            entry = _entry(row, key, "recognition.canceled", at, -row.recognized_minor)
            await ledger.post(tx, entry)
        await tx.execute(sa.update(schedules).where(_S.id == row.id).values(done=True, recognized_minor=0))


async def advance(db: Database, today: date, batch: int) -> int:
    """Recognize every day before ``today`` that is not in the ledger yet; how many transactions that were.

    One schedule is one transaction of the database: a crash in between loses nothing and repeats nothing. One that cannot be
    recognized keeps no other from it: what it raised first is raised at the end.
    """
    posted = 0
    passed: set[str] = set()
    failed: Exception | None = None
    while True:
        async with db.read() as reader:
            due = [name for name in await _due(reader, today, batch + len(passed)) if name not in passed]
        if not due:
            if failed is not None:
                raise failed
            return posted
        for name in due:
            try:
                async with db.transaction() as tx:
                    count = await advance_one(tx, name, today)
            except Exception as err:
                log.exception("a schedule cannot be recognized", extra={"f": {"schedule": name}})
                failed, count = failed or err, 0
            posted += count
            if count == 0:
                passed.add(name)  # another worker has it, or it is done


async def _due(reader: Reader, today: date, limit: int) -> list[str]:
    query = sa.select(_S.id).where(~_S.done, _S.next_on < today).order_by(_S.next_on, _S.id).limit(limit)
    return [row.id for row in await reader.fetch_all(query)]


async def advance_one(tx: Tx, schedule: str, today: date) -> int:
    """Recognize the days of one schedule before ``today``; how many transactions that were, 0 when another holds it."""
    query = sa.select(schedules).where(_S.id == schedule, ~_S.done, _S.next_on < today)
    row = await tx.fetch_one(query.with_for_update(skip_locked=True))
    if row is None:
        return 0
    days = daily(row.total_minor, row.starts_at, row.ends_at)
    todo = [(day, amount) for day, amount in days if row.next_on <= day < today][:DAYS_AT_ONCE]
    recognized = row.recognized_minor
    for day, amount in todo:
        if amount:
            at = datetime.combine(day, time(), UTC)
            await ledger.post(tx, _entry(row, f"recognition:{row.id}:{day.isoformat()}", "recognition", at, amount))
            recognized += amount
    following = todo[-1][0] + _DAY
    done = following > days[-1][0]
    changed = sa.update(schedules).where(_S.id == row.id)
    await tx.execute(changed.values(next_on=following, recognized_minor=recognized, done=done))
    return len(todo)


def _entry(row: Any, key: str, kind: str, at: datetime, amount: int) -> Entry:
    """``amount`` from deferred revenue to revenue; back, when it is negative."""
    postings = (
        Posting(accounts.DEFERRED, row.currency, amount, row.provider, row.invoice_ref),
        Posting(accounts.REVENUE, row.currency, -amount, row.provider, row.invoice_ref),
    )
    return Entry(
        key, kind, row.organization_id, at, postings, provider=row.provider, subscription_ref=row.subscription_ref,
        invoice_ref=row.invoice_ref, plan_ref=row.plan_ref, source=row.id,
    )  # fmt: skip


async def behind(reader: Reader, before: date) -> int:
    """How many schedules have a day before ``before`` that is not in the ledger."""
    query = sa.select(sa.func.count()).select_from(schedules).where(~_S.done, _S.next_on < before)
    return int(await reader.scalar(query))
