"""The tables of tunnels, agent sessions, relays and usage, and every query on them.

Calls that happen per grant, heartbeat or usage batch are raw asyncpg in one statement; the rest is SQLAlchemy Core.
JSON passes through raw statements as text, so that it does not matter which codec a connection has.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any, Final

import asyncpg
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from portico.control.audit import service as audit
from portico.control.fleet import relays
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, HasConnection, Reader, Tx, metadata
from portico.kit.ids import new_id


def _time(name: str, *, required: bool = False, default: bool = False) -> sa.Column[Any]:
    kind = sa.DateTime(timezone=True)
    return sa.Column(name, kind, nullable=not (required or default), server_default=sa.func.now() if default else None)


def _organization() -> sa.Column[Any]:
    return sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), nullable=False)


def _counts() -> list[sa.Column[Any]]:
    names = ("requests", "connections", "bytes_in", "bytes_out", "errors")
    return [sa.Column(name, sa.BigInteger, nullable=False, server_default="0") for name in names]


# A row per port that was ever offered to TCP tunnels: leased, or free since `freed_at`, or never used.
tcp_ports = sa.Table(
    "tcp_ports",
    metadata,
    sa.Column("port", sa.Integer, primary_key=True, autoincrement=False),
    # Who has it, or had it last.
    sa.Column("organization_id", sa.Text),
    _time("leased_at"),
    _time("freed_at"),
    sa.Index(
        "tcp_ports_free_ix", sa.text("freed_at NULLS FIRST"), "port", postgresql_where=sa.text("leased_at IS NULL")
    ),
)

tunnels = sa.Table(
    "tunnels",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _organization(),
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
    _time("created_at", default=True),
    _time("updated_at", default=True),
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
    _time("at", default=True),
    sa.Index("tunnel_events_tunnel_id_id_ix", "tunnel_id", "id"),
    sa.Index("tunnel_events_at_ix", "at"),
)

agent_sessions = sa.Table(
    "agent_sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _organization(),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("agent_id", sa.Text, nullable=False),
    sa.Column("hostname", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("region", sa.Text),
    # Of the agent, when it last asked the API for tokens; what the networks of its key are held against.
    sa.Column("address", sa.Text),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="1"),
    _time("created_at", default=True),
    _time("updated_at", default=True),
    # When the newest token expires. Past it and the outage grace, nothing of the session can be alive.
    _time("expires_at", required=True),
    _time("ended_at"),
    sa.Column("ended_code", sa.Text),
    # Until when relays must refuse its tokens.
    _time("refused_until"),
    sa.Index(
        "agent_sessions_one_live_key", "key_id", "agent_id", unique=True, postgresql_where=sa.text("ended_at IS NULL")
    ),
    sa.Index("agent_sessions_refused_until_ix", "refused_until", postgresql_where=sa.text("refused_until IS NOT NULL")),
    sa.Index("agent_sessions_organization_id_ix", "organization_id"),
    sa.Index("agent_sessions_expires_at_ix", "expires_at"),
)

agent_session_tunnels = sa.Table(
    "agent_session_tunnels",
    metadata,
    sa.Column("session_id", sa.Text, sa.ForeignKey("agent_sessions.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("tunnel_id", sa.Text, sa.ForeignKey("tunnels.id", ondelete="CASCADE"), primary_key=True, index=True),
    sa.Column("position", sa.Integer, nullable=False),
)

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
    _time("created_at", default=True),
    _time("revoked_at"),
)

edge_usage_batches = sa.Table(
    "edge_usage_batches",
    metadata,
    sa.Column("relay", sa.Text, primary_key=True),
    sa.Column("boot", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    _time("received_at", default=True),
    sa.Index("edge_usage_batches_received_at_ix", "received_at"),
)

# Totals per hour. No foreign key to tunnels: what a deleted tunnel used stays counted.
tunnel_usage = sa.Table(
    "tunnel_usage",
    metadata,
    sa.Column("tunnel_id", sa.Text, primary_key=True),
    sa.Column("hour", sa.DateTime(timezone=True), primary_key=True),
    sa.Column("organization_id", sa.Text, nullable=False),
    *_counts(),
    sa.Index("tunnel_usage_organization_id_hour_ix", "organization_id", "hour"),
)

organization_usage = sa.Table(
    "organization_usage",
    metadata,
    sa.Column("organization_id", sa.Text, primary_key=True),
    sa.Column("hour", sa.DateTime(timezone=True), primary_key=True),
    *_counts(),
)

# The same per calendar month (UTC): what the quotas of a month are compared with.
organization_months = sa.Table(
    "organization_months",
    metadata,
    sa.Column("organization_id", sa.Text, primary_key=True),
    sa.Column("month", sa.Date, primary_key=True),
    *_counts(),
)

# Which shares of which quota an organization was told of, once each a month.
usage_notices = sa.Table(
    "usage_notices",
    metadata,
    sa.Column("organization_id", sa.Text, primary_key=True),
    sa.Column("month", sa.Date, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("percent", sa.Integer, primary_key=True),
    _time("created_at", default=True),
)

# -- tunnels ------------------------------------------------------------------------------------------------------------

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


# On line, or named by a live session so recently that it may be about to come.
_ONLINE = """
SELECT n.tunnel_id, min(n.session_id) AS session_id
FROM agent_sessions s JOIN agent_session_tunnels n ON n.session_id = s.id
WHERE s.organization_id = $1 AND s.id <> $2 AND s.ended_at IS NULL AND s.expires_at > now()
  AND (s.updated_at > now() - make_interval(secs => $3) OR EXISTS (
      SELECT 1 FROM relay_bindings b JOIN relays r ON r.name = b.relay
      WHERE b.tunnel_id = n.tunnel_id AND b.session_id = s.id AND r.seen_at > now() - make_interval(secs => $3)))
