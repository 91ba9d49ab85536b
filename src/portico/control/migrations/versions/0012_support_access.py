"""Support access by consent, and second factors taken away by two operators.

New tables: code before this step does not know them.
"""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"

STATEMENTS = """
CREATE TABLE support_consents (
    id text CONSTRAINT support_consents_pkey PRIMARY KEY,
    organization_id text NOT NULL
        CONSTRAINT support_consents_organization_id_fkey REFERENCES organizations (id) ON DELETE CASCADE,
    scope text NOT NULL CONSTRAINT support_consents_scope_check CHECK (scope IN ('read', 'write')),
    reason text,
    given_by text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    withdrawn_at timestamptz,
    withdrawn_by text
);
CREATE INDEX support_consents_organization_id_id_ix ON support_consents (organization_id, id);
CREATE TABLE support_sessions (
    id text CONSTRAINT support_sessions_pkey PRIMARY KEY,
    consent_id text NOT NULL
        CONSTRAINT support_sessions_consent_id_fkey REFERENCES support_consents (id) ON DELETE CASCADE,
    organization_id text NOT NULL,
    operator_id text NOT NULL,
    sign_in_session text NOT NULL,
    digest bytea NOT NULL CONSTRAINT support_sessions_digest_key UNIQUE,
    reason text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    ended_at timestamptz
);
CREATE INDEX support_sessions_consent_id_ix ON support_sessions (consent_id);
CREATE TABLE mfa_resets (
    id text CONSTRAINT mfa_resets_pkey PRIMARY KEY,
    user_id text NOT NULL CONSTRAINT mfa_resets_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
    requested_by text NOT NULL,
    reason text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    confirmed_by text,
    confirmed_at timestamptz,
    withdrawn_at timestamptz
);
CREATE INDEX mfa_resets_user_id_ix ON mfa_resets (user_id)
"""


def upgrade() -> None:
    """Add the tables."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
