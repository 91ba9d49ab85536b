"""The runner on a real database: one leader, retries, takeover, an orderly end."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

from portico.kit.clock import SystemClock
from portico.kit.db import Database, PoolLimits
from portico.settings import ApiSettings, Secret, WorkerSettings
from portico.worker import runner as module
from portico.worker.jobs import Context, Job
from portico.worker.runner import Runner

MASTER = Secret("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")


@pytest.fixture
async def context(postgres: Any) -> AsyncIterator[Context]:
    settings = WorkerSettings(database_url=Secret(postgres.uri), tick_seconds=0.02, retry_max_seconds=0.05)
    control = ApiSettings(database_url=Secret(postgres.uri), master_key=MASTER)
    db = Database(postgres.uri, PoolLimits(size=4), application="portico test worker")
    yield Context(settings, control, db, SystemClock())
    await db.close()


class Bench:
    """Runners and what their jobs did."""

    def __init__(self, context: Context) -> None:
        self.context, self.runs = context, list[str]()
        self.stopping: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[None]] = []

    def job(self, name: str, every: float = 0.05, work: Callable[[], Any] | None = None) -> Job:
        async def run(_: Context) -> str:
            self.runs.append(name)
            if work is not None:
                await work()
            return "something"

        return Job(name, every, run)

    def start(self, *jobs: Job, name: str = "testing") -> Runner:
        stopping = asyncio.Event()
        made = Runner(name, jobs, self.context, stopping)
        self.stopping.append(stopping)
        self.tasks.append(asyncio.create_task(made.run()))
        return made

    async def stop(self) -> None:
        for stopping in self.stopping:
            stopping.set()
        await asyncio.gather(*self.tasks)


@pytest.fixture
async def bench(context: Context) -> AsyncIterator[Bench]:
    made = Bench(context)
    yield made
    await made.stop()


async def until(what: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


async def test_jobs_run_when_they_are_due(bench: Bench) -> None:
    bench.start(bench.job("often", 0.02), bench.job("rarely", 60))
    await until(lambda: bench.runs.count("often") >= 4)
    assert bench.runs.count("rarely") == 1


async def test_one_process_leads_and_another_takes_over(bench: Bench) -> None:
    first, second = bench.start(bench.job("first")), bench.start(bench.job("second"))
    await until(lambda: first.leads or second.leads)
    await asyncio.sleep(0.2)
    assert first.leads != second.leads
    assert len(set(bench.runs)) == 1, "both ran the jobs"
    leader = 0 if first.leads else 1
    bench.stopping[leader].set()
    await until(lambda: (second if leader == 0 else first).leads)
    await until(lambda: len(set(bench.runs)) == 2)


async def test_workers_of_different_names_lead_side_by_side(bench: Bench) -> None:
    one, two = bench.start(bench.job("a"), name="one"), bench.start(bench.job("b"), name="two")
    await until(lambda: one.leads and two.leads)


async def test_a_failing_job_is_tried_again_and_stops_nobody(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ZeroDivisionError("broken")

    bench.start(bench.job("bad", 60, fail), bench.job("good"))
    await until(lambda: bench.runs.count("bad") >= 3 and bench.runs.count("good") >= 3)
    assert "job failed" in caplog.text and "ZeroDivisionError" in caplog.text


async def test_a_cut_connection_costs_the_lead_and_it_is_taken_again(bench: Bench, postgres: Any) -> None:
    made = bench.start(bench.job("job"))
    await until(lambda: made.leads)
    connection = await asyncpg.connect(postgres.uri)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
        " WHERE locktype = 'advisory' AND application_name = 'portico test worker'"
    )
    await connection.close()
    before = len(bench.runs)
    await until(lambda: len(bench.runs) > before + 2 and made.leads)


async def test_the_lock_is_given_back_with_the_lead(bench: Bench, postgres: Any) -> None:
    made = bench.start(bench.job("job"))
    await until(lambda: made.leads)
    await bench.stop()
    connection = await asyncpg.connect(postgres.uri)
    held = await connection.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
    await connection.close()
    assert held == 0, "the pool keeps the connection, so the lock must be released by hand"


async def test_a_job_past_the_shutdown_limit_is_cut() -> None:
    async def long() -> None:
        await asyncio.sleep(60)

    task = asyncio.create_task(long())
    began = time.monotonic()
    await module._finish([task], 0.05)
    assert task.cancelled() and time.monotonic() - began < 1


def test_maintenance_has_jobs_with_distinct_names(context: Context) -> None:
    jobs = module.WORKERS["maintenance"](context.settings)
    assert len({job.name for job in jobs}) == len(jobs) >= 2


async def test_maintenance_runs_on_a_migrated_database(context: Context, postgres: Any) -> None:
    from portico.control import migrations

    connection = await asyncpg.connect(postgres.uri)
    await connection.execute("CREATE DATABASE worker_maintenance")
    await connection.close()
    uri = postgres.uri_for("worker_maintenance")
    await migrations.upgrade(uri)
    db = Database(uri, PoolLimits(size=2))
    try:
        for job in module.WORKERS["maintenance"](context.settings):
            assert isinstance(await job.run(dataclasses.replace(context, db=db)), str)
    finally:
        await db.close()