GROUP BY n.tunnel_id ORDER BY n.tunnel_id
"""


async def online_tunnels(reader: Reader, organization: str, but_session: str, lease_seconds: float) -> list[str]:
    """The tunnels of the organization that are on line or about to be, the oldest first; not those of one session."""
    rows = await reader.raw.fetch(_ONLINE, organization, but_session, float(lease_seconds))
    return [row["tunnel_id"] for row in rows]


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
    columns = (_T.id, _T.protocol, _T.policy, _T.frozen)
    return await tx.fetch_all(sa.select(*columns).where(_T.organization_id == organization).order_by(_T.id))


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


async def list_relays(reader: Reader, lease: float, limit: int, after: str | None) -> Sequence[sa.Row[Any]]:
    """Relays by name, with how many tunnels each has bound, and whether its last heartbeat is within the lease."""
    bound = sa.select(sa.func.count()).where(relay_bindings.c.relay == relays.c.name).scalar_subquery()
    live = relays.c.seen_at > sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, lease)
    query = sa.select(relays, bound.label("tunnels"), live.label("live"))
    if after is not None:
        query = query.where(relays.c.name > after)
    return await reader.fetch_all(query.order_by(relays.c.name).limit(limit))


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


async def add_presence(tx: Tx, columns: tuple[list[str], list[str], list[str], list[str], list[str]]) -> None:
    """Events (id, tunnel, session, kind, details as JSON) of those tunnels that exist, with the machine of the session."""
    await tx.raw.execute(_ADD_PRESENCE, *columns)


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


# -- agent sessions -----------------------------------------------------------------------------------------------------

# Tunnels that a session's specs may mean: by name, subdomain, origin or port, or bound to it already.
# FOR KEY SHARE: none of them can be deleted before the session that names it is committed.
_CANDIDATES = """
SELECT t.id, t.organization_id, t.name, t.protocol, t.subdomain, t.target, t.policy::text, t.policy_hash,
       t.policy_version, t.generation, t.state, t.frozen, t.origin, t.port, b.position
FROM tunnels t LEFT JOIN agent_session_tunnels b ON b.session_id = $2 AND b.tunnel_id = t.id
WHERE t.organization_id = $1
  AND (t.name = ANY($3) OR t.subdomain = ANY($4) OR t.origin = ANY($5) OR t.port = ANY($6)
       OR t.id IN (SELECT tunnel_id FROM agent_session_tunnels WHERE session_id = $2))
ORDER BY t.id
"""
_OPEN_SESSION = """
INSERT INTO agent_sessions
    (id, organization_id, key_id, agent_id, hostname, version, region, expires_at, address)
VALUES ($1, $2, $3, $4, $5, $6, $7, now() + make_interval(secs => $8), $9)
ON CONFLICT (key_id, agent_id) WHERE ended_at IS NULL DO UPDATE
SET generation = agent_sessions.generation + 1, hostname = excluded.hostname, version = excluded.version,
    region = excluded.region, expires_at = excluded.expires_at, address = excluded.address, updated_at = now()
