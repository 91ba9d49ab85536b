"""How many jobs a second the queue runs: no-op jobs, from claim to recorded end, with PostgreSQL on the same machine.

    python -m bench.queue [--json] [--jobs 20000] [--workers 1] [--steps]

Starts a real PostgreSQL (durable: every commit is on disk) in a folder of its own, puts the jobs in, and runs them in this many
processes with the workers' own runner. With ``--steps`` each job also writes a row
in its last transaction. The target is 2,000 a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shutil

import sqlalchemy as sa

from portico.control import migrations
from portico.embedded.folders import temp_home
from portico.embedded.postgres import EmbeddedPostgres
from portico.kit import loop, queue
from portico.kit.db import Database, PoolLimits
from portico.kit.queue import Limits, Work
from portico.kit.queue_runner import KindRunner, Pace, Served

TARGET = 2000
KIND = queue.plain("bench")
#: As a kind of tiny jobs would declare it.
LIMITS = Limits(concurrency=16, prefetch=240)


async def nothing(work: Work) -> None:
    """The job."""


async def one_row(work: Work) -> None:
    async with work.done() as tx:
        await tx.raw.execute("INSERT INTO bench_effects VALUES ($1)", work.id)


async def work(uri: str, steps: bool) -> None:
    """One worker process: until the queue is empty."""
    db = Database(uri, PoolLimits(size=18))
    stopping = asyncio.Event()
    served = Served(KIND, one_row if steps else nothing, LIMITS)
    runner = KindRunner(served, db, stopping, Pace(poll_seconds=0.05))
    running = asyncio.create_task(runner.run(5.0))
    while True:
        await asyncio.sleep(0.02)
        async with db.read() as reader:
            left = await reader.raw.fetchval("SELECT EXISTS (SELECT FROM queue_jobs WHERE queue_state = 'pending')")
        if not left:
            break
    stopping.set()
    await running
    await db.close()


def process(uri: str, steps: bool) -> None:
    loop.run(work(uri, steps))


async def fill(uri: str, jobs: int) -> None:
    db = Database(uri, PoolLimits(size=1))
    async with db.transaction() as tx:
        await tx.execute(sa.text("CREATE TABLE bench_effects (id text PRIMARY KEY)"))
        await tx.raw.execute(
            "INSERT INTO queue_jobs (kind, key) SELECT 'bench', n::text FROM generate_series(1, $1) AS n", jobs
        )
    await db.close()


async def rate(uri: str) -> float:
    """Jobs per second between the first recorded end and the last, by PostgreSQL's clock."""
    db = Database(uri, PoolLimits(size=1))
    async with db.read() as reader:
        row = await reader.raw.fetchrow(
            "SELECT count(*) AS jobs, extract(epoch FROM max(finished_at) - min(finished_at))::float8 AS seconds"
            " FROM queue_jobs WHERE queue_state = 'done' AND attempts = 1"
        )
    await db.close()
    return float(row["jobs"] / row["seconds"])


def measure(uri: str, args: argparse.Namespace) -> float:
    """Run all jobs; how many a second."""
    asyncio.run(fill(uri, args.jobs))
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=process, args=(uri, args.steps)) for _ in range(args.workers)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    if any(each.exitcode for each in workers):
        raise SystemExit("a worker failed")
    return asyncio.run(rate(uri))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", action="store_true")
    args = parser.parse_args()
    home = temp_home("portico-bench-")
    server = EmbeddedPostgres(home)
    try:
        server.start()
        asyncio.run(migrations.upgrade(server.uri))
        found = measure(server.uri, args)
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
    if args.json:
        print(json.dumps({"jobs": args.jobs, "workers": args.workers, "steps": args.steps, "per_second": found}))
    else:
        print(f"{found:,.0f} jobs/s (target {TARGET:,})")


if __name__ == "__main__":
    main()
