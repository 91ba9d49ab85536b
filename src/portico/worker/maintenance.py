"""The worker `maintenance`: what has to be swept up, so that tables stay small."""

from __future__ import annotations

from portico.control import requests
from portico.control.tunnels import jobs as tunnel_jobs
from portico.kit import outbox, queue
from portico.kit.queue import Work
from portico.settings import WorkerSettings
from portico.worker.jobs import Context, Job

CLEAR_TUNNELS = queue.plain("tunnels.clear")
EXPIRE_REQUESTS = queue.plain("requests.expire")
CLEAR_OUTBOX = queue.plain("outbox.clear")


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, at the intervals of the settings; each is harmless when it runs twice. What identity sweeps up, each API
    process does itself: it holds the times of use of keys, and it must be able to rotate signing keys when no worker runs."""
    return [
        Job(CLEAR_TUNNELS, clear_tunnels, settings.clear_tunnels_seconds),
        Job(EXPIRE_REQUESTS, expire_requests, settings.expire_requests_seconds),
        Job(CLEAR_OUTBOX, clear_outbox, settings.clear_outbox_seconds),
    ]


async def clear_tunnels(context: Context, work: Work) -> None:
    """Ended sessions, old history, and old rows of the edge change table."""
    await tunnel_jobs.housekeeping(context.db, context.control)


async def expire_requests(context: Context, work: Work) -> None:
    """Remembered answers of idempotent requests, past their life."""
    async with work.done() as tx:
        await requests.expire(tx, context.clock.wall(), context.control.idempotency_seconds)


async def clear_outbox(context: Context, work: Work) -> None:
    """Messages that were sent long ago. Their keys go with them."""
    async with work.done() as tx:
        await outbox.clear(tx, context.settings.outbox_keep_seconds)
