"""Commands that work on the database of the installation, as whoever may run programs with its address."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from portico import settings
from portico.cli.processes import require_server_parts

if TYPE_CHECKING:
    from portico.kit.db import Database

T = TypeVar("T")

DataOption = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Of the `portico up` with this data folder.", show_default=False),
]


def with_database(data: Path | None, config: Path | None, act: Callable[[Database], Awaitable[T]]) -> T:
    """Run ``act`` on the database that is named; raises ``service.unavailable`` when it has no schema of this version."""
    require_server_parts()
    from sqlalchemy.exc import ProgrammingError

    from portico.errors import Problem
    from portico.kit import loop
    from portico.kit.db import Database, PoolLimits

    url = None
    if data is not None:
        from portico.embedded.postgres import EmbeddedPostgres

        url = settings.Secret(EmbeddedPostgres(data).uri)
    chosen = settings.load(settings.MigrateSettings, table="migrate", file=config, overrides={"database_url": url})

    async def run() -> T:
        db = Database(chosen.database_url.reveal(), PoolLimits(size=1), application="portico admin")
        try:
            return await act(db)
        finally:
            await db.close()

    import asyncpg

    try:
        return loop.run(run())
    except (ProgrammingError, asyncpg.UndefinedTableError):
        detail = "the database has no schema, or one that is older than this version"
        raise Problem("service.unavailable", detail, hint="Run: portico migrate") from None
