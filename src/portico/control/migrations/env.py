"""Alembic's entry: runs the steps on the connection, and in the transaction, that ``migrations.upgrade`` opened."""

from __future__ import annotations

from alembic import context

from portico.kit.db import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