RETURNING id, generation
"""
# A tunnel that was deleted a moment ago is left out, as it would be had it been deleted a moment later.
_BIND = """
WITH wanted AS (
    SELECT t.id, w.position
    FROM unnest($2::text[], $3::int[]) AS w (tunnel_id, position) JOIN tunnels t ON t.id = w.tunnel_id
    ORDER BY t.id FOR KEY SHARE OF t
), bound AS (
    INSERT INTO agent_session_tunnels (session_id, tunnel_id, position) SELECT $1, id, position FROM wanted
    ON CONFLICT (session_id, tunnel_id) DO UPDATE SET position = excluded.position
)
INSERT INTO tunnel_events (id, tunnel_id, kind, details)
SELECT e.id, e.tunnel_id, 'session', jsonb_build_object('session', $1::text)
FROM unnest($4::text[], $5::text[]) AS e (id, tunnel_id) JOIN wanted ON wanted.id = e.tunnel_id
"""
# No lock on the key is needed to go on with a session: its revocation ends the row, before this statement or after it.
_RESUME_SESSION = """
WITH session AS (
    UPDATE agent_sessions
    SET expires_at = now() + make_interval(secs => $3), updated_at = now(){more}
    WHERE key_id = $1 AND agent_id = $2 AND ended_at IS NULL {which}
    RETURNING id, generation, region
)
SELECT session.id AS session, session.generation AS session_generation, session.region, t.id, t.name, t.protocol,
       t.subdomain, t.target, t.policy::text, t.policy_hash, t.policy_version, t.generation, t.state, t.frozen, t.origin,
       t.port, b.position
FROM session
LEFT JOIN agent_session_tunnels b ON b.session_id = session.id
LEFT JOIN tunnels t ON t.id = b.tunnel_id
ORDER BY b.position
"""
_REFRESH_SESSION = _RESUME_SESSION.format(more=", address = $5", which="AND id = $4")
_MORE = ", generation = generation + 1, hostname = $4, version = $5, region = $6, address = $7"
_CONTINUE_SESSION = _RESUME_SESSION.format(more=_MORE, which="")
# While all tunnels of the session count as on line (as ``_ONLINE`` has it): it takes no place that it has not.
_KEEPS_PLACE = """AND expires_at > now() AND (
    updated_at > now() - make_interval(secs => {lease})
    OR NOT EXISTS (
        SELECT 1 FROM agent_session_tunnels n
        WHERE n.session_id = agent_sessions.id AND NOT EXISTS (
            SELECT 1 FROM relay_bindings b JOIN relays r ON r.name = b.relay
            WHERE b.tunnel_id = n.tunnel_id AND b.session_id = n.session_id
              AND r.seen_at > now() - make_interval(secs => {lease}))))"""
_CONTINUE_ONLINE = _RESUME_SESSION.format(more=_MORE, which=_KEEPS_PLACE.format(lease="$8"))
_REFRESH_ONLINE = _RESUME_SESSION.format(more=", address = $5", which="AND id = $4 " + _KEEPS_PLACE.format(lease="$6"))
_END_SESSIONS = """
UPDATE agent_sessions
SET ended_at = now(), ended_code = $2, refused_until = expires_at + make_interval(secs => $3), updated_at = now()
WHERE ended_at IS NULL AND {where}
RETURNING id, organization_id, ceil(extract(epoch FROM refused_until))::bigint AS until
"""
_END_BY_KEY = _END_SESSIONS.format(where="key_id = $1")
_END_BY_ID = _END_SESSIONS.format(where="id = ANY($1)")
_END_BY_ORGANIZATION = _END_SESSIONS.format(where="organization_id = $1")
_END_ONE = _END_SESSIONS.format(where="id = $1 AND key_id = $4 AND organization_id = $5")


_START_SESSION = f"""
WITH opened AS MATERIALIZED (
    SELECT * FROM start_agent_session($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)
), noted AS ({audit.unnumbered_sql(19, "EXISTS (SELECT FROM opened)")})
SELECT * FROM opened
"""  # noqa: S608 - our own names


async def start_session(
    reader: Reader,
    begun: tuple[str, str, str, str, str],
    facts: tuple[str, str, str | None],
    address: str | None,
    life_seconds: int,
    online: tuple[int | None, float],
    wanted: Sequence[tuple[str, str, str | None, int | None, str | None]],
    note: tuple[Any, ...],
) -> list[Any]:
    """Start the session ``begun`` (its id, organization, key, mark of the key, agent id) with these tunnels (name, protocol,
    subdomain, port, target) if they exist and are so: a row for each, in order, or none. Migration 0021 has the function.

    ``online``: how many tunnels may be on line, by a lease of so many seconds. ``note``: the audit row of ``unnumbered``. One
    statement, so outside a transaction it is its own.
    """
    events = [new_id("evt") for _ in wanted]
    columns = [list(column) for column in zip(*wanted, strict=True)]
    try:
        return list(
            await reader.raw.fetch(
                _START_SESSION, *begun, *facts, address, float(life_seconds), *online, *columns, events, *note
            )
        )
    except asyncpg.SerializationError:  # a tunnel was stopped or deleted at this moment
        return []


async def open_session(
    tx: Tx,
    session_id: str,
    organization: str,
    key_id: str,
    agent_id: str,
    facts: tuple[str, str, str | None],
    life_seconds: int,
    address: str | None,
) -> Any:
    """Start the session of (key, agent), or take over the live one: the row ``(id, generation)``."""
    life = float(life_seconds)
    return await tx.raw.fetchrow(_OPEN_SESSION, session_id, organization, key_id, agent_id, *facts, life, address)


async def session_candidates(
    tx: Tx,
    organization: str,
    session_id: str,
    names: list[str],
    subdomains: list[str],
    origins: list[str],
    ports: list[int],
) -> list[Any]:
    """Tunnels that a session's specs may mean: by name, subdomain, origin or port, or bound to the session already."""
    return list(await tx.raw.fetch(_CANDIDATES, organization, session_id, names, subdomains, origins, ports))


