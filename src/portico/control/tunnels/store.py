"""The tables of tunnels, their ports and their history, and every query on them.

Sessions, relays and usage have stores of their own beside this one. What happens per grant or event is raw asyncpg; the rest is
SQLAlchemy Core. JSON passes through raw statements as text, so that it does not matter which codec a connection has.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from portico.kit import columns
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, Reader, Tx, metadata

# A row per port that was ever offered to TCP tunnels: leased, or free since `freed_at`, or never used.
tcp_ports = sa.Table(
    "tcp_ports",
    metadata,
    sa.Column("port", sa.Integer, primary_key=True, autoincrement=False),
    # Who has it, or had it last.
    sa.Column("organization_id", sa.Text),
    columns.time("leased_at"),
    columns.time("freed_at"),
    sa.Index(
        "tcp_ports_free_ix", sa.text("freed_at NULLS FIRST"), "port", postgresql_where=sa.text("leased_at IS NULL")
    ),
)

tunnels = sa.Table(
    "tunnels",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("protocol", sa.Text, nullable=False),
    sa.Column("subdomain", sa.Text, unique=True),
    sa.Column("target", sa.Text),
    sa.Column("policy", JSONB, nullable=False),
    sa.Column("policy_hash", sa.Text, nullable=False),
    # Rises with every change of the policy; relays let the higher one win.
    sa.Column("policy_version", sa.BigInteger, nullable=False, server_default="1"),
    # Rises with every change that must fence grants issued before it (stop, new host).
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="1"),
    sa.Column("state", sa.Text, nullable=False, server_default="active"),
    # How its organization stands, when not well: relays hold such a tunnel as one that may not serve, whatever its state.
    sa.Column("held", sa.Text),
    # Null, or what an unnamed tunnel is found again by: a digest of agent key, machine and target.
    sa.Column("origin", sa.Text),
    # Public port of a TCP tunnel.
    sa.Column("port", sa.Integer, sa.ForeignKey("tcp_ports.port"), unique=True),
    # Null, or the limit or feature of the plan for want of which it is off line (frozen.py).
    sa.Column("frozen", sa.Text),
    columns.created(),
    columns.now("updated_at"),
    sa.UniqueConstraint("organization_id", "name"),
    sa.CheckConstraint("protocol IN ('http', 'tcp', 'tls')", name="protocol"),
    sa.CheckConstraint("state IN ('active', 'stopped', 'suspended')", name="state"),
    sa.CheckConstraint("held IN ('suspended', 'deleting')", name="held"),
    sa.Index("tunnels_organization_id_id_ix", "organization_id", "id"),
    sa.Index("tunnels_origin_ix", "origin", postgresql_where=sa.text("origin IS NOT NULL")),
)

tunnel_events = sa.Table(
    "tunnel_events",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tunnel_id", sa.Text, sa.ForeignKey("tunnels.id", ondelete="CASCADE"), nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("details", JSONB, nullable=False),
    columns.now("at"),
    sa.Index("tunnel_events_tunnel_id_id_ix", "tunnel_id", "id"),
    sa.Index("tunnel_events_at_ix", "at"),
)

_T = tunnels.c


async def lock_set(tx: Tx, organization: str) -> None:
    """Until the transaction ends nobody else adds a tunnel to the organization, changes some by a session, takes one on line
    under a limit, or freezes some. Taken before the row of any tunnel is, or never: who holds it waits for rows."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock(hashtextextended('tunnels of ' || $1, 0))", organization)


async def lock_rows(tx: Tx, organization: str, tunnel_ids: list[str]) -> None:
    """Hold some tunnels against other writers until the transaction ends."""
    await tx.raw.execute(
        "SELECT FROM tunnels WHERE organization_id = $1 AND id = ANY($2) ORDER BY id FOR UPDATE",
        organization,
        tunnel_ids,
    )


