"""What an organization has of domains, as lines of its export; and their end. Relays hear of it with that of its tunnels, but for
names that are served to nobody: those were held against everybody else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from portico.control.domains import edge, store
from portico.control.identity.exports import Source, rows_of
from portico.kit.db import Tx

_COLUMNS: Final = (
    "id, name, hostname_status, tls_mode, failure_policy, tunnel_id, verified_at, dns_error, cert_status, cert_serial, "
    "cert_fingerprint, cert_issuer, cert_not_before, cert_not_after, created_at, updated_at"
)
_ROWS: Final = f"SELECT {_COLUMNS} FROM custom_domains WHERE organization_id = $1 ORDER BY id"  # noqa: S608 - our own names

#: By the name of the file in the export.
SOURCES: Final[Mapping[str, Source]] = {
    "domains": rows_of(f"SELECT to_json(x)::text AS line FROM ({_ROWS}) x")  # noqa: S608
}


async def open_up(tx: Tx, organization: str, limit: int) -> int:
    """Delete up to ``limit`` blocked domains of an organization that is being deleted; how many."""
    rows = await store.blocked_of(tx, organization, limit)
    for row in rows:
        edge.tell(tx, row, None)
        await store.delete(tx, row.id)
    return len(rows)
