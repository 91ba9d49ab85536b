"""Domains beyond what an organization's plan has room for.

A new column that may be empty: code before this step does not know it, and serves what it always did.
"""

from __future__ import annotations

from alembic import op

revision = "0030"
down_revision = "0029"


def upgrade() -> None:
    """Add the column."""
    op.execute("ALTER TABLE custom_domains ADD COLUMN frozen text")
