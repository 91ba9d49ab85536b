"""Platform operators have a grant of their own: who gave it, when, why, until when.

Safe for the code before: it reads ``users.platform_operator``, which is kept true for grants without expiry.
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"

STATEMENTS = """
CREATE TABLE operator_grants (
    id text CONSTRAINT operator_grants_pkey PRIMARY KEY,
    user_id text NOT NULL CONSTRAINT operator_grants_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
    granted_by text NOT NULL,
    granted_at timestamptz NOT NULL DEFAULT now(),
    reason text,
    expires_at timestamptz,
    revoked_at timestamptz,
    revoked_by text
);
CREATE INDEX operator_grants_user_id_ix ON operator_grants (user_id);
CREATE UNIQUE INDEX operator_grants_one_live ON operator_grants (user_id) WHERE revoked_at IS NULL;
INSERT INTO operator_grants (id, user_id, granted_by, granted_at, reason)
SELECT 'opg_' || substr(id, 5), id, 'installation', created_at, 'from before grants were recorded'
FROM users WHERE platform_operator
"""


def upgrade() -> None:
    """Add the table, with a grant for each operator that there is."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
