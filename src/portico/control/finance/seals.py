"""Seals: a period of the ledger is closed for good, and its hash says what was in it.

    hash(n) = SHA-256( hash(n-1) || RFC 8785 of {starts_on, ends_on, transactions, digest, totals} )

Whoever keeps the hash of a seal elsewhere can show later that not one transaction of the period, or of any before it, was
changed, removed or added. The database takes no transaction into a sealed period; what is heard of late is booked on the first
open day. A period is sealed when it is over and its revenue is recognized.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Final

import sqlalchemy as sa

from portico.control.finance import balances, ledger, recognition, store
from portico.control.finance.store import seals
from portico.errors import Problem
from portico.kit.db import Database, Reader, Tx

_DIGEST: Final = """
SELECT count(*) AS transactions, sha256(coalesce(string_agg(hash, ''::bytea ORDER BY chain, seq), ''::bytea)) AS digest
FROM ledger_transactions WHERE booked_on >= $1 AND booked_on < $2
"""
_OLDEST: Final = "SELECT min(booked_on) FROM ledger_transactions"


@dataclass(frozen=True, slots=True)
class Fault:
    """The first thing that is wrong: where, and what."""

    place: str
    detail: str


async def seal(tx: Tx, ends_on: date, by: str, now: datetime) -> sa.Row[Any]:
    """Close everything before ``ends_on`` that is not closed yet, as one period; the seal.

    Raises ``ledger.period_open``: the period is not over, or has revenue that is not recognized; ``ledger.period_sealed``: it
    is closed already, or there is nothing to close.
    """
    await ledger.stop_posting(tx)
    if ends_on > now.astimezone(UTC).date():
        raise Problem("ledger.period_open", f"{ends_on} is not over")
    if waiting := await recognition.behind(tx, ends_on):
        raise Problem("ledger.period_open", f"{waiting} schedules have revenue to be recognized before {ends_on}")
    last = await newest(tx)
    begins = last.ends_on if last is not None else await tx.raw.fetchval(_OLDEST)
    if begins is None or begins >= ends_on:
        raise Problem("ledger.period_sealed", "there is nothing before that day that is not sealed")
    found = await content(tx, begins, ends_on)
    previous = last.hash if last is not None else store.ZERO
    row = {
        "starts_on": begins, "ends_on": ends_on, "transactions": found["transactions"],
        "digest": bytes.fromhex(found["digest"]), "totals": found["totals"], "previous": previous,
        "hash": store.link(previous, found), "sealed_by": by, "sealed_at": now,
    }  # fmt: skip
    return (await tx.execute(sa.insert(seals).values(**row).returning(seals))).one()


async def content(reader: Reader, starts_on: date, ends_on: date) -> dict[str, Any]:
    """What is hashed of a period, from the ledger as it is now."""
    row = await reader.raw.fetchrow(_DIGEST, starts_on, ends_on)
    closing = {
        (each.account, each.currency): each.balance_minor for each in await balances.trial(reader, until=ends_on)
    }
    within = await balances.trial(reader, since=starts_on, until=ends_on)
    moved = {(each.account, each.currency): each.balance_minor for each in within}
    return {
        "starts_on": starts_on.isoformat(),
        "ends_on": ends_on.isoformat(),
        "transactions": row["transactions"],
        "digest": row["digest"].hex(),
        "totals": [[*at, moved.get(at, 0), balance] for at, balance in sorted(closing.items())],
    }


async def newest(reader: Reader) -> sa.Row[Any] | None:
    """The last seal."""
    return await reader.fetch_one(sa.select(seals).order_by(seals.c.ends_on.desc()).limit(1))


async def every(reader: Reader) -> list[sa.Row[Any]]:
    """All seals, the oldest first (a year has twelve)."""
    return list(await reader.fetch_all(sa.select(seals).order_by(seals.c.ends_on)))


def month_start(day: date) -> date:
    """The first day of its month."""
    return day.replace(day=1)


async def seal_month(db: Database, now: datetime, after_days: int) -> date | None:
    """Seal the month before this one when it is over for ``after_days`` days; until when the ledger is now newly sealed."""
    today = now.astimezone(UTC).date()
    ends_on = month_start(today)
    if (today - ends_on).days < after_days:
        return None
    async with db.read() as reader:
        last = await newest(reader)
        begun = await reader.raw.fetchval(_OLDEST)
    if begun is None or begun >= ends_on or (last is not None and last.ends_on >= ends_on):
        return None
    async with db.transaction() as tx:
        await seal(tx, ends_on, "schedule", now)
    return ends_on


# -- verification --------------------------------------------------------------------------------------------------------


async def verify_seals(reader: Reader) -> Fault | None:
    """Work every seal out again from the ledger; the first that is not what was sealed, or ``None``."""
    previous, follows = store.ZERO, None
    for row in await every(reader):
        place = f"seal of {row.ends_on}"
        if bytes(row.previous) != previous or (follows is not None and row.starts_on != follows):
            return Fault(place, "does not follow the seal before it")
        stored = {
            "starts_on": row.starts_on.isoformat(), "ends_on": row.ends_on.isoformat(), "transactions": row.transactions,
            "digest": row.digest.hex(), "totals": row.totals,
        }  # fmt: skip
        if store.link(previous, stored) != bytes(row.hash):
            return Fault(place, "the seal itself was changed")
        found = await content(reader, row.starts_on, row.ends_on)
        if found != stored:
            return Fault(place, _difference(stored, found))
        previous, follows = bytes(row.hash), row.ends_on
    return None


def _difference(stored: dict[str, Any], found: dict[str, Any]) -> str:
    if stored["transactions"] != found["transactions"]:
        return f"{stored['transactions']} transactions were sealed, {found['transactions']} are there"
    if stored["digest"] != found["digest"]:
        return "a transaction is not the one that was sealed"
    return "postings are not those that were sealed"
