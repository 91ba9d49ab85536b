"""What relays report: the tunnels that each has bound; their keys; and every query on these tables.

A heartbeat is raw asyncpg in one statement. The relays themselves are the table of ``control/fleet.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from portico.control.fleet import relays
from portico.kit import columns
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, HasConnection, Reader, Tx, metadata

relay_bindings = sa.Table(
    "relay_bindings",
    metadata,
    sa.Column("relay", sa.Text, sa.ForeignKey("relays.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("tunnel_id", sa.Text, primary_key=True, index=True),
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("generation", sa.BigInteger, nullable=False),
)

relay_keys = sa.Table(
    "relay_keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    # Null: for any relay. Else only the relay of this name may use it.
    sa.Column("relay", sa.Text),
    sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("prefix", sa.Text, nullable=False),
    columns.created(),
    columns.time("revoked_at"),
)


async def list_relays(reader: Reader, lease: float, limit: int, after: str | None) -> Sequence[sa.Row[Any]]:
    """Relays by name, with how many tunnels each has bound, and whether its last heartbeat is within the lease."""
    bound = sa.select(sa.func.count()).where(relay_bindings.c.relay == relays.c.name).scalar_subquery()
    live = relays.c.seen_at > columns.ago(lease)
    query = sa.select(relays, bound.label("tunnels"), live.label("live"))
    if after is not None:
        query = query.where(relays.c.name > after)
    return await reader.fetch_all(query.order_by(relays.c.name).limit(limit))


_HEARTBEAT = """
INSERT INTO relays (name, key_id, region, connect_url, public_url, version, load, draining)
VALUES ($1, $2, $3, $4, $5, $6, $7::text::jsonb, $8)
ON CONFLICT (name) DO UPDATE
SET key_id = excluded.key_id, region = excluded.region, connect_url = excluded.connect_url,
    public_url = excluded.public_url, version = excluded.version, load = excluded.load, draining = excluded.draining,
    seen_at = now()
RETURNING bound_digest, xmax = 0 AS registered
"""
_BOUND_GONE = "DELETE FROM relay_bindings WHERE relay = $1 AND NOT tunnel_id = ANY($2)"
_BOUND_NOW = """
INSERT INTO relay_bindings (relay, tunnel_id, session_id, generation)
SELECT $1, * FROM unnest($2::text[], $3::text[], $4::bigint[])
ON CONFLICT (relay, tunnel_id) DO UPDATE SET session_id = excluded.session_id, generation = excluded.generation
WHERE (relay_bindings.session_id, relay_bindings.generation) <> (excluded.session_id, excluded.generation)
"""
_LIVE_RELAYS = """
SELECT name, region, connect_url, load::text, draining, extract(epoch FROM now() - seen_at)::float8 AS age
FROM relays WHERE seen_at > now() - make_interval(secs => $1)
"""
_BOUND_LIVE = """
SELECT b.tunnel_id, b.relay, b.session_id FROM relay_bindings b JOIN relays r ON r.name = b.relay
WHERE b.tunnel_id = ANY($1) AND r.seen_at > now() - make_interval(secs => $2)
"""


async def heartbeat(tx: Tx, row: tuple[Any, ...]) -> Any:
    """Register or renew a relay; ``(bound_digest, registered)``. Holds its row until the transaction ends."""
    return await tx.raw.fetchrow(_HEARTBEAT, *row)


async def replace_bindings(
    tx: Tx, relay: str, digest: bytes, tunnel_ids: list[str], sessions: list[str], generations: list[int]
) -> None:
    """Make the relay's bindings exactly these, writing only what differs. The relay's row is held by ``heartbeat``."""
    await tx.raw.execute(_BOUND_GONE, relay, tunnel_ids)
    await tx.raw.execute(_BOUND_NOW, relay, tunnel_ids, sessions, generations)
    await tx.raw.execute("UPDATE relays SET bound_digest = $2 WHERE name = $1", relay, digest)


async def bindings_of(tx: Tx, relay: str) -> dict[str, str]:
    """The session of each tunnel that the relay had bound at its last heartbeat."""
    rows = await tx.raw.fetch("SELECT tunnel_id, session_id FROM relay_bindings WHERE relay = $1", relay)
    return {row["tunnel_id"]: row["session_id"] for row in rows}


async def forget_silent_relays(tx: Tx, silent_seconds: float) -> list[Any]:
    """Take the bindings of relays that report no more: rows ``(relay, tunnel_id, session_id, seen_at)``."""
    query = """
        WITH silent AS (
            SELECT name, seen_at FROM relays
            WHERE seen_at < now() - make_interval(secs => $1) AND bound_digest IS NOT NULL
            FOR UPDATE SKIP LOCKED
        ), told AS (UPDATE relays SET bound_digest = NULL WHERE name IN (SELECT name FROM silent))
        DELETE FROM relay_bindings b USING silent WHERE b.relay = silent.name
        RETURNING b.relay, b.tunnel_id, b.session_id, silent.seen_at
    """
    return list(await tx.raw.fetch(query, float(silent_seconds)))


async def live_relays(reader: Reader, lease_seconds: float) -> list[Any]:
    return list(await reader.raw.fetch(_LIVE_RELAYS, float(lease_seconds)))


async def live_bindings(reader: Reader, tunnel_ids: list[str], lease_seconds: float) -> list[Any]:
    """``(tunnel_id, relay, session_id)`` for those that a live relay has bound."""
    return list(await reader.raw.fetch(_BOUND_LIVE, tunnel_ids, float(lease_seconds)))


async def insert_relay_key(tx: Tx, row: dict[str, Any]) -> None:
    await tx.execute(sa.insert(relay_keys).values(**row))


async def relay_key(reader: Reader, digest: bytes) -> Any:
    return await reader.raw.fetchrow("SELECT id, relay, revoked_at FROM relay_keys WHERE digest = $1", digest)


async def revoke_relay_key(tx: Tx, key_id: str) -> bool:
    status: str = await tx.raw.execute(
        "UPDATE relay_keys SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL", key_id
    )
    return status != "UPDATE 0"


async def relay_keys_of(reader: HasConnection, relay: str) -> list[str]:
    """The live keys that are bound to the relay of this name."""
    rows = await reader.raw.fetch("SELECT id FROM relay_keys WHERE relay = $1 AND revoked_at IS NULL", relay)
    return [row["id"] for row in rows]


async def acknowledge(tx: Tx, relay: str, version: int) -> None:
    await tx.raw.execute("UPDATE relays SET version = greatest(version, $2) WHERE name = $1", relay, version)


async def live_relay_keys(reader: HasConnection, key_ids: list[str]) -> set[str]:
    rows = await reader.raw.fetch("SELECT id FROM relay_keys WHERE id = ANY($1) AND revoked_at IS NULL", key_ids)
    return {row["id"] for row in rows}


async def clear(db: Database, grace_seconds: float) -> int:
    """Delete relays that have been silent for so long, with what they had bound."""
    return await delete_in_batches(db, relays, relays.c.seen_at < columns.ago(grace_seconds))
