"""Ports of TCP tunnels: a row per port that was ever offered, and the port of a tunnel.

Code before this step makes no TCP tunnel and reads no column by position; it is left undisturbed.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"

STATEMENTS = """
CREATE TABLE tcp_ports (
    port integer CONSTRAINT tcp_ports_pkey PRIMARY KEY,
    organization_id text,
    leased_at timestamptz,
    freed_at timestamptz
);
CREATE INDEX tcp_ports_free_ix ON tcp_ports (freed_at NULLS FIRST, port) WHERE leased_at IS NULL;
ALTER TABLE tunnels ADD COLUMN port integer
    CONSTRAINT tunnels_port_key UNIQUE
    CONSTRAINT tunnels_port_fkey REFERENCES tcp_ports (port);
"""


def upgrade() -> None:
    """Create the table, add the column."""
    for statement in STATEMENTS.split(";\n"):
        if statement.strip():
            op.execute(statement)
