"""The tables of agent sessions: which agent serves which tunnels, until when; and every query on them.

What happens per grant is raw asyncpg in one statement. JSON passes through raw statements as text, so that it does not matter
which codec a connection has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import asyncpg
import sqlalchemy as sa

from portico.control.audit import service as audit
from portico.kit import columns
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, Reader, Tx, metadata
from portico.kit.ids import new_id

agent_sessions = sa.Table(
    "agent_sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), nullable=False),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("agent_id", sa.Text, nullable=False),
    sa.Column("hostname", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("region", sa.Text),
    # Of the agent, when it last asked the API for tokens; what the networks of its key are held against.
    sa.Column("address", sa.Text),
    sa.Column("generation", sa.BigInteger, nullable=False, server_default="1"),
    columns.created(),
    columns.now("updated_at"),
    # When the newest token expires. Past it and the outage grace, nothing of the session can be alive.
    columns.time("expires_at", required=True),
    columns.time("ended_at"),
    sa.Column("ended_code", sa.Text),
    # Until when relays must refuse its tokens.
    columns.time("refused_until"),
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


_EDGE_ENDED = """
SELECT id, ended_code, ceil(extract(epoch FROM refused_until))::bigint AS until
FROM agent_sessions WHERE refused_until > to_timestamp($1)
"""


async def edge_ended(reader: Reader, now: float) -> list[Any]:
    return list(await reader.raw.fetch(_EDGE_ENDED, now))


async def hostnames(reader: Reader, organization: str, session_ids: list[str]) -> dict[str, str]:
    """The machine of each session of the organization."""
    rows = await reader.raw.fetch(
        "SELECT id, hostname FROM agent_sessions WHERE organization_id = $1 AND id = ANY($2)", organization, session_ids
    )
    return {row["id"]: row["hostname"] for row in rows}


async def clear(db: Database, grace_seconds: float) -> int:
    """Delete sessions whose last token and its grace are over: they can never come back, their agents start new ones."""
    row = agent_sessions.c
    until = sa.func.coalesce(row.refused_until, row.expires_at + columns.seconds(grace_seconds))
    return await delete_in_batches(db, agent_sessions, until < sa.func.now())
