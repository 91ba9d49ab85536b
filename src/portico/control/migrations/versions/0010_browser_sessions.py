"""Sessions of browsers have a cookie of their own.

Code before this step goes on with access tokens in cookies; code after it does not know them: those browsers sign in again.
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the column."""
    op.execute(
        "ALTER TABLE sign_in_sessions ADD COLUMN cookie_digest bytea"
        " CONSTRAINT sign_in_sessions_cookie_digest_key UNIQUE"
    )
