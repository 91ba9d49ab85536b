"""Who has each subdomain, or had it last: names are reserved, and cool down when they are given up.

Safe for the code before: what it makes and deletes in the meantime has no claim, and the unique subdomain of tunnels decides.
"""

from __future__ import annotations

from alembic import op

revision = "0015"
down_revision = "0014"

STATEMENTS = """
CREATE TABLE subdomain_claims (
    subdomain text CONSTRAINT subdomain_claims_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    reserved_at timestamptz,
    freed_at timestamptz
);
CREATE INDEX subdomain_claims_reserved_ix ON subdomain_claims (organization_id) WHERE reserved_at IS NOT NULL;
CREATE INDEX subdomain_claims_freed_at_ix ON subdomain_claims (freed_at) WHERE freed_at IS NOT NULL;
INSERT INTO subdomain_claims (subdomain, organization_id)
SELECT subdomain, organization_id FROM tunnels WHERE subdomain IS NOT NULL
"""


def upgrade() -> None:
    """Add the table, with the names that are in use."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
