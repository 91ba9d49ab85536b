"""How billing is in the whole installation, in numbers: for metrics of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from portico.control.billing import billing_store, export_store, settlement_store, webhook_store
from portico.kit.db import Database


@dataclass(frozen=True, slots=True)
class Provider:
    """How the events of one fare, as they were last looked at (``objectives.py``), ``age_seconds`` ago. ``broken_seconds``: for
    how long its objective has been broken; 0 while it is met. ``dead``: events that nobody tries any more, at this moment."""

    failed: int
    stale: int
    p95_seconds: float | None
    broken_seconds: float
    age_seconds: float
    dead: int


@dataclass(frozen=True, slots=True)
class Figures:
    """``reports``: state → how many of the last days; ``ack_mismatches``: of reports that are kept; ``deltas``: (currency, minor
    units, basis points); ``waiting``: provider → how many effects wait for their base, and for how many seconds the oldest."""

    providers: Mapping[str, Provider] = field(default_factory=dict)
    reports: Mapping[str, int] = field(default_factory=dict)
    ack_mismatches: int = 0
    receipts: Mapping[str, int] = field(default_factory=dict)
    deltas: Sequence[tuple[str, float, float]] = ()
    findings: Mapping[str, int] = field(default_factory=dict)
    waiting: Mapping[str, tuple[int, float]] = field(default_factory=dict)


async def count(db: Database) -> Figures:
    """As the database has them now."""
    async with db.read() as reader:
        providers = {row["provider"]: _provider(row) for row in await webhook_store.standing(reader)}
        reports, mismatches = await export_store.figures(reader)
        receipts, deltas, findings = await settlement_store.figures(reader)
        waiting = {row["provider"]: (row["count"], row["seconds"]) for row in await billing_store.waiting_count(reader)}
    return Figures(providers, reports, mismatches, receipts, deltas, findings, waiting)


def _provider(row: Mapping[str, Any]) -> Provider:
    return Provider(
        row["failed"], row["stale"], row["p95_seconds"], row["broken_seconds"], row["age_seconds"], row["dead"]
    )
