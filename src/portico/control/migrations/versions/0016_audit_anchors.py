"""What stays of deleted audit rows is signed, and checkpoints know whether they were stored outside.

Columns that may be null: code before this step does not write them. An anchor that such a worker moved after this step is
reported by verification until the next retention of that chain: stop workers of the version before.
"""

from __future__ import annotations

from alembic import op

revision = "0016"
down_revision = "0015"

STATEMENTS = """
ALTER TABLE audit_chains ADD COLUMN anchor_token text, ADD COLUMN anchor_kid text;
ALTER TABLE audit_checkpoints ADD COLUMN stored_at timestamptz;
CREATE INDEX audit_checkpoints_unstored_ix ON audit_checkpoints (created_at) WHERE stored_at IS NULL
"""


def upgrade() -> None:
    """Add the columns."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
