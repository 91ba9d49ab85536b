"""Finance events by the time at which they happened: what reports are read by, and settlements are compared by.

An index: code before this step does without it.
"""

from __future__ import annotations

from alembic import op

revision = "0035"
down_revision = "0034"


def upgrade() -> None:
    """Add the index."""
    op.execute("CREATE INDEX billing_finance_events_occurred_at_id_ix ON billing_finance_events (occurred_at, id)")
