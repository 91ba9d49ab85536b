"""Deletes in batches: all of it, a little at a time, around what others hold."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import asyncpg
import pytest
import sqlalchemy as sa

from portico.errors import Problem
from portico.kit import queue
from portico.kit.batches import Together, delete_in_batches
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


# -- what comes at once


class Shelf:
    """Stores texts: `bad` cannot be stored, `no` is refused, `gone` loses the database."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.gate = asyncio.Event()

    async def store(self, items: Sequence[str]) -> list[str | Exception]:
        self.groups.append(list(items))
        await self.gate.wait()
        if "bad" in items:
            raise asyncpg.DataError("out of range")
        if "gone" in items:
            raise Problem("service.unavailable")
        return [Problem("request.conflict") if item == "no" else item.upper() for item in items]


async def put(together: Together[str, str], *items: str, group: int = 3) -> list[str]:
    """What each was answered: its text, or a code."""
    answers = await asyncio.gather(
        *(together.put(item, group=group, backlog=100) for item in items), return_exceptions=True
    )
    return [answer.code if isinstance(answer, Problem) else str(answer) for answer in answers]


async def test_what_comes_during_a_commit_is_the_next_group() -> None:
    shelf = Shelf()
    together = Together(shelf.store)
    first = asyncio.create_task(put(together, "a"))
    await asyncio.sleep(0)
    rest = asyncio.create_task(put(together, "b", "no", "c", "d"))
    while not shelf.groups:
        await asyncio.sleep(0)
    assert not first.done(), "nobody is answered before the commit"
    shelf.gate.set()
    assert (await first, await rest) == (["A"], ["B", "request.conflict", "C", "D"])
    assert [len(group) for group in shelf.groups] == [1, 3, 1] or [len(group) for group in shelf.groups] == [3, 2]
    assert together.groups == len(shelf.groups)
    await together.close()


async def test_one_that_cannot_be_stored_takes_no_other_with_it() -> None:
    shelf = Shelf()
    shelf.gate.set()
    together = Together(shelf.store)
    assert await put(together, "a", "bad", "c") == ["A", "request.invalid", "C"]
    assert shelf.groups == [["a", "bad", "c"], ["a"], ["bad"], ["c"]]
    assert await put(together, "a", "gone", "c") == ["service.unavailable"] * 3, "nobody knows"
    assert await put(together, "a") == ["A"]


async def test_who_leaves_is_not_waited_for() -> None:
    shelf = Shelf()
    together = Together(shelf.store)
    tasks = [asyncio.create_task(together.put(item, group=3, backlog=2)) for item in ("a", "b")]
    await asyncio.sleep(0)
    with pytest.raises(Problem, match=r"at once"):
        await together.put("c", group=3, backlog=2)
    tasks[0].cancel()
    shelf.gate.set()
    assert await tasks[1] == "B"
    await together.close()
