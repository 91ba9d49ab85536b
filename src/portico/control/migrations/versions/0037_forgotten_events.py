"""Certificate events that were taken out of the state of their domains: one more status.

Code before this step never writes it, and lists such an event where it lists all.
"""

from __future__ import annotations

from alembic import op

revision = "0037"
down_revision = "0036"

_STATEMENTS = (
    "ALTER TABLE certificate_lifecycle_events DROP CONSTRAINT certificate_lifecycle_events_status_check",
    "ALTER TABLE certificate_lifecycle_events ADD CONSTRAINT certificate_lifecycle_events_status_check "
    "CHECK (status IN ('queued', 'applied', 'superseded', 'unmapped', 'unmatched', 'forgotten')) NOT VALID",
    "ALTER TABLE certificate_lifecycle_events VALIDATE CONSTRAINT certificate_lifecycle_events_status_check",
)


def upgrade() -> None:
    """Widen the check."""
    for statement in _STATEMENTS:
        op.execute(statement)