async def lock_policies(tx: Tx, organization: str) -> None:
    """Until the transaction ends nobody else gives a tunnel of the organization a policy of note. Taken before ``lock_set``
    and before the row of any tunnel."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock(hashtextextended('policies of ' || $1, 0))", organization)


async def number_of_tunnels(reader: Reader, organization: str) -> int:
    """How many tunnels the organization has."""
    return int(await reader.raw.fetchval("SELECT count(*) FROM tunnels WHERE organization_id = $1", organization))


async def take_offline(tx: Tx, organization: str, tunnel_ids: list[str]) -> Sequence[sa.Row[Any]]:
    """Take tunnels out of every session and fence the grants that are out; their rows."""
    query = "DELETE FROM agent_session_tunnels WHERE tunnel_id = ANY($1)"
    await tx.raw.execute(query, tunnel_ids)
    where = sa.and_(_T.organization_id == organization, _T.id.in_(tunnel_ids))
    return (
        await tx.execute(sa.update(tunnels).where(where).values(generation=_T.generation + 1).returning(tunnels))
    ).all()


async def plan_facts(tx: Tx, organization: str) -> Sequence[sa.Row[Any]]:
    """What decides which tunnels the organization's plan has room for, the oldest first."""
    facts = (_T.id, _T.protocol, _T.policy, _T.frozen)
    return await tx.fetch_all(sa.select(*facts).where(_T.organization_id == organization).order_by(_T.id))


async def freeze(tx: Tx, organization: str, tunnel_id: str, reason: str | None) -> sa.Row[Any]:
    """Freeze a tunnel, or thaw it; its row. Grants that are out are fenced."""
    where = sa.and_(_T.organization_id == organization, _T.id == tunnel_id)
    values = {"frozen": reason, "generation": _T.generation + 1}
    return (await tx.execute(sa.update(tunnels).where(where).values(**values).returning(tunnels))).one()


async def count_tunnels(reader: Reader, organizations: Sequence[str]) -> dict[str, int]:
    """The number of tunnels of each of the organizations that has one."""
    wanted = _T.organization_id.in_(organizations)
    query = sa.select(_T.organization_id, sa.func.count().label("tunnels")).where(wanted).group_by(_T.organization_id)
    return {row.organization_id: row.tunnels for row in await reader.fetch_all(query)}


async def policy_bytes(tx: Tx, organization: str, but: str | None) -> int:
    """What the policies of the organization's tunnels have together; ``but``: the tunnel that is left out."""
    query = "SELECT coalesce(sum(octet_length(policy::text)), 0) FROM tunnels WHERE organization_id = $1 AND id <> $2"
    return int(await tx.raw.fetchval(query, organization, but or ""))


async def insert_tunnel(tx: Tx, row: dict[str, Any]) -> sa.Row[Any] | None:
    """The new row, or ``None`` when its name or its subdomain is taken."""
    statement = insert(tunnels).values(**row).on_conflict_do_nothing().returning(tunnels)
    return (await tx.execute(statement)).first()


async def tunnel(reader: Reader, organization: str, tunnel_id: str) -> sa.Row[Any] | None:
    return await reader.fetch_one(sa.select(tunnels).where(_T.organization_id == organization, _T.id == tunnel_id))


async def lock_tunnel(tx: Tx, organization: str, tunnel_id: str) -> sa.Row[Any] | None:
    """The row, held against other writers until the transaction ends."""
    query = sa.select(tunnels).where(_T.organization_id == organization, _T.id == tunnel_id).with_for_update()
    return await tx.fetch_one(query)


async def tunnel_by_name(reader: Reader, organization: str, name: str) -> sa.Row[Any] | None:
    return await reader.fetch_one(sa.select(tunnels).where(_T.organization_id == organization, _T.name == name))


async def list_tunnels(reader: Reader, organization: str, limit: int, after: str | None) -> Sequence[sa.Row[Any]]:
    query = sa.select(tunnels).where(_T.organization_id == organization)
    if after is not None:
        query = query.where(_T.id > after)
    return await reader.fetch_all(query.order_by(_T.id).limit(limit))


