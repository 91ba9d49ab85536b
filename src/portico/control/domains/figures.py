"""How certificates are in the whole installation, in numbers: for metrics of workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from portico.control.domains import incident_store, vault_store
from portico.kit.db import Database

#: In which states a replica may be.
STATES = vault_store.REPLICA_STATES


@dataclass(frozen=True, slots=True)
class Figures:
    """``incidents``: (class, tier, status) → how many are not resolved; ``replicas``: (region, state) → how many, and the longest
    lag in seconds."""

    incidents: Mapping[tuple[str, int, str], int] = field(default_factory=dict)
    replicas: Mapping[tuple[str, str], tuple[int, float]] = field(default_factory=dict)


async def count(db: Database) -> Figures:
    """As the database has them now."""
    async with db.read() as reader:
        return Figures(await incident_store.counts(reader), await vault_store.counts(reader))
