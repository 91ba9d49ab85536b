"""Housekeeping: delete what is over."""

from __future__ import annotations

from portico.control import changes
from portico.control.identity import plans
from portico.control.tunnels import claim_store, history, relay_store, session_store, store, usage_store
from portico.kit.db import Database
from portico.settings import ApiSettings


async def housekeeping(db: Database, settings: ApiSettings) -> None:
    """One round. Safe to run in several processes at once: every step is an idempotent delete."""
    async with db.transaction() as tx:
        await history.relays_fell_silent(tx, settings.relay_lease_seconds)
    async with db.transaction() as tx:
        await claim_store.clear(tx, settings.name_cooldown_seconds, settings.cooling_names_per_organization)
    async with db.transaction() as tx:
        await store.free_orphaned_ports(tx)
    await session_store.clear(db, settings.grant_outage_grace_seconds)
    await relay_store.clear(db, settings.grant_outage_grace_seconds)
    await usage_store.clear(db, settings.tunnel_history_seconds)
    await store.clear_events(db, settings.tunnel_history_seconds)
    async with db.read() as reader:
        kept = await plans.retention(reader, "events_days")
    for days, organizations in kept.items():
        await store.clear_events(db, days * 86_400.0, organizations)
    async with db.transaction() as tx:
        await changes.trim(
            tx, keep_seconds=settings.edge_changes_keep_seconds, keep_rows=settings.edge_changes_keep_rows
        )
