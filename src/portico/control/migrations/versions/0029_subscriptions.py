"""Customers, subscriptions, payments, dunning, and who set an override of a plan.

New tables, and a column with a default: code before this step writes overrides as an operator's, which they are.
"""

from __future__ import annotations

from alembic import op

revision = "0029"
down_revision = "0028"

_STATUSES = "'pending', 'trialing', 'active', 'past_due', 'suspended', 'paused', 'canceled', 'completed', 'expired'"
_QUEUE = """
    queue_state text NOT NULL DEFAULT 'pending',
    attempts integer NOT NULL DEFAULT 0,
    queued_at timestamptz NOT NULL DEFAULT now(),
    available_at timestamptz NOT NULL DEFAULT now(),
    moved_at timestamptz NOT NULL DEFAULT now(),
    lease_token uuid,
    last_error text,
    finished_at timestamptz,
"""

STATEMENTS = f"""
ALTER TABLE plan_overrides ADD COLUMN source text NOT NULL DEFAULT 'operator'
    CONSTRAINT plan_overrides_source_check CHECK (source IN ('operator', 'dunning'));
ALTER TABLE plan_overrides DROP CONSTRAINT plan_overrides_pkey,
    ADD CONSTRAINT plan_overrides_pkey PRIMARY KEY (organization_id, name, source);
CREATE TABLE billing_customers (
    id text CONSTRAINT billing_customers_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    provider text NOT NULL,
    account text NOT NULL,
    livemode boolean NOT NULL,
    ref text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_customers_ref_key UNIQUE (provider, account, livemode, ref)
);
CREATE INDEX billing_customers_organization_id_ix ON billing_customers (organization_id);
CREATE TABLE billing_subscriptions (
    id text CONSTRAINT billing_subscriptions_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    provider text NOT NULL,
    account text NOT NULL,
    livemode boolean NOT NULL,
    ref text NOT NULL,
    customer_ref text,
    checkout_plan text,
    checkout_plan_version integer,
    status text NOT NULL DEFAULT 'pending' CONSTRAINT billing_subscriptions_status_check CHECK (status IN ({_STATUSES})),
    object_version bigint NOT NULL DEFAULT 0,
    status_at timestamptz,
    plan_ref text,
    cancel_at_period_end boolean NOT NULL DEFAULT false,
    period_start timestamptz,
    period_end timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_subscriptions_ref_key UNIQUE (provider, account, livemode, ref)
);
CREATE INDEX billing_subscriptions_organization_id_ix ON billing_subscriptions (organization_id);
CREATE TABLE billing_subscription_states (
    subscription_id text NOT NULL CONSTRAINT billing_subscription_states_subscription_id_fkey
        REFERENCES billing_subscriptions (id),
    effect_key text NOT NULL,
    event_id text NOT NULL,
    object_version bigint NOT NULL,
    occurred_at timestamptz NOT NULL,
    status text,
    plan_ref text,
    cancel_at_period_end boolean,
    period_start timestamptz,
    period_end timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_subscription_states_pkey PRIMARY KEY (subscription_id, effect_key)
);
CREATE TABLE billing_payments (
    id text CONSTRAINT billing_payments_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    provider text NOT NULL,
    account text NOT NULL,
    livemode boolean NOT NULL,
    ref text NOT NULL,
    subscription_id text CONSTRAINT billing_payments_subscription_id_fkey REFERENCES billing_subscriptions (id),
    invoice_ref text,
    invoice_id text,
    currency text NOT NULL,
    amount_minor bigint NOT NULL,
    tax_minor bigint NOT NULL DEFAULT 0,
    fee_minor bigint NOT NULL DEFAULT 0,
    paid_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_payments_ref_key UNIQUE (provider, account, livemode, ref),
    CONSTRAINT billing_payments_amounts_check CHECK (amount_minor >= 0 AND tax_minor >= 0)
);
CREATE INDEX billing_payments_organization_ix ON billing_payments (organization_id, id);
CREATE INDEX billing_payments_subscription_id_ix ON billing_payments (subscription_id);
CREATE TABLE billing_payment_failures (
    effect_key text CONSTRAINT billing_payment_failures_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    subscription_id text NOT NULL
        CONSTRAINT billing_payment_failures_subscription_id_fkey REFERENCES billing_subscriptions (id),
    invoice_ref text,
    currency text NOT NULL,
    amount_minor bigint NOT NULL,
    attempt integer NOT NULL,
    occurred_at timestamptz NOT NULL,
    next_attempt_at timestamptz,
    is_final boolean NOT NULL DEFAULT false,
    failure_code text,
    waived_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX billing_payment_failures_subscription_ix ON billing_payment_failures (subscription_id, occurred_at);
CREATE TABLE billing_waiting_events (
    effect_key text CONSTRAINT billing_waiting_events_pkey PRIMARY KEY,
    needs text[] NOT NULL,
    kind text NOT NULL,
    event jsonb NOT NULL,
    occurred_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX billing_waiting_events_needs_ix ON billing_waiting_events USING gin (needs);
CREATE TABLE billing_standings (
    organization_id text CONSTRAINT billing_standings_pkey PRIMARY KEY,
    plan text NOT NULL,
    plan_version integer,
    subscription_id text,
    restricted boolean NOT NULL DEFAULT false,
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE billing_checkouts (
    id text CONSTRAINT billing_checkouts_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    provider text NOT NULL,
    account text NOT NULL,
    livemode boolean NOT NULL,
    plan text NOT NULL,
    plan_version integer NOT NULL,
    state text NOT NULL DEFAULT 'requested' CONSTRAINT billing_checkouts_state_check
        CHECK (state IN ('requested', 'open', 'completed', 'expired', 'failed')),
    ref text,
    customer_ref text,
    subscription_ref text,
    url text,
    expires_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX billing_checkouts_organization_ix ON billing_checkouts (organization_id, id);
CREATE UNIQUE INDEX billing_checkouts_ref_ix ON billing_checkouts (provider, account, livemode, ref);
CREATE UNIQUE INDEX billing_checkouts_subscription_ix
    ON billing_checkouts (provider, account, livemode, subscription_ref);
CREATE TABLE billing_refunds (
    id text CONSTRAINT billing_refunds_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    payment_id text NOT NULL CONSTRAINT billing_refunds_payment_id_fkey REFERENCES billing_payments (id),
    provider text NOT NULL,
    account text NOT NULL,
    livemode boolean NOT NULL,
    ref text,
    state text NOT NULL DEFAULT 'requested'
        CONSTRAINT billing_refunds_state_check CHECK (state IN ('requested', 'pending', 'succeeded', 'failed')),
    amount_minor bigint NOT NULL CONSTRAINT billing_refunds_amount_check CHECK (amount_minor > 0),
    currency text NOT NULL,
    reason text,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX billing_refunds_organization_ix ON billing_refunds (organization_id, id);
CREATE INDEX billing_refunds_payment_id_ix ON billing_refunds (payment_id);
CREATE UNIQUE INDEX billing_refunds_ref_ix ON billing_refunds (provider, account, livemode, ref);
CREATE TABLE billing_calls (
    id text CONSTRAINT billing_calls_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    request_key text NOT NULL,
    act text NOT NULL,
    subject text NOT NULL,
    provider text NOT NULL,
    arguments jsonb NOT NULL,
    actor jsonb NOT NULL,
    result jsonb,
    refusal jsonb,
    {_QUEUE.strip()}
    CONSTRAINT billing_calls_request_key UNIQUE (organization_id, request_key),
    CONSTRAINT billing_calls_queue_state_check CHECK (queue_state IN ('pending', 'done', 'dead'))
);
CREATE INDEX billing_calls_queue_ix ON billing_calls (queue_state, available_at) WHERE queue_state <> 'done';
CREATE INDEX billing_calls_subject_ix ON billing_calls (subject);
CREATE TABLE billing_dunning_cases (
    id text CONSTRAINT billing_dunning_cases_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    subscription_id text NOT NULL
        CONSTRAINT billing_dunning_cases_subscription_id_fkey REFERENCES billing_subscriptions (id),
    currency text NOT NULL,
    state text NOT NULL CONSTRAINT billing_dunning_cases_state_check CHECK (state IN ('grace', 'notified', 'retrying',
        'restricted', 'suspended', 'written_off', 'paused', 'recovered', 'canceled')),
    stage text,
    amount_minor bigint NOT NULL,
    attempts integer NOT NULL,
    failure_code text,
    next_attempt_at timestamptz,
    opened_at timestamptz NOT NULL,
    due_at timestamptz,
    paused_at timestamptz,
    paused_days double precision NOT NULL DEFAULT 0,
    closed_at timestamptz,
    reason text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_dunning_cases_closed_check CHECK ((closed_at IS NOT NULL) = (state IN ('recovered', 'canceled')))
);
CREATE UNIQUE INDEX billing_dunning_cases_open_ix ON billing_dunning_cases (subscription_id, currency)
    WHERE closed_at IS NULL;
CREATE INDEX billing_dunning_cases_due_ix ON billing_dunning_cases (due_at) WHERE closed_at IS NULL;
CREATE INDEX billing_dunning_cases_organization_ix ON billing_dunning_cases (organization_id, id)
"""


def upgrade() -> None:
    """Add them."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
