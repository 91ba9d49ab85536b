"""Work on many rows: what comes at once shares a transaction, and what is deleted goes some at a time.

    intake = Together(store)                    # store(items) → for each its answer, or an error
    answer = await intake.put(item, group=256, backlog=4096)

A commit waits for the disk, whatever is in it. So while one group commits the next one gathers (group insert), and an answer
means that the commit has happened.

One DELETE over a million rows holds its locks for minutes, and a process that ends in the middle has done nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import asyncpg
import sqlalchemy as sa
from sqlalchemy import exc as sa_exc

from portico.errors import Problem
from portico.kit.db import Database, Tx

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

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


# -- what comes at once --------------------------------------------------------------------------------------------------

#: A row that PostgreSQL does not take, and a group that met another in the wrong order: each item alone fares better.
_UNFIT: Final = (asyncpg.DataError, sa_exc.DataError)
_ALONE: Final = (*_UNFIT, asyncpg.DeadlockDetectedError)


@dataclass(slots=True)
class _Asked(Generic[T, R]):
    item: T
    answer: asyncio.Future[R]


class Together(Generic[T, R]):
    """Stores items in groups, by ``store``: one transaction for each call of it, committed when it returns."""

    def __init__(self, store: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]]) -> None:
        self._store = store
        self._waiting: list[_Asked[T, R]] = []
        self._worker: asyncio.Task[None] | None = None
        self._group = 1
        #: Calls of ``store`` so far.
        self.groups = 0

    async def put(self, item: T, *, group: int, backlog: int) -> R:
        """What came of ``item``, after its commit. ``group``: items of one transaction at most; ``backlog``: that may wait.

        Raises what ``store`` gave for it, ``request.invalid`` for what cannot be stored, and ``service.unavailable``.
        """
        if len(self._waiting) >= backlog:
            raise Problem("service.unavailable", "too many events at once", headers={"Retry-After": "1"})
        self._group = group
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Asked(item, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._store_all())
        return await answer

    async def close(self) -> None:
        """Let what is on its way end."""
        if self._worker is not None:
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _store_all(self) -> None:
        """Until nothing waits. What comes during a commit is the next group."""
        while self._waiting:
            group = self._waiting[: self._group]
            del self._waiting[: len(group)]
            try:
                await self._store_group(group)
            except _ALONE as err:
                log.warning("a group cannot be stored", extra={"f": {"error": str(err)[:200]}})
                await self._one_by_one(group)
            except BaseException as err:
                _fail(group, err)
                if not isinstance(err, Exception):
                    raise

    async def _one_by_one(self, group: Sequence[_Asked[T, R]]) -> None:
        """One that PostgreSQL does not take must not take the others with it."""
        for each in group:
            try:
                await self._store_group([each])
            except Exception as err:
                unfit = isinstance(err, _UNFIT)
                _fail([each], Problem("request.invalid", "the event cannot be stored") if unfit else err)

    async def _store_group(self, group: Sequence[_Asked[T, R]]) -> None:
        self.groups += 1
        answers = await self._store([each.item for each in group])
        for each, answer in zip(group, answers, strict=True):
            if each.answer.done():
                continue  # who asked has left
            if isinstance(answer, Exception):
                each.answer.set_exception(answer)
            else:
                each.answer.set_result(answer)


def _fail(group: Sequence[_Asked[Any, Any]], err: BaseException) -> None:
    shown = err if isinstance(err, Exception) else Problem("service.unavailable")
    for each in group:
        if not each.answer.done():
            each.answer.set_exception(shown)
