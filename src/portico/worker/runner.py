"""The runner: every named worker has one leader among all processes, and the leader runs its jobs when they are due.

Leadership is a PostgreSQL advisory lock on a connection of its own: it ends with the connection, however the process
ends, and another process takes over at its next look. A job that fails is tried again later, after a growing pause; it
never ends the process.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
import zlib
from collections.abc import Callable, Sequence

import asyncpg
from sqlalchemy import exc as sa_exc

from portico.errors import Problem
from portico.kit import metrics, notify
from portico.kit.clock import SystemClock
from portico.kit.db import Database, PoolLimits, Reader
from portico.settings import ApiSettings, WorkerSettings
from portico.worker import maintenance
from portico.worker import metrics as worker_metrics
from portico.worker.jobs import Context, Job

log = logging.getLogger("portico.worker")

#: Every worker by name.
WORKERS: dict[str, Callable[[WorkerSettings], list[Job]]] = {"maintenance": maintenance.jobs}
_LOCK_SPACE = zlib.crc32(b"portico worker") - (1 << 31)  # the first half of the two-part lock key, signed

_DATABASE_ERRORS = (Problem, asyncpg.PostgresError, asyncpg.InterfaceError, sa_exc.SQLAlchemyError, OSError)


async def serve(
    settings: WorkerSettings,
    control: ApiSettings,
    names: Sequence[str] = (),
    metrics_socket: socket.socket | None = None,
) -> None:
    """Run the named workers (all when none is named) until SIGTERM or SIGINT, then let the jobs at work finish.

    Raises ``config.invalid`` for an unknown name.
    """
    chosen = list(names) or list(WORKERS)
    if unknown := [name for name in chosen if name not in WORKERS]:
        raise Problem("config.invalid", f"no worker is named {', '.join(unknown)}; there are: {', '.join(WORKERS)}")
    stopping = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopping.set)
    db = Database(
        settings.database_url.reveal(), PoolLimits(size=settings.database_pool_size), application="portico worker"
    )
    context = Context(settings, control, db, SystemClock())
    try:
        runners = [Runner(name, WORKERS[name](settings), context, stopping) for name in chosen]
        shown = await metrics.serve(
            worker_metrics.DECLARED, lambda: worker_metrics.read(runners), lambda: not stopping.is_set(),
            settings, metrics_socket,
        )  # fmt: skip
        tasks = [asyncio.create_task(runner.run(), name=runner.name) for runner in runners]
        notify.ready(settings.notify_fd)
        log.info("worker ready", extra={"f": {"workers": ",".join(chosen)}})
        await stopping.wait()
        await _finish(tasks, settings.shutdown_seconds)
        if shown is not None:
            await shown.close()
    finally:
        await db.close()


async def _finish(tasks: list[asyncio.Task[None]], seconds: float) -> None:
    """Give the jobs at work their time; then cancel, which rolls their transactions back."""
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        log.warning("job cut at the shutdown limit", extra={"f": {"worker": task.get_name()}})
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Runner:
    """One named worker in this process."""

    def __init__(self, name: str, jobs: Sequence[Job], context: Context, stopping: asyncio.Event) -> None:
        self.name, self._jobs, self._context, self._stopping = name, jobs, context, stopping
        now = time.monotonic()
        self._due = {job.name: now for job in jobs}
        #: Failed runs of each job since the last that succeeded.
        self.failures = dict.fromkeys(self._due, 0)
        #: Of each job: runs that succeeded, runs that failed, and their seconds.
        self.runs: dict[str, list[float]] = {name: [0, 0, 0.0] for name in self._due}
        self.leads = False

    async def run(self) -> None:
        """Lead, or wait to lead, until it is time to stop."""
        while not self._stopping.is_set():
            try:
                async with self._context.db.read() as lease:
                    await self._lead(lease)
            except _DATABASE_ERRORS as err:
                log.warning("worker lost the database", extra={"f": {"worker": self.name, "error": str(err)[:200]}})
            self.leads = False
            await self._pause()

    async def _lead(self, lease: Reader) -> None:
        """While ``lease``'s connection holds the lock: run what is due."""
        key = zlib.crc32(self.name.encode()) - (1 << 31)
        connection = lease.raw  # the very connection: what a pool does to it behind our back would move the lock
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1, $2)", _LOCK_SPACE, key):
            return
        self.leads = True
        log.info("worker leads", extra={"f": {"worker": self.name}})
        try:
            while not self._stopping.is_set():
                for job in self._jobs:
                    if self._due[job.name] <= time.monotonic() and not self._stopping.is_set():
                        await self._attempt(job)
                await self._pause()
                await connection.execute("SELECT 1")  # raises when the connection, and the lock with it, is gone
        finally:
            # The connection goes back to the pool and lives on there: the lock must not.
            if not connection.is_closed():
                await connection.execute("SELECT pg_advisory_unlock($1, $2)", _LOCK_SPACE, key)

    async def _attempt(self, job: Job) -> None:
        began = time.monotonic()
        try:
            did = await job.run(self._context)
        except Exception as err:  # a failing job must not end the others
            self.failures[job.name] += 1
            self._count(job, 1, began)
            pause = min(self._context.settings.retry_max_seconds, 2.0 ** self.failures[job.name])
            fields = {"job": job.name, "error": f"{type(err).__name__}: {err}"[:300], "again_in": f"{pause:.0f}s"}
            known = isinstance(err, Problem) and err.retryable
            log.log(logging.WARNING if known else logging.ERROR, "job failed", exc_info=not known, extra={"f": fields})
            self._due[job.name] = time.monotonic() + pause
            return
        self.failures[job.name] = 0
        self._count(job, 0, began)
        self._due[job.name] = began + job.every_seconds
        if did:
            log.info(
                "job done", extra={"f": {"job": job.name, "did": did, "ms": int((time.monotonic() - began) * 1000)}}
            )

    def _count(self, job: Job, outcome: int, began: float) -> None:
        self.runs[job.name][outcome] += 1
        self.runs[job.name][2] += time.monotonic() - began

    async def _pause(self) -> None:
        """A tick, or less when it is time to stop."""
        try:
            async with asyncio.timeout(self._context.settings.tick_seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass
