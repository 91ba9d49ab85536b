"""What use beyond a plan is charged, and the months that were priced.

New tables: code before this step does not know them. Months that are over by now count as priced: nobody is charged for what was
used before it was said that it would be.
"""

from __future__ import annotations

from alembic import op

revision = "0036"
down_revision = "0035"

TABLES = """
CREATE TABLE billing_overage_closings (
    organization_id text NOT NULL,
    month date NOT NULL,
    subscription_id text,
    plan text,
    terms jsonb NOT NULL,
    looked_on date NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_overage_closings_pkey PRIMARY KEY (organization_id, month)
);
CREATE INDEX billing_overage_closings_month_ix ON billing_overage_closings (month, looked_on);
INSERT INTO billing_overage_closings (organization_id, month, terms, looked_on)
    SELECT DISTINCT s.organization_id, m.month, '[]'::jsonb, m.month FROM billing_subscriptions s
    CROSS JOIN (SELECT (date_trunc('month', now(), 'UTC') AT TIME ZONE 'UTC' - make_interval(months => n))::date AS month
                FROM generate_series(1, 4) AS n) m;
CREATE TABLE billing_overage_charges (
    id text CONSTRAINT billing_overage_charges_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    subscription_id text NOT NULL CONSTRAINT billing_overage_charges_subscription_id_fkey REFERENCES billing_subscriptions (id),
    provider text NOT NULL,
    plan text NOT NULL,
    metric text NOT NULL,
    month date NOT NULL,
    billed_month date NOT NULL,
    description text NOT NULL,
    used bigint NOT NULL,
    allowed bigint NOT NULL,
    quantity bigint NOT NULL,
    unit_minor bigint NOT NULL,
    amount_minor bigint NOT NULL,
    currency text NOT NULL,
    state text NOT NULL DEFAULT 'priced' CONSTRAINT billing_overage_charges_state_check
        CHECK (state IN ('priced', 'charged', 'waived', 'failed')),
    reason text,
    provider_ref text,
    invoice_id text,
    attempts integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    settled_at timestamptz,
    CONSTRAINT billing_overage_charges_subscription_id_key UNIQUE (subscription_id, metric, month, billed_month),
    CONSTRAINT billing_overage_charges_quantity_check CHECK (quantity > 0 AND month <= billed_month)
);
CREATE INDEX billing_overage_charges_organization_id_ix ON billing_overage_charges (organization_id, id);
"""


def upgrade() -> None:
    """Make the tables."""
    for statement in TABLES.strip().removesuffix(";").split(";\n"):
        op.execute(statement)
