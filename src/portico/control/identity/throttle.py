"""Counting windows for attempts: sign-in, registration, device codes.

An attempt is counted *before* it is carried out, so that a thousand parallel guesses cannot all pass a check that none
of them has failed yet; a success takes its count back. An attempt that is refused here counts nowhere: else one address,
long past its own limit, could go on to fill an account's and keep its owner out. Buckets live in PostgreSQL: they hold
across API processes and restarts, and are stored as digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from portico.control.identity.tables import throttles as t
from portico.errors import Problem
from portico.kit import columns
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, Tx


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is counted, and how many times it may happen in one window."""

    name: str
    limit: int
    window_seconds: int

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.name.encode("utf-8", "replace")).digest()


async def count(db: Database, buckets: Sequence[Bucket]) -> None:
    """Count one attempt in every bucket; raises ``auth.throttled``, and counts in none, when one of them is full."""
    async with db.transaction() as tx:
        await count_within(tx, buckets)


async def count_within(tx: Tx, buckets: Sequence[Bucket]) -> None:
    """The same in a transaction that is open: what it is counted for happens with the count, or neither does."""
    if buckets:
        # In order of digest, so that two attempts that share buckets cannot deadlock.
        full = [wait for b in sorted(buckets, key=lambda b: b.digest) if (wait := await _count(tx, b)) is not None]
        if full:  # rolls back
            wait = max(1, max(full))
            detail = f"too many attempts; wait {wait} seconds"
            raise Problem("auth.throttled", detail, headers={"Retry-After": str(wait)})


async def _count(tx: Tx, bucket: Bucket) -> int | None:
    """Seconds to wait when the bucket is over its limit, else ``None``."""
    now = sa.func.now()
    ends = now + columns.seconds(bucket.window_seconds)
    over = t.c.window_ends_at < now
    statement = insert(t).values(bucket=bucket.digest, count=1, window_ends_at=ends)
    statement = statement.on_conflict_do_update(
        index_elements=["bucket"],
        set_={
            "count": sa.case((over, 1), else_=t.c.count + 1),
            "window_ends_at": sa.case((over, ends), else_=t.c.window_ends_at),
        },
    )
    left = sa.func.ceil(sa.extract("epoch", t.c.window_ends_at - now))
    row: Any = await tx.fetch_one(statement.returning(t.c.count, left.label("left")))
    return int(row.left) if row.count > bucket.limit else None


async def forgive(tx: Tx, buckets: Iterable[Bucket]) -> None:
    """Take back one count of each bucket: the attempt succeeded."""
    for bucket in sorted(buckets, key=lambda b: b.digest):
        await tx.execute(sa.update(t).where(t.c.bucket == bucket.digest, t.c.count > 0).values(count=t.c.count - 1))


async def expire(db: Database, now: datetime) -> None:
    """Delete windows that have ended."""
    await delete_in_batches(db, t, t.c.window_ends_at < now)
