"""Workers are killed, cut off, run beside each other, and have their clocks and database pulled away: nothing is lost, nothing
happens twice, nothing is stuck. What a job does leaves rows, which are counted at the end (``drilling.py``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import asyncpg
import pytest

from portico.embedded import spawn
from portico.embedded.postgres import EmbeddedPostgres
from portico.kit import queue
from portico.kit.db import Database, PoolLimits
from portico.kit.queue_runner import FAILURES
from tests.worker import drilling
from tests.worker.drilling import KIND, LIMITS
from tests.worker.statement_proxy import StatementProxy

pytestmark = pytest.mark.timeout(120)

#: Round trips after which a job of a new process is through, and some: beyond it a process is killed at rest.
ROUND_TRIPS = 36
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["tests.worker.drilling"])


@pytest.fixture
async def db(postgres: Any) -> AsyncIterator[Database]:
    """A database of this test's own, with the tables of the drills."""
    name = f"drill_{time.monotonic_ns()}"
    connection = await asyncpg.connect(postgres.uri)
    await connection.execute(f"CREATE DATABASE {name}")
    made = Database(postgres.uri_for(name), PoolLimits(size=4))
    await drilling.make(made)
    yield made
    await made.close()
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


def start(url: str, outside: str, limits: queue.Limits = LIMITS, seconds: float = 0.0) -> Any:
    """A worker process; a call out takes so many seconds."""
    made = forks.Process(target=drilling.process, args=(url, outside, limits, seconds), daemon=True)
    made.start()
    return made


def kill(process: Any) -> None:
    if process.pid is not None and process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)


async def ended(process: Any, seconds: float = 30.0) -> None:
    await asyncio.to_thread(process.join, seconds)
    assert process.exitcode is not None, "the worker did not end"


async def settled(db: Database, seconds: float = 120) -> queue.Counts:
    """Wait until no job is pending."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            async with db.read() as reader:
                found = await queue.count(reader, KIND)
        except FAILURES:
            found = None
        if found is not None and not (found.waiting or found.later or found.leased):
            return found
        assert time.monotonic() < deadline, f"stuck: {found}"
        await asyncio.sleep(0.05)


async def nothing_lost_nothing_twice(db: Database, count: int) -> None:
    async with db.read() as reader:
        fetch = reader.raw.fetchrow
        effects = await fetch("SELECT count(*) AS all, count(DISTINCT job) AS jobs FROM drill_effects")
        calls = await fetch("SELECT count(*) AS keys, max(times) AS times FROM drill_calls")
        done = await reader.raw.fetchval("SELECT count(*) FROM drill_jobs WHERE queue_state = 'done'")
        intents = await reader.raw.fetchval("SELECT count(DISTINCT job) FROM drill_intents")
    assert (effects["all"], effects["jobs"], calls["keys"], done, intents) == (count,) * 5, (effects, calls, done)


@pytest.mark.parametrize("after", [False, True], ids=["before-the-server", "after-the-server"])
async def test_killed_at_every_statement(db: Database, tmp_path: Path, after: bool) -> None:
    fired = 0
    for first in range(1, ROUND_TRIPS + 1, 6):
        await drilling.put(db, 6)
        proxies, processes = [], []
        for at in range(first, first + 6):  # six at once, each of which dies at another statement
            proxy = await StatementProxy(db.url, tmp_path, at=at, after=after).start()
            process = start(proxy.url, db.url)
            proxy.act = lambda process=process: kill(process)
            proxies.append(proxy)
            processes.append(process)
        for process in processes:
            await ended(process)
            assert process.exitcode == -signal.SIGKILL
        for proxy in proxies:
            fired += proxy.fired
            await proxy.close()
    assert fired == ROUND_TRIPS, "not every index was reached"
    last = start(db.url, db.url)
    await settled(db)
    kill(last)
    await nothing_lost_nothing_twice(db, ROUND_TRIPS)


@pytest.mark.parametrize("after", [False, True], ids=["before-the-server", "after-the-server"])
async def test_cut_off_at_every_statement(db: Database, tmp_path: Path, after: bool) -> None:
    """The outcome of the statement is unknown then, of every COMMIT too; the process lives on."""
    await drilling.put(db, ROUND_TRIPS)
    stopping = asyncio.Event()
    proxies = [
        await StatementProxy(db.url, tmp_path, at=at, after=after).start() for at in range(2, ROUND_TRIPS + 2, 2)
    ]
    workers = [asyncio.create_task(drilling.work(proxy.url, db.url, stopping)) for proxy in proxies]
    await settled(db)
    deadline = time.monotonic() + 120
    while not all(proxy.fired for proxy in proxies):
        await asyncio.sleep(0.05)
        assert time.monotonic() < deadline
    await settled(db)
    stopping.set()
    await asyncio.gather(*workers)
    for proxy in proxies:
        await proxy.close()
    await nothing_lost_nothing_twice(db, ROUND_TRIPS)


@pytest.mark.parametrize("count", [2, 5])
async def test_many_at_once(db: Database, count: int) -> None:
    await drilling.put(db, 200)
    workers = [start(db.url, db.url) for _ in range(count)]
    await settled(db)
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
    for worker in workers:
        await ended(worker)
        assert worker.exitcode == 0
    await nothing_lost_nothing_twice(db, 200)
    async with db.read() as reader:
        repeated = await reader.raw.fetchval("SELECT count(*) FROM drill_calls WHERE times > 1")
        assert repeated == 0, "two workers had one job, though none died"


async def test_frozen_workers_come_back_to_jobs_of_others(db: Database) -> None:
    """Each stands still for longer than a lease, in the middle of jobs (SIGSTOP), while others have them and finish."""
    limits = dataclasses.replace(LIMITS, lease_seconds=0.5, concurrency=8)
    await drilling.put(db, 150)
    workers = [start(db.url, db.url, limits, 0.05) for _ in range(3)]
    while not await _effects(db):
        await asyncio.sleep(0.02)
    for worker in workers[:2]:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        await drilling.put(db, 25)
        await asyncio.sleep(0.8)
        os.kill(worker.pid, signal.SIGCONT)
    await settled(db)
    await asyncio.sleep(0.2)  # for those who come back
    for worker in workers:
        assert worker.exitcode is None
        kill(worker)
    await nothing_lost_nothing_twice(db, 200)


async def test_a_job_that_kills_its_worker_dies_and_takes_nobody_along(db: Database) -> None:
    limits = dataclasses.replace(LIMITS, max_attempts=3, lease_seconds=0.6, concurrency=4, prefetch=8)
    await drilling.put(db, 5)
    await drilling.put(db, 1, poison=True)
    await drilling.put(db, 5)
    workers, deaths = [start(db.url, db.url, limits)], 0
    deadline = time.monotonic() + 30
    while True:
        async with db.read() as reader:
            counts = await queue.count(reader, KIND)
        if not (counts.waiting or counts.later or counts.leased):
            break
        assert time.monotonic() < deadline, counts
        if workers[-1].exitcode is not None:
            deaths += 1
            workers.append(start(db.url, db.url, limits))
        await asyncio.sleep(0.02)
    kill(workers[-1])
    assert (counts.dead, deaths) == (1, 3)
    await nothing_lost_nothing_twice(db, 10)


# -- the database itself -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clocked(server_home: Path) -> Iterator[tuple[EmbeddedPostgres, Path]]:
    """A durable PostgreSQL of the drills' own; where there is a compiler, its clock is off by what stands in the file."""
    home = server_home / "clocked"
    home.mkdir(mode=0o755)
    stamp = home / "offset"
    stamp.write_text("0\n")
    faked: dict[str, str] = {}
    if shutil.which("cc"):
        source = Path(__file__).parent.parent / "drills" / "clock.c"
        argv = ["cc", "-shared", "-fPIC", "-O2", "-o", home / "clock.so", source]
        subprocess.run(argv, check=True, timeout=60)
        faked = {"LD_PRELOAD": str(home / "clock.so"), "DRILL_CLOCK": str(stamp)}
    with patch.dict(spawn.SERVER_ENV, faked):
        server = EmbeddedPostgres(home / "pg")
        server.start()
        yield server, stamp
        if server.process is not None:
            server.process.kill()  # in order it would write a checkpoint first
        server.stop()


