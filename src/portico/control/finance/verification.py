"""Proof that the books are what was written.

Every event and transaction is hashed again, from the first to the end of its chain; beside that, what no hash covers: that no
row is outside of the chains, that postings count for the day and the organization of their transaction, that the database still
guards its tables, and that every seal says what the ledger says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from portico.control.finance import events, guards, ledger, seals, store
from portico.control.finance.accounts import CHART
from portico.control.finance.seals import Fault
from portico.control.finance.store import transactions
from portico.kit.db import Database, Reader

_T = transactions.c
_BATCH: Final = 500

# What somebody who can write around the triggers could leave beside the chains.
_STRAY: Final = """
SELECT p.transaction_id, t.id IS NULL AS orphan FROM ledger_postings p LEFT JOIN ledger_transactions t ON t.id = p.transaction_id
WHERE t.id IS NULL OR p.booked_on <> t.booked_on OR p.organization_id IS DISTINCT FROM t.organization_id LIMIT 1
"""


@dataclass(slots=True)
class Walk:
    """A walk along one chain: the row that was found right last, and the first fault."""

    chain: str
    log: str
    seq: int = 0
    hash: bytes = store.ZERO
    fault: Fault | None = None
    number: int = 0  # over all chains, of the last transaction

    def step(self, seq: int, hash_: bytes, content: dict[str, Any]) -> bool:
        """Whether the next row is the one that was written."""
        place = f"{self.chain}/{self.log} {self.seq + 1}"
        if seq != self.seq + 1:
            self.fault = Fault(place, f"is missing, {seq} follows")
        elif store.link(self.hash, content) != bytes(hash_):
            self.fault = Fault(place, "is not what was written, or does not follow the row before it")
        else:
            self.seq, self.hash = seq, bytes(hash_)
        return self.fault is None

    def end(self, head: store.Head | None) -> None:
        """The chain must end where its head says."""
        if self.fault is not None:
            return
        seq, hash_ = (0, store.ZERO) if head is None else (head.seq, head.hash)
        if (seq, hash_) != (self.seq, self.hash):
            self.fault = Fault(f"{self.chain}/{self.log}", f"ends at {self.seq}, its head says {seq}")


async def verify(reader: Reader, chain: str, log: str) -> Walk:
    """Walk one chain to its end or its first fault. ``reader`` has a snapshot, else a writer in between is a fault."""
    return (await stretch(reader, chain, log, 1, 2**62))[0]


async def verify_all(reader: Reader) -> Fault | None:
    """Every chain of both logs; the first fault."""
    for log in (store.EVENTS, store.LEDGER):
        for chain in await store.chain_names(reader, log):
            if (fault := (await verify(reader, chain, log)).fault) is not None:
                return fault
    return None


@dataclass(slots=True)
class Outcome:
    """What a look at all of the books found: how many of each, and the first fault."""

    chains: int = 0
    events: int = 0
    transactions: int = 0
    seals: int = 0
    newest_seal: dict[str, str] | None = None
    fault: Fault | None = None


async def everything(db: Database, organization: str | None = None, kept: Sequence[str] = ()) -> Outcome:
    """All of the books, or the chains of one organization: chains, then what is outside of them, then the seals.

    Each chain is read in a snapshot of its own and some rows at a time, so that neither memory nor the age of a snapshot grows
    with the books. ``kept``: hashes of seals that were noted elsewhere, see ``seals.verify_seals``.
    """
    found = Outcome()
    for log in (store.EVENTS, store.LEDGER):
        async with db.read() as reader:
            names = await store.chain_names(reader, log) if organization is None else [organization]
        for chain in names:
            async with db.read(snapshot=True) as reader:
                walk = await verify(reader, chain, log)
            found.chains += walk.seq > 0
            if log == store.EVENTS:
                found.events += walk.seq
            else:
                found.transactions += walk.seq
            if walk.fault is not None:
                found.fault = walk.fault
                return found
    if organization is None:
        async with db.read(snapshot=True) as reader:
            await take_your_time(reader)
            found.fault = await stray(reader)
            if found.fault is None and (guard := await guards.fault(reader)) is not None:
                found.fault = Fault(*guard)
        if found.fault is None:
            await _seals(db, found, kept)
    return found


async def _seals(db: Database, found: Outcome, kept: Sequence[str]) -> None:
    async with db.read(snapshot=True) as reader:
        await take_your_time(reader)
        rows = await seals.every(reader)
        found.fault = await seals.verify_seals(reader, kept)
    found.seals = len(rows)
    if rows:
        found.newest_seal = {"ends_on": rows[-1].ends_on.isoformat(), "hash": rows[-1].hash.hex()}


async def take_your_time(reader: Reader) -> None:
    """Statements over whole tables: the limit of requests is not for them."""
    await reader.raw.execute("SET LOCAL statement_timeout = 0")


async def stray(reader: Reader) -> Fault | None:
    """A posting without its transaction, or one that counts for another day or organization than it."""
    row = await reader.raw.fetchrow(_STRAY)
    if row is None:
        return None
    what = "has no transaction" if row["orphan"] else "counts for another day or organization than its transaction"
    return Fault(f"posting of {row['transaction_id']}", what)


async def _events(reader: Reader, walk: Walk) -> bool:
    """One batch; whether to go on."""
    rows = await store.events_stretch(reader, walk.chain, walk.seq + 1, _BATCH)
    for row in rows:
        if not walk.step(row.seq, row.hash, events.content(row._asdict())):
            return False
    return len(rows) == _BATCH


async def _transactions(reader: Reader, walk: Walk) -> bool:
    query = sa.select(transactions).where(_T.chain == walk.chain, _T.seq > walk.seq).order_by(_T.seq).limit(_BATCH)
    rows: Sequence[sa.Row[Any]] = await reader.fetch_all(query)
    posted = await ledger.postings_of(reader, [row.id for row in rows])
    for row in rows:
        parts = [{name: getattr(each, name) for name in ledger.POSTED} for each in posted[row.id]]
        if not walk.step(row.seq, row.hash, ledger.content(row._asdict(), parts)):
            return False
        if (fault := _unsound(walk, row, posted[row.id])) is not None:
            walk.fault = fault
            return False
        walk.number = row.number
    return len(rows) == _BATCH


def _unsound(walk: Walk, row: Any, posted: Sequence[ledger.Posting]) -> Fault | None:
    """What is wrong with a transaction whose hash is right: whoever hashes all anew can write that."""
    place = f"{walk.chain}/{walk.log} {row.seq}"
    if off := {currency: total for currency, total in ledger.sums(posted).items() if total}:
        return Fault(place, f"does not sum to zero: {off}")
    if unknown := {part.account for part in posted} - CHART.keys():
        return Fault(place, f"posts to {', '.join(sorted(unknown))}, which no chart has")
    if row.number <= walk.number:
        return Fault(place, f"has number {row.number}, behind {walk.number} of the one before it")
    if row.chain != (row.organization_id or events.PLATFORM):
        return Fault(place, f"is of {row.organization_id}")
    return None


async def stretch(reader: Reader, chain: str, log: str, first: int, limit: int) -> tuple[Walk, bool]:
    """Walk at least ``limit`` rows of a chain from number ``first`` on, and whether that reached its end (or a fault).

    The row before ``first`` is taken as right: who goes from stretch to stretch has checked it the time before.
    """
    walk = Walk(chain, log)
    if first > 1:
        found = await store.hash_of(reader, chain, log, first - 1)
        if found is None:
            walk.fault = Fault(f"{chain}/{log} {first - 1}", "is missing")
            return walk, True
        walk.seq, walk.hash = first - 1, found
    step = _events if log == store.EVENTS else _transactions
    while await step(reader, walk):
        if walk.seq >= first + limit - 1:
            return walk, False
    walk.end(await store.head(reader, chain, log))
    return walk, True
