"""Notification channels: where an organization wants to hear of what happens.

A new table: code before this step does not know it.
"""

from __future__ import annotations

from alembic import op

revision = "0019"
down_revision = "0018"

STATEMENTS = """
CREATE TABLE notification_channels (
    id text CONSTRAINT notification_channels_pkey PRIMARY KEY,
    organization_id text NOT NULL
        CONSTRAINT notification_channels_organization_id_fkey REFERENCES organizations (id) ON DELETE CASCADE,
    kind text NOT NULL CONSTRAINT notification_channels_kind_check CHECK (kind IN ('webhook', 'email', 'slack')),
    name text NOT NULL,
    sealed_target bytea NOT NULL,
    shown_target text NOT NULL,
    events text[] NOT NULL,
    state text NOT NULL
        CONSTRAINT notification_channels_state_check CHECK (state IN ('active', 'off', 'disabled', 'unconfirmed')),
    reason text,
    sealed_secrets bytea,
    code_digest text,
    code_expires_at timestamptz,
    code_tries integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz,
    failing_since timestamptz,
    delivered_at timestamptz,
    last_error text
);
CREATE INDEX notification_channels_organization_id_id_ix ON notification_channels (organization_id, id)
"""


def upgrade() -> None:
    """Add the table."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
