"""Events of payment providers that are applied again: one, those that fit a filter, and dead ones by themselves (objectives.py).

To apply an event again is harmless, whatever came meanwhile: its objects are fetched anew, an effect counts once, and older
versions never overwrite newer ones. Every replay has a reason, and a row in the audit log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.billing import webhook_store as store
from portico.errors import Problem
from portico.kit.db import Tx
from portico.kit.ids import new_id

#: Ids that an answer and an audit row name.
NAMED: Final = 20


async def one(tx: Tx, caller: Caller, event: str, reason: str) -> dict[str, Any]:
    """Apply one event again. Raises ``billing.webhook_not_found``, ``billing.webhook_pending`` and ``billing.webhook_gone``."""
    row = await store.one(tx, event, lock=True)
    if row is None:
        raise Problem("billing.webhook_not_found")
    replay_id = new_id("rpl")
    if not await store.replay(tx, [store.events.c.id == event], replay_id, 1):
        raise Problem("billing.webhook_pending" if row.queue_state == "pending" else "billing.webhook_gone")
    details = {"reason": reason, "replay": replay_id, "provider": row.provider, "event": row.event_id}
    await audit.record(tx, caller, "billing_webhook.replay", event, details=details, organization=audit.INSTALLATION)
    return {"replay": replay_id, "matched": 1, "replayed": 1, "events": [event], "dry_run": False}


async def many(
    tx: Tx, caller: Caller, filters: Mapping[str, Any], reason: str, limit: int, *, dry_run: bool
) -> dict[str, Any]:
    """Apply events again that fit a filter, the oldest first, ``limit`` at most; or say which they would be."""
    conditions = [store.REPLAYABLE, *store.matching(filters)]
    matched = await store.count(tx, conditions)
    replay_id: str | None = None
    if dry_run:
        ids = await store.first(tx, conditions, min(limit, NAMED))
        replayed = 0
    else:
        replay_id = new_id("rpl")
        ids = await store.replay(tx, conditions, replay_id, limit)
        replayed = len(ids)
    shown = {name: str(value) for name, value in filters.items() if value is not None}
    details = {
        "reason": reason, "filter": shown, "matched": matched, "replayed": replayed, "replay": replay_id,
        "dry_run": dry_run, "events": ids[:NAMED],
    }  # fmt: skip
    await audit.record(
        tx, caller, "billing_webhook.replay_many", None, details=details, organization=audit.INSTALLATION
    )
    return {"replay": replay_id, "matched": matched, "replayed": replayed, "events": ids[:NAMED], "dry_run": dry_run}
