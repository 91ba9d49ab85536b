"""Workers on a real database: what is chosen, schedules, retries, hung jobs, the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from portico.control.audit.store import audit_events
from portico.errors import Problem
from portico.kit import outbox, queue
from portico.kit.clock import SystemClock
from portico.kit.db import Database, PoolLimits
from portico.kit.metrics import Exporter
from portico.kit.queue import Counts, Hopeless, Kind, Retry, Work
from portico.kit.queue_runner import KindRunner, Pace, Schedules, Served, Wakes
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings, Secret, WorkerSettings
from portico.worker import metrics as worker_metrics
from portico.worker import notifications, queues
from portico.worker import runner as module
from portico.worker.jobs import Context, Job
from tests.timing import PATIENCE_SECONDS

MASTER = Secret("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")


@pytest.fixture
async def context(database_url: str, tmp_path: Path) -> AsyncIterator[Context]:
    settings = WorkerSettings(
        database_url=Secret(database_url), tick_seconds=0.05, retry_min_seconds=0.01, retry_max_seconds=0.05,
        queue_max_attempts=3, queue_lease_seconds=0.6, shutdown_seconds=0.2, outbox_dir=tmp_path / "outbox",
    )  # fmt: skip
    control = ApiSettings(database_url=Secret(database_url), master_key=MASTER)
    db = Database(database_url, PoolLimits(size=8), application="portico test worker")
    yield Context(settings, control, db, SystemClock())
    await db.close()


@contextlib.asynccontextmanager
async def running(context: Context, *jobs: Job, count: int = 1) -> AsyncIterator[asyncio.Event]:
    """So many workers with these jobs."""
    stopping = asyncio.Event()
    tasks = [asyncio.create_task(module.run(context, jobs, stopping)) for _ in range(count)]
    try:
        yield stopping
    finally:
        stopping.set()
        await asyncio.gather(*tasks)


def doing(name: str, act: Callable[[Work], Awaitable[None]], every: float | None = None, **limits: Any) -> Job:
    return Job(queue.plain(name), lambda _, work: act(work), every, limits)


async def ask(context: Context, job: Job, *keys: str) -> None:
    async with context.db.transaction() as tx:
        for key in keys:
            await queue.enqueue(tx, job.kind, key)


async def counts(context: Context, kind: Kind) -> Counts:
    async with context.db.read() as reader:
        return await queue.count(reader, kind)


async def until(what: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not (await found if asyncio.iscoroutine(found := what()) else found):
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


async def empty(context: Context, kind: Kind) -> bool:
    found = await counts(context, kind)
    return not (found.waiting or found.later or found.leased)


async def test_what_is_scheduled_is_done_once_by_many(context: Context) -> None:
    runs: list[float] = []

    async def note(work: Work) -> None:
        runs.append(time.monotonic())

    async with running(context, doing("often", note, 0.3), count=3):
        await until(lambda: len(runs) >= 4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(runs)]
    assert min(gaps) > 0.1, "two processes put it in"


async def test_intervals_that_nobody_was_there_for_are_not_made_up_for(context: Context) -> None:
    kind = queue.plain("seldom")
    plan = Schedules({kind: 60.0}, context.db, asyncio.Event(), Pace())
    await plan.round()
    async with context.db.transaction() as tx:
        await tx.raw.execute("UPDATE queue_schedules SET next_at = now() - interval '1 day' WHERE name = 'seldom'")
    assert 50 < await plan.round() <= 60
    assert (await counts(context, kind)).waiting == 1
    async with context.db.transaction() as tx:  # the clock was set back by a day
        await tx.raw.execute("UPDATE queue_schedules SET next_at = now() + interval '1 day' WHERE name = 'seldom'")
    assert 50 < await plan.round() <= 60


async def test_a_schedule_waits_for_whoever_holds_its_lock(context: Context) -> None:
    plan = Schedules({queue.plain("locked"): 60.0}, context.db, asyncio.Event(), Pace(poll_seconds=0.5))
    async with context.db.transaction() as tx:
        await tx.raw.execute("SELECT pg_advisory_xact_lock($1)", 0x706F_7274_7363_6865)
        assert await plan.round() == 0.5
        assert await tx.raw.fetchval("SELECT count(*) FROM queue_schedules WHERE name = 'locked'") == 0


async def test_a_new_job_is_begun_when_it_is_told_of(context: Context) -> None:
    began = asyncio.Event()

    async def note(work: Work) -> None:
        began.set()

    slow = dataclasses.replace(context, settings=dataclasses.replace(context.settings, tick_seconds=600))
    job = doing("told", note)
    async with running(slow, job):
        await asyncio.sleep(0.3)
        await ask(context, job, "a")
        async with asyncio.timeout(30):
            await began.wait()


async def test_failures_are_tried_again_and_the_hopeless_die_beside_the_good(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    attempts: dict[str, int] = {}

    async def act(work: Work) -> None:
        key = work.row["key"]
        attempts[key] = attempts.get(key, 0) + 1
        if key == "hopeless":
            raise Hopeless("nobody lives there")
        if key == "poison":
            raise ZeroDivisionError("broken")
        if key == "later" and work.attempt == 1:
            raise Retry(0.01, "busy")

    job = doing("mixed", act, concurrency=1)
    await ask(context, job, "hopeless", "poison", "later", *(str(n) for n in range(20)))
    async with running(context, job):
        await until(lambda: empty(context, job.kind))
    assert (await counts(context, job.kind)).dead == 2
    assert (attempts["hopeless"], attempts["poison"], attempts["later"]) == (1, 3, 2)
    assert sum(attempts[str(n)] for n in range(20)) == 20
    dead = {job.error: job for job in await queues.dead(context.db, job.kind, None, None)}
    assert set(dead) == {"nobody lives there", "ZeroDivisionError: broken"}
    assert "job is dead" in caplog.text and "Traceback" in caplog.text
    (poison,) = await queues.dead(context.db, job.kind, None, "broken")
    assert await queues.replay(context.db, job.kind, [poison.id]) == 1
    assert await queues.replay(context.db, job.kind, [poison.id]) == 0
    async with context.db.read() as reader:
        rows = await reader.fetch_all(audit_events.select().where(audit_events.c.action == "queue.replayed"))
    assert [(row.target, row.details) for row in rows] == [("mixed", {"jobs": [poison.id]})]


async def test_a_hung_job_fails_and_a_long_one_keeps_its_lease(context: Context) -> None:
    async def act(work: Work) -> None:
        await asyncio.sleep(60 if work.row["key"] == "hung" else 1.5)

    job = doing("slow", act, timeout_seconds=2.0, max_attempts=1, concurrency=2)
    await ask(context, job, "hung", "long")
    async with running(context, job, count=2):
        await until(lambda: empty(context, job.kind))
    (dead,) = await queues.dead(context.db, job.kind, None, None)
    assert dead.attempts == 1 and "longer than 2 s" in dead.error


async def test_a_job_whose_lease_is_lost_is_ended(context: Context, caplog: pytest.LogCaptureFixture) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def act(work: Work) -> None:
        if work.attempt > 1:
            return
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    job = doing("stolen", act)
    await ask(context, job, "x")
    async with running(context, job):
        await began.wait()
        async with context.db.transaction() as tx:
            await tx.raw.execute(
                "UPDATE queue_jobs SET lease_token = gen_random_uuid(), available_at = now() WHERE kind = 'stolen'"
            )
        async with asyncio.timeout(30):
            await ended.wait()
        await until(lambda: empty(context, job.kind))
    assert "job lost to another worker" in caplog.text


async def test_at_the_end_jobs_finish_or_are_given_back(context: Context) -> None:
    stopping, began = asyncio.Event(), []

    async def act(work: Work) -> None:
        began.append(work.row["key"])
        await asyncio.sleep(0.1 if work.row["key"] == "0" else 60)

    job = doing("leaving", act, concurrency=2, prefetch=3)
    await ask(context, job, *(str(n) for n in range(5)))
    runner = KindRunner(
        Served(job.kind, job.handler(context), job.limited(context.settings)), context.db, stopping, Pace()
    )
    task = asyncio.create_task(runner.run(0.4))
    await until(lambda: len(began) == 2)
    stopping.set()
    began_to_leave = time.monotonic()
    await task
    assert time.monotonic() - began_to_leave < PATIENCE_SECONDS
    assert runner.outcomes["succeeded"] == 1 and runner.outcomes["given_back"] == 4
    async with context.db.read() as reader:
        rows = await reader.raw.fetch("SELECT * FROM queue_jobs WHERE kind = 'leaving' AND queue_state = 'pending'")
    assert len(rows) == 4 and all(row["attempts"] == 0 and row["lease_token"] is None for row in rows)


async def test_metrics_say_how_it_goes(context: Context) -> None:
    async def nothing(work: Work) -> None:
        pass

    job = doing("counted", nothing)
    await ask(context, job, "a", "b")
    stopping = asyncio.Event()
    runner = KindRunner(
        Served(job.kind, nothing, job.limited(context.settings)), context.db, stopping, Pace(0.05, 0.05)
    )
    task = asyncio.create_task(runner.run(1))
    await until(lambda: runner.outcomes["succeeded"] == 2 and runner.counts == Counts(0, 0, 0, 0, 0.0))
    exporter = Exporter(worker_metrics.DECLARED, lambda: worker_metrics.read([runner]))
    _, text = exporter.text("")
    exporter.lag.close()
    stopping.set()
    await task
    for line in (
        b'portico_queue_jobs_total{kind="counted",outcome="succeeded"} 2.0',
        b'portico_queue_depth{kind="counted",state="dead"} 0.0',
        b'portico_queue_job_seconds_count{kind="counted"} 2.0',
        b'portico_queue_oldest_seconds{kind="counted"} 0.0',
    ):
        assert line in text


def test_workers_and_kinds_are_chosen_by_name(context: Context) -> None:
    def chosen(*names: str) -> set[str]:
        return {job.kind.name for job in module.choose(context.settings, names)}

    assert chosen() == set(queues.kinds())
    assert chosen("notifications") == {"outbox.mail", "outbox.webhook", "outbox.slack"}
    assert chosen("requests.expire", "requests.expire") == {"requests.expire"}
    assert chosen("maintenance", "tunnels.clear") == chosen("maintenance") > {"tunnels.clear"}
    with pytest.raises(
        Problem,
        match=r"no worker is named nothing; workers: billing, certificates, maintenance, .*kinds: .*tunnels.clear",
    ):
        chosen("maintenance", "nothing")


async def test_maintenance_and_notifications_do_their_work(context: Context) -> None:
    sealer = Sealer(context.control.master_key)
    async with context.db.transaction() as tx:
        await tx.raw.execute(
            "INSERT INTO idempotency_keys VALUES ('c', 'k', '', 200, '', '', '', now() - interval '9 day')"
        )
        await outbox.append(
            tx, sealer, outbox.Draft("mail", "welcome:1", "a@example.com", "account.welcome", {"text": "hi"})
        )
    assert context.settings.outbox_dir is not None
    async with running(context, *module.choose(context.settings, ())):
        folder = context.settings.outbox_dir
        await until(lambda: folder.is_dir() and list(folder.glob("account.welcome-*.json")))
        await until(lambda: empty(context, notifications.MAIL))

        async def swept() -> bool:
            async with context.db.read() as reader:
                return bool(
                    await reader.raw.fetchval(
                        "SELECT (SELECT count(*) FROM idempotency_keys) = 0 AND count(*) = 3 FROM queue_jobs"
                        " WHERE kind IN ('tunnels.clear', 'requests.expire', 'outbox.clear') AND queue_state = 'done'"
                    )
                )

        await until(swept)


@pytest.mark.parametrize("part", ["_survey", "_keep_leases", "_record_ends"])
async def test_a_worker_ends_when_a_part_of_it_does(
    context: Context, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A process whose leases nobody renews, or whose ends nobody records, does harm while it looks well."""

    async def broken(self: KindRunner) -> None:
        await asyncio.sleep(0.1)
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(KindRunner, part, broken)

    async def nothing(work: Work) -> None:
        pass

    async with asyncio.timeout(30):
        with pytest.raises(RuntimeError, match=f"{part}|broken") as ended:
            await module.run(context, [doing("watched", nothing)], asyncio.Event())
    assert isinstance(ended.value.__cause__, ZeroDivisionError)


async def test_a_worker_ends_when_nobody_listens_any_more(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    async def nothing(work: Work) -> None:
        pass

    monkeypatch.setattr(Wakes, "run", broken)
    async with asyncio.timeout(30):
        with pytest.raises(ZeroDivisionError):
            await module.run(context, [doing("deaf", nothing)], asyncio.Event())


async def test_what_is_asked_for_at_work_runs_once_more_and_at_once(context: Context) -> None:
    runs: list[float] = []
    began, go_on = asyncio.Event(), asyncio.Event()

    async def act(work: Work) -> None:
        runs.append(time.monotonic())
        began.set()
        await go_on.wait()

    slow = dataclasses.replace(context, settings=dataclasses.replace(context.settings, tick_seconds=600))
    job = doing("asked", act)
    async with running(slow, job):
        await ask(slow, job, "a")
        await began.wait()
        await ask(slow, job, "a", "a")
        go_on.set()
        await until(lambda: len(runs) == 2)
        await until(lambda: empty(slow, job.kind))
    assert len(runs) == 2
