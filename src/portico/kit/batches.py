"""Deletes of what may be many rows: some at a time, each time in a transaction of its own.

One statement over a million rows holds its locks for minutes, and a process that ends in the middle has done nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import sqlalchemy as sa

from portico.kit.db import Database, Tx

#: Rows that one transaction deletes.
ROWS: Final = 1000


async def until_done(db: Database, step: Callable[[Tx], Awaitable[int]], rows: int = ROWS) -> int:
    """Run ``step``, which deals with up to ``rows`` rows and says how many, until it finds fewer; returns their sum."""
    total = 0
    while True:
        async with db.transaction() as tx:
            count = await step(tx)
        total += count
        if count < rows:
            return total


def some(table: sa.Table, where: sa.ColumnElement[bool], rows: int = ROWS) -> sa.Delete:
    """Delete up to ``rows`` rows of ``table`` that nobody else holds."""
    place: sa.ColumnElement[Any] = sa.literal_column(f"{table.name}.ctid")
    found = sa.select(place).select_from(table).where(where).limit(rows).with_for_update(skip_locked=True)
    return sa.delete(table).where(place == sa.any_(sa.func.array(found.scalar_subquery())))


async def delete_in_batches(db: Database, table: sa.Table, where: sa.ColumnElement[bool], rows: int = ROWS) -> int:
    """Delete the rows of ``table`` that fit ``where``; returns how many."""

    async def step(tx: Tx) -> int:
        return int((await tx.execute(some(table, where, rows))).rowcount)

    return await until_done(db, step, rows)
