"""Certificate events: their sources, the events themselves as the queue of a worker, and what they tell of.

New tables: code before this step does not know them.
"""

from __future__ import annotations

from alembic import op

revision = "0022"
down_revision = "0021"

STATEMENTS = """
CREATE SEQUENCE certificate_event_sequence;
CREATE TABLE certificate_sources (
    id text CONSTRAINT certificate_sources_pkey PRIMARY KEY,
    name text NOT NULL CONSTRAINT certificate_sources_name_key UNIQUE,
    environment text NOT NULL,
    clusters text[] NOT NULL,
    cidrs text[] NOT NULL,
    hostnames text[] NOT NULL,
    sealed_keys bytea NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    state text NOT NULL DEFAULT 'active'
        CONSTRAINT certificate_sources_state_check CHECK (state IN ('active', 'disabled')),
    disabled_reason text,
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE certificate_source_counts (
    source_id text NOT NULL CONSTRAINT certificate_source_counts_source_id_fkey
        REFERENCES certificate_sources (id) ON DELETE CASCADE,
    cluster text NOT NULL,
    outcome text NOT NULL,
    count bigint NOT NULL,
    last_at timestamptz NOT NULL,
    last_event text,
    CONSTRAINT certificate_source_counts_pkey PRIMARY KEY (source_id, cluster, outcome)
);
CREATE TABLE certificate_lifecycle_events (
    id text CONSTRAINT certificate_lifecycle_events_pkey PRIMARY KEY,
    source_id text NOT NULL,
    event_id text NOT NULL,
    cluster_id text NOT NULL,
    environment text NOT NULL,
    domain_id text,
    hostname text NOT NULL,
    callback_class text NOT NULL,
    callback_action text NOT NULL,
    event_type text,
    revision bigint NOT NULL,
    sequence bigint NOT NULL,
    occurred_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    body_digest bytea NOT NULL,
    effect_key text NOT NULL,
    repeated boolean NOT NULL DEFAULT false,
    facts jsonb NOT NULL DEFAULT '{}'::jsonb,
    provenance jsonb NOT NULL DEFAULT '{}'::jsonb,
    key_id text,
    status text NOT NULL DEFAULT 'queued' CONSTRAINT certificate_lifecycle_events_status_check
        CHECK (status IN ('queued', 'applied', 'superseded', 'unmapped', 'unmatched')),
    replays integer NOT NULL DEFAULT 0,
    automatic_replays integer NOT NULL DEFAULT 0,
    replay_id text,
    replayed_at timestamptz,
    queue_state text NOT NULL DEFAULT 'pending' CONSTRAINT certificate_lifecycle_events_queue_state_check
        CHECK (queue_state IN ('pending', 'done', 'dead')),
    attempts integer NOT NULL DEFAULT 0,
    queued_at timestamptz NOT NULL DEFAULT now(),
    available_at timestamptz NOT NULL DEFAULT now(),
    moved_at timestamptz NOT NULL DEFAULT now(),
    lease_token uuid,
    last_error text,
    finished_at timestamptz,
    CONSTRAINT certificate_lifecycle_events_source_id_event_id_key UNIQUE (source_id, event_id)
);
CREATE INDEX certificate_lifecycle_events_queue_ix ON certificate_lifecycle_events (queue_state, available_at)
    WHERE queue_state <> 'done';
CREATE INDEX certificate_lifecycle_events_domain_id_id_ix ON certificate_lifecycle_events (domain_id, id);
CREATE INDEX certificate_lifecycle_events_source_id_id_ix ON certificate_lifecycle_events (source_id, id);
CREATE INDEX certificate_lifecycle_events_received_at_ix ON certificate_lifecycle_events (received_at);
CREATE TABLE certificate_effects (
    key text CONSTRAINT certificate_effects_pkey PRIMARY KEY,
    event_id text NOT NULL CONSTRAINT certificate_effects_event_id_fkey
        REFERENCES certificate_lifecycle_events (id) ON DELETE CASCADE
);
CREATE INDEX certificate_effects_event_id_ix ON certificate_effects (event_id)
"""


def upgrade() -> None:
    """Add the tables."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
