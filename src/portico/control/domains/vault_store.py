"""The tables of sealed certificates and of where they are, and every query on them.

    certificate_heads         one row a domain: the newest version number, which version serves, which is being staged
    certificate_versions      the chain, the sealed key and the signed manifest of a version; retired ones keep no key
    certificate_wraps         the data key of a version, for each key of each region
    certificate_region_keys   public keys of regions
    certificate_acks          what each relay said of each version
    cert_region_replicas      what that means for each region

A head's row is the lock of its domain: whatever changes which version serves holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from portico.kit.db import HasConnection, Reader, Tx, metadata

REPLICA_STATES: Final = ("pending", "staged", "active", "stale", "failed")
VERSION_STATES: Final = ("staging", "active", "superseded", "retired")
ACK_STATES: Final = ("staged", "active", "failed")
#: Versions that a relay may be ahead of the database, after it was restored: renewed daily, a domain's of 27 years.
FLOOR_STEP: Final = 10_000


def _time(name: str, *, default: bool = False) -> sa.Column[Any]:
    kind = sa.DateTime(timezone=True)
    return sa.Column(name, kind, nullable=not default, server_default=sa.func.now() if default else None)


def _required_time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False)


def _one_of(name: str, values: Sequence[str]) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{name} IN ({', '.join(repr(value) for value in values)})", name=name)


def _domain(**more: Any) -> sa.Column[Any]:
    reference = sa.ForeignKey("custom_domains.id", ondelete="CASCADE")
    return sa.Column("domain_id", sa.Text, reference, nullable=False, **more)


def _certificate(**more: Any) -> sa.Column[Any]:
    reference = sa.ForeignKey("certificate_versions.id", ondelete="CASCADE")
    return sa.Column("certificate_id", sa.Text, reference, nullable=False, **more)


heads = sa.Table(
    "certificate_heads",
    metadata,
    _domain(primary_key=True),
    # The newest number that was given out: a fencing token, never given out again.
    sa.Column("last_version", sa.BigInteger, nullable=False),
    sa.Column("active_id", sa.Text),
    sa.Column("staged_id", sa.Text, index=True),
)

versions = sa.Table(
    "certificate_versions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _domain(),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("hostname", sa.Text, nullable=False),
    sa.Column("names", ARRAY(sa.Text), nullable=False),
    # SHA-256 of the leaf, hex.
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("serial", sa.Text, nullable=False),
    sa.Column("issuer", sa.Text, nullable=False),
    _required_time("not_before"),
    _required_time("not_after"),
    sa.Column("chain_pem", sa.Text, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),
    # The private key under its data key; gone when the version serves no more.
    sa.Column("sealed", sa.LargeBinary),
    # The data key for the certificate worker, which wraps it for a region's next key.
    sa.Column("worker_key_id", sa.Text),
    sa.Column("worker_wrap", sa.LargeBinary),
    _time("created_at", default=True),
    _time("switched_at"),
    _time("ended_at"),
    _one_of("state", VERSION_STATES),
    sa.UniqueConstraint("domain_id", "version"),
)

region_keys = sa.Table(
    "certificate_region_keys",
    metadata,
    sa.Column("region", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("public_key", sa.LargeBinary, nullable=False),
    _time("created_at", default=True),
)

wraps = sa.Table(
    "certificate_wraps",
    metadata,
    _certificate(primary_key=True),
    sa.Column("region", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("wrapped", sa.LargeBinary, nullable=False),
    sa.ForeignKeyConstraint(
        ["region", "key_id"],
        ["certificate_region_keys.region", "certificate_region_keys.key_id"],
        ondelete="CASCADE",
        name="certificate_wraps_region_key_id_fkey",
    ),
    sa.Index(None, "region", "key_id"),
)

acks = sa.Table(
    "certificate_acks",
    metadata,
    _certificate(primary_key=True),
    sa.Column("relay", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    # Why it cannot serve it.
    sa.Column("reason", sa.Text),
    _time("acked_at", default=True),
    _one_of("state", ACK_STATES),
)

replicas = sa.Table(
    "cert_region_replicas",
    metadata,
    _certificate(primary_key=True),
    sa.Column("region", sa.Text, primary_key=True),
    _domain(index=True),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("state", sa.Text, nullable=False, index=True),
    # Healthy relays of the region, and those of them that staged it, or serve with it.
    sa.Column("relays", sa.Integer, nullable=False),
    sa.Column("relays_staged", sa.Integer, nullable=False),
    sa.Column("relays_active", sa.Integer, nullable=False),
    # Digest of the names of those relays: with others the region has to be looked at again.
    sa.Column("fleet", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    # Since when the region is not yet where it should be; its lag is the time since then.
    _time("behind_since"),
    _time("acked_at"),
    _time("updated_at", default=True),
    _one_of("state", REPLICA_STATES),
)


# -- region keys -------------------------------------------------------------------------------------------------------


async def take_turns(tx: Tx) -> None:
    """Region keys are added one at a time: rows that are not there yet cannot be locked."""
    await tx.raw.execute("SELECT pg_advisory_xact_lock(hashtextextended('certificate region keys', 0))")


async def insert_region_key(tx: Tx, region: str, key_id: str, public: bytes) -> bool:
    """False when the region has that key already."""
    status: str = await tx.raw.execute(
        "INSERT INTO certificate_region_keys (region, key_id, public_key) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        region,
        key_id,
        public,
    )
    return status.endswith(" 1")


async def region_key_rows(reader: HasConnection, region: str | None = None, *, lock: str = "") -> list[Any]:
    """``region, key_id, public_key, created_at`` of every key, or of one region's; ``lock`` such as ``FOR UPDATE``."""
    query = f"""SELECT region, key_id, public_key, created_at FROM certificate_region_keys
                WHERE $1::text IS NULL OR region = $1 ORDER BY region, created_at, key_id {lock}"""  # noqa: S608
    return list(await reader.raw.fetch(query, region))


