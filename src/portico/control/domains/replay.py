"""Events that are applied again: one, those that fit a filter, and dead ones by themselves.

To apply an event again is harmless, whatever came meanwhile: the state is a function of the set of events. So it is what an
operator does after the fault that killed events was mended, after a domain was added that events came for before it was
there, and after an update has given events a meaning that had none.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.audit.replays import NAMED, Replays
from portico.control.domains import event_store as store
from portico.errors import Problem
from portico.kit.db import Database, Tx
from portico.kit.ids import new_id
from portico.settings import WorkerSettings

#: Who an audit row names for what the platform does by itself.
PLATFORM: Final = Caller("operator", "installation", None)
_REPLAYABLE: Final = (store.events.c.queue_state != "pending") & (store.events.c.status != "forgotten")
REPLAYS: Final = Replays("cert_event", store.events, _REPLAYABLE, store.matching, store.replay)


async def one(tx: Tx, caller: Caller, event: str, reason: str) -> dict[str, Any]:
    """Apply one event again. Raises ``cert.event_not_found``, ``cert.event_forgotten`` and ``cert.event_pending``."""
    row = await store.one(tx, event)
    if row is None:
        raise Problem("cert.event_not_found")
    if row.status == "forgotten":
        raise Problem("cert.event_forgotten")
    if (made := await REPLAYS.one(tx, caller, event, reason, {})) is None:
        raise Problem("cert.event_pending")
    return made


async def automatically(db: Database, settings: WorkerSettings, now: datetime) -> int:
    """Give dead events another chance by themselves: few at a time, not before they have lain for a while, a few times each."""
    if settings.cert_auto_replay_limit == 0:
        return 0
    c = store.events.c
    conditions = [
        c.queue_state == "dead",
        c.automatic_replays < settings.cert_auto_replay_times,
        c.finished_at < now - timedelta(seconds=settings.cert_auto_replay_cooldown_seconds),
        c.received_at > now - timedelta(seconds=settings.cert_auto_replay_age_seconds),
    ]
    async with db.transaction() as tx:
        replay_id = new_id("rpl")
        ids = await store.replay(tx, conditions, replay_id, settings.cert_auto_replay_limit, automatic=True)
        if ids:
            details = {"reason": "automatic", "replay": replay_id, "replayed": len(ids), "events": ids[:NAMED]}
            await audit.record(
                tx, PLATFORM, "cert_event.replay_many", None, details=details, organization=audit.INSTALLATION
            )
    return len(ids)
