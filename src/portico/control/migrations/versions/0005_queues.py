"""Queues: jobs without a table of a domain, schedules, and the outbox.

New tables only: code before this step does not know them, and sweeps up by itself.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"

_LEASE = """
    queue_state text NOT NULL DEFAULT 'pending'
        CONSTRAINT {table}_queue_state_check CHECK (queue_state IN ('pending', 'done', 'dead')),
    attempts integer NOT NULL DEFAULT 0,
    queued_at timestamptz NOT NULL DEFAULT now(),
    available_at timestamptz NOT NULL DEFAULT now(),
    lease_token uuid,
    last_error text,
    finished_at timestamptz
"""
STATEMENTS = f"""
CREATE TABLE queue_jobs (
    id text CONSTRAINT queue_jobs_pkey PRIMARY KEY DEFAULT gen_random_uuid()::text,
    kind text NOT NULL,
    key text NOT NULL,
    {_LEASE.format(table="queue_jobs").strip()},
    CONSTRAINT queue_jobs_kind_key_key UNIQUE (kind, key)
);
CREATE INDEX queue_jobs_queue_ix ON queue_jobs (kind, queue_state, available_at) WHERE queue_state <> 'done';
CREATE TABLE queue_schedules (
    name text CONSTRAINT queue_schedules_pkey PRIMARY KEY,
    next_at timestamptz NOT NULL
);
CREATE TABLE outbox_messages (
    id text CONSTRAINT outbox_messages_pkey PRIMARY KEY,
    organization_id text,
    driver text NOT NULL,
    idempotency_key text NOT NULL CONSTRAINT outbox_messages_idempotency_key_key UNIQUE,
    recipient text NOT NULL,
    topic text NOT NULL,
    sealed_body bytea,
    receipt text,
    {_LEASE.format(table="outbox_messages").strip()}
);
CREATE INDEX outbox_messages_organization_id_id_ix ON outbox_messages (organization_id, id);
CREATE INDEX outbox_messages_queue_ix ON outbox_messages (driver, queue_state, available_at) WHERE queue_state <> 'done';
CREATE INDEX outbox_messages_finished_at_ix ON outbox_messages (finished_at) WHERE queue_state = 'done'
"""


def upgrade() -> None:
    """Make the tables."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