async def delete_region_key(tx: Tx, region: str, key_id: str) -> None:
    """With every wrap for it."""
    await tx.raw.execute("DELETE FROM certificate_region_keys WHERE region = $1 AND key_id = $2", region, key_id)


async def unwrapped(
    reader: HasConnection, limit: int, after: str = "", key_ids: Sequence[str] | None = None
) -> list[Any]:
    """Versions with a key that lack the wrap for a region's key (one of ``key_ids``), in order of their ids after ``after``."""
    query = """
        SELECT v.id, v.version, v.hostname, v.fingerprint, v.worker_key_id, v.worker_wrap
        FROM certificate_versions v
        WHERE v.id > $2 AND v.worker_wrap IS NOT NULL AND EXISTS (
            SELECT 1 FROM certificate_region_keys k WHERE ($3::text[] IS NULL OR k.key_id = ANY($3)) AND NOT EXISTS (
                SELECT 1 FROM certificate_wraps w
                WHERE w.certificate_id = v.id AND w.region = k.region AND w.key_id = k.key_id))
        ORDER BY v.id LIMIT $1
    """
    return list(await reader.raw.fetch(query, limit, after, None if key_ids is None else list(key_ids)))


async def missing_wraps(reader: HasConnection, region: str, key_id: str) -> int:
    """How many versions with a key lack the wrap for this one."""
    query = """
        SELECT count(*) FROM certificate_versions v WHERE v.worker_wrap IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM certificate_wraps w WHERE w.certificate_id = v.id AND w.region = $1 AND w.key_id = $2)
    """
    return int(await reader.raw.fetchval(query, region, key_id))


async def insert_wraps(tx: Tx, rows: Sequence[tuple[str, str, str, bytes]]) -> list[str]:
    """``(certificate, region, key_id, wrapped)``; left out are those whose version or key went. Ids of those written."""
    columns: list[list[Any]] = [list(column) for column in zip(*rows, strict=True)] if rows else [[], [], [], []]
    query = """
        INSERT INTO certificate_wraps (certificate_id, region, key_id, wrapped)
        SELECT n.* FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[]) AS n (certificate_id, region, key_id, wrapped)
        JOIN (SELECT id FROM certificate_versions WHERE id = ANY($1) AND sealed IS NOT NULL ORDER BY id FOR SHARE) v
          ON v.id = n.certificate_id
        JOIN (SELECT region, key_id FROM certificate_region_keys ORDER BY region, key_id FOR SHARE) k
          ON k.region = n.region AND k.key_id = n.key_id
        ON CONFLICT DO NOTHING RETURNING certificate_id
    """
    return [row["certificate_id"] for row in await tx.raw.fetch(query, *columns)]


