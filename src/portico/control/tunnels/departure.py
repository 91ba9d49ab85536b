"""What an organization has of tunnels: as lines of its export, and deleted with it, some at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from portico.control import changes
from portico.control.domains.service import leave_tunnels
from portico.control.identity.exports import Source, json_line, rows_of
from portico.control.tunnels import claim_store, policy, store
from portico.kit.db import Reader, Tx

_ROWS: Final = 500


async def _tunnels(reader: Reader, organization: str) -> AsyncIterator[bytes]:
    after: str | None = None
    while rows := await store.list_tunnels(reader, organization, _ROWS, after):
        yield "".join(json_line(_shown(row)) + "\n" for row in rows).encode()
        after = rows[-1].id


def _shown(row: Any) -> dict[str, Any]:
    names = ("id", "name", "protocol", "subdomain", "port", "target", "state", "policy_version")
    times = {name: getattr(row, name).isoformat() for name in ("created_at", "updated_at")}
    return {**{name: getattr(row, name) for name in names}, "policy": policy.told(row.policy), **times}


def _usage(table: str, columns: str) -> Source:
    counts = "requests, connections, bytes_in, bytes_out, errors"
    inner = f"SELECT {columns}, {counts} FROM {table} WHERE organization_id = $1 ORDER BY {columns}"  # noqa: S608
    return rows_of(f"SELECT to_json(x)::text AS line FROM ({inner}) x")  # noqa: S608 - our own names


#: What tunnels know of an organization, by the name of the file in its export.
SOURCES: Final[Mapping[str, Source]] = {
    "tunnels": _tunnels,
    "tunnel_usage": _usage("tunnel_usage", "hour, tunnel_id"),
    "usage": _usage("organization_usage", "hour"),
}


async def delete_tunnels(tx: Tx, organization: str, rows: int) -> int:
    """Delete up to ``rows`` tunnels of an organization that is being deleted, as their owner would; how many.

    Their names and ports cool down, and relays are told.
    """
    found = await store.some_tunnels(tx, organization, rows)
    await leave_tunnels(tx, [row.id for row in found])
    for row in found:
        await store.delete_tunnel(tx, organization, row.id)
        if row.port is not None:
            await store.free_port(tx, row.port)
        if row.subdomain is not None:
            await claim_store.free(tx, organization, row.subdomain)
        changes.append(tx, changes.tunnel_removed(row.id, "tunnel.deleted"))
    return len(found)
