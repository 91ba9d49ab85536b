"""What the public edge was last seen to serve, by domain and region, and every query of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa

from portico.kit.db import HasConnection, Tx, metadata

OUTCOMES: Final = ("good", "unreachable", "no_certificate", "wrong_certificate", "wrong_name", "expired", "untrusted")

probes = sa.Table(
    "certificate_probes",
    metadata,
    sa.Column("domain_id", sa.Text, sa.ForeignKey("custom_domains.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("region", sa.Text, primary_key=True),
    sa.Column("outcome", sa.Text, nullable=False),
    # SHA-256 of the leaf that was served, hex.
    sa.Column("fingerprint", sa.Text),
    sa.Column("detail", sa.Text),
    # Looks in a row with a fault of the certificate itself; being out of reach is none.
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("checked_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.CheckConstraint(f"outcome IN ({', '.join(repr(one) for one in OUTCOMES)})", name="outcome"),
)

_DUE = """
SELECT d.id, d.name, v.fingerprint FROM certificate_heads h
JOIN custom_domains d ON d.id = h.domain_id
JOIN certificate_versions v ON v.id = h.active_id
WHERE d.id > $1 AND d.tls_mode = 'terminate' AND d.hostname_status IN ('verified', 'active')
  AND v.switched_at < now() - make_interval(secs => $3)
ORDER BY d.id LIMIT $2
"""
_PUT = """
INSERT INTO certificate_probes AS p (domain_id, region, outcome, fingerprint, detail, failures)
SELECT n.domain_id, n.region, n.outcome, n.fingerprint, n.detail, (n.outcome NOT IN ('good', 'unreachable'))::int
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[]) AS n (domain_id, region, outcome, fingerprint, detail)
JOIN (SELECT id FROM custom_domains WHERE id = ANY($1) ORDER BY id FOR KEY SHARE) d ON d.id = n.domain_id
ON CONFLICT (domain_id, region) DO UPDATE
SET outcome = excluded.outcome, fingerprint = excluded.fingerprint, detail = excluded.detail, checked_at = now(),
    failures = CASE excluded.outcome WHEN 'good' THEN 0 WHEN 'unreachable' THEN p.failures ELSE p.failures + 1 END
"""


async def due(reader: HasConnection, after: str, limit: int, settled_seconds: float) -> list[Any]:
    """Domains after ``after`` that serve since some time: ``id, name, fingerprint`` of what they should serve with."""
    return list(await reader.raw.fetch(_DUE, after, limit, float(settled_seconds)))


async def put(tx: Tx, rows: Sequence[tuple[str, str, str, str | None, str | None]]) -> None:
    """``(domain, region, outcome, fingerprint, detail)``; those of domains that went are left out."""
    await tx.raw.execute(_PUT, *(list(column) for column in zip(*rows, strict=True)))


async def failures(reader: HasConnection, domain_ids: Sequence[str]) -> dict[tuple[str, str], int]:
    """(domain, region) → for how many looks in a row its certificate has been wrong; absent: never looked at."""
    query = "SELECT domain_id, region, failures FROM certificate_probes WHERE domain_id = ANY($1)"
    rows = await reader.raw.fetch(query, list(domain_ids))
    return {(row["domain_id"], row["region"]): row["failures"] for row in rows}
