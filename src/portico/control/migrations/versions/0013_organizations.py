"""Organizations: several for each person, invitations, exports, and deletion with days of grace.

Safe for the code before: it makes no sign-in session without an organization, and knows no tunnel that is held.
"""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"

STATEMENTS = """
ALTER TABLE organizations ADD COLUMN deletion_requested_at timestamptz, ADD COLUMN delete_after timestamptz;
CREATE INDEX organizations_delete_after_ix ON organizations (delete_after) WHERE delete_after IS NOT NULL;
ALTER TABLE members ADD COLUMN last_used_at timestamptz;
ALTER TABLE sign_in_sessions ALTER COLUMN organization_id DROP NOT NULL;
ALTER TABLE tunnels ADD COLUMN held text CONSTRAINT tunnels_held_check CHECK (held IN ('suspended', 'deleting'));
CREATE TABLE invitations (
    id text CONSTRAINT invitations_pkey PRIMARY KEY,
    organization_id text NOT NULL CONSTRAINT invitations_organization_id_fkey REFERENCES organizations ON DELETE CASCADE,
    email text NOT NULL,
    role text NOT NULL,
    invited_by text NOT NULL CONSTRAINT invitations_invited_by_fkey REFERENCES users ON DELETE CASCADE,
    digest bytea NOT NULL CONSTRAINT invitations_digest_key UNIQUE,
    sends integer NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now(),
    sent_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    accepted_at timestamptz,
    accepted_by text CONSTRAINT invitations_accepted_by_fkey REFERENCES users ON DELETE SET NULL,
    revoked_at timestamptz
);
CREATE UNIQUE INDEX invitations_one_open ON invitations (organization_id, email)
    WHERE accepted_at IS NULL AND revoked_at IS NULL;
CREATE INDEX invitations_organization_id_id_ix ON invitations (organization_id, id);
CREATE INDEX invitations_expires_at_ix ON invitations (expires_at);
CREATE INDEX invitations_invited_by_ix ON invitations (invited_by);
CREATE INDEX invitations_accepted_by_ix ON invitations (accepted_by);
CREATE TABLE organization_exports (
    id text CONSTRAINT organization_exports_pkey PRIMARY KEY,
    organization_id text NOT NULL
        CONSTRAINT organization_exports_organization_id_fkey REFERENCES organizations ON DELETE CASCADE,
    requested_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    file text,
    bytes bigint,
    sha256 bytea,
    expires_at timestamptz,
    queue_state text NOT NULL DEFAULT 'pending'
        CONSTRAINT organization_exports_queue_state_check CHECK (queue_state IN ('pending', 'done', 'dead')),
    attempts integer NOT NULL DEFAULT 0,
    queued_at timestamptz NOT NULL DEFAULT now(),
    available_at timestamptz NOT NULL DEFAULT now(),
    lease_token uuid,
    last_error text,
    finished_at timestamptz
);
CREATE INDEX organization_exports_queue_ix ON organization_exports (queue_state, available_at) WHERE queue_state <> 'done';
CREATE INDEX organization_exports_organization_id_id_ix ON organization_exports (organization_id, id)
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
