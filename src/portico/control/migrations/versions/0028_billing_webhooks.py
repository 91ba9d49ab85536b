"""Events of payment providers as the queue of a worker, PayPal's certificates, objectives, and comparisons with providers' lists.

New tables: code before this step does not know them.
"""

from __future__ import annotations

from alembic import op

revision = "0028"
down_revision = "0027"

STATEMENTS = """
CREATE TABLE billing_webhook_events (
    id text CONSTRAINT billing_webhook_events_pkey PRIMARY KEY,
    provider text NOT NULL CONSTRAINT billing_webhook_events_provider_check
        CHECK (provider IN ('stripe', 'razorpay', 'paypal')),
    account text NOT NULL,
    livemode boolean NOT NULL,
    event_id text NOT NULL,
    event_type text NOT NULL,
    api_version text,
    occurred_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    origin text NOT NULL DEFAULT 'webhook' CONSTRAINT billing_webhook_events_origin_check
        CHECK (origin IN ('webhook', 'reconcile')),
    raw_sha256 bytea NOT NULL,
    sealed_body bytea,
    proven boolean NOT NULL,
    transmission_id text,
    transmission jsonb,
    source text,
    proof text,
    status text NOT NULL CONSTRAINT billing_webhook_events_status_check
        CHECK (status IN ('received', 'verified', 'applied', 'ignored')),
    reason text,
    lane text COLLATE "C" NOT NULL,
    effects integer NOT NULL DEFAULT 0,
    replays integer NOT NULL DEFAULT 0,
    automatic_replays integer NOT NULL DEFAULT 0,
    replay_id text,
    replayed_at timestamptz,
    queue_state text NOT NULL DEFAULT 'pending' CONSTRAINT billing_webhook_events_queue_state_check
        CHECK (queue_state IN ('pending', 'done', 'dead')),
    attempts integer NOT NULL DEFAULT 0,
    queued_at timestamptz NOT NULL DEFAULT now(),
    available_at timestamptz NOT NULL DEFAULT now(),
    moved_at timestamptz NOT NULL DEFAULT now(),
    lease_token uuid,
    last_error text,
    finished_at timestamptz
);
CREATE INDEX billing_webhook_events_queue_ix ON billing_webhook_events (queue_state, available_at)
    WHERE queue_state <> 'done';
CREATE INDEX billing_webhook_events_turns_ix ON billing_webhook_events (lane, available_at) WHERE queue_state = 'pending';
CREATE UNIQUE INDEX billing_webhook_events_event_ix ON billing_webhook_events (provider, account, livemode, event_id)
    WHERE proven;
CREATE UNIQUE INDEX billing_webhook_events_body_ix ON billing_webhook_events (raw_sha256) WHERE proven;
CREATE UNIQUE INDEX billing_webhook_events_transmission_ix ON billing_webhook_events (provider, transmission_id)
    WHERE proven;
CREATE INDEX billing_webhook_events_unproven_ix ON billing_webhook_events (source)
    WHERE NOT proven AND status = 'received';
CREATE INDEX billing_webhook_events_provider_received_at_ix ON billing_webhook_events (provider, received_at);
CREATE INDEX billing_webhook_events_provider_finished_at_ix ON billing_webhook_events (provider, finished_at);
CREATE INDEX billing_webhook_events_received_at_ix ON billing_webhook_events (received_at);
CREATE TABLE billing_webhook_certificates (
    url text CONSTRAINT billing_webhook_certificates_pkey PRIMARY KEY,
    pem text NOT NULL,
    not_after timestamptz NOT NULL,
    fetched_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE billing_webhook_health (
    provider text CONSTRAINT billing_webhook_health_pkey PRIMARY KEY,
    measured_at timestamptz NOT NULL,
    failed integer NOT NULL,
    stale integer NOT NULL,
    p95_seconds double precision,
    applied integer NOT NULL,
    broken_since timestamptz,
    broken_by text,
    replayed_at timestamptz,
    replays integer NOT NULL DEFAULT 0
);
CREATE TABLE billing_reconcile_runs (
    id text CONSTRAINT billing_reconcile_runs_pkey PRIMARY KEY,
    provider text NOT NULL,
    since timestamptz NOT NULL,
    until timestamptz NOT NULL,
    dry_run boolean NOT NULL,
    reason text NOT NULL,
    requested_by text NOT NULL,
    scheduled boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    listed integer,
    missing integer,
    added integer,
    foreign_events integer,
    unreadable integer,
    missing_events jsonb,
    queue_state text NOT NULL DEFAULT 'pending' CONSTRAINT billing_reconcile_runs_queue_state_check
        CHECK (queue_state IN ('pending', 'done', 'dead')),
    attempts integer NOT NULL DEFAULT 0,
    queued_at timestamptz NOT NULL DEFAULT now(),
    available_at timestamptz NOT NULL DEFAULT now(),
    moved_at timestamptz NOT NULL DEFAULT now(),
    lease_token uuid,
    last_error text,
    finished_at timestamptz
);
CREATE INDEX billing_reconcile_runs_queue_ix ON billing_reconcile_runs (queue_state, available_at)
    WHERE queue_state <> 'done';
CREATE UNIQUE INDEX billing_reconcile_runs_scheduled_ix ON billing_reconcile_runs (provider)
    WHERE scheduled AND queue_state = 'pending';
CREATE INDEX billing_reconcile_runs_provider_until_ix ON billing_reconcile_runs (provider, until)
"""


def upgrade() -> None:
    """Add the tables."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
