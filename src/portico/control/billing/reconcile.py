"""A provider's own list of events against ours: what nobody told us of is taken in as if it had been told.

A run is a row: it says from when to when, what the list had, what was missing here, and who asked for it or that it was due. It
takes events into the same queue as webhooks do; whose webhook comes after all is a duplicate. Where a provider lists no events,
its adapter makes them from lists of objects, and effects that are there already count once.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.billing import reconcile_store as runs
from portico.control.billing import webhook_body as bodies
from portico.control.billing import webhook_store as store
from portico.control.billing.objectives import PLATFORM
from portico.control.billing.provider import Name
from portico.control.billing.provider_settings import configured
from portico.control.billing.reconcile_store import Found
from portico.control.billing.webhook_body import Unreadable
from portico.control.billing.webhooks import account_of, mismatch, new_row
from portico.errors import Problem
from portico.kit import queue
from portico.kit.batches import delete_in_batches
from portico.kit.clock import Clock
from portico.kit.db import Database, Tx
from portico.kit.ids import new_id
from portico.kit.queue import Hopeless, Work
from portico.kit.sealing import Sealer
from portico.settings import ApiSettings

KIND: Final = runs.KIND
#: Listed events that one transaction takes in.
_BATCH: Final = 100


class Lister(Protocol):
    """What is asked of a provider."""

    def list_events(self, since: datetime, until: datetime | None = None) -> AsyncIterator[Mapping[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What a run takes. ``of`` gives the adapter of a provider, and raises ``billing.provider_unconfigured``."""

    settings: ApiSettings
    sealer: Sealer
    clock: Clock
    of: Callable[[Name], Lister]


async def ask(
    tx: Tx, caller: Caller, provider: Name, since: datetime | None, reason: str, *, dry_run: bool, settings: ApiSettings,
    now: datetime,
) -> Any:  # fmt: skip
    """Ask for a run; its row. Raises ``billing.provider_unconfigured``."""
    if provider not in configured(settings):
        raise Problem(
            "billing.provider_unconfigured", f"{provider} is not set up on this installation", provider=provider
        )
    row = await runs.add(
        tx,
        {
            "id": new_id("rcn"), "provider": provider, "since": since or await _since(tx, provider, settings, now),
            "until": now, "dry_run": dry_run, "reason": reason, "requested_by": caller.user_id or caller.id,
            "scheduled": False,
        },
    )  # fmt: skip
    details = {"reason": reason, "provider": provider, "since": row.since.isoformat(), "dry_run": dry_run}
    await audit.record(
        tx, caller, "billing_webhook.reconcile", row.id, details=details, organization=audit.INSTALLATION
    )
    return row


async def schedule(db: Database, settings: ApiSettings, now: datetime) -> int:
    """Ask for what is due: a run of each provider, unless one waits; how many."""
    count = 0
    for provider in sorted(configured(settings)):
        async with db.transaction() as tx:
            row = {
                "id": new_id("rcn"), "provider": provider, "since": await _since(tx, provider, settings, now),
                "until": now - timedelta(seconds=settings.billing_reconcile_grace_seconds), "dry_run": False,
                "reason": "due", "requested_by": PLATFORM.id, "scheduled": True,
            }  # fmt: skip
            count += await runs.add_scheduled(tx, row)
    return count


async def _since(tx: Tx, provider: str, settings: ApiSettings, now: datetime) -> datetime:
    """From where the last run of a provider has ended, and some time before."""
    last = await runs.last_until(tx, provider)
    if last is None:
        return now - timedelta(seconds=settings.billing_reconcile_first_seconds)
    return last - timedelta(seconds=settings.billing_reconcile_overlap_seconds)


async def run(work: Work, tools: Tools) -> None:
    """The handler of the queue."""
    row, found = work.row, Found()
    try:
        adapter = tools.of(row["provider"])
    except Problem as problem:
        raise Hopeless(problem.detail) from None
    batch: list[Mapping[str, Any]] = []
    async with work.call():
        # Between two pages of the list what came is stored: no transaction is open while the next one is asked for.
        async for document in adapter.list_events(row["since"], row["until"]):
            batch.append(document)
            if len(batch) >= _BATCH:
                await _take(work, tools, batch, found)
                batch = []
    if batch:
        await _take(work, tools, batch, found)
    async with work.done() as tx:
        await runs.finish(tx, work.id, found)
        if row["scheduled"] and not found.missing:
            return
        details = {
            "provider": row["provider"], "dry_run": row["dry_run"], "listed": found.listed, "missing": found.missing,
            "added": found.added, "foreign": found.foreign, "unreadable": found.unreadable, "events": found.first,
        }  # fmt: skip
        await audit.record(
            tx, PLATFORM, "billing_webhook.reconciled", work.id, details=details, organization=audit.INSTALLATION
        )


async def _take(work: Work, tools: Tools, batch: Sequence[Mapping[str, Any]], found: Found) -> None:
    """Take in what of a batch is not here. Harmless when it happens twice: of one event there is one row."""
    rows = [row for document in batch if (row := _row(work, tools, document, found)) is not None]
    async with work.step() as tx:
        there = await store.rivals(tx, rows) if rows else {}
        absent = [row for place, row in enumerate(rows) if place not in there]
        new = set() if work.row["dry_run"] or not absent else await store.insert(tx, absent)
        if new:
            await queue.wake(tx, store.KIND)
    found.missing += len(absent)
    found.added += len(new)
    found.first += [row["event_id"] for row in absent][: runs.NAMED - len(found.first)]


def _row(work: Work, tools: Tools, document: Mapping[str, Any], found: Found) -> dict[str, Any] | None:
    """A listed event as a row of ``billing_webhook_events``; ``None`` for what is not ours or says too little."""
    provider, settings = work.row["provider"], tools.settings
    found.listed += 1
    body = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    try:
        facts = bodies.facts_of(provider, document, None, body)
    except Unreadable:
        found.unreadable += 1
        return None
    if mismatch(settings, provider, facts.account, facts.livemode) is not None:
        found.foreign += 1
        return None
    return new_row(provider, facts, body, tools.sealer) | {
        "account": account_of(settings, provider),
        "livemode": settings.billing_livemode,
        "received_at": tools.clock.wall(),
        "origin": "reconcile",
        "proven": True,
        "proof": "list",
        "status": "verified",
        "reason": None,
        "queue_state": "pending",
    }


async def clear(db: Database, settings: ApiSettings, now: datetime) -> None:
    """Delete runs past the time for which events are kept."""
    before = now - timedelta(seconds=settings.billing_webhook_keep_seconds)
    await delete_in_batches(db, runs.runs, (runs.runs.c.created_at < before) & (runs.runs.c.queue_state != "pending"))
