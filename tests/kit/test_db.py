"""The transaction helper: all or nothing, on a connection that is alive."""

from __future__ import annotations

import asyncio
import ssl
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from portico.embedded.postgres import EmbeddedPostgres
from portico.errors import Problem
from portico.kit.db import Database, PoolLimits, async_url, dsn, is_unique_violation

things = sa.Table("things", sa.MetaData(), sa.Column("id", sa.Text, primary_key=True), sa.Column("n", sa.Integer))


@pytest.fixture
async def base(empty_database_url: str) -> AsyncIterator[Database]:
    limits = PoolLimits(size=4, acquire_timeout_seconds=0.3, statement_timeout_seconds=2, lock_timeout_seconds=0.3)
    db = Database(empty_database_url, limits)
    async with db.transaction() as tx:
        await tx.execute(
            sa.text("CREATE TABLE IF NOT EXISTS things (id text CONSTRAINT things_pkey PRIMARY KEY, n int)")
        )
        await tx.execute(sa.text("DELETE FROM things"))
    yield db
    await db.close()


def _row() -> dict[str, Any]:
    return {"id": str(uuid.uuid4()), "n": 1}


async def _count(db: Database) -> int:
    async with db.read() as reader:
        return int(await reader.scalar(sa.select(sa.func.count()).select_from(things)))


async def _kill_backends(db: Database) -> None:
    """End every other connection to this database, as a restart would."""
    connection = await asyncpg.connect(db.url)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await connection.close()


