"""Proof that chains are what was written: every event and transaction is hashed again, from the first to the end of its chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from portico.control.finance import events, ledger, store
from portico.control.finance.seals import Fault
from portico.control.finance.store import transactions
from portico.kit.db import Reader

_T = transactions.c
_BATCH: Final = 500


@dataclass(slots=True)
class Walk:
    """A walk along one chain: the row that was found right last, and the first fault."""

    chain: str
    log: str
    seq: int = 0
    hash: bytes = store.ZERO
    fault: Fault | None = None

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
    return len(rows) == _BATCH


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
