"""Migrations: from nothing to what the code describes, once, however many start at a time."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

import portico.worker.runner  # noqa: F401 - the tables of every domain
from portico.control import migrations
from portico.errors import Problem
from portico.kit import outbox, queue  # noqa: F401 - their tables
from portico.kit.db import Database, metadata


async def test_upgrade_is_safe_to_race_and_repeat(empty_database_url: str) -> None:
    answers = await asyncio.gather(*(migrations.upgrade(empty_database_url) for _ in range(3)))
    assert set(answers) == {migrations.head()}
    assert await migrations.upgrade(empty_database_url) == migrations.head()


async def test_the_schema_is_what_the_tables_say(db: Database) -> None:
    def differences(connection: sa.Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata))

    async with db.transaction(read_only=True) as tx:
        assert await tx.run_sync(differences) == []
    assert await migrations.current(db) == migrations.head()


def test_a_database_of_newer_code_is_not_behind() -> None:
    assert migrations.is_behind(None)
    assert migrations.is_behind("0001") is (migrations.head() != "0001")
    assert not migrations.is_behind(migrations.head())
    assert not migrations.is_behind("9999_from_the_future")


async def test_a_database_that_is_away_is_named() -> None:
    with pytest.raises(Problem) as refused:
        await migrations.upgrade("postgresql://nobody@127.0.0.1:1/none")
    assert refused.value.code == "service.unavailable"
