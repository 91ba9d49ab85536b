"""Jobs of the worker `billing` about providers' webhooks: what was told becomes effects, and what was not told is looked for."""

from __future__ import annotations

from portico.control.billing import objectives, reconcile, webhook_jobs
from portico.control.billing.apply import Ignored
from portico.control.billing.webhook_certificates import Certificates
from portico.control.finance.events import FinanceEvent
from portico.kit import queue
from portico.kit.db import Tx
from portico.kit.queue import Work
from portico.kit.sealing import Sealer
from portico.settings import WorkerSettings
from portico.worker import billing_tools
from portico.worker.jobs import Context, Job

WATCH = queue.plain("billing.watch_webhooks")
RECONCILE_DUE = queue.plain("billing.reconcile_due")
CLEAR = queue.plain("billing.clear_webhooks")


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, each harmless when it runs twice."""
    half = max(1, settings.billing_webhook_concurrency // 2)
    applying = {
        "concurrency": settings.billing_webhook_concurrency,
        "lane_places": half,
        "group_places": half,
        "max_attempts": settings.billing_webhook_attempts,
        "backoff_seconds": settings.billing_webhook_retry_seconds,
        "backoff_max_seconds": settings.billing_webhook_retry_max_seconds,
    }
    listing = {"concurrency": 1, "timeout_seconds": settings.billing_reconcile_timeout_seconds}
    return [
        Job(webhook_jobs.KIND, apply_event, limits=applying),
        Job(reconcile.KIND, reconcile_events, limits=listing),
        Job(WATCH, watch, settings.billing_webhook_watch_seconds),
        Job(RECONCILE_DUE, reconcile_due, settings.billing_reconcile_seconds),
        Job(CLEAR, clear, settings.clear_billing_webhooks_seconds),
    ]


async def apply_event(context: Context, work: Work) -> None:
    """One event into subscriptions and the ledger."""
    control, applier = context.control, billing_tools.applier(context)

    async def apply(tx: Tx, event: FinanceEvent) -> str | None:
        outcome = await applier.apply(tx, event)
        return outcome.reason if isinstance(outcome, Ignored) else None

    certificates = Certificates(control, context.db, context.clock)
    of = billing_tools.providers(context).of
    await webhook_jobs.apply_event(
        work, webhook_jobs.Tools(control, Sealer(control.master_key), certificates, of, apply)
    )


async def reconcile_events(context: Context, work: Work) -> None:
    """A provider's own list against ours."""
    control = context.control
    tools = reconcile.Tools(control, Sealer(control.master_key), context.clock, billing_tools.providers(context).of)
    await reconcile.run(work, tools)


async def reconcile_due(context: Context, work: Work) -> None:
    """Ask for the comparisons that are due."""
    await reconcile.schedule(context.db, context.control, context.clock.wall())


async def watch(context: Context, work: Work) -> None:
    """How fast and how surely events become effects."""
    await objectives.watch(context.db, context.settings, context.clock.wall())


async def clear(context: Context, work: Work) -> None:
    """What is past its time."""
    await webhook_jobs.wait_no_longer(context.db, context.control, context.clock.wall())
    await webhook_jobs.clear(context.db, context.control, context.clock.wall())
    await reconcile.clear(context.db, context.control, context.clock.wall())
