"""Why an organization is suspended, for its people to read.

A column that may be null: code before this step does not write it.
"""

from __future__ import annotations

from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    """Add the column."""
    op.execute("ALTER TABLE organizations ADD COLUMN suspended_reason text")
