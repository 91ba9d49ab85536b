"""What the public edge was last seen to serve for each domain, by region.

A new table: code before this step does not know it.
"""

from __future__ import annotations

from alembic import op

revision = "0026"
down_revision = "0025"

STATEMENT = """
CREATE TABLE certificate_probes (
    domain_id text NOT NULL
        CONSTRAINT certificate_probes_domain_id_fkey REFERENCES custom_domains (id) ON DELETE CASCADE,
    region text NOT NULL,
    outcome text NOT NULL CONSTRAINT certificate_probes_outcome_check CHECK (outcome IN (
        'good', 'unreachable', 'no_certificate', 'wrong_certificate', 'wrong_name', 'expired', 'untrusted')),
    fingerprint text,
    detail text,
    failures integer NOT NULL,
    checked_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT certificate_probes_pkey PRIMARY KEY (domain_id, region)
)
"""


def upgrade() -> None:
    """Add the table."""
    op.execute(STATEMENT)
