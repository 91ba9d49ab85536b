"""What tunnels used, as relays report it: numbered batches, each counted once, into totals per hour.

A batch is named by (relay, boot, seq), where ``boot`` is the id of the relay's spool. Its number and its counts are
written in one transaction: a report that is sent again, by a relay that saw no answer, finds its numbers taken.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from portico.control.identity import facts
from portico.control.tunnels import usage_store
from portico.control.tunnels.standing import month_of
from portico.kit.db import Tx

log = logging.getLogger(__name__)

Counts = tuple[int, int, int, int, int]  # requests, connections, bytes in, bytes out, errors
_ZERO: Counts = (0, 0, 0, 0, 0)
# A relay's clock outside this range names a wrong hour; the time of arrival is nearer to the truth.
_OLDEST = timedelta(days=31)
_NEWEST = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Row:
    """What one tunnel used in a batch; ``organization`` as the relay knew it."""

    tunnel: str
    organization: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class Batch:
    """One numbered batch; ``since`` decides the hour that it counts for."""

    seq: int
    since: datetime
    rows: Sequence[Row]


def _hour(since: datetime, now: datetime) -> datetime:
    at = since if now - _OLDEST <= since <= now + _NEWEST else now
    return at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def _add(left: Counts, right: Counts) -> Counts:
    a, b, most = left, right, usage_store.MAX_TOTAL
    return (
        min(a[0] + b[0], most),
        min(a[1] + b[1], most),
        min(a[2] + b[2], most),
        min(a[3] + b[3], most),
        min(a[4] + b[4], most),
    )


async def count(tx: Tx, relay: str, boot: str, batches: Sequence[Batch], now: datetime) -> set[str]:
    """Count the batches that were not counted before; returns the organizations that used something this month.

    Rows of a tunnel that never existed count for their organization if that exists, and are dropped with a log line if not.
    """
    fresh = await usage_store.claim_batches(tx, relay, boot, sorted({batch.seq for batch in batches}))
    rows = [(_hour(batch.since, now), row) for batch in _once(batches) if batch.seq in fresh for row in batch.rows]
    owners = await usage_store.tunnel_owners(tx, list({row.tunnel for _, row in rows}))
    known = await facts.known_organizations(tx, list({row.organization for _, row in rows} - set(owners.values())))
    tunnels: dict[tuple[str, datetime, str], Counts] = {}
    organizations: dict[tuple[str, datetime], Counts] = {}
    dropped = 0
    for hour, row in rows:
        owner = owners.get(row.tunnel)
        if owner is not None:
            tunnel = (row.tunnel, hour, owner)
            tunnels[tunnel] = _add(tunnels.get(tunnel, _ZERO), row.counts)
        elif row.organization in known:
            owner = row.organization
        else:
            dropped += 1
            continue
        organizations[owner, hour] = _add(organizations.get((owner, hour), _ZERO), row.counts)
    await _write(tx, tunnels, organizations)
    if dropped:
        log.warning("usage of nobody dropped", extra={"f": {"relay": relay, "boot": boot, "rows": dropped}})
    return {organization for organization, hour in organizations if month_of(hour) == month_of(now)}


def _once(batches: Iterable[Batch]) -> list[Batch]:
    """One batch per number: the first, should a report hold the same number twice."""
    by_seq: dict[int, Batch] = {}
    for batch in batches:
        by_seq.setdefault(batch.seq, batch)
    return list(by_seq.values())


async def _write(
    tx: Tx, tunnels: dict[tuple[str, datetime, str], Counts], organizations: dict[tuple[str, datetime], Counts]
) -> None:
    """Add the totals, rows in one order everywhere, so that two reports wait for each other and never deadlock."""
    if tunnels:
        await usage_store.add_tunnel_usage(tx, _columns([(*key, *tunnels[key]) for key in sorted(tunnels)]))
    if organizations:
        months: dict[tuple[str, date], Counts] = {}
        for (organization, hour), counts in organizations.items():
            key = (organization, month_of(hour))
            months[key] = _add(months.get(key, _ZERO), counts)
        await usage_store.add_month_usage(tx, _columns([(*key, *months[key]) for key in sorted(months)]))
        await usage_store.add_organization_usage(
            tx, _columns([(*key, *organizations[key]) for key in sorted(organizations)])
        )


def _columns(rows: list[tuple[object, ...]]) -> list[list[object]]:
    return [list(column) for column in zip(*rows, strict=True)]
