"""The relays as every domain may see them: which are healthy, in which region, and what they have applied of the edge stream.

``tunnels`` keeps the registry (its heartbeats and acknowledgements write it). What lies below tunnels, such as certificates,
must know whether a change has reached every relay before it goes on; this is what it asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from portico.kit import columns
from portico.kit.db import HasConnection, metadata

relays = sa.Table(
    "relays",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("region", sa.Text, nullable=False),
    sa.Column("connect_url", sa.Text, nullable=False),
    sa.Column("public_url", sa.Text, nullable=False),
    # The edge change version that it has applied.
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("load", JSONB, nullable=False),
    sa.Column("draining", sa.Boolean, nullable=False),
    # Digest of the bound set in relay_bindings: an unchanged heartbeat writes one row.
    sa.Column("bound_digest", sa.LargeBinary),
    columns.created(),
    columns.now("seen_at"),
)

_HEALTHY = """
SELECT name, region, version FROM relays
WHERE seen_at > now() - make_interval(secs => $1) AND NOT draining ORDER BY name
"""


@dataclass(frozen=True, slots=True)
class Healthy:
    """A relay whose last heartbeat is within the lease and that is not about to leave."""

    name: str
    region: str
    version: int


async def healthy(reader: HasConnection, lease_seconds: float) -> list[Healthy]:
    """Every healthy relay, by name."""
    rows = await reader.raw.fetch(_HEALTHY, float(lease_seconds))
    return [Healthy(row["name"], row["region"], row["version"]) for row in rows]


async def all_applied(reader: HasConnection, edge_version: int, lease_seconds: float) -> list[str]:
    """The healthy relays that have not yet said that they applied ``edge_version``; none is missing when it is empty.

    ``edge_version``: :func:`portico.control.changes.newest` after the commit of the change that matters. A relay that starts
    later is brought to at least that version before it is healthy. That *some* relay is healthy is for the caller to ask.
    """
    return [relay.name for relay in await healthy(reader, lease_seconds) if relay.version < edge_version]
