"""What events of the class `ownership` do to a name's state, beside looks at its DNS.

    blocked     blocked; a later `succeeded` ends it, no look does
    moved       moved, and looked at: a look that finds everything right makes it active again
    succeeded   ends a block, and a move, that an event has made
    failed      changes no state: looks decide, three in a row are an incident

Of the first three the newest counts, not the one that arrived last. An event never makes a name somebody's (a claim is proved by
its owner's record alone), never takes one away, and ends no block of an operator. Our own events tell of what was done already.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import event_store, store
from portico.control.domains.certificate_state import Event, Registers
from portico.kit.db import Tx

#: ``dns_error`` while it is an event's doing.
BLOCKED_UPSTREAM: Final = "blocked_upstream"
MOVED_UPSTREAM: Final = "moved_upstream"
_DECIDING: Final = ("ownership.succeeded", "ownership.blocked", "ownership.moved")
#: Who an audit row names.
_WORKER: Final = Caller("operator", "certificates", None)


def decided(row: Any, before: Registers, after: Registers, now: datetime) -> dict[str, Any]:
    """Columns of a domain that follow from an event which made ``after`` of ``before``."""
    last = after.last(*_DECIDING)
    if last is None or last == before.last(*_DECIDING) or last.source == event_store.PLATFORM:
        return {}
    return _columns(row, last, now)


def unsaid(row: Any, before: Registers, after: Registers, now: datetime) -> dict[str, Any]:
    """The same, where ``after`` knows less than ``before``: what nobody has said any more is taken back."""
    if after.last(*_DECIDING) is None and row.dns_error in (BLOCKED_UPSTREAM, MOVED_UPSTREAM):
        return released(row, now)
    return decided(row, before, after, now)


def _columns(row: Any, last: Event, now: datetime) -> dict[str, Any]:
    status = row.hostname_status
    if last.action == "blocked" and status in store.SERVED:
        return {"hostname_status": "blocked", "dns_error": BLOCKED_UPSTREAM, "next_check_at": None}
    if last.action == "moved" and (status in ("verified", "active") or row.dns_error == BLOCKED_UPSTREAM):
        found = {"hostname_status": "moved", "dns_error": MOVED_UPSTREAM, "failing_since": now}
        return {**found, "next_check_at": now, "check_attempts": 0}
    if last.action == "succeeded" and row.dns_error in (BLOCKED_UPSTREAM, MOVED_UPSTREAM):
        return released(row, now)
    return {}


def released(row: Any, now: datetime) -> dict[str, Any]:
    """Columns of a domain that is not blocked any more: what the last look at its records said, and another look soon."""
    found = row.dns_findings or {}
    right = all(found.get(purpose, {}).get("state") == "ok" for purpose in ("ownership", "routing"))
    return {
        "hostname_status": "active" if right else "verified", "dns_error": None, "failing_since": None, "next_check_at": now,
        "check_attempts": 0,
    }  # fmt: skip


async def record(tx: Tx, before: Any, after: Any, event: Event) -> None:
    """Into the audit log of the organization, where the state is another one now."""
    if after.hostname_status == before.hostname_status:
        return
    facts = {"name": before.name, "from": before.hostname_status, "to": after.hostname_status, "why": event.pair}
    facts |= {"source": event.source, "event": event.event}
    await audit.record(tx, _WORKER, "domain.status", before.id, details=facts, organization=before.organization_id)
