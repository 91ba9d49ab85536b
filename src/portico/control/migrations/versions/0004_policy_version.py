"""The order of a tunnel's policies: a number that rises with each.

Code before this step changes a policy without it, and raises the generation instead, which relays obey first; the default
counts its tunnels as having their first policy.
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column. The default is a constant, so no row is rewritten."""
    op.execute("ALTER TABLE tunnels ADD COLUMN policy_version bigint NOT NULL DEFAULT 1")
