"""Who has a subdomain, or had it last: one row for each, which decides between organizations.

    no row, or cooled down ──claim──► held (by a tunnel, a reservation, or both) ──both gone──► cooling, for its last organization

A claim is one conditional statement on a unique key: of any number at once, of different organizations, one is done. Rows of
tunnels that older code makes are missing; the unique subdomain of tunnels stands behind this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from portico.kit import columns
from portico.kit.db import Reader, Tx, metadata

subdomain_claims = sa.Table(
    "subdomain_claims",
    metadata,
    sa.Column("subdomain", sa.Text, primary_key=True),
    # No foreign key: the name of a deleted organization cools down, too.
    sa.Column("organization_id", sa.Text, nullable=False),
    # Since when the organization keeps it, with or without a tunnel.
    columns.time("reserved_at"),
    # Since when nobody holds it.
    columns.time("freed_at"),
    sa.Index("subdomain_claims_reserved_ix", "organization_id", postgresql_where=sa.text("reserved_at IS NOT NULL")),
    sa.Index("subdomain_claims_freed_at_ix", "freed_at", postgresql_where=sa.text("freed_at IS NOT NULL")),
)

_CLAIM = """
INSERT INTO subdomain_claims AS c (subdomain, organization_id) VALUES ($1, $2)
ON CONFLICT (subdomain) DO UPDATE SET organization_id = $2, freed_at = NULL
WHERE c.organization_id = $2 OR c.freed_at < now() - make_interval(secs => $3)
RETURNING 1
"""
_FREE = """
INSERT INTO subdomain_claims AS c (subdomain, organization_id, freed_at) VALUES ($1, $2, now())
ON CONFLICT (subdomain) DO UPDATE SET freed_at = now()
WHERE c.organization_id = $2 AND c.reserved_at IS NULL
"""
_RESERVE = """
UPDATE subdomain_claims SET reserved_at = coalesce(reserved_at, now())
WHERE subdomain = $1 AND organization_id = $2
  AND NOT EXISTS (SELECT FROM tunnels WHERE subdomain = $1 AND organization_id <> $2)
RETURNING subdomain, reserved_at, (SELECT id FROM tunnels WHERE subdomain = $1) AS tunnel
"""
_RELEASE = """
UPDATE subdomain_claims c SET reserved_at = NULL,
    freed_at = CASE WHEN EXISTS (SELECT FROM tunnels t WHERE t.subdomain = c.subdomain) THEN NULL ELSE now() END
WHERE subdomain = $1 AND organization_id = $2 AND reserved_at IS NOT NULL
RETURNING 1
"""
_RESERVED = """
SELECT c.subdomain, c.reserved_at, t.id AS tunnel
FROM subdomain_claims c LEFT JOIN tunnels t ON t.subdomain = c.subdomain
WHERE c.organization_id = $1 AND c.reserved_at IS NOT NULL AND c.subdomain > $2
ORDER BY c.subdomain LIMIT $3
"""
_FREE_ORPHANS = """
UPDATE subdomain_claims c SET freed_at = now(), reserved_at = NULL
WHERE freed_at IS NULL AND NOT EXISTS (SELECT FROM tunnels t WHERE t.subdomain = c.subdomain)
  AND (reserved_at IS NULL OR NOT EXISTS (SELECT FROM organizations o WHERE o.id = c.organization_id))
"""


# Whoever makes and deletes tunnels all day would keep any number of names from everybody else.
_FORGET_BEYOND = """
DELETE FROM subdomain_claims c
USING (
    SELECT subdomain, row_number() OVER (PARTITION BY organization_id ORDER BY freed_at DESC, subdomain) AS place
    FROM subdomain_claims WHERE freed_at IS NOT NULL
) AS cooling
WHERE c.subdomain = cooling.subdomain AND cooling.place > $1 AND c.freed_at IS NOT NULL
"""


async def claim(tx: Tx, organization: str, subdomain: str, cooldown_seconds: float) -> bool:
    """Hold the name for the organization; false when another one has it, or had it a moment ago."""
    return await tx.raw.fetchval(_CLAIM, subdomain, organization, float(cooldown_seconds)) is not None


async def free(tx: Tx, organization: str, subdomain: str) -> None:
    """The tunnel that had the name is gone, or has another one: it cools down, unless it is reserved."""
    await tx.raw.execute(_FREE, subdomain, organization)


async def lock_reservations(tx: Tx, organization: str) -> None:
    """Until the transaction ends nobody else reserves a name for the organization."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock(hashtextextended('reserved names of ' || $1, 0))", organization)


async def count_reserved(reader: Reader, organization: str) -> int:
    """How many names the organization reserves."""
    query = "SELECT count(*) FROM subdomain_claims WHERE organization_id = $1 AND reserved_at IS NOT NULL"
    return int(await reader.raw.fetchval(query, organization))


async def is_reserved(tx: Tx, organization: str, subdomain: str) -> bool:
    """Whether the organization reserves this name."""
    query = "SELECT 1 FROM subdomain_claims WHERE subdomain = $1 AND organization_id = $2 AND reserved_at IS NOT NULL"
    return await tx.raw.fetchval(query, subdomain, organization) is not None


async def reserve(tx: Tx, organization: str, subdomain: str) -> Any:
    """Keep a name that the transaction claimed: ``(subdomain, reserved_at, tunnel)``; ``None`` for another one's tunnel."""
    return await tx.raw.fetchrow(_RESERVE, subdomain, organization)


async def release(tx: Tx, organization: str, subdomain: str) -> bool:
    """Keep the name no longer; false when it was not reserved."""
    return await tx.raw.fetchval(_RELEASE, subdomain, organization) is not None


async def reserved(reader: Reader, organization: str, limit: int, after: str | None) -> Sequence[Any]:
    """Reserved names in order, with the tunnel that has each."""
    return list(await reader.raw.fetch(_RESERVED, organization, after or "", limit))


async def clear(tx: Tx, cooldown_seconds: float, most: int) -> None:
    """Free the names of tunnels that went with their organization, and forget those that have cooled down; of each
    organization's the newest ``most`` go on cooling."""
    await tx.raw.execute(_FREE_ORPHANS)
    gone = "DELETE FROM subdomain_claims WHERE freed_at < now() - make_interval(secs => $1)"
    await tx.raw.execute(gone, float(cooldown_seconds))
    await tx.raw.execute(_FORGET_BEYOND, most)