# -- versions ----------------------------------------------------------------------------------------------------------


async def _hold_domains(tx: Tx, domain_ids: Sequence[str]) -> int:
    """Let none of these domains be deleted meanwhile; how many there are. Before their heads, as whoever deletes a domain does:
    rows that refer to a domain hold it too, later than a head is held."""
    rows = await tx.raw.fetch(
        "SELECT 1 FROM custom_domains WHERE id = ANY($1) ORDER BY id FOR KEY SHARE", list(domain_ids)
    )
    return len(rows)


async def next_version(tx: Tx, domain_id: str) -> Any | None:
    """Draw the next number and hold the domain's head: ``last_version, active_id, staged_id``; ``None``: no such domain."""
    if not await _hold_domains(tx, [domain_id]):
        return None
    query = """
        INSERT INTO certificate_heads AS h (domain_id, last_version) VALUES ($1, 1)
        ON CONFLICT (domain_id) DO UPDATE SET last_version = h.last_version + 1
        RETURNING last_version, active_id, staged_id
    """
    return await tx.raw.fetchrow(query, domain_id)


async def hold_heads(tx: Tx, domain_ids: Sequence[str]) -> list[Any]:
    """Hold the heads of these domains, in one order whoever asks: ``domain_id, last_version, active_id, staged_id``."""
    query = """
        SELECT domain_id, last_version, active_id, staged_id FROM certificate_heads
        WHERE domain_id = ANY($1) ORDER BY domain_id FOR UPDATE
    """
    await _hold_domains(tx, domain_ids)
    return list(await tx.raw.fetch(query, list(domain_ids)))


async def insert_version(tx: Tx, row: dict[str, Any]) -> None:
    await tx.execute(sa.insert(versions).values(**row))


async def set_head(tx: Tx, domain_id: str, active_id: str | None, staged_id: str | None) -> None:
    await tx.raw.execute(
        "UPDATE certificate_heads SET active_id = $2, staged_id = $3 WHERE domain_id = $1",
        domain_id,
        active_id,
        staged_id,
    )


async def raise_floor(tx: Tx, domain_id: str, version: int) -> None:
    """Let no number up to ``version`` be given out: a relay has seen it (of a database that was since restored).

    Not by more than a restored copy explains: numbers are finite, and one relay that lies must not use up those of all.
    """
    await tx.raw.execute(
        "UPDATE certificate_heads SET last_version = $2 WHERE domain_id = $1 AND $2 - last_version BETWEEN 1 AND $3",
        domain_id,
        version,
        FLOOR_STEP,
    )


async def activate(tx: Tx, certificate_id: str) -> None:
    await tx.raw.execute(
        "UPDATE certificate_versions SET state = 'active', switched_at = now() WHERE id = $1", certificate_id
    )


async def end_version(tx: Tx, certificate_id: str, state: str) -> None:
    """It serves no more (``retired``), or never will (``superseded``): nobody needs its key any longer."""
    query = """
        UPDATE certificate_versions
        SET state = $2, ended_at = now(), sealed = NULL, worker_wrap = NULL, worker_key_id = NULL WHERE id = $1
    """
    await tx.raw.execute(query, certificate_id, state)
    for table in ("certificate_wraps", "certificate_acks", "cert_region_replicas"):
        await tx.raw.execute(f"DELETE FROM {table} WHERE certificate_id = $1", certificate_id)  # noqa: S608


