"""Jobs of the worker `billing` about reports and settlement: what is made, sent, expired, and compared."""

from __future__ import annotations

from portico.control.billing import export_delivery, export_store, exports, settlement, settlement_store
from portico.kit import outbox, queue
from portico.kit.batches import until_done
from portico.kit.queue import Work
from portico.kit.sealing import Sealer
from portico.settings import WorkerSettings
from portico.worker import notifications
from portico.worker.jobs import Context, Job

SCHEDULES = queue.plain("billing.report_schedules")
SWEEP = queue.plain("billing.sweep_reports")
WATCH = queue.plain("billing.watch_settlements")
# Reports that one transaction ends.
_REPORTS = 100


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, each harmless when it runs twice."""
    making = {
        "concurrency": 1,
        "max_attempts": settings.report_attempts,
        "timeout_seconds": settings.report_timeout_seconds,
    }
    comparing = {"concurrency": 1, "max_attempts": settings.settlement_attempts}
    return [
        Job(export_store.KIND, make_report, limits=making),
        Job(outbox.kind(export_delivery.DRIVER), deliver_report, limits=notifications.limits(settings)),
        Job(SCHEDULES, run_schedules, settings.report_schedules_seconds),
        Job(SWEEP, sweep_reports, settings.sweep_reports_seconds),
        Job(settlement_store.KIND, reconcile_settlement, limits=comparing),
        Job(WATCH, watch_settlements, settings.watch_settlements_seconds),
    ]


async def make_report(context: Context, work: Work) -> None:
    """Make the file of a report."""
    await exports.make(work, context.control, Sealer(context.control.master_key), context.clock)


async def deliver_report(context: Context, work: Work) -> None:
    """One attempt at a delivery."""
    sealer = Sealer(context.control.master_key)
    to = notifications.client(context.control)
    driver = export_delivery.ReportDriver(context.control, context.db, context.clock, sealer, to)
    await outbox.deliver(work, driver, sealer, driver.record)


async def run_schedules(context: Context, work: Work) -> None:
    """Reports of periods that have ended."""
    await exports.run_schedules(context.db, Sealer(context.control.master_key), context.clock.wall())


async def sweep_reports(context: Context, work: Work) -> None:
    """Reports past their time, those that died, and files that no report names."""
    now = context.clock.wall()
    await until_done(context.db, lambda tx: exports.sweep(tx, context.control, now, _REPORTS), _REPORTS)
    await exports.forget_strays(context.db, context.control, now)


async def reconcile_settlement(context: Context, work: Work) -> None:
    """Compare one receipt with what is recorded."""
    await settlement.reconcile(work, context.control, Sealer(context.control.master_key), context.clock)


async def watch_settlements(context: Context, work: Work) -> None:
    """Receipts for which events came late."""
    await settlement.watch(context.db, context.control, context.clock.wall())
