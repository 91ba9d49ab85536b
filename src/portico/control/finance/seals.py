"""Seals: a period of the ledger is closed for good, and its hash says what was in it.

    hash(n) = SHA-256( hash(n-1) || RFC 8785 of {starts_on, ends_on, transactions, digest, totals} )

Whoever keeps the hash of a seal elsewhere can show later that not one transaction of the period, or of any before it, was
changed, removed or added. The database takes no transaction into a sealed period; what is heard of late is booked on the first
open day. A period is sealed when it is over and its revenue is recognized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, Final

import sqlalchemy as sa

from portico.control.finance import balances, ledger, recognition, store
from portico.control.finance.store import seals
from portico.errors import Problem
from portico.kit.db import Database, Reader, Tx

# In an order that no collation of the database changes.
_HASHES: Final = """
SELECT hash FROM ledger_transactions WHERE booked_on >= $1 AND booked_on < $2 ORDER BY chain COLLATE "C", seq
"""
_COUNT: Final = "SELECT count(*) FROM ledger_transactions WHERE booked_on >= $1 AND booked_on < $2"
_PREFETCH: Final = 5000
_OLDEST: Final = "SELECT min(booked_on) FROM ledger_transactions"
_EARLIER: Final = """
SELECT EXISTS (SELECT FROM ledger_transactions WHERE booked_on < $1)
    OR EXISTS (SELECT FROM ledger_postings WHERE booked_on < $1)
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """The first thing that is wrong: where, and what."""

    place: str
    detail: str


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a seal will say, worked out while others post: of use as long as it is the same period, with as many transactions
    (none is ever removed), after the same seal."""

    begins: date
    previous: bytes
    found: dict[str, Any]


async def seal(tx: Tx, ends_on: date, by: str, now: datetime) -> sa.Row[Any]:
    """Close everything before ``ends_on`` that is not closed yet, as one period; the seal.

    The period is summed up before posting is stopped, and again only if something was booked in it meanwhile. Raises
    ``ledger.period_open``: the period is not over, or has revenue that is not recognized; ``ledger.period_sealed``: it is
    closed already, or there is nothing to close.
    """
    if ends_on > now.astimezone(UTC).date():
        raise Problem("ledger.period_open", f"{ends_on} is not over")
    before = await _prepare(tx, ends_on)
    await ledger.stop_posting(tx)
    if waiting := await recognition.behind(tx, ends_on):
        raise Problem("ledger.period_open", f"{waiting} schedules have revenue to be recognized before {ends_on}")
    ready = before if before is not None and await _holds(tx, before, ends_on) else await _prepare(tx, ends_on)
    if ready is None:
        raise Problem("ledger.period_sealed", "there is nothing before that day that is not sealed")
    row = {
        "starts_on": ready.begins, "ends_on": ends_on, "transactions": ready.found["transactions"],
        "digest": bytes.fromhex(ready.found["digest"]), "totals": ready.found["totals"], "previous": ready.previous,
        "hash": store.link(ready.previous, ready.found), "sealed_by": by, "sealed_at": now,
    }  # fmt: skip
    return (await tx.execute(sa.insert(seals).values(**row).returning(seals))).one()


async def _begins(reader: Reader) -> tuple[date | None, Any]:
    """The first day that is not sealed (``None``: there is no transaction), and the last seal."""
    last = await newest(reader)
    return (last.ends_on if last is not None else await reader.raw.fetchval(_OLDEST)), last


async def _prepare(tx: Tx, ends_on: date) -> _Prepared | None:
    """``None``: there is nothing to close."""
    begins, last = await _begins(tx)
    if begins is None or begins >= ends_on:
        return None
    opening = _closing(last.totals) if last is not None else {}
    previous = bytes(last.hash) if last is not None else store.ZERO
    return _Prepared(begins, previous, await content(tx, begins, ends_on, opening))


async def _holds(tx: Tx, ready: _Prepared, ends_on: date) -> bool:
    begins, last = await _begins(tx)
    if begins != ready.begins or (last is not None and bytes(last.hash) != ready.previous):
        return False
    # Transactions first, postings after them: what was booked between the two was not counted.
    count: int = await tx.raw.fetchval(_COUNT, begins, ends_on)
    return count == int(ready.found["transactions"])


async def content(
    reader: Reader, starts_on: date, ends_on: date, opening: Mapping[tuple[str, str], int]
) -> dict[str, Any]:
    """What is hashed of a period, from the ledger as it is now; ``opening``: what accounts held before it, by account and
    currency. Memory does not grow with the period. ``reader`` is in a transaction."""
    count, digest = 0, hashlib.sha256()
    async for row in reader.raw.cursor(_HASHES, starts_on, ends_on, prefetch=_PREFETCH):
        count += 1
        digest.update(row["hash"])
    within = await balances.trial(reader, since=starts_on, until=ends_on)
    moved = {(each.account, each.currency): each.balance_minor for each in within}
    return {
        "starts_on": starts_on.isoformat(),
        "ends_on": ends_on.isoformat(),
        "transactions": count,
        "digest": digest.hexdigest(),
        "totals": [[*at, moved.get(at, 0), opening.get(at, 0) + moved.get(at, 0)] for at in sorted({*opening, *moved})],
    }


def _closing(totals: Sequence[Sequence[Any]]) -> dict[tuple[str, str], int]:
    """What accounts held at the end of a sealed period."""
    return {(account, currency): closing for account, currency, _, closing in totals}


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


async def verify_seals(reader: Reader, kept: Sequence[str] = ()) -> Fault | None:
    """Work every seal out again from the ledger; the first that is not what was sealed, or ``None``.

    ``kept``: hashes of seals (hex) that were noted where the platform cannot write; each must be one of them. ``reader`` has a
    snapshot. Each period is read once, whatever the number of seals.
    """
    previous, follows = store.ZERO, None
    opening: dict[tuple[str, str], int] = {}
    rows = await every(reader)
    for row in rows:
        place = f"seal of {row.ends_on}"
        if bytes(row.previous) != previous or (follows is not None and row.starts_on != follows):
            return Fault(place, "does not follow the seal before it")
        stored = {
            "starts_on": row.starts_on.isoformat(), "ends_on": row.ends_on.isoformat(), "transactions": row.transactions,
            "digest": row.digest.hex(), "totals": row.totals,
        }  # fmt: skip
        if store.link(previous, stored) != bytes(row.hash):
            return Fault(place, "the seal itself was changed")
        found = await content(reader, row.starts_on, row.ends_on, opening)
        if found != stored:
            return Fault(place, _difference(stored, found))
        previous, follows, opening = bytes(row.hash), row.ends_on, _closing(row.totals)
    if rows and await reader.raw.fetchval(_EARLIER, rows[0].starts_on):
        return Fault(
            f"seal of {rows[0].ends_on}", f"something is booked before {rows[0].starts_on}, where the books begin"
        )
    known = {row.hash.hex() for row in rows}
    if lost := next((each for each in kept if each.lower() not in known), None):
        return Fault(f"seal {lost}", "was kept outside, and is none of the seals here")
    return None


def _difference(stored: dict[str, Any], found: dict[str, Any]) -> str:
    if stored["transactions"] != found["transactions"]:
        return f"{stored['transactions']} transactions were sealed, {found['transactions']} are there"
    if stored["digest"] != found["digest"]:
        return "a transaction is not the one that was sealed"
    return "postings are not those that were sealed"
