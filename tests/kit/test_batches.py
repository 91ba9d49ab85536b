"""Deletes in batches: all of it, a little at a time, around what others hold."""

from __future__ import annotations

import sqlalchemy as sa

from portico.kit import queue
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database

MINE = queue.jobs.c.kind == "test.batches"


async def _fill(db: Database, count: int) -> None:
    async with db.transaction() as tx:
        await tx.execute(sa.delete(queue.jobs).where(MINE))
        await tx.execute(sa.insert(queue.jobs), [{"kind": "test.batches", "key": str(i)} for i in range(count)])


async def _left(db: Database) -> list[str]:
    async with db.read() as reader:
        rows = await reader.fetch_all(sa.select(queue.jobs.c.key).where(MINE).order_by(queue.jobs.c.key))
    return [row.key for row in rows]


async def test_everything_goes_some_at_a_time(db: Database) -> None:
    await _fill(db, 7)
    begun = 0
    real = db.transaction

    def counted() -> object:
        nonlocal begun
        begun += 1
        return real()

    db.transaction = counted  # type: ignore[assignment,method-assign]
    try:
        assert await delete_in_batches(db, queue.jobs, MINE, 3) == 7
    finally:
        del db.transaction  # type: ignore[method-assign]
    assert begun == 3  # three, three and one
    assert await _left(db) == []


async def test_rows_that_somebody_holds_are_left_for_the_next_time(db: Database) -> None:
    await _fill(db, 4)
    async with db.transaction() as tx:
        held = sa.select(queue.jobs.c.id).where(MINE, queue.jobs.c.key == "2").with_for_update()
        await tx.fetch_one(held)
        assert await delete_in_batches(db, queue.jobs, MINE) == 3
    assert await _left(db) == ["2"]
    assert await delete_in_batches(db, queue.jobs, MINE) == 1
