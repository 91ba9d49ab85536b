"""What tests of several parts share: one PostgreSQL, one Valkey and one `portico up` per run, one database per test module."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis  # early: its plugin imports it deep in the stack after a failure, where CPython 3.11 cannot compile it
import pytest

_numbers = itertools.count(1)

#: Attempts more for a test that is marked `realtime`; 0 shows what its first failure was.
REALTIME_RERUNS = int(os.environ.get("PORTICO_REALTIME_RERUNS", "2"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What processes do to each other in real time can be stretched beyond any deadline by a machine under other load.

    Modules that prove such say so by `realtime`; one of theirs that fails runs again, and is listed (`RERUN`) when it then
    passes. Whatever our own locks, transactions and parsers decide passes the first time or fails.
    """
    for item in items:
        if REALTIME_RERUNS and item.get_closest_marker("realtime") is not None:
            item.add_marker(pytest.mark.flaky(reruns=REALTIME_RERUNS))


# How fast a busy machine makes examples says nothing of what is tested.
hypothesis.settings.register_profile("portico", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("portico")


def run_apart(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end in a thread with a loop of its own (from fixtures that outlive a test's loop)."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, main).result()


@pytest.fixture(scope="session")
def server_home() -> Iterator[Path]:
    """A short folder for the servers of this run: socket paths have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ptest-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def postgres(server_home: Path) -> Iterator[Any]:
    """The embedded PostgreSQL of this run."""
    from portico.embedded.postgres import EmbeddedPostgres

    server = EmbeddedPostgres(server_home / "postgres", durable=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def valkey(server_home: Path) -> Iterator[Any]:
    """The embedded Valkey of this run."""
    from portico.embedded.valkey import EmbeddedValkey

    server = EmbeddedValkey(server_home / "valkey")
    server.start()
    yield server
    server.stop()


async def sql(uri: str, *statements: str) -> None:
    """Run statements, each on its own, on a fresh connection."""
    import asyncpg

    connection = await asyncpg.connect(uri)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def template_database(postgres: Any) -> str:
    """A migrated database to copy; returns its name."""
    from portico.control import migrations

    run_apart(sql(postgres.uri, "CREATE DATABASE portico_template"))
    run_apart(migrations.upgrade(postgres.uri_for("portico_template")))
    return "portico_template"


@pytest.fixture(scope="module")
def database_url(postgres: Any, template_database: str) -> Iterator[str]:
    """A migrated database of this test module's own."""
    name = f"test_{next(_numbers)}"
    run_apart(sql(postgres.uri, f"CREATE DATABASE {name} TEMPLATE {template_database}"))
    yield postgres.uri_for(name)
    run_apart(sql(postgres.uri, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="module")
def empty_database_url(postgres: Any) -> Iterator[str]:
    """A database without tables, of this test module's own."""
    name = f"empty_{next(_numbers)}"
    run_apart(sql(postgres.uri, f"CREATE DATABASE {name}"))
    yield postgres.uri_for(name)
    run_apart(sql(postgres.uri, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Any]:
    """The module's database, on a pool of this test's own."""
    from portico.kit.db import Database, PoolLimits

    database = Database(database_url, PoolLimits(size=8))
    yield database
    await database.close()


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The platform that most system tests share. A tunnel takes 400 requests at once, for those that stand still."""
    from portico.embedded.folders import temp_home
    from tests.system.platform import Up, port_span

    home = temp_home("portico-system-")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        folder = tmp_path_factory.mktemp("up")
        log = home / "access.log"
        yield Up(home, folder, stack, tunnel_concurrency=400, tcp_ports=port_span(20), access_log=log)