async def version_rows(reader: HasConnection, ids: Sequence[str]) -> dict[str, Any]:
    """Everything but contents, by id."""
    query = """
        SELECT id, domain_id, version, state, hostname, names, fingerprint, serial, issuer, not_before, not_after, switched_at
        FROM certificate_versions WHERE id = ANY($1)
    """
    return {row["id"]: row for row in await reader.raw.fetch(query, list(ids))}


async def bundles(reader: HasConnection, ids: Sequence[str], region: str) -> list[Any]:
    """What a relay of ``region`` needs of each: ``id, domain_id, version, chain_pem, manifest, sealed, key_ids, wraps``."""
    query = """
        SELECT v.id, v.domain_id, v.version, v.chain_pem, v.manifest, v.sealed,
               array_remove(array_agg(w.key_id ORDER BY w.key_id), NULL) AS key_ids,
               array_remove(array_agg(w.wrapped ORDER BY w.key_id), NULL) AS wraps
        FROM certificate_versions v LEFT JOIN certificate_wraps w ON w.certificate_id = v.id AND w.region = $2
        WHERE v.id = ANY($1) AND v.sealed IS NOT NULL GROUP BY v.id
    """
    return list(await reader.raw.fetch(query, list(ids), region))


_EDGE = """
SELECT h.domain_id, coalesce(s.hostname, a.hostname) AS hostname,
       a.id AS active_id, a.version AS active_version, a.fingerprint AS active_fingerprint,
       s.id AS staged_id, s.version AS staged_version, s.fingerprint AS staged_fingerprint
FROM certificate_heads h
LEFT JOIN certificate_versions a ON a.id = h.active_id
LEFT JOIN certificate_versions s ON s.id = h.staged_id
WHERE ($1::text[] IS NULL OR h.domain_id = ANY($1)) AND (h.active_id IS NOT NULL OR h.staged_id IS NOT NULL)
ORDER BY h.domain_id
"""


async def edge_rows(reader: HasConnection, domain_ids: Sequence[str] | None = None) -> list[Any]:
    """Of each domain with a certificate, what serves and what is being staged."""
    return list(await reader.raw.fetch(_EDGE, None if domain_ids is None else list(domain_ids)))


async def delete_head(tx: Tx, domain_id: str) -> bool:
    """Everything of the domain; false when there was nothing."""
    await tx.raw.execute("DELETE FROM certificate_versions WHERE domain_id = $1", domain_id)
    status: str = await tx.raw.execute("DELETE FROM certificate_heads WHERE domain_id = $1", domain_id)
    return not status.endswith(" 0")


async def domains_of(reader: HasConnection, organization: str, limit: int) -> list[str]:
    """Domains of an organization that have certificates."""
    query = """
        SELECT h.domain_id FROM certificate_heads h JOIN custom_domains d ON d.id = h.domain_id
        WHERE d.organization_id = $1 ORDER BY h.domain_id LIMIT $2
    """
    return [row["domain_id"] for row in await reader.raw.fetch(query, organization, limit)]


_UNSETTLED = """
WITH fleet AS (
    SELECT k.region, md5(coalesce(string_agg(r.name, ' ' ORDER BY r.name), '')) AS fleet
    FROM (SELECT DISTINCT region FROM certificate_region_keys) k
    LEFT JOIN relays r ON r.region = k.region AND r.seen_at > now() - make_interval(secs => $1) AND NOT r.draining
    GROUP BY k.region
)
SELECT h.domain_id FROM certificate_heads h
WHERE h.domain_id > $3 AND (
    h.staged_id IS NOT NULL
    OR EXISTS (SELECT 1 FROM cert_region_replicas r
               WHERE r.certificate_id = h.active_id AND r.state IN ('pending', 'staged'))
    OR h.active_id IS NOT NULL AND EXISTS (
        SELECT 1 FROM fleet f WHERE NOT EXISTS (
            SELECT 1 FROM cert_region_replicas r
            WHERE r.certificate_id = h.active_id AND r.region = f.region AND r.fleet = f.fleet)))
ORDER BY h.domain_id LIMIT $2
"""