async def update_tunnel(tx: Tx, organization: str, tunnel_id: str, values: dict[str, Any]) -> sa.Row[Any] | None:
    """The changed row. A unique violation is the caller's to name; it leaves the transaction usable by a savepoint."""
    statement = sa.update(tunnels).where(_T.organization_id == organization, _T.id == tunnel_id)
    return (await tx.execute(statement.values(**values, updated_at=sa.func.now()).returning(tunnels))).first()


async def hold_tunnels(tx: Tx, organization: str, held: str | None) -> Sequence[sa.Row[Any]]:
    """Hold the tunnels of the organization, or let them go; the rows that changed. Grants from before are fenced."""
    where = sa.and_(_T.organization_id == organization, _T.held.is_distinct_from(held))
    change = sa.update(tunnels).where(where).values(held=held, generation=_T.generation + 1)
    return (await tx.execute(change.returning(tunnels))).all()


async def some_tunnels(tx: Tx, organization: str, rows: int) -> Sequence[sa.Row[Any]]:
    """Up to ``rows`` tunnels of the organization, held until the transaction ends."""
    query = sa.select(_T.id, _T.subdomain, _T.port).where(_T.organization_id == organization)
    return await tx.fetch_all(query.order_by(_T.id).limit(rows).with_for_update())


async def delete_tunnel(tx: Tx, organization: str, tunnel_id: str) -> None:
    await tx.execute(sa.delete(tunnels).where(_T.organization_id == organization, _T.id == tunnel_id))


_EDGE_TUNNELS = """
SELECT id, organization_id, protocol, subdomain, port, state, held, frozen, generation, policy::text, policy_hash,
       policy_version
FROM tunnels
"""


async def edge_tunnels(reader: Reader) -> list[Any]:
    return list(await reader.raw.fetch(_EDGE_TUNNELS))


# -- ports of TCP tunnels -----------------------------------------------------------------------------------------------

_FREE = """leased_at IS NULL AND (freed_at IS NULL OR freed_at < now() - make_interval(secs => $2)"""
_LEASE = """
UPDATE tcp_ports SET organization_id = $1, leased_at = now(), freed_at = NULL
WHERE port = (SELECT port FROM tcp_ports WHERE {which} FOR UPDATE SKIP LOCKED)
RETURNING port
"""
_LEASE_ONE = _LEASE.format(which=f"port = $3 AND {_FREE} OR organization_id = $1)")
# Ports that nobody had before come first, then those that have been free for the longest.
_LEASE_ANY = _LEASE.format(which=f"{_FREE}) AND port BETWEEN $3 AND $4 ORDER BY freed_at NULLS FIRST, port LIMIT 1")
_FREE_ORPHANS = """
UPDATE tcp_ports SET leased_at = NULL, freed_at = now()
WHERE leased_at IS NOT NULL AND NOT EXISTS (SELECT FROM tunnels WHERE tunnels.port = tcp_ports.port)
"""


async def add_ports(tx: Tx, ports: range) -> int:
    """Make the rows of ports that are not there yet; how many."""
    status: str = await tx.raw.execute(
        "INSERT INTO tcp_ports (port) SELECT generate_series($1::int, $2::int) ON CONFLICT DO NOTHING",
        ports.start,
        ports.stop - 1,
    )
    return int(status.rpartition(" ")[2])


async def lease_port(tx: Tx, organization: str, port: int, quarantine_seconds: float) -> int | None:
    """Lease this port; ``None`` when somebody has it, is about to have it, or had it within the quarantine."""
    leased: int | None = await tx.raw.fetchval(_LEASE_ONE, organization, float(quarantine_seconds), port)
    return leased


async def lease_any_port(tx: Tx, organization: str, ports: range, quarantine_seconds: float) -> int | None:
    """Lease a free port of the range; ``None`` when there is none."""
    leased: int | None = await tx.raw.fetchval(
        _LEASE_ANY, organization, float(quarantine_seconds), ports.start, ports.stop - 1
    )
    return leased


