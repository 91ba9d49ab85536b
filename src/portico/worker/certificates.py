"""The worker `certificates`: what happens to domains and their certificates outside of requests."""

from __future__ import annotations

from portico.control.domains import jobs_distribution, jobs_verification, probe, vault
from portico.control.domains.incidents import Incidents
from portico.kit.queue import Work
from portico.kit.sealing import Sealer
from portico.settings import WorkerSettings
from portico.worker import certificate_events, certificate_orders
from portico.worker.jobs import Context, Job


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, at the intervals of the settings; each is harmless when it runs twice."""
    return [
        Job(jobs_verification.CHECK, check_domains, settings.check_domains_seconds),
        Job(jobs_verification.PURGE, purge_domains, settings.purge_domains_seconds),
        *certificate_events.jobs(settings),
        *certificate_orders.jobs(settings),
        Job(jobs_distribution.SETTLE, settle, settings.settle_certificates_seconds),
        Job(jobs_distribution.REWRAP, rewrap, settings.rewrap_certificates_seconds),
        Job(jobs_distribution.PROBE, look, settings.certificate_probe_seconds),
    ]


async def check_domains(context: Context, work: Work) -> None:
    """Look at the DNS of domains that are due."""
    await jobs_verification.check(context.db, context.control, context.clock)


async def purge_domains(context: Context, work: Work) -> None:
    """Forget domains that were lost long ago."""
    await jobs_verification.purge(context.db, context.control, context.clock)


async def settle(context: Context, work: Work) -> None:
    """Switch to certificates that every healthy relay has staged, and note which regions lag."""
    await jobs_distribution.settle(context.db, context.control)


async def rewrap(context: Context, work: Work) -> None:
    """Wrap data keys for keys of regions that were registered since."""
    await jobs_distribution.rewrap(context.db, context.settings)


async def look(context: Context, work: Work) -> None:
    """See what the public edge serves for every domain."""
    incidents = Incidents(context.control, Sealer(context.control.master_key), context.clock)
    await jobs_distribution.look(context.db, context.settings, incidents)


def check(settings: WorkerSettings) -> None:
    """Look at the key file and at where to look when the worker starts; raises ``config.invalid``."""
    if settings.certificate_key_file is not None:
        vault.of(settings)
    probe.targets(settings.certificate_probe_targets)
    probe.trusted(settings.certificate_probe_ca_file)
