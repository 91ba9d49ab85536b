"""Schema migrations (Alembic), inside the package so that an installed wheel carries them.

Each step must be safe for the code before it and after it; steps go forward only. All pending steps run in one
transaction under an advisory lock, so that two processes that start at once do not race.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from portico.kit.db import Database, PoolLimits

# "portico" as a number; every process that migrates takes this lock.
LOCK_KEY = 0x706F727469636F
# Seconds to wait for another migration to end; statements themselves are not limited.
LOCK_TIMEOUT_SECONDS = 120.0


def config() -> Config:
    """Alembic's configuration, without an ini file."""
    found = Config()
    found.set_main_option("script_location", str(Path(__file__).parent))
    return found


def head() -> str:
    """The newest revision of this version of the code."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None
    return revision


def is_behind(revision: str | None) -> bool:
    """Whether a database at ``revision`` lacks a step that this code knows. A revision from newer code is not behind."""
    known = revisions()
    return revision is None or (revision in known and revision != known[0])


@cache
def revisions() -> tuple[str, ...]:
    """Every step of this version of the code, newest first; read once (each is a file), for all who ask whether we are ready."""
    return tuple(step.revision for step in ScriptDirectory.from_config(config()).walk_revisions())


async def upgrade(database_url: str, revision: str = "head") -> str:
    """Bring the database to ``revision`` and return the revision it is at. Raises ``service.unavailable``."""
    limits = PoolLimits(
        size=1,
        statement_timeout_seconds=0,
        lock_timeout_seconds=LOCK_TIMEOUT_SECONDS,
        idle_in_transaction_seconds=0,
    )
    db = Database(database_url, limits, application="portico migrate")
    try:
        async with db.transaction() as tx:
            await tx.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
            await tx.run_sync(lambda connection: _upgrade(connection, revision))
            return await tx.run_sync(_current) or ""
    finally:
        await db.close()


async def current(db: Database) -> str | None:
    """The revision the database is at; ``None`` when it was never migrated."""
    async with db.transaction(read_only=True) as tx:
        return await tx.run_sync(_current)


def _upgrade(connection: sa.Connection, revision: str) -> None:
    settings = config()
    settings.attributes["connection"] = connection
    command.upgrade(settings, revision)


def _current(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
