"""What tunnels used: which reports of relays were counted, totals by hour and month, notices; and every query on these tables.

What happens per report is raw asyncpg in one statement.
"""

from __future__ import annotations

from datetime import date, datetime
from typing import Any, Final

import sqlalchemy as sa

from portico.kit import columns
from portico.kit.batches import delete_in_batches
from portico.kit.db import Database, Reader, Tx, metadata


def _counts() -> list[sa.Column[Any]]:
    names = ("requests", "connections", "bytes_in", "bytes_out", "errors")
    return [sa.Column(name, sa.BigInteger, nullable=False, server_default="0") for name in names]


edge_usage_batches = sa.Table(
    "edge_usage_batches",
    metadata,
    sa.Column("relay", sa.Text, primary_key=True),
    sa.Column("boot", sa.Text, primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    columns.now("received_at"),
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
    columns.created(),
)

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


async def add_month_usage(tx: Tx, totals: list[list[Any]]) -> None:
    await tx.raw.execute(_ADD_MONTHS, *totals)


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


async def add_tunnel_usage(tx: Tx, totals: list[list[Any]]) -> None:
    await tx.raw.execute(_ADD_TUNNEL_USAGE, *totals)


async def add_organization_usage(tx: Tx, totals: list[list[Any]]) -> None:
    await tx.raw.execute(_ADD_ORGANIZATION_USAGE, *totals)


async def clear(db: Database, history_seconds: float) -> int:
    """Delete the numbers of reports that were counted so long ago that no relay sends them again."""
    old = edge_usage_batches.c.received_at < columns.ago(history_seconds)
    return await delete_in_batches(db, edge_usage_batches, old)
