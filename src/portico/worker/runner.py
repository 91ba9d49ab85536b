"""The worker process: which kinds of jobs it runs, by ``kit/queue_runner.py``, until an orderly end.

Any number of worker processes may run the same kinds at the same time: a job is leased to one of them.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Sequence

from portico.control.billing import provider
from portico.control.domains import jobs_distribution
from portico.errors import Problem
from portico.kit import metrics, notify
from portico.kit.clock import SystemClock
from portico.kit.db import Database, PoolLimits
from portico.kit.queue_runner import KindRunner, Pace, Schedules, Served, Wakes
from portico.settings import ApiSettings, WorkerSettings
from portico.worker import billing, billing_webhooks, certificate_orders, certificates, maintenance, notifications
from portico.worker import metrics as worker_metrics
from portico.worker.billing_figures import BillingFigures
from portico.worker.certificate_figures import CertificateFigures
from portico.worker.counted import Counted
from portico.worker.jobs import Context, Job

log = logging.getLogger("portico.worker")

#: Every worker by name.
WORKERS: dict[str, Callable[[WorkerSettings], list[Job]]] = {
    "billing": billing.jobs,
    "certificates": certificates.jobs,
    "maintenance": maintenance.jobs,
    "notifications": notifications.jobs,
}


def choose(settings: WorkerSettings, names: Sequence[str]) -> list[Job]:
    """The jobs of the named workers, or of the kinds named; of every worker when none is. ``config.invalid``: no such name."""
    by_worker = {worker: make(settings) for worker, make in WORKERS.items()}
    by_kind = {job.kind.name: [job] for jobs in by_worker.values() for job in jobs}
    known = by_worker | by_kind
    if unknown := [name for name in names if name not in known]:
        detail = (
            f"no worker is named {', '.join(unknown)}; workers: {', '.join(by_worker)}; kinds: {', '.join(by_kind)}"
        )
        raise Problem("config.invalid", detail)
    return list({job.kind.name: job for name in names or by_worker for job in known[name]}.values())


async def serve(
    settings: WorkerSettings,
    control: ApiSettings,
    names: Sequence[str] = (),
    metrics_socket: socket.socket | None = None,
) -> None:
    """Run what is named (everything when nothing is) until SIGTERM or SIGINT, then let the jobs at work finish.

    Raises ``config.invalid`` for an unknown name, and for settings that do not fit together.
    """
    jobs = choose(settings, names)
    notifications.check(control)
    certificate_orders.check(settings, control)
    certificates.check(settings)
    provider.configured(control)
    stopping = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopping.set)
    db = Database(
        settings.database_url.reveal(), PoolLimits(size=settings.database_pool_size), application="portico worker"
    )
    try:
        await run(Context(settings, control, db, SystemClock()), jobs, stopping, metrics_socket)
    finally:
        await db.close()


async def run(
    context: Context, jobs: Sequence[Job], stopping: asyncio.Event, metrics_socket: socket.socket | None = None
) -> None:
    """Run ``jobs`` until ``stopping``."""
    settings, db = context.settings, context.db
    pace = Pace(settings.tick_seconds, settings.queue_count_seconds)
    served = [Served(job.kind, job.handler(context), job.limited(settings)) for job in jobs]
    runners = [KindRunner(each, db, stopping, pace) for each in served]
    every = {job.kind: job.every_seconds for job in jobs if job.every_seconds is not None}
    counted = _counted(context, jobs)
    shown = await metrics.serve(
        worker_metrics.DECLARED, lambda: worker_metrics.read(runners, counted), lambda: not stopping.is_set(),
        settings, metrics_socket,
    )  # fmt: skip
    wakes = asyncio.create_task(Wakes(runners, db, "portico worker wakes").run(), name="wakes")
    beside = [wakes]
    if shown is not None:  # nobody reads them otherwise
        beside += [asyncio.create_task(each.run(), name=f"figures of {each.what}") for each in counted]
    tasks = [asyncio.create_task(runner.run(settings.shutdown_seconds), name=runner.kind.name) for runner in runners]
    tasks.append(asyncio.create_task(Schedules(every, db, stopping, pace).run(), name="schedules"))
    notify.ready(settings.notify_fd)
    log.info("worker ready", extra={"f": {"kinds": ",".join(runner.kind.name for runner in runners)}})
    try:
        # A part that ends before its time is a fault: it ends the process, and whoever keeps it starts another.
        stop = asyncio.create_task(stopping.wait())
        wakes.add_done_callback(lambda _: stopping.set())
        await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_EXCEPTION)
        stop.cancel()
        stopping.set()
        await asyncio.gather(*tasks)
        if wakes.done():
            wakes.result()
    finally:
        for task in (*beside, *tasks):
            task.cancel()
        await asyncio.gather(*beside, *tasks, return_exceptions=True)
        if shown is not None:
            await shown.close()


def _counted(context: Context, jobs: Sequence[Job]) -> list[Counted]:
    """What is counted in this process: certificates where somebody sees to where these are, billing where it is watched."""
    kinds, every = {job.kind for job in jobs}, context.settings.queue_count_seconds
    found: list[Counted] = []
    if jobs_distribution.SETTLE in kinds:
        found.append(CertificateFigures(context.db, every))
    if billing_webhooks.WATCH in kinds:
        found.append(BillingFigures(context.db, every))
    return found
