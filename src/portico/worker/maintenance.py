"""The worker `maintenance`: what has to be swept up, so that tables stay small."""

from __future__ import annotations

from portico.control import changes, requests
from portico.settings import WorkerSettings
from portico.worker.jobs import Context, Job


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, at the intervals of the settings."""
    return [
        Job("changes.trim", settings.trim_changes_seconds, trim_changes),
        Job("requests.expire", settings.expire_seconds, expire_requests),
    ]


async def trim_changes(context: Context) -> str:
    """Old rows of the edge change table; a relay that was away for longer gets a snapshot."""
    keep = context.control
    async with context.db.transaction() as tx:
        count = await changes.trim(
            tx, keep_seconds=keep.edge_changes_keep_seconds, keep_rows=keep.edge_changes_keep_rows
        )
    return f"{count} rows" if count else ""


async def expire_requests(context: Context) -> str:
    """Remembered answers of idempotent requests, past their life."""
    async with context.db.transaction() as tx:
        count = await requests.expire(tx, context.clock.wall(), context.control.idempotency_seconds)
    return f"{count} answers" if count else ""
