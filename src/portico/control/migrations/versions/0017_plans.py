"""Plans with versions, what an operator sets differently, totals per month, and tunnels that a plan has no room for.

Organizations that are there keep what they have had, which is no limit of a plan. Safe for the code before: an organization
that it makes meanwhile is on the plan without limits, too, and what it counts is in the hours that usage is read from.
"""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

from portico.control.identity.plans import PLAN_TABLE

revision = "0017"
down_revision = "0016"

STATEMENTS = """
CREATE TABLE plans (
    id text NOT NULL,
    version integer NOT NULL,
    name text NOT NULL,
    position integer NOT NULL,
    listed boolean NOT NULL,
    hard_cap boolean NOT NULL,
    limits jsonb NOT NULL,
    features text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT plans_pkey PRIMARY KEY (id, version)
);
CREATE TABLE plan_overrides (
    organization_id text NOT NULL
        CONSTRAINT plan_overrides_organization_id_fkey REFERENCES organizations (id) ON DELETE CASCADE,
    name text NOT NULL,
    value bigint,
    expires_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT plan_overrides_pkey PRIMARY KEY (organization_id, name)
);
CREATE INDEX plan_overrides_expires_at_ix ON plan_overrides (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE organization_months (
    organization_id text NOT NULL,
    month date NOT NULL,
    requests bigint NOT NULL DEFAULT 0,
    connections bigint NOT NULL DEFAULT 0,
    bytes_in bigint NOT NULL DEFAULT 0,
    bytes_out bigint NOT NULL DEFAULT 0,
    errors bigint NOT NULL DEFAULT 0,
    CONSTRAINT organization_months_pkey PRIMARY KEY (organization_id, month)
);
CREATE TABLE usage_notices (
    organization_id text NOT NULL,
    month date NOT NULL,
    name text NOT NULL,
    percent integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT usage_notices_pkey PRIMARY KEY (organization_id, month, name, percent)
);
ALTER TABLE tunnels ADD COLUMN frozen text
"""

GUARDS = (
    """
CREATE FUNCTION plans_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a version of a plan is not changed' USING ERRCODE = 'insufficient_privilege';
END $$
""",
    """
CREATE TRIGGER plans_guard BEFORE UPDATE OR DELETE ON plans FOR EACH ROW EXECUTE FUNCTION plans_guard()
""",
)

ORGANIZATIONS = """
UPDATE organizations SET plan = 'unlimited';
ALTER TABLE organizations
    ALTER COLUMN plan SET DEFAULT 'unlimited',
    ADD COLUMN plan_version integer NOT NULL DEFAULT 1,
    ADD COLUMN edge_version bigint NOT NULL DEFAULT 0,
    ADD COLUMN edge_state jsonb,
    ADD CONSTRAINT organizations_plan_fkey FOREIGN KEY (plan, plan_version) REFERENCES plans (id, version);
CREATE INDEX organizations_edge_version_ix ON organizations (edge_version) WHERE edge_version > 0;
INSERT INTO organization_months (organization_id, month, requests, connections, bytes_in, bytes_out, errors)
SELECT organization_id, date_trunc('month', hour AT TIME ZONE 'UTC')::date, least(sum(requests), 9223372036854775807),
       least(sum(connections), 9223372036854775807), least(sum(bytes_in), 9223372036854775807),
       least(sum(bytes_out), 9223372036854775807), least(sum(errors), 9223372036854775807)
FROM organization_usage GROUP BY 1, 2
"""


def seed() -> None:
    """Insert the declared versions that are not there."""
    add = sa.text(
        "INSERT INTO plans (id, version, name, position, listed, hard_cap, limits, features)"
        " VALUES (:id, :version, :name, :position, :listed, :hard_cap, CAST(:limits AS jsonb), :features)"
        " ON CONFLICT DO NOTHING"
    ).bindparams(sa.bindparam("features", type_=sa.ARRAY(sa.Text)))
    for plan in PLAN_TABLE:
        row = {name: getattr(plan, name) for name in ("id", "version", "name", "position", "listed", "hard_cap")}
        limits, features = json.dumps(dict(plan.limits)), sorted(plan.features)
        op.get_bind().execute(add, {**row, "limits": limits, "features": features})


def upgrade() -> None:
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
    for statement in GUARDS:
        op.execute(statement)
    seed()
    for statement in ORGANIZATIONS.split(";\n"):
        op.execute(statement)
