"""Certificates by ACME: accounts, what is due, orders, challenges, and what is left of authorities' limits.

New tables: code before this step does not know them.
"""

from __future__ import annotations

from alembic import op

revision = "0024"
down_revision = "0023"

STATEMENTS = """
CREATE TABLE acme_accounts (
    id text NOT NULL,
    directory text NOT NULL,
    sealed_key bytea NOT NULL,
    url text,
    orders_url text,
    paused_until timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT acme_accounts_pkey PRIMARY KEY (id),
    CONSTRAINT acme_accounts_directory_key UNIQUE (directory)
);
CREATE TABLE certificate_schedules (
    domain_id text NOT NULL,
    organization_id text NOT NULL,
    next_at timestamptz,
    forced boolean NOT NULL DEFAULT false,
    ca integer NOT NULL DEFAULT 0,
    staging_first boolean NOT NULL DEFAULT false,
    failures integer NOT NULL DEFAULT 0,
    ca_failures integer NOT NULL DEFAULT 0,
    error_code text,
    ordered_at timestamptz,
    directory text,
    certificate text,
    fingerprint text,
    not_before timestamptz,
    not_after timestamptz,
    ari_next_at timestamptz,
    ari_start timestamptz,
    ari_end timestamptz,
    ari_explanation text,
    CONSTRAINT certificate_schedules_pkey PRIMARY KEY (domain_id),
    CONSTRAINT certificate_schedules_domain_id_fkey FOREIGN KEY(domain_id) REFERENCES custom_domains (id) ON DELETE CASCADE
);
CREATE INDEX certificate_schedules_ari_next_at_ix ON certificate_schedules (ari_next_at) WHERE ari_next_at IS NOT NULL;
CREATE INDEX certificate_schedules_next_at_ix ON certificate_schedules (next_at) WHERE next_at IS NOT NULL;
CREATE TABLE certificate_orders (
    id text NOT NULL,
    domain_id text NOT NULL,
    organization_id text COLLATE "C" NOT NULL,
    name text NOT NULL,
    state text DEFAULT 'new' NOT NULL,
    revision bigint NOT NULL,
    ca integer NOT NULL DEFAULT 0,
    directory text NOT NULL,
    staging boolean NOT NULL DEFAULT false,
    renewal boolean NOT NULL DEFAULT false,
    replaces text,
    challenge text,
    asked integer NOT NULL DEFAULT 0,
    order_url text,
    proofs jsonb DEFAULT '[]'::jsonb NOT NULL,
    sealed_key bytea,
    wrapped_key bytea,
    wrap_id text,
    csr bytea,
    certificate_url text,
    error_code text,
    error_detail text,
    created_at timestamptz NOT NULL DEFAULT now(),
    queue_state text DEFAULT 'pending' NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    queued_at timestamptz NOT NULL DEFAULT now(),
    available_at timestamptz NOT NULL DEFAULT now(),
    moved_at timestamptz NOT NULL DEFAULT now(),
    lease_token uuid,
    last_error text,
    finished_at timestamptz,
    CONSTRAINT certificate_orders_pkey PRIMARY KEY (id),
    CONSTRAINT certificate_orders_state_check CHECK (state IN (
        'new', 'probing', 'ordering', 'authorizing', 'publishing', 'validating', 'ready', 'finalizing', 'downloading',
        'issued', 'failed', 'canceled'
    )),
    CONSTRAINT certificate_orders_queue_state_check CHECK (queue_state IN ('pending', 'done', 'dead')),
    CONSTRAINT certificate_orders_domain_id_fkey FOREIGN KEY(domain_id) REFERENCES custom_domains (id) ON DELETE CASCADE
);
CREATE INDEX certificate_orders_domain_id_ix ON certificate_orders (domain_id);
CREATE UNIQUE INDEX certificate_orders_open_ix ON certificate_orders (name) WHERE state NOT IN ('issued', 'failed', 'canceled');
CREATE INDEX certificate_orders_queue_ix ON certificate_orders (queue_state, available_at) WHERE queue_state <> 'done';
CREATE INDEX certificate_orders_turns_ix ON certificate_orders (organization_id, available_at) WHERE queue_state = 'pending';
CREATE TABLE acme_challenges (
    id text NOT NULL,
    order_id text NOT NULL,
    type text NOT NULL,
    host text NOT NULL,
    token text NOT NULL,
    key_authorization text NOT NULL,
    until timestamptz NOT NULL,
    CONSTRAINT acme_challenges_pkey PRIMARY KEY (id),
    CONSTRAINT acme_challenges_order_id_fkey FOREIGN KEY(order_id) REFERENCES certificate_orders (id) ON DELETE CASCADE
);
CREATE INDEX acme_challenges_order_id_ix ON acme_challenges (order_id);
CREATE TABLE acme_budget (
    directory text NOT NULL,
    bucket text NOT NULL,
    key text NOT NULL,
    tokens double precision NOT NULL,
    at timestamptz NOT NULL,
    CONSTRAINT acme_budget_pkey PRIMARY KEY (directory, bucket, key)
)
"""


def upgrade() -> None:
    """Add the tables."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
