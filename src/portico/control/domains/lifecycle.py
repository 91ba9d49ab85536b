"""Verified events on their way into the state of domains.

    await lifecycle.record(tx, NewEvent(domain_id, "issuance", "succeeded", revision=3, certificate=…))     what we did ourselves

Every event is a row of ``certificate_lifecycle_events``, whoever it is from, and the worker ``certificates`` applies it: one
transaction that locks the domain, joins the event into its registers, derives the state, settles incidents, and ends the job. A
worker that dies in it has done nothing; one that does it again changes nothing (``certificate_state.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from portico.control.domains import edge, event_store, failure_policy, names, ownership
from portico.control.domains import store as domain_store
from portico.control.domains.certificate_state import Event, Registers, derive
from portico.control.domains.event_mapping import type_of
from portico.kit import queue
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, Reader, Tx
from portico.kit.ids import new_id
from portico.kit.queue import Work

KIND: Final = event_store.KIND
#: The facts of ``certificate_state.Event`` that an event carries.
FACTS: Final = (
    "serial", "fingerprint", "issuer", "not_before", "not_after", "renews_at", "error_code", "error_detail", "retry_at",
    "regions_active", "regions_total",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NewEvent:
    """Something that this installation did, or saw, about a domain's certificate.

    ``revision`` counts certificates of the domain (that of the vault); ``sequence`` is given out when it is ``None``. Times are
    aware. ``key``: of one key there is one event, however often it is recorded. ``object``: what it happened to (an order, a
    challenge, a version); all events of one object, class, action and revision tell of one effect.
    """

    domain_id: str
    callback_class: str
    callback_action: str
    revision: int
    sequence: int | None = None
    occurred_at: datetime | None = None
    serial: str | None = None
    fingerprint: str | None = None
    issuer: str | None = None
    not_before: datetime | None = None
    not_after: datetime | None = None
    renews_at: datetime | None = None
    ari_id: str | None = None
    error_code: str | None = None
    error_detail: str | None = None
    retry_at: datetime | None = None
    regions_active: int | None = None
    regions_total: int | None = None
    object: str | None = None
    key: str | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)


async def record(tx: Tx, event: NewEvent) -> str:
    """Record an event in the transaction of what it tells of; its id. The state follows when the worker has applied it.

    Raises ``ValueError`` for a class and an action that mean nothing, and for a domain that there is not: faults of the caller.
    """
    return (await record_all(tx, [event]))[0]


async def record_all(tx: Tx, events: Sequence[NewEvent]) -> list[str]:
    """The same of many events, in as many statements as of one."""
    names = await domain_store.names_of(tx, [event.domain_id for event in events])
    if gone := {event.domain_id for event in events} - names.keys():
        raise ValueError(f"there is no domain {min(gone)}")
    numbers = iter(await event_store.next_sequences(tx, sum(event.sequence is None for event in events)))
    rows = [
        _row(event, names[event.domain_id], next(numbers) if event.sequence is None else event.sequence)
        for event in events
    ]
    new = await event_store.insert(tx, rows)
    if new:
        await queue.wake(tx, KIND)
    pairs = [(event_store.PLATFORM, str(row["event_id"])) for row in rows if row["id"] not in new]
    known = await event_store.known(tx, pairs) if pairs else {}
    return [row["id"] if row["id"] in new else known[event_store.PLATFORM, row["event_id"]][0] for row in rows]


def _row(event: NewEvent, name: str, sequence: int) -> dict[str, Any]:
    event_type = type_of(event.callback_class, event.callback_action)
    if event_type is None:
        raise ValueError(f"{event.callback_class}.{event.callback_action} is not in the table of events")
    made = new_id("cev")
    facts = {name: value for name in (*FACTS, "ari_id") if (value := getattr(event, name)) is not None}
    row: dict[str, Any] = {
        "id": made,
        "source_id": event_store.PLATFORM,
        "event_id": event.key or made,
        "cluster_id": event_store.PLATFORM,
        "environment": event_store.PLATFORM,
        "domain_id": event.domain_id,
        "hostname": name,
        "callback_class": event.callback_class,
        "callback_action": event.callback_action,
        "event_type": event_type,
        "revision": event.revision,
        "sequence": sequence,
        "occurred_at": _text(event.occurred_at or datetime.now(UTC)),
        "facts": {name: _text(value) if isinstance(value, datetime) else value for name, value in facts.items()},
        "provenance": {"producer": "portico", **event.provenance},
        "key_id": None,
        "status": "queued",
        "queue_state": "pending",
    }
    last = event.serial or event.revision
    what = f"{event.object or event.domain_id}/{event.callback_class}/{event.callback_action}/{last}"
    row["effect_key"] = f"{event_store.PLATFORM}/{what}"
    row["body_digest"] = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
    return row


def _text(value: datetime) -> str:
    return value.astimezone(UTC).isoformat()


# -- applying them -------------------------------------------------------------------------------------------------------

#: What else follows from an event, in the same transaction: the domain's row before it, its registers, and the event.
Follow = Callable[[Tx, Any, Registers, Event], Awaitable[None]]


async def apply(work: Work, now: datetime, follow: Follow | None = None) -> None:
    """The handler of the queue: one event into the state of its domain."""
    row = work.row
    event_type = type_of(row["callback_class"], row["callback_action"])
    async with work.done() as tx:
        if event_type is None:
            await event_store.settled(tx, work.id, "unmapped", None, None)
            return
        domain = await _domain(tx, row)
        if domain is None:
            await event_store.settled(tx, work.id, "unmatched", None, event_type)
            return
        event = as_event(row)
        before = Registers.read(domain.cert_applied)
        after = before.with_event(event)
        changed = after.written() != domain.cert_applied
        if changed:
            now_is = await write(tx, domain, after, now, ownership.decided(domain, before, after, now))
            await ownership.record(tx, domain, now_is, event)
        if follow is not None:
            await follow(tx, domain, after, event)
        await event_store.settled(tx, work.id, "applied" if changed else "superseded", domain.id, event_type)


async def write(tx: Tx, domain: Any, registers: Registers, now: datetime, standing: Mapping[str, Any]) -> Any:
    """The state that registers add up to, into the row of a domain; the row after it. ``standing``: what follows for the name."""
    state = derive(registers)
    held = failure_policy.recorded(domain, state.failures, now)
    now_is = await domain_store.update(
        tx, domain.id, cert_applied=registers.written(), **state.columns(), **held, **standing
    )
    edge.tell(tx, domain, now_is)  # relays know until when a `strict` domain may be served
    return now_is


def as_event(row: Mapping[str, Any]) -> Event:
    """A row of the table as the state function sees it."""
    facts = row["facts"]
    facts = json.loads(facts) if isinstance(facts, str) else facts
    return Event(
        source=row["source_id"],
        event=row["event_id"],
        callback_class=row["callback_class"],
        action=row["callback_action"],
        revision=row["revision"],
        sequence=row["sequence"],
        occurred_at=_text(row["occurred_at"]),
        effect=row["effect_key"],
        **{name: facts[name] for name in FACTS if facts.get(name) is not None},
    )


async def _domain(tx: Tx, row: Mapping[str, Any]) -> Any | None:
    """The domain that an event is about, locked: the one that it names, if that has the name; else the one that holds the name,
    or the wildcard above it. A claim that nobody proved hears of no certificate but what we do for it ourselves."""
    host = row["hostname"]
    if row["domain_id"] is not None:
        found = await domain_store.find(tx, row["domain_id"], lock=True)
        if found is None or found.name not in (host, names.parent(host)):
            return None
        ours = row["source_id"] == event_store.PLATFORM
        return found if ours or found.hostname_status in domain_store.HELD else None
    held = {each.name: each for each in await domain_store.holder(tx, [host, names.parent(host)], lock=True)}
    return held.get(host) or held.get(names.parent(host))


# -- reading and sweeping ------------------------------------------------------------------------------------------------


async def of_domain(reader: Reader, domain_id: str, limit: int, before: str | None) -> Any:
    """Events of a domain, the newest first: those that were found to be about it. Until then its id is what a sender says, who
    may mean somebody else's."""
    columns = event_store.events.c
    ours = (columns.source_id == event_store.PLATFORM) | columns.status.in_(("applied", "superseded"))
    return await event_store.listing(reader, {"domain": domain_id}, limit, before, ours)


async def clear(db: Database, before: datetime) -> int:
    """Delete events from before a time that are not on their way; returns how many. What they led to stays."""
    columns = event_store.events.c
    old = (columns.received_at < before) & (columns.queue_state != "pending")
    return await delete_in_batches(db, event_store.events, old)
