"""The jobs of the drills, and a process that runs them: `python -m tests.worker.drilling URL OUTSIDE_URL`.

A job is the chain of a call out: intent → call → result. Each of the three leaves a row, so that it can be counted:

    drill_intents   (job)         written by a step: may be there more than once
    drill_calls     (key, times)  the outside world, on a connection of its own: what it was asked, by idempotency key
    drill_effects   (job)         written by the last transaction: has to be there exactly once
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

import asyncpg
import sqlalchemy as sa

from portico.kit import loop, queue
from portico.kit.db import Database, PoolLimits
from portico.kit.queue import Kind, Limits, Work
from portico.kit.queue_runner import KindRunner, Pace, Served, Wakes

tables = sa.MetaData()
jobs = sa.Table(
    "drill_jobs", tables,
    sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("poison", sa.Boolean, nullable=False, server_default="false"),
    *queue.columns(), *queue.rules("drill_jobs"),
)  # fmt: skip
KIND = Kind("drill", jobs)
TABLES = """
CREATE TABLE drill_intents (job bigint); CREATE TABLE drill_effects (job bigint);
CREATE TABLE drill_calls (key text PRIMARY KEY, times integer NOT NULL DEFAULT 1)
"""
LIMITS = Limits(
    concurrency=2, prefetch=2, lease_seconds=1.5, max_attempts=1000, backoff_seconds=0.05, backoff_max_seconds=0.2
)
PACE = Pace(poll_seconds=0.1, count_seconds=0.3)


async def make(db: Database) -> None:
    """The tables, on an empty database."""
    async with db.transaction() as tx:
        await tx.run_sync(tables.create_all)
        for statement in TABLES.split(";"):
            await tx.raw.execute(statement)


async def put(db: Database, count: int, *, poison: bool = False) -> None:
    """So many new jobs."""
    async with db.transaction() as tx:
        await tx.execute(sa.insert(jobs), [{"poison": poison}] * count)
        await queue.wake(tx, KIND)


class Outside:
    """The receiver of the calls."""

    def __init__(self, url: str, seconds: float = 0.0) -> None:
        self._url, self._seconds = url, seconds

    async def __call__(self, work: Work) -> None:
        if work.row["poison"]:
            os.kill(os.getpid(), signal.SIGKILL)
        async with work.step() as tx:
            await tx.raw.execute("INSERT INTO drill_intents VALUES ($1)", work.id)
        async with work.call() as key:
            connection = await asyncpg.connect(self._url)
            try:
                await asyncio.sleep(self._seconds)
                await connection.execute(
                    "INSERT INTO drill_calls VALUES ($1) ON CONFLICT (key) DO UPDATE SET times = drill_calls.times + 1",
                    key,
                )
            finally:
                await connection.close()
        async with work.done() as tx:
            await tx.raw.execute("INSERT INTO drill_effects VALUES ($1)", work.id)


async def work(url: str, outside: str, stopping: asyncio.Event, limits: Limits = LIMITS, seconds: float = 0.0) -> None:
    """One worker, until ``stopping``."""
    db = Database(url, PoolLimits(size=5, acquire_timeout_seconds=3))
    runner = KindRunner(Served(KIND, Outside(outside, seconds), limits), db, stopping, PACE)
    wakes = asyncio.create_task(Wakes([runner], db, "drill wakes").run())
    try:
        await runner.run(2.0)
    finally:
        wakes.cancel()
        await db.close()


def process(url: str, outside: str, limits: Limits = LIMITS, seconds: float = 0.0) -> None:
    """The main function of a worker process; ends in order on SIGTERM."""
    logging.disable(logging.CRITICAL)

    async def main() -> None:
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        await work(url, outside, stopping, limits, seconds)

    loop.run(main())


if __name__ == "__main__":
    process(*sys.argv[1:3])