async def busy_tunnels(tx: Tx, tunnel_ids: list[str], session_id: str, lease_seconds: float) -> set[str]:
    """Those that another live session uses: bound at a live relay, or named so recently that it may be about to bind."""
    query = """
        SELECT DISTINCT n.tunnel_id
        FROM agent_session_tunnels n JOIN agent_sessions s ON s.id = n.session_id
        WHERE n.tunnel_id = ANY($1) AND s.id <> $2 AND s.ended_at IS NULL AND s.expires_at > now()
          AND (s.updated_at > now() - make_interval(secs => $3) OR EXISTS (
              SELECT 1 FROM relay_bindings b JOIN relays r ON r.name = b.relay
              WHERE b.tunnel_id = n.tunnel_id AND b.session_id = s.id AND r.seen_at > now() - make_interval(secs => $3)))
    """
    return {row["tunnel_id"] for row in await tx.raw.fetch(query, tunnel_ids, session_id, float(lease_seconds))}


async def bind(tx: Tx, session_id: str, wanted: dict[str, int], fresh: list[str]) -> None:
    """Bind tunnels (id → position) to the session; ``fresh`` are those for whom that is an event."""
    events = [new_id("evt") for _ in fresh]
    await tx.raw.execute(_BIND, session_id, list(wanted), list(wanted.values()), events, fresh)


async def unbind(tx: Tx, session_id: str, tunnel_ids: list[str]) -> None:
    await tx.raw.execute(
        "DELETE FROM agent_session_tunnels WHERE session_id = $1 AND tunnel_id = ANY($2)", session_id, tunnel_ids
    )


async def session_size(tx: Tx, session_id: str) -> tuple[int, int]:
    """How many tunnels the session has and the next free position. The session's row must be held."""
    row = await tx.raw.fetchrow(
        "SELECT count(*) AS size, coalesce(max(position) + 1, 0) AS next FROM agent_session_tunnels WHERE session_id = $1",
        session_id,
    )
    return row["size"], row["next"]


async def refresh_session(
    reader: Reader,
    key_id: str,
    agent_id: str,
    life_seconds: int,
    session_id: str,
    address: str | None,
    online_seconds: float | None = None,
) -> list[Any]:
    """Extend a live session: one row per tunnel (one with null tunnel columns when it has none), empty if not live.

    ``online_seconds``: only if all its tunnels count as on line, by a lease of so many seconds. One statement, so outside a
    transaction it is its own. ``continue_session`` likewise.
    """
    given = (key_id, agent_id, float(life_seconds), session_id, address)
    if online_seconds is None:
        return list(await reader.raw.fetch(_REFRESH_SESSION, *given))
    return list(await reader.raw.fetch(_REFRESH_ONLINE, *given, float(online_seconds)))


