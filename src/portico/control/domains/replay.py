"""Events that are applied again: one, those that fit a filter, and dead ones by themselves.

To apply an event again is harmless, whatever came meanwhile: the state is a function of the set of events. So it is what an
operator does after the fault that killed events was mended, after a domain was added that events came for before it was
there, and after an update has given events a meaning that had none. Every replay has a reason, and a row in the audit log.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import event_store as store
from portico.errors import Problem
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import new_id
from portico.settings import WorkerSettings

#: Ids that an answer and an audit row name.
_NAMED: Final = 20
#: Who an audit row names for what the platform does by itself.
PLATFORM: Final = Caller("operator", "installation", None)


async def one(tx: Tx, caller: Caller, event: str, reason: str) -> dict[str, Any]:
    """Apply one event again. Raises ``cert.event_not_found`` and ``cert.event_pending``."""
    if await store.one(tx, event) is None:
        raise Problem("cert.event_not_found")
    replay_id = new_id("rpl")
    if not await store.replay(tx, [store.events.c.id == event], replay_id, 1):
        raise Problem("cert.event_pending")
    details = {"reason": reason, "replay": replay_id}
    await audit.record(tx, caller, "cert_event.replay", event, details=details, organization=audit.INSTALLATION)
    return {"replay": replay_id, "matched": 1, "replayed": 1, "events": [event], "dry_run": False}


async def many(
    tx: Tx, caller: Caller, filters: Mapping[str, Any], reason: str, limit: int, *, dry_run: bool
) -> dict[str, Any]:
    """Apply events again that fit a filter, the oldest first, ``limit`` at most; or say which they would be."""
    conditions = store.matching(filters)
    matched = await store.count(tx, [store.events.c.queue_state != "pending", *conditions])
    replay_id: str | None = None
    if dry_run:
        ids = await would(tx, conditions, min(limit, _NAMED))
        replayed = 0
    else:
        replay_id = new_id("rpl")
        ids = await store.replay(tx, conditions, replay_id, limit)
        replayed = len(ids)
    shown = {name: str(value) for name, value in filters.items() if value is not None}
    details = {
        "reason": reason, "filter": shown, "matched": matched, "replayed": replayed, "replay": replay_id,
        "dry_run": dry_run, "events": ids[:_NAMED],
    }  # fmt: skip
    await audit.record(tx, caller, "cert_event.replay_many", None, details=details, organization=audit.INSTALLATION)
    return {"replay": replay_id, "matched": matched, "replayed": replayed, "events": ids[:_NAMED], "dry_run": dry_run}


async def would(reader: Reader, conditions: list[sa.ColumnElement[bool]], limit: int) -> list[str]:
    """The ids of events that a replay would take first."""
    c = store.events.c
    rows = await reader.fetch_all(
        sa.select(c.id).where(c.queue_state != "pending", *conditions).order_by(c.id).limit(limit)
    )
    return [row.id for row in rows]


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
            details = {"reason": "automatic", "replay": replay_id, "replayed": len(ids), "events": ids[:_NAMED]}
            await audit.record(
                tx, PLATFORM, "cert_event.replay_many", None, details=details, organization=audit.INSTALLATION
            )
    return len(ids)
