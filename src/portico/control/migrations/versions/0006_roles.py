"""Roles that organizations make for themselves.

Code before this step knows the built-in role ``owner`` alone; a member with another role may do nothing there.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"

STATEMENTS = """
CREATE TABLE roles (
    id text CONSTRAINT roles_pkey PRIMARY KEY,
    organization_id text NOT NULL
        CONSTRAINT roles_organization_id_fkey REFERENCES organizations (id) ON DELETE CASCADE,
    name text NOT NULL,
    permissions text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL
);
CREATE UNIQUE INDEX roles_organization_id_name_ix ON roles (organization_id, lower(name))
"""


def upgrade() -> None:
    """Add the table."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