async def tunnels_of_session(tx: Tx, session_id: str) -> list[str]:
    """The ids of the tunnels of a session that is held."""
    rows = await tx.raw.fetch("SELECT tunnel_id FROM agent_session_tunnels WHERE session_id = $1", session_id)
    return [row["tunnel_id"] for row in rows]


_CROWD = """
SELECT t.organization_id, count(DISTINCT b.tunnel_id) AS online
FROM relay_bindings b JOIN relays r ON r.name = b.relay JOIN tunnels t ON t.id = b.tunnel_id
WHERE t.organization_id IN (SELECT organization_id FROM tunnels WHERE id = ANY($1))
  AND r.seen_at > now() - make_interval(secs => $2)
GROUP BY t.organization_id
"""


async def crowd(reader: Reader, tunnel_ids: list[str], lease_seconds: float) -> dict[str, int]:
    """The organizations of these tunnels, with how many tunnels each has bound at live relays."""
    rows = await reader.raw.fetch(_CROWD, tunnel_ids, float(lease_seconds))
    return {row["organization_id"]: row["online"] for row in rows}


async def continue_session(
    reader: Reader,
    key_id: str,
    agent_id: str,
    life_seconds: int,
    facts: tuple[str, str, str | None],
    address: str | None,
    online_seconds: float | None,
) -> list[Any]:
    """Extend the instance's live session under its next generation; rows as ``refresh_session``.

    ``online_seconds``: only if all its tunnels count as on line, by a lease of so many seconds.
    """
    given = (key_id, agent_id, float(life_seconds), *facts, address)
    if online_seconds is None:
        return list(await reader.raw.fetch(_CONTINUE_SESSION, *given))
    return list(await reader.raw.fetch(_CONTINUE_ONLINE, *given, float(online_seconds)))


async def lock_session(tx: Tx, session_id: str, key_id: str) -> Any:
    """The live session of that key, held until the transaction ends; ``None`` if there is none."""
    return await tx.raw.fetchrow(
        "SELECT id, organization_id, hostname, generation FROM agent_sessions"
        " WHERE id = $1 AND key_id = $2 AND ended_at IS NULL FOR UPDATE",
        session_id,
        key_id,
    )


async def session_end_code(reader: Reader, session_id: str, key_id: str) -> str | None:
    """Why a session of that key ended; ``None`` when there never was one."""
    code: str | None = await reader.raw.fetchval(
        "SELECT ended_code FROM agent_sessions WHERE id = $1 AND key_id = $2", session_id, key_id
    )
    return code


async def end_session(
    tx: Tx, session_id: str, code: str, grace_seconds: float, key_id: str, organization: str
) -> list[Any]:
    """End one live session; its ``(id, organization_id, until)``."""
    return list(await tx.raw.fetch(_END_ONE, session_id, code, float(grace_seconds), key_id, organization))


async def end_sessions_of_key(tx: Tx, key_id: str, code: str, grace_seconds: float) -> list[Any]:
    """End every live session of a key; ``(id, organization_id, until)`` of each."""
    return list(await tx.raw.fetch(_END_BY_KEY, key_id, code, float(grace_seconds)))


async def session_addresses(tx: Tx, key_id: str) -> list[Any]:
    """``(id, address)`` of every live session of a key, held until the transaction ends."""
    query = "SELECT id, address FROM agent_sessions WHERE key_id = $1 AND ended_at IS NULL ORDER BY id FOR UPDATE"
    return list(await tx.raw.fetch(query, key_id))


async def end_sessions_by_id(tx: Tx, ids: list[str], code: str, grace_seconds: float) -> list[Any]:
    """End these live sessions; ``(id, organization_id, until)`` of each."""
    return list(await tx.raw.fetch(_END_BY_ID, ids, code, float(grace_seconds)))


async def end_sessions_of_organization(tx: Tx, organization: str, code: str, grace_seconds: float) -> list[Any]:
    """End every live session of an organization; ``(id, organization_id, until)`` of each."""
    return list(await tx.raw.fetch(_END_BY_ORGANIZATION, organization, code, float(grace_seconds)))


# -- what relays hold ---------------------------------------------------------------------------------------------------

_EDGE_TUNNELS = """
SELECT id, organization_id, protocol, subdomain, port, state, held, frozen, generation, policy::text, policy_hash,
       policy_version
FROM tunnels
"""
_EDGE_ENDED = """
SELECT id, ended_code, ceil(extract(epoch FROM refused_until))::bigint AS until
FROM agent_sessions WHERE refused_until > to_timestamp($1)
"""


