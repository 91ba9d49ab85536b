"""Report exports and their schedules; settlement sinks, receipts and runs.

New tables: code before this step does not know them.
"""

from __future__ import annotations

from alembic import op

revision = "0031"
down_revision = "0030"

_QUEUE = """
    queue_state text NOT NULL DEFAULT 'pending'
        CONSTRAINT {table}_queue_state_check CHECK (queue_state IN ('pending', 'done', 'dead')),
    attempts integer NOT NULL DEFAULT 0,
    queued_at timestamptz NOT NULL DEFAULT now(),
    available_at timestamptz NOT NULL DEFAULT now(),
    moved_at timestamptz NOT NULL DEFAULT now(),
    lease_token uuid,
    last_error text,
    finished_at timestamptz
"""

STATEMENTS = f"""
CREATE TABLE billing_report_exports (
    id text CONSTRAINT billing_report_exports_pkey PRIMARY KEY,
    organization_id text,
    requested_by text NOT NULL,
    schedule_id text,
    dataset text NOT NULL,
    format text NOT NULL,
    period_start timestamptz NOT NULL,
    period_end timestamptz NOT NULL,
    destination jsonb NOT NULL,
    state text NOT NULL CONSTRAINT billing_report_exports_state_check CHECK (state IN ('queued', 'generating', 'ready',
        'delivering', 'delivered', 'acked', 'failed', 'expired')),
    error text,
    file text,
    bytes bigint,
    sha256 bytea,
    row_count bigint,
    totals jsonb,
    schema_version integer,
    cut_off bigint,
    generated_at timestamptz,
    sealed_ack_token bytea NOT NULL,
    ack_digest bytea NOT NULL,
    delivery integer NOT NULL DEFAULT 0,
    message_id text,
    delivered_at timestamptz,
    receipt text,
    acked_at timestamptz,
    ack_mismatches integer NOT NULL DEFAULT 0,
    late_ack_at timestamptz,
    expires_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    {_QUEUE.format(table="billing_report_exports").strip()},
    CONSTRAINT billing_report_exports_schedule_id_key UNIQUE (schedule_id, period_start),
    CONSTRAINT billing_report_exports_period_check CHECK (period_start < period_end)
);
CREATE INDEX billing_report_exports_queue_ix ON billing_report_exports (queue_state, available_at)
    WHERE queue_state <> 'done';
CREATE INDEX billing_report_exports_organization_id_id_ix ON billing_report_exports (organization_id, id);
CREATE INDEX billing_report_exports_expires_at_ix ON billing_report_exports (expires_at) WHERE file IS NOT NULL;
CREATE INDEX billing_report_exports_state_ix ON billing_report_exports (state, id);
CREATE TABLE billing_report_schedules (
    id text CONSTRAINT billing_report_schedules_pkey PRIMARY KEY,
    organization_id text,
    created_by text NOT NULL,
    dataset text NOT NULL,
    format text NOT NULL,
    every text NOT NULL CONSTRAINT billing_report_schedules_every_check CHECK (every IN ('day', 'week', 'month')),
    destination jsonb NOT NULL,
    next_start timestamptz NOT NULL,
    next_end timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX billing_report_schedules_organization_id_id_ix ON billing_report_schedules (organization_id, id);
CREATE INDEX billing_report_schedules_next_end_ix ON billing_report_schedules (next_end);
CREATE TABLE billing_settlement_sinks (
    id text CONSTRAINT billing_settlement_sinks_pkey PRIMARY KEY,
    name text NOT NULL CONSTRAINT billing_settlement_sinks_name_key UNIQUE,
    url text,
    sealed_secrets bytea NOT NULL,
    tolerances jsonb NOT NULL DEFAULT '{{}}'::jsonb,
    state text NOT NULL DEFAULT 'active'
        CONSTRAINT billing_settlement_sinks_state_check CHECK (state IN ('active', 'disabled')),
    created_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE billing_settlement_receipts (
    id text CONSTRAINT billing_settlement_receipts_pkey PRIMARY KEY,
    sink_id text CONSTRAINT billing_settlement_receipts_sink_id_fkey REFERENCES billing_settlement_sinks (id),
    origin text NOT NULL,
    message_id text NOT NULL,
    batch_id text NOT NULL,
    revision integer NOT NULL,
    issued_at timestamptz NOT NULL,
    body_digest bytea NOT NULL,
    sealed_body bytea NOT NULL,
    provider text NOT NULL,
    account text NOT NULL,
    livemode boolean NOT NULL,
    period_start timestamptz NOT NULL,
    period_end timestamptz NOT NULL,
    export_id text,
    state text NOT NULL CONSTRAINT billing_settlement_receipts_state_check
        CHECK (state IN ('received', 'verified', 'matched', 'delta', 'failed', 'resolved')),
    reason text,
    resolution text CONSTRAINT billing_settlement_receipts_resolution_check
        CHECK (resolution IN ('accepted', 'disputed', 'superseded')),
    superseded_by text,
    adjusted jsonb NOT NULL DEFAULT '{{}}'::jsonb,
    accepted bytea,
    recorded bigint,
    deltas jsonb NOT NULL DEFAULT '{{}}'::jsonb,
    findings jsonb NOT NULL DEFAULT '{{}}'::jsonb,
    runs integer NOT NULL DEFAULT 0,
    cause text NOT NULL DEFAULT 'received',
    received_at timestamptz NOT NULL DEFAULT now(),
    reconciled_at timestamptz,
    checked_at timestamptz,
    {_QUEUE.format(table="billing_settlement_receipts").strip()},
    CONSTRAINT billing_settlement_receipts_origin_key UNIQUE (origin, message_id),
    CONSTRAINT billing_settlement_receipts_batch_key UNIQUE (origin, batch_id, revision)
);
CREATE INDEX billing_settlement_receipts_queue_ix ON billing_settlement_receipts (queue_state, available_at)
    WHERE queue_state <> 'done';
CREATE INDEX billing_settlement_receipts_state_id_ix ON billing_settlement_receipts (state, id);
CREATE INDEX billing_settlement_receipts_period_ix
    ON billing_settlement_receipts (provider, account, livemode, period_start);
CREATE TABLE billing_settlement_runs (
    receipt_id text NOT NULL CONSTRAINT billing_settlement_runs_receipt_id_fkey
        REFERENCES billing_settlement_receipts (id),
    number integer NOT NULL,
    verdict text NOT NULL,
    cause text NOT NULL,
    recorded bigint NOT NULL,
    digest bytea NOT NULL,
    report jsonb NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_settlement_runs_pkey PRIMARY KEY (receipt_id, number)
);
CREATE FUNCTION billing_settlement_runs_immutable() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'what a comparison came to is never changed' USING ERRCODE = 'restrict_violation'; END $$;
CREATE TRIGGER billing_settlement_runs_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON billing_settlement_runs
    EXECUTE FUNCTION billing_settlement_runs_immutable()
"""


def upgrade() -> None:
    """Add the tables."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
