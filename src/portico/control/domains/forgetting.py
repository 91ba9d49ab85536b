"""Forgetting what a source told: the way out when it told too much.

State is a function of the set of events, so an event that says a huge revision hides every later one of its domain for good,
and no later event can undo that. Nor may a bound on revisions: whether one is too far ahead would depend on what arrived
before it. So an operator takes events out of the set: those of one source, of one domain or from one revision on, or both.

What is left is joined anew from what the registers know of others and from the events that are stored.
Forgotten events stay in the table as ``forgotten``: they are never applied again, by whatever replay, and an id among them is
known when it comes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from portico.control.access import Caller
from portico.control.audit import service as audit
from portico.control.domains import event_store, lifecycle, ownership, store
from portico.control.domains.certificate_state import Event, Place, Registers, derive, fold
from portico.control.domains.replay import PLATFORM
from portico.errors import Problem
from portico.kit.db import Tx
from portico.kit.ids import new_id

#: Domains and events that an answer names.
_NAMED: Final = 20
#: Domains of one call: all of them are locked until it is over.
MOST: Final = 1000


@dataclass(frozen=True, slots=True)
class Which:
    """Events of ``source``, of one domain alone (its id), from a revision on."""

    source: str
    domain: str | None = None
    from_revision: int = 0

    def fits(self, source: str, revision: int) -> bool:
        return source == self.source and revision >= self.from_revision


async def forget(tx: Tx, caller: Caller, which: Which, reason: str, now: datetime, *, dry_run: bool) -> dict[str, Any]:
    """Take events out of the state of their domains, or (``dry_run``) say what that would change.

    Raises ``domain.not_found``, ``cert.source_not_found`` for a source of which there is neither a row nor an event, and
    ``cert.forget_refused`` for what this installation did itself, and for more than ``MOST`` domains at once.
    """
    if which.source == event_store.PLATFORM:
        raise Problem("cert.forget_refused", "what this installation did itself is not forgotten")
    if await event_store.source(tx, which.source) is None and not await event_store.heard_of(tx, which.source):
        raise Problem("cert.source_not_found")
    names = await store.names_of(tx, [which.domain] if which.domain is not None else [])
    if which.domain is not None and which.domain not in names:
        raise Problem("domain.not_found")
    ids = await event_store.told_of(tx, which.source, which.domain, MOST + 1)
    if len(ids) > MOST:
        raise Problem("cert.forget_refused", f"{which.source} told of more than {MOST} domains: name one")
    changed = [found for each in ids if (found := await _of_domain(tx, each, which, now, dry_run=dry_run)) is not None]
    domain = None if which.domain is None else (which.domain, names[which.domain])
    chosen = event_store.chosen(which.source, domain, which.from_revision)
    events = await event_store.count(tx, chosen) if dry_run else await event_store.forget(tx, chosen)
    if not dry_run:
        await _assess(tx, [each["id"] for each in changed])
    details = {
        "reason": reason, "source": which.source, "domain": which.domain, "from_revision": which.from_revision,
        "events": events, "domains": len(changed), "named": [each["name"] for each in changed[:_NAMED]], "dry_run": dry_run,
    }  # fmt: skip
    await audit.record(tx, caller, "cert_event.forget", which.source, details=details, organization=audit.INSTALLATION)
    return {"events": events, "domains": len(changed), "changed": changed[:_NAMED], "dry_run": dry_run}


async def _of_domain(tx: Tx, domain: str, which: Which, now: datetime, *, dry_run: bool) -> dict[str, Any] | None:
    """What becomes of a domain, whose row is locked; ``None`` when nothing does."""
    row = await store.find(tx, domain, lock=True)
    if row is None:
        return None
    before = Registers.read(row.cert_applied)
    stored = [lifecycle.as_event(each) for each in await event_store.of_state(tx, domain)]
    after = fold((event for event in stored if not _fits(event, which)), without(before, which))
    if after.written() == before.written():
        return None
    shown = {"id": row.id, "name": row.name, "status": row.cert_status, "revision": _newest(before)}
    if dry_run:
        return {**shown, "status_after": derive(after).status, "revision_after": _newest(after)}
    now_is = await lifecycle.write(tx, row, after, now, ownership.unsaid(row, before, after, now))
    facts = {"name": row.name, "source": which.source, "from": row.cert_status, "to": now_is.cert_status}
    await audit.record(tx, PLATFORM, "certificate.rebuild", row.id, details=facts, organization=row.organization_id)
    return {**shown, "status_after": now_is.cert_status, "revision_after": _newest(after)}


async def _assess(tx: Tx, domains: Sequence[str]) -> None:
    """Let the worker judge incidents anew: by an event of each domain that it applies again, which changes nothing else. Where no
    event is left the watch ends what is open."""
    for event in await event_store.last_of(tx, domains):
        await event_store.replay(tx, [event_store.events.c.id == event], new_id("rpl"), 1)


def without(registers: Registers, which: Which) -> Registers:
    """Registers that know nothing of these events; what those have hidden is not back by that."""
    newest = {pair: event for pair, event in registers.newest.items() if not _fits(event, which)}
    deployed = tuple(event for event in registers.deployed if not _fits(event, which))
    failures: dict[str, dict[str, Place]] = {}
    for name, effects in registers.failures.items():
        kept = {effect: place for effect, place in effects.items() if not which.fits(place[3], place[0])}
        if kept:
            failures[name] = kept
    return replace(registers, newest=newest, deployed=deployed, failures=failures)


def _fits(event: Event, which: Which) -> bool:
    return which.fits(event.source, event.revision)


def _newest(registers: Registers) -> int | None:
    return max((event.revision for event in registers.newest.values()), default=None)
