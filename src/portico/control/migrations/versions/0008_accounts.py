"""Accounts: verified addresses, ways in beside the password, and when a session's person last proved who they are.

Columns have defaults and tables are new: code before this step goes on without them.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"

STATEMENTS = """
ALTER TABLE users ADD COLUMN email_verified_at timestamptz;
UPDATE users SET email_verified_at = created_at WHERE platform_operator;
ALTER TABLE sign_in_sessions
    ADD COLUMN authenticated_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN methods text[] NOT NULL DEFAULT '{}';
UPDATE sign_in_sessions SET authenticated_at = created_at, methods = '{pwd}';
CREATE TABLE account_tokens (
    digest bytea CONSTRAINT account_tokens_pkey PRIMARY KEY,
    purpose text NOT NULL
        CONSTRAINT account_tokens_purpose_check CHECK (purpose IN ('verify', 'reset', 'change', 'sign_in')),
    user_id text CONSTRAINT account_tokens_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
    email text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    used_at timestamptz
);
CREATE INDEX account_tokens_user_id_ix ON account_tokens (user_id);
CREATE INDEX account_tokens_expires_at_ix ON account_tokens (expires_at);
CREATE TABLE totp_keys (
    user_id text CONSTRAINT totp_keys_pkey PRIMARY KEY
        CONSTRAINT totp_keys_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
    sealed_secret bytea NOT NULL,
    last_step bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    confirmed_at timestamptz
);
CREATE TABLE recovery_codes (
    user_id text NOT NULL CONSTRAINT recovery_codes_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
    digest bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    used_at timestamptz,
    CONSTRAINT recovery_codes_pkey PRIMARY KEY (user_id, digest)
);
CREATE TABLE passkeys (
    id text CONSTRAINT passkeys_pkey PRIMARY KEY,
    user_id text NOT NULL CONSTRAINT passkeys_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
    name text NOT NULL,
    credential_id bytea NOT NULL CONSTRAINT passkeys_credential_id_key UNIQUE,
    public_key bytea NOT NULL,
    sign_count bigint NOT NULL,
    transports text[] NOT NULL DEFAULT '{}',
    aaguid text NOT NULL,
    backed_up boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz
);
CREATE INDEX passkeys_user_id_ix ON passkeys (user_id);
CREATE TABLE passkey_challenges (
    challenge bytea CONSTRAINT passkey_challenges_pkey PRIMARY KEY,
    purpose text NOT NULL CONSTRAINT passkey_challenges_purpose_check
        CHECK (purpose IN ('register', 'sign_in', 'second_step', 'step_up')),
    bound_to text,
    user_id text CONSTRAINT passkey_challenges_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
    expires_at timestamptz NOT NULL
);
CREATE INDEX passkey_challenges_user_id_ix ON passkey_challenges (user_id);
CREATE INDEX passkey_challenges_expires_at_ix ON passkey_challenges (expires_at)
"""


def upgrade() -> None:
    """Add them."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
