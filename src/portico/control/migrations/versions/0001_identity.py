"""Identity, audit and idempotency keys."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

STATEMENTS = """
CREATE TABLE organizations (
    id text CONSTRAINT organizations_pkey PRIMARY KEY,
    name text NOT NULL,
    plan text NOT NULL DEFAULT 'free',
    created_at timestamptz NOT NULL DEFAULT now(),
    suspended_at timestamptz
);
CREATE TABLE users (
    id text CONSTRAINT users_pkey PRIMARY KEY,
    email text NOT NULL CONSTRAINT users_email_key UNIQUE,
    password_hash text,
    platform_operator boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now(),
    disabled_at timestamptz
);
CREATE TABLE members (
    organization_id text NOT NULL
        CONSTRAINT members_organization_id_fkey REFERENCES organizations (id) ON DELETE CASCADE,
    user_id text NOT NULL CONSTRAINT members_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
    role text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT members_pkey PRIMARY KEY (organization_id, user_id)
);
CREATE INDEX members_user_id_ix ON members (user_id);
CREATE TABLE sign_in_sessions (
    id text CONSTRAINT sign_in_sessions_pkey PRIMARY KEY,
    user_id text NOT NULL CONSTRAINT sign_in_sessions_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
    organization_id text NOT NULL
        CONSTRAINT sign_in_sessions_organization_id_fkey REFERENCES organizations (id) ON DELETE CASCADE,
    user_agent text,
    address text,
    created_at timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    ended_at timestamptz,
    end_reason text
);
CREATE INDEX sign_in_sessions_user_id_ix ON sign_in_sessions (user_id);
CREATE INDEX sign_in_sessions_organization_id_ix ON sign_in_sessions (organization_id);
CREATE TABLE refresh_tokens (
    digest bytea CONSTRAINT refresh_tokens_pkey PRIMARY KEY,
    session_id text NOT NULL
        CONSTRAINT refresh_tokens_session_id_fkey REFERENCES sign_in_sessions (id) ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    used_at timestamptz
);
CREATE INDEX refresh_tokens_session_id_ix ON refresh_tokens (session_id);
CREATE TABLE api_keys (
    id text CONSTRAINT api_keys_pkey PRIMARY KEY,
    organization_id text
        CONSTRAINT api_keys_organization_id_fkey REFERENCES organizations (id) ON DELETE CASCADE,
    user_id text CONSTRAINT api_keys_user_id_fkey REFERENCES users (id) ON DELETE SET NULL,
    kind text NOT NULL CONSTRAINT api_keys_kind_check CHECK (kind IN ('agent', 'api', 'operator')),
    name text NOT NULL,
    digest bytea NOT NULL CONSTRAINT api_keys_digest_key UNIQUE,
    prefix text NOT NULL,
    scopes text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    last_used_at timestamptz,
    revoked_at timestamptz,
    rotated_from text,
    CONSTRAINT api_keys_organization_check CHECK ((organization_id IS NULL) = (kind = 'operator'))
);
CREATE INDEX api_keys_organization_id_ix ON api_keys (organization_id);
CREATE INDEX api_keys_user_id_ix ON api_keys (user_id);
CREATE TABLE device_codes (
    digest bytea CONSTRAINT device_codes_pkey PRIMARY KEY,
    user_code text NOT NULL CONSTRAINT device_codes_user_code_key UNIQUE,
    hostname text NOT NULL,
    address text,
    state text NOT NULL DEFAULT 'pending'
        CONSTRAINT device_codes_state_check CHECK (state IN ('pending', 'approved', 'denied', 'used')),
    interval_seconds integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    last_polled_at timestamptz,
    user_id text CONSTRAINT device_codes_user_id_fkey REFERENCES users (id) ON DELETE CASCADE,
    organization_id text
        CONSTRAINT device_codes_organization_id_fkey REFERENCES organizations (id) ON DELETE CASCADE
);
CREATE INDEX device_codes_user_id_ix ON device_codes (user_id);
CREATE INDEX device_codes_organization_id_ix ON device_codes (organization_id);
CREATE INDEX device_codes_expires_at_ix ON device_codes (expires_at);
CREATE TABLE signing_keys (
    kid text CONSTRAINT signing_keys_pkey PRIMARY KEY,
    state text NOT NULL CONSTRAINT signing_keys_state_check CHECK (state IN ('next', 'active', 'retired')),
    public_x bytea NOT NULL,
    sealed_seed bytea,
    created_at timestamptz NOT NULL DEFAULT now(),
    activated_at timestamptz,
    retired_at timestamptz
);
CREATE UNIQUE INDEX signing_keys_one_next_key ON signing_keys (state) WHERE state = 'next';
CREATE UNIQUE INDEX signing_keys_one_active_key ON signing_keys (state) WHERE state = 'active';
CREATE TABLE throttles (
    bucket bytea CONSTRAINT throttles_pkey PRIMARY KEY,
    count integer NOT NULL,
    window_ends_at timestamptz NOT NULL
);
CREATE INDEX throttles_window_ends_at_ix ON throttles (window_ends_at);
CREATE TABLE audit_events (
    id text CONSTRAINT audit_events_pkey PRIMARY KEY,
    organization_id text,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor_kind text NOT NULL,
    actor_id text NOT NULL,
    action text NOT NULL,
    target text,
    outcome text NOT NULL CONSTRAINT audit_events_outcome_check CHECK (outcome IN ('success', 'refused')),
    details jsonb NOT NULL,
    request_id text,
    address text
);
CREATE INDEX audit_events_organization_id_id_ix ON audit_events (organization_id, id);
CREATE TABLE idempotency_keys (
    caller text NOT NULL,
    key text NOT NULL,
    fingerprint bytea NOT NULL,
    status smallint,
    content_type text,
    location text,
    body bytea,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT idempotency_keys_pkey PRIMARY KEY (caller, key)
);
CREATE INDEX idempotency_keys_created_at_ix ON idempotency_keys (created_at)
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