async def edge_tunnels(reader: Reader) -> list[Any]:
    return list(await reader.raw.fetch(_EDGE_TUNNELS))


async def edge_ended(reader: Reader, now: float) -> list[Any]:
    return list(await reader.raw.fetch(_EDGE_ENDED, now))


# -- relays -------------------------------------------------------------------------------------------------------------

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


async def hostnames(reader: Reader, organization: str, session_ids: list[str]) -> dict[str, str]:
    """The machine of each session of the organization."""
    rows = await reader.raw.fetch(
        "SELECT id, hostname FROM agent_sessions WHERE organization_id = $1 AND id = ANY($2)", organization, session_ids
    )
    return {row["id"]: row["hostname"] for row in rows}


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


# -- usage --------------------------------------------------------------------------------------------------------------

_CLAIM_BATCHES = """
INSERT INTO edge_usage_batches (relay, boot, seq) SELECT $1, $2, unnest($3::bigint[])
ON CONFLICT DO NOTHING RETURNING seq
"""
_COUNTS: Final = ("requests", "connections", "bytes_in", "bytes_out", "errors")
# What a total can hold. A relay that reports nonsense fills it up, and its report is not a fault that it repeats for ever.
MAX_TOTAL: Final = 2**63 - 1


def _added(table: str) -> str:
    return ", ".join(f"{c} = least({table}.{c}::numeric + excluded.{c}, {MAX_TOTAL})::bigint" for c in _COUNTS)


_ADD_TUNNEL_USAGE = f"""
INSERT INTO tunnel_usage (tunnel_id, hour, organization_id, requests, connections, bytes_in, bytes_out, errors)
SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
                     $8::bigint[])
ON CONFLICT (tunnel_id, hour) DO UPDATE SET {_added("tunnel_usage")}
"""  # noqa: S608 - our own names
_ADD_ORGANIZATION_USAGE = f"""
INSERT INTO organization_usage (organization_id, hour, requests, connections, bytes_in, bytes_out, errors)
SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[])
ON CONFLICT (organization_id, hour) DO UPDATE SET {_added("organization_usage")}
"""  # noqa: S608 - our own names


async def claim_batches(tx: Tx, relay: str, boot: str, seqs: list[int]) -> set[int]:
    """The batches that nobody counted before; a concurrent duplicate waits for this transaction."""
    return {row["seq"] for row in await tx.raw.fetch(_CLAIM_BATCHES, relay, boot, seqs)}


async def tunnel_owners(reader: Reader, tunnel_ids: list[str]) -> dict[str, str]:
    """The organization of each tunnel that exists, or that usage was counted for before it was deleted."""
    rows = await reader.raw.fetch(
        "SELECT id, organization_id FROM tunnels WHERE id = ANY($1) UNION"
        " SELECT tunnel_id, organization_id FROM tunnel_usage WHERE tunnel_id = ANY($1)",
        tunnel_ids,
    )
    return {row["id"]: row["organization_id"] for row in rows}


_ADD_MONTHS = f"""
INSERT INTO organization_months (organization_id, month, requests, connections, bytes_in, bytes_out, errors)
SELECT * FROM unnest($1::text[], $2::date[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[])
ON CONFLICT (organization_id, month) DO UPDATE SET {_added("organization_months")}
"""  # noqa: S608 - our own names
_ADD_NOTICES = """
INSERT INTO usage_notices (organization_id, month, name, percent) SELECT $1, $2, $3, unnest($4::int[])
ON CONFLICT DO NOTHING RETURNING percent
"""
_SUMS = ", ".join(f"least(sum({name}), {MAX_TOTAL})::bigint AS {name}" for name in _COUNTS)
# The periods are whole days or months of UTC, and so are the hours that they are made of.
_USAGE = f"""
SELECT date_trunc($2, hour, 'UTC') AS period, {_SUMS} FROM {{table}}
WHERE organization_id = $1 AND hour >= $3 AND hour < $4{{more}} GROUP BY 1 ORDER BY 1
"""  # noqa: S608 - our own names
_ORGANIZATION_USAGE = _USAGE.format(table="organization_usage", more="")
_TUNNEL_USAGE = _USAGE.format(table="tunnel_usage", more=" AND tunnel_id = $5")


