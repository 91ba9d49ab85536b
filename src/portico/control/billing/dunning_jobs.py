"""What the clock does in dunning: cases whose next day has come are settled, each in a transaction of its own."""

from __future__ import annotations

import logging
from typing import Final

from portico.control.billing import billing_store, dunning_store
from portico.control.billing.apply import Applier
from portico.control.identity import plans
from portico.kit.clock import Clock
from portico.kit.db import Database

log = logging.getLogger(__name__)

#: Cases that one look is for.
ROUND: Final = 200


async def round_(db: Database, clock: Clock, applier: Applier) -> int:
    """Settle what is due; how many subscriptions. Any number of workers may: whoever comes second finds nothing to do."""
    seen = set[str]()
    while True:
        async with db.read() as reader:
            due = await dunning_store.due(reader, clock.wall(), ROUND, seen)
        for organization, subscription in due:
            seen.add(subscription)
            try:
                async with db.transaction() as tx:
                    known = await plans.hold(tx, organization) is not None
                    row = await billing_store.hold_subscription(tx, subscription)
                    await applier.settle(tx, row, known=known, reason="dunning")
            except Exception:
                # One that fails is no reason for the others to wait, however many those are; it is due still.
                log.exception("a dunning case was not settled", extra={"f": {"subscription": subscription}})
        if not due:
            return len(seen)
