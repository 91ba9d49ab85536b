"""Sealed certificates of custom domains, the regions' public keys they are sealed for, and where each version is.

New tables: code before this step does not know them.
"""

from __future__ import annotations

from alembic import op

revision = "0023"
down_revision = "0022"

STATEMENTS = """
CREATE TABLE certificate_heads (
    domain_id text CONSTRAINT certificate_heads_pkey PRIMARY KEY
        CONSTRAINT certificate_heads_domain_id_fkey REFERENCES custom_domains (id) ON DELETE CASCADE,
    last_version bigint NOT NULL,
    active_id text,
    staged_id text
);
CREATE INDEX certificate_heads_staged_id_ix ON certificate_heads (staged_id);
CREATE TABLE certificate_versions (
    id text CONSTRAINT certificate_versions_pkey PRIMARY KEY,
    domain_id text NOT NULL
        CONSTRAINT certificate_versions_domain_id_fkey REFERENCES custom_domains (id) ON DELETE CASCADE,
    version bigint NOT NULL,
    state text NOT NULL
        CONSTRAINT certificate_versions_state_check CHECK (state IN ('staging', 'active', 'superseded', 'retired')),
    hostname text NOT NULL,
    names text[] NOT NULL,
    fingerprint text NOT NULL,
    serial text NOT NULL,
    issuer text NOT NULL,
    not_before timestamptz NOT NULL,
    not_after timestamptz NOT NULL,
    chain_pem text NOT NULL,
    manifest text NOT NULL,
    sealed bytea,
    worker_key_id text,
    worker_wrap bytea,
    created_at timestamptz NOT NULL DEFAULT now(),
    switched_at timestamptz,
    ended_at timestamptz,
    CONSTRAINT certificate_versions_domain_id_version_key UNIQUE (domain_id, version)
);
CREATE TABLE certificate_region_keys (
    region text NOT NULL,
    key_id text NOT NULL,
    public_key bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT certificate_region_keys_pkey PRIMARY KEY (region, key_id)
);
CREATE TABLE certificate_wraps (
    certificate_id text NOT NULL
        CONSTRAINT certificate_wraps_certificate_id_fkey REFERENCES certificate_versions (id) ON DELETE CASCADE,
    region text NOT NULL,
    key_id text NOT NULL,
    wrapped bytea NOT NULL,
    CONSTRAINT certificate_wraps_pkey PRIMARY KEY (certificate_id, region, key_id),
    CONSTRAINT certificate_wraps_region_key_id_fkey FOREIGN KEY (region, key_id)
        REFERENCES certificate_region_keys (region, key_id) ON DELETE CASCADE
);
CREATE INDEX certificate_wraps_region_key_id_ix ON certificate_wraps (region, key_id);
CREATE TABLE certificate_acks (
    certificate_id text NOT NULL
        CONSTRAINT certificate_acks_certificate_id_fkey REFERENCES certificate_versions (id) ON DELETE CASCADE,
    relay text NOT NULL,
    state text NOT NULL
        CONSTRAINT certificate_acks_state_check CHECK (state IN ('staged', 'active', 'failed')),
    reason text,
    acked_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT certificate_acks_pkey PRIMARY KEY (certificate_id, relay)
);
CREATE TABLE cert_region_replicas (
    certificate_id text NOT NULL
        CONSTRAINT cert_region_replicas_certificate_id_fkey REFERENCES certificate_versions (id) ON DELETE CASCADE,
    region text NOT NULL,
    domain_id text NOT NULL
        CONSTRAINT cert_region_replicas_domain_id_fkey REFERENCES custom_domains (id) ON DELETE CASCADE,
    version bigint NOT NULL,
    state text NOT NULL
        CONSTRAINT cert_region_replicas_state_check CHECK (state IN ('pending', 'staged', 'active', 'stale', 'failed')),
    relays integer NOT NULL,
    relays_staged integer NOT NULL,
    relays_active integer NOT NULL,
    fleet text NOT NULL,
    reason text,
    behind_since timestamptz,
    acked_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT cert_region_replicas_pkey PRIMARY KEY (certificate_id, region)
);
CREATE INDEX cert_region_replicas_domain_id_ix ON cert_region_replicas (domain_id);
CREATE INDEX cert_region_replicas_state_ix ON cert_region_replicas (state)
"""


def upgrade() -> None:
    """Add the tables."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