async def add_month_usage(tx: Tx, columns: list[list[Any]]) -> None:
    await tx.raw.execute(_ADD_MONTHS, *columns)


async def month(reader: Reader, organization: str, month: date) -> Any:
    """The organization's totals of a month; ``None`` before the first."""
    query = "SELECT * FROM organization_months WHERE organization_id = $1 AND month = $2"
    return await reader.raw.fetchrow(query, organization, month)


async def months(reader: Reader, organizations: list[str], month: date) -> dict[str, Any]:
    """The same of several organizations."""
    query = "SELECT * FROM organization_months WHERE organization_id = ANY($1) AND month = $2"
    return {row["organization_id"]: row for row in await reader.raw.fetch(query, organizations, month)}


async def add_notices(tx: Tx, organization: str, month: date, name: str, percents: list[int]) -> list[int]:
    """Those of ``percents`` that were not noted before."""
    rows = await tx.raw.fetch(_ADD_NOTICES, organization, month, name, percents)
    return [row["percent"] for row in rows]


async def notices(reader: Reader, organizations: list[str], month: date) -> set[tuple[str, str, int]]:
    """Organization, limit and percent of every notice of a month."""
    query = "SELECT organization_id, name, percent FROM usage_notices WHERE organization_id = ANY($1) AND month = $2"
    return {tuple(row) for row in await reader.raw.fetch(query, organizations, month)}


async def usage(
    reader: Reader, organization: str, tunnel_id: str | None, by: str, since: datetime, until: datetime
) -> list[Any]:
    """Totals per ``day`` or ``month`` (UTC), of the organization or of one of its tunnels: ``(period, counts…)``."""
    if tunnel_id is None:
        return list(await reader.raw.fetch(_ORGANIZATION_USAGE, organization, by, since, until))
    return list(await reader.raw.fetch(_TUNNEL_USAGE, organization, by, since, until, tunnel_id))


async def had_tunnel(reader: Reader, organization: str, tunnel_id: str) -> bool:
    """Whether the organization has this tunnel, or had it when it was used."""
    query = """
        SELECT EXISTS (SELECT 1 FROM tunnels WHERE id = $1 AND organization_id = $2)
            OR EXISTS (SELECT 1 FROM tunnel_usage WHERE tunnel_id = $1 AND organization_id = $2)
    """
    return bool(await reader.raw.fetchval(query, tunnel_id, organization))


async def add_tunnel_usage(tx: Tx, columns: list[list[Any]]) -> None:
    await tx.raw.execute(_ADD_TUNNEL_USAGE, *columns)


async def add_organization_usage(tx: Tx, columns: list[list[Any]]) -> None:
    await tx.raw.execute(_ADD_ORGANIZATION_USAGE, *columns)


# -- clearing -----------------------------------------------------------------------------------------------------------


async def clear(db: Database, *, grace_seconds: float, history_seconds: float) -> int:
    """Delete what is over, some at a time; returns how many rows."""

    def ago(seconds: float) -> sa.ColumnElement[Any]:
        return sa.func.now() - _seconds(seconds)

    sessions, batches = agent_sessions.c, edge_usage_batches.c
    over = (
        # A session whose last token and its grace are over can never come back: its agent starts a new one.
        (agent_sessions, sa.func.coalesce(sessions.refused_until, sessions.expires_at + _seconds(grace_seconds))),
        (relays, relays.c.seen_at + _seconds(grace_seconds)),
    )
    old = ((edge_usage_batches, batches.received_at), (tunnel_events, tunnel_events.c.at))
    gone = 0
    for table, until in over:
        gone += await delete_in_batches(db, table, until < sa.func.now())
    for table, at in old:
        gone += await delete_in_batches(db, table, at < ago(history_seconds))
    return gone


async def clear_events(db: Database, organizations: list[str], history_seconds: float) -> int:
    """Delete events of the tunnels of some organizations that are older than that; returns how many."""
    theirs = sa.select(_T.id).where(_T.organization_id == sa.any_(sa.literal(organizations, sa.ARRAY(sa.Text))))
    old = tunnel_events.c.at < sa.func.now() - _seconds(history_seconds)
    return await delete_in_batches(db, tunnel_events, sa.and_(old, tunnel_events.c.tunnel_id.in_(theirs)))


def _seconds(seconds: float) -> sa.ColumnElement[Any]:
    return sa.func.make_interval(0, 0, 0, 0, 0, 0, float(seconds))
