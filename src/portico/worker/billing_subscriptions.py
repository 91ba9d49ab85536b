"""Jobs of the worker `billing` about subscriptions: calls of providers that nobody waits for, dunning by the clock, use
beyond plans when its month is over."""

from __future__ import annotations

from portico.control.billing import checkout_store, dunning_jobs
from portico.kit import queue
from portico.kit.queue import Work
from portico.settings import WorkerSettings
from portico.worker import billing_tools
from portico.worker.jobs import Context, Job

DUNNING = queue.plain("billing.dunning")
OVERAGE = queue.plain("billing.overage")


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, each harmless when it runs twice."""
    return [
        Job(checkout_store.CALL, carry_out),
        Job(DUNNING, dunning, settings.dunning_seconds),
        Job(OVERAGE, overage, settings.overage_seconds),
    ]


async def carry_out(context: Context, work: Work) -> None:
    """A call that whoever asked for it did not live to make, that got no answer, or whose time has come."""
    await billing_tools.billing(context).calls.carry_out(work)


async def dunning(context: Context, work: Work) -> None:
    """Cases whose next day has come."""
    await dunning_jobs.round_(context.db, context.clock, billing_tools.applier(context))


async def overage(context: Context, work: Work) -> None:
    """Use beyond plans of months that are over."""
    await billing_tools.billing(context).overage_billing.round(context.db)
