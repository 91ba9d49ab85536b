"""Events of payment providers that are applied again: one, those that fit a filter, and dead ones by themselves (objectives.py).

To apply an event again is harmless, whatever came meanwhile: its objects are fetched anew, an effect counts once, and older
versions never overwrite newer ones.
"""

from __future__ import annotations

from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit.replays import Replays
from portico.control.billing import webhook_store as store
from portico.errors import Problem
from portico.kit.db import Tx

REPLAYS: Final = Replays("billing_webhook", store.events, store.REPLAYABLE, store.matching, store.replay)


async def one(tx: Tx, caller: Caller, event: str, reason: str) -> dict[str, Any]:
    """Apply one event again. Raises ``billing.webhook_not_found``, ``billing.webhook_pending`` and ``billing.webhook_gone``."""
    row = await store.one(tx, event, lock=True)
    if row is None:
        raise Problem("billing.webhook_not_found")
    facts = {"provider": row.provider, "event": row.event_id}
    if (made := await REPLAYS.one(tx, caller, event, reason, facts)) is None:
        raise Problem("billing.webhook_pending" if row.queue_state == "pending" else "billing.webhook_gone")
    return made
