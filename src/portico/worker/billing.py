"""The worker `billing`: what happens to money outside of requests."""

from __future__ import annotations

from portico.settings import WorkerSettings
from portico.worker import billing_ledger, billing_reports, billing_subscriptions, billing_webhooks
from portico.worker.jobs import Job


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, at the intervals of the settings; each is harmless when it runs twice."""
    return [
        *billing_ledger.jobs(settings),
        *billing_subscriptions.jobs(settings),
        *billing_webhooks.jobs(settings),
        *billing_reports.jobs(settings),
    ]