async def unsettled(reader: HasConnection, lease_seconds: float, limit: int, after: str) -> list[str]:
    """Domains after ``after`` that time or a change of the fleet may have moved on; acknowledgements see to the rest."""
    rows = await reader.raw.fetch(_UNSETTLED, float(lease_seconds), limit, after)
    return [row["domain_id"] for row in rows]


# -- what relays said --------------------------------------------------------------------------------------------------


async def put_acks(tx: Tx, relay: str, rows: Sequence[tuple[str, str, str, str | None]]) -> list[Any]:
    """``(certificate, fingerprint, state, reason)``: kept where that version is there with that fingerprint and still matters.

    One with another fingerprint is kept as failed. Returns ``id, domain_id, state`` of those that were kept.
    """
    columns: list[list[Any]] = [list(column) for column in zip(*rows, strict=True)] if rows else [[], [], [], []]
    query = """
        WITH said AS (SELECT * FROM unnest($2::text[], $3::text[], $4::text[], $5::text[]) AS s (id, fingerprint, state, reason)),
        held AS (
            SELECT v.id, v.domain_id, v.version,
                   CASE WHEN v.fingerprint = s.fingerprint THEN s.state ELSE 'failed' END AS state,
                   CASE WHEN v.fingerprint = s.fingerprint THEN s.reason ELSE 'the relay holds another certificate' END AS reason
            FROM said s JOIN certificate_versions v ON v.id = s.id AND v.state IN ('staging', 'active')
            ORDER BY v.id FOR KEY SHARE OF v
        ), put AS (
            INSERT INTO certificate_acks AS a (certificate_id, relay, state, reason)
            SELECT id, $1, state, reason FROM held
            ON CONFLICT (certificate_id, relay) DO UPDATE
            SET state = excluded.state, reason = excluded.reason, acked_at = now()
        )
        SELECT id, domain_id, version, state FROM held
    """
    return list(await tx.raw.fetch(query, relay, *columns))


_TALLY = """
WITH fleet AS (
    SELECT r.name, r.region FROM relays r
    WHERE r.seen_at > now() - make_interval(secs => $1) AND NOT r.draining
),
wanted AS (
    SELECT v.id, v.domain_id, v.version, v.state, v.created_at, v.switched_at, k.region
    FROM certificate_heads h
    JOIN certificate_versions v ON v.id IN (h.active_id, h.staged_id)
    CROSS JOIN (SELECT DISTINCT region FROM certificate_region_keys) k
    WHERE $2::text[] IS NULL OR h.domain_id = ANY($2)
)
SELECT w.id, w.domain_id, w.version, w.state, w.region, coalesce(w.switched_at, w.created_at) AS since,
       extract(epoch FROM now() - coalesce(w.switched_at, w.created_at))::float8 AS age,
       count(f.name)::int AS relays, md5(coalesce(string_agg(f.name, ' ' ORDER BY f.name), '')) AS fleet,
       count(f.name) FILTER (WHERE a.state IN ('staged', 'active'))::int AS staged,
       count(f.name) FILTER (WHERE a.state = 'active')::int AS active,
       count(f.name) FILTER (WHERE a.state = 'failed')::int AS failed,
       max(a.reason) FILTER (WHERE a.state = 'failed' AND f.name IS NOT NULL) AS reason,
       max(a.acked_at) AS acked_at
FROM wanted w
LEFT JOIN fleet f ON f.region = w.region
LEFT JOIN certificate_acks a ON a.certificate_id = w.id AND a.relay = f.name
GROUP BY w.id, w.domain_id, w.version, w.state, w.region, w.switched_at, w.created_at
ORDER BY w.id, w.region
"""


async def tally(reader: HasConnection, lease_seconds: float, domain_ids: Sequence[str] | None = None) -> list[Any]:
    """For each version that matters and each region with a key, what its healthy relays said."""
    return list(await reader.raw.fetch(_TALLY, float(lease_seconds), None if domain_ids is None else list(domain_ids)))


