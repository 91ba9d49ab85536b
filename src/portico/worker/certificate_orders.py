"""Getting certificates, as the worker `certificates` does it: orders, what is due, when authorities want renewals."""

from __future__ import annotations

from typing import Any

from portico.control.domains import jobs_acme
from portico.kit.queue import Work
from portico.settings import ApiSettings, WorkerSettings
from portico.worker.jobs import Context, Job


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, at the intervals of the settings."""
    return [
        Job(jobs_acme.ORDER, order, limits=_of_orders(settings)),
        Job(jobs_acme.SWEEP, sweep, settings.sweep_certificates_seconds),
        Job(jobs_acme.SUGGESTIONS, suggestions, settings.ask_renewals_seconds),
        Job(jobs_acme.TIDY, tidy, settings.tidy_certificates_seconds),
    ]


def _of_orders(settings: WorkerSettings) -> dict[str, Any]:
    half = max(1, settings.order_concurrency // 2)
    return {
        "concurrency": settings.order_concurrency,
        "lane_places": half,
        "group_places": half,
        "max_attempts": settings.order_max_attempts,
        "backoff_seconds": settings.order_retry_seconds,
        "backoff_max_seconds": settings.order_retry_max_seconds,
        "timeout_seconds": settings.order_timeout_seconds,
    }


async def order(context: Context, work: Work) -> None:
    """Go on with an order of a certificate."""
    await jobs_acme.order(work, context.settings, context.control)


async def sweep(context: Context, work: Work) -> None:
    """Order certificates that are due."""
    if jobs_acme.ready(context.settings, context.control):
        await jobs_acme.sweep(context.db, context.control)


async def suggestions(context: Context, work: Work) -> None:
    """Ask authorities when they want certificates renewed."""
    if jobs_acme.ready(context.settings, context.control):
        await jobs_acme.suggestions(context.db, context.control)


async def tidy(context: Context, work: Work) -> None:
    """Delete what is over for long."""
    await jobs_acme.tidy(context.db, context.control)


def check(settings: WorkerSettings, control: ApiSettings) -> None:
    """Look at the settings of authorities when the worker starts; raises ``config.invalid``."""
    jobs_acme.ready(settings, control)
