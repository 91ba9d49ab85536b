"""Delete many rows, some at a time.

One statement over a table of millions holds locks and a snapshot for minutes, fills the log of changes at once, and is in vain
when the statement's time is over. So each transaction deletes a bounded number, and what others hold at the moment stays for the
next round.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from portico.kit.db import Database

#: Rows of one transaction.
BATCH_ROWS: Final = 1000


async def sweep(db: Database, table: sa.Table, where: sa.ColumnElement[bool], batch: int = BATCH_ROWS) -> int:
    """Delete the rows of ``table`` that fit ``where``; returns how many."""
    total = 0
    row: sa.ColumnElement[object] = sa.literal_column(f"{table.name}.ctid")
    some = sa.select(row).select_from(table).where(where).limit(batch).with_for_update(skip_locked=True)
    statement = sa.delete(table).where(row == sa.func.any(sa.func.array(some.scalar_subquery())))
    while True:
        async with db.transaction() as tx:
            count = int((await tx.execute(statement)).rowcount)
        total += count
        if count < batch:
            return total
