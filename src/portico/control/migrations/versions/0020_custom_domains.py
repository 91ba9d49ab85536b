"""Domains of one's own.

A new table: code before this step does not know it.
"""

from __future__ import annotations

from alembic import op

revision = "0020"
down_revision = "0019"

STATEMENTS = """
CREATE TABLE custom_domains (
    id text CONSTRAINT custom_domains_pkey PRIMARY KEY,
    organization_id text NOT NULL
        CONSTRAINT custom_domains_organization_id_fkey REFERENCES organizations (id) ON DELETE CASCADE,
    name text NOT NULL,
    hostname_status text NOT NULL DEFAULT 'pending' CONSTRAINT custom_domains_hostname_status_check
        CHECK (hostname_status IN ('pending', 'verified', 'active', 'moved', 'blocked', 'deleted')),
    tls_mode text NOT NULL DEFAULT 'terminate'
        CONSTRAINT custom_domains_tls_mode_check CHECK (tls_mode IN ('terminate', 'passthrough')),
    failure_policy text NOT NULL DEFAULT 'standard'
        CONSTRAINT custom_domains_failure_policy_check CHECK (failure_policy IN ('standard', 'strict', 'hold')),
    tunnel_id text CONSTRAINT custom_domains_tunnel_id_fkey REFERENCES tunnels (id) ON DELETE SET NULL,
    verification_token text NOT NULL,
    challenge_delegation text,
    verified_at timestamptz,
    checked_at timestamptz,
    next_check_at timestamptz,
    check_attempts integer NOT NULL DEFAULT 0,
    failing_since timestamptz,
    dns_error text,
    dns_findings jsonb NOT NULL DEFAULT '{}'::jsonb,
    cert_status text NOT NULL DEFAULT 'none' CONSTRAINT custom_domains_cert_status_check
        CHECK (cert_status IN ('none', 'pending_validation', 'pending_issuance', 'pending_deployment', 'active', 'renewing',
            'expired', 'revoked', 'validation_timed_out', 'issuance_timed_out', 'deployment_timed_out')),
    cert_serial text,
    cert_fingerprint text,
    cert_issuer text,
    cert_not_before timestamptz,
    cert_not_after timestamptz,
    cert_renews_at timestamptz,
    cert_error_code text,
    cert_error_detail text,
    cert_failures integer NOT NULL DEFAULT 0,
    cert_retry_at timestamptz,
    cert_source text,
    cert_applied jsonb NOT NULL DEFAULT '{}'::jsonb,
    cert_regions_active integer NOT NULL DEFAULT 0,
    cert_regions_total integer NOT NULL DEFAULT 0,
    cert_held_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX custom_domains_organization_id_id_ix ON custom_domains (organization_id, id);
CREATE INDEX custom_domains_tunnel_id_ix ON custom_domains (tunnel_id);
CREATE UNIQUE INDEX custom_domains_claim_ix ON custom_domains (organization_id, name) WHERE hostname_status <> 'deleted';
CREATE UNIQUE INDEX custom_domains_held_ix ON custom_domains (name)
    WHERE hostname_status IN ('verified', 'active', 'moved', 'blocked');
CREATE INDEX custom_domains_next_check_at_ix ON custom_domains (next_check_at) WHERE next_check_at IS NOT NULL
"""


def upgrade() -> None:
    """Add the table."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
