"""Networks of keys, where they were last used from, and where agent sessions were opened from.

Safe for the code before: it leaves the new columns as they are, and knows no key that is limited to networks yet.
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"

STATEMENTS = """
ALTER TABLE api_keys
    ADD COLUMN allowed_cidrs text[] NOT NULL DEFAULT '{}',
    ADD COLUMN last_used_address text,
    ADD COLUMN revoked_reason text;
ALTER TABLE agent_sessions ADD COLUMN address text
"""


def upgrade() -> None:
    """Add the columns."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
