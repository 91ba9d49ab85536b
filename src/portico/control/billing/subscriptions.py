"""Subscriptions: the row behind a provider's reference, and what its events make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.billing import billing_store as store
from portico.control.billing import checkout_store, subscription_states
from portico.control.billing.billing_store import Source
from portico.control.billing.subscription_states import Snapshot, State
from portico.control.finance.events import FinanceEvent
from portico.kit.db import Reader, Tx

#: Kinds whose events are snapshots of a subscription.
SNAPSHOTS = "subscription."
WORKER = Caller("operator", "billing", None)


@dataclass(frozen=True, slots=True)
class Said:
    """What one more snapshot came to: ``moved``, ``superseded`` by what a newer one said, or ``illegal``."""

    outcome: str
    before: Any
    after: Any


async def by_ref(reader: Reader, provider: str, account: str, livemode: bool, ref: str) -> Any | None:
    """The row of a subscription by what its provider calls it."""
    return await store.subscription(reader, Source(provider, account, livemode), ref)


async def of(tx: Tx, organization: str, event: FinanceEvent) -> Any | None:
    """The row of the subscription that an event names, made if it is the first to do so; ``None`` when it names none."""
    if event.subscription_ref is None or event.provider == "platform":
        return None
    source = Source.of(event)
    found = await store.subscription(tx, source, event.subscription_ref)
    if found is None:
        found = await store.add_subscription(tx, organization, source, event.subscription_ref, event.customer_ref)
    if found.checkout_plan is None and (page := await _page(tx, source, event)) is not None:
        await store.bought(tx, found.id, page.plan, page.plan_version)
        found = await store.subscription_by_id(tx, found.id)
    return found


async def _page(reader: Reader, source: Source, event: FinanceEvent) -> Any | None:
    """The checkout that led to the subscription of an event."""
    if event.checkout_ref is not None:
        return await checkout_store.by_ref(reader, source, event.checkout_ref)
    return await checkout_store.by_subscription(reader, source, event.subscription_ref or "")


async def say(tx: Tx, row: Any, event: FinanceEvent) -> Said:
    """Keep what ``event`` says of a subscription, and fold it with everything else that was said."""
    said = Snapshot(
        event.effect_key, event.event_id, event.object_version, event.occurred_at, event.status, event.plan_ref,
        event.cancel_at_period_end, event.period_start, event.period_end,
    )  # fmt: skip
    before = state_of(row)
    await store.add_snapshot(tx, row.id, said)
    everything = await store.snapshots(tx, row.id)
    after, refused = subscription_states.derive(everything)
    newest = max(everything, key=lambda each: each.place)
    if after != before:
        await store.put_state(tx, row.id, after)
        await _record(tx, row, before, after, event)
    now = await store.subscription_by_id(tx, row.id)
    if said.effect_key in refused:
        return Said("illegal", row, now)
    return Said("moved" if after != before or newest == said else "superseded", row, now)


def state_of(row: Any) -> State:
    """The columns of a row that are folded."""
    return State(
        row.status, row.object_version, row.status_at, row.plan_ref, row.cancel_at_period_end, row.period_start,
        row.period_end,
    )  # fmt: skip


async def _record(tx: Tx, row: Any, before: State, after: State, event: FinanceEvent) -> None:
    facts = {"provider": row.provider, "event": event.event_id, "status": after.status, "before": before.status}
    if before.cancel_at_period_end != after.cancel_at_period_end:
        facts["cancel_at_period_end"] = after.cancel_at_period_end
    await audit.record(tx, WORKER, "subscription.change", row.id, details=facts, organization=row.organization_id)
