"""How fast and how surely a provider's events become effects, and what is done by itself when that is not as it should be.

The objective of each provider, over a window: few events failed or dead, none that waits for too long, and a 95th percentile of
the time from receipt to effect. When it is broken, dead events of the window are applied again and failed ones are tried now, a
few at a time, and not again before a cool-down; two workers that look at once do so once. Each run is in the audit log.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.audit.replays import NAMED
from portico.control.billing import webhook_store as store
from portico.control.billing.provider import NAMES
from portico.kit.db import Database, Tx
from portico.kit.ids import new_id
from portico.settings import WorkerSettings

#: Who an audit row names for what the platform does by itself.
PLATFORM: Final = Caller("operator", "installation", None)


def broken(measured: Mapping[str, Any], settings: WorkerSettings) -> str | None:
    """Which part of the objective is broken: ``failures``, ``staleness``, ``latency``, or ``None``."""
    if measured["failed"] >= settings.billing_webhook_slo_failures:
        return "failures"
    if measured["stale"] > 0:
        return "staleness"
    if measured["p95"] is not None and measured["p95"] > settings.billing_webhook_slo_p95_seconds:
        return "latency"
    return None


async def watch(db: Database, settings: WorkerSettings, now: datetime) -> dict[str, int]:
    """Look at every provider; by provider, how many events a replay that was started took on."""
    found: dict[str, int] = {}
    for provider in NAMES:
        async with db.read() as reader:
            measured = await store.measure(
                reader,
                provider,
                settings.billing_webhook_slo_window_seconds,
                settings.billing_webhook_slo_stale_seconds,
            )
        async with db.transaction() as tx:
            if (count := await _settle(tx, provider, measured, settings, now)) is not None:
                found[provider] = count
    return found


async def _settle(
    tx: Tx, provider: str, measured: Mapping[str, Any], settings: WorkerSettings, now: datetime
) -> int | None:
    """Write down how it is, and start a replay when that is due. The row of the provider is locked meanwhile."""
    why = broken(measured, settings)
    row = await store.note_health(
        tx,
        {
            "provider": provider, "measured_at": now, "failed": measured["failed"], "stale": measured["stale"],
            "applied": measured["applied"], "p95_seconds": measured["p95"], "broken_by": why,
            "broken_since": None if why is None else now,
        },
    )  # fmt: skip
    limit, pause = settings.billing_webhook_auto_replay_limit, settings.billing_webhook_auto_replay_cooldown_seconds
    if why is None or limit == 0 or (row.replayed_at is not None and row.replayed_at > now - timedelta(seconds=pause)):
        return None
    c = store.events.c
    conditions = [
        c.provider == provider,
        c.queue_state == "dead",
        c.reason.is_distinct_from(store.WAITED),
        c.automatic_replays < settings.billing_webhook_auto_replay_times,
        c.received_at > now - timedelta(seconds=settings.billing_webhook_auto_replay_age_seconds),
    ]
    replay_id = new_id("rpl")
    ids = await store.replay(tx, conditions, replay_id, limit, automatic=True)
    hurried = await store.hurry(tx, provider, limit)
    await store.note_replay(tx, provider, now)
    details = {
        "reason": "automatic", "objective": why, "replay": replay_id, "replayed": len(ids), "hurried": hurried,
        "events": ids[:NAMED], "failed": measured["failed"], "stale": measured["stale"],
        "p95_milliseconds": None if measured["p95"] is None else round(measured["p95"] * 1000),
    }  # fmt: skip
    await audit.record(
        tx, PLATFORM, "billing_webhook.replay_many", provider, details=details, organization=audit.INSTALLATION
    )
    return len(ids) + hurried