class TestTransaction:
    async def test_commits_at_the_end(self, base: Database) -> None:
        async with base.transaction() as tx:
            await tx.execute(sa.insert(things).values(**_row()))
            assert await _count(base) == 0
        assert await _count(base) == 1

    async def test_an_error_does_not_tell_the_values(self, base: Database) -> None:
        """Its text goes to logs; the values may be a digest, or an address."""
        with pytest.raises(sa.exc.DBAPIError) as found:
            async with base.transaction() as tx:
                await tx.execute(sa.text("SELECT CAST(:value AS integer) / 0"), {"value": 4_711_4711})
        assert "47114711" not in str(found.value)

    async def test_any_error_rolls_back(self, base: Database) -> None:
        with pytest.raises(ZeroDivisionError):
            async with base.transaction() as tx:
                await tx.execute(sa.insert(things).values(**_row()))
                raise ZeroDivisionError
        assert await _count(base) == 0

    async def test_cancellation_rolls_back_and_returns_the_connection(self, base: Database) -> None:
        inside = asyncio.Event()

        async def hold() -> None:
            async with base.transaction() as tx:
                await tx.execute(sa.insert(things).values(**_row()))
                inside.set()
                await asyncio.sleep(60)

        tasks = [asyncio.create_task(hold()) for _ in range(4)]
        await inside.wait()
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await _count(base) == 0
        async with base.transaction(), base.transaction(), base.transaction(), base.transaction():
            pass  # all four connections are back

    async def test_after_commit_runs_once_durable_and_never_on_rollback(self, base: Database) -> None:
        seen: list[int] = []

        async def look() -> None:
            seen.append(await _count(base))

        async with base.transaction() as tx:
            await tx.execute(sa.insert(things).values(**_row()))
            tx.after_commit(look)
            tx.after_commit(lambda: seen.append(-1))
            assert seen == []
        assert seen == [1, -1]
        with pytest.raises(KeyError):
            async with base.transaction() as tx:
                tx.after_commit(look)
                raise KeyError
        assert len(seen) == 2

    async def test_a_failing_callback_does_not_undo_the_commit(self, base: Database) -> None:
        async with base.transaction() as tx:
            await tx.execute(sa.insert(things).values(**_row()))
            tx.after_commit(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
        assert await _count(base) == 1

    async def test_raw_statements_join_the_transaction(self, base: Database) -> None:
        """Pins SQLAlchemy's private start of a transaction: raw asyncpg first, before any Core statement."""
        with pytest.raises(KeyError):
            async with base.transaction() as tx:
                assert tx.raw.is_in_transaction()
                await tx.raw.execute("INSERT INTO things VALUES ('raw', 1)")
                await tx.execute(sa.insert(things).values(**_row()))
                raise KeyError
        assert await _count(base) == 0

    async def test_savepoint_fails_alone(self, base: Database) -> None:
        async with base.transaction() as tx:
            await tx.execute(sa.insert(things).values(id="one", n=1))
            with pytest.raises(sa.exc.IntegrityError) as err:
                async with tx.savepoint():
                    await tx.execute(sa.insert(things).values(id="one", n=2))
            assert is_unique_violation(err.value, "things_pkey")
            assert not is_unique_violation(err.value, "other_key")
            await tx.execute(sa.insert(things).values(id="two", n=2))
        assert await _count(base) == 2

    async def test_limits_reach_the_server(self, base: Database) -> None:
        async with base.read() as reader:
            assert await reader.scalar(sa.text("SHOW statement_timeout")) == "2s"
            assert await reader.scalar(sa.text("SHOW lock_timeout")) == "300ms"
            assert await reader.scalar(sa.text("SHOW idle_in_transaction_session_timeout")) == "30s"

    async def test_isolation_and_read_only(self, base: Database) -> None:
        async with base.transaction(isolation="REPEATABLE READ", read_only=True) as tx:
            assert await tx.scalar(sa.text("SHOW transaction_isolation")) == "repeatable read"
            assert await tx.scalar(sa.text("SHOW transaction_read_only")) == "on"
        async with base.transaction() as tx:  # the pooled connection is as before
            assert await tx.scalar(sa.text("SHOW transaction_isolation")) == "read committed"
            assert await tx.scalar(sa.text("SHOW transaction_read_only")) == "off"


class TestRead:
    async def test_refuses_to_write(self, base: Database) -> None:
        async with base.read() as reader:
            with pytest.raises(TypeError, match="does not write"):
                await reader.fetch_all(sa.insert(things).values(**_row()).returning(things.c.id))

    async def test_snapshot_sees_one_moment(self, base: Database) -> None:
        async with base.read(snapshot=True) as reader:
            query = sa.select(sa.func.count()).select_from(things)
            assert await reader.scalar(query) == 0
            async with base.transaction() as tx:
                await tx.execute(sa.insert(things).values(**_row()))
            assert await reader.scalar(query) == 0
        assert await _count(base) == 1


class TestLostConnections:
    async def test_dead_pooled_connections_are_replaced_before_the_first_statement(self, base: Database) -> None:
        async with base.transaction(), base.transaction(), base.read():
            pass
        await _kill_backends(base)
        async with base.transaction() as tx:
            await tx.execute(sa.insert(things).values(**_row()))
        async with base.transaction(), base.transaction(), base.read() as reader:
            assert await reader.scalar(sa.text("SELECT 1")) == 1
        assert await _count(base) == 1

    async def test_a_connection_lost_inside_is_an_error_and_nothing_is_written(self, base: Database) -> None:
        with pytest.raises((sa.exc.DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError, Problem)):
            async with base.transaction() as tx:
                await tx.execute(sa.insert(things).values(**_row()))
                await _kill_backends(base)
                await tx.execute(sa.insert(things).values(**_row()))
        assert await _count(base) == 0

    @pytest.mark.parametrize("when", ["before the first statement", "inside"])
    async def test_an_announced_end_is_a_lost_connection(self, base: Database, when: str) -> None:
        """Between the server's last words and the end of the socket asyncpg says only that it is out of step."""
        last_words = b"SFATAL\0C57P02\0Mcrash of another process\0\0"
        message = b"E" + (len(last_words) + 4).to_bytes(4, "big") + last_words
        async with base.read() as reader:
            broken = reader.raw
        if when == "inside":
            for opened in (base.read, base.transaction):
                with pytest.raises(Problem) as lost:
                    async with opened() as tx:
                        tx.raw._protocol.data_received(message)
                        await tx.raw.fetchval("SELECT 1")
                assert lost.value.code == "service.unavailable"
        else:
            broken._protocol.data_received(message)
        async with base.transaction() as tx:
            assert await tx.raw.fetchval("SELECT 1") == 1
            assert tx.raw is not broken

    async def test_a_restart_of_the_server_is_survived(self, server_home: Path) -> None:
        server = EmbeddedPostgres(server_home / "restarting", durable=False)
        server.start()
        db = Database(server.uri, PoolLimits(size=2))
        try:
            await db.ping()
            server.stop()
            with pytest.raises(Problem) as refused:
                await db.ping()
            assert refused.value.code == "service.unavailable"
            server.start()
            await db.ping()
            async with db.transaction() as tx:
                assert await tx.scalar(sa.text("SELECT 1")) == 1
        finally:
            await db.close()
            server.stop()

    async def test_a_full_pool_is_unavailable_not_a_hang(self, base: Database) -> None:
        async with base.transaction(), base.transaction(), base.transaction(), base.transaction():
            with pytest.raises(Problem) as refused:
                async with base.transaction():
                    pass
        assert refused.value.code == "service.unavailable"


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "host"),
        [
            ("postgresql://u:p@db.example:5433/portico", None),
            ("postgres://u@/portico?host=/run/pg", "/run/pg"),
            ("postgresql+asyncpg://u@/portico?host=/run/pg", "/run/pg"),
        ],
    )
    def test_accepted(self, url: str, host: str | None) -> None:
        found = async_url(url)
        assert found.drivername == "postgresql+asyncpg"
        assert found.query.get("host") == host

    def test_the_driver_reads_libpqs_words_for_tls(self, tmp_path: Path) -> None:
        ca = tmp_path / "ca.pem"
        ca.touch()
        found, more = dsn(f"postgresql://u:p%40ss@h/d?sslmode=verify-full&sslrootcert={ca}")
        assert make_url(found).query == {"sslmode": "verify-full", "sslrootcert": str(ca)} and not more
        assert make_url(found).password == "p@ss"

    def test_the_public_authorities(self) -> None:
        found, more = dsn("postgresql://u@h/d?sslmode=verify-full&sslrootcert=system")
        assert found == "postgresql://u@h/d"
        assert more["ssl"].check_hostname and more["ssl"].verify_mode is ssl.CERT_REQUIRED

    def test_a_ca_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(Problem) as refused:
            dsn(f"postgresql://u@h/d?sslmode=verify-full&sslrootcert={tmp_path}/none.pem")
        assert (
            refused.value.code == "config.invalid" and f"sslrootcert names {tmp_path}/none.pem" in refused.value.detail
        )

    async def test_nor_named(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        db = Database("postgresql://u@127.0.0.1:1/d?sslmode=verify-full")
        with pytest.raises(Problem) as refused:
            await db.ping()
        assert refused.value.code == "config.invalid" and "root.crt" in refused.value.detail
        await db.close()

    @pytest.mark.parametrize("url", ["", "nonsense", "mysql://u@h/d"])
    def test_refused_without_repeating_it(self, url: str) -> None:
        with pytest.raises(Problem) as refused:
            async_url(url)
        assert refused.value.code == "config.invalid"


async def test_no_cancellation_leaves_a_transaction_open_in_the_pool(database_url: str) -> None:
    """Wherever a task is cancelled: at BEGIN, in a statement, at COMMIT. The next user of the connection would be inside it."""
    name = "portico test cancelled"
    db = Database(database_url, PoolLimits(size=1), application=name)
    watcher = await asyncpg.connect(database_url)

    async def write() -> None:
        async with db.transaction() as tx:
            await tx.raw.execute("SELECT 1")

    await write()
    open_ones = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state LIKE 'idle in transaction%'"
    )
    for turns in range(60):
        task = asyncio.create_task(write())
        for _ in range(turns // 3):
            await asyncio.sleep(0)
        await asyncio.sleep(0.0002 * (turns % 3))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with db.read() as reader:
            await reader.raw.execute("SELECT 1")
        assert await watcher.fetchval(open_ones, name) == 0, f"after {turns} turns"
    await watcher.close()
    await db.close()


class TestDirect:
    """Connections kept for single statements, beside the pool."""

    async def test_one_connection_serves_one_after_the_other(self, base: Database) -> None:
        pids = set()
        for _ in range(3):
            async with base.direct() as reader:
                pids.add(await reader.raw.fetchval("SELECT pg_backend_pid()"))
        assert len(pids) == 1

    async def test_statements_of_sqlalchemy_have_one_of_the_pool_and_give_it_back(self, base: Database) -> None:
        free = base.connections()
        async with base.direct() as reader:
            own = await reader.raw.fetchval("SELECT pg_backend_pid()")
            assert await reader.scalar(sa.text("SELECT pg_backend_pid()")) != own
            assert await reader.scalar(sa.select(sa.func.count()).select_from(things)) == 0
        assert base.connections()[0] == free[0] == 0

    async def test_a_reader_does_not_write(self, base: Database) -> None:
        async with base.direct() as reader:
            with pytest.raises(TypeError):
                await reader.fetch_one(sa.insert(things).values(**_row()))

    async def test_a_dead_one_is_replaced_and_one_that_dies_at_work_is_told_of(self, base: Database) -> None:
        async with base.direct() as reader:
            await reader.raw.execute("SELECT 1")
        await _kill_backends(base)
        await asyncio.sleep(0.1)
        async with base.direct() as reader:
            assert await reader.raw.fetchval("SELECT 1") == 1
        with pytest.raises(Problem) as caught:
            async with base.direct() as reader:
                await _kill_backends(base)
                await reader.raw.execute("SELECT 1")
        assert caught.value.code == "service.unavailable"

    async def test_whoever_finds_all_at_work_waits_and_then_is_refused(self, empty_database_url: str) -> None:
        db = Database(empty_database_url, PoolLimits(size=1, direct=1, acquire_timeout_seconds=0.2))
        async with db.direct():
            with pytest.raises(Problem) as caught:
                async with db.direct():
                    pass
        assert caught.value.code == "service.unavailable"
        async with db.direct() as reader:
            assert await reader.raw.fetchval("SELECT 1") == 1
        await db.close()

    async def test_no_database_is_no_traceback(self) -> None:
        db = Database("postgresql://u:p@127.0.0.1:9/none", PoolLimits(connect_timeout_seconds=1))
        with pytest.raises(Problem) as caught:
            async with db.direct():
                pass
        assert caught.value.code == "service.unavailable"
        async with asyncio.timeout(5):  # its place is free again
            for _ in range(2 * db.limits.direct):
                with pytest.raises(Problem):
                    async with db.direct():
                        pass

    async def test_neither_cancellation_nor_a_transaction_left_open_reaches_the_next(self, base: Database) -> None:
        for turns in range(40):
            task = asyncio.create_task(self._slow(base))
            for _ in range(turns % 20):
                await asyncio.sleep(0)
            await asyncio.sleep(0.0005 * (turns % 3))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            async with base.direct() as reader:
                assert not reader.raw.is_in_transaction()
                assert await reader.raw.fetchval("SELECT $1::int", turns) == turns
        assert base.connections()[0] == 0
        async with base.direct() as reader:
            await reader.raw.execute("BEGIN")
        async with base.direct() as reader:
            assert not reader.raw.is_in_transaction()

    @staticmethod
    async def _slow(db: Database) -> None:
        async with db.direct() as reader:
            await reader.raw.execute("SELECT pg_sleep(0.002)")
