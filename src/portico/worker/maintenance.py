"""The worker `maintenance`: what has to be swept up, so that tables stay small."""

from __future__ import annotations

from portico.control import requests
from portico.control.tunnels import jobs as tunnel_jobs
from portico.settings import WorkerSettings
from portico.worker.jobs import Context, Job


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, at the intervals of the settings. What identity sweeps up, each API process does itself: it holds the
    times of use of keys, and it must be able to rotate signing keys when no worker runs."""
    return [
        Job("tunnels.clear", settings.clear_tunnels_seconds, clear_tunnels),
        Job("requests.expire", settings.expire_requests_seconds, expire_requests),
    ]


async def clear_tunnels(context: Context) -> str:
    """Ended sessions, old history, and old rows of the edge change table."""
    await tunnel_jobs.housekeeping(context.db, context.control)
    return ""


async def expire_requests(context: Context) -> str:
    """Remembered answers of idempotent requests, past their life."""
    async with context.db.transaction() as tx:
        count = await requests.expire(tx, context.clock.wall(), context.control.idempotency_seconds)
    return f"{count} answers" if count else ""
