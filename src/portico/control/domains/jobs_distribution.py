"""Jobs of the worker ``certificates`` about where certificates are: settle what is due, wrap for new keys of regions, and look at
what the public edge serves."""

from __future__ import annotations

import logging

from portico.control.domains import probe, replicas, vault
from portico.control.domains.incidents import Incidents
from portico.kit import queue
from portico.kit.db import Database
from portico.settings import ApiSettings, WorkerSettings

log = logging.getLogger(__name__)

SETTLE = queue.plain("certificates.settle")
REWRAP = queue.plain("certificates.rewrap")
PROBE = queue.plain("certificates.probe")


async def settle(db: Database, control: ApiSettings) -> None:
    """Switch to what every healthy relay has staged by now, and note which regions lag."""
    await replicas.sweep(db, replicas.Rules.of(control))


async def rewrap(db: Database, settings: WorkerSettings) -> None:
    """Wrap data keys for regions' keys that lack them; nothing without a key file, when there is nothing to seal with either."""
    if settings.certificate_key_file is None:
        return
    if count := await vault.of(settings).rewrap(db):
        log.info("data keys wrapped anew", extra={"f": {"certificates": count}})


async def look(db: Database, settings: WorkerSettings, incidents: Incidents) -> None:
    """See what visitors of each region are served for every domain; nothing without targets."""
    counts = await probe.run(db, settings, probe.telling(incidents))
    if counts.keys() - {"good"}:
        log.info("looked at the public edge", extra={"f": counts})
