"""The worker `maintenance`: what has to be swept up, so that tables stay small."""

from __future__ import annotations

from datetime import timedelta

from portico.control import requests
from portico.control.audit import checkpoint_files, checkpoints
from portico.control.audit import service as audit
from portico.control.billing import departure as billing_departure
from portico.control.domains import departure as domain_departure
from portico.control.identity import exports, plans
from portico.control.identity.signing_keys import SigningKeys
from portico.control.tunnels import departure as tunnel_departure
from portico.control.tunnels import jobs as tunnel_jobs
from portico.kit import outbox, queue
from portico.kit.batches import until_done
from portico.kit.queue import Work
from portico.kit.sealing import Sealer
from portico.settings import WorkerSettings
from portico.worker import departures
from portico.worker.jobs import Context, Job

CLEAR_TUNNELS = queue.plain("tunnels.clear")
EXPIRE_REQUESTS = queue.plain("requests.expire")
CLEAR_OUTBOX = queue.plain("outbox.clear")
CHAIN_AUDIT = queue.plain("audit.chain")
CHECKPOINT_AUDIT = queue.plain("audit.checkpoint")
STORE_CHECKPOINTS = queue.plain("audit.store")
TRIM_AUDIT = queue.plain("audit.trim")
DELETE_ORGANIZATIONS = queue.plain("organizations.delete")
SWEEP_EXPORTS = queue.plain("organizations.sweep_exports")

# Chains that one transaction signs.
_CHECKPOINTS = 500
# Exports that one transaction deletes.
_EXPORTS = 100


def jobs(settings: WorkerSettings) -> list[Job]:
    """Its jobs, at the intervals of the settings; each is harmless when it runs twice. What identity sweeps up, each API
    process does itself: it holds the times of use of keys, and it must be able to rotate signing keys when no worker runs."""
    return [
        Job(CLEAR_TUNNELS, clear_tunnels, settings.clear_tunnels_seconds),
        Job(EXPIRE_REQUESTS, expire_requests, settings.expire_requests_seconds),
        Job(CLEAR_OUTBOX, clear_outbox, settings.clear_outbox_seconds),
        Job(CHAIN_AUDIT, chain_audit, settings.chain_audit_seconds),
        Job(CHECKPOINT_AUDIT, checkpoint_audit, settings.checkpoint_audit_seconds),
        Job(STORE_CHECKPOINTS, store_checkpoints, settings.store_checkpoints_seconds),
        Job(TRIM_AUDIT, trim_audit, settings.trim_audit_seconds),
        Job(DELETE_ORGANIZATIONS, delete_organizations, settings.delete_organizations_seconds),
        Job(SWEEP_EXPORTS, sweep_exports, settings.sweep_exports_seconds),
        Job(exports.EXPORT, export_organization, limits={"concurrency": 1, "max_attempts": 5}),
    ]


async def clear_tunnels(context: Context, work: Work) -> None:
    """Ended sessions, old history, and old rows of the edge change table."""
    await tunnel_jobs.housekeeping(context.db, context.control)


async def expire_requests(context: Context, work: Work) -> None:
    """Remembered answers of idempotent requests, past their life."""
    await requests.expire(context.db, context.clock.wall(), context.control.idempotency_seconds)


async def clear_outbox(context: Context, work: Work) -> None:
    """Messages that were sent, or died, long ago. Their keys go with them."""
    await outbox.clear(context.db, context.settings.outbox_keep_seconds)


async def chain_audit(context: Context, work: Work) -> None:
    """Give audit rows that have no number yet (of frequent acts, and of older code) their places in the chains."""
    await audit.catch_up(context.db)


async def checkpoint_audit(context: Context, work: Work) -> None:
    """Sign where each audit chain that has grown now ends; before that, take in rows that have no number."""
    await audit.catch_up(context.db)
    keys = _keys(context)
    count = _CHECKPOINTS
    while count == _CHECKPOINTS:
        async with context.db.transaction() as tx:
            count = await checkpoints.sign(tx, keys.current_signer, context.clock.wall(), _CHECKPOINTS)


async def delete_organizations(context: Context, work: Work) -> None:
    """Organizations whose days of grace are over."""
    await departures.run(context)


async def export_organization(context: Context, work: Work) -> None:
    """Make the file of an export."""
    sources = {
        **exports.SOURCES, **tunnel_departure.SOURCES, **domain_departure.SOURCES, **billing_departure.SOURCES
    }  # fmt: skip
    await exports.make(work, context.control, sources, context.clock.wall())


async def sweep_exports(context: Context, work: Work) -> None:
    """Exports that are over, and files that no export names."""
    now = context.clock.wall()
    await until_done(context.db, lambda tx: exports.sweep(tx, context.control, now, _EXPORTS), _EXPORTS)
    async with context.db.transaction() as tx:
        await exports.forget_strays(tx, context.control, now)


async def trim_audit(context: Context, work: Work) -> None:
    """Audit rows past their retention: the installation's, or that of the organization's plan where it is shorter."""
    now, signer = context.clock.wall(), _keys(context).current_signer
    if days := context.control.audit_retention_days:
        await audit.trim(context.db, now - timedelta(days=days), signer, now)
    async with context.db.read() as reader:
        kept = await plans.retention(reader, "audit_days")
    for days, organizations in kept.items():
        await audit.trim(context.db, now - timedelta(days=days), signer, now, organizations)


async def store_checkpoints(context: Context, work: Work) -> None:
    """Write new checkpoints into the folder outside of the database, if there is one."""
    if (folder := context.settings.checkpoint_folder) is not None:
        await checkpoint_files.store(context.db, folder, context.clock.wall())


def _keys(context: Context) -> SigningKeys:
    return SigningKeys(context.control, Sealer(context.control.master_key), context.clock)
