"""The edge change table: versions become visible in order, whoever commits first."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from portico.control import changes
from portico.kit.db import Database, PoolLimits


def change(name: str) -> dict[str, Any]:
    return changes.tunnel_removed(name, "tunnel.deleted")


def names(entries: list[changes.Entry] | None) -> list[str]:
    assert entries is not None
    return [row["id"] for entry in entries for row in json.loads(entry.changes)]


async def newest(db: Database) -> int:
    async with db.read() as reader:
        return await changes.newest(reader)


async def after(db: Database, version: int, limit: int = 1000) -> list[changes.Entry] | None:
    async with db.read() as reader:
        return await changes.after(reader, version, limit)


class Follower:
    """Reads as the hub does: by version, again and again, never going back."""

    def __init__(self, db: Database, start: int) -> None:
        self.db, self.position, self.seen = db, start, list[str]()

    async def look(self) -> None:
        entries = await after(self.db, self.position)
        self.seen += names(entries)
        if entries:
            self.position = entries[-1].version


class TestOrder:
    async def test_a_writer_that_began_first_and_commits_last_is_not_skipped(self, db: Database) -> None:
        follower = Follower(db, await newest(db))
        async with db.transaction() as early:
            changes.append(early, change("early"))
            async with db.transaction() as late:
                changes.append(late, change("late"))
            await follower.look()
            assert follower.seen == ["late"]
        await follower.look()
        assert follower.seen == ["late", "early"]

    async def test_a_writer_that_has_its_number_holds_up_the_next(self, db: Database) -> None:
        """The other order: the first has drawn its version and not committed; the second must not become visible before."""
        follower = Follower(db, await newest(db))
        drawn, go_on = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            drawn.set()
            await go_on.wait()

        async def first() -> None:
            async with db.transaction() as tx:
                changes.append(tx, change("first"))
                tx.before_commit(hold)  # after the append's own step: the number is drawn

        async def second() -> None:
            async with db.transaction() as tx:
                changes.append(tx, change("second"))

        one = asyncio.create_task(first())
        await drawn.wait()
        two = asyncio.create_task(second())
        await asyncio.sleep(0.2)
        await follower.look()
        assert not two.done() and follower.seen == []
        go_on.set()
        await asyncio.gather(one, two)
        await follower.look()
        assert follower.seen == ["first", "second"]

    async def test_two_hundred_writers_and_a_reader_that_never_looks_back(self, database_url: str) -> None:
        db = Database(database_url, PoolLimits(size=20))
        try:
            follower = Follower(db, await newest(db))
            done = asyncio.Event()

            async def write(number: int) -> None:
                async with db.transaction() as tx:
                    changes.append(tx, change(f"w{number}"))
                    await asyncio.sleep(0.002 * (number % 7))

            async def read() -> None:
                while not done.is_set():
                    await follower.look()
                await follower.look()

            reading = asyncio.create_task(read())
            await asyncio.gather(*(write(n) for n in range(200)))
            done.set()
            await reading
            assert sorted(follower.seen) == sorted(f"w{n}" for n in range(200))
        finally:
            await db.close()


class TestAppend:
    async def test_one_transaction_is_one_row_in_its_order(self, db: Database) -> None:
        start = await newest(db)
        async with db.transaction() as tx:
            changes.append(tx, change("a"), change("b"))
            changes.append(tx, change("c"))
        entries = await after(db, start)
        assert entries is not None and len(entries) == 1 and names(entries) == ["a", "b", "c"]

    async def test_many_changes_are_rows_of_bounded_size_in_order(self, db: Database) -> None:
        start = await newest(db)
        async with db.transaction() as tx:
            changes.append(tx, *(change(f"n{n}") for n in range(1200)))
        entries = await after(db, start)
        assert entries is not None and [len(json.loads(e.changes)) for e in entries] == [500, 500, 200]
        assert names(entries) == [f"n{n}" for n in range(1200)]

    async def test_a_rollback_tells_nobody(self, db: Database) -> None:
        start = await newest(db)
        with pytest.raises(RuntimeError):
            async with db.transaction() as tx:
                changes.append(tx, change("never"))
                raise RuntimeError
        assert await newest(db) == start

    async def test_nothing_appended_writes_nothing(self, db: Database) -> None:
        start = await newest(db)
        async with db.transaction() as tx:
            changes.append(tx)
        assert await newest(db) == start

    async def test_readers_are_woken(self, db: Database) -> None:
        woken = asyncio.Event()
        listener = await db.connect("test", timeout_seconds=5)
        try:
            await listener.add_listener(changes.CHANNEL, lambda *_: woken.set())
            async with db.transaction() as tx:
                changes.append(tx, change("wake"))
            await asyncio.wait_for(woken.wait(), 30)
        finally:
            await listener.close()


class TestAfterAndTrim:
    @pytest.fixture
    async def versions(self, db: Database) -> list[int]:
        """Ten rows; their versions."""
        found = []
        for n in range(10):
            async with db.transaction() as tx:
                changes.append(tx, change(f"t{n}"))
            found.append(await newest(db))
        return found

    async def test_limit(self, db: Database, versions: list[int]) -> None:
        assert names(await after(db, versions[0], 3)) == ["t1", "t2", "t3"]
        assert await after(db, versions[-1]) == []

    async def test_unknown_versions(self, db: Database, versions: list[int]) -> None:
        assert await after(db, versions[-1] + 1) is None
        assert await after(db, 2**53) is None

    async def test_trimmed_by_number(self, db: Database, versions: list[int]) -> None:
        async with db.transaction() as tx:
            assert await changes.trim(tx, keep_seconds=3600, keep_rows=4) > 0
        assert await after(db, versions[5]) is None
        assert names(await after(db, versions[6])) == ["t7", "t8", "t9"]

    async def test_trimmed_by_age_but_never_the_newest(self, db: Database, versions: list[int]) -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("UPDATE edge_changes SET created_at = now() - interval '2 days'")
            await changes.trim(tx, keep_seconds=86_400, keep_rows=1_000_000)
        assert await newest(db) == versions[-1]
        assert await after(db, versions[-1]) == []
        assert await after(db, versions[-2]) is None


async def test_a_gap_left_by_a_failed_append_is_no_gap_to_a_reader(db: Database) -> None:
    start = await newest(db)

    async def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        async with db.transaction() as tx:
            changes.append(tx, change("lost"))
            tx.before_commit(fail)
    async with db.transaction() as tx:
        changes.append(tx, change("kept"))
    entries = await after(db, start)
    assert names(entries) == ["kept"] and entries is not None and entries[0].version > start + 1
