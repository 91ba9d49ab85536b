"""Active-active: a version of a certificate serves nowhere until every healthy relay of every region holds it, then everywhere.

    store ──► staged at each relay (opened, checked, loaded; nothing is served with it) ──acks──┐
                                                                                                  ▼
              every relay switches ◄── one change of the edge stream ◄── the head's row: staged → active

``settle`` decides under the lock of the domain's head, in one transaction with the change that relays hear: a process that dies
anywhere leaves a domain before the switch or after it, and whoever looks next (an acknowledgement, or the worker every few
seconds) goes on from there. ``cert_region_replicas`` says how each region stands:

    pending   not every relay has it yet             staged    every relay has it; the switch is due, or reaches them now
    active    every relay serves with it             stale     it should serve, and for too long a relay does not, or none is up
    failed    a relay cannot use it, and says why

A relay whose heartbeat is older than the lease, or that is about to leave, holds nobody up: it catches up before it serves again.
Relays of a region without a registered key cannot open anything and do not count.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from portico.control.domains import event_store, lifecycle, vault
from portico.control.domains import vault_store as store
from portico.control.domains.lifecycle import NewEvent
from portico.kit import pages
from portico.kit.db import Database, Reader, Tx
from portico.settings import ApiSettings

log = logging.getLogger(__name__)

#: Domains that one transaction settles: their heads are held meanwhile.
BATCH = 200


@dataclass(frozen=True, slots=True)
class Rules:
    """When to switch. ``share`` of each region's healthy relays is enough once a version waits ``wait_seconds``; 1: all."""

    lease_seconds: float
    share: float
    wait_seconds: float
    stale_seconds: float

    @classmethod
    def of(cls, settings: ApiSettings) -> Rules:
        return cls(
            settings.relay_lease_seconds,
            settings.certificate_switch_share,
            settings.certificate_switch_wait_seconds,
            settings.certificate_stale_seconds,
        )


@dataclass(frozen=True, slots=True)
class Said:
    """What a relay says of a version: ``staged``, ``active``, or ``failed`` with a reason.

    ``floor``: the newest version of the domain that it has served, where it refuses this one for being older.
    """

    certificate: str
    fingerprint: str
    state: str
    reason: str | None = None
    floor: int | None = None


def ready(regions: Sequence[Mapping[str, Any]], rules: Rules) -> bool:
    """Whether a version may serve: what the healthy relays of each region said of it, rows of the tally."""
    served = [row for row in regions if row["relays"]]
    if not served:
        return False
    if all(row["staged"] == row["relays"] for row in served):
        return True
    enough = all(row["staged"] >= math.ceil(rules.share * row["relays"]) for row in served)
    return rules.share < 1 and enough and served[0]["age"] >= rules.wait_seconds


def state_of(row: Mapping[str, Any], rules: Rules) -> tuple[str, str | None]:
    """How a region stands with a version, and why, from its row of the tally."""
    late = row["state"] == "active" and row["age"] >= rules.stale_seconds
    if not row["relays"]:
        return ("stale" if late else "pending"), "no relay of the region is healthy"
    if row["failed"]:
        return "failed", row["reason"] or "a relay cannot use it"
    if row["state"] == "active" and row["active"] == row["relays"]:
        return "active", None
    if late:
        return "stale", f"{row['relays'] - row['active']} of {row['relays']} relays do not serve with it"
    return ("staged" if row["staged"] == row["relays"] else "pending"), None


async def settle(tx: Tx, domain_ids: Sequence[str], rules: Rules) -> list[str]:
    """Switch what is ready among these domains and bring their replicas up to date; the domains that switched."""
    heads = await store.hold_heads(tx, domain_ids)
    held = [head["domain_id"] for head in heads]
    if not held:
        return []
    rows = await store.tally(tx, rules.lease_seconds, held)
    by_version: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        by_version[row["id"]].append(row)
    switching = [head for head in heads if head["staged_id"] and ready(by_version[head["staged_id"]], rules)]
    for head in switching:
        await _switch(tx, head)
    switched = [head["domain_id"] for head in switching]
    if switched:
        await vault.tell(tx, switched)
        await _deployed(tx, [head["staged_id"] for head in switching], by_version)
        rows = await store.tally(tx, rules.lease_seconds, held)
    await _put(tx, rows, rules)
    return switched


async def _deployed(tx: Tx, certificates: Sequence[str], regions: Mapping[str, Sequence[Any]]) -> None:
    """What began to serve, as events of the domain's lifecycle, in the transaction of the switch."""
    versions = await store.version_rows(tx, certificates)
    for id in certificates:
        row = versions[id]
        staged = [one for one in regions[id] if one["relays"] and one["staged"] == one["relays"]]
        await lifecycle.record(
            tx,
            NewEvent(
                row["domain_id"],
                "deployment",
                "succeeded",
                revision=row["version"],
                serial=row["serial"],
                fingerprint=row["fingerprint"],
                issuer=row["issuer"],
                not_before=row["not_before"],
                not_after=row["not_after"],
                regions_active=len(staged),
                regions_total=len(regions[id]),
                object=id,
                key=f"{id}/deployed",
            ),
        )


