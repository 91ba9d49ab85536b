"""Jobs of the worker `billing` on the ledger: revenue is recognized a day at a time, summed up by day, and months are sealed."""

from __future__ import annotations

from datetime import UTC

from portico.control.finance import recognition, revenue, seals
from portico.kit import queue
from portico.kit.queue import Work
from portico.settings import WorkerSettings
from portico.worker.jobs import Context, Job

RECOGNIZE = queue.plain("billing.recognize")
SUM_UP = queue.plain("billing.sum_up_revenue")
SEAL = queue.plain("billing.seal_ledger")


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs."""
    return [
        Job(RECOGNIZE, recognize, settings.recognize_revenue_seconds),
        Job(SUM_UP, sum_up, settings.sum_up_revenue_seconds),
        Job(SEAL, seal, settings.seal_ledger_seconds),
    ]


async def recognize(context: Context, work: Work) -> None:
    """Deferred revenue of the days that are over."""
    today = context.clock.wall().astimezone(UTC).date()
    await recognition.advance(context.db, today, context.settings.recognize_revenue_batch)


async def sum_up(context: Context, work: Work) -> None:
    """Days that the ledger got transactions for."""
    await revenue.refresh(context.db)


async def seal(context: Context, work: Work) -> None:
    """The month that is over."""
    await seals.seal_month(context.db, context.clock.wall(), context.settings.seal_ledger_after_days)
