"""Jobs of the worker ``certificates`` about names: look at those that are due, forget those that were lost long ago.

A domain that is taken to be looked at is due again in a few minutes: of a worker that dies nothing is left to clear, and two
workers never look at one at the same time.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Any, Final

from portico.control.domains import frozen, store
from portico.control.domains.verification import Verification
from portico.kit import queue
from portico.kit.batches import until_done
from portico.kit.clock import Clock
from portico.kit.db import Database
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

CHECK: Final = queue.plain("domains.check")
PURGE: Final = queue.plain("domains.purge")
#: Domains that are taken at once, and looked at at once; how long a look may take, with everything that waits.
_BATCH: Final = 32
_LEASE: Final = timedelta(minutes=5)
_PURGED: Final = 500


async def check(db: Database, settings: ApiSettings, clock: Clock) -> int:
    """Look at every domain that is due; how many were."""
    verification, count = Verification(settings, clock, Sealer(settings.master_key)), 0
    while True:
        now = clock.wall()
        async with db.transaction() as tx:
            rows = await store.take_due(tx, now, _BATCH, now + _LEASE)
        await asyncio.gather(*(_check_one(db, verification, row) for row in rows))
        count += len(rows)
        if len(rows) < _BATCH:
            return count


async def _check_one(db: Database, verification: Verification, row: Any) -> None:
    """One domain; its trouble is not that of the others."""
    try:
        await verification.check(db, row)
    except Exception as err:
        fields = {"domain": row.id, "error": f"{type(err).__name__}: {err}"[:200]}
        log.warning("a domain could not be looked at", extra={"f": fields})


async def purge(db: Database, settings: ApiSettings, clock: Clock) -> None:
    """Forget domains that were lost long ago; let those serve for which there is room again."""
    await frozen.thaw(db)
    before = clock.wall() - timedelta(days=settings.domain_deleted_days)
    await until_done(db, lambda tx: store.purge(tx, before, _PURGED), _PURGED)
