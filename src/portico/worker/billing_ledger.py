"""Jobs of the worker `billing` on the ledger: revenue is recognized a day at a time, summed up by day, months are sealed, and
the books are compared with their hashes."""

from __future__ import annotations

import logging
from datetime import UTC

from portico.control.billing import books
from portico.control.finance import recognition, revenue, seals
from portico.control.finance.ledger_figures import FIGURES
from portico.kit import queue
from portico.kit.queue import Work
from portico.settings import WorkerSettings
from portico.worker.jobs import Context, Job

RECOGNIZE = queue.plain("billing.recognize")
SUM_UP = queue.plain("billing.sum_up_revenue")
SEAL = queue.plain("billing.seal_ledger")
VERIFY = queue.plain("billing.verify_ledger")

log = logging.getLogger(__name__)


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs."""
    return [
        Job(RECOGNIZE, recognize, settings.recognize_revenue_seconds),
        Job(SUM_UP, sum_up, settings.sum_up_revenue_seconds),
        Job(SEAL, seal, settings.seal_ledger_seconds),
        Job(
            VERIFY, verify, settings.verify_ledger_seconds,
            limits={"concurrency": 1, "timeout_seconds": settings.verify_ledger_timeout_seconds},
        ),
    ]  # fmt: skip


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


async def verify(context: Context, work: Work) -> None:
    """All of the books. A fault is no failure of this job: it is found, and told until it is mended."""
    outcome = await books.look(context.db)
    FIGURES.found(outcome, context.clock, 2 * context.settings.verify_ledger_seconds)
    if outcome.fault is not None:
        facts = {"place": outcome.fault.place, "detail": outcome.fault.detail}
        log.error("the books are not what was written", extra={"f": facts})
