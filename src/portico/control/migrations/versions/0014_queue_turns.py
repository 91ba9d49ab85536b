"""Queues: when a time was decided, what was asked for while it was at work, and turns between the receivers of the outbox.

New columns have defaults, and code before this step does not name them: what it writes meanwhile has the times of this step, and
no look for a clock that was set back takes those for wrong.
"""

from __future__ import annotations

from alembic import op

revision = "0014"
down_revision = "0013"

STATEMENTS = """
ALTER TABLE queue_jobs ADD COLUMN moved_at timestamptz NOT NULL DEFAULT now(), ADD COLUMN again boolean NOT NULL DEFAULT false;
ALTER TABLE organization_exports ADD COLUMN moved_at timestamptz NOT NULL DEFAULT now();
ALTER TABLE outbox_messages
    ADD COLUMN moved_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN lane text COLLATE "C" NOT NULL DEFAULT '-',
    ADD COLUMN keep_body boolean NOT NULL DEFAULT false,
    ADD COLUMN status integer,
    ADD COLUMN attempted_at timestamptz;
CREATE INDEX outbox_messages_turns_ix ON outbox_messages (driver, lane, available_at) WHERE queue_state = 'pending';
CREATE INDEX outbox_messages_lane_id_ix ON outbox_messages (lane, id);
DROP INDEX outbox_messages_finished_at_ix;
CREATE INDEX outbox_messages_finished_at_ix ON outbox_messages (finished_at) WHERE queue_state <> 'pending'
"""


def upgrade() -> None:
    """Add them."""
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
