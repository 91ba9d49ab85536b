"""Incidents of certificates, and notes on them.

New tables: code before this step does not know them.
"""

from __future__ import annotations

from alembic import op

revision = "0025"
down_revision = "0024"

STATEMENTS = """
CREATE TABLE certificate_incidents (
    id text CONSTRAINT certificate_incidents_pkey PRIMARY KEY,
    domain_id text NOT NULL CONSTRAINT certificate_incidents_domain_id_fkey
        REFERENCES custom_domains (id) ON DELETE CASCADE,
    organization_id text NOT NULL,
    hostname text NOT NULL,
    incident_class text NOT NULL CONSTRAINT certificate_incidents_incident_class_check
        CHECK (incident_class IN ('ownership', 'validation', 'issuance', 'deployment', 'renewal', 'revocation', 'expiry',
            'deletion', 'replication', 'integrity')),
    tier smallint NOT NULL CONSTRAINT certificate_incidents_tier_check CHECK (tier BETWEEN 1 AND 3),
    status text NOT NULL
        CONSTRAINT certificate_incidents_status_check CHECK (status IN ('open', 'acknowledged', 'resolved')),
    conditions jsonb NOT NULL,
    opened_at timestamptz NOT NULL,
    changed_at timestamptz NOT NULL,
    escalated_at timestamptz,
    acknowledged_at timestamptz,
    acknowledged_by text,
    resolved_at timestamptz,
    resolved_by text,
    by_hand boolean NOT NULL DEFAULT false,
    reopened integer NOT NULL DEFAULT 0,
    told_at timestamptz,
    told_tier smallint,
    told boolean NOT NULL DEFAULT false,
    notices integer NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX certificate_incidents_open_ix ON certificate_incidents (domain_id, incident_class)
    WHERE status <> 'resolved';
CREATE INDEX certificate_incidents_domain_id_id_ix ON certificate_incidents (domain_id, id);
CREATE INDEX certificate_incidents_status_id_ix ON certificate_incidents (status, id);
CREATE TABLE certificate_incident_notes (
    id text CONSTRAINT certificate_incident_notes_pkey PRIMARY KEY,
    incident_id text NOT NULL CONSTRAINT certificate_incident_notes_incident_id_fkey
        REFERENCES certificate_incidents (id) ON DELETE CASCADE,
    author text NOT NULL,
    text text NOT NULL,
    created_at timestamptz NOT NULL
);
CREATE INDEX certificate_incident_notes_incident_id_ix ON certificate_incident_notes (incident_id)
"""


def upgrade() -> None:
    """Add the tables."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