async def _switch(tx: Tx, head: Any) -> None:
    if head["active_id"] is not None:
        await store.end_version(tx, head["active_id"], "retired")
    await store.activate(tx, head["staged_id"])
    await store.set_head(tx, head["domain_id"], head["staged_id"], None)
    log.info("certificate switched", extra={"f": {"domain": head["domain_id"], "certificate": head["staged_id"]}})


async def _put(tx: Tx, rows: Iterable[Any], rules: Rules) -> None:
    found = []
    for row in rows:
        state, reason = state_of(row, rules)
        found.append(
            (row["id"], row["region"], row["domain_id"], row["version"], state, row["relays"], row["staged"], row["active"],
             reason, state != "active", row["since"], row["acked_at"], row["fleet"])
        )  # fmt: skip
    changed = await store.put_replicas(tx, found)
    for change in changed:
        if change["state"] in ("failed", "stale"):
            fields = {name: change[name] for name in ("domain_id", "region", "version", "state", "reason")}
            log.warning("a region does not serve a certificate as it should", extra={"f": fields})
    await _replicated(tx, changed, found)


#: What a region's new state is in the table of events, and the code of the trouble. ``staged`` and ``pending`` are on their way.
_EVENTS: Final = {
    "active": ("activated", None),
    "stale": ("lagging", "replica.stale"),
    "failed": ("failed", "replica.failed"),
}


async def _replicated(tx: Tx, changed: Sequence[Any], rows: Sequence[tuple[Any, ...]]) -> None:
    """One event for each version of which a region's state changed: the worst of its regions counts. That it is active everywhere
    is told once, and again after trouble: relays that were out of sight for a moment, such as all of them after an outage of the
    database, are no news of a thousand domains."""
    regions: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        regions[row[0]].append(row[4])
    latest = {change["certificate_id"]: change for change in changed}
    troubles = await event_store.troubles(tx, sorted({change["domain_id"] for change in latest.values()}))
    events = []
    for id, change in latest.items():
        states = regions[id]
        worst = next((state for state in ("failed", "stale") if state in states), None)
        if worst is None and any(state != "active" for state in states):
            continue
        action, code = _EVENTS[worst or "active"]
        before = troubles.get((change["domain_id"], change["version"]), 0)
        events.append(
            NewEvent(
                change["domain_id"],
                "replication",
                action,
                revision=change["version"],
                error_code=code,
                error_detail=next(
                    (one["reason"] for one in changed if one["certificate_id"] == id and one["reason"]), None
                ),
                regions_active=states.count("active"),
                regions_total=len(states),
                object=id,
                key=f"{id}/activated/{before}" if worst is None else None,
            )
        )
    if events:
        await lifecycle.record_all(tx, events)


async def acknowledge(tx: Tx, relay: str, said: Sequence[Said], rules: Rules) -> list[str]:
    """Keep what a registered relay says, and switch what that makes ready; the domains that switched.

    Of a version that is not there any more, or with another fingerprint than it has, an acknowledgement counts for nothing.
    """
    latest = {each.certificate: each for each in said}
    versions = await store.version_rows(tx, list(latest))
    domains = sorted({row["domain_id"] for row in versions.values()})
    await store.hold_heads(tx, domains)
    await store.put_acks(
        tx,
        relay,
        [(s.certificate, s.fingerprint, s.state, s.reason) for s in latest.values() if s.certificate in versions],
    )
    for each in latest.values():
        if each.floor is not None and each.certificate in versions:
            await store.raise_floor(tx, versions[each.certificate]["domain_id"], each.floor)
    return await settle(tx, domains, rules)


async def sweep(db: Database, rules: Rules) -> int:
    """Settle what relays' coming and going changed without a word from them; how many domains switched.

    Replicas of all domains are looked at in batches, so that a region's state is true whatever became of its relays.
    """
    count, after = 0, ""
    while True:
        async with db.transaction() as tx:
            domains = await store.unsettled(tx, rules.lease_seconds, BATCH, after)
            if not domains:
                return count
            after = domains[-1]
            count += len(await settle(tx, domains, rules))


async def listing(reader: Reader, page: pages.PageRequest, **filters: str | None) -> dict[str, Any]:
    """Replicas, in order of their certificates and regions."""
    certificate, _, region = (page.after[0] if page.after else "").partition(" ")
    rows = await store.list_replicas(
        reader,
        page.limit + 1,
        (certificate, region) if page.after else None,
        domain_id=filters.get("domain"),
        region=filters.get("region"),
        state=filters.get("state"),
    )
    document: dict[str, Any] = pages.listing(rows, page.limit, _place, _render)
    return document


def _place(row: Any) -> tuple[str]:
    return (f"{row.certificate_id} {row.region}",)


def _render(row: Any) -> dict[str, Any]:
    return {
        "certificate": row.certificate_id,
        "domain": row.domain_id,
        "hostname": row.hostname,
        "version": row.version,
        "fingerprint": row.fingerprint,
        "region": row.region,
        "state": row.state,
        "relays": row.relays,
        "relays_staged": row.relays_staged,
        "relays_active": row.relays_active,
        "reason": row.reason,
        "lag_seconds": round(float(row.lag), 1),
        "acked_at": row.acked_at,
        "updated_at": row.updated_at,
    }