async def free_port(tx: Tx, port: int) -> None:
    """The port's tunnel is gone or has another one: its quarantine begins."""
    await tx.raw.execute("UPDATE tcp_ports SET leased_at = NULL, freed_at = now() WHERE port = $1", port)


async def free_orphaned_ports(tx: Tx) -> None:
    """Free the ports of tunnels that went with their organization."""
    await tx.raw.execute(_FREE_ORPHANS)


# -- history ------------------------------------------------------------------------------------------------------------


async def add_events(tx: Tx, rows: list[dict[str, Any]]) -> None:
    if rows:
        await tx.execute(sa.insert(tunnel_events), rows)


async def list_events(reader: Reader, tunnel_id: str, limit: int, before: str | None) -> Sequence[sa.Row[Any]]:
    """Newest first. The caller has checked whose tunnel it is."""
    query = sa.select(tunnel_events).where(tunnel_events.c.tunnel_id == tunnel_id)
    if before is not None:
        query = query.where(tunnel_events.c.id < before)
    return await reader.fetch_all(query.order_by(tunnel_events.c.id.desc()).limit(limit))


# A tunnel that is being deleted has no history left to add to; one that is here stays until this is committed.
_ADD_PRESENCE = """
INSERT INTO tunnel_events (id, tunnel_id, kind, details)
SELECT e.id, t.id, e.kind, e.details::jsonb || jsonb_strip_nulls(jsonb_build_object('agent', s.hostname))
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[]) AS e (id, tunnel_id, session_id, kind, details)
JOIN tunnels t ON t.id = e.tunnel_id
LEFT JOIN agent_sessions s ON s.id = e.session_id
FOR KEY SHARE OF t
"""
_ORGANIZATION_EVENTS = """
SELECT e.id, e.kind, e.details, e.at, t.id AS tunnel, t.name
FROM tunnels t CROSS JOIN LATERAL (
    SELECT * FROM tunnel_events
    WHERE tunnel_id = t.id AND id >= $3 AND id < $4 AND at >= $5
    ORDER BY id DESC LIMIT $6
) e
WHERE t.organization_id = $1 AND ($2::text[] IS NULL OR t.id = ANY($2))
ORDER BY e.id DESC LIMIT $6
"""


async def add_presence(tx: Tx, events: tuple[list[str], list[str], list[str], list[str], list[str]]) -> None:
    """Events (id, tunnel, session, kind, details as JSON) of those tunnels that exist, with the machine of the session."""
    await tx.raw.execute(_ADD_PRESENCE, *events)


async def organization_events(
    reader: Reader, organization: str, tunnels: list[str] | None, first: str, before: str, since: datetime, limit: int
) -> list[Any]:
    """Newest first: ids from ``first`` on and below ``before``, not older than ``since``."""
    return list(await reader.raw.fetch(_ORGANIZATION_EVENTS, organization, tunnels, first, before, since, limit))


async def known_tunnels(reader: Reader, organization: str, tunnel_ids: list[str]) -> set[str]:
    """Those of the ids that are tunnels of the organization."""
    rows = await reader.raw.fetch(
        "SELECT id FROM tunnels WHERE organization_id = $1 AND id = ANY($2)", organization, tunnel_ids
    )
    return {row["id"] for row in rows}


async def clear_events(db: Database, history_seconds: float, organizations: list[str] | None = None) -> int:
    """Delete events of tunnels, of these organizations or of all, that are older than that; returns how many."""
    old = tunnel_events.c.at < columns.ago(history_seconds)
    if organizations is not None:
        theirs = sa.select(_T.id).where(_T.organization_id == sa.any_(sa.literal(organizations, sa.ARRAY(sa.Text))))
        old = sa.and_(old, tunnel_events.c.tunnel_id.in_(theirs))
    return await delete_in_batches(db, tunnel_events, old)