async def stage(server: EmbeddedPostgres, name: str) -> Database:
    connection = await asyncpg.connect(server.uri)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    db = Database(server.uri_for(name), PoolLimits(size=2))
    await drilling.make(db)
    return db


async def test_postgresql_is_stopped_killed_and_started_again(clocked: tuple[EmbeddedPostgres, Path]) -> None:
    server, _ = clocked
    db = await stage(server, "restarts")
    await drilling.put(db, 150)
    workers = [start(db.url, db.url) for _ in range(2)]
    for how in ("stopped", "killed"):
        while await _effects(db) < 20:
            await asyncio.sleep(0.02)
        if how == "killed":
            assert server.process is not None
            server.process.kill()
            server.process.wait()
        server.stop()
        server.start()  # from the main thread: its end follows the thread that forked it
        await drilling.put(db, 25)
    await settled(db)
    assert all(worker.exitcode is None for worker in workers), "a worker ended with the database"
    for worker in workers:
        kill(worker)
    await nothing_lost_nothing_twice(db, 200)
    await db.close()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (apt-get install gcc libc6-dev)")
@pytest.mark.parametrize("step", [600, -600])
async def test_every_clock_is_stepped(clocked: tuple[EmbeddedPostgres, Path], step: int) -> None:
    """Of PostgreSQL and of two workers, at once, while jobs are in hand, due, and waiting for their next attempt."""
    server, stamp = clocked
    db = await stage(server, f"steps_{step % 7}")
    await drilling.put(db, 100)
    faked = os.environ | {"LD_PRELOAD": str(stamp.parent / "clock.so"), "DRILL_CLOCK": str(stamp)}
    argv = [sys.executable, "-m", "tests.worker.drilling", db.url, db.url]
    workers = [subprocess.Popen(argv, env=faked) for _ in range(2)]
    try:
        while not await _effects(db):
            await asyncio.sleep(0.02)
        before = await _now(db)
        stamp.write_text(f"{int(stamp.read_text()) + step}\n")
        await asyncio.sleep(0.5)
        assert abs(await _now(db) - before - step) < 60, "the clock was not set"
        await drilling.put(db, 25)
        await settled(db)
        await nothing_lost_nothing_twice(db, 125)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        await db.close()


async def _effects(db: Database) -> int:
    async with db.read() as reader:
        return int(await reader.raw.fetchval("SELECT count(*) FROM drill_effects"))


async def _now(db: Database) -> float:
    async with db.read() as reader:
        return float(await reader.raw.fetchval("SELECT extract(epoch FROM clock_timestamp())"))
