"""Rows that were there before the chain: chained by the migration, in order of their ids."""

from __future__ import annotations

import json

import sqlalchemy as sa

from portico.control.audit import chain as chains
from portico.control.audit import store


def chain_existing(connection: sa.Connection) -> None:
    """Chain every row of a table that has no chain yet (the migration), in order of the ids."""
    found = connection.exec_driver_sql(
        "SELECT id, organization_id, date_trunc('milliseconds', at) AS at, actor_kind, actor_id, action, target, outcome,"
        " details, request_id, address FROM audit_events ORDER BY coalesce(organization_id, 'installation'), id"
    )
    heads: dict[str, tuple[int, bytes]] = {}
    for found_row in found:
        row = dict(found_row._mapping)
        if isinstance(row["details"], str):
            row["details"] = json.loads(row["details"])
        chain = row["organization_id"] or chains.INSTALLATION
        seq, previous = heads.get(chain, (0, chains.ZERO))
        values = store.chained(chain, seq + 1, previous, row)
        heads[chain] = values[1], values[2]
        connection.exec_driver_sql(store.TAKE_IN, (*values, row["id"], row["at"]))
    for chain, (seq, hash_) in heads.items():
        connection.exec_driver_sql(store.BEGIN, (chain, chains.ZERO))
        connection.exec_driver_sql(store.ADVANCE, (chain, seq, hash_))