async def put_replicas(tx: Tx, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """``(certificate, region, domain, version, state, relays, staged, active, reason, behind, since, acked_at, fleet)``: written
    where something differs; ``domain_id, region, version, state, before, reason`` of those whose state did."""
    columns: list[list[Any]] = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(13)]
    query = """
        WITH said AS (
            SELECT n.* FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::int[], $7::int[], $8::int[],
                                 $9::text[], $10::bool[], $11::timestamptz[], $12::timestamptz[], $13::text[])
              AS n (certificate_id, region, domain_id, version, state, relays, staged, active, reason, behind, since, acked_at,
                    fleet)
            JOIN (SELECT id FROM certificate_versions WHERE id = ANY($1) ORDER BY id FOR KEY SHARE) v ON v.id = n.certificate_id
        ), before AS (
            SELECT r.certificate_id, r.region, r.state FROM cert_region_replicas r WHERE r.certificate_id = ANY($1)
        ), put AS (
            INSERT INTO cert_region_replicas AS r (certificate_id, region, domain_id, version, state, relays, relays_staged,
                                                   relays_active, reason, behind_since, acked_at, fleet)
            SELECT certificate_id, region, domain_id, version, state, relays, staged, active, reason,
                   CASE WHEN behind THEN since END, acked_at, fleet FROM said ORDER BY certificate_id, region
            ON CONFLICT (certificate_id, region) DO UPDATE
            SET state = excluded.state, relays = excluded.relays, relays_staged = excluded.relays_staged,
                relays_active = excluded.relays_active, fleet = excluded.fleet, reason = excluded.reason,
                acked_at = excluded.acked_at,
                behind_since = CASE WHEN excluded.behind_since IS NULL THEN NULL
                                    WHEN r.state = 'active' THEN now()
                                    ELSE coalesce(r.behind_since, excluded.behind_since) END,
                updated_at = now()
            WHERE (r.state, r.relays, r.relays_staged, r.relays_active, r.reason, r.acked_at, r.fleet)
                  IS DISTINCT FROM (excluded.state, excluded.relays, excluded.relays_staged, excluded.relays_active,
                                    excluded.reason, excluded.acked_at, excluded.fleet)
            RETURNING r.certificate_id, r.region, r.domain_id, r.version, r.state, r.reason
        )
        SELECT p.*, b.state AS before FROM put p
        LEFT JOIN before b ON b.certificate_id = p.certificate_id AND b.region = p.region
        WHERE b.state IS DISTINCT FROM p.state
    """
    return list(await tx.raw.fetch(query, *columns))


async def list_replicas(
    reader: Reader,
    limit: int,
    after: tuple[str, str] | None,
    *,
    domain_id: str | None,
    region: str | None,
    state: str | None,
) -> Sequence[sa.Row[Any]]:
    """A page of replicas in order of (certificate, region), with hostname and lag in seconds."""
    behind = sa.func.extract("epoch", sa.func.now() - replicas.c.behind_since)
    query = sa.select(
        replicas,
        versions.c.hostname,
        versions.c.fingerprint,
        sa.func.coalesce(sa.func.greatest(behind, 0), 0).label("lag"),
    ).join(versions, versions.c.id == replicas.c.certificate_id)
    for column, value in ((replicas.c.domain_id, domain_id), (replicas.c.region, region), (replicas.c.state, state)):
        if value is not None:
            query = query.where(column == value)
    if after is not None:
        query = query.where(sa.tuple_(replicas.c.certificate_id, replicas.c.region) > sa.tuple_(*after))
    return await reader.fetch_all(query.order_by(replicas.c.certificate_id, replicas.c.region).limit(limit))


async def counts(reader: HasConnection) -> dict[tuple[str, str], tuple[int, float]]:
    """``(region, state)`` → how many replicas, and the longest lag in seconds; for metrics."""
    rows = await reader.raw.fetch(
        """SELECT region, state, count(*)::int AS n,
                  coalesce(extract(epoch FROM now() - min(behind_since)), 0)::float8 AS lag
           FROM cert_region_replicas GROUP BY region, state"""
    )
    return {(row["region"], row["state"]): (row["n"], row["lag"]) for row in rows}


def moment(value: datetime) -> int:
    """Unix seconds."""
    return int(value.timestamp())
